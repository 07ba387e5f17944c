"""Runs in 8 bits on ranks: cases whose tiles are the same on a mesh, and what weights travel as."""

from typing import Any
from unittest import mock

import torch

import models
from functional_trainer import precision
from functional_trainer.options import Fp8Options
from functional_trainer.types import OneDevice
from sharding_rules.mesh import make
from sharding_rules.sharder import Sharder
from tests.multi_rank import parity

WIDE = {
    "hidden_size": 256, "intermediate_size": 128, "moe_intermediate_size": 72, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 32, "num_hidden_layers": 2, "num_experts": 4, "num_experts_per_tok": 4,
}  # fmt: skip
"""Sizes with which the borders of two ranks' parts are borders of tiles; every expert sees every token."""
CASES = {
    "dense": parity.Case(parity.DENSE | {k: v for k, v in WIDE.items() if "expert" not in k and "moe" not in k}),
    "moe": parity.Case(parity.MOE | WIDE),
    "moe, recomputed, layer compiled": parity.Case(
        parity.MOE | WIDE, options={"remat": "layer", "compile": "layer", "backend": "aot_eager"}
    ),
    "moe, routed": parity.Case(parity.MOE | WIDE | {"num_experts_per_tok": 2}),
    "moe, one expert": parity.Case(parity.MOE | WIDE | {"num_experts_per_tok": 1}),
}
LENGTH = 128
"""Tokens of a row, so that no tile of tokens crosses from one row to the next."""


def rows(case: parity.Case) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(1)
    ids = torch.randint(0, case.config["vocab_size"], (4, LENGTH + 1), generator=draw)
    place = torch.arange(LENGTH).expand(4, -1)
    columns = {"tokens": ids[:, :-1], "targets": ids[:, 1:], "positions": place, "segment_ids": torch.ones_like(place)}
    return columns | {"weights": torch.rand(4, LENGTH, generator=draw)}


def train(name: str, recipe: str, mesh: str | None = None, exclude: str = "") -> dict[str, Any]:
    """Run a case; return metrics, first gradients and last parameters, whole, and the bytes of each kind gathered."""
    case = CASES[name]
    model = models.from_config(case.config)
    options = Fp8Options(recipe, Fp8Options.exclude + exclude)  # type: ignore[arg-type]
    fp8 = precision.fp8(options, model)
    shard: Any = OneDevice(fp8)
    if mesh is not None:
        grid = make(parity.MESHES[mesh], parity.CPU, torch.distributed.get_world_size())
        shard = Sharder.of(parity.RULES[case.config["model_type"]], grid, model.specs, None, fp8)
    sent: dict[str, int] = {}
    fetch = Sharder._fetch

    def watching(self, *args):
        made = fetch(self, *args)
        for x in made.whole:
            sent[str(x.dtype)] = sent.get(str(x.dtype), 0) + x.nbytes
        return made

    part, ways = shard.data
    batch = {k: v.chunk(ways)[part].contiguous() for k, v in rows(case).items()}
    seen: dict[str, Any] = {}
    with mock.patch.object(parity, "sharder", lambda case, mesh: shard):
        _, step, state = parity.start(case, shard)
        for i in range(parity.STEPS):
            with mock.patch.object(Sharder, "_fetch", watching if i == 0 else fetch):
                state, metrics = step(state, shard.put_batch(batch))
            seen |= {f"{i}/{k}": v.clone() for k, v in metrics.items()}
            if i == 0:
                seen |= {f"grads/{path}": shard.full(m["grad"]).clone() for path, m in state.moments.items()}
    seen |= {path: shard.full(p).clone() for path, p in parity.tree.flatten(state.params).items()}
    return seen | {"sent": sent}


RUNS = (
    ("fsdp2", "dense", "tile"), ("fsdp2", "moe", "tile"), ("fsdp2", "moe, recomputed, layer compiled", "tile"),
    ("ep2", "moe, one expert", "tile"), ("fsdp2", "moe, routed", "tile"), ("ep2", "moe, routed", "tile"),
    ("fsdp2", "dense", "row"), ("ep2", "moe, one expert", "row"),
)  # fmt: skip


def two_ranks() -> dict[tuple[str, str, str], dict[str, Any]]:
    found = {(mesh, name, recipe): train(name, recipe, mesh) for mesh, name, recipe in RUNS}
    with mock.patch.object(Sharder, "_packed", lambda *args: []):
        return found | {("fsdp2", "moe", "tile, gathered whole"): train("moe", "tile", "fsdp2")}
