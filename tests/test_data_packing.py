"""Where the samples of a step lie changes nothing but the speed: the same documents, loss and gradient."""

from __future__ import annotations

from collections import Counter
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from litgpt.data.base import IGNORE
from litgpt.data.loader import RaggedTrainLoader, RaggedValLoader
from litgpt.data.packing import OVERHEAD, Cut, Samples, lay, packed, size, unpacked
from tests.makers.checkpoints import CONFIGS, random_gpt
from tests.makers.configs import shrunk

LENGTHS = st.lists(st.integers(1, 50), min_size=1, max_size=40)


def flat(plan) -> list[int]:
    return [i for rank in plan for batch in rank for row in batch for i in row]


def ragged(lengths, seed: int = 0, vocab: int = 96) -> Samples:
    """Samples of these lengths, about half of their tokens learnt, the last always."""
    draw = np.random.default_rng(seed)
    rows = []
    for n in lengths:
        ids = draw.integers(0, vocab, n).astype(np.int32)
        learnt = draw.random(n) < 0.5
        learnt[-1:] = True
        rows.append(np.where(learnt, ids, ~ids))
    return Samples.joined(rows)


def documents(batches) -> Counter:
    """What the model is given, apart from where it lies: each document's ids and labels."""
    found: Counter = Counter()
    for batch in batches:
        doc_ids = batch.get("doc_ids", torch.zeros_like(batch["ids"]))
        for row in range(len(doc_ids)):
            for document in range(int(doc_ids[row].max()) + 1):
                here = doc_ids[row] == document
                labels = tuple(batch["labels"][row][here].tolist())
                if "positions" in batch:
                    assert batch["positions"][row][here].tolist() == list(range(len(labels)))
                found[tuple(batch["ids"][row][here].tolist()), labels] += 1
    found.pop(((0,), (IGNORE,)), None)
    return found


def loaders(rows: Cut, world: int, most_rows: int, packs: bool, seed: int = 3) -> list[RaggedTrainLoader]:
    kind = partial(packed, row_length=rows.length) if packs else unpacked
    plan = partial(kind, most_rows=most_rows, world_size=world)
    return [RaggedTrainLoader(rows, plan, seed, rank) for rank in range(world)]


@settings(deadline=None)
@given(lengths=LENGTHS, room=st.integers(50, 120), rows=st.integers(1, 5), world=st.integers(1, 4), packs=st.booleans())
def test_a_plan_holds_every_sample_once_within_its_limits_and_alike_on_all_ranks(lengths, room, rows, world, packs):
    plan = packed(lengths, room, rows, world) if packs else unpacked(lengths, rows, world)
    assert sorted(flat(plan)) == list(range(len(lengths)))
    assert len(plan) == world
    assert len({len(rank) for rank in plan}) == 1
    assert len(plan[0]) >= 1
    for batch in (batch for rank in plan for batch in rank):
        assert len(batch) <= rows
        for row in batch:
            assert sum(lengths[i] for i in row) <= room
            assert packs or len(row) == 1
    assert plan == (packed(lengths, room, rows, world) if packs else unpacked(lengths, rows, world))


@settings(deadline=None)
@given(lengths=LENGTHS, rows=st.integers(1, 5), world=st.integers(1, 3))
def test_packing_takes_no_longer_than_padding_does(lengths, rows, world):
    def cost(plan) -> int:
        return sum(OVERHEAD + max(size(batch, lengths)[0] for batch in turn) for turn in zip(*plan, strict=True))

    assert cost(packed(lengths, 50, rows, world)) <= cost(unpacked(lengths, rows, world))


def test_rows_are_full_and_ranks_have_alike_to_compute():
    lengths = np.random.default_rng(0).integers(46, 493, 64).tolist()  # as of instructions
    for rows, world in ((1, 1), (4, 1), (4, 2), (2, 3)):
        plan = packed(lengths, 512, rows, world)
        loads = [sum(size(batch, lengths)[0] for batch in rank) for rank in plan]
        assert sum(lengths) / sum(loads) > 0.97
        assert max(loads) / min(loads) < 1.1
    assert len(packed(lengths, 512, 4, 1)[0]) <= sum(lengths) / (4 * 512) + 2  # fewer micro-batches hardly hold them


def test_long_and_short_samples_do_not_pad_each_other():
    plan = packed([500, 20, 20, 20], 512, 4, 1)
    assert sorted(map(len, plan[0])) == [1, 1]


@pytest.mark.parametrize("packs", [True, False])
@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("most_rows", [1, 3, 8])
def test_a_step_is_the_same_documents_however_it_is_cut(packs, world, most_rows):
    rows = Cut(ragged(np.random.default_rng(1).integers(2, 30, 25)), 30)
    ranks = loaders(rows, world, most_rows, packs)
    reference = loaders(rows, 1, 1, packs=False)[0]
    for samples in (7, 7, 1, 40):  # over the end of an epoch, too
        steps = [loader.step(samples) for loader in ranks]
        assert len({len(step) for step in steps}) == 1
        assert documents(b for step in steps for b in step) == documents(reference.step(samples))
        assert len({str(loader.state_dict()) for loader in [*ranks, reference]}) == 1


@pytest.mark.parametrize("packs", [True, False])
def test_an_epoch_holds_every_record_once_and_any_point_of_it_is_resumed_on_any_ranks(packs):
    rows = Cut(ragged(range(2, 19)), 20)
    whole = loaders(rows, 1, 4, packs)[0]
    steps = [documents(whole.step(5)) for _ in range(10)]
    epoch = sum((documents(loaders(rows, 1, 4, packs)[0].step(17)) for _ in range(1)), Counter())
    assert set(epoch.values()) == {1}
    assert len(epoch) == 17
    for stop in (0, 3, 7):
        begun = loaders(rows, 1, 4, packs)[0]
        for _ in range(stop):
            begun.step(5)
        resumed = loaders(rows, 2, 3, packs)
        for loader in resumed:
            loader.load_state_dict(begun.state_dict())
        for expected in steps[stop:]:
            assert documents(b for loader in resumed for b in loader.step(5)) == expected


@pytest.mark.parametrize("packs", [True, False])
@pytest.mark.parametrize(("world", "samples"), [(1, 30), (2, 30), (3, 1), (2, 0)])
def test_validation_is_everything_once_with_equally_many_batches_on_all_ranks(packs, world, samples):
    rows = Cut(ragged([2 + i % 17 for i in range(samples)]), 24)
    kind = partial(packed, row_length=24) if packs else unpacked
    ranks = [RaggedValLoader(rows, partial(kind, most_rows=2, world_size=world), rank, 8) for rank in range(world)]
    batches = [list(loader) for loader in ranks]
    assert {len(found) for found in batches} == {len(loader) for loader in ranks}
    assert sum(documents(b for found in batches for b in found).values()) == samples


def test_the_last_token_of_a_document_predicts_nothing_of_the_next():
    batch = lay([[np.array([5, 6, 7]), np.array([~8, ~9, 4])]])
    assert batch["ids"].tolist() == [[5, 6, 8, 9]]
    assert batch["labels"].tolist() == [[6, 7, IGNORE, 4]]
    assert batch["positions"].tolist() == [[0, 1, 0, 1]]
    assert batch["doc_ids"].tolist() == [[0, 0, 1, 1]]


def test_rows_of_one_whole_document_need_no_boundaries_and_padding_is_a_document_of_its_own():
    assert lay([[np.array([1, 2, 3])], [np.array([4, 5, 6])]]).keys() == {"ids", "labels"}
    assert lay([[np.array([1, 2, 3])], [np.array([4, 5])]])["doc_ids"].tolist() == [[0, 0], [0, -1]]


def test_a_filler_counts_nothing():
    filler = lay([])
    assert filler["labels"].tolist() == [[IGNORE]]
    assert filler["doc_ids"].tolist() == [[-1]]


def test_what_has_nothing_to_learn_within_the_length_is_left_out():
    samples = Samples.joined(
        [np.array(row, np.int32) for row in ([~1, ~2, 3], [~1, ~2, ~3, 4], [5], [], [5, ~6], [1, 2])]
    )
    assert samples.learnt(3).tolist() == [1, 0, 0, 0, 0, 1]
    cut = Cut(samples, 3)
    assert cut.index.tolist() == [0, 5]
    assert cut.positions.tolist() == [2, 1]
    assert len(Cut(samples, 4)) == 3


def test_padding_is_a_document_of_its_own_and_packing_leaves_none():
    rows = Cut(ragged([11, 6]), 20)
    (apart,), (together,) = (loaders(rows, 1, 2, packs=packs)[0].step(2) for packs in (False, True))
    assert (apart["doc_ids"] == -1).sum() == 20 - 15
    assert together["ids"].shape == (1, 15)


# Loss and gradients ---------------------------------------------------------------------------------------------------

KINDS = (
    "pythia-14m",
    "Gemma-2-2b",  # sliding window, both soft-caps
    "Mixtral-8x7B-v0.1",  # experts
    "Phi-3.5-mini-instruct",  # longrope: another rotation beyond 16 tokens
    "deepseek_v3",  # latent attention, experts in groups
)


@pytest.mark.parametrize("name", KINDS)
def test_loss_and_gradient_do_not_depend_on_packing_padding_micro_batch_or_ranks(name):
    model = random_gpt(CONFIGS[name] if name in CONFIGS else shrunk(name))
    rows = Cut(ragged([2, 30, 5, 18, 11, 40, 3, 9, 24, 14]), 48)

    def of(world: int, most_rows: int, packs: bool) -> tuple[float, list[torch.Tensor]]:
        model.zero_grad()
        total = 0.0
        for batch in (b for loader in loaders(rows, world, most_rows, packs) for b in loader.step(10)):
            loss = model(
                batch["ids"], batch.get("positions"), doc_ids=batch.get("doc_ids"), targets=batch["labels"]
            ).total
            loss.backward()
            total += loss.item()
        return total, [p.grad.clone() for p in model.parameters() if p.grad is not None]

    loss, gradients = of(world=1, most_rows=1, packs=False)  # each alone, without padding
    for case in ((1, 8, False), (1, 8, True), (2, 3, True)):
        other, others = of(*case)
        assert other == pytest.approx(loss, rel=1e-5), case
        for ours, theirs in zip(gradients, others, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5 * max(1.0, float(ours.abs().max())))
