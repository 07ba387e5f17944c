"""Losses: pure functions from a model's output and a batch to sums.

A loss is a set of terms. Each term returns a sum over tokens and never divides; its weight comes from batch columns
alone and is summed over devices and micro-batches first. The step minimizes the sum of coefficient * sum / weight, so
no result depends on how tokens were packed, split or sharded. Losses see per-token log-probabilities, never logits.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch

import kernels
from functional_trainer.types import Batch, Output, Unembed

Sums = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Loss:
    """A training objective.

    `terms(output, unembed, batch, shard)` returns (sums by term, further sums to report). `weights(batch)` returns what
    each term (and each reported sum that is a mean) is divided by, if by anything. All are sums over the tokens at
    hand, on a mesh each rank's share, and the step adds the shares up. `coefficients` default to 1.
    `update(buffers, reported)` returns the next buffers from what is reported of the whole batch, divided; the terms
    find them in `output.buffers`. What `largest` names of the reported is not added up, the largest is taken, and
    `derive(reported)` returns what becomes a metric of what is reported of the whole batch.
    """

    terms: Callable[[Output, Unembed, Batch, object], tuple[Sums, Sums]]
    weights: Callable[[Batch], Sums]
    coefficients: Mapping[str, float] = field(default_factory=dict)
    accumulates: bool = True
    """Whether sums over micro-batches add up; a product of batch means does not."""
    whole_sequences: bool = False
    """Whether something is pooled over a sequence, so that none may be cut in two; see `data.columns`."""
    update: Callable[[dict, Sums], dict] = lambda buffers, sums: buffers
    largest: tuple[str, ...] = ()
    derive: Callable[[Sums], Sums] = lambda reported: reported


def logprobs(
    output: Output, unembed: Unembed, batch: Batch, shard, temperature: float = 1.0, entropy: bool = False, mask=None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return log-probability of each target and entropy (zeros unless asked for), both (B, S).

    With a boolean `mask` (B, S) both are zeros where it is false, and the others' work is spared where that is free.
    """

    part = shard.part("params/unembed", 0)
    if part != shard.part("act/vocab", 2):
        raise ValueError("the rules of params/unembed (dim 0) and of act/vocab (dim 2) must shard the vocabulary alike")

    def run(hidden, weight, targets, mask=None):
        options = unembed.bias, unembed.softcap, temperature, entropy, mask, part[0] * weight.shape[0]
        return kernels.vocabulary_part(hidden, weight, targets, *options)[:, :, None]

    given = output.hidden, unembed.weight, batch["targets"], *(() if mask is None else (mask,))
    ins = "act/residual > act/block_in", "params/unembed", *("batch/columns > act/rows" for _ in given[2:])
    parts_BSP3 = shard.local(run, ins, ("act/vocab > batch/columns",))(*given)
    return kernels.combine_vocabulary(parts_BSP3, entropy, mask)


def pooled_balance(aux: Sums) -> torch.Tensor:
    """Return transformers' router loss: E sum_e f_e P_e, means over all tokens of all layers (arxiv 2101.03961)."""
    load_E, prob_E = aux["load"].sum(0), aux["prob"].sum(0)
    tokens = aux["prob"].detach().sum()  # router probabilities of one token in one layer sum to one
    return load_E.shape[0] * (load_E * prob_E).sum() / tokens.square().clamp_min(1)


def sft(balance: Literal["per_sequence", "hf", "none"] = "per_sequence", balance_coefficient: float = 1e-3) -> Loss:
    """Build supervised fine-tuning: mean negative log-likelihood over `weights`, plus a router balance loss.

    `per_sequence` balances experts within each document and layer and averages over tokens: it is linear in documents,
    so packing, accumulation and sharding do not change it. `hf` pools all tokens and layers as transformers does; that
    is a product of batch means, so it refuses gradient accumulation. Models without experts have no balance term.
    """

    def terms(output: Output, unembed: Unembed, batch: Batch, shard) -> tuple[Sums, Sums]:
        logp_BS, _ = logprobs(output, unembed, batch, shard, mask=batch["weights"] != 0)
        sums = {"nll": -(logp_BS * batch["weights"]).sum()}
        aux = output.aux
        if aux and balance == "per_sequence":
            sums["balance"] = aux["balance"].mean()
        elif aux and balance == "hf":
            sums["balance"] = shard.share(pooled_balance({k: shard.replicate(v) for k, v in aux.items()}))
        return sums, {k: v.detach() for k, v in aux.items() if k == "load"}

    def weights(batch: Batch) -> Sums:
        weights = {"nll": batch["weights"].sum(dtype=torch.float64)}
        return weights | ({} if balance == "hf" else {"balance": (batch["segment_ids"] != 0).sum()})

    return Loss(terms, weights, {"balance": balance_coefficient}, accumulates=balance != "hf")
