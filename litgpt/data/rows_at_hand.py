"""Finetuning data that a program holds in its memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from litgpt.data.base import DataModule
from litgpt.data.json_files import JSON, SHARE
from litgpt.data.records import Record, required, split, try_rows
from litgpt.data.sft import SFT
from litgpt.errors import require_type


class RowsAtHand(SFT):
    """Records as a JSON file would hold them; their format is recognised by looking. 0.05 of them validate."""

    def __init__(self, rows: Sequence[Mapping[str, Any]], **settings: Any) -> None:
        super().__init__(**settings)
        self._rows = [dict(row) if isinstance(row, Mapping) else row for row in rows]  # not in the recipe that is kept

    def records(self) -> tuple[Sequence[Record], Sequence[Record]]:
        rows = [(f"data[{number}]", row) for number, row in enumerate(self._rows)]
        return split(required(try_rows(rows, "data"), "data"), SHARE, self.seed)


def data_module(data: Any) -> DataModule:
    """What a program may give as data: a module, the path of a file, or records."""
    if isinstance(data, DataModule):
        return data
    if isinstance(data, (str, Path)):
        return JSON(Path(data))
    require_type(data, (list, tuple), "data", "a data module, the path of a file, or a list of records")
    return RowsAtHand(data)
