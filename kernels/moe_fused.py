"""The expert layer and its sort as ops over Triton kernels: what compilers see of them, and the layer's gradient.

The layer saves its input, the pre-activations and the routing. T tokens, K slots a token, R = T K rows, E experts,
D model width, F expert width.
"""

import importlib

import torch

from kernels.elementwise import Activation
from kernels.ops import op


def _kernels(name: str = "moe"):
    """Import Triton where an op runs; other devices need not have it."""
    return importlib.import_module(f"kernels.{name}_triton")


@op("functional_trainer::moe", gradient=True)
def _moe(
    x: torch.Tensor, scale: torch.Tensor | None, order: torch.Tensor, inverse: torch.Tensor, counts: torch.Tensor,
    gate_up: torch.Tensor, bias: torch.Tensor | None, down: torch.Tensor, slots: int, act: str, limit: float,
    alpha: float,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Return the result (T, D) and the pre-activations (R, 2F)."""
    run = _kernels()
    rows = run.Rows(order, inverse, counts.cumsum(0), slots)
    return run.forward(x, scale, rows, gate_up, bias, down, Activation(act, limit, alpha))


@torch.library.register_fake("functional_trainer::moe")
def _(x, scale, order, inverse, counts, gate_up, bias, down, slots, act, limit, alpha):
    return torch.empty_like(x), x.new_empty(order.shape[0], 2 * gate_up.shape[2])


@op("functional_trainer::moe_grad")
def _moe_grad(
    grad: torch.Tensor, x: torch.Tensor, scale: torch.Tensor | None, order: torch.Tensor, inverse: torch.Tensor,
    counts: torch.Tensor, gate_up: torch.Tensor, bias: torch.Tensor | None, down: torch.Tensor, h: torch.Tensor,
    slots: int, act: str, limit: float, alpha: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """Return the gradients of x, scale (R,), gate_up, bias (empty without one) and down."""
    run = _kernels()
    rows = run.Rows(order, inverse, counts.cumsum(0), slots)
    return run.backward(grad, x, scale, h, rows, gate_up, bias, down, Activation(act, limit, alpha))


@torch.library.register_fake("functional_trainer::moe_grad")
def _(grad, x, scale, order, inverse, counts, gate_up, bias, down, h, slots, act, limit, alpha):
    dbias = x.new_empty(0) if bias is None else torch.empty_like(bias)
    return torch.empty_like(x), x.new_empty(order.shape[0]), torch.empty_like(gate_up), dbias, torch.empty_like(down)


def _setup(ctx, inputs, output):
    tensors, ctx.rest = inputs[:8], inputs[8:]
    ctx.save_for_backward(*tensors, output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx, grad, _):
    dx, dscale, dgate_up, dbias, ddown = _moe_grad(grad.contiguous(), *ctx.saved_tensors, *ctx.rest)
    _, scale, *_, bias, _, _ = ctx.saved_tensors
    given = None if scale is None else dscale, None, None, None, dgate_up, None if bias is None else dbias
    return dx, *given, ddown, *(None,) * 4


torch.library.register_autograd("functional_trainer::moe", _backward, setup_context=_setup)


def layer(
    x_TD, weights_R, routing, slots: int, gate_up_E2FD, down_EDF, gate_up_bias_E2F, activation: Activation
) -> torch.Tensor:
    """Do what `kernels.moe.layer` does, in one op."""
    tensors = x_TD, weights_R, *routing, gate_up_E2FD, gate_up_bias_E2F, down_EDF
    return _moe(*(None if t is None else t.contiguous() for t in tensors), slots, *activation)[0]


@op("functional_trainer::sort_by_expert")
def _sort(expert: torch.Tensor, experts: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return _kernels("sort").sort(expert, experts)


@torch.library.register_fake("functional_trainer::sort_by_expert")
def _(expert, experts):
    order = expert.new_empty(expert.shape[0], dtype=torch.int64)
    return order, torch.empty_like(order), expert.new_empty(experts, dtype=torch.int64)


def sort_by_expert(expert_TK: torch.Tensor, n_experts: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Do what `kernels.moe.sort_by_expert` does, in one op."""
    return _sort(expert_TK.flatten().contiguous(), n_experts)
