"""Models and packed batches small enough for many steps; all sizes differ, or shape bugs pass unseen."""

from dataclasses import replace

import torch

import models

DENSE = {
    "model_type": "qwen3", "vocab_size": 23, "hidden_size": 10, "intermediate_size": 14, "num_hidden_layers": 2,
    "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 4, "tie_word_embeddings": True,
    "max_position_embeddings": 64, "initializer_range": 0.3,
}  # fmt: skip
MOE = DENSE | {
    "model_type": "qwen3_moe", "num_hidden_layers": 3, "num_experts": 5, "num_experts_per_tok": 2,
    "moe_intermediate_size": 7, "mlp_only_layers": [1], "norm_topk_prob": True, "tie_word_embeddings": False,
}  # fmt: skip


def model(raw=MOE, dtype=None, **changes):
    """Build a model that computes in `dtype` (None: the parameters')."""
    return replace(models.from_config(raw | changes), dtype=dtype)


def batch(rows, width=13, vocab=23, seed=0):
    """Pack documents of the given lengths, one list a row; every document's first third is not trained."""
    gen = torch.Generator().manual_seed(seed)
    tokens, targets, segments, positions = torch.zeros(4, len(rows), width, dtype=torch.int64)
    weights = torch.zeros(len(rows), width)
    for row, lengths in enumerate(rows):
        start = 0
        for i, length in enumerate(lengths):
            at = row, slice(start, start + length)
            ids = torch.randint(vocab, (length + 1,), generator=gen)
            tokens[at], targets[at], segments[at] = ids[:-1], ids[1:], i + 1
            positions[at], weights[at] = torch.arange(length), torch.arange(length) >= length // 3
            start += length
    return {
        "tokens": tokens, "targets": targets, "segment_ids": segments, "positions": positions, "weights": weights
    }  # fmt: skip
