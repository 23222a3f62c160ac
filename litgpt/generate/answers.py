"""Several answers at once, from an engine's rows to text or ids as they come, for a program that holds on to a model.

The program may train the model in between, read several streams by turns, and generate from several threads.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from litgpt.generate.engine import Engine, Request
from litgpt.generate.stops import StopAutomaton
from litgpt.model import GPT
from litgpt.tokenizer import TokenStream


@dataclass(eq=False)
class Decoding:
    """The engine of a model: one for all that is generated, as long as the weights stay what they are."""

    current: Engine | None = None
    weights: list[tuple[int, int]] = field(default_factory=list)  # as they were when it was made
    lock: Any = field(default_factory=threading.RLock)
    abandoned: deque[tuple[Engine, Request]] = field(default_factory=deque)  # requests that nobody waits for any more

    def __reduce__(self) -> Any:
        return Decoding, ()  # a copy of what owns it begins anew

    def engine(self, model: GPT, max_rows: int, **settings: Any) -> Engine:
        """An engine that knows nothing other weights have computed. Called under the lock. Arguments as `Engine`'s."""
        weights = [(parameter.data_ptr(), parameter._version) for parameter in model.parameters()]
        known = self.current
        # the rows of compiled decoding are fixed
        fits = known is not None and (known.compiled is None or known.max_rows == max_rows)
        if known is None or not fits or known.model is not model or weights != self.weights:
            self.current = known = Engine(model, max_rows, **settings)
            self.weights = weights
        known.max_rows = max_rows
        return known

    def forget(self) -> None:
        """What was computed for answers to come may not hold any more."""
        self.current = None

    def step(self, engine: Engine, is_wanted: Callable[[], bool]) -> None:
        """One step, unless another stream or thread has made it meanwhile."""
        with self.lock:
            while self.abandoned:  # not where a stream is let go: that may be anywhere, in the middle of a step too
                other, request = self.abandoned.pop()
                other.cancel(request)
            if is_wanted():
                with evaluating(engine.model):
                    engine.step()


@dataclass(eq=False)
class Row:
    """One answer on its way from ids to text."""

    request: Request
    stream: TokenStream | None
    watch: StopAutomaton[str]
    taken: int = 0  # tokens of the request
    said: str = ""
    is_over: bool = False

    def has_news(self) -> bool:
        return not self.is_over and (self.request.shown > self.taken or self.request.finish_reason is not None)

    def take(self) -> tuple[list[int], str]:
        """The ids and the text that came since the last time."""
        ids, text = [], ""
        is_last = self.request.has_ended  # first: another thread may add to it
        while self.taken < self.request.shown and not self.watch.stopped:
            ids.append(self.request.new[self.taken])
            self.taken += 1
            if self.stream is not None:
                text += self._shown(self.stream.push(ids[-1]))
        self.is_over = is_last or self.watch.stopped
        if self.stream is not None and self.is_over:
            text += self._shown(self.stream.flush())
            text += "" if self.watch.stopped else "".join(self.watch.flush())
        self.said += text
        return ids, text

    def _shown(self, text: str) -> str:
        return "".join(released for character in text for released in self.watch.push(character))


class Stream(Iterator[Any]):
    """Answers on their way: an iterator over the pieces of one, or over (index, piece) of several.

    Pieces are texts or tensors of ids. A stream may be left early (`close`, or just let go), and several of one model
    may be read by turns.
    """

    def __init__(self, decoding: Decoding, engine: Engine, n: int, of_list: bool, as_ids: bool) -> None:
        self.rows: list[Row] = []
        self._decoding, self._engine = decoding, engine
        self._n, self._of_list, self._as_ids = n, of_list, as_ids
        self._pieces = _pieces(decoding, engine, self.rows, of_list, as_ids)

    def __next__(self) -> Any:
        return next(self._pieces)

    @property
    def n_tokens(self) -> int:
        """Tokens of the answers so far."""
        return sum(row.taken for row in self.rows)

    @property
    def finish_reasons(self) -> list[str | None]:
        """Of each answer: "stop", "length" (max_new_tokens), "cancelled", or None while it goes on."""
        return ["stop" if row.watch.stopped else row.request.finish_reason for row in self.rows]

    def whole(self) -> Any:
        """What is left is read; the answers as `generate` returns them without `stream`."""
        for _ in self:
            pass
        whole: list[Any] = [
            _tensor(row.request.new[: row.taken], self._engine) if self._as_ids else row.said for row in self.rows
        ]
        if self._n > 1:
            whole = [whole[i : i + self._n] for i in range(0, len(whole), self._n)]
        return whole if self._of_list else whole[0]

    def close(self) -> None:
        """End the answers that are still on their way."""
        self._pieces.close()
        unfinished = [row.request for row in self.rows if row.request.finish_reason is None]
        self._decoding.abandoned.extend((self._engine, request) for request in unfinished)

    def __del__(self) -> None:
        self.close()


def _pieces(
    decoding: Decoding, engine: Engine, rows: list[Row], of_list: bool, as_ids: bool
) -> Generator[Any, None, None]:
    """Not a method of `Stream`: it would hold on to a stream that nobody else does."""
    single = len(rows) == 1 and not of_list
    while waiting := [(index, row) for index, row in enumerate(rows) if not row.is_over]:
        decoding.step(engine, lambda: not any(row.has_news() for _, row in waiting))
        for index, row in waiting:
            if not row.has_news():
                continue
            ids, text = row.take()
            if row.watch.stopped and row.request.finish_reason is None:
                decoding.abandoned.append((engine, row.request))
            piece = _tensor(ids, engine) if as_ids else text
            if len(piece):
                yield piece if single else (index, piece)


def _tensor(ids: list[int], engine: Engine) -> Tensor:
    return torch.tensor(ids, dtype=torch.int64, device=engine.device)


@contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """The model as it answers, not as it trains: afterwards each module is as it was."""
    training = [module for module in model.modules() if module.training] if model.training else []
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True
