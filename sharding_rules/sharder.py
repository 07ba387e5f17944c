"""A table of rules on a mesh.

At rest parameters and optimizer state are DTensors. In a step there are plain tensors only, each rank's part: the names
of operands say how they are placed. Maths runs in `local` regions, and all that ranks exchange is derived from names.
"""

import itertools
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard
from torch.utils import _pytree as pytree

from functional_trainer import tree
from functional_trainer.param import Part
from functional_trainer.types import ONE_DEVICE, Fp8, Gather
from sharding_rules.exchange import Late, Packed, Step, bind, bucket, check, move, run, unpack, unpack_bytes, wait
from sharding_rules.mesh import AXES
from sharding_rules.rules import Held, Rules, Short, chunk, dims, held, padded, repeat, route

Placements = tuple[Placement, ...]
Moves = tuple[tuple[Step, ...], tuple[Step, ...]]
"""Steps of a tensor, and of its gradient."""
Bucket = tuple[tuple[Step | None, Step | None], list[str], list[int], list[Packed]]
BUCKETED = [(["gather"], ["scatter"]), (["gather"], ["scatter", "sum"]), ([], ["sum"])]
"""Kinds of the steps, and of the gradient's, of parameters that travel together."""


def names(operand: str) -> tuple[str, str]:
    """Split "a > b", how an operand comes and how it is wanted (or is made and leaves); "a" is both."""
    first, _, second = (part.strip() for part in operand.partition(">"))
    return first, second or first


def _kinds(moves: Moves) -> tuple[list[str], list[str]]:
    steps, back = moves
    return [step.kind for step in steps], [step.kind for step in back]


@dataclass(frozen=True)
class Fetched:
    """Parameters that are on their way: this rank's parts, and what they travel in."""

    parts: tree.Tree
    whole: list[torch.Tensor]
    packed: list[torch.Tensor]
    """The bytes of those that came in 8 bits; in `whole` is then what has their gradients."""


pytree.register_dataclass(Fetched)


class Again:
    """Lets go of gathered weights after forward; backward gathers each layer's again, and the next one's ahead."""

    def __init__(self, fetch: Callable[[int], Fetched]):
        self.fetch = fetch
        self.coming: dict[int, list[torch.Tensor]] = {}

    def hooks(self, layer: int, whole: list[torch.Tensor]) -> Any:
        """Return the context in which a layer is to run that is given `whole`."""
        places = {x.untyped_storage().data_ptr(): i for i, x in enumerate(whole) if x.numel()}

        def pack(x: torch.Tensor) -> Any:
            place = places.get(x.untyped_storage().data_ptr())
            return x if place is None else (place, x.size(), x.stride(), x.storage_offset())

        def unpack(kept: Any) -> torch.Tensor:
            return kept if isinstance(kept, torch.Tensor) else self._whole(layer, kept[0]).as_strided(*kept[1:])

        return torch.autograd.graph.saved_tensors_hooks(pack, unpack)

    @torch.no_grad()
    def _whole(self, layer: int, place: int) -> torch.Tensor:
        self.coming.pop(layer + 1, None)
        for i in (layer, layer - 1):
            if i >= 0 and i not in self.coming:
                self.coming[i] = self.fetch(i).whole
        return wait(self.coming[layer][place])


@dataclass(frozen=True, eq=False)
class Sharder:
    """`functional_trainer.types.OneDevice` on a mesh (without axes of size one); see there for each method."""

    rules: Rules
    mesh: DeviceMesh
    dispatch: str | None = None
    fp8: Fp8 = field(default_factory=dict)
    matrices: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    """Of parameters as maths names them: leading dims that are one matrix each, and last dims that are inputs."""
    late: Late = field(default_factory=Late, init=False)

    def __post_init__(self):
        axes = self.mesh.mesh_dim_names or ()
        if not axes or list(axes) != sorted(set(axes) & set(AXES), key=AXES.index):
            raise ValueError(f"mesh axes {axes} are not some of {AXES} in this order")
        _ = self.groups  # made now, by all ranks in one order

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
        return cls(fitted, mesh, dispatch, fp8 or {}, matrices, **more)

    @property
    def rank(self) -> int:
        return dist.get_rank()

    @property
    def world(self) -> int:
        return self.mesh.size()

    @cached_property
    def sizes(self) -> dict[str, int]:
        """Ranks along each axis."""
        return dict(zip(self.mesh.mesh_dim_names or (), self.mesh.shape, strict=True))

    @cached_property
    def groups(self) -> dict[tuple[str, ...], tuple[str, int, int]]:
        """Name, own rank and size of the process group along each set of axes that parameters and sums need."""
        wanted = [(axis,) for axis in self.sizes] + [tuple(self.sizes), self._axes(self.columns)]
        for _, spec in self.rules.table:
            rest = held(spec, self.sizes, use=False)
            wanted += [*rest, self._axes(rest, whole=True)]
        found: dict[tuple[str, ...], tuple[str, int, int]] = {}
        for axes in dict.fromkeys(tuple(sorted(axes, key=AXES.index)) for axes in wanted if axes):
            part = self.mesh[axes] if len(axes) == 1 else self.mesh[axes]._flatten()
            found[axes] = part.get_group().group_name, part.get_local_rank(), part.size()
        return found

    @cached_property
    def columns(self) -> Held:
        """How columns of a batch are placed: rows by data, tokens by context."""
        return self.where("batch/columns")

    def _axes(self, where: Held, *, whole: bool = False) -> tuple[str, ...]:
        """Return the axes that shard a tensor, or those along which it is whole."""
        return tuple(axis for axis in self.sizes if (axis in dims(where)) != whole)

    def _index(self, axes: Iterable[str]) -> tuple[int, int]:
        """Return which part of a dim sharded over `axes`, outer to inner, is this rank's, and of how many."""
        index, ways = 0, 1
        for axis in axes:
            index, ways = index * self.sizes[axis] + self.mesh.get_local_rank(axis), ways * self.sizes[axis]
        return index, ways

    def _step(self, kind: str, axes: str | tuple[str, ...], dim: int = 0, to: int = 0) -> Step:
        group, rank, ways = self.groups[(axes,) if isinstance(axes, str) else tuple(sorted(axes, key=AXES.index))]
        return Step(kind, dim, to, rank, ways, group)

    def where(self, name: str, *, use: bool = True, shape: tuple[int, ...] | None = None) -> Held:
        """Return `Rules.where` on this mesh."""
        return self.rules.where(name, self.sizes, use=use, shape=shape)

    # in a step: plain tensors, each rank's part ----------------------------------------------------------------------

    def ahead(
        self, layers: list[tree.Tree], prefix: str, dtype: torch.dtype | None, gather: Gather
    ) -> Iterator[tuple[Any, Any]]:
        if gather == "inside":
            yield from ((layer, nullcontext()) for layer in layers)
            return
        late = None if torch.compiler.is_compiling() else self.late

        def fetch(i: int) -> Fetched:
            return self._fetch(layers[i], prefix, dtype)

        again, coming = Again(fetch), [fetch(0)] if layers else []
        for i in range(len(layers)):
            now = coming.pop()
            coming += [fetch(i + 1)] if i + 1 < len(layers) else []
            hooks = again.hooks(i, now.whole) if gather == "again" else nullcontext()
            given = self._bound(now, prefix, dtype, late), hooks
            del now  # the layer's alone, to be let go of when it has run
            yield given
            del given

    def _fetch(self, params: tree.Tree, prefix: str, dtype: torch.dtype | None) -> Fetched:
        """Begin to gather, cast: all parameters that the same ranks share in one exchange."""
        flat = {path: self.storage(w) for path, w in tree.flatten(params).items()}
        buckets = self._buckets(flat, prefix)
        whole = [
            bucket([flat[path] for path in paths], gather, dtype, packed) for (gather, _), paths, _, packed in buckets
        ]
        return Fetched(tree.unflatten(flat, params), whole, [])

    def _bound(self, fetched: Fetched, prefix: str, dtype: torch.dtype | None, late: Late | None = None) -> Fetched:
        """Return what was fetched, with gradients."""
        flat, of = tree.flatten(fetched.parts), None if late is None else object()
        bound = [
            bind(whole, [flat[path] for path in paths], *steps, late, of, dtype)
            for whole, (steps, paths, *_) in zip(fetched.whole, self._buckets(flat, prefix), strict=True)
        ]
        return Fetched(fetched.parts, bound, [whole for whole in fetched.whole if whole.dtype == torch.uint8])

    def settle(self) -> None:
        self.late.settle()

    def weights(self, params: "tree.Tree | Fetched", prefix: str, dtype: torch.dtype | None = None) -> tree.Tree:
        if not isinstance(params, Fetched):
            params = self._bound(self._fetch(params, prefix, dtype), prefix, dtype)
        flat, buckets = tree.flatten(params.parts), self._buckets(tree.flatten(params.parts), prefix)
        came = list(params.packed)
        for whole, (_, paths, along, packed) in zip(params.whole, buckets, strict=True):
            xs = [flat[path] for path in paths]
            made = unpack_bytes(whole, came.pop(0), xs, along, packed) if packed else unpack(whole, xs, along)
            flat |= dict(zip(paths, made, strict=True))
        alone = self._alone(tree.flatten(params.parts), prefix)
        flat |= {path: move(flat[path], *moves, dtype) for path, moves in alone.items()}
        return tree.unflatten(flat, params.parts)

    def _moves(self, flat: dict[str, torch.Tensor], prefix: str) -> dict[str, Moves]:
        return {path: self._gather(f"{prefix}/{path}") for path in flat}

    def _alone(self, flat: dict[str, torch.Tensor], prefix: str) -> dict[str, Moves]:
        """Return the moves of parameters that travel alone."""
        return {path: moves for path, moves in self._moves(flat, prefix).items() if _kinds(moves) not in BUCKETED}

    def _buckets(self, flat: dict[str, torch.Tensor], prefix: str) -> list[Bucket]:
        """Return what travels together: steps of the exchange, paths, and the dim along which each is gathered."""
        buckets: dict[Any, Bucket] = {}
        for path, moves in self._moves(flat, prefix).items():
            if _kinds(moves) in BUCKETED:
                steps, back = moves
                gather, total = (*steps, None)[0], back[-1] if back[-1].kind == "sum" else None
                packed = self._packed(f"{prefix}/{path}", flat[path].shape, gather)
                alike = gather and gather.group, total and total.group, flat[path].dtype, flat[path].requires_grad
                _, paths, along, how = buckets.setdefault((*alike, not packed), ((gather, total), [], [], []))
                paths.append(path)
                along.append(gather.dim if gather else 0)
                how += packed
        return list(buckets.values())

    def _packed(self, name: str, shape: Sequence[int], gather: Step | None) -> list[Packed]:
        """Return how a parameter of which a rank has this part travels in 8 bits, nothing if it does not.

        It does if the borders of parts are borders of what shares a scale.
        """
        recipe = self.fp8.get(name)
        if recipe is None or gather is None:
            return []
        first, last = self.matrices[name][0], len(shape) - self.matrices[name][1]
        matrix = *shape[:first], math.prod(shape[first:last]), math.prod(shape[last:])
        which = {first: "outputs", last: "inputs"}.get(gather.dim)
        fits = gather.dim < first or which is not None and recipe.travels(matrix[-2], matrix[-1], which)
        return [Packed(matrix, recipe)] if fits else []

    def _gather(self, path: str) -> Moves:
        """Return the steps from storage to use; a gradient comes as each rank's share and leaves summed and cut."""
        rest, use = (self.where(path, use=use) for use in (False, True))
        steps: list[Step] = []
        back: list[Step] = []
        for dim, (axes, entry) in enumerate(zip(rest, self.rules.spec(path), strict=True)):
            if axes != use[dim]:
                there, and_back = self._whole(axes, dim, max(entry.lengths) if isinstance(entry, padded) else 0)
                steps, back = [*steps, *there], [*back, *and_back]
        if whole := self._axes(rest, whole=True):
            back.append(self._step("sum", whole))
        return tuple(steps), tuple(back)

    def _whole(self, axes: tuple[str, ...], dim: int, length: int) -> Moves:
        """Return the steps that gather a dim of this length, and those of the gradient; parts are `chunk`s."""
        if not axes:
            return (), ()
        if length % self._index(axes)[1] == 0:
            return (self._step("gather", axes, dim),), (self._step("scatter", axes, dim),)
        steps: list[Step] = []
        back: list[Step] = []
        for axis in axes:
            equal, ways = -(-length // self.sizes[axis]), self.sizes[axis]
            own = chunk(length, [(self.mesh.get_local_rank(axis), ways)])
            steps = [_fit(dim, equal), self._step("gather", axis, dim), _fit(dim, length), *steps]
            length = own.stop - own.start
            back = [*back, _fit(dim, equal * ways), self._step("scatter", axis, dim), _fit(dim, length)]
            if length == 0:  # the ranks of the next axes have nothing to share
                break
        return tuple(steps), tuple(back)

    def _between(self, start: Held, end: Held, shares: Iterable[str], back_shares: Iterable[str]) -> Moves:
        """Return the steps from one placement to another, and those of the gradient.

        Along the axes in `shares` what is whole at the start is each rank's share of a sum; so is the gradient of what
        is whole at the end along `back_shares`.
        """
        steps, back = [], []
        for axis, leaves, joins in route(start, end):
            if leaves is not None and joins is not None:
                steps.append(self._step("swap", axis, joins, leaves))
                back.append(self._step("swap", axis, leaves, joins))
            elif joins is not None:
                steps.append(self._step("scatter" if axis in shares else "part", axis, joins))
                back.append(self._step("gather", axis, joins))
            elif leaves is not None:
                steps.append(self._step("gather", axis, leaves))
                back.append(self._step("scatter" if axis in back_shares else "part", axis, leaves))
        sums = [[self._step("sum", axis) for axis in axes if axis not in dims(other)]
                for axes, other in ((shares, end), (back_shares, start))]  # fmt: skip
        return (*steps, *sums[0]), (*reversed(back), *sums[1])

    def _arrive(self, name: str, varies: set[str]) -> Moves:
        """Return the steps that bring an operand to where it is wanted, and those of its gradient.

        Along an axis on which the maths varies, the gradient of what is whole there is each rank's share of it. An
        activation's shares are added here, a parameter's where it was gathered: so it expects shares, also of what all
        ranks have alike.
        """
        comes, wanted = (self.where(n) for n in names(name))
        whole = self._axes(wanted, whole=True)
        if name.startswith("params/"):
            return (), tuple(self._step("scale", axis) for axis in whole if axis not in varies)
        return self._between(comes, wanted, (), [axis for axis in whole if axis in varies])

    def _leave(self, name: str, varies: set[str]) -> Moves:
        """Return the steps that bring a result from where it is made to where it is left, and those of its gradient."""
        if name == "sum":  # a share along the axes of the columns, the same on the others
            apart = self._axes(self.columns)
            odd = [axis for axis in self.sizes if (axis in apart) != (axis in varies)]
            return tuple(self._step("scale" if axis in apart else "sum", axis) for axis in odd), ()
        made, left = (self.where(n) for n in names(name.removeprefix("sum:")))
        shares = [axis for axis in self._axes(made, whole=True) if axis in varies]
        if shares and not name.startswith("sum:"):
            raise ValueError(f"{name} is whole on axis {shares[0]!r}, which splits what it is of: call it 'sum:{name}'")
        return self._between(made, left, shares, ())

    def _repeated(self, shape: Sequence[int], name: str, moves: Moves) -> Moves:
        """Add what a `repeat` asks for where a dim is shorter than its axes: copies, or a parameter's part."""
        steps, back = moves
        if name == "sum":
            return moves
        for dim, entry in enumerate(self.rules.spec(names(name.removeprefix("sum:"))[1])):
            size = shape[dim] if dim < len(shape) else 0
            if isinstance(entry, Short):
                index, ways = self._index([a for a in entry if a in self.sizes])
                own = Step("part", dim, 0, index // (ways // size), size, "")
                steps, back = (own, *steps), (*back, own._replace(kind="place"))
            elif isinstance(entry, repeat):
                ways = math.prod([s.ways for s in steps if s.dim == dim and s.kind in ("part", "swap")])
                if size < ways and ways % size == 0:
                    copies = Step("copy", dim, 0, 0, ways // size, "")
                    steps, back = (copies, *steps), (*back, copies._replace(kind="fold"))
        return steps, back

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

    def storage(self, x: torch.Tensor) -> torch.Tensor:
        return x.to_local() if isinstance(x, DTensor) else x

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

    def placements(self, path: str, shape: tuple[int, ...]) -> Placements:
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


def _fit(dim: int, length: int) -> Step:
    return Step("fit", dim, length, 0, 1, "")


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
