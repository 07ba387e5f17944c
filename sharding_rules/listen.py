"""Hear what a model asks of a sharder, by running it with small tensors on one device: regions, names and shapes."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch

from functional_trainer.types import OneDevice
from sharding_rules.layout import names

Shape = tuple[int | None, ...]
"""Sizes of the dims of a tensor; None is one that depends on the batch."""


class Region(NamedTuple):
    """A call of `shard.local(fn, ins, outs)`, with what went in and what came out."""

    ins: tuple[str, ...]
    outs: tuple[str, ...]
    fn: Callable
    args: tuple[torch.Tensor, ...]
    made: tuple[torch.Tensor, ...]

    def tensors(self) -> list[tuple[str, torch.Tensor]]:
        """Return operands and results with the names of their placements inside, "sum" left out."""
        ends = [(names(n)[1], x) for n, x in zip(self.ins, self.args, strict=True)]
        results = zip(self.outs, self.made, strict=True)
        return ends + [(names(n.removeprefix("sum:"))[0], x) for n, x in results if n != "sum"]


@dataclass(frozen=True)
class Heard:
    """What a model asked: names with the shapes that tensors of these names had, regions, dims that it asked about."""

    shapes: Mapping[str, tuple[Shape, ...]]
    regions: tuple[Region, ...]
    parts: frozenset[tuple[str, int]]
    """(name, dim) of which a rank's part matters to the maths."""
    groups: frozenset[tuple[str, int]]
    """(name, dim) over whose ranks the maths itself exchanges."""

    def boundaries(self) -> list[str]:
        """Return the names that are not those of parameters."""
        return sorted(name for name in self.shapes if not name.startswith("params/"))


class Listener(OneDevice):
    """The identity sharder, remembering what it is asked."""

    def __init__(self):
        super().__init__()
        self._shapes: dict[str, dict[tuple[int, ...], None]] = {}
        self._regions: dict[tuple, Region] = {}
        self._parts: set[tuple[str, int]] = set()
        self._groups: set[tuple[str, int]] = set()

    def heard(self, sizes: Mapping[int, int]) -> Heard:
        """Return what was asked so far; `sizes` are the model's true ones by those of the small tensors."""
        shapes = {k: tuple(tuple(sizes.get(n) for n in shape) for shape in v) for k, v in self._shapes.items()}
        return Heard(shapes, tuple(self._regions.values()), frozenset(self._parts), frozenset(self._groups))

    def local(self, fn: Callable, ins: tuple[str, ...], outs: tuple[str, ...]) -> Callable:
        def region(*args: torch.Tensor):
            made = fn(*args)
            results = (made,) if len(outs) == 1 else made
            self._regions.setdefault((ins, outs), Region(ins, outs, fn, args, results))
            for operand, x in zip((*ins, *outs), (*args, *results), strict=True):
                for name in () if operand == "sum" else names(operand.removeprefix("sum:")):
                    self._shapes.setdefault(name, {})[tuple(x.shape)] = None
            return made

        return region

    def group(self, name: str, dim: int) -> None:
        self._shapes.setdefault(name, {})
        self._groups.add((name, dim))

    def part(self, name: str, dim: int) -> tuple[int, int]:
        self._shapes.setdefault(name, {})
        self._parts.add((name, dim))
        return 0, 1
