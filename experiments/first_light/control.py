"""The control of a reward: the same numbers, given to other answers. What is learned from them is not the task.

python experiments/qwen3_moe_grpo.py --reward.functions experiments/first_light/control.py:shuffled ...
"""

import random
import zlib
from collections.abc import Sequence

from functional_trainer.rewards.shipped import Values, exact, text


def shuffled(completions: Sequence, answer: Sequence, **columns) -> Values:
    """Return the rewards of `exact` in another order, which the completions decide."""
    values = exact(completions, answer)
    random.Random(zlib.crc32("\n".join(map(text, completions)).encode())).shuffle(values)
    return values
