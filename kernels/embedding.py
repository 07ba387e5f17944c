"""Table look-up whose gradient does not depend on thread timing.

Inductor lowers the gradient of `F.embedding` to atomic additions, whose order changes from run to run. As an opaque op
it stays ATen's own kernel, in which one thread owns each row of the table.
"""

import torch
import torch.nn.functional as F

from kernels.ops import op


@op("functional_trainer::embedding", gradient=True)
def _embedding(weight_VD: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    return F.embedding(tokens, weight_VD)


@torch.library.register_fake("functional_trainer::embedding")
def _(weight_VD, tokens):
    return weight_VD.new_empty(*tokens.shape, weight_VD.shape[1])


@op("functional_trainer::embedding_grad")
def _embedding_grad(grad: torch.Tensor, tokens: torch.Tensor, rows: int) -> torch.Tensor:
    return torch.ops.aten.embedding_dense_backward(grad, tokens, rows, -1, False)


@torch.library.register_fake("functional_trainer::embedding_grad")
def _(grad, tokens, rows):
    return grad.new_empty(rows, grad.shape[-1])


def _setup(ctx, inputs, output):
    weight_VD, tokens = inputs
    ctx.rows = weight_VD.shape[0]
    ctx.save_for_backward(tokens)


def _backward(ctx, grad):
    return _embedding_grad(grad, ctx.saved_tensors[0], ctx.rows), None


torch.library.register_autograd("functional_trainer::embedding", _backward, setup_context=_setup)


def embedding(weight_VD: torch.Tensor, tokens: torch.Tensor, part: tuple[int, int] = (0, 1)) -> torch.Tensor:
    """Return weight[tokens], (..., D) for integer `tokens` (...).

    `part` = (i, n) says that the weight is the i-th of n parts of the vocabulary; other parts' tokens give zeros.
    """
    if part[1] == 1:
        return _embedding(weight_VD, tokens)
    local = tokens - part[0] * weight_VD.shape[0]
    inside = (local >= 0) & (local < weight_VD.shape[0])
    return _embedding(weight_VD, torch.where(inside, local, 0)) * inside[..., None]
