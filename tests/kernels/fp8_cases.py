"""What is asked of the Triton kernels of products in 8 bits, to be run where Triton interprets."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from triton.runtime import interpreter

import kernels
from kernels import _fp8 as fp8
from kernels import fp8_fused, fp8_triton

CONFIGS = fp8_triton.CONFIGS["sm90"]["product"]
TILE = kernels.RECIPES["tile"]
TYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16, "fp8e4nv": torch.float8_e4m3fn}
BITS = {8: torch.uint8, 16: torch.int16, 32: torch.int32}


def cast(data: Any, source: Any, to: Any, rounding: Any) -> Any:
    """Do what a GPU does: round to even, NaN stays NaN. The interpreter's own casts to e4m3 truncate and lose NaN."""
    bits = torch.from_numpy(np.ascontiguousarray(data)).view(BITS[source.primitive_bitwidth])
    return bits.view(TYPES[source.name]).to(TYPES[to.name]).view(BITS[to.primitive_bitwidth]).numpy()


def prepare() -> None:
    """Have exact casts, the backend on the host, and NaN in memory that nobody has written to."""
    interpreter._convert_float = cast
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    for op in ("fp8_linear", "fp8_experts"):
        here = [b._replace(serves=("cpu",)) if b.name == "triton" else b for b in kernels.BACKENDS[op]]
        kernels.BACKENDS[op] = tuple(here)


@dataclass(frozen=True)
class Case:
    """Rows of each expert and of none; sizes; `spread` is how many binades rows and columns lie apart at most, `config`
    the place of the product's among its candidates.
    """

    counts: tuple[int, ...] = (150, 0, 1)
    none: int = 3
    slots: int = 1
    inputs: int = 140
    outputs: int = 130
    gather: bool = True
    dtype: torch.dtype = torch.float32
    spread: int = 3
    config: int = 0
    seed: int = 0

    @property
    def rows(self) -> int:
        return -(-(sum(self.counts) + self.none) // self.slots) * self.slots


def randn(c: Case, *shape: int, more: int = 0) -> torch.Tensor:
    """Draw values of which some rows and columns are far larger than others, and some are zero."""
    gen = torch.Generator().manual_seed(c.seed + 1000 * more)
    x = torch.randn(shape, generator=gen)
    for dim in (-1, -2):
        size = [shape[dim] if d == dim % len(shape) else 1 for d in range(len(shape))]
        x = x * torch.exp2(torch.randint(-c.spread, c.spread + 1, size, generator=gen))
    return (x / 16 * (torch.rand(shape, generator=gen) > 0.1)).to(c.dtype)


def same(got: torch.Tensor, wanted: torch.Tensor) -> bool:
    """Say whether two tensors have the same bits, whatever the sign of NaN."""
    a, b = (t.contiguous().view(BITS[8 * t.itemsize]) for t in (got, wanted))
    return (
        got.dtype == wanted.dtype
        and got.shape == wanted.shape
        and bool(((a == b) | got.isnan() & wanted.isnan()).all())
    )


def quantises(c: Case, bad: float | None) -> list[str]:
    """Return what is not, to the bit, what the emulation makes of values of which one is `bad`."""
    counts, columns, E = torch.tensor(c.counts), c.inputs, len(c.counts)
    x, w = randn(c, c.rows // c.slots, columns), randn(c, E, c.outputs, columns, more=1)
    if bad is not None and c.rows:
        x[c.seed % len(x), c.seed % columns] = w[c.seed % E, c.seed % c.outputs, c.seed % columns] = bad
    order = torch.randperm(c.rows, generator=torch.Generator().manual_seed(c.seed))
    ends, tiles = fp8_fused._ends(counts, order), c.rows // 128 + E
    by_row, by_square = fp8.quantise(x, 1, 128), fp8.quantise(w, 128, 128)
    data, scale = fp8_fused._by_rows(x)
    square, square_turned, square_scale = fp8_fused._by_squares(w)
    found = {
        "rows": same(data[:, :columns], by_row.data)
        and same(scale.mT, by_row.scale)
        and not data[:, columns:].float().any(),
        "squares": same(square.unflatten(0, (E, -1))[..., :columns], by_square.data)
        and same(square_turned.unflatten(1, (E, -1))[..., : c.outputs].transpose(0, 1).mT, by_square.data)
        and same(square_scale.unflatten(0, (E, -1)), by_square.scale)
        and not square_turned.unflatten(1, (E, -1))[..., c.outputs :].float().any(),
    }
    own = x[order // c.slots][: sum(c.counts)]  # the rows of experts
    again = by_row.to(torch.float32)[order // c.slots][: sum(c.counts)]
    run = partial(fp8_fused._quantise, ends=ends, columns=columns, tiles=tiles)
    padded = x[order // c.slots].contiguous()
    for name, made, of in (
        ("turned", run(x, None, order, slots=c.slots, form="turned")[2:], own),
        ("turned again", run(data, scale, order, slots=c.slots, form="turned")[2:], again),
        ("both", run(padded, None, None, slots=1, form="both")[2:], own),
    ):
        place = torch.cat([b * 128 + torch.arange(n) for b, n in zip(starts(c), c.counts, strict=True)])
        back = (made[0].float()[:, place] * made[1].mT.repeat_interleave(128, 1)[:, place]).mT
        found[name] = same(back, fp8.along_rows(of.float(), counts, 128))
        pads = torch.ones(sum(-(-n // 128) * 128 for n in c.counts), dtype=torch.bool)
        pads[place] = False
        found[f"{name}, pads"] = not made[0].float()[:, : len(pads)][:, pads].any()
    data, scale, *_ = run(padded, None, None, slots=1, form="both")
    wanted = fp8.quantise(own, 1, 128)
    found["both, rows"] = same(data[: len(own), :columns], wanted.data) and same(scale.mT[: len(own)], wanted.scale)
    return [name for name, right in found.items() if not right]


def starts(c: Case) -> list[int]:
    """Return each expert's first block."""
    blocks = [-(-n // 128) for n in c.counts]
    return [sum(blocks[:e]) for e in range(len(blocks))]


def results(fn: Any, leaves: list[torch.Tensor], grad: torch.Tensor, dtype: torch.dtype) -> list[torch.Tensor]:
    """Return the result and all gradients."""
    leaves = [x.to(dtype).requires_grad_() for x in leaves]
    out = fn(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad.to(dtype))]


def grouped(c: Case, ours: bool, dtype: torch.dtype, bad: tuple[int, float] | None = None) -> list[torch.Tensor]:
    """Return a grouped product and its gradients by the kernels, or emulated; one value is `bad`, of x, w or g."""
    order = torch.randperm(c.rows, generator=torch.Generator().manual_seed(c.seed))
    tokens = c.rows // c.slots
    sizes = (tokens, c.rows) if c.gather else (c.rows, tokens)
    x, g = randn(c, sizes[0], c.inputs), randn(c, sizes[1], c.outputs, more=2)
    w = randn(c, len(c.counts), c.outputs, c.inputs, more=1)
    if bad is not None:
        (x, w[0], g)[bad[0]][0, 0] = bad[1]
    name = "gather_matmul" if c.gather else "matmul_combine"
    fn = getattr(fp8_fused, name) if ours else partial(getattr(fp8, name), products=kernels._fp8_host)
    more = torch.tensor(c.counts), order, order.argsort(), c.slots, TILE
    return results(lambda x, w: fn(x, w, *more), [x, w], g, dtype)


def dense(c: Case, sizes: tuple[int, ...], backend: str, dtype: torch.dtype) -> list[torch.Tensor]:
    """Return a product of several weights at once with a bias, and its gradients."""
    x, g = randn(c, 2, c.rows, c.inputs), randn(c, 2, c.rows, sum(sizes), more=2)
    bias, ws = (
        randn(c, 1, sum(sizes), more=9)[0].to(dtype),
        [randn(c, n, c.inputs, more=i) for i, n in enumerate(sizes, 3)],
    )

    def fn(x, *ws):
        return kernels.linear(x, *ws, bias=bias.to(dtype), recipe=TILE, backend=backend)

    return results(fn, [x, *ws], g, dtype)


def experts(c: Case, backend: str) -> list[torch.Tensor]:
    """Return an expert layer's result and gradients; ids beyond the last expert are padding."""
    T, K, E, D, hidden = c.rows, c.slots, len(c.counts), c.inputs, c.outputs
    ids = torch.randint(0, E + 1, (T, K), generator=torch.Generator().manual_seed(c.seed))
    shapes = (T, D), (T, K), (E, 2, hidden, D), (E, D, hidden)
    leaves = [randn(c, *shape, more=i) for i, shape in enumerate(shapes)]
    fn = lambda *t: kernels.experts(*t[:2], ids, *t[2:], E, recipe=TILE, backend=backend)  # noqa: E731
    return results(fn, leaves, randn(c, T, D, more=7), c.dtype)


def errors(got: list[torch.Tensor], wanted: list[torch.Tensor], dtype: torch.dtype) -> list[float]:
    """Return how far results are off, as a share of the largest value of each; one whose sums all cancel is judged by
    a sixteenth of the largest of all results."""
    assert all(a.dtype == dtype and a.shape == b.shape for a, b in zip(got, wanted, strict=True))
    pairs = [pair for pair in zip(got, wanted, strict=True) if pair[0].numel()]
    least = max([b.abs().max().item() for _, b in pairs], default=0.0) / 16
    return [((a.double() - b).abs().max() / b.abs().max().clamp_min(max(least, 1e-30))).item() for a, b in pairs]


def grouped_errors(c: Case) -> list[float]:
    fp8_triton.CONFIGS["sm90"]["product"] = CONFIGS[c.config :]
    return errors(grouped(c, True, c.dtype), grouped(c, False, torch.float64), c.dtype)


def dense_errors(c: Case, sizes: tuple[int, ...]) -> list[float]:
    wanted = dense(c, sizes, "reference", torch.float64)
    return errors(dense(c, sizes, "triton", c.dtype), wanted, c.dtype)


def experts_off(c: Case) -> list[float]:
    """Return relative 2-norms of differences: what is between the products may round otherwise, and in 8 bits then."""
    pairs = zip(experts(c, "triton"), experts(c, "reference"), strict=True)
    return [((a.double() - b.double()).norm() / b.double().norm()).item() for a, b in pairs]


def not_finite_where_it_is(c: Case, bad: tuple[int, float]) -> bool:
    """Say whether NaN is where the emulation has it, and nowhere else."""
    pairs = zip(grouped(c, True, c.dtype, bad), grouped(c, False, torch.float64, bad), strict=True)
    return all(torch.equal(a.isnan(), b.isnan()) and not a.isinf().any() for a, b in pairs)


def repeats(c: Case) -> bool:
    """Say whether two runs, and one that is one graph, give the same bits."""
    more = torch.tensor(c.counts), torch.arange(c.rows), torch.arange(c.rows), 1, TILE
    fn = lambda x, w: fp8_fused.gather_matmul(x, w, *more)  # noqa: E731
    graph = torch.compile(fn, fullgraph=True, backend="aot_eager")
    leaves = [randn(c, c.rows, c.inputs), randn(c, len(c.counts), c.outputs, c.inputs, more=1)]
    first, *others = (results(f, leaves, randn(c, c.rows, c.outputs), c.dtype) for f in (fn, fn, graph))
    return all(torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True))


def checked() -> None:
    """Check what compilers are told of the ops; whether operands in 8 bits changed PyTorch cannot tell."""
    ops, c = torch.ops.functional_trainer, Case((3, 0, 5), none=0)
    x, w, order, ends = randn(c, 8, 7), randn(c, 3, 6, 7), torch.arange(8), torch.tensor([3, 3, 8, 8])
    for order_, form in ((None, "both"), (None, "rows"), (order, "turned")):
        torch.library.opcheck(ops.fp8_quantise.default, (x, None, order_, ends, 1, form, 7, 2))
    torch.library.opcheck(ops.fp8_quantise.default, (w[0], None, None, torch.tensor([6, 6]), 1, "square", 7, 1))
    w8, turned, scale = fp8_fused._by_squares(w)
    both = ops.fp8_quantise(x, None, None, ends, 1, "both", 7, 2)
    others = "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"
    for op, args in (
        (ops.fp8_quantise, (*both[:2], order, ends, 1, "turned", 7, 2)),
        (ops.fp8_product, (*both[:2], w8, scale, order, ends, 1, "inputs", torch.float32)),
        (ops.fp8_product, (*fp8_fused._by_rows(x[:, :6]), turned, scale, None, ends, 1, "outputs", torch.bfloat16)),
        (ops.fp8_product, (*both[2:], *both[2:], None, ends, 1, "rows", torch.float16)),
    ):
        torch.library.opcheck(op.default, args, test_utils=others)
