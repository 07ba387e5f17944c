"""What the trainer says about samples is what the generator said as it drew them."""

import numpy as np
import pytest
import torch

from functional_trainer import agreement, init_state, make_train_step, optimizers, tree
from functional_trainer.engines import Sampling
from functional_trainer.engines.local import LocalEngine
from functional_trainer.experience import Experience, Plan
from functional_trainer.policy import policy
from functional_trainer.rollouts import Prompt, Prompts, Scores
from functional_trainer.types import ONE_DEVICE
from tests.models import small

CPU = torch.device("cpu")


def different(prompts, answers):
    return Scores([float(len(set(a.tokens))) for a in answers])


def rollouts(model, params, temperature=1.0, how=None, old=None, reward=different):
    engine = LocalEngine(model, params, slots=5, length=16)
    prompts = Prompts(Prompt([3 + i] * (1 + i % 4), "", {}) for i in range(6))
    return Experience(
        prompts,
        lambda asked, seed: engine.generate([p.ids for p in asked], Sampling(7, temperature, seed=seed)),
        reward,
        lambda rewards, sizes: rewards - rewards.mean(1, keepdims=True),
        how or Plan(3, 4), seq_len=24, longest=7, rows=2, old=old,
    )  # fmt: skip


@pytest.mark.parametrize(("family", "temperature"), [("dense", 1.0), ("moe", 0.7)])
def test_generator_and_trainer_agree(family, temperature):
    changes = {"mlp_only_layers": [0, 1]} if family == "dense" else {}
    model = small.model(num_hidden_layers=2, **changes)
    params = model.init(0)
    batch = next(rollouts(model, params, temperature))
    mean, most = agreement.differences(model, params, batch, 2, temperature=temperature)
    assert 0 < mean < 2e-6 and most < 2e-5
    moved = tree.map(lambda p: p + 0.05 * torch.randn_like(p), params)
    assert agreement.differences(model, moved, batch, 2, temperature=temperature)[0] > 1e-2


def test_scores_are_of_all_sampled_tokens_and_the_passes_do_not_matter():
    model = small.model(num_hidden_layers=1)
    params = model.init(0, dtype=torch.float64)
    batch = next(rollouts(model, params))
    logp_BS = agreement.score(model, params, batch)
    assert torch.equal(logp_BS != 0, batch["weights"] != 0)
    whole = agreement.differences(model, params, batch, len(batch["tokens"]))
    assert agreement.differences(model, params, batch, 2) == pytest.approx(whole, rel=1e-6)


def test_only_what_both_have_said_is_compared():
    model = small.model(num_hidden_layers=1)
    params = model.init(0)
    batch = next(rollouts(model, params))
    told = batch["rollout_logprobs"] - 0.015
    half = torch.where(torch.arange(told.shape[1]) % 2 == 0, torch.nan, told)
    for said in (told, half):
        found = agreement.differences(model, params, batch | {"rollout_logprobs": said}, 2)
        assert found == pytest.approx((0.015, 0.015), rel=1e-3)
    unlikely = torch.where(torch.arange(told.shape[1]) % 2 == 0, -torch.inf, told)
    assert agreement.differences(model, params, batch | {"rollout_logprobs": unlikely}, 2)[0] == np.inf
    for changes in ({"rollout_logprobs": torch.full_like(told, torch.nan)}, {"weights": torch.zeros_like(told)}):
        with pytest.raises(ValueError, match="no sampled token of which the engine gave a log-probability"):
            agreement.differences(model, params, batch | changes, 2)
    broken = tree.map(lambda p: torch.full_like(p, torch.nan), params)
    sampled = int(batch["weights"].sum())
    with pytest.raises(ValueError, match=f"^{sampled} log-probabilities of .* by the trainer are not finite"):
        agreement.differences(model, broken, batch, 2)


# log-probabilities by the trainer before the first of several steps --------------------------------------------------

SEVERAL = Plan(3, 4, steps=2, iterations=2)


def trained(wanted=4, temperature=0.8, **changes):
    """Train on a rollout in several steps; return its batches, the metrics of each, and the weights at its start."""
    model = small.model(num_hidden_layers=1)
    optimizer = optimizers.adamw(optimizers.schedule("constant", 1e-2, 10, 0))
    state = init_state(model.init(0, dtype=torch.float64), optimizer)
    begun = tree.map(torch.clone, state.params)
    scored = agreement.scorer(model, state.params, 2, ONE_DEVICE, CPU, temperature=temperature)
    source = rollouts(model, state.params, temperature, SEVERAL, scored)
    loss = policy("grpo", old="old_logprobs", temperature=temperature, **changes)
    step, batches, rows = make_train_step(model, loss, optimizer, rows=2), [], []
    for _ in range(wanted):
        batches.append(next(source))
        state, metrics = step(state, batches[-1])
        rows.append({k: float(v) for k, v in metrics.items() if v.ndim == 0} | source.report())
    return model, begun, batches, rows


def test_old_logprobs_are_those_of_the_weights_at_the_start_of_a_rollout():
    """Once for each rollout, by log_softmax of all logits by hand; then the ratio is 1 in the first step alone."""
    model, begun, batches, rows = trained()
    for batch in batches:
        logits = model.apply(begun, batch).hidden @ model.unembed(begun).weight.T / 0.8
        logp = logits.log_softmax(-1).gather(-1, batch["targets"][..., None])[..., 0]
        wanted = torch.where(batch["weights"] != 0, logp, 0)
        torch.testing.assert_close(batch["old_logprobs"], wanted, rtol=1e-9, atol=1e-9)
    assert rows[0]["ratio/min"] == rows[0]["ratio/max"] == 1 and rows[0]["ppo_kl"] == 0
    assert all(row["ratio/max"] > 1 + 1e-4 and row["ratio/min"] < 1 - 1e-4 for row in rows[1:])
    assert [("timing_s" in row) for row in rows] == [True, False, False, False]
    assert rows[0]["timing_s"]["old_log_prob"] > 0


@pytest.mark.parametrize("correction", ["token_truncate", "sequence_mask"])
def test_corrections_are_by_old_and_rollout_in_every_step(correction):
    """Decoupled PPO: what is measured of an engine that is wrong by 0.3 stays as it is while ratios move."""
    model = small.model(num_hidden_layers=1)
    params = model.init(0, dtype=torch.float64)
    source = rollouts(model, params, 1.0, SEVERAL, agreement.scorer(model, params, 2, ONE_DEVICE, CPU))
    draw = source.generate
    source.generate = lambda asked, seed: [
        a._replace(logprobs=[x - 0.3 for x in a.logprobs]) for a in draw(asked, seed)
    ]
    loss = policy("grpo", old="old_logprobs", correction=correction, correction_range=(0.0, 1e9))
    optimizer = optimizers.adamw(optimizers.schedule("constant", 1e-2, 10, 0))
    state, seen = init_state(params, optimizer), []
    step = make_train_step(model, loss, optimizer, rows=2)
    for _ in range(3):
        state, metrics = step(state, next(source))
        seen.append({k: float(v) for k, v in metrics.items() if v.ndim == 0})
    for row in seen:
        assert row["sampling_logp_difference/mean"] == pytest.approx(0.3, abs=1e-5)
        assert row["sampling_logp_difference/max"] == pytest.approx(0.3, abs=1e-5)
        assert row["rollout_corr/chi2_token"] == pytest.approx(np.exp(0.6) - 1, abs=1e-4)
        assert row["rollout_corr/eff_sample_size"] == pytest.approx(1, abs=1e-6)
        if correction == "token_truncate":
            assert row["rollout_corr/rollout_is_mean"] == pytest.approx(np.exp(0.3), abs=1e-4)
    assert seen[0]["ratio/mean"] == 1 != seen[1]["ratio/mean"]


def test_a_rollout_that_is_resumed_keeps_its_old_logprobs():
    model = small.model(num_hidden_layers=1)
    params = model.init(0)
    source = rollouts(model, params, how=SEVERAL, old=agreement.scorer(model, params, 2, ONE_DEVICE, CPU))
    next(source)
    moved = tree.map(lambda p: p + 1, params)
    resumed = rollouts(model, moved, how=SEVERAL, old=agreement.scorer(model, moved, 2, ONE_DEVICE, CPU))
    resumed.restore(source.state())
    for _ in range(3):
        assert torch.equal(next(resumed)["old_logprobs"], next(source)["old_logprobs"])


def test_a_step_without_a_reward_changes_nothing():
    """Not by the divergence, entropy or balance either; what is asked before it and said of it is in order."""
    model = small.model(num_hidden_layers=1)
    optimizer = optimizers.adamw(optimizers.schedule("constant", 1e-2, 10, 0), weight_decay=0.0)
    state = init_state(model.init(0, dtype=torch.float64), optimizer)
    begun = tree.map(torch.clone, state.params)
    old = agreement.scorer(model, state.params, 2, ONE_DEVICE, CPU)
    source = rollouts(model, state.params, old=old, reward=lambda p, a: Scores([None] * len(a)))
    batch = source.peek()
    with pytest.raises(ValueError, match="there is no sampled token"):
        agreement.differences(model, state.params, batch, 2)
    loss = policy("gspo", entropy=0.1, balance=0.1, beta=0.1)
    state, metrics = make_train_step(model, loss, optimizer, rows=2)(
        state, next(source) | {"ref_logprobs": batch["old_logprobs"]}
    )
    assert all(v.isfinite().all() for v in tree.leaves(metrics)) and metrics["grad_norm"] == 0
    assert all(map(torch.equal, tree.leaves(state.params), tree.leaves(begun)))


@pytest.mark.slow
def test_a_compiled_trainer_says_the_same():
    model = small.model(num_hidden_layers=1)
    params = model.init(0, dtype=torch.float64)
    found = []
    for compile in ("off", "layer"):
        scored = agreement.scorer(model, params, 2, ONE_DEVICE, CPU, compile)
        found.append(next(rollouts(model, params, how=SEVERAL, old=scored))["old_logprobs"])
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-9)
    assert found[0].any()
