"""Plain text as it lies on the user's disk: tokenised once, mapped into memory, read in blocks."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from litgpt.data.base import DataModule, Loader, StatefulLoader
from litgpt.data.text import text_files
from litgpt.data.tokens import CACHE, Corpus, unigram_loss
from litgpt.errors import InputError

if TYPE_CHECKING:
    from litgpt.tokenizer import Tokenizer


@dataclass
class TextFiles(DataModule):
    """Text files to pretrain on: .txt and .md (one document each), .jsonl (one document a row), plain, .gz or .zst."""

    train_data_path: Path
    """A text file, or a folder that is searched to the bottom."""
    val_data_path: Path | None = None
    """The same for validation; null: the last tokens of the training text validate."""
    seed: int = 42
    """Of the order in which blocks of text are trained on."""
    num_workers: int = 4
    """Has no effect: blocks are slices of a mapped file, which need no worker processes."""
    val_fraction: float = 0.05
    """The share of tokens that validates when there is no val_data_path; 0: none."""
    text_key: str = "text"
    """The key of a .jsonl row that holds the text."""
    cache_dir: Path | None = None
    """Where the tokens are kept; null: in .litgpt_cache beside the text, or in ~/.cache/litgpt if that is read-only."""

    def __post_init__(self) -> None:
        self.train_data_path = Path(self.train_data_path).expanduser()
        self.val_data_path = self.val_data_path and Path(self.val_data_path).expanduser()
        self.cache_dir = self.cache_dir and Path(self.cache_dir).expanduser()

    def connect(self, tokenizer: Tokenizer, batch_size: int, max_seq_length: int) -> None:
        self._require_valid_fields()
        self._tokenizer, self._batch_size, self._length = tokenizer, batch_size, max_seq_length
        self._train_corpus = self._corpus(self.train_data_path)
        self._val_corpus = self._corpus(self.val_data_path) if self.val_data_path else None

    def prepare_data(self) -> None:
        self._train_corpus.prepare()
        if self._val_corpus:
            self._val_corpus.prepare()

    def longest_row(self) -> int:
        tokens = len(self._train_corpus.open().ids)
        return max(tokens - self._validating(tokens) - 1, 1)  # the last token is a label only

    def setup(self) -> None:
        ids = self._train_corpus.open().ids
        n_val = self._validating(len(ids))
        self._train, self._val = ids[: len(ids) - n_val], ids[len(ids) - n_val :]
        if self._val_corpus:
            self._val = self._val_corpus.open().ids
        self._require_enough(len(ids))

    def train_dataloader(self, rank: int = 0, world_size: int = 1) -> StatefulLoader:
        from litgpt.data.loader import Blocks, TrainLoader

        blocks = Blocks(self._train, self._length)
        return TrainLoader(blocks, blocks.collate, self._batch_size, self.seed, rank, world_size)

    def val_dataloader(self, rank: int = 0, world_size: int = 1) -> Loader:
        from litgpt.data.loader import Blocks, ValLoader

        length = max(min(self._length, len(self._val) - 1), 1)  # a text shorter than a block is a shorter block
        blocks = Blocks(self._val, length, partial=True)
        return ValLoader(blocks, blocks.collate, self._batch_size, rank, world_size)

    def fingerprint(self) -> str:
        split = self._val_corpus.fingerprint if self._val_corpus else self.val_fraction
        return hashlib.sha256(json.dumps([self._train_corpus.fingerprint, split]).encode()).hexdigest()

    def without_effect(self) -> list[str]:
        return ["data.num_workers"] if self.num_workers != TextFiles.num_workers else []

    def unigram_loss(self) -> float | None:
        if not len(self._val):
            return None
        return unigram_loss(self._train, self._val, self._tokenizer.vocab_size)

    def _corpus(self, path: Path) -> Corpus:
        beside = (path if path.is_dir() else path.parent) / CACHE
        home = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "litgpt"
        places = (self.cache_dir,) if self.cache_dir else (beside, home)
        return Corpus(tuple(text_files(path)), self.text_key, self._tokenizer, places)

    def _validating(self, tokens: int) -> int:
        """How many of the training text's tokens validate."""
        return max(2, round(tokens * self.val_fraction)) if self.val_fraction and not self._val_corpus else 0

    def _require_valid_fields(self) -> None:
        # not in the constructor: jsonargparse would bury the line in one of its own
        if not 0 <= self.val_fraction < 1:
            raise InputError(
                f"data.val_fraction is {self.val_fraction}; give a share from 0 (no validation) to below 1"
            )
        if self.num_workers < 0:
            raise InputError(f"data.num_workers is {self.num_workers}; give 0 or more")
        if self.seed < 0:
            raise InputError(f"data.seed is {self.seed}; give 0 or more")

    def _require_enough(self, in_all: int) -> None:
        if len(self._val) == 1:
            raise InputError(f"{self.val_data_path}: too short to validate, which takes at least two tokens; add text")
        training = len(self._train)
        if training > self._length:
            return
        rest = f" ({in_all - training:,} more validate)" if in_all > training else ""
        lower = f"lower --train.max_seq_length to at most {training - 1} or " if training > 1 else ""
        raise InputError(
            f"{self.train_data_path}: {training:,} training tokens{rest} are fewer than one block of max_seq_length "
            f"{self._length:,} and the token after it; {lower}add text"
        )
