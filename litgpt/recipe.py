"""What a user asks for, before it has types: YAML recipes and the options typed on top, each value with its origin.

Knows no command: which keys there are, and what each may hold, is the business of signature.py.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from litgpt.errors import InputError, MissingError, near_miss, shown

Key = tuple[str, ...]  # ("train", "max_steps"): a dotted key, cut at its dots

MAX_BYTES = 1 << 20
MAX_NODES = 20_000  # a YAML file of a few lines can name billions of nodes by its aliases
MAX_DEPTH = 32
URL_SECONDS = 8.0


@dataclass(frozen=True)
class Given:
    """A value as the user wrote it, where it stands, and the number of its source: later sources win."""

    value: Any
    where: str  # "my.yaml:3" or "--train.max_steps"
    source: int

    @property
    def typed(self) -> bool:
        """Whether it was typed on the command line rather than read from a recipe."""
        return self.where.startswith("--")


Recipe = dict[Key, Given]


def overlay(recipe: Recipe, key: Key, given: Given) -> None:
    """Set `key` in place of what stood there, in it or around it; an empty mapping leaves what stood in it."""
    inside = below(recipe, key)
    if given.value == {} and inside:
        return
    for other in [*inside, *(key[:n] for n in range(1, len(key)))]:
        recipe.pop(other, None)
    recipe[key] = given


def below(recipe: Recipe, key: Key) -> list[Key]:
    """The keys inside `key`: ("train", "max_steps") is inside ("train",)."""
    return [other for other in recipe if len(other) > len(key) and other[: len(key)] == key]


def leaves(key: Key, given: Given) -> Iterator[tuple[Key, Given]]:
    """`given`, or when it holds a mapping, each value in it under its own key."""
    if isinstance(given.value, dict) and given.value:
        for name, value in given.value.items():
            yield from leaves((*key, str(name)), Given(value, given.where, given.source))
    else:
        yield key, given


# The command line ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Words:
    """A command line taken apart: words that stand alone, and options as typed; the value of a bare one is None."""

    alone: list[str]
    options: list[tuple[str, str | None]]


def split(argv: Sequence[str], takes_value: Callable[[str, str], bool]) -> Words:
    """Take `argv` apart; `takes_value(name, next_word)` says whether an option without "=" takes the word after it."""
    words, rest = Words([], []), list(argv)
    while rest:
        word = rest.pop(0)
        if word == "--":
            words.alone.extend(rest)
            break
        if not word.startswith("--"):
            words.alone.append(word)
            continue
        name, equals, value = word[2:].partition("=")
        following = rest[0] if rest and not rest[0].startswith("--") else None
        if equals:
            words.options.append((name, value))
        elif following is not None and takes_value(name, following):
            words.options.append((name, rest.pop(0)))
        else:
            words.options.append((name, None))
    return words


# YAML ---------------------------------------------------------------------------------------------------------------


class _Loader(yaml.SafeLoader):
    """Safe YAML in which 6e-5 is a number, as JSON and Python have it, and a wrong value is always a ValueError."""

    def construct_document(self, node: yaml.Node) -> Any:
        try:
            return super().construct_document(node)
        except (LookupError, AttributeError, TypeError, ArithmeticError):  # of `!!bool q`, `!!float`, `!!timestamp x`
            what = shown(node.value) if isinstance(node, yaml.ScalarNode) else "what it holds"
            tag = node.tag.replace("tag:yaml.org,2002:", "!!")
            raise ValueError(f"{what} is no value of the type {tag}") from None


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def parse_value(text: str) -> Any:
    """The YAML value of an option's text, or the text itself where it is no YAML."""
    try:
        return yaml.load(text, Loader=_Loader)
    except (yaml.YAMLError, ValueError, RecursionError):
        return text


def read_config(location: str, source: int) -> Iterator[tuple[Key, Given]]:
    """The leaves of the recipe at `location`, a file or an http(s) URL, each with its line."""
    text = _download(location) if re.match(r"https?://", location) else _read(Path(location))
    return parse_config(text, location, source)


def parse_config(text: str, location: str, source: int) -> Iterator[tuple[Key, Given]]:
    """The leaves of a YAML mapping, each with the line it stands on in `location`."""
    try:
        loader = _Loader(text)
        root = loader.get_single_node()
        if not isinstance(root, yaml.MappingNode) or not root.value:
            raise InputError(f"{location}: holds no 'key: value' lines; a recipe is a YAML mapping of options")
        _require_unique_keys(root, location)
        yield from _leaves(loader, root, location, source)
    except yaml.YAMLError as e:
        mark = getattr(e, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        problem = getattr(e, "problem", None) or str(e).splitlines()[0]
        raise InputError(f"{location}{line}: this is not valid YAML: {problem}") from None
    except RecursionError:
        raise InputError(f"{location}: nested too deeply to be a recipe") from None


def _leaves(loader: _Loader, root: yaml.MappingNode, location: str, source: int) -> Iterator[tuple[Key, Given]]:
    pending: list[tuple[Key, yaml.Node]] = [((), root)]
    visited = 0
    while pending:
        key, node = pending.pop()
        where = f"{location}:{node.start_mark.line + 1}"
        visited += 1
        if visited > MAX_NODES or len(key) > MAX_DEPTH:
            raise InputError(f"{where}: {'.'.join(key[:4])} holds too much to be a recipe")
        if isinstance(node, yaml.MappingNode) and node.value:
            loader.flatten_mapping(node)
            children = {(*key, str(name.value)): value for name, value in node.value}
            pending.extend(reversed(children.items()))
        else:
            yield key, Given(_constructed(loader, node, where), where, source)


def _constructed(loader: _Loader, node: yaml.Node, where: str) -> Any:
    pending, visited = [node], 0
    while pending:
        inner = pending.pop()
        visited += 1
        if visited > MAX_NODES:
            raise InputError(f"{where}: this value holds too much to be a recipe")
        if isinstance(inner, yaml.CollectionNode):
            pairs = inner.value if isinstance(inner, yaml.MappingNode) else [(n,) for n in inner.value]
            pending.extend(n for pair in pairs for n in pair)
    try:
        return loader.construct_document(node)
    except ValueError as e:
        raise InputError(f"{where}: {e}") from None


def _require_unique_keys(root: yaml.Node, location: str) -> None:
    pending, seen = [root], set()
    while pending:
        node = pending.pop()
        if id(node) in seen or not isinstance(node, yaml.CollectionNode):
            continue
        seen.add(id(node))
        if isinstance(node, yaml.SequenceNode):
            pending.extend(node.value)
            continue
        lines: dict[str, int] = {}
        for name, value in node.value:
            line = name.start_mark.line + 1
            if not isinstance(name, yaml.ScalarNode):
                raise InputError(f"{location}:{line}: a key must be a word")
            if name.value in lines and name.value != "<<":
                raise InputError(
                    f"{location}:{line}: '{name.value}' stands in line {lines[name.value]} already; keep one"
                )
            lines[name.value] = line
            pending.append(value)


def _read(path: Path) -> str:
    if path.is_file() and path.stat().st_size > MAX_BYTES:
        raise InputError(f"--config {path}: larger than {MAX_BYTES} bytes; that is no recipe")
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        names = os.listdir(path.parent) if path.parent.is_dir() else []
        raise MissingError(f"--config {path}: there is no such file{near_miss(path.name, names)}") from None
    except (OSError, ValueError) as e:  # the latter: a zero byte in the path
        reason = getattr(e, "strerror", None) or e
        raise InputError(f"--config {shown(str(path), 300)}: cannot be read: {reason}") from None
    return _decoded(content, str(path))


def _download(url: str) -> str:
    import http.client
    import urllib.request

    deadline = time.monotonic() + URL_SECONDS
    body = b""
    try:
        with urllib.request.urlopen(url, timeout=URL_SECONDS / 2) as response:
            while chunk := response.read1(1 << 16):
                body += chunk
                if len(body) > MAX_BYTES or time.monotonic() > deadline:
                    raise InputError(f"--config {url}: too large or too slow to be a recipe; download it by hand")
    except urllib.request.HTTPError as e:
        raise InputError(f"--config {url}: the server answers {e.code} {e.reason}; check the address") from None
    except (OSError, http.client.HTTPException, ValueError) as e:
        reason = getattr(e, "reason", None) or e
        raise InputError(f"--config {url}: cannot be reached ({reason}); check the address or the network") from None
    return _decoded(body, url)


def _decoded(content: bytes, location: str) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as e:
        raise InputError(f"--config {location}: byte {e.start} is not UTF-8 text; save the file as UTF-8") from None
