"""Grouped matmul: rows sorted by expert, each multiplied by its expert's matrix.

    y[r] = W[e(r)] x[r]      dx[r] = W[e(r)]^T dy[r]      dW[e] = sum over e's rows of dy x^T

FLOPs: 2 R I O forward, 4 R I O backward. Rows beyond sum(counts) belong to no expert: their result and gradient are 0.

Backends: `blas` calls the vendor's matmul once per expert and reads the counts on the host, so it serves the host's own
device; `torch` is `F.grouped_mm`, whose offsets stay on the device. On the host, `gather_matmul` takes its rows from
tokens and `matmul_combine` sums each token's rows, an expert at a time, so that the rows stay in the cores' caches.
Few rows, as in decoding, stay there in any case: all at once, by `F.grouped_mm`, they are up to 1.6 times as fast.

R rows, E experts, I input width, O output width, T tokens with K rows each.
"""

import math

import torch
import torch.nn.functional as F

from kernels.ops import op

FEW = 2048
"""Rows up to which the host multiplies all experts' rows in one call."""


def reference(x_RI: torch.Tensor, w_EOI: torch.Tensor, counts_E: torch.Tensor) -> torch.Tensor:
    """Multiply every row by every expert and keep the right product; any device, differentiable."""
    E = w_EOI.shape[0]
    expert_R = torch.searchsorted(counts_E.cumsum(0), torch.arange(x_RI.shape[0], device=x_RI.device), right=True)
    mine_RE = expert_R[:, None] == torch.arange(E, device=x_RI.device)
    used_R1 = expert_R[:, None] < E  # cleared on both sides, so that not even a NaN passes through the other rows
    out_RO = torch.einsum("ri,eoi,re->ro", torch.where(used_R1, x_RI, 0), w_EOI, mine_RE.to(x_RI.dtype))
    return torch.where(used_R1, out_RO, 0)


def tile(rows: int, itemsize: int) -> int:
    """Return how many rows a host product over `rows` rows computes.

    oneDNN, which multiplies 16-bit matrices on CPUs, compiles and keeps a kernel for every shape it meets, and an
    expert's number of rows is a new one every step. So 16-bit products are rounded up to one of a few.
    """
    if itemsize > 2:
        return rows
    step = max(8, 2 ** ((rows - 1).bit_length() - 3))
    return math.ceil(rows / step) * step


def spans(counts: torch.Tensor, itemsize: int) -> list[tuple[int, int, int, int]]:
    """List (expert, start, end, rows to compute) of every expert that has rows."""
    ends = counts.cumsum(0).tolist()
    starts = [0, *ends[:-1]]
    return [(e, a, b, tile(b - a, itemsize)) for e, (a, b) in enumerate(zip(starts, ends, strict=True)) if b > a]


def _rows(x, take, start: int, end: int, buffer, clean: bool) -> torch.Tensor:
    """Return as many rows from `start` on as the buffer has, of x or of x[take]; zeros beyond `end` if `clean`."""
    m, n = buffer.shape[0], end - start
    if take is None and (m == n or not clean and start + m <= x.shape[0]):
        return x[start : start + m]
    if take is None:
        buffer[:n] = x[start:end]
    else:
        torch.index_select(x, 0, take[start:end], out=buffer[:n])
    if n < m:
        buffer[n:].zero_()
    return buffer


def _slots(y_RO: torch.Tensor, end: int, inverse_R: torch.Tensor | None, slots: int) -> torch.Tensor:
    """Clear the rows of no expert; return rows, or each token's sum over its slots if these are given."""
    y_RO[end:] = 0
    return y_RO if inverse_R is None else F.embedding_bag(inverse_R.view(-1, slots), y_RO, mode="sum")


@op("functional_trainer::grouped_matmul", gradient=True)
def _multiply(
    x: torch.Tensor,
    w: torch.Tensor,
    counts: torch.Tensor,
    order: torch.Tensor | None,
    inverse: torch.Tensor | None,
    slots: int,
    gather: bool,
    combine: bool,
) -> torch.Tensor:
    """Row r is slot order[r] of a token: x has tokens instead of rows if `gather`, the result if `combine`."""
    take = order // slots if gather and order is not None else None
    R = x.shape[0] if order is None else order.shape[0]
    aligned = all(n * x.itemsize % 16 == 0 for n in w.shape[1:])  # `F.grouped_mm` takes and makes no other rows
    if R <= FEW and x.itemsize < 8 and aligned:
        ends = counts.cumsum(0).to(torch.int32)
        y = F.grouped_mm(x if take is None else x[take], w.mT, offs=ends)
        return _slots(y, int(ends[-1]), inverse if combine else None, slots)
    todo, end = spans(counts, x.itemsize), 0
    buffer = x.new_empty(max((m for *_, m in todo), default=0), x.shape[1])
    y = x.new_empty(R + (x.itemsize < 4) * buffer.shape[0], w.shape[1])
    for e, start, end, m in todo:  # what is computed beyond the expert's rows, the next one writes over
        torch.mm(_rows(x, take, start, end, buffer[:m], False), w[e].T, out=y[start : start + m])
    return _slots(y[:R], end, inverse if combine else None, slots)


@torch.library.register_fake("functional_trainer::grouped_matmul")
def _(x, w, counts, order, inverse, slots, gather, combine):
    rows = x.shape[0] * slots if gather else x.shape[0]
    return x.new_empty(rows // slots if combine else rows, w.shape[1])


@op("functional_trainer::grouped_matmul_grad")
def _multiply_grad(
    grad: torch.Tensor,
    x: torch.Tensor,
    w: torch.Tensor,
    counts: torch.Tensor,
    order: torch.Tensor | None,
    inverse: torch.Tensor | None,
    slots: int,
    gather: bool,
    combine: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the gradients of x and w; where x gathers, its gradient combines, and the other way round."""
    todo, end, dw = spans(counts, x.itemsize), 0, torch.empty_like(w)
    take_x, take_g = (order // slots if some and order is not None else None for some in (gather, combine))
    R = x.shape[0] if order is None else order.shape[0]
    longest = max((m for *_, m in todo), default=0)
    rows_x, rows_g = x.new_empty(longest, x.shape[1]), x.new_empty(longest, grad.shape[1])
    dx = x.new_empty(R + (x.itemsize < 4) * longest, x.shape[1])
    for e in (counts == 0).nonzero()[:, 0].tolist():
        dw[e] = 0
    for e, start, end, m in todo:  # of the two, one is zero beyond the expert's rows
        x_e = _rows(x, take_x, start, end, rows_x[:m], clean=not combine)
        g_e = _rows(grad, take_g, start, end, rows_g[:m], clean=False)
        torch.mm(g_e.T, x_e, out=dw[e])
        torch.mm(g_e, w[e], out=dx[start : start + m])
    return _slots(dx[:R], end, inverse if gather else None, slots), dw


@torch.library.register_fake("functional_trainer::grouped_matmul_grad")
def _(grad, x, w, counts, order, inverse, slots, gather, combine):
    return torch.empty_like(x), torch.empty_like(w)


def _setup(ctx, inputs, output):
    x, w, counts, order, inverse, *ctx.layout = inputs
    ctx.save_for_backward(x, w, counts, order, inverse)


def _backward(ctx, grad):
    return *_multiply_grad(grad.contiguous(), *ctx.saved_tensors, *ctx.layout), *(None,) * 6


torch.library.register_autograd("functional_trainer::grouped_matmul", _backward, setup_context=_setup)


def blas(x_RI: torch.Tensor, w_EOI: torch.Tensor, counts_E: torch.Tensor) -> torch.Tensor:
    """Call the vendor's matmul once per expert."""
    return _multiply(x_RI.contiguous(), w_EOI.contiguous(), counts_E, None, None, 1, False, False)


def gather_matmul(x_TI, w_EOI, counts_E, order_R, inverse_R, slots: int) -> torch.Tensor:
    """Multiply the token of every row, order[r] // K, by the row's expert; return (R, O)."""
    return _multiply(x_TI.contiguous(), w_EOI.contiguous(), counts_E, order_R, inverse_R, slots, True, False)


def matmul_combine(x_RI, w_EOI, counts_E, order_R, inverse_R, slots: int) -> torch.Tensor:
    """Multiply every row by its expert and sum the K rows of each token; return (T, O)."""
    return _multiply(x_RI.contiguous(), w_EOI.contiguous(), counts_E, order_R, inverse_R, slots, False, True)


@op("functional_trainer::grouped_mm", gradient=True)
def _grouped_mm(a: torch.Tensor, b: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """Call `F.grouped_mm` of rows, (R, I) (E, I, O), or along them, (O, R) (R, I): as it is, compilers refuse all but
    bfloat16."""
    return F.grouped_mm(a, b, offs=ends).contiguous()


@torch.library.register_fake("functional_trainer::grouped_mm")
def _(a, b, ends):
    return a.new_empty(*((len(ends), a.shape[0]) if b.ndim == 2 else a.shape[:1]), b.shape[-1])


def _grouped_mm_backward(ctx, grad):
    a, b, ends = ctx.saved_tensors
    grad = grad.contiguous()
    da = _grouped_mm(b, grad.mT, ends).mT if b.ndim == 2 else _grouped_mm(grad, b.mT, ends)
    return da, _grouped_mm(a.mT, grad, ends), None


torch.library.register_autograd(
    "functional_trainer::grouped_mm",
    _grouped_mm_backward,
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)


def _used(counts: torch.Tensor, *rows: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Return where experts' rows end, and rows of which those of no expert are cleared."""
    ends = counts.cumsum(0).to(torch.int32)
    used_R1 = torch.arange(rows[0].shape[0], device=counts.device)[:, None] < ends[-1]
    return ends, *(torch.where(used_R1, x, 0) for x in rows)


def grouped_mm(x_RI: torch.Tensor, w_EOI: torch.Tensor, counts_E: torch.Tensor) -> torch.Tensor:
    """Call `F.grouped_mm` and clear the rows of no expert, which it leaves unwritten in result and gradient."""
    ends, x_RI = _used(counts_E, x_RI)
    return _used(counts_E, _grouped_mm(x_RI, w_EOI.mT, ends))[1]


# g (R, O)^T x (R, I) of each expert's rows, alone: in 8 bits the two gradients have operands of their own --


@op("functional_trainer::grouped_weight_grad")
def weight_grad(grad: torch.Tensor, x: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """Call the vendor's matmul once per expert; return (E, O, I)."""
    dw = x.new_zeros(counts.shape[0], grad.shape[1], x.shape[1])
    for e, start, end, m in spans(counts, x.itemsize):
        more = (0, 0, 0, m - (end - start))
        torch.mm(F.pad(grad[start:end], more).T, F.pad(x[start:end], more), out=dw[e])
    return dw


@torch.library.register_fake("functional_trainer::grouped_weight_grad")
def _(grad, x, counts):
    return x.new_empty(counts.shape[0], grad.shape[1], x.shape[1])


def grouped_weight_grad(grad: torch.Tensor, x: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """Call `F.grouped_mm` of rows of which those of no expert are cleared."""
    ends, grad, x = _used(counts, grad, x)
    return _grouped_mm(grad.mT, x, ends)


def reference_weight_grad(grad: torch.Tensor, x: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """Multiply with every expert's rows marked; any device."""
    expert = torch.searchsorted(counts.cumsum(0), torch.arange(x.shape[0], device=x.device), right=True)
    mine_RE = expert[:, None] == torch.arange(len(counts), device=x.device)
    used_R1 = expert[:, None] < len(counts)
    return torch.einsum("ro,ri,re->eoi", torch.where(used_R1, grad, 0), torch.where(used_R1, x, 0), mine_RE.to(x.dtype))
