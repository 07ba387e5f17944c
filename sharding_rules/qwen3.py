"""Placements of Qwen3. Axes: fsdp (data; stores parameters), ep (data here: a dense model has no experts)."""

from sharding_rules.rules import P, Rules, optional, zero

DATA = ("fsdp", "ep")  # a batch's rows are split over every data axis,
Z = zero(*DATA)  #       and parameters are stored over them all

BOUNDARIES = (
    (r"batch/columns", P(DATA, None)),
    (r"act/(residual|block_in|rope)", P(DATA, None, None)),
    (r"act/(heads|attn)", P(DATA, None, None, None)),
    (r"act/attn_rows", P(DATA, None)),
)
DENSE = (
    (r"params/(un)?embed", P(None, Z)),
    (r"params/(layers/\w+/)?(attn_|mlp_)?norm", P(Z)),
    (r"params/layers/\w+/attn/[qkv]", P(None, None, Z)),
    (r"params/layers/\w+/attn/o", P(Z, None, None)),
    (r"params/layers/\w+/attn/[qk]_norm", P(None)),
    (optional(r"params/layers/\w+/attn/[qkv]_bias"), P(None, None)),
    (optional(r"params/layers/\w+/attn/o_bias"), P(Z)),
)
MLP = (
    (r"params/layers/\w+/mlp/gate_up", P(None, None, Z)),
    (r"params/layers/\w+/mlp/down", P(Z, None)),
)

RULES = Rules((*DENSE, *MLP, *BOUNDARIES))
