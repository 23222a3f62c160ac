"""A tokenizer whose words are numbers: the text "5 6 7" has the ids 5, 6, 7, to be recognised in what comes out."""

from __future__ import annotations

import sys
from collections.abc import Sequence


class Numbers:
    """As much of `litgpt.tokenizer.Tokenizer` as data preparation uses."""

    def __init__(self, vocab_size: int = 1000, *, bos: int | None = None, eos: int | None = 0) -> None:
        self.vocab_size, self.bos_id, self.eos_id = vocab_size, bos, eos

    def encode(self, text: str) -> list[int]:
        return [*([] if self.bos_id is None else [self.bos_id]), *map(int, text.split())]

    def encode_batch(self, texts: Sequence[str], *, bos: bool | None = None) -> list[list[int]]:
        assert bos is False
        sys.audit("tests.encode_batch", len(texts))
        return [[int(word) for word in text.split()] for text in texts]

    def fingerprint(self) -> str:
        return str(self.vocab_size)
