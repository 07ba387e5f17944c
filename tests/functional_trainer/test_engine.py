"""functional_trainer.engines.local: continuous batching changes no sample, and samples are the trainer's own."""

from dataclasses import replace

import pytest
import torch
import torch._dynamo
from hypothesis import given, settings
from hypothesis import strategies as st

from functional_trainer import losses, tree
from functional_trainer.engines import Sampling
from functional_trainer.engines import local as engines
from functional_trainer.engines.local import LocalEngine
from functional_trainer.types import ONE_DEVICE
from tests.models import small

SIZES = {"dense": small.DENSE, "moe": small.MOE}
MODELS = {name: small.model(raw, initializer_range=0.5) for name, raw in SIZES.items()}
PARAMS = {name: model.init(0) for name, model in MODELS.items()}
PROMPTS = [[3, 1, 4, 1, 5, 9], [2], [7, 7, 1], [3, 1, 4, 1, 5, 9], [11, 0, 6, 8, 1, 2, 2, 20, 5], [4, 4], [9, 9, 9]]
SAMPLED = Sampling(max_tokens=9, temperature=1.3, stop=(3, 5, 12, 17), seed=3)
GREEDY = replace(SAMPLED, temperature=0.0)


def engine(kind="moe", **options):
    return LocalEngine(MODELS[kind], PARAMS[kind], **{"slots": 3, "length": 20} | options)


def assert_same(a, b):
    assert [s[:1] + s[2:] for s in a] == [s[:1] + s[2:] for s in b]
    torch.testing.assert_close([s.logprobs for s in a], [s.logprobs for s in b], rtol=1e-5, atol=1e-5)


# continuous batching -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("sampling", [SAMPLED, GREEDY], ids=["sampled", "greedy"])
def test_rows_that_are_given_on_equal_one_at_a_time(kind, sampling):
    alone = engine(kind, slots=1, look_every=1).generate(PROMPTS, sampling)
    if sampling.temperature:
        assert {s.finish_reason for s in alone} == {"stop", "length"} and len({len(s.tokens) for s in alone}) > 2
    for slots, look_every in ((2, 4), (3, 2), (5, 1), (9, 30)):
        assert_same(engine(kind, slots=slots, look_every=look_every).generate(PROMPTS, sampling), alone)


@given(st.data(), st.integers(0, 6), st.sampled_from([2, 3]))
@settings(max_examples=8)
def test_a_sample_depends_on_no_other_prompt(data, place, slots):
    prompt = st.lists(st.integers(0, 22), min_size=1, max_size=9)
    others = data.draw(st.lists(prompt, min_size=place, max_size=8))
    others[place:place] = [PROMPTS[4]]
    alone = engine(slots=1).generate([*[[1]] * place, PROMPTS[4]], SAMPLED)[place]
    assert_same([engine(slots=slots).generate(others, SAMPLED)[place]], [alone])


def test_rows_that_are_moved_together_go_on_as_they_were():
    """40 prompts in 35 rows, of which 17 and then 8 go on; 20 prompts begin in 35, 10 in 17."""
    prompts = [[i % 23, i // 2, *PROMPTS[i % 7][: i % 4]] for i in range(40)]
    alone = engine(slots=1).generate(prompts, SAMPLED)
    many, sizes = engine(slots=35, look_every=1), []
    step = many._decode
    many._decode = lambda params, cache, rows, *rest: sizes.append(len(rows.live)) or step(params, cache, rows, *rest)
    for count, wanted in ((40, [35, 17, 8]), (20, [35, 17, 8]), (10, [17, 8]), (3, [8])):
        sizes.clear()
        assert_same(many.generate(prompts[:count], SAMPLED), alone[:count])
        assert sorted(set(sizes), reverse=True) == wanted == list(dict.fromkeys(sizes))


def test_a_second_call_meets_nothing_of_the_first():
    used = engine()
    first = used.generate(PROMPTS, SAMPLED)
    used.generate([[1] * 10] * 4, Sampling(max_tokens=10, temperature=2.0))
    assert_same(used.generate(PROMPTS, SAMPLED), first)


def test_fewer_tokens_are_the_first_of_more():
    more = engine().generate(PROMPTS, SAMPLED)
    for count in (1, 4):
        for short, long in zip(engine().generate(PROMPTS, replace(SAMPLED, max_tokens=count)), more, strict=True):
            assert short.tokens == long.tokens[:count]
            assert short.finish_reason == ("stop" if short.tokens[-1] in SAMPLED.stop else "length")


def test_the_same_prompt_gives_different_samples_and_is_run_once():
    seen = []
    model = MODELS["moe"]

    def layer(p, x_BSD, *args, **kwargs):
        seen.append(tuple(x_BSD.shape[:2]))
        return model.layer(p, x_BSD, *args, **kwargs)

    watched = LocalEngine(replace(model, layer=layer), PARAMS["moe"], slots=8, length=20)
    samples = watched.generate([PROMPTS[0]] * 6 + [PROMPTS[2]] * 2, SAMPLED)
    assert len({tuple(s.tokens) for s in samples[:6]}) > 3
    assert {shape for shape in seen if shape[1] > 1} == {(2, 5)}  # two prompts, of which the last token is fed later


def test_how_many_prompts_are_run_at_once_changes_nothing(monkeypatch):
    together = engine(slots=7).generate(PROMPTS, SAMPLED)
    monkeypatch.setattr(engines, "TOGETHER", 6)
    assert_same(engine(slots=7).generate(PROMPTS, SAMPLED), together)


def test_no_prompts_give_no_samples():
    assert engine().generate([], SAMPLED) == []


# the trainer's own ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.6])
def test_logprobs_are_those_of_the_packed_trainer(kind, temperature):
    model, params = MODELS[kind], PARAMS[kind]
    samples = engine(kind).generate(PROMPTS, replace(SAMPLED, temperature=temperature, top_k=9, top_p=0.95))
    whole = [p + s.tokens for p, s in zip(PROMPTS, samples, strict=True)]
    batch = {
        "tokens": [t for x in whole for t in x[:-1]],
        "targets": [t for x in whole for t in x[1:]],
        "positions": [i for x in whole for i in range(len(x) - 1)],
        "segment_ids": [n + 1 for n, x in enumerate(whole) for _ in x[1:]],
    }
    batch = {k: torch.tensor([v]) for k, v in batch.items()}
    sampled = [i >= len(p) - 1 for p, x in zip(PROMPTS, whole, strict=True) for i in range(len(x) - 1)]
    logp, _ = losses.logprobs(model.apply(params, batch), model.unembed(params), batch, ONE_DEVICE, temperature)
    said = torch.tensor([logp for s in samples for logp in s.logprobs])
    torch.testing.assert_close(said, logp[0, torch.tensor(sampled)], rtol=1e-5, atol=1e-5)


def test_parameters_are_shared_and_copied_only_for_another_dtype():
    shared, params = engine(), PARAMS["moe"]
    assert all(a.data_ptr() == b.data_ptr() for a, b in zip(*map(tree.leaves, (shared.params, params)), strict=True))
    low = LocalEngine(replace(MODELS["moe"], dtype=torch.bfloat16), params, slots=3, length=20)
    assert {x.dtype for x in tree.leaves(low.params)} == {torch.bfloat16}
    for sample in low.generate(PROMPTS, GREEDY):
        assert len(sample.tokens) == len(sample.logprobs) and max(sample.logprobs) <= 0


def test_new_parameters_are_used_and_their_version_is_told():
    changed, other = engine(version=4), MODELS["moe"].init(1)
    first = changed.generate(PROMPTS, SAMPLED)
    assert all(s.versions == [4] * len(s.tokens) for s in first)
    changed.update(other, 5)
    second = changed.generate(PROMPTS, SAMPLED)
    assert all(s.versions == [5] * len(s.tokens) for s in second)
    assert_same(second, LocalEngine(MODELS["moe"], other, slots=2, length=20, version=5).generate(PROMPTS, SAMPLED))
    assert [s.tokens for s in first] != [s.tokens for s in second]


# compilation ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compile, graphs", [("layer", 2), ("step", 1)])
def test_one_graph_serves_all_rows_however_prompts_come(compile, graphs):
    """Of a layer there is one for each kind: with experts and without; and for each half of the cache that is seen."""
    torch._dynamo.reset()
    made = []

    def backend(graph, inputs):
        made.append(graph)
        return graph.forward

    compiled = engine(compile=compile, backend=backend)
    assert_same(compiled.generate(PROMPTS, SAMPLED), engine().generate(PROMPTS, SAMPLED))
    assert_same(compiled.generate(PROMPTS[1:3], SAMPLED), engine().generate(PROMPTS[1:3], SAMPLED))
    compiled.generate(PROMPTS, replace(SAMPLED, max_tokens=5, seed=7, stop=(1, 2, 3)))
    compiled.update(MODELS["moe"].init(1), 1)
    compiled.generate(PROMPTS, SAMPLED)
    assert len(made) == 2 * graphs


@pytest.mark.slow
@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("compile", ["layer", "step"])
@pytest.mark.parametrize("sampling", [SAMPLED, replace(SAMPLED, top_k=7, top_p=0.9, min_p=0.01), GREEDY])
def test_compiled_samples_are_the_same(kind, compile, sampling):
    torch._dynamo.reset()
    assert_same(engine(kind, compile=compile).generate(PROMPTS, sampling), engine(kind).generate(PROMPTS, sampling))


def test_a_part_of_a_call_has_the_numbers_of_the_whole():
    whole = engine().generate(PROMPTS, SAMPLED)
    some = [5, 1, 3]
    part = engine().generate([PROMPTS[i] for i in some], replace(SAMPLED, numbers=tuple(some)))
    assert_same(part, [whole[i] for i in some])
    with pytest.raises(ValueError, match="there are 3 numbers for 7 prompts"):
        engine().generate(PROMPTS, replace(SAMPLED, numbers=tuple(some)))


# what is refused -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([[1], []], "prompt 1 is empty: every prompt needs at least one token"),
        ([[1], [2] * 12], "prompt 1 has 12 tokens, with max_tokens 9 more than the 20 that a row holds"),
    ],
)
def test_prompts_that_are_refused(prompts, message):
    with pytest.raises(ValueError, match=message):
        engine().generate(prompts, SAMPLED)


def test_a_stop_id_that_no_token_has():
    with pytest.raises(ValueError, match="stop has 23, which is not among the 23 tokens of the model"):
        engine().generate(PROMPTS, replace(SAMPLED, stop=(1, 23)))


def test_a_prompt_that_just_fits():
    (sample,) = engine().generate([[2] * 11], replace(SAMPLED, stop=()))
    assert len(sample.tokens) == 9


@pytest.mark.parametrize("change", [{"slots": 0}, {"length": 0}, {"look_every": 0}])
def test_sizes_that_are_refused(change):
    with pytest.raises(ValueError, match="each must be at least 1"):
        engine(**change)


@pytest.mark.parametrize(
    "change",
    [
        {"max_tokens": 0}, {"temperature": -0.1}, {"top_k": -1}, {"top_p": 0.0}, {"top_p": 1.1}, {"min_p": 1.0},
        {"min_p": -0.1}, {"seed": -1}, {"numbers": (2, -1)},
    ],
)  # fmt: skip
def test_sampling_that_is_refused(change):
    (name,) = change
    with pytest.raises(ValueError, match=f"{name} is .*, expected {name} "):
        Sampling(**change)
