"""From a recipe's options of reinforcement learning to its loss and its advantages."""

from collections.abc import Callable
from typing import Any

import models
from functional_trainer import advantages
from functional_trainer.losses import Loss
from functional_trainer.objectives import OBJECTIVES
from functional_trainer.policy import policy


def objective(o: Any, hf: dict[str, Any]) -> Loss:
    """Return the loss for a model of this config.json."""
    if o.loss.balance and not getattr(models.from_config(hf).config, "experts", 0):
        raise ValueError(f"--loss.balance {o.loss.balance} has no effect: the model has no experts; leave it away")
    return loss(o)


def loss(o: Any) -> Loss:
    """Return the loss that options ask for.

    With one step per rollout, of the current weights, ratios are to the policy itself, and exactly 1; with several, or
    of older weights, to what the engine said, or the trainer before the first. ValueError for what has no effect or
    would count twice.
    """
    once, trainers = o.rollout.steps_per_generation * o.rollout.num_iterations == 1, o.loss.old == "trainer"
    corrected = o.loss.correction != "none"
    if once and trainers:
        raise ValueError("--loss.old trainer has no effect with one step per rollout: ratios are to the policy itself")
    if o.rollout.routing_replay == "trainer" and not trainers:
        right = "add --loss.old trainer, for several steps per rollout"
        raise ValueError(f"--rollout.routing-replay trainer replays what log-probabilities were computed with: {right}")
    if o.rollout.max_async_level or o.rollout.partial:
        once = once and corrected
        if not (once or trainers) and OBJECTIVES[o.loss.loss_type].form == "reinforce":
            raise ValueError("--loss.loss-type reinforce has no ratio to older weights: give --loss.correction as well")
        if o.loss.kl_in_reward:
            why = "the reference is computed between steps, and rollouts beside them"
            raise ValueError(f"--loss.kl-in-reward is for synchronous rollouts: {why}; use --loss.beta alone")
    if corrected and not (once or trainers):
        why = "with several steps per rollout ratios are to what the engine said, and correct for it already"
        raise ValueError(f"--loss.correction {o.loss.correction}: {why}; add --loss.old trainer")
    old = "current" if once else "old_logprobs" if trainers else "rollout_logprobs"
    changes = {"old": old, "temperature": o.rollout.temperature}
    given = {
        "aggregate": o.loss.loss_agg_mode,
        "epsilon_low": o.loss.epsilon,
        "epsilon_high": o.loss.epsilon_high,
        "delta": o.loss.delta,
    }
    changes |= {k: v for k, v in given.items() if v is not None}
    changes |= {
        "beta": 0.0 if o.loss.kl_in_reward else o.loss.beta,
        "kl": o.loss.kl,
        "entropy": o.loss.entropy_coef,
        "balance": o.loss.balance,
        "correction": o.loss.correction,
        "correction_range": o.loss.correction_range,
        "opsm": o.loss.off_policy_mask_threshold,
    }
    return policy(OBJECTIVES[o.loss.loss_type], max_length=o.rollout.max_completion_length, **changes)


def remark(o: Any, say: Callable[[str], None]) -> None:
    """Say where options are not all of what one might think that they are."""
    r, given = o.rollout, o.loss
    parts = {"top-k": r.top_k, "top-p": r.top_p if r.top_p < 1 else 0, "min-p": r.min_p}
    if cut := [f"--rollout.{name} {value}" for name, value in parts.items() if value]:
        say(f"{', '.join(cut)}: answers are of a part of the distribution, ratios of all of it: a bias (docs/rl.md)")
    if given.loss_type == "dr_grpo" and given.advantage == "grpo" and given.scale_rewards != "none":
        right = "for Dr.GRPO say --loss.scale-rewards none"
        say(f"--loss.loss-type dr_grpo: advantages are divided by the {given.scale_rewards}'s deviation; {right}")


def advantage(o: Any) -> Callable:
    """Return the function from rewards and lengths, (P, G) each, and of remax the greedy answers' rewards, (P,)."""
    if o.loss.advantage == "grpo":
        return lambda rewards, sizes: advantages.grpo(rewards, o.loss.scale_rewards)
    if o.loss.advantage == "opo":
        return advantages.opo
    if o.loss.advantage == "remax":
        return lambda rewards, sizes, greedy: advantages.remax(rewards, greedy)
    return lambda rewards, sizes: getattr(advantages, o.loss.advantage)(rewards)
