"""Broken Hugging Face folders: the model that the files hold, or one message that names the folder or the key.

safetensors has no checksum: a bit that flips in the numbers cannot be seen, and is let pass here.
"""

import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import models
from experiments.first_light.tasks import make
from functional_trainer import hf, tree
from functional_trainer.data import Tokenizer
from tests.fuzz.broken import ROOT, Damage, Refused, apply, change, damage, tried, twice
from tests.models import small

TOKENIZER = ROOT / "experiments" / "first_light" / "tokenizer"
CHAT = make(1, 0, 0)[0][0]["messages"]
MORE = {"rms_norm_eps": 1e-6, "rope_theta": 10000.0, "hidden_act": "silu", "router_aux_loss_coef": 1e-3}
CONFIGS: dict[str, dict[str, Any]] = {
    "moe": small.MOE | MORE,
    "dense": small.DENSE | {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}}
    | {"layer_types": ["full_attention", "sliding_attention"], "use_sliding_window": True, "sliding_window": 3},
}  # fmt: skip


def written(kind: str, folder: Path, shard_bytes: float = 5e9) -> Path:
    """Write a small model of one of `CONFIGS`."""
    model = models.from_config(CONFIGS[kind])
    hf.save(model.init(0), model.specs, model.names[0], folder, CONFIGS[kind], max_shard_bytes=shard_bytes)
    return folder


def loaded(folder: Path, *names: str) -> bool:
    """Read a folder and run it; return whether that was refused in clear words."""
    found = tried(lambda: models.from_pretrained(folder, dtype=torch.float32), str(folder), "config.json", *names)
    if isinstance(found, Refused):
        return True
    model, params = found
    files = {k: v for file in folder.glob("*.safetensors") for k, v in load_file(file).items()}
    slots = next(s for s in (hf.expand(model.specs, names) for names in model.names) if s.keys() <= files.keys())
    flat = tree.flatten(params)
    for name, slot in slots.items():
        ours = flat[slot.path][slot.index].reshape(slot.shape)
        assert torch.equal(ours.nan_to_num(7), files[name].float().nan_to_num(7)), name
    out = models.logits(model, params, torch.tensor([[1, 2, 0, 3]]))
    assert out.shape == (1, 4, model.config.vocab)
    assert out.isfinite().all() or not all(bool(x.abs().max() < 1e3) for x in flat.values())
    return False


def config_broken(kind: str, changes: list) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = written(kind, Path(name) / "model")
        value, paths = apply(CONFIGS[kind], changes)
        (folder / "config.json").write_text(json.dumps(value))
        if loaded(folder, "model_type"):  # perhaps it is a model of another size
            model = tried(lambda: models.from_config(value), "config.json", "model_type")
            if not isinstance(model, Refused) and models.count(model) < 1_000_000:
                out = models.logits(model, model.init(0), torch.tensor([[1, 2, 0, 3]]) % model.config.vocab)
                assert out.isfinite().all()


def bytes_broken(kind: str, which: int, damages: list[Damage]) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = written(kind, Path(name) / "model", 2000)
        files = sorted(folder.iterdir())
        file = files[which % len(files)]
        content = file.read_bytes()
        for one in damages:
            content = one(content)
        file.write_bytes(content)
        loaded(folder, "model_type")


def tensors_broken(kind: str, at: float, how: str, size: int) -> None:
    """What a wrong tensor is, and where, is said; nothing but a change of type is accepted."""
    with tempfile.TemporaryDirectory() as name:
        folder = written(kind, Path(name) / "model")
        tensors = load_file(folder / "model.safetensors")
        key = sorted(tensors)[int(at * len(tensors))]
        old = tensors.pop(key)
        made = HOW[how](key, old, size)
        save_file(tensors | made, folder / "model.safetensors")
        square = how == "turned" and old.ndim > 1 and len(set(old.shape)) == 1
        assert loaded(folder, key) == (how not in ("half", "double") and not square)


HOW: dict[str, Callable[[str, torch.Tensor, int], dict[str, torch.Tensor]]] = {
    "gone": lambda key, x, n: {},
    "renamed": lambda key, x, n: {f"{key}.x": x},
    "twice": lambda key, x, n: {key: x, f"{key}.x": x.clone()},
    "longer": lambda key, x, n: {key: torch.cat([x, x[:n]])},
    "flat": lambda key, x, n: {key: x.reshape(-1, 1)},
    "scalar": lambda key, x, n: {key: torch.tensor(1.0)},
    "none": lambda key, x, n: {key: x[:0]},
    "turned": lambda key, x, n: {key: x.T.contiguous() if x.ndim > 1 else x[:-1]},
    "int": lambda key, x, n: {key: x.to(torch.int32)},
    "bool": lambda key, x, n: {key: x > 0},
    "complex": lambda key, x, n: {key: x.to(torch.complex64)},
    "half": lambda key, x, n: {key: x.half()},
    "double": lambda key, x, n: {key: x.double()},
}


def tokenizer_broken(name: str, how: str, damages: list[Damage], changes: list) -> None:
    """A tokenizer that is accepted encodes a chat, with ids that it has, and of a mask that is not empty."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(shutil.copytree(TOKENIZER, Path(place) / "tokenizer"))
        if how == "bytes":
            content = (folder / name).read_bytes()
            for one in damages:
                content = one(content)
            (folder / name).write_bytes(content)
        else:
            value, _ = apply(json.loads((folder / name).read_text()), changes)
            (folder / name).write_text(json.dumps(value))

        def encode() -> tuple:
            tokenizer = Tokenizer(folder)
            ids, mask = tokenizer.encode_chat(CHAT)
            return tokenizer.vocab_size, ids, mask, tokenizer.eos_ids, tokenizer.pad_id

        found = tried(encode, str(folder), "chat template")
        if not isinstance(found, Refused):
            vocab, ids, mask, ends, pad = found
            assert len(ids) == len(mask) and all(0 <= i < vocab for i in [*ids, *ends, pad])


kinds = st.sampled_from(list(CONFIGS))
words = st.sampled_from([p.name for p in TOKENIZER.glob("*.json")])
some_damage, some_changes = st.lists(damage, min_size=1, max_size=2), st.lists(change, min_size=1, max_size=2)
test_configs_quickly, test_configs = twice(config_broken, 250, kinds, some_changes)
test_bytes_quickly, test_bytes = twice(bytes_broken, 100, kinds, st.integers(0, 99), some_damage)
test_tensors_quickly, test_tensors = twice(
    tensors_broken, 100, kinds, st.floats(0, 1, exclude_max=True), st.sampled_from(list(HOW)), st.integers(1, 3)
)
test_tokenizers_quickly, test_tokenizers = twice(
    tokenizer_broken, 120, words, st.sampled_from(["bytes", "value"]), some_damage, some_changes
)
