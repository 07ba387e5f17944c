"""functional_trainer.preference: each loss against its paper's formula, pair by pair in float64."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from functional_trainer import make_train_step, optimizers
from functional_trainer.data.columns import check_pairs
from functional_trainer.preference import MPO, preference, running_mean
from tests.functional_trainer.packed import F64, assert_same, draw, gradients, logp, of, pack, parts, value
from tests.models import small

SIZE = st.integers(1, 6).flatmap(lambda n: st.tuples(st.just(n), st.integers(1, n)))
PAIRS = st.lists(st.tuples(SIZE, SIZE), min_size=1, max_size=4)
SEEDS = st.integers(0, 2**20)
BUFFERS = {"bco": torch.tensor([0.07, 4.0], dtype=F64)}


def draw_pairs(sizes, seed, signs=(1, -1)):
    """Draw a chosen and a rejected sequence of each pair, the order at random."""
    sequences = draw([size for pair in sizes for size in pair], seed)
    for i, s in enumerate(sequences):
        s["preferred"] = torch.full_like(s["targets"], signs[(i + i // 2 * seed) % 2])
        s["pairs"] = torch.full_like(s["targets"], 1 + i // 2)
    return sequences


def rows(data, count) -> list[list[int]]:
    """Draw an order of pairs and rows of whole ones, and an empty row."""
    order = data.draw(st.permutations(range(count)))
    split = data.draw(st.integers(0, count))
    return [[2 * i + k for i in part for k in (0, 1)] for part in (order[:split], order[split:])] + [[]]


def gap(s) -> torch.Tensor:
    """Return log of policy over reference, of an answer."""
    return logp(s).sum() - of(s, "ref_logprobs").sum()


def by_pair(sequences):
    """Yield (chosen, rejected)."""
    for a, b in zip(sequences[::2], sequences[1::2], strict=True):
        yield (a, b) if a["preferred"][0] > 0 else (b, a)


def paper(name: str, c, j, beta=0.3, smoothing=0.2) -> torch.Tensor:
    """Return the loss of a pair."""
    if name == "dpo":  # eq. 7, and with labels flipped at the rate `smoothing`
        p = 1 / (1 + torch.exp(-beta * (gap(c) - gap(j))))
        return -(1 - smoothing) * torch.log(p) - smoothing * torch.log(1 - p)
    if name == "ipo":  # eq. 17, of means over tokens
        return (gap(c) / len(logp(c)) - gap(j) / len(logp(j)) - 1 / (2 * beta)) ** 2
    delta = BUFFERS["bco"][0]
    good = 1 / (1 + torch.exp(-(beta * gap(c) - delta)))
    bad = 1 / (1 + torch.exp(beta * gap(j) - delta))
    return -torch.log(good) - torch.log(bad)


@pytest.mark.parametrize("name", ["dpo", "ipo", "bco"])
@given(data=st.data(), sizes=PAIRS, seed=SEEDS)
@settings(max_examples=12, deadline=None)
def test_losses_of_pairs_are_the_papers(name, data, sizes, seed):
    sequences = draw_pairs(sizes, seed)
    batch = pack(sequences, rows(data, len(sizes)))
    check_pairs(batch)
    ours = value(preference({name: 0.6}, beta=0.3, label_smoothing=0.2), batch, BUFFERS)
    wanted = torch.stack([paper(name, *pair) for pair in by_pair(sequences)]).mean()
    assert_same(ours, 0.6 * wanted, sequences)


@given(data=st.data(), sizes=PAIRS, seed=SEEDS)
@settings(max_examples=15, deadline=None)
def test_mpo_is_its_mixture(data, sizes, seed):
    sequences = draw_pairs(sizes, seed)
    ours = value(preference(MPO, beta=0.3), pack(sequences, rows(data, len(sizes))), BUFFERS)
    pairs = list(by_pair(sequences))
    dpo, bco = (torch.stack([paper(name, *pair, smoothing=0.0) for pair in pairs]).mean() for name in ("dpo", "bco"))
    nll = -torch.cat([logp(chosen) for chosen, _ in pairs]).mean()
    assert_same(ours, 0.8 * dpo + 0.2 * bco + nll, sequences)


@given(seed=SEEDS, sizes=st.lists(SIZE, min_size=1, max_size=7))
@settings(max_examples=15, deadline=None)
def test_kto_is_the_papers(seed, sizes):
    """Unpaired: any number of chosen, rejected and mismatched answers, in any order."""
    sequences = draw(sizes, seed)
    signs = torch.randint(-1, 2, (len(sizes),), generator=torch.Generator().manual_seed(seed)).tolist()
    for s, sign in zip(sequences, signs, strict=True):
        s["preferred"] = torch.full_like(s["targets"], sign)
    ours = preference({"kto": 1.0}, beta=0.3, chosen_weight=1.5, rejected_weight=0.7)
    mismatched = [gap(s).detach() for s, sign in zip(sequences, signs, strict=True) if not sign]
    z = max(0.0, float(torch.stack(mismatched).mean())) if mismatched else 0.0
    losses = []
    for s, sign in zip(sequences, signs, strict=True):
        if sign > 0:
            losses.append(1.5 * (1 - 1 / (1 + torch.exp(-0.3 * (gap(s) - z)))))
        elif sign < 0:
            losses.append(0.7 * (1 - 1 / (1 + torch.exp(-0.3 * (z - gap(s))))))
    wanted = torch.stack(losses).mean() if losses else torch.zeros((), dtype=F64)
    half = len(sizes) // 2
    batch = pack(sequences, [[*range(half)], [*range(half, len(sizes))]])
    assert_same(value(ours, batch), wanted, sequences)
    reported = parts(ours, batch)[1]
    torch.testing.assert_close(
        reported["kl"],
        torch.stack(mismatched).mean() if mismatched else torch.zeros((), dtype=F64),
        rtol=1e-9,
        atol=1e-12,
    )


def test_metrics():
    sequences = draw_pairs([((5, 3), (4, 4)), ((2, 1), (6, 5)), ((3, 3), (3, 2))], 1)
    _, reported = parts(preference({"dpo": 1.0}, beta=0.3), pack(sequences, [[0, 1], [2, 3, 4, 5]]))
    chosen, rejected = zip(*by_pair(sequences), strict=True)
    c, j = (torch.stack([0.3 * gap(s).detach() for s in side]) for side in (chosen, rejected))
    wanted = {
        "rewards/chosen": c.mean(), "rewards/rejected": j.mean(), "rewards/margins": (c - j).mean(),
        "rewards/accuracies": (c > j).double().mean(), "pairs": torch.tensor(3.0, dtype=F64),
        "logps/chosen": torch.stack([logp(s).detach().sum() for s in chosen]).mean(),
        "logps/rejected": torch.stack([logp(s).detach().sum() for s in rejected]).mean(),
    }  # fmt: skip
    assert 0 < wanted["rewards/accuracies"] < 1
    torch.testing.assert_close(reported, wanted, rtol=1e-9, atol=1e-12)


def test_the_sign_of_two_long_sequences_difference_survives_float32():
    """2000 tokens each: sums of 4000 in float32 have errors of 1e-4, and the difference here is 2e-5."""
    n = 2000
    sequences = draw([(n, n), (n, n)], spread=0.0)
    for sign, s in zip((1, -1), sequences, strict=True):
        s |= {"ref_logprobs": (logp(s).detach() - 1).float(), "weights": s["weights"].float()}
        s |= {"preferred": torch.full_like(s["targets"], sign), "pairs": torch.ones_like(s["targets"])}
    sequences[0]["ref_logprobs"][7] -= 2e-5
    _, reported = parts(preference({"dpo": 1.0}, beta=1.0), pack(sequences, [[0, 1]]))
    chosen, rejected = (math.fsum((logp(s).detach() - s["ref_logprobs"]).tolist()) for s in sequences)
    assert abs(chosen - rejected) < 1e-4
    assert float(reported["rewards/margins"]) == pytest.approx(chosen - rejected, abs=1e-9)


# the running mean ----------------------------------------------------------------------------------------------------


def test_bco_keeps_the_mean_of_all_rewards_before():
    loss, buffers, seen = preference(MPO, beta=0.3), running_mean(), []
    for seed, pairs in enumerate([2, 1, 3]):
        sequences = draw_pairs([((5, 3), (4, 4)), ((2, 1), (6, 5)), ((3, 3), (3, 2))][:pairs], seed)
        batch = pack(sequences, [[*range(2 * pairs)]])
        buffers = loss.update(buffers, parts(loss, batch, buffers)[1])
        seen += [0.3 * gap(s).detach() for s in sequences]
        torch.testing.assert_close(buffers["bco"][0], torch.stack(seen).mean(), rtol=1e-9, atol=0)
        assert float(buffers["bco"][1]) == pytest.approx(len(seen))
    empty = {k: torch.zeros_like(v) for k, v in batch.items()}
    kept = loss.update(running_mean(), parts(loss, empty, running_mean())[1])
    assert kept["bco"].tolist() == [0.0, 0.0]


# nothing to learn from, and what is refused --------------------------------------------------------------------------


@pytest.mark.parametrize("terms", [MPO, {"ipo": 1.0}, {"kto": 1.0}])
def test_without_answers_loss_and_gradient_are_zero(terms):
    sequences = draw_pairs([((5, 0), (4, 0))], 0)
    batch = pack(sequences, [[0, 1], []])
    total = value(preference(terms), batch, BUFFERS)
    assert total.item() == 0.0 and not any(g.any() for g in gradients(total, sequences))


def test_what_is_refused():
    with pytest.raises(ValueError, match="terms of a preference loss are dpo, ipo, bco, sft, kto, not .'orpo'."):
        preference({"orpo": 1.0})
    with pytest.raises(ValueError, match="terms of a preference loss are dpo, ipo, bco, sft, kto, not none"):
        preference({})
    batch = pack(draw_pairs([((5, 3), (4, 4))], 0), [[0, 1]])
    with pytest.raises(ValueError, match="the batch has no column pairs, which this preference loss needs"):
        preference(MPO).weights({k: v for k, v in batch.items() if k != "pairs"})
    model, optimizer = small.model(), optimizers.adamw(1e-3)
    assert preference(MPO).accumulates and preference(MPO).whole_sequences
    with pytest.raises(ValueError, match="product of batch means .*KTO.*: it needs micro_batches = 1"):
        make_train_step(model, preference({"kto": 1.0}), optimizer, micro_batches=2)


def test_pairs_are_checked():
    def refused(layout, sizes=(((5, 3), (4, 4)), ((2, 1), (6, 5)))):
        with pytest.raises(ValueError) as error:
            check_pairs(pack(draw_pairs(sizes, 0), layout))
        return str(error.value)

    assert "pair 1 of row 0 is not a chosen beside a rejected sequence, but: 0 to 4 (preferred 1)" in refused(
        [[0], [1]]
    )
    assert "pair 1 of row 0 is not a chosen beside" in refused([[0, 2, 3, 1]])
    assert "in row 0, places 5 to 8, has no trained token" in refused([[0, 1]], [((5, 3), (4, 0))])
