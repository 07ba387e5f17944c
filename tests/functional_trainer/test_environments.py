"""Episodes: which ids a policy sees and which are trained, tools and what goes wrong with them, limits, what ships."""

import asyncio
import json
import random
import sqlite3
import threading
import time
from collections.abc import Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any, Literal

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.utils import get_json_schema

from experiments.first_light.make_tokenizer import FOLDER
from functional_trainer import advantages, environments, tree
from functional_trainer.ahead import Ahead
from functional_trainer.data import Tokenizer
from functional_trainer.engines import Episode, Sample, Sampling
from functional_trainer.engines.local import LocalEngine
from functional_trainer.engines.remote import RemoteEngine
from functional_trainer.environments import Environment, Step, adapters, shipped, stage, tools
from functional_trainer.environments.episodes import Episodes, report, rewarded
from functional_trainer.environments.tools import Call, Tools
from functional_trainer.environments.turns import Turns
from functional_trainer.experience import Plan
from functional_trainer.rollouts import Prompt, Prompts, Scores
from tests.functional_trainer import servers
from tests.functional_trainer.test_data_chat import CHATML, LLAMA, QWEN3, QWEN3_PLAIN, write_folder
from tests.models import small

SAMPLING = Sampling(max_tokens=400, seed=3)
text = st.text(st.characters(codec="ascii", exclude_characters="<|>\r\n\x00"), min_size=1, max_size=8)


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    root = tmp_path_factory.mktemp("templates")
    two = [{"name": "default", "template": CHATML}, {"name": "tool_use", "template": QWEN3}]
    templates = {"chatml": CHATML, "llama": LLAMA, "qwen3": QWEN3, "qwen3_plain": QWEN3_PLAIN, "two": two}
    ends = {"llama": "<|eot|>"}
    folders = {name: write_folder(root / name, t, ends.get(name, "<|im_end|>")) for name, t in templates.items()}
    return {"shipped": Tokenizer(FOLDER)} | {name: Tokenizer(folder) for name, folder in folders.items()}


@dataclass
class Script:
    """An engine that says what it is told to, turn by turn, and remembers its prompts."""

    turns: list[list[list[int]]]
    version: int = 0
    stop: Sequence[int] = ()
    prompts: list[list[list[int]]] = field(default_factory=list)
    asked: list[Sampling] = field(default_factory=list)

    def generate(self, prompts, sampling, begun) -> list[Sample]:
        self.prompts.append([[*prompt, *one.tokens] for prompt, one in zip(prompts, begun, strict=True)])
        self.asked.append(sampling)
        self.version += 1
        return [self.more(*one, sampling) for one in zip(begun, self.turns[len(self.prompts) - 1], strict=True)]

    def more(self, begun: Sample, ids: list[int], sampling: Sampling) -> Sample:
        """Say the next turn, as far as an engine goes."""
        ids = ids[: min(sampling.budget, sampling.max_tokens - len(begun.tokens))]
        tokens, logprobs = begun.tokens + ids, begun.logprobs + [-0.5 - i for i in range(len(ids))]
        unended: Any = "length" if len(tokens) == sampling.max_tokens else "abort"
        reason = "stop" if ids[-1] in self.stop else unended
        return Sample(tokens, logprobs, reason, begun.versions + [self.version] * len(ids))

    def update(self, params, version):
        raise NotImplementedError


class Talk(Environment):
    """It says what its row lists, one list of messages after each turn, and is over when there is no more."""

    def reset(self, row):
        self.left = list(row["answers"])
        return row["opening"]

    def step(self, messages):
        return Step(self.left.pop(0), 0.25) if self.left else Step([{"role": "user", "content": "bye"}], 1.0, True)


def user(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}


def encoded(tokenizer: Tokenizer, words: str) -> list[int]:
    """Return a turn as a policy would say it, end-of-turn token included."""
    return [*tokenizer.encode(words), tokenizer.eos_ids[0]]


def play(episodes: Episodes, script: Script, rows: list[dict], sampling: Sampling = SAMPLING) -> list[Sample]:
    script.stop = episodes.turns.tokenizer.eos_ids
    prompts = [episodes.turns.prompt(opening) for opening in episodes.openings(rows)]
    return episodes(script, prompts, rows, sampling)


# ids and masks --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["shipped", "chatml", "llama"])
@settings(max_examples=20, deadline=None)
@given(dialogue=st.lists(st.tuples(text, text), min_size=1, max_size=4))
def test_an_episode_has_the_ids_and_the_mask_of_the_whole_chat(tokenizers, name, dialogue):
    """Of templates that render a beginning of a chat as they render it within the whole."""
    tokenizer = tokenizers[name]
    asked, said = [q.strip() or "q" for q, _ in dialogue], [a.strip() or "a" for _, a in dialogue]
    script = Script([[encoded(tokenizer, words)] for words in said])
    row = {"opening": [user(asked[0])], "answers": [[user(q)] for q in asked[1:]]}
    episodes = Episodes(Talk, tokenizer)
    (sample,) = play(episodes, script, [row])
    chat = [m for q, a in zip(asked, said, strict=True) for m in (user(q), {"role": "assistant", "content": a})]
    ids, mask = tokenizer.encode_chat(chat)
    opening = episodes.turns.prompt(row["opening"])
    size = len(opening) + len(sample.tokens)
    assert opening + sample.tokens == ids[:size] and sample.sampled == mask[len(opening) : size]
    assert not any(mask[size:]) and len(ids) - size < 3  # what a template writes behind the end of a turn
    assert sample.reward == 1 + 0.25 * (len(said) - 1) and sample.finish_reason == "stop"
    assert [m["content"] for m in sample.episode.messages if m["role"] == "assistant"] == said


@pytest.mark.parametrize("name", ["shipped", "chatml", "llama", "qwen3", "qwen3_plain"])
@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_what_was_sampled_is_never_tokenized_again(tokenizers, name, data):
    """By identity: the next prompt holds the very objects that were sampled, in an order that no tokenizer gives."""
    tokenizer = tokenizers[name]
    end = tokenizer.eos_ids[0]
    ids = st.integers(257, tokenizer.vocab_size - 1).filter(lambda i: i not in tokenizer.eos_ids)
    turns = [
        [[int(str(i)) for i in data.draw(st.lists(ids, min_size=1, max_size=5))] + [end] for _ in range(2)]
        for _ in range(3)
    ]
    rows = [{"opening": [user(f"begin {i}")], "answers": [[user("on")], [user("and on")]]} for i in range(2)]
    script = Script(turns)
    samples = play(Episodes(Talk, tokenizer), script, rows)
    for i, sample in enumerate(samples):
        said = [id_ for turn in turns for id_ in turn[i]]
        kept = [id_ for id_, mine in zip(sample.tokens, sample.sampled, strict=True) if mine]
        assert len(kept) == len(said) and all(a is b for a, b in zip(kept, said, strict=True))
        for turn in (1, 2):
            before, now = script.prompts[turn - 1][i], script.prompts[turn][i]
            new = turns[turn - 1][i]
            assert now[: len(before)] == before and len(now) > len(before) + len(new)
            assert all(a is b for a, b in zip(now[len(before) :], new, strict=False))
        for at, mine in enumerate(sample.sampled):
            assert mine or sample.logprobs[at] == 0
        assert [v for v, mine in zip(sample.versions, sample.sampled, strict=True) if mine] == [
            turn + 1 for turn in range(3) for _ in turns[turn][i]
        ]
        assert sample.versions == sorted(sample.versions)


AFTER = {
    "user": [user("what now?")],
    "several": [user("one"), user("two")],
    "tools": [{"role": "tool", "content": "12", "tool_call_id": "call_0"}, {"role": "tool", "content": "<b> é"}],
    "tool, user": [{"role": "tool", "content": "12"}, user("and?")],
}


@pytest.mark.parametrize(
    ("name", "offers"),
    [("shipped", False), ("qwen3", False), ("qwen3_plain", False), ("shipped", True), ("qwen3", True), ("two", True)],
)
@pytest.mark.parametrize("after", AFTER)
def test_between_turns_stands_what_the_template_writes_there(tokenizers, name, offers, after):
    """The rendering of the whole chat, behind the last token of the policy's turn, encoded; tools may have a template
    of their own."""
    tokenizer, offered = tokenizers[name], [tools.schema(nothing)] if offers else None
    turns = Turns(tokenizer, offered or ())
    turn: dict[str, Any] = {"role": "assistant", "content": "said"}
    if AFTER[after][0]["role"] == "tool":
        turn["tool_calls"] = [{"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}]
    whole = tokenizer.render([user("begin"), turn, *AFTER[after]], offered, add_generation_prompt=True)
    end = tokenizer.turn_ends[0]
    behind = whole[whole.index(end, whole.index("said")) + len(end) :]
    assert turns.between(AFTER[after]) == tokenizer.encode(behind)
    assert tokenizer.decode(turns.between(AFTER[after]), skip_special=False) == behind


def test_an_environment_does_not_speak_for_the_policy(tokenizers):
    for messages in ([], [{"role": "assistant", "content": "I won"}]):
        with pytest.raises(ValueError, match="at least one message, and with none of an assistant"):
            Turns(tokenizers["shipped"]).between(messages)


# tools ----------------------------------------------------------------------------------------------------------------


def functions():
    """Return tools that travel to a process by value: this module imports much."""

    def search(query: str, most: int = 3, exact: bool = False, kinds: list[str] | None = None) -> list[str]:
        """Search the library.

        It looks at titles only.

        Args:
            query: What to look for
            most: Most titles that
                are returned
            exact: Whether case counts
            kinds: Kinds of books
        """
        return [query] * most

    def order(unit: Literal["piece", "box"], prices: dict[str, float], rate: float) -> str:
        """Order something.

        Args:
            unit: How it is counted
            prices: Of each thing
            rate: Of exchange

        Returns:
            A text
        """
        return f"{unit} {prices} {rate}"

    def nothing() -> None:
        """Do nothing."""

    def moody(kind: str) -> str:
        """Behave.

        Args:
            kind: How
        """
        if kind == "raise":
            raise KeyError("gone")
        if kind == "exit":
            raise SystemExit(3)
        while kind == "hang":
            time.sleep(1)
        return kind

    return search, order, nothing, moody


search, order, nothing, moody = functions()


@pytest.mark.parametrize("function", [search, order, nothing, shipped.calculate])
def test_a_schema_is_that_of_transformers(function):
    theirs = get_json_schema(function)
    theirs["function"].pop("return", None)  # OpenAI's form has none
    assert tools.schema(function) == theirs


def untyped(x):
    """Do it.

    Args:
        x: A thing
    """


def odd(x: bytes):
    """Do it.

    Args:
        x: A thing
    """


def silent(x: int):
    """Do it."""


def many(*x: int):
    """Do it."""


def bare(x: int):
    pass


@pytest.mark.parametrize(
    ("function", "said"),
    [
        (untyped, "untyped: x has no type"),
        (odd, "odd: a type is none of JSON's: str, int,"),
        (silent, "silent: its docstring has no line for x"),
        (many, "many: a model gives arguments by name, so it cannot have x"),
        (bare, "bare has no docstring"),
    ],
)
def test_a_function_that_cannot_be_a_tool_is_refused(function, said):
    with pytest.raises(ValueError, match=said):
        tools.schema(function)
    with pytest.raises(ValueError, match="two tools have the same name"):
        Tools([nothing, nothing])


def test_whatever_goes_wrong_is_told():
    given = [
        Call("moody", {"kind": "fine"}), Call("search", {"query": "x", "most": 2}), Call("nothing", {}),
        Call("moody", {"kind": "raise"}), Call("moody", {"kind": "exit"}), Call("moody", {"kind": "hang"}),
        Call("mood", {}), Call("moody", {}), Call("moody", {"kind": "x", "more": 1}), Call("moody", {"kind": 3}),
        Call("search", {"query": "x", "most": True}), Call("search", {"query": "x", "kinds": ["a", 1]}),
        Call("order", {"unit": "ton", "prices": {}, "rate": 1}),
        Call("order", {"unit": "box", "prices": {"a": "b"}, "rate": 1}),
        Call("order", {"unit": "box", "prices": {"a": 1}, "rate": 2}), Call("", {}, "the call is no JSON (x)"),
    ]  # fmt: skip
    called = Tools([moody, search, nothing, order], workers=1, seconds=0.5)
    found = called(given)
    called.close()
    assert [result.text for result in found] == [
        "fine", '["x", "x"]', "null",
        "Error: KeyError: 'gone'", "Error: SystemExit: 3", "Error: took over 0.5 s",
        "Error: there is no tool mood, only moody, search, nothing, order", "Error: moody needs kind",
        "Error: moody takes kind, not more", "Error: kind is 3, expected a string",
        "Error: most is true, expected an integer", "Error: kinds[1] is 1, expected a string",
        'Error: unit is "ton", expected one of ["piece", "box"]', 'Error: prices.a is "b", expected a number',
        "box {'a': 1} 2", "Error: the call is no JSON (x)",
    ]  # fmt: skip
    assert [result.failed for result in found] == [result.text.startswith("Error") for result in found]


@pytest.mark.parametrize("name", ["shipped", "qwen3", "qwen3_plain", "two"])
def test_calls_are_read_as_the_template_writes_them(tokenizers, name):
    tokenizer = tokenizers[name]
    turns = Turns(tokenizer, [tools.schema(search)])
    named = [{"name": "search", "arguments": {"query": "a {b}", "most": 2}}, {"name": "other", "arguments": {}}]
    calls = [{"type": "function", "id": f"call_{i}", "function": one} for i, one in enumerate(named)]
    for content in ("", "I look"):
        message = {"role": "assistant", "content": content, "tool_calls": calls}
        ids, mask = tokenizer.encode_chat([user("q"), message], turns.tools)
        found, read = turns.read([i for i, mine in zip(ids, mask, strict=True) if mine])
        assert found["content"] == content and found["tool_calls"] == calls
        assert read == [Call("search", {"query": "a {b}", "most": 2}), Call("other", {})]


@pytest.mark.parametrize(
    ("body", "said"),
    [("{", "no JSON"), ("[1]", "a name and argu"), ('{"name": "f"}', "a name and argu"), ("[" * 9999, "no JSON")],
)
def test_a_broken_call_is_a_call_with_what_is_wrong(tokenizers, body, said):
    turns = Turns(tokenizers["shipped"], [tools.schema(nothing)])
    (call,) = turns.read(encoded(tokenizers["shipped"], "<|call|>" + body))[1]
    assert said in call.wrong
    assert Turns(tokenizers["shipped"]).read(encoded(tokenizers["shipped"], "<|call|>" + body))[1] == []


def test_thoughts_are_no_answer(tokenizers):
    message, calls = Turns(tokenizers["qwen3"]).read(encoded(tokenizers["qwen3"], "<think>\nhm, 3?\n</think>\n\n4"))
    assert message == {"role": "assistant", "content": "4", "reasoning_content": "hm, 3?"} and calls == []


@pytest.mark.parametrize("name", ["chatml", "llama"])
def test_a_template_without_tools_is_refused(tokenizers, name):
    with pytest.raises(ValueError, match="writes no tool call as an object"):
        Turns(tokenizers[name], [tools.schema(nothing)])


def calling(tokenizer: Tokenizer, *expressions: str) -> list[int]:
    named = [{"name": "calculate", "arguments": {"expression": e}} for e in expressions]
    return encoded(tokenizer, "".join(f"<|call|>{json.dumps(one)}" for one in named))


def test_tools_answer_in_their_turn_and_are_counted(tokenizers):
    tokenizer = tokenizers["shipped"]
    rows = [{"question": f"What is {n} * 3?", "answer": str(3 * n)} for n in (41, 42, 43)]
    ends = [encoded(tokenizer, "123"), encoded(tokenizer, "126")]
    script = Script([[calling(tokenizer, "41 * 3"), calling(tokenizer, "42 *", "1 + 1"), ends[0]], ends])
    episodes = Episodes(shipped.Calculator, tokenizer)
    samples = play(episodes, script, rows)
    episodes.close()
    assert [s.reward for s in samples] == [1, 1, 0] and [s.episode.turns for s in samples] == [2, 2, 1]
    told = [[m for m in s.episode.messages if m["role"] == "tool"] for s in samples]
    assert [m["content"] for m in told[0]] == ["123"]
    assert [m["content"] for m in told[1]] == ["Error: ValueError: '42 *' is no expression", "2"]
    assert [(s.episode.calls, s.episode.failures) for s in samples] == [(1, 0), (2, 1), (0, 0)]
    between = samples[0].tokens[len(script.turns[0][0]) : -len(ends[0])]
    assert tokenizer.decode(between, skip_special=False) == "<|tool|>123<|assistant|>"
    assert len(script.prompts[1]) == 2, "who is done is not asked"
    assert report(samples) == {
        "num_turns/mean": 5 / 3, "num_turns/min": 1, "num_turns/max": 2, "tools/call_frequency": 1.0,
        "tools/failure_frequency": 1 / 3, "environment/raised": 0,
    }  # fmt: skip


# limits ---------------------------------------------------------------------------------------------------------------


def test_limits_cut_off(tokenizers):
    tokenizer = tokenizers["shipped"]
    row = {"opening": [user("q")], "answers": [[user("go on")]] * 5}
    turn, between = encoded(tokenizer, "12"), Turns(tokenizer).between([user("go on")])
    one, two = len(turn), 2 * len(turn) + len(between)

    def cut(most=400, **how) -> tuple[int, str, float, Script]:
        script = Script([[turn]] * 9)
        (sample,) = play(Episodes(Talk, tokenizer, **how), script, [row], Sampling(max_tokens=most, seed=1))
        assert sample.sampled[-1] and len(sample.sampled) == len(sample.tokens) == len(sample.logprobs)
        return len(sample.tokens), sample.finish_reason, sample.reward, script

    whole = 6 * len(turn) + 5 * len(between)
    assert cut()[:3] == (whole, "stop", 2.25)
    assert cut(turns=2)[:3] == (two, "length", 0.5)
    assert cut(turns=6)[:3] == (whole, "stop", 2.25)
    assert cut(turn_tokens=len(turn) - 1)[:3] == (len(turn) - 1, "length", 0)
    assert cut(most=two)[:3] == (two, "length", 0.5)
    assert cut(most=two - 1)[:3] == (two - 1, "length", 0.25), "the second turn is cut"
    assert cut(most=one + len(between))[:3] == (one, "length", 0.25), "no token is left for another turn"
    script = cut(most=two, turn_tokens=len(turn) + 1)[3]
    assert [(how.max_tokens, how.budget) for how in script.asked] == [(two, len(turn) + 1)] * 2
    with pytest.raises(ValueError, match="turns 0, turn_tokens 5: each must be at least 1"):
        Episodes(Talk, tokenizer, turns=0, turn_tokens=5)


def test_a_turn_ends_where_its_episode_has_no_room_left(tokenizers):
    """Though others of the same call of the engine have more."""
    tokenizer = tokenizers["shipped"]
    rows = [{"opening": [user("q")], "answers": [[user("on" * n)]]} for n in (1, 3)]
    turn = encoded(tokenizer, "123456")
    gaps = [len(Turns(tokenizer).between(row["answers"][0])) for row in rows]
    most = len(turn) * 2 + gaps[0]
    assert gaps[0] < gaps[1] < gaps[0] + len(turn)
    short, long = play(Episodes(Talk, tokenizer), Script([[turn, turn]] * 2), rows, Sampling(max_tokens=most))
    assert (len(short.tokens), short.finish_reason, short.reward) == (most, "stop", 1.25)
    assert (len(long.tokens), long.finish_reason, long.reward) == (most, "length", 0.25)
    assert sum(long.sampled) == 2 * len(turn) - (gaps[1] - gaps[0])


# what goes wrong with environments ------------------------------------------------------------------------------------


class Broken(Talk):
    """It fails as its row says."""

    def reset(self, row):
        self.how = row["how"]
        if self.how == "reset" and "opened" in row:
            raise RuntimeError("no")
        row["opened"] = row.get("opened", 0) + 1
        opening = f"{row['opened']}" if self.how == "unstable" else "q"
        return super().reset(row | {"opening": [user(opening)], "answers": []})

    def step(self, messages):
        broken = {"assistant": Step([{"role": "assistant", "content": "x"}]), "none": None, "silent": Step()}
        if self.how == "step":
            raise SystemExit("over")
        return broken[self.how] if self.how in broken else super().step(messages)


def test_an_environment_that_fails_costs_its_episode(tokenizers):
    hows = ("fine", "reset", "unstable", "step", "assistant", "none", "silent")
    rows: list[dict] = [{"how": how} for how in hows]
    turn = encoded(tokenizers["shipped"], "1")
    samples = play(Episodes(Broken, tokenizers["shipped"]), Script([[turn] * 5]), rows)
    assert [s.reward for s in samples] == [1.0] + [None] * 6
    assert [s.finish_reason for s in samples] == ["stop"] + ["abort"] * 6
    assert [len(s.tokens) for s in samples] == [len(turn), 0, 0, *[len(turn)] * 4]
    errors = [s.episode.error for s in samples]
    for error, part in zip(errors, ("", "RuntimeError: no", "depend on the row", "SystemExit: over"), strict=False):
        assert part in error and bool(part) == bool(error)
    assert report(samples)["environment/raised"] == 6
    assert rewarded(samples, [0.5] * 7) == [1.5] + [None] * 6, "a lost episode has no reward, whatever functions say"


class Paid(Environment):
    def reset(self, row):
        self.left = list(row["rewards"])
        return [user("q")]

    def step(self, messages):
        return Step([user("on")], self.left.pop(0), not self.left)


def test_rewards_that_are_no_finite_numbers_cost_their_episode(tokenizers):
    nan, inf = float("nan"), float("inf")
    given = [[inf], [-inf], [nan], ["1"], [None], [10**400], [1.5, inf], [1e308, 1e308], [True], [np.float32(0.5), 2]]
    turn = encoded(tokenizers["shipped"], "1")
    rows = [{"rewards": rewards} for rewards in given]
    samples = play(Episodes(Paid, tokenizers["shipped"]), Script([[turn] * 10, [turn] * 3]), rows)
    assert [s.reward for s in samples] == [None] * 8 + [1.0, 2.5]
    errors = [s.episode.error for s in samples]
    for i, said in ((0, "inf"), (1, "-inf"), (2, "nan"), (3, "'1'"), (6, "inf"), (7, "1e+308")):
        assert errors[i] == f"ValueError: a Step's reward is {said}: what an episode gets must be a finite number"
    assert all(errors[:8]) and report(samples)["environment/raised"] == 8


class Counted(Talk):
    """It counts how many are open."""

    now, most = 0, 0

    def reset(self, row):
        if row["n"] == 8:
            raise RuntimeError("the eighth")
        Counted.now += 1
        Counted.most = max(Counted.most, Counted.now)
        return [user(f"q {row['n']}")]

    def close(self):
        Counted.now -= 1


def test_openings_are_asked_for_a_few_at_a_time(tokenizers):
    episodes, rows = Episodes(Counted, tokenizers["shipped"]), [{"n": n} for n in range(11)]
    assert episodes.openings(rows[:8], 3) == [[user(f"q {n}")] for n in range(8)]
    assert Counted.most == 3 and Counted.now == 0
    with pytest.raises(ValueError, match="row 9 of 11 has no opening: RuntimeError: the eighth"):
        episodes.openings(rows, 3)
    episodes.close()


class Odd(Environment):
    """Returns from a method what its row says."""

    def reset(self, row):
        self.row = row
        return row.get("reset", [user("q")])

    def step(self, messages):
        return self.row["step"]

    @staticmethod
    def rows():
        return [{}]


@pytest.mark.parametrize("said", ["a text", [], [user("q"), "a text"], [{"role": "user"}], 3])
def test_what_are_no_messages_is_said(said, tokenizers):
    """Of an opening before the run begins; of an answer it costs the episode."""
    episodes = Episodes(Odd, tokenizers["shipped"])
    with pytest.raises(ValueError, match=r"row 2 of 2 has no opening: TypeError: reset returned .*, not messages as"):
        episodes.openings([{}, {"reset": said}])
    rows = [{"step": Step(said)}, {"step": said}, {"step": Step([user("q")], 1.0, True)}]
    samples = play(episodes, Script([[encoded(tokenizers["shipped"], "Add")] * 3]), rows)
    errors = [sample.episode.error for sample in samples]
    assert errors[0].startswith("TypeError: step returned ") and "not messages" in errors[0] and not errors[2]
    assert errors[1].startswith("TypeError: step returned ") and "not Step(messages, reward, done)" in errors[1]
    episodes.close()


def test_what_is_no_environment_is_said(tokenizers):
    with pytest.raises(ValueError, match="environment SimpleNamespace has no reset, step, tools, close: derive"):
        Episodes(SimpleNamespace, tokenizers["shipped"])
    with pytest.raises(ValueError, match=r"environment odd: rows\(\) must return two lists of rows"):
        environments.rows("odd", Odd)


def test_rewards_of_functions_are_added():
    plain, episode = Sample([1], [0.0], "stop", [0]), Episode([], 1, 0, 0)
    played = plain._replace(reward=0.25, episode=episode)
    assert rewarded([plain, plain, played, played], [None, 2.0, None, 2.0]) == [None, 2.0, 0.25, 2.25]
    assert report([plain]) == {}


class Slow(Talk):
    """Its methods are coroutines; each waits for the others of its turn."""

    opened: list[Any] = []
    closed: list[Any] = []

    async def reset(self, row):
        await asyncio.sleep(0.05)
        self.how = row["how"]
        Slow.opened.append(self)
        return super().reset(row)

    async def step(self, messages):
        await asyncio.sleep(60 if self.how == "hangs" else 0.05)
        return super().step(messages)

    async def close(self):
        Slow.closed.append(self)


def test_asynchronous_environments_wait_together(tokenizers):
    rows = [{"opening": [user("q")], "answers": [], "how": how} for how in ["fine"] * 20 + ["hangs"]]
    turn = encoded(tokenizers["shipped"], "1")
    episodes = Episodes(Slow, tokenizers["shipped"], seconds=0.5)
    begun = time.monotonic()
    samples = play(episodes, Script([[turn] * 21]), rows)
    assert time.monotonic() - begun < 3 and {*map(id, Slow.opened)} == {*map(id, Slow.closed)}
    episodes.close()
    assert [s.reward for s in samples] == [1.0] * 20 + [None]
    assert samples[-1].episode.error.startswith("TimeoutError")


class Stuck(Talk):
    """It hangs where and as its row says: it computes, sleeps, or lets no other coroutine go on."""

    def __init__(self):
        self.how = ""

    def hang(self, where):
        if self.how == f"computes in {where}":
            while True:
                pass
        if self.how == f"sleeps in {where}":
            time.sleep(3)

    def reset(self, row):
        self.how = row["how"] if "opened" in row else ""
        row["opened"] = True
        self.hang("reset")
        return super().reset(row | {"opening": [user("q")], "answers": [[user("on")]]})

    def step(self, messages):
        self.hang("step")
        return super().step(messages)

    def close(self):
        self.hang("close")


def test_an_environment_that_hangs_costs_its_episode(tokenizers):
    hows = ["", "computes in step", "", "sleeps in step", "computes in reset", "computes in close", ""]
    turn = encoded(tokenizers["shipped"], "1")
    episodes = Episodes(Stuck, tokenizers["shipped"], seconds=0.2)
    begun, before = time.monotonic(), threading.active_count()
    samples = play(episodes, Script([[turn] * 6, [turn] * 4]), [{"how": how} for how in hows])
    assert time.monotonic() - begun < 2
    assert [s.reward for s in samples] == [1.25, None, 1.25, None, None, 1.25, 1.25]
    errors = ["step", "step", "reset"]
    errors = [f"TimeoutError: its {name} took over 0.2 s (--rollout.tool-seconds)" for name in errors]
    assert [s.episode.error for s in samples if s.episode.error] == errors
    assert report(samples)["environment/raised"] == 3
    episodes.close()
    time.sleep(0.1)
    assert threading.active_count() <= before + 1, "what computes is ended; one still sleeps"
    with pytest.raises(ValueError, match="row 1 of 1 has no opening: TimeoutError: its reset took over 0.2 s"):
        Episodes(Stuck, tokenizers["shipped"], seconds=0.2).openings([{"how": "sleeps in reset", "opened": True}])


class Stubborn(Talk):
    """Coroutines that will not be cancelled, or let no other go on."""

    async def step(self, messages):
        if self.how == "stubborn":
            for _ in range(9):
                with suppress(asyncio.CancelledError):
                    await asyncio.sleep(1)
        if self.how == "blocks":
            time.sleep(2)
        if self.how == "exits":
            raise SystemExit("over")
        return super().step(messages)

    def reset(self, row):
        self.how = row["how"]
        return super().reset(row)


@pytest.mark.parametrize(
    ("hows", "rewards"),
    [(["", "stubborn", "exits", ""], [1.0, None, None, 1.0]), (["", "blocks", "", ""], [1.0, None, None, None])],
)
def test_a_coroutine_that_does_not_end_costs_its_episode_or_those_that_wait_for_it(
    tokenizers, monkeypatch, hows, rewards
):
    monkeypatch.setattr(stage, "SLACK", 0.2)
    turn = encoded(tokenizers["shipped"], "1")
    episodes = Episodes(Stubborn, tokenizers["shipped"], seconds=0.2)
    begun = time.monotonic()
    for how in (hows, [""] * 4):
        rows = [{"opening": [user("q")], "answers": [], "how": one} for one in how]
        samples = play(episodes, Script([[turn] * 4]), rows)
        wanted = rewards if how is hows else [1.0] * 4
        assert [s.reward for s in samples] == wanted
    assert time.monotonic() - begun < 2
    episodes.close()


class Noted(Talk):
    """It notes when it is closed, and whether it was in a step then."""

    closed: list[tuple[str, bool]] = []

    def reset(self, row):
        self.how, self.busy = row["how"], False
        return super().reset(row | {"opening": [user("q")], "answers": []})

    def step(self, messages):
        self.busy = True
        try:
            if self.how == "computes":
                while True:
                    pass
            if self.how == "sleeps":
                time.sleep(1)
            return super().step(messages)
        finally:
            self.busy = False

    def close(self):
        Noted.closed.append((self.how, self.busy))


class NotedAsync(Noted):
    async def step(self, messages):
        self.busy = True
        with suppress(asyncio.CancelledError):
            await asyncio.sleep(0 if self.how == "fine" else 1)
        if self.how == "sleeps":
            await asyncio.sleep(1)
        self.busy = False
        return Step(done=True)


@pytest.mark.parametrize("kind", [Noted, NotedAsync])
def test_an_environment_is_not_closed_while_it_runs(tokenizers, kind):
    """One that has ended, since it was told to, is closed."""
    turn = encoded(tokenizers["shipped"], "1")
    episodes = Episodes(kind, tokenizers["shipped"], seconds=0.2)
    rows = [{"how": how} for how in ("computes", "sleeps", "fine")]
    episodes.openings(rows)
    Noted.closed.clear()
    samples = episodes(
        Script([[turn] * 3], stop=tokenizers["shipped"].eos_ids),
        [episodes.turns.prompt([user("q")])] * 3,
        rows,
        SAMPLING,
    )
    assert [s.reward is None for s in samples] == [True, True, False]
    assert Noted.closed == [("computes", False), ("fine", False)]
    episodes.close()


class Bound(Talk):
    """Its connection is one of the thread that opened it, as sqlite3's are."""

    def reset(self, row):
        self.how, self.base = row["how"], sqlite3.connect(":memory:")
        return super().reset(row | {"opening": [user("q")], "answers": []})

    def step(self, messages):
        time.sleep(0.5 if self.how == "sleeps" else 0)
        self.base.execute("select 1")
        return super().step(messages)


def test_all_calls_are_of_one_thread_until_one_hangs(tokenizers):
    turn = encoded(tokenizers["shipped"], "1")
    episodes = Episodes(Bound, tokenizers["shipped"], seconds=0.2)
    for hows, lost in ((["fine"] * 3, [""] * 3), (["fine", "sleeps", "fine"], ["", "its step took", "thread"])):
        samples = play(episodes, Script([[turn] * 3]), [{"how": how} for how in hows])
        for sample, part in zip(samples, lost, strict=True):
            assert part in sample.episode.error and bool(part) == bool(sample.episode.error)
    episodes.close()


class Busy(Talk):
    """Coroutines that each take a part of the loop's time, before they wait and after."""

    async def step(self, messages):
        time.sleep(0.03)
        await asyncio.sleep(0)
        time.sleep(0.03)
        return super().step(messages)


def test_many_coroutines_are_not_one_that_hangs(tokenizers, monkeypatch):
    monkeypatch.setattr(stage, "SLACK", 0.1)
    turn = encoded(tokenizers["shipped"], "1")
    episodes = Episodes(Busy, tokenizers["shipped"], seconds=0.3)
    samples = play(episodes, Script([[turn] * 10]), [{"opening": [user("q")], "answers": []}] * 10)
    assert [s.reward for s in samples] == [1.0] * 10
    episodes.close()


def test_tools_are_of_one_kind(tokenizers):
    class Both(Talk):
        tools = (nothing, tools.schema(search))

    with pytest.raises(ValueError, match="not some of each"):
        Episodes(Both, tokenizers["shipped"])


def test_an_environment_may_answer_calls_itself(tokenizers):
    class Own(Talk):
        tools = (tools.schema(search),)

        def step(self, messages):
            (call,) = messages[-1]["tool_calls"]
            return Step(reward=len(call["function"]["arguments"]["query"]), done=True)

    row = {"opening": [user("q")], "answers": []}
    turn = encoded(tokenizers["shipped"], '<|call|>{"name": "search", "arguments": {"query": "four"}}')
    (sample,) = play(Episodes(Own, tokenizers["shipped"]), Script([[turn]]), [row])
    assert sample.reward == 4 and sample.episode.calls == 1


# engines --------------------------------------------------------------------------------------------------------------

MODEL = small.model(num_hidden_layers=1, vocab_size=384, mlp_only_layers=[])
PARAMS = MODEL.init(0)
MANY = Sampling(max_tokens=60, stop=tuple(range(0, 384, 4)), seed=5)
"""Turns end soon."""
LONG = [{"opening": [user("x" * (1 + 5 * (i % 2)))], "answers": [[user("on" * (1 + i))]] * (i % 4)} for i in range(8)]


def test_an_episode_is_the_same_whoever_else_plays(tokenizers):
    """As in a part of the rollout, on a rank of its own."""
    episodes = Episodes(Talk, tokenizers["shipped"], turn_tokens=9)
    prompts = [episodes.turns.prompt(opening) for opening in episodes.openings(LONG)]
    engine = LocalEngine(MODEL, PARAMS, slots=5, length=80)
    whole = episodes(engine, prompts, LONG, MANY)
    assert len({s.episode.turns for s in whole}) > 2 and {s.finish_reason for s in whole} == {"stop", "length"}
    for part in (range(3), range(3, 8), [7, 2, 5]):
        rows = [LONG[i] for i in part]
        found = episodes(engine, [prompts[i] for i in part], rows, replace(MANY, numbers=tuple(part)))
        assert [s.tokens for s in found] == [whole[i].tokens for i in part]


def test_each_turn_has_random_numbers_of_its_own(tokenizers):
    """A policy to which all tokens are alike at all times says something else in every turn."""
    episodes = Episodes(Talk, tokenizers["shipped"])
    engine = LocalEngine(MODEL, tree.map(torch.zeros_like, PARAMS), slots=1, length=80)
    (sample,) = episodes(engine, [episodes.turns.prompt(LONG[3]["opening"])], LONG[3:4], replace(MANY, seed=2))
    said = [m["content"] for m in sample.episode.messages if m["role"] == "assistant"]
    assert len(said) == len(set(said)) == 4


@pytest.mark.parametrize("kind", ["vllm", "sglang"])
def test_servers_are_asked_for_no_more_than_they_hold(tokenizers, kind):
    """One whose context has room for the longest opening and what may follow it."""
    episodes = Episodes(Talk, tokenizers["shipped"])
    prompts = [episodes.turns.prompt(opening) for opening in episodes.openings(LONG)]
    with closing(servers.KINDS[kind](MODEL, PARAMS, length=max(map(len, prompts)) + 61)) as server:
        samples = episodes(RemoteEngine(kind, [server.url], MODEL), prompts, LONG, MANY)
    assert max(sample.episode.turns for sample in samples) > 2
    assert any(len(sample.tokens) > 30 for sample in samples) and all(len(sample.tokens) <= 60 for sample in samples)


class Sick(Environment):
    """The row 2 always fails, 3 when it is played first."""

    failed = 0

    def __init__(self):
        self.row = {}

    def reset(self, row):
        self.row = row
        if row["n"] == 2 and row["plays"]:
            Sick.failed += 1
            raise RuntimeError("broken row")
        return [user(f"q {row['n']}")]

    def step(self, messages):
        self.row["plays"] += 1
        if self.row["n"] == 3 and self.row["plays"] == 1:
            Sick.failed += 1
            raise KeyError("gone")
        return Step(reward=len(messages[-1]["content"]), done=True)


@pytest.mark.parametrize(("level", "staleness"), [(1, 1), (1, 4), (2, 3)])
def test_episodes_that_are_lost_are_not_played_again_ahead_of_the_step(tokenizers, level, staleness):
    """Each prompt is asked once each time that it is drawn, and what was lost is counted once."""
    episodes = Episodes(Sick, tokenizers["shipped"], turn_tokens=4)
    rows = [{"n": n, "plays": 0} for n in range(5)]
    prompts = Prompts(Prompt(episodes.turns.prompt(o), "", row)
                      for o, row in zip(episodes.openings(rows), rows, strict=True))  # fmt: skip
    rows[2]["plays"], Sick.failed, played = 1, 0, []
    engine = LocalEngine(MODEL, PARAMS, slots=4, length=60)

    def generate(asked, seed, begun, budget):
        played.extend(prompt.columns["n"] for prompt in asked)
        assert len(played) <= 40, "as many as are asked for"
        return episodes(
            engine, [p.ids for p in asked], [p.columns for p in asked], replace(MANY, max_tokens=8, seed=seed)
        )

    def reward(asked, answers):
        return Scores(rewarded(answers, [None] * len(answers)))

    rollouts = Ahead(
        prompts, generate, reward, lambda r, sizes: advantages.grpo(r), Plan(2, 2), seq_len=60, longest=8, rows=2,
        level=level, staleness=staleness, last=10, weights=lambda: PARAMS, update=engine.update, stop=engine.pause,
    )  # fmt: skip
    lost, seen = 0, []
    for _ in range(10):
        next(rollouts)
        lost += rollouts.report()["environment/raised"]
        seen += [prompt.columns["n"] for prompt in rollouts.last.prompts]
    assert rollouts.state()["begun"] == [] and sorted(seen) == sorted(played) and len(seen) == 40
    assert lost == Sick.failed == seen.count(2) + 1
    rollouts.close()
    episodes.close()


# what ships -----------------------------------------------------------------------------------------------------------


def test_the_game_is_won_by_halving(tokenizers):
    for row in shipped.Guess.rows(0)[1]:
        game, low, high, done, reward = shipped.Guess(), row["low"], row["high"], False, 0.0
        messages = game.reset(row)
        assert str(low) in messages[0]["content"] and str(row["secret"]) not in messages[0]["content"].split()[3:4]
        while not done:
            middle = (low + high) // 2
            said, reward, done = game.step([*messages, {"role": "assistant", "content": str(middle)}])
            word = said[0]["content"] if said else ""
            low, high = (middle + 1, high) if word == "higher" else (low, middle - 1)
        assert reward == 1


def test_the_game_is_lost_after_four_guesses():
    row = {"low": 10, "high": 24, "secret": 20}
    game = shipped.Guess()
    messages = game.reset(row)
    said = ["24", "no", "19", "21"]
    steps = [game.step([*messages, {"role": "assistant", "content": one}]) for one in said]
    assert [step.messages[0]["content"] for step in steps] == ["lower", "no number", "higher", "lower"]
    assert [step.done for step in steps] == [False] * 3 + [True] and not any(step.reward for step in steps)


@pytest.mark.parametrize("name", environments.SHIPPED)
def test_rows_are_held_out(name):
    train, held_out = environments.rows(name, environments.load(name))
    keys = [{json.dumps(row, sort_keys=True) for row in rows} for rows in (train, held_out)]
    assert len(keys[0]) == len(train) > 0 < len(keys[1]) == len(held_out) and not keys[0] & keys[1]
    assert (train, held_out) == environments.load(name).rows() and train != environments.load(name).rows(1)[0]


def test_the_calculator_calculates():
    rng = random.Random(0)
    for _ in range(50):
        a, b, c = (rng.randrange(-50, 50) for _ in range(3))
        assert shipped.calculate(f"{a} * ({b} - {c}) + {a}") == a * (b - c) + a
    for bad in ("2 **", "2 ** 9", "f(1)", "1.5", "'a' * 3", "True", "", "(" * 999):
        with pytest.raises(ValueError, match="is no expression|only whole numbers"):
            shipped.calculate(bad)


def test_environments_come_by_name_or_file(tmp_path):
    file = tmp_path / "mine.py"
    imported = "from functional_trainer.environments import Environment\n"
    file.write_text(imported + "class Mine(Environment):\n    pass\nx = 1\n")
    mine = environments.load(f"{file}:Mine")
    assert mine.__mro__[1] is Environment and environments.load("guess") is shipped.Guess
    for name, said in (
        ("chess", "it can be FILE.py:NAME, calculator, guess"),
        (f"{file}:x", "no x that can be called"),
    ):
        with pytest.raises(ValueError, match=said):
            environments.load(name)
    with pytest.raises(ValueError, match=r"has no `rows\(\)` of its own: give a file of rows, --data.train"):
        environments.rows("mine", mine)


# other libraries, which are not installed here; tests/adapters has them ----------------------------------------------


@pytest.mark.parametrize("installed", ["", "0.4.0", "0.2.1"])
def test_verifiers_of_another_version_is_one_error(installed, tmp_path, monkeypatch):
    """In a file that names an environment, with the metadata that an installed library has."""
    (tmp_path / "mine.py").write_text(
        "from functional_trainer.environments.adapters import from_verifiers\n\nWordle = from_verifiers('wordle')\n"
    )
    if installed:
        (tmp_path / f"verifiers-{installed}.dist-info").mkdir()
        text = f"Metadata-Version: 2.1\nName: verifiers\nVersion: {installed}\n"
        (tmp_path / f"verifiers-{installed}.dist-info" / "METADATA").write_text(text)
        monkeypatch.syspath_prepend(tmp_path)
    found = f"{installed} is installed" if installed else "it is not installed"
    said = f"from_verifiers plays environments of verifiers 0.3, but {found}: use an environment of your own .*==0.3.1'"
    with pytest.raises(ValueError, match=f"mine.py, line 3: {said}"):
        environments.load(f"{tmp_path}/mine.py:Wordle")
    with pytest.raises(ValueError, match=said):
        adapters.from_verifiers(object())
