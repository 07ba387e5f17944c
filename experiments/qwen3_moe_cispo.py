"""CISPO (MiniMax-M1, https://arxiv.org/abs/2506.13585): qwen3_moe_grpo.py with other defaults.

Log-probabilities weighed by ratios that are clipped above only, a mean over tokens, sixteen steps for each rollout, no
KL divergence, and DAPO's dynamic sampling.
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
    rollout: RolloutOptions = field(default_factory=lambda: RolloutOptions(filter_groups=True, steps_per_generation=16))
    loss: PolicyOptions = field(default_factory=lambda: PolicyOptions(loss_type="cispo", old="trainer"))
    out: str = "runs/qwen3_moe_cispo"


main = qwen3_moe_grpo.main

if __name__ == "__main__":
    config.run(main, Options, doc=__doc__)
