"""Environments in the recipe: what a run says, what is refused, resuming, and that models learn from them."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from experiments import episodes, scores
from experiments.first_light import dialogues
from experiments.held_out import HeldOut
from experiments.qwen3_moe_grpo import Options
from functional_trainer import config, environments, rollouts
from functional_trainer.data import Tokenizer
from functional_trainer.engines import Episode, Sample
from functional_trainer.rl_options import RewardOptions
from functional_trainer.rollouts import Prompt, Prompts
from functional_trainer.types import OneDevice
from tests.experiments import sft_runs

RECIPE = sft_runs.RECIPE.with_stem("qwen3_moe_grpo").stem
FLAGS = (
    *("--batch", 2, "--rollout.num-generations", 3, "--rollout.max-completion-length", 24, "--micro-batch", 2),
    *("--data.seq-len", 64, "--answers", 5, "--compile", "off", "--eval-every", 2, "--rollout.max-turn-length", 5),
)
MINE = """
from functional_trainer.environments import Environment, Step

class Count(Environment):
    def reset(self, row):
        self.wanted, self.turns = row["wanted"], 0
        return [{"role": "user", "content": "What is 1 plus 2?"}]

    def step(self, messages):
        self.turns += 1
        return Step([{"role": "user", "content": "Sort B."}], 0.5, self.turns == self.wanted)

def last_is_short(completions, wanted, **columns):
    assert all(c[-1]["role"] == "assistant" or c[-1]["content"] == "Sort B." for c in completions)
    return [None if w == 1 else 0.25 for w in wanted]
"""
OPEN = """
class Open(Count):
    most = [0, 0]

    def reset(self, row):
        self.most[1] += 1
        self.most[0] = max(self.most)
        return super().reset(row)

    def close(self):
        self.most[1] -= 1

    @staticmethod
    def rows():
        return [{"wanted": 1}] * 20, [{"wanted": 1}] * 15
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("environments")
    sft_runs.folder(place / "model")
    (place / "mine.py").write_text(MINE)
    (place / "rows.jsonl").write_text("".join(json.dumps({"wanted": 1 + i % 2}) + "\n" for i in range(6)))
    return place


def run(place: Path, *flags, status: int = 0) -> str:
    return sft_runs.run(place, "--model.path", "model", *FLAGS, *flags, recipe=RECIPE, status=status)


def test_a_run_with_an_environment_that_ships(place):
    """Resumed in the middle of a rollout it ends the same; what is trained agrees with what was sampled."""
    guess = "--rollout.environment", "guess", "--steps", 3, "--rollout.steps-per-generation", 2, "--save-every", 1
    said = run(place, *guess, "--keep", 3, "--out", "straight")
    assert "guess: 765 episodes" in said and "the reward of 5 held-out episodes is 0.000" in said
    rows = sft_runs.rows(place / "straight")
    for row in rows[::2]:
        assert row["environment/raised"] == row["tools/call_frequency"] == 0 and "rewards/exact/mean" not in row
        assert 1 <= row["num_turns/min"] <= row["num_turns/mean"] <= row["num_turns/max"] <= 4
    assert rows[0]["ratio/mean"] == pytest.approx(1, abs=1e-4)
    assert [("eval_reward" in row) for row in rows] == [False, True, True]
    samples = json.loads((place / "straight" / "samples.jsonl").read_text().splitlines()[0])["samples"]
    assert samples[0]["question"].startswith("Guess a number") and samples[0]["episode"].startswith("assistant: ")
    run(place, *guess, "--resume", "straight/checkpoints/step-1", "--out", "resumed")
    sft_runs.same_state(place / "straight", place / "resumed")


def test_an_environment_of_ones_own_and_functions_beside_it(place):
    own = "--rollout.environment", "mine.py:Count", "--data.train", "rows.jsonl", "--answers", 0, "--samples", 0
    run(place, *own, "--steps", 1, "--rollout.max-turn-length", 1, "--rollout.max-turns", 3, "--out", "cut")
    (row,) = sft_runs.rows(place / "cut")
    assert row["completions"]["clipped_ratio"] > 0.5, "a turn of one token has no end"
    run(place, *own, "--steps", 1, "--reward.functions", "mine.py:last_is_short", "--out", "own")
    (row,) = sft_runs.rows(place / "own")
    assert row["reward"] <= 1.25 and row["rewards/last_is_short/mean"] == 0.25


class Share(OneDevice):
    world = 2


def test_openings_take_no_more_environments_than_a_rank_plays_in_a_rollout(tmp_path):
    (tmp_path / "mine.py").write_text(MINE + OPEN)
    given = "--model.path", "m", "--rollout.environment", f"{tmp_path}/mine.py:Open", "--batch", "3"
    o = config.cli(Options, doc="", argv=[*given, "--rollout.num-generations", "3"])
    tokenizer = Tokenizer(sft_runs.TOKENIZER)
    for shard, most in ((OneDevice(), 9), (Share(), 5)):
        episodes.made.cache_clear()
        prompts, held_out = episodes.read(o, tokenizer, tokenizer.vocab_size, shard, 12)
        assert len(prompts) == 20 and len(held_out) == 12
        assert episodes.made(o, tokenizer).make.most == [most, 0]


@pytest.mark.slow
def test_workers_of_ray_play_and_judge_as_this_process_does(place):
    weights = load_file(place / "model" / "model.safetensors")
    weights["lm_head.weight"][Tokenizer(place / "model").eos_ids] *= 30  # then turns end, and are answered
    save_file(weights, shutil.copytree(place / "model", place / "brief") / "model.safetensors")
    flags = "--rollout.environment", "mine.py:Count", "--data.train", "rows.jsonl", "--data.eval", "rows.jsonl"
    flags += "--model.path", "brief", "--steps", 2
    flags += "--reward.functions", "mine.py:last_is_short", "--reward.isolate", "last_is_short"
    run(place, *flags, "--rollout.environment-ray", 2, "--reward.ray", 2, "--out", "by-ray")
    run(place, *flags, "--out", "by-itself")
    for theirs, ours in zip(*(sft_runs.rows(place / name) for name in ("by-ray", "by-itself")), strict=True):
        assert {k for k in theirs if not k.startswith("timing")} == {k for k in ours if not k.startswith("timing")}
        for key in ("reward", "eval_reward", "completions", "num_turns/mean", "entropy", "environment/raised"):
            assert theirs.get(key) == ours.get(key), key
        assert theirs["num_turns/mean"] > 1
        assert theirs["rewards/last_is_short/mean"] == 0.25 and theirs["environment/raised"] == 0


@pytest.mark.parametrize(
    ("flags", "status", "message"),
    [
        (("--rollout.environment-ray", 2), 2, "has no effect without"),
        (("--rollout.max-turns", 3), 2, "has no effect without"),
        (("--rollout.environment", "chess"), 1, "it can be FILE.py:NAME, calculator, guess"),
        (("--rollout.environment", "mine.py:Count"), 1, "give a file of rows, --data.train"),
        (("--rollout.environment", "guess", "--data.split", 0.1, "--data.train", "rows.jsonl"), 2, "not for environme"),
    ],
)
def test_what_does_not_go_together_is_refused(place, tmp_path, flags, status, message):
    flags = flags if "--rollout.environment" in flags else (*flags, "--rollout.max-turn-length", 0)
    said = run(place, "--steps", 1, "--out", tmp_path / "run", *flags, status=status)
    assert message in said and "Traceback" not in said


def test_lost_episodes_are_told_of(monkeypatch):
    """Those of a rollout once, with why, and in completions.jsonl; of held-out ones how many."""
    turns = [
        {"role": "assistant", "content": None, "tool_calls": [{"function": "f"}]},
        {"role": "tool", "content": "3"},
    ]
    fine = Sample([1], [-0.1], "stop", [0], reward=1.0, episode=Episode(turns, 1, 0, 0))
    lost = fine._replace(reward=None, episode=Episode([], 1, 0, 0, "KeyError: gone"))
    said: list[str] = []
    tokenizer, asked = SimpleNamespace(decode=str), [Prompt([1], "q", {})] * 2
    rows = Prompts([Prompt([1], "q", {"prompts": "an environment's own"})])
    run = SimpleNamespace(shard=OneDevice(), loader=rows, tokenizer=tokenizer, say=said.append, questions=asked)
    o = SimpleNamespace(reward=RewardOptions(("length:4",)), rollout=SimpleNamespace(environment="guess"))
    score = scores.rewards(o, run)
    for _ in range(2):
        assert score([Prompt([1], "q", {})] * 3, [fine, lost, lost]).rewards == [1.75, None, None]
    assert len(said) == 1 and said[0].endswith("the first one by KeyError: gone")
    with pytest.raises(ValueError, match="nothing can be learned, none of .* 2 answers .*, the first one by KeyError"):
        scores.rewards(o, run)([Prompt([1], "q", {})] * 2, [lost, lost])
    table = np.array([[1.0, np.nan]])
    shown = rollouts.shown(rollouts.Rollout([Prompt([1], "q", {})] * 2, [fine, lost], table, table, [{}, {}]), 2)
    assert [row.get("error") for row in shown] == [None, "KeyError: gone"]
    assert [row["completion"] for row in shown] == ["assistant:  f\ntool: 3", ""]
    held_out = HeldOut(o, run, None, score, 2)
    monkeypatch.setattr(held_out, "_answers", lambda params, asked: [fine, lost])
    found = held_out.measure({})
    assert found == {"eval_reward": 0.875, "eval_raised": 1, "eval_rewards/length/mean": 0.75}, "functions count too"
    assert held_out.say(found) == "the reward of 2 held-out episodes is 0.875; 1 were lost, and count as 0"


@pytest.mark.parametrize("name", environments.SHIPPED)
def test_dialogues_talk_to_the_environments(name, tmp_path):
    """They are what the environments say, on rows that are not held out, in words that are single tokens."""
    folder = dialogues.write(name, tmp_path, n_train=60, n_eval=5)
    tokenizer = Tokenizer(folder / "tokenizer")
    assert tokenizer.vocab_size <= 384, "the tiny model has so many"
    train, held_out = ([json.loads(x) for x in (folder / f"{stem}.jsonl").open()] for stem in ("train", "eval"))
    openings = [{row["messages"][0]["content"] for row in rows} for rows in (train, held_out)]
    assert not openings[0] & openings[1]
    rights = 0
    for row in train:
        ids, mask = tokenizer.encode_chat(row["messages"], row.get("tools"))
        assert any(mask) and len(ids) < 130
        last = row["messages"][-1]["content"]
        rights += bool(last) and last == (row["messages"][-2]["content"] if len(row["messages"]) == 4 else "")
    assert name == "guess" or 0.2 < rights / len(train) < 0.6
    with pytest.raises(KeyError):
        dialogues.make("chess", 1, 1, 0)


GAINS = {"guess": (0.07, 0.05), "calculator": (0.6, 0.3)}
"""Of held-out episodes, played greedily, and of those that are trained on."""
HELD_OUT = {"guess": 360, "calculator": 600}
"""All that there are; chance moves the difference of two such rewards by 0.04 at most, as its deviation."""
LEARNING = {
    "guess": (600, 80, "--batch", 32, "--rollout.max-completion-length", 32, "--rollout.max-turn-length", 8),
    "calculator": (1600, 20, "--batch", 16, "--rollout.max-completion-length", 64, "--rollout.max-turn-length", 40),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", LEARNING)
def test_a_model_learns_from_an_environment(name, tmp_path):
    """As in docs/environments.md: by supervision first, then by its reward, on rows that are held out."""
    supervised, steps, *flags = LEARNING[name]
    folder = dialogues.write(name, tmp_path / name)
    data = "--data.train", folder / "train.jsonl", "--data.tokenizer", folder / "tokenizer", "--compile", "off"
    taught = sft_runs.start(tmp_path, *data, "--steps", supervised, "--samples", 0, "--out", "start")
    assert taught.wait(900) == 0, taught.output
    flags += ["--model.path", "start/hf", "--rollout.environment", name, "--optim.lr", 5e-4, "--compile", "off"]
    flags += ["--answers", HELD_OUT[name], "--samples", 0, "--eval-every", 0, "--out", "run"]
    played = sft_runs.start(tmp_path, *flags, "--steps", steps, recipe=RECIPE)
    assert played.wait(1800) == 0, played.output
    rows = sft_runs.rows(tmp_path / "run")
    before = float(played.output.split(f"before training the reward of {HELD_OUT[name]} held-out episodes is ")[1][:5])
    first, last = (sum(row["reward"] for row in some) / len(some) for some in (rows[:5], rows[-5:]))
    assert rows[-1]["eval_reward"] > before + GAINS[name][0] and last > first + GAINS[name][1]
    if name == "calculator":
        assert rows[-1]["tools/call_frequency"] > 0.9 > 0.6 > rows[0]["tools/call_frequency"]
