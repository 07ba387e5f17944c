"""From a recipe's options of reinforcement learning to its rollouts."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from experiments import engines
from experiments.policies import advantage
from experiments.recipe import Run
from functional_trainer import backend, tree
from functional_trainer.agreement import differences, scorer
from functional_trainer.experience import Experience, Plan, Prompt, Scorer, Scores
from functional_trainer.rewards import Rewards, load
from functional_trainer.rollout import Sample, Sampling


def plan(o: Any) -> Plan:
    """Return how rollouts are drawn, filtered and split."""
    r = o.rollout
    overlong = (r.max_completion_length, r.overlong_buffer) if r.overlong_buffer else None
    drawn = r.filter_groups, r.max_num_gen_batches, r.mask_truncated_completions, overlong
    how: dict[str, Any] = {"beta": o.loss.beta, "kl": o.loss.kl} if o.loss.kl_in_reward else {}
    how |= {"routing_replay": r.routing_replay, "shown": r.log_completions, "shown_every": r.log_every}
    return Plan(o.batch, r.num_generations, r.steps_per_generation, r.num_iterations, *drawn, **how)


def experience(o: Any, run: Run, model: Any, params: tree.Tree) -> Experience:
    """Return the rollouts of `params`, which the step changes in place.

    On a mesh every rank gathers the weights and answers its share of the prompts.
    """
    r, rank, world = o.rollout, run.shard.rank, run.shard.world
    length = max((len(prompt.ids) for prompt in run.loader), default=0) + r.max_completion_length
    engine, whole = engines.choose(o, run, model, params, length)

    def answer(prompts: list[Prompt], sampling: Sampling) -> list[Sample]:
        share = -(-len(prompts) // world)
        own = [prompt.ids for prompt in prompts[rank * share : (rank + 1) * share]]
        found = engine.generate(own, replace(sampling, seed=sampling.seed + rank))
        return [sample for samples in backend.everyone(found) for sample in samples]

    usual = Sampling(r.max_completion_length, r.temperature, r.top_k, r.top_p, stop=tuple(run.tokenizer.eos_ids))

    def draw(prompts: list[Prompt], seed: int) -> list[Sample]:
        engine.update(whole(params), engine.version + 1)
        return answer(prompts, replace(usual, seed=seed))

    def greedy(prompts: list[Prompt], seed: int) -> list[Sample]:
        return answer(prompts, replace(usual, temperature=0.0, top_k=0, top_p=1.0))

    part, parts = run.shard.data
    rows = {"seq_len": o.data.seq_len, "rows": o.micro_batch * parts, "rank": part, "world": parts}
    rows |= {"longest": r.max_completion_length, "greedy": greedy if o.loss.advantage == "remax" else None}

    def score(weights: tree.Tree) -> Scorer:
        form = "layer" if o.compile == "auto" else o.compile
        return scorer(model, weights, o.micro_batch, run.shard, run.device, form, r.temperature)

    rows["old"] = score(params) if o.loss.old == "trainer" else None
    rows["reference"] = score(tree.map(lambda p: p.detach().clone(), params)) if o.loss.kl_in_reward else None
    return Experience(run.loader, draw, rewards(o, run), advantage(o), plan(o), seed=o.seed, **rows)


def rewards(o: Any, run: Run) -> Callable[[list[Prompt], list[Sample]], Scores]:
    """Return what scores answers: rank 0 does, for all, since functions need not be repeatable."""
    found = [load(given) for given in o.reward.functions]
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
            texts, ids = [run.tokenizer.decode(a.tokens) for a in answers], [a.tokens for a in answers]
            found = functions([p.text for p in prompts], texts, ids, **columns)
            made = Scores(found.total, found.report(), found.each, texts)
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
