"""Tokens that were prepared with litdata, as for TinyLlama: folders of chunks on this disk."""

from __future__ import annotations

import hashlib
import re
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from litgpt.data.base import DataModule, Loader, StatefulLoader
from litgpt.errors import InputError

if TYPE_CHECKING:
    from litgpt.data.chunks import ChunkedBlocks
    from litgpt.tokenizer import Tokenizer


@dataclass
class Chunked(DataModule):
    """Folders of chunks to train on, in given shares, and one to validate with."""

    data_path: str | Path = Path("data")
    """Where the folders lie."""
    seed: int = 42
    """Of the order in which blocks are trained on."""
    num_workers: int = 8
    """Has no effect: blocks are slices of mapped files, which need no worker processes."""

    @abstractmethod
    def sources(self) -> tuple[dict[str, float], str]:
        """Folders below data_path that train, each with its share, and the one that validates."""

    def connect(self, tokenizer: Tokenizer, batch_size: int, max_seq_length: int) -> None:
        if re.match(r"\w+:/", str(self.data_path)):
            raise InputError(
                f"data.data_path {self.data_path}: only chunks on a disk are read; copy the folder here first"
            )
        self._tokenizer, self._batch_size, self._length = tokenizer, batch_size, max_seq_length

    def setup(self) -> None:
        from litgpt.data.chunks import Mixture

        shares, val = self.sources()
        self._train = [self._open(name) for name in shares]
        self._val = self._open(val)
        self._mixture = Mixture(self._train, list(shares.values()))
        if not len(self._mixture):
            raise InputError(
                f"{self.data_path}: no chunk is as long as a block of max_seq_length {self._length:,} and the token "
                "after it; lower --train.max_seq_length"
            )

    def train_dataloader(self, rank: int = 0, world_size: int = 1) -> StatefulLoader:
        from litgpt.data.loader import TrainLoader

        return TrainLoader(self._mixture, self._collate, self._batch_size, self.seed, rank, world_size)

    def val_dataloader(self, rank: int = 0, world_size: int = 1) -> Loader:
        from litgpt.data.loader import ValLoader

        return ValLoader(self._val, self._collate, self._batch_size, rank, world_size)

    def fingerprint(self) -> str:
        parts = [self._length, self._mixture.counts, *(blocks.fingerprint() for blocks in (*self._train, self._val))]
        return hashlib.sha256(repr(parts).encode()).hexdigest()

    def without_effect(self) -> list[str]:
        return ["data.num_workers"] if self.num_workers != Chunked.num_workers else []

    def _open(self, name: str) -> ChunkedBlocks:
        from litgpt.data.chunks import ChunkedBlocks

        return ChunkedBlocks(Path(self.data_path).expanduser() / name, self._length, self._tokenizer.vocab_size)

    def _collate(self, rows: Sequence, batch_size: int):  # type: ignore[no-untyped-def]
        import numpy as np

        from litgpt.data.loader import Blocks

        return Blocks(np.empty(0), self._length).collate(rows, batch_size)


@dataclass
class LitData(Chunked):
    """A folder of litdata chunks (made with TokensLoader), or two folders below it: one trains, one validates."""

    split_names: tuple[str, str] | None = None
    """The names of the two folders; null: the chunks of data_path train and validate."""

    def sources(self) -> tuple[dict[str, float], str]:
        train, val = self.split_names or ("", "")
        return {train: 1.0}, val


@dataclass
class TinyLlama(Chunked):
    """What TinyLlama was trained on, as chunks: slimpajama/train, slimpajama/val and starcoder below data_path."""

    use_starcoder: bool = True
    """Train on code, too: 3 of 10 blocks."""

    SHARES: ClassVar[dict[str, float]] = {"slimpajama/train": 0.693584, "starcoder": 0.306416}

    def sources(self) -> tuple[dict[str, float], str]:
        shares = self.SHARES if self.use_starcoder else {"slimpajama/train": 1.0}
        return shares, "slimpajama/val"


@dataclass
class MicroLlama(TinyLlama):
    """What MicroLlama was trained on, as chunks: slimpajama/train and slimpajama/val below data_path."""

    use_starcoder: bool = True
    """Has no effect: code is not part of it."""

    SHARES: ClassVar[dict[str, float]] = {"slimpajama/train": 1.0}
