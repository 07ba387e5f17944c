"""The recipe of reinforcement learning with rollouts that are drawn ahead or in parts: what it says, and going on."""

from pathlib import Path
from typing import Any

import pytest

from functional_trainer.rl_options import RolloutOptions
from tests.experiments import sft_runs
from tests.experiments.test_grpo import FLAGS, RECIPE, run

ONE_STEP_OFF = "--rollout.max-async-level", 1
PARTIAL = "--rollout.max-async-level", 1, "--rollout.partial", 2


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("grpo-ahead")
    sft_runs.folder(place / "model")
    return place


@pytest.mark.slow
def test_one_step_off_goes_on_bit_for_bit_from_any_checkpoint(place):
    several = "--steps", 5, "--rollout.steps-per-generation", 2, *ONE_STEP_OFF
    run(place, *several, "--save-every", 1, "--keep", 5, "--out", "straight-1")
    run(place, *several, "--resume", "straight-1/checkpoints/step-3", "--out", "resumed-1")
    sft_runs.same_state(place / "straight-1", place / "resumed-1")
    assert sft_runs.learned(place / "straight-1")[3:] == sft_runs.learned(place / "resumed-1")
    rows = [row for row in sft_runs.rows(place / "straight-1") if "off_policy" in row]
    assert [row["off_policy"]["mean"] for row in rows] == [0, 1, 1]
    assert all(row["wait_s"].keys() == {"trainer", "engine"} for row in rows)


@pytest.mark.slow
def test_partial_rollouts_go_on_bit_for_bit(place):
    run(place, "--steps", 6, *PARTIAL, "--save-every", 1, "--keep", 6, "--out", "straight-2")
    rows = sft_runs.rows(place / "straight-2")
    assert any(row["off_policy"]["waiting"] for row in rows)
    assert max(row["off_policy"]["max"] for row in rows) in (2, 3, 4)
    run(place, "--steps", 6, *PARTIAL, "--resume", "straight-2/checkpoints/step-3", "--out", "resumed-2")
    sft_runs.same_state(place / "straight-2", place / "resumed-2")


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize(
    "flags",
    [
        ("--rollout.max-async-level", 3, "--rollout.partial", 3, "--loss.correction", "token_truncate"),
        ("--rollout.max-async-level", 2, "--rollout.in-flight-weight-updates", "--loss.loss-type", "gspo"),
    ],
)
def test_whatever_is_ahead_ends_with_the_run(place, flags, world, tmp_path):
    mesh = ("--mesh.fsdp", 2) if world > 1 else ()
    given = "--model.path", "model", *FLAGS, "--steps", 5, "--out", tmp_path / "run", *flags, *mesh
    said = sft_runs.run_ranks(place, world, *given, recipe=RECIPE.stem)
    assert "right" in said
    level = flags[1]
    rows = sft_runs.rows(tmp_path / "run")
    assert len(rows) == 5 and all(row["off_policy"]["dropped"] == 0 for row in rows)
    assert all(row["off_policy"]["max"] <= max(level, 4) for row in rows)
    assert all(0 < row["sampling_logp_difference/mean"] < 1 for row in rows)


@pytest.mark.slow
def test_a_mesh_draws_ahead_what_one_process_does(place):
    flags = "--model.path", "model", *FLAGS, "--steps", 4, *ONE_STEP_OFF
    sft_runs.run_ranks(place, 2, *flags, "--mesh.fsdp", 2, "--out", "two-ahead", recipe=RECIPE.stem)
    sft_runs.run_ranks(place, 1, *flags, "--out", "one-ahead", recipe=RECIPE.stem)
    both = zip(sft_runs.rows(place / "two-ahead"), sft_runs.rows(place / "one-ahead"), strict=True)
    for two, one in both:
        assert two["completions"] == one["completions"] and two["off_policy"] == one["off_policy"]
        assert two["entropy"] == pytest.approx(one["entropy"], rel=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_staleness": 2}, "--rollout.max-staleness has no effect without"),
        ({"max_async_level": 5}, "--rollout.max-async-level 5: --rollout.max-staleness must be at least 5, not 4"),
        ({"partial": 2, "max_async_level": 1, "max_staleness": 1}, "partial 2: .* must be at least 2, not 1"),
        ({"partial": 32}, "--rollout.partial 32 has no effect: no answer is longer"),
        ({"in_flight_weight_updates": True}, "has no effect with --rollout.max-async-level 0"),
        ({"max_async_level": 1, "compile": "layer"}, "the compiler's settings are the process's"),
        ({"max_async_level": -1}, "--rollout.max-async-level"),
    ],
)
def test_what_makes_no_sense_is_refused(options: dict[str, Any], message):
    with pytest.raises(ValueError, match=message):
        RolloutOptions(**options)


@pytest.mark.slow
def test_an_objective_without_ratios_needs_a_correction(place, tmp_path):
    flags = "--steps", 2, "--out", tmp_path / "run", *ONE_STEP_OFF, "--loss.loss-type", "reinforce"
    assert "has no ratio to older weights: give --loss.correction" in run(place, *flags, status=1)


@pytest.mark.slow
def test_workers_of_ray_draw_what_this_process_does(place):
    flags = "--steps", 3, *ONE_STEP_OFF
    run(place, *flags, "--rollout.ray", 2, "--out", "by-ray")
    run(place, *flags, "--out", "by-itself")
    for theirs, ours in zip(*(sft_runs.rows(place / name) for name in ("by-ray", "by-itself")), strict=True):
        assert theirs["completions"] == ours["completions"] and theirs["off_policy"] == ours["off_policy"]
        assert theirs["entropy"] == pytest.approx(ours["entropy"], rel=1e-5)
