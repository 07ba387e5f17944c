"""Attention document by document on the host: an opaque op that loops over documents, so only for the host's device.

Documents of similar length are computed together, in batched products whose scores stay in the cores' caches; each long
one is a flash call of PyTorch's. With documents of length L in rows of length S the work is S L instead of S^2.

Sinks: with score s_n of the sink of head n, P = exp(scores - lse), lse' = logaddexp(lse, s), the weights are
P' = exp(scores - lse') and, as the sink's value is zero, their gradient is P' (dP - D) with D = rowsum(grad * out):
what every softmax backward computes when it is given P' or lse'. The sink's own is -exp(s - lse') D.

A document that continues a parent has keys of its parent's tokens too, gathered in front of its own. Their gradients,
like those of tokens of the parent's other children, are added up in the order of the tiles.

Soft-capping: PyTorch's flash call has none, so a long document is a tile for each key head, its scores held whole.

B rows, S queries and keys, N query heads, K key heads, G = N / K, H head dim of queries and keys, V head dim of values,
T tokens of a tile, L its documents' length, M that of their keys: L and the longest parent's.
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


class Run(NamedTuple):
    """A document: its first token and length, and its parent's (0: none)."""

    start: int
    length: int
    parent: int
    before: int


class Tile(NamedTuple):
    """Documents computed together, padded to one length; `band` keeps the padding from every real query."""

    documents: int
    length: int
    heads: slice  # of the key heads
    asked: slice  # of the results for queries of all tiles
    held: slice  # of those for keys
    queries: torch.Tensor  # rows of (T N, H), in the order document, query head, position
    keys: torch.Tensor  # rows of (T K, H), in the order document, key head, position
    unused: torch.Tensor  # which of `queries` are padding
    band: torch.Tensor  # additive mask (L, M), or of each document (documents, 1, L, M)

    @property
    def batch(self) -> tuple[int, int]:
        """How many products of matrices there are: a shape to view rows as."""
        return self.documents * (self.heads.stop - self.heads.start), -1


class Plan(NamedTuple):
    """Short documents in tiles; for each row of queries its place in all tiles' results, and for each of keys its
    places, one behind the other, and where they begin.

    A query without one (padding, long documents) has the place after the last.
    """

    tiles: list[Tile]
    query_places: torch.Tensor
    key_places: torch.Tensor
    key_begins: torch.Tensor
    long: list[Run]
    rule: Rule


def _band(
    token: torch.Tensor, lengths: torch.Tensor, parent: torch.Tensor, before: torch.Tensor, rule: Rule,
    dtype: torch.dtype,
) -> torch.Tensor:  # fmt: skip
    """Return the additive mask of documents with these tokens (documents, L), of `lengths` (documents, 1), and parents
    with these (documents, P), of lengths `before` (documents, 1); one for all where it is the same.

    A padding query sees itself, so that no row of scores is all hidden.
    """
    at = torch.arange(token.shape[1])
    distance = at[:, None] - at[None, :]
    far = distance >= (rule.window or token.shape[1])
    real = at < lengths  # (documents, L)
    if rule.groups is not None:
        group = torch.where(real, rule.groups[token], 0)
        together = (group[:, :, None] == group[:, None, :]) & (group[:, :, None] != 0)
        hidden = far | ((distance < 0) & ~together)
    elif rule.causal:
        hidden = (distance < 0) | far
    else:
        hidden = far | far.T | (~real[:, None, :] & (distance != 0))
    if parent.shape[1]:
        then = torch.arange(parent.shape[1])
        past = (before + at)[:, :, None] - then >= (rule.window or before.max() + token.shape[1])
        past = past | (then >= before)[:, None]
        if hidden.dim() == 2 and bool((before == before[0]).all()):
            hidden = torch.cat([past[0], hidden], 1)
        else:
            hidden = torch.cat([past, hidden.expand(len(token), -1, -1)], 2)
    band = torch.zeros(hidden.shape, dtype=dtype).masked_fill_(hidden, -math.inf)
    return band if hidden.dim() == 2 else band[:, None]


def _runs(flat: torch.Tensor, parents: torch.Tensor | None, S: int) -> Iterator[Run]:
    """Yield the runs of equal segment ids that are not 0 in rows of S."""
    first = torch.ones_like(flat, dtype=torch.bool)
    first[1:] = flat[1:] != flat[:-1]
    first[::S] = True
    starts = first.nonzero()[:, 0]
    lengths = torch.diff(starts, append=starts.new_tensor([flat.numel()]))
    ids, continued = flat[starts].tolist(), [0] * len(starts) if parents is None else parents[starts].tolist()
    spans = list(zip(starts.tolist(), lengths.tolist(), strict=True))
    known = {(start // S, i): (start, n) for (start, n), i in zip(spans, ids, strict=True) if i}
    for (start, n), i, parent in zip(spans, ids, continued, strict=True):
        if i:
            yield Run(start, n, *known.get((start // S, parent), (0, 0)))


def _batches(runs: list[Run], heads: int) -> Iterator[list[Run]]:
    """Yield documents of about one length, their parents too, whose scores with so many query heads make a tile."""
    batch: list[Run] = []
    near = lambda run: -(-run.before // 16)  # noqa: E731
    for run in sorted(runs, key=lambda run: (near(run), run.length, run.start), reverse=True):
        longest = batch[0].length if batch else 0
        scores = (len(batch) + 1) * longest * (longest + max((r.before for r in batch), default=0))
        if batch and (near(run) != near(batch[0]) or run.length < 0.8 * longest - 8 or scores * heads > TILE):
            yield batch
            batch = []
        batch.append(run)
    if batch:
        yield batch


@lru_cache(maxsize=2)  # layers, forward and backward, ask for the same one; two kinds of layers for two
def _plan(
    segments: bytes, S: int, kv_heads: int, groups: int, window: int | None, causal: bool, prefix: bytes | None,
    parents: bytes | None, whole: bool, dtype: torch.dtype,
) -> Plan:  # fmt: skip
    """Sort the runs of equal segment ids in rows of S, given as int64, into a plan; 0 is padding.

    With `whole` the scores of long documents too are computed whole.
    """
    flat, shared, continued = (
        None if ids is None else torch.frombuffer(bytearray(ids + bytes(8)), dtype=torch.int64)[:-1]
        for ids in (segments, prefix, parents)  # an empty buffer is refused
    )
    assert flat is not None
    rule = Rule(window, causal, shared)
    runs = list(_runs(flat, continued, S))
    is_long = lambda run: run.length * (run.length + run.before) > DENSE**2  # noqa: E731
    short, long = ([run for run in runs if is_long(run) == wanted] for wanted in (False, True))
    batches = [(batch, [slice(0, kv_heads)]) for batch in _batches(short, kv_heads * groups)]
    if whole:
        batches += [([run], [slice(head, head + 1) for head in range(kv_heads)]) for run in long]
    N, tiles, asked, held = kv_heads * groups, list[Tile](), 0, 0
    places, sources = torch.full((flat.numel() * N,), -1), list[torch.Tensor]()
    for batch, parts in batches:
        start, length, parent, before = torch.tensor(batch).T[:, :, None]
        at, then = torch.arange(int(length.max())), torch.arange(int(before.max()))
        token, real = start + torch.minimum(at, length - 1), at < length
        behind = parent + torch.minimum(then, (before - 1).clamp(min=0))
        band = _band(token, length, behind, before, rule, dtype)
        seen, used = torch.cat([behind, token], 1), torch.cat([then < before, real], 1)
        for part in parts:
            head = torch.arange(part.start, part.stop)[:, None]
            queries = (token[:, None] * N + torch.arange(N)[part.start * groups : part.stop * groups, None]).flatten()
            keys = (seen[:, None] * kv_heads + head).flatten()
            mine = real[:, None].expand(-1, len(head) * groups, -1).flatten()
            places[queries[mine]] = asked + mine.nonzero()[:, 0]
            sources.append(torch.where(used[:, None].expand(-1, len(head), -1).flatten(), keys, -1))
            spans = slice(asked, asked + len(queries)), slice(held, held + len(keys))
            tiles.append(Tile(len(batch), len(at), part, *spans, queries, keys, (~mine).nonzero()[:, 0], band))
            asked, held = spans[0].stop, spans[1].stop
    places[places < 0] = asked  # the row after the last
    return Plan(tiles, places, *_by_row(sources, flat.numel() * kv_heads), [] if whole else long, rule)


def _by_row(sources: list[torch.Tensor], rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return which of results, that are of these rows (-1: of none), are of row 0, then of row 1, ..., and where each
    row's begin."""
    row, place = torch.cat([torch.empty(0, dtype=torch.int64), *sources]).sort(stable=True)
    return place[row >= 0], torch.searchsorted(row[row >= 0], torch.arange(rows))


def _plan_of(segments_BS, q_BSNH, kv_heads: int, window, causal: bool, prefix_BS, parents_BS, whole: bool) -> Plan:
    segments, prefix, parents = (
        None if ids is None else ids.to(torch.int64).contiguous().numpy().tobytes()
        for ids in (segments_BS, prefix_BS, parents_BS)
    )
    S, groups = segments_BS.shape[1], q_BSNH.shape[2] // kv_heads
    return _plan(segments, S, kv_heads, groups, window, causal, prefix, parents, whole, q_BSNH.dtype)


def _buffers(plan: Plan, groups: int, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return two buffers for a tile's scores; used again by every tile, they stay in the cores' caches."""
    scores = max((t.keys.shape[0] * t.length * groups for t in plan.tiles), default=0)
    return like.new_empty(scores), like.new_empty(scores)


def _scores(q: torch.Tensor, k: torch.Tensor, tile: Tile, buffers, softcap: float | None):
    """Return masked scores (n K, G L, M) of a tile, room for as many numbers, and the slope of the cap if there is one.

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
    scores.view(tile.documents, -1, *tile.band.shape[-2:]).add_(tile.band)
    return scores, room, slope


def _place(results: torch.Tensor, places: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """Return tiles' results as (B, S, heads, H); their last row is for what no tile has a result for, zeros."""
    results[-1] = 0
    return results.index_select(0, places).view(shape)


def _summed(results: torch.Tensor, plan: Plan, shape: tuple[int, ...]) -> torch.Tensor:
    """Return the sums of tiles' results for each row of keys, as (B, S, heads, H)."""
    return torch.embedding_bag(results, plan.key_places, plan.key_begins, False, 0)[0].view(shape)


def _by_group(x_BSNH: torch.Tensor, groups: int, shared: int) -> torch.Tensor:
    """View (B, S, N, H) as (G, K, T, H): the query heads of a key head as a batch, keys repeated by a zero stride."""
    x_GKTH = x_BSNH.flatten(0, 1).unflatten(1, (-1, groups)).permute(2, 1, 0, 3)
    return x_GKTH.expand(shared, -1, -1, -1)


def _widened(x: torch.Tensor, width: int) -> torch.Tensor:
    """Pad the last dimension with zeros: PyTorch's flash call wants one head dim for all."""
    return x if x.shape[-1] == width else F.pad(x, (0, width - x.shape[-1]))


def _long_band(plan: Plan, run: Run, dtype: torch.dtype) -> tuple[torch.Tensor | None, bool]:
    """Return the mask of a long document for a flash call, and whether that is causal without one."""
    window, causal, groups = plan.rule
    start, n, parent, before = run
    if groups is not None and not groups[start : start + n].any():
        groups = None
    if groups is None and not before and (window is None or n <= window):
        return None, causal
    own, parents = ((torch.arange(x)[None] + first, torch.tensor([[x]])) for first, x in ((start, n), (parent, before)))
    band = _band(*own, *parents, Rule(window, causal, groups), dtype)
    return band.view(n, before + n), False


def _seen(x_BSKH: torch.Tensor, run: Run, groups: int) -> torch.Tensor:
    """Return (G, K, T, H) keys or values of a long document: its parent's and its own."""
    x_KTH = _by_group(x_BSKH, 1, 1)[0]
    own = x_KTH[:, run.start : run.start + run.length]
    seen = torch.cat([x_KTH[:, run.parent : run.parent + run.before], own], 1) if run.before else own
    return seen.expand(groups, -1, -1, -1)


@op("functional_trainer::attention_documents", gradient=True)
def _documents(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, segments: torch.Tensor, window: int | None, scale: float,
    causal: bool = True, softcap: float | None = None, sinks: torch.Tensor | None = None,
    prefix: torch.Tensor | None = None, parents: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Return the output, zeros at padding, and the logsumexp of the scores (B, S, N): with sinks of all, else of the
    long documents' only."""
    K, G, V = k.shape[2], q.shape[2] // k.shape[2], v.shape[3]
    plan = _plan_of(segments, q, K, window, causal, prefix, parents, softcap is not None)
    q_rows, k_rows, v_rows = (x.reshape(-1, x.shape[3]) for x in (q, k, v))
    results = q.new_empty(plan.tiles[-1].asked.stop + 1 if plan.tiles else 1, V)
    sums = None if sinks is None else q.new_empty(results.shape[0], 1)
    buffers = _buffers(plan, G, q)
    for tile in plan.tiles:
        batch = tile.batch
        queries = q_rows.index_select(0, tile.queries).mul_(scale).view(*batch, q.shape[3])
        keys, values = (x.index_select(0, tile.keys).view(*batch, x.shape[1]) for x in (k_rows, v_rows))
        scores, p, _ = _scores(queries, keys, tile, buffers, softcap)
        if sinks is None or sums is None:
            torch.softmax(scores, -1, out=p)
        else:
            sink = sinks.view(K, G)[tile.heads].repeat(tile.documents, 1).repeat_interleave(tile.length, 1)
            lse = torch.logaddexp(scores.logsumexp(-1), sink)
            torch.exp(scores.sub_(lse[..., None]), out=p)
            sums[tile.asked] = lse.view(-1, 1)
        torch.bmm(p, values, out=results[tile.asked].view(*batch, V))
    out = _place(results, plan.query_places, (*q.shape[:3], V))
    lse = q.new_zeros(q.shape[:3]) if sums is None else _place(sums, plan.query_places, q.shape[:3])
    for run in plan.long:
        _flash(q, k, v, out, lse, sinks, plan, run, scale)
    return out, lse


def _flash(q, k, v, out, lse, sinks, plan: Plan, run: Run, scale: float) -> None:
    """Compute one long document into `out` and `lse`."""
    G, width, here = q.shape[2] // k.shape[2], max(q.shape[3], v.shape[3]), slice(run.start, run.start + run.length)
    qs, outs, lses = (_by_group(x, G, G)[:, :, here] for x in (q, out, lse[..., None]))
    ks, vs = (_seen(x, run, G) for x in (k, v))
    band, causal = _long_band(plan, run, q.dtype)
    o, m = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        *(_widened(x, width) for x in (qs, ks, vs)), 0.0, causal, attn_mask=band, scale=scale
    )
    if sinks is not None:
        total = torch.logaddexp(m, sinks.view(-1, G).T[..., None])
        o, m = o * torch.exp(m - total)[..., None], total
    outs.copy_(o[..., : v.shape[3]])
    lses[..., 0].copy_(m)


@torch.library.register_fake("functional_trainer::attention_documents")
def _(q, k, v, segments, window, scale, causal=True, softcap=None, sinks=None, prefix=None, parents=None):
    return q.new_empty(*q.shape[:3], v.shape[3]), q.new_empty(q.shape[:3])


@op("functional_trainer::attention_documents_grad")
def _documents_grad(
    grad: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, segments: torch.Tensor, out: torch.Tensor,
    lse: torch.Tensor, window: int | None, scale: float, causal: bool = True, softcap: float | None = None,
    sinks: torch.Tensor | None = None, prefix: torch.Tensor | None = None, parents: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    K, G = k.shape[2], q.shape[2] // k.shape[2]
    plan = _plan_of(segments, q, K, window, causal, prefix, parents, softcap is not None)
    grad_rows, q_rows, k_rows, v_rows = (x.reshape(-1, x.shape[3]) for x in (grad, q, k, v))
    asked, held = (plan.tiles[-1].asked.stop, plan.tiles[-1].held.stop) if plan.tiles else (0, 0)
    sizes = (asked + 1, q.shape[3]), (held + 1, q.shape[3]), (held + 1, v.shape[3])
    dq, dk, dv = (q.new_empty(size) for size in sizes)
    buffers = _buffers(plan, G, q)
    for tile in plan.tiles:
        batch = tile.batch
        g = grad_rows.index_select(0, tile.queries).index_fill_(0, tile.unused, 0).view(*batch, v.shape[3])
        queries = q_rows.index_select(0, tile.queries).mul_(scale).view(*batch, q.shape[3])
        keys, values = (x.index_select(0, tile.keys).view(*batch, x.shape[1]) for x in (k_rows, v_rows))
        scores, p, slope = _scores(queries, keys, tile, buffers, softcap)
        if sinks is None:
            torch.softmax(scores, -1, out=p)
        else:
            torch.exp(scores.sub_(lse.view(-1).index_select(0, tile.queries).view(*batch, 1)), out=p)
        torch.bmm(p.mT, g, out=dv[tile.held].view(*batch, v.shape[3]))
        dp = torch.bmm(g, values.mT, out=scores)
        ds = torch.ops.aten._softmax_backward_data.out(dp, p, -1, p.dtype, grad_input=dp)
        if slope is not None:
            ds.mul_(slope)
        torch.bmm(ds, keys, out=dq[tile.asked].view(*batch, q.shape[3])).mul_(scale)
        torch.bmm(ds.mT, queries, out=dk[tile.held].view(*batch, q.shape[3]))
    dq, dk, dv = _place(dq, plan.query_places, q.shape), _summed(dk, plan, k.shape), _summed(dv, plan, v.shape)
    for run in plan.long:
        _flash_grad(grad, q, k, v, out, lse, dq, dk, dv, plan, run, scale)
    return dq, dk, dv


def _flash_grad(grad, q, k, v, out, lse, dq, dk, dv, plan: Plan, run: Run, scale: float) -> None:
    """Compute the gradients of one long document into `dq`, and add them to `dk` and `dv`."""
    G, width, here = q.shape[2] // k.shape[2], max(q.shape[3], v.shape[3]), slice(run.start, run.start + run.length)
    grads, qs, outs, m, dqs = (_by_group(x, G, G)[:, :, here] for x in (grad, q, out, lse[..., None], dq))
    ks, vs = (_seen(x, run, G) for x in (k, v))
    band, causal = _long_band(plan, run, q.dtype)
    a, b, c = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        *(_widened(x, width) for x in (grads, qs, ks, vs, outs)), m[..., 0].contiguous(), 0.0, causal,
        attn_mask=band, scale=scale,
    )  # fmt: skip
    dqs.copy_(a[..., : q.shape[3]])
    for whole, parts in ((dk, b), (dv, c)):
        rows, total = _by_group(whole, 1, 1)[0], parts[..., : whole.shape[3]].sum(0)
        rows[:, run.parent : run.parent + run.before] += total[:, : run.before]
        rows[:, here] += total[:, run.before :]


@torch.library.register_fake("functional_trainer::attention_documents_grad")
def _(
    grad, q, k, v, segments, out, lse, window, scale, causal=True, softcap=None, sinks=None, prefix=None, parents=None
):  # fmt: skip
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _setup(ctx, inputs, output):
    q, k, v, segments, window, scale, causal, softcap, sinks, prefix, parents = inputs
    out, lse = output
    ctx.rest = window, scale, causal, softcap
    ctx.save_for_backward(q, k, v, segments, out, lse, sinks, prefix, parents)
    ctx.mark_non_differentiable(lse)


def _backward(ctx, grad, _):
    *saved, sinks, prefix, parents = ctx.saved_tensors
    grad, dsinks = grad.contiguous(), None
    if sinks is not None:
        *_, out, lse = saved
        dsinks = -(torch.exp(sinks - lse) * (grad * out).sum(-1)).sum((0, 1))
    grads = _documents_grad(grad, *saved, *ctx.rest, sinks, prefix, parents)
    return *grads, None, None, None, None, None, dsinks, None, None


torch.library.register_autograd("functional_trainer::attention_documents", _backward, setup_context=_setup)
