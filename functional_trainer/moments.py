"""How an optimizer's moments are kept between steps: in any dtype, or in 8 bits a number."""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F

Leaf = dict[str, torch.Tensor]


class Storage(NamedTuple):
    """How a moment is kept between steps: `pack(name, x) -> tensors`, `unpack(name, tensors, like) -> x`."""

    pack: Callable[[str, torch.Tensor], Leaf]
    unpack: Callable[[str, Leaf, torch.Tensor], torch.Tensor]
    whole: bool = False


def stored_as(dtype: torch.dtype | None = None) -> Storage:
    """Keep moments in `dtype` (None: the parameter's own)."""
    return Storage(
        lambda name, x: {name: x if dtype is None else x.to(dtype)}, lambda name, leaf, like: leaf[name].to(like.dtype)
    )


AS_PARAMETERS = stored_as()


def dynamic_code(signed: bool) -> torch.Tensor:
    """Return the 256 values of dynamic 8-bit quantization, rising to 1 (https://arxiv.org/abs/2110.02861).

    Each of seven decades below one has twice the steps of the decade below it. They begin at 0 or, signed, above -1.
    """
    values = [torch.tensor([0.0, 1.0])]
    for i in range(7):
        borders = torch.linspace(0.1, 1, 2 ** (i + (not signed)) + 1)
        decade = 10.0 ** (i - 6) * (borders[1:] + borders[:-1]) / 2
        values += [decade, -decade] if signed else [decade]
    return torch.cat(values).sort().values


def stored_in_8_bits(block: int = 256) -> Storage:
    """Keep moments as one byte a number and one float32 a block of numbers: the block's largest magnitude.

    First moments are signed; a second moment is kept as its root, which halves the decades that it spans.
    """
    codes = {name: dynamic_code(name != "nu") for name in ("mu", "nu")}

    def pack(name: str, x: torch.Tensor) -> Leaf:
        wide = x.sqrt() if name == "nu" else x
        rows = F.pad(wide.flatten(), (0, -x.numel() % block)).view(-1, block).to(torch.float32)
        code = codes[name].to(x.device)
        most = rows.abs().amax(1, keepdim=True)
        nearest = torch.bucketize(rows / most.clamp_min(1e-30), (code[1:] + code[:-1]) / 2)
        return {f"{name}_code": nearest.to(torch.uint8), f"{name}_most": most}

    def unpack(name: str, leaf: Leaf, like: torch.Tensor) -> torch.Tensor:
        rows = codes[name].to(like.device)[leaf[f"{name}_code"].to(torch.int64)] * leaf[f"{name}_most"]
        x = rows.flatten()[: like.numel()].view(like.shape).to(like.dtype)
        return x * x if name == "nu" else x

    return Storage(pack, unpack, whole=True)
