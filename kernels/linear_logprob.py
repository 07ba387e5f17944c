"""Linear layer, log-softmax, gather and entropy in one op that never holds the logits.

With z = softcap(h W^T + b) / temperature, chunk by chunk over tokens:

    logp = z[target] - logsumexp(z)          entropy = logsumexp(z) - sum softmax(z) z
    dz   = dlogp (onehot - p) - dentropy p (log p + entropy)

FLOPs: 2TDV forward, 6TDV backward (the logits of a chunk are computed again). Bytes held: one chunk of logits,
`CHUNK` elements whatever T and V. Matmuls run in the inputs' dtype, everything after them in at least float32; the
gradient of W is summed over chunks in at least float32.
"""

import torch

from kernels.elementwise import promote

CHUNK = 2**22
"""Logits held at a time."""


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


def _chunks(tokens: int, vocab: int) -> range:
    return range(0, tokens, max(1, CHUNK // vocab))


@torch.library.custom_op("functional_trainer::linear_logprob", mutates_args=())
def _forward(
    hidden: torch.Tensor,
    w: torch.Tensor,
    targets: torch.Tensor,
    bias: torch.Tensor | None,
    softcap: float,
    temperature: float,
    entropy: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return log-probability, entropy (zeros unless asked for) and logsumexp, each (T,)."""
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    logp, ent, lse = (hidden.new_zeros(hidden.shape[0], dtype=dtype) for _ in range(3))
    chunks = _chunks(hidden.shape[0], w.shape[0])
    for i in chunks:
        z = _logits(hidden[i : i + chunks.step], w, bias, softcap, temperature)
        s = slice(i, i + z.shape[0])
        lse[s] = z.logsumexp(-1)
        logp[s] = z.gather(-1, targets[s, None])[:, 0] - lse[s]
        if entropy:
            ent[s] = lse[s] - (torch.softmax(z, -1) * z).sum(-1)
    return logp, ent, lse


@_forward.register_fake
def _(hidden, w, targets, bias, softcap, temperature, entropy):
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    return tuple(hidden.new_empty(hidden.shape[0], dtype=dtype) for _ in range(3))


@torch.library.custom_op("functional_trainer::linear_logprob_grad", mutates_args=())
def _grad(
    dlogp: torch.Tensor,
    dent: torch.Tensor,
    hidden: torch.Tensor,
    w: torch.Tensor,
    targets: torch.Tensor,
    bias: torch.Tensor | None,
    ent: torch.Tensor,
    lse: torch.Tensor,
    softcap: float,
    temperature: float,
    entropy: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    dhidden, dw = torch.empty_like(hidden), torch.zeros_like(w, dtype=lse.dtype)
    dbias = torch.zeros_like(w[:, 0], dtype=lse.dtype)
    chunks = _chunks(hidden.shape[0], w.shape[0])
    for i in chunks:
        h = hidden[i : i + chunks.step]
        s = slice(i, i + h.shape[0])
        z = _logits(h, w, bias, softcap, temperature)
        p = torch.exp(z - lse[s, None])
        dz = p * -dlogp[s, None]
        dz.scatter_add_(1, targets[s, None], dlogp[s, None])  # one index per row: no two additions meet
        if entropy:
            dz -= dent[s, None] * p * (z - lse[s, None] + ent[s, None])
        dz = dz / temperature if temperature != 1.0 else dz
        if softcap:
            dz = dz * (1 - (z * (temperature / softcap)).square())
        if bias is not None:
            dbias += dz.sum(0)
        dz = dz.to(h.dtype)
        torch.mm(dz, w, out=dhidden[s])
        dw.addmm_(dz.T, h) if dw.dtype == h.dtype else dw.add_(dz.T @ h)
    return dhidden, dw.to(w.dtype), dbias.to(w.dtype)


@_grad.register_fake
def _(dlogp, dent, hidden, w, targets, bias, ent, lse, softcap, temperature, entropy):
    return torch.empty_like(hidden), torch.empty_like(w), w.new_empty(w.shape[0])


def _setup(ctx, inputs, output):
    hidden, w, targets, bias, *ctx.options = inputs
    _, ent, lse = output
    ctx.save_for_backward(hidden, w, targets, bias, ent, lse)
    ctx.mark_non_differentiable(lse)


def _backward(ctx, dlogp, dent, _):
    hidden, w, targets, bias, ent, lse = ctx.saved_tensors
    dhidden, dw, dbias = _grad(dlogp.contiguous(), dent.contiguous(), hidden, w, targets, bias, ent, lse, *ctx.options)
    return dhidden, dw, None, (None if bias is None else dbias), None, None, None


_forward.register_autograd(_backward, setup_context=_setup)


def linear_logprob(
    hidden: torch.Tensor,
    w_VD: torch.Tensor,
    targets: torch.Tensor,
    bias_V: torch.Tensor | None = None,
    softcap: float | None = None,
    temperature: float = 1.0,
    entropy: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return log-probability of `targets` (...) and entropy (...) of softmax(hidden W^T), in at least float32.

    `hidden` is (..., D); `entropy=False` skips the second result, which is then zeros.
    """
    flat = hidden.reshape(-1, hidden.shape[-1])
    logp, ent, _ = _forward(flat, w_VD, targets.reshape(-1), bias_V, float(softcap or 0.0), float(temperature), entropy)
    return logp.view(targets.shape), ent.view(targets.shape)
