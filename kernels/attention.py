"""Attention over packed documents.

Query i sees key j when both carry the same segment id, position_j <= position_i and, with a window W,
position_i - position_j < W. Nothing else is masked, so padding (segment 0) attends to padding and stays finite.

Backends (`kernels.BACKENDS` says which serves which device and which were measured):

    reference    softmax(Q K^T) V with a mask, any device, any dtype
    sdpa         F.scaled_dot_product_attention with the same mask
    documents    batched products for documents of similar length, one causal flash call for each long one. With
                 documents of length L in rows of length S the work is S L instead of S^2. In float32 at least
    flex         FlexAttention with a block mask built from the segments
    flash_attn   flash-attn's varlen call over document borders
    shapes       what flash-attn would hold, for meta tensors: plans of a step

B rows, S queries, T keys, N query heads, K key heads, H head dim.
"""

import math
from functools import lru_cache
from typing import NamedTuple

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


# documents: an opaque op that loops on the host, so only for the host's own device ------------------------------------

DENSE = 256
"""Longest document whose scores are computed whole (in a tile with others of about its length), not by flash calls."""
TILE = 2**18
"""Scores held at a time: as many as stay in the cores' caches."""


class Tile(NamedTuple):
    """Documents computed together, padded to one length; causality hides the padding from every real query."""

    documents: int
    length: int
    queries: torch.Tensor  # rows of (T N, H), in the order document, query head, position
    keys: torch.Tensor  # rows of (T K, H), in the order document, key head, position
    unused: torch.Tensor  # which of `queries` are padding
    band: torch.Tensor  # additive mask (L, L)


class Plan(NamedTuple):
    """Short documents in tiles, and for each row of queries and of keys its place in all tiles' results.

    Rows without one (padding, long documents) have the place after the last.
    """

    tiles: list[Tile]
    query_places: torch.Tensor
    key_places: torch.Tensor
    long: list[tuple[int, int]]  # (first token, length)


def _band(length: int, window: int | None, dtype: torch.dtype) -> torch.Tensor:
    """Return the additive causal mask (L, L), banded if there is a window."""
    at = torch.arange(length)
    distance = at[:, None] - at[None, :]
    hidden = (distance < 0) | (distance >= (window or length))
    return torch.zeros(length, length, dtype=dtype).masked_fill_(hidden, -math.inf)


@lru_cache(maxsize=2)  # layers, forward and backward, ask for the same one; two kinds of layers for two
def _plan(segments: bytes, S: int, kv_heads: int, groups: int, window: int | None, dtype: torch.dtype) -> Plan:
    """Sort the runs of equal segment ids in rows of S, given as int64, into a plan; 0 is padding."""
    flat = torch.frombuffer(bytearray(segments + bytes(8)), dtype=torch.int64)[:-1]  # an empty buffer is refused
    first = torch.ones_like(flat, dtype=torch.bool)
    first[1:] = flat[1:] != flat[:-1]
    first[::S] = True
    starts = first.nonzero()[:, 0]
    lengths = torch.diff(starts, append=starts.new_tensor([flat.numel()]))
    runs = list(zip(starts.tolist(), lengths.tolist(), (flat[starts] != 0).tolist(), strict=True))
    heads = kv_heads * groups, kv_heads
    batches: list[list[tuple[int, int]]] = []
    for n, start in sorted(((n, start) for start, n, real in runs if real and n <= DENSE), reverse=True):
        longest = batches[-1][0][0] if batches else 0
        if n < 0.8 * longest - 8 or not batches or (len(batches[-1]) + 1) * longest**2 * heads[0] > TILE:
            batches.append([])
        batches[-1].append((n, start))
    tiles, places, end = [], [torch.full((flat.numel() * h,), -1) for h in heads], 0
    for batch in batches:
        L, (length, start) = batch[0][0], torch.tensor(batch).T[:, :, None]
        at = torch.arange(L)
        token, real = start + torch.minimum(at, length - 1), (at < length)[:, None]
        rows = [token[:, None] * h + torch.arange(h)[:, None] for h in heads]
        used = [real.expand_as(row).flatten() for row in rows]
        for place, row, mine, h in zip(places, rows, used, heads, strict=True):
            place[row.flatten()[mine]] = end * h + mine.nonzero()[:, 0]
        unused = (~used[0]).nonzero()[:, 0]
        tiles.append(Tile(len(batch), L, rows[0].flatten(), rows[1].flatten(), unused, _band(L, window, dtype)))
        end += len(batch) * L
    for place, h in zip(places, heads, strict=True):
        place[place < 0] = end * h  # the row after the last
    return Plan(tiles, places[0], places[1], [(start, n) for start, n, real in runs if real and n > DENSE])


def _plan_of(segments_BS: torch.Tensor, q_BSNH: torch.Tensor, kv_heads: int, window: int | None) -> Plan:
    rows = segments_BS.to(torch.int64).contiguous().numpy().tobytes()
    return _plan(rows, segments_BS.shape[1], kv_heads, q_BSNH.shape[2] // kv_heads, window, q_BSNH.dtype)


def _buffers(plan: Plan, heads: int, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return two buffers for a tile's scores; used again by every tile, they stay in the cores' caches."""
    scores = max((t.documents * t.length**2 * heads for t in plan.tiles), default=0)
    return like.new_empty(scores), like.new_empty(scores)


def _weights(q: torch.Tensor, k: torch.Tensor, band: torch.Tensor, buffers) -> tuple[torch.Tensor, torch.Tensor]:
    """Return softmax weights (n K, G L, L) of a tile, and room for as many numbers.

    The G query heads of a key head are rows of one product.
    """
    shape = *q.shape[:2], k.shape[1]
    scores, p = (b[: math.prod(shape)].view(shape) for b in buffers)
    torch.bmm(q, k.mT, out=scores).unflatten(1, (-1, shape[2])).add_(band)
    return torch.softmax(scores, -1, out=p), scores


def _place(results: torch.Tensor, places: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """Return tiles' results as (B, S, heads, H); their last row is for what no tile has a result for, zeros."""
    results[-1] = 0
    return results.index_select(0, places).view(shape)


def _by_group(x_BSNH: torch.Tensor, groups: int, shared: int) -> torch.Tensor:
    """View (B, S, N, H) as (G, K, T, H): the query heads of a key head as a batch, keys repeated by a zero stride."""
    x_GKTH = x_BSNH.flatten(0, 1).unflatten(1, (-1, groups)).permute(2, 1, 0, 3)
    return x_GKTH.expand(shared, -1, -1, -1)


@torch.library.custom_op("functional_trainer::attention_documents", mutates_args=())
def _documents(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, segments: torch.Tensor, window: int | None, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the output, zeros at padding, and the logsumexp of the long documents' scores (B, S, N)."""
    K, H, G = *k.shape[2:], q.shape[2] // k.shape[2]
    plan, end = _plan_of(segments, q, K, window), 0
    q_rows, k_rows, v_rows = (x.reshape(-1, H) for x in (q, k, v))
    results = q.new_empty(sum(t.queries.shape[0] for t in plan.tiles) + 1, H)
    buffers = _buffers(plan, K * G, q)
    for tile in plan.tiles:
        shape = tile.documents * K, -1, H
        queries = q_rows.index_select(0, tile.queries).mul_(scale).view(shape)
        keys, values = (x.index_select(0, tile.keys).view(shape) for x in (k_rows, v_rows))
        p, _ = _weights(queries, keys, tile.band, buffers)
        start, end = end, end + tile.queries.shape[0]
        torch.bmm(p, values, out=results[start:end].view(shape))
    out, lse = _place(results, plan.query_places, q.shape), q.new_zeros(q.shape[:3])
    for start, n in plan.long:
        qs, ks, vs, outs, lses = (
            _by_group(x, groups, G)[:, :, start : start + n]
            for x, groups in ((q, G), (k, 1), (v, 1), (out, G), (lse[..., None], G))
        )
        band = None if window is None or n <= window else _band(n, window, q.dtype)
        o, m = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            qs, ks, vs, 0.0, band is None, attn_mask=band, scale=scale
        )
        outs.copy_(o)
        lses[..., 0].copy_(m)
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
    K, H, G = *k.shape[2:], q.shape[2] // k.shape[2]
    plan, end = _plan_of(segments, q, K, window), 0
    grad_rows, q_rows, k_rows, v_rows = (x.reshape(-1, H) for x in (grad, q, k, v))
    slots = sum(t.keys.shape[0] for t in plan.tiles)
    dq, dk, dv = (q.new_empty(rows + 1, H) for rows in (slots * G, slots, slots))
    buffers = _buffers(plan, K * G, q)
    for tile in plan.tiles:
        shape = tile.documents * K, -1, H
        g = grad_rows.index_select(0, tile.queries).index_fill_(0, tile.unused, 0).view(shape)
        queries = q_rows.index_select(0, tile.queries).mul_(scale).view(shape)
        keys, values = (x.index_select(0, tile.keys).view(shape) for x in (k_rows, v_rows))
        p, room = _weights(queries, keys, tile.band, buffers)
        start, end = end, end + tile.keys.shape[0]
        here = slice(start, end)
        torch.bmm(p.mT, g, out=dv[here].view(shape))
        dp = torch.bmm(g, values.mT, out=room)
        ds = torch.ops.aten._softmax_backward_data.out(dp, p, -1, p.dtype, grad_input=dp)
        torch.bmm(ds, keys, out=dq[start * G : end * G].view(shape)).mul_(scale)
        torch.bmm(ds.mT, queries, out=dk[here].view(shape))
    dq, dk, dv = _place(dq, plan.query_places, q.shape), *(_place(x, plan.key_places, k.shape) for x in (dk, dv))
    for start, n in plan.long:
        *five, m, dqs = (
            _by_group(x, groups, G)[:, :, start : start + n]
            for x, groups in ((grad, G), (q, G), (k, 1), (v, 1), (out, G), (lse[..., None], G), (dq, G))
        )
        band = None if window is None or n <= window else _band(n, window, q.dtype)
        a, b, c = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            *five, m[..., 0].contiguous(), 0.0, band is None, attn_mask=band, scale=scale
        )
        dqs.copy_(a)
        for whole, parts in ((dk, b), (dv, c)):
            torch.sum(parts, 0, out=_by_group(whole, 1, 1)[0, :, start : start + n])
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


def shapes(q_BSNH, k_BSKH, v_BSKH, segments_BS, window: int | None, scale: float) -> torch.Tensor:
    """Hold what flash-attn does, in the inputs' dtype, of tensors that are shapes only."""
    return _documents(q_BSNH, k_BSKH, v_BSKH, segments_BS, window, scale)[0]


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
