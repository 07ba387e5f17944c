"""Calls in other processes: whatever one of them does, the others' results are theirs, and nothing is left behind."""

import inspect
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from functional_trainer.workers import Pool

LIMIT = 1.0
WAYS = {  # to fail, and what is said of each
    "raise": ("raised", "KeyError: 7"), "sys.exit": ("raised", "SystemExit: 0"),
    "no pickle": ("raised", "pickle local object"), "memory": ("raised", "MemoryError"),
    "sleep": ("timed out", "took over 1 s"), "deaf": ("timed out", "took over 1 s"),
    "exit": ("died", "exit code 3"), "crash": ("died", "SIGSEGV"), "kill": ("died", "SIGKILL"),
    "close": ("died", "closed its connection"),
}  # fmt: skip


def acting():
    """Return a function that twice its argument, or fails in some way; by value, so without this module."""

    def act(x, how="well"):
        import ctypes
        import os
        import signal
        import sys
        import time

        if how == "raise":
            raise KeyError(x)
        if how == "sys.exit":
            sys.exit(0)
        if how == "no pickle":
            return lambda: x
        if how == "memory":
            return len(bytearray(1 << 29))
        if how == "sleep":
            time.sleep(1e6)
        if how == "deaf":  # in C, with every signal ignored that can be and the interpreter's lock held
            for number in {*signal.Signals} - {signal.SIGKILL, signal.SIGSTOP}:
                signal.signal(number, signal.SIG_IGN)
            ctypes.PyDLL(None).sleep(10**6)
        if how == "exit":
            os._exit(3)
        if how == "crash":
            ctypes.string_at(0)
        if how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if how == "close":
            os.closerange(3, 99)
            time.sleep(1e6)
        if how == "child":
            return os.getpid(), os.spawnlp(os.P_NOWAIT, "sleep", "sleep", "1000")
        return (os.getpid(), [m for m in ("torch", "pytest") if m in sys.modules]) if how == "who" else 2 * x

    return act


def state(pid: int) -> str:
    """Return the letter of a process's state, X if there is none."""
    stat = Path(f"/proc/{pid}/stat")
    return stat.read_text().rsplit(")", 1)[1].split()[0] if stat.exists() else "X"


def gone(*pids: int, within: float = 10) -> bool:
    """Tell whether processes end within some seconds; a zombie has."""
    until = time.monotonic() + within
    while (left := [pid for pid in pids if state(pid) not in "ZX"]) and time.monotonic() < until:
        time.sleep(0.02)
    return not left


@pytest.fixture(scope="module")
def pool():
    with Pool(acting(), 2, LIMIT, memory=1 << 28) as pool:
        yield pool


def test_a_call_that_fails_costs_itself_and_is_explained(pool):
    calls = [call for i, how in enumerate(WAYS) for call in ({"x": i}, {"x": 7, "how": how})]
    outcomes = pool.map(calls)
    assert [(o.value, o.failed) for o in outcomes[::2]] == [(2 * i, "") for i in range(len(WAYS))]
    assert [(o.value, o.failed) for o in outcomes[1::2]] == [(None, reason) for reason, _ in WAYS.values()]
    for outcome, (_, details) in zip(outcomes[1::2], WAYS.values(), strict=True):
        assert details in outcome.details


@settings(max_examples=8)
@example(["exit"] * 5)
@example([])
@given(st.lists(st.sampled_from(["well", "well", "raise", "exit"]), max_size=9))
def test_no_result_is_another_samples(pool, hows):
    outcomes = pool.map([{"x": i, "how": how} for i, how in enumerate(hows)])
    reasons = {"well": "", "raise": "raised", "exit": "died"}
    assert [outcome.failed for outcome in outcomes] == [reasons[how] for how in hows]
    assert [o.value for o in outcomes] == [2 * i if how == "well" else None for i, how in enumerate(hows)]


def test_results_do_not_arrive_late_after_an_interruption(pool):
    def interrupt(*_):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, LIMIT / 2)
    try:
        with pytest.raises(KeyboardInterrupt):
            pool.map([{"x": 1, "how": "sleep"}] * 2)
    finally:
        signal.signal(signal.SIGALRM, before)
    assert [outcome.value for outcome in pool.map([{"x": x} for x in range(4)])] == [0, 2, 4, 6]


def test_a_process_that_died_idle_is_replaced_and_costs_nothing(pool):
    pool.map([{"x": 0}] * 4)
    for worker in pool.workers:
        os.kill(worker.process.pid, signal.SIGKILL)
        assert gone(worker.process.pid)
    assert [outcome.value for outcome in pool.map([{"x": x} for x in range(4)])] == [0, 2, 4, 6]


def test_processes_import_neither_torch_nor_the_program_that_runs(pool):
    for outcome in pool.map([{"x": 0, "how": "who"}] * 4):
        pid, imported = outcome.value
        assert pid != os.getpid() and imported == []


def test_what_is_large_travels_both_ways():
    table = os.urandom(1 << 20)
    with Pool(lambda x: table + x, 1, 30) as pool:
        (outcome,) = pool.map([{"x": table}])
    assert outcome.value == table + table


def test_close_ends_the_processes_and_their_children():
    with Pool(acting(), 1, 30) as pool:
        (outcome,) = pool.map([{"x": 0, "how": "child"}])
    assert gone(*outcome.value)
    with pytest.raises(RuntimeError, match="the pool is closed"):
        pool.map([{"x": 0}])


PROGRAM = """
from functional_trainer.workers import Pool
pool = Pool(acting(), 2, 1000)
(outcome,) = pool.map([{"x": 0, "how": "child"}])
print(*outcome.value, *(worker.process.pid for worker in pool.workers), flush=True)
pool.map([{"x": 0, "how": "deaf"}] * 2)
"""


def test_nothing_outlives_a_parent_that_is_killed():
    with subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(inspect.getsource(acting)) + PROGRAM], stdout=subprocess.PIPE, text=True
    ) as parent:
        pids = [int(word) for word in parent.stdout.readline().split()]
        time.sleep(0.3)
        assert len({*pids}) == 3 and not gone(*pids, within=0)
        parent.kill()
        assert gone(*pids)


def test_what_cannot_run_elsewhere_is_refused():
    with pytest.raises(ValueError, match="cannot be sent to another process"):
        Pool(threading.Lock().acquire, 1, 1)

    def broken():
        raise OSError("no such thing here")

    with Pool(acting(), 1, 1, prepare=broken) as pool:
        with pytest.raises(RuntimeError, match="cannot load the function: OSError: no such thing here"):
            pool.map([{"x": 0}])
    with Pool(acting(), 1, 1, prepare=lambda: os._exit(5)) as pool:
        with pytest.raises(RuntimeError, match="3 worker processes in a row did not start: .*exit code 5"):
            pool.map([{"x": 0}])
