"""Packed rows of answers to prompts, several of which share a prompt: what is in which row.

r answers of A tokens to a prompt of P take r (P + A - 1) places, or, where they share all of the prompt but its last
token, P - 1 + r A: with 16 short answers to a long question about a sixteenth. The last token of the prompt stands
before each answer, since it predicts the answer's first one; an answer's own last token is only predicted.
"""

from collections.abc import Hashable, Iterable, Sequence
from typing import NamedTuple

import numpy as np

from functional_trainer.data.packing import Documents, Pieces

OPEN = 64
"""Rows, the last ones, into which an answer may still go."""


class Answer(NamedTuple):
    """An answer and its prompt, stored one behind the other."""

    document: int
    """Where they are stored."""
    key: Hashable
    """Those that have the same may share a prompt."""
    prompt: int
    """Tokens of the prompt, at least one."""
    total: int
    """Tokens of both."""


class Segment(NamedTuple):
    """Tokens [first, stop) of a prompt and its answer in a row; all but the last are inputs."""

    document: int
    first: int
    stop: int
    parent: int
    """Segment of the row, counted from 1, that this one continues; 0 for none."""


def rows(answers: Iterable[Answer], seq_len: int, share: bool) -> list[list[Segment]]:
    """Put answers and their prompts into as few rows of `seq_len` as first-fit takes.

    With `share` an answer goes to a row that has its prompt, if there is room, and else brings it. ValueError for those
    that do not fit into a row.
    """
    table, free, held = list[list[Segment]](), list[int](), list[dict[Hashable, int]]()
    for document, key, prompt, total in answers:
        before, inputs = (prompt - 1 if share else 0), total - 1
        if inputs > seq_len:
            said = f"a prompt and its answer have {total} tokens, a row of {seq_len} holds {seq_len + 1}"
            raise ValueError(f"{said}: raise --data.seq-len or lower --rollout.max-completion-length")
        recent = range(max(0, len(table) - OPEN), len(table))
        row = next((r for r in recent if key in held[r] and free[r] >= inputs - before), -1)
        row = next((r for r in recent if free[r] >= inputs), len(table)) if row < 0 else row
        if row == len(table):
            table.append([])
            free.append(seq_len)
            held.append({})
        if before and key not in held[row]:
            table[row].append(Segment(document, 0, before + 1, 0))
            held[row][key], free[row] = len(table[row]), free[row] - before
        table[row].append(Segment(document, before, total, held[row].get(key, 0)))
        free[row] -= inputs - before
    return table


def pieces(stored: Documents, table: Sequence[Sequence[Segment]]) -> tuple[Pieces, list[list[int]]]:
    """Return what `packing.fill` takes to write the segments of each row, given prompts with their answers."""
    flat = [segment for row in table for segment in row]
    document, first, stop, _ = np.array(flat, np.int64).reshape(-1, 4).T
    begin, length = stored.offsets[document] + first, stop - first - 1
    before = np.concatenate([[0], np.cumsum(stored.mask)])  # trained tokens before each
    numbers = iter(range(len(flat)))
    trained = before[begin + 1 + length] - before[begin + 1]
    return Pieces(begin, length, first, trained, {}), [[next(numbers) for _ in row] for row in table]
