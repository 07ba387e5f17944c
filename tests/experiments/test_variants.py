"""Recipes that are only other defaults of qwen3_moe_grpo.py: they hold no code, and the defaults are the papers'."""

import ast
import importlib
from contextlib import nullcontext
from dataclasses import fields
from pathlib import Path

import pytest
import transformers

from experiments import policies, qwen3_moe_grpo, rl
from functional_trainer import config
from functional_trainer.rl_options import PolicyOptions, RolloutOptions
from tests.experiments import sft_runs

PAPERS = {
    "qwen3_moe_dapo": "2503.14476", "qwen3_moe_dr_grpo": "2503.20783", "qwen3_moe_gspo": "2507.18071",
    "qwen3_moe_cispo": "2506.13585",
}  # fmt: skip


def options(name: str):
    return importlib.import_module(f"experiments.{name}").Options


@pytest.mark.parametrize("name", PAPERS)
def test_it_holds_defaults_and_nothing_else(name):
    text = Path(sft_runs.RECIPE.with_stem(name)).read_text()
    assert text.count("\n") <= 40 and PAPERS[name] in ast.get_docstring(ast.parse(text))
    nodes = list(ast.walk(ast.parse(text)))
    assert not [n for n in nodes if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef | ast.For | ast.While)]
    assert sum(isinstance(n, ast.ClassDef) for n in nodes) == 1 and "main = qwen3_moe_grpo.main" in text
    theirs = {field.name for field in fields(qwen3_moe_grpo.Options)}
    assert {field.name for field in fields(options(name))} == theirs
    called = {ast.unparse(n.func) for n in nodes if isinstance(n, ast.Call)}
    assert called <= {
        "field", "dataclass", "RolloutOptions", "PolicyOptions", "config.run", "sys.path.insert", "str", "Path",
        "Path(__file__).resolve",
    }  # fmt: skip


@pytest.mark.parametrize("name", PAPERS)
def test_help_shows_its_defaults(name, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit):
        config.cli(options(name), doc=importlib.import_module(f"experiments.{name}").__doc__, argv=["--help"])
    said = " ".join(capsys.readouterr().out.split())
    loss = options(name)(**{"model": qwen3_moe_grpo.ModelOptions(path="m")}).loss.loss_type
    assert PAPERS[name] in said and f"runs/{name}" in said and f"(default: {loss})" in said


def made(name: str, **changes):
    """Return the loss's policy and the plan of a recipe's defaults."""
    o = options(name)(model=qwen3_moe_grpo.ModelOptions(path="m"), **changes)
    return policies.loss(o).weights.args[0], rl.plan(o), policies.advantage(o)


def test_defaults_are_the_papers():
    """Clipping, mean, steps per rollout, what is done to groups and lengths; none has a divergence."""
    p, plan, _ = made("qwen3_moe_dapo")  # section 4.1: 512 prompts x 16 answers, mini-batches of 512; 4,096 of 20,480
    assert (p.form, p.epsilon_low, p.epsilon_high, p.aggregate) == ("clip", 0.2, 0.28, "token_mean")
    assert (plan.group, plan.steps, plan.iterations, plan.filter_groups) == (16, 16, 1, True)
    longest, buffer = plan.overlong
    assert buffer / longest == 4096 / 20480 and p.old == "old_logprobs"
    p, plan, advantage = made("qwen3_moe_dr_grpo")
    assert (p.form, p.aggregate, p.max_length) == ("clip", "seq_mean_token_sum_norm", 32) and plan.steps == 1
    assert advantage([[0.0, 1.0, 5.0]], None).tolist() == [[-2.0, -1.0, 3.0]], "no deviation"
    p, plan, _ = made("qwen3_moe_gspo")  # section 5.1: ranges 3e-4 and 4e-4, four mini-batches of a rollout
    assert (p.form, p.epsilon_low, p.epsilon_high, plan.steps) == ("sequence", 3e-4, 4e-4, 4)
    p, plan, _ = made("qwen3_moe_cispo")  # section 3.1: no lower bound, no divergence, 16 off-policy updates
    assert p.form == "cispo" and p.bounds[0] == 0 and p.aggregate == "token_mean"
    assert (plan.steps, plan.filter_groups) == (16, True)
    assert all(made(name)[0].beta == 0 for name in PAPERS)


@pytest.mark.parametrize("advantage", ["grpo", "reinforce_pp", "reinforce_pp_baseline"])
def test_tokens_have_advantages_of_their_own_in_reinforce_pp_with_a_divergence_in_the_reward(advantage):
    given = {"advantage": advantage, "beta": 0.1, "kl": "k2"}
    p, plan, _ = made("qwen3_moe_grpo", loss=PolicyOptions(**given, kl_in_reward=True))
    assert plan.returns == (advantage == "reinforce_pp") and (plan.beta, plan.kl, p.beta) == (0.1, "k2", 0)
    p, plan, _ = made("qwen3_moe_grpo", loss=PolicyOptions(**given))
    assert not plan.returns and (plan.beta, p.beta) == (0, 0.1)


def test_the_trainers_routing_is_replayed_where_it_computes_log_probabilities_before_several_steps():
    """With LMDeploy and environments too, which record none."""
    server = {"url": ("http://a:1",), "engine": "vllm"}
    for more in ({}, server, server | {"engine": "lmdeploy"}, {"environment": "guess"}):
        rollout = RolloutOptions(routing_replay="trainer", num_iterations=2, **more)
        _, plan, _ = made("qwen3_moe_grpo", rollout=rollout, loss=PolicyOptions(old="trainer"))
        assert not plan.routing_replay, "the engine's"
        with pytest.raises(ValueError, match="--rollout.routing-replay trainer .* add --loss.old trainer"):
            made("qwen3_moe_grpo", rollout=rollout)
        none = more.get("engine") == "lmdeploy" or "environment" in more
        with pytest.raises(ValueError, match="routing-replay engine") if none else nullcontext():
            RolloutOptions(routing_replay="engine", **more)


def test_what_is_not_all_that_one_might_think_is_said():
    for name, changes, said in [
        ("qwen3_moe_grpo", {}, ""),
        ("qwen3_moe_dr_grpo", {}, ""),
        ("qwen3_moe_grpo", {"loss": PolicyOptions("dr_grpo", "rloo")}, ""),
        (
            "qwen3_moe_grpo",
            {"loss": PolicyOptions("dr_grpo")},
            "by the group's deviation; for Dr.GRPO say --loss.s",
        ),
        ("qwen3_moe_grpo", {"rollout": RolloutOptions(top_k=5)}, "--rollout.top-k 5: answers are of a part of"),
        ("qwen3_moe_grpo", {"rollout": RolloutOptions(top_p=0.9)}, "--rollout.top-p 0.9: answers are of a part of"),
        ("qwen3_moe_grpo", {"rollout": RolloutOptions(min_p=0.1)}, "--rollout.min-p 0.1: answers are of a part of"),
    ]:
        told: list[str] = []
        policies.remark(options(name)(model=qwen3_moe_grpo.ModelOptions(path="m"), **changes), told.append)
        assert len(told) == bool(said) and said in "".join(told)


def test_a_router_that_is_not_there_has_no_balance():
    o = qwen3_moe_grpo.Options(model=qwen3_moe_grpo.ModelOptions(path="m"), loss=PolicyOptions(balance=0.1))
    dense, moe = (
        transformers.AutoConfig.for_model(family, **sft_runs.SIZES, **more).to_dict()
        for family, more in (("qwen3", {}), ("qwen3_moe", sft_runs.EXPERTS))
    )
    assert policies.objective(o, moe).coefficients["balance"] == 0.1
    with pytest.raises(ValueError, match="--loss.balance 0.1 has no effect: the model has no experts"):
        policies.objective(o, dense)


@pytest.mark.slow
def test_one_of_them_trains(tmp_path):
    sft_runs.folder(tmp_path / "model")
    flags = ("--model.path", "model", "--batch", 4, "--rollout.num-generations", 4, "--micro-batch", 2, "--answers", 4)
    flags += ("--rollout.max-completion-length", 5, "--data.seq-len", 64, "--compile", "off", "--steps", 5)
    flags += ("--rollout.steps-per-generation", 4)
    sft_runs.run(tmp_path, *flags, recipe="qwen3_moe_gspo")
    rows = sft_runs.rows(tmp_path / "runs" / "qwen3_moe_gspo")
    assert [("reward" in row) for row in rows] == [True, False, False, False, True]
