"""functional_trainer.exact_match: a hand-made model's answers are compared letter by letter, and shown as they are."""

from pathlib import Path

import pytest
import torch

from functional_trainer import exact_match
from functional_trainer.data import Tokenizer
from functional_trainer.data.records import Record
from functional_trainer.types import Output, Unembed

TOKENIZER = Tokenizer(Path(__file__).parents[2] / "experiments" / "first_light" / "tokenizer")


class Parrot:
    """A model that knows what to say to each prompt: its cache is what was said, and hidden states are one-hot."""

    dtype = None

    def __init__(self, says: dict[str, str]):
        self.says = {tuple(prompt(q)): [*TOKENIZER.encode(a), TOKENIZER.eos_ids[0]] for q, a in says.items()}

    def unembed(self, params):
        return Unembed(torch.eye(TOKENIZER.vocab_size))

    def init_cache(self, rows, length, params):
        return {"said": torch.zeros(rows, length, dtype=torch.int64), "length": 0}

    def apply(self, params, batch, cache):
        hidden = torch.zeros(*batch["tokens"].shape, TOKENIZER.vocab_size)
        place = batch["positions"]
        cache["said"].scatter_(1, place, batch["tokens"])
        for row, said in enumerate(cache["said"].tolist()):
            said = tuple(said[: place[row, -1] + 1])
            for asked, answer in self.says.items():
                if said[: len(asked)] == asked and len(said) < len(asked) + len(answer):
                    hidden[row, -1, answer[len(said) - len(asked)]] = 9.0
        return Output(hidden, {}, cache)


def prompt(question: str) -> list[int]:
    return TOKENIZER.prompt([{"role": "user", "content": question}])


def record(question: str, wanted: str) -> Record:
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": wanted}]
    return Record("test:1", messages, None)


def ask(says: dict[str, str], wanted: list[str], **options) -> list[exact_match.Answer]:
    records = [record(q, w) for q, w in zip(says, wanted, strict=True)]
    return exact_match.answer(Parrot(says), {"embed": torch.zeros(1)}, TOKENIZER, records, **options)


def test_only_the_exact_text_is_right():
    says = {"a?": "42", "What is 40 plus 2?": "42", "c?": "42 ", "d?": "4", "e?": "421", "f?": "AB"}
    answers = ask(says, ["42", "42", "42", "42", "42", "ab"])
    assert [a.question for a in answers] == list(says)
    assert [a.given for a in answers] == list(says.values())
    assert [a.right for a in answers] == [True, True, False, False, False, False]
    assert exact_match.score(answers) == pytest.approx(2 / 6)


def test_answers_do_not_depend_on_how_many_rows_go_at_once():
    says = {f"What is {i} plus {i * i}?": str(i + i * i) for i in range(7)}
    whole = ask(says, list(says.values()))
    assert ask(says, list(says.values()), rows=3) == whole
    assert exact_match.score(whole) == 1.0


def test_an_answer_without_an_end_is_cut():
    (given,) = ask({"a?": "ABCDEF"}, ["ABC"], max_new_tokens=3)
    assert given.given == TOKENIZER.decode(TOKENIZER.encode("ABCDEF")[:3])


def test_a_whole_conversation_is_the_prompt_of_its_last_turn():
    earlier = [*record("a?", "B").messages]
    messages = [*earlier, {"role": "user", "content": "c?"}, {"role": "assistant", "content": "D"}]
    model = Parrot({})
    model.says = {tuple(TOKENIZER.prompt(messages[:-1])): [*TOKENIZER.encode("D"), TOKENIZER.eos_ids[0]]}
    (given,) = exact_match.answer(model, {"embed": torch.zeros(1)}, TOKENIZER, [Record("test:1", messages, None)])
    assert given == ("c?", "D", "D")


def test_the_table_shows_wrong_ones_first_and_brackets_as_they_are(capsys):
    wrong = [exact_match.Answer(f"w{i}?", "x", "[/b]") for i in range(9)]
    right = [exact_match.Answer(f"r{i}?", "[y]", "[y]") for i in range(9)]
    exact_match.show([*right, *wrong], most=4)
    shown = capsys.readouterr().out
    assert "50.0% of 18 answers are exact" in shown
    assert [name in shown for name in ("w0?", "w1?", "w2?", "r0?", "r1?", "r2?")] == [True, True, False] * 2
    assert shown.count("[/b]") == 2 and shown.count("[y]") == 4
    assert shown.index("w1?") < shown.index("r0?")
