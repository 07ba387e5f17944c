"""functional_trainer.generate against models.logits, and sampling against its distribution."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import models
from functional_trainer.generate import sample
from tests.models import small

MODEL = small.model(initializer_range=0.5)
PARAMS = MODEL.init(0)
PROMPTS = [[3, 1, 4, 1, 5, 9], [2], [7, 7, 1]]


def generate(prompts=PROMPTS, **options):
    return models.generate(MODEL, PARAMS, prompts, **{"max_new_tokens": 7} | options)


def rescore(prompt, completion):
    """Return the log-softmax of the whole sequence's logits at the generated tokens, (n, V)."""
    whole = models.logits(MODEL, PARAMS, torch.tensor([prompt + completion.tokens]))
    return whole[0, len(prompt) - 1 : -1].log_softmax(-1)


@pytest.mark.parametrize("options", [{}, {"temperature": 1.3}, {"temperature": 0.8, "top_k": 5, "top_p": 0.9}])
def test_logprobs_are_the_models_own(options):
    for prompt, done in zip(PROMPTS, generate(**options), strict=True):
        logp = rescore(prompt, done)
        wanted = logp.gather(1, torch.tensor(done.tokens)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(done.logprobs), wanted, rtol=1e-4, atol=1e-5)
        assert len(done.tokens) == 7 and done.finish_reason == "length"
        if not options:
            assert done.tokens == logp.argmax(-1).tolist()


def test_ragged_prompts_equal_each_alone():
    for together, prompt in zip(generate(), PROMPTS, strict=True):
        (alone,) = generate([prompt])
        assert alone.tokens == together.tokens
        assert alone.logprobs == pytest.approx(together.logprobs, abs=1e-5)


def test_seeds():
    a, b, c = (generate(temperature=2.0, seed=s) for s in (0, 0, 1))
    assert a == b and [x.tokens for x in a] != [x.tokens for x in c]


def test_an_end_token_ends_its_row_and_no_other():
    free = generate()
    end = free[0].tokens[2]
    stopped = generate(eos_ids=[end, 22])
    assert any(done.finish_reason == "stop" for done in stopped)
    for done, whole in zip(stopped, free, strict=True):
        ends = [i for i, t in enumerate(whole.tokens) if t in (end, 22)]
        n = ends[0] + 1 if ends else 7
        assert done.tokens == whole.tokens[:n] and len(done.logprobs) == n  # the end token is included
        assert done.logprobs == pytest.approx(whole.logprobs[:n], abs=1e-5)
        assert done.finish_reason == ("stop" if ends else "length")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompts": []}, "every prompt needs at least one token"),
        ({"prompts": [[1], []]}, "every prompt needs at least one token"),
        ({"temperature": -1.0}, "temperature >= 0"),
        ({"top_p": 0.0}, "0 < top_p <= 1"),
        ({"top_k": -1}, "top_k >= 0"),
        ({"max_new_tokens": 0}, "max_new_tokens >= 1"),
    ],
)
def test_refused(change, message):
    with pytest.raises(ValueError, match=message):
        generate(**change)


# sampling ------------------------------------------------------------------------------------------------------------

P = torch.tensor([0.05, 0.4, 0.1, 0.25, 0.2])


def draws(n=20000, temperature=1.0, top_k=0, top_p=1.0):
    logp = P.log().expand(n, -1).clone()
    tokens = sample(logp, temperature, top_k, top_p, torch.Generator().manual_seed(0))
    assert torch.equal(logp, P.log().expand(n, -1))  # the caller's log-probabilities are left alone
    return torch.bincount(tokens, minlength=5).double()


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({}, P),
        ({"temperature": 0.5}, P**2),
        ({"temperature": 2.0}, P**0.5),
        ({"top_k": 2}, P * torch.tensor([0, 1, 0, 1, 0])),
        ({"top_k": 99}, P),
        ({"top_p": 0.6}, P * torch.tensor([0, 1, 0, 1, 0])),  # 0.4 < 0.6, so 0.25 is still needed
        ({"top_p": 0.39}, P * torch.tensor([0, 1, 0, 0, 0])),
        ({"top_p": 0.86}, P * torch.tensor([0, 1, 1, 1, 1])),
        ({"top_k": 3, "top_p": 0.5}, P * torch.tensor([0, 1, 0, 1, 0])),  # 0.4 / 0.85 < 0.5 of what top-k left
        ({"top_p": 0.6, "temperature": 2.0}, P**0.5 * torch.tensor([0, 1, 0, 1, 1])),
    ],
)
def test_draws_follow_the_distribution(options, wanted):
    seen, wanted = draws(**options), wanted.double() / wanted.sum()
    assert not seen[wanted == 0].any()
    expected = 20000 * wanted[wanted > 0]
    chi2 = ((seen[wanted > 0] - expected) ** 2 / expected).sum()
    assert chi2 < 25  # four degrees of freedom at most: one in 20000 by chance


def test_temperature_zero_is_greedy():
    assert draws(temperature=0.0).tolist() == [0, 20000, 0, 0, 0]


@given(st.integers(1, 8), st.floats(0.05, 1.0), st.floats(0.2, 3.0), st.integers(0, 99))
@settings(max_examples=40)
def test_support(top_k, top_p, temperature, seed):
    gen = torch.Generator().manual_seed(seed)
    logp = torch.randn(64, 8, generator=gen).log_softmax(-1)
    tokens = sample(logp, temperature, top_k, top_p, gen)
    for row, token in zip(logp, tokens.tolist(), strict=True):
        p = (row / temperature).topk(top_k).values.double().softmax(0)
        rank = int((row > row[token]).sum())
        assert rank < top_k and p[:rank].sum() < top_p + 1e-6
