"""From a recipe's options of reinforcement learning to its loss and its rollouts."""

from collections.abc import Callable
from typing import Any

from experiments import engines
from experiments.recipe import Run
from functional_trainer import advantages, backend, tree
from functional_trainer.agreement import differences
from functional_trainer.ahead import Ahead
from functional_trainer.experience import Experience, Plan, Prompt, Scores
from functional_trainer.losses import Loss
from functional_trainer.objectives import OBJECTIVES
from functional_trainer.policy import policy
from functional_trainer.rewards import Rewards, load
from functional_trainer.rollout import Sample


def loss(o: Any) -> Loss:
    """Return the loss that options ask for.

    With one step per rollout, of the current weights, ratios are to the policy itself, and exactly 1; with several, or
    of older weights, to what the engine said, unless --loss.correction weighs the tokens instead.
    """
    once = o.rollout.steps_per_generation * o.rollout.num_iterations == 1
    if stale := o.rollout.max_async_level > 0 or o.rollout.partial > 0:
        once = once and o.loss.correction != "none"
    if stale and not once and OBJECTIVES[o.loss.loss_type].form == "reinforce":
        raise ValueError("--loss.loss-type reinforce has no ratio to older weights: give --loss.correction as well")
    changes = {"old": "current" if once else "rollout_logprobs", "temperature": o.rollout.temperature}
    given = {"epsilon_low": o.loss.epsilon, "epsilon_high": o.loss.epsilon_high, "delta": o.loss.delta}
    changes |= {k: v for k, v in given.items() if v is not None}
    changes |= {
        "beta": o.loss.beta,
        "kl": o.loss.kl,
        "entropy": o.loss.entropy_coef,
        "balance": o.loss.balance,
        "correction": o.loss.correction,
    }
    return policy(OBJECTIVES[o.loss.loss_type], max_length=o.rollout.max_completion_length, **changes)


def advantage(o: Any) -> Callable:
    """Return the function from rewards and lengths, (P, G) each, to advantages."""
    if o.loss.advantage == "grpo":
        return lambda rewards, sizes: advantages.grpo(rewards, o.loss.scale_rewards)
    if o.loss.advantage == "opo":
        return advantages.opo
    return lambda rewards, sizes: getattr(advantages, o.loss.advantage)(rewards)


def plan(o: Any) -> Plan:
    """Return how rollouts are drawn, filtered and split."""
    r = o.rollout
    overlong = (r.max_completion_length, r.overlong_buffer) if r.overlong_buffer else None
    drawn = r.filter_groups, r.max_num_gen_batches, r.mask_truncated_completions, overlong
    return Plan(o.batch, r.num_generations, r.steps_per_generation, r.num_iterations, *drawn)


def experience(o: Any, run: Run, model: Any, params: tree.Tree) -> Experience:
    """Return the rollouts of `params`, which the step changes in place.

    On a mesh every rank gathers the weights and answers its share of the prompts. What is drawn ahead is drawn from a
    copy of the weights, in a thread whose exchanges have a process group of their own.
    """
    r, full, ahead = o.rollout, run.shard.full, bool(o.rollout.max_async_level or o.rollout.partial)
    group = backend.host_group() if ahead else None
    engine = engines.made(o, run, model, params)

    def copied() -> tree.Tree:
        return tree.map(lambda p: full(p).detach().to(model.dtype or p.dtype, copy=True), params)

    part, parts = run.shard.data
    settings: dict[str, Any] = {"seq_len": o.data.seq_len, "rows": o.micro_batch * parts, "rank": part, "world": parts}
    settings |= {"longest": r.max_completion_length, "seed": o.seed, "update": engine.update}
    given = run.loader, engines.drawn_by(engine, o, run, group), rewards(o, run, group), advantage(o), plan(o)
    if not ahead:
        return Experience(*given, weights=lambda: tree.map(full, params), **settings)
    steps = o.steps or plan(o).total_steps(len(run.loader), o.epochs)
    return Ahead(
        *given, weights=copied, level=r.max_async_level, staleness=r.max_staleness, budget=r.partial,
        last=-(-steps // (r.steps_per_generation * r.num_iterations)), in_flight=r.in_flight_weight_updates,
        everyone=lambda value: backend.everyone(value, group), stop=engine.pause, **settings,
    )  # fmt: skip


def rewards(o: Any, run: Run, group: Any = None) -> Callable[[list[Prompt], list[Sample]], Scores]:
    """Return what scores answers: rank 0 does, for all, since functions need not be repeatable."""
    found = [load(given) for given in o.reward.functions]
    if len({name for name, _ in found}) < len(found):
        raise ValueError(f"--reward.functions {' '.join(o.reward.functions)}: two have the same name")
    r = o.reward
    how: dict[str, Any] = {"isolate": r.isolate, "workers": r.workers, "seconds": r.seconds}
    functions = Rewards(dict(found), r.weights or None, **how) if run.shard.rank == 0 else None

    def scored(prompts: list[Prompt], answers: list[Sample]) -> Scores | None:
        if functions is None:
            return None
        own = {"prompts", "completions", "completion_ids"}
        names = {name for prompt in prompts for name in prompt.columns} - own
        columns = {name: [prompt.columns.get(name) for prompt in prompts] for name in names}
        texts, ids = [run.tokenizer.decode(a.tokens) for a in answers], [a.tokens for a in answers]
        found = functions([p.text for p in prompts], texts, ids, **columns)
        return Scores(found.total, found.report())

    return lambda prompts, answers: backend.together(lambda: scored(prompts, answers), group)[0]


def agree(o: Any, run: Run, model: Any, params: tree.Tree, rollouts: Experience) -> None:
    """Compare what engine and trainer say about the first rollout; ValueError if they differ too much."""
    batch = run.shard.put_batch({k: v.to(run.device) for k, v in rollouts.peek().items()})
    mean, most = differences(model, params, batch, o.micro_batch, run.shard, o.rollout.temperature)
    run.say(f"log-probabilities as sampled and as trained differ by {mean:.2g} in the mean, {most:.2g} at most")
    if not mean <= o.rollout.max_disagreement:
        raise ValueError(
            f"the rollout engine and the trainer disagree: their log-probabilities differ by {mean:.3g} in the mean, "
            f"--rollout.max-disagreement is {o.rollout.max_disagreement}. Weights, precision or ids are not the same"
        )
