"""The cases of gpu_suite.py: every kernel, model and form of the step against references, on any device.

Kernels, forward and gradients, against float64 references on the same (rounded) inputs; models against transformers in
float32 with the same weights, logits and gradients of the loss, transformers made to route as we did (near-ties flip
experts in 16 bit; the note counts the choices that would have differed); the train step compiled by layer, as one
graph, and recomputed in two micro-batches, against the plain one. An error is the larger of the relative 2-norm and the
relative maximum norm.
"""

import contextlib
import dataclasses
import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple
from unittest import mock

from experiments.benchmarks import sft_cpu

TOLERANCE = {"float32": 2e-5, "bfloat16": 2e-2}
TOKENS = {"bos_token_id": None, "eos_token_id": None}  # theirs are beyond a small vocabulary


class Check(NamedTuple):
    """One comparison; it passes if the error is at most the tolerance."""

    what: str
    error: float
    tolerance: float
    note: str = ""


@dataclass(frozen=True)
class At:
    """Where and how a case runs."""

    device: Any
    dtype: str
    small: bool

    def pick(self, small: Any, real: Any) -> Any:
        return small if self.small else real

    @property
    def compiler(self) -> str:
        return self.pick("eager", "inductor")


class Skip(Exception):
    """A case that cannot run here, and why."""


# comparing -----------------------------------------------------------------------------------------------------------


def error(ours: Any, theirs: Any) -> float:
    """Return the larger of the relative 2-norm and the relative maximum norm of the difference."""
    import torch

    a, b = ours.detach().to(torch.float64), theirs.detach().to(torch.float64)
    tiny = 1e-300
    two, most = (a - b).norm() / b.norm().clamp_min(tiny), (a - b).abs().max() / b.abs().max().clamp_min(tiny)
    return max(two.item(), most.item())


def compare(at: At, fn: Callable, reference: Callable, leaves: list[Any], grads: bool = True) -> list[Check]:
    """Compare `fn` in `at.dtype` with `reference` in float64: results, and gradients of a random projection."""
    import torch

    dtype = getattr(torch, at.dtype)
    ours = [x.to(dtype).detach().requires_grad_(grads) for x in leaves]
    wide = [x.detach().to(torch.float64).requires_grad_(grads) for x in ours]
    outs, wants = (r if isinstance(r, tuple) else (r,) for r in (fn(*ours), reference(*wide)))
    pairs = {f"out {i}": pair for i, pair in enumerate(zip(outs, wants, strict=True))}
    if grads:
        along = [torch.randn_like(o) for o in outs]
        got = torch.autograd.grad(outs, ours, along)
        want = torch.autograd.grad(wants, wide, [d.to(torch.float64) for d in along])
        pairs |= {f"grad {i}": pair for i, pair in enumerate(zip(got, want, strict=True))}
    return [Check(what, error(a, b), TOLERANCE[at.dtype]) for what, (a, b) in pairs.items()]


def randn(at: At, *shape: int) -> Any:
    """Draw on the device."""
    import torch

    return torch.randn(shape, device=at.device)


# kernels -------------------------------------------------------------------------------------------------------------


ATTENTION = ("reference", "sdpa", "sdpa_float32", "documents", "flex", "flash_attn", "flash_attn_3", "varlen")
KINDS = ("plain", "cache", "window", "sinks", "softcap", "value_dim", "bidirectional", "prefix", "parents")
PACKAGES = {"flash_attn": "flash_attn", "flash_attn_3": "flash_attn_interface", "varlen": "torch"}
"""Modules of the attention backends that compute in 16 bit only."""


def attention(at: At, name: str, case: str, compiled: bool = False) -> list[Check]:
    """Check one attention backend in one case of `kernels.CASES`, or "plain", on packed rows that end in padding."""
    import torch

    import kernels
    from kernels.attention import Rows, reference

    backend = next(b for b in kernels.BACKENDS["attention"] if b.name == name)
    here = at.device.type in backend.serves or "*" in backend.serves
    if not here and name != "flex":
        raise Skip(f"serves {', '.join(backend.serves)}")
    if case not in {"plain", *backend.cases}:
        raise Skip(f"does not serve {case}")
    if name in PACKAGES and (importlib.util.find_spec(PACKAGES[name]) is None or at.dtype == "float32"):
        raise Skip(f"needs {PACKAGES[name]} and 16 bit")
    B, S, N, K, H = at.pick((2, 40, 6, 2, 16), (2, 1024, 32, 4, 128))
    batch = sft_cpu.packed_batch(B, S, 99, seed=1, shortest=at.pick(3, 100))
    segments, positions = (batch[k].to(at.device) for k in ("segment_ids", "positions"))
    segments[-1, -S // 4 :], positions[-1, -S // 4 :] = 0, 0
    period = at.pick(5, 90)
    blocks = (positions % period < period // 2) * (1 + positions // period) if case == "prefix" else None
    parents = (segments > 1).to(segments.dtype) if case == "parents" else None  # all continue the first of their row
    positions = positions if parents is None else positions + parents * (segments == 1).sum(1, keepdim=True)
    first = 3 * S // 8 if case == "cache" else 0  # of the queries; their keys are all tokens
    rows = Rows(
        segments[:, first:], positions[:, first:], segments, positions, 7 if case == "window" else None,
        case != "bidirectional", blocks, blocks, parents,
    )  # fmt: skip
    real, scale = (rows.segments_BS != 0)[..., None, None], H**-0.5
    options: dict[str, Any] = {"softcap": 2.0} if case == "softcap" else {}

    def ours(q, k, v, *sinks):
        given = options | ({"sinks_N": sinks[0]} if sinks else {})
        if name == "flex":  # the table refuses it on the CPU, where it has no backward
            return backend.fn(q, k, v, rows, scale, **given) * real
        given |= {"causal": rows.causal, "prefix_BS": blocks, "parents_BS": parents, "window": rows.window}
        given |= {"scale": scale, "backend": name}
        if case == "cache":
            given |= {"key_segment_ids_BT": segments, "key_positions_BT": positions}
        return kernels.attention(q, k, v, rows.segments_BS, rows.positions_BS, **given) * real

    wide = at.pick(24, 192) if case == "value_dim" else H
    leaves = [randn(at, B, S - first, N, wide), randn(at, B, S, K, wide), randn(at, B, S, K, H)]
    leaves += [randn(at, N)] if case == "sinks" else []
    torch.compiler.reset()  # FlexAttention compiles in any case, and past a limit of times no more
    run = torch.compile(ours, fullgraph=True, backend=at.compiler) if compiled else ours
    exact = lambda q, k, v, *s: reference(q, k, v, rows, scale, **options, sinks_N=s[0] if s else None) * real  # noqa: E731
    return compare(at, run, exact, leaves, grads=here)


def grouped_matmul(at: At, name: str) -> list[Check]:
    """Check one grouped matmul backend, with an expert without rows and rows without an expert."""
    import torch

    import kernels
    from kernels.grouped_matmul import reference

    backend = next(b for b in kernels.BACKENDS["grouped_matmul"] if b.name == name)
    if at.device.type not in backend.serves and "*" not in backend.serves:
        raise Skip(f"serves {', '.join(backend.serves)}")
    E, inner, outer = at.pick((5, 24, 40), (16, 2048, 1536))
    counts = torch.arange(E, device=at.device) * at.pick(3, 37)
    leaves = [randn(at, int(counts.sum()) + 7, inner), randn(at, E, outer, inner)]
    ours = lambda x, w: kernels.grouped_matmul(x, w, counts, backend=name)  # noqa: E731
    return compare(at, ours, lambda x, w: reference(x, w, counts), leaves)


def routing(at: At, skew: str, T: int, E: int, K: int) -> Any:
    """Draw K experts a token, the last tokens padding: balanced, skewed (half of the tokens to one of the first K
    experts and others) or extreme, all to the first K.
    """
    import torch

    scores = torch.rand(T, E, device=at.device)
    scores[: {"balanced": 0, "skewed": T // 2, "extreme": T}[skew], :K] += 1
    ids = scores.topk(K).indices
    ids[-3:] = E
    return ids


def replayed(at: At, fn: Callable, ids: Any, experts: int) -> Callable:
    """Return a function compiled into device graphs that are recorded while experts are chosen otherwise."""
    import torch

    torch.compiler.reset()
    run = torch.compile(fn, fullgraph=True, dynamic=False, **at.pick({"backend": "eager"}, {"mode": "reduce-overhead"}))

    def call(*leaves: Any) -> Any:
        chosen, seen = ids.clone(), torch._dynamo.utils.counters["inductor"]
        before = seen["cudagraph_skips"]
        for _ in range(3):  # run, recorded, replayed
            ids.copy_(routing(at, "balanced", ids.shape[0], experts, ids.shape[1]))
            out = run(*leaves)
            torch.autograd.grad(out, leaves, torch.ones_like(out))
        if seen["cudagraph_skips"] > before:
            raise RuntimeError("Inductor recorded no graph; TORCH_LOGS=cudagraphs says why")
        ids.copy_(chosen)
        return run(*leaves)

    return call


def experts(at: At, name: str, skew: str, kind: str = "swiglu", graph: bool = False) -> list[Check]:
    """Check an expert layer against a loop over all experts; the clamped activation comes with biases, as GPT-OSS's.

    The limit is one that nothing reaches in 16 bit: at a limit gradients jump, and a rounding decides.
    """
    import torch
    import torch.nn.functional as F

    import kernels

    backend = next(b for b in kernels.BACKENDS["experts"] if b.name == name)
    if at.device.type not in backend.serves and "*" not in backend.serves:
        raise Skip(f"serves {', '.join(backend.serves)}")
    T, D, E, K, hidden = at.pick((30, 24, 5, 2, 16), (512, 2048, 128, 8, 768))
    ids, limit = routing(at, skew, T, E, K), 0.7 if at.dtype == "float32" else 50.0
    activation = kernels.Activation(kind, limit)

    def hidden_units(gate, up):
        if kind == "clamped_swiglu":
            gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
            return gate * torch.sigmoid(1.702 * gate) * (up + 1)
        return (F.silu(gate) if kind == "swiglu" else F.gelu(gate, approximate="tanh")) * up

    def reference(x, w, gate_up, down, *biases):
        y = torch.zeros_like(x)
        for e in range(E):
            gate, up = (x @ part.T + (biases[0][e, i] if biases else 0) for i, part in enumerate(gate_up[e]))
            out = hidden_units(gate, up) @ down[e].T + (biases[1][e] if biases else 0)
            y = y + ((ids == e) * w).sum(1)[:, None] * out
        return y

    def ours(x, w, gate_up, down, first=None, last=None):
        options = {"gate_up_bias_E2F": first, "down_bias_ED": last, "activation": activation, "backend": name}
        return kernels.experts(x, w, ids, gate_up, down, E, **options)

    shapes = (T, D), (T, K), (E, 2, hidden, D), (E, D, hidden), *((E, 2, hidden), (E, D))[: 2 * (kind[0] == "c")]
    run = replayed(at, ours, ids, E) if graph else ours
    return compare(at, run, reference, [randn(at, *shape) * shape[-1] ** -0.5 for shape in shapes])


def sort(at: At, name: str, skew: str) -> list[Check]:
    """Check that slots are sorted as PyTorch's stable sort does, on the host."""
    import torch

    import kernels

    backend = next(b for b in kernels.BACKENDS["sort"] if b.name == name)
    if at.device.type not in backend.serves and "*" not in backend.serves:
        raise Skip(f"serves {', '.join(backend.serves)}")
    T, E, K = at.pick((30, 5, 2), (32768, 512, 8))
    ids = routing(at, skew, T, E, K)
    order, inverse, counts = (t.cpu() for t in backend.fn(ids, E))
    wanted = ids.flatten().cpu().sort(stable=True).indices
    right = torch.equal(order, wanted) and torch.equal(inverse[order], torch.arange(T * K))
    right = right and torch.equal(counts, torch.bincount(ids.flatten().cpu(), minlength=E + 1)[:E])
    return [Check("order", 0.0 if right else 1.0, 0.0)]


def eight_bits(at: At, op: str, name: str, recipe: str) -> list[Check]:
    """Check products in 8 bits against their emulation in float64, which quantises the same operands.

    Of experts the second product's operand is what the dtype made of the first: where that is near a tie in e4m3 it may
    be off by a step, an eighth of itself. Tensor cores sum 128 products of 8 bits with 14 bits of the largest.
    """
    import torch

    import kernels

    backend, how = next(b for b in kernels.BACKENDS[op] if b.name == name), kernels.RECIPES[recipe]
    if at.device.type not in backend.serves and "*" not in backend.serves:
        raise Skip(f"serves {', '.join(backend.serves)}")
    if op == "fp8_linear":
        T, inner, outer = at.pick((48, 80, 32), (1024, 2048, 1536))
        ours, wanted = (partial(kernels.linear, recipe=how, backend=b) for b in (name, "reference"))
        found = compare(at, ours, wanted, [randn(at, T, inner), randn(at, outer, inner)])
        return [c._replace(tolerance=max(c.tolerance, 2e-3)) for c in found] if name == "triton" else found
    T, D, E, K, hidden = at.pick((30, 32, 5, 2, 48), (512, 2048, 16, 4, 768))
    ids = torch.rand(T, E, device=at.device).topk(K).indices
    ids[-3:] = E
    leaves = [randn(at, *shape) * shape[-1] ** -0.5 for shape in ((T, D), (T, K), (E, 2, hidden, D), (E, D, hidden))]

    def call(x, w, gate_up, down, backend):
        return kernels.experts(x, w, ids, gate_up, down, E, backend=backend, recipe=how)

    found = compare(at, partial(call, backend=name), partial(call, backend="reference"), leaves)
    return [c._replace(tolerance={"float32": 0.02, "bfloat16": 0.13}[at.dtype]) for c in found]


def linear_logprob(at: At, plain: bool) -> list[Check]:
    """Check log-probability and entropy, plain or with bias, soft cap, temperature and a mask."""
    import torch

    import kernels
    from kernels.linear_logprob import reference

    T, D, V = at.pick((30, 24, 97), (1024, 2048, 151936))
    targets = torch.randint(0, V, (T,), device=at.device)
    leaves = [randn(at, T, D), randn(at, V, D) * D**-0.5]
    options: dict[str, Any] = {} if plain else {"softcap": 5.0, "temperature": 0.7}
    leaves += [] if plain else [randn(at, V)]

    mask = None if plain else targets % 3 > 0

    def ours(h, w, bias=None):
        return kernels.linear_logprob(h, w, targets, bias, **options, mask=mask)

    def wanted(h, w, *bias):
        results = reference(h, w, targets, *bias, **options)
        return results if mask is None else tuple(x * mask for x in results)

    return compare(at, ours, wanted, leaves)


def elementwise(at: At, compiled: bool) -> list[Check]:
    """Check embedding, RMSNorm, rotary embedding and SwiGLU against other ways to compute them."""
    import torch

    import kernels

    B, S, N, H = at.pick((2, 9, 3, 16), (2, 512, 32, 128))
    tokens = torch.randint(0, 7, (B, S), device=at.device)
    angle = torch.rand(B, S, H // 2, device=at.device, dtype=torch.float64)
    turn = torch.polar(torch.ones_like(angle), angle)[:, :, None]

    def turned(x):  # pairs (i, i + h) as complex numbers
        z = torch.complex(*x.chunk(2, -1)) * turn
        return torch.cat([z.real, z.imag], -1)

    def turned_part(x):  # neighbours of the first half of a head
        z = torch.view_as_complex(x[..., : H // 2].unflatten(-1, (-1, 2))) * turn[..., : H // 4]
        return torch.cat([torch.view_as_real(z).flatten(-2), x[..., H // 2 :]], -1)

    def rotate(x, h, interleaved):
        angle_in = angle[..., :h].to(torch.promote_types(x.dtype, torch.float32))
        return kernels.rope(x, angle_in.cos(), angle_in.sin(), interleaved)

    def normed(x, scale):
        return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * scale

    def gated(x):
        gate, up = x.tensor_split(2, -1)
        return gate * torch.sigmoid(gate) * up

    rows = [randn(at, B, S, H), randn(at, H)]
    pairs: dict[str, tuple[Callable, Callable, list[Any]]] = {
        "embedding": (lambda w: kernels.embedding(w, tokens), lambda w: w[tokens], [randn(at, 7, H)]),
        "rms_norm": (lambda x, w: kernels.rms_norm(x, w, 1e-6), normed, rows),
        "rms_norm_offset": (lambda x, w: kernels.rms_norm(x, w, 1e-6, 1.0), lambda x, w: normed(x, 1 + w), rows),
        "rms_norm_gated": (
            lambda x, w, gate: kernels.rms_norm(x, w, 1e-6, gate=gate),
            lambda x, w, gate: normed(x, w) * gate * torch.sigmoid(gate),
            [*rows, randn(at, B, S, H)],
        ),
        "rope": (partial(rotate, h=H // 2, interleaved=False), turned, [randn(at, B, S, N, H)]),
        "rope_part": (partial(rotate, h=H // 4, interleaved=True), turned_part, [randn(at, B, S, N, H)]),
        "swiglu": (kernels.swiglu, gated, [randn(at, B, S, 2 * H)]),
    }
    return [
        c._replace(what=f"{name} {c.what}")
        for name, (ours, reference, leaves) in pairs.items()
        for c in compare(at, torch.compile(ours, backend=at.compiler) if compiled else ours, reference, leaves)
    ]


# models --------------------------------------------------------------------------------------------------------------


def hf_config(at: At, family: str) -> dict[str, Any]:
    """Return a config of a few layers, as a Hugging Face dict."""
    import models

    name = {"qwen3": "dense-0.6b", "qwen3_moe": "30b-a3b"}[family]
    sizes = at.pick(
        {"hidden_size": 40, "head_dim": 16, "num_attention_heads": 6, "num_key_value_heads": 2, "intermediate_size": 56,
         "moe_intermediate_size": 24, "num_experts": 5, "num_experts_per_tok": 2, "vocab_size": 97},
        {"hidden_size": 1024, "num_experts": 32, "num_experts_per_tok": 4, "vocab_size": 4096},
    )  # fmt: skip
    keys = set(models.PRESETS[name])
    return models.PRESETS[name] | {k: v for k, v in sizes.items() if k in keys} | {"num_hidden_layers": 2, **TOKENS}


def prepared(at: At, family: str) -> tuple[Any, Any, dict[str, Any]]:
    """Return a model that computes in `at.dtype`, float32 parameters rounded to it, and a batch."""
    import torch

    import models
    from functional_trainer import tree

    model, dtype = models.from_config(hf_config(at, family)), getattr(torch, at.dtype)
    params = tree.map(lambda w: w.to(dtype).to(torch.float32), model.init(0, device=at.device))
    batch = sft_cpu.packed_batch(2, at.pick(40, 512), model.config.vocab, seed=2, shortest=4)
    model = dataclasses.replace(model, dtype=None if at.dtype == "float32" else dtype)
    return model, params, {k: v.to(at.device) for k, v in batch.items()}


def our_side(model: Any, params: Any, batch: dict[str, Any]) -> tuple[Any, dict[str, Any], list[Any]]:
    """Return logits (B, S, V), gradients of the loss by path, and the expert ids of each routed layer."""
    import torch

    import kernels
    from functional_trainer import losses, tree
    from functional_trainer.types import ONE_DEVICE

    ids: list[Any] = []
    experts = kernels.experts

    def record(x, weights, expert_TK, *rest, **options):
        ids.append(expert_TK)
        return experts(x, weights, expert_TK, *rest, **options)

    params = tree.map(lambda w: w.detach().requires_grad_(), params)
    with mock.patch.object(kernels, "experts", record):
        output, unembed = model.apply(params, batch), model.unembed(params)
    sums, _ = losses.sft("none").terms(output, unembed, batch, ONE_DEVICE)
    leaves = tree.flatten(params)
    grads = torch.autograd.grad(sums["nll"] / batch["weights"].sum(), list(leaves.values()))
    return output.hidden @ unembed.weight.T, dict(zip(leaves, grads, strict=True)), ids


@contextlib.contextmanager
def routed(module: Any, ids: list[Any], force: bool, flips: list[int]) -> Iterator[None]:
    """Count the tokens that transformers' routers send elsewhere than `ids`; with `force` send them there."""
    import torch

    gates = [m for m in module.modules() if type(m).__name__.endswith("TopKRouter")]

    def hook(gate, _, out, at):
        logits, scores, chosen = out
        flips.append(int((chosen.sort(-1).values != at.sort(-1).values).any(-1).sum()))
        if not force:
            return out
        top = logits.softmax(-1, dtype=torch.float32).gather(-1, at)
        top = top / top.sum(-1, keepdim=True) if gate.norm_topk_prob else top
        return logits, top.to(scores.dtype), at

    handles = [g.register_forward_hook(partial(hook, at=i)) for g, i in zip(gates, ids, strict=True)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def parity(at: At, family: str) -> list[Check]:
    """Check logits and gradients of a model against transformers in float32, routed alike."""
    import torch

    from functional_trainer import hf

    model, params, batch = prepared(at, family)
    logits, grads, ids = our_side(model, params, batch)
    module = sft_cpu.hf_module(model, torch.float32, at.device, params, attn_implementation="sdpa")
    if ids:
        module.set_experts_implementation("eager")
    inputs = sft_cpu.hf_inputs(batch)
    flips: list[int] = []
    with torch.no_grad(), routed(module, ids, False, flips):
        module(**inputs)
    with routed(module, ids, True, []):
        out = module(**inputs)
    out.loss.backward()
    slots = hf.expand(model.specs, model.names[-1])
    pairs = {k: (grads[s.path][s.index].view(s.shape), module.get_parameter(k).grad) for k, s in slots.items()}
    ours, theirs = (torch.cat([pair[i].flatten() for pair in pairs.values()]) for i in (0, 1))
    each = {k: error(a, b) for k, (a, b) in pairs.items()}
    worst = max(each, key=lambda k: each[k])
    tolerance = {"float32": 1e-5, "bfloat16": 3e-2}[at.dtype]
    note = f"{sum(flips)} of {len(ids) * batch['tokens'].numel()} choices would differ" if ids else ""
    return [
        Check("logits", error(logits, out.logits), tolerance, note),
        Check("gradient", ((ours - theirs).norm() / theirs.norm()).item(), 2 * tolerance),
        Check("worst leaf", each[worst], 5 * tolerance, worst),
    ]


def step_forms(at: At, form: str) -> list[Check]:
    """Check three train steps in one form against the plain form: losses and gradient norms."""
    import torch

    from functional_trainer import init_state, losses, make_train_step, optimizers

    if at.small and at.dtype != "float32":
        raise Skip("one dtype is enough at small sizes")
    forms: dict[str, dict[str, Any]] = {
        "off": {},
        "layer": {"compile": "layer", "backend": at.compiler},
        "step": {"compile": "step", "backend": at.compiler},
        "remat": {"remat": "layer", "micro_batches": 2},
        "selective": {"remat": "selective", "micro_batches": 2},
    }
    adamw = optimizers.adamw(optimizers.schedule("constant", 1e-4, 1))
    seen = {}
    for name in ("off", form):
        model, params, batch = prepared(at, "qwen3_moe")
        step = make_train_step(model, losses.sft(), adamw, **forms[name])
        state = init_state(params, adamw)
        metrics = [step(state, batch)[1] for _ in range(3)]
        seen[name] = {k: torch.stack([m[k].detach() for m in metrics]) for k in ("loss", "grad_norm")}
    tolerance = {"float32": 2e-5, "bfloat16": 1e-2}[at.dtype]
    wide = {"loss": tolerance, "grad_norm": 5 * tolerance}  # near-ties may flip experts between forms
    return [Check(k, error(seen[form][k], seen["off"][k]), wide[k]) for k in wide]


EIGHT = {"fp8_linear": ("reference", "scaled_mm", "triton"), "fp8_experts": ("blas", "torch", "scaled_mm", "triton")}
CASES: dict[str, Callable[[At], list[Check]]] = {
    **{f"attention {name} {case}": partial(attention, name=name, case=case) for name in ATTENTION for case in KINDS},
    **{f"attention flex {case}, compiled": partial(attention, name="flex", case=case, compiled=True) for case in KINDS},
    **{f"grouped_matmul {name}": partial(grouped_matmul, name=name) for name in ("reference", "blas", "torch")},
    **{
        f"experts {name}, {skew}": partial(experts, name=name, skew=skew)
        for name in ("blas", "torch", "triton")
        for skew in ("balanced", "skewed", "extreme")
    },
    **{
        f"experts {name}, {kind}": partial(experts, name=name, skew="skewed", kind=kind)
        for name in ("blas", "torch", "triton")
        for kind in ("geglu", "clamped_swiglu")
    },
    **{
        f"experts {name}, replayed": partial(experts, name=name, skew="skewed", graph=True)
        for name in ("blas", "torch", "triton")
    },
    **{
        f"sort {name}, {skew}": partial(sort, name=name, skew=skew)
        for name in ("torch", "triton")
        for skew in ("balanced", "skewed", "extreme")
    },
    **{
        f"{op} {name}, {recipe}": partial(eight_bits, op=op, name=name, recipe=recipe)
        for op, names in EIGHT.items()
        for name in names
        for recipe in ("tile", "row")
        if (name, recipe) != ("triton", "row")
    },
    "linear_logprob": partial(linear_logprob, plain=True),
    "linear_logprob bias softcap temperature mask": partial(linear_logprob, plain=False),
    "elementwise": partial(elementwise, compiled=False),
    "elementwise compiled": partial(elementwise, compiled=True),
    **{f"model {family}": partial(parity, family=family) for family in ("qwen3", "qwen3_moe")},
    **{f"step {form}": partial(step_forms, form=form) for form in ("layer", "step", "remat", "selective")},
}
