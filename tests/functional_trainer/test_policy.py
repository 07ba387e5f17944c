"""functional_trainer.policy: each objective against its paper's formula, sequence by sequence in float64."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from functional_trainer.data.columns import check_whole, refuse_cut
from functional_trainer.losses import sft
from functional_trainer.objectives import OBJECTIVES, log_ratio, token_losses
from functional_trainer.policy import policy
from functional_trainer.rl_options import USED_BY, PolicyOptions
from tests.functional_trainer.packed import F64, assert_same, draw, gradients, logp, of, pack, parts, value

SIZES = st.lists(st.integers(1, 6).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n))), min_size=1, max_size=6)
SEEDS = st.integers(0, 2**20)
NAMES = sorted(OBJECTIVES)
LENGTH = {"max_length": 7}
AGGREGATES = ("token_mean", "token_sum", "seq_mean_token_mean", "seq_mean_token_sum", "seq_mean_token_sum_norm")


def some_layout(data, n) -> list[list[int]]:
    """Draw an order and rows of at least one sequence, and an empty row."""
    order = data.draw(st.permutations(range(n)))
    borders = sorted(data.draw(st.sets(st.integers(1, n - 1), max_size=3))) if n > 1 else []
    return [order[a:b] for a, b in zip([0, *borders], [*borders, n], strict=True)] + [[]]


# papers --------------------------------------------------------------------------------------------------------------


def clipped(s, r, low, high):
    """PPO's surrogate to be maximized: min(r A, clip(r) A)."""
    a = of(s, "advantages")
    return torch.minimum(r * a, torch.clamp(r, 1 - low, 1 + high) * a)


def surrogate(name: str, s) -> torch.Tensor:
    """Return what the paper maximizes at each policy token, with the objective's own defaults."""
    a, lp = of(s, "advantages"), logp(s)
    r = torch.exp(lp - of(s, "old_logprobs"))
    if name == "reinforce":
        return a * lp
    if name in ("grpo", "dr_grpo", "bnpo"):
        return clipped(s, r, 0.2, 0.2)
    if name == "dapo":
        return clipped(s, r, 0.2, 0.28)
    if name == "ppo":  # Ye et al., eq. 5: max(min(r A, clip(r) A), c A) where A < 0
        j = clipped(s, r, 0.2, 0.2)
        return torch.where(a < 0, torch.maximum(j, 3.0 * a), j)
    if name == "gspo":  # eq. 5 to 7: the ratio of sequences to the power of 1 / |y|
        ratio = (torch.exp(lp.sum()) / torch.exp(of(s, "old_logprobs").sum())) ** (1 / len(lp))
        return clipped(s, ratio.expand(len(lp)), 3e-4, 4e-4)
    if name == "gspo_token":  # eq. 13, 14
        ratio = torch.exp((lp - of(s, "old_logprobs")).mean()).detach()
        return clipped(s, ratio * torch.exp(lp) / torch.exp(lp).detach(), 3e-4, 4e-4)
    if name == "cispo":  # eq. 4, 5, without a lower end
        return r.detach().clamp(max=1.2) * a * lp
    if name == "cispo_max":
        return r.detach().clamp(max=5.0) * a * lp
    if name == "sapo":
        tau = 1.0 if a[0] > 0 else 1.05
        return 4 / tau / (1 + torch.exp(-tau * (r - 1))) * a
    if name == "gmpo":  # eq. 4: a geometric mean of ratios, clipped on the side of the advantage
        sign = 1.0 if a[0] > 0 else -1.0
        clip = torch.clamp(r, math.exp(-0.4), math.exp(0.4))
        kept = torch.minimum(sign * r.log(), sign * clip.log()) * sign
        return (a[0] * torch.prod(torch.exp(kept)) ** (1 / len(lp))).expand(len(lp))
    raise ValueError(name)


def aggregate(how: str, tokens: list[torch.Tensor]) -> torch.Tensor:
    """Return the aggregate of the tokens of sequences that have some."""
    tokens = [x for x in tokens if len(x)]
    if not tokens:
        return torch.zeros((), dtype=F64)
    if how == "token_mean":
        return torch.cat(tokens).mean()
    if how == "token_sum":
        return torch.cat(tokens).sum()
    by_sequence = [x.mean() if how == "seq_mean_token_mean" else x.sum() for x in tokens]
    return torch.stack(by_sequence).mean() / (7 if how == "seq_mean_token_sum_norm" else 1)


@pytest.mark.parametrize("name", NAMES)
@given(data=st.data(), sizes=SIZES, seed=SEEDS, spread=st.sampled_from([0.0, 1e-4, 0.5]))
@settings(max_examples=15, deadline=None)
def test_objectives_are_the_papers(name, data, sizes, seed, spread):
    sequences = draw(sizes, seed, spread)
    how = data.draw(st.sampled_from([OBJECTIVES[name].aggregate, *AGGREGATES]))
    batch = pack(sequences, some_layout(data, len(sequences)))
    check_whole(batch)
    ours = value(policy(name, aggregate=how, **LENGTH), batch)
    theirs = aggregate(how, [-surrogate(name, s) for s in sequences if s["weights"].any()])
    assert_same(ours, theirs, sequences)


def test_the_defaults_of_aggregation():
    by_sequence = {"grpo", "gspo", "gspo_token", "sapo", "gmpo"}
    assert {name for name in NAMES if OBJECTIVES[name].aggregate == "seq_mean_token_mean"} == by_sequence
    assert {name for name in NAMES if OBJECTIVES[name].aggregate.endswith("norm")} == {"dr_grpo"}


@pytest.mark.parametrize("name", NAMES)
def test_on_policy_the_ratio_is_exactly_one(name):
    sequences = draw([(5, 3), (4, 4), (6, 1)])
    batch = pack(sequences, [[0, 1], [2]])
    loss = policy(name, old="current", **LENGTH)
    del batch["old_logprobs"]
    terms, reported = parts(loss, batch)
    assert float(reported["ratio/mean"]) == 1.0 and float(reported["ppo_kl"]) == 0.0
    tokens = [of(s, "advantages") * (logp(s) if name in ("reinforce", "cispo", "cispo_max") else 1) for s in sequences]
    if name == "sapo":  # 4 / tau * sigmoid(0)
        tokens = [x * 2 / (1.0 if x[0] > 0 else 1.05) for x in tokens]
    wanted = -aggregate(OBJECTIVES[name].aggregate, tokens)
    torch.testing.assert_close(terms["pg_loss"], wanted, rtol=1e-12, atol=1e-12)
    # the gradient is REINFORCE's
    plain = aggregate(OBJECTIVES[name].aggregate, [-of(s, "advantages") * logp(s) for s in sequences])
    for a, b in zip(gradients(terms["pg_loss"], sequences), gradients(plain, sequences), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_bypassing_the_trainers_forward():
    """The ratio to what the engine said."""
    sequences = draw([(5, 3), (4, 4)])
    bypass = value(policy("grpo", old="rollout_logprobs"), pack(sequences, [[0, 1]]))
    for s in sequences:
        s["old_logprobs"] = s["rollout_logprobs"].clone()
    assert_same(bypass, value(policy("grpo"), pack(sequences, [[0, 1]])), sequences)
    sequences[0]["old_logprobs"][3] = logp(sequences[0])[1].detach()
    sequences[0]["rollout_logprobs"][3] = torch.nan  # not said: the ratio is 1
    bypass = value(policy("grpo", old="rollout_logprobs"), pack(sequences, [[0, 1]]))
    assert_same(bypass, value(policy("grpo"), pack(sequences, [[0, 1]])), sequences)


# further terms -------------------------------------------------------------------------------------------------------


def estimate(kl: str, s) -> torch.Tensor:
    """Return the estimate of each token: with x = ref / pi, -log x, its square's half, and x - 1 - log x."""
    x, r = torch.exp(of(s, "ref_logprobs")) / torch.exp(logp(s)), torch.exp(logp(s) - of(s, "old_logprobs"))
    return {"k1": -x.log(), "k2": x.log() ** 2 / 2, "k3": x - 1 - x.log(), "k3_unbiased": r * (x - 1 - x.log())}[kl]


@pytest.mark.parametrize("kl", ["k1", "k2", "k3", "k3_unbiased"])
@given(sizes=SIZES, seed=SEEDS)
@settings(max_examples=10, deadline=None)
def test_kl_estimators(kl, sizes, seed):
    sequences = draw(sizes, seed)
    estimates, batch = [estimate(kl, s) for s in sequences], pack(sequences, [[*range(len(sizes))]])
    for how in AGGREGATES:
        terms, _ = parts(policy("dapo", aggregate=how, beta=0.3, kl=kl, **LENGTH), batch)
        assert_same(terms["kl"], aggregate(how, estimates), sequences)


def expected(loss, term):
    """Return a term's mean over all that the policy may sample, the divergence itself, and the logits."""
    gen = torch.Generator().manual_seed(0)
    logits = torch.randn(1, 3, generator=gen, dtype=F64).requires_grad_()
    ref = torch.randn(1, 3, generator=gen, dtype=F64).log_softmax(-1)
    p = logits.detach().softmax(-1)
    total = 0.0
    for token in range(3):
        one = {"targets": torch.tensor([[token]]), "segment_ids": torch.ones(1, 1, dtype=torch.int64)}
        one |= {k: torch.ones(1, 1, dtype=F64) for k in ("weights", "lengths", "advantages", "distill_weights")}
        one |= {"ref_logprobs": ref[:, [token]], "logits": logits[None]}
        total = total + p[0, token] * parts(loss, one)[0][term]
    divergence = (logits.softmax(-1) * (logits.log_softmax(-1) - ref)).sum()
    return total, divergence, logits


@pytest.mark.parametrize("kl, true", [("k1", "zero"), ("k2", "exact"), ("k3", "other"), ("k3_unbiased", "exact")])
def test_the_gradient_of_an_estimator_in_the_mean(kl, true):
    total, divergence, logits = expected(policy("reinforce", old="current", beta=1.0, kl=kl), "kl")
    found, wanted = (torch.autograd.grad(x, logits)[0] for x in (total, divergence))
    if kl != "k2":
        torch.testing.assert_close(total, divergence, rtol=1e-12, atol=0)
    if true == "zero":
        assert found.abs().max() < 1e-15
    else:
        assert torch.allclose(found, wanted, rtol=1e-9) == (true == "exact")


def test_distillation_is_the_reverse_divergence():
    total, divergence, logits = expected(policy("reinforce", old="current", distill=1.0), "distill")
    torch.testing.assert_close(total, divergence, rtol=1e-12, atol=0)
    for a, b in zip(torch.autograd.grad(total, logits), torch.autograd.grad(divergence, logits), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@given(sizes=SIZES, seed=SEEDS)
@settings(max_examples=10, deadline=None)
def test_an_entropy_bonus(sizes, seed):
    sequences = draw(sizes, seed)
    batch = pack(sequences, [[*range(len(sizes))]])
    tokens = []
    for s in sequences:
        p = s["logits"].softmax(-1)[s["weights"] != 0]
        tokens.append(-(p * p.log()).sum(-1))
    plain, wanted = value(policy("grpo", entropy=None), batch), aggregate("token_mean", tokens)
    assert_same(value(policy("grpo", entropy=0.2), batch), plain - 0.2 * wanted, sequences)
    terms, reported = parts(policy("grpo"), batch)
    torch.testing.assert_close(reported["entropy"], wanted.detach(), rtol=1e-9, atol=1e-12)
    assert set(terms) == {"pg_loss"} and "entropy" not in parts(policy("grpo", entropy=None), batch)[1]


def test_terms_of_one_row_have_weights_of_their_own():
    """A policy's answer, a demonstration and a distilled answer share a row; each counts its own tokens."""
    sequences = draw([(5, 3), (4, 2), (6, 5)])
    streams = {"weights": 0, "sft_weights": 1, "distill_weights": 2}
    own = [s["weights"] for s in sequences]
    for i, s in enumerate(sequences):
        s |= {name: own[i] * (1.0 if of_ == i else 0.0) for name, of_ in streams.items()}
    loss = policy("dapo", sft=0.5, distill=0.25)
    terms, _ = parts(loss, pack(sequences, [[0, 1, 2]]))
    policy_, demonstration, distilled = ({**s, "weights": w} for s, w in zip(sequences, own, strict=True))
    gap = (logp(distilled) - of(distilled, "ref_logprobs")).detach()
    ratio = torch.exp(logp(distilled) - of(distilled, "old_logprobs"))
    wanted = {
        "pg_loss": -surrogate("dapo", policy_).mean(),
        "nll": -logp(demonstration).mean(),
        "distill": (gap * ratio).mean(),
    }
    assert terms.keys() == wanted.keys()
    for name, theirs in wanted.items():
        assert_same(terms[name], theirs, sequences)
    total = value(loss, pack(sequences, [[0, 1, 2]]))
    assert_same(total, wanted["pg_loss"] + 0.5 * wanted["nll"] + 0.25 * wanted["distill"], sequences)


# rollout correction --------------------------------------------------------------------------------------------------


def correction(how: str, s) -> torch.Tensor:
    """Return the weight of each token by the definitions."""
    rho = torch.exp(of(s, "old_logprobs")) / torch.exp(of(s, "rollout_logprobs"))
    whole = torch.prod(rho)
    return {
        "none": lambda: torch.ones_like(rho),
        "token_truncate": lambda: torch.minimum(rho, torch.tensor(2.0)),
        "token_mask": lambda: rho * ((rho >= 0.5) & (rho <= 5)),
        "sequence_truncate": lambda: torch.minimum(whole, torch.tensor(2.0)).expand(len(rho)),
        "sequence_mask": lambda: (whole * (whole <= 3)).expand(len(rho)),
        "geometric_mask": lambda: rho * bool(0.8 <= whole ** (1 / len(rho)) <= 1.2),
    }[how]()


def apart(d: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return what is reported of the logs of rho of all tokens."""
    return {
        "sampling_logp_difference/mean": d.abs().mean(),
        "sampling_logp_difference/max": d.abs().max(),
        "rollout_corr/kl": -d.mean(),
        "rollout_corr/k3_kl": (d.exp() - 1 - d).mean(),
        "rollout_corr/chi2_token": (d.exp() ** 2).mean() - 1,
        "rollout_corr/eff_sample_size": d.exp().sum() ** 2 / (d.exp() ** 2).sum() / len(d),
    }


@pytest.mark.parametrize(
    "how", ["none", "token_truncate", "token_mask", "sequence_truncate", "sequence_mask", "geometric_mask"]
)
@given(data=st.data(), sizes=SIZES, seed=SEEDS, opsm=st.sampled_from([None, 0.05]))
@settings(max_examples=12, deadline=None)
def test_rollout_correction(how, data, sizes, seed, opsm):
    if how == "none" and opsm is None:
        opsm = 0.05
    sequences = [s for s in draw(sizes, seed) if s["weights"].any()] or draw([(2, 1)], seed)
    batch = pack(sequences, some_layout(data, len(sequences)))
    span = (0.8, 1.2) if how == "geometric_mask" else None
    terms, reported = parts(policy("dapo", correction=how, correction_range=span, opsm=opsm), batch)
    weights = [correction(how, s) for s in sequences]
    if opsm is not None:
        for i, s in enumerate(sequences):
            drop = of(s, "advantages")[0] < 0 and (of(s, "rollout_logprobs") - logp(s)).mean() > opsm
            weights[i] = weights[i] * (0.0 if drop else 1.0)
    weights = [w.detach() for w in weights]
    wanted = aggregate("token_mean", [-surrogate("dapo", s) * w for s, w in zip(sequences, weights, strict=True)])
    assert_same(terms["pg_loss"], wanted, sequences)
    d = torch.cat([of(s, "old_logprobs") - of(s, "rollout_logprobs") for s in sequences])
    w = torch.cat(weights)
    figures = apart(d) | {
        "rollout_corr/rollout_is_mean": w.mean(),
        "rollout_corr/masked_fraction": (w == 0).to(F64).mean(),
    }
    torch.testing.assert_close({k: reported[k] for k in figures}, figures, rtol=1e-9, atol=1e-9)


def test_a_token_of_which_the_engine_said_nothing_is_not_corrected():
    sequences = draw([(4, 4)])
    sequences[0]["rollout_logprobs"][1] = torch.nan
    terms, reported = parts(policy("dapo", correction="token_truncate"), pack(sequences, [[0]]))
    weights = correction("token_truncate", sequences[0])
    weights[1] = 1.0
    assert_same(terms["pg_loss"], (-surrogate("dapo", sequences[0]) * weights).mean(), sequences)
    assert all(torch.isfinite(v) for v in reported.values())
    d = of(sequences[0], "old_logprobs") - of(sequences[0], "rollout_logprobs")
    figures = apart(d[[0, 2, 3]]) | {"rollout_corr/rollout_is_mean": weights.mean()}
    torch.testing.assert_close({k: reported[k] for k in figures}, figures, rtol=1e-9, atol=1e-9)


def test_what_the_trainer_does_not_know_is_no_agreement():
    sequences = draw([(4, 4)])
    sequences[0]["old_logprobs"][1] = torch.nan
    _, reported = parts(policy("dapo"), pack(sequences, [[0]]))
    assert all(reported[name].isnan() for name in apart(torch.zeros(1)))


@pytest.mark.parametrize("old", ["current", "rollout_logprobs"])
def test_the_current_policy_is_compared_with_the_engine(old):
    """Where ratios are to the policy itself, and where they are to what the engine said."""
    sequences = draw([(5, 3), (4, 4), (3, 0), (6, 1)])
    _, reported = parts(policy("dapo", old=old), pack(sequences, [[0, 1], [2, 3]]))
    d = torch.cat([logp(s).detach() - of(s, "rollout_logprobs") for s in sequences])
    figures = apart(d) | {"rollout_corr/rollout_is_mean": torch.ones((), dtype=F64)}
    torch.testing.assert_close({k: reported[k] for k in figures}, figures, rtol=1e-9, atol=1e-9)


# metrics -------------------------------------------------------------------------------------------------------------


def test_what_is_clipped_is_reported():
    sequences = draw([(6, 6), (7, 5), (3, 0)], seed=2)
    _, reported = parts(policy("ppo", delta=1.5), pack(sequences, [[0, 1], [2]]))
    r = torch.cat([torch.exp(logp(s) - of(s, "old_logprobs")) for s in sequences[:2]])
    a = torch.cat([of(s, "advantages") for s in sequences[:2]])
    low, high = ((r < 0.8) & (a < 0)).double().mean(), ((r > 1.2) & (a > 0)).double().mean()
    wanted = {
        "ratio/mean": r.mean(), "ratio/max": r.max(), "ratio/min": r.min(),
        "ppo_kl": -r.log().mean(), "clip_ratio/low": low, "clip_ratio/high": high,
        "clip_ratio/region": low + high, "clip_ratio/dual": ((r > 1.5) & (a < 0)).double().mean(),
    }  # fmt: skip
    assert low > 0 and high > 0
    torch.testing.assert_close({k: reported[k] for k in wanted}, wanted, rtol=1e-9, atol=1e-12, check_dtype=False)


# nothing to learn from -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("sizes", [[(3, 0), (2, 0)], [(1, 0)]])
def test_without_a_policy_token_loss_and_gradient_are_zero(name, sizes):
    sequences = draw(sizes)
    loss = policy(name, beta=0.1, entropy=0.1, correction="sequence_mask", opsm=0.1, **LENGTH)
    batch = pack(sequences, [[*range(len(sizes))], []])
    assert value(loss, batch).item() == 0.0
    assert not any(g.any() for g in gradients(value(loss, batch), sequences))
    assert all(torch.isfinite(v) for v in parts(loss, batch)[1].values())


# errors --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, changes, message",
    [
        ("grop", {}, "objective is 'grop'; it can be one of reinforce, ppo, grpo"),
        ("dr_grpo", {}, "divides by a constant length: give max_length"),
        ("grpo", {"old": "rollout_logprobs", "correction": "token_mask"}, "corrects for the engine already"),
        ("grpo", {"correction_range": (2.0, 1.0)}, "low must be below high"),
        ("grpo", {"correction": "geometric_mask", "correction_range": (0.0, 1.0)}, "above 0 for geometric_mask"),
        ("dapo", {"delta": 1.28}, r"delta \(--loss.delta\) is 1.28; it must be above .* 1 \+ epsilon_high, here 1.28"),
        ("sapo", {"delta": 3.0}, "delta 3.0 has no effect with form 'sapo', which has no dual clip; leave it away"),
    ],
)
def test_what_does_not_go_together_is_refused(name, changes, message):
    with pytest.raises(ValueError, match=message):
        policy(name, **changes)


@pytest.mark.parametrize("name", NAMES)
def test_options_that_an_objective_does_not_read_are_refused(name):
    """What it reads is what changes the loss of some token."""
    gen = torch.Generator().manual_seed(0)
    l_BS, logp_BS, adv_BS = torch.randn(3, 40, 4, generator=gen, dtype=F64) * 0.3
    mean = lambda x_BS: x_BS.mean(1, keepdim=True).expand_as(x_BS)  # noqa: E731

    def losses(**changes):
        p = replace(OBJECTIVES[name], **changes)
        return token_losses(p, log_ratio(p, l_BS, logp_BS, mean), logp_BS, adv_BS, mean)

    values = {"epsilon": 0.01, "epsilon_high": 0.02, "delta": 1.1}
    assert values.keys() == USED_BY.keys()
    for option, x in values.items():
        field = "epsilon_low" if option == "epsilon" else option
        if torch.equal(losses(**{field: x}), losses()):
            said = f"--loss.{option.replace('_', '-')} has no effect with --loss.loss-type {name}, only with ppo, grpo"
            with pytest.raises(ValueError, match=said):
                PolicyOptions(loss_type=name, **{option: x})
        else:
            assert getattr(PolicyOptions(loss_type=name, **{option: x}), option) == x


@pytest.mark.parametrize("x", [math.nan, math.inf, -math.inf])
def test_numbers_of_the_loss_are_finite(x):
    one = ("epsilon", "epsilon_high", "delta", "beta", "entropy_coef", "off_policy_mask_threshold", "balance")
    given = {name: {name: x} for name in one}
    given["correction_range"] = {"correction_range": (0.5, x), "correction": "token_mask"}
    for name, options in given.items():
        with pytest.raises(ValueError, match=f"--loss.{name.replace('_', '-')} is {x}; it must be"):
            PolicyOptions(loss_type="grpo", **options)


@pytest.mark.parametrize(
    "changes, column, hint",
    [
        ({}, "old_logprobs", "; with a single step per rollout set old='current'"),
        ({"beta": 0.1}, "ref_logprobs", ""),
        ({"opsm": 0.1}, "rollout_logprobs", ""),
        ({"sft": 0.1}, "sft_weights", ""),
        ({}, "lengths", ""),
        ({}, "advantages", ""),
    ],
)
def test_a_missing_column_is_named(changes, column, hint):
    batch = {k: v for k, v in pack(draw([(3, 2)]), [[0]]).items() if k != column}
    with pytest.raises(ValueError, match=f"^the batch has no column {column}, which this policy loss needs{hint}$"):
        policy("grpo", **changes).weights(batch)


def test_losses_over_sequences_refuse_cut_ones():
    whole = {"grpo", "dr_grpo", "gspo", "gspo_token", "sapo", "gmpo"}
    assert {name for name in NAMES if policy(name, **LENGTH).whole_sequences} == whole
    assert policy("dapo", correction="sequence_mask").whole_sequences and policy("dapo", opsm=0.1).whole_sequences
    assert not policy("dapo", correction="token_mask").whole_sequences and not sft().whole_sequences
    refuse_cut(policy("dapo"), "split")
    refuse_cut(policy("gspo"), "truncate")
    with pytest.raises(ValueError, match="pools over whole sequences, .* set overlong to 'truncate' or 'drop'"):
        refuse_cut(policy("gspo"), "split")
    batch = pack(draw([(3, 2), (4, 4)]), [[0, 1]])
    tail = {k: v[:, 1:] for k, v in batch.items()}
    with pytest.raises(ValueError, match="the sequence in row 0, places 0 to 1, begins at position 1: it was cut"):
        check_whole(tail)
    head = {k: v[:, :5] for k, v in batch.items()}
    with pytest.raises(ValueError, match="row 0, places 3 to 4, has weights of 2 in all, but its lengths say 4"):
        check_whole(head)
