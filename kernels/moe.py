"""Dropless mixture of experts: sort tokens by expert, grouped matmuls, and the weighted sum back.

Every token fills exactly K slots, and the slots are permuted, never merged. So both gathers have gradients that are
gathers too: dispatch's is the sum of a token's K slots, combine's is a copy to K slots. No additions into shared
memory, no atomics, the same bits every run.

Padding tokens carry expert id E: their slots sort last, no expert sees them, their result is zero.

With a process group the experts live on its ranks (E / ways each, in rank order): slots travel by an all-to-all with
exact split sizes to the experts' ranks and back (https://arxiv.org/abs/2006.16668, without the capacity limit).

T tokens, K slots per token, R = T K rows, D model width, E experts, F expert width.
"""

from collections.abc import Callable

import torch
import torch.distributed._functional_collectives as collectives

from kernels.elementwise import swiglu

GroupedMatmul = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def sort_by_expert(expert_TK: torch.Tensor, n_experts: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return order (R,) sorting slots by expert, stably; its inverse (R,); tokens per expert (E,), int64."""
    sorted_R, order_R = expert_TK.flatten().sort(stable=True)
    index_R = torch.arange(order_R.shape[0], device=order_R.device)
    inverse_R = torch.zeros_like(order_R).scatter(0, order_R, index_R)
    borders = torch.searchsorted(sorted_R, torch.arange(n_experts + 1, device=order_R.device))
    return order_R, inverse_R, borders.diff()


class Permute(torch.autograd.Function):
    """`x[order]` for a permutation, with `grad[inverse]` as its gradient."""

    @staticmethod
    def forward(ctx, x, order, inverse):
        ctx.save_for_backward(inverse)
        return x[order]

    @staticmethod
    def backward(ctx, grad):
        (inverse,) = ctx.saved_tensors
        return grad[inverse], None, None


class Dispatch(torch.autograd.Function):
    """Copy tokens (T, D) to their sorted slots (R, D)."""

    @staticmethod
    def forward(ctx, x_TD, order_R, inverse_R):
        ctx.save_for_backward(inverse_R)
        ctx.tokens = x_TD.shape[0]
        return x_TD[order_R // (order_R.shape[0] // x_TD.shape[0])]

    @staticmethod
    def backward(ctx, grad_RD):
        (inverse_R,) = ctx.saved_tensors
        return grad_RD[inverse_R].unflatten(0, (ctx.tokens, -1)).sum(1), None, None


class Combine(torch.autograd.Function):
    """Sum each token's K sorted slots (R, D) with weights (T, K) to (T, D)."""

    @staticmethod
    def forward(ctx, y_RD, weights_TK, order_R, inverse_R):
        ctx.save_for_backward(y_RD, weights_TK, order_R, inverse_R)
        return (y_RD[inverse_R].unflatten(0, weights_TK.shape) * weights_TK[..., None]).sum(1)

    @staticmethod
    def backward(ctx, grad_TD):
        y_RD, weights_TK, order_R, inverse_R = ctx.saved_tensors
        token_R = order_R // weights_TK.shape[1]
        grad_y_RD = grad_TD[token_R] * weights_TK.flatten()[order_R][:, None]
        grad_w_TK = (y_RD[inverse_R].unflatten(0, weights_TK.shape) * grad_TD[:, None]).sum(-1)
        return grad_y_RD, grad_w_TK, None, None


def mlp(x_RD, counts_E, gate_up_E2FD, down_EDF, matmul: GroupedMatmul) -> torch.Tensor:
    """Apply each expert's SwiGLU MLP to its rows."""
    return matmul(swiglu(matmul(x_RD, gate_up_E2FD.flatten(1, 2), counts_E)), down_EDF, counts_E)


def experts(
    x_TD: torch.Tensor,
    weights_TK: torch.Tensor,
    expert_TK: torch.Tensor,
    gate_up_E2FD: torch.Tensor,
    down_EDF: torch.Tensor,
    n_experts: int,
    matmul: GroupedMatmul,
    group=None,
) -> torch.Tensor:
    """Return the weighted sum of each token's K experts, (T, D).

    `expert_TK` holds ids in [0, E], E meaning padding; the weight tensors hold this rank's experts.
    """
    order_R, inverse_R, counts_E = sort_by_expert(expert_TK, n_experts)
    x_RD = Dispatch.apply(x_TD, order_R, inverse_R)
    if group is None:
        y_RD = mlp(x_RD, counts_E, gate_up_E2FD, down_EDF, matmul)
    else:
        y_RD = _exchange(x_RD, counts_E, gate_up_E2FD, down_EDF, matmul, group)
    return Combine.apply(y_RD, weights_TK, order_R, inverse_R)


def _exchange(x_RD, counts_E, gate_up, down, matmul, group) -> torch.Tensor:
    """Send rows to the ranks that hold their experts, apply them there, and bring the results back."""
    local = gate_up.shape[0]
    ways = counts_E.shape[0] // local
    recv_counts = collectives.wait_tensor(collectives.all_to_all_single(counts_E, None, None, group))
    send = counts_E.view(ways, local).sum(1).tolist()
    recv = recv_counts.view(ways, local).sum(1).tolist()
    for n in (*send, *recv):
        torch._check(n >= 0)
    rows = collectives.all_to_all_single_autograd(x_RD[: sum(send)], recv, send, group)
    # Rows arrive sorted by (source rank, expert); the matmul wants them sorted by expert.
    expert = torch.arange(local, device=rows.device).repeat(ways).repeat_interleave(recv_counts, output_size=sum(recv))
    order = expert.argsort(stable=True)
    inverse = torch.zeros_like(order).scatter(0, order, torch.arange(sum(recv), device=rows.device))
    y = mlp(Permute.apply(rows, order, inverse), recv_counts.view(ways, local).sum(0), gate_up, down, matmul)
    back = collectives.all_to_all_single_autograd(Permute.apply(y, inverse, order), send, recv, group)
    return torch.cat([back, x_RD.new_zeros(x_RD.shape[0] - sum(send), back.shape[1])])
