"""The stream of packed batches that documents give, as pure functions: what is in a batch at a cursor, and its columns.

The same global stream on every rank. Imports no torch, so that worker processes start quickly.
"""

import math
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from functional_trainer.data.groups import Groups
from functional_trainer.data.order import Share, grouped, mixed
from functional_trainer.data.packing import STRATEGIES, Cursor, Documents, Overlong, cut, fill, plan

WIDTHS = (8, 4, 2, 1)  # of a row: without packing a batch is as wide as its longest document needs, of four widths


class Stream:
    """Batches of `rows` rows of `seq_len` places over all ranks; rank r gets rows [r, r + 1) * rows / world of each.

    `epochs=None` never ends; otherwise every piece comes exactly `epochs` times and empty rows fill the last batch.
    With `sources`, `Share`s of documents that lie end to end, an epoch sees each `weight` times, and the stream ends
    when the passes of all are used up. Packing "none" puts one document into a row and brings similar lengths together.
    Of documents in groups a group is one piece. `reference` is a file of a number for each token of the documents, that
    batches bring as ref_logprobs. Raises ValueError.
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
        sources: Sequence[Share] = (),
        reference: Path | None = None,
    ):
        _check(rows, seq_len, packing, seed, epochs, rank, world)
        self.settings: dict[str, Any] = {"rows": rows, "seq_len": seq_len, "packing": packing, "seed": seed}
        self.settings |= {"shuffle": shuffle, "overlong": overlong}
        self.rebuild: dict[str, Any] = {"epochs": epochs, "rank": rank, "world": world, "sources": sources}
        self.documents, self.rows, self.seq_len = documents, rows, seq_len
        self.widths = [-(-seq_len // part) for part in WIDTHS] if packing == "none" else [seq_len]
        self.fit = STRATEGIES[packing]
        self.mine = slice(rank * rows // world, (rank + 1) * rows // world)
        self.groups = None if documents.groups is None else Groups(documents, seq_len, overlong)
        self.pieces = self.groups.pieces if self.groups else cut(documents, seq_len, overlong)
        self.refer(reference)
        if not len(self.pieces.length):
            right = "raise seq_len (--data.seq-len) or change overlong (--data.overlong)"
            raise ValueError(f"no document is left to train on ({self.pieces.stats}); {right}")
        shares = self._shares(sources) if sources else [Share(len(self.pieces.length))]
        self.order = mixed(shares, seed, shuffle)
        self.end = self.order.end if epochs is None else min(self.order.begin(epochs), self.order.end)
        if packing == "none":
            self.order = grouped(self.order, self.end, lambda p: int(self.pieces.length[p]), rows, seed, shuffle)

    @property
    def identity(self) -> dict[str, Any]:
        """What a resumed stream must have in common, as JSON."""
        sources = [[s.size, s.weight, None if math.isinf(s.passes) else s.passes] for s in self.rebuild["sources"]]
        return self.settings | {"sources": sources or None, "content": self.documents.content}

    def __reduce__(self):
        return _stream, (self.documents, self.settings | self.rebuild)

    def refer(self, reference: Path | None) -> None:
        """Bring numbers of this file as ref_logprobs from the next batch on; None for none."""
        self.rebuild["reference"] = reference
        self.reference = None if reference is None else np.load(reference, mmap_mode="r")

    def _shares(self, sources: Sequence[Share]) -> list[Share]:
        """Turn shares of documents into shares of pieces; ValueError for one that has none or is not weighed."""
        starts = self.documents.starts
        if sum(share.size for share in sources) != len(starts) - 1:
            count = sum(share.size for share in sources)
            raise ValueError(f"the sources have {count} documents, the data {len(starts) - 1}")
        document = np.searchsorted(starts, self.pieces.begin, side="right") - 1
        borders = np.cumsum([0, *(share.size for share in sources)])
        sizes = np.diff(np.searchsorted(document, borders)).tolist()
        for i, (size, share) in enumerate(zip(sizes, sources, strict=True)):
            if not 0 < share.weight < math.inf or not share.passes > 0 or not size:
                what = f"weight {share.weight} and {share.passes} passes, they must be above 0"
                what = what if size else "no document that is left to train on"
                raise ValueError(f"source {i + 1} of {len(sources)} has {what}")
        return [share._replace(size=size) for share, size in zip(sources, sizes, strict=True)]

    def plan(self, cursor: Cursor) -> tuple[list[list[int]], Cursor]:
        """Return the pieces of each row of the batch at `cursor`, none behind the end, and the next cursor."""
        piece = lru_cache(maxsize=None)(self.order.piece)
        length = self.pieces.length
        table, cursor = plan(cursor, self.end, lambda i: int(length[piece(i)]), self.rows, self.seq_len, self.fit)
        return [[piece(index) for index in row] for row in table], cursor

    def steps(self) -> float:
        """Count the batches by packing lengths only, about 10 us a piece; infinite if the stream does not end."""
        steps, cursor = 0, Cursor()
        while self.end < math.inf and (cursor.held or cursor.next < self.end):
            cursor = self.plan(cursor)[1]
            steps += 1
        return steps if self.end < math.inf else math.inf

    def columns(self, table: list[list[int]]) -> dict[str, np.ndarray]:
        """Write this rank's rows of a batch, (rows / world, width)."""
        longest = max(sum(int(self.pieces.length[piece]) for piece in row) for row in table)
        width = next(width for width in self.widths if width >= longest)
        if self.groups is None:
            return fill(self.documents, self.pieces, table[self.mine], width)
        batch = self.groups.fill(table[self.mine], width)
        if self.reference is not None:
            batch["ref_logprobs"] = np.asarray(self.reference[self.target_ids(table, batch)])
        return batch

    def target_ids(self, table: list[list[int]], batch: dict[str, np.ndarray]) -> np.ndarray:
        """Return which token of the documents each target of this rank's rows is, of documents in groups."""
        assert self.groups is not None
        return self.groups.target_ids(table[self.mine], batch)


def _stream(documents: Documents, settings: dict[str, Any]) -> Stream:
    return Stream(documents, **settings)


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
