"""Rewards that need no tests to be run: equal text, form, length, repetition, mathematics. Imports no torch."""

import logging
import re
from collections.abc import Callable, Sequence
from typing import Any

from functional_trainer.advantages import overlong_penalty

Values = list[float | None]
Function = Callable[..., Values]


def text(completion: Any) -> str:
    """Return the text of a completion: itself, or the content of the last of its messages."""
    return completion if isinstance(completion, str) else str(completion[-1]["content"])


def exact(completions: Sequence[Any], answer: Sequence[Any], **columns: Any) -> Values:
    """Return 1 where a completion is the answer, but for white space around either, else 0; None without an answer."""
    pairs = zip(completions, answer, strict=True)
    return [None if a is None else float(text(c).strip() == str(a).strip()) for c, a in pairs]


def format(pattern: str = r"<think>(?!.*<think>).*?</think>.*") -> Function:
    """Make a function that is 1 where a regex matches the whole completion, else 0; a dot is a line break too."""
    try:
        compiled = re.compile(pattern, re.DOTALL)
    except re.error as error:
        raise ValueError(f"format: {pattern!r} is not a regular expression: {error}") from None

    def function(completions: Sequence[Any], **columns: Any) -> Values:
        return [float(compiled.fullmatch(text(c)) is not None) for c in completions]

    return function


def length(longest: int, buffer: int | None = None) -> Function:
    """Make a function that is 1 up to `longest - buffer` tokens and falls linearly to 0 at `longest`.

    Without a buffer it falls from the first token on. It is DAPO's soft punishment (`advantages`) plus 1.
    """
    last = longest if buffer is None else buffer
    overlong_penalty([], longest, last)  # ValueError if they do not fit

    def function(completion_ids: Sequence[Sequence[int]], **columns: Any) -> Values:
        return [float(1 + x) for x in overlong_penalty([len(ids) for ids in completion_ids], longest, last)]

    return function


def repetition(n: int = 3) -> Function:
    """Make a function that is minus the share of n-grams of tokens that are repeated (arxiv 2502.03373, C.2)."""
    if n < 1:
        raise ValueError(f"repetition: n-grams of {n} tokens; n must be at least 1")

    def function(completion_ids: Sequence[Sequence[int]], **columns: Any) -> Values:
        grams = [[*zip(*(ids[i:] for i in range(n)), strict=False)] for ids in completion_ids]
        return [len({*some}) / len(some) - 1 if some else 0.0 for some in grams]

    return function


def maths(completions: Sequence[Any], answer: Sequence[Any], **columns: Any) -> Values:
    """Return 1 where math-verify finds a completion equal to the answer, else 0; None without one that it can parse.

    An answer is LaTeX, with or without dollars or a box around it. Of a completion counts what is boxed, else the last
    LaTeX between dollars or number.
    """
    pairs = zip(completions, answer, strict=True)
    return [None if a is None else _maths(text(c), str(a)) for c, a in pairs]


def _maths(completion: str, answer: str) -> float | None:
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

    # Outside of dollars and boxes it sees numbers only: of 2\sqrt{3} the 2.
    marked = any(mark in answer for mark in ("$", "\\boxed", "\\(", "\\["))
    # Its own time limits are alarms, for a main thread only, after which it says that an answer is wrong: none of them.
    gold = parse(answer if marked else f"\\boxed{{{answer}}}", parsing_timeout=None)
    kinds = [LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig()]
    given = parse(completion, kinds, parsing_timeout=None)
    return float(verify(gold, given, timeout_seconds=None)) if gold else None


def load_math_verify() -> None:
    """Import it, which takes a second, and have it not warn that it has no time limit."""
    import math_verify  # noqa: F401

    logging.getLogger("math_verify").setLevel(logging.ERROR)
