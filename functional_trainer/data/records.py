"""Conversations in JSONL: OpenAI messages, checked; an error names the file, the line and what would be right."""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from functional_trainer.data.chat import Message, Tokenizer
from functional_trainer.data.packing import Documents

Paths = str | Path | Iterable[str | Path]


@dataclass(frozen=True)
class Record:
    """One conversation of a JSONL file."""

    where: str
    """file:line"""
    messages: list[Message]
    tools: list[dict] | None


AFTER = {
    None: ("system", "user"),
    "system": ("user",),
    "user": ("assistant",),
    "assistant": ("user", "tool"),
    "tool": ("tool", "assistant"),
}


def files(paths: Paths) -> list[Path]:
    """List the JSONL files that files, folders (their *.jsonl) and globs name; ValueError where there is none."""
    found: list[Path] = []
    for path in [paths] if isinstance(paths, str | Path) else paths:
        path = Path(path)
        if path.is_file():
            here = [path]
        elif path.is_dir():
            here = sorted(path.glob("*.jsonl"))
        else:
            here = sorted(Path(path.anchor or ".").glob(str(path.relative_to(path.anchor))))
        if not here:
            what = "holds no *.jsonl file" if path.is_dir() else "no such file"
            raise ValueError(f"{path}: {what}; give a JSONL file, a folder of them or a glob")
        found += here
    return found


def records(paths: Paths) -> Iterator[Record]:
    """Read conversations, one object {"messages": [...], "tools": [...]} a line; ValueError names file and line."""
    for file in files(paths):
        empty = True
        with open(file, "rb") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    empty = False
                    yield _record(line, f"{file}:{number}")
        if empty:
            raise ValueError(f"{file}: the file is empty; expected one JSON object with 'messages' a line")


def read(paths: Paths, tokenizer: Tokenizer, vocab_size: int | None = None) -> Documents:
    """Tokenize the conversations of JSONL files; ValueError names file and line of the first bad one.

    With `vocab_size`, the model's, an id that the model has no row for is an error too.
    """
    return Documents.of(_encoded(record, tokenizer, vocab_size) for record in records(paths))


def _encoded(record: Record, tokenizer: Tokenizer, vocab_size: int | None) -> tuple[list[int], list[bool]]:
    try:
        ids, mask = tokenizer.encode_chat(record.messages, record.tools)
        if not any(mask[1:]):
            raise ValueError("no token of it is trained: the chat template marks no assistant text in it")
        if vocab_size is not None and max(ids) >= vocab_size:
            token = tokenizer.backend.id_to_token(max(ids))
            raise ValueError(
                f"token {token!r} has id {max(ids)} but the model's vocabulary has {vocab_size} rows; "
                f"use the model's own tokenizer or a model with at least {tokenizer.vocab_size} rows"
            )
    except ValueError as error:
        raise ValueError(f"{record.where}: {error}") from error
    return ids, mask


def _record(line: bytes, where: str) -> Record:
    try:
        data = json.loads(line)
        json.dumps(data, ensure_ascii=False).encode()  # a lone surrogate is no text
    except ValueError as error:
        raise ValueError(f"{where}: not valid JSON ({error}); expected one object with 'messages' a line") from error
    if not isinstance(data, dict) or not isinstance(data.get("messages"), list) or not data["messages"]:
        raise ValueError(f"{where}: expected an object with a list 'messages' that is not empty, got {str(data)[:60]}")
    tools = data.get("tools")
    if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise ValueError(f"{where}: 'tools' must be a list of JSON schemas, got {str(tools)[:60]}")
    messages: list[Message] = []
    for index, message in enumerate(data["messages"]):
        try:
            messages.append(_checked(message, messages))
        except ValueError as error:
            raise ValueError(f"{where}: message {index}: {error}") from error
    if messages[-1]["role"] != "assistant":
        raise ValueError(f"{where}: the last message must be the assistant's, it is of role {messages[-1]['role']!r}")
    return Record(where, messages, tools or None)


def _checked(message: Any, earlier: list[Message]) -> Message:
    """Check one message against those before it; text parts are joined to one string."""
    if not isinstance(message, dict):
        raise ValueError(f"expected an object with 'role' and 'content', got {str(message)[:60]}")
    role, content, calls = message.get("role"), message.get("content"), message.get("tool_calls")
    if role not in AFTER or role is None:
        raise ValueError(f"unknown role {role!r}; it can be 'system', 'user', 'assistant' or 'tool'")
    before = earlier[-1] if earlier else {"role": None}
    if role not in AFTER[before["role"]]:
        place = f"follow {before['role']!r}" if earlier else "come first"
        right = " or ".join(map(repr, AFTER[before["role"]]))
        raise ValueError(f"role {role!r} cannot {place}; here it can be {right}")
    if role == "tool" and before["role"] == "assistant" and not before.get("tool_calls"):
        raise ValueError("a 'tool' message must answer an assistant message with 'tool_calls'")
    if isinstance(content, list):
        if not all(isinstance(part, dict) and isinstance(part.get("text"), str) for part in content):
            raise ValueError("'content' has parts that are not text; only text can be trained on")
        content = "".join(part["text"] for part in content)
    if calls is not None and (role != "assistant" or not isinstance(calls, list) or not all(map(_is_call, calls))):
        raise ValueError("'tool_calls' must be an assistant's list of {'function': {'name': ..., 'arguments': ...}}")
    if not isinstance(content, str) and not (content is None and calls):
        raise ValueError(f"'content' is missing or not text ({content!r}); expected a string")
    if role == "assistant" and not calls and not (content or "").strip():
        raise ValueError("the assistant's turn is empty; give it text or 'tool_calls', or leave the conversation out")
    return {**message, "content": content}


def _is_call(call: Any) -> bool:
    function = call.get("function", call) if isinstance(call, dict) else None
    return isinstance(function, dict) and isinstance(function.get("name"), str)
