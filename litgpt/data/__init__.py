"""What a model is trained on: data modules by name, each imported when asked for (importing this loads no torch)."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from litgpt.errors import near_miss

if TYPE_CHECKING:
    from litgpt.data.base import Batch, DataModule, Loader, StatefulLoader
    from litgpt.data.text_files import TextFiles

_HOMES = {
    "Batch": "base",
    "DataModule": "base",
    "Loader": "base",
    "StatefulLoader": "base",
    "TextFiles": "text_files",
}

__all__ = ["Batch", "DataModule", "Loader", "StatefulLoader", "TextFiles"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"litgpt.data has no {name!r}{near_miss(name, _HOMES)}")
    return getattr(importlib.import_module(f"litgpt.data.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(_HOMES)
