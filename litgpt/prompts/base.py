"""`PromptStyle`: the verbs that every way to write a conversation has, down to the ids."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from litgpt.prompts.marks import NO_SPAN, SPAN, Guard, answer_mask, read_marks
from litgpt.prompts.messages import Message, checked, plain, take_system, with_system
from litgpt.tokenizer import Encoded, Tokenizer


class Written(NamedTuple):
    """The text of a conversation before it is encoded."""

    parts: list[tuple[str, bool]]  # (text, whether its control tokens are special)
    answers: list[tuple[int, int]]  # where in the text the assistant's begin and end


class PromptStyle:
    """A way to write conversations. A subclass of your own needs `apply` alone.

    Messages are mappings with `role` (system, user, assistant) and `content`.
    """

    name = "custom"
    adds_bos = True  # whether the tokenizer's own rule for bos applies to the text

    @property
    def answers_plainly(self) -> bool:
        """Whether an answer is its text and eos, and nothing else."""
        return True

    @staticmethod
    def from_name(name: str) -> PromptStyle:
        """The style of this name in the table, or of the class name that LitGPT 0.5 had for it."""
        from litgpt.prompts import from_name  # the table's styles are made of this class

        return from_name(name)

    def apply(self, prompt: str | Sequence[Message], *, sys_prompt: str | None = None, **fields: Any) -> str:
        """The text of one prompt, or of a whole conversation, up to where the model goes on."""
        raise NotImplementedError(f"{type(self).__name__} must define apply")

    def render(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Message] | None = None,
        tokens: Mapping[str, str] | None = None,
    ) -> str:
        """The text of a conversation.

        add_generation_prompt: whether it ends with what goes before the next answer.
        tools: JSON schemas of functions that the model may call, for templates that know tools.
        tokens: text of the tokenizer's special tokens (`Tokenizer.special_tokens`), for what ends an answer.
        """
        return self._write(checked(messages), add_generation_prompt, plain(tools), tokens or {}, NO_SPAN)

    def encode(
        self,
        tokenizer: Tokenizer,
        messages: Sequence[Message],
        *,
        sys_prompt: str | None = None,
        add_generation_prompt: bool = True,
        tools: Sequence[Message] | None = None,
        special: bool = False,
    ) -> list[int]:
        """The ids of a conversation: the style's own special tokens are special, those in the messages are text.

        special: whether they are special in the messages too; for messages from somebody who may steer the model.
        """
        messages = with_system(messages, sys_prompt)
        guard = Guard(tokenizer, special)
        written = self._guarded(tokenizer, messages, add_generation_prompt, tools, NO_SPAN, guard)
        return self.finished(tokenizer, tokenizer.encode_parts(written.parts), [])[0]

    def encode_with_mask(
        self,
        tokenizer: Tokenizer,
        messages: Sequence[Message],
        *,
        sys_prompt: str | None = None,
        tools: Sequence[Message] | None = None,
    ) -> tuple[list[int], list[bool]]:
        """The ids of a whole conversation and, for each, whether the assistant wrote it, its end of turn included."""
        written = self.written(tokenizer, with_system(messages, sys_prompt), tools=tools, answers=True)
        return self.finished(tokenizer, tokenizer.encode_parts(written.parts), written.answers)

    def written(
        self,
        tokenizer: Tokenizer,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = False,
        tools: Sequence[Message] | None = None,
        answers: bool = False,
    ) -> Written:
        """The first half of an encoding, of which many can be encoded at once: `Tokenizer.encode_parts_batch`.

        answers: whether to find out where they are, which not every template lets one.
        """
        span = SPAN if answers else NO_SPAN
        return self._guarded(tokenizer, messages, add_generation_prompt, tools, span, Guard(tokenizer))

    def finished(
        self, tokenizer: Tokenizer, encoded: Encoded, answers: Sequence[tuple[int, int]]
    ) -> tuple[list[int], list[bool]]:
        """The second half: the ids with what the tokenizer's rule puts first, and which the assistant wrote."""
        before = tokenizer.opening if self.adds_bos else []
        if encoded.ids[: len(before)] == before:
            before = []
        return before + encoded.ids, [False] * len(before) + answer_mask(encoded, answers)

    def stop_tokens(self, tokenizer: Tokenizer) -> list[list[int]]:
        """Sequences of ids, each of which ends an answer."""
        return [[i] for i in tokenizer.eos_ids]

    def jinja(self, *, adds_bos: bool) -> str | None:
        """A chat template that writes the same text, None where there is none; `adds_bos`: it starts with bos."""
        return None

    def _guarded(
        self,
        tokenizer: Tokenizer,
        messages: Sequence[Message],
        add_generation_prompt: bool,
        tools: Sequence[Message] | None,
        span: tuple[str, str],
        guard: Guard,
    ) -> Written:
        guarded = [guard.message(message) for message in checked(messages)]
        marked = self._write(guarded, add_generation_prompt, guard.value(plain(tools)), tokenizer.special_tokens, span)
        return Written(*read_marks(marked))

    def _write(
        self,
        messages: list[dict[str, Any]],
        add_generation_prompt: bool,
        tools: list[Any] | None,
        tokens: Mapping[str, str],
        span: tuple[str, str],
    ) -> str:
        """The text, with the two strings of `span` around what the assistant wrote."""
        system, turns = take_system(messages)
        text = ""
        for message in turns:
            if message["role"] == "assistant":
                text += "".join((span[0], message["content"], tokens.get("eos_token", ""), span[1]))
            else:
                text, system = text + self.apply(message["content"], sys_prompt=system), None
        return text
