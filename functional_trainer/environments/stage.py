"""Where environments are: in this process, or in workers of Ray; what one takes too long for is its own loss.

Methods of plain environments are called one after the other in a thread beside the caller's. One that takes too long is
left there, the next ones go on in another thread. The old one is told to end once, which it does if it runs Python and
lets SystemExit through, or when it returns from what it waits for. Nothing helps against what keeps the interpreter to
itself, as a loop in C can, but another process: that is a worker of Ray. Imports no torch.
"""

import asyncio
import ctypes
import inspect
import pickle
import threading
from collections.abc import Awaitable, Callable, Collection, Mapping
from contextlib import suppress
from functools import partial
from queue import Empty, SimpleQueue
from typing import Any

import cloudpickle

from functional_trainer.cluster import Crew, Job, Lost, Pools
from functional_trainer.environments import Environment, Maker, Message, Row

SLACK = 10.0
"""Seconds beyond its limit after which a loop in which nothing goes on, or a silent process, is taken to hang."""


class Stage:
    """Environments of this process, by number; each call of a method of one may take `seconds`.

    Methods that are coroutines wait together. What is returned for each is its answer, or what it raised.
    """

    def __init__(self, make: Maker, seconds: float):
        self.make, self.seconds, self.lock = make, seconds, threading.Lock()
        self.held: dict[int, Environment] = {}
        self.late: dict[int, Callable[[], bool]] = {}
        """Whether a method of one that took too long still runs."""
        self.caller: _Caller | None = None
        self.loop: _Loop | None = None

    def reset(self, rows: Mapping[int, Row]) -> list[Any]:
        """Make environments, and begin."""

        def begin(number: int, row: Row) -> Any:
            self.held[number] = self.make()
            return self.held[number].reset(row)

        return self._all("reset", {number: partial(begin, number, row) for number, row in rows.items()})

    def step(self, said: Mapping[int, list[Message]]) -> list[Any]:
        """Answer conversations."""
        return self._all("step", {number: partial(self._step, number, what) for number, what in said.items()})

    def _step(self, number: int, messages: list[Message]) -> Any:
        if number not in self.held:
            raise RuntimeError("its worker was lost, and another one has taken its place")
        return self.held[number].step(messages)

    def close(self, numbers: Collection[int]) -> list[Any]:
        """The episodes of those that were begun are over; those that still run are left alone."""
        found = self._all("close", {number: partial(self._close, number) for number in numbers})
        for number in numbers:
            self.late.pop(number, None)
        return found

    def _close(self, number: int) -> Any:
        environment, runs = self.held.pop(number, None), self.late.pop(number, bool)
        return environment.close() if environment and not runs() else None

    def _all(self, name: str, methods: Mapping[int, Callable[[], Any]]) -> list[Any]:
        late = TimeoutError(f"its {name} took over {self.seconds:g} s (--rollout.tool-seconds)")
        with self.lock:
            found = {number: self._one(number, method, late) for number, method in methods.items()}
            if waiting := {number: one for number, one in found.items() if inspect.isawaitable(one)}:
                self.loop = self.loop or _Loop()
                tasks, ended, blocked = self.loop.together(waiting, self.seconds)
                self.loop = None if blocked else self.loop
                self.late |= {number: partial(_runs, task) for number, task in tasks.items() if number not in ended}
                found |= {number: tasks[number].result() if number in ended else late for number in waiting}
            return [*found.values()]

    def _one(self, number: int, method: Callable[[], Any], late: TimeoutError) -> Any:
        caller, self.caller = self.caller or _Caller(), None
        caller.asked.put(method)
        try:
            answer = caller.answers.get(timeout=self.seconds)
            self.caller = caller
            return answer
        except Empty:
            self.late[number] = caller.thread.is_alive
            return late
        finally:
            if self.caller is None:
                caller.end()
                _interrupt(caller.thread)

    def end(self) -> None:
        """End the threads."""
        for thread in (self.caller, self.loop):
            if thread:
                thread.end()
        self.caller = self.loop = None


class _Caller:
    """A thread that calls what it is asked to."""

    def __init__(self) -> None:
        self.asked: SimpleQueue = SimpleQueue()
        self.answers: SimpleQueue = SimpleQueue()
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def _run(self) -> None:
        with suppress(SystemExit):
            while (method := self.asked.get()) is not None:
                self.answers.put(_tried(method))

    def end(self) -> None:
        """Let it end when it has done what it was asked."""
        self.asked.put(None)


class _Loop:
    """A loop in a thread of its own: a notebook has one in its thread already."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def _run(self) -> None:
        with suppress(SystemExit):
            self.loop.run_forever()

    def together(
        self, waiting: Mapping[int, Awaitable], seconds: float
    ) -> tuple[dict[int, asyncio.Future], set[int], bool]:  # fmt: skip
        """Return the task of each, which ended in time, and whether one keeps the loop from going on."""
        tasks: dict[int, asyncio.Future] = {}
        marks: list[None] = []  # one when a task begins, one when it ends

        async def told(one: Awaitable) -> Any:
            marks.append(None)
            try:
                return await one
            except (Exception, SystemExit) as error:
                return error
            finally:
                marks.append(None)

        def over() -> set[int]:
            return {number for number, task in tasks.items() if task.done() and not task.cancelled()}

        async def wait() -> set[int]:
            tasks.update({number: asyncio.ensure_future(told(one)) for number, one in waiting.items()})
            await asyncio.sleep(0)  # all have begun
            await asyncio.wait(tasks.values(), timeout=seconds)
            found = over()
            for task in tasks.values():
                task.cancel()
            return found

        ended, seen = asyncio.run_coroutine_threadsafe(wait(), self.loop), -1
        while seen < len(marks):
            seen = len(marks)
            with suppress(TimeoutError):
                return tasks, ended.result(seconds + SLACK), False
        self.end()
        _interrupt(self.thread)
        return tasks, over(), True

    def end(self) -> None:
        """Let it end when it can."""
        self.loop.call_soon_threadsafe(self.loop.stop)


def _interrupt(thread: threading.Thread) -> None:
    """Raise SystemExit in a thread when it runs Python next."""
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident or 0), ctypes.py_object(SystemExit))


def _runs(task: asyncio.Future) -> bool:
    return not task.done()


def _tried(method: Callable[[], Any]) -> Any:
    try:
        return method()
    except (Exception, SystemExit) as error:
        return error


# by Ray ---------------------------------------------------------------------------------------------------------------


class Host(Pools):
    """What runs as an actor: a `Stage`, and the processes of tools."""

    def __init__(self, hows: Mapping[str, Mapping[str, Any]], make: Maker, seconds: float):
        super().__init__(hows)
        self.stage = Stage(make, seconds)

    def play(self, method: str, given: Any) -> list[bytes]:
        """Call a method of the stage."""
        return [_sent(one) for one in getattr(self.stage, method)(given)]


class RayStage:
    """A `Stage` whose environments are those of the `Host`s of a crew, each at the one that its number says.

    Those of a worker that dies are lost; one that died before they were begun costs nothing. A worker whose other
    thread does not say within the limit of a call, and SLACK, that it is there counts as hung, and is killed.
    """

    def __init__(self, crew: Crew, seconds: float):
        self.crew, self.seconds = crew, seconds

    def reset(self, rows: Mapping[int, Row]) -> list[Any]:
        """Make environments, and begin."""
        return self._share("reset", rows)

    def step(self, said: Mapping[int, list[Message]]) -> list[Any]:
        """Answer conversations."""
        return self._share("step", said)

    def close(self, numbers: Collection[int]) -> list[Any]:
        """The episodes of those that were begun are over."""
        return self._share("close", dict.fromkeys(numbers))

    def _share(self, method: str, given: Mapping[int, Any]) -> list[Any]:
        count = len(self.crew.workers)
        shares = {i: {n: x for n, x in given.items() if n % count == i} for i in range(count)}
        jobs = [Job(i, worker=i) for i, share in shares.items() if share]
        found = dict[int, Any]()

        def ask(worker: Any, i: int) -> Any:
            return worker.play.remote(method, shares[i])

        for i, answers in self.crew.work(jobs, ask, self.seconds + SLACK, tries=1, pulse=True):
            if isinstance(answers, Lost):
                found |= {n: RuntimeError(f"its worker was lost: {answers.error}") for n in shares[i]}
            else:
                found |= dict(zip(shares[i], map(_taken, answers), strict=True))
        return [found[n] for n in given]

    def end(self) -> None:
        """End the workers."""
        self.crew.close()


def _sent(answer: Any) -> bytes:
    """Return an answer as bytes, or why it cannot be: that costs its own episode."""
    kind = type(answer).__name__
    try:
        data = cloudpickle.dumps(answer)
        if isinstance(answer, BaseException):
            pickle.loads(data)  # one with an __init__ of its own may not load
        return data
    except Exception as error:
        raised = isinstance(answer, BaseException)
        why = f"{kind}: {answer}" if raised else f"{kind} cannot be sent from a worker: {error}"
        return pickle.dumps(RuntimeError(why) if raised else TypeError(why))


def _taken(data: bytes) -> Any:
    try:
        return pickle.loads(data)
    except Exception as error:
        return error
