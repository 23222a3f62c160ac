"""What a model is trained on: data modules by name, each imported when asked for (importing this loads no torch)."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from litgpt.errors import near_miss

if TYPE_CHECKING:
    from litgpt.data.alpaca import Alpaca, Alpaca2k, AlpacaGPT4
    from litgpt.data.base import Batch, DataModule, Loader, StatefulLoader
    from litgpt.data.deita import Deita
    from litgpt.data.flan import FLAN
    from litgpt.data.hub_dataset import HubDataset
    from litgpt.data.json_files import JSON
    from litgpt.data.lima import LIMA
    from litgpt.data.lit_data import LitData, MicroLlama, TinyLlama
    from litgpt.data.longform import LongForm
    from litgpt.data.records import Record
    from litgpt.data.sft import SFT
    from litgpt.data.text_files import TextFiles
    from litgpt.data.web_text import OpenWebText, TinyStories

_HOMES = {
    "Alpaca": "alpaca",
    "Alpaca2k": "alpaca",
    "AlpacaGPT4": "alpaca",
    "Batch": "base",
    "DataModule": "base",
    "Deita": "deita",
    "FLAN": "flan",
    "HubDataset": "hub_dataset",
    "JSON": "json_files",
    "LIMA": "lima",
    "LitData": "lit_data",
    "Loader": "base",
    "LongForm": "longform",
    "MicroLlama": "lit_data",
    "OpenWebText": "web_text",
    "Record": "records",
    "SFT": "sft",
    "StatefulLoader": "base",
    "TextFiles": "text_files",
    "TinyLlama": "lit_data",
    "TinyStories": "web_text",
}

__all__ = [
    "FLAN",
    "JSON",
    "LIMA",
    "SFT",
    "Alpaca",
    "Alpaca2k",
    "AlpacaGPT4",
    "Batch",
    "DataModule",
    "Deita",
    "HubDataset",
    "LitData",
    "Loader",
    "LongForm",
    "MicroLlama",
    "OpenWebText",
    "Record",
    "StatefulLoader",
    "TextFiles",
    "TinyLlama",
    "TinyStories",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"litgpt.data has no {name!r}{near_miss(name, _HOMES)}")
    return getattr(importlib.import_module(f"litgpt.data.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(_HOMES)
