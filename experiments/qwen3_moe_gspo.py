"""GSPO (https://arxiv.org/abs/2507.18071): qwen3_moe_grpo.py with other defaults.

Ratios of whole answers, clipped from 3e-4 below to 4e-4 above, and four steps for each rollout.
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
    rollout: RolloutOptions = field(default_factory=lambda: RolloutOptions(steps_per_generation=4))
    loss: PolicyOptions = field(default_factory=lambda: PolicyOptions(loss_type="gspo", old="trainer"))
    out: str = "runs/qwen3_moe_gspo"


main = qwen3_moe_grpo.main

if __name__ == "__main__":
    config.run(main, Options, doc=__doc__)
