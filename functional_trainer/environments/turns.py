"""What a chat template writes between turns, as token ids, and what it makes of tool calls.

A policy's turn is never decoded and encoded again: the next prompt is the ids until now, those that were sampled among
them, and behind them what the template writes between the end of an assistant's turn and the beginning of the next.
That is found by rendering a stand-in for the turn. It begins behind a token that ends turns, and no merge of a
tokenizer reaches across one, so encoding it alone gives the ids that it has in the whole text. (The idea is TRL's,
whose GRPOTrainer finds the suffix of tool answers so.)
"""

import json
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from functional_trainer.data.chat import Message, Tokenizer
from functional_trainer.environments.tools import Call
from functional_trainer.errors import brief

NAME, VALUE, TEXT = "tool_name", "tool_value", "said_before"


class Turns:
    """Prompts, and what stands between turns, by a tokenizer's chat template and with these descriptions of tools.

    ValueError if the template has no place for a tool's call or answer.
    """

    def __init__(self, tokenizer: Tokenizer, tools: Sequence[dict[str, Any]] = ()):
        self.tokenizer, self.tools = tokenizer, list(tools) or None
        self._prompt, self._between = lru_cache(4096)(self._prompt_ids), lru_cache(4096)(self._between_ids)
        if self.tools:
            self.marks, _ = self._marks(), self.between([{"role": "tool", "content": "x"}])

    def prompt(self, messages: list[Message]) -> list[int]:
        """Return the ids of an opening with the beginning of the policy's turn behind it."""
        return list(self._prompt(json.dumps(messages)))

    def between(self, messages: list[Message]) -> list[int]:
        """Return the ids between the end of the policy's turn and the beginning of its next, with `messages` said.

        ValueError for what the template cannot render, and for messages that are the policy's to say.
        """
        if not messages or any(message.get("role") == "assistant" for message in messages):
            raise ValueError("an environment answers with at least one message, and with none of an assistant")
        return list(self._between(json.dumps(messages)))

    def _prompt_ids(self, messages: str) -> list[int]:
        return self.tokenizer.prompt(json.loads(messages), self.tools)

    def _between_ids(self, said: str) -> list[int]:
        messages = json.loads(said)
        count = next((i for i, message in enumerate(messages) if message["role"] != "tool"), len(messages))
        ids = [message.get("tool_call_id", f"call_{i}") for i, message in enumerate(messages[:count])]
        calls = [{"type": "function", "id": i, "function": {"name": NAME, "arguments": {}}} for i in ids]
        turn: Message = {"role": "assistant", "content": "" if calls else "x"} | (
            {"tool_calls": calls} if calls else {}
        )
        chat = [{"role": "user", "content": "x"}, turn, *messages]
        text, spans = self.tokenizer.spans(chat, self.tools)
        whole = self.tokenizer.render(chat, self.tools, add_generation_prompt=True)
        if not whole.startswith(text):
            raise ValueError("the chat template changes what was said where it begins the next turn")
        return self.tokenizer.encode(whole[spans[-1][1] :])

    def _marks(self) -> tuple[str, str, str]:
        """How the template writes a tool call: before its JSON object, behind it, and the key of the arguments."""
        user: Message = {"role": "user", "content": "x"}
        call = {"type": "function", "id": "call_0", "function": {"name": NAME, "arguments": {"x": VALUE}}}
        turn = {"role": "assistant", "content": TEXT}
        plain, text = (self.tokenizer.render([user, turn | more], self.tools) for more in ({}, {"tool_calls": [call]}))
        at = plain.rfind(TEXT) + len(TEXT)
        added = text[at : len(text) - len(plain) + at]
        if text == plain[:at] + added + plain[at:] and (start := added.find("{")) >= 0:
            try:
                found, end = json.JSONDecoder().raw_decode(added, start)
                for key in ("arguments", "parameters"):
                    if found == {"name": NAME, key: {"x": VALUE}}:
                        return added[:start].strip(), added[end:].strip(), key
            except ValueError:
                pass  # no JSON
        raise ValueError(
            f"{self.tokenizer.folder}: the chat template writes no tool call as an object of name and arguments that "
            f"can be found again, but as {brief(added, 100)!r}"
        )

    def read(self, ids: Sequence[int]) -> tuple[Message, list[Call]]:
        """Return what a policy said in a turn as a message, and the calls in it; there are none without tools."""
        ended = bool(ids) and ids[-1] in self.tokenizer.eos_ids
        text = self.tokenizer.decode(ids[:-1] if ended else ids, skip_special=False)
        thought, mark, content = text.rpartition("</think>")
        message: Message = {"role": "assistant", "content": content.lstrip() if mark else text}
        if mark:
            message["reasoning_content"] = thought.removeprefix("<think>").strip()
        if not self.tools:
            return message, []
        opening, closing, key = self.marks
        before, *found = message["content"].split(opening) if opening else _bare(message["content"])
        calls = [_call(body.partition(closing)[0] if closing else body, key) for body in found]
        if calls:
            names = [{"name": call.name, "arguments": dict(call.arguments)} for call in calls]
            message["content"] = before.strip()
            message["tool_calls"] = [
                {"type": "function", "id": f"call_{i}", "function": named} for i, named in enumerate(names)
            ]
        return message, calls


def _bare(text: str) -> list[str]:
    """Split a turn of a template that puts no mark before a call: it is one if it begins as an object."""
    return ["", text] if text.lstrip().startswith("{") else [text]


def _call(body: str, key: str) -> Call:
    try:
        found = json.loads(body)
    except (ValueError, RecursionError) as error:
        return Call("", {}, f"the call is no JSON ({brief(error, 80)})")
    right = isinstance(found, dict) and isinstance(found.get("name"), str) and isinstance(found.get(key), dict)
    return Call(found["name"], found[key]) if right else Call("", {}, f"a call has a name and {key}, an object")
