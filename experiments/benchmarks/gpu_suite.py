"""Check every kernel and both models on a device against references, then measure training speed there.

    python experiments/benchmarks/gpu_suite.py                            # checks, then speed
    python experiments/benchmarks/gpu_suite.py --what check --only 'attention *'
    python experiments/benchmarks/gpu_suite.py --device cpu               # every case at small sizes: it still runs

Checks. Kernels, forward and gradients, against float64 references on the same (rounded) inputs; models against
transformers in float32 with the same weights, logits and gradients of the loss, transformers made to route as we did
(near-ties flip experts in 16 bit; the note counts the choices that would have differed); the train step compiled by
layer, as one graph, and recomputed in two micro-batches, against the plain one. An error is the larger of the relative
2-norm and the relative maximum norm. Cases run in a process of their own; after a fault of the device, in a new one.

Speed. Qwen3-30B-A3B at its real widths (128 experts, top-8), as deep as AdamW leaves room for, random weights, packed
documents. Contestants are processes that hold no device memory while another runs; a round builds, warms up and times
each of them. `ours` keeps float32 masters and moments, `-bf16` and transformers keep bfloat16 ones.

Exit status 1 if a check failed or a contestant broke.
"""

import contextlib
import dataclasses
import gc
import importlib.util
import json
import math
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # run from the clone without installing

from rich.console import Console
from rich.table import Table

from experiments.benchmarks import sft_cpu
from functional_trainer import config

CASE_SECONDS = 400
TOLERANCE = {"float32": 2e-5, "bfloat16": 2e-2}
TOKENS = {"bos_token_id": None, "eos_token_id": None}  # theirs are beyond a small vocabulary
GIB = 2**30


@dataclass(frozen=True)
class Options:
    device: str = "auto"
    """Device to check: a GPU at real sizes, the CPU at small ones."""
    what: Literal["all", "check", "speed"] = "all"
    """What to do."""
    only: tuple[str, ...] = ()
    """Cases and contestants by name, with wildcards ("attention *"); none means all."""
    layers: int = 0
    """Depth of the model that is timed (0: as many layers as fit)."""
    rows: int = 2
    """Rows of 4096 tokens a timed step."""
    rounds: int = 3
    """Times each contestant is built and timed."""
    steps: int = 5
    """Timed steps a round, after two untimed ones."""
    json: Path | None = None
    """Also write the results here."""


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


def attention(at: At, name: str, window: int | None, compiled: bool = False) -> list[Check]:
    """Check one attention backend on packed rows that end in padding."""
    import torch

    import kernels
    from kernels.attention import mask, reference

    backend = next(b for b in kernels.BACKENDS["attention"] if b.name == name)
    here = at.device.type in backend.serves or "*" in backend.serves
    if name == "flash_attn" and (importlib.util.find_spec(name) is None or at.dtype == "float32" or not here):
        raise Skip("needs the flash-attn package, a GPU and 16 bit")
    if not here and name != "flex":
        raise Skip(f"serves {', '.join(backend.serves)}")
    B, S, N, K, H = at.pick((2, 40, 6, 2, 16), (2, 1024, 32, 4, 128))
    batch = sft_cpu.packed_batch(B, S, 99, seed=1, shortest=at.pick(3, 100))
    segments, positions = (batch[k].to(at.device) for k in ("segment_ids", "positions"))
    segments[-1, -S // 4 :], positions[-1, -S // 4 :] = 0, 0
    real = (segments != 0)[..., None, None]
    seen, scale = mask(segments, positions, segments, positions, window), H**-0.5

    def ours(q, k, v):
        if name == "flex":  # the table refuses it on the CPU, where it has no backward
            out = backend.fn(q, k, v, segments, positions, segments, positions, window, scale)
        else:
            out = kernels.attention(q, k, v, segments, positions, window=window, backend=name)
        return out * real

    leaves = [randn(at, B, S, heads, H) for heads in (N, K, K)]
    run = torch.compile(ours, backend=at.compiler) if compiled else ours
    return compare(at, run, lambda q, k, v: reference(q, k, v, seen, scale) * real, leaves, grads=here)


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


def experts(at: At) -> list[Check]:
    """Check the routed experts against a loop over all of them, padding tokens among the tokens."""
    import torch
    import torch.nn.functional as F

    import kernels

    T, D, E, K, hidden = at.pick((30, 24, 5, 2, 16), (512, 2048, 128, 8, 768))
    ids = torch.rand(T, E, device=at.device).topk(K).indices
    ids[-3:] = E

    def reference(x, w, gate_up, down):
        y = torch.zeros_like(x)
        for e in range(E):
            gate, up = (x @ part.T for part in gate_up[e])
            y = y + ((ids == e) * w).sum(1)[:, None] * ((F.silu(gate) * up) @ down[e].T)
        return y

    leaves = [randn(at, *shape) * shape[-1] ** -0.5 for shape in ((T, D), (T, K), (E, 2, hidden, D), (E, D, hidden))]
    return compare(at, lambda x, w, g, d: kernels.experts(x, w, ids, g, d, E), reference, leaves)


def linear_logprob(at: At, plain: bool) -> list[Check]:
    """Check log-probability and entropy, plain or with bias, soft cap and temperature."""
    import torch

    import kernels
    from kernels.linear_logprob import reference

    T, D, V = at.pick((30, 24, 97), (1024, 2048, 151936))
    targets = torch.randint(0, V, (T,), device=at.device)
    leaves = [randn(at, T, D), randn(at, V, D) * D**-0.5]
    options: dict[str, Any] = {} if plain else {"softcap": 5.0, "temperature": 0.7}
    leaves += [] if plain else [randn(at, V)]

    def ours(h, w, *bias):
        return kernels.linear_logprob(h, w, targets, *bias, **options)

    return compare(at, ours, lambda h, w, *bias: reference(h, w, targets, *bias, **options), leaves)


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

    def rotate(x):
        angle_in = angle.to(torch.promote_types(x.dtype, torch.float32))
        return kernels.rope(x, angle_in.cos(), angle_in.sin())

    def normed(x, scale):
        return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * scale

    def gated(x):
        gate, up = x.tensor_split(2, -1)
        return gate * torch.sigmoid(gate) * up

    pairs: dict[str, tuple[Callable, Callable, list[Any]]] = {
        "embedding": (lambda w: kernels.embedding(w, tokens), lambda w: w[tokens], [randn(at, 7, H)]),
        "rms_norm": (lambda x, w: kernels.rms_norm(x, w, 1e-6), normed, [randn(at, B, S, H), randn(at, H)]),
        "rope": (rotate, turned, [randn(at, B, S, N, H)]),
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

    def record(x, weights, expert_TK, *rest):
        ids.append(expert_TK)
        return experts(x, weights, expert_TK, *rest)

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


CASES: dict[str, Callable[[At], list[Check]]] = {
    **{
        f"attention {name}{' window' * bool(window)}": partial(attention, name=name, window=window)
        for name in ("reference", "sdpa", "documents", "flex", "flash_attn")
        for window in (None, 7)
    },
    "attention flex compiled": partial(attention, name="flex", window=None, compiled=True),
    **{f"grouped_matmul {name}": partial(grouped_matmul, name=name) for name in ("reference", "blas", "torch")},
    "experts": experts,
    "linear_logprob": partial(linear_logprob, plain=True),
    "linear_logprob bias softcap temperature": partial(linear_logprob, plain=False),
    "elementwise": partial(elementwise, compiled=False),
    "elementwise compiled": partial(elementwise, compiled=True),
    **{f"model {family}": partial(parity, family=family) for family in ("qwen3", "qwen3_moe")},
    **{f"step {form}": partial(step_forms, form=form) for form in ("layer", "step", "remat")},
}


# speed ---------------------------------------------------------------------------------------------------------------


def timed_config(layers: int, small: bool) -> dict[str, Any]:
    """Return Qwen3-30B-A3B at some depth, or at the CPU small in every way."""
    import models

    return models.PRESETS["tiny" if small else "30b-a3b"] | {"num_hidden_layers": layers, **TOKENS}


def layers_that_fit(device: Any, tokens: int) -> int:
    """Return the depth that free memory has room for: 18 bytes a parameter, activations, logits, a leaf's update."""
    import torch

    import models

    one, two = (models.from_config(timed_config(n, False)) for n in (1, 2))
    layer = models.count(two) - models.count(one)
    fixed = models.count(one) - layer
    c = one.config
    # bfloat16 kept for backward: routed rows (in, gate, up, product, out) and about 20 copies of the residual.
    kept = 2 * tokens * (c.top_k * (2 * c.dim + 3 * c.expert_hidden) + 20 * c.dim)
    free = 0.92 * torch.get_device_module(device).mem_get_info()[0]
    logits, update = 14 * tokens * c.vocab, 12e9
    return max(1, min(48, math.floor((free - 18 * fixed - logits - update) / (18 * layer + kept))))


def prefer(name: str) -> None:
    """Make an attention backend this process's default."""
    import kernels

    table = kernels.BACKENDS["attention"]
    kernels.BACKENDS["attention"] = (*(b._replace(default_on=("*",)) for b in table if b.name == name), *table)


def our_step(at: At, model: Any, batch: Any, form: str, attention: str | None, masters: str) -> Callable[[], Callable]:
    """Return what builds a fresh state and its step; the compiled step itself is made once."""
    import torch

    from functional_trainer import init_state, losses, make_train_step, optimizers

    if attention:
        prefer(attention)
    adamw = optimizers.adamw(optimizers.schedule("constant", sft_cpu.LR, 1), sft_cpu.BETAS, weight_decay=sft_cpu.DECAY)
    model = dataclasses.replace(model, dtype=torch.bfloat16)
    step = make_train_step(model, losses.sft(), adamw, compile=form, backend=at.compiler)  # type: ignore[arg-type]

    def build() -> Callable:
        state = init_state(model.init(0, dtype=getattr(torch, masters), device=at.device), adamw)

        return lambda: step(state, batch)[1]["loss"]

    return build


def hf_step(at: At, model: Any, batch: Any, attention: str, compiled: bool, liger: bool) -> Callable[[], Callable]:
    """Return what builds transformers' model, all in bfloat16, and its step."""
    import torch

    if liger:
        from liger_kernel.transformers import apply_liger_kernel_to_qwen3_moe

        apply_liger_kernel_to_qwen3_moe()
    inputs = sft_cpu.hf_inputs(batch) | {"output_router_logits": True}
    how = {"attn_implementation": attention, "experts_implementation": "grouped_mm"}

    def build() -> Callable:
        module = sft_cpu.hf_module(model, torch.bfloat16, at.device, **how)
        adamw = sft_cpu.hf_adamw(module)
        forward = torch.compile(module, backend=at.compiler) if compiled else module

        def run() -> Any:
            loss = forward(**inputs).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(module.parameters(), sft_cpu.CLIP)
            adamw.step()
            adamw.zero_grad(set_to_none=True)
            return loss.detach()

        return run

    return build


def contestants(small: bool) -> dict[str, Callable]:
    """Return what makes each contestant that can run here, by name."""
    have = [name for name in ("flash_attn", "liger_kernel") if importlib.util.find_spec(name)]
    ours = partial(our_step, attention=None, masters="float32")
    theirs = partial(hf_step, attention="sdpa", compiled=False, liger=False)
    found: dict[str, Callable] = {"ours-layer": partial(ours, form="layer"), "hf-sdpa": theirs}
    if small:
        return found
    found["ours-layer-bf16"] = partial(ours, form="layer", masters="bfloat16")
    found["ours-layer-flex"] = partial(ours, form="layer", attention="flex")
    found["ours-step"] = partial(ours, form="step")
    found["ours-off"] = partial(ours, form="off")
    found["hf-sdpa-compiled"] = partial(theirs, compiled=True)
    if "flash_attn" in have:
        found["ours-layer-flash"] = partial(ours, form="layer", attention="flash_attn")
        found["hf-flash"] = partial(theirs, attention="flash_attention_2")
    if "liger_kernel" in have:
        found["hf-liger"] = partial(theirs, liger=True)
    return found


class Timer:
    """One contestant in its own process."""

    def __init__(self, at: At, name: str, layers: int, rows: int):
        import models

        self.at, small = at, at.small
        self.model = models.from_config(timed_config(layers, small))
        length = at.pick(64, 4096)
        batch = sft_cpu.packed_batch(rows, length, self.model.config.vocab, seed=3, shortest=length // 8)
        self.batch = {k: v.to(at.device) for k, v in batch.items()}
        self.build = contestants(small)[name](at, self.model, self.batch)

    def round(self, steps: int) -> dict[str, float]:
        """Build, warm up and time; give the memory back. Return seconds a step, the first step's, peak GiB, loss."""
        import torch

        from functional_trainer import backend

        device = torch.get_device_module(self.at.device)
        if not self.at.small:
            device.reset_peak_memory_stats()
        step, seconds = self.build(), []
        for _ in range(2 + steps):
            backend.synchronize(self.at.device)
            begin = time.perf_counter()
            loss = step().detach().clone()
            backend.synchronize(self.at.device)
            seconds.append(time.perf_counter() - begin)
        peak = backend.peak_memory(self.at.device) / GIB
        del step
        gc.collect()
        if not self.at.small:
            device.empty_cache()
        if not math.isfinite(loss.item()):
            raise ValueError(f"the loss is {loss.item()}")
        return {"step_s": statistics.median(seconds[2:]), "first_s": seconds[0], "peak_gib": peak, "loss": loss.item()}

    def useful(self, seconds: float) -> tuple[float, float | None]:
        """Return tokens a second and MFU."""
        import torch

        from functional_trainer import backend, flops

        c, lengths = self.model.config, flops.lengths(self.batch["segment_ids"])
        work = flops.train_flops(self.model.specs, lengths, c.top_k, c.windows)
        rate = self.batch["tokens"].numel() / seconds
        return rate, flops.mfu(work, seconds, backend.peak_flops(self.at.device, torch.bfloat16))


# processes -----------------------------------------------------------------------------------------------------------


def serve(pipe: Any, device_name: str) -> None:
    """Answer requests (name of a function below, its arguments) until None."""
    import torch

    from functional_trainer import backend

    try:
        device = backend.setup(device_name)
    except ValueError as why:
        pipe.recv()
        pipe.send(("failed", str(why)))
        return
    small = not hasattr(torch.get_device_module(device), "mem_get_info")
    with contextlib.suppress(ImportError):
        import transformers

        transformers.logging.set_verbosity_error()
    kept: dict[str, Any] = {}

    def about() -> dict[str, str]:
        return {"device": backend.describe(device), "torch": torch.__version__, "small": "yes" if small else ""}

    def check(name: str, dtype: str) -> list[Check]:
        torch.manual_seed(0)
        return CASES[name](At(device, dtype, small))

    def fit(rows: int) -> int:
        return 2 if small else layers_that_fit(device, rows * 4096)

    def measure(name: str, layers: int, rows: int, steps: int) -> dict[str, float]:
        if "timer" not in kept:
            kept["timer"] = Timer(At(device, "bfloat16", small), name, layers, rows)
        return kept["timer"].round(steps)

    def useful(seconds: float) -> tuple[float, float | None]:
        return kept["timer"].useful(seconds)

    offered = {f.__name__: f for f in (about, check, fit, measure, useful)}
    while (request := pipe.recv()) is not None:
        try:
            answer: Any = ("ok", offered[request[0]](*request[1:]))
        except Skip as why:
            answer = ("skip", str(why))
        except Exception as problem:  # one case's failure hides no other
            said = [line for line in str(problem).splitlines() if line.strip()] or [""]
            answer = ("failed", f"{type(problem).__name__}: {said[0][:160]}")
        pipe.send(answer)


class Worker:
    """A process on the device, started when first asked, and anew after a fault."""

    def __init__(self, device: str):
        self.device = device
        self.process: Any = None

    def ask(self, *request: Any) -> tuple[str, Any]:
        """Return ("ok", result), ("skip", reason) or ("failed", reason)."""
        if self.process is None:
            spawn = multiprocessing.get_context("spawn")
            self.pipe, theirs = spawn.Pipe()
            self.process = spawn.Process(target=serve, args=(theirs, self.device))
            self.process.start()
            theirs.close()
        try:
            self.pipe.send(request)
            answer = self.pipe.recv() if self.pipe.poll(CASE_SECONDS) else ("failed", f"no answer in {CASE_SECONDS} s")
        except (EOFError, ConnectionError):
            self.process.join()
            answer = ("failed", f"the process ended with status {self.process.exitcode}")
        if answer[0] == "failed" and any(s in answer[1] for s in ("CUDA", "AcceleratorError", "no answer", "ended")):
            self.stop(kill=True)  # the device may refuse everything from this process now
        return answer

    def stop(self, kill: bool = False) -> None:
        if self.process is None:
            return
        if kill:
            self.process.kill()
        else:
            self.pipe.send(None)
        self.process.join()
        self.pipe.close()
        self.process = None


def wanted(o: Options, names: Any) -> list[str]:
    """Return the names that --only leaves."""
    return [name for name in names if any(fnmatch(name, pattern) for pattern in o.only or ("*",))]


def run_checks(o: Options, worker: Worker, console: Console) -> list[dict[str, Any]]:
    """Run every case in both dtypes, print a line for each comparison, and return them."""
    results = []
    for name in wanted(o, CASES):
        for dtype in TOLERANCE:
            status, answer = worker.ask("check", name, dtype)
            if status != "ok":
                console.print(f"{status.upper():6} {name:42} {dtype:9} {answer}", markup=False, soft_wrap=True)
                results.append({"case": name, "dtype": dtype, "status": status, "note": answer})
                continue
            for check in answer:
                verdict = "pass" if check.error <= check.tolerance else "failed"  # NaN fails
                shown = f"{check.what:18} error {check.error:.1e} of {check.tolerance:.0e} {check.note}"
                console.print(f"{verdict.upper():6} {name:42} {dtype:9} {shown}", markup=False, soft_wrap=True)
                results.append({"case": name, "dtype": dtype, "status": verdict, **check._asdict()})
    return results


def run_speed(o: Options, about: dict[str, str], console: Console) -> list[dict[str, Any]]:
    """Time the contestants in turn, print the table, and return its rows."""
    names, small = wanted(o, contestants(bool(about["small"]))), bool(about["small"])
    first = Worker(o.device)
    layers, rows = o.layers or first.ask("fit", o.rows)[1], 1 if small else o.rows
    first.stop()
    workers = {name: Worker(o.device) for name in names}
    taken: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    table: dict[str, dict[str, Any]] = {name: {"name": name, "layers": layers} for name in names}
    for round in range(o.rounds):
        for name in names:
            if "error" in table[name]:
                continue
            status, answer = workers[name].ask("measure", name, layers, rows, o.steps)
            console.print(f"round {round + 1}: {name} {answer}", markup=False, soft_wrap=True)
            if status == "ok":
                taken[name].append(answer)
            else:
                table[name]["error"] = answer
                workers[name].stop(kill=True)  # with the device memory that it still holds
    for name in names:
        if taken[name]:
            seconds = [t["step_s"] for t in taken[name]]
            median = statistics.median(seconds)
            rate, mfu = workers[name].ask("useful", median)[1] if workers[name].process else (None, None)
            table[name] |= {"median_s": median, "min_s": min(seconds), "max_s": max(seconds)}
            table[name] |= {"tokens_s": rate, "mfu": mfu}
            table[name] |= {"first_s": taken[name][0]["first_s"], "peak_gib": max(t["peak_gib"] for t in taken[name])}
        workers[name].stop()
    title = f"{layers} layers, {rows} rows, bfloat16 compute; {about['device']}, torch {about['torch']}"
    show(table.values(), title, console)
    return list(table.values())


def show(rows: Any, title: str, console: Console) -> None:
    """Print the table of contestants."""
    table = Table(title=title)
    for head in ("contestant", "tokens/s", "MFU", "median s", "min..max s", "peak GiB", "first step s", ""):
        table.add_column(head, justify="left" if head in ("contestant", "") else "right")
    for row in rows:
        cells = [""] * 6
        if "median_s" in row:
            rate = "" if row["tokens_s"] is None else f"{row['tokens_s']:,.0f}"
            mfu = "n/a" if row["mfu"] is None else f"{row['mfu']:.1%}"
            cells = [rate, mfu, f"{row['median_s']:.3f}", f"{row['min_s']:.3f}..{row['max_s']:.3f}"]
            cells += [f"{row['peak_gib']:.1f}", f"{row['first_s']:.1f}"]
        table.add_row(row["name"], *cells, row.get("error", ""))
    console.print(table)


def main(o: Options) -> None:
    """Check, measure, print, write, and fail if anything did."""
    if min(o.rows, o.rounds, o.steps) < 1 or o.layers < 0:
        raise ValueError("--rows, --rounds and --steps are at least 1, --layers at least 0")
    console, worker = Console(width=150), Worker(o.device)
    status, about = worker.ask("about")
    if status != "ok":
        raise ValueError(about)
    console.print(f"{about['device']}, torch {about['torch']}{', small sizes' * bool(about['small'])}")
    checks = run_checks(o, worker, console) if o.what != "speed" else []
    worker.stop()
    speed = run_speed(o, about, console) if o.what != "check" else []
    count = {s: sum(c["status"] == s for c in checks) for s in ("pass", "failed", "skip")}
    console.print(f"{count['pass']} passed, {count['failed']} failed, {count['skip']} skipped")
    if o.json:
        results = {"about": about, "checks": checks, "speed": speed}
        o.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    sys.exit(count["failed"] > 0 or any("error" in row for row in speed))


if __name__ == "__main__":
    config.run(main, Options, doc=__doc__)
