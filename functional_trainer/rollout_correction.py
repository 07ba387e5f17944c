"""Weights for samples of a policy that is not quite the one whose gradient is taken; all (B, S), without gradient.

rho = exp(old - rollout) per token: what the trainer says of a sample over what the engine said that drew it. A weight
of zero rejects a token; denominators count it all the same, so rejecting some tokens does not raise the others. Where
the engine said nothing (nan) rho is 1, and the token is in no mean of what compares the two.

    token_truncate      min(rho, high)                                      TIS, https://fengyao.notion.site/off-policy-rl
    token_mask          rho where low <= rho <= high, else 0                IcePop, MIS
    sequence_truncate   min(prod rho, high)                                 sequence TIS
    sequence_mask       prod rho where low <= prod rho <= high, else 0      sequence MIS, TRL's default
    geometric_mask      rho where the geometric mean is in [low, high], else 0
"""

import math
from typing import Literal

import torch

from functional_trainer.segments import segment_sum
from functional_trainer.types import Batch

Correction = Literal["none", "token_truncate", "token_mask", "sequence_truncate", "sequence_mask", "geometric_mask"]
RANGES: dict[str, tuple[float, float]] = {
    "token_truncate": (0.0, 2.0),
    "token_mask": (0.5, 5.0),
    "sequence_truncate": (0.0, 2.0),
    "sequence_mask": (0.0, 3.0),
    "geometric_mask": (0.999, 1.002),
}
COMPARED = (
    "sampling_logp_difference/mean",
    "rollout_corr/kl",
    "rollout_corr/k3_kl",
    "rollout_corr/chi2_token",
    "rollout_corr/ratio_mean",
)
"""Means over the tokens of which both said something."""
WEIGHED = ("rollout_corr/rollout_is_mean", "rollout_corr/masked_fraction")
"""Means over all policy tokens."""
LARGEST = 20.0
"""Largest log of a ratio: exp of more says nothing."""


def per_sequence(weights_BS: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Return weights that add up to 1 over each sequence, in float64."""
    return weights_BS / torch.where(batch["lengths"] > 0, batch["lengths"], 1).to(torch.float64)


def compared(batch: Batch) -> torch.Tensor:
    """Return the policy tokens of which the engine said something."""
    return (batch["weights"] != 0) & ~batch["rollout_logprobs"].isnan()


def counts(batch: Batch) -> dict[str, torch.Tensor]:
    """Return what the sums of each value that `correct` reports are divided by."""
    told = (batch["weights"] * compared(batch)).sum(dtype=torch.float64)
    return dict.fromkeys(COMPARED, told) | dict.fromkeys(WEIGHED, batch["weights"].sum(dtype=torch.float64))


def sequence_mean(x_BS: torch.Tensor, batch: Batch, shard) -> torch.Tensor:
    """Return for every token the mean of `x` over its sequence's policy tokens, weighed by `weights`."""
    return segment_sum(x_BS * per_sequence(batch["weights"], batch), batch["segment_ids"], shard)


def weigh(log_rho_BS: torch.Tensor, how: Correction, span: tuple[float, float], batch: Batch, shard) -> torch.Tensor:
    """Return the weight of each token, given log rho."""
    low, high = span
    rho_BS = log_rho_BS.exp()
    if how == "token_truncate":
        return rho_BS.clamp(low, high)
    if how == "token_mask":
        return torch.where((rho_BS >= low) & (rho_BS <= high), rho_BS, 0)
    if how == "geometric_mask":
        mean_BS = sequence_mean(log_rho_BS, batch, shard)
        return torch.where((mean_BS >= math.log(low)) & (mean_BS <= math.log(high)), rho_BS, 0)
    total_BS = segment_sum(log_rho_BS * batch["weights"], batch["segment_ids"], shard)
    product_BS = total_BS.clamp(-LARGEST, LARGEST).exp()
    if how == "sequence_truncate":
        return product_BS.clamp(low, high)
    return torch.where((product_BS >= low) & (product_BS <= high), product_BS, 0)


def kept_on_policy(logp_BS: torch.Tensor, limit: float, batch: Batch, shard) -> torch.Tensor:
    """Return 0 for sequences of negative advantage that the policy has left, mean(rollout - logp) > limit, else 1.

    Off-policy sequence masking of DeepSeek-V3.2 (https://arxiv.org/abs/2512.02556).
    """
    drift_BS = _difference(batch["rollout_logprobs"], logp_BS, batch)
    left_BS = sequence_mean(drift_BS, batch, shard) > limit
    return (~(left_BS & (batch["advantages"] < 0))).to(logp_BS.dtype)


def _difference(a_BS: torch.Tensor, b_BS: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Return a - b of policy tokens without gradient, 0 where the engine gave no number."""
    return torch.where(compared(batch), (a_BS - b_BS).detach(), 0)


def correct(
    logp_BS: torch.Tensor, old_BS: torch.Tensor, how: Correction, span: tuple[float, float] | None,
    opsm: float | None, batch: Batch, shard,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:  # fmt: skip
    """Return each token's weight and per-token values to report, by the names in `COMPARED` and `WEIGHED`."""
    difference_BS = _difference(old_BS, batch["rollout_logprobs"], batch)
    log_rho_BS = difference_BS.clamp(-LARGEST, LARGEST)
    rho_BS = log_rho_BS.exp()
    weight_BS = torch.ones_like(rho_BS)
    if how != "none":
        weight_BS = weigh(log_rho_BS, how, span or RANGES[how], batch, shard)
    if opsm is not None:
        weight_BS = weight_BS * kept_on_policy(logp_BS, opsm, batch, shard)
    values = (
        *(difference_BS.abs(), -difference_BS, rho_BS - log_rho_BS - 1, rho_BS.square() - 1, rho_BS * compared(batch)),
        *(weight_BS, (weight_BS == 0).to(rho_BS.dtype)),
    )
    return weight_BS, dict(zip((*COMPARED, *WEIGHED), values, strict=True))
