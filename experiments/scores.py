"""From a recipe's options of reinforcement learning to what scores answers, and what is said where it fails."""

from collections.abc import Callable
from typing import Any

from experiments.recipe import Run
from functional_trainer import backend
from functional_trainer.engines import Sample
from functional_trainer.environments.episodes import lost, rewarded
from functional_trainer.experience import Prompt, Prompts, Scores
from functional_trainer.rewards import GIVEN, Function, Rewards, isolated, load_all, refuse
from functional_trainer.rl_options import RewardOptions


def functions(o: Any) -> dict[str, Function]:
    """Return the reward functions by name; ValueError if one is not there."""
    return load_all(o.reward.functions or (() if o.rollout.environment else ("exact",)))


def refuse_options(o: Any, own: dict[str, Function]) -> None:
    """Raise a ValueError if functions can give no rewards whatever the columns are, or options change none of them."""
    r, tools = o.reward, o.rollout.environment and not o.rollout.environment_ray
    refuse(own, r.isolate, r.ray)
    for name in ("seconds",) if tools else ("seconds", "workers"):
        if getattr(r, name) != getattr(RewardOptions, name) and not isolated(own, r.isolate):
            said = f"--reward.{name} has no effect: none of {', '.join(own) or 'the functions'} is isolated"
            raise ValueError(f"{said}; name some with --reward.isolate, or leave it away")


def columns(prompts: Prompts) -> list[str]:
    """Return the names of the columns that functions are given of a data set."""
    return sorted({name for prompt in prompts for name in prompt.columns} - {*GIVEN})


def rewards(o: Any, run: Run, group: Any = None) -> Callable[[list[Prompt], list[Sample]], Scores]:
    """Return what scores answers: rank 0 does, for all, since functions need not be repeatable.

    What fails is said on the console, each function's first failure once. ValueError if all fails the first time.
    """
    r, names, told = o.reward, columns(run.loader), set[str]()
    how: dict[str, Any] = {"isolate": r.isolate, "workers": r.workers, "seconds": r.seconds, "ray": r.ray}
    asked = Rewards(functions(o), r.weights or None, **how) if run.shard.rank == 0 else None

    def scored(prompts: list[Prompt], answers: list[Sample]) -> Scores | None:
        if asked is None:
            return None
        given = {name: [prompt.columns.get(name) for prompt in prompts] for name in names}
        texts, ids = [run.tokenizer.decode(a.tokens) for a in answers], [a.tokens for a in answers]
        said = [a.episode.messages if a.episode else text for a, text in zip(answers, texts, strict=True)]
        found = asked([p.text for p in prompts], said, ids, **given)
        total = rewarded(answers, found.total)
        problems = found.complaints() | ({"lost episodes": some} if (some := lost(answers)) else {})
        if total.count(None) == (n := len(answers)):
            if not told and (found.lost or all(a.episode and a.episode.error for a in answers)):
                why = "; ".join(problems.values())
                raise ValueError(f"nothing can be learned, none of the first {n} answers has a reward: {why}")
            problems["no reward"] = f"none of {n} answers has a reward: nothing is learned from them"
        for what in [what for what in problems if what not in told]:
            run.say(problems[what])
        told.update(problems, ["the first rollout"])
        return Scores(total, found.failed, found.each, texts)

    return lambda prompts, answers: backend.together(lambda: scored(prompts, answers), group)[0]
