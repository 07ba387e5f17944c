"""Reward functions: their sum is TRL's, one that fails costs its sample, and those that ship are what they say."""

import ast
import asyncio
import functools
import inspect
import json
import math
import sys
import textwrap
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from trl import GRPOTrainer
from trl.rewards import get_repetition_penalty_reward, get_soft_overlong_punishment, think_format_reward
from trl.trainer.utils import nanstd

from functional_trainer import advantages, rewards
from functional_trainer.rewards import Rewards
from tests.functional_trainer.test_trl import trainer

NAN = float("nan")


def samples(n: int, **columns) -> dict:
    return {
        "prompts": ["?"] * n,
        "completions": [str(i) for i in range(n)],
        "completion_ids": [[i] for i in range(n)],
        **columns,
    }  # noqa: E501


def giving(values):
    """Return a reward function that gives these numbers, by the text of a completion."""
    return lambda completions, **columns: [values[int(c)] for c in completions]


# the sum -------------------------------------------------------------------------------------------------------------


@functools.cache
def lines_of_trl() -> str:
    """Return TRL's lines from rewards per function to advantages."""
    body = ast.parse(textwrap.dedent(inspect.getsource(GRPOTrainer._generate_and_score_completions))).body[0].body
    text = [ast.unparse(node) for node in body]
    first, last = (next(i for i, line in enumerate(text) if line.startswith(start))
                   for start in ("unscorable_mask = ", "advantages = torch.nan_to_num"))  # fmt: skip
    return "\n".join(text[first : last + 1])


def trl(functions: list, weights: list[float], group: int, given: dict) -> tuple[torch.Tensor, list, list]:
    """Return values per function, rewards and advantages by TRL's own code: a method, and lines of a longer one."""
    n = len(given["prompts"])
    made = trainer(
        GRPOTrainer, reward_funcs=functions, reward_func_names=[f"f{i}" for i in range(len(functions))],
        reward_processing_classes=[None] * len(functions), environments=None, args=SimpleNamespace(report_to=[]),
        reward_weights=torch.tensor(weights), multi_objective_aggregation="sum_then_normalize", scale_rewards="group",
    )  # fmt: skip
    columns = [
        {k: v[i] for k, v in given.items() if k not in ("prompts", "completions", "completion_ids")} for i in range(n)
    ]  # noqa: E501
    called = inspect.unwrap(GRPOTrainer._calculate_rewards)
    each = called(made, columns, given["prompts"], given["completions"], given["completion_ids"])
    scope = {"torch": torch, "nanstd": nanstd, "rewards_per_func": each, "device": "cpu", "num_generations": group}
    exec(lines_of_trl(), scope | {"self": made}, scope)
    return each, scope["rewards"], scope["advantages"]


NUMBERS = st.one_of(st.none(), st.just(0.0), st.floats(-4, 4, width=16))


@settings(max_examples=40)
@example([[None, None, 1.0, 0.0]], [1.0])
@example([[None, 1.0, 1.0, 0.0], [None, None, 1.0, 0.0]], [0.5, -2.0])
@given(st.integers(1, 3).flatmap(lambda k: st.lists(st.lists(NUMBERS, min_size=4, max_size=4), min_size=k, max_size=k)),
       st.lists(st.floats(-2, 2, width=16), min_size=3, max_size=3))  # fmt: skip
def test_sum_and_advantages_are_trls(values, weights):
    functions = [giving(v) for v in values]
    columns = samples(4, answer=["a", "b", None, "d"])
    each, wanted, advantage = trl(functions, weights[: len(values)], 2, columns)
    scores = Rewards({f"f{i}": f for i, f in enumerate(functions)}, weights[: len(values)])(**columns)
    number = lambda row: [NAN if x is None else x for x in row]  # noqa: E731
    assert number(scores.total) == pytest.approx(wanted.tolist(), rel=1e-5, abs=1e-5, nan_ok=True)
    for i, row in enumerate(scores.each.values()):
        assert number(row) == pytest.approx(each[:, i].tolist(), nan_ok=True)
    ours = advantages.grpo([scores.total[:2], scores.total[2:]])
    assert ours.ravel().tolist() == pytest.approx(advantage.tolist(), rel=1e-3, abs=1e-3)
    assert not any(scores.failures.values())


def test_without_weights_each_counts_once_and_the_report_has_trls_names():
    scores = Rewards({"a": giving([1.0, 2.0, None]), "b": giving([0.5, None, None])})(**samples(3))
    assert scores.total == [1.5, 2.0, None]
    assert scores.report() == {"rewards/a/mean": 1.5, "rewards/a/std": pytest.approx(math.sqrt(0.5)),
                               "rewards/b/mean": 0.5, "rewards/b/std": 0.0}  # fmt: skip


def test_functions_are_called_as_trl_calls_them():
    """Every column is a list beside the others, by keyword, in one call for all samples."""
    seen = []

    def keep(**given):
        seen.append(given)
        return [1] * 2

    columns = samples(2, answer=["a", None], level=[1, 2])
    assert Rewards({"keep": keep})(**columns).total == [1.0, 1.0]
    trl([keep], [1.0], 2, columns)
    assert seen[0] == {k: v for k, v in seen[1].items() if k not in ("trainer_state", "log_extra", "log_metric")}


def test_a_function_of_messages_is_given_them_as_trl_gives_them():
    """Prompts of rows whose prompt is a conversation whole, others as the user's message."""
    seen = []

    def first(prompts, completions, **columns):
        seen.append(prompts)
        return [float(completion[0]["content"]) for completion in completions]

    whole = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "?"}]
    given = samples(2, prompt=[whole, None], level=[1, 2])
    with Rewards({"first": rewards.conversational(first), "again": rewards.conversational(first)}) as both:
        assert both(**given).total == [0.0, 2.0]
    trl([first], [1.0], 2, samples(2, level=[1, 2]) | {"prompts": [whole] * 2, "completions": messages("02")})
    assert seen[0] == [whole, whole[1:]] and seen[2] == [whole, whole]


# failures ------------------------------------------------------------------------------------------------------------

FAILURES = {  # what a function returns for a sample, or raises: the reason
    "raise": "raised", "exit": "raised", "long": "wrong length", "short": "wrong length", "none": "wrong length",
    "text": "not a number", "nan": "not a number", "infinite": "not a number", "list": "not a number",
    "array": "not a number",
}  # fmt: skip


def failing():
    """Return a function that fails as its column says, for all samples; by value, so without this module."""

    def function(completions, how, **columns):
        import numpy

        odd = [h for h in how if h != "well"]
        if "raise" in odd:
            raise ArithmeticError(f"no {completions}")
        if "exit" in odd:
            raise SystemExit
        if "none" in odd:
            return None
        values = {"text": "1.0", "nan": numpy.nan, "infinite": -numpy.inf, "list": [1.0], "array": numpy.ones(2)}
        made = [values.get(h, numpy.float32(2 * int(c))) for c, h in zip(completions, how, strict=True)]
        return made + [1.0] if "long" in odd else made[1:] if "short" in odd else made

    return function


def later():
    """Return `failing` as a coroutine; where it is to exit a task of its does."""
    now = failing()

    async def function(completions, how, **columns):
        import asyncio

        async def task():
            return now(completions, how)

        return (await asyncio.gather(task(), asyncio.sleep(0)))[0]

    return function


@pytest.mark.parametrize(
    ("isolate", "make"), [((), failing), (("f",), failing), ((), later)], ids=["here", "isolated", "async"]
)
def test_one_that_fails_costs_its_sample(isolate, make):
    with Rewards({"f": make(), "g": giving([1.0] * 9)}, isolate=isolate, seconds=30) as both:

        @settings(max_examples=25)
        @example(["well"] * 9)
        @example([*FAILURES][:9])
        @example([*FAILURES][1:])
        @given(st.lists(st.sampled_from(["well"] * 9 + [*FAILURES]), min_size=1, max_size=9))
        def check(how):
            scores = both(**samples(len(how), how=how))
            unsure = not isolate and {*how} & {"long", "short"} and not {*how} & {"raise", "exit", "none"}
            reasons = ["wrong length" if unsure else FAILURES.get(h) for h in how]
            assert scores.each["f"] == [None if r else 2.0 * i for i, r in enumerate(reasons)]
            assert scores.failures["f"] == Counter(filter(None, reasons))
            assert scores.total == [1.0 if r else 1.0 + 2 * i for i, r in enumerate(reasons)]
            first = [*filter(None, reasons)][:1]
            assert [error.split(":")[0] for error in scores.errors.values()] == first
            for reason, count in scores.failures["f"].items():
                assert scores.report()[f"rewards/f/{reason}"] == count

        check()


def waiting():
    """Return a function that waits with others for its answers, and knows its loop; by value."""
    loops = []

    async def function(completions, **columns):
        import asyncio

        loops.append(asyncio.get_running_loop())
        assert loops[0] is loops[-1], "clients of servers are for one loop"
        return [float(c) for c in await asyncio.gather(*(asyncio.sleep(0, c) for c in completions))]

    return function


@pytest.mark.parametrize("isolate", [(), ("f",)], ids=["here", "isolated"])
def test_a_coroutine_is_awaited_always_in_one_loop(isolate):
    """In a caller that runs a loop, too."""

    async def notebook(asked):
        return [asked(**samples(3)) for _ in range(2)]

    with Rewards({"f": waiting()}, isolate=isolate, workers=1) as asked:
        for scores in asyncio.run(notebook(asked)):
            assert scores.total == [0.0, 1.0, 2.0] and not scores.errors


def test_values_of_another_number_than_completions_belong_to_none():
    """Asked for each alone, what gives one value for all would seem to be right."""
    scores = Rewards({"f": lambda completions, **columns: [float(len(completions[0]))]})(**samples(3))
    assert scores.total == [None] * 3 and scores.failures["f"] == {"wrong length": 3}
    assert scores.errors["f"] == "wrong length: returned 1 values for 3 completions"


def test_workers_of_ray_run_isolated_functions_only():
    with pytest.raises(ValueError, match="--reward.ray 2: .* none of exact, length is one; .*--reward.isolate"):
        Rewards({"exact": rewards.exact, "length": rewards.length(8)}, ray=2)


def test_one_that_hangs_or_dies_costs_its_sample():
    def function(completions, how, **columns):
        import ctypes

        if how == ["hang"]:
            ctypes.PyDLL(None).sleep(1000)
        if how == ["crash"]:
            ctypes.string_at(0)
        return [float(c) for c in completions]

    with Rewards({"f": function}, isolate=["f"], seconds=1.0) as one:
        scores = one(**samples(5, how=["well", "hang", "well", "crash", "well"]))
    assert scores.total == [0.0, None, 2.0, None, 4.0]
    assert scores.failures == {"f": {"timed out": 1, "died": 1}}
    assert scores.errors["f"] == "timed out: took over 1 s"


def test_bad_calls_are_errors_at_once():
    with pytest.raises(ValueError, match="2 weights for 1 reward functions: f"):
        Rewards({"f": failing()}, [1.0, 2.0])
    with pytest.raises(ValueError, match=r"weights of reward functions are \[nan\]; each must be a finite number"):
        Rewards({"f": failing()}, [NAN])
    with pytest.raises(ValueError, match=r"--reward.isolate names \['g'\]; the functions are \['f'\]"):
        Rewards({"f": failing()}, isolate=["g"])
    with pytest.raises(ValueError, match="reward function f cannot be called with prompts, .*: missing .*'how'"):
        Rewards({"f": failing()})(**samples(2))
    with pytest.raises(ValueError, match="f cannot be called .*'prompts'; it takes the columns that it names, and"):
        Rewards({"f": lambda completions: [1.0]})(**samples(1))
    with pytest.raises(ValueError, match=r"their lengths are \{'prompts': 2, .*'how': 1\}"):
        Rewards({"f": failing()})(**samples(2, how=["well"]))


# by name -------------------------------------------------------------------------------------------------------------


def test_a_function_that_does_not_say_its_arguments_is_named():
    with pytest.raises(ValueError, match="reward function most does not say its arguments .*: wrap it in a `def`"):
        Rewards({"most": max})


def test_functions_of_files_run_here_and_isolated(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("import math\nTWO = 2\ndef twice(x): return TWO * math.floor(x)\n"
                    "def good(completions, **columns): return [twice(float(c)) for c in completions]\n")  # fmt: skip
    name, function = rewards.load(f"{file}:good")
    assert name == "good" and Rewards({name: function})(**samples(3)).total == [0.0, 2.0, 4.0]
    with Rewards({name: function}, isolate=[name]) as isolated:
        assert isolated(**samples(3)).total == [0.0, 2.0, 4.0]


def test_names_that_ship(tmp_path):
    assert rewards.load("maths") == ("maths", rewards.maths)
    name, function = rewards.load("format:a:b.*")
    assert name == "format" and function(completions=["a:b\nc", "a:c"]) == [1.0, 0.0]
    name, function = rewards.load("length:4")
    assert name == "length" and function(completion_ids=[[], [1], [1] * 9]) == [1.0, 0.75, 0.0]
    (tmp_path / "bad.py").write_text("x = 1\n1 / 0\n")
    (tmp_path / "good.py").write_text("x = 1\n")
    for given_, said in {
        "lenght:4": "'lenght:4': it can be FILE.py:NAME, exact, maths, .*length:int", "length": "it can be",
        "length:x": "length:x: invalid literal", "length:0": "length:0: overlong buffer is 0", "exact:1": "it can be",
        "format:(": r"format: '\(' is not a regular expression", f"{tmp_path}/bad.py:f": "bad.py, line 2: ZeroDivis",
        f"{tmp_path}/good.py:x": "good.py defines no function x",
        f"{tmp_path}/none.py:x": f"^--reward.functions {tmp_path}/none.py: No such file",
    }.items():  # fmt: skip
        with pytest.raises(ValueError, match=said):
            rewards.load(given_)


def test_a_file_imports_what_is_beside_it(tmp_path, monkeypatch):
    """At once and when it is called, also in a process of its own; what is installed is not hidden from others."""
    (tmp_path / "beside_one.py").write_text("def score(text): return float(text)\n")
    (tmp_path / "beside_two.py").write_text("WORTH = 2.0\n")
    (tmp_path / "mine.py").write_text(
        "from beside_one import score\n\ndef f(completions, **columns):\n    from beside_two import WORTH\n"
        "    return [WORTH * score(c) for c in completions]\n"
    )
    monkeypatch.setattr(sys, "path", [*sys.path])
    before = list(sys.path)
    name, function = rewards.load(f"{tmp_path}/mine.py:f")
    assert sys.path == [*before, str(tmp_path)]
    assert Rewards({name: function})(**samples(3)).total == [0.0, 2.0, 4.0]
    with Rewards({name: function}, isolate=[name], workers=1) as isolated:
        assert isolated(**samples(2)).total == [0.0, 2.0]


# those that ship -----------------------------------------------------------------------------------------------------

IDS = st.lists(st.lists(st.integers(0, 3), max_size=12), min_size=1, max_size=5)
TEXT = st.text(st.sampled_from("ab\n"), max_size=3)


def messages(texts):
    return [[{"role": "assistant", "content": text}] for text in texts]


def test_exact_ignores_white_space_around_and_what_has_no_answer():
    given = {"completions": [" 12\n", "12.", "1 2", "12", "a"], "answer": ["12", "12", "12", 12, None]}
    assert rewards.exact(**given) == [1.0, 0.0, 0.0, 1.0, None]
    assert rewards.exact(messages(given["completions"]), given["answer"]) == rewards.exact(**given)


@given(IDS, st.integers(1, 5))
def test_repetition_is_trls(ids, n):
    assert rewards.repetition(n)(completion_ids=ids) == pytest.approx(get_repetition_penalty_reward(n)(ids))


@given(IDS, st.integers(1, 9).flatmap(lambda most: st.tuples(st.just(most), st.integers(1, most))))
def test_length_is_trls_soft_punishment_and_one(ids, sizes):
    found = rewards.length(*sizes)(completion_ids=ids)
    assert found == pytest.approx([1 + x for x in get_soft_overlong_punishment(*sizes)(ids)])
    assert rewards.length(sizes[0])(completion_ids=ids) == pytest.approx([max(0, 1 - len(x) / sizes[0]) for x in ids])


@given(st.lists(st.sampled_from(["<think>", "</think>", "a", "\n", " "]), max_size=7).map("".join))
def test_format_of_thinking_is_trls(completion):
    assert rewards.format()([completion]) == think_format_reward(messages([completion]))


EQUAL = [
    ("so $x = \\frac{1}{2}$", "0.5"), ("\\boxed{2\\sqrt{3}}", "2\\sqrt{3}"), ("\\boxed{2}", "2\\sqrt{3}"),
    ("it is 42", "42"), ("it is 42", "$42$"), ("it is 43", "42"), ("\\boxed{x^2+2x+1}", "(x+1)^2"),
    ("no number", "5"), ("", "5"), ("\\boxed{\\{1,2\\}}", "\\{2,1\\}"), ("\\boxed{(1,2)}", "(1,2)"),
    ("\\boxed{(2,1)}", "(1,2)"), ("first 3, then \\boxed{4}, not 5", "4"), ("1/3", "\\frac{1}{3}"),
    ("\\boxed{50\\%}", "0.5"), ("\\boxed{3,000}", "3000"), ("\\boxed{", "1"), ("5", ""), ("5", None),
]  # fmt: skip


def test_maths_is_math_verifys():
    columns = samples(len(EQUAL), answer=[a for _, a in EQUAL]) | {"completions": messages(c for c, _ in EQUAL)}
    with Rewards({"maths": rewards.maths}, workers=1) as ours:  # loads while this process does too
        import math_verify as mv

        kinds = [mv.LatexExtractionConfig(boxed_match_priority=0), mv.ExprExtractionConfig()]
        boxed = [a if a is None or "$" in a else f"\\boxed{{{a}}}" for _, a in EQUAL]
        wanted = [
            float(mv.verify(mv.parse(a), mv.parse(c, kinds))) if a not in (None, "\\boxed{}") else None
            for (c, _), a in zip(EQUAL, boxed, strict=True)
        ]
        scores = ours(**columns)
    assert wanted == [1, 1, 0, 1, 1, 0, 1, 0, 0, 1, 1, 0, 1, 1, 1, 1, 0, None, None]
    assert scores.total == wanted and not scores.failures["maths"]


@pytest.mark.slow
def test_maths_that_takes_for_ever_costs_its_sample():
    tower = "\\boxed{" + "9^{" * 6 + "9" + "}" * 7
    columns = samples(3, answer=["1", "1", "1"]) | {"completions": ["1", tower, "1"]}
    with Rewards({"maths": rewards.maths}, seconds=5, workers=1) as ours:
        scores = ours(**columns)
    assert scores.total == [1.0, None, 1.0] and sum(scores.failures["maths"].values()) == 1


def test_maths_says_what_to_install(monkeypatch):
    monkeypatch.setattr(rewards.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"maths needs math-verify, which is not installed: pip install '.\[rl\]'"):
        Rewards({"maths": rewards.maths})


ADD = "def add(a, b):\n    return a + b\n"
PAIRS = [{"input": "1 2\n", "output": "3\n"}, {"input": "20 3", "output": "23  \n\n"}]
PRINT = "print(sum(map(int, input().split())))"
PROGRAMS = [  # completion, tests, share of them that pass
    (f"So:\n```python\n{ADD}```\nDone.", ["assert add(1, 2) == 3", "assert add('a', 'b') == 'ab'"], 1.0),
    (f"```\nno code\n```\nthen\n```py\n{ADD}```", "assert add(1, 2) == 3", 1.0),
    (ADD, ["assert add(1, 2) == 3", "assert add(1, 2) == 4", "1 / 0", "import sys; sys.exit()"], 0.25),
    (ADD, json.dumps(["assert add(1, 1) == 2"]), 1.0),
    (ADD + "import os; os._exit(0)", ["assert add(1, 2) == 3"], 0.0),
    (ADD + "raise SystemExit", ["assert add(1, 2) == 3"], 0.0),
    ("I do not know.", ["assert add(1, 2) == 3"], 0.0),
    ("from dataclasses import dataclass\n@dataclass\nclass P:\n    x: 'int'\n", ["assert P(1) == P(1)"], 1.0),
    (ADD, ["assert add(1, 1) == 2", "while True: pass"], 0.5),
    ("import time; time.sleep(1000)", ["pass"], 0.0),
    (PRINT, PAIRS, 1.0),
    (PRINT, json.dumps(PAIRS[0]), 1.0),
    (PRINT.replace("sum", "max"), PAIRS, 0.0),
    (f"{PRINT}\n1 / 0", PAIRS, 0.0),
    ("print(3 if input() == '1 2' else 4)", PAIRS, 0.5),
    (f"def main():\n    {PRINT}\nif __name__ == '__main__':\n    main()", PAIRS, 1.0),
    ("import os; print(os.environ.get('SECRET', 3))", PAIRS[:1], 1.0),
    (ADD, None, None),
    (ADD, [], None),
    (ADD, [{"input": "1"}], None),
]  # fmt: skip


def test_code_passes_its_tests_or_does_not(monkeypatch):
    monkeypatch.setenv("SECRET", "known")
    completions, tests, wanted = map(list, zip(*PROGRAMS, strict=True))
    columns = samples(len(PROGRAMS), tests=tests) | {"completions": completions}
    with Rewards({"share": rewards.code_share}, seconds=1.5, memory=1 << 29) as share:
        scores = share(**columns)
    assert scores.total == wanted and scores.failures == {"share": {"raised": 2}}
    assert "tests are Python, or objects with input and output, at least one; not []" in scores.errors["share"]


def test_code_is_all_or_nothing():
    columns = samples(3, tests=[["assert add(1, 2) == 3", "1 / 0"], ["add"], None]) | {"completions": [ADD] * 3}
    with Rewards({"code": rewards.code}, workers=1) as code:
        assert code(**columns).total == [0.0, 1.0, None]
