"""How likely a model finds given text. What texts have in common at their beginning is read once. Knows no text itself.

The river ran | past the mill           ids        The river ran past the over the
              | over the mill           positions    0     1   2    3   4    3   4
                                        and nobody sees what stands on another's branch
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice, pairwise

import torch

from litgpt.generate.sampling import TokenScore, token_scores
from litgpt.model import GPT

SCORED_AT_ONCE = 128  # rows of logits held at once

Pair = tuple[Sequence[int], Sequence[int]]  # what comes before, and what follows


@dataclass(frozen=True)
class Layout:
    """Texts as one row of tokens, see `GPT.hidden`."""

    ids: list[int]
    positions: list[int]
    until: list[int]
    places: list[list[int]]  # of each text, where its tokens stand


def lay_out(texts: Sequence[Sequence[int]]) -> Layout:
    """In order, a text stands beside those that begin as it does."""
    ids: list[int] = []
    positions: list[int] = []
    until: list[int] = []
    places: list[list[int]] = [[]] * len(texts)
    text: Sequence[int] = []
    path: list[int] = []  # where the tokens of the newest text stand
    for number in sorted(range(len(texts)), key=lambda i: list(texts[i])):
        shared, text = common(text, texts[number]), texts[number]
        for place in path[shared:]:
            until[place] = len(ids)
        path = path[:shared] + list(range(len(ids), len(ids) + len(text) - shared))
        places[number] = path
        ids += text[shared:]
        positions += range(shared, len(text))
        until += [-1] * (len(text) - shared)
    return Layout(ids, positions, [len(ids) if place < 0 else place for place in until], places)


def common(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens two sequences have in common at their beginning."""
    length = min(len(one), len(other))
    if one[:length] == other[:length]:
        return length
    return next((i for i in range(length) if one[i] != other[i]), length)


def together(pairs: Iterable[Pair], at_once: int) -> Iterator[list[Pair]]:
    """The pairs, in order, as many together as hold `at_once` tokens; what one shares with the last counts once."""
    batch: list[Pair] = []
    size, last = 0, list[int]()
    for before, after in pairs:
        text = [*before, *after[:-1]]
        more = len(text) - common(last, text)
        if batch and size + more > at_once:
            yield batch
            batch, size, more = [], 0, len(text)
        batch.append((before, after))
        size, last = size + more, text
    if batch:
        yield batch


@torch.inference_mode()
def scores(model: GPT, pairs: Sequence[Pair], *, top: int = 0, n_tokens: int | None = None) -> list[list[TokenScore]]:
    """The scores of what follows in each pair, all read in one forward.

    Args:
        model: in its final place and precision.
        pairs: what comes before holds at least one token.
        top: how many of the likeliest tokens to report beside each.
        n_tokens: ids from here on are rows that no token has; None: all rows are tokens.
    """
    texts = [[*before, *after[:-1]] for before, after in pairs]
    found: list[list[TokenScore]] = [[]] * len(pairs)
    for numbers in _turning_alike(model, texts):
        layout = lay_out([texts[i] for i in numbers])
        asked: list[tuple[int, int]] = []  # (place, the token that follows it)
        for path, i in zip(layout.places, numbers, strict=True):
            before, after = pairs[i]
            asked += zip(path[len(before) - 1 :], after, strict=False)
        told = iter(_token_scores(model, _hidden(model, layout), asked, top, n_tokens))
        for i in numbers:
            found[i] = list(islice(told, len(pairs[i][1])))
    return found


def _turning_alike(model: GPT, texts: Sequence[Sequence[int]]) -> list[list[int]]:
    """The numbers of the texts, parted where a model turns long texts by other frequencies."""
    everything = list(range(len(texts)))
    if not model.rope.has_two_ranges:
        return [everything]
    limit = model.rope.stretch["original_max_seq_len"]
    parts = [[i for i in everything if (len(texts[i]) > limit) == is_long] for is_long in (False, True)]
    return [part for part in parts if part]


def _hidden(model: GPT, layout: Layout) -> torch.Tensor:
    """(T, n_embd)"""
    device = model.wte.weight.device
    idx = torch.tensor([layout.ids], device=device)
    positions = torch.tensor([layout.positions], device=device)
    if any(b not in (0, a + 1) for a, b in pairwise(layout.positions)):  # some text branches off
        return model.hidden(idx, positions, until=layout.until)[0]
    return model.hidden(idx, positions, doc_ids=(positions == 0).cumsum(1) - 1)[0]


def _token_scores(
    model: GPT, hidden: torch.Tensor, asked: Sequence[tuple[int, int]], top: int, n_tokens: int | None
) -> list[TokenScore]:
    """The scores of (place, token): of each token under the logits of its place. Many may ask for one place."""
    told: list[TokenScore | None] = [None] * len(asked)
    in_order = sorted(range(len(asked)), key=lambda i: asked[i][0])
    for start in range(0, len(asked), SCORED_AT_ONCE):
        some = in_order[start : start + SCORED_AT_ONCE]
        places, tokens = torch.tensor([asked[i] for i in some], device=hidden.device).unbind(1)
        places, row = places.unique_consecutive(return_inverse=True)
        logits = model.logits(hidden[places])[:, :n_tokens]
        for i, score in zip(some, token_scores(logits[row], tokens, top), strict=True):
            told[i] = score
    return [score for score in told if score is not None]
