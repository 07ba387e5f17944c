"""Reinforcement learning of Qwen3 and Qwen3-MoE from rewards: GRPO and its family.

    make grpo                                                        # shipped tasks, on a laptop
    python experiments/qwen3_moe_grpo.py --model.path HF_FOLDER --data.train questions.jsonl --out runs/mine
    torchrun --nproc-per-node 8 experiments/qwen3_moe_grpo.py --model.path HF_FOLDER ...

The step is that of supervised fine-tuning; its loss and where its rows come from are others.
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from the clone without installing

from functional_trainer import config
from functional_trainer.options import MeshOptions, ModelOptions, OptimOptions, RunOptions, within
from functional_trainer.rl_options import PolicyOptions, PromptOptions, RewardOptions, RolloutOptions


@dataclass(frozen=True)
class Options(RunOptions):
    model: ModelOptions = field(default_factory=ModelOptions)
    data: PromptOptions = field(default_factory=PromptOptions)
    rollout: RolloutOptions = field(default_factory=RolloutOptions)
    reward: RewardOptions = field(default_factory=RewardOptions)
    loss: PolicyOptions = field(default_factory=PolicyOptions)
    optim: OptimOptions = field(default_factory=lambda: OptimOptions(lr=1e-4, weight_decay=0.0, schedule="constant"))
    mesh: MeshOptions = field(default_factory=MeshOptions)
    steps: int = 100
    """Optimizer steps (0: what --epochs takes)."""
    batch: int = 32
    """Prompts of a rollout, over all devices."""
    micro_batch: int = 16
    """Most packed rows of a pass on each device; a step has as many passes as its answers need."""
    eval_every: int = 20
    """Steps between evaluations (0: only at the end)."""
    save_every: int = 20
    """Steps between checkpoints (0: only at the end)."""
    out: str = "runs/qwen3_moe_grpo"
    """Run folder: config.yaml, metrics.jsonl, checkpoints/, index.html, hf/."""
    answers: int | None = None
    """Held-out questions to answer greedily before, at evaluations and after (default: 512, or all there are)."""

    def __post_init__(self):
        super().__post_init__()
        within("", self, answers=(0, ""), micro_batch=(1, ""))
        if self.batch < self.rollout.steps_per_generation:
            said = f"--rollout.steps-per-generation {self.rollout.steps_per_generation}"
            raise ValueError(f"--batch {self.batch} prompts cannot be split into {said} steps")
        if self.rollout.environment and (self.data.split or self.data.type != "auto" or self.data.columns):
            raise ValueError("--data.split, --data.type and --data.columns are for conversations, not for environments")
        if self.rollout.environment and self.data.answer_tokens != PromptOptions.answer_tokens:
            raise ValueError("--data.answer-tokens has no effect with --rollout.environment: leave it away")
        if self.rollout.num_generations == 1 and self.loss.advantage not in ("remax", "reinforce_pp"):
            said = f"--loss.advantage {self.loss.advantage} compares the answers of a group"
            raise ValueError(f"--rollout.num-generations 1: {said}; use 2 or more, or remax or reinforce_pp")
        used = not self.reward.ray or self.rollout.environment and not self.rollout.environment_ray
        if self.reward.workers != RewardOptions.workers and not used:
            raise ValueError(f"--reward.workers has no effect with --reward.ray {self.reward.ray}; leave one away")
        if not self.model.path and not self.init_from:
            raise ValueError("--model.path is missing: a model with random weights gets no reward to learn from")

    def packed_rows(self, world: int) -> int:
        """Return about how many rows a step has: passes that any sets of devices share equally."""
        return self.rollout.packed_rows(self.batch, self.data.seq_len, world * self.micro_batch)

    def micro_batches(self, world: int) -> int:
        """Return some passes: a step has as many as its answers need."""
        return 2


def main(o: Options) -> None:
    from experiments import policies, questions, recipe, rl, scores
    from experiments.held_out import HeldOut
    from functional_trainer import backend, init_state, make_train_step, optimizers, train
    from functional_trainer.reference import Reference

    # Where the run lives, what it asks, what it begins with: also when it is resumed, if there is a reference.
    answers = 512 if o.answers is None else o.answers
    run = recipe.start(o, answers, lambda hf: policies.objective(o, hf), questions.read)
    model, params = run.begin(again=o.loss.beta > 0)

    # How the objective is optimized, and the step: as in supervised fine-tuning.
    steps = o.steps or rl.plan(o).total_steps(len(run.loader), o.epochs)
    optimizer = optimizers.from_options(o.optim, steps, model.specs)
    how: dict[str, Any] = {"rows": o.micro_batch, "clip": o.optim.max_grad_norm, "remat": o.remat, "offload": o.offload}
    how |= {"compile": "layer" if o.compile == "auto" else o.compile, "reduce": o.mesh.reduce}
    step = make_train_step(model, run.loss, optimizer, shard=run.shard, **how)
    if o.loss.beta and not o.loss.kl_in_reward:
        how = {"compile": how["compile"], "rows": o.micro_batch, "temperature": o.rollout.temperature}
        step = Reference.of(model, params, run.shard, **how).before(step)
    began = init_state(params, optimizer, offload="optimizer" in o.offload)

    # What it learns from: its own answers.
    reward = scores.rewards(o, run)
    rollouts = rl.experience(o, run, model, began.params, reward)
    policies.remark(o, run.say)
    if not run.resume:
        rollouts.peek()  # so that the engine is checked before anything else is done with it

    held_out = HeldOut(o, run, model, reward, answers)
    before = held_out.measure(began.params) if held_out.questions and not run.resume else {}
    if before:
        run.say(f"before training {held_out.say(before)}")
    state, finished = train(
        step, began, rollouts, model=model, loss=run.loss, options=o, total_steps=steps, resume=run.resume,
        sample=held_out.sample if run.samples else None, measure=held_out.measure if held_out.questions else None,
        before=before, shard=run.shard, device=run.device,
    )  # fmt: skip
    if finished:
        run.hand_back(model, state)
        held_out.show(state.params)
        run.say(f"metrics.jsonl, index.html, checkpoints/ and hf/ are in {o.out}")
    backend.leave()


if __name__ == "__main__":
    config.run(main, Options, doc=__doc__)
