"""Any optimizer of torch, or of an installed package, from what a recipe says. Knows no model."""

from __future__ import annotations

import importlib
import inspect
import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.optim import Optimizer

from litgpt.errors import InputError, near_miss

# what optimizers raise at arguments that are not as they think
_REFUSALS = (TypeError, ValueError, RuntimeError, LookupError, AttributeError, AssertionError, ArithmeticError)

Spec = str | Mapping[str, Any]  # "AdamW", "torch.optim.AdamW" or {"class_path": ..., "init_args": {...}}


def describe(spec: Spec) -> dict[str, Any]:
    """The spec in full, with the class by its complete path: what a resumed run is compared with."""
    chosen, arguments = _read(spec)
    return {"class_path": f"{chosen.__module__}.{chosen.__qualname__}", "init_args": dict(arguments)}


class Tried(NamedTuple):
    """What one step with an optimizer showed."""

    rate: float  # the learning rate
    states: float  # what it keeps for a parameter, in numbers of the parameter's own size: AdamW 2, plain SGD none


def require_valid(spec: Spec, device: torch.device | str = "cpu") -> Tried:
    """Refuse, before a model is built, an unknown class, argument or value, and what cannot take a plain step."""
    parameter = nn.Parameter(torch.zeros(64, 64, device=device))  # smaller ones are not kept in 8 bits
    optimizer = build(spec, [parameter])
    rate = _required_rate(optimizer.defaults.get("lr"))
    parameter.grad = torch.ones_like(parameter)
    try:
        optimizer.step()
    except _REFUSALS as error:
        name = type(optimizer).__name__
        raise InputError(f"optimizer {name} cannot train this: {_said(error)}; AdamW can, with its defaults") from error
    tensors = [t for t in optimizer.state[parameter].values() if isinstance(t, torch.Tensor)]
    return Tried(rate, sum(t.nbytes for t in tensors if t.numel() >= parameter.numel()) / parameter.nbytes)


def build(spec: Spec, parameters: Iterable[nn.Parameter]) -> Optimizer:
    """The optimizer over those of `parameters` that train; in one fused kernel where it has one."""
    chosen, arguments = _read(spec)
    asked = dict(arguments)
    if "lr" in asked:
        _required_rate(asked["lr"])
    trained = [p for p in parameters if p.requires_grad]
    known = inspect.signature(chosen).parameters
    for name in arguments:
        if name not in known and not any(p.kind is p.VAR_KEYWORD for p in known.values()):
            raise InputError(f"optimizer.{name} is not an argument of {chosen.__name__}{near_miss(name, known)}")
    if "fused" in known and not {"fused", "foreach", "capturable", "differentiable"} & set(arguments):
        arguments["fused"] = all(p.device.type in ("cpu", "cuda") and _has_kernel(chosen, p) for p in trained)
    try:
        return chosen(trained, **arguments)
    except _REFUSALS as error:
        raise InputError(f"optimizer {chosen.__name__} cannot be made with {asked}: {_said(error)}") from error


def require_parts(spec: Spec, parameter: nn.Parameter) -> None:
    """Refuse an optimizer that cannot take a step on `parameter`, which is sharded over the ranks."""
    optimizer = build(spec, [parameter])
    parameter.grad = torch.ones_like(parameter)
    try:
        optimizer.step()
    except _REFUSALS as error:
        raise InputError(
            f"optimizer {type(optimizer).__name__} cannot train a model of which each device holds a part "
            f"({_said(error).partition('. ')[0]}); give --strategy ddp, or AdamW, which can"
        ) from error


def _has_kernel(chosen: type[Optimizer], parameter: nn.Parameter) -> bool:
    """Whether the fused kernel takes the parameter: of sharded ones torch knows only Adam's."""
    return issubclass(chosen, torch.optim.Adam) or not hasattr(parameter, "to_local")  # a DTensor has it


def _required_rate(rate: Any) -> float:
    if isinstance(rate, bool) or not isinstance(rate, int | float) or not 0 < rate < math.inf:
        raise InputError(f"optimizer.lr is {rate}; it must be a number above 0")
    return float(rate)


def _said(error: Exception) -> str:
    """The error in one line; a bare key says little without its kind."""
    words = " ".join(str(error).split())
    return f"{type(error).__name__} {words}" if isinstance(error, LookupError) or not words else words


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
    if module.partition(".")[0] == "bitsandbytes":
        from litgpt.quantize import bitsandbytes

        bitsandbytes()
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise InputError(f"optimizer {path} cannot be imported: {error}; is its package installed?") from error
    if not _is_optimizer(found):
        raise InputError(f"optimizer {path} is not a subclass of torch.optim.Optimizer")
    return found


def _is_optimizer(thing: Any) -> bool:
    return isinstance(thing, type) and issubclass(thing, Optimizer) and thing is not Optimizer
