"""Linear layer, log-softmax, gather and entropy in one op that does not hold all the logits, unless they are few.

With z = softcap(h W^T + b) / temperature, p = softmax(z), chunk by chunk over tokens:

    lse = logsumexp(z)        mean = sum p z        logp = z[target] - lse        entropy = lse - mean
    dz  = dtarget onehot + p (dlse + dmean (1 + z - mean))

W may be a part of the vocabulary: the three numbers of the parts are combined without their logits,

    lse = logsumexp(lse_part)      z[target] = sum of the part that has it      mean = sum exp(lse_part - lse) mean_part

FLOPs: 2TDV forward, 6TDV backward (the logits of a chunk are computed again). Bytes held: the logits of
one chunk of tokens. Matmuls run in the inputs' dtype, everything after them in at least float32; the
gradient of W is summed over chunks in at least float32.

Logits that take at most KEPT bytes in all are kept for backward, whose FLOPs are then 4TDV. Gradients are
not computed in forward, as fused losses do it (liger-kernel, PyTorch's chunked linear_cross_entropy): dW sums over the
tokens what each one's incoming gradient weighs, and that is known in backward only.

A mask says which tokens are asked for. On the host the others are left out of every product; on a device, where
their number would have to be read back, they are computed and cleared.
"""

import torch

from kernels.elementwise import promote
from kernels.ops import op

CHUNK_HOST, CHUNK_DEVICE = 256, 2048
"""Tokens whose logits are held at a time: on the host as many as stay in its caches, on a device enough to fill it."""
KEPT_HOST, KEPT_DEVICE = 2**24, 0
"""Most bytes of logits, all of a call's, that are kept for backward: what a host's last cache may hold."""


def reference(hidden_TD, w_VD, targets_T, bias_V=None, softcap=0.0, temperature=1.0):
    """Compute `linear_logprob` with plain differentiable operations and all the logits."""
    z_TV = promote(hidden_TD @ w_VD.T) if bias_V is None else promote(hidden_TD @ w_VD.T + bias_V)
    z_TV = (softcap * torch.tanh(z_TV / softcap) if softcap else z_TV) / temperature
    logp_TV = z_TV.log_softmax(-1)
    return logp_TV.gather(-1, targets_T[:, None])[:, 0], -(logp_TV.exp() * logp_TV).sum(-1)


def _product(h: torch.Tensor, w: torch.Tensor, b: torch.Tensor | None, out: torch.Tensor | None = None) -> torch.Tensor:
    return torch.mm(h, w.T, out=out) if b is None else torch.addmm(b, h, w.T, out=out)


def _logits(product: torch.Tensor, softcap: float, temperature: float) -> torch.Tensor:
    z = promote(product)
    if softcap:
        z = torch.tanh(z / softcap) * softcap
    return z / temperature if temperature != 1.0 else z


def _chunks(hidden: torch.Tensor) -> list[slice]:
    size = CHUNK_HOST if hidden.is_cpu else CHUNK_DEVICE
    return [slice(i, i + size) for i in range(0, hidden.shape[0], size)]


def _asked(mask: torch.Tensor | None, *columns: torch.Tensor) -> tuple[torch.Tensor | None, list[torch.Tensor]]:
    """Return the rows that are asked for (None: all) and these rows of each column."""
    if mask is None or not mask.is_cpu:
        return None, list(columns)
    rows = mask.nonzero()[:, 0]
    return rows, [column.index_select(0, rows) for column in columns]


def _put_back(x: torch.Tensor, rows: torch.Tensor | None, mask: torch.Tensor | None) -> torch.Tensor:
    """Return `x` with a row for every token, zeros where none was asked for."""
    if rows is not None and mask is not None:
        return x.new_zeros(mask.shape[0], *x.shape[1:]).index_copy_(0, rows, x)
    return x if mask is None else torch.where(mask.view(-1, *(1,) * (x.ndim - 1)), x, 0)


def _inside(targets: torch.Tensor, first: int, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return targets as rows of this part (0 where they are in another) and whether they are in it."""
    local = targets - first
    inside = (local >= 0) & (local < rows)
    return torch.where(inside, local, 0)[:, None], inside


@op("functional_trainer::linear_logprob", gradient=True)
def _forward(
    hidden: torch.Tensor,
    w: torch.Tensor,
    targets: torch.Tensor,
    bias: torch.Tensor | None,
    mask: torch.Tensor | None,
    first: int,
    softcap: float,
    temperature: float,
    entropy: bool,
    keep: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return lse, the target's logit (0 if another part has it) and mean (zeros unless asked for), each (T,).

    Then the products h W^T + b, if they are to be kept: of the rows that are asked for, in a buffer (T, V) for all.
    """
    kept = hidden.new_empty(hidden.shape[0] if keep else 0, w.shape[0])
    rows, (hidden, targets) = _asked(mask, hidden, targets)
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    lse, target, mean = (hidden.new_zeros(hidden.shape[0], dtype=dtype) for _ in range(3))
    for s in _chunks(hidden):
        z = _logits(_product(hidden[s], w, bias, kept[: hidden.shape[0]][s] if keep else None), softcap, temperature)
        local, inside = _inside(targets[s], first, w.shape[0])
        target[s] = torch.where(inside, z.gather(-1, local)[:, 0], 0)
        p = z.softmax(-1)
        lse[s] = z.amax(-1) - p.amax(-1).log()  # the largest p is 1 / sum exp(z - max z): exact, and one pass of exp
        if entropy:
            mean[s] = p.mul_(z).sum(-1)
        del z, p  # before the next chunk's are made
    return _put_back(lse, rows, mask), _put_back(target, rows, mask), _put_back(mean, rows, mask), kept


@torch.library.register_fake("functional_trainer::linear_logprob")
def _(hidden, w, targets, bias, mask, first, softcap, temperature, entropy, keep):
    lse, target, mean = (
        hidden.new_empty(hidden.shape[0], dtype=torch.promote_types(hidden.dtype, torch.float32)) for _ in range(3)
    )
    return lse, target, mean, hidden.new_empty(hidden.shape[0] if keep else 0, w.shape[0])


@op("functional_trainer::linear_logprob_grad")
def _grad(
    dlse: torch.Tensor,
    dtarget: torch.Tensor,
    dmean: torch.Tensor,
    kept: torch.Tensor,
    hidden: torch.Tensor,
    w: torch.Tensor,
    targets: torch.Tensor,
    bias: torch.Tensor | None,
    mask: torch.Tensor | None,
    first: int,
    softcap: float,
    temperature: float,
    entropy: bool,
    keep: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    if mask is not None and not mask.is_cpu:
        dlse, dtarget, dmean = (torch.where(mask, d, 0) for d in (dlse, dtarget, dmean))
    rows, (dlse, dtarget, dmean, hidden, targets) = _asked(mask, dlse, dtarget, dmean, hidden, targets)
    dhidden, dw = torch.empty_like(hidden), torch.zeros_like(w, dtype=dlse.dtype)
    dbias = torch.zeros_like(w[:, 0], dtype=dlse.dtype)
    for s in _chunks(hidden):
        h = hidden[s]
        z = _logits(kept[: hidden.shape[0]][s] if keep else _product(h, w, bias), softcap, temperature)
        p = z.softmax(-1)
        local, inside = _inside(targets[s], first, w.shape[0])
        if entropy:
            mean = (p * z).sum(-1, keepdim=True)
            dz = p * (dlse[s, None] + dmean[s, None] * (1 + z - mean))
        else:
            dz = p.mul_(dlse[s, None])
        dz.scatter_add_(1, local, torch.where(inside, dtarget[s], 0)[:, None])  # one a row: no two additions meet
        dz = dz / temperature if temperature != 1.0 else dz
        if softcap:
            dz = dz * (1 - (z * (temperature / softcap)).square())
        if bias is not None:
            dbias += dz.sum(0)
        dz = dz.to(h.dtype)
        torch.mm(dz, w, out=dhidden[s])
        dw.addmm_(dz.T, h) if dw.dtype == h.dtype else dw.add_(dz.T @ h)
        del z, p, dz
    return _put_back(dhidden, rows, mask), dw.to(w.dtype), dbias.to(w.dtype)


@torch.library.register_fake("functional_trainer::linear_logprob_grad")
def _(dlse, dtarget, dmean, kept, hidden, w, targets, bias, mask, first, softcap, temperature, entropy, keep):
    return torch.empty_like(hidden), torch.empty_like(w), w.new_empty(w.shape[0])


def _setup(ctx, inputs, output):
    hidden, w, targets, bias, mask, *ctx.options = inputs
    ctx.save_for_backward(output[3], hidden, w, targets, bias, mask)
    ctx.set_materialize_grads(False)  # of what is kept


def _backward(ctx, *grads):
    kept, hidden, w, targets, bias, mask = ctx.saved_tensors
    own = [g.contiguous() for g in grads[:3]]
    dhidden, dw, dbias = _grad(*own, kept, hidden, w, targets, bias, mask, *ctx.options)
    return dhidden, dw, None, (None if bias is None else dbias), *(None,) * 6


torch.library.register_autograd("functional_trainer::linear_logprob", _backward, setup_context=_setup)


def vocabulary_part(
    hidden: torch.Tensor,
    w_VD: torch.Tensor,
    targets: torch.Tensor,
    bias_V: torch.Tensor | None = None,
    softcap: float | None = None,
    temperature: float = 1.0,
    entropy: bool = True,
    mask: torch.Tensor | None = None,
    first: int = 0,
) -> torch.Tensor:
    """Return (..., 3): lse, the target's logit and mean over the rows of the vocabulary from `first` on that W has."""
    flat, flat_mask = hidden.reshape(-1, hidden.shape[-1]), None if mask is None else mask.reshape(-1)
    options = first, float(softcap or 0.0), float(temperature), entropy
    learns = torch.is_grad_enabled() and (hidden.requires_grad or w_VD.requires_grad)
    keep = learns and flat.shape[0] * w_VD.shape[0] * flat.itemsize <= (KEPT_HOST if flat.is_cpu else KEPT_DEVICE)
    *three, _ = _forward(flat, w_VD, targets.reshape(-1), bias_V, flat_mask, *options, keep)
    return torch.stack(three, -1).view(*targets.shape, 3)


def combine_vocabulary(
    parts_P3: torch.Tensor, entropy: bool, mask: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return log-probability and entropy (zeros unless asked for, or where `mask` is false), (...), of P parts."""
    lse_P, target_P, mean_P = parts_P3.unbind(-1)
    lse = lse_P.logsumexp(-1)
    logp, ent = target_P.sum(-1) - lse, torch.zeros_like(lse)
    if entropy:
        ent = lse - ((lse_P - lse[..., None]).exp() * mean_P).sum(-1)
    if mask is not None:
        logp, ent = torch.where(mask, logp, 0), torch.where(mask, ent, 0)
    return logp, ent


def linear_logprob(
    hidden: torch.Tensor,
    w_VD: torch.Tensor,
    targets: torch.Tensor,
    bias_V: torch.Tensor | None = None,
    softcap: float | None = None,
    temperature: float = 1.0,
    entropy: bool = True,
    mask: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return log-probability of `targets` (...) and entropy (...) of softmax(hidden W^T), in at least float32.

    `hidden` is (..., D); `entropy=False` skips the second result, which is then zeros. Where the boolean `mask` (...)
    is false both results are zero and no gradient flows.
    """
    three = vocabulary_part(hidden, w_VD, targets, bias_V, softcap, temperature, entropy, mask)
    lse, target, mean = three.unbind(-1)
    return target - lse, lse - mean if entropy else mean
