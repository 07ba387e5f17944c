"""From a recipe's data options to loaders: chats to tokens and loss mask, to packed rows."""

from collections import Counter
from itertools import chain, islice
from typing import Any

from experiments.first_light import tasks
from functional_trainer import backend
from functional_trainer.data import Loader, Record, Tokenizer, datasets, read, rows_of, within


def load(o: Any, tokenizer: Tokenizer, vocab: int, rank: int, world: int) -> tuple[Loader, Loader | None, list[Record]]:
    """Return loaders of the training and of the held-out chats, and the held-out ones to answer.

    `o` has the fields of `RunOptions`, `data` and `answers`. Without `data.train` the first-light tasks are written to
    the run folder and read from there.
    """
    train, held_out, count = o.data.train, o.data.eval, o.answers or 0
    if not train:
        train, held_out = (f"{o.out}/data/train.jsonl",), (f"{o.out}/data/eval.jsonl",)
        count = 512 if o.answers is None else o.answers
        if rank == 0:
            tasks.write(f"{o.out}/data", seed=o.seed)
        backend.barrier()
    rows: dict[str, Any] = {"rows": o.batch, "rank": rank, "world": world, "seq_len": o.data.seq_len}
    rows |= {"packing": o.data.packing, "overlong": o.data.overlong}
    found: list[Counter] = []
    parts = datasets(o.data, train, o.data.weights)
    kept, held = (within(o.data.split, 1), within(0, o.data.split)) if o.data.split else (None, None)
    documents = read(parts, tokenizer, vocab, found, kept)
    for part, counts in zip(parts, found, strict=True):
        if rank == 0:
            seen = ", ".join(f"{n:,} rows of shape {shape}" for shape, n in counts.items())
            print(f"training data: {part.path}: {seen}" + (f", weight {part.weight:g}" if part.weight != 1 else ""))
    mix = [(counts.total(), part.weight) for part, counts in zip(parts, found, strict=True)]
    rows["sources"] = mix if any(weight != 1 for _, weight in mix) else ()
    loader = Loader(documents, seed=o.seed, epochs=None if o.steps else o.epochs, **rows)
    if not held_out and not o.data.split:
        return loader, None, []
    asked = parts if o.data.split else datasets(o.data, held_out)
    if not o.data.split and (odd := next((part for part in asked if part.weight != 1), None)):
        raise ValueError(f"--data.eval: {odd.path} has weight {odd.weight:g}; held-out rows are seen once")
    documents = read(asked, tokenizer, vocab, keep=held)
    if not len(documents):
        raise ValueError(f"--data.split {o.data.split} holds out none of so few rows; use a larger share")
    eval_loader = Loader(documents, shuffle=False, epochs=1, **rows | {"sources": ()})
    questions = list(islice(chain.from_iterable(rows_of(part, held) for part in asked), count))
    if text := next((record for record in questions if not record.messages), None):
        raise ValueError(f"--answers {count}: {text.where} is plain text, which asks nothing; use --answers 0")
    return loader, eval_loader, questions
