"""One regex table decides where every tensor lives: parameters, optimizer state, batch and activations.

A rule maps a path to a `P` with one entry per tensor dim. A plain axis holds in use and at rest; `zero(...)` axes shard
storage only: the tensor is gathered over them before use and its gradient reduce-scattered. Optimizer state follows
its parameter. The first `fullmatch` wins and a path without a rule is an error: there is no catch-all.
"""

import difflib
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from sharding_rules.mesh import AXES

Entry = str | tuple[str, ...] | None


class P(tuple):
    """Mesh axes per dim, outer to inner: `P("ep", None, zero("fsdp"))`; ValueError for axes unknown or repeated."""

    def __new__(cls, *entries: Entry):
        flat = [axis for entry in entries for axis in axes_of(entry)]
        spare = {axis for entry in entries if isinstance(entry, repeat) for axis in entry}
        if odd := [axis for axis in flat if axis not in AXES]:
            raise ValueError(f"P{entries}: {odd[0]!r} is not a mesh axis; these are: {', '.join(AXES)}")
        stored = [axis for entry in entries if isinstance(entry, zero) for axis in entry]
        if twice := [axis for axis in flat if flat.count(axis) > 1 + (axis in spare and axis in stored)]:
            raise ValueError(f"P{entries}: axis {twice[0]!r} is used twice; it can shard one dim: keep one of them")
        return super().__new__(cls, entries)

    def __repr__(self) -> str:
        return f"P({', '.join(map(repr, self))})"


class zero(tuple):
    """Axes that shard a dim at rest only (https://arxiv.org/abs/1910.02054)."""

    def __new__(cls, *axes: str):
        return super().__new__(cls, axes)

    def __repr__(self) -> str:
        return f"zero({', '.join(map(repr, self))})"


class padded(zero):
    """`zero` of a dim that may not divide: parts are those of torch.chunk, the last ones smaller or empty.

    They are padded to equal ones while they travel, each tensor by itself.
    """

    lengths: frozenset[int] = frozenset()
    """Of the dim, in the parameters of the row; known when the table is fitted to a model."""

    def __repr__(self) -> str:
        return f"padded({', '.join(map(repr, self))})"


def chunk(size: int, places: Iterable[tuple[int, int]]) -> slice:
    """Return the part of a dim that is number i of n along each axis, outer to inner, as torch.chunk cuts."""
    start, stop = 0, size
    for i, n in places:
        step = -(-(stop - start) // n)
        start, stop = min(start + i * step, stop), min(start + (i + 1) * step, stop)
    return slice(start, stop)


def axes_of(entry: Entry) -> tuple[str, ...]:
    """Return the mesh axes that an entry of a `P` names, outer to inner."""
    return () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)


class repeat(tuple):
    """Axes that shard a dim as far as it goes: where it is shorter than they are, neighbouring ranks share a part.

    It is for the key and value heads of grouped-query attention. A parameter is then whole along these axes but for
    those that a `zero` of the same row names, and each rank takes its part at use.
    """

    def __new__(cls, *axes: str):
        return super().__new__(cls, axes)

    def __repr__(self) -> str:
        return f"repeat({', '.join(map(repr, self))})"


class Short(repeat):
    """`repeat` of a dim that is shorter than the axes are."""


class optional(str):
    """A pattern that some models of the family have no path for."""


Held = tuple[tuple[str, ...], ...]
"""The axes of a mesh that shard each dim of a tensor, outer to inner."""


def held(spec: P, axes: Iterable[str], *, use: bool) -> Held:
    """Return what a rule says on a mesh with these axes, in use or at rest."""
    taken = {axis for e in spec if not isinstance(e, (zero, Short)) for axis in axes_of(e)}

    def of(entry: Entry) -> tuple[str, ...]:
        if isinstance(entry, Short) or use and isinstance(entry, zero):
            return ()
        return tuple(a for a in axes_of(entry) if a in axes and not (isinstance(entry, zero) and a in taken))

    return tuple(map(of, spec))


def shortened(spec: P, shape: tuple[int, ...], sizes: Mapping[str, int]) -> P:
    """Return the entries for a parameter of this shape: `Short` where a `repeat` is needed, lengths of `padded`."""

    def of(size: int, entry: Entry) -> Entry:
        if isinstance(entry, padded):
            known = padded(*entry)
            known.lengths = entry.lengths | {size}
            return known
        ways = math.prod(sizes.get(axis, 1) for axis in axes_of(entry))
        return Short(*entry) if isinstance(entry, repeat) and size < ways and ways % size == 0 else entry

    return P(*map(of, shape, spec)) if len(shape) == len(spec) else spec


@dataclass(frozen=True)
class Rules:
    """Ordered (regex, P) rows; ValueError if one is not."""

    table: tuple[tuple[str, P], ...]

    def __post_init__(self):
        for row in self.table:
            if not (isinstance(row, tuple) and len(row) == 2 and isinstance(row[0], str) and isinstance(row[1], P)):
                raise ValueError(f"{row!r} is not a row; a row is (regex, P(...))")
            try:
                re.compile(row[0])
            except re.error as error:
                raise ValueError(f"row {row[0]!r}: not a regular expression: {error}") from None

    def change(self, rows: Mapping[str, P]) -> "Rules":
        """Return the table with other entries in the rows of these patterns; ValueError if it has no such row."""
        if odd := [pattern for pattern in rows if pattern not in dict(self.table)]:
            near = difflib.get_close_matches(odd[0], dict(self.table), 1, 0)
            raise ValueError(f"no row is {odd[0]!r}; the nearest is {near[0]!r}" if near else f"no row is {odd[0]!r}")
        return Rules(tuple((pattern, rows.get(pattern, spec)) for pattern, spec in self.table))

    def matches(self, path: str) -> list[int]:
        """Return the places of all rows that match the whole path; the first is the one that counts."""
        return [i for i, (pattern, _) in enumerate(self.table) if re.fullmatch(pattern, path)]

    def row(self, path: str) -> int:
        """Return the place of the first row that matches the whole path; ValueError if none does."""
        for i, (pattern, _) in enumerate(self.table):
            if re.fullmatch(pattern, path):
                return i
        raise ValueError(f"no sharding rule matches {path!r}; add a row for it")

    def spec(self, path: str) -> P:
        """Return the entries of the row of `path`."""
        return self.table[self.row(path)][1]

    def fit(self, shapes: Mapping[str, tuple[int, ...]], sizes: Mapping[str, int]) -> "Rules":
        """Return the table for parameters of these shapes (by path, "params/..."): with `repeat` where it is needed.

        ValueError lists every parameter that has no row or that its row does not fit, layers that are alike as one.
        """
        wrong, fitted = Counter[str](), self.short(shapes, sizes)
        for path, shape in shapes.items():
            try:
                fitted.where(path, sizes, use=False, shape=shape)
            except ValueError as error:
                wrong[re.sub(r"/\d+/", "/*/", str(error))] += 1
        if wrong:
            raise ValueError("\n".join(f"{said} ({n} tensors)" if n > 1 else said for said, n in wrong.items()))
        return fitted

    def short(self, shapes: Mapping[str, tuple[int, ...]], sizes: Mapping[str, int]) -> "Rules":
        """Return the table with `shortened` rows, parameters that have none left out."""
        rows = list(self.table)
        for path, shape in shapes.items():
            for i in self.matches(path)[:1]:
                rows[i] = rows[i][0], shortened(rows[i][1], shape, sizes)
        return Rules(tuple(rows))

    def unused(self, paths: Iterable[str]) -> list[str]:
        """Return the patterns, `optional` ones aside, that are the first match of none of `paths`."""
        hit = {i for path in paths for i in self.matches(path)[:1]}
        return [p for i, (p, _) in enumerate(self.table) if i not in hit and not isinstance(p, optional)]

    def where(
        self, name: str, sizes: Mapping[str, int], *, use: bool = True, shape: tuple[int, ...] | None = None
    ) -> Held:
        """Return the axes that shard each dim of a tensor on a mesh with these sizes, in use or at rest.

        ValueError if no row matches, the row does not fit `shape`, or a dim does not divide.
        """
        spec = self.spec(name)
        where = held(spec, sizes, use=use)
        if shape is None:
            return where
        if len(spec) != len(shape):
            raise ValueError(f"{name}: shape {tuple(shape)} has {len(shape)} dims, its rule {spec} {len(spec)}")
        for dim, (size, axes) in enumerate(zip(shape, where, strict=True)):
            if size % (ways := math.prod(sizes[axis] for axis in axes)) and (fix := unfit(spec[dim])) is not None:
                raise ValueError(
                    f"{name}: dim {dim} of {tuple(shape)} does not divide into {ways} shards (rule {spec}); "
                    f"change the mesh or the rule{fix}"
                )
        return where


def unfit(entry: Entry) -> str | None:
    """Return what else would help where a dim does not divide, None if it need not."""
    if isinstance(entry, padded):
        lengths = ", ".join(map(str, sorted(entry.lengths)))
        return f": {entry} is for one length, here are {lengths}; give each a row" if len(entry.lengths) > 1 else None
    return f", or write padded{zero.__repr__(entry)[4:]}" if isinstance(entry, zero) else ""


def dims(where: Held) -> dict[str, int]:
    """Return the dim that each axis shards."""
    return {axis: dim for dim, axes in enumerate(where) for axis in axes}


def route(start: Held, end: Held) -> list[tuple[str, int | None, int | None]]:
    """Order a change of placement, axis by axis: (axis, dim that it leaves, dim that it joins).

    An axis that joins a dim becomes its innermost, and only the innermost can leave, so not every order of axes can
    become every other; ValueError if this one cannot. What makes parts smaller comes first, for less is sent after it.
    """
    count = max(len(start), len(end))
    now, goal = ([list(where[i]) if i < len(where) else [] for i in range(count)] for where in (start, end))
    came, goes = dims(start), dims(end)
    changes = {a: (came.get(a), goes.get(a)) for a in (*came, *goes) if came.get(a) != goes.get(a)}

    def ready(axis: str) -> bool:
        leaves, joins = changes[axis]
        out = leaves is None or now[leaves][-1] == axis
        return out and (joins is None or [*now[joins], axis] == goal[joins][: len(now[joins]) + 1])

    done = []
    while able := sorted(filter(ready, changes), key=lambda a: (changes[a][0] is not None) + (changes[a][1] is None)):
        axis = able[0]
        leaves, joins = changes.pop(axis)
        if leaves is not None:
            now[leaves].pop()
        if joins is not None:
            now[joins].append(axis)
        done.append((axis, leaves, joins))
    if now != goal:
        raise ValueError(f"{start} cannot become {end}: only the innermost axis of a dim can leave it, and none turn")
    return done
