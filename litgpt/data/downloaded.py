"""What data sets of the web have in common: rows that cannot be used are left out, and a line says so."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Mapping
from pathlib import Path

from litgpt.data.records import Record, try_rows, usable
from litgpt.data.rows import Row, read_rows
from litgpt.data.sft import SFT


class Downloaded(SFT):
    """An instruction data set of the web: `fetch` brings its files, `records` reads them."""

    @abstractmethod
    def fetch(self) -> None:
        """Bring the files that are not there yet."""

    def prepare_data(self) -> None:
        self.fetch()
        super().prepare_data()

    def notes(self) -> list[str]:
        return [*dict.fromkeys(getattr(self, "_left_out", ())), *super().notes()]

    def read(self, files: Iterable[Path], kind: str, columns: Mapping[str, str] | None = None) -> list[Record]:
        """The records of some files of one kind."""
        return [record for file in files for record in self.usable(read_rows(file), kind, str(file), columns)]

    def usable(
        self, rows: Iterable[Row], kind: str | None, name: str, columns: Mapping[str, str] | None = None
    ) -> list[Record]:
        """The records of some rows; those that cannot be used are noted."""
        records, line = usable(try_rows(rows, name, kind, columns), name)
        self._left_out = [*getattr(self, "_left_out", ()), *([line] if line else ())]
        return records
