"""How well a model foretells a text: perplexity, and bits per byte, which models with other tokenizers share."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from litgpt.errors import InputError

if TYPE_CHECKING:
    from litgpt.eval.candidate import Candidate
    from litgpt.generate.scoring import Pair


@dataclass(frozen=True)
class Foretold:
    """A text, and the log-probability that a model gave it, in nats."""

    tokens: int
    bytes: int
    words: int
    logprob: float

    @property
    def perplexity(self) -> float:
        """Among how many equally likely tokens the model had to choose at each place, so to say."""
        return math.exp(-self.logprob / self.tokens)

    @property
    def word_perplexity(self) -> float:
        return math.exp(min(-self.logprob / max(self.words, 1), 700.0))

    @property
    def bits_per_byte(self) -> float:
        return -self.logprob / math.log(2) / self.bytes

    def figures(self) -> dict[str, float]:
        return {
            "perplexity": self.perplexity,
            "bits_per_byte": self.bits_per_byte,
            "word_perplexity": self.word_perplexity,
            "logprob": self.logprob,
            "tokens": self.tokens,
            "bytes": self.bytes,
            "words": self.words,
        }


def windows(tokens: Sequence[int], first: int, length: int, stride: int) -> Iterator[Pair]:
    """A text cut so that each token is told once, from as many before it as the window has room for.

    length 4, stride 2, # is `first`      # 0 1 2 -> 0 1 2 3    2 3 4 -> 4 5 (1 2 3 4 are read)    4 5 6 -> 6

    Args:
        tokens: the text's.
        first: what stands before the text.
        length: tokens that are read at once.
        stride: tokens that are told by each window after the first.
    """
    done = min(length, len(tokens))
    if done:
        yield [first], tokens[:done]
    while done < len(tokens):
        end = min(done + stride, len(tokens))
        yield tokens[end - length - 1 : done], tokens[done:end]
        done = end


def require_stride(stride: int | None, length: int) -> int:
    """A stride that a context of so many tokens has room for; None: all of it."""
    stride = length if stride is None else stride
    if not 1 <= stride <= length:
        raise InputError(f"stride is {stride}; it must lie between 1 and the context of {length} tokens")
    return stride


def foretell(candidate: Candidate, text: str, stride: int | None = None) -> Foretold:
    """Score a whole text. It is plain text: what looks like a special token is none.

    Args:
        candidate: the model.
        text: of any length.
        stride: tokens told by each window; None: all that it holds, so that no token is read twice.
    """
    length = candidate.max_length
    stride = require_stride(stride, length)
    tokens = candidate.tokenizer.encode(text, bos=False)
    if not tokens:
        raise InputError("the text is empty; there is nothing to score")
    pairs = list(windows(tokens, candidate.prefix_token, length, stride))
    found = candidate.likelihoods(pairs, what="windows")
    logprob = math.fsum(likelihood.logprob for likelihood in found)
    return Foretold(len(tokens), len(text.encode()), len(text.split()), logprob)
