"""kernels.linear_logprob against log-softmax over all the logits, and the memory that it may hold."""

import importlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import kernels

module = importlib.import_module("kernels.linear_logprob")  # the package's attribute of this name is the function


@st.composite
def cases(draw):
    """Draw hidden, table, targets, bias, output gradients and options."""
    T, V, D = draw(st.integers(1, 9)), draw(st.integers(1, 11)), draw(st.integers(1, 5))
    gen = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    make = lambda *shape: torch.randn(shape, generator=gen, dtype=torch.float64)  # noqa: E731
    targets = torch.randint(V, (T,), generator=gen)
    leaves = [make(T, D), make(V, D)] + ([make(V)] if draw(st.booleans()) else [])
    options = {
        "softcap": draw(st.sampled_from([0.0, 1.5, 20.0])),
        "temperature": draw(st.sampled_from([1.0, 0.7, 3.0])),
    }
    return leaves, targets, (make(T), make(T)), options


def run(fn, leaves, targets, grads, **options):
    """Return both outputs, and the gradient of every leaf."""
    leaves = [x.detach().clone().requires_grad_() for x in leaves]
    bias = leaves[2] if len(leaves) == 3 else None
    outputs = fn(leaves[0], leaves[1], targets, bias, **options)
    return *outputs, *torch.autograd.grad(outputs, leaves, grads)


def assert_equal(ours, theirs, tolerance):
    for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        torch.testing.assert_close(a.to(b.dtype), b, rtol=tolerance, atol=tolerance, msg=lambda m, i=i: f"{i}: {m}")


@given(cases(), st.integers(1, 10), st.sampled_from([0, 2**24]))
@settings(max_examples=80)
def test_equals_log_softmax_in_float64_whatever_the_chunks_and_what_is_kept(case, chunk, kept):
    leaves, targets, grads, options = case
    wanted = run(module.reference, leaves, targets, grads, **options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "CHUNK_HOST", chunk)
        patch.setattr(module, "KEPT_HOST", kept)
        ours = run(kernels.linear_logprob, leaves, targets, grads, **options)
    assert_equal(ours, wanted, 1e-9)


@given(cases(), st.integers(1, 4), st.booleans(), st.integers(0, 2**31))
@settings(max_examples=60)
def test_parts_of_the_vocabulary_make_up_the_whole(case, parts, masked, seed):
    leaves, targets, grads, options = case
    mask = torch.rand(targets.shape, generator=torch.Generator().manual_seed(seed)) < 0.6 if masked else None

    def in_parts(hidden, w, targets, bias, **options):
        made, first = [], 0
        for i, part in enumerate(w.tensor_split(parts)):  # some may be empty
            if len(part):
                own = None if bias is None else bias.tensor_split(parts)[i]
                made.append(kernels.vocabulary_part(hidden, part, targets, own, **options, mask=mask, first=first))
            first += len(part)
        return kernels.combine_vocabulary(torch.stack(made, -2), True, mask)

    wanted = run(kernels.linear_logprob, leaves, targets, grads, **options, mask=mask)
    assert_equal(run(in_parts, leaves, targets, grads, **options), wanted, 1e-9)


@given(cases())
@settings(max_examples=25)
def test_the_reference_equals_torch_distributions(case):
    leaves, targets, _, options = case
    h, w, bias = *leaves[:2], leaves[2] if len(leaves) == 3 else 0
    z, cap = h @ w.T + bias, options["softcap"]
    z = (cap * torch.tanh(z / cap) if cap else z) / options["temperature"]
    wanted = torch.distributions.Categorical(logits=z)
    ours = module.reference(h, w, targets, leaves[2] if len(leaves) == 3 else None, **options)
    assert_equal(ours, (wanted.log_prob(targets), wanted.entropy()), 1e-9)


@given(cases())
@settings(max_examples=25)
def test_without_entropy_the_rest_is_the_same(case):
    leaves, targets, (grad, unused), options = case
    wanted = run(module.reference, leaves, targets, (grad, torch.zeros_like(unused)), **options)
    logp, entropy, *grads = run(kernels.linear_logprob, leaves, targets, (grad, unused), **options, entropy=False)
    assert not entropy.any()
    assert_equal((logp, *grads), (wanted[0], *wanted[2:]), 1e-9)


@given(cases(), st.integers(0, 2**31), st.sampled_from([0.0, 0.3, 1.0]), st.sampled_from([0, 2**24]))
@settings(max_examples=40)
def test_masked_tokens_give_and_take_nothing(case, seed, share, most):
    """The others' results are those of a batch without them; what is masked may be anything."""
    leaves, targets, grads, options = case
    mask = torch.rand(targets.shape, generator=torch.Generator().manual_seed(seed)) < share
    kept = [leaves[0][mask], *leaves[1:]], targets[mask], [g[mask] for g in grads]
    logp, entropy, dhidden, *wanted = run(module.reference, *kept, **options)
    dirty = [torch.where(mask[:, None], leaves[0], torch.nan), *leaves[1:]]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "KEPT_HOST", most)
        grads = [g.where(mask, torch.nan) for g in grads]
        ours = run(kernels.linear_logprob, dirty, targets, grads, mask=mask, **options)
    for out, want in zip(ours[:3], (logp, entropy, dhidden), strict=True):
        torch.testing.assert_close(out[mask], want, rtol=1e-9, atol=1e-9)
        assert not out[~mask].any()
    assert_equal(ours[3:], wanted, 1e-9)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
@given(case=cases())
@settings(max_examples=20)
def test_results_are_at_least_float32(dtype, tolerance, case):
    leaves, targets, grads, options = case
    leaves = [x.to(dtype) / 4 for x in leaves]
    wanted = run(module.reference, [x.double() for x in leaves], targets, grads, **options)
    low = [g.to(torch.float32) for g in grads]
    ours = run(kernels.linear_logprob, leaves, targets, low, **options)
    assert ours[0].dtype == ours[1].dtype == torch.float32 and all(g.dtype == dtype for g in ours[2:])
    for a, b in zip(ours, wanted, strict=True):
        torch.testing.assert_close(
            a.double(), b, rtol=tolerance, atol=tolerance * max(1.0, float(b.detach().abs().max()))
        )


def test_leading_dims_and_large_logits():
    gen = torch.Generator().manual_seed(0)
    h, w = torch.randn(2, 3, 4, generator=gen) * 1e3, torch.randn(5, 4, generator=gen)
    targets = torch.randint(5, (2, 3), generator=gen)
    logp, entropy = kernels.linear_logprob(h, w, targets)
    wanted = torch.nn.functional.cross_entropy((h @ w.T).flatten(0, 1), targets.flatten(), reduction="none")
    assert logp.shape == entropy.shape == (2, 3)
    torch.testing.assert_close(logp.flatten(), -wanted)
    assert entropy.isfinite().all() and (entropy > -1e-3).all()


class Largest(TorchDispatchMode):
    """Record the most elements of any tensor made, and the number of products, inside our ops too."""

    inside = (module._forward, module._grad)

    def __init__(self):
        super().__init__()
        self.elements, self.ops, self.products = 0, 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in self.inside:
            with self:
                return func.__wrapped__(*args, **(kwargs or {}))
        out = func(*args, **(kwargs or {}))
        self.ops += 1
        self.products += func.overloadpacket.__name__ in ("mm", "addmm", "addmm_")
        self.elements = max([self.elements, *(x.numel() for x in tree_leaves(out) if isinstance(x, torch.Tensor))])
        return out


@pytest.mark.parametrize("entropy", [True, False])
def test_never_holds_the_logits(entropy, monkeypatch):
    T, V, D = 64, 96, 5
    gen = torch.Generator().manual_seed(0)
    leaves = [torch.randn(T, D, generator=gen), torch.randn(V, D, generator=gen), torch.randn(V, generator=gen)]
    targets, grads = torch.randint(V, (T,), generator=gen), (torch.ones(T), torch.ones(T))
    monkeypatch.setattr(module, "CHUNK_HOST", 8)
    monkeypatch.setattr(module, "KEPT_HOST", T * V * 4 - 1)
    with Largest() as ours:
        run(kernels.linear_logprob, leaves, targets, grads, softcap=3.0, temperature=0.5, entropy=entropy)
    with Largest() as plain:
        run(module.reference, leaves, targets, grads, softcap=3.0, temperature=0.5)
    assert plain.elements == T * V
    assert ours.elements == 8 * V and ours.ops > 16 * (T // 8)


@pytest.mark.parametrize("keeps", [True, False])
def test_logits_that_are_few_are_kept_and_not_multiplied_again(keeps, monkeypatch):
    T, V, D = 64, 96, 5
    gen = torch.Generator().manual_seed(0)
    leaves = [torch.randn(T, D, generator=gen), torch.randn(V, D, generator=gen), torch.randn(V, generator=gen)]
    targets, grads = torch.randint(0, V, (T,), generator=gen), (torch.randn(T, generator=gen), torch.ones(T))
    again = run(kernels.linear_logprob, leaves, targets, grads, softcap=3.0)
    monkeypatch.setattr(module, "KEPT_HOST", T * V * 4 - (not keeps))
    with Largest() as seen:
        ours = run(kernels.linear_logprob, leaves, targets, grads, softcap=3.0)
    assert seen.products == (3 if keeps else 4)
    assert all(torch.equal(a, b) for a, b in zip(ours, again, strict=True))
