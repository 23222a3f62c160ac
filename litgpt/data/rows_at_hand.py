"""Finetuning data that a program holds in its memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from litgpt.data.json_files import SHARE
from litgpt.data.records import Record, required, split, try_rows
from litgpt.data.sft import SFT


class RowsAtHand(SFT):
    """Records as a JSON file would hold them; their format is recognised by looking. 0.05 of them validate."""

    def __init__(self, rows: Sequence[Mapping[str, Any]], **settings: Any) -> None:
        super().__init__(**settings)
        self._rows = [dict(row) if isinstance(row, Mapping) else row for row in rows]  # not in the recipe that is kept

    def records(self) -> tuple[Sequence[Record], Sequence[Record]]:
        rows = [(f"data[{number}]", row) for number, row in enumerate(self._rows)]
        return split(required(try_rows(rows, "data"), "data"), SHARE, self.seed)
