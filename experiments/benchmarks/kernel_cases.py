"""What `kernels.py` times: the form of a case, and the cases of element-wise ops."""

import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F

import kernels as ops
from experiments.benchmarks import sft_cpu
from functional_trainer import backend

EPS = 1e-6


@dataclass
class Case:
    """One op at one size: contestants by name, each returning its result and gradients, and its work."""

    op: str
    shape: str
    dtype: str
    note: str
    work: float
    contestants: dict[str, Callable[[], Any]]
    unit: Literal["TFLOP/s", "GB/s"] = "TFLOP/s"
    """Of `work` in seconds: FLOPs, or bytes that must move."""


def leaf(device: torch.device, dtype: str, *shape: int) -> torch.Tensor:
    """Draw an operand of unit products."""
    x = torch.randn(shape, device=device) * shape[-1] ** -0.5
    return x.to(getattr(torch, dtype)).requires_grad_()


def both(fn: Callable[..., Any], leaves: list[torch.Tensor], *grads: torch.Tensor) -> list[torch.Tensor]:
    """Run forward and backward."""
    out = fn()
    outs = out if isinstance(out, tuple) else (out,)
    return [*(x.detach() for x in outs), *torch.autograd.grad(outs, leaves, grads)]


def liger(device: torch.device) -> Any:
    """Return liger-kernel's functions, where they are installed and can run."""
    if not importlib.util.find_spec("liger_kernel") or not backend.has_own_memory(device):
        return None
    from liger_kernel.transformers import functional

    return functional


def copies(device: torch.device, *moved: tuple[int, int]) -> dict[str, Callable[[], Any]]:
    """Return the floor of an element-wise op, which reads and writes so many bytes forward and then backward."""
    with device:
        calls = [call for sizes in moved for call in sft_cpu.stream(*sizes)]
    return {"floor": lambda: [call() for call in calls]}


def contestants(o: Any, fns: dict[str, Callable], leaves: list[torch.Tensor], *grads: torch.Tensor) -> dict[str, Any]:
    """Return what runs functions of the leaves forward and backward, each but liger-kernel's also compiled."""
    if o.compile == "on":
        fns = fns | {f"{name}*": torch.compile(fn, dynamic=False) for name, fn in fns.items() if name != "liger"}
    return {name: partial(both, partial(fn, *leaves), leaves, *grads) for name, fn in fns.items()}


# RMSNorm, rotary embedding, SwiGLU ------------------------------------------------------------------------------------
# Sizes are rows B, tokens of a row S, width D, expert width, slots of a token, query heads N, key heads K, their dim H.


def plain_norm(x: torch.Tensor, scale: torch.Tensor, eps: float) -> torch.Tensor:
    """Compute `rms_norm` by the same formula, with the gradients that autograd derives."""
    wide = ops.promote(x)
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype) * scale


def torch_norm(x: torch.Tensor, scale: torch.Tensor, eps: float) -> torch.Tensor:
    """Compute it by PyTorch's own function."""
    return F.rms_norm(x, scale.shape, scale, eps)


def hf_norm(x: torch.Tensor, scale: torch.Tensor, eps: float) -> torch.Tensor:
    """Compute it by transformers' module."""
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeRMSNorm

    made = Qwen3MoeRMSNorm(0, eps)
    del made._parameters["weight"]
    made.__dict__["weight"] = scale
    return made(x)


NORMS = {"ours": ops.rms_norm, "plain": plain_norm, "torch": torch_norm, "hf": hf_norm}


def rms_norm(o: Any, device: torch.device, shape: str, sizes: tuple[int, ...], dtype: str) -> Iterator[Case]:
    """Yield the cases of the residual's norm and of the queries'."""
    B, S, D, _, _, N, _, H = sizes
    fns: dict[str, Callable] = {name: partial(fn, eps=EPS) for name, fn in NORMS.items()}
    if theirs := liger(device):
        fns["liger"] = partial(theirs.liger_rms_norm, eps=EPS, in_place=False)
    for note, dims in (("residual", (B, S, D)), ("queries", (B, S, N, H))):
        x, scale = leaves = [leaf(device, dtype, *dims), leaf(device, dtype, dims[-1])]
        found = contestants(o, fns, leaves, torch.randn_like(x))
        n = x.nbytes
        yield Case("rms_norm", shape, dtype, note, 5.0 * n, copies(device, (n, n), (2 * n, n)) | found, "GB/s")


def add_norm(o: Any, device: torch.device, shape: str, sizes: tuple[int, ...], dtype: str) -> Iterator[Case]:
    """Yield the case of a sum, which lives on, and its norm."""
    B, S, D, *_ = sizes
    x, y, scale = leaves = [leaf(device, dtype, B, S, D), leaf(device, dtype, B, S, D), leaf(device, dtype, D)]

    def summed(norm: Callable, x, y, scale):
        return norm(x + y, scale, EPS), x + y

    fns: dict[str, Callable] = {name: partial(summed, norm) for name, norm in NORMS.items()}
    if theirs := liger(device):
        fns["liger"] = partial(theirs.liger_fused_add_rms_norm, eps=EPS, in_place=False)
    found = contestants(o, fns, leaves, torch.randn_like(x), torch.randn_like(x))
    n = x.nbytes
    yield Case("add_norm", shape, dtype, "", 8.0 * n, copies(device, (2 * n, 2 * n), (3 * n, n)) | found, "GB/s")


def rope(o: Any, device: torch.device, shape: str, sizes: tuple[int, ...], dtype: str) -> Iterator[Case]:
    """Yield the case of queries and keys; liger-kernel rotates them in place, so it comes last."""
    from transformers.models.qwen3_moe.modeling_qwen3_moe import apply_rotary_pos_emb

    B, S, _, _, _, N, K, H = sizes
    q, k = leaves = [leaf(device, dtype, B, S, heads, H) for heads in (N, K)]
    angle_BSh = torch.rand(B, S, H // 2, device=device) * 6
    cos, sin = angle_BSh.cos(), angle_BSh.sin()
    whole = [torch.cat([t, t], -1).to(q.dtype) for t in (cos, sin)]

    def ours(q, k):
        return ops.rope(q, cos, sin), ops.rope(k, cos, sin)

    def hf(q, k):
        return apply_rotary_pos_emb(q, k, *whole, unsqueeze_dim=2)

    def last(q, k):
        q, k = theirs.liger_rope(q.transpose(1, 2), k.transpose(1, 2), *whole)
        return q.transpose(1, 2), k.transpose(1, 2)

    theirs = liger(device)
    fns: dict[str, Callable] = {"ours": ours, "hf": hf} | ({"liger": last} if theirs else {})
    found = contestants(o, fns, leaves, torch.randn_like(q), torch.randn_like(k))
    if theirs:
        found["liger"] = found.pop("liger")
    n = q.nbytes + k.nbytes
    yield Case("rope", shape, dtype, "", 4.0 * n, copies(device, (n, n), (n, n)) | found, "GB/s")


def swiglu(o: Any, device: torch.device, shape: str, sizes: tuple[int, ...], dtype: str) -> Iterator[Case]:
    """Yield the case of an expert layer's rows; peers take gate and up apart, and liger-kernel writes over them."""
    B, S, _, hidden, top_k, *_ = sizes
    rows = B * S * top_k
    gate_up = leaf(device, dtype, rows, 2 * hidden)
    apart = [x.detach().clone().requires_grad_() for x in gate_up.chunk(2, -1)]
    grad = torch.randn(rows, hidden, device=device).to(gate_up.dtype)

    def halved(run: Callable) -> list[torch.Tensor]:
        out, dgate_up = run()
        return [out, *dgate_up.chunk(2, -1)]

    found = contestants(o, {"ours": ops.swiglu}, [gate_up], grad)
    found = {name: partial(halved, run) for name, run in found.items()}
    found |= contestants(o, {"hf": lambda gate, up: F.silu(gate) * up}, apart, grad)
    if theirs := liger(device):
        found |= contestants(o, {"liger": theirs.liger_swiglu}, apart, grad)
    n = grad.nbytes
    yield Case("swiglu", shape, dtype, "", 8.0 * n, copies(device, (2 * n, n), (3 * n, 2 * n)) | found, "GB/s")


ELEMENTWISE = {"rms_norm": rms_norm, "add_norm": add_norm, "rope": rope, "swiglu": swiglu}
