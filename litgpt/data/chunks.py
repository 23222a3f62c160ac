"""Tokens as litdata keeps them, read where they lie: a folder of chunks and an index.json that lists them.

    chunk-0-0.bin    uint32 N, uint32 offsets[N + 1], then the tokens of its N items, one after another

Only the tokens matter here: a chunk is one long row, cut into blocks. Chunks are mapped when a block of theirs is read,
since there may be more of them than a process may open.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from litgpt.data.loader import Blocks, Rows
from litgpt.data.tokens import largest
from litgpt.errors import InputError, MissingError
from litgpt.storage import inside, read_json

INDEX = "index.json"
DTYPES = {11: "uint8", 13: "int16", 14: "int16", 15: "int32", 16: "int32", 17: "int64", 18: "int64", 20: "uint16"}
OPEN = 64  # chunks at once


class Chunk(NamedTuple):
    """Where the tokens of a chunk lie."""

    path: Path
    begin: int  # byte
    tokens: int
    dtype: str


class ChunkedBlocks:
    """The blocks of a folder of chunks: block i of a chunk is `length` tokens and the one after them."""

    def __init__(self, folder: Path, length: int, vocab_size: int) -> None:
        self.length = length
        self.index = _index(folder)
        self.chunks = [_chunk(folder, entry, self.index) for entry in self.index["chunks"]]
        self._ends = np.cumsum([max(chunk.tokens - 1, 0) // length for chunk in self.chunks])
        for chunk in (self.chunks[0], self.chunks[-1]):
            if chunk.tokens and (found := largest(_mapped(chunk))) >= vocab_size:
                raise InputError(
                    f"{chunk.path}: holds token {found}, the tokenizer has {vocab_size}; take the one of these chunks"
                )

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> np.ndarray:
        at = int(np.searchsorted(self._ends, index, side="right"))
        before = int(self._ends[at - 1]) if at else 0
        return Blocks(_mapped(self.chunks[at]), self.length)[index - before]

    def fingerprint(self) -> str:
        """By the index, which has the sizes of all chunks: they are too large to be read for this."""
        facts = [(chunk.path.name, chunk.tokens, chunk.dtype) for chunk in self.chunks]
        return hashlib.sha256(repr(facts).encode()).hexdigest()


class Mixture:
    """Rows of several sources in given shares, until the first of them is used up; of the others evenly spread ones."""

    def __init__(self, sources: Sequence[Rows], shares: Sequence[float]) -> None:
        total = min(len(source) / share for source, share in zip(sources, shares, strict=True))
        self.sources = sources
        self.counts = [int(total * share + 1e-6) for share in shares]

    def __len__(self) -> int:
        return sum(self.counts)

    def __getitem__(self, index: int) -> Any:
        for source, count in zip(self.sources, self.counts, strict=True):
            if index < count:
                return source[index * len(source) // count]
            index -= count
        raise IndexError(index)


def _index(folder: Path) -> dict[str, Any]:
    path = folder / INDEX
    if not path.is_file():
        raise MissingError(
            f"{folder}: no folder of litdata chunks ({INDEX} is missing); make one with litdata's optimize(), or train "
            "on text itself with --data TextFiles"
        )
    index = read_json(path)
    config = index.get("config")
    if not isinstance(index.get("chunks"), list) or not index["chunks"] or not isinstance(config, dict):
        raise InputError(f"{path}: lists no chunks; make the folder again")
    for what in ("compression", "encryption"):
        if config.get(what):
            raise InputError(f"{path}: chunks with {what} are not read; make the folder again without it")
    return index


def _chunk(folder: Path, entry: Any, index: dict[str, Any]) -> Chunk:
    try:
        name, items, tokens = str(entry["filename"]), int(entry["chunk_size"]), int(entry["dim"])
        serializer, _, number = str(index["config"]["data_format"][0]).partition(":")
        dtype = DTYPES[int(number)] if serializer == "no_header_tensor" else ""
    except (KeyError, TypeError, ValueError, IndexError):
        dtype = ""
    if not dtype:
        raise InputError(
            f"{folder / INDEX}: these chunks hold no tokens; make them with optimize(item_loader=TokensLoader())"
        )
    chunk = Chunk(inside(folder, name), 4 * (items + 2), tokens, dtype)
    size = chunk.begin + tokens * np.dtype(dtype).itemsize
    if not chunk.path.is_file():
        raise MissingError(f"{chunk.path} is missing; copy the folder again")
    if chunk.path.stat().st_size < size:
        raise InputError(f"{chunk.path} is damaged: expected {size:,} bytes; copy the folder again")
    return chunk


@lru_cache(OPEN)
def _mapped(chunk: Chunk) -> np.ndarray:
    if not chunk.tokens:
        return np.empty(0, chunk.dtype)
    return np.memmap(chunk.path, dtype=chunk.dtype, mode="r", offset=chunk.begin, shape=(chunk.tokens,))
