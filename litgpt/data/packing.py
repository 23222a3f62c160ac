"""Samples of different length, laid into the rows of micro-batches so that little of a row is padding.

    rank 0   [ a a a a a a b b b ]   [ e e e e f f f f f ]     2 micro-batches of 1 row each
    rank 1   [ c c c c d d d d d ]   [ g g g g g g g h   ]     (one position of padding)

What makes up a step is decided elsewhere; here only where each of its samples lies, which changes no number but the
speed: positions restart in each document, and a token attends within its own. Pure functions, no torch.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left, insort
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from litgpt.data.base import IGNORE

Row = list[int]  # samples, end to end
MicroBatch = list[Row]
Plan = list[list[MicroBatch]]  # the micro-batches of each rank, equally many; a filler has no rows

OVERHEAD = 128  # what a micro-batch costs beside its tokens, in tokens


@dataclass(frozen=True)
class Samples:
    """Tokenised records, end to end: `id` where the model learns to write a token, `~id` where it only reads it."""

    tokens: np.ndarray  # (N,) int32
    starts: np.ndarray  # (samples + 1,) int64

    @classmethod
    def joined(cls, rows: Iterable[np.ndarray]) -> Samples:
        rows = list(rows)
        starts = np.cumsum([0, *map(len, rows)], dtype=np.int64)
        return cls(np.concatenate([np.zeros(0, np.int32), *rows]), starts)

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, index: int) -> np.ndarray:
        return self.tokens[self.starts[index] : self.starts[index + 1]]

    @property
    def lengths(self) -> np.ndarray:
        """(samples,) tokens of each."""
        return np.diff(self.starts)

    def learnt(self, length: int) -> np.ndarray:
        """(samples,) how many of the first `length` tokens of each are learnt; nothing predicts the very first."""
        before = np.concatenate([[0], np.cumsum(self.tokens >= 0)])
        ends = np.minimum(self.starts[:-1] + length, self.starts[1:])
        return before[ends] - before[np.minimum(self.starts[:-1] + 1, ends)]


@dataclass(frozen=True)
class Cut:
    """The samples that have something to learn in their first `length` tokens, cut there."""

    samples: Samples
    length: int

    @cached_property
    def index(self) -> np.ndarray:
        """(len(self),) which samples these are."""
        return np.flatnonzero(self.samples.learnt(self.length))

    @cached_property
    def positions(self) -> np.ndarray:
        """(len(self),) what each takes of a row; the last token is a label only."""
        return np.minimum(self.samples.lengths[self.index], self.length) - 1

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, index: int) -> np.ndarray:
        return self.samples[int(self.index[index])][: self.length]


def packed(lengths: Sequence[int], row_length: int, most_rows: int, world_size: int) -> Plan:
    """One step's samples as rows of at most `row_length` positions, at most `most_rows` of them in a micro-batch.

    Few rows make the fewest micro-batches, but rows of one micro-batch are padded to the longest of them: the count of
    micro-batches that costs least is taken, with rows as equal as they can be.
    """
    order = _longest_first(lengths)
    fewest = _fewest_rows(order, lengths, row_length)
    least, most = -(-len(fewest) // (most_rows * world_size)), -(-len(fewest) // world_size)
    plans = [unpacked(lengths, most_rows, world_size)]
    for count in sorted({least, least + 1, 2 * least, most}):
        if count <= most:
            n_rows = -(-len(fewest) // (count * world_size)) * count * world_size
            rows = _equal_rows(order, lengths, row_length, n_rows) or fewest
            plans.append(_dealt(rows, lengths, count, world_size))
    return min(plans, key=lambda plan: _cost(plan, lengths))


def unpacked(lengths: Sequence[int], most_rows: int, world_size: int) -> Plan:
    """One step's samples with a row for each, rows of like length together."""
    count = -(-len(lengths) // (most_rows * world_size))
    return _dealt([[i] for i in _longest_first(lengths)], lengths, count, world_size)


def size(batch: MicroBatch, lengths: Sequence[int]) -> tuple[int, int]:
    """The positions of a micro-batch's rows, and those of them that hold a sample."""
    widths = [_width(row, lengths) for row in batch]
    return len(widths) * max(widths, default=0), sum(widths)


def lay(batch: Sequence[Sequence[np.ndarray]]) -> dict[str, np.ndarray]:
    """The arrays of a micro-batch, each (rows, width of the widest), from its rows of samples.

    Without `positions` and `doc_ids` where each row is one whole document: plain causality is cheaper.
    """
    widths = [sum(len(tokens) - 1 for tokens in row) for row in batch]
    shape = max(len(batch), 1), max(widths, default=1)
    ids, labels = np.zeros(shape, np.int64), np.full(shape, IGNORE, np.int64)
    positions, doc_ids = np.zeros(shape, np.int64), np.full(shape, -1, np.int64)
    for r, row in enumerate(batch):
        at = 0
        for document, tokens in enumerate(row):
            place = slice(at, at + len(tokens) - 1)
            ids[r, place] = np.where(tokens < 0, ~tokens, tokens)[:-1]
            labels[r, place] = np.where(tokens < 0, IGNORE, tokens)[1:]
            positions[r, place] = np.arange(len(tokens) - 1)
            doc_ids[r, place] = document
            at = place.stop
        positions[r, at:] = np.arange(shape[1] - at)  # of padding, a document of its own
    if not doc_ids.any():
        return {"ids": ids, "labels": labels}
    return {"ids": ids, "labels": labels, "positions": positions, "doc_ids": doc_ids}


def _longest_first(lengths: Sequence[int]) -> list[int]:
    return sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))


def _width(row: Row, lengths: Sequence[int]) -> int:
    return sum(int(lengths[i]) for i in row)


def _fewest_rows(order: Iterable[int], lengths: Sequence[int], row_length: int) -> list[Row]:
    """Best fit, the longest first: each sample goes into the fullest row that has room for it."""
    rows: list[Row] = []
    free: list[tuple[int, int]] = []  # (room, row), sorted
    for i in order:
        length = int(lengths[i])
        at = bisect_left(free, (length, -1))
        if at == len(free):
            rows.append([])
            room, row = row_length, len(rows) - 1
        else:
            room, row = free.pop(at)
        rows[row].append(i)
        insort(free, (room - length, row))
    return rows


def _equal_rows(order: Iterable[int], lengths: Sequence[int], row_length: int, count: int) -> list[Row] | None:
    """The samples in `count` rows, each sample going into the emptiest; None where one has no room there."""
    rows: list[Row] = [[] for _ in range(count)]
    filled = [(0, row) for row in range(count)]
    for i in order:
        width, row = filled[0]
        if width + lengths[i] > row_length:
            return None
        rows[row].append(i)
        heapq.heapreplace(filled, (width + int(lengths[i]), row))
    return [row for row in rows if row]


def _dealt(rows: list[Row], lengths: Sequence[int], count: int, world_size: int) -> Plan:
    """The rows as `count` micro-batches on each rank: rows of like width together, ranks alike in what they compute."""
    rows = sorted(rows, key=lambda row: -_width(row, lengths))
    share, more = divmod(len(rows), count * world_size)
    ends = np.cumsum([share + (i >= count * world_size - more) for i in range(count * world_size)]).tolist()
    batches = [rows[begin:end] for begin, end in zip([0, *ends], ends, strict=False)]
    batches.sort(key=lambda batch: -size(batch, lengths)[0])
    plan: Plan = [[] for _ in range(world_size)]
    loads = [0] * world_size
    for first in range(0, len(batches), world_size):
        ranks = sorted(range(world_size), key=lambda rank: loads[rank])  # the largest goes where least is
        for rank, batch in zip(ranks, batches[first : first + world_size], strict=True):
            plan[rank].append(batch)
            loads[rank] += size(batch, lengths)[0]
    return plan


def _cost(plan: Plan, lengths: Sequence[int]) -> int:
    """What the step takes: in each turn the ranks wait for the one with most to compute."""
    turns = zip(*plan, strict=True)
    return sum(OVERHEAD + max(size(batch, lengths)[0] for batch in turn) for turn in turns)
