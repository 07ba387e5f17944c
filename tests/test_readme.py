"""The README's Python blocks run; the files it and docs/ link to exist, and their commands' flags are real."""

import re
import shlex
from pathlib import Path

import torch

from experiments.qwen3_moe_sft import Options
from functional_trainer import config

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text()
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


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
    for page in PAGES:
        for link in re.findall(r"\]\(([^)h][^)]*)\)", page.read_text()):
            assert (page.parent / link).exists(), (page.name, link)


def test_commands_are_accepted_by_the_recipe():
    seen = set()
    for page in PAGES:
        blocks = "\n".join(re.findall(r"```bash\n(.*?)```", page.read_text(), re.S)).replace("\\\n", " ")
        for command in re.findall(r"experiments/qwen3_moe_sft\.py (.*)", blocks):
            if "--help" not in command:
                config.cli(Options, doc="", argv=shlex.split(command))
                seen.add(page.name)
    assert {"README.md", "data.md", "optimizers.md"} <= seen


def test_every_make_target_named_exists():
    makefile = (ROOT / "Makefile").read_text()
    for target in set(re.findall(r"make ([a-z][a-z-]+)", TEXT)):
        assert re.search(rf"^{target}:", makefile, re.M), target
