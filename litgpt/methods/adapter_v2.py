"""LLaMA-Adapter v2 (Gao et al. 2023): every linear learns a bias and a scale, norms train, and the prefix stays.

y = scale * (W x + b + bias)          scale one, bias zero at first
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, cast

import torch
from torch import Tensor, nn

from litgpt import estimate
from litgpt.config import Config
from litgpt.methods import base
from litgpt.methods.adapter import Adapter
from litgpt.methods.base import Wrapped
from litgpt.model import GPT, RMSNorm


@dataclass(frozen=True)
class AdapterV2(Adapter):
    """The prefix as in `Adapter`. Norms are trained in fp32, in which alone small steps away from one are not lost."""

    name: ClassVar[str] = "adapter_v2"

    def attach(self, model: GPT, generator: torch.Generator | None = None) -> None:
        self.check(model.config)
        base.freeze(model)
        for name, _, linear in base.linears(model):
            base.replace(model, name, ScaledLinear(linear))
        for module in model.modules():
            if isinstance(module, (RMSNorm, nn.LayerNorm)):
                module.float().requires_grad_(True)
        self.add_prefixes(model, generator)

    def trained(self, config: Config) -> int:
        sizes = list(base.linear_sizes(config))
        weights = sum(size.copies * size.n_out * (size.n_in + size.bias) for size in sizes)
        count = estimate.parameters(config)
        tied = count.embedding if config.tie_embeddings else 0
        routers = sum(config.is_moe_layer(layer) for layer in range(config.n_layer)) * config.n_expert * config.n_embd
        norms = count.total - count.embedding - routers - (weights - tied)  # whatever is nothing else
        return super().trained(config) + norms + sum(2 * size.copies * size.n_out for size in sizes)


class ScaledLinear(Wrapped):
    """A linear with a learned bias and scale per output."""

    def __init__(self, linear: nn.Module) -> None:
        super().__init__(linear)
        self.adapter_bias = nn.Parameter(torch.zeros(self.out_features, dtype=torch.float32, device=self.device))
        self.adapter_scale = nn.Parameter(torch.ones(self.out_features, dtype=torch.float32, device=self.device))

    def around(self, x: Tensor, y: Tensor) -> Tensor:
        return (y + self.adapter_bias.to(y.dtype)) * self.adapter_scale.to(y.dtype)

    @property
    def weight(self) -> Tensor:
        weight = cast(Tensor, self.base.weight)
        return weight * self.adapter_scale.to(weight.dtype).unsqueeze(1)

    @property
    def bias(self) -> Tensor:
        own = cast("Tensor | None", self.base.bias)
        bias = self.adapter_bias if own is None else self.adapter_bias + own
        return (bias * self.adapter_scale).to(next(self.base.parameters(), self.adapter_bias).dtype)
