"""RMSNorm, rotary embedding and SwiGLU: memory-bound, plain PyTorch, fused by Inductor.

One token of width D reads and writes 2D numbers whatever is computed in between, so a hand-written kernel could only
save what Inductor already saves. All three compute in at least float32 and return their input's dtype.

B batch, S sequence, N heads, H head dim, h = H / 2, F hidden width.
"""

import math

import torch
import torch.nn.functional as F


def promote(x: torch.Tensor) -> torch.Tensor:
    """Raise 16-bit tensors to float32; float32 and float64 stay what they are."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class Scale(torch.autograd.Function):
    """Multiply (..., D) by `scale` (D,); its gradient is summed over up to 32 rows first, over those sums then.

    Summed over all rows at once, as Inductor does on the host, a column at a time would run through all of memory.
    """

    @staticmethod
    def forward(ctx, x, scale):
        ctx.save_for_backward(x, scale)
        return x * scale

    @staticmethod
    def backward(ctx, grad):
        x, scale = ctx.saved_tensors
        products = promote(grad * x)
        if x.ndim > 1:
            products = products.unflatten(-2, (-1, math.gcd(x.shape[-2], 32))).sum(-2)
            products = products.sum(tuple(range(products.ndim - 1)))
        return grad * scale, products.to(scale.dtype)


def rms_norm(x: torch.Tensor, scale: torch.Tensor, eps: float) -> torch.Tensor:
    """Divide (..., D) by its root mean square over D and multiply by `scale` (D,) (https://arxiv.org/abs/1910.07467)."""
    wide = promote(x)
    return Scale.apply((wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype), scale)


def rope(x_BSNH: torch.Tensor, cos_BSh: torch.Tensor, sin_BSh: torch.Tensor) -> torch.Tensor:
    """Rotate the pairs (i, i + h) of each head by its angle (https://arxiv.org/abs/2104.09864, half-split form)."""
    cos, sin = cos_BSh[:, :, None], sin_BSh[:, :, None]
    a, b = x_BSNH.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(x_BSNH.dtype)


def swiglu(gate_up: torch.Tensor) -> torch.Tensor:
    """Map (..., 2F) = [gate, up] to silu(gate) * up (..., F) (https://arxiv.org/abs/2002.05202)."""
    gate, up = gate_up.chunk(2, -1)
    return F.silu(gate) * up
