"""Rewards of answers: functions called as TRL calls them, and what those that fail cost. Imports no torch.

    f(prompts, completions, completion_ids, **columns) -> [number or None of each completion]

Everything is a list with an element for each completion, columns of the data set too. A prompt or a completion is a
text, or a list of messages of which the last one's content counts. None says that a function has no opinion. A function
may be `async`.
"""

import asyncio
import importlib.util
import inspect
import math
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from functools import cache, partial, wraps
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, NamedTuple

from functional_trainer.cluster import Crew, Pools, RayPool
from functional_trainer.errors import brief, run_python
from functional_trainer.rewards.programs import check, code, code_share
from functional_trainer.rewards.shipped import (
    Function,
    Values,
    exact,
    format,
    length,
    load_math_verify,
    maths,
    repetition,
)
from functional_trainer.workers import Outcome, Pool

GIVEN = ("prompts", "completions", "completion_ids")
"""Arguments besides columns of the data set."""
NAMED = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
SLACK = 10.0
"""Seconds beyond its own limit after which a process that runs code is itself taken to hang."""


class Scores(NamedTuple):
    """What the functions said of each completion."""

    total: Values
    """Sum of weight times value over the functions that gave a value, None where none did."""
    each: dict[str, Values]
    """By function, not weighed."""
    failures: dict[str, Counter[str]]
    """By function, how many completions it failed on, by reason."""
    errors: dict[str, str]
    """By function, the first thing that went wrong."""

    def report(self) -> dict[str, float]:
        """Return mean and deviation of each function's values, and its failures by reason."""
        return moments(self.each) | self.failed

    @property
    def failed(self) -> dict[str, int]:
        """How many completions each function failed on, as "rewards/NAME/REASON"."""
        return {f"rewards/{name}/{reason}": n for name, some in self.failures.items() for reason, n in some.items()}

    def complaints(self) -> dict[str, str]:
        """Return by function that failed a sentence: on how many completions, and the first thing that went wrong."""
        found = {}
        for name, error in self.errors.items():
            lost = f"{sum(self.failures[name].values())} of {len(self.total)} answers"
            found[name] = f"reward function {name} failed on {lost}, the first time: {error}"
        return found

    @property
    def lost(self) -> bool:
        """Whether every function failed on every completion."""
        return all(sum(failures.values()) == len(self.total) for failures in self.failures.values())


def moments(each: Mapping[str, Sequence[float | None]]) -> dict[str, float]:
    """Return mean and deviation (n - 1) of each function's values under TRL's names."""
    found = {}
    for name, given in each.items():
        if values := [value for value in given if value is not None]:
            found[f"rewards/{name}/mean"] = fmean(values)
            found[f"rewards/{name}/std"] = stdev(values) if len(values) > 1 else 0.0
    return found


class Rewards:
    """Several functions by name, each with a weight (none: 1).

    The total is TRL's (GRPOTrainer): a function that gives None for a completion is left out of its sum, not counted
    as 0, and one that no function values has no reward. A function that raises is asked again for one completion at a
    time, so only those that it raises for are lost. What is lost counts as None: "raised", "wrong length" or "not a
    number" (nan and infinity are none), and for the functions in `isolate`, `maths` and `code`, which run in `workers`
    processes of their own with `memory` bytes, "timed out" (after `seconds` for one completion) or "died". With `ray`
    those processes are at so many workers of Ray, on this machine or a cluster.

    ValueError if functions and weights do not fit, or if a function cannot be called, with these columns or any.
    """

    def __init__(
        self, functions: Mapping[str, Function], weights: Sequence[float] | None = None, *,
        isolate: Iterable[str] = (), workers: int = 2, seconds: float = 10.0, memory: int = 4 << 30, ray: int = 0,
    ):  # fmt: skip
        isolate = {*isolate}
        refuse(functions, isolate, ray)
        if weights is not None and len(weights) != len(functions):
            raise ValueError(f"{len(weights)} weights for {len(functions)} reward functions: {', '.join(functions)}")
        if not all(map(math.isfinite, weights or ())):
            raise ValueError(f"weights of reward functions are {list(weights or ())}; each must be a finite number")
        self.functions = dict(functions)
        self.weights = dict(zip(functions, weights or [1.0] * len(functions), strict=True))
        hows = {name: _pooled(functions[name], seconds, memory) for name in sorted(isolated(functions, isolate))}
        self.pools: dict[str, Pool | RayPool]
        self.crew = Crew(Pools, (hows,), ray, "workers for rewards") if ray else None
        if self.crew:
            self.pools = {name: RayPool(self.crew, name, how["seconds"]) for name, how in hows.items()}
        else:
            self.pools = {name: Pool(workers=workers, **how) for name, how in hows.items()}

    def __call__(
        self, prompts: Sequence[Any], completions: Sequence[Any], completion_ids: Sequence[Sequence[int]],
        **columns: Sequence[Any],
    ) -> Scores:  # fmt: skip
        given = {"prompts": prompts, "completions": completions, "completion_ids": completion_ids, **columns}
        lengths = {name: len(values) for name, values in given.items()}
        if len({*lengths.values()}) > 1:
            raise ValueError(f"every argument has an element for each completion, but their lengths are {lengths}")
        refuse_columns(self.functions, given)
        found = {name: self._outcomes(name, given, len(completions)) for name in self.functions}
        each = {name: [outcome.value for outcome in outcomes] for name, outcomes in found.items()}
        total = [self._sum({name: values[i] for name, values in each.items()}) for i in range(len(completions))]
        failed = {name: [outcome for outcome in outcomes if outcome.failed] for name, outcomes in found.items()}
        failures = {name: Counter(outcome.failed for outcome in outcomes) for name, outcomes in failed.items()}
        errors = {name: f"{lost[0].failed}: {lost[0].details}" for name, lost in failed.items() if lost}
        return Scores(total, each, failures, errors)

    def _sum(self, values: Mapping[str, float | None]) -> float | None:
        some = [self.weights[name] * value for name, value in values.items() if value is not None]
        return sum(some) if some else None

    def _outcomes(self, name: str, given: Mapping[str, Sequence[Any]], n: int) -> list[Outcome]:
        """Return a number or None, or why there is none, for each of n completions."""
        function = self.functions[name]
        single = [{key: [values[i]] for key, values in given.items()} for i in range(n)]
        if name in self.pools:
            return [outcome if outcome.failed else outcome.value for outcome in self.pools[name].map(single)]
        try:
            values = list(_call(function, **{key: list(values) for key, values in given.items()}))
        except (Exception, SystemExit):  # what went wrong is found for each
            return [_single(function, **sample) for sample in single]
        if len(values) != n:
            return [Outcome(None, "wrong length", f"returned {len(values)} values for {n} completions")] * n
        return [_number(value) for value in values]

    def close(self) -> None:
        """End the worker processes."""
        for one in (*self.pools.values(), self.crew):
            if one:
                one.close()

    def __enter__(self) -> "Rewards":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def isolated(functions: Mapping[str, Function], isolate: Iterable[str]) -> set[str]:
    """Return the names of the functions that run in processes of their own: those that always do, and those asked."""
    return {name for name, function in functions.items() if function in ISOLATED} | {*isolate}


def refuse(functions: Mapping[str, Function], isolate: Iterable[str], ray: int = 0) -> None:
    """Raise a ValueError if functions cannot be called whatever the columns are, or isolated as is asked."""
    if ray and not isolated(functions, isolate):
        said = f"--reward.ray {ray}: workers of Ray run isolated functions only, and none of {', '.join(functions)} is"
        raise ValueError(f"{said} one; name some with --reward.isolate")
    if unknown := {*isolate} - functions.keys():
        raise ValueError(f"--reward.isolate names {sorted(unknown)}; the functions are {sorted(functions)}")
    if maths in functions.values() and importlib.util.find_spec("math_verify") is None:
        raise ValueError("maths needs math-verify, which is not installed: pip install '.[rl]'")
    for name, function in functions.items():
        named = [p.name for p in _signature(name, function).parameters.values() if p.kind in NAMED]
        refuse_columns({name: function}, [*GIVEN, *(p for p in named if p not in GIVEN)])


def refuse_columns(functions: Mapping[str, Function], names: Iterable[str]) -> None:
    """Raise a ValueError if a function cannot be called with these arguments, columns of the data set among them."""
    for name, function in functions.items():
        signature = _signature(name, function)
        try:
            signature.bind(**dict.fromkeys(names))
        except TypeError as error:
            said = f"reward function {name} cannot be called with {', '.join(names)}: {error}"
            raise ValueError(f"{said}; it takes the columns that it names, and the others as **columns") from None


def _signature(name: str, function: Function) -> inspect.Signature:
    try:
        return inspect.signature(function)
    except (TypeError, ValueError) as error:
        raise ValueError(f"reward function {name} does not say its arguments ({error}): wrap it in a `def`") from None


def _single(function: Function, **sample: Any) -> Outcome:
    """Return the number that a function gives for one completion."""
    try:
        found = _call(function, **sample)
    except (Exception, SystemExit) as error:
        return Outcome(None, "raised", brief(f"{type(error).__name__}: {error}"))
    try:
        (value,) = found
    except Exception:
        return Outcome(None, "wrong length", f"returned {brief(repr(found))} for one completion")
    return _number(value)


def _call(function: Function, **given: Any) -> Any:
    """Call a function. Coroutines run in one loop of this process: what they keep, as clients, works in no other."""
    found = function(**given)
    return asyncio.run_coroutine_threadsafe(found, _loop()).result() if asyncio.iscoroutine(found) else found


@cache
def _loop() -> asyncio.AbstractEventLoop:
    """Start a loop in a thread, as the caller's may run one already: notebooks do."""
    loop = asyncio.new_event_loop()

    def work() -> None:
        while True:
            with suppress(SystemExit):  # of a task, whose failure it is, and no end for the others
                loop.run_forever()

    threading.Thread(target=work, name="rewards", daemon=True).start()
    return loop


def _number(value: Any) -> Outcome:
    try:
        number = None if value is None else float(value)
    except Exception:
        number = math.nan
    if number is None or math.isfinite(number) and not isinstance(value, str):
        return Outcome(number)
    return Outcome(None, "not a number", f"returned {brief(repr(value))}")


# by name -------------------------------------------------------------------------------------------------------------

SHIPPED: dict[str, Function] = {
    "exact": exact, "maths": maths, "code": code, "code_share": code_share, "format": format(),
    "repetition": repetition(),
}  # fmt: skip
MADE: dict[str, tuple[type, Callable[[Any], Function]]] = {
    "format": (str, format), "length": (int, length), "repetition": (int, repetition),
}  # fmt: skip
"""What takes an argument behind a colon, and of which type."""
ISOLATED = (maths, code, code_share)


def load(given: str) -> tuple[str, Function]:
    """Return name and function of `FILE.py:NAME`, or of one that ships: `maths`, `length:512`, `format:REGEX`.

    ValueError says what there is.
    """
    head, _, name = given.rpartition(":")
    if head.endswith(".py"):
        found = run_python(Path(head), "--reward.functions").get(name)
        if not callable(found):
            raise ValueError(f"reward function {given}: {head} defines no function {name}")
        return name, found
    name, colon, argument = given.partition(":")
    if given in SHIPPED:
        return name, SHIPPED[name]
    if not colon or name not in MADE:
        made = [f"{name}:{kind.__name__}" for name, (kind, _) in MADE.items()]
        raise ValueError(f"reward function {given!r}: it can be FILE.py:NAME, {', '.join([*SHIPPED, *made])}")
    kind, make = MADE[name]
    try:
        return name, make(kind(argument))
    except ValueError as error:
        raise ValueError(f"reward function {given}: {error}") from None


@cache
def load_all(named: tuple[str, ...]) -> dict[str, Function]:
    """Return functions by name; a file is run once, it may load a model, until the cache is cleared.

    ValueError if two have the same name.
    """
    found = [load(given) for given in named]
    if len({name for name, _ in found}) < len(found):
        raise ValueError(f"--reward.functions {' '.join(named)}: two have the same name")
    return dict(found)


def conversational(function: Function) -> Function:
    """Make of a function of lists of messages, as TRL gives those of conversations, one that is given texts.

    A completion becomes the assistant's message; a prompt the column `prompt` where that is a list of messages, else
    the user's message.
    """

    @wraps(function)
    def called(prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> Values:
        both = zip(prompts, columns.get("prompt", prompts), strict=True)
        asked = [whole if isinstance(whole, list) else [{"role": "user", "content": text}] for text, whole in both]
        said = [c if isinstance(c, list) else [{"role": "assistant", "content": c}] for c in completions]
        return function(prompts=asked, completions=said, **columns)

    return called


def _pooled(function: Function, seconds: float, memory: int) -> dict[str, Any]:
    """Return the arguments of a function's pool, but for how many workers it has."""
    how: dict[str, Any] = {"function": partial(_single, function), "seconds": seconds, "memory": memory}
    if function is maths:
        return how | {"prepare": load_math_verify}
    if function in (code, code_share):  # they end what runs too long themselves: it fails, and is not without a reward
        threads = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}  # or numpy has threads, and a fork wants none
        confined = partial(_single, partial(function, seconds=seconds, memory=memory))
        return how | {"function": confined, "seconds": seconds + SLACK, "prepare": check, "environment": threads}
    return how
