"""The text side of serving: conversations and prompts to ids, and answers from ids to text as they come. No torch."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from typing import Any

from litgpt.deploy import wire
from litgpt.deploy.grammar import Grammars
from litgpt.errors import InputError
from litgpt.generate.stops import StopAutomaton
from litgpt.prompts.template import ChatTemplate
from litgpt.tokenizer import Tokenizer


class Text:
    """What the front knows of a model."""

    def __init__(self, described: wire.Described) -> None:
        self.style, self.context = described.style, described.context
        self.width, self.n_rows = described.width, described.n_rows
        self.tokenizer = Tokenizer(described.tokenizer_dir)
        self.chat_ends = self.style.stop_tokens(self.tokenizer)
        self.raw_ends = [[token] for token in self.tokenizer.eos_ids]
        self.grammars = Grammars(self.tokenizer, [ids[0] for ids in self.chat_ends if len(ids) == 1])
        self.piece = lru_cache(maxsize=1 << 16)(self.tokenizer.decode)  # the text of one token

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """The ids of a conversation, up to where the model answers."""
        style = self.style
        if variables:
            if not isinstance(style, ChatTemplate):
                raise InputError("chat_template_kwargs are for models with a chat template, and this one has none")
            style = replace(style, variables=dict(variables))
        return style.encode(self.tokenizer, messages, tools=tools) or self._opening

    def raw(self, prompt: str) -> list[int]:
        """The ids of a text that the model is to continue as it is."""
        return self.tokenizer.encode(prompt) or self._opening

    @cached_property
    def _opening(self) -> list[int]:
        start = self.tokenizer.bos_id if self.tokenizer.bos_id is not None else self.tokenizer.eos_id
        if start is None:
            raise InputError("the prompt is empty, and the tokenizer has no token to begin with; give a prompt")
        return [start]


@dataclass(frozen=True)
class Piece:
    """What is new of one answer."""

    index: int
    text: str
    scores: list[ScoredText]
    finish_reason: str | None


@dataclass(frozen=True)
class ScoredText:
    """A token with its text, its log-probability, and the same of the likeliest tokens at its place."""

    token: int
    text: str
    logprob: float
    top: list[tuple[int, str, float]]
    offset: int  # where its text begins in the answer


@dataclass(eq=False)
class Answer:
    """One answer on its way from ids to text. It ends before any of the texts in `stop`."""

    text: Text
    index: int
    prompt: Sequence[int]
    stop: Sequence[str] = ()
    shows: frozenset[str] = frozenset()  # control tokens that are part of the text
    said: str = ""
    n_tokens: int = 0
    finish_reason: str | None = None
    scores: deque[ScoredText] = field(default_factory=deque)  # of tokens whose text is not shown yet

    def __post_init__(self) -> None:
        self.stream = self.text.tokenizer.stream(self.prompt, shows=self.shows)
        self.watch = StopAutomaton[str](self.stop)
        self.read = 0  # characters that came out of the stream

    def take(self, event: wire.Delta) -> Piece:
        """What an event adds; its reason is "stop" where a stop text ended the answer: the row may still go on."""
        new, scores = "", iter(event.scores)
        for token in event.tokens:
            if self.watch.stopped:
                break
            self.n_tokens += 1
            if (scored := next(scores, None)) is not None:
                self.scores.append(scored_text(self.text, scored, self.read))
            new += self._shown(self.stream.push(token))
        if self.watch.stopped:
            self.finish_reason = "stop"
        elif event.finish_reason is not None:
            new += self._shown(self.stream.flush())
            new += "" if self.watch.stopped else "".join(self.watch.flush())
            self.finish_reason = "stop" if self.watch.stopped else event.finish_reason
        self.said += new
        is_whole = self.finish_reason is not None and not self.watch.stopped
        ready = []
        while self.scores and (is_whole or self.scores[0].offset < len(self.said)):
            ready.append(self.scores.popleft())
        return Piece(self.index, new, ready, self.finish_reason)

    def _shown(self, text: str) -> str:
        self.read += len(text)
        return "".join(released for character in text for released in self.watch.push(character))


def scored_text(text: Text, scored: wire.Scored, offset: int) -> ScoredText:
    token, logprob, top = scored
    others = [(other, text.piece(other), _finite(chance)) for other, chance in top]
    return ScoredText(token, text.piece(token), _finite(logprob), others, offset)


def _finite(logprob: float) -> float:
    """JSON has no infinity; this is OpenAI's number for "never"."""
    return max(logprob, -9999.0)
