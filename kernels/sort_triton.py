"""Counting sort of slots by expert, in two Triton kernels and one prefix sum.

Each block of BLOCK slots counts its slots of every expert (_count); the running sum of these counts, expert by expert
and block by block within, says where a block's slots of an expert begin; a slot's place is that, and how many slots of
its expert come before it in its block (_place). So the order is stable, whole numbers are all that is added, every slot
is written once, and nothing is read back to the host. The result equals `kernels.moe.sort_by_expert`.

Bytes: 8 R read twice and 16 R written, and 4 (E + 1) R / BLOCK written and read twice: at 32768 tokens, K = 8 and
E = 128 some 10 MiB. BLOCK R comparisons.

There is no kernel for the router's top-k. Its probabilities have to exist in any case, for the balance loss, whose
gradient passes through all of them; softmax, gather and renormalising are elementwise passes that Inductor fuses, with
their gradients; what would be saved is `torch.topk` alone, whose result selective recomputation keeps by its name.

R slots, T tokens of K slots each, E experts; the id E is padding and sorts last.
"""

import torch
import triton
import triton.language as tl

BLOCK = 128


@triton.jit
def _count(expert, counts, R, E: tl.constexpr, E2: tl.constexpr, BLOCK: tl.constexpr):
    """counts (E + 1, blocks), int32: slots of each expert in each block of expert (R,)."""
    slot, e = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.arange(0, E2)
    # Slots beyond the last count for a bin that nobody reads.
    found = tl.histogram(tl.load(expert + slot, slot < R, E2 - 1).to(tl.int32), E2)
    tl.store(counts + e * tl.num_programs(0) + tl.program_id(0), found, e <= E)


@triton.jit
def _place(expert, ends, order, inverse, R, BLOCK: tl.constexpr):
    """order and inverse (R,) from expert (R,) and the running sum `ends` of the counts, (E + 1, blocks)."""
    first, i = tl.program_id(0) * BLOCK, tl.arange(0, BLOCK)
    mine = tl.load(expert + first + i, first + i < R, -1).to(tl.int32)
    before = (mine[:, None] == mine[None, :]) & (i[None, :] < i[:, None])
    at = mine * tl.num_programs(0) + tl.program_id(0)
    start = tl.load(ends + at - 1, (at > 0) & (first + i < R), 0)
    place = (start + tl.sum(before.to(tl.int32), 1)).to(tl.int64)
    tl.store(inverse + first + i, place, first + i < R)
    tl.store(order + place, (first + i).to(tl.int64), first + i < R)


def bins(experts: int) -> int:
    """Return the size of a block's histogram: E, padding, and one bin for what is beyond the last slot."""
    return max(triton.next_power_of_2(experts + 2), 32)


def sort(expert: torch.Tensor, experts: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return order (R,), inverse (R,) and counts (E,), int64, of the experts (R,) of slots."""
    R = expert.shape[0]
    blocks = triton.cdiv(R, BLOCK)
    order, inverse = (torch.empty(R, dtype=torch.int64, device=expert.device) for _ in range(2))
    counts = torch.empty(experts + 1, blocks, dtype=torch.int32, device=expert.device)
    if R:
        _count[(blocks,)](expert, counts, R, E=experts, E2=bins(experts), BLOCK=BLOCK)
        ends = counts.flatten().cumsum(0, dtype=torch.int32)
        _place[(blocks,)](expert, ends, order, inverse, R, BLOCK=BLOCK)
    return order, inverse, counts[:-1].sum(1)
