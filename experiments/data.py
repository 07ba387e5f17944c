"""From a recipe's data options to loaders: rows to tokens and loss mask, to packed rows."""

from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

from experiments.first_light import tasks
from functional_trainer import backend
from functional_trainer.data import Form, Loader, Record, Rows, Share, Tokenizer, Within, datasets, rows_of, tokenized
from functional_trainer.data.stream import WIDTHS
from functional_trainer.options import Source


def load(
    o: Any, tokenizer: Tokenizer, vocab: int, shard: Any, questions: int, say: Callable = print, form: Form = "chats"
) -> tuple[Loader, dict[str, Loader], list[Record]]:
    """Return a loader of the training rows, one of each held-out source by its name, and held-out rows with a question.

    `o` has the fields of `RunOptions` and `data`. Without `data.train` the first-light tasks are written to the run
    folder, with wrong answers where preferences are read, and read from there. `questions` is how many of the latter.
    """
    check_width(o.data.seq_len, o.data.packing, shard.part("batch/columns", 1)[1])
    rank, world = shard.data
    train, held_out = (o.data.train, o.data.eval) if o.data.train else shipped(o, shard, form)
    kept, held = (Within(o.data.split, 1), Within(0, o.data.split)) if o.data.split else (None, None)
    rows: dict[str, Any] = {"rows": o.batch, "rank": rank, "world": world, "seq_len": o.data.seq_len}
    rows |= {"packing": o.data.packing, "overlong": o.data.overlong}

    parts = datasets(o.data.sources() if o.data.train else [Source(train[0])])
    documents, found = tokenized(Rows(parts, tokenizer, vocab, kept, form), o.data.cache, o.data.workers)
    if not len(documents):
        raise ValueError(f"--data.split {o.data.split} holds out all of so few rows; use a smaller share")
    for part, counts in zip(parts, found, strict=True):
        seen = ", ".join(f"{n:,} rows of shape {shape}" for shape, n in counts.items())
        often = f", weight {part.weight:g}" * (part.weight != 1) + f", epochs {part.epochs:g}" * (part.epochs < 1e99)
        say(f"training data: {part.path}: {seen}{often}")
    shares = [Share(n, part.weight, part.epochs) for part, n in zip(parts, documents.units, strict=True)]
    alike = all(share[1:] == Share(0)[1:] for share in shares)
    epochs, mix = None if o.steps else o.epochs, () if alike else shares
    loader = Loader(documents, workers=o.data.workers, seed=o.seed, epochs=epochs, sources=mix, **rows)
    if long := loader.pieces.stats[o.data.overlong]:
        what = {"chats": "documents", "pairs": "pairs"}.get(form, "groups of answers")
        done = {"split": "split", "truncate": "truncated", "drop": "dropped"}[o.data.overlong]
        say(f"{long:,} of {len(documents.starts) - 1:,} {what} are longer than --data.seq-len {o.data.seq_len}: {done}")
    if not held_out and not o.data.split:
        return loader, {}, []

    asked = parts if o.data.split else datasets([Source(path, o.data.type, o.data.columns) for path in held_out])
    if not o.data.split and (odd := next((p for p in asked if (p.weight, p.epochs) != (1, float("inf"))), None)):
        raise ValueError(f"--data.eval: {odd.path} has a weight or epochs; held-out rows are seen once")
    documents, found = tokenized(Rows(asked, tokenizer, vocab, held, form), o.data.cache, o.data.workers)
    if not len(documents):
        raise ValueError(f"--data.split {o.data.split} holds out none of so few rows; use a larger share")
    loaders, first = {}, 0
    for name, n in zip(_names(asked), documents.units, strict=True):
        if n:
            loaders[name] = Loader(documents.between(first, first + n), shuffle=False, epochs=1, **rows)
        first += n
    chats = (part for part, counts in zip(asked, found, strict=True) if counts.keys() - {"text"})
    records = (record for part in chats for record in rows_of(part, held, form) if record.messages and record.label)
    return loader, loaders, list(islice(records, questions))


def shipped(o: Any, shard: Any, form: Form = "chats") -> tuple[tuple[str], tuple[str]]:
    """Write the project's own tasks to the run folder; return the files to train on and to hold out."""
    if shard.rank == 0:
        (tasks.write if form == "chats" else tasks.write_preferences)(f"{o.out}/data", seed=o.seed)
    backend.barrier()
    return (f"{o.out}/data/train.jsonl",), (f"{o.out}/data/eval.jsonl",)


def check_width(seq_len: int, packing: str, ways: int) -> None:
    """Check that a row of any width can be split so many ways."""
    equal = ways * max(WIDTHS) if packing == "none" and ways > 1 else ways
    if seq_len % equal:
        why = f"{ways} devices (cp x tp) share the tokens of a row, with --data.packing {packing}"
        right = f"use a multiple of {equal}, as {-(-seq_len // equal) * equal}"
        raise ValueError(f"--data.seq-len {seq_len}: {why}; {right}")


def _names(parts: list) -> list[str]:
    """Name sources by the stem of their paths, by their paths where stems are equal, and numbered where these are."""
    names = [Path(part.path).stem for part in parts]
    names = [part.path if names.count(name) > 1 else name for part, name in zip(parts, names, strict=True)]
    return [f"{n} ({names[:i].count(n) + 1})" if names.count(n) > 1 else n for i, n in enumerate(names)]
