"""Files to rows: JSON, JSONL, CSV, TSV, Parquet, Arrow and plain text, each row a dict that knows where it stands.

    .jsonl .ndjson    one JSON object a line                .csv .tsv      a header, then one row a record
    .json             a list of objects, {"data": [...]},   .parquet       rows
                      one object, or JSON lines             .arrow         rows, of a file or a stream (`datasets`)
    .txt .md          {"text": ...}: the whole file, or of a larger one a mebibyte of whole lines a row

All but .parquet and .arrow may be compressed: .jsonl.gz. Rows are read as they are asked for, so a file may be larger
than memory; only a .json that is not a list is read whole.
"""

import csv
import gzip
import io
import json
import re
import sys
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from functional_trainer.errors import brief

Paths = str | Path | Iterable[str | Path]
Row = tuple[str, Any]
"""Where it stands (file:line, or file[index]) and what it is."""

NOT_DATA = re.compile(r"(dataset_infos?|state|dataset_dict)\.json|cache-.*\.arrow")  # what `datasets` writes
SPLIT = re.compile(r"(?<![^\W_])(train|test|validation|valid|val|dev|eval)(?![^\W\d_])", re.I)  # a word of its path
TEXT = (".txt", ".md")  # in a folder of other data: a README, a licence
BLOCK = 1 << 20  # characters of text, or of a JSON list, that are read at a time
LONGEST = 1 << 28  # characters of a row of a JSON list
SPACE = re.compile(r"[ \t\r\n]*")
HUB = "hf://datasets/"
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


def kind(file: Path) -> str:
    """Return the suffix that says how to read a file, without .gz."""
    return Path(file.stem if file.suffix == ".gz" else file.name).suffix.lower()


def files(paths: Paths) -> list[Path]:
    """List the data files that files, folders, globs and names of the hub stand for.

    ValueError where there is none, one of no known kind, a folder with a split for training and one held out, or one
    that cannot be listed.
    """
    found: list[Path] = []
    for path in [paths] if isinstance(paths, str | Path) else paths:
        name, path = str(path), Path(path)
        named_hub = name.startswith(HUB)
        try:
            if named_hub or HUB_NAME.fullmatch(name) and kind(path) not in READERS and not path.exists():
                owner, dataset, *inside = name.removeprefix(HUB).split("/")
                home = Path(_hub(f"{owner}/{dataset}"))
                here = _inside(home, name) if not inside else sorted(home.glob("/".join(inside)))
            elif path.is_dir():
                here = _inside(path, name)
            else:
                here = sorted(Path(path.anchor or ".").glob(str(path.relative_to(path.anchor))))
            here = [file for file in here if file.is_file()]
        except OSError as error:
            what = f"{brief(error.filename)} in it cannot be read: {error.strerror}"
            raise ValueError(f"{name}: {what}; give a folder of data files only") from None
        if not here:
            if named_hub or path.is_dir():
                raise ValueError(f"{name}: no data file in it; expected {', '.join(READERS)}")
            raise ValueError(f"{name}: no such file; give a file, folder, glob or a dataset of the hub (owner/name)")
        if odd := next((file for file in here if kind(file) not in READERS), None):
            raise ValueError(f"{odd}: unknown kind {odd.suffix!r}; expected one of {', '.join(READERS)}")
        found += here
    return found


def _inside(folder: Path, name: str) -> list[Path]:
    """List the data files of a folder that was asked for as `name`."""
    here = sorted(f for f in folder.rglob("*") if kind(f) in READERS and not NOT_DATA.fullmatch(f.name))
    here = [file for file in here if kind(file) not in TEXT] or here
    splits = {split[1] for file in here for split in SPLIT.finditer(str(file.relative_to(folder)))}
    if "train" in splits and len(splits) > 1:
        one = f"{name if name.startswith(HUB) or folder == Path(name) else HUB + name}/**/*train*"
        raise ValueError(f"{name}: there are several splits in it ({', '.join(sorted(splits))}); give one, as {one}")
    return here


def _hub(name: str) -> str:
    """Return the folder of a dataset of the hub, downloaded if it is not there yet."""
    import huggingface_hub

    try:
        wanted = [f"*{suffix}{end}" for suffix in READERS for end in ("", ".gz")]
        return huggingface_hub.snapshot_download(name, repo_type="dataset", allow_patterns=wanted)
    except Exception as error:  # what its HTTP library raises differs from version to version
        why = str(error).strip().partition("\n")[0]
        raise ValueError(
            f"{name}: no such file, and no dataset of that name came from the hub ({type(error).__name__}: {why}); "
            f"offline, give the folder of `hf download --repo-type dataset {name} --local-dir FOLDER`"
        ) from error


def rows(file: Path) -> Iterator[Row]:
    """Read the rows of a file; ValueError names the file and the place of what cannot be read."""
    empty = True
    for row in READERS[kind(file)](file):
        empty = False
        yield row
    if empty:
        raise ValueError(f"{file}: the file is empty; expected at least one row")


def _open(file: Path) -> Any:
    return gzip.open(file, "rb") if file.suffix == ".gz" else open(file, "rb")


@contextmanager
def _characters(file: Path) -> Iterator[Any]:
    """Open a file as UTF-8 text, line ends as they are; ValueError for what is no text."""
    try:
        with _open(file) as content, io.TextIOWrapper(content, encoding="utf-8-sig", newline="") as text:
            yield text
    except (UnicodeDecodeError, gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{file}: not UTF-8 text ({error})") from error


def _text(file: Path) -> Iterator[Row]:
    with _characters(file) as text:
        number, block = 0, text.read(BLOCK)
        while block:
            more = text.read(BLOCK)
            head, end, rest = block.rpartition("\n") if more else (block, "", "")
            if not end:  # the last block, or a line longer than one
                head, rest = block, ""
            if "\0" in head:
                raise ValueError(f"{file}: not UTF-8 text (it has zero bytes: perhaps it is UTF-16)")
            if head.strip():
                yield (str(file) if not number and not more else f"{file}[{number}]"), {"text": head + end}
            number, block = number + 1, rest + more


def _parsed(text: str | bytes, where: str) -> Any:
    try:
        return _encodable(json.loads(text), where)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: not valid JSON ({error}); expected one object a line") from error


def _encodable(data: Any, where: str) -> Any:
    """Return parsed JSON; ValueError if it has a lone surrogate, which is no text, or is nested too deeply."""
    try:
        json.dumps(data, ensure_ascii=False).encode()
        return data
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: not valid JSON ({error})") from error


def _json_lines(file: Path) -> Iterator[Row]:
    try:
        with _open(file) as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield f"{file}:{number}", _parsed(line, f"{file}:{number}")
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{file}: not a whole gzip file ({error})") from error


def _json(file: Path) -> Iterator[Row]:
    with _characters(file) as characters:
        start = characters.read(BLOCK)
        if start.lstrip()[:1] == "[":
            yield from _elements(file, start, characters)
            return
        text = start + characters.read()
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        try:
            json.loads(text.lstrip().partition("\n")[0])
        except (ValueError, RecursionError):
            place = f"{file}:{getattr(error, 'lineno', 1)}"
            raise ValueError(f"{place}: not valid JSON ({error}); expected a list of objects") from error
        yield from _json_lines(file)
        return
    data = _parsed(text, str(file))
    if isinstance(data, dict) and isinstance(data.get("data"), list):
        yield from ((f"{file}[{i}]", row) for i, row in enumerate(data["data"]))
    elif isinstance(data, dict):
        yield f"{file}:1", data
    else:
        raise ValueError(f"{file}: expected a list of objects, got {str(data)[:60]}")


def _elements(file: Path, text: str, characters: Any) -> Iterator[Row]:
    """Yield the elements of a JSON list of which `text` is the beginning."""
    decoder, at, number, ends = json.JSONDecoder(), text.index("[") + 1, 0, False
    lines = 0  # before `text`
    while True:
        try:
            at = SPACE.match(text, at).end()  # type: ignore[union-attr]
            if not number and text[at : at + 1] == "]":
                end = at
                break
            element, end = decoder.raw_decode(text, at)
            end = SPACE.match(text, end).end()  # type: ignore[union-attr]
            if text[end : end + 1] not in (",", "]"):
                raise json.JSONDecodeError("expected , or ]", text, end)
        except (ValueError, RecursionError) as error:
            if ends or len(text) - at > LONGEST or isinstance(error, RecursionError):
                place = f"{file}:{lines + getattr(error, 'lineno', 1)}"
                raise ValueError(f"{place}: not valid JSON ({error}); expected a list of objects") from error
            more = characters.read(max(BLOCK, len(text) - at))  # perhaps the element goes on
            lines += text.count("\n", 0, at)
            text, at, ends = text[at:] + more, 0, not more
            continue
        yield f"{file}[{number}]", _encodable(element, f"{file}[{number}]")
        if text[end] == "]":
            break
        at, number = end + 1, number + 1
    if (text[end + 1 :] + characters.read(BLOCK)).strip():
        raise ValueError(f"{file}: not valid JSON: there is more behind the list; expected one list of objects")


def _table(file: Path, delimiter: str) -> Iterator[Row]:
    csv.field_size_limit(sys.maxsize)
    with _characters(file) as text:
        table = csv.DictReader(text, delimiter=delimiter, strict=True)
        try:
            if twice := [name for name in table.fieldnames or () if (table.fieldnames or ()).count(name) > 1]:
                raise ValueError(f"{file}:1: the header has {twice[0]!r} twice")
            for row in table:
                where = f"{file}:{table.line_num}"
                if None in row or None in row.values():
                    count = len(table.fieldnames or ())
                    raise ValueError(f"{where}: another number of fields than the header's {count}")
                yield where, row
        except csv.Error as error:
            raise ValueError(f"{file}:{table.line_num + 1}: not valid CSV ({error})") from error


def _columns(file: Path) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        if kind(file) == ".parquet":
            batches = pyarrow.parquet.ParquetFile(file).iter_batches(1024)
        else:
            source = pyarrow.OSFile(str(file))  # of a map, a damaged file kills the process
            try:
                reader = pyarrow.ipc.open_file(source)
                batches = (reader.get_batch(i) for i in range(reader.num_record_batches))
            except pyarrow.ArrowInvalid:
                source.seek(0)
                batches = iter(pyarrow.ipc.open_stream(source))
        index = 0
        for batch in batches:
            batch.validate(full=True)  # a damaged file would crash the process
            for start in range(0, batch.num_rows, 1024):
                for row in batch.slice(start, 1024).to_pylist():
                    yield f"{file}[{index}]", row
                    index += 1
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{file}: not a valid {kind(file)[1:]} file ({error})") from error


READERS = {
    ".jsonl": _json_lines, ".ndjson": _json_lines, ".json": _json, ".csv": lambda file: _table(file, ","),
    ".tsv": lambda file: _table(file, "\t"), ".parquet": _columns, ".arrow": _columns,
    ".txt": _text, ".md": _text,
}  # fmt: skip
