"""Full finetuning: every weight trains."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from litgpt import estimate
from litgpt.config import Config
from litgpt.errors import InputError
from litgpt.methods.base import Method, linears
from litgpt.model import GPT


@dataclass(frozen=True)
class Full(Method):
    """Nothing is added. A quantized model cannot be trained this way."""

    name: ClassVar[str] = "full"
    is_whole: ClassVar[bool] = True

    def attach(self, model: GPT, generator: torch.Generator | None = None) -> None:
        quantized = [name for name, _, module in linears(model) if not isinstance(module, torch.nn.Linear)]
        if quantized:
            raise InputError(f"{quantized[0]} is quantized and cannot be trained; use finetune_lora, or no --quantize")
        model.requires_grad_(True)

    def trained(self, config: Config) -> int:
        return estimate.parameters(config).total
