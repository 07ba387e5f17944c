"""Attention over packed documents.

Query i sees key j when both carry the same segment id, position_j <= position_i and, with a window W,
position_i - position_j < W. Nothing else is masked, so padding (segment 0) attends to padding and stays finite.

Backends (`kernels.BACKENDS` says which serves which device and which were measured):

    reference    softmax(Q K^T) V with a mask, any device, any dtype
    sdpa         F.scaled_dot_product_attention with the same mask
    documents    one causal flash call per document. With documents of length L in rows of length S the work is S L
                 instead of S^2. The CPU kernel is called in float32 at least: 16-bit gains nothing there
    flex         FlexAttention with a block mask built from the segments
    flash_attn   flash-attn's varlen call over document borders

B rows, S queries, T keys, N query heads, K key heads, H head dim.
"""

import math

import torch
import torch.nn.functional as F

from kernels.elementwise import promote


def mask(segments_BS, positions_BS, key_segments_BT, key_positions_BT, window: int | None) -> torch.Tensor:
    """Return the boolean mask (B, S, T), true where a query may look."""
    distance = positions_BS[:, :, None] - key_positions_BT[:, None, :]
    seen = (segments_BS[:, :, None] == key_segments_BT[:, None, :]) & (distance >= 0)
    return seen if window is None else seen & (distance < window)


def reference(q_BSNH, k_BTKH, v_BTKH, mask_BST, scale: float) -> torch.Tensor:
    """Compute softmax attention in at least float32, keys shared by N / K query heads each."""
    k_BTNH, v_BTNH = (promote(t).repeat_interleave(q_BSNH.shape[2] // t.shape[2], 2) for t in (k_BTKH, v_BTKH))
    scores = torch.einsum("bsnh,btnh->bnst", promote(q_BSNH) * scale, k_BTNH)
    weights = scores.masked_fill(~mask_BST[:, None], -math.inf).softmax(-1)
    return torch.einsum("bnst,btnh->bsnh", weights, v_BTNH).to(q_BSNH.dtype)


def sdpa(q_BSNH, k_BTKH, v_BTKH, mask_BST, scale: float) -> torch.Tensor:
    """Call PyTorch's attention with a mask."""
    q, k, v = (t.transpose(1, 2) for t in (q_BSNH, k_BTKH, v_BTKH))
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask_BST[:, None], scale=scale, enable_gqa=q.shape[1] != k.shape[1]
    ).transpose(1, 2)


# documents: an opaque op whose loop over documents runs on the host, so only for the host's own device ---------------


def _runs(segments_BS: torch.Tensor) -> tuple[list[int], list[int]]:
    """Return the length of every run of equal segment ids in the flattened rows, and which runs are not padding."""
    flat = segments_BS.flatten()
    first = torch.ones_like(flat, dtype=torch.bool)
    first[1:] = flat[1:] != flat[:-1]
    first[:: segments_BS.shape[1]] = True
    start = first.nonzero()[:, 0]
    lengths = torch.diff(start, append=start.new_tensor([flat.numel()])).tolist()
    return lengths, flat[start].nonzero()[:, 0].tolist()


def _band(length: int, window: int | None, dtype: torch.dtype) -> torch.Tensor | None:
    """Return the additive causal band for documents longer than the window."""
    if window is None or length <= window:
        return None
    at = torch.arange(length)
    distance = at[:, None] - at[None, :]
    return torch.zeros(length, length, dtype=dtype).masked_fill_((distance < 0) | (distance >= window), -math.inf)


def _by_group(x_BSNH: torch.Tensor, groups: int, shared: int) -> torch.Tensor:
    """View (B, S, N, H) as (G, K, T, H): the query heads of a key head as a batch, keys repeated by a zero stride."""
    x_GKTH = x_BSNH.flatten(0, 1).unflatten(1, (-1, groups)).permute(2, 1, 0, 3)
    return x_GKTH.expand(shared, -1, -1, -1)


@torch.library.custom_op("functional_trainer::attention_documents", mutates_args=())
def _documents(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, segments: torch.Tensor, window: int | None, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the output, zeros at padding, and the logsumexp of the scores (B, S, N)."""
    G = q.shape[2] // k.shape[2]
    out, lse = q.new_empty(q.shape), q.new_empty(q.shape[:3])
    lengths, real = _runs(segments)
    operands = [_by_group(q, G, G), _by_group(k, 1, G), _by_group(v, 1, G)]
    results = [_by_group(out, G, G), _by_group(lse[..., None], G, G)[..., 0]]
    (qs, ks, vs), (outs, lses) = ([x.split(lengths, 2) for x in group] for group in (operands, results))
    for i in real:
        band = _band(lengths[i], window, lse.dtype)
        o, m = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            qs[i], ks[i], vs[i], 0.0, band is None, attn_mask=band, scale=scale
        )
        outs[i].copy_(o)
        lses[i].copy_(m)
    for i in set(range(len(lengths))) - set(real):
        outs[i].zero_(), lses[i].zero_()
    return out, lse


@_documents.register_fake
def _(q, k, v, segments, window, scale):
    return q.new_empty(q.shape), q.new_empty(q.shape[:3])


@torch.library.custom_op("functional_trainer::attention_documents_grad", mutates_args=())
def _documents_grad(
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    segments: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    window: int | None,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    G = q.shape[2] // k.shape[2]
    dq, dk, dv = (t.new_empty(t.shape) for t in (q, k, v))
    lengths, real = _runs(segments)
    operands = [_by_group(grad, G, G), _by_group(q, G, G), _by_group(k, 1, G), _by_group(v, 1, G), _by_group(out, G, G)]
    pieces = [x.split(lengths, 2) for x in (*operands, _by_group(lse[..., None], G, G)[..., 0])]
    results = [_by_group(dq, G, G).split(lengths, 2)] + [_by_group(t, 1, 1)[0].split(lengths, 1) for t in (dk, dv)]
    for i in real:
        band = _band(lengths[i], window, lse.dtype)
        *five, m = (piece[i] for piece in pieces)
        a, b, c = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            *five, m.contiguous(), 0.0, band is None, attn_mask=band, scale=scale
        )
        results[0][i].copy_(a)
        torch.sum(b, 0, out=results[1][i])
        torch.sum(c, 0, out=results[2][i])
    for i in set(range(len(lengths))) - set(real):
        for result in results:
            result[i].zero_()
    return dq, dk, dv


@_documents_grad.register_fake
def _(grad, q, k, v, segments, out, lse, window, scale):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _setup(ctx, inputs, output):
    q, k, v, segments, ctx.window, ctx.scale = inputs
    out, lse = output
    ctx.save_for_backward(q, k, v, segments, out, lse)
    ctx.mark_non_differentiable(lse)


def _backward(ctx, grad, _):
    return *_documents_grad(grad.contiguous(), *ctx.saved_tensors, ctx.window, ctx.scale), None, None, None


_documents.register_autograd(_backward, setup_context=_setup)


def documents(q_BSNH, k_BSKH, v_BSKH, segments_BS, window: int | None, scale: float) -> torch.Tensor:
    """Attend document by document: segments contiguous in a row, positions rising by one within each."""
    qkv = (promote(x) for x in (q_BSNH, k_BSKH, v_BSKH))  # cast here, where a compiler fuses it
    return _documents(*qkv, segments_BS, window, scale)[0].to(q_BSNH.dtype)


# accelerators --------------------------------------------------------------------------------------------------------


def flex(q_BSNH, k_BTKH, v_BTKH, segments, positions, key_segments, key_positions, window, scale) -> torch.Tensor:
    """Call FlexAttention with the block mask of these segments and positions."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    def seen(b, h, i, j):
        distance = positions[b, i] - key_positions[b, j]
        same = (segments[b, i] == key_segments[b, j]) & (distance >= 0)
        return same if window is None else same & (distance < window)

    (B, S), T = segments.shape, key_segments.shape[1]
    block_mask = create_block_mask(seen, B, None, S, T, device=q_BSNH.device)
    q, k, v = (t.transpose(1, 2) for t in (q_BSNH, k_BTKH, v_BTKH))
    return flex_attention(q, k, v, block_mask=block_mask, scale=scale, enable_gqa=True).transpose(1, 2)


def flash_attn(q_BSNH, k_BSKH, v_BSKH, segments_BS, window: int | None, scale: float) -> torch.Tensor:
    """Call flash-attn's varlen kernel; every run of equal segment ids in a row is one sequence."""
    from flash_attn import flash_attn_varlen_func  # the `flash-attn` extra

    B, S = segments_BS.shape
    flat = segments_BS.flatten()
    first = torch.ones_like(flat, dtype=torch.bool)
    first[1:] = flat[1:] != flat[:-1]
    first[::S] = True
    # A static upper bound of B * S sequences: the unused ones are empty, so nothing is read back to the host.
    index = torch.arange(B * S, device=flat.device, dtype=torch.int32)
    borders = torch.where(first, index, B * S).sort().values
    borders = torch.cat([borders, borders.new_full((1,), B * S)]).to(torch.int32)
    q, k, v = (t.flatten(0, 1) for t in (q_BSNH, k_BSKH, v_BSKH))
    left = -1 if window is None else window - 1
    out = flash_attn_varlen_func(
        q, k, v, borders, borders, S, S, softmax_scale=scale, causal=True, window_size=(left, 0)
    )
    return out.view(q_BSNH.shape)
