"""The losses of reinforcement learning as one `Loss`: GRPO and its family, terms of which share packed rows.

Rewards, advantages, filters and masks are data. They come as batch columns, each (B, S) and aligned with `targets`:

    weights            1 where the policy sampled the target, 0 elsewhere: prompts, tools, padding
    advantages         of each such token
    lengths            the sum of `weights` over the token's sequence (`data.columns.lengths`)
    old_logprobs       log-probabilities by the policy before the first step on this rollout
    rollout_logprobs   what the engine said as it sampled, nan where it said nothing
    ref_logprobs       log-probabilities by a frozen policy
    sft_weights, distill_weights    which tokens the other terms train, and by how much

Each term has a stream of weights and a denominator of its own, of columns alone: the contract of prime-rl's trainer.
Denominators count tokens that a rollout correction rejects.
"""

from dataclasses import replace
from functools import partial

import torch

from functional_trainer.losses import Loss, Sums, logprobs
from functional_trainer.objectives import OBJECTIVES, Policy, clipping, divergence, log_ratio, token_losses
from functional_trainer.rollout_correction import LARGEST, correct, counts, per_sequence, sequence_mean
from functional_trainer.types import Batch, Output, Unembed

LARGEST_OF = {"sampling_logp_difference/max": "sampling_logp_difference/mean", "ratio/max": "ratio/mean"}
"""Largest values that are reported, of what the means are of."""
LEAST_RATIO = "ratio/min"
"""What is found as the largest of its negative."""


def policy(objective: str | Policy = "grpo", **changes) -> Loss:
    """Build the loss of one of `OBJECTIVES`, or of a `Policy`, with these changes of its fields.

    Terms: pg_loss; kl, entropy, nll (of `sft_weights`), distill and balance where they have a coefficient. ValueError
    for what does not go together.
    """
    if isinstance(objective, str) and objective not in OBJECTIVES:
        raise ValueError(f"objective is {objective!r}; it can be one of {', '.join(OBJECTIVES)}")
    p = replace(OBJECTIVES[objective] if isinstance(objective, str) else objective, **changes)
    _refuse(p)
    coefficients = {"kl": p.beta, "entropy": -(p.entropy or 0.0), "nll": p.sft, "distill": p.distill}
    coefficients["balance"] = p.balance
    terms, weights, largest = partial(_terms, p), partial(_weights, p), (*LARGEST_OF, LEAST_RATIO)
    return Loss(terms, weights, coefficients, whole_sequences=p.by_sequence, largest=largest, derive=_derive)


def _refuse(p: Policy) -> None:
    if p.delta is not None and not p.clips:
        raise ValueError(f"delta {p.delta} has no effect with form {p.form!r}, which has no dual clip; leave it away")
    if p.delta is not None and not p.delta > 1 + p.epsilon_high:
        right = f"above the upper end of clipping, 1 + epsilon_high, here {1 + p.epsilon_high:g}"
        raise ValueError(f"delta (--loss.delta) is {p.delta}; it must be {right}")
    if p.aggregate == "seq_mean_token_sum_norm" and not p.max_length:
        raise ValueError("aggregate 'seq_mean_token_sum_norm' divides by a constant length: give max_length")
    if p.correction != "none" and p.old == "rollout_logprobs":
        raise ValueError("old 'rollout_logprobs' corrects for the engine already: correction must be 'none'")
    if p.correction_range:
        low, high = p.correction_range
        if not low < high or p.correction == "geometric_mask" and low <= 0:
            said = f"correction_range (--loss.correction-range) is {low}, {high}"
            raise ValueError(f"{said}: low must be below high, above 0 for geometric_mask")


def _streams(p: Policy) -> dict[str, str]:
    """Return the columns of weights, by the term that each is of."""
    others = {"nll": "sft_weights"} if p.sft else {}
    return {"pg_loss": "weights"} | others | ({"distill": "distill_weights"} if p.distill else {})


def _check(p: Policy, batch: Batch) -> None:
    """Raise a ValueError if a column is missing."""
    wanted = {"advantages", *_streams(p).values()} | ({"lengths"} if p.by_sequence else set())
    wanted |= {"ref_logprobs"} if p.beta or p.distill else set()
    wanted |= {"rollout_logprobs"} if p.corrects else set()
    wanted |= set() if p.old == "current" else {p.old}
    if missing := sorted(wanted - batch.keys()):
        hint = "; with a single step per rollout set old='current'" if "old_logprobs" in missing else ""
        raise ValueError(f"the batch has no column {', '.join(missing)}, which this policy loss needs{hint}")


def _compares(p: Policy, batch: Batch) -> bool:
    """Say whether the engine's log-probabilities are compared with the trainer's: where both are known."""
    return p.corrects or "rollout_logprobs" in batch


def _weights(p: Policy, batch: Batch) -> Sums:
    _check(p, batch)
    found = {term: batch[column].sum(dtype=torch.float64) for term, column in _streams(p).items()}
    tokens = found["pg_loss"]
    found |= dict.fromkeys((*p.reports, *(["entropy"] if p.entropy else [])), tokens)
    found |= counts(batch) if _compares(p, batch) else {}
    found |= {"balance": (batch["segment_ids"] != 0).sum()} if p.balance else {}
    if p.aggregate == "token_sum":
        del found["pg_loss"]
    elif p.aggregate != "token_mean":
        sequences = per_sequence(batch["weights"], batch).sum()
        found["pg_loss"] = sequences * (p.max_length or 1) if p.aggregate.endswith("norm") else sequences
    return found | ({"kl": found["pg_loss"]} if p.beta and "pg_loss" in found else {})


def _terms(p: Policy, output: Output, unembed: Unembed, batch: Batch, shard) -> tuple[Sums, Sums]:
    asked_BS = batch["weights"] != 0
    for column in _streams(p).values():
        asked_BS = asked_BS | (batch[column] != 0)
    logp_BS, entropy_BS = logprobs(output, unembed, batch, shard, p.temperature, p.entropy is not None, asked_BS)
    sums, values = _policy(p, logp_BS, batch, shard)
    if p.entropy:
        sums["entropy"] = (entropy_BS * batch["weights"]).sum()
    elif p.entropy is not None:
        values["entropy"] = entropy_BS
    if p.sft:
        sums["nll"] = -(logp_BS * batch["sft_weights"]).sum()
    if p.balance and output.aux:
        sums["balance"] = output.aux["balance"].mean()
    reported = {k: (v.detach() * batch["weights"]).sum(dtype=torch.float64) for k, v in values.items()}
    reported |= _largest(values, batch["weights"] != 0)
    return sums, reported | {k: v.detach() for k, v in output.aux.items() if k == "load"}


def _largest(values: Sums, sampled_BS: torch.Tensor) -> Sums:
    """Return the largest of some values over policy tokens, minus infinity of none."""
    of = {name: values[source] for name, source in LARGEST_OF.items() if source in values}
    of[LEAST_RATIO] = -values["ratio/mean"]
    return {k: torch.where(sampled_BS, v.detach(), -torch.inf).amax().to(torch.float64) for k, v in of.items()}


def _derive(reported: Sums) -> Sums:
    """Return metrics: 0 for the largest of no token; the effective sample size, a share: (mean rho)^2 / mean rho^2."""
    made = dict(reported)
    for name in (*LARGEST_OF, LEAST_RATIO):
        if name in made:
            found = torch.where(made[name] == -torch.inf, 0, made[name])
            made[name] = -found if name == LEAST_RATIO else found
    if (mean := made.pop("rollout_corr/ratio_mean", None)) is not None:
        made["rollout_corr/eff_sample_size"] = mean.square() / (1 + made["rollout_corr/chi2_token"])
    return made


def _policy(p: Policy, logp_BS: torch.Tensor, batch: Batch, shard) -> tuple[Sums, Sums]:
    """Return the sums of what has ratios, and per-token values to report."""
    sampled_BS = batch["weights"] != 0
    if p.distill:
        sampled_BS = sampled_BS | (batch["distill_weights"] != 0)
    now_BS = logp_BS.detach()
    old_BS = now_BS if p.old == "current" else batch[p.old]
    if p.old == "rollout_logprobs":  # where the engine said nothing the ratio is to the policy itself
        old_BS = torch.where(old_BS.isnan(), now_BS, old_BS)
    l_BS = torch.where(sampled_BS, logp_BS - old_BS, 0).clamp(-LARGEST, LARGEST)
    adv_BS = torch.where(batch["weights"] != 0, batch["advantages"], 0)
    mean = partial(sequence_mean, batch=batch, shard=shard)
    used_BS = log_ratio(p, l_BS, logp_BS, mean)
    loss_BS, r_BS = token_losses(p, used_BS, logp_BS, adv_BS, mean), used_BS.detach().exp()
    values = {"ratio/mean": r_BS, "ppo_kl": -l_BS} | clipping(p, r_BS, adv_BS)
    if _compares(p, batch):
        trainers_BS = now_BS if p.old == "rollout_logprobs" else old_BS
        weight_BS, more = correct(logp_BS, trainers_BS, p.correction, p.correction_range, p.opsm, batch, shard)
        loss_BS, values = loss_BS * weight_BS, values | more
    by_token = p.aggregate != "seq_mean_token_mean"
    share_BS = batch["weights"] if by_token else per_sequence(batch["weights"], batch)
    sums = {"pg_loss": (loss_BS * share_BS).sum()}
    if p.beta or p.distill:
        d_BS = torch.where(sampled_BS, logp_BS - batch["ref_logprobs"], 0)
    if p.beta:
        sums["kl"] = (divergence(p.kl, d_BS, l_BS) * share_BS).sum()
    if p.distill:
        sums["distill"] = (d_BS.detach() * l_BS.exp() * batch["distill_weights"]).sum()
    return sums, values
