"""Batches of packed rows from a policy's own answers: what a `Loader` is for files, this is for rollouts.

    prompts -> answers -> rewards -> advantages -> packed rows -> one or several steps -> prompts ...

Answers are drawn when the next batch is asked for and none is left, from the weights as they are then, so that training
is the same loop over the same step. What was drawn and not yet trained on is part of `state`: a run that is killed
between two steps of a rollout goes on with the same rows.
"""

import io
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch

from functional_trainer import advantages, rollouts, routing
from functional_trainer.data import answers as layout
from functional_trainer.data.columns import by_sequence, lengths
from functional_trainer.data.order import Share, mixed
from functional_trainer.data.packing import Documents, fill
from functional_trainer.engines import Sample
from functional_trainer.environments import episodes
from functional_trainer.rewards import moments
from functional_trainer.rollouts import Group, Prompt, Prompts, Rollout, Scores

Batch = dict[str, torch.Tensor]


Generate = Callable[[list[Prompt], int], list[Sample]]
"""From prompts and a seed to an answer of each."""
Reward = Callable[[list[Prompt], list[Sample]], Scores]


class Scored(NamedTuple):
    """What a model says of all places of a batch."""

    logprobs: np.ndarray
    """(size,)"""
    routed_experts: np.ndarray | None = None
    """(size, L, K), the experts that it chose, if that is recorded."""


Scorer = Callable[[Batch, np.ndarray, int], Scored]
"""From this rank's rows and the number that each of their places has among `size`."""


@dataclass(frozen=True)
class Plan:
    """How a rollout is drawn, filtered, and split into steps."""

    prompts: int
    """Groups of a rollout."""
    group: int
    """Answers to each prompt."""
    steps: int = 1
    """Optimizer steps that it is split into."""
    iterations: int = 1
    """Times that it is trained on."""
    filter_groups: bool = False
    """Leave out groups without spread of rewards, and draw others, at most `most` rollouts for one."""
    most: int = 10
    mask_truncated: bool = False
    """Train no token of an answer that was cut off."""
    overlong: tuple[int, int] | None = None
    """Longest answer, and the tokens before it over which a penalty grows to 1."""
    beta: float = 0.0
    """What is taken from an answer's reward for each nat of its divergence from the reference."""
    kl: advantages.KL = "k1"
    returns: bool = False
    """Let each token have the advantage of what is left of its answer's reward (`advantages.reinforce_pp_tokens`)."""
    share_prompts: bool = True
    """Answers in a row share what stands before the last token of their prompt; batches have `parent_ids`."""
    routing_replay: bool = False
    """Batches have the experts that the engine chose, `routed_experts`."""
    static: bool = False
    """All passes have as many rows, for a compiled step; else no more than are filled."""
    shown: int = 0
    """Answers of a rollout that `report` has as "completions_table": some of each of several prompts."""
    shown_every: int = 1
    """Rollouts between two that are shown."""

    def total_steps(self, prompts: int, epochs: int) -> int:
        """Count the steps in which each of so many prompts is drawn `epochs` times."""
        return -(-prompts * epochs // self.prompts) * self.steps * self.iterations


class Drawn(NamedTuple):
    """A rollout, packed into the batch of each of its steps, and what it reports."""

    parts: list[dict[str, np.ndarray]]
    said: dict[str, Any]
    rollout: Rollout | None


class Experience:
    """Iterate over batches of columns (rows / world, S) that `policy.policy` wants, drawn by the current policy.

    `rows` are those of a pass over all data-parallel ranks, at most; a batch has as many passes as its answers need,
    all alike. `advantage` maps rewards and lengths, in tokens that the policy chose, (P, G) each, to advantages. All
    ranks draw the same. Before a rollout `weights` says what the weights are, and `update` gives them to what
    generates, with their version: how many rollouts came before. ValueError if a prompt and its longest answer do not
    fit into a row.

    With `old` batches have old_logprobs, and routed_experts if it records them: what it returns of a rollout's batches
    before the first of them is taken. With `greedy`, which answers a prompt with the likeliest tokens, `advantage` is
    given the rewards of these answers, (P,), too. `reference` gives log-probabilities for the divergence that rewards
    lose. `check` sees the first batch that trains something, this rank's rows, as soon as it is drawn, and none after.
    """

    def __init__(
        self, prompts: Prompts, generate: Generate, reward: Reward, advantage: Callable, how: Plan, *,
        seq_len: int, longest: int, rows: int, seed: int = 0, rank: int = 0, world: int = 1,
        weights: Callable[[], Any] = dict, update: Callable[[Any, int], Any] = lambda weights, version: None,
        old: Scorer | None = None, greedy: Generate | None = None, reference: Scorer | None = None,
        check: Callable[[Batch], None] | None = None,
    ):  # fmt: skip
        over = [p for p in prompts if len(p.ids) + longest > seq_len + 1]
        if over or not prompts:
            said = (
                f"{len(over)} of {len(prompts)} prompts do not fit into rows of {seq_len} with an answer of {longest}"
            )
            raise ValueError(f"{said}; the first: {over[0].text[:80]!r}" if over else "there are no prompts to answer")
        self.prompts, self.generate, self.reward, self.advantage = prompts, generate, reward, advantage
        self.how, self.seq_len, self.rows, self.seed = how, seq_len, rows, seed
        self.weights, self.update = weights, update
        self.old, self.greedy, self.reference, self.check = old, greedy, reference, check
        self.part, self.equal = (rank, world), rows if how.static else world
        self.order = mixed([Share(len(prompts))], seed, True)
        self.drawn, self.count, self.waiting = 0, 0, list[dict[str, np.ndarray]]()
        self.said: dict[str, Any] = {}
        self.last: Rollout | None = None

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        batch = self.peek()
        self.waiting.pop(0)
        return batch

    def peek(self) -> Batch:
        """Return the next batch and leave it there."""
        if not self.waiting:
            self._roll()
        if self.old and "old_logprobs" not in self.waiting[0]:
            self._score(self.old)
        return self._rows(self.waiting[0])

    def _rows(self, columns: Mapping[str, np.ndarray]) -> Batch:
        """Return this rank's rows of the columns of a batch."""
        return {k: torch.from_numpy(self._own(v)) for k, v in columns.items()}

    def _own(self, column: np.ndarray) -> np.ndarray:
        """Return this rank's rows of a column of all, those of each pass, which are alike: empty rows fill them up."""
        (rank, world), passes = self.part, max(1, -(-len(column) // self.rows))
        each = self.equal * max(1, -(-len(column) // (passes * self.equal)))
        whole = np.zeros((passes * each, *column.shape[1:]), column.dtype)
        whole[: len(column)] = column
        return whole.reshape(passes, world, -1, *column.shape[1:])[:, rank].reshape(-1, *column.shape[1:])

    def _score(self, old: Scorer) -> None:
        """Let the batches of a rollout have old_logprobs."""
        begun = time.perf_counter()
        for columns in self.waiting[: self.how.steps]:  # what is trained on again are the same ones
            said = self._ask(old, columns)
            columns["old_logprobs"] = said.logprobs
            if said.routed_experts is not None:
                columns["routed_experts"] = said.routed_experts
        self.said.setdefault("timing_s", {})["old_log_prob"] = time.perf_counter() - begun

    def _ask(self, scorer: Scorer, columns: dict[str, np.ndarray]) -> Scored:
        """Return what a scorer says of all rows, each rank of its own."""
        number = np.arange(columns["tokens"].size).reshape(columns["tokens"].shape)
        logprobs, routed = scorer(self._rows(columns), self._own(number), number.size)
        placed = None if routed is None else routed.reshape(number.shape + routed.shape[1:])
        return Scored(logprobs.reshape(number.shape), placed)

    def _divergence(self, reference: Scorer, prompts: list[Prompt], answers: list[Sample]) -> list[np.ndarray]:
        """Return the divergence from the reference at each sampled token of each answer, 0 where no engine said it."""
        count = np.arange(len(answers))
        how = replace(self.how, group=1, mask_truncated=False, routing_replay=False)
        numbered = Rollout(prompts, answers, count[:, None], count[:, None], [])  # advantages say whose a token is
        columns = _pack(numbered, count, how, self.seq_len)
        sampled, told = columns["weights"] != 0, columns["rollout_logprobs"]
        d = np.where(np.isnan(told), 0, told.astype(np.float64) - self._ask(reference, columns).logprobs)[sampled]
        if not np.isfinite(d).all():
            raise RuntimeError("log-probabilities by the reference are not finite: its weights or --dtype are wrong")
        whose = columns["advantages"][sampled].astype(np.int64)
        found = advantages.divergence(d, self.how.kl)[np.argsort(whose, kind="stable")]
        return np.split(found, np.cumsum(np.bincount(whose, minlength=len(answers)))[:-1])

    def report(self) -> dict[str, Any]:
        """Return what the row of metrics of the next step is to say, once: of a rollout, its first step's."""
        said, self.said = self.said, {}
        return said

    def close(self) -> None:
        """Nothing runs ahead."""

    def state(self) -> dict[str, Any]:
        """Return what `restore` needs to go on after the last batch taken, equal on all ranks."""
        waiting = [_bytes(columns) for columns in self.waiting]
        return {"rollouts": self.count, "drawn": self.drawn, "waiting": waiting} | self.identity

    @property
    def identity(self) -> dict[str, Any]:
        """What a resumed run must have in common."""
        return self.prompts.identity | {"seed": self.seed}

    def restore(self, state: Any) -> None:
        """Go on after the batch at which `state` was taken; ValueError if the prompts are not the same."""
        odd = [f"{k} was {state.get(k)!r}, is {v!r}" for k, v in self.identity.items() if state.get(k) != v]
        if odd:
            raise ValueError(f"cannot resume the rollouts: {'; '.join(odd)}. Use the run's data or start anew")
        self.count, self.drawn = state["rollouts"], state["drawn"]
        self.waiting = [_columns(data) for data in state["waiting"]]

    def _roll(self) -> None:
        """Draw a rollout, and let its batches wait."""
        begun = time.perf_counter()
        self.update(self.weights(), self.count)
        updated = time.perf_counter() - begun
        self._hold(self._drawn(), updated)

    def _drawn(self) -> Drawn:
        """Draw a rollout and pack it."""
        begun = time.perf_counter()
        rollout, said = self._draw()
        groups = np.array_split(np.arange(len(rollout.rewards)), self.how.steps)
        parts = [_pack(rollout, part, self.how, self.seq_len) for part in groups]
        return Drawn(parts, said | {"rollout_s": time.perf_counter() - begun}, rollout)

    def _hold(self, drawn: Drawn, updated: float) -> None:
        """Let the batches of a rollout wait, for which weights were handed out in `updated` seconds."""
        self.waiting, self.last, self.said = drawn.parts * self.how.iterations, drawn.rollout, drawn.said
        self.said["timing_s"]["update_weights"] = self.said["timing_s"].get("update_weights", 0.0) + updated
        self.count += 1
        if self.check and (trained := [part for part in drawn.parts if part["weights"].any()]):
            self.check(self._rows(trained[0]))
            self.check = None
        if self.how.shown and drawn.rollout and self.count % self.how.shown_every == 0:
            self.said["completions_table"] = rollouts.shown(drawn.rollout, self.how.shown)

    def _draw(self) -> tuple[Rollout, dict[str, Any]]:
        """Draw groups until there are enough that teach something, or the last resort: any."""
        how = self.how
        good, seen, failed = list[Group](), list[Group](), Counter[str]()
        tried, spent = 0, dict.fromkeys(("gen", "reward", "tokens"), 0.0)
        while len(good) < how.prompts and tried < how.most:
            groups, scores = self._groups(spent, failed)
            seen += groups
            good += [g for g in groups if g.spread or not how.filter_groups]
            tried += 1
        good = [*good, *(g for g in groups if not any(g is other for other in good))][: how.prompts]
        prompts = [g.prompt for g in good for _ in g.answers]
        answers = [answer for g in good for answer in g.answers]
        rewards = advantages.table([g.rewards for g in good])
        sizes = np.array([len(a.tokens) for a in answers]).reshape(rewards.shape)
        chosen = np.array([rollouts.chosen(a) for a in answers]).reshape(rewards.shape)
        used = rewards
        if how.overlong:
            used = rewards + advantages.overlong_penalty(sizes, *how.overlong)
        begun = time.perf_counter()
        apart = self._divergence(self.reference, prompts, answers) if self.reference else []
        spent |= {"ref": time.perf_counter() - begun} if self.reference else {}
        by_token = advantages.reinforce_pp_tokens(used.flat, [how.beta * d for d in apart]) if how.returns else None
        if apart:
            used = used - how.beta * np.array([d.sum() for d in apart]).reshape(sizes.shape)
        baseline = ([g.greedy for g in good],) if self.greedy else ()
        if by_token:
            worth = np.array([x.mean() if len(x) else 0.0 for x in by_token]).reshape(sizes.shape)
        else:
            worth = self.advantage(used, chosen, *baseline)
        said = [one for g in good for one in g.said]
        rollout = Rollout(prompts, answers, rewards, worth, said, by_token)
        row = rollouts.report(rollout, sizes) | moments({k: [one[f"rewards/{k}"] for one in said] for k in scores.each})
        row |= episodes.report(answers) | failed | rollouts.outcomes(seen)
        row |= {"rollouts": tried, "filtered": rollouts.filtered(seen, good)} if how.filter_groups else {}
        row |= {"kl": float(sum(d.sum() for d in apart) / max(chosen.sum(), 1))} if apart else {}
        row["generated_tokens_per_s"] = spent.pop("tokens") / spent["gen"]
        return rollout, row | {"timing_s": spent}

    def _groups(self, spent: dict[str, float], failed: Counter[str]) -> tuple[list[Group], Scores]:
        """Ask the next prompts; add what it took to `spent`, and what functions and environments failed on."""
        how = self.how
        begun = time.perf_counter()
        prompts, answers = self._answers()
        asked = prompts[:: how.group]
        likeliest = self.greedy(asked, 0) if self.greedy else []
        drawn = time.perf_counter()
        scores = self.reward(prompts, answers)
        baseline = self._punished(likeliest, self.reward(asked, likeliest)) if self.greedy else [None] * how.prompts
        spent["gen"] += drawn - begun
        spent["reward"] += time.perf_counter() - drawn
        spent["tokens"] += sum(map(rollouts.chosen, answers + likeliest))
        failed.update(scores.failed)
        failed.update(episodes.raised(answers))
        said = [rollouts.said_of(scores, i) for i in range(len(prompts))]
        groups = []
        for prompt, greedy, i in zip(asked, baseline, range(0, len(prompts), how.group), strict=True):
            own = slice(i, i + how.group)
            spread = bool(advantages.has_spread([scores.rewards[own]])[0])
            groups.append(Group(prompt, answers[own], scores.rewards[own], spread, greedy, said[own]))
        return groups, scores

    def _punished(self, answers: list[Sample], scores: Scores) -> list[float | None]:
        """Return the rewards of answers less the penalty of long ones."""
        if not self.how.overlong:
            return scores.rewards
        lost = advantages.overlong_penalty([len(a.tokens) for a in answers], *self.how.overlong).tolist()
        return [None if r is None else r + x for r, x in zip(scores.rewards, lost, strict=True)]

    def _answers(self) -> tuple[list[Prompt], list[Sample]]:
        """Return the groups of the next prompts, one after the other: each answer's prompt, and the answer."""
        asked, seed = self._next(self.how.prompts)
        prompts = [self.prompts[i] for i in asked for _ in range(self.how.group)]
        return prompts, self.generate(prompts, seed)

    def _next(self, count: int) -> tuple[list[int], int]:
        """Return which prompts come next, and a seed for their answers."""
        seed = int(np.random.SeedSequence([self.seed, self.drawn]).generate_state(1)[0])
        self.drawn += count
        return [self.order.piece(self.drawn - count + i) for i in range(count)], seed


def _pack(rollout: Rollout, groups: np.ndarray, how: Plan, seq_len: int) -> dict[str, np.ndarray]:
    """Return the batch columns, (R, S), of some groups of a rollout, as many rows as their answers take.

    Answers that train nothing are not there, those without a reward among them. Those of other experts share no prompt.
    """
    which = [int(g) * how.group + i for g in groups for i in range(how.group)]
    pairs = [(rollout.prompts[i].ids, rollout.answers[i]) for i in which]
    documents, told, worth, wanted = [], list[float](), list[float](), list[layout.Answer]()
    for i, (before, answer) in zip(which, pairs, strict=True):
        sampled = answer.sampled or [True] * len(answer.tokens)
        documents.append((before + answer.tokens, [False] * len(before) + sampled))
        told += [0.0] * len(before) + answer.logprobs
        own = np.full(len(answer.tokens), rollout.advantages.flat[i])
        if rollout.by_token:
            own[np.array(sampled, bool)] = rollout.by_token[i]
        worth += [0.0] * len(before) + own.tolist()
        cut = how.mask_truncated and answer.finish_reason == "length"
        if any(sampled) and not cut and not np.isnan(rollout.rewards.flat[i]):
            routed = answer.routed_experts if how.routing_replay else None
            key = tuple(before), None if routed is None else routed[: len(before) - 1].tobytes()
            wanted.append(layout.Answer(len(documents) - 1, key, len(before), len(before) + len(answer.tokens)))
    stored, table = Documents.of(documents), layout.rows(wanted, seq_len, how.share_prompts)
    more = {"advantages": np.array(worth, np.float32), "rollout_logprobs": np.array(told, np.float32)}
    if how.routing_replay:
        more["routed_experts"] = routing.column(pairs)
    batch = fill(stored, *layout.pieces(stored, table), seq_len, more)
    if how.share_prompts:
        batch["parent_ids"] = by_sequence(batch["segment_ids"], [[s.parent for s in row] for row in table])
    return batch | {"lengths": lengths(batch["weights"], batch["segment_ids"])}


def _bytes(columns: Mapping[str, np.ndarray]) -> bytes:
    file = io.BytesIO()
    np.savez_compressed(file, **columns)  # type: ignore[arg-type]
    return file.getvalue()


def _columns(data: bytes) -> dict[str, np.ndarray]:
    with np.load(io.BytesIO(data), allow_pickle=False) as file:
        return {name: file[name] for name in file.files}
