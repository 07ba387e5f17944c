"""The README's Python blocks run, its files exist, and its flags are real."""

import re
from pathlib import Path

import torch

from experiments.qwen3_moe_sft import Options
from functional_trainer import config

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text()


def test_python_blocks_run_and_the_loss_trains():
    scope: dict = {}
    for block in re.findall(r"```python\n(.*?)```", TEXT, re.S):
        exec(compile(block, "README.md", "exec"), scope)
    tokens = torch.randint(0, 384, (2, 17), generator=torch.Generator().manual_seed(0))
    columns = {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "segment_ids": torch.ones(2, 16, dtype=torch.long)}
    batch = columns | {"positions": torch.arange(16).expand(2, -1), "weights": torch.ones(2, 16)}
    losses = [float(scope["step"](scope["state"], batch)[1]["loss"]) for _ in range(15)]
    assert losses[-1] < losses[0] / 2


def test_linked_files_exist():
    for link in re.findall(r"\]\(([^)h][^)]*)\)", TEXT):
        assert (ROOT / link).exists(), link


def test_commands_are_accepted_by_the_recipe():
    blocks = "\n".join(re.findall(r"```bash\n(.*?)```", TEXT, re.S)).replace("\\\n", " ")
    commands = re.findall(r"experiments/qwen3_moe_sft\.py (.*)", blocks)
    parsed = [c for c in commands if "--help" not in c]
    assert len(parsed) >= 2
    for command in parsed:
        config.cli(Options, doc="", argv=command.split())


def test_every_make_target_named_exists():
    makefile = (ROOT / "Makefile").read_text()
    for target in set(re.findall(r"make ([a-z][a-z-]+)", TEXT)):
        assert re.search(rf"^{target}:", makefile, re.M), target
