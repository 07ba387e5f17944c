"""The page of a run, `index.html`: its state, pictures, samples and options in one file to open, without a server."""

import json
import math
from collections.abc import Iterable, Mapping
from html import escape
from pathlib import Path
from statistics import mean, median
from typing import Any

import yaml

from functional_trainer.metrics import last

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 62rem; padding: 0 1rem; color: #222 }
table { border-collapse: collapse; margin: 1rem 0; width: 100% }
td, th { border-bottom: 1px solid #ddd; padding: .25rem .75rem .25rem 0; text-align: left; vertical-align: top }
td { white-space: pre-wrap; overflow-wrap: anywhere }
img { width: 100% }
.warn { color: #b00 }
"""
PICTURES = ("reward.png", "loss.png", "experts.png", "norms.png")  # with rewards the loss says little


def write(folder: str | Path, rows: list[dict[str, Any]], dead: str = "") -> Path:
    """Write `<folder>/index.html` from the rows of its metrics and what it holds; `dead` names idle experts."""
    folder = Path(folder)
    title = escape(folder.resolve().name)
    parts = [f"<h1>{title}</h1>", _table(summary(rows).items())]
    if dead:
        parts.append(f"<p class=warn>Experts that got next to no tokens lately: {escape(dead)}.</p>")
    parts += [f'<img src="{name}" alt="{name}">' for name in PICTURES if (folder / name).exists()]
    evals = [row for row in rows if row.get("eval_losses")][-20:]
    if evals:
        names = list(evals[-1]["eval_losses"])
        lines = ([row["step"], *(_number(row["eval_losses"].get(name)) for name in names)] for row in evals)
        parts += ["<h2>Held-out loss by source</h2>", _table(lines, ["step", *names])]
    if answers := last(folder / "completions.jsonl", 16):
        columns = list(dict.fromkeys(name for answer in answers for name in answer))
        lines = ([_cell(answer.get(name)) for name in columns] for answer in answers)
        parts += ["<h2>Answers of rollouts, the last ones in completions.jsonl</h2>", _table(lines, columns)]
    samples = last(folder / "samples.jsonl", 5)
    if samples:
        names = list(samples[-1]["samples"][0])
        lines = ([s["step"], *(one.get(n, "") for n in names)] for s in reversed(samples) for one in s["samples"])
        parts += ["<h2>Samples</h2>", _table(lines, ["step", *names])]
    if (folder / "config.yaml").exists():
        options = flat(yaml.safe_load((folder / "config.yaml").read_text("utf-8")))
        shown = ((k, v if isinstance(v, str) else json.dumps(v)) for k, v in options.items())
        parts += ["<h2>Options</h2>", _table(shown)]
    head = f'<!doctype html><html lang=en><meta charset="utf-8"><title>{title}</title><style>{STYLE}</style>'
    path, partial = folder / "index.html", folder / "index.html.tmp"
    partial.write_text(f"{head}<body>{chr(10).join(parts)}</body></html>", "utf-8")
    partial.replace(path)
    return path


def summary(rows: list[dict[str, Any]]) -> dict[str, str]:
    """Say in a few numbers how a run went, from the rows of its `metrics.jsonl`."""
    if not rows:
        return {"steps": "0"}
    names = ("reward", "accuracy", "eval_reward", "loss", "eval_loss", "tokens_per_s", "padding", "memory_bytes")
    columns = {name: [row[name] for row in rows if row.get(name) is not None] for name in names}
    rewards, right, played, losses, evals, rates, waste, memory = columns.values()
    before = rows[0].get("before", {})
    found: dict[str, Any] = {
        "steps": f"{rows[-1]['step']:,}",
        "tokens": f"{sum(row.get('tokens', 0) for row in rows):,}",
        "reward, last tenth": rewards and f"{_late(rewards):.4f}",
        "held-out accuracy, before": "accuracy" in before and f"{before['accuracy']:.1%}",
        "held-out accuracy, last": right and f"{right[-1]:.1%}",
        "held-out reward, before": "eval_reward" in before and f"{before['eval_reward']:.4f}",
        "held-out reward, last": played and f"{played[-1]:.4f}",
        "train loss, last tenth": losses and f"{_late(losses):.4f}",
        "eval loss, last": evals and f"{evals[-1]:.4f}",
        "eval loss, best": evals and f"{min(evals):.4f}",
        "median tokens/s": rates and f"{median(rates):,.0f}",
        "padding": waste and f"{mean(waste):.1%}",
        "skipped steps": str(sum(row.get("skipped", 0) > 0 for row in rows)),
        "peak memory, MiB": memory and f"{max(memory) / 2**20:,.0f}",
        "hours": f"{sum(t or 0 for row in rows for t in row.get('time', {}).values()) / 3600:.3f}",
    }
    return {name: said for name, said in found.items() if said}


def _late(values: list[float]) -> float:
    """Return the mean of the last tenth."""
    return mean(values[-math.ceil(len(values) / 10) :])


def flat(tree: Any, path: str = "") -> dict[str, Any]:
    """Flatten a config to dotted names."""
    if not isinstance(tree, Mapping):
        return {path: tree}
    return {k: v for key, x in tree.items() for k, v in flat(x, f"{path}.{key}" if path else key).items()}


def _table(lines: Iterable[Iterable[Any]], head: Iterable[str] = ()) -> str:
    top = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    body = ("".join(f"<td>{escape(str(cell))}</td>" for cell in line) for line in lines)
    return "<table>" + "".join(f"<tr>{line}</tr>" for line in (top, *body) if line) + "</table>"


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else "" if value is None else str(value)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"
