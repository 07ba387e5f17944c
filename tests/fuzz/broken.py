"""What the fuzz tests share: ways to break files and values, and what may come of it."""

import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import hypothesis
import pytest
from hypothesis import strategies as st

ROOT = Path(__file__).parents[2]
ODD_TEXT = ["", " ", "x", "yes", "null", "1e999", "\x00", "\ufeff", "é\u202e", "\udc80", "\U000f0000", "a" * 3000]
ODD: list[Any] = [None, True, False, 0, 1, -1, 3, 2**31, 10**30, 0.5, -0.5, float("nan"), float("inf"), 1e-300]
ODD += [*ODD_TEXT, [], {}, [None], ["x"], [[]], {"x": None}, [1, 2, 3]]
odd = st.sampled_from(ODD)


class Refused(NamedTuple):
    """An error in place of a result."""

    message: str


def tried(action: Callable[[], Any], *names: str) -> Any:
    """Return what `action` returns, or `Refused` if it raised one clear error; any other error fails the test.

    Clear is a ValueError (not a library's kind of one) that our own code raised, or an OSError, whose message has one
    of `names` and no long line.
    """
    try:
        return action()
    except (ValueError, OSError) as error:
        where = Path(list(traceback.walk_tb(error.__traceback__))[-1][0].f_code.co_filename)
        ours = where.is_relative_to(ROOT) and not where.is_relative_to(ROOT / "tests")
        assert isinstance(error, OSError) or type(error) is ValueError and ours, f"{type(error)} of {where}: {error}"
        assert max(map(len, str(error).splitlines())) <= 5000, f"a line is too long: {error}"
        assert any(name in str(error) for name in names), f"names none of {names}: {error}"
        return Refused(str(error))


def twice(check: Callable, cases: int, *strategies: st.SearchStrategy, examples: Sequence[tuple] = ()) -> tuple:
    """Return two tests of `check`: one of 20 cases, and a slow one of `cases`; both try the examples first."""

    def at(count: int) -> Callable:
        @hypothesis.settings(max_examples=count, suppress_health_check=list(hypothesis.HealthCheck))
        @hypothesis.given(st.tuples(*strategies))
        def test(values):
            check(*values)

        for values in examples:
            test = hypothesis.example(values)(test)
        return test

    return at(20), pytest.mark.slow(at(cases))


class Damage(NamedTuple):
    """One thing done to the bytes of a file; `at` is a fraction of its length."""

    kind: str
    at: float
    value: int

    def __call__(self, content: bytes) -> bytes:
        place = min(int(self.at * len(content)), max(len(content) - 1, 0))
        head, tail = content[:place], content[place:]
        if self.kind == "cut":
            return head
        if self.kind == "flip":
            return head + bytes([tail[0] ^ (1 << self.value % 8)]) + tail[1:] if tail else b""
        if self.kind == "insert":
            return head + bytes([self.value]) + tail
        if self.kind == "drop":
            return head + tail[1 + self.value % 16 :]
        if self.kind == "repeat":
            return head + tail[: 1 + self.value] + tail
        if self.kind == "zeros":
            return head + bytes(len(tail[: 1 + self.value])) + tail[1 + self.value :]
        return {"empty": b"", "garbage": bytes(range(256)) * 3, "more": content + b"more"}[self.kind]


KINDS = ["cut", "flip", "insert", "drop", "repeat", "zeros", "empty", "garbage", "more"]
damage = st.builds(Damage, st.sampled_from(KINDS), st.floats(0, 1), st.integers(0, 255))


def places(value: Any, path: tuple = ()) -> list[tuple]:
    """List the paths of all that a nested value holds."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [at for key, item in inside for at in [(*path, key), *places(item, (*path, key))]]


def changed(value: Any, path: tuple, act: str, new: Any) -> Any:
    """Return a nested value in which what is at `path` is replaced by `new`, left out, or under another name."""
    key, *rest = path
    if rest:
        items = value.items() if isinstance(value, dict) else enumerate(value)
        made = [(k, changed(v, tuple(rest), act, new) if k == key else v) for k, v in items]
    else:
        items = value.items() if isinstance(value, dict) else enumerate(value)
        made = [(k, new if k == key and act == "replace" else v) for k, v in items if k != key or act != "leave out"]
        if act == "rename":
            made = [(f"{k}x" if k == key else k, v) for k, v in made]
    return dict(made) if isinstance(value, dict) else [v for _, v in made]


change = st.tuples(st.floats(0, 1, exclude_max=True), st.sampled_from(["replace"] * 4 + ["leave out", "rename"]), odd)
"""Where, as a fraction of all places; what is done; the new value."""


def apply(value: Any, changes: Sequence[tuple[float, str, Any]]) -> tuple[Any, list[tuple]]:
    """Apply `change`s one after the other; return the result and the paths that they were done to."""
    done = []
    for at, act, new in changes:
        if found := places(value):
            done.append(found[int(at * len(found))])
            value = changed(value, done[-1], act, new)
    return value, done
