"""From a request to the arguments of a command's function: types, defaults, and objects of the classes that were named.

jsonargparse turns text into typed values. Which keys there are, signature.py knows; where a value stands, recipe.py.
Tried: jsonargparse for the whole road, keys and merging too. It took two thirds of the lines, and lost what counts
when a recipe is partly replaced: `--data OTHER` over its data, the line of an error, classes never imported.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any, Union

import yaml

from litgpt import legacy
from litgpt.args import plain
from litgpt.errors import InputError, UserError, near_miss, shown
from litgpt.recipe import Given, Key, Recipe, below, leaves, parse_value
from litgpt.request import Request, place, require_known
from litgpt.signature import (
    REQUIRED,
    Choice,
    Leaf,
    Signature,
    alternatives,
    class_leaves,
    described,
    is_plain,
    near_key,
    read,
)


def arguments(signature: Signature, request: Request) -> dict[str, Any]:
    """The keyword arguments for the command's function; an unknown key or a wrong value is an InputError."""
    recipe = request.recipe
    require_known(signature, recipe)
    for name in signature.required:
        if (name,) not in recipe:
            how = f"write it after the action: {name.upper()}" if name in signature.positional else f"give --{name}"
            raise InputError(f"{name} is missing; {how} (--help shows all options)")
    result = {}
    for name in signature.names:
        if name in signature.choices:
            result[name] = _chosen(signature, name, recipe)
        elif name in signature.groups:
            result[name] = _group(signature, name, recipe)
        else:
            result[name] = value_of(recipe, (name,), signature.leaves[name,])
    return {name: value for name, value in result.items() if value is not REQUIRED}


def from_python(setup: Callable[..., None], caller: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a command that is called by a program: checked as those of a recipe are.

    Args:
        setup: the command's function.
        caller: what errors name.
        options: values or objects; mappings are laid over the command's own defaults.
    """
    table = read(setup)
    objects = {name: value for name, value in options.items() if name in table.groups and is_dataclass(value)}
    recipe: Recipe = {}
    for name, value in options.items():
        if name not in objects:
            key = (name, "class_path") if name in table.choices and isinstance(value, str) else (name,)
            recipe.update(leaves(key, Given(plain(value), caller, 0)))
    for warning in legacy.rewrite(recipe, table.names):
        print(f"warning: {warning}", file=sys.stderr)
    return arguments(table, Request(recipe, [], wants_help=False, wants_config=False)) | objects


def config_text(signature: Signature, request: Request) -> str:
    """All values that a run would use, as a YAML recipe; secrets are left out."""
    require_known(signature, request.recipe)
    config = {name: _config_value(signature, name, request.recipe) for name in signature.names}
    safe = {name: plain(v) for name, v in config.items() if v is not REQUIRED and not name.endswith("token")}
    return yaml.safe_dump(safe, sort_keys=False, allow_unicode=True)


def _config_value(signature: Signature, name: str, recipe: Recipe) -> Any:
    if name in signature.choices:
        return _chosen_config(signature, name, recipe)
    if name not in signature.groups:
        return value_of(recipe, (name,), signature.leaves[name,])
    return {key[1]: value_of(recipe, key, leaf) for key, leaf in _group_leaves(signature, name, recipe).items()} or None


def chosen_classes(signature: Signature, request: Request) -> dict[str, type]:
    """The classes that the user named, by parameter."""
    named = {name: request.recipe.get((name, "class_path")) for name in signature.choices}
    return {
        name: signature.choices[name].resolve(str(given.value), given.where)
        for name, given in named.items()
        if given is not None and given.value is not None
    }


# One value ----------------------------------------------------------------------------------------------------------


def value_of(recipe: Recipe, key: Key, leaf: Leaf) -> Any:
    """The typed value at `key`: what was given, or the default."""
    given = recipe.get(key)
    if given is None:
        inside = below(recipe, key)
        if not inside:
            return leaf.default
        first = recipe[inside[0]]
        given = Given(_nested(recipe, inside, key), first.where, first.source)
    return typed(leaf.type, given, key)


def typed(kind: Any, given: Given, key: Key) -> Any:
    """`given` as a value of the type `kind`; InputError where it is none."""
    import jsonargparse

    accepted = [t for t in alternatives(kind) if is_plain(t)]  # jsonargparse would import what a value names as a class
    if Any in accepted:
        return given.value
    if _holds_zero(given.value):
        raise InputError(f"{place(given, key)}: {shown(given.value)} holds a zero byte, which no text or path may")
    converter = jsonargparse.ArgumentParser(exit_on_error=False, add_help=False)
    converter.add_argument("--value", type=Union[tuple(accepted)])  # noqa: UP007
    value = _whole_number(given.value) if int in accepted and not {float, str} & {*accepted} else given.value
    try:
        if value == "" and Path in accepted:
            raise ValueError
        return converter.parse_object({"value": value}).value
    except (jsonargparse.ArgumentError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError):
        words = [str(word) for t in accepted for word in getattr(t, "__args__", ()) if isinstance(word, str)]
        close = near_miss(value, words) if isinstance(value, str) else ""
        raise InputError(f"{place(given, key)}: {shown(value)} is not {described(kind)}{close}") from None


def _holds_zero(value: Any) -> bool:
    inside = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return (isinstance(value, str) and "\0" in value) or any(_holds_zero(v) for v in inside)


def _whole_number(value: Any) -> Any:
    """1e9 is a float to YAML; where a whole number is meant, it is one."""
    number = parse_value(value) if isinstance(value, str) else value
    return int(number) if isinstance(number, float) and number.is_integer() else value


# Groups: dataclasses such as TrainArgs --------------------------------------------------------------------------------


def _group(signature: Signature, name: str, recipe: Recipe) -> Any:
    cls, default = signature.groups[name], signature.defaults[name]
    if not below(recipe, (name,)):
        return _whole_group(recipe, name, default)
    values = {key[1]: value_of(recipe, key, leaf) for key, leaf in _group_leaves(signature, name, recipe).items()}
    made = _made(cls, values, name, recipe)
    return made.with_given(_binding(name, recipe, made, default)) if hasattr(made, "with_given") else made


def _whole_group(recipe: Recipe, name: str, default: Any) -> Any:
    whole = recipe.get((name,))
    if whole is None or whole.value == {}:
        return default
    if whole.value is not None:
        raise InputError(f"{place(whole, (name,))}: {shown(whole.value)} is not a mapping of keys")
    return None


def _group_leaves(signature: Signature, name: str, recipe: Recipe) -> dict[Key, Leaf]:
    """The leaves a group is built from: all of them, or where the command has no default object, those given."""
    keys = {key: leaf for key, leaf in signature.leaves.items() if key[0] == name}
    if signature.defaults[name] not in (None, REQUIRED):
        return keys
    return {key: leaf for key, leaf in keys.items() if key in recipe or below(recipe, key)}


def _binding(name: str, recipe: Recipe, made: Any, default: Any) -> list[str]:
    """The keys of the group `name` that count as given. In a recipe, which is written for runs of any length, a default
    that is spelled out stays a default, and the warm-up gives way to a shorter run; what is typed is meant.
    """

    def binds(key: Key) -> bool:
        is_default = getattr(made, key[1]) == getattr(default, key[1], REQUIRED)
        return recipe[key].typed or not (is_default or key[1] == "lr_warmup_steps")

    return [key[1] for key in below(recipe, (name,)) if binds(key)]


# Choices: objects of a class that the user names ----------------------------------------------------------------------


def _chosen(signature: Signature, name: str, recipe: Recipe) -> Any:
    """The object that was chosen; where the command builds it, its class_path and init_args."""
    choice, named = signature.choices[name], _named_class(signature, name, recipe)
    if named is None:
        return None if (name,) in recipe else signature.defaults[name]
    cls = choice.resolve(str(named.value), named.where)
    values = _class_arguments(choice, cls, named, name, recipe)
    if not choice.built_here:
        return {"class_path": choice.path(cls), "init_args": values} if values else choice.path(cls)
    for (argument,), leaf in class_leaves(cls).items():
        if leaf.default is REQUIRED and argument not in values:
            raise InputError(f"--{name} {cls.__name__} needs {argument}; give --{name}.{argument}")
    return _made(cls, values, name, recipe)


def _named_class(signature: Signature, name: str, recipe: Recipe) -> Given | None:
    """The class_path of a choice, as given or as the command has it; None where none is wanted."""
    choice, arguments, whole = signature.choices[name], below(recipe, (name,)), recipe.get((name,))
    if whole is not None and whole.value is not None:
        raise InputError(f"{place(whole, (name,))}: {shown(whole.value)} names no {choice.what}")
    named = recipe.get((name, "class_path"))
    if named is not None and named.value is not None:
        return named
    if arguments and isinstance(signature.defaults[name], str):
        return Given(signature.defaults[name], f"--{name}", source=-1)
    if arguments:
        where = place(recipe[arguments[0]], arguments[0])
        raise InputError(f"{where}: name the {choice.what} first: --{name} {' or '.join(choice.names())}")
    return None


def _class_arguments(choice: Choice, cls: type, named: Given, name: str, recipe: Recipe) -> dict[str, Any]:
    known, values = class_leaves(cls), {}
    top = (name, "init_args")
    for argument in dict.fromkeys(key[2] for key in below(recipe, top)):
        key = (*top, argument)
        if (argument,) in known:
            leaf = known[argument,]
            values[argument] = value_of(recipe, key, leaf if choice.built_here else Leaf(Any, leaf.default))
            continue
        given = recipe.get(key) or recipe[below(recipe, key)[0]]
        if given.source >= named.source:  # else it belongs to the class that an earlier recipe named
            near = near_key((argument,), known)
            raise InputError(f"{place(given, key)}: {cls.__name__} has no {shown(argument)}{near}")
    return values


def _chosen_config(signature: Signature, name: str, recipe: Recipe) -> Any:
    choice, named = signature.choices[name], _named_class(signature, name, recipe)
    if named is None:
        return None if (name,) in recipe else plain(signature.defaults[name])
    cls = choice.resolve(str(named.value), named.where)
    used = {k: leaf.default for (k,), leaf in class_leaves(cls).items() if choice.built_here}
    used |= _class_arguments(choice, cls, named, name, recipe)
    safe = {k: plain(v) for k, v in used.items() if v is not REQUIRED and not k.endswith("token")}
    return {"class_path": choice.path(cls), "init_args": safe}


def _made(cls: type, values: dict[str, Any], name: str, recipe: Recipe) -> Any:
    try:
        return cls(**values)
    except UserError as e:
        for key, given in recipe.items():
            if key[0] == name and not given.typed and key[-1] in str(e):
                raise type(e)(f"{given.where}: {e}") from None
        raise


def _nested(recipe: Recipe, keys: list[Key], top: Key) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for key in keys:
        branch = tree
        for name in key[len(top) : -1]:
            branch = branch.setdefault(name, {})
        value = recipe[key].value
        branch[key[-1]] = parse_value(value) if recipe[key].typed and isinstance(value, str) else value
    return tree
