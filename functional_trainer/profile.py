"""Where a step's time goes: a trace of some steps, and the operations that cost most."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from functional_trainer import backend
from functional_trainer.metrics import Metrics

WAIT = 3  # steps before: the first compiles, the others settle


@contextmanager
def profiled(metrics: Metrics, steps: int, device: torch.device) -> Iterator[Callable]:
    """Yield what to call after each step; after `steps` of them, the first three left out, say what they cost.

    Writes `trace.json` (for chrome://tracing or Perfetto; memory counters are in it) and, on a GPU, `memory.pickle`
    (for https://pytorch.org/memory_viz) into the run folder. `steps=0` does nothing, nor do other ranks.
    """
    folder, say = metrics.folder, metrics.print
    if not steps or not metrics.main:
        yield lambda: None
        return

    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # at 5, the default, it prints when it starts and stops
    done = 0
    written: list[str] = []

    def tick() -> None:
        nonlocal done
        done += 1
        if done == WAIT:
            backend.record_memory(device)
        profiler.step()

    def ready(profiler: torch.profiler.profile) -> None:
        if done <= WAIT:  # the run ended before anything was recorded
            return
        profiler.export_chrome_trace(str(folder / "trace.json"))
        snapshot = backend.dump_memory(device, folder / "memory.pickle")
        written.extend(["trace.json", "memory.pickle"][: 1 + snapshot])
        for line in costs(profiler, done - WAIT):
            say(line)
        say(f"profiled {done - WAIT} steps: {' and '.join(written)} in {folder}")

    when = torch.profiler.schedule(wait=WAIT - 1, warmup=1, active=steps, repeat=1)
    with torch.profiler.profile(schedule=when, on_trace_ready=ready, profile_memory=True) as profiler:
        yield tick
    if not written:
        say(f"nothing is profiled: this took {done} steps, and the first {WAIT} are left out")


def costs(profiler: torch.profiler.profile, steps: int, count: int = 10) -> list[str]:
    """Describe the `count` operations with the most time of their own (on the device, if any ran there)."""
    events = profiler.key_averages()
    on_device = any(event.self_device_time_total for event in events)
    key = "self_device_time_total" if on_device else "self_cpu_time_total"
    spent = {event.key: (getattr(event, key), event.count) for event in events}
    spent = {name: cost for name, cost in spent.items() if not name.startswith("ProfilerStep")}
    total = sum(time for time, _ in spent.values()) or 1.0
    most = sorted(spent.items(), key=lambda item: item[1], reverse=True)[:count]
    head = f"the {len(most)} operations with the most time of their own, of {total / 1e3 / steps:.1f} ms a step:"
    return [head] + [
        f"  {time / total:6.1%}  {time / 1e3 / steps:9.2f} ms a step  {calls / steps:7.0f} calls  {name[:80]}"
        for name, (time, calls) in most
    ]
