"""Attention over packed documents.

Query i sees key j when both carry the same segment id and, with positions p and a window W,

    causal            p_j <= p_i                                                and p_i - p_j < W
    bidirectional     any                                                       and |p_i - p_j| < W
    prefix            p_j <= p_i, or both carry the same nonzero prefix number  and p_i - p_j < W

The prefix column numbers blocks that see themselves whole, an image or a prompt; what comes after a block sees it as it
sees all that came before, and nothing before a block sees it. One at the start of a document makes a prefix LM
(PaliGemma); several are Gemma 3's images, where a window also hides what of the block is far behind. Nothing else is
masked, so padding (segment 0) attends to padding and stays finite.

A segment may continue another one of its row, its parent: its queries see the parent's keys too, by the same rule, and
its positions go on where the parent's end. So several answers share one prompt, which is computed once.

The score is scale q.k, capped to cap tanh(score / cap) (Gemma 2). Sinks (GPT-OSS) are one more score of each query
head, neither scaled nor capped, whose value is zero: they take part in the softmax's sum alone.

Backends (`kernels.BACKENDS` says which serves which device and case, and which were measured):

    reference    softmax(Q K^T) V with a mask, any device, any dtype
    sdpa         F.scaled_dot_product_attention with the same mask; sinks are the scores of one more key
    sdpa_float32 the same, in float32 at least, for hosts
    documents    the host's own op, document by document: attention_documents.py. In float32 at least
    flex         FlexAttention with a block mask built from the segments; sinks by its logsumexp
    flash_attn   flash-attn's varlen call over document borders
    flash_attn_3 the same of its version for Hopper
    varlen       PyTorch's varlen call
    shapes       what flash-attn would hold, for meta tensors: plans of a step

The three varlen calls take one head dim, a multiple of 8: smaller ones are padded with zeros.

B rows, S queries, T keys, N query heads, K key heads, H head dim of queries and keys, V head dim of values.
"""

import inspect
import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from kernels.attention_documents import _documents
from kernels.elementwise import promote


class Rows(NamedTuple):
    """Columns of queries and keys, and the rule by which they decide what is seen."""

    segments_BS: torch.Tensor
    positions_BS: torch.Tensor
    key_segments_BT: torch.Tensor
    key_positions_BT: torch.Tensor
    window: int | None = None
    causal: bool = True
    prefix_BS: torch.Tensor | None = None
    key_prefix_BT: torch.Tensor | None = None
    parents_BS: torch.Tensor | None = None


def _rule(distance, same, together, window: int | None, causal: bool):
    """Say what is seen, given p_i - p_j, whether segments are equal and whether a prefix is shared (None: none is)."""
    before = distance >= 0
    seen = same if not causal else same & (before if together is None else before | together)
    if window is None:
        return seen
    return seen & (distance < window) if causal else seen & (distance < window) & (-distance < window)


def mask(
    segments_BS, positions_BS, key_segments_BT, key_positions_BT, window: int | None = None, causal: bool = True,
    prefix_BS=None, key_prefix_BT=None, parents_BS=None,
) -> torch.Tensor:  # fmt: skip
    """Return the boolean mask (B, S, T), true where a query may look."""
    distance = positions_BS[:, :, None] - key_positions_BT[:, None, :]
    same, together = segments_BS[:, :, None] == key_segments_BT[:, None, :], None
    if prefix_BS is not None:
        together = (prefix_BS[:, :, None] == key_prefix_BT[:, None, :]) & (prefix_BS != 0)[:, :, None]
    if parents_BS is not None:
        same = same | (parents_BS[:, :, None] == key_segments_BT[:, None, :]) & (parents_BS != 0)[:, :, None]
    return _rule(distance, same, together, window, causal)


def reference(q_BSNH, k_BTKH, v_BTKV, rows: Rows, scale: float, softcap=None, sinks_N=None) -> torch.Tensor:
    """Compute softmax attention in at least float32, keys shared by N / K query heads each."""
    k_BTNH, v_BTNV = (promote(t).repeat_interleave(q_BSNH.shape[2] // t.shape[2], 2) for t in (k_BTKH, v_BTKV))
    scores = torch.einsum("bsnh,btnh->bnst", promote(q_BSNH) * scale, k_BTNH)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~mask(*rows)[:, None], -math.inf)
    if sinks_N is not None:
        sinks = sinks_N.to(scores.dtype)[:, None, None].expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, sinks], -1)
    weights = scores.softmax(-1)[..., : k_BTKH.shape[1]]
    return torch.einsum("bnst,btnv->bsnv", weights, v_BTNV).to(q_BSNH.dtype)


def sdpa(q_BSNH, k_BTKH, v_BTKV, rows: Rows, scale: float, sinks_N=None) -> torch.Tensor:
    """Call PyTorch's attention with a mask.

    A sink is the score of a key of its own: queries get a dim that holds sink / scale, which that key alone has as 1.
    There are 8 new dims and not 1, for kernels that want rows aligned.
    """
    seen = mask(*rows)[:, None]
    if sinks_N is not None:
        sinks = (sinks_N.to(q_BSNH.dtype) / scale)[:, None].expand(*q_BSNH.shape[:3], 1)
        q_BSNH = F.pad(torch.cat([q_BSNH, sinks], -1), (0, 7))
        key = (torch.arange(k_BTKH.shape[3] + 8, device=k_BTKH.device) == k_BTKH.shape[3]).to(k_BTKH.dtype)
        k_BTKH = torch.cat([F.pad(k_BTKH, (0, 8)), key.expand(k_BTKH.shape[0], 1, k_BTKH.shape[2], -1)], 1)
        v_BTKV, seen = F.pad(v_BTKV, (0, 0, 0, 0, 0, 1)), F.pad(seen, (0, 1), value=True)
    q, k, v = (t.transpose(1, 2) for t in (q_BSNH, k_BTKH, v_BTKV))
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=seen, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
    ).transpose(1, 2)


def sdpa_float32(q_BSNH, k_BTKH, v_BTKV, rows: Rows, scale: float, sinks_N=None) -> torch.Tensor:
    """Call PyTorch's attention in at least float32: its kernel for hosts takes several times as long in 16 bit."""
    q, k, v = (promote(x) for x in (q_BSNH, k_BTKH, v_BTKV))
    return sdpa(q, k, v, rows, scale, None if sinks_N is None else promote(sinks_N)).to(q_BSNH.dtype)


def documents(q_BSNH, k_BSKH, v_BSKV, rows: Rows, scale: float, softcap=None, sinks_N=None) -> torch.Tensor:
    """Attend document by document: segments contiguous in a row, positions rising by one within each; a parent's end
    where those of its children begin."""
    qkv = (promote(x) for x in (q_BSNH, k_BSKH, v_BSKV))  # cast here, where a compiler fuses it
    sinks = sinks_N if sinks_N is None else sinks_N.to(torch.promote_types(q_BSNH.dtype, torch.float32))
    rest = rows.window, scale, rows.causal, softcap, sinks, rows.prefix_BS, rows.parents_BS
    return _documents(*qkv, rows.segments_BS, *rest)[0].to(q_BSNH.dtype)


def shapes(q_BSNH, k_BSKH, v_BSKV, rows: Rows, scale: float, softcap=None, sinks_N=None) -> torch.Tensor:
    """Hold what flash-attn does, in the inputs' dtype, of tensors that are shapes only."""
    rest = rows.window, scale, rows.causal, softcap, sinks_N, rows.prefix_BS, rows.parents_BS
    return _documents(q_BSNH, k_BSKH, v_BSKV, rows.segments_BS, *rest)[0]


def check(q_BSNH, k_BTKH, v_BTKV, rows: Rows, keys: tuple, softcap: float | None, sinks_N) -> None:
    """Raise ValueError if tensors do not fit each other, or if the rule has no meaning.

    `keys` are key segment ids, positions and prefix as they were given.
    """
    (B, S, N, H), (T, K), V, cached = q_BSNH.shape, k_BTKH.shape[1:3], v_BTKV.shape[3], keys[0] is not None
    for name, x, shape in (
        ("k", k_BTKH, (B, T, K, H)), ("v", v_BTKV, (B, T, K, V)), ("sinks", sinks_N, (N,)),
        ("segment_ids", rows.segments_BS, (B, S)), ("positions", rows.positions_BS, (B, S)),
        ("prefix", rows.prefix_BS, (B, S)), ("parents", rows.parents_BS, (B, S)), ("key_segment_ids", keys[0], (B, T)),
        ("key_positions", keys[1], (B, T)), ("key_prefix", keys[2], (B, T)),
    ):  # fmt: skip
        if x is not None and tuple(x.shape) != shape:
            raise ValueError(f"kernels.attention: {name} has shape {tuple(x.shape)}, expected {shape}")
    wrong = None
    if N % K:
        wrong = f"{N} query heads are not a multiple of {K} key heads"
    elif cached != (keys[1] is not None) or (cached and rows.prefix_BS is not None) != (keys[2] is not None):
        wrong = (
            "keys of their own need key_segment_ids, key_positions and, with prefix, key_prefix; others none of them"
        )
    elif not cached and S != T:
        wrong = f"{S} queries and {T} keys without key_segment_ids: keys must be the queries' own tokens"
    elif rows.window is not None and rows.window < 1:
        wrong = f"window is {rows.window}, expected at least 1, the query's own key"
    elif softcap is not None and not softcap > 0:
        wrong = f"softcap is {softcap}, expected a number above 0, or None"
    elif sinks_N is not None and not sinks_N.is_floating_point():
        wrong = f"sinks are {sinks_N.dtype}, expected floating point"
    elif rows.prefix_BS is not None and rows.prefix_BS.is_floating_point():
        wrong = f"prefix is {rows.prefix_BS.dtype}, expected bool or integer, the numbers of blocks"
    elif not rows.causal and (cached or rows.prefix_BS is not None):
        wrong = f"causal=False sees all of a segment, expected no {'KV cache' if cached else 'prefix'} with it"
    elif rows.parents_BS is not None and (cached or not rows.causal):
        wrong = (
            f"parents are of segments that see what came before, expected no {'KV cache' if cached else 'causal=False'}"
        )
    if wrong is not None:
        raise ValueError(f"kernels.attention: {wrong}")


# accelerators --------------------------------------------------------------------------------------------------------


def flex(q_BSNH, k_BTKH, v_BTKV, rows: Rows, scale: float, softcap=None, sinks_N=None) -> torch.Tensor:
    """Call FlexAttention with the block mask of these segments and positions."""
    from torch.nn.attention.flex_attention import AuxRequest, create_block_mask, flex_attention

    segments, positions, key_segments, key_positions = rows[:4]
    window, causal, prefix, key_prefix, parents = rows[4:]

    def seen(b, h, i, j):
        together = None
        if prefix is not None and key_prefix is not None:
            together = (prefix[b, i] == key_prefix[b, j]) & (prefix[b, i] != 0)
        distance, same = positions[b, i] - key_positions[b, j], segments[b, i] == key_segments[b, j]
        if parents is not None:
            same = same | (parents[b, i] == key_segments[b, j]) & (parents[b, i] != 0)
        return _rule(distance, same, together, window, causal)

    def cap(score, b, h, i, j):
        return softcap * torch.tanh(score / softcap)

    (B, S), T = segments.shape, key_segments.shape[1]
    block_mask = create_block_mask(seen, B, None, S, T, device=q_BSNH.device)
    q, k, v = (t.transpose(1, 2) for t in (q_BSNH, k_BTKH, v_BTKV))
    out, aux = flex_attention(
        q, k, v, None if softcap is None else cap, block_mask, scale, enable_gqa=True,
        return_aux=AuxRequest(lse=sinks_N is not None),
    )  # fmt: skip
    if sinks_N is not None:
        out = (out * torch.sigmoid(aux.lse - sinks_N[:, None])[..., None]).to(out.dtype)
    return out.transpose(1, 2)


def borders(segments_BS: torch.Tensor) -> torch.Tensor:
    """Return where the runs of equal segment ids in rows begin, int32 (B S + 1,), as varlen calls take them.

    B S runs are a static upper bound: the unused ones are empty, so nothing is read back to the host.
    """
    B, S = segments_BS.shape
    flat = segments_BS.flatten()
    first = torch.ones_like(flat, dtype=torch.bool)
    first[1:] = flat[1:] != flat[:-1]
    first[::S] = True
    index = torch.arange(B * S, device=flat.device, dtype=torch.int32)
    starts = torch.where(first, index, B * S).sort().values
    return torch.cat([starts, starts.new_full((1,), B * S)]).to(torch.int32)


def sides(rows: Rows) -> tuple[int, int]:
    """Return how many keys before and after itself a query sees, as varlen calls take them: -1 is all."""
    far = -1 if rows.window is None else rows.window - 1
    return far, 0 if rows.causal else far


def _flat(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """Return (B S, heads, width) with one width for all, a multiple of 8, padded with zeros."""
    width = -(-max(x.shape[3] for x in tensors) // 8) * 8
    return [(x if x.shape[3] == width else F.pad(x, (0, width - x.shape[3]))).flatten(0, 1) for x in tensors]


def _flash(call, q_BSNH, k_BSKH, v_BSKV, rows: Rows, scale: float, softcap: float | None) -> torch.Tensor:
    """Make a varlen call of flash-attn; every run of equal segment ids in a row is one sequence."""
    ends, (B, S) = borders(rows.segments_BS), rows.segments_BS.shape
    out = call(
        *_flat(q_BSNH, k_BSKH, v_BSKV), ends, ends, S, S, softmax_scale=scale, causal=rows.causal,
        window_size=sides(rows), softcap=softcap or 0.0,
    )  # fmt: skip
    out = out[0] if isinstance(out, tuple) else out  # older versions for Hopper add the logsumexp
    return out.view(B, S, *out.shape[1:])[..., : v_BSKV.shape[3]]


def flash_attn(q_BSNH, k_BSKH, v_BSKV, rows: Rows, scale: float, softcap=None) -> torch.Tensor:
    """Call flash-attn's kernels of version 2: the `flash-attn` extra."""
    from flash_attn import flash_attn_varlen_func

    return _flash(flash_attn_varlen_func, q_BSNH, k_BSKH, v_BSKV, rows, scale, softcap)


def flash_attn_3(q_BSNH, k_BSKH, v_BSKV, rows: Rows, scale: float, softcap=None) -> torch.Tensor:
    """Call flash-attn's kernels of version 3, for Hopper: its folder `hopper` installs them."""
    from flash_attn_interface import flash_attn_varlen_func

    return _flash(flash_attn_varlen_func, q_BSNH, k_BSKH, v_BSKV, rows, scale, softcap)


def _says_grouped() -> bool:
    """Say whether PyTorch's varlen call wants to be told of fewer key heads; versions without the option take them."""
    from torch.nn.attention.varlen import varlen_attn

    return "enable_gqa" in inspect.signature(varlen_attn).parameters


_says_grouped._dynamo_marked_constant = True  # type: ignore[attr-defined]  # as assume_constant_result, which imports it


def varlen(q_BSNH, k_BSKH, v_BSKV, rows: Rows, scale: float) -> torch.Tensor:
    """Call PyTorch's varlen attention, whose kernels are flash-attn's, compiled into it; in 16 bit."""
    from torch.nn.attention.varlen import varlen_attn  # here: it imports the compiler, for seconds

    ends, (B, S) = borders(rows.segments_BS), rows.segments_BS.shape
    q, k, v = _flat(q_BSNH, k_BSKH, v_BSKV)
    options: dict[str, Any] = {"enable_gqa": True} if _says_grouped() else {}
    out: Any = varlen_attn(q, k, v, ends, ends, S, S, scale=scale, window_size=sides(rows), **options)
    return out.view(B, S, *out.shape[1:])[..., : v_BSKV.shape[3]]
