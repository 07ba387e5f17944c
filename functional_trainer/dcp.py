"""What `checkpoint` asks of torch.distributed.checkpoint (DCP): write, read and list tensors, copy them to the host.

A tensor is whole on one process, a DTensor on a mesh; without a process group DCP works for one process alone. What
failed on some rank is raised on every rank as it was there.
"""

import math
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions


class _Writer(dcp.FileSystemWriter):
    def write_data(self, plan, planner):
        """Write this rank's files; torch.save hides an OSError behind a RuntimeError, this digs it out."""
        try:
            return super().write_data(plan, planner)
        except BaseException as error:
            raise _os_error(error) or error from error


def write(folder: Path, tensors: Mapping[str, Tensor], group: Any) -> None:
    """Write tensors by path into a folder; every rank of the process group calls this with the same paths."""
    with _causes():
        dcp.save(dict(tensors), storage_writer=_Writer(folder), process_group=group, no_dist=_alone())


def read(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Read tensors by path from a folder, in place."""
    with _causes():
        dcp.load(tensors, storage_reader=dcp.FileSystemReader(folder), no_dist=_alone())


def index(folder: Path) -> dict[str, str]:
    """Describe the tensors of a folder: type and shape by path; ValueError if one is not there whole."""
    found: dict[str, Any] = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata
    for path, entry in found.items():
        if sum(math.prod(chunk.sizes) for chunk in entry.chunks) != math.prod(entry.size):
            raise ValueError(f"it lists a part of {path}")
    return {path: f"{entry.properties.dtype} {list(entry.size)}" for path, entry in found.items()}


def stager() -> DefaultStager:
    """Return what copies tensors into host memory, the same memory every time."""
    fast = torch.accelerator.is_available()
    how = StagingOptions(fast, use_shared_memory=False, use_async_staging=False, use_non_blocking_copy=fast)
    return DefaultStager(how)


def _alone() -> bool:
    """Say whether there is no process group, and let DCP be silent about it; for good, since filters that a thread sets
    for a while reach the others."""
    warnings.filterwarnings("ignore", "torch.distributed is disabled")
    return not dist.is_initialized()


@contextmanager
def _causes() -> Iterator[None]:
    """Raise what failed on some rank, an OSError if there is one, in the place of DCP's error."""
    try:
        yield
    except dcp.CheckpointException as error:
        found = [cause for cause, _ in error.failures.values()]
        raise next((cause for cause in found if isinstance(cause, OSError)), found[0]) from None


def _os_error(error: BaseException | None) -> OSError | None:
    """Find the OSError that `error` is or was raised from."""
    while error is not None and not isinstance(error, OSError):
        error = error.__cause__ or error.__context__
    return error
