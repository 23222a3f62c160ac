"""A candidate as lm-eval's own model class. The one module that imports lm_eval: others do inside their functions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM

from litgpt.eval.candidate import Candidate
from litgpt.eval.perplexity import windows
from litgpt.prompts.template import ChatTemplate


class EngineLM(TemplateLM):
    """Answers lm-eval's three kinds of requests with our engine."""

    def __init__(self, candidate: Candidate) -> None:
        super().__init__()
        self.candidate = candidate
        self._device = candidate.engine.device

    # -- ids

    @property
    def eot_token_id(self) -> int | None:
        return self.candidate.end_token

    @property
    def prefix_token_id(self) -> int:
        return self.candidate.prefix_token

    @property
    def max_length(self) -> int:
        return self.candidate.max_length

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        return self.candidate.encode([string], plain=add_special_tokens is False)[string]

    # -- requests

    def loglikelihood(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        pairs = self.candidate.pairs([request.args for request in requests])
        return list(self.candidate.likelihoods(pairs, what="log-likelihoods"))

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        return list(self.candidate.likelihoods([(before, after) for _, before, after in requests]))

    def loglikelihood_rolling(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[float]:
        texts, length = [request.args[0] for request in requests], self.max_length
        ids = self.candidate.encode(texts)
        cut = [list(windows(ids[text], self.prefix_token_id, length, length)) for text in texts]
        found = iter(self.candidate.likelihoods([pair for pairs in cut for pair in pairs], what="windows"))
        return [sum(next(found).logprob for _ in pairs) for pairs in cut]

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        return self.candidate.answers([request.args for request in requests])

    # -- conversations

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        return self.candidate.written(chat_history, add_generation_prompt)

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        if not chat_template:
            return None
        style = self.candidate.style
        return style.template if isinstance(style, ChatTemplate) else style.name

    @property
    def tokenizer_name(self) -> str:
        """Of what lm-eval keeps for itself: another name for other tokenizers and styles."""
        tokenizer = self.candidate.tokenizer
        return f"litgpt__{tokenizer.dir.name}__{tokenizer.fingerprint()[:16]}__{self.candidate.style.name}"
