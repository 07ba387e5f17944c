"""Linear layer, log-softmax, gather and entropy in one op that never holds the logits.

With z = softcap(h W^T + b) / temperature, chunk by chunk over tokens:

    logp = z[target] - logsumexp(z)          entropy = logsumexp(z) - sum softmax(z) z
    dz   = dlogp (onehot - p) - dentropy p (log p + entropy)

FLOPs: 2TDV forward, 6TDV backward (the logits of a chunk are computed again). Bytes held: the logits of
one chunk of tokens. Matmuls run in the inputs' dtype, everything after them in at least float32; the
gradient of W is summed over chunks in at least float32.

A mask says which tokens are asked for. On the host the others are left out of every product; on a device, where
their number would have to be read back, they are computed and cleared.
"""

import torch

from kernels.elementwise import promote

CHUNK_HOST, CHUNK_DEVICE = 256, 2048
"""Tokens whose logits are held at a time: on the host as many as stay in its caches, on a device enough to fill it."""


def reference(hidden_TD, w_VD, targets_T, bias_V=None, softcap=0.0, temperature=1.0):
    """Compute `linear_logprob` with plain differentiable operations and all the logits."""
    z_TV = promote(hidden_TD @ w_VD.T) if bias_V is None else promote(hidden_TD @ w_VD.T + bias_V)
    z_TV = (softcap * torch.tanh(z_TV / softcap) if softcap else z_TV) / temperature
    logp_TV = z_TV.log_softmax(-1)
    return logp_TV.gather(-1, targets_T[:, None])[:, 0], -(logp_TV.exp() * logp_TV).sum(-1)


def _logits(h, w, b, softcap, temperature):
    z = promote(h @ w.T if b is None else torch.addmm(b, h, w.T))
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


@torch.library.custom_op("functional_trainer::linear_logprob", mutates_args=())
def _forward(
    hidden: torch.Tensor,
    w: torch.Tensor,
    targets: torch.Tensor,
    bias: torch.Tensor | None,
    mask: torch.Tensor | None,
    softcap: float,
    temperature: float,
    entropy: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return log-probability and entropy (zeros unless asked for), each (T,)."""
    rows, (hidden, targets) = _asked(mask, hidden, targets)
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    logp, ent = (hidden.new_zeros(hidden.shape[0], dtype=dtype) for _ in range(2))
    for s in _chunks(hidden):
        log_p = _logits(hidden[s], w, bias, softcap, temperature).log_softmax(-1)
        logp[s] = log_p.gather(-1, targets[s, None])[:, 0]
        if entropy:
            ent[s] = -(log_p.exp() * log_p).sum(-1)
    return _put_back(logp, rows, mask), _put_back(ent, rows, mask)


@_forward.register_fake
def _(hidden, w, targets, bias, mask, softcap, temperature, entropy):
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    return tuple(hidden.new_empty(hidden.shape[0], dtype=dtype) for _ in range(2))


@torch.library.custom_op("functional_trainer::linear_logprob_grad", mutates_args=())
def _grad(
    dlogp: torch.Tensor,
    dent: torch.Tensor,
    hidden: torch.Tensor,
    w: torch.Tensor,
    targets: torch.Tensor,
    bias: torch.Tensor | None,
    mask: torch.Tensor | None,
    softcap: float,
    temperature: float,
    entropy: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    if mask is not None and not mask.is_cpu:
        dlogp, dent = torch.where(mask, dlogp, 0), torch.where(mask, dent, 0)
    rows, (dlogp, dent, hidden, targets) = _asked(mask, dlogp, dent, hidden, targets)
    dhidden, dw = torch.empty_like(hidden), torch.zeros_like(w, dtype=dlogp.dtype)
    dbias = torch.zeros_like(w[:, 0], dtype=dlogp.dtype)
    for s in _chunks(hidden):
        h = hidden[s]
        z = _logits(h, w, bias, softcap, temperature)
        p = z.softmax(-1)
        dz = p * -dlogp[s, None] if entropy else p.mul_(-dlogp[s, None])
        dz.scatter_add_(1, targets[s, None], dlogp[s, None])  # one index per row: no two additions meet
        if entropy:
            log_p = z.log_softmax(-1)
            dz -= dent[s, None] * p * (log_p - (p * log_p).sum(-1, keepdim=True))
        dz = dz / temperature if temperature != 1.0 else dz
        if softcap:
            dz = dz * (1 - (z * (temperature / softcap)).square())
        if bias is not None:
            dbias += dz.sum(0)
        dz = dz.to(h.dtype)
        torch.mm(dz, w, out=dhidden[s])
        dw.addmm_(dz.T, h) if dw.dtype == h.dtype else dw.add_(dz.T @ h)
    return _put_back(dhidden, rows, mask), dw.to(w.dtype), dbias.to(w.dtype)


@_grad.register_fake
def _(dlogp, dent, hidden, w, targets, bias, mask, softcap, temperature, entropy):
    return torch.empty_like(hidden), torch.empty_like(w), w.new_empty(w.shape[0])


def _setup(ctx, inputs, output):
    hidden, w, targets, bias, mask, *ctx.options = inputs
    ctx.save_for_backward(hidden, w, targets, bias, mask)


def _backward(ctx, dlogp, dent):
    hidden, w, targets, bias, mask = ctx.saved_tensors
    grads = _grad(dlogp.contiguous(), dent.contiguous(), hidden, w, targets, bias, mask, *ctx.options)
    return *grads[:2], None, (None if bias is None else grads[2]), None, None, None, None


_forward.register_autograd(_backward, setup_context=_setup)


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
    flat, flat_mask = hidden.reshape(-1, hidden.shape[-1]), None if mask is None else mask.reshape(-1)
    options = float(softcap or 0.0), float(temperature), entropy
    logp, ent = _forward(flat, w_VD, targets.reshape(-1), bias_V, flat_mask, *options)
    return logp.view(targets.shape), ent.view(targets.shape)
