"""The cases of gpu_suite.py about reinforcement learning: what generates, and what trains on it, on any device.

Rollouts are drawn and packed as the recipe does it, from more answers than the engine has rows, of models with random
weights. What the engine said of its tokens is compared with what the train step's forward says, relative to how far
log-probabilities lie apart; experts are those that the engine recorded, because near-ties flip between two programs.
A step on the device in float32 is compared with the same step on the host in float64. That the engine samples with the
weights that a step has just changed is seen from its log-probabilities, which the weights of before do not give.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

from experiments.benchmarks.gpu_checks import At, Check, Skip, error, prepared

LEVEL = {"float32": 1e-4, "bfloat16": 5e-2}
"""Of log-probabilities, relative to their spread."""
GROUP, QUESTIONS = 4, 6


def prompts(at: At, vocab: int) -> Any:
    """Return random questions of different lengths."""
    import numpy as np

    from functional_trainer.rollouts import Prompt, Prompts

    rng, longest = np.random.default_rng(0), at.pick(9, 200)
    sizes = [1 + i * longest // QUESTIONS for i in range(QUESTIONS)]
    return Prompts(Prompt(rng.integers(0, vocab, n).tolist(), "", {}) for n in sizes)


def engine(at: At, model: Any, params: Any, form: str = "off", **how: Any) -> Any:
    """Return the built-in engine with room for a question and its answer."""
    from functional_trainer.engines.local import LocalEngine

    moe = any("moe" in layer for layer in model.specs["layers"])
    given = {"slots": 12, "length": at.pick(24, 264), "record_routing": moe} | how
    return LocalEngine(model, params, compile=form, backend=at.compiler, **given)  # type: ignore[arg-type]


def sampling(at: At, vocab: int, **how: Any) -> Any:
    """Return how answers are drawn: they end at some of the tokens, at different lengths."""
    from functional_trainer.engines import Sampling

    return Sampling(at.pick(10, 48), stop=tuple(range(0, vocab, 20)), **how)


def rollouts(at: At, model: Any, params: Any, draws: Any) -> Any:
    """Return an iterator of batches as `functional_trainer.experience` makes them; longer answers have lower rewards.

    Before each the engine is given the parameters as they are then.
    """
    from functional_trainer import advantages
    from functional_trainer.experience import Experience, Plan
    from functional_trainer.rollouts import Scores

    asked = prompts(at, model.config.vocab)
    how = Plan(QUESTIONS, GROUP, routing_replay=draws.record is not None)
    return Experience(
        asked,
        lambda some, seed: draws.generate([p.ids for p in some], sampling(at, model.config.vocab, seed=seed % 1000)),
        lambda some, answers: Scores([-float(len(a.tokens)) for a in answers], {}),
        lambda rewards, sizes: advantages.grpo(rewards),
        how, seq_len=at.pick(40, 512), longest=at.pick(10, 48), rows=2, weights=lambda: params, update=draws.update,
    )  # fmt: skip


def said_and_trained(model: Any, params: Any, batch: dict[str, Any]) -> tuple[Any, Any]:
    """Return log-probabilities of sampled tokens, the engine's and the step's, less the mean of the latter."""
    from functional_trainer import tree
    from functional_trainer.agreement import score

    sampled = batch["weights"] != 0
    used = tree.map(lambda w: w.detach().to(model.dtype or w.dtype), params)  # as a step casts them
    trained = score(model, used, batch)[sampled]
    return batch["rollout_logprobs"][sampled] - trained.mean(), trained - trained.mean()


def decode(at: At, family: str, form: str) -> list[Check]:
    """Check the engine in one form against the step's forward, on random weights and after a step has changed them."""
    import torch

    from functional_trainer import init_state, make_train_step, optimizers, tree
    from functional_trainer.policy import policy

    torch.compiler.reset()
    model, params, _ = prepared(at, family)
    adamw = optimizers.adamw(optimizers.schedule("constant", 1e-2, 1))  # changes each weight by half of its scale
    state, draws = init_state(params, adamw), engine(at, model, params, form)
    step, source = (
        make_train_step(model, policy("grpo", old="current"), adamw),
        rollouts(at, model, state.params, draws),
    )
    first = {k: v.to(at.device) for k, v in next(source).items()}
    found = [Check("log-probabilities", error(*said_and_trained(model, state.params, first)), LEVEL[at.dtype])]
    before = tree.map(torch.Tensor.clone, state.params)
    step(state, first)
    second = {k: v.to(at.device) for k, v in next(source).items()}
    new, old = (error(*said_and_trained(model, weights, second)) for weights in (state.params, before))
    wrong = sum(version != 1 for answer in source.last.answers for version in answer.versions)
    return [
        *found,
        Check("after a step", new, LEVEL[at.dtype]),
        Check("new over old", new / old, 0.2, f"by the weights of before the error is {old:.1e}"),
        Check("versions", float(wrong), 0.0),
    ]


def rows(at: At, family: str, kind: str) -> list[Check]:
    """Check that answers of fewer rows than prompts are those of a row for each: but for ties, all of them."""
    import torch

    if at.dtype != "float32":
        raise Skip("in 16 bit another number of rows rounds otherwise, and answers part")
    how = {"greedy": {"temperature": 0.0}, "sampled": {"top_k": 40, "top_p": 0.95}}[kind]
    model, params, _ = prepared(at, family)
    drawn = sampling(at, model.config.vocab, seed=1, **how)
    asked = [p.ids for p in prompts(at, model.config.vocab) for _ in range(GROUP if kind == "sampled" else 1)] * 2
    few, many = (engine(at, model, params, slots=n).generate(asked, drawn) for n in (at.pick(5, 16), len(asked)))
    same = [(a, b) for a, b in zip(few, many, strict=True) if a.tokens == b.tokens]
    ours, wanted = (torch.tensor([x for pair in same for x in pair[side].logprobs]) for side in (0, 1))
    sizes = sorted(len(a.tokens) for a in few)
    return [
        Check("answers", 1 - len(same) / len(asked), 0.05, f"{len(asked)} of {sizes[0]} to {sizes[-1]} tokens"),
        Check("log-probabilities", error(ours - wanted.mean(), wanted - wanted.mean()), LEVEL[at.dtype]),
    ]


def moved(model: Any, params: Any, batch: dict[str, Any], loss: Any, at: tuple[Any, Any], **form: Any) -> Any:
    """Return a step's loss, and by how much it moves each parameter, which is in proportion to the gradient.

    It runs on a device in a dtype, `at`.
    """
    import torch

    from functional_trainer import init_state, make_train_step, optimizers, tree

    sgd = optimizers.sgd(optimizers.schedule("constant", 1e2, 1), momentum=0.0)  # beside a norm's 1 a change must show
    start = tree.map(lambda w: w.to(*at, copy=True), params)
    columns = {k: v.to(at[0], at[1] if v.is_floating_point() else v.dtype) for k, v in batch.items()}
    run = make_train_step(model, loss, sgd, clip=0, **form)
    state, metrics = run(init_state(tree.map(torch.Tensor.clone, start), sgd), columns)
    return metrics["loss"].cpu(), {
        k: v.cpu() for k, v in tree.flatten(tree.map(torch.sub, start, state.params)).items()
    }


def step(at: At, family: str, objective: str) -> list[Check]:
    """Check a step on rollouts, compiled by layer, against the host's in float64: loss and gradients, all terms on."""
    import torch

    from functional_trainer.policy import policy

    if at.dtype != "float32":
        raise Skip("float32 is compared with float64")
    torch.compiler.reset()
    model, params, _ = prepared(at, family)
    batch = next(rollouts(at, model, params, engine(at, model, params)))
    rng, host = torch.Generator().manual_seed(0), batch["tokens"].device
    for column in ("old_logprobs", "ref_logprobs"):
        batch[column] = batch["rollout_logprobs"] + 0.2 * torch.randn(batch["weights"].shape, generator=rng)
    run = partial(moved, model, params, batch, policy(objective, beta=0.1, entropy=0.01, correction="token_truncate"))
    our_loss, ours = run((at.device, torch.float32), compile="layer", backend=at.compiler)
    wanted_loss, wanted = run((host, torch.float64))
    each = {k: error(ours[k], wanted[k]) for k in wanted}
    worst = max(each, key=lambda k: each[k])
    whole, exact = (torch.cat([x.flatten().to(torch.float64) for x in side.values()]) for side in (ours, wanted))
    return [
        Check("loss", error(our_loss, wanted_loss), 2e-5),
        Check("gradient", ((whole - exact).norm() / exact.norm()).item(), 2e-5),
        Check("worst leaf", each[worst], 2e-4, worst),
    ]


FAMILIES = ("qwen3", "qwen3_moe")
CASES: dict[str, Callable[[At], list[Check]]] = {
    **{
        f"decode {f}, {form}": partial(decode, family=f, form=form)
        for f in FAMILIES
        for form in ("off", "layer", "step")
    },
    **{
        f"decode rows {f}, {kind}": partial(rows, family=f, kind=kind)
        for f in FAMILIES
        for kind in ("greedy", "sampled")
    },
    **{
        f"policy step {f}, {name}": partial(step, family=f, objective=name)
        for f in FAMILIES
        for name in ("grpo", "gspo")
    },
}
