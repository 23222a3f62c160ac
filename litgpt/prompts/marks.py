"""Characters that carry what no text can say through a template: which control tokens somebody only typed, and which
part the assistant wrote. Knows no template.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any

from litgpt.errors import InputError
from litgpt.tokenizer import Encoded, Tokenizer

# Characters that Unicode sets aside for a program's own use inside; in messages they are replaced.
PLAIN = ("\ufdd0", "\ufdd1")  # around a control token that a message holds as text
SPAN = ("\ufdd2", "\ufdd3")  # around what the assistant wrote
NO_SPAN = ("", "")
END_OF_TURN = re.compile(rf"{SPAN[1]}(\s?<[^<>\s\ufdd0-\ufdd3]+>)")
MARKS = re.compile("\ufdd0([^\ufdd0-\ufdd3]*)\ufdd1|([\ufdd0-\ufdd3])")
UNSPANNED = {ord(mark): None for mark in SPAN}
UNMARKED = {ord(mark): "\ufffd" for mark in PLAIN + SPAN}


class Guard:
    """Marks the control tokens that stand in messages, so that they are encoded as the text that they are.

    An assistant may write those that it can have written itself, such as `<think>`: they are not special.
    """

    def __init__(self, tokenizer: Tokenizer, lets_pass: bool = False) -> None:
        self._control = None if lets_pass else tokenizer.control_pattern
        self._hidden = None if lets_pass else tokenizer.hidden_pattern

    def message(self, message: dict[str, Any]) -> dict[str, Any]:
        return self._walk(message, self._hidden if message["role"] == "assistant" else self._control)

    def value(self, value: Any) -> Any:
        return self._walk(value, self._control)

    def _walk(self, value: Any, tokens: re.Pattern[str] | None) -> Any:
        if isinstance(value, str):
            text = value.translate(UNMARKED)
            return tokens.sub(rf"{PLAIN[0]}\1{PLAIN[1]}", text) if tokens else text
        if isinstance(value, dict):
            return {key: self._walk(item, tokens) for key, item in value.items()}
        return [self._walk(item, tokens) for item in value] if isinstance(value, list) else value


def read_marks(marked: str) -> tuple[list[tuple[str, bool]], list[tuple[int, int]]]:
    """Splits marked text into parts `(text, whether its control tokens are special)` and spans of answers."""
    parts: list[tuple[str, bool]] = [("", True)]
    spans: list[tuple[int, int]] = []
    at = begin = 0
    pieces = MARKS.split(marked)  # text, plain text or None, a lone mark or None, text, ...
    for i, piece in enumerate(pieces):
        if piece in SPAN:
            begin = at if piece == SPAN[0] else begin
            spans += [(begin, at)] if piece == SPAN[1] else []
        elif piece in PLAIN:
            parts.append(("", True))  # a template cut the mark's pair apart: the halves must not join to a token
        elif piece:
            special = i % 3 != 1
            if special and parts[-1][1]:
                parts[-1] = (parts[-1][0] + piece, True)
            else:
                parts.append((piece, special))
            at += len(piece)
    return [part for part in parts if part[0]], spans


def answer_mask(encoded: Encoded, spans: Iterable[tuple[int, int]]) -> list[bool]:
    mask = [False] * len(encoded.ids)
    for begin, end in spans:
        for i, (start, stop) in enumerate(encoded.spans):
            # an id without a character of its own (the first bytes of one) belongs to where it stands
            mask[i] |= start < end and (stop > begin or start == stop == begin)
    return mask


_REMEDY = "add {% generation %} tags to it, or use another style with --prompt_style"


def mark_answers(messages: list[dict[str, Any]], run: Callable[..., str], source: str) -> str:
    """The text of a conversation with marks around its answers, for a template without generation tags.

    Marks go into the messages and are found again in the text. An answer begins behind what `add_generation_prompt`
    adds, where that stands before it, and ends with the token behind it.
    """
    answers = [m for m in messages if m["role"] == "assistant"]
    if any(m.get("tool_calls") or not isinstance(m.get("content"), str) for m in answers):
        raise InputError(f"{source} does not say where answers with tool calls begin; {_REMEDY}")
    marked = run([_marked(m) if m["role"] == "assistant" else m for m in messages], False)
    text = run(messages, False)
    if marked.translate(UNSPANNED) != text or marked.count(SPAN[1]) != len(answers):
        raise InputError(f"{source} rewrites answers, so what to train on is unclear; {_REMEDY}")
    prompted = run(messages, True)
    header = prompted[len(text) :] if prompted.startswith(text) else ""
    *answered, rest = END_OF_TURN.sub(rf"\1{SPAN[1]}", marked).split(SPAN[1])
    return "".join(_opened(answer, header, source) + SPAN[1] for answer in answered) + rest


def _marked(message: dict[str, Any]) -> dict[str, Any]:
    """The message with marks inside the space around its text, which templates may strip."""
    content = message["content"]
    core = content.strip()
    before, _, after = content.partition(core) if core else ("", "", content)
    return {**message, "content": before + SPAN[0] + core + SPAN[1] + after}


def _opened(answer: str, header: str, source: str) -> str:
    """Text up to the end of an answer, its first mark moved to the end of `header`."""
    begin = answer.find(SPAN[0])
    at = answer.rfind(header, 0, begin if begin >= 0 else len(answer)) if header else -1
    at = at + len(header) if at >= 0 else begin
    if at < 0:
        raise InputError(f"{source} hides where answers begin; {_REMEDY}")
    bare = answer.replace(SPAN[0], "")
    return bare[:at] + SPAN[0] + bare[at:]
