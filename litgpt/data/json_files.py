"""Finetuning data of the user's own: a file, or a folder with one to train on and one to validate with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from litgpt.data.records import Record, read, require_columns, require_fraction, split
from litgpt.data.rows import EXPECTED, kind_of
from litgpt.data.sft import SFT
from litgpt.errors import InputError, MissingError

if TYPE_CHECKING:
    from litgpt.tokenizer import Tokenizer

VALIDATION = ("val", "validation", "valid", "dev", "test")  # the first that is there validates
SHARE = 0.05


@dataclass
class JSON(SFT):
    """A file of your own (.json, .jsonl, .csv, .parquet), or a folder with train.* and val.*; formats by looking."""

    json_path: Path
    """The file or folder."""
    val_split_fraction: float | None = None
    """The share of records that validates, drawn at random; 0: none; null: 0.05. A folder says it by its files."""
    format: str | None = None
    """instruction, completion, messages, sharegpt or text; null: as the keys of the rows say."""
    columns: dict[str, str] | None = None
    """What the file calls our keys, such as {instruction: question, output: answer}."""

    def connect(self, tokenizer: Tokenizer, batch_size: int, max_seq_length: int) -> None:
        self.json_path = Path(self.json_path).expanduser()
        require_columns(self.columns)
        if self.val_split_fraction is not None:
            require_fraction(self.val_split_fraction)
        super().connect(tokenizer, batch_size, max_seq_length)

    def records(self) -> tuple[Sequence[Record], Sequence[Record]]:
        if not self.json_path.is_dir():
            share = SHARE if self.val_split_fraction is None else self.val_split_fraction
            return split(read(self.json_path, self.format, self.columns), share, self.seed)
        if self.val_split_fraction is not None:
            raise InputError(
                f"{self.json_path}: a folder says by its files what validates; leave data.val_split_fraction out"
            )
        train, val = (read(file, self.format, self.columns) for file in self._files())
        return train, val

    def notes(self) -> list[str]:
        if self.val_split_fraction is not None or self.json_path.is_dir():
            return super().notes()
        return [f"data.val_split_fraction is not given: {SHARE} of {self.json_path} validates", *super().notes()]

    def _files(self) -> tuple[Path, Path]:
        """The file that trains and the one that validates."""
        there = sorted(path for path in self.json_path.iterdir() if kind_of(path) and path.is_file())
        named = {name: [p for p in there if p.name.lower().split(".")[0] == name] for name in ("train", *VALIDATION)}
        val = next((name for name in VALIDATION if named[name]), "val")
        for name in ("train", val):
            if not named[name]:
                raise MissingError(
                    f"{self.json_path}: has no {name}.jsonl or the like; expected train.* and val.* ({EXPECTED}), "
                    f"found {', '.join(sorted(p.name for p in self.json_path.iterdir())[:10]) or 'nothing'}"
                )
            if len(named[name]) > 1:
                raise InputError(
                    f"{self.json_path}: {' and '.join(p.name for p in named[name])} are both there; leave one of them"
                )
        return named["train"][0], named[val][0]
