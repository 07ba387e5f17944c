"""Where everything lives, as text: `path  shape  rule  bytes per rank`; run this file to write golden/ anew."""

from pathlib import Path

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

import models
from functional_trainer import losses
from functional_trainer.param import is_param
from functional_trainer.tree import map_with_path
from functional_trainer.types import OneDevice
from sharding_rules import Sharder, qwen3, qwen3_moe
from sharding_rules.mesh import Mesh, make
from sharding_rules.sharder import names

FOLDER = Path(__file__).parent / "golden"
RULES = {"qwen3": qwen3.RULES, "qwen3_moe": qwen3_moe.RULES}
SMALL = {
    "hidden_size": 8, "num_hidden_layers": 2, "vocab_size": 12, "intermediate_size": 16, "head_dim": 4,
    "num_attention_heads": 6, "num_key_value_heads": 3, "moe_intermediate_size": 10, "num_experts": 4,
    "num_experts_per_tok": 2,
}  # fmt: skip
GOLDEN = {
    "tiny-fsdp2xep2": models.PRESETS["tiny"],
    "tiny-mixed-fsdp2xep2": models.PRESETS["tiny"] | {"attention_bias": True, "mlp_only_layers": [1]},
    "dense-fsdp2xep2": models.PRESETS["dense-0.6b"] | {"num_hidden_layers": 1},
}


class Listener(OneDevice):
    """The identity sharder, writing down every name that it is asked about."""

    def __init__(self):
        self.names: set[str] = set()

    def local(self, fn, ins, outs):
        for operand in (*ins, *(out.removeprefix("sum:") for out in outs if out != "sum")):
            self.names |= {*names(operand)}
        return fn

    def group(self, name, dim):
        self.names.add(name)

    def part(self, name, dim):
        self.names.add(name)
        return 0, 1


def mesh(sizes: Mesh):
    """Return a mesh of four ranks of which only this one, rank 0, is there: layouts need no communication."""
    if not dist.is_initialized():
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=4)
    return make(sizes, torch.device("cpu"), 4)


def parameters(config: dict) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a model's parameters by rule path."""
    found = {}
    map_with_path(lambda path, p: found.update({f"params/{path}": p.shape}), models.from_config(config).specs,
                  is_leaf=is_param)  # fmt: skip
    return found


def boundaries(config: dict) -> list[str]:
    """Return the names, parameters aside, that a model of this config's family and its loss ask about."""
    heard, model = Listener(), models.from_config({k: SMALL.get(k, v) for k, v in config.items()})
    params, row = model.init(0), torch.ones(1, 3, dtype=torch.int64)
    batch = {"tokens": row, "targets": row, "segment_ids": row, "positions": row.cumsum(1) - 1, "weights": row * 1.0}
    losses.sft().terms(model.apply(params, batch, heard), model.unembed(params, heard), batch, heard)
    return sorted(name for name in heard.names if not name.startswith("params/"))


def text(config: dict) -> str:
    """Describe the layout of a model's float32 parameters and of its boundaries on fsdp2 x ep2."""
    rules = RULES[config["model_type"]]
    shard = Sharder(rules, mesh(Mesh(fsdp=2, ep=2)))
    lines = []
    for path, shape in parameters(config).items():
        axes = [axis for axes in shard.where(path, use=False, shape=shape) for axis in axes]
        lines.append(f"{path}  {shape}  {rules.spec(path)}  {4 * torch.Size(shape).numel() // 2 ** len(axes)}")
    lines += [f"{name}  {rules.spec(name)}" for name in boundaries(config)]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    for name, config in GOLDEN.items():
        (FOLDER / f"{name}.txt").write_text(text(config))
