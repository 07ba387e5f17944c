"""Generation with a KV cache: ragged prompts in one batch, seeded sampling, log-probabilities of what was sampled."""

from collections.abc import Collection, Sequence
from typing import Any, Literal, NamedTuple

import torch

from functional_trainer.tree import Tree
from kernels import promote


class Completion(NamedTuple):
    """What one prompt gave: token ids (end token included), their log-probabilities, and why it ended."""

    tokens: list[int]
    logprobs: list[float]
    finish_reason: Literal["stop", "length"]


def sample(
    logp_BV: torch.Tensor, temperature: float, top_k: int, top_p: float, generator: torch.Generator | None
) -> torch.Tensor:
    """Draw one token per row (B,) from log-probabilities; temperature 0 is greedy.

    Top-k keeps the k likeliest tokens, then top-p the fewest that hold at least `top_p` of what is left.
    """
    if temperature == 0:
        return logp_BV.argmax(-1)
    scaled, ids = torch.sort(logp_BV / temperature, dim=-1, descending=True, stable=True)
    if top_k:
        scaled[:, top_k:] = -torch.inf
    p = scaled.softmax(-1)
    p = torch.where(p.cumsum(-1) - p < top_p, p, 0)
    # Inverse transform with one uniform number per row: the draw of a row does not depend on the others' lengths.
    u = torch.rand(p.shape[0], 1, generator=generator, dtype=torch.float64).to(p.device)
    cdf = p.to(torch.float64).cumsum(-1)
    at = torch.searchsorted(cdf, u * cdf[:, -1:], right=True).clamp_max((p > 0).sum(-1, keepdim=True) - 1)
    return ids.gather(-1, at)[:, 0]


@torch.no_grad()
def generate(
    model: Any,
    params: Tree,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    eos_ids: Collection[int] = (),
    seed: int = 0,
) -> list[Completion]:
    """Continue every prompt by at most `max_new_tokens` tokens, until one of `eos_ids`.

    Log-probabilities are the model's own at temperature 1, before top-k and top-p. The same seed gives the same tokens.
    """
    if not prompts or not all(len(p) for p in prompts):
        raise ValueError("every prompt needs at least one token")
    if temperature < 0 or not 0 < top_p <= 1 or top_k < 0 or max_new_tokens < 1:
        raise ValueError("wanted temperature >= 0, 0 < top_p <= 1, top_k >= 0 (0: all), max_new_tokens >= 1")
    batch = _left_padded(prompts, params["embed"].device)
    w_VD, bias, softcap = model.unembed(params)
    B, longest = batch["tokens"].shape
    cache = model.init_cache(B, longest + max_new_tokens, params)
    generator = torch.Generator().manual_seed(seed)
    stops = torch.tensor(sorted(eos_ids), dtype=torch.int64, device=w_VD.device)
    done = torch.zeros(B, dtype=torch.bool, device=w_VD.device)
    tokens, logprobs, alive = [], [], []
    for _ in range(max_new_tokens):
        out = model.apply(params, batch, cache=cache)
        cache = out.cache
        z = promote(out.hidden[:, -1] @ w_VD.T)
        z = z if bias is None else z + bias
        logp_BV = (z if softcap is None else softcap * torch.tanh(z / softcap)).log_softmax(-1)
        chosen = sample(logp_BV, temperature, top_k, top_p, generator)
        tokens.append(chosen)
        logprobs.append(logp_BV.gather(-1, chosen[:, None])[:, 0])
        alive.append(~done)
        done = done | torch.isin(chosen, stops)
        if done.all():
            break
        batch = {
            "tokens": chosen[:, None],
            "segment_ids": torch.ones_like(chosen)[:, None],
            "positions": batch["positions"][:, -1:] + 1,
        }
    rows = [torch.stack(x, 1).tolist() for x in (tokens, logprobs, alive)]
    return _completions(rows[0], rows[1], rows[2], done.tolist())


def _left_padded(prompts: Sequence[Sequence[int]], device) -> dict[str, torch.Tensor]:
    longest = max(len(p) for p in prompts)
    rows = [[0] * (longest - len(p)) + list(p) for p in prompts]
    length = torch.tensor([[len(p)] for p in prompts], device=device)
    positions = torch.arange(longest, device=device) - (longest - length)
    return {
        "tokens": torch.tensor(rows, dtype=torch.int64, device=device),
        "segment_ids": (positions >= 0).to(torch.int64),
        "positions": positions.clamp_min(0),
    }


def _completions(tokens, logprobs, alive, done) -> list[Completion]:
    rows = []
    for t, logp, live, stopped in zip(tokens, logprobs, alive, done, strict=True):
        n = sum(live)
        rows.append(Completion(t[:n], logp[:n], "stop" if stopped else "length"))
    return rows
