"""Floating-point operations of a training step, read off the abstract parameters, and model FLOP/s utilisation (MFU).

A product of (R, I) and (I, O) costs 2 R I O: one multiplication and one addition per weight and row. Backward does it
twice more, for the gradient of either operand, so a weight costs 6 a token. Of E experts a token meets top_k, so their
weights count top_k / E. An embedding is a lookup and costs nothing; the unembedding is a product, also when tied.

Attention compares a query with every key of its document up to itself: n(n+1)/2 pairs in a document of n tokens, and
with a window w, which counts the query itself, the sum of min(i, w) over i = 1..n; bidirectional attention also sees as
many keys after itself. A document that continues another one has the pairs of both as one, less those of the other.
A pair costs 2 N H for the score and 2 N V for the weighted value (N query heads of H, values of V, mostly the same), so
forward and backward 6 N (H + V) a layer. Blocks of a prefix count as if they were causal.

Norms, softmax, sinks, caps, activations, the optimizer, padding and recomputation count nothing: MFU rates useful work.
"""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from functional_trainer import param, tree
from functional_trainer.param import Param


def matmul_params(specs: tree.Tree, top_k: int = 0) -> float:
    """Count the parameters that one token multiplies: matrices, `top_k` of E experts, and the unembedding.

    The tables "embed" and "unembed" are known by name; without an "unembed" the embedding is tied and counts once.
    Raises ValueError if there are experts and `top_k` is not at least 1.
    """
    flat = _flat(specs)
    unembed = "unembed" if "unembed" in flat else "embed"
    total = 0.0
    for path, p in flat.items():
        if p.is_matrix or path == unembed:
            expert = "E" in p.batch
            if expert and top_k < 1:
                raise ValueError(f"{path} is one matrix per expert: top_k must be at least 1, got {top_k}")
            total += math.prod(p.shape) * (top_k / p.shape[p.dims.index("E")] if expert else 1)
    return total


def train_flops(
    specs: tree.Tree, doc_lengths: Tensor, top_k: int = 0, windows: Sequence[int | None] | None = None,
    causal: bool = True, score_dims: Sequence[int] | None = None, before: Tensor | None = None,
) -> float:  # fmt: skip
    """Count the FLOPs of forward and backward over documents of `doc_lengths` (int64, any shape; see `lengths`).

    6 * matmul_params * tokens + 6 * sum over layers of N (H + V) * pairs; N and V come from the "NH->D" matrices, in
    order. `windows` holds the sliding window of each of these layers (None: all keys), `score_dims` the head dim H of
    its queries and keys (None: V). `before`, shaped as `doc_lengths`, has the tokens of what documents continue.
    """
    values = [p.shape[1:3] for p in _flat(specs).values() if p.io == "NH->D"]
    windows, dims = windows or [None] * len(values), score_dims or [width for _, width in values]
    for what, given in (("windows", windows), ("score_dims", dims)):
        if len(given) != len(values):
            raise ValueError(f"{len(given)} {what} for {len(values)} attention layers")
    pairs = {window: _pairs(doc_lengths, window, causal) for window in set(windows)}
    if before is not None:
        pairs = {w: _pairs(doc_lengths + before, w, causal) - _pairs(before, w, causal) for w in pairs}
    attention = sum(n * (h + v) * pairs[w] for (n, v), h, w in zip(values, dims, windows, strict=True))
    return 6 * matmul_params(specs, top_k) * int(doc_lengths.sum()) + 6 * attention


def lengths(segment_ids_BS: Tensor) -> Tensor:
    """Return the lengths of all documents of a packed batch, int64; 0 is padding, documents are contiguous in a row."""
    return _documents(segment_ids_BS)[0]


def continued(batch: Mapping[str, Tensor]) -> Tensor | None:
    """Return the tokens that each document of a batch continues: where it begins, if it has a parent."""
    if "parent_ids" not in batch:
        return None
    starts = _documents(batch["segment_ids"])[1]
    return torch.where(batch["parent_ids"] != 0, batch["positions"], 0).flatten()[starts]


def _documents(segment_ids_BS: Tensor) -> tuple[Tensor, Tensor]:
    """Return the lengths of documents, and where they begin in all rows."""
    row = torch.arange(segment_ids_BS.shape[0], device=segment_ids_BS.device)[:, None]
    key = row * (segment_ids_BS.max() + 1) + segment_ids_BS
    _, counts = torch.unique_consecutive(key, return_counts=True)
    starts = counts.cumsum(0) - counts
    real = segment_ids_BS.flatten()[starts] > 0
    return counts[real], starts[real]


def mfu(flops: float, seconds: float, peak: float | None) -> float | None:
    """Return flops / seconds as a fraction of `peak` FLOP/s (of all devices together), None where that is unknown."""
    return flops / seconds / peak if peak and seconds > 0 else None


def _flat(specs: tree.Tree) -> dict[str, Param]:
    found: dict[str, Param] = {}
    tree.map_with_path(found.__setitem__, specs, is_leaf=param.is_param)
    return found


def _pairs(doc_lengths: Tensor, window: int | None, causal: bool) -> int:
    """Count query-key pairs: min(i, window) keys for the i-th token of each document, as many to the right if seen."""
    near = doc_lengths if window is None else doc_lengths.clamp(max=window)
    back = near * (near + 1) // 2 + (doc_lengths - near) * near
    return int((back if causal else 2 * back - doc_lengths).sum())
