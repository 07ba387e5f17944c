"""Batches of packed rows from a policy's own answers: what a `Loader` is for files, this is for rollouts.

    prompts -> answers -> rewards -> advantages -> packed rows -> one or several steps -> prompts ...

Answers are drawn when the next batch is asked for and none is left, from the weights as they are then, so that training
is the same loop over the same step. What was drawn and not yet trained on is part of `state`: a run that is killed
between two steps of a rollout goes on with the same rows.
"""

import io
import json
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

from functional_trainer import advantages
from functional_trainer.data.columns import lengths
from functional_trainer.data.order import Share, mixed
from functional_trainer.data.packing import Cursor, Documents, cut, fill, first_fit, plan
from functional_trainer.rollout import Sample

Batch = dict[str, torch.Tensor]


class Prompt(NamedTuple):
    """A question: ids, the text that is shown, and what reward functions are given beside it."""

    ids: list[int]
    text: str
    columns: Mapping[str, Any]


class Prompts(tuple[Prompt, ...]):
    """Questions of a data set."""

    @property
    def identity(self) -> dict[str, Any]:
        """What a resumed run must have in common, and all ranks."""
        ids = json.dumps([prompt.ids for prompt in self]).encode()
        return {"prompts": f"{len(self)} prompts, crc {zlib.crc32(ids):08x}"}


class Scores(NamedTuple):
    """Rewards of answers, None where no function gave one, and what the reward functions report."""

    rewards: list[float | None]
    report: dict[str, float]


Generate = Callable[[list[Prompt], int], list[Sample]]
"""From prompts and a seed to an answer of each."""
Reward = Callable[[list[Prompt], list[Sample]], Scores]


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

    def total_steps(self, prompts: int, epochs: int) -> int:
        """Count the steps in which each of so many prompts is drawn `epochs` times."""
        return -(-prompts * epochs // self.prompts) * self.steps * self.iterations


class Rollout(NamedTuple):
    """Groups that are trained on, one after the other, with an advantage for each answer."""

    prompts: list[Prompt]
    answers: list[Sample]
    rewards: np.ndarray
    """(groups, answers), nan where there is none."""
    advantages: np.ndarray


class Drawn(NamedTuple):
    """A rollout, packed into the batch of each of its steps, and what it reports."""

    parts: list[dict[str, np.ndarray]]
    said: dict[str, Any]
    rollout: Rollout | None


class Experience:
    """Iterate over batches of columns (rows / world, S) that `policy.policy` wants, drawn by the current policy.

    `rows` are those of a pass over all data-parallel ranks; a batch has as many passes as its answers need. `advantage`
    maps rewards (P, G) and lengths (P, G) to advantages. All ranks draw the same. Before a rollout `weights` says what
    the weights are, and `update` gives them to what generates, with their version: how many rollouts came before.
    ValueError if a prompt and its longest answer do not fit into a row.
    """

    def __init__(
        self, prompts: Prompts, generate: Generate, reward: Reward, advantage: Callable, how: Plan, *,
        seq_len: int, longest: int, rows: int, seed: int = 0, rank: int = 0, world: int = 1,
        weights: Callable[[], Any] = dict, update: Callable[[Any, int], Any] = lambda weights, version: None,
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
        self.mine = slice(rank * rows // world, (rank + 1) * rows // world)
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
        columns, shape = self.waiting[0], (-1, self.rows, self.seq_len)
        own = {k: v.reshape(shape)[:, self.mine].reshape(-1, self.seq_len) for k, v in columns.items()}
        return {k: torch.from_numpy(v) for k, v in own.items()}

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
        self.update(self.weights(), self.count)
        self._hold(self._drawn())

    def _drawn(self) -> Drawn:
        """Draw a rollout and pack it."""
        begun = time.perf_counter()
        rollout, said = self._draw()
        how, groups = self.how, np.arange(len(rollout.rewards))
        parts = [_pack(rollout, part, how, self.seq_len, self.rows) for part in np.array_split(groups, how.steps)]
        return Drawn(parts, said | {"rollout_s": time.perf_counter() - begun}, rollout)

    def _hold(self, drawn: Drawn) -> None:
        """Let the batches of a rollout wait."""
        self.waiting, self.last, self.said = drawn.parts * self.how.iterations, drawn.rollout, drawn.said
        self.count += 1

    def _draw(self) -> tuple[Rollout, dict[str, Any]]:
        """Draw groups until there are enough that teach something, or the last resort: any."""
        how = self.how
        good: list[_Group] = []
        tried = 0
        while len(good) < how.prompts and tried < how.most:
            groups, scores = self._groups()
            good += [g for g in groups if g.spread or not how.filter_groups]
            tried += 1
        good = [*good, *(g for g in groups if not any(g is other for other in good))][: how.prompts]
        prompts = [g.prompt for g in good for _ in g.answers]
        answers = [answer for g in good for answer in g.answers]
        rewards = advantages.table([g.rewards for g in good])
        sizes = np.array([len(a.tokens) for a in answers]).reshape(rewards.shape)
        used = rewards
        if how.overlong:
            used = rewards + advantages.overlong_penalty(sizes, *how.overlong)
        rollout = Rollout(prompts, answers, rewards, self.advantage(used, sizes))
        return rollout, _report(rollout, sizes) | scores.report | ({"rollouts": tried} if how.filter_groups else {})

    def _groups(self) -> tuple[list["_Group"], Scores]:
        """Ask the next prompts."""
        how = self.how
        prompts, answers = self._answers()
        scores = self.reward(prompts, answers)
        cuts = range(0, len(prompts), how.group)
        rewards = [scores.rewards[i : i + how.group] for i in cuts]
        each = zip(cuts, rewards, advantages.has_spread(rewards), strict=True)
        return [_Group(prompts[i], answers[i : i + how.group], r, bool(spread)) for i, r, spread in each], scores

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


class _Group(NamedTuple):
    prompt: Prompt
    answers: list[Sample]
    rewards: list[float | None]
    spread: bool


def _report(rollout: Rollout, sizes: np.ndarray) -> dict[str, Any]:
    """Return metrics under the names that TRL and verl use."""
    rewards, ended = rollout.rewards, [a.finish_reason != "length" for a in rollout.answers]
    return {
        "reward": float(np.nanmean(rewards)) if not np.isnan(rewards).all() else None,
        "reward_std": float(advantages.deviation(rewards).mean()),
        "frac_reward_zero_std": float(1 - advantages.has_spread(rewards).mean()),
        "completions": {
            "mean_length": float(sizes.mean()), "min_length": int(sizes.min()), "max_length": int(sizes.max()),
            "clipped_ratio": 1 - sum(ended) / len(ended),
        },
        "advantages": {"min": float(rollout.advantages.min()), "max": float(rollout.advantages.max())},
    }  # fmt: skip


def _pack(rollout: Rollout, groups: np.ndarray, how: Plan, seq_len: int, rows: int) -> dict[str, np.ndarray]:
    """Return the batch columns, (passes * rows, S), of some groups of a rollout."""
    which = [int(g) * how.group + i for g in groups for i in range(how.group)]
    flat, documents, told, worth = rollout.advantages.reshape(-1), [], list[float](), list[float]()
    for i in which:
        before, answer = rollout.prompts[i].ids, rollout.answers[i]
        trained = not (how.mask_truncated and answer.finish_reason == "length")
        sampled = answer.sampled or [True] * len(answer.tokens)
        documents.append((before + answer.tokens, [False] * len(before) + [trained and one for one in sampled]))
        told += [0.0] * len(before) + answer.logprobs
        worth += [0.0] * len(before) + [float(flat[i])] * len(answer.tokens)
    stored = Documents.of(documents)
    pieces, cursor, table = cut(stored, seq_len, "drop"), Cursor(), list[list[int]]()
    while cursor.held or cursor.next < len(pieces.length) or not table:
        some, cursor = plan(cursor, len(pieces.length), lambda i: int(pieces.length[i]), rows, seq_len, first_fit)
        table += some
    more = {"advantages": np.array(worth, np.float32), "rollout_logprobs": np.array(told, np.float32)}
    batch = fill(stored, pieces, table, seq_len, more)
    return batch | {"lengths": lengths(batch["weights"], batch["segment_ids"])}


def _bytes(columns: Mapping[str, np.ndarray]) -> bytes:
    file = io.BytesIO()
    np.savez_compressed(file, **columns)  # type: ignore[arg-type]
    return file.getvalue()


def _columns(data: bytes) -> dict[str, np.ndarray]:
    with np.load(io.BytesIO(data), allow_pickle=False) as file:
        return {name: file[name] for name in file.files}
