"""functional_trainer.data: kinds of files and shapes of rows, by hand."""

import csv
import gzip
import json
import math
import os
import re
from collections import Counter
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from functional_trainer.data import Tokenizer, Within, datasets, records, rows_of, sources
from functional_trainer.options import DataOptions, Source
from tests.functional_trainer.reading import read

TOKENIZER = Tokenizer(Path(__file__).parents[2] / "experiments" / "first_light" / "tokenizer")
ALPACA = [
    {"instruction": "Sort.", "input": 'b, "a"\nc', "output": "abc"},
    {"instruction": "Häh?", "input": "", "output": "1"},
    {"instruction": "Add 1 to 2.", "input": "quickly", "output": "3"},
]  # fmt: skip


def write_table(path, rows, delimiter):
    with open(path, "w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, rows[0].keys(), delimiter=delimiter)
        table.writeheader()
        table.writerows(rows)


def write_arrow(path, rows, new):
    batch = pyarrow.Table.from_pylist(rows)
    with pyarrow.OSFile(str(path), "wb") as sink, new(sink, batch.schema) as writer:
        writer.write_table(batch, max_chunksize=2)


def lines(rows):
    return "".join(json.dumps(row) + "\n\n" for row in rows)


WRITERS = {
    "a.jsonl": lambda path, rows: path.write_text(lines(rows)),
    "b.ndjson": lambda path, rows: path.write_text(lines(rows)),
    "c.json": lambda path, rows: path.write_text(json.dumps(rows, indent=1)),
    "d.json": lambda path, rows: path.write_text(json.dumps({"version": 1, "data": rows})),
    "e.json": lambda path, rows: path.write_text(lines(rows)),
    "f.jsonl.gz": lambda path, rows: path.write_bytes(gzip.compress(lines(rows).encode())),
    "g.csv": lambda path, rows: write_table(path, rows, ","),
    "h.tsv": lambda path, rows: write_table(path, rows, "\t"),
    "i.parquet": lambda path, rows: pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path),
    "j.arrow": lambda path, rows: write_arrow(path, rows, pyarrow.ipc.new_file),
    "k.arrow": lambda path, rows: write_arrow(path, rows, pyarrow.ipc.new_stream),
}


def said(record):
    return [(m["role"], m["content"]) for m in record.messages]


@pytest.mark.parametrize("name", WRITERS)
def test_every_kind_of_file_holds_the_same_rows(tmp_path, name):
    WRITERS[name](tmp_path / name, ALPACA)
    found = list(records(tmp_path))
    assert [said(r) for r in found] == [
        [("user", 'Sort.\nb, "a"\nc'), ("assistant", "abc")], [("user", "Häh?"), ("assistant", "1")],
        [("user", "Add 1 to 2.\nquickly"), ("assistant", "3")],
    ]  # fmt: skip
    counts: list[Counter] = []
    docs = read(tmp_path / name, TOKENIZER, found=counts)
    assert counts == [{"alpaca": 3}] and len(docs) == 3
    ids, mask = docs[1]
    assert (ids.tolist(), mask.tolist()) == TOKENIZER.encode_chat(found[1].messages)
    places = {"jsonl": ":1", "ndjson": ":1", "gz": ":1", "csv": ":3", "tsv": ":3"}  # the first CSV row spans two lines
    last = "[0]" if name != "e.json" else ":1"
    assert found[0].where == f"{tmp_path / name}{places.get(name.rpartition('.')[2], last)}"


PLAIN = st.text(st.characters(codec="utf-8", exclude_characters="\r\0"), min_size=1, max_size=12).filter(str.strip)


@given(st.lists(st.fixed_dictionaries({"instruction": PLAIN, "input": PLAIN, "output": PLAIN}), min_size=1, max_size=5))
@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_any_text_survives_every_kind_of_file(tmp_path, rows):
    wanted = [[("user", f"{r['instruction']}\n{r['input']}"), ("assistant", r["output"])] for r in rows]
    for name, write in WRITERS.items():
        write(tmp_path / name, rows)
        assert [said(r) for r in records(tmp_path / name)] == wanted, name


SHAPES = {
    "messages": {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}], "score": 0.5},
    "conversations with roles": {
        "conversations": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    },
    "sharegpt": {"id": "x", "conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
    "alpaca": {"instruction": "q", "input": "", "output": "a"},
    "alpaca without input": {"instruction": "q", "output": "a"},
    "prompt_completion": {"prompt": "q", "completion": "a"},
    "prompt_completion of messages": {
        "prompt": [{"role": "user", "content": "q"}], "completion": [{"role": "assistant", "content": "a"}]
    },
}  # fmt: skip


GRAPHGEN = {
    "alpaca": {"instruction": "q", "input": "", "output": "a"},
    "sharegpt": {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
    "messages": {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]},
}


@pytest.mark.parametrize("shape", GRAPHGEN)
def test_what_graphgen_writes_is_recognised(tmp_path, shape):
    """Its output_data_format Alpaca, Sharegpt and ChatML: a list of such rows in a .json file of an output folder."""
    (tmp_path / "output").mkdir()
    (tmp_path / "output" / "qa.json").write_text(json.dumps([GRAPHGEN[shape]] * 3, ensure_ascii=False, indent=4))
    assert [(r.shape, said(r)) for r in records(tmp_path / "output")] == [
        (shape, [("user", "q"), ("assistant", "a")])
    ] * 3


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("kind", ["a.jsonl", "i.parquet"])
def test_every_shape_is_recognised(tmp_path, name, kind):
    WRITERS[kind](tmp_path / kind, [SHAPES[name]])
    (record,) = records(tmp_path / kind)
    assert said(record) == [("user", "q"), ("assistant", "a")]
    assert record.shape == {"conversations with roles": "messages"}.get(name, name.split(" ")[0])


def test_systems_histories_and_tools(tmp_path):
    call = {"function": {"name": "add", "arguments": "{}"}}
    rows = [
        {"system": "s", "conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
        {"system": "s", "messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]},
        {"system": "s", "history": [["q0", "a0"]], "instruction": "q", "output": "a"},
        {"tools": '[{"name": "add"}]', "messages": [
            {"role": "user", "content": "q"}, {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "content": "3"}, {"role": "assistant", "content": "a"},
        ]},
    ]  # fmt: skip
    for i, row in enumerate(rows):
        (tmp_path / f"{i}.jsonl").write_text(json.dumps(row))
    sharegpt, messages, alpaca, tools = records(tmp_path)
    assert said(messages) == said(sharegpt)
    assert said(sharegpt) == [("system", "s"), ("user", "q"), ("assistant", "a")]
    middle = [("user", "q0"), ("assistant", "a0")]
    assert said(alpaca) == [("system", "s"), *middle, ("user", "q"), ("assistant", "a")]
    assert tools.tools == [{"name": "add"}] and tools.messages[1]["tool_calls"] == [call]


def test_columns_that_only_some_turns_have_are_none_in_parquet_and_left_out(tmp_path):
    call = {"function": {"name": "add", "arguments": "{}"}}
    turns = [
        {"role": "user", "content": "q", "tool_calls": None},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "3", "tool_calls": None}, {"role": "assistant", "content": "a", "tool_calls": None},
    ]  # fmt: skip
    WRITERS["i.parquet"](tmp_path / "i.parquet", [{"messages": turns, "tools": None}])
    (record,) = records(tmp_path)
    assert [sorted(m) for m in record.messages][0] == ["content", "role"] and record.tools is None
    assert record.messages[1]["tool_calls"] == [call] and record.messages[1]["content"] is None


def test_plain_text_is_trained_whole_and_ends(tmp_path):
    (tmp_path / "a.txt").write_text("Add 1 to 2.\n\nSort b.")
    WRITERS["a.jsonl"](tmp_path / "b.jsonl", [{"text": "Sort b."}, {"text": "x", "meta": 1}])
    both = [tmp_path / "a.txt", tmp_path / "b.jsonl"]
    docs = read(both, TOKENIZER)
    (end,) = TOKENIZER.document_end
    assert TOKENIZER.backend.id_to_token(end) == TOKENIZER.special["eos_token"]
    for i, text in enumerate(("Add 1 to 2.\n\nSort b.", "Sort b.", "x")):
        ids, mask = docs[i]
        assert ids.tolist() == [*TOKENIZER.encode(text), end] and mask.all()
    assert [(r.text, r.messages, r.shape) for r in records(both)][1] == ("Sort b.", [], "text")


def test_columns_by_name(tmp_path):
    WRITERS["g.csv"](tmp_path / "g.csv", [{"question": "q", "answer": "a", "prompt": "not this", "id": "7"}])
    (record,) = records(tmp_path, columns=("prompt=question", "completion=answer"))
    assert said(record) == [("user", "q"), ("assistant", "a")] and record.shape == "prompt_completion"
    with pytest.raises(ValueError, match=re.escape("g.csv:2: expected an object with a list 'messages', or a list")):
        list(records(tmp_path))
    with pytest.raises(ValueError, match="g.csv:2: there is no column 'questoin', which --data.columns names; it has"):
        list(records(tmp_path, columns=("prompt=questoin", "completion=answer")))
    with pytest.raises(ValueError, match="'prompt=answer': expected OURS=THEIRS, each once"):
        list(records(tmp_path, columns=("prompt=question", "prompt=answer")))
    for wrong in ("question", "=question", "prompt=", "question=prompt"):
        with pytest.raises(ValueError, match=f"--data.columns '{wrong}': expected OURS=THEIRS, each once, OURS one of"):
            list(records(tmp_path, columns=(wrong,)))
    with pytest.raises(ValueError, match="'completion=question': expected OURS=THEIRS, each once"):
        list(records(tmp_path, columns=("prompt=question", "completion=question")))


@given(st.floats(0, 1), st.integers(0, 99))
@settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_a_split_is_whole_and_apart_by_content(tmp_path, share, seed):
    """Whatever the order and the other columns; equal rows are on the same side."""
    rows = [{"prompt": f"q{i % 150}", "completion": "a", "seed": seed} for i in range(200)]
    WRITERS["a.jsonl"](tmp_path / "a.jsonl", rows)
    WRITERS["g.csv"](tmp_path / "b.csv", rows[::-1])
    source = Source(str(tmp_path / "a.jsonl"))
    low, high = ({said(r)[0][1] for r in rows_of(source, Within(*part))} for part in ((0, share), (share, 1)))
    assert low.isdisjoint(high) and len(low | high) == 150 and abs(len(low) - 150 * share) < 30
    assert len(list(rows_of(source, Within(0, share)))) + len(list(rows_of(source, Within(share, 1)))) == 200
    assert low == {said(r)[0][1] for r in rows_of(Source(str(tmp_path / "b.csv")), Within(0, share))}
    few = Source(str(tmp_path / "a.jsonl"), limit=20)
    assert sum(1 for _ in rows_of(few)) == 20 >= sum(1 for _ in rows_of(few, Within(0, share)))


def test_a_shape_can_be_asked_for(tmp_path):
    row = SHAPES["messages"] | {"text": "plain"}
    WRITERS["a.jsonl"](tmp_path / "a.jsonl", [row])
    assert [r.shape for r in records(tmp_path)] == ["messages"]
    assert [r.text for r in records(tmp_path, shape="text")] == ["plain"]
    with pytest.raises(
        ValueError, match="a.jsonl:1: .*'instruction' and 'output' .shape alpaca.* it has .'messages', 'score'"
    ):
        list(records(tmp_path, shape="alpaca"))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "x"}\n{"prompt": "x", "completion": "y"}', ":2: expected an object with 'text' ("),
        ("a.jsonl", b'{"conversations": [{"from": "human"}]}', ":1: turn 0: expected an object with 'from'"),
        ("a.jsonl", b'{"conversations": [{"from": "me", "value": "x"}]}', ":1: turn 0: unknown speaker 'me'"),
        ("a.jsonl", b'{"conversations": []}', ":1: expected an object with a list 'conversations' that is not empty"),
        ("a.jsonl", b'{"instruction": 1, "output": "x"}', ":1: 'instruction' and 'input' must be text"),
        ("a.jsonl", b'{"instruction": "x", "output": ""}', ":1: message 1: the assistant's turn is empty"),
        ("a.jsonl", b'{"instruction": "x", "output": "y", "history": ["z"]}', ":1: 'history' 0: expected a question"),
        ("a.jsonl", b'{"text": " "}', ":1: 'text' must be text that is not empty"),
        ("a.json", b"3", ": expected a list of objects"), ("a.json", b"[1]", "[0]: expected an object"),
        ("a.json", b"[]", ": the file is empty"), ("a.json", b"\xff", ": not UTF-8 text"),
        ("a.json", b"[{", ":1: not valid JSON"), ("a.json", b'[\n{"text": "x"},\n{"text": }]', ":3: not valid JSON"),
        ("a.csv", b"text,text\na,b\n", ":1: the header has 'text' twice"),
        ("a.jsonl.gz", gzip.compress(b'{"text": "x"}')[:12] + b"\xff" * 20, "not a whole gzip file"),
        ("a.txt", b" \n", ": the file is empty"),
        ("a.csv", b"prompt,completion\na,b,c\n", ":2: another number of fields than the header's 2"),
        ("a.csv", b"prompt,completion\na\n", ":2: another number of fields than the header's 2"),
        ("a.csv", b'prompt,completion\n"a" x,b\n', ":2: not valid CSV"),
        ("a.csv", b"prompt,completion\n", ": the file is"),
        ("a.jsonl.gz", b"plain", ": not a whole gzip file"), ("a.csv.gz", b"plain", ": not UTF-8 text"),
        ("a.jsonl.gz", gzip.compress(b'{"text": "x"}')[:-9], "not a whole gzip file"),
        ("a.parquet", b"PAR1", ": not a valid parquet file"), ("a.arrow", b"ARROW1", ": not a valid arrow file"),
        ("a.xlsx", b"PK", ": unknown kind '.xlsx'; expected one of .jsonl, .ndjson, .json, .csv"),
    ],
)  # fmt: skip
def test_bad_files_are_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(f"{tmp_path / name}{message}" if message[0] in ":[" else message)):
        list(records(tmp_path / name))


def test_what_is_not_there_is_named(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="none.jsonl: no such file; give a file, folder, glob or a dataset"):
        sources.files("none.jsonl")
    (tmp_path / "dataset_info.json").write_text("{}")  # what `datasets` writes beside its .arrow files
    with pytest.raises(ValueError, match="no data file in it; expected .jsonl"):
        sources.files(tmp_path)
    (tmp_path / "notes.txt").write_text("alone")
    assert [f.name for f in sources.files(tmp_path)] == ["notes.txt"]
    (tmp_path / "README.md").write_text("# a card")
    (tmp_path / "deep").mkdir()
    WRITERS["k.arrow"](tmp_path / "deep" / "data-0.arrow", ALPACA)
    assert [f.name for f in sources.files(tmp_path)] == ["data-0.arrow"]
    monkeypatch.chdir(tmp_path / "deep")
    for _ in range(20):  # deeper than a path may be long
        Path("x" * 250).mkdir()
        os.chdir("x" * 250)
    with pytest.raises(ValueError, match=f"{tmp_path}: .*xxx.* in it cannot be read: File name too long; give"):
        sources.files(tmp_path)


def test_a_dataset_of_the_hub_comes_from_its_cache_or_is_an_error_that_says_how(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ValueError, match="openai/gsm8k: no such file, and no dataset .*hf download"):
        sources.files("openai/gsm8k")
    home = tmp_path / "datasets--openai--gsm8k"
    (home / "refs").mkdir(parents=True)
    (home / "refs" / "main").write_text("abc")
    (home / "snapshots" / "abc" / "main").mkdir(parents=True)
    WRITERS["i.parquet"](home / "snapshots" / "abc" / "main" / "train.parquet", ALPACA)
    assert [f.name for f in sources.files("openai/gsm8k")] == ["train.parquet"]
    WRITERS["i.parquet"](home / "snapshots" / "abc" / "main" / "test-00000.parquet", ALPACA)
    with pytest.raises(
        ValueError, match=r"several splits in it \(test, train\); give one, as hf://.*gsm8k/\*\*/\*train"
    ):
        sources.files("openai/gsm8k")
    assert [f.name for f in sources.files("hf://datasets/openai/gsm8k/**/*train*")] == ["train.parquet"]
    assert [f.name for f in sources.files("hf://datasets/openai/gsm8k/main/test*")] == ["test-00000.parquet"]
    with pytest.raises(ValueError, match="gsm8k/socratic/.: no data file in it"):
        sources.files("hf://datasets/openai/gsm8k/socratic/*")


@pytest.mark.parametrize(
    ("names", "several"),
    [
        (("train.jsonl", "test.jsonl"), True), (("train/a.jsonl", "validation/a.jsonl"), True),
        (("data/train-00000-of-1.jsonl", "data/dev-0.jsonl"), True), (("training.jsonl", "testing.jsonl"), False),
        (("train.jsonl", "train2.jsonl"), False), (("latest.jsonl", "train.jsonl"), False),
        (("test.jsonl", "other.jsonl"), False), (("my_train.jsonl", "my_eval.jsonl"), True),
    ],
)  # fmt: skip
def test_a_folder_with_several_splits_is_refused(tmp_path, names, several):
    """Or a held-out file would be trained on; what `datasets` keeps of its own beside the data is none."""
    for name in (*names, "cache-0123.arrow", "dataset_info.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("{}")
    if several:
        with pytest.raises(ValueError, match=r"several splits in it \(.*train.*\); give one, as .*/\*\*/\*train"):
            sources.files(tmp_path)
    else:
        assert len(sources.files(tmp_path)) == 2


VALUES = st.one_of(st.integers(), st.text(max_size=9), st.dictionaries(st.text(max_size=3), st.none()))


@given(st.lists(VALUES, max_size=9), st.integers(1, 7), st.sampled_from([None, 1]))
@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_a_list_is_read_in_blocks_of_any_size(tmp_path, rows, block, indent):
    """As json.loads reads it whole, up to where it is cut or goes on."""
    file, text = tmp_path / "a.json", json.dumps(rows, indent=indent)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "BLOCK", block)
        file.write_text(text + "\n")
        assert [row for _, row in sources._json(file)] == rows
        for wrong in (text[:-1], text + "]", text[:-1] + ",]", text.replace(",", " ") if len(rows) > 1 else "[1 2]"):
            file.write_text(wrong)
            with pytest.raises(ValueError, match="a.json.*: not valid JSON"):
                list(sources._json(file))


def test_a_large_text_is_cut_between_lines(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "BLOCK", 10)
    (tmp_path / "a.txt").write_text("one\ntwo\nthree\nfour\n" + "x" * 35 + "\nend")
    found = list(records(tmp_path / "a.txt"))
    assert "".join(r.text for r in found) == (tmp_path / "a.txt").read_text()
    assert all(r.text.endswith("\n") for r in found if "x" not in r.text and r is not found[-1])
    assert [r.where[-3:] for r in found] == [f"[{i}]" for i in range(len(found))] and len(found) > 4
    (tmp_path / "a.txt").write_text("one\ntwo")
    assert [(r.text, r.where) for r in records(tmp_path / "a.txt")] == [("one\ntwo", str(tmp_path / "a.txt"))]


@given(st.sampled_from(sorted(sources.READERS)), st.binary(max_size=60), st.sampled_from([b"", b"PAR1", b"ARROW1\0\0"]))
@example(".json", b"[" * 100_000, b"")
@example(".csv", b"a\n" + b"x" * 200_000, b"")
@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_any_bytes_are_rows_or_one_error(tmp_path, suffix, content, start):
    file = tmp_path / f"a{suffix}"
    file.write_bytes(start + content)
    try:
        for record in records(file):
            assert record.text or record.messages
    except ValueError as error:
        assert str(error).startswith(str(file)) and len(str(error)) < 1000


def test_sources_from_flags_and_from_a_file(tmp_path):
    """What a YAML file leaves open is as the flags say; its paths are relative to it, but for names of the hub."""
    (tmp_path / "mix.yaml").write_text(
        "datasets:\n- {path: a.jsonl, type: alpaca, weight: 0.5, epochs: 2, limit: 7}\n"
        "- {path: org/name, columns: [text=body]}\n"
    )
    flags = {"type": "messages", "columns": ("prompt=q",), "weights": (2.0, 3.0), "limits": (0, 5)}
    data = DataOptions(train=(f"{tmp_path}/mix.yaml", "b.csv"), **flags)
    assert datasets(data.sources()) == [
        Source(f"{tmp_path}/a.jsonl", "alpaca", ("prompt=q",), 1.0, 2.0, 7),
        Source("hf://datasets/org/name", "messages", ("text=body",), 2.0),
        Source("b.csv", "messages", ("prompt=q",), 3.0, limit=5),
    ]  # fmt: skip
    assert DataOptions(train=("a", "b"), epochs=(1, 2.5)).sources()[1] == Source("b", epochs=2.5)
    with pytest.raises(ValueError, match="mix.yaml: give the limit and the epochs of its datasets in the file"):
        datasets([Source(f"{tmp_path}/mix.yaml", limit=3)])
    for name in ("weights", "epochs", "limits"):
        with pytest.raises(ValueError, match=f"--data.{name} are 2 for 1 of --data.train"):
            DataOptions(train=("a",), **{name: (1, 1)})
    for name, wrong in (("weights", 0.0), ("weights", math.nan), ("epochs", 0.0), ("limits", -1)):
        with pytest.raises(ValueError, match=f"--data.{name}: {name.rstrip('s')}s? is {wrong}; it must"):
            DataOptions(train=("a",), **{name: (wrong,)})
    for name in ("train", "eval"):
        with pytest.raises(ValueError, match=f"--data.{name}: path is empty; give a file, folder"):
            DataOptions(**{"train": ("a",), name: ("a", "")})
    (tmp_path / "mix.yaml").write_text("datasets: []")
    with pytest.raises(ValueError, match="mix.yaml: datasets is empty; list at least one"):
        datasets([Source(f"{tmp_path}/mix.yaml")])
    with pytest.raises(ValueError, match="nope.yaml cannot be read: No such file or directory"):
        datasets([Source(f"{tmp_path}/nope.yaml")])
