"""Supervised fine-tuning of Qwen3 and Qwen3-MoE on chats.

python experiments/qwen3_moe_sft.py                                         # shipped tasks, from random, on a laptop
python experiments/qwen3_moe_sft.py --model.path HF_FOLDER --data.train chats.jsonl --out runs/mine
torchrun --nproc-per-node 8 experiments/qwen3_moe_sft.py --mesh.ep 2 ...    # the same on several devices
"""

import sys
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Literal

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
    """Run folder: config.yaml, metrics.jsonl, checkpoints/, tensorboard/, loss.png, hf/."""
    balance: Literal["per_sequence", "hf", "none"] = "per_sequence"
    """Router balance loss: within each document, or pooled as in transformers (not with accumulation)."""
    balance_coefficient: float | None = None
    """Weight of the router balance loss (default: the model config's router_aux_loss_coef)."""
    answers: int | None = None
    """Held-out questions to answer greedily before and after (default: 512 of the shipped tasks, 0 of your data)."""


def main(o: Options) -> None:
    import torch

    import models
    from experiments.first_light import tasks
    from experiments.rules import RULES
    from functional_trainer import backend, exact_match, losses, optimizers, types
    from functional_trainer.data import Loader, Tokenizer, read, records
    from functional_trainer.loop import claim, train
    from functional_trainer.state import init_state
    from functional_trainer.step import make_train_step
    from sharding_rules import Sharder, mesh

    # Where things run and live.
    device = backend.setup(o.device)
    rank, world = backend.join(device)
    resume = claim(o, main=rank == 0)
    say = print if rank == 0 else lambda *a: None
    grid = mesh.make(mesh.Mesh(o.mesh.fsdp, o.mesh.ep), device, world)

    # Data: chats to tokens and loss mask, to packed rows.
    shipped = not o.data.train
    tokenizer = Tokenizer(o.data.tokenizer or o.model.path or HERE / "tokenizer")
    if shipped and rank == 0:
        tasks.write(Path(o.out) / "data", seed=o.seed)
    backend.barrier()
    paths = ((f"{o.out}/data/train.jsonl",), (f"{o.out}/data/eval.jsonl",)) if shipped else (o.data.train, o.data.eval)
    hf = models.read_config(o.model.path) if o.model.path else models.preset(o.model.preset, tokenizer)
    model = models.from_config(hf)
    documents = [read(p, tokenizer, model.config.vocab) for p in paths if p]
    d = o.data
    pack = partial(Loader, rows=o.batch, seq_len=d.seq_len, packing=d.packing, overlong=d.overlong, rank=rank)
    pack = partial(pack, world=world)
    loader = pack(documents[0], seed=o.seed, epochs=None if o.steps else o.epochs)
    eval_loader = pack(documents[1], shuffle=False, epochs=1) if len(documents) > 1 else None
    steps = o.steps or loader.total_steps()

    # The model, the objective and how it is optimized.
    masters = torch.promote_types(getattr(torch, o.dtype), torch.float32)
    shard = Sharder(RULES[hf["model_type"]], grid) if grid else types.ONE_DEVICE
    if o.model.path:
        model, params = models.from_pretrained(o.model.path, dtype=masters, device=device, shard=shard)
    else:
        params = model.init(o.seed, dtype=masters, device=device, shard=shard)
    model = replace(model, dtype=getattr(torch, o.dtype))
    a = o.optim
    lr = optimizers.schedule(a.schedule, a.lr, steps, round(a.warmup * steps), a.floor, a.decay)
    adamw = optimizers.adamw(lr, a.betas, a.eps, a.weight_decay, a.no_decay)
    coefficient = hf.get("router_aux_loss_coef", 0.001) if o.balance_coefficient is None else o.balance_coefficient
    loss = losses.sft(o.balance, coefficient)
    compile = ("layer" if len(model.config.windows) > 8 else "step") if o.compile == "auto" else o.compile
    parts = o.micro_batches(world)
    step = make_train_step(
        model, loss, adamw, shard=shard, micro_batches=parts, clip=a.max_grad_norm, compile=compile, remat=o.remat
    )
    say(f"{models.count(model):,} parameters on {world} x {backend.describe(device)}; {loader.stats}")
    graphs = "one graph" if parts == 1 and o.remat == "none" else "two graphs, gradient and update"
    say(f"{steps} steps of {o.batch} rows, {parts} micro-batches; compile {compile}", graphs * (compile == "step"))

    # Train, then hand the model back in the format it came in.
    count = o.answers if o.answers is not None else 512 * shipped
    questions = list(records(paths[1]))[:count] if count else []
    if questions and rank == 0 and not grid:
        before = exact_match.score(exact_match.answer(model, params, tokenizer, questions, 16))
        say(f"before training {before:.1%} of {len(questions)} held-out answers are exact")
    state, finished = train(
        step, init_state(params, adamw), loader, model=model, loss=loss, options=o, total_steps=steps, resume=resume,
        eval_loader=eval_loader, shard=shard, device=device,
    )  # fmt: skip
    if finished:
        models.save_pretrained(model, state.params, Path(o.out) / "hf", shard)
        whole = types.tree.map(shard.full, state.params) if questions else None
        if rank == 0:
            tokenizer.save(Path(o.out) / "hf")
            if questions:
                exact_match.show(exact_match.answer(model, whole, tokenizer, questions, 16))
        say(f"metrics.jsonl, loss.png, checkpoints/ and hf/ are in {o.out}")
    backend.leave()


if __name__ == "__main__":
    config.run(main, Options, doc=__doc__)
