"""What a placement is asked for while a model is read. Knows no files."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from litgpt import estimate, weights
from litgpt.config import Config
from litgpt.model import GPT


class Placement(Protocol):
    """Which modules and tensors of a model this process holds, and where."""

    @property
    def cuts(self) -> bool:
        """Whether this process holds parts of tensors only: then they are best read after they are cut."""

    def outline(self, config: Config) -> GPT:
        """The model on the meta device: the modules that this process holds."""

    def place(self, model: Any, name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        """What of a whole tensor this process holds, on its device; parameters in `dtype`."""

    def settle(self, model: Any) -> None:
        """Bring what no file holds to its device, once the tensors are there."""


@dataclass(frozen=True)
class OneDevice:
    """The whole model on one device."""

    device: torch.device | str
    cuts = False

    def outline(self, config: Config) -> GPT:
        return weights.outline(config)

    def place(self, model: GPT, name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        return tensor.to(self.device)

    def settle(self, model: GPT) -> None:
        model.to(self.device)


def in_precision(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor in `dtype`, if it is a parameter: a router's correction bias keeps its precision."""
    return tensor.to(dtype) if name.endswith((".weight", ".bias")) else tensor


def free_memory(device: torch.device, sharers: int = 1) -> int:
    """Bytes that are free on a device, or each one's share where several lie in the memory of this host."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else estimate.available_memory() // sharers


def require_fit(need: int, have: int, what: str) -> None:
    """Refuse, before anything is read, what the memory of a device does not hold."""
    estimate.require_fit(need, have, what, "choose more devices, a smaller model, a lower precision, or --quantize")
