"""Files that may be broken: read them, and say in one short message what is wrong. Imports no torch."""

import json
import runpy
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def brief(text: object, most: int = 300) -> str:
    """Return the beginning of a text that may be long."""
    whole = str(text)
    return whole if len(whole) <= most else f"{whole[:most]}..."


def listed(problems: Sequence[str], most: int = 20) -> str:
    """Return the first of many problems, each briefly on a line of its own, and how many more there are."""
    more = [f"... and {len(problems) - most} more"] if len(problems) > most else []
    return "".join(f"\n  {brief(problem)}" for problem in [*problems[:most], *more])


def read_json(file: Path) -> dict[str, Any]:
    """Read a JSON object; ValueError names the file if it holds none."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
        json.dumps(value, ensure_ascii=False).encode()  # a lone surrogate is no text
    except (ValueError, RecursionError) as error:  # bad syntax, bytes or integers, and nesting too deep
        raise ValueError(f"{file}: not valid JSON ({brief(error)})") from None
    if not isinstance(value, dict):
        raise ValueError(f"{file}: wanted a JSON object, found {type(value).__name__}")
    return value


def run_python(file: Path, flag: str = "") -> dict[str, Any]:
    """Run a Python file and return what it defines; ValueError names the file and the line where it fails.

    It can import what is beside it, first while it runs, and behind all else whenever it is called later. `flag` is
    what named the file.
    """
    if not file.is_file():
        raise ValueError(f"{flag} {file}: No such file".lstrip())
    folder = str(file.parent.resolve())
    sys.path.insert(0, folder)
    try:
        return runpy.run_path(str(file))
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        lines = [frame.lineno for frame in frames if Path(frame.filename).resolve() == file.resolve()]
        line = error.lineno if isinstance(error, SyntaxError) else lines[-1] if lines else 0
        kind = "" if type(error) is ValueError else f"{type(error).__name__}: "
        raise ValueError(f"{file}, line {line}: {kind}{error}") from error
    finally:
        sys.path.remove(folder)
        sys.path += [] if folder in sys.path else [folder]
