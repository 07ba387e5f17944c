"""Time generation: the built-in engine beside transformers' `generate` and its continuous batching, and vLLM.

    python experiments/benchmarks/decode.py                         # 128 questions, every answer has --tokens
    python experiments/benchmarks/decode.py --stops 24              # answers end at different lengths
    python experiments/benchmarks/decode.py --stops 24 --samples 16 --temperature 1     # groups, as in GRPO
    python experiments/benchmarks/decode.py --model 30b-a3b --layers 4 --dtype bfloat16 \\
        --prompts 16 128 --prompt-tokens 128 1024 --tokens 128      # at real widths, on a GPU

Everybody continues the same prompts, questions of the shipped tasks or random tokens, from the same random weights
until --tokens or the first of --stops ids. Contestants take turns in one process. Tokens a second are those that were
generated, over the time of a whole call, prompts included. Greedy answers must be those of the first contestant that
runs, ours if one is chosen, but for a share, --ties: where two tokens are equally likely, rounding chooses. In 16 bit,
where it soon does, only their first tokens are compared. If more differ, or a contestant breaks, the exit status is 1.

    ours-F         `LocalEngine` with compile F
    hf-generate-X  `generate` with experts implementation X, all prompts as one batch, padded on the left
    hf-static-X    the same with a static cache, for which transformers compiles the model on a GPU
    hf-batch-X     `generate_batch`, continuous batching, with what it sets up kept from call to call
    vllm           vLLM in a process of its own, with log-probabilities as ours has, if --vllm-python is there
    floor          torch's own matrix products and attention on what answers of one length need, tokens shared evenly by
                   the experts, and nothing else: it has no answers, and does not run with --stops
"""

import functools
import importlib.util
import itertools
import json
import logging
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # run from the clone without installing

from rich.console import Console
from rich.table import Table

from experiments.benchmarks import runs, train_gpu
from functional_trainer import config

Ids = list[list[int]]
Prepare = Callable[[Ids], Callable[[], Ids]]
"""From prompts to a call that continues them."""
EXPERTS = ("eager", "batched_mm", "grouped_mm")  # transformers' others come from the hub
KINDS = ("generate", "static", "batch")
SHARE = 0.3
"""Of a GPU's memory, what vLLM may take."""


@dataclass(frozen=True)
class Options:
    device: str = "auto"
    """Device to generate on."""
    model: Literal["tiny", "30b-a3b", "235b-a22b"] = "tiny"
    """Preset whose widths are used."""
    layers: int = 2
    """Depth of the model."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of weights and caches."""
    prompts: tuple[int, ...] = (128,)
    """Prompts of a call, those that are equal counted each; of several numbers each is timed."""
    prompt_tokens: tuple[int, ...] = (0,)
    """Tokens of a prompt, drawn at random (0: a question of the shipped tasks); of several numbers each is timed."""
    samples: int = 1
    """How often each question is asked."""
    temperature: float = 0.0
    """0 is greedy."""
    tokens: int = 32
    """Most tokens of an answer."""
    stops: int = 0
    """How many ids end an answer; a model that was not trained meets them by chance."""
    slots: int = 128
    """Rows of the built-in engine, and of vLLM, at most."""
    look_every: int = 4
    """Tokens that the built-in engine decodes between two looks at which rows have ended."""
    contestants: tuple[str, ...] = ()
    """Names as above, with wildcards; none means all."""
    ties: float | None = None
    """Share of answers that may differ from the first contestant's (default: 0.02; of first tokens in 16 bit 0.5)."""
    rounds: int = 9
    """Timed calls of each contestant."""
    warmup: int = 2
    """Calls before them; the first is reported, with what it compiles."""
    threads: int = os.cpu_count() or 1
    """Threads of PyTorch."""
    seed: int = 0
    """Seed of weights and questions."""
    vllm_python: Path = Path(__file__).resolve().parents[2] / ".venv-vllm" / "bin" / "python"
    """Python that has vLLM; `make test-vllm` makes one for the CPU. If it is not there, this one if it has vLLM."""
    json: Path | None = None
    """Also write the results here."""


def questions(o: Options, count: int, size: int) -> Ids:
    """Return so many prompts: of `size` random tokens, or questions."""
    import models

    if size:
        rng, vocab = random.Random(o.seed), models.PRESETS[o.model]["vocab_size"]
        found = [rng.choices(range(vocab), k=size) for _ in range(count // o.samples)]
    else:
        from experiments.first_light import tasks
        from functional_trainer.data import Tokenizer

        tokenizer = Tokenizer(Path(tasks.__file__).with_name("tokenizer"))
        records, _ = tasks.make(count // o.samples, 0, o.seed)
        found = [tokenizer.prompt(record["messages"][:-1]) for record in records]
    return [ids for ids in found for _ in range(o.samples)]


def ours(o: Options, model: Any, params: Any, stops: list[int], form: Any, prompts: Ids) -> Callable[[], Ids]:
    """Return a call of the built-in engine."""
    from functional_trainer.engines import Sampling
    from functional_trainer.engines.local import LocalEngine

    slots, length = min(o.slots, len(prompts)), max(map(len, prompts)) + o.tokens
    engine = LocalEngine(model, params, slots=slots, length=length, compile=form, look_every=o.look_every)
    sampling = Sampling(o.tokens, o.temperature, stop=tuple(stops))
    return lambda: [sample.tokens for sample in engine.generate(prompts, sampling)]


def floor(o: Options, model: Any, params: Any, prompts: Ids) -> Callable[[], Ids]:
    """Return a call of the products and the attention alone: of all prompts, and of every token but the last."""
    import torch
    import torch.nn.functional as F

    c, embed, rows, width = model.config, params["embed"], len(prompts), max(map(len, prompts))

    @functools.cache
    def new(*shape: int) -> Any:
        return torch.randn(shape, dtype=embed.dtype, device=embed.device)

    keys, values = (new(rows, c.kv_heads, width + o.tokens, c.head_dim).clone() for _ in "kv")

    def operands(n: int) -> tuple[list, list]:
        """Return those of one pass of n tokens, and of its experts."""
        ends = (torch.arange(1, c.experts + 1, device=embed.device) * n * c.top_k // c.experts).int()
        weights, experts = [embed if c.tied else params["unembed"]], []
        for p in params["layers"]:
            qkv = torch.cat([p["attn"][name].flatten(0, 1) for name in "qkv"])
            weights += [qkv, p["attn"]["o"].flatten(1), p["moe"]["router"]]
            experts += [p["moe"]["gate_up"].flatten(1, 2), p["moe"]["down"]]
        sizes = [rows] + [n] * len(weights)  # of a prompt the last token alone is turned to logits
        dense = [(new(size, w.shape[1]), w) for size, w in zip(sizes, weights, strict=False)]
        return dense, [(new(n * c.top_k, w.shape[2]), w.mT, ends) for w in experts]

    def forward(query: Any, seen: int, dense: list, experts: list) -> None:
        for x, w in dense:
            F.linear(x, w)
        for x, w, ends in experts:
            F.grouped_mm(x, w, offs=ends)
        for _ in params["layers"]:
            shown = keys[:, :, :seen], values[:, :, :seen]
            F.scaled_dot_product_attention(query, *shown, is_causal=query.shape[2] > 1, enable_gqa=True)

    prompt, token = operands(sum(map(len, prompts))), operands(rows)
    questions, query = new(rows, c.heads, width, c.head_dim), new(rows, c.heads, 1, c.head_dim)

    def generate() -> Ids:
        forward(questions, width, *prompt)
        for seen in range(width + 1, width + o.tokens):
            forward(query, seen, *token)
        return [[-1] * o.tokens for _ in prompts]

    return generate


def read(o: Options, device: Any, folder: Path, experts: str) -> Any:
    """Return transformers' model."""
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    logging.getLogger("ContinuousBatchingLogger").setLevel(logging.ERROR)
    make = transformers.AutoModelForCausalLM.from_pretrained
    return make(folder, dtype=getattr(torch, o.dtype), experts_implementation=experts).eval().to(device)


def theirs(o: Options, model: Callable[[], Any], stops: list[int], kind: str, prompts: Ids) -> Callable[[], Ids]:
    """Return a call of transformers' `generate`, or of its continuous batching."""
    import torch

    module = model()
    how: dict[str, Any] = {"max_new_tokens": o.tokens, "do_sample": o.temperature > 0, "pad_token_id": 0}
    how |= {"temperature": o.temperature, "top_k": 0} if o.temperature else {}
    if kind == "batch":
        return continuous(o, module, prompts, {"eos_token_id": stops or -1, **how})
    how |= {"cache_implementation": "static"} if kind == "static" else {}
    width = max(map(len, prompts))
    padded = torch.tensor([[0] * (width - len(p)) + p for p in prompts], device=module.device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=module.device)

    def generate() -> Ids:
        made = module.generate(padded, attention_mask=mask, eos_token_id=stops or None, **how)[:, width:].tolist()
        ends = [next((i for i, t in enumerate(row) if t in stops), o.tokens) for row in made]
        return [row[: end + 1] for row, end in zip(made, ends, strict=True)]

    return generate


def continuous(o: Options, module: Any, prompts: Ids, how: dict[str, Any]) -> Callable[[], Ids]:
    """Return a call of transformers' continuous batching, whose caches and graphs are made in the first one.

    What a prompt left is shared within a call of equal prompts; so that a call finds nothing of the one before, such
    calls set everything up anew, and others share nothing.
    """
    import transformers

    keep, page = o.samples == 1, 64  # of 16, 64 and its default, 256, the fastest with answers of many lengths
    module.destroy_cached_continuous_batching_manager()  # that of other sizes
    blocks = len(prompts) * (1 + -(-(max(map(len, prompts)) + o.tokens) // page))  # by default they take all memory
    sizes = transformers.ContinuousBatchingConfig(page_size=page, num_blocks=blocks, allow_block_sharing=not keep)
    given = {"generation_config": transformers.GenerationConfig(**how), "continuous_batching_config": sizes}

    def generate() -> Ids:
        made = module.generate_batch(prompts, persistent_manager=keep, **given)
        return [list(answer.generated_tokens) for answer in made.values()]

    return generate


def vllm(o: Options, python: Path, folder: Path, length: int, eager: bool) -> Callable[[Ids, dict], Ids]:
    """Start vLLM, whose process ends with this one; return a call of prompts and how to sample."""
    job = {"model": str(folder), "length": length, "slots": o.slots, "dtype": o.dtype, "eager": eager, "share": SHARE}
    env = {"OMP_NUM_THREADS": str(o.threads), "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_CPU_KVCACHE_SPACE": "1"}
    env |= {"PYTHONPATH": ""}  # in which our kernels would hide a library of that name
    script, log = Path(__file__).parents[1] / "serving" / "vllm_decode.py", folder / "vllm.log"
    with open(log, "wb") as errors:
        process = subprocess.Popen(
            [str(python), str(script)], env=os.environ | env, text=True, stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, stderr=errors,
        )  # fmt: skip
    assert process.stdin and process.stdout
    ask, answers = process.stdin, process.stdout

    def say(line: dict[str, Any]) -> Any:
        ask.write(json.dumps(line) + "\n")
        ask.flush()
        if not (said := answers.readline()):
            raise RuntimeError(f"{python} ended: {log.read_text(errors='replace')[-2000:]}")
        return json.loads(said)

    say(job)
    return lambda prompts, sampling: say({"prompts": prompts, "sampling": sampling})


def has_vllm(o: Options) -> Path | None:
    """Return a Python that has vLLM, if there is one."""
    if o.vllm_python.exists():
        return o.vllm_python
    return Path(sys.executable) if importlib.util.find_spec("vllm") else None


def contestants(o: Options, device: Any, folder: Path) -> dict[str, Prepare]:
    """Write the weights into a folder; return what prepares each contestant, by name. Weights are read when needed."""
    import torch

    import models
    from functional_trainer import backend

    raw = models.PRESETS[o.model] | {"num_hidden_layers": o.layers, "bos_token_id": None, "eos_token_id": None}
    model = models.from_config(raw)
    params = train_gpu.drawn(model, device, getattr(torch, o.dtype), o.seed)
    models.save_pretrained(model, params, folder)
    stops = [i * raw["vocab_size"] // o.stops for i in range(o.stops)]
    found: dict[str, Prepare] = {
        f"ours-{form}": partial(ours, o, model, params, stops, form) for form in ("off", "layer", "step")
    }
    modules = {name: functools.cache(partial(read, o, device, folder, name)) for name in EXPERTS}
    for kind, experts in itertools.product(KINDS, EXPERTS):
        found[f"hf-{kind}-{experts}"] = partial(theirs, o, modules[experts], stops, kind)
    if python := has_vllm(o):
        longest = max(len(p) for size in o.prompt_tokens for p in questions(o, max(o.prompts), size)) + o.tokens
        eager = not backend.has_own_memory(device)
        start = functools.cache(lambda: vllm(o, python, folder, longest, eager))
        sampling = {"max_tokens": o.tokens, "temperature": o.temperature, "stop_token_ids": stops}
        found["vllm"] = lambda prompts: partial(start(), prompts, sampling)
    return found if stops else found | {"floor": partial(floor, o, model, params)}


def why(problem: Exception) -> str:
    """Say in short what broke a contestant."""
    return f"{type(problem).__name__}: {str(problem).strip()[-300:]}"


def race(o: Options, starts: dict[str, Callable], console: Console) -> list[dict[str, Any]]:
    """Let all take turns, each what its start returns; return a row for each, with the error if it breaks."""
    rows: list[dict[str, Any]] = []
    calls: dict[str, Callable[[], Ids]] = {}
    answers: dict[str, Ids] = {}
    for name, start in starts.items():
        console.print(f"starting {name}")
        rows.append({"name": name, "seconds": []})
        try:
            calls[name] = start()
            begin = time.perf_counter()
            answers[name] = calls[name]()
            rows[-1]["first_s"] = time.perf_counter() - begin
            for _ in range(o.warmup - 1):
                calls[name]()
        except Exception as problem:
            rows[-1]["error"] = why(problem)
    for round in range(o.rounds):
        going = [row for row in rows if "error" not in row]
        turn = round % max(1, len(going))
        for row in going[turn:] + going[:turn]:
            begin = time.perf_counter()
            try:
                calls[row["name"]]()
            except Exception as problem:
                row |= {"error": why(problem), "seconds": []}
                continue
            row["seconds"].append(time.perf_counter() - begin)
    seen = None if o.dtype == "float32" else 1
    going = [row for row in rows if "error" not in row]
    for row in going:
        mine, wanted = answers[row["name"]], answers[going[0]["name"]]
        others = sum(a[:seen] != b[:seen] for a, b in zip(mine, wanted, strict=True))
        row |= {"tokens": sum(map(len, mine)), "others": None if o.temperature or row["name"] == "floor" else others}
        row["median_s"] = statistics.median(row["seconds"])
        row["rate"] = row["tokens"] / row["median_s"]
    return rows


def show(title: str, rows: list[dict[str, Any]], console: Console) -> None:
    """Print one table."""
    table = Table(title=title)
    for head in ("contestant", "tokens/s", "median s", "min..max s", "tokens", "first call s", "not the first's", ""):
        table.add_column(head, justify="left" if head in ("contestant", "") else "right")
    for row in rows:
        cells = [""] * 6
        if row["seconds"]:
            cells = [f"{row['rate']:,.0f}", f"{row['median_s']:.3f}"]
            cells += [f"{min(row['seconds']):.3f}..{max(row['seconds']):.3f}", str(row["tokens"])]
            cells += [f"{row['first_s']:.1f}", "" if row["others"] is None else str(row["others"])]
        table.add_row(row["name"], *cells, row.get("error", ""))
    console.print(table)


def measure(o: Options, device: Any, folder: Path, console: Console) -> list[dict[str, Any]]:
    """Race in every size, but those that have broken; return all rows."""
    import torch

    from functional_trainer import backend

    found = contestants(o, device, folder)
    names, done = runs.chosen(found, o.contestants or ("*",)), list[dict[str, Any]]()
    for count, size in itertools.product(o.prompts, o.prompt_tokens):
        torch.compiler.reset()
        prompts, broken = questions(o, count, size), {row["name"] for row in done if "error" in row}
        rows = race(o, {name: partial(found[name], prompts) for name in names if name not in broken}, console)
        of = f"of {size} tokens" if size else "(questions)"
        sizes = f"{count} prompts {of} x up to {o.tokens} tokens; {o.model}, {o.layers} layers, {o.dtype}"
        show(f"{sizes}; {backend.describe(device)}, torch {torch.__version__}", rows, console)
        done += [{"prompts": count, "prompt_tokens": size, **row} for row in rows]
    return done


def main(o: Options) -> None:
    """Run, print, write, and fail if answers differ or a contestant breaks."""
    sizes = (*o.prompts, o.tokens, o.rounds, o.warmup, o.threads, o.layers, o.samples, o.slots)
    if min(sizes) < 1 or not o.prompts or not o.prompt_tokens or min(o.prompt_tokens) < 0:
        raise ValueError("--prompt-tokens is at least 0, all other numbers at least 1")
    if odd := [count for count in o.prompts if count % o.samples]:
        raise ValueError(f"--prompts {odd[0]} are not some questions, each asked --samples {o.samples} times")
    import torch

    from functional_trainer import backend

    device = backend.setup(o.device)
    torch.set_num_threads(o.threads)
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(o, device, Path(folder), Console(width=150))
    if o.json:
        options = asdict(o) | {"json": str(o.json), "vllm_python": str(o.vllm_python)}
        o.json.write_text(json.dumps({"options": options, "results": rows}, indent=1) + "\n", encoding="utf-8")
    ties = (0.02 if o.dtype == "float32" else 0.5) if o.ties is None else o.ties
    sys.exit(any("error" in row or (row["others"] or 0) > ties * row["prompts"] for row in rows))


if __name__ == "__main__":
    config.run(main, Options, doc=__doc__)
