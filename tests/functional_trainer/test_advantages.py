"""functional_trainer.advantages against the papers' formulas, answer by answer."""

import math
import statistics

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from functional_trainer import advantages

REWARD = st.one_of(st.none(), st.sampled_from([0.0, 1.0]), st.floats(-3, 3, width=16))
TABLES = st.integers(1, 5).flatmap(lambda g: st.lists(st.lists(REWARD, min_size=g, max_size=g), min_size=1, max_size=4))


def scored(row) -> list[float]:
    return [r for r in row if r is not None]


def by_answer(rewards, advantage) -> np.ndarray:
    """Apply a formula to each answer that has a reward, given its group's; others get 0."""
    return np.array([[0.0 if r is None else advantage(r, scored(row)) for r in row] for row in rewards])


def deviation(group) -> float:
    return statistics.stdev(group) if len(group) > 1 else 0.0


def whitened(table, rewards) -> np.ndarray:
    """Shift and scale what belongs to rewards."""
    kept = [x for row, rs in zip(table, rewards, strict=True) for x, r in zip(row, rs, strict=True) if r is not None]
    if not kept:
        return np.zeros_like(table)
    made = (table - statistics.fmean(kept)) / (deviation(kept) + 1e-4)
    return np.where([[r is None for r in row] for row in rewards], 0.0, made)


def same(a, b) -> None:
    np.testing.assert_allclose(a, b, rtol=1e-7, atol=1e-9)


@given(TABLES)
@settings(deadline=None)
def test_advantages_of_groups(rewards):
    everyone = scored(sum(rewards, []))
    mean = statistics.fmean
    same(advantages.grpo(rewards), by_answer(rewards, lambda r, g: (r - mean(g)) / (deviation(g) + 1e-4)))
    same(advantages.dr_grpo(rewards), by_answer(rewards, lambda r, g: r - mean(g)))
    wanted = by_answer(rewards, lambda r, g: (r - mean(g)) / (deviation(everyone) + 1e-4))
    same(advantages.grpo(rewards, "batch"), wanted)
    others = lambda r, g: r - (sum(g) - r) / (len(g) - 1) if len(g) > 1 else 0.0  # noqa: E731
    same(advantages.rloo(rewards), by_answer(rewards, others))
    same(advantages.reinforce_pp(rewards), whitened(by_answer(rewards, lambda r, g: r), rewards))
    centred = by_answer(rewards, lambda r, g: r - mean(g))
    same(advantages.reinforce_pp_baseline(rewards), whitened(centred, rewards))
    best = by_answer(rewards, lambda r, g: r - sorted(g)[-2] if len(g) > 1 and r == max(g) else 0.0)
    for ours, theirs, row in zip(advantages.pass_at_k(rewards), best, rewards, strict=True):
        first = [i for i, r in enumerate(row) if r is not None and r == max(scored(row))][:1]
        same(ours, [x if i in first else 0.0 for i, x in enumerate(theirs)])
    spread = [len(scored(row)) > 1 and deviation(scored(row)) > 1e-6 for row in rewards]
    assert advantages.has_spread(rewards).tolist() == spread


@given(TABLES, st.randoms())
@settings(deadline=None)
def test_advantages_that_need_more(rewards, random):
    lengths = [[random.randint(0, 9) for _ in row] for row in rewards]
    greedy = [random.choice([None, 0.5, 2.0]) for _ in rewards]
    for row, n, opo, base, remax in zip(
        rewards, lengths, advantages.opo(rewards, lengths), greedy, advantages.remax(rewards, greedy), strict=True
    ):
        weight = sum(k for k, r in zip(n, row, strict=True) if r is not None)
        baseline = sum(k * r for k, r in zip(n, row, strict=True) if r is not None) / weight if weight else 0.0
        same(opo, [0.0 if r is None else r - baseline for r in row])
        same(remax, [0.0 if r is None or base is None else r - base for r in row])


def test_groups_by_hand():
    """1 0 0 1 and all alike."""
    rewards = [[1, 0, 0, 1], [1, 1, 1, 1]]
    sigma = math.sqrt(1 / 3)
    same(advantages.grpo(rewards, epsilon=0.0001)[0], np.array([1, -1, -1, 1]) * 0.5 / (sigma + 1e-4))
    assert not advantages.grpo(rewards)[1].any() and advantages.has_spread(rewards).tolist() == [True, False]
    same(advantages.rloo(rewards)[0], [2 / 3, -2 / 3, -2 / 3, 2 / 3])
    same(advantages.pass_at_k([[0.2, 0.9, 0.5]]), [[0, 0.4, 0]])
    same(advantages.opo([[1, 0]], [[1, 3]]), [[0.75, -0.25]])
    same(advantages.remax([[1, 0]], [0.5]), [[0.5, -0.5]])


def test_errors():
    with pytest.raises(ValueError, match=r"rewards are \(prompts, answers of each\), but groups have \[1, 2\] answers"):
        advantages.grpo([[1, 2], [1]])
    with pytest.raises(ValueError, match="scale is 'std'; it can be 'group', 'batch' or 'none'"):
        advantages.grpo([[1, 2]], "std")
    with pytest.raises(ValueError, match="overlong buffer is 0; it must be from 1 to the maximum length, 9"):
        advantages.overlong_penalty([3], 9, 0)


def test_overlong_answers():
    """Eq. 13 of DAPO, of 20 tokens at most and a buffer of 5."""
    found = advantages.overlong_penalty([1, 15, 16, 18, 20, 25], 20, 5, 0.5)
    same(found, 0.5 * np.array([0, 0, (15 - 16) / 5, (15 - 18) / 5, -1, -1]))
    weights = np.ones((2, 3))
    assert advantages.without_truncated(weights, [True, False]).tolist() == [[0, 0, 0], [1, 1, 1]]


@pytest.mark.parametrize("kl", ["k1", "k2", "k3"])
@given(st.lists(st.tuples(REWARD, st.lists(st.floats(-2, 2, width=16), max_size=5)), min_size=1, max_size=6))
@settings(max_examples=40, deadline=None)
def test_tokens_of_reinforce_pp(kl, answers):
    """Eq. 5 to 7: at each token the reward less beta KL of it and of what follows, normalised over all tokens."""
    rewards, apart = zip(*answers, strict=True)
    penalties = [0.1 * advantages.divergence(np.array(d, np.float64), kl) for d in apart]
    found = advantages.reinforce_pp_tokens(rewards, penalties)
    estimate = {"k1": lambda d: d, "k2": lambda d: d**2 / 2, "k3": lambda d: math.exp(-d) - 1 + d}[kl]
    wanted = [
        [None if r is None else r - 0.1 * sum(estimate(later) for later in d[t:]) for t in range(len(d))]
        for r, d in answers
    ]
    flat = [x for row in wanted for x in scored(row)]
    for ours, theirs in zip(found, wanted, strict=True):
        same(ours, [0.0 if x is None else (x - statistics.fmean(flat)) / (deviation(flat) + 1e-4) for x in theirs])
