"""models.generate against models.logits."""

import pytest
import torch

import models
from tests.models import small

MODEL = small.model(initializer_range=0.5)
PARAMS = MODEL.init(0)
PROMPTS = [[3, 1, 4, 1, 5, 9], [2], [7, 7, 1]]


def generate(prompts=PROMPTS, **options):
    return models.generate(MODEL, PARAMS, prompts, **{"max_new_tokens": 7} | options)


def rescore(prompt, completion, temperature=1.0):
    """Return the log-softmax of the whole sequence's logits at the generated tokens, (n, V)."""
    whole = models.logits(MODEL, PARAMS, torch.tensor([prompt + completion.tokens]))
    return (whole[0, len(prompt) - 1 : -1] / temperature).log_softmax(-1)


@pytest.mark.parametrize("options", [{}, {"temperature": 1.3}, {"temperature": 0.8, "top_k": 5, "top_p": 0.9}])
def test_logprobs_are_the_models_own(options):
    for prompt, done in zip(PROMPTS, generate(**options), strict=True):
        logp = rescore(prompt, done, options.get("temperature", 1.0))
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
        ({"prompts": [[1], []]}, "every prompt needs at least one token"),
        ({"temperature": -1.0}, "expected temperature >= 0"),
        ({"top_p": 0.0}, "expected top_p > 0 and <= 1"),
        ({"top_k": -1}, "expected top_k >= 0"),
        ({"max_new_tokens": 0}, "expected max_tokens >= 1"),
    ],
)
def test_refused(change, message):
    with pytest.raises(ValueError, match=message):
        generate(**change)
