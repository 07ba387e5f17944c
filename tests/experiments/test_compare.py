"""experiments/compare.py on runs written by hand."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from matplotlib.image import imread

from experiments import compare

SCRIPT = Path(__file__).parents[2] / "experiments" / "compare.py"


def write(folder, losses, lr, evals=()):
    folder.mkdir()
    rows = [
        {"step": i + 1, "loss": loss, "lr": lr, "tokens": 10, "tokens_per_s": 100.0 + i,
         "memory_bytes": 2**21 * (i + 1), "time": {"data": 0.5, "step": 3.0, "other": 0.1},
         "eval_loss": dict(evals).get(i + 1)}
        for i, loss in enumerate(losses)
    ]  # fmt: skip
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    groups = f"[/a-z]{'+' if lr < 0.15 else '*'} -> frozen"
    head = f"optim: {{lr: {lr}, name: adamw, groups: '{groups}'}}"
    (folder / "config.yaml").write_text(f"{head}\nout: {folder.name}\n")
    return str(folder)


def run(*flags, cwd):
    env = os.environ | {"COLUMNS": "120"}
    return subprocess.run([sys.executable, SCRIPT, *flags], cwd=cwd, env=env, capture_output=True, text=True)


def test_two_runs_are_drawn_and_told_apart(tmp_path):
    write(tmp_path / "a", [3.0, 2.0, None, *[1.0] * 17, 0.5, 0.25], 0.1, [(5, 2.5), (22, 1.5)])
    write(tmp_path / "b", [3.0, 2.5], 0.2)
    done = run("a", "b", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    lines = [" ".join(line.replace("│", " ").split()) for line in done.stdout.splitlines()]
    for line in ("steps 22 2", "tokens 220 20", "eval loss, last 1.5000", "eval loss, best 1.5000", "optim.lr 0.1 0.2",
                 "optim.groups [/a-z]+ -> frozen [/a-z]* -> frozen",
                 "train loss, last tenth 0.5833 2.5000", "peak memory, MiB 44 4", "hours 0.022 0.002"):  # fmt: skip
        assert line in lines, (line, lines)
    assert not any("optim.name" in line for line in lines)
    assert "losses are drawn in compare.png" in done.stdout
    both = imread(tmp_path / "compare.png")
    assert run("a", "a", "--picture", "same.png", cwd=tmp_path).returncode == 0
    assert both.std() > 0.01 and (imread(tmp_path / "same.png") != both).any()


def test_what_is_no_run_is_named(tmp_path):
    write(tmp_path / "a", [1.0], 0.1)
    done = run("a", "nothing", cwd=tmp_path)
    assert done.returncode == 1 and done.stderr.startswith("error: nothing: no run in this folder")
    assert run("a", cwd=tmp_path).stderr == "error: give at least two run folders\n"
    for picture, why in (("gone/x.png", "No such file or directory"), ("x.foo", "Format 'foo' is not supported")):
        done = run("a", "a", "--picture", picture, cwd=tmp_path)
        assert done.returncode == 1 and done.stderr.startswith(f"error: --picture {picture}: {why}") and not done.stdout
    with pytest.raises(ValueError, match="no run in this folder"):
        compare.summary(str(tmp_path))
