"""Any data set of the Hugging Face Hub whose rows are of a format that we know."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from litgpt.data import fetch
from litgpt.data.json_files import SHARE
from litgpt.data.records import Record, read, require_columns, require_fraction, split
from litgpt.data.sft import SFT
from litgpt.errors import InputError

if TYPE_CHECKING:
    from litgpt.tokenizer import Tokenizer


@dataclass
class HubDataset(SFT):
    """A data set of the Hugging Face Hub by its name; the format of its rows is recognised by looking."""

    repo_id: str
    """Its name, such as HuggingFaceH4/no_robots, or a local folder that is laid out like one."""
    split: str = "train"
    """The split that trains; parts of it are written as train[:1000]."""
    val_split: str | None = None
    """The split that validates, such as test; null: a share of the split that trains."""
    val_split_fraction: float | None = None
    """The share of records that validates, drawn at random; 0: none; null: 0.05, if there is no val_split."""
    config: str | None = None
    """Which of its configurations, for data sets that have several."""
    revision: str | None = None
    """A commit, tag or branch; null: what is newest when it is first fetched."""
    format: str | None = None
    """instruction, completion, messages, sharegpt or text; null: as the keys of the rows say."""
    columns: dict[str, str] | None = None
    """What the data set calls our keys, such as {instruction: question, output: answer}."""
    download_dir: Path = Path("data/hub")
    """Where the rows are kept."""

    def connect(self, tokenizer: Tokenizer, batch_size: int, max_seq_length: int) -> None:
        require_columns(self.columns)
        if self.val_split_fraction is not None:
            require_fraction(self.val_split_fraction)
            if self.val_split is not None:
                raise InputError("data.val_split and data.val_split_fraction contradict each other; give one of them")
        super().connect(tokenizer, batch_size, max_seq_length)

    def prepare_data(self) -> None:
        for name in filter(None, (self.split, self.val_split)):
            place = Path(self.download_dir)
            fetch.hub_split(self.repo_id, name, place, config=self.config, revision=self.revision)
        super().prepare_data()

    def records(self) -> tuple[Sequence[Record], Sequence[Record]]:
        found = self._read(self.split)
        if self.val_split is not None:
            return found, self._read(self.val_split)
        return split(found, SHARE if self.val_split_fraction is None else self.val_split_fraction, self.seed)

    def notes(self) -> list[str]:
        if self.val_split_fraction is not None or self.val_split is not None:
            return super().notes()
        return [f"data.val_split_fraction is not given: {SHARE} of {self.repo_id} validates", *super().notes()]

    def _read(self, name: str) -> list[Record]:
        path = fetch.split_path(self.repo_id, name, Path(self.download_dir), self.config, self.revision)
        return read(path, self.format, self.columns)
