"""Whether the maths of a region may run on parts as a table cuts them: checks on small tensors whose sizes all differ.

    alike   a dim, told by its size, is split by the same axes in all operands and results that have it
    parts   run on two parts and put together, the maths gives what it gives whole; a norm over split dims does not
    apart   an axis splits one dim only, or two ranks would have neither all of one nor all of the other

The second needs maths that does not know of ranks. Along axes of dims that the model asked about (`part`, `group`) it
does, and the third takes its place.
"""

from collections.abc import Callable, Iterator

import torch

from sharding_rules.listen import Heard, Region
from sharding_rules.rules import Held, dims

Where = Callable[[str], Held]
Dims = dict[int, dict[tuple[str, int], tuple[str, ...]]]
"""By size: which tensors have such a dim, where, and the axes that split it."""


def wrong(region: Region, heard: Heard, where: Where) -> Iterator[tuple[str, str, str]]:
    """Yield the name of a tensor that is split wrongly, what is wrong, and what would be right."""
    found: Dims = {}
    for name, x in region.tensors():
        for dim, (size, axes) in enumerate(zip(x.shape, where(name), strict=False)):
            found.setdefault(size, {})[name, dim] = axes
    if unlike := list(_unlike(found)):
        yield from unlike
        return
    names = list(dict.fromkeys(name for name, _ in region.tensors()))
    known = [where(name)[dim : dim + 1] for name, dim in heard.parts | heard.groups if name in names]
    asked = {axis for entry in known for axes in entry for axis in axes}
    yield from _twice(found, heard, asked)
    for axis in dict.fromkeys(axis for name in names for axis in dims(where(name)) if axis not in asked):
        if what := _differs(region, where, axis):
            split = [name for name in names if axis in dims(where(name))]
            places = " and ".join(f"dim {dims(where(name))[axis]} of {name}" for name in split)
            yield split[0], what, f"take {axis} from {places}, if the maths needs that dim whole"


def _unlike(found: Dims) -> Iterator[tuple[str, str, str]]:
    for size, places in found.items():
        (first, axes), *others = places.items()
        for place, other in others if size > 1 else ():
            if other != axes:
                a, b = (f"dim {dim} of {name}" for name, dim in (first, place))
                one, two = (" ".join(given) or "nothing" for given in (axes, other))
                what = f"{a} is split by {one}, {b} by {two}; in the maths they are one"
                yield place[0], what, f"let both rows name the same axes there, {one} or {two}"


def _twice(found: Dims, heard: Heard, asked: set[str]) -> Iterator[tuple[str, str, str]]:
    """Over a parameter's dim the maths itself may exchange, as tokens travel to experts."""
    owners: dict[str, list[tuple[str, int]]] = {}
    for size, places in found.items():
        travels = any(place in heard.groups and place[0].startswith("params/") for place in places)
        for axis in asked if size > 1 and not travels else ():
            owners.setdefault(axis, []).extend([place for place, axes in places.items() if axis in axes][:1])
    for axis, owned in owners.items():
        if len(owned) > 1:
            both = " and ".join(f"dim {dim} of {name}" for name, dim in owned)
            yield owned[-1][0], f"{axis} splits {both}, which are not one dim", f"take {axis} from one of them"


def _differs(region: Region, where: Where, axis: str) -> str | None:
    """Run a region on two parts along an axis; say what is wrong with the results together."""

    def half(x: torch.Tensor, name: str, way: int) -> torch.Tensor:
        dim = dims(where(name)).get(axis)
        return x if dim is None or dim >= x.ndim else x.chunk(2, dim)[way]

    ends = region.tensors()[: len(region.ins)]
    try:
        halves = [region.fn(*(half(x, name, way) for name, x in ends)) for way in (0, 1)]
    except Exception as error:  # whatever the maths raises when shapes are not as it expects
        said = (str(error).splitlines() or [type(error).__name__])[0]
        return f"split by {axis}, the maths does not run: {said}"
    pairs = list(zip(*halves, strict=True)) if len(region.outs) > 1 else [tuple(halves)]
    for out, pair, whole in zip(region.outs, pairs, region.made, strict=True):
        dim = None if out == "sum" else dims(where(out.removeprefix("sum:").split(" > ")[0])).get(axis)
        joined = torch.cat(pair, dim) if dim is not None else pair[0] + pair[1] if out.startswith("sum") else pair[0]
        if joined.shape != whole.shape or not torch.allclose(joined.double(), whole.double(), 1e-6, 1e-9):
            return f"split by {axis}, the parts of {out} are together not what one device computes"
    return None
