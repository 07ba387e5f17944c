"""Optimizers and schedules as pure functions.

An optimizer updates one leaf at a time, so the same function is inlined in a whole-step graph, or in one for a block's
leaves. Scalars that change are 0-d float64 tensors: they are data, never a reason to recompile.
"""

import math
import re
from collections.abc import Callable, Hashable
from typing import Any, Literal, NamedTuple

import torch

Schedule = Callable[[torch.Tensor], torch.Tensor]
"""Steps done so far (0-d integer tensor) to learning rate (0-d float64 tensor)."""

Leaf = dict[str, torch.Tensor]

NO_DECAY = (r".*norm", r".*bias")
"""Paths exempt from weight decay by default: norm scales and biases."""


class Optimizer(NamedTuple):
    """Pure functions of one leaf: `init(p) -> moments`; `update(p, g, moments, scalars) -> p, moments`.

    `group(path)` names the leaves that share scalars; `scalars(step, updates, group)` are theirs, with `lr` among them.
    `step` counts tries and drives the schedule, `updates` the finite ones among them.
    """

    init: Callable[[torch.Tensor], Leaf]
    group: Callable[[str], Hashable]
    scalars: Callable[[torch.Tensor, torch.Tensor, Any], Leaf]
    update: Callable[[torch.Tensor, torch.Tensor, Leaf, Leaf], tuple[torch.Tensor, Leaf]]


def schedule(
    kind: Literal["constant", "linear", "cosine", "wsd"],
    peak: float,
    total: int,
    warmup: int = 0,
    floor: float = 0.0,
    decay: float = 0.2,
) -> Schedule:
    """Build a learning-rate schedule over `total` steps.

    The first `warmup` steps rise linearly to `peak` (step i of them uses peak * (i + 1) / warmup). Then constant stays,
    linear and cosine fall to `peak * floor` at the end, and wsd stays until the last `decay` fraction of the steps and
    falls linearly from there (warmup-stable-decay, https://arxiv.org/abs/2404.06395).
    """
    if kind not in ("constant", "linear", "cosine", "wsd"):
        raise ValueError(f"schedule {kind!r} is not one of constant, linear, cosine, wsd")
    if warmup >= total and warmup:
        raise ValueError(f"warm-up of {warmup} steps does not fit in {total} steps")
    start = math.ceil(total * (1 - decay)) if kind == "wsd" else warmup
    start = max(start, warmup)

    def at(step: torch.Tensor) -> torch.Tensor:
        now = step.to(torch.float64)
        rise = ((now + 1) / max(warmup, 1)).clamp_max(1.0)
        done = ((now - start) / max(total - start, 1)).clamp(0.0, 1.0)
        if kind == "constant":
            fall = torch.ones_like(now)
        elif kind == "cosine":
            fall = floor + (1 - floor) * 0.5 * (1 + torch.cos(math.pi * done))
        else:
            fall = 1 - (1 - floor) * done
        return peak * rise * fall

    return at


def adamw(
    lr: Schedule,
    betas: tuple[float, float] = (0.9, 0.95),
    eps: float = 1e-8,
    weight_decay: float = 0.1,
    no_decay: tuple[str, ...] = NO_DECAY,
) -> Optimizer:
    """Build AdamW with decoupled weight decay (https://arxiv.org/abs/1711.05101).

    Paths that `re.fullmatch` one of `no_decay` are exempt from the decay. Moments have the parameter's dtype.
    """
    b1, b2 = betas
    exempt = [re.compile(pattern) for pattern in no_decay]

    def init(p: torch.Tensor) -> Leaf:
        return {"mu": torch.zeros_like(p), "nu": torch.zeros_like(p)}

    def group(path: str) -> float:
        return 0.0 if any(pattern.fullmatch(path) for pattern in exempt) else weight_decay

    def scalars(step: torch.Tensor, updates: torch.Tensor, decay: float) -> Leaf:
        rate, t = lr(step), updates.to(torch.float64) + 1
        return {"lr": rate, "keep": 1 - rate * decay, "rate": rate / (1 - b1**t), "unbias": (1 - b2**t).rsqrt()}

    def update(p: torch.Tensor, g: torch.Tensor, moments: Leaf, at: Leaf) -> tuple[torch.Tensor, Leaf]:
        mu = moments["mu"] + (1 - b1) * (g - moments["mu"])
        nu = moments["nu"] + (1 - b2) * (g * g - moments["nu"])
        p = p * at["keep"] - at["rate"] * mu / (nu.sqrt() * at["unbias"] + eps)
        return p, {"mu": mu, "nu": nu}

    return Optimizer(init, group, scalars, update)
