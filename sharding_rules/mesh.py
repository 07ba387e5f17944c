"""Named mesh axes and the mesh they make of the processes."""

from dataclasses import dataclass

import torch
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

AXES = ("pp", "dp", "fsdp", "ep", "cp", "tp")
"""Every name that a mesh axis may have, outer to inner."""


@dataclass(frozen=True)
class Mesh:
    """How processes are arranged; sizes multiply to their number."""

    fsdp: int = 0
    """Data-parallel ranks over which parameters and optimizer state are stored in shards (0: all that are left)."""
    ep: int = 1
    """Data-parallel ranks over which experts are spread; tokens travel to them by all-to-all."""


def make(sizes: Mesh, device: torch.device, world: int) -> DeviceMesh | None:
    """Build the device mesh, outer to inner (fsdp, ep), axes of size one left out; None for a single process."""
    fsdp = sizes.fsdp or world // max(sizes.ep, 1)
    if fsdp * sizes.ep != world:
        raise ValueError(
            f"--mesh.fsdp {fsdp} x --mesh.ep {sizes.ep} is {fsdp * sizes.ep} processes, but {world} were started "
            f"(torchrun --nproc-per-node {fsdp * sizes.ep} ...)"
        )
    axes = {name: n for name, n in (("fsdp", fsdp), ("ep", sizes.ep)) if n > 1}
    if not axes:
        return None
    mesh = init_device_mesh(device.type, tuple(axes.values()), mesh_dim_names=tuple(axes))
    if len(axes) > 1:
        mesh._flatten()  # lets a sum over all axes be one collective, with one order of additions
    return mesh
