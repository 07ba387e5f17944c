"""From a recipe's options of reinforcement learning to its loss and its advantages."""

from collections.abc import Callable
from typing import Any

from functional_trainer import advantages
from functional_trainer.losses import Loss
from functional_trainer.objectives import OBJECTIVES
from functional_trainer.policy import policy


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


def advantage(o: Any) -> Callable:
    """Return the function from rewards and lengths, (P, G) each, and of remax the greedy answers' rewards, (P,)."""
    if o.loss.advantage == "grpo":
        return lambda rewards, sizes: advantages.grpo(rewards, o.loss.scale_rewards)
    if o.loss.advantage == "opo":
        return advantages.opo
    if o.loss.advantage == "remax":
        return lambda rewards, sizes, greedy: advantages.remax(rewards, greedy)
    return lambda rewards, sizes: getattr(advantages, o.loss.advantage)(rewards)
