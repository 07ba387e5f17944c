"""What a run says while it trains: `metrics.jsonl`, `samples.jsonl`, `completions.jsonl`, TensorBoard, Weights &
Biases, a progress line.

`metrics.jsonl` holds one strict JSON object per optimizer step. JSON has no nan and no infinity: such a value is null
and named in the row's "nonfinite" entry, e.g. {"loss": null, "nonfinite": {"loss": "nan"}}.
"""

import collections
import json
import math
import os
import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

LATE = 1000  # steps whose load of experts is drawn at most
RECENT = 50  # steps that the estimate of the remaining time looks back on
KEPT = ("reward", "accuracy", "eval_reward", "eval_loss")  # not of every step: the progress line has the last ones


class Metrics:
    """Log one row of named values per optimizer step; a context manager that draws the run when it closes.

    Keys the progress line knows: reward, accuracy, eval_reward, loss, eval_loss, tokens_per_s, mfu (a fraction or
    None); the plot also reads lr. On construction rows and events after `start_step` are dropped, a line torn by a
    kill too, so a resumed run leaves one row per step: log a step before saving its checkpoint, and check first that
    the folder holds this run. With `main=False` (other ranks) nothing is read or written. Without a terminal a plain
    line appears every `every` steps, and where something held out was measured.
    With `wandb`, a project's name, rows and `config` go to Weights & Biases as well.
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
        wandb: str | None = None,
        config: Mapping[str, Any] | None = None,
    ):
        self.folder, self.total, self.last, self.main, self.every = Path(folder), total_steps, start_step, main, every
        self.clock: collections.deque[float] = collections.deque(maxlen=RECENT)
        self.kept: dict[str, float] = {}
        self.drawn = time.monotonic(), 0.0
        if not main:
            return
        from torch.utils.tensorboard import SummaryWriter  # seconds to import

        self.folder.mkdir(parents=True, exist_ok=True)
        self.wandb = _wandb(wandb, self.folder, config) if wandb else None
        anew = not start_step and any(read(self.folder / "metrics.jsonl"))
        for name in ("metrics.jsonl", "samples.jsonl", "completions.jsonl"):
            truncate(self.folder / name, start_step)
        self.file = open(self.folder / "metrics.jsonl", "ab", buffering=0)
        self.board = SummaryWriter(str(self.folder / "tensorboard"), purge_step=start_step + 1, flush_secs=5)
        self.console = console or Console()
        if anew:
            self.print(f"{self.folder} holds steps of which nothing was saved, beginning anew at step 0")
        columns = (TextColumn("step {task.completed}/{task.total}"), BarColumn(None), TextColumn("{task.description}"))
        self.bar = Progress(*columns, console=self.console, disable=not self.console.is_terminal, expand=True)
        self.task = self.bar.add_task("", total=total_steps, completed=start_step)
        self.bar.start()

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """Append the row of `step` (1, 2, ...): numbers, None, strings, tensors, and lists or mappings of them.

        Lists go to `metrics.jsonl` only, numbers to TensorBoard as well, and "completions_table", answers that the step
        begins to train on, each with its rewards, to `completions.jsonl`. Raises OSError when the disk is full.
        """
        if step <= self.last:
            raise ValueError(f"step {step} was logged after step {self.last}")
        self.last = step
        if not self.main:
            return
        nonfinite: dict[str, str] = {}
        table = values.get("completions_table", ())
        row = {"step": step, **_strict({k: v for k, v in values.items() if k != "completions_table"}, "", nonfinite)}
        line = json.dumps(row | ({"nonfinite": nonfinite} if nonfinite else {}), allow_nan=False).encode() + b"\n"
        try:
            while line:  # straight to the system, nothing is left in a buffer
                line = line[self.file.write(line) :]
            if table:
                with open(self.folder / "completions.jsonl", "ab") as file:
                    file.writelines(
                        json.dumps({"step": step, **one}, allow_nan=False).encode() + b"\n" for one in table
                    )
            for name, value in _scalars(row, ""):
                self.board.add_scalar(name, value, step)
            if self.wandb:
                self.wandb.log({"step": step, **dict(_scalars(row, ""))})
        except OSError as error:
            reason = f"cannot write the metrics of step {step} to {self.folder}: {error.strerror}"
            raise OSError(error.errno, f"{reason}; make room there and resume") from None
        self.clock.append(time.monotonic())
        self.kept |= {name: row[name] for name in KEPT if row.get(name) is not None}
        self._show(step, values)

    def print(self, message: str) -> None:
        """Print a line above the progress bar."""
        if self.main:
            self.console.print(message, markup=False, highlight=False, soft_wrap=True)

    def samples(self, step: int, samples: Sequence[Mapping[str, str]]) -> None:
        """Append what the model wrote at `step` to `samples.jsonl`, and print the first."""
        if not self.main or not samples:
            return
        with open(self.folder / "samples.jsonl", "ab") as file:
            file.write(json.dumps({"step": step, "samples": [dict(s) for s in samples]}).encode() + b"\n")
        first = {k: " ".join(v.split()) for k, v in samples[0].items()}
        self.print("  ".join(f"{k}: {v if len(v) < 60 else v[:57] + '...'}" for k, v in first.items()))

    def draw(self, age: float = 0.0) -> None:
        """Draw the pictures and the page `index.html`; a failure is reported.

        Not if that was within `age` seconds, or within 100 times as long as it took: a long run's takes longer.
        """
        from functional_trainer import page, plots

        begun, (last, took) = time.monotonic(), self.drawn
        if not self.main or age and begun - last < max(age, 100 * took):
            return
        try:
            rows, loads = history(self.folder)
            plots.loss(self.folder, rows)
            plots.norms(self.folder, rows)
            plots.reward(self.folder, rows)
            if dead := plots.load(self.folder, loads):
                self.print(f"experts that got next to no tokens lately: {dead}; see {self.folder}/experts.png")
            page.write(self.folder, rows, dead)
        except (OSError, ValueError) as error:
            self.print(f"the pictures and the page of {self.folder} are not drawn: {error}")
        self.drawn = time.monotonic(), time.monotonic() - begun

    def close(self) -> None:
        """Close the files and draw the run."""
        if not self.main:
            return
        self.bar.stop()
        self.file.close()
        try:
            self.board.close()
        except OSError as error:
            self.print(f"{self.folder}/tensorboard is not whole: {error}")
        if self.wandb:
            self.wandb.finish()
        self.draw()

    def __enter__(self) -> "Metrics":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _show(self, step: int, values: Mapping[str, Any]) -> None:
        line = self._line(step, values)
        if self.console.is_terminal:
            self.bar.update(self.task, completed=step, description=line)
        elif step % self.every == 0 or step == self.total or any(values.get(name) is not None for name in KEPT[1:]):
            self.print(f"step {step}/{self.total}  {line}")

    def _line(self, step: int, values: Mapping[str, Any]) -> str:
        """Say rewards, losses, speed, MFU and the time left, from the steps seen since the first (which compiles)."""
        rate, mfu = values.get("tokens_per_s"), values.get("mfu")
        eta = "?"
        if len(self.clock) > 1:
            left = (self.clock[-1] - self.clock[0]) / (len(self.clock) - 1) * (self.total - step)
            eta = f"{left // 3600:.0f}:{left // 60 % 60:02.0f}:{left % 60 // 1:02.0f}"
        parts = [  # in reinforcement learning the loss says little
            *(f"{name} {self.kept[name]:.3f}" for name in KEPT[:3] if name in self.kept),
            f"loss {float(values.get('loss', math.nan)):.4f}",
            f"eval {self.kept['eval_loss']:.4f}" if "eval_loss" in self.kept else "",
            "" if rate is None else f"{float(rate):,.0f} tok/s",
            "MFU n/a" if mfu is None else f"MFU {float(mfu):.1%}",
            f"ETA {eta}",
        ]
        return "  ".join(p for p in parts if p)


def log_in(project: str) -> None:
    """Log in to Weights & Biases; ValueError if there is no login or the project's name is none."""
    import wandb

    try:
        wandb.Settings(project=project)
        if wandb.setup().settings.mode == "online":
            wandb.login()
    except Exception as error:
        raise ValueError(f"--wandb {project}: {error}") from None


def _wandb(project: str, folder: Path, config: Mapping[str, Any] | None) -> Any:
    """Start or continue the run of this folder, whose id is kept there.

    Steps are a value among others: wandb's own count would drop the rows that a resumed run repeats. ValueError if it
    refuses, as without a network.
    """
    import wandb

    home, name = folder.resolve(), folder / "wandb-id"
    if not name.exists():
        name.write_text(secrets.token_hex(8))
    where: dict[str, Any] = {"project": project, "name": home.name, "id": name.read_text(), "dir": str(home)}
    try:
        run = wandb.init(**where, resume="allow", config=dict(config or {}))
    except Exception as error:
        raise ValueError(f"--wandb {project}: {error}") from None
    run.define_metric("*", step_metric="step")
    return run


def last(path: str | Path, count: int) -> list[dict[str, Any]]:
    """Return the last rows of a file of JSON lines, at most `count`."""
    return [json.loads(line) for line in collections.deque(_lines(Path(path)), count)]


def read(path: str | Path) -> Iterator[dict[str, Any]]:
    """Yield the rows of a `metrics.jsonl`, without a last line torn by a kill; none if there is no file."""
    for line in _lines(Path(path)):
        yield json.loads(line)


def history(folder: str | Path) -> tuple[list[dict[str, Any]], list[np.ndarray]]:
    """Return a run's rows without their long parts, and the load of experts (layers, E) in its last tenth.

    At most LATE steps of the latter, so that a long run fits in memory.
    """
    loads: collections.deque[np.ndarray] = collections.deque(maxlen=LATE)
    rows, count = [], 0
    for row in read(Path(folder) / "metrics.jsonl"):
        if row.get("load"):
            loads.append(np.array(row["load"], np.float32))
            count += 1
        rows.append({key: value for key, value in row.items() if key not in ("load", "weight_norms")})
    return rows, list(loads)[-math.ceil(count / 10) :] if count else []


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
