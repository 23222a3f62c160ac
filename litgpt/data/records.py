"""Finetuning data as people have it: files and rows become `Record`s, whatever their format. Knows no tokenizer.

The format of a file is recognised by the keys of its rows. Every row is read and checked before anything is trained: all
that cannot be used is counted, and one line names the first.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

KINDS = ("instruction", "completion", "messages", "sharegpt", "text")


@dataclass(frozen=True, slots=True)
class Record:
    """One thing to learn from: a conversation (`messages`), or plain text.

    The messages are checked: a system message only first, turns that alternate, at least one answer. The user message
    of an instruction may carry "input", for prompt styles that give it a place of its own.
    """

    messages: tuple[dict[str, Any], ...] = ()  # [{"role", "content"}, ...], and what else a template may want
    text: str | None = None  # instead of messages: every token is trained
    kind: str = "instruction"  # one of KINDS
    where: str = ""  # "my.json: record 7", "my.jsonl:11", "my.csv:12"
    tools: tuple[dict[str, Any], ...] = ()  # JSON schemas of functions, for templates that know tools


def read(path: Path, kind: str | None = None) -> list[Record]:
    """The records of one file; `kind` forces a format. Any bad row is an InputError that names the first of them."""
    raise NotImplementedError


def from_rows(rows: Iterable[tuple[str, Any]], name: str, kind: str | None = None) -> list[Record]:
    """The same for rows that are there already, each with the words on where it stands."""
    raise NotImplementedError


def split(records: Sequence[Record], fraction: float, seed: int) -> tuple[list[Record], list[Record]]:
    """(train, val) at random: the members that torch's random_split chooses for this fraction and seed."""
    raise NotImplementedError
