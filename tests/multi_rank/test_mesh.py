"""Every axis alone, and some together, on gloo ranks equal one process: gradients, steps, initial values, files.

Each world size is one job that runs everything, for ranks take longer to start than most cases take to run. The other
meshes are in the slow tests: `make test-distributed`.
"""

from pathlib import Path

import pytest
import torch

import models
from functional_trainer import tree
from tests.multi_rank import launch, layout, parity

WORLDS = {2: ["dp2", "fsdp2", "ep2", "cp2", "tp2"], 4: ["fsdp2 x ep2", "cp2 x tp2"]}
MESHES = [mesh for meshes in WORLDS.values() for mesh in meshes]


def two_ranks(folder: str) -> dict:
    meshes = WORLDS[2]
    for mesh in meshes:
        layout.save(mesh, f"{folder}/{mesh}")
    return {
        "train": parity.train_all(list(parity.CASES), meshes),
        "placed": {mesh: layout.placed(mesh) for mesh in meshes},
        "loaded": layout.load("ep2", f"{folder}/fsdp2"),
        "exchanges": {remat: parity.exchanges(remat) for remat in ("none", "selective", "layer")},
    }


def four_ranks(folder: str) -> dict:
    meshes = WORLDS[4]
    layout.save("fsdp2 x ep2", f"{folder}/uneven", layout.UNEVEN)
    return {
        "uneven": layout.load("fsdp4", f"{folder}/uneven", layout.UNEVEN),
        "train": parity.train_all(list(parity.CASES), meshes),
        "placed": {mesh: layout.placed(mesh) for mesh in meshes},
        "loaded": layout.load("fsdp2 x ep2", f"{folder}/ep2"),
        "derived": layout.derived(),
        "added": layout.added(),
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("saved")


@pytest.fixture(scope="module")
def results(folder) -> dict[int, dict]:
    return {2: launch.run(2, two_ranks, str(folder)), 4: launch.run(4, four_ranks, str(folder))}


@pytest.fixture(scope="module")
def alone() -> dict[str, torch.Tensor]:
    return tree.flatten(models.from_config(layout.CONFIG).init(3, dtype=torch.float64))


def differences(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor], tolerance: float = 1e-9) -> list[str]:
    """Name the tensors that differ by more than a share of their largest element."""
    assert a.keys() == b.keys()
    found = []
    for key in a:
        off = (a[key] - b[key]).abs().max().item()
        if not off <= tolerance * b[key].abs().max().item():
            found.append(f"{key}: {off:.1e} of {b[key].abs().max().item():.1e}")
    return found


@pytest.mark.parametrize("case", parity.CASES)
def test_training_equals_one_process(case, results):
    expected = parity.train(parity.CASES[case])
    assert {"0/loss", "0/grad_norm", "0/grad_norms", "grads/layers/0/attn/q", "params/norm"} <= expected.keys()
    for world, meshes in WORLDS.items():
        for mesh in meshes:
            assert not differences(results[world]["train"][mesh, case], expected), mesh


def test_the_cases_are_what_they_say():
    """The comparison sees learning, an expert that takes every token, ranks without tokens or labels, and balance."""
    collapsed = parity.train(parity.CASES["moe, one expert takes all"])
    assert (collapsed["0/load"] > 0).sum(1).tolist() == [1, 1]
    uneven = parity.batch(parity.CASES["moe, pooled balance, uneven"])
    per_rank = (uneven["weights"] > 0).view(4, -1).sum(1).tolist()
    assert 0 in per_rank and max(per_rank) > 5 and (uneven["segment_ids"].view(4, -1)[2] == 0).all()
    assert collapsed["2/loss"] < collapsed["0/loss"] and collapsed["0/balance"] > 0


def test_selective_recomputation_repeats_no_exchange(results):
    """Each of two layers sends counts, rows and results, and gradients of rows and results; recomputed, three more."""
    assert results[2]["exchanges"] == {"none": 10, "selective": 10, "layer": 16}


@pytest.mark.parametrize("mesh", MESHES)
def test_initial_values_do_not_depend_on_the_mesh(mesh, results, alone):
    placed = results[4 if " x " in mesh else 2]["placed"][mesh]
    assert placed["params"].keys() == alone.keys()
    assert all(torch.equal(placed["params"][path], x) for path, x in alone.items())
    ways = {"dp2": 1, "fsdp2 x ep2": 4, "cp2 x tp2": 4}.get(mesh, 2)
    total = sum(x.numel() for x in alone.values())
    assert total / ways <= placed["held"] <= total / ways * 1.05  # the rest: norms and biases of a head are whole


@pytest.mark.parametrize("mesh", MESHES)
def test_placing_a_leaf_sends_nothing(mesh, results):
    placed = results[4 if " x " in mesh else 2]["placed"][mesh]
    assert placed["collectives"] == 0 and placed["own"]


@pytest.mark.parametrize("mesh", MESHES)
def test_rank_0_alone_collects_a_leaf(mesh, results):
    assert results[4 if " x " in mesh else 2]["placed"][mesh]["collected"]


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("kind", ["checkpoint", "hf"])
def test_what_one_mesh_saves_another_loads(world, kind, results, alone):
    loaded = results[world]["loaded"][kind]
    assert loaded.keys() == alone.keys() and all(torch.equal(loaded[path], x) for path, x in alone.items())


@pytest.mark.parametrize("mesh", WORLDS[2])
def test_a_mesh_writes_the_bytes_of_one_process(mesh, results, folder, tmp_path):
    model = models.from_config(layout.CONFIG)
    models.save_pretrained(model, model.init(3, dtype=torch.float64), tmp_path)
    expected = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    assert {file.name: file.read_bytes() for file in (folder / mesh / "hf").iterdir()} == expected


def test_parts_that_are_not_alike_are_saved_and_loaded_on_another_mesh(results, folder, tmp_path):
    """Five of a dim over four ranks: 2, 1, 1, 1 as fsdp2 x ep2, and 2, 2, 1, none as fsdp4."""
    model = models.from_config(layout.UNEVEN.config)
    params = model.init(3, dtype=torch.float64)
    for loaded in results[4]["uneven"].values():
        assert all(torch.equal(loaded[path], x) for path, x in tree.flatten(params).items())
    models.save_pretrained(model, params, tmp_path)
    for file in (folder / "uneven" / "hf").iterdir():
        assert file.read_bytes() == (tmp_path / file.name).read_bytes()


def test_gradients_of_a_region_are_derived(results):
    """x is split over both axes; w is whole over fsdp, the scale over both, so their gradients are added there."""
    leaves = [t.requires_grad_() for t in layout.toy_tensors()]
    x, w, scale = torch.autograd.grad(layout.toy(*leaves).square().sum(), leaves)
    expected = {
        "x": [x[rows, :][:, columns] for rows in (slice(2), slice(2, 4)) for columns in (slice(3), slice(3, 6))],
        "w": [w[:, :3], w[:, 3:]] * 2,
        "scale": [scale] * 4,
    }
    for name, parts in results[4]["derived"].items():
        for ours, theirs in zip(parts, expected[name], strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12, msg=name)


def test_gradients_are_added_in_the_type_that_parameters_are_handed_over_in(results):
    exact, rounded = 1 + 3 * 2**-9, {1.0, 1 + 2**-7}
    for name, gradient in results[4]["added"].items():
        assert gradient == exact if "float32" in name else gradient in rounded, name


def fails_on_rank_one() -> None:
    if torch.distributed.get_rank() == 1:
        raise RuntimeError("planted")


def test_the_launcher_reports_a_rank_that_fails():
    with pytest.raises(Exception, match="planted"):
        launch.run(2, fails_on_rank_one)
