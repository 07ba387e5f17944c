"""What a table says of a model on a mesh: placements, shapes and bytes of every pattern of parameters, from specs."""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from rich.markup import escape
from rich.table import Table

from sharding_rules.rules import Held, P, Rules, chunk

MASTER = torch.float32
"""In which parameters are stored."""
Sizes = Mapping[str, int]
"""Ranks along each axis of a mesh, axes of size one left out."""


@dataclass(frozen=True)
class Group:
    """Parameters that differ in the number of their layer alone: one row places them, one shape is theirs."""

    name: str
    """Their path, * for the number."""
    paths: tuple[str, ...]
    shape: tuple[int, ...]
    row: int
    """The place of their row in the table, -1 if they have none."""


@dataclass(frozen=True)
class Placed(Group):
    """A group on a mesh: where its tensors are, and what one device holds of each."""

    pattern: str
    spec: P
    rest: Held
    use: Held
    rest_shape: tuple[int, ...]
    use_shape: tuple[int, ...]

    @property
    def held(self) -> int:
        """Scalars of all its tensors that one device stores."""
        return len(self.paths) * math.prod(self.rest_shape)


def group(rules: Rules, params: Mapping[str, tuple[int, ...]]) -> list[Group]:
    """Put parameters (shapes by path, "params/...") that are placed alike together, in order."""
    found: dict[tuple, list[str]] = {}
    for path, shape in params.items():
        row = next(iter(rules.matches(path)), -1)
        found.setdefault((re.sub(r"/\d+(?=/|$)", "/*", path), tuple(shape), row), []).append(path)
    return [Group(name, tuple(paths), shape, row) for (name, shape, row), paths in found.items()]


def part(shape: Iterable[int], where: Held, sizes: Sizes) -> tuple[int, ...]:
    """Return the shape of one device's part of a tensor, the largest if they are not alike."""
    return tuple(chunk(n, [(0, sizes[a]) for a in axes]).stop for n, axes in zip(shape, where, strict=True))


def explain(rules: Rules, params: Mapping[str, tuple[int, ...]], sizes: Sizes) -> list[Placed]:
    """Place parameters on a mesh; ValueError as of `Rules.fit`."""
    fitted, placed = rules.fit(params, sizes), []
    for g in group(rules, params):
        rest, use = (fitted.where(g.paths[0], sizes, use=use) for use in (False, True))
        pattern, spec = rules.table[rules.row(g.paths[0])]
        shapes = part(g.shape, rest, sizes), part(g.shape, use, sizes)
        placed.append(Placed(g.name, g.paths, g.shape, g.row, pattern, spec, rest, use, *shapes))
    return placed


def gathered(placed: Iterable[Placed]) -> int:
    """Return the scalars of the parameters of the largest layer, as one device has them in use."""
    layers: dict[str, int] = {}
    for g in placed:
        for path in g.paths:
            if number := re.match(r"(.*?/\d+)/", path):
                layers[number[1]] = layers.get(number[1], 0) + math.prod(g.use_shape)
    return max(layers.values(), default=0)


def axes(where: Held) -> str:
    """Write the axes of every dim of a tensor: "ep, -, fsdp cp"."""
    return ", ".join(" ".join(dim) or "-" for dim in where)


def mesh(sizes: Sizes) -> str:
    """Write the sizes of a mesh: "fsdp=64 x ep=8"."""
    return " x ".join(f"{axis}={n}" for axis, n in sizes.items()) or "one device"


def size(scalars: int, dtype: torch.dtype) -> str:
    """Write bytes."""
    count, unit = float(scalars * dtype.itemsize), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if count >= 1024:
            count, unit = count / 1024, larger
    return f"{count:,.{2 if count % 1 else 0}f} {unit}"


def parameters(placed: Sequence[Placed], title: str, compute: torch.dtype) -> Table:
    """Lay out where parameters are stored and, gathered in the compute type, used."""
    shown = Table(title=title, title_justify="left", show_lines=True)
    for head in ("parameters, their row", "tensors", f"at rest ({MASTER})", f"in use ({compute})"):
        shown.add_column(head.replace("torch.", ""), overflow="fold")
    for g in placed:
        rest = axes(g.rest), g.rest_shape, f"{size(g.held, MASTER)} in all"
        use = axes(g.use), g.use_shape, f"{size(math.prod(g.use_shape), compute)} each"
        cells = (g.name, g.pattern, g.spec), (f"{len(g.paths)} x", g.shape), rest, use
        shown.add_row(*(escape("\n".join(map(str, cell))) for cell in cells))
    return shown


def totals(placed: Sequence[Placed], count: int, compute: torch.dtype) -> str:
    """Say what a model takes, and what of it one device holds."""
    return (
        f"{count:,} parameters, {size(count, MASTER)}. A device stores {size(sum(g.held for g in placed), MASTER)}, "
        f"and gathers {size(gathered(placed), compute)} for the largest layer."
    )


def boundaries(rules: Rules, names: Iterable[str], sizes: Sizes) -> Table:
    """Lay out where activations and columns of a batch are."""
    shown = Table("boundary", "its row", "in use", title="activations and columns of the batch", title_justify="left")
    for name in names:
        pattern, spec = rules.table[rules.row(name)]
        shown.add_row(*map(escape, (name, f"{pattern} -> {spec}", axes(rules.where(name, sizes)))))
    return shown
