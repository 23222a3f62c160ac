"""The four verbs of a data module and what its loaders yield. Knows no dataset; needs no torch to be imported."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import TYPE_CHECKING, Protocol, TypedDict

if TYPE_CHECKING:
    from torch import Tensor

    from litgpt.prompts import PromptStyle
    from litgpt.tokenizer import Tokenizer

IGNORE = -100  # a label that is not counted in the loss


class _Rows(TypedDict):
    ids: Tensor  # (B, T) int64
    labels: Tensor  # (B, T) int64, already shifted: labels[b, t] is the token after ids[b, t], or IGNORE


class Batch(_Rows, total=False):
    """One micro-batch of one rank. Rows of several documents say where each begins; rows of one stream need not."""

    positions: Tensor  # (B, T) int64, counted from 0 in each document
    doc_ids: Tensor  # (B, T) int64, documents of a row numbered from 0, -1 for padding


class Loader(Protocol):
    """For validation: everything once, as micro-batches of one rank, equally many on every rank.

    Rows that only fill up the last batches have no label that counts.
    """

    @property
    def samples(self) -> int:
        """All that validate, all ranks together."""
        ...

    def __iter__(self) -> Iterator[Batch]: ...

    def __len__(self) -> int:
        """Batches of this rank."""
        ...


class StatefulLoader(Protocol):
    """For training: never ends, goes from one epoch's order to the next; the loop says when it is enough."""

    @property
    def samples(self) -> int:
        """Samples of an epoch, all ranks together."""
        ...

    def step(self, samples: int) -> list[Batch]:
        """This rank's micro-batches of one optimizer step over the next `samples` samples of all ranks together.

        Equally many on every rank, at least one; one that has nothing left to hold has no label that counts. Which
        samples make up a step does not depend on ranks, micro-batches or packing.
        """
        ...

    def state_dict(self) -> dict[str, int]:
        """Where the next step begins, `{"epoch", "sample"}`: counts what was taken, and is the same on all ranks."""
        ...

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on from there, on any number of ranks and with any batch size."""
        ...


class DataModule(ABC):
    """What to train on. The constructor's parameters are its YAML (`class_path`, `init_args`); they are plain values.

    The order of calls: `connect` (all ranks), `prepare_data` (one process, the others wait), `setup` (all), loaders.
    """

    @abstractmethod
    def connect(self, tokenizer: Tokenizer, batch_size: int, max_seq_length: int) -> None:
        """Take what is known only after the command line: micro-batch size and the tokens of a row."""

    def prepare_data(self) -> None:  # noqa: B027 - a module without preparation is a whole one
        """Download, tokenise, write caches. Anything that only one process may do."""

    def longest_row(self) -> int | None:
        """Tokens of the longest row the data can fill, known once it is prepared; None: as many as are asked for."""
        return None

    def require_fit(self, context: int) -> None:  # noqa: B027
        """InputError where samples are longer than the model's context. Asked when nobody said that they may be cut."""

    def setup(self) -> None:  # noqa: B027
        """Open what `prepare_data` left. Writes nothing."""

    @abstractmethod
    def train_dataloader(self, rank: int = 0, world_size: int = 1) -> StatefulLoader:
        """The endless, shuffled, resumable loader of one rank."""

    @abstractmethod
    def val_dataloader(self, rank: int = 0, world_size: int = 1) -> Loader:
        """Everything that validates, once and in order; of length 0 when nothing does."""

    @abstractmethod
    def fingerprint(self) -> str:
        """Names the content (text, tokenizer, split): equal exactly when a resumed run sees the same data."""

    def without_effect(self) -> list[str]:
        """Settings that the user gave and that this module has no use for, by option."""
        return []

    def row_tokens(self) -> float | None:
        """Mean tokens of a sample, padding left out; None: every sample fills its row."""
        return None

    def style(self) -> PromptStyle | None:
        """How prompts were written, for whoever talks to the trained model; None: they were not."""
        return None

    def example(self, which: str | int) -> tuple[list[int], str, str] | None:
        """A prompt to try the model on while it trains: its ids, its text, the answer in the data.

        which: "first", "random" or a number, of the validation samples (of the training samples if there are none).
        """
        return None

    def question(self) -> str | None:
        """What the trained model may be asked, in a line of a command; None: anything."""
        return None

    def notes(self) -> list[str]:
        """Lines that a user should read before the training starts, such as how many samples were left out."""
        return []

    def unigram_loss(self) -> float | None:
        """The validation loss (nats per token) of a model that knows only how frequent tokens are; None if unknown."""
        return None
