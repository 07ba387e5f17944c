"""What `--mesh auto` picks."""

from dataclasses import replace
from math import prod

import pytest
import torch

import models
from experiments import auto, plan, qwen3_moe_grpo
from experiments.estimate import estimate
from functional_trainer.options import MeshOptions, ModelOptions
from functional_trainer.rl_options import PromptOptions, RolloutOptions
from sharding_rules import roofline

H100 = roofline.DEVICES["H100"]


def model(name: str):
    return replace(models.from_config(models.PRESETS[name]), dtype=torch.bfloat16)


def choose(name: str, world: int, batch: int, device=H100, **options):
    return auto.choose(plan.Options(**options), model(name), world, device, batch, 1)


def test_every_candidate_is_planned_and_the_fastest_that_fits_is_taken():
    times = {}
    for ep in (1, 2, 4, 8):
        o = plan.Options(seq_len=64, mesh=f"fsdp={8 // ep},ep={ep}", rows=2, micro_batches=2)
        e = estimate(o, model("tiny"))
        times[ep] = e.work + e.talk
    best = min(times, key=times.__getitem__)
    sizes, reason = choose("tiny", 8, 16, seq_len=64)
    assert sizes == {"dp": 1, "fsdp": 8 // best, "ep": best, "cp": 1, "tp": 1}
    assert "is the fastest; of 4 arrangements 4 fit into 68.5 GiB" in reason and f"{times[best] * 1e3:.2f} ms" in reason


def test_rows_are_split_only_where_they_are_too_few_or_too_much():
    """Half as many rows as devices: two share each. Where whole rows do not fit, parts of rows do."""
    few, _ = choose("tiny", 8, 4, seq_len=64)
    assert few["cp"] * few["tp"] == 2 and few["dp"] * few["fsdp"] * few["ep"] == 4
    e = estimate(plan.Options(seq_len=8192, mesh="fsdp=2,ep=2", rows=1), model("tiny"))
    small = H100._replace(memory=0.8 * e.held / (1 - roofline.SPARE))
    tight, reason = choose("tiny", 4, 4, small, seq_len=8192)
    assert tight["cp"] * tight["tp"] > 1 and "is the fastest" in reason


def test_where_nothing_fits_the_least_is_taken_and_said():
    sizes, reason = choose("tiny", 4, 4, H100._replace(memory=1e6), seq_len=64)
    assert prod(sizes.values()) == 4 and "needs the least" in reason and " 0 fit into 0.0 GiB" in reason


def test_replicas_are_machines():
    found = [sizes for some in auto.candidates(32, 8, 0, 32) for sizes in some]
    assert {"dp": 4, "fsdp": 8, "ep": 1, "cp": 1, "tp": 1} in found and {s["dp"] for s in found} == {1, 4}
    assert all(prod(s.values()) == 32 and s["tp"] * s["cp"] <= 8 for s in found)


def test_a_budget_cannot_be_planned():
    with pytest.raises(ValueError, match="--remat budget:0.5: only a compiler knows .* takes none, selective or layer"):
        choose("tiny", 4, 4, remat="budget:0.5")


def test_what_cannot_be_shared_is_refused():
    sizes, reason = choose("tiny", 7, 3, seq_len=63)
    assert not sizes and "no arrangement of 7 devices shares --batch 3" in reason and "multiple of 7" in reason


def test_what_no_arrangement_can_do_is_said():
    _, reason = choose("tiny", 2, 4, seq_len=64, rules="nowhere.yaml")
    assert "\nthe first one: " in reason and "nowhere.yaml" in reason.split("the first one: ")[1]


def test_reinforcement_is_planned_by_packed_rows_and_not_by_prompts():
    """2 prompts, fewer than devices, of which 8 answers of 64 tokens are 8 rows of 128."""
    o = qwen3_moe_grpo.Options(
        model=ModelOptions(path="m"), batch=2, micro_batch=1, data=PromptOptions(seq_len=128),
        rollout=RolloutOptions(num_generations=8, max_completion_length=64), mesh=MeshOptions(layout="auto"),
        dtype="bfloat16",
    )  # fmt: skip
    assert o.packed_rows(8) == 8 and o.packed_rows(3) == 9
    sizes = auto.sizes(o, model("tiny"), torch.device("cpu"), 0, 8)
    assert sizes["dp"] * sizes["fsdp"] * sizes["ep"] == 8, "each device has rows of its own"
    by_prompts, _ = choose("tiny", 8, 2, seq_len=128)
    assert by_prompts["cp"] * by_prompts["tp"] == 4
