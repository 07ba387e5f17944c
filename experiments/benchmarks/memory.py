"""Measure what a training step holds at most, and how long it takes, by setting.

    python experiments/benchmarks/memory.py                               # float32, every setting
    python experiments/benchmarks/memory.py --dtype bfloat16 --json bf16.json

A Qwen3-MoE (sft_cpu.py's, deeper and with a larger vocabulary) takes optimizer steps on packed tokens. Every setting
differs from `plain` as its name says; the first losses must agree. The peak is that of the second step: tensor bytes
counted op by op on the host (live_bytes.py), the allocator's on a GPU. Settings take turns in being built and timed.

    plain            nothing recomputed, one pass, the state donated, AdamW's moments in float32
    remat X          layers recomputed in backward: all of each, or (selective) what is no product and no attention
    4 micro-batches  the rows in four passes, gradients summed
    full logits      PyTorch's cross entropy over all the logits, in place of the chunked head
    new leaves       the step leaves its state alone and returns new tensors, as a step without donation would
    moments X        AdamW's moments in X
    ema              an average of the weights beside them
    offload X        activations or moments in host memory, which does not count, on a CPU either, unless compiled
    remat budget:X   a share X of what the compiler would keep; with --compile layer only
    small            remat layer, 4 micro-batches and moments 8bit together

Parameters and moments are what the state holds between steps. The rest is what comes on top at the peak: activations,
gradients, weights cast to the compute dtype, and the update's own tensors.
"""

import dataclasses
import gc
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import Any, Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # run from the clone without installing

from rich.console import Console
from rich.table import Table

from experiments.benchmarks import sft_cpu
from functional_trainer import config
from functional_trainer.options import OptimOptions

MIB = 2**20


@dataclass(frozen=True)
class Setting:
    """What differs from `plain`: in `make_train_step`, in `OptimOptions`, and what is neither's option."""

    step: dict[str, Any] = field(default_factory=dict)
    optim: dict[str, Any] = field(default_factory=dict)
    full_logits: bool = False
    new_leaves: bool = False


SETTINGS = {
    "plain": Setting(),
    "remat selective": Setting(step={"remat": "selective"}),
    "remat layer": Setting(step={"remat": "layer"}),
    "4 micro-batches": Setting(step={"micro_batches": 4}),
    "full logits": Setting(full_logits=True),
    "new leaves": Setting(new_leaves=True),
    "remat layer, new leaves": Setting(step={"remat": "layer"}, new_leaves=True),
    "moments bfloat16": Setting(optim={"moments": "bfloat16"}),
    "moments 8bit": Setting(optim={"moments": "8bit"}),
    "ema": Setting(optim={"ema": 0.999}),
    "offload activations": Setting(step={"offload": ("activations",)}),
    "offload optimizer": Setting(step={"offload": ("optimizer",)}),
    "remat budget:0.5": Setting(step={"remat": "budget:0.5"}),
    "remat budget:0.2": Setting(step={"remat": "budget:0.2"}),
    "small": Setting(step={"remat": "layer", "micro_batches": 4}, optim={"moments": "8bit"}),
}


def settings(compile: str) -> list[str]:
    """Return the names of what can be measured: a budget is a compiler's work."""
    return [name for name in SETTINGS if compile != "off" or "budget" not in name]


@dataclass(frozen=True)
class Options:
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Compute dtype; the weights are float32."""
    compile: Literal["off", "layer"] = "off"
    """Compile layers; the host's peak is then its allocator's, for compiled code is not seen op by op."""
    only: tuple[str, ...] = ()
    """Settings by name, with wildcards ("remat*"); none means all."""
    rounds: int = 3
    """Times each setting is built and timed."""
    steps: int = 3
    """Timed steps a round, after two untimed ones."""
    layers: int = 8
    """Depth of the model."""
    vocab: int = 8192
    """Its vocabulary."""
    rows: int = 8
    """Packed rows a step, a multiple of 4."""
    seq_len: int = 256
    """Tokens of a row."""
    device: str = "auto"
    """Device to measure on."""
    json: Path | None = None
    """Also write the results here."""


def full_logits(output: Any, unembed: Any, batch: dict[str, Any], shard: Any) -> tuple[dict, dict]:
    """Return the terms of `losses.sft("none")` with all the logits held, as PyTorch's cross entropy wants them."""
    import torch.nn.functional as F

    import kernels

    logits_TV = kernels.promote(F.linear(output.hidden.flatten(0, 1), unembed.weight))
    nll_T = F.cross_entropy(logits_TV, batch["targets"].flatten(), reduction="none")
    return {"nll": (nll_T * batch["weights"].flatten()).sum()}, {}


def build(o: Options, setting: Setting, device: Any) -> tuple[Callable[[], float], Any, dict[str, Any]]:
    """Return a step that gives its loss, the state that it changes, and its batch."""
    import torch

    import models
    from functional_trainer import init_state, losses, make_train_step, optimizers

    model = models.from_config(sft_cpu.hf_config(o.layers) | {"vocab_size": o.vocab})
    model = dataclasses.replace(model, dtype=getattr(torch, o.dtype))
    batch = sft_cpu.packed_batch(o.rows, o.seq_len, o.vocab, seed=0, shortest=o.seq_len // 16)
    batch = {k: v.to(device) for k, v in batch.items()}
    loss = losses.sft("none")
    loss = dataclasses.replace(loss, terms=full_logits) if setting.full_logits else loss
    optimizer = optimizers.from_options(OptimOptions(**setting.optim), 100, model.specs)
    away = "optimizer" in setting.step.get("offload", ())
    state, made = init_state(model.init(0, device=device), optimizer, offload=away), []
    if setting.new_leaves:
        update = optimizer.update

        def keeping(*args):
            made.append(update(*args))  # until the step is over, beside the old leaves
            return made[-1]

        optimizer = optimizer._replace(update=keeping)
    step = make_train_step(model, loss, optimizer, compile=o.compile, **setting.step)

    def run() -> float:
        value = step(state, batch)[1]["loss"].item()
        made.clear()
        return value

    return run, state, batch


def peak(step: Callable[[], float], held: Any, device: Any, compiled: bool) -> int:
    """Return the most bytes held during a step, those of `held` among them."""
    import torch

    from experiments.benchmarks.live_bytes import LiveBytes, allocated
    from functional_trainer import backend, tree

    allocator = torch.get_device_module(device)
    if hasattr(allocator, "reset_peak_memory_stats"):
        allocator.reset_peak_memory_stats(device)
        step()
        return backend.peak_memory(device)
    if compiled:
        return allocated(step) + sum(x.nbytes for x in tree.leaves(held))
    with LiveBytes(held) as live:
        step()
    return live.peak


def measure(o: Options, device: Any, name: str) -> dict[str, Any]:
    """Return a setting's first loss, bytes and seconds a step."""
    from functional_trainer import tree

    step, state, batch = build(o, SETTINGS[name], device)
    size = lambda part: sum(x.nbytes for x in tree.leaves(part))  # noqa: E731
    away = "optimizer" in SETTINGS[name].step.get("offload", ())
    held = dataclasses.replace(state, moments={}) if away else state
    row: dict[str, Any] = {"losses": [step()], "params": size(held.params), "moments": size(held.moments)}
    row |= {"peak": peak(step, (held, batch), device, o.compile != "off"), "seconds": []}
    for _ in range(o.steps):
        begin = time.perf_counter()
        step()  # reads its loss, so the device is done
        row["seconds"].append(time.perf_counter() - begin)
    del step, state, held, batch
    gc.collect()
    return row


def collect(names: list[str], rounds: int, ask: Callable[[str], dict[str, Any]], tolerance: float) -> list[dict]:
    """Measure settings in turn, `ask(name)` once a round, and return a row for each."""
    rows: dict[str, dict[str, Any]] = {name: {"name": name, "seconds": []} for name in names}
    for _ in range(rounds):
        for name in names:
            if "error" not in rows[name]:
                new = ask(name)
                rows[name] |= new | {"seconds": rows[name]["seconds"] + new.get("seconds", [])}
    sft_cpu.judge(list(rows.values()), tolerance)
    return list(rows.values())


def show(rows: list[dict[str, Any]], title: str, console: Console) -> None:
    """Print the table, in MiB and seconds."""
    table = Table(title=title)
    for head in ("setting", "parameters", "moments", "rest", "peak MiB", "x first", "median s", "min..max s", ""):
        table.add_column(head, justify="left" if head in ("setting", "") else "right")
    first = next((row["peak"] for row in rows if "peak" in row), 1)
    for row in rows:
        cells = [""] * 7
        if "peak" in row:
            rest = row["peak"] - row["params"] - row["moments"]
            cells = [f"{size / MIB:.1f}" for size in (row["params"], row["moments"], rest, row["peak"])]
            cells += [f"{row['peak'] / first:.2f}", f"{statistics.median(row['seconds']):.3f}"]
            cells += [f"{min(row['seconds']):.3f}..{max(row['seconds']):.3f}"]
        table.add_row(row["name"], *cells, row.get("error", ""))
    console.print(table)


def main(o: Options) -> None:
    """Measure, print, write, and fail if a setting's loss is another."""
    from functional_trainer import backend

    if min(o.rounds, o.steps, o.layers, o.rows) < 1 or o.rows % 4 or o.seq_len < 2:
        raise ValueError("--rounds, --steps and --layers are at least 1, --seq-len at least 2, --rows a multiple of 4")
    able = settings(o.compile)
    names = [name for name in able if any(fnmatch(name, pattern) for pattern in o.only or ("*",))]
    if not names:
        raise ValueError(f"--only {' '.join(o.only)}: none with --compile {o.compile}; there are {', '.join(able)}")
    device, console = backend.setup(o.device), Console(width=150)
    rows = collect(names, o.rounds, partial(measure, o, device), 1e-4 if o.dtype == "float32" else 5e-3)
    show(
        rows,
        f"{o.layers} layers, {o.rows} x {o.seq_len} tokens, {o.dtype}, compile {o.compile}; {backend.describe(device)}",
        console,
    )
    if o.json:
        options = dataclasses.asdict(o) | {"json": str(o.json)}
        o.json.write_text(json.dumps({"options": options, "results": rows}, indent=1) + "\n", encoding="utf-8")
    sys.exit(any("error" in row for row in rows))


if __name__ == "__main__":
    config.run(main, Options, doc=__doc__)
