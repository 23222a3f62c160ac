"""Rows of token ids in, token ids out: prefill, decode, join, leave, cancel. Knows no text.

submit -> waiting -> (a row is free) -> prefill, one chunk a step -> decode, all rows at once -> done
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch

from litgpt.errors import InputError
from litgpt.generate.sampling import Sampler, Sampling, StopAutomaton
from litgpt.model import GPT, KVCache

PREFILL_CHUNK = 512  # tokens of a prompt taken in at once between two decode steps

FinishReason = Literal["stop", "length", "cancelled"]


@dataclass(eq=False)
class Request:
    """A row's whole story: the handle that `submit` returns."""

    ids: list[int]  # the prompt
    max_new_tokens: int
    sampler: Sampler
    stop: StopAutomaton[int]
    filled: int = 0  # tokens whose keys and values are in the cache
    new: list[int] = field(default_factory=list)  # every token drawn, stops included
    finish_reason: FinishReason | None = None

    @property
    def reach(self) -> int:
        """Tokens it may come to."""
        return len(self.ids) + self.max_new_tokens

    @property
    def unread(self) -> int:
        """Tokens of the prompt that are not yet in the cache."""
        return max(len(self.ids) - self.filled, 0)

    @property
    def next_token(self) -> int:
        """The token to be fed next, of the prompt or drawn."""
        return self.ids[self.filled] if self.unread else self.new[-1]


@dataclass(frozen=True)
class Event:
    """What one step did to one request: tokens that may be shown, and the end if it came."""

    request: Request
    tokens: tuple[int, ...]
    finish_reason: FinishReason | None = None


class Engine:
    """Decodes up to `max_rows` sequences of one model together.

    Args:
        model: a GPT in its final place and precision.
        max_rows: sequences that run at once; further ones wait.
        max_len: prompt and answer together; None: the model's context length. The cache grows to what is asked for.
        n_tokens: ids from here on are rows that no token has; they are never drawn. None: all rows are tokens.
    """

    def __init__(
        self, model: GPT, max_rows: int = 1, max_len: int | None = None, *, n_tokens: int | None = None
    ) -> None:
        self.model = model
        self.max_rows = max_rows
        self.max_len = min(max_len or model.config.block_size, model.config.block_size)
        self.n_tokens = n_tokens
        self.device = model.lm_head.weight.device
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []  # place in the list = row of the cache
        self.cache: KVCache | None = None
        self.just_read = False  # the last step read a prompt: the next one is for the others

    def submit(
        self,
        ids: Sequence[int],
        sampling: Sampling | None = None,
        *,
        max_new_tokens: int = 50,
        stop: Sequence[Sequence[int]] = (),
    ) -> Request:
        """Queue a prompt. Every limit is checked here, before anything is allocated.

        Raises:
            InputError: an empty prompt, a negative count, or more tokens than the context holds.
        """
        if not len(ids):
            raise InputError("the prompt holds no tokens; give at least one (the beginning-of-text token will do)")
        rows = len(self.model.lm_head.weight)
        if max(ids) >= rows or min(ids) < 0:
            raise InputError(
                f"the prompt holds the token {max(ids)}, but the model has {rows} rows for tokens: the tokenizer is "
                "another model's; put the right tokenizer's files into the checkpoint directory"
            )
        if max_new_tokens < 0:
            raise InputError(f"max_new_tokens is {max_new_tokens}; it must be 0 or more")
        if len(ids) + max_new_tokens > self.max_len:
            raise InputError(
                f"a prompt of {len(ids)} tokens and max_new_tokens {max_new_tokens} do not fit into the context of "
                f"{self.max_len} tokens; shorten the prompt or lower --max_new_tokens"
            )
        sampler = Sampler(sampling or Sampling(), self.device)
        request = Request(list(ids), max_new_tokens, sampler, StopAutomaton(stop))
        self.waiting.append(request)
        return request

    @torch.inference_mode()
    def cancel(self, request: Request) -> None:
        """End a request; its row is free at once."""
        if request in self.waiting:
            self.waiting.remove(request)
        elif request in self.running:
            self._leave(request)
        request.finish_reason = request.finish_reason or "cancelled"

    @property
    def busy(self) -> bool:
        return bool(self.waiting or self.running)

    @torch.inference_mode()
    def step(self) -> list[Event]:
        """One forward: a chunk of a prompt that is still being read, or one more token for every row, turn by turn."""
        self._admit()
        if asks_nothing := [request for request in self.running if request.max_new_tokens == 0]:
            return [self._finish(request, "length") for request in asks_nothing]
        reading = next((request for request in self.running if request.unread), None)
        others = any(not request.unread for request in self.running)
        self.just_read = reading is not None and not (self.just_read and others)
        if reading is not None and self.just_read:
            return self._prefill(self.running.index(reading), reading)
        return self._decode() if self.running else []

    def generate(
        self,
        ids: Sequence[int],
        sampling: Sampling | None = None,
        *,
        max_new_tokens: int = 50,
        stop: Sequence[Sequence[int]] = (),
    ) -> Generator[int, None, None]:
        """The tokens of one answer as they come, stops left out."""
        request = self.submit(ids, sampling, max_new_tokens=max_new_tokens, stop=stop)
        try:
            while request.finish_reason is None:
                for event in self.step():
                    if event.request is request:
                        yield from event.tokens
        finally:  # a reader that walks away must not leave its row behind
            self.cancel(request)

    # -- rows

    def _admit(self) -> None:
        while self.waiting and len(self.running) < self.max_rows:
            request = self.waiting[0]
            if not self._make_room(request.reach):
                return
            self.running.append(self.waiting.popleft())

    def _make_room(self, length: int) -> bool:
        """A cache that holds `length` tokens a row. It grows by doubling, once no row stands in it."""
        if self.cache is not None and length <= self.cache.max_len:
            return True
        if self.running:
            return False
        length = min(max(64, 1 << (length - 1).bit_length()), self.max_len)
        dtype = self.model.lm_head.weight.dtype
        self.cache = None  # the old one goes before the new one comes
        self.cache = KVCache(self.model.config, self.max_rows, length, dtype=dtype, device=self.device)
        return True

    def _leave(self, request: Request) -> None:
        """Free a row; the last row moves into its place, so that the running rows stay side by side."""
        row, last = self.running.index(request), len(self.running) - 1
        if row != last:
            assert self.cache is not None
            self.cache.move_row(last, row)
            self.running[row] = self.running[last]
        self.running.pop()

    # -- forwards

    def _prefill(self, row: int, request: Request) -> list[Event]:
        assert self.cache is not None
        chunk = request.ids[request.filled : request.filled + PREFILL_CHUNK]
        view = self.cache.rows(row, row + 1)
        view.reach = [request.reach]
        idx = torch.tensor([chunk], device=self.device)
        positions = None
        if request.filled:
            view.span = request.filled + len(chunk)
            positions = torch.arange(request.filled, view.span, device=self.device)
        logits = self.model(idx, positions, cache=view, last_only=True)
        request.filled += len(chunk)
        return [] if request.unread else [self._take(request, request.sampler(logits[0, -1, : self.n_tokens]))]

    def _decode(self) -> list[Event]:
        """One token more for every row; a row whose prompt is still being read takes one token of it."""
        assert self.cache is not None
        rows = list(self.running)
        view = self.cache.rows(0, len(rows))
        view.span = max(request.filled for request in rows) + 1
        view.reach = [request.reach for request in rows]
        idx = torch.tensor([[request.next_token] for request in rows], device=self.device)
        positions = torch.tensor([[request.filled] for request in rows], device=self.device)
        logits = self.model(idx, positions, cache=view)
        events = []
        for request, row_logits in zip(rows, logits[:, -1, : self.n_tokens], strict=True):
            request.filled += 1
            if not request.unread:
                events.append(self._take(request, request.sampler(row_logits)))
        return events

    def _take(self, request: Request, token: int) -> Event:
        """Add a drawn token to its request, and end the request if this was its last."""
        request.new.append(token)
        shown = request.stop.push(token)
        if request.stop.stopped:
            return self._finish(request, "stop", shown)
        if len(request.new) >= request.max_new_tokens:
            return self._finish(request, "length", shown + request.stop.flush())
        return Event(request, tuple(shown))

    def _finish(self, request: Request, reason: FinishReason, shown: Sequence[int] = ()) -> Event:
        request.finish_reason = reason
        self._leave(request)
        return Event(request, tuple(shown), reason)
