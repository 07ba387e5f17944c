"""Rollouts by other processes, on this machine or a cluster: built-in engines as actors of Ray.

Every call carries which weights it is to be answered with: a reference to Ray's object store, where each version is
put once. A worker that has others fetches them first, so one that is started anew cannot answer with none or old ones.
Prompts are split into parts. A part whose worker dies or hangs is given to another one, under the same numbers, and
only one answer of it is ever taken: samples are the same whoever draws them.
"""

import os
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch

from functional_trainer import backend, tree
from functional_trainer.cluster import TRIES, Crew, Job, Lost
from functional_trainer.engines import Sample, Sampling
from functional_trainer.engines.local import LocalEngine

PARTS = 2
"""Parts for each worker of the prompts of a call: what a worker that dies loses is one."""


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
        self.crew: Crew | None = None
        if workers:  # else another rank has them
            gpus = int(backend.has_own_memory(backend.setup(device)))
            self.crew = Crew(Worker, (model, device, how), workers, "rollout workers", gpus=gpus, threads=2)

    def update(self, params: tree.Tree, version: int) -> None:
        """Sample with these parameters from the next call on."""
        self.params, self.version = params, version

    def pause(self) -> None:
        """Return from `generate` soon, and at once when it is called, until `resume`."""
        self._pause(True)

    def resume(self) -> None:
        """Let `generate` work again."""
        self._pause(False)

    def _pause(self, paused: bool) -> None:
        self.paused = paused
        for worker in self.crew.workers if self.crew else []:
            worker.pause.remote(paused)

    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, begun: Sequence[Sample | None] = ()
    ) -> list[Sample]:
        """Continue every prompt; samples come in the prompts' order, and are a `LocalEngine`'s."""
        begun = [*begun] or [None] * len(prompts)
        samples, numbers = [one or Sample([], [], "abort", []) for one in begun], sampling.numbered(len(prompts))
        if not prompts:
            return samples
        assert self.crew is not None
        weights = [self._weights()]
        size = -(-len(prompts) // (PARTS * len(self.crew.workers)))
        parts = [Job(slice(i, min(i + size, len(prompts)))) for i in range(0, len(prompts), size)]

        def ask(worker: Any, part: slice) -> Any:
            how = replace(sampling, numbers=tuple(numbers[part]))
            return worker.generate.remote([*map(list, prompts[part])], how, begun[part], self.version, weights)

        for part, found in self.crew.work(parts, ask, self.seconds, going=lambda: not self.paused):
            if isinstance(found, Lost):
                which = f"prompts {part.start} to {part.stop - 1}"
                raise RuntimeError(f"{TRIES} rollout workers were lost over {which}, the last one so: {found.error}")
            samples[part] = found
        return samples

    def _weights(self) -> Any:
        """Return where the object store has the weights."""
        import ray

        if self.put[0] != self.version:
            self.put = self.version, ray.put(tree.map(_packed, self.params))
        return self.put[1]


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
