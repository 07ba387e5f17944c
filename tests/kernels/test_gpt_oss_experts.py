"""Experts with biases and clamped activations against transformers' GptOssExperts, on one rank and on two."""

from functools import partial

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

import kernels
from tests.multi_rank.launch import run

ACT = kernels.Activation("clamped_swiglu", limit=0.9)
NAMES = "gate_up_proj", "down_proj", "gate_up_proj_bias", "down_proj_bias"
GRAPH: dict = {"fullgraph": True, "backend": "aot_eager", "dynamic": False}


def made(T, K, E, D, hidden, seed, padding=0.0, one=False):
    """Draw x, weights, gate_up, down and their biases in float64, and distinct experts, some tokens being padding."""
    gen = torch.Generator().manual_seed(seed)
    shapes = (T, D), (T, K), (E, 2, hidden, D), (E, D, hidden), (E, 2, hidden), (E, D)
    leaves = [torch.randn(s, generator=gen, dtype=torch.float64) for s in shapes]
    ids = torch.rand(T, E, generator=gen).argsort(1)[:, :K]
    ids = torch.arange(K).expand(T, K).clone() if one else ids
    ids[torch.rand(T, generator=gen) < padding] = E
    return leaves, ids


def ours(x, weights, gate_up, down, first, last, ids, n_experts, **options):
    biases = {"gate_up_bias_E2F": first, "down_bias_ED": last}
    return kernels.experts(x, weights, ids, gate_up, down, n_experts, activation=ACT, **biases, **options)


def theirs(leaves, ids):
    """Return what transformers computes, its gradients in our layout: gate and up alternate, matrices are turned."""
    from transformers import GptOssConfig  # here, as ranks import this file and need it not
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts

    x, weights, gate_up, down, first, last = leaves
    E, _, hidden, D = gate_up.shape
    config = GptOssConfig(hidden_size=D, intermediate_size=hidden, num_local_experts=E, swiglu_limit=ACT.limit)
    module = GptOssExperts(config).to(x.dtype)
    with torch.no_grad():
        module.gate_up_proj.copy_(gate_up.permute(0, 3, 2, 1).flatten(2))
        module.down_proj.copy_(down.mT)
        module.gate_up_proj_bias.copy_(first.mT.flatten(1))
        module.down_proj_bias.copy_(last)
    x, weights = (t.clone().requires_grad_() for t in (x, weights))
    real = (ids < E).all(1)
    y = torch.zeros_like(x)
    y[real] = module(x[real], ids[real], weights[real])
    leaves = x, weights, *(module.get_parameter(name) for name in NAMES)
    y = y + 0 * sum(t.sum() for t in leaves)  # it leaves out experts that have no token
    dx, dweights, dgate_up, ddown, dfirst, dlast = torch.autograd.grad(y, leaves, torch.cos(y.detach() + x.detach()))
    dgate_up = dgate_up.unflatten(2, (hidden, 2)).permute(0, 3, 2, 1)
    return y.detach(), dx, dweights, dgate_up, ddown.mT, dfirst.unflatten(1, (hidden, 2)).mT, dlast


def results(fn, leaves):
    leaves = [t.clone().requires_grad_() for t in leaves]
    y = fn(*leaves)
    return y.detach(), *torch.autograd.grad(y, leaves, torch.cos(y.detach() + leaves[0].detach()))


CASES = {
    "T": st.integers(1, 19), "K": st.integers(1, 3), "more": st.integers(0, 4), "seed": st.integers(0, 99),
    "padding": st.sampled_from([0.0, 0.4, 0.9]), "one": st.booleans(),
}  # fmt: skip


@pytest.mark.parametrize("backend", ["blas", "reference"])
@given(**CASES)
@settings(max_examples=25)
def test_it_equals_transformers(backend, T, K, more, **drawn):
    leaves, ids = made(T, K, K + more, 5, 3, **drawn)
    layer = partial(ours, ids=ids, n_experts=K + more, backend=backend)
    for a, b in zip(results(layer, leaves), theirs(leaves, ids), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("backend", ["blas", "reference"])
def test_it_equals_transformers_as_one_graph(backend):
    leaves, ids = made(13, 2, 5, 5, 3, seed=0, padding=0.3)
    layer = torch.compile(partial(ours, ids=ids, n_experts=5, backend=backend), **GRAPH)
    for a, b in zip(results(layer, leaves), theirs(leaves, ids), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@given(**CASES)
@settings(max_examples=25)
def test_grouped_mm_equals_transformers_in_float32(T, K, more, **drawn):
    leaves, ids = made(T, K, K + more, 16, 8, **drawn)
    layer = partial(ours, ids=ids, n_experts=K + more, backend="torch")
    for a, b in zip(results(layer, [t.float() for t in leaves]), theirs(leaves, ids), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=2e-5, atol=2e-4)


def test_biases_of_another_shape_are_refused():
    leaves, ids = made(3, 1, 2, 4, 3, 0)
    with pytest.raises(ValueError, match=r"the bias of gate_up is \(2, 6\), not \(2, 2, 3\)"):
        ours(*leaves[:4], leaves[4].flatten(1), leaves[5], ids, 2)
    with pytest.raises(ValueError, match=r"the bias of down is \(4,\), not \(2, 4\)"):
        ours(*leaves[:5], leaves[5][0], ids, 2)


# on two ranks --------------------------------------------------------------------------------------------------------


SHARED = [(14, 3, 4, 5, 3, 0, 0.3), (10, 2, 6, 5, 3, 1, 0.4, True), (6, 1, 2, 4, 3, 2, 0.9)]
"""What `made` is given: among it tokens that all go to the first rank's experts, and hardly one that is no padding."""
FORMS = [(case, exchange, False) for case in SHARED for exchange in ("exact", "static")] + [(SHARED[0], "static", True)]
"""Arguments of `made`, the exchange, and whether it is compiled."""


def job() -> list[list[torch.Tensor]]:
    """Apply experts that two ranks share to each rank's tokens; return the whole results and gradients of all cases."""
    found, rank = [], dist.get_rank()
    for made_with, exchange, compiled in FORMS:
        leaves, ids = made(*made_with)
        mine, E = [t.chunk(2)[rank].contiguous() for t in leaves], leaves[2].shape[0]
        layer = partial(ours, ids=ids.chunk(2)[rank], n_experts=E, group=dist.group.WORLD, exchange=exchange)
        layer = torch.compile(layer, **GRAPH) if compiled else layer
        both: list = [None, None]
        dist.all_gather_object(both, results(layer, mine))
        found.append([torch.cat(parts) for parts in zip(*both, strict=True)])
    return found


def test_two_ranks_share_experts_and_their_biases():
    for found, (made_with, *_) in zip(run(2, job), FORMS, strict=True):
        for a, b in zip(found, theirs(*made(*made_with)), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
