"""Work for other processes, on this machine or a cluster: actors of Ray that share it, and what the loss of one costs.

A crew is some actors of a class. Each does one job at a time. One that dies, or takes too long and is killed, is
replaced; its job is given to another or counts as lost, and one answer of a job is ever taken.

Ray is optional, and imported where it is used. RAY_ADDRESS names a cluster; without it one begins and ends with the
run. Imports no torch.
"""

import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from functional_trainer import workers
from functional_trainer.errors import brief
from functional_trainer.workers import Outcome

TRIES = 3
"""Workers that a job may cost, and starts of a worker that may fail in a row."""
START = 300.0
"""Seconds that a worker may take to start."""
PULSE = 60.0
"""Seconds that one that has nothing to do may take to say that it is there."""
ROOM = 30.0
"""Seconds that a cluster is given to have room for a crew."""


class Job(NamedTuple):
    """What is to be done, by which worker (-1: any), and how many were lost over it."""

    what: Any
    worker: int = -1
    tries: int = 0


class Call(NamedTuple):
    """A job that a worker is at, until when it has time."""

    job: Job
    worker: int
    until: float


class Lost(NamedTuple):
    """There is no answer: as many workers were lost over a job as may be, the last one so."""

    error: str


def connect(count: int) -> None:
    """Join the cluster that RAY_ADDRESS names, or begin one on this machine with room for so many workers."""
    import ray

    if not ray.is_initialized():
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        alone: dict[str, Any] = {"address": "local", "num_cpus": count, "include_dashboard": False}
        alone["_node_ip_address"] = "127.0.0.1"  # who reaches a cluster may run code there
        given = {} if os.environ.get("RAY_ADDRESS") else alone
        ray.init(logging_level=logging.WARNING, log_to_driver=False, **given)


class Crew:
    """`count` actors of a class with a method `process`, made with `given`, each with one core and `gpus` devices.

    `called` is what errors call them, `threads` how many methods of one may run at once. RuntimeError if the cluster
    has no room for them, ValueError if `given` cannot be sent there.
    """

    def __init__(
        self, kind: type, given: Sequence[Any], count: int, called: str, *, gpus: int = 0, threads: int = 1
    ):  # fmt: skip
        connect(count)
        import ray
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        self.called, self.lock = called, threading.Lock()
        self.room = self._reserve(count, {"CPU": 1} | ({"GPU": gpus} if gpus else {}))
        where = PlacementGroupSchedulingStrategy(self.room)
        needs: dict[str, Any] = {"num_cpus": 1, "num_gpus": gpus, "max_concurrency": threads}
        made: Any = ray.remote(**needs, scheduling_strategy=where)(kind)
        self._make = lambda: made.remote(*given)
        self.workers: list[Any] = [None] * count
        self.started: list[Any] = [None] * count
        self.until, self.failed = [0.0] * count, [0] * count
        try:
            for i in range(count):
                self._start(i)
        except Exception as error:
            self.close()
            raise ValueError(f"what {called} are made of cannot be sent to them: {brief(error)}") from error

    def _reserve(self, count: int, needs: Mapping[str, int]) -> Any:
        """Return a group of places, one for each worker."""
        import ray
        from ray.util.placement_group import placement_group, remove_placement_group

        group = placement_group([dict(needs)] * count)
        if group.wait(ROOM):
            return group
        there, free = ray.cluster_resources(), ray.available_resources()
        remove_placement_group(group)
        said = [f"{count * n} {k}s, it has {there.get(k, 0):g}, {free.get(k, 0):g} free" for k, n in needs.items()]
        raise RuntimeError(f"Ray's cluster has no room for {count} {self.called}: they want {'; and '.join(said)}")

    def _start(self, i: int) -> None:
        """Start a worker in place i; `started` is what it says when it is there."""
        self.workers[i] = self._make()
        self._call(i, START)

    def _call(self, i: int, seconds: float) -> None:
        self.started[i], self.until[i] = self.workers[i].process.remote(), time.monotonic() + seconds

    def work(
        self, jobs: Sequence[Job], begin: Callable[[Any, Any], Any], seconds: float, tries: int = TRIES,
        going: Callable[[], bool] = lambda: True, pulse: bool = False,
    ) -> Iterator[tuple[Any, Any]]:  # fmt: skip
        """Yield what each job was and its answer, or `Lost` after `tries`, in any order.

        `begin(worker, what)` calls a method, which has `seconds`, or with `pulse` those again and again while another
        thread of its worker says that it is there. No job is begun any more when it is not `going` on. What a worker
        raises is raised; RuntimeError if one cannot be started. Workers whose answers nobody takes any more, since this
        is left early, are replaced.
        """
        import ray

        if not self.workers:
            raise RuntimeError("the pool is closed")
        waiting, calls = deque(jobs), dict[Any, Call]()
        with self.lock, self._forgotten(calls):
            for i, said in enumerate(self.started):  # who died in the meantime is replaced, and costs nothing
                if ray.wait([said], timeout=0)[0]:
                    self._call(i, PULSE)
            while calls or waiting and going():
                coming = self._give(waiting, calls, begin, seconds, pulse) if going() else []
                ends = [call.until for call in calls.values()] + [self.until[i] for i in coming]
                left = min(ends, default=0.0) - time.monotonic()
                done, _ = ray.wait([*calls, *(self.started[i] for i in coming)], timeout=max(0.0, left))
                now = time.monotonic()
                for one in [one for one, call in calls.items() if one in done or call.until <= now]:
                    call = calls.pop(one)
                    if pulse and one not in done and ray.wait([self.started[call.worker]], timeout=0)[0]:
                        self._call(call.worker, seconds)
                        calls[one] = call._replace(until=now + seconds)
                        continue
                    try:
                        answer = ray.get(one, timeout=0)
                    except ray.exceptions.RayTaskError as error:
                        raise error.cause from error
                    except ray.exceptions.RayError as error:
                        self._replace(call.worker)
                        job = call.job._replace(tries=call.job.tries + 1)
                        if job.tries < tries:
                            waiting.append(job)
                            continue
                        hung = isinstance(error, ray.exceptions.GetTimeoutError)
                        answer = Lost(f"took over {seconds:g} s" if hung else brief(error))
                    yield call.job.what, answer

    @contextmanager
    def _forgotten(self, calls: Mapping[Any, Call]) -> Iterator[None]:
        """Replace workers whose calls are under way in the end."""
        import ray

        try:
            yield
        finally:
            for call in calls.values() if self.workers and ray.is_initialized() else ():
                self._replace(call.worker)

    def _give(
        self, waiting: deque[Job], calls: dict[Any, Call], begin: Callable, seconds: float, pulse: bool
    ) -> list[int]:
        """Give jobs to the workers that have none; return those that there are jobs for and that are still to come."""
        busy, coming = {call.worker for call in calls.values()}, []
        for i in range(len(self.workers)):
            job = next((job for job in waiting if job.worker in (-1, i)), None)
            if i in busy or job is None:
                continue
            if not self._there(i):
                coming.append(i)
                continue
            waiting.remove(job)
            calls[begin(self.workers[i], job.what)] = Call(job, i, time.monotonic() + seconds)
            if pulse:
                self._call(i, seconds)
        return coming

    def _there(self, i: int) -> bool:
        """Tell whether a worker has started; one that cannot is started again, some times."""
        import ray

        if not ray.wait([self.started[i]], timeout=0)[0] and time.monotonic() < self.until[i]:
            return False
        try:
            ray.get(self.started[i], timeout=0)
        except ray.exceptions.RayError as error:
            self.failed[i] += 1
            if self.failed[i] == TRIES:
                raise RuntimeError(f"{TRIES} {self.called} in a row did not start: {error}") from error
            self._replace(i)
            return False
        self.failed[i] = 0
        return True

    def _replace(self, i: int) -> None:
        import ray

        ray.kill(self.workers[i])
        self._start(i)

    def close(self) -> None:
        """End the workers and give their places back."""
        import ray
        from ray.util.placement_group import remove_placement_group

        if ray.is_initialized() and self.workers:
            for worker in filter(None, self.workers):
                ray.kill(worker)
            remove_placement_group(self.room)
        self.workers = []


class Pools:
    """What runs as an actor: a `workers.Pool` of one process for each function; `hows` are their arguments by name."""

    def __init__(self, hows: Mapping[str, Mapping[str, Any]]):
        self.pools = {name: workers.Pool(workers=1, **how) for name, how in hows.items()}

    def call(self, name: str, arguments: Mapping[str, Any]) -> Outcome:
        """Call a function; a process that hangs or dies is replaced here."""
        return self.pools[name].map([arguments])[0]

    def process(self) -> int:
        return os.getpid()


class RayPool:
    """A `workers.Pool` whose processes are those of the `Pools` of a crew: the same outcomes, wherever they run.

    A call whose actor is lost is made by another one: it is asked again, and counted once, as "died" if all are lost.
    """

    def __init__(self, crew: Crew, name: str, seconds: float):
        self.crew, self.name = crew, name
        self.seconds = seconds + workers.STARTS * workers.START

    def map(self, arguments: Sequence[Mapping[str, Any]]) -> list[Outcome]:
        """Return the outcome of each call, in order."""
        found: dict[int, Outcome] = {}
        jobs = [Job(i) for i in range(len(arguments))]

        def ask(worker: Any, i: int) -> Any:
            return worker.call.remote(self.name, dict(arguments[i]))

        for i, answer in self.crew.work(jobs, ask, self.seconds):
            found[i] = Outcome(None, "died", answer.error) if isinstance(answer, Lost) else answer
        return [found[i] for i in range(len(arguments))]

    def close(self) -> None:
        """Do nothing: the workers are the crew's."""
