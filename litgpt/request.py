"""What one command line asks of a command: its recipes and options as one mapping of full keys. Knows no types.

data: JSON         ->  data.class_path: JSON
--data.seed 1      ->  data.init_args.seed: 1
train: {epochs: 2} ->  train.epochs: 2
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from litgpt import legacy
from litgpt.errors import InputError, cut, shown
from litgpt.recipe import Given, Key, Recipe, Words, leaves, overlay, parse_value, read_config, split
from litgpt.signature import Signature, alternatives, described

HELP, PRINT_CONFIG, CONFIG = "help", "print_config", "config"


@dataclass
class Request:
    """The keys that were given, what was odd about them, and whether only to show something."""

    recipe: Recipe
    warnings: list[str]
    wants_help: bool
    wants_config: bool


def read(signature: Signature, argv: Sequence[str]) -> Request:
    """Take the words after the action apart and lay the options over the recipes they name."""
    words = split(argv, lambda name, following: _takes_value(signature, name, following))
    names = [name for name, _ in words.options]
    recipe: Recipe = {}
    locations = [value for name, value in words.options if name == CONFIG]
    for source, location in enumerate(locations):
        if not location:
            raise InputError("--config: name a YAML file or its URL")
        _lay(recipe, signature, read_config(location, source))
    _lay(recipe, signature, _typed(signature, words, source=len(locations)))
    warnings = legacy.rewrite(recipe, signature.names)
    return Request(recipe, warnings, HELP in names or "-h" in words.alone, PRINT_CONFIG in names)


def require_known(signature: Signature, recipe: Recipe) -> None:
    """Refuse a key that the command does not have; the keys of a class are left to the class that will be chosen."""
    for key, given in recipe.items():
        holder = next((key[:n] for n in range(len(key), 0, -1) if key[:n] in signature.leaves), None)
        holds = holder == key or (holder is not None and _is_mapping(signature.leaves[holder].type))
        if not holds and key[0] not in signature.choices and not (len(key) == 1 and key[0] in signature.groups):
            near = signature.near(key).replace("'", "'--" if given.typed else "'", 1)
            what = "option" if given.typed else "key"
            raise InputError(f"{place(given, key)}: there is no such {what}{near} (--help shows all)")


def place(given: Given, key: Key) -> str:
    """Where a value stands, in words: "--train.epochs" or "my.yaml:3: train.epochs"."""
    if given.typed:
        return cut(given.where)
    return f"{given.where}: {cut('.'.join(k for k in key if k != 'init_args'))}"


# Full keys ----------------------------------------------------------------------------------------------------------


def _lay(recipe: Recipe, signature: Signature, given: Iterable[tuple[Key, Given]]) -> None:
    for key, value in given:
        for full_key, leaf in _spelled_out(signature, key, value):
            overlay(recipe, full_key, leaf)


def _spelled_out(signature: Signature, key: Key, given: Given) -> Iterable[tuple[Key, Given]]:
    name, value = key[0], given.value
    if name in signature.choices:
        if len(key) == 1 and isinstance(value, str):
            return [((name, "class_path"), given)]
        return [(_in_class(k), leaf) for k, leaf in leaves(key, given)]
    if key == (name,) and name in signature.groups and isinstance(value, str):
        if not Path(value).is_file():
            raise InputError(f"{place(given, key)}: {shown(value)} is no mapping and no YAML file; write {name}.KEY")
        return [((name, *k), leaf) for k, leaf in read_config(value, given.source)]
    return leaves(key, given)


def _in_class(key: Key) -> Key:
    if len(key) < 2 or key[1] in ("class_path", "init_args"):
        return key
    return (key[0], "init_args", *key[1:])


def _is_mapping(kind: Any) -> bool:
    return any(t is Any or (getattr(t, "__origin__", None) or t) is dict for t in alternatives(kind))


# The command line's words -------------------------------------------------------------------------------------------


def _takes_value(signature: Signature, name: str, following: str) -> bool:
    leaf = signature.leaves.get(tuple(name.split(".")))
    if name in (HELP, PRINT_CONFIG):
        return False
    is_flag = leaf is not None and set(alternatives(leaf.type)) <= {bool, type(None)}
    return not is_flag or following.lower() in ("true", "false", "yes", "no", "on", "off", "null")


def _typed(signature: Signature, words: Words, source: int) -> Iterator[tuple[Key, Given]]:
    values: dict[Key, Any] = {}
    for name, text in words.options:
        if name not in (HELP, PRINT_CONFIG, CONFIG):
            key = tuple(name.split("."))
            value = _value(signature, key, text)
            more = values.get(key) if signature.takes_many(name) else None  # --stop A --stop B
            values[key] = [*more, *value] if isinstance(more, list) and isinstance(value, list) else value
    names = [name for name in signature.positional if (name,) not in values]
    alone: list[Any] = [word for word in words.alone if word != "-h"]
    if names and signature.takes_many(names[-1]) and len(alone) >= len(names):
        alone = [*alone[: len(names) - 1], alone[len(names) - 1 :]]
    if len(alone) > len(names):
        raise InputError(
            f"{shown(alone[len(names)])} stands alone; options are written --name value (--help shows them)"
        )
    values.update({(name,): value for name, value in zip(names, alone, strict=False)})
    for key, value in values.items():
        yield key, Given(value, f"--{'.'.join(key)}", source)


def _value(signature: Signature, key: Key, text: str | None) -> Any:
    """An option's text, read as YAML where no type will say how."""
    leaf = signature.leaves.get(key)
    if text is None:
        if key[0] == "optimizer" or (leaf is not None and bool not in alternatives(leaf.type)):
            wanted = f": {described(leaf.type)}" if leaf else ""
            raise InputError(f"{cut('--' + '.'.join(key))}: it needs a value{wanted}")
        return "true"
    if leaf is None and (text.startswith("{") or (key[0] == "optimizer" and len(key) > 1)):
        return parse_value(text)
    if leaf is not None and signature.takes_many(key[0]):
        whole = parse_value(text)
        return whole if whole is None or isinstance(whole, list) else [text]
    return text
