"""Rows to conversations or text: the shapes that datasets come in, recognised by their columns.

    messages             messages: [{role, content}], system, tools                   OpenAI, ChatML, TRL
    sharegpt             conversations: [{from, value}], system                       ShareGPT, Vicuna
    alpaca               instruction, input, output, system, history: [[q, a]]        Alpaca
    prompt_completion    prompt, completion: two texts, or two lists of messages      TRL
    text                 text                                                         plain text, all of it trained

GraphGen writes the first three (https://github.com/open-sciencelab/GraphGen). Other columns are left alone, so rows may
carry ids and scores. `columns` renames: {"prompt": "question", "completion": "answer"} reads those two.

Preferences are of two shapes, TRL's:

    preference    prompt, chosen, rejected: texts, or lists of messages; or chosen and rejected alone, as conversations
                  that begin with the same messages. A text beside two conversations is not read, as in TRL
    unpaired      prompt, completion: texts, or lists of messages; label: whether the completion is a wanted one

Questions for reinforcement learning are chats, of which the last answer is the right one, or have none:

    prompt    prompt: a text, or a list of messages that ends with the user's                             TRL
"""

from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

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


class Answers(NamedTuple):
    """A prompt and what was answered to it."""

    prompt: list[Message]
    given: dict[str, list[Message]]
    """By the names of their columns: chosen and rejected, or completion."""
    label: bool = True


def _turns(given: Any, role: str) -> list[Message]:
    """Read a text of `role`, or a list of messages without the columns of Parquet that only others of them have."""
    if not isinstance(given, list):
        return [{"role": role, "content": given}]
    return [
        {k: v for k, v in m.items() if v is not None or k == "content"} if isinstance(m, dict) else m for m in given
    ]


def _preference(row: Mapping[str, Any]) -> Answers:
    prompt, chosen, rejected = (row.get(name) for name in ("prompt", "chosen", "rejected"))
    lists = isinstance(chosen, list) and isinstance(rejected, list)
    if not lists and not (isinstance(chosen, str) and isinstance(rejected, str)):
        raise ValueError(f"'chosen' and 'rejected' must be two texts or two lists of messages, got {row!r}"[:200])
    chosen, rejected = _turns(chosen, "assistant"), _turns(rejected, "assistant")
    if chosen == rejected:
        raise ValueError("'chosen' and 'rejected' are the same, which prefers nothing; leave the row out")
    if isinstance(prompt, list) or not lists:
        if not prompt or not isinstance(prompt, str | list):
            raise ValueError(f"'prompt' must be a text or a list of messages that is not empty, got {prompt!r}"[:160])
        return Answers(_turns(prompt, "user"), {"chosen": chosen, "rejected": rejected})
    pairs = zip(chosen, rejected, strict=False)
    alike = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(chosen), len(rejected)))
    if not 0 < alike < min(len(chosen), len(rejected)):
        what = "have no first message in common" if not alike else "differ in nothing but that one goes on"
        raise ValueError(
            f"'chosen' and 'rejected' {what}; expected one prompt at their beginning and two answers to it"
        )
    return Answers(chosen[:alike], {"chosen": chosen[alike:], "rejected": rejected[alike:]})


def _prompt(row: Mapping[str, Any]) -> list[Message]:
    if not row["prompt"] or not isinstance(row["prompt"], str | list):
        raise ValueError(
            f"'prompt' must be a text or a list of messages that is not empty, got {row['prompt']!r}"[:160]
        )
    return _turns(row["prompt"], "user")


LABELS = {"true": True, "false": False, "1": True, "0": False}


def _unpaired(row: Mapping[str, Any]) -> Answers:
    if (label := LABELS.get(str(row["label"]).lower())) is None:
        raise ValueError(f"'label' must be true (a wanted completion) or false, got {row['label']!r}"[:120])
    if not row["prompt"] or not row["completion"]:
        raise ValueError(f"'prompt' and 'completion' must not be empty, got {row!r}"[:160])
    return Answers(_turns(row["prompt"], "user"), {"completion": _turns(row["completion"], "assistant")}, label)


class Shape(NamedTuple):
    """How rows of one shape are told and read."""

    needs: str
    has: Callable[[Mapping[str, Any]], bool]
    convert: Callable[[Mapping[str, Any]], list[Message] | str | Answers]
    """To a conversation, plain text or answers; ValueError says what is wrong with the row."""


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
PAIRS = {"preference": Shape("'chosen' and 'rejected'", lambda row: {"chosen", "rejected"} <= row.keys(), _preference)}
UNPAIRED = Shape(
    "'prompt', 'completion' and 'label'", lambda row: {"prompt", "completion", "label"} <= row.keys(), _unpaired
)
CHATS = {name: shape for name, shape in SHAPES.items() if name != "text"}
QUESTIONS = CHATS | {"prompt": Shape("'prompt'", lambda row: "prompt" in row, _prompt)}
Form = Literal["chats", "pairs", "answers", "questions"]
FORMS: dict[Form, dict[str, Shape]] = {
    "chats": SHAPES, "pairs": PAIRS, "answers": PAIRS | {"unpaired": UNPAIRED}, "questions": QUESTIONS,
}  # fmt: skip
"""What a recipe reads: chats and texts, pairs of answers, answers each by itself, which pairs are too, or questions,
which chats are too."""

COLUMNS = (
    "messages", "conversations", "system", "tools", "instruction", "input", "output", "history", "prompt", "completion",
    "text", "chosen", "rejected", "label",
)  # fmt: skip
"""What `columns` may rename another column to."""


def _speaks(row: Mapping[str, Any]) -> bool:
    turns = row["conversations"]
    return isinstance(turns, list) and bool(turns) and isinstance(turns[0], dict) and "from" in turns[0]


def recognise(row: Mapping[str, Any], form: Form = "chats") -> str:
    """Return the name of the first shape of a form that a row has; ValueError lists its columns and the shapes."""
    for name, shape in FORMS[form].items():
        if shape.has(row):
            return name
    unpaired = "answers with a label are for --loss-type kto, or " * (form == "pairs" and UNPAIRED.has(row))
    raise ValueError(
        f"expected an object with {', or '.join(shape.needs for shape in FORMS[form].values())}; this has the columns "
        f"{', '.join(map(str, row))[:200] or 'none'}: {unpaired}name them with --data.columns, as in prompt=question"
    )
