"""Where everything lives, as text: `path  shape  rule  bytes per rank`; run this file to write golden/ anew."""

from pathlib import Path

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

import models
from experiments import rules
from sharding_rules.mesh import Mesh, make
from sharding_rules.sharder import Sharder

FOLDER = Path(__file__).parent / "golden"
GOLDEN = {
    "tiny-fsdp2xep2": models.PRESETS["tiny"],
    "tiny-mixed-fsdp2xep2": models.PRESETS["tiny"] | {"attention_bias": True, "mlp_only_layers": [1]},
    "dense-fsdp2xep2": models.PRESETS["dense-0.6b"] | {"num_hidden_layers": 1},
}


def mesh(sizes: Mesh):
    """Return a mesh of four ranks of which only this one, rank 0, is there: layouts need no communication."""
    if not dist.is_initialized():
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=4)
    return make(sizes, torch.device("cpu"), 4)


def parameters(config: dict) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a model's parameters by rule path."""
    return rules.shapes(models.from_config(config))


def boundaries(config: dict) -> list[str]:
    """Return the names, parameters aside, that a model of this config's family and its loss ask about."""
    return rules.hear(models.from_config(config)).boundaries()


def text(config: dict) -> str:
    """Describe the layout of a model's float32 parameters and of its boundaries on fsdp2 x ep2."""
    table = rules.RULES[config["model_type"]]
    shard = Sharder(table, mesh(Mesh(fsdp=2, ep=2)))
    lines = []
    for path, shape in parameters(config).items():
        axes = [axis for axes in shard.where(path, use=False, shape=shape) for axis in axes]
        lines.append(f"{path}  {shape}  {table.spec(path)}  {4 * torch.Size(shape).numel() // 2 ** len(axes)}")
    lines += [f"{name}  {table.spec(name)}" for name in boundaries(config)]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    for name, config in GOLDEN.items():
        (FOLDER / f"{name}.txt").write_text(text(config))
