"""Rollouts as batches: every answer's tokens with its own advantage, filters, splits, and a place to resume from."""

from itertools import islice
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from functional_trainer import advantages
from functional_trainer.engines import Episode, Sample
from functional_trainer.experience import Experience, Plan, Scored
from functional_trainer.rollouts import Prompt, Prompts, Rollout, Scores, shown

QUESTIONS = Prompts(Prompt([10 + i, 3], f"question {i}", {"answer": str(i)}) for i in range(7))
LONGEST = 6


def draw(prompts, seed):
    """Answer with tokens that say which prompt, place and seed they are of; lengths 1 to `LONGEST`."""
    rng, answers = np.random.default_rng(seed), []
    for ids in (prompt.ids for prompt in prompts):
        tokens = [int(x) for x in rng.integers(100, 10_000, rng.integers(1, LONGEST + 1))]
        logprobs = [-float(t) / 1e4 for t in tokens]
        answers.append(Sample([ids[0], *tokens][:LONGEST], [-ids[0] / 100, *logprobs][:LONGEST],
                                  "length" if len(tokens) >= LONGEST else "stop", []))  # fmt: skip
    return answers


def reward(prompts, answers):
    """Reward the answer's length; none for those of question 3 that are of one token."""
    lost = [p.ids[0] == 13 and len(a.tokens) == 2 for p, a in zip(prompts, answers, strict=True)]
    return Scores([None if x else float(len(a.tokens)) for x, a in zip(lost, answers, strict=True)])


def grpo(rewards, sizes):
    return advantages.grpo(rewards)


USUAL = Plan(3, 4)


def made(how=USUAL, prompts=QUESTIONS, **changes) -> Experience:
    settings: dict[str, Any] = {"seq_len": 16, "longest": LONGEST, "rows": 2, "seed": 5} | changes
    return Experience(prompts, settings.pop("generate", draw), settings.pop("reward", reward), grpo, how, **settings)


def documents(batch) -> list[dict[str, list]]:
    """Return the columns of every sequence of a batch, each behind the one that it continues."""
    found, parents = [], batch.get("parent_ids", torch.zeros_like(batch["segment_ids"]))
    for row, ids in enumerate(batch["segment_ids"]):
        held = {int(i): {k: v[row][ids == i].tolist() for k, v in batch.items()} for i in ids.unique() if i}
        behind = {i: int(parents[row][ids == i][0]) for i in held}
        for i in held.keys() - behind.values():
            before = held.get(behind[i], {})
            found.append({k: before.get(k, []) + v for k, v in held[i].items()})
    return found


@settings(max_examples=25, deadline=None)
@given(
    st.integers(1, 3), st.integers(2, 5), st.integers(1, 3), st.integers(12, 30), st.integers(0, 99), st.booleans(),
    st.sampled_from([1, 2, 7]), st.booleans(),
)  # fmt: skip
def test_every_answer_is_there_once_with_its_own_numbers(prompts, group, rows, seq_len, seed, share, size, static):
    """Whatever the rows, and whether answers share prompts, of one token too, which leaves nothing to share."""
    asked = Prompts(q._replace(ids=[*range(30, 30 + size - 1), q.ids[0]]) for q in QUESTIONS)
    how = Plan(prompts, group, share_prompts=share, static=static)
    rollouts = made(how, asked, seq_len=seq_len, rows=rows, seed=seed)
    batch = next(rollouts)
    last = rollouts.last
    B, filled = len(batch["tokens"]), int((batch["segment_ids"] != 0).any(1).sum())
    passes = -(-B // rows)
    assert batch["tokens"].shape[1] == seq_len and B % (passes * rows if static else passes) == 0
    assert 0 <= B - max(filled, 1) < (rows if static else passes)
    wanted = []
    both = last.rewards.flat, last.advantages.flat
    for p, a, r, adv in zip(last.prompts, last.answers, *both, strict=True):
        if np.isnan(r):
            continue
        ids, before, n = p.ids + a.tokens, len(p.ids) - 1, len(a.tokens)
        wanted.append({
            "tokens": ids[:-1], "targets": ids[1:], "positions": list(range(len(ids) - 1)),
            "weights": [0.0] * before + [1.0] * n, "advantages": [0.0] * before + [np.float32(adv).item()] * n,
            "rollout_logprobs": [0.0] * before + np.float32(a.logprobs).tolist(),
            "lengths": [0.0 if share else float(n)] * before + [float(n)] * n,
        })  # fmt: skip
    found = [{k: v for k, v in d.items() if k not in ("segment_ids", "parent_ids")} for d in documents(batch)]
    assert sorted(map(str, found)) == sorted(str({k: w[k] for k in batch if k in w}) for w in wanted)


def test_advantages_are_those_of_the_groups():
    rollouts = made()
    next(rollouts)
    last = rollouts.last
    np.testing.assert_array_equal(last.advantages, advantages.grpo(last.rewards))
    assert all(len({p.text for p in last.prompts[i : i + 4]}) == 1 for i in range(0, 12, 4))


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("taken", [0, 1])
def test_ranks_share_a_batch_and_all_of_its_passes(static, taken):
    """Passes of at most 6 rows, also if the rollout was drawn by one rank, for passes of at most 3."""
    how = Plan(7, 4, steps=2, static=static, share_prompts=False)
    began = made(how, rows=3, seq_len=9)
    held = list(islice(began, taken))
    stored = began.peek()["tokens"]
    stored = stored[(stored != 0).any(1)]
    parts = []
    for rank in range(2):
        one = made(how, rows=6, rank=rank, world=2, seq_len=9)
        if held:
            one.restore(began.state())
        parts.append(next(one)["tokens"])
    passes = -(-len(stored) // 6)
    each = 3 if static else -(-len(stored) // (2 * passes))  # of a rank
    assert passes > 1 and all(part.shape == (passes * each, 9) for part in parts)
    both = torch.stack([part.view(passes, each, -1) for part in parts], 1).reshape(-1, 9)
    assert torch.equal(both[: len(stored)], stored) and not both[len(stored) :].any()


def test_a_rollout_is_split_into_steps_and_trained_on_again():
    rollouts = made(Plan(3, 4, steps=2, iterations=2))
    first, second, third, fourth, fifth = islice(rollouts, 5)
    assert torch.equal(first["tokens"], third["tokens"]) and torch.equal(second["tokens"], fourth["tokens"])
    assert rollouts.count == 2 and len(documents(first)) + len(documents(second)) == 12
    assert str(documents(fifth)) != str(documents(first))


@pytest.mark.parametrize("taken", [1, 2, 3, 5])
def test_it_goes_on_in_the_middle_of_a_rollout(taken):
    how = Plan(3, 4, steps=2, iterations=2)
    straight, cut = made(how), made(how)
    wanted = list(islice(straight, 8))
    list(islice(cut, taken))
    resumed = made(how)
    resumed.restore(cut.state())
    for a, b in zip(islice(resumed, 8 - taken), wanted[taken:], strict=True):
        assert all(torch.equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in b)
    with pytest.raises(ValueError, match="cannot resume the rollouts: seed was 5, is 6"):
        made(how, seed=6).restore(cut.state())
    others = Prompts(prompt._replace(columns={"answer": "5"}) for prompt in QUESTIONS)
    with pytest.raises(ValueError, match="cannot resume the rollouts: prompts was '7 prompts, .*', is '7 prompts, "):
        made(how, prompts=others).restore(cut.state())


def test_columns_of_any_type_tell_prompts_apart_and_are_alike_in_every_process():
    """What is no JSON counts by its type: its text may have an address in it."""
    some = [object(), {("a", 1): 2}, float("nan"), {3: b"x"}]
    assert (
        Prompts([Prompt([1], "q", {"x": some})]).identity
        == Prompts([Prompt([1], "q", {"x": [object(), *some[1:]]})]).identity
    )
    assert Prompts([Prompt([1], "q", {"x": 1})]).identity != Prompts([Prompt([1], "q", {"x": "1"})]).identity


def test_looking_at_the_next_batch_takes_nothing():
    rollouts = made()
    seen, taken = rollouts.peek(), next(rollouts)
    assert all(torch.equal(seen[k], taken[k]) for k in seen) and rollouts.count == 1
    assert rollouts.report()["reward"] > 0 and rollouts.report() == {}


def test_the_engine_is_checked_once_before_anything_is_trained():
    """By the first batch that has a token to train, of the first rollout that is drawn; also in a run that goes on."""
    seen: list[Any] = []
    how = Plan(3, 4, steps=3, mask_truncated=True)

    def cut(prompts, seed):
        """Cut off all answers of the first rollout, and of the next one's first step."""
        calls.append(seed)
        lost, answers = {1: 12, 2: 4}[len(calls)], draw(prompts, seed)
        return [a._replace(finish_reason="length" if i < lost else "stop") for i, a in enumerate(answers)]

    calls: list[int] = []
    rollouts = made(how, generate=cut, check=seen.append)
    batches = list(islice(rollouts, 6))
    assert [bool(batch["weights"].any()) for batch in batches] == [False, False, False, False, True, True]
    assert len(seen) == 1 and all(torch.equal(seen[0][k], batches[4][k]) for k in batches[4])
    resumed = made(how, check=seen.append)
    resumed.restore(rollouts.state())
    later, *_ = islice(resumed, 6)  # two rollouts
    assert len(seen) == 2 and torch.equal(seen[1]["tokens"], later["tokens"])


def uniform(prompts, answers):
    """Only groups of even questions have rewards that differ."""
    return Scores([float(len(a.tokens)) * (p.ids[0] % 2 == 0) for p, a in zip(prompts, answers, strict=True)], {})


def test_groups_without_spread_are_drawn_anew():
    rollouts = made(Plan(3, 4, filter_groups=True), reward=uniform)
    next(rollouts)
    said = rollouts.report()
    assert said["frac_reward_zero_std"] == 0 and said["rollouts"] > 1 and len(rollouts.last.rewards) == 3
    assert all(p.ids[0] % 2 == 0 for p in rollouts.last.prompts)


def test_what_failed_is_counted_in_all_draws_and_means_are_of_what_is_trained_on():
    turns = []

    def generate(prompts, seed):
        """Every third episode is lost; those of a prompt have as many turns as its question says."""
        found = []
        for i, (prompt, a) in enumerate(zip(prompts, draw(prompts, seed), strict=True)):
            turns.append(prompt.ids[0])
            found.append(a._replace(episode=Episode([], prompt.ids[0], 2, 1, "KeyError: gone" * (i % 3 == 0))))
        return found

    def reward(prompts, answers):
        scores = uniform(prompts, answers)
        return Scores(scores.rewards, {"rewards/f/raised": 2, "rewards/f/died": 0}, {"f": scores.rewards})

    rollouts = made(Plan(3, 4, filter_groups=True), generate=generate, reward=reward)
    next(rollouts)
    said, last = rollouts.report(), rollouts.last
    assert said["rollouts"] > 1 and len(turns) == 12 * said["rollouts"]
    assert (said["rewards/f/raised"], said["rewards/f/died"]) == (2 * said["rollouts"], 0)
    assert said["environment/raised"] == 4 * said["rollouts"]
    assert said["rewards/f/mean"] == said["reward"] == last.rewards.mean()
    assert said["rewards/f/std"] == pytest.approx(last.rewards.std(ddof=1))
    kept = [p.ids[0] for p in last.prompts]
    assert said["num_turns/mean"] == np.mean(kept) != np.mean(turns) and said["num_turns/min"] == min(kept)
    assert said["tools/call_frequency"] == 2 and said["tools/failure_frequency"] == 0.5


def test_groups_that_are_left_out_are_counted_by_reason():
    """Question 0 is never right, 1 always, 2 half right, 3 without a score; the others teach something."""
    seen = []

    def four(prompts, answers):
        seen.extend(p.ids[0] - 10 for p in prompts[::4])
        level = {0: [-1.0, 0, 0, 0], 1: [1.0] * 4, 2: [0.5] * 4, 3: [None] * 4}
        each = {number: level.get(number, [0, 1.0, 0, 1.0]) for number in range(7)}
        return Scores([x for p in prompts[::4] for x in each[p.ids[0] - 10]], {})

    rollouts = made(Plan(3, 4, filter_groups=True), reward=four)
    for _ in range(4):
        seen.clear()
        next(rollouts)
        said, teaching = rollouts.report(), [number for number in seen if number == 0 or number > 3]
        kept = [p.ids[0] - 10 for p in rollouts.last.prompts[::4]]
        assert kept == teaching[:3]
        assert said["filtered"] == {
            "solve_none": 0, "solve_all": seen.count(1), "same": seen.count(2), "no_reward": seen.count(3),
            "surplus": len(teaching) - 3,
        }  # fmt: skip
        scored = [number for number in seen if number != 3]
        none, all_ = scored.count(0) / len(scored), scored.count(1) / len(scored)
        assert [said[f"solve_{kind}"] for kind in ("none", "all", "mixed")] == pytest.approx(
            [none, all_, 1 - none - all_]
        )
        assert (said["reward/min"], said["reward/max"]) == (-1.0 if 0 in kept else 0.0, 1.0 if {*kept} - {0} else 0.0)


def test_a_rollout_is_filled_where_none_teaches_anything():
    none = made(Plan(3, 4, filter_groups=True, most=4), reward=lambda p, a: Scores([1.0] * len(a), {}))
    batch = next(none)
    said = none.report()
    assert said["rollouts"] == 4 and len(none.last.rewards) == 3 and said["filtered"]["solve_all"] == 9
    assert not batch["advantages"].any() and batch["weights"].any()


def test_what_was_cut_off_is_not_trained_on():
    whole, kept = made(), made(Plan(3, 4, mask_truncated=True))
    next(whole)
    batch = next(kept)
    ended = [a for a in whole.last.answers if a.finish_reason == "stop"]
    assert 0 < len(ended) < 12
    assert len(documents(batch)) == len(ended) and batch["weights"].sum() == sum(len(a.tokens) for a in ended)


def test_the_penalty_of_long_answers_changes_advantages_and_not_what_is_reported():
    plain, punished = made(), made(Plan(3, 4, overlong=(LONGEST, 3)))
    next(plain), next(punished)
    a, b = plain.last, punished.last
    sizes = np.array([len(x.tokens) for x in a.answers]).reshape(3, 4)
    np.testing.assert_array_equal(a.rewards, b.rewards)
    wanted = advantages.grpo(a.rewards + advantages.overlong_penalty(sizes, LONGEST, 3))
    np.testing.assert_array_equal(b.advantages, wanted)


def unscored(prompts, answers):
    """Give answers of an even number of tokens no reward."""
    return Scores([None if len(a.tokens) % 2 == 0 else float(len(a.tokens)) for a in answers])


@pytest.mark.parametrize("how", [USUAL, Plan(3, 4, share_prompts=False, static=True)])
def test_answers_without_a_reward_are_not_trained_on(how):
    rollouts = made(how, reward=unscored)
    batch, last = next(rollouts), rollouts.last
    kept = [p.ids + a.tokens for p, a in zip(last.prompts, last.answers, strict=True) if len(a.tokens) % 2]
    found = documents(batch)
    assert 0 < len(kept) < 12 and sorted([*d["tokens"], d["targets"][-1]] for d in found) == sorted(kept)
    assert batch["weights"].sum() == sum(len(ids) - 2 for ids in kept)


@pytest.mark.parametrize("how", [USUAL, Plan(3, 4, steps=2, static=True), Plan(3, 4, beta=0.5, returns=True)])
@pytest.mark.parametrize("empty", [False, True])
def test_all_answers_without_a_reward(how, empty):
    """Of no token too, as of episodes that are lost at once; what is left is rows of padding."""

    def generate(prompts, seed):
        return [a._replace(tokens=[], logprobs=[]) if empty else a for a in draw(prompts, seed)]

    reward = lambda p, a: Scores([None] * len(a))  # noqa: E731
    rollouts = made(how, generate=generate, reward=reward, reference=to_the_token if how.beta else None, rows=3)
    for _ in range(how.steps):
        batch = next(rollouts)
        assert batch["tokens"].shape == (3 if how.static else 1, 16) and not any(v.any() for v in batch.values())
    said = rollouts.report()
    assert said["reward"] is said["reward_std"] is said["frac_reward_zero_std"] is None
    assert said["advantages"] == {"mean": None, "min": None, "max": None}
    assert said["completions"]["mean_length"] == 0 or not empty
    made(how, reward=reward).restore(rollouts.state())


def test_answers_without_a_reward_are_in_no_mean():
    """Groups of 1 and 3, of 2, 2 and one without, of 5 alone, and of none: the last tells nothing."""
    given = [1.0, 3.0, None, 2.0, None, 2.0, None, None, 5.0, None, None, None]
    rollouts = made(Plan(4, 3), reward=lambda p, a: Scores(given, {}))
    next(rollouts)
    said = rollouts.report()
    assert said["reward_std"] == pytest.approx(np.sqrt(2) / 3) and said["frac_reward_zero_std"] == pytest.approx(2 / 3)
    worth = 1 / (np.sqrt(2) + 1e-4)
    assert said["advantages"] == pytest.approx({"mean": 0, "min": -worth, "max": worth})
    assert made(Plan(4, 3), reward=lambda p, a: Scores([2.0] + [None] * 11, {})).peek()["advantages"].any() == 0


def test_prompts_that_do_not_fit_are_refused():
    with pytest.raises(
        ValueError, match="7 of 7 prompts do not fit into rows of 6 with an answer of 6; .*'question 0'"
    ):
        made(seq_len=6)
    with pytest.raises(ValueError, match="no prompts"):
        made(prompts=Prompts())
    assert made(seq_len=7).peek()["tokens"].shape[1] == 7


def test_total_steps():
    assert Plan(3, 4, steps=2, iterations=2).total_steps(prompts=7, epochs=2) == 20  # 14 prompts are 5 rollouts


def test_what_the_policy_did_not_choose_is_not_trained():
    def with_tools(prompts, seed):
        each = ([True] * len(a.tokens) if len(a.tokens) < 3 else [True, False, *[True] * (len(a.tokens) - 2)]
                for a in draw(prompts, seed))  # fmt: skip
        return [a._replace(sampled=mask) for a, mask in zip(draw(prompts, seed), each, strict=True)]

    plain, masked = next(made()), next(made(generate=with_tools))
    assert torch.equal(plain["tokens"], masked["tokens"]) and not torch.equal(plain["weights"], masked["weights"])
    for a, b in zip(documents(plain), documents(masked), strict=True):
        trained = [i for i, w in enumerate(a["weights"]) if w]
        expected = [w if len(trained) < 3 or i != trained[1] else 0.0 for i, w in enumerate(a["weights"])]
        assert b["weights"] == expected


# what advantages need beside rewards ---------------------------------------------------------------------------------


def test_remax_compares_with_the_greedy_answer_of_the_same_prompt():
    """Greedy answers are drawn with the rollout, are scored, and are in no batch; filtered groups lose theirs."""
    asked = []

    def greedy(prompts, seed):
        asked.append([p.text for p in prompts])
        return [Sample([p.ids[0]] * (p.ids[0] % 3 + 1), [0.0] * (p.ids[0] % 3 + 1), "stop", []) for p in prompts]

    for how in (USUAL, Plan(3, 4, filter_groups=True)):
        asked.clear()
        rollouts = made(how, greedy=greedy, reward=uniform)
        rollouts.advantage = lambda rewards, sizes, likeliest: advantages.remax(rewards, likeliest)
        batch, last = next(rollouts), rollouts.last
        for group, own in enumerate(np.array_split(np.arange(12), 3)):
            first = last.prompts[own[0]].ids[0]
            baseline = (first % 3 + 1) * (first % 2 == 0)
            wanted = [len(last.answers[i].tokens) * (first % 2 == 0) - baseline for i in own]
            np.testing.assert_array_equal(last.advantages[group], wanted)
        assert all(len(texts) == len(set(texts)) == 3 for texts in asked) and len(documents(batch)) == 12


def test_the_greedy_answer_is_punished_for_its_length_as_samples_are():
    """The penalty is part of the reward; only a divergence is the sample's alone, as in the authors' code."""

    def greedy(prompts, seed):
        return [Sample([p.ids[0]] * n, [0.0] * n, "stop", []) for p in prompts for n in [p.ids[0] % 3 + 4]]

    def some(prompts, answers):
        return Scores([None if p.ids[0] == 12 else 2.0 for p in prompts], {})

    rollouts = made(Plan(3, 4, overlong=(LONGEST, 3), beta=0.5), greedy=greedy, reward=some, reference=to_the_token)
    rollouts.advantage = lambda rewards, sizes, likeliest: advantages.remax(rewards, likeliest)
    next(rollouts)
    last = rollouts.last
    for prompt, answer, found in zip(last.prompts, last.answers, last.advantages.flat, strict=True):
        d = sum(p + t / 9000 for p, t in zip(answer.logprobs, answer.tokens, strict=True))
        lost = [max(0, n - 3) / 3 for n in (len(answer.tokens), prompt.ids[0] % 3 + 4)]
        assert found == pytest.approx(0 if prompt.ids[0] == 12 else lost[1] - lost[0] - 0.5 * d, abs=1e-5)


def test_lengths_of_answers_are_of_what_the_policy_chose():
    """For OPO's baseline, and where tokens are counted; penalties are of all, as the longest answer is."""
    given, how = [], Plan(3, 4, overlong=(LONGEST, 3))
    rollouts = made(how, generate=with_tools)
    rollouts.advantage = lambda rewards, sizes: given.append((rewards, sizes)) or advantages.opo(rewards, sizes)
    next(rollouts)
    (rewards, sizes), said, last = *given, rollouts.report(), rollouts.last
    assert sizes.reshape(-1).tolist() == [sum(a.sampled) for a in last.answers]
    whole = np.array([len(a.tokens) for a in last.answers]).reshape(3, 4)
    np.testing.assert_array_equal(rewards, last.rewards + advantages.overlong_penalty(whole, LONGEST, 3))
    assert said["generated_tokens_per_s"] == pytest.approx(sizes.sum() / said["timing_s"]["gen"])
    assert sizes.sum() < whole.sum() == said["completions"]["mean_length"] * 12


def to_the_token(batch, number, size):
    """Give each token -token / 9000, as a reference."""
    found, real = np.zeros(size), batch["segment_ids"] != 0
    found[number[real]] = np.where(batch["weights"] != 0, -batch["targets"].numpy() / 9000, 0)[real]
    return Scored(found)


def with_tools(prompts, seed):
    """Answer, but for the second token of each, which a tool said."""
    return [a._replace(sampled=[i != 1 for i in range(len(a.tokens))]) for a in draw(prompts, seed)]


@pytest.mark.parametrize("kl", ["k1", "k2", "k3"])
def test_the_divergence_from_a_reference_is_taken_from_rewards(kl):
    """By hand, answer by answer; what tools said does not count."""
    rollouts = made(Plan(3, 4, beta=0.7, kl=kl, steps=2), reference=to_the_token, generate=with_tools)
    next(rollouts)
    last, total = rollouts.last, []
    for answer in last.answers:
        x = [p + t / 9000 for i, (p, t) in enumerate(zip(answer.logprobs, answer.tokens, strict=True)) if i != 1]
        each = {"k1": lambda d: d, "k2": lambda d: d * d / 2, "k3": lambda d: np.exp(-d) - 1 + d}[kl]
        total.append(sum(each(d) for d in x))
    apart = np.array(total).reshape(3, 4)
    np.testing.assert_allclose(last.advantages, advantages.grpo(last.rewards - 0.7 * apart), rtol=1e-5, atol=1e-5)
    tokens = sum(sum(a.sampled) for a in last.answers)
    said = rollouts.report()
    assert said["kl"] == pytest.approx(apart.sum() / tokens, rel=1e-5) and said["timing_s"]["ref"] > 0


def test_a_divergence_that_is_not_known_is_not_taken_for_none():
    """What no engine said is left out; a reference that breaks is an error."""

    def silent(prompts, seed):
        return [a._replace(logprobs=[np.nan, *a.logprobs[1:]]) for a in draw(prompts, seed)]

    def broken(batch, number, size):
        return Scored(np.full(size, np.nan))

    rollouts = made(Plan(3, 4, beta=0.7), reference=to_the_token, generate=silent)
    next(rollouts)
    apart = [
        sum(p + t / 9000 for p, t in zip(a.logprobs[1:], a.tokens[1:], strict=True)) for a in rollouts.last.answers
    ]
    wanted = advantages.grpo(rollouts.last.rewards - 0.7 * np.reshape(apart, (3, 4)))
    np.testing.assert_allclose(rollouts.last.advantages, wanted, rtol=1e-5, atol=1e-5)
    with pytest.raises(RuntimeError, match="by the reference are not finite"):
        next(made(Plan(3, 4, beta=0.7), reference=broken))


@pytest.mark.parametrize("mask_truncated", [False, True])
def test_tokens_have_advantages_of_their_own_where_the_divergence_is_spread_over_them(mask_truncated):
    """REINFORCE++ by hand; an answer without a reward has none, what tools said does not count."""

    def some(prompts, answers):
        return Scores([None if len(a.tokens) == 3 else float(len(a.tokens)) for a in answers], {})

    how = Plan(4, 4, beta=0.7, returns=True, steps=2, mask_truncated=mask_truncated)
    rollouts = made(how, reference=to_the_token, generate=with_tools, reward=some)
    batches = [next(rollouts), next(rollouts)]
    last, returns = rollouts.last, []
    for answer, r in zip(last.answers, last.rewards.flat, strict=True):
        d = [p + t / 9000 for i, (p, t) in enumerate(zip(answer.logprobs, answer.tokens, strict=True)) if i != 1]
        returns.append([r - 0.7 * sum(d[i:]) for i in range(len(d))])
    flat = np.array([x for some in returns for x in some if not np.isnan(x)])
    assert len(flat) < sum(map(len, returns)), "some have no reward"
    wanted = {}
    for prompt, answer, some in zip(last.prompts, last.answers, returns, strict=True):
        each = np.nan_to_num((np.array(some) - flat.mean()) / (flat.std(ddof=1) + 1e-4))
        wanted[tuple(prompt.ids + answer.tokens)] = each * (not (mask_truncated and answer.finish_reason == "length"))
    for one in [one for batch in batches for one in documents(batch)]:
        here = np.array(one["weights"]) != 0
        own = wanted[(*one["tokens"], one["targets"][-1])]
        np.testing.assert_allclose(np.array(one["advantages"])[here], own[: here.sum()], rtol=1e-4, atol=1e-5)
        assert here.sum() == len(own) or not own.any()
    np.testing.assert_allclose(last.advantages.flat, [x.mean() for x in last.by_token])


# what is said of a rollout -------------------------------------------------------------------------------------------


def test_what_is_reported_by_hand():
    def two_functions(prompts, answers):
        first = [float(len(a.tokens) > 3) for a in answers]
        each = {"reward": first, "none": [None] * len(answers)}  # a function's name may be any
        return Scores([2 * x for x in first], {}, each, [f"text {a.tokens[0]}" for a in answers])

    rollouts = made(Plan(3, 4, shown=5, shown_every=2), reward=two_functions)
    tables = []
    for _ in range(4):
        next(rollouts)
        said, last = rollouts.report(), rollouts.last
        tables.append(said.get("completions_table"))
        sizes = np.array([len(a.tokens) for a in last.answers])
        ended = np.array([a.finish_reason == "stop" for a in last.answers])
        right = (sizes > 3).reshape(3, 4)
        assert said["rewards/reward/mean"] == right.mean() and "rewards/none/mean" not in said
        assert said["reward"] == 2 * right.mean() and said["reward_best"] == 2 * right.any(1).mean()
        shares = [(~right).all(1), right.all(1), right.any(1) & ~right.all(1)]
        assert [said[f"solve_{kind}"] for kind in ("none", "all", "mixed")] == [x.mean() for x in shares]
        assert (said["reward/min"], said["reward/max"]) == (2 * right.min(), 2 * right.max())
        assert 0 <= said["timing_s"]["update_weights"] < 1 and "filtered" not in said
        assert said["completions"]["mean_terminated_length"] == sizes[ended].mean()
        assert said["completions"]["clipped_ratio"] == pytest.approx(1 - ended.mean())
        assert said["prompts"]["mean_length"] == 2 and abs(said["advantages"]["mean"]) < 1e-9
        assert said["generated_tokens_per_s"] == pytest.approx(sizes.sum() / said["timing_s"]["gen"])
    assert [table is None for table in tables] == [True, False, True, False]
    for i, row in zip((0, 1, 4, 5, 8), tables[3], strict=True):  # some of each group
        answer, right = last.answers[i], float(len(last.answers[i].tokens) > 3)
        assert row == {
            "prompt": last.prompts[i].text, "answer": last.prompts[i].columns["answer"],
            "completion": f"text {answer.tokens[0]}", "rewards/reward": right, "rewards/none": None,
            "reward": 2 * right, "advantage": last.advantages.flat[i], "tokens": len(answer.tokens),
            "finish_reason": answer.finish_reason,
        }  # fmt: skip


@pytest.mark.parametrize(("groups", "size", "count"), [(32, 16, 16), (4, 4, 16), (2, 16, 16), (1, 9, 4), (3, 2, 99)])
def test_some_answers_to_each_of_several_prompts_are_shown(groups, size, count):
    said = [{"completion": str(i)} for i in range(groups * size)]
    prompts, answers = [Prompt([1], str(i // size), {}) for i in range(groups * size)], [Sample([1], [0.0], "stop", [])]
    table = np.zeros((groups, size))
    rows = shown(Rollout(prompts, answers * groups * size, table, table, said), count)
    assert [row["prompt"] for row in rows] == [str(int(row["completion"]) // size) for row in rows]
    assert len(rows) == len({row["completion"] for row in rows}) == min(count, groups * size)
    assert len({row["prompt"] for row in rows}) == min(groups, 4)
