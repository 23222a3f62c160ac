"""When to stop: watches streams of symbols, tokens or characters. Loads no torch, for those who see text only."""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Iterable, Sequence
from typing import Generic, TypeVar

Symbol = TypeVar("Symbol", bound=Hashable)


class StopAutomaton(Generic[Symbol]):
    """Watches a stream for any of several sequences, holding back what may be the beginning of one.

    An Aho-Corasick automaton: a state is the longest suffix of the stream that begins some sequence, so `1 1 1 2` ends
    at `1 1 2`. What `push` and `flush` return, laid end to end, is the stream up to the first stop, without it.
    """

    def __init__(self, sequences: Iterable[Sequence[Symbol]]) -> None:
        self.children: list[dict[Symbol, int]] = [{}]
        self.fallback, self.depth, self.ends = [0], [0], [0]  # `ends`: length of the longest sequence that ends here
        for sequence in sequences:
            if len(sequence):
                self._add(sequence)
        self._link()
        self.state = 0
        self.held: deque[Symbol] = deque()
        self.stopped = False

    def _add(self, sequence: Sequence[Symbol]) -> None:
        state = 0
        for symbol in sequence:
            if symbol not in self.children[state]:
                self.children[state][symbol] = len(self.children)
                self.children.append({})
                self.fallback.append(0)
                self.depth.append(self.depth[state] + 1)
                self.ends.append(0)
            state = self.children[state][symbol]
        self.ends[state] = len(sequence)

    def _link(self) -> None:
        queue = deque(self.children[0].values())
        while queue:
            state = queue.popleft()
            for symbol, child in self.children[state].items():
                self.fallback[child] = self._next(self.fallback[state], symbol)
                self.ends[child] = max(self.ends[child], self.ends[self.fallback[child]])
                queue.append(child)

    def _next(self, state: int, symbol: Symbol) -> int:
        while state and symbol not in self.children[state]:
            state = self.fallback[state]
        return self.children[state].get(symbol, 0)

    def push(self, symbol: Symbol) -> list[Symbol]:
        """Take one symbol; return those that are now known to be no part of a stop. Sets `stopped` at a stop."""
        if self.stopped:
            return []
        self.held.append(symbol)
        self.state = self._next(self.state, symbol)
        if self.ends[self.state]:
            self.stopped = True
            free = len(self.held) - self.ends[self.state]
        else:
            free = len(self.held) - self.depth[self.state]
        released = [self.held.popleft() for _ in range(free)]
        if self.stopped:
            self.held.clear()
        return released

    def flush(self) -> list[Symbol]:
        """The stream has ended: what was held back was no stop."""
        released = list(self.held)
        self.held.clear()
        return released
