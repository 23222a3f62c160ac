"""The one class of errors that a user can act on, and its exit statuses.

Raised anywhere, printed once as `error: what, where, what to do` by the command line; a program that calls us catches
the built-in type that each one also is. Other statuses: 0 done, 130 and 143 after SIGINT and SIGTERM.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from typing import Any


class UserError(Exception):
    """Something the user can mend: one line that says what, where and what to do."""

    exit_status = 2

    def __str__(self) -> str:
        return printable(" ".join(line.strip() for line in super().__str__().splitlines()))


class InputError(UserError, ValueError):
    """A value in a file, an option or an argument cannot be used."""


class InputTypeError(UserError, TypeError):
    """An argument of the wrong type."""


class MissingError(UserError, FileNotFoundError):
    """A file, a directory or a registered name that is not there."""


class MachineError(UserError, RuntimeError):
    """The machine gave way: disk, memory, port, network, a dead rank."""

    exit_status = 3


class DivergedError(UserError, RuntimeError):
    """The numbers of a training run stopped being finite."""

    exit_status = 4


def require_type(value: object, types: type | tuple[type, ...], argument: str, words: str) -> None:
    """InputTypeError, which names the argument, unless `value` is of one of these types, which `words` says.

    True and False are whole numbers to Python; here they are only where `bool` is asked for.
    """
    wanted = types if isinstance(types, tuple) else (types,)
    if not isinstance(value, types) or (isinstance(value, bool) and bool not in wanted):
        raise InputTypeError(f"{argument} is of type {type(value).__name__}, must be {words}")


def shown(value: object, most: int = 60) -> str:
    """A value that the user gave, as errors print it: quoted, and cut where it is long."""
    try:
        text = repr(value[: most + 1] if isinstance(value, str) else value)
    except ValueError:  # Python spells no whole number of more than some thousand digits
        return "a number of thousands of digits"
    return cut(text, most)


def cut(text: str, most: int = 60) -> str:
    """A text, and "..." for what is too long of it."""
    return text if len(text) <= most else f"{text[: most - 3]}..."


def printable(text: str) -> str:
    """The text with what a terminal would obey or hide, such as colours and reversed writing, spelt as Python does."""
    return text if text.isprintable() else "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def harmless(text: str) -> str:
    """The text for a terminal: controls that it would obey, not tabs and ends of lines, are spelt as Python does."""
    return _CONTROLS.sub(lambda found: repr(found[0])[1:-1], text)


_CONTROLS = re.compile(r"[^\t\n -~\xa0-\U0010ffff]")


def near_miss(word: str, words: Iterable[str]) -> str:
    """`"; did you mean 'x'?"` for the word that `word` begins or is closest to, case aside; or `""`."""
    by_lower = {w.lower(): w for w in words}
    begun = [known for known in by_lower if len(word) > 3 and known.startswith(word.lower())]
    close = sorted(begun, key=len)[:1] or difflib.get_close_matches(word[:100].lower(), by_lower, n=1, cutoff=0.6)
    return f"; did you mean '{by_lower[close[0]]}'?" if close else ""


def require_choice(name: str, value: Any, choices: tuple[Any, ...]) -> None:
    if value not in choices:
        words = ", ".join(str(choice) for choice in choices)
        near = near_miss(str(value), [choice for choice in choices if choice])
        raise InputError(f"{name} is {shown(value)}; it is one of {words}{near}")


def one_line(error: BaseException | str) -> str:
    """What any error says, on one line, with the line of the text it is about where it knows that."""
    where = f" (line {error.lineno})" if hasattr(error, "lineno") else ""
    return printable(" ".join(str(error).split())) + where or type(error).__name__


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, on the host or a GPU; torch has a class of its own for GPUs and none for the host."""
    is_named = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return is_named or str(error) == "could not create a primitive" or "can't allocate memory" in str(error)


def extra_missing(package: str, extra: str) -> InputError:
    """The error for an optional package that is not installed; names the extra that brings it."""
    return InputError(f"{package} is not installed; run: pip install 'litgpt[{extra}]'")
