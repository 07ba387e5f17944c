"""Scripted dialogues with the environments that ship, to train a model on before it is reinforced, and a tokenizer.

    python experiments/first_light/dialogues.py calculator|guess FOLDER [--n-train N] [--n-eval N] [--seed N]

The scripts are no masters, so that there is something left to learn: six of ten questions for the calculator are
answered without it, with the first number of the question; and every fourth guess is any number of the range, the
others one that is still possible. FOLDER gets train.jsonl, eval.jsonl, of questions that are held out, and tokenizer/.
"""

import argparse
import json
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # run from the clone without installing

from experiments.first_light import make_tokenizer
from functional_trainer.environments import Environment, Message, Row, load
from functional_trainer.environments.shipped import Calculator, Guess, calculate
from functional_trainer.environments.tools import schema


def calculator(rng: random.Random, row: Row) -> list[Message]:
    """Ask the tool and say what it says, or say the first number that there is."""
    environment = Calculator()
    (question,) = environment.reset(row)
    expression = " ".join(word.rstrip("?") for word in row["question"].split()[-5:])
    if rng.random() < 0.6:
        return [question, {"role": "assistant", "content": expression.split()[0]}]
    named = {"name": "calculate", "arguments": {"expression": expression}}
    call: Message = {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": named}]}
    result = {"role": "tool", "content": str(calculate(expression))}
    return [question, call, result, {"role": "assistant", "content": row["answer"]}]


def guess(rng: random.Random, row: Row) -> list[Message]:
    """Play to the end with guesses that forget every fourth time what was said."""
    environment = Guess()
    messages = environment.reset(row)
    low, high, done = row["low"], row["high"], False
    while not done:
        forgets = rng.random() < 0.25
        number = rng.randint(row["low"], row["high"]) if forgets else rng.randint(low, high)
        messages.append({"role": "assistant", "content": str(number)})
        said, _, done = environment.step(messages)
        if not done:
            messages += said
            low, high = (max(low, number + 1), high) if number < row["secret"] else (low, min(high, number - 1))
    return messages


SCRIPTS: dict[str, tuple[type[Environment], Callable[[random.Random, Row], list[Message]]]] = {
    "calculator": (Calculator, calculator),
    "guess": (Guess, guess),
}


def make(name: str, n_train: int, n_eval: int, seed: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return dialogues of the rows to train on, again and again, and of those that are held out."""
    kind, script = SCRIPTS[name]
    tools = {"tools": [schema(tool) for tool in kind.tools]} if kind.tools else {}  # type: ignore[arg-type]
    rng = random.Random(f"dialogues {name} {seed}")
    parts = zip(load(name).rows(), (n_train, n_eval), strict=True)  # type: ignore[attr-defined]
    train, held_out = ([{"messages": script(rng, rng.choice(rows)), **tools} for _ in range(n)] for rows, n in parts)
    return train, held_out


def texts(dialogues: list[dict[str, Any]]) -> list[str]:
    """Return what a tokenizer's words are learned from: everything but numbers, and each digit alone."""
    said = [json.dumps(dialogue.get("tools", [])[:1]) for dialogue in dialogues[:1]]
    for dialogue in dialogues[:200]:
        for message in dialogue["messages"]:
            calls = [json.dumps(call["function"]) for call in message.get("tool_calls", [])]
            said += [message["content"], *calls]
    return [*said, " 0 1 2 3 4 5 6 7 8 9"]


def write(name: str, folder: str | Path, n_train: int = 20_000, n_eval: int = 300, seed: int = 0) -> Path:
    """Write dialogues and a tokenizer into a folder, which is made if missing, and return it."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    train, held_out = make(name, n_train, n_eval, seed)
    for stem, rows in {"train": train, "eval": held_out}.items():
        (folder / f"{stem}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    make_tokenizer.write(folder / "tokenizer", texts(train))
    return folder


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("environment", choices=sorted(SCRIPTS), help="which environment to talk to")
    parser.add_argument("folder", help="where train.jsonl, eval.jsonl and tokenizer/ go")
    parser.add_argument("--n-train", type=int, default=20_000, help="dialogues to train on (default %(default)s)")
    parser.add_argument("--n-eval", type=int, default=300, help="dialogues to hold out (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the scripts (default %(default)s)")
    options = parser.parse_args()
    print(write(options.environment, options.folder, options.n_train, options.n_eval, options.seed))
