"""The first-light chat dataset: addition and letter sorting asked in words, with checkable answers.

    python experiments/first_light/tasks.py FOLDER [--n-train N] [--n-eval N] [--seed N] [--careless SHARE]

Every record is one line of OpenAI messages: `{"messages": [{"role": "user", ...}, {"role": "assistant", ...}]}`.
A question's content is what is asked about, whatever the wording: the unordered pair of numbers of an addition, the
set of letters to sort. No content of an evaluation question occurs in a training question.
"""

import argparse
import json
import random
import re
from pathlib import Path

Record = dict[str, list[dict[str, str]]]

PHRASINGS: dict[str, tuple[str, ...]] = {
    "add": (
        "What is {} plus {}?",
        "What is {} + {}?",
        "Add {} and {}.",
        "Add {} to {}.",
        "Please compute {} + {}.",
        "How much is {} plus {}?",
        "Find the sum of {} and {}.",
        "Tell me the sum of {} and {}.",
    ),
    "sort": (
        "Sort {}.",
        "Please sort {} alphabetically.",
        "Put {} in alphabetical order.",
        "What is {} in alphabetical order?",
        "Arrange {} from A to Z.",
        "Sort the letters of {}.",
    ),
}
TURNS = ("add", "sort", "add")  # additions are the harder to learn
NUMBERS = range(10, 100)
LENGTHS = range(4, 7)
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_PATTERNS = [
    (task, re.compile(re.escape(phrasing).replace(r"\{\}", r"(\d+|[A-Z]+)")))
    for task, phrasings in PHRASINGS.items()
    for phrasing in phrasings
]


def parse(record: Record) -> tuple[str, tuple[str, ...]]:
    """Return the task of a record ("add" or "sort") and its operands; ValueError for a foreign question."""
    question = record["messages"][0]["content"]
    for task, pattern in _PATTERNS:
        if match := pattern.fullmatch(question):
            return task, match.groups()
    raise ValueError(f"not a question of the first-light dataset: {question!r}; tasks.PHRASINGS lists its wordings")


def solve(task: str, operands: tuple[str, ...]) -> str:
    """Return the right answer of a task for its operands."""
    if task == "add":
        return str(sum(int(number) for number in operands))
    return "".join(sorted(operands[0]))


def content(operands: tuple[str, ...]) -> tuple[str, ...]:
    """Return what a question is about whatever its wording: sorted numbers, or the sorted letters."""
    return tuple(sorted(operands)) if len(operands) == 2 else tuple(sorted(operands[0]))


def answer_of(record: Record) -> str:
    """Work the right answer out from a record's question alone; ValueError for a foreign question."""
    return solve(*parse(record))


def _draw(rng: random.Random, task: str, excluded: set[tuple[str, ...]]) -> tuple[str, ...]:
    while True:
        if task == "add":
            operands: tuple[str, ...] = (str(rng.choice(NUMBERS)), str(rng.choice(NUMBERS)))
        else:
            operands = ("".join(rng.sample(LETTERS, rng.choice(LENGTHS))),)
        if content(operands) not in excluded:
            return operands


def _record(rng: random.Random, task: str, operands: tuple[str, ...]) -> Record:
    question = rng.choice(PHRASINGS[task]).format(*operands)
    answer = solve(task, operands)
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def make(n_train: int, n_eval: int, seed: int) -> tuple[list[Record], list[Record]]:
    """Return training and evaluation records, tasks by TURNS; the evaluation set depends on n_eval and seed only.

    Evaluation contents are all different and none occurs in training. ValueError when n_eval is more than half of
    the additions there are.
    """
    pairs = len(NUMBERS) * (len(NUMBERS) + 1) // 2
    if n_eval > pairs // 2:
        raise ValueError(f"n_eval={n_eval} leaves too few of the {pairs} additions to train on; at most {pairs // 2}")
    held_out: set[tuple[str, ...]] = set()
    rng = random.Random(f"eval {seed}")
    evaluation = []
    for i in range(n_eval):
        task = TURNS[i % len(TURNS)]
        operands = _draw(rng, task, held_out)
        held_out.add(content(operands))
        evaluation.append(_record(rng, task, operands))
    rng = random.Random(f"train {seed}")
    train = []
    for i in range(n_train):
        task = TURNS[i % len(TURNS)]
        train.append(_record(rng, task, _draw(rng, task, held_out)))
    return train, evaluation


def wrong(rng: random.Random, task: str, operands: tuple[str, ...]) -> str:
    """Return an answer that is near the right one: a sum that is off by 1 or 10, two neighbours in the wrong order."""
    right = solve(task, operands)
    if task == "add":
        return str(int(right) + rng.choice((-10, -1, 1, 10)))
    at = rng.randrange(len(right) - 1)
    return right[:at] + right[at + 1] + right[at] + right[at + 2 :]


def careless(task: str, operands: tuple[str, ...]) -> str:
    """Return the answer of one who forgets what is carried to the tens, and the order of the first two letters."""
    if task == "sort":
        right = solve(task, operands)
        return right[1] + right[0] + right[2:]
    (a, b), (c, d) = (divmod(int(number), 10) for number in operands)
    return str(10 * (a + c) + (b + d) % 10)


def write_preferences(folder: str | Path, n_train: int = 20_000, n_eval: int = 600, seed: int = 0) -> tuple[Path, Path]:
    """Write the same questions, each with the right answer chosen and a wrong one rejected, and return both paths."""
    folder, rng = Path(folder), random.Random(f"wrong {seed}")
    folder.mkdir(parents=True, exist_ok=True)
    paths = folder / "train.jsonl", folder / "eval.jsonl"
    for path, records in zip(paths, make(n_train, n_eval, seed), strict=True):
        rows = []
        for record in records:
            question, right = record["messages"]
            other = {"role": "assistant", "content": wrong(rng, *parse(record))}
            rows.append({"prompt": [question], "chosen": [right], "rejected": [other]})
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return paths


def write(
    folder: str | Path, n_train: int = 20_000, n_eval: int = 600, seed: int = 0, share: float = 0.0
) -> tuple[Path, Path]:
    """Write `train.jsonl` and `eval.jsonl` into a folder, which is made if missing, and return both paths.

    A `share` of the training answers is `careless`.
    """
    folder, rng = Path(folder), random.Random(f"careless {seed}")
    folder.mkdir(parents=True, exist_ok=True)
    paths = folder / "train.jsonl", folder / "eval.jsonl"
    both = make(n_train, n_eval, seed)
    for record in both[0]:
        if rng.random() < share:
            record["messages"][-1]["content"] = careless(*parse(record))
    for path, records in zip(paths, both, strict=True):
        path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return paths


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", help="where train.jsonl and eval.jsonl go")
    parser.add_argument("--n-train", type=int, default=20_000, help="training records (default %(default)s)")
    parser.add_argument("--n-eval", type=int, default=600, help="evaluation records (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the draw (default %(default)s)")
    parser.add_argument("--careless", type=float, default=0.0, help="share of careless answers (default %(default)s)")
    options = parser.parse_args()
    print(*write(options.folder, options.n_train, options.n_eval, options.seed, options.careless), sep="\n")
