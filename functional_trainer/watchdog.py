"""A run that hangs says where: stacks of all threads, and the last exchanges with other processes."""

import faulthandler
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from functional_trainer import backend


@contextmanager
def watched(seconds: float, folder: str | Path, rank: int) -> Iterator[Callable[[], None]]:
    """Yield a function to call whenever the run gets on; when that takes longer than `seconds`, say where it is.

    Stacks go to stderr, the flight recorder to `<folder>/flight-recorder-<rank>.json` if there are several processes.
    Nothing is ended: whoever waits in an exchange gives up by itself after the time-out of `backend.join`.
    """
    alive, over = threading.Event(), threading.Event()

    def watch() -> None:
        while not over.is_set():
            if not alive.wait(seconds):
                _dump(seconds, Path(folder) / f"flight-recorder-{rank}.json", rank)
                alive.wait()
            alive.clear()

    thread = threading.Thread(target=watch, name="watchdog", daemon=True)
    thread.start()
    try:
        yield alive.set
    finally:
        over.set()
        alive.set()
        thread.join()


def _dump(seconds: float, file: Path, rank: int) -> None:
    def say(text: str) -> None:
        print(f"rank {rank} {text}", file=sys.stderr, flush=True)

    say(f"has not got on for {seconds:g} s. Its threads are here:")
    faulthandler.dump_traceback(sys.stderr)
    if record := backend.flight_record():
        try:
            file.write_bytes(record)
            say(f"has written its last exchanges with other ranks to {file}")
        except OSError as error:
            say(f"cannot write its last exchanges with other ranks to {file}: {error.strerror}")
