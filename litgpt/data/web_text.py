"""Texts of the web to pretrain on: brought once as .jsonl files, then read as any text of the user's own."""

from __future__ import annotations

import json
import shutil
import tarfile
from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, ClassVar

from litgpt import storage
from litgpt.data import fetch
from litgpt.data.base import DataModule, Loader, StatefulLoader
from litgpt.data.text_files import TextFiles
from litgpt.data.tokens import alone_in
from litgpt.errors import InputError, one_line

if TYPE_CHECKING:
    from litgpt.tokenizer import Tokenizer


@dataclass
class WebText(DataModule):
    """Text that is fetched: `fetch` leaves .jsonl files in two folders, all else is as with TextFiles."""

    data_path: Path
    """Where the text and its tokens are kept."""
    seed: int = 42
    """Of the order in which blocks of text are trained on."""
    num_workers: int = 8
    """Has no effect: blocks are slices of a mapped file, which need no worker processes."""

    FOLDERS: ClassVar = ("train_text", "val_text")

    @abstractmethod
    def fetch(self) -> None:
        """Bring the text, unless it is there."""

    def connect(self, tokenizer: Tokenizer, batch_size: int, max_seq_length: int) -> None:
        self._connection = tokenizer, batch_size, max_seq_length
        self._opened: TextFiles | None = None

    def prepare_data(self) -> None:
        with alone_in(self._place, "brings text into", "--data.data_path"):
            if not all(folder.is_dir() for folder in self._folders):
                self.fetch()
        self._texts.prepare_data()

    def longest_row(self) -> int | None:
        return self._texts.longest_row()

    def setup(self) -> None:
        self._texts.setup()

    def train_dataloader(self, rank: int = 0, world_size: int = 1) -> StatefulLoader:
        return self._texts.train_dataloader(rank, world_size)

    def val_dataloader(self, rank: int = 0, world_size: int = 1) -> Loader:
        return self._texts.val_dataloader(rank, world_size)

    def fingerprint(self) -> str:
        return self._texts.fingerprint()

    def unigram_loss(self) -> float | None:
        return self._texts.unigram_loss()

    def without_effect(self) -> list[str]:
        return ["data.num_workers"] if self.num_workers != WebText.num_workers else []

    @property
    def _place(self) -> Path:
        return Path(self.data_path).expanduser()

    @property
    def _folders(self) -> tuple[Path, Path]:
        """Of the text that trains and of that which validates."""
        train, val = (self._place / name for name in self.FOLDERS)
        return train, val

    @property
    def _texts(self) -> TextFiles:
        """The text that was fetched, as a module of its own; it looks at the files, so they must be there."""
        if self._opened is None:
            train, val = self._folders
            self._opened = TextFiles(train, val, seed=self.seed)
            self._opened.connect(*self._connection)
        return self._opened


@dataclass
class TinyStories(WebText):
    """Five million children's stories (arXiv 2305.07759): the first of 50 files validates."""

    data_path: Path = Path("data/tinystories")
    """Where the stories and their tokens are kept."""

    URL: ClassVar[str] = (
        "https://huggingface.co/datasets/roneneldan/TinyStories/resolve/main/TinyStories_all_data.tar.gz"
    )

    def fetch(self) -> None:
        """The archive becomes one .jsonl file for each of its files; it is not kept."""
        earlier = self._place / "TinyStories_all_data"  # unpacked by LitGPT 0.5
        archive = self._place / "download" / "TinyStories_all_data.tar.gz"  # a folder of its own: this one is locked
        if not earlier.is_dir():
            fetch.file(self.URL, archive)
        train, val = self._folders
        with storage.atomic_dir(train, overwrite=True) as train_new, storage.atomic_dir(val, overwrite=True) as val_new:
            shards = _unpacked(earlier) if earlier.is_dir() else _archived(archive)
            names = sorted(_write_stories(name, stories, train_new) for name, stories in shards)
            if len(names) < 2:
                raise InputError(
                    f"{self._place}: {len(names)} files of stories were found, two are needed; fetch it again"
                )
            (train_new / names[0]).rename(val_new / names[0])
        shutil.rmtree(archive.parent, ignore_errors=True)


@dataclass
class OpenWebText(WebText):
    """Eight million pages that were linked on Reddit (a copy of GPT-2's training text)."""

    data_path: Path = Path("data/openwebtext")
    """Where the pages and their tokens are kept."""
    val_split_fraction: float = 0.0005
    """The share of pages that validates, drawn at random."""

    REPO: ClassVar[str] = "Skylion007/openwebtext"

    def connect(self, tokenizer: Tokenizer, batch_size: int, max_seq_length: int) -> None:
        if not 0 < self.val_split_fraction < 1:
            raise InputError(f"data.val_split_fraction is {self.val_split_fraction}; give a share between 0 and 1")
        super().connect(tokenizer, batch_size, max_seq_length)

    @property
    def _folders(self) -> tuple[Path, Path]:
        # another share or seed is another division of the pages
        name = f"{self.val_split_fraction}-{self.seed}"
        return self._place / f"train_text-{name}", self._place / f"val_text-{name}"

    def fetch(self) -> None:
        train, val = self._folders
        with storage.atomic_dir(train, overwrite=True) as train_new, storage.atomic_dir(val, overwrite=True) as val_new:
            fetch.divided(self.REPO, self._place, self.val_split_fraction, self.seed, train_new, val_new)


def _archived(archive: Path) -> Iterator[tuple[str, Any]]:
    """Name and content of each file of stories in an archive; nothing is unpacked by the names in it."""
    try:
        with tarfile.open(archive) as tar:
            for member in tar:
                content = tar.extractfile(member) if member.isfile() and member.name.endswith(".json") else None
                if content is not None:
                    yield Path(member.name).stem, _loaded(content, f"{archive}: {member.name}")
    except (tarfile.TarError, EOFError, OSError) as error:
        raise InputError(
            f"{archive}: not a whole archive ({one_line(error)}); remove it, it is fetched again"
        ) from None


def _unpacked(folder: Path) -> Iterator[tuple[str, Any]]:
    for path in sorted(folder.glob("*.json")):
        with open(path, "rb") as content:
            yield path.stem, _loaded(content, str(path))


def _loaded(content: IO[bytes], where: str) -> Any:
    try:
        return json.load(content)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: not JSON ({one_line(error)}); fetch it again") from None


def _write_stories(name: str, stories: Any, folder: Path) -> str:
    """One row a story; returns the name of the file."""
    with open(folder / f"{name}.jsonl", "w", encoding="utf-8") as out:
        for number, entry in enumerate(stories, start=1):
            story = entry.get("story") if isinstance(entry, dict) else None
            if not isinstance(story, str):
                raise InputError(f"{name}.json: record {number} has no 'story'; fetch the data set again")
            out.write(json.dumps({"text": story.strip()}, ensure_ascii=False) + "\n")
    return f"{name}.jsonl"
