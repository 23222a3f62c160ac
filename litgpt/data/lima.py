"""LIMA: about a thousand conversations written with care. The data set is gated: its terms are accepted on the Hub."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from litgpt import hub
from litgpt.data import fetch
from litgpt.data.downloaded import Downloaded
from litgpt.data.records import Record, pairs, require_fraction, split
from litgpt.data.rows import read_rows
from litgpt.errors import InputError

if TYPE_CHECKING:
    from litgpt.tokenizer import Tokenizer


@dataclass
class LIMA(Downloaded):
    """LIMA, of the Hub: 1,084 records."""

    val_split_fraction: float = 0.1
    """The share of records that validates, drawn at random; 0: none."""
    include_multiturn_conversations: bool = False
    """Every question with its answer is a record, not only the first of a conversation."""
    repo_id: str = "GAIR/lima"
    """The data set of the Hub."""
    access_token: str | None = field(default=None, repr=False)
    """The token of an account that accepted its terms; null: HF_TOKEN of the environment. Never written anywhere."""
    download_dir: Path = Path("data/lima")
    """Where the rows are kept."""

    def __post_init__(self) -> None:
        # out of the fields, which are written beside the trained model
        self._token, self.access_token = self.access_token, None

    def connect(self, tokenizer: Tokenizer, batch_size: int, max_seq_length: int) -> None:
        require_fraction(self.val_split_fraction)
        super().connect(tokenizer, batch_size, max_seq_length)

    def fetch(self) -> None:
        if self._file().is_file():
            return
        from huggingface_hub import get_token

        token = hub.checked_token(self._token or get_token())
        if token is None:
            raise InputError(
                f"{self.repo_id} is gated: accept its terms at {hub.SITE}/datasets/{self.repo_id}, then set HF_TOKEN "
                "or give --data.access_token"
            )
        fetch.hub_split(self.repo_id, "train", Path(self.download_dir), token=token)

    def records(self) -> tuple[Sequence[Record], Sequence[Record]]:
        rows = ((where, _as_messages(row)) for where, row in read_rows(self._file()))
        found = self.usable(rows, "messages", str(self._file()))
        return split(pairs(found, self.include_multiturn_conversations), self.val_split_fraction, self.seed)

    def _file(self) -> Path:
        return fetch.split_path(self.repo_id, "train", Path(self.download_dir))


def _as_messages(row: Any) -> Any:
    """A row whose conversation is a list of texts, the user's first, as one of messages."""
    turns = row.get("conversations") if isinstance(row, dict) else None
    if not isinstance(turns, list):
        return row
    roles = itertools.cycle(("user", "assistant"))
    return {"messages": [{"role": role, "content": text} for role, text in zip(roles, turns, strict=False)]}
