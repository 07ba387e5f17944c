"""Greedy generation equals transformers' `generate`, for ragged prompts and end tokens, however many rows there are."""

import pytest
import torch
from hypothesis import assume, given

import models
from tests.conformance.reference import configs, examples, hf_model, precision, saved

PROMPTS = [[5, 1, 7, 7, 2, 9, 4], [3], [11, 0, 6, 8, 1], [2, 2]]
NEW = 11


def theirs(reference, eos, dtype):
    longest = max(map(len, PROMPTS))
    padded = torch.tensor([[0] * (longest - len(p)) + p for p in PROMPTS])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in PROMPTS])
    kwargs = {"do_sample": False, "max_new_tokens": NEW, "pad_token_id": 0, "return_dict_in_generate": True}
    with torch.no_grad(), precision(dtype):
        out = reference.generate(padded, attention_mask=mask, eos_token_id=eos, output_logits=True, **kwargs)
    tokens = out.sequences[:, longest:]
    logp = torch.stack(out.logits, 1).log_softmax(-1).gather(-1, tokens[..., None])[..., 0]
    rows = []
    for ids, scores in zip(tokens.tolist(), logp.tolist(), strict=True):
        n = next((i + 1 for i, t in enumerate(ids) if t in eos), len(ids))
        rows.append((ids[:n], scores[:n]))
    return rows


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@given(raw=configs())
@examples(10)
def test_greedy_equals_transformers(raw, dtype):
    assume(raw["sliding_window"] != 1)  # of a window of 1 transformers' cache keeps `[-0:]`, which is everything
    eos = [3, 17, 20]
    with saved(raw) as folder:
        model, params = models.from_pretrained(folder, dtype=dtype)
        expected = theirs(hf_model(folder, dtype), eos, dtype)
    for slots, new in ((4, NEW), (2, NEW), (3, 1)):
        ours = models.generate(model, params, PROMPTS, max_new_tokens=new, eos_ids=eos, slots=slots)
        assert [c.tokens for c in ours] == [tokens[:new] for tokens, _ in expected]
        for sample, (_, logp) in zip(ours, expected, strict=True):
            assert sample.finish_reason == ("stop" if sample.tokens[-1] in eos else "length")
            atol = 1e-9 if dtype == torch.float64 else 1e-4
            torch.testing.assert_close(sample.logprobs, logp[:new], rtol=0, atol=atol)
