"""Environments of `verifiers`, with the library itself: `make test-adapters` has a virtual environment for it.

The name is none that pytest collects by itself: the library is not among the project's own.
"""

import pytest
import verifiers as vf
from datasets import Dataset

from functional_trainer.environments.adapters import from_verifiers
from tests.adapters.scripted import Script, play

DATA = Dataset.from_list([{"question": f"Say {n}", "answer": str(n)} for n in (3, 4, 5)])


class Hints(vf.MultiTurnEnv):
    """It says whether a number is too small until it is right."""

    async def env_response(self, messages, state, **kwargs):
        near = "more" if int(messages[-1]["content"]) < int(state["answer"]) else "less"
        return [vf.UserMessage(content=near)]

    @vf.stop
    async def found(self, state) -> bool:
        said = [step["completion"][-1]["content"] for step in state["trajectory"]]
        return state["answer"] in said


async def right(completion, answer) -> float:
    return float(completion[-1]["content"] == answer)


async def quick(state) -> float:
    return 1 / len(state["trajectory"])


def test_a_game_of_verifiers():
    rubric = vf.Rubric(funcs=[right, quick], weights=[1.0, 0.5])
    maker = from_verifiers(Hints(dataset=DATA, rubric=rubric, system_prompt="Be brief.", max_turns=3))
    train, held_out = maker.rows()
    rows = sorted(train, key=lambda row: row["answer"])
    assert [row["answer"] for row in rows] == ["3", "4", "5"] and len(held_out) == 3
    script = Script(["3", "1", "1"], ["4", "2"], ["3"])
    samples = play(maker, script, rows)
    assert [s.reward for s in samples] == pytest.approx([1.5, 1.25, 1 / 6])
    assert [s.episode.turns for s in samples] == [1, 2, 3] and not any(s.episode.error for s in samples)
    assert script.prompts[0][0] == "<|system|>Be brief.<|user|>Say 3<|assistant|>"
    assert script.prompts[2][0] == (
        "<|system|>Be brief.<|user|>Say 5<|assistant|>1<|end|>"
        "<|user|>more<|assistant|>2<|end|><|user|>more<|assistant|>"
    )


def test_a_name_is_what_verifiers_loads(tmp_path, monkeypatch):
    text = "from tests.adapters.check_verifiers import DATA, Hints, right, vf\n"
    text += "def load_environment(n): return Hints(dataset=DATA, rubric=vf.Rubric(funcs=[right]), max_turns=n)\n"
    (tmp_path / "hints_by_name.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    maker = from_verifiers("hints-by-name", n=2)
    (sample,) = play(maker, Script(["1"], ["2"]), maker.rows()[0][:1])
    assert sample.episode.turns == 2 and not sample.episode.error


def add(a: int, b: int) -> int:
    """Add two numbers.

    Args:
        a: The first
        b: The second
    """
    return a + b


def test_tools_of_verifiers():
    maker = from_verifiers(vf.ToolEnv(dataset=DATA, tools=[add], rubric=vf.Rubric(funcs=[right]), max_turns=4))
    rows = [row for row in maker.rows()[0] if row["answer"] == "5"]
    call = '<|call|>{"name": "add", "arguments": {"a": 2, "b": 3}}'
    wrong = '<|call|>{"name": "add", "arguments": {"a": 2}}'
    script = Script([call, wrong], ["5", "4"])
    one, other = play(maker, script, rows * 2)
    assert (one.reward, other.reward) == (1, 0) and one.episode.calls == 1
    assert '"name": "add"' in script.prompts[0][0]
    assert script.prompts[1][0].endswith(call + "<|end|><|tool|>5<|assistant|>")
    assert "missing 1 required positional argument" in script.prompts[1][1]


class Broken(Hints):
    async def env_response(self, messages, state, **kwargs):
        raise ValueError("no more")


def test_a_verifiers_environment_that_fails_costs_its_episode():
    maker = from_verifiers(Broken(dataset=DATA, rubric=vf.Rubric(funcs=[right])))
    (sample,) = play(maker, Script(["1"]), maker.rows()[0][:1])
    assert sample.reward is None and "no more" in sample.episode.error
