"""Questions for reinforcement learning: chats with the right answer, or prompts alone."""

import json
from types import SimpleNamespace

import pytest

from experiments import questions
from functional_trainer import checkpoint
from functional_trainer.data import Tokenizer
from functional_trainer.rl_options import PromptOptions
from functional_trainer.types import ONE_DEVICE
from tests.experiments import sft_runs

TOKENIZER = Tokenizer(sft_runs.TOKENIZER)
USER = {"role": "user", "content": "Add 3 to 4."}


def read(tmp_path, rows, count=9, **options):
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    o = SimpleNamespace(data=PromptOptions(train=(str(tmp_path / "rows.jsonl"),), **options), out=str(tmp_path))
    return questions.prompts(o, TOKENIZER, 384, ONE_DEVICE, count, lambda text: None)


@pytest.mark.parametrize(
    ("row", "options"),
    [
        ({"prompt": "Add 3 to 4.", "level": 2}, {}),
        ({"prompt": [USER], "level": 2}, {}),
        ({"messages": [USER], "level": 2}, {}),
        ({"question": "Add 3 to 4.", "level": 2}, {"columns": ("prompt=question",)}),
    ],
)
def test_a_prompt_needs_no_answer(row, options, tmp_path):
    (prompt,), held_out = read(tmp_path, [row], **options)
    assert prompt.ids == TOKENIZER.prompt([USER]) and prompt.text == "Add 3 to 4."
    assert prompt.columns["level"] == 2 and "answer" not in prompt.columns and not held_out


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [USER, {"role": "assistant", "content": "7"}]},
        {"prompt": "Add 3 to 4.", "completion": "7"},
        {"prompt": "Add 3 to 4.", "answer": "7"},
    ],
)
def test_the_right_answer_is_a_column(row, tmp_path):
    (prompt,), _ = read(tmp_path, [row])
    assert prompt.ids == TOKENIZER.prompt([USER]) and prompt.columns["answer"] == "7"


def test_questions_are_held_out_whether_their_answer_is_known_or_not(tmp_path):
    rows = [{"prompt": f"Add {i} to 4.", "answer": "7"} for i in range(40)]
    answered = [{"messages": [{**USER, "content": str(i)}, {"role": "assistant", "content": "7"}]} for i in range(40)]
    for kind, wanted in ((rows, None), (answered, "7")):
        asked, held_out = read(tmp_path, kind, count=99, split=0.5)
        assert 0 < len(asked) < 40 and len(held_out) == 40 - len(asked)
        assert {prompt.wanted for prompt in held_out} == {wanted}
        assert all(prompt.columns["answer"] == "7" and "rows.jsonl:" in prompt.where for prompt in held_out)


def test_what_is_wrong_with_a_row_is_said(tmp_path):
    for row, message in (
        ({"prompt": ""}, "rows.jsonl:1: 'prompt' must be a text or a list of messages that is not empty"),
        ({"prompt": [{"role": "system", "content": "x"}]}, "must be the assistant's or the user's, it is .* 'system'"),
        ({"query": "x"}, "'prompt' and 'completion', or 'prompt'; this has the columns query"),
        ({"text": "x"}, "rows.jsonl:1: expected .*, or 'prompt'; this has the columns text: name them with --data.col"),
    ):
        with pytest.raises(ValueError, match=message):
            read(tmp_path, [row])
    with pytest.raises(ValueError, match="--data.split 0.99 holds out all of so few rows; use a smaller share"):
        read(tmp_path, [{"prompt": "Add 3 to 4."}], split=0.99)
    with pytest.raises(ValueError, match="mix.yaml: questions are not read from YAML mixes; list its files behind --d"):
        PromptOptions(train=("rows.jsonl", "mix.yaml"))


MINE = """
def even(completions, completion_ids, **columns):
    assert all(message["role"] == "assistant" for (message,) in completions)
    return [1.0 - ids[0] % 2 for ids in completion_ids]

def never(completions, **columns):
    raise KeyError("gone")
"""


def test_the_recipe_learns_from_prompts_alone_with_one_answer_to_each(tmp_path):
    """And says what its functions think of held-out ones, whose answers may be as long, and keeps the best."""
    sft_runs.folder(tmp_path / "model", max_position_embeddings=8)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"prompt": f"Add {i}."}) + "\n" for i in range(9)))
    flags = ("--model.path", "model", "--data.train", "rows.jsonl", "--data.seq-len", 64)
    (tmp_path / "mine.py").write_text(MINE)
    flags += ("--reward.functions", "mine.py:even", "length:50", "mine.py:never", "--reward.messages", "even")
    flags += ("--reward.weights", 1, 0.5, 1, "--data.split", 0.4, "--keep-best", "--eval-every", 1)
    flags += ("--batch", 16, "--rollout.num-generations", 1, "--rollout.max-completion-length", 5, "--steps", 2)
    flags += ("--micro-batch", 4, "--compile", "off", "--out", "run", "--loss.advantage", "remax")
    flags += ("--loss.beta", 0.1, "--loss.kl-in-reward", "--loss.kl", "k2")
    said = sft_runs.run(tmp_path, *flags, recipe="qwen3_moe_grpo")
    first, second = sft_runs.rows(tmp_path / "run")
    assert first["grad_norm"] > 1e-3 and first["reward"] > 0
    for row, at in ((row, at) for row in (first, second) for at in ("", "eval_")):
        assert row[f"{at}reward"] == pytest.approx(
            row[f"{at}rewards/even/mean"] + 0.5 * row[f"{at}rewards/length/mean"]
        )
        assert row["eval_rewards/length/mean"] == pytest.approx(0.9), "greedily all are as long as may be, 5 of 50"
        assert row["eval_rewards/never/raised"] > 1 and "accuracy" not in row
    assert checkpoint.best_loss(tmp_path / "run") == -max(first["eval_reward"], second["eval_reward"])
    assert f"held-out questions is {second['eval_reward']:.3f}" in said and "max_position_embeddings 8" in said
    samples = json.loads((tmp_path / "run" / "samples.jsonl").read_text().splitlines()[0])["samples"]
    assert all(list(sample) == ["question", "given", "reward"] for sample in samples)
    assert 0 <= first["kl"] < 1e-9 < second["kl"]
