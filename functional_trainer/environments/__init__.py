"""Environments: what a policy talks to in several turns, and gets its reward from.

    opening = environment.reset(row)        messages, the same for the same row
    answer = environment.step(messages)     what it says to the policy's turn, what that was worth, whether it is over

An environment is made anew for every episode, and everything that an episode depends on is in its row, so that the
episodes of a group are of one kind. Both methods may be asynchronous: all environments then wait together. Imports no
torch.
"""

import importlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from functional_trainer.errors import run_python

Row = Mapping[str, Any]
Message = dict[str, Any]


class Step(NamedTuple):
    """What an environment does after a turn of the policy."""

    messages: Sequence[Message] = ()
    """What it says, of the roles user and tool; at the end of an episode nobody reads it."""
    reward: float = 0.0
    """Rewards of an episode add up."""
    done: bool = False


class Environment(Protocol):
    """One episode. Whoever derives from it writes `reset` and `step`.

    A method may take --rollout.tool-seconds, 10 s, or the episode is lost (`stage`). Methods that are no coroutines are
    called in one thread, not the main one, so signal.alarm does not work in them; behind one that took too long in
    another thread, so what belongs to a thread, as a connection of sqlite3, is lost then. `close` is not called while
    another method still runs.
    """

    tools: Sequence[Callable[..., Any] | dict[str, Any]] = ()
    """Plain functions without state, which are called for the policy (`tools.Tools`); a turn that calls some is no
    `step`. Or descriptions of tools, in OpenAI's form, whose calls `step` answers: the last message has `tool_calls`.
    """

    def reset(self, row: Row) -> Any:
        """Begin, and return the opening: messages, the last of which the policy answers. Or a coroutine that does."""

    def step(self, messages: list[Message]) -> Any:
        """Return a `Step` after a conversation that ends with a turn of the policy. Or a coroutine that does."""

    def close(self) -> Any:
        """The episode is over, however it ended. Or a coroutine."""
        return None


class Maker(Protocol):
    """What makes environments: a class, or another thing that is called, and perhaps knows its episodes."""

    def __call__(self) -> Environment:
        """Return an environment for one episode."""

    # Without files of rows: def rows() -> tuple[list[Row], list[Row]], to train on and held out, the same every time.


SHIPPED = {"calculator": "Calculator", "guess": "Guess"}


def load(given: str) -> Maker:
    """Return what makes environments: one that ships, by name, or `FILE.py:NAME`. ValueError says what there is."""
    if given in SHIPPED:
        return getattr(importlib.import_module("functional_trainer.environments.shipped"), SHIPPED[given])
    head, _, name = given.rpartition(":")
    if not head.endswith(".py"):
        raise ValueError(f"environment {given!r}: it can be FILE.py:NAME, {', '.join(SHIPPED)}")
    found = run_python(Path(head), "--rollout.environment").get(name)
    if not callable(found):
        raise ValueError(f"environment {given}: {head} defines no {name} that can be called to make one")
    return found


def rows(given: str, maker: Maker) -> tuple[list[Row], list[Row]]:
    """Return an environment's own rows, to train on and held out; ValueError if it has none."""
    make = getattr(maker, "rows", None)
    if make is None:
        raise ValueError(f"environment {given} has no `rows()` of its own: give a file of rows, --data.train")
    both = make()
    if not isinstance(both, tuple) or len(both) != 2:
        raise ValueError(f"environment {given}: rows() must return two lists of rows, to train on and held out")
    return list(both[0]), list(both[1])
