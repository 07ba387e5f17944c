"""Routing replay: recorded experts are what the trainer would choose, and replaying others equals maths by hand."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch._dynamo

import kernels
from functional_trainer import agreement, init_state, make_train_step, optimizers, routing, tree
from functional_trainer.engines import Sample, Sampling
from functional_trainer.engines.local import LocalEngine
from functional_trainer.experience import Experience, Plan
from functional_trainer.losses import sft
from functional_trainer.policy import policy
from functional_trainer.reference import Reference
from functional_trainer.rollouts import Prompt, Prompts, Scores
from functional_trainer.types import ONE_DEVICE
from models import layers
from sharding_rules import qwen3_moe
from sharding_rules.mesh import Mesh, make
from sharding_rules.sharder import Sharder
from tests.models import small
from tests.multi_rank.launch import run as on_ranks

F64 = torch.float64
MODEL = small.model(initializer_range=0.5)
ROWS = [[5, 4], [9, 2], [3, 3, 4], [6, 7]]


def chosen(model, params, batch) -> torch.Tensor:
    """Return the ids (B, S, L, K) that a forward without a cache hands to its experts."""
    seen, real = [], kernels.experts

    def watched(x, weights, ids, *rest, **how):
        seen.append(ids)
        return real(x, weights, ids, *rest, **how)

    kernels.experts = watched
    try:
        model.apply(params, batch)
    finally:
        kernels.experts = real
    return torch.stack([ids.view(*batch["tokens"].shape, -1) for ids in seen], 2)


def experience(model, params, *, record=True, asked=True, temperature=1.0, **how) -> Experience:
    engine = LocalEngine(model, params, slots=5, length=20, record_routing=record)
    prompts = Prompts(Prompt([3 + i, 1 + i % 3] * (1 + i % 4), "", {}) for i in range(6))
    return Experience(
        prompts,
        lambda some, seed: engine.generate([p.ids for p in some], Sampling(7, temperature, stop=(4, 9), seed=seed)),
        lambda p, a: Scores([float(len(x.tokens)) for x in a], {}),
        lambda rewards, sizes: rewards - rewards.mean(1, keepdims=True),
        Plan(3, 4, routing_replay=asked), **{"seq_len": 30, "longest": 7, "rows": 2} | how,
    )  # fmt: skip


# what is recorded ----------------------------------------------------------------------------------------------------


def test_recorded_experts_are_those_that_the_trainer_chooses():
    """Of every token but the last, prompts that share a beginning and rows that are given on included."""
    params = MODEL.init(0, dtype=F64)
    rollouts = experience(MODEL, params)
    batch = next(rollouts)
    assert batch["routed_experts"].dtype == torch.uint8 and batch["routed_experts"].shape[2:] == (2, 2)
    real = batch["segment_ids"] != 0
    found = chosen(MODEL, params, batch).sort(-1).values[real]
    assert torch.equal(batch["routed_experts"].long().sort(-1).values[real], found)
    assert len(found.unique(dim=0)) > 5, "tokens that all go the same way prove nothing"
    lengths = {len(a.tokens) for a in rollouts.last.answers}
    assert len(lengths) > 2 and not batch["routed_experts"][~real].any()


@pytest.mark.parametrize("compile", ["off", pytest.param("step", marks=pytest.mark.slow)])
def test_recording_changes_no_sample(compile):
    params, sampling = MODEL.init(0), Sampling(9, 1.3, stop=(3, 5), seed=3)
    prompts, how = [[3, 1, 4], [2], [7, 7, 1], [3, 1, 4]], {"slots": 3, "length": 14, "backend": "aot_eager"}
    torch._dynamo.reset()
    plain, said = (
        LocalEngine(MODEL, params, compile=compile, record_routing=record, **how).generate(prompts, sampling)
        for record in (False, True)
    )
    assert [a[:5] for a in plain] == [b[:5] for b in said] and all(a.routed_experts is None for a in plain)
    for prompt, sample in zip(prompts, said, strict=True):
        assert sample.routed_experts.shape == (len(prompt) + len(sample.tokens) - 1, 2, 2)


def test_the_type_of_ids_holds_padding_too():
    for experts, wanted in ((255, torch.uint8), (256, torch.int16)):
        assert routing.id_type(small.model(num_experts=experts)) == wanted
        assert torch.iinfo(wanted).max >= experts


# replay --------------------------------------------------------------------------------------------------------------


def trained(batch, loss=None, steps=2, dtype=F64, **how):
    """Return parameters and metrics after some steps."""
    torch._dynamo.reset()
    optimizer = optimizers.adamw(optimizers.schedule("constant", 1e-2, 10, 0))
    state = init_state(MODEL.init(0, dtype=dtype), optimizer)
    step = make_train_step(MODEL, loss or sft(), optimizer, **{"backend": "aot_eager"} | how)
    for _ in range(steps):
        state, metrics = step(state, batch)
    return tree.map(torch.clone, (tree.flatten(state.params), metrics))


def others(batch, seed=0, experts=5) -> torch.Tensor:
    """Return ids (B, S, 2, 2), two different ones for each token and layer."""
    gen = torch.Generator().manual_seed(seed)
    order = torch.rand(*batch["tokens"].shape, 2, experts, generator=gen).argsort(-1)
    return order[..., :2].to(torch.uint8).contiguous()


def test_replaying_the_own_routing_changes_nothing():
    batch = small.batch(ROWS)
    own = chosen(MODEL, MODEL.init(0, dtype=F64), batch).clamp_max(4).to(torch.uint8)  # padding has id 5
    plain, replayed = trained(batch, steps=1), trained(batch | {"routed_experts": own}, steps=1)
    torch.testing.assert_close(replayed, plain, rtol=0, atol=0)


def by_hand(p, x, ids, normalize) -> torch.Tensor:
    """Return the output of a layer of experts for tokens (T, D) with given ids (T, K), token by token."""
    made = []
    for token, some in zip(x, ids.tolist(), strict=True):
        scores = torch.softmax(p["router"] @ token, 0)
        total = sum(scores[e] for e in some) if normalize else 1.0
        parts = []
        for e in some:
            gate, up = p["gate_up"][e, 0] @ token, p["gate_up"][e, 1] @ token
            parts.append(scores[e] / total * (p["down"][e] @ (gate / (1 + torch.exp(-gate)) * up)))
        made.append(sum(parts))
    return torch.stack(made)


@pytest.mark.parametrize("normalize", [True, False])
def test_replaying_other_experts_is_the_maths_by_hand(normalize):
    """Forward and all gradients, the router's through the scores of recorded experts."""
    gen = torch.Generator().manual_seed(1)
    shapes = {"router": (5, 3), "gate_up": (5, 2, 4, 3), "down": (5, 3, 4)}
    p = {k: torch.randn(s, generator=gen, dtype=F64, requires_grad=True) for k, s in shapes.items()}
    x = torch.randn(2, 6, 3, generator=gen, dtype=F64, requires_grad=True)
    segments = torch.tensor([[1, 1, 1, 2, 2, 0], [1, 1, 2, 2, 2, 2]])
    ids = torch.rand(2, 6, 5, generator=gen).argsort(-1)[..., :2].to(torch.uint8)
    weigh = torch.randn(2, 6, 3, generator=gen, dtype=F64) * (segments != 0)[..., None]
    y, _ = layers.moe(p, x, {"token_segment_ids": segments, "routed_experts": ids}, 2, normalize, ONE_DEVICE)
    wanted = by_hand(p, x.flatten(0, 1), ids.flatten(0, 1), normalize).view_as(x)
    leaves = [*p.values(), x]
    ours, theirs = (torch.autograd.grad((out * weigh).sum(), leaves) for out in (y, wanted))
    torch.testing.assert_close(
        y * (segments != 0)[..., None], wanted * (segments != 0)[..., None], rtol=1e-10, atol=1e-12
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)
    assert ours[0].abs().max() > 1e-3, "the router learns"


HOW = {
    "recomputed": {"remat": "layer"},
    "recomputed selectively, 2 passes": {"remat": "selective", "micro_batches": 2},
    "4 passes": {"micro_batches": 4},
    "layer compiled": {"compile": "layer"},
    "step compiled": {"compile": "step"},
}


@pytest.fixture(scope="module")
def replayed():
    batch = small.batch(ROWS)
    batch["routed_experts"] = others(batch)
    return batch, trained(batch)


@pytest.mark.parametrize("how", [pytest.param(n, marks=pytest.mark.slow) if "compiled" in n else n for n in HOW])
def test_how_a_step_is_made_does_not_matter(how, replayed):
    batch, wanted = replayed
    torch.testing.assert_close(trained(batch, **HOW[how]), wanted, rtol=1e-9, atol=1e-9)


def test_replay_is_not_what_is_chosen(replayed):
    batch, (params, metrics) = replayed
    free = trained({k: v for k, v in batch.items() if k != "routed_experts"})
    assert abs(float(free[1]["nll"] - metrics["nll"])) > 1e-3
    ids = batch["routed_experts"].long()[batch["segment_ids"] != 0]
    load = torch.stack([torch.bincount(ids[:, i].flatten(), minlength=5) for i in range(2)])
    assert torch.equal(metrics["load"], load.to(F64))
    router = "layers/0/moe/router"
    assert not torch.equal(params[router], MODEL.init(0, dtype=F64)["layers"][0]["moe"]["router"])


def step_on_ranks(columns, sizes):
    """Take a step on a mesh; return whole parameters and metrics."""
    grid = make(Mesh(**sizes), torch.device("cpu"), 2) if sizes else None
    model = small.model(hidden_size=12, num_experts=6, vocab_size=24, initializer_range=0.5)
    shard = Sharder.of(qwen3_moe.RULES, grid, model.specs) if grid else ONE_DEVICE
    part, ways = shard.data
    own = {k: v.chunk(ways)[part].contiguous() for k, v in columns.items()}
    optimizer = optimizers.adamw(optimizers.schedule("constant", 1e-2, 10, 0))
    state = init_state(model.init(0, dtype=F64, shard=shard), optimizer)
    state, metrics = make_train_step(model, sft(), optimizer, shard=shard)(state, shard.put_batch(own))
    return {k: shard.full(v) for k, v in tree.flatten(state.params).items()}, metrics


@pytest.mark.parametrize(
    "sizes", [{"fsdp": 1, "ep": 2}, pytest.param({"fsdp": 1, "tp": 2}, marks=pytest.mark.slow),
              pytest.param({"fsdp": 1, "cp": 2}, marks=pytest.mark.slow)], ids=str,
)  # fmt: skip
def test_a_mesh_does_not_matter(sizes):
    batch = small.batch(ROWS, width=14)
    batch["routed_experts"] = others(batch, experts=6)
    alone = step_on_ranks(batch, {})
    torch.testing.assert_close(on_ranks(2, step_on_ranks, batch, sizes), alone, rtol=1e-9, atol=1e-9)


# what it is for ------------------------------------------------------------------------------------------------------


def test_replay_lowers_the_disagreement_of_a_trainer_whose_router_is_another():
    """Recorded under one router, compared under another: near-ties that flip no longer change the experts."""
    params = MODEL.init(0)
    gen = torch.Generator().manual_seed(0)
    batch = next(experience(MODEL, params))

    def moved(path, p):
        return p + 0.03 * torch.randn(p.shape, generator=gen) if path.endswith("router") else p

    noisy = tree.map_with_path(moved, params)
    free = {k: v for k, v in batch.items() if k != "routed_experts"}
    real = batch["segment_ids"] != 0
    flipped = chosen(MODEL, params, free).sort(-1).values != chosen(MODEL, noisy, free).sort(-1).values
    assert flipped[real].any(), "some token has to choose other experts"
    with_replay, without = (agreement.differences(MODEL, noisy, b, 2) for b in (batch, free))
    assert with_replay[0] < 0.7 * without[0] and with_replay[1] < without[1]


def test_replay_lowers_the_disagreement_of_a_trainer_in_another_precision():
    """An engine in float32 and a trainer in bfloat16, the same weights."""
    params, trainer = MODEL.init(0), replace(MODEL, dtype=torch.bfloat16)
    batch = next(experience(MODEL, params))
    free = {k: v for k, v in batch.items() if k != "routed_experts"}
    with_replay, without = (agreement.differences(trainer, params, b, 2) for b in (batch, free))
    assert with_replay[0] < 0.7 * without[0] and with_replay[1] < 0.5 * without[1]


def test_a_reference_chooses_its_own_experts():
    params = MODEL.init(0, dtype=F64)
    batch = next(experience(MODEL, params))
    reference = Reference.of(MODEL, MODEL.init(1, dtype=F64))
    free = {k: v for k, v in batch.items() if k != "routed_experts"}
    both = reference(batch)
    assert torch.equal(both["ref_logprobs"], reference(free)["ref_logprobs"]) and "routed_experts" in both


def test_a_policy_step_on_recorded_experts():
    """One step on a rollout: ratios are 1, and rollout and trainer agree to rounding."""
    batch = next(experience(MODEL, MODEL.init(0, dtype=F64)))
    _, metrics = trained(batch, policy("grpo", old="current"), steps=1)
    assert float(metrics["ratio/mean"]) == 1 and float(metrics["sampling_logp_difference/max"]) < 1e-6


# the trainer's own ---------------------------------------------------------------------------------------------------


def recording(model, params, **how) -> Experience:
    """Return rollouts of two steps each, trained on twice, with the routing before the first of them."""
    old = agreement.scorer(model, params, 2, ONE_DEVICE, torch.device("cpu"), record=True, **how)
    rollouts = experience(model, params, record=False, asked=False, old=old)
    rollouts.how = Plan(3, 4, steps=2, iterations=2)
    return rollouts


def without(batch):
    return {k: v for k, v in batch.items() if k != "routed_experts"}


def test_all_steps_of_a_rollout_use_the_routing_before_the_first():
    """The trainer's own then: of every token, and what a forward with it says is where ratios are 1."""
    optimizer = optimizers.adamw(optimizers.schedule("constant", 3e-2, 10, 0))
    state = init_state(MODEL.init(0, dtype=F64), optimizer)
    begun, rollouts = tree.map(torch.clone, state.params), recording(MODEL, state.params)
    step, seen, moved = make_train_step(MODEL, policy("grpo", old="old_logprobs"), optimizer, rows=2), [], []
    for _ in range(4):
        batch = next(rollouts)
        real = batch["segment_ids"] != 0
        assert batch["routed_experts"].dtype == torch.uint8 and not batch["routed_experts"][~real].any()
        assert torch.equal(batch["routed_experts"].long()[real], chosen(MODEL, begun, without(batch))[real])
        for free in (batch, without(batch)):
            logp = agreement.score(MODEL, begun, free)
            torch.testing.assert_close(logp, batch["old_logprobs"], rtol=1e-12, atol=1e-12)
        now = chosen(MODEL, state.params, without(batch))[real].sort(-1).values
        moved.append(bool((now != batch["routed_experts"].long()[real].sort(-1).values).any()))
        logp = agreement.score(MODEL, state.params, batch)
        state, metrics = step(state, batch)
        sampled = batch["weights"] != 0
        wanted = (logp - batch["old_logprobs"])[sampled].exp()
        seen.append([float(metrics[f"ratio/{name}"]) for name in ("mean", "min", "max")])
        assert seen[-1] == pytest.approx([float(x) for x in (wanted.mean(), wanted.min(), wanted.max())], rel=1e-9)
    assert moved == [False, True, True, True] and seen[0] == [1, 1, 1] and seen[1][2] > 1.001
    router = "layers/0/moe/router"
    assert (tree.flatten(state.params)[router] - tree.flatten(begun)[router]).abs().max() > 0.02, "it learns"


@pytest.mark.parametrize("remat", ["none", "layer"])
def test_the_first_step_is_as_without_it(remat):
    batch = next(recording(MODEL, MODEL.init(0, dtype=F64)))
    pair = [trained(b, policy("grpo", old="old_logprobs"), steps=1, remat=remat) for b in (batch, without(batch))]
    torch.testing.assert_close(*pair, rtol=0, atol=0)
    assert abs(float(pair[0][1]["grad_norm"])) > 1e-3


def test_a_trainers_routing_is_kept_by_a_rollout_that_is_resumed():
    params = MODEL.init(0)
    straight, resumed = recording(MODEL, params), recording(MODEL, MODEL.init(1))
    next(straight)
    resumed.restore(straight.state())
    for _ in range(3):
        assert torch.equal(next(resumed)["routed_experts"], next(straight)["routed_experts"])


@pytest.mark.slow
def test_a_compiled_trainer_records_the_same():
    params = MODEL.init(0, dtype=F64)
    plain, compiled = (next(recording(MODEL, params, compile=form)) for form in ("off", "layer"))
    torch.testing.assert_close(compiled, plain, rtol=1e-9, atol=1e-9)


# refusals ------------------------------------------------------------------------------------------------------------


def test_what_cannot_be_replayed_is_refused():
    dense = small.model(small.DENSE)
    with pytest.raises(ValueError, match="routing-replay.*the model has no routed experts"):
        LocalEngine(dense, dense.init(0), record_routing=True)
    with pytest.raises(ValueError, match="routing-replay: the model has no routed experts"):
        agreement.scorer(dense, dense.init(0), 2, ONE_DEVICE, torch.device("cpu"), record=True)
    with pytest.raises(ValueError, match="routing-replay engine: the rollout engine does not record experts"):
        next(experience(MODEL, MODEL.init(0), record=False))
    batch = small.batch([[4]])
    batch["routed_experts"] = others(batch)
    with pytest.raises(ValueError, match="a routing to replay, routed_experts, but the model has no experts"):
        dense.apply(dense.init(0), batch)
    batch["routed_experts"] = batch["routed_experts"][:, :, :1]
    with pytest.raises(ValueError, match=r"is \(B, S, L, K\) = \(1, 13, 1, 2\); the model has 2 layers .* 2 experts"):
        MODEL.apply(MODEL.init(0), batch)
    short = Sample([5, 6], [0.0, 0.0], "stop", [0, 0], routed_experts=np.zeros((2, 2, 2), np.uint8))
    with pytest.raises(ValueError, match="answer 1 has experts of 2 tokens, it has 3 but the last"):
        routing.column([([1], short), ([1, 2], short)])


def test_what_is_not_asked_for_is_no_column():
    assert "routed_experts" not in next(experience(MODEL, MODEL.init(0), asked=False))


def test_a_rollout_that_is_resumed_has_its_experts():
    params = MODEL.init(0)
    straight, resumed = experience(MODEL, params), experience(MODEL, params)
    straight.how = resumed.how = Plan(3, 4, steps=3, routing_replay=True)
    next(straight)
    resumed.restore(straight.state())
    assert torch.equal(next(resumed)["routed_experts"], next(straight)["routed_experts"])


@pytest.mark.parametrize("cut", [False, True])
def test_only_answers_to_a_prompt_of_the_same_experts_share_it(cut):
    """The third answer was begun by other weights. Where all are cut off, none of them is trained on."""

    def draw(prompts, seed):
        ids = [np.full((4, 2, 2), i, np.uint8) for i in (0, 0, 1)]
        reason = "length" if cut else "stop"
        return [Sample([7, 8], [-1.0, -1.0], reason, [0, 0], routed_experts=one) for one in ids]

    prompts, how = Prompts([Prompt([1, 2, 3], "", {})]), Plan(1, 3, mask_truncated=True, routing_replay=True)
    reward = lambda p, a: Scores([1.0, 2.0, 3.0], {})  # noqa: E731
    batch = next(Experience(prompts, draw, reward, lambda r, n: r, how, seq_len=12, longest=2, rows=1))
    tokens, ids = batch["tokens"][0].tolist(), batch["routed_experts"][0, :, 0, 0].tolist()
    assert tokens == ([0] * 12 if cut else [1, 2, 3, 7, 3, 7, 1, 2, 3, 7, 0, 0])
    assert ids == ([0] * 12 if cut else [0] * 6 + [1] * 4 + [0, 0])
    assert batch["routed_experts"].shape == (1, 12, 2, 2)
