"""Losses of policies and preferences through the train step: accumulation, compilation, packing, SFT beside them."""

import pytest
import torch
import torch._dynamo

from functional_trainer import init_state, make_train_step, optimizers, tree
from functional_trainer.preference import running_mean
from tests.functional_trainer.packed import F64, LOSSES, with_columns
from tests.models import small

ROWS = [[5, 4], [9, 2], [3, 3, 4], [6, 7]]
STEPS = 2
REFUSING = {"kto"}


def run(name, batch, steps=STEPS, **options):
    """Train; return what there is after the last step, and its metrics."""
    torch._dynamo.reset()
    model, optimizer = small.model(num_hidden_layers=1), optimizers.adamw(optimizers.schedule("constant", 1e-2, 10, 0))
    state = init_state(model.init(0, dtype=F64), optimizer, running_mean())
    step = make_train_step(model, LOSSES[name](), optimizer, **{"backend": "aot_eager"} | options)
    for _ in range(steps):
        state, metrics = step(state, batch)
    torch._dynamo.config.trace_autograd_ops = False  # `compile="step"` sets these for the process
    torch._dynamo.config.capture_scalar_outputs = False
    return {k: v.detach().clone() for k, v in (tree.flatten(state) | metrics).items()}


@pytest.fixture(scope="module")
def plain():
    batch = with_columns(small.batch(ROWS))
    return {name: run(name, batch) for name in LOSSES}


def assert_same(a, b, tolerance=1e-9):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance, check_dtype=False)


@pytest.mark.parametrize("name", [name for name in LOSSES if name not in REFUSING])
@pytest.mark.parametrize("parts", [2, 4])
def test_accumulation_changes_nothing(name, parts, plain):
    assert_same(run(name, with_columns(small.batch(ROWS)), micro_batches=parts), plain[name])


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("compile", [pytest.param("step", marks=pytest.mark.slow), "layer"])
def test_compilation_changes_nothing(name, compile, plain):
    assert_same(run(name, with_columns(small.batch(ROWS)), compile=compile), plain[name])


@pytest.mark.parametrize("name", LOSSES)
def test_order_and_width_of_rows_change_nothing(name, plain):
    batch = {k: torch.nn.functional.pad(v.flip(0), (0, 3)) for k, v in with_columns(small.batch(ROWS)).items()}
    assert_same(run(name, batch), plain[name])


def test_what_is_learned_and_kept(plain):
    """The losses fall, and MPO's running mean is that of two batches."""
    batch = with_columns(small.batch(ROWS))
    for name in LOSSES:
        assert plain[name]["loss"] < run(name, batch, steps=1)["loss"]
    mean, count = plain["mpo"]["buffers/bco"].tolist()
    assert mean != 0 and round(count, 9) == STEPS * 2 * len(ROWS)
