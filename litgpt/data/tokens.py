"""Texts turned into one long row of token ids on disk, once, and mapped into memory from then on.

    .litgpt_cache/tokens-3f9a.../   named after its content: texts, tokenizer, format
        tokens.bin                  the ids, uint16 or uint32
        documents.bin               int64: where each document begins
        info.json                   figures, the whole fingerprint, and by which signs a text was seen to be unchanged

The ids of a document are `[bos] text [eos]`: bos where the tokenizer's own rule puts one, eos where it has one. Where
both are the same token, it stands once between two documents. Knows nothing of blocks, batches or torch.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import math
import os
import re
import time
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, islice, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from litgpt import storage
from litgpt.data.text import read_documents
from litgpt.errors import InputError, MachineError, UserError
from litgpt.report import Bar, quantity

if TYPE_CHECKING:
    from litgpt.tokenizer import Tokenizer

FORMAT = 1
CACHE = ".litgpt_cache"

_BATCH_CHARACTERS = 1 << 19  # encoded at a time
_PIECE_CHARACTERS = 1 << 16  # tokenizers take 200 bytes of memory for each byte of a text: a longer one is cut
_CONTEXT_CHARACTERS = 200  # what stands before a piece is encoded with it
_CUT = re.compile(r"(?<=\n)(?=\S)|(?<=\S)(?= \w)")  # where tokens usually end: before a line, or a space and a word
_COUNTED_TOKENS = 1 << 24  # of the training text, for the frequencies of a unigram model
_RUN = 1 << 12  # tokens, looked at together: a page or two
_SETTLED = 2_000_000_000  # ns after a change, when another one surely gets another time in any file system


class Text(NamedTuple):
    """What is known of a text file."""

    sha256: str
    signs: list[int] | None  # see `_signs`; None where it changed so lately that they do not tell


class TokenFile(NamedTuple):
    """All tokens of a corpus. Both arrays are memory-mapped: only what is looked at is read."""

    ids: np.ndarray  # (N,) uint16 or uint32
    documents: np.ndarray  # (D,) int64, where each document begins


class Piece(NamedTuple):
    """A document, or a part of a long one."""

    before: str  # what the document says just before it
    text: str
    begins: bool  # the document
    ends: bool


@dataclass(frozen=True)
class Corpus:
    """Text files, what turns them into tokens, and the folders where the result may lie, the preferred one first."""

    files: tuple[Path, ...]
    key: str  # of a .jsonl row
    tokenizer: Tokenizer
    places: tuple[Path, ...]

    @cached_property
    def fingerprint(self) -> str:
        """A hash of all that decides the tokens: kind and content of the texts in order, tokenizer, format."""
        texts = [("".join(file.suffixes[-2:]).lower(), self._texts[file].sha256) for file in self.files]
        facts = [FORMAT, self.tokenizer.fingerprint(), *self._edges, self.key, texts]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()

    @cached_property
    def _texts(self) -> dict[Path, Text]:
        """Hashes of the files: from the disk, unless the signs are those of a text that was tokenised before."""
        known = {signs: digest for place in self.places for signs, digest in _remembered(place)}
        return {file: _look_at(file, known) for file in self.files}

    @cached_property
    def _edges(self) -> tuple[list[int], list[int]]:
        """What stands before and after the text of a document."""
        eos = self.tokenizer.eos_id
        return self.tokenizer.encode(""), [] if eos is None else [eos]

    def prepare(self) -> None:
        """Write the token file, unless it is there. Interrupted, it leaves nothing that could be taken for one."""
        if self._found() is not None:
            return
        place = _writable(self.places)
        with alone_in(place):
            if self._found() is None:  # another run may have written it while we waited
                with storage.atomic_dir(place / self._name, overwrite=True) as folder:
                    self._write(folder)

    def open(self) -> TokenFile:
        """Map what `prepare` wrote."""
        folder = self._found()
        if folder is None:
            raise InputError(f"{self.places[0]}: holds no tokens of {self.files[0]}; call prepare_data first")
        dtype = storage.read_json(folder / "info.json")["dtype"]
        return TokenFile(_mapped(folder / "tokens.bin", dtype), _mapped(folder / "documents.bin", "int64"))

    @property
    def _name(self) -> str:
        return f"tokens-{self.fingerprint[:20]}"

    def _found(self) -> Path | None:
        folders = (place / self._name for place in self.places)
        vocab_size = self.tokenizer.vocab_size
        return next((folder for folder in folders if _is_whole(folder, self.fingerprint, vocab_size)), None)

    def _write(self, folder: Path) -> None:
        dtype = "uint16" if self.tokenizer.vocab_size <= 1 << 16 else "uint32"
        begins, total = array("q"), 0
        progress = _Progress(sum(file.stat().st_size for file in self.files))
        with open(folder / "tokens.bin", "wb") as out:
            for piece, ids in self._encoded(progress):
                if piece.begins:
                    begins.append(total)
                total += len(ids)
                out.write(np.array(ids, dtype=dtype).tobytes())
                progress.show(len(piece.text), total)
        (folder / "documents.bin").write_bytes(begins.tobytes())
        (folder / ".gitignore").write_text("*\n")
        facts = {"dtype": dtype, "tokens": total, "documents": len(begins), "fingerprint": self.fingerprint}
        texts = {str(file): text._asdict() for file, text in self._texts.items()}
        storage.write_json(folder / "info.json", {**facts, "files": texts})
        progress.close()

    def _encoded(self, progress: _Progress) -> Iterator[tuple[Piece, list[int]]]:
        begin, end = self._edges
        documents = progress.watch(self.files, self.key)
        opening = begin
        for pieces in _batches(chain.from_iterable(map(self._pieces, documents))):
            texts = [text for piece in pieces for text in (piece.before, piece.before + piece.text)]
            rows = self.tokenizer.encode_batch(texts, bos=False)
            for piece, before, row in zip(pieces, rows[::2], rows[1::2], strict=True):
                ids = row[len(before) :]
                yield piece, [*(opening if piece.begins else ()), *ids, *(end if piece.ends else ())]
                opening = begin if begin != end else []

    def _pieces(self, document: str) -> Iterator[Piece]:
        for start, stop in pairwise((0, *self._cuts(document), len(document))):
            before = document[max(start - _CONTEXT_CHARACTERS, 0) : start]
            yield Piece(before, document[start:stop], start == 0, stop == len(document))

    def _cuts(self, document: str) -> Iterator[int]:
        """Where to cut a long document without changing its tokens."""
        at = _PIECE_CHARACTERS
        while at < len(document):
            places = islice(_CUT.finditer(document, at), 100)
            cut = next((place.start() for place in places if self._ends_token(document, place.start())), None)
            if cut is not None:
                yield cut
            at = (cut or at) + _PIECE_CHARACTERS

    def _ends_token(self, document: str, at: int) -> bool:
        before, after = document[max(at - _CONTEXT_CHARACTERS, 0) : at], document[at : at + _CONTEXT_CHARACTERS]
        alone, together = self.tokenizer.encode_batch([before, before + after], bos=False)
        return together[: len(alone)] == alone


def _look_at(file: Path, known: Mapping[tuple[int, ...], str]) -> Text:
    stat = file.stat()  # before it is read: a change from now on gives other signs
    signs = _signs(stat)
    digest = known.get(tuple(signs)) or storage.sha256(file)
    return Text(digest, signs if time.time_ns() - stat.st_ctime_ns > _SETTLED else None)


def _signs(stat: os.stat_result) -> list[int]:
    """What is another after any change of a file; unlike the time of the content, that of the inode cannot be set."""
    return [stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]


def _remembered(place: Path) -> Iterator[tuple[tuple[int, ...], str]]:
    """Signs and hashes of all texts whose tokens lie in a cache folder."""
    for info in place.glob("tokens-*/info.json"):
        with suppress(UserError, OSError, KeyError, TypeError, AttributeError):  # damaged: as if it were not there
            for text in storage.read_json(info)["files"].values():
                if text["signs"]:
                    yield tuple(text["signs"]), str(text["sha256"])


def unigram_loss(train: np.ndarray, val: np.ndarray, vocab_size: int) -> float:
    """Nats per token of `val` under the token frequencies of `train`, each count plus one.

    Counts at most the first 17 million tokens of each. It is what a model reaches that knows no context: a language
    model that has learnt anything at all ends below it.
    """
    seen = np.bincount(train[:_COUNTED_TOKENS], minlength=vocab_size) + 1
    asked = np.bincount(val[:_COUNTED_TOKENS], minlength=vocab_size)
    return float(asked @ (math.log(seen.sum()) - np.log(seen)) / asked.sum())


def _batches(pieces: Iterable[Piece]) -> Iterator[list[Piece]]:
    batch: list[Piece] = []
    characters = 0
    for piece in pieces:
        batch.append(piece)
        characters += len(piece.text)
        if characters >= _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _mapped(path: Path, dtype: str) -> np.ndarray:
    return np.memmap(path, dtype=dtype, mode="r")


def _is_whole(folder: Path, fingerprint: str, vocab_size: int) -> bool:
    try:
        storage.verify(folder)  # the sizes of the .bin files
        facts = storage.read_json(folder / "info.json")
        if not (folder / storage.MANIFEST).is_file() or facts["fingerprint"] != fingerprint:
            return False
        return largest(_mapped(folder / "tokens.bin", facts["dtype"])) < vocab_size
    except (UserError, OSError, KeyError, TypeError, ValueError):
        return False


def largest(ids: np.ndarray) -> int:
    """The largest id: of all where they are few, else of evenly spread runs of them, for damage rarely comes alone."""
    if len(ids) <= _COUNTED_TOKENS:
        return int(ids.max(initial=0))
    starts = np.linspace(0, len(ids) - _RUN, _COUNTED_TOKENS // _RUN // 16, dtype=np.int64)
    return max(int(ids[start : start + _RUN].max()) for start in starts)


def _writable(places: tuple[Path, ...]) -> Path:
    for place in places:
        standing = next(path for path in (place, *place.parents) if path.exists())
        if standing.is_dir() and os.access(standing, os.W_OK | os.X_OK):
            return place
    tried = " and ".join(str(place) for place in places)
    raise InputError(f"no place to write the tokens to: tried {tried}; name a folder with --data.cache_dir")


@contextmanager
def alone_in(place: Path, writes: str = "writes tokens to", option: str = "--data.cache_dir") -> Iterator[None]:
    """One preparation at a time in a folder; the others wait. The lock goes with the process that holds it."""
    try:
        place.mkdir(parents=True, exist_ok=True)
        lock = os.open(place, os.O_RDONLY)
    except OSError as error:
        raise MachineError(f"{place}: cannot be made ({error.strerror}); name another with {option}") from error
    try:
        _wait_for(lock, f"{writes} {place}")
        yield
    finally:
        with suppress(OSError):
            place.rmdir()  # succeeds when it is empty: a refused text leaves nothing beside it
        os.close(lock)


def _wait_for(lock: int, doing: str) -> None:
    with suppress(OSError):  # of a file system without locks
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"waiting for another run that {doing}", flush=True)
            fcntl.flock(lock, fcntl.LOCK_EX)


class _Progress:
    """A bar over the share of the text that is tokenised, from the third second on."""

    def __init__(self, size: int) -> None:
        self.size, self.read = max(size, 1), 0  # bytes of the files
        self.seen, self.encoded = 0, 0  # characters of the documents that were read
        self.bar = Bar(1, "tokenizing", delay=3)

    def watch(self, files: Sequence[Path], key: str) -> Iterator[str]:
        """The documents of the files, counted as they are read."""
        for document in read_documents(files, key, self._add):
            self.seen += len(document)
            yield document

    def show(self, characters: int, tokens: int) -> None:
        """So many characters more are encoded, so many tokens are there in all."""
        self.encoded += characters
        share = self.read / self.size * self.encoded / self.seen
        self.bar.at(min(share, 1.0), f"{quantity(tokens)} tokens")

    def close(self) -> None:
        self.bar.close()

    def _add(self, size: int) -> None:
        self.read += size
