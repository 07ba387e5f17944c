"""The recipe of reinforcement learning as users run it: what it says, resuming, several processes."""

import ast
import importlib
import json
import math
import shutil
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import transformers

import models
from experiments import engines, questions, qwen3_moe_grpo, scores
from functional_trainer import checkpoint, tree
from functional_trainer.data import Tokenizer
from functional_trainer.engines import Sample
from functional_trainer.engines.local import LocalEngine
from functional_trainer.rollouts import Prompt, Prompts
from functional_trainer.types import ONE_DEVICE, OneDevice
from tests.experiments import sft_runs
from tests.models import small

RECIPE = sft_runs.RECIPE.with_stem("qwen3_moe_grpo")
FLAGS = (
    *("--batch", 4, "--rollout.num-generations", 4, "--rollout.max-completion-length", 5, "--micro-batch", 2),
    *("--data.seq-len", 64, "--answers", 6, "--compile", "off", "--eval-every", 2),
)


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("grpo")
    sft_runs.folder(place / "model")
    return place


def run(place: Path, *flags, status: int = 0) -> str:
    return sft_runs.run(place, "--model.path", "model", *FLAGS, *flags, recipe=RECIPE.stem, status=status)


def test_a_short_run_says_what_happened(place):
    said = run(place, "--steps", 3, "--out", "short")
    assert "20,000 questions" in said and "before training 0.0% of 6 answers are right" in said
    assert said.count("log-probabilities as sampled and as trained differ by") == 1
    rows = sft_runs.rows(place / "short")
    for row in rows:
        assert row["reward"] == 0 and row["frac_reward_zero_std"] == 1 and row["pg_loss"] == row["loss"] == 0
        assert row["ratio/mean"] == 1 and row["clip_ratio/region"] == 0
        assert 0 < row["sampling_logp_difference/mean"] < 1e-5 and row["entropy"] > 1
        assert row["ratio/min"] == row["ratio/max"] == 1 and 0.999 < row["rollout_corr/eff_sample_size"] < 1 + 1e-9
        assert row["sampling_logp_difference/mean"] < row["sampling_logp_difference/max"] < 1e-4
        assert 1 <= row["completions"]["mean_length"] <= 5 and row["rollout_s"] > row["timing_s"]["gen"] > 0
        assert row["generated_tokens_per_s"] > 1 and row["prompts"]["mean_length"] > 1 and row["reward_best"] == 0
    assert [("accuracy" in row) for row in rows] == [False, True, True]
    assert all(row["eval_reward"] == row["eval_rewards/exact/mean"] == row["accuracy"] for row in rows[1:])
    zeros = dict.fromkeys(("accuracy", "eval_reward", "eval_rewards/exact/mean"), 0.0)
    assert [row.get("before") for row in rows] == [zeros, None, None]
    out = place / "short"
    assert (out / "reward.png").stat().st_size > 1000 and "reward.png" in (out / "index.html").read_text()
    shown = [json.loads(line) for line in (out / "completions.jsonl").read_text().splitlines()]
    assert [row["step"] for row in shown] == [1] * 16 + [2] * 16 + [3] * 16
    names = ["step", "prompt", "answer", "completion", "rewards/exact", "reward", "advantage", "tokens"]
    assert all(list(row) == [*names, "finish_reason"] and row["reward"] == row["rewards/exact"] == 0 for row in shown)
    assert len({row["prompt"] for row in shown[:4]}) == 1 and shown[-1]["prompt"] in (out / "index.html").read_text()
    assert transformers.AutoModelForCausalLM.from_pretrained(out / "hf").num_parameters() > 0


def test_a_run_that_goes_on_within_a_rollout_ends_the_same(place):
    several = ("--steps", 5, "--rollout.steps-per-generation", 2, "--rollout.num-iterations", 2)
    several += ("--loss.loss-type", "grpo", "--loss.old", "trainer", "--loss.correction", "token_truncate")
    several += ("--rollout.routing-replay", "trainer", "--rollout.log-every", 2)
    several += ("--loss.off-policy-mask-threshold", 0.1)
    run(place, *several, "--save-every", 1, "--keep", 5, "--out", "straight")
    said = run(place, *several, "--resume", "straight/checkpoints/step-3", "--out", "resumed")
    assert said.count("log-probabilities as sampled and as trained differ by") == 1, "of the next rollout"
    sft_runs.same_state(place / "straight", place / "resumed")
    assert sft_runs.learned(place / "straight")[3:] == sft_runs.learned(place / "resumed")
    assert [sft_runs.rows(place / "straight")[i]["ratio/max"] == 1 for i in (0, 4)] == [True, True]


@pytest.mark.slow
def test_a_run_that_goes_on_needs_what_it_began_with_for_a_reference_only(place):
    params = models.from_pretrained(place / "model")[1]
    checkpoint.save(place / "begun", 1, tree.flatten({"params": params}), {})
    flags = "--init-from", "begun", "--save-every", 1, "--keep", 3
    for out, more in (("alone", ()), ("beside", ("--loss.beta", 0.1))):
        run(place, "--steps", 2, *flags, *more, "--out", out)
        shutil.rmtree(place / out / "checkpoints" / "step-2")
    shutil.rmtree(place / "begun")
    assert "resumed from" in run(place, "--steps", 2, *flags, "--out", "alone")
    said = run(place, "--steps", 2, *flags, "--loss.beta", 0.1, "--out", "beside", status=1)
    assert "--init-from begun: no checkpoint there" in said


@pytest.mark.parametrize(
    ("flags", "status", "message"),
    [
        (("--rollout.steps-per-generation", 5), 2, "--batch 4 prompts cannot be split into"),
        (("--rollout.max-disagreement", 0), 1, "the rollout engine and the trainer disagree"),
        (("--loss.correction", "token_mask", "--rollout.num-iterations", 2), 1, "add --loss.old trainer"),
        (("--loss.old", "trainer"), 1, "--loss.old trainer has no effect with one step per rollout"),
        (("--loss.advantage", "rloo", "--loss.scale-rewards", "none"), 2, "has no effect with"),
        (("--loss.correction-range", 0.5, 2), 2, "--loss.correction-range has no effect without"),
        (("--reward.functions", "exact", "no.py:f", "--data.train", "x"), 1, "--reward.functions no.py: No such file"),
    ],
)
def test_what_does_not_go_together_is_refused(place, tmp_path, flags, status, message):
    said = run(place, "--steps", 2, "--out", tmp_path / "run", *flags, status=status)
    assert message in said and "Traceback" not in said


MINE = """
def deaf(answers, **columns): return [0.0 for _ in answers]
def few(completions): return [0.0 for _ in completions]
def level(completions, level, **columns): return [float(x or 0) for x in level]
"""
CHAT = [{"role": "user", "content": "Add 3 to 4."}, {"role": "assistant", "content": "7"}]


VLLM = {"engine": "vllm", "url": ("http://a:1",)}
SECTIONS = {
    "data": qwen3_moe_grpo.PromptOptions, "rollout": qwen3_moe_grpo.RolloutOptions,
    "reward": qwen3_moe_grpo.RewardOptions, "loss": qwen3_moe_grpo.PolicyOptions,
}  # fmt: skip


def made(**sections: dict) -> qwen3_moe_grpo.Options:
    """Return options of which these are not the defaults."""
    given = {name: SECTIONS[name](**options) for name, options in sections.items()}
    return qwen3_moe_grpo.Options(model=qwen3_moe_grpo.ModelOptions(path="m"), **given)


def read(
    *functions: str, environment: str = "", files=("rows.jsonl",), at=sft_runs.TOKENIZER, rank=0, say=print, data=None,
    count=0, reward=None, **options,
):  # fmt: skip
    """Read what a run asks, from rows.jsonl."""
    o = qwen3_moe_grpo.Options(
        model=qwen3_moe_grpo.ModelOptions(path="m"), data=qwen3_moe_grpo.PromptOptions(train=files, **(data or {})),
        reward=qwen3_moe_grpo.RewardOptions(functions, **(reward or {})),
        rollout=qwen3_moe_grpo.RolloutOptions(environment=environment), **options,
    )  # fmt: skip
    shard = OneDevice()
    shard.rank = rank
    return questions.read(o, Tokenizer(at), 384, shard, count, say)


def test_what_can_give_no_reward_is_refused_before_the_model_is_there(tmp_path, monkeypatch):
    """Whatever the columns are it is before data are read too; a column may be in some rows only."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(MINE)
    for functions, how, said in [
        (["none.py:f"], {}, "none.py: No such file"),
        (["mine.py:none"], {}, "mine.py defines no function none"),
        (["mine.py:few"], {}, "few cannot be called with prompts, completions, .* unexpected .* argument 'prompts'"),
        (["exact", "exact"], {}, "--reward.functions exact exact: two have the same name"),
        (["exact"], {"reward": {"isolate": ("maths",)}}, r"--reward.isolate names \['maths'\]; .* are \['exact'\]"),
        (["exact"], {"reward": {"ray": 2}}, "--reward.ray 2: .* none of exact is one; name some with --reward.isolate"),
        (
            ["mine.py:few", "exact"],
            {"reward": {"messages": ("exact",)}},
            r"--reward.messages names \['exact'\]; .* \['few'\]",
        ),
        (
            ["code"],
            {"reward": {"ray": 2}, "files": ("nowhere.jsonl",)},
            "nowhere.jsonl: no such file",
        ),  # and no cluster is begun
        ([], {"environment": "env.py:None"}, "--rollout.environment env.py: No such file"),
    ]:
        with pytest.raises(ValueError, match=said):
            read(*functions, **how)
    assert not importlib.import_module("ray").is_initialized()
    both = [{"messages": CHAT}, {"messages": CHAT, "level": 2}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in both))
    assert len(read("mine.py:level")[0]) == 2
    with pytest.raises(ValueError, match="deaf cannot be called with .*, level, .*: missing a required .*'answers'"):
        read("mine.py:deaf")
    (tmp_path / "mine.py").write_text(MINE.replace("answers", "completions"))
    assert len(read("mine.py:deaf")[0]) == 2, "a file is read again by the next run in this process"
    assert len(read("none.py:f", rank=1)[0]) == 2, "only rank 0 calls functions, so others load none"


def test_prompts_that_do_not_fit_are_refused_or_dropped_before_the_model_is_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    texts = ["Add 3 to 4.", "Add " * 300, "Sort B."]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"prompt": x, "answer": "7"}) + "\n" for x in texts))
    many = len(Tokenizer(sft_runs.TOKENIZER).prompt([{"role": "user", "content": texts[1]}]))
    said = rf"1 of 3 prompts .* rows of 256 with an answer of 32: first rows.jsonl:2, which has {many} tokens; "
    with pytest.raises(ValueError, match=f"{said}.* --data.seq-len to {many + 31}, .*completion-length, .* drop"):
        read("exact")
    told: list[str] = []
    found, _, held_out = read(data={"overlong": "drop", "eval": ("rows.jsonl",)}, say=told.append, count=9)
    assert [p.text for p in found] == [p.text for p in held_out] == ["Add 3 to 4.", "Sort B."]
    assert [text.endswith("they are dropped") for text in told] == [False, True, True] and "1 of 3 held-out" in told[2]
    assert len(read(data={"seq_len": many + 31})[0]) == 3
    with pytest.raises(ValueError, match="no prompts to answer"):
        read(data={"seq_len": 32, "overlong": "drop"})


def test_what_a_run_would_fail_by_later_is_refused_before_the_model_is_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = {"rows": {"messages": CHAT}, "taken": {"messages": CHAT, "completion_ids": [1]}}
    for name, row in rows.items():
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(ValueError, match="data have a column 'completion_ids', which .* of the rollout: rename it"):
        read(files=("taken.jsonl",))
    for how in ({}, {"data": {"eval": ("rows.jsonl",)}, "answers": 0, "count": 4}):
        with pytest.raises(ValueError, match="--keep-best is of the highest reward of held-out questions: give"):
            read(keep_best=True, **how)
    assert len(read(keep_best=True, data={"eval": ("rows.jsonl",)}, count=1)[2]) == 1
    config = json.loads((sft_runs.TOKENIZER / "tokenizer_config.json").read_text())
    config |= {"eos_token": None, "chat_template": config["chat_template"].replace("{{- '<|end|>' }}", "")}
    (tmp_path / "endless").mkdir()
    shutil.copy(sft_runs.TOKENIZER / "tokenizer.json", "endless")
    (tmp_path / "endless" / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="endless: there is no token that ends an answer, .*: set eos_token in "):
        read(at=tmp_path / "endless")


ALONE = """
import time
busy = []
def f(completions, **columns):
    assert not busy
    busy.append(1)
    time.sleep(0.05)
    return [float(busy.pop()) for _ in completions]
"""


def test_functions_are_not_called_for_rollouts_and_held_out_answers_at_once(tmp_path):
    (tmp_path / "mine.py").write_text(ALONE)
    reward = qwen3_moe_grpo.RewardOptions((f"{tmp_path}/mine.py:f",))
    o = SimpleNamespace(reward=reward, rollout=SimpleNamespace(environment=""))
    run = SimpleNamespace(shard=OneDevice(), loader=Prompts(), tokenizer=SimpleNamespace(decode=str), say=print)
    score, answer = scores.rewards(o, run), ([Prompt([1], "q", {})], [Sample([1], [-0.1], "stop", [0])])
    with ThreadPoolExecutor(4) as threads:
        assert [one.result().rewards for one in [threads.submit(score, *answer) for _ in range(4)]] == [[1.0]] * 4


FAILING = """
def broken(completions, **columns): raise KeyError("gone")
def hard(completions, **columns): return [1 / int(c) for c in completions]
def silent(completions, **columns): return [None for _ in completions]
"""


def scoring(folder: Path, *functions: str):
    """Return what scores answers by functions of FAILING, and what it says."""
    (folder / "failing.py").write_text(FAILING)
    named = tuple(f"{folder}/failing.py:{name}" for name in functions)
    said: list[str] = []
    tokenizer = SimpleNamespace(decode=lambda ids: str(ids[0]))
    run = SimpleNamespace(shard=ONE_DEVICE, loader=Prompts(), tokenizer=tokenizer, say=said.append)
    score = scores.rewards(SimpleNamespace(reward=qwen3_moe_grpo.RewardOptions(named)), run)
    return lambda *ids: score([Prompt([1], "q", {})] * len(ids), [Sample([i], [-0.1], "stop", [0]) for i in ids]), said


def test_functions_that_fail_are_told_of_once(tmp_path):
    score, said = scoring(tmp_path, "hard", "broken", "silent")
    for _ in range(2):
        assert score(1, 0, 2, 0).rewards == [1.0, None, 0.5, None]
    assert said == [
        "reward function hard failed on 2 of 4 answers, the first time: raised: ZeroDivisionError: division by zero",
        "reward function broken failed on 4 of 4 answers, the first time: raised: KeyError: 'gone'",
    ]
    for _ in range(2):
        assert score(0, 0).rewards == [None, None], "not the first rollout"
    assert said[2:] == ["none of 2 answers has a reward: nothing is learned from them"]


def test_a_run_that_can_learn_nothing_ends_at_its_first_rollout(tmp_path):
    score, _ = scoring(tmp_path, "hard", "broken")
    with pytest.raises(ValueError, match="nothing can be learned, none of the first 2 answers .* hard .*broken .*gone"):
        score(0, 0)
    score, said = scoring(tmp_path, "broken", "silent")  # who says None says that this is as it should be
    assert score(0, 0).rewards == [None, None] and len(said) == 2


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"rollout": {"environment": "guess", "tool_seconds": 0.0}}, "--rollout.tool-seconds is 0.0; it must be above"),
        ({"rollout": {"temperature": float("inf")}}, "--rollout.temperature inf .* must be above 0, and finite"),
        ({"reward": {"seconds": 0.0}}, "--reward.seconds is 0.0; it must be above 0"),
        ({"reward": {"ray": 2, "workers": 9}}, "--reward.workers has no effect with --reward.ray 2; leave one away"),
        (
            {"reward": {"ray": 2, "workers": 9}, "rollout": {"environment": "guess", "environment_ray": 1}},
            "--reward.workers has no effect",
        ),
        ({"reward": {"ray": 2, "workers": 9}, "rollout": {"environment": "guess"}}, ""),  # for tools
        ({"reward": {"functions": ("exact",), "weights": (math.nan,)}}, "--reward.weights has nan; each must be a fin"),
        ({"reward": {"functions": ("exact",), "weights": (-math.inf,)}}, "--reward.weights has -inf; each must be"),
        ({"rollout": {"log_every": 5, "log_completions": 0}}, "--rollout.log-every has no effect with"),
        ({"rollout": {"environment": "guess"}, "data": {"answer_tokens": 9}}, "--data.answer-tokens has no effect"),
        ({"rollout": {"min_p": 1.0}}, "--rollout.min-p is 1.0; it must be at least 0 and below 1"),
        ({"rollout": {**VLLM, "min_p": 0.1, "temperature": 2.0}}, "than 1 there is no top-k, top-p and min-p"),
        ({"rollout": {**VLLM, "min_p": 0.1}}, ""),
        ({"rollout": {"num_generations": 1}}, "--rollout.num-generations 1: --loss.advantage grpo compares"),
        ({"rollout": {"num_generations": 1}, "loss": {"advantage": "rloo"}}, "use 2 or more, or remax or reinforce_pp"),
        ({"rollout": {"num_generations": 1}, "loss": {"advantage": "remax"}}, ""),
        ({"rollout": {"num_generations": 1}, "loss": {"advantage": "reinforce_pp"}}, ""),
        ({"rollout": {"num_generations": 1, "filter_groups": True}}, "--rollout.num-generations must be at least 2"),
        ({"rollout": {"num_generations": 0}}, "--rollout.num-generations is 0; it must be at least 1"),
    ],
)
def test_options_that_make_no_sense_are_refused(options, said):
    with pytest.raises(ValueError, match=said) if said else nullcontext():
        made(**options)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"reward": {"seconds": 3.0}}, "--reward.seconds has no effect: none of exact is isolated; name some with"),
        ({"reward": {"workers": 7}}, "--reward.workers has no effect: none of exact is isolated"),
        ({"reward": {"workers": 7}, "rollout": {"environment": "guess"}}, ""),  # for tools
        ({"reward": {"seconds": 3.0}, "rollout": {"environment": "guess"}}, "none of the functions is isolated"),
        (
            {"reward": {"workers": 7}, "rollout": {"environment": "guess", "environment_ray": 1}},
            "--reward.workers has no effect",
        ),
        ({"reward": {"seconds": 3.0, "workers": 7, "functions": ("exact", "code")}}, ""),
        ({"reward": {"seconds": 3.0, "workers": 7, "isolate": ("exact",)}}, ""),
        ({}, ""),
    ],
)
def test_what_only_isolated_functions_use_is_refused_without_any(options, said):
    o = made(**options)
    with pytest.raises(ValueError, match=said) if said else nullcontext():
        scores.refuse_options(o, scores.functions(o))


def test_which_tokens_may_be_sampled_reaches_the_engine():
    model = small.model(small.DENSE)
    engine, prompts = LocalEngine(model, model.init(0), length=5), [Prompt([i], "q", {}) for i in range(9)]
    run = SimpleNamespace(shard=ONE_DEVICE, tokenizer=SimpleNamespace(eos_ids=[5]))

    def tokens(greedy=False, **rollout):
        draw = engines.drawn_by(engine, made(rollout={"max_completion_length": 4} | rollout), run, None)
        return [sample.tokens for sample in draw(prompts, 0, greedy=greedy)]

    likeliest = tokens(greedy=True)
    assert tokens(top_k=1) == tokens(top_p=1e-6) == tokens(min_p=0.999) == likeliest != tokens()


def test_experts_of_a_dense_model_cannot_be_replayed(place):
    sft_runs.folder(place / "dense", "qwen3")
    flags = ("--model.path", "dense", *FLAGS, "--steps", 1, "--out", "refused", "--rollout.routing-replay", "engine")
    said = sft_runs.run(place, *flags, recipe=RECIPE.stem, status=1)
    assert "--rollout.routing-replay: the model has no routed experts, leave it away" in " ".join(said.split())
    assert "Traceback" not in said


def test_the_recipe_holds_no_code_of_a_training_step():
    """It differs from supervised fine-tuning in data, loss and rollouts; the step is the same function."""
    names = {node.attr for node in ast.walk(ast.parse(RECIPE.read_text())) if isinstance(node, ast.Attribute)}
    called = {node.id for node in ast.walk(ast.parse(RECIPE.read_text())) if isinstance(node, ast.Name)}
    assert "make_train_step" in called and "train" in called and "torch" not in called
    assert not names & {"backward", "grad", "zero_grad", "autograd", "update", "clip_grad_norm_"}


@pytest.mark.slow
def test_two_processes(place):
    flags = "--model.path", "model", *FLAGS, "--steps", 3, "--out", "two", "--mesh.fsdp", 2
    said = sft_runs.run_ranks(place, 2, *flags, recipe=RECIPE.stem)
    assert "right" in said
    rows = sft_runs.rows(place / "two")
    assert all(row["ratio/mean"] == 1 and row["sampling_logp_difference/mean"] < 1e-5 for row in rows)


@pytest.mark.slow
@pytest.mark.parametrize(("axis", "whose"), [("ep", "engine"), ("ep", "trainer"), ("cp", "trainer"), ("tp", "trainer")])
def test_what_the_trainer_computes_of_rollouts_on_a_mesh(place, axis, whose):
    """Old log-probabilities, a reference in the reward, greedy answers and recorded experts, in two steps a rollout."""
    text = "def even(completion_ids, **columns):\n    return [1.0 - ids[0] % 2 for ids in completion_ids]\n"
    (place / "mine.py").write_text(text)
    flags = "--model.path", "model", *FLAGS, "--steps", 3, "--mesh.fsdp", 1, f"--mesh.{axis}", 2
    flags += "--out", f"{axis}-{whose}"
    flags += "--loss.old", "trainer", "--loss.correction", "sequence_mask", "--rollout.steps-per-generation", 2
    flags += ("--reward.functions", "mine.py:even", "--loss.advantage", "remax", "--rollout.routing-replay", whose)
    flags += ("--loss.beta", 0.1, "--loss.kl-in-reward")
    sft_runs.run_ranks(place, 2, *flags, recipe=RECIPE.stem)
    for row in (rows := sft_runs.rows(place / f"{axis}-{whose}")):
        assert row["sampling_logp_difference/max"] < 1e-4 and row["rollout_corr/eff_sample_size"] > 0.999
    assert [("kl" in row) for row in rows] == [True, False, True] and abs(rows[0]["kl"]) < 1e-5
    assert [abs(row["ratio/max"] - 1) < 1e-6 for row in rows] == [True, False, True]
