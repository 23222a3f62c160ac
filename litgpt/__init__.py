"""LitGPT: pretrain, finetune and use large language models. Names are imported when they are first used."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from litgpt.api import LLM
    from litgpt.config import Config
    from litgpt.model import GPT
    from litgpt.prompts import PromptStyle
    from litgpt.tokenizer import Tokenizer

__version__ = "0.6.0.dev0"

_HOMES = {"LLM": "api", "GPT": "model", "Config": "config", "PromptStyle": "prompts", "Tokenizer": "tokenizer"}

__all__ = ["GPT", "LLM", "Config", "PromptStyle", "Tokenizer"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'litgpt' has no attribute {name!r}")
    return getattr(importlib.import_module(f"litgpt.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
