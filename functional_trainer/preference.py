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
from functools import partial

import torch
import torch.nn.functional as F

from functional_trainer.losses import Loss, Sums, logprobs
from functional_trainer.rollout_correction import per_sequence
from functional_trainer.segments import segment_sum
from functional_trainer.types import Batch, Output, Unembed

TERMS = ("dpo", "ipo", "bco", "sft", "kto")
MPO = {"dpo": 0.8, "bco": 0.2, "sft": 1.0}
"""InternVL's mixture, arxiv 2411.10442."""
REWARDS = ("rewards/chosen", "rewards/rejected", "logps/chosen", "logps/rejected")


def preference(
    coefficients: Mapping[str, float], *, beta: float = 0.1, label_smoothing: float = 0.0, chosen_weight: float = 1.0,
    rejected_weight: float = 1.0, balance: float = 0.0,
) -> Loss:  # fmt: skip
    """Build the sum of some of `TERMS` with these coefficients, as {"dpo": 1.0} or `MPO`.

    `chosen_weight` and `rejected_weight` are KTO's; `balance` is the coefficient of the router's per-sequence loss. A
    state for "bco" needs `running_mean` among its buffers. ValueError for an unknown term.
    """
    if unknown := [name for name in coefficients if name not in TERMS] or not coefficients:
        raise ValueError(f"terms of a preference loss are {', '.join(TERMS)}, not {unknown or 'none'}")
    how = {"beta": beta, "smoothing": label_smoothing, "sides": (chosen_weight, rejected_weight)}
    return Loss(
        partial(_terms, tuple(coefficients), how, bool(balance)), partial(_weights, tuple(coefficients)),
        {**coefficients, "balance": balance}, accumulates="kto" not in coefficients, whole_sequences=True,
        update=_update if "bco" in coefficients else lambda buffers, reported: buffers,
    )  # fmt: skip


def running_mean(device=None) -> dict[str, dict[str, torch.Tensor]]:
    """Return BCO's buffers before the first step: the mean of rewards, and of how many answers it is."""
    return {"bco": {k: torch.zeros((), dtype=torch.float64, device=device) for k in ("mean", "count")}}


def _update(buffers: dict, reported: Sums) -> dict:
    old, answers = buffers["bco"], 2 * reported["pairs"]
    mean = (reported["rewards/chosen"] + reported["rewards/rejected"]) / 2
    count = old["count"] + answers
    return buffers | {
        "bco": {"mean": old["mean"] + (mean - old["mean"]) * answers / count.clamp_min(1), "count": count}
    }


def _sides(batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Return weights that add up to 1 over each chosen sequence, and over each rejected one."""
    share_BS = per_sequence(batch["weights"], batch)
    return share_BS * (batch["preferred"] > 0), share_BS * (batch["preferred"] < 0)


def _weights(names: tuple[str, ...], batch: Batch) -> Sums:
    wanted = {"ref_logprobs", "lengths", "preferred"} | ({"pairs"} if {"dpo", "ipo"} & {*names} else set())
    if missing := sorted(wanted - batch.keys()):
        raise ValueError(f"the batch has no column {', '.join(missing)}, which this preference loss needs")
    chosen, rejected = (side_BS.sum() for side_BS in _sides(batch))
    found = {name: {"kto": chosen + rejected}.get(name, chosen) for name in names}
    if "sft" in names:
        found["sft"] = (batch["weights"] * (batch["preferred"] > 0)).sum(dtype=torch.float64)
    found |= {name: chosen if name.endswith("chosen") else rejected for name in REWARDS}
    found |= {"rewards/accuracies": chosen, "rewards/margins": chosen} if "pairs" in batch else {}
    return found | {"balance": (batch["segment_ids"] != 0).sum()}


def _terms(
    names: tuple[str, ...], how: dict, balance: bool, output: Output, unembed: Unembed, batch: Batch, shard
) -> tuple[Sums, Sums]:
    trained_BS = batch["weights"] != 0
    logp_BS, _ = logprobs(output, unembed, batch, shard, mask=trained_BS)
    sign_BS, beta = batch["preferred"], how["beta"]
    chosen_BS, rejected_BS = _sides(batch)
    gap_BS = torch.where(trained_BS, logp_BS.to(torch.float64) - batch["ref_logprobs"], 0)
    log_BS = gap_BS * batch["weights"]
    sum_BS = segment_sum(log_BS, batch["segment_ids"], shard)
    sums: Sums = {}
    if "pairs" in batch:
        margin_BS = segment_sum(sign_BS * log_BS, batch["pairs"], shard)
    if "dpo" in names:
        right_BS, wrong_BS = F.logsigmoid(beta * margin_BS), F.logsigmoid(-beta * margin_BS)
        sums["dpo"] = -(chosen_BS * ((1 - how["smoothing"]) * right_BS + how["smoothing"] * wrong_BS)).sum()
    if "ipo" in names:
        mean_BS = segment_sum(gap_BS * (chosen_BS - rejected_BS), batch["pairs"], shard)
        sums["ipo"] = (chosen_BS * (mean_BS - 1 / (2 * beta)).square()).sum()
    if "bco" in names:
        shifted_BS = beta * sum_BS - output.buffers["bco"]["mean"]
        sums["bco"] = -((chosen_BS + rejected_BS) * F.logsigmoid(sign_BS * shifted_BS)).sum()
    if "sft" in names:
        sums["sft"] = -(logp_BS * batch["weights"] * (sign_BS > 0)).sum()
    if "kto" in names:
        shift_BS = sign_BS * beta * (sum_BS - _baseline(sum_BS.detach(), batch, shard))
        sums["kto"] = ((how["sides"][0] * chosen_BS + how["sides"][1] * rejected_BS) * torch.sigmoid(-shift_BS)).sum()
    if balance and output.aux:
        sums["balance"] = output.aux["balance"].mean()
    reported = {"pairs": chosen_BS.sum(), **{k: v.detach() for k, v in output.aux.items() if k == "load"}}
    for name, side_BS in (("chosen", chosen_BS), ("rejected", rejected_BS)):
        reported[f"rewards/{name}"] = beta * (side_BS * sum_BS.detach()).sum()
        reported[f"logps/{name}"] = (batch["weights"] * (side_BS != 0) * logp_BS.detach()).sum()
    if "pairs" in batch:
        reported["rewards/accuracies"] = (chosen_BS * (margin_BS > 0)).sum()
        reported["rewards/margins"] = beta * (chosen_BS * margin_BS.detach()).sum()
    return sums, reported


def _baseline(sum_BS: torch.Tensor, batch: Batch, shard) -> torch.Tensor:
    """Return KTO's z of the whole batch, 0 without mismatched answers."""
    share_BS = per_sequence(batch["weights"], batch) * (batch["preferred"] == 0)
    total, count = shard.replicate((share_BS * sum_BS).sum()), shard.replicate(share_BS.sum())
    return (total / torch.where(count > 0, count, 1)).clamp_min(0)
