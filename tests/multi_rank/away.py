"""Runs on ranks that keep activations and moments in host memory."""

from dataclasses import replace

import torch
from torch.distributed.tensor import DTensor

from functional_trainer import checkpoint, tree
from tests.multi_rank import ahead, parity

LAYER = {"compile": "layer", "backend": "aot_eager"}
DEEP = {"num_hidden_layers": 3}
CASES = {
    "moe": parity.Case(parity.MOE | DEEP, uneven=True, mixed=True),
    "dense, recomputed, 2 micro-batches": parity.Case(
        parity.DENSE | DEEP, options={"remat": "layer", "micro_batches": 2}
    ),
    "dense, layer compiled": parity.Case(parity.DENSE | DEEP, options=LAYER),
    "dense, recomputed, layer compiled": parity.Case(parity.DENSE | DEEP, options=LAYER | {"remat": "layer"}),
    "moe, layer compiled": parity.Case(parity.MOE | DEEP, options=LAYER),
    "moe, recomputed, layer compiled": parity.Case(parity.MOE | DEEP, options=LAYER | {"remat": "layer"}),
}
RUNS = {
    2: [("fsdp2", name) for name in list(CASES)[:2]] + [(mesh, "moe") for mesh in ("dp2", "ep2", "cp2", "tp2")],
    4: [("fsdp2 x ep2", "moe"), ("fsdp2 x ep2", "dense, recomputed, 2 micro-batches")],
}
COMPILED = {
    2: [("fsdp2", "dense, layer compiled")]
    + [(mesh, name) for mesh in ("fsdp2", "ep2") for name in list(CASES)[4:]]
    + [(mesh, "moe, layer compiled") for mesh in ("cp2", "tp2")],
    4: [("fsdp2 x ep2", "moe, recomputed, layer compiled")],
}
"""What takes minutes."""


def away(case: parity.Case) -> parity.Case:
    return replace(case, options=case.options | {"offload": ("activations", "optimizer")})


def odd(mesh: str, name: str) -> list[str]:
    """Name what a run that sends all away has not in common, bit for bit, with the one that does not."""
    here, there = (parity.train(case, mesh) for case in (CASES[name], away(CASES[name])))
    assert here.keys() == there.keys() and any(key.startswith("params/") for key in here)
    return [key for key in here if not torch.equal(here[key], there[key])]


def all_odd(runs: list[tuple[str, str]]) -> dict[tuple[str, str], list[str]]:
    return {run: odd(*run) for run in runs}


def gathers(case: parity.Case) -> tuple[dict[str, torch.Tensor], int]:
    """Take three steps on fsdp2; return parameters, whole, and the number of gathers of the last."""
    shard = parity.sharder(case, "fsdp2")
    _, step, state = parity.start(case, shard)
    rows = shard.put_batch(parity.own_rows(case, shard))
    for _ in range(2):
        step(state, rows)
    count = ahead.events(step, state, rows).count("gather")
    return {path: shard.full(p) for path, p in tree.flatten(state.params).items()}, count


def resumed(folder: str, saves: parity.Case, loads: parity.Case, mesh: str = "fsdp2") -> dict[str, torch.Tensor]:
    """Take two steps, save, load into another state and take the third; return that state, whole."""
    shard = parity.sharder(saves, mesh)
    rows = shard.put_batch(parity.own_rows(saves, shard))
    _, step, state = parity.start(saves, shard)
    for _ in range(2):
        step(state, rows)
    path = checkpoint.save(folder, 2, tree.flatten(state), {})
    _, step, state = parity.start(loads, shard)
    checkpoint.load(path, tree.flatten(state))
    step(state, rows)
    return {path: shard.full(x) if isinstance(x, DTensor) else x for path, x in tree.flatten(state).items()}


def two_ranks(folder: str) -> dict:
    case, again = CASES["moe"], CASES["dense, recomputed, layer compiled"]
    saves = {"here": case, "away": away(case)}
    return {
        "odd": all_odd(RUNS[2]),
        "gathers": [gathers(c) for c in (again, away(again))],
        "resumed": {(a, b): resumed(f"{folder}/{a}-{b}", saves[a], saves[b]) for a in saves for b in saves},
    }
