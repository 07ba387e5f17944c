"""Held-out questions, answered greedily, or held-out episodes, played so: what the run's rewards say of them."""

from collections.abc import Callable, Sequence
from statistics import fmean
from typing import Any

from experiments import episodes
from experiments.recipe import Run
from functional_trainer import backend, exact_match, tree
from functional_trainer.engines import Sample, Sampling
from functional_trainer.engines.local import LocalEngine
from functional_trainer.rollouts import Prompt, Scores

Asked = list[Prompt]


class HeldOut:
    """The first of a run's held-out questions, at most `count`, answered on one rank with all of the weights.

    `reward` is what scores answers there in training.
    """

    def __init__(self, o: Any, run: Run, model: Any, reward: Callable, count: int):
        self.o, self.run, self.model, self.reward = o, run, model, reward
        self.questions = list(run.questions[:count])

    def measure(self, params: tree.Tree) -> dict[str, float]:
        """Return mean rewards, and the share of right answers where these are known; the same on all ranks."""
        return self._asked(params, self.questions, self._report)

    def sample(self, params: tree.Tree) -> list[dict[str, str]]:
        """Return some of them to be shown."""
        some = list(self.run.questions[: self.run.samples])
        return self._asked(params, some, _shown) if some else []

    def say(self, found: dict[str, float]) -> str:
        """Put what was measured into words."""
        known = sum(prompt.wanted is not None for prompt in self.questions)
        kind = "episodes" if self.o.rollout.environment else "questions"
        said = [f"{found['accuracy']:.1%} of {known} answers are right"] if "accuracy" in found else []
        if "eval_reward" in found:
            said.append(f"the reward of {len(self.questions)} held-out {kind} is {found['eval_reward']:.3f}")
        if found.get("eval_raised"):
            said.append(f"{found['eval_raised']} were lost, and count as 0")
        return "; ".join(said) or f"no held-out {kind} got a reward"

    def show(self, params: tree.Tree) -> None:
        """Print what came of them, and some answers beside the right ones."""
        if not self.questions:
            return
        found, answers = self._asked(params, self.questions, lambda *what: (self._report(*what), _compared(*what)))
        self.run.say(self.say(found))
        if self.run.shard.rank == 0:
            exact_match.show(answers)

    def _asked(self, params: tree.Tree, asked: Asked, make: Callable[[Asked, list[Sample], Scores], Any]) -> Any:
        """Return what `make` makes of prompts, their answers and scores."""

        def alone() -> Any:
            whole = tree.map(self.run.shard.full, params)
            if self.run.shard.rank != 0:
                return None
            answers = self._answers(whole, asked)
            return make(asked, answers, self.reward(asked, answers))

        return backend.together(alone)[0]

    def _answers(self, whole: tree.Tree, asked: Asked) -> list[Sample]:
        r, tokenizer = self.o.rollout, self.run.tokenizer
        most = self.o.data.answer_tokens or r.max_completion_length
        length = episodes.longest(self.o, [prompt.ids for prompt in asked]) + max(0, most - r.max_completion_length)
        engine = LocalEngine(self.model, whole, slots=min(r.slots, len(asked)), length=length)
        return episodes.ask(self.o, tokenizer)(engine, asked, Sampling(most, 0.0, stop=tuple(tokenizer.eos_ids)), ())

    def _report(self, asked: Asked, answers: list[Sample], scores: Scores) -> dict[str, float]:
        """Return means over the answers that have a value, and what functions and environments failed on."""
        lost = [bool(answer.episode and answer.episode.error) for answer in answers]
        right = [None if p.wanted is None else text == p.wanted for p, text in zip(asked, scores.texts, strict=True)]
        values: dict[str, Sequence[float | None]] = {"accuracy": right}
        values["eval_reward"] = [0.0 if gone else x for gone, x in zip(lost, scores.rewards, strict=True)]
        values |= {f"eval_rewards/{name}/mean": given for name, given in scores.each.items()}
        means = {name: fmean(some) for name, given in values.items() if (some := [x for x in given if x is not None])}
        failed = {f"eval_{key}": n for key, n in scores.failed.items()}
        return failed | means | ({"eval_raised": sum(lost)} if self.o.rollout.environment else {})


def _compared(asked: Asked, answers: list[Sample], scores: Scores) -> list[exact_match.Answer]:
    pairs = zip(asked, scores.texts, strict=True)
    return [exact_match.Answer(p.text, p.wanted, text) for p, text in pairs if p.wanted is not None]


def _shown(asked: Asked, answers: list[Sample], scores: Scores) -> list[dict[str, str]]:
    rows = []
    for prompt, answer, text, reward in zip(asked, answers, scores.texts, scores.rewards, strict=True):
        row = {"question": prompt.text} | ({} if prompt.wanted is None else {"wanted": prompt.wanted})
        row |= {"episode": answer.episode.text} if answer.episode else {"given": text}
        rows.append(row | {"reward": str(reward)})
    return rows
