"""Which products are in 8 bits, and that all forms of the step then compute the same."""

from dataclasses import replace

import pytest
import torch

import kernels
import models
from functional_trainer import init_state, losses, make_train_step, optimizers, precision, tree
from functional_trainer.options import Fp8Options, RunOptions
from functional_trainer.types import OneDevice
from tests.multi_rank import parity

CONFIG = parity.MOE | {"mlp_only_layers": [0], "attention_bias": True}
MODEL = models.from_config(CONFIG)


def test_all_matrices_of_layers_but_the_router_are_in_8_bits():
    found = precision.fp8(Fp8Options(), MODEL)
    names = [*(f"attn/{k}" for k in "qkvo"), "mlp/gate_up", "mlp/down", "moe/gate_up", "moe/down"]
    assert sorted(found) == sorted(f"params/layers/_/{name}" for name in names)
    assert set(found.values()) == {kernels.RECIPES["tile"]}
    more = precision.fp8(Fp8Options("row", Fp8Options.exclude.removesuffix("|.*/router")), MODEL)
    assert more.keys() - found.keys() == {"params/layers/_/moe/router"}
    assert set(more.values()) == {kernels.RECIPES["row"]}


@pytest.mark.parametrize(
    ("exclude", "said"),
    [
        ("heads", "'heads' matches no parameter; paths are embed, layers/_/attn_norm, layers/_/attn/q"),
        (Fp8Options.exclude + "|layers/0/.*", "treats layers/0/attn/q unlike layers/_/attn/q; layers are alike"),
        ("(un)?embed|.*norm", "leaves layers/_/attn/q_bias, layers/_/attn/k_bias"),
        (Fp8Options.exclude + "|.*/attn/k", "matches some of attn/q, attn/k, attn/v, which are one product: match all"),
        (Fp8Options.exclude + "|.*/moe/down", "matches some of moe/gate_up, moe/down, which are one product"),
    ],
)
def test_a_regex_that_cannot_be_meant_is_refused(exclude, said):
    with pytest.raises(ValueError, match="--fp8.exclude") as error:
        precision.fp8(Fp8Options(exclude=exclude), MODEL)
    assert said in str(error.value)


def test_options_say_what_they_need():
    with pytest.raises(ValueError, match="add --precision fp8"):
        RunOptions(fp8=Fp8Options("row"))
    with pytest.raises(ValueError, match="--fp8.exclude: .* is not a regular expression"):
        Fp8Options(exclude="(")


def test_weights_of_one_product_are_together():
    found = precision.fp8(Fp8Options(exclude=Fp8Options.exclude + "|.*/attn/[qkv]|.*/mlp/down"), MODEL)
    assert sorted(found) == [f"params/layers/_/{name}" for name in ("attn/o", "mlp/gate_up", "moe/down", "moe/gate_up")]
    fp8 = {name: recipe for name, recipe in precision.fp8(Fp8Options(), MODEL).items() if "attn/k" not in name}
    with pytest.raises(ValueError, match="attn/q, attn/k, attn/v are one product"):
        steps(OneDevice(fp8))


def steps(shard, dtype: torch.dtype | None = None, **how) -> dict[str, torch.Tensor]:
    """Take two steps; return losses and parameters."""
    case = parity.Case(CONFIG, uneven=True)
    model = models.from_config(CONFIG)
    model = replace(model, dtype=dtype)
    optimizer = optimizers.adamw(optimizers.schedule("constant", 1e-2, 1))
    state = init_state(model.init(0), optimizer)
    torch._dynamo.reset()
    step = make_train_step(model, losses.sft(), optimizer, **how, shard=shard)
    seen = {}
    for i in range(2):
        state, metrics = step(state, parity.batch(case))
        seen[f"{i}/loss"], seen[f"{i}/grad_norm"] = metrics["loss"].clone(), metrics["grad_norm"].clone()
    return seen | tree.flatten(state.params)


@pytest.mark.slow
@pytest.mark.parametrize(("recipe", "dtype"), [("tile", torch.bfloat16), ("row", None)])
def test_all_forms_of_the_step_are_the_same(recipe, dtype):
    shard = OneDevice(precision.fp8(Fp8Options(recipe), MODEL))
    plain, exact = steps(shard, dtype), steps(OneDevice(), dtype)
    assert 1e-6 < abs(plain["0/loss"] / exact["0/loss"] - 1) < 1e-2
    for how in (
        {"remat": "layer"}, {"remat": "selective"}, {"compile": "layer", "backend": "aot_eager"},
        {"compile": "layer", "backend": "aot_eager", "remat": "layer"},
    ):  # fmt: skip
        other = steps(shard, dtype, **how)
        assert all(torch.equal(other[k], plain[k]) for k in plain), how


def test_what_is_not_finite_is_skipped():
    shard = OneDevice(precision.fp8(Fp8Options(), MODEL))
    model, optimizer = models.from_config(CONFIG), optimizers.adamw(optimizers.schedule("constant", 1e-2, 1))
    params = model.init(0)
    params["layers"][1]["moe"]["down"][3, 2, 1] = float("nan")
    before = tree.map(torch.clone, params)
    step = make_train_step(model, losses.sft(), optimizer, shard=shard)
    state, metrics = step(init_state(params, optimizer), parity.batch(parity.Case(CONFIG)))
    assert metrics["skipped"] and not metrics["grad_norm"].isfinite()
    pairs = zip(tree.leaves(state.params), tree.leaves(before), strict=True)
    assert all(torch.equal(a, b) or a.isnan().any() for a, b in pairs)
