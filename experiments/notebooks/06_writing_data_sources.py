# %% [markdown]
# # 6. Writing data sources
#
# Rows of files become records, records become tokens with a mask that says which are trained, and those are packed
# into batches. This page walks down that road once, with a source of its own, a mixture, and mistakes.

# %%
import json
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt

from experiments.first_light import tasks
from experiments.first_light.make_tokenizer import FOLDER
from functional_trainer import config
from functional_trainer.data import Documents, Loader, Share, Tokenizer, datasets, records, rows_of
from functional_trainer.options import DataOptions, Mix, Source

folder = tempfile.TemporaryDirectory()
here = Path(folder.name)
tokenizer = Tokenizer(FOLDER)
tasks.write(here, n_train=60, n_eval=10)

# %% [markdown]
# ## Rows and records
# A row is what a file holds: a line of JSON, a row of CSV or Parquet. Its columns say which shape it has. A record is
# a checked conversation, the same for every shape, and knows where it came from.

# %%
record = next(records(here / "train.jsonl"))
print(record.where.removeprefix(f"{here}/"), record.shape, *record.messages, sep="\n")

# %% [markdown]
# ## Tokens, and which are trained
# The tokenizer's own chat template writes the conversation. What it says is the assistant's, and the token that ends
# the turn, is trained; here in green.

# %%
chat = [
    {"role": "user", "content": "What is 17 plus 25?"}, {"role": "assistant", "content": "42"},
    {"role": "user", "content": "Sort QPMWK."}, {"role": "assistant", "content": "KMPQW"},
]  # fmt: skip


def coloured(ids, mask):
    """Return the tokens, the trained ones in green."""
    texts = [tokenizer.decode([i], skip_special=False) for i in ids]
    return "|".join(f"\033[32m{text}\033[0m" if trained else text for text, trained in zip(texts, mask, strict=True))


ids, mask = tokenizer.encode_chat(chat)
print(coloured(ids, mask))
trained_text = tokenizer.decode([i for i, trained in zip(ids, mask, strict=True) if trained], skip_special=False)
assert trained_text == "42<|end|>KMPQW<|end|>"

# %% [markdown]
# ## Packing
# `Documents` are all conversations end to end. A `Loader` packs them into rows and never ends, unless told how often
# to go through. A token predicts the next one, so `targets` are `tokens`, one further; `weights` are the mask of the
# targets.

# %%
encoded = [tokenizer.encode_chat(r.messages, r.tools) for r in records(here / "train.jsonl")]
documents = Documents.of(encoded)
batch = next(Loader(documents, rows=6, seq_len=96, seed=0))
print({name: (tuple(column.shape), str(column.dtype)) for name, column in batch.items()})
inside = (batch["segment_ids"][:, 1:] == batch["segment_ids"][:, :-1]) & (batch["segment_ids"][:, 1:] > 0)
assert (batch["tokens"][:, 1:] == batch["targets"][:, :-1])[inside].all()

# %%
figure, axes = plt.subplots(2, 1, figsize=(10, 3.2), layout="constrained", sharex=True)
for axis, name, title in zip(axes, ("segment_ids", "weights"), ("documents in each row", "trained"), strict=True):
    colours = "tab20" if name == "segment_ids" else "Greys"
    axis.imshow(batch[name].numpy(), aspect="auto", interpolation="none", cmap=colours)
    axis.set(title=title, ylabel="row")
axes[1].set_xlabel("place")

# %% [markdown]
# Once through the data trains every trained token exactly once, whatever the packing.

# %%
for packing in ("first_fit", "best_fit", "none"):
    batches = list(Loader(documents, rows=6, seq_len=96, epochs=1, packing=packing))
    padding = sum(float((b["segment_ids"] == 0).sum()) for b in batches) / sum(b["tokens"].numel() for b in batches)
    print(f"{packing:10} {len(batches):2} batches, {padding:.0%} padding")
    assert sum(int(b["weights"].sum()) for b in batches) == sum(sum(mask) for _, mask in encoded)

# %% [markdown]
# ## A source of one's own
# Anything that can write lines of JSON is a source. This generator does not use our column names, and carries one
# that nobody asked for. Columns are mapped by name.


# %%
def doubles():
    for n in range(10, 60):
        yield {"question": f"How much is {n} + {n}?", "answer": str(2 * n), "difficulty": n}


with open(here / "doubles.jsonl", "w") as file:
    file.writelines(json.dumps(row) + "\n" for row in doubles())
first = next(records(here / "doubles.jsonl", columns=("prompt=question", "completion=answer")))
print(first.shape, *first.messages, sep="\n")
assert first.messages[1] == {"role": "assistant", "content": "20"}

# %% [markdown]
# ## A mixture
# A YAML file lists sources; the recipe takes it as `--data.train mix.yaml`. A weight says how often an epoch sees a
# source, a limit takes rows from its beginning. (The recipe tokenizes with `tokenized`, which keeps tokens on disk.)

# %%
MIX = """
datasets:
  - path: train.jsonl
    limit: 40
  - path: doubles.jsonl
    columns: [prompt=question, completion=answer]
    weight: 2
"""
(here / "mix.yaml").write_text(MIX)
sources = datasets([Source(f"{here}/mix.yaml")])
parts = [[tokenizer.encode_chat(r.messages, r.tools) for r in rows_of(source)] for source in sources]
weighed = [Share(len(part), source.weight) for part, source in zip(parts, sources, strict=True)]
loader = Loader(Documents.of(sum(parts, [])), rows=4, seq_len=128, epochs=1, sources=weighed)
chats = sum(int((b["segment_ids"].amax(1)).sum()) for b in loader)
print(f"an epoch of sources {weighed} has {chats} conversations")
assert weighed == [Share(40, 1.0), Share(50, 2.0)] and chats == 40 + 2 * 50

# %% [markdown]
# ## What errors look like
# One line: which file, which row, what was wrong, what would be right.


# %%
def refused(call, words):
    """Call what must fail, show its message, and check that it says `words`."""
    try:
        call()
    except ValueError as error:
        print(str(error).replace(f"{here}/", ""))
        assert words in str(error)
    else:
        raise AssertionError(f"this should have been refused: {words}")


def reading(*lines, **options):
    (here / "bad.jsonl").write_text("\n".join(lines) + "\n")
    return lambda: list(records(here / "bad.jsonl", **options))


good = json.dumps({"prompt": "Add 1 and 2.", "completion": "3"})
refused(reading(good, '{"prompt": '), "bad.jsonl:2: not valid JSON")
refused(reading(good, json.dumps({"prompt": "Add 1 and 2.", "completion": ""})), "the assistant's turn is empty")
refused(reading(json.dumps({"q": "Add 1 and 2.", "a": "3"})), "name them with --data.columns")
refused(reading(good, columns=("prompt=question",)), "there is no column 'question'")
refused(lambda: DataOptions(train=("a.jsonl", "b.jsonl"), weights=(1.0,)), "--data.weights are 1 for 2")
(here / "mix.yaml").write_text(MIX.replace("weight", "wieght"))
refused(lambda: config.load(Mix, here / "mix.yaml"), "did you mean datasets[1].weight?")
folder.cleanup()
