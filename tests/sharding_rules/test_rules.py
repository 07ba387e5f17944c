"""The table: one matcher, no catch-all, and an error that names what is wrong before any rank computes."""

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import Replicate, Shard

import models
from functional_trainer import tree
from sharding_rules import P, Rules, Sharder, optional, zero
from sharding_rules.mesh import Mesh, make
from sharding_rules.rules import placements
from tests.sharding_rules import golden

PRESETS = {name: config | {"num_hidden_layers": 2} for name, config in models.PRESETS.items()}
FAMILY = {"qwen3": "dense-0.6b", "qwen3_moe": "tiny"}


@pytest.fixture
def mesh():
    """Four ranks, fsdp2 x ep2, of which rank 0 is here."""
    yield golden.mesh(Mesh(fsdp=2, ep=2))
    dist.destroy_process_group()


def test_whole_path_first_row_wins():
    rules = Rules(((r"a/\w+/q", P("fsdp")), (r"a/0/\w+", P("ep")), (r"a/.*", P(None))))
    assert rules.spec("a/0/q") == P("fsdp")
    assert rules.spec("a/0/k") == P("ep")
    assert rules.spec("a/1/k") == P(None)
    for path in ("a", "xa/0/q", "b"):
        with pytest.raises(ValueError, match=f"no sharding rule matches '{path}'"):
            rules.spec(path)


def test_a_row_that_is_never_first_is_reported():
    rules = Rules(((r"a/\w+", P(None)), (r"a/q", P("fsdp")), (optional(r"b"), P("ep")), (r"c", P("ep"))))
    assert rules.unused(["a/q", "a/k"]) == ["a/q", "c"]
    assert rules.unused(["a/q", "c"]) == ["a/q"]


@pytest.mark.parametrize("name", PRESETS)
def test_every_row_of_the_shipped_tables_is_used(name):
    config = PRESETS[name]
    rules = golden.RULES[config["model_type"]]
    paths = [*golden.parameters(config), *golden.boundaries(config)]
    assert [rules.spec(path) for path in paths] and not rules.unused(paths)


@pytest.mark.parametrize("family", FAMILY)
def test_every_optional_row_is_used_by_some_model(family):
    rules = golden.RULES[family]
    config = PRESETS[FAMILY[family]] | {"attention_bias": True, "mlp_only_layers": [0]}
    strict = Rules(tuple((str(pattern), spec) for pattern, spec in rules.table))
    assert not strict.unused([*golden.parameters(config), *golden.boundaries(config)])


@pytest.mark.parametrize("family", FAMILY)
def test_there_is_no_catch_all(family):
    for path in ("params/layers/0/attn/new", "params/new", "act/new", "batch/new", ""):
        with pytest.raises(ValueError, match="no sharding rule matches"):
            golden.RULES[family].spec(path)


@pytest.mark.parametrize(
    "entries, message",
    [
        (("fdsp",), "'fdsp' is not a mesh axis; these are: pp, dp, fsdp, ep, cp, tp"),
        ((zero("fsdp"), "fsdp"), "axis 'fsdp' is used twice"),
        ((("ep", "ep"),), "axis 'ep' is used twice"),
        ((None, ("ep", "fsdp")), "('ep', 'fsdp') is to be ('fsdp', 'ep')"),
        ((zero("ep", "dp"),), "('ep', 'dp') is to be ('dp', 'ep')"),
    ],
)
def test_a_wrong_row_is_refused_where_it_is_written(entries, message):
    with pytest.raises(ValueError) as error:
        P(*entries)
    assert message in str(error.value)


def test_placements_in_use_and_at_rest(mesh):
    spec = P("ep", None, zero("fsdp"))
    assert placements(spec, mesh) == (Shard(2), Shard(0))
    assert placements(spec, mesh, use=True) == (Replicate(), Shard(0))
    assert placements(P(("fsdp", "ep"), None), mesh, use=True) == (Shard(0), Shard(0))
    assert placements(P(("dp", "fsdp"), "tp"), mesh) == (Shard(0), Replicate())  # axes of size one are not in the mesh


def test_uneven_dims_name_tensor_shape_and_rule(mesh):
    rows = ((r"params/norm", P(zero("fsdp", "ep"))), (r"params/w", P("ep", zero("fsdp"))), (r"x", P("ep", None)))
    rules = Rules(rows)
    shard = Sharder(rules, mesh)
    with pytest.raises(ValueError) as error:
        shard.put_leaf("norm", torch.ones(6))
    assert "params/norm: dim 0 of (6,) does not divide into 4 shards (rule P(zero('fsdp', 'ep')))" in str(error.value)
    for shape, dim in (((5, 4), 0), ((4, 5), 1)):
        with pytest.raises(ValueError, match=f"params/w: dim {dim} of"):
            shard.put_leaf("w", torch.ones(shape))
    with pytest.raises(ValueError, match=r"params/w: shape \(4,\) has 1 dims, its rule P\('ep', zero\('fsdp'\)\) 2"):
        shard.put_leaf("w", torch.ones(4))
    whole = shard.put_leaf("w", torch.ones(6, 4)).redistribute(placements=[Replicate()] * 2)
    assert shard(whole, "x").to_local().shape == (3, 4)
    with pytest.raises(ValueError, match=r"x: dim 0 of \(3, 4\) does not divide into 2 shards"):
        shard.local(torch.sin, ("x",), ("x",))(whole[:3])
    with pytest.raises(ValueError, match=r"x: dim 0 of \(3, 4\) does not divide into 2 shards"):
        shard(whole[:3], "x")


def test_an_output_cannot_be_whole_where_operands_are_split(mesh):
    rules = Rules(((r"x", P("fsdp", "ep")), (r"y", P("fsdp", None)), (r"whole", P(None, None))))
    shard = Sharder(rules, mesh)
    for out, axis in (("whole", "fsdp"), ("y", "ep")):
        with pytest.raises(ValueError, match=f"{out} is whole on axis '{axis}'.*call it 'sum:{out}'"):
            shard.local(torch.sin, ("x",), (out,))
    shard.local(torch.sin, ("x",), ("sum:y",))
    shard.local(torch.sin, ("whole",), ("whole",))


def test_meshes_that_do_not_fit():
    with pytest.raises(ValueError, match="--mesh.fsdp 3 x --mesh.ep 2 is 6 processes, but 4 were started"):
        make(Mesh(fsdp=3, ep=2), torch.device("cpu"), 4)
    with pytest.raises(ValueError, match="--mesh.fsdp 1 x --mesh.ep 3 is 3 processes, but 4 were started"):
        make(Mesh(ep=3), torch.device("cpu"), 4)
    assert make(Mesh(), torch.device("cpu"), 1) is None


def test_a_mesh_has_known_axes_in_order(mesh):
    for names in (("ep", "fsdp"), ("rows", "ep")):
        odd = dist.device_mesh.init_device_mesh("cpu", (2, 2), mesh_dim_names=names)
        with pytest.raises(ValueError, match="mesh axes"):
            Sharder(Rules(()), odd)


@pytest.mark.parametrize("name", golden.GOLDEN)
def test_layouts_are_the_golden_ones(name, mesh):
    text = (golden.FOLDER / f"{name}.txt").read_text()
    assert golden.text(golden.GOLDEN[name]) == text, "if the change is meant: python -m tests.sharding_rules.golden"


def test_golden_bytes_are_what_a_rank_holds(mesh):
    shard = Sharder(golden.RULES["qwen3_moe"], mesh)
    config = golden.GOLDEN["tiny-mixed-fsdp2xep2"]
    params = models.from_config(config).init(0, shard=shard)
    leaves = {f"params/{path}": shard.storage(x) for path, x in tree.flatten(params).items()}
    for line in golden.text(config).splitlines()[: len(leaves)]:
        path, *_, size = line.split("  ")
        assert leaves[path].numel() * leaves[path].element_size() == int(size), path
