"""Rollouts by other processes, on this machine or a cluster: built-in engines as actors of Ray.

Every call carries which weights it is to be answered with: a reference to Ray's object store, where each version is
put once. A worker that has others fetches them first, so one that is started anew cannot answer with none or old ones.
Prompts are split into parts. A part whose worker dies or hangs is given to another one, under the same numbers, and
only one answer of it is ever taken: samples are the same whoever draws them.

Ray is optional, and imported where it is used. RAY_ADDRESS names a cluster; without it one begins and ends with the
run.
"""

import os
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch

from functional_trainer import backend, tree
from functional_trainer.engines import Sample, Sampling
from functional_trainer.engines.local import LocalEngine

PARTS = 2
"""Parts for each worker of the prompts of a call: what a worker that dies loses is one."""
TRIES = 3
"""Workers that a part may cost before the run ends."""


class Part(NamedTuple):
    """Prompts that a worker is given, by their places in the call, and how many workers were lost over them."""

    first: int
    last: int
    tries: int = 0


class Call(NamedTuple):
    """A part that a worker is at, until when it has time."""

    part: Part
    worker: int
    until: float


class Worker:
    """What runs as an actor: a `LocalEngine`, and the weights that it has."""

    def __init__(self, model: Any, device: str, how: dict[str, Any]):
        self.model, self.how, self.device = model, how, backend.setup(device)
        self.engine: LocalEngine | None = None
        self.paused = False

    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, begun: Sequence[Sample | None], version: int,
        weights: list[Any],
    ) -> list[Sample]:  # fmt: skip
        """Continue prompts with weights of this version; `weights` is a list of a reference to them."""
        if self.engine is None or self.engine.version != version:
            import ray

            params = tree.map(lambda x: _tensor(*x).to(self.device), ray.get(weights[0]), is_leaf=_packed_leaf)
            if self.engine is None:
                self.engine = LocalEngine(self.model, params, version=version, **self.how)
                self.pause(self.paused)
            self.engine.update(params, version)
        return self.engine.generate(prompts, sampling, begun)

    def pause(self, paused: bool) -> None:
        """Interrupt or go on; it comes in while `generate` runs."""
        self.paused = paused
        if self.engine is not None:
            self.engine.pause() if paused else self.engine.resume()

    def process(self) -> int:
        return os.getpid()


class RayEngine:
    """An `Engine` that is `workers` others; `how` are settings of `LocalEngine`, `device` is a type of device.

    A call of a worker that takes longer than `seconds` counts as hung: the worker is killed. RuntimeError if parts of a
    call are lost again and again; what a worker raises is raised.
    """

    def __init__(
        self, model: Any, *, workers: int, device: str = "auto", seconds: float = 1800.0, **how: Any
    ):  # fmt: skip
        self.seconds, self.paused = seconds, False
        self.params: tree.Tree = None
        self.version = -1
        self.put: tuple[int, Any] = (-1, None)
        self.workers: list[Any] = []
        self.started: list[Any] = []
        if not workers:  # another rank has them
            return
        import ray

        if not ray.is_initialized():
            os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
            local = {} if os.environ.get("RAY_ADDRESS") else {"num_cpus": workers, "include_dashboard": False}
            ray.init(logging_level="warning", log_to_driver=False, **local)  # type: ignore[arg-type]
        own = backend.has_own_memory(backend.setup(device))
        needs: dict[str, Any] = {"num_cpus": 1, "num_gpus": int(own), "max_concurrency": 2}
        made = ray.remote(**needs)(Worker)
        self._make = lambda: made.remote(model, device, how)
        self.workers, self.started = [None] * workers, [None] * workers
        for i in range(workers):
            self._start(i)

    def _start(self, i: int) -> None:
        """Start a worker in place i; `started` is what it says when it is there."""
        self.workers[i] = self._make()
        self.started[i] = self.workers[i].process.remote()

    def update(self, params: tree.Tree, version: int) -> None:
        """Sample with these parameters from the next call on."""
        self.params, self.version = params, version

    def pause(self) -> None:
        """Return from `generate` soon, and at once when it is called, until `resume`."""
        self.paused = True
        for worker in self.workers:
            worker.pause.remote(True)

    def resume(self) -> None:
        """Let `generate` work again."""
        self.paused = False
        for worker in self.workers:
            worker.pause.remote(False)

    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, begun: Sequence[Sample | None] = ()
    ) -> list[Sample]:
        """Continue every prompt; samples come in the prompts' order, and are a `LocalEngine`'s."""
        begun = [*begun] or [None] * len(prompts)
        samples = [one or Sample([], [], "abort", []) for one in begun]
        if not prompts:
            return samples
        import ray

        weights = [self._weights()]
        size = -(-len(prompts) // (PARTS * len(self.workers)))
        parts = deque(Part(i, min(i + size, len(prompts))) for i in range(0, len(prompts), size))
        calls: dict[Any, Call] = {}
        while calls or parts and not self.paused:
            busy, coming = {call.worker for call in calls.values()}, []
            for i in range(len(self.workers)):
                if i in busy or not parts or self.paused:
                    continue
                if not ray.wait([self.started[i]], timeout=0)[0]:  # a new one takes a while
                    coming.append(self.started[i])
                    continue
                part = parts.popleft()
                own, how = slice(part.first, part.last), replace(sampling, first=sampling.first + part.first)
                given = [*map(list, prompts[own])], how, begun[own], self.version, weights
                calls[self.workers[i].generate.remote(*given)] = Call(part, i, time.monotonic() + self.seconds)
            left = min([call.until for call in calls.values()] or [time.monotonic() + self.seconds]) - time.monotonic()
            done, _ = ray.wait([*calls, *coming], timeout=max(0.0, left))
            if not done and not calls:
                raise RuntimeError(f"no rollout worker has started in {self.seconds:g} s; has the cluster room for it?")
            late = [one for one, call in calls.items() if call.until <= time.monotonic()]
            for one in [one for one in done if one in calls] or late:
                call = calls.pop(one)
                try:
                    samples[call.part.first : call.part.last] = ray.get(one, timeout=0)
                except (ray.exceptions.RayActorError, ray.exceptions.GetTimeoutError) as error:
                    parts.append(self._lost(call, error))
                except ray.exceptions.RayTaskError as error:
                    raise error.cause from error
        return samples

    def _weights(self) -> Any:
        """Return where the object store has the weights."""
        import ray

        if self.put[0] != self.version:
            self.put = self.version, ray.put(tree.map(_packed, self.params))
        return self.put[1]

    def _lost(self, call: Call, error: Exception) -> Part:
        """Start a worker in the place of one that was lost; return its part, to be given to any."""
        import ray

        ray.kill(self.workers[call.worker])
        part = call.part._replace(tries=call.part.tries + 1)
        if part.tries == TRIES:
            raise RuntimeError(f"{TRIES} rollout workers were lost over prompts {part[:2]}, the last one so: {error}")
        self._start(call.worker)
        return part


class Packed(NamedTuple):
    """A tensor as bytes, which the object store shares with workers without a copy."""

    data: np.ndarray
    dtype: torch.dtype
    shape: tuple[int, ...]


def _packed_leaf(x: Any) -> bool:
    return isinstance(x, Packed)


def _packed(x: torch.Tensor) -> Packed:
    host = x.detach().cpu().contiguous().reshape(-1)
    return Packed(host.view(torch.uint8).numpy(), x.dtype, tuple(x.shape))


def _tensor(data: np.ndarray, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    return torch.tensor(data).view(dtype).reshape(shape)
