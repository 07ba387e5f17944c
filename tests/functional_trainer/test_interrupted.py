"""Answers that are interrupted: what they have is kept, what follows is the new weights' own, as the trainer says."""

import threading
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from functional_trainer import losses
from functional_trainer.engines import Sample
from functional_trainer.engines.local import LocalEngine
from functional_trainer.types import ONE_DEVICE
from tests.functional_trainer.test_engine import MODELS, PARAMS, PROMPTS, SAMPLED, assert_same, engine

LATER = {name: [PARAMS[name], *(model.init(seed) for seed in (1, 2))] for name, model in MODELS.items()}
"""Weights of version 0, 1, ..., by kind of model."""


def said_by_the_trainer(kind: str, samples: list[Sample], prompts=PROMPTS) -> list[list[float]]:
    """Return each token's log-probability by the weights of its version, each answer alone, without a cache."""
    model, found = MODELS[kind], []
    for prompt, sample in zip(prompts, samples, strict=True):
        whole = [*prompt, *sample.tokens]
        columns = {"tokens": whole[:-1], "targets": whole[1:], "positions": list(range(len(whole) - 1))}
        batch = {k: torch.tensor([v]) for k, v in (columns | {"segment_ids": [1] * (len(whole) - 1)}).items()}
        by_version = []
        for params in LATER[kind]:
            output, unembed = model.apply(params, batch), model.unembed(params)
            by_version.append(losses.logprobs(output, unembed, batch, ONE_DEVICE, SAMPLED.temperature)[0][0])
        own = range(len(prompt) - 1, len(whole) - 1)
        found.append([float(by_version[v][at]) for v, at in zip(sample.versions, own, strict=True)])
    return found


def assert_trained_as_sampled(kind: str, samples: list[Sample], prompts=PROMPTS) -> None:
    wanted = said_by_the_trainer(kind, samples, prompts)
    torch.testing.assert_close([s.logprobs for s in samples], wanted, rtol=1e-5, atol=1e-5)


def after(made: LocalEngine, count: int, then) -> LocalEngine:
    """Have an engine call `then` as it decodes its `count`-th token, as another thread might."""
    step, calls = made._decode, []

    def decode(*args):
        calls.append(1)
        if len(calls) == count:
            other = threading.Thread(target=then)
            other.start()
            other.join()
        return step(*args)

    made._decode = decode
    return made


@settings(max_examples=10)
@given(st.sampled_from(list(MODELS)), st.lists(st.integers(1, 4), min_size=1, max_size=4), st.integers(1, 4))
def test_in_parts_an_answer_is_the_same_as_at_once(kind, budgets, slots):
    whole = engine(kind).generate(PROMPTS, SAMPLED)
    parts: list[Sample | None] = [None] * len(PROMPTS)
    for budget in [*budgets, 0]:
        open_ = [i for i, s in enumerate(parts) if s is None or s.finish_reason == "abort"]
        for i in open_:  # alone, under the number that it has in the whole call
            how = replace(SAMPLED, budget=budget, numbers=(i,))
            (found,) = engine(kind, slots=slots).generate([PROMPTS[i]], how, [parts[i]])
            had = len(parts[i].tokens) if parts[i] else 0
            assert not parts[i] or found.tokens[:had] == parts[i].tokens
            assert not budget or len(found.tokens) - had <= budget
            assert (found.finish_reason == "abort") == (len(found.tokens) < len(whole[i].tokens))
            parts[i] = found
    assert_same(parts, whole)


def test_many_go_on_together():
    whole = engine().generate(PROMPTS, SAMPLED)
    first = engine().generate(PROMPTS, replace(SAMPLED, budget=2))
    assert {s.finish_reason for s in first} == {"stop", "abort"}
    open_ = [i for i, s in enumerate(first) if s.finish_reason == "abort"]
    begun = [first[i] if i in open_ else None for i in range(len(PROMPTS))]  # those that ended begin anew
    assert_same(engine().generate(PROMPTS, SAMPLED, begun), whole)


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("count", [1, 3, 6, 8])
def test_new_weights_in_the_middle_of_answers(kind, count):
    old = engine(kind).generate(PROMPTS, SAMPLED)
    made = engine(kind, look_every=2)
    after(made, count, lambda: made.update(LATER[kind][1], 1))
    samples = made.generate(PROMPTS, SAMPLED)
    assert {v for s in samples for v in s.versions} == {0, 1} and made.version == 1
    for sample, before in zip(samples, old, strict=True):
        kept = sample.versions.count(0)
        assert sample.versions == sorted(sample.versions) and len(sample.versions) == len(sample.tokens)
        assert sample.tokens[:kept] == before.tokens[:kept]
    assert count < 3 or any(0 < s.versions.count(1) < len(s.versions) for s in samples)
    assert_trained_as_sampled(kind, samples)


def test_new_weights_twice_and_once_when_it_is_over():
    made = engine(look_every=1)
    step, calls = made._decode, []

    def decode(*args):
        calls.append(1)
        if len(calls) in (3, 6):
            made.update(LATER["moe"][len(calls) // 3], len(calls) // 3)
        return step(*args)

    made._decode = decode
    samples = made.generate(PROMPTS, SAMPLED)
    assert any(set(s.versions) == {0, 1, 2} for s in samples)
    assert_trained_as_sampled("moe", samples)
    assert made.version == 2 and made.params["embed"].data_ptr() == LATER["moe"][2]["embed"].data_ptr()
    last = after(engine(slots=1), 1, lambda: last.update(LATER["moe"][1], 1))
    (sample,) = last.generate(PROMPTS[:1], replace(SAMPLED, max_tokens=1))  # over before the next look
    assert sample.versions == [0] and last.version == 1


def test_paused_it_gives_what_there_is_and_goes_on_with_other_weights():
    made = engine(slots=2, look_every=1)
    after(made, 5, made.pause)
    first = made.generate(PROMPTS, SAMPLED)
    whole = engine(look_every=1).generate(PROMPTS, SAMPLED)
    assert {s.finish_reason for s in first} >= {"abort"} and any(not s.tokens for s in first)  # some had no row yet
    for part, all_ in zip(first, whole, strict=True):
        assert part.tokens == all_.tokens[: len(part.tokens)]
    assert [s.tokens for s in made.generate(PROMPTS, SAMPLED)] == [[]] * len(PROMPTS)
    made.resume()
    made.update(LATER["moe"][1], 1)
    open_ = [i for i, s in enumerate(first) if s.finish_reason == "abort"]
    second = made.generate([PROMPTS[i] for i in open_], SAMPLED, [first[i] for i in open_])
    for i, sample in zip(open_, second, strict=True):
        kept = len(first[i].tokens)
        assert sample.tokens[:kept] == first[i].tokens and sample.logprobs[:kept] == first[i].logprobs
        assert sample.versions == [0] * kept + [1] * (len(sample.tokens) - kept) and sample.finish_reason != "abort"
    assert_trained_as_sampled("moe", second, [PROMPTS[i] for i in open_])


def test_what_cannot_go_on_is_refused():
    done = engine().generate(PROMPTS, SAMPLED)
    with pytest.raises(ValueError, match="begun 0 has ended, by '(stop|length)': there is nothing to go on with"):
        engine().generate(PROMPTS, SAMPLED, done)
    with pytest.raises(ValueError, match="begun has 1 samples for 7 prompts"):
        engine().generate(PROMPTS, SAMPLED, [None])
