"""`ChatTemplate`: a checkpoint's own Jinja template as a prompt style."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import jinja2

from litgpt.errors import InputError, one_line, require_type
from litgpt.prompts.base import PromptStyle
from litgpt.prompts.marks import NO_SPAN, SPAN, mark_answers
from litgpt.prompts.messages import EXAMPLE, Message, plain, with_system
from litgpt.prompts.sandbox import SPAN_NAME, environment
from litgpt.tokenizer import Tokenizer

GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_OTHER = "mend it, or use another style with --prompt_style"


@dataclass(frozen=True)
class ChatTemplate(PromptStyle):
    """A Jinja template in the way of Hugging Face tokenizers, run in a sandbox."""

    template: str
    tool_template: str | None = None  # used instead where tools are given
    tokens: Mapping[str, str] = field(default_factory=dict)
    """Text of special tokens that the template may name: `bos_token`, `eos_token`, ..."""
    variables: Mapping[str, Any] = field(default_factory=dict)
    """More that the template may name, such as `enable_thinking`."""
    source: str = "chat template"
    """What errors call it."""

    name = "chat-template"
    adds_bos = False  # the template says whether and where
    answers_plainly = False  # nobody knows

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> ChatTemplate | None:
        """The template that comes with a tokenizer."""
        template = tokenizer.chat_template
        if template is None:
            return None
        source = f"{tokenizer.dir}: chat template"
        return cls(template, tokenizer.chat_templates.get("tool_use"), tokenizer.special_tokens, source=source)

    def apply(self, prompt: str | Sequence[Message], *, sys_prompt: str | None = None, **fields: Any) -> str:
        if isinstance(prompt, str):
            extra = fields.get("input")
            prompt = [{"role": "user", "content": f"{prompt}\n\n{extra}" if extra else prompt}]
        require_type(prompt, (list, tuple), "prompt", f"text or {EXAMPLE}")
        return self.render(with_system(prompt, sys_prompt))

    def stop_tokens(self, tokenizer: Tokenizer) -> list[list[int]]:
        """Beside eos, the token that the template puts behind an answer."""
        ends = super().stop_tokens(tokenizer)
        try:
            turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": SPAN[0]}]
            text = self.render(turns, add_generation_prompt=False)
        except InputError:
            return ends
        found = tokenizer.control_pattern and tokenizer.control_pattern.match(text.rpartition(SPAN[0])[2].lstrip())
        own = [tokenizer.token_to_id(found[0])] if found else []
        return ends if not own or own in ends else [*ends, own]

    def jinja(self, *, adds_bos: bool) -> str | None:
        return self.template

    def _write(
        self,
        messages: list[dict[str, Any]],
        add_generation_prompt: bool,
        tools: list[Any] | None,
        tokens: Mapping[str, str],
        span: tuple[str, str],
    ) -> str:
        def run(messages: list[dict[str, Any]], add_generation_prompt: bool, span: tuple[str, str] = NO_SPAN) -> str:
            given: dict[str, Any] = {"documents": None, **self.tokens, **tokens, **plain(self.variables)}
            given |= {
                "messages": messages,
                "tools": tools,
                "add_generation_prompt": add_generation_prompt,
                SPAN_NAME: span,
            }
            return self._run(given, with_tools=tools is not None)

        messages = [_with_reasoning(message) for message in messages]
        if span == NO_SPAN or GENERATION.search(self.template):
            return run(messages, add_generation_prompt, span)
        return mark_answers(messages, run, self.source)

    def _run(self, given: dict[str, Any], with_tools: bool) -> str:
        compiled = self._compiled_tools if with_tools and self._compiled_tools else self._compiled
        try:
            return compiled.render(given)
        except jinja2.exceptions.SecurityError as error:
            raise InputError(f"{self.source} tries what no template may: {error}; {_OTHER}") from None
        except Exception as error:  # a template can raise anything that Python can
            raise InputError(
                f"{self.source} does not take this conversation: {one_line(error)[:300]}; {_OTHER}"
            ) from None

    def check(self) -> None:
        """InputError where the template is not Jinja."""
        _ = self._compiled, self._compiled_tools

    @cached_property
    def _compiled(self) -> Any:
        return self._compile(self.template)

    @cached_property
    def _compiled_tools(self) -> Any:
        return self._compile(self.tool_template) if self.tool_template else None

    def _compile(self, template: str) -> Any:
        try:
            return environment().from_string(template)
        except Exception as error:  # the parser also lets ValueError and RecursionError through
            raise InputError(f"{self.source} is not valid Jinja: {one_line(error)[:300]}; {_OTHER}") from None


def _with_reasoning(message: dict[str, Any]) -> dict[str, Any]:
    """The message with its reasoning under every name that templates read it by, as in transformers."""
    names = ("reasoning_content", "thinking", "reasoning")
    found = next((message[name] for name in names if message.get(name) is not None), None)
    return message if found is None else {"thinking": found, **message, "reasoning_content": found}
