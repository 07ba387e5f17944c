"""Say where a step of sft_cpu.py goes, op by op: ours beside the products that it cannot avoid.

    python experiments/benchmarks/step_ops.py
    python experiments/benchmarks/step_ops.py --dtype bfloat16

A trace of some steps, compiled by layer, each event's own time counted where it belongs:

    experts, head, attention    our ops for them, their matrix products apart from what else they do
    other products              of queries, keys and values, outputs, the router
    passes, update              what Inductor fused between the products, and AdamW
    router's choice             top-k and the sort by expert
    other calls                 of PyTorch, copies and sums among them
    between                     Python and the dispatch of calls: the step's wall time less all of these

The floor is sft_cpu.py's, each part timed by itself. Tracing costs time of its own, so the step is timed without, too.
"""

import os
import re
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # run from the clone without installing

import torch
import torch._inductor.config
from rich.console import Console
from rich.table import Table

from experiments.benchmarks import sft_cpu
from functional_trainer import backend, config

OURS = {"grouped_matmul": "experts", "linear_logprob": "head", "attention_documents": "attention"}
PRODUCTS = {"aten::mm", "aten::addmm", "aten::addmm_", "aten::bmm", "aten::baddbmm", "aten::matmul"}
CHOICE = {"aten::topk", "aten::sort", "aten::argsort", "aten::bincount", "aten::cumsum"}


@dataclass(frozen=True)
class Options:
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Compute dtype."""
    steps: int = 10
    """Steps that are timed, and as many that are traced."""
    layers: int = 4
    """Depth of the model."""
    rows: int = 8
    """Packed rows a step."""
    seq_len: int = 256
    """Tokens of a row."""


def place(event: Any) -> str:
    """Return what an event's own time is of."""
    name, parent = event.name, event
    while parent is not None:
        if found := re.match(r"functional_trainer::(\w+?)(_grad)?$", parent.name):
            part = OURS.get(found[1], "other calls")
            return f"{part}: products" if name in PRODUCTS else f"{part}: the rest"
        parent = parent.cpu_parent
    if "cpp_fused" in name:
        return "update" if re.search(r"sqrt|lerp|addcdiv|copy__", name) and "rsqrt" not in name else "passes"
    return "other products" if name in PRODUCTS else "router's choice" if name in CHOICE else "other calls"


def median(run: Callable[[], Any], times: int) -> float:
    """Return the milliseconds of a call."""
    taken = []
    for _ in range(times):
        begin = time.perf_counter()
        run()
        taken.append((time.perf_counter() - begin) * 1e3)
    return statistics.median(taken)


def traced(step: Callable[[], Any], steps: int) -> Counter[str]:
    """Return the milliseconds of a step by what they are of, and `wall`."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # at 5, the default, it prints when it starts and stops
    found: Counter[str] = Counter()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as trace:
        begin = time.perf_counter()
        for _ in range(steps):
            step()
        found["wall"] = (time.perf_counter() - begin) * 1e3 / steps  # type: ignore[assignment]
    for event in trace.events():
        found[place(event)] += event.self_cpu_time_total / 1e3 / steps  # type: ignore[assignment]
    return found


def main(o: Options) -> None:
    device = backend.setup(torch.get_default_device().type)
    backend.keep_host_memory()
    given = sft_cpu.Options(dtype=o.dtype, layers=o.layers, rows=o.rows, seq_len=o.seq_len)
    floor = {
        name: median(lambda calls=calls: [call() for call in calls], o.steps + 3)  # type: ignore[misc]
        for name, calls in sft_cpu.unavoidable(given).items()
    }
    torch._inductor.config.cpp.enable_kernel_profile = True  # names what is fused in a trace
    step = sft_cpu.ours(given, "layer")
    for _ in range(5):
        step()
    plain, found = median(step, o.steps), traced(step, o.steps)
    wall = found.pop("wall")
    found["between"] = wall - found.total()
    parts = [f"{name}: {what}" for name in ("experts", "attention", "head") for what in ("products", "the rest")]
    parts += ["other products", "passes", "update", "router's choice", "other calls", "between"]
    table = Table(title=f"{o.dtype}, {backend.describe(device)}, torch {torch.__version__}")
    for head in ("part of a step", "floor ms", "ours ms"):
        table.add_column(head, justify="left" if head == "part of a step" else "right")
    for part in parts:
        least = floor.get(part.removesuffix(": products")) if not part.endswith("rest") else None
        table.add_row(part, "" if least is None else f"{least:.1f}", f"{found[part]:.1f}")
    table.add_section()
    table.add_row("together, traced", f"{sum(floor.values()):.1f}", f"{wall:.1f}")
    table.add_row("not traced", "", f"{plain:.1f}")
    Console(width=100).print(table)


if __name__ == "__main__":
    config.run(main, Options, doc=__doc__ or "")
