"""Messages: what a conversation is made of, checked, and reduced to data that any template may see."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from litgpt.errors import InputError, require_type, shown

Message = Mapping[str, Any]
EXAMPLE = "a list of messages such as {'role': 'user', 'content': 'Hello'}"
CONTENT = (str, list, tuple, type(None))  # a list is of parts, for templates that know them; a tool call needs none


def with_system(messages: Sequence[Message], sys_prompt: str | None) -> list[Message]:
    """The conversation with a system message first, unless it has one."""
    require_type(messages, (list, tuple), "messages", EXAMPLE)
    if not sys_prompt or any(isinstance(m, Mapping) and m.get("role") == "system" for m in messages):
        return list(messages)
    return [{"role": "system", "content": sys_prompt}, *messages]


def plain(value: Any) -> Any:
    """Messages or tools as plain data, all that a template may see; entries that are None are left out."""
    if value is None or type(value) in (str, bool, int, float):
        return value
    if isinstance(value, str):
        return str.__str__(value)  # without what a subclass adds
    if isinstance(value, (int, float)):
        return int(value) if isinstance(value, int) else float(value)
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, Sequence):
        return [plain(item) for item in value]
    raise InputError(f"a conversation holds text, numbers, lists and mappings, not {type(value).__name__}")


def checked(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """The messages, checked and as plain data."""
    require_type(messages, (list, tuple), "messages", EXAMPLE)
    if not messages:
        raise InputError(f"messages is empty; give {EXAMPLE}")
    result = []
    for number, message in enumerate(messages, start=1):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise InputError(f"message {number} needs a 'role' (system, user or assistant) and 'content'")
        require_type(message.get("content"), CONTENT, f"content of message {number}", "text")
        result.append({key: plain(value) for key, value in message.items() if value is not None})
    return result


def take_system(messages: list[dict[str, Any]], strips: Sequence[str] = ()) -> tuple[str | None, list[dict[str, Any]]]:
    """The system text and the turns, for styles: text alone, from a user and an assistant."""
    turns = []
    for number, message in enumerate(messages, start=1):
        role, content = message["role"], message.get("content")
        if role not in ("user", "assistant") and (role, number) != ("system", 1):
            raise InputError(f"message {number}: this prompt style has no place here for the role {shown(role)}")
        if not isinstance(content, str):
            raise InputError(f"message {number}: this prompt style takes text as 'content'")
        turns.append({**message, "content": content.strip() if role in strips else content})
    system = turns.pop(0)["content"] if turns[0]["role"] == "system" else None
    return system, turns
