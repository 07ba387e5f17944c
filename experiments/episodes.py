"""From a recipe's options to episodes of an environment: what they begin with, how they are played and shown."""

from collections.abc import Callable, Sequence
from functools import cache
from statistics import fmean
from typing import Any

from experiments import data
from experiments.recipe import Run
from functional_trainer import environments, exact_match, tree
from functional_trainer.data import Record, Tokenizer, sources
from functional_trainer.engines import Engine, Sample, Sampling
from functional_trainer.engines.local import LocalEngine
from functional_trainer.environments.episodes import Episodes
from functional_trainer.experience import Prompt, Prompts

Ask = Callable[[Engine, list[Prompt], Sampling, Sequence[Sample | None]], list[Sample]]


@cache
def made(o: Any, tokenizer: Tokenizer) -> Episodes:
    """Return what plays episodes of --rollout.environment."""
    r = o.rollout
    how: dict[str, Any] = {"turns": r.max_turns, "seconds": r.tool_seconds, "workers": o.reward.workers}
    how |= {"ray": r.environment_ray} | ({"turn_tokens": r.max_turn_length} if r.max_turn_length else {})
    return Episodes(environments.load(r.environment), tokenizer, **how)


def read(
    o: Any, tokenizer: Tokenizer, vocab: int, shard: Any, questions: int, say: Callable = print
) -> tuple[Prompts, dict, list[Record]]:
    """Return what episodes begin with, nothing, and held-out ones: `data.prompts` where there is no environment."""
    if not o.rollout.environment:
        return data.prompts(o, tokenizer, vocab, shard, questions, say)
    given, episodes, found = o.rollout.environment, made(o, tokenizer), []
    files = [[row for f in sources.files(paths) for _, row in sources.rows(f)] for paths in (o.data.train, o.data.eval)]
    train, held_out = files if o.data.train else environments.rows(given, episodes.make)
    at_once = -(-o.batch * o.rollout.num_generations // shard.world)  # as many as a rank plays in a rollout
    for opening, row in zip(episodes.openings(train, at_once), train, strict=True):
        ids = episodes.turns.prompt(opening)
        if max(ids) >= vocab:
            raise ValueError(f"--rollout.environment {given}: token {max(ids)} is none of the model's {vocab}")
        found.append(Prompt(ids, str(opening[-1]["content"]), row))
    held_out = held_out[:questions]
    say(f"training data: {', '.join(o.data.train) or given}: {len(found):,} episodes")
    opened = zip(episodes.openings(held_out, at_once), held_out, strict=True)
    return Prompts(found), {}, [Record(f"{given}[{i}]", o_, None, row=row) for i, (o_, row) in enumerate(opened)]


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


class HeldOut:
    """Held-out questions, answered greedily, or held-out episodes, played so, on one rank with all of the weights."""

    def __init__(self, o: Any, run: Run, model: Any):
        self.o, self.run, self.model = o, run, model
        self.questions = run.questions[: o.answers]

    def measure(self, params: tree.Tree) -> dict[str, float]:
        """Return the share of right answers, or the mean reward; nothing on other ranks."""
        if not self.o.rollout.environment:
            answers = self.run.answer(self.model, params, self.questions)
            return {"accuracy": exact_match.score(answers)} if answers else {}
        rewards = [sample.reward for sample in self._played(params, self.questions)]
        return {"eval_reward": fmean(x or 0.0 for x in rewards), "eval_raised": rewards.count(None)} if rewards else {}

    def sample(self, params: tree.Tree) -> list[dict[str, str]]:
        """Return some of them to be shown."""
        asked = self.run.questions[: self.run.samples]
        if not self.o.rollout.environment:
            return [answer._asdict() for answer in self.run.answer(self.model, params, asked)]
        return [_shown(record, one) for record, one in zip(asked, self._played(params, asked), strict=False)]

    def say(self, found: dict[str, float]) -> str:
        """Put what was measured into words."""
        if self.o.rollout.environment:
            lost = f"; {found['eval_raised']} were lost, and count as 0" if found.get("eval_raised") else ""
            return f"the reward of {len(self.questions)} held-out episodes is {found.get('eval_reward', 0):.3f}{lost}"
        return f"{found.get('accuracy', 0):.1%} of {len(self.questions)} answers are right"

    def show(self, params: tree.Tree) -> None:
        """Print what came of them."""
        if self.o.rollout.environment:
            self.run.say(self.say(self.measure(params)))
        else:
            exact_match.show(self.run.answer(self.model, params, self.questions))

    def _played(self, params: tree.Tree, records: Sequence[Record]) -> list[Sample]:
        whole = tree.map(self.run.shard.full, params) if records else None
        if self.run.shard.rank != 0 or not records:
            return []
        episodes, r = made(self.o, self.run.tokenizer), self.o.rollout
        prompts = [episodes.turns.prompt(record.messages) for record in records]
        how = {"slots": min(r.slots, len(prompts)), "length": longest(self.o, prompts)}
        sampling = Sampling(r.max_completion_length, 0.0, stop=tuple(self.run.tokenizer.eos_ids))
        return episodes(LocalEngine(self.model, whole, **how), prompts, [record.row for record in records], sampling)


def _shown(record: Record, sample: Sample) -> dict[str, str]:
    said = sample.episode.text if sample.episode else ""
    return {"question": str(record.messages[-1]["content"]), "episode": said, "reward": str(sample.reward)}
