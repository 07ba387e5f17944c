"""Advantages of groups of answers, and what is done to rewards before: plain functions on the host, in float64.

Rewards are (P, G): of P prompts the G answers, None (or nan) where no reward function gave a score. Such an answer does
not count in any mean, its advantage is 0, and `experience` does not train on it. Advantages are (P, G): each token of
an answer has its answer's, but for `reinforce_pp_tokens`.
"""

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

Scale = Literal["group", "batch", "none"]
KL = Literal["k1", "k2", "k3"]
EPSILON = 1e-4
"""Added to a standard deviation, as in TRL; verl's is 1e-6."""


def table(rewards: Any) -> np.ndarray:
    """Return rewards as float64 (P, G), nan where there is none; ValueError if groups differ in size."""
    rows = [[np.nan if x is None else float(x) for x in row] for row in rewards]
    if len({len(row) for row in rows}) != 1:
        raise ValueError(
            f"rewards are (prompts, answers of each), but groups have {sorted({len(r) for r in rows})} answers"
        )
    return np.array(rows)


def _count(r_PG: np.ndarray) -> np.ndarray:
    return (~np.isnan(r_PG)).sum(1, keepdims=True)


def _mean(r_PG: np.ndarray) -> np.ndarray:
    """Return each group's mean (P, 1), 0 of none."""
    return np.nansum(r_PG, 1, keepdims=True) / np.maximum(_count(r_PG), 1)


def deviation(r_PG: np.ndarray) -> np.ndarray:
    """Return each group's standard deviation (P, 1) with n - 1 degrees of freedom, 0 of a single one."""
    return np.sqrt(np.nansum((r_PG - _mean(r_PG)) ** 2, 1, keepdims=True) / np.maximum(_count(r_PG) - 1, 1))


def whiten(x: np.ndarray, epsilon: float = EPSILON) -> np.ndarray:
    """Shift and scale to mean 0 and standard deviation 1 over all that is not nan; 0 else."""
    flat = x.reshape(1, -1)
    return np.nan_to_num((x - _mean(flat).item()) / (deviation(flat).item() + epsilon))


def grpo(rewards: Any, scale: Scale = "group", epsilon: float = EPSILON) -> np.ndarray:
    """Return (r - mean) / (deviation + epsilon) of the group (arxiv 2402.03300).

    Or divided by the batch's deviation (2508.08221), or, "none", not at all: Dr.GRPO (2503.20783).
    """
    r_PG = table(rewards)
    if scale not in ("group", "batch", "none"):
        raise ValueError(f"scale is {scale!r}; it can be 'group', 'batch' or 'none'")
    centred_PG = r_PG - _mean(r_PG)
    if scale != "none":
        over = r_PG if scale == "group" else r_PG.reshape(1, -1)
        centred_PG = centred_PG / (deviation(over) + epsilon)
    return np.nan_to_num(centred_PG)


def dr_grpo(rewards: Any) -> np.ndarray:
    """Return r - mean of the group (arxiv 2503.20783)."""
    return grpo(rewards, "none")


def rloo(rewards: Any) -> np.ndarray:
    """Return r - mean of the others of the group (arxiv 2402.14740); 0 for one that is alone."""
    r_PG = table(rewards)
    n_P1 = _count(r_PG)
    return np.nan_to_num((r_PG - _mean(r_PG)) * n_P1 / np.maximum(n_P1 - 1, 1))


def reinforce_pp(rewards: Any, epsilon: float = EPSILON) -> np.ndarray:
    """Return rewards whitened over the batch (REINFORCE++, arxiv 2501.03262)."""
    return whiten(table(rewards), epsilon)


def reinforce_pp_tokens(rewards: Any, penalties: Sequence[np.ndarray], epsilon: float = EPSILON) -> list[np.ndarray]:
    """Return the advantage of each token of answers (N,), whose rewards lose a penalty at each of their n tokens (n,).

    A token's return is the answer's reward less the penalties from the token on; returns are whitened over all tokens
    of the batch (REINFORCE++, arxiv 2501.03262, with discount 1).
    """
    left = [r - np.cumsum(p[::-1])[::-1] for r, p in zip(table([rewards])[0], penalties, strict=True)]
    return np.split(whiten(np.concatenate(left), epsilon), np.cumsum([len(p) for p in penalties])[:-1])


def reinforce_pp_baseline(rewards: Any, epsilon: float = EPSILON) -> np.ndarray:
    """Return r - mean of the group, whitened over the batch (arxiv 2501.03262)."""
    r_PG = table(rewards)
    return whiten(r_PG - _mean(r_PG), epsilon)


def opo(rewards: Any, lengths: Any) -> np.ndarray:
    """Return r - the group's mean weighed by `lengths` (P, G) in tokens (arxiv 2505.23585)."""
    r_PG = table(rewards)
    n_PG = np.where(np.isnan(r_PG), 0, np.asarray(lengths, np.float64))
    total_P1 = n_PG.sum(1, keepdims=True)
    baseline_P1 = np.nansum(n_PG * r_PG, 1, keepdims=True) / np.where(total_P1 > 0, total_P1, 1)
    return np.nan_to_num(r_PG - baseline_P1)


def remax(rewards: Any, greedy: Sequence[float | None]) -> np.ndarray:
    """Return r - the reward of the greedy answer (P,) to the same prompt (arxiv 2310.10505)."""
    return np.nan_to_num(table(rewards) - table([[x] for x in greedy]))


def pass_at_k(rewards: Any) -> np.ndarray:
    """Return best - second best for a group's best answer, 0 for the others (arxiv 2503.19595); of equals the first."""
    r_PG = np.where(np.isnan(table(rewards)), -np.inf, table(rewards))
    best_P = r_PG.argmax(1)
    top_PG = np.sort(r_PG, 1)
    gap_P = np.array([row[-1] - row[-2] if len(row) > 1 and row[-2] > -np.inf else 0.0 for row in top_PG])
    return np.where(np.arange(r_PG.shape[1]) == best_P[:, None], gap_P[:, None], 0.0)


def has_spread(rewards: Any, least: float = 1e-6) -> np.ndarray:
    """Return for each group (P,) whether its rewards differ: the others teach nothing and are drawn anew (DAPO)."""
    return deviation(table(rewards))[:, 0] > least


def overlong_penalty(lengths: Any, max_length: int, buffer: int, factor: float = 1.0) -> np.ndarray:
    """Return what is added to the reward of answers of so many tokens: from 0 to -factor over the last `buffer` ones.

    DAPO's soft punishment, arxiv 2503.14476, eq. 13. Lengths are of ids, not of text.
    """
    if not 0 < buffer <= max_length:
        raise ValueError(f"overlong buffer is {buffer}; it must be from 1 to the maximum length, {max_length}")
    over = np.asarray(lengths, np.float64) - (max_length - buffer)
    return -factor * np.clip(over / buffer, 0, 1)


def without_truncated(weights: Any, truncated: Any) -> np.ndarray:
    """Return the weights (..., T) of answers, 0 for those that were cut off (...): overlong filtering."""
    return np.where(np.asarray(truncated, bool)[..., None], 0, np.asarray(weights))


def divergence(d: np.ndarray, kl: KL) -> np.ndarray:
    """Return an estimate of KL(policy || reference) per token, given d = log policy / reference."""
    return {"k1": d, "k2": d**2 / 2, "k3": np.exp(-d) + d - 1}[kl]
