"""Find what is wrong with a table for a model on a mesh, before any device is asked: each problem with the nearest fix.

    unmatched    a path without a row
    dead         a row that matches nothing, and is not optional
    shadowed     a row that an earlier one always precedes
    dims         more or fewer entries than the tensor has dims
    indivisible  a dim that its axes do not divide
    order        axes of a parameter's dim, inner before outer
    layers       one layer's parameter placed unlike the others'
    giant        a parameter that is whole at rest along an axis, and large
    exchange     boundaries between which no exchange leads
    whole        a result that is whole where the maths is split, but is not called a sum
    maths        parts from which ranks compute something other than one device does (sharding_rules/maths.py)
    vocabulary   act/vocab and the unembedding, split unlike
    wasted       an axis along which all ranks do the same

Parameters are judged by their specs; boundaries and maths by what a small model asked (sharding_rules/listen.py).
"""

import difflib
import itertools
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from sharding_rules import maths
from sharding_rules.explain import MASTER, Group, Sizes, group, mesh, part
from sharding_rules.layout import names
from sharding_rules.listen import Heard, Region, Shape
from sharding_rules.mesh import AXES
from sharding_rules.rules import (
    Entry,
    Held,
    P,
    Rules,
    Short,
    axes_of,
    dims,
    held,
    optional,
    padded,
    repeat,
    route,
    unfit,
    zero,
)

GIANT = 2**20, 0.01
"""A tensor is a giant if a device could save this many bytes, and this share of what it stores."""


@dataclass(frozen=True)
class Problem:
    """One mistake: what kind, of which tensor, in which row, and what would be right."""

    kind: str
    tensor: str
    row: str
    what: str
    fix: str

    def __str__(self) -> str:
        row = f"\n  row  {self.row}" if self.row else ""
        return f"{self.kind}: {self.tensor or 'the table'}{row}\n  what {self.what}\n  fix  {self.fix}"


@dataclass(frozen=True)
class Linter:
    """A table, a model's parameters (shapes by path, "params/...") and what it asks for, and a mesh."""

    rules: Rules
    params: Mapping[str, tuple[int, ...]]
    heard: Heard
    sizes: Sizes
    groups: list[Group] = field(init=False)
    fitted: Rules = field(init=False)

    def __post_init__(self):
        object.__setattr__(self, "groups", group(self.rules, self.params))
        object.__setattr__(self, "fitted", self.rules.short(self.params, self.sizes))

    def problems(self) -> list[Problem]:
        """Return everything that is wrong."""
        found = [*self.unmatched(), *self.unused(), *self.layers()]
        for g in self.groups:
            if g.row >= 0:
                found += self.parameter(g)
        return [*found, *self.giants(), *self.boundaries(), *self.regions(), *self.vocabulary()]

    # what a problem says --------------------------------------------------------------------------------------------

    def at(self, row: int) -> str:
        """Name a row."""
        pattern, spec = self.rules.table[row]
        return f"{row + 1}, r'{pattern}' -> {spec}"

    def nearest(self, path: str) -> str:
        """Name the row whose pattern is most like a path."""
        patterns = {pattern.replace(r"\w+", "_"): i for i, (pattern, _) in enumerate(self.rules.table)}
        near = difflib.get_close_matches(re.sub(r"/\d+/", "/_/", path), patterns, 1, 0)
        return f"; the nearest row is {self.at(patterns[near[0]])}" if near else ""

    # rows and paths -------------------------------------------------------------------------------------------------

    def unmatched(self) -> Iterator[Problem]:
        for g in self.groups:
            if g.row < 0:
                add = f"add a row, ({_pattern(g.paths[0])}, {self.stored(g.shape)})"
                yield Problem("unmatched", _many(g), "", "no row matches this path", add + self.nearest(g.paths[0]))
        said = {re.sub(r"/\d+/", "/_/", path) for g in self.groups if g.row < 0 for path in g.paths}
        for name in self.heard.shapes:
            if name not in said and not self.rules.matches(name):
                fix = f"add a row for {name}{self.nearest(name)}"
                if self.rules.matches(name.replace("/_/", "/0/")):
                    fix = r"let it match any layer: \w+, not \d+"
                what = "no row matches what the model asks about" + ", for all its layers alike" * ("/_/" in name)
                yield Problem("unmatched", name, "", what, fix)

    def unused(self) -> Iterator[Problem]:
        hits: list[list[int]] = [self.rules.matches(path) for path in {**self.params, **self.heard.shapes}]
        first, any_ = {hit[0] for hit in hits if hit}, {i for hit in hits for i in hit}
        paths = [*(g.paths[0] for g in self.groups), *self.heard.boundaries()]
        for i, (pattern, _) in enumerate(self.rules.table):
            if i in any_ and i not in first:
                above = sorted({hit[0] for hit in hits if i in hit})
                what = f"whatever it matches, row {above[0] + 1} matches first: r'{self.rules.table[above[0]][0]}'"
                yield Problem("shadowed", "", self.at(i), what, f"move it above row {above[0] + 1}, or delete it")
            elif i not in any_ and not isinstance(pattern, optional):
                near = difflib.get_close_matches(pattern.replace(r"\w+", "0"), paths, 1, 0.5)
                mean = f"did you mean {near[0]}? Else delete it" if near else "delete it"
                what = "it matches no parameter and no boundary of this model"
                yield Problem("dead", "", self.at(i), what, f"{mean}, or write optional(r'{pattern}')")

    def layers(self) -> Iterator[Problem]:
        """Maths asks for a layer's parameter under one name for all layers, so all are placed by one row."""
        for g in self.groups:
            for name in {re.sub(r"/\d+/", "/_/", path) for path in g.paths} - {*g.paths}:
                row = next(iter(self.rules.matches(name)), None)
                if g.row >= 0 and row is not None and self.rules.table[row][1] != self.rules.table[g.row][1]:
                    what = f"it is stored by this row, but used as {name}, by row {self.at(row)}"
                    yield Problem("layers", _many(g), self.at(g.row), what, "place all layers alike, by one row")

    # parameters -----------------------------------------------------------------------------------------------------

    def parameter(self, g: Group) -> Iterator[Problem]:
        """Find what is wrong with how a group is stored."""
        spec, tensor, row = self.fitted.table[g.row][1], _many(g), self.at(g.row)
        if len(spec) != len(g.shape):
            what = f"shape {g.shape} has {len(g.shape)} dims, the row {len(spec)} entries"
            yield Problem("dims", tensor, row, what, f"write one entry a dim, as in {self.stored(g.shape)}")
            return
        for dim, (size, axes) in enumerate(zip(g.shape, held(spec, self.sizes, use=False), strict=True)):
            if size % math.prod(self.sizes[a] for a in axes) and unfit(spec[dim]) is not None:
                yield self.indivisible(tensor, row, spec, g.shape, dim, axes)
        for dim, entry in enumerate(spec):
            if (right := tuple(sorted(axes_of(entry), key=AXES.index))) != axes_of(entry):
                fixed = P(*spec[:dim], _like(entry, right), *spec[dim + 1 :])
                what = f"dim {dim} names {', '.join(axes_of(entry))}; axes of a parameter's dim come as in a mesh"
                yield Problem("order", tensor, row, what, f"write {fixed}")

    def indivisible(self, tensor: str, row: str, spec: P, shape: Shape, dim: int, axes: tuple[str, ...]) -> Problem:
        size, ways = shape[dim] or 0, math.prod(self.sizes[a] for a in axes)
        fixes = [f"--mesh {axis}={n}" for axis in axes for n in self.divisors(size, axis, ways // self.sizes[axis])]
        plain = not isinstance(spec[dim], zero | repeat)
        if tensor.startswith("params/") and plain and ways % size == 0:
            fixes.append(f"{repeat(*axes_of(spec[dim]))}, if ranks may share a part, as they do of key heads")
        whole = [d for d, n in enumerate(shape) if spec[d] is None and n and n % ways == 0]
        if isinstance(spec[dim], zero) and whole:
            moved = list(spec)
            moved[whole[0]], moved[dim] = moved[dim], None
            fixes.append(f"{P(*moved)}, for dim {whole[0]} divides")
        if isinstance(spec[dim], zero) and not isinstance(spec[dim], padded):
            fixes.append(f"{padded(*axes_of(spec[dim]))}, whose parts may be unequal")
        what = f"dim {dim} of {shape} does not divide into {ways} parts ({mesh({a: self.sizes[a] for a in axes})})"
        return Problem("indivisible", tensor, row, what, ", or ".join(fixes) or f"take {axes[-1]} out of dim {dim}")

    def divisors(self, size: int, axis: str, others: int) -> list[int]:
        """Return the size nearest to an axis's own with which a dim would divide, none if that is one."""
        able = [n for n in range(1, size + 1) if size % (n * others) == 0] if size % others == 0 else []
        near = sorted(able, key=lambda n: abs(math.log(n / self.sizes[axis])))[:1]
        return [n for n in near if n > 1]

    def stored(self, shape: tuple[int, ...]) -> P:
        """Return entries that store a tensor in as many parts as one of its dims divides into."""
        axes = [a for a in AXES if a in self.sizes and a != "dp"]
        best: tuple[int, tuple[str, ...]] = (0, ())
        for dim, size in sorted(enumerate(shape), key=lambda x: -x[1]):
            able: list[str] = []
            for axis in axes:
                if size % math.prod(self.sizes[a] for a in (*able, axis)) == 0:
                    able.append(axis)
            if len(able) > len(best[1]):
                best = dim, tuple(able)
        return P(*(zero(*best[1]) if best[1] and dim == best[0] else None for dim in range(len(shape))))

    def giants(self) -> Iterator[Problem]:
        """Along dp all parameters are whole, that is what it is for."""
        fits = [g for g in self.groups if g.row >= 0 and len(self.fitted.table[g.row][1]) == len(g.shape)]
        rest = [held(self.fitted.spec(g.paths[0]), self.sizes, use=False) for g in fits]
        bytes_ = [
            MASTER.itemsize * len(g.paths) * math.prod(part(g.shape, where, self.sizes))
            for g, where in zip(fits, rest, strict=True)
        ]
        for g, where, size in zip(fits, rest, bytes_, strict=True):
            whole = tuple(a for a in self.sizes if a != "dp" and a not in dims(where))
            saved = size - size // math.prod(self.sizes[a] for a in whole)
            if saved >= max(GIANT[0], GIANT[1] * sum(bytes_)):
                along = mesh({a: self.sizes[a] for a in whole})
                what = f"whole at rest along {along}: each device could save {saved / 2**20:,.1f} MiB"
                yield Problem("giant", _many(g), self.at(g.row), what, self.smaller(g, where, whole))

    def smaller(self, g: Group, where: Held, whole: tuple[str, ...]) -> str:
        """Propose a row that stores a tensor in parts along more axes: in a dim that only stores, or a whole one."""
        spec, ways = self.rules.table[g.row][1], math.prod(self.sizes[a] for a in whole)
        local_shape = part(g.shape, where, self.sizes)
        for dim, local in sorted(enumerate(local_shape), key=lambda x: (spec[x[0]] is None, -x[1])):
            if local % ways == 0 and (spec[dim] is None or isinstance(spec[dim], zero)):
                axes = sorted({*axes_of(spec[dim]), *whole}, key=AXES.index)
                return f"write {P(*spec[:dim], zero(*axes), *spec[dim + 1 :])}"
        return f"no dim of {g.shape} divides further: store it over fewer axes, by a mesh with a smaller {whole[-1]}"

    # boundaries -----------------------------------------------------------------------------------------------------

    def boundaries(self) -> Iterator[Problem]:
        """Find rows of boundaries that do not fit the tensors there, as far as their sizes do not depend on a batch."""
        for name in self.heard.boundaries():
            if not self.rules.matches(name):
                continue
            spec, row = self.rules.spec(name), self.at(self.rules.row(name))
            for shape in self.heard.shapes[name]:
                if any(map(axes_of, spec[len(shape) :])):
                    what = f"the tensor has {len(shape)} dims, the row {len(spec)} entries"
                    yield Problem("dims", name, row, what, f"write at most {len(shape)} entries")
                    continue
                for dim, (size, axes) in enumerate(zip(shape, held(spec, self.sizes, use=True), strict=False)):
                    ways = math.prod(self.sizes[a] for a in axes)
                    shared = size and isinstance(spec[dim], repeat) and ways % size == 0
                    if size and size % ways and not shared:
                        yield self.indivisible(name, row, spec, shape, dim, axes)

    def regions(self) -> Iterator[Problem]:
        """Find what ranks cannot exchange or compute, and axes along which they compute nothing apart."""
        split: set[str] = set()
        complete = [region for region in self.heard.regions if self.complete(region)]
        for region in complete:
            ins, outs = region.ins, [out for out in region.outs if out != "sum"]
            varies = {axis for name, _ in region.tensors() for axis in dims(self.placed(name))}
            split |= varies
            moved = [names(n) for n in ins if not n.startswith("params/")]
            moved += [names(out.removeprefix("sum:")) for out in outs]
            summed = [p for out in outs for p in self.summed(out, varies)]
            yield from (p for pair in moved for p in self.exchange(*pair))
            yield from summed
            for name, what, fix in maths.wrong(region, self.heard, self.placed) if not summed else ():
                yield Problem("maths", name, self.at(self.rules.row(name)), what, fix)
        for axis in self.sizes if len(complete) == len(self.heard.regions) else ():
            if axis not in split:
                what = f"nothing that is computed is split along {axis}={self.sizes[axis]}: its ranks do all the same"
                fix = f"put {axis} into batch/columns and into the boundaries, or take it out of the mesh"
                yield Problem("wasted", "", "", what, fix)

    def complete(self, region: Region) -> bool:
        """Tell whether every tensor of a region has a row."""
        moved = (n.removeprefix("sum:") for n in (*region.ins, *region.outs) if n != "sum")
        return all(self.rules.matches(name) for n in moved for name in names(n))

    def placed(self, name: str) -> Held:
        """Return how a tensor is placed in use."""
        return self.rules.where(name, self.sizes)

    def exchange(self, start: str, end: str) -> Iterator[Problem]:
        """Check that steps lead from one placement to another."""
        try:
            route(self.placed(start), self.placed(end))
        except ValueError as error:
            fixes = (
                f"write {spec} for {name}"
                for name in (end, start)
                for spec in _orders(self.rules.spec(name))
                if _leads(*(held(spec, self.sizes, use=True) if n == name else self.placed(n) for n in (start, end)))
            )
            fix = next(fixes, f"let the rows of {start} and {end} agree in more axes")
            yield Problem("exchange", f"{start} > {end}", self.at(self.rules.row(end)), str(error), fix)

    def summed(self, out: str, varies: set[str]) -> Iterator[Problem]:
        """Check that a result which is whole where the maths is split is called a sum."""
        made = names(out.removeprefix("sum:"))[0]
        whole = [a for a in self.sizes if a in varies and a not in dims(self.placed(made))]
        if whole and not out.startswith("sum:"):
            what = f"it is made whole along {whole[0]}, which splits what it is made of, and no sum adds it up"
            fix = f"split a dim of {made} by {whole[0]}, or take {whole[0]} from the operands' rows"
            yield Problem("whole", made, self.at(self.rules.row(made)), what, fix)

    def vocabulary(self) -> Iterator[Problem]:
        table, logits = "params/unembed", "act/vocab"
        if logits in self.heard.shapes and self.rules.matches(table) and self.rules.matches(logits):
            split = [
                " ".join((*self.placed(name), (), (), ())[dim]) or "nothing" for name, dim in ((table, 0), (logits, 2))
            ]
            if split[0] != split[1]:
                what = f"dim 0 of {table} is split by {split[0]}, dim 2 of {logits} by {split[1]}"
                fix = f"write the same entry in both, as in row {self.at(self.rules.row(table))}"
                yield Problem("vocabulary", logits, self.at(self.rules.row(logits)), what, fix)


def lint(rules: Rules, params: Mapping[str, tuple[int, ...]], heard: Heard, sizes: Sizes) -> list[Problem]:
    """Return everything that is wrong with a table for a model on a mesh, each problem once."""
    return list(dict.fromkeys(Linter(rules, params, heard, sizes).problems()))


def _many(g: Group) -> str:
    return g.paths[0] + (f" and {len(g.paths) - 1} more" if len(g.paths) > 1 else "")


def _pattern(path: str) -> str:
    """Write the regex of a path and of the same in other layers."""
    return "r'" + re.sub(r"/\d+(?=/|$)", r"/\\w+", path) + "'"


def _like(entry: Entry, axes: tuple[str, ...]) -> Entry:
    """Return an entry of the same kind with other axes."""
    if isinstance(entry, Short):
        return repeat(*axes)
    return type(entry)(*axes) if isinstance(entry, zero | repeat) else axes


def _orders(spec: P) -> Iterator[P]:
    """Yield the same entries with the axes of one dim in other orders."""
    for dim, entry in enumerate(spec):
        for axes in itertools.permutations(axes_of(entry)) if len(axes_of(entry)) > 1 else ():
            yield P(*spec[:dim], _like(entry, axes), *spec[dim + 1 :])


def _leads(start: Held, end: Held) -> bool:
    try:
        route(start, end)
    except ValueError:
        return False
    return True
