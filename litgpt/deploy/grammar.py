"""What an answer may look like: a JSON schema or a grammar -> which tokens may come next. llguidance does the work."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from litgpt.errors import InputError, extra_missing, one_line
from litgpt.tokenizer import Tokenizer

if TYPE_CHECKING:
    from torch import Tensor

ANY_OBJECT = {"type": "object"}
GAPS = {"whitespace_pattern": r"[ \n\t]{0,40}"}  # between the parts of a JSON text


def of_schema(schema: Mapping[str, Any]) -> str:
    """The grammar of JSON texts that fit a schema, all but for longer gaps: a model that likes them would not end."""
    return _library().LLMatcher.grammar_from_json_schema(json.dumps({"x-guidance": GAPS, **schema}))


def of_lark(text: str) -> str:
    """A grammar in llguidance's dialect of Lark."""
    return _library().LLMatcher.grammar_from_lark(text)


def _library() -> Any:
    try:
        import llguidance
    except ImportError:
        raise extra_missing("llguidance", "serve") from None
    return llguidance


class Grammars:
    """Grammars over the tokens of one tokenizer.

    ends: tokens that end an answer, each alone.
    """

    def __init__(self, tokenizer: Tokenizer, ends: Sequence[int]) -> None:
        self.tokenizer, self.ends = tokenizer, [end for end in ends if end < tokenizer.vocab_size]
        self._tokens: Any = None

    def require(self, grammar: str) -> None:
        """InputError where the grammar cannot be used."""
        if problem := _library().LLMatcher.validate_grammar(grammar, self.tokens):
            raise InputError(one_line(problem)[:300])

    def guide(self, grammar: str) -> Guide:
        return Guide(_library().LLMatcher(self.tokens, grammar, log_level=0))

    @property
    def tokens(self) -> Any:
        if self._tokens is None:
            self._tokens = self._read()
        return self._tokens

    def _read(self) -> Any:
        library, file = _library(), self.tokenizer.dir / "tokenizer.json"
        if not file.is_file():
            raise InputError(f"{self.tokenizer.dir}: answers in a given form need a tokenizer.json")
        if not self.ends:
            raise InputError(f"{self.tokenizer.dir}: the tokenizer has no token that ends an answer")
        try:
            return library.LLTokenizer(str(file), n_vocab=self.tokenizer.vocab_size, eos_token=list(self.ends))
        except Exception as error:  # the library's errors have no class in common
            raise InputError(f"{file}: the grammar library cannot use it ({one_line(error)[:200]})") from None


class Guide:
    """Holds one answer to a grammar."""

    def __init__(self, matcher: Any) -> None:
        self._matcher = matcher
        self.error = ""  # why it cannot go on

    def allowed(self, width: int) -> Tensor:
        """(width,) bool, on the CPU: which tokens may come next."""
        import torch

        packed = torch.frombuffer(bytearray(self._matcher.compute_bitmask()), dtype=torch.uint8)
        bits = packed.unsqueeze(1).bitwise_right_shift(torch.arange(8, dtype=torch.uint8)).bitwise_and(1)
        bits = bits.flatten()[:width].bool()
        allowed = torch.cat((bits, bits.new_zeros(width - len(bits))))
        if self._matcher.is_error() or not allowed.any():
            self.error = one_line(self._matcher.get_error() or "no token fits")[:200]
            return torch.ones(width, dtype=torch.bool)
        return allowed

    def take(self, token: int) -> None:
        """This token was drawn."""
        if not self.error and not self._matcher.consume_token(token):
            self.error = one_line(self._matcher.get_error() or "no token fits")[:200]

    @property
    def is_over(self) -> bool:
        """Whether nothing more may come."""
        return bool(self.error) or self._matcher.is_stopped()
