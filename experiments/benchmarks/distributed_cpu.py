"""Time a training step on two gloo ranks: this engine on fsdp2, and PyTorch's FSDP2 (`fully_shard`) on transformers.

    python experiments/benchmarks/distributed_cpu.py                 # MoE and dense, every contestant
    python experiments/benchmarks/distributed_cpu.py --json distributed.json

A step is forward, backward, clipping at 1 and AdamW, in float32 and one thread a rank, from the same weights; both
ranks have the same packed tokens. Contestants live in the same two processes and take turns, one step each a round.
Their first losses must agree.

    ours-off, ours-layer    this engine uncompiled and with --compile layer: a parameter is gathered once and kept until
                            its gradient
    ours-selective          uncompiled with --remat selective: gathered again in backward
    fsdp2                   `fully_shard` on each layer and on the root, with its defaults: gathered again in backward
    fsdp2-kept              with `reshard_after_forward=False`: gathered once
"""

import dataclasses
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # run from the clone without installing

import torch
import torch.distributed as dist
import torch.multiprocessing
from rich.console import Console
from rich.table import Table
from torch.distributed.fsdp import fully_shard

import models
from experiments.benchmarks import sft_cpu
from experiments.rules import RULES
from functional_trainer import backend, config, init_state, losses, make_train_step, optimizers, tree
from sharding_rules.mesh import Mesh, make
from sharding_rules.sharder import Sharder

RANKS = 2
OURS: dict[str, dict[str, Any]] = {
    "ours-off": {"compile": "off"},
    "ours-layer": {"compile": "layer"},
    "ours-selective": {"compile": "off", "remat": "selective"},
}
PEERS = {"fsdp2": True, "fsdp2-kept": False}


@dataclass(frozen=True)
class Options:
    contestants: tuple[str, ...] = ("*",)
    """Names as above, with wildcards ("ours-*")."""
    rounds: int = 15
    """Timed steps of each."""
    rows: int = 4
    """Rows of a rank."""
    seq_len: int = 256
    """Tokens of a row."""
    layers: int = 4
    """Depth of the models."""
    json: Path | None = None
    """Also write the results here."""


def hf_config(o: Options, family: str) -> dict[str, Any]:
    """Return the Hugging Face dict of the benchmark's MoE, or of a dense model of the same width."""
    moe = sft_cpu.hf_config(o.layers)
    if family == "moe":
        return moe
    shared = models.PRESETS["dense-0.6b"].keys() & moe.keys()
    sizes = {k: moe[k] for k in shared - {"model_type", "architectures"}}
    return models.PRESETS["dense-0.6b"] | sizes | {"intermediate_size": 1024, "max_window_layers": o.layers}


def ours(model: Any, params: tree.Tree, batch: dict[str, Any], how: dict[str, Any]) -> Callable[[], float]:
    """Build this engine's step."""
    mesh = make(Mesh(fsdp=RANKS), torch.get_default_device(), RANKS)
    assert mesh
    shard = Sharder.of(RULES[model.config.hf["model_type"]], mesh, model.specs)
    adamw = optimizers.adamw(optimizers.schedule("constant", sft_cpu.LR, 1), sft_cpu.BETAS, sft_cpu.EPS, sft_cpu.DECAY)

    def place(path: str, p: torch.Tensor) -> torch.Tensor:
        return shard.init_leaf(path, tuple(p.shape), lambda part: p[part].clone())

    state = init_state(tree.map_with_path(place, params), adamw)
    step = make_train_step(model, losses.sft("none"), adamw, shard=shard, clip=sft_cpu.CLIP, **how)
    return lambda: step(state, shard.put_batch(batch))[1]["loss"].item()


def fsdp2(model: Any, params: tree.Tree, batch: dict[str, Any], reshard: bool) -> Callable[[], float]:
    """Build the step of transformers' model under FSDP2."""
    experts = {"experts_implementation": "grouped_mm"} if model.config.hf["model_type"] == "qwen3_moe" else {}
    module = sft_cpu.hf_module(
        model, torch.float32, torch.get_default_device(), params, attn_implementation="sdpa", **experts
    )
    for layer in module.model.layers:
        fully_shard(layer, reshard_after_forward=reshard)
    fully_shard(module, reshard_after_forward=reshard)
    step = sft_cpu.hf_train(module, module, sft_cpu.hf_inputs(batch))
    return lambda: step().item()


def race(o: Options, family: str) -> dict[str, dict[str, float]]:
    """Run all contestants in turns on this rank; return first loss, median and extremes of seconds by name."""
    model = models.from_config(hf_config(o, family))
    params, batch = model.init(0), sft_cpu.packed_batch(o.rows, o.seq_len, model.config.vocab, 0)
    wanted = [name for name in (*OURS, *PEERS) if any(fnmatch(name, pattern) for pattern in o.contestants)]
    steps = {
        name: ours(model, params, batch, OURS[name]) if name in OURS else fsdp2(model, params, batch, PEERS[name])
        for name in wanted
    }
    first = {name: step() for name, step in steps.items()}
    for step in (*steps.values(), *steps.values()):
        step()  # warm up
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(o.rounds):
        for name, step in steps.items():
            dist.barrier()
            start = time.perf_counter()
            step()
            dist.barrier()
            times[name].append(time.perf_counter() - start)
    return {
        name: {"first_loss": first[name], "median_s": statistics.median(seen), "min_s": min(seen), "max_s": max(seen)}
        for name, seen in times.items()
    }


def rank(number: int, o: Options, folder: str) -> None:
    """Race both families as one of the ranks; the first writes what it found."""
    torch.set_num_threads(1)
    backend.complete_on_one_thread()
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=number, world_size=RANKS)
    found = {family: race(o, family) for family in ("moe", "dense")}
    if number == 0:
        (Path(folder) / "found.json").write_text(json.dumps(found), "utf-8")
    dist.destroy_process_group()


def main(o: Options) -> None:
    """Race, print, write."""
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(rank, (o, folder), nprocs=RANKS)
        found = json.loads((Path(folder) / "found.json").read_text("utf-8"))
    table = Table(title=f"{o.layers} layers, {RANKS} ranks of {o.rows} x {o.seq_len} tokens; seconds of a step")
    for head in ("model", "contestant", "median", "min..max", "first loss"):
        table.add_column(head)
    for family, seen in found.items():
        for name, x in seen.items():
            cells = f"{x['median_s']:.3f}", f"{x['min_s']:.3f}..{x['max_s']:.3f}", f"{x['first_loss']:.5f}"
            table.add_row(family, name, *cells)
    Console(width=120).print(table)
    if o.json:
        o.json.write_text(json.dumps({"options": dataclasses.asdict(o), "results": found}, default=str), "utf-8")
    for family, seen in found.items():
        lost = [x["first_loss"] for x in seen.values()]
        if max(lost) - min(lost) > 1e-4:
            raise SystemExit(f"{family}: first losses differ: {lost}")


if __name__ == "__main__":
    config.run(main, Options, doc=__doc__)
