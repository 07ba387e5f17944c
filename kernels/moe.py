"""Dropless mixture of experts: sort tokens by expert, grouped matmuls, and the weighted sum back.

Every token fills exactly K slots, and the slots are permuted, never merged. So copying tokens to slots and summing
slots to tokens are gathers, and each is the other's gradient. No additions into shared memory, no atomics, the same
bits every run. A slot's weight multiplies its hidden units, which are at hand when the weight's gradient is computed.

Biases of gate and up are added to rows. Those of the down product are weighed and summed per token, so they are one
product of (T, E) weights, zero where an expert was not chosen, with (E, D) biases: 2 T E D FLOPs of the layer's
6 T K D F, and its gradients, two more such products, need no sum over an expert's rows.

Padding tokens carry expert id E: their slots sort last, no expert sees them, their result is zero.

With a process group the experts live on its ranks (E / ways each, in rank order): slots travel by an all-to-all to the
experts' ranks and back (https://arxiv.org/abs/2006.16668, without the capacity limit), in one of two forms. `exact`
sends just the rows, whose numbers it reads back to the host. `static` reads nothing back: every rank gets a block of
T min(K, E / ways) rows, all that can be meant for it; numbers on the device say how many are, and experts skip the
others. It moves and holds up to `ways` times as many bytes, and can be captured in a CUDA graph.

T tokens, K slots per token, R = T K rows, D model width, E experts, F expert width.
"""

from collections.abc import Callable

import torch
import torch.distributed._functional_collectives as collectives
import torch.nn.functional as F

from kernels.elementwise import Activation


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


class RowBias(torch.autograd.Function):
    """Add to rows (R, N) their experts' biases (E, N), nothing to rows of expert E. The biases' gradient is a product
    of rows with ones, zeros elsewhere: no additions into shared memory.
    """

    @staticmethod
    def forward(ctx, h_RN, bias_EN, expert_R):
        ctx.save_for_backward(expert_R)
        ctx.experts = bias_EN.shape[0]
        return h_RN + F.pad(bias_EN, (0, 0, 0, 1))[expert_R]

    @staticmethod
    def backward(ctx, grad_RN):
        (expert_R,) = ctx.saved_tensors
        mine_ER = torch.arange(ctx.experts, device=expert_R.device)[:, None] == expert_R
        return grad_RN, mine_ER.to(grad_RN.dtype) @ grad_RN, None


def layer(
    x_TD, weights_R, routing, slots: int, gate_up_E2FD, down_EDF, gate_up_bias_E2F, activation: Activation,
    expand, reduce,
) -> torch.Tensor:  # fmt: skip
    """Apply each expert's gated MLP to its rows, the hidden units weighted by `weights_R` if given; return (T, D)."""
    order_R, inverse_R, counts_E = routing
    h_RG = expand(x_TD, gate_up_E2FD.flatten(1, 2), counts_E, order_R, inverse_R, slots)
    if gate_up_bias_E2F is not None:
        index_R = torch.arange(h_RG.shape[0], device=h_RG.device)
        expert_R = torch.searchsorted(counts_E.cumsum(0), index_R, right=True)
        h_RG = RowBias.apply(h_RG, gate_up_bias_E2F.flatten(1), expert_R)
    hidden_RF = activation(h_RG)
    hidden_RF = hidden_RF if weights_R is None else hidden_RF * weights_R[:, None]
    return reduce(hidden_RF, down_EDF, counts_E, order_R, inverse_R, slots)


def add_bias(y_TD, weights_TK, expert_TK, bias_ED) -> torch.Tensor:
    """Add to each token the sum of its experts' biases, weighed unless `weights_TK` is None; ids beyond E - 1 add 0."""
    mine_TKE = expert_TK[..., None] == torch.arange(bias_ED.shape[0], device=y_TD.device)
    shares_TKE = mine_TKE.to(y_TD.dtype) if weights_TK is None else torch.where(mine_TKE, weights_TK[..., None], 0)
    return torch.addmm(y_TD, shares_TKE.sum(1), bias_ED)


def experts(
    x_TD: torch.Tensor,
    weights_TK: torch.Tensor,
    expert_TK: torch.Tensor,
    down_bias_ED: torch.Tensor | None,
    n_experts: int,
    local: int,
    mlp: Callable[..., torch.Tensor],
    sort: Callable[..., tuple[torch.Tensor, torch.Tensor, torch.Tensor]],
    exchange: Callable[..., torch.Tensor],
    group=None,
) -> torch.Tensor:
    """Return the weighted sum of each token's K experts, (T, D).

    `mlp(x, weights_R, routing, slots)` applies this rank's `local` experts, as `layer` does, but for the bias of the
    down product. `sort` is `sort_by_expert`, `exchange` is `exact` or `static`; only a process group needs it.
    `expert_TK` holds ids in [0, E], E meaning padding.
    """

    def apply(x_TD, expert_TK, routing, weights_TK=None, weights_R=None):
        y_TD = mlp(x_TD, weights_R, routing, expert_TK.shape[1])
        return y_TD if down_bias_ED is None else add_bias(y_TD, weights_TK, expert_TK, down_bias_ED)

    order_R, inverse_R, counts_E = routing = sort(expert_TK, n_experts)
    slots = expert_TK.shape[1]
    weights_R = Dispatch.apply(weights_TK.reshape(-1, 1), order_R, inverse_R, 1)[:, 0]
    if group is None:
        return apply(x_TD, expert_TK, routing, weights_TK, weights_R)
    x_RD = Dispatch.apply(x_TD, order_R, inverse_R, slots)
    arrived = lambda rows, expert: apply(rows, expert[:, None], sort(expert[:, None], local))  # noqa: E731
    y_RD = exchange(x_RD, counts_E, slots, local, arrived, group)
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


def exact(x_RD, counts_E, slots: int, local: int, apply: Callable, group) -> torch.Tensor:
    """Send rows to the ranks that hold their experts, apply them there, and bring the results back.

    `apply(rows, expert)` does so for rows (R, D) and the `local` experts' ids (R,), `local` meaning none.
    """
    ways = counts_E.shape[0] // local
    recv_counts = collectives.wait_tensor(collectives.all_to_all_single(counts_E, None, None, group))
    send, recv = (_by_rank(counts, ways, x_RD.shape[0]) for counts in (counts_E, recv_counts))
    for n in (*send, *recv):
        torch._check(n >= 0)
    rows = collectives.all_to_all_single_autograd(x_RD[: sum(send)], recv, send, group)
    # Rows arrive sorted by (source rank, expert); `apply` takes each for a token with one slot.
    expert = torch.arange(local, device=rows.device).repeat(ways).repeat_interleave(recv_counts, output_size=sum(recv))
    y = apply(rows, expert)
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


def static(x_RD, counts_E, slots: int, local: int, apply: Callable, group) -> torch.Tensor:
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
    y = apply(arrived, expert_PC.flatten())
    back = collectives.all_to_all_single_autograd(y, even, even, group)
    return Place.apply(back, inverse_R, index_PC.flatten())
