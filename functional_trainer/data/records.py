"""Conversations and texts, checked; an error names the file, the place and what would be right."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from functional_trainer import config
from functional_trainer.data import sources
from functional_trainer.data.chat import Message, Tokenizer
from functional_trainer.data.shapes import COLUMNS, FORMS, Answers, Form, recognise
from functional_trainer.data.sources import Paths
from functional_trainer.errors import brief
from functional_trainer.options import Mix, Source


@dataclass(frozen=True)
class Record:
    """One row of the data: a conversation, plain text, or a prompt with one or two answers."""

    where: str
    """file:line or file[index]"""
    messages: list[Message]
    """Empty for plain text."""
    tools: list[dict] | None
    text: str | None = None
    shape: str = "messages"
    prompt: int = 0
    """Of preferences: how many of the messages are the prompt; only what follows is trained."""
    rejected: list[Message] | None = None
    """Of a pair: the conversation that is not preferred."""
    label: bool = True
    """Of preferences: whether `messages` end with a wanted answer."""
    row: Mapping[str, Any] = field(default_factory=dict)
    """All columns, as in the file, for reward functions."""


AFTER = {
    None: ("system", "user"),
    "system": ("user",),
    "user": ("assistant",),
    "assistant": ("user", "tool"),
    "tool": ("tool", "assistant"),
}


def renames(columns: tuple[str, ...]) -> dict[str, str]:
    """Read `ours=theirs` pairs as {theirs: ours}; ValueError says what is wrong."""
    pairs: dict[str, str] = {}
    for text in columns:
        ours, equals, theirs = text.partition("=")
        if not equals or ours not in COLUMNS or not theirs or theirs in pairs or ours in pairs.values():
            raise ValueError(
                f"--data.columns {text!r}: expected OURS=THEIRS, each once, OURS one of {', '.join(COLUMNS)}"
            )
        pairs[theirs] = ours
    return pairs


def datasets(given: list[Source]) -> list[Source]:
    """Replace YAML files by the `datasets` that they list, their paths relative to it; what these leave open is as
    given."""
    found: list[Source] = []
    for outer in given:
        if Path(outer.path).suffix not in (".yaml", ".yml"):
            found.append(outer)
            continue
        if outer.limit or outer.epochs < float("inf"):
            raise ValueError(f"{outer.path}: give the limit and the epochs of its datasets in the file")
        if not (mix := config.load(Mix, outer.path).datasets):
            raise ValueError(f"{outer.path}: datasets is empty; list at least one")
        for source in mix:
            path = Path(outer.path).parent / source.path
            hub = sources.HUB_NAME.fullmatch(source.path) and sources.kind(path) not in sources.READERS
            where = f"{sources.HUB}{source.path}" if hub and not path.exists() else str(path)
            where = source.path if source.path.startswith(sources.HUB) else where
            changes: dict[str, Any] = {"type": outer.type} if source.type == "auto" else {}
            changes |= {"columns": source.columns or outer.columns, "weight": source.weight * outer.weight}
            found.append(replace(source, path=where, **changes))
    return found


def records(paths: Paths, shape: str = "auto", columns: tuple[str, ...] = (), form: Form = "chats") -> Iterator[Record]:
    """Read checked rows of any kind of file (`sources`) and shape (`shapes`) of a form; ValueError names the place.

    With `shape="auto"` the first row of a file decides for all of it. `columns` are `ours=theirs` pairs.
    """
    names = renames(columns)
    if shape not in ("auto", *FORMS[form]):
        raise ValueError(f"--data.type {shape}: this recipe and loss read {', '.join(FORMS[form])}")
    for file in sources.files(paths):
        here = shape
        for index, (where, row) in enumerate(sources.rows(file)):
            try:
                if not isinstance(row, dict):
                    needs = next(iter(FORMS[form].values())).needs
                    raise ValueError(f"expected an object with {needs}, got {str(row)[:60]}")
                if index == 0 and (gone := [name for name in names if name not in row]):
                    has = str(list(row))[:200]
                    raise ValueError(f"there is no column {gone[0]!r}, which --data.columns names; it has {has}")
                row = {names.get(k, k): v for k, v in row.items() if k in names or k not in names.values()}
                here = recognise(row, form) if here == "auto" else here
                yield _record(row, form, here, where)
            except ValueError as error:
                raise ValueError(f"{where}: {brief(error)}") from error


class Within(NamedTuple):
    """Keep the rows whose content, of preferences whose prompt, hashes to a number in [low, high) of [0, 1).

    Equal rows are on the same side, and so are all answers to one prompt.
    """

    low: float
    high: float

    def __call__(self, record: Record) -> bool:
        messages = record.messages[: record.prompt or None]
        content = json.dumps([record.text, messages, record.tools], sort_keys=True, default=str)
        digest = hashlib.blake2b(content.encode(), digest_size=8).digest()
        return self.low <= int.from_bytes(digest, "big") / 2**64 < self.high


def rows_of(source: Source, keep: Within | None = None, form: Form = "chats") -> Iterator[Record]:
    """Read the rows of a source that are kept (None: all); its limit counts the others too."""
    rows = islice(records(source.path, source.type, source.columns, form), source.limit or None)
    return (row for row in rows if keep is None or keep(row))


def encoded(record: Record, tokenizer: Tokenizer, vocab_size: int | None) -> tuple[list[int], list[bool]]:
    """Tokenize a record: ids and whether each is trained; ValueError names its place.

    With `vocab_size`, the model's, an id that the model has no row for is an error too.
    """
    try:
        if record.text is None:
            ids, mask = tokenizer.encode_chat(record.messages, record.tools, record.prompt)
        else:
            ids = tokenizer.encode(record.text) + tokenizer.document_end
            mask = [True] * len(ids)
        if not any(mask[1:]) and record.text is not None:
            raise ValueError("a text of one token trains nothing: give it more, or leave it out")
        if not any(mask[1:]):
            raise ValueError("no token of it is trained: the chat template marks no assistant text in it")
        if vocab_size is not None and max(ids) >= vocab_size:
            token = tokenizer.backend.id_to_token(max(ids))
            raise ValueError(
                f"token {token!r} has id {max(ids)} but the model's vocabulary has {vocab_size} rows; "
                f"use the model's own tokenizer or a model with at least {tokenizer.vocab_size} rows"
            )
    except ValueError as error:
        raise ValueError(f"{record.where}: {brief(error)}") from error
    return ids, mask


def _record(row: Mapping[str, Any], form: Form, shape: str, where: str) -> Record:
    wanted = FORMS[form][shape]
    if not wanted.has(row):
        why = f"shape {shape}, by the first row or --data.type"
        raise ValueError(f"expected an object with {wanted.needs} ({why}); it has {str(list(row))[:200]}")
    given = wanted.convert(row)
    if isinstance(given, str):
        return Record(where, [], None, given, shape)
    tools = row.get("tools")
    tools = _json(tools) if isinstance(tools, str) and tools.strip() else tools
    if tools and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise ValueError(f"'tools' must be a list of JSON schemas, got {str(tools)[:60]}")
    if not isinstance(given, Answers):
        return Record(where, _conversation(given, form == "questions"), tools or None, shape=shape, row=row)
    checked = []
    for name, answer in given.given.items():
        try:
            checked.append(_conversation([*given.prompt, *answer]))
            if (role := checked[-1][len(given.prompt)]["role"]) != "assistant":
                raise ValueError(f"it begins with role {role!r} behind the prompt; an answer begins with 'assistant'")
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
    rejected = checked[1] if len(checked) > 1 else None
    return Record(where, checked[0], tools or None, None, shape, len(given.prompt), rejected, given.label)


def _conversation(given: list[Message], question: bool = False) -> list[Message]:
    """Check messages, from the first to the assistant's last; or to the user's, if it may be a `question` alone."""
    messages: list[Message] = []
    for index, message in enumerate(given):
        try:
            messages.append(_checked(message, messages))
        except ValueError as error:
            raise ValueError(f"message {index}: {error}") from error
    if messages[-1]["role"] not in ("assistant", *["user"] * question):
        wanted = "the assistant's" + " or the user's" * question
        raise ValueError(f"the last message must be {wanted}, it is of role {messages[-1]['role']!r}")
    return messages


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def _checked(message: Any, earlier: list[Message]) -> Message:
    """Check one message against those before it; text parts are joined to one string."""
    if not isinstance(message, dict):
        raise ValueError(f"expected an object with 'role' and 'content', got {str(message)[:60]}")
    role, content, calls = message.get("role"), message.get("content"), message.get("tool_calls")
    if not isinstance(role, str) or role not in AFTER:
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
