"""Reads plain text: finds the files, opens what is compressed, yields one document after another.

Knows nothing of tokens. No file is held whole but a .txt or .md, which is one document; .jsonl streams line by line.
"""

from __future__ import annotations

import json
import os
import stat
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from litgpt.errors import InputError, MachineError, MissingError, extra_missing, shown

KINDS = (".txt", ".md", ".jsonl")
EXPECTED = ".txt, .md or .jsonl files, each also as .gz or .zst"

BOM = "\ufeff"
_READ_BYTES = 1 << 18
_ROWS_COUNTED = 1000  # rows after the first bad one of which an error says how many are bad too


def text_files(paths: Path | str | Sequence[Path | str]) -> list[Path]:
    """The text files among `paths`: files as given, folders searched to the bottom; sorted, each once.

    In folders, hidden files and folders (`.git`, `.cache`), other suffixes, pipes, sockets and devices are passed over.
    Raises MissingError for a path that is not there, InputError for one that holds no text.
    """
    several = [paths] if isinstance(paths, (str, Path)) else list(paths)
    if not several:
        raise InputError(f"no text was given: name a file or a folder of {EXPECTED}")
    return sorted({file for path in several for file in _found_under(Path(path))})


def read_documents(
    files: Iterable[Path], key: str = "text", on_read: Callable[[int], object] = lambda size: None
) -> Iterator[str]:
    """One stripped document for each .txt or .md file and for each row of a .jsonl file (its field `key`).

    Line ends become "\\n". A row whose text is blank is no document; a file without any is refused, since a file that
    was meant to be text and is empty is more often a failed copy than a wish. `on_read` is told each number of bytes
    that was taken from the disk.
    """
    for file in files:
        chunks = file_chunks(file, on_read)
        documents = _rows(chunks, file, key) if _kind(file) == ".jsonl" else _whole(chunks, file)
        yield from _at_least_one(documents, file)


def _found_under(path: Path) -> list[Path]:
    if path.is_dir():
        return _search(path)
    if not path.exists():
        raise MissingError(f"{path}: no such file or folder; expected {EXPECTED}")
    if _kind(path) is None:
        raise InputError(f"{path}: not a kind of text file that is read; expected {EXPECTED}")
    if _is_special(path):
        raise InputError(f"{path}: a pipe, socket or device, which is read only once; copy what it gives into a file")
    return [path]


def _is_special(path: Path) -> bool:
    try:
        return not stat.S_ISREG(path.stat().st_mode)
    except OSError:  # a link to nowhere: refused when it is opened
        return False


def _search(folder: Path) -> list[Path]:
    found: list[Path] = []
    others: list[Path] = []
    for parent, folders, names in os.walk(folder, onerror=_raise_unreadable):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for path in (Path(parent, name) for name in names if not name.startswith(".")):
            (others if _kind(path) is None or _is_special(path) else found).append(path)
    if not found:
        raise InputError(f"{folder}: no text in this folder; expected {EXPECTED}; found {_summary(others)}")
    return found


def _raise_unreadable(error: OSError) -> None:
    raise InputError(f"{error.filename}: this folder cannot be read ({error.strerror}); check its permissions")


def _summary(others: list[Path]) -> str:
    """What a folder holds instead, in a few words: `a.csv, b.png and 7 more`."""
    names = sorted(path.name for path in others)
    if not names:
        return "nothing"
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _kind(path: Path) -> str | None:
    """The suffix below any compression, in lower case, when it is one that we read."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in DECODERS:
        suffixes.pop()
    return suffixes[-1] if suffixes and suffixes[-1] in KINDS else None


def _at_least_one(documents: Iterator[str], file: Path) -> Iterator[str]:
    count = 0
    for document in documents:
        if document:
            count += 1
            yield document
    if not count:
        raise InputError(f"{file}: holds no text (empty or blank); remove the file or fill it")


def _whole(chunks: Iterator[bytes], file: Path) -> Iterator[str]:
    text = decoded(b"".join(chunks), str(file)).removeprefix(BOM)
    yield text.replace("\r\n", "\n").replace("\r", "\n").strip()


def _rows(chunks: Iterator[bytes], file: Path, key: str) -> Iterator[str]:
    offset = 0
    lines = byte_lines(chunks)
    for number, line in enumerate(lines, start=1):
        where = f"{file}:{number}"
        text = decoded(line, where, offset).strip(BOM)
        if text.strip():
            row = _row(text, where, key)
            if key not in row:
                more = sum(_lacks(key, other) for other in islice(lines, _ROWS_COUNTED))
                raise InputError(f"{where}: row {number} has no key {shown(key)}; {_remedy(row, more)}")
            yield _text_of_row(row, where, key)
        offset += len(line)


def _row(line: str, where: str, key: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise InputError(f"{where}: not a JSON row ({error.msg} at column {error.colno}); mend or remove it") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: not a JSON row ({error}); mend or remove it") from None
    if not isinstance(row, dict):
        raise InputError(f'{where}: a row must be an object such as {{"{key}": "..."}}, not {json_type(row)}')
    return row


def _lacks(key: str, line: bytes) -> bool:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return False
    return isinstance(row, dict) and key not in row


def _remedy(row: dict[str, Any], more: int) -> str:
    also = f" (nor have {more:,} of the next {_ROWS_COUNTED:,} rows)" if more else ""
    return f"it has {listed(row)}{also}; rename the key, or name it with --data.text_key where you pretrain"


def _text_of_row(row: dict[str, Any], where: str, key: str) -> str:
    text = row[key]
    if not isinstance(text, str):
        raise InputError(f"{where}: the value of {shown(key)} must be text, not {json_type(text)}")
    return whole_characters(text, where, key).strip()


def whole_characters(text: str, where: str, key: str) -> str:
    # JSON may spell half of a pair ("\ud83d"), which is no character: no tokenizer takes it
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = text[error.start]
        raise InputError(f"{where}: {shown(key)} holds half a character ({half!r} at position {error.start})") from None
    return text


def json_type(value: object) -> str:
    names = {type(None): "null", bool: "a boolean", int: "a number", float: "a number", str: "text", list: "a list"}
    return names.get(type(value), "an object")


def listed(row: dict) -> str:
    keys = [shown(name) for name in row]
    return ", ".join(keys[:5]) + (f" and {len(keys) - 5} more" if len(keys) > 5 else "") if keys else "none"


def decoded(data: bytes, where: str, offset: int = 0) -> str:
    """UTF-8, or the error that says at which byte of the (decompressed) file it ends being that."""
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise InputError(f"{where}: not UTF-8 at byte {offset}; it looks like UTF-16: {_convert('UTF-16')}")
    if (zero := data.find(b"\0")) >= 0:
        raise InputError(f"{where}: binary, not text (byte {offset + zero} is zero); give text files in UTF-8")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        byte = data[error.start]
        guess = "CP1252" if 0x80 <= byte <= 0x9F else "LATIN1"
        found = f"byte {offset + error.start} is 0x{byte:02x}"
        raise InputError(f"{where}: not UTF-8 ({found}); it may be {guess}: {_convert(guess)}") from None


def _convert(encoding: str) -> str:
    return f"convert it with iconv -f {encoding} -t UTF-8"


def byte_lines(chunks: Iterable[bytes]) -> Iterator[bytes]:
    """The lines with their ends; the last one may lack it."""
    begun: list[bytes] = []
    for chunk in chunks:
        *ended, tail = chunk.split(b"\n")
        for line in ended:
            yield b"".join((*begun, line, b"\n"))
            begun = []
        begun.append(tail)
    if any(begun):
        yield b"".join(begun)


def file_chunks(file: Path, on_read: Callable[[int], object]) -> Iterator[bytes]:
    """The decompressed bytes of a file, a piece at a time."""
    suffix = file.suffix.lower()
    try:
        stored = _stored(file, on_read)
        yield from _decompressed(stored, file, DECODERS[suffix]) if suffix in DECODERS else stored
    except (FileNotFoundError, PermissionError, IsADirectoryError) as error:
        raise InputError(f"{file}: cannot be opened ({error.strerror}); check its path and permissions") from None
    except OSError as error:
        raise MachineError(f"{file}: cannot be read ({error.strerror or error}); check the disk") from None


def _stored(file: Path, on_read: Callable[[int], object]) -> Iterator[bytes]:
    with open(file, "rb") as stream:
        while chunk := stream.read(_READ_BYTES):
            on_read(len(chunk))
            yield chunk


def _decompressed(
    stored: Iterator[bytes], file: Path, decoder: Callable[[], tuple[Any, type[Exception]]]
) -> Iterator[bytes]:
    # frame by frame: the stream reader of zstandard takes a file that was cut short for a whole one
    frame, broken = decoder()
    begun = False
    try:
        for data in stored:
            while data:
                yield frame.decompress(data)
                begun, data = not frame.eof, frame.unused_data
                frame = decoder()[0] if frame.eof else frame
    except broken as error:
        raise InputError(f"{file}: broken ({error}); copy it again") from None
    if begun:
        raise InputError(f"{file}: broken (cut short); copy it again")


def _gzip() -> tuple[Any, type[Exception]]:
    return zlib.decompressobj(wbits=zlib.MAX_WBITS | 16), zlib.error  # 16: with the header of a .gz file


def _zstd() -> tuple[Any, type[Exception]]:
    try:
        import zstandard
    except ImportError:
        raise extra_missing("zstandard", "data") from None
    return zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj(), zstandard.ZstdError


DECODERS = {".gz": _gzip, ".zst": _zstd}  # a fresh decoder of one frame, and what it raises
