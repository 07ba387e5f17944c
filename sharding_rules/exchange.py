"""What ranks say to each other about a tensor: steps along one mesh axis each, and the steps of its gradient.

    part     keep this rank's part of a dim          gather   put all ranks' parts of a dim together
    sum      add over ranks                          scatter  add over ranks, keep this rank's part of a dim
    swap     send parts of one dim away, get the other ranks' parts of another: an all-to-all
    scale    divide by the number of ranks: what all have alike becomes each one's share
    copy     repeat each element of a dim, `ways` times          fold   add the copies
    place    put this rank's part of a dim among zeros

Tensors are plain, and collectives are the functional ones, which compilers see. Within a dim a step splits what is
there and joins what is innermost, so of several axes on one dim the last to come is the first to go.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

ops: Any = torch.ops._c10d_functional


class Step(NamedTuple):
    """One exchange. `dim` is what is split, gathered or sent away; `to` is where a swap puts what arrives."""

    kind: str
    dim: int
    to: int
    rank: int
    ways: int
    group: str


def _gathered(x: torch.Tensor, s: Step, dim: int) -> torch.Tensor:
    """Put equal tensors of all ranks together along `dim`."""
    whole = ops.wait_tensor(ops.all_gather_into_tensor(x.contiguous(), s.ways, s.group))
    return whole if dim == 0 else whole.unflatten(0, (s.ways, -1)).movedim(0, dim).flatten(dim, dim + 1)


def _pieces(x: torch.Tensor, s: Step) -> torch.Tensor:
    """Cut `s.dim` into a part for each rank, the parts one after the other in memory."""
    return x.unflatten(s.dim, (s.ways, -1)).movedim(s.dim, 0).contiguous()


def run(x: torch.Tensor, steps: tuple[Step, ...]) -> torch.Tensor:
    """Take steps, in order."""
    for s in steps:
        if s.kind == "part":
            size = x.shape[s.dim] // s.ways
            x = x.narrow(s.dim, s.rank * size, size)
        elif s.kind == "gather":
            x = _gathered(x, s, s.dim)
        elif s.kind == "sum":
            x = ops.wait_tensor(ops.all_reduce(x.contiguous(), "sum", s.group))
        elif s.kind == "scatter":
            pieces = _pieces(x, s).flatten(0, 1)
            x = ops.wait_tensor(ops.reduce_scatter_tensor(pieces, "sum", s.ways, s.group))
        elif s.kind == "swap":
            pieces = _pieces(x, s)
            even = [1] * s.ways
            arrived = ops.wait_tensor(ops.all_to_all_single(pieces, even, even, s.group))
            x = arrived.movedim(0, s.to).flatten(s.to, s.to + 1)
        elif s.kind == "copy":
            x = x.repeat_interleave(s.ways, s.dim)
        elif s.kind == "fold":
            x = x.unflatten(s.dim, (-1, s.ways)).sum(s.dim + 1)
        elif s.kind == "place":
            before, after = s.rank * x.shape[s.dim], (s.ways - 1 - s.rank) * x.shape[s.dim]
            x = F.pad(x, (0, 0) * (x.ndim - 1 - s.dim) + (before, after))
        elif s.kind == "scale":
            x = x / s.ways
        else:
            raise ValueError(f"{s} is not a step")
    return x


def check(shape: Sequence[int], steps: tuple[Step, ...], name: str) -> None:
    """Raise ValueError if a dim does not divide into the parts that the steps cut of it."""
    sizes = list(shape)
    for s in steps:
        if s.kind == "copy":
            sizes[s.dim] *= s.ways
        if s.kind in ("part", "scatter", "swap"):
            if sizes[s.dim] % s.ways:
                raise ValueError(
                    f"{name}: dim {s.dim} of this rank's {tuple(sizes)} does not divide into {s.ways} parts; "
                    f"change the mesh or the rule"
                )
            sizes[s.dim] //= s.ways
        if s.kind in ("gather", "swap"):
            sizes[s.dim if s.kind == "gather" else s.to] *= s.ways


class _Move(torch.autograd.Function):
    """Take one list of steps forward and another backward."""

    @staticmethod
    def forward(ctx, x, steps, back):
        ctx.back = back
        return run(x, steps)

    @staticmethod
    def backward(ctx, grad):
        return run(grad, ctx.back), None, None


def move(x: torch.Tensor, steps: tuple[Step, ...], back: tuple[Step, ...]) -> torch.Tensor:
    """Take `steps`, and `back` with the gradient."""
    return _Move.apply(x, steps, back) if steps or back else x


class _Bucket(torch.autograd.Function):
    """Begin to gather flat parts (n,) to (ways n,); scatter and add the gradient, over `total`'s ranks too if given.

    The gradient's exchange is waited for at once: until then it would hold the whole gradients of every layer.
    """

    @staticmethod
    def forward(ctx, part, gather, total):
        ctx.gather, ctx.total = gather, total
        if gather is None:
            return part.view_as(part)
        return ops.all_gather_into_tensor(part, gather.ways, gather.group)

    @staticmethod
    def backward(ctx, grad):
        part = grad
        if ctx.gather is not None:
            part = ops.wait_tensor(ops.reduce_scatter_tensor(part, "sum", ctx.gather.ways, ctx.gather.group))
        if ctx.total is not None:
            part = ops.wait_tensor(ops.all_reduce(part, "sum", ctx.total.group))
        return part, None, None


class _Wait(torch.autograd.Function):
    """Wait for an exchange that was begun elsewhere, outside of a compiled function for instance."""

    @staticmethod
    def forward(ctx, x):
        return ops.wait_tensor(x).view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return grad


def bucket(xs: list[torch.Tensor], gather: Step | None, total: Step | None) -> torch.Tensor:
    """Begin to do to tensors of one dtype what `move` does with (gather,) and (scatter, total): in one exchange."""
    return _Bucket.apply(torch.cat([x.reshape(-1) for x in xs]), gather, total)


def unpack(whole: torch.Tensor, xs: list[torch.Tensor], dims: list[int]) -> list[torch.Tensor]:
    """Return the tensors that were gathered, each along its dim, from the result of `bucket`."""
    sizes = [x.numel() for x in xs]
    parts = _Wait.apply(whole).view(-1, sum(sizes)).split(sizes, 1)
    return [
        part.reshape(-1, *x.shape).movedim(0, dim).flatten(dim, dim + 1)
        for part, x, dim in zip(parts, xs, dims, strict=True)
    ]
