"""Reinforce one model on the same questions with this project's recipe and with TRL's GRPOTrainer.

    make bench-grpo                                 # makes .venv-trl for TRL, then runs this with every contestant
    make bench-grpo ARGS="--model runs/grpo/start/hf --tokens 16 --json grpo.json"
    python experiments/benchmarks/grpo.py --preset 30b-a3b --contestants 'ours-layer*-bf16' --tokens 128    # on a GPU

Contestants are whole processes, started as a user starts them, one at a time, in turns. All answer the same 32
questions 16 times a step at temperature 1, with at most --tokens tokens, score answers by exact match, and make one
update of DAPO's objective with AdamW. Without --model the model is random (256 wide, 16 experts, top-4, or a preset's
widths), and so its answers seldom end before --tokens.

    ours-F[-bf16]      qwen3_moe_grpo.py --compile F, computing in bfloat16
    ours-steps[-bf16]  ours-layer, the decoding of a token compiled as a whole
    trl-generate-X     GRPOTrainer at its best for the device (no recomputation; on a CPU float32, on a GPU weights and
                       all in bfloat16, 64 answers a pass), `generate` for rollouts, experts implementation X
    trl-batch-X        the same with transformers' continuous batching
    trl-vllm           the same with vLLM in TRL's process, on a GPU, where TRL's Python has it
    trl-small          trl-generate-grouped_mm in passes of 64 answers
    trl-defaults       recomputation, bfloat16, and transformers' default experts

Samples a second are those of a step over the time between the ends of two steps, medians over the steps after the
first two of all runs. `generation` is the share of a step that rollouts and rewards take in ours. Memory is the
process's on a CPU, and what was allocated on a GPU.
"""

import json
import shutil
import statistics
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # run from the clone without installing

from rich.console import Console
from rich.table import Table

from experiments.benchmarks import runs, train_gpu
from functional_trainer import config

LR, PROMPTS, GROUP, SKIPPED = 1e-4, 32, 16, 2
SAMPLES = PROMPTS * GROUP
SAME = {
    "report_to": "none", "num_generations": GROUP, "learning_rate": LR, "save_strategy": "no",
    "lr_scheduler_type": "constant", "generation_batch_size": SAMPLES, "temperature": 1.0, "loss_type": "dapo",
    "epsilon_high": 0.28, "weight_decay": 0.0, "adam_beta2": 0.95, "logging_steps": 10,
}  # fmt: skip
SMALL = {"per_device_train_batch_size": 64, "gradient_accumulation_steps": SAMPLES // 64}
EXPERTS = ("eager", "grouped_mm")  # batched_mm copies a matrix for every token; transformers' others come from the hub
OURS = {
    "off": ("--compile", "off"),
    "layer": ("--compile", "layer"),
    "off-bf16": ("--compile", "off", "--dtype", "bfloat16"),
    "layer-bf16": ("--compile", "layer", "--dtype", "bfloat16"),
    "steps": ("--compile", "layer", "--rollout.compile", "step"),
    "steps-bf16": ("--compile", "layer", "--dtype", "bfloat16", "--rollout.compile", "step"),
}


def theirs(gpu: bool) -> dict[str, dict[str, Any]]:
    """Return TRL's arguments of each contestant."""
    best: dict[str, Any] = {"gradient_checkpointing": False, "bf16": gpu, "use_cpu": not gpu}
    best |= SMALL if gpu else {"per_device_train_batch_size": SAMPLES}

    def experts(name: str) -> dict[str, Any]:
        return best | {"model_init_kwargs": {"experts_implementation": name, "dtype": ("float32", "bfloat16")[gpu]}}

    batch, usual = {"use_transformers_continuous_batching": True}, {"per_device_train_batch_size": 8}
    found = {f"generate-{name}": experts(name) for name in EXPERTS}
    found |= {f"batch-{name}": experts(name) | batch for name in EXPERTS}
    found |= {"vllm": experts("grouped_mm") | {"use_vllm": True}} if gpu else {}
    found["small"] = experts("grouped_mm") | SMALL
    return found | {"defaults": usual | {"gradient_accumulation_steps": SAMPLES // 8, "use_cpu": not gpu}}


@dataclass(frozen=True)
class Options:
    contestants: tuple[str, ...] = ("*",)
    """Names as in the table, with wildcards ("ours-*")."""
    rounds: int = 2
    """Runs of each contestant."""
    steps: int = 8
    """Steps of a run; the first two are not counted."""
    tokens: int = 32
    """Most tokens of an answer."""
    device: str = "auto"
    """Device to train on."""
    layers: int = 2
    """Depth of the random model."""
    preset: Literal["", "tiny", "30b-a3b", "235b-a22b"] = ""
    """Preset whose widths the random model has."""
    model: Path | None = None
    """A Hugging Face folder, with tokenizer, instead of a random model."""
    seed: int = 0
    """Seed of weights and questions."""
    folder: Path = Path("runs/bench-grpo")
    """Where data, model, caches and runs go."""
    peer_python: Path = runs.PEER
    """Python with TRL."""
    json: Path | None = None
    """Also write the results here."""


def prepare(o: Options) -> bool:
    """Write train.jsonl, one question and its answer a row, and model/; say whether the device has its own memory."""
    import torch

    import models
    from experiments.first_light import tasks
    from functional_trainer import backend

    device = backend.setup(o.device)
    o.folder.mkdir(parents=True, exist_ok=True)
    runs.write(o.folder, "train", tasks.make(PROMPTS * o.steps, 1, o.seed)[0])
    if o.model:
        shutil.copytree(o.model, o.folder / "model", dirs_exist_ok=True)
    elif o.preset:
        raw = models.PRESETS[o.preset] | {"num_hidden_layers": o.layers, "bos_token_id": None, "eos_token_id": None}
        model = models.from_config(raw)
        shutil.copytree(Path(tasks.__file__).with_name("tokenizer"), o.folder / "model", dirs_exist_ok=True)
        models.save_pretrained(model, train_gpu.drawn(model, device, torch.bfloat16, o.seed), o.folder / "model")
    else:
        runs.make_model(o.folder, o.layers, o.seed)
    return backend.has_own_memory(device)


def contestants(o: Options, gpu: bool) -> dict[str, Callable[[Path], list[str]]]:
    """Return what makes the command of each contestant, given its run folder."""
    given = {
        "--steps": o.steps, "--batch": PROMPTS, "--rollout.num-generations": GROUP, "--optim.lr": LR, "--answers": 0,
        "--rollout.max-completion-length": o.tokens, "--rollout.max-disagreement": 1, "--save-every": 0,
        "--rollout.slots": SAMPLES,
        "--data.seq-len": max(256, 64 + o.tokens), "--device": o.device,
    }  # fmt: skip
    flags = [str(part) for pair in given.items() for part in pair]
    same = SAME | {"max_completion_length": o.tokens, "max_steps": o.steps}

    def ours(more: tuple[str, ...]) -> Callable[[Path], list[str]]:
        return lambda out: runs.ours(o.folder, out, [*flags, *more], "qwen3_moe_grpo")

    def trl(more: dict[str, Any]) -> Callable[[Path], list[str]]:
        return lambda out: runs.trl(o.folder, out, o.peer_python, same | more, "trl_grpo")

    return {f"ours-{name}": ours(more) for name, more in OURS.items()} | {
        f"trl-{name}": trl(more) for name, more in theirs(gpu).items()
    }


def run(o: Options, name: str, gpu: bool) -> dict[str, Any]:
    """Run one contestant once; return the seconds of its counted steps, and tokens an answer has."""
    out = o.folder / name
    seen = runs.watch(contestants(o, gpu)[name](out), out, runs.caches(o.folder / f"{name}-caches", gpu))
    for large in ("checkpoints", "hf"):
        shutil.rmtree(out / large, ignore_errors=True)
    rows = seen["rows"]
    seconds = [b["s"] - a["s"] for a, b in zip(rows, rows[1:], strict=False)][SKIPPED - 1 :]
    generation = [row["rollout_s"] for row in rows[SKIPPED:] if "rollout_s" in row]
    tokens = [
        row["generated_tokens"] / row["samples"] if "samples" in row else row["completions"]["mean_length"]
        for row in rows
    ]
    peak = max(row.get("memory_bytes", 0) for row in rows) / 2**20 if gpu else seen["peak_mib"]
    return {
        "name": name, "seconds": seconds, "generation": generation, "tokens": statistics.mean(tokens),
        "first_s": rows[0]["s"], "peak_mib": peak, "others_s": seen["others_s"], "wall_s": seen["wall_s"],
    }  # fmt: skip


def collect(o: Options, names: list[str], gpu: bool, console: Console) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Let all run in turns; return what was seen of each run, and why contestants broke, which run no more."""
    done, broken = list[dict[str, Any]](), dict[str, str]()
    for _ in range(o.rounds):
        for name in names:
            if name not in broken:
                console.print(name)
                try:
                    done.append(run(o, name, gpu))
                except RuntimeError as problem:
                    broken[name] = str(problem)[-300:]
    return done, broken


def summary(done: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return a row for each contestant."""
    rows = []
    for name in dict.fromkeys(one["name"] for one in done):
        mine = [one for one in done if one["name"] == name]
        step = statistics.median(s for one in mine for s in one["seconds"])
        rollouts = [s for one in mine for s in one["generation"]]
        row = {"name": name, "samples_per_s": SAMPLES / step, "step_s": step, "runs": len(mine)}
        row["generation"] = statistics.median(rollouts) / step if rollouts else None
        row |= {
            key: statistics.median(one[key] for one in mine) for key in ("tokens", "first_s", "peak_mib", "others_s")
        }
        rows.append(row)
    return rows


def show(o: Options, rows: list[dict[str, Any]], console: Console) -> None:
    """Print one table."""
    table = Table(title=f"{PROMPTS} questions x {GROUP} answers of at most {o.tokens} tokens a step")
    for head in ("contestant", "samples/s", "s a step", "generation", "tokens an answer", "first step s", "peak MiB",
                 "runs", "others' CPU s", ""):  # fmt: skip
        table.add_column(head, justify="left" if head in ("contestant", "") else "right")
    for row in rows:
        cells = [""] * 8
        if "error" not in row:
            share = "" if row["generation"] is None else f"{row['generation']:.0%}"
            cells = [f"{row['samples_per_s']:,.0f}", f"{row['step_s']:.2f}", share, f"{row['tokens']:.1f}"]
            cells += [f"{row['first_s']:.1f}", f"{row['peak_mib']:,.0f}", str(row["runs"]), f"{row['others_s']:.0f}"]
        table.add_row(row["name"], *cells, row.get("error", ""))
    console.print(table)


def main(o: Options) -> None:
    """Prepare what all share, run everybody in turns, print, write, and fail if a contestant did."""
    if o.steps <= SKIPPED or min(o.rounds, o.tokens, o.layers) < 1:
        raise ValueError(f"--steps is above {SKIPPED}, --rounds, --tokens and --layers are at least 1")
    runs.chosen(contestants(o, True), o.contestants)  # before a model is made
    console = Console(width=150)
    with runs.apart() as apart:
        gpu = apart(prepare, o)
    wanted = runs.chosen(contestants(o, gpu), o.contestants)
    done, broken = collect(o, wanted, gpu, console)
    rows = summary(done) + [{"name": name, "error": why} for name, why in broken.items()]
    show(o, rows, console)
    if o.json:
        options = asdict(o) | {key: str(getattr(o, key)) for key in ("folder", "peer_python", "json", "model")}
        o.json.write_text(json.dumps({"options": options, "results": rows, "runs": done}, indent=1) + "\n", "utf-8")
    sys.exit(bool(broken))


if __name__ == "__main__":
    config.run(main, Options, doc=__doc__)
