"""Supervised fine-tuning of Qwen3 and Qwen3-MoE on chats.

    python experiments/qwen3_moe_sft.py                                         # shipped tasks, on a laptop
    python experiments/qwen3_moe_sft.py --model.path HF_FOLDER --data.train chats.jsonl --out runs/mine
    torchrun --nproc-per-node 8 experiments/qwen3_moe_sft.py --mesh.ep 2 ...    # the same on several devices
"""

import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from the clone without installing

from functional_trainer import config
from functional_trainer.options import DataOptions, MeshOptions, ModelOptions, OptimOptions, RunOptions

HERE = Path(__file__).parent / "first_light"


@dataclass(frozen=True)
class Options(RunOptions):
    model: ModelOptions = field(default_factory=ModelOptions)
    data: DataOptions = field(default_factory=DataOptions)
    optim: OptimOptions = field(default_factory=OptimOptions)
    mesh: MeshOptions = field(default_factory=MeshOptions)
    steps: int = 500
    """Optimizer steps (0: what --epochs takes)."""
    batch: int = 6
    """Packed rows per optimizer step, over all devices."""
    out: str = "runs/qwen3_moe_sft"
    """Run folder: config.yaml, metrics.jsonl, checkpoints/, tensorboard/, loss.png, experts.png, hf/."""
    balance: Literal["per_sequence", "hf", "none"] = "per_sequence"
    """Router balance loss: within each document, or pooled as in transformers (not with accumulation)."""
    balance_coefficient: float | None = None
    """Weight of the router balance loss (default: the model config's router_aux_loss_coef)."""
    answers: int | None = None
    """Held-out questions to answer greedily before and after (default: 512 of the shipped tasks, 0 of your data)."""


def begin(o: Options, model, at: dict[str, Any]):
    """Return the model and its weights: read from a folder or drawn, and those of --init-from in their place."""
    import models
    from functional_trainer import checkpoint, tree

    model, params = models.from_pretrained(o.model.path, **at) if o.model.path else (model, model.init(o.seed, **at))
    if o.init_from:
        checkpoint.load(checkpoint.find(o.init_from, "--init-from"), tree.flatten({"params": params}), "params/")
    return model, params


def hand_back(o: Options, model, state, tokenizer, questions, shard) -> None:
    """Write hf/ (and hf-ema/), in the format the model came in, and show answers to held-out questions."""
    import models
    from functional_trainer import exact_match, tree
    from functional_trainer.state import ema

    for name, params in {"hf": state.params, **({"hf-ema": ema(state)} if o.optim.ema else {})}.items():
        models.save_pretrained(model, params, f"{o.out}/{name}", shard)
        if shard.rank == 0:
            tokenizer.save(f"{o.out}/{name}")
    whole = tree.map(shard.full, state.params) if questions else None
    if shard.rank == 0:
        exact_match.show(exact_match.answer(model, whole, tokenizer, questions, o.data.answer_tokens))


def main(o: Options) -> None:
    import torch

    import models
    from experiments import data
    from experiments.rules import RULES
    from functional_trainer import backend, exact_match, init_state, losses, make_train_step, optimizers, train, types
    from functional_trainer.data import Tokenizer
    from functional_trainer.loop import claim
    from sharding_rules import Sharder, mesh

    # Where things run and live, and what is read.
    device = backend.setup(o.device)
    rank, world = backend.join(device)
    say = print if rank == 0 else lambda *a: None
    grid = mesh.make(mesh.Mesh(o.mesh.fsdp, o.mesh.ep), device, world)
    resume = claim(o, main=rank == 0)
    tokenizer = Tokenizer(o.data.tokenizer or o.model.path or HERE / "tokenizer")
    hf = models.read_config(o.model.path) if o.model.path else models.preset(o.model.preset, tokenizer)
    model = models.from_config(hf)
    shard = Sharder(RULES[hf["model_type"]], grid) if grid else types.ONE_DEVICE
    loader, eval_loader, questions = data.load(o, tokenizer, model.config.vocab, rank, world)

    # The model, the objective and how it is optimized.
    compute, steps = getattr(torch, o.dtype), o.steps or loader.total_steps()
    at: dict[str, Any] = {"dtype": torch.promote_types(compute, torch.float32), "device": device, "shard": shard}
    model, params = begin(o, model, at)
    model = replace(model, dtype=compute)
    a, coefficient = o.optim, o.balance_coefficient
    optimizer = optimizers.from_options(a, steps, model.specs)
    loss = losses.sft(o.balance, hf.get("router_aux_loss_coef", 1e-3) if coefficient is None else coefficient)
    form, parts = "layer" if o.compile == "auto" else o.compile, o.micro_batches(world)
    how: dict[str, Any] = {"shard": shard, "micro_batches": parts, "clip": a.max_grad_norm, "compile": form}
    step = make_train_step(model, loss, optimizer, remat=o.remat, **how)
    graphs = {"step": ": one graph" if parts == 1 and o.remat == "none" else ": two graphs, gradient and update"}
    say(f"{models.count(model):,} parameters on {world} x {backend.describe(device)}; data {loader.pieces.stats}")
    say(f"{steps} steps of {o.batch} rows, {parts} micro-batches; compile {form}{graphs.get(form, '')}")
    if questions and not grid:
        before = exact_match.score(exact_match.answer(model, params, tokenizer, questions, o.data.answer_tokens))
        say(f"before training {before:.1%} of {len(questions)} held-out answers are exact")

    # Train.
    run: dict[str, Any] = {"model": model, "loss": loss, "options": o, "total_steps": steps, "resume": resume}
    run |= {"eval_loader": eval_loader, "shard": shard, "device": device}
    state, finished = train(step, init_state(params, optimizer), loader, **run)
    if finished:
        hand_back(o, model, state, tokenizer, questions, shard)
        say(f"metrics.jsonl, loss.png, checkpoints/ and hf/ are in {o.out}")
    backend.leave()


if __name__ == "__main__":
    config.run(main, Options, doc=__doc__)
