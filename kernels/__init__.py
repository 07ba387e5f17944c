"""Differentiable operations: a plain reference each, faster versions behind one table.

`BACKENDS` is the only place that decides which version runs where: for every op the versions by name, the device types
each serves (the first that serves the tensor's device is the default) and whether it was measured on one. Versions
nobody measured are never a default, except where they are the only one that stays on the device.
"""

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch._functorch.config

from kernels import attention as _attention
from kernels import grouped_matmul as _grouped_matmul
from kernels import moe as _moe
from kernels import moe_fused as _moe_fused
from kernels import symmetric as _symmetric
from kernels.elementwise import promote, rms_norm, rope, swiglu
from kernels.embedding import embedding
from kernels.linear_logprob import combine_vocabulary, linear_logprob, vocabulary_part
from kernels.moe import all_gather

__all__ = [
    "BACKENDS", "EXPENSIVE", "all_gather", "attention", "combine_vocabulary", "embedding", "experts", "grouped_matmul",
    "kept_on_disk", "linear_logprob", "promote", "rms_norm", "rope", "swiglu", "symmetric_product",
    "vocabulary_part",
]  # fmt: skip


SOURCE = hashlib.sha256(b"".join(f.read_bytes() for f in sorted(Path(__file__).parent.glob("*.py")))).hexdigest()
"""Fingerprint of the ops. Compilers' caches on disk know their names only, and would call a new one as the old was."""


EXPENSIVE = frozenset({
    "aten::mm", "aten::addmm", "aten::bmm", "aten::_grouped_mm", "functional_trainer::grouped_matmul",
    "functional_trainer::moe", "functional_trainer::attention_documents",
    "flash_attn::_flash_attn_varlen_forward", "flex_attention",
    "aten::_scaled_dot_product_flash_attention", "aten::_scaled_dot_product_flash_attention_for_cpu",
    "aten::_scaled_dot_product_efficient_attention", "aten::_scaled_dot_product_cudnn_attention",
    "_c10d_functional::all_to_all_single", "aten::topk",
})  # fmt: skip
"""Ops of a layer whose results selective recomputation keeps: products, attention and exchanges, for their cost; the
router's choice, so that recomputed rows are those that the kept products saw, whatever a compiler does to near-ties."""


@contextmanager
def kept_on_disk() -> Iterator[None]:
    """Let the compiler keep graphs on disk under the fingerprint of our ops, those with an autograd.Function too.

    By default it leaves the latter out, and a layer has one; what they compute is traced and so part of a graph's key.
    """
    tag = torch.compiler.config.patch(cache_key_tag=SOURCE)  # type: ignore[attr-defined]
    with tag, torch._functorch.config.patch(autograd_cache_allow_custom_autograd_functions=True):
        yield


class Backend(NamedTuple):
    """One version of an op."""

    name: str
    fn: Callable
    default_on: tuple[str, ...]  # device types on which it is chosen unless another is asked for
    serves: tuple[str, ...]  # device types on which it can run; ("*",) is any
    measured_on: tuple[str, ...]


def _layer(matmul: Callable) -> Callable:
    """Compose an expert layer from a grouped matmul."""
    expand, reduce = (partial(end, matmul=matmul) for end in (_moe.gather_matmul, _moe.matmul_combine))
    return partial(_moe.layer, expand=expand, reduce=reduce)


_host = partial(_moe.layer, expand=_grouped_matmul.gather_matmul, reduce=_grouped_matmul.matmul_combine)

BACKENDS: dict[str, tuple[Backend, ...]] = {
    "attention": (
        Backend("documents", _attention.documents, ("cpu",), ("cpu",), ("cpu",)),
        Backend("shapes", _attention.shapes, ("meta",), ("meta",), ()),
        Backend("sdpa", _attention.sdpa, ("*",), ("*",), ("cpu",)),
        Backend("flash_attn", _attention.flash_attn, (), ("cuda",), ()),
        Backend("flex", _attention.flex, (), ("cuda",), ()),
        Backend("reference", _attention.reference, (), ("*",), ("cpu",)),
    ),
    "grouped_matmul": (
        Backend("blas", _grouped_matmul.blas, ("cpu", "meta"), ("cpu", "meta"), ("cpu",)),
        Backend("torch", _grouped_matmul.grouped_mm, ("cuda",), ("cuda", "cpu"), ()),
        Backend("reference", _grouped_matmul.reference, ("*",), ("*",), ("cpu",)),
    ),
    "experts": (
        Backend("blas", _host, ("cpu", "meta"), ("cpu", "meta"), ("cpu",)),
        Backend("torch", _layer(_grouped_matmul.grouped_mm), ("cuda",), ("cuda", "cpu"), ()),
        Backend("triton", _moe_fused.layer, (), ("cuda",), ()),
        Backend("reference", _layer(_grouped_matmul.reference), ("*",), ("*",), ("cpu",)),
    ),
    "exchange": (
        Backend("exact", _moe.exact, ("*",), ("*",), ("cpu",)),
        Backend("static", _moe.static, (), ("*",), ("cpu",)),
    ),
    "symmetric_product": (
        Backend("torch", _symmetric.product, ("*",), ("*",), ("cpu",)),
        Backend("triton", _symmetric.halves, (), ("cuda",), ()),
    ),
}


def pick(op: str, device: str, name: str | None = None) -> Backend:
    """Return the backend called `name`, or the default of this device type."""
    on = lambda devices: device in devices or "*" in devices  # noqa: E731
    for backend in BACKENDS[op]:
        if backend.name == name and on(backend.serves) or name is None and on(backend.default_on):
            return backend
    able = [b.name for b in BACKENDS[op] if on(b.serves)]
    raise ValueError(f"kernels.{op} has no backend {name!r} for device {device!r}; it has {', '.join(able)}")


def attention(
    q_BSNH: torch.Tensor,
    k_BTKH: torch.Tensor,
    v_BTKH: torch.Tensor,
    segment_ids_BS: torch.Tensor,
    positions_BS: torch.Tensor,
    key_segment_ids_BT: torch.Tensor | None = None,
    key_positions_BT: torch.Tensor | None = None,
    window: int | None = None,
    scale: float | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    """Attend causally within segments; return (B, S, N, H) in q's dtype.

    Without key segments the keys are the queries' own tokens, packed as the loader packs them (each segment contiguous,
    positions rising by one). With them (a KV cache) any layout goes and a masked backend is used.
    """
    scale = q_BSNH.shape[-1] ** -0.5 if scale is None else scale
    cached = key_segment_ids_BT is not None
    chosen = pick("attention", q_BSNH.device.type, "sdpa" if cached and backend is None else backend)
    if chosen.name in ("documents", "flash_attn", "shapes"):
        if cached:
            raise ValueError(f"attention backend {chosen.name!r} cannot serve a KV cache; use 'sdpa' or 'flex'")
        return chosen.fn(q_BSNH, k_BTKH, v_BTKH, segment_ids_BS, window, scale)
    keys = (key_segment_ids_BT, key_positions_BT) if cached else (segment_ids_BS, positions_BS)
    if chosen.name == "flex":
        return chosen.fn(q_BSNH, k_BTKH, v_BTKH, segment_ids_BS, positions_BS, *keys, window, scale)
    return chosen.fn(q_BSNH, k_BTKH, v_BTKH, _attention.mask(segment_ids_BS, positions_BS, *keys, window), scale)


def grouped_matmul(
    x_RI: torch.Tensor, w_EOI: torch.Tensor, counts_E: torch.Tensor, backend: str | None = None
) -> torch.Tensor:
    """Multiply rows sorted by expert with their expert's matrix; rows beyond sum(counts) give zeros. Returns (R, O)."""
    return pick("grouped_matmul", x_RI.device.type, backend).fn(x_RI, w_EOI, counts_E)


def experts(
    x_TD, weights_TK, expert_TK, gate_up_E2FD, down_EDF, n_experts: int, group=None, backend: str | None = None,
    exchange: str | None = None,
) -> torch.Tensor:  # fmt: skip
    """Apply a dropless mixture of SwiGLU experts; see `kernels.moe.experts`.

    `backend` is one of `experts`, `exchange` one of `exchange`, for experts that the ranks of `group` share.
    """
    mlp, travel = pick("experts", x_TD.device.type, backend).fn, pick("exchange", x_TD.device.type, exchange).fn
    return _moe.experts(x_TD, weights_TK, expert_TK, gate_up_E2FD, down_EDF, n_experts, mlp, travel, group)


def symmetric_product(
    x: torch.Tensor, add: torch.Tensor | None = None, alpha: float = 1.0, beta: float = 0.0, backend: str | None = None
) -> torch.Tensor:
    """Return alpha X X^T + beta A of matrices X (..., M, C) and symmetric A (..., M, M), in x's dtype."""
    return pick("symmetric_product", x.device.type, backend).fn(x, add, alpha, beta)
