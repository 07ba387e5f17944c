"""A packed row equals its pieces, each run alone by transformers at its own positions."""

import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

import models
from functional_trainer import hf, tree
from tests.conformance.reference import Float64, assert_close, configs, examples, hf_model, saved

PIECES = ((1, 0, 5), (0, 0, 3), (1, 7, 4), (0, 2, 9), (0, 0, 1))
"""(row, first position, length) of documents; one starts late, as the later piece of a split document does."""
WIDTH = 15


def pack(vocab, seed):
    tokens = torch.randint(vocab, (2, WIDTH), generator=torch.Generator().manual_seed(seed))
    segments, positions = torch.zeros(2, WIDTH, dtype=torch.int64), torch.zeros(2, WIDTH, dtype=torch.int64)
    spans = []
    for row, first, length in PIECES:
        start = int((segments[row] > 0).sum())
        span = slice(start, start + length)
        segments[row, span] = int(segments[row].max()) + 1
        positions[row, span] = torch.arange(first, first + length)
        spans.append((row, span))
    return tokens * (segments > 0), segments, positions, spans


@given(configs(), st.integers(0, 99))
@examples(15)
def test_packed_rows_equal_pieces_run_alone_by_transformers(raw, seed):
    tokens, segments, positions, spans = pack(raw["vocab_size"], seed)
    targets = tokens.roll(3, 1)
    with saved(raw) as folder:
        model, params = models.from_pretrained(folder, dtype=torch.float64)
        reference = hf_model(folder)
    params = tree.map(lambda x: x.requires_grad_(), params)
    ours = models.logits(model, params, tokens, segment_ids=segments, positions=positions)
    with Float64():
        for row, span in spans:
            at = row, span
            theirs = reference(tokens[at][None], position_ids=positions[at][None]).logits[0]
            assert_close(ours[at], theirs, 1e-9, f"logits of {at}")
            F.cross_entropy(theirs, targets[at], reduction="sum").backward()
    real = segments > 0
    flat = tree.flatten(params)
    total = F.cross_entropy(ours[real], targets[real], reduction="sum")
    grads = dict(zip(flat, torch.autograd.grad(total, list(flat.values())), strict=True))
    theirs = dict(reference.named_parameters())
    for name, slot in hf.expand(model.specs, model.names[-1]).items():
        assert_close(grads[slot.path][slot.index].reshape(slot.shape), theirs[name].grad, 1e-9, name)


@given(configs("qwen3_moe"), st.integers(0, 99))
@examples(8)
def test_per_sequence_balance_of_packed_rows_is_the_sum_over_pieces(raw, seed):
    tokens, segments, positions, spans = pack(raw["vocab_size"], seed)
    model = models.from_config(raw)
    params = model.init(seed, dtype=torch.float64)
    columns = {"tokens": tokens, "segment_ids": segments, "positions": positions}
    packed = model.apply(params, columns).aux
    alone = [model.apply(params, {k: v[row, span][None] for k, v in columns.items()}).aux for row, span in spans]
    for name, sums in packed.items():
        assert_close(sums, sum(aux[name] for aux in alone), 1e-12, name)
