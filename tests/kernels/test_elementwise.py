"""kernels: embedding, rms_norm, rope and swiglu against torch, transformers and closed forms."""

import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.models.deepseek_v3 import modeling_deepseek_v3 as deepseek
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.glm4 import modeling_glm4 as glm4
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLRotaryEmbedding
from transformers.models.qwen3_next import modeling_qwen3_next as qwen3_next
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLTextRotaryEmbedding

import kernels

SHAPES = st.tuples(st.integers(1, 3), st.integers(1, 5), st.integers(1, 7))


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def with_grads(fn, *leaves):
    leaves = [x.clone().requires_grad_() for x in leaves]
    out = fn(*leaves)
    return out, *torch.autograd.grad(out, leaves, torch.cos(torch.arange(out.numel(), dtype=out.dtype)).view(out.shape))


def assert_same(ours, theirs, tolerance=1e-12):
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@given(SHAPES, st.integers(1, 9), st.integers(0, 99))
@settings(max_examples=30)
def test_embedding_and_its_gradient(shape, vocab, seed):
    tokens = torch.randint(vocab, shape[:2], generator=torch.Generator().manual_seed(seed))
    table = draw(vocab, shape[2], seed=seed)
    whole = with_grads(lambda w: w[tokens], table)
    assert_same(with_grads(lambda w: kernels.embedding(w, tokens), table), whole)
    for n in [n for n in range(2, 5) if vocab % n == 0]:  # parts of the vocabulary add up
        parts = lambda w, n=n: sum(kernels.embedding(p, tokens, (i, n)) for i, p in enumerate(w.chunk(n)))  # noqa: E731
        assert_same(with_grads(parts, table), whole)


@given(SHAPES, st.sampled_from([1e-6, 1e-2, 1.0]), st.integers(0, 99))
@settings(max_examples=30)
def test_rms_norm_equals_torch(shape, eps, seed):
    x, scale = draw(*shape, seed=seed), draw(shape[-1], seed=seed + 1)
    assert_same(
        with_grads(lambda x, s: kernels.rms_norm(x, s, eps), x, scale),
        with_grads(lambda x, s: F.rms_norm(x, (shape[-1],), s, eps), x, scale),
    )


def with_weight(module, scale):
    """Return a peer's norm of hidden states, and a gate if it takes one, with `scale` for its weight."""
    return lambda *given: torch.func.functional_call(module, {"weight": scale}, given)


@given(SHAPES, st.sampled_from([1e-6, 1e-2, 1.0]), st.integers(0, 99))
@settings(max_examples=30)
def test_rms_norm_with_an_offset_or_a_gate(shape, eps, seed):
    """In float64 by hand; transformers' modules compute in float32."""
    D = shape[-1]
    x, gate = draw(2, *shape, seed=seed)
    scale = draw(D, seed=seed + 1)
    by_hand = lambda x: x / (x.square().sum(-1, keepdim=True) / D + eps).sqrt()  # noqa: E731
    offset = lambda x, s: kernels.rms_norm(x, s, eps, offset=1.0)  # noqa: E731
    gated = lambda x, s, g: kernels.rms_norm(x, s, eps, gate=g)  # noqa: E731
    assert_same(with_grads(offset, x, scale), with_grads(lambda x, s: by_hand(x) * (1 + s), x, scale))
    wanted = with_grads(lambda x, s, g: by_hand(x) * s * g / (1 + torch.exp(-g)), x, scale, gate)
    assert_same(with_grads(gated, x, scale, gate), wanted)

    x, gate, scale = x.float(), gate.float(), scale.float()
    for peer in (Gemma3RMSNorm(D, eps), qwen3_next.Qwen3NextRMSNorm(D, eps)):
        theirs = with_grads(lambda x, s, peer=peer: with_weight(peer, s)(x), x, scale)
        assert_same(with_grads(offset, x, scale), theirs, 1e-4)
    peer = qwen3_next.Qwen3NextRMSNormGated(D, eps)
    theirs = with_grads(lambda x, s, g: with_weight(peer, s)(x, g), x, scale, gate)
    assert_same(with_grads(gated, x, scale, gate), theirs, 1e-4)


def test_norms_in_16_bit_round_where_transformers_does():
    x, gate, scale = draw(2, 6, 8).bfloat16(), draw(2, 6, 8, seed=1).bfloat16(), draw(8, seed=2).bfloat16()
    plain, gated = kernels.rms_norm(x, scale, 1e-6), kernels.rms_norm(x, scale, 1e-6, gate=gate)
    assert torch.equal(plain, with_weight(glm4.Glm4RMSNorm(8), scale)(x))
    assert torch.equal(gated, with_weight(qwen3_next.Qwen3NextRMSNormGated(8), scale)(x, gate))
    offset = kernels.rms_norm(x, scale, 1e-6, offset=1.0)
    assert torch.equal(offset, with_weight(Gemma3RMSNorm(8), scale)(x))
    assert not torch.equal(offset, kernels.rms_norm(x, 1 + scale, 1e-6))


@given(SHAPES, st.integers(0, 99))
@settings(max_examples=30)
def test_swiglu(shape, seed):
    gate, up = draw(2, *shape, seed=seed)
    assert_same(
        with_grads(lambda g, u: kernels.swiglu(torch.cat([g, u], -1)), gate, up),
        with_grads(lambda g, u: g / (1 + torch.exp(-g)) * u, gate, up),
    )


@given(SHAPES, st.sampled_from([0.3, 7.0]), st.sampled_from([1.0, 1.702]), st.integers(0, 99))
@settings(max_examples=30)
def test_clamped_swiglu(shape, limit, alpha, seed):
    """By its cases: what is beyond the limit is the limit, and takes no gradient."""
    gate, up = draw(2, *shape, seed=seed)
    act = kernels.Activation("clamped_swiglu", limit, alpha)
    out, *grads = with_grads(lambda g, u: act(torch.cat([g, u], -1)), gate, up)
    g, u, along = gate.clip(max=limit), up.clip(-limit, limit), torch.cos(torch.arange(out.numel())).double()
    sigmoid, along = 1 / (1 + torch.exp(-alpha * g)), along.view(shape)
    slope = sigmoid * (1 + alpha * g * (1 - sigmoid)) * (gate <= limit)
    wants = g * sigmoid * (u + 1), along * slope * (u + 1), along * g * sigmoid * (up.abs() <= limit)
    assert_same((out, *grads), wants, 1e-7)


@given(SHAPES, st.integers(0, 99))
@settings(max_examples=30)
def test_geglu(shape, seed):
    """Its gelu by tanh is within 1e-3 of the one by erf, whose closed form is known; the same formula by hand is it."""
    gate, up = draw(2, *shape, seed=seed)
    ours = with_grads(lambda g, u: kernels.Activation("geglu")(torch.cat([g, u], -1)), gate, up)
    root = math.sqrt(2 / math.pi)
    by_hand = lambda g, u: g / 2 * (1 + torch.tanh(root * (g + 0.044715 * g**3))) * u  # noqa: E731
    assert_same(ours, with_grads(by_hand, gate, up))
    torch.testing.assert_close(ours[0], gate / 2 * (1 + torch.erf(gate / math.sqrt(2))) * up, rtol=0, atol=4e-3)


@pytest.mark.parametrize("kind", ["swiglu", "geglu", "clamped_swiglu"])
def test_activations_in_16_bit_round_once(kind):
    act, x = kernels.Activation(kind), draw(64, 40).to(torch.bfloat16)
    wanted = act(x.double())
    assert act(x).dtype == torch.bfloat16
    rounding = 2**-8 * (3 if kind == "swiglu" else 1)  # PyTorch's silu rounds, and so does the product
    assert ((act(x).double() - wanted).abs() <= rounding * wanted.abs() + 1e-6).all()


def test_unknown_activations_are_named():
    with pytest.raises(ValueError, match="activation 'relu' is unknown; these are: swiglu, geglu, clamped_swiglu"):
        kernels.Activation("relu").check()


@given(st.integers(1, 4), st.integers(1, 3), st.integers(1, 4), st.integers(0, 99))
@settings(max_examples=30)
def test_rope_multiplies_by_a_complex_phase(S, N, half, seed):
    x, angle = draw(2, S, N, 2 * half, seed=seed), draw(2, S, half, seed=seed + 1)
    z = torch.complex(x[..., :half], x[..., half:]) * torch.polar(torch.ones_like(angle), angle)[:, :, None]
    assert_same([kernels.rope(x, angle.cos(), angle.sin())], [torch.cat([z.real, z.imag], -1)])


@given(st.integers(1, 4), st.integers(1, 3), st.integers(1, 4), st.integers(0, 3), st.integers(0, 99))
@settings(max_examples=30)
def test_rope_of_part_of_a_head_and_of_neighbours(S, N, half, rest, seed):
    """Against Qwen3-Next's, GLM-4's and DeepSeek-V3's; the last also moves each pair's numbers h apart."""
    x, angle = draw(2, S, N, 2 * half + rest, seed=seed), draw(2, S, half, seed=seed + 1)
    cos, sin = angle.cos(), angle.sin()
    tables = [torch.cat([t, t], -1) for t in (cos, sin)]

    def theirs(fn):
        return lambda x: fn(x, x, *tables, unsqueeze_dim=2)[0]

    for interleaved, fn in ((False, qwen3_next.apply_rotary_pos_emb), (True, glm4.apply_rotary_pos_emb)):
        ours = with_grads(lambda x, i=interleaved: kernels.rope(x, cos, sin, i), x)
        assert_same(ours, with_grads(theirs(fn), x))
    x = x[..., : 2 * half]
    apart = lambda x: kernels.rope(x, cos, sin, True).unflatten(-1, (-1, 2)).mT.flatten(-2)  # noqa: E731
    assert_same(with_grads(apart, x), with_grads(theirs(deepseek.apply_rotary_pos_emb_interleave), x))


@given(st.integers(1, 4), st.integers(0, 4), st.integers(0, 4), st.integers(1, 3), st.integers(0, 99))
@settings(max_examples=50)
def test_sections_of_time_height_and_width(time, height, width, S, seed):
    sizes = (time, height, width)
    table = draw(3, 2, S, sum(sizes), seed=seed)
    for peer, interleaved in ((Qwen2_5_VLRotaryEmbedding, False), (Qwen3VLTextRotaryEmbedding, True)):
        theirs = peer.recomposition_frequencies(SimpleNamespace(mrope_section=sizes), table.clone())
        assert torch.equal(kernels.rope_sections(table, sizes, interleaved), theirs[..., : sum(sizes)])


def test_sections_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"sections \(2, 1, 1\) need a table of \(3, B, S, 4\), not of \(3, 1, 2, 5\)"):
        kernels.rope_sections(torch.zeros(3, 1, 2, 5), (2, 1, 1))


def test_rope_by_hand():
    quarter = torch.tensor([[[math.pi / 2]]])
    out = kernels.rope(torch.tensor([[[[3.0, 5.0]]]]), quarter.cos(), quarter.sin())
    torch.testing.assert_close(out, torch.tensor([[[[-5.0, 3.0]]]]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_dtypes_stay_and_maths_is_at_least_float32(dtype):
    x, scale = draw(2, 3, 4, 6).to(dtype), draw(6).to(dtype)
    wide = torch.promote_types(dtype, torch.float32)
    tables = torch.rand(2, 3, 3, dtype=wide), torch.rand(2, 3, 3, dtype=wide)
    norms = (kernels.rms_norm, (scale, 1e-6)), (kernels.rms_norm, (scale, 1e-6, 1.0))
    for fn, args in (*norms, (kernels.rope, tables), (kernels.rope, (*tables, True)), (kernels.swiglu, ())):
        out = fn(x, *args)
        assert out.dtype == dtype
        exact = fn(x.double(), *(a.double() if isinstance(a, torch.Tensor) else a for a in args))
        # One rounding to the dtype, and one more where a norm's scale is multiplied in it.
        torch.testing.assert_close(
            out.double(), exact, rtol=4 * torch.finfo(dtype).eps, atol=4 * torch.finfo(dtype).eps
        )
    assert kernels.promote(x).dtype == wide
