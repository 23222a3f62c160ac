"""Data sets to pretrain on: stories and pages that are fetched, and tokens in litdata's chunks."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from litgpt import hub
from litgpt.data import LitData, MicroLlama, OpenWebText, TinyLlama, TinyStories
from litgpt.data.base import IGNORE
from litgpt.errors import InputError, MissingError
from tests.makers.hub import StandIn, stand_in
from tests.makers.numbers import Numbers

ROOT = Path(__file__).parents[1]
DTYPES = {"uint8": 11, "int32": 16, "int64": 18, "uint16": 20}


def opened(module: Any, length: int = 4, tokenizer: Any = None) -> Any:
    """A module taken through its verbs."""
    module.connect(tokenizer or Numbers(eos=None), 2, length)
    module.prepare_data()
    module.setup()
    return module


def trained(module: Any) -> list[list[int]]:
    """The rows of one epoch, in order of their tokens, each with the token after it."""
    loader = module.train_dataloader()
    return sorted(row for batch in loader.step(loader.samples) for row in joined(batch) if row[-1] != IGNORE)


def joined(batch: Any) -> list[list[int]]:
    return [[*ids, labels[-1]] for ids, labels in zip(batch["ids"].tolist(), batch["labels"].tolist(), strict=True)]


def chunks(folder: Path, *rows: list[int], dtype: str = "int32", items: int = 2, **config: Any) -> Path:
    """A folder of litdata chunks, one for each row of tokens."""
    folder.mkdir(parents=True)
    listed = []
    for number, row in enumerate(rows):
        tokens = np.array(row, dtype).tobytes()
        begin = 4 * (items + 2)
        offsets = np.linspace(begin, begin + len(tokens), items + 1).astype(np.uint32)
        path = folder / f"chunk-0-{number}.bin"
        path.write_bytes(np.uint32(items).tobytes() + offsets.tobytes() + tokens)
        size = path.stat().st_size
        listed.append({"chunk_bytes": size, "chunk_size": items, "dim": len(row), "filename": path.name})
    facts = {"compression": None, "encryption": None, "data_format": [f"no_header_tensor:{DTYPES[dtype]}"], **config}
    (folder / "index.json").write_text(json.dumps({"chunks": listed, "config": facts}))
    return folder


# Fetched --------------------------------------------------------------------------------------------------------------


def archive(files: dict[str, Any]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as tar:
        for name, content in files.items():
            data = json.dumps(content).encode()
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return out.getvalue()


@pytest.fixture
def web(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[StandIn]:
    """A stand-in for the Hub, in an empty working directory."""
    monkeypatch.chdir(tmp_path)
    for name in ("HF_TOKEN", *hub.OFFLINE, "http_proxy", "HTTP_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with stand_in() as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        yield server


def stories(begin: int, end: int) -> list[dict[str, Any]]:
    return [{"story": f" {i} {i + 1}\n", "summary": "x"} for i in range(begin, end, 2)]


def test_the_first_file_of_stories_validates_and_the_others_train(web: StandIn) -> None:
    files = {"data01.json": stories(100, 108), "./data00.json": stories(0, 6), "data02.json": stories(108, 113)}
    web.push("datasets/roneneldan/TinyStories", {"TinyStories_all_data.tar.gz": archive(files)})
    module = opened(TinyStories())
    assert trained(module) == [list(range(i, i + 5)) for i in (100, 104, 108)]
    assert [label for batch in module.val_dataloader() for label in batch["labels"].flatten().tolist()][:5] == [
        *range(1, 6)
    ]
    assert not (module.data_path / "TinyStories_all_data.tar.gz").exists()
    web.requests.clear()
    assert opened(TinyStories()).fingerprint() == module.fingerprint()
    assert not web.requests


def test_stories_that_were_unpacked_earlier_are_taken(web: StandIn) -> None:
    folder = Path("data/tinystories/TinyStories_all_data")
    folder.mkdir(parents=True)
    for name, content in {"data00": stories(0, 6), "data01": stories(100, 108)}.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    assert trained(opened(TinyStories())) == [[100, 101, 102, 103, 104]]
    assert not web.requests


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"no archive", "not a whole archive"),
        (archive({"data00.json": stories(0, 6), "data01.json": stories(6, 60)})[:-40], "not a whole archive"),
        (archive({"data00.json": stories(0, 6)}), "1 files of stories were found, two are needed"),
        (archive({"data00.json": [{"text": "a"}]}), r"data00.json: record 1 has no 'story'"),
    ],
)
def test_archives_that_are_none(web: StandIn, content: bytes, words: str) -> None:
    web.push("datasets/roneneldan/TinyStories", {"TinyStories_all_data.tar.gz": content})
    with pytest.raises(InputError, match=words):
        opened(TinyStories())
    assert not Path("data/tinystories/train_text").exists()


def test_nothing_of_an_archive_is_written_by_its_name(web: StandIn, tmp_path: Path) -> None:
    files = {"../../../evil.json": stories(0, 6), "/tmp/evil.json.json": stories(6, 60)}
    web.push("datasets/roneneldan/TinyStories", {"TinyStories_all_data.tar.gz": archive(files)})
    opened(TinyStories())
    assert sorted(path.name for path in tmp_path.rglob("*.jsonl")) == ["evil.json.jsonl", "evil.jsonl"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data"]


def test_pages_are_divided_as_datasets_does(web: StandIn, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    rows = [{"text": f"{i} {i + 1}"} for i in range(0, 200, 2)]
    content = "\n".join(map(json.dumps, rows)).encode()
    web.push("datasets/Skylion007/openwebtext", {"train.jsonl": content})
    script = (
        "from litgpt.data import OpenWebText; module = OpenWebText(val_split_fraction=0.05); "
        "module.connect(None, 1, 1); module._place.mkdir(parents=True); module.fetch()"
    )
    env = os.environ | {"HF_HOME": str(tmp_path / "home"), "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", script], cwd=tmp_path, env=env, check=True, capture_output=True)
    judge = datasets.Dataset.from_list(rows).train_test_split(test_size=0.05, seed=42, shuffle=True)
    module = opened(OpenWebText(val_split_fraction=0.05))
    for folder, part in zip(module._folders, ("train", "test"), strict=True):
        found = [json.loads(line)["text"] for line in (folder / "text.jsonl").read_text().splitlines()]
        assert sorted(found) == sorted(row["text"] for row in judge[part])
    assert len(trained(module)) == (2 * 95 - 1) // 4
    with pytest.raises(InputError, match=r"data.val_split_fraction is 0; give a share between 0 and 1"):
        opened(OpenWebText(val_split_fraction=0))


# Chunks ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_chunk_is_cut_into_blocks(tmp_path: Path, dtype: str) -> None:
    folder = chunks(tmp_path / "c", list(range(10)), [*range(50, 53)], list(range(100, 109)), dtype=dtype)
    module = opened(LitData(folder))
    assert trained(module) == [[0, 1, 2, 3, 4], [4, 5, 6, 7, 8], [100, 101, 102, 103, 104], [104, 105, 106, 107, 108]]
    assert [row for batch in module.val_dataloader() for row in joined(batch)] == trained(module)


def test_splits_are_folders(tmp_path: Path) -> None:
    chunks(tmp_path / "train", list(range(9)))
    chunks(tmp_path / "val", list(range(50, 55)))
    module = opened(LitData(tmp_path, split_names=("train", "val")))
    assert len(trained(module)) == 2
    assert joined(next(iter(module.val_dataloader())))[0] == [50, 51, 52, 53, 54]
    other = opened(LitData(tmp_path, split_names=("val", "val")))
    assert module.fingerprint() != other.fingerprint()


def test_code_is_three_of_ten_blocks_of_tinyllama(tmp_path: Path) -> None:
    chunks(tmp_path / "slimpajama" / "train", list(range(4 * 200 + 1)))
    chunks(tmp_path / "slimpajama" / "val", list(range(9)))
    chunks(tmp_path / "starcoder", list(range(1000, 1000 + 4 * 200 + 1)))
    rows = trained(opened(TinyLlama(tmp_path), tokenizer=Numbers(vocab_size=5000, eos=None)))
    code = [row for row in rows if row[0] >= 1000]
    assert (len(rows) - len(code), len(code)) == (200, 88)
    assert code[-1][0] > 1780  # evenly spread
    for module in (TinyLlama(tmp_path, use_starcoder=False), MicroLlama(tmp_path)):
        assert [row[0] for row in trained(opened(module))] == list(range(0, 800, 4))


def test_chunks_that_cannot_be_used(tmp_path: Path) -> None:
    def refused(folder: str | Path, words: str, kind: type[Exception] = InputError, length: int = 4) -> None:
        with pytest.raises(kind, match=words):
            opened(LitData(folder), length)

    refused(tmp_path, r"no folder of litdata chunks \(index.json is missing\)", MissingError)
    refused("s3://bucket/x", "only chunks on a disk are read")
    row = list(range(9))
    refused(chunks(tmp_path / "a", row), "no chunk is as long as a block of max_seq_length 100", length=100)
    refused(chunks(tmp_path / "b", row, compression="zstd"), "chunks with compression are not read")
    refused(chunks(tmp_path / "c", row, data_format=["jpeg"]), "these chunks hold no tokens")
    refused(chunks(tmp_path / "d"), "lists no chunks")
    refused(chunks(tmp_path / "e", [10**6] * 9), r"holds token 1000000, the tokenizer has \d+")
    cut = chunks(tmp_path / "f", row) / "chunk-0-0.bin"
    cut.write_bytes(cut.read_bytes()[:-1])
    refused(cut.parent, r"chunk-0-0.bin is damaged: expected \d+ bytes")
    cut.unlink()
    refused(cut.parent, r"chunk-0-0.bin is missing", MissingError)
    (tmp_path / "a" / "index.json").write_text(
        (tmp_path / "a" / "index.json").read_text().replace("chunk-0", "../chunk-0")
    )
    refused(tmp_path / "a", "leads out of this directory")
