"""The train step: the only place where gradients are taken and parameters change.

    weights = loss.weights(batch)                       of the whole batch, before the first backward
    params  = masters cast to the compute dtype, once; so are their gradients, until they are summed or applied
    grads   = sum over micro-batches of d/dparams sum_term coefficient * sum / weight
    state   = optimizer(state, clipped grads)           or the old state, bit for bit, if the norm is not finite

`compile="step"` makes this one graph, backward and update included. With several micro-batches or recomputation it is
two, gradient and update. "layer" compiles one block and its update, so its cost does not grow with depth.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, Literal

import torch

import kernels
from functional_trainer import tree
from functional_trainer.losses import Loss
from functional_trainer.optimizers import Optimizer
from functional_trainer.options import forms
from functional_trainer.remat import budget, budgeted, wrap_layer
from functional_trainer.state import Metrics, TrainState, apply_gradient, sums_of_squares, trained, update_block
from functional_trainer.types import ONE_DEVICE, Batch

Compile = Literal["step", "layer", "off"]
Reduce = Literal["compute", "master"]
Offload = Literal["activations", "optimizer"]


def evaluate(model: Any, loss: Loss, params: tree.Tree, batch: Batch, buffers: tree.Tree, shard=ONE_DEVICE):
    """Return the loss's sums by term and what it reports, over all ranks."""
    output = model.apply(params, batch, shard, buffers)._replace(buffers=buffers)
    sums, reported = loss.terms(output, model.unembed(params, shard), batch, shard)
    reported = {k: (shard.largest if k in loss.largest else shard.replicate)(v) for k, v in reported.items()}
    return tree.map(shard.replicate, sums), reported


def total_weights(loss: Loss, batch: Batch, shard=ONE_DEVICE) -> Metrics:
    """Return the loss's weights over all devices, 1 where there is nothing to weigh (the sum is then 0 too)."""
    weights = tree.map(shard.replicate, loss.weights(batch))
    return {k: torch.where(v == 0, 1, v) for k, v in weights.items()}


def objective(model: Any, loss: Loss, shard, params: tree.Tree, batch: Batch, weights: Metrics, buffers: tree.Tree):
    """Return the sum of coefficient * sum / weight, each sum / weight, and what the loss reports, likewise."""
    sums, reported = evaluate(model, loss, params, batch, buffers, shard)
    means = {k: v / weights.get(k, 1) for k, v in sums.items()}
    reported = {k: v / weights[k] if k in weights else v for k, v in reported.items()}
    return sum(loss.coefficients.get(k, 1.0) * v for k, v in means.items()), means, reported


def gradient(
    shard, value_of: Callable, params: tree.Tree, paths: dict, batch: Batch, weights: Metrics, buffers: tree.Tree
):
    """Return this rank's part of the gradient of each of `paths`, in their order, the means of the loss's terms and its
    reported sums."""
    leaves = {path: x.detach().requires_grad_(path in paths) for path, x in tree.flatten(params).items()}
    value, means, reported = value_of(tree.unflatten(leaves, params), batch, weights, buffers)
    grads = torch.autograd.grad(value, [leaves[path] for path in paths])
    shard.settle()
    return list(grads), tree.map(torch.Tensor.detach, {"loss": value, **means}), reported


def add(total: tuple, more: tuple, largest: tuple[str, ...]) -> tuple:
    """Add to gradients, in place, and to means and reported sums, those of another micro-batch."""
    torch._foreach_add_(total[0], more[0])
    said = {k: (torch.maximum if k in largest else torch.add)(v, more[2][k]) for k, v in total[2].items()}
    return total[0], tree.map(torch.add, total[1], more[1]), said


def compiled(fn: Callable, when: bool, backend: str, shard) -> Callable:
    if not when:
        return fn
    options = shard.inductor() if backend == "inductor" else None
    return torch.compile(fn, fullgraph=True, dynamic=False, backend=backend, options=options)


def settings(one_graph: bool) -> AbstractContextManager:
    """Return the compiler's settings: an all-to-all's splits are read back to the host; layers are of many kinds."""
    flags = {"capture_scalar_outputs": True, "recompile_limit": 64}
    return torch._dynamo.config.patch(flags | ({"trace_autograd_ops": True} if one_graph else {}))


def refuse(loss: Loss, optimizer: Optimizer, shard, micro_batches: int, compile: str, remat: str, offload: tuple):
    """Raise a ValueError for what does not go together."""
    if micro_batches > 1 and not loss.accumulates:
        raise ValueError(
            "this loss is a product of batch means (balance 'hf', KTO): it needs micro_batches = 1 (--micro-batch 0)"
        )
    if optimizer.whole and shard.world > 1:
        raise ValueError("adafactor and moments in 8 bit are for one device; on several use adamw, muon, lion or sgd")
    budget(remat)
    forms(compile, remat, offload)


def make_train_step(
    model: Any, loss: Loss, optimizer: Optimizer, *, shard=ONE_DEVICE, micro_batches: int = 1, clip: float = 1.0,
    compile: Compile = "off", remat: str = "none", reduce: Reduce = "compute", backend: str = "inductor",
    offload: tuple[Offload, ...] = (), rows: int | None = None,
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:  # fmt: skip
    """Build `step(state, batch) -> (state, metrics)`. The state is donated: the result lives in its storage.

    Columns of `batch` are (B, S), split along B into `micro_batches`, or equally into passes of at most `rows` on each
    device. Metrics: 0-d loss, each term, lr, grad_norm, skipped; grad_norms, as `state.kinds`; the loss's reported
    sums. `clip` is the largest gradient norm, 0: none. Devices add gradients in the compute dtype, or, if `reduce` is
    "master", where each layer casts, in the masters'. `remat`: see `functional_trainer.remat`; `offload`: to the host.
    """
    refuse(loss, optimizer, shard, 2 if rows else micro_batches, compile, remat, offload)
    one_graph = compile == "step" and micro_batches == 1 and not rows and remat == "none"
    cast = reduce == "compute" and model.dtype
    model = wrap_layer(
        model, compile=compile == "layer", remat=remat, backend=backend, offload="activations" in offload
    )
    jit = partial(compiled, backend=backend, shard=shard)
    squares, update = (jit(f, compile == "layer") for f in (sums_of_squares, partial(update_block, optimizer.update)))
    two_graphs = compile == "step" and not one_graph
    value_of = jit(partial(objective, model, loss, shard), two_graphs)
    finish = jit(
        partial(apply_gradient, optimizer, squares, update, loss, clip, shard, "optimizer" in offload), two_graphs
    )

    def gradients(state: TrainState, batch: Batch):
        weights = total_weights(loss, batch, shard)
        params = tree.map(lambda p: shard.storage(p).to(cast or p.dtype), state.params)
        first, *others = shard.micro(batch, -(-batch["tokens"].shape[0] // rows) if rows else micro_batches)
        grad = partial(gradient, shard, value_of, params, trained(state), weights=weights, buffers=state.buffers)
        grads, means, reported = grad(batch=first)
        if others:  # summed in the masters' precision and in storage of their own
            grads = [g.to(p.dtype, copy=True) for g, p in zip(grads, trained(state).values(), strict=True)]
        for micro in others:
            grads, means, reported = add((grads, means, reported), grad(batch=micro), loss.largest)
        return grads, means, reported

    def step(state: TrainState, batch: Batch) -> Metrics:
        return finish(state, *gradients(state, batch))  # the weights as they were cast are gone by then

    run = jit(step, one_graph)

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        if compile == "off":  # importing the compiler takes seconds
            return state, run(state, batch)
        with settings(one_graph), kernels.kept_on_disk(), budgeted(remat):
            return state, run(state, batch)

    return train_step
