"""Alpaca: instructions with answers of a larger model, and two sets of the same format."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from litgpt.data import fetch
from litgpt.data.downloaded import Downloaded
from litgpt.data.records import Record, require_fraction, split

if TYPE_CHECKING:
    from litgpt.tokenizer import Tokenizer

_CLEANED = "https://raw.githubusercontent.com/tloen/alpaca-lora/main/alpaca_data_cleaned_archive.json"
_GPT4 = "https://raw.githubusercontent.com/Instruction-Tuning-with-GPT-4/GPT-4-LLM/main/data/alpaca_gpt4_data.json"


@dataclass
class Alpaca(Downloaded):
    """Alpaca, cleaned: 51,759 instructions."""

    val_split_fraction: float = 0.03865  # 2000 records
    """The share of records that validates, drawn at random; 0: none."""
    download_dir: Path = Path("data/alpaca")
    """Where the file is kept."""
    file_url: str = _CLEANED
    """Where the file comes from."""
    file_name: str = "alpaca_data_cleaned_archive.json"
    """What it is called in download_dir."""

    def connect(self, tokenizer: Tokenizer, batch_size: int, max_seq_length: int) -> None:
        require_fraction(self.val_split_fraction)
        super().connect(tokenizer, batch_size, max_seq_length)

    def fetch(self) -> None:
        fetch.file(self.file_url, Path(self.download_dir) / self.file_name)

    def records(self) -> tuple[Sequence[Record], Sequence[Record]]:
        found = self.read([Path(self.download_dir) / self.file_name], "instruction")
        return split(found, self.val_split_fraction, self.seed)


@dataclass
class Alpaca2k(Alpaca):
    """2,000 instructions of Alpaca, of the Hub."""

    val_split_fraction: float = 0.05  # 100 records
    """The share of records that validates, drawn at random; 0: none."""
    download_dir: Path = Path("data/alpaca2k")
    """Where the rows are kept."""
    file_name: str = "alpaca2k_data_cleaned_archive.json"
    """Has no effect, nor has file_url: the rows come from the Hub."""
    repo_id: str = "mhenrichsen/alpaca_2k_test"
    """The data set of the Hub."""

    def fetch(self) -> None:
        fetch.hub_split(self.repo_id, "train", Path(self.download_dir))

    def records(self) -> tuple[Sequence[Record], Sequence[Record]]:
        found = self.read([fetch.split_path(self.repo_id, "train", Path(self.download_dir))], "instruction")
        order = np.random.default_rng(self.seed).permutation(len(found))  # as train_test_split of `datasets` draws
        n_val = math.ceil(self.val_split_fraction * len(found))
        return [found[i] for i in order[n_val:]], [found[i] for i in order[:n_val]]

    def without_effect(self) -> list[str]:
        unused = [name for name in ("file_url", "file_name") if getattr(self, name) != getattr(Alpaca2k, name)]
        return [*(f"data.{name}" for name in unused), *super().without_effect()]


@dataclass
class AlpacaGPT4(Alpaca):
    """Alpaca's 52,002 instructions with answers of GPT-4."""

    val_split_fraction: float = 0.03847  # 2000 records
    """The share of records that validates, drawn at random; 0: none."""
    download_dir: Path = Path("data/alpacagpt4")
    """Where the file is kept."""
    file_url: str = _GPT4
    """Where the file comes from."""
    file_name: str = "alpacagpt4_data_cleaned_archive.json"
    """What it is called in download_dir."""
