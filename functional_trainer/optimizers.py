"""Optimizers and schedules as pure functions.

An optimizer updates one leaf at a time, so the same function is inlined in a whole-step graph, or in one for a block's
leaves. Scalars that change are 0-d float64 tensors: they are data, never a reason to recompile.
"""

import math
import re
from collections.abc import Callable, Hashable
from functools import partial
from typing import Any, Literal, NamedTuple

import torch

import kernels
from functional_trainer import tree
from functional_trainer.moments import AS_PARAMETERS, Leaf, Storage, stored_as, stored_in_8_bits
from functional_trainer.options import OptimGroup, OptimOptions

Schedule = Callable[[torch.Tensor], torch.Tensor]
"""Steps done so far (0-d integer tensor) to learning rate (0-d float64 tensor)."""

NO_DECAY = (r".*norm", r".*bias")
"""Paths exempt from weight decay by default: norm scales and biases."""


class Optimizer(NamedTuple):
    """Pure functions of one leaf. Leaves of one group share scalars and are updated alike.

    `step` counts tries and drives the schedule, `updates` the finite ones among them.
    """

    group: Callable[[str], Hashable]
    """Path to group; None freezes the leaf."""
    init: Callable[[torch.Tensor, Any], Leaf]
    """(p, group) to moments."""
    scalars: Callable[[torch.Tensor, torch.Tensor, Any], Leaf]
    """(step, updates, group) to what changes from step to step, `lr` among it."""
    update: Callable[..., tuple[torch.Tensor, Leaf]]
    """(p, g, moments, scalars, group, around) to p and moments, each this rank's part. `around(fn, x, batch)` applies
    `fn` to whole matrices, behind `batch` leading dims, of a tensor placed as p; see `alone`."""
    whole: bool = False
    """Whether moments are of no part of p's shape, so that p must be whole."""


def alone(fn: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, batch: int) -> torch.Tensor:
    """Apply `fn` to a tensor that is whole, as on one device."""
    return fn(x)


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


# optimizers ----------------------------------------------------------------------------------------------------------


def _decays(weight_decay: float, no_decay: tuple[str, ...]) -> Callable[[str], tuple[float]]:
    """Return the weight decay of a path as its group: none where `re.fullmatch` finds one of `no_decay`."""
    exempt = [re.compile(pattern) for pattern in no_decay]
    return lambda path: (0.0 if any(pattern.fullmatch(path) for pattern in exempt) else weight_decay,)


def adamw(
    lr: Schedule,
    betas: tuple[float, float] = (0.9, 0.95),
    eps: float = 1e-8,
    weight_decay: float = 0.1,
    no_decay: tuple[str, ...] = NO_DECAY,
    storage: Storage = AS_PARAMETERS,
) -> Optimizer:
    """Build AdamW with decoupled weight decay (https://arxiv.org/abs/1711.05101), its moments kept in `storage`."""
    b1, b2 = betas

    def init(p: torch.Tensor, group) -> Leaf:
        return storage.pack("mu", torch.zeros_like(p)) | storage.pack("nu", torch.zeros_like(p))

    def scalars(step: torch.Tensor, updates: torch.Tensor, group) -> Leaf:
        rate, t = lr(step), updates.to(torch.float64) + 1
        return {"lr": rate, "keep": 1 - rate * group[0], "rate": rate / (1 - b1**t), "unbias": (1 - b2**t).rsqrt()}

    def update(p: torch.Tensor, g: torch.Tensor, moments: Leaf, at: Leaf, group, around=alone):
        mu, nu = (storage.unpack(name, moments, p) for name in ("mu", "nu"))
        mu = mu + (1 - b1) * (g - mu)
        nu = b2 * nu + (1 - b2) * (g * g)  # not as a difference: a large nu would leave nothing of a small g
        p = p * at["keep"] - at["rate"] * mu / (nu.sqrt() * at["unbias"] + eps)
        return p, storage.pack("mu", mu) | storage.pack("nu", nu)

    return Optimizer(_decays(weight_decay, no_decay), init, scalars, update, storage.whole)


def _matrices(x: torch.Tensor, group: tuple[float, int, int]) -> torch.Tensor:
    """View a leaf as matrices (batch, O, I), by its numbers of batch and of output dims; a vector is one column."""
    _, batch, out = group
    rows = math.prod(x.shape[batch : batch + out]) if out else x.shape[-1]
    return x.reshape(math.prod(x.shape[:batch]), rows, -1)


def _with_momentum(lr: Schedule, group: Callable[[str], tuple], direction: Callable, storage: Storage) -> Optimizer:
    """Build an optimizer of one moment; `direction(g, mu, group, around) -> (step, mu)` in units of the learning rate.

    A group is a tuple that begins with its weight decay.
    """

    def init(p: torch.Tensor, group) -> Leaf:
        return storage.pack("mu", torch.zeros_like(p))

    def scalars(step: torch.Tensor, updates: torch.Tensor, group) -> Leaf:
        rate = lr(step)
        return {"lr": rate, "keep": 1 - rate * group[0]}

    def update(p: torch.Tensor, g: torch.Tensor, moments: Leaf, at: Leaf, group, around=alone):
        step, mu = direction(g, storage.unpack("mu", moments, p), group, around)
        return p * at["keep"] - at["lr"] * step, storage.pack("mu", mu)

    return Optimizer(group, init, scalars, update, storage.whole)


def lion(
    lr: Schedule,
    betas: tuple[float, float] = (0.9, 0.99),
    weight_decay: float = 0.1,
    no_decay: tuple[str, ...] = NO_DECAY,
    storage: Storage = AS_PARAMETERS,
) -> Optimizer:
    """Build Lion: the sign of an interpolated momentum, decoupled weight decay (https://arxiv.org/abs/2302.06675)."""
    b1, b2 = betas

    def direction(g, mu, group, around):
        return torch.sign(mu + (1 - b1) * (g - mu)), mu + (1 - b2) * (g - mu)

    return _with_momentum(lr, _decays(weight_decay, no_decay), direction, storage)


def sgd(
    lr: Schedule,
    momentum: float = 0.9,
    nesterov: bool = False,
    weight_decay: float = 0.0,
    no_decay: tuple[str, ...] = NO_DECAY,
    storage: Storage = AS_PARAMETERS,
) -> Optimizer:
    """Build gradient descent with momentum as torch.optim.SGD has it, but decoupled weight decay."""

    def direction(g, mu, group, around):
        mu = momentum * mu + g
        return (g + momentum * mu if nesterov else mu), mu

    return _with_momentum(lr, _decays(weight_decay, no_decay), direction, storage)


def orthogonalize(
    x: torch.Tensor, steps: int = 5, coefficients=(3.4445, -4.775, 2.0315), dtype: torch.dtype = torch.bfloat16,
    backend: str | None = None,
) -> torch.Tensor:  # fmt: skip
    """Bring the singular values of matrices (..., O, I) near one by Newton-Schulz steps, computed in `dtype`.

    Each step maps a singular value s to a s + b s^3 + c s^5 (https://kellerjordan.github.io/posts/muon). `backend` is
    one of `kernels.symmetric_product`.
    """
    a, b, c = coefficients
    wide = x.shape[-2] <= x.shape[-1]
    y = (x if wide else x.mT).to(dtype)
    y = y / torch.linalg.vector_norm(y, dim=(-2, -1), keepdim=True).clamp_min(1e-7)
    for _ in range(steps):
        gram = kernels.symmetric_product(y, backend=backend)
        y = a * y + kernels.symmetric_product(gram, gram, c, b, backend) @ y
    return (y if wide else y.mT).to(x.dtype)


def muon(
    lr: Schedule,
    specs: tree.Tree,
    momentum: float = 0.95,
    nesterov: bool = True,
    weight_decay: float = 0.1,
    scale: Literal["original", "match_rms_adamw"] = "match_rms_adamw",
    no_decay: tuple[str, ...] = NO_DECAY,
    dtype: torch.dtype = torch.bfloat16,
    storage: Storage = AS_PARAMETERS,
    backend: str | None = None,
) -> Optimizer:
    """Build Muon: momentum orthogonalized, for every matrix and every expert's matrix by itself.

    What is a matrix is read off the `io` of `specs`; another leaf is an error, so combine it by `by_path`. A step of an
    (O, I) matrix is scaled by sqrt(max(1, O / I)) (`original`), or by 0.2 sqrt(max(O, I)), which gives it AdamW's usual
    root mean square (https://arxiv.org/abs/2502.16982), so that AdamW's learning rate serves. `backend` is that of
    `orthogonalize`. A leaf's matrices are iterated together, leaves one by one (docs/optimizers.md: what that costs).
    """
    io, decays = tree.flatten(specs), _decays(weight_decay, no_decay)

    def group(path: str) -> tuple[float, int, int]:
        if not io[path].is_matrix:
            raise ValueError(f"muon is for matrices; {path} has io {io[path].io!r}: give it another optimizer")
        return *decays(path), len(io[path].batch), len(io[path].out_in[0])

    def step(x: torch.Tensor, group) -> torch.Tensor:
        matrix = _matrices(x, group)
        O, I = matrix.shape[-2:]  # noqa: E741
        size = math.sqrt(max(1, O / I)) if scale == "original" else 0.2 * math.sqrt(max(O, I))
        return (orthogonalize(matrix, dtype=dtype, backend=backend) * size).view(x.shape)

    def direction(g, mu, group, around):
        mu = mu + (1 - momentum) * (g - mu)
        return around(partial(step, group=group), g + momentum * (mu - g) if nesterov else mu, group[1]), mu

    return _with_momentum(lr, group, direction, storage)


def adafactor(
    lr: Schedule,
    specs: tree.Tree,
    eps: tuple[float, float] = (1e-30, 1e-3),
    clip: float = 1.0,
    weight_decay: float = 0.0,
    no_decay: tuple[str, ...] = NO_DECAY,
) -> Optimizer:
    """Build Adafactor without momentum: a matrix's second moment is a row times a column, O + I numbers, not O I.

    As torch.optim.Adafactor has it (https://arxiv.org/abs/1804.04235), for every matrix of `specs` by itself. The
    learning rate is relative: a step is lr times the matrix's root mean square (at least `eps[1]`).
    """
    io, decays = tree.flatten(specs), _decays(weight_decay, no_decay)

    def group(path: str) -> tuple[float, int, int]:
        out = io[path].out_in[0] if io[path].is_matrix else io[path].dims[:-1]
        return *decays(path), len(io[path].batch), len(out)

    def init(p: torch.Tensor, group) -> Leaf:
        g = torch.zeros_like(_matrices(p, group))
        return {"nu": g} if g.shape[2] == 1 else {"row": g[:, :, :1].clone(), "column": g[:, :1].clone()}

    def scalars(step: torch.Tensor, updates: torch.Tensor, group) -> Leaf:
        t = updates.to(torch.float64) + 1
        rate = torch.minimum(lr(step), t.rsqrt())
        return {"lr": rate, "keep": 1 - lr(step) * group[0], "new": t**-0.8}

    def update(p: torch.Tensor, g: torch.Tensor, moments: Leaf, at: Leaf, group, around=alone):
        def mean(x, *dims):
            return x.mean(dims, keepdim=True)

        w, g = _matrices(p, group), _matrices(g, group)
        size = mean(w.square(), 1, 2).sqrt().clamp_min(eps[1])
        fresh = {"nu": g.square()} if "nu" in moments else {"row": mean(g.square(), 2), "column": mean(g.square(), 1)}
        moments = {k: v + at["new"] * (fresh[k] - v) for k, v in moments.items()}
        if "nu" in moments:
            nu = moments["nu"]
        else:
            nu = moments["row"] / mean(moments["row"], 1).clamp_min(eps[0]) * moments["column"]
        step = g * nu.clamp_min(max(eps[0] ** 2, torch.finfo(nu.dtype).tiny)).rsqrt()  # no 0 x inf where g is 0
        step = step / (mean(step.square(), 1, 2).sqrt() / clip).clamp_min(1)
        return (w * at["keep"] - at["lr"] * size * step).view(p.shape), moments

    return Optimizer(group, init, scalars, update, whole=True)


# combinations --------------------------------------------------------------------------------------------------------


def by_path(*rules: tuple[str, Optimizer | None]) -> Optimizer:
    """Give every leaf the optimizer of the first regex that `re.fullmatch`es its path; None freezes it."""
    parts = [optimizer for _, optimizer in rules]

    def group(path: str) -> tuple[int, Hashable] | None:
        for i, (pattern, optimizer) in enumerate(rules):
            if re.fullmatch(pattern, path):
                return None if optimizer is None else (i, optimizer.group(path))
        raise ValueError(f"no optimizer's regex matches {path!r}; add one for it")

    return Optimizer(
        group,
        lambda p, group: parts[group[0]].init(p, group[1]),
        lambda step, updates, group: parts[group[0]].scalars(step, updates, group[1]),
        lambda p, g, moments, at, group, around=alone: parts[group[0]].update(p, g, moments, at, group[1], around),
        whole=any(part is not None and part.whole for part in parts),
    )


def with_ema(optimizer: Optimizer, decay: float) -> Optimizer:
    """Also keep an exponential moving average of the parameters, as the moment `ema`, in at least float32."""

    def init(p: torch.Tensor, group) -> Leaf:
        return optimizer.init(p, group) | {"ema": p.to(torch.promote_types(p.dtype, torch.float32), copy=True)}

    def update(p: torch.Tensor, g: torch.Tensor, moments: Leaf, at: Leaf, group, around=alone):
        rest = {k: v for k, v in moments.items() if k != "ema"}
        p, rest = optimizer.update(p, g, rest, at, group, around)
        return p, rest | {"ema": moments["ema"] + (1 - decay) * (p - moments["ema"])}

    return optimizer._replace(init=init, update=update)


def from_options(o: OptimOptions, steps: int, specs: tree.Tree) -> Optimizer:
    """Build what `--optim.*` asks for; ValueError for a group that names no parameter of `specs`."""
    paths = list(tree.flatten(specs))
    storage = {"float32": AS_PARAMETERS, "bfloat16": stored_as(torch.bfloat16), "8bit": stored_in_8_bits()}[o.moments]

    def build(name: str, peak: float, decay: float | None) -> Optimizer:
        lr = schedule(o.schedule, peak, steps, round(o.warmup * steps), o.floor, o.decay)
        exempt = o.no_decay if decay is None else ()  # who sets a group's decay means it
        kept: dict[str, Any] = {"weight_decay": o.weight_decay if decay is None else decay, "no_decay": exempt}
        if name == "adafactor" and o.moments != "float32":
            raise ValueError(f"--optim.moments {o.moments}: adafactor keeps rows and columns, in float32 only")
        if name == "adafactor":
            return adafactor(lr, specs, **kept)
        if name == "muon":
            return muon(lr, specs, o.momentum, **kept, scale=o.muon_scale, storage=storage)
        if name == "sgd":
            return sgd(lr, o.momentum, **kept, storage=storage)
        return lion(lr, o.betas, **kept, storage=storage) if name == "lion" else adamw(
            lr, o.betas, o.eps, **kept, storage=storage
        )  # fmt: skip

    def rules(pattern: str, name: str | None, peak: float, decay: float | None) -> list[tuple[str, Optimizer | None]]:
        if name or o.name != "muon":
            return [(pattern, build(name or o.name, peak, decay))]
        matrices = [k for k, p in tree.flatten(specs).items() if p.is_matrix and re.fullmatch(pattern, k)]
        found: list[tuple[str, Optimizer | None]] = [("|".join(map(re.escape, matrices)), build("muon", peak, decay))]
        return found[: len(matrices)] + [(pattern, build("adamw", peak, decay))]

    table: list[tuple[str, Optimizer | None]] = []
    for text in o.groups:
        group = OptimGroup.parse(text)
        mine = [path for path in paths if re.fullmatch(group.pattern, path)]
        if not mine:
            raise ValueError(f"--optim.groups {text!r}: no parameter has such a path; they are like {paths[1]}")
        if all(any(re.fullmatch(pattern, path) for pattern, _ in table) for path in mine):
            raise ValueError(f"--optim.groups {text!r}: groups before it take all that it matches; put it first")
        peak = o.lr if group.lr is None else group.lr
        table += [(group.pattern, None)] if group.frozen else rules(group.pattern, group.name, peak, group.weight_decay)
    table += rules(".*", None, o.lr, None)
    optimizer = table[0][1] if len(table) == 1 else by_path(*table)
    assert optimizer is not None
    return with_ema(optimizer, o.ema) if o.ema else optimizer
