"""From a recipe's options to episodes of an environment: what they begin with, and how they are played."""

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

from functional_trainer import environments
from functional_trainer.data import Tokenizer, sources
from functional_trainer.engines import Engine, Sample, Sampling
from functional_trainer.environments.episodes import Episodes
from functional_trainer.rollouts import Prompt, Prompts

Ask = Callable[[Engine, list[Prompt], Sampling, Sequence[Sample | None]], list[Sample]]


@cache
def made(o: Any, tokenizer: Tokenizer) -> Episodes:
    """Return what plays episodes of --rollout.environment."""
    r = o.rollout
    how: dict[str, Any] = {"turns": r.max_turns, "seconds": r.tool_seconds, "workers": o.reward.workers}
    how |= {"ray": r.environment_ray} | ({"turn_tokens": r.max_turn_length} if r.max_turn_length else {})
    return Episodes(environments.load(r.environment), tokenizer, **how)


def read(
    o: Any, tokenizer: Tokenizer, vocab: int, shard: Any, count: int, say: Callable = print
) -> tuple[Prompts, Prompts]:
    """Return what episodes begin with, and `count` held-out ones."""
    given, episodes = o.rollout.environment, made(o, tokenizer)
    files = [[row for f in sources.files(paths) for row in sources.rows(f)] for paths in (o.data.train, o.data.eval)]
    at_once = -(-o.batch * o.rollout.num_generations // shard.world)  # as many as a rank plays in a rollout
    own = [] if o.data.train else environments.rows(given, episodes.make)
    train, held_out = files if o.data.train else [[(f"{given}[{i}]", x) for i, x in enumerate(some)] for some in own]

    def opened(rows: Sequence[tuple[str, Any]]) -> Prompts:
        found = []
        openings = episodes.openings([row for _, row in rows], at_once)
        for opening, (where, row) in zip(openings, rows, strict=True):
            ids = episodes.turns.prompt(opening)
            if max(ids) >= vocab:
                raise ValueError(f"--rollout.environment {given}: token {max(ids)} is none of the model's {vocab}")
            found.append(Prompt(ids, str(opening[-1]["content"]), row, where))
        return Prompts(found)

    say(f"training data: {', '.join(o.data.train) or given}: {len(train):,} episodes")
    return opened(train), opened(held_out[:count])


def ask(o: Any, tokenizer: Tokenizer) -> Ask:
    """Return what answers prompts: an engine alone, from what has begun, or an engine and environments."""
    if not o.rollout.environment:
        return lambda engine, prompts, how, begun: engine.generate([prompt.ids for prompt in prompts], how, begun)
    episodes = made(o, tokenizer)

    def play(engine: Engine, prompts: list[Prompt], how: Sampling, begun: Sequence[Sample | None]) -> list[Sample]:
        return episodes(engine, [p.ids for p in prompts], [p.columns for p in prompts], how)

    return play


def longest(o: Any, prompts: Sequence[Sequence[int]]) -> int:
    """Return the tokens that an engine's row must hold."""
    return max(map(len, prompts), default=0) + o.rollout.max_completion_length
