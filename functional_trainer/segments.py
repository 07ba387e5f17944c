"""Sums over the sequences of packed rows."""

import torch
import torch.nn.functional as F


def _sums(x_BS: torch.Tensor, segment_ids_BS: torch.Tensor) -> torch.Tensor:
    border_BS = F.pad(segment_ids_BS[:, 1:] != segment_ids_BS[:, :-1], (1, 0))
    run_BS = border_BS.cumsum(1)
    first_BS, last_BS = torch.searchsorted(run_BS, run_BS), torch.searchsorted(run_BS, run_BS, right=True)
    sums_BS = F.pad(x_BS.cumsum(1), (1, 0))
    return sums_BS.gather(1, last_BS) - sums_BS.gather(1, first_BS)


class _SegmentSum(torch.autograd.Function):
    """The matrix that says which tokens share a segment is symmetric: the gradient is summed over segments as well."""

    @staticmethod
    def forward(ctx, x_BS, segment_ids_BS):
        ctx.save_for_backward(segment_ids_BS)
        return _sums(x_BS, segment_ids_BS)

    @staticmethod
    def backward(ctx, grad_BS):
        return _sums(grad_BS, *ctx.saved_tensors), None


def segment_sum(x_BS: torch.Tensor, segment_ids_BS: torch.Tensor, shard) -> torch.Tensor:
    """Return for every token the sum of `x` over its segment, (B, S) in float64.

    A segment is a run of equal ids. `x` is finite everywhere, also in padding. Differences of running sums: in float32
    they would cost the sign of the difference of two long sequences' log-probabilities. Where ranks share rows each
    takes them whole.
    """
    whole = "batch/columns > act/attn_rows"
    run = shard.local(_SegmentSum.apply, (whole, whole), ("act/attn_rows > batch/columns",))
    return run(x_BS.to(torch.float64), segment_ids_BS)
