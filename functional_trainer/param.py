"""Abstract parameters: a model is first a pytree of `Param`, and only later a pytree of tensors.

`io` says how a tensor acts as a matrix, one character per logical dim, in Hugging Face memory order ([out..., in...]):

    "D->NH"    a matrix from D to N*H, stored (N, H, D)       "NH->D"     stored (D, N, H)
    "2:D->F"   two matrices (gate and up), stored (2, F, D)   "E2:D->F"   one such pair per expert, stored (E, 2, F, D)
    "V,D"      a table, stored (V, D)                         "D"         a vector (norm scale, bias)

Letters before the colon are batch dims. Init, sharding, parameter counts, FLOPs, Muon and FP8 all read it.
"""

import hashlib
import math
from dataclasses import dataclass
from typing import Literal

import torch

from functional_trainer import tree


@dataclass(frozen=True)
class Param:
    """Shape, role and initializer of one tensor; `std` is the standard deviation of `init="normal"`."""

    shape: tuple[int, ...]
    io: str
    init: Literal["normal", "ones", "zeros"] = "normal"
    std: float = 0.02

    def __post_init__(self):
        if len(self.shape) != len(self.dims):
            raise ValueError(f"io {self.io!r} names {len(self.dims)} dims, shape {self.shape} has {len(self.shape)}")

    @property
    def batch(self) -> str:
        """Letters of the leading batch dims, "" for a single matrix."""
        return self.io.partition(":")[0] if ":" in self.io else ""

    @property
    def out_in(self) -> tuple[str, str]:
        """Letters of the output and of the input dims; a vector or a table has no input dims."""
        body = self.io.rpartition(":")[2]
        inn, arrow, out = body.partition("->")
        return (out, inn) if arrow else (body.replace(",", ""), "")

    @property
    def dims(self) -> str:
        """One letter per tensor dim, in memory order."""
        return self.batch + "".join(self.out_in)

    @property
    def is_matrix(self) -> bool:
        """Whether the tensor takes part in a matrix product (tables and vectors do not)."""
        return "->" in self.io


def is_param(x) -> bool:
    return isinstance(x, Param)


def count(specs: tree.Tree) -> int:
    """Number of scalars in a tree of `Param`."""
    return sum(math.prod(p.shape) for p in tree.leaves(specs))


Part = tuple[slice, ...]
"""A part of a tensor, one slice a dim."""


def init_leaf(
    path: str, p: Param, seed: int, dtype: torch.dtype = torch.float32, device=None, part: Part | None = None
) -> torch.Tensor:
    """Draw one tensor of `p.shape`, or a part of it.

    Each slice along the leading dim has its own 64-bit seed, hash(seed, path, slice): values do not depend on the mesh,
    on the order of leaves or on which slices this process needs. Draws happen on the host in float32, one slice held
    at a time.
    """
    first, *inner = part or tuple(slice(0, size) for size in p.shape)
    shape = [s.stop - s.start for s in (first, *inner)]
    if device is not None and torch.device(device).type == "meta":  # a tensor without values
        return torch.empty(shape, dtype=dtype, device=device)
    if p.init == "ones":
        return torch.ones(shape, dtype=dtype, device=device)
    if p.init == "zeros":
        return torch.zeros(shape, dtype=dtype, device=device)
    out, whole, gen = torch.empty(shape), torch.empty(p.shape[1:]), torch.Generator()
    for row, i in zip(out, range(first.start, first.stop), strict=True):
        digest = hashlib.blake2b(f"{seed}:{path}:{i}".encode(), digest_size=8).digest()
        gen.manual_seed(int.from_bytes(digest, "little", signed=True))
        row.copy_(whole.normal_(0.0, p.std, generator=gen)[tuple(inner)])
    return out.to(dtype=dtype, device=device)


def init(specs: tree.Tree, seed: int, dtype: torch.dtype = torch.float32, device=None) -> tree.Tree:
    """Materialize a tree of `Param` as tensors."""
    return tree.map_with_path(lambda path, p: init_leaf(path, p, seed, dtype, device), specs, is_leaf=is_param)
