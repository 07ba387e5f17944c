"""Columns that say what belongs together in packed rows, made and checked on the host. All are (B, S)."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from functional_trainer.data.packing import Overlong


def lengths(weights: np.ndarray, segment_ids: np.ndarray) -> np.ndarray:
    """Return for every token the sum of `weights` over its sequence, float32; 0 in padding."""
    found = np.zeros(weights.shape, np.float32)
    for row, first, last in sequences(segment_ids):
        found[row, first:last] = weights[row, first:last].sum(dtype=np.float64)
    return found


def by_sequence(segment_ids: np.ndarray, values: Sequence[Sequence[int]]) -> np.ndarray:
    """Spread a value for each sequence of each row over its places, 0 in padding."""
    table = np.zeros((len(values), 1 + max(map(len, values), default=0)), np.int64)
    for row, some in enumerate(values):
        table[row, 1 : 1 + len(some)] = some
    return np.take_along_axis(table, segment_ids, 1)


def sequences(segment_ids: np.ndarray) -> Iterator[tuple[int, int, int]]:
    """Yield row, first place and end of each sequence: of each run of equal ids that are not 0."""
    for row, ids in enumerate(segment_ids):
        borders = [0, *(np.flatnonzero(np.diff(ids)) + 1).tolist(), len(ids)]
        yield from ((row, a, b) for a, b in zip(borders, borders[1:], strict=False) if ids[a])


def refuse_cut(loss: Any, overlong: Overlong) -> None:
    """Raise a ValueError if a loader may cut documents whose tokens the loss pools."""
    if loss.whole_sequences and overlong == "split":
        raise ValueError(
            "this loss pools over whole sequences, but documents longer than a row are split: set overlong to "
            "'truncate' or 'drop' (--data.overlong)"
        )


def check_whole(batch: Mapping[str, Any]) -> None:
    """Raise a ValueError if a sequence is cut: begins in its middle, or has other weights than `lengths` says.

    One that continues another, its `parent_ids`, begins anywhere.
    """
    ids, positions, weights, whole = (np.asarray(batch[k]) for k in ("segment_ids", "positions", "weights", "lengths"))
    parents = np.asarray(batch.get("parent_ids", np.zeros_like(ids)))
    for row, first, last in sequences(ids):
        where = f"the sequence in row {row}, places {first} to {last - 1},"
        if positions[row, first] and not parents[row, first]:
            raise ValueError(
                f"{where} begins at position {positions[row, first]}: it was cut, and this loss pools over it"
            )
        total, told = (
            weights[row, first:last].sum(dtype=np.float64),
            whole[row, first:last][weights[row, first:last] != 0],
        )
        if not np.allclose(told, total, rtol=1e-5):
            raise ValueError(f"{where} has weights of {total:g} in all, but its lengths say {told[0]:g}: it was cut")


def check_pairs(batch: Mapping[str, Any]) -> None:
    """Raise a ValueError unless every pair is two neighbours in a row, one preferred, both with trained tokens."""
    ids, pairs, preferred, weights = (np.asarray(batch[k]) for k in ("segment_ids", "pairs", "preferred", "weights"))
    members: dict[tuple[int, int], list[tuple[int, int, int]]] = {}
    for row, first, last in sequences(ids):
        if not weights[row, first:last].any():
            raise ValueError(f"the sequence in row {row}, places {first} to {last - 1}, has no trained token")
        members.setdefault((row, int(pairs[row, first])), []).append((first, last, int(preferred[row, first])))
    for (row, pair), found in members.items():
        apart = len(found) == 2 and found[0][1] != found[1][0]
        if sorted(sign for *_, sign in found) != [-1, 1] or apart:
            places = ", ".join(f"{a} to {b - 1} (preferred {sign})" for a, b, sign in found)
            raise ValueError(f"pair {pair} of row {row} is not a chosen beside a rejected sequence, but: {places}")
