"""Training as pure functions: `make_train_step`, `train`, `init_state`, `losses`, `optimizers`.

Names load on first use, so that importing options or printing `--help` does not import torch.
"""

from importlib import import_module
from typing import Any

_HOMES = {"make_train_step": "step", "init_state": "state", "TrainState": "state", "train": "loop"}

__all__ = ["TrainState", "init_state", "losses", "make_train_step", "optimizers", "train"]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"functional_trainer.{_HOMES[name]}"), name)
    if name in ("losses", "optimizers"):
        return import_module(f"functional_trainer.{name}")
    raise AttributeError(f"module 'functional_trainer' has no attribute {name!r}")
