"""Which rows come when: an order that is a pure function of (seed, epoch, index), cut into batches for the ranks.

All ranks walk one endless row of samples, epoch after epoch:

    sample   0 1 2 3 | 4 5 6 7 | 8 9 ...     2 ranks with micro-batches of 2: one round of batches takes 4 samples
    rank     0 0 1 1 | 0 0 1 1 | 0 0 ...

so any number of ranks and any micro-batch see the same samples in the same order, and where a run stands is one number.
Samples of different length are laid into rows first (packing.py), those of one step together. No worker processes: a
row is a slice of an array that the caller prepared. Knows nothing of text.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast

import numpy as np
import torch

from litgpt.data.base import IGNORE, Batch
from litgpt.data.packing import Cut, Plan, lay

Collate = Callable[[Sequence[Any], int], Batch]  # (rows, batch size) -> a batch, its missing rows counting for nothing


class Rows(Protocol):
    """Anything of known length that gives its i-th row."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> Any: ...


class Order:
    """One endless row of samples, each epoch in an order of its own, and how many of it all ranks have taken."""

    def __init__(self, samples: int, seed: int) -> None:
        self.samples, self.seed = samples, seed
        self._next = 0
        self._orders: dict[int, np.ndarray] = {}

    def take(self, samples: int) -> list[int]:
        """The next so many; all ranks take the same."""
        first, self._next = self._next, self._next + samples
        return [self._at(place) for place in range(first, self._next)]

    def state_dict(self) -> dict[str, int]:
        epoch, sample = divmod(self._next, self.samples)
        return {"epoch": epoch, "sample": sample}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self._next = state["epoch"] * self.samples + min(state["sample"], self.samples)

    def _at(self, place: int) -> int:
        epoch, index = divmod(place, self.samples)
        if epoch not in self._orders:
            self._orders = {epoch: epoch_order(self.seed, epoch, self.samples)}
        return int(self._orders[epoch][index])


@dataclass
class TrainLoader:
    """Endless shuffled steps of one rank, of rows that are all of one length."""

    rows: Rows
    collate: Collate
    batch_size: int
    seed: int
    rank: int = 0
    world_size: int = 1

    def __post_init__(self) -> None:
        self.samples = len(self.rows)
        self._order = Order(self.samples, self.seed)

    def step(self, samples: int) -> list[Batch]:
        taken = self._order.take(samples)
        turns = range(0, samples, self.batch_size * self.world_size)
        mine = [first + self.rank * self.batch_size for first in turns]
        batches = [taken[first : first + self.batch_size] for first in mine]
        return [self.collate([self.rows[i] for i in batch], self.batch_size) for batch in batches]

    def state_dict(self) -> dict[str, int]:
        return self._order.state_dict()

    def load_state_dict(self, state: dict[str, int]) -> None:
        self._order.load_state_dict(state)


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


Planner = Callable[[Sequence[int]], Plan]  # lengths of the samples of a step -> where they lie


@dataclass
class RaggedTrainLoader:
    """Endless shuffled steps of one rank, of samples of different length."""

    rows: Cut
    plan: Planner
    seed: int
    rank: int = 0

    def __post_init__(self) -> None:
        self.samples = len(self.rows)
        self._order = Order(self.samples, self.seed)

    def step(self, samples: int) -> list[Batch]:
        return list(_laid(self.rows, self._order.take(samples), self.plan, self.rank))

    def state_dict(self) -> dict[str, int]:
        return self._order.state_dict()

    def load_state_dict(self, state: dict[str, int]) -> None:
        self._order.load_state_dict(state)


@dataclass
class RaggedValLoader:
    """Every sample once, so many in order at a time, those laid as well as they can be."""

    rows: Cut
    plan: Planner
    rank: int = 0
    at_a_time: int = 256

    def __post_init__(self) -> None:
        self.samples = len(self.rows)

    def __len__(self) -> int:
        return sum(len(self.plan(self.rows.positions[chosen].tolist())[self.rank]) for chosen in self._chunks())

    def __iter__(self) -> Iterator[Batch]:
        for chosen in self._chunks():
            yield from _laid(self.rows, chosen, self.plan, self.rank)

    def _chunks(self) -> list[list[int]]:
        everything = range(self.samples)
        return [list(everything[first : first + self.at_a_time]) for first in everything[:: self.at_a_time]]


def _laid(samples: Cut, chosen: Sequence[int], plan: Planner, rank: int) -> Iterator[Batch]:
    """This rank's micro-batches of the chosen samples."""
    lengths = samples.positions[chosen].tolist()
    for batch in plan(lengths)[rank]:
        arrays = lay([[samples[chosen[i]] for i in row] for row in batch])
        yield cast(Batch, {name: torch.from_numpy(array) for name, array in arrays.items()})


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
