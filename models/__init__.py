"""Models as pure functions: `from_pretrained`, `from_config`, `save_pretrained`, `logits`, `generate`.

One file per family; `FAMILIES` is where a new one is listed.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from functional_trainer import hf, param
from functional_trainer.engines.local import generate
from functional_trainer.tree import Tree
from functional_trainer.types import ONE_DEVICE
from models import qwen3, qwen3_moe
from models.model import Model

__all__ = [
    "FAMILIES", "PRESETS", "Model", "count", "from_config", "from_pretrained", "generate", "logits",
    "preset", "read_config", "save_pretrained",
]  # fmt: skip

FAMILIES = {"qwen3": qwen3, "qwen3_moe": qwen3_moe}
"""Hugging Face `model_type` to the module that implements it."""

PRESETS: dict[str, dict] = {**qwen3_moe.PRESETS, **{f"dense-{k}": v for k, v in qwen3.PRESETS.items()}}
"""Config dicts by the names that `--model.preset` takes."""


def read_config(path: str | Path) -> dict[str, Any]:
    """Return the config.json of a Hugging Face folder."""
    return hf.read_config(path)


def preset(name: str, tokenizer: Any) -> dict[str, Any]:
    """Return a preset's config dict with the special tokens of a tokenizer (`eos_ids`, `pad_id`)."""
    if name not in PRESETS:
        raise ValueError(f"--model.preset {name!r} is not one of {', '.join(PRESETS)}")
    eos = tokenizer.eos_ids
    return PRESETS[name] | {"eos_token_id": eos[0] if len(eos) == 1 else eos, "pad_token_id": tokenizer.pad_id}


def count(model: Model) -> int:
    """Return the number of parameters."""
    return param.count(model.specs)


def from_config(config: dict[str, Any] | str | Path) -> Model:
    """Build a model from a Hugging Face config dict, or from the config.json of a folder; no tensors are made."""
    config = config if isinstance(config, dict) else hf.read_config(config)
    family = config.get("model_type")
    if not isinstance(family, str) or family not in FAMILIES:
        these = ", ".join(FAMILIES)
        raise ValueError(f"config.json: model_type {repr(family)[:80]} is not implemented; these are: {these}")
    return FAMILIES[family].from_config(config)


def from_pretrained(
    path: str | Path, dtype: torch.dtype | None = None, device: Any = None, shard=ONE_DEVICE
) -> tuple[Model, Tree]:
    """Load a Hugging Face folder: the model and its parameters, in `dtype` (None: as stored) and placed by `shard`.

    Missing, extra and mis-shaped tensors raise one ValueError that counts them and lists the first.
    """
    model = from_config(path)
    params, used = hf.load(path, model.specs, model.names, dtype=dtype, device=device, shard=shard)
    return _replace_names(model, used), params


def save_pretrained(model: Model, params: Tree, path: str | Path, shard=ONE_DEVICE) -> None:
    """Write config.json and safetensors that transformers loads without code of ours."""
    hf.save(params, model.specs, model.names[0], path, model.config.hf, shard=shard)


def logits(model: Model, params: Tree, tokens_BS: torch.Tensor, **columns: torch.Tensor) -> torch.Tensor:
    """Return logits (B, S, V) in at least float32, for inspection and tests; losses never hold them.

    `columns` may give segment_ids, positions and what else a batch has; by default a row is one document.
    """
    positions = torch.arange(tokens_BS.shape[1], device=tokens_BS.device).expand_as(tokens_BS)
    batch = {"tokens": tokens_BS, "segment_ids": torch.ones_like(tokens_BS), "positions": positions, **columns}
    return model.unembed(params).logits(model.apply(params, batch).hidden)


def _replace_names(model: Model, first) -> Model:
    """Write checkpoints in the layout that was read."""
    return replace(model, names=(first, *(n for n in model.names if n is not first)))
