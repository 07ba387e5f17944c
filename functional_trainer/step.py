"""The train step: the only place where gradients are taken and parameters change.

    weights = loss.weights(batch)                       of the whole batch, before the first backward
    grads   = sum over micro-batches of d/dparams sum_term coefficient * sum / weight
    state   = optimizer(state, clipped grads)           or the old state, bit for bit, if the norm is not finite

`compile="step"` makes this one graph, backward and update included. With several micro-batches or recomputation it is
two, gradient and update. "layer" compiles one block and one leaf's update, so its cost does not grow with depth.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint

from functional_trainer import tree
from functional_trainer.losses import Loss
from functional_trainer.optimizers import Optimizer
from functional_trainer.types import ONE_DEVICE, Batch

Metrics = dict[str, torch.Tensor]


@dataclass(frozen=True)
class TrainState:
    """Everything that a step changes. `step` counts updates tried, `skipped` non-finite ones since the last good one."""

    step: torch.Tensor
    params: tree.Tree
    moments: dict[str, dict[str, torch.Tensor]]
    buffers: tree.Tree
    skipped: torch.Tensor


pytree.register_dataclass(TrainState)


def init_state(params: tree.Tree, optimizer: Optimizer, buffers: tree.Tree | None = None) -> TrainState:
    """Make the state before the first step; `params` are taken over, not copied."""
    device = tree.leaves(params)[0].device
    zero = torch.zeros((), dtype=torch.int64, device=device)
    moments = {path: optimizer.init(p) for path, p in tree.flatten(params).items()}
    return TrainState(zero, params, moments, buffers or {}, zero.clone())


def wrap_layer(model: Any, *, compile: bool, remat: bool, backend: str = "inductor") -> Any:
    """Return the model with its block recomputed in backward, compiled, or both."""
    layer = model.layer
    if remat:
        inner = layer

        def layer(p, x, rows, **options):
            return checkpoint(inner, p, x, rows, use_reentrant=False, preserve_rng_state=False, **options)

    if compile:
        compiled = torch.compile(layer, fullgraph=True, dynamic=False, backend=backend)

        def layer(p, x, rows, **options):
            return options["shard"].outputs(*compiled(p, x, rows, **options))
    return replace(model, layer=layer)


def evaluate(model: Any, loss: Loss, params: tree.Tree, batch: Batch, buffers: tree.Tree, shard=ONE_DEVICE):
    """Return the loss's sums (by term, whole tensors on every rank) and its reported sums."""
    output = model.apply(params, batch, shard, buffers)
    sums, reported = loss.terms(output, model.unembed(params, shard), batch, shard)
    return {k: shard.replicate(v) for k, v in sums.items()}, reported


def total_weights(loss: Loss, batch: Batch, shard=ONE_DEVICE) -> Metrics:
    """Return the loss's weights over all devices, 1 where there is nothing to weigh (the sum is then 0 too)."""
    weights = {k: shard.replicate(v) for k, v in loss.weights(batch).items()}
    return {k: torch.where(v == 0, 1, v) for k, v in weights.items()}


def make_train_step(
    model: Any,
    loss: Loss,
    optimizer: Optimizer,
    *,
    shard=ONE_DEVICE,
    micro_batches: int = 1,
    clip: float = 1.0,
    compile: Literal["step", "layer", "off"] = "off",
    remat: Literal["layer", "none"] = "none",
    backend: str = "inductor",
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """Build `step(state, batch) -> (state, metrics)`. The state is donated: the result lives in its storage.

    Columns of `batch` are (B, S), split along B into `micro_batches`. Metrics are 0-d tensors (loss, each term, lr,
    grad_norm, skipped) and the loss's reported sums. `clip` is the largest gradient norm, 0 for none.
    """
    if micro_batches > 1 and not loss.accumulates:
        raise ValueError("this loss is a product of batch means (balance 'hf'): it needs micro_batches = 1")
    if compile != "off":
        torch._dynamo.config.capture_scalar_outputs = True
    if compile == "step":  # lets Dynamo trace `autograd.grad`
        torch._dynamo.config.trace_autograd_ops = True
    model = wrap_layer(model, compile=compile == "layer", remat=remat == "layer", backend=backend)

    one_graph = compile == "step" and micro_batches == 1 and remat == "none"

    def jit(fn: Callable, when: bool, **options) -> Callable:
        return torch.compile(fn, fullgraph=True, backend=backend, **options) if when else fn

    def objective(params: tree.Tree, batch: Batch, weights: Metrics, buffers: tree.Tree):
        sums, reported = evaluate(model, loss, params, batch, buffers, shard)
        means = {k: v / weights[k] for k, v in sums.items()}
        return sum(loss.coefficients.get(k, 1.0) * v for k, v in means.items()), means, reported

    objective = jit(objective, compile == "step" and not one_graph, dynamic=False)

    def gradient(params: tree.Tree, batch: Batch, weights: Metrics, buffers: tree.Tree):
        leaves, spec = pytree.tree_flatten(params)
        leaves = [x.detach().requires_grad_() for x in leaves]
        value, means, reported = objective(pytree.tree_unflatten(leaves, spec), batch, weights, buffers)
        grads = torch.autograd.grad(value, leaves)
        grads = [shard.storage(shard.like(g, p)) for g, p in zip(grads, leaves, strict=True)]
        return grads, tree.map(torch.Tensor.detach, {"loss": value, **means}), reported

    def update_leaf(p, g, moments, scalars, scale, finite):
        new_p, new_moments = optimizer.update(p, g * scale, moments, scalars)
        p.copy_(torch.where(finite, new_p, p))
        for k, old in moments.items():
            old.copy_(torch.where(finite, new_moments[k], old))

    leaf = jit(update_leaf, compile == "layer", dynamic=True)

    def update(state: TrainState, grads: list[torch.Tensor], sums: Metrics, reported: Metrics):
        norm = shard.norm(grads, tree.leaves(state.params))
        finite = torch.isfinite(norm)
        scale = clip / norm.clamp_min(clip) if clip else torch.ones_like(norm)
        groups = {path: optimizer.group(path) for path in state.moments}
        scalars = {group: optimizer.scalars(state.step, group) for group in dict.fromkeys(groups.values())}
        for (path, p), g in zip(tree.flatten(state.params).items(), grads, strict=True):
            moments = {k: shard.storage(v) for k, v in state.moments[path].items()}
            leaf(shard.storage(p), g, moments, scalars[groups[path]], scale, finite)
        buffers = loss.update(state.buffers, reported)
        tree.map(lambda old, new: old.copy_(torch.where(finite, new, old)), state.buffers, buffers)
        lr = next(iter(scalars.values()))["lr"]
        state.skipped.copy_(torch.where(finite, 0, state.skipped + 1))
        state.step.add_(1)
        return {**sums, "grad_norm": norm, "lr": lr, "skipped": state.skipped.clone(), **reported}

    if one_graph:

        def whole(state: TrainState, batch: Batch) -> Metrics:
            weights = total_weights(loss, batch, shard)
            return update(state, *gradient(state.params, batch, weights, state.buffers))

        one = jit(whole, True, dynamic=False)
        return lambda state, batch: (state, one(state, batch))
    finish = jit(update, compile == "step", dynamic=False)

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        weights = total_weights(loss, batch, shard)
        parts = shard.micro(batch, micro_batches)
        grads, sums, reported = gradient(state.params, parts[0], weights, state.buffers)
        for micro in parts[1:]:
            more, *rest = gradient(state.params, micro, weights, state.buffers)
            torch._foreach_add_(grads, more)
            sums, reported = tree.map(torch.add, (sums, reported), tuple(rest))
        return state, finish(state, grads, sums, reported)

    return step
