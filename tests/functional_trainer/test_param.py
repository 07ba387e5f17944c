"""functional_trainer.param: what io strings mean, and that draws depend on nothing but seed, path and slice."""

import pytest
import torch

from functional_trainer import param, tree
from functional_trainer.param import Param
from tests.models import small


@pytest.mark.parametrize(
    ("io", "shape", "batch", "out_in", "matrix"),
    [
        ("D->NH", (3, 4, 5), "", ("NH", "D"), True),
        ("NH->D", (5, 3, 4), "", ("D", "NH"), True),
        ("2:D->F", (2, 7, 5), "2", ("F", "D"), True),
        ("E2:D->F", (6, 2, 7, 5), "E2", ("F", "D"), True),
        ("V,D", (9, 5), "", ("VD", ""), False),
        ("D", (5,), "", ("D", ""), False),
    ],
)
def test_io(io, shape, batch, out_in, matrix):
    p = Param(shape, io)
    assert (p.batch, p.out_in, p.is_matrix) == (batch, out_in, matrix)
    assert p.dims == batch + "".join(out_in) and len(p.dims) == len(shape)
    with pytest.raises(ValueError, match=f"names {len(shape)} dims, shape .* has {len(shape) + 1}"):
        Param((*shape, 1), io)


def test_a_leaf_depends_on_nothing_but_its_seed_path_and_slice():
    specs = small.model().specs
    flat = tree.flatten(param.init(specs, 3))
    p = tree.flatten(specs)["layers/2/moe/gate_up"]
    alone = param.init({"other": Param((4, 4), "D->F"), "layers": {"2": {"moe": {"gate_up": p}}}}, 3)
    assert torch.equal(flat["layers/2/moe/gate_up"], alone["layers"]["2"]["moe"]["gate_up"])
    part = Param((2, *p.shape[1:]), p.io, std=p.std)  # the first two experts alone
    assert torch.equal(flat["layers/2/moe/gate_up"][:2], param.init_leaf("layers/2/moe/gate_up", part, 3))


def test_seeds_paths_and_slices_draw_differently():
    p = Param((3, 50), "F->D")
    draws = [param.init_leaf(path, p, seed) for path in ("a", "b") for seed in (0, 1)]
    rows = torch.cat(draws)
    assert len({tuple(row.tolist()) for row in rows}) == 12
    assert (torch.corrcoef(rows) - torch.eye(12)).abs().max() < 0.6


def test_statistics_and_dtypes():
    x = param.init_leaf("w", Param((300, 200), "F->D", std=0.3), 0)
    z = (x / 0.3).flatten().double()
    assert abs(z.mean()) < 0.02 and abs(z.std() - 1) < 0.02 and abs((z**4).mean() - 3) < 0.15
    wide = param.init_leaf("w", Param((300, 200), "F->D", std=0.3), 0, torch.float64)
    assert torch.equal(wide, x.double())  # drawn in float32, whatever the dtype
    low = param.init_leaf("w", Param((300, 200), "F->D", std=0.3), 0, torch.bfloat16)
    assert torch.equal(low, x.bfloat16())


def test_constants_and_counts():
    specs = {
        "norm": Param((5,), "D", init="ones"),
        "bias": Param((2, 3), "NH", init="zeros"),
        "w": Param((4, 5), "D->F"),
    }
    params = param.init(specs, 0, torch.float64)
    assert torch.equal(params["norm"], torch.ones(5, dtype=torch.float64))
    assert torch.equal(params["bias"], torch.zeros(2, 3, dtype=torch.float64))
    assert param.count(specs) == 31 == sum(x.numel() for x in tree.leaves(params))


def test_models_draw_with_the_same_function():
    model = small.model()
    a, b = tree.flatten(model.init(5)), tree.flatten(param.init(model.specs, 5))
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
