"""One token for each row, by inverse transform: a single uniform number decides, and it is drawn on the host.

With probabilities p in any fixed order and u in (0, 1], the token is the first whose running sum reaches u times the
total. A token of probability zero is never the first, and the last sum always reaches it.
"""

import numpy as np
import torch

from functional_trainer.engines import Sampling


def uniforms(seed: int, request: int, count: int) -> np.ndarray:
    """Return a request's numbers in (0, 1], float64 (count,), one for each token to come.

    They are those of Philox (Salmon et al., 2011) keyed by seed and request, so that no other request matters.
    """
    key = np.array([seed, request], np.uint64)
    return 1 - np.random.Generator(np.random.Philox(key=key)).random(count)


def sample(logp_BV: torch.Tensor, u_B: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """Choose a token for every row (B,) from log-probabilities at the sampling temperature; u_B is float64."""
    if sampling.temperature == 0:
        return logp_BV.argmax(-1)
    if not sampling.truncates:
        return _first(logp_BV.exp(), u_B)
    p_BV, id_BV = torch.sort(logp_BV.exp(), dim=-1, descending=True, stable=True)
    if sampling.top_k:
        p_BV = torch.where(torch.arange(p_BV.shape[1], device=p_BV.device) < sampling.top_k, p_BV, 0)
    if sampling.top_p < 1:
        before_BV = p_BV.cumsum(-1) - p_BV
        p_BV = torch.where(before_BV < sampling.top_p * p_BV.sum(-1, keepdim=True), p_BV, 0)
    if sampling.min_p:
        p_BV = torch.where(p_BV >= sampling.min_p * p_BV[:, :1], p_BV, 0)
    return id_BV.gather(-1, _first(p_BV, u_B)[:, None])[:, 0]


def _first(p_BV: torch.Tensor, u_B: torch.Tensor) -> torch.Tensor:
    """Return where running sums, in float64, reach u of the total."""
    cdf_BV = p_BV.to(torch.float64).cumsum(-1)
    return (cdf_BV < u_B[:, None] * cdf_BV[:, -1:]).sum(-1)
