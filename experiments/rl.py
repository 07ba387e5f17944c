"""From a recipe's options of reinforcement learning to its rollouts."""

from functools import partial
from typing import Any

from experiments import engines, episodes, scores
from experiments.policies import advantage
from experiments.recipe import Run
from functional_trainer import backend, cluster, tree
from functional_trainer.agreement import differences, scorer
from functional_trainer.ahead import Ahead
from functional_trainer.data import Record, Tokenizer, sources
from functional_trainer.experience import Experience, Plan, Prompts, Scorer
from functional_trainer.rewards import GIVEN, load_all, refuse_columns


def plan(o: Any) -> Plan:
    """Return how rollouts are drawn, filtered and split."""
    r = o.rollout
    overlong = (r.max_completion_length, r.overlong_buffer) if r.overlong_buffer else None
    drawn = r.filter_groups, r.max_num_gen_batches, r.mask_truncated_completions, overlong
    how: dict[str, Any] = {"shown": r.log_completions, "shown_every": r.log_every, "static": o.compile != "off"}
    how |= {"share_prompts": r.share_prompts, "routing_replay": r.routing_replay == "engine"}
    if o.loss.kl_in_reward:
        how |= {"beta": o.loss.beta, "kl": o.loss.kl, "returns": o.loss.advantage == "reinforce_pp"}
    return Plan(o.batch, r.num_generations, r.steps_per_generation, r.num_iterations, *drawn, **how)


def experience(o: Any, run: Run, model: Any, params: tree.Tree) -> Experience:
    """Return the rollouts of `params`, which the step changes in place.

    On a mesh every rank gathers the weights and answers its share of the prompts. What is drawn ahead is drawn from a
    copy of the weights, in a thread whose exchanges have a process group of their own.
    """
    r, ahead = o.rollout, bool(o.rollout.max_async_level or o.rollout.partial)
    group = backend.host_group() if ahead else None
    engine, whole = engines.choose(o, run, model, params, ahead, group)

    def copied() -> tree.Tree:
        return tree.map(lambda p: whole(p).detach().to(model.dtype or p.dtype, copy=True), params)

    def score(weights: tree.Tree, record: bool = False) -> Scorer:
        form = "layer" if o.compile == "auto" else o.compile
        return scorer(model, weights, o.micro_batch, run.shard, run.device, form, r.temperature, record)

    part, parts = run.shard.data
    draw = engines.drawn_by(engine, o, run, group)
    settings: dict[str, Any] = {"seq_len": o.data.seq_len, "rows": o.micro_batch * parts, "rank": part, "world": parts}
    settings |= {"longest": r.max_completion_length, "seed": o.seed, "update": engine.update}
    settings["greedy"] = partial(draw, greedy=True) if o.loss.advantage == "remax" else None
    settings["old"] = score(params, r.routing_replay == "trainer") if o.loss.old == "trainer" else None
    settings["reference"] = score(tree.map(lambda p: p.detach().clone(), params)) if o.loss.kl_in_reward else None
    given = run.loader, draw, scores.rewards(o, run, group), advantage(o), plan(o)
    if not ahead:
        return Experience(*given, weights=lambda: tree.map(whole, params), **settings)
    steps = o.steps or plan(o).total_steps(len(run.loader), o.epochs)
    return Ahead(
        *given, weights=copied, level=r.max_async_level, staleness=r.max_staleness, budget=r.partial,
        last=-(-steps // (r.steps_per_generation * r.num_iterations)), in_flight=r.in_flight_weight_updates,
        everyone=lambda value: backend.everyone(value, group),
        stop=engine.pause if r.engine == "local" else lambda: None, **settings,
    )  # fmt: skip


def read(o: Any, tokenizer: Tokenizer, vocab: int, shard: Any, *more: Any) -> tuple[Prompts, dict, list[Record]]:
    """Return what is asked, as `episodes.read`, and refuse functions that can give no rewards, whatever the columns are
    before that. Join Ray's cluster if the run wants workers there, for all of them."""
    load_all.cache_clear()  # files may have changed since the last run of this process
    own, first = scores.functions(o), o.rollout.ray + o.reward.ray if shard.rank == 0 else 0
    scores.refuse_options(o, own)
    if workers := first + o.rollout.environment_ray:
        sources.files((*o.data.train, *o.data.eval))  # one that is missing is told of before a cluster is begun
        cluster.connect(workers)
    found = episodes.read(o, tokenizer, vocab, shard, *more)
    refuse_columns(own, [*GIVEN, *scores.columns(found[0])])
    return found


def agree(o: Any, run: Run, model: Any, params: tree.Tree, rollouts: Experience) -> None:
    """Compare what engine and trainer say about the first rollout; ValueError if they differ too much."""
    batch = run.shard.put_batch({k: v.to(run.device) for k, v in rollouts.peek().items()})
    mean, most = differences(model, params, batch, o.micro_batch, run.shard, o.rollout.temperature)
    run.say(f"log-probabilities as sampled and as trained differ by {mean:.2g} in the mean, {most:.2g} at most")
    if not mean <= (limit := o.rollout.max_disagreement):
        said = f"the rollout engine and the trainer disagree: their log-probabilities differ by {mean:.3g} in the mean"
        raise ValueError(f"{said}, --rollout.max-disagreement is {limit}. Weights, precision or ids are not the same")
