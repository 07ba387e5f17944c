"""Products of operands in 8 bits (e4m3), forward and both backward ones, accumulated in higher precision.

    y = x w^T        dx = g w        dw = g^T x        each of Q(a) Q(b)^T, with scales along what is summed

A value is data times scale, scale = 2^ceil(log2(max |a| / 448)) of the values that share it, in float32. Two recipes:

    tile   128 neighbours along the sum share a scale, and 128 x 128 of a weight (https://arxiv.org/abs/2412.19437, 3.3)
    row    all of a row along the sum does, and a row of outputs of a weight (as `torch._scaled_mm` takes them)

Scales are powers of two, as torchao's row-wise recipe rounds them and DeepSeek-V3.1's are stored. Scaling is then
exact, e4m3's relative error is the same in every binade, and what was quantised is a number of bfloat16: quantising it
again, in the same blocks, changes nothing. A value is off by at most the larger of 2^-4 of itself and 2^-10 of its
scale, which is below 1/224 of the largest value that shares it. What is not finite makes those that share it NaN.

x is kept for backward in 8 bits, and quantised again along tokens for dw, as is g. Scales of w's rows do not factor out
of dx, so there g takes them in before it is quantised. Sizes need not be multiples of a tile: the last one is smaller.

Here products are emulated, or PyTorch's where it has one; `kernels.fp8_triton` multiplies 8 bits by the recipe tile.

T tokens, R rows sorted by expert, E experts, I inputs, O outputs.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F

from kernels.grouped_matmul import grouped_mm

E4M3, MOST = torch.float8_e4m3fn, 448.0


class Quantised(NamedTuple):
    """Data (..., R, C) in e4m3 and a scale for each block of rows x cols (0: all), (..., R / rows, C / cols)."""

    data: torch.Tensor
    scale: torch.Tensor
    rows: int
    cols: int

    @property
    def mT(self) -> "Quantised":
        return Quantised(self.data.mT, self.scale.mT, self.cols, self.rows)

    def to(self, dtype: torch.dtype) -> torch.Tensor:
        """Return data times scale."""
        wide = self.data.to(torch.promote_types(dtype, torch.float32))
        return (wide * spread(self.scale, self.data.shape, self.rows, self.cols)).to(dtype)

    def take(self, index: torch.Tensor) -> "Quantised":
        """Return some rows, each of which has scales of its own."""
        return Quantised(self.data.view(torch.uint8)[index].view(E4M3), self.scale[index], self.rows, self.cols)


def blocks(x: torch.Tensor, rows: int, cols: int) -> torch.Tensor:
    """View (..., R, C), zeros added to its end, as blocks: (..., R / rows, rows, C / cols, cols)."""
    R, C = x.shape[-2:]
    rows, cols = rows or max(R, 1), cols or max(C, 1)
    x = F.pad(x, (0, -C % cols, 0, -R % rows)) if R % rows or C % cols else x
    return x.unflatten(-1, (-(-C // cols), cols)).unflatten(-3, (-(-R // rows), rows))


def spread(scale: torch.Tensor, shape: torch.Size, rows: int, cols: int) -> torch.Tensor:
    """Return the scale of each of (..., R, C), a dim that is one block left to broadcasting."""
    for dim, size in ((-2, rows), (-1, cols)):
        if size > 1 and scale.shape[dim] > 1:
            scale = scale.index_select(dim, torch.arange(shape[dim], device=scale.device) // size)
    return scale


def scale_of(most: torch.Tensor) -> torch.Tensor:
    """Return the scale, float32, with which values of at most `most` in size fit into e4m3."""
    bits = (most.to(torch.float32) / MOST).clamp_min(2.0**-126).view(torch.int32).clamp_max(0x7F800000)
    return ((bits + 0x7FFFFF) & 0x7F800000).view(torch.float32)  # the mantissa away, upwards; of NaN infinity


def quantise(x: torch.Tensor, rows: int, cols: int) -> Quantised:
    """Quantise (..., R, C), of any floating type, in blocks of rows x cols (0: all)."""
    scale = scale_of(blocks(x, rows, cols).abs().amax((-3, -1)))
    return Quantised((x / spread(scale, x.shape, rows, cols)).to(E4M3), scale, rows, cols)


@dataclass(frozen=True)
class Recipe:
    """How many values share a scale (0: all): along the sum, and of outputs of a weight."""

    name: str
    tile: int
    block: int

    def operand(self, x: torch.Tensor) -> Quantised:
        """Quantise (..., R, C) that is summed over C."""
        return quantise(x, 1, self.tile)

    def weight(self, w: torch.Tensor) -> Quantised:
        """Quantise (..., O, I)."""
        return quantise(w, self.block, self.tile)

    def input_grad(self, g: torch.Tensor, w: Quantised, scale: torch.Tensor) -> tuple[Quantised, Quantised]:
        """Return the operands of dx, g (..., O) and w^T; `scale` (..., O) is of w's rows, if each has one."""
        if self.block > 1:
            return self.operand(g), w.mT
        once = torch.ones_like(w.data[..., :1, :], dtype=torch.float32)
        return self.operand(g * scale), Quantised(w.data, once, 0, 1).mT

    # of a weight that travels -------------------------------------------------------------------------------------

    def travels(self, outputs: int, inputs: int, dim: str) -> bool:
        """Tell whether the borders of equal parts of a weight, each (outputs, inputs), cut along one of the two, are
        borders of blocks."""
        return outputs % self.block == 0 if dim == "outputs" else self.tile > 0 and inputs % self.tile == 0

    def pack(self, w: torch.Tensor) -> torch.Tensor:
        """Return (..., O, I) as bytes: data, then scales."""
        q = self.weight(w)
        return torch.cat([x.contiguous().view(torch.uint8).flatten() for x in (q.data, q.scale)])

    def packed(self, shape: tuple[int, ...]) -> int:
        """Return the number of bytes of (..., O, I)."""
        *batch, outputs, inputs = shape
        scales = -(-outputs // (self.block or outputs)) * -(-inputs // (self.tile or inputs))
        return math.prod([*batch, outputs * inputs + 4 * scales])

    def unpack(self, packed: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Return what was packed in each of (ways, bytes), as (ways, ..., O, I): what it is rounded to."""
        *batch, outputs, inputs = shape
        count = math.prod(shape)
        at = [len(packed), *batch, -(-outputs // (self.block or outputs)), -(-inputs // (self.tile or inputs))]
        data = packed[:, :count].reshape(-1).view(E4M3).view(len(packed), *shape)
        scale = packed[:, count:].reshape(-1).clone().view(torch.float32).view(at)
        return Quantised(data, scale, self.block, self.tile).to(dtype)


RECIPES = {r.name: r for r in (Recipe("tile", 128, 128), Recipe("row", 0, 1))}


# dense ---------------------------------------------------------------------------------------------------------------


def matmul(a: Quantised, b: Quantised, dtype: torch.dtype) -> torch.Tensor:
    """Return a (M, K) b (N, K)^T by dequantising; any device."""
    return a.to(dtype) @ b.to(dtype).mT


def scaled_mm(a: Quantised, b: Quantised, dtype: torch.dtype) -> torch.Tensor:
    """Let `torch._scaled_mm` multiply operands with a scale a row, contiguous along the sum.

    It takes sizes that are multiples of 16 and gives bfloat16; all else is dequantised.
    """
    by_row = (a.rows, a.cols, b.rows, b.cols) == (1, 0, 1, 0) and dtype == torch.bfloat16
    if not by_row or any([n % 16 for n in (*a.data.shape, *b.data.shape)]):
        return matmul(a, b, dtype)
    scales = a.scale.contiguous(), b.scale.mT.contiguous()
    return torch._scaled_mm(a.data.contiguous(), b.data.contiguous().mT, *scales, out_dtype=dtype)


def joined(quantised: list[Quantised], block: int) -> list[Quantised]:
    """Put weights under each other, if each but the last ends where a block does."""
    if any([q.data.shape[0] % block for q in quantised[:-1]]):
        return quantised
    data, scale = torch.cat([q.data for q in quantised]), torch.cat([q.scale for q in quantised])
    return [Quantised(data, scale, *quantised[0][2:])]


class _Linear(torch.autograd.Function):
    """x (T, I) times the rows of several weights (O, I), each quantised by itself, under each other."""

    @staticmethod
    def forward(ctx, x, recipe, product, *weights):
        xq, wqs = recipe.operand(x), joined([recipe.weight(w) for w in weights], recipe.block)
        ctx.recipe, ctx.product, ctx.kinds = recipe, product, (xq[2:], wqs[0][2:])
        ctx.sizes = [w.shape[0] for w in weights]
        ctx.save_for_backward(*xq[:2], *[t for q in wqs for t in (q.data, q.scale)])
        return torch.cat([product(xq, q, x.dtype) for q in wqs], 1)

    @staticmethod
    def backward(ctx, grad):
        data, scale, *rest = ctx.saved_tensors
        xq = Quantised(data, scale, *ctx.kinds[0])
        wqs = [Quantised(*pair, *ctx.kinds[1]) for pair in zip(rest[::2], rest[1::2], strict=True)]
        dx, operand = grad.new_zeros(data.shape), ctx.recipe.operand
        for g, q in zip(grad.split([q.data.shape[0] for q in wqs], 1), wqs, strict=True):
            dx = dx + ctx.product(*ctx.recipe.input_grad(g, q, q.scale.mT), grad.dtype)
        dw = ctx.product(operand(grad.mT), operand(xq.to(grad.dtype).mT), grad.dtype)
        return dx, None, None, *dw.split(ctx.sizes)


def linear(x: torch.Tensor, weights: tuple[torch.Tensor, ...], recipe: Recipe, product: Callable) -> torch.Tensor:
    """Multiply (..., I) with weights (O, I); return their outputs one after the other, (..., sum of O)."""
    return _Linear.apply(x.flatten(0, -2), recipe, product, *weights).unflatten(0, x.shape[:-1])


# experts -------------------------------------------------------------------------------------------------------------


class Products(NamedTuple):
    """Grouped products: rows (R, I) with w (E, O, I), and g^T x of each expert's rows, (E, O, I)."""

    rows: Callable[[Quantised, Quantised, torch.Tensor, torch.dtype], torch.Tensor]
    weights: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def dequantised(multiply: Callable, weights: Callable) -> Products:
    """Compose grouped products from those of ordinary tensors."""
    return Products(lambda a, w, counts, dtype: multiply(a.to(dtype), w.to(dtype), counts), weights)


def scaled_grouped_mm(a: Quantised, w: Quantised, counts: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Let `torch._scaled_grouped_mm` multiply operands with a scale a row; as `scaled_mm`.

    Gradients of weights are dequantised: its form for them takes both operands turned, each expert's rows from a
    multiple of 16 on, copies that nothing here makes.
    """
    by_row = (a.rows, a.cols, w.rows, w.cols) == (1, 0, 1, 0) and dtype == torch.bfloat16
    if not by_row or any([n % 16 for n in w.data.shape[1:]]):
        return grouped_mm(a.to(dtype), w.to(dtype), counts)
    ends = counts.cumsum(0).to(torch.int32)
    scales = a.scale[:, 0].contiguous(), w.scale[..., 0].contiguous()
    y = torch._scaled_grouped_mm(a.data.contiguous(), w.data.contiguous().mT, *scales, offs=ends, out_dtype=dtype)
    return torch.where(torch.arange(len(y), device=y.device)[:, None] < ends[-1], y, 0)


def along_rows(x: torch.Tensor, counts: torch.Tensor, tile: int) -> torch.Tensor:
    """Round (R, C) to e4m3, `tile` rows of an expert sharing a scale in each column (0: all of them)."""
    (R, C), E = x.shape, counts.shape[0]
    row, ends = torch.arange(R, device=x.device), counts.cumsum(0)
    expert = torch.searchsorted(ends, row, right=True)
    group, most = expert, E
    if tile:
        tiles, most = (counts + tile - 1) // tile, R // tile + E
        place = expert.clamp_max(E - 1)
        group = (tiles.cumsum(0) - tiles)[place] + (row - (ends - counts)[place]) // tile
        group = torch.where(expert < E, group, most)
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    size = torch.where(wide.isnan(), torch.inf, wide.abs())  # a scattered maximum may lose NaN
    largest = wide.new_zeros(most + 1, C).scatter_reduce(0, group[:, None].expand(R, C), size, "amax")
    scale = scale_of(largest)[group]
    return ((wide / scale).to(E4M3).to(wide.dtype) * scale).to(x.dtype)


class _Grouped(torch.autograd.Function):
    """Rows by their expert's matrix; x has tokens instead of rows if `gather`, the result if `combine`."""

    @staticmethod
    def forward(ctx, x, w, counts, order, inverse, layout, recipe, products):
        slots, gather, combine = layout
        xq, wq = recipe.operand(x), recipe.weight(w)
        ctx.recipe, ctx.products, ctx.layout, ctx.kinds = recipe, products, layout, (xq[2:], wq[2:])
        ctx.save_for_backward(*xq[:2], *wq[:2], counts, order, inverse)
        y = products.rows(xq.take(order // slots) if gather else xq, wq, counts, x.dtype)
        return y[inverse].unflatten(0, (-1, slots)).sum(1) if combine else y

    @staticmethod
    def backward(ctx, grad):
        x_data, x_scale, w_data, w_scale, counts, order, inverse = ctx.saved_tensors
        xq, wq = Quantised(x_data, x_scale, *ctx.kinds[0]), Quantised(w_data, w_scale, *ctx.kinds[1])
        slots, gather, combine = ctx.layout
        g = grad[order // slots] if combine else grad
        row = torch.arange(g.shape[0], device=g.device)
        expert = torch.searchsorted(counts.cumsum(0), row, right=True).clamp_max(len(counts) - 1)
        by_row = w_scale[..., 0][expert] if ctx.recipe.block == 1 else w_scale
        dx = ctx.products.rows(*ctx.recipe.input_grad(g, wq, by_row), counts, g.dtype)
        dx = dx[inverse].unflatten(0, (-1, slots)).sum(1) if gather else dx
        x = xq.to(g.dtype)
        turned = [along_rows(t, counts, ctx.recipe.tile) for t in (g, x[order // slots] if gather else x)]
        return dx, ctx.products.weights(*turned, counts), *(None,) * 6


def gather_matmul(x, w, counts, order, inverse, slots, recipe: Recipe, products: Products) -> torch.Tensor:
    """Do what `grouped_matmul.gather_matmul` does, by a recipe."""
    return _Grouped.apply(x, w, counts, order, inverse, (slots, True, False), recipe, products)


def matmul_combine(x, w, counts, order, inverse, slots, recipe: Recipe, products: Products) -> torch.Tensor:
    """Do what `grouped_matmul.matmul_combine` does, by a recipe."""
    return _Grouped.apply(x, w, counts, order, inverse, (slots, False, True), recipe, products)
