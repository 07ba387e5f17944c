"""The benchmarks run at small sizes and say so when something is wrong. Their figures are for a quiet machine."""

import gc
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch.utils.checkpoint import checkpoint

import kernels
import models
from experiments.benchmarks import (
    decode,
    gpu_checks,
    gpu_suite,
    grpo,
    memory,
    rl_checks,
    runs,
    sft_cpu,
    sft_end_to_end,
    train_gpu,
)
from experiments.benchmarks import kernels as kernels_benchmark
from experiments.benchmarks.live_bytes import LiveBytes, allocated
from functional_trainer import flops, losses, policy, tree
from functional_trainer.engines.local import LocalEngine
from functional_trainer.step import evaluate, wrap_layer
from tests.models import small

BENCHMARKS = Path(__file__).parents[2] / "experiments" / "benchmarks"
CPU = torch.device("cpu")


def run(script: str, *flags: str, **env: str) -> subprocess.CompletedProcess:
    env = os.environ | {"OMP_NUM_THREADS": "1"} | env
    return subprocess.run(
        [sys.executable, BENCHMARKS / script, *flags], env=env, capture_output=True, text=True, timeout=600
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "dtype, names",
    [("float32", ["ours-off", "hf-grouped_mm"]), ("bfloat16", ["ours-off", "hf-eager", "hf-eager-autocast"])],
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


TINY = {"device": "cpu", "tokens": 5, "slots": 4, "rounds": 2, "warmup": 1, "layers": 1}


@pytest.mark.parametrize(
    "flags",
    [{}, {"stops": 40}, {"stops": 40, "samples": 3, "temperature": 1.0}, {"dtype": "bfloat16", "prompt_tokens": (3,)}],
)
def test_decode_times_contestants_that_agree(tmp_path, flags):
    small = TINY | {"contestants": ("ours-off", "hf-generate-eager"), "threads": torch.get_num_threads()}
    with pytest.raises(SystemExit) as ended:
        decode.main(decode.Options(**small, prompts=(6,), **flags, json=tmp_path / "out.json"))
    rows = {row["name"]: row for row in json.loads((tmp_path / "out.json").read_text())["results"]}
    assert not ended.value.code and rows.keys() == {"ours-off", "hf-generate-eager"}
    for row in rows.values():
        assert len(row["seconds"]) == 2 and row["rate"] == row["tokens"] / row["median_s"]
        assert 6 <= row["tokens"] <= 30 if "stops" in flags else row["tokens"] == 30
        assert row["others"] == (None if "temperature" in flags else 0)


@pytest.mark.slow
def test_decode_times_every_form_at_every_size(tmp_path):
    small = TINY | {"contestants": ("ours-*", "hf-*-grouped_mm"), "threads": torch.get_num_threads()}
    with pytest.raises(SystemExit) as ended:
        decode.main(decode.Options(**small, prompts=(6,), prompt_tokens=(0, 9), json=tmp_path / "out.json"))
    rows = json.loads((tmp_path / "out.json").read_text())["results"]
    assert not ended.value.code and all(row["others"] == 0 for row in rows)
    names = ["ours-off", "ours-layer", "ours-step", *(f"hf-{kind}-grouped_mm" for kind in decode.KINDS)]
    found = [(row["prompts"], row["prompt_tokens"], row["name"]) for row in rows]
    assert found == [(6, size, name) for size in (0, 9) for name in names]


def test_decode_runs_without_a_vllm(tmp_path):
    """With one: tests/vllm."""
    sizes = {"prompts": (2,), "layers": 1}
    absent = decode.Options(**sizes, vllm_python=tmp_path / "none")
    assert "vllm" not in decode.contestants(absent, CPU, tmp_path)
    present = decode.Options(**sizes, vllm_python=Path(sys.executable))
    found = decode.contestants(present, CPU, tmp_path)
    assert list(found)[-2:] == ["vllm", "floor"]
    with pytest.raises(RuntimeError, match="(?s)ended: .*No module named 'vllm'"):
        found["vllm"]([[1], [2]])


def test_decode_counts_answers_that_are_not_ours_and_goes_on_without_the_broken():
    def broken():
        raise ValueError("no such kernel")

    starts = {"ours-off": lambda: lambda: [[1, 2], [3]], "hf-a": lambda: lambda: [[1, 5], [4]], "hf-b": broken}
    for dtype, others in (("float32", 2), ("bfloat16", 1)):
        rows = decode.race(decode.Options(rounds=1, dtype=dtype), starts, Console(quiet=True))
        assert [row.get("others") for row in rows] == [0, others, None]
        assert rows[2]["error"] == "ValueError: no such kernel" and not rows[2]["seconds"]


def test_decode_goes_on_without_one_that_breaks_in_a_timed_round():
    left = [[[1, 2], [3]]] * 2
    starts = {"ours-off": lambda: left.pop} | dict.fromkeys(("hf-a", "hf-b"), lambda: lambda: [[1, 5], [4]])
    rows = decode.race(decode.Options(rounds=3, warmup=1), starts, Console(quiet=True))
    assert rows[0]["error"] == "IndexError: pop from empty list" and not rows[0]["seconds"]
    assert [row["others"] for row in rows[1:]] == [0, 0] and all(len(row["seconds"]) == 3 for row in rows[1:])


def test_decode_refuses_questions_that_are_not_asked_equally_often():
    with pytest.raises(ValueError, match="--prompts 8 are not some questions, each asked --samples 16 times"):
        decode.main(decode.Options(prompts=(16, 8), samples=16))


@pytest.mark.slow
def test_gpu_suite_runs_no_race_in_full_beside_what_was_chosen(monkeypatch):
    asked = []
    monkeypatch.setattr(gpu_suite, "beside", lambda *given: asked.append(given) or {})
    monkeypatch.setattr(gpu_suite, "run_speed", lambda *given: [])
    monkeypatch.setattr(gpu_suite, "run_memory", lambda *given: [])
    with pytest.raises(SystemExit) as ended:
        gpu_suite.main(gpu_suite.Options(device="cpu", only=("no such case",)))
    assert not ended.value.code and not asked


def test_packed_batch_holds_whole_documents():
    batch = sft_cpu.packed_batch(3, 70, 50, seed=4, shortest=9)
    lengths = flops.lengths(batch["segment_ids"])
    assert lengths.sum() == 210 and lengths.max() <= 35 and len(lengths) > 6
    assert ((batch["positions"] == 0).sum() == len(lengths)) and batch["segment_ids"].min() == 1
    inside = batch["segment_ids"][:, 1:] == batch["segment_ids"][:, :-1]
    assert (batch["targets"][:, :-1] == batch["tokens"][:, 1:])[inside].all()
    assert 0.4 < batch["weights"].mean() < 0.6


@pytest.mark.slow
def test_gpu_suite_runs_every_case_at_small_sizes(tmp_path):
    result = run(
        "gpu_suite.py", "--device", "cpu", "--rounds", "1", "--steps", "1", "--json", str(tmp_path / "out.json")
    )
    assert result.returncode == 0, result.stdout + result.stderr
    out = json.loads((tmp_path / "out.json").read_text())
    assert {(c["case"], c["dtype"]) for c in out["checks"]} == {
        (n, d) for n in gpu_suite.CASES for d in gpu_checks.TOLERANCE
    }
    skipped = {c["case"] for c in out["checks"] if c["dtype"] == "float32" and c["status"] == "skip"}
    gpu = "experts triton", "sort triton", "fp8_experts scaled_mm", "fp8_experts triton", "fp8_linear triton"
    elsewhere = {
        f"attention {b.name} {kind}"
        for b in kernels.BACKENDS["attention"]
        for kind in gpu_checks.KINDS
        if b.name in ("flash_attn", "flash_attn_3", "varlen") or kind not in {"plain", *b.cases} and b.name != "shapes"
    }
    assert skipped == elsewhere | {name for name in gpu_checks.CASES if name.startswith(gpu)}
    assert out["kernels"]["rows"] and not {"error"} & {*out["kernels"], *out["decode"], *out["grpo"]}
    generated = {(row["prompts"], row["name"]) for row in out["decode"]["results"]}
    assert generated >= {(n, name) for n in (3, 6) for name in ("ours-off", *gpu_suite.GENERATION[:2])}
    assert out["grpo"]["results"][0]["name"] == "ours-off-bf16" and 0 < out["grpo"]["results"][0]["generation"] < 1
    assert [row["name"] for row in out["speed"]] == list(train_gpu.contestants(True))
    assert all(row["tokens_s"] > 0 and row["mfu"] is None for row in out["speed"])
    losses = [loss for row in out["speed"] for loss in row["losses"]]
    assert 5 < min(losses) and max(losses) - min(losses) <= 2e-3 * min(losses)
    assert [row["name"] for row in out["memory"]] == memory.settings("off")
    numbers = models.count(models.from_config(sft_cpu.hf_config(1) | {"vocab_size": 64}))
    bytes_each = {"moments bfloat16": 4, "moments 8bit": 2 * (1 + 4 / 256), "small": 2 * (1 + 4 / 256), "ema": 12}
    bytes_each |= {"offload optimizer": 0}
    for row in out["memory"]:
        assert row["params"] == 4 * numbers and row["peak"] > row["params"] + row["moments"]
        assert row["moments"] == pytest.approx(bytes_each.get(row["name"], 8) * numbers, rel=1e-3), row["name"]


def test_gpu_suite_checks_every_backend_and_case_of_attention():
    assert gpu_checks.KINDS == ("plain", *kernels.CASES)
    assert {*gpu_checks.ATTENTION, "shapes"} == {b.name for b in kernels.BACKENDS["attention"]}


def test_gpu_suite_fails_on_a_wrong_kernel(monkeypatch):
    right = kernels.swiglu
    monkeypatch.setattr(kernels, "swiglu", lambda x: right(x) * 1.001)
    checks = gpu_checks.CASES["elementwise"](gpu_checks.At(CPU, "float32", True))
    failed = {check.what.split()[0] for check in checks if not check.error <= check.tolerance}
    assert failed == {"swiglu"}


def failures(case: str) -> set[str]:
    """Return which comparisons of a case fail."""
    torch.manual_seed(0)
    checks = rl_checks.CASES[case](gpu_checks.At(CPU, "float32", True))
    return {check.what for check in checks if not check.error <= check.tolerance}


@pytest.mark.parametrize("case", ["decode qwen3_moe, off", "decode rows qwen3, sampled", "policy step qwen3_moe, gspo"])
def test_gpu_suite_checks_reinforcement(case):
    assert not failures(case)


def test_gpu_suite_fails_on_an_engine_that_keeps_old_weights(monkeypatch):
    """Whatever version it says that they are."""
    right = LocalEngine.update

    def stale(self, params, version):
        right(self, getattr(self, "params", tree.map(torch.Tensor.clone, params)), version)

    monkeypatch.setattr(LocalEngine, "update", stale)
    assert failures("decode qwen3, off") == {"after a step", "new over old"}


def test_gpu_suite_fails_on_an_engine_that_disturbs_rows_when_others_enter(monkeypatch):
    right = LocalEngine._admit

    def careless(self, rows, ready, running):
        for held in tree.leaves(self._cache) if running else ():
            held.copy_(held.roll(1, 0))
        right(self, rows, ready, running)

    monkeypatch.setattr(LocalEngine, "_admit", careless)
    assert "answers" in failures("decode rows qwen3, sampled")


def test_gpu_suite_fails_on_a_wrong_gradient_of_the_policy(monkeypatch):
    right = policy.divergence
    doubled = lambda *given: 2 * right(*given) - right(*given).detach()  # noqa: E731
    sides = iter((doubled, right))  # the device's, the host's
    monkeypatch.setattr(policy, "divergence", lambda *given: next(sides)(*given))
    assert failures("policy step qwen3, grpo") == {"gradient", "worst leaf"}


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


def test_train_gpu_says_what_a_contestant_lacks(monkeypatch):
    monkeypatch.setattr(train_gpu, "installed", list)
    o = gpu_suite.Options(what="speed", only=("ours-*", "torchtitan"))
    with pytest.raises(ValueError, match="torchtitan: no such .* there are ours-layer, hf-sdpa; .*liger-kernel, torch"):
        gpu_suite.run_speed(o, {"small": "yes"}, Console())


def test_train_gpu_starts_everyone_from_the_same_weights():
    model = models.from_config(train_gpu.timed_config("30b-a3b", 1, True))
    wide, narrow = (tree.flatten(train_gpu.drawn(model, CPU, dtype)) for dtype in (torch.float32, torch.bfloat16))
    assert all(torch.equal(wide[path].bfloat16(), narrow[path]) for path in narrow)
    assert wide["embed"].std() == pytest.approx(0.06, rel=0.02) and (wide["norm"] == 1).all()


# memory --------------------------------------------------------------------------------------------------------------


def test_a_storage_counts_once_and_while_it_lives():
    held = torch.zeros(10)
    with LiveBytes([held, held[2:]]) as live:
        assert (live.now, live.peak) == (40, 40)
        x = torch.empty(100) + 1  # the empty one is gone when the sum is there
        assert (live.now, live.peak) == (440, 840)
        view, wide = x.view(10, 10).T[3], x.to(torch.float64)
        x.add_(1).mul_(view.sum())
        assert live.now == 440 + 800
        del x
        assert live.now == 440 + 800  # the view still holds it
        del view
        assert live.now == 40 + 800
        parts = wide.unflatten(0, (4, 25)).unbind()
        del wide
        assert live.now == 40 + 800
        del parts
        made = torch.cat([held, held]), torch.sort(torch.arange(3))
        assert live.now == 40 + 80 + 24 + 24
    del made
    assert live.now == 40


def test_activations_are_counted_as_by_hand():
    """A tanh keeps its result: a chain of them keeps all, a recomputed one its input and its end."""
    x = torch.ones(1000, requires_grad=True)

    def chain(x):
        for _ in range(5):
            x = x.tanh()
        return x

    with LiveBytes(x) as live:
        y = chain(x)
        assert live.now == live.peak == 6 * 4000
        torch.autograd.grad(y, x, torch.ones_like(y))
        del y
        assert live.now == 4000
        y = checkpoint(chain, x, use_reentrant=False)
        assert live.now == 2 * 4000 and y.requires_grad


def test_bytes_inside_our_ops_are_counted():
    """The head holds two chunks of 256 rows of logits at a time: its own and their exponentials, or those before."""
    T, D, V = 1024, 8, 300
    hidden, table, targets = torch.randn(T, D), torch.randn(V, D), torch.arange(T) % V
    with LiveBytes((hidden, table, targets)) as live:
        before = live.now
        kernels.linear_logprob(hidden, table, targets, entropy=False)
    chunks, results = 2 * 256 * V * 4, 3 * T * 4
    assert chunks + results <= live.peak - before <= chunks + results + 4 * 256 * 8
    assert live.now == before


@pytest.mark.parametrize("name", ["remat selective", "full logits"])
def test_counted_bytes_are_those_of_the_allocator(name):
    o = memory.Options(layers=2, rows=4, seq_len=512, vocab=600)
    step, state, batch = memory.build(o, memory.SETTINGS[name], CPU)
    step()
    held = sum(x.nbytes for x in tree.leaves((state, batch)))
    assert memory.peak(step, (state, batch), CPU, False) - held == pytest.approx(allocated(step), rel=1e-3)


def kept(remat: str, layers: int) -> int:
    """Return the bytes that a forward pass leaves for backward."""
    model = small.model(num_hidden_layers=layers, mlp_only_layers=[])
    batch = small.batch([[13], [8, 5]])
    leaves = tree.map(lambda p: p.requires_grad_(), model.init(0))
    model = wrap_layer(model, compile=False, remat=remat)
    with LiveBytes((leaves, batch)) as live:
        before = live.now
        sums = evaluate(model, losses.sft(), leaves, batch, {})
        gc.collect()
        after = live.now
    del sums
    return after - before


def test_what_is_kept_of_a_layer_is_as_by_hand():
    """The growth by a layer, every product's, the attention's and the router's result counted by its shape."""
    c, T = small.model().config, 26
    growth = {remat: kept(remat, 4) - kept(remat, 3) for remat in ("none", "selective", "layer")}
    assert growth["layer"] == 4 * (T * c.dim + c.experts)  # its input, and its row of the load that is reported
    heads = c.heads + 2 * c.kv_heads
    products = heads * c.head_dim + c.dim + c.experts + c.top_k * 2 * c.expert_hidden + c.dim
    attention, choice = c.heads * (c.head_dim + 1), c.top_k * (1 + 2)  # with logsumexp; values, and ids of 8 bytes
    assert growth["selective"] == growth["layer"] + 4 * T * (products + attention + choice)
    assert growth["none"] > 1.5 * growth["selective"]


def test_memory_measures_settings_that_agree(tmp_path):
    sizes = ("--layers", "2", "--vocab", "64", "--rows", "4", "--seq-len", "32", "--rounds", "2", "--steps", "1")
    result = run("memory.py", *sizes, "--only", "remat layer*", "--json", str(tmp_path / "out.json"))
    assert result.returncode == 0, result.stdout + result.stderr
    donated, new = json.loads((tmp_path / "out.json").read_text())["results"]
    assert [row["name"] for row in (donated, new)] == ["remat layer", "remat layer, new leaves"]
    assert donated["losses"] == new["losses"] and len(donated["seconds"]) == len(new["seconds"]) == 2
    state = donated["params"] + donated["moments"]
    # All new leaves stay, less those of the last block: its own are there at the peak of donated updates too.
    assert 0.4 * state < new["peak"] - donated["peak"] < 0.6 * state


def test_memory_refuses_unknown_settings():
    result = run("memory.py", "--only", "remat everything")
    assert result.returncode == 1 and "there are plain, remat selective" in result.stderr


# end to end, start-up -------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_end_to_end_judges_ours_as_the_recipe_does(tmp_path):
    """The held-out loss that plain transformers has on a checkpoint is the one that the recipe logged there."""
    folder, out = tmp_path / "place", tmp_path / "out.json"
    small = ("--rounds", "0", "--rows", "40", "--held-out", "3", "--layers", "1", "--quiet", "99")
    result = run("sft_end_to_end.py", "--contestants", "ours-off", *small, "--folder", str(folder), "--json", str(out))
    assert result.returncode == 0, result.stdout + result.stderr
    found = json.loads(out.read_text())
    (seen,) = found["runs"]
    logged = [json.loads(line) for line in (folder / "ours-off" / "metrics.jsonl").read_text().splitlines()]
    expected = [row["eval_loss"] for row in logged if "eval_loss" in row]
    (_, first), *curve = seen["curve"]
    assert [loss for _, loss in curve] == pytest.approx(expected, abs=1e-4) and curve[-1][1] < first
    assert 0 < seen["first_s"] < curve[0][0] < curve[-1][0] < seen["wall_s"] and seen["cold"]
    assert seen["trained_tokens"] == sum(row["trained_tokens"] for row in logged) > 500
    assert found["results"][0]["cold_wall_s"] == seen["wall_s"] and found["results"][0]["wall_s"] is None
    again = run("sft_end_to_end.py", "--rows", "41", "--folder", str(folder))
    assert again.returncode == 1 and "'rows': 40" in again.stderr


def test_end_to_end_says_how_to_get_trl(tmp_path):
    o = sft_end_to_end.Options(peer_python=tmp_path / "python")
    with pytest.raises(ValueError, match="make bench-trl"):
        sft_end_to_end.contestants(o)["trl-packed"](tmp_path / "run")


def test_end_to_end_reads_speed_and_time_from_what_was_seen():
    seconds = (5.0, 6.0, 7.0, 8.0, 9.0, 10.0, 15.0, 16.0, 16.5)  # it evaluates and saves around step 6
    rows = [{"step": i + 1, "s": s, "trained_tokens": 10 * (i + 1)} for i, s in enumerate(seconds)]
    assert sft_end_to_end.steady(rows, {6}) == 80.0  # step 8 alone: 5 to 7 touch the pause, 9 is the last
    assert sft_end_to_end.steady(rows[:2], set()) is None
    curve = [(0.0, 7.0), (10.0, 3.0), (20.0, 3.5), (30.0, 1.0)]
    assert sft_end_to_end.reached(curve, 5.0) == 5.0
    assert sft_end_to_end.reached(curve, 2.25) == 25.0
    assert sft_end_to_end.reached(curve, 0.5) is None


@pytest.mark.slow
def test_grpo_times_the_recipe(tmp_path):
    small = ("--rounds", "1", "--steps", "4", "--tokens", "2", "--layers", "1", "--folder", str(tmp_path / "place"))
    result = run("grpo.py", "--contestants", "ours-off", *small, "--json", str(tmp_path / "out.json"))
    assert result.returncode == 0, result.stdout + result.stderr
    found = json.loads((tmp_path / "out.json").read_text())
    ((seen,), (row,)) = found["runs"], found["results"]
    assert len(seen["seconds"]) == len(seen["generation"]) == 2 and 1 <= seen["tokens"] <= 2
    assert row["samples_per_s"] * row["step_s"] == pytest.approx(512) and 0 < row["generation"] < 1


def test_grpo_takes_medians_of_all_runs():
    one = {"generation": [0.5], "tokens": 3.0, "first_s": 5.0, "peak_mib": 100.0, "others_s": 0.0, "wall_s": 9.0}
    done = [{"name": "a", "seconds": [1.0, 9.0]} | one, {"name": "a", "seconds": [2.0]} | one | {"generation": [1.5]}]
    (row,) = grpo.summary([*done])
    assert row["samples_per_s"] == 256 and row["generation"] == 0.5 and row["runs"] == 2
    other = {"name": "b", "seconds": [1.0]} | one | {"generation": []}
    assert grpo.summary([other])[0]["generation"] is None


def test_grpo_goes_on_without_the_broken(monkeypatch):
    def run(o, name, gpu):
        if name == "b" and gpu:
            raise RuntimeError("status 1: no such kernel")
        return {"name": name}

    monkeypatch.setattr(grpo, "run", run)
    done, broken = grpo.collect(grpo.Options(rounds=2), ["a", "b"], True, Console(quiet=True))
    assert [one["name"] for one in done] == ["a", "a"] and broken == {"b": "status 1: no such kernel"}


def test_grpo_gives_trl_what_fits_the_device():
    host, device = grpo.theirs(False), grpo.theirs(True)
    assert device.keys() - host.keys() == {"vllm"} and all(one["use_cpu"] for one in host.values())
    for name, one in device.items():
        passes = one["per_device_train_batch_size"] * one["gradient_accumulation_steps"]
        assert not one["use_cpu"] and passes == grpo.SAMPLES, name
    assert device["vllm"]["bf16"] and not host["generate-eager"]["bf16"]


def test_grpo_says_how_to_get_trl(tmp_path):
    o = grpo.Options(peer_python=tmp_path / "python", contestants=("no-such",))
    with pytest.raises(ValueError, match="make bench-trl"):
        grpo.contestants(o, False)["trl-small"](tmp_path / "run")
    with pytest.raises(ValueError, match="there are ours-off"):
        grpo.main(o)


def test_a_trainer_that_fails_is_an_error_with_its_own_words(tmp_path):
    with pytest.raises(RuntimeError, match="status 3: no such model"):
        script = "import sys; print('no such model'); sys.exit(3)"
        runs.watch([sys.executable, "-c", script], tmp_path / "run", dict(os.environ))


@pytest.mark.slow
def test_startup_splits_the_time_to_the_first_step(tmp_path):
    names = ("help", "import torch", "ours-off")
    result = run(
        "startup.py", "--rounds", "1", "--rows", "20", "--layers", "1", "--json", str(tmp_path / "out.json"),
        "--contestants", *names,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    rows = {(r["name"], r["caches"]): r for r in json.loads((tmp_path / "out.json").read_text())["results"]}
    assert set(rows) == {("help", ""), ("import torch", ""), ("ours-off", "cold"), ("ours-off", "warm")}
    assert rows["help", ""]["total_s"] < 2 and rows["import torch", ""]["total_s"] > 0.3
    for state in ("cold", "warm"):
        row = rows["ours-off", state]
        assert row["total_s"] == pytest.approx(row["imports_s"] + row["load_s"] + row["step_s"])
        assert min(row["imports_s"], row["load_s"], row["step_s"]) > 0


def test_help_of_the_recipe_imports_no_torch():
    command = [sys.executable, "-X", "importtime", BENCHMARKS.parent / "qwen3_moe_sft.py", "--help"]
    result = subprocess.run(command, capture_output=True, text=True)
    imported = {line.split("|")[-1].strip() for line in result.stderr.splitlines()}
    assert result.returncode == 0 and "tyro" in imported and not {"torch", "grain"} & imported


# ops -----------------------------------------------------------------------------------------------------------------

SMALL_OPS = {
    "HOST": {"small": (40, 24, 16, 5, 2), "gpt-oss, small": (40, 24, 16, 5, 2)},
    "HEADS": {"small": (40, 24, 50)}, "ATTENTION": {"small": (2, 40, 4, 2, 8)},
    "ELEMENTWISE": {"small": (2, 6, 24, 7, 2, 4, 2, 8)},
}  # fmt: skip


@pytest.fixture
def small_ops(monkeypatch):
    for name, sizes in SMALL_OPS.items():
        monkeypatch.setattr(kernels_benchmark, name, sizes)


@pytest.mark.filterwarnings("ignore:grouped_mm")
def test_ops_are_timed_beside_peers_that_agree(small_ops, tmp_path):
    options = kernels_benchmark.Options(rounds=2, compile="off", eager="off", json=tmp_path / "ops.json")
    kernels_benchmark.main(options)
    rows = json.loads((tmp_path / "ops.json").read_text())["rows"]
    cases: dict[tuple, set[str]] = {}
    for row in rows:
        assert "failed" not in row and len(row["ms"]) == 2 and row["rate"] > 0
        cases.setdefault((row["op"], row["shape"], row["dtype"], row["note"]), set()).add(row["name"])
    others = {"floor", "floor-memory", "hf-batched_mm", "hf-grouped_mm"}
    for routing in ("balanced", "mild", "extreme"):
        for shape in SMALL_OPS["HOST"]:
            assert cases["experts", shape, "float32", routing] == {"ours-blas", "ours-torch"} | others
    assert cases["linear_logprob", "small", "bfloat16", ""] == {"floor", "ours", "torch", "logits"}
    for op, note in (("rms_norm", "residual"), ("rms_norm", "queries"), ("add_norm", ""), ("rope", ""), ("swiglu", "")):
        assert cases[op, "small", "bfloat16", note] > {"floor", "ours"}


def test_an_op_that_is_wrong_is_not_timed(small_ops, monkeypatch, capsys):
    right = kernels_benchmark.ops.linear_logprob
    wrong = lambda *args, **options: [x * 1.01 for x in right(*args, **options)]  # noqa: E731
    monkeypatch.setattr(kernels_benchmark.ops, "linear_logprob", wrong)
    with pytest.raises(SystemExit):
        kernels_benchmark.main(kernels_benchmark.Options(ops=("linear_logprob",), dtypes=("float32",), rounds=1))
    assert "differs from ours by" in capsys.readouterr().out


def test_routing_is_as_skewed_as_its_name():
    device = torch.device("cpu")
    shares = {}
    for routing in ("balanced", "mild", "extreme"):
        ids = kernels_benchmark.chosen(routing, 2000, 32, 4, device)
        assert all(len(set(row)) == 4 for row in ids.tolist())
        shares[routing] = (torch.bincount(ids.flatten(), minlength=32).double() / ids.numel() * 32).tolist()
    assert max(shares["balanced"]) < 1.2 and 1.5 < max(shares["mild"]) < 2.2 and max(shares["extreme"]) > 4


# on several ranks, and Muon -------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    "script, flags, says",
    [
        ("loading.py", "--layers 1 --hidden 64 --experts 4 --vocab 512", "largest"),
        ("distributed_cpu.py", "--rounds 1 --rows 2 --seq-len 32 --layers 1", "fsdp2"),
        ("newton_schulz.py", "--layers 1 --rounds 1", "by shape"),
        ("step_ops.py", "--layers 1 --rows 2 --seq-len 48 --steps 1", "experts: products"),
    ],
)
def test_what_docs_quote_runs_at_small_sizes(script, flags, says):
    result = run(script, *flags.split())
    assert result.returncode == 0 and says in result.stdout.lower(), result.stdout + result.stderr
