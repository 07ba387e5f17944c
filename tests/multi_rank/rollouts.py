"""What several ranks do with rollouts; each function is one rank's."""

import time
from types import SimpleNamespace
from typing import Any

import torch

from experiments import engines, scores
from functional_trainer import advantages, backend, tree
from functional_trainer.ahead import Ahead
from functional_trainer.engines import Sample
from functional_trainer.engines.local import LocalEngine
from functional_trainer.experience import Plan
from functional_trainer.rl_options import RewardOptions, RolloutOptions
from functional_trainer.rollouts import Prompt, Prompts, Scores
from functional_trainer.types import OneDevice
from tests.models import small

MODEL = small.model(small.DENSE, initializer_range=0.5)
QUESTIONS = Prompts(Prompt([i, 3], f"question {i}", {}) for i in range(7))


def run(rank: int, world: int) -> Any:
    """Return what rollouts need of a run."""
    return SimpleNamespace(
        shard=SimpleNamespace(rank=rank, world=world), tokenizer=SimpleNamespace(eos_ids={5, 12}, decode=str),
        loader=QUESTIONS,
    )  # fmt: skip


def rewarded(folder: str, name: str) -> list[Any]:
    """Reward answers on all ranks with a function that fails; return what each says, and after how many seconds."""
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    o = SimpleNamespace(reward=RewardOptions((f"{folder}/mine.py:{name}",)))
    score = scores.shared(scores.rewards(o, run(rank, world)))
    begun = time.monotonic()
    try:
        score([QUESTIONS[0]], [Sample([7], [-0.1], "length", [0])])
        said = "nothing"
    except (ValueError, RuntimeError) as error:
        said = f"{type(error).__name__}: {error}"
    return backend.everyone((said, time.monotonic() - begun))


def drawn(level: int, budget: int, batches: int, fails: int) -> tuple[list[Any], list[Any], str]:
    """Train on rollouts that all ranks draw; return answers, versions of each rank, and what rank 0 fails with.

    The engine of the last rank fails as it draws rollout `fails`.
    """
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    params, group = MODEL.init(0), backend.host_group()
    engine = LocalEngine(MODEL, params, slots=4, length=12, look_every=1)
    o = SimpleNamespace(rollout=RolloutOptions(max_completion_length=6, temperature=1.3))
    draw = engines.drawn_by(engine, o, run(rank, world), group)

    def generate(*args: Any) -> Any:
        if rank == world - 1 and rollouts.made == fails:
            engine.generate = None  # type: ignore[method-assign,assignment]
        time.sleep(0.02 * rank)
        return draw(*args)

    def reward(prompts: Any, answers: Any) -> Scores:
        found = Scores([float(len(a.tokens) + a.tokens[0]) for a in answers], {})
        return backend.together(lambda: found if rank == 0 else None, group)[0]

    rollouts = Ahead(
        QUESTIONS, generate, reward, lambda r, sizes: advantages.grpo(r), Plan(3, 2), seq_len=12, longest=6, rows=2,
        weights=lambda: tree.map(torch.clone, params), update=engine.update, level=level, staleness=level + 1,
        budget=budget, everyone=lambda value: backend.everyone(value, group), stop=engine.pause,
    )  # fmt: skip
    answers, said = [], ""
    try:
        for n in range(batches):
            next(rollouts)
            answers += [(a.tokens, a.versions) for a in rollouts.last.answers]  # type: ignore[union-attr]
            backend.barrier()  # exchanges of the step, at the same time as the thread's
            for p in tree.leaves(params):
                p.add_(0.2 * torch.randn(p.shape, generator=torch.Generator().manual_seed(n)))
    except (TypeError, RuntimeError) as error:
        said = f"{type(error).__name__}: {error}"
    rollouts.close()
    assert rollouts.thread is not None and not rollouts.thread.is_alive()
    return answers, backend.everyone([versions for _, versions in answers]), " | ".join(backend.everyone(said))


def in_flight(urls: list[str], batches: int) -> list[Any]:
    """Train on rollouts of vLLM servers that get new weights while they answer; return, by rank, how many versions
    back the weights of each token were."""
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    r = RolloutOptions(max_completion_length=6, engine="vllm", url=tuple(urls), max_async_level=2, slots=2,
                       in_flight_weight_updates=True)  # fmt: skip
    o, shard, group = SimpleNamespace(rollout=r, out="none"), OneDevice(), backend.host_group(60)
    shard.rank, shard.world = rank, world
    ours, params = run(rank, world), MODEL.init(0)
    ours.shard = shard
    engine, _ = engines.choose(o, ours, MODEL, params, True, group)
    draw = engines.drawn_by(engine, o, ours, group)

    def reward(prompts: Any, answers: Any) -> Scores:
        found = Scores([float(len(a.tokens)) for a in answers], {})
        return backend.together(lambda: found if rank == 0 else None, group)[0]

    def generate(*args: Any) -> Any:
        time.sleep(0.01 * rank)
        return draw(*args)

    rollouts = Ahead(
        QUESTIONS, generate, reward, lambda r, sizes: advantages.grpo(r), Plan(3, 2), seq_len=12, longest=6, rows=2,
        weights=lambda: tree.map(torch.clone, params), update=engine.update, level=2, staleness=3, in_flight=True,
        everyone=lambda value: backend.everyone(value, group),
    )  # fmt: skip
    versions = []
    for n in range(batches):
        next(rollouts)
        versions += [n - v for a in rollouts.last.answers for v in a.versions]  # type: ignore[union-attr]
        time.sleep(0.01 * (world - rank))
        backend.barrier()
    rollouts.close()
    return backend.everyone(versions)
