"""Broken data files, rows and lists of datasets: rows as the file has them, or one message that names the place."""

import csv
import gzip
import io
import json
import tempfile
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import yaml
from hypothesis import strategies as st

from functional_trainer.data import Tokenizer, datasets, encoded, records
from functional_trainer.options import Source
from tests.fuzz.broken import Refused, apply, change, damage, tried, twice

TOKENIZER = Tokenizer(Path(__file__).parents[2] / "experiments" / "first_light" / "tokenizer")
CALL = {"function": {"name": "add", "arguments": '{"a": 1}'}}
CHAT = [{"role": "user", "content": "Häh? \U0001f600"}, {"role": "assistant", "content": 'b,\n"a"'}]
ROWS: dict[str, list[dict[str, Any]]] = {shape: [row] * 3 for shape, row in {
    "messages": {"messages": [{"role": "system", "content": "s"}, *CHAT], "tools": [{"name": "add"}], "score": 0.5},
    "calls": {"messages": [
        CHAT[0], {"role": "assistant", "content": None, "tool_calls": [CALL]}, {"role": "tool", "content": "3"}, CHAT[1]
    ]},
    "sharegpt": {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}], "system": "s"},
    "alpaca": {"instruction": "Sort.", "input": 'b, "a"', "output": "abc", "history": [["q", "a"]]},
    "prompt_completion": {"prompt": "Add 1 to 2.", "completion": "3"},
    "text": {"text": "Sort b.\nThen add."},
}.items()}  # fmt: skip


def table(rows: list[dict], delimiter: str) -> bytes:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, rows[0].keys(), delimiter=delimiter)
    writer.writeheader()
    writer.writerows({k: v if isinstance(v, str) else json.dumps(v) for k, v in row.items()} for row in rows)
    return text.getvalue().encode()


def columns(rows: list[dict], parquet: bool) -> bytes:
    made, sink = pyarrow.Table.from_pylist(rows), io.BytesIO()
    if parquet:
        pyarrow.parquet.write_table(made, sink)
    else:
        with pyarrow.ipc.new_stream(sink, made.schema) as writer:
            writer.write_table(made)
    return sink.getvalue()


def lines(rows: list[Any]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


KINDS = {
    "a.jsonl": lines, "a.json": lambda rows: json.dumps(rows, indent=1).encode(),
    "b.json": lambda rows: json.dumps({"data": rows}).encode(), "a.jsonl.gz": lambda rows: gzip.compress(lines(rows)),
    "a.csv": lambda rows: table(rows, ","), "a.tsv": lambda rows: table(rows, "\t"),
    "a.parquet": lambda rows: columns(rows, True), "a.arrow": lambda rows: columns(rows, False),
    "a.txt": lambda rows: "\n".join(map(str, rows)).encode(),
}  # fmt: skip


def read(name: str, content: bytes, shape: str = "auto") -> list | Refused:
    """Read and tokenize a file as a recipe does; assert that what is accepted can be trained on as it is written."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        path.write_bytes(content)
        found = tried(lambda: list(records(path, shape)), str(path))
        for record in [] if isinstance(found, Refused) else found:
            tokens = tried(lambda record=record: encoded(record, TOKENIZER, None), str(path))
            if isinstance(tokens, Refused):
                return tokens
            ids, mask = tokens
            assert len(ids) == len(mask) and any(mask[1:])
            for message in record.messages:
                assert message["role"] in ("system", "user", "assistant", "tool")
                assert isinstance(message["content"], str) or message.get("tool_calls")
            said = [m["content"] for m in record.messages if m["role"] == "assistant"] or [record.text]
            kept = TOKENIZER.decode([i for i, trained in zip(ids, mask, strict=True) if trained], skip_special=False)
            assert all(text is None or TOKENIZER.decode(TOKENIZER.encode(text), False) in kept for text in said)
        return found


def bytes_broken(name: str, shape: str, damages: list) -> None:
    content = KINDS[name](ROWS[shape])
    for one in damages:
        content = one(content)
    read(name, content)


def values_broken(name: str, shape: str, changes: list) -> None:
    """One of the rows is changed: the others are what they were, or the message names a row."""
    row, _ = apply(ROWS[shape][0], changes)
    made = tried(lambda: KINDS[name]([ROWS[shape][0], row]), "") if name != "a.jsonl" else lines([ROWS[shape][0], row])
    found = read(name, made)
    if not isinstance(found, Refused) and found:
        (first, *_), whole = found, read(name, KINDS[name](ROWS[shape][:1]))
        assert not isinstance(whole, Refused) and first.messages == whole[0].messages and first.text == whole[0].text


MIX = {"datasets": [
    {"path": "a.jsonl", "type": "alpaca", "weight": 0.5, "epochs": 2.0, "limit": 7, "columns": ["prompt=q"]},
    {"path": "b/*.csv", "columns": ["text=body"]}, {"path": "owner/name"},
]}  # fmt: skip


def mix_broken(changes: list, damages: list) -> None:
    broken, _ = apply(MIX, changes)
    content = yaml.safe_dump(broken, allow_unicode=True).encode(errors="surrogatepass")
    for one in damages:
        content = one(content)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "mix.yaml"
        path.write_bytes(content)
        found = tried(lambda: datasets([Source(str(path))]), str(path))
        for source in [] if isinstance(found, Refused) else found:
            assert 0 < source.weight < float("inf") and source.epochs > 0 and source.limit >= 0
            assert source.path.startswith((folder, "hf://datasets/", "/"))


names, shapes = st.sampled_from(sorted(KINDS)), st.sampled_from(sorted(ROWS))
texts = st.sampled_from(["a.jsonl", "a.json", "b.json", "a.jsonl.gz"])
test_broken_bytes, test_more_broken_bytes = twice(bytes_broken, 250, names, shapes, st.lists(damage, max_size=3))
test_broken_values, test_more_broken_values = twice(
    values_broken, 400, texts, shapes, st.lists(change, min_size=1, max_size=3)
)
test_broken_mixes, test_more_broken_mixes = twice(
    mix_broken, 150, st.lists(change, min_size=1, max_size=3), st.lists(damage, max_size=1)
)
