"""Peak bytes on the host: counted by looking at what every op returns, or from the profiler's record of its allocator.

The first sees what lives and why; the second sees compiled code too, and is what the tests hold the first against.
"""

import gc
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from functional_trainer import backend, tree


class LiveBytes(TorchDispatchMode):
    """Count the bytes of the storages of `held` and of all that ops return, each once and for as long as it lives.

    What `--offload` copies into host memory is not counted, on a CPU either, where that is the same memory; `elsewhere`
    is what is there from the beginning.
    `now` are alive, `peak` were the most at a time. What this project's ops hold inside is counted too; what a kernel
    of ATen takes and gives back within one call is not. Compiled code runs past it.
    """

    def __init__(self, held: Any = (), elsewhere: Any = ()):
        super().__init__()
        self.sizes: dict[int, int] = {}
        self.ranges: list[str] = []
        self.now = self.peak = 0
        self.see(elsewhere)
        self.now = self.peak = 0
        self.sizes = dict.fromkeys(self.sizes, 0)
        self.see(held)

    def see(self, tensors: Any) -> None:
        """Count the storages of a tree that are new."""
        for x in tree.leaves(tensors):
            if isinstance(x, torch.Tensor) and (key := (storage := x.untyped_storage())._cdata) not in self.sizes:
                self.sizes[key] = storage.nbytes()
                self.now += storage.nbytes()
                weakref.finalize(storage, self.freed, key)  # a storage's Python object lives as long as it does
        self.peak = max(self.peak, self.now)

    def freed(self, key: int) -> None:
        self.now -= self.sizes.pop(key)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "functional_trainer":  # our own ops: go on counting inside
            with self:
                made = func.redispatch(torch._C.DispatchKeySet(torch._C.DispatchKey.CPU), *args, **(kwargs or {}))
        else:
            made = func(*args, **(kwargs or {}))
        if func.namespace == "profiler":  # a range begins, or the innermost one ends
            self.ranges.append(args[0]) if isinstance(args[0], str) else self.ranges.pop()
        elif self.ranges[-1:] != [backend.TO_HOST]:
            self.see(made)
        return made


def allocated(step: Callable[[], Any]) -> int:
    """Return the most bytes that a step takes from the host's allocator at a time, on top of what there is before."""
    gc.collect()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    assert profile.profiler is not None
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most
