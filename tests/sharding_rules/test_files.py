"""Tables of users: read from Python and YAML, and refused with the line or the row that is wrong."""

import pytest
import yaml

from experiments.rules import RULES
from sharding_rules import P, Rules, optional, zero
from sharding_rules.files import load
from sharding_rules.rules import repeat
from tests.multi_rank.parity import PADDED

HEAD = "from sharding_rules.qwen3_moe import RULES as SHIPPED\nfrom sharding_rules.rules import P, Rules, zero\n"


@pytest.mark.parametrize("given", ["{}.py:MINE", "{}.py"])
def test_python(given, tmp_path):
    name = given.rpartition(":")[2] if ":" in given else "RULES"
    (tmp_path / "my.py").write_text(HEAD + f"{name} = SHIPPED.change({{'act/rows': P('dp', None)}})\n")
    rules = load(given.format(tmp_path / "my"))
    assert rules.spec("act/rows") == P("dp", None) and rules.spec("act/heads") == RULES["qwen3_moe"].spec("act/heads")


def entry(e):
    """Write an entry as a tag does."""
    return f"!{type(e).__name__} [{', '.join(e)}]" if isinstance(e, zero | repeat) else yaml.safe_dump(
        list(e) if isinstance(e, tuple) else e, default_flow_style=True).removesuffix("...\n").strip()  # fmt: skip


@pytest.mark.parametrize("rules", [*RULES.values(), Rules(PADDED)])
def test_yaml_says_all_that_a_table_can(rules, tmp_path):
    rows = []
    for pattern, spec in rules.table:
        tag = "!optional " * isinstance(pattern, optional)
        rows.append(f"- [{tag}'{pattern}', [{', '.join(map(entry, spec))}]]\n")
    (tmp_path / "my.yaml").write_text("".join(rows))
    read = load(str(tmp_path / "my.yaml"))
    assert read == rules
    kinds = lambda rules: [(type(p), *map(type, spec)) for p, spec in rules.table]  # noqa: E731
    assert kinds(read) == kinds(rules)


@pytest.mark.parametrize(
    "text, message",
    [
        (HEAD + "RULES = (\n", "my.py, line 3: "),
        (HEAD + "x = 1\n\nRULES = Rules((('a', P('fdsp')),))\n", "my.py, line 5: P('fdsp',): 'fdsp' is not"),
        (HEAD + "RULES = Rules((('a', P(zero('fsdp'), 'fsdp')),))\n", "line 3: P(zero('fsdp'), 'fsdp'): axis"),
        (HEAD + "RULES = Rules((('a(', P('fsdp')),))\n", "line 3: row 'a(': not a regular expression"),
        (HEAD + "RULES = Rules((('a', ('fsdp',)),))\n", "line 3: ('a', ('fsdp',)) is not a row; a row"),
        (HEAD + "RULES = SHIPPED.change({'act/row': P(None)})\n", "no row is 'act/row'; the nearest is 'act/rows'"),
        (HEAD + "MINE = Rules(())\n", "my.py: RULES is no Rules(...); the tables in it: SHIPPED, MINE"),
    ],
)  # fmt: skip
def test_wrong_python(text, message, tmp_path):
    (tmp_path / "my.py").write_text(text)
    with pytest.raises(ValueError) as error:
        load(str(tmp_path / "my.py"))
    assert message in str(error.value)


@pytest.mark.parametrize(
    "text, messages",
    [
        ("- [a, [fsdp, fsdp]]\n- [b, [1]]\n- [b]\n- [c, [[dp, {}]]]\n- ['d(', [tp]]\n- [e, [tp]]\n",
         ["row 1: P('fsdp', 'fsdp'): axis 'fsdp' is used twice", "row 2: 1 is no entry", "row 3: ['b'] is no row",
          "row 4: ['dp', {}] is no entry", "row 5: row 'd(': not a regular expression"]),
        ("a: b\n", ["wanted a list of rows [regex, [entry of each dim]], found dict"]),
        ("- [a, [!zeros [fsdp]]]\n", ["not valid YAML", "write !zero [axis, axis], !padded [axis, axis], "]),
        ("- [!optional [a], [fsdp]]\n", ["write !optional 'regex'"]),
        ("- [a, [\n", ["not valid YAML"]),
    ],
)  # fmt: skip
def test_wrong_yaml_is_told_row_by_row(text, messages, tmp_path):
    (tmp_path / "my.yaml").write_text(text)
    with pytest.raises(ValueError) as error:
        load(str(tmp_path / "my.yaml"))
    assert all(message in str(error.value) for message in messages), error.value
    assert "row 6" not in str(error.value)


def test_an_empty_table_is_one(tmp_path):
    (tmp_path / "my.yaml").write_text("[]")
    assert load(str(tmp_path / "my.yaml")) == Rules(())
    with pytest.raises(ValueError, match="no such file; give FILE.py, FILE.py:NAME or FILE.yaml"):
        load(str(tmp_path / "my.yml"))
