"""Losses per token of reinforcement learning: pure functions of log-probabilities, ratios and advantages, all (B, S).

With r = pi(token) / pi_old(token) or its sequence's, A the advantage, sg without gradient and sigma the logistic:

    reinforce        -A log pi
    clip             max(-A r, -A clip(r, 1 - low, 1 + high)); with `delta`, where A < 0, at most -A delta
    sequence         clip of s = exp(mean over the sequence of log r)                       GSPO
    sequence_token   clip of s with each token's own gradient: pi / sg(pi) sg(s)            GSPO-token
    cispo            -sg(clip(r, 1 - low, 1 + high)) A log pi
    cispo_max        -sg(min(r, high)) A log pi                                             as in ScaleRL and TRL
    sapo             -A sigma(tau (r - 1)) 4 / tau
    gmpo             -A exp(mean over the sequence of log r, clipped to [-low, high] on the side where A would push it)
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch

from functional_trainer.rollout_correction import LARGEST, Correction

Form = Literal["reinforce", "clip", "sequence", "sequence_token", "cispo", "cispo_max", "sapo", "gmpo"]
Aggregate = Literal["token_mean", "token_sum", "seq_mean_token_mean", "seq_mean_token_sum", "seq_mean_token_sum_norm"]
Old = Literal["old_logprobs", "rollout_logprobs", "current"]
KL = Literal["k1", "k2", "k3", "k3_unbiased"]
Mean = Callable[[torch.Tensor], torch.Tensor]
"""Means over sequences, at every token."""
LARGEST_MEAN = 10.0
"""Largest log of a sequence's ratio."""


@dataclass(frozen=True)
class Policy:
    """What a policy loss minimizes."""

    form: Form = "clip"
    """The loss of a token."""
    epsilon_low: float = 0.2
    epsilon_high: float = 0.2
    delta: float | None = None
    """Dual clip: where the advantage is negative a ratio counts at most this much."""
    tau_positive: float = 1.0
    tau_negative: float = 1.05
    """SAPO's tau, by the sign of the advantage."""
    aggregate: Aggregate = "token_mean"
    """A sum or mean over all tokens, or a mean over sequences of a token's mean or sum; `norm` divides that sum by
    `max_length`. Sequences without a policy token do not count."""
    max_length: int | None = None
    old: Old = "old_logprobs"
    """What ratios are to. "rollout_logprobs" lets the ratio correct for the engine as well; "current" is the policy
    itself, for a single step per rollout: the ratio is exactly 1 and no column is needed."""
    beta: float = 0.0
    """Coefficient of the KL divergence from `ref_logprobs`, aggregated like the loss."""
    kl: KL = "k3"
    entropy: float | None = 0.0
    """Coefficient of the mean entropy of tokens, which is maximized; with 0 it is reported, with None not computed."""
    correction: Correction = "none"
    """How samples are weighed by old / rollout."""
    correction_range: tuple[float, float] | None = None
    """Lowest and highest ratio; None for the usual ones."""
    opsm: float | None = None
    """Reject sequences of negative advantage whose mean of log rollout / policy is above this."""
    temperature: float = 1.0
    """What logits are divided by, as in sampling."""
    sft: float = 0.0
    """Coefficient of the mean negative log-likelihood over `sft_weights`."""
    distill: float = 0.0
    """Coefficient of the reverse KL divergence from `ref_logprobs`, a policy gradient, over `distill_weights`."""
    balance: float = 0.0
    """Coefficient of the router's per-sequence balance loss; with 0 there is none."""

    @property
    def corrects(self) -> bool:
        return self.correction != "none" or self.opsm is not None

    @property
    def by_sequence(self) -> bool:
        """Whether something is pooled over sequences."""
        pooled = self.form in ("sequence", "sequence_token", "gmpo") or self.opsm is not None
        return pooled or self.correction.startswith(("seq", "geo")) or self.aggregate.startswith("seq")

    @property
    def clips(self) -> bool:
        """Whether the surrogate is PPO's, which may have a dual clip."""
        return self.form in ("clip", "sequence", "sequence_token")

    @property
    def bounds(self) -> tuple[float, float]:
        """The range of ratios outside of which a token is clipped."""
        if self.form in ("reinforce", "sapo"):
            return 0.0, math.inf
        if self.form == "cispo_max":
            return 0.0, self.epsilon_high
        if self.form == "gmpo":
            return math.exp(-self.epsilon_low), math.exp(self.epsilon_high)
        return 1 - self.epsilon_low, 1 + self.epsilon_high

    @property
    def reports(self) -> tuple[str, ...]:
        """What is reported beside the terms: means over policy tokens."""
        names: tuple[str, ...] = ("ratio/mean", "ppo_kl", "clip_ratio/low", "clip_ratio/high", "clip_ratio/region")
        names += () if self.delta is None else ("clip_ratio/dual",)
        return names + (("entropy",) if self.entropy == 0 else ())


OBJECTIVES: dict[str, Policy] = {
    "reinforce": Policy("reinforce"),
    "ppo": Policy("clip", delta=3.0),  # arxiv 1707.06347, dual clip 1912.09729
    "grpo": Policy("clip", aggregate="seq_mean_token_mean"),  # 2402.03300
    "dr_grpo": Policy("clip", aggregate="seq_mean_token_sum_norm"),  # 2503.20783
    "dapo": Policy("clip", 0.2, 0.28),  # 2503.14476
    "bnpo": Policy("clip"),  # the mean over the tokens of the batch, here the whole one
    "gspo": Policy("sequence", 3e-4, 4e-4, aggregate="seq_mean_token_mean"),  # 2507.18071
    "gspo_token": Policy("sequence_token", 3e-4, 4e-4, aggregate="seq_mean_token_mean"),
    "cispo": Policy("cispo", 1.0, 0.2),  # 2506.13585: without a lower end
    "cispo_max": Policy("cispo_max", 0.0, 5.0),  # 2510.13786
    "sapo": Policy("sapo", aggregate="seq_mean_token_mean"),  # 2511.20347
    "gmpo": Policy("gmpo", 0.4, 0.4, aggregate="seq_mean_token_mean"),  # 2507.20673
}


def log_ratio(p: Policy, l_BS: torch.Tensor, logp_BS: torch.Tensor, mean: Mean) -> torch.Tensor:
    """Return the log of the ratio that the form is of: the token's own `l`, or its sequence's."""
    if p.form == "sequence":
        return mean(l_BS).clamp(max=LARGEST_MEAN)
    if p.form == "sequence_token":
        return (logp_BS - logp_BS.detach() + mean(l_BS).detach()).clamp(max=LARGEST_MEAN)
    return l_BS


def token_losses(p: Policy, l_BS: torch.Tensor, logp_BS: torch.Tensor, adv_BS: torch.Tensor, mean: Mean):
    """Return the loss of each token; `l` is `log_ratio`."""
    if p.form == "reinforce":
        return -adv_BS * logp_BS
    if p.form == "gmpo":
        near_BS = l_BS.clamp(-p.epsilon_low, p.epsilon_high)
        clipped_BS = torch.where(adv_BS > 0, torch.minimum(l_BS, near_BS), torch.maximum(l_BS, near_BS))
        return -adv_BS * mean(clipped_BS).exp()
    r_BS = l_BS.exp()
    if p.form == "sapo":
        tau_BS = p.tau_negative + (p.tau_positive - p.tau_negative) * (adv_BS > 0).to(r_BS.dtype)
        return -adv_BS * torch.sigmoid(tau_BS * (r_BS - 1)) * 4 / tau_BS
    if p.form in ("cispo", "cispo_max"):
        return -r_BS.detach().clamp(*p.bounds) * adv_BS * logp_BS
    loss_BS = torch.maximum(-adv_BS * r_BS, -adv_BS * r_BS.clamp(*p.bounds))
    return loss_BS if p.delta is None else torch.where(adv_BS < 0, torch.minimum(loss_BS, -adv_BS * p.delta), loss_BS)


def divergence(kl: KL, d_BS: torch.Tensor, l_BS: torch.Tensor) -> torch.Tensor:
    """Return an estimate of KL(policy || reference) per token, given d = log policy / reference and l = log ratio.

    http://joschu.net/blog/kl-approx.html. Minimized, the gradient of k1 is zero in the mean and that of k3 is not the
    divergence's; that of k2 is, on policy, and that of k3 times the ratio (DeepSeek-V3.2, arxiv 2512.02556).
    """
    d_BS = d_BS.clamp(-LARGEST, LARGEST)
    if kl == "k1":
        return d_BS
    if kl == "k2":
        return d_BS.square() / 2
    k3_BS = (-d_BS).exp() + d_BS - 1
    return k3_BS if kl == "k3" else k3_BS * l_BS.exp()


def clipping(p: Policy, r_BS: torch.Tensor, adv_BS: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return which tokens are clipped, by the names that are reported."""
    low, high = p.bounds
    below_BS, above_BS = (r_BS < low) & (adv_BS < 0), (r_BS > high) & (adv_BS > 0)
    found = {"clip_ratio/low": below_BS, "clip_ratio/high": above_BS, "clip_ratio/region": below_BS | above_BS}
    return found | ({} if p.delta is None else {"clip_ratio/dual": (r_BS > p.delta) & (adv_BS < 0)})
