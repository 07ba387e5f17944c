"""Tables that users write: `FILE.py[:NAME]` holds a `Rules`, `FILE.yaml` a list of rows.

    - ['params/layers/\\w+/moe/down', [ep, !zero [fsdp, cp, tp], null]]
    - [!optional 'params/layers/\\w+/attn/q_bias', [tp, null]]
    - ['act/kv_attn', [[dp, fsdp, ep], null, !repeat [tp, cp], null]]

Regexes of YAML stand in single quotes, where backslashes are themselves.
"""

from pathlib import Path
from typing import Any

import yaml

from functional_trainer.errors import run_python
from sharding_rules.rules import P, Rules, optional, padded, repeat, zero


def load(given: str) -> Rules:
    """Read a table; ValueError says where it is wrong, of a YAML file in all rows."""
    head, _, name = given.rpartition(":")
    file, name = (Path(head), name) if head.endswith(".py") else (Path(given), "RULES")
    if file.suffix not in (".py", ".yaml", ".yml") or not file.is_file():
        raise ValueError(f"--rules {given}: no such file; give FILE.py, FILE.py:NAME or FILE.yaml")
    return _python(file, name) if file.suffix == ".py" else _yaml(file)


def _python(file: Path, name: str) -> Rules:
    """Run a file and take the table that it calls `name`."""
    scope = run_python(file)
    if not isinstance(scope.get(name), Rules):
        tables = [key for key, value in scope.items() if isinstance(value, Rules)]
        raise ValueError(f"{file}: {name} is no Rules(...); the tables in it: {', '.join(tables) or 'none'}")
    return scope[name]


class _Loader(yaml.SafeLoader):
    """YAML with !zero, !padded, !repeat and !optional."""


def _axes(loader: yaml.SafeLoader, tag: str, node: yaml.Node) -> zero | repeat:
    """Read `!zero [axis, axis]`, `!padded [axis, axis]` or `!repeat [axis, axis]`."""
    kinds: dict[str, type[zero] | type[repeat]] = {"zero": zero, "padded": padded, "repeat": repeat}
    if not isinstance(node, yaml.SequenceNode) or tag not in kinds:
        raise yaml.YAMLError(f"!{tag}{node.start_mark}: write {', '.join(f'!{kind} [axis, axis]' for kind in kinds)}")
    return kinds[tag](*loader.construct_sequence(node))


def _optional(loader: yaml.SafeLoader, node: yaml.Node) -> optional:
    """Read `!optional 'regex'`."""
    if not isinstance(node, yaml.ScalarNode):
        raise yaml.YAMLError(f"!optional{node.start_mark}: write !optional 'regex'")
    return optional(loader.construct_scalar(node))


_Loader.add_multi_constructor("!", _axes)
_Loader.add_constructor("!optional", _optional)


def _yaml(file: Path) -> Rules:
    """Read a list of [regex, [entry of each dim]]."""
    try:
        rows = yaml.load(file.read_text("utf-8"), Loader=_Loader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is not valid YAML: {error}") from None
    if not isinstance(rows, list):
        raise ValueError(f"{file}: wanted a list of rows [regex, [entry of each dim]], found {type(rows).__name__}")
    table, wrong = [], []
    for number, row in enumerate(rows, 1):
        try:
            table.append(_row(row))
        except ValueError as error:
            wrong.append(f"{file}, row {number}: {error}")
    if wrong:
        raise ValueError("\n".join(wrong))
    return Rules(tuple(table))


def _row(row: Any) -> tuple[str, P]:
    """Read one row; ValueError if it is none."""
    if not (isinstance(row, list) and len(row) == 2 and isinstance(row[0], str) and isinstance(row[1], list)):
        raise ValueError(f"{row!r} is no row; write ['regex', [entry of each dim]]")
    for entry in row[1]:
        if not all(isinstance(axis, str) for axis in (entry if isinstance(entry, list | tuple) else [entry or ""])):
            kinds = "axis, [axis, axis], !zero [axis], !padded [axis], !repeat [axis] or null"
            raise ValueError(f"{entry!r} is no entry; write {kinds}")
    spec = P(*(tuple(entry) if isinstance(entry, list) else entry for entry in row[1]))
    return Rules(((row[0], spec),)).table[0]
