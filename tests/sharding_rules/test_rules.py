"""The table: one matcher, no catch-all, and an error that names what is wrong before any rank computes."""

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.tensor import Shard

import models
from experiments.rules import RULES
from functional_trainer import tree
from sharding_rules import P, Rules, explain, optional, padded, zero
from sharding_rules.mesh import Mesh, make
from sharding_rules.rules import chunk, held, route
from sharding_rules.sharder import Sharder
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
    rules = RULES[config["model_type"]]
    paths = [*golden.parameters(config), *golden.boundaries(config)]
    assert [rules.spec(path) for path in paths] and not rules.unused(paths)


@pytest.mark.parametrize("family", FAMILY)
def test_every_optional_row_is_used_by_some_model(family):
    rules = RULES[family]
    config = PRESETS[FAMILY[family]] | {"attention_bias": True, "mlp_only_layers": [0]}
    strict = Rules(tuple((str(pattern), spec) for pattern, spec in rules.table))
    assert not strict.unused([*golden.parameters(config), *golden.boundaries(config)])


@pytest.mark.parametrize("family", FAMILY)
def test_there_is_no_catch_all(family):
    for path in ("params/layers/0/attn/new", "params/new", "act/new", "batch/new", ""):
        with pytest.raises(ValueError, match="no sharding rule matches"):
            RULES[family].spec(path)


@pytest.mark.parametrize(
    "entries, message",
    [
        (("fdsp",), "'fdsp' is not a mesh axis; these are: pp, dp, fsdp, ep, cp, tp"),
        ((zero("fsdp"), "fsdp"), "axis 'fsdp' is used twice"),
        ((("ep", "ep"),), "axis 'ep' is used twice"),
    ],
)
def test_a_wrong_row_is_refused_where_it_is_written(entries, message):
    with pytest.raises(ValueError) as error:
        P(*entries)
    assert message in str(error.value)


def test_placements_in_use_and_at_rest(mesh):
    spec, axes = P("ep", None, zero("fsdp")), ("fsdp", "ep")
    assert held(spec, axes, use=False) == (("ep",), (), ("fsdp",))
    assert held(spec, axes, use=True) == (("ep",), (), ())
    assert held(P(("dp", "fsdp"), "tp"), axes, use=True) == (("fsdp",), ())  # axes of size one are not in the mesh
    shard = Sharder(Rules(((r"params/w", spec), (r"params/v", P(("ep", "fsdp"))), ("batch/columns", P(None)))), mesh)
    assert shard.placements("w", (4, 3, 6)) == (Shard(2), Shard(0))
    with pytest.raises(ValueError, match=r"params/v: axes that share a dim of a parameter come as in"):
        shard.placements("v", (8,))


@pytest.mark.parametrize(
    "start, end, steps",
    [
        (P("fsdp", ("cp", "tp")), P("fsdp", "cp"), [("tp", 1, None)]),
        (P("fsdp", "cp"), P("fsdp", ("cp", "tp")), [("tp", None, 1)]),
        (P("cp", "tp"), P(None, ("tp", "cp")), [("cp", 0, 1)]),
        (P(None, ("tp", "cp")), P("cp", "tp"), [("cp", 1, 0)]),
        (P(("cp", "tp")), P(None), [("tp", 0, None), ("cp", 0, None)]),
        (P(None), P(("cp", "tp")), [("cp", None, 0), ("tp", None, 0)]),
        (P("cp", None, None), P(None, "cp", "tp"), [("tp", None, 2), ("cp", 0, 1)]),  # what makes parts smaller first
        (P("cp", "tp", None), P(None, None, "cp"), [("cp", 0, 2), ("tp", 1, None)]),  # and what makes them larger last
        (P("cp"), P("cp", "tp"), [("tp", None, 1)]),
    ],
)
def test_a_change_of_placement_is_a_few_exchanges(start, end, steps):
    axes = ("fsdp", "cp", "tp")
    assert route(held(start, axes, use=True), held(end, axes, use=True)) == steps


@pytest.mark.parametrize(
    "start, end", [(P(("cp", "tp")), P("tp")), (P("cp", "tp"), P(None, ("cp", "tp"))), (P("cp", "tp"), P("tp", "cp"))]
)
def test_a_change_that_no_exchange_along_an_axis_makes_is_refused(start, end):
    with pytest.raises(ValueError, match="cannot become"):
        route(held(start, ("cp", "tp"), use=True), held(end, ("cp", "tp"), use=True))


def test_uneven_dims_name_tensor_shape_and_rule(mesh):
    rows = ((r"params/norm", P(zero("fsdp", "ep"))), (r"params/w", P("ep", zero("fsdp"))), (r"x", P("ep", None)))
    rules = Rules((*rows, (r"whole", P(None, None)), (r"batch/columns", P(None, None))))
    shard = Sharder(rules, mesh)

    def make(part):
        return torch.ones([s.stop - s.start for s in part])

    with pytest.raises(ValueError) as error:
        shard.init_leaf("norm", (6,), make)
    assert "params/norm: dim 0 of (6,) does not divide into 4 shards (rule P(zero('fsdp', 'ep')))" in str(error.value)
    for shape, dim in (((5, 4), 0), ((4, 5), 1)):
        with pytest.raises(ValueError, match=f"params/w: dim {dim} of"):
            shard.init_leaf("w", shape, make)
    with pytest.raises(ValueError, match=r"params/w: shape \(4,\) has 1 dims, its rule P\('ep', zero\('fsdp'\)\) 2"):
        shard.init_leaf("w", (4,), make)
    assert shard.init_leaf("w", (6, 4), make).to_local().shape == (3, 2)
    region = shard.local(torch.sin, ("whole > x",), ("x",))
    assert region(torch.ones(6, 4)).shape == (3, 4)
    with pytest.raises(ValueError, match=r"whole > x: dim 0 of this rank's \(3, 4\) does not divide into 2 parts"):
        region(torch.ones(3, 4))


@given(st.integers(0, 40), st.lists(st.tuples(st.integers(0, 5), st.integers(1, 6)), max_size=3))
def test_unequal_parts_are_those_of_torch(size, places):
    places, expected = [(i % n, n) for i, n in places], torch.arange(size)
    for i, n in places:
        parts = expected.chunk(n)
        expected = parts[i] if i < len(parts) else expected[:0]
    assert torch.equal(torch.arange(size)[chunk(size, places)], expected)


def test_a_padded_dim_need_not_divide():
    """If the row has one length; where zero is written the error says that padded would do."""
    shapes = {"params/a": (7, 4)}
    with pytest.raises(ValueError, match=r"or write padded\('fsdp'\)"):
        Rules((("params/.*", P(zero("fsdp"), None)),)).fit(shapes, {"fsdp": 3})
    padding = Rules((("params/.*", P(padded("fsdp"), None)),))
    assert padding.fit(shapes, {"fsdp": 3}).spec("params/a")[0].lengths == {7}
    assert explain.explain(padding, shapes, {"fsdp": 3})[0].rest_shape == (3, 4)
    with pytest.raises(ValueError, match=r"padded\('fsdp'\) is for one length, here are 6, 7; give each a row"):
        padding.fit(shapes | {"params/b": (6, 4)}, {"fsdp": 3})


def test_an_output_cannot_be_whole_where_operands_are_split(mesh):
    rows = ((r"x", P("fsdp", "ep")), (r"y", P("fsdp", None)), (r"whole", P(None, None)))
    rules = Rules((*rows, ("batch/columns", P(("fsdp", "ep"), None))))
    shard = Sharder(rules, mesh)
    for out, axis in (("whole", "fsdp"), ("y", "ep")):
        with pytest.raises(ValueError, match=f"{out} is whole on axis '{axis}'.*call it 'sum:{out}'"):
            shard.local(torch.sin, ("x",), (out,))
    shard.local(torch.sin, ("x",), ("sum:y",))
    shard.local(torch.sin, ("whole",), ("whole",))


def test_maths_that_fails_says_on_which_parts(mesh):
    rows = ("x", P("fsdp", None)), ("w", P(None, "ep")), ("y", P("fsdp", "ep")), ("batch/columns", P(None))
    shard = Sharder(Rules(rows), mesh)
    with pytest.raises(RuntimeError) as error:
        shard.local(torch.mm, ("x", "w"), ("y",))(torch.ones(2, 6), torch.ones(3, 6))
    assert error.value.__notes__[0].startswith("this rank's parts: x (2, 6), w (3, 6); `experiments/rules.py lint`")


def test_meshes_that_do_not_fit():
    with pytest.raises(ValueError, match="--mesh.fsdp 3 x --mesh.ep 2 is 6 processes, but 4 were started"):
        make(Mesh(fsdp=3, ep=2), torch.device("cpu"), 4)
    with pytest.raises(ValueError, match="--mesh.fsdp 1 x --mesh.ep 3 is 3 processes, but 4 were started"):
        make(Mesh(ep=3), torch.device("cpu"), 4)
    with pytest.raises(ValueError, match="--mesh.dp 2 x --mesh.fsdp 1 x --mesh.cp 4 is 8 processes, but 4 were"):
        make(Mesh(dp=2, cp=4), torch.device("cpu"), 4)
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
    shard = Sharder(RULES["qwen3_moe"], mesh)
    config = golden.GOLDEN["tiny-mixed-fsdp2xep2"]
    params = models.from_config(config).init(0, shard=shard)
    leaves = {f"params/{path}": shard.storage(x) for path, x in tree.flatten(params).items()}
    for line in golden.text(config).splitlines()[: len(leaves)]:
        path, *_, size = line.split("  ")
        assert leaves[path].numel() * leaves[path].element_size() == int(size), path
