"""Products in 8 bits by the recipe `tile` as ops over Triton kernels: what compilers see of them, and their gradients.

They are those that `kernels.fp8` emulates, with the same bits in what is quantised. Kept for backward are x and w in
8 bits. The arithmetic and the layouts of what is quantised are at the head of `kernels/fp8_triton.py`.

T tokens of K slots each, R rows sorted by expert, E experts, I inputs, O outputs. `ends` (E + 1,) are the experts' ends
and then R.
"""

import importlib

import torch
import torch.nn.functional as F

from kernels.fp8 import E4M3, RECIPES, Recipe
from kernels.ops import op

BLOCK = RECIPES["tile"].tile
Four = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def _kernels():
    """Import Triton where an op runs; other devices need not have it."""
    return importlib.import_module("kernels.fp8_triton")


def _empty(x, order, form: str, columns: int, tiles: int) -> Four:
    """Return memory for data (R, blocks 128), scale (blocks, R), of squares (tiles, blocks), data turned (columns,
    tiles 128) and its scale (tiles, columns); what a form has not is empty.
    """
    R, blocks = x.shape[0] if order is None else order.shape[0], -(-columns // BLOCK)
    data = x.new_empty((0, 0) if form == "turned" else (R, blocks * BLOCK), dtype=E4M3)
    scales = {"turned": (0, 0), "square": (tiles, blocks)}.get(form, (blocks, R))
    turned = x.new_empty((0, 0) if form == "rows" else (columns, tiles * BLOCK), dtype=E4M3)
    turned_scales = (0, 0) if form in ("rows", "square") else (tiles, columns)
    scale, turned_scale = (x.new_empty(shape, dtype=torch.float32) for shape in (scales, turned_scales))
    return data, scale, turned, turned_scale


@op("functional_trainer::fp8_quantise")
def _quantise(
    x: torch.Tensor, scale: torch.Tensor | None, order: torch.Tensor | None, ends: torch.Tensor, slots: int, form: str,
    columns: int, tiles: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """Quantise x (T or R, columns), or data with its scale, by rows, turned, both, or in squares of 128."""
    made = _empty(x, order, form, columns, tiles)
    _kernels().quantise(x, scale, order, ends, slots, form, columns, tiles, made)
    return made


@torch.library.register_fake("functional_trainer::fp8_quantise")
def _(x, scale, order, ends, slots, form, columns, tiles):
    return _empty(x, order, form, columns, tiles)


@op("functional_trainer::fp8_product")
def _product(
    a: torch.Tensor, a_scale: torch.Tensor, b: torch.Tensor, b_scale: torch.Tensor, order: torch.Tensor | None,
    ends: torch.Tensor, slots: int, summed: str, dtype: torch.dtype,
) -> torch.Tensor:  # fmt: skip
    """Return rows by their experts' matrices (R, N), summed over "inputs" or "outputs", or over "rows", (E, M, N)."""
    y = _result(a, b, order, ends, summed, dtype)
    if y.numel():
        _kernels().product(a, a_scale, b, b_scale, order, ends, slots, summed, y)
    return y


@torch.library.register_fake("functional_trainer::fp8_product")
def _(a, a_scale, b, b_scale, order, ends, slots, summed, dtype):
    return _result(a, b, order, ends, summed, dtype)


def _result(a, b, order, ends, summed: str, dtype: torch.dtype) -> torch.Tensor:
    E, N, rows = ends.shape[0] - 1, b.shape[0], a.shape[0] if order is None else order.shape[0]
    sizes = {"rows": (E, a.shape[0], N), "inputs": (rows, N // E), "outputs": (rows, N)}
    return a.new_empty(sizes[summed], dtype=dtype)


def _by_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise (T, C) by 1 x 128: return data and scale."""
    return _quantise(x, None, None, _whole(x), 1, "rows", x.shape[1], x.shape[0] // BLOCK + 1)[:2]


def _by_squares(w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Quantise (E, O, I) by 128 x 128: return data, data turned, and the scale of both."""
    E, outputs, inputs = w.shape
    ends = F.pad(torch.arange(1, E + 1, device=w.device) * outputs, (0, 1), value=E * outputs)
    tiles = E * -(-outputs // BLOCK)
    data, scale, turned, _ = _quantise(w.flatten(0, 1).contiguous(), None, None, ends, 1, "square", inputs, tiles)
    return data, turned, scale


def _whole(x: torch.Tensor) -> torch.Tensor:
    """Return the ends of one expert that has all rows."""
    return torch.full((2,), x.shape[0], device=x.device)


class _Grouped(torch.autograd.Function):
    """Rows by their expert's matrix; x has tokens instead of rows if `gather`, the result if `combine`."""

    @staticmethod
    def forward(ctx, x, w, ends, order, inverse, layout):
        if x.dtype == torch.float64:
            raise ValueError("backend 'triton' multiplies in 8 bits what is bfloat16, float16 or float32, not float64")
        slots, gather, combine = ctx.layout = layout
        x8, (w8, w8_turned, w_scale) = _by_rows(x.contiguous()), _by_squares(w)
        ctx.save_for_backward(*x8, w8_turned, w_scale, ends, order, inverse)
        y = _product(*x8, w8, w_scale, order if gather else None, ends, slots, "inputs", x.dtype)
        return y[inverse].unflatten(0, (-1, slots)).sum(1) if combine else y

    @staticmethod
    def backward(ctx, grad):
        *x8, w8, w_scale, ends, order, inverse = ctx.saved_tensors
        slots, gather, combine = ctx.layout
        (T, outputs), inputs, grad = grad.shape, w8.shape[0], grad.contiguous()
        tiles = (T if order is None else order.shape[0]) // BLOCK + ends.shape[0] - 1
        if combine:
            g8, taken = _by_rows(grad), order
            g8_turned = _quantise(grad, None, order, ends, slots, "turned", outputs, tiles)[2:]
        else:
            both, taken = _quantise(grad, None, None, ends, slots, "both", outputs, tiles), None
            g8, g8_turned = both[:2], both[2:]
        x8_turned = _quantise(*x8, order if gather else None, ends, slots, "turned", inputs, tiles)[2:]
        dx = _product(*g8, w8, w_scale, taken, ends, slots, "outputs", grad.dtype)
        dw = _product(*g8_turned, *x8_turned, None, ends, slots, "rows", grad.dtype)
        return dx[inverse].unflatten(0, (-1, slots)).sum(1) if gather else dx, dw, *(None,) * 4


def _check(recipe: Recipe) -> None:
    if recipe != RECIPES["tile"]:
        raise ValueError(f"backend 'triton' multiplies in 8 bits by the recipe tile, not {recipe.name}")


def linear(x: torch.Tensor, weights: tuple[torch.Tensor, ...], recipe: Recipe) -> torch.Tensor:
    """Do what `kernels.fp8.linear` does, by the recipe tile. Raises ValueError for another, and for float64."""
    _check(recipe)
    if not any([w.shape[0] % BLOCK for w in weights[:-1]]):  # else a block would have rows of two
        weights = (torch.cat(weights),)
    rows = x.flatten(0, -2)
    y = [_Grouped.apply(rows, w[None], _whole(rows), None, None, (1, False, False)) for w in weights]
    return torch.cat(y, 1).unflatten(0, x.shape[:-1])


def gather_matmul(x, w, counts, order, inverse, slots: int, recipe: Recipe) -> torch.Tensor:
    """Do what `kernels.fp8.gather_matmul` does, by the recipe tile. Raises ValueError for another, and for float64."""
    _check(recipe)
    return _Grouped.apply(x, w, _ends(counts, order), order, inverse, (slots, True, False))


def matmul_combine(x, w, counts, order, inverse, slots: int, recipe: Recipe) -> torch.Tensor:
    """Do what `kernels.fp8.matmul_combine` does, by the recipe tile. Raises ValueError for another, and for float64."""
    _check(recipe)
    return _Grouped.apply(x, w, _ends(counts, order), order, inverse, (slots, False, True))


def _ends(counts: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    return F.pad(counts.cumsum(0), (0, 1), value=order.shape[0])
