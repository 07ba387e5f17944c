"""One training run, described by a `Case`, on one process or on a mesh."""

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch.distributed.tensor.debug import CommDebugMode

import models
from functional_trainer import losses, optimizers, tree
from functional_trainer.preference import running_mean
from functional_trainer.state import ema, init_state
from functional_trainer.step import make_train_step
from functional_trainer.types import ONE_DEVICE
from sharding_rules import P, Rules, padded, qwen3, qwen3_moe, zero
from sharding_rules.mesh import Mesh, make
from sharding_rules.sharder import Sharder
from tests.functional_trainer.packed import LOSSES, with_columns

ROWS, LENGTH, STEPS = 8, 12, 3
CPU = torch.device("cpu")


def ways(mesh: str) -> dict[str, int]:
    """Return the sizes of the axes of a mesh by its name."""
    return {axis[:-1]: int(axis[-1]) for axis in mesh.split(" x ")}


MESHES: dict[str, Mesh] = {}
"""By name: "fsdp2 x ep2"."""
for sizes in (
    *("dp2", "fsdp2", "ep2", "cp2", "tp2"),
    *("dp2 x fsdp2", "dp2 x ep2", "dp2 x cp2", "dp2 x tp2", "fsdp2 x ep2", "fsdp2 x cp2", "fsdp2 x tp2"),
    *("ep2 x cp2", "ep2 x tp2", "cp2 x tp2", "fsdp4", "ep4", "cp4", "tp4"),
    *("dp2 x fsdp2 x ep2", "fsdp2 x cp2 x ep2", "fsdp2 x cp2 x tp2", "ep2 x cp2 x tp2"),
):
    MESHES[sizes] = Mesh(**({"fsdp": 1} | ways(sizes)))
RULES = {"qwen3": qwen3.RULES, "qwen3_moe": qwen3_moe.RULES}
DENSE = models.PRESETS["dense-0.6b"] | {
    "hidden_size": 24, "intermediate_size": 20, "num_attention_heads": 12, "num_key_value_heads": 4, "head_dim": 6,
    "num_hidden_layers": 2, "vocab_size": 40, "attention_bias": True,
}  # fmt: skip
MOE = models.PRESETS["tiny"] | {
    "hidden_size": 24, "intermediate_size": 20, "moe_intermediate_size": 14, "num_attention_heads": 12,
    "num_key_value_heads": 4, "head_dim": 6, "num_hidden_layers": 2, "vocab_size": 40, "num_experts": 8,
    "num_experts_per_tok": 2,
}  # fmt: skip
ONE_EXPERT = {"num_experts_per_tok": 1, "norm_topk_prob": False}


@dataclass(frozen=True)
class Case:
    """What differs between runs."""

    config: dict[str, Any]
    balance: str = "per_sequence"
    options: dict[str, Any] = field(default_factory=dict)
    """Of `make_train_step`."""
    uneven: bool = False
    """One row has one label, the others many, and two rows (all that a rank of four has) are padding."""
    collapsed: bool = False
    """The router scores all experts alike, so every token goes to the same one."""
    dispatch: str | None = None
    """How tokens travel to experts."""
    rows: tuple[tuple[str, P], ...] = ()
    """Rows of the table before the others."""
    dtype: torch.dtype = torch.float64
    mixed: bool = False
    """Muon on matrices, Lion on some leaves, others frozen, and an average of the weights."""
    loss: str = ""
    """One of `LOSSES` in place of supervised fine-tuning."""

    def uncompiled(self) -> "Case":
        return replace(self, options={})


PADDED = tuple(
    (pattern, P(*(padded(*entry) if isinstance(entry, zero) else entry for entry in spec)))
    for pattern, spec in qwen3_moe.RULES.table
)
"""Dims that are stored in parts need not divide."""
SHORT, THREE = {"num_hidden_layers": 1}, {"num_hidden_layers": 3}
FULL = {"tie_word_embeddings": True, "attention_bias": True, "mlp_only_layers": [0]}
CASES = {
    "dense tied, biases": Case(DENSE),
    "dense untied, uneven, 2 micro-batches": Case(
        DENSE | {"tie_word_embeddings": False}, options={"micro_batches": 2}, uneven=True
    ),
    "moe untied, 2 micro-batches": Case(MOE, options={"micro_batches": 2}),
    "moe tied, biases, mixed layers, uneven, recomputed": Case(MOE | FULL, options={"remat": "layer"}, uneven=True),
    "moe, uneven, recomputed selectively, 2 micro-batches": Case(
        MOE, options={"remat": "selective", "micro_batches": 2}, uneven=True
    ),
    "moe, pooled balance, uneven": Case(MOE, "hf", uneven=True),
    "moe, fewer key heads than ranks, biases": Case(
        MOE | {"num_key_value_heads": 2, "attention_bias": True}, uneven=True
    ),
    "dense, one key head": Case(DENSE | {"num_key_value_heads": 1}, uneven=True),
    "moe, one expert takes all": Case(MOE | ONE_EXPERT, collapsed=True),
    "moe, one expert takes all, blocks": Case(MOE | ONE_EXPERT, collapsed=True, dispatch="static"),
    "moe, uneven, blocks, recomputed selectively": Case(
        MOE, options={"remat": "selective"}, uneven=True, dispatch="static"
    ),
    "moe, several optimizers, 2 micro-batches": Case(MOE, options={"micro_batches": 2}, mixed=True),
    "moe, padded, several optimizers": Case(MOE | {"hidden_size": 27}, rows=PADDED, mixed=True, uneven=True),
    "dense, padded, some ranks store nothing": Case(DENSE | {"hidden_size": 5}, rows=PADDED),
    "moe, policy of sequences, uneven": Case(MOE | SHORT, loss="policy of sequences", uneven=True),
    "moe, policy of tokens, 2 micro-batches": Case(MOE | SHORT, loss="policy of tokens", options={"micro_batches": 2}),
    "dense, mpo, 2 micro-batches": Case(DENSE | SHORT, loss="mpo", options={"micro_batches": 2}),
    "moe, kto, uneven": Case(MOE | SHORT, loss="kto", uneven=True),
}
WIDE = (
    (r"params/layers/\w+/moe/gate_up", P(("ep", "cp"), None, None, zero("fsdp", "tp"))),
    (r"params/layers/\w+/moe/down", P(("ep", "cp"), zero("fsdp", "tp"), None)),
)
"""Experts over two axes."""
SPLIT = (
    (r"params/layers/\w+/moe/gate_up", P("ep", None, "tp", zero("fsdp", "cp"))),
    (r"params/layers/\w+/moe/down", P("ep", zero("fsdp", "cp"), "tp")),
    (r"act/tokens", P(("dp", "fsdp", "ep"), "cp", None)),
    (r"act/token_rows", P(("dp", "fsdp", "ep"), "cp")),
)
"""Experts that tp splits, for tokens that it does not."""
MATRIX = {
    "dense": Case(DENSE, uneven=True),
    "moe": Case(MOE | FULL, uneven=True, mixed=True),
    "moe, 2 micro-batches": Case(MOE | FULL, uneven=True, options={"micro_batches": 2}),
    "moe, experts over ep and cp": Case(MOE | FULL, uneven=True, rows=WIDE),
    "moe, experts split by tp": Case(MOE | FULL | {"moe_intermediate_size": 16}, uneven=True, rows=SPLIT),
    "moe in float32": Case(MOE | FULL, uneven=True, dtype=torch.float32),
}
"""What every mesh runs, but for micro-batches where a rank has a single row."""
COMPILED = {
    "moe, layer compiled": Case(MOE | SHORT, options={"compile": "layer", "backend": "aot_eager"}, uneven=True),
    "moe, several optimizers, layer compiled": Case(
        MOE | SHORT, options={"compile": "layer", "backend": "aot_eager"}, mixed=True
    ),
    "moe, recomputed selectively, layer compiled": Case(
        MOE | THREE, options={"remat": "selective", "compile": "layer", "backend": "aot_eager"}, uneven=True
    ),
    "dense, recomputed, layer compiled, 2 micro-batches": Case(
        DENSE | THREE, options={"remat": "layer", "compile": "layer", "backend": "aot_eager", "micro_batches": 2}
    ),
    "dense, layer compiled": Case(DENSE | SHORT, options={"compile": "layer", "backend": "aot_eager"}, uneven=True),
    "moe, by Inductor": Case(MOE | SHORT, options={"compile": "layer"}, uneven=True),
    "moe, policy of sequences, step compiled": Case(
        MOE | SHORT, loss="policy of sequences", options={"compile": "step", "backend": "aot_eager"}, uneven=True
    ),
    "moe, step compiled": Case(MOE | SHORT, options={"compile": "step", "backend": "aot_eager"}, uneven=True),
    "dense, step by Inductor": Case(DENSE | SHORT, options={"compile": "step"}, uneven=True),
    "moe, blocks, step compiled": Case(
        MOE | SHORT, options={"compile": "step", "backend": "aot_eager"}, uneven=True, dispatch="static"
    ),
}


def batch(case: Case) -> dict[str, torch.Tensor]:
    """Return the columns of all rows: three documents each, the tail padding."""
    draw = torch.Generator().manual_seed(1)
    ids = torch.randint(0, case.config["vocab_size"], (ROWS, LENGTH + 1), generator=draw)
    ends = torch.tensor([5, 7, 11])
    segments = (1 + torch.searchsorted(ends, torch.arange(LENGTH), right=True)).repeat(ROWS, 1)
    segments[:, 11:] = 0
    segments[2, 7:] = 0
    weights = torch.rand(ROWS, LENGTH, generator=draw)
    if case.uneven:
        segments[4:6] = 0
        weights[0, 1:] = 0
    start = torch.tensor([0, 5, 7, 11])[segments.sub(1).clamp_min(0)]
    columns = {"tokens": ids[:, :-1], "targets": ids[:, 1:], "positions": torch.arange(LENGTH) - start}
    columns = {k: torch.where(segments == 0, 0, v) for k, v in columns.items()}
    columns |= {"segment_ids": segments, "weights": (weights * (segments != 0)).float()}
    return with_columns(columns) if case.loss else columns


def own_rows(case: Case, shard) -> dict[str, torch.Tensor]:
    """Return the rows that a rank reads."""
    part, ways = shard.data
    return {k: v.chunk(ways)[part].contiguous() for k, v in batch(case).items()}


def recording(optimizer: optimizers.Optimizer) -> optimizers.Optimizer:
    """Keep each leaf's last gradient beside its moments."""

    def init(p, group):
        return optimizer.init(p, group) | {"grad": torch.zeros_like(p)}

    def update(p, g, moments, *others):
        new_p, new = optimizer.update(p, g, {k: v for k, v in moments.items() if k != "grad"}, *others)
        return new_p, new | {"grad": g}

    return optimizer._replace(init=init, update=update)


def sharder(case: Case, mesh: str | None):
    """Return the sharder of a case on a mesh of all ranks; None is one process."""
    if mesh is None:
        return ONE_DEVICE
    grid = make(MESHES[mesh], CPU, torch.distributed.get_world_size())
    rules = Rules((*case.rows, *RULES[case.config["model_type"]].table))
    return Sharder.of(rules, grid, models.from_config(case.config).specs, case.dispatch)


def start(case: Case, shard):
    """Return the model, its step and the state before the first one."""
    model = models.from_config(case.config)
    drawn = tree.map(lambda p: replace(p, init="normal") if p.init == "zeros" else p, model.specs)  # biases
    params = replace(model, specs=drawn).init(0, dtype=case.dtype, shard=shard)
    if case.collapsed:
        for layer in params["layers"]:
            layer["moe"]["router"].zero_()
    rate = optimizers.schedule("cosine", 1e-2, 10, 2)
    optimizer = optimizers.adamw(rate)
    if case.mixed:
        muon = optimizers.muon(rate, model.specs, dtype=torch.float64)
        rules = ("embed|.*/attn/k", None), (".*/moe/router|.*/q_norm", optimizers.lion(rate))
        more = (".*/moe/.*|.*/attn/[qvo]", muon), (".*", optimizer)
        optimizer = optimizers.with_ema(optimizers.by_path(*rules, *more), 0.9)
    optimizer = recording(optimizer)
    loss = LOSSES[case.loss]() if case.loss else losses.sft(case.balance, 0.1)
    buffers = running_mean() if case.loss == "mpo" else {}
    if not case.loss and "num_experts" in case.config:  # a buffer keeps which experts were chosen
        loss = replace(loss, update=lambda buffers, sums: {"chosen": buffers["chosen"] + sums["load"].sum(0)})
        buffers = {"chosen": torch.zeros(case.config["num_experts"], dtype=torch.int64)}
    torch._dynamo.reset()
    step = make_train_step(model, loss, optimizer, shard=shard, **case.options)
    away = "optimizer" in case.options.get("offload", ())
    return model, step, init_state(params, optimizer, buffers, offload=away)


def train(case: Case, mesh: str | None = None) -> dict[str, torch.Tensor]:
    """Run `STEPS` steps; return metrics of each, gradients of the first, what the last leaves, all whole."""
    shard = sharder(case, mesh)
    _, step, state = start(case, shard)
    rows = own_rows(case, shard)
    seen = {}
    for i in range(STEPS):
        state, metrics = step(state, shard.put_batch(rows))
        seen |= {f"{i}/{k}": v.clone() for k, v in metrics.items()}
        if i == 0:
            seen |= {f"grads/{path}": shard.full(m["grad"]).clone() for path, m in state.moments.items()}
    kept = {"params": state.params} | ({"ema": ema(state)} if case.mixed else {})
    seen |= {f"buffers/{k}": v.clone() for k, v in state.buffers.items()}
    return seen | {path: shard.full(p).clone() for path, p in tree.flatten(kept).items()}


def exchanges(remat: str) -> int:
    """Count the all-to-alls of a step on ep2 whose layers are recomputed as `remat` says."""
    case, shard = Case(MOE, options={"remat": remat}), sharder(Case(MOE), "ep2")
    _, step, state = start(case, shard)
    rows = own_rows(case, shard)
    with CommDebugMode() as seen:
        step(state, shard.put_batch(rows))
    return seen.get_comm_counts()[torch.ops.c10d_functional.all_to_all_single]


def train_all(names: list[str], meshes: list[str]) -> dict[tuple[str, str], dict[str, torch.Tensor]]:
    """Run cases on meshes; an error says which."""
    done = {}
    for mesh in meshes:
        for name in names:
            try:
                done[mesh, name] = train((CASES | COMPILED | MATRIX)[name], mesh)
            except Exception as error:
                error.add_note(f"in case {name!r} on {mesh}")
                raise
    return done
