"""How the next token is chosen, and when to stop. Knows one row of logits and one stream; no text, no model."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor

from litgpt.errors import InputError

Symbol = TypeVar("Symbol", bound=Hashable)


@dataclass(frozen=True)
class Sampling:
    """What shapes the choice of a token, in the order in which it is applied.

    Attributes:
        temperature: logits are divided by it; 0 takes the likeliest token (greedy).
        top_k: only the k likeliest tokens stay; None keeps all.
        top_p: only the likeliest tokens that together reach this probability stay (nucleus, Holtzman et al. 2020).
        seed: makes a row's choices repeatable; None draws a seed.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise InputError(f"temperature is {self.temperature}; it must be 0 (greedy) or a positive number")
        if self.top_k is not None and self.top_k < 1:
            raise InputError(f"top_k is {self.top_k}; it must be 1 or more, or null to keep all tokens")
        if not 0 <= self.top_p <= 1:
            raise InputError(f"top_p is {self.top_p}; it must lie between 0 and 1")
        if self.seed is not None and not 0 <= self.seed < 2**63:
            raise InputError(f"seed is {self.seed}; it must lie between 0 and 2**63 - 1")


class Sampler:
    """One row's choices: its settings and its own random state, so that neighbours do not change its text."""

    def __init__(self, sampling: Sampling, device: torch.device | str = "cpu") -> None:
        self.sampling = sampling
        self.generator = torch.Generator(device)
        if sampling.seed is None:
            self.generator.seed()
        else:
            self.generator.manual_seed(sampling.seed)

    def __call__(self, logits: Tensor) -> int:
        """The next token id from logits (V,).

        Raises:
            InputError: the logits are not finite, so the weights are damaged or overflow in this precision.
        """
        best, token = logits.max(dim=-1)
        if not math.isfinite(best.item()):
            raise InputError(
                "the model's logits are not finite: its weights hold NaN or overflow in this precision; "
                "try --precision 32-true, or download the checkpoint again"
            )
        if self.sampling.temperature == 0:
            return int(token)
        probabilities, tokens = token_distribution(logits, self.sampling)
        place = torch.multinomial(probabilities, 1, generator=self.generator)
        return int(place if tokens is None else tokens[place])


def token_distribution(logits: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor | None]:
    """Probabilities (n,) after temperature, top-k and top-p, and the ids (n,) they belong to (None: all, in order)."""
    logits = logits.float()
    logits = (logits - logits.max()) / sampling.temperature  # the best at 0: no temperature makes it overflow
    if sampling.top_p < 1:
        logits, tokens = logits.topk(min(sampling.top_k or len(logits), len(logits)))  # sorted
        probabilities = logits.softmax(dim=-1)
        reached_before = probabilities.cumsum(dim=-1) - probabilities
        keep = reached_before < sampling.top_p
        keep[0] = True  # top_p 0 keeps the likeliest
        return probabilities[keep] / probabilities[keep].sum(), tokens[keep]
    if sampling.top_k is not None and sampling.top_k < len(logits):
        logits, kept = logits.topk(sampling.top_k)
        return logits.softmax(dim=-1), kept
    return logits.softmax(dim=-1), None


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
