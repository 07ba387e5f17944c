"""Answers that share their prompt in a row equal each prompt and answer, run alone by transformers."""

import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

import models
from functional_trainer import hf, tree
from tests.conformance.reference import Float64, assert_close, configs, examples, hf_model, saved

PROMPTS, ANSWERS = (4, 1), (3, 1)
"""Tokens of each prompt, and of each of its answers."""


def shared(vocab: int, seed: int):
    """Return whole sequences and one row in which a prompt's answers continue all of it but its last token."""
    gen = torch.Generator().manual_seed(seed)
    draw = lambda n: torch.randint(vocab, (n,), generator=gen)  # noqa: E731
    columns: dict[str, list] = {"tokens": [], "segment_ids": [], "positions": [], "parent_ids": []}
    wholes, segment, end = [], 0, 0

    def add(tokens, first, parent):
        nonlocal segment, end
        segment, end = segment + 1, end + len(tokens)
        ids = torch.ones_like(tokens)
        parts = tokens, ids * segment, torch.arange(first, first + len(tokens)), ids * parent
        for column, part in zip(columns.values(), parts, strict=True):
            column.append(part)

    for prompt in map(draw, PROMPTS):
        before = len(prompt) - 1
        if before:
            add(prompt[:-1], 0, 0)
        parent = segment if before else 0
        for answer in map(draw, ANSWERS):
            add(torch.cat([prompt[-1:], answer[:-1]]), before, parent)
            wholes.append((torch.cat([prompt, answer]), before, slice(end - len(answer), end)))
    return {name: torch.cat(parts)[None] for name, parts in columns.items()}, wholes


@given(configs(), st.integers(0, 99))
@examples(5)
def test_answers_that_share_a_prompt_equal_each_run_alone_by_transformers(raw, seed):
    batch, wholes = shared(raw["vocab_size"], seed)
    with saved(raw) as folder:
        model, params = models.from_pretrained(folder, dtype=torch.float64)
        reference = hf_model(folder)
    params = tree.map(lambda x: x.requires_grad_(), params)
    tokens = batch.pop("tokens")
    ours = models.logits(model, params, tokens, **batch)[0]
    total = torch.zeros((), dtype=torch.float64)
    with Float64():
        for ids, before, place in wholes:
            theirs = reference(ids[None, :-1]).logits[0, before:]
            assert_close(ours[place], theirs, 1e-9, f"logits of {place}")
            F.cross_entropy(theirs, ids[before + 1 :], reduction="sum").backward()
    for ids, before, place in wholes:
        total = total + F.cross_entropy(ours[place], ids[before + 1 :], reduction="sum")
    flat, theirs = tree.flatten(params), dict(reference.named_parameters())
    grads = dict(zip(flat, torch.autograd.grad(total, list(flat.values())), strict=True))
    for name, slot in hf.expand(model.specs, model.names[-1]).items():
        assert_close(grads[slot.path][slot.index].reshape(slot.shape), theirs[name].grad, 1e-9, name)
