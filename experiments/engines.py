"""From a recipe's options to what answers its prompts."""

from collections.abc import Callable
from typing import Any

from experiments.recipe import Run
from functional_trainer import backend, tree
from functional_trainer.engine import LocalEngine
from functional_trainer.remote import RemoteEngine


def choose(
    o: Any, run: Run, model: Any, params: tree.Tree, length: int
) -> tuple[Any, Callable[[tree.Tree], tree.Tree]]:
    """Return the engine, and what turns parameters at rest into those that it is updated with.

    The local one gets whole parameters; a remote one those of each rank, and sends them part by part. `length` is the
    longest prompt with its answer. ValueError if servers do not answer.
    """
    r, shard = o.rollout, run.shard
    if r.engine == "local":
        whole = lambda held: tree.map(shard.full, held)  # noqa: E731
        how: dict[str, Any] = {"slots": r.slots, "compile": r.compile, "record_routing": r.routing_replay}
        return LocalEngine(model, whole(params), length=length, **how), whole
    if r.engine == "lmdeploy" and not backend.has_own_memory(run.device):
        raise ValueError("--rollout.engine lmdeploy opens the memory of a GPU of this machine: train on one")
    folder = f"{o.out}/rollout-weights" if r.sync == "disk" else None
    how = {"shard": shard, "folder": folder, "at_once": r.slots, "timeout": r.timeout, "wait": r.wait}
    return RemoteEngine(r.engine, r.url, model, **how), lambda held: held
