"""From a recipe's options of reinforcement learning to its loss and its rollouts."""

from collections.abc import Callable
from typing import Any

from experiments import episodes
from experiments.recipe import Run
from functional_trainer import advantages, backend, tree
from functional_trainer.agreement import differences
from functional_trainer.engine import LocalEngine
from functional_trainer.environments.episodes import report, rewarded
from functional_trainer.experience import Experience, Plan, Prompt, Scores
from functional_trainer.losses import Loss
from functional_trainer.objectives import OBJECTIVES
from functional_trainer.policy import policy
from functional_trainer.rewards import Rewards, load
from functional_trainer.rollout import Sample, Sampling


def loss(o: Any) -> Loss:
    """Return the loss that options ask for.

    With one step per rollout ratios are to the policy itself, and exactly 1; with several, to what the engine said.
    """
    once = o.rollout.steps_per_generation * o.rollout.num_iterations == 1
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

    On a mesh every rank gathers the weights and answers its share of the prompts.
    """
    r, rank, world = o.rollout, run.shard.rank, run.shard.world
    length, ask = episodes.longest(o, [prompt.ids for prompt in run.loader]), episodes.ask(o, run.tokenizer)
    engine = LocalEngine(model, tree.map(run.shard.full, params), slots=r.slots, length=length, compile=r.compile)

    def draw(prompts: list[Prompt], seed: int) -> list[Sample]:
        engine.update(tree.map(run.shard.full, params), engine.version + 1)
        share = -(-len(prompts) // world)
        own = prompts[rank * share : (rank + 1) * share]
        drawn = r.max_completion_length, r.temperature, r.top_k, r.top_p
        found = ask(engine, own, Sampling(*drawn, stop=tuple(run.tokenizer.eos_ids), seed=seed + rank))
        return [sample for samples in backend.everyone(found) for sample in samples]

    part, parts = run.shard.data
    rows = {"seq_len": o.data.seq_len, "rows": o.micro_batch * parts, "rank": part, "world": parts}
    rows |= {"longest": r.max_completion_length}
    return Experience(run.loader, draw, rewards(o, run), advantage(o), plan(o), seed=o.seed, **rows)


def rewards(o: Any, run: Run) -> Callable[[list[Prompt], list[Sample]], Scores]:
    """Return what scores answers: rank 0 does, for all, since functions need not be repeatable."""
    named = o.reward.functions or (() if o.rollout.environment else ("exact",))
    found = [load(given) for given in named]
    if len({name for name, _ in found}) < len(found):
        raise ValueError(f"--reward.functions {' '.join(o.reward.functions)}: two have the same name")
    r = o.reward
    how: dict[str, Any] = {"isolate": r.isolate, "workers": r.workers, "seconds": r.seconds}
    functions = Rewards(dict(found), r.weights or None, **how) if run.shard.rank == 0 else None

    def score(prompts: list[Prompt], answers: list[Sample]) -> Scores:
        made = None
        if functions is not None:
            names = {name for prompt in prompts for name in prompt.columns} - {
                "prompts",
                "completions",
                "completion_ids",
            }
            columns = {name: [prompt.columns.get(name) for prompt in prompts] for name in names}
            said = [a.episode.messages if a.episode else run.tokenizer.decode(a.tokens) for a in answers]
            found = functions([p.text for p in prompts], said, [a.tokens for a in answers], **columns)
            made = Scores(rewarded(answers, found.total), found.report() | report(answers))
        return backend.everyone(made)[0]

    return score


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
