"""What engines that sample from a policy share: token ids in; ids, log-probabilities, why it ended and versions out."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np

from functional_trainer.tree import Tree


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen: logits are divided by `temperature`, then top-k, top-p and min-p leave some of them out.

    The order is transformers'. ValueError for values without a meaning.
    """

    max_tokens: int = 64
    """Most tokens that a prompt is continued by."""
    temperature: float = 1.0
    """0 takes the likeliest token."""
    top_k: int = 0
    """Tokens that are kept, the likeliest; 0 keeps all."""
    top_p: float = 1.0
    """The fewest likeliest tokens are kept that hold at least this much of what top-k left."""
    min_p: float = 0.0
    """Tokens are kept that have at least this share of the likeliest one's probability."""
    stop: tuple[int, ...] = ()
    """Ids that end a sample, and are its last token."""
    seed: int = 0
    """A sample depends on the seed, on its prompt and on the prompt's number, on no other prompt."""
    numbers: tuple[int, ...] = ()
    """Of the prompts (empty: their places in the call), for a call that is a part of a larger one."""
    budget: int = 0
    """Tokens that a sample grows by in the call; one that goes on has finish_reason "abort" (0: no limit)."""

    def __post_init__(self) -> None:
        for name, good, wanted in (
            ("max_tokens", self.max_tokens >= 1, ">= 1"),
            ("temperature", self.temperature >= 0, ">= 0 (0: greedy)"),
            ("top_k", self.top_k >= 0, ">= 0 (0: all)"),
            ("top_p", 0 < self.top_p <= 1, "> 0 and <= 1"),
            ("min_p", 0 <= self.min_p < 1, ">= 0 and < 1"),
            ("seed", self.seed >= 0, ">= 0"),
            ("numbers", min(self.numbers, default=0) >= 0, ">= 0"),
            ("budget", self.budget >= 0, ">= 0 (0: no limit)"),
        ):
            if not good:
                raise ValueError(f"{name} is {getattr(self, name)}, expected {name} {wanted}")

    def numbered(self, count: int) -> Sequence[int]:
        """Return the numbers of so many prompts; ValueError if others were given."""
        if self.numbers and len(self.numbers) != count:
            raise ValueError(f"there are {len(self.numbers)} numbers for {count} prompts")
        return self.numbers or range(count)

    @property
    def truncates(self) -> bool:
        """Whether some tokens may be left out."""
        return self.top_k > 0 or self.top_p < 1 or self.min_p > 0


class Episode(NamedTuple):
    """What happened between a policy and an environment."""

    messages: list[dict[str, Any]]
    """What was said after the opening, by both."""
    turns: int
    """Of the policy."""
    calls: int
    """Of tools."""
    failures: int
    """Calls that were answered with an error."""
    error: str = ""
    """What the environment raised, if it did; then there is no reward."""

    @property
    def text(self) -> str:
        """What was said, each turn behind its role."""
        calls = ("".join(f" {call['function']}" for call in m.get("tool_calls") or []) for m in self.messages)
        return "\n".join(f"{m['role']}: {m['content'] or ''}{c}" for m, c in zip(self.messages, calls, strict=True))


class Sample(NamedTuple):
    """What one prompt gave.

    Log-probabilities are those of the policy at the sampling temperature, log_softmax(logits / temperature), as the
    trainer has them with `Policy.temperature`: top-k, top-p and min-p do not change them. Greedily they are at 1.
    """

    tokens: list[int]
    """What follows the prompt: sampled ids, the end token included, and what an environment said between them."""
    logprobs: list[float]
    """Of each token; 0 where it was not sampled."""
    finish_reason: Literal["stop", "length", "abort"]
    versions: list[int]
    """Of the weights that each token was sampled with."""
    sampled: list[bool] | None = None
    """Which tokens the policy chose (None: all); no other is trained."""
    reward: float | None = None
    """What an environment gave."""
    episode: Episode | None = None
    """Where the policy talked to an environment."""
    routed_experts: np.ndarray | None = None
    """Experts that were chosen for each token but the last, the prompt's too, int (n - 1, L, K); None: not said."""


def refuse_begun(prompts: Sequence[Sequence[int]], begun: Sequence[Sample | None]) -> None:
    """Raise a ValueError for an empty prompt, and for samples that cannot be gone on with."""
    for i, prompt in enumerate(prompts):
        if not len(prompt):
            raise ValueError(f"prompt {i} is empty: every prompt needs at least one token")
    if begun and len(begun) != len(prompts):
        raise ValueError(f"begun has {len(begun)} samples for {len(prompts)} prompts")
    for i, one in enumerate(begun):
        if one and one.finish_reason != "abort":
            raise ValueError(f"begun {i} has ended, by {one.finish_reason!r}: there is nothing to go on with")


class Engine(Protocol):
    """What samples from a policy."""

    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, begun: Sequence[Sample | None] = ()
    ) -> list[Sample]:
        """Continue every prompt, from its sample in `begun` if there is one; samples come in the prompts' order."""

    def update(self, params: Tree, version: int) -> Any:
        """Sample with these parameters from now on."""

    def pause(self) -> None:
        """Compute no more tokens: in another thread `generate` returns soon with what there is, ended by "abort", or,
        where servers keep what is under way, goes on after `resume`."""

    def resume(self) -> None:
        """Let it work again."""
