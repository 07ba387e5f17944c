"""functional_trainer.data.cache: the same tokens as without it, written once, whole at every instant, mapped."""

import json
import multiprocessing
import os
import resource
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest

from functional_trainer.data import Documents, Loader, Rows, Tokenizer, Within, encoded, records, sources, tokenized
from functional_trainer.data.cache import key
from functional_trainer.options import Source

SHIPPED = Path(__file__).parents[2] / "experiments" / "first_light" / "tokenizer"
TOKENIZER = Tokenizer(SHIPPED)
FORK = multiprocessing.get_context("fork")


def write(path: Path, count: int, words: int = 3) -> Path:
    """Write rows of different lengths."""
    rows = ({"prompt": f"question {i}", "completion": " ".join("ab" * (i % words + 1))} for i in range(count))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def same(a: Documents, b: Documents) -> bool:
    return all(np.array_equal(getattr(a, name), getattr(b, name)) for name in ("tokens", "mask", "offsets"))


def folders(cache: Path) -> list[Path]:
    return sorted(path for path in cache.iterdir() if path.is_dir())


@pytest.mark.parametrize("workers", [0, 2])
def test_documents_are_those_of_the_rows_and_are_written_once(tmp_path, workers):
    of = [Source(str(write(tmp_path / "a.jsonl", 700))), Source(str(write(tmp_path / "b.jsonl", 300, 7)), limit=90)]
    rows = Rows(of, TOKENIZER)
    documents, found = tokenized(rows, tmp_path / "cache", workers)
    assert found == [{"prompt_completion": 700}, {"prompt_completion": 90}]
    pairs = [encoded(r, TOKENIZER, None) for source in of for r in records(source.path)][: 700 + 90]
    assert same(documents, Documents.of(pairs)) and documents.content == Documents.of(pairs).content
    (folder,) = folders(tmp_path / "cache")
    written = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    again, counts = tokenized(rows, tmp_path / "cache")
    assert same(again, documents) and counts == found
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == written
    assert isinstance(again.tokens, np.memmap) and not again.tokens.flags.writeable


def test_the_key_is_all_that_the_tokens_depend_on(tmp_path):
    file = write(tmp_path / "a.jsonl", 5)
    base = Rows([Source(str(file))], TOKENIZER, 400)
    was = key(base, tmp_path)
    copy = shutil.copy(file, tmp_path / "elsewhere.jsonl")
    os.utime(copy, (1, 1))
    assert key(Rows([Source(str(copy))], TOKENIZER, 400), tmp_path) == was, "not the name, not the time"
    shutil.copytree(SHIPPED, tmp_path / "other")
    (tmp_path / "other" / "chat_template.jinja").write_text("{{ messages }}")
    write(tmp_path / "b.jsonl", 6)
    shutil.copy(file, tmp_path / "c.json")
    others = [
        Rows(base.of, Tokenizer(tmp_path / "other"), 400),
        Rows(base.of, TOKENIZER, 401), Rows(base.of * 2, TOKENIZER, 400),
        Rows(base.of, TOKENIZER, 400, Within(0, 0.5)), Rows(base.of, TOKENIZER, 400, Within(0, 0.4)),
        Rows([Source(str(file), limit=2)], TOKENIZER, 400), Rows([Source(str(file), "text")], TOKENIZER, 400),
        Rows([Source(str(file), columns=("prompt=a",))], TOKENIZER, 400),
        *(Rows([Source(str(tmp_path / name))], TOKENIZER, 400) for name in ("b.jsonl", "c.json")),
    ]  # fmt: skip
    keys = [key(rows, tmp_path) for rows in others]
    assert len({was, *keys}) == len(others) + 1
    file.write_text(file.read_text().replace("question 1", "question X"))
    assert key(base, tmp_path) != was


def slowly(rows: Rows, cache: Path) -> None:
    """Tokenize with a reader that takes its time between rows."""
    read = sources.rows
    sources.rows = lambda file: (time.sleep(0.002) or row for row in read(file))
    tokenized(rows, cache)


def test_a_killed_writer_leaves_nothing_that_is_taken_for_whole(tmp_path):
    rows, cache = Rows([Source(str(write(tmp_path / "a.jsonl", 600)))], TOKENIZER), tmp_path / "cache"
    for seconds in (0.1, 0.4, 0.8):
        writer = FORK.Process(target=slowly, args=(rows, cache))
        writer.start()
        while not cache.exists() or not folders(cache):
            time.sleep(0.01)
        time.sleep(seconds)
        os.kill(writer.pid, signal.SIGKILL)
        writer.join()
        assert [path.suffix for path in folders(cache)] == [".tmp"]
    documents, _ = tokenized(rows, cache)
    assert same(documents, Documents.of(encoded(r, TOKENIZER, None) for r in records(tmp_path / "a.jsonl")))
    assert [path.suffix for path in folders(cache)] == [""]


def test_whoever_comes_second_waits_and_reads(tmp_path):
    rows, cache = Rows([Source(str(write(tmp_path / "a.jsonl", 300)))], TOKENIZER), tmp_path / "cache"
    writer = FORK.Process(target=slowly, args=(rows, cache))
    writer.start()
    while not cache.exists() or not folders(cache):
        time.sleep(0.01)
    documents, _ = tokenized(rows, cache)
    writer.join()
    assert writer.exitcode == 0 and len(documents) == 300
    (folder,) = folders(cache)
    assert documents.folder == folder


def begin_together(rows: Rows, cache: Path, barrier) -> None:
    barrier.wait()
    tokenized(rows, cache)


def test_ranks_that_begin_together_share_one_cache(tmp_path):
    rows = Rows([Source(str(write(tmp_path / f"{i}.jsonl", 20))) for i in range(4)], TOKENIZER)
    for trial in range(4):
        barrier = FORK.Barrier(8)
        cache = tmp_path / f"cache-{trial}"
        ranks = [FORK.Process(target=begin_together, args=(rows, cache, barrier)) for _ in range(8)]
        for rank in ranks:
            rank.start()
        for rank in ranks:
            rank.join()
        assert [rank.exitcode for rank in ranks] == [0] * 8 and len(folders(cache)) == 1


def test_what_is_wrong_is_said(tmp_path):
    rows = Rows([Source(str(write(tmp_path / "a.jsonl", 5)))], TOKENIZER)
    tokenized(rows, tmp_path / "cache")
    (folder,) = folders(tmp_path / "cache")
    with open(folder / "mask.bin", "ab") as file:
        file.write(b"\0")
    with pytest.raises(ValueError, match="other sizes than written; delete the folder"):
        tokenized(rows, tmp_path / "cache")
    with pytest.raises(OSError, match=r"cannot write the token cache .*a.jsonl/x: Not a directory; .*--data.cache"):
        tokenized(rows, tmp_path / "a.jsonl" / "x")
    (tmp_path / "b.jsonl").write_text('{"prompt": "q", "completion": ""}')
    for workers in (0, 1):
        with pytest.raises(ValueError, match="b.jsonl:1: message 1: the assistant's turn is empty"):
            tokenized(Rows([Source(str(tmp_path / "b.jsonl"))], TOKENIZER), tmp_path / "cache", workers)


def within_memory(path: Path, room: int) -> None:
    """Tokenize a file and load all of it with `room` bytes more than there are already."""
    tokenized(Rows([Source(str(write(path.parent / "small.jsonl", 5)))], TOKENIZER), path.parent / "cache")
    held = int(Path("/proc/self/statm").read_text().split()[5]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_DATA, (held + room, held + room))
    documents, _ = tokenized(Rows([Source(str(path))], TOKENIZER), path.parent / "cache")
    loader = Loader(documents, rows=4, seq_len=512, epochs=1, overlong="split")
    assert sum(int(batch["weights"].sum()) for batch in loader) == loader.pieces.stats["trained_tokens"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv"])
def test_a_file_larger_than_memory_trains(tmp_path, name):
    """50 MB of text in 40 MB of room, thread stacks included; reading it whole fails, so the limit holds."""
    text = "Sort the letters of this long word if you please. " * 100
    with open(tmp_path / name, "w") as file:
        if name == "a.csv":
            file.write("text\n" + (text + "\n") * 11_000)
        else:
            open_, between, close = ("[", ",\n", "]") if name == "a.json" else ("", "\n", "\n")
            file.write(open_ + between.join([json.dumps({"text": text})] * 11_000) + close)
    process = FORK.Process(target=within_memory, args=(tmp_path / name, 40 << 20))
    process.start()
    process.join()
    assert process.exitcode == 0
    whole = FORK.Process(target=_read_whole, args=(tmp_path / name, 40 << 20))
    whole.start()
    whole.join()
    assert whole.exitcode == 7


def _read_whole(path: Path, room: int) -> None:
    held = int(Path("/proc/self/statm").read_text().split()[5]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_DATA, (held + room, held + room))
    try:
        path.read_text()
    except MemoryError:
        os._exit(7)
