"""The programs that plan and rehearse a step."""

import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.testing._internal.distributed.fake_pg import FakeStore

from experiments import plan
from experiments.estimate import estimate
from experiments.fit import changes, cheapest
from functional_trainer.options import OptimOptions
from sharding_rules import roofline
from sharding_rules.plan import plan as costs

ROOT = Path(__file__).parents[2]
TINY = plan.Options(model="tiny", mesh="fsdp=2,ep=2", seq_len=64, rows=4)


def run(program: str, *flags: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, ROOT / "experiments" / program, *flags], capture_output=True, text=True)


def test_a_plan_is_printed_and_drawn(tmp_path, capsys):
    plan.main(replace(TINY, plot=tmp_path / "plan.png"))
    text = capsys.readouterr().out
    assert "tiny on fsdp=2,ep=2: 4 x H100, 1,024 tokens" in text and re.search(r"all_to_all_single +│ +ep", text)
    assert "fits: " in text and (tmp_path / "plan.png").exists()


@pytest.mark.slow
def test_what_does_not_fit_is_told_the_cheapest_change(monkeypatch, capsys):
    """Room for the state and few activations: layers are recomputed before rows are split."""
    held = {remat: estimate(replace(TINY, remat=remat)).held for remat in ("none", "layer")}
    room = (held["none"] + held["layer"]) / 2
    device = roofline.DEVICES["H100"]._replace(memory=room / (1 - roofline.SPARE))
    monkeypatch.setitem(roofline.DEVICES, "H100", device)
    with pytest.raises(SystemExit):
        plan.main(replace(TINY, remat="none"))
    said = capsys.readouterr().out
    assert "DOES NOT FIT" in said and "the cheapest change that fits: --remat " in said
    state = 12 * estimate(TINY).costs["rest", "params"] / 4  # masters and two moments
    monkeypatch.setitem(roofline.DEVICES, "H100", device._replace(memory=state))
    assert "cp" in cheapest(TINY) or "fsdp" in cheapest(TINY)
    monkeypatch.setitem(roofline.DEVICES, "H100", device._replace(memory=1e3))
    assert "nothing of what was tried" in cheapest(TINY)


def test_what_is_proposed_gets_dearer(monkeypatch):
    """A schedule, bfloat16 moments, host memory, 8 bits where the device has them, and then other meshes."""
    kinds = [[name for name, _ in some] for some in changes(TINY)]
    assert kinds[1] == ["--remat layer --micro-batches 4 --optim.moments bfloat16"]
    sent = ["optimizer", "activations", "activations optimizer"]
    assert kinds[2] == [f"--remat layer --micro-batches 4 --offload {what}" for what in sent]
    assert kinds[3] == ["--remat layer --micro-batches 4 --precision fp8"] and "--mesh" in kinds[4][0]
    assert not any("fp8" in name for some in changes(replace(TINY, gpu="A100")) for name, _ in some)
    least = replace(TINY, micro_batches=4, optim=OptimOptions(moments="bfloat16"))
    here, away = (estimate(replace(least, offload=o)).held for o in ((), ("optimizer",)))
    device = roofline.DEVICES["H100"]._replace(memory=(here + away) / 2 / (1 - roofline.SPARE))
    monkeypatch.setitem(roofline.DEVICES, "H100", device)
    assert away < here and cheapest(least).startswith("--remat layer --micro-batches 4 --offload optimizer: ")


def test_products_in_8_bits_are_rated_and_weights_travel_in_8_bits():
    o = plan.Options(model="dense-0.6b", mesh="fsdp=2", seq_len=64, remat="none")
    wide, eight = (estimate(replace(o, precision=p)) for p in ("dtype", "fp8"))
    sent = [e.costs["sent", "all_gather_into_tensor", ("fsdp",)] for e in (wide, eight)]
    embed = 2 * 151936 * 1024  # the table, tied, in bfloat16, gathered for the embedding and for the head
    layers = [n - 2 * embed for n in sent]
    assert 0.5 < layers[1] / layers[0] < 0.51  # scales and norms are the rest
    assert eight.done == wide.done and eight.work < wide.work
    with pytest.raises(ValueError, match="--precision fp8: A100 has no products of operands in 8 bits"):
        estimate(replace(o, gpu="A100", precision="fp8"))


def test_passes_are_extrapolated_exactly():
    many = replace(TINY, rows=10, micro_batches=5)
    model, build, rules, sizes = plan.pieces(many)
    assert estimate(many).costs == costs(model, build, rules, sizes, many.rows, many.seq_len)
    with pytest.raises(ValueError, match="--rows 10 cannot be split into --micro-batches 4"):
        estimate(replace(many, micro_batches=4))


@pytest.mark.parametrize(
    "wrong, says",
    [
        ({"rows": 0}, "--rows is 0; it must be at least 1"),
        ({"seq_len": 0}, "--seq-len is 0"),
        ({"micro_batches": 0}, "--micro-batches is 0"),
        ({"seq_len": 64, "document": 100}, "--document 100: --seq-len 64 is not whole documents"),
        ({"plot": Path("x.foo")}, "--plot x.foo: name a .png"),
    ],
)
def test_sizes_and_files_that_cannot_be_are_refused(wrong, says):
    with pytest.raises(ValueError, match=says):
        plan.Options(**wrong)


def test_what_is_no_model_is_an_error():
    with pytest.raises(ValueError, match="no folder, and no preset; these are: 30b-a3b"):
        plan.main(replace(TINY, model="gpt"))


def test_a_plan_is_made_after_a_job_was_left():
    """Which forgets the names of all groups, a plan's too."""
    before = estimate(TINY).costs
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    torch.distributed.destroy_process_group()
    assert estimate(TINY).costs == before


def test_a_dry_run_of_a_small_model_is_as_planned():
    ran = run("dry_run.py", "--model", "tiny", "--mesh", "dp=2,fsdp=4,ep=2,cp=2,tp=2", "--seq-len", "64")
    assert ran.returncode == 0, ran.stderr
    assert "as rank 0 of 64" in ran.stdout and "are as planned" in ran.stdout


@pytest.mark.slow
@pytest.mark.parametrize("model, mesh, ranks", [("235b-a22b", "fsdp=64,ep=8", 512), ("1t", "fsdp=64,ep=16", 1024)])
def test_a_dry_run_of_all_layers_is_as_planned(model, mesh, ranks):
    ran = run("dry_run.py", "--model", model, "--mesh", mesh)
    assert ran.returncode == 0, ran.stderr
    assert f"as rank 0 of {ranks}" in ran.stdout and "are as planned" in ran.stdout
