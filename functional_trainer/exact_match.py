"""Greedy answers to held-out conversations, compared with the ones written there."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from functional_trainer.data.chat import Tokenizer
from functional_trainer.data.records import Record
from functional_trainer.engines.local import generate
from functional_trainer.tree import Tree


class Answer(NamedTuple):
    """One question with the answer that was wanted and the one that was given."""

    question: str
    wanted: str
    given: str

    @property
    def right(self) -> bool:
        return self.wanted == self.given


def answer(
    model: Any, params: Tree, tokenizer: Tokenizer, records: Sequence[Record], max_new_tokens: int = 64, rows: int = 256
) -> list[Answer]:
    """Answer the last turn of every conversation greedily, `rows` at a time; the last message is the wanted answer."""
    prompts = [tokenizer.prompt(r.messages[:-1], r.tools) for r in records]
    samples = generate(model, params, prompts, max_new_tokens, eos_ids=tokenizer.eos_ids, slots=rows)
    answers = []
    for record, sample in zip(records, samples, strict=True):
        *_, question, last = record.messages
        answers.append(Answer(str(question["content"]), str(last["content"]), tokenizer.decode(sample.tokens)))
    return answers


def score(answers: Sequence[Answer]) -> float:
    """Return the fraction of answers that equal the wanted text exactly."""
    return sum(a.right for a in answers) / len(answers)


def show(answers: Sequence[Answer], most: int = 10) -> None:
    """Print a table of examples, wrong ones first up to half of it; nothing if there are none."""
    if not answers:
        return
    wrong = [a for a in answers if not a.right][: most // 2]
    table = Table("question", "wanted", "given", "", title=f"{score(answers):.1%} of {len(answers)} answers are exact")
    for a in wrong + [a for a in answers if a.right][: most - len(wrong)]:
        table.add_row(*map(escape, a), "right" if a.right else "wrong")
    Console().print(table)
