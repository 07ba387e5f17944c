"""Chats to tokens and a loss mask, from a Hugging Face tokenizer folder and its own Jinja template.

The mask trains the assistant's tokens and the token that ends its turn. A template with `{% generation %}` marks says
which text that is. Without marks, invisible sentinels are put around each assistant text before rendering: if taking
them out again gives exactly the plain rendering, they show where each turn is. It then starts right after the
generation prompt before them and ends with the first end-of-turn token behind them. A token that holds any character
of a turn is trained, as in transformers.
"""

import json
import re
import shutil
from collections.abc import Iterable
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox
import numpy as np
import tokenizers

from functional_trainer.errors import brief, read_json

Message = dict[str, Any]
Span = tuple[int, int]
SENTINEL = 0xF0000  # first of a private plane of 65534 characters
FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.model"),
    *("vocab.json", "merges.txt", "vocab.txt", "chat_template.jinja", "additional_chat_templates"),
    "generation_config.json",
)
FLAGS = ("lstrip", "rstrip", "single_word", "normalized", "special")  # of an added token
SENTINELS = re.compile("([\U000f0000-\U000ffffd])")
GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


class Generation(jinja2.ext.Extension):
    """`{% generation %}...{% endgeneration %}`: sentinels around the text if the render passes `mark_generation`."""

    tags = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        flag = jinja2.nodes.Name("mark_generation", "load")
        return jinja2.nodes.CallBlock(self.call_method("_mark", [flag]), [], [], body).set_lineno(line)

    def _mark(self, flag: Any, caller: Any) -> str:
        return chr(SENTINEL) + caller() + chr(SENTINEL + 1) if flag is True else caller()


def environment() -> jinja2.Environment:
    """Make the sandbox that chat templates are written for, as transformers has it."""

    def refuse(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(x: Any, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
        return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    env = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    env.filters["tojson"] = tojson
    env.globals["raise_exception"] = refuse
    env.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return env


class Tokenizer:
    """A Hugging Face tokenizer folder: text, chats and ids. ValueError names the file and what it should hold."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        file = self.folder / "tokenizer.json"
        if not file.is_file():
            raise ValueError(f"{file}: no such file; expected a Hugging Face folder with tokenizer.json")
        try:
            self.backend = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:
            raise ValueError(f"{file}: not a tokenizer file of the `tokenizers` library ({brief(error)})") from error
        self.backend.no_truncation()
        self.backend.no_padding()
        config = self._json("special_tokens_map.json") | self._json("tokenizer_config.json")
        self._add_tokens(config)
        named = {k: v.get("content") if isinstance(v, dict) else v for k, v in config.items() if k.endswith("_token")}
        self.special: dict[str, str] = {name: text for name, text in named.items() if isinstance(text, str)}
        for name, text in self.special.items():
            if self.backend.token_to_id(text) is None:
                raise ValueError(f"{self.folder}/tokenizer_config.json: {name} {text!r} is not in tokenizer.json")
        self.templates = self._templates(config)

    def __reduce__(self):
        return Tokenizer, (self.folder,)

    def _json(self, name: str) -> dict[str, Any]:
        file = self.folder / name
        return read_json(file) if file.is_file() else {}

    def _add_tokens(self, config: dict[str, Any]) -> None:
        """Add the tokens that only tokenizer_config.json or added_tokens.json lists, at the ids listed there."""
        decoder = config.get("added_tokens_decoder") or {}
        if not isinstance(decoder, dict):
            raise ValueError(f"{self.folder}: added_tokens_decoder is no object: {decoder!r}"[:200])
        more = {str(i): {"content": text} for text, i in self._json("added_tokens.json").items()}
        listed = {**more, **decoder}
        for name, token in listed.items():
            fits = isinstance(token, dict) and isinstance(token.get("content"), str) and name.isdecimal()
            if not fits or not all(isinstance(token[k], bool) for k in FLAGS if k in token):
                raise ValueError(f"{self.folder}: added token {name!r} is no id with a text and flags: {token!r}"[:200])
        for i, token in sorted(((int(name), token) for name, token in listed.items()), key=lambda pair: pair[0]):
            text = token["content"]
            if self.backend.token_to_id(text) is None:
                self.backend.add_tokens([tokenizers.AddedToken(text, **{k: token[k] for k in FLAGS if k in token})])
            if self.backend.token_to_id(text) != i:
                found = self.backend.token_to_id(text)
                raise ValueError(f"{self.folder}: added token {text!r} should have id {i} but gets {found}")

    def _templates(self, config: dict[str, Any]) -> dict[str, jinja2.Template]:
        """Compile the chat templates by name; a .jinja file wins over tokenizer_config.json."""
        given = config.get("chat_template") or {}
        sources = {"default": given} if isinstance(given, str) else {}
        files = {file.stem: file for file in (self.folder / "additional_chat_templates").glob("*.jinja")}
        if (self.folder / "chat_template.jinja").is_file():
            files["default"] = self.folder / "chat_template.jinja"
        try:
            if isinstance(given, list):
                sources = {str(named["name"]): named["template"] for named in given}
            sources |= {name: file.read_text("utf-8") for name, file in files.items()}
            self.marked = {name for name, source in sources.items() if GENERATION.search(source)}
            return {name: environment().from_string(source) for name, source in sources.items()}
        except (jinja2.TemplateError, ValueError, TypeError, KeyError, RecursionError) as error:
            raise ValueError(f"{self.folder}: the chat template is not valid Jinja ({brief(error)})") from error

    @property
    def vocab_size(self) -> int:
        """Return the largest id + 1: the least vocabulary a model needs."""
        return max(self.backend.get_vocab(with_added_tokens=True).values()) + 1

    @cached_property
    def eos_ids(self) -> list[int]:
        """List the ids that end a turn: the template's, the tokenizer's, generation_config.json's."""
        given = self._json("generation_config.json").get("eos_token_id")
        listed = given if isinstance(given, list) else [] if given is None else [given]
        if not all(type(i) is int and 0 <= i < 2**31 for i in listed):
            raise ValueError(f"{self.folder}/generation_config.json: eos_token_id is no id or ids: {given!r}"[:200])
        ids = [self._turn_end, self.backend.token_to_id(self.special.get("eos_token", "")), *listed]
        return [i for i in dict.fromkeys(ids) if i is not None and self.backend.id_to_token(i) is not None]

    @property
    def document_end(self) -> list[int]:
        """Return the id that ends a text without turns, eos_token, in a list that is empty if there is none."""
        end = self.backend.token_to_id(self.special.get("eos_token", ""))
        return self.eos_ids[:1] if end is None else [end]

    @property
    def turn_ends(self) -> list[str]:
        """List the texts of `eos_ids`."""
        return [str(self.backend.id_to_token(i)) for i in self.eos_ids]

    @property
    def pad_id(self) -> int:
        """Return the padding id; without one the first end-of-turn id, without that 0."""
        pad = self.backend.token_to_id(self.special.get("pad_token", ""))
        return (self.eos_ids or [0])[0] if pad is None else pad

    def encode(self, text: str) -> list[int]:
        """Encode `text`, adding no special tokens (those spelled out in it are recognised)."""
        return self.backend.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        """Decode `ids`, leaving out special tokens unless told otherwise."""
        return self.backend.decode([int(i) for i in ids], skip_special_tokens=skip_special)

    def save(self, folder: str | Path) -> None:
        """Copy the tokenizer's files to `folder`."""
        for name in FILES:
            source, target = self.folder / name, Path(folder) / name
            if source.is_dir():
                shutil.copytree(source, target, dirs_exist_ok=True)
            elif source.is_file():
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source, target)

    def _template(self, tools: list | None) -> str:
        for name in ("tool_use", "default") if tools is not None else ("default",):
            if name in self.templates:
                return name
        has = f"only templates named {sorted(self.templates)}" if self.templates else "no chat template"
        raise ValueError(f"{self.folder}: {has}; add chat_template.jinja or chat_template in tokenizer_config.json")

    def render(
        self, messages: list[Message], tools: list | None = None, add_generation_prompt: bool = False, **extra: Any
    ) -> str:
        """Render the chat as text; ValueError with the template's own words if it refuses."""
        template = self.templates[self._template(tools)]
        given = {**self.special, **extra, "add_generation_prompt": add_generation_prompt}
        try:
            return template.render(messages=[_plain(m) for m in messages], tools=tools, documents=None, **given)
        except Exception as error:  # templates run arbitrary expressions
            raise ValueError(f"the chat template refuses these messages: {brief(error)}") from error

    def prompt(self, messages: list[Message], tools: list | None = None) -> list[int]:
        """Encode the chat with the generation prompt behind it."""
        return self.encode(self.render(messages, tools, add_generation_prompt=True))

    def encode_chat(
        self, messages: list[Message], tools: list | None = None, prompt: int = 0
    ) -> tuple[list[int], list[bool]]:
        """Encode the whole chat: ids and whether each is trained; ValueError says why a mask cannot be had.

        Assistant turns among the first `prompt` messages are not trained.
        """
        text, spans = self.spans(messages, tools)
        if prompt:
            turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
            if len(spans) != len(turns):
                marked = f"marks {len(spans)} of {len(turns)} assistant turns"
                raise ValueError(f"the chat template {marked}: which of them are the answer's cannot be told")
            spans = [span for i, span in zip(turns, spans, strict=True) if i >= prompt]
        encoding = self.backend.encode(text, add_special_tokens=False)
        begin, end = np.array(encoding.offsets, np.int64).reshape(-1, 2).T
        mask = np.zeros(len(begin), bool)
        for start, stop in spans:
            mask |= (begin < stop) & (end > start)
        return encoding.ids, mask.tolist()

    def spans(self, messages: list[Message], tools: list | None = None) -> tuple[str, list[Span]]:
        """Render the chat and find the [start, stop) characters of each assistant turn, end-of-turn token included."""
        if found := SENTINELS.search(json.dumps([messages, tools], ensure_ascii=False, default=str)):
            raise ValueError(f"the private-use character U+{ord(found[0]):X} marks turns here; take it out of the text")
        if self._template(tools) not in self.marked:
            return self._spans_by_sentinel(messages, tools)
        text, marks = _lift(self.render(messages, tools, mark_generation=True))
        if [number for number, _ in marks] != [0, 1] * (len(marks) // 2):
            raise ValueError("the chat template nests {% generation %} marks; they must follow each other")
        places = [place for _, place in marks]
        ends, spans = self.turn_ends, []
        for start, stop in zip(places[::2], places[1::2], strict=True):
            after = text[stop:]
            missing = not text[start:stop].rstrip().endswith(tuple(ends))
            close = next((end for end in ends if missing and after.lstrip().startswith(end)), None)
            spans.append((start, stop if close is None else text.index(close, stop) + len(close)))
        return text, spans

    @cached_property
    def _generation_prompt(self) -> str:
        """What the template writes to open an assistant turn; empty if that cannot be had."""
        user = [{"role": "user", "content": "x"}]
        try:
            text, prompt = self.render(user), self.render(user, add_generation_prompt=True)
        except ValueError:
            return ""
        return prompt[len(text) :] if prompt.startswith(text) else ""

    @cached_property
    def _turn_end(self) -> int | None:
        """The first special token that the template writes behind an assistant's text."""
        chat = [{"role": "user", "content": "x"}, _wrap({"role": "assistant", "content": "y"}, 1, True, True)]
        try:
            text, marks = _lift(self.render(chat))
        except ValueError:
            return None
        special = {t.content: i for i, t in self.backend.get_added_tokens_decoder().items() if t.special}
        tail = text[marks[-1][1] :] if marks else ""
        found = min(((tail.index(t), -len(t), i) for t, i in special.items() if t in tail), default=None)
        return None if found is None else found[2]

    def _spans_by_sentinel(self, messages: list[Message], tools: list | None) -> tuple[str, list[Span]]:
        text = self.render(messages, tools)
        turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        for before, behind in ((True, True), (False, True), (True, False)):
            wrapped = [_wrap(m, i, before, behind) if i in turns else m for i, m in enumerate(messages)]
            clean, marks = _lift(self.render(wrapped, tools))
            if clean == text and {number // 2 for number, _ in marks} == set(turns):
                break
        else:
            raise ValueError(
                "the chat template has no {% generation %} marks and omits or alters assistant texts, so they cannot "
                "be found in what it renders; put {% generation %}...{% endgeneration %} around them in the template"
            )
        spans: list[Span] = []
        for turn in turns:
            places = [place for number, place in marks if number // 2 == turn]
            prompt = self._generation_prompt
            if not prompt:  # then the turn opens where the prompt for it ends
                prompt = self.render(messages[:turn], tools, add_generation_prompt=True)
                prompt = prompt if text.startswith(prompt) else ""
            span = self._span(text, prompt, min(places), max(places))
            if spans and span[0] < spans[-1][1]:
                raise ValueError(f"the chat template writes no end-of-turn token before the turn of message {turn}")
            spans.append(span)
        return text, spans

    def _span(self, text: str, prompt: str, first: int, last: int) -> Span:
        """Widen [first, last) to the turn: from the end of the generation prompt to that of the end-of-turn token."""
        ends = self.turn_ends
        start = text.rfind(prompt, 0, first) + len(prompt)
        if not prompt or start < len(prompt) or any(end in text[start:first] for end in ends):
            raise ValueError(
                f"the chat template has no {{% generation %}} marks and its generation prompt {prompt!r} does not open "
                f"this assistant turn: {text[max(0, first - 40) : first]!r}; add the marks to the template"
            )
        found = min(((text.index(end, last), -len(end)) for end in ends if end in text[last:]), default=None)
        if found is None:
            raise ValueError(
                f"the chat template writes none of the end-of-turn tokens {ends} behind the assistant's text; "
                "set eos_token in tokenizer_config.json to the token that ends a turn"
            )
        return start, found[0] - found[1]


def _plain(message: Message) -> Message:
    """Drop keys that are None and give reasoning under the names that templates read, as transformers does."""
    message = {key: value for key, value in message.items() if value is not None}
    names = ("reasoning_content", "thinking", "reasoning")
    reasoning = next((message[name] for name in names if name in message), None)
    return message if reasoning is None else {"thinking": reasoning, **message, "reasoning_content": reasoning}


def _wrap(message: Message, index: int, before: bool, behind: bool) -> Message:
    """Put message `index`'s own sentinels around its text, inside outer white space, and its first call's name."""
    opening = chr(SENTINEL + 2 * index) if before else ""
    closing = chr(SENTINEL + 2 * index + 1) if behind else ""
    core = (message.get("content") or "").strip()
    if core:
        head, _, tail = message["content"].partition(core)
        message = {**message, "content": head + opening + core + closing + tail}
    if message.get("tool_calls"):
        call, *others = message["tool_calls"]
        named = {**call.get("function", call), "name": opening + call.get("function", call)["name"] + closing}
        message = {**message, "tool_calls": [{**call, "function": named} if "function" in call else named, *others]}
    return message


def _lift(text: str) -> tuple[str, list[tuple[int, int]]]:
    """Take the sentinels out of `text`: the rest, and each sentinel's number and place in the rest."""
    parts = SENTINELS.split(text)
    clean, marks = "", []
    for chunk, sentinel in zip(parts[::2], [*parts[1::2], ""], strict=True):
        clean += chunk
        if sentinel:
            marks.append((ord(sentinel) - SENTINEL, len(clean)))
    return clean, marks
