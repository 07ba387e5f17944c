"""Time one training step of a small Qwen3-MoE on the CPU: its floor, this engine, and transformers.

    python experiments/benchmarks/sft_cpu.py                              # float32, every contestant
    python experiments/benchmarks/sft_cpu.py --dtype bfloat16 --json bf16.json
    python experiments/benchmarks/sft_cpu.py --what depth                 # first step against the number of layers

One step is forward, backward, clipping of the gradient norm at 1, and AdamW, on the same packed tokens from the same
weights. Every contestant is a process of its own; they take turns, one step each a round, and the others wait. The
first losses must agree, or the contestant is reported as failed and the exit status is 1.

    floor            the matrix products that a step cannot avoid (qkv, o, router, the experts with their actual numbers
                     of rows, head for the trained tokens: each once forward, twice backward) and PyTorch's attention
                     kernel forward and backward for each document; nothing else, on buffers made before. bfloat16
                     attention runs in float32, as `kernels.attention` explains
    floor-memory     the floor, and one copy for every pass over memory that remains when each norm, rotation, SwiGLU,
                     sum, cast and AdamW is one fused kernel between the products: as many bytes read and written,
                     nothing computed. No step whose products are library calls can be faster
    ours-F           this engine with --compile F: float32 masters, compute in --dtype, deterministic algorithms
    hf-X             Qwen3MoeForCausalLM with experts implementation X, SDPA with a mask that it makes from positions
                     restarting at each document, fused AdamW; in bfloat16 the weights and moments are bfloat16
    hf-X-autocast    the same with float32 weights and moments under torch.autocast (bfloat16 only)
    ...-compiled     the same through torch.compile

Memory is the process's resident set less what it was after the imports: `peak` over its life, compiling included, and
`steps` over the timed steps alone. Compilers' caches are off.
"""

import dataclasses
import json
import multiprocessing
import os
import resource
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import Any, Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # run from the clone without installing

from rich.console import Console
from rich.table import Table

from functional_trainer import config

EXPERTS = ("eager", "batched_mm", "grouped_mm")  # transformers' others, deepgemm and sonicmoe, need a GPU
LR, BETAS, EPS, DECAY, CLIP, BALANCE = 1e-3, (0.9, 0.95), 1e-8, 0.1, 1.0, 1e-3
GIB, MIB = 2**30, 2**20


@dataclass(frozen=True)
class Options:
    what: Literal["step", "depth"] = "step"
    """Time steps, or the first step (tracing, compiling, running) at several depths."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Compute dtype."""
    contestants: tuple[str, ...] = ()
    """Names as in the table, with wildcards ("hf-grouped*"); none means all. The floor always runs."""
    rounds: int = 15
    """Timed steps of each contestant."""
    warmup: int = 8
    """Untimed steps before; the first is reported as compile time, in the others oneDNN compiles kernels."""
    threads: int = os.cpu_count() or 1
    """Threads of each contestant."""
    layers: int = 4
    """Depth of the model."""
    rows: int = 8
    """Packed rows a step (at most 2 with --what depth)."""
    seq_len: int = 256
    """Tokens of a row."""
    balance: Literal["none", "hf"] = "hf"
    """Router balance loss: none, or transformers' form for everybody."""
    layer_depths: tuple[int, ...] = (4, 16, 48)
    """Depths at which --what depth compiles by layer."""
    step_depths: tuple[int, ...] = (2, 4, 8)
    """Depths at which --what depth compiles the whole step."""
    memory_gib: float = 8.0
    """Memory that a contestant may take before it fails (batched_mm copies a matrix for every routed row)."""
    seed: int = 0
    """Seed of weights and tokens."""
    json: Path | None = None
    """Also write the results here."""


def hf_config(layers: int) -> dict[str, Any]:
    """Return the benchmark's Qwen3-MoE, 12 M parameters at 4 layers, as a Hugging Face dict."""
    return {
        "architectures": ["Qwen3MoeForCausalLM"], "attention_bias": False, "decoder_sparse_step": 1, "head_dim": 32,
        "hidden_act": "silu", "hidden_size": 256, "initializer_range": 0.02, "intermediate_size": 512,
        "max_position_embeddings": 4096, "mlp_only_layers": [], "model_type": "qwen3_moe",
        "moe_intermediate_size": 224, "norm_topk_prob": True, "num_attention_heads": 8, "num_experts": 16,
        "num_experts_per_tok": 4, "num_hidden_layers": layers, "num_key_value_heads": 4, "rms_norm_eps": 1e-6,
        "rope_theta": 1e4, "router_aux_loss_coef": BALANCE, "tie_word_embeddings": False, "vocab_size": 1024,
    }  # fmt: skip


def packed_batch(rows: int, seq_len: int, vocab: int, seed: int, shortest: int = 16) -> dict[str, Any]:
    """Return full rows of documents of `shortest` to seq_len / 2 random tokens; the later half of each is trained."""
    import torch

    rng = torch.Generator().manual_seed(seed)
    batch = {k: torch.zeros(rows, seq_len, dtype=torch.int64) for k in ("segment_ids", "positions", "weights")}
    for row in range(rows):
        start, segment = 0, 1
        while start < seq_len:
            length = int(torch.randint(shortest, max(seq_len // 2, shortest) + 1, (), generator=rng))
            end = min(start + length, seq_len)
            batch["segment_ids"][row, start:end] = segment
            batch["positions"][row, start:end] = torch.arange(end - start)
            batch["weights"][row, (start + end) // 2 : end] = 1
            start, segment = end, segment + 1
    batch["weights"] = batch["weights"].to(torch.float32)
    draw = torch.randint(0, vocab, (2, rows, seq_len), generator=rng)
    inside = batch["segment_ids"][:, 1:] == batch["segment_ids"][:, :-1]
    targets = draw[1].clone()
    targets[:, :-1] = torch.where(inside, draw[0, :, 1:], draw[1, :, :-1])
    return {"tokens": draw[0], "targets": targets, **batch}


def hf_module(model: Any, dtype: Any, device: Any, params: Any = None, **implementation: str) -> Any:
    """Return transformers' model of our config in training mode, with copies of our parameters if given."""
    import transformers

    from functional_trainer import hf, tree

    with device:
        raw = transformers.AutoConfig.for_model(**model.config.hf)
        module = transformers.AutoModelForCausalLM.from_config(raw, dtype=dtype, **implementation)
    if params is not None:
        leaves = tree.flatten(params)
        slots = hf.expand(model.specs, model.names[-1])  # the fused layout is transformers' own
        state = {k: leaves[s.path][s.index].view(s.shape) for k, s in slots.items()}
        module.load_state_dict(
            {k: state[hf.TIED[k] if k in hf.TIED and k not in state else k] for k in module.state_dict()}
        )
    return module.train()


def hf_adamw(module: Any) -> Any:
    """Return fused AdamW over a module's parameters, norms exempt from weight decay."""
    import torch

    norms = [p for p in module.parameters() if p.ndim == 1]
    rest = [p for p in module.parameters() if p.ndim > 1]
    groups = [{"params": rest, "weight_decay": DECAY}, {"params": norms, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=LR, betas=BETAS, eps=EPS, fused=True)


def hf_inputs(batch: dict[str, Any]) -> dict[str, Any]:
    """Return a packed batch as transformers takes it: positions that start again at each document, shifted labels."""
    labels = batch["targets"].masked_fill(batch["weights"] == 0, -100)
    return {
        "input_ids": batch["tokens"], "position_ids": batch["positions"], "labels": labels, "shift_labels": labels,
        "use_cache": False,
    }  # fmt: skip


def hf_train(module: Any, forward: Callable, inputs: dict[str, Any]) -> Callable[[], Any]:
    """Return a step of transformers' module with AdamW that gives its loss; `forward` may be the module, compiled."""
    import torch

    adamw = hf_adamw(module)

    def step() -> Any:
        loss = forward(**inputs).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), CLIP)
        adamw.step()
        adamw.zero_grad(set_to_none=True)
        return loss.detach()

    return step


# contestants: each builds `step() -> loss` ---------------------------------------------------------------------------


def initial(o: Options) -> tuple[Any, Any, dict[str, Any]]:
    """Return the model, float32 parameters and the batch."""
    import torch

    import models

    model = models.from_config(hf_config(o.layers))
    compute = None if o.dtype == "float32" else torch.bfloat16
    batch = packed_batch(o.rows, o.seq_len, model.config.vocab, o.seed)
    return dataclasses.replace(model, dtype=compute), model.init(o.seed), batch


def ours(o: Options, form: Any) -> Callable[[], float]:
    """Build this engine's step, compiled as `form` says."""
    import torch

    from functional_trainer import backend, init_state, losses, make_train_step, optimizers

    backend.setup(torch.get_default_device().type)
    model, params, batch = initial(o)
    adamw = optimizers.adamw(optimizers.schedule("constant", LR, 1), BETAS, EPS, DECAY)
    step = make_train_step(model, losses.sft(o.balance, BALANCE), adamw, clip=CLIP, compile=form)
    state = init_state(params, adamw)
    return lambda: step(state, batch)[1]["loss"].item()


def transformers(o: Options, experts: str, autocast: bool, compiled: bool) -> Callable[[], float]:
    """Build the step of transformers' Qwen3MoeForCausalLM."""
    import torch

    model, params, batch = initial(o)
    dtype = torch.float32 if autocast else getattr(torch, o.dtype)
    device = batch["tokens"].device
    module = hf_module(model, dtype, device, params, attn_implementation="sdpa", experts_implementation=experts)
    del params
    inputs = hf_inputs(batch) | {"output_router_logits": o.balance == "hf"}
    forward = torch.compile(module) if compiled else module

    def cast(**inputs: Any) -> Any:
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=autocast):
            return forward(**inputs)

    step = hf_train(module, cast, inputs)
    return lambda: step().item()


def linear(rows: int, width_in: int, width_out: int, dtype: Any) -> list[Callable[[], Any]]:
    """Return the three products of one weight: output, input gradient, weight gradient."""
    import torch

    x, w, dy = (torch.randn(s, dtype=dtype) for s in ((rows, width_in), (width_out, width_in), (rows, width_out)))
    y, dx, dw = torch.empty_like(dy), torch.empty_like(x), torch.empty_like(w)
    return [
        lambda: torch.mm(x, w.T, out=y),
        lambda: torch.mm(dy, w, out=dx),
        lambda: torch.mm(dy.T, x, out=dw),
    ]


def attend(length: int, heads: int, head_dim: int) -> Callable[[], Any]:
    """Return the CPU's flash attention of one document, forward and backward."""
    import torch

    forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    q, k, v, grad = torch.randn(4, 1, length, heads, head_dim).transpose(2, 3)

    def run():
        out, lse = forward(q, k, v, 0.0, True)
        backward(grad, q, k, v, out, lse, 0.0, True)

    return run


def stream(read: int, write: int) -> list[Callable[[], Any]]:
    """Return calls that read and write so many bytes, as float32."""
    import torch

    source, target, both = torch.ones(read // 4), torch.ones(write // 4), min(read, write) // 4
    calls: list[Callable[[], Any]] = [lambda: target[:both].copy_(source[:both])]
    return calls + ([source[both:].sum] if read > write else []) + ([target[both:].zero_] if write > read else [])


def memory(o: Options) -> list[Callable[[], Any]]:
    """Return a call for each pass over memory between the products of a step."""
    import torch

    import models

    model, _, _ = initial(o)
    width = getattr(torch, o.dtype).itemsize
    c, T, P = model.config, o.rows * o.seq_len * width, models.count(model)
    x, heads, rows, hidden = (T * n for n in (
        c.dim, (c.heads + 2 * c.kv_heads) * c.head_dim, c.top_k * c.dim, c.top_k * c.expert_hidden
    ))  # fmt: skip
    passes = [  # bytes read and written: norm, rotation, sum and norm, SwiGLU, combination, sum; then backward
        (x, x), (heads, heads), (2 * x, 2 * x), (2 * hidden, hidden), (rows, x), (2 * x, x),
        (3 * hidden, 3 * hidden), (rows, x), (4 * x, x), (2 * heads, heads), (4 * x, x),
    ]  # fmt: skip
    passes *= o.layers
    passes += [(P * width, 0), (P * width + 12 * P, 12 * P)]  # the gradients' norm; AdamW over float32
    passes += [(4 * P, P * width)] if width < 4 else []  # the weights' cast
    return [call for sizes in passes for call in stream(*sizes)]


def unavoidable(o: Options) -> dict[str, list[Callable[[], Any]]]:
    """Return the products and attention calls that a step cannot avoid, by what they are of."""
    import torch

    from functional_trainer import flops

    model, params, batch = initial(o)
    c, T, dtype = model.config, o.rows * o.seq_len, getattr(torch, o.dtype)
    with torch.no_grad():
        load_LE = model.apply(params, batch).aux["load"].to(torch.int64).tolist()
    found: dict[str, list[Callable[[], Any]]] = {"experts": [], "attention": [], "other products": []}
    found["head"] = linear(int((batch["weights"] != 0).sum()), c.dim, c.vocab, dtype)
    for load_E in load_LE:
        found["other products"] += linear(T, c.dim, (c.heads + 2 * c.kv_heads) * c.head_dim, dtype)
        found["attention"] += [attend(n, c.heads, c.head_dim) for n in flops.lengths(batch["segment_ids"]).tolist()]
        found["other products"] += linear(T, c.heads * c.head_dim, c.dim, dtype) + linear(T, c.dim, c.experts, dtype)
        for rows in filter(None, load_E):
            found["experts"] += linear(rows, c.dim, 2 * c.expert_hidden, dtype)
            found["experts"] += linear(rows, c.expert_hidden, c.dim, dtype)
    return found


def floor(o: Options, passes: bool) -> Callable[[], float]:
    """Build the calls that a step cannot avoid, with or without the passes over memory between the products."""
    calls = [call for part in unavoidable(o).values() for call in part] + (memory(o) if passes else [])

    def step() -> float:
        for call in calls:
            call()
        return float("nan")

    return step


def contestants(o: Options) -> dict[str, Callable[[Options], Callable[[], float]]]:
    """Return what builds each contestant, by name, the floor first."""
    found: dict[str, Callable[[Options], Callable[[], float]]] = {
        "floor": partial(floor, passes=False), "floor-memory": partial(floor, passes=True)
    }  # fmt: skip
    for form in ("step", "layer", "off"):
        found[f"ours-{form}"] = partial(ours, form=form)
    for experts in EXPERTS:
        for autocast in (False, True)[: 1 + (o.dtype == "bfloat16")]:
            for compiled in (False, True):
                name = f"hf-{experts}" + "-autocast" * autocast + "-compiled" * compiled
                found[name] = partial(transformers, experts=experts, autocast=autocast, compiled=compiled)
    return found


# processes that take turns -------------------------------------------------------------------------------------------


def resident(key: str) -> int:
    """Return VmRSS (now) or VmHWM (the peak) of this process in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))


def serve(pipe: Any, name: str, o: Options) -> None:
    """Build a contestant, warm it up, then run one step for every message until one is false."""
    try:
        import torch

        import models  # noqa: F401
        from functional_trainer import backend

        if name.startswith("hf"):
            import transformers  # noqa: F401
        torch.set_num_threads(o.threads)
        backend.keep_host_memory()  # for everybody
        torch.manual_seed(o.seed)
        base = resident("VmRSS")
        limit = int(o.memory_gib * GIB) + base
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
        step = contestants(o)[name](o)
        begin = time.perf_counter()
        losses = [step()]
        first = time.perf_counter() - begin
        losses += [step() for _ in range(o.warmup - 1)]
        life = resident("VmHWM") - base
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from what is resident
        about = {"torch": torch.__version__, "machine": backend.describe(torch.get_default_device())}
        pipe.send({"losses": losses, "first_s": first, "about": about})
        while pipe.recv():
            begin = time.perf_counter()
            step()
            pipe.send(time.perf_counter() - begin)
        steps = resident("VmHWM") - base
        pipe.send({"peak_mib": max(life, steps) / MIB, "steps_mib": steps / MIB})
    except Exception as error:  # reported in the contestant's row
        said = [line for line in str(error).splitlines() if line.strip()] or [""]
        pipe.send({"error": f"{type(error).__name__}: {said[0][:200]}"})


class Contestant:
    """A process that runs one contestant's steps when told to."""

    def __init__(self, name: str, o: Options):
        spawn = multiprocessing.get_context("spawn")
        self.pipe, theirs = spawn.Pipe()
        self.process = spawn.Process(target=serve, args=(theirs, name, o))
        self.process.start()
        theirs.close()
        self.seconds: list[float] = []
        self.row: dict[str, Any] = {"name": name, **self.receive()}

    def receive(self) -> Any:
        """Wait for the process's answer; its end without one is an error too."""
        try:
            return self.pipe.recv()
        except (EOFError, ConnectionError):
            self.process.join()
            return {"error": f"ended with status {self.process.exitcode}"}

    def ask(self, go: bool) -> None:
        """Run one step, or end."""
        if "error" in self.row:
            return
        self.pipe.send(go)
        answer = self.receive()
        if isinstance(answer, float):
            self.seconds.append(answer)
        else:
            self.row |= answer

    def stop(self) -> None:
        self.ask(False)
        self.pipe.close()
        self.process.join()


def judge(rows: list[dict[str, Any]], tolerance: float) -> None:
    """Mark contestants whose first loss is not ours (without ours: the first's) within `tolerance`, relative."""
    losses = {row["name"]: row["losses"][0] for row in rows if "losses" in row and not row["name"].startswith("floor")}
    expected = next(iter(losses.values()), 0.0)
    for row in rows:
        loss = losses.get(row["name"], expected)
        if not abs(loss - expected) <= tolerance * abs(expected):
            row["error"] = f"first loss {loss:.6f}, expected {expected:.6f}"


def time_steps(o: Options, console: Console) -> list[dict[str, Any]]:
    """Run all contestants in turn and return a row for each."""
    names = o.contestants or ("*",)
    wanted = [n for n in contestants(o) if n == "floor" or any(fnmatch(n, pattern) for pattern in names)]
    if o.contestants and len(wanted) == 1:
        raise ValueError(f"--contestants {' '.join(o.contestants)}: none; there are {', '.join(contestants(o))}")
    running = []
    try:
        for name in wanted:  # one after the other: nobody compiles while another does
            console.print(f"starting {name}")
            running.append(Contestant(name, o))
        for round in range(o.rounds):
            for contestant in running[round % len(running) :] + running[: round % len(running)]:
                contestant.ask(True)
    finally:
        for contestant in running:
            contestant.stop()
    for contestant in running:
        if contestant.seconds:
            seconds = contestant.seconds
            contestant.row |= {"median_s": statistics.median(seconds), "min_s": min(seconds), "max_s": max(seconds)}
    rows = [contestant.row for contestant in running]
    judge(rows, 1e-4 if o.dtype == "float32" else 5e-3)
    return rows


def time_depths(o: Options, console: Console) -> list[dict[str, Any]]:
    """Return a row for each form and depth, with the first step and a later one."""
    rows = []
    for form, depths in (("layer", o.layer_depths), ("step", o.step_depths)):
        for layers in depths:
            console.print(f"compiling ours-{form} at {layers} layers")
            at = dataclasses.replace(o, layers=layers, rows=min(o.rows, 2), warmup=2, memory_gib=max(o.memory_gib, 16))
            contestant = Contestant(f"ours-{form}", at)
            contestant.ask(True)
            contestant.stop()
            rows.append(contestant.row | {"layers": layers, "median_s": next(iter(contestant.seconds), None)})
    return rows


def show(o: Options, rows: list[dict[str, Any]], console: Console) -> None:
    """Print one table."""
    about: dict[str, Any] = next((row["about"] for row in rows if "about" in row), {})
    sizes = f"{o.rows} x {o.seq_len} tokens, {o.dtype}, {o.threads} threads, balance {o.balance}"
    table = Table(title=f"{sizes}; {', '.join(map(str, about.values()))}")
    depth = o.what == "depth"
    for head in ("contestant", "layers" if depth else "median s", "step s" if depth else "x floor", "min..max s",
                 "peak MiB", "steps MiB", "first step s", ""):  # fmt: skip
        table.add_column(head, justify="left" if head in ("contestant", "") else "right")
    floor = next((row.get("median_s") for row in rows if row["name"] == "floor"), None)

    def number(row: dict[str, Any], key: str, form: str) -> str:
        return format(row[key], form) if row.get(key) is not None else ""

    for row in rows:
        ratio = f"{row['median_s'] / floor:.2f}" if floor and "median_s" in row else ""
        spread = f"{row['min_s']:.3f}..{row['max_s']:.3f}" if "min_s" in row else ""
        median = number(row, "median_s", ".3f")
        pair = (str(row["layers"]), median) if depth else (median, ratio)
        tail = (number(row, "peak_mib", ".0f"), number(row, "steps_mib", ".0f"), number(row, "first_s", ".1f"))
        table.add_row(row["name"], *pair, spread, *tail, row.get("error", ""))
    console.print(table)


def main(o: Options) -> None:
    """Run, print, write, and fail if a contestant disagreed or broke."""
    if min(o.rounds, o.warmup, o.threads, o.layers, o.rows) < 1 or o.seq_len < 2:
        raise ValueError("--rounds, --warmup, --threads, --layers and --rows are at least 1, --seq-len at least 2")
    if o.what == "depth" and o.contestants:
        raise ValueError("--contestants has no meaning with --what depth: it compiles ours-layer and ours-step")
    os.environ["TORCHINDUCTOR_FORCE_DISABLE_CACHES"] = "1"  # read by the contestants' processes
    os.environ["OMP_NUM_THREADS"] = str(o.threads)
    console = Console(width=150)
    rows = (time_depths if o.what == "depth" else time_steps)(o, console)
    show(o, rows, console)
    if o.json:
        options = dataclasses.asdict(o) | {"json": str(o.json)}
        o.json.write_text(json.dumps({"options": options, "results": rows}, indent=1) + "\n", encoding="utf-8")
    sys.exit(any("error" in row for row in rows))


if __name__ == "__main__":
    config.run(main, Options, doc=__doc__)
