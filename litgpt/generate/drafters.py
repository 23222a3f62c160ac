"""What guesses how rows go on: the row's own text (`PromptLookup`), or a small model (`DraftModel`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from litgpt.errors import InputError
from litgpt.generate.compiled import CompiledStep
from litgpt.generate.engine import PREFILL_CHUNK, Request
from litgpt.generate.sampling import Choice, Sampler, as_chance, inverse_cdf, not_finite
from litgpt.generate.scoring import common
from litgpt.generate.speculation import Proposal, padded
from litgpt.model import GPT, KVCache

LONGEST_MATCH = 3  # tokens


class PromptLookup:
    """A text that repeats itself goes on as it did before (Saxena 2023): quotes, names, code, summaries.

    What ends a text is looked for in it, from three tokens down to one; what followed it last time is proposed.

    Args:
        k: most tokens to propose.
    """

    def __init__(self, k: int = 3) -> None:
        self.k = _at_least_one(k)
        self.known: WeakKeyDictionary[Request, _Matches] = WeakKeyDictionary()

    def propose(self, requests: Sequence[Request], counts: Sequence[int]) -> list[Proposal]:
        return [
            self.known.setdefault(request, _Matches()).proposal(request.ids + request.new, count)
            if count > 0
            else Proposal()
            for request, count in zip(requests, counts, strict=True)
        ]


@dataclass
class _Matches:
    """Where each run of up to three tokens of a text was last followed by something."""

    ends: dict[tuple[int, ...], int] = field(default_factory=dict)
    read: int = 0

    def proposal(self, text: Sequence[int], count: int) -> Proposal:
        """`text` is what it was the last time, and more."""
        for end in range(self.read + 1, len(text)):
            for length in range(1, min(LONGEST_MATCH, end) + 1):
                self.ends[tuple(text[end - length : end])] = end
        self.read = max(len(text) - 1, self.read)
        for length in range(LONGEST_MATCH, 0, -1):
            end = self.ends.get(tuple(text[-length:]), 0)
            if end:
                tokens: list[int] = []
                for place in range(end, end + count):  # what is copied may run into itself: a b a b -> a b a b a
                    tokens.append(text[place] if place < len(text) else tokens[place - len(text)])
                return Proposal(tokens)
        return Proposal()


@dataclass(eq=False)
class _Row:
    """A row of the draft model's cache."""

    request: Request
    held: list[int] = field(default_factory=list)  # the tokens whose keys and values are in the cache


class DraftModel:
    """A small model of the same vocabulary goes ahead; it has a cache of its own, in step with what was accepted.

    It draws as the row does, with the row's own settings and random state. A row that outgrows its context goes on
    without proposals.

    Args:
        model: in its final place and precision.
        k: most tokens to propose.
        n_tokens: as `Engine`'s.
        compile: whether its steps are compiled.
    """

    def __init__(self, model: GPT, k: int = 3, *, n_tokens: int | None = None, compile: bool = False) -> None:
        self.model, self.k, self.n_tokens = model, _at_least_one(k), n_tokens
        self.compiled = CompiledStep(model) if compile else None
        self.max_len = model.config.block_size
        self.device = model.wte.weight.device
        self.cache: KVCache | None = None
        self.rows: list[_Row] = []  # place in the list = row of the cache

    def propose(self, requests: Sequence[Request], counts: Sequence[int]) -> list[Proposal]:
        self._forget_ended()
        texts = [request.ids + request.new for request in requests]
        counts = [min(count, self.max_len - len(text)) for count, text in zip(counts, texts, strict=True)]
        going = [i for i, count in enumerate(counts) if count > 0]
        proposals = [Proposal()] * len(requests)
        if going:
            places = {row.request: place for place, row in enumerate(self.rows)}
            for i in going:
                if requests[i] not in places:
                    places[requests[i]] = self._begin(requests[i])
                self._read_up_to_the_last(places[requests[i]], texts[i])
            found = self._draw(
                [places[requests[i]] for i in going], [texts[i] for i in going], [counts[i] for i in going]
            )
            for i, proposal in zip(going, found, strict=True):
                proposals[i] = proposal
        return proposals

    def _draw(self, places: Sequence[int], texts: Sequence[list[int]], counts: Sequence[int]) -> list[Proposal]:
        """Token after token, all rows at once; a row that wants fewer than another goes along."""
        requests = [self.rows[place].request for place in places]
        fed = [text[len(self.rows[place].held) :] for text, place in zip(texts, places, strict=True)]
        choice = Choice([request.sampler.after(()) for request in requests])
        # as many numbers as its own tokens take, however many a neighbour takes
        luck = [_luck(request.sampler, count) for request, count in zip(requests, counts, strict=True)]
        drawn: list[list[int]] = [[] for _ in requests]
        chances: list[Tensor] = []  # for each step (rows, V)
        for step in range(max(counts)):
            logits = self._forward(places, fed, is_first=step == 0)
            if choice.drawing:
                chances.append(choice.probabilities(logits))
                numbers = [each[step] if step < len(each) else 0.0 for each in luck]
                found = inverse_cdf(chances[-1], as_chance(numbers, logits)).squeeze(1)
                tokens = found.tolist()
            else:
                best, found = choice.adjusted(logits).max(dim=-1)
                finite, tokens = torch.stack((best.isfinite().long(), found)).tolist()
                if not all(finite):
                    raise not_finite("draft model")
            choice.count(tokens, found)
            fed = [[token] for token in tokens]
            for row, token in zip(drawn, tokens, strict=True):
                row.append(token)
        return [
            Proposal(
                drawn[row][:count],
                torch.stack([each[row] for each in chances[:count]]) if row in choice.drawing else None,
            )
            for row, count in enumerate(counts)
        ]

    # -- rows

    def _forget_ended(self) -> None:
        """The last row moves into the place of one that has ended."""
        for place in reversed(range(len(self.rows))):
            if self.rows[place].request.finish_reason is not None:
                last = self.rows.pop()
                if place < len(self.rows):
                    assert self.cache is not None
                    self.cache.copy_row(len(self.rows), place, len(last.held))
                    self.rows[place] = last

    def _begin(self, request: Request) -> int:
        """The place of a row for a request, with what another one knows of the same prompt."""
        self._make_room(min(request.reach, self.max_len))
        assert self.cache is not None
        new = _Row(request)
        for place, row in enumerate(self.rows):
            length = min(common(request.ids, row.held), len(request.ids) - 1)
            if length > len(new.held) and self.cache.can_go_back(len(row.held), length):
                self.cache.copy_row(place, len(self.rows), length)
                new.held = row.held[:length]
                if length == len(request.ids) - 1:
                    break
        self.rows.append(new)
        return len(self.rows) - 1

    def _make_room(self, reach: int) -> None:
        length, rows = min(max(64, 1 << (reach - 1).bit_length()), self.max_len), len(self.rows) + 1
        if self.cache is None:
            # k - 1 tokens of a proposal are fed, and what fills up a row that is fed one while another is fed two
            self.cache = self.model.new_cache(rows, length, self.k + 1)
        elif rows > self.cache.batch_size or length > self.cache.max_len:
            if rows > self.cache.batch_size:
                rows = 2 * self.cache.batch_size
            self.cache.grow(max(rows, self.cache.batch_size), max(length, self.cache.max_len))
        if self.compiled is not None:
            self.compiled.adopt(self.cache)

    # -- forwards

    def _read_up_to_the_last(self, place: int, text: Sequence[int]) -> None:
        """Forget what was refused; read what is new, but for the last tokens, which are read with the other rows."""
        assert self.cache is not None
        row = self.rows[place]
        row.held = row.held[: min(common(row.held, text), len(text) - 1)]
        while len(text) - len(row.held) > 2:
            start = len(row.held)
            chunk = text[start : min(start + PREFILL_CHUNK, len(text) - 1)]
            self._check_ids(chunk)
            view = self.cache.rows(place, place + 1)
            view.reach, view.span = [self._reach(row)], start + len(chunk)
            positions = torch.arange(start, view.span, device=self.device) if start else None
            self.model.hidden(torch.tensor([chunk], device=self.device), positions, cache=view, last_only=True)
            row.held += chunk

    def _forward(self, places: Sequence[int], fed: Sequence[list[int]], *, is_first: bool) -> Tensor:
        """Logits (n, V) after what is fed to these rows; the other rows are fed something nobody uses."""
        assert self.cache is not None
        rows: list[Sequence[int]] = [[0]] * (len(self.rows) if self.compiled is None else self.cache.batch_size)
        for place, tokens in zip(places, fed, strict=True):
            self._check_ids(tokens)
            rows[place] = tokens
        starts = [len(row.held) for row in self.rows] + [0] * (len(rows) - len(self.rows))
        reach = [self._reach(row) for row in self.rows] + [1] * (len(rows) - len(self.rows))
        width, limit = max(map(len, rows)), self.cache.max_len
        if self.compiled is not None and is_first:
            width = 2  # a row may be fed two then; so it is one shape, and compiled once
        idx, positions = padded(rows, starts, limit, width, self.device)
        at = list(places), [len(tokens) - 1 for tokens in fed]
        if self.compiled is not None:
            self.cache.reach = torch.tensor(reach, device=self.device)
            logits = self.compiled(idx, positions, self.cache)[at]
        else:
            view = self.cache.rows(0, len(rows))
            view.span, view.reach = min(max(starts) + width, limit), reach
            logits = self.model.logits(self.model.hidden(idx, positions, cache=view)[at])
        for place, tokens in zip(places, fed, strict=True):
            self.rows[place].held += tokens
        return logits[:, : self.n_tokens]

    def _reach(self, row: _Row) -> int:
        return min(row.request.reach, self.max_len)

    def _check_ids(self, ids: Sequence[int]) -> None:
        if max(ids) >= len(self.model.wte.weight):
            raise InputError(
                f"the draft model has no token {max(ids)}: its vocabulary is another; choose a draft model of the "
                "same family"
            )


def _luck(sampler: Sampler, count: int) -> list[float]:
    """Random numbers of a row, for `count` tokens; a greedy one needs none."""
    return [] if sampler.sampling.is_greedy else [sampler.random.random() for _ in range(count)]


def _at_least_one(k: int) -> int:
    if k < 1:
        raise InputError(f"speculative_k is {k}; it must be 1 or more")
    return k
