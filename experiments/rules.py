"""Which sharding table places which model family; what a table says of a model on a mesh, and what is wrong with it.

    python experiments/rules.py explain --model 1t --mesh fsdp=64,ep=8
    python experiments/rules.py lint --model HF_FOLDER --mesh fsdp=4,tp=2 --rules my_rules.py:RULES
    python experiments/rules.py plan --model 235b-a22b --mesh fsdp=64,ep=8 ...      # is experiments/plan.py

Read from specs: no weights, no devices, no processes. `lint` exits with status 1 if anything is wrong.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro
from rich.console import Console

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from the clone without installing

import models
from functional_trainer import config, losses, tree
from sharding_rules import Rules, explain, qwen3, qwen3_moe
from sharding_rules.files import load
from sharding_rules.lint import lint
from sharding_rules.listen import Heard, Listener
from sharding_rules.mesh import parse

RULES: dict[str, Rules] = {"qwen3": qwen3.RULES, "qwen3_moe": qwen3_moe.RULES}
SMALL = {
    "hidden_size": 22, "vocab_size": 26, "intermediate_size": 34, "head_dim": 16, "num_attention_heads": 12,
    "num_key_value_heads": 6,
}  # fmt: skip
"""Sizes, no two alike, of a model that is run to hear which boundaries its family has; and of its experts:"""
EXPERTS = {"moe_intermediate_size": 38, "num_experts": 10, "num_local_experts": 10, "num_experts_per_tok": 9}
Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Options:
    command: Annotated[Literal["explain", "lint"], tyro.conf.Positional]
    """explain: where everything lives and what it takes. lint: what is wrong, with the nearest fix."""
    model: str = "tiny"
    """Hugging Face folder (config.json is enough) or preset."""
    mesh: str = ""
    """Sizes of axes, as fsdp=64,ep=8 (none: one device)."""
    rules: str | None = None
    """Table of your own: FILE.py, FILE.py:NAME or FILE.yaml (default: the family's)."""
    dtype: Literal["float32", "bfloat16", "float64"] = "bfloat16"
    """Compute type, in which parameters are gathered."""


def read(name: str) -> models.Model:
    """Return the model of a preset or of a Hugging Face folder."""
    if name not in models.PRESETS and not Path(name).is_dir():
        raise ValueError(f"--model {name}: no folder, and no preset; these are: {', '.join(models.PRESETS)}")
    return models.from_config(models.PRESETS.get(name, name))


def shapes(model: models.Model) -> Shapes:
    """Return the shapes of a model's parameters by the path that rules match."""
    return {f"params/{path}": p.shape for path, p in tree.flatten(model.specs).items()}


def hear(of: models.Model) -> Heard:
    """Return what a model and its loss ask about where tensors live."""
    hf = of.config.hf
    model = models.from_config(hf | SMALL | (EXPERTS if any("/moe/" in path for path in shapes(of)) else {}))
    listener, row = Listener(), torch.ones(4, 14, dtype=torch.int64)
    batch = {"tokens": row, "targets": row, "segment_ids": row, "positions": row.cumsum(1) - 1, "weights": row * 1.0}
    params = model.init(0, torch.float64)
    losses.sft().terms(model.apply(params, batch, listener), model.unembed(params, listener), batch, listener)
    sizes = ("dim", "heads", "kv_heads", "head_dim")
    return listener.heard({getattr(model.config, size): getattr(of.config, size) for size in sizes})


def chosen(given: str | None, model: models.Model, sizes: dict[str, int]) -> Rules:
    """Return the table of a model: the family's, or a given one; ValueError lists all that is wrong with that."""
    if given is None:
        return RULES[model.config.hf["model_type"]]
    rules = load(given)
    if found := lint(rules, shapes(model), hear(model), sizes):
        raise ValueError(f"--rules {given}: {len(found)} problem(s)\n" + "\n".join(map(str, found)))
    return rules


def show(o: Options, console: Console, model: models.Model, rules: Rules, heard: Heard, sizes: dict[str, int]) -> None:
    """Print where everything lives."""
    placed, compute = explain.explain(rules, shapes(model), sizes), getattr(torch, o.dtype)
    console.print(explain.parameters(placed, f"{o.model} on {explain.mesh(sizes)}: a device's part", compute))
    console.print(explain.totals(placed, models.count(model), compute), soft_wrap=True)
    console.print(explain.boundaries(rules, heard.boundaries(), sizes))


def main(o: Options) -> None:
    model = read(o.model)
    sizes, heard = parse(o.mesh), hear(model)
    rules = load(o.rules) if o.rules else chosen(None, model, sizes)
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 140)
    if o.command == "explain":
        return show(o, console, model, rules, heard, sizes)
    found = lint(rules, shapes(model), heard, sizes)
    for problem in found:
        console.print(f"{problem}\n", markup=False, soft_wrap=True)
    checked = f"{len(rules.table)} rows, {len(shapes(model))} parameters, {len(heard.boundaries())} boundaries"
    console.print(f"{len(found) or 'no'} problem(s): {checked}, {len(heard.regions)} regions on {explain.mesh(sizes)}")
    if found:
        raise SystemExit(1)


if __name__ == "__main__":
    if sys.argv[1:2] == ["plan"]:
        from experiments import plan

        del sys.argv[1]
        config.run(plan.main, plan.Options, doc=plan.__doc__ or "")
    else:
        config.run(main, Options, doc=__doc__ or "")
