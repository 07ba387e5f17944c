"""Chats and texts to batches of packed rows: rows of files, tokens and loss mask, packing, resumable loading."""

from importlib import import_module
from typing import Any

from functional_trainer.data.cache import Rows, tokenized
from functional_trainer.data.chat import Tokenizer
from functional_trainer.data.order import Share
from functional_trainer.data.packing import STRATEGIES, Documents, Overlong
from functional_trainer.data.records import Record, Within, datasets, encoded, records, rows_of
from functional_trainer.data.shapes import Form

__all__ = [
    "STRATEGIES",
    "Documents",
    "Form",
    "Loader",
    "Overlong",
    "Record",
    "Rows",
    "Share",
    "Tokenizer",
    "Within",
    "datasets",
    "encoded",
    "records",
    "rows_of",
    "tokenized",
]


def __getattr__(name: str) -> Any:
    """Load `Loader` on first use: it imports torch, which a worker process does without."""
    if name == "Loader":
        return import_module("functional_trainer.data.loader").Loader
    raise AttributeError(f"module 'functional_trainer.data' has no attribute {name!r}")
