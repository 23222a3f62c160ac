"""Rows of token ids in, token ids out: prefill, decode, join, leave, cancel. Knows no text.

submit -> waiting -> (a row is free) -> prefill -> decode, all rows at once -> done, and kept as a prefix

The rows of the cache, from the first on:   running running running | kept kept - -
A row that ends is kept as long as nobody needs its place: a prompt that begins as it did takes over what it holds.
A row that cannot go on (its logits are not finite, its guide breaks) ends alone, with its error.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from litgpt.errors import InputError, UserError, near_miss, one_line
from litgpt.estimate import in_words, kv_cache_bytes, require_fit
from litgpt.generate import scoring
from litgpt.generate.compiled import CompiledStep
from litgpt.generate.sampling import Choice, Guide, Sampler, Sampling, TokenScore, formless, not_finite
from litgpt.generate.scoring import Pair, common
from litgpt.generate.speculation import Drafter, Proposal, judge, padded
from litgpt.generate.stops import StopAutomaton
from litgpt.launch import machine
from litgpt.model import GPT, KVCache

PREFILL_CHUNK = 512  # tokens of prompts taken in at once between two decode steps
LONG_PREFIX = 256  # a prefix of so many tokens is taken over, however long the rest is
SMALL_CACHE = 64 << 20  # bytes; a smaller cache is made without a look at the memory

FinishReason = Literal["stop", "length", "cancelled", "failed"]
AtLimit = Literal["refuse", "stop"]


@dataclass(eq=False)
class Request:
    """A row's whole story: the handle that `submit` returns."""

    ids: list[int]  # the prompt
    max_new_tokens: int
    sampler: Sampler
    stop: StopAutomaton[int]
    leader: Request | None = None  # has the same prompt, and is to read it for this one
    filled: int = 0  # tokens whose keys and values are in the cache
    reused: int = 0  # of them, those that another row had computed
    shown: int = 0  # tokens of the answer that are known to be no part of a stop
    scores: list[TokenScore] = field(default_factory=list)  # of every token drawn, where they were asked for
    finish_reason: FinishReason | None = None
    error: UserError | None = None  # why it has failed
    ended: int = 0  # when, in steps

    @property
    def new(self) -> list[int]:
        """Every token drawn, stops included."""
        return self.sampler.drawn

    @property
    def tokens(self) -> list[int]:
        """The answer so far, without a stop and what may be the beginning of one."""
        return self.new[: self.shown]

    @property
    def has_ended(self) -> bool:
        """Whether no more will come. Raises what it has failed of."""
        if self.error is not None:
            raise self.error
        return self.finish_reason is not None

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

    @property
    def held(self) -> list[int]:
        """The tokens whose keys and values are in the cache."""
        return (self.ids + self.new)[: self.filled]


@dataclass(frozen=True)
class Event:
    """What one step did to one request: tokens that may be shown, and the end if it came."""

    request: Request
    tokens: tuple[int, ...]
    finish_reason: FinishReason | None = None
    scores: tuple[TokenScore, ...] = ()  # of `tokens`, where they were asked for


class Engine:
    """Decodes up to `max_rows` sequences of one model together.

    Args:
        model: a GPT in its final place and precision.
        max_rows: sequences that run at once; further ones wait.
        max_len: prompt and answer together; None: the model's context length. The cache grows to what is asked for.
        n_tokens: ids from here on are rows that no token has; they are never drawn. None: all rows are tokens.
        keep_prefixes: whether rows that have ended are kept for prompts that begin as they did.
        compile: whether decoding is compiled, once, for all rows together at the length of the cache.
        drafter: proposes how rows go on; what it guesses right is had in one forward. It changes no distribution.
        least: tokens of a row that the cache holds from the start; where it grows, a compiled step is compiled again.
    """

    def __init__(
        self,
        model: GPT,
        max_rows: int = 1,
        max_len: int | None = None,
        *,
        n_tokens: int | None = None,
        keep_prefixes: bool = True,
        compile: bool = False,
        drafter: Drafter | None = None,
        least: int = 64,
    ) -> None:
        self.model = model
        self.max_rows = max_rows
        self.max_len = min(max_len or model.config.block_size, model.config.block_size)
        self.n_tokens = n_tokens
        self.least = least
        self.compiled = CompiledStep(model) if compile else None
        self.drafter = drafter
        self.proposed = self.accepted = 0  # tokens, of all rows
        # a compiled step writes to all rows
        self.keep_prefixes = keep_prefixes and (not compile or max_rows == 1)
        self.device = model.wte.weight.device
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []  # place in the list = row of the cache
        self.kept: list[Request | None] = []  # the rows after those; None: nothing is held there
        self.cache: KVCache | None = None
        self.views: dict[int, KVCache] = {}  # of the first rows of the cache, by their number
        self.choice = Choice([])  # of the rows that chose last
        self.just_read = False  # the last step read a prompt: the next one is for the others
        self.steps = 0

    # -- what callers do

    def submit(
        self,
        ids: Sequence[int],
        sampling: Sampling | None = None,
        *,
        max_new_tokens: int = 50,
        stop: Sequence[Sequence[int]] = (),
        logprobs: int | None = None,
        at_limit: AtLimit = "refuse",
        guide: Guide | None = None,
    ) -> Request:
        """Queue a prompt. Every limit is checked here, before anything is allocated.

        Args:
            ids: the prompt.
            sampling: None: draws from the model's own distribution.
            max_new_tokens: longest answer; fewer where a stop comes.
            stop: sequences of ids, each of which ends the answer and is not shown.
            logprobs: how many of the likeliest tokens to report with each token and its log-probability; None: nothing.
            at_limit: where prompt and max_new_tokens exceed the context: "refuse", or "stop" the answer there.
            guide: holds the answer to a form; it ends where nothing more may come.

        Raises:
            InputError: an empty prompt, a negative count, or more tokens than the context or the memory holds.
        """
        max_new_tokens = self._checked(ids, max_new_tokens, at_limit)
        if logprobs is not None and logprobs < 0:
            raise InputError(f"logprobs is {logprobs}; it must be 0 or more, or null for none")
        sampling = sampling or Sampling()
        rows = len(self.model.wte.weight)
        if beyond := next((token for token in sampling.logit_bias if token >= rows), None):
            raise InputError(f"logit_bias names the token {beyond}, but the model has {rows} rows for tokens")
        sampler = Sampler(sampling, list(ids), logprobs, guide)
        request = Request(list(ids), max_new_tokens, sampler, StopAutomaton(stop))
        self._require_memory(request.reach)
        self.waiting.append(request)
        return request

    def submit_samples(
        self,
        ids: Sequence[int],
        samplings: Sequence[Sampling],
        *,
        max_new_tokens: int = 50,
        stop: Sequence[Sequence[int]] = (),
        logprobs: int | None = None,
        at_limit: AtLimit = "refuse",
        guides: Sequence[Guide] = (),
    ) -> list[Request]:
        """Queue several answers to one prompt, which is read once. Arguments as in `submit`; a guide each, or none."""
        held: Sequence[Guide | None] = guides or [None] * len(samplings)
        requests = [
            self.submit(
                ids,
                sampling,
                max_new_tokens=max_new_tokens,
                stop=stop,
                logprobs=logprobs,
                at_limit=at_limit,
                guide=guide,
            )
            for sampling, guide in zip(samplings, held, strict=True)
        ]
        for request in requests[1:]:
            request.leader = requests[0]
        return requests

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
        """One forward: prompts that are still to be read, or one more token for every row, turn by turn."""
        self.steps += 1
        self._admit()
        if asks_nothing := [request for request in self.running if request.max_new_tokens == 0]:
            return [self._finish(request, "length") for request in asks_nothing]
        # what is left of one token is read along with the others' next tokens
        reading = [request for request in self.running if request.unread > 1 or not request.filled]
        others = len(reading) < len(self.running)
        self.just_read = bool(reading) and not (self.just_read and others)
        try:
            if self.just_read:
                return self._prefill(reading)
            return self._decode() if self.running else []
        except BaseException as error:
            self.drop(error)  # what the rows hold is not known any more
            raise

    def drop(self, error: BaseException) -> None:
        """End all that runs, whose readers are told why, and let go of the cache; what waits goes on waiting."""
        why = UserError(f"the answer was cut off, as the step it was part of failed: {one_line(error) or repr(error)}")
        for request in self.running:
            request.finish_reason, request.error = "failed", why
        self.running, self.kept, self.cache, self.views = [], [], None, {}

    def follow(self, request: Request) -> Iterator[int]:
        """The tokens of one request as they come, stops left out. Others go on with it, and may be followed as well.

        Raises:
            UserError: why the request cannot go on.
        """
        given = 0
        while True:
            while given < request.shown:
                yield request.new[given]
                given += 1
            if request.has_ended:
                return
            self.step()

    def generate(
        self,
        ids: Sequence[int],
        sampling: Sampling | None = None,
        *,
        max_new_tokens: int = 50,
        stop: Sequence[Sequence[int]] = (),
        at_limit: AtLimit = "refuse",
    ) -> Generator[int, None, None]:
        """The tokens of one answer as they come. Arguments as in `submit`."""
        request = self.submit(ids, sampling, max_new_tokens=max_new_tokens, stop=stop, at_limit=at_limit)
        try:
            yield from self.follow(request)
        finally:  # a reader that walks away must not leave its row behind
            self.cancel(request)

    @torch.inference_mode()
    def score(self, pairs: Iterable[Pair], *, top: int = 0, at_once: int = PREFILL_CHUNK) -> Iterator[list[TokenScore]]:
        """How likely the model finds given text: for each (what comes before, what follows) the scores of what follows.

        What texts have in common at their beginning is read once, where they are read together.

        Args:
            pairs: ids each; what comes before holds at least one.
            top: how many of the likeliest tokens to report beside each.
            at_once: tokens to read together; a longer text is read alone.

        Raises:
            InputError: nothing comes before, ids that the model does not have, or more than the context holds.
        """
        for batch in scoring.together(self._scorable(pairs), at_once):
            yield from scoring.scores(self.model, batch, top=top, n_tokens=self.n_tokens)

    def _scorable(self, pairs: Iterable[Pair]) -> Iterator[Pair]:
        for before, after in pairs:
            self._checked([*before, *after[:-1]] if before else [], 0, "refuse")
            self._check_ids(after)
            yield before, after

    # -- limits

    def _checked(self, ids: Sequence[int], max_new_tokens: int, at_limit: AtLimit) -> int:
        """The number of new tokens, if this prompt and they can be had."""
        if not len(ids):
            raise InputError("the prompt holds no tokens; give at least one (the beginning-of-text token will do)")
        self._check_ids(ids)
        if max_new_tokens < 0:
            raise InputError(f"max_new_tokens is {max_new_tokens}; it must be 0 or more")
        if at_limit not in ("refuse", "stop"):
            raise InputError(
                f"at_limit is '{at_limit}'; it is 'refuse' or 'stop'{near_miss(at_limit, ('refuse', 'stop'))}"
            )
        room = self.max_len - len(ids)
        if at_limit == "stop" and room > 0:
            max_new_tokens = min(max_new_tokens, room)
        if max_new_tokens > room:
            raise InputError(
                f"a prompt of {len(ids)} tokens and max_new_tokens {max_new_tokens} do not fit into the context of "
                f"{self.max_len} tokens; shorten the prompt or lower --max_new_tokens"
            )
        return max_new_tokens

    def _check_ids(self, ids: Sequence[int]) -> None:
        rows = len(self.model.wte.weight)
        if len(ids) and (max(ids) >= rows or min(ids) < 0):
            wrong = min(ids) if min(ids) < 0 else max(ids)
            raise InputError(
                f"the prompt holds the token {wrong}, but the model has {rows} rows for tokens: the tokenizer is "
                "another model's; put the right tokenizer's files into the checkpoint directory"
            )

    def _require_memory(self, reach: int) -> None:
        """Refuse what no memory holds, as long as nothing has begun."""
        if self.cache is not None and reach <= self.cache.max_len:
            return
        itemsize = self.model.wte.weight.dtype.itemsize
        need = kv_cache_bytes(self.model.config, 1, self._length(reach), itemsize)
        if need > SMALL_CACHE:
            what = f"a cache for {reach} tokens ({in_words(need)})"
            require_fit(need, machine(1).free_memory(), what, "shorten the prompt or lower --max_new_tokens")

    # -- rows

    def _admit(self) -> None:
        for request in list(self.waiting):
            if len(self.running) >= self.max_rows:
                return
            leader = request.leader
            if leader is not None and leader.finish_reason is None and leader.unread:
                continue  # once the prompt is read
            self.waiting.remove(request)
            self._make_room(request.reach)
            self._place(request)

    def _length(self, reach: int) -> int:
        return min(max(self.least, 1 << (reach - 1).bit_length()), self.max_len)

    def _make_room(self, reach: int) -> None:
        """A cache with one more row, of `reach` tokens, and with rows for those that wait. It grows by doubling."""
        rows = min(len(self.running) + 1 + len(self.waiting), self.max_rows) if self.compiled is None else self.max_rows
        if self.cache is None:
            ahead = 0 if self.drafter is None else self.drafter.k + 1
            self.cache = self.model.new_cache(rows, self._length(reach), ahead)
        elif len(self.running) == self.cache.batch_size or reach > self.cache.max_len:
            if len(self.running) == self.cache.batch_size:
                rows = max(rows, min(2 * self.cache.batch_size, self.max_rows))
            else:
                rows = self.cache.batch_size
            self.cache.grow(rows, max(self.cache.max_len, self._length(reach)))
            self.views = {}
        if self.compiled is not None:
            self.compiled.adopt(self.cache)
        self.kept += [None] * (self.cache.batch_size - len(self.running) - len(self.kept))

    def _place(self, request: Request) -> None:
        """Give a request the first row after the running ones, with what another row already knows of its prompt."""
        assert self.cache is not None
        row = len(self.running)
        held = [*self.running, *self.kept]
        source, length = self._longest_prefix(request, held)
        if source is None or source < row:  # a running row keeps what it has
            free = min(range(row, len(held)), key=lambda i: 0 if held[i] is None else held[i].ended)  # type: ignore[union-attr]
            if free != row:
                self._swap(row, free)
            if source is not None:
                self.cache.copy_row(source, row, length)
        elif source != row:
            self._swap(row, source)
        request.filled = request.reused = length
        self.kept.pop(0)
        self.running.append(request)

    def _longest_prefix(self, request: Request, held: Sequence[Request | None]) -> tuple[int | None, int]:
        """The row that holds most of the beginning of a prompt, and how much; the last token is always read anew."""
        assert self.cache is not None
        best, length = None, 0
        for row, other in enumerate(held):
            if other is None or other.filled <= length or not self._turns_alike(request, other):
                continue
            shared = min(common(request.ids, other.held), len(request.ids) - 1)
            if shared > length and self.cache.can_go_back(other.filled, shared):
                best, length = row, shared
        if 2 * length < len(request.ids) and length < LONG_PREFIX:
            return None, 0  # reading it with others, from the start, costs less
        return best, length

    def _turns_alike(self, one: Request, other: Request) -> bool:
        """Whether keys of one would be those of the other: some models turn by how long the text may get."""
        if not self.model.rope.has_two_ranges:
            return True
        limit = self.model.rope.stretch["original_max_seq_len"]
        return (one.reach > limit) == (other.reach > limit)

    def _swap(self, one: int, other: int) -> None:
        """Exchange two rows of the cache, of which the second has ended or is empty."""
        assert self.cache is not None
        held = [*self.running, *self.kept]
        filled = [0 if request is None else request.filled for request in (held[one], held[other])]
        if all(filled):
            self.cache.swap_rows(one, other, max(filled))
        elif any(filled):
            source, target = (one, other) if filled[0] else (other, one)
            self.cache.copy_row(source, target, max(filled))
        held[one], held[other] = held[other], held[one]
        count = len(self.running)
        self.running, self.kept = held[:count], held[count:]  # type: ignore[assignment]

    def _leave(self, request: Request) -> None:
        """Free a row; the last row moves into its place, so that the running rows stay side by side."""
        row, last = self.running.index(request), len(self.running) - 1
        keep = self.keep_prefixes and request.filled > 0 and request.error is None
        assert self.cache is not None
        if request.error is not None:
            self.cache.clear_row(row)
        if row != last:
            if keep:
                self._swap(row, last)
            else:
                self.cache.copy_row(last, row, self.running[last].filled)
                self.running[row] = self.running[last]
        self.running.pop()
        request.ended = self.steps
        self.kept.insert(0, request if keep else None)

    # -- forwards

    def _prefill(self, reading: Sequence[Request]) -> list[Event]:
        """Read a chunk: of as many prompts as fit into one, laid end to end, or of one that is longer or half read."""
        packed: list[Request] = []
        for request in reading:
            if not request.filled and sum(len(r.ids) for r in packed) + len(request.ids) <= PREFILL_CHUNK:
                packed.append(request)
        if len(packed) > 1 and reading[0] in packed:
            return self._read_packed(packed)
        return self._read_chunk(reading[0])

    def _read_packed(self, requests: Sequence[Request]) -> list[Event]:
        assert self.cache is not None
        lengths = [len(request.ids) for request in requests]
        view = self.cache.packed([(self.running.index(r), n) for r, n in zip(requests, lengths, strict=True)])
        view.reach = [request.reach for request in requests]
        idx = torch.tensor([[token for request in requests for token in request.ids]], device=self.device)
        positions = torch.tensor([[p for n in lengths for p in range(n)]], device=self.device)
        hidden = self.model.hidden(idx, positions, cache=view)
        last = torch.tensor(lengths, device=hidden.device).cumsum(0) - 1
        for request in requests:
            request.filled = len(request.ids)
        return self._choose(requests, self.model.logits(hidden[0, last]))

    def _read_chunk(self, request: Request) -> list[Event]:
        assert self.cache is not None
        row = self.running.index(request)
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
        if not request.unread:
            return self._choose([request], logits[:, -1])
        is_finite = bool(logits[:, -1, : self.n_tokens].max().isfinite())
        return [] if is_finite else [self._fail(request, not_finite())]

    def _decode(self) -> list[Event]:
        """One token more for every row; a row whose prompt is half read takes one token of it."""
        rows = list(self.running)
        proposals = self._proposals(rows)
        one_shape = self.compiled is not None and self.compiled.is_compiled  # then the steps of a drafter are all alike
        if proposals and (one_shape or any(proposal.tokens for proposal in proposals)):
            return self._decode_ahead(rows, proposals)
        logits = self._forward(rows)
        choosing = self._fed(rows)
        if len(choosing) < len(rows):
            logits = logits[choosing]
        return self._choose([rows[i] for i in choosing], logits)

    def _fed(self, rows: Sequence[Request]) -> list[int]:
        """Every row was fed its next token; which of them choose now."""
        choosing = []
        for i, request in enumerate(rows):
            if request.filled or len(request.ids) == 1:  # else it waits for its turn to be read
                request.filled += 1
                if not request.unread:
                    choosing.append(i)
        return choosing

    def _proposals(self, rows: Sequence[Request]) -> list[Proposal]:
        """What is said to follow in each row, its last token left out: that is drawn anyway."""
        if self.drafter is None:
            return []
        counts = [
            # a guide knows what may come next, and nothing of what would follow; and the first token of an answer is
            # drawn as such, whether or not all but one of the prompt's were read before
            0
            if request.unread or request.sampler.guide is not None
            else min(self.drafter.k, request.max_new_tokens - len(request.new) - 1)
            for request in rows
        ]
        proposals = [self._drawable(proposal) for proposal in self.drafter.propose(rows, counts)]
        self.proposed += sum(len(proposal.tokens) for proposal in proposals)
        return proposals

    def _drawable(self, proposal: Proposal) -> Proposal:
        """As far as it goes with tokens that can be drawn: a prompt may hold others."""
        most = math.inf if self.n_tokens is None else self.n_tokens
        until = next((i for i, token in enumerate(proposal.tokens) if token >= most), None)
        if until is None:
            return proposal
        return Proposal(proposal.tokens[:until], None if proposal.chances is None else proposal.chances[:until])

    def _decode_ahead(self, rows: Sequence[Request], proposals: Sequence[Proposal]) -> list[Event]:
        """As `_decode`; with its next token each row is fed what was proposed to follow.

        Tokens that turn out wrong are in the cache then, behind all that is held: the next ones are written over them.
        """
        fed = [[request.next_token, *proposal.tokens] for request, proposal in zip(rows, proposals, strict=True)]
        starts = [request.filled for request in rows]
        choosing = self._fed(rows)
        logits = self._forward_ahead(rows, fed, starts, choosing)[:, : self.n_tokens]
        samplers = [rows[i].sampler for i in choosing]
        self.choice = Choice([])  # what it has counted is not all any more
        found = judge(samplers, [proposals[i] for i in choosing], logits)
        for i, scores in zip(choosing, found, strict=True):  # of all, before one leaves and another moves to its place
            if not isinstance(scores, UserError):
                rows[i].filled += len(scores) - 1
        return [
            self._fail(rows[i], scores) if isinstance(scores, UserError) else self._take_all(rows[i], scores)
            for i, scores in zip(choosing, found, strict=True)
        ]

    def _forward_ahead(
        self, rows: Sequence[Request], fed: Sequence[Sequence[int]], starts: Sequence[int], choosing: Sequence[int]
    ) -> Tensor:
        """Logits (N, V) after each token that is fed to the rows that choose; rows end to end."""
        assert self.cache is not None
        at = [i for i in choosing for _ in fed[i]], [place for i in choosing for place in range(len(fed[i]))]
        if self.compiled is not None:
            assert self.drafter is not None
            return self._compiled_forward(self.compiled, rows, fed, starts, self.drafter.k + 1)[at]
        width, limit = max(map(len, fed)), self.cache.max_len
        view = self._view(rows)
        view.span = min(max(starts) + width, limit)
        idx, positions = padded(fed, starts, limit, width, self.device)
        return self.model.logits(self.model.hidden(idx, positions, cache=view)[at])

    def _forward(self, rows: Sequence[Request]) -> Tensor:
        """Logits (B, V) after the next token of every row.

        What this writes for a row that does not go on is written again when it does.
        """
        assert self.cache is not None
        if self.compiled is not None:
            next_tokens = [[request.next_token] for request in rows]
            starts = [request.filled for request in rows]
            return self._compiled_forward(self.compiled, rows, next_tokens, starts, 1)[:, -1]
        view = self._view(rows)
        view.span = max(request.filled for request in rows) + 1
        fed = torch.tensor([[[r.next_token] for r in rows], [[r.filled] for r in rows]], device=self.device)
        logits: Tensor = self.model(fed[0], fed[1], cache=view)[:, -1]
        return logits

    def _view(self, rows: Sequence[Request]) -> KVCache:
        """The rows of the cache that are running."""
        assert self.cache is not None
        view = self.views.get(len(rows))
        if view is None:
            view = self.views[len(rows)] = self.cache.rows(0, len(rows))
        view.reach = [request.reach for request in rows]
        return view

    def _compiled_forward(
        self,
        step: CompiledStep,
        rows: Sequence[Request],
        fed: Sequence[Sequence[int]],
        starts: Sequence[int],
        width: int,
    ) -> Tensor:
        """Logits (B, width, V), with something fed to the rows that nobody uses, so that all steps are of one shape."""
        assert self.cache is not None
        unused = self.cache.batch_size - len(rows)
        self.cache.reach = torch.tensor([r.reach for r in rows] + [1] * unused, device=self.device)
        fed, starts = [*fed, *[[0]] * unused], [*starts, *[0] * unused]
        idx, positions = padded(fed, starts, self.cache.max_len, width, self.device)
        return step(idx, positions, self.cache)[: len(rows)]

    # -- what was drawn

    def _choose(self, requests: Sequence[Request], logits: Tensor) -> list[Event]:
        """The next token of each request from logits (B, V)."""
        if not requests:
            return []
        samplers = [request.sampler for request in requests]
        if self.choice.rows != samplers:
            self.choice = Choice(samplers)
        scores = self.choice(logits[:, : self.n_tokens])
        return [
            self._fail(request, score) if isinstance(score, UserError) else self._take(request, score)
            for request, score in zip(requests, scores, strict=True)
        ]

    def _take(self, request: Request, score: TokenScore) -> Event:
        """Show what may be shown after a drawn token, and end the request if this was its last."""
        if request.sampler.logprobs is not None:
            request.scores.append(score)
        shown = request.stop.push(score.token)
        if request.stop.stopped:
            return self._finish(request, "stop", shown)
        try:
            is_over = request.sampler.guide is not None and request.sampler.guide.is_over
        except Exception as error:
            return self._fail(request, formless(error))
        if is_over:
            return self._finish(request, "stop", shown + request.stop.flush())
        if len(request.new) >= request.max_new_tokens:
            return self._finish(request, "length", shown + request.stop.flush())
        return self._event(request, shown)

    def _take_all(self, request: Request, scores: Sequence[TokenScore]) -> Event:
        """As `_take`, of several tokens, of which all but the last are in the cache. Behind an end nothing counts."""
        events: list[Event] = []
        filled = request.filled
        for i, score in enumerate(scores):
            request.filled = filled - len(scores) + 1 + i
            self.accepted += i > 0
            request.new.append(score.token)
            events.append(self._take(request, score))
            if request.finish_reason is not None:
                break
        tokens = tuple(token for event in events for token in event.tokens)
        return Event(request, tokens, request.finish_reason, tuple(s for event in events for s in event.scores))

    def _finish(self, request: Request, reason: FinishReason, shown: Sequence[int] = ()) -> Event:
        request.finish_reason = reason
        self._leave(request)
        return self._event(request, shown)

    def _fail(self, request: Request, error: UserError) -> Event:
        request.error = error
        return self._finish(request, "failed")

    def _event(self, request: Request, shown: Sequence[int]) -> Event:
        scores = tuple(request.scores[request.shown : request.shown + len(shown)])
        request.shown += len(shown)
        return Event(request, tuple(shown), request.finish_reason, scores)
