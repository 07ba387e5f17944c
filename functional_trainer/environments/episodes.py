"""Many episodes at once: every turn is one call of the engine, and all environments answer before the next.

A sample's tokens are all that follows the opening: what the policy said as it was sampled, and between its turns what
the environment said, encoded once, which is not trained. Whatever an environment raises costs its episode, not the run:
it has no reward, and is counted.
"""

import asyncio
import inspect
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any, Literal

import numpy as np

from functional_trainer.data.chat import Message, Tokenizer
from functional_trainer.engines import Engine, Episode, Sample, Sampling
from functional_trainer.environments import Environment, Maker, Row, Step
from functional_trainer.environments.tools import Call, Tools
from functional_trainer.environments.turns import Turns
from functional_trainer.errors import brief


@dataclass(eq=False)
class Play:
    """An episode that goes on until it has a reason to end."""

    environment: Environment | None
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
    reason is "length", and its reward what it got until then. Tools run in `workers` processes; a call of a tool, and
    each step of asynchronous environments, may take `seconds`. Close it when done.
    """

    def __init__(
        self, make: Maker, tokenizer: Tokenizer, *, turns: int = 16, turn_tokens: int = 2**31, workers: int = 2,
        seconds: float = 10.0,
    ):  # fmt: skip
        if min(turns, turn_tokens) < 1:
            raise ValueError(f"turns {turns}, turn_tokens {turn_tokens}: each must be at least 1")
        self.make, self.most, self.turn_tokens, self.seconds = make, turns, turn_tokens, seconds
        offered = list(make().tools)
        functions, described = [t for t in offered if callable(t)], [t for t in offered if not callable(t)]
        if functions and described:
            raise ValueError("tools are functions, or descriptions of what `step` answers: not some of each")
        self.tools = Tools(functions, workers, seconds) if functions else None
        self.turns = Turns(tokenizer, self.tools.schemas if self.tools else described)

    def openings(self, rows: Sequence[Row]) -> list[list[Message]]:
        """Return what each row's environment begins with; what one raises is raised."""
        made = [self.make() for _ in rows]
        found = self._all([partial(one.reset, row) for one, row in zip(made, rows, strict=True)])
        self._all([one.close for one in made])
        if lost := next((one for one in found if isinstance(one, BaseException)), None):
            raise lost
        return found

    def __call__(
        self, engine: Engine, prompts: Sequence[Sequence[int]], rows: Sequence[Row], sampling: Sampling
    ) -> list[Sample]:
        """Play an episode of each row from the ids of its opening; `max_tokens` is for all turns together."""
        plays = [Play(None, list(prompt), []) for prompt in prompts]
        try:
            self._open(plays, rows)
            turn = 0
            while live := [play for play in plays if not play.reason]:
                room = max(sampling.max_tokens - len(play.tokens) for play in live)
                seed = int(np.random.SeedSequence([sampling.seed, turn]).generate_state(1)[0])
                how = replace(sampling, max_tokens=min(room, self.turn_tokens), seed=seed)
                samples = engine.generate([play.opening + play.tokens for play in live], how)
                for play, sample in zip(live, samples, strict=True):
                    self._take(play, sample, sampling.max_tokens)
                self._answer([play for play in live if not play.reason], sampling.max_tokens)
                turn += 1
        finally:
            self._all([play.environment.close for play in plays if play.environment])
        return [self._sample(play) for play in plays]

    def _open(self, plays: Sequence[Play], rows: Sequence[Row]) -> None:
        """Begin; what the environments say must be what the ids of the openings were made of."""

        def begin(play: Play, row: Row) -> Any:
            play.environment = self.make()
            return play.environment.reset(row)

        found = self._all([partial(begin, play, row) for play, row in zip(plays, rows, strict=True)])
        for play, opening in zip(plays, found, strict=True):
            try:
                if isinstance(opening, BaseException):
                    raise opening
                if self.turns.prompt(opening) != play.opening:
                    raise ValueError("reset said something else than before: it must depend on the row alone")
                play.messages, play.begun = list(opening), len(opening)
            except (Exception, SystemExit) as error:
                play.lose(error)

    def _take(self, play: Play, sample: Sample, most: int) -> None:
        """Append a turn of the policy, and end the episode if it was cut off."""
        turn = sample.tokens[: most - len(play.tokens)]
        play.tokens += turn
        play.logprobs += sample.logprobs[: len(turn)]
        play.versions += sample.versions[: len(turn)]
        play.sampled += [True] * len(turn)
        play.turns += 1
        message, play.calls = self.turns.read(turn)
        play.messages.append(message)
        play.called += len(play.calls)
        if len(turn) < len(sample.tokens) or sample.finish_reason != "stop":
            play.reason = "abort" if sample.finish_reason == "abort" else "length"

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
        found = self._all([partial(play.environment.step, list(play.messages)) for play in stepped])  # type: ignore[union-attr]
        for play, step in zip(stepped, found, strict=True):
            self._go_on(play, step, most)

    def _go_on(self, play: Play, step: Any, most: int) -> None:
        """Take what was answered: a `Step`, or what was raised instead."""
        try:
            if isinstance(step, BaseException):
                raise step
            messages, reward, done = step
            play.reward = float(play.reward or 0) + float(reward)
            play.messages += messages
            if done:
                play.reason = "stop"
                return
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

    def _all(self, methods: Sequence[Callable[[], Any]]) -> list[Any]:
        """Call all, wait for what is asynchronous together, and return what each gave or raised."""
        found = [_tried(method) for method in methods]
        waiting = [one for one in found if inspect.isawaitable(one)]
        if not waiting:
            return found

        async def together() -> list[Any]:
            limited = [asyncio.wait_for(one, self.seconds) for one in waiting]
            return await asyncio.gather(*limited, return_exceptions=True)

        answers = iter(asyncio.run_coroutine_threadsafe(together(), self._loop).result())
        return [next(answers) if inspect.isawaitable(one) else one for one in found]

    @cached_property
    def _loop(self) -> asyncio.AbstractEventLoop:
        """A loop in a thread of its own: a notebook has one in this thread already."""
        loop = asyncio.new_event_loop()
        threading.Thread(target=loop.run_forever, daemon=True).start()
        return loop

    def close(self) -> None:
        """End the processes of tools, and what waits for asynchronous environments."""
        if self.tools:
            self.tools.close()
        if "_loop" in self.__dict__:
            self._loop.call_soon_threadsafe(self._loop.stop)


def _tried(method: Callable[[], Any]) -> Any:
    try:
        return method()
    except (Exception, SystemExit) as error:
        return error


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
        "environment/raised": sum(bool(e.error) for e in episodes),
    }  # fmt: skip


def rewarded(answers: Sequence[Sample], given: Sequence[float | None]) -> list[float | None]:
    """Add what functions gave to what environments did; an episode that was lost has no reward."""

    def total(answer: Sample, more: float | None) -> float | None:
        if answer.episode and answer.reward is None:
            return None
        some = [x for x in (answer.reward, more) if x is not None]
        return sum(some) if some else None

    return [total(answer, more) for answer, more in zip(answers, given, strict=True)]
