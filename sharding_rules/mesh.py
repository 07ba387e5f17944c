"""Named mesh axes and the mesh they make of the processes."""

import math
from dataclasses import dataclass

import torch
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

AXES = ("pp", "dp", "fsdp", "ep", "cp", "tp")
"""Every name that a mesh axis may have, outer to inner."""


@dataclass(frozen=True)
class Mesh:
    """How processes are arranged; sizes multiply to their number."""

    dp: int = 1
    """Data-parallel ranks that hold the same parameters; with fsdp below them it is HSDP."""
    fsdp: int = 0
    """Data-parallel ranks over which parameters and optimizer state are stored in shards (0: all that are left)."""
    ep: int = 1
    """Data-parallel ranks over which experts are spread; tokens travel to them by all-to-all."""
    cp: int = 1
    """Ranks that share the tokens of a row; attention has whole rows of some heads (Ulysses, arxiv 2309.14509)."""
    tp: int = 1
    """Ranks that share heads, hidden units and the vocabulary, and the tokens of a row in between."""


def parse(text: str) -> dict[str, int]:
    """Read "fsdp=64,ep=8": the sizes of the axes, outer to inner, those of size one left out."""
    sizes: dict[str, int] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        axis, _, size = (word.strip() for word in part.partition("="))
        if axis == "pp":
            raise ValueError(f"--mesh {text}: pipeline stages do not exist yet; use dp, fsdp, ep, cp and tp")
        if axis not in AXES or axis in sizes or not size.isdecimal() or int(size) < 1:
            raise ValueError(f"--mesh {text}: {part!r} is wrong; write it as fsdp=64,ep=8, of {', '.join(AXES[1:])}")
        sizes[axis] = int(size)
    return {axis: sizes[axis] for axis in AXES if sizes.get(axis, 1) > 1}


def make(sizes: Mesh, device: torch.device, world: int) -> DeviceMesh | None:
    """Build the device mesh, outer to inner, axes of size one left out; None for a single process."""
    axes = {axis: getattr(sizes, axis) for axis in AXES if axis != "pp"}
    others = math.prod(n for axis, n in axes.items() if axis != "fsdp")
    axes["fsdp"] = axes["fsdp"] or max(world // others, 1)
    if (asked := math.prod(axes.values())) != world:
        given = " x ".join(f"--mesh.{axis} {n}" for axis, n in axes.items() if n > 1 or axis == "fsdp")
        raise ValueError(
            f"{given} is {asked} processes, but {world} were started (torchrun --nproc-per-node {asked} ...)"
        )
    axes = {name: n for name, n in axes.items() if n > 1}
    return init_device_mesh(device.type, tuple(axes.values()), mesh_dim_names=tuple(axes)) if axes else None
