"""The train state, and what one gradient does to it. Everything here works in place on donated storage."""

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import is_traceable_wrapper_subclass, transform_subclass

from functional_trainer import tree
from functional_trainer.backend import bring_back, send_away, synchronize
from functional_trainer.losses import Loss
from functional_trainer.optimizers import Optimizer

Metrics = dict[str, torch.Tensor]


@dataclass(frozen=True)
class TrainState:
    """What a step changes; `step` counts tries, `updates` finite ones, `skipped` others since the last of those.

    Parameters without an entry in `moments` are frozen.
    """

    step: torch.Tensor
    updates: torch.Tensor
    params: tree.Tree
    moments: dict[str, dict[str, torch.Tensor]]
    buffers: tree.Tree
    skipped: torch.Tensor


pytree.register_dataclass(TrainState)


def init_state(
    params: tree.Tree, optimizer: Optimizer, buffers: tree.Tree | None = None, offload: bool = False
) -> TrainState:
    """Make the state before the first step; `params` are taken over, not copied. Moments are in host memory if
    `offload`. ValueError if nothing is trained, or for a buffer without a dim: torch 2.13 compiled on a host loses
    what is copied into one in float64."""
    device = tree.leaves(params)[0].device
    zero = torch.zeros((), dtype=torch.int64, device=device)
    groups = {path: optimizer.group(path) for path in tree.flatten(params)}
    if all(group is None for group in groups.values()):
        raise ValueError("every parameter is frozen: nothing would be trained")
    if odd := [path for path, x in tree.flatten(buffers or {}).items() if not x.ndim]:
        raise ValueError(
            f"buffers {', '.join(odd)} have no dim, and a compiled step may lose what they are set to: add one"
        )
    moments = {k: optimizer.init(p, groups[k]) for k, p in tree.flatten(params).items() if groups[k] is not None}
    if offload:
        moments = {path: {k: _at_home(v) for k, v in leaf.items()} for path, leaf in moments.items()}
    return TrainState(zero, zero.clone(), params, moments, buffers or {}, zero.clone())


def _at_home(x: torch.Tensor) -> torch.Tensor:
    """Return a tensor in host memory; of one that is placed on a mesh, this rank's part is there."""

    def move(name: str, part: Any) -> Any:  # what a tensor consists of; its mesh is among it
        return send_away(part) if isinstance(part, torch.Tensor) else part

    return transform_subclass(x, move) if is_traceable_wrapper_subclass(x) else send_away(x)


def trained(state: TrainState) -> dict[str, torch.Tensor]:
    """Return the parameters that are not frozen, by path."""
    return {path: p for path, p in tree.flatten(state.params).items() if path in state.moments}


def ema(state: TrainState) -> tree.Tree:
    """Return the averaged parameters of a state whose optimizer is `optimizers.with_ema`; frozen ones as they are."""

    def average(path: str, p: torch.Tensor) -> torch.Tensor:
        return state.moments[path]["ema"].to(p.device) if path in state.moments else p

    return tree.map_with_path(average, state.params)


def kinds(paths: Iterable[str]) -> dict[str, list[str]]:
    """Group paths that differ only in indices: layers/0/attn/q and layers/1/attn/q are of the kind layers/attn/q."""
    found: dict[str, list[str]] = {}
    for path in paths:
        found.setdefault(re.sub(r"/\d+(?=/|$)", "", path), []).append(path)
    return found


def norms(squares: dict[str, torch.Tensor], params: dict[str, torch.Tensor], shard) -> torch.Tensor:
    """Return the 2-norm of each kind of tensor, in the order of `kinds(params)`, over all ranks.

    `squares` are the sums of squares of this rank's parts, of tensors that are placed as `params`.
    """
    groups = list(kinds(params).values())
    paths = [path for group in groups for path in group]
    whole = shard.squares([squares[path] for path in paths], [params[path] for path in paths])
    return torch.stack([part.sum() for part in whole.split([len(group) for group in groups])]).sqrt()


def weight_norms(params: tree.Tree, shard) -> dict[str, float]:
    """Return the 2-norm of each kind of parameter."""
    flat = tree.flatten(params)
    squares = dict(zip(flat, sums_of_squares([shard.storage(p) for p in flat.values()]), strict=True))
    return dict(zip(kinds(flat), norms(squares, flat, shard).tolist(), strict=True))


def sums_of_squares(grads: list[torch.Tensor]) -> list[torch.Tensor]:
    """Return the sum of squares of each gradient, in at least float32."""
    return [torch.linalg.vector_norm(g, dtype=torch.promote_types(g.dtype, torch.float32)).square() for g in grads]


def update_block(update: Callable, leaves: list[tuple], scale, finite) -> None:
    """Update each (p, g, moments, *others) in place, or leave p and moments as they are if not `finite`."""
    for p, g, moments, *others in leaves:
        new_p, new_moments = update(p, g.to(p.dtype) * scale, moments, *others)
        p.copy_(torch.where(finite, new_p, p))
        for k, old in moments.items():
            old.copy_(torch.where(finite, new_moments[k], old))


def block(path: str) -> str:
    """Name the block that a leaf belongs to: its path up to the first index, as in layers/3, or nothing."""
    return match[0] if (match := re.match(r"(.*?/)?\d+(?=/)", path)) else ""


def at_hand(moments: dict, blocks: Iterable[list[tuple]]) -> Iterator[list[dict[str, torch.Tensor]]]:
    """Yield the moments of each block's leaves."""
    yield from ([moments[path] for path, *_ in leaves] for leaves in blocks)


def fetched(moments: dict, blocks: Iterable[list[tuple]], device) -> Iterator[list[dict[str, torch.Tensor]]]:
    """Yield the moments of each block's leaves on the device, the next block's under way, and send them back after."""
    homes = list(at_hand(moments, blocks))
    begin = lambda block: [{k: bring_back(v, device) for k, v in leaf.items()} for leaf in block]  # noqa: E731
    coming = begin(homes[0])
    for i, block in enumerate(homes):
        now = [{k: wait() for k, wait in leaf.items()} for leaf in coming]
        coming = begin(homes[i + 1]) if i + 1 < len(homes) else []
        yield now
        for home, leaf in zip(block, now, strict=True):
            for k, v in leaf.items():
                send_away(v, home[k])
    synchronize(device)  # what reads the state may read the host's memory


def apply_gradient(
    optimizer: Optimizer, squares: Callable, update: Callable, loss: Loss, clip: float, shard, offload: bool,
    state: TrainState, grads: list[torch.Tensor], means: Metrics, reported: Metrics,
) -> Metrics:  # fmt: skip
    """Clip, update every trained leaf and the buffers in place; return the metrics.

    `squares` and `update` are `sums_of_squares` and `update_block`, called for a block of leaves at a time.
    """
    params = trained(state)
    blocks: dict[str, list[tuple]] = {}
    for (path, p), g in zip(params.items(), grads, strict=True):
        blocks.setdefault(block(path), []).append((path, p, g))
    square: dict[str, torch.Tensor] = {}
    for leaves in blocks.values():
        square |= {path: x for (path, *_), x in zip(leaves, squares([g for *_, g in leaves]), strict=True)}
    grad_norms = norms(square, params, shard)
    norm = torch.linalg.vector_norm(grad_norms)
    finite = torch.isfinite(norm)
    scale = clip / norm.clamp_min(clip) if clip else torch.ones_like(norm)
    scale = torch.where(finite, scale, 0)  # a NaN scalar would make Dynamo compile every leaf's update again
    groups = {path: optimizer.group(path) for path in state.moments}
    scalars = {group: optimizer.scalars(state.step, state.updates, group) for group in dict.fromkeys(groups.values())}
    own = {path: {k: shard.storage(v) for k, v in leaf.items()} for path, leaf in state.moments.items()}
    near = (partial(fetched, device=norm.device) if offload else at_hand)(own, blocks.values())
    for leaves in blocks.values():
        parts = []
        for (path, p, g), moments in zip(leaves, next(near), strict=True):
            parts.append((shard.storage(p), g, moments, scalars[groups[path]], groups[path], shard.around(p)))
        update(parts, scale, finite)
    next(near, None)
    buffers = loss.update(state.buffers, reported)
    tree.map(lambda old, new: old.copy_(torch.where(finite, new, old)), state.buffers, buffers)
    state.skipped.copy_(torch.where(finite, 0, state.skipped + 1))
    state.step.add_(1)
    state.updates.add_(finite.to(torch.int64))
    sizes = dict.fromkeys(scalars, 0)
    for path, p in params.items():
        sizes[groups[path]] += p.numel()
    lr = [scalars[group]["lr"] for group, size in sizes.items() if size == max(sizes.values())][0]
    counted = {"lr": lr, "skipped": state.skipped.clone(), "grad_norm": norm, "grad_norms": grad_norms}
    return {**means, **counted, **loss.derive(reported)}
