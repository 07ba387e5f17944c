"""What ranks say to each other about a tensor: steps along one mesh axis each, and the steps of its gradient.

    part     keep this rank's part of a dim          gather   put all ranks' parts of a dim together
    sum      add over ranks                          scatter  add over ranks, keep this rank's part of a dim
    max      take the largest over ranks
    swap     send parts of one dim away, get the other ranks' parts of another: an all-to-all
    scale    divide by the number of ranks: what all have alike becomes each one's share
    copy     repeat each element of a dim, `ways` times          fold   add the copies
    place    put this rank's part of a dim among zeros
    fit      make a dim `to` long: cut off its end, or add zeros to it

Tensors are plain, and collectives are the functional ones, which compilers see. Within a dim a step splits what is
there and joins what is innermost, so of several axes on one dim the last to come is the first to go.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

ops: Any = torch.ops._c10d_functional
wait = ops.wait_tensor


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
    whole = wait(ops.all_gather_into_tensor(x.contiguous(), s.ways, s.group))
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
        elif s.kind in ("sum", "max"):
            x = wait(ops.all_reduce(x.contiguous(), s.kind, s.group))
        elif s.kind == "scatter":
            pieces = _pieces(x, s).flatten(0, 1)
            x = wait(ops.reduce_scatter_tensor(pieces, "sum", s.ways, s.group))
        elif s.kind == "swap":
            pieces = _pieces(x, s)
            even = [1] * s.ways
            arrived = wait(ops.all_to_all_single(pieces, even, even, s.group))
            x = arrived.movedim(0, s.to).flatten(s.to, s.to + 1)
        elif s.kind == "copy":
            x = x.repeat_interleave(s.ways, s.dim)
        elif s.kind == "fold":
            x = x.unflatten(s.dim, (-1, s.ways)).sum(s.dim + 1)
        elif s.kind == "place":
            before, after = s.rank * x.shape[s.dim], (s.ways - 1 - s.rank) * x.shape[s.dim]
            x = F.pad(x, (0, 0) * (x.ndim - 1 - s.dim) + (before, after))
        elif s.kind == "fit":
            more = s.to - x.shape[s.dim]
            x = F.pad(x, (0, 0) * (x.ndim - 1 - s.dim) + (0, more)) if more > 0 else x.narrow(s.dim, 0, s.to)
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
    """Cast, take one list of steps forward, and another backward in the dtype from before the cast."""

    @staticmethod
    def forward(ctx, x, steps, back, dtype):
        ctx.back, ctx.dtype = back, x.dtype
        return run(x if dtype is None else x.to(dtype), steps)

    @staticmethod
    def backward(ctx, grad):
        return run(grad.to(ctx.dtype), ctx.back), None, None, None


def move(
    x: torch.Tensor, steps: tuple[Step, ...], back: tuple[Step, ...], dtype: torch.dtype | None = None
) -> torch.Tensor:
    """Cast, take `steps`, and `back` with the gradient: in the dtype of `x`."""
    if not steps and not back:
        return x if dtype is None else x.to(dtype)
    return _Move.apply(x, steps, back, dtype)


class Late:
    """Gradients' exchanges that backward goes on without: a layer's, until the layer before it is there as well.

    More would hold whole gradients of more layers; waiting at once would leave the links idle while a layer computes.
    """

    def __init__(self):
        self.of: Any = None
        self.begun: list[tuple[torch.Tensor, Step | None, torch.Tensor | None]] = []

    def begin(self, grad: torch.Tensor, gather: Step | None, total: Step | None, of: Any) -> torch.Tensor:
        """Begin to scatter a gradient, or else to add it; `of` is the same for what belongs to one layer."""
        if self.of is not of:
            self._advance()
            self.of = of
        if gather is None:
            return self._add(grad, total)
        part = ops.reduce_scatter_tensor(grad, "sum", gather.ways, gather.group)
        self.begun.append((part, total, grad))
        return part

    def _add(self, part: torch.Tensor, total: Step | None) -> torch.Tensor:
        if total is not None:
            self.begun.append((ops.all_reduce_(part, "sum", total.group), None, None))
        return part

    def _advance(self) -> None:
        """Wait for what is on its way, and begin the sums that come after it."""
        begun, self.begun = self.begun, []
        for part, total, _ in begun:
            wait(part)
            self._add(part, total)

    def settle(self) -> None:
        """Wait until all is there."""
        while self.begun:
            self._advance()


class Packed(NamedTuple):
    """How a parameter travels in 8 bits: shape of a rank's part as matrices, (..., O, I), and what packs it."""

    shape: tuple[int, ...]
    recipe: Any


class _Bucket(torch.autograd.Function):
    """Say that `whole` (ways n,) is what was gathered of tensors of n elements, whose gradient is scattered and added.

    Backward comes to this as soon as the gradient is there only if it is said after the layer before has run.
    """

    @staticmethod
    def forward(ctx, whole, gather, total, late, of, dtype, *xs):
        ctx.gather, ctx.total, ctx.late, ctx.of = gather, total, late, of
        ctx.shapes, ctx.dtype = [x.shape for x in xs], xs[0].dtype
        if whole.dtype != torch.uint8:
            return whole.detach()
        count = gather.ways * sum([x.numel() for x in xs])  # without storage: only the gradient has values
        return torch.zeros((), dtype=dtype or xs[0].dtype, device=whole.device).expand(count)

    @staticmethod
    def backward(ctx, grad):
        part = grad.to(ctx.dtype)
        if ctx.late is not None:
            part = ctx.late.begin(part, ctx.gather, ctx.total, ctx.of)
        else:
            if ctx.gather is not None:
                part = wait(ops.reduce_scatter_tensor(part, "sum", ctx.gather.ways, ctx.gather.group))
            if ctx.total is not None:
                part = wait(ops.all_reduce(part, "sum", ctx.total.group))
        sizes = [shape.numel() for shape in ctx.shapes]
        return *(None,) * 6, *(x.view(shape) for x, shape in zip(part.split(sizes), ctx.shapes, strict=True))


class _Wait(torch.autograd.Function):
    """Wait for an exchange that was begun elsewhere, outside of a compiled function for instance."""

    @staticmethod
    def forward(ctx, x):
        return wait(x).view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return grad


class _Unpack(torch.autograd.Function):
    """Return the values of packed bytes (ways, n); their gradient is that of `like` (ways, numbers)."""

    @staticmethod
    def forward(ctx, like, whole, packed):
        return packed.recipe.unpack(whole, packed.shape, like.dtype).view(like.shape)

    @staticmethod
    def backward(ctx, grad):
        return grad, None, None


@torch.no_grad()
def bucket(
    xs: list[torch.Tensor], gather: Step | None, dtype: torch.dtype | None, packed: list[Packed] | None = None
) -> torch.Tensor:
    """Begin to gather tensors of one dtype, cast, or packed into bytes, in one exchange."""
    if packed:
        cast = [x.to(dtype or x.dtype).view(p.shape) for x, p in zip(xs, packed, strict=True)]
        part = torch.cat([p.recipe.pack(x) for x, p in zip(cast, packed, strict=True)])
    else:
        part = torch.cat([x.reshape(-1).to(dtype or x.dtype) for x in xs])
    return part if gather is None else ops.all_gather_into_tensor(part, gather.ways, gather.group)


def bind(
    whole: torch.Tensor, xs: list[torch.Tensor], gather: Step | None, total: Step | None, late: Late | None, of: Any,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:  # fmt: skip
    """Bind what `bucket` returned to its tensors: gradients do what those of `move` with (scatter, total) do.

    With `late` they are not there before it is settled. `of` is the same for what belongs to one layer. What bytes are
    bound by has the values' number and `dtype`, but no values.
    """
    return _Bucket.apply(whole, gather, total, late, of, dtype, *xs)


def unpack(whole: torch.Tensor, xs: list[torch.Tensor], dims: list[int]) -> list[torch.Tensor]:
    """Return the tensors that were gathered, each along its dim, from the result of `bind`."""
    sizes = [x.numel() for x in xs]
    return _together(_Wait.apply(whole).view(-1, sum(sizes)).split(sizes, 1), xs, dims)


def unpack_bytes(
    bound: torch.Tensor, whole: torch.Tensor, xs: list[torch.Tensor], dims: list[int], packed: list[Packed]
) -> list[torch.Tensor]:
    """Return the tensors that were gathered in 8 bits, from the results of `bind` and of `bucket`."""
    sizes, nbytes = [x.numel() for x in xs], [p.recipe.packed(p.shape) for p in packed]
    likes, came = bound.view(-1, sum(sizes)).split(sizes, 1), wait(whole).view(-1, sum(nbytes)).split(nbytes, 1)
    return _together([_Unpack.apply(*part) for part in zip(likes, came, packed, strict=True)], xs, dims)


def _together(parts: Sequence[torch.Tensor], xs: list[torch.Tensor], dims: list[int]) -> list[torch.Tensor]:
    return [
        part.reshape(-1, *x.shape).movedim(0, dim).flatten(dim, dim + 1)
        for part, x, dim in zip(parts, xs, dims, strict=True)
    ]
