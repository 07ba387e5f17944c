"""functional_trainer.optimizers against torch.optim, and schedules against closed forms."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from functional_trainer import optimizers

F64 = torch.float64
PARAMS = {
    "embed": (4, 3), "layers/0/attn/q": (2, 3), "layers/0/attn/q_bias": (2,), "layers/0/attn_norm": (3,), "norm": (3,)
}  # fmt: skip


def at(schedule, step):
    return float(schedule(torch.tensor(step)))


@given(
    st.floats(1e-4, 1e-1), st.floats(0, 0.99), st.floats(0, 0.999), st.sampled_from([1e-8, 1e-3]),
    st.floats(0, 0.5), st.integers(0, 99),
)  # fmt: skip
@settings(max_examples=15)
def test_adamw_equals_torch(peak, b1, b2, eps, decay, seed):
    gen = torch.Generator().manual_seed(seed)
    flat = {path: torch.randn(shape, generator=gen, dtype=F64) for path, shape in PARAMS.items()}
    schedule = optimizers.schedule("cosine", peak, 20, warmup=4, floor=0.1)
    ours = optimizers.adamw(schedule, (b1, b2), eps, decay)
    theirs = {k: v.clone().requires_grad_() for k, v in flat.items()}
    exempt = {"layers/0/attn/q_bias", "layers/0/attn_norm", "norm"}
    reference = torch.optim.AdamW(
        [
            {"params": [v for k, v in theirs.items() if k not in exempt], "weight_decay": decay},
            {"params": [theirs[k] for k in sorted(exempt)], "weight_decay": 0.0},
        ],
        betas=(b1, b2), eps=eps,
    )  # fmt: skip
    moments = {k: ours.init(v) for k, v in flat.items()}
    for step in range(20):
        grads = {k: torch.randn(v.shape, generator=gen, dtype=F64) for k, v in flat.items()}
        for group in reference.param_groups:
            group["lr"] = at(schedule, step)
        for k, v in theirs.items():
            v.grad = grads[k]
        reference.step()
        for k in flat:
            scalars = ours.scalars(torch.tensor(step), torch.tensor(step), ours.group(k))
            assert float(scalars["lr"]) == at(schedule, step)
            flat[k], moments[k] = ours.update(flat[k], grads[k], moments[k], scalars)
    for k in flat:
        torch.testing.assert_close(flat[k], theirs[k].detach(), rtol=1e-9, atol=1e-9)


def test_moments_and_parameters_keep_their_dtype():
    for dtype in (torch.float32, torch.bfloat16, F64):
        p = torch.ones(2, 3, dtype=dtype)
        adam = optimizers.adamw(optimizers.schedule("constant", 1e-2, 10))
        new, moments = adam.update(p, p / 3, adam.init(p), adam.scalars(torch.tensor(0), torch.tensor(0), 0.1))
        assert {new.dtype, *(m.dtype for m in moments.values())} == {dtype}


def test_groups_are_chosen_by_full_match():
    paths = ["embed", "norm", "layers/0/attn_norm", "layers/0/attn/q_norm", "layers/0/attn/q_bias", "layers/0/attn/q"]
    default = optimizers.adamw(optimizers.schedule("constant", 1.0, 1), weight_decay=0.3)
    assert [default.group(p) for p in paths] == [0.3, 0.0, 0.0, 0.0, 0.0, 0.3]
    own = optimizers.adamw(
        optimizers.schedule("constant", 1.0, 1), weight_decay=0.3, no_decay=("attn", ".*/q", "embed")
    )
    assert [own.group(p) for p in paths] == [0.0, 0.3, 0.3, 0.3, 0.3, 0.0]


# schedules -----------------------------------------------------------------------------------------------------------

KINDS = ("constant", "linear", "cosine", "wsd")


@given(st.sampled_from(KINDS), st.integers(1, 40), st.data(), st.sampled_from([0.0, 0.1, 1.0]), st.floats(0.05, 1.0))
@settings(max_examples=120)
def test_schedules_equal_closed_forms(kind, total, data, floor, decay):
    warmup, peak = data.draw(st.integers(0, total - 1)), 0.3
    schedule = optimizers.schedule(kind, peak, total, warmup, floor, decay)
    stable = max(warmup, math.ceil(total * (1 - decay)))
    for step in range(total + 3):
        if step < warmup:
            wanted = (step + 1) / warmup
        elif kind == "constant":
            wanted = 1.0
        elif kind == "wsd":
            done = min(max((step - stable) / max(total - stable, 1), 0), 1)
            wanted = 1 - done * (1 - floor)
        else:
            done = min((step - warmup) / (total - warmup), 1)
            wanted = 1 - done if kind == "linear" else (1 + math.cos(math.pi * done)) / 2
            wanted = floor + (1 - floor) * wanted
        assert at(schedule, step) == pytest.approx(peak * wanted, rel=1e-12, abs=1e-15)


def test_schedules_by_hand():
    def values(kind, **options):
        schedule = optimizers.schedule(kind, 8.0, **options)
        return [round(at(schedule, i), 9) for i in range(options["total"] + 1)]

    assert values("linear", total=4) == [8, 6, 4, 2, 0]
    assert values("linear", total=6, warmup=2, floor=0.25) == [4, 8, 8, 6.5, 5, 3.5, 2]
    assert values("cosine", total=4) == [8, round(4 + 4 * math.sqrt(0.5), 9), 4, round(4 - 4 * math.sqrt(0.5), 9), 0]
    assert values("wsd", total=10, decay=0.4) == [8, 8, 8, 8, 8, 8, 8, 6, 4, 2, 0]
    assert values("constant", total=4, warmup=3) == [round(8 / 3, 9), round(16 / 3, 9), 8, 8, 8]


def test_a_rate_is_a_float64_scalar():
    rate = optimizers.schedule("cosine", 1e-3, 10)(torch.tensor(3))
    assert rate.dtype == F64 and rate.shape == ()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "cos", "total": 9}, "schedule 'cos' is not one of constant, linear, cosine, wsd"),
        ({"kind": "cosine", "total": 9, "warmup": 9}, "warm-up of 9 steps does not fit in 9 steps"),
    ],
)
def test_refused(options, message):
    with pytest.raises(ValueError, match=message):
        optimizers.schedule(peak=1.0, **options)
