"""Where every tensor lives: `Rules` (a table of regexes) and `Sharder` (a table on a mesh)."""

from sharding_rules.rules import P, Rules, optional, padded, repeat, zero
from sharding_rules.sharder import Sharder

__all__ = ["P", "Rules", "Sharder", "optional", "padded", "repeat", "zero"]
