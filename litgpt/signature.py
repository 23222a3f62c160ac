"""What may be given to a command: the signature of its function as a table of dotted keys. Knows no values.

A parameter is a leaf (`seed: int`), a group of leaves (a dataclass: `train.max_steps`), or a choice: an object of a
class that the user names (`data`, `optimizer`), whose own parameters are keys as well.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import os
import sys
import types
import typing
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Union

from litgpt.errors import InputError, near_miss, one_line, shown
from litgpt.recipe import Key

REQUIRED: Any = inspect.Parameter.empty


@dataclass(frozen=True)
class Leaf:
    """One value: its type, and its default or REQUIRED."""

    type: Any
    default: Any = REQUIRED


@dataclass(frozen=True)
class Choice:
    """A parameter whose value is an object of a class the user names: where the classes are at home, and their base."""

    what: str  # "data module"
    home: str  # "litgpt.data"
    base: str  # "DataModule"
    built_here: bool = True  # else the command gets class_path and init_args

    def names(self) -> list[str]:
        """The short names of the classes at home."""
        home = importlib.import_module(self.home)
        base = getattr(home, self.base)
        found = {name: getattr(home, name) for name in getattr(home, "__all__", dir(home))}
        return sorted(n for n, c in found.items() if _is_proper_subclass(c, base) and not inspect.isabstract(c))

    def path(self, cls: type) -> str:
        """The full path of a class, by which a recipe names it."""
        return f"{self.home if cls.__name__ in self.names() else cls.__module__}.{cls.__name__}"

    def resolve(self, name: str, where: str) -> type:
        """The class called `name`: a short name, or the full path of a class of this kind that is installed."""
        names = self.names()
        if self.what == "data module" and os.path.exists(name) and name not in names:
            reader = f"--data JSON --data.json_path {name}, or for plain text --data TextFiles --data.train_data_path"
            raise InputError(f"{where}: {shown(name)} is a path; a data module reads it: {reader}")
        module, _, short = name.rpartition(".")
        if module in ("", self.home) and short in names:
            return getattr(importlib.import_module(self.home), short)
        if module in ("", self.home) or module.partition(".")[0] in sys.stdlib_module_names:
            raise InputError(f"{where}: {shown(name)} is no {self.what}{near_miss(short, names)} ({', '.join(names)})")
        try:
            found = getattr(importlib.import_module(module), short)
        except (ImportError, AttributeError, TypeError, ValueError) as e:  # the last two: no name of a module, as ..x
            raise InputError(f"{where}: {self.what} {shown(name)} cannot be imported: {one_line(e)[:200]}") from None
        if not _is_proper_subclass(found, getattr(importlib.import_module(self.home), self.base)):
            raise InputError(
                f"{where}: {shown(name)} is no {self.what}; it must be a subclass of {self.home}.{self.base}"
            )
        return found


CHOICES = {
    "data": Choice("data module", "litgpt.data", "DataModule"),
    "optimizer": Choice("optimizer", "torch.optim", "Optimizer", built_here=False),  # it needs the model's parameters
}


@dataclass
class Signature:
    """A function's parameters, by key."""

    function: Callable[..., Any]
    leaves: dict[Key, Leaf] = field(default_factory=dict)
    groups: dict[str, type] = field(default_factory=dict)
    choices: dict[str, Choice] = field(default_factory=dict)
    defaults: dict[str, Any] = field(default_factory=dict)  # of groups and choices
    required: list[str] = field(default_factory=list)

    @property
    def positional(self) -> list[str]:
        """The required parameters that stand after the action without a name; one that takes many is the last.

        Where none is required, those before the `*` of the function, if it has one.
        """
        kinds = {name: parameter.kind for name, parameter in inspect.signature(self.function).parameters.items()}
        is_marked = not self.required and inspect.Parameter.KEYWORD_ONLY in kinds.values()
        among = self.names if is_marked else self.required
        names = [name for name in among if kinds[name] is not inspect.Parameter.KEYWORD_ONLY]
        first_of_many = next((n for n, name in enumerate(names) if self.takes_many(name)), len(names))
        return names[: first_of_many + 1]

    def takes_many(self, name: str) -> bool:
        """Whether a parameter is a list of values."""
        leaf = self.leaves.get((name,))
        return leaf is not None and any((typing.get_origin(t) or t) is list for t in alternatives(leaf.type))

    @property
    def names(self) -> list[str]:
        """The parameters, in the order of the function."""
        return list(inspect.signature(self.function).parameters)

    def near(self, key: Key) -> str:
        """Words on the key that was meant by the unknown `key`, or ""."""
        keys = [*self.leaves, *((name,) for name in (*self.groups, *self.choices))]
        return near_key(key, keys)


def read(function: Callable[..., Any]) -> Signature:
    """The signature of a command's function."""
    signature = Signature(function)
    hints = typing.get_type_hints(function)
    for name, parameter in inspect.signature(function).parameters.items():
        group = next((t for t in alternatives(hints[name]) if dataclasses.is_dataclass(t)), None)
        if name in CHOICES:
            signature.choices[name], signature.defaults[name] = CHOICES[name], parameter.default
        elif isinstance(group, type):
            signature.groups[name], signature.defaults[name] = group, parameter.default
            signature.leaves |= {(name, *key): leaf for key, leaf in class_leaves(group, parameter.default).items()}
        else:
            signature.leaves[name,] = Leaf(hints[name], parameter.default)
            if parameter.default is REQUIRED:
                signature.required.append(name)
    return signature


def class_leaves(cls: type, defaults: Any = None) -> dict[Key, Leaf]:
    """What the constructor of `cls` takes; defaults are the values of the object `defaults`, where there is one."""
    hints = typing.get_type_hints(cls.__init__)  # type: ignore[misc]
    leaves: dict[Key, Leaf] = {}
    for name, parameter in inspect.signature(cls).parameters.items():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        default = _default(cls, parameter) if not isinstance(defaults, cls) else getattr(defaults, name)
        leaves[name,] = Leaf(hints.get(name, Any), default)
    return leaves


def documentation(thing: Any) -> tuple[str, str, dict[str, str]]:
    """The headline, the rest and the words on each parameter in the docstring of a function or class."""
    import docstring_parser

    parsed = docstring_parser.parse_from_object(thing)
    inherited = [base for base in reversed(getattr(thing, "__mro__", ())[1:]) if dataclasses.is_dataclass(base)]
    parameters = [p for each in [*map(docstring_parser.parse_from_object, inherited), parsed] for p in each.params]
    words = {p.arg_name: " ".join((p.description or "").split()) for p in parameters}
    return parsed.short_description or "", parsed.long_description or "", words


def alternatives(kind: Any) -> tuple[Any, ...]:
    """The types of which a value may be; None stands as NoneType."""
    if typing.get_origin(kind) in (Union, types.UnionType):
        return tuple(t for arg in typing.get_args(kind) for t in alternatives(arg))
    return (kind,)


def is_plain(kind: Any) -> bool:
    """Whether YAML itself has values of this type, so that no class is to be looked up for one."""
    return kind is Any or kind in _PLAIN or not isinstance(kind, type)


def described(kind: Any) -> str:
    """A type in plain words: 'a whole number or null'."""
    return " or ".join(dict.fromkeys(_described_one(t) for t in alternatives(kind) if is_plain(t)))


def near_key(key: Key, keys: Iterable[Key]) -> str:
    """`"; did you mean 'train.max_steps'?"` for the key in `keys` closest to `key`, or ""."""
    keys = list(keys)
    neighbours = {k[len(key) - 1] for k in keys if len(k) >= len(key) and k[: len(key) - 1] == key[:-1]}
    if close := near_miss(key[-1], neighbours):
        prefix = ".".join(key[:-1])
        return close.replace("mean '", f"mean '{prefix}.") if prefix else close
    elsewhere = [".".join(k) for k in keys if k[-1] == key[-1]]
    return f"; did you mean '{elsewhere[0]}'?" if elsewhere else ""


def _described_one(kind: Any) -> str:
    if typing.get_origin(kind) is Literal:
        return " or ".join("null" if v is None else str(v) for v in typing.get_args(kind))
    if kind == list[str]:
        return "a list of texts"
    plain = typing.get_origin(kind) or kind
    return _PLAIN.get(plain, getattr(plain, "__name__", str(plain)))


_PLAIN: dict[Any, str] = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
    Path: "a path",
    dict: "a mapping",
    list: "a list",
    tuple: "a list",
    type(None): "null",
}


def _default(cls: type, parameter: inspect.Parameter) -> Any:
    fields = getattr(cls, "__dataclass_fields__", {})
    made = fields[parameter.name].default_factory if parameter.name in fields else dataclasses.MISSING
    return parameter.default if made is dataclasses.MISSING else made()


def _is_proper_subclass(c: Any, base: type) -> bool:
    return isinstance(c, type) and issubclass(c, base) and c is not base
