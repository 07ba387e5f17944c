"""The rollout engine that a recipe's options ask for, how ranks share its work, and whether the trainer agrees."""

from collections.abc import Callable, Sequence
from typing import Any

from experiments import episodes
from experiments.recipe import Run
from functional_trainer import backend, tree
from functional_trainer.agreement import differences
from functional_trainer.engines import Engine, Sample, Sampling
from functional_trainer.engines.local import LocalEngine
from functional_trainer.engines.remote import RemoteEngine
from functional_trainer.experience import Batch
from functional_trainer.rollouts import Prompt
from functional_trainer.types import OneDevice


class Whole(OneDevice):
    """Parameters that every rank has whole, of which rank 0's are sent."""

    def __init__(self, rank: int):
        super().__init__()
        self.rank = rank

    def collect(self, x):
        return super().collect(x) if self.rank == 0 else None


def choose(o: Any, run: Run, model: Any, params: tree.Tree, ahead: bool, group: Any) -> tuple[Engine, Callable]:
    """Return the engine, and what turns parameters at rest into those that it is updated with.

    Servers get those of each rank, part by part, unless rollouts are drawn `ahead`, whose exchanges between ranks are
    `group`'s; all others whole ones. ValueError if servers do not answer.
    """
    r, shard = o.rollout, run.shard
    if r.engine == "local":
        length = episodes.longest(o, [prompt.ids for prompt in run.loader])
        how: dict[str, Any] = {"slots": r.slots, "compile": r.compile, "record_routing": r.routing_replay == "engine"}
        if r.ray:
            from functional_trainer.engines.actors import RayEngine

            first = r.ray if shard.rank == 0 else 0
            return RayEngine(model, workers=first, device=run.device.type, length=length, **how), shard.full
        return LocalEngine(model, tree.map(shard.full, params), length=length, **how), shard.full
    if r.engine == "lmdeploy" and not backend.has_own_memory(run.device):
        raise ValueError("--rollout.engine lmdeploy opens the memory of a GPU of this machine: train on one")
    folder = f"{o.out}/rollout-weights" if r.sync == "disk" else None
    own = None if r.in_flight_weight_updates else group  # weights are then sent by the thread that trains
    how = {"folder": folder, "at_once": r.slots, "timeout": r.timeout, "wait": r.wait, "group": own}
    how |= {"patience": r.server_seconds, "record_routing": r.routing_replay == "engine"}
    engine = RemoteEngine(r.engine, r.url, model, shard=Whole(shard.rank) if ahead else shard, **how)
    return engine, shard.full if ahead else lambda held: held


def drawn_by(engine: Engine, o: Any, run: Run, group: Any) -> Callable:
    """Return the function from prompts and a seed to answers, of which every rank draws a share, and all have all.

    They are those of one rank alone. What `begun` holds is gone on with, by `budget` tokens at most (0: any number).
    `greedy` answers have the likeliest tokens.
    """
    r, rank, world = o.rollout, run.shard.rank, run.shard.world
    ask = episodes.ask(o, run.tokenizer)
    usual: dict[str, Any] = {"temperature": r.temperature, "top_k": r.top_k, "top_p": r.top_p, "min_p": r.min_p}

    def draw(
        prompts: list[Prompt], seed: int, begun: Sequence[Sample | None] = (), budget: int = 0, greedy: bool = False
    ) -> list[Sample]:  # fmt: skip
        share = len(prompts) if r.ray else -(-len(prompts) // world)
        own = slice(rank * share, (rank + 1) * share)
        how: dict[str, Any] = {"numbers": tuple(range(len(prompts))[own]), "seed": seed, "budget": budget}
        how |= {"stop": tuple(run.tokenizer.eos_ids)} | ({"temperature": 0.0} if greedy else usual)
        sampling = Sampling(r.max_completion_length, **how)
        found = backend.together(lambda: ask(engine, prompts[own], sampling, begun[own]), group)
        return [sample for samples in found for sample in samples]

    return draw


def agree(o: Any, run: Run, model: Any, params: tree.Tree, batch: Batch) -> None:
    """Compare what engine and trainer say about a rollout of these weights; ValueError if they differ too much."""
    placed = run.shard.put_batch({k: v.to(run.device) for k, v in batch.items()})
    mean, most = differences(model, params, placed, o.micro_batch, run.shard, o.rollout.temperature)
    run.say(f"log-probabilities as sampled and as trained differ by {mean:.2g} in the mean, {most:.2g} at most")
    if not mean <= (limit := o.rollout.max_disagreement):
        said = f"the rollout engine and the trainer disagree: their log-probabilities differ by {mean:.3g} in the mean"
        raise ValueError(f"{said}, --rollout.max-disagreement is {limit}. Weights, precision or ids are not the same")
