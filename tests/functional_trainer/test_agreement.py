"""What the trainer says about samples is what the generator said as it drew them."""

import pytest
import torch

from functional_trainer import agreement, tree
from functional_trainer.engine import LocalEngine
from functional_trainer.experience import Experience, Plan, Prompt, Prompts, Scores
from functional_trainer.rollout import Sampling
from tests.models import small


def rollouts(model, params, temperature=1.0):
    engine = LocalEngine(model, params, slots=5, length=16)
    prompts = Prompts(Prompt([3 + i] * (1 + i % 4), "", {}) for i in range(6))
    return Experience(
        prompts,
        lambda asked, seed: engine.generate([p.ids for p in asked], Sampling(7, temperature, seed=seed)),
        lambda p, a: Scores([0.0] * len(a), {}),
        lambda rewards, sizes: rewards,
        Plan(3, 4), seq_len=24, longest=7, rows=2,
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
