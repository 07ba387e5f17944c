"""Work ahead of its use, by Grain: batches filled and rows tokenized in a thread or in worker processes, in order.

Each worker goes through the whole stream and does the work of every n-th element, so the result does not depend on how
many there are. Imports no torch: a worker process needs none.
"""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

from absl import logging

_level = logging.get_verbosity()
logging.set_verbosity(logging.ERROR)  # Grain warns that JAX's profiler is absent
import grain  # noqa: E402
from grain.experimental import ThreadPrefetchIterDataset  # noqa: E402

logging.set_verbosity(_level)


Make = Callable[[int, int], Iterator[Any]]
"""(i, n) to the elements i, i + n, i + 2 n, ... of a stream; to be pickled where there are worker processes."""


class Ahead(grain.IterDataset):
    """A stream of which a worker makes its share."""

    def __init__(self, make: Make):
        super().__init__()
        self.make, self.part, self.parts = make, 0, 1

    def set_slice(self, sl: slice, sequential_slice: bool = False) -> None:
        """Take the place of one of several workers; Grain calls this."""
        self.part, self.parts = sl.start, sl.step

    def __iter__(self) -> "_Ahead":
        return _Ahead(self.make(self.part, self.parts))


class _Ahead(grain.DatasetIterator):
    def __init__(self, elements: Iterator[Any]):
        super().__init__()
        self.elements = elements

    def __next__(self) -> Any:
        return next(self.elements)

    def get_state(self) -> dict[str, Any]:
        return {}  # an element says itself where the stream stands behind it

    def set_state(self, state: dict[str, Any]) -> None:
        raise NotImplementedError("make a new stream that begins elsewhere")


def ahead(make: Make, workers: int, elements: int = 2) -> grain.DatasetIterator:
    """Iterate over a stream, made ahead by up to `elements` a worker process, or in a thread if there is none.

    An error of `make` is raised at its place. Call `close` when done.
    """
    if workers:
        options = grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=elements)
        return iter(Ahead(make).mp_prefetch(options, worker_init_fn=_end_with_the_parent))
    return iter(ThreadPrefetchIterDataset(Ahead(make), prefetch_buffer_size=elements))


def _end_with_the_parent(worker: int, workers: int) -> None:
    """Leave Ctrl-C and SIGTERM, which may reach every process of a job, to the parent; do not outlive it."""

    def watch() -> None:
        multiprocessing.parent_process().join()  # type: ignore[union-attr]
        os._exit(0)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=watch, daemon=True).start()
