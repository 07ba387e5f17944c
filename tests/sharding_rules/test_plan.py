"""A plan against reality: what gloo ranks hold and send in a real step is what the plan of that step says."""

from collections import Counter
from dataclasses import asdict, replace
from functools import partial

import pytest
import torch

import kernels.linear_logprob
import models
from experiments.benchmarks.live_bytes import LiveBytes
from experiments.rules import RULES
from functional_trainer import losses, optimizers, tree
from functional_trainer.state import init_state
from functional_trainer.step import make_train_step
from sharding_rules import Sharder
from sharding_rules.mesh import Mesh, make
from sharding_rules.plan import columns, cut, kinds, observed, plan
from sharding_rules.watch import Costs, Watch
from tests.multi_rank import launch, parity

CPU = torch.device("cpu")
ROWS, LENGTH = 2, 32
DEEP = {"num_hidden_layers": 4}
CASES: dict[str, tuple[dict, dict]] = {
    "dense": (parity.DENSE | DEEP, {}),
    "dense, 2 micro-batches, recomputed": (parity.DENSE | DEEP, {"micro_batches": 2, "remat": "layer"}),
    "moe": (parity.MOE | DEEP, {}),
    "moe, recomputed selectively": (parity.MOE | DEEP | {"mlp_only_layers": [0]}, {"remat": "selective"}),
    "moe, muon": (parity.MOE | DEEP, {"muon": True}),
    "moe, fewer key heads than ranks": (parity.MOE | DEEP | {"num_key_value_heads": 2}, {"remat": "layer"}),
}
WORLDS = {2: ["dp2", "fsdp2", "ep2", "cp2", "tp2"], 4: ["fsdp2 x ep2", "cp2 x tp2", "fsdp2 x cp2"]}
MESHES = [mesh for meshes in WORLDS.values() for mesh in meshes]


def build(device, muon: bool, options: dict, model, shard):
    rate = optimizers.schedule("cosine", 1e-3, 10, 2)
    optimizer = optimizers.adamw(rate)
    if muon:
        optimizer = optimizers.by_path((".*/moe/.*", optimizers.muon(rate, model.specs)), (".*", optimizer))
    state = init_state(model.init(0, device=device, shard=shard), optimizer)
    return make_train_step(model, losses.sft(), optimizer, shard=shard, **options), state


def builder(device, options: dict):
    return partial(build, device, options.get("muon", False), {k: v for k, v in options.items() if k != "muon"})


def sizes(mesh: Mesh) -> dict[str, int]:
    return {axis: n for axis, n in asdict(mesh).items() if n > 1}


def balanced(config: dict, rows: int, length: int) -> dict[str, torch.Tensor]:
    """Return rows of one document each whose tokens take all experts in turn."""
    batch = {name: torch.ones(rows, length, dtype=x.dtype) for name, x in columns(1, 1).items()}
    batch["positions"] = torch.arange(length).expand(rows, length).contiguous()
    if config["model_type"] == "qwen3_moe":
        depth, K, E = config["num_hidden_layers"], config["num_experts_per_tok"], config["num_experts"]
        slots = torch.arange(rows * length * K).view(rows, length, 1, K) % E
        batch["routed_experts"] = slots.expand(-1, -1, depth, -1).contiguous()
    return batch


def real(config: dict, options: dict, mesh: Mesh, rows: int, length: int) -> dict:
    """Take a real step on this rank."""
    model = models.from_config(config)
    shard = Sharder.of(RULES[config["model_type"]], make(mesh, CPU, torch.distributed.get_world_size()), model.specs)
    batch, called = balanced(config, rows, length), {name: axes for axes, (name, *_) in shard.groups.items()}
    costs = observed(shard, model, builder(CPU, options), batch, Watch(length))
    step, state = builder(CPU, options)(model, shard)
    local = shard.put_batch(batch)
    with LiveBytes((tree.map(shard.storage, (state.params, state.moments)), batch)) as live:
        step(state, local)
    return {"costs": costs, "groups": called, "peak": live.peak}


def real_all(meshes: list[str], cases: list[str]) -> dict:
    return {(mesh, case): real(*CASES[case], parity.MESHES[mesh], ROWS, LENGTH) for mesh in meshes for case in cases}


def planned(case: tuple[dict, dict], mesh: Mesh, rows: int, length: int) -> Costs:
    config, options = case
    model = models.from_config(config)
    return plan(model, builder("meta", options), RULES[config["model_type"]], sizes(mesh), rows, length)


def but_memory(costs: Costs) -> Costs:
    """Return bytes at rest, collectives by kind and axes, and products."""
    return {key: n for key, n in costs.items() if n and key[0] != "memory"}


def peak(costs: Costs) -> float:
    by: Counter = Counter()
    for (what, *key), n in costs.items():
        if what == "memory":
            by[key[0]] += n
    return max(by.values())


@pytest.fixture(scope="module")
def results() -> dict:
    return {key: ran for world, meshes in WORLDS.items()
            for key, ran in launch.run(world, real_all, meshes, list(CASES)).items()}  # fmt: skip


@pytest.fixture
def host_chunks(monkeypatch):
    """Plan for as many logits at a time as the host holds."""
    monkeypatch.setattr(kernels.linear_logprob, "CHUNK_DEVICE", kernels.linear_logprob.CHUNK_HOST)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("mesh", MESHES)
def test_bytes_at_rest_and_sent_are_those_of_a_real_step(mesh, case, results):
    ours, theirs = planned(CASES[case], parity.MESHES[mesh], ROWS, LENGTH), results[mesh, case]
    assert at_rest(ours) == at_rest(theirs["costs"])
    assert sent(ours) == sent(theirs["costs"], theirs["groups"])


@pytest.mark.parametrize("case", CASES)
def test_depth_is_extrapolated_exactly(case, host_chunks):
    """Deeper models cost what running all of their layers costs."""
    config, options = CASES[case]
    mesh = parity.MESHES["fsdp2 x ep2"]
    model = models.from_config(config | {"num_hidden_layers": 7})
    costs = partial(plan, build=builder("meta", options), rules=RULES[config["model_type"]], sizes=sizes(mesh))
    few, kind = costs(model, rows=ROWS, length=LENGTH), kinds(model)
    assert [i for of in kind for i in of] == list(range(7))
