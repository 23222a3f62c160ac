"""What all finetuning data has in common: records are tokenised, what is learnt told from what is read, and packed.

A data set of its own says where its records come from (`records`); all else is here.
"""

# No `from __future__ import annotations`: the command line looks these types up in the modules of subclasses.

import hashlib
import random
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, ClassVar

from litgpt.data.base import DataModule
from litgpt.data.packing import Cut, Plan, Samples, packed, unpacked
from litgpt.errors import InputError
from litgpt.prompts import DEFAULT, PromptStyle, choose, from_name
from litgpt.tokenizer import Tokenizer

if TYPE_CHECKING:
    from litgpt.data.loader import RaggedTrainLoader, RaggedValLoader
    from litgpt.data.records import Record

CONVERSATIONS = {"messages", "sharegpt"}
EASILY_TYPED = 60  # characters of a question that is shown as one to ask the trained model
KEPT = 1000  # records of each part that are kept as they were read, to show them and to try the model on


@dataclass(kw_only=True)
class SFT(DataModule):
    """Records to finetune on."""

    mask_prompt: bool = False
    """Learn only what the assistant wrote, end of turn included; else the prompts, too."""
    prompt_style: str | PromptStyle | None = None
    """Name of a prompt style, or a .jinja file; null: the data set's own for instructions, the checkpoint's chat
    template (or chatml) for conversations, none for completions and plain text."""
    ignore_index: int = -100
    """Has no effect: labels that are not learnt are -100 in every batch."""
    seed: int = 42
    """Of the split, where there is one, and of the order in which records are trained on."""
    num_workers: int = 4
    """Has no effect: records are tokenised before the training starts, on all cores."""
    packing: bool = True
    """Lay several records into one row instead of padding each: the same loss and gradients, in less time."""

    STYLE: ClassVar[str] = "alpaca"  # of instructions, when none is given

    @abstractmethod
    def records(self) -> tuple[Sequence["Record"], Sequence["Record"]]:
        """The records to train on and to validate with; called in every process, after `prepare_data` in one."""

    # -- the verbs

    def connect(self, tokenizer: Tokenizer, batch_size: int, max_seq_length: int) -> None:
        # not in the constructor: the command line would bury the line in one of its own
        if not 0 <= self.seed < 2**63:
            raise InputError(f"data.seed is {self.seed}; give a number from 0 to 2**63 - 1")
        if self.num_workers < 0:
            raise InputError(f"data.num_workers is {self.num_workers}; give 0 or more")
        if getattr(self, "_tokenizer", None) is not tokenizer:
            self._encoded: tuple[Samples, Samples] | None = None
        self._tokenizer, self._batch_size, self._length = tokenizer, batch_size, max_seq_length

    def setup(self) -> None:
        train, val = self._samples
        self._train, self._val = Cut(train, self._length), Cut(val, self._length)
        if len(self._train):
            return
        if not len(train):
            raise InputError(f"{type(self).__name__}: there is no record to train on; {len(val)} validate")
        remedy = "raise train.max_seq_length or set data.mask_prompt false" if self.mask_prompt else "give longer texts"
        raise InputError(
            f"{type(self).__name__}: none of {len(train):,} records has anything to learn within train.max_seq_length "
            f"{self._length} tokens; {remedy}"
        )

    def train_dataloader(self, rank: int = 0, world_size: int = 1) -> "RaggedTrainLoader":
        from litgpt.data.loader import RaggedTrainLoader

        return RaggedTrainLoader(self._train, self.planner(world_size), self.seed, rank)

    def val_dataloader(self, rank: int = 0, world_size: int = 1) -> "RaggedValLoader":
        from litgpt.data.loader import RaggedValLoader

        return RaggedValLoader(self._val, self.planner(world_size), rank)

    def planner(self, world_size: int = 1) -> Callable[[Sequence[int]], Plan]:
        """How the samples of a step are laid out, given their lengths."""
        if self.packing:
            return partial(packed, row_length=self._length, most_rows=self._batch_size, world_size=world_size)
        return partial(unpacked, most_rows=self._batch_size, world_size=world_size)

    # -- what others ask

    def longest_row(self) -> int:
        return max((int(samples.lengths.max(initial=1)) for samples in self._samples), default=1)

    def require_fit(self, context: int) -> None:
        lengths = [int(n) for samples in self._samples for n in samples.lengths]
        if longer := sum(n > context for n in lengths):
            raise InputError(
                f"{longer:,} of {len(lengths):,} records are longer than the model's context of {context} tokens (the "
                f"longest has {max(lengths):,}); give --train.max_seq_length {context} to cut them, or shorten them"
            )

    def row_tokens(self) -> float:
        return float(self._train.positions.mean())

    def style(self) -> PromptStyle:
        return self._encoder.style

    def fingerprint(self) -> str:
        digest = hashlib.sha256(f"{self.packing}".encode())
        for samples in self._samples:
            digest.update(samples.starts.tobytes() + samples.tokens.tobytes())
        return digest.hexdigest()

    def without_effect(self) -> list[str]:
        unused = ("num_workers", "ignore_index")
        return [f"data.{name}" for name in unused if getattr(self, name) != getattr(SFT, name)]

    def notes(self) -> list[str]:
        """How many records are cut or left out."""
        lines = []
        for cut, what in ((self._train, "training"), (self._val, "validation")):
            samples, limit = cut.samples, f"train.max_seq_length {self._length}"
            longer = int((samples.lengths[cut.index] > self._length).sum())
            if longer:
                lines.append(f"{longer:,} of {len(samples):,} {what} records are longer than {limit}; they are cut")
            if out := len(samples) - len(cut):
                lines.append(
                    f"{out:,} of {len(samples):,} {what} records have nothing to learn within {limit}; left out"
                )
        return lines

    def example(self, which: str | int) -> tuple[list[int], str, str]:
        """The prompt of a validation record, or of a training record where none validates."""
        among = self._kept[1] or self._kept[0]
        if which == "random":
            index = random.Random(self.seed).randrange(len(among))
        else:
            index = 0 if which == "first" else int(which)
        if not 0 <= index < len(among):
            raise InputError(f"eval.evaluate_example is {which}; records 0 to {len(among) - 1} can be tried")
        return self._encoder.prompt(among[index])

    def question(self) -> str | None:
        """What a user asks in a validation record, where that is short."""
        asked = (
            str(m["content"]) for r in (*self._kept[1], *self._kept[0]) for m in r.messages[:2] if m["role"] == "user"
        )
        return next((text for text in asked if len(text) <= EASILY_TYPED and text.isprintable()), None)

    @property
    def train_samples(self) -> Cut:
        """What is trained on, as it is trained on."""
        return self._train

    @property
    def val_samples(self) -> Cut:
        """What validates."""
        return self._val

    def where(self, index: int) -> str:
        """Where the record of a training sample was read."""
        record = int(self._train.index[index])
        return self._kept[0][record].where if record < len(self._kept[0]) else f"record {record + 1}"

    # -- tokens

    @property
    def _samples(self) -> tuple[Samples, Samples]:
        """All records, whole; tokenised when first asked for."""
        if self._encoded is None:
            from litgpt.data.encoding import Encoder

            train, val = self.records()
            kinds = {record.kind for records in (train, val) for record in records}
            style = self._choose_style(kinds)
            self._encoder = Encoder(self._tokenizer, style, self.mask_prompt, joins=self.prompt_style is None)
            self._encoded = self._encoder.encode(train), self._encoder.encode(val, "tokenizing validation")
            self._kept = list(train[:KEPT]), list(val[:KEPT])
        return self._encoded

    def _choose_style(self, kinds: set[str]) -> PromptStyle:
        if self.prompt_style is not None or kinds & CONVERSATIONS:
            return choose(self._tokenizer.dir, self._tokenizer, "chatml", self.prompt_style)
        return from_name(self.STYLE) if "instruction" in kinds else DEFAULT
