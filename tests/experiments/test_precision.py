"""The SFT recipe with --precision fp8: what it learns, resuming, bad input."""

from pathlib import Path

import pytest

from tests.experiments import sft_runs
from tests.experiments.sft_runs import learned, rows, run, same_state

SHORT = ("--batch", 4, "--steps", 4, "--save-every", 2, "--compile", "off", "--eval-every", 4, "--samples", 0)
DATA = ("--data.train", "train.jsonl", "--data.seq-len", 64, "--answers", 0)
EIGHT = ("--model.path", "moe", "--dtype", "bfloat16", "--precision", "fp8", *SHORT, *DATA)


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("fp8")
    sft_runs.folder(place / "moe")
    sft_runs.chats(place / "train.jsonl", 40)
    return place


@pytest.mark.parametrize("recipe", ["tile", "row"])
def test_a_resumed_run_is_the_same_run(place, recipe):
    run(place, *EIGHT, "--fp8.recipe", recipe, "--out", recipe)
    from_two = ("--resume", f"{recipe}/checkpoints/step-2", "--out", f"{recipe}-resumed")
    run(place, *EIGHT, "--fp8.recipe", recipe, *from_two)
    same_state(place / recipe, place / f"{recipe}-resumed")
    assert learned(place / recipe)[2:] == learned(place / f"{recipe}-resumed")[-2:]


def test_bad_input_is_one_clear_error(place):
    said = run(place, *EIGHT, "--fp8.recipe", "column", "--out", "bad", status=2)
    assert "tile" in said and "row" in said
    said = run(place, *EIGHT, "--fp8.exclude", "heads", "--out", "bad", status=1)
    assert "error: --fp8.exclude 'heads' matches no parameter; paths are embed, layers/_/attn_norm" in said


@pytest.mark.slow
def test_300_steps_in_8_bits_learn_what_bfloat16_does(tmp_path):
    """Within 1 %: the loss of the last 50 steps, and the held-out loss after them."""
    how = ("--steps", 300, "--dtype", "bfloat16", "--compile", "off", "--answers", 0, "--samples", 0)
    how += ("--eval-every", 300, "--optim.lr", 5e-4)
    found = {}
    for name, flags in {"bf16": (), "tile": ("--precision", "fp8"), "row": ("--fp8.recipe", "row")}.items():
        flags = flags if name != "row" else ("--precision", "fp8", *flags)
        sft_runs.start(tmp_path, *how, *flags, "--out", name).wait(1800)
        log = rows(tmp_path / name)
        found[name] = sum(row["nll"] for row in log[-50:]) / 50, log[-1]["eval_loss"]
    for name in ("tile", "row"):
        assert found[name] == pytest.approx(found["bf16"], rel=0.01) and found[name] != found["bf16"]
