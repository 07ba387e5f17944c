"""Processes that can be killed: a function is called on samples, one at a time in each, every call with a time limit.

multiprocessing's pools wait forever for a process that died, cannot end one that hangs, and start each by importing the
program that runs, torch with it. These are started bare and get the function by value. They end with this process,
however it ends: the kernel sends them SIGKILL when the last writer of a pipe is gone. Linux only; imports no torch.
"""

import fcntl
import math
import os
import pickle  # not multiprocessing's, in which tensors are shared memory
import resource
import select
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from typing import Any, NamedTuple

import cloudpickle

from functional_trainer.errors import brief

START = 120.0
"""Seconds that a process may take to start and to load the function."""
STARTS = 3
"""Times in a row that one may fail to."""
BOOT = "import sys; sys.path[:] = {path!r}; from functional_trainer.workers import serve; serve({fd})"


class Outcome(NamedTuple):
    """What came of one call: a value, or why there is none: "raised", "timed out" or "died", and the details."""

    value: Any = None
    failed: str = ""
    details: str = ""


class Pool:
    """Call `function(**arguments)` in `workers` processes, each call within `seconds`.

    `memory` limits the bytes of data of a process. `prepare` is called in it once, before; what that takes does not
    count. `environment` replaces this process's variables. ValueError if the function cannot be sent to a process,
    RuntimeError if one does not start. Close it, or use it as a context; what is left ends with this process.
    """

    def __init__(
        self, function: Callable[..., Any], workers: int, seconds: float, memory: int | None = None,
        prepare: Callable[[], object] | None = None, environment: Mapping[str, str] | None = None,
    ):  # fmt: skip
        try:
            self.payload = cloudpickle.dumps((function, prepare, memory))
        except Exception as error:
            raise ValueError(f"{function} cannot be sent to another process: {brief(error)}") from error
        self.seconds, self.environment, self.lock = seconds, environment, threading.Lock()
        self.stillborn = 0
        self.workers = [_Worker(self.payload, environment) for _ in range(workers)]

    def map(self, arguments: Sequence[Mapping[str, Any]]) -> list[Outcome]:
        """Return the outcome of each call, in order."""
        if not self.workers:
            raise RuntimeError("the pool is closed")
        found: dict[int, Outcome] = {}
        waiting = deque(range(len(arguments)))
        with self.lock, self._forgotten():
            while len(found) < len(arguments):
                for worker in self.workers:
                    if waiting and worker.ready and worker.sample is None:
                        self._give(worker, waiting, arguments)
                busy = [worker for worker in self.workers if worker.until < math.inf]
                left = min(worker.until for worker in busy) - time.monotonic()
                ended = wait([worker.connection for worker in busy], max(0.0, left))
                for worker in busy:
                    if worker.connection in ended:
                        self._take(worker, found)
                    elif worker.until <= time.monotonic():
                        limit = START if worker.sample is None else self.seconds
                        self._lose(worker, found, Outcome(None, "timed out", f"took over {limit:g} s"))
        return [found[i] for i in range(len(arguments))]

    @contextmanager
    def _forgotten(self) -> Iterator[None]:
        """Replace the processes that still work on a sample if `map` is interrupted: nobody waits for their answers."""
        try:
            yield
        except BaseException:
            self.workers = [w if w.sample is None else self._replaced(w) for w in self.workers]
            raise

    def _replaced(self, worker: "_Worker") -> "_Worker":
        worker.kill()
        return _Worker(self.payload, self.environment)

    def _give(self, worker: "_Worker", waiting: deque[int], arguments: Sequence[Mapping[str, Any]]) -> None:
        sample = waiting.popleft()
        worker.sample = sample
        try:
            worker.connection.send_bytes(pickle.dumps(dict(arguments[sample])))
            worker.until = time.monotonic() + self.seconds
        except OSError:  # it died while it had nothing to do, so not of this sample
            waiting.appendleft(sample)
            self.workers[self.workers.index(worker)] = self._replaced(worker)

    def _take(self, worker: "_Worker", found: dict[int, Outcome]) -> None:
        try:
            outcome = pickle.loads(worker.connection.recv_bytes())
        except Exception:  # the end of the connection, or what is no answer
            self._lose(worker, found, Outcome(None, "died", worker.end()))
            return
        if worker.sample is None and outcome.failed:
            raise RuntimeError(f"a worker process cannot load the function: {outcome.details}")
        if worker.sample is not None:
            found[worker.sample] = outcome
        self.stillborn = 0
        worker.ready, worker.sample, worker.until = True, None, math.inf

    def _lose(self, worker: "_Worker", found: dict[int, Outcome], outcome: Outcome) -> None:
        if worker.sample is not None:
            found[worker.sample] = outcome
        else:
            self.stillborn += 1
            if self.stillborn == STARTS:
                raise RuntimeError(f"{STARTS} worker processes in a row did not start: {outcome.details}")
        self.workers[self.workers.index(worker)] = self._replaced(worker)

    def close(self) -> None:
        """End the processes."""
        for worker in self.workers:
            worker.kill()
        self.workers = []

    def __enter__(self) -> "Pool":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Worker:
    """A process, and the sample that it works on until when; before `ready` it loads the function."""

    def __init__(self, payload: bytes, environment: Mapping[str, str] | None):
        self.connection, theirs = Pipe()
        boot = BOOT.format(path=sys.path, fd=theirs.fileno())
        self.process = subprocess.Popen(
            [sys.executable, "-c", boot], stdin=subprocess.PIPE, pass_fds=[theirs.fileno()], env=environment,
            start_new_session=True,
        )  # fmt: skip
        theirs.close()
        self.ready, self.sample = False, None  # type: tuple[bool, int | None]
        self.until = time.monotonic() + START
        with suppress(OSError):  # of one that died at once, as its end of the connection then says
            self.connection.send_bytes(payload)

    def end(self) -> str:
        """Tell how the process ended."""
        try:
            code = self.process.wait(0.2)
        except subprocess.TimeoutExpired:
            return "closed its connection"
        return f"ended with exit code {code}" if code >= 0 else f"ended by {signal.Signals(-code).name}"

    def kill(self) -> None:
        """End the process and those that it started."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.connection.close()
        self.process.stdin.close()  # type: ignore[union-attr]


def serve(fd: int) -> None:
    """Be a worker: load the function, say so, and answer calls until the other end is closed."""
    _end_with_the_writer(0)
    with Connection(fd) as connection, suppress(EOFError, ConnectionError):
        try:
            function, prepare, memory = pickle.loads(connection.recv_bytes())
            if memory is not None:
                resource.setrlimit(resource.RLIMIT_DATA, (memory, memory))
            if prepare is not None:
                prepare()
        except BaseException as error:
            connection.send_bytes(pickle.dumps(_raised(error)))
            return
        connection.send_bytes(pickle.dumps(Outcome()))
        while True:
            arguments = pickle.loads(connection.recv_bytes())
            try:
                answer = pickle.dumps(Outcome(function(**arguments)))
            except (Exception, SystemExit) as error:
                answer = pickle.dumps(_raised(error))
            connection.send_bytes(answer)


def _raised(error: BaseException) -> Outcome:
    return Outcome(None, "raised", brief(f"{type(error).__name__}: {error}"))


def _end_with_the_writer(pipe: int) -> None:
    """Have the kernel kill this process group, whatever it does, when nobody is left to write to a pipe."""
    fcntl.fcntl(pipe, fcntl.F_SETOWN, -os.getpid())
    fcntl.fcntl(pipe, fcntl.F_SETSIG, signal.SIGKILL)  # type: ignore[attr-defined]
    fcntl.fcntl(pipe, fcntl.F_SETFL, fcntl.fcntl(pipe, fcntl.F_GETFL) | os.O_ASYNC)
    watch = select.poll()
    watch.register(pipe, 0)
    if watch.poll(0):  # they were gone before
        os._exit(1)
