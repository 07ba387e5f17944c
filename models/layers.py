"""What decoder families share: rotary frequencies, attention, SwiGLU MLP, routed experts; as specs and pure functions.

The legend of the project. Letters are logical sizes, never a rank's part of them.

B batch rows, S sequence (queries), T keys, D model width, N query heads, K key heads (in attention), H head dim,
h = H / 2, F hidden width, E experts, K experts per token (in the router), R routed rows, V vocabulary, L layers.

Maths runs in `shard.local(fn, ins, outs)` regions on plain tensors. Names say where each operand lives: a parameter's
path, or a boundary (`act/residual`, `act/heads`, `act/attn`, `act/tokens`), or "sum" for a rank's share of a total.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F

import kernels
from functional_trainer.hf import Name
from functional_trainer.param import Param
from functional_trainer.tree import Tree

LAYER = "params/layers/_"
QKV, EXPERTS = ("attn/q", "attn/k", "attn/v"), ("moe/gate_up", "moe/down")
"""Parameters of a layer that are in one product, and quantised alike."""


def one_recipe(shard, *names: str) -> kernels.Recipe | None:
    """Return how a layer's parameters of these names, all in one product, are quantised (None: not)."""
    recipe, *others = [shard.fp8.get(f"{LAYER}/{name}") for name in names]
    if any(other != recipe for other in others):
        raise ValueError(f"{', '.join(names)} are one product: in 8 bits are all of them or none")
    return recipe


# positions -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rope:
    """Rotary embedding: base, and how frequencies are scaled beyond the trained length.

    `kind` is "default", "linear" (all frequencies divided by `factor`) or "yarn" (https://arxiv.org/abs/2309.00071).
    """

    theta: float = 1e4
    kind: str = "default"
    factor: float = 1.0
    trained_length: int = 32768
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float = 1.0

    def frequencies(self, head_dim: int, dtype: torch.dtype, device) -> torch.Tensor:
        """Return the h angular frequencies, radians per position."""
        index = torch.arange(0, head_dim, 2, dtype=dtype, device=device)
        full = 1.0 / self.theta ** (index / head_dim)
        if self.kind == "default":
            return full
        if self.kind == "linear":
            return full / self.factor

        def dim_at(rotations: float) -> float:  # the pair that turns this often over the trained length
            return head_dim * math.log(self.trained_length / (rotations * 2 * math.pi)) / (2 * math.log(self.theta))

        low, high = dim_at(self.beta_fast), dim_at(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, head_dim - 1)
        ramp = ((index / 2 - low) / ((high - low) or 0.001)).clamp(0, 1)
        return full / self.factor * ramp + full * (1 - ramp)

    def tables(
        self, positions_BS: torch.Tensor, head_dim: int, dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return cos and sin, each (B, S, h), in at least float32."""
        dtype = torch.promote_types(dtype, torch.float32)
        angle_BSh = positions_BS[..., None].to(dtype) * self.frequencies(head_dim, dtype, positions_BS.device)
        return angle_BSh.cos() * self.attention_factor, angle_BSh.sin() * self.attention_factor


# attention -----------------------------------------------------------------------------------------------------------


def attention_specs(dim: int, heads: int, kv_heads: int, head_dim: int, bias: bool, std: float) -> Tree:
    """Declare grouped-query attention with normalised queries and keys."""
    if heads % kv_heads:
        raise ValueError(
            f"config.json: num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}"
        )
    if head_dim % 2:
        raise ValueError(f"config.json: head_dim is {head_dim}, expected an even number (rotary pairs)")
    specs = {
        "q": Param((heads, head_dim, dim), "D->NH", std=std),
        "k": Param((kv_heads, head_dim, dim), "D->KH", std=std),
        "v": Param((kv_heads, head_dim, dim), "D->KH", std=std),
        "o": Param((dim, heads, head_dim), "NH->D", std=std),
        "q_norm": Param((head_dim,), "H", init="ones"),
        "k_norm": Param((head_dim,), "H", init="ones"),
    }
    if bias:
        specs |= {
            "q_bias": Param((heads, head_dim), "NH", init="zeros"),
            "k_bias": Param((kv_heads, head_dim), "KH", init="zeros"),
            "v_bias": Param((kv_heads, head_dim), "KH", init="zeros"),
            "o_bias": Param((dim,), "D", init="zeros"),
        }
    return specs


def _qkv(x_BSD, cos_BSh, sin_BSh, q, k, v, q_norm, k_norm, *biases, eps: float, recipe):
    """Project to normalised, rotated queries and keys, and values, all in one product."""
    weights, bias = [w.flatten(0, 1) for w in (q, k, v)], torch.cat(biases).flatten() if biases else None
    heads = kernels.linear(x_BSD, *weights, bias=bias, recipe=recipe).unflatten(-1, (-1, q.shape[1]))
    q_BSNH, k_BSKH, v_BSKH = heads.split([q.shape[0], k.shape[0], v.shape[0]], 2)
    q_BSNH = kernels.rope(kernels.rms_norm(q_BSNH, q_norm, eps), cos_BSh, sin_BSh)
    k_BSKH = kernels.rope(kernels.rms_norm(k_BSKH, k_norm, eps), cos_BSh, sin_BSh)
    return q_BSNH, k_BSKH, v_BSKH


def write(held: torch.Tensor, new: torch.Tensor, start: int | torch.Tensor) -> None:
    """Write (B, S, ...) into a cache (B, T, ...) in place, from one place on, or from each row's own (B,)."""
    if isinstance(start, int):
        held[:, start : start + new.shape[1]] = new
    else:
        row_B, place_S = (torch.arange(n, device=held.device) for n in new.shape[:2])
        held[row_B[:, None], start[:, None] + place_S] = new


def _attend(q_BSNH, k_BSKH, v_BSKH, segments_BS, positions_BS, parents_BS=None, *, window: int | None):
    return kernels.attention(q_BSNH, k_BSKH, v_BSKH, segments_BS, positions_BS, window=window, parents_BS=parents_BS)


def attention(p: Tree, x_BSD, rows: dict, eps: float, window: int | None, shard, cache: dict | None) -> torch.Tensor:
    """Apply attention within segments. With a cache the new keys are written into it in place and all are attended."""
    keys = ("q", "k", "v", "q_norm", "k_norm") + (("q_bias", "k_bias", "v_bias") if "q_bias" in p else ())
    ins = ("act/residual > act/block_in", "act/rope", "act/rope", *(f"{LAYER}/attn/{k}" for k in keys))
    recipe = one_recipe(shard, *QKV)
    qkv = shard.local(partial(_qkv, eps=eps, recipe=recipe), ins, ("act/heads", "act/kv_heads", "act/kv_heads"))
    q, k, v = qkv(x_BSD, rows["cos"], rows["sin"], *(p[k] for k in keys))
    segments, positions = rows["segment_ids"], rows["positions"]
    if cache is not None:
        write(cache["k"], k, rows["start"])
        write(cache["v"], v, rows["start"])
        held = rows["key_segment_ids"], rows["key_positions"]
        out_BSNH = kernels.attention(q, cache["k"], cache["v"], segments, positions, *held, window)
    else:
        ids = (segments, positions, rows["parent_ids"]) if "parent_ids" in rows else (segments, positions)
        ins = "act/heads > act/attn", *("act/kv_heads > act/kv_attn",) * 2, *("act/attn_rows",) * len(ids)
        attend = shard.local(partial(_attend, window=window), ins, ("act/attn > act/heads",))
        out_BSNH = attend(q, k, v, *ids)
    project = shard.local(
        lambda o_BSNH, w_DNH: kernels.linear(o_BSNH.flatten(2), w_DNH.flatten(1), recipe=one_recipe(shard, "attn/o")),
        ("act/heads", f"{LAYER}/attn/o"),
        ("sum:act/block_in > act/residual",),
    )
    y_BSD = project(out_BSNH, p["o"])
    if "o_bias" not in p:
        return y_BSD
    return shard.local(torch.add, ("act/residual", f"{LAYER}/attn/o_bias"), ("act/residual",))(y_BSD, p["o_bias"])


# MLP -----------------------------------------------------------------------------------------------------------------


def mlp_specs(dim: int, hidden: int, std: float) -> Tree:
    """Declare a SwiGLU MLP."""
    return {
        "gate_up": Param((2, hidden, dim), "2:D->F", std=std),
        "down": Param((dim, hidden), "F->D", std=std),
    }


def mlp(p: Tree, x_BSD, shard) -> torch.Tensor:
    """Apply a SwiGLU MLP."""
    up, down = (partial(kernels.linear, recipe=one_recipe(shard, f"mlp/{k}")) for k in ("gate_up", "down"))
    run = shard.local(
        lambda x_BSD, gate_up, w_DF: down(kernels.swiglu(up(x_BSD, gate_up.flatten(0, 1))), w_DF),
        ("act/residual > act/block_in", f"{LAYER}/mlp/gate_up", f"{LAYER}/mlp/down"),
        ("sum:act/block_in > act/residual",),
    )
    return run(x_BSD, p["gate_up"], p["down"])


# routed experts ------------------------------------------------------------------------------------------------------


def moe_specs(dim: int, experts: int, hidden: int, std: float) -> Tree:
    """Declare a softmax router and its SwiGLU experts."""
    return {
        "router": Param((experts, dim), "D->E", std=std),
        "gate_up": Param((experts, 2, hidden, dim), "E2:D->F", std=std),
        "down": Param((experts, dim, hidden), "E:F->D", std=std),
    }


def document_fractions(chosen_BSE: torch.Tensor, segment_ids_BS: torch.Tensor, group=None, ways=1) -> torch.Tensor:
    """Return, for every token, the mean of `chosen` over its document, (B, S, E), from differences of running sums.

    Where S is a part of rows that `group` shares, documents that cross its borders are added up over ranks: each says
    what it has of its first and its last one. Segment ids rise along a row. Differentiates nothing.
    """
    border_BS = F.pad(segment_ids_BS[:, 1:] != segment_ids_BS[:, :-1], (1, 0))
    run_BS = border_BS.cumsum(1)
    first_BS, last_BS = torch.searchsorted(run_BS, run_BS), torch.searchsorted(run_BS, run_BS, right=True)
    counted_BSE = F.pad(chosen_BSE, (0, 1), value=1.0)  # the last column counts tokens
    sums_BSE = F.pad(counted_BSE.cumsum(1), (0, 0, 1, 0))
    index = lambda at_BS: at_BS[..., None].expand(-1, -1, sums_BSE.shape[-1])  # noqa: E731
    total_BSE = sums_BSE.gather(1, index(last_BS)) - sums_BSE.gather(1, index(first_BS))
    if group is not None:
        total_BSE = total_BSE + _elsewhere(total_BSE, segment_ids_BS, group, ways)
    return total_BSE[..., :-1] / total_BSE[..., -1:]


def _elsewhere(total_BSE: torch.Tensor, segment_ids_BS: torch.Tensor, group, ways: int) -> torch.Tensor:
    """Return what other ranks have of each token's document."""
    ends_B2E, ids_B2 = total_BSE[:, [0, -1]], segment_ids_BS[:, [0, -1]]
    once_B2 = torch.stack([torch.ones_like(ids_B2[:, 0], dtype=torch.bool), ids_B2[:, 0] != ids_B2[:, 1]], 1)
    mine = torch.cat([ids_B2[..., None].to(total_BSE.dtype), ends_B2E * once_B2[..., None]], -1)
    all_PB2E = kernels.all_gather(mine, group, ways)
    ids_PB2, sums_PB2E = all_PB2E[..., 0], all_PB2E[..., 1:]
    same_BSP2 = segment_ids_BS[:, :, None, None] == ids_PB2.movedim(0, 1)[:, None]
    over_BSE = torch.einsum("bspk,pbke->bse", same_BSP2.to(total_BSE.dtype), sums_PB2E)
    own_BS2 = segment_ids_BS[..., None] == ids_B2[:, None]
    own_BSE = torch.einsum("bsk,bke->bse", own_BS2.to(total_BSE.dtype), ends_B2E * once_B2[..., None])
    return over_BSE - own_BSE


def _route(x_BSD, segment_ids_BS, router_ED, *given, top_k: int, normalize: bool, recipe):
    """Choose experts, or take the `given` ids (B, S, K); return weights and ids, (B, S, K), the id E at padding, and
    the router's probabilities (B, S, E)."""
    prob_BSE = kernels.promote(kernels.linear(x_BSD, router_ED, recipe=recipe)).softmax(-1)
    id_BSK = given[0].long() if given else prob_BSE.topk(top_k, -1).indices
    top_BSK = prob_BSE.gather(-1, id_BSK)
    if normalize:
        top_BSK = top_BSK / top_BSK.sum(-1, keepdim=True)
    id_BSK = torch.where((segment_ids_BS != 0)[..., None], id_BSK, router_ED.shape[0])
    return top_BSK.to(x_BSD.dtype), id_BSK, prob_BSE


def _sums(prob_BSE, id_BSK, segment_ids_BS, *, group, ways: int):
    """Return three sums over tokens:

    load (E,): slots given to each expert; prob (E,): router probability of each; balance (): the per-sequence form
    (https://arxiv.org/abs/2412.19437, eq. 17-20) E sum_e f_e P_e of each document times its tokens, f and P being means
    over the document. It is K per token at perfect balance, as in transformers' pooled form.
    """
    E = prob_BSE.shape[-1]
    prob_BSE = prob_BSE * (segment_ids_BS != 0)[..., None]
    chosen_BSE = (id_BSK[..., None] == torch.arange(E, device=id_BSK.device)).sum(2).to(prob_BSE.dtype)
    balance = E * (document_fractions(chosen_BSE, segment_ids_BS, group, ways) * prob_BSE).sum()
    return chosen_BSE.sum((0, 1)), prob_BSE.sum((0, 1)), balance


def moe(p: Tree, x_BSD, rows: dict, top_k: int, normalize: bool, shard) -> tuple[torch.Tensor, dict]:
    """Apply dropless routed experts; also return the router's sums `load`, `prob` (E,) and `balance` (), but with a
    cache, and with it or `rows["record"]` the experts that were chosen, `routed_experts` (B, S, K).

    `rows["routed_experts"]` (B, S, K), if there, replaces the choice of experts, not their weights.
    """
    given = (rows["routed_experts"],) if "routed_experts" in rows else ()
    tokens, moved, router = "act/tokens", "act/residual > act/tokens", f"{LAYER}/moe/router"
    route = shard.local(
        partial(_route, top_k=top_k, normalize=normalize, recipe=one_recipe(shard, "moe/router")),
        (moved, "act/token_rows", router, *("batch/columns > act/tokens" for _ in given)),
        (tokens, tokens, tokens),
    )
    weights_BSK, id_BSK, prob_BSE = route(x_BSD, rows["token_segment_ids"], p["router"], *given)
    aux = {}
    if "start" not in rows:
        across = {"group": shard.group(tokens, 1), "ways": shard.part(tokens, 1)[1]}
        add_up = shard.local(partial(_sums, **across), (tokens, tokens, "act/token_rows"), ("sum", "sum", "sum"))
        sums = add_up(prob_BSE, id_BSK, rows["token_segment_ids"])
        aux = dict(zip(("load", "prob", "balance"), sums, strict=True))
    n_experts, group = p["router"].shape[0], shard.group(f"{LAYER}/moe/gate_up", 0)
    parts = {name: shard.part(f"{LAYER}/moe/{name}", 0)[1] for name in ("gate_up", "down")}
    if parts["gate_up"] != parts["down"]:
        raise ValueError(f"the rules of moe/gate_up and moe/down split the experts differently, in {parts}")

    how = {"exchange": shard.dispatch, "recipe": one_recipe(shard, *EXPERTS)}

    def experts(x_BSD, weights_BSK, id_BSK, gate_up, down):
        flat = (x_BSD.flatten(0, 1), weights_BSK.flatten(0, 1), id_BSK.flatten(0, 1))
        return kernels.experts(*flat, gate_up, down, n_experts, group, **how).view(x_BSD.shape)

    ins = (moved, tokens, tokens, f"{LAYER}/moe/gate_up", f"{LAYER}/moe/down")
    run = shard.local(experts, ins, ("sum:act/tokens > act/residual",))
    y_BSD = run(x_BSD, weights_BSK, id_BSK, p["gate_up"], p["down"])
    if "start" in rows or "record" in rows:
        aux["routed_experts"] = shard.local(lambda x: x, (f"{tokens} > batch/columns",), ("batch/columns",))(id_BSK)
    return y_BSD, aux


# the skeleton --------------------------------------------------------------------------------------------------------


def norm(x_BSD, scale_D, name: str, eps: float, shard) -> torch.Tensor:
    """Apply RMSNorm to the residual with the parameter called `name`."""
    return shard.local(partial(kernels.rms_norm, eps=eps), ("act/residual", name), ("act/residual",))(x_BSD, scale_D)


def block(p: Tree, x_BSD, rows: dict, eps: float, window: int | None, shard, cache, feed: Callable):
    """Apply pre-norm attention and `feed(p, x) -> (y, aux)`, each added to the residual."""
    h_BSD = norm(x_BSD, p["attn_norm"], f"{LAYER}/attn_norm", eps, shard)
    x_BSD = x_BSD + attention(p["attn"], h_BSD, rows, eps, window, shard, cache)
    y_BSD, aux = feed(p, norm(x_BSD, p["mlp_norm"], f"{LAYER}/mlp_norm", eps, shard))
    return x_BSD + y_BSD, aux


def decoder_specs(vocab: int, dim: int, layers: list[Tree], tied: bool, std: float) -> Tree:
    """Declare a decoder around its layers."""
    specs = {"embed": Param((vocab, dim), "V,D", std=std), "layers": layers, "norm": Param((dim,), "D", init="ones")}
    return specs if tied else specs | {"unembed": Param((vocab, dim), "V,D", std=std)}


HUB = "model.layers.{i}."
DECODER_NAMES = (
    Name("model.embed_tokens.weight", "embed"),
    Name("model.norm.weight", "norm"),
    Name("lm_head.weight", "unembed"),
    Name(HUB + "input_layernorm.weight", "layers/{i}/attn_norm"),
    Name(HUB + "post_attention_layernorm.weight", "layers/{i}/mlp_norm"),
)
ATTENTION_NAMES = (
    *(Name(f"{HUB}self_attn.{k}_proj.weight", f"layers/{{i}}/attn/{k}") for k in "qkvo"),
    *(Name(f"{HUB}self_attn.{k}_proj.bias", f"layers/{{i}}/attn/{k}_bias") for k in "qkvo"),
    *(Name(f"{HUB}self_attn.{k}_norm.weight", f"layers/{{i}}/attn/{k}_norm") for k in "qk"),
)
MLP_NAMES = (
    Name(HUB + "mlp.gate_proj.weight", "layers/{i}/mlp/gate_up", "0"),
    Name(HUB + "mlp.up_proj.weight", "layers/{i}/mlp/gate_up", "1"),
    Name(HUB + "mlp.down_proj.weight", "layers/{i}/mlp/down"),
)
