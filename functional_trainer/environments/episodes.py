"""Many episodes at once: every turn is one call of the engine, and all environments answer before the next.

A sample's tokens are all that follows the opening: what the policy said as it was sampled, and between its turns what
the environment said, encoded once, which is not trained. Whatever an environment raises costs its episode, not the run:
it has no reward, and is counted.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import count
from typing import Any, Literal

from functional_trainer.cluster import Crew, RayPool
from functional_trainer.data.chat import Message, Tokenizer
from functional_trainer.engines import Engine, Episode, Sample, Sampling
from functional_trainer.environments import Maker, Row, Step
from functional_trainer.environments.stage import Host, RayStage, Stage
from functional_trainer.environments.tools import Call, Tools, pooled
from functional_trainer.environments.turns import Turns
from functional_trainer.errors import brief


@dataclass(eq=False)
class Play:
    """An episode that goes on until it has a reason to end."""

    number: int
    """Of its environment."""
    place: int
    """Its number for the engine, the same in all turns."""
    opening: list[int]
    messages: list[Message]
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    versions: list[int] = field(default_factory=list)
    sampled: list[bool] = field(default_factory=list)
    calls: list[Call] = field(default_factory=list)
    """Those of the last turn."""
    begun: int = 0
    """Messages of the opening."""
    turns: int = 0
    called: int = 0
    failed: int = 0
    reward: float | None = 0.0
    reason: Literal["stop", "length", "abort"] | None = None
    error: str = ""

    @property
    def until_now(self) -> Sample:
        """What an engine goes on from."""
        return Sample(self.tokens, self.logprobs, "abort", self.versions)

    def lose(self, error: BaseException) -> None:
        """End it without a reward."""
        self.reason, self.reward, self.error = self.reason or "abort", None, brief(f"{type(error).__name__}: {error}")

    def said(self, ids: Sequence[int]) -> None:
        """Append what the environment said."""
        self.tokens += ids
        self.logprobs += [0.0] * len(ids)
        self.versions += self.versions[-1:] * len(ids)
        self.sampled += [False] * len(ids)


class Episodes:
    """Play episodes of environments that `make` makes, with an engine as the policy.

    An episode of more than `turns` turns, or with a turn of more than `turn_tokens` tokens, is cut off: its finish
    reason is "length", and its reward what it got until then. Tools run in `workers` processes, environments in this
    one, or both in `ray` workers of Ray. A call of a tool, and of an environment (`stage`), may take `seconds`. Close
    it when done.
    """

    def __init__(
        self, make: Maker, tokenizer: Tokenizer, *, turns: int = 16, turn_tokens: int = 2**31, workers: int = 2,
        seconds: float = 10.0, ray: int = 0,
    ):  # fmt: skip
        if min(turns, turn_tokens) < 1:
            raise ValueError(f"turns {turns}, turn_tokens {turn_tokens}: each must be at least 1")
        self.make, self.most, self.turn_tokens, self.numbers = make, turns, turn_tokens, count()
        first = make()
        if missing := [name for name in ("reset", "step", "tools", "close") if not hasattr(first, name)]:
            right = "derive it from functional_trainer.environments.Environment"
            raise ValueError(f"environment {type(first).__name__} has no {', '.join(missing)}: {right}")
        offered = list(first.tools)
        functions, described = [t for t in offered if callable(t)], [t for t in offered if not callable(t)]
        if functions and described:
            raise ValueError("tools are functions, or descriptions of what `step` answers: not some of each")
        self.stage: Stage | RayStage
        pool = None
        if ray:
            hows = {"tools": pooled(functions, seconds)} if functions else {}
            crew = Crew(Host, (hows, make, seconds), ray, "workers for environments", threads=2)
            self.stage, pool = RayStage(crew, seconds), RayPool(crew, "tools", seconds)
        else:
            self.stage = Stage(make, seconds)
        self.tools = Tools(functions, workers, seconds, pool=pool) if functions else None
        self.turns = Turns(tokenizer, self.tools.schemas if self.tools else described)

    def openings(self, rows: Sequence[Row], at_once: int = 64) -> list[list[Message]]:
        """Return what each row's environment begins with, `at_once` being open together.

        ValueError says of the first row that has none what its `reset` raised, or returned.
        """
        found: list[list[Message]] = []
        for first in range(0, len(rows), at_once):
            numbered = {next(self.numbers): row for row in rows[first : first + at_once]}
            said = self.stage.reset(numbered)
            self.stage.close([*numbered])
            for opening in said:
                try:
                    found.append(_messages("reset", opening))
                except (Exception, SystemExit) as error:
                    where = f"row {len(found) + 1} of {len(rows)} has no opening"
                    raise ValueError(f"{where}: {type(error).__name__}: {brief(error)}") from error
        return found

    def __call__(
        self, engine: Engine, prompts: Sequence[Sequence[int]], rows: Sequence[Row], sampling: Sampling
    ) -> list[Sample]:
        """Play an episode of each row from the ids of its opening; `max_tokens` is for all turns together.

        To the engine an episode is one answer that grows from turn to turn, so a turn has no more tokens than are left.
        """
        places = sampling.numbered(len(prompts))
        plays = [Play(next(self.numbers), i, list(prompt), []) for i, prompt in zip(places, prompts, strict=True)]
        try:
            self._open(plays, rows)
            while live := [play for play in plays if not play.reason]:
                how = replace(sampling, budget=self.turn_tokens, numbers=tuple(play.place for play in live))
                begun = [play.until_now for play in live]
                samples = engine.generate([play.opening for play in live], how, begun)
                for play, sample in zip(live, samples, strict=True):
                    self._take(play, sample)
                self._answer([play for play in live if not play.reason], sampling.max_tokens)
        finally:
            self.stage.close([play.number for play in plays])
        return [self._sample(play) for play in plays]

    def _open(self, plays: Sequence[Play], rows: Sequence[Row]) -> None:
        """Begin; what the environments say must be what the ids of the openings were made of."""
        found = self.stage.reset({play.number: row for play, row in zip(plays, rows, strict=True)})
        for play, opening in zip(plays, found, strict=True):
            try:
                play.messages, play.begun = _messages("reset", opening), len(opening)
                if self.turns.prompt(opening) != play.opening:
                    raise ValueError("reset said something else than before: it must depend on the row alone")
            except (Exception, SystemExit) as error:
                play.lose(error)

    def _take(self, play: Play, sample: Sample) -> None:
        """Append a turn of the policy, and end the episode if it was cut off."""
        had = len(play.tokens)
        turn = sample.tokens[had:]
        play.tokens += turn
        play.logprobs += sample.logprobs[had:]
        play.versions += sample.versions[had:]
        play.sampled += [True] * len(turn)
        play.turns += 1
        message, play.calls = self.turns.read(turn)
        play.messages.append(message)
        play.called += len(play.calls)
        if sample.finish_reason != "stop":
            paused = sample.finish_reason == "abort" and len(turn) < self.turn_tokens
            play.reason = "abort" if paused else "length"

    def _answer(self, plays: Sequence[Play], most: int) -> None:
        """Let tools and environments answer, and end the episodes that are over."""
        tooled = [play for play in plays if self.tools and play.calls]
        stepped = [play for play in plays if not (self.tools and play.calls)]
        answers = iter(self.tools([call for play in tooled for call in play.calls]) if self.tools and tooled else [])
        for play in tooled:
            results = [next(answers) for _ in play.calls]
            play.failed += sum(result.failed for result in results)
            both = enumerate(zip(play.calls, results, strict=True))
            said = [{"tool_call_id": f"call_{i}", "name": call.name, "content": told.text} for i, (call, told) in both]
            self._go_on(play, Step([{"role": "tool", **one} for one in said]), most)
        found = self.stage.step({play.number: list(play.messages) for play in stepped})
        for play, step in zip(stepped, found, strict=True):
            self._go_on(play, step, most)

    def _go_on(self, play: Play, step: Any, most: int) -> None:
        """Take what was answered: a `Step`, or what was raised instead."""
        try:
            if isinstance(step, BaseException):
                raise step
            if not isinstance(step, tuple) or len(step) != 3:
                raise TypeError(f"step returned {brief(repr(step), 80)}, not Step(messages, reward, done)")
            messages, reward, done = step
            play.reward = _sum(play.reward or 0.0, reward)
            if done:
                play.messages += messages
                play.reason = "stop"
                return
            play.messages += _messages("step", messages)
            ids = self.turns.between(list(messages))
        except (Exception, SystemExit) as error:
            play.lose(error)
            return
        if play.turns == self.most or len(play.tokens) + len(ids) >= most:
            play.reason = "length"
        else:
            play.said(ids)

    def _sample(self, play: Play) -> Sample:
        episode = Episode(play.messages[play.begun :], play.turns, play.called, play.failed, play.error)
        kept = play.tokens, play.logprobs, play.reason or "abort", play.versions, play.sampled
        return Sample(*kept, reward=play.reward, episode=episode)

    def close(self) -> None:
        """End the processes of tools, and the threads or workers of environments."""
        if self.tools:
            self.tools.close()
        self.stage.end()


def _messages(name: str, said: Any) -> list[Message]:
    """Return the messages of an environment's method; raise what it raised, TypeError if these are none."""
    if isinstance(said, BaseException):
        raise said
    known = isinstance(said, Sequence) and not isinstance(said, str)
    if not known or not said or not all(isinstance(one, dict) and {"role", "content"} <= one.keys() for one in said):
        right = '[{"role": "user", "content": "..."}]'
        raise TypeError(f"{name} returned {brief(repr(said), 80)}, not messages as {right}")
    return list(said)


def _sum(before: float, reward: Any) -> float:
    """Add a reward to those before; ValueError if that is no finite number."""
    total = before + (math.nan if isinstance(reward, str | bytes) else float(reward))
    if not math.isfinite(total):
        raise ValueError(f"a Step's reward is {brief(repr(reward), 80)}: what an episode gets must be a finite number")
    return total


def report(samples: Sequence[Sample]) -> dict[str, float]:
    """Return turns, and how often tools were called and failed, under the names of verl and TRL."""
    episodes = [sample.episode for sample in samples if sample.episode]
    if not episodes:
        return {}
    turns, calls = [e.turns for e in episodes], sum(e.calls for e in episodes)
    return {
        "num_turns/mean": sum(turns) / len(turns), "num_turns/min": min(turns), "num_turns/max": max(turns),
        "tools/call_frequency": calls / len(episodes),
        "tools/failure_frequency": sum(e.failures for e in episodes) / calls if calls else 0.0,
    } | raised(samples)  # fmt: skip


def raised(samples: Sequence[Sample]) -> dict[str, int]:
    """Return how many episodes were lost, nothing if there are none."""
    errors = [sample.episode.error for sample in samples if sample.episode]
    return {"environment/raised": sum(map(bool, errors))} if errors else {}


def lost(samples: Sequence[Sample]) -> str:
    """Say how many episodes were lost, and what the first one was lost by; nothing if none was."""
    errors = [sample.episode.error for sample in samples if sample.episode and sample.episode.error]
    said = f"{len(errors)} of {len(samples)} episodes were lost (environment/raised), the first one by "
    return said + errors[0] if errors else ""


def rewarded(answers: Sequence[Sample], given: Sequence[float | None]) -> list[float | None]:
    """Add what functions gave to what environments did; an episode that was lost has no reward."""

    def total(answer: Sample, more: float | None) -> float | None:
        if answer.episode and answer.reward is None:
            return None
        some = [x for x in (answer.reward, more) if x is not None]
        return sum(some) if some else None

    return [total(answer, more) for answer, more in zip(answers, given, strict=True)]
