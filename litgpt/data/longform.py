"""LongForm: instructions that were written for long texts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from litgpt.data import fetch
from litgpt.data.downloaded import Downloaded
from litgpt.data.records import Record

URL = "https://raw.githubusercontent.com/akoksal/LongForm/main/dataset"
FILES = ("train.json", "val.json")


@dataclass
class LongForm(Downloaded):
    """LongForm: 23,652 instructions, 2,042 more validate."""

    STYLE: ClassVar[str] = "longform"

    download_dir: Path = Path("data/longform")
    """Where the files are kept."""

    def fetch(self) -> None:
        for name in FILES:
            fetch.file(f"{URL}/{name}", Path(self.download_dir) / name)

    def records(self) -> tuple[Sequence[Record], Sequence[Record]]:
        columns = {"instruction": "input"}
        train, val = (self.read([Path(self.download_dir) / name], "instruction", columns) for name in FILES)
        return train, val
