"""Rollouts by Ray's actors: the samples of an engine in this process, whichever worker lives to draw them."""

import os
import signal
import threading
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from functional_trainer import cluster, tree
from functional_trainer.engines import actors
from functional_trainer.engines.actors import RayEngine
from tests.functional_trainer.test_engine import MODELS, PARAMS, PROMPTS, SAMPLED, assert_same, engine

pytestmark = pytest.mark.slow
LATER = MODELS["moe"].init(1)


@pytest.fixture(scope="module")
def two():
    import ray

    os.environ.pop("RAY_ADDRESS", None)
    made = RayEngine(MODELS["moe"], workers=2, slots=3, length=20)
    yield made
    ray.shutdown()


def processes(two: RayEngine) -> list[int]:
    import ray

    return ray.get([worker.process.remote() for worker in two.crew.workers])


def begin_with(two: RayEngine, make) -> None:
    """Let other workers take the place of all, which hold the cores that they need."""
    import ray

    two.crew._make = make
    for i, worker in enumerate(two.crew.workers):
        ray.kill(worker)
        two.crew._start(i)
    ray.get(two.crew.started)


def slowed(two: RayEngine, seconds: float) -> None:
    """Let workers wait before they answer: what kills them has time to."""
    import ray

    def slow(worker):
        generate = worker.engine.generate
        worker.engine.generate = lambda *given: (time.sleep(seconds), generate(*given))[1]

    def ready(worker):
        return worker.engine is not None

    while not all(ray.get([worker.__ray_call__.remote(ready) for worker in two.crew.workers])):
        two.generate(PROMPTS, SAMPLED)  # a quick worker may take all parts
    ray.get([worker.__ray_call__.remote(slow) for worker in two.crew.workers])


def test_samples_are_those_of_one_engine(two):
    for version, params in enumerate((PARAMS["moe"], LATER)):
        two.update(params, version)
        alone = engine(version=version)
        alone.update(params, version)
        assert_same(two.generate(PROMPTS, SAMPLED), alone.generate(PROMPTS, SAMPLED))
        part = replace(SAMPLED, budget=2, numbers=tuple(range(3, 3 + 2 * len(PROMPTS), 2)))
        assert_same(two.generate(PROMPTS, part), alone.generate(PROMPTS, part))
        first = [s if s.finish_reason == "abort" else None for s in alone.generate(PROMPTS, part)]
        assert_same(two.generate(PROMPTS, SAMPLED, first), alone.generate(PROMPTS, SAMPLED, first))
    assert two.generate([], SAMPLED) == []


def test_weights_are_put_into_the_store_once_for_each_version(two, monkeypatch):
    import ray

    put, seen = ray.put, []
    monkeypatch.setattr(ray, "put", lambda value: seen.append(value) or put(value))
    for version in (7, 8):
        two.update(LATER, version)
        for _ in range(3):
            assert {v for s in two.generate(PROMPTS, SAMPLED) for v in s.versions} == {version}
    sizes = [sum(x.nbytes for x in tree.leaves(value) if hasattr(x, "nbytes")) for value in seen]
    assert sizes == [sum(x.nbytes for x in tree.leaves(LATER))] * 2


def test_one_worker_is_killed_in_the_middle_of_a_call(two):
    two.update(PARAMS["moe"], 20)
    before = processes(two)
    slowed(two, 1.0)
    prompts = PROMPTS * 3
    killer = threading.Timer(0.5, os.kill, (before[0], signal.SIGKILL))
    killer.start()
    begun = time.monotonic()
    samples = two.generate(prompts, SAMPLED)
    assert not killer.is_alive() and time.monotonic() - begun < 60
    alone = engine(version=20).generate(prompts, SAMPLED)
    assert len(samples) == len(prompts)  # none is missing, none is there twice, and they are the same
    assert_same(samples, alone)
    after = processes(two)
    assert before[0] not in after and before[1] in after


def test_a_worker_that_is_started_anew_has_the_current_weights(two):
    two.update(PARAMS["moe"], 30)
    two.generate(PROMPTS, SAMPLED)
    two.update(LATER, 31)
    for pid in processes(two):
        os.kill(pid, signal.SIGKILL)
    alone = engine()
    alone.update(LATER, 31)
    samples = two.generate(PROMPTS, SAMPLED)
    assert {v for s in samples for v in s.versions} == {31}
    assert_same(samples, alone.generate(PROMPTS, SAMPLED))


def test_a_worker_that_hangs_is_replaced(two):
    two.update(PARAMS["moe"], 40)
    slowed(two, 1.0)
    stopped, went_on = processes(two)
    killer = threading.Timer(0.5, os.kill, (stopped, signal.SIGSTOP))
    killer.start()
    two.seconds = 8.0
    assert_same(two.generate(PROMPTS, SAMPLED), engine(version=40).generate(PROMPTS, SAMPLED))
    two.seconds = 1800.0
    assert stopped not in processes(two) and went_on in processes(two)


def test_a_worker_that_hangs_while_it_has_nothing_to_do_is_replaced(two, monkeypatch):
    monkeypatch.setattr(cluster, "PULSE", 3.0)
    two.update(PARAMS["moe"], 45)
    alone = engine(version=45).generate(PROMPTS, SAMPLED)
    stopped, went_on = processes(two)
    os.kill(stopped, signal.SIGSTOP)
    assert_same(two.generate(PROMPTS, SAMPLED), alone)
    time.sleep(3)
    assert_same(two.generate(PROMPTS, SAMPLED), alone)
    assert stopped not in processes(two) and went_on in processes(two)


def test_what_kills_every_worker_ends_the_call(two):

    make, version = two.crew._make, two.version

    def mortal():
        worker = make()
        deadly = SimpleNamespace(version=version, generate=lambda *given: os._exit(1))
        worker.__ray_call__.remote(lambda own: setattr(own, "engine", deadly))
        return worker

    begin_with(two, mortal)
    with pytest.raises(RuntimeError, match=f"{cluster.TRIES} rollout workers were lost over prompts"):
        two.generate(PROMPTS, SAMPLED)
    begin_with(two, make)
    assert len(two.generate(PROMPTS, SAMPLED)) == len(PROMPTS)


def test_what_an_engine_raises_is_raised_here(two):
    with pytest.raises(ValueError, match="prompt 0 is empty"):
        two.generate([[]], SAMPLED)
    assert len(two.generate(PROMPTS, SAMPLED)) == len(PROMPTS)


def test_it_pauses_and_goes_on(two):
    two.update(PARAMS["moe"], 50)
    whole = two.generate(PROMPTS, SAMPLED)
    slowed(two, 1.0)
    other = threading.Timer(0.3, two.pause)
    other.start()
    parts = two.generate(PROMPTS, SAMPLED)
    other.join()
    assert all(s.finish_reason == "abort" for s in parts)
    two.resume()
    assert_same(two.generate(PROMPTS, SAMPLED, parts), whole)


def test_weights_of_any_dtype_arrive_as_they_are():
    for x in (torch.randn(3, 2).bfloat16(), torch.randn(()), torch.arange(5), torch.randn(4, 3).T):
        there = actors._tensor(*actors._packed(x))
        assert there.dtype == x.dtype and there.shape == x.shape and torch.equal(there, x)
