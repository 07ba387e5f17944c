"""Placements of Qwen3-MoE. Axes as in Qwen3, but ep is data outside the experts and spreads them inside."""

from sharding_rules.qwen3 import BOUNDARIES, DATA, DENSE, MLP, SEQ, ZT
from sharding_rules.rules import P, Rules, optional, zero

EXPERTS = (
    (r"params/layers/\w+/moe/router", P(None, ZT)),
    (r"params/layers/\w+/moe/gate_up", P("ep", None, None, zero("fsdp", "cp", "tp"))),
    (r"params/layers/\w+/moe/down", P("ep", zero("fsdp", "cp", "tp"), None)),
    (r"act/tokens", P(DATA, SEQ, None)),
)

SOME_DENSE = tuple((optional(pattern), spec) for pattern, spec in MLP)

RULES = Rules((*DENSE, *SOME_DENSE, *EXPERTS, *BOUNDARIES))
