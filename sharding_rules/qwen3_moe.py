"""Placements of Qwen3-MoE. Axes: fsdp (data; stores parameters), ep (data outside the experts, experts inside)."""

from sharding_rules.qwen3 import BOUNDARIES, DATA, DENSE, MLP, Z
from sharding_rules.rules import P, Rules, optional, zero

EXPERTS = (
    (r"params/layers/\w+/moe/router", P(None, Z)),
    (r"params/layers/\w+/moe/gate_up", P("ep", None, None, zero("fsdp"))),
    (r"params/layers/\w+/moe/down", P("ep", zero("fsdp"), None)),
    (r"act/tokens", P(DATA, None, None)),
    (r"act/token_rows", P(DATA, None)),
)

SOME_DENSE = tuple((optional(pattern), spec) for pattern, spec in MLP)

RULES = Rules((*DENSE, *SOME_DENSE, *EXPERTS, *BOUNDARIES))
