"""Any optimizer of torch, or of an installed package, from what a recipe says. Knows no model."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from litgpt.errors import InputError, near_miss

Spec = str | Mapping[str, Any]  # "AdamW", "torch.optim.AdamW" or {"class_path": ..., "init_args": {...}}


def describe(spec: Spec) -> dict[str, Any]:
    """The spec in full, with the class by its complete path: what a resumed run is compared with."""
    chosen, arguments = _read(spec)
    return {"class_path": f"{chosen.__module__}.{chosen.__qualname__}", "init_args": dict(arguments)}


def require_valid(spec: Spec) -> float:
    """Refuse an unknown class, argument or value before a model is built. Returns the learning rate."""
    rate = build(spec, [nn.Parameter(torch.zeros(1, 1))]).defaults.get("lr")
    if not isinstance(rate, int | float) or not rate > 0:
        raise InputError(f"optimizer.lr is {rate}; it must be a number above 0")
    return float(rate)


def build(spec: Spec, parameters: Iterable[nn.Parameter]) -> Optimizer:
    """The optimizer over those of `parameters` that train; in one fused kernel where it has one."""
    chosen, arguments = _read(spec)
    trained = [p for p in parameters if p.requires_grad]
    known = inspect.signature(chosen).parameters
    for name in arguments:
        if name not in known and not any(p.kind is p.VAR_KEYWORD for p in known.values()):
            raise InputError(f"optimizer.{name} is not an argument of {chosen.__name__}{near_miss(name, known)}")
    if "fused" in known and not {"fused", "foreach", "capturable", "differentiable"} & set(arguments):
        arguments["fused"] = all(p.device.type in ("cpu", "cuda") for p in trained)
    try:
        return chosen(trained, **arguments)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"optimizer {chosen.__name__} cannot be made with {arguments}: {error}") from error


def _read(spec: Spec) -> tuple[type[Optimizer], dict[str, Any]]:
    if isinstance(spec, str):
        return _find(spec), {}
    path = spec.get("class_path", "AdamW")
    arguments = dict(spec.get("init_args") or {})
    if not isinstance(path, str):
        raise InputError(f"optimizer.class_path is {path!r}; it must be a name such as AdamW or torch.optim.AdamW")
    return _find(path), {name: tuple(v) if isinstance(v, list) else v for name, v in arguments.items()}


def _find(path: str) -> type[Optimizer]:
    module, _, name = path.rpartition(".")
    names = [n for n, c in vars(torch.optim).items() if _is_optimizer(c)]
    if module in ("", "torch.optim"):
        if name not in names:
            raise InputError(f"optimizer {path} is not in torch.optim{near_miss(name, names)}")
        return getattr(torch.optim, name)
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise InputError(f"optimizer {path} cannot be imported: {error}; is its package installed?") from error
    if not _is_optimizer(found):
        raise InputError(f"optimizer {path} is not a subclass of torch.optim.Optimizer")
    return found


def _is_optimizer(thing: Any) -> bool:
    return isinstance(thing, type) and issubclass(thing, Optimizer) and thing is not Optimizer
