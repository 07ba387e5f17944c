"""Pictures of a run: loss.png, experts.png, norms.png, reward.png; and several runs in one, from `metrics.jsonl`."""

from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from functional_trainer.metrics import history


def loss(folder: str | Path, rows: list[dict[str, Any]]) -> None:
    """Draw `<folder>/loss.png`: train loss, raw and smoothed, eval loss, learning rate."""
    figure, axis = _figure()
    _draw(axis, rows, "tab:blue", "tab:orange", "")
    lines = list(axis.lines)
    if rates := _column(rows, "lr"):
        right = axis.twinx()
        lines += right.plot(*zip(*rates, strict=True), color="0.6", linestyle="--", linewidth=1, label="learning rate")
        right.set_ylabel("learning rate")
        right.set_ylim(bottom=0)
        right.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    axis.set_title(Path(folder).resolve().name)
    if lines:
        axis.legend(handles=lines, loc="upper right")
    figure.savefig(Path(folder) / "loss.png")


def load(folder: str | Path, loads: Sequence[Any], dead: float = 0.01) -> str:
    """Draw `<folder>/experts.png`: each expert's share of the tokens of the steps that `loads` are of, 1 being even.

    Returns which experts had less than `dead`, by layer; empty if none had, or if there are no experts.
    """
    if not loads:
        return ""
    late = np.sum(loads, axis=0, dtype=float)  # (layers, experts)
    share = late * late.shape[1] / np.maximum(late.sum(1, keepdims=True), 1)
    figure, axis = _figure()
    axis.grid(False)
    image = axis.imshow(share, cmap="viridis", vmin=0, vmax=max(2.0, share.max()), aspect="auto", interpolation="none")
    figure.colorbar(image, label="share of tokens, 1 is even")
    axis.set(xlabel="expert", ylabel="layer with experts", title=f"{Path(folder).resolve().name}: load of experts")
    for side in (axis.xaxis, axis.yaxis):
        side.get_major_locator().set_params(integer=True)
    for layer, expert in np.argwhere(share < dead):
        axis.plot(expert, layer, "x", color="tab:red")
    figure.savefig(Path(folder) / "experts.png")
    rows = [(layer, np.flatnonzero(row < dead).tolist()) for layer, row in enumerate(share)]
    return "; ".join(f"layer {layer}: {', '.join(map(str, experts))}" for layer, experts in rows if experts)


def norms(folder: str | Path, rows: list[dict[str, Any]]) -> None:
    """Draw `<folder>/norms.png`: the norm of the gradient and of each kind of parameter's; nothing without them."""
    rows = [row | row["grad_norms"] | {"all": row["grad_norm"]} for row in rows if row.get("grad_norms")]
    if not rows:
        return
    figure, axis = _figure()
    for i, kind in enumerate([*rows[-1]["grad_norms"], "all"]):
        style: dict[str, Any] = {"linewidth": 1, "color": f"C{i % 10}", "linestyle": ("-", "--", ":")[i // 10 % 3]}
        style |= {"linewidth": 1.8, "color": "k", "linestyle": "-"} if kind == "all" else {}
        if line := _column(rows, kind):  # without the steps where it is not finite
            steps, values = zip(*line, strict=True)
            axis.plot(steps, _smooth(values), label=kind, **style)
    scale = "log" if any(y > 0 for line in axis.lines for y in line.get_ydata()) else "linear"  # all may be 0
    axis.set(yscale=scale, ylabel="norm of the gradient, smoothed", title=Path(folder).resolve().name)
    axis.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize="x-small")
    figure.savefig(Path(folder) / "norms.png")


def reward(folder: str | Path, rows: list[dict[str, Any]]) -> None:
    """Draw `<folder>/reward.png`: mean reward of rollouts, raw and smoothed, and of held-out ones; nothing without."""
    if not (rewards := _column(rows, "reward")):
        return
    rows = [{"step": 0, **rows[0].get("before", {})}, *rows]
    right, played = _column(rows, "accuracy"), _column(rows, "eval_reward")
    figure, axis = _figure()
    steps, values = zip(*rewards, strict=True)
    axis.plot(steps, values, color="tab:green", alpha=0.3, linewidth=0.8, label="_")
    axis.plot(steps, _smooth(values), color="tab:green", linewidth=1.8, label="reward of rollouts, smoothed")
    for line, label, style in ((played, "held-out reward, greedy", "o-"), (right, "held-out accuracy, greedy", "x--")):
        if line:
            axis.plot(*zip(*line, strict=True), style, color="tab:purple", markersize=4, label=label)
    axis.set(ylabel="mean reward", title=Path(folder).resolve().name)
    axis.legend(loc="lower right")
    figure.savefig(Path(folder) / "reward.png")


def runs(folders: Sequence[str | Path], path: str | Path) -> None:
    """Draw the train loss, raw and smoothed, and the eval loss of several runs into one picture."""
    figure, axis = _figure()
    for i, folder in enumerate(folders):
        rows, _ = history(folder)
        _draw(axis, rows, f"C{i % 10}", f"C{i % 10}", f"{Path(folder).resolve().name}: ")
    if axis.lines:
        axis.legend(loc="upper right")
    figure.savefig(path)


def _figure() -> tuple[Any, Any]:
    from matplotlib.figure import Figure  # no pyplot: no global state, and the Agg canvas by default

    figure = Figure(figsize=(9, 5), dpi=120, layout="constrained")
    axis = figure.add_subplot(xlabel="optimizer step", ylabel="loss")
    axis.grid(alpha=0.25)
    return figure, axis


def _draw(axis: Any, rows: list[dict[str, Any]], color: str, eval_color: str, name: str) -> None:
    """Add the losses of one run to a plot."""
    if steps := _column(rows, "loss"):
        x, y = zip(*steps, strict=True)
        axis.plot(x, y, color=color, alpha=0.3, linewidth=0.8, label="_" if name else "train loss")
        axis.plot(x, _smooth(y), color=color, linewidth=1.8, label=f"{name}train loss, smoothed")
    if evals := _column(rows, "eval_loss"):
        style: dict[str, Any] = {"color": eval_color, "markersize": 4, "linewidth": 1, "label": f"{name}eval loss"}
        axis.plot(*zip(*evals, strict=True), "o-", **style)


def _column(rows: list[dict[str, Any]], key: str) -> list[tuple[int, float]]:
    return [(row["step"], row[key]) for row in rows if row.get(key) is not None]


def _smooth(values: tuple[float, ...]) -> list[float]:
    """Average over a centred window of about a thirtieth of the run, cut at the ends."""
    sums, size, half = [0.0, *accumulate(values)], len(values), len(values) // 60
    windows = [(max(0, i - half), min(size, i + half + 1)) for i in range(size)]
    return [(sums[end] - sums[start]) / (end - start) for start, end in windows]
