"""The benchmarks run at small sizes and say so when something is wrong. Their figures are for a quiet machine."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from experiments.benchmarks import gpu_checks, gpu_speed, gpu_suite, sft_cpu
from functional_trainer import flops

BENCHMARKS = Path(__file__).parents[2] / "experiments" / "benchmarks"
CPU = torch.device("cpu")


def run(script: str, *flags: str, **env: str) -> subprocess.CompletedProcess:
    env = os.environ | {"OMP_NUM_THREADS": "1"} | env
    return subprocess.run(
        [sys.executable, BENCHMARKS / script, *flags], env=env, capture_output=True, text=True, timeout=600
    )


@pytest.mark.parametrize(
    "dtype, names",
    [
        ("float32", ["ours-off", "hf-grouped_mm"]),
        pytest.param("bfloat16", ["ours-off", "hf-eager", "hf-eager-autocast"], marks=pytest.mark.slow),
    ],
)
def test_sft_cpu_times_contestants_that_agree(tmp_path, dtype, names):
    result = run(
        "sft_cpu.py", "--dtype", dtype, "--rounds", "2", "--warmup", "1", "--threads", "1", "--layers", "1",
        "--rows", "2", "--seq-len", "48", "--json", str(tmp_path / "out.json"), "--contestants", "floor*", *names,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    rows = {row["name"]: row for row in json.loads((tmp_path / "out.json").read_text())["results"]}
    assert set(rows) == {"floor", "floor-memory", *names}
    for row in rows.values():
        assert 0 < row["min_s"] <= row["median_s"] <= row["max_s"] and row["first_s"] > 0
        assert row["peak_mib"] >= row["steps_mib"] > 0
    losses = [rows[name]["losses"][0] for name in names]
    assert max(losses) - min(losses) <= (1e-4 if dtype == "float32" else 5e-3) * min(losses)
    assert rows["floor"]["median_s"] < rows["ours-off"]["median_s"]


def test_sft_cpu_reports_a_contestant_that_needs_too_much_memory():
    contestant = sft_cpu.Contestant("ours-off", sft_cpu.Options(threads=1, warmup=1, memory_gib=0.02))
    contestant.stop()
    assert "error" in contestant.row


def test_sft_cpu_refuses_unknown_contestants():
    result = run("sft_cpu.py", "--contestants", "theirs")
    assert result.returncode == 1 and "hf-grouped_mm-compiled" in result.stderr


def test_a_loss_that_differs_is_an_error():
    rows = [{"name": "floor", "losses": [float("nan")]}, {"name": "ours-off", "losses": [7.0]}]
    rows += [
        {"name": "hf-a", "losses": [7.0005]},
        {"name": "hf-b", "losses": [7.01]},
        {"name": "hf-c", "losses": [float("nan")]},
    ]
    sft_cpu.judge(rows, 1e-4)
    assert [row["name"] for row in rows if "error" in row] == ["hf-b", "hf-c"]


def test_packed_batch_holds_whole_documents():
    batch = sft_cpu.packed_batch(3, 70, 50, seed=4, shortest=9)
    lengths = flops.lengths(batch["segment_ids"])
    assert lengths.sum() == 210 and lengths.max() <= 35 and len(lengths) > 6
    assert ((batch["positions"] == 0).sum() == len(lengths)) and batch["segment_ids"].min() == 1
    inside = batch["segment_ids"][:, 1:] == batch["segment_ids"][:, :-1]
    assert (batch["targets"][:, :-1] == batch["tokens"][:, 1:])[inside].all()
    assert 0.4 < batch["weights"].mean() < 0.6


def test_gpu_suite_runs_every_case_at_small_sizes(tmp_path):
    result = run(
        "gpu_suite.py", "--device", "cpu", "--rounds", "1", "--steps", "1", "--json", str(tmp_path / "out.json")
    )
    assert result.returncode == 0, result.stdout + result.stderr
    out = json.loads((tmp_path / "out.json").read_text())
    assert {(c["case"], c["dtype"]) for c in out["checks"]} == {
        (n, d) for n in gpu_checks.CASES for d in gpu_checks.TOLERANCE
    }
    skipped = {c["case"] for c in out["checks"] if c["dtype"] == "float32" and c["status"] == "skip"}
    assert skipped == {"attention flash_attn", "attention flash_attn window"}
    assert [row["name"] for row in out["speed"]] == list(gpu_speed.contestants(True))
    assert all(row["tokens_s"] > 0 and row["mfu"] is None for row in out["speed"])


def test_gpu_suite_fails_on_a_wrong_kernel(monkeypatch):
    import kernels

    right = kernels.swiglu
    monkeypatch.setattr(kernels, "swiglu", lambda x: right(x) * 1.001)
    checks = gpu_checks.CASES["elementwise"](gpu_checks.At(CPU, "float32", True))
    failed = {check.what.split()[0] for check in checks if not check.error <= check.tolerance}
    assert failed == {"swiglu"}


def test_gpu_suite_replays_the_routing():
    """Routed elsewhere, transformers would give another loss: with other ids forced, parity must break."""
    model, params, batch = gpu_checks.prepared(gpu_checks.At(CPU, "float32", True), "qwen3_moe")
    _, _, ids = gpu_checks.our_side(model, params, batch)
    module = sft_cpu.hf_module(model, torch.float32, CPU, params, attn_implementation="sdpa")
    inputs, flips = sft_cpu.hf_inputs(batch), []
    losses = []
    for forced in (ids, [(x + 1) % model.config.experts for x in ids]):
        with torch.no_grad(), gpu_checks.routed(module, forced, True, flips):
            losses.append(module(**inputs).loss.item())
    assert flips[: len(ids)] == [0] * len(ids) and min(flips[len(ids) :]) > 0
    assert abs(losses[0] - losses[1]) > 1e-4


def test_gpu_suite_goes_on_after_a_failure():
    worker = gpu_suite.Worker("cpu")
    try:
        status, why = worker.ask("check", "no such case", "float32")
        assert status == "failed" and "no such case" in why
        assert worker.ask("check", "grouped_matmul blas", "float32")[0] == "ok"
    finally:
        worker.stop()


def test_gpu_suite_says_when_a_device_is_missing():
    result = run("gpu_suite.py", "--device", "cuda", CUDA_VISIBLE_DEVICES="")
    assert result.returncode == 1 and "not on this machine" in result.stderr
