"""Documents that stay together: the two answers of a pair, or two prompts with their own and each other's answers.

Letters: N documents in G groups, R rows, S places in a row. A group lies in one row, its documents side by side, so
that neither rows, micro-batches nor ranks part it. For packing it is one piece, as long as all its documents.

KTO compares with answers that do not belong to their prompts. Two answers that were read far apart make a group of four
documents: a's own, b's own, a's prompt with b's answer, b's prompt with a's. So the mismatched answers of a batch are
the batch's own answers, each once, as in the paper (https://arxiv.org/abs/2402.01306), in whatever order batches come.
(TRL moves the answers of a batch on by one, and never shuffles.)
"""

from collections.abc import Callable, Iterable
from dataclasses import replace

import numpy as np

from functional_trainer.data import columns
from functional_trainer.data.packing import Documents, Overlong, Pieces, count_trained, fill
from functional_trainer.data.records import Record

Encode = Callable[[Record], tuple[list[int], list[bool]]]


def pairs(records: Iterable[Record], encode: Encode) -> Documents:
    """Store the chosen and the rejected answer of each record."""
    return _stored([[(*encode(record), sign) for record, sign in sides(one)] for one in records])


def couples(records: Iterable[Record], encode: Encode) -> Documents:
    """Store answers two by two, half of all apart, and with each other's answers.

    An odd one is alone, and so are two to the same prompt: to it neither is mismatched.
    """
    answers = [(*encode(record), sign) for one in records for record, sign in sides(one)]
    half = len(answers) // 2
    groups: list[list[tuple]] = []
    for a, b in zip(answers[:half], answers[half : 2 * half], strict=True):
        alike = _prompt(a) == _prompt(b)
        groups += [[a], [b]] if alike else [[a, b, _mismatched(a, b), _mismatched(b, a)]]
    return _stored(groups + [[one] for one in answers[2 * half :]])


def sides(record: Record) -> list[tuple[Record, int]]:
    """Return each answer of a record as one of its own, with 1 if it is wanted and -1 if not."""
    if record.rejected is None:
        return [(record, 1 if record.label else -1)]
    return [(record, 1), (replace(record, messages=record.rejected, rejected=None, label=False), -1)]


def _prompt(answer: tuple) -> list[int]:
    """Return what stands before the first trained token."""
    ids, mask, _ = answer
    return list(ids[: mask.index(True)])


def _mismatched(a: tuple, b: tuple) -> tuple:
    """Return the prompt of one with the answer of the other."""
    prompt, begin = _prompt(a), len(_prompt(b))
    return [*prompt, *b[0][begin:]], [False] * len(prompt) + b[1][begin:], 0


def _stored(groups: list[list[tuple]]) -> Documents:
    flat = [document for group in groups for document in group]
    documents = Documents.of((ids, mask) for ids, mask, _ in flat)
    borders = np.cumsum([0, *(len(group) for group in groups)], dtype=np.int64)
    return replace(documents, groups=borders, preferred=np.array([sign for *_, sign in flat], np.int8))


class Groups:
    """The groups of documents in rows of `seq_len`, cut as `overlong` says.

    What is longer is dropped, or each of its documents is truncated to an equal part of the row. A group of which a
    document would train nothing is left out. ValueError if it says "split".
    """

    def __init__(self, documents: Documents, seq_len: int, overlong: Overlong):
        assert documents.groups is not None and documents.preferred is not None
        if overlong not in ("truncate", "drop"):
            raise ValueError(f"overlong is {overlong!r}; for documents that stay together it is 'truncate' or 'drop'")
        first, size = documents.groups[:-1], np.diff(documents.groups)
        begin, inputs = documents.offsets[:-1], np.diff(documents.offsets) - 1
        long = np.add.reduceat(inputs, first) > seq_len
        length = np.minimum(inputs, np.repeat(np.where(long, np.maximum(seq_len // size, 1), seq_len), size))
        trained = count_trained(documents.mask, begin, length)
        whole = (np.minimum.reduceat(trained, first) > 0) & (size <= seq_len)
        keep = whole & ~(long & (overlong == "drop"))
        here = np.repeat(keep, size)
        stats = {
            "documents": len(documents),
            "pieces": int(keep.sum()),
            "tokens": int(length[here].sum()),
            "trained_tokens": int(trained[here].sum()),
            **{name: int(long.sum()) * (overlong == name) for name in ("split", "truncate", "drop")},
            "untrained": int((~whole).sum()),
        }
        self.documents, self.preferred = documents, documents.preferred[here].astype(np.int64)
        self.parts = Pieces(begin[here], length[here], np.zeros_like(length[here]), trained[here], stats)
        self.first = np.cumsum([0, *size[keep]])
        lengths, targets = (np.add.reduceat(x, first)[keep] for x in (length, trained))
        self.pieces = Pieces(documents.starts[:-1][keep], lengths, np.zeros_like(lengths), targets, stats)
        self.paired = bool((size == 2).all())

    def fill(self, table: list[list[int]], width: int) -> dict[str, np.ndarray]:
        """Write the groups of each row: the batch columns of `packing.fill` and lengths, preferred and pairs, (R, S).

        Without pairs there is no such column.
        """
        rows = [[part for group in row for part in self._of(group)] for row in table]
        batch = fill(self.documents, self.parts, rows, width)
        ids = batch["segment_ids"]
        batch["lengths"] = columns.lengths(batch["weights"], ids)
        batch["preferred"] = columns.by_sequence(ids, [self.preferred[row].tolist() for row in rows])
        if self.paired:
            numbers = [[n for n, group in enumerate(row, 1) for _ in self._of(group)] for row in table]
            batch["pairs"] = columns.by_sequence(ids, numbers)
            columns.check_pairs(batch)
        return batch

    def target_ids(self, table: list[list[int]], batch: dict[str, np.ndarray]) -> np.ndarray:
        """Return which token of the documents each target of a batch is, int64 (R, S), 0 in padding."""
        begins = [[int(self.parts.begin[part]) for group in row for part in self._of(group)] for row in table]
        places = columns.by_sequence(batch["segment_ids"], begins) + batch["positions"] + 1
        return np.where(batch["segment_ids"] != 0, places, 0)

    def _of(self, group: int) -> range:
        return range(self.first[group], self.first[group + 1])
