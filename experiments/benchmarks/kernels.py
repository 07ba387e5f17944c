"""Time ops, forward and backward, beside their peers and the products that they cannot avoid.

    python experiments/benchmarks/kernels.py --json kernels.json
    python experiments/benchmarks/kernels.py --ops experts --shapes tiny --routing extreme --dtypes bfloat16

Contestants of a case share one process, take turns, one run each a round in an order that is drawn, and must agree with
ours before they are timed: results and gradients, within the type's error. Times are medians.

    floor     the vendor's matrix products alone, each once forward and twice backward, on buffers made before: of the
              experts with their actual numbers of rows, sorted; of the head for all tokens; of attention PyTorch's
              kernel for each document (float32 on the CPU); of an element-wise op (rms_norm, add_norm, rope, swiglu:
              `kernel_cases.py`) copies of its bytes
    floor-memory
              of the experts: the floor, and a copy for each pass over memory between products that are library calls:
              rows gathered, SwiGLU, each token's rows summed, and backward the gradient's rows gathered, SwiGLU's
              gradient, each token's row gradients summed. As many bytes read and written, nothing computed
    ours-X    `kernels` with backend X
    ...*      compiled by Inductor
    plain     our RMSNorm without its own gradient of the scale
    hf-X      transformers' Qwen3MoeExperts with implementation X, left out if it would copy more than --memory-gib;
              where the shape is GPT-OSS's, and so clamped and biased, its GptOssExperts, on weights turned before
    hf        transformers' Qwen3MoeRMSNorm, apply_rotary_pos_emb, and silu(gate) * up
    torch     F.linear_cross_entropy; scaled_dot_product_attention with a mask of documents; F.rms_norm
    logits    all logits at once, and F.cross_entropy
    liger     liger-kernel's, where it is installed (it needs a GPU): experts, head and element-wise

ours-triton+sort also sorts slots in Triton.

Routing: balanced, mild (shares of experts fall from 2 to 0) and extreme (three of four slots go to the first experts).
On a GPU, products of 8192 x 8192 and a copy of 1 GiB are timed in the same run: what TFLOP/s and GB/s there can be.
"""

import importlib.util
import json
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # run from the clone without installing

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table

import kernels as ops
from experiments.benchmarks import kernel_cases, sft_cpu
from experiments.benchmarks.kernel_cases import Case, both, leaf
from functional_trainer import backend, config

HOST = {
    "tiny": (2048, 256, 224, 16, 4), "gpt-oss, tiny": (2048, 256, 224, 16, 4),
    "30b-a3b, 16 experts, 512": (512, 2048, 768, 16, 8), "30b-a3b, 16 experts, 2k": (2048, 2048, 768, 16, 8),
    "30b-a3b, 512": (512, 2048, 768, 128, 8), "30b-a3b, 2k": (2048, 2048, 768, 128, 8),
}  # fmt: skip
"""Sizes of an expert layer on the CPU: tokens, width, expert width, experts, slots of a token."""
WIDTHS = {
    "30b-a3b": (2048, 768, 128, 8), "235b-a22b": (4096, 1536, 128, 8), "deepseek-v3": (7168, 2048, 256, 8),
    "gpt-oss-20b": (2880, 2880, 32, 4), "gpt-oss-120b": (2880, 2880, 128, 4),
}  # fmt: skip
DEVICE = {f"{name}, {T // 1024}k": (T, *sizes) for name, sizes in WIDTHS.items() for T in (4096, 8192, 32768)}
HEADS = {"tiny": (2048, 256, 1024), "30b-a3b, 512": (512, 2048, 151936), "30b-a3b, 4k": (4096, 2048, 151936)}
"""Sizes of a head: tokens, width, vocabulary."""
ATTENTION = {"tiny": (8, 256, 8, 4, 32), "30b-a3b, 2 x 2k": (2, 2048, 32, 4, 128)}
"""Sizes of attention: rows, tokens of a row, query heads, key heads, head dim."""
ELEMENTWISE = {"tiny": (8, 256, 256, 224, 4, 8, 4, 32), "30b-a3b, 2k": (1, 2048, 2048, 768, 8, 32, 4, 128)}
"""Sizes around element-wise ops: rows, tokens, width, expert width, slots, query heads, key heads, head dim."""
TURNED = {
    "30b-a3b": (32, 4, 128), "235b-a22b": (64, 4, 128), "deepseek-v3": (128, 1, 64),
    "gpt-oss-20b": (64, 8, 64), "gpt-oss-120b": (64, 8, 64),
}  # fmt: skip
"""What is rotated on a GPU: query heads, key heads, their dims."""
ELEMENTWISE_DEVICE = {
    f"{name}, {T // 1024}k": (1, T, D, hidden, K, *TURNED[name])
    for name, (D, hidden, _, K) in WIDTHS.items() for T in (4096, 8192, 32768)
}  # fmt: skip
GPT_OSS = ops.Activation("clamped_swiglu")
"""Of shapes that begin with "gpt-oss", which also have biases."""
Op = Literal["experts", "linear_logprob", "attention", "rms_norm", "add_norm", "rope", "swiglu"]
PER_MS = {"TFLOP/s": 1e9, "GB/s": 1e6}
LIMIT = {"float32": 1e-4, "bfloat16": 4e-2}


@dataclass(frozen=True)
class Options:
    device: str = "auto"
    """Device to time on."""
    ops: tuple[Op, ...] = get_args(Op)
    """Ops to time."""
    shapes: tuple[str, ...] = ()
    """Beginnings of names of sizes (none means all)."""
    routing: tuple[Literal["balanced", "mild", "extreme"], ...] = ("balanced", "mild", "extreme")
    """How tokens choose experts."""
    dtypes: tuple[Literal["float32", "bfloat16"], ...] = ("float32", "bfloat16")
    """Types of all operands."""
    compile: Literal["on", "off"] = "on"
    """Time compiled forms, too: of the default expert layer, transformers' grouped one, and element-wise ops."""
    rounds: int = 5
    """Timed runs of each contestant, after one that is not."""
    memory_gib: float = 8.0
    """Memory that a contestant may take for copies."""
    eager: Literal["on", "off"] = "on"
    """Time hf-eager, too: with 128 experts of real widths one run takes a quarter of a minute."""
    json: Path | None = None
    """Also write the results here."""


def products(*sizes: tuple[int, int, int], dtype: str, device: torch.device) -> Callable[[], None]:
    """Return what runs the three products of each (rows, in, out), every one with a weight of its own; the rows of all
    of a kind are one after the other."""
    make = partial(torch.randn, dtype=getattr(torch, dtype), device=device)
    calls: list[list[torch.Tensor]] = []
    for i, o in dict.fromkeys((i, o) for _, i, o in sizes):
        rows = [n for n, *kind in sizes if kind == [i, o]]
        parts = zip(*(make(sum(rows), width).split(rows) for width in (i, i, o, o)), strict=True)
        calls += [[*part, make(o, i), make(o, i)] for part in parts]

    def run() -> None:
        for x, dx, y, dy, w, dw in calls:
            torch.mm(x, w.T, out=y)
            torch.mm(dy, w, out=dx)
            torch.mm(dy.T, x, out=dw)

    return run


# cases ---------------------------------------------------------------------------------------------------------------


def passes(sizes: tuple[int, ...], itemsize: int, device: torch.device) -> Callable[[], Any]:
    """Return the copies of `floor-memory`."""
    T, D, hidden, _, K = sizes
    x, rows, units = (n * itemsize for n in (T * D, T * K * D, T * K * hidden))
    moved = (rows, rows), (2 * units, units), (rows, x), (rows, rows), (3 * units, 2 * units), (rows, x)
    return kernel_cases.copies(device, *moved)["floor"]


def in_turn(*calls: Callable[[], Any]) -> None:
    """Run one after the other."""
    for call in calls:
        call()


def chosen(routing: str, T: int, E: int, K: int, device: torch.device) -> torch.Tensor:
    """Draw K different experts for each token."""
    favour = (
        torch.linspace(2, 0, E, device=device).clamp_min(1e-3) if routing == "mild" else torch.ones(E, device=device)
    )
    if routing == "extreme":
        favour[: max(K, E // 16)] = 3 * E / max(K, E // 16)
    return torch.multinomial(favour.expand(T, E), K)


def module(sizes: tuple[int, ...], gpt_oss: bool, implementation: str) -> torch.nn.Module:
    """Build a peer's expert module without weights: transformers' with an implementation, or liger-kernel's."""
    from transformers import GptOssConfig, Qwen3MoeConfig
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    _, D, hidden, E, K = sizes
    raw: Any = Qwen3MoeConfig(hidden_size=D, moe_intermediate_size=hidden, num_experts=E, num_experts_per_tok=K)
    if gpt_oss:
        raw = GptOssConfig(hidden_size=D, intermediate_size=hidden, num_local_experts=E, num_experts_per_tok=K)
    with torch.device("meta"):
        if implementation == "liger":
            from liger_kernel.transformers.swiglu import LigerExperts

            return LigerExperts(raw)
        raw._experts_implementation = implementation
        return (GptOssExperts if gpt_oss else Qwen3MoeExperts)(raw)


def apply(sizes: tuple[int, ...], gpt_oss: bool, implementation: str, ids, x, weights, *tensors) -> torch.Tensor:
    """Apply a peer's expert module to tensors in its layout."""
    made = module(sizes, gpt_oss, implementation)
    names = ("gate_up_proj", "down_proj", *(f"{k}_proj_bias" for k in ("gate_up", "down")))[: len(tensors)]
    for name, tensor in zip(names, tensors, strict=True):
        del made._parameters[name]
        made.__dict__[name] = tensor
    return made(x, ids, weights)


def turned(x, weights, gate_up, down, first, last) -> list[torch.Tensor]:
    """Lay our tensors of experts out as GPT-OSS does: inputs before outputs, gate and up in turns."""
    made = gate_up.permute(0, 3, 2, 1).flatten(2), down.mT.contiguous(), first.mT.flatten(1), last
    return [x, weights, *(t.detach().clone().requires_grad_() for t in made)]


def back(y, dx, dweights, dgate_up, ddown, dfirst, dlast) -> list[torch.Tensor]:
    """Undo `turned` of gradients."""
    dgate_up, dfirst = dgate_up.unflatten(2, (-1, 2)).permute(0, 3, 2, 1), dfirst.unflatten(1, (-1, 2)).mT
    return [y, dx, dweights, dgate_up, ddown.mT, dfirst, dlast]


def peers(o: Options, sizes: tuple[int, ...], leaves: list[torch.Tensor], ids, grad) -> Iterator[tuple[str, Callable]]:
    """Yield what others make of an expert layer."""
    T, D, hidden, E, K = sizes
    gpt_oss, x = len(leaves) > 4, leaves[0]
    theirs = turned(*leaves) if gpt_oss else [*leaves[:2], leaves[2].flatten(1, 2), leaves[3]]
    undo = back if gpt_oss else lambda *found: found

    def run(fn: Callable) -> Callable[[], Any]:
        return lambda: undo(*both(lambda: fn(ids, *theirs), theirs if gpt_oss else leaves, grad))

    for name in sft_cpu.EXPERTS:
        if name == "eager" and o.eager == "off":
            continue
        if name != "batched_mm" or T * K * 3 * D * hidden * x.itemsize < o.memory_gib * 2**30:
            yield f"hf-{name}", run(partial(apply, sizes, gpt_oss, name))
    if o.compile == "on":
        yield "hf-grouped_mm*", run(torch.compile(partial(apply, sizes, gpt_oss, "grouped_mm"), dynamic=False))
    if importlib.util.find_spec("liger_kernel") and backend.has_own_memory(x.device) and not gpt_oss:
        yield "liger", run(partial(apply, sizes, gpt_oss, "liger"))


def experts(o: Options, device: torch.device, shape: str, sizes: tuple[int, ...], dtype: str) -> Iterator[Case]:
    """Yield the cases of an expert layer of (tokens, width, expert width, experts, slots)."""
    T, D, hidden, E, K = sizes
    biases = ((E, 2, hidden), (E, D)) if shape.startswith("gpt-oss") else ()
    leaves = [leaf(device, dtype, *s) for s in ((T, D), (T, K), (E, 2, hidden, D), (E, D, hidden), *biases)]
    grad, whole = torch.randn(T, D, device=device).to(leaves[0].dtype), torch.compile(ops.experts, dynamic=False)
    more: dict[str, Any] = {}
    if biases:
        more = {"gate_up_bias_E2F": leaves[4], "down_bias_ED": leaves[5], "activation": GPT_OSS}

    def ours(fn: Callable, ids: torch.Tensor, **extra: str) -> Callable[[], Any]:
        return partial(both, partial(fn, *leaves[:2], ids, *leaves[2:4], E, **more, **extra), leaves, grad)

    for routing in o.routing:
        ids = chosen(routing, T, E, K, device)
        counts = torch.bincount(ids.flatten(), minlength=E).tolist()
        needed = [size for n in counts if n for size in ((n, D, 2 * hidden), (n, hidden, D))]
        floor, more_bytes = products(*needed, dtype=dtype, device=device), passes(sizes, grad.itemsize, device)
        found: dict[str, Callable] = {"floor": floor, "floor-memory": partial(in_turn, floor, more_bytes)}
        for b in ops.BACKENDS["experts"]:
            if b.name != "reference" and device.type in b.serves:
                found[f"ours-{b.name}"] = ours(ops.experts, ids, backend=b.name)
        if "ours-triton" in found:
            found["ours-triton+sort"] = ours(ops.experts, ids, backend="triton", sort="triton")
        if o.compile == "on":
            found["ours*"] = ours(whole, ids)
        found |= dict(peers(o, sizes, leaves, ids, grad))
        yield Case("experts", shape, dtype, routing, 18.0 * T * K * D * hidden, found)


def linear_logprob(o: Options, device: torch.device, shape: str, sizes: tuple[int, ...], dtype: str) -> Iterator[Case]:
    """Yield the case of a head of (tokens, width, vocabulary): the mean negative log-likelihood."""
    T, D, V = sizes
    h, w = leaves = [leaf(device, dtype, T, D), leaf(device, dtype, V, D)]
    targets, one = torch.randint(0, V, (T,), device=device), torch.ones((), device=device)
    loss = lambda logp: -logp.mean()  # noqa: E731
    found = {
        "floor": products((T, D, V), dtype=dtype, device=device),
        "ours": lambda: both(lambda: loss(ops.linear_logprob(h, w, targets, entropy=False)[0]), leaves, one),
        "torch": lambda: both(lambda: F.linear_cross_entropy(h, w, targets).float(), leaves, one),
        "logits": lambda: both(lambda: F.cross_entropy((h @ w.T).float(), targets), leaves, one),
    }
    if importlib.util.find_spec("liger_kernel") and backend.has_own_memory(device):
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        fused = LigerFusedLinearCrossEntropyLoss()
        found["liger"] = lambda: both(lambda: fused(w, h, targets).float(), leaves, one)
    yield Case("linear_logprob", shape, dtype, "", 6.0 * T * D * V, found)


def attention(o: Options, device: torch.device, shape: str, sizes: tuple[int, ...], dtype: str) -> Iterator[Case]:
    """Yield the case of causal attention in packed documents: (rows, tokens of a row, heads, key heads, head dim)."""
    from functional_trainer import flops
    from kernels.attention import mask

    B, S, N, K, H = sizes
    batch = sft_cpu.packed_batch(B, S, 99, seed=1, shortest=S // 16)
    lengths = flops.lengths(batch["segment_ids"]).tolist()
    segments, positions = (batch[name].to(device) for name in ("segment_ids", "positions"))
    q, k, v = leaves = [leaf(device, dtype, B, S, heads, H) for heads in (N, K, K)]
    grad, seen = torch.randn_like(q), mask(segments, positions, segments, positions, None)

    def sdpa() -> torch.Tensor:
        heads = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        return F.scaled_dot_product_attention(*heads, attn_mask=seen[:, None], enable_gqa=True).transpose(1, 2)

    found: dict[str, Callable] = {"torch": partial(both, sdpa, leaves, grad)}
    if not backend.has_own_memory(device):
        calls = [sft_cpu.attend(n, N, H) for n in lengths]
        found["floor"] = lambda: [call() for call in calls]
    for b in ops.BACKENDS["attention"]:
        if b.name not in ("reference", "shapes") and (device.type in b.serves or "*" in b.serves):
            run = partial(ops.attention, q, k, v, segments, positions, backend=b.name)
            found[f"ours-{b.name}"] = partial(both, run, leaves, grad)
    yield Case("attention", shape, dtype, f"{len(lengths)} documents", 7.0 * N * H * sum(n * n for n in lengths), found)


CASES: dict[str, Callable[..., Iterator[Case]]] = {
    "experts": experts, "linear_logprob": linear_logprob, "attention": attention, **kernel_cases.ELEMENTWISE
}  # fmt: skip


# timing --------------------------------------------------------------------------------------------------------------


def off(ours: list[torch.Tensor], other: list[torch.Tensor]) -> float:
    """Return the largest relative difference of results and gradients, in the 2-norm."""
    pairs = zip(ours, other, strict=True)
    return max(((a - b).float().norm() / a.float().norm().clamp_min(1e-30)).item() for a, b in pairs)


def raced(case: Case, rounds: int, device: torch.device) -> list[dict[str, Any]]:
    """Return a row for each contestant: milliseconds of its runs, and how far it is from ours."""
    rows: list[dict[str, Any]] = []
    ours = next(run for name, run in case.contestants.items() if name.startswith("ours"))()
    for name, run in case.contestants.items():
        row: dict[str, Any] = {k: getattr(case, k) for k in ("op", "shape", "dtype", "note", "unit")} | {"name": name}
        made = run()
        far = 0.0 if name.startswith("floor") else off(ours, made)
        if not far <= LIMIT[case.dtype]:
            row["failed"] = f"differs from ours by {far:.1e}"
        rows.append(row | {"off": far, "ms": []})
    del ours, made
    for round in range(rounds):
        for row in random.Random(round).sample(rows, len(rows)):  # so that nobody always follows the same one
            if "failed" not in row:
                backend.synchronize(device)
                begin = time.perf_counter()
                case.contestants[row["name"]]()
                backend.synchronize(device)
                row["ms"].append((time.perf_counter() - begin) * 1e3)
    for row in rows:
        row["median_ms"] = statistics.median(row["ms"]) if row["ms"] else None
        row["rate"] = case.work / row["median_ms"] / PER_MS[case.unit] if row["ms"] else None
    return rows


def ceilings(device: torch.device) -> str:
    """Time a large product and a copy on a GPU."""
    if not backend.has_own_memory(device):
        return ""
    a, b = torch.randn(2, 8192, 8192, device=device, dtype=torch.bfloat16)
    x = torch.empty(2**28, device=device)
    found = []
    for run in (lambda: a @ b, lambda: x.clone()):
        times = []
        for _ in range(10):
            backend.synchronize(device)
            begin = time.perf_counter()
            run()
            backend.synchronize(device)
            times.append(time.perf_counter() - begin)
        found.append(statistics.median(times))
    product, copy = 2 * 8192**3 / found[0] / 1e12, 2 * x.nbytes / found[1] / 1e9
    return f"a product of 8192 in bfloat16: {product:.0f} TFLOP/s; a copy: {copy:.0f} GB/s"


def show(rows: list[dict[str, Any]], console: Console) -> None:
    """Print the rows of a case."""
    first, floor = rows[0], next((r["median_ms"] for r in rows if r["name"] == "floor"), None)
    made = Table(title=" ".join(filter(None, (first["op"], first["shape"], first["dtype"], first["note"]))))
    for head in ("contestant", "ms", "x floor", first["unit"], "from ours"):
        made.add_column(head, justify="left" if head == "contestant" else "right")
    for row in sorted(rows, key=lambda r: r["median_ms"] or 1e12):
        if row["ms"]:
            share = f"{row['median_ms'] / floor:.2f}" if floor else ""
            made.add_row(row["name"], f"{row['median_ms']:.2f}", share, f"{row['rate']:.3g}", f"{row['off']:.0e}")
        else:
            made.add_row(row["name"], row["failed"], "", "", "")
    console.print(made)


def main(o: Options) -> None:
    device = backend.setup(o.device)
    backend.keep_host_memory()
    own, console, rows = backend.has_own_memory(device), Console(width=120), []
    sizes: dict[str, dict[str, Any]] = {
        "experts": DEVICE if own else HOST,
        "linear_logprob": HEADS,
        "attention": ATTENTION,
        **dict.fromkeys(kernel_cases.ELEMENTWISE, ELEMENTWISE_DEVICE if own else ELEMENTWISE),
    }
    known = [shape for op in o.ops for shape in sizes[op]]
    if odd := [s for s in o.shapes if not any(shape.startswith(s) for shape in known)]:
        raise ValueError(f"--shapes {odd[0]}: no size begins so; these are: {'; '.join(dict.fromkeys(known))}")
    console.print(f"{backend.describe(device)}, torch {torch.__version__} {ceilings(device)}")
    for op in o.ops:
        for shape, size in sizes[op].items():
            for dtype in o.dtypes if not o.shapes or shape.startswith(o.shapes) else ():
                torch._dynamo.reset()  # which compiles one function for 8 shapes at most, and then runs it uncompiled
                for case in CASES[op](o, device, shape, size, dtype):
                    found = raced(case, o.rounds, device)
                    show(found, console)
                    rows += found
    if o.json:
        o.json.write_text(json.dumps({"options": asdict(o) | {"json": str(o.json)}, "rows": rows}, indent=1), "utf-8")
    if any("failed" in row for row in rows):
        raise SystemExit(1)


if __name__ == "__main__":
    config.run(main, Options, doc=__doc__ or "")
