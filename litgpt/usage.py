"""The page of `litgpt ACTION --help`: every option with its type, default and words, read from the signature."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from litgpt.signature import REQUIRED, Leaf, Signature, alternatives, class_leaves, documentation, is_plain

LEFT = 34  # columns for the options; their words follow

_SHORT: dict[Any, str] = {int: "INT", float: "NUMBER", str: "TEXT", Path: "PATH", dict: "MAPPING", list: "LIST"}


def page(action: str, signature: Signature, classes: dict[str, type]) -> str:
    """The help of `action`; the options of a chosen class, such as a data module, are shown for those in `classes`."""
    headline, more, words = documentation(signature.function)
    lines = [f"Usage: litgpt {action} {_needed(signature)} [--option VALUE ...] [--config FILE]", "", headline]
    lines += ["", *_wrapped(_reflowed(more), 0), ""] if more else [""]
    for name in signature.positional:
        lines += _entry(name.upper(), words.get(name, ""))
    lines += ["", "Options:", *_own_options(signature, words)]
    lines += _entry("--config FILE", "YAML recipe, a file or a URL; options typed beside it win.")
    lines += _entry("--print_config", "Print all values as a recipe and stop.")
    lines += _entry("-h, --help", "Show this page.")
    for name, cls in signature.groups.items():
        if name in signature.defaults and signature.defaults[name] not in (None, REQUIRED):
            leaves = {key[1:]: leaf for key, leaf in signature.leaves.items() if key[0] == name}
            lines += ["", f"{name}: {documentation(cls)[0]}", *_class_options(name, cls, leaves)]
    for name, cls in classes.items():
        lines += [
            "",
            f"--{name} {cls.__name__}: {documentation(cls)[0]}",
            *_class_options(name, cls, class_leaves(cls)),
        ]
    return "\n".join(line.rstrip() for line in lines)


def _own_options(signature: Signature, words: dict[str, str]) -> Iterator[str]:
    for name in signature.names:
        text = words.get(name, "")
        if name in signature.choices:
            names = ", ".join(signature.choices[name].names()) if name == "data" else "any class of torch.optim"
            hint = f"{names}; its own options: --{name}.KEY VALUE"
            hint += f" (listed by --{name} NAME --help)" if name == "data" else ""
            yield from _entry(f"--{name} NAME", f"{text} ({hint})", signature.defaults[name])
        elif name in signature.groups and signature.defaults[name] is None:
            yield from _entry(f"--{name}.KEY VALUE", text)
        elif name not in signature.groups and name not in signature.positional:
            leaf = signature.leaves[name,]
            yield from _entry(f"--{name} {_short(leaf.type)}", text, leaf.default)


def _class_options(name: str, cls: type, leaves: dict[tuple[str, ...], Leaf]) -> Iterator[str]:
    words = documentation(cls)[2]
    for (key,), leaf in leaves.items():
        yield from _entry(f"--{name}.{key} {_short(leaf.type)}", words.get(key, ""), leaf.default)


def _entry(option: str, words: str, default: Any = None) -> Iterator[str]:
    if default not in (None, REQUIRED, "", False):
        words += f" [{_default(default)}]"
    elif default is REQUIRED:
        words += " [required]"
    right = _wrapped(words.strip(), LEFT) or [""]
    left = f"  {option}"
    if len(left) + 2 > LEFT:
        yield left
        yield from (line for line in right if line)
    else:
        yield left.ljust(LEFT) + right[0].strip()
        yield from right[1:]


def _default(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:_}" if isinstance(value, int) else str(value)


def _reflowed(text: str) -> str:
    """Each paragraph as one line, whatever width it was written at."""
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in text.split("\n\n"))


def _wrapped(text: str, indent: int) -> list[str]:
    width = max(min(shutil.get_terminal_size((100, 24)).columns, 120), LEFT + 40)
    margin = " " * indent
    return [
        line
        for part in text.splitlines()
        for line in textwrap.wrap(part, width, initial_indent=margin, subsequent_indent=margin) or [""]
    ]


def _needed(signature: Signature) -> str:
    alone = [f"{name.upper()}{'...' if signature.takes_many(name) else ''}" for name in signature.positional]
    alone = alone if signature.required else [f"[{name}]" for name in alone]
    named = [f"--{n} {_short(signature.leaves[n,].type)}" for n in signature.required if n not in signature.positional]
    return " ".join([*alone, *named])


def _short(kind: Any) -> str:
    return "|".join(dict.fromkeys(_short_all(t for t in alternatives(kind) if is_plain(t) and t is not type(None))))


def _short_all(kinds: Iterable[Any]) -> Iterator[str]:
    for kind in kinds:
        if get_origin(kind) is Literal:
            yield from (str(v) for v in get_args(kind) if v is not None)
        elif kind is bool:
            yield from ("true", "false")
        else:
            plain = get_origin(kind) or kind
            yield _SHORT.get(plain, getattr(plain, "__name__", "VALUE"))
