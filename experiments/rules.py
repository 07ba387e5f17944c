"""Which sharding table places which model family."""

from sharding_rules import Rules, qwen3, qwen3_moe

RULES: dict[str, Rules] = {"qwen3": qwen3.RULES, "qwen3_moe": qwen3_moe.RULES}
