"""RMSNorm, rotary embedding and gated activations: memory-bound, plain PyTorch, fused by Inductor.

One token of width D reads and writes 2D numbers whatever is computed in between, so a hand-written kernel could only
save what Inductor already saves. All three compute in at least float32 and return their input's dtype.

B batch, S sequence, N heads, H head dim, h = H / 2, F hidden width.
"""

import math
from typing import NamedTuple

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


KINDS = "swiglu", "geglu", "clamped_swiglu"


class Activation(NamedTuple):
    """How gate and up become a hidden unit.

    swiglu           silu(gate) up                       (https://arxiv.org/abs/2002.05202)
    geglu            gelu(gate) up, gelu by tanh         (the same)
    clamped_swiglu   g sigmoid(alpha g) (u + 1)          g = min(gate, limit), u = up within [-limit, limit]

    The last is GPT-OSS's (transformers' `GptOssExperts`); the others take no notice of `limit` and `alpha`.
    """

    kind: str = "swiglu"
    limit: float = 7.0
    alpha: float = 1.702

    def __call__(self, gate_up: torch.Tensor) -> torch.Tensor:
        """Map (..., 2F) = [gate, up] to hidden units (..., F)."""
        if self.kind == "swiglu":
            return swiglu(gate_up)
        gate, up = promote(gate_up).chunk(2, -1)
        if self.kind == "geglu":
            return (F.gelu(gate, approximate="tanh") * up).to(gate_up.dtype)
        gate, up = gate.clamp(max=self.limit), up.clamp(-self.limit, self.limit)
        return (gate * torch.sigmoid(self.alpha * gate) * (up + 1)).to(gate_up.dtype)

    def check(self) -> None:
        """Refuse a kind that does not exist."""
        if self.kind not in KINDS:
            raise ValueError(f"activation {self.kind!r} is unknown; these are: {', '.join(KINDS)}")
