"""The claim: supervised fine-tuning, reinforcement, preferences and distillation are losses over one train step."""

import ast
from pathlib import Path

import pytest
import torch

from functional_trainer import init_state, make_train_step, optimizers, tree
from functional_trainer.losses import Loss, sft
from functional_trainer.policy import policy
from functional_trainer.preference import preference, running_mean
from functional_trainer.reference import Reference
from tests.functional_trainer.packed import with_columns
from tests.models import small
from tests.test_layering import ROOT, sources

F64 = torch.float64
MODEL = small.model(num_hidden_layers=1)
LOSSES: dict[str, Loss] = {
    "SFT": sft(),
    "GRPO": policy("grpo", old="current"),
    "DPO": preference({"dpo": 1.0}),
    "distillation": policy("reinforce", old="current", distill=1.0),
}


def columns(of: str) -> dict[str, torch.Tensor]:
    """Return packed rows with the columns of all of the losses; references and teachers are other weights."""
    batch = with_columns(small.batch([[5, 4], [6, 5], [3, 3]]))
    batch = Reference.of(MODEL, MODEL.init(1 if of == "distillation" else 0, dtype=F64))(batch)
    if of == "distillation":  # nothing has an advantage, all is the teacher's
        batch |= {"advantages": torch.zeros_like(batch["advantages"]), "distill_weights": batch["weights"]}
    return batch


def learned(of: str, before: dict, after: dict, batch: dict) -> bool:
    """Say whether weights after training do better at what a loss is for, by log-probabilities of all logits."""

    def logps(params) -> torch.Tensor:
        z_BSV = MODEL.apply(params, batch).hidden @ MODEL.unembed(params).weight.T
        return z_BSV.log_softmax(-1)

    old, new = (logps(params) for params in (before, after))
    w, at = batch["weights"], batch["targets"][..., None]
    token = lambda z: z.gather(-1, at)[..., 0] * w  # noqa: E731
    if of == "SFT":
        return bool(token(new).sum() > token(old).sum() + 1)
    if of == "GRPO":  # what was worth more is likelier
        worth = batch["advantages"]
        return bool((token(new) * worth).sum() > (token(old) * worth).sum() + 1)
    if of == "DPO":
        return bool((token(new - old) * batch["preferred"]).sum() > 1)
    gap = lambda z: ((token(z) - batch["ref_logprobs"] * w) ** 2).sum()  # noqa: E731
    return bool(gap(new) < 0.9 * gap(old))


@pytest.mark.parametrize("name", LOSSES)
def test_every_objective_is_a_loss_over_the_same_step(name):
    batch = columns(name)
    optimizer = optimizers.adamw(optimizers.schedule("constant", 1e-2, 100, 0))
    params = MODEL.init(0, dtype=F64)
    begun = tree.map(torch.clone, params)
    step = make_train_step(MODEL, LOSSES[name], optimizer, micro_batches=3)
    state = init_state(params, optimizer, running_mean())
    for _ in range(12):
        state, metrics = step(state, batch)
    assert int(state.step) == 12 and torch.isfinite(metrics["loss"]) and float(metrics["grad_norm"]) > 0
    assert learned(name, begun, state.params, batch)


# what is no part of recipes ------------------------------------------------------------------------------------------


def gradients(root: Path) -> set[str]:
    """Return the files of recipes, models and trainer that take gradients: .backward(), or autograd.grad."""
    found = set()
    for room in ("experiments", "functional_trainer", "models"):
        for path, module in sources(root, room):
            calls = [ast.unparse(node.func) for node in ast.walk(module) if isinstance(node, ast.Call)]
            if any(name.endswith((".backward", "autograd.grad")) for name in calls):
                found.add(path)
    return {path for path in found if not path.startswith(("experiments/benchmarks/", "experiments/notebooks/"))}


def test_gradients_are_taken_in_one_place(tmp_path):
    assert gradients(ROOT) == {"functional_trainer/step.py"}
    (tmp_path / "experiments").mkdir()
    (tmp_path / "experiments" / "a.py").write_text("def main():\n    loss.sum().backward()\n")
    assert gradients(tmp_path) == {"experiments/a.py"}, "a planted one is found"


def main_of(recipe: str) -> ast.FunctionDef:
    module = ast.parse((ROOT / "experiments" / f"{recipe}.py").read_text("utf-8"))
    (main,) = (node for node in module.body if isinstance(node, ast.FunctionDef) and node.name == "main")
    return main


def calls(recipe: str) -> dict[str, ast.Call]:
    return {ast.unparse(n.func): n for n in ast.walk(main_of(recipe)) if isinstance(n, ast.Call)}


DATA_LOSS_AND_ROLLOUTS = {
    "policies.objective", "policies.remark", "rl.plan", "rl.plan(o).total_steps", "scores.rewards", "rl.experience",
    "rollouts.peek", "len", "Reference.of", "Reference.of(model, params, run.shard, **how).before",
    "HeldOut", "held_out.measure", "held_out.say", "held_out.show",
}  # fmt: skip


def test_the_recipe_of_reinforcement_differs_in_data_loss_and_rollouts():
    ours, theirs = calls("qwen3_moe_grpo"), calls("qwen3_moe_sft")
    assert ours.keys() - theirs.keys() <= DATA_LOSS_AND_ROLLOUTS
    for name in ("make_train_step", "init_state", "optimizers.from_options"):
        assert name in ours and name in theirs
    same = [ast.unparse(made["make_train_step"]).replace("run.loss", "loss") for made in (ours, theirs)]
    assert same[0] == same[1], "the step is made alike"


@pytest.mark.parametrize("recipe", ["qwen3_moe_grpo", "qwen3_moe_sft", "preference"])
def test_recipes_hold_no_arithmetic_of_a_step(recipe):
    """No product, sum or difference, no tensors, no loop, nothing that updates weights."""
    nodes = list(ast.walk(main_of(recipe)))
    assert not [ast.unparse(n) for n in nodes if isinstance(n, ast.BinOp) and not isinstance(n.op, ast.BitOr)]
    assert not [ast.unparse(n) for n in nodes if isinstance(n, ast.For | ast.While)]
    names = {n.attr for n in nodes if isinstance(n, ast.Attribute)} | {n.id for n in nodes if isinstance(n, ast.Name)}
    assert not names & {"torch", "backward", "grad", "autograd", "zero_grad", "no_grad", "clip_grad_norm_", "update"}
