"""Dropless mixture of experts: sort tokens by expert, grouped matmuls, and the weighted sum back.

Every token fills exactly K slots, and the slots are permuted, never merged. So copying tokens to slots and summing
slots to tokens are gathers, and each is the other's gradient. No additions into shared memory, no atomics, the same
bits every run. A slot's weight multiplies its hidden units, which are at hand when the weight's gradient is computed.

Padding tokens carry expert id E: their slots sort last, no expert sees them, their result is zero.

With a process group the experts live on its ranks (E / ways each, in rank order): slots travel by an all-to-all to the
experts' ranks and back (https://arxiv.org/abs/2006.16668, without the capacity limit), in one of two forms. `exact`
sends just the rows, whose numbers it reads back to the host. `static` reads nothing back: every rank gets a block of
T min(K, E / ways) rows, all that can be meant for it; numbers on the device say how many are, and experts skip the
others. It moves and holds up to `ways` times as many bytes, and can be captured in a CUDA graph.

T tokens, K slots per token, R = T K rows, D model width, E experts, F expert width.
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.distributed._functional_collectives as collectives

from kernels.elementwise import swiglu


def sort_by_expert(expert_TK: torch.Tensor, n_experts: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return order (R,) sorting slots by expert, stably; its inverse (R,); tokens per expert (E,), int64."""
    sorted_R, order_R = expert_TK.flatten().sort(stable=True)
    index_R = torch.arange(order_R.shape[0], device=order_R.device)
    inverse_R = torch.zeros_like(order_R).scatter(0, order_R, index_R)
    borders = torch.searchsorted(sorted_R, torch.arange(n_experts + 1, device=order_R.device))
    return order_R, inverse_R, borders.diff()


def _token(order_R: torch.Tensor, slots: int) -> torch.Tensor:
    """Return the token of each row."""
    return order_R if slots == 1 else order_R // slots  # a division by one would stay in Inductor's innermost loops


class Dispatch(torch.autograd.Function):
    """Copy tokens (T, D) to their sorted slots (R, D), K of them each."""

    @staticmethod
    def forward(ctx, x_TD, order_R, inverse_R, slots):
        ctx.save_for_backward(inverse_R)
        ctx.slots = slots
        return x_TD[_token(order_R, slots)]

    @staticmethod
    def backward(ctx, grad_RD):
        (inverse_R,) = ctx.saved_tensors
        return grad_RD[inverse_R].unflatten(0, (-1, ctx.slots)).sum(1), None, None, None


class Combine(torch.autograd.Function):
    """Sum each token's K sorted slots (R, D) to (T, D); the adjoint of `Dispatch`."""

    @staticmethod
    def forward(ctx, y_RD, order_R, inverse_R, slots):
        ctx.save_for_backward(order_R)
        ctx.slots = slots
        return y_RD[inverse_R].unflatten(0, (-1, slots)).sum(1)

    @staticmethod
    def backward(ctx, grad_TD):
        (order_R,) = ctx.saved_tensors
        return grad_TD[_token(order_R, ctx.slots)], None, None, None


def gather_matmul(x_TI, w_EOI, counts_E, order_R, inverse_R, slots: int, matmul) -> torch.Tensor:
    """Compose `kernels.grouped_matmul.gather_matmul` from any grouped matmul."""
    return matmul(Dispatch.apply(x_TI, order_R, inverse_R, slots), w_EOI, counts_E)


def matmul_combine(x_RI, w_EOI, counts_E, order_R, inverse_R, slots: int, matmul) -> torch.Tensor:
    """Compose `kernels.grouped_matmul.matmul_combine` from any grouped matmul."""
    return Combine.apply(matmul(x_RI, w_EOI, counts_E), order_R, inverse_R, slots)


def layer(x_TD, weights_R, routing, slots: int, gate_up_E2FD, down_EDF, expand, reduce) -> torch.Tensor:
    """Apply each expert's SwiGLU MLP to its rows, the hidden units weighted by `weights_R` if given; return (T, D)."""
    order_R, inverse_R, counts_E = routing
    hidden_RF = swiglu(expand(x_TD, gate_up_E2FD.flatten(1, 2), counts_E, order_R, inverse_R, slots))
    hidden_RF = hidden_RF if weights_R is None else hidden_RF * weights_R[:, None]
    return reduce(hidden_RF, down_EDF, counts_E, order_R, inverse_R, slots)


def experts(
    x_TD: torch.Tensor,
    weights_TK: torch.Tensor,
    expert_TK: torch.Tensor,
    gate_up_E2FD: torch.Tensor,
    down_EDF: torch.Tensor,
    n_experts: int,
    mlp: Callable[..., torch.Tensor],
    exchange: Callable[..., torch.Tensor],
    group=None,
) -> torch.Tensor:
    """Return the weighted sum of each token's K experts, (T, D).

    `exchange` is `exact` or `static`; only a process group needs it. `expert_TK` holds ids in [0, E], E meaning
    padding; the weight tensors hold this rank's experts. `mlp` applies them, as `layer` does.
    """
    order_R, inverse_R, counts_E = routing = sort_by_expert(expert_TK, n_experts)
    slots = expert_TK.shape[1]
    weights_R = Dispatch.apply(weights_TK.reshape(-1, 1), order_R, inverse_R, 1)[:, 0]
    mlp = partial(mlp, gate_up_E2FD=gate_up_E2FD, down_EDF=down_EDF)
    if group is None:
        return mlp(x_TD, weights_R, routing, slots)
    x_RD = Dispatch.apply(x_TD, order_R, inverse_R, slots)
    y_RD = exchange(x_RD, counts_E, slots, gate_up_E2FD.shape[0], mlp, group)
    return Combine.apply(y_RD * weights_R[:, None], order_R, inverse_R, slots)


def all_gather(x: torch.Tensor, group: str, ways: int) -> torch.Tensor:
    """Return equal tensors of all ranks of a group, one after the other along a new first dim; not differentiable."""
    ops = torch.ops._c10d_functional
    whole = ops.wait_tensor(ops.all_gather_into_tensor(x.detach().contiguous(), ways, group))
    return whole.view(ways, *x.shape)


def _by_rank(counts_E: torch.Tensor, ways: int, rows: int) -> list[int]:
    """Read back how many rows each rank has; of tensors that are shapes only, as if routing were balanced."""
    if counts_E.is_meta:
        return [rows // ways + (i < rows % ways) for i in range(ways)]
    return counts_E.view(ways, -1).sum(1).tolist()


def exact(x_RD, counts_E, slots: int, local: int, mlp: Callable, group) -> torch.Tensor:
    """Send rows to the ranks that hold their experts, apply them there, and bring the results back."""
    ways = counts_E.shape[0] // local
    recv_counts = collectives.wait_tensor(collectives.all_to_all_single(counts_E, None, None, group))
    send, recv = (_by_rank(counts, ways, x_RD.shape[0]) for counts in (counts_E, recv_counts))
    for n in (*send, *recv):
        torch._check(n >= 0)
    rows = collectives.all_to_all_single_autograd(x_RD[: sum(send)], recv, send, group)
    # Rows arrive sorted by (source rank, expert); here each is a token with one slot.
    expert = torch.arange(local, device=rows.device).repeat(ways).repeat_interleave(recv_counts, output_size=sum(recv))
    y = mlp(rows, None, sort_by_expert(expert[:, None], local), 1)
    back = collectives.all_to_all_single_autograd(y, send, recv, group)
    return torch.cat([back, x_RD.new_zeros(x_RD.shape[0] - sum(send), back.shape[1])])


class Place(torch.autograd.Function):
    """Put rows (R, D) where `index` (P,) says, zeros where it is -1; `inverse` (R,) is where each went, -1 nowhere."""

    @staticmethod
    def forward(ctx, x_RD, index_P, inverse_R):
        ctx.save_for_backward(index_P, inverse_R)
        return torch.where((index_P >= 0)[:, None], x_RD[index_P.clamp_min(0)], 0)

    @staticmethod
    def backward(ctx, grad_PD):
        index_P, inverse_R = ctx.saved_tensors
        return torch.where((inverse_R >= 0)[:, None], grad_PD[inverse_R.clamp_min(0)], 0), None, None


def static(x_RD, counts_E, slots: int, local: int, mlp: Callable, group) -> torch.Tensor:
    """Do what `exact` does with blocks of one size for every rank."""
    ways, rows = counts_E.shape[0] // local, x_RD.shape[0]
    block = rows // slots * min(slots, local)
    recv_PE = collectives.wait_tensor(collectives.all_to_all_single(counts_E, None, None, group)).view(ways, local)
    ends_P = counts_E.view(ways, local).sum(1).cumsum(0)
    starts_P = torch.cat([ends_P.new_zeros(1), ends_P[:-1]])
    place_C, row_R = torch.arange(block, device=x_RD.device), torch.arange(rows, device=x_RD.device)
    index_PC = starts_P[:, None] + place_C
    index_PC = torch.where(index_PC < ends_P[:, None], index_PC, -1)
    rank_R = torch.searchsorted(ends_P, row_R, right=True)  # rows of padding come after all ranks'
    inverse_R = rank_R * block + row_R - starts_P[rank_R.clamp_max(ways - 1)]
    inverse_R = torch.where(rank_R < ways, inverse_R, -1)

    even = [block] * ways
    sent = Place.apply(x_RD, index_PC.flatten(), inverse_R)
    arrived = collectives.all_to_all_single_autograd(sent, even, even, group)
    expert_PC = torch.searchsorted(recv_PE.cumsum(1), place_C.expand(ways, block).contiguous(), right=True)
    y = mlp(arrived, None, sort_by_expert(expert_PC.reshape(-1, 1), local), 1)
    back = collectives.all_to_all_single_autograd(y, even, even, group)
    return Place.apply(back, inverse_R, index_PC.flatten())
