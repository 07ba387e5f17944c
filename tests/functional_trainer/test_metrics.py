"""functional_trainer.metrics: the rows, their resumption, TensorBoard, the progress line and the plot."""

import importlib.util
import io
import json
import math
import os
import re
import signal
import struct
import subprocess
import sys
import warnings
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from matplotlib.image import imread
from rich.console import Console

from functional_trainer import metrics, page, plots
from functional_trainer.metrics import Metrics
from functional_trainer.options import RunOptions

ROOT = Path(__file__).parents[2]


def quiet(**options) -> Console:
    return Console(file=io.StringIO(), width=120, **options)


def rows(folder: Path) -> list[dict]:
    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def log(folder: Path, first: int, last: int, **options) -> None:
    with Metrics(folder, total_steps=20, start_step=first - 1, console=quiet(), **options) as m:
        for step in range(first, last + 1):
            m.log(step, {"loss": 1 / step, "lr": 1e-3, "eval_loss": 2.0 if step % 4 == 0 else None})


def test_one_strict_json_object_per_step(tmp_path):
    values = {
        "loss": torch.tensor(0.1, dtype=torch.float64), "grad_norm": float("nan"), "tokens": 12, "mfu": None,
        "time": {"data": 0.5, "step": -math.inf}, "load": torch.tensor([[1.0, math.inf], [3.0, 4.0]]), "note": "ü",
    }  # fmt: skip
    with Metrics(tmp_path, total_steps=1, console=quiet()) as m:
        m.log(1, values)
        assert len(rows(tmp_path)) == 1  # flushed
        with pytest.raises(ValueError, match="step 1 was logged after step 1"):
            m.log(1, values)
    assert rows(tmp_path) == list(metrics.read(tmp_path / "metrics.jsonl"))
    assert rows(tmp_path)[0] == {
        "step": 1, "loss": 0.1, "grad_norm": None, "tokens": 12, "mfu": None, "time": {"data": 0.5, "step": None},
        "load": [[1.0, None], [3.0, 4.0]], "note": "ü",
        "nonfinite": {"grad_norm": "nan", "time/step": "-inf", "load/0/1": "inf"},
    }  # fmt: skip


def events(folder: Path, tag: str) -> dict[int, float]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(folder / "tensorboard")).Reload()
    return {e.step: e.value for e in board.Scalars(tag)}


def test_resuming_leaves_one_row_and_one_event_per_step(tmp_path):
    log(tmp_path, 1, 9)
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 10, "lo')  # torn by a kill
    log(tmp_path, 7, 12)
    assert [r["step"] for r in rows(tmp_path)] == list(range(1, 13))
    assert [r["loss"] for r in rows(tmp_path)] == [1 / s for s in range(1, 13)]
    assert sorted(events(tmp_path, "loss")) == list(range(1, 13))
    assert sorted(events(tmp_path, "eval_loss")) == [4, 8, 12]
    assert not (tmp_path / "metrics.tmp").exists()


def test_a_step_that_is_not_kept_is_gone_from_both(tmp_path):
    log(tmp_path, 1, 9)
    log(tmp_path, 4, 4)
    assert [r["step"] for r in rows(tmp_path)] == [1, 2, 3, 4] and sorted(events(tmp_path, "loss")) == [1, 2, 3, 4]


def test_other_ranks_write_nothing(tmp_path):
    log(tmp_path / "run", 1, 3, main=False)
    assert not (tmp_path / "run").exists()


LOOP = """
import sys
from functional_trainer.metrics import Metrics
from functional_trainer.options import RunOptions
with Metrics(sys.argv[1], total_steps=10**6, every=10**6) as m:
    for step in range(1, 10**6):
        m.log(step, {"loss": 1 / step, "load": [[0.1] * 64] * 8})
        if step == 200:
            print("go", flush=True)
"""


def test_a_kill_loses_at_most_the_torn_line(tmp_path):
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([sys.executable, "-c", LOOP, tmp_path], env=env, stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"go\n"
    process.send_signal(signal.SIGKILL)
    process.communicate()
    steps = [r["step"] for r in metrics.read(tmp_path / "metrics.jsonl")]
    assert len(steps) >= 200 and steps == list(range(1, len(steps) + 1))


def test_plain_lines_without_a_terminal(tmp_path):
    console = quiet()
    with Metrics(tmp_path, total_steps=25, every=10, console=console) as m:
        for step in range(1, 26):
            eval_loss = {"eval_loss": 0.5} if step == 7 else {}
            m.log(step, {"loss": 2.0, "tokens_per_s": 12345.6, "mfu": None if step < 20 else 0.1234, **eval_loss})
        m.print("a note [bold]")
    lines = re.sub(r"ETA \d:\d\d:\d\d", "ETA -", console.file.getvalue()).splitlines()
    assert lines == [
        "step 7/25  loss 2.0000  eval 0.5000  12,346 tok/s  MFU n/a  ETA -",
        "step 10/25  loss 2.0000  eval 0.5000  12,346 tok/s  MFU n/a  ETA -",
        "step 20/25  loss 2.0000  eval 0.5000  12,346 tok/s  MFU 12.3%  ETA -",
        "step 25/25  loss 2.0000  eval 0.5000  12,346 tok/s  MFU 12.3%  ETA -",
        "a note [bold]",
    ]


def test_plain_lines_have_the_last_rewards(tmp_path):
    """A rollout of several steps has its reward in the row of the first one; lines come at others."""
    console = quiet()
    with Metrics(tmp_path, total_steps=33, every=10, console=console) as m:
        for step in range(1, 34):
            row = {"reward": step / 100} if step % 16 == 1 else {}
            m.log(step, {"loss": 0.0} | row | ({"accuracy": 0.5} if step == 4 else {}))
    told = [re.sub("  (loss|MFU).*", "", line) for line in console.file.getvalue().splitlines()]
    assert told == [
        "step 4/33  reward 0.010  accuracy 0.500",
        "step 10/33  reward 0.010  accuracy 0.500",
        "step 20/33  reward 0.170  accuracy 0.500",
        "step 30/33  reward 0.170  accuracy 0.500",
        "step 33/33  reward 0.330  accuracy 0.500",
    ]


def test_a_run_of_which_nothing_was_saved_begins_anew_and_says_so(tmp_path):
    for first, said in (
        (1, ""),
        (3, ""),
        (1, f"{tmp_path} holds steps of which nothing was saved, beginning anew at "),
    ):
        console = Console(file=io.StringIO(), width=500)
        with Metrics(tmp_path, total_steps=20, start_step=first - 1, console=console) as m:
            m.log(first, {"loss": 1.0})
        assert console.file.getvalue() == said + "step 0\n" * bool(said)


def test_the_time_left_leaves_out_the_first_step(tmp_path, monkeypatch):
    console, now = quiet(), iter([0.0, 100.0, 102.0, 103.0, 104.0, 105.0, 106.0])
    monkeypatch.setattr(metrics.time, "monotonic", lambda: next(now))
    with Metrics(tmp_path, total_steps=5003, every=1, console=console) as m:
        for step in (1, 2, 3):
            m.log(step, {"loss": 1.0})
    assert re.findall("ETA (.*)", console.file.getvalue()) == ["?", "2:46:42", "2:05:00"]


def test_a_bar_on_a_terminal(tmp_path):
    console = quiet(force_terminal=True)
    with Metrics(tmp_path, total_steps=4, start_step=2, console=console) as m:
        m.log(3, {"loss": math.nan, "mfu": 0.5})
        m.log(4, {"loss": 0.25})
    out = console.file.getvalue()
    assert "step 4/4" in out and "━" in out and "loss 0.2500" in out and "MFU n/a" in out


def test_the_plot_shows_every_series(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path: drawn.append(figure))
    log(tmp_path, 1, 12)
    left, right = drawn[0].axes
    assert [line.get_label() for line in left.lines] == ["train loss", "train loss, smoothed", "eval loss"]
    assert left.lines[2].get_xdata().tolist() == [4, 8, 12] and right.lines[0].get_ydata().tolist() == [1e-3] * 12


def test_loss_png_is_a_picture_also_of_an_empty_run(tmp_path):
    log(tmp_path, 1, 0)
    blank = imread(tmp_path / "loss.png")
    log(tmp_path, 1, 12)
    picture = imread(tmp_path / "loss.png")
    assert blank.shape == picture.shape == (600, 1080, 4) and (blank != picture).any()


def test_smoothing_keeps_a_line_a_line():
    values = tuple(float(i) for i in range(300))
    assert plots._smooth(values)[5:-5] == pytest.approx(values[5:-5])
    assert plots._smooth((3.0,)) == [3.0] and plots._smooth(()) == []


@pytest.mark.root
def test_a_full_disk_says_so(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", disk], check=True)
    try:
        with pytest.raises(OSError, match="cannot write the metrics of step .* No space left on device"):
            with Metrics(disk, total_steps=1000, console=quiet()) as m:
                for step in range(1, 1000):
                    m.log(step, {"loss": 1.0, "load": [0.25] * 64})
        steps = [r["step"] for r in metrics.read(disk / "metrics.jsonl")]
        assert steps == list(range(1, len(steps) + 1)) and m.last - len(steps) in (0, 1)
    finally:
        subprocess.run(["umount", disk], check=True)


def test_the_load_of_experts_is_drawn_and_idle_ones_named(tmp_path):
    """The last tenth of the steps counts: expert 1 of layer 0 and 0 of layer 1 are idle then; 2 was, before."""
    with metrics.Metrics(tmp_path, total_steps=20, console=Console(file=(out := io.StringIO()))) as log:
        for step in range(1, 21):
            load = [[5, 0, 5 * (step > 10)], [0, 4, 4]] if step > 1 else [[1, 9, 0], [9, 0, 0]]
            log.log(step, {"loss": 1.0, "load": torch.tensor(load)})
    assert "experts that got next to no tokens lately: layer 0: 1; layer 1: 0; see" in out.getvalue().replace("\n", "")
    picture = imread(tmp_path / "experts.png")
    assert picture.shape[2] == 4 and picture.std() > 0.01


def test_even_experts_and_dense_models_are_not_warned_about(tmp_path):
    for name, row in (("even", {"load": [[3, 4, 3]]}), ("dense", {})):
        with metrics.Metrics(tmp_path / name, total_steps=1, console=Console(file=(out := io.StringIO()))) as log:
            log.log(1, {"loss": 1.0, **row})
        assert "experts" not in out.getvalue()
        assert (tmp_path / name / "experts.png").exists() == bool(row)


def test_norms_are_drawn_by_kind(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path: drawn.append((Path(path).name, figure)))
    with Metrics(tmp_path, total_steps=9, console=quiet()) as m:
        for step in range(1, 10):
            m.log(step, {"loss": 1.0, "grad_norm": 5.0, "grad_norms": {"embed": 3.0, "layers/attn/q": 4.0}})
    figure = dict(drawn)["norms.png"]
    assert figure.axes[0].get_yscale() == "log"
    lines = {line.get_label(): line.get_ydata().tolist() for line in figure.axes[0].lines}
    assert lines == {"embed": [3.0] * 9, "layers/attn/q": [4.0] * 9, "all": [5.0] * 9}


def test_norms_of_a_run_without_gradients_are_drawn_without_a_warning(tmp_path):
    rows = [{"step": step, "grad_norm": 0.0, "grad_norms": {"embed": 0.0}} for step in range(1, 9)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plots.norms(tmp_path, rows)
    assert imread(tmp_path / "norms.png").std() > 0.01


class Page(HTMLParser):
    """What a browser would show: pictures, cells of tables; any tag left open or crossed is an error."""

    def __init__(self, path: Path):
        super().__init__()
        self.pictures: list[str] = []
        self.cells: list[str] = []
        self.open: list[str] = []
        self.feed(path.read_text())
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        if tag == "img":
            self.pictures.append(dict(attributes)["src"])
        elif tag != "meta":
            self.open.append(tag)
        if tag == "td":
            self.cells.append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] == "td":
            self.cells[-1] += data


def test_the_page_shows_the_run(tmp_path):
    (tmp_path / "config.yaml").write_text("batch: 3\noptim:\n  lr: 0.5\n  name: <b>\n")
    with Metrics(tmp_path, total_steps=4, console=quiet()) as m:
        for step in range(1, 5):
            row = {"loss": 4.0 / step, "eval_loss": 2.0, "tokens": 1000, "load": [[1, 0]], "padding": 0.25}
            m.log(step, row | {"eval_losses": {"chats": 1.5, "sums": 2.5}})
        m.samples(4, [{"question": "1 < 2?", "given": "</td> & so"}, {"question": "x", "given": "y"}])
    seen = Page(tmp_path / "index.html")
    assert seen.pictures == ["loss.png", "experts.png"] and all((tmp_path / name).exists() for name in seen.pictures)
    for cell in ("4,000", "1.0000", "25.0%", "1.5000", "2.5000", "1 < 2?", "</td> & so", "optim.lr", "0.5", "<b>"):
        assert cell in seen.cells, cell
    assert "Experts that got next to no tokens lately: layer 0: 1." in (tmp_path / "index.html").read_text()
    assert page.summary([]) == {"steps": "0"}


def test_the_page_of_a_run_with_rewards_begins_with_them(tmp_path, monkeypatch):
    with Metrics(tmp_path, total_steps=20, console=quiet()) as m:
        for step in range(1, 21):
            held_out = {"accuracy": step / 100} if step % 10 == 0 else {}
            held_out |= {"before": {"accuracy": 0.05}} if step == 1 else {}
            m.log(step, {"loss": 0.0, "reward": step / 10} | held_out)
    seen = Page(tmp_path / "index.html")
    assert seen.pictures == ["reward.png", "loss.png"] and "" not in seen.cells
    drawn = []
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda figure, path: drawn.append(figure.axes[0].lines))
    plots.reward(tmp_path, rows(tmp_path))
    assert [*zip(*drawn[0][2].get_data(), strict=True)] == [(0, 0.05), (10, 0.1), (20, 0.2)]
    assert page.summary(rows(tmp_path)) == {
        "steps": "20", "tokens": "0", "reward, last tenth": "1.9500", "held-out accuracy, before": "5.0%",
        "held-out accuracy, last": "20.0%",
        "train loss, last tenth": "0.0000", "skipped steps": "0", "hours": "0.000",
    }  # fmt: skip


def test_the_page_has_every_column_of_the_answers_that_it_shows(tmp_path):
    lost, fine = {"prompt": "a", "error": "KeyError: gone"}, {"prompt": "b", "answer": "7", "reward": 1.0}
    with Metrics(tmp_path, total_steps=1, console=quiet()) as m:
        m.log(1, {"loss": 0.0, "completions_table": [lost, fine]})
    html, seen = (tmp_path / "index.html").read_text(), Page(tmp_path / "index.html")
    assert "".join(f"<th>{name}</th>" for name in ("step", "prompt", "error", "answer", "reward")) in html
    at = seen.cells.index("KeyError: gone") - 2
    assert seen.cells[at : at + 10] == ["1", "a", "KeyError: gone", "", "", "1", "b", "", "7", "1"]


def test_weights_and_biases_gets_the_rows(tmp_path, monkeypatch):
    """Its own client, offline: its file is read back with its own protocol."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("HOME", str(tmp_path))
    folder = tmp_path / "run"
    log(folder, 1, 3, wandb="project", config={"lr": 0.5})
    log(folder, 3, 4, wandb="project")  # a resumed run repeats a step
    from wandb.proto import wandb_internal_pb2

    rows, configs, ids = [], [], set()
    for file in sorted(folder.rglob("run-*.wandb"), key=lambda file: file.stat().st_mtime_ns):
        data, at = file.read_bytes(), 7  # LevelDB's log format behind a header; one block here
        assert len(data) < 32768
        while at < len(data):
            _, length, kind = struct.unpack("<IHB", data[at : at + 7])
            assert kind == 1
            record = wandb_internal_pb2.Record()
            record.ParseFromString(data[at + 7 : at + 7 + length])
            at += 7 + length
            items = record.history.item
            rows += [{i.nested_key[0] if i.nested_key else i.key: json.loads(i.value_json) for i in items}]
            updates = record.run.config.update
            configs += [json.loads(u.value_json) for u in updates if u.key == "lr" or u.nested_key == ["lr"]]
            ids |= {record.run.run_id} - {""}
    seen = [(row["step"], row["loss"]) for row in rows if "loss" in row]
    assert seen == [(step, pytest.approx(1 / step)) for step in (1, 2, 3, 3, 4)] and configs == [0.5]
    assert ids == {(folder / "wandb-id").read_text()}


def test_what_weights_and_biases_refuses_is_said(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(ValueError, match="--wandb a/b%: Invalid project name 'a/b%'"):
        log(tmp_path / "run", 1, 1, wandb="a/b%")


def test_weights_and_biases_absent_is_said(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="--wandb project: wandb is not installed; pip install wandb"):
        RunOptions(wandb="project")


def test_norms_leave_out_only_the_steps_that_are_not_finite(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path: drawn.append(figure))
    norms = [None if step == 60 else 2.0 for step in range(1, 121)]
    rows = [{"step": i, "grad_norm": x, "grad_norms": {"a": x, "b": 0.0}} for i, x in enumerate(norms, 1)]
    plots.norms(tmp_path, rows)
    lines = {line.get_label(): line for line in drawn[0].axes[0].lines}
    assert lines["a"].get_xdata().tolist() == [i for i in range(1, 121) if i != 60] == lines["all"].get_xdata().tolist()
    assert set(lines["a"].get_ydata()) == {2.0} and set(lines["b"].get_ydata()) == {0.0}


def test_a_long_run_is_remembered_without_its_long_parts(tmp_path, monkeypatch):
    monkeypatch.setattr(metrics, "LATE", 3)
    with Metrics(tmp_path, total_steps=50, console=quiet()) as m:
        for step in range(1, 51):
            m.log(step, {"loss": 1.0, "load": [[step, 0]], "weight_norms": {"embed": 1.0}})
    rows, loads = metrics.history(tmp_path)
    assert len(rows) == 50 and rows[-1] == {"step": 50, "loss": 1.0}
    assert [int(load[0, 0]) for load in loads] == [48, 49, 50]


def test_answers_of_rollouts_are_written_shown_and_dropped_with_their_step(tmp_path):
    def answers(step, count=20):
        each = {"none": None, "advantage": 1 / 3, "finish_reason": "stop"}
        return [{"prompt": f"<b>{step}</b>", "completion": f"no. {i}", **each} for i in range(count)]

    with Metrics(tmp_path, total_steps=9, console=quiet()) as m:
        for step in (1, 2, 3):
            m.log(step, {"loss": 0.0} | ({"completions_table": answers(step)} if step != 2 else {}))
    assert [set(row) for row in rows(tmp_path)] == [{"step", "loss"}] * 3
    told = list(metrics.read(tmp_path / "completions.jsonl"))
    assert told == [{"step": step, **answer} for step in (1, 3) for answer in answers(step)]
    html = (tmp_path / "index.html").read_text()
    assert html.count("&lt;b&gt;3&lt;/b&gt;") == 16 and "0.3333" in html and "no. 19" in html and "no. 3<" not in html
    with Metrics(tmp_path, total_steps=9, start_step=2, console=quiet()):
        assert {row["step"] for row in metrics.read(tmp_path / "completions.jsonl")} == {1}
    with Metrics(tmp_path, total_steps=9, start_step=2, console=quiet(), main=False) as other:
        other.log(3, {"completions_table": answers(3)})
    assert {row["step"] for row in metrics.read(tmp_path / "completions.jsonl")} == {1}
