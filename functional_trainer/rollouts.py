"""Rollouts: what was asked, answered and scored, and what is reported of it."""

import json
import math
import zlib
from collections.abc import Mapping
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from functional_trainer import advantages
from functional_trainer.engines import Sample


class Prompt(NamedTuple):
    """A question: ids, the text that is shown, and what reward functions are given beside it."""

    ids: list[int]
    text: str
    columns: Mapping[str, Any]
    where: str = ""
    """file:line or file[index]"""
    wanted: str | None = None
    """The right answer, of a conversation that ends with it."""


class Prompts(tuple[Prompt, ...]):
    """Questions of a data set."""

    @cached_property
    def identity(self) -> dict[str, Any]:
        """What a resumed run must have in common, and all ranks: ids and columns; of what is no JSON the type."""
        crc = 0
        for prompt in self:
            content = json.dumps(
                [prompt.ids, prompt.columns], skipkeys=True, default=lambda value: type(value).__name__
            )
            crc = zlib.crc32(content.encode(), crc)
        return {"prompts": f"{len(self)} prompts, crc {crc:08x}"}


class Scores(NamedTuple):
    """Rewards of answers, None where no function gave one."""

    rewards: list[float | None]
    failed: Mapping[str, int] = {}
    """How many answers functions failed on, by the name that is reported."""
    each: Mapping[str, list[float | None]] = {}
    """By function."""
    texts: list[str] = []
    """Of answers."""


class Rollout(NamedTuple):
    """Groups that are trained on, one after the other, with an advantage for each answer."""

    prompts: list[Prompt]
    answers: list[Sample]
    rewards: np.ndarray
    """(groups, answers), nan where there is none."""
    advantages: np.ndarray
    """(groups, answers); means over tokens where these have their own."""
    said: list[dict[str, Any]]
    """Of each answer the text and the rewards by function."""
    by_token: list[np.ndarray] | None = None
    """Advantages of each answer's sampled tokens, where they have their own."""


class Group(NamedTuple):
    """Answers to a prompt, what they got, and whether that teaches something."""

    prompt: Prompt
    answers: list[Sample]
    rewards: list[float | None]
    spread: bool
    greedy: float | None
    said: list[dict[str, Any]]


def chosen(answer: Sample) -> int:
    """Count the tokens of an answer that the policy chose."""
    return len(answer.tokens) if answer.sampled is None else sum(answer.sampled)


def _solved(group: Group) -> str:
    """Say which answers of a group are right, if 1 is right and 0 wrong."""
    given = [r for r in group.rewards if r is not None]
    return "no_reward" if not given else "none" if max(given) <= 0 else "all" if min(given) >= 1 else "mixed"


def outcomes(groups: list[Group]) -> dict[str, float]:
    """Return shares of groups, of those with a reward."""
    found = [kind for kind in map(_solved, groups) if kind != "no_reward"]
    return {f"solve_{kind}": found.count(kind) / max(len(found), 1) for kind in ("none", "all", "mixed")}


def filtered(groups: list[Group], kept: list[Group]) -> dict[str, int]:
    """Count groups that were drawn and are not trained on, by the reason."""
    same = {"none": "solve_none", "all": "solve_all", "mixed": "same", "no_reward": "no_reward"}
    left = [group for group in groups if not any(group is other for other in kept)]
    found = ["surplus" if group.spread else same[_solved(group)] for group in left]
    return {reason: found.count(reason) for reason in (*same.values(), "surplus")}


def said_of(scores: Scores, i: int) -> dict[str, Any]:
    """Return an answer's text and its rewards by function."""
    text = {"completion": scores.texts[i]} if scores.texts else {}
    return text | {f"rewards/{name}": given[i] for name, given in scores.each.items()}


def shown(rollout: Rollout, count: int) -> list[dict[str, Any]]:
    """Return a row for each of some answers to each of some prompts: texts, rewards, advantage, why it ended."""
    groups, size = rollout.rewards.shape
    each = min(size, max(math.isqrt(count), -(-count // groups)))
    rows = []
    for i in [group * size + k for group in range(groups) for k in range(each)][:count]:
        prompt, answer = rollout.prompts[i], rollout.answers[i]
        reward, worth, right = rollout.rewards.flat[i], rollout.advantages.flat[i], prompt.columns.get("answer")
        row = {"prompt": prompt.text} | ({} if right is None else {"answer": str(right)}) | rollout.said[i]
        row |= {"reward": None if np.isnan(reward) else float(reward), "advantage": float(worth)}
        if answer.episode:
            row |= {"completion": answer.episode.text}
            row |= {"error": answer.episode.error} if answer.episode.error else {}
        rows.append(row | {"tokens": len(answer.tokens), "finish_reason": answer.finish_reason})
    return rows


def report(rollout: Rollout, sizes: np.ndarray) -> dict[str, Any]:
    """Return metrics under the names that TRL and verl use."""
    rewards, ended = rollout.rewards, np.array([a.finish_reason != "length" for a in rollout.answers])
    given, n = ~np.isnan(rewards), sizes.reshape(-1)
    scored, worth = rewards[given.any(1)], rollout.advantages[given]
    versions = [version for answer in rollout.answers for version in answer.versions]
    return {
        "reward": float(np.nanmean(rewards)) if len(scored) else None,
        "reward_best": float(np.nanmax(scored, 1).mean()) if len(scored) else None,
        "reward/min": float(np.nanmin(scored)) if len(scored) else None,
        "reward/max": float(np.nanmax(scored)) if len(scored) else None,
        "reward_std": float(advantages.deviation(scored).mean()) if len(scored) else None,
        "frac_reward_zero_std": float(1 - advantages.has_spread(scored).mean()) if len(scored) else None,
        "completions": {
            "mean_length": float(sizes.mean()), "min_length": int(sizes.min()), "max_length": int(sizes.max()),
            "clipped_ratio": float(1 - ended.mean()),
            "mean_terminated_length": float(n[ended].mean()) if ended.any() else None,
        },
        "prompts": {"mean_length": float(np.mean([len(p.ids) for p in rollout.prompts]))},
        "advantages": {
            "mean": float(worth.mean()) if len(worth) else None, "min": min(worth.tolist(), default=None),
            "max": max(worth.tolist(), default=None),
        },
    } | ({"weight_version": max(versions)} if versions else {})  # fmt: skip
