"""In which order pieces come: shuffled epochs of weighted sources, and batches of similar length.

An order is a pure map from stream index to piece. Any index can be asked for, so where a stream stands is one number.
"""

import math
import zlib
from bisect import bisect_right
from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import accumulate
from typing import NamedTuple

import numpy as np

FEW = 1 << 16
WINDOW = 32  # batches that are cut from one run of pieces, sorted by length


class Share(NamedTuple):
    """One source of a stream."""

    size: int
    """Pieces."""
    weight: float = 1.0
    """Times that an epoch sees it."""
    passes: float = math.inf
    """Times that it is seen at most, over all epochs."""


class Order(NamedTuple):
    """A stream of pieces."""

    piece: Callable[[int], int]
    """Stream index to piece."""
    epoch: Callable[[int], int]
    """Stream index to epoch."""
    begin: Callable[[int], int]
    """Epoch to its first stream index."""
    end: float
    """Length of the stream, infinite unless the passes of all sources are limited."""


def shuffled(slot: int, count: int, *seed: int) -> int:
    """Return where the permutation of `count` that `seed` names sends `slot`.

    Few are sorted by raw bits of PCG64, which NumPy promises never to change; of many Grain's index shuffle computes
    each by itself, in 3 us, but looks for it among at least 2 ** 16 (measured: 90 ms for all of them, however few).
    """
    if count < FEW:
        return int(_permutation(count, _hash(seed))[slot])
    from grain.experimental import index_shuffle  # here: models and kernels run where Grain is not installed

    return index_shuffle(slot, max_index=count - 1, seed=_hash(seed), rounds=4)


@lru_cache(maxsize=256)  # two for each of many sources
def _permutation(count: int, seed: int) -> np.ndarray:
    return np.argsort(np.random.PCG64(seed).random_raw(count), kind="stable").astype(np.uint16)


@lru_cache(maxsize=1024)
def _hash(seed: tuple[int, ...]) -> int:
    return zlib.crc32(repr(seed).encode())


def mixed(shares: Sequence[Share], seed: int, shuffle: bool) -> Order:
    """Order the pieces of several sources, which lie end to end.

    A source's own stream is one permutation of its pieces after another. An epoch takes the next round(weight * size)
    of each, at least one, until its passes are used up, and brings them in an order of its own.
    """
    take = [max(1, round(share.weight * share.size)) for share in shares]
    most = [max(1, round(s.passes * s.size)) if s.passes < math.inf else math.inf for s in shares]
    firsts = [0, *accumulate(share.size for share in shares)]

    @lru_cache(maxsize=4)  # held pieces are of the epoch before
    def ends(epoch: int) -> list[int]:
        """Return where the slots of each source end in an epoch."""
        return list(accumulate(int(min(n, max(0, m - epoch * n))) for n, m in zip(take, most, strict=True)))

    changing = max(math.ceil(m / n) if m < math.inf else 0 for n, m in zip(take, most, strict=True))
    begins, tail = [0, *accumulate(ends(epoch)[-1] for epoch in range(changing))], ends(changing)[-1]

    def begin(epoch: int) -> int:
        return begins[epoch] if epoch <= changing else begins[-1] + (epoch - changing) * tail

    def epoch_of(index: int) -> int:
        late = index - begins[-1]
        return changing + late // tail if late >= 0 else bisect_right(begins, index) - 1

    def piece(index: int) -> int:
        epoch = epoch_of(index)
        slot, borders = index - begin(epoch), ends(epoch)
        slot = shuffled(slot, borders[-1], seed, epoch) if shuffle else slot
        source = bisect_right(borders, slot)
        number = epoch * take[source] + slot - (borders[source - 1] if source else 0)
        again, own = divmod(number, shares[source].size)
        own = shuffled(own, shares[source].size, seed, again, source) if shuffle else own
        return firsts[source] + own

    return Order(piece, epoch_of, begin, math.inf if tail else begins[-1])


def grouped(order: Order, end: float, length_of: Callable[[int], int], rows: int, seed: int, shuffle: bool) -> Order:
    """Bring a stream's pieces of similar length together, `rows` at a time; the stream is asked for up to `end`.

    Pieces are sorted within windows of WINDOW batches, which do not reach over the border of an epoch.
    """
    width = rows * WINDOW

    @lru_cache(maxsize=4)
    def window(epoch: int, number: int) -> tuple[int, list[int]]:
        """Return where a window begins, and its pieces."""
        first = max(number * width, order.begin(epoch))
        last = min((number + 1) * width, order.begin(epoch + 1), end)
        pieces = sorted((order.piece(i) for i in range(first, int(last))), key=length_of)
        head = min(-first % rows, len(pieces))  # completes a batch that the epoch before began
        whole = (len(pieces) - head) // rows
        turns = [shuffled(i, whole, seed, epoch, number) if shuffle else i for i in range(whole)]
        batches = [pieces[head + i * rows : head + (i + 1) * rows] for i in turns]
        return first, pieces[:head] + [p for batch in batches for p in batch] + pieces[head + whole * rows :]

    def piece(index: int) -> int:
        first, pieces = window(order.epoch(index), index // width)
        return pieces[index - first]

    return order._replace(piece=piece)
