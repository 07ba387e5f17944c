"""Triton kernels of products in 8 bits by the recipe `tile` of `kernels.fp8`, and what launches them.

    y[r, n] = sum over blocks k of 128    s_a[r, k] s_b[n, k] (sum over i in block k    a[r, i] b[n, i])

    y  = x w^T    over inputs     x (R or T, I) by 1 x 128    w (E O, I) by 128 x 128            each row its expert's
    dx = g w      over outputs    g (R or T, O) by 1 x 128    w turned (I, E O), same scales     each row its expert's
    dw = g^T x    over rows       g turned (O, R) by 1 x 128  x turned (I, R) by 1 x 128         each expert's rows

A dense product is that of one expert. Tensor cores add up the 128 values of a block; the blocks, times both scales, are
added in float32 outside of them (https://arxiv.org/abs/2412.19437, section 3.3: Hopper's keep some 14 bits of a sum;
DeepGEMM does the same). Tensor cores want 8-bit operands contiguous along the sum, so `_quantise` writes turned what is
summed over rows, and a weight both ways at once. g, unless it has tokens instead of rows, is read once for both forms.

What is quantised is padded with zeros to whole blocks along the sum, and, turned, an expert's rows start at a block of
their own, of R // 128 + E in all: products need no mask along the sum and load 16 bytes at a time whatever the sizes.
Scales lie (blocks, rows), of a weight (blocks of all experts' outputs, blocks of inputs).

FLOPs: 2 R O I a product. Bytes, at least: an operand's in 8 bits and the result's in 16, of dx and y 2 R N and of dw
2 E O I. Quantising reads 2 bytes a value (1 if it is in 8 bits) and writes 1, or 2 if both ways. On an H100 (1979
TFLOP/s in 8 bits, 67 in float32, 3.35 TB/s) quantising x takes as long as multiplying it with 890 outputs; a tile of
128 x 128 needs 128 FLOPs a byte where the ridge is 590, so caches must serve most of it; and one instruction a result
and block, which scales and adds, takes CUDA cores 23 % of the least time, two of dw, whose scales differ by column, 46.

R rows sorted by expert, E experts, T tokens of K rows each, O outputs, I inputs. `ends` (E + 1,) are the experts' ends
and then R: rows from `ends[E - 1]` on belong to no expert. They are not read, their results are 0.
"""

import torch
import triton
import triton.language as tl

from kernels import tuning
from kernels.moe_triton import Config, _tile, _tokens

BLOCK, WARPS = 128, 8  # values that share a scale; warps that quantise 128 x 128
CONFIGS: dict[str, dict[str, tuple[Config, ...]]] = {
    "sm90": {"product": (Config(128, 128, 128, 8, 4), Config(64, 128, 128, 4, 4), Config(128, 64, 128, 4, 4))},
    "sm80": {"product": ()},  # has no products of e4m3
}
"""Candidates by generation, BK = BLOCK and BN at most that. None has been measured by us yet."""
CONFIGS["sm100"] = CONFIGS["sm90"]


@triton.jit
def _scale(most):
    """Return the scale of values whose largest size has the bits `most`, and its inverse; of NaN infinity and 0.

    448 is 1.75 2^8: a mantissa above 1.75's, 0x600000, takes the next power of two. A maximum of integers keeps NaN.
    """
    power = tl.maximum(((most + 0x1FFFFF) >> 23) - 8, 1)
    power = tl.where(most >= 0x7F800000, 255, power)
    return (power << 23).to(tl.float32, bitcast=True), (tl.maximum(254 - power, 0) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _quantise(
    x, x_scale, order, ends, data, scale, turned, turned_scale,
    M, R, C, E: tl.constexpr, E2: tl.constexpr, K: tl.constexpr, SCALED: tl.constexpr, GATHER: tl.constexpr,
    FORM: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """data (R, C), FORM "rows", with scales of 1 x 128; turned (C, tiles), "turned", of 128 x 1; "both"; or, "square",
    both with scales of 128 x 128. x is (M, C), or, SCALED, data with scales; its rows are R's, or, if GATHER, tokens.
    """
    tile, block = tl.program_id(1), tl.program_id(0)
    group, first, end = _tile(ends, E + 1, E2, BM, tile)
    if group >= E:
        return
    row = first + tl.arange(0, BM)
    used, source = row < end, row.to(tl.int64)
    if GATHER:
        _, _, source = _tokens(order, first, end, K, BM)
    c, blocks = block * BN + tl.arange(0, BN), tl.cdiv(C, BN)
    x_at = x + source[:, None] * (blocks * BN if SCALED else C) + c[None, :]
    value = tl.load(x_at, used[:, None] & (c < C)[None, :], 0.0).to(tl.float32)
    if SCALED:
        value *= tl.load(x_scale + block * M + source, used, 0.0)[:, None]
    size = value.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    data_at = data + row.to(tl.int64)[:, None] * blocks * BN + c[None, :]
    width = tl.num_programs(1) * BM
    turned_at = turned + c.to(tl.int64)[None, :] * width + tile * BM + tl.arange(0, BM)[:, None]
    if FORM == "square":
        shared, inverse = _scale(tl.max(tl.max(size, 1), 0))
        tl.store(scale + tile * blocks + block, shared)
        made = (value * inverse).to(data.dtype.element_ty)
        tl.store(data_at, made, used[:, None])
        tl.store(turned_at, made, (c < C)[None, :])
    if FORM == "rows" or FORM == "both":
        shared, inverse = _scale(tl.max(size, 1))
        tl.store(scale + block * R + row, shared, used)
        tl.store(data_at, (value * inverse[:, None]).to(data.dtype.element_ty), used[:, None])
    if FORM == "turned" or FORM == "both":
        shared, inverse = _scale(tl.max(size, 0))
        tl.store(turned_scale + tile * C + c, shared, c < C)
        tl.store(turned_at, (value * inverse[None, :]).to(turned.dtype.element_ty), (c < C)[None, :])


@triton.jit
def _blocks(ends, E: tl.constexpr, E2: tl.constexpr, BK: tl.constexpr, expert):
    """Return an expert's first block of rows and the next expert's."""
    e = tl.arange(0, E2)
    end = tl.load(ends + e, e < E, 0).to(tl.int32)
    start = tl.load(ends + e - 1, (e > 0) & (e < E), 0).to(tl.int32)
    blocks = (end - start + BK - 1) // BK
    return tl.sum(tl.where(e < expert, blocks, 0), 0), tl.sum(tl.where(e <= expert, blocks, 0), 0)


@triton.jit
def _product(
    a, a_scale, b, b_scale, order, ends, y,
    M, N, blocks, E: tl.constexpr, E2: tl.constexpr, K: tl.constexpr, GATHER: tl.constexpr, SUM: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """y (R, N) from a (M, blocks), its rows R's, or, if GATHER, tokens, and weights b: (E N, blocks), SUM "inputs", or
    (N, E blocks), "outputs"; or, SUM "rows", y (E, M, N) from a (M, blocks) and b (N, blocks).
    """
    wide, length = tl.cdiv(N, BN), blocks * BK
    left = tl.program_id(0) % wide * BN
    n = (left + tl.arange(0, BN)).to(tl.int64)
    if SUM == "rows":
        group = tl.program_id(1).to(tl.int64)
        block, last = _blocks(ends, E, E2, BK, group)
        m = tl.program_id(0) // wide * BM + tl.arange(0, BM)
        used, source = m < M, m.to(tl.int64)
        y += group * M * N
        b_at, b_scale_at, step = b + n * length, b_scale + n, N
    else:
        group, first, end = _tile(ends, E + 1, E2, BM, tl.program_id(1))
        if group > E:
            return
        group, block, last = group.to(tl.int64), 0, tl.where(group < E, blocks, 0)
        m = first + tl.arange(0, BM)
        used, source = m < end, m.to(tl.int64)
        if GATHER:
            _, _, source = _tokens(order, first, end, K, BM)
        ahead = group * tl.cdiv(N, BK) * blocks
        if SUM == "inputs":
            b_at, b_scale_at, step = b + (group * N + n) * length, b_scale + ahead + left // BK * blocks, 1
        else:
            b_at, b_scale_at, step = b + (n * E + group) * length, b_scale + ahead + left // BK, tl.cdiv(N, BK)
    a_at, a_scale_at, i = a + source * length, a_scale + source, tl.arange(0, BK)
    total = tl.zeros((BM, BN), tl.float32)
    for k in range(block, last):
        a_tile = tl.load(a_at[:, None] + k * BK + i[None, :], used[:, None], 0.0)
        b_tile = tl.load(b_at[None, :] + k * BK + i[:, None], (n < N)[None, :], 0.0)
        scale = tl.load(a_scale_at + k * M, used, 0.0)[:, None]
        if SUM == "rows":
            scale *= tl.load(b_scale_at + k * step, n < N, 0.0)[None, :]
        else:
            scale *= tl.load(b_scale_at + k * step)
        total += tl.dot(a_tile, b_tile) * scale
    y_at = y + m.to(tl.int64)[:, None] * N + n[None, :]
    tl.store(y_at, total.to(y.dtype.element_ty), used[:, None] & (n < N)[None, :])


# launches -------------------------------------------------------------------------------------------------------------


def candidates(x: torch.Tensor) -> tuple[Config, ...]:
    """Return the configs to choose from on this device. Raises ValueError if it does not multiply e4m3."""
    if found := CONFIGS[tuning.generation(x)]["product"]:
        return found
    said = f"products in 8 bits by Triton need compute capability 9.0 or later, which {x.device} has not"
    raise ValueError(f"{said}; backend 'reference' of fp8_linear and 'torch' of fp8_experts run there")


def _experts(ends: torch.Tensor) -> dict[str, int]:
    E = ends.shape[0] - 1
    return {"E": E, "E2": triton.next_power_of_2(E + 1)}


def quantise(x, scale, order, ends, slots: int, form: str, columns: int, tiles: int, made) -> None:
    """Fill what a form has of data, scale, data turned and its scale from x (M, columns), or from data and scale."""
    candidates(x)
    rows = x.shape[0] if order is None else order.shape[0]
    given = (ends if t is None else t for t in (scale, order))  # what is not there is not read
    which = {"K": slots, "SCALED": scale is not None, "GATHER": order is not None, "FORM": form, **_experts(ends)}
    sizes = {"BM": BLOCK, "BN": BLOCK, "num_warps": WARPS}
    grid = triton.cdiv(columns, BLOCK), tiles
    _quantise[grid](x, *given, ends, *made, x.shape[0], rows, columns, **which, **sizes)


def product(a, a_scale, b, b_scale, order, ends, slots: int, summed: str, y: torch.Tensor) -> None:
    """Fill y, (R, N) or (E, M, N)."""
    (M, length), N = a.shape, y.shape[-1]
    which = {"K": slots, "GATHER": order is not None, "SUM": summed, **_experts(ends)}
    args = a, a_scale, b, b_scale, ends if order is None else order, ends, y, M, N, length // BLOCK

    def run(c: Config) -> None:
        wide, tiles = triton.cdiv(N, c.BN), triton.cdiv(y.shape[0], c.BM) + ends.shape[0]
        grid = (triton.cdiv(M, c.BM) * wide, y.shape[0]) if summed == "rows" else (wide, tiles)
        _product[grid](*args, **which, BM=c.BM, BN=c.BN, BK=c.BK, num_warps=c.warps, num_stages=c.stages)

    like = a.mT if summed == "rows" else a  # the number of rows comes first: it is what varies
    kind = [N, like.shape[1], y.dtype, *which.values()]
    run(tuning.fastest("fp8_product", candidates(a), run, like, kind))
