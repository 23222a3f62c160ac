"""LLaMA-Adapter (Zhang et al. 2023): layers attend to a few learned tokens as well, at first with no weight.

    y = attend(q, k, v) + gate * attend(q, prefix k, prefix v)          gate: one number per head, zero at first

The prefix takes the way of a token through the layer's own projections, stands at no position, and every token sees it:
windows, packed documents and caches do not concern it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from litgpt.config import Config
from litgpt.errors import InputError
from litgpt.methods import base
from litgpt.methods.base import Method
from litgpt.model import GPT, Shared, attend


@dataclass(frozen=True)
class Adapter(Method):
    """A prefix of so many tokens in every layer from `start_layer` on.

    `as_in_05`: keys and values of the prefix are taken out of the projection as LitGPT 0.5 did: group by group, though
    its rows lie all queries first, and without the norm that a model may have on its keys. For its files only.
    """

    prompt_length: int = 10
    start_layer: int = 2
    as_in_05: bool = False

    name: ClassVar[str] = "adapter"

    def check(self, config: Config) -> None:
        for name in ("prompt_length", "start_layer"):
            value, least = getattr(self, name), int(name == "prompt_length")
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise InputError(f"adapter_{name} is {value}, must be a whole number from {least} on")
        if not self.trained(config):
            raise InputError(
                f"adapter_start_layer is {self.start_layer}, but the model has {config.n_layer} layers, from 0 on: "
                f"nothing would train; it must be at most {config.n_layer - 1}"
            )

    def attach(self, model: GPT, generator: torch.Generator | None = None) -> None:
        self.check(model.config)
        base.freeze(model)
        self.add_prefixes(model, generator)

    def trained(self, config: Config) -> int:
        layers = max(config.n_layer - self.start_layer, 0)
        return layers * (self.prompt_length * config.n_embd + config.n_head)

    def add_prefixes(self, model: GPT, generator: torch.Generator | None) -> None:
        for block in model.blocks[self.start_layer :]:
            device = next(block.parameters()).device
            prefix = Prefix(self.prompt_length, model.config, as_in_05=self.as_in_05).to(device)
            if device.type != "meta":
                prefix.reset(generator)
            block.attn.prefix = prefix  # type: ignore[union-attr]


class Prefix(nn.Module):
    """The learned tokens of one layer, and how much each head heeds them."""

    def __init__(self, length: int, config: Config, *, as_in_05: bool = False) -> None:
        super().__init__()
        self.embedding = nn.Parameter(torch.empty(length, config.n_embd, dtype=torch.float32))
        self.gate = nn.Parameter(torch.zeros(config.n_head, dtype=torch.float32))
        self.as_in_05 = as_in_05

    @torch.no_grad()
    def reset(self, generator: torch.Generator | None = None) -> None:
        """Tokens as large as a norm leaves them, drawn where the generator is."""
        drawn = torch.empty(self.embedding.shape, device=generator.device if generator is not None else "cpu")
        self.embedding.copy_(drawn.normal_(generator=generator))
        self.gate.zero_()

    def forward(self, attention: Any, q: Tensor, shared: Shared) -> Tensor:
        """(B, n_head, T, size): what these queries gather from the prefix, weighed by the gate."""
        tokens = self.embedding.to(q.dtype).unsqueeze(0)  # (1, P, n_embd)
        k, v = _read_as_05_did(attention, tokens) if self.as_in_05 else attention.read(tokens, shared)
        k, v = (t.to(q.dtype).expand(q.size(0), -1, -1, -1) for t in (k, v))
        y = attend(q, k, v, scale=attention.scale, softcap=attention.softcap)
        return y * self.gate.to(y.dtype).view(1, -1, 1, 1)


def _read_as_05_did(attention: Any, tokens: Tensor) -> tuple[Tensor, Tensor]:
    groups = attention.n_groups
    rows = attention.qkv(tokens).unflatten(-1, (groups, attention.n_head // groups + 2, attention.head_size))
    *_, k, v = rows.unbind(dim=3)  # (1, P, groups, hs)
    return k.transpose(1, 2), v.transpose(1, 2)
