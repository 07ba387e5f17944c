"""From a recipe's options of reinforcement learning to what scores answers, and what is said where it fails."""

import threading
from collections.abc import Callable
from typing import Any

from experiments.recipe import Run
from functional_trainer import backend
from functional_trainer.engines import Sample
from functional_trainer.environments.episodes import lost, rewarded
from functional_trainer.rewards import GIVEN, Function, Rewards, conversational, isolated, load_all, refuse
from functional_trainer.rl_options import RewardOptions
from functional_trainer.rollouts import Prompt, Prompts, Scores


def functions(o: Any) -> dict[str, Function]:
    """Return the reward functions by name; ValueError if one is not there."""
    found = load_all(o.reward.functions or (() if o.rollout.environment else ("exact",)))
    own = {given.rpartition(":")[2] for given in o.reward.functions if ".py:" in given}
    if unknown := {*o.reward.messages} - own:
        raise ValueError(f"--reward.messages names {sorted(unknown)}; functions of your own are {sorted(own)}")
    return {name: conversational(one) if name in o.reward.messages else one for name, one in found.items()}


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


def rewards(o: Any, run: Run) -> Callable[[list[Prompt], list[Sample]], Scores | None]:
    """Return what scores answers on rank 0, for all, since functions need not be repeatable; None on others.

    Rollouts may be scored in a thread while held-out answers are: one of them waits, so functions are never called at
    once. What fails is said on the console, each function's first failure once. ValueError if all fails the first time.
    """
    r, names, told = o.reward, columns(run.loader), set[str]()
    how: dict[str, Any] = {"isolate": r.isolate, "workers": r.workers, "seconds": r.seconds, "ray": r.ray}
    asked = Rewards(functions(o), r.weights or None, **how) if run.shard.rank == 0 else None
    lock = threading.Lock()

    def scored(prompts: list[Prompt], answers: list[Sample]) -> Scores | None:
        if asked is None:
            return None
        given = {name: [prompt.columns.get(name) for prompt in prompts] for name in names}
        texts, ids = [run.tokenizer.decode(a.tokens) for a in answers], [a.tokens for a in answers]
        said = [a.episode.messages if a.episode else text for a, text in zip(answers, texts, strict=True)]
        with lock:
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

    return scored


def shared(reward: Callable, group: Any = None) -> Callable[[list[Prompt], list[Sample]], Scores]:
    """Return what scores answers on all ranks as `reward` does on rank 0; what it raises there ends all of them."""
    return lambda prompts, answers: backend.together(lambda: reward(prompts, answers), group)[0]
