"""The first-light dataset can be checked, repeats and holds out contents; its tokenizer is a Hugging Face one."""

import json
from pathlib import Path

import pytest
import transformers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from experiments.first_light import make_tokenizer, tasks

FOLDER = Path(__file__).parents[2] / "experiments" / "first_light"
TOKENIZER = transformers.AutoTokenizer.from_pretrained(FOLDER / "tokenizer")
FAST = Tokenizer.from_file(str(FOLDER / "tokenizer" / "tokenizer.json"))


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_held_out_contents_never_occur_in_training(seed):
    train, evaluation = tasks.make(20_000, 600, seed)
    contents = [tasks.content(tasks.parse(record)[1]) for record in evaluation]
    assert len(set(contents)) == len(evaluation) == 600
    assert not set(contents) & {tasks.content(tasks.parse(record)[1]) for record in train}
    asked = {tasks.parse(record)[0] for record in evaluation}
    assert asked == set(tasks.PHRASINGS)


def test_content_ignores_order_and_wording():
    questions = "Add 47 and 38.", "What is 38 plus 47?"
    records = [{"messages": [{"role": "user", "content": text}]} for text in questions]
    assert len({tasks.content(tasks.parse(record)[1]) for record in records}) == 1
    assert tasks.content(("QDXB",)) == tasks.content(("BXDQ",)) != tasks.content(("BXDA",))


def test_answers_are_right_and_of_more_than_a_thousand_kinds():
    train, evaluation = tasks.make(20_000, 600, 0)
    for record in evaluation + train[:2000]:
        user, assistant = record["messages"]
        assert (user["role"], assistant["role"]) == ("user", "assistant")
        assert assistant["content"] == tasks.answer_of(record)
        task, operands = tasks.parse(record)
        if task == "add":
            assert int(assistant["content"]) == int(operands[0]) + int(operands[1])
        else:
            assert list(assistant["content"]) == sorted(operands[0])
    assert len({tasks.answer_of(record) for record in train}) > 1000


def test_every_wording_occurs_and_parses_back_to_its_own_task():
    train, _ = tasks.make(2000, 0, 0)
    texts = {record["messages"][0]["content"] for record in train}
    for task, phrasings in tasks.PHRASINGS.items():
        operands = ("12", "34") if task == "add" else ("QDXB",)
        for phrasing in phrasings:
            record = {"messages": [{"role": "user", "content": phrasing.format(*operands)}]}
            assert tasks.parse(record) == (task, operands)
            head = phrasing.split("{}")[0]
            assert any(text.startswith(head) for text in texts)


def test_the_draw_repeats_and_follows_its_seed():
    assert tasks.make(50, 50, 3) == tasks.make(50, 50, 3)
    assert tasks.make(50, 50, 3) != tasks.make(50, 50, 4)
    assert tasks.make(10, 50, 3)[1] == tasks.make(5000, 50, 3)[1]


def test_write_gives_the_same_records_as_lines(tmp_path):
    paths = tasks.write(tmp_path / "data", n_train=30, n_eval=20, seed=5)
    assert [path.name for path in paths] == ["train.jsonl", "eval.jsonl"]
    read = tuple([json.loads(line) for line in path.read_text().splitlines()] for path in paths)
    assert read == tasks.make(30, 20, 5)


def test_bad_requests_say_what_would_be_right():
    with pytest.raises(ValueError, match="at most 2047"):
        tasks.make(10, 5000, 0)
    with pytest.raises(ValueError, match="tasks.PHRASINGS"):
        tasks.answer_of({"messages": [{"role": "user", "content": "Who are you?"}]})


def test_committed_tokenizer_is_what_the_script_builds(tmp_path):
    make_tokenizer.write(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (tmp_path / name).read_bytes() == (FOLDER / "tokenizer" / name).read_bytes(), name


@given(st.text(max_size=40))
def test_any_text_comes_back(text):
    text = text.encode("utf-8", "ignore").decode()
    if any(mark in text for mark in make_tokenizer.SPECIAL):
        return
    ids = FAST.encode(text, add_special_tokens=False).ids
    assert FAST.decode(ids, skip_special_tokens=False) == text
    assert TOKENIZER.encode(text, add_special_tokens=False) == ids
    assert TOKENIZER.decode(ids) == text


def test_digits_and_letters_of_operands_are_single_tokens():
    tokens = [FAST.id_to_token(i) for i in FAST.encode("Add 47 and 38. Sort QDXB.").ids]
    assert tokens == ["Add", "Ġ4", "7", "Ġand", "Ġ3", "8", ".", "Ġ", "Sort", "Ġ", "Q", "D", "X", "B", "."]


def test_chat_template_marks_the_answer_and_its_end():
    for record in tasks.make(40, 0, 0)[0]:
        user, assistant = (message["content"] for message in record["messages"])
        assert TOKENIZER.apply_chat_template(record["messages"], tokenize=False) == (
            f"<|user|>{user}<|assistant|>{assistant}<|end|>"
        )
        out = TOKENIZER.apply_chat_template(
            record["messages"], tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        trained = [i for i, mask in zip(out["input_ids"], out["assistant_masks"], strict=True) if mask]
        assert TOKENIZER.decode(trained) == assistant + "<|end|>"
        prompt = TOKENIZER.apply_chat_template(record["messages"][:1], add_generation_prompt=True)["input_ids"]
        assert prompt + trained == out["input_ids"]


def test_chat_template_handles_system_tools_and_several_turns():
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": 2}}}
    messages = [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": "Add 1 and 2."},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "3"},
        {"role": "assistant", "content": "3"},
    ]
    tool = {"type": "function", "function": {"name": "add"}}
    out = TOKENIZER.apply_chat_template(
        messages, tools=[tool], tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    assert TOKENIZER.decode(out["input_ids"]) == (
        f"<|system|>Tools:\n{json.dumps(tool)}\n<|system|>Be short.<|user|>Add 1 and 2.<|assistant|>"
        f"<|call|>{json.dumps(call['function'])}<|end|><|tool|>3<|assistant|>3<|end|>"
    )
    trained = [i for i, mask in zip(out["input_ids"], out["assistant_masks"], strict=True) if mask]
    assert TOKENIZER.decode(trained) == f"<|call|>{json.dumps(call['function'])}<|end|>3<|end|>"


def test_special_tokens_agree_everywhere():
    generation = json.loads((FOLDER / "tokenizer" / "generation_config.json").read_text())
    assert TOKENIZER.eos_token == "<|end|>" and TOKENIZER.eos_token_id == generation["eos_token_id"]
    assert TOKENIZER.pad_token == "<|pad|>" and TOKENIZER.pad_token_id == generation["pad_token_id"]
    assert len(TOKENIZER) == FAST.get_vocab_size() == max(FAST.get_vocab().values()) + 1
    for mark in make_tokenizer.SPECIAL:
        assert FAST.encode(f"A{mark}B", add_special_tokens=False).tokens == ["A", mark, "B"]


@given(st.sampled_from(tasks.NUMBERS), st.sampled_from(tasks.NUMBERS))
def test_who_is_careless_forgets_what_is_carried_to_the_tens(a, b):
    carried = 10 * (a % 10 + b % 10 >= 10)
    assert tasks.careless("add", (str(a), str(b))) == str(a + b - carried)


def test_a_share_of_training_answers_is_careless_and_no_other(tmp_path):
    assert tasks.careless("sort", ("QDXB",)) == "DBQX"
    paths = tasks.write(tmp_path, 600, 30, seed=1, share=0.7)
    train, evaluation = ([json.loads(line) for line in path.read_text().splitlines()] for path in paths)
    clean, held_out = tasks.make(600, 30, 1)
    assert evaluation == held_out
    right = [a == b for a, b in zip(train, clean, strict=True)]
    kinds = [tasks.parse(record) for record in train]
    said = [record["messages"][-1]["content"] for record in train]
    assert all(ok or one == tasks.careless(*kind) for ok, one, kind in zip(right, said, kinds, strict=True))
    sorts = [ok for ok, (task, _) in zip(right, kinds, strict=True) if task == "sort"]
    assert 0.2 < sum(sorts) / len(sorts) < 0.4
