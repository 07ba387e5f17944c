"""What `explain` says is what a sharder does: placements, shapes and bytes; and a trillion parameters take seconds."""

import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import hypothesis.strategies as st
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings

import models
from experiments import rules
from functional_trainer import config, tree
from sharding_rules import explain
from sharding_rules.mesh import AXES, Mesh, parse
from sharding_rules.sharder import Sharder
from tests.sharding_rules import golden

SCRIPT = Path(__file__).parents[2] / "experiments" / "rules.py"
MIXED = golden.GOLDEN["tiny-mixed-fsdp2xep2"]


def run(*words, cwd="."):
    """Run the script piped, and return its exit status and what it prints."""
    done = subprocess.run([sys.executable, SCRIPT, *words], cwd=cwd, capture_output=True, text=True, env=os.environ)
    return done.returncode, done.stdout + done.stderr


def placed(hf, mesh):
    return explain.explain(rules.RULES[hf["model_type"]], rules.shapes(models.from_config(hf)), parse(mesh))


@pytest.mark.parametrize("hf", [MIXED, models.PRESETS["dense-0.6b"] | {"num_hidden_layers": 1}])
@pytest.mark.parametrize(
    "axes", [("fsdp", "ep"), ("fsdp", "cp"), ("dp", "fsdp"), ("cp", "tp"), ("fsdp", "tp"), ("tp",)]
)
def test_it_is_what_a_rank_holds(hf, axes):
    """On a mesh of four ranks, of which rank 0 is here."""
    sizes = dict.fromkeys(axes, 2) if len(axes) == 2 else {axes[0]: 4}
    model = models.from_config(hf)
    try:
        shard = Sharder.of(rules.RULES[hf["model_type"]], golden.mesh(Mesh(**({"fsdp": 1} | sizes))), model.specs)
        leaves = tree.flatten(model.init(0, shard=shard))
        found = explain.explain(rules.RULES[hf["model_type"]], rules.shapes(model), sizes)
        assert sum(len(g.paths) for g in found) == len(leaves)
        for g in found:
            for path in g.paths:
                x = leaves[path.removeprefix("params/")]
                assert (tuple(x.shape), tuple(shard.storage(x).shape)) == (g.shape, g.rest_shape)
                assert shard.where(path) == g.use and math.prod(g.use_shape) >= math.prod(g.rest_shape)
        stored = sum(shard.storage(x).numel() for x in leaves.values())
        assert sum(g.held for g in found) == stored
        assert (stored / models.count(model) < 0.251) == (axes != ("dp", "fsdp"))  # nothing but dp keeps copies
    finally:
        dist.destroy_process_group()


@settings(max_examples=50, deadline=None)
@given(st.fixed_dictionaries({axis: st.sampled_from([1, 2, 4]) for axis in AXES[1:]}))
def test_parts_add_up(sizes):
    """What devices hold is the model, once for each rank of dp and of axes that leave a tensor whole."""
    mesh = {axis: n for axis, n in sizes.items() if n > 1}
    model = models.from_config(models.PRESETS["30b-a3b"] | {"num_hidden_layers": 2})
    for g in explain.explain(rules.RULES["qwen3_moe"], rules.shapes(model), mesh):
        copies = math.prod(n for axis, n in mesh.items() if not any(axis in dim for dim in g.rest))
        assert g.held * math.prod(mesh.values()) == len(g.paths) * math.prod(g.shape) * copies


def test_layers_are_put_together_when_they_are_alike():
    names = {g.name: len(g.paths) for g in placed(MIXED, "fsdp=2")}
    assert names["params/layers/*/attn/q"] == 2 and names["params/layers/*/mlp/down"] == 1
    odd = rules.RULES["qwen3_moe"].change({})
    apart = explain.Rules((("params/layers/1/attn/q", odd.spec("params/layers/0/attn/q")), *odd.table))
    found = explain.group(apart, rules.shapes(models.from_config(MIXED)))
    assert [g.row for g in found if g.name == "params/layers/*/attn/q"] == [3, 0]


def test_what_is_gathered_is_the_largest_layer():
    found = placed(MIXED, "fsdp=2,ep=2")
    alone = {}
    for g in found:
        for path in g.paths:
            layer = path.split("/")[2] if "layers" in path else ""
            alone[layer] = alone.get(layer, 0) + math.prod(g.use_shape)
    assert explain.gathered(found) == max(alone["0"], alone["1"])


def test_sizes_are_read_by_people():
    assert [explain.size(n, torch.float32) for n in (0, 3, 256, 384, 2**28)] == [
        "0 B",
        "12 B",
        "1 KiB",
        "1.50 KiB",
        "1 GiB",
    ]


def test_a_trillion_parameters_on_a_laptop():
    began = time.perf_counter()
    status, text = run("explain", "--model", "1t", "--mesh", "fsdp=64,ep=8")
    assert status == 0 and time.perf_counter() - began < 60
    flat = " ".join(text.replace("│", " ").split())
    assert "1,042,174,423,296 parameters, 3.79 TiB. A device stores 7.58 GiB, and gathers 4.19 GiB" in flat
    assert "params/layers/*/moe/gate_up 61 x ep, -, -, fsdp ep, -, -, -" in flat
    assert "act/tokens -> P(('dp', 'fsdp', 'ep'), ('cp', 'tp'), None) fsdp ep, -, -" in flat
    assert max(map(len, text.splitlines())) <= 140


def test_lint_says_what_it_checked_and_exits(tmp_path, capsys):
    rules.main(rules.Options("lint", mesh="fsdp=2,ep=2"))
    assert (
        "no problem(s): 26 rows, 25 parameters, 13 boundaries, 14 regions on fsdp=2 x ep=2\n" in capsys.readouterr().out
    )
    status, text = run("lint", "--mesh", "ep=3", cwd=tmp_path)
    assert status == 1 and "indivisible: params/layers/0/moe/down and 1 more\n  row  14, " in text


@pytest.mark.parametrize(
    "given, message",
    [
        ({"mesh": "pp=2"}, "--mesh pp=2: pipeline stages do not exist yet; use dp, fsdp, ep, cp and tp"),
        ({"mesh": "ep=3"}, "params/norm: dim 0 of (128,) does not divide into 3 shards"),
        ({"model": "2t"}, "--model 2t: no folder, and no preset; these are: 30b-a3b"),
        ({"rules": "none.py"}, "--rules none.py: no such file"),
    ],
)
def test_wrong_flags_are_refused(given, message):
    with pytest.raises(ValueError) as error:
        rules.main(rules.Options("explain", **given))
    assert message in str(error.value)


def test_a_folder_is_a_model_too(tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps(MIXED))
    rules.main(config.cli(rules.Options, doc="", argv=["explain", "--model", str(tmp_path)]))
    assert "on one device" in capsys.readouterr().out


@pytest.mark.parametrize(
    "text, sizes",
    [("", {}), ("ep=8,fsdp=64", {"fsdp": 64, "ep": 8}), (" tp = 2 , dp=1", {"tp": 2}), ("cp=1", {})],
)
def test_meshes_are_read(text, sizes):
    assert parse(text) == sizes and list(parse(text)) == list(sizes)


@pytest.mark.parametrize("text", ["fsdp", "fsdp=0", "fsdp=x", "fdsp=2", "ep=2,ep=2", "fsdp=-2", "8"])
def test_wrong_meshes_are_refused(text):
    with pytest.raises(ValueError, match="is wrong; write it as fsdp=64,ep=8, of dp, fsdp, ep, cp, tp"):
        parse(text)


ODD = MIXED | {"decoder_sparse_step": 2, "mlp_only_layers": [0], "num_hidden_layers": 5}


@pytest.mark.parametrize("hf", [{"model_type": "qwen3"}, {"model_type": "qwen3_moe"}, MIXED | {"num_experts": 0}, ODD])
def test_what_is_heard_has_the_true_sizes(hf):
    model = models.from_config(hf)
    heard, c = rules.hear(model), model.config
    assert heard.shapes["act/residual"] == ((None, None, c.dim),)
    assert heard.shapes["act/kv_attn"] == ((None, None, c.kv_heads, c.head_dim),)
    kinds = {path.split("/")[3] for path in rules.shapes(model) if path.startswith("params/layers/")}
    assert {path.split("/")[3] for path in heard.shapes if path.startswith("params/layers/")} == kinds
