"""Run configuration: nested frozen dataclasses as a command line and as YAML.

Field docstrings are the help texts. YAML follows the 1.2 core schema, so that `off` is a string and `1e-3` a float,
whatever YAML 1.1 says. Nothing is ignored: unknown, repeated and mistyped keys raise, all in one error. Imports no
torch, so that `--help` is instant.
"""

import argparse
import dataclasses
import difflib
import faulthandler
import os
import re
import reprlib
import sys
import traceback
import types
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import tyro
import yaml

from functional_trainer.errors import brief

T = TypeVar("T")
INVALID = (yaml.YAMLError, ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError)
"""What PyYAML raises; the built-in ones for a tag such as !!int before what is none."""
SHORT = reprlib.Repr()  # a value in a message: nested aliases may stand for billions
SHORT.maxstring = 80
SCALARS = {
    "null": r"~|null|",
    "bool": r"true|false",
    "int": r"[-+]?(?:0|[1-9][0-9_]*)",
    "float": r"[-+]?(?:\.[0-9]+|[0-9][0-9_]*(?:\.[0-9_]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.inf|\.nan",
}


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict = {}

    def construct_mapping(self, node, deep=False):
        keys = [k.value for k, _ in node.value]
        if repeated := sorted({str(k) for k in keys if keys.count(k) > 1}):
            raise yaml.constructor.ConstructorError(None, None, f"repeated key {', '.join(repeated)}", node.start_mark)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Quotes what YAML 1.1 and 1.2 read differently."""

    def ignore_aliases(self, data):
        return True

    def represent_str(self, data):
        return self.represent_scalar("tag:yaml.org,2002:str", data, style=None if data.isprintable() else '"')


_Dumper.add_representer(str, _Dumper.represent_str)

for _tag, _pattern in SCALARS.items():
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), None)


def cli(cls: type[T], *, doc: str, argv: Sequence[str] | None = None) -> T:
    """Parse `argv` (default: `sys.argv[1:]`) into `cls`; `--config FILE.yaml` is read first and flags override it.

    Prints one message and exits with status 2 on bad input. `--config` may be repeated: later files override earlier.
    """
    pre = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    pre.add_argument("--config", action="append", default=[])
    known, rest = pre.parse_known_args(sys.argv[1:] if argv is None else list(argv))
    default: T | None = None
    try:
        for path in known.config:
            default = load(cls, path, default)
    except ValueError as error:
        print(f"--config: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    usage = "--config FILE.yaml is read first; the flags below override it (config.yaml of a run folder will do)."
    start = tyro.MISSING_NONPROP if default is None else default
    return tyro.cli(cls, description=f"{doc.strip()}\n\n{usage}", args=rest, default=start)


def run(main: Callable[[T], None], cls: type[T], *, doc: str) -> None:
    """Parse the command line and call `main` with it; an error of our own or of the system is one message, status 1.

    torchrun reports the first error of all ranks as the cause. A crash below Python prints the stacks of all threads.
    """
    faulthandler.enable()
    options = cli(cls, doc=doc)
    if "TORCHELASTIC_ERROR_FILE" in os.environ:
        from torch.distributed.elastic.multiprocessing.errors import record

        main = record(main)
    try:
        main(options)
    except (ValueError, OSError, RuntimeError) as error:
        raised_in = Path(list(traceback.walk_tb(error.__traceback__))[-1][0].f_code.co_filename)
        ours = raised_in.is_relative_to(Path(__file__).resolve().parents[1]) and "site-packages" not in raised_in.parts
        if not ours and not isinstance(error, OSError):
            raise
        own = error.strerror if isinstance(error, OSError) and not error.filename else None  # without "[Errno 28]"
        sys.exit(f"error: {own or error}")
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise SystemExit(130) from None


def dump(config: Any, path: str | Path) -> None:
    """Write a dataclass instance as YAML in field order, such that `load` gives an equal one."""
    text = yaml.dump(_plain(config), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)
    partial = Path(f"{path}.tmp")
    partial.write_text(text, encoding="utf-8", newline="\n")
    partial.replace(path)  # whole at every instant, whatever is killed


def flags(config: Any, prefix: str = "--") -> dict[str, Any]:
    """Return the value of every option by its flag; a list is one value."""
    found: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        flag, value = prefix + field.name.replace("_", "-"), getattr(config, field.name)
        found |= flags(value, f"{flag}.") if dataclasses.is_dataclass(value) else {flag: value}
    return found


def load(cls: type[T], path: str | Path, default: T | None = None) -> T:
    """Read a YAML file into `cls`; absent keys come from `default` or from the fields' own defaults.

    Raises one ValueError that lists every unknown, missing or mistyped key of the file, with what would be right; also
    if it cannot be read.
    """
    try:
        data = yaml.load(Path(path).read_text(encoding="utf-8"), Loader=_Loader)
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None
    except INVALID as error:
        raise ValueError(f"{path} is not valid YAML: {brief(error)}") from None
    problems: list[str] = []
    names = list(_names(cls))
    config = _dataclass(cls, data, "", default, problems, names)
    if problems:
        raise ValueError(f"{path}:\n" + "\n".join(f"  {brief(p)}" for p in problems))
    return config


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value) if f.init}
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(v) for v in value]
    return str(value) if isinstance(value, Path) else value


def _names(cls: Any, prefix: str = "") -> Iterator[str]:
    """Yield every dotted name that a file may set, sections included."""
    for name, hint in get_type_hints(cls).items():
        yield prefix + name
        if dataclasses.is_dataclass(hint):
            yield from _names(hint, f"{prefix}{name}.")


def _suggest(key: str, names: list[str]) -> str:
    def score(name: str) -> float:
        same_section = key.rpartition(".")[0] == name.rpartition(".")[0]
        last = difflib.SequenceMatcher(None, key.rpartition(".")[2], name.rpartition(".")[2]).ratio()
        return max(last, difflib.SequenceMatcher(None, key, name).ratio()) + 0.01 * same_section

    best = max(names, key=score)
    if best == key:
        return f"write it nested, {key.replace('.', ': {')}: ...{'}' * key.count('.')}"
    return f"did you mean {best}?"


def _dataclass(cls: Any, data: Any, prefix: str, default: Any, problems: list[str], names: list[str]) -> Any:
    """Build `cls` from a mapping, appending to `problems`; returns None when there are any."""
    if data is None:
        data = {}
    if not isinstance(data, dict):
        problems.append(f"{prefix.rstrip('.') or 'the file'}: expected a mapping of options, got {_show(data)}")
        return None
    fields = {f.name: f for f in dataclasses.fields(cls) if f.init}
    unknown = [brief(f"{prefix}{key}", 80) for key in data if key not in fields]
    problems += [f"{key}: {_suggest(key, names)}" for key in unknown]
    hints, before, kwargs = get_type_hints(cls), len(problems), {}
    for name, field in fields.items():
        start = getattr(default, name, None) if default is not None else _default(field)
        if name in data and dataclasses.is_dataclass(hints[name]):
            section = None if start is dataclasses.MISSING else start
            kwargs[name] = _dataclass(hints[name], data[name], f"{prefix}{name}.", section, problems, names)
        elif name in data:
            kwargs[name] = _value(hints[name], data[name], f"{prefix}{name}", problems)
        elif start is dataclasses.MISSING:
            problems.append(f"{prefix}{name}: missing, expected {describe(hints[name])}")
        else:
            kwargs[name] = start
    if len(problems) > before:
        return None
    try:
        return cls(**kwargs)
    except ValueError as error:  # the class's own __post_init__
        problems.append(f"{prefix.rstrip('.')}: {error}" if prefix else str(error))
        return None


def _default(field: dataclasses.Field) -> Any:
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def _value(hint: Any, value: Any, key: str, problems: list[str]) -> Any:
    """Convert a YAML value to the type `hint`, appending to `problems` when it does not fit."""
    origin, args = get_origin(hint), get_args(hint)
    if dataclasses.is_dataclass(hint):
        return _dataclass(hint, value, f"{key}.", None, problems, list(_names(hint, f"{key}.")))
    if origin in (Union, types.UnionType):
        for member in args:
            trial: list[str] = []
            result = _value(member, value, key, trial)
            if not trial:
                return result
    elif origin in (tuple, list) and isinstance(value, list):
        repeated = origin is list or args[-1:] == (...,)
        hints = [args[0]] * len(value) if repeated else list(args)
        if len(hints) == len(value):
            pairs = zip(hints, value, strict=True)
            return origin(_value(h, v, f"{key}[{i}]", problems) for i, (h, v) in enumerate(pairs))
    elif origin is dict and isinstance(value, dict):
        return {_value(args[0], k, key, problems): _value(args[1], v, f"{key}.{k}", problems) for k, v in value.items()}
    elif origin is Literal and any(value == a and type(value) is type(a) for a in args):
        return value
    elif hint is float and (type(value) is float or type(value) is int and abs(value) < 10**308):
        return float(value)
    elif hint is Path and type(value) is str:
        return Path(value)
    elif hint is Any or type(value) is hint or (hint is type(None) and value is None):
        return value
    problems.append(f"{key}: expected {describe(hint)}, got {_show(value)}")
    return None


def describe(hint: Any) -> str:
    """Say in a few words what values a type takes."""
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(describe(a) for a in args)
    if origin is Literal:
        return " | ".join(map(str, args))
    if origin in (tuple, list):
        repeated = origin is list or args[-1:] == (...,)
        return f"a list of {describe(args[0])}" if repeated else f"[{', '.join(map(describe, args))}]"
    return "null" if hint is type(None) else "a path" if hint is Path else getattr(hint, "__name__", str(hint))


def _show(value: Any) -> str:
    return "null" if value is None else f"{type(value).__name__} {SHORT.repr(value)}"
