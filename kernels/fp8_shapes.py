"""Products of operands in 8 bits as one op each, for plans: what a kernel takes and gives, nothing dequantised between.

On shapes they hold their result alone; on values they do what `kernels.fp8`'s emulation does. Gradients of experts'
weights are products in the compute dtype of rows that were rounded to 8 bits, as where `scaled_mm` multiplies.
"""

import torch

from kernels import fp8, grouped_matmul
from kernels.fp8 import Quantised
from kernels.ops import op


@op("functional_trainer::fp8_matmul")
def _multiply(
    a: torch.Tensor, a_scale: torch.Tensor, b: torch.Tensor, b_scale: torch.Tensor, blocks: list[int],
    dtype: torch.dtype,
) -> torch.Tensor:  # fmt: skip
    return fp8.matmul(Quantised(a, a_scale, *blocks[:2]), Quantised(b, b_scale, *blocks[2:]), dtype)


@torch.library.register_fake("functional_trainer::fp8_matmul")
def _(a, a_scale, b, b_scale, blocks, dtype):
    return a.new_empty(a.shape[0], b.shape[0], dtype=dtype)


@op("functional_trainer::fp8_grouped_matmul")
def _multiply_rows(
    a: torch.Tensor, a_scale: torch.Tensor, w: torch.Tensor, w_scale: torch.Tensor, counts: torch.Tensor,
    blocks: list[int], dtype: torch.dtype,
) -> torch.Tensor:  # fmt: skip
    x, w = Quantised(a, a_scale, *blocks[:2]).to(dtype), Quantised(w, w_scale, *blocks[2:]).to(dtype)
    return grouped_matmul.blas(x, w, counts)


@torch.library.register_fake("functional_trainer::fp8_grouped_matmul")
def _(a, a_scale, w, w_scale, counts, blocks, dtype):
    return a.new_empty(a.shape[0], w.shape[1], dtype=dtype)


def matmul(a: Quantised, b: Quantised, dtype: torch.dtype) -> torch.Tensor:
    """Return a (M, K) b (N, K)^T, (M, N)."""
    return _multiply(*a[:2], *b[:2], [*a[2:], *b[2:]], dtype)


def rows(a: Quantised, w: Quantised, counts: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Multiply rows (R, I), sorted by expert, with their expert's matrix of w (E, O, I); return (R, O)."""
    return _multiply_rows(*a[:2], *w[:2], counts, [*a[2:], *w[2:]], dtype)


PRODUCTS = fp8.Products(rows, grouped_matmul.weight_grad)
