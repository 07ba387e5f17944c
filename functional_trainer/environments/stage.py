"""Where environments are: in this process, or in workers of Ray; what one takes too long for is its own loss.

Methods of plain environments are called one after the other in a thread beside the caller's. One that takes too long is
left there, the next ones go on in another thread. The old one is told to end, which it does if it runs Python, or when
it returns from what it waits for. Nothing helps against what keeps the interpreter to itself, as a loop in C can, but
another process: that is a worker of Ray. Imports no torch.
"""

import asyncio
import ctypes
import inspect
import pickle
import threading
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from queue import Empty, SimpleQueue
from typing import Any

import cloudpickle

from functional_trainer.cluster import Crew, Job, Lost, Pools
from functional_trainer.environments import Environment, Maker, Message, Row

SLACK = 10.0
"""Seconds beyond all limits of its environments after which their process is taken to hang."""


class Stage:
    """Environments of this process, by number; each call of a method of one may take `seconds`.

    Methods that are coroutines wait together. What is returned for each is its answer, or what it raised.
    """

    def __init__(self, make: Maker, seconds: float):
        self.make, self.seconds, self.lock = make, seconds, threading.Lock()
        self.held: dict[int, Environment] = {}
        self.caller: _Caller | None = None
        self.loop: _Loop | None = None

    def reset(self, rows: Mapping[int, Row]) -> list[Any]:
        """Make environments, and begin."""

        def begin(number: int, row: Row) -> Any:
            self.held[number] = self.make()
            return self.held[number].reset(row)

        return self._all([partial(begin, *one) for one in rows.items()])

    def step(self, said: Mapping[int, list[Message]]) -> list[Any]:
        """Answer conversations."""
        return self._all([partial(self._step, *one) for one in said.items()])

    def _step(self, number: int, messages: list[Message]) -> Any:
        if number not in self.held:
            raise RuntimeError("its worker was lost, and another one has taken its place")
        return self.held[number].step(messages)

    def close(self, numbers: Sequence[int]) -> None:
        """The episodes of those that were begun are over."""
        self._all([self.held.pop(number).close for number in numbers if number in self.held])

    def _all(self, methods: Sequence[Callable[[], Any]]) -> list[Any]:
        with self.lock:
            found = [self._one(method) for method in methods]
            waiting = [i for i, one in enumerate(found) if inspect.isawaitable(one)]
            if waiting:
                self.loop = self.loop or _Loop()
                answers, blocked = self.loop.together([found[i] for i in waiting], self.seconds)
                self.loop = None if blocked else self.loop
                for i, answer in zip(waiting, answers, strict=True):
                    found[i] = answer
            return found

    def _one(self, method: Callable[[], Any]) -> Any:
        caller, self.caller = self.caller or _Caller(), None
        caller.asked.put(method)
        try:
            answer = caller.answers.get(timeout=self.seconds)
            self.caller = caller
            return answer
        except Empty:
            return _late(self.seconds)
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

    def together(self, waiting: Sequence[Awaitable], seconds: float) -> tuple[list[Any], bool]:
        """Return what came of each, and whether one keeps the loop from going on, which then all have lost."""
        tasks: list[asyncio.Future] = []

        async def wait() -> None:
            tasks.extend(asyncio.ensure_future(_awaited(one)) for one in waiting)
            await asyncio.wait(tasks, timeout=seconds)
            for task in tasks:
                task.cancel()

        try:
            asyncio.run_coroutine_threadsafe(wait(), self.loop).result(seconds + SLACK)
        except TimeoutError:
            self.end()
            _interrupt(self.thread)
            return [_answer(task, seconds) for task in tasks] or [_late(seconds) for _ in waiting], True
        return [_answer(task, seconds) for task in tasks], False

    def end(self) -> None:
        """Let it end when it can."""
        self.loop.call_soon_threadsafe(self.loop.stop)


def _interrupt(thread: threading.Thread) -> None:
    """Raise SystemExit in a thread when it runs Python next."""
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident or 0), ctypes.py_object(SystemExit))


async def _awaited(one: Awaitable) -> Any:
    try:
        return await one
    except (Exception, SystemExit) as error:
        return error


def _answer(task: asyncio.Future, seconds: float) -> Any:
    return task.result() if task.done() and not task.cancelled() else _late(seconds)


def _late(seconds: float) -> TimeoutError:
    return TimeoutError(f"it took over {seconds:g} s")


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

    def reset(self, rows: Mapping[int, Row]) -> list[bytes]:
        return [_sent(one) for one in self.stage.reset(rows)]

    def step(self, said: Mapping[int, list[Message]]) -> list[bytes]:
        return [_sent(one) for one in self.stage.step(said)]

    def close(self, rows: Mapping[int, None]) -> list[bytes]:
        self.stage.close([*rows])
        return []


class RayStage:
    """A `Stage` whose environments are those of the `Host`s of a crew, each at the one that its number says.

    Those of a worker that dies are lost; one that died before they were begun costs nothing. A worker that has done
    nothing for longer than all of its environments may take counts as hung, and is killed.
    """

    def __init__(self, crew: Crew, seconds: float):
        self.crew, self.seconds = crew, seconds

    def reset(self, rows: Mapping[int, Row]) -> list[Any]:
        """Make environments, and begin."""
        return self._share("reset", rows)

    def step(self, said: Mapping[int, list[Message]]) -> list[Any]:
        """Answer conversations."""
        return self._share("step", said)

    def close(self, numbers: Sequence[int]) -> None:
        """The episodes of those that were begun are over."""
        self._share("close", dict.fromkeys(numbers))

    def _share(self, method: str, given: Mapping[int, Any]) -> list[Any]:
        count = len(self.crew.workers)
        shares = {i: {n: x for n, x in given.items() if n % count == i} for i in range(count)}
        jobs = [Job(i, worker=i) for i, share in shares.items() if share]
        seconds = SLACK * 2 + self.seconds * max(map(len, shares.values()))
        found = dict[int, Any]()

        def ask(worker: Any, i: int) -> Any:
            return getattr(worker, method).remote(shares[i])

        for i, answers in self.crew.work(jobs, ask, seconds, tries=1):
            if isinstance(answers, Lost):
                found |= {n: RuntimeError(f"its worker was lost: {answers.error}") for n in shares[i]}
            else:
                found |= dict(zip(shares[i], map(_taken, answers), strict=method != "close"))
        return [] if method == "close" else [found[n] for n in given]

    def end(self) -> None:
        """End the workers."""
        self.crew.close()


def _sent(answer: Any) -> bytes:
    """Return an answer as bytes, or why it cannot be: that costs its own episode."""
    try:
        return cloudpickle.dumps(answer)
    except Exception as error:
        return pickle.dumps(TypeError(f"{type(answer).__name__} cannot be sent from a worker: {error}"))


def _taken(data: bytes) -> Any:
    try:
        return pickle.loads(data)
    except Exception as error:
        return error
