"""Time Muon's Newton-Schulz steps leaf by leaf, and on all leaves of a shape together.

OMP_NUM_THREADS=1 python experiments/benchmarks/newton_schulz.py
"""

import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # run from the clone without installing

import torch

import models
from experiments.benchmarks import sft_cpu
from functional_trainer import backend, config, tree
from functional_trainer.optimizers import _matrices, orthogonalize


@dataclass(frozen=True)
class Options:
    layers: int = 8
    """Depth of the model of sft_cpu.py."""
    rounds: int = 5
    """Timed runs of each, after one that is not."""
    device: str = "auto"
    """Device to time on."""


def stacks(layers: int, device: torch.device) -> dict[tuple[int, ...], list[torch.Tensor]]:
    """Draw the leaves that are matrices, as stacks (batch, O, I), by O and I."""
    found: dict[tuple[int, ...], list[torch.Tensor]] = {}
    for p in tree.flatten(models.from_config(sft_cpu.hf_config(layers)).specs).values():
        if p.is_matrix:
            x = _matrices(torch.randn(p.shape, device=device), (0.0, len(p.batch), len(p.out_in[0])))
            found.setdefault(tuple(x.shape[1:]), []).append(x)
    return found


def by_leaf(leaves: list[torch.Tensor], dtype: torch.dtype) -> list[torch.Tensor]:
    return [orthogonalize(x, dtype=dtype) for x in leaves]


def by_shape(leaves: list[torch.Tensor], dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    return orthogonalize(torch.cat(leaves), dtype=dtype).split(len(leaves[0]))


def main(o: Options) -> None:
    device = backend.setup(o.device)
    for dtype in (torch.bfloat16, torch.float32):
        for shape, leaves in stacks(o.layers, device).items():
            ways: dict[str, Callable] = {
                "by leaf": partial(by_leaf, leaves, dtype),
                "by shape": partial(by_shape, leaves, dtype),
            }
            times: dict[str, list[float]] = {name: [] for name in ways}
            for _ in range(o.rounds + 1):
                for name, run in ways.items():
                    begin = time.perf_counter()
                    run()
                    backend.synchronize(device)
                    times[name].append((time.perf_counter() - begin) * 1e3)
            medians = ", ".join(f"{name} {statistics.median(of[1:]):.1f} ms" for name, of in times.items())
            print(f"{dtype} {len(leaves)} leaves of {len(leaves[0])} matrices {shape}: {medians}")


if __name__ == "__main__":
    config.run(main, Options, doc=__doc__ or "")
