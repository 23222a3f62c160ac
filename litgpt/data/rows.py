"""Files of rows: .json, .jsonl, .csv and .parquet are read row by row, each row with the words on where it stands.

What one row gets wrong is a `Broken` row, so that a reader can count all of them; what a whole file gets wrong is an
InputError. Knows nothing of what the rows mean.
"""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from litgpt.data.text import BOM, DECODERS, byte_lines, decoded, file_chunks, json_type, listed
from litgpt.errors import InputError, MissingError, extra_missing, one_line, shown

EXPECTED = ".json, .jsonl or .csv (each also as .gz or .zst), or .parquet"

Row = tuple[str, Any]  # where it stands, and what stands there: a mapping of keys to values where all is well


@dataclass(frozen=True)
class Broken:
    """Stands for a row that cannot be read."""

    reason: str


class Doubled(dict):
    """A JSON object that has the same key twice, of which `key` is one."""

    key: str


def read_rows(file: Path) -> Iterator[Row]:
    """The rows of a file, from the first on; raises MissingError or InputError, and none is left out."""
    if not file.is_file():
        raise MissingError(f"{file}: {'this is a folder' if file.is_dir() else 'no such file'}; give {EXPECTED}")
    reader = _READERS.get(kind_of(file))
    if reader is None:
        raise InputError(f"{file}: not a kind of file that holds records; expected {EXPECTED}")
    return reader(file)


def kind_of(file: Path) -> str:
    """The suffix below any compression, in lower case: ".jsonl" of a.JSONL.gz; "" when it is none that we read."""
    suffixes = [suffix.lower() for suffix in file.suffixes]
    if suffixes and suffixes[-1] in DECODERS:
        suffixes.pop()
        return suffixes[-1] if suffixes and suffixes[-1] in _TEXT else ""
    return suffixes[-1] if suffixes and suffixes[-1] in _READERS else ""


# JSON -----------------------------------------------------------------------------------------------------------------


def _json_list(file: Path) -> Iterator[Row]:
    text = decoded(b"".join(file_chunks(file, _ignore)), str(file)).removeprefix(BOM)
    if not text.strip():
        return
    try:
        value = json.loads(text, object_pairs_hook=_object)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data" and _is_object(text.lstrip().partition("\n")[0]):
            yield from _json_lines(file)  # one object a line, under the name of the other kind
            return
        raise InputError(f"{file}:{error.lineno}: not JSON ({error.msg} at column {error.colno}); mend it") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{file}: not JSON ({_beyond(error)}); mend it") from None
    if not isinstance(value, list):
        raise InputError(f"{file}: expected a list of records, found {_found(value)}")
    yield from ((f"{file}: record {number}", row) for number, row in enumerate(value, start=1))


def _found(value: Any) -> str:
    if not isinstance(value, dict):
        return json_type(value)
    inside = next((key for key, item in value.items() if isinstance(item, list)), None)
    lead = f"; write the list at {shown(inside)} alone into the file" if inside is not None else "; put it in [ ]"
    return f"one object with {listed(value)}{lead}"


def _json_lines(file: Path) -> Iterator[Row]:
    offset = 0
    for number, line in enumerate(byte_lines(file_chunks(file, _ignore)), start=1):
        where = f"{file}:{number}"
        text = decoded(line, where, offset)
        text = (text.removeprefix(BOM) if number == 1 else text).strip()
        if text:
            yield where, _json_row(text)
        offset += len(line)


def _json_row(text: str) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_object)
    except json.JSONDecodeError as error:
        return Broken(f"not a JSON row ({error.msg} at column {error.colno})")
    except (ValueError, RecursionError) as error:
        return Broken(f"not a JSON row ({_beyond(error)})")


def _beyond(error: ValueError | RecursionError) -> str:
    """What Python's limits say, in the words of one who wrote the file."""
    return "it is nested too deep" if isinstance(error, RecursionError) else "it holds a number of thousands of digits"


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) == len(pairs):
        return value
    doubled, keys = Doubled(value), [key for key, _ in pairs]
    doubled.key = next(key for key in keys if keys.count(key) > 1)
    return doubled


def _is_object(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


# Tables ---------------------------------------------------------------------------------------------------------------


def _csv(file: Path) -> Iterator[Row]:
    with _long_fields():
        reader = csv.reader(_text_lines(file), strict=True)
        header: list[str] = []
        while not any(name.strip() for name in header):
            found = _next(reader, file)
            if found is None:
                return
            header = found
        if doubled := [name for name in header if header.count(name) > 1]:
            raise InputError(f"{file}: the first row names the column {shown(doubled[0])} twice; rename one")
        begin = reader.line_num + 1
        while (cells := _next(reader, file)) is not None:
            where, begin = f"{file}:{begin}", reader.line_num + 1
            if not any(cell.strip() for cell in cells):  # a blank line, or what a spreadsheet makes of one
                continue
            if len(cells) != len(header):
                yield where, Broken(f"has {len(cells)} cells, the first row names {len(header)} columns")
            else:
                yield where, dict(zip(header, cells, strict=True))


def _next(reader: Any, file: Path) -> list[str] | None:
    try:
        return next(reader, None)
    except csv.Error as error:
        raise InputError(f"{file}:{reader.line_num}: not CSV ({error}); mend it") from None


def _text_lines(file: Path) -> Iterator[str]:
    offset = 0
    for number, line in enumerate(byte_lines(file_chunks(file, _ignore)), start=1):
        text = decoded(line, f"{file}:{number}", offset)
        yield text.removeprefix(BOM) if number == 1 else text
        offset += len(line)


@contextmanager
def _long_fields() -> Iterator[None]:
    """Lets a cell be as long as a text is; the csv module keeps the limit for the whole process."""
    before = csv.field_size_limit(sys.maxsize)
    try:
        yield
    finally:
        csv.field_size_limit(before)


def _parquet(file: Path) -> Iterator[Row]:
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise extra_missing("pyarrow", "data") from None
    try:
        with ParquetFile(file) as table:
            names = table.schema_arrow.names
            if doubled := [name for name in names if names.count(name) > 1]:
                raise InputError(f"{file}: has the column {shown(doubled[0])} twice; rename one")
            number = 0
            for batch in table.iter_batches(batch_size=1024):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{file}: record {number}", row
    except (ArrowException, OSError) as error:
        raise InputError(f"{file}: not a whole Parquet file ({one_line(error)[:200]}); copy it again") from None


def _ignore(n_bytes: int) -> None:
    """Nobody watches how far the reading is."""


def numbered(rows: Iterable[Any], name: str) -> Iterator[Row]:
    """Rows that come from no file of ours, counted."""
    return ((f"{name}: record {number}", row) for number, row in enumerate(rows, start=1))


_TEXT = {".json": _json_list, ".jsonl": _json_lines, ".ndjson": _json_lines, ".csv": _csv}
_READERS = {**_TEXT, ".parquet": _parquet}
