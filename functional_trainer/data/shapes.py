"""Rows to conversations or text: the shapes that datasets come in, recognised by their columns.

    messages             messages: [{role, content}], system, tools                   OpenAI, ChatML, TRL
    sharegpt             conversations: [{from, value}], system                       ShareGPT, Vicuna
    alpaca               instruction, input, output, system, history: [[q, a]]        Alpaca
    prompt_completion    prompt, completion: two texts, or two lists of messages      TRL
    text                 text                                                         plain text, all of it trained

GraphGen writes the first three (https://github.com/open-sciencelab/GraphGen). Other columns are left alone, so rows may
carry ids and scores. `columns` renames: {"prompt": "question", "completion": "answer"} reads those two.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from functional_trainer.data.chat import Message

SPEAKERS = {
    "human": "user", "user": "user", "gpt": "assistant", "chatgpt": "assistant", "assistant": "assistant",
    "model": "assistant", "bot": "assistant", "system": "system", "tool": "tool", "observation": "tool",
}  # fmt: skip


def _messages(row: Mapping[str, Any]) -> list[Message]:
    name = "messages" if "messages" in row else "conversations"
    if not isinstance(row[name], list) or not row[name]:
        raise ValueError(f"expected an object with a list '{name}' that is not empty, got {str(dict(row))[:60]}")
    first = row[name][0]
    system = row.get("system") if isinstance(first, dict) and first.get("role") != "system" else None
    turns: list[Message] = [{"role": "system", "content": system}] if system else []
    return turns + [
        {k: v for k, v in turn.items() if v is not None or k == "content"} if isinstance(turn, dict) else turn
        for turn in row[name]
    ]  # columns of Parquet that only other turns have are None here


def _sharegpt(row: Mapping[str, Any]) -> list[Message]:
    turns: list[Message] = [{"role": "system", "content": row["system"]}] if row.get("system") else []
    if not isinstance(row["conversations"], list) or not row["conversations"]:
        raise ValueError("'conversations' must be a list of turns that is not empty")
    for index, turn in enumerate(row["conversations"]):
        if not isinstance(turn, dict) or not {"from", "value"} <= turn.keys():
            raise ValueError(f"turn {index}: expected an object with 'from' and 'value', got {str(turn)[:60]}")
        if not isinstance(turn["from"], str) or turn["from"] not in SPEAKERS:
            raise ValueError(f"turn {index}: unknown speaker {turn['from']!r}; it can be {', '.join(SPEAKERS)}")
        turns.append({"role": SPEAKERS[turn["from"]], "content": turn["value"]})
    return turns


def _alpaca(row: Mapping[str, Any]) -> list[Message]:
    turns: list[Message] = [{"role": "system", "content": row["system"]}] if row.get("system") else []
    history = row.get("history") or []
    if not isinstance(history, list):
        raise ValueError(f"'history' must be a list of questions and answers, got {str(history)[:60]}")
    for index, pair in enumerate(history):
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise ValueError(f"'history' {index}: expected a question and its answer, got {str(pair)[:60]}")
        turns += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    question, more = row["instruction"], row.get("input")
    if not isinstance(question, str) or not isinstance(more, str | None):
        raise ValueError(f"'instruction' and 'input' must be text, got {question!r} and {more!r}"[:160])
    question = f"{question}\n{more}" if more else question
    return [*turns, {"role": "user", "content": question}, {"role": "assistant", "content": row["output"]}]


def _prompt_completion(row: Mapping[str, Any]) -> list[Message]:
    turns: list[Message] = []
    for name, role in (("prompt", "user"), ("completion", "assistant")):
        turns += row[name] if isinstance(row[name], list) else [{"role": role, "content": row[name]}]
    return turns


def _text(row: Mapping[str, Any]) -> str:
    if not isinstance(row["text"], str) or not row["text"].strip():
        raise ValueError(f"'text' must be text that is not empty, got {row['text']!r}"[:120])
    return row["text"]


class Shape(NamedTuple):
    """How rows of one shape are told and read."""

    needs: str
    has: Callable[[Mapping[str, Any]], bool]
    convert: Callable[[Mapping[str, Any]], list[Message] | str]
    """To a conversation, or plain text; ValueError says what is wrong with the row."""


SHAPES = {
    "messages": Shape(
        "a list 'messages'", lambda row: "messages" in row or "conversations" in row and not _speaks(row), _messages
    ),
    "sharegpt": Shape("a list 'conversations'", lambda row: "conversations" in row, _sharegpt),
    "alpaca": Shape("'instruction' and 'output'", lambda row: {"instruction", "output"} <= row.keys(), _alpaca),
    "prompt_completion": Shape(
        "'prompt' and 'completion'", lambda row: {"prompt", "completion"} <= row.keys(), _prompt_completion
    ),
    "text": Shape("'text'", lambda row: "text" in row, _text),
}

COLUMNS = (
    "messages", "conversations", "system", "tools", "instruction", "input", "output", "history", "prompt", "completion",
    "text",
)  # fmt: skip
"""What `columns` may rename another column to."""


def _speaks(row: Mapping[str, Any]) -> bool:
    turns = row["conversations"]
    return isinstance(turns, list) and bool(turns) and isinstance(turns[0], dict) and "from" in turns[0]


def recognise(row: Mapping[str, Any]) -> str:
    """Return the name of the first shape that a row has; ValueError lists its columns and the shapes."""
    for name, shape in SHAPES.items():
        if shape.has(row):
            return name
    raise ValueError(
        f"expected an object with {', or '.join(shape.needs for shape in SHAPES.values())}; this has the columns "
        f"{', '.join(map(str, row))[:200] or 'none'}: name them with --data.columns, as in prompt=question"
    )
