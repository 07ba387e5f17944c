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
from torch.distributed._functional_collectives import AsyncCollectiveTensor

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


def _under_way(x: torch.Tensor) -> torch.Tensor:
    """Return the result of an exchange that is waited for where it is used first; a compiler moves the waits itself."""
    return ops.wait_tensor(x) if torch.compiler.is_compiling() else AsyncCollectiveTensor(x)


class _Bucket(torch.autograd.Function):
    """Gather several tensors, each along its dim, in one exchange; scatter and add their gradients in one or two."""

    @staticmethod
    def forward(ctx, gather, total, dims, *xs):
        ctx.gather, ctx.total, ctx.dims, ctx.shapes = gather, total, dims, [x.shape for x in xs]
        if gather is None:
            return tuple(x.view_as(x) for x in xs)
        flat = torch.cat([x.reshape(-1) for x in xs])
        whole = ops.wait_tensor(ops.all_gather_into_tensor(flat, gather.ways, gather.group)).view(gather.ways, -1)
        parts = whole.split([x.numel() for x in xs], 1)
        return tuple(
            part.reshape(gather.ways, *x.shape).movedim(0, dim).flatten(dim, dim + 1)
            for part, x, dim in zip(parts, xs, dims, strict=True)
        )

    @staticmethod
    def backward(ctx, *grads):
        gather, total = ctx.gather, ctx.total
        if gather is None:
            flat = torch.cat([g.reshape(-1) for g in grads])
        else:
            ways = gather.ways
            pieces = [g.unflatten(d, (ways, -1)).movedim(d, 0) for g, d in zip(grads, ctx.dims, strict=True)]
            flat = torch.cat([piece.reshape(ways, -1) for piece in pieces], 1).flatten()
            flat = _under_way(ops.reduce_scatter_tensor(flat, "sum", ways, gather.group))
        if total is not None:
            flat = _under_way(ops.all_reduce(flat, "sum", total.group))
        parts = flat.split([shape.numel() for shape in ctx.shapes])
        return None, None, None, *(part.view(shape) for part, shape in zip(parts, ctx.shapes, strict=True))


def bucket(xs: list[torch.Tensor], gather: Step | None, total: Step | None, dims: list[int]) -> list[torch.Tensor]:
    """Do to tensors of one dtype what `move` does with (gather,) and (scatter, total), each along its dim."""
    return list(_Bucket.apply(gather, total, dims, *xs))
