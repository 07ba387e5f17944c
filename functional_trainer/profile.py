"""Where a step's time goes: a trace of some steps, and the operations that cost most."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from functional_trainer import backend

WAIT = 3  # steps before: the first compiles, the others settle


@contextmanager
def profiled(folder: str | Path, steps: int, device: torch.device, say: Callable[[str], None]) -> Iterator[Callable]:
    """Yield what to call after each step; after `steps` of them, the first three left out, say what they cost.

    Writes `<folder>/trace.json` (for chrome://tracing or Perfetto; memory counters are in it) and, on a GPU,
    `memory.pickle` (for https://pytorch.org/memory_viz). `steps=0` does nothing.
    """
    if not steps:
        yield lambda: None
        return

    def ready(profiler: torch.profiler.profile) -> None:
        profiler.export_chrome_trace(str(Path(folder) / "trace.json"))
        for line in costs(profiler, steps):
            say(line)
        kept = [name for name in ("trace.json", "memory.pickle") if (Path(folder) / name).exists()]
        say(f"profiled {steps} steps: {' and '.join(kept)} in {folder}")

    when = torch.profiler.schedule(wait=WAIT - 1, warmup=1, active=steps, repeat=1)
    with (
        backend.memory_history(device, Path(folder) / "memory.pickle"),
        torch.profiler.profile(schedule=when, on_trace_ready=ready, profile_memory=True) as profiler,
    ):
        yield profiler.step


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
