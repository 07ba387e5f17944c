"""engines.sampling against transformers' own filters and the inverse of their distribution in float64."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.generation import logits_process as theirs

from functional_trainer.engines import Sampling
from functional_trainer.engines.sampling import sample, uniforms

P = torch.tensor([0.05, 0.4, 0.1, 0.25, 0.2])


def kept(logits_BV: torch.Tensor, s: Sampling) -> torch.Tensor:
    """Return transformers' probabilities after its filters, (B, V)."""
    z = theirs.TemperatureLogitsWarper(s.temperature)(None, logits_BV)
    z = theirs.TopKLogitsWarper(s.top_k)(None, z) if s.top_k else z
    z = theirs.TopPLogitsWarper(s.top_p)(None, z) if s.top_p < 1 else z
    z = theirs.MinPLogitsWarper(s.min_p)(None, z) if s.min_p else z
    return z.softmax(-1)


def inverse(p_V: torch.Tensor, u: float) -> int:
    """Return the first token, likeliest first, at which the sum of probabilities reaches u, by exact sums."""
    order = sorted(range(len(p_V)), key=lambda i: -p_V[i].item())
    total = math.fsum(p_V.tolist())
    return next(t for n, t in enumerate(order) if math.fsum(p_V[order[: n + 1]].tolist()) >= u * total)


@given(
    st.integers(0, 10**6), st.floats(0.3, 3.0), st.integers(0, 12), st.one_of(st.just(1.0), st.floats(0.05, 1.0)),
    st.one_of(st.just(0.0), st.floats(0.0, 0.5)),
)  # fmt: skip
@settings(max_examples=60)
def test_the_token_is_the_inverse_of_transformers_distribution(seed, temperature, top_k, top_p, min_p):
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, seed=seed)
    gen = torch.Generator().manual_seed(seed)
    z_BV = torch.randn(16, 11, generator=gen, dtype=torch.float64)
    u_B = torch.from_numpy(uniforms(seed, 0, 16))
    given_B = sample((z_BV / temperature).log_softmax(-1), u_B, sampling)
    p_BV = kept(z_BV, sampling)
    if sampling.truncates:  # else tokens are in the vocabulary's order
        assert given_B.tolist() == [inverse(p, u) for p, u in zip(p_BV, u_B.tolist(), strict=True)]
    else:
        below = [math.fsum(p[:t].tolist()) for p, t in zip(p_BV, given_B.tolist(), strict=True)]
        upto = [math.fsum(p[: t + 1].tolist()) for p, t in zip(p_BV, given_B.tolist(), strict=True)]
        assert all(a - 1e-12 < u < b + 1e-12 for a, u, b in zip(below, u_B.tolist(), upto, strict=True))


@pytest.mark.parametrize("options", [{}, {"temperature": 0.5}, {"temperature": 2.0}, {"top_k": 2}, {"top_p": 0.6},
                                     {"top_k": 3, "top_p": 0.5}, {"min_p": 0.3}])  # fmt: skip
def test_draws_of_many_requests_follow_the_distribution(options):
    sampling, n = Sampling(**options), 20000
    u_B = torch.tensor([uniforms(0, request, 3)[2] for request in range(n)])
    logp = (P.log() / sampling.temperature).log_softmax(-1).expand(n, -1).clone()
    seen = torch.bincount(sample(logp, u_B, sampling), minlength=5).double()
    wanted = kept(P.log()[None], sampling)[0].double()
    assert not seen[wanted == 0].any()
    expected = n * wanted[wanted > 0]
    chi2 = ((seen[wanted > 0] - expected) ** 2 / expected).sum()
    assert chi2 < 25  # four degrees of freedom at most: one in 20000 by chance


def test_temperature_zero_is_greedy():
    assert sample(P.log()[None], torch.ones(1, dtype=torch.float64), Sampling(temperature=0.0)).tolist() == [1]


@pytest.mark.parametrize("options", [{}, {"top_k": 4}])
def test_the_ends_of_the_interval_choose_tokens_that_can_be(options):
    logp = torch.tensor([0.0, 0.3, 0.7, 0.0]).log().expand(2, -1)
    u_B = torch.tensor([2**-53, 1.0], dtype=torch.float64)
    assert sorted(sample(logp, u_B, Sampling(**options)).tolist()) == [1, 2]


def test_numbers_belong_to_seed_request_and_token():
    a = uniforms(5, 7, 1000)
    assert ((0 < a) & (a <= 1)).all() and (a[:10] == uniforms(5, 7, 10)).all()
    others = [uniforms(5, 8, 1000), uniforms(6, 7, 1000), uniforms(7, 5, 1000)]
    assert all(abs(np.corrcoef(a, b)[0, 1]) < 0.1 and (a != b).all() for b in others)
