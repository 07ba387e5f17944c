"""Reinforce one model on the same questions with this project's recipe and with TRL's GRPOTrainer, on a CPU.

    make bench-grpo                                 # makes .venv-trl for TRL, then runs this with every contestant
    make bench-grpo ARGS="--model runs/grpo/start/hf --tokens 16 --json grpo.json"

Contestants are whole processes, started as a user starts them, one at a time, in turns. All answer the same 32
questions 16 times a step at temperature 1, with at most --tokens tokens, score answers by exact match, and make one
update of DAPO's objective with AdamW. Without --model the model is random (256 wide, 16 experts, top-4), and
so its answers seldom end before --tokens.

    ours-F[-bf16]    qwen3_moe_grpo.py --compile F, computing in bfloat16
    trl-generate-X   GRPOTrainer at its best for a CPU (float32, no recomputation), `generate` for rollouts,
                     experts implementation X
    trl-batch-X      the same with transformers' continuous batching
    trl-small        trl-generate-grouped_mm in passes of 64 answers
    trl-defaults     recomputation, bfloat16, and transformers' default experts

Samples a second are those of a step over the time between the ends of two steps, medians over the steps after the
first two of all runs. `generation` is the share of a step that rollouts and rewards take in ours.
"""

import json
import shutil
import statistics
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # run from the clone without installing

from rich.console import Console
from rich.table import Table

from experiments.benchmarks import runs
from functional_trainer import config

LR, PROMPTS, GROUP, SKIPPED = 1e-4, 32, 16, 2
SAMPLES = PROMPTS * GROUP
SAME = {
    "use_cpu": True, "report_to": "none", "num_generations": GROUP, "learning_rate": LR, "save_strategy": "no",
    "lr_scheduler_type": "constant", "generation_batch_size": SAMPLES, "temperature": 1.0, "loss_type": "dapo",
    "epsilon_high": 0.28, "weight_decay": 0.0, "adam_beta2": 0.95, "logging_steps": 10,
}  # fmt: skip
BEST = {"bf16": False, "gradient_checkpointing": False, "per_device_train_batch_size": SAMPLES}
SMALL = {"per_device_train_batch_size": 64, "gradient_accumulation_steps": SAMPLES // 64}
EXPERTS = ("eager", "grouped_mm")  # batched_mm copies a matrix for every token; transformers' others need a GPU


def experts(name: str) -> dict[str, Any]:
    """Return arguments that choose an implementation of the experts."""
    return {"model_init_kwargs": {"experts_implementation": name, "dtype": "float32"}}


TRL: dict[str, dict[str, Any]] = {
    **{f"generate-{name}": BEST | experts(name) for name in EXPERTS},
    **{f"batch-{name}": BEST | experts(name) | {"use_transformers_continuous_batching": True} for name in EXPERTS},
    "small": BEST | SMALL | experts("grouped_mm"),
    "defaults": {"per_device_train_batch_size": 8, "gradient_accumulation_steps": SAMPLES // 8},
}
OURS = {
    "off": ("--compile", "off"),
    "layer": ("--compile", "layer"),
    "off-bf16": ("--compile", "off", "--dtype", "bfloat16"),
}


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
    layers: int = 2
    """Depth of the random model."""
    model: Path | None = None
    """A Hugging Face folder, with tokenizer, instead of a random model."""
    seed: int = 0
    """Seed of weights and questions."""
    folder: Path = Path("runs/grpo_cpu")
    """Where data, model, caches and runs go."""
    peer_python: Path = runs.PEER
    """Python with TRL."""
    json: Path | None = None
    """Also write the results here."""


def prepare(o: Options) -> None:
    """Write train.jsonl, one question and its answer a row, and model/."""
    from experiments.first_light import tasks

    o.folder.mkdir(parents=True, exist_ok=True)
    runs.write(o.folder, "train", tasks.make(PROMPTS * o.steps, 1, o.seed)[0])
    if o.model is None:
        runs.make_model(o.folder, o.layers, o.seed)
    else:
        shutil.copytree(o.model, o.folder / "model", dirs_exist_ok=True)


def contestants(o: Options) -> dict[str, Callable[[Path], list[str]]]:
    """Return what makes the command of each contestant, given its run folder."""
    given = {
        "--steps": o.steps, "--batch": PROMPTS, "--rollout.num-generations": GROUP, "--optim.lr": LR, "--answers": 0,
        "--rollout.max-completion-length": o.tokens, "--rollout.max-disagreement": 1, "--save-every": 0,
    }  # fmt: skip
    flags = [str(part) for pair in given.items() for part in pair]
    same = SAME | {"max_completion_length": o.tokens, "max_steps": o.steps}

    def ours(more: tuple[str, ...]) -> Callable[[Path], list[str]]:
        return lambda out: runs.ours(o.folder, out, [*flags, *more], "qwen3_moe_grpo")

    def trl(more: dict[str, Any]) -> Callable[[Path], list[str]]:
        return lambda out: runs.trl(o.folder, out, o.peer_python, same | more, "trl_grpo")

    return {f"ours-{name}": ours(more) for name, more in OURS.items()} | {
        f"trl-{name}": trl(more) for name, more in TRL.items()
    }


def run(o: Options, name: str) -> dict[str, Any]:
    """Run one contestant once; return the seconds of its counted steps, and tokens an answer has."""
    seen = runs.watch(contestants(o)[name](o.folder / name), o.folder / name, runs.caches(o.folder / f"{name}-caches"))
    rows = seen["rows"]
    seconds = [b["s"] - a["s"] for a, b in zip(rows, rows[1:], strict=False)][SKIPPED - 1 :]
    generation = [row["rollout_s"] for row in rows[SKIPPED:] if "rollout_s" in row]
    tokens = [
        row["generated_tokens"] / row["samples"] if "samples" in row else row["completions"]["mean_length"]
        for row in rows
    ]
    return {
        "name": name, "seconds": seconds, "generation": generation, "tokens": statistics.mean(tokens),
        "first_s": rows[0]["s"], "peak_mib": seen["peak_mib"], "others_s": seen["others_s"], "wall_s": seen["wall_s"],
    }  # fmt: skip


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
                 "runs", "others' CPU s"):  # fmt: skip
        table.add_column(head, justify="left" if head == "contestant" else "right")
    for row in rows:
        share = "" if row["generation"] is None else f"{row['generation']:.0%}"
        table.add_row(
            row["name"], f"{row['samples_per_s']:,.0f}", f"{row['step_s']:.2f}", share, f"{row['tokens']:.1f}",
            f"{row['first_s']:.1f}", f"{row['peak_mib']:,.0f}", str(row["runs"]), f"{row['others_s']:.0f}",
        )  # fmt: skip
    console.print(table)


def main(o: Options) -> None:
    """Prepare what all share, run everybody in turns, print, write."""
    wanted = runs.chosen(contestants(o), o.contestants)
    if o.steps <= SKIPPED or min(o.rounds, o.tokens, o.layers) < 1:
        raise ValueError(f"--steps is above {SKIPPED}, --rounds, --tokens and --layers are at least 1")
    console = Console(width=150)
    with runs.apart() as apart:
        apart(prepare, o)
    done = []
    for _ in range(o.rounds):
        for name in wanted:
            console.print(name)
            done.append(run(o, name))
    rows = summary(done)
    show(o, rows, console)
    if o.json:
        options = asdict(o) | {key: str(getattr(o, key)) for key in ("folder", "peer_python", "json", "model")}
        o.json.write_text(json.dumps({"options": options, "results": rows, "runs": done}, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    config.run(main, Options, doc=__doc__)
