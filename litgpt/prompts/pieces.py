"""`Style`: a prompt style told by its pieces, and the chat template that writes the same text in other programs."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from litgpt.errors import require_type
from litgpt.prompts.base import PromptStyle
from litgpt.prompts.messages import EXAMPLE, Message, take_system, with_system
from litgpt.tokenizer import Tokenizer


@dataclass(frozen=True)
class Style(PromptStyle):
    """A style by its pieces. `system` goes into the first user turn only:

        begin user(system) assistant answer after  between user assistant answer after ...

    In them `{system}`, `{prompt}`, `{input}`, `{answer}` stand for texts, `{bos}` and `{eos}` for tokens.
    """

    name: str = field()
    class_name: str = field()  # in LitGPT 0.5
    user: str = field()
    assistant: str = ""
    answer: str = "{answer}{eos}"
    after: str = ""
    system: str = "{system}"
    default_system: str = ""
    begin: str = ""
    between: str = ""
    user_with_input: str = ""
    default_system_with_input: str = ""
    strips: tuple[str, ...] = ()  # roles whose text loses the space around it in a conversation
    strips_system: bool = False  # the system text loses the space around it everywhere
    stop: tuple[tuple[str, ...], ...] = ()  # sequences of tokens that end an answer, beside eos

    def apply(self, prompt: str | Sequence[Message], *, sys_prompt: str | None = None, **fields: Any) -> str:
        if not isinstance(prompt, str):
            require_type(prompt, (list, tuple), "prompt", f"text or {EXAMPLE}")
            return self.render(with_system(prompt, sys_prompt))
        return self.begin + self._first_user(prompt, sys_prompt, fields.get("input")) + self.assistant

    @property
    def answers_plainly(self) -> bool:
        return self.answer == "{answer}{eos}"

    def stop_tokens(self, tokenizer: Tokenizer) -> list[list[int]]:
        named = [[i for token in sequence for i in _token_ids(tokenizer, token)] for sequence in self.stop]
        return super().stop_tokens(tokenizer) + [ids for ids in named if ids]

    def _first_user(self, prompt: str, system: str | None, extra: str | None) -> str:
        template, default = self.user, self.default_system
        if extra and self.user_with_input:
            template, default = self.user_with_input, self.default_system_with_input
        system = system or default
        system = system.strip() if self.strips_system else system
        block = fill(self.system, system=system) if system else ""
        return fill(template, system=block, prompt=prompt, input=extra or "")

    def _write(
        self,
        messages: list[dict[str, Any]],
        add_generation_prompt: bool,
        tools: list[Any] | None,
        tokens: Mapping[str, str],
        span: tuple[str, str],
    ) -> str:
        ends = {"bos": tokens.get("bos_token", ""), "eos": tokens.get("eos_token", "")}
        system, turns = take_system(messages, self.strips)
        text, first = self.begin, True
        for message in turns:
            content = message["content"]
            if message["role"] == "assistant":
                answer = fill(self.answer, answer=content, **ends)
                text += self.assistant + span[0] + answer + span[1] + self.after
            elif first:
                text, first = text + self._opening(content, system, message.get("input")), False
            else:
                text += fill(self.between + self.user, system="", prompt=content, **ends)
        return text + (self.assistant if add_generation_prompt else "")

    def _opening(self, prompt: str, system: str | None, extra: str | None) -> str:
        if system and "{system}" not in self.user:  # without a place of its own it goes before the first prompt
            prompt, system = f"{system}\n\n{prompt}", None
        return self._first_user(prompt, system, extra)

    def jinja(self, *, adds_bos: bool) -> str | None:
        """A chat template that writes the same text, for other programs."""
        content = "(message['content'] | trim)" if "user" in self.strips else "message['content']"
        system = (
            "(messages[0]['content'] | trim)"
            if "system" in self.strips or self.strips_system
            else "messages[0]['content']"
        )
        has_place = "{system}" in self.user
        lead = "" if has_place else "((system ~ '\\n\\n') if first.is_so and system else '') ~ "
        block = f"({_expression(self.system, system='system')}) if first.is_so and system else ''"
        pieces = {
            "bos": "bos_token" if adds_bos and not self.begin else "''",
            "begin": _expression(self.begin),
            "default": _literal(self.default_system if has_place else ""),
            "system": system,
            "block": block if has_place else "''",
            "between": f"('' if first.is_so else {_expression(self.between)})",
            "user": _expression(self.user, system="block", prompt=f"({lead}{content})"),
            "assistant": _expression(self.assistant),
            "answer": _expression(self.answer + self.after, answer=content),
        }
        return re.sub(r"@(\w+)@", lambda found: pieces[found[1]], JINJA)


JINJA = """\
{%- set first = namespace(is_so=true) -%}
{%- if messages[0]['role'] == 'system' -%}
    {%- set system = @system@ or @default@ -%}
    {%- set turns = messages[1:] -%}
{%- else -%}
    {%- set system = @default@ -%}
    {%- set turns = messages -%}
{%- endif -%}
{{- @bos@ -}}{{- @begin@ -}}
{%- for message in turns -%}
    {%- if message['role'] == 'user' -%}
        {%- set block = @block@ -%}
        {{- @between@ ~ @user@ -}}
        {%- set first.is_so = false -%}
    {%- elif message['role'] == 'assistant' -%}
        {{- @assistant@ ~ @answer@ -}}
    {%- else -%}
        {{- raise_exception('this prompt style has no place for the role ' ~ message['role']) -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- @assistant@ -}}{%- endif -%}
"""

PLACE = re.compile(r"\{(system|prompt|input|answer|bos|eos)\}")


def fill(template: str, **texts: str) -> str:
    """`template` with its `{places}` filled, all at once: what is filled in is not searched again."""
    return PLACE.sub(lambda found: texts[found[1]], template)


def _literal(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _expression(template: str, **names: str) -> str:
    """A Jinja expression for a filled template."""
    names = {"bos": "bos_token", "eos": "eos_token"} | names
    parts = PLACE.split(template)  # text, place, text, place, ..., text
    terms = [names[part] if i % 2 else _literal(part) for i, part in enumerate(parts) if i % 2 or part]
    return " ~ ".join(terms) or "''"


def _token_ids(tokenizer: Tokenizer, token: str) -> list[int]:
    return [tokenizer.token_to_id(token)] if tokenizer.has_token(token) else tokenizer.encode(token, bos=False)
