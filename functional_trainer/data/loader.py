"""Batches of packed rows as tensors, filled ahead of their use, resumable bit for bit."""

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from functional_trainer.data.packing import Cursor, Documents
from functional_trainer.data.stream import Stream

Batch = dict[str, torch.Tensor]


class Batches:
    """The batches of a stream from a cursor on, each with the cursor behind it and what it counts."""

    def __init__(self, stream: Stream, cursor: Cursor):
        self.stream, self.cursor = stream, cursor

    def __call__(self, part: int, parts: int) -> Iterator[tuple[dict[str, np.ndarray], dict[str, Any]]]:
        """Yield every `parts`-th batch, from number `part` on."""
        stream, cursor, number = self.stream, self.cursor, 0
        while True:
            table, cursor = stream.plan(cursor)
            flat = [piece for row in table for piece in row]
            if not flat:
                return
            if number % parts == part:
                columns = stream.columns(table)
                count = {"batches": 1, "seen_pieces": len(flat), "seen_tokens": stream.pieces.length[flat].sum()}
                count["seen_trained_tokens"] = stream.pieces.trained[flat].sum()
                count["seen_places"] = stream.rows * columns["tokens"].shape[1]
                counts = {name: np.int64(value) for name, value in count.items()}
                yield columns, {"next": cursor.next, "held": np.array(cursor.held, np.int64), **counts}
            number += 1


class Loader:
    """Iterate over batches of columns (rows / world, width): tokens, targets, segment_ids, positions, weights.

    `settings` are those of `Stream`. `workers` processes (0: a thread) fill batches ahead; neither they nor how many
    there are changes a batch. An exhausted loader stays so until `reset` or `restore`. Raises ValueError.
    """

    def __init__(self, documents: Documents, *, workers: int = 0, **settings: Any):
        self.stream, self.workers = Stream(documents, **settings), workers
        self.pieces = self.stream.pieces
        self.iterator: Any = None
        self.reset()

    def reset(self) -> None:
        """Go back to the first batch of the first epoch."""
        self.close()
        self.cursor = Cursor()
        names = ("batches", "seen_pieces", "seen_tokens", "seen_trained_tokens", "seen_places")
        self.seen = dict.fromkeys(names, 0)

    def close(self) -> None:
        """Stop working ahead; the next batch starts that again."""
        if self.iterator is not None:
            self.iterator.close()
        self.iterator = None

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        if self.iterator is None:
            from functional_trainer.data.pipeline import ahead

            self.iterator = ahead(Batches(self.stream, self.cursor), self.workers)
        try:
            columns, behind = next(self.iterator)
        except StopIteration:
            self.close()
            raise
        self.cursor = Cursor(int(behind["next"]), tuple(behind["held"].tolist()))
        self.seen = {name: count + int(behind[name]) for name, count in self.seen.items()}
        return {name: torch.from_numpy(column) for name, column in columns.items()}

    def state(self) -> dict[str, Any]:
        """Return what `restore` needs to go on after the last batch taken, JSON-able and equal on all ranks."""
        state = {"next": self.cursor.next, "held": list(self.cursor.held), "seen": dict(self.seen)}
        return state | self.identity

    @property
    def identity(self) -> dict[str, Any]:
        """What a resumed run must have in common."""
        return self.stream.identity

    def report(self) -> dict[str, Any]:
        """Return what a step's row of metrics says beside what the loop counts: nothing."""
        return {}

    def restore(self, state: Any) -> None:
        """Go on after the batch at which `state` was taken; ValueError if data or settings are not the same."""
        self._check(state)
        odd = [f"{k} was {state.get(k)!r}, is {v!r}" for k, v in self.identity.items() if state.get(k) != v]
        if odd:
            raise ValueError(f"cannot resume the data stream: {'; '.join(odd)}. Use the run's settings or start anew")
        self.close()
        self.cursor, self.seen = Cursor(state["next"], tuple(state["held"])), dict(state["seen"])

    def _check(self, state: Any) -> None:
        """Raise ValueError for what cannot have come from `state`."""
        try:
            counts = [state["next"], *state["held"], *state["seen"].values()]
            drawn = state["seen"]["seen_pieces"] + len(state["held"])
            whole = state["seen"].keys() == self.seen.keys() and state["next"] == drawn
            whole &= all(type(n) is int and n >= 0 for n in counts) and all(n < drawn for n in state["held"])
        except (TypeError, KeyError, AttributeError):
            whole = False
        if not whole:
            raise ValueError("cannot resume the data stream: its place in the checkpoint is damaged; take another one")

    @property
    def stats(self) -> dict[str, int | float]:
        """Count what the data holds (documents, cut ones by kind, pieces, tokens), what was seen, and padding in it."""
        places = self.seen["seen_places"]
        return {**self.pieces.stats, **self.seen, "padding": 1 - self.seen["seen_tokens"] / places if places else 0.0}

    def total_steps(self) -> int:
        """Count the batches of the whole stream; ValueError if endless."""
        steps = self.stream.steps()
        if math.isinf(steps):
            raise ValueError("an endless loader (epochs=None) has no total number of steps")
        return int(steps)
