"""Chats and texts to batches of packed rows: tokenizer and loss mask, packing, resumable loading."""

from functional_trainer.data.chat import Tokenizer
from functional_trainer.data.loader import Loader
from functional_trainer.data.packing import STRATEGIES, Documents, Overlong
from functional_trainer.data.records import Record, datasets, read, records, rows_of, within

__all__ = [
    "STRATEGIES",
    "Documents",
    "Loader",
    "Overlong",
    "Record",
    "Tokenizer",
    "datasets",
    "read",
    "records",
    "rows_of",
    "within",
]
