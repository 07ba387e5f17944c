"""Products in 8 bits against quantisation by hand, tile by tile in float64, and against exact products."""

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import kernels
from kernels import _fp8 as fp8
from kernels import _fp8_host, _fp8_shapes, moe

E4M3 = torch.float8_e4m3fn
RECIPES = pytest.mark.parametrize("recipe", kernels.RECIPES.values(), ids=kernels.RECIPES)
SIZES = st.integers(1, 300)


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Draw values of which some rows and columns are far larger than others, and some are zero."""
    gen = torch.Generator().manual_seed(seed)
    x = torch.randn(*shape, generator=gen)
    for dim in (-1, -2):
        size = [shape[dim] if d == dim % len(shape) else 1 for d in range(len(shape))]
        x = x * torch.exp2(torch.randint(-6, 7, size, generator=gen))
    return (x * (torch.rand(shape, generator=gen) > 0.1)).to(dtype)


def rounded(x: torch.Tensor, rows: int, cols: int) -> torch.Tensor:
    """Round (R, C) to e4m3 in float64, a block at a time."""
    x, out = x.double(), torch.empty_like(x, dtype=torch.float64)
    for i in range(0, x.shape[0], rows):
        for j in range(0, x.shape[1], cols):
            block = x[i : i + rows, j : j + cols]
            most, scale = block.abs().max().item(), 2.0**-126
            while most / scale > 448:
                scale *= 2
            out[i : i + rows, j : j + cols] = (block / scale).to(E4M3).double() * scale
    return out


def by_hand(name: str, x, w, g) -> tuple[torch.Tensor, ...]:
    """Return y, dx and dw of x (T, I), w (O, I), g (T, O), in float64."""
    all_ = max(*x.shape, *w.shape)
    tile, block = (128, 128) if name == "tile" else (all_, 1)
    x8, w8 = rounded(x, 1, tile), rounded(w, block, tile)
    dw = rounded(g, tile, 1).T @ rounded(x8, tile, 1)
    if name == "tile":
        return x8 @ w8.T, rounded(g, 1, tile) @ w8, dw
    scale = torch.tensor([2.0 ** max(-126, (r.abs().max() / 448).log2().ceil().item()) for r in w.double()])
    return x8 @ w8.T, rounded(g.double() * scale, 1, tile) @ (w8 / scale[:, None]), dw


def run(fn, leaves: list[torch.Tensor], grad: torch.Tensor) -> list[torch.Tensor]:
    leaves = [x.clone().requires_grad_() for x in leaves]
    out = fn(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad.to(out.dtype))]


def linear(recipe, product, x, w) -> torch.Tensor:
    return fp8.linear(x, (w,), recipe, product)


def gathered(routing, products, x, w) -> torch.Tensor:
    return fp8.gather_matmul(x, w, *routing, products)


def close(a: torch.Tensor, b: torch.Tensor, operands: float = 1.0) -> None:
    torch.testing.assert_close(a.double(), b, rtol=1e-9, atol=1e-12 * operands)


@given(rows=SIZES, cols=SIZES, dtype=st.sampled_from([torch.float32, torch.bfloat16]), seed=st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_a_value_is_rounded_as_by_hand(rows, cols, dtype, seed):
    x = randn(rows, cols, seed=seed, dtype=dtype)
    for kind in ((1, 128), (128, 128), (128, 1), (1, 0), (0, 1)):
        wanted = rounded(x, kind[0] or rows, kind[1] or cols)
        got = fp8.quantise(x, *kind)
        assert torch.equal(got.to(torch.float64), wanted)
        assert torch.equal(got.to(torch.bfloat16).double(), wanted)  # which loses nothing
        assert torch.equal(fp8.quantise(got.to(torch.bfloat16), *kind).to(torch.float64), wanted)  # nor does once more


@RECIPES
@given(tokens=SIZES, inputs=SIZES, outputs=SIZES, seed=st.integers(0, 99))
@settings(max_examples=15, deadline=None)
def test_a_linear_and_its_gradients_are_as_by_hand(recipe, tokens, inputs, outputs, seed):
    x, w, g = randn(tokens, inputs, seed=seed), randn(outputs, inputs, seed=seed + 1), randn(tokens, outputs, seed=7)
    got = run(lambda x, w: kernels.linear(x, w, recipe=recipe), [x.double(), w.double()], g)
    sizes = (x.abs().max() * w.abs().max(), g.abs().max() * w.abs().max(), g.abs().max() * x.abs().max())
    for a, b, operands in zip(got, by_hand(recipe.name, x, w, g), sizes, strict=True):
        close(a, b, operands.item() * 300)


@RECIPES
@given(tokens=SIZES, inputs=SIZES, outputs=SIZES, seed=st.integers(0, 99))
@settings(max_examples=15, deadline=None)
def test_errors_are_within_those_of_operands(recipe, tokens, inputs, outputs, seed):
    """An operand is off by 2^-4 of itself or 2^-10 of its scale, x for dw twice."""
    x, w, g = randn(tokens, inputs, seed=seed), randn(outputs, inputs, seed=seed + 1), randn(tokens, outputs, seed=7)
    x, w, g = x.double(), w.double(), g.double()
    got = run(lambda x, w: kernels.linear(x, w, recipe=recipe), [x, w], g)
    once = lambda t: t.abs() / 16 + t.abs().max() / 224 / 1024  # noqa: E731
    twice = lambda t: t.abs() * (17 / 16) ** 2 - t.abs() + 3 * t.abs().max() / 224 / 1024  # noqa: E731

    def bound(a, b, off_a, off_b):
        return off_a(a) @ b.abs() + a.abs() @ off_b(b) + off_a(a) @ off_b(b)

    scale = fp8.scale_of(w.abs().amax(1)) if recipe.name == "row" else 1  # g takes w's scales in
    dx = once(g * scale) @ ((w.abs() + once(w)).T / scale).T + g.abs() @ once(w)
    pairs = (x @ w.T, bound(x, w.T, once, once)), (g @ w, dx), (g.T @ x, bound(g.T, x, once, twice))
    for (exact, most), ours in zip(pairs, got, strict=True):
        assert ((ours - exact).abs() <= most * (1 + 1e-9) + 1e-30).all()


@RECIPES
@given(tokens=SIZES, inputs=SIZES, outputs=SIZES, seed=st.integers(0, 99))
@settings(max_examples=10, deadline=None)
def test_what_plans_multiply_with_is_the_emulation(recipe, tokens, inputs, outputs, seed):
    """On values; on shapes results are as large."""
    experts, slots = 3, 2
    x, w, g = randn(tokens, inputs, seed=seed), randn(experts, outputs, inputs, seed=1), randn(tokens, outputs, seed=2)
    order, inverse, counts = moe.sort_by_expert(torch.arange(tokens * slots).view(tokens, slots) % experts, experts)
    rows, routing = g.repeat(slots, 1), (counts, order, inverse, slots, recipe)
    for by_hand, planned, leaves, grad in (
        (partial(linear, recipe, fp8.matmul), partial(linear, recipe, _fp8_shapes.matmul), [x, w[0]], g),
        (partial(gathered, routing, _fp8_host), partial(gathered, routing, _fp8_shapes.PRODUCTS), [x, w], rows),
    ):
        wanted, got = run(by_hand, leaves, grad), run(planned, leaves, grad)
        assert all(map(torch.equal, wanted, got))
    on_meta = run(partial(gathered, [t.to("meta") if isinstance(t, torch.Tensor) else t for t in routing],
                          _fp8_shapes.PRODUCTS), [t.to("meta") for t in (x, w)], rows.to("meta"))  # fmt: skip
    assert [t.shape for t in on_meta] == [t.shape for t in got]


@RECIPES
def test_several_weights_are_one_product_each_with_blocks_of_its_own(recipe):
    for sizes in ((128, 256, 70), (50, 128, 70)):
        x, ws = randn(40, 200, dtype=torch.float64), [randn(n, 200, seed=n, dtype=torch.float64) for n in sizes]
        g, bias = randn(40, sum(sizes), seed=5, dtype=torch.float64), randn(1, sum(sizes), seed=6)[0].double()
        y, dx, *dws = run(partial(kernels.linear, bias=bias, recipe=recipe), [x, *ws], g)
        if recipe.name == "row" or not any(n % 128 for n in sizes[:2]):
            wanted = by_hand(recipe.name, x, torch.cat(ws), g)
        else:
            parts = [by_hand(recipe.name, x, w, part) for w, part in zip(ws, g.split(sizes, 1), strict=True)]
            wanted = torch.cat([p[0] for p in parts], 1), sum(p[1] for p in parts), torch.cat([p[2] for p in parts])
        torch.testing.assert_close((y - bias, dx, torch.cat(dws)), wanted, rtol=1e-9, atol=1e-9)


# experts -------------------------------------------------------------------------------------------------------------


@RECIPES
@pytest.mark.parametrize("products", ["_fp8_host", "_fp8_reference"])
@given(
    counts=st.lists(st.integers(0, 260), min_size=1, max_size=4), none=st.integers(0, 5), inputs=st.integers(1, 140),
    outputs=st.integers(1, 140), slots=st.integers(1, 3), gather=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
@settings(max_examples=12, deadline=None)
def test_grouped_products_are_each_expert_s(recipe, products, counts, none, inputs, outputs, slots, gather, seed):
    """Rows of no expert, whatever is in them, give zeros."""
    R = -(-(sum(counts) + none) // slots) * slots
    order = torch.randperm(R, generator=torch.Generator().manual_seed(seed))
    inverse, E = order.argsort(), len(counts)
    x = randn(R // slots if gather else R, inputs, seed=seed)
    w, g = randn(E, outputs, inputs, seed=seed + 1), randn(R if gather else R // slots, outputs, seed=seed + 2)
    fn = fp8.gather_matmul if gather else fp8.matmul_combine
    ours = getattr(kernels, products)
    call = lambda x, w: fn(x, w, torch.tensor(counts), order, inverse, slots, recipe, ours)  # noqa: E731
    got = run(call, [x.double(), w.double()], g)
    x_R, g_R = (x[order // slots], g) if gather else (x, g[order // slots])
    y, dx, dw = torch.zeros(R, outputs).double(), torch.zeros(R, inputs).double(), torch.zeros_like(w).double()
    start = 0
    for e, n in enumerate(counts):
        here = slice(start, start := start + n)
        if n:
            y[here], dx[here], dw[e] = by_hand(recipe.name, x_R[here], w[e], g_R[here])
    summed = lambda t: t[inverse].unflatten(0, (-1, slots)).sum(1)  # noqa: E731
    wanted = (y, summed(dx), dw) if gather else (summed(y), dx, dw)
    for a, b in zip(got, wanted, strict=True):
        close(a, b, 1e6)


@RECIPES
def test_backends_agree(recipe):
    leaves = [randn(*s, dtype=torch.bfloat16) / 64 for s in ((60, 32), (60, 2), (5, 2, 48, 32), (5, 32, 48))]
    ids = torch.randint(0, 6, (60, 2), generator=torch.Generator().manual_seed(0))
    call = lambda backend: lambda *t: kernels.experts(*t[:2], ids, *t[2:], 5, recipe=recipe, backend=backend)  # noqa: E731
    grad = randn(60, 32, seed=9)
    first, *others = [run(call(b), leaves, grad) for b in ("blas", "torch", "reference")]
    for other in others:  # what is between the two products may round otherwise, and then the second's operand
        for a, b in zip(other, first, strict=True):
            assert (a.double() - b.double()).norm() <= 0.03 * b.double().norm()


def test_scaled_mm_multiplies_what_was_quantised():
    x, w, g = (randn(*s, dtype=torch.bfloat16) for s in ((64, 96), (32, 96), (64, 32)))
    both = [
        run(lambda x, w, b=b: kernels.linear(x, w, recipe=kernels.RECIPES["row"], backend=b), [x, w], g)
        for b in ("scaled_mm", "reference")
    ]
    for a, b in zip(*both, strict=True):
        assert (a.double() - b.double()).abs().max() <= 2**-7 * b.double().abs().max()


# what is odd ---------------------------------------------------------------------------------------------------------


@RECIPES
def test_zeros_are_zeros_and_what_is_not_finite_stays_so(recipe):
    x, w, g = torch.zeros(3, 130), torch.zeros(5, 130), torch.zeros(3, 5)
    assert not any(t.any() for t in run(lambda x, w: kernels.linear(x, w, recipe=recipe), [x, w], g))
    for bad in (float("nan"), float("inf")):
        for i in range(3):
            odd = [randn(3, 130), randn(5, 130), randn(3, 5)]
            odd[i][1, 2] = bad
            y, dx, dw = run(lambda x, w: kernels.linear(x, w, recipe=recipe), odd[:2], odd[2])
            assert [bool(t.isfinite().all()) for t in (y, dx, dw)] == [i == 2, i == 0, i == 1]


@RECIPES
def test_packed_weights_come_back_as_they_are_rounded(recipe):
    w = randn(3, 256, 128, dtype=torch.bfloat16)
    packed = torch.stack([recipe.pack(w), recipe.pack(2 * w)])
    assert packed.shape[1] == recipe.packed(w.shape) and packed.dtype == torch.uint8
    back = recipe.unpack(packed, w.shape, torch.bfloat16)
    assert torch.equal(back, torch.stack([recipe.weight(t).to(torch.bfloat16) for t in (w, 2 * w)]))


@RECIPES
def test_compiled_it_computes_the_same(recipe):
    x, w, g = randn(60, 200, dtype=torch.bfloat16), randn(70, 200, dtype=torch.bfloat16), randn(60, 70)
    fn = lambda x, w: kernels.linear(x, w, recipe=recipe)  # noqa: E731
    compiled = torch.compile(fn, fullgraph=True, backend="aot_eager")
    assert all(torch.equal(a, b) for a, b in zip(run(fn, [x, w], g), run(compiled, [x, w], g), strict=True))
