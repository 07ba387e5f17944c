"""Placements of Qwen3. Axes: dp, fsdp, ep (data; the last two store parameters), cp (tokens), tp (heads, units)."""

from sharding_rules.rules import P, Rules, optional, repeat, zero

DATA = ("dp", "fsdp", "ep")  # a batch's rows are split over every data axis,
Z = zero("fsdp", "ep", "cp")  #          and parameters are stored over all that hold them whole in use, but dp
ZT = zero("fsdp", "ep", "cp", "tp")
SEQ = ("cp", "tp")  # sequence parallelism: between products, tp splits tokens too

BOUNDARIES = (
    (r"batch/columns", P(DATA, SEQ)),
    (r"act/residual", P(DATA, SEQ, None)),
    (r"act/rows", P(DATA, "cp")),
    (r"act/(block_in|rope)", P(DATA, "cp", None)),
    (r"act/heads", P(DATA, "cp", "tp", None)),
    (r"act/attn", P(DATA, None, ("tp", "cp"), None)),  # Ulysses: an all-to-all from tokens to heads
    (r"act/kv_heads", P(DATA, "cp", repeat("tp"), None)),
    (r"act/kv_attn", P(DATA, None, repeat("tp", "cp"), None)),
    (r"act/attn_rows", P(DATA, None)),
    (r"act/token_rows", P(DATA, SEQ)),
    (r"act/vocab", P(DATA, "cp", "tp")),
)
DENSE = (
    (r"params/(un)?embed", P("tp", Z)),
    (r"params/(layers/\w+/)?(attn_|mlp_)?norm", P(ZT)),
    (r"params/layers/\w+/attn/q", P("tp", None, Z)),
    (r"params/layers/\w+/attn/[kv]", P(repeat("tp"), None, ZT)),
    (r"params/layers/\w+/attn/o", P(Z, "tp", None)),
    (r"params/layers/\w+/attn/[qk]_norm", P(None)),
    (optional(r"params/layers/\w+/attn/q_bias"), P("tp", None)),
    (optional(r"params/layers/\w+/attn/[kv]_bias"), P(repeat("tp"), None)),
    (optional(r"params/layers/\w+/attn/o_bias"), P(ZT)),
)
MLP = (
    (r"params/layers/\w+/mlp/gate_up", P(None, "tp", Z)),
    (r"params/layers/\w+/mlp/down", P(Z, "tp")),
)

RULES = Rules((*DENSE, *MLP, *BOUNDARIES))
