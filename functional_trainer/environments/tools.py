"""Tools: plain typed functions that a policy calls by name, with arguments in JSON.

The description that a chat template gets comes from a function's signature and docstring (Google's form), and arguments
are checked against it. Functions run in processes that can be killed. Whatever goes wrong, in the call, in the function
or because it takes too long, is answered by a text that the policy reads. Imports no torch.
"""

import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import NoneType, UnionType
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

from functional_trainer.cluster import RayPool
from functional_trainer.errors import brief
from functional_trainer.workers import Pool

KINDS = {str: "string", int: "integer", float: "number", bool: "boolean", list: "array", dict: "object"}
VALUES: dict[str, Any] = {name: kind for kind, name in KINDS.items()} | {"number": (int, float)}
MEMORY = 4 << 30
"""Bytes of data of a process."""
SECTIONS = ("Args:", "Arguments:", "Returns:", "Yields:", "Raises:", "Example:", "Examples:", "Note:", "Notes:")


class Call(NamedTuple):
    """What a policy asks for; `wrong` says why it cannot be read as a call."""

    name: str
    arguments: Mapping[str, Any]
    wrong: str = ""


class Result(NamedTuple):
    """What the policy is told, and whether that is an error."""

    text: str
    failed: bool


def schema(function: Callable[..., Any]) -> dict[str, Any]:
    """Describe a function as chat templates want it: OpenAI's form, {"type": "function", "function": {...}}.

    ValueError unless each parameter has a type of JSON (str, int, float, bool, list, dict, Literal, one of them or
    None) and a line under `Args:`.
    """
    name = getattr(function, "__name__", repr(function))
    parameters = inspect.signature(function).parameters
    hints = get_type_hints(function)
    summary, said = _documented(inspect.getdoc(function) or "")
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    if odd := [p for p, parameter in parameters.items() if parameter.kind not in named]:
        raise ValueError(f"tool {name}: a model gives arguments by name, so it cannot have {odd[0]}")
    if not summary:
        raise ValueError(f"tool {name} has no docstring: a model reads there what it does")
    if odd := [p for p in parameters if p not in hints]:
        raise ValueError(f"tool {name}: {odd[0]} has no type: write {odd[0]}: int, or another type of JSON")
    if odd := [p for p in parameters if p not in said]:
        raise ValueError(f"tool {name}: its docstring has no line for {odd[0]} under `Args:`")
    try:
        properties = {p: _kind(hints[p]) | {"description": said[p]} for p in parameters}
    except (KeyError, TypeError):
        kinds = ", ".join(kind.__name__ for kind in KINDS)
        raise ValueError(f"tool {name}: a type is none of JSON's: {kinds}, Literal, or one of them or None") from None
    taken: dict[str, Any] = {"type": "object", "properties": properties}
    if required := [p for p, parameter in parameters.items() if parameter.default is inspect.Parameter.empty]:
        taken["required"] = required
    return {"type": "function", "function": {"name": name, "description": summary, "parameters": taken}}


def _documented(text: str) -> tuple[str, dict[str, str]]:
    """Split a docstring into what stands before its sections, and what it says of each argument."""
    lines = text.splitlines()
    starts = [i for i, line in enumerate(lines) if line in SECTIONS] + [len(lines)]
    said: dict[str, str] = {}
    for start, end in zip(starts, starts[1:], strict=False):
        block = [line for line in lines[start + 1 : end] if line.strip()] if lines[start].startswith("Arg") else []
        depth = min((len(line) - len(line.lstrip()) for line in block), default=0)
        for line in block:
            if len(line) - len(line.lstrip()) == depth:
                name, _, about = line.strip().partition(":")
                said[last := name.split(" ")[0]] = about.strip()
            else:
                said[last] += " " + line.strip()
    return "\n".join(lines[: starts[0]]).strip(), said


def _kind(annotation: Any) -> dict[str, Any]:
    """Return the JSON schema of a type; KeyError or TypeError for one that JSON does not have."""
    origin, inner = get_origin(annotation) or annotation, get_args(annotation)
    if origin in (Union, UnionType):
        (only,) = _one_of(inner)
        return _kind(only) | {"nullable": True}
    if origin is Literal:
        (kind,) = {type(value) for value in inner}
        return {"type": KINDS[kind], "enum": list(inner)}
    if origin is list and inner:
        return {"type": "array", "items": _kind(inner[0])}
    if origin is dict and inner:
        return {"type": "object", "additionalProperties": _kind(inner[1])}
    return {"type": KINDS[origin]}


def _one_of(types: tuple[Any, ...]) -> list[Any]:
    some = [kind for kind in types if kind is not NoneType]
    if len(some) != 1:
        raise TypeError("a union of several types")
    return some


def wrong(value: Any, wanted: Mapping[str, Any], where: str) -> str:
    """Return why a value is not what a schema wants, or nothing."""
    if value is None and wanted.get("nullable"):
        return ""
    kind = wanted["type"]
    if not isinstance(value, VALUES[kind]) or isinstance(value, bool) and kind != "boolean":
        return f"{where} is {brief(json.dumps(value), 60)}, expected {'an' if kind[0] in 'aeiou' else 'a'} {kind}"
    if value not in wanted.get("enum", [value]):
        return f"{where} is {brief(json.dumps(value), 60)}, expected one of {json.dumps(wanted['enum'])}"
    inner: list[tuple[Any, Any, str]] = []
    if "items" in wanted:
        inner = [(element, wanted["items"], f"{where}[{i}]") for i, element in enumerate(value)]
    if "additionalProperties" in wanted:
        inner = [(element, wanted["additionalProperties"], f"{where}.{key}") for key, element in value.items()]
    return next(filter(None, (wrong(*one) for one in inner)), "")


def schemas(functions: Sequence[Callable[..., Any]]) -> dict[str, dict[str, Any]]:
    """Describe functions, by name; ValueError if two have the same."""
    found = {(s := schema(function))["function"]["name"]: s for function in functions}
    if len(found) < len(functions):
        raise ValueError(f"two tools have the same name: there are {len(functions)}, named {', '.join(found)}")
    return found


def pooled(functions: Sequence[Callable[..., Any]], seconds: float) -> dict[str, Any]:
    """Return the arguments of a `workers.Pool` that calls functions by name."""
    named = dict(zip(schemas(functions), functions, strict=True))
    return {"function": partial(_call, named), "seconds": seconds, "memory": MEMORY}


class Tools:
    """Functions by name, called in `workers` processes or in `pool`, each call within `seconds`; close it when done."""

    def __init__(
        self, functions: Sequence[Callable[..., Any]], workers: int = 2, seconds: float = 10.0,
        pool: RayPool | None = None,
    ):  # fmt: skip
        described = schemas(functions)
        self.schemas = [*described.values()]
        self.taken = {name: s["function"]["parameters"] for name, s in described.items()}
        self.pool = pool or Pool(workers=workers, **pooled(functions, seconds))

    def __call__(self, calls: Sequence[Call]) -> list[Result]:
        """Answer calls, in order."""
        problems = [self._wrong(call) for call in calls]
        good = [call for call, problem in zip(calls, problems, strict=True) if not problem]
        found = iter(self.pool.map([{"name": call.name, "arguments": call.arguments} for call in good]))
        return [Result(f"Error: {problem}", True) if problem else _told(next(found)) for problem in problems]

    def _wrong(self, call: Call) -> str:
        """Return why a call cannot be made, or nothing."""
        if call.wrong:
            return call.wrong
        if call.name not in self.taken:
            return f"there is no tool {brief(call.name, 60)}, only {', '.join(self.taken)}"
        taken = self.taken[call.name]
        if missing := [name for name in taken.get("required", ()) if name not in call.arguments]:
            return f"{call.name} needs {missing[0]}"
        if unknown := [name for name in call.arguments if name not in taken["properties"]]:
            return f"{call.name} takes {', '.join(taken['properties']) or 'nothing'}, not {brief(unknown[0], 60)}"
        given = ((value, taken["properties"][name], name) for name, value in call.arguments.items())
        return next(filter(None, (wrong(*one) for one in given)), "")

    def close(self) -> None:
        """End the processes."""
        self.pool.close()


def _call(named: Mapping[str, Callable[..., Any]], name: str, arguments: Mapping[str, Any]) -> str:
    found = named[name](**arguments)
    return found if isinstance(found, str) else json.dumps(found, ensure_ascii=False)


def _told(outcome: Any) -> Result:
    """Say what came of a call: what was raised is told as it is, a time limit too."""
    if not outcome.failed:
        return Result(outcome.value, False)
    return Result(f"Error: {outcome.details}", True)
