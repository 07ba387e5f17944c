"""kernels.attention: every backend of the CPU against the reference, and the reference against a loop over queries."""

import importlib
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import kernels

FAST = ("documents", "sdpa")
module = importlib.import_module("kernels.attention_documents")


@st.composite
def cases(draw):
    """Draw packed rows (documents, some starting late, then padding) with q, k, v and an output gradient in float64."""
    B, S = draw(st.integers(1, 3)), draw(st.integers(1, 17))
    kv, groups, H = draw(st.integers(1, 3)), draw(st.sampled_from([1, 2, 3, 5])), draw(st.sampled_from([2, 3, 7, 8]))
    segments, positions = torch.zeros(2, B, S, dtype=torch.int64)
    for row in range(B):
        end, lengths = 0, draw(st.lists(st.integers(1, 9), max_size=6))
        for i, length in enumerate(lengths):
            at = slice(end, min(end + length, S))
            first = draw(st.sampled_from([0, 0, 5]))
            segments[row, at] = i + 1
            positions[row, at] = first + torch.arange(at.stop - at.start)
            end = at.stop
            if end == S:
                break
    gen = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    make = lambda *shape: torch.randn(shape, generator=gen, dtype=torch.float64)  # noqa: E731
    q, k, v, grad = make(B, S, kv * groups, H), make(B, S, kv, H), make(B, S, kv, H), make(B, S, kv * groups, H)
    window = draw(st.sampled_from([None, 1, 2, 3, 6, 100]))
    scale = draw(st.sampled_from([None, 0.3]))
    return (q, k, v, grad), (segments, positions), {"window": window, "scale": scale}


def run(backend, tensors, rows, options):
    """Return output, dq, dk, dv; the output gradient is 0 at padding, as every loss's is."""
    *leaves, grad = (t.detach().clone() for t in tensors)
    leaves = [t.requires_grad_() for t in leaves]
    out = kernels.attention(*leaves, *rows, **options, backend=backend)
    real = (rows[0] != 0)[..., None, None]
    return out * real, *torch.autograd.grad(out, leaves, grad * real)


def loop(q, k, v, q_rows, k_rows, window, scale):
    """Attend one query and one head at a time."""
    out = torch.zeros_like(q)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    (sq, pq), (sk, pk) = ([t.tolist() for t in rows] for rows in (q_rows, k_rows))
    for b, s, n in torch.cartesian_prod(*map(torch.arange, q.shape[:3])).tolist():
        far = math.inf if window is None else window
        seen = [t for t in range(k.shape[1]) if sk[b][t] == sq[b][s] and 0 <= pq[b][s] - pk[b][t] < far]
        head = n // (q.shape[2] // k.shape[2])
        weights = torch.softmax(torch.stack([q[b, s, n] @ k[b, t, head] * scale for t in seen]), 0)
        out[b, s, n] = sum(w * v[b, t, head] for w, t in zip(weights, seen, strict=True))
    return out


@given(cases())
@settings(max_examples=12)
def test_the_reference_equals_a_loop_over_queries(case):
    (q, k, v, _), rows, options = case
    ours = kernels.attention(q, k, v, *rows, **options, backend="reference")
    torch.testing.assert_close(ours, loop(q, k, v, rows, rows, **options), rtol=1e-12, atol=1e-12)


@given(cases())
@settings(max_examples=60)
def test_every_backend_equals_the_reference_in_float64(case):
    wanted = run("reference", *case)
    for backend in FAST:
        for name, ours, theirs in zip(("out", "dq", "dk", "dv"), run(backend, *case), wanted, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9, msg=lambda m, w=(backend, name): f"{w} {m}")


@pytest.mark.parametrize("dense", [0, 3, 5])
@given(case=cases(), tile=st.sampled_from([1, 60, 2**18]))
@settings(max_examples=30)
def test_documents_are_the_same_by_tiles_and_by_flash_calls(dense, case, tile):
    """Documents of up to `dense` tokens share tiles, few of them if tiles are small; the others are flash calls."""
    wanted = run("reference", *case)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "DENSE", dense)
        patch.setattr(module, "TILE", tile)
        module._plan.cache_clear()
        ours = run("documents", *case)
    module._plan.cache_clear()
    for a, b in zip(ours, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_tiles_hold_documents_of_about_one_length():
    """20 documents of 16 to 111 tokens are in few tiles, hardly padded; one of 300 and padding are not."""
    lengths = [*range(16, 121, 5)[:20], 300, 30]
    segments = torch.repeat_interleave(torch.tensor([*range(1, 22), 0]), torch.tensor(lengths))[None]
    plan = module._plan_of(segments, torch.empty(1, segments.shape[1], 6, 2), 2, None, True, None, None, False)
    assert plan.long == [(sum(lengths[:20]), 300, 0, 0)]
    assert sum(t.documents for t in plan.tiles) == 20 and len(plan.tiles) <= 6
    slots = sum(t.documents * t.length for t in plan.tiles)
    assert sum(lengths[:20]) < slots < 1.2 * sum(lengths[:20]) + 8 * 20
    assert all(t.documents * t.length**2 * 6 <= module.TILE for t in plan.tiles)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("backend", FAST)
@given(case=cases())
@settings(max_examples=15)
def test_backends_are_as_exact_as_their_dtype(backend, dtype, tolerance, case):
    tensors, *rest = case
    tensors = [t.to(dtype) for t in tensors]
    wanted = run("reference", [t.double() for t in tensors], *rest)
    for ours, theirs in zip(run(backend, tensors, *rest), wanted, strict=True):
        assert ours.dtype == dtype
        torch.testing.assert_close(
            ours.double(), theirs, rtol=tolerance, atol=tolerance * max(1.0, float(theirs.detach().abs().max()))
        )


@given(cases())
@settings(max_examples=20)
def test_no_document_sees_another_or_padding(case):
    """Poison all of the row but one document: its results stay, so nothing came from outside it."""
    (q, k, v, _), (segments, positions), options = case
    mine = (segments == 1)[..., None, None]
    for backend in (*FAST, "reference"):
        clean = kernels.attention(q, k, v, segments, positions, **options, backend=backend)
        poisoned = [torch.where(mine, t, 1e6) for t in (q, k, v)]
        dirty = kernels.attention(*poisoned, segments, positions, **options, backend=backend)
        torch.testing.assert_close(clean * mine, dirty * mine, rtol=1e-12, atol=1e-12)


def test_padding_gives_zeros_and_takes_no_gradient_in_documents():
    segments = torch.tensor([[1, 1, 0, 0], [0, 0, 0, 0]])
    q, k, v = (torch.randn(2, 4, n, 3, dtype=torch.float64, requires_grad=True) for n in (2, 1, 1))
    out = kernels.attention(q, k, v, segments, torch.tensor([[0, 1, 0, 0], [0, 0, 0, 0]]), backend="documents")
    padding = segments == 0
    assert not out[padding].any()
    for grad in torch.autograd.grad(out.sum(), (q, k, v)):
        assert not grad[padding].any()


def test_no_rows_give_no_rows():
    segments, q = torch.zeros(0, 4, dtype=torch.int64), torch.randn(0, 4, 2, 3, requires_grad=True)
    out = kernels.attention(q, q, q, segments, segments, backend="documents")
    assert out.shape == q.shape == torch.autograd.grad(out.sum(), q)[0].shape


def test_padding_stays_finite_everywhere():
    segments, positions = torch.zeros(2, 1, 5, dtype=torch.int64)
    q, k, v = (torch.randn(1, 5, n, 4, requires_grad=True) for n in (3, 1, 1))
    for backend in (*FAST, "reference"):
        out = kernels.attention(q, k, v, segments, positions, window=2, backend=backend)
        assert all(x.isfinite().all() for x in (out, *torch.autograd.grad(out.sum(), (q, k, v))))


@given(
    st.lists(st.integers(0, 6), min_size=1, max_size=3), st.integers(1, 3), st.sampled_from([None, 1, 3]),
    st.integers(0, 3), st.integers(0, 99),
)  # fmt: skip
@settings(max_examples=25)
def test_a_kv_cache_equals_a_loop_over_queries(padding, new, window, unused, seed):
    """Left-padded rows, `new` queries at the end of what is filled, then empty slots."""
    filled = 7
    T = filled + unused
    at = torch.arange(T)
    pad = torch.tensor(padding)[:, None]
    segments = ((at >= pad) & (at < filled)).to(torch.int64)
    positions = (at - pad).clamp_min(0) * segments
    rows = [t[:, filled - new : filled] for t in (segments, positions)]
    gen = torch.Generator().manual_seed(seed)
    shapes = (len(padding), new, 6, 5), (len(padding), T, 2, 5), (len(padding), T, 2, 5)
    q, k, v = (torch.randn(s, generator=gen, dtype=torch.float64) for s in shapes)
    real = rows[0][..., None, None]
    wanted = loop(q, k, v, rows, (segments, positions), window, None)
    for backend in (None, "sdpa", "reference"):
        ours = kernels.attention(q, k, v, *rows, segments, positions, window=window, backend=backend)
        torch.testing.assert_close(ours * real, wanted * real, rtol=1e-9, atol=1e-9)


def test_wrong_backends_are_named():
    q, rows = torch.randn(1, 4, 2, 4), (torch.ones(1, 4, dtype=torch.int64), torch.arange(4)[None])
    with pytest.raises(ValueError, match="no backend 'flsh' for device 'cpu'; it has documents, sdpa_float32, sdpa, "):
        kernels.attention(q, q, q, *rows, backend="flsh")
    with pytest.raises(ValueError, match="no backend 'flash_attn' for device 'cpu'"):
        kernels.attention(q, q, q, *rows, backend="flash_attn")
    with pytest.raises(ValueError, match="'documents' does not serve cache .* this call is for sdpa_float32, sdpa, "):
        kernels.attention(q, q, q, *rows, *rows, backend="documents")
