"""Finetuning methods as tests use them, and what makes a fresh one differ from its base."""

from __future__ import annotations

import torch

from litgpt.config import Config
from litgpt.methods.adapter import Adapter
from litgpt.methods.adapter_v2 import AdapterV2
from litgpt.methods.base import Method
from litgpt.methods.full import Full
from litgpt.methods.lora import LoRA
from litgpt.model import GPT
from tests.makers.checkpoints import random_gpt

EVERYWHERE = dict.fromkeys(("query", "key", "value", "projection", "mlp", "head"), True)
METHODS: dict[str, Method] = {
    "full": Full(),
    "lora": LoRA(),
    "lora-everywhere": LoRA(r=4, rslora=True, **EVERYWHERE),
    "dora": LoRA(r=4, dora=True, key=True, query=False, mlp=True, head=True),
    "adapter": Adapter(start_layer=1),
    "adapter_v2": AdapterV2(prompt_length=3, start_layer=1),
}
IDS = torch.randint(0, 90, (2, 12), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def disturb(model: GPT, seed: int = 0, size: float = 0.05) -> GPT:
    """Moves everything that trains; then a LoRA's B and an adapter's gate are zero no more."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter += torch.randn(parameter.shape, generator=generator) * size
    return model


def finetuned(config: Config, method: Method, seed: int = 0) -> GPT:
    """`random_gpt(config)` after the method has done something to it."""
    model = random_gpt(config)
    method.attach(model, torch.Generator().manual_seed(seed))
    return disturb(model, seed).eval()


@torch.no_grad()
def logits(model: torch.nn.Module, ids: torch.Tensor = IDS) -> torch.Tensor:
    """Of our model, or of one of `transformers`."""
    out = model(ids)
    return out if isinstance(out, torch.Tensor) else out.logits
