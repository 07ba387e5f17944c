"""What is asked of the Triton expert layer, to be run where Triton interprets."""

from dataclasses import dataclass

import torch

import kernels
from kernels import moe, moe_fused


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
    seed: int = 0


def drawn(c: Case) -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor]:
    """Return x, weights, gate_up and down; the experts of each slot; and the gradient of the result."""
    gen = torch.Generator().manual_seed(c.seed)
    T, K, E, D, F = c.tokens, c.slots, c.experts, c.width, c.hidden
    shapes = (T, D), (T, K), (E, 2, F, D), (E, D, F), (T, D)
    *leaves, grad = (torch.randn(shape, generator=gen, dtype=torch.float64) for shape in shapes)
    leaves[2], leaves[3] = leaves[2] / D**0.5, leaves[3] / F**0.5
    ids = torch.randint(0, E + c.padding, (T, K), generator=gen)
    ids[torch.rand(T, K, generator=gen) < c.favour] = 0
    return [x.to(c.dtype) for x in leaves], ids, grad.to(c.dtype)


def layer(c: Case, mlp, leaves: list[torch.Tensor], ids: torch.Tensor) -> torch.Tensor:
    """Apply the experts; rows are not weighed where they came from other ranks."""
    x, weights, *matrices = leaves
    if c.scaled:
        return moe.experts(x, weights, ids, *matrices, c.experts, mlp, None)
    return mlp(x, None, moe.sort_by_expert(ids, c.experts), c.slots, *matrices) + 0 * weights.sum()


def gradients(c: Case, mlp, dtype: torch.dtype) -> list[torch.Tensor]:
    """Return the result and all gradients."""
    leaves, ids, grad = drawn(c)
    leaves = [x.to(dtype).requires_grad_() for x in leaves]
    out = layer(c, mlp, leaves, ids)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad.to(dtype))]


def errors(c: Case) -> list[float]:
    """Return how far result and gradients are from float64, as a share of the largest value, or of 1, the operands'
    order: sums may cancel. Memory that nobody has written to is full of NaN.
    """
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    expected = gradients(c, kernels._layer(kernels._grouped_matmul.reference), torch.float64)
    ours = gradients(c, moe_fused.layer, c.dtype)
    assert all(a.dtype == c.dtype for a in ours)
    pairs = zip(ours, expected, strict=True)
    return [((a.double() - b).abs().max() / b.abs().max().clamp_min(1)).item() for a, b in pairs]


def repeats(c: Case) -> bool:
    """Say whether two runs give the same bits."""
    runs = [gradients(c, moe_fused.layer, c.dtype) for _ in range(2)]
    return all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def checked() -> None:
    """Check what compilers are told of the ops."""
    (x, weights, gate_up, down), ids, grad = drawn(Case(padding=False))  # of padding h is not written
    order, inverse, counts = moe.sort_by_expert(ids, 5)
    routed = weights.flatten()[order], order, inverse, counts
    for scale in (routed[0], None):
        args = x.requires_grad_(), scale, *routed[1:], gate_up.requires_grad_(), down.requires_grad_(), 3
        torch.library.opcheck(torch.ops.functional_trainer.moe.default, args)
        with torch.no_grad():
            _, h = torch.ops.functional_trainer.moe(*args)
            back = grad, *(t.detach() if isinstance(t, torch.Tensor) else t for t in args[:-1]), h, 3
            torch.library.opcheck(torch.ops.functional_trainer.moe_grad.default, back)
