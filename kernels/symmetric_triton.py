"""A Triton kernel for the product of matrices with their own transposes.

    Y[b] = alpha X[b] X[b]^T + beta A[b]        X (B, M, C), A and Y (B, M, M) symmetric

FLOPs: M (M + BM) C of a matrix, half of a product that does not know of the symmetry: programs above the diagonal leave
at once, those below it write their tile and its mirror image. Bytes, at least: X read, Y written, A read. A tile of BM
rows and columns needs BM / 2 FLOPs a byte of X, so with BM = 128 caches must serve most of it, as of any product.

After dion/newton_schulz_triton.py of github.com/microsoft/dion. Sums are in float32, and products of float32 are IEEE
unless PyTorch allows TF32. The result is symmetric to the bit off its diagonal tiles.
"""

import torch
import triton
import triton.language as tl

from kernels import tuning
from kernels.moe_triton import Config

CONFIGS: dict[str, dict[str, tuple[Config, ...]]] = {
    "sm90": {"symmetric": (Config(128, 128, 64, 8, 4), Config(64, 64, 64, 4, 4))},
    "sm80": {"symmetric": (Config(128, 128, 32, 8, 3), Config(64, 64, 32, 4, 4))},
}
"""Candidates in 16 bit by generation, BM = BN. None has been measured by us yet."""
CONFIGS["sm100"] = CONFIGS["sm90"]
FLOAT32 = Config(64, 64, 32, 4, 2)


@triton.jit
def _symmetric(
    x, add, y,
    M, C, ALPHA: tl.constexpr, BETA: tl.constexpr, ADDED: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """y (B, M, M) from x (B, M, C) and, if ADDED, add (B, M, M); a program is a tile, another dim the matrix."""
    tiles = (M + BM - 1) // BM
    i, j = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    if j > i:
        return
    m, n, c = i * BM + tl.arange(0, BM), j * BN + tl.arange(0, BN), tl.arange(0, BK)
    x += tl.program_id(1).to(tl.int64) * M * C
    left, right = x + m[:, None] * C + c[None, :], x + n[None, :] * C + c[:, None]
    total = tl.zeros((BM, BN), tl.float32)
    for start in range(0, C, BK):
        inside = c < C - start
        a = tl.load(left + start, (m < M)[:, None] & inside[None, :], 0)
        b = tl.load(right + start, inside[:, None] & (n < M)[None, :], 0)
        total = tl.dot(a, b, total, input_precision=PRECISION)
    total *= ALPHA
    at, here = m[:, None] * M + n[None, :], (m < M)[:, None] & (n < M)[None, :]
    first = tl.program_id(1).to(tl.int64) * M * M
    if ADDED:
        total += BETA * tl.load(add + first + at, here, 0).to(tl.float32)
    made = total.to(y.dtype.element_ty)
    tl.store(y + first + at, made, here)
    if j < i:
        mirror = n[:, None] * M + m[None, :]
        tl.store(y + first + mirror, tl.trans(made), (n < M)[:, None] & (m < M)[None, :])


def candidates(x: torch.Tensor) -> tuple[Config, ...]:
    """Return the configs to choose from for operands of this type on this device."""
    return (FLOAT32,) if x.itemsize > 2 else CONFIGS[tuning.generation(x)]["symmetric"]


def product(x: torch.Tensor, add: torch.Tensor | None, alpha: float, beta: float) -> torch.Tensor:
    """Return alpha X X^T + beta A of contiguous matrices (B, M, C) and (B, M, M), in their type."""
    B, M, C = x.shape
    y = x.new_empty(B, M, M)
    precision = "tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee"
    consts = {"ALPHA": alpha, "BETA": beta, "ADDED": add is not None, "PRECISION": precision}

    def run(c: Config) -> None:
        sizes = {"BM": c.BM, "BN": c.BN, "BK": c.BK, "num_warps": c.warps, "num_stages": c.stages}
        _symmetric[triton.cdiv(M, c.BM) ** 2, B](x, x if add is None else add, y, M, C, **consts, **sizes)

    if y.numel():
        run(tuning.fastest("symmetric", candidates(x), run, x, [M, C, add is not None]))
    return y
