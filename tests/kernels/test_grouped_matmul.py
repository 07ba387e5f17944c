"""kernels.grouped_matmul and kernels.experts against their definitions."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import kernels

COUNTS = st.lists(st.sampled_from([0, 0, 1, 2, 3, 8, 17]), min_size=1, max_size=7)
EVEN, ODD = (16, 24), (3, 5)
BACKENDS = ("blas", EVEN), ("blas", ODD), ("torch", EVEN), ("reference", EVEN)
"""`F.grouped_mm`, which `blas` too calls for few rows, wants rows of a multiple of 16 bytes."""


def loop(x, w, counts):
    """Multiply each expert's rows on their own; the rest are zeros."""
    parts = [rows @ m.T for rows, m in zip(x[: sum(counts)].split(counts), w, strict=True)]
    return torch.cat([*parts, x.new_zeros(x.shape[0] - sum(counts), w.shape[1])])


def made(counts, rest, dtype, seed, wide=ODD):
    """Draw rows, matrices and an output gradient; `wide` is (inputs, outputs) of a matrix."""
    gen = torch.Generator().manual_seed(seed)
    R, (inputs, outputs) = sum(counts) + rest, wide
    shapes = (R, inputs), (len(counts), outputs, inputs), (R, outputs)
    return [torch.randn(s, generator=gen, dtype=torch.float64).to(dtype) for s in shapes]


def run(fn, x, w, grad):
    x, w = x.clone().requires_grad_(), w.clone().requires_grad_()
    out = fn(x, w)
    return out, *torch.autograd.grad(out, (x, w), grad)


@pytest.mark.parametrize("backend", ("blas", "reference"))
@given(counts=COUNTS, rest=st.integers(0, 4), seed=st.integers(0, 99))
@settings(max_examples=40)
def test_backends_equal_a_loop_in_float64(backend, counts, rest, seed):
    x, w, grad = made(counts, rest, torch.float64, seed)
    ours = run(lambda x, w: kernels.grouped_matmul(x, w, torch.tensor(counts), backend=backend), x, w, grad)
    for a, b in zip(ours, run(lambda x, w: loop(x, w, counts), x, w, grad), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize(("backend", "wide"), BACKENDS)
@given(counts=COUNTS, rest=st.integers(0, 4), seed=st.integers(0, 99))
@settings(max_examples=15)
def test_backends_are_as_exact_as_their_dtype(backend, wide, dtype, tolerance, counts, rest, seed):
    x, w, grad = made(counts, rest, dtype, seed, wide)
    ours = run(lambda x, w: kernels.grouped_matmul(x, w, torch.tensor(counts), backend=backend), x, w, grad)
    wanted = run(lambda x, w: loop(x, w, counts), *(t.double() for t in (x, w, grad)))
    for a, b in zip(ours, wanted, strict=True):
        assert a.dtype == dtype
        torch.testing.assert_close(a.double(), b, rtol=tolerance, atol=tolerance * 8)


@pytest.mark.parametrize(("backend", "wide"), BACKENDS)
@pytest.mark.parametrize("counts", [[2, 0, 3], [0, 0, 0], [0, 5, 0], [700, 0, 500]])
def test_rows_of_no_expert_give_and_take_nothing(backend, wide, counts):
    """Poison them, and what comes back for them: the others' results and every matrix stay as they were."""
    x, w, grad = made(counts, 4, torch.float32, 0, wide)
    dirty_x, dirty_grad = x.clone(), grad.clone()
    dirty_x[sum(counts) :], dirty_grad[sum(counts) :] = torch.nan, torch.nan

    def fn(x, w):
        return kernels.grouped_matmul(x, w, torch.tensor(counts), backend=backend)

    junk = torch.full((200_000,), torch.nan)  # what a result left unwritten would likely hold
    del junk
    clean, dirty = run(fn, x, w, grad), run(fn, dirty_x, w, dirty_grad)
    for a, b in zip(clean, dirty, strict=True):
        assert torch.equal(a, b)
    out, dx, _ = dirty
    assert not out[sum(counts) :].any() and not dx[sum(counts) :].any()


def test_wrong_backends_are_named():
    with pytest.raises(ValueError, match="no backend 'cutlass' for device 'cpu'; it has blas, torch, reference"):
        kernels.grouped_matmul(torch.ones(1, 1), torch.ones(1, 1, 1), torch.tensor([1]), backend="cutlass")


# experts -------------------------------------------------------------------------------------------------------------


@st.composite
def routed(draw):
    """Draw tokens, weights and distinct experts per token (E = padding), and the experts' matrices, in float64."""
    T, E = draw(st.integers(1, 13)), draw(st.integers(1, 6))
    D, hidden = draw(st.sampled_from([(3, 4), (16, 8)]))
    K = draw(st.integers(1, E))
    gen = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    expert = torch.rand(T, E, generator=gen).argsort(1)[:, :K]
    if draw(st.booleans()):
        expert = torch.arange(K).expand(T, K).clone()  # all rows to few experts
    expert[torch.rand(T, generator=gen) < draw(st.sampled_from([0.0, 0.4, 1.0]))] = E
    shapes = (T, D), (T, K), (E, 2, hidden, D), (E, D, hidden), (T, D)
    x, weights, gate_up, down, grad = (torch.randn(s, generator=gen, dtype=torch.float64) for s in shapes)
    return expert, (x, weights, gate_up, down), grad


def dense(x, weights, gate_up, down, expert):
    """Apply every expert to every token and keep what was chosen."""
    out = torch.zeros_like(x)
    for e, ((gate, up), last) in enumerate(zip(gate_up, down, strict=True)):
        share = (weights * (expert == e)).sum(1, keepdim=True)
        out = out + share * ((F.silu(x @ gate.T) * (x @ up.T)) @ last.T)
    return out


def results(fn, leaves, grad):
    leaves = [t.clone().requires_grad_() for t in leaves]
    out = fn(*leaves)
    return out, *torch.autograd.grad(out, leaves, grad)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("backend", ["blas", "reference"])
@given(case=routed())
@settings(max_examples=60)
def test_experts_equal_a_dense_loop(backend, dtype, tolerance, case):
    """In 16 bit within some roundings of what the sums are made of, which may cancel; the loop is in float64."""
    expert, leaves, grad = case
    leaves, grad, n = [t.to(dtype) for t in leaves], grad.to(dtype), leaves[2].shape[0]
    wide = [t.double() for t in leaves]

    def ours(x, weights, gate_up, down):
        return kernels.experts(x, weights, expert, gate_up, down, n, backend=backend)

    loop = lambda *p: dense(*p, expert)  # noqa: E731
    wants = results(loop, wide, grad.double())
    sizes = results(loop, [t.abs() for t in wide], grad.double().abs())
    for a, b, size in zip(results(ours, leaves, grad), wants, sizes, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=0, atol=tolerance * max(1.0, size.abs().max().item()))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("backend", ["blas", "reference"])
@given(case=routed())
@settings(max_examples=20)
def test_padding_tokens_give_and_take_nothing(backend, dtype, case):
    expert, leaves, grad = case
    (x, weights, gate_up, down), grad = (t.to(dtype) for t in leaves), grad.to(dtype)
    n, padding = gate_up.shape[0], expert[:, 0] == gate_up.shape[0]

    def ours(x, weights, gate_up, down):
        return kernels.experts(x, weights, expert, gate_up, down, n, backend=backend)

    clean = results(ours, (x, weights, gate_up, down), grad)
    dirty_x = torch.where(padding[:, None], torch.nan, x)
    dirty = results(ours, (dirty_x, weights, gate_up, down), grad)
    for a, b in zip(clean, dirty, strict=True):
        assert torch.equal(a, b)
    assert not dirty[0][padding].any() and not dirty[1][padding].any() and not dirty[2][padding].any()


def test_equal_experts_act_as_one():
    """Weights that sum to one over copies of one expert give that expert, worked out by hand."""
    x = torch.tensor([[1.0, -2.0]], dtype=torch.float64)
    gate_up = torch.tensor([[[0.5, 0.25]], [[2.0, -1.0]]], dtype=torch.float64).expand(3, 2, 1, 2)
    down = torch.tensor([[3.0], [-1.0]], dtype=torch.float64).expand(3, 2, 1)
    out = kernels.experts(x, torch.tensor([[0.25, 0.75]]).double(), torch.tensor([[2, 0]]), gate_up, down, 3)
    hidden = 0.0 * 4.0  # silu(0.5 - 0.5) * (2 + 2)
    assert torch.equal(out, torch.tensor([[3 * hidden, -hidden]], dtype=torch.float64))
    x = torch.tensor([[2.0, 0.0]], dtype=torch.float64)  # silu(1) * 4
    out = kernels.experts(x, torch.tensor([[0.25, 0.75]]).double(), torch.tensor([[2, 0]]), gate_up, down, 3)
    hidden = 4 / (1 + torch.exp(torch.tensor(-1.0, dtype=torch.float64)))
    torch.testing.assert_close(out, torch.stack([3 * hidden, -hidden])[None], rtol=1e-15, atol=0)
