"""Records as ids, and which of them a model learns to write. Knows no rows and no torch."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from litgpt.data.packing import Samples
from litgpt.data.records import Record
from litgpt.errors import UserError
from litgpt.prompts import PromptStyle, Style
from litgpt.prompts.base import Written
from litgpt.prompts.marks import Guard, read_marks
from litgpt.report import Bar, quantity
from litgpt.tokenizer import Tokenizer

AT_A_TIME = 512  # records
SECONDS_UNSEEN = 2.0  # before a bar is shown

Ids = tuple[list[int], list[bool]]  # the ids of a record, and which the assistant wrote


@dataclass(frozen=True)
class Encoder:
    """Writes records by a prompt style, in one of four ways:

    text      bos by the tokenizer's rule, the text, eos; all of it is learnt
    joined    prompt and completion without a template: each encoded on its own, as a prompt is when one asks
    apart     one question, one answer, of a style that ends an answer with eos alone: as LitGPT always did, the prompt
              with bos by the rule, the answer a text of its own, eos
    whole     any other conversation: encoded as one text, as chat templates are
    """

    tokenizer: Tokenizer
    style: PromptStyle
    is_masked: bool  # only what the assistant wrote is learnt
    joins: bool  # completions are joined, not written by the style

    def encode(self, records: Sequence[Record], what: str = "tokenizing") -> Samples:
        """All records, in order. InputError, which names the record, where the style cannot write one."""
        rows: list[np.ndarray] = []
        tokens = 0
        with Bar(len(records), what, delay=SECONDS_UNSEEN, shown=_is_first_process()) as bar:
            for first in range(0, len(records), AT_A_TIME):
                rows += self._rows(records[first : first + AT_A_TIME])
                tokens += sum(map(len, rows[first:]))
                bar.at(len(rows), f"{quantity(tokens)} tokens")
        return Samples.joined(rows)

    def prompt(self, record: Record) -> tuple[list[int], str, str]:
        """What a model is asked for a record: ids and text of the prompt, and the answer that the data has.

        A plain text is asked to be continued from its middle.
        """
        if record.text is not None:
            middle = len(record.text) // 2
            return self.tokenizer.encode(record.text[:middle]), record.text[:middle], record.text[middle:]
        *before, answer = record.messages[: 1 + _last_answer(record)]
        if self._way(record) == self._joined:
            text = str(before[-1]["content"])
            return self.tokenizer.encode(text), text, str(answer["content"])
        written = self._written(record, before, asks=True)
        ids, _ = self.style.finished(self.tokenizer, self.tokenizer.encode_parts(written.parts), [])
        return ids, "".join(text for text, _ in written.parts), str(answer.get("content") or "")

    def _rows(self, records: Sequence[Record]) -> list[np.ndarray]:
        """`Samples` rows of a few records: those that are written alike are encoded at once."""
        rows: dict[int, np.ndarray] = {}
        ways = [self._way(record) for record in records]
        for way in dict.fromkeys(ways):
            places = [i for i, other in enumerate(ways) if other == way]
            for place, (ids, learnt) in zip(places, way([records[i] for i in places]), strict=True):
                row = np.array(ids, np.int32)
                rows[place] = np.where(learnt, row, ~row) if self.is_masked else row
        return [rows[i] for i in range(len(records))]

    def _way(self, record: Record) -> Callable[[Sequence[Record]], list[Ids]]:
        if record.text is not None:
            return self._texts
        if record.kind == "completion" and self.joins:
            return self._joined
        is_single = _last_answer(record) == len(record.messages) - 1 and sum(map(_is_answer, record.messages)) == 1
        is_apart = is_single and record.kind in ("instruction", "completion") and self.style.answers_plainly
        return self._apart if is_apart else self._whole

    def _texts(self, records: Sequence[Record]) -> list[Ids]:
        rows = self.tokenizer.encode_batch([record.text or "" for record in records], eos=True)
        return [(ids, [True] * len(ids)) for ids in rows]

    def _joined(self, records: Sequence[Record]) -> list[Ids]:
        bos, eos = self.tokenizer.opening, self._eos
        found = []
        for record in records:
            texts = [str(message["content"]) for message in record.messages]
            encoded = self.tokenizer.encode_parts([(text, False) for text in texts])
            completion = sum(map(len, texts[:-1]))
            learnt = [start >= completion for start, _ in encoded.spans]
            found.append((bos + encoded.ids + eos, [False] * len(bos) + learnt + [True] * len(eos)))
        return found

    def _apart(self, records: Sequence[Record]) -> list[Ids]:
        guard, eos = Guard(self.tokenizer), self._eos
        written = [self._written(record, record.messages[:-1], asks=True) for record in records]
        prompts = self.tokenizer.encode_parts_batch([each.parts for each in written], spans=False)
        answers = [read_marks(guard.message(dict(record.messages[-1]))["content"])[0] for record in records]
        found = []
        for prompt, answer in zip(prompts, self.tokenizer.encode_parts_batch(answers, spans=False), strict=True):
            asked, _ = self.style.finished(self.tokenizer, prompt, [])
            learnt = answer.ids + eos
            found.append((asked + learnt, [False] * len(asked) + [True] * len(learnt)))
        return found

    def _whole(self, records: Sequence[Record]) -> list[Ids]:
        written = [self._written(record, record.messages, asks=False) for record in records]
        encoded = self.tokenizer.encode_parts_batch([each.parts for each in written], spans=self.is_masked)
        pairs = zip(encoded, written, strict=True)
        return [self.style.finished(self.tokenizer, each, text.answers) for each, text in pairs]

    def _written(self, record: Record, messages: Sequence[dict], *, asks: bool) -> Written:
        """The text of messages of a record; `asks`: up to where the model goes on."""
        answers = self.is_masked and not asks
        try:
            return self.style.written(
                self.tokenizer,
                [self._with_input(message) for message in messages],
                add_generation_prompt=asks,
                tools=record.tools or None,
                answers=answers,
            )
        except UserError as error:
            raise type(error)(f"{record.where}: {error}") from None

    def _with_input(self, message: dict) -> dict:
        """The message, its "input" behind the instruction where the style has no place of its own for it."""
        has_place = isinstance(self.style, Style) and self.style.user_with_input
        if has_place or not message.get("input"):
            return message
        return {"role": message["role"], "content": f"{message['content']}\n\n{message['input']}"}

    @property
    def _eos(self) -> list[int]:
        return self.tokenizer.encode("", bos=False, eos=True)


def _is_answer(message: dict) -> bool:
    return message["role"] == "assistant"


def _last_answer(record: Record) -> int:
    return max(i for i, message in enumerate(record.messages) if _is_answer(message))


def _is_first_process() -> bool:
    return multiprocessing.parent_process() is None and os.environ.get("LOCAL_RANK", "0") == "0"
