"""Where a table of rules puts tensors on a mesh, and the exchanges that follow.

A `Layout` derives from names alone what ranks say to each other: from storage to use, from one placement to another,
and what gradients do in return.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

from torch.distributed.device_mesh import DeviceMesh

from sharding_rules.exchange import Step
from sharding_rules.mesh import AXES
from sharding_rules.rules import Held, Rules, Short, chunk, dims, held, padded, repeat, route

Moves = tuple[tuple[Step, ...], tuple[Step, ...]]
"""Steps of a tensor, and of its gradient."""


def names(operand: str) -> tuple[str, str]:
    """Split "a > b", how an operand comes and how it is wanted (or is made and leaves); "a" is both."""
    first, _, second = (part.strip() for part in operand.partition(">"))
    return first, second or first


def _fit(dim: int, length: int) -> Step:
    return Step("fit", dim, length, 0, 1, "")


@dataclass(frozen=True, eq=False)
class Layout:
    """Rules on a mesh (without axes of size one)."""

    rules: Rules
    mesh: DeviceMesh

    def __post_init__(self):
        axes = self.mesh.mesh_dim_names or ()
        if not axes or list(axes) != sorted(set(axes) & set(AXES), key=AXES.index):
            raise ValueError(f"mesh axes {axes} are not some of {AXES} in this order")
        _ = self.groups  # made now, by all ranks in one order

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
