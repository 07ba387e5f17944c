"""The expert layer as one op over `kernels.moe_triton`: what compilers see of it, and its gradient.

It saves its input, the pre-activations and the routing. T tokens, K slots a token, R = T K rows, E experts, D model
width, F expert width.
"""

import importlib

import torch


def _kernels():
    """Import Triton where the op runs; other devices need not have it."""
    return importlib.import_module("kernels.moe_triton")


@torch.library.custom_op("functional_trainer::moe", mutates_args=())
def _moe(
    x: torch.Tensor, scale: torch.Tensor | None, order: torch.Tensor, inverse: torch.Tensor, counts: torch.Tensor,
    gate_up: torch.Tensor, down: torch.Tensor, slots: int,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Return the result (T, D) and the pre-activations (R, 2F)."""
    run = _kernels()
    return run.forward(x, scale, run.Rows(order, inverse, counts.cumsum(0), slots), gate_up, down)


@_moe.register_fake
def _(x, scale, order, inverse, counts, gate_up, down, slots):
    return torch.empty_like(x), x.new_empty(order.shape[0], 2 * gate_up.shape[2])


@torch.library.custom_op("functional_trainer::moe_grad", mutates_args=())
def _moe_grad(
    grad: torch.Tensor, x: torch.Tensor, scale: torch.Tensor | None, order: torch.Tensor, inverse: torch.Tensor,
    counts: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor, h: torch.Tensor, slots: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """Return the gradients of x, scale (R,), gate_up and down."""
    run = _kernels()
    return run.backward(grad, x, scale, h, run.Rows(order, inverse, counts.cumsum(0), slots), gate_up, down)


@_moe_grad.register_fake
def _(grad, x, scale, order, inverse, counts, gate_up, down, h, slots):
    return torch.empty_like(x), x.new_empty(order.shape[0]), torch.empty_like(gate_up), torch.empty_like(down)


def _setup(ctx, inputs, output):
    *tensors, ctx.slots = inputs
    ctx.save_for_backward(*tensors, output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx, grad, _):
    dx, dscale, dgate_up, ddown = _moe_grad(grad.contiguous(), *ctx.saved_tensors, ctx.slots)
    return dx, None if ctx.saved_tensors[1] is None else dscale, None, None, None, dgate_up, ddown, None


_moe.register_autograd(_backward, setup_context=_setup)


def layer(x_TD, weights_R, routing, slots: int, gate_up_E2FD, down_EDF) -> torch.Tensor:
    """Do what `kernels.moe.layer` does, in one op."""
    order_R, inverse_R, counts_E = routing
    tensors = [x_TD, weights_R, order_R, inverse_R, counts_E, gate_up_E2FD, down_EDF]
    return _moe(*(None if t is None else t.contiguous() for t in tensors), slots)[0]
