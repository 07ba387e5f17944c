"""What is asked of the Triton expert layer and its sort, to be run where Triton interprets."""

from dataclasses import dataclass
from functools import partial

import torch

from kernels import Activation, moe, moe_fused


@dataclass(frozen=True)
class Case:
    """Sizes of a layer, all odd; `favour` of the tokens go to the first expert whatever is drawn."""

    tokens: int = 37
    slots: int = 3
    experts: int = 5
    width: int = 40
    hidden: int = 24
    dtype: torch.dtype = torch.float32
    favour: float = 0.0
    padding: bool = True
    scaled: bool = True
    biased: bool = False
    activation: Activation = Activation()
    seed: int = 0


def drawn(c: Case) -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor]:
    """Return x, weights, gate_up, down and, if there are, their biases; the experts of each slot; and the gradient of
    the result. What is clamped is exact in 16 bit, so that every type has the same values beyond the limit.
    """
    gen = torch.Generator().manual_seed(c.seed)
    T, K, E, D, F = c.tokens, c.slots, c.experts, c.width, c.hidden
    shapes = (T, D), (T, D), (T, K), (E, 2, F, D), (E, D, F), *((E, 2, F), (E, D))[: 2 * c.biased]
    grad, *leaves = (torch.randn(shape, generator=gen, dtype=torch.float64) for shape in shapes)
    leaves[2], leaves[3] = leaves[2] / D**0.5, leaves[3] / F**0.5
    if c.activation.kind == "clamped_swiglu":
        for i, steps in ((0, 4), (2, 32), (4, 8))[: 2 + c.biased]:
            leaves[i] = (leaves[i] * steps).round() / steps
    ids = torch.randint(0, E + c.padding, (T, K), generator=gen)
    ids[torch.rand(T, K, generator=gen) < c.favour] = 0
    return [x.to(c.dtype) for x in leaves], ids, grad.to(c.dtype)


def ours(c: Case, leaves: list[torch.Tensor], ids: torch.Tensor) -> torch.Tensor:
    """Apply the experts in Triton; rows are not weighed where they came from other ranks."""
    x, weights, gate_up, down, *biases = leaves
    first, last = biases or (None, None)
    mlp = partial(moe_fused.layer, gate_up_E2FD=gate_up, down_EDF=down, gate_up_bias_E2F=first, activation=c.activation)
    if c.scaled:
        E = c.experts
        return moe.experts(x, weights, ids, last, E, E, mlp, moe_fused.sort_by_expert, moe.exact)
    y = mlp(x, None, moe_fused.sort_by_expert(ids, c.experts), c.slots) + 0 * weights.sum()
    return moe.add_bias(y, None, ids, last) if biases else y


def gated(gate: torch.Tensor, up: torch.Tensor, act: Activation) -> torch.Tensor:
    """Compute hidden units by their definitions."""
    if act.kind == "swiglu":
        return gate / (1 + (-gate).exp()) * up
    if act.kind == "geglu":
        return gate / 2 * (1 + ((2 / torch.pi) ** 0.5 * (gate + 0.044715 * gate**3)).tanh()) * up
    gate, up = gate.minimum(gate.new_tensor(act.limit)), up.clip(-act.limit, act.limit)
    return gate / (1 + (-act.alpha * gate).exp()) * (up + 1)


def dense(c: Case, leaves: list[torch.Tensor], ids: torch.Tensor) -> torch.Tensor:
    """Apply every expert to every token and add up what was chosen."""
    x, weights, gate_up, down, *biases = leaves
    out = 0 * x + 0 * weights.sum()
    for e in range(c.experts):
        gate, up = (x @ w.T + (biases[0][e, i] if biases else 0) for i, w in enumerate(gate_up[e]))
        y = gated(gate, up, c.activation) @ down[e].T + (biases[1][e] if biases else 0)
        chosen = (ids == e).to(x.dtype)
        out = out + (chosen * weights if c.scaled else chosen).sum(1, keepdim=True) * y
    return out


def gradients(c: Case, layer, dtype: torch.dtype) -> list[torch.Tensor]:
    """Return the result and all gradients."""
    leaves, ids, grad = drawn(c)
    leaves = [x.to(dtype).requires_grad_() for x in leaves]
    out = layer(c, leaves, ids)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad.to(dtype))]


def errors(c: Case) -> list[float]:
    """Return how far result and gradients are from float64, as a share of the largest value, or of 1, the operands'
    order: sums may cancel. Memory that nobody has written to is full of NaN.
    """
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    expected, found = gradients(c, dense, torch.float64), gradients(c, ours, c.dtype)
    assert all(a.dtype == c.dtype for a in found)
    pairs = zip(found, expected, strict=True)
    return [((a.double() - b).abs().max() / b.abs().max().clamp_min(1)).item() for a, b in pairs]


def repeats(c: Case) -> bool:
    """Say whether two runs give the same bits."""
    runs = [gradients(c, ours, c.dtype) for _ in range(2)]
    return all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def compiled(c: Case) -> bool:
    """Say whether one graph of it all gives the bits that it gives without a compiler."""
    graph = torch.compile(ours, fullgraph=True, backend="aot_eager")
    runs = [gradients(c, layer, c.dtype) for layer in (ours, graph)]
    return all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def nan_stays(c: Case) -> bool:
    """Say whether a token with a NaN, and no other, results in NaN."""
    leaves, ids, _ = drawn(c)
    leaves[0][0, 0], ids[0] = torch.nan, 0
    out = ours(c, leaves, ids)
    return bool(out[0].isnan().all() and not out[1:].isnan().any())


def sorts(tokens: int, slots: int, experts: int, favour: float, seed: int) -> bool:
    """Say whether the counting sort does what PyTorch's stable sort does, and twice; ids are those that routers give.

    Memory that nobody has written to is full of the largest whole number.
    """
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    gen = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, experts + 1, (tokens, slots), generator=gen)
    ids[torch.rand(tokens, generator=gen) < favour] = int(torch.randint(0, experts + 1, (), generator=gen))
    wanted = ids.flatten().sort(stable=True).indices
    place = torch.empty_like(wanted)
    place[wanted] = torch.arange(tokens * slots)
    wants = wanted, place, torch.bincount(ids.flatten(), minlength=experts + 1)[:experts]
    runs = [moe_fused.sort_by_expert(ids, experts) for _ in range(2)]
    return all(a.dtype == b.dtype and torch.equal(a, b) for run in runs for a, b in zip(run, wants, strict=True))


def checked() -> None:
    """Check what compilers are told of the ops."""
    case = Case(9, 2, 5, 8, 6, padding=False, biased=True)  # of padding h is not written
    (x, weights, gate_up, down, given, _), ids, grad = drawn(case)
    torch.library.opcheck(torch.ops.functional_trainer.sort_by_expert.default, (ids.flatten(), 5))
    order, inverse, counts = moe_fused.sort_by_expert(ids, 5)
    routed = weights.flatten()[order], order, inverse, counts
    for scale, bias, act in ((routed[0], None, "swiglu"), (None, None, "geglu"), (None, given, "clamped_swiglu")):
        bias = bias if bias is None else bias.requires_grad_()
        matrices = gate_up.requires_grad_(), bias, down.requires_grad_()
        args = x.requires_grad_(), scale, *routed[1:], *matrices, 2, act, 0.5, 1.702
        torch.library.opcheck(torch.ops.functional_trainer.moe.default, args)
        with torch.no_grad():
            _, h = torch.ops.functional_trainer.moe(*args)
            tensors = (t.detach() if isinstance(t, torch.Tensor) else t for t in args[:8])
            torch.library.opcheck(torch.ops.functional_trainer.moe_grad.default, (grad, *tensors, h, *args[8:]))
