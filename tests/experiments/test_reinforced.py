"""What `make grpo` says it does: three seeds learn the shipped tasks, and the control learns nothing."""

import json
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def accuracy(out: Path, target: str, seed: int) -> tuple[float, float]:
    """Run a target of the Makefile; return the shares of held-out answers that are right before and after."""
    done = subprocess.run(
        ["make", target, f"SEED={seed}", f"ARGS=--out {out}"], cwd=ROOT, capture_output=True, text=True, timeout=3600
    )
    assert done.returncode == 0, done.stdout + done.stderr
    before = re.search(r"before training ([\d.]+)% of 512 answers are right", done.stdout)
    assert before
    rows = map(json.loads, (out / "metrics.jsonl").read_text("utf-8").splitlines())
    return float(before[1]) / 100, [row["accuracy"] for row in rows if "accuracy" in row][-1]


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_make_grpo_learns(tmp_path, seed):
    before, after = accuracy(tmp_path / "run", "grpo", seed)
    assert after >= 0.9 and after >= before + 0.1


@pytest.mark.slow
def test_shuffled_rewards_teach_nothing(tmp_path):
    before, after = accuracy(tmp_path / "run", "grpo-control", 0)
    assert abs(after - before) <= 0.03
