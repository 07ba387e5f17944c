"""Broken checkpoints of runs: the state as it was saved, or one message that names the file.

Neither DCP nor safetensors has a checksum of tensor data: a bit that flips there cannot be seen, and is let pass here.
"""

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import strategies as st

from functional_trainer import checkpoint
from functional_trainer.data import Loader
from functional_trainer.data.packing import Documents
from tests.fuzz.broken import Damage, Refused, apply, change, damage, tried, twice

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
FILES = [".metadata", "__0_0.distcp", "extra.json"]


def state() -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    shapes = {"params/embed": (7, 5), "params/layers/0/q": (3, 2, 5), "moments/embed/mu": (7, 5), "step": ()}
    return {path: torch.randn(shape, generator=draw) for path, shape in shapes.items()}


def loader() -> Loader:
    draw = np.random.default_rng(0)
    pairs = [(draw.integers(0, 9, n).tolist(), [True] * n) for n in (4, 7, 3, 9, 5)]
    return Loader(Documents.of(pairs), rows=2, seq_len=8)


def extra() -> dict[str, Any]:
    batches = loader()
    next(batches)
    made = {"loader": batches.state(), "step": 1, "eval_loss": 0.5}
    batches.close()
    return made


EXTRA = extra()


def resumed(break_it) -> dict[str, torch.Tensor] | Refused:
    """Save, break and load a checkpoint; what is loaded has the shapes that were saved, and a batch follows."""
    with tempfile.TemporaryDirectory() as folder:
        path = checkpoint.save_best(folder, state(), EXTRA)
        break_it(path)
        like = {name: torch.zeros_like(tensor) for name, tensor in state().items()}
        found = tried(lambda: checkpoint.load(path, like), str(path))
        if isinstance(found, Refused):
            return found
        batches = loader()
        place = tried(lambda: batches.restore(found[1].get("loader")), "cannot resume the data stream")
        if not isinstance(place, Refused):
            batch = next(batches, None)
            assert batch is None or batch["tokens"].shape == (2, 8)
        batches.close()
        tried(lambda: checkpoint.best_loss(folder), str(path))
        return found[0] if not isinstance(place, Refused) else place


def bytes_broken(name: str, damages: list[Damage]) -> None:
    def break_it(path: Path) -> None:
        content = (path / name).read_bytes()
        for one in damages:
            content = one(content)
        (path / name).write_bytes(content)

    found = resumed(break_it)
    if isinstance(found, dict) and name != "__0_0.distcp":  # its tensors have no checksum
        assert all(torch.equal(found[path], tensor) for path, tensor in state().items())


def files_broken(name: str, how: str, other: str) -> None:
    def break_it(path: Path) -> None:
        if how == "more":
            (path / f"more-{name}").write_bytes(b"x")
        elif how == "swap":
            shutil.copy(path / other, path / name) if name != other else None
        else:
            (path / name).unlink()
            (path / name).mkdir() if how == "folder" else (path / name).symlink_to("loop") if how == "link" else None

    found = resumed(break_it)
    whole = how == "more" or how == "swap" and name == other
    assert isinstance(found, dict) == whole


def extra_broken(changes: list) -> None:
    value, _ = apply(EXTRA, changes)
    found = resumed(lambda path: (path / "extra.json").write_text(json.dumps(value)))
    if isinstance(found, dict):
        assert all(torch.equal(found[path], tensor) for path, tensor in state().items())


names = st.sampled_from(FILES)
how = st.sampled_from(["gone", "folder", "link", "swap", "more"])
test_bytes_quickly, test_bytes = twice(bytes_broken, 200, names, st.lists(damage, min_size=1, max_size=2))
test_files_quickly, test_files = twice(files_broken, 40, names, how, names)
test_extra_quickly, test_extra = twice(extra_broken, 100, st.lists(change, min_size=1, max_size=3))
