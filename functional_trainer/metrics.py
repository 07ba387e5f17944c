"""What a run says while it trains: `metrics.jsonl`, TensorBoard, a progress line, `loss.png`, `experts.png`.

`metrics.jsonl` holds one strict JSON object per optimizer step. JSON has no nan and no infinity: such a value is null
and named in the row's "nonfinite" entry, e.g. {"loss": null, "nonfinite": {"loss": "nan"}}.
"""

import collections
import json
import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate, islice
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

RECENT = 50  # steps that the estimate of the remaining time looks back on


class Metrics:
    """Log one row of named values per optimizer step; a context manager that draws `loss.png` when it closes.

    Keys the progress line knows: loss, eval_loss, tokens_per_s, mfu (a fraction or None); the plot also reads lr. On
    construction rows and events after `start_step` are dropped, a line torn by a kill too, so a resumed run leaves one
    row per step: log a step before saving its checkpoint, and check first that the folder holds this run. With
    `main=False` (other ranks) nothing is read or written. Without a terminal a plain line appears every `every` steps.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        total_steps: int,
        start_step: int = 0,
        main: bool = True,
        every: int = 10,
        console: Console | None = None,
    ):
        self.folder, self.total, self.last, self.main, self.every = Path(folder), total_steps, start_step, main, every
        self.clock: collections.deque[float] = collections.deque(maxlen=RECENT)
        self.eval_loss: float | None = None
        if not main:
            return
        from torch.utils.tensorboard import SummaryWriter  # seconds to import

        self.folder.mkdir(parents=True, exist_ok=True)
        truncate(self.folder / "metrics.jsonl", start_step)
        self.file = open(self.folder / "metrics.jsonl", "ab", buffering=0)
        self.board = SummaryWriter(str(self.folder / "tensorboard"), purge_step=start_step + 1, flush_secs=5)
        self.console = console or Console()
        columns = (TextColumn("step {task.completed}/{task.total}"), BarColumn(None), TextColumn("{task.description}"))
        self.bar = Progress(*columns, console=self.console, disable=not self.console.is_terminal, expand=True)
        self.task = self.bar.add_task("", total=total_steps, completed=start_step)
        self.bar.start()

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """Append the row of `step` (1, 2, ...): numbers, None, strings, tensors, and lists or mappings of them.

        Lists go to `metrics.jsonl` only, numbers to TensorBoard as well. Raises OSError when the disk is full.
        """
        if step <= self.last:
            raise ValueError(f"step {step} was logged after step {self.last}")
        self.last = step
        if not self.main:
            return
        nonfinite: dict[str, str] = {}
        row = {"step": step, **_strict(values, "", nonfinite)}
        line = json.dumps(row | ({"nonfinite": nonfinite} if nonfinite else {}), allow_nan=False).encode() + b"\n"
        try:
            while line:  # straight to the system, nothing is left in a buffer
                line = line[self.file.write(line) :]
            for name, value in _scalars(row, ""):
                self.board.add_scalar(name, value, step)
        except OSError as error:
            reason = f"cannot write the metrics of step {step} to {self.folder}: {error.strerror}"
            raise OSError(error.errno, f"{reason}; make room there and resume") from None
        self.clock.append(time.monotonic())
        self.eval_loss = row["eval_loss"] if row.get("eval_loss") is not None else self.eval_loss
        self._show(step, values)

    def print(self, message: str) -> None:
        """Print a line above the progress bar."""
        if self.main:
            self.console.print(message, markup=False, highlight=False, soft_wrap=True)

    def close(self) -> None:
        """Close the files and draw `loss.png`; what fails here is reported, not raised."""
        if not self.main:
            return
        self.bar.stop()
        self.file.close()
        try:
            self.board.close()
            plot(self.folder)
            if dead := plot_load(self.folder):
                self.print(f"experts that got next to no tokens lately: {dead}; see {self.folder}/experts.png")
        except (OSError, ValueError) as error:
            self.print(f"{self.folder}/loss.png or experts.png is not drawn: {error}")

    def __enter__(self) -> "Metrics":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _show(self, step: int, values: Mapping[str, Any]) -> None:
        line = self._line(step, values)
        if self.console.is_terminal:
            self.bar.update(self.task, completed=step, description=line)
        elif step % self.every == 0 or step == self.total or values.get("eval_loss") is not None:
            self.print(f"step {step}/{self.total}  {line}")

    def _line(self, step: int, values: Mapping[str, Any]) -> str:
        """Say loss, eval loss, speed, MFU and the time left, from the steps seen since the first (which compiles)."""
        rate, mfu = values.get("tokens_per_s"), values.get("mfu")
        eta = "?"
        if len(self.clock) > 1:
            left = (self.clock[-1] - self.clock[0]) / (len(self.clock) - 1) * (self.total - step)
            eta = f"{left // 3600:.0f}:{left // 60 % 60:02.0f}:{left % 60 // 1:02.0f}"
        parts = [
            f"loss {float(values.get('loss', math.nan)):.4f}",
            "" if self.eval_loss is None else f"eval {self.eval_loss:.4f}",
            "" if rate is None else f"{float(rate):,.0f} tok/s",
            "MFU n/a" if mfu is None else f"MFU {float(mfu):.1%}",
            f"ETA {eta}",
        ]
        return "  ".join(p for p in parts if p)


def read(path: str | Path) -> Iterator[dict[str, Any]]:
    """Yield the rows of a `metrics.jsonl`, without a last line torn by a kill; none if there is no file."""
    for line in _lines(Path(path)):
        yield json.loads(line)


def truncate(path: str | Path, step: int) -> None:
    """Drop the rows after `step`, and a torn last line, by writing a new file and renaming it."""
    path = Path(path)
    if not path.exists():
        return
    partial = path.with_suffix(".tmp")
    with open(partial, "wb") as file:
        file.writelines(line for line in _lines(path) if json.loads(line)["step"] <= step)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def _lines(path: Path) -> Iterator[bytes]:
    if path.exists():
        with open(path, "rb") as file:
            yield from (line for line in file if line.endswith(b"\n"))


KEYS = ("step", "loss", "eval_loss", "lr")


def plot(folder: str | Path) -> Path:
    """Draw `<folder>/loss.png` from its `metrics.jsonl`: train loss, raw and smoothed, eval loss, learning rate."""
    figure, axis = _figure()
    rows = [{key: row.get(key) for key in KEYS} for row in read(Path(folder) / "metrics.jsonl")]
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
    path = Path(folder) / "loss.png"
    figure.savefig(path)
    return path


def plot_load(folder: str | Path, dead: float = 0.01) -> str:
    """Draw `<folder>/experts.png`: each expert's share of tokens in the last tenth of the run, 1 being even.

    Returns which experts had less than `dead`, by layer; empty if none had, or if there are no experts.
    """
    import numpy as np

    def loads() -> Iterator[list]:
        return (row["load"] for row in read(Path(folder) / "metrics.jsonl") if row.get("load"))

    count = sum(1 for _ in loads())
    if not count:
        return ""
    tail = islice(loads(), count - math.ceil(count / 10), None)
    late = np.sum([np.array(load, dtype=float) for load in tail], axis=0)  # (layers, experts)
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


def plot_runs(folders: Sequence[str | Path], path: str | Path) -> None:
    """Draw the train loss, raw and smoothed, and the eval loss of several runs into one picture."""
    figure, axis = _figure()
    for i, folder in enumerate(folders):
        rows = [{key: row.get(key) for key in KEYS} for row in read(Path(folder) / "metrics.jsonl")]
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
    return [(row["step"], row[key]) for row in rows if row[key] is not None]


def _smooth(values: tuple[float, ...]) -> list[float]:
    """Average over a centred window of about a thirtieth of the run, cut at the ends."""
    sums, size, half = [0.0, *accumulate(values)], len(values), len(values) // 60
    windows = [(max(0, i - half), min(size, i + half + 1)) for i in range(size)]
    return [(sums[end] - sums[start]) / (end - start) for start, end in windows]


def _strict(value: Any, path: str, nonfinite: dict[str, str]) -> Any:
    """Convert to what strict JSON can say; floats that it cannot become None and go to `nonfinite` by path."""
    value = value.tolist() if hasattr(value, "tolist") else value
    if isinstance(value, Mapping):
        return {key: _strict(item, f"{path}/{key}" if path else key, nonfinite) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_strict(item, f"{path}/{i}", nonfinite) for i, item in enumerate(value)]
    if isinstance(value, float) and not math.isfinite(value):
        nonfinite[path] = str(value)
        return None
    return value


def _scalars(value: Any, path: str) -> Iterator[tuple[str, float]]:
    """Yield (path, number) for the numbers of a row that are not in lists, but for the step."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _scalars(item, f"{path}/{key}" if path else key)
    elif isinstance(value, int | float) and path != "step":
        yield path, value
