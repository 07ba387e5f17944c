"""Learning from preferences with Qwen3 and Qwen3-MoE: DPO, cDPO, IPO, BCO, MPO and KTO.

    python experiments/preference.py                                        # shipped tasks, on a laptop
    python experiments/preference.py --model.path HF_FOLDER --data.train pairs.jsonl --loss-type mpo --out runs/mine
    torchrun --nproc-per-node 8 experiments/preference.py --mesh.ep 2 ...   # the same on several devices

The step is that of supervised fine-tuning; its loss and its rows are others.
"""

import sys
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from the clone without installing

from functional_trainer import config
from functional_trainer.options import DataOptions, MeshOptions, ModelOptions, OptimOptions, within
from functional_trainer.rl_options import PreferenceOptions


@dataclass(frozen=True)
class Options(PreferenceOptions):
    model: ModelOptions = field(default_factory=ModelOptions)
    data: DataOptions = field(default_factory=lambda: DataOptions(overlong="drop"))
    optim: OptimOptions = field(default_factory=lambda: OptimOptions(lr=1e-3))
    mesh: MeshOptions = field(default_factory=MeshOptions)
    steps: int = 200
    """Optimizer steps (0: what --epochs takes)."""
    batch: int = 8
    """Packed rows per optimizer step, over all devices; the answers of a pair are in one row."""
    save_every: int = 20
    """Steps between checkpoints (0: only at the end)."""
    out: str = "runs/preference"
    """Run folder: config.yaml, metrics.jsonl, checkpoints/, index.html, hf/."""
    answers: int = 0
    """Held-out questions to answer greedily after training, compared with the answer that is preferred."""

    def __post_init__(self):
        super().__post_init__()
        within("", self, answers=(0, ""))


def objective(o: Options, hf: dict[str, Any]) -> Any:
    """Return the loss for a model of this config.json."""
    import models
    from functional_trainer.data.columns import refuse_cut
    from functional_trainer.preference import from_options

    given = o.balance_coefficient
    if given is not None and not getattr(models.from_config(hf).config, "experts", 0):
        raise ValueError(f"--balance-coefficient {given} has no effect: the model has no experts; leave it away")
    loss = from_options(o, hf.get("router_aux_loss_coef", 1e-3) if given is None else given)
    refuse_cut(loss, o.data.overlong)
    return loss


def main(o: Options) -> None:
    import models
    from experiments import data, recipe
    from functional_trainer import backend, exact_match, init_state, make_train_step, optimizers, train
    from functional_trainer.preference import running_mean
    from functional_trainer.reference import Reference

    # Where the run lives, what it reads, what it begins with: also when it is resumed, for the reference.
    read = partial(data.load, form="answers" if "kto" in o.terms else "pairs")
    run = recipe.start(o, o.answers, partial(objective, o), read)
    model, params = run.begin(again=True)

    # How the objective is optimized, and the step.
    loss, optimizer = run.loss, optimizers.from_options(o.optim, run.steps, model.specs)
    form, parts = "layer" if o.compile == "auto" else o.compile, o.micro_batches(run.shard.data[1])
    how: dict[str, Any] = {"micro_batches": parts, "clip": o.optim.max_grad_norm, "compile": form, "remat": o.remat}
    how |= {"reduce": o.mesh.reduce, "offload": o.offload}
    step = make_train_step(model, loss, optimizer, shard=run.shard, **how)
    devices, counts = f"{run.world} x {backend.describe(run.device)}", run.loader.pieces.stats
    run.say(f"{models.count(model):,} parameters on {devices}; data {counts}")
    run.say(f"{run.steps} steps of {o.batch} rows, {parts} micro-batches; compile {form}; reference {o.reference}")

    # The reference: beside every step, or once before the first.
    reference = Reference.of(model, params, run.shard, compile=form, micro_batches=parts)
    if o.reference == "live":
        step, loss = reference.before(step), reference.within(loss)
    else:
        reference.keep(params, [run.loader, *run.held_out.values()], o.data.cache, run.device, run.say)
    del reference

    # Train, and hand the model back.
    def sample(params) -> list[dict[str, str]]:
        return [answer._asdict() for answer in run.answer(model, params, run.questions[: run.samples])]

    buffers = running_mean(run.device) if "bco" in o.terms else {}
    state, finished = train(
        step, init_state(params, optimizer, buffers, offload="optimizer" in o.offload), run.loader, model=model,
        loss=loss, options=o, total_steps=run.steps, resume=run.resume, held_out=run.held_out,
        sample=sample if run.samples else None, shard=run.shard, device=run.device,
    )  # fmt: skip
    if finished:
        run.hand_back(model, state)
        exact_match.show(run.answer(model, state.params, run.questions[: o.answers]))
        run.say(f"metrics.jsonl, index.html, checkpoints/ and hf/ are in {o.out}")
    backend.leave()


if __name__ == "__main__":
    config.run(main, Options, doc=__doc__)
