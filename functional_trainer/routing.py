"""Routing replay: the trainer uses experts that were chosen before, with its own router's scores: by the rollout engine
(R3, arxiv 2510.11370), or, in all steps of a rollout, by itself before the first (R2; verl's names).

Two programs that compute the same model round differently, and where a token likes two experts about equally they
choose different ones. Recorded choices are a column of the batch and an input of the model's forward; gradients reach
the router through the scores of the experts that were recorded.

n tokens of a prompt and its answer, L layers with experts, K experts of a token.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch

from functional_trainer.engines import Sample
from functional_trainer.tree import Tree


def id_type(model: Any) -> torch.dtype:
    """Return the smallest type that holds the ids of a model's experts, and one more; ValueError if it has none."""
    if not any("moe" in layer for layer in model.specs["layers"]):
        raise ValueError("--rollout.routing-replay: the model has no routed experts, leave it away")
    return torch.uint8 if model.config.experts < 2**8 else torch.int16


def recorded(aux: Tree, dtype: torch.dtype) -> torch.Tensor:
    """Return the experts that a forward chose, as it says with a cache or `record`,, (B, S, L, K)."""
    return aux["routed_experts"].movedim(0, 2).to(dtype)


def column(pairs: Iterable[tuple[Sequence[int], Sample]]) -> np.ndarray:
    """Return the experts of the token before each token, (sum of n, L, K), of prompts, each followed by its answer.

    It is aligned as targets are; the first token of each prompt has none. ValueError if an engine did not say.
    """
    parts = []
    for i, (prompt, answer) in enumerate(pairs):
        if (routed := answer.routed_experts) is None:
            raise ValueError("--rollout.routing-replay engine: the rollout engine does not record experts")
        if len(routed) != (wanted := len(prompt) + len(answer.tokens) - 1):
            raise ValueError(f"answer {i} has experts of {len(routed)} tokens, it has {wanted} but the last")
        parts.append(np.concatenate([np.zeros_like(routed[:1], shape=(1, *routed.shape[1:])), routed]))
    return np.concatenate(parts)
