"""Run a function on several gloo ranks of this machine.

Ranks are forked from a server that has imported torch and the rooms once, so a job starts in well under a second.
"""

import multiprocessing
import os
import tempfile
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing

from functional_trainer import backend

PRELOAD = ["torch", "torch.distributed.tensor", "models", "functional_trainer.step", "sharding_rules.sharder"]
PATIENCE = timedelta(seconds=120)


def run(world: int, job: Callable[..., Any], *args: Any) -> Any:
    """Call `job(*args)` on `world` ranks and return what rank 0 returns; what a rank raises is raised."""
    multiprocessing.set_forkserver_preload(PRELOAD)
    os.environ["TORCH_START_METHOD"] = "forkserver"
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.start_processes(
            _rank, (world, folder, job, args), nprocs=world, start_method="forkserver"
        )
        return torch.load(Path(folder) / "result", weights_only=False)


def _rank(rank: int, world: int, folder: str, job: Callable[..., Any], args: tuple) -> None:
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    backend.complete_on_one_thread()
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world, timeout=PATIENCE)
    result = job(*args)
    if rank == 0:
        torch.save(result, Path(folder) / "result")
    dist.barrier()
    dist.destroy_process_group()
