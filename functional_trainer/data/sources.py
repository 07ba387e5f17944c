"""Files to rows: JSON, JSONL, CSV, TSV, Parquet, Arrow and plain text, each row a dict that knows where it stands.

    .jsonl .ndjson    one JSON object a line                .csv .tsv      a header, then one row a record
    .json             a list of objects, {"data": [...]},   .parquet       rows
                      one object, or JSON lines             .arrow         rows, of a file or a stream (`datasets`)
    .txt .md          the whole file as {"text": ...}

All but .parquet and .arrow may be compressed: .jsonl.gz. Rows are read as they are asked for, but for .json and text.
"""

import csv
import gzip
import io
import json
import sys
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

Paths = str | Path | Iterable[str | Path]
Row = tuple[str, Any]
"""Where it stands (file:line, or file[index]) and what it is."""

NOT_DATA = ("dataset_info.json", "dataset_infos.json", "state.json", "dataset_dict.json")  # what `datasets` writes
TEXT = (".txt", ".md")  # in a folder of other data: a README, a licence


def kind(file: Path) -> str:
    """Return the suffix that says how to read a file, without .gz."""
    return Path(file.stem if file.suffix == ".gz" else file.name).suffix.lower()


def files(paths: Paths) -> list[Path]:
    """List the data files that files, folders and globs name; ValueError where there is none, or of no known kind."""
    found: list[Path] = []
    for path in [paths] if isinstance(paths, str | Path) else paths:
        path = Path(path)
        if path.is_file():
            here = [path]
        elif path.is_dir():
            here = sorted(f for f in path.rglob("*") if kind(f) in READERS and f.name not in NOT_DATA and f.is_file())
            here = [file for file in here if kind(file) not in TEXT] or here
        else:
            here = sorted(f for f in Path(path.anchor or ".").glob(str(path.relative_to(path.anchor))) if f.is_file())
        if not here and path.is_dir():
            raise ValueError(f"{path}: no data file in this folder; expected {', '.join(READERS)}")
        if not here:
            hub = "; a dataset of the hub is to be downloaded first: hf download --repo-type dataset --local-dir FOLDER"
            raise ValueError(
                f"{path}: no such file; give a file, a folder or a glob{hub if str(path).count('/') == 1 else ''}"
            )
        if odd := next((file for file in here if kind(file) not in READERS), None):
            raise ValueError(f"{odd}: unknown kind {odd.suffix!r}; expected one of {', '.join(READERS)}")
        found += here
    return found


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


def _text(file: Path) -> str:
    try:
        with _open(file) as lines:
            return lines.read().decode("utf-8-sig")
    except (UnicodeDecodeError, gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{file}: not UTF-8 text ({error})") from error


def _parsed(text: str | bytes, where: str) -> Any:
    try:
        data = json.loads(text)
        json.dumps(data, ensure_ascii=False).encode()  # a lone surrogate is no text
        return data
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: not valid JSON ({error}); expected one object a line") from error


def _json_lines(file: Path) -> Iterator[Row]:
    try:
        with _open(file) as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield f"{file}:{number}", _parsed(line, f"{file}:{number}")
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{file}: not a whole gzip file ({error})") from error


def _json(file: Path) -> Iterator[Row]:
    text = _text(file)
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
        data = data["data"]
    if isinstance(data, dict):
        yield f"{file}:1", data
    elif isinstance(data, list):
        yield from ((f"{file}[{i}]", row) for i, row in enumerate(data))
    else:
        raise ValueError(f"{file}: expected a list of objects, got {str(data)[:60]}")


def _table(file: Path, delimiter: str) -> Iterator[Row]:
    csv.field_size_limit(sys.maxsize)
    table = csv.DictReader(io.StringIO(_text(file), newline=""), delimiter=delimiter, strict=True)
    try:
        if twice := [name for name in table.fieldnames or () if (table.fieldnames or ()).count(name) > 1]:
            raise ValueError(f"{file}:1: the header has {twice[0]!r} twice")
        for row in table:
            where = f"{file}:{table.line_num}"
            if None in row or None in row.values():
                raise ValueError(f"{where}: another number of fields than the header's {len(table.fieldnames or ())}")
            yield where, row
    except csv.Error as error:
        raise ValueError(f"{file}:{table.line_num + 1}: not valid CSV ({error})") from error


def _columns(file: Path) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        if kind(file) == ".parquet":
            batches = pyarrow.parquet.ParquetFile(file).iter_batches()
        else:
            source = pyarrow.memory_map(str(file))
            try:
                reader = pyarrow.ipc.open_file(source)
                batches = (reader.get_batch(i) for i in range(reader.num_record_batches))
            except pyarrow.ArrowInvalid:
                batches = iter(pyarrow.ipc.open_stream(source))
        index = 0
        for batch in batches:
            for row in batch.to_pylist():
                yield f"{file}[{index}]", row
                index += 1
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{file}: not a valid {kind(file)[1:]} file ({error})") from error


READERS = {
    ".jsonl": _json_lines, ".ndjson": _json_lines, ".json": _json, ".csv": lambda file: _table(file, ","),
    ".tsv": lambda file: _table(file, "\t"), ".parquet": _columns, ".arrow": _columns,
    ".txt": lambda file: iter([(str(file), {"text": text})] if (text := _text(file)).strip() else []),
    ".md": lambda file: iter([(str(file), {"text": text})] if (text := _text(file)).strip() else []),
}  # fmt: skip
