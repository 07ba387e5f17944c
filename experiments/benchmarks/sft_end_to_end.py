"""Fine-tune one model on one chat file, start to end, with this project's recipe and with TRL's SFTTrainer.

    make bench-trl                                  # makes .venv-trl for TRL, then runs this with every contestant
    make bench-trl ARGS="--rounds 3 --folder runs/end_to_end --json end_to_end.json"

Contestants are whole processes, started as a user starts them, one at a time, in turns. All train a random Qwen3-MoE
(256 wide, 4 layers, 16 experts, top-4) for one epoch on the same conversations of 1 to 12 questions, on the assistants'
tokens alone, with transformers' router balance loss, AdamW and the same peak, warm-up and decay of the learning rate,
and evaluate and save at eighths of the run. What they save is judged by one measure: the loss that plain transformers
has on the held-out file, outside the clock.

    ours-F[-bf16]    qwen3_moe_sft.py --compile F, 8 packed rows of 256 tokens a step, about 20 conversations
    trl-packed       SFTTrainer at its best for a CPU (float32, no recomputation), packed, best fit decreasing, in
                     8 rows of 256 tokens a step, in passes of 2 rows: a pass is one long sequence to attention
    trl-wrapped      its other packing: 8 full rows of 256 tokens, conversations cut anywhere and not kept apart
    trl-grouped      no packing: 24 conversations of similar length a step, padded
    trl-defaults     SFTConfig's defaults: 8 conversations a step, padded, recomputation, bfloat16
    trl-small        trl-grouped with 8 conversations a step
    ours-small       ours-layer with 3 rows a step, about 8 conversations

A smaller step learns more from a token at this learning rate, so time to a loss compares steps of one size.

The first run of each is cold: nothing has been compiled, tokenized or converted. The `--rounds` after it find what the
runs before left on disk, and their medians are shown. A run with the same --folder adds to the runs in it. Runs during
which other processes took more than --quiet of the time are not counted; PyTorch's compile workers are among those.
"""

import dataclasses
import json
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # run from the clone without installing

from rich.console import Console
from rich.table import Table

from experiments.benchmarks import runs
from functional_trainer import config

LR, SEQ_LEN, PARTS = 1e-3, 256, 8
PER_ROW = 2.5  # conversations in a packed row

# What TRL is given. The first is for all: what the comparison fixes, and what a CPU without a hub needs.
SAME = {
    "use_cpu": True, "report_to": "none", "assistant_only_loss": True, "num_train_epochs": 1, "learning_rate": LR,
    "lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr_rate": 0.1}, "warmup_steps": 0.1,
    "weight_decay": 0.1, "adam_beta2": 0.95, "max_length": SEQ_LEN, "eval_strategy": "steps", "save_only_model": True,
}  # fmt: skip
BEST = {"bf16": False, "gradient_checkpointing": False}
GROUPED = {"train_sampling_strategy": "group_by_length"}
PACKS = {"packing": True, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
TRL: dict[str, tuple[float, dict[str, Any]]] = {  # conversations a step, arguments of SFTConfig
    "packed": (8 * PER_ROW, BEST | PACKS | {"per_device_eval_batch_size": 2}),
    "wrapped": (8 * PER_ROW, BEST | {"packing": True, "packing_strategy": "wrapped"}),
    "grouped": (24, BEST | GROUPED | {"per_device_train_batch_size": 24}),
    "defaults": (8, {}),
    "small": (8, BEST | GROUPED),
}
OURS: dict[str, tuple[int, tuple[str, ...]]] = {  # rows a step, flags
    "layer": (8, ()),
    "layer-bf16": (8, ("--dtype", "bfloat16")),
    "off": (8, ("--compile", "off")),
    "off-bf16": (8, ("--compile", "off", "--dtype", "bfloat16")),
    "small": (3, ()),
}


@dataclass(frozen=True)
class Options:
    contestants: tuple[str, ...] = ("*",)
    """Names as in the table, with wildcards ("ours-*")."""
    rounds: int = 3
    """Runs of each contestant after its cold one."""
    rows: int = 2000
    """Conversations to train on."""
    held_out: int = 64
    """Conversations to measure the loss on, at most 170."""
    layers: int = 4
    """Depth of the model."""
    target: float = 1.5
    """Held-out loss, in nats a token, to which the time is given."""
    quiet: float = 0.15
    """Most CPU time of other processes during a run that counts, as a share of the run's time."""
    seed: int = 0
    """Seed of the weights and the conversations."""
    folder: Path = Path("runs/end_to_end")
    """Where data, model, caches and runs go."""
    peer_python: Path = runs.PEER
    """Python with TRL."""
    json: Path | None = None
    """Also write the results here."""


def contestants(o: Options) -> dict[str, Callable[[Path], list[str]]]:
    """Return what makes the command of each contestant, given its run folder."""

    def every(conversations: float) -> int:
        return max(1, round(o.rows / conversations / PARTS))

    def ours(batch: int, flags: tuple[str, ...]) -> Callable[[Path], list[str]]:
        n = str(every(batch * PER_ROW))
        given = ["--data.eval", str(o.folder / "eval.jsonl"), "--steps", "0", "--batch", str(batch), "--balance", "hf"]
        given += ["--optim.lr", str(LR), "--eval-every", n, "--save-every", n, "--keep", "99", *flags]
        return lambda out: runs.ours(o.folder, out, given)

    def trl(conversations: float, options: dict[str, Any]) -> Callable[[Path], list[str]]:
        n = every(conversations)
        given = SAME | {"eval_steps": n, "save_steps": n} | options
        return lambda out: runs.trl(o.folder, out, o.peer_python, given)

    return {f"ours-{name}": ours(*how) for name, how in OURS.items()} | {
        f"trl-{name}": trl(*how) for name, how in TRL.items()
    }


def held_out_loss(weights: Path, place: Path) -> float:
    """Return the mean negative log-likelihood, in nats, of the assistants' tokens of eval.jsonl: plain transformers.

    `weights` is a Hugging Face folder, or a checkpoint of ours, which is converted.
    """
    import torch
    import transformers

    if (weights / "extra.json").exists():
        import models
        from functional_trainer import checkpoint, tree

        model = models.from_config(models.read_config(place / "model"))
        params = model.init(0)
        checkpoint.load(weights, tree.flatten({"params": params}), "params/")
        models.save_pretrained(model, params, weights / "hf")
        weights = weights / "hf"
    transformers.utils.logging.disable_progress_bar()
    tokenizer = transformers.AutoTokenizer.from_pretrained(place / "model")
    model = transformers.AutoModelForCausalLM.from_pretrained(weights, dtype=torch.float32).eval()
    total, count = 0.0, 0
    for line in (place / "eval.jsonl").read_text("utf-8").splitlines():
        chat: Any = tokenizer.apply_chat_template(
            json.loads(line)["messages"], return_dict=True, return_assistant_tokens_mask=True
        )
        ids, mask = torch.tensor(chat["input_ids"]), torch.tensor(chat["assistant_masks"])[1:] == 1
        with torch.no_grad():
            logp = model(ids[None]).logits[0, :-1].log_softmax(-1)
        total -= float(logp[mask, ids[1:][mask]].sum())
        count += int(mask.sum())
    return total / count


def saved(out: Path) -> list[tuple[float, Path]]:
    """List a run's checkpoints with the time at which each was whole, in seconds since the epoch, oldest first."""
    last = [*out.glob("checkpoints/step-*/extra.json"), *out.glob("checkpoint-*/trainer_state.json")]
    return sorted((file.stat().st_mtime, file.parent) for file in last)


def steady(rows: list[dict[str, Any]], pauses: set[int]) -> float | None:
    """Return trained tokens per second over the second half of a run's steps, None if too few are left.

    Left out is the time just before and after the steps in `pauses`, where a contestant evaluates and saves, and the
    last step, which may be a small one.
    """
    half = list(zip(rows, rows[1:], strict=False))[len(rows) // 2 : -1]
    timed = [(b["trained_tokens"], b["s"] - a["s"]) for a, b in half if not {a["step"], b["step"]} & pauses]
    return sum(n for n, _ in timed) / sum(s for _, s in timed) if timed else None


def reached(curve: list[tuple[float, float]], target: float) -> float | None:
    """Return when a curve of (seconds, loss) first comes down to `target`, on straight lines, None if it does not."""
    for (s0, loss0), (s1, loss1) in zip(curve, curve[1:], strict=False):
        if loss1 <= target < loss0:
            return s0 + (s1 - s0) * (loss0 - target) / (loss0 - loss1)
    return None


def run(o: Options, name: str, cold: bool, apart: Callable) -> dict[str, Any]:
    """Run one contestant once and return its figures."""
    place = o.folder / name
    seen = runs.watch(contestants(o)[name](place), place, runs.caches(o.folder / f"{name}-caches"))
    rows, points = seen["rows"], saved(place)
    first = apart(held_out_loss, o.folder / "model", o.folder)
    curve = [(0.0, first)] + [(when - seen["start"], apart(held_out_loss, at, o.folder)) for when, at in points]
    steps = {int(at.name.split("-")[1]) for _, at in points}
    trained = sum(row["trained_tokens"] for row in rows)
    return {
        "name": name, "cold": cold, "steps": len(rows), "trained_tokens": trained, "wall_s": seen["wall_s"],
        "trained_per_s": trained / seen["wall_s"], "steady_per_s": steady(rows, steps), "first_s": rows[0]["s"],
        "peak_mib": seen["peak_mib"], "others_s": seen["others_s"], "curve": curve,
    }  # fmt: skip


def summary(o: Options, done: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return a row for each contestant: medians of its quiet runs after the cold one, and figures of that one."""
    rows, done = [], [one for one in done if one["others_s"] <= o.quiet * one["wall_s"]]
    for name in dict.fromkeys(one["name"] for one in done):
        cold, warm = ([one for one in done if one["name"] == name and one["cold"] is state] for state in (True, False))
        row: dict[str, Any] = {"name": name, "runs": len(warm)}
        for one in done:
            one["target_s"] = reached(one["curve"], o.target)
            one["last_loss"] = one["curve"][-1][1]
        for key in ("steps", "trained_tokens", "trained_per_s", "steady_per_s", "wall_s", "first_s", "target_s",
                    "last_loss", "peak_mib", "others_s"):  # fmt: skip
            values = [one[key] for one in warm if one[key] is not None]
            row[key] = statistics.median(values) if values else None
            row[f"cold_{key}"] = cold[0][key] if cold else None
        rows.append(row)
    return rows


def show(o: Options, rows: list[dict[str, Any]], console: Console) -> None:
    """Print one table; in brackets what the cold run took."""
    table = Table(title=f"{o.rows} conversations, {o.layers} layers; caches warm (cold)")
    heads = ("contestant", "trained tok/s, whole run", "steady", "first step s", f"s to loss {o.target:g}",
             "whole run s", "last loss", "peak MiB", "steps", "runs", "others' CPU s")  # fmt: skip
    for head in heads:
        table.add_column(head, justify="left" if head == "contestant" else "right")

    def number(row: dict[str, Any], key: str, form: str, both: bool = True) -> str:
        warm, cold = ("-" if row[k] is None else format(row[k], form) for k in (key, f"cold_{key}"))
        return f"{warm} ({cold})" if both else cold if warm == "-" else warm

    for row in rows:
        table.add_row(
            row["name"], number(row, "trained_per_s", ",.0f"), number(row, "steady_per_s", ",.0f"),
            number(row, "first_s", ".1f"), number(row, "target_s", ".1f"), number(row, "wall_s", ".1f"),
            number(row, "last_loss", ".3f", False), number(row, "peak_mib", ",.0f", False),
            number(row, "steps", ".0f", False), str(row["runs"]), number(row, "others_s", ".0f"),
        )  # fmt: skip
    console.print(table)


def main(o: Options) -> None:
    """Prepare what all share, run everybody in turns, print, write."""
    wanted = runs.chosen(contestants(o), o.contestants)
    if not 1 <= o.held_out <= 170 or min(o.rows, o.layers) < 1 or o.rounds < 0:
        raise ValueError("--held-out is 1 to 170, --rows and --layers are at least 1, --rounds at least 0")
    o.folder.mkdir(parents=True, exist_ok=True)
    log, console = o.folder / "runs.jsonl", Console(width=180)
    with runs.apart() as apart:
        shape = {"layers": o.layers, "rows": o.rows, "held_out": o.held_out, "seed": o.seed}
        made = o.folder / "prepared.json"
        if not made.exists():
            apart(runs.prepare, o.folder, *shape.values())
            made.write_text(json.dumps(shape), "utf-8")
        if (had := json.loads(made.read_text("utf-8"))) != shape:
            raise ValueError(f"--folder {o.folder} was prepared with {had}, not {shape}; choose another")
        for _ in range(o.rounds + 1):
            for name in wanted:
                cold = not (o.folder / f"{name}-caches").exists()
                console.print(f"{name}, {'cold' if cold else 'warm'}")
                with open(log, "a", encoding="utf-8") as file:
                    file.write(json.dumps(run(o, name, cold, apart)) + "\n")
    done = [json.loads(line) for line in log.read_text("utf-8").splitlines()]
    rows = summary(o, done)
    show(o, rows, console)
    if o.json:
        options = dataclasses.asdict(o) | {key: str(getattr(o, key)) for key in ("folder", "peer_python", "json")}
        o.json.write_text(json.dumps({"options": options, "results": rows, "runs": done}, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    config.run(main, Options, doc=__doc__)
