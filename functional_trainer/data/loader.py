"""Endless or counted batches of packed rows, the same global stream on every rank, resumable bit for bit.

The stream is the pieces, each epoch sorted by fresh raw bits of PCG64, which NumPy promises never to change. Any index
of it can be asked for, so the loader's whole state is the packer's cursor and a few counters. (Grain's index shuffle,
measured: 20 us an index of 20,000, and 90 ms an epoch however few there are.)
"""

import math
import zlib
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch

from functional_trainer.data.packing import STRATEGIES, Cursor, Documents, Overlong, cut, fill, plan

Batch = dict[str, torch.Tensor]


def permutation(count: int, seed: int, epoch: int, shuffle: bool) -> np.ndarray:
    """Return the order of an epoch's `count` slots."""
    if not shuffle:
        return np.arange(count)
    return np.argsort(np.random.PCG64([seed, epoch]).random_raw(count), kind="stable")


def order(count: int, seed: int, shuffle: bool) -> Callable[[int], int]:
    """Give the map from stream index to piece: each run of `count` indices, an epoch, is a permutation of its own."""
    at = lru_cache(maxsize=2)(lambda epoch: permutation(count, seed, epoch, shuffle))  # held pieces: the epoch before
    return lambda index: int(at(index // count)[index % count])


def mixed(sizes: Sequence[int], weights: Sequence[float], seed: int, shuffle: bool) -> tuple[int, Callable[[int], int]]:
    """Give the length of an epoch over sources of `sizes` pieces, end to end, and the map from stream index to piece.

    An epoch takes round(weight * size) pieces of each source, at least one, in the order of the source's own stream, in
    which every piece comes once before any comes again. Shuffling decides whose turn it is.
    """
    take = [max(1, round(weight * size)) for size, weight in zip(sizes, weights, strict=True)]
    firsts, count = np.cumsum([0, *sizes]).tolist(), sum(take)
    streams = [order(size, zlib.crc32(f"{seed}:{i}".encode()), shuffle) for i, size in enumerate(sizes)]

    @lru_cache(maxsize=2)
    def turns(epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Return whose turn each slot of an epoch is, and which of that source's turns."""
        whose = np.repeat(np.arange(len(take)), take)[permutation(count, seed, epoch, shuffle)]
        number = np.empty(count, np.int64)
        number[np.argsort(whose, kind="stable")] = np.concatenate([np.arange(n) for n in take])
        return whose, number

    def piece(index: int) -> int:
        epoch, slot = divmod(index, count)
        source, number = (int(column[slot]) for column in turns(epoch))
        return firsts[source] + streams[source](epoch * take[source] + number)

    return count, piece


class Loader:
    """Iterate over batches of columns (rows / world, seq_len): tokens, targets, segment_ids, positions, weights.

    `rows` counts all ranks; rank r gets rows [r, r + 1) * rows / world of each global batch. `epochs=None` never ends;
    otherwise every piece comes exactly `epochs` times and empty rows fill the last batch. An exhausted loader stays so
    until `reset` or `restore`. With `sources`, (documents, weight) of each, end to end, an epoch sees each source
    `weight` times. Raises ValueError.
    """

    def __init__(
        self,
        documents: Documents,
        *,
        rows: int,
        seq_len: int,
        packing: str = "first_fit",
        seed: int = 0,
        epochs: int | None = None,
        rank: int = 0,
        world: int = 1,
        shuffle: bool = True,
        overlong: Overlong = "split",
        sources: Sequence[tuple[int, float]] = (),
    ):
        _check(rows, seq_len, packing, seed, epochs, rank, world)
        self.documents, self.rows, self.seq_len, self.epochs = documents, rows, seq_len, epochs
        self.fit = STRATEGIES[packing]
        self.mine = slice(rank * rows // world, (rank + 1) * rows // world)
        self.pieces = cut(documents, seq_len, overlong)
        self.count = len(self.pieces.length)
        if not self.count:
            raise ValueError(f"no document is left to train on ({self.pieces.stats}); raise seq_len or change overlong")
        if sources:
            self.count, self.order = mixed(*self._mix(sources), seed, shuffle)
        else:
            self.order = order(self.count, seed, shuffle)
        content = 0
        for column in (documents.tokens, documents.mask, documents.offsets):
            content = zlib.crc32(np.ascontiguousarray(column).data, content)
        self.identity = {"rows": rows, "seq_len": seq_len, "packing": packing, "seed": seed, "shuffle": shuffle}
        self.identity |= {"overlong": overlong, "content": f"{len(documents)} documents, crc {content:08x}"}
        self.identity |= {"sources": [list(source) for source in sources] or None}
        self.reset()

    def _mix(self, sources: Sequence[tuple[int, float]]) -> tuple[list[int], list[float]]:
        """Count the pieces of each source; ValueError for one that has none or is not weighed."""
        counts, weights = [n for n, _ in sources], [weight for _, weight in sources]
        if sum(counts) != len(self.documents):
            raise ValueError(f"the sources have {sum(counts)} documents, the data {len(self.documents)}")
        document = np.searchsorted(self.documents.offsets, self.pieces.begin, side="right") - 1
        sizes = np.diff(np.searchsorted(document, np.cumsum([0, *counts]))).tolist()
        for i, (size, weight) in enumerate(zip(sizes, weights, strict=True)):
            if not 0 < weight < math.inf or not size:
                what = f"weight {weight}, it must be above 0" if size else "no document that is left to train on"
                raise ValueError(f"source {i + 1} of {len(sources)} has {what}")
        return sizes, weights

    def reset(self) -> None:
        """Go back to the first batch of the first epoch."""
        self.cursor = Cursor()
        self.seen = {"batches": 0, "seen_pieces": 0, "seen_tokens": 0, "seen_trained_tokens": 0}

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        table, self.cursor = self._plan(self.cursor, self.epochs)
        if not any(table):
            raise StopIteration
        table = [[self.order(index) for index in row] for row in table]
        flat = [piece for row in table for piece in row]
        self.seen["batches"] += 1
        self.seen["seen_pieces"] += len(flat)
        self.seen["seen_tokens"] += int(self.pieces.length[flat].sum())
        self.seen["seen_trained_tokens"] += int(self.pieces.trained[flat].sum())
        batch = fill(self.documents, self.pieces, table[self.mine], self.seq_len)
        return {name: torch.from_numpy(column) for name, column in batch.items()}

    def state(self) -> dict[str, Any]:
        """Return what `restore` needs to go on after the last batch taken, JSON-able and equal on all ranks."""
        return {"next": self.cursor.next, "held": list(self.cursor.held), "seen": dict(self.seen), **self.identity}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on after the batch at which `state` was taken; ValueError if data or settings are not the same."""
        odd = [f"{k} was {state.get(k)!r}, is {v!r}" for k, v in self.identity.items() if state.get(k) != v]
        if odd:
            raise ValueError(f"cannot resume the data stream: {'; '.join(odd)}. Use the run's settings or start anew")
        self.cursor, self.seen = Cursor(state["next"], tuple(state["held"])), dict(state["seen"])

    @property
    def stats(self) -> dict[str, int | float]:
        """Count what the data holds (documents, cut ones by kind, pieces, tokens), what was seen, and padding in it."""
        places = self.seen["batches"] * self.rows * self.seq_len
        padding = 1 - self.seen["seen_tokens"] / places if places else 0.0
        return {**self.pieces.stats, **self.seen, "padding": padding}

    def steps_per_epoch(self) -> int:
        """Count the batches of a single epoch by packing it (lengths only, about 20 us a piece)."""
        return self._steps(1)

    def total_steps(self) -> int:
        """Count the batches of all `epochs`; ValueError if endless."""
        if self.epochs is None:
            raise ValueError("an endless loader (epochs=None) has no total number of steps")
        return self._steps(self.epochs)

    def _steps(self, epochs: int) -> int:
        steps, cursor = 0, Cursor()
        while cursor.held or cursor.next < epochs * self.count:
            cursor = self._plan(cursor, epochs)[1]
            steps += 1
        return steps

    def _plan(self, cursor: Cursor, epochs: int | None) -> tuple[list[list[int]], Cursor]:
        end = float("inf") if epochs is None else epochs * self.count
        lengths = self.pieces.length
        return plan(cursor, end, lambda i: int(lengths[self.order(i)]), self.rows, self.seq_len, self.fit)


def _check(rows: int, seq_len: int, packing: str, seed: int, epochs: int | None, rank: int, world: int) -> None:
    for name, value in (("rows", rows), ("seq_len", seq_len), ("world", world), ("epochs", epochs)):
        if value is not None and value < 1:
            raise ValueError(f"{name} is {value}; it must be at least 1")
    if packing not in STRATEGIES:
        raise ValueError(f"packing is {packing!r}; it can be one of {', '.join(STRATEGIES)}")
    if seed < 0:
        raise ValueError(f"seed is {seed}; it must not be negative")
    if not 0 <= rank < world:
        raise ValueError(f"rank is {rank}; with world {world} it must be from 0 to {world - 1}")
    if rows % world:
        raise ValueError(f"rows ({rows}) cannot be shared equally by {world} ranks; use a multiple of {world}")
