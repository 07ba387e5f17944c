"""Differentiable operations: a plain reference each, faster versions behind one table.

`BACKENDS` is the only place that decides which version runs where: for every op the versions by name, the device types
and, of attention, the cases each serves (the first that serves the call is the default) and whether it was measured.
Versions nobody measured are never a default, except where they are the only one that stays on the device.
"""

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch._functorch.config
import torch.nn.functional as F

from kernels import attention as _attention
from kernels import fp8 as _fp8
from kernels import fp8_fused as _fp8_fused
from kernels import fp8_shapes as _fp8_shapes
from kernels import grouped_matmul as _grouped_matmul
from kernels import moe as _moe
from kernels import moe_fused as _moe_fused
from kernels import symmetric as _symmetric
from kernels.elementwise import Activation, promote, rms_norm, rope, rope_sections, swiglu
from kernels.embedding import embedding
from kernels.fp8 import RECIPES, Recipe
from kernels.linear_logprob import combine_vocabulary, linear_logprob, vocabulary_part
from kernels.moe import all_gather

__all__ = [
    "BACKENDS", "EXPENSIVE", "RECIPES", "Activation", "Recipe", "all_gather", "attention", "combine_vocabulary",
    "embedding", "experts", "grouped_matmul", "kept_on_disk", "linear", "linear_logprob", "promote", "rms_norm", "rope",
    "rope_sections", "swiglu", "symmetric_product", "vocabulary_part",
]  # fmt: skip


SOURCE = hashlib.sha256(b"".join(f.read_bytes() for f in sorted(Path(__file__).parent.glob("*.py")))).hexdigest()
"""Fingerprint of the ops. Compilers' caches on disk know their names only, and would call a new one as the old was."""


EXPENSIVE = frozenset({
    "aten::mm", "aten::addmm", "aten::bmm", "functional_trainer::grouped_mm", "functional_trainer::grouped_matmul",
    "functional_trainer::moe", "functional_trainer::fp8_product", "functional_trainer::attention_documents",
    "aten::_scaled_mm", "aten::_scaled_grouped_mm",
    "functional_trainer::fp8_matmul", "functional_trainer::fp8_grouped_matmul",
    "flash_attn::_flash_attn_varlen_forward", "flash_attn_3::_flash_attn_forward", "torch_attn::_varlen_attn",
    "flex_attention",
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
    cases: frozenset[str] = frozenset()  # what else than plain calls it serves


CASES = {
    "cache": "keys that are not the queries' own tokens, a KV cache",
    "window": "a sliding window",
    "sinks": "a learned score of each query head in the softmax's sum",
    "softcap": "scores capped to cap tanh(score / cap)",
    "value_dim": "values of another head dim than queries and keys (MLA)",
    "bidirectional": "queries that see all of their segment",
    "prefix": "blocks of a segment that see themselves whole",
    "parents": "segments that continue another one, several answers to one prompt",
}
"""What a call of attention may ask for beyond packed, causal, grouped-query attention, which every backend serves."""
_VARLEN = frozenset({"window", "value_dim", "bidirectional"})


def _layer(matmul: Callable) -> Callable:
    """Compose an expert layer from a grouped matmul."""
    expand, reduce = (partial(end, matmul=matmul) for end in (_moe.gather_matmul, _moe.matmul_combine))
    return partial(_moe.layer, expand=expand, reduce=reduce)


def _fp8_layer(expand: Callable, reduce: Callable) -> Callable:
    """Compose an expert layer in 8 bits, by a recipe, from its two products."""
    return lambda recipe: partial(
        _moe.layer, expand=partial(expand, recipe=recipe), reduce=partial(reduce, recipe=recipe)
    )


def _fp8_by(products: _fp8.Products) -> Callable:
    """Compose an expert layer in 8 bits from grouped products."""
    return _fp8_layer(*(partial(end, products=products) for end in (_fp8.gather_matmul, _fp8.matmul_combine)))


_fp8_host = _fp8.dequantised(_grouped_matmul.blas, _grouped_matmul.weight_grad)
_fp8_torch = _fp8.dequantised(_grouped_matmul.grouped_mm, _grouped_matmul.grouped_weight_grad)
_fp8_scaled = _fp8.Products(_fp8.scaled_grouped_mm, _grouped_matmul.grouped_weight_grad)
_fp8_reference = _fp8.dequantised(_grouped_matmul.reference, _grouped_matmul.reference_weight_grad)
_host = partial(_moe.layer, expand=_grouped_matmul.gather_matmul, reduce=_grouped_matmul.matmul_combine)

BACKENDS: dict[str, tuple[Backend, ...]] = {
    "attention": (
        Backend("documents", _attention.documents, ("cpu",), ("cpu",), ("cpu",), frozenset(CASES) - {"cache"}),
        Backend("shapes", _attention.shapes, ("meta",), ("meta",), (), frozenset(CASES) - {"cache"}),
        Backend("sdpa_float32", _attention.sdpa_float32, ("cpu",), ("cpu",), ("cpu",), frozenset(CASES) - {"softcap"}),
        Backend("sdpa", _attention.sdpa, ("*",), ("*",), ("cpu",), frozenset(CASES) - {"softcap"}),
        Backend("flash_attn_3", _attention.flash_attn_3, (), ("cuda",), (), _VARLEN | {"softcap"}),
        Backend("flash_attn", _attention.flash_attn, (), ("cuda",), (), _VARLEN | {"softcap"}),
        Backend("varlen", _attention.varlen, (), ("cuda",), (), _VARLEN),
        Backend("flex", _attention.flex, (), ("cuda",), (), frozenset(CASES)),
        Backend("reference", _attention.reference, ("*",), ("*",), ("cpu",), frozenset(CASES)),
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
    "sort": (
        Backend("torch", _moe.sort_by_expert, ("*",), ("*",), ("cpu",)),
        Backend("triton", _moe_fused.sort_by_expert, (), ("cuda",), ()),
    ),
    "fp8_linear": (
        Backend("shapes", partial(_fp8.linear, product=_fp8_shapes.matmul), ("meta",), ("meta",), ()),
        Backend("reference", partial(_fp8.linear, product=_fp8.matmul), ("*",), ("*",), ("cpu",)),
        Backend("scaled_mm", partial(_fp8.linear, product=_fp8.scaled_mm), (), ("cuda", "cpu"), ()),
        Backend("triton", _fp8_fused.linear, (), ("cuda",), ()),
    ),
    "fp8_experts": (
        Backend("blas", _fp8_by(_fp8_host), ("cpu",), ("cpu",), ("cpu",)),
        Backend("shapes", _fp8_by(_fp8_shapes.PRODUCTS), ("meta",), ("meta",), ()),
        Backend("torch", _fp8_by(_fp8_torch), ("cuda",), ("cuda", "cpu"), ()),
        Backend("scaled_mm", _fp8_by(_fp8_scaled), (), ("cuda",), ()),
        Backend("triton", _fp8_layer(_fp8_fused.gather_matmul, _fp8_fused.matmul_combine), (), ("cuda",), ()),
        Backend("reference", _fp8_by(_fp8_reference), ("*",), ("*",), ("cpu",)),
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

_SWIGLU = Activation()


def pick(op: str, device: str, name: str | None = None, needs: tuple[str, ...] = ()) -> Backend:
    """Return the backend called `name`, or the default of this device type, that serves the cases `needs`."""
    on = lambda devices: device in devices or "*" in devices  # noqa: E731
    here = [b for b in BACKENDS[op] if on(b.serves)]
    for backend in here:
        wanted = on(backend.default_on) if name is None else backend.name == name
        if wanted and backend.cases.issuperset(needs):
            return backend
    able = ", ".join(b.name for b in here if b.cases.issuperset(needs))
    if name in [b.name for b in here]:
        served = next(b.cases for b in here if b.name == name)
        lacks = ", ".join(f"{case} ({CASES[case]})" for case in needs if case not in served)
        raise ValueError(f"kernels.{op} backend {name!r} does not serve {lacks}; on {device!r} this call is for {able}")
    raise ValueError(f"kernels.{op} has no backend {name!r} for device {device!r}; it has {able}")


def attention(
    q_BSNH: torch.Tensor,
    k_BTKH: torch.Tensor,
    v_BTKV: torch.Tensor,
    segment_ids_BS: torch.Tensor,
    positions_BS: torch.Tensor,
    key_segment_ids_BT: torch.Tensor | None = None,
    key_positions_BT: torch.Tensor | None = None,
    window: int | None = None,
    scale: float | None = None,
    backend: str | None = None,
    *,
    causal: bool = True,
    softcap: float | None = None,
    sinks_N: torch.Tensor | None = None,
    prefix_BS: torch.Tensor | None = None,
    key_prefix_BT: torch.Tensor | None = None,
    parents_BS: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attend within segments; return (B, S, N, V) in q's dtype. What is seen is at the head of kernels/attention.py.

    Without key segments the keys are the queries' own tokens, packed as the loader packs them (each segment contiguous,
    positions rising by one). With them (a KV cache) any layout goes and a masked backend is used.

    scale     of scores, H^-0.5 by default
    window    keys that a query sees at most, its own among them; to either side if not causal
    causal    False: a query sees all of its segment
    softcap   cap of scores: cap tanh(score / cap)
    sinks_N   floating point, one more score of each query head, with a value of zero
    prefix_BS bool or integer; tokens of a segment with the same nonzero number see each other, whatever their order
    parents_BS integer; the id of the segment that a token's segment continues, 0 for none; one that has none itself

    Raises ValueError if shapes do not fit, if the rule has no meaning, or if `backend` does not serve the case.
    """
    scale = q_BSNH.shape[-1] ** -0.5 if scale is None else scale
    cached = key_segment_ids_BT is not None
    own, keys = (segment_ids_BS, positions_BS, prefix_BS), (key_segment_ids_BT, key_positions_BT, key_prefix_BT)
    segments, positions, prefix = keys if cached else own
    seen = segments, positions, window, causal, prefix_BS, prefix, parents_BS
    rows = _attention.Rows(*own[:2], *seen)  # type: ignore[arg-type]
    _attention.check(q_BSNH, k_BTKH, v_BTKV, rows, keys, softcap, sinks_N)
    asked = {
        "cache": cached, "window": window is not None, "sinks": sinks_N is not None, "softcap": softcap is not None,
        "value_dim": v_BTKV.shape[3] != q_BSNH.shape[3], "bidirectional": not causal, "prefix": prefix_BS is not None,
        "parents": parents_BS is not None,
    }  # fmt: skip
    chosen = pick("attention", q_BSNH.device.type, backend, tuple(case for case, wanted in asked.items() if wanted))
    options: dict = {} if softcap is None else {"softcap": softcap}
    options |= {} if sinks_N is None else {"sinks_N": sinks_N}
    return chosen.fn(q_BSNH, k_BTKH, v_BTKV, rows, scale, **options)


def grouped_matmul(
    x_RI: torch.Tensor, w_EOI: torch.Tensor, counts_E: torch.Tensor, backend: str | None = None
) -> torch.Tensor:
    """Multiply rows sorted by expert with their expert's matrix; rows beyond sum(counts) give zeros. Returns (R, O)."""
    return pick("grouped_matmul", x_RI.device.type, backend).fn(x_RI, w_EOI, counts_E)


def linear(
    x: torch.Tensor, *weights: torch.Tensor, bias: torch.Tensor | None = None, recipe: Recipe | None = None,
    backend: str | None = None,
) -> torch.Tensor:  # fmt: skip
    """Multiply (..., I) with weights (O, I), all in one product; return their outputs one after the other.

    With a recipe the product and both of its gradients are of operands in 8 bits, see `kernels.fp8`.
    """
    if recipe is None:
        return F.linear(x, weights[0] if len(weights) == 1 else torch.cat(weights), bias)
    y = pick("fp8_linear", x.device.type, backend).fn(x, weights, recipe)
    return y if bias is None else y + bias


def experts(
    x_TD: torch.Tensor, weights_TK: torch.Tensor, expert_TK: torch.Tensor, gate_up_E2FD: torch.Tensor,
    down_EDF: torch.Tensor, n_experts: int, group=None, backend: str | None = None, exchange: str | None = None,
    sort: str | None = None, gate_up_bias_E2F: torch.Tensor | None = None, down_bias_ED: torch.Tensor | None = None,
    activation: Activation = _SWIGLU, recipe: Recipe | None = None,
) -> torch.Tensor:  # fmt: skip
    """Apply a dropless mixture of gated MLPs: the sum of each token's K experts, weighted, (T, D).

    A slot's value is weight (down act(gate_up x + gate_up_bias) + down_bias). `expert_TK` holds ids in [0, n_experts],
    n_experts meaning padding. The tensors of experts are this rank's of `group`, or all. `backend` is one of `experts`,
    `sort` one of `sort`, `exchange` one of `exchange`, for experts that the ranks of `group` share. With a recipe
    products are of operands in 8 bits, see `kernels.fp8`, and `backend` is one of `fp8_experts`. Raises ValueError for
    an unknown activation and for biases of other shapes than their weights'.
    """
    activation.check()
    biases = {"gate_up": (gate_up_bias_E2F, gate_up_E2FD.shape[:3]), "down": (down_bias_ED, down_EDF.shape[:2])}
    for name, (bias, shape) in biases.items():
        if bias is not None and bias.shape != shape:
            raise ValueError(f"kernels.experts: the bias of {name} is {tuple(bias.shape)}, not {tuple(shape)}")
    device = x_TD.device.type
    mlp = pick("experts", device, backend).fn if recipe is None else pick("fp8_experts", device, backend).fn(recipe)
    order, travel = (pick(op, device, name).fn for op, name in (("sort", sort), ("exchange", exchange)))
    own = {"gate_up_E2FD": gate_up_E2FD, "down_EDF": down_EDF, "gate_up_bias_E2F": gate_up_bias_E2F}
    mlp, local = partial(mlp, **own, activation=activation), gate_up_E2FD.shape[0]
    return _moe.experts(x_TD, weights_TK, expert_TK, down_bias_ED, n_experts, local, mlp, order, travel, group)


def symmetric_product(
    x: torch.Tensor, add: torch.Tensor | None = None, alpha: float = 1.0, beta: float = 0.0, backend: str | None = None
) -> torch.Tensor:
    """Return alpha X X^T + beta A of matrices X (..., M, C) and symmetric A (..., M, M), in x's dtype."""
    return pick("symmetric_product", x.device.type, backend).fn(x, add, alpha, beta)
