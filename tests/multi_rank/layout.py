"""What ranks do with single tensors: placing, initializing, saving, differentiating."""

from pathlib import Path

import torch
from torch.distributed.tensor.debug import CommDebugMode

import models
from functional_trainer import checkpoint, tree
from sharding_rules import P, Rules, zero
from sharding_rules.mesh import make
from sharding_rules.sharder import Sharder
from tests.multi_rank.parity import CPU, MESHES, MOE, PADDED, Case, sharder

CONFIG = MOE | {"attention_bias": True, "mlp_only_layers": [0]}
EVEN, UNEVEN = Case(CONFIG), Case(CONFIG | {"hidden_size": 5}, rows=PADDED)
TENSORS = ("x", P("fsdp", "ep")), ("w", P(None, "ep")), ("y", P("fsdp", None)), ("scale", P(None))
TOY = Rules((*TENSORS, ("batch/columns", P("fsdp"))))


def place(shard, tensor: torch.Tensor) -> torch.Tensor:
    return shard.init_leaf("layers/0/moe/gate_up", tuple(tensor.shape), lambda part: tensor[part])


def collectives(shard, tensor: torch.Tensor) -> int:
    """Count the collectives that placing a leaf takes."""
    with CommDebugMode() as seen:
        place(shard, tensor)
    return seen.get_total_counts()


def own_parts(shard) -> bool:
    """Say whether a placed leaf is this rank's own numbers, though ranks disagree about them."""
    leaf = place(shard, torch.full((8, 2, 14, 24), float(shard.rank)))
    return bool((shard.storage(leaf) == shard.rank).all())


def collected(shard, params: dict[str, torch.Tensor]) -> bool:
    """Say whether rank 0 collects what a gather gives, and the others nothing."""
    found = {path: (shard.collect(x), shard.full(x)) for path, x in params.items()}
    return all(torch.equal(c, x) if shard.rank == 0 else c is None for c, x in found.values())


def placed(mesh: str) -> dict:
    """Initialize a model on a mesh; return its parameters whole and what placing one cost."""
    shard = sharder(Case(CONFIG), mesh)
    params = models.from_config(CONFIG).init(3, dtype=torch.float64, shard=shard)
    held = sum(shard.storage(x).numel() for x in tree.leaves(params))
    whole = {path: shard.full(x) for path, x in tree.flatten(params).items()}
    cost = collectives(shard, torch.ones(8, 2, 14, 24))
    return {
        "params": whole, "held": held, "collectives": cost, "own": own_parts(shard),
        "collected": collected(shard, tree.flatten(params)),
    }  # fmt: skip


def save(mesh: str, folder: str, case: Case = EVEN) -> None:
    """Write a checkpoint and a Hugging Face folder of the initial parameters."""
    shard = sharder(case, mesh)
    model = models.from_config(case.config)
    params = model.init(3, dtype=torch.float64, shard=shard)
    checkpoint.save(folder, 1, tree.flatten(params), {"mesh": mesh})
    models.save_pretrained(model, params, Path(folder) / "hf", shard=shard)


def load(mesh: str, folder: str, case: Case = EVEN) -> dict[str, dict[str, torch.Tensor]]:
    """Read both into differently drawn parameters on another mesh; return them whole."""
    shard = sharder(case, mesh)
    params = models.from_config(case.config).init(4, dtype=torch.float64, shard=shard)
    tensors, _ = checkpoint.load(Path(folder) / "checkpoints" / "step-1", tree.flatten(params))
    _, read = models.from_pretrained(Path(folder) / "hf", shard=shard)
    return {
        "checkpoint": {path: shard.full(x) for path, x in tensors.items()},
        "hf": {path: shard.full(x) for path, x in tree.flatten(read).items()},
    }


def toy_tensors() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    x_BI, w_OI, scale_O = (torch.randn(*s, dtype=torch.float64, generator=draw) for s in ((4, 6), (3, 6), (3,)))
    return x_BI, w_OI, scale_O


def toy(x_BI, w_OI, scale_O):
    """Return a function of a contraction over I that is linear in the contraction, so that ranks' parts add up."""
    return (x_BI @ w_OI.T) * scale_O


def derived() -> dict:
    """Differentiate `toy` on fsdp2 x ep2, rows over fsdp and I over ep; return gradients whole, as ranks have them."""
    shard = Sharder(TOY, make(MESHES["fsdp2 x ep2"], CPU, 4))
    found = {}
    for called in ("x", "w", "scale"):
        tensors = []
        for t, name in zip(toy_tensors(), ("x", "w", "scale"), strict=True):
            for dim in range(t.ndim):
                part, ways = shard.part(name, dim)
                t = t.chunk(ways, dim)[part]
            tensors.append(t.requires_grad_(name == called))
        y = shard.local(toy, ("x", "w", "scale"), ("sum:y",))(*tensors)
        (grad,) = torch.autograd.grad(shard.replicate(y.square().sum()), [t for t in tensors if t.requires_grad])
        parts: list[torch.Tensor] = [torch.empty_like(grad) for _ in range(4)]
        torch.distributed.all_gather(parts, grad.contiguous())
        found[called] = parts
    return found


def added() -> dict[str, float]:
    """Gather parameters of ones, cast to bfloat16, on dp2 x fsdp2; return the gradient of each that ranks add up.

    One rank has a gradient of 1, the others 2**-9, which bfloat16 rounds away beside 1.
    """
    rows = ("params/bucket", P(zero("fsdp"))), ("params/alone", P(zero("fsdp"), zero("dp"))), ("batch/columns", P(None))
    shard = Sharder(Rules(rows), make(MESHES["dp2 x fsdp2"], CPU, 4))
    share = 1.0 if shard.rank == 0 else 2**-9
    found = {}
    for stored in (torch.float32, torch.bfloat16):
        for name, shape in (("bucket", (2,)), ("alone", (2, 2))):
            leaf = torch.ones(shape, dtype=stored, requires_grad=True)
            (w,) = tree.leaves(shard.weights({name: leaf}, "params", torch.bfloat16))
            assert w.dtype == torch.bfloat16 and w.shape[0] == 4
            (grad,) = torch.autograd.grad((w * share).sum(), leaf)
            assert grad.dtype == stored and (grad == grad.flatten()[0]).all()
            found[f"{name}, {stored}"] = grad.flatten()[0].item()
    return found
