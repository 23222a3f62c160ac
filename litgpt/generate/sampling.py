"""How the next token is chosen. Knows rows of logits; no text, no model."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from litgpt.errors import InputError, UserError, one_line, require_type

NUCLEUS = 256  # of how many tokens a nucleus without top_k is looked for first; larger ones take a sort of all
SPARE = 16  # how many tokens as likely as the k-th are looked for first

MOST_SEED = 2**63 - 1
VAST = 1e30  # logits stay finite in fp32 when they are multiplied by it
# name: least, most, whether the least itself may be taken, and what to say
RANGES: dict[str, tuple[float, float, bool, str]] = {
    "temperature": (0, math.inf, True, "it must be 0 (greedy) or a positive number"),
    "top_p": (0, 1, True, "it must lie between 0 and 1"),
    "min_p": (0, 1, True, "it must lie between 0 and 1"),
    "repetition_penalty": (1 / VAST, VAST, True, "it must be a positive number, up to 1e30; 1 changes nothing"),
    "presence_penalty": (-VAST, VAST, True, "it must be a number, up to 1e30; 0 changes nothing"),
    "frequency_penalty": (-VAST, VAST, True, "it must be a number, up to 1e30; 0 changes nothing"),
}


@dataclass(frozen=True)
class Sampling:
    """What shapes the choice of a token. It is applied in the order of `transformers`: bias, penalties, the rest.

    Attributes:
        temperature: logits are divided by it; 0 takes the likeliest token (greedy).
        top_k: only the k likeliest tokens stay; None keeps all.
        top_p: only the likeliest tokens that together reach this probability stay (nucleus, Holtzman et al. 2020).
        seed: makes a row's choices repeatable; None draws a seed.
        min_p: only tokens at least this many times as likely as the likeliest stay (Nguyen et al. 2024).
        repetition_penalty: positive logits of tokens in prompt or answer are divided by it, negative ones multiplied
            (Keskar et al. 2019).
        presence_penalty: taken from the logits of tokens that the answer holds (OpenAI).
        frequency_penalty: taken from a token's logit once for each time the answer holds it (OpenAI).
        logit_bias: token id -> what is added to its logit.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0
    seed: int | None = None
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        for name, (least, most, with_least, words) in RANGES.items():
            value = getattr(self, name)
            require_type(value, (int, float), name, "a number")
            in_range = least <= value <= most and (with_least or value > least)
            if not (in_range and math.isfinite(value)):
                raise InputError(f"{name} is {value}; {words}")
        for name in ("top_k", "seed"):
            require_type(getattr(self, name), (int, type(None)), name, "a whole number, or null")
        if self.top_k is not None and self.top_k < 1:
            raise InputError(f"top_k is {self.top_k}; it must be 1 or more, or null to keep all tokens")
        if self.seed is not None and not 0 <= self.seed <= MOST_SEED:
            raise InputError(f"seed is {self.seed}; it must lie between 0 and 2**63 - 1")
        for token, bias in self.logit_bias.items():
            if isinstance(token, bool) or not isinstance(token, int) or token < 0:
                raise InputError(f"logit_bias has {token!r} for a token; it maps token ids (whole numbers) to numbers")
            if not isinstance(bias, (int, float)) or not -VAST <= bias <= VAST:
                raise InputError(f"logit_bias is {bias} for token {token}; it must be a number, up to 1e30")

    @property
    def is_greedy(self) -> bool:
        return self.temperature < 1 / VAST  # by less, no logit could be divided in fp32

    @property
    def has_penalty(self) -> bool:
        return (self.repetition_penalty, self.presence_penalty, self.frequency_penalty) != (1, 0, 0)

    @property
    def is_cut(self) -> bool:
        """Whether few tokens stay: then only the likeliest need be looked at."""
        return self.top_k is not None or self.top_p < 1


class TokenScore(NamedTuple):
    """How likely the model itself found a token, before temperature and all other settings."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()  # the likeliest tokens at this place, best first


class Guide(Protocol):
    """Holds a row to a form, such as JSON."""

    def allowed(self, width: int) -> Tensor:
        """(width,) bool, on the CPU: the tokens that may come next; at least one."""

    def take(self, token: int) -> None:
        """This token was drawn."""

    @property
    def is_over(self) -> bool:
        """Whether nothing more may come."""


@dataclass(eq=False)
class Sampler:
    """One row's part: its settings, its history and its own random state, so that neighbours do not change its text.

    The random state is Python's: a text is the same on every device.

    Attributes:
        sampling: the settings.
        prompt: what came before the answer; repetition_penalty looks at it.
        logprobs: how many of the likeliest tokens to report with each choice; None reports nothing.
        guide: what it may say; None: anything.
    """

    sampling: Sampling
    prompt: Sequence[int] = ()
    logprobs: int | None = None
    guide: Guide | None = None
    drawn: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.random = random.Random(self.sampling.seed)

    def __call__(self, logits: Tensor) -> int:
        """The next token id from logits (V,), for a row that is alone."""
        (found,) = Choice([self])(logits.unsqueeze(0))
        if isinstance(found, UserError):
            raise found
        return found.token

    def after(self, tokens: Sequence[int]) -> Sampler:
        """The row as it is once these tokens are drawn. Random state and guide are the same for both."""
        later = copy(self)
        later.drawn = [*self.drawn, *tokens]
        return later


class Choice:
    """How several rows choose: their settings as tensors, so that one kernel serves all rows.

    Made anew when rows come or go; until then it keeps count of what is drawn.
    """

    def __init__(self, rows: Sequence[Sampler]) -> None:
        self.rows = list(rows)
        self.device: torch.device | None = None  # of the logits, seen at the first choice
        self.drawing = [i for i, row in enumerate(rows) if not row.sampling.is_greedy]
        self.penalised = [i for i, row in enumerate(rows) if row.sampling.has_penalty]
        self.scored = [i for i, row in enumerate(rows) if row.logprobs is not None]
        self.guided = [(i, row.guide) for i, row in enumerate(rows) if row.guide is not None]
        self.failed: dict[int, UserError] = {}  # the rows whose guides do not work

    def __call__(self, logits: Tensor) -> list[TokenScore | UserError]:
        """The next token of each row from logits (B, V), with its score where a row asks for scores.

        A row of which nothing can be drawn has the reason instead, and its neighbours go on.
        """
        scores = self.adjusted(logits)
        best, tokens = scores.max(dim=-1)
        if self.drawing:
            tokens[self._drawing] = self._draw(scores if self._all_draw else scores[self._drawing])
        finite, chosen = torch.stack((best.isfinite().long(), tokens)).tolist()
        if not all(finite):
            self.failed |= {i: not_finite() for i, is_finite in enumerate(finite) if not is_finite}
        self.count(chosen, tokens)
        found: list[TokenScore | UserError] = list(self.scores(logits, chosen))
        for i, error in self.failed.items():
            found[i] = error
        return found

    def probabilities(self, logits: Tensor) -> Tensor:
        """(B, V) fp32: the distribution that each row draws from; greedy rows are certain."""
        scores = self.adjusted(logits)
        result = torch.zeros_like(scores, dtype=torch.float32)
        result.scatter_(1, scores.argmax(dim=-1, keepdim=True), 1.0)
        if self.drawing:
            result[self._drawing] = 0
            for rows, weights, tokens in self._weights(scores[self._drawing]):
                weights = weights / weights.sum(dim=-1, keepdim=True)
                part = result[self._drawing[rows]]
                result[self._drawing[rows]] = weights if tokens is None else part.scatter_(1, tokens, weights)
        return result

    def adjusted(self, logits: Tensor) -> Tensor:
        """(B, V) logits with bias, penalties and guides; the same tensor where no row asks for any."""
        if self.device is None:
            self._settle(logits)
        if self._bias is None and not self.penalised and not self.guided:
            return logits
        scores = logits.float().clone() if logits.dtype == torch.float32 else logits.float()
        if self._bias is not None:
            scores.view(-1).index_add_(0, *self._bias)
        if self.penalised:
            part, counts = scores[self._penalised], self._counts
            part = torch.where(
                self._seen, torch.where(part < 0, part * self._repetition, part / self._repetition), part
            )
            scores[self._penalised] = part - counts * self._frequency - (counts > 0) * self._presence
        for i, guide in self.guided:
            try:
                allowed = guide.allowed(scores.size(1))
            except Exception as error:  # whatever a grammar library may raise, it is about this row
                self.failed[i] = formless(error)
            else:
                scores[i].masked_fill_(~allowed.to(scores.device), -math.inf)
        return scores

    # -- settings as tensors

    def _settle(self, logits: Tensor) -> None:
        """Put the settings where the logits are."""
        self.device = logits.device
        width = logits.size(1)
        biases = [
            (i * width + token, bias)
            for i, row in enumerate(self.rows)
            for token, bias in row.sampling.logit_bias.items()
            if token < width
        ]
        self._bias = None
        if biases:
            places, values = zip(*biases, strict=True)
            self._bias = self._tensor(places), self._tensor(values, torch.float32)
        self._drawing = self._tensor(self.drawing)
        self._all_draw = len(self.drawing) == len(self.rows)
        settings = [self.rows[i].sampling for i in self.drawing]
        self._temperature = self._column([s.temperature for s in settings])
        self._log_min_p = self._column([math.log(s.min_p) if s.min_p else -math.inf for s in settings])
        self._has_min_p = any(s.min_p for s in settings)
        # the rows that keep few tokens, and those that keep all (but for min_p)
        self._cut = [i for i, s in enumerate(settings) if s.is_cut]
        self._open = [i for i, s in enumerate(settings) if not s.is_cut]
        cut = [settings[i] for i in self._cut]
        self._most = max((min(s.top_k or NUCLEUS, width) for s in cut), default=0)
        self._top_k = self._column([min(s.top_k or width, width) for s in cut], torch.long)
        self._has_top_k = self._column([s.top_k is not None for s in cut], torch.bool)
        self._top_p = self._column([s.top_p for s in cut])
        self._has_top_p = any(s.top_p < 1 for s in cut)
        if self.penalised:
            self._settle_penalties(width)

    def _settle_penalties(self, width: int) -> None:
        rows = [self.rows[i] for i in self.penalised]
        self._penalised = self._tensor(self.penalised)
        self._repetition = self._column([row.sampling.repetition_penalty for row in rows])
        self._presence = self._column([row.sampling.presence_penalty for row in rows])
        self._frequency = self._column([row.sampling.frequency_penalty for row in rows])
        self._seen = torch.zeros(len(rows), width, dtype=torch.bool, device=self.device)
        self._counts = torch.zeros(len(rows), width, device=self.device)
        for i, row in enumerate(rows):
            seen = self._tensor([t for t in {*row.prompt, *row.drawn} if t < width])
            counts = Counter(token for token in row.drawn if token < width)
            self._seen[i, seen] = True
            self._counts[i, self._tensor(list(counts))] = self._tensor(list(counts.values()), torch.float32)

    def _tensor(self, values: Sequence[float], dtype: torch.dtype = torch.long) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=self.device)

    def _column(self, values: Sequence[float], dtype: torch.dtype = torch.float32) -> Tensor:
        return self._tensor(values, dtype).unsqueeze(1)

    # -- drawing

    def _draw(self, scores: Tensor) -> Tensor:
        """Tokens (b,) of the drawing rows from their scores (b, V)."""
        luck = [self.rows[i].random.random() for i in self.drawing]
        chance = as_chance(luck, scores)
        picks = torch.empty(len(self.drawing), dtype=torch.long, device=scores.device)
        for rows, weights, tokens in self._weights(scores):
            places = inverse_cdf(weights, chance[rows])
            picks[rows] = (places if tokens is None else tokens.gather(1, places)).squeeze(1)
        return picks

    def _weights(self, scores: Tensor) -> Iterable[tuple[Tensor, Tensor, Tensor | None]]:
        """Of the drawing rows, by kind: which rows, weights (b, n) that need not sum to 1, their tokens (None: all)."""
        scores = scores.float()
        # the best at 0: no temperature makes it overflow, and min_p needs no softmax
        scores = (scores - scores.amax(dim=-1, keepdim=True)) / self._temperature
        if self._cut:
            rows = self._tensor(self._cut)
            part = scores if not self._open else scores[rows]
            log_min_p = self._log_min_p[rows] if self._has_min_p else None
            weights, tokens = self._nucleus(part, log_min_p)
            yield rows, weights, tokens
        if self._open:
            rows = self._tensor(self._open)
            part = scores if not self._cut else scores[rows]
            weights = part.exp()
            yield rows, weights.masked_fill(part < self._log_min_p[rows], 0) if self._has_min_p else weights, None

    def _nucleus(self, scores: Tensor, log_min_p: Tensor | None) -> tuple[Tensor, Tensor]:
        """Weights and tokens (b, n) after top-k, top-p and min-p, the likeliest first."""
        width = scores.size(1)
        n = min(self._most + SPARE, width)
        while True:
            values, tokens = _likeliest(scores, n)
            kth = values.gather(1, self._top_k.clamp(max=n) - 1)
            # tokens as likely as the k-th stay, too
            stays = (values >= kth) | ~self._has_top_k
            if self._has_top_p:
                total = torch.where(
                    self._has_top_k,
                    values.masked_fill(~stays, -math.inf).logsumexp(dim=-1, keepdim=True),
                    scores.logsumexp(dim=-1, keepdim=True),
                )
                likely = (values - total).exp()
                is_nucleus = likely.cumsum(dim=-1) - likely < self._top_p
                is_nucleus[:, 0] = True  # top_p 0 keeps the likeliest
                stays &= is_nucleus | (self._top_p == 1)
            # all that stays lies within these n, with whatever is as likely
            in_full = values[:, -1:] < values.masked_fill(~stays, math.inf).amin(dim=-1, keepdim=True)
            if n == width or bool(in_full.all()):
                break
            n = width
        if log_min_p is not None:
            stays &= values >= log_min_p
        return values.exp().masked_fill(~stays, 0), tokens

    # -- afterwards

    def count(self, chosen: list[int], tokens: Tensor) -> None:
        """Each row that works has drawn a token; `tokens` (B,) are the same."""
        for i, (row, token) in enumerate(zip(self.rows, chosen, strict=True)):
            if i in self.failed:
                continue
            row.drawn.append(token)
            if row.guide is not None:
                try:
                    row.guide.take(token)
                except Exception as error:
                    self.failed[i] = formless(error)
        if self.penalised:
            column = tokens[self._penalised].unsqueeze(1)
            self._seen.scatter_(1, column, True)
            self._counts.scatter_add_(1, column, torch.ones_like(self._counts[:, :1]).expand_as(column))

    def scores(self, logits: Tensor, chosen: Sequence[int]) -> list[TokenScore]:
        """What each row chose, with how likely that was where a row asks for it."""
        results = [TokenScore(token, math.nan) for token in chosen]
        if self.scored:
            rows, tokens = self._tensor(self.scored), self._tensor([chosen[i] for i in self.scored])
            most = max(self.rows[i].logprobs or 0 for i in self.scored)
            for i, report in zip(self.scored, token_scores(logits[rows], tokens, most), strict=True):
                results[i] = report._replace(top=report.top[: self.rows[i].logprobs])
        return results


def token_scores(logits: Tensor, tokens: Tensor, top: int = 0) -> list[TokenScore]:
    """The log-probabilities of tokens (N,) under logits (N, V), with the `top` likeliest of each place."""
    logprobs = logits.float().log_softmax(dim=-1)
    own = logprobs.gather(1, tokens.unsqueeze(1)).squeeze(1)
    # of several that are equal, `max` takes the first, and `topk` any
    values, best = logprobs.max(-1, keepdim=True) if top == 1 else logprobs.topk(min(top, logprobs.size(1)))
    return [
        TokenScore(token, score, tuple(zip(ids, scores, strict=True)))
        for token, score, ids, scores in zip(tokens.tolist(), own.tolist(), best.tolist(), values.tolist(), strict=True)
    ]


class NotFiniteError(InputError):
    """Logits of which nothing can be drawn."""


def not_finite(whose: str = "model") -> NotFiniteError:
    return NotFiniteError(
        f"the {whose}'s logits are not finite: its weights hold NaN or overflow in this precision; "
        "try --precision 32-true, or download the checkpoint again"
    )


def formless(error: Exception) -> InputError:
    """A guide that does not work."""
    return InputError(f"the answer cannot be held to its form: {one_line(error)[:200]}")


def _likeliest(scores: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """The n largest values (b, n) and their tokens, of equals the first: how many are looked for changes no order."""
    if n == scores.size(1):
        values, tokens = scores.sort(dim=-1, descending=True, stable=True)
        return values, tokens
    tokens = scores.topk(n, sorted=False).indices.sort(dim=-1).values
    values, order = scores.gather(1, tokens).sort(dim=-1, descending=True, stable=True)
    return values, tokens.gather(1, order)


def as_chance(luck: Sequence[float], weights: Tensor) -> Tensor:
    """Random numbers as `inverse_cdf` takes them: (b, 1), exact where the device can."""
    precision = torch.float32 if weights.is_mps else torch.float64
    return torch.tensor(luck, dtype=precision, device=weights.device).unsqueeze(1)


def inverse_cdf(weights: Tensor, chance: Tensor) -> Tensor:
    """Places (b, 1), drawn with `chance` (b, 1) in [0, 1) from weights (b, n): the first where the sum exceeds it."""
    sums = weights.cumsum(dim=-1, dtype=chance.dtype)
    total = sums[:, -1:]
    # less than the whole, however it is rounded: a token of weight 0 at the end is never drawn
    target = torch.minimum(chance * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(sums, target, right=True).clamp(max=weights.size(1) - 1)  # sums may be NaN
