"""Folders of a model and its tokenizer with broken JSON, weights' headers included, and wrong files: what they hold, or
one message that names a file; and never more memory than the files are worth. test_models.py breaks single parts.
"""

import json
import resource
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import strategies as st

import models
from functional_trainer import hf, tree
from functional_trainer.data.chat import Tokenizer
from tests.fuzz.broken import Refused, apply, change, tried, twice
from tests.models import small

SHIPPED = Path(__file__).parents[2] / "experiments" / "first_light" / "tokenizer"
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16}
YARN |= {"beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0, "attention_factor": 1.0}
COMMON = {"rms_norm_eps": 1e-6, "attention_bias": False, "sliding_window": 8, "use_sliding_window": True}
COMMON |= {"hidden_act": "silu", "attention_dropout": 0.0, "max_window_layers": 1, "rope_scaling": YARN}
CONFIGS = [
    small.MOE | COMMON | {"decoder_sparse_step": 1},
    small.DENSE | COMMON | {"layer_types": ["full_attention"] * 2},
]
UNUSED = {"max_position_embeddings", "max_window_layers", "sliding_window", "decoder_sparse_step"}  # for any tensor


def folder_of(config: dict[str, Any]) -> dict[str, bytes]:
    """Return the files of a folder with a model in two shards and the shipped tokenizer."""
    model = models.from_config(config)
    params = model.init(0)
    size = 4 * models.count(model)
    with tempfile.TemporaryDirectory() as path:
        hf.save(params, model.specs, model.names[0], path, config, max_shard_bytes=0.6 * size)
        return {file.name: file.read_bytes() for at in (Path(path), SHIPPED) for file in at.iterdir()}


FOLDERS = [folder_of(config) for config in CONFIGS]
NAMES = sorted(FOLDERS[0])
names, which = st.sampled_from(NAMES), st.sampled_from([0, 1])


@pytest.fixture(autouse=True, scope="module")
def little_memory():
    """Refuse memory to whoever asks for 2 GB more than there is now."""
    before, most = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 2 * 10**9, most))
    yield
    resource.setrlimit(resource.RLIMIT_AS, (before, most))


def opened(number: int, break_it: Callable[[Path], None]) -> tuple[Any, Any]:
    """Write a folder, break it, load it; assert that what is loaded can be used."""
    with tempfile.TemporaryDirectory() as path:
        folder = Path(path)
        for name, content in FOLDERS[number].items():
            (folder / name).write_bytes(content)
        break_it(folder)
        loaded = tried(lambda: models.from_pretrained(folder), path, "config.json")
        tokenizer = tried(lambda: Tokenizer(folder), path)
        if not isinstance(tokenizer, Refused):
            ids = tried(lambda: (tokenizer.vocab_size, tokenizer.eos_ids, tokenizer.pad_id), path)
            assert isinstance(ids, Refused) or all(0 <= i < ids[0] for i in ids[1]) and 0 <= ids[2] < ids[0]
    if not isinstance(loaded, Refused):
        model, params = loaded
        shapes = {path: tuple(tensor.shape) for path, tensor in tree.flatten(params).items()}
        assert shapes == {path: p.shape for path, p in tree.flatten(model.specs).items()}
        assert models.logits(model, params, torch.tensor([[1, 2, 0]])).shape == (1, 3, model.config.vocab)
    return loaded, tokenizer


def test_a_whole_folder_is_loaded():
    for number in (0, 1):
        assert not any(isinstance(found, Refused) for found in opened(number, lambda folder: None))


def json_broken(number: int, name: str, changes: list) -> None:
    """Change the values of a JSON file, or of the JSON header of a safetensors file."""
    content, rest = FOLDERS[number][name], b""
    if name.endswith(".safetensors"):
        length = 8 + int.from_bytes(content[:8], "little")
        content, rest = content[8:length], content[length:]
    value, _ = apply(json.loads(content), changes)
    new = json.dumps(value).encode()
    new = len(new).to_bytes(8, "little") + new + rest if rest else new
    opened(number, lambda folder: (folder / name).write_bytes(new))


def files_broken(number: int, name: str, how: str, other: str) -> None:
    def break_it(folder: Path) -> None:
        if how == "swap":
            (folder / name).write_bytes(FOLDERS[number][other])
            return
        (folder / name).unlink()
        if how == "folder":
            (folder / name).mkdir()
        elif how == "link":
            (folder / name).symlink_to(name)

    loaded, tokenizer = opened(number, break_it)
    if how != "swap" or name != other:
        assert isinstance(loaded, Refused) == (name == "config.json" or "safetensors" in name)
        assert isinstance(tokenizer, Refused) or name != "tokenizer.json"


some = st.lists(change, min_size=1, max_size=3)
how = st.sampled_from(["gone", "folder", "link", "swap"])
test_json_quickly, test_json = twice(json_broken, 200, which, names, some)
test_files_quickly, test_files = twice(files_broken, 100, which, names, how, names)


@pytest.mark.parametrize("huge", [10**6, 10**9, 2**31 - 1, 10**30])
@pytest.mark.parametrize("number", [0, 1])
def test_no_size_is_believed_before_it_is_compared_with_the_files(number, huge):
    sizes = [key for key, value in CONFIGS[number].items() if type(value) is int and key not in UNUSED]
    for key in sizes:
        changed = CONFIGS[number] | {key: huge}
        loaded, _ = opened(number, lambda folder, c=changed: (folder / "config.json").write_text(json.dumps(c)))
        assert isinstance(loaded, Refused), key
