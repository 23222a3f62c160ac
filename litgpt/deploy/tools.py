"""Functions that a model may call: how the chat template has it write calls, and reading them out of its answer.

Four ways are known, and told apart by what the template holds:

    hermes    <tool_call>{"name": ..., "arguments": {...}}</tool_call>, several times, between texts   (Qwen, Hermes)
    mistral   [TOOL_CALLS][{"name": ..., "arguments": {...}}, ...], to the end
    llama     <|python_tag|>{"name": ..., "parameters": {...}}, or the object alone, to the end
    plain     the object alone, or a list of them
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from litgpt.prompts import PromptStyle
from litgpt.prompts.template import ChatTemplate


@dataclass(frozen=True)
class Call:
    name: str
    arguments: str  # JSON
    id: str = field(default_factory=lambda: f"call_{secrets.token_hex(12)}")


@dataclass(frozen=True)
class Format:
    """How calls are written."""

    name: str
    opening: str = ""
    closing: str = ""  # "": to the end of the answer
    arguments: str = "arguments"
    is_list: bool = False

    @property
    def may_be_bare(self) -> bool:
        """Whether an answer that begins with a brace is a call, without an opening."""
        return self.name in ("llama", "plain")

    def schema(self, tools: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """The JSON schema of what stands between opening and closing."""
        calls = [
            {
                "type": "object",
                "properties": {
                    "name": {"const": tool["name"]},
                    self.arguments: tool.get("parameters") or {"type": "object"},
                },
                "required": ["name", self.arguments],
                "additionalProperties": False,
            }
            for tool in tools
        ]
        call = calls[0] if len(calls) == 1 else {"anyOf": calls}
        return {"type": "array", "items": call, "minItems": 1} if self.is_list else call


HERMES = Format("hermes", "<tool_call>", "</tool_call>")
MISTRAL = Format("mistral", "[TOOL_CALLS]", is_list=True)
LLAMA = Format("llama", "<|python_tag|>", arguments="parameters")
PLAIN = Format("plain")


def format_of(style: PromptStyle) -> Format | None:
    """How a style's model writes calls; None where the style has no place for tools."""
    if not isinstance(style, ChatTemplate):
        return None
    template = style.tool_template or style.template
    if "tools" not in template:
        return None
    for known in (HERMES, MISTRAL, LLAMA):
        if known.opening in template:
            return known
    return LLAMA if '"parameters"' in template else PLAIN


class Reader:
    """Reads one answer as it comes: text passes, calls are kept until they are whole.

    started: whether the opening is already there, as the end of the prompt.
    """

    def __init__(self, format: Format, names: frozenset[str], started: bool = False, most: int | None = None) -> None:
        self.format, self.names, self.most = format, names, most
        self.inside = started
        self.calls: list[Call] = []
        self._buffer = ""
        self._begun = False  # text was shown, so no bare call can begin any more

    def push(self, text: str) -> tuple[str, list[Call]]:
        """The text and the calls that are now certain."""
        self._buffer += text
        shown = ""
        calls: list[Call] = []
        while True:
            if not self.inside:
                before, found = self._outside()
                shown += before
                if not found:
                    return shown, calls
            closing = self.format.closing
            if not closing or closing not in self._buffer:
                return shown, calls
            body, _, self._buffer = self._buffer.partition(closing)
            self.inside = False
            read = self._read(body)
            calls += read or []
            shown += "" if read is not None else self.format.opening + body + closing

    def finish(self) -> tuple[str, list[Call]]:
        """The answer is over."""
        rest, self._buffer = self._buffer, ""
        if not self.inside:
            return ("" if self.calls and not rest.strip() else rest), []
        self.inside = False
        calls = self._read(rest)
        if calls is not None:
            return "", calls
        is_bare = self.format.may_be_bare and not rest.startswith(self.format.opening)
        return rest if is_bare else self.format.opening + rest, []

    def _outside(self) -> tuple[str, bool]:
        """Text before the next call, and whether one begins."""
        opening, buffer = self.format.opening, self._buffer
        if opening and opening in buffer:
            before, _, self._buffer = buffer.partition(opening)
            self.inside = True
            return self._text(before), True
        start = buffer.lstrip()
        if self.format.may_be_bare and not self._begun and (not start or start[0] in "{["):
            self.inside = bool(start)
            return "", self.inside
        held = next((n for n in range(len(opening) - 1, 0, -1) if buffer.endswith(opening[:n])), 0)
        free = buffer[: len(buffer) - held]
        if self.calls and not free.strip():
            return "", False  # the space between two calls is no text
        self._buffer = buffer[len(free) :]
        return self._text(free), False

    def _text(self, text: str) -> str:
        if self.calls and not text.strip():
            return ""
        self._begun = self._begun or bool(text.strip())
        return text

    def _read(self, body: str) -> list[Call] | None:
        calls = parse(body.removeprefix(self.format.opening), self.names)
        if calls is None:
            return None
        room = len(calls) if self.most is None else max(self.most - len(self.calls), 0)
        self.calls += calls[:room]
        return calls[:room]


def parse(text: str, names: frozenset[str]) -> list[Call] | None:
    """The calls in a text that is nothing else; None where it is something else."""
    decoder, at, found = json.JSONDecoder(), 0, []
    while at < len(text):
        if text[at] in " \t\r\n;,":
            at += 1
            continue
        try:
            value, at = decoder.raw_decode(text, at)
        except (ValueError, RecursionError):
            return None
        found += value if isinstance(value, list) else [value]
    calls = [_call(value, names) for value in found]
    return [call for call in calls if call is not None] if calls and None not in calls else None


def _call(value: Any, names: frozenset[str]) -> Call | None:
    if not isinstance(value, dict) or value.get("name") not in names:
        return None
    arguments = value.get("arguments", value.get("parameters", {}))
    if isinstance(arguments, str):
        return Call(value["name"], arguments)
    return Call(value["name"], json.dumps(arguments, ensure_ascii=False)) if isinstance(arguments, dict) else None
