"""RMSNorm, rotary embedding and gated activations: memory-bound, plain PyTorch, fused by Inductor.

One token of width D reads and writes 2D numbers whatever is computed in between, so a hand-written kernel could only
save what Inductor already saves: none of these has one. `experiments/benchmarks/kernels.py --ops rms_norm add_norm rope
swiglu` times them beside copies of the bytes that must move and beside peers. Compiled on a CPU, norms (by the one
gradient that is written by hand, `Scale`) and rotation are ahead of their peers or level with them, and SwiGLU is the
peers' formula (docs/benchmarks.md, "Ops by themselves"). On a GPU, where liger-kernel's Triton kernels take part,
nothing has been measured. A sum that is then normed needs no function of its own: compiled it is one pass.

All compute in at least float32 and return their input's dtype.

B batch, S sequence, N heads, H head dim, h rotated pairs of a head (H / 2, or fewer), F hidden width.
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


def rms_norm(
    x: torch.Tensor, scale: torch.Tensor, eps: float, offset: float = 0.0, gate: torch.Tensor | None = None
) -> torch.Tensor:
    """Divide (..., D) by its root mean square over D and multiply by `scale` (D,) (https://arxiv.org/abs/1910.07467).

    With `offset` 1 the factor is 1 + scale, and is multiplied before the result is rounded (Gemma, Qwen3-Next). With a
    `gate` (..., D) the result is multiplied by silu(gate) (transformers' `Qwen3NextRMSNormGated`).
    """
    wide = promote(x)
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    y = Scale.apply(wide, promote(scale) + offset).to(x.dtype) if offset else Scale.apply(wide.to(x.dtype), scale)
    return y if gate is None else (y * F.silu(promote(gate))).to(x.dtype)


def rope(x_BSNH: torch.Tensor, cos_BSh: torch.Tensor, sin_BSh: torch.Tensor, interleaved: bool = False) -> torch.Tensor:
    """Rotate pairs of each head by their angles (https://arxiv.org/abs/2104.09864).

    Pairs are (i, i + h), or (2i, 2i + 1) where `interleaved` (GLM-4, DeepSeek). What a head has beyond 2h passes as it
    is (GLM-4, Qwen3-Next: `partial_rotary_factor`).
    """
    cos, sin = cos_BSh[:, :, None], sin_BSh[:, :, None]
    turned, rest = x_BSNH[..., : 2 * cos.shape[-1]], x_BSNH[..., 2 * cos.shape[-1] :]
    a, b = turned.unflatten(-1, (-1, 2)).unbind(-1) if interleaved else turned.chunk(2, -1)
    parts = [a * cos - b * sin, b * cos + a * sin]
    parts = [torch.stack(parts, -1).flatten(-2)] if interleaved else parts
    return torch.cat([*parts, rest] if rest.shape[-1] else parts, -1).to(x_BSNH.dtype)


def rope_sections(table_3BSh: torch.Tensor, sections: tuple[int, int, int], interleaved: bool = False) -> torch.Tensor:
    """Choose cos or sin (B, S, h) from those of a token's time, height and width: `sections` say how many of each.

    Pairs come in three blocks (Qwen2.5-VL's `mrope_section`, https://arxiv.org/abs/2409.12191), or in turns as long as
    height and width last, the rest time's (Qwen3-VL, `interleaved`).
    """
    if sum(sections) != table_3BSh.shape[-1] or len(table_3BSh) != 3:
        shape = tuple(table_3BSh.shape)
        raise ValueError(f"rope sections {sections} need a table of (3, B, S, {sum(sections)}), not of {shape}")
    pair_h, chosen = torch.arange(table_3BSh.shape[-1], device=table_3BSh.device), table_3BSh[0]
    for axis in (1, 2):
        start = sum(sections[:axis])
        blocks = (start <= pair_h) & (pair_h < start + sections[axis])
        turns = (pair_h % 3 == axis) & (pair_h < 3 * sections[axis])
        chosen = torch.where(turns if interleaved else blocks, table_3BSh[axis], chosen)
    return chosen


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
