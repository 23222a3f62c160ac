"""The order of samples: the same for any number of ranks and any micro-batch, and from any point on after a resume."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from litgpt.data.base import IGNORE
from litgpt.data.loader import Blocks, TrainLoader, ValLoader, epoch_order


def rows_of(batch, _size: int):
    return batch


def train(samples: int, batch: int, rank: int = 0, world: int = 1, seed: int = 1) -> TrainLoader:
    """A loader over the rows 0, 1, 2, ... whose batches are lists of them."""
    return TrainLoader(range(samples), rows_of, batch, seed, rank, world)


def taken(loaders: list[TrainLoader], rounds: int) -> list[int]:
    """The rows that all ranks take in so many rounds, in global order."""
    in_a_round = sum(loader.batch_size for loader in loaders)
    turns = (zip(*(loader.step(in_a_round) for loader in loaders), strict=True) for _ in range(rounds))
    return [row for turn in turns for batches in turn for rows in batches for row in rows]


def ranks(samples: int, batch: int, world: int, seed: int = 1) -> list[TrainLoader]:
    return [train(samples, batch, rank, world, seed) for rank in range(world)]


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("batch", [1, 2, 8])
def test_any_number_of_ranks_and_any_micro_batch_see_the_same_order(world, batch):
    whole = taken(ranks(samples=21, batch=8, world=1), rounds=8)
    assert taken(ranks(21, batch, world), rounds=64 // (batch * world)) == whole


@pytest.mark.parametrize(("batch", "world"), [(1, 1), (2, 1), (8, 1), (1, 2), (4, 2), (2, 4)])
def test_a_step_is_the_same_samples_for_any_micro_batch_and_any_number_of_ranks(batch, world):
    loaders = ranks(samples=21, batch=batch, world=world)
    for step in range(6):  # across the end of two epochs
        parts = [loader.step(8) for loader in loaders]
        assert {len(part) for part in parts} == {8 // (batch * world)}
        whole = taken(ranks(21, 8, world=1), rounds=6)[8 * step : 8 * step + 8]
        assert [row for turn in zip(*parts, strict=True) for rows in turn for row in rows] == whole
    assert {json.dumps(loader.state_dict()) for loader in loaders} == {'{"epoch": 2, "sample": 6}'}


def test_a_step_that_fills_no_round_of_batches_is_filled_with_rows_that_do_not_count():
    blocks = Blocks(np.arange(100, dtype=np.uint16), length=4)
    loaders = [TrainLoader(blocks, blocks.collate, 2, 0, rank, 2) for rank in range(2)]
    batches = [loader.step(5) for loader in loaders]
    assert [len(of_rank) for of_rank in batches] == [2, 2]
    assert sum(int((b["labels"] != IGNORE).any(1).sum()) for of_rank in batches for b in of_rank) == 5
    assert loaders[0].state_dict() == loaders[1].state_dict() == {"epoch": 0, "sample": 5}


def test_an_epoch_holds_every_row_once_and_the_next_has_another_order():
    rows = taken([train(samples=50, batch=5)], rounds=20)
    assert sorted(rows[:50]) == sorted(rows[50:]) == list(range(50))
    assert rows[:50] != rows[50:]
    assert rows[:50] != list(range(50))


def test_the_order_is_a_function_of_the_seed_alone():
    orders = [taken([train(30, 3, seed=seed)], rounds=20) for seed in (1, 1, 2)]
    assert orders[0] == orders[1] != orders[2]
    # pinned: runs that resume with a later release must find their place
    assert epoch_order(42, 0, 8).tolist() == [3, 4, 2, 7, 6, 1, 5, 0]
    assert epoch_order(42, 1, 8).tolist() == [0, 4, 6, 1, 2, 7, 3, 5]


def test_a_batch_that_an_epoch_cannot_fill_goes_on_in_the_next():
    loader = train(samples=3, batch=8)
    rows = taken([loader], rounds=3)
    assert [sorted(rows[i : i + 3]) for i in range(0, 24, 3)] == [[0, 1, 2]] * 8


@settings(deadline=None)
@given(
    samples=st.integers(1, 40),
    before=st.tuples(st.integers(1, 5), st.integers(1, 4), st.integers(0, 12)),
    after=st.tuples(st.integers(1, 5), st.integers(1, 4), st.integers(1, 12)),
    seed=st.integers(0, 2**40),
)
def test_a_resumed_run_goes_on_in_the_global_order(samples, before, after, seed):
    batch, world, rounds = before
    loaders = ranks(samples, batch, world, seed)
    rows = taken(loaders, rounds)
    states = [json.loads(json.dumps(loader.state_dict())) for loader in loaders]
    assert all(state == states[0] for state in states)
    batch, world, rounds = after
    resumed = ranks(samples, batch, world, seed)
    for loader in resumed:
        loader.load_state_dict(states[0])
    rows += taken(resumed, rounds)
    assert rows == taken([train(samples, 1, seed=seed)], len(rows))


def test_the_state_names_the_epoch_and_the_sample():
    loader = train(samples=10, batch=4)
    taken([loader], rounds=3)
    assert loader.state_dict() == {"epoch": 1, "sample": 2}


def test_a_step_takes_nothing_ahead():
    loader = train(samples=10, batch=2)
    assert loader.step(2) + loader.step(2) == [[i, j] for i, j in np.split(epoch_order(1, 0, 10)[:4], 2)]
    assert loader.state_dict() == {"epoch": 0, "sample": 4}


@given(samples=st.integers(0, 30), batch=st.integers(1, 5), world=st.integers(1, 4))
def test_validation_sees_every_row_once_in_order_with_equally_many_batches_on_all_ranks(samples, batch, world):
    loaders = [ValLoader(range(samples), rows_of, batch, rank, world) for rank in range(world)]
    batches = [list(loader) for loader in loaders]
    assert {len(b) for b in batches} == {len(loader) for loader in loaders}
    assert [row for turn in zip(*batches, strict=True) for rows in turn for row in rows] == list(range(samples))


def test_blocks_share_one_token_with_their_neighbours_and_labels_are_shifted():
    blocks = Blocks(np.arange(10, dtype=np.uint16), length=3)
    batch = blocks.collate([blocks[i] for i in range(len(blocks))], 3)
    assert batch["ids"].tolist() == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]
    assert batch["labels"].tolist() == [[1, 2, 3], [4, 5, 6], [7, 8, 9]]
    assert batch["ids"].dtype == batch["labels"].dtype == torch.int64


@given(tokens=st.integers(0, 50), length=st.integers(1, 9), batch=st.integers(1, 4), world=st.integers(1, 3))
def test_partial_blocks_predict_every_token_but_the_first_once(tokens, length, batch, world):
    blocks = Blocks(np.arange(100, 100 + tokens, dtype=np.uint16), length, partial=True)
    loaders = [ValLoader(blocks, blocks.collate, batch, rank, world) for rank in range(world)]
    pairs = []
    for made in (b for loader in loaders for b in loader):
        assert made["ids"].shape == made["labels"].shape == (batch, length)
        counted = made["labels"] != IGNORE
        pairs += zip(made["ids"][counted].tolist(), made["labels"][counted].tolist(), strict=True)
    assert sorted(pairs) == [(i, i + 1) for i in range(100, 99 + tokens)]


def test_ids_beyond_two_bytes_stay_what_they_are():
    blocks = Blocks(np.array([70_000, 300_000, 5], dtype=np.uint32), length=2)
    assert blocks.collate([blocks[0]], 1)["labels"].tolist() == [[300_000, 5]]


def test_only_the_blocks_of_a_batch_are_taken_from_the_file():
    class Watched(np.ndarray):
        taken = 0

        def __getitem__(self, index):
            got = super().__getitem__(index)
            Watched.taken += np.size(got)
            return got

    blocks = Blocks(np.zeros(100_000, np.uint16).view(Watched), length=10)
    TrainLoader(blocks, blocks.collate, 4, seed=0).step(4)
    assert Watched.taken == 4 * 11
