"""Time generation on the CPU: the built-in engine beside transformers' `generate` and its continuous batching.

    python experiments/benchmarks/decode_cpu.py                         # 128 questions, every answer has --tokens
    python experiments/benchmarks/decode_cpu.py --stops 24              # answers end at different lengths
    python experiments/benchmarks/decode_cpu.py --stops 24 --samples 16 --temperature 1     # groups, as in GRPO

Everybody continues the same prompts, questions of the shipped tasks, from the same random weights of the tiny preset
until --tokens or the first of --stops ids. Contestants take turns in one process. Tokens a second are those that were
generated, over the time of a whole call, prompts included. Greedy answers must be ours, but for --ties of them: where
two tokens are equally likely in float32, rounding chooses. If more differ the exit status is 1.

    ours-F         `LocalEngine` with compile F
    hf-generate-X  `generate` with experts implementation X, all prompts as one batch, padded on the left
    hf-batch-X     `generate_batch`, continuous batching, the same
    vllm           vLLM in a process of its own, with log-probabilities as ours has, if --vllm-python is there
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # run from the clone without installing

from rich.console import Console
from rich.table import Table

from functional_trainer import config

Ids = list[list[int]]
EXPERTS = ("eager", "batched_mm", "grouped_mm")  # transformers' others need a GPU


@dataclass(frozen=True)
class Options:
    prompts: int = 128
    """Prompts of a call, those that are equal counted each."""
    samples: int = 1
    """How often each question is asked."""
    temperature: float = 0.0
    """0 is greedy."""
    tokens: int = 32
    """Most tokens of an answer."""
    stops: int = 0
    """How many ids end an answer; a model that was not trained meets them by chance."""
    slots: int = 128
    """Rows of the built-in engine."""
    look_every: int = 4
    """Tokens that the built-in engine decodes between two looks at which rows have ended."""
    contestants: tuple[str, ...] = ()
    """Names as above, with wildcards; none means all."""
    ties: int = 2
    """Answers that may differ from ours."""
    rounds: int = 9
    """Timed calls of each contestant."""
    warmup: int = 2
    """Calls before them; the first is reported, with what it compiles."""
    threads: int = os.cpu_count() or 1
    """Threads of PyTorch."""
    layers: int = 2
    """Depth of the model."""
    seed: int = 0
    """Seed of weights and questions."""
    vllm_python: Path = Path(__file__).resolve().parents[2] / ".venv-vllm" / "bin" / "python"
    """Python that has vLLM; `make test-vllm` makes it."""
    json: Path | None = None
    """Also write the results here."""


def questions(o: Options) -> Ids:
    """Return the prompts."""
    from experiments.first_light import tasks
    from functional_trainer.data import Tokenizer

    tokenizer = Tokenizer(Path(tasks.__file__).with_name("tokenizer"))
    records, _ = tasks.make(o.prompts // o.samples, 0, o.seed)
    return [tokenizer.prompt(record["messages"][:-1]) for record in records for _ in range(o.samples)]


def ours(o: Options, model: Any, params: Any, prompts: Ids, stops: list[int], form: Any) -> Callable[[], Ids]:
    """Return a call of the built-in engine."""
    from functional_trainer.engines import Sampling
    from functional_trainer.engines.local import LocalEngine

    length = max(map(len, prompts)) + o.tokens
    engine = LocalEngine(model, params, slots=o.slots, length=length, compile=form, look_every=o.look_every)
    sampling = Sampling(o.tokens, o.temperature, stop=tuple(stops))
    return lambda: [sample.tokens for sample in engine.generate(prompts, sampling)]


def theirs(o: Options, folder: Path, prompts: Ids, stops: list[int], experts: str, batch: bool) -> Callable[[], Ids]:
    """Return a call of transformers' `generate`, or of its continuous batching."""
    import torch
    import transformers

    make = transformers.AutoModelForCausalLM.from_pretrained
    model = make(folder, dtype=torch.float32, experts_implementation=experts).eval()
    how: dict[str, Any] = {"max_new_tokens": o.tokens, "do_sample": o.temperature > 0, "pad_token_id": 0}
    how |= {"temperature": o.temperature, "top_k": 0} if o.temperature else {}
    width = max(map(len, prompts))
    padded = torch.tensor([[0] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])

    def generate() -> Ids:
        made = model.generate(padded, attention_mask=mask, eos_token_id=stops or None, **how)[:, width:].tolist()
        ends = [next((i for i, t in enumerate(row) if t in stops), o.tokens) for row in made]
        return [row[: end + 1] for row, end in zip(made, ends, strict=True)]

    def continuous() -> Ids:
        given = transformers.GenerationConfig(eos_token_id=stops or -1, **how)
        made = model.generate_batch(prompts, generation_config=given)
        by_number = sorted(made.items(), key=lambda item: int(item[0].rpartition("_")[2]))
        return [list(answer.generated_tokens) for _, answer in by_number]

    return continuous if batch else generate


def vllm(o: Options, folder: Path, prompts: Ids, stops: list[int]) -> Callable[[], Ids]:
    """Return a call of vLLM, whose process ends with this one."""
    sampling = {"max_tokens": o.tokens, "temperature": o.temperature, "stop_token_ids": stops}
    job = {"model": str(folder), "length": max(map(len, prompts)) + o.tokens, "slots": o.slots, "prompts": prompts}
    env = {"OMP_NUM_THREADS": str(o.threads), "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_CPU_KVCACHE_SPACE": "1"}
    env |= {"PYTHONPATH": ""}  # in which our kernels would hide a library of that name
    script, log = Path(__file__).parents[1] / "serving" / "vllm_decode.py", folder / "vllm.log"
    with open(log, "wb") as errors:
        process = subprocess.Popen(
            [str(o.vllm_python), str(script)], env=os.environ | env, text=True, stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, stderr=errors,
        )  # fmt: skip
    assert process.stdin and process.stdout
    ask, answers = process.stdin, process.stdout

    def say(line: str) -> str:
        ask.write(line + "\n")
        ask.flush()
        if not (said := answers.readline()):
            raise RuntimeError(f"{o.vllm_python} ended: {log.read_text(errors='replace')[-2000:]}")
        return said

    say(json.dumps(job | {"sampling": sampling}))
    return lambda: json.loads(say(""))


def contestants(o: Options, folder: Path) -> dict[str, Callable[[], Callable[[], Ids]]]:
    """Write the weights into a folder; return what builds each contestant, by name."""
    import models

    vocab = models.PRESETS["tiny"]["vocab_size"]
    model = models.from_config(models.PRESETS["tiny"] | {"num_hidden_layers": o.layers, "eos_token_id": None})
    params, prompts = model.init(o.seed), questions(o)
    models.save_pretrained(model, params, folder)
    stops = [i * vocab // o.stops for i in range(o.stops)]
    forms = ("off", "layer", "step")
    found: dict[str, Any] = {f"ours-{form}": partial(ours, o, model, params, prompts, stops, form) for form in forms}
    for name, batch in (("generate", False), ("batch", True)):
        for experts in EXPERTS:
            found[f"hf-{name}-{experts}"] = partial(theirs, o, folder, prompts, stops, experts, batch)
    return found | ({"vllm": partial(vllm, o, folder, prompts, stops)} if o.vllm_python.exists() else {})


def race(o: Options, calls: dict[str, Callable[[], Ids]], console: Console) -> list[dict[str, Any]]:
    """Let all take turns; return a row for each."""
    rows: list[dict[str, Any]] = []
    answers: dict[str, Ids] = {}
    for name, call in calls.items():
        console.print(f"starting {name}")
        begin = time.perf_counter()
        answers[name] = call()
        first = time.perf_counter() - begin
        for _ in range(o.warmup - 1):
            call()
        rows.append({"name": name, "first_s": first, "tokens": sum(map(len, answers[name])), "seconds": []})
    wanted = next(iter(answers.values()))
    for row in rows:
        pairs = zip(answers[row["name"]], wanted, strict=True)
        row["others"] = None if o.temperature else sum(a != b for a, b in pairs)
    for round in range(o.rounds):
        turn = round % len(rows)
        for row in rows[turn:] + rows[:turn]:
            begin = time.perf_counter()
            calls[row["name"]]()
            row["seconds"].append(time.perf_counter() - begin)
    for row in rows:
        row["median_s"] = statistics.median(row["seconds"])
        row["rate"] = row["tokens"] / row["median_s"]
    return rows


def show(o: Options, rows: list[dict[str, Any]], console: Console) -> None:
    """Print one table."""
    table = Table(title=f"{o.prompts} prompts x up to {o.tokens} tokens, {o.layers} layers, {o.threads} threads")
    for head in ("contestant", "tokens/s", "median s", "min..max s", "tokens", "first call s", "answers not ours"):
        table.add_column(head, justify="left" if head == "contestant" else "right")
    for row in rows:
        spread = f"{min(row['seconds']):.3f}..{max(row['seconds']):.3f}"
        numbers = f"{row['rate']:,.0f}", f"{row['median_s']:.3f}", spread, f"{row['tokens']}", f"{row['first_s']:.1f}"
        table.add_row(row["name"], *numbers, "" if row["others"] is None else str(row["others"]))
    console.print(table)


def main(o: Options) -> None:
    """Run, print, write, and fail if answers differ."""
    if min(o.prompts, o.tokens, o.rounds, o.warmup, o.threads, o.layers) < 1:
        raise ValueError("--prompts, --tokens, --rounds, --warmup, --threads and --layers are at least 1")
    import torch

    torch.set_num_threads(o.threads)
    console = Console(width=150)
    with tempfile.TemporaryDirectory() as folder:
        patterns = o.contestants or ("*",)
        found = contestants(o, Path(folder))
        calls = {name: build() for name, build in found.items() if any(fnmatch(name, p) for p in patterns)}
    if not calls:
        raise ValueError(f"--contestants {' '.join(o.contestants)}: none; there are {', '.join(found)}")
    rows = race(o, calls, console)
    show(o, rows, console)
    if o.json:
        options = asdict(o) | {"json": str(o.json), "vllm_python": str(o.vllm_python)}
        o.json.write_text(json.dumps({"options": options, "results": rows}, indent=1) + "\n", encoding="utf-8")
    sys.exit(any((row["others"] or 0) > o.ties for row in rows))


if __name__ == "__main__":
    config.run(main, Options, doc=__doc__)
