"""Rollouts that are drawn ahead of a step that writes in place: by which weights each token is, what comes back when a
run goes on, and how it ends. The engine and the model are the real ones; a "step" adds noise to every parameter."""

import threading
import time
from itertools import islice
from typing import Any

import numpy as np
import pytest
import torch

from functional_trainer import advantages, tree
from functional_trainer.agreement import score
from functional_trainer.ahead import Ahead
from functional_trainer.engines import Sampling
from functional_trainer.engines.local import LocalEngine
from functional_trainer.experience import Experience, Plan
from functional_trainer.rollouts import Prompt, Prompts, Scores
from tests.functional_trainer.test_engine import MODELS, PARAMS

MODEL = MODELS["dense"]
QUESTIONS = Prompts(Prompt([10 + i, 3], f"question {i}", {}) for i in range(7))
LONGEST, PROMPTS, GROUP = 6, 3, 2


def reward(prompts, answers):
    return Scores([float(len(a.tokens) + a.tokens[0]) for a in answers], {})


class Run:
    """Rollouts of parameters that are changed in place after each batch, as a step does."""

    def __init__(self, level=0, plain=False, how=None, params=None, steps=0, reward=reward, generate=None, **options):
        self.params = tree.map(torch.clone, PARAMS["dense"] if params is None else params)
        self.steps = steps
        self.engine = LocalEngine(MODEL, self.params, slots=4, length=12, look_every=1)
        self.versions: dict[int, Any] = {}
        settings: dict[str, Any] = {"seq_len": 12, "longest": LONGEST, "rows": 2, "seed": 5, "weights": self.copied}
        given = QUESTIONS, generate or self.generate, reward, lambda r, sizes: advantages.grpo(r)
        settings |= {"update": options.pop("update", self.engine.update)}
        how = how or Plan(PROMPTS, GROUP)
        if plain:
            self.rollouts = Experience(*given, how, **settings)
            return
        more: dict[str, Any] = {"level": level, "staleness": 4, "stop": self.engine.pause} | options
        self.rollouts = Ahead(*given, how, **settings, **more)

    def generate(self, prompts, seed, begun=(), budget=0):
        sampling = Sampling(LONGEST, 1.3, stop=(3, 5, 12), seed=seed, budget=budget)
        return self.engine.generate([p.ids for p in prompts], sampling, begun)

    def copied(self):
        self.versions[self.rollouts.count] = tree.map(torch.clone, self.params)
        return tree.map(torch.clone, self.params)

    def take(self, count: int) -> list[dict[str, torch.Tensor]]:
        """Take batches, with a step after each."""
        found = []
        for batch in islice(self.rollouts, count):
            found.append(batch)
            noise = torch.Generator().manual_seed(self.steps)
            for p in tree.leaves(self.params):
                p.add_(0.2 * torch.randn(p.shape, generator=noise))
            self.steps += 1
        return found

    def resumed(self, **options) -> "Run":
        """A run that goes on where this one is, as from a checkpoint."""
        state = self.rollouts.state()
        other = Run(params=self.params, steps=self.steps, **options)
        other.rollouts.restore(state)
        return other


@pytest.fixture
def run():
    """Make runs whose threads end with the test."""
    made = []

    def make(*args, **options):
        made.append(Run(*args, **options))
        return made[-1]

    yield make
    for one in made:
        one.rollouts.close()
        assert one.rollouts.__dict__.get("thread") is None or not one.rollouts.thread.is_alive()


def same(ours, theirs):
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def agrees(run: Run, batch, version: int) -> float:
    """Return how far a batch is from what the trainer says with the weights of a version."""
    said = score(MODEL, run.versions[version], batch, temperature=1.3)
    return float((said - batch["rollout_logprobs"]).abs()[batch["weights"] != 0].max())


# by which weights ----------------------------------------------------------------------------------------------------


def test_with_nothing_ahead_it_is_the_same_as_without_a_thread(run):
    how = Plan(PROMPTS, GROUP, steps=2, iterations=2, filter_groups=True)
    same(run(how=how).take(8), run(plain=True, how=how).take(8))


def test_one_step_off_each_rollout_is_of_the_version_before(run):
    seen: list[Any] = []
    one = run(1, check=seen.append)
    for n in range(5):
        (batch,) = one.take(1)
        if n == 0:
            same(seen, [batch])
        version = max(n - 1, 0)
        assert {v for a in one.rollouts.last.answers for v in a.versions} == {version}
        assert agrees(one, batch, version) < 1e-4 and (n < 1 or agrees(one, batch, n) > 1e-2)
        said = one.rollouts.report()
        assert said["off_policy"] == {"mean": n - version, "max": n - version, "dropped": 0}
        assert said["wait_s"].keys() == {"trainer", "engine"} and min(said["wait_s"].values()) >= 0
        assert said["weight_version"] == version and said["timing_s"]["update_weights"] > 0
    assert len(seen) == 1, "the first rollout, which is of the weights at that time"
    same(run(1).take(2)[:1], run(0).take(1))


@pytest.mark.parametrize("level", [2, 3])
def test_staleness_is_bounded_and_whatever_is_new_is_used(run, level):
    many, begun = run(level), []
    update = many.rollouts.update

    def noted(weights, version):
        begun.append((many.rollouts.made, many.rollouts.version, version))
        update(weights, version)

    many.rollouts.update = noted
    for n in range(7):
        time.sleep(0.05 * (n % 3))
        (batch,) = many.take(1)
        ((version),) = {v for a in many.rollouts.last.answers for v in a.versions}
        assert n - level <= version <= n and agrees(many, batch, version) < 1e-4
    many.rollouts.state()
    assert [made for made, *_ in begun] == list(range(7 + level))
    assert all(made <= at + level and made - level <= version for made, at, version in begun)


def test_no_more_rollouts_are_drawn_than_are_trained_on(run):
    few = run(3, last=4)
    assert len(few.take(4)) == 4 and few.rollouts.state()["ahead"] == [] and few.rollouts.made == 4


def test_new_weights_reach_answers_under_way(run):
    one = run(1, in_flight=True)
    step, calls = one.engine._decode, []

    def decode(*args):
        calls.append(one.rollouts.made)
        while one.rollouts.made == 1 and calls.count(1) == 3 and one.rollouts.version < 1:
            time.sleep(0.01)
        return step(*args)

    one.engine._decode = decode
    one.take(1)
    while calls.count(1) < 3:  # rollout 1 is begun
        time.sleep(0.01)
    one.take(1)
    answers = one.rollouts.last.answers
    assert {v for a in answers for v in a.versions} == {0, 1} and one.rollouts.report()["off_policy"]["max"] == 1
    by_trainer(one)


@pytest.mark.parametrize("in_flight", [True, False])
def test_weights_are_given_by_one_thread(run, in_flight):
    """Where several ranks exchange as they give them, each thread has a group of its own."""
    threads: list[tuple[str, int]] = []
    one = run(2, in_flight=in_flight, update=lambda w, v: threads.append((threading.current_thread().name, v)))
    one.take(4)
    assert {name for name, _ in threads} == {threading.main_thread().name if in_flight else "rollouts"}
    versions = [version for _, version in threads]
    assert versions == sorted(versions) and (not in_flight or versions == [0, 1, 2, 3])


def by_trainer(run: Run) -> None:
    """Compare the last rollout's answers, token by token, with the trainer of each token's version."""
    for prompt, answer in zip(run.rollouts.last.prompts, run.rollouts.last.answers, strict=True):
        whole = [*prompt.ids, *answer.tokens]
        columns = {"tokens": whole[:-1], "targets": whole[1:], "positions": [*range(len(whole) - 1)]}
        columns |= {"segment_ids": [1] * (len(whole) - 1), "weights": [1.0] * (len(whole) - 1)}
        batch = {k: torch.tensor([v]) for k, v in columns.items()}
        said = {v: score(MODEL, run.versions[v], batch, temperature=1.3)[0] for v in set(answer.versions)}
        wanted = [float(said[v][len(prompt.ids) - 1 + i]) for i, v in enumerate(answer.versions)]
        np.testing.assert_allclose(answer.logprobs, wanted, atol=1e-4)


# partial rollouts ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("level", [0, 1])
def test_what_has_not_ended_waits_and_goes_on_first(run, level):
    part, seen, waited = run(level, budget=2), [], 0
    for n in range(12):
        part.take(1)
        last = part.rollouts.last
        assert len(last.answers) == PROMPTS * GROUP and all(a.finish_reason != "abort" for a in last.answers)
        ages = [n - v for a in last.answers for v in a.versions]
        assert level <= max(ages) <= 4 or n == 0
        said = part.rollouts.report()["off_policy"]
        assert said["dropped"] == 0 and said["max"] == max(ages) and said["mean"] == pytest.approx(np.mean(ages))
        assert said["waiting"] % GROUP == 0
        waited += said["waiting"]
        by_trainer(part)
        mixed = [a.versions for a in last.answers if len(set(a.versions)) > 1]
        assert all(v == sorted(v) for v in mixed)
        seen += [(prompt.ids[0], len(mixed)) for prompt in last.prompts[::GROUP]]
    assert waited and any(mixed for _, mixed in seen)
    part.rollouts.state()
    asked = sorted(QUESTIONS[part.rollouts.order.piece(i)].ids[0] for i in range(part.rollouts.drawn))
    ahead = [d.rollout.prompts[i].ids[0] for d in part.rollouts.ready for i in range(0, PROMPTS * GROUP, GROUP)]
    waiting = [QUESTIONS[group.prompt].ids[0] for group in part.rollouts.groups]
    assert asked == sorted([ids for ids, _ in seen] + ahead + waiting)  # each once: trained, drawn or waiting


@pytest.mark.parametrize(("level", "staleness", "budget"), [(0, 1, 1), (0, 2, 1), (1, 2, 1), (2, 3, 2), (1, 1, 2)])
def test_what_could_not_wait_longer_is_ended(run, level, staleness, budget):
    part, ages, dropped = run(level, budget=budget, staleness=staleness), set(), 0
    for n in range(12):
        part.take(1)
        ages |= {n - v for a in part.rollouts.last.answers for v in a.versions}
        dropped += part.rollouts.report()["off_policy"]["dropped"]
        by_trainer(part)
    assert dropped == 0 and max(ages) <= staleness and (staleness in ages or level > 1)


# what lags -----------------------------------------------------------------------------------------------------------


def test_answers_by_weights_that_are_too_old_are_drawn_anew(run):
    calls = []

    def slow_to_take(weights, version):  # it has the weights of rollout 2 and 3 when it is asked again
        if version < 2:
            late.engine.update(weights, version)

    def generate(prompts, seed, begun, budget):
        calls.append(late.rollouts.made)
        if calls.count(2) == 2:
            late.engine.update(late.versions[2], 2)
        return late.generate(prompts, seed, begun, budget)

    late = run(0, staleness=0, update=slow_to_take, generate=generate)
    (*_, batch) = late.take(3)
    said = late.rollouts.report()["off_policy"]
    assert said == {"mean": 0, "max": 0, "dropped": PROMPTS * GROUP} and calls == [0, 1, 2, 2]
    assert agrees(late, batch, 2) < 1e-4
    asked = [QUESTIONS[late.rollouts.order.piece(i)].ids for i in range(2 * PROMPTS, 3 * PROMPTS)]
    assert sorted(p.ids for p in late.rollouts.last.prompts[::GROUP]) == sorted(asked)  # the same prompts


def test_an_engine_that_never_takes_new_weights_is_found_out(run):
    stuck = run(1, staleness=2, update=lambda weights, version: None)
    stuck.take(3)
    with pytest.raises(RuntimeError, match="rollout 3 gets answers by weights of 3 or more versions before"):
        stuck.take(3)


# going on, and ending -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{"level": 1}, {"level": 1, "budget": 2}, {"level": 0, "budget": 2}], ids=str)
@pytest.mark.parametrize("taken", [1, 2, 3, 5])
def test_a_run_that_goes_on_is_the_same_bit_for_bit(run, options, taken):
    options = options | {"how": Plan(PROMPTS, GROUP, steps=2, iterations=2 if taken > 3 else 1)}
    straight, cut = run(**options), run(**options)
    wanted = straight.take(9)
    same(cut.take(taken), wanted[:taken])
    seen: list[Any] = []
    resumed = cut.resumed(**options, check=seen.append)
    same(resumed.take(9 - taken), wanted[taken:])
    assert not seen, "these may be of older weights than there are"
    resumed.rollouts.close()


@pytest.mark.parametrize("taken", [1, 2, 4])
def test_nothing_is_lost_or_trained_twice(run, taken):
    how = Plan(PROMPTS, GROUP, share_prompts=False)  # so that each answer begins with its question
    cut = run(3, how=how)
    batches = cut.take(taken)
    resumed = cut.resumed(level=3, how=how)
    batches += resumed.take(6 - taken)
    resumed.rollouts.close()
    trained = []
    for batch in batches:
        first = (batch["positions"] == 0) & (batch["segment_ids"] != 0)
        trained.append(sorted(batch["tokens"][first].tolist()))
    order = cut.rollouts.order
    asked = [[QUESTIONS[order.piece(PROMPTS * n + i)].ids[0] for i in range(PROMPTS)] * GROUP for n in range(6)]
    assert trained == [sorted(ids) for ids in asked]


def test_what_goes_wrong_in_the_thread_comes_out_where_it_is_asked(run):
    def broken(prompts, answers):
        if wrong.rollouts.made == 2:
            raise ValueError("no such reward")
        return reward(prompts, answers)

    wrong = run(1, reward=broken)
    wrong.take(2)  # what was drawn before is there
    for _ in range(2):
        with pytest.raises(ValueError, match="no such reward"):
            wrong.take(1)
    with pytest.raises(ValueError, match="no such reward"):
        wrong.rollouts.state()


def test_it_ends_in_the_middle_of_answers(run):
    one = run(1)
    step, calls = one.engine._decode, []

    def decode(*args):
        calls.append(one.rollouts.made)
        time.sleep(0.1 if one.rollouts.made else 0)
        return step(*args)

    one.engine._decode = decode
    one.take(1)
    while 1 not in calls:
        time.sleep(0.01)
    begun = time.monotonic()
    one.rollouts.close()
    assert not one.rollouts.thread.is_alive() and time.monotonic() - begun < 2 and calls.count(1) < 4
