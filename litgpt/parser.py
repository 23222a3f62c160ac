"""From a request to the arguments of a command's function: types, defaults, and objects of the classes that were named.

jsonargparse turns text into typed values. Which keys there are, signature.py knows; where a value was written, recipe.py.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import yaml

from litgpt.errors import InputError, UserError, near_miss
from litgpt.recipe import Given, Key, Recipe, parse_value
from litgpt.request import Request, place, require_known
from litgpt.signature import REQUIRED, Leaf, Signature, alternatives, class_leaves, described, near_key


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


def config_of(signature: Signature, request: Request) -> dict[str, Any]:
    """All values that a run would use, as plain data for a YAML recipe."""
    require_known(signature, request.recipe)
    config: dict[str, Any] = {}
    for name in signature.names:
        if name in signature.choices:
            config[name] = _chosen_config(signature, name, request.recipe)
            continue
        keys = [key for key in signature.leaves if key[0] == name]
        unset = name in signature.groups and signature.defaults[name] is None
        if unset:
            keys = [key for key in keys if key in request.recipe or _given_below(request.recipe, key)]
        values = {key: value_of(request.recipe, key, signature.leaves[key]) for key in keys}
        plain = {key: _plain(value) for key, value in values.items() if value is not REQUIRED}
        if name in signature.groups:
            config[name] = {key[1]: value for key, value in plain.items()} or None
        elif (name,) in plain and not name.endswith("token"):
            config[name] = plain[name,]
    return config


def config_text(signature: Signature, request: Request) -> str:
    """The recipe that repeats this run, as YAML."""
    return yaml.safe_dump(config_of(signature, request), sort_keys=False, allow_unicode=True)


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
        below = _given_below(recipe, key)
        if not below:
            return leaf.default
        given = Given(_nested(recipe, below, key), recipe[below[0]].where, recipe[below[0]].source)
    return typed(leaf.type, given, key)


def typed(kind: Any, given: Given, key: Key) -> Any:
    """`given` as a value of the type `kind`; InputError where it is none."""
    import jsonargparse

    accepted = alternatives(kind)
    value = given.value
    if int in accepted and not {float, str} & set(accepted):
        number = parse_value(value) if isinstance(value, str) else value
        value = int(number) if isinstance(number, float) and number.is_integer() else value
    converter = jsonargparse.ArgumentParser(exit_on_error=False, add_help=False)
    converter.add_argument("--value", type=kind)
    try:
        if value == "" and Path in accepted:
            raise ValueError
        return converter.parse_object({"value": value}).value
    except (jsonargparse.ArgumentError, TypeError, ValueError):
        choices = [str(c) for t in accepted for c in getattr(t, "__args__", ()) if isinstance(c, str)]
        close = near_miss(value, choices) if isinstance(value, str) else ""
        raise InputError(f"{place(given, key)}: {_shown(value)} is not {described(kind)}{close}") from None


# Groups and choices -------------------------------------------------------------------------------------------------


def _group(signature: Signature, name: str, recipe: Recipe) -> Any:
    cls, default = signature.groups[name], signature.defaults[name]
    given = {key[1] for key in recipe if key[0] == name and len(key) > 1}
    if not given:
        whole = recipe.get((name,))
        if whole is not None and whole.value not in (None, {}):
            raise InputError(f"{place(whole, (name,))}: {_shown(whole.value)} is not a mapping of keys")
        return default if whole is None or whole.value == {} else None
    keys = [key for key in signature.leaves if key[0] == name]
    if default in (None, REQUIRED):
        keys = [key for key in keys if key[1] in given]
    values = {key[1]: value_of(recipe, key, signature.leaves[key]) for key in keys}
    made = _made(cls, values, name, recipe)
    return made.with_given(_binding(name, recipe)) if hasattr(made, "with_given") else made


def _binding(name: str, recipe: Recipe) -> list[str]:
    """The keys of the group `name` that count as given. A recipe is written for runs of any length: its warm-up gives
    way to a shorter run, as a default does, while a warm-up typed beside the length is a contradiction.
    """
    keys = {key[1]: given for key, given in recipe.items() if key[0] == name and len(key) > 1}
    return [k for k, given in keys.items() if given.typed or k != "lr_warmup_steps"]


def _chosen(signature: Signature, name: str, recipe: Recipe) -> Any:
    """The data module that was named, built; the optimizer as its name or as class_path and init_args."""
    cls, values = _class_and_arguments(signature, name, recipe)
    if cls is None:
        return None if (name,) in recipe else signature.defaults[name]
    if name == "optimizer":
        path = f"{cls.__module__}.{cls.__qualname__}" if cls.__name__ not in signature.choices[name].names() else None
        class_path = path or f"{signature.choices[name].home}.{cls.__name__}"
        return {"class_path": class_path, "init_args": values} if values else class_path
    missing = [k for (k,), leaf in class_leaves(cls).items() if leaf.default is REQUIRED and k not in values]
    if missing:
        raise InputError(f"--{name} {cls.__name__} needs {missing[0]}; give --{name}.{missing[0]}")
    return _made(cls, values, name, recipe)


def _chosen_config(signature: Signature, name: str, recipe: Recipe) -> Any:
    cls, values = _class_and_arguments(signature, name, recipe)
    if cls is None:
        return None if (name,) in recipe else _plain(signature.defaults[name])
    home = signature.choices[name].home
    path = f"{home}.{cls.__name__}" if cls.__name__ in signature.choices[name].names() else None
    defaults = {k: leaf.default for (k,), leaf in class_leaves(cls).items()} if name == "data" else {}
    used = {k: _plain(v) for k, v in (defaults | values).items() if v is not REQUIRED}
    return {"class_path": path or f"{cls.__module__}.{cls.__qualname__}", "init_args": used}


def _class_and_arguments(signature: Signature, name: str, recipe: Recipe) -> tuple[type | None, dict[str, Any]]:
    choice = signature.choices[name]
    if (whole := recipe.get((name,))) is not None and whole.value is not None:
        raise InputError(f"{place(whole, (name,))}: {_shown(whole.value)} names no {choice.what}")
    named = recipe.get((name, "class_path"))
    below = _given_below(recipe, (name,))
    if named is None and below and isinstance(signature.defaults[name], str):
        named = Given(signature.defaults[name], recipe[below[0]].where, -1)
    if named is None or named.value is None:
        if below:
            raise InputError(
                f"{place(recipe[below[0]], below[0])}: name the {choice.what} first: --{name} "
                + " or ".join(choice.names())
            )
        return None, {}
    cls = choice.resolve(str(named.value), named.where)
    known = class_leaves(cls)
    values = {}
    for argument in dict.fromkeys(key[2] for key in below if key[1] == "init_args" and len(key) > 2):
        key = (name, "init_args", argument)
        if (argument,) in known:
            values[argument] = value_of(
                recipe, key, _loose(known[argument,]) if name == "optimizer" else known[argument,]
            )
            continue
        origin = recipe.get(key) or recipe[_given_below(recipe, key)[0]]
        if origin.source >= named.source:  # an argument of another class that an earlier recipe named is left behind
            near = near_key((argument,), known)
            raise InputError(f"{place(origin, (name, argument))}: {cls.__name__} has no '{argument}'{near}")
    return cls, values


def _loose(leaf: Leaf) -> Leaf:
    """torch annotates optimizers loosely (`lr: float | Tensor`): their values are read as YAML has them."""
    return Leaf(Any, leaf.default)


def _made(cls: type, values: dict[str, Any], name: str, recipe: Recipe) -> Any:
    try:
        return cls(**values)
    except UserError as e:
        for key, given in recipe.items():
            if key[0] == name and not given.typed and key[-1] in str(e):
                raise type(e)(f"{given.where}: {e}") from None
        raise


def _given_below(recipe: Recipe, key: Key) -> list[Key]:
    return [other for other in recipe if len(other) > len(key) and other[: len(key)] == key]


def _nested(recipe: Recipe, keys: list[Key], top: Key) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for key in keys:
        branch = tree
        for name in key[len(top) : -1]:
            branch = branch.setdefault(name, {})
        value = recipe[key].value
        branch[key[-1]] = parse_value(value) if recipe[key].typed and isinstance(value, str) else value
    return tree


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value) if f.init}
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)
