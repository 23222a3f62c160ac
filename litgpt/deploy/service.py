"""What all endpoints share: which model, which settings, what fits, and answers as they are written."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeVar

from litgpt.deploy import wire
from litgpt.deploy.metrics import Metrics
from litgpt.deploy.refusals import Refusal, too_long
from litgpt.deploy.scheduler import Scheduler, Ticket
from litgpt.deploy.schemas import Sampled
from litgpt.deploy.text import Answer, Piece, Text
from litgpt.errors import InputError, shown

Found = TypeVar("Found")
SETTINGS = (
    "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty"
)  # fmt: skip


@dataclass
class Service:
    """One model, its adapters, and how it answers where a request does not say.

    models: the name of each model that clients may ask for -> the adapter that it is; None: the model itself.
    defaults: settings of `Sampling`.
    """

    text: Text
    scheduler: Scheduler
    metrics: Metrics
    models: Mapping[str, str | None]
    defaults: Mapping[str, Any]
    max_new_tokens: int  # of /predict
    streams: bool  # whether /predict does, unless told otherwise
    max_prompt_tokens: int | None
    max_n: int

    def model(self, name: str | None) -> str:
        """The model that was asked for: the first where none was."""
        if name is None:
            return next(iter(self.models))
        if name not in self.models:
            known = ", ".join(self.models)
            raise Refusal(
                404, f"there is no model {shown(name)} here, but {known}", param="model", code="model_not_found"
            )
        return name

    def samplings(self, asked: Sampled, n: int) -> list[dict[str, Any]]:
        """The settings of each of n answers."""
        if n > self.max_n:
            raise Refusal(422, f"n: {n} answers were asked for, and this server writes {self.max_n} at most", param="n")
        settings = dict(self.defaults)
        settings |= {name: value for name in SETTINGS if (value := getattr(asked, name)) is not None}
        bias = {int(token): value for token, value in (asked.logit_bias or {}).items()}
        if beyond := [token for token in bias if token >= self.text.n_rows]:
            raise Refusal(422, f"logit_bias: the model has no token {beyond[0]}", param="logit_bias")
        seeds = [None if asked.seed is None else (asked.seed + i) % 2**63 for i in range(n)]
        return [{**settings, "logit_bias": bias, "seed": seed} for seed in seeds]

    def room(self, ids: Sequence[int], asked: int | None, default: int | None, param: str, field: str) -> int:
        """How long an answer may get: as was asked, or refused; by default as long as fits."""
        context, most = self.text.context, self.max_prompt_tokens
        if asked is not None and asked > context:
            raise Refusal(422, f"{field}: {asked} is more than the model's context of {context} tokens", param=field)
        if most is not None and len(ids) > most:
            message = f"the prompt has {len(ids)} tokens, and this server takes {most}; shorten it"
            raise Refusal(400, message, param=param, code="context_length_exceeded")
        room = context - len(ids)
        if room < (1 if asked is None else asked):
            raise too_long(len(ids), asked or 0, context, param)
        if asked is None:
            return room if default is None else min(default, room)
        return asked

    def require_ids(self, ids: Sequence[int], param: str) -> None:
        if max(ids) >= self.text.n_rows:
            raise Refusal(422, f"{param}: the model has no token {max(ids)}", param=param)

    def write(
        self,
        ids: list[int],
        asked: Sampled,
        *,
        n: int,
        most: int,
        ends: list[list[int]],
        adapter: str | None,
        logprobs: int | None = None,
        grammar: str | None = None,
        shows: frozenset[str] = frozenset(),
    ) -> Writing:
        """Begin n answers to one prompt."""
        command = wire.Generate(0, ids, self.samplings(asked, n), most, ends, logprobs, grammar, adapter)
        ticket = self.scheduler.submit(command)
        return Writing(ticket, [Answer(self.text, i, ids, asked.stops(), shows) for i in range(n)])

    async def ask(self, command: wire.Score | wire.Embed) -> Any:
        """The result of what is no answer."""
        ticket = self.scheduler.submit(command)
        try:
            async for event in ticket.events():
                assert isinstance(event, wire.Result)
                return event.value
        finally:
            ticket.cancel()


class Writing:
    """Answers to one prompt, on their way."""

    def __init__(self, ticket: Ticket, answers: list[Answer]) -> None:
        self.ticket, self.answers = ticket, answers
        self.cached = 0  # tokens of the prompt that were known already

    async def pieces(self) -> AsyncIterator[Piece]:
        """What is new, as it comes. Left early, or after a Refusal, nothing goes on."""
        try:
            async for event in self.ticket.events():
                assert isinstance(event, wire.Delta)
                self.cached = max(self.cached, event.reused)
                answer = self.answers[event.index]
                if answer.finish_reason is None:
                    piece = answer.take(event)
                    if piece.finish_reason is not None:
                        self.ticket.cancel(event.index)  # at a stop text the row would go on
                    yield piece
        finally:
            self.ticket.cancel()

    @property
    def n_prompt(self) -> int:
        return len(self.answers[0].prompt)

    @property
    def n_new(self) -> int:
        return sum(answer.n_tokens for answer in self.answers)


async def merged(writings: Sequence[Writing]) -> AsyncIterator[tuple[int, Piece]]:
    """(which writing, piece) of several, as they come."""
    news: asyncio.Queue[tuple[int, Piece] | BaseException | None] = asyncio.Queue()

    async def follow(number: int, writing: Writing) -> None:
        try:
            async for piece in writing.pieces():
                news.put_nowait((number, piece))
            news.put_nowait(None)
        except Refusal as refusal:
            news.put_nowait(refusal)

    tasks = [asyncio.create_task(follow(number, writing)) for number, writing in enumerate(writings)]
    try:
        going = len(tasks)
        while going:
            found = await news.get()
            if isinstance(found, BaseException):
                raise found
            if found is None:
                going -= 1
            else:
                yield found
    finally:
        for task in tasks:
            task.cancel()
        for writing in writings:
            writing.ticket.cancel()


async def refusing(call: Callable[..., Found], *arguments: Any, param: str | None = None) -> Found:
    """The result of what takes long or refuses input, in a thread: the server goes on meanwhile."""
    try:
        return await asyncio.to_thread(call, *arguments)
    except InputError as error:
        raise Refusal(400, str(error), param=param) from None


def close_all(writings: Sequence[Writing]) -> None:
    for writing in writings:
        with suppress(Exception):
            writing.ticket.cancel()
