"""Several tokens from one forward: what a drafter proposes for a row, the model judges at once.

    fed             man   keeps  the   lamp       the newest token, and three that were proposed
    drawn after it  keeps  the   oil    -         the model's own: up to where they part, they count

A proposal costs little, as a forward reads all weights for one token as for several, and changes nothing: what comes
out has the distribution that the row has without. Knows rows of logits; which tokens to propose is a drafter's to know.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from litgpt.errors import UserError
from litgpt.generate.sampling import Choice, Sampler, TokenScore, as_chance, inverse_cdf, not_finite

if TYPE_CHECKING:
    from litgpt.generate.engine import Request


@dataclass(frozen=True, eq=False)
class Proposal:
    """What may come next in a row."""

    tokens: Sequence[int] = ()
    chances: Tensor | None = None  # (tokens, V) fp32: what they were drawn from; None: they were not drawn


class Drafter(Protocol):
    """Guesses how rows go on."""

    k: int  # most tokens that it proposes at once

    def propose(self, requests: Sequence[Request], counts: Sequence[int]) -> list[Proposal]:
        """For each request at most so many tokens to follow its text; what it says of one hangs on that one alone."""


Drawn = list[TokenScore] | UserError  # at least one token, or why there is none


def judge(samplers: Sequence[Sampler], proposals: Sequence[Proposal], logits: Tensor) -> list[Drawn]:
    """What each row draws: proposed tokens, as far as they are right, and one more. They are not yet counted as drawn.

    Args:
        samplers: of the rows.
        proposals: for each row.
        logits: (N, V), after the newest token of a row and after each that was proposed for it; rows end to end.
    """
    parts = logits.split([len(proposal.tokens) + 1 for proposal in proposals])
    results: list[Drawn] = [[] for _ in samplers]
    for way, was_drawn in ((_compare, False), (_weigh, True)):
        rows = [i for i, proposal in enumerate(proposals) if (proposal.chances is not None) == was_drawn]
        if rows:
            part = logits if len(rows) == len(samplers) else torch.cat([parts[i] for i in rows])
            found = way([samplers[i] for i in rows], [proposals[i] for i in rows], part)
            for i, scores in zip(rows, found, strict=True):
                results[i] = scores
    return results


def _before_failure(found: Sequence[TokenScore | UserError]) -> Drawn:
    """The tokens up to the first place where nothing can be drawn: fed the last of them, the row fails then."""
    drawn: list[TokenScore] = []
    for score in found:
        if isinstance(score, UserError):
            return drawn or score
        drawn.append(score)
    return drawn


def _compare(samplers: Sequence[Sampler], proposals: Sequence[Proposal], logits: Tensor) -> list[Drawn]:
    """Proposals that were not drawn: each row draws at all places as it does without, and so keeps its text."""
    states = [sampler.random.getstate() for sampler in samplers]
    scores = iter(Choice(_places(samplers, proposals))(logits))
    results: list[Drawn] = []
    for sampler, proposal, state in zip(samplers, proposals, states, strict=True):
        found = [next(scores) for _ in range(len(proposal.tokens) + 1)]
        right = 0
        while right < len(proposal.tokens) and _token(found[right]) == proposal.tokens[right]:
            right += 1
        sampler.random.setstate(state)
        if not sampler.sampling.is_greedy:
            for _ in range(right + 1):  # what was drawn behind counts for nothing
                sampler.random.random()
        results.append(_before_failure(found[: right + 1]))
    return results


def _token(found: TokenScore | UserError) -> int | None:
    return None if isinstance(found, UserError) else found.token


def _weigh(samplers: Sequence[Sampler], proposals: Sequence[Proposal], logits: Tensor) -> list[Drawn]:
    """Proposals drawn from q where the row draws from p (Leviathan et al. 2023, section 2.3; Chen et al. 2023).

    A token x is kept with probability min(1, p(x) / q(x)), else another is drawn from max(p - q, 0): in sum that is p.
    """
    choice = Choice(_places(samplers, proposals))
    p = choice.probabilities(logits)  # (N, V)
    q = torch.cat(
        [_up_to_the_last(proposal, p) for proposal in proposals]
    )  # 0 behind the last: there p itself is drawn
    proposed = [token for proposal in proposals for token in (*proposal.tokens, 0)]
    is_last = [i == len(proposal.tokens) for proposal in proposals for i in range(len(proposal.tokens) + 1)]
    luck = [(s.random.random(), s.random.random()) for s in choice.rows]

    places = torch.tensor(proposed, device=p.device).unsqueeze(1)
    chances = torch.cat((p.gather(1, places), q.gather(1, places), p.sum(1, keepdim=True)), dim=1).tolist()
    if not all(math.isfinite(guessed) for _, guessed, _ in chances):
        raise not_finite("draft model")
    rest = (p - q).clamp(min=0)
    rest = torch.where(rest.sum(dim=-1, keepdim=True) > 0, rest, p)  # alike but for rounding: none is refused
    others = inverse_cdf(rest, as_chance([second for _, second in luck], rest)).squeeze(1).tolist()
    kept = [
        not last and first * guessed < own
        for last, (first, _), (own, guessed, _) in zip(is_last, luck, chances, strict=True)
    ]
    tokens = [token if keep else other for keep, token, other in zip(kept, proposed, others, strict=True)]

    results: list[Drawn] = []
    scores = [
        score if math.isfinite(total) else not_finite()
        for score, (_, _, total) in zip(choice.scores(logits, tokens), chances, strict=True)
    ]
    for proposal in proposals:
        length = len(proposal.tokens) + 1
        found, scores = scores[:length], scores[length:]
        results.append(_before_failure(found[: kept[:length].index(False) + 1]))
        kept = kept[length:]
    return results


def _up_to_the_last(proposal: Proposal, p: Tensor) -> Tensor:
    """The distributions (tokens + 1, V) that a proposal was drawn from, and zeros for the place behind it."""
    assert proposal.chances is not None
    return F.pad(proposal.chances.to(p.device), (0, p.size(1) - proposal.chances.size(1), 0, 1))


def _places(samplers: Sequence[Sampler], proposals: Sequence[Proposal]) -> list[Sampler]:
    """Each row as it stands after none, one, ... of its proposed tokens."""
    return [
        sampler.after(proposal.tokens[:i])
        for sampler, proposal in zip(samplers, proposals, strict=True)
        for i in range(len(proposal.tokens) + 1)
    ]


def padded(fed: Sequence[Sequence[int]], starts: Sequence[int], limit: int, width: int, device: torch.device) -> Tensor:
    """Ids and positions (2, B, width) of rows that are fed different numbers of tokens, from their starts on.

    What fills up a short row stands behind its tokens: none of them sees it, and the row's next tokens write over it.
    At `limit`, the length of the cache, it stays on the last place, which no row needs: its last token is never fed.
    """
    ids = [[*tokens, *[0] * (width - len(tokens))] for tokens in fed]
    positions = [[min(start + i, limit - 1) for i in range(width)] for start in starts]
    return torch.tensor([ids, positions], device=device)
