"""Where every tensor lives: `Rules` (a table of regexes), which `sharder.Sharder` puts on a mesh."""

from sharding_rules.rules import P, Rules, optional, padded, repeat, zero

__all__ = ["P", "Rules", "optional", "padded", "repeat", "zero"]
