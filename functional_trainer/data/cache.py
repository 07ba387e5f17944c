"""Tokenized documents on disk: written once as rows stream by, then mapped, so that data may be larger than memory.

A folder `<cache>/<key>` holds tokens.bin (int32), mask.bin (bool), offsets.bin (int64), of documents in groups also
groups.bin (int64) and preferred.bin (int8), and meta.json. The key is a hash of the files' content, how they are read,
the tokenizer's files and the code that makes tokens of them. A folder is written as `<key>.tmp` under a lock and
renamed when whole: a process that wants it meanwhile, on any rank, waits.
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
from functools import partial
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
from functional_trainer.data.groups import couples, pairs
from functional_trainer.data.packing import Documents
from functional_trainer.data.records import Record, Within, encoded, rows_of
from functional_trainer.data.shapes import Form
from functional_trainer.options import Source

ROWS = 64  # read, tokenized and written at a time
COLUMNS: dict[str, Any] = {"tokens": np.int32, "mask": np.bool_, "offsets": np.int64}
GROUPED = COLUMNS | {"groups": np.int64, "preferred": np.int8}


class Mapped(Documents):
    """Documents in a folder of the cache; another process opens the folder anew."""

    folder: Path
    units: list[int]
    """Documents of each source, or groups of them."""

    def __reduce__(self):
        return load, (self.folder,)


@dataclass(frozen=True)
class Rows:
    """The rows of sources as tokens, `ROWS` at a time: makes a stream for `pipeline.ahead`."""

    of: Sequence[Source]
    tokenizer: Tokenizer
    vocab_size: int | None = None
    keep: Within | None = None
    form: Form = "chats"

    def __call__(self, part: int, parts: int) -> Iterator[tuple[int, dict[str, np.ndarray], dict[str, int]]]:
        """Yield (source, columns of its rows, how many are of which shape) of every `parts`-th run of rows."""
        turn = count()
        for index, source in enumerate(self.of):
            rows = rows_of(source, self.keep, self.form)
            while some := list(islice(rows, ROWS)):
                if next(turn) % parts == part:
                    yield index, self._columns(some), dict(Counter(record.shape for record in some))

    def _columns(self, some: list[Record]) -> dict[str, np.ndarray]:
        encode = partial(encoded, tokenizer=self.tokenizer, vocab_size=self.vocab_size)
        if self.form == "chats":
            documents = Documents.of(map(encode, some))
        else:
            documents = (pairs if self.form == "pairs" else couples)(some, encode)
        return {name: getattr(documents, name) for name in self.files}

    @property
    def files(self) -> dict[str, Any]:
        """What there is of the documents, and of which type."""
        return COLUMNS if self.form == "chats" else GROUPED


def home(folder: str | Path | None) -> Path:
    """Return the folder of the cache, made if it is missing; OSError says why it cannot be."""
    root = Path(folder or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "functional_trainer").expanduser()
    with writing(root):
        root.mkdir(parents=True, exist_ok=True)
        (root / "files.lock").touch()
    return root


def tokenized(rows: Rows, folder: str | Path | None = None, workers: int = 0) -> tuple[Mapped, list[Counter]]:
    """Return the documents of the rows, from the cache `folder` or through it, and each source's rows by shape.

    Without `folder` the cache is functional_trainer in the user's cache folder ($XDG_CACHE_HOME, else ~/.cache).
    ValueError names file and place of the first bad row, OSError why the cache cannot be written.
    """
    root = home(folder)
    with FileLock(root / "files.lock"):
        whole = root / key(rows, root)
    with FileLock(f"{whole}.lock"):
        if not (whole / "meta.json").exists():
            with writing(root):
                shutil.rmtree(begun := whole.with_suffix(".tmp"), ignore_errors=True)
                begun.mkdir()
            _write(rows, begun, workers)
            begun.rename(whole)
    meta = json.loads((whole / "meta.json").read_text())
    return load(whole), [Counter(shapes) for shapes in meta["sources"]]


@contextmanager
def writing(root: Path) -> Iterator[None]:
    """Say of an OSError what could not be written, and what would help."""
    try:
        yield
    except OSError as error:
        room = "make room or " if error.errno in (errno.ENOSPC, errno.EDQUOT) else ""
        reason = f"cannot write the token cache {root}: {error.strerror or error}"
        raise OSError(error.errno or errno.EIO, f"{reason}; {room}choose another folder (--data.cache)") from None


def load(folder: Path) -> Mapped:
    """Map the documents of a folder; ValueError if its files are not as they were written."""
    meta = json.loads((folder / "meta.json").read_text())
    if {name: (folder / f"{name}.bin").stat().st_size for name in meta["bytes"]} != meta["bytes"]:
        raise ValueError(f"{folder}: the files of this token cache have other sizes than written; delete the folder")
    documents = _map(folder, meta["bytes"])
    documents.__dict__ |= {"folder": folder, "content": meta["content"], "units": meta["units"]}
    return documents


def _map(folder: Path, sizes: dict[str, int]) -> Mapped:
    return Mapped(**{
        name: np.memmap(folder / f"{name}.bin", GROUPED[name], "r") if size else np.empty(0, GROUPED[name])
        for name, size in sizes.items()
    })  # fmt: skip


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
    code = [Path(__file__).with_name(f"{name}.py") for name in ("chat", "groups", "records", "shapes", "sources")]
    made = [_digest(file) for file in words + code] + [version(name) for name in ("tokenizers", "jinja2")]
    known.save()
    text = json.dumps([data, made, rows.vocab_size, rows.keep, rows.form])
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
    files = {name: open(folder / f"{name}.bin", "wb") for name in rows.files}
    shapes: list[Counter] = [Counter() for _ in rows.of]
    units, ends = [0] * len(rows.of), {"offsets": 0, "groups": 0}
    try:
        with bar:
            line = bar.add_task("tokenizing")
            for name in ends.keys() & files.keys():
                files[name].write(np.zeros(1, np.int64).data)
            for source, columns, seen in runs:
                with writing(folder.parent):
                    for name, column in columns.items():
                        files[name].write((column[1:] + ends[name] if name in ends else column).data)
                for name in ends.keys() & columns.keys():
                    ends[name] += int(columns[name][-1])
                units[source] += len(columns["groups" if "groups" in columns else "offsets"]) - 1
                shapes[source].update(seen)
                done = f"tokenized {sum(map(Counter.total, shapes)):,} rows, {ends['offsets']:,} tokens"
                bar.update(line, description=done)
    finally:
        runs.close()
        with writing(folder.parent):
            for file in files.values():
                file.close()
    sizes = {name: (folder / f"{name}.bin").stat().st_size for name in files}
    meta = {"bytes": sizes, "sources": shapes, "units": units, "content": _map(folder, sizes).content}
    (folder / "meta.json").write_text(json.dumps(meta))
