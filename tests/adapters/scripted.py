"""A policy that says what it is told to, and episodes with it."""

from typing import Any

from experiments.first_light.make_tokenizer import FOLDER
from functional_trainer.data import Tokenizer
from functional_trainer.engines import Sample, Sampling
from functional_trainer.environments.episodes import Episodes

TOKENIZER = Tokenizer(FOLDER)


class Script:
    """An engine that says what it is told to, turn by turn."""

    def __init__(self, *turns: list[str]):
        self.turns = [[[*TOKENIZER.encode(said), TOKENIZER.eos_ids[0]] for said in turn] for turn in turns]
        self.prompts: list[list[str]] = []

    def generate(self, prompts, sampling, begun) -> list[Sample]:
        both = [*zip(prompts, begun, strict=True)]
        self.prompts.append([TOKENIZER.decode(prompt + one.tokens, skip_special=False) for prompt, one in both])
        said = [one.tokens + ids for one, ids in zip(begun, self.turns[len(self.prompts) - 1], strict=True)]
        return [Sample(ids, [-1.0] * len(ids), "stop", [0] * len(ids)) for ids in said]

    def update(self, params, version) -> None:
        raise NotImplementedError


def play(maker: Any, script: Script, rows: list) -> list[Sample]:
    episodes = Episodes(maker, TOKENIZER, seconds=20)
    prompts = [episodes.turns.prompt(opening) for opening in episodes.openings(rows)]
    samples = episodes(script, prompts, rows, Sampling(max_tokens=600))
    episodes.close()
    return samples
