"""Every kind of mistake, planted into a shipped table, is found with its row and a fix; what ships is clean."""

import math
import re
from functools import cache

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

import models
from experiments.rules import RULES, hear, shapes
from sharding_rules import P, Rules, optional, zero
from sharding_rules.lint import lint
from sharding_rules.listen import Heard
from sharding_rules.mesh import AXES, parse
from sharding_rules.rules import repeat

DATA, SEQ = ("dp", "fsdp", "ep"), ("cp", "tp")
ALL = "dp=2,fsdp=2,ep=2,cp=2,tp=2"
PRESETS = {name: config | {"num_hidden_layers": 2} for name, config in models.PRESETS.items()}
PRESETS |= {"bias": PRESETS["tiny"] | {"attention_bias": True}, "1t, every layer": models.PRESETS["1t"]}
LAYER = r"params/layers/\w+/"


@cache
def told(name):
    """Return the shapes of a preset's parameters and what it asks."""
    model = models.from_config(PRESETS[name])
    return shapes(model), hear(model)


def problems(rules, mesh="", name="tiny"):
    return lint(rules, *told(name), parse(mesh))


def table(*rows):
    """Return the table of experts with rows put before it."""
    return Rules((*rows, *RULES["qwen3_moe"].table))


def change(pattern, *entries):
    return RULES["qwen3_moe"].change({pattern: P(*entries)})


def sans_fsdp(entry):
    """Leave fsdp out, where it does not only store."""
    mixed = isinstance(entry, tuple) and not isinstance(entry, zero | repeat)
    return tuple(axis for axis in entry if axis != "fsdp") if mixed else entry


def without(pattern):
    return Rules(tuple(row for row in RULES["qwen3_moe"].table if row[0] != pattern))


PLANTED = {  # kind and tensor of every problem that is found; a part of what one says; a part of a fix
    "a parameter without a row": (
        without(LAYER + "moe/router"), "fsdp=2,ep=2",
        {("unmatched", "params/layers/0/moe/router and 1 more")},
        "no row matches", r"add a row, (r'params/layers/\w+/moe/router', P(None, zero('fsdp', 'ep')))",
    ),
    "a boundary without a row": (
        without("act/heads"), "", {("unmatched", "act/heads")}, "no row matches", "the nearest row is",
    ),
    "a layer that is a number": (
        Rules(tuple((type(p)(p.replace(r"\w+/moe", r"\d+/moe")), spec) for p, spec in RULES["qwen3_moe"].table)), "",
        {("unmatched", f"params/layers/_/moe/{name}") for name in ("router", "gate_up", "down")},
        "for all its layers alike", r"\w+, not \d+",
    ),
    "a row that matches nothing": (
        table((r"params/layers/\w+/moe/ruoter", P(None, None))), "", {("dead", "")},
        "matches no parameter", "did you mean params/layers/0/moe/router?",
    ),
    "a row below one that takes all": (
        table((LAYER + r"moe/\w+", P("ep", *[None] * 3))), "",
        {("shadowed", ""), ("dims", "params/layers/0/moe/router and 1 more"),
         ("dims", "params/layers/0/moe/down and 1 more")},
        "row 1 matches first", "move it above row 1",
    ),
    "too many entries": (
        change("act/residual", DATA, "cp", None, "tp"), "", {("dims", "act/residual")},
        "has 3 dims, the row 4 entries", "at most 3",
    ),
    "a dim that does not divide": (
        RULES["qwen3_moe"], "ep=3", {("indivisible", "params/layers/0/moe/gate_up and 1 more"),
        ("indivisible", "params/layers/0/moe/down and 1 more"), ("indivisible", "params/embed"),
        ("indivisible", "params/layers/0/attn_norm and 1 more"), ("indivisible", "params/layers/0/attn/q and 1 more"),
        ("indivisible", "params/layers/0/attn/k and 1 more"), ("indivisible", "params/layers/0/attn/v and 1 more"),
        ("indivisible", "params/layers/0/attn/o and 1 more"), ("indivisible", "params/layers/0/mlp_norm and 1 more"),
        ("indivisible", "params/layers/0/moe/router and 1 more"), ("indivisible", "params/norm"),
        ("indivisible", "params/unembed")},
        "dim 0 of (8, 2, 320, 128) does not divide into 3 parts (ep=3)", "--mesh ep=4",
    ),
    "key heads that cannot be shared": (
        change(LAYER + "attn/[kv]", "tp", None, zero("fsdp", "ep", "cp")), "tp=4",
        {("indivisible", f"params/layers/0/attn/{k} and 1 more") for k in "kv"},
        "dim 0 of (2, 32, 128)", "repeat('tp'), if ranks may share a part",
    ),
    "heads of an activation that do not divide": (
        RULES["qwen3_moe"], "cp=8", {("indivisible", "act/attn")}, "does not divide into 8 parts", "--mesh cp=4",
    ),
    "zero on a dim that does not divide": (
        change(LAYER + "moe/down", "ep", None, zero("fsdp", "cp", "tp")), "fsdp=128",
        {("indivisible", "params/layers/0/moe/down and 1 more")}, "(fsdp=128)", "for dim 1 divides",
    ),
    "axes of a dim, inner before outer": (
        change("params/(un)?embed", "tp", zero("ep", "fsdp", "cp")), "fsdp=2,ep=2",
        {("order", "params/embed"), ("order", "params/unembed")},
        "dim 1 names ep, fsdp, cp", "write P('tp', zero('fsdp', 'ep', 'cp'))",
    ),
    "one layer apart": (
        table(("params/layers/1/moe/router", P(None, None))), "fsdp=2",
        {("layers", "params/layers/1/moe/router")}, "used as params/layers/_/moe/router", "place all layers alike",
    ),
    "a giant": (
        change(LAYER + "moe/gate_up", "ep", None, None, None), ALL,
        {("giant", "params/layers/0/moe/gate_up and 1 more")},
        "whole at rest along fsdp=2 x cp=2 x tp=2", "write P('ep', None, zero('fsdp', 'cp', 'tp'), None)",
    ),
    "a giant whose zero forgets an axis": (
        change(LAYER + "moe/gate_up", "ep", None, None, zero("fsdp")), "fsdp=2,cp=2",
        {("giant", "params/layers/0/moe/gate_up and 1 more")},
        "whole at rest along cp=2: each device could save 1.2 MiB", "P('ep', None, None, zero('fsdp', 'cp'))",
    ),
    "an axis that splits nothing": (
        Rules(tuple((p, P(*map(sans_fsdp, spec))) for p, spec in RULES["qwen3_moe"].table)),
        "fsdp=2,ep=2", {("wasted", "")}, "split along fsdp=2", "put fsdp into batch/columns",
    ),
    "boundaries that no exchange joins": (
        change("act/attn", DATA, None, ("cp", "tp"), None), ALL,
        {("exchange", "act/heads > act/attn"), ("exchange", "act/attn > act/heads"),
        },
        "cannot become", "write P(('dp', 'fsdp', 'ep'), None, ('tp', 'cp'), None) for act/attn",
    ),
    "a result that is whole": (
        change("act/heads", DATA, "cp", None, None), "tp=2",
        {("whole", "act/heads"), ("maths", "params/layers/_/attn/o")},
        "made whole along tp", "split a dim of act/heads by tp",
    ),
    "weights whole, heads split": (
        change(LAYER + "attn/q", None, None, zero("fsdp", "ep", "cp", "tp")), "tp=2",
        {("maths", "act/heads")}, "split by nothing", "let both rows name the same axes",
    ),
    "a norm over a dim that is split": (
        RULES["qwen3_moe"].change({
            "act/residual": P(DATA, "cp", "tp"), r"params/(layers/\w+/)?(attn_|mlp_)?norm": P("tp"),
        }), "tp=2", {("maths", "act/residual")}, "split by tp, the parts of act/residual are together not",
        "take tp from dim 2 of act/residual and dim 0 of params/layers/_/attn_norm",
    ),
    "tokens and hidden units over one axis": (
        RULES["qwen3_moe"].change({
            LAYER + "moe/gate_up": P("ep", None, "tp", zero("fsdp", "cp")),
            LAYER + "moe/down": P("ep", zero("fsdp", "cp"), "tp"),
        }), "tp=2", {("maths", "params/layers/_/moe/gate_up")}, "tp splits", "from one of them",
    ),
    "a vocabulary split unlike": (
        change("act/vocab", DATA, "cp", None), "tp=2", {("vocabulary", "act/vocab"), ("whole", "act/vocab")},
        "dim 0 of params/unembed is split by tp, dim 2 of act/vocab by nothing", "write the same entry",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_mistake_is_found(name):
    rules, mesh, wanted, what, fix = PLANTED[name]
    found = problems(rules, mesh)
    assert {(p.kind, p.tensor) for p in found} == wanted, "\n".join(map(str, found))
    assert any(what in p.what for p in found) and any(fix in p.fix for p in found), "\n".join(map(str, found))
    rows = [f"{i}, r'{pattern}' -> {spec}" for i, (pattern, spec) in enumerate(rules.table, 1)]
    for p in found:
        assert p.row in rows or p.kind in ("unmatched", "wasted")
        assert p.what and p.fix and all(line.startswith("  ") for line in str(p).splitlines()[1:])


def test_every_kind_is_planted():
    from sharding_rules import lint as module

    kinds = {*re.findall(r"^ *(\w+) {2,}\S", module.__doc__, re.M)}
    assert {kind for _, _, wanted, *_ in PLANTED.values() for kind, _ in wanted} == kinds


def test_optional_rows_may_match_nothing():
    assert not problems(table((optional(r"params/none"), P(None))))
    assert [p.kind for p in problems(table((r"params/none", P(None))))] == ["dead"]


MESHES = st.fixed_dictionaries({axis: st.sampled_from([1, 2, 4, 8, 16]) for axis in AXES[1:]}).map(
    lambda sizes: {axis: n for axis, n in sizes.items() if n > 1}
)


@pytest.mark.parametrize("name", PRESETS)
@settings(max_examples=5, deadline=None)
@given(sizes=MESHES)
def test_what_ships_is_clean_on_every_mesh_that_divides(name, sizes):
    """And where dims do not divide, that is all that is wrong."""
    params, heard = told(name)
    rules = RULES["qwen3_moe" if any("/moe/" in path for path in params) else "qwen3"]
    found = lint(rules, params, heard, sizes)
    assert {p.kind for p in found} <= {"indivisible"}, "\n".join(map(str, found))
    heads = params["params/layers/0/attn/q"][0]
    if not heads % (sizes.get("cp", 1) * sizes.get("tp", 1)):
        assert bool(found) == fails(rules, params, sizes)


def fails(rules, params, sizes) -> bool:
    try:
        rules.fit(params, sizes)
    except ValueError:
        return True
    return False


NOTHING = Heard({}, (), frozenset(), frozenset())


@settings(max_examples=100, deadline=None)
@given(size=st.integers(1, 400), ways=st.integers(2, 40))
def test_the_size_that_is_proposed_divides(size, ways):
    rules = Rules((("params/w", P("ep")),))
    found = [p for p in lint(rules, {"params/w": (size,)}, NOTHING, {"ep": ways}) if p.kind == "indivisible"]
    assert bool(found) == bool(size % ways)
    for p in found:
        if "--mesh ep=" in p.fix:
            n = int(p.fix.split("--mesh ep=")[1].split(",")[0])
            assert n > 1 and size % n == 0
            able = [m for m in range(1, size + 1) if size % m == 0]
            assert abs(math.log(n / ways)) == min(abs(math.log(m / ways)) for m in able)


@settings(max_examples=60, deadline=None)
@given(name=st.sampled_from(["moe/gate_up", "moe/down"]), sizes=MESHES.filter(bool))
def test_the_row_that_is_proposed_for_a_giant_is_none(name, sizes):
    params, pattern = told("30b-a3b")[0], LAYER + name
    rules = change(pattern, *[None] * len(params[f"params/layers/0/{name}"]))
    giants = [p for p in lint(rules, params, NOTHING, sizes) if p.kind == "giant" and name in p.tensor]
    assert bool(giants) == bool({*sizes} - {"dp"})
    for p in giants:
        if p.fix.startswith("write "):
            fixed = rules.change({pattern: eval(p.fix.removeprefix("write "), {"P": P, "zero": zero})})
            left = [q for q in lint(fixed, params, NOTHING, sizes) if name in q.tensor]
            assert not left, "\n".join(map(str, left))
