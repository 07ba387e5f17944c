"""From a recipe's options of reinforcement learning to its rollouts."""

from collections.abc import Callable
from functools import partial
from typing import Any

from experiments import engines, scores
from experiments.policies import advantage
from experiments.recipe import Run
from functional_trainer import backend, tree
from functional_trainer.agreement import scorer
from functional_trainer.ahead import Ahead
from functional_trainer.experience import Experience, Plan, Scorer


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


def experience(o: Any, run: Run, model: Any, params: tree.Tree, reward: Callable) -> Experience:
    """Return the rollouts of `params`, which the step changes in place, scored by `reward`, of `scores`.

    On a mesh every rank gathers the weights and answers its share of the prompts. What is drawn ahead is drawn from a
    copy of the weights, in a thread whose exchanges have a process group of their own.
    """
    r, ahead = o.rollout, bool(o.rollout.max_async_level or o.rollout.partial)
    known, most = run.hf.get("max_position_embeddings"), max(len(p.ids) for p in run.loader) + r.max_completion_length
    if known and most > known:
        made = f"the model was made for fewer (max_position_embeddings {known} in config.json)"
        run.say(f"questions with their answers have up to {most} tokens: {made}")
    group = backend.host_group(o.timeout) if ahead else None
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
    settings["check"] = partial(engines.agree, o, run, model, params)
    settings["greedy"] = partial(draw, greedy=True) if o.loss.advantage == "remax" else None
    settings["old"] = score(params, r.routing_replay == "trainer") if o.loss.old == "trainer" else None
    settings["reference"] = score(tree.map(lambda p: p.detach().clone(), params)) if o.loss.kl_in_reward else None
    given = run.loader, draw, scores.shared(reward, group), advantage(o), plan(o)
    if not ahead:
        return Experience(*given, weights=lambda: tree.map(whole, params), **settings)
    steps = o.steps or plan(o).total_steps(len(run.loader), o.epochs)
    return Ahead(
        *given, weights=copied, level=r.max_async_level, staleness=r.max_staleness, budget=r.partial,
        last=-(-steps // (r.steps_per_generation * r.num_iterations)), in_flight=r.in_flight_weight_updates,
        everyone=lambda value: backend.everyone(value, group),
        stop=engine.pause if r.engine == "local" else lambda: None, **settings,
    )  # fmt: skip
