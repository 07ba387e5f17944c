"""Files that may be broken: read them, and say in one short message what is wrong. Imports no torch."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def listed(problems: Sequence[str], most: int = 1200) -> str:
    """Return the first problems, one an indented line, in about `most` characters, and how many more there are."""
    text = ""
    for done, problem in enumerate(problems):
        line = f"\n  {brief(problem)}"
        if len(text) + len(line) > most:
            return f"{text}\n  ... and {len(problems) - done} more"[1:]
        text += line
    return text[1:]


def brief(text: object, most: int = 300) -> str:
    """Return the beginning of a text that may be long."""
    whole = str(text)
    return whole if len(whole) <= most else f"{whole[:most]}..."


def read_json(file: Path) -> dict[str, Any]:
    """Read a JSON object; ValueError names the file if it holds none."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # bad syntax, bytes or integers, and nesting too deep
        raise ValueError(f"{file}: not valid JSON ({brief(error)})") from None
    if not isinstance(value, dict):
        raise ValueError(f"{file}: wanted a JSON object, found {type(value).__name__}")
    return value
