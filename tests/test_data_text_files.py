"""TextFiles: one file is enough, every validation token counts once, and what is too little is said in numbers."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from litgpt.data import DataModule, TextFiles
from litgpt.data.base import IGNORE
from litgpt.errors import InputError, MissingError
from tests.makers.numbers import Numbers

ROOT = Path(__file__).parents[1]


def numbers(begin: int, end: int) -> str:
    return " ".join(map(str, range(begin, end)))


def text(path: Path, content: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)
    return path


def ready(path: Path, *, batch: int = 2, length: int = 8, tokenizer: Numbers | None = None, **fields) -> TextFiles:
    data = TextFiles(path, **fields)
    data.connect(tokenizer or Numbers(eos=None), batch, length)
    data.prepare_data()
    data.setup()
    return data


def counted(loader) -> list[int]:
    return [label for batch in loader for label in batch["labels"].flatten().tolist() if label != IGNORE]


def one_epoch(data: TextFiles) -> list[list[int]]:
    """The rows of one epoch, in order of their first token."""
    loader = data.train_dataloader()
    rows = [row for batch in loader.step(loader.samples) for row in batch["ids"].tolist()]
    return sorted(rows[: loader.samples])


def test_one_file_is_enough_its_last_tokens_validate(tmp_path):
    data = ready(text(tmp_path / "a.txt", numbers(0, 200)), length=10)
    assert one_epoch(data) == [list(range(i, i + 10)) for i in range(0, 180, 10)]
    assert counted(data.val_dataloader()) == list(range(191, 200))


def test_files_of_a_folder_follow_one_another_in_sorted_order(tmp_path):
    for i in (2, 0, 1):
        text(tmp_path / f"{i}.txt", numbers(100 * i, 100 * i + 100))
    data = ready(tmp_path, length=19, tokenizer=Numbers(eos=999), val_fraction=0.1)
    train = [*range(100), 999, *range(100, 200), 999, *range(200, 271)]
    assert one_epoch(data) == sorted(train[i : i + 19] for i in range(0, 266, 19))
    assert counted(data.val_dataloader()) == [*range(272, 300), 999]  # before 271 stands nothing


def test_text_of_its_own_validates_and_then_all_the_rest_trains(tmp_path):
    train, val = text(tmp_path / "t" / "a.txt", numbers(0, 101)), text(tmp_path / "v" / "b.md", numbers(500, 523))
    data = ready(train, val_data_path=val, length=10)
    assert one_epoch(data) == [list(range(i, i + 10)) for i in range(0, 100, 10)]
    assert counted(data.val_dataloader()) == list(range(501, 523))


def test_every_validation_token_counts_once_on_any_number_of_ranks(tmp_path):
    val = text(tmp_path / "v" / "b.txt", numbers(500, 545))
    data = ready(text(tmp_path / "a.txt", numbers(0, 50)), val_data_path=val, batch=2, length=8)
    for world in (1, 2, 4):
        loaders = [data.val_dataloader(rank, world) for rank in range(world)]
        assert {len(loader) for loader in loaders} == {math.ceil(6 / 2 / world)}
        assert sorted(label for loader in loaders for label in counted(loader)) == list(range(501, 545))


def test_a_validation_text_shorter_than_a_block_makes_a_shorter_block(tmp_path):
    data = ready(text(tmp_path / "a.txt", numbers(0, 100)), length=32)
    (batch,) = data.val_dataloader()
    assert batch["ids"].shape == (2, 4)
    assert counted([batch]) == [96, 97, 98, 99]


def test_no_share_for_validation_is_no_validation(tmp_path):
    data = ready(text(tmp_path / "a.txt", numbers(0, 81)), val_fraction=0)
    assert data.train_dataloader().samples == 10
    assert list(data.val_dataloader()) == []
    assert data.unigram_loss() is None


@pytest.mark.parametrize("fraction", [-0.1, 1, 1.5, math.nan])
def test_a_share_that_makes_no_sense_is_refused(tmp_path, fraction):
    with pytest.raises(InputError, match=r"data\.val_fraction is"):
        ready(text(tmp_path / "a.txt", numbers(0, 100)), val_fraction=fraction)


def test_too_little_text_is_refused_with_the_numbers(tmp_path):
    with pytest.raises(
        InputError, match=r"57 training tokens \(3 more validate\).* 64 .*max_seq_length to at most 56 or"
    ):
        ready(text(tmp_path / "a.txt", numbers(0, 60)), length=64)
    assert ready(tmp_path / "a.txt", length=56).train_dataloader().samples == 1
    with pytest.raises(InputError, match=r"a\.txt: 0 training tokens.*; add text"):
        ready(text(tmp_path / "a.txt", "1 2"))


def test_a_validation_text_of_one_token_is_refused(tmp_path):
    train, val = text(tmp_path / "a.txt", numbers(0, 60)), text(tmp_path / "v" / "b.txt", "7")
    with pytest.raises(InputError, match=r"b\.txt: .*two tokens"):
        ready(train, val_data_path=val)


def test_a_path_that_is_not_there_is_refused_before_anything_is_written(tmp_path):
    train = text(tmp_path / "a.txt", numbers(0, 60))
    for fields in ({"path": tmp_path / "nowhere"}, {"path": train, "val_data_path": tmp_path / "nowhere"}):
        with pytest.raises(MissingError, match="nowhere"):
            ready(**fields)
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


def test_rows_of_jsonl_files_may_use_another_key(tmp_path):
    rows = "\n".join(json.dumps({"story": numbers(i, i + 10)}) for i in range(0, 100, 10))
    data = ready(text(tmp_path / "a.jsonl", rows), text_key="story")
    assert one_epoch(data)[0] == list(range(8))


def test_the_cache_lies_where_it_is_asked_for(tmp_path):
    file = text(tmp_path / "text" / "a.txt", numbers(0, 60))
    ready(file, cache_dir=tmp_path / "cache")
    assert [path.name for path in file.parent.iterdir()] == ["a.txt"]
    assert any((tmp_path / "cache").iterdir())


def test_every_rank_opens_what_one_process_prepared(tmp_path):
    file = text(tmp_path / "a.txt", numbers(0, 200))
    ready(file)
    other = TextFiles(file)
    other.connect(Numbers(eos=None), 2, 8)
    before = sorted(tmp_path.rglob("*"))
    other.setup()
    assert sorted(tmp_path.rglob("*")) == before
    assert other.train_dataloader(rank=1, world_size=2).samples == 23


def test_the_fingerprint_names_the_content_not_the_place(tmp_path):
    def fingerprint(folder: str, content: str, vocab_size: int = 1000, **fields) -> str:
        file = text(tmp_path / folder / "a.txt", content)
        return ready(file, tokenizer=Numbers(vocab_size), **fields).fingerprint()

    here = fingerprint("here", numbers(0, 60))
    assert here == fingerprint("there", numbers(0, 60), seed=7, batch=3, length=5)
    val = text(tmp_path / "val" / "a.txt", numbers(0, 9))
    others = [
        fingerprint("a", numbers(0, 61)),
        fingerprint("b", numbers(0, 60), 2000),
        fingerprint("c", numbers(0, 60), val_fraction=0.1),
        fingerprint("d", numbers(0, 60), val_data_path=val),
    ]
    assert len({here, *others}) == 5


def test_the_unigram_loss_is_of_the_validation_text(tmp_path):
    train, val = text(tmp_path / "a.txt", "1 1 1 2 " * 5), text(tmp_path / "v" / "b.txt", "1 2")
    data = ready(train, val_data_path=val, tokenizer=Numbers(4, eos=None))
    assert data.unigram_loss() == pytest.approx(-(math.log(16 / 24) + math.log(6 / 24)) / 2)


def test_a_run_resumed_on_other_ranks_goes_on_in_the_same_order(tmp_path):
    data = ready(text(tmp_path / "a.txt", numbers(0, 500)), batch=4)
    expected = torch.cat([batch["ids"] for batch in data.train_dataloader().step(160)])  # more than two epochs
    begun = data.train_dataloader()
    first = [batch["ids"] for batch in begun.step(60)]
    loaders = [data.train_dataloader(rank, 2) for rank in range(2)]
    for loader in loaders:
        loader.load_state_dict(begun.state_dict())
    turns = zip(*(loader.step(96) for loader in loaders), strict=True)
    rest = [batch["ids"] for both in turns for batch in both]
    assert torch.equal(torch.cat([*first, *rest]), expected[: 4 * 39])


def test_naming_a_data_module_loads_no_torch():
    code = "import sys, litgpt.data; litgpt.data.TextFiles; sys.exit(bool({'torch', 'lightning'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_an_unknown_data_module_names_the_nearest():
    import litgpt.data

    with pytest.raises(AttributeError, match="did you mean 'TextFiles'"):
        litgpt.data.TextFile  # noqa: B018
    assert issubclass(TextFiles, DataModule)
    assert "TextFiles" in dir(litgpt.data)


def test_a_negative_number_of_workers_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"data\.num_workers is -1"):
        TextFiles(tmp_path / "a.txt", num_workers=-1).connect(None, 1, 8)
