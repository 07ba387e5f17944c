"""Losses on preferences: DPO, cDPO, IPO, KTO, BCO, MPO, on answers packed as sequences of the same rows.

Batch columns beside those of supervised fine-tuning, each (B, S):

    weights        1 on the tokens of answers, 0 elsewhere
    ref_logprobs   log-probabilities of the targets by the frozen reference
    lengths        the sum of `weights` over the token's sequence (`data.columns.lengths`)
    preferred      1 in a chosen sequence, -1 in a rejected one, 0 in a mismatched one (KTO)
    pairs          a number for each pair of neighbours (`data.columns.check_pairs`); for pairwise losses

With D = sum over an answer of log pi / pi_ref, c chosen and j rejected, sigma the logistic and a mean over pairs:

    dpo   -(1 - e) log sigma(beta (D_c - D_j)) - e log sigma(-beta (D_c - D_j))       arxiv 2305.18290; e: cDPO
    ipo   (D_c / |c| - D_j / |j| - 1 / (2 beta))^2                                    2310.12036, by length as in TRL
    bco   -log sigma(beta D_c - delta) - log sigma(delta - beta D_j)                  2404.04656
    sft   -log pi of chosen answers, a mean over their tokens
    kto   a mean over answers of w_c (1 - sigma(beta (D_c - z))) and w_j (1 - sigma(beta (z - D_j)))    2402.01306

BCO's delta is the mean of beta D over all batches before, a buffer of the train state: at the first step policy and
reference are the same and D is 0. KTO's z = max(0, mean D of mismatched answers) is of the batch at hand, so that
micro-batches do not add up to it. A pair lies in one row, so no mesh splits it. Sums are taken in float64.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F

from functional_trainer import rl_options
from functional_trainer.losses import Loss, Sums, logprobs
from functional_trainer.rollout_correction import per_sequence
from functional_trainer.segments import segment_sum
from functional_trainer.types import Batch, Output, Unembed

TERMS = ("dpo", "ipo", "bco", "sft", "kto")
MPO = rl_options.MPO


@dataclass(frozen=True)
class Preference:
    """What a preference loss minimizes."""

    coefficients: Mapping[str, float]
    """Of some of `TERMS`: {"dpo": 1.0}, or `MPO`."""
    beta: float = 0.1
    label_smoothing: float = 0.0
    """DPO's e: how often labels are taken to be wrong."""
    chosen_weight: float = 1.0
    rejected_weight: float = 1.0
    """KTO's w."""
    balance: float = 0.0
    """Coefficient of the router's per-sequence balance loss; with 0 there is none."""


def preference(coefficients: Mapping[str, float], **settings) -> Loss:
    """Build the loss of a `Preference`. A state for "bco" needs `running_mean` among its buffers.

    ValueError for a term that there is not.
    """
    p = Preference(coefficients, **settings)
    if unknown := [name for name in coefficients if name not in TERMS] or not coefficients:
        raise ValueError(
            f"terms of a preference loss are {', '.join(TERMS)}, not {unknown if coefficients else 'none'}"
        )
    return Loss(
        partial(_terms, p), partial(_weights, p), {**coefficients, "balance": p.balance},
        accumulates="kto" not in coefficients, whole_sequences=True,
        update=_update if "bco" in coefficients else lambda buffers, reported: buffers,
    )  # fmt: skip


def from_options(o: rl_options.PreferenceOptions, balance: float) -> Loss:
    """Build the loss that options ask for, with the router balance loss if it has a weight."""
    kto = {"chosen_weight": o.desirable_weight, "rejected_weight": o.undesirable_weight}
    return preference(o.terms, beta=o.beta, label_smoothing=o.label_smoothing, balance=balance, **kto)


def running_mean(device=None) -> dict[str, torch.Tensor]:
    """Return BCO's buffer before the first step: the mean of rewards, and of how many answers it is."""
    return {"bco": torch.zeros(2, dtype=torch.float64, device=device)}


def _update(buffers: dict, reported: Sums) -> dict:
    (mean, count), answers = buffers["bco"].unbind(), 2 * reported["pairs"]
    new = (reported["rewards/chosen"] + reported["rewards/rejected"]) / 2
    mean = mean + (new - mean) * answers / (count + answers).clamp_min(1)
    return buffers | {"bco": torch.stack([mean, count + answers])}


def _sides(batch: Batch) -> tuple[torch.Tensor, ...]:
    """Return weights that add up to 1 over each chosen, each rejected and each mismatched sequence, and are 0 else."""
    share_BS = per_sequence(batch["weights"], batch)
    return tuple(share_BS * (batch["preferred"] == sign) for sign in (1, -1, 0))


def _weights(p: Preference, batch: Batch) -> Sums:
    wanted = {"ref_logprobs", "lengths", "preferred"} | ({"pairs"} if {"dpo", "ipo"} & p.coefficients.keys() else set())
    if missing := sorted(wanted - batch.keys()):
        raise ValueError(f"the batch has no column {', '.join(missing)}, which this preference loss needs")
    chosen, rejected, mismatched = (side_BS.sum() for side_BS in _sides(batch))
    found = {"dpo": chosen, "ipo": chosen, "bco": chosen, "kto": chosen + rejected, "kl": mismatched}
    found["sft"] = (batch["weights"] * (batch["preferred"] == 1)).sum(dtype=torch.float64)
    for name in ("rewards", "logps"):
        found |= {f"{name}/chosen": chosen, f"{name}/rejected": rejected}
    found |= {"rewards/accuracies": chosen, "rewards/margins": chosen}
    return found | {"balance": (batch["segment_ids"] != 0).sum()}


def _terms(p: Preference, output: Output, unembed: Unembed, batch: Batch, shard) -> tuple[Sums, Sums]:
    trained_BS, sign_BS = batch["weights"] != 0, batch["preferred"]
    logp_BS, _ = logprobs(output, unembed, batch, shard, mask=trained_BS)
    gap_BS = torch.where(trained_BS, logp_BS.to(torch.float64) - batch["ref_logprobs"], 0)
    sum_BS = segment_sum(gap_BS * batch["weights"], batch["segment_ids"], shard)
    sums, reported = _unpaired(p, sum_BS, output.buffers, batch, shard)
    if "pairs" in batch:
        pairs, more = _paired(p, gap_BS, batch, shard)
        sums, reported = pairs | sums, reported | more
    if "sft" in p.coefficients:
        sums["sft"] = -(logp_BS * batch["weights"] * (sign_BS == 1)).sum()
    if p.balance and output.aux:
        sums["balance"] = output.aux["balance"].mean()
    for name, sign in (("chosen", 1), ("rejected", -1)):
        reported[f"logps/{name}"] = (batch["weights"] * (sign_BS == sign) * logp_BS.detach()).sum()
    return sums, reported | {k: v.detach() for k, v in output.aux.items() if k == "load"}


def _unpaired(p: Preference, sum_BS: torch.Tensor, buffers, batch: Batch, shard) -> tuple[Sums, Sums]:
    """Return the sums of KTO and BCO, which look at one answer at a time, given D at every token, and rewards."""
    chosen_BS, rejected_BS, mismatched_BS = _sides(batch)
    sign_BS, reward_BS, sums = batch["preferred"], p.beta * sum_BS, {}
    reported = {"pairs": chosen_BS.sum()}
    for name, side_BS in (("chosen", chosen_BS), ("rejected", rejected_BS)):
        reported[f"rewards/{name}"] = (side_BS * reward_BS.detach()).sum()
    if "bco" in p.coefficients:
        shifted_BS = reward_BS - buffers["bco"][0]
        sums["bco"] = -((chosen_BS + rejected_BS) * F.logsigmoid(sign_BS * shifted_BS)).sum()
    if "kto" in p.coefficients:
        reported["kl"] = (mismatched_BS * sum_BS.detach()).sum()
        z = shard.replicate(reported["kl"]) / shard.replicate(mismatched_BS.sum()).clamp_min(1)
        side_BS = p.chosen_weight * chosen_BS + p.rejected_weight * rejected_BS
        sums["kto"] = (side_BS * torch.sigmoid(-sign_BS * (reward_BS - p.beta * z.clamp_min(0)))).sum()
    return sums, reported


def _paired(p: Preference, gap_BS: torch.Tensor, batch: Batch, shard) -> tuple[Sums, Sums]:
    """Return the sums of losses that compare the two answers of a pair, each counted on the chosen one's tokens."""
    chosen_BS, rejected_BS, _ = _sides(batch)
    margin_BS = p.beta * segment_sum(gap_BS * batch["weights"] * batch["preferred"], batch["pairs"], shard)
    sums, e = {}, p.label_smoothing
    if "dpo" in p.coefficients:
        loss_BS = -(1 - e) * F.logsigmoid(margin_BS) - e * F.logsigmoid(-margin_BS)
        sums["dpo"] = (chosen_BS * loss_BS).sum()
    if "ipo" in p.coefficients:
        apart_BS = segment_sum(gap_BS * (chosen_BS - rejected_BS), batch["pairs"], shard)
        sums["ipo"] = (chosen_BS * (apart_BS - 1 / (2 * p.beta)).square()).sum()
    margin_BS = margin_BS.detach()
    right = (chosen_BS * (margin_BS > 0)).sum()
    return sums, {"rewards/accuracies": right, "rewards/margins": (chosen_BS * margin_BS).sum()}
