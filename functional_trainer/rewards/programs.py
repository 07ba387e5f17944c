"""Rewards of answers that are Python: their tests, run in a sandbox. Imports no torch."""

import json
import os
import re
import secrets
import sys
import time
import types
from collections.abc import Mapping, Sequence
from typing import Any

from functional_trainer import sandbox
from functional_trainer.rewards.shipped import Values, text

BLOCK = re.compile(r"```(?:python|py)?[ \t]*\n(.*?)```", re.DOTALL | re.IGNORECASE)
SECONDS, MEMORY = 10.0, 2 << 30


def code(
    completions: Sequence[Any], tests: Sequence[Any], *, seconds: float = SECONDS, memory: int = MEMORY, **columns: Any
) -> Values:
    """Return 1 where a completion's Python passes all of its tests, else 0; None without tests.

    Its code is the last fenced block, or the whole completion if there is none. A test is Python that is run after it
    as part of the same module, and passes if it raises nothing; or `{"input": TEXT, "output": TEXT}`: run as a program
    on that standard input the code ends well and prints that, but for white space at the ends of lines and of the
    whole. `sandbox` says what it can do; what takes longer than `seconds`, for all tests of a completion, fails. A
    column holds a list of tests, one test, or either as JSON. ValueError for anything else.
    """
    shares = code_share(completions, tests, seconds=seconds, memory=memory)
    return [None if share is None else float(share == 1) for share in shares]


def code_share(
    completions: Sequence[Any], tests: Sequence[Any], *, seconds: float = SECONDS, memory: int = MEMORY, **columns: Any
) -> Values:
    """Return the share of its tests that each completion passes; see `code`."""
    pairs = zip(completions, tests, strict=True)
    return [None if t is None else _share(text(c), _tests(t), seconds, memory) for c, t in pairs]


def check() -> None:
    """Raise an OSError unless a program can be confined here."""
    if sandbox.run(lambda report: print(end="ran"), b"", 10, MEMORY) != (b"ran", b"", True):
        raise OSError("a program that prints a word does not end in the sandbox")


def _tests(given: Any) -> list[Any]:
    if isinstance(given, str) and given.lstrip()[:1] in ("[", "{"):
        try:
            given = json.loads(given)
        except ValueError:
            pass  # Python that begins with a list
    tests = given if isinstance(given, list) else [given]
    right = [isinstance(t, str) or isinstance(t, Mapping) and {"input", "output"} <= t.keys() for t in tests]
    if not tests or not all(right):
        raise ValueError(f"tests are Python, or objects with input and output, at least one; not {given!r}")
    return tests


def _share(completion: str, tests: list[Any], seconds: float, memory: int) -> float:
    blocks = BLOCK.findall(completion)
    source, until = blocks[-1] if blocks else completion, time.monotonic() + seconds
    snippets = [test for test in tests if isinstance(test, str)]
    passed = _snippets(source, snippets, seconds, memory) if snippets else 0
    for test in tests:
        if not isinstance(test, str) and (left := until - time.monotonic()) > 0:
            passed += _program(source, str(test["input"]), str(test["output"]), left, memory)
    return passed / len(tests)


def _run(source: str, name: str) -> dict[str, Any]:
    """Run code as a module of that name and return what is in it."""
    module = sys.modules[name] = types.ModuleType(name)
    exec(compile(source, "<completion>", "exec"), module.__dict__)
    return module.__dict__


def _snippets(source: str, snippets: list[str], seconds: float, memory: int) -> int:
    """Count the tests that run after the code without an exception: each then reports a word that nobody can guess."""
    words = [secrets.token_bytes(16) for _ in snippets]

    def program(report: int) -> None:
        scope = _run(source, "completion")
        for snippet, word in zip(snippets, words, strict=True):
            try:
                exec(compile(snippet, "<test>", "exec"), scope)
            except (Exception, SystemExit):
                continue
            os.write(report, word)

    report = sandbox.run(program, b"", seconds, memory).report
    return sum(word in report for word in words)


def _program(source: str, given: str, wanted: str, seconds: float, memory: int) -> bool:
    """Tell whether the code, run as a program, prints what is wanted and ends well."""
    ran = sandbox.run(lambda report: _run(source, "__main__"), given.encode(), seconds, memory)
    return ran.ended and _lines(ran.output.decode(errors="replace")) == _lines(wanted)


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.rstrip().splitlines()]
