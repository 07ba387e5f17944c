"""Grouped matmul: rows sorted by expert, each multiplied by its expert's matrix.

    y[r] = W[e(r)] x[r]      dx[r] = W[e(r)]^T dy[r]      dW[e] = sum over e's rows of dy x^T

FLOPs: 2 R I O forward, 4 R I O backward. Rows beyond sum(counts) belong to no expert: their result and gradient are 0.

Backends: `blas` calls the vendor's matmul once per expert and reads the counts on the host, so it serves the host's own
device; `torch` is `F.grouped_mm`, whose offsets stay on the device.

R rows, E experts, I input width, O output width.
"""

import math

import torch
import torch.nn.functional as F


def reference(x_RI: torch.Tensor, w_EOI: torch.Tensor, counts_E: torch.Tensor) -> torch.Tensor:
    """Multiply every row by every expert and keep the right product; any device, differentiable."""
    E = w_EOI.shape[0]
    expert_R = torch.searchsorted(counts_E.cumsum(0), torch.arange(x_RI.shape[0], device=x_RI.device), right=True)
    mine_RE = expert_R[:, None] == torch.arange(E, device=x_RI.device)
    used_R1 = expert_R[:, None] < E  # cleared on both sides, so that not even a NaN passes through the other rows
    out_RO = torch.einsum("ri,eoi,re->ro", torch.where(used_R1, x_RI, 0), w_EOI, mine_RE.to(x_RI.dtype))
    return torch.where(used_R1, out_RO, 0)


def _spans(counts: torch.Tensor) -> list[tuple[int, int, int]]:
    """List (expert, start, end) of every expert that has rows."""
    ends = counts.cumsum(0).tolist()
    return [(e, a, b) for e, (a, b) in enumerate(zip([0, *ends[:-1]], ends, strict=True)) if b > a]


TILE = 32
"""Rows to which 16-bit products are rounded up: oneDNN compiles and keeps a kernel for every shape it meets, and the
number of an expert's rows is a new one every step."""


def _stop(x: torch.Tensor, start: int, end: int) -> int:
    """Return where a product over rows [start, end) may end, beyond them what the next expert writes over."""
    return end if x.itemsize > 2 else min(start + math.ceil((end - start) / TILE) * TILE, x.shape[0])


def _padded(x: torch.Tensor) -> torch.Tensor:
    """Return 16-bit rows with rows of zeros up to a multiple of the tile."""
    return x if x.itemsize > 2 else F.pad(x, (0, 0, 0, -x.shape[0] % TILE))


@torch.library.custom_op("functional_trainer::grouped_matmul", mutates_args=())
def _blas(x: torch.Tensor, w: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    out, end = x.new_empty(x.shape[0], w.shape[1]), 0
    for e, start, end in _spans(counts):
        stop = _stop(x, start, end)  # what is too much, the next expert writes over
        torch.mm(x[start:stop], w[e].T, out=out[start:stop])
    out[end:] = 0
    return out


@_blas.register_fake
def _(x, w, counts):
    return x.new_empty(x.shape[0], w.shape[1])


@torch.library.custom_op("functional_trainer::grouped_matmul_grad", mutates_args=())
def _blas_grad(
    grad: torch.Tensor, x: torch.Tensor, w: torch.Tensor, counts: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    dx, dw, end = torch.empty_like(x), torch.empty_like(w), 0
    for e in (counts == 0).nonzero()[:, 0].tolist():
        dw[e].zero_()
    for e, start, end in _spans(counts):
        stop = _stop(x, start, end)
        torch.mm(grad[start:stop], w[e], out=dx[start:stop])
        some_grad, some_x = (_padded(t[start:end]) for t in (grad, x))
        torch.mm(some_grad.T, some_x, out=dw[e])
    dx[end:] = 0
    return dx, dw


@_blas_grad.register_fake
def _(grad, x, w, counts):
    return torch.empty_like(x), torch.empty_like(w)


def _setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _backward(ctx, grad):
    return *_blas_grad(grad.contiguous(), *ctx.saved_tensors), None


_blas.register_autograd(_backward, setup_context=_setup)


def blas(x_RI: torch.Tensor, w_EOI: torch.Tensor, counts_E: torch.Tensor) -> torch.Tensor:
    """Call the vendor's matmul once per expert."""
    return _blas(x_RI.contiguous(), w_EOI.contiguous(), counts_E)


def grouped_mm(x_RI: torch.Tensor, w_EOI: torch.Tensor, counts_E: torch.Tensor) -> torch.Tensor:
    """Call `F.grouped_mm` and clear the rows of no expert, which it leaves unwritten in result and gradient."""
    offsets = counts_E.cumsum(0).to(torch.int32)
    used_R1 = torch.arange(x_RI.shape[0], device=x_RI.device)[:, None] < offsets[-1]
    out = F.grouped_mm(torch.where(used_R1, x_RI, 0), w_EOI.mT, offs=offsets)
    return torch.where(used_R1, out, 0)
