"""One regex table decides where every tensor lives: parameters, optimizer state, batch and activations.

A rule maps a path to a `P` with one entry per tensor dim. A plain axis holds in use and at rest; `zero(...)` axes shard
storage only: the tensor is gathered over them before use and its gradient reduce-scattered. Optimizer state follows
its parameter. The first `fullmatch` wins and a path without a rule is an error: there is no catch-all.

`Sharder` binds a table to a mesh. Tensors at boundaries are DTensors; maths runs in `local` regions on plain shards.
"""

import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor, zeros

from functional_trainer import tree
from sharding_rules.mesh import AXES

Entry = str | tuple[str, ...] | None
Placements = tuple[Placement, ...]


class P(tuple):
    """Mesh axes per tensor dim: `P("ep", None, zero("fsdp"))`; ValueError for axes unknown, repeated or misordered."""

    def __new__(cls, *entries: Entry):
        named = [axes_of(entry) for entry in entries]
        flat = [axis for axes in named for axis in axes]
        if odd := [axis for axis in flat if axis not in AXES]:
            raise ValueError(f"P{entries}: {odd[0]!r} is not a mesh axis; these are: {', '.join(AXES)}")
        if twice := [axis for axis in flat if flat.count(axis) > 1]:
            raise ValueError(f"P{entries}: axis {twice[0]!r} is used twice; it can shard one dim")
        for axes in named:
            if axes != (right := tuple(sorted(axes, key=AXES.index))):
                raise ValueError(f"P{entries}: axes that share a dim come outer to inner, so {axes} is to be {right}")
        return super().__new__(cls, entries)

    def __repr__(self) -> str:
        return f"P({', '.join(map(repr, self))})"


class zero(tuple):
    """Axes that shard a dim at rest only (https://arxiv.org/abs/1910.02054)."""

    def __new__(cls, *axes: str):
        return super().__new__(cls, axes)

    def __repr__(self) -> str:
        return f"zero({', '.join(map(repr, self))})"


def axes_of(entry: Entry) -> tuple[str, ...]:
    """Return the mesh axes that an entry of a `P` names, outer to inner."""
    return () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)


class optional(str):
    """A pattern that some models of the family have no path for."""


@dataclass(frozen=True)
class Rules:
    """Ordered (regex, P) rows."""

    table: tuple[tuple[str, P], ...]

    def spec(self, path: str) -> P:
        """Return the entries of the first row that matches the whole path; ValueError if none does."""
        for pattern, spec in self.table:
            if re.fullmatch(pattern, path):
                return spec
        raise ValueError(f"no sharding rule matches {path!r}; add a row for it")

    def unused(self, paths: Iterable[str]) -> list[str]:
        """Return the patterns, `optional` ones aside, that are the first match of none of `paths`."""
        hit = {next((p for p, _ in self.table if re.fullmatch(p, path)), None) for path in paths}
        return [p for p, _ in self.table if p not in hit and not isinstance(p, optional)]


def placements(spec: P, mesh: DeviceMesh, *, use: bool = False) -> Placements:
    """Translate per-tensor-dim entries to per-mesh-axis DTensor placements; `use` leaves the `zero` axes out."""
    held = [() if use and isinstance(entry, zero) else axes_of(entry) for entry in spec]
    dim_of = {axis: dim for dim, axes in enumerate(held) for axis in axes}
    return tuple(Shard(dim_of[a]) if a in dim_of else Replicate() for a in mesh.mesh_dim_names or ())


class _Outputs(torch.autograd.Function):
    """Identity whose first output is always used; the gradient of another that is not is zeros, as a DTensor.

    AOTAutograd would make them plain tensors and fail (https://github.com/pytorch/pytorch/issues/173123).
    """

    @staticmethod
    def forward(ctx, *xs: DTensor):
        ctx.set_materialize_grads(False)
        ctx.like = [(x.device_mesh, x.shape, x.dtype) for x in xs]
        return tuple(x.view_as(x) for x in xs)

    @staticmethod
    def backward(ctx, *grads: DTensor | None):
        return tuple(
            zeros(shape, dtype=dtype, device_mesh=mesh) if g is None else g
            for g, (mesh, shape, dtype) in zip(grads, ctx.like, strict=True)
        )


def _around(mesh: DeviceMesh, held: Placements, fn: Callable, x: torch.Tensor, batch: int) -> torch.Tensor:
    """Gather a part over the axes that split matrices, apply `fn`, and return this rank's part of the result."""
    whole = [p if p.is_shard() and p.dim < batch else Replicate() for p in held]  # type: ignore[attr-defined]
    gathered = DTensor.from_local(x, mesh, held, run_check=False).redistribute(placements=whole)
    made = DTensor.from_local(fn(gathered.to_local()), mesh, whole, run_check=False)
    return made.redistribute(placements=held).to_local()


@dataclass(frozen=True, eq=False)
class Sharder:
    """`functional_trainer.types.OneDevice` on a mesh (without axes of size one); see there for each method."""

    rules: Rules
    mesh: DeviceMesh

    def __post_init__(self):
        names = self.mesh.mesh_dim_names or ()
        if not names or list(names) != sorted(set(names) & set(AXES), key=AXES.index):
            raise ValueError(f"mesh axes {names} are not some of {AXES} in this order")

    @property
    def rank(self) -> int:
        return dist.get_rank()

    @property
    def world(self) -> int:
        return self.mesh.size()

    def where(self, name: str, *, use: bool = True, shape: tuple[int, ...] | None = None) -> Placements:
        """Return the placements of a name; ValueError if the rule does not fit `shape` or a dim does not divide."""
        spec = self.rules.spec(name)
        placed = placements(spec, self.mesh, use=use)
        if shape is None:
            return placed
        if len(spec) != len(shape):
            raise ValueError(f"{name}: shape {tuple(shape)} has {len(shape)} dims, its rule {spec} {len(spec)}")
        for dim, size in enumerate(shape):
            ways = math.prod([self.mesh.size(i) for i, p in enumerate(placed) if p == Shard(dim)])
            if size % ways:
                raise ValueError(
                    f"{name}: dim {dim} of {tuple(shape)} does not divide into {ways} shards (rule {spec}); "
                    f"change the mesh or the rule"
                )
        return placed

    def __call__(self, x: DTensor, name: str) -> DTensor:
        return x.redistribute(placements=self.where(name, shape=x.shape))

    def weights(self, params: tree.Tree, prefix: str, dtype: torch.dtype | None = None) -> tree.Tree:
        def gather(path: str, w: Any) -> DTensor:
            w = w if dtype is None else w.to(dtype)
            return w.redistribute(placements=self.where(f"{prefix}/{path}"))

        return tree.map_with_path(gather, params)

    def local(self, fn: Callable, ins: tuple[str, ...], outs: tuple[str, ...]) -> Callable:
        """Run `fn` on local shards, gradients' placements derived.

        Along an axis on which any operand is sharded the ranks compute different things. There a replicated input gets
        only its rank's share of the gradient, so the gradient is Partial; an output that is not sharded must be called
        "sum" or "sum:name" and is Partial, since a replicated one would be counted once per rank.
        """
        names = [n.removeprefix("sum").removeprefix(":") for n in outs]
        whole = (Replicate(),) * self.mesh.ndim
        placed_ins = [self.where(n) for n in ins]
        placed_outs = [self.where(n) if n else whole for n in names]
        varies = [any(p[i].is_shard() for p in placed_ins + placed_outs) for i in range(self.mesh.ndim)]
        grads = [
            tuple(Partial() if v and p.is_replicate() else p for p, v in zip(placed, varies, strict=True))
            for placed in placed_ins
        ]
        axes = self.mesh.mesh_dim_names or ()
        for out, placed in zip(outs, placed_outs, strict=True):
            lost = [a for a, p, v in zip(axes, placed, varies, strict=True) if v and p.is_replicate()]
            if lost and not out.startswith("sum"):
                raise ValueError(f"{out} is whole on axis {lost[0]!r} that splits one of {ins}: call it 'sum:{out}'")
        results = [
            tuple(Partial() if v and p.is_replicate() else p for p, v in zip(placed, varies, strict=True))
            for placed in placed_outs
        ]

        def run(*args: DTensor):
            parts = []
            for x, name, grad in zip(args, ins, grads, strict=True):
                placed = self.where(name, shape=x.shape)
                x = x if x.placements == placed else x.redistribute(placements=placed)
                parts.append(x.to_local(grad_placements=grad))
            made = fn(*parts)
            made = (made,) if len(results) == 1 else made
            made = [DTensor.from_local(y, self.mesh, p, run_check=False) for y, p in zip(made, results, strict=True)]
            return made[0] if len(results) == 1 else tuple(made)

        return run

    def group(self, name: str, dim: int) -> Any:
        axes = [i for i, p in enumerate(self.where(name)) if p == Shard(dim)]
        if len(axes) > 1:
            raise ValueError(f"{name}: dim {dim} is sharded over {len(axes)} mesh axes; one is supported")
        return self.mesh.get_group(axes[0]) if axes else None

    def replicate(self, x: torch.Tensor) -> torch.Tensor:
        if not isinstance(x, DTensor):
            return x
        return x.redistribute(placements=[Replicate()] * self.mesh.ndim).to_local()

    def total(self, x: torch.Tensor) -> torch.Tensor:
        return self.replicate(DTensor.from_local(x, self.mesh, [Partial()] * self.mesh.ndim))

    def outputs(self, x: DTensor, aux: dict[str, DTensor]) -> tuple[DTensor, dict[str, DTensor]]:
        x, *values = _Outputs.apply(x, *aux.values())
        return x, dict(zip(aux, values, strict=True))

    def like(self, x: DTensor, ref: DTensor) -> DTensor:
        return x.redistribute(placements=ref.placements)

    def storage(self, x: DTensor) -> torch.Tensor:
        return x.to_local()

    def around(self, p: DTensor) -> Callable:
        return partial(_around, self.mesh, tuple(p.placements))

    def squares(self, squares: list[torch.Tensor], params: list[DTensor]) -> torch.Tensor:
        shares = []
        for x, p in zip(squares, params, strict=True):
            copies = math.prod([self.mesh.size(i) for i, q in enumerate(p.placements) if q.is_replicate()])
            shares.append(x / copies)
        return self.total(torch.stack(shares))

    def put_leaf(self, path: str, x: torch.Tensor) -> DTensor:
        placed = self.where(f"params/{path}", use=False, shape=tuple(x.shape))
        return distribute_tensor(x, self.mesh, placed, src_data_rank=None)

    def full(self, x: DTensor) -> torch.Tensor:
        return x.full_tensor()

    def init_leaf(self, path: str, shape: tuple[int, ...], make: Callable[[], torch.Tensor]) -> DTensor:
        return self.put_leaf(path, make())

    def put_batch(self, batch: dict[str, torch.Tensor]) -> dict[str, DTensor]:
        placed = self.where("batch/columns")
        return {k: DTensor.from_local(v, self.mesh, placed) for k, v in batch.items()}

    def micro(self, batch: dict[str, DTensor], parts: int) -> list[dict[str, DTensor]]:
        local = {k: v.to_local() for k, v in batch.items()}
        rows = next(iter(local.values())).shape[0]
        if rows % parts:
            raise ValueError(f"{rows} rows per device cannot be split into {parts} equal micro-batches")
        return [self.put_batch({k: v.unflatten(0, (parts, -1))[i] for k, v in local.items()}) for i in range(parts)]
