"""functional_trainer.optimizers against torch.optim, and schedules against closed forms."""

import math
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from functional_trainer import moments as moments_module
from functional_trainer import optimizers, tree
from functional_trainer.options import OptimOptions
from functional_trainer.param import Param

F64 = torch.float64
PARAMS = {
    "embed": (4, 3), "layers/0/attn/q": (2, 3), "layers/0/attn/q_bias": (2,), "layers/0/attn_norm": (3,), "norm": (3,)
}  # fmt: skip


def at(schedule, step):
    return float(schedule(torch.tensor(step)))


def descend(optimizer, path, p, grads):
    """Update one leaf with one gradient after the other; return it and its moments."""
    group = optimizer.group(path)
    moments = optimizer.init(p, group)
    for i, g in enumerate(grads):
        scalars = optimizer.scalars(torch.tensor(i), torch.tensor(i), group)
        p, moments = optimizer.update(p, g, moments, scalars, group)
    return p, moments


def draw(seed, *shapes, dtype=F64):
    gen = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=gen, dtype=F64).to(dtype) for shape in shapes]


def torch_descends(make, p, grads, rates):
    """Update a copy of `p` with an optimizer of PyTorch's."""
    p = p.clone().requires_grad_()
    theirs = make([p])
    for g, rate in zip(grads, rates, strict=True):
        theirs.param_groups[0]["lr"] = rate
        p.grad = g
        theirs.step()
    return p.detach()


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
    moments = {k: ours.init(v, ours.group(k)) for k, v in flat.items()}
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
            flat[k], moments[k] = ours.update(flat[k], grads[k], moments[k], scalars, ours.group(k))
    for k in flat:
        torch.testing.assert_close(flat[k], theirs[k].detach(), rtol=1e-9, atol=1e-9)


def test_moments_and_parameters_keep_their_dtype():
    for dtype in (torch.float32, torch.bfloat16, F64):
        p = torch.ones(2, 3, dtype=dtype)
        adam = optimizers.adamw(optimizers.schedule("constant", 1e-2, 10))
        new, moments = descend(adam, "q", p, [p / 3])
        assert {new.dtype, *(m.dtype for m in moments.values())} == {dtype}


def test_groups_are_chosen_by_full_match():
    paths = ["embed", "norm", "layers/0/attn_norm", "layers/0/attn/q_norm", "layers/0/attn/q_bias", "layers/0/attn/q"]
    default = optimizers.adamw(optimizers.schedule("constant", 1.0, 1), weight_decay=0.3)
    assert [default.group(p) for p in paths] == [(0.3,), (0.0,), (0.0,), (0.0,), (0.0,), (0.3,)]
    own = optimizers.adamw(
        optimizers.schedule("constant", 1.0, 1), weight_decay=0.3, no_decay=("attn", ".*/q", "embed")
    )
    assert [own.group(p) for p in paths] == [(0.0,), (0.3,), (0.3,), (0.3,), (0.3,), (0.0,)]


RATES = optimizers.schedule("linear", 0.03, 8, warmup=2)
SPECS = {
    "embed": Param((7, 4), "V,D"), "norm": Param((4,), "D"),
    "layers": [{
        "q": Param((3, 2, 4), "D->NH"), "o": Param((4, 3, 2), "NH->D"), "q_bias": Param((3, 2), "NH"),
        "gate_up": Param((5, 2, 6, 4), "E2:D->F"), "down": Param((5, 4, 6), "E:F->D"), "router": Param((5, 4), "D->E"),
    }],
}  # fmt: skip
MATRICES = {  # by path: every matrix in a leaf of these shapes, as (batch, rows, columns)
    "layers/0/q": (1, 6, 4), "layers/0/o": (1, 4, 6), "layers/0/gate_up": (10, 6, 4), "layers/0/down": (5, 4, 6),
    "layers/0/router": (1, 5, 4),
}  # fmt: skip


@given(st.floats(0, 0.99), st.booleans(), st.floats(0, 0.5), st.integers(0, 99))
@settings(max_examples=15)
def test_sgd_equals_torch_with_decoupled_decay(momentum, nesterov, decay, seed):
    nesterov = nesterov and momentum > 0
    p, *grads = draw(seed, *[(3, 2)] * 7)
    ours, _ = descend(optimizers.sgd(RATES, momentum, nesterov, weight_decay=0.0), "q", p, grads)
    rates = [at(RATES, i) for i in range(6)]
    make = lambda ps: torch.optim.SGD(ps, momentum=momentum, nesterov=nesterov)  # noqa: E731
    torch.testing.assert_close(ours, torch_descends(make, p, grads, rates), rtol=1e-12, atol=1e-12)
    decayed, _ = descend(optimizers.sgd(RATES, momentum, nesterov, decay), "q", p, [torch.zeros_like(p)] * 6)
    torch.testing.assert_close(decayed, p * math.prod(1 - rate * decay for rate in rates))


@given(st.floats(0, 1), st.floats(0, 1), st.floats(0, 0.5), st.integers(0, 99))
@settings(max_examples=15)
def test_lion_equals_its_paper(b1, b2, decay, seed):
    p, *grads = draw(seed, *[(3, 2)] * 7)
    wanted, mu = p.clone(), torch.zeros_like(p)
    for i, g in enumerate(grads):  # algorithm 2 of arxiv 2302.06675
        wanted = wanted - at(RATES, i) * (torch.sign(b1 * mu + (1 - b1) * g) + decay * wanted)
        mu = b2 * mu + (1 - b2) * g
    ours, moments = descend(optimizers.lion(RATES, (b1, b2), decay), "q", p, grads)
    torch.testing.assert_close(ours, wanted, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(moments["mu"], mu, rtol=1e-12, atol=1e-12)


@given(st.integers(1, 4), st.integers(1, 6), st.integers(1, 6), st.integers(0, 6), st.integers(0, 99))
@settings(max_examples=25)
def test_newton_schulz_is_its_polynomial_of_the_singular_values(batch, rows, columns, steps, seed):
    (x,) = draw(seed, (batch, rows, columns))
    u, s, vh = torch.linalg.svd(x, full_matrices=False)
    s = s / s.square().sum(-1, keepdim=True).sqrt()
    for _ in range(steps):
        s = 3.4445 * s - 4.775 * s**3 + 2.0315 * s**5
    ours = optimizers.orthogonalize(x, steps, dtype=F64)
    torch.testing.assert_close(ours, u @ torch.diag_embed(s) @ vh, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("scale", ["original", "match_rms_adamw"])
@pytest.mark.parametrize("path", MATRICES)
@given(momentum=st.floats(0, 0.99), nesterov=st.booleans(), decay=st.sampled_from([0.0, 0.3]), seed=st.integers(0, 99))
@settings(max_examples=6)
def test_muon_equals_torch_for_every_matrix_by_itself(path, scale, momentum, nesterov, decay, seed):
    """PyTorch's takes one matrix and casts it to bfloat16; here that cast is to float64 instead."""
    shape = tree.flatten(SPECS)[path].shape
    p, *grads = draw(seed, *[shape] * 5)
    muon = optimizers.muon(RATES, SPECS, momentum, nesterov, decay, scale, dtype=F64)
    ours, _ = descend(muon, path, p, grads)

    def make(ps):
        return torch.optim.Muon(ps, weight_decay=decay, momentum=momentum, nesterov=nesterov, adjust_lr_fn=scale)

    rates = [at(RATES, i) for i in range(4)]
    alone = [x.reshape(MATRICES[path]).unbind() for x in (p, *grads)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "bfloat16", lambda x: x.to(F64, copy=True))
        wanted = torch.stack([torch_descends(make, first, rest, rates) for first, *rest in zip(*alone, strict=True)])
    torch.testing.assert_close(ours.reshape(MATRICES[path]), wanted, rtol=1e-9, atol=1e-9)


def test_bfloat16_is_enough_for_newton_schulz():
    (x,) = draw(0, (3, 48, 80))
    ours, exact = optimizers.orthogonalize(x), optimizers.orthogonalize(x, dtype=F64)
    assert ours.dtype == F64 and (ours - exact).norm() < 0.05 * exact.norm()


@pytest.mark.parametrize("path", [*MATRICES, "embed", "norm"])
@given(decay=st.sampled_from([0.0, 0.3]), clip=st.sampled_from([1.0, 3.0]), size=st.sampled_from([1e-6, 1.0]))
@settings(max_examples=8)
def test_adafactor_equals_torch_for_every_matrix_by_itself(path, decay, clip, size):
    shape = tree.flatten(SPECS)[path].shape
    p, *grads = draw(3, *[shape] * 7)
    p = p * size
    ours, moments = descend(
        optimizers.adafactor(RATES, SPECS, eps=(1e-16, 1e-3), clip=clip, weight_decay=decay, no_decay=()),
        path,
        p,
        grads,
    )
    view = MATRICES.get(path, (1, *shape))
    alone = [x.reshape(view).unbind() for x in (p, *grads)]

    def make(ps):
        return torch.optim.Adafactor(ps, eps=(1e-16, 1e-3), d=clip, weight_decay=decay)

    rates = [at(RATES, i) for i in range(6)]
    wanted = torch.stack([torch_descends(make, first, rest, rates) for first, *rest in zip(*alone, strict=True)])
    torch.testing.assert_close(ours.reshape(view), wanted, rtol=1e-9, atol=1e-12)
    numbers = p.shape[0] if len(view) == 2 else view[0] * (view[1] + view[2])
    assert sum(m.numel() for m in moments.values()) == numbers


@pytest.mark.parametrize("path", ["layers/0/gate_up", "embed", "norm"])
def test_adafactor_survives_rows_without_gradient_in_float32(path):
    """As of words and experts that a batch does not have."""
    p, *grads = draw(0, *[tree.flatten(SPECS)[path].shape] * 4, dtype=torch.float32)
    for g in grads:
        g[:2] = 0
    ours, moments = descend(optimizers.adafactor(RATES, SPECS), path, p, [torch.zeros_like(p), *grads])
    assert ours.isfinite().all() and all(m.isfinite().all() for m in moments.values())
    assert torch.equal(ours[:2], p[:2]) and not torch.equal(ours, p)


def test_muon_refuses_what_is_no_matrix():
    muon = optimizers.muon(RATES, SPECS)
    with pytest.raises(ValueError, match="muon is for matrices; embed has io 'V,D': give it another optimizer"):
        muon.group("embed")


# how moments are kept ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("signed", [True, False])
def test_the_dynamic_code_is_that_of_its_paper(signed):
    """By hand: in the decade (0.1, 1] 64 (signed) or 128 steps, in each below half as many, and 0 and 1."""
    code = moments_module.dynamic_code(signed)
    assert code.shape == (256,) and (code.diff() > 0).all() and code.max() == 1 and (code == 0).sum() == 1
    top = 64 if signed else 128
    counts = [int(((code > 10.0**-k) & (code < 10.0 ** (1 - k))).sum()) for k in range(1, 8)]
    assert counts == [top // 2**i for i in range(7)]
    first = 0.1 + 0.45 / top
    assert float(code[(code > 0.1)][0]) == pytest.approx(first, rel=1e-6)
    if signed:
        assert torch.equal(code[code < 0], -code[(code > 0) & (code < 1)].flip(0))


@given(st.integers(1, 700), st.integers(0, 99), st.sampled_from([1e-12, 1.0, 1e8]), st.sampled_from(["mu", "nu"]))
@settings(max_examples=30)
def test_eight_bits_are_near_and_keep_zeros(n, seed, size, name):
    storage = moments_module.stored_in_8_bits(block=64)
    (x,) = draw(seed, (n,), dtype=torch.float32)
    x = (x if name == "mu" else x.square()) * size
    x[::5] = 0
    packed = storage.pack(name, x)
    assert {k: v.dtype for k, v in packed.items()} == {f"{name}_code": torch.uint8, f"{name}_most": torch.float32}
    back = storage.unpack(name, packed, x)
    assert back.shape == x.shape and not back[::5].any()
    for ours, theirs in zip(back.split(64), x.split(64), strict=True):
        most = theirs.abs().max()
        torch.testing.assert_close(ours.abs().max(), most, rtol=0.008, atol=0)
        big = theirs.abs() > most * (0.1 if name == "mu" else 0.01)  # a second moment is kept as its root
        torch.testing.assert_close(ours[big], theirs[big], rtol=0.08, atol=0)
        assert (ours - theirs).abs().max() <= 0.02 * most


@pytest.mark.parametrize("storage", [moments_module.stored_as(torch.bfloat16), moments_module.stored_in_8_bits()])
@pytest.mark.parametrize("make", [optimizers.adamw, optimizers.lion, optimizers.sgd])
def test_small_moments_descend_about_as_far(storage, make):
    """On a badly scaled quadratic, half a bowl of 300 numbers."""
    (p,) = draw(0, (300,), dtype=torch.float32)
    scale = torch.logspace(-2, 0, 300)

    def descend_on(optimizer):
        x, group = p, optimizer.group("q")
        moments = optimizer.init(x, group)
        for i in range(150):
            scalars = optimizer.scalars(torch.tensor(i), torch.tensor(i), group)
            x, moments = optimizer.update(x, x * scale, moments, scalars, group)
        return float((x * x * scale).sum()), moments

    rate = optimizers.schedule("cosine", 0.02, 150)
    kept, moments = descend_on(make(rate, weight_decay=0.0, storage=storage))
    wide, plain = descend_on(make(rate, weight_decay=0.0))
    start = float((p * p * scale).sum())
    assert wide < 0.3 * start and abs(kept - wide) < 0.1 * start
    size = sum(m.nbytes for m in plain.values())
    assert sum(m.nbytes for m in moments.values()) <= (0.5 if storage.whole is False else 0.45) * size


# combinations --------------------------------------------------------------------------------------------------------


def test_by_path_is_each_optimizer_on_its_leaves():
    adamw, lion = optimizers.adamw(RATES), optimizers.lion(optimizers.schedule("constant", 0.5, 9))
    both = optimizers.by_path(("layers/.*/q", lion), (".*bias", None), ("layers/.*|embed", adamw))
    assert both.group("layers/0/q_bias") is None
    p, *grads = draw(0, *[(3, 2)] * 4)
    for path, alone in (("layers/0/q", lion), ("layers/0/o", adamw), ("embed", adamw)):
        for ours, theirs in zip(descend(both, path, p, grads), descend(alone, path, p, grads), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    with pytest.raises(ValueError, match="no optimizer's regex matches 'norm'; add one for it"):
        both.group("norm")
    assert not both.whole and optimizers.by_path(("q", optimizers.adafactor(RATES, SPECS)), (".*", adamw)).whole


@given(st.floats(0, 0.999), st.integers(0, 99))
@settings(max_examples=10)
def test_an_average_follows_its_closed_form(decay, seed):
    p, *grads = draw(seed, *[(3, 2)] * 6)
    plain = optimizers.sgd(RATES)
    ours, moments = descend(optimizers.with_ema(plain, decay), "q", p, grads)
    path = [p, *(descend(plain, "q", p, grads[: i + 1])[0] for i in range(5))]
    torch.testing.assert_close(ours, path[-1], rtol=0, atol=0)
    wanted = decay**5 * p + sum((1 - decay) * decay ** (4 - i) * x for i, x in enumerate(path[1:]))
    torch.testing.assert_close(moments["ema"], wanted, rtol=1e-12, atol=1e-12)
    low = optimizers.with_ema(plain, decay).init(p.to(torch.bfloat16), plain.group("q"))
    assert low["ema"].dtype == torch.float32


# options -------------------------------------------------------------------------------------------------------------


def test_options_build_what_they_say():
    o = OptimOptions(
        name="muon", lr=0.5, weight_decay=0.2, ema=0.9, moments="bfloat16",
        groups=("embed -> frozen", "layers/.*/router -> lion lr=0.25 weight_decay=0.3", ".*norm -> lr=0.125"),
    )  # fmt: skip
    built = optimizers.from_options(o, 10, SPECS)
    assert built.group("embed") is None and not built.whole
    late = torch.tensor(1)  # after the warm-up of one step

    def about(path):
        group = built.group(path)
        scalars = built.scalars(late, late, group)
        return float(scalars["lr"]), 1 - float(scalars["keep"]), sorted(built.init(torch.ones(5, 4), group))

    assert about("layers/0/router") == (0.25, pytest.approx(0.25 * 0.3), ["ema", "mu"])
    assert about("layers/0/q") == (0.5, pytest.approx(0.5 * 0.2), ["ema", "mu"])
    assert about("layers/0/q_bias") == (0.5, 0.0, ["ema", "mu", "nu"])
    assert about("norm")[0] == 0.125
    assert built.init(torch.ones(5, 4), built.group("layers/0/q"))["mu"].dtype == torch.bfloat16
    plain = optimizers.from_options(OptimOptions(), 10, SPECS)
    assert plain.group("embed") == (0.1,) and not plain.whole


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ("embed", "expected 'REGEX -> frozen' or"), ("embed ->", "expected 'REGEX -> frozen' or"),
        ("-> frozen", "expected 'REGEX -> frozen' or"), ("a -> frozen lr=1", "expected 'REGEX -> frozen' or"),
        ("a -> adam", "NAME one of adamw, muon, lion, sgd, adafactor; not 'adam'"),
        ("a -> lr=-1", "lr=-1 is not a number of at least 0"), ("a -> lr=nan", "lr=nan is not a number"),
        ("a -> lr=big", "'big' is no number"), ("a -> lr=1 lr=2", "each once"),
        ("a( -> frozen", "is not a regular expression"),
    ],
)  # fmt: skip
def test_wrong_groups_are_named(groups, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        OptimOptions(groups=(groups,))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(momentum=0.8), "--optim.momentum has no effect with --optim.name adamw, only with muon or sgd; leave it"),
        (dict(muon_scale="original", name="lion"), "--optim.muon-scale has no effect with --optim.name lion, only"),
        (dict(betas=(0.9, 0.99), name="sgd"), "--optim.betas has no effect with --optim.name sgd, only with adamw or"),
        (dict(eps=1e-6, name="lion", groups=("embed -> sgd",)), "--optim.eps has no effect with --optim.name lion"),
        (dict(decay=0.5), "--optim.decay has no effect with --optim.schedule cosine, only with wsd; leave it at 0.2"),
        (dict(floor=0.5, schedule="constant"), "--optim.floor has no effect with --optim.schedule constant"),
    ],
)
def test_options_without_effect_are_named(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        OptimOptions(**options)


def test_options_that_a_group_or_the_schedule_reads_are_taken():
    OptimOptions(momentum=0.8, muon_scale="original", groups=("layers/.*/q -> muon", ".*norm -> frozen"))
    OptimOptions(name="muon", betas=(0.9, 0.99), eps=1e-6)  # for what is no matrix
    OptimOptions(name="sgd", eps=1e-6, groups=("embed -> adamw",), schedule="wsd", decay=0.5, floor=0.5)


def test_decay_is_what_was_said():
    late = torch.tensor(1)

    def decay(path, **options):
        built = optimizers.from_options(OptimOptions(lr=1.0, weight_decay=0.2, **options), 10, SPECS)
        return 1 - float(built.scalars(late, late, built.group(path))["keep"])

    assert decay("layers/0/router", name="muon") == pytest.approx(0.2)
    assert decay("layers/0/router", name="muon", no_decay=(".*router",)) == 0
    assert decay("norm") == 0 and decay("norm", groups=(".*norm -> weight_decay=0.5",)) == pytest.approx(0.5)
    assert decay("norm", groups=(".*norm -> lr=1",)) == 0


def test_groups_that_name_nothing_are_refused():
    with pytest.raises(ValueError, match="'embed -> frozen': groups before it take all that it matches; put it first"):
        optimizers.from_options(OptimOptions(groups=(".* -> lion", "embed -> frozen")), 10, SPECS)
    with pytest.raises(ValueError, match="--optim.moments 8bit: adafactor keeps rows and columns, in float32 only"):
        optimizers.from_options(OptimOptions(groups=("embed -> adafactor",), moments="8bit"), 10, SPECS)
    with pytest.raises(ValueError, match="'layer/.* -> frozen': no parameter has such a path; they are like norm"):
        optimizers.from_options(OptimOptions(groups=("layer/.* -> frozen",)), 10, SPECS)
    with pytest.raises(ValueError, match="muon is for matrices; embed"):
        optimizers.from_options(OptimOptions(groups=("embed -> muon",)), 10, SPECS).group("embed")
    with pytest.raises(ValueError, match="--optim.ema is 1.0; it must be at least 0 and below 1"):
        OptimOptions(ema=1.0)


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
