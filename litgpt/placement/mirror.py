"""Rank 0 has the engine; what it asks of its part of a model, the other ranks do on theirs.

So there is one place where tokens are chosen, and no two ranks can ever disagree on what comes next. What is told is a
few hundred bytes a step: ids, positions, and which rows of which cache.
"""

from __future__ import annotations

import itertools
import pickle
import threading
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from litgpt.errors import MachineError, UserError
from litgpt.model import GPT, KVCache

SHORT = 8192  # bytes of a message that are sent at once
PATIENCE = timedelta(days=365)  # how long a rank waits to be told something: a chat may rest


class Channel:
    """From rank 0 to the others, by way of the hosts. Every rank makes one, at the same time."""

    def __init__(self) -> None:
        self.group = dist.new_group(backend="gloo", timeout=PATIENCE)

    def send(self, message: Any) -> None:
        raw = pickle.dumps(message)
        head = len(raw).to_bytes(8, "little") + raw
        self._broadcast(torch.frombuffer(bytearray(head[:SHORT].ljust(SHORT)), dtype=torch.uint8))
        if len(head) > SHORT:
            self._broadcast(torch.frombuffer(bytearray(head[SHORT:]), dtype=torch.uint8))

    def receive(self) -> Any:
        short = self._broadcast(torch.empty(SHORT, dtype=torch.uint8)).numpy().tobytes()
        length = 8 + int.from_bytes(short[:8], "little")
        if length > SHORT:
            short += self._broadcast(torch.empty(length - SHORT, dtype=torch.uint8)).numpy().tobytes()
        return pickle.loads(short[8:length])

    def _broadcast(self, buffer: Tensor) -> Tensor:
        dist.broadcast(buffer, 0, group=self.group)
        return buffer


class Mirror:
    """Rank 0's end. A model tells it what it is about to do."""

    def __init__(self, channel: Channel) -> None:
        self.channel = channel
        self.lock = threading.RLock()
        self.depth = 0  # of calls within calls: the outermost says it all
        self.numbers = itertools.count()
        self.places: weakref.WeakKeyDictionary[KVCache, tuple[Any, ...]] = weakref.WeakKeyDictionary()
        self.gone: list[int] = []  # caches that nobody holds any more

    @contextmanager
    def together(
        self, what: str, idx: Tensor, positions: Tensor | None, cache: KVCache | None, told: Mapping[str, Any]
    ) -> Iterator[None]:
        """Inside, every rank is in the forward `what`."""
        with self.lock:
            if self.depth == 0:
                options = {name: _listed(value) for name, value in told.items()}
                self.tell(what, _listed(idx), _listed(positions), self._place(cache), options)
            with self._inside():
                yield

    @contextmanager
    def together_on(self, what: str, x: Tensor) -> Iterator[None]:
        """The same, for what computes on a tensor that only this rank has."""
        with self.lock:
            if self.depth == 0:
                self.tell(what, tuple(x.shape), x.dtype)
                dist.broadcast(x.contiguous(), 0)
            with self._inside():
                yield

    def keep(self, cache: KVCache) -> KVCache:
        """The cache, as one that the other ranks have as well."""
        return MirroredCache(self, cache, next(self.numbers))

    def forget(self, number: int) -> None:
        """Nobody holds this cache any more: said with what is told next."""
        self.gone.append(number)

    def tell(self, *message: Any) -> None:
        with self.lock:
            gone, self.gone = self.gone, []
            try:
                self.channel.send((gone, *message))
            except RuntimeError as error:  # gloo says it in words only
                raise MachineError("the process of another device is gone; load the model again") from error

    @contextmanager
    def _inside(self) -> Iterator[None]:
        self.depth += 1
        try:
            yield
        finally:
            self.depth -= 1

    def _place(self, cache: KVCache | None) -> tuple[Any, ...] | None:
        if cache is None:
            return None
        assert cache in self.places, "a cache of this model is made by model.new_cache"
        return (*self.places[cache], cache.span, _listed(cache.reach))


class MirroredCache(KVCache):
    """A cache that every rank has, with its own heads: what is done to it is done to all of them."""

    def __init__(self, mirror: Mirror, cache: KVCache, number: int) -> None:
        self.__dict__ |= cache.__dict__
        self.mirror, self.number = mirror, number
        mirror.places[self] = (number, "whole", ())
        mirror.tell("new", number, cache.batch_size, cache.max_len, cache.ahead)
        weakref.finalize(self, mirror.forget, number)

    def rows(self, start: int, stop: int) -> KVCache:
        return self._placed(super().rows(start, stop), "rows", (start, stop))

    def packed(self, documents: list[tuple[int, int]]) -> KVCache:
        return self._placed(super().packed(documents), "packed", (documents,))

    def grow(self, rows: int, max_len: int) -> None:
        self._told("grow", rows, max_len)

    def copy_row(self, source: int, target: int, length: int) -> None:
        self._told("copy_row", source, target, length)

    def swap_rows(self, one: int, other: int, length: int) -> None:
        self._told("swap_rows", one, other, length)

    def clear_row(self, row: int) -> None:
        self._told("clear_row", row)

    def _placed(self, view: KVCache, how: str, arguments: tuple[Any, ...]) -> KVCache:
        self.mirror.places[view] = (self.number, how, arguments)
        return view

    def _told(self, what: str, *arguments: int) -> None:
        self.mirror.tell("cache", self.number, what, arguments)
        getattr(super(), what)(*arguments)


def _listed(value: Any) -> Any:
    return value.tolist() if isinstance(value, Tensor) else value


@torch.inference_mode()
def follow(model: GPT, channel: Channel) -> None:
    """Do on this rank what rank 0 does, until it says that it is enough."""
    device = model.wte.weight.device
    caches: dict[int, KVCache] = {}
    views: dict[Any, KVCache] = {}

    def tensor(value: Any) -> Tensor | None:
        return None if value is None else torch.tensor(value, device=device)

    def seen(place: tuple[Any, ...] | None) -> KVCache | None:
        if place is None:
            return None
        number, how, arguments, span, reach = place
        if how == "packed":
            view = caches[number].packed(*arguments)
        else:
            key = (number, how, arguments)
            views[key] = view = views.get(key) or (
                caches[number] if how == "whole" else caches[number].rows(*arguments)
            )
        view.span, view.reach = span, reach
        return view

    while True:
        gone, what, *message = channel.receive()
        for number in gone:
            views = {key: view for key, view in views.items() if key[0] != number}
            del caches[number]
        try:
            match what, message:
                case "stop", _:
                    return
                case "new", [number, rows, length, ahead]:
                    caches[number] = model.new_cache(rows, length, ahead)
                case "cache", [number, verb, arguments]:
                    if verb == "grow":
                        views = {key: view for key, view in views.items() if key[0] != number}
                    getattr(caches[number], verb)(*arguments)
                case "logits", [shape, dtype]:
                    x = torch.empty(shape, dtype=dtype, device=device)
                    dist.broadcast(x, 0)
                    model.logits(x)
                case _, [idx, positions, place, options]:
                    options = {name: tensor(v) if name == "doc_ids" else v for name, v in options.items()}
                    getattr(model, what)(tensor(idx), tensor(positions), cache=seen(place), **options)
        except UserError:
            pass  # rank 0 says the same, and may go on
