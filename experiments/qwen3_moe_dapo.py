"""DAPO (https://arxiv.org/abs/2503.14476): qwen3_moe_grpo.py with other defaults.

Clipping from 0.2 below to 0.28 above, a mean over tokens, groups without spread drawn anew, a penalty over the last
fifth of the longest answer (the paper's 4,096 of 20,480 tokens), sixteen steps for each rollout of sixteen answers a
question, and no KL divergence.
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from the clone without installing

from experiments import qwen3_moe_grpo
from functional_trainer import config
from functional_trainer.rl_options import PolicyOptions, RolloutOptions


@dataclass(frozen=True)
class Options(qwen3_moe_grpo.Options):
    rollout: RolloutOptions = field(
        default_factory=lambda: RolloutOptions(
            max_completion_length=40, overlong_buffer=8, filter_groups=True, steps_per_generation=16
        )
    )
    loss: PolicyOptions = field(default_factory=lambda: PolicyOptions(loss_type="dapo", old="trainer"))
    out: str = "runs/qwen3_moe_dapo"


main = qwen3_moe_grpo.main

if __name__ == "__main__":
    config.run(main, Options, doc=__doc__)
