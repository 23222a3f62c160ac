"""Texts turned into one long row of token ids on disk, once, and mapped into memory from then on.

    .litgpt_cache/tokens-3f9a.../   named after its content: texts, tokenizer, format
        tokens.bin                  the ids, uint16 or uint32
        documents.bin               int64: where each document begins
        info.json                   figures, and the whole fingerprint

The ids of a document are `[bos] text [eos]`: bos where the tokenizer's own rule puts one, eos where it has one. Where
both are the same token, it stands once between two documents. Knows nothing of blocks, batches or torch.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import math
import os
import sys
import time
from array import array
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from litgpt import storage
from litgpt.data.text import read_documents
from litgpt.errors import InputError, MachineError, UserError
from litgpt.report import duration, quantity

if TYPE_CHECKING:
    from litgpt.tokenizer import Tokenizer

FORMAT = 1
CACHE = ".litgpt_cache"

_BATCH_CHARACTERS = 1 << 21  # encoded at a time, if no single document is longer
_COUNTED_TOKENS = 1 << 24  # of the training text, for the frequencies of a unigram model


class TokenFile(NamedTuple):
    """All tokens of a corpus. Both arrays are memory-mapped: only what is looked at is read."""

    ids: np.ndarray  # (N,) uint16 or uint32
    documents: np.ndarray  # (D,) int64, where each document begins


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
        texts = [("".join(file.suffixes[-2:]).lower(), storage.sha256(file)) for file in self.files]
        facts = [FORMAT, self.tokenizer.fingerprint(), *self._edges, self.key, texts]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()

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
        with _alone_in(place):
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
        return next((folder for folder in folders if _is_whole(folder, self.fingerprint)), None)

    def _write(self, folder: Path) -> None:
        dtype = "uint16" if self.tokenizer.vocab_size <= 1 << 16 else "uint32"
        begins, total = array("q"), 0
        progress = _Progress(sum(file.stat().st_size for file in self.files))
        with open(folder / "tokens.bin", "wb") as out:
            for ids in self._documents(progress):
                begins.append(total)
                total += len(ids)
                out.write(np.array(ids, dtype=dtype).tobytes())
                progress.show(total)
        (folder / "documents.bin").write_bytes(begins.tobytes())
        (folder / ".gitignore").write_text("*\n")
        facts = {"dtype": dtype, "tokens": total, "documents": len(begins), "fingerprint": self.fingerprint}
        storage.write_json(folder / "info.json", {**facts, "files": [str(file) for file in self.files]})
        progress.close()

    def _documents(self, progress: _Progress) -> Iterator[list[int]]:
        begin, end = self._edges
        first = True
        for texts in _batches(read_documents(self.files, self.key, progress.add)):
            for ids in self.tokenizer.encode_batch(texts, bos=False):
                yield [*(begin if first or begin != end else ()), *ids, *end]
                first = False


def unigram_loss(train: np.ndarray, val: np.ndarray, vocab_size: int) -> float:
    """Nats per token of `val` under the token frequencies of `train`, each count plus one.

    Counts at most the first 17 million tokens of each. It is what a model reaches that knows no context: a language
    model that has learnt anything at all ends below it.
    """
    seen = np.bincount(train[:_COUNTED_TOKENS], minlength=vocab_size) + 1
    asked = np.bincount(val[:_COUNTED_TOKENS], minlength=vocab_size)
    return float(asked @ (math.log(seen.sum()) - np.log(seen)) / asked.sum())


def _batches(documents: Iterable[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    characters = 0
    for document in documents:
        batch.append(document)
        characters += len(document)
        if characters >= _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _mapped(path: Path, dtype: str) -> np.ndarray:
    return np.memmap(path, dtype=dtype, mode="r")


def _is_whole(folder: Path, fingerprint: str) -> bool:
    try:
        storage.verify(folder)  # the sizes of the .bin files
        facts = storage.read_json(folder / "info.json")
        return (folder / storage.MANIFEST).is_file() and facts["fingerprint"] == fingerprint
    except (UserError, OSError, KeyError):
        return False


def _writable(places: tuple[Path, ...]) -> Path:
    for place in places:
        standing = next(path for path in (place, *place.parents) if path.exists())
        if standing.is_dir() and os.access(standing, os.W_OK | os.X_OK):
            return place
    tried = " and ".join(str(place) for place in places)
    raise InputError(f"no place to write the tokens to: tried {tried}; name a folder with --data.cache_dir")


@contextmanager
def _alone_in(place: Path) -> Iterator[None]:
    """One preparation at a time in a cache folder; the others wait. The lock goes with the process that holds it."""
    try:
        place.mkdir(parents=True, exist_ok=True)
        lock = os.open(place, os.O_RDONLY)
    except OSError as error:
        raise MachineError(f"{place}: cannot be made ({error.strerror}); name another with --data.cache_dir") from error
    try:
        with suppress(OSError):  # a file system without locks
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        with suppress(OSError):
            place.rmdir()  # succeeds when it is empty: a refused text leaves nothing beside it
        os.close(lock)


class _Progress:
    """A line about the share of bytes that is tokenised: from the third second on, every few seconds."""

    def __init__(self, size: int) -> None:
        self.size, self.done = size, 0
        self.start = time.monotonic()
        self.next = self.start + 3
        self.moving = sys.stdout.isatty()
        self.said = False

    def add(self, size: int) -> None:
        self.done += size

    def show(self, tokens: int) -> None:
        now = time.monotonic()
        if now >= self.next:
            self.next, self.said = now + (0.5 if self.moving else 5), True
            left = (now - self.start) * (self.size - self.done) / max(self.done, 1)
            words = f"tokenizing: {self.done / max(self.size, 1):4.0%}  {quantity(tokens)} tokens  ETA {duration(left)}"
            print(f"\r\033[K{words}" if self.moving else words, end="" if self.moving else "\n", flush=True)

    def close(self) -> None:
        if self.said and self.moving:
            print()
