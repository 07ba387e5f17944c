"""Ranks that die, hang or were given different things, and runs that go on elsewhere: the real recipe on gloo ranks."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from sharding_rules import P, Rules
from tests.experiments import sft_runs
from tests.experiments.sft_runs import RECIPE, learned, rows, run, run_ranks, same_state, start

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
BASE: tuple[Any, ...] = (
    *("--model.path", "moe", "--data.train", "train.jsonl", "--data.eval", "eval.jsonl", "--data.seq-len", 64),
    *("--batch", 4, "--steps", 6, "--save-every", 2, "--eval-every", 0, "--compile", "off", "--optim.lr", 1e-2),
)
PLANTED = f"""
import os, runpy, signal, sys, time
from pathlib import Path
import functional_trainer.step as module

gradient, calls, what = module.gradient, [], sys.argv[1]

def planted(*args, **options):
    calls.append(1)
    if (os.environ["RANK"], os.environ["TORCHELASTIC_RESTART_COUNT"], len(calls)) == ("1", "0", 4):
        Path("planted").write_text(str(time.time()))
        if what == "raise":
            raise KeyError("a planted error")
        if what == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(120)
    return gradient(*args, **options)

if what != "nothing":
    module.gradient = planted
sys.argv[:2] = [{str(RECIPE)!r}]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def make_place(folder: Path, seed: int = 0) -> Path:
    sft_runs.folder(folder / "moe")
    sft_runs.chats(folder / "train.jsonl", 40, seed)
    sft_runs.chats(folder / "eval.jsonl", 6, seed=9)
    (folder / "planted.py").write_text(PLANTED)
    return folder


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    return make_place(tmp_path_factory.mktemp("failures"))


# Ranks that die or hang, under torchrun.


def torchrun(place: Path, what: str, *flags: Any, restarts: int = 0) -> tuple[int, str, float]:
    """Run the recipe on two ranks, the second of which fails in step 4; return status, output and seconds it took."""
    (place / "planted").unlink(missing_ok=True)
    how = ["--standalone", "--nproc-per-node", 2, "--max-restarts", restarts]
    command = [sys.executable, "-m", "torch.distributed.run", *how, "planted.py", what, *BASE, "--mesh.fsdp", 2, *flags]
    environ = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        list(map(str, command)), cwd=place, env=environ, timeout=150, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    begun = float((place / "planted").read_text()) if (place / "planted").exists() else time.time()
    return done.returncode, done.stdout, time.time() - begun


@pytest.mark.slow
def test_a_rank_that_raises_ends_the_job_and_its_traceback_comes_first(place):
    status, printed, seconds = torchrun(place, "raise", "--out", "raised")
    assert status == 1 and seconds < 60
    first = printed[printed.index("Traceback") :]
    assert first.index("a planted error") < first.find("Traceback", 1) % len(first), printed
    cause = printed[printed.index("Root Cause (first observed failure)") :]
    assert "(local_rank: 1)" in cause and "KeyError: 'a planted error'" in cause, printed


@pytest.mark.slow
def test_a_rank_that_is_killed_ends_the_job(place):
    status, printed, seconds = torchrun(place, "kill", "--out", "killed")
    assert status == 1 and seconds < 60
    assert "Signal 9 (SIGKILL) received" in printed and "(local_rank: 1)" in printed, printed


@pytest.mark.slow
@pytest.mark.parametrize("what", ["raise", "kill"])
def test_a_restart_goes_on_from_the_last_checkpoint(place, what):
    flags = ("--saving", "async")
    assert torchrun(place, "nothing", *flags, "--out", f"whole-{what}")[0] == 0
    status, printed, _ = torchrun(place, what, *flags, "--out", f"again-{what}", restarts=1)
    assert status == 0, printed
    assert f"resumed from again-{what}/checkpoints/step-2 at step 2 of 6; 4 are left" in printed, printed
    assert learned(place / f"again-{what}") == learned(place / f"whole-{what}")
    same_state(place / f"again-{what}", place / f"whole-{what}")


@pytest.mark.slow
def test_a_hang_says_where_and_ends(place):
    status, printed, seconds = torchrun(place, "hang", "--timeout", 16, "--out", "hung")
    assert status == 1 and seconds < 16 + 60
    assert "rank 1 has not got on for 8 s" in printed and "rank 0 has not got on for 8 s" in printed, printed
    assert 'planted.py", line' in printed and "in planted" in printed, printed  # the stack of the rank that hangs
    assert "Timed out waiting" in printed
    for rank in (0, 1):
        entries = json.loads((place / "hung" / f"flight-recorder-{rank}.json").read_text())["entries"]
        assert entries and all(entry["profiling_name"].startswith("gloo:") for entry in entries)


# Ranks that were given different things.


class OtherRules:
    """Store one more matrix whole."""

    def __call__(self) -> None:
        from experiments import rules

        whole = P(None, None, None)
        table = [(k, whole if k.endswith("attn/o") else spec) for k, spec in rules.RULES["qwen3_moe"].table]
        rules.RULES["qwen3_moe"] = Rules(tuple(table))


def different(places: list[Path], *flags: Any, other: tuple = (), setup: Any = None) -> str:
    """Start two ranks, the second in its own place with `other` flags; return the one error that both print."""
    shared = sft_runs.announced(2)
    how = [((), None), (other, setup)]
    ranks = [
        start(cwd, *BASE, "--mesh.fsdp", 2, "--out", "odd", *more, env=shared | {"RANK": str(r), "LOCAL_RANK": str(r)},
              setup=called)
        for r, (cwd, (more, called)) in enumerate(zip(places, how, strict=True))
    ]  # fmt: skip
    assert [rank.wait() for rank in ranks] == [1, 1], ranks[0].output
    errors = [rank.output[rank.output.index("error: ") :] for rank in ranks]
    assert errors[0] == errors[1] and "Traceback" not in ranks[0].output
    assert not list(places[0].glob("odd/metrics.jsonl"))
    return errors[0]


def test_ranks_with_other_options_are_found(place):
    error = different([place, place], other=("--optim.lr", 2e-2, "--seed", 3))
    assert error.splitlines() == [
        "error: ranks differ in 2 of what must be the same on all of a run:",
        "  --seed is 0 on rank 0, 3 on rank 1",
        "  --optim.lr is 0.01 on rank 0, 0.02 on rank 1",
    ]


def test_ranks_with_other_rules_are_found(place):
    error = different([place, place], setup=OtherRules())
    assert "differ in 1 of" in error and "rule params/layers/\\w+/attn/o is P(zero('fsdp', 'ep', 'cp'), 'tp'" in error
    assert "P(None, None, None) on rank 1" in error


def test_ranks_with_other_data_or_models_are_found(place, tmp_path):
    other = make_place(tmp_path, seed=1)
    assert "training data: content is " in different([place, other])
    shutil.copy(place / "train.jsonl", other)
    config = other / "moe" / "config.json"
    config.write_text(config.read_text().replace('"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e-05'))
    error = different([place, other])
    assert "differ in 1 of" in error and "config.json rms_norm_eps is 1e-06 on rank 0, 1e-05 on rank 1" in error


# Runs that go on elsewhere.


@pytest.mark.slow
def test_a_run_goes_on_on_other_meshes_bit_for_bit(place):
    """fsdp2, cp2, ep2 and one process, two steps each: the same weights at each change, and one stream of data."""
    flat = ("--optim.schedule", "constant", "--optim.warmup", 0, "--dtype", "float64", "--saving", "async")
    stages = {"fsdp": 2, "cp": 2, "ep": 2, "one": 1}
    run(place, *BASE, *flat, "--steps", 8, "--keep", 9, "--out", "straight")
    before: tuple[Any, ...] = ()
    for number, (name, world) in enumerate(stages.items(), 1):
        mesh = ("--mesh.fsdp", 1 + (name == "fsdp"), *(() if name in ("fsdp", "one") else (f"--mesh.{name}", 2)))
        flags = (*BASE, *flat, *mesh, *before)
        if before:  # no step is left: what is loaded is written to hf/
            run_ranks(place, world, *flags, "--steps", 2 * number - 2, "--out", f"{name}-loaded")
            ours, theirs = (place / f"{name}-loaded" / "hf", place / before[1] / "hf")
            assert (ours / "model.safetensors").read_bytes() == (theirs / "model.safetensors").read_bytes()
        run_ranks(place, world, *flags, "--steps", 2 * number, "--out", name)
        at = place / "straight" / "checkpoints" / f"step-{2 * number}" / "extra.json"
        assert sft_runs.state(place / name)[1]["loader"] == json.loads(at.read_text())["loader"]
        before = ("--resume", name)
    straight, parts = rows(place / "straight"), [row for name in stages for row in rows(place / name)]
    for key in ("step", "tokens", "trained_tokens", "padding", "load"):
        assert [row[key] for row in parts] == [row[key] for row in straight], key
    ours, theirs = (torch.tensor([row["loss"] for row in found], dtype=torch.float64) for found in (parts, straight))
    assert torch.allclose(ours, theirs, rtol=1e-10, atol=0)
