"""From a recipe's data options to loaders: chats to tokens and loss mask, to packed rows."""

from collections import Counter
from itertools import islice
from typing import Any

from experiments.first_light import tasks
from functional_trainer import backend
from functional_trainer.data import Loader, Record, Tokenizer, read, records


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
    how = {"shape": o.data.shape, "columns": o.data.columns}
    found: Counter = Counter()
    loader = Loader(
        read(train, tokenizer, vocab, **how, found=found), seed=o.seed, epochs=None if o.steps else o.epochs, **rows
    )
    if rank == 0:
        print(f"training data: {', '.join(f'{n:,} rows of shape {shape}' for shape, n in found.items())}")
    if not held_out:
        return loader, None, []
    eval_loader = Loader(read(held_out, tokenizer, vocab, **how), shuffle=False, epochs=1, **rows)
    questions = list(islice(records(held_out, **how), count))
    if any(not record.messages for record in questions):
        raise ValueError(f"--answers {count}: {questions[0].where} is plain text, which asks nothing; use --answers 0")
    return loader, eval_loader, questions
