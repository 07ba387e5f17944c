"""The rollout engine that a recipe's options ask for, and how ranks share its work."""

from collections.abc import Sequence
from typing import Any

from experiments.recipe import Run
from functional_trainer import backend, tree
from functional_trainer.engine import LocalEngine
from functional_trainer.experience import Prompt
from functional_trainer.rollout import Engine, Sample, Sampling


def made(o: Any, run: Run, model: Any, params: tree.Tree) -> Engine:
    """Return what answers the run's prompts: this process, or Ray's workers, which the first one has."""
    length = max((len(prompt.ids) for prompt in run.loader), default=0) + o.rollout.max_completion_length
    how: dict[str, Any] = {"slots": o.rollout.slots, "length": length, "compile": o.rollout.compile}
    if o.rollout.ray:
        from functional_trainer.ray_engine import RayEngine

        return RayEngine(model, workers=o.rollout.ray if run.shard.rank == 0 else 0, device=run.device.type, **how)
    return LocalEngine(model, tree.map(run.shard.full, params), **how)


def drawn_by(engine: Engine, o: Any, run: Run, group: Any) -> Any:
    """Return the function from prompts and a seed to answers, of which every rank draws a share, and all have all.

    They are those of one rank alone. What `begun` holds is gone on with, by `budget` tokens at most (0: any number).
    """
    r, rank, world = o.rollout, run.shard.rank, run.shard.world

    def draw(
        prompts: list[Prompt], seed: int, begun: Sequence[Sample | None] = (), budget: int = 0
    ) -> list[Sample]:  # fmt: skip
        share = len(prompts) if r.ray else -(-len(prompts) // world)
        own = slice(rank * share, (rank + 1) * share)
        how = r.max_completion_length, r.temperature, r.top_k, r.top_p
        sampling = Sampling(*how, stop=tuple(run.tokenizer.eos_ids), seed=seed, first=own.start, budget=budget)
        ids = [prompt.ids for prompt in prompts[own]]
        found = backend.together(lambda: engine.generate(ids, sampling, begun[own]), group)
        return [sample for samples in found for sample in samples]

    return draw
