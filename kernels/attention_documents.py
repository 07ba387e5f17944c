"""Attention document by document on the host: an opaque op that loops over documents, so only for the host's device.

Documents of similar length are computed together, in batched products whose scores stay in the cores' caches; each long
one is a flash call of PyTorch's. With documents of length L in rows of length S the work is S L instead of S^2.

Sinks: with score s_n of the sink of head n, P = exp(scores - lse), lse' = logaddexp(lse, s), the weights are
P' = exp(scores - lse') and, as the sink's value is zero, their gradient is P' (dP - D) with D = rowsum(grad * out):
what every softmax backward computes when it is given P' or lse'. The sink's own is -exp(s - lse') D.

Soft-capping: PyTorch's flash call has none, so a long document is a tile for each key head, its scores held whole.

B rows, S queries and keys, N query heads, K key heads, G = N / K, H head dim of queries and keys, V head dim of values,
T tokens of a tile, L its documents' length.
"""

import math
from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F

from kernels.ops import op

DENSE = 256
"""Longest document whose scores are computed whole (in a tile with others of about its length), not by flash calls."""
TILE = 2**18
"""Scores held at a time: as many as stay in the cores' caches."""


class Rule(NamedTuple):
    """Which keys of its document a query sees; see `kernels.attention`."""

    window: int | None
    causal: bool
    groups: torch.Tensor | None  # of flat tokens: those of a document with the same nonzero number see each other


class Tile(NamedTuple):
    """Documents computed together, padded to one length; `hidden` keeps the padding from every real query."""

    documents: int
    length: int
    heads: slice  # of the key heads
    queries: torch.Tensor  # rows of (T N, H), in the order document, query head, position
    keys: torch.Tensor  # rows of (T K, H), in the order document, key head, position
    unused: torch.Tensor  # which of `queries` are padding
    band: torch.Tensor  # additive mask (L, L), or of each document (documents, 1, L, L)


class Plan(NamedTuple):
    """Short documents in tiles, and for each row of queries and of keys its place in all tiles' results.

    Rows without one (padding, long documents) have the place after the last.
    """

    tiles: list[Tile]
    query_places: torch.Tensor
    key_places: torch.Tensor
    long: list[tuple[int, int]]  # (first token, length)
    rule: Rule


def _band(token: torch.Tensor, lengths: torch.Tensor, rule: Rule, dtype: torch.dtype) -> torch.Tensor:
    """Return the additive mask of documents with these tokens (documents, L); one (L, L) if it is the same for all.

    A padding query sees itself, so that no row of scores is all hidden.
    """
    at = torch.arange(token.shape[1])
    distance = at[:, None] - at[None, :]
    far = distance >= (rule.window or token.shape[1])
    if rule.causal and rule.groups is None:
        hidden = (distance < 0) | far
        return torch.zeros(hidden.shape, dtype=dtype).masked_fill_(hidden, -math.inf)
    real = at < lengths  # (documents, L)
    if rule.groups is None:
        hidden = far | far.T | (~real[:, None, :] & (distance != 0))
    else:
        group = torch.where(real, rule.groups[token], 0)
        together = (group[:, :, None] == group[:, None, :]) & (group[:, :, None] != 0)
        hidden = far | ((distance < 0) & ~together)
    return torch.zeros(hidden.shape, dtype=dtype).masked_fill_(hidden, -math.inf)[:, None]


def _batches(runs: list[tuple[int, int]], heads: int) -> Iterator[list[tuple[int, int]]]:
    """Yield documents (length, first token) of about one length whose scores with so many query heads make a tile."""
    batch: list[tuple[int, int]] = []
    for n, start in sorted(((n, start) for start, n in runs), reverse=True):
        longest = batch[0][0] if batch else 0
        if batch and (n < 0.8 * longest - 8 or (len(batch) + 1) * longest**2 * heads > TILE):
            yield batch
            batch = []
        batch.append((n, start))
    if batch:
        yield batch


@lru_cache(maxsize=2)  # layers, forward and backward, ask for the same one; two kinds of layers for two
def _plan(
    segments: bytes, S: int, kv_heads: int, groups: int, window: int | None, causal: bool, prefix: bytes | None,
    whole: bool, dtype: torch.dtype,
) -> Plan:  # fmt: skip
    """Sort the runs of equal segment ids in rows of S, given as int64, into a plan; 0 is padding.

    With `whole` the scores of long documents too are computed whole.
    """
    flat, shared = (
        None if ids is None else torch.frombuffer(bytearray(ids + bytes(8)), dtype=torch.int64)[:-1]
        for ids in (segments, prefix)  # an empty buffer is refused
    )
    assert flat is not None
    rule = Rule(window, causal, shared)
    first = torch.ones_like(flat, dtype=torch.bool)
    first[1:] = flat[1:] != flat[:-1]
    first[::S] = True
    starts = first.nonzero()[:, 0]
    lengths = torch.diff(starts, append=starts.new_tensor([flat.numel()]))
    runs = [
        (start, n)
        for start, n, real in zip(starts.tolist(), lengths.tolist(), flat[starts].tolist(), strict=True)
        if real
    ]
    short, long = ([run for run in runs if (run[1] > DENSE) == is_long] for is_long in (False, True))
    batches = [(batch, [slice(0, kv_heads)]) for batch in _batches(short, kv_heads * groups)]
    if whole:
        batches += [([(n, start)], [slice(head, head + 1) for head in range(kv_heads)]) for start, n in long]
    heads, shares = (kv_heads * groups, kv_heads), (groups, 1)
    tiles, places, end = [], [torch.full((flat.numel() * h,), -1) for h in heads], 0
    for batch, parts in batches:
        L, (length, start) = batch[0][0], torch.tensor(batch).T[:, :, None]
        at = torch.arange(L)
        token, real = start + torch.minimum(at, length - 1), (at < length)[:, None]
        band = _band(token, length, rule, dtype)
        for part in parts:
            mine = [torch.arange(h)[part.start * g : part.stop * g, None] for h, g in zip(heads, shares, strict=True)]
            rows = [token[:, None] * h + these for h, these in zip(heads, mine, strict=True)]
            used = [real.expand_as(row).flatten() for row in rows]
            for place, row, these, g in zip(places, rows, used, shares, strict=True):
                place[row.flatten()[these]] = end * g + these.nonzero()[:, 0]
            unused = (~used[0]).nonzero()[:, 0]
            tiles.append(Tile(len(batch), L, part, rows[0].flatten(), rows[1].flatten(), unused, band))
            end += rows[1].numel()
    for place, g in zip(places, shares, strict=True):
        place[place < 0] = end * g  # the row after the last
    return Plan(tiles, places[0], places[1], [] if whole else long, rule)


def _plan_of(segments_BS, q_BSNH, kv_heads: int, window, causal=True, prefix_BS=None, whole: bool = False) -> Plan:
    segments, prefix = (
        None if ids is None else ids.to(torch.int64).contiguous().numpy().tobytes() for ids in (segments_BS, prefix_BS)
    )
    S, groups = segments_BS.shape[1], q_BSNH.shape[2] // kv_heads
    return _plan(segments, S, kv_heads, groups, window, causal, prefix, whole, q_BSNH.dtype)


def _buffers(plan: Plan, groups: int, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return two buffers for a tile's scores; used again by every tile, they stay in the cores' caches."""
    scores = max((t.keys.shape[0] * t.length * groups for t in plan.tiles), default=0)
    return like.new_empty(scores), like.new_empty(scores)


def _scores(q: torch.Tensor, k: torch.Tensor, tile: Tile, buffers, softcap: float | None):
    """Return masked scores (n K, G L, L) of a tile, room for as many numbers, and the slope of the cap if there is one.

    The G query heads of a key head are rows of one product.
    """
    shape = *q.shape[:2], k.shape[1]
    scores, room = (b[: math.prod(shape)].view(shape) for b in buffers)
    torch.bmm(q, k.mT, out=scores)
    slope = None
    if softcap is not None:
        scores.div_(softcap).tanh_()
        slope = 1 - scores.square()
        scores.mul_(softcap)
    scores.view(tile.documents, -1, tile.length, tile.length).add_(tile.band)
    return scores, room, slope


def _place(results: torch.Tensor, places: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """Return tiles' results as (B, S, heads, H); their last row is for what no tile has a result for, zeros."""
    results[-1] = 0
    return results.index_select(0, places).view(shape)


def _by_group(x_BSNH: torch.Tensor, groups: int, shared: int) -> torch.Tensor:
    """View (B, S, N, H) as (G, K, T, H): the query heads of a key head as a batch, keys repeated by a zero stride."""
    x_GKTH = x_BSNH.flatten(0, 1).unflatten(1, (-1, groups)).permute(2, 1, 0, 3)
    return x_GKTH.expand(shared, -1, -1, -1)


def _widened(x: torch.Tensor, width: int) -> torch.Tensor:
    """Pad the last dimension with zeros: PyTorch's flash call wants one head dim for all."""
    return x if x.shape[-1] == width else F.pad(x, (0, width - x.shape[-1]))


def _long_band(plan: Plan, start: int, n: int, dtype: torch.dtype) -> tuple[torch.Tensor | None, bool]:
    """Return the mask of a long document for a flash call, and whether that is causal without one."""
    window, causal, groups = plan.rule
    if groups is not None and not groups[start : start + n].any():
        groups = None
    if groups is None and (window is None or n <= window):
        return None, causal
    band = _band(torch.arange(start, start + n)[None], torch.tensor([[n]]), Rule(window, causal, groups), dtype)
    return band.view(n, n), False


@op("functional_trainer::attention_documents", gradient=True)
def _documents(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, segments: torch.Tensor, window: int | None, scale: float,
    causal: bool = True, softcap: float | None = None, sinks: torch.Tensor | None = None,
    prefix: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Return the output, zeros at padding, and the logsumexp of the scores (B, S, N): with sinks of all, else of the
    long documents' only."""
    K, G, V = k.shape[2], q.shape[2] // k.shape[2], v.shape[3]
    plan, end = _plan_of(segments, q, K, window, causal, prefix, softcap is not None), 0
    q_rows, k_rows, v_rows = (x.reshape(-1, x.shape[3]) for x in (q, k, v))
    results = q.new_empty(sum(t.queries.shape[0] for t in plan.tiles) + 1, V)
    sums = None if sinks is None else q.new_empty(results.shape[0], 1)
    buffers = _buffers(plan, G, q)
    for tile in plan.tiles:
        batch = tile.keys.shape[0] // tile.length, -1
        queries = q_rows.index_select(0, tile.queries).mul_(scale).view(*batch, q.shape[3])
        keys, values = (x.index_select(0, tile.keys).view(*batch, x.shape[1]) for x in (k_rows, v_rows))
        scores, p, _ = _scores(queries, keys, tile, buffers, softcap)
        start, end = end, end + tile.queries.shape[0]
        if sinks is None or sums is None:
            torch.softmax(scores, -1, out=p)
        else:
            sink = sinks.view(K, G)[tile.heads].repeat(tile.documents, 1).repeat_interleave(tile.length, 1)
            lse = torch.logaddexp(scores.logsumexp(-1), sink)
            torch.exp(scores.sub_(lse[..., None]), out=p)
            sums[start:end] = lse.view(-1, 1)
        torch.bmm(p, values, out=results[start:end].view(*batch, V))
    out = _place(results, plan.query_places, (*q.shape[:3], V))
    lse = q.new_zeros(q.shape[:3]) if sums is None else _place(sums, plan.query_places, q.shape[:3])
    for start, n in plan.long:
        _flash(q, k, v, out, lse, sinks, plan, slice(start, start + n), scale)
    return out, lse


def _flash(q, k, v, out, lse, sinks, plan: Plan, here: slice, scale: float) -> None:
    """Compute one long document into `out` and `lse`."""
    G, width = q.shape[2] // k.shape[2], max(q.shape[3], v.shape[3])
    qs, ks, vs, outs, lses = (
        _by_group(x, groups, G)[:, :, here] for x, groups in ((q, G), (k, 1), (v, 1), (out, G), (lse[..., None], G))
    )
    band, causal = _long_band(plan, here.start, here.stop - here.start, q.dtype)
    o, m = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        *(_widened(x, width) for x in (qs, ks, vs)), 0.0, causal, attn_mask=band, scale=scale
    )
    if sinks is not None:
        total = torch.logaddexp(m, sinks.view(-1, G).T[..., None])
        o, m = o * torch.exp(m - total)[..., None], total
    outs.copy_(o[..., : v.shape[3]])
    lses[..., 0].copy_(m)


@torch.library.register_fake("functional_trainer::attention_documents")
def _(q, k, v, segments, window, scale, causal=True, softcap=None, sinks=None, prefix=None):
    return q.new_empty(*q.shape[:3], v.shape[3]), q.new_empty(q.shape[:3])


@op("functional_trainer::attention_documents_grad")
def _documents_grad(
    grad: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, segments: torch.Tensor, out: torch.Tensor,
    lse: torch.Tensor, window: int | None, scale: float, causal: bool = True, softcap: float | None = None,
    sinks: torch.Tensor | None = None, prefix: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    K, G = k.shape[2], q.shape[2] // k.shape[2]
    plan, end = _plan_of(segments, q, K, window, causal, prefix, softcap is not None), 0
    grad_rows, q_rows, k_rows, v_rows = (x.reshape(-1, x.shape[3]) for x in (grad, q, k, v))
    slots = sum(t.keys.shape[0] for t in plan.tiles)
    sizes = (slots * G, q.shape[3]), (slots, q.shape[3]), (slots, v.shape[3])
    dq, dk, dv = (q.new_empty(rows + 1, width) for rows, width in sizes)
    buffers = _buffers(plan, G, q)
    for tile in plan.tiles:
        batch = tile.keys.shape[0] // tile.length, -1
        g = grad_rows.index_select(0, tile.queries).index_fill_(0, tile.unused, 0).view(*batch, v.shape[3])
        queries = q_rows.index_select(0, tile.queries).mul_(scale).view(*batch, q.shape[3])
        keys, values = (x.index_select(0, tile.keys).view(*batch, x.shape[1]) for x in (k_rows, v_rows))
        scores, p, slope = _scores(queries, keys, tile, buffers, softcap)
        if sinks is None:
            torch.softmax(scores, -1, out=p)
        else:
            torch.exp(scores.sub_(lse.view(-1).index_select(0, tile.queries).view(*batch, 1)), out=p)
        start, end = end, end + tile.keys.shape[0]
        torch.bmm(p.mT, g, out=dv[start:end].view(*batch, v.shape[3]))
        dp = torch.bmm(g, values.mT, out=scores)
        ds = torch.ops.aten._softmax_backward_data.out(dp, p, -1, p.dtype, grad_input=dp)
        if slope is not None:
            ds.mul_(slope)
        torch.bmm(ds, keys, out=dq[start * G : end * G].view(*batch, q.shape[3])).mul_(scale)
        torch.bmm(ds.mT, queries, out=dk[start:end].view(*batch, q.shape[3]))
    dq, dk, dv = (
        _place(x, places, like.shape)
        for x, places, like in ((dq, plan.query_places, q), (dk, plan.key_places, k), (dv, plan.key_places, v))
    )
    for start, n in plan.long:
        _flash_grad(grad, q, k, v, out, lse, dq, dk, dv, plan, slice(start, start + n), scale)
    return dq, dk, dv


def _flash_grad(grad, q, k, v, out, lse, dq, dk, dv, plan: Plan, here: slice, scale: float) -> None:
    """Compute the gradients of one long document into `dq`, `dk` and `dv`."""
    G, width = q.shape[2] // k.shape[2], max(q.shape[3], v.shape[3])
    *five, m, dqs = (
        _by_group(x, groups, G)[:, :, here]
        for x, groups in ((grad, G), (q, G), (k, 1), (v, 1), (out, G), (lse[..., None], G), (dq, G))
    )
    band, causal = _long_band(plan, here.start, here.stop - here.start, q.dtype)
    a, b, c = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        *(_widened(x, width) for x in five), m[..., 0].contiguous(), 0.0, causal, attn_mask=band, scale=scale
    )
    dqs.copy_(a[..., : q.shape[3]])
    for whole, parts in ((dk, b), (dv, c)):
        torch.sum(parts[..., : whole.shape[3]], 0, out=_by_group(whole, 1, 1)[0, :, here])


@torch.library.register_fake("functional_trainer::attention_documents_grad")
def _(grad, q, k, v, segments, out, lse, window, scale, causal=True, softcap=None, sinks=None, prefix=None):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _setup(ctx, inputs, output):
    q, k, v, segments, window, scale, causal, softcap, sinks, prefix = inputs
    out, lse = output
    ctx.rest = window, scale, causal, softcap
    ctx.save_for_backward(q, k, v, segments, out, lse, sinks, prefix)
    ctx.mark_non_differentiable(lse)


def _backward(ctx, grad, _):
    *saved, sinks, prefix = ctx.saved_tensors
    grad, dsinks = grad.contiguous(), None
    if sinks is not None:
        *_, out, lse = saved
        dsinks = -(torch.exp(sinks - lse) * (grad * out).sum(-1)).sum((0, 1))
    grads = _documents_grad(grad, *saved, *ctx.rest, sinks, prefix)
    return *grads, None, None, None, None, None, dsinks, None


torch.library.register_autograd("functional_trainer::attention_documents", _backward, setup_context=_setup)
