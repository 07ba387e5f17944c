"""Triton kernels of a gated expert layer, forward and backward, and what launches them.

    h[r] = W1[e(r)] x[t(r)] + b1[e(r)]    a[r] = s[r] act(h[r])         y[r] = W2[e(r)] a[r]    out[t] = sum of t's y
    a'[r] = W2[e(r)]^T dout[t(r)]         ds[r] = a'[r] . a[r] / s[r]   dh[r] = act'(s[r] a'[r], h[r])
    dW2[e] = sum of dout[t(r)] a[r]^T     dW1[e] = sum of dh[r] x[t(r)]^T      db1[e] = sum of dh[r]
    dx[t] = sum of t's W1[e(r)]^T dh[r]

act is silu(gate) up, or another of `kernels.elementwise.Activation`; which one, and whether there is a b1, is known
when a kernel is compiled: without either a kernel has no instruction more. The second product's bias is not of this
layer (`kernels.moe.add_bias`: a small product per token).

FLOPs: 2 R D 3F forward and twice that backward. Bytes, at least: the weights once each way and once more written, rows
of h and a. A tile of weights serves the rows of its expert, so with fewer than some 200 FLOPs a byte (an H100's ridge
in bf16), R / E < 200, the layer waits for memory. Saved are x, h and the routing; a is computed again from h.

Tokens are gathered where they are loaded (after SonicMoE, arxiv 2512.14080): sorted copies of x and dout are never
made. Rows are written one after the other, and each token sums its own: no atomics, the same bits every run. Offsets
stay on the device: the grid is the most tiles there can be, cdiv(R, BM) + E, and programs beyond the last tile leave.
Every product accumulates in float32 and products of float32 are IEEE unless PyTorch allows TF32.

R rows sorted by expert (a token's K slots are rows), T tokens, E experts, D model width, F expert width. Rows beyond
`ends[E - 1]` belong to no expert: nothing reads or writes them. `order[r]` is the slot of row r, slot // K its token.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from kernels import tuning
from kernels.elementwise import Activation


class Config(NamedTuple):
    """Sizes of tiles of rows (BM), outputs (BN) and what is summed (BK); warps and stages of a pipeline."""

    BM: int
    BN: int
    BK: int
    warps: int
    stages: int


CONFIGS: dict[str, dict[str, tuple[Config, ...]]] = {
    "sm90": {
        "up": (Config(128, 128, 64, 8, 3), Config(128, 128, 64, 8, 4), Config(64, 64, 64, 4, 4)),
        "rows": (Config(128, 256, 64, 8, 3), Config(128, 128, 64, 8, 4), Config(64, 128, 64, 4, 4)),
        "down_grad": (Config(128, 64, 64, 8, 4), Config(64, 128, 64, 8, 3), Config(64, 64, 64, 4, 4)),
        "weight_grad": (Config(128, 256, 64, 8, 3), Config(128, 128, 64, 8, 4)),
    },
    "sm80": {
        "up": (Config(128, 64, 32, 8, 3), Config(64, 64, 32, 4, 4)),
        "rows": (Config(128, 128, 32, 8, 3), Config(64, 128, 32, 4, 4)),
        "down_grad": (Config(128, 64, 32, 8, 3), Config(64, 64, 32, 8, 4)),
        "weight_grad": (Config(128, 128, 32, 8, 3), Config(64, 128, 32, 4, 4)),
    },
}
"""Candidates in 16 bit by generation and kernel; the tuner measures them once for a shape and keeps the result on disk.
None has been measured by us yet."""
CONFIGS["sm100"] = CONFIGS["sm90"]
FLOAT32 = Config(64, 64, 32, 4, 2)
"""Of float32, which has no tensor cores unless TF32 is allowed."""


# maps of tiles --------------------------------------------------------------------------------------------------------


@triton.jit
def _tile(ends, E: tl.constexpr, E2: tl.constexpr, BM: tl.constexpr, tile):
    """Return the expert of a tile of rows (E if there is none), its first row and the end of the expert's rows."""
    e = tl.arange(0, E2)
    end = tl.load(ends + e, e < E, 0).to(tl.int32)
    start = tl.load(ends + e - 1, (e > 0) & (e < E), 0).to(tl.int32)
    tiles = tl.cumsum((end - start + BM - 1) // BM * (e < E), 0)
    expert = tl.sum(((tiles <= tile) & (e < E)).to(tl.int32), 0)
    here = (e == expert).to(tl.int32)
    first = tl.sum(start * here, 0) + (tile - tl.sum((tiles - (end - start + BM - 1) // BM) * here, 0)) * BM
    return expert, first, tl.sum(end * here, 0)


@triton.jit
def _tokens(order, first, end, K: tl.constexpr, BM: tl.constexpr):
    """Return the rows of a tile, counted from its first, which of them the expert has, and their tokens."""
    row = tl.arange(0, BM)
    used = row < end - first
    return row, used, (tl.load(order + first + row, used, 0) // K).to(tl.int64)


@triton.jit
def _gate(gate, ACT: tl.constexpr, LIMIT: tl.constexpr, ALPHA: tl.constexpr):
    """Return what multiplies up, and its slope in gate; each kind is g sigmoid(p(g)) with its own p."""
    # A comparison with NaN is false, so NaN stays.
    g = tl.where(gate > LIMIT, LIMIT, gate) if ACT == "clamped_swiglu" else gate
    if ACT == "clamped_swiglu":
        sigmoid = tl.sigmoid(ALPHA * g)
        act = g * sigmoid
        return act, tl.where(gate > LIMIT, 0.0, sigmoid + ALPHA * act * (1 - sigmoid))
    elif ACT == "geglu":  # tanh(p / 2) = 2 sigmoid(p) - 1
        sigmoid = tl.sigmoid(1.5957691216057308 * (g + 0.044715 * g * g * g))  # 2 sqrt(2 / pi)
        act = g * sigmoid
        return act, sigmoid + act * (1 - sigmoid) * (1.5957691216057308 * (1 + 0.134145 * g * g))
    else:
        sigmoid = tl.sigmoid(g)
        act = g * sigmoid
        return act, sigmoid + act * (1 - sigmoid)


@triton.jit
def _up_to(up, ACT: tl.constexpr, LIMIT: tl.constexpr):
    """Return what gate's part multiplies."""
    if ACT == "clamped_swiglu":
        return tl.where(up > LIMIT, LIMIT, tl.where(up < -LIMIT, -LIMIT, up)) + 1
    else:
        return up


# forward --------------------------------------------------------------------------------------------------------------


@triton.jit
def _up(
    x, w, bias, scale, order, ends, h, a,
    D, F, E: tl.constexpr, E2: tl.constexpr, K: tl.constexpr, SCALED: tl.constexpr, PRECISION: tl.constexpr,
    BIASED: tl.constexpr, ACT: tl.constexpr, LIMIT: tl.constexpr, ALPHA: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """h (R, 2F) and a (R, F) from tokens x (T, D), w (E, 2, F, D), `bias` (E, 2, F) if BIASED and, if SCALED, each
    row's weight `scale` (R,).
    """
    expert, first, end = _tile(ends, E, E2, BM, tl.program_id(1))
    if expert == E:
        return
    row, used, token = _tokens(order, first, end, K, BM)
    f, d = tl.program_id(0) * BN + tl.arange(0, BN), tl.arange(0, BK)
    x_at = x + token[:, None] * D + d[None, :]
    gate_at = w + expert.to(tl.int64) * 2 * F * D + f[None, :] * D + d[:, None]
    gate, up = tl.zeros((BM, BN), tl.float32), tl.zeros((BM, BN), tl.float32)
    for start in range(0, D, BK):
        inside = d < D - start
        x_tile = tl.load(x_at + start, used[:, None] & inside[None, :], 0)
        here = inside[:, None] & (f < F)[None, :]
        gate = tl.dot(x_tile, tl.load(gate_at + start, here, 0), gate, input_precision=PRECISION)
        up = tl.dot(x_tile, tl.load(gate_at + F * D + start, here, 0), up, input_precision=PRECISION)
    at, here = row[:, None] * F + f[None, :], used[:, None] & (f < F)[None, :]
    if BIASED:
        bias_at = bias + expert.to(tl.int64) * 2 * F + f
        gate += tl.load(bias_at, f < F, 0).to(tl.float32)[None, :]
        up += tl.load(bias_at + F, f < F, 0).to(tl.float32)[None, :]
    gate, up = gate.to(h.dtype.element_ty), up.to(h.dtype.element_ty)
    h_at = h + first.to(tl.int64) * 2 * F + at + row[:, None] * F
    tl.store(h_at, gate, here)
    tl.store(h_at + F, up, here)
    hidden = _gate(gate.to(tl.float32), ACT, LIMIT, ALPHA)[0] * _up_to(up.to(tl.float32), ACT, LIMIT)
    if SCALED:
        hidden *= tl.load(scale + first + row, used, 0).to(tl.float32)[:, None]
    tl.store(a + first.to(tl.int64) * F + at, hidden.to(a.dtype.element_ty), here)


@triton.jit
def _rows(
    x, w, ends, y,
    C, N, TRANSPOSED: tl.constexpr, E: tl.constexpr, E2: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """y (R, N) from x (R, C) and each expert's matrix, (N, C) in memory, or (C, N) if TRANSPOSED."""
    expert, first, end = _tile(ends, E, E2, BM, tl.program_id(1))
    if expert == E:
        return
    row, n, c = tl.arange(0, BM), tl.program_id(0) * BN + tl.arange(0, BN), tl.arange(0, BK)
    used = row < end - first
    x_at = x + first.to(tl.int64) * C + row[:, None] * C + c[None, :]
    w += expert.to(tl.int64) * N * C
    if TRANSPOSED:
        w_at, step = w + c[:, None] * N + n[None, :], N
    else:
        w_at, step = w + n[None, :] * C + c[:, None], 1
    total = tl.zeros((BM, BN), tl.float32)
    for start in range(0, C, BK):
        inside = c < C - start
        x_tile = tl.load(x_at + start, used[:, None] & inside[None, :], 0)
        w_tile = tl.load(w_at + start * step, inside[:, None] & (n < N)[None, :], 0)
        total = tl.dot(x_tile, w_tile, total, input_precision=PRECISION)
    y_at = y + first.to(tl.int64) * N + row[:, None] * N + n[None, :]
    tl.store(y_at, total.to(y.dtype.element_ty), used[:, None] & (n < N)[None, :])


@triton.jit
def _combine(y, inverse, ends, out, D, E: tl.constexpr, K: tl.constexpr, BN: tl.constexpr):
    """out (T, D): the sum of each token's rows of y (R, D), slots in order."""
    token, d = tl.program_id(0).to(tl.int64), tl.program_id(1) * BN + tl.arange(0, BN)
    last, total = tl.load(ends + E - 1), tl.zeros((BN,), tl.float32)
    for k in tl.static_range(K):
        row = tl.load(inverse + token * K + k)
        total += tl.load(y + row * D + d, (d < D) & (row < last), 0).to(tl.float32)
    tl.store(out + token * D + d, total.to(out.dtype.element_ty), d < D)


# backward -------------------------------------------------------------------------------------------------------------


@triton.jit
def _down_grad(
    dout, w, scale, order, ends, h, a, dh, ds,
    D, F, blocks, E: tl.constexpr, E2: tl.constexpr, K: tl.constexpr, SCALED: tl.constexpr, PRECISION: tl.constexpr,
    ACT: tl.constexpr, LIMIT: tl.constexpr, ALPHA: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """dh (R, 2F), a (R, F) again, and ds (R, blocks), to be summed, from dout (T, D), w (E, D, F) and h (R, 2F)."""
    expert, first, end = _tile(ends, E, E2, BM, tl.program_id(1))
    if expert == E:
        return
    row, used, token = _tokens(order, first, end, K, BM)
    f, d = tl.program_id(0) * BN + tl.arange(0, BN), tl.arange(0, BK)
    dout_at = dout + token[:, None] * D + d[None, :]
    w_at = w + expert.to(tl.int64) * D * F + d[:, None] * F + f[None, :]
    da = tl.zeros((BM, BN), tl.float32)
    for start in range(0, D, BK):
        inside = d < D - start
        dout_tile = tl.load(dout_at + start, used[:, None] & inside[None, :], 0)
        w_tile = tl.load(w_at + start * F, inside[:, None] & (f < F)[None, :], 0)
        da = tl.dot(dout_tile, w_tile, da, input_precision=PRECISION)
    at, here = row[:, None] * F + f[None, :], used[:, None] & (f < F)[None, :]
    h_at = at + row[:, None] * F
    h += first.to(tl.int64) * 2 * F
    # In this order of loads and stores nothing is spilled.
    gate, slope = _gate(tl.load(h + h_at, here, 0).to(tl.float32), ACT, LIMIT, ALPHA)
    up = tl.load(h + h_at + F, here, 0).to(tl.float32)
    dh += first.to(tl.int64) * 2 * F
    hidden = gate * _up_to(up, ACT, LIMIT)
    if SCALED:
        weight = tl.load(scale + first + row, used, 0).to(tl.float32)[:, None]
        tl.store(ds + first.to(tl.int64) * blocks + row * blocks + tl.program_id(0), tl.sum(da * hidden, 1), used)
        tl.store(a + first.to(tl.int64) * F + at, (hidden * weight).to(a.dtype.element_ty), here)
        da *= weight
    else:
        tl.store(a + first.to(tl.int64) * F + at, hidden.to(a.dtype.element_ty), here)
    if ACT != "swiglu":  # with fewer registers to spare: h is read again rather than kept
        gate, slope = _gate(tl.load(h + h_at, here, 0).to(tl.float32), ACT, LIMIT, ALPHA)
        up = tl.load(h + h_at + F, here, 0).to(tl.float32)
    dup = da * gate
    if ACT == "clamped_swiglu":
        dup = tl.where(tl.abs(up) > LIMIT, 0.0, dup)
    tl.store(dh + h_at + F, dup.to(dh.dtype.element_ty), here)
    tl.store(dh + h_at, (da * _up_to(up, ACT, LIMIT) * slope).to(dh.dtype.element_ty), here)


@triton.jit
def _weight_grad(
    g, x, order, ends, dw,
    M, N, K: tl.constexpr, GATHER_G: tl.constexpr, GATHER_X: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """dw (E, M, N): for each expert the sum over its rows of g (., M) times x (., N), tokens if they GATHER."""
    expert = tl.program_id(1)
    start = tl.load(ends + expert - 1, expert > 0, 0).to(tl.int32)
    end = tl.load(ends + expert).to(tl.int32)
    wide = tl.cdiv(N, BN)
    m, n = tl.program_id(0) // wide * BM + tl.arange(0, BM), tl.program_id(0) % wide * BN + tl.arange(0, BN)
    total = tl.zeros((BM, BN), tl.float32)
    for first in range(start, end, BK):
        row = first + tl.arange(0, BK)
        used = row < end
        g_row, x_row = row.to(tl.int64), row.to(tl.int64)
        if GATHER_G:
            g_row = (tl.load(order + row, used, 0) // K).to(tl.int64)
        if GATHER_X:
            x_row = (tl.load(order + row, used, 0) // K).to(tl.int64)
        g_tile = tl.load(g + g_row[None, :] * M + m[:, None], used[None, :] & (m < M)[:, None], 0)
        x_tile = tl.load(x + x_row[:, None] * N + n[None, :], used[:, None] & (n < N)[None, :], 0)
        total = tl.dot(g_tile, x_tile, total, input_precision=PRECISION)
    dw_at = dw + expert.to(tl.int64) * M * N + m[:, None] * N + n[None, :]
    tl.store(dw_at, total.to(dw.dtype.element_ty), (m < M)[:, None] & (n < N)[None, :])


@triton.jit
def _row_sums(x, ends, out, N, BM: tl.constexpr, BN: tl.constexpr):
    """out (E, N): for each expert the sum over its rows of x (R, N)."""
    expert, n = tl.program_id(1), tl.program_id(0) * BN + tl.arange(0, BN)
    start = tl.load(ends + expert - 1, expert > 0, 0).to(tl.int32)
    end = tl.load(ends + expert).to(tl.int32)
    total = tl.zeros((BM, BN), tl.float32)
    for first in range(start, end, BM):
        row = first + tl.arange(0, BM)
        x_at = x + row.to(tl.int64)[:, None] * N + n[None, :]
        total += tl.load(x_at, (row < end)[:, None] & (n < N)[None, :], 0).to(tl.float32)
    tl.store(out + expert.to(tl.int64) * N + n, tl.sum(total, 0).to(out.dtype.element_ty), n < N)


# launches -------------------------------------------------------------------------------------------------------------


def candidates(kernel: str, x: torch.Tensor) -> tuple[Config, ...]:
    """Return the configs to choose from for operands of this type on this device."""
    if x.itemsize > 2:
        return (FLOAT32,)
    return CONFIGS[tuning.generation(x)][kernel]


def _launch(kernel: Any, grid: Callable[[Config], tuple[int, ...]], x: torch.Tensor, *args: Any, **consts: Any) -> None:
    """Run a kernel with the config that is the fastest for such operands."""
    consts["PRECISION"] = "tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee"

    def run(c: Config) -> None:
        sizes = {"BM": c.BM, "BN": c.BN, "BK": c.BK, "num_warps": c.warps, "num_stages": c.stages}
        kernel[grid(c)](x, *args, **consts, **sizes)

    name = kernel.fn.__name__.removeprefix("_")
    ints = [a for a in args if isinstance(a, int)]
    run(tuning.fastest(name, candidates(name, x), run, x, [*ints, *consts.values()]))


class Rows(NamedTuple):
    """How tokens are routed: see the top of this file. `slots` is K."""

    order: torch.Tensor
    inverse: torch.Tensor
    ends: torch.Tensor
    slots: int

    def grid(self, wide: int) -> Callable[[Config], tuple[int, ...]]:
        """Return the grid of tiles of rows by tiles of `wide` outputs."""
        return lambda c: (triton.cdiv(wide, c.BN), triton.cdiv(self.order.shape[0], c.BM) + self.ends.shape[0])

    @property
    def experts(self) -> dict[str, int]:
        E = self.ends.shape[0]
        return {"E": E, "E2": triton.next_power_of_2(E)}


def matmul(x: torch.Tensor, w: torch.Tensor, to: Rows, transposed: bool) -> torch.Tensor:
    """Multiply rows x (R, C) with w (E, N, C), or (E, C, N) if `transposed`; return (R, N)."""
    N, C = (w.shape[2], w.shape[1]) if transposed else w.shape[1:]
    y = x.new_empty(x.shape[0], N)
    _launch(_rows, to.grid(N), x, w, to.ends, y, C, N, TRANSPOSED=transposed, **to.experts)
    return y


def combine(y: torch.Tensor, to: Rows) -> torch.Tensor:
    """Sum each token's rows of y (R, D); return (T, D)."""
    out, BN = y.new_empty(y.shape[0] // to.slots, y.shape[1]), min(triton.next_power_of_2(y.shape[1]), 1024)
    grid = out.shape[0], triton.cdiv(y.shape[1], BN)
    if out.shape[0]:
        _combine[grid](y, to.inverse, to.ends, out, y.shape[1], E=to.ends.shape[0], K=to.slots, BN=BN)
    return out


def weight_grad(g: torch.Tensor, x: torch.Tensor, like: torch.Tensor, to: Rows, gather: str) -> torch.Tensor:
    """Return for each expert the sum over its rows of g (., M) times x (., N), tokens where `gather` names them."""
    dw, M, N = torch.empty_like(like), g.shape[1], x.shape[1]
    which = {"K": to.slots, "GATHER_G": gather == "g", "GATHER_X": gather == "x"}
    wide = lambda c: (triton.cdiv(M, c.BM) * triton.cdiv(N, c.BN), to.ends.shape[0])  # noqa: E731
    _launch(_weight_grad, wide, g, x, to.order, to.ends, dw, M, N, **which)
    return dw


def row_sums(x: torch.Tensor, like: torch.Tensor, to: Rows) -> torch.Tensor:
    """Return for each expert the sum over its rows of x (R, N), in the shape of `like`, (E, ...)."""
    out, N = torch.empty_like(like), x.shape[1]
    _row_sums[triton.cdiv(N, 128), to.ends.shape[0]](x, to.ends, out, N, BM=32, BN=128)
    return out


def forward(x, scale, to: Rows, gate_up, bias, down, activation: Activation) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the layer's result (T, D) and h (R, 2F); `scale` (R,) weighs rows, None if they are not weighed; `bias`
    (E, 2, F) is that of gate and up, or None.
    """
    (R, D), F = (to.order.shape[0], x.shape[1]), gate_up.shape[2]
    h, a = x.new_empty(R, 2 * F), x.new_empty(R, F)
    given = (x if t is None else t for t in (bias, scale))  # what is not there is not read
    which = {"K": to.slots, "SCALED": scale is not None, "BIASED": bias is not None, **_act(activation)}
    _launch(_up, to.grid(F), x, gate_up, *given, to.order, to.ends, h, a, D, F, **which, **to.experts)
    return combine(matmul(a, down, to, transposed=False), to), h


def _act(activation: Activation) -> dict[str, Any]:
    return {"ACT": activation.kind, "LIMIT": activation.limit, "ALPHA": activation.alpha}


def backward(dout, x, scale, h, to: Rows, gate_up, bias, down, activation: Activation) -> tuple[torch.Tensor, ...]:
    """Return the gradients of x, scale (zeros (R,) without one), gate_up, bias (empty without one) and down."""
    (R, D), F = (to.order.shape[0], x.shape[1]), h.shape[1] // 2
    a, dh = x.new_empty(R, F), torch.empty_like(h)
    blocks = max(triton.cdiv(F, c.BN) for c in candidates("down_grad", x))
    ds = torch.zeros(R, blocks, dtype=torch.float32, device=x.device)
    weights = x if scale is None else scale
    which = {"K": to.slots, "SCALED": scale is not None, **_act(activation)}
    args = (down, weights, to.order, to.ends, h, a, dh, ds, D, F, blocks)
    _launch(_down_grad, to.grid(F), dout, *args, **which, **to.experts)
    ddown = weight_grad(dout, a, down, to, "g")
    dgate_up = weight_grad(dh, x, gate_up, to, "x")
    dbias = x.new_empty(0) if bias is None else row_sums(dh, bias, to)
    dx = combine(matmul(dh, gate_up.flatten(1, 2), to, transposed=True), to)
    return dx, ds.sum(1).to(x.dtype), dgate_up, dbias, ddown
