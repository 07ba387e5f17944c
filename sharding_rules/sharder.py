"""A table of rules on a mesh.

At rest parameters and optimizer state are DTensors. In a step there are plain tensors only, each rank's part: the names
of operands say how they are placed. Maths runs in `local` regions, and all that ranks exchange is derived from names.
"""

import itertools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from functional_trainer import tree
from functional_trainer.param import Part
from functional_trainer.types import ONE_DEVICE, Fp8
from sharding_rules.exchange import Step, check, move, run
from sharding_rules.gathering import Gathering
from sharding_rules.layout import Moves, names
from sharding_rules.mesh import AXES
from sharding_rules.rules import Held, Rules, chunk, dims, route


@dataclass(frozen=True, eq=False)
class Sharder(Gathering):
    """`functional_trainer.types.OneDevice` on a mesh (without axes of size one); see there for each method."""

    dispatch: str | None = None

    @classmethod
    def of(
        cls, rules: Rules, mesh: DeviceMesh, specs: tree.Tree, dispatch: str | None = None, fp8: Fp8 | None = None,
        **more: Any,
    ) -> "Sharder":  # fmt: skip
        """Return the sharder of a model with these parameters (a tree of `Param`); ValueError as of `Rules.fit`."""
        sizes = dict(zip(mesh.mesh_dim_names or (), mesh.shape, strict=True))
        flat = {f"params/{path}": p for path, p in tree.flatten(specs).items()}
        matrices = {re.sub(r"/\d+/", "/_/", path): (p.batch.count("E"), len(p.out_in[1])) for path, p in flat.items()}
        fitted = rules.fit({path: p.shape for path, p in flat.items()}, sizes)
        return cls(fitted, mesh, fp8 or {}, matrices, dispatch, **more)

    @property
    def rank(self) -> int:
        return dist.get_rank()

    @property
    def world(self) -> int:
        return self.mesh.size()

    # in a step: plain tensors, each rank's part ----------------------------------------------------------------------

    def local(self, fn: Callable, ins: tuple[str, ...], outs: tuple[str, ...]) -> Callable:
        """Run `fn` on local parts, the exchanges around it and those of the gradients derived.

        Along an axis on which any operand or result is sharded the ranks compute different things. There a whole
        operand gets only its rank's share of the gradient, and a result that is not sharded must be called "sum" or
        "sum:name", since it is each rank's share of it.
        """
        placed = [self.where(names(n)[1]) for n in ins]
        placed += [self.where(names(n.removeprefix("sum:"))[0]) for n in outs if n != "sum"]
        varies = {axis for where in placed for axis in dims(where)}
        arrive, leave = [self._arrive(n, varies) for n in ins], [self._leave(n, varies) for n in outs]

        def moved(x: torch.Tensor, name: str, moves: Moves) -> torch.Tensor:
            steps, back = self._repeated(x.shape, name, moves)
            check(x.shape, steps, name)
            return move(x, steps, back)

        def region(*args: torch.Tensor):
            parts = [moved(x, name, moves) for x, name, moves in zip(args, ins, arrive, strict=True)]
            made = fn(*parts) if torch.compiler.is_compiling() else _explained(fn, parts, ins)
            made = (made,) if len(outs) == 1 else made
            left = [moved(x, name, moves) for x, name, moves in zip(made, outs, leave, strict=True)]
            return left[0] if len(outs) == 1 else tuple(left)

        return region

    def part(self, name: str, dim: int) -> tuple[int, int]:
        return self._index(self.where(name)[dim])

    def group(self, name: str, dim: int) -> str | None:
        axes = self.where(name)[dim]
        return self._step("", axes).group if axes else None

    def replicate(self, x: torch.Tensor) -> torch.Tensor:
        axes = self._axes(self.columns)
        return move(x, (self._step("sum", axes),), ()) if axes else x

    def largest(self, x: torch.Tensor) -> torch.Tensor:
        axes = self._axes(self.columns)
        return run(x, (self._step("max", axes),)) if axes else x

    def share(self, x: torch.Tensor) -> torch.Tensor:
        return move(x, tuple(self._step("scale", axis) for axis in self._axes(self.columns)), ())

    def total(self, x: torch.Tensor) -> torch.Tensor:
        return run(x / (self.world // self.data[1]), (self._step("sum", tuple(self.sizes)),))

    @property
    def data(self) -> tuple[int, int]:
        return self._index(self.columns[0])

    def put_batch(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        steps = tuple(self._step("part", axis, d) for axis, _, d in route(self.columns[:1], self.columns) if d)
        for name, x in batch.items():
            check(x.shape, steps, f"batch column {name!r}")
        return {name: run(x, steps) for name, x in batch.items()}

    def micro(self, batch: dict[str, torch.Tensor], parts: int) -> list[dict[str, torch.Tensor]]:
        return ONE_DEVICE.micro(batch, parts)

    # at rest: DTensors ----------------------------------------------------------------------------------------------

    def stored(self, p: Any) -> tuple[Held, tuple[int, ...]]:
        """Return the axes that shard each dim of a parameter at rest, and the shape of all of it."""
        shards = [(axis, q.dim) for axis, q in zip(self.sizes, p.placements, strict=True) if isinstance(q, Shard)]
        return tuple(tuple(axis for axis, dim in shards if dim == d) for d in range(p.ndim)), tuple(p.shape)

    def own(self, where: Held, shape: Sequence[int], at: Mapping[str, int] | None = None) -> Part:
        """Return the part of a tensor that this rank stores, or the one at these coordinates."""
        at = at or {axis: self.mesh.get_local_rank(axis) for axis in self.sizes}
        pairs = zip(shape, where, strict=True)
        return tuple(chunk(length, [(at[axis], self.sizes[axis]) for axis in axes]) for length, axes in pairs)

    def around(self, p: Any) -> Callable:
        (where, shape), split = self.stored(p), []
        for dim, part in enumerate(self.own(where, shape)):
            if where[dim]:
                split.append((dim, self._whole(where[dim], dim, shape[dim])[0], part.start, part.stop - part.start))
        return partial(_around, tuple(split))

    def squares(self, squares: list[torch.Tensor], params: list[DTensor]) -> torch.Tensor:
        shares = []
        for x, p in zip(squares, params, strict=True):
            copies = math.prod([self.mesh.size(i) for i, q in enumerate(p.placements) if q.is_replicate()])
            shares.append(x / copies)
        return run(torch.stack(shares), (self._step("sum", tuple(self.sizes)),))

    def placements(self, path: str, shape: tuple[int, ...]) -> tuple[Placement, ...]:
        """Return where a parameter is stored; ValueError as of `where`, or if axes of a dim are not in mesh order."""
        where = self.where(f"params/{path}", use=False, shape=shape)
        for axes in where:
            if list(axes) != sorted(axes, key=AXES.index):
                raise ValueError(f"params/{path}: axes that share a dim of a parameter come as in {AXES}, not {axes}")
        return tuple(Shard(dims(where)[a]) if a in dims(where) else Replicate() for a in self.sizes)

    def full(self, x: DTensor) -> torch.Tensor:
        # Not full_tensor(), which puts a dim that several axes do not divide together in a wrong order.
        steps = [self._whole(axes, dim, n)[0] for dim, (axes, n) in enumerate(zip(*self.stored(x), strict=True))]
        return run(x.to_local(), tuple(itertools.chain(*steps)))

    def collect(self, x: DTensor) -> torch.Tensor | None:
        own, whole = x.to_local().detach().contiguous(), None
        if self.rank == 0:
            whole = torch.empty(x.shape, dtype=x.dtype)
        for at in itertools.product(*map(range, self.mesh.shape)):
            sender = int(self.mesh.mesh[at])
            if any(i and q.is_replicate() for i, q in zip(at, x.placements, strict=True)):
                continue  # a copy
            part = self.own(*self.stored(x), dict(zip(self.sizes, at, strict=True)))
            if whole is not None and sender == 0:
                whole[part] = own
            elif whole is not None and whole[part].numel():
                came = torch.empty_like(whole[part], memory_format=torch.contiguous_format, device=own.device)
                dist.recv(came, sender)
                whole[part] = came
            elif sender == self.rank and own.numel():
                dist.send(own, 0)
        return whole

    def init_leaf(self, path: str, shape: tuple[int, ...], make: Callable[[Part], torch.Tensor]) -> DTensor:
        placed, where = self.placements(path, shape), self.where(f"params/{path}", use=False, shape=shape)
        at: dict[str, Any] = {"shape": torch.Size(shape), "stride": torch.empty(shape, device="meta").stride()}
        return DTensor.from_local(make(self.own(where, shape)), self.mesh, placed, run_check=False, **at)


def _explained(fn: Callable, parts: list[torch.Tensor], names: tuple[str, ...]) -> Any:
    """Call `fn`; an error says which operands it was given, and of which shapes."""
    try:
        return fn(*parts)
    except RuntimeError as error:
        given = ", ".join(f"{name} {tuple(x.shape)}" for name, x in zip(names, parts, strict=True))
        error.add_note(f"this rank's parts: {given}; `experiments/rules.py lint` finds rules that do not fit together")
        raise


def _around(
    split: tuple[tuple[int, tuple[Step, ...], int, int], ...], fn: Callable, x: torch.Tensor, batch: int
) -> torch.Tensor:
    """Gather a part along the dims after the first `batch`, apply `fn`, and return this rank's part of the result.

    `split` is the dims that are sharded: number, steps that gather it, start and length of this rank's part.
    """
    split = tuple(s for s in split if s[0] >= batch)
    for _, steps, _, _ in split:
        x = run(x, steps)
    made = fn(x)
    for dim, _, start, length in split:
        made = made.narrow(dim, start, length)
    return made
