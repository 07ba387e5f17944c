"""Tokenized documents on disk: written once as rows stream by, then mapped, so that data may be larger than memory.

A folder `<cache>/<key>` holds tokens.bin (int32), mask.bin (bool), offsets.bin (int64) and meta.json. The key is a hash
of the files' content, how they are read, the tokenizer's files and the code that makes tokens of them. A folder is
written as `<key>.tmp` under a lock and renamed when whole: a process that wants it meanwhile, on any rank, waits.
"""

import errno
import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from itertools import count, islice
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock
from rich.console import Console
from rich.progress import Progress, TextColumn

from functional_trainer.data import sources
from functional_trainer.data.chat import FILES, Tokenizer
from functional_trainer.data.packing import Documents
from functional_trainer.data.records import Record, Within, encoded, rows_of
from functional_trainer.options import Source

ROWS = 64  # read, tokenized and written at a time
COLUMNS: dict[str, Any] = {"tokens": np.int32, "mask": np.bool_, "offsets": np.int64}


class Mapped(Documents):
    """Documents in a folder of the cache; another process opens the folder anew."""

    folder: Path

    def __reduce__(self):
        return load, (self.folder,)


@dataclass(frozen=True)
class Rows:
    """The rows of sources as tokens, `ROWS` at a time: makes a stream for `pipeline.ahead`."""

    of: Sequence[Source]
    tokenizer: Tokenizer
    vocab_size: int | None = None
    keep: Within | None = None

    def __call__(self, part: int, parts: int) -> Iterator[tuple[int, dict[str, np.ndarray], dict[str, int]]]:
        """Yield (source, columns of its rows, how many are of which shape) of every `parts`-th run of rows."""
        turn = count()
        for index, source in enumerate(self.of):
            rows = rows_of(source, self.keep)
            while some := list(islice(rows, ROWS)):
                if next(turn) % parts == part:
                    yield index, self._columns(some), dict(Counter(record.shape for record in some))

    def _columns(self, some: list[Record]) -> dict[str, np.ndarray]:
        pairs = [encoded(record, self.tokenizer, self.vocab_size) for record in some]
        documents = Documents.of(pairs)
        return {"tokens": documents.tokens, "mask": documents.mask, "offsets": documents.offsets}


def tokenized(rows: Rows, folder: str | Path | None = None, workers: int = 0) -> tuple[Documents, list[Counter]]:
    """Return the documents of the rows, from the cache `folder` or through it, and each source's rows by shape.

    Without `folder` the cache is functional_trainer in the user's cache folder ($XDG_CACHE_HOME, else ~/.cache).
    ValueError names file and place of the first bad row, OSError why the cache cannot be written.
    """
    root = Path(folder or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "functional_trainer").expanduser()
    with _writing(root):
        root.mkdir(parents=True, exist_ok=True)
        (root / "files.lock").touch()
    with FileLock(root / "files.lock"):
        home = root / key(rows, root)
    with FileLock(f"{home}.lock"):
        if not (home / "meta.json").exists():
            with _writing(root):
                shutil.rmtree(partial := home.with_suffix(".tmp"), ignore_errors=True)
                partial.mkdir()
            _write(rows, partial, workers)
            partial.rename(home)
    meta = json.loads((home / "meta.json").read_text())
    return load(home), [Counter(shapes) for shapes in meta["sources"]]


@contextmanager
def _writing(root: Path) -> Iterator[None]:
    """Say of an OSError what could not be written, and what would help."""
    try:
        yield
    except OSError as error:
        room = "make room or " if error.errno in (errno.ENOSPC, errno.EDQUOT) else ""
        reason = f"cannot write the token cache {root}: {error.strerror or error}"
        raise OSError(error.errno or errno.EIO, f"{reason}; {room}choose another folder (--data.cache)") from None


def load(folder: Path) -> Documents:
    """Map the documents of a folder; ValueError if its files are not as they were written."""
    meta = json.loads((folder / "meta.json").read_text())
    if {name: (folder / f"{name}.bin").stat().st_size for name in COLUMNS} != meta["bytes"]:
        raise ValueError(f"{folder}: the files of this token cache have other sizes than written; delete the folder")
    documents = _map(folder, meta["bytes"])
    documents.__dict__ |= {"folder": folder, "content": meta["content"]}
    return documents


def _map(folder: Path, sizes: dict[str, int]) -> Documents:
    return Mapped(*(
        np.memmap(folder / f"{name}.bin", dtype, "r") if sizes[name] else np.empty(0, dtype)
        for name, dtype in COLUMNS.items()
    ))  # fmt: skip


def key(rows: Rows, root: Path) -> str:
    """Return the name of the folder for these rows: a hash of all that they depend on."""
    known = _Known(root / "files.json")
    data = [
        [source.type, source.columns, source.limit]
        + [(sources.kind(file), known(file)) for file in sources.files(source.path)]
        for source in rows.of
    ]
    chosen = rows.tokenizer.folder
    words = [f for name in FILES for f in sorted([chosen / name, *(chosen / name).glob("*")]) if f.is_file()]
    code = [Path(__file__).with_name(f"{name}.py") for name in ("chat", "records", "shapes", "sources")]
    made = [_digest(file) for file in words + code] + [version(name) for name in ("tokenizers", "jinja2")]
    known.save()
    text = json.dumps([data, made, rows.vocab_size, rows.keep])
    return hashlib.blake2b(text.encode(), digest_size=12).hexdigest()


class _Known:
    """Hashes of files by path, size and time of change, in a file, so that large data is not read at every start."""

    def __init__(self, path: Path):
        self.path = path
        self.new: dict[str, str] = {}
        try:
            self.old = json.loads(path.read_text())
        except (OSError, ValueError):
            self.old = {}

    def __call__(self, file: Path) -> str:
        at = file.stat()
        name = f"{file.resolve()} {at.st_size} {at.st_mtime_ns}"
        self.new[name] = self.old.get(name) or _digest(file)
        return self.new[name]

    def save(self) -> None:
        if self.new.keys() - self.old.keys():
            partial = self.path.with_suffix(".tmp")  # whoever calls holds the lock
            partial.write_text(json.dumps(self.old | self.new))
            partial.replace(self.path)


def _digest(file: Path) -> str:
    with open(file, "rb") as content:
        return hashlib.file_digest(content, "blake2b").hexdigest()[:32]


def _write(rows: Rows, folder: Path, workers: int) -> None:
    """Tokenize into a folder, with a progress line."""
    from functional_trainer.data.pipeline import ahead

    console, runs = Console(stderr=True), ahead(rows, workers)
    bar = Progress(TextColumn("{task.description}"), console=console, disable=not console.is_terminal, transient=True)
    files = {name: open(folder / f"{name}.bin", "wb") for name in COLUMNS}
    shapes: list[Counter] = [Counter() for _ in rows.of]
    offset = 0
    try:
        with bar:
            line = bar.add_task("tokenizing")
            files["offsets"].write(np.zeros(1, np.int64).data)
            for source, columns, seen in runs:
                with _writing(folder.parent):
                    for name, column in columns.items():
                        files[name].write((column[1:] + offset if name == "offsets" else column).data)
                offset += len(columns["tokens"])
                shapes[source].update(seen)
                bar.update(line, description=f"tokenized {sum(map(Counter.total, shapes)):,} rows, {offset:,} tokens")
    finally:
        runs.close()
        with _writing(folder.parent):
            for file in files.values():
                file.close()
    sizes = {name: (folder / f"{name}.bin").stat().st_size for name in COLUMNS}
    meta = {"bytes": sizes, "sources": shapes, "content": _map(folder, sizes).content}
    (folder / "meta.json").write_text(json.dumps(meta))
