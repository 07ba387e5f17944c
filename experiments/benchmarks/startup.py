"""Time from a command to the end of its first step, split, beside TRL's SFTTrainer and bare imports.

    python experiments/benchmarks/startup.py                         # TRL needs `make bench-trl`, or leave it out:
    python experiments/benchmarks/startup.py --contestants 'ours-*' --json startup.json

Trainers make one step on a Qwen3-MoE of 2 layers. "cold" has empty caches, of compiled graphs and of tokenized data;
"warm" finds those of the run before. Imports end when the run folder is claimed, data and model when metrics.jsonl is
there, the first step when its row is. Shown is each contestant's quickest run, and what other processes took meanwhile.
"""

import dataclasses
import json
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # run from the clone without installing

from rich.console import Console
from rich.table import Table

from experiments.benchmarks import runs
from functional_trainer import config

FORMS = ("off", "layer", "step")


@dataclass(frozen=True)
class Options:
    contestants: tuple[str, ...] = ("*",)
    """Names as in the table, with wildcards ("ours-*")."""
    rounds: int = 3
    """Runs of each contestant, in turns; the quickest is shown."""
    rows: int = 200
    """Conversations in the training file."""
    layers: int = 2
    """Depth of the model."""
    peer_python: Path = runs.PEER
    """Python with TRL."""
    json: Path | None = None
    """Also write the results here."""


def commands(o: Options) -> dict[str, list[str]]:
    """Return commands that train nothing, by name."""
    recipe = str(runs.ROOT / "experiments" / "qwen3_moe_sft.py")
    return {
        "help": [sys.executable, recipe, "--help"],
        "help-trl": [str(o.peer_python.with_name("trl")), "sft", "--help"],
        "import torch": [sys.executable, "-c", "import torch"],
        "import torch, transformers": [str(o.peer_python), "-c", "import torch; from transformers import Trainer"],
    }


def trainer(o: Options, name: str, place: Path) -> list[str]:
    """Return the command that makes one step on what was prepared in `place`."""
    kind, form = name.split("-")
    if kind == "trl":
        config = {"use_cpu": True, "report_to": "none", "assistant_only_loss": True, "max_steps": 1}
        return runs.trl(place, place / name, o.peer_python, config | {"save_strategy": "no"})
    return runs.ours(place, place / name, ["--compile", form, "--steps", "1", "--batch", "8"])


def measure(o: Options, name: str, place: Path, warm: bool) -> dict[str, float]:
    """Return the seconds of one run."""
    if name in commands(o):
        start = time.perf_counter()
        subprocess.run(commands(o)[name], check=True, capture_output=True)
        return {"total_s": time.perf_counter() - start}
    kept = place / f"{name}-caches"
    if not warm:
        shutil.rmtree(kept, ignore_errors=True)
    seen = runs.watch(trainer(o, name, place), place / name, runs.caches(kept))
    total = seen["rows"][0]["s"]
    parts = {"imports_s": seen["imports_s"], "load_s": seen["loaded_s"] - seen["imports_s"]}
    return parts | {"step_s": total - seen["loaded_s"], "total_s": total, "others_s": seen["others_s"]}


def main(o: Options) -> None:
    """Prepare what all share, run everybody in turns, print, write."""
    names = [*commands(o), *(f"ours-{form}" for form in FORMS), "trl-sft"]
    wanted = runs.chosen(names, o.contestants)
    if min(o.rounds, o.rows, o.layers) < 1:
        raise ValueError("--rounds, --rows and --layers are at least 1")
    found: dict[tuple[str, str], list[dict[str, float]]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(temporary)
        with runs.apart() as apart:
            apart(runs.prepare, place, o.layers, o.rows, 1, 0)
        for _ in range(o.rounds):
            for name in wanted:
                for state in ("",) if name in commands(o) else ("cold", "warm"):
                    found.setdefault((name, state), []).append(measure(o, name, place, state == "warm"))
    rows: list[dict[str, Any]] = [
        {"name": name, "caches": state, **min(seen, key=lambda one: one["total_s"])}
        for (name, state), seen in found.items()
    ]
    table = Table("contestant", "caches", *(f"{part} s" for part in ("imports", "load", "step", "total", "others")))
    for row in rows:
        figures = (row.get(key) for key in ("imports_s", "load_s", "step_s", "total_s", "others_s"))
        table.add_row(row["name"], row["caches"], *("" if s is None else f"{s:.2f}" for s in figures))
    Console(width=120).print(table)
    if o.json:
        options = dataclasses.asdict(o) | {key: str(getattr(o, key)) for key in ("peer_python", "json")}
        o.json.write_text(json.dumps({"options": options, "results": rows}, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    config.run(main, Options, doc=__doc__)
