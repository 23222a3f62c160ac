"""Deita: 9,500 conversations chosen for complexity, quality and diversity."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from litgpt.data import fetch
from litgpt.data.downloaded import Downloaded
from litgpt.data.records import Record, pairs


@dataclass
class Deita(Downloaded):
    """Deita 10k, of the Hub: its train_sft split trains, test_sft validates."""

    include_multiturn_conversations: bool = False
    """Every question with its answer is a record, not only the first of a conversation."""
    download_dir: Path = Path("data/deita")
    """Where the rows are kept."""
    repo_id: str = "HuggingFaceH4/deita-10k-v0-sft"
    """The data set of the Hub."""

    def fetch(self) -> None:
        for split in ("train_sft", "test_sft"):
            fetch.hub_split(self.repo_id, split, Path(self.download_dir))

    def records(self) -> tuple[Sequence[Record], Sequence[Record]]:
        return self._split("train_sft"), self._split("test_sft")

    def _split(self, name: str) -> list[Record]:
        found = self.read([fetch.split_path(self.repo_id, name, Path(self.download_dir))], "messages")
        return pairs(found, self.include_multiturn_conversations)
