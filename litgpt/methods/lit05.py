"""The adapter files of LitGPT 0.5: `lit_model.pth.lora`, `.adapter` and `.adapter_v2`, put onto a model of ours.

There the A of all parts of `attn.qkv` were one tensor and their B another, routers were adapted as linears are, and an
adapter's prefix was read in its own way (`Adapter.as_in_05`). Knows names and tensors, no files.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from litgpt.errors import InputError, shown
from litgpt.methods import base, peft
from litgpt.methods.adapter import Adapter
from litgpt.methods.adapter_v2 import AdapterV2
from litgpt.methods.lora import LoRA, LoRALinear
from litgpt.model import GPT, Router

SUFFIXES = {"lora": ".lora", "adapter": ".adapter", "adapter_v2": ".adapter_v2"}
_SWITCHES = ("query", "key", "value", "projection", "mlp", "head")


def attach(
    model: GPT, kind: str, tensors: Mapping[str, Tensor], hyperparameters: Mapping[str, Any], where: object
) -> None:
    """Wrap the model as that version did. Raises InputError that names what does not fit."""
    named = {_later_name(name): tensor.float() for name, tensor in tensors.items()}
    if kind == "lora":
        _attach_lora(model, named, hyperparameters, where)
    else:
        _attach_adapter(model, named, AdapterV2 if kind == "adapter_v2" else Adapter, where)


def _later_name(name: str) -> str:
    """Its first releases called `attn.qkv` `attn.attn`."""
    name = name.replace(".attn.attn.", ".attn.qkv.")
    return name.replace(".attn.adapter_wte.weight", ".attn.prefix.embedding").replace(
        ".attn.gating_factor", ".attn.prefix.gate"
    )


def lora_of(hyperparameters: Mapping[str, Any], where: object) -> LoRA:
    """The method that `hyperparameters.yaml` describes."""
    r, alpha = hyperparameters.get("lora_r"), hyperparameters.get("lora_alpha")
    if not isinstance(r, int) or not isinstance(alpha, int | float):
        raise InputError(
            f"{where}: hyperparameters.yaml beside it must say lora_r, lora_alpha and what was adapted; it has lora_r "
            f"{shown(r)} and lora_alpha {shown(alpha)}"
        )
    chosen = {name: bool(hyperparameters.get(f"lora_{name}", False)) for name in _SWITCHES}
    return LoRA(r=r, alpha=alpha, dropout=0.0, **chosen)


def _attach_lora(model: GPT, tensors: dict[str, Tensor], hyperparameters: Mapping[str, Any], where: object) -> None:
    method = lora_of(hyperparameters, where)
    method.attach(model)
    for name, module in list(model.named_modules()):
        if isinstance(module, Router) and f"{name}.lora_A" in tensors:
            a, b = tensors.pop(f"{name}.lora_A"), tensors.pop(f"{name}.lora_B", torch.empty(0, 0))
            peft.fold(module, peft.Adapted(name, a, b, method.scale), where)
    state: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        if isinstance(module, LoRALinear) and f"{name}.lora_A" in tensors and f"{name}.lora_B" in tensors:
            a, b = tensors.pop(f"{name}.lora_A"), tensors.pop(f"{name}.lora_B")
            rows = [part.rows for part in module.parts]
            if a.size(0) != sum(part.r for part in module.parts) or b.size(0) != sum(rows):
                raise InputError(
                    f"{where}: {name} has matrices {tuple(a.shape)} and {tuple(b.shape)}, which are not those that "
                    "hyperparameters.yaml and the base model tell; is it the adapter of another model?"
                )
            for part, own_a, own_b in zip(module.parts, a.split(method.r), b.split(rows), strict=True):
                state |= {f"{name}.lora_A.{part.name}": own_a, f"{name}.lora_B.{part.name}": own_b}
    base.fill(model, state | tensors, where)


def _attach_adapter(model: GPT, tensors: dict[str, Tensor], kind: type[Adapter], where: object) -> None:
    prefixes = {int(m[1]): t for n, t in tensors.items() if (m := re.search(r"\.(\d+)\.attn\.prefix\.embedding$", n))}
    first = min(prefixes, default=model.config.n_layer)
    length = len(prefixes[first]) if prefixes else Adapter.prompt_length
    for name in tensors:
        if name.endswith(".attn.prefix.gate"):  # (1, 1, heads, 1), or (1, heads, 1, 1) in its first releases
            tensors[name] = tensors[name].flatten()
    for name, module in model.named_modules():
        if isinstance(module, Router) and f"{name}.adapter_scale" in tensors:
            _scale(module, tensors.pop(f"{name}.adapter_scale"), tensors.pop(f"{name}.adapter_bias", None), name, where)
    if model.config.latent_attention:
        raise InputError(f"{where}: LitGPT 0.5 had no adapters for latent attention; is it another model's?")
    kind(prompt_length=length, start_layer=first, as_in_05=True).attach(model)
    norms = [
        name for name, _ in model.named_parameters() if "norm" in name
    ]  # those around queries and keys did not train
    base.fill(model, tensors, where, optional=norms)


@torch.no_grad()
def _scale(router: Router, scale: Tensor, bias: Tensor | None, name: str, where: object) -> None:
    """scale * (W x + bias), as a weight and a bias."""
    weight = router.weight
    if bias is None or not len(scale) == len(bias) == len(weight):
        raise InputError(f"{where}: {name} has {len(weight)} experts, the adapter's others; is it another model's?")
    scale, bias = scale.to(weight.device), bias.to(weight.device)
    router.weight = nn.Parameter((weight.float() * scale.unsqueeze(1)).to(weight.dtype), requires_grad=False)
    router.bias = nn.Parameter((bias * scale).to(weight.dtype), requires_grad=False)
