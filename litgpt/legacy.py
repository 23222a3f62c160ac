"""Keys and options of earlier versions, as two tables: what they are called now, and which have lost their meaning."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from litgpt.recipe import Given, Key, Recipe, overlay, parse_value

MOVED: dict[Key, Key] = {
    ("train", "learning_rate"): ("optimizer", "init_args", "lr"),
    ("train", "weight_decay"): ("optimizer", "init_args", "weight_decay"),
    ("train", "betas"): ("optimizer", "init_args", "betas"),
    ("io", "checkpoint_dir"): ("checkpoint_dir",),
    ("io", "out_dir"): ("out_dir",),
}

BETAS = {("train", "beta1"): 0.9, ("train", "beta2"): 0.95}  # with their defaults; together they are train.betas

MEANINGLESS: dict[str, str] = {
    "convert_checkpoint": "checkpoints are used as they lie on the Hub",
    "force_conversion": "checkpoints are evaluated as they are",
    "model_filename": "the weights are found by looking",
    "model_name": "config.json says what the model is",
    "debug_mode": "errors say what is wrong without it",
}


def rewrite(recipe: Recipe, options: Collection[str]) -> list[str]:
    """Bring `recipe` up to date, in place, for a command that has these `options`; returns a warning per change."""
    _join_betas(recipe)
    warnings = [_move(recipe, old, new) for old, new in MOVED.items() if old in recipe and new[0] in options]
    for name, reason in MEANINGLESS.items():
        if name not in options and (name,) in recipe:
            warnings.append(f"{recipe.pop((name,)).where}: {name} has no effect any more: {reason}")
    return warnings


def _join_betas(recipe: Recipe) -> None:
    given = {key: recipe.pop(key) for key in BETAS if key in recipe}
    given = {key: beta for key, beta in given.items() if beta.value is not None}
    if given:
        newest = max(given.values(), key=lambda g: g.source)
        values = [given[key].value if key in given else default for key, default in BETAS.items()]
        recipe["train", "betas"] = Given([_number(v) for v in values], newest.where, newest.source)


def _number(value: Any) -> Any:
    return parse_value(value) if isinstance(value, str) else value


def _move(recipe: Recipe, old: Key, new: Key) -> str:
    given = recipe.pop(old)
    newer = recipe.get(new)
    if given.value is not None and (newer is None or newer.source < given.source):
        overlay(recipe, new, Given(_number(given.value), given.where, given.source))
    name = " and ".join(".".join(key) for key in BETAS) if old == ("train", "betas") else ".".join(old)
    are = "are" if " and " in name else "is"
    return f"{given.where}: {name} {are} now {'.'.join(k for k in new if k != 'init_args')}"
