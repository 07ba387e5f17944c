"""Supervised fine-tuning of Qwen3 and Qwen3-MoE on chats.

    python experiments/qwen3_moe_sft.py                                         # shipped tasks, on a laptop
    python experiments/qwen3_moe_sft.py --model.path HF_FOLDER --data.train chats.jsonl --out runs/mine
    torchrun --nproc-per-node 8 experiments/qwen3_moe_sft.py --mesh.ep 2 ...    # the same on several devices
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from the clone without installing

from functional_trainer import config
from functional_trainer.options import DataOptions, MeshOptions, ModelOptions, OptimOptions, RunOptions, within


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
    """Run folder: config.yaml, metrics.jsonl, checkpoints/, index.html, hf/."""
    balance: Literal["per_sequence", "hf", "none"] = "per_sequence"
    """Router balance loss: within each document, or pooled as in transformers (not with accumulation)."""
    balance_coefficient: float | None = None
    """Weight of the router balance loss (default: the model config's router_aux_loss_coef)."""
    answers: int | None = None
    """Held-out questions to answer greedily before and after (default: 512 of the shipped tasks, 0 of your data)."""

    def __post_init__(self):
        super().__post_init__()
        within("", self, answers=(0, ""), balance_coefficient=(0, ""))
        if self.balance == "none" and self.balance_coefficient is not None:
            raise ValueError("--balance-coefficient has no effect with --balance none; leave one of them away")


def main(o: Options) -> None:
    import models
    from experiments import recipe
    from functional_trainer import backend, exact_match, init_state, losses, make_train_step, optimizers, train

    def objective(hf: dict[str, Any]) -> losses.Loss:
        given = o.balance_coefficient
        if given is not None and not getattr(models.from_config(hf).config, "experts", 0):
            raise ValueError(f"--balance-coefficient {given} has no effect: the model has no experts; leave it away")
        return losses.sft(o.balance, hf.get("router_aux_loss_coef", 1e-3) if given is None else given)

    # Where the run lives, what it reads, what it begins with.
    answers = (0 if o.data.train else 512) if o.answers is None else o.answers
    run = recipe.start(o, answers, objective)
    model, params = run.begin()
    questions = run.questions[:answers]

    # How the objective is optimized, and the step.
    loss, optimizer = run.loss, optimizers.from_options(o.optim, run.steps, model.specs)
    form, parts = "layer" if o.compile == "auto" else o.compile, o.micro_batches(run.shard.data[1])
    how: dict[str, Any] = {"micro_batches": parts, "clip": o.optim.max_grad_norm, "compile": form, "remat": o.remat}
    how |= {"reduce": o.mesh.reduce, "offload": o.offload}
    step = make_train_step(model, loss, optimizer, shard=run.shard, **how)
    graphs = {"step": ": one graph" if parts == 1 and o.remat == "none" else ": two graphs, gradient and update"}
    devices, counts = f"{run.world} x {backend.describe(run.device)}", run.loader.pieces.stats
    run.say(f"{models.count(model):,} parameters on {devices}; data {counts}")
    run.say(f"{run.steps} steps of {o.batch} rows, {parts} micro-batches; compile {form}{graphs.get(form, '')}")
    if questions and run.world == 1 and not run.resume:
        before = exact_match.score(run.answer(model, params, questions))
        run.say(f"before training {before:.1%} of {len(questions)} held-out answers are exact")

    # Train, and hand the model back.
    def sample(params) -> list[dict[str, str]]:
        return [answer._asdict() for answer in run.answer(model, params, run.questions[: run.samples])]

    began = init_state(params, optimizer, offload="optimizer" in o.offload)
    state, finished = train(
        step, began, run.loader, model=model, loss=loss, options=o, total_steps=run.steps,
        resume=run.resume, held_out=run.held_out, sample=sample if run.samples else None, shard=run.shard,
        device=run.device,
    )  # fmt: skip
    if finished:
        run.hand_back(model, state)
        exact_match.show(run.answer(model, state.params, questions))
        run.say(f"metrics.jsonl, index.html, checkpoints/ and hf/ are in {o.out}")
    backend.leave()


if __name__ == "__main__":
    config.run(main, Options, doc=__doc__)
