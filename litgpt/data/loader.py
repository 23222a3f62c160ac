"""Which rows come when: an order that is a pure function of (seed, epoch, index), cut into batches for the ranks.

All ranks walk one endless row of samples, epoch after epoch:

    sample   0 1 2 3 | 4 5 6 7 | 8 9 ...     2 ranks with micro-batches of 2: one round of batches takes 4 samples
    rank     0 0 1 1 | 0 0 1 1 | 0 0 ...

so any number of ranks and any micro-batch see the same samples in the same order, and where a run stands is one number.
No worker processes: a row is a slice of a mapped file, or what the caller prepared. Knows nothing of text.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from litgpt.data.base import IGNORE, Batch

Collate = Callable[[Sequence[Any], int], Batch]  # (rows, batch size) -> a batch, its missing rows counting for nothing


class Rows(Protocol):
    """Anything of known length that gives its i-th row."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> Any: ...


@dataclass
class TrainLoader:
    """Endless shuffled micro-batches of one rank. Iterating again goes on; only `load_state_dict` goes elsewhere."""

    rows: Rows
    collate: Collate
    batch_size: int
    seed: int
    rank: int = 0
    world_size: int = 1

    def __post_init__(self) -> None:
        self.samples = len(self.rows)
        self._next = 0  # samples that all ranks have taken, over all epochs
        self._orders: dict[int, np.ndarray] = {}

    def __len__(self) -> int:
        return -(-self.samples // (self.batch_size * self.world_size))

    def __iter__(self) -> Iterator[Batch]:
        while True:
            yield from self.step(self.batch_size * self.world_size)

    def step(self, samples: int) -> list[Batch]:
        end = self._next + samples
        firsts = range(self._next, end, self.batch_size * self.world_size)
        mine = [first + self.rank * self.batch_size for first in firsts]
        self._next = end
        return [self._batch(first, min(first + self.batch_size, end)) for first in mine]

    def state_dict(self) -> dict[str, int]:
        epoch, sample = divmod(self._next, self.samples)
        return {"epoch": epoch, "sample": sample}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self._next = state["epoch"] * self.samples + min(state["sample"], self.samples)

    def _batch(self, first: int, end: int) -> Batch:
        return self.collate([self.rows[self._row(sample)] for sample in range(first, end)], self.batch_size)

    def _row(self, sample: int) -> int:
        epoch, index = divmod(sample, self.samples)
        if epoch not in self._orders:
            last = {e: order for e, order in self._orders.items() if e == epoch - 1}  # a batch may lie in both
            self._orders = {**last, epoch: epoch_order(self.seed, epoch, self.samples)}
        return int(self._orders[epoch][index])


@dataclass
class ValLoader:
    """Every row once, in order. The last batches are filled up, so that all ranks have equally many of one shape."""

    rows: Rows
    collate: Collate
    batch_size: int
    rank: int = 0
    world_size: int = 1

    def __post_init__(self) -> None:
        self.samples = len(self.rows)

    def __len__(self) -> int:
        return -(-self.samples // (self.batch_size * self.world_size))

    def __iter__(self) -> Iterator[Batch]:
        for turn in range(len(self)):
            first = (turn * self.world_size + self.rank) * self.batch_size
            rows = [self.rows[i] for i in range(first, min(first + self.batch_size, self.samples))]
            yield self.collate(rows, self.batch_size)


def epoch_order(seed: int, epoch: int, samples: int) -> np.ndarray:
    """The rows of an epoch in the order in which they are trained on."""
    return np.random.Generator(np.random.PCG64([seed, epoch])).permutation(samples)


@dataclass(frozen=True)
class Blocks:
    """A row of tokens cut into blocks: block i holds the tokens [i * length, i * length + length + 1).

    Neighbours share one token, the target of one and the input of the next, so each token but the first is predicted
    once. A last block that is not full is left out, or kept where `partial`.
    """

    tokens: np.ndarray  # (N,)
    length: int
    partial: bool = False

    def __len__(self) -> int:
        predicted = max(len(self.tokens) - 1, 0)
        return -(-predicted // self.length) if self.partial else predicted // self.length

    def __getitem__(self, index: int) -> np.ndarray:
        return self.tokens[index * self.length : (index + 1) * self.length + 1]

    def collate(self, rows: Sequence[np.ndarray], batch_size: int) -> Batch:
        tokens = np.full((batch_size, self.length + 1), -1, dtype=np.int64)
        for place, row in zip(tokens, rows, strict=False):
            place[: len(row)] = row
        ids, labels = tokens[:, :-1], tokens[:, 1:]
        return {
            "ids": torch.from_numpy(np.where(ids < 0, 0, ids)),  # (B, T)
            "labels": torch.from_numpy(np.where(labels < 0, IGNORE, labels)),  # (B, T)
        }
