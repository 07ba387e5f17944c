"""What the trainer says about samples, and whether the engine that drew them says the same.

If it does not (other precision, stale weights, another chat template), ratios are wrong from the first step on and a
run learns little or falls apart late, which is why it is looked at before the first one.
"""

from typing import Any

import numpy as np
import torch

import kernels
from functional_trainer import backend, tree
from functional_trainer.experience import Scorer
from functional_trainer.losses import logprobs
from functional_trainer.remat import wrap_layer
from functional_trainer.step import settings
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
    for some in shard.micro(batch, -(-batch["tokens"].shape[0] // rows)):
        kept_BS = some["weights"] != 0
        apart_BS = (score(model, params, some, shard, temperature) - some["rollout_logprobs"]).abs()
        apart_BS = torch.where(kept_BS, apart_BS, 0).nan_to_num(0.0)  # an engine may not say
        total, count = total + float(apart_BS.sum()), count + float(kept_BS.sum())
        largest = max(largest, float(apart_BS.max()))
    totals, counts, most = zip(*backend.everyone((total, count, largest)), strict=True)
    return sum(totals) / max(sum(counts), 1.0), max(most)


def scorer(
    model: Any, params: Tree, rows: int, shard: Any, device: torch.device, compile: str = "off",
    temperature: float = 1.0,
) -> Scorer:  # fmt: skip
    """Return what computes log-probabilities of sampled tokens with the weights as they are when it is called.

    They are cast and used as in a step. All ranks call it together, each with its rows, in passes of `rows`.
    """
    wrapped = wrap_layer(model, compile=compile != "off", remat="none")

    def run(batch: Batch, number: np.ndarray, size: int) -> np.ndarray:
        used = tree.map(lambda p: shard.storage(p).detach().to(model.dtype or p.dtype), params)
        columns = batch | {"number": torch.from_numpy(number)}
        placed = shard.put_batch({k: v.to(device) for k, v in columns.items()})
        parts = shard.micro(placed, -(-placed["tokens"].shape[0] // rows))
        logp_BS = torch.cat([score(wrapped, used, part, shard, temperature) for part in parts])
        sampled = placed["weights"] != 0
        found = np.zeros(size, np.float64 if logp_BS.dtype == torch.float64 else np.float32)
        for places, values in backend.everyone([x[sampled].numpy(force=True) for x in (placed["number"], logp_BS)]):
            found[places] = values
        return found

    def compiled(batch: Batch, number: np.ndarray, size: int) -> np.ndarray:
        with settings(False), kernels.kept_on_disk():
            return run(batch, number, size)

    return run if compile == "off" else compiled  # importing the compiler takes seconds
