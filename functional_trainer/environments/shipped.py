"""Two environments to begin with: sums and products with a calculator, and a number to guess. Imports no torch."""

import ast
import operator
import random
import re
from itertools import product
from typing import Any

from functional_trainer.environments import Environment, Message, Row, Step

OPERATORS: dict[type, Any] = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul}
SIGNS = ("*", "+", "-")
NUMBERS = range(2, 10)
SPAN = 15
"""Numbers of a range to guess in: binary search needs `TRIES`."""
TRIES = 4
LOWS = range(10, 85)


def calculate(expression: str) -> int:
    """Compute an expression.

    Args:
        expression: Numbers and +, -, *
    """
    try:
        return _value(ast.parse(expression, mode="eval").body)
    except (SyntaxError, RecursionError, MemoryError):
        raise ValueError(f"{expression!r} is no expression") from None


def _value(node: ast.AST) -> int:
    if isinstance(node, ast.Constant) and type(node.value) is int:
        return node.value
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -_value(node.operand)
    if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
        return OPERATORS[type(node.op)](_value(node.left), _value(node.right))
    raise ValueError("only whole numbers, +, -, * and brackets")


class Calculator(Environment):
    """A question whose answer nobody knows by heart, and a tool that does; 1 for the right answer.

    A row has `question` and `answer`.
    """

    tools = (calculate,)

    def reset(self, row: Row) -> list[Message]:
        self.answer = str(row["answer"])
        return [{"role": "user", "content": str(row["question"])}]

    def step(self, messages: list[Message]) -> Step:
        return Step(reward=float(messages[-1]["content"].strip() == self.answer), done=True)

    @staticmethod
    def rows(seed: int = 0, train: int = 4000, held_out: int = 600) -> tuple[list[Row], list[Row]]:
        """Draw expressions of three numbers; none is in both parts."""
        rng = random.Random(f"calculator {seed}")
        every = [f"{a} {x} {b} {y} {c}" for a, b, c in product(NUMBERS, repeat=3) for x, y in product(SIGNS, repeat=2)]
        drawn = rng.sample(every, train + held_out)
        made: list[Row] = [{"question": f"What is {e}?", "answer": str(calculate(e))} for e in drawn]
        return made[held_out:], made[:held_out]


class Guess(Environment):
    """A number to find in four guesses, each of which is told to be too low or too high; 1 if it is found.

    A row has `low`, `high` and `secret`.
    """

    def reset(self, row: Row) -> list[Message]:
        self.secret, self.left = int(row["secret"]), TRIES
        return [{"role": "user", "content": f"Guess a number from {row['low']} to {row['high']}."}]

    def step(self, messages: list[Message]) -> Step:
        found = re.fullmatch(r"\s*(\d{1,9})\s*", messages[-1]["content"])
        self.left -= 1
        if found and int(found[1]) == self.secret:
            return Step(reward=1.0, done=True)
        said = "no number" if not found else "higher" if int(found[1]) < self.secret else "lower"
        return Step([{"role": "user", "content": said}], done=not self.left)

    @staticmethod
    def rows(seed: int = 0, held_out: int = 24) -> tuple[list[Row], list[Row]]:
        """Return ranges with each of their numbers as the secret; no range is in both parts."""
        lows = random.Random(f"guess {seed}").sample(LOWS, len(LOWS))
        every: list[list[Row]] = [
            [{"low": low, "high": low + SPAN - 1, "secret": low + i} for i in range(SPAN)] for low in lows
        ]
        return sum(every[held_out:], []), sum(every[:held_out], [])
