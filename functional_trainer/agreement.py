"""Whether the engine that samples and the trainer say the same about what was sampled.

If they do not (other precision, stale weights, another chat template), ratios are wrong from the first step on and a
run learns little or falls apart late, which is why it is looked at before the first one.
"""

from typing import Any

import torch

from functional_trainer import backend
from functional_trainer.losses import logprobs
from functional_trainer.tree import Tree
from functional_trainer.types import ONE_DEVICE, Batch


@torch.no_grad()
def score(model: Any, params: Tree, batch: Batch, shard=ONE_DEVICE, temperature: float = 1.0) -> torch.Tensor:
    """Return the log-probability of each target with a weight, (B, S) as the batch's columns are; 0 of the others."""
    output = model.apply(params, batch, shard)
    return logprobs(output, model.unembed(params, shard), batch, shard, temperature, mask=batch["weights"] != 0)[0]


def differences(
    model: Any, params: Tree, batch: Batch, rows: int, shard=ONE_DEVICE, temperature: float = 1.0
) -> tuple[float, float]:
    """Return mean and largest |rollout - trainer| of a batch's sampled tokens, over all ranks; `rows` at a time."""
    total, count, largest = 0.0, 0.0, 0.0
    for some in shard.micro(batch, batch["tokens"].shape[0] // rows):
        kept_BS = some["weights"] != 0
        apart_BS = (score(model, params, some, shard, temperature) - some["rollout_logprobs"]).abs()
        apart_BS = torch.where(kept_BS, apart_BS, 0).nan_to_num(0.0)  # an engine may not say
        total, count = total + float(apart_BS.sum()), count + float(kept_BS.sum())
        largest = max(largest, float(apart_BS.max()))
    totals, counts, most = zip(*backend.everyone((total, count, largest)), strict=True)
    return sum(totals) / max(sum(counts), 1.0), max(most)
