"""Dr.GRPO (https://arxiv.org/abs/2503.20783): qwen3_moe_grpo.py with other defaults.

Advantages are not divided by a deviation, losses of answers are added and divided by a constant length, and there is no
KL divergence.
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from the clone without installing

from experiments import qwen3_moe_grpo
from functional_trainer import config
from functional_trainer.rl_options import PolicyOptions


@dataclass(frozen=True)
class Options(qwen3_moe_grpo.Options):
    loss: PolicyOptions = field(default_factory=lambda: PolicyOptions(loss_type="dr_grpo", scale_rewards="none"))
    out: str = "runs/qwen3_moe_dr_grpo"


main = qwen3_moe_grpo.main

if __name__ == "__main__":
    config.run(main, Options, doc=__doc__)
