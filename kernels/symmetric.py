"""The product of a matrix with its own transpose, which is symmetric: what Newton-Schulz steps are made of.

    alpha X X^T + beta A        X (..., M, C), A (..., M, M) symmetric

FLOPs: 2 M^2 C of a matrix by a library's product, M (M + B) C by `kernels.symmetric_triton` with its tiles of B rows.
"""

import importlib

import torch

from kernels.ops import op


def product(x: torch.Tensor, add: torch.Tensor | None = None, alpha: float = 1.0, beta: float = 0.0) -> torch.Tensor:
    """Compute all of it."""
    made = x @ x.mT if alpha == 1 else alpha * (x @ x.mT)
    return made if add is None else beta * add + made


@op("functional_trainer::symmetric_product")
def _halves(x: torch.Tensor, add: torch.Tensor | None, alpha: float, beta: float) -> torch.Tensor:
    """Return alpha X X^T + beta A of matrices (B, M, C) and (B, M, M)."""
    return importlib.import_module("kernels.symmetric_triton").product(x, add, alpha, beta)


@torch.library.register_fake("functional_trainer::symmetric_product")
def _(x, add, alpha, beta):
    return x.new_empty(*x.shape[:2], x.shape[1])


def halves(x: torch.Tensor, add: torch.Tensor | None = None, alpha: float = 1.0, beta: float = 0.0) -> torch.Tensor:
    """Compute the lower triangle's tiles and mirror them; without a gradient."""
    many = x.reshape(-1, *x.shape[-2:]).contiguous()
    made = _halves(many, None if add is None else add.reshape(many.shape[0], *add.shape[-2:]).contiguous(), alpha, beta)
    return made.view(*x.shape[:-1], x.shape[-2])
