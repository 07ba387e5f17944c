"""What a rank does in a step whose layers are compiled, in order."""

import time
import weakref
from typing import Any

import torch

from sharding_rules.gathering import Again
from sharding_rules.sharder import Sharder
from tests.multi_rank import parity

DEPTH = 4
NAMES = {
    "_c10d_functional::all_gather_into_tensor": "gather",
    "_c10d_functional::reduce_scatter_tensor": "scatter",
    "_c10d_functional::wait_tensor": "wait",
    "Torch-Compiled Region: 0/0": "forward",
    "CompiledFunctionBackward": "backward",
}
"""Events of a trace that matter."""
ONE_GRAPH = {
    "_c10d_functional::all_gather_into_tensor": "begin",
    "_c10d_functional::reduce_scatter_tensor": "scatter",
    "_c10d_functional::all_reduce": "begin",
    "_c10d_functional::all_reduce_": "begin",
    "_c10d_functional::wait_tensor": "wait",
    "aten::mm": "product",
}
"""The same where a step is one graph."""


def events(step: Any, *args: Any, names: dict[str, str] = NAMES) -> list[str]:
    """Return what a step does, by the clock of its trace."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as trace:
        step(*args)
    found = sorted(trace.events(), key=lambda e: e.time_range.start)
    return [names[e.name] for e in found if e.name in names]


def alive(refs: list[weakref.ref], most: int) -> int:
    """Return how many are alive: at once if at most `most` are, else after a second.

    The thread that completes an exchange lets go of its tensors a moment after those who wait for it go on.
    """
    until = time.monotonic() + 1
    while (count := sum(x() is not None for x in refs)) > most and time.monotonic() < until:
        time.sleep(0.01)
    return count


def gathered(step: Any, *args: Any) -> int:
    """Return how many layers' gathered weights a step has at most, at the moments when one begins to be gathered."""
    refs: list[weakref.ref] = []
    most, fetch = 0, Sharder._fetch

    def watching(self, params, prefix, dtype):
        nonlocal most
        made = fetch(self, params, prefix, dtype)
        if prefix != "params":  # a layer's, and not the embedding
            refs.extend(weakref.ref(x.untyped_storage()) for x in made.whole[:1])
            most = max(most, alive(refs, 2))
        return made

    Sharder._fetch = watching  # type: ignore[method-assign]
    try:
        step(*args)
    finally:
        Sharder._fetch = fetch  # type: ignore[method-assign]
    return most


def saved(step: Any, *args: Any) -> tuple[int, int]:
    """Return the scalars that forward of a layer leaves to its backward: of weights that are let go of, and others."""
    counts, hooks = {True: 0, False: 0}, Again.hooks

    def watching(self, layer, whole):
        made, places = hooks(self, layer, whole), {x.untyped_storage().data_ptr() for x in whole}

        def pack(x):
            counts[x.untyped_storage().data_ptr() in places] += x.numel() * (layer == 0)
            return made.pack_hook(x)

        return torch.autograd.graph.saved_tensors_hooks(pack, made.unpack_hook)

    Again.hooks = watching  # type: ignore[method-assign]
    try:
        step(*args)
    finally:
        Again.hooks = hooks  # type: ignore[method-assign]
    return counts[True], counts[False]


def traced(remat: str) -> dict[str, Any]:
    """Return the events of a step on fsdp2, and how many layers are gathered at most."""
    options = {"compile": "layer", "backend": "aot_eager", "remat": remat}
    case = parity.Case(parity.DENSE | {"num_hidden_layers": DEPTH}, options=options)
    shard = parity.sharder(case, "fsdp2")
    _, step, state = parity.start(case, shard)
    rows = shard.put_batch(parity.own_rows(case, shard))
    step(state, rows)
    return {"events": events(step, state, rows), "gathered": gathered(step, state, rows),
            "saved": saved(step, state, rows)}  # fmt: skip


def all_traced() -> dict[str, dict[str, Any]]:
    return {remat: traced(remat) for remat in ("none", "selective", "layer")}


def one_graph() -> list[str]:
    """Return the events of a step on fsdp2 that Inductor made one graph of."""
    case = parity.Case(parity.DENSE | {"num_hidden_layers": DEPTH}, options={"compile": "step"})
    shard = parity.sharder(case, "fsdp2")
    _, step, state = parity.start(case, shard)
    rows = shard.put_batch(parity.own_rows(case, shard))
    step(state, rows)
    return events(step, state, rows, names=ONE_GRAPH)
