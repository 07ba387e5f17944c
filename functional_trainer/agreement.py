"""What the trainer says about samples, and whether the engine that drew them says the same.

If it does not (other precision, stale weights, another chat template), ratios are wrong from the first step on and a
run learns little or falls apart late, which is why it is looked at before the first one.
"""

from typing import Any

import numpy as np
import torch

import kernels
from functional_trainer import backend, routing, tree
from functional_trainer.experience import Scored, Scorer
from functional_trainer.losses import logprobs
from functional_trainer.remat import wrap_layer
from functional_trainer.rollout_correction import compared
from functional_trainer.step import settings
from functional_trainer.tree import Tree
from functional_trainer.types import ONE_DEVICE, Batch


@torch.no_grad()
def score(model: Any, params: Tree, batch: Batch, shard=ONE_DEVICE, temperature: float = 1.0) -> torch.Tensor:
    """Return the log-probability of each target with a weight, (B, S) as the batch's columns are; 0 of the others."""
    return _score(model, params, batch, shard, temperature)[0]


def _score(
    model: Any, params: Tree, batch: Batch, shard, temperature: float, record: torch.dtype | None = None
) -> tuple[torch.Tensor, ...]:
    """Return log-probabilities and, as ids of the type `record`, the experts that were chosen, (B, S, L, K)."""
    output = model.apply(params, batch, shard, record=record is not None)
    unembed, asked_BS = model.unembed(params, shard), batch["weights"] != 0
    logp_BS = logprobs(output, unembed, batch, shard, temperature, mask=asked_BS)[0]
    return (logp_BS,) if record is None else (logp_BS, routing.recorded(output.aux, record))


def differences(
    model: Any, params: Tree, batch: Batch, rows: int, shard=ONE_DEVICE, temperature: float = 1.0
) -> tuple[float, float]:
    """Return mean and largest |rollout - trainer| of a batch's sampled tokens, over all ranks; `rows` at a time.

    Tokens of which the engine said nothing do not count. ValueError if none is left, or if the trainer says what is not
    finite.
    """
    total, count, largest, odd = 0.0, 0, 0.0, 0
    for some in shard.micro(batch, -(-batch["tokens"].shape[0] // rows)):
        logp_BS, told_BS = score(model, params, some, shard, temperature), compared(some)
        apart_BS = torch.where(told_BS, (logp_BS - some["rollout_logprobs"]).abs(), 0)
        total, count = total + float(apart_BS.sum()), count + int(told_BS.sum())
        largest, odd = max(largest, float(apart_BS.max())), odd + int((~logp_BS.isfinite()).sum())
    totals, counts, most, odds = zip(*backend.everyone((total, count, largest, odd)), strict=True)
    if sum(odds):
        said = f"{sum(odds)} log-probabilities of sampled tokens by the trainer are not finite"
        raise ValueError(f"{said}: its weights or its precision are wrong, whatever the engine says")
    if not sum(counts):
        raise ValueError("there is no sampled token of which the engine gave a log-probability to compare with")
    return sum(totals) / sum(counts), max(most)


def scorer(
    model: Any, params: Tree, rows: int, shard: Any, device: torch.device, compile: str = "off",
    temperature: float = 1.0, record: bool = False,
) -> Scorer:  # fmt: skip
    """Return what computes log-probabilities of sampled tokens with the weights as they are when it is called.

    They are cast and used as in a step. All ranks call it together, each with its rows, in passes of `rows`. With
    `record` it also says which experts these chose, of all tokens; ValueError if the model has none.
    """
    ids = routing.id_type(model) if record else None
    wrapped = wrap_layer(model, compile=compile != "off", remat="none")

    @torch.no_grad()
    def run(batch: Batch, number: np.ndarray, size: int) -> Scored:
        used = tree.map(lambda p: shard.storage(p).detach().to(model.dtype or p.dtype), params)
        columns = batch | {"number": torch.from_numpy(number)}
        placed = shard.put_batch({k: v.to(device) for k, v in columns.items()})
        parts = shard.micro(placed, -(-placed["tokens"].shape[0] // rows))
        made = zip(*(_score(wrapped, used, part, shard, temperature, ids) for part in parts), strict=True)
        found = []
        for x, of in zip(map(torch.cat, made), (placed["weights"], placed["segment_ids"]), strict=False):
            own = [one[of != 0].numpy(force=True) for one in (placed["number"], x)]
            found.append(np.zeros((size, *own[1].shape[1:]), own[1].dtype))
            for places, values in backend.everyone(own):
                found[-1][places] = values
        return Scored(*found)

    def compiled(batch: Batch, number: np.ndarray, size: int) -> Scored:
        with settings(False), kernels.kept_on_disk():
            return run(batch, number, size)

    return run if compile == "off" else compiled  # importing the compiler takes seconds
