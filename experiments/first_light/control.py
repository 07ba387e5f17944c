"""The control of a reward: each group's numbers, given to others of its answers. There is nothing to learn from them.

python experiments/qwen3_moe_grpo.py --reward.functions experiments/first_light/control.py:shuffled ...
"""

import random
import zlib
from collections.abc import Sequence
from itertools import groupby

from functional_trainer.rewards.shipped import Values, exact, text


def shuffled(prompts: Sequence, completions: Sequence, answer: Sequence, **columns) -> Values:
    """Return the rewards of `exact`, those of one question in another order, which the completions decide."""
    values = iter(exact(completions, answer))
    chance = random.Random(zlib.crc32("\n".join(map(text, completions)).encode()))
    found: Values = []
    for _, group in groupby(map(text, prompts)):
        own = [next(values) for _ in group]
        chance.shuffle(own)
        found += own
    return found
