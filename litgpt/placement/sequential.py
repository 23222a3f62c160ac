"""Layers in line: each device holds some that follow each other, and what one gives is moved to the next.

    cuda:0   embedding, layers 0..9  ->  cuda:1   layers 10..20  ->  cuda:2   layers 21..31, last norm, head

One process drives all devices. At any time one of them computes, so processes would gain nothing here but work to keep
them together: this is for models that do not fit on one device. Tensor parallelism is the faster way where it can cut
the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from litgpt import estimate, weights
from litgpt.config import Config
from litgpt.errors import InputError
from litgpt.model import GPT, KVCache, Shared
from litgpt.placement.base import free_memory, require_fit


class SpreadGPT(GPT):
    """A GPT whose layers lie on several devices. Ids go in on the first; logits come out where the head is.

    Args:
        devices: of each layer.
    """

    def __init__(self, config: Config, devices: Sequence[torch.device]) -> None:
        super().__init__(config)
        self.devices = list(devices)
        for block, device in zip(self.blocks, self.devices, strict=True):
            block.register_forward_pre_hook(_moving_to(device))
        self.transformer["ln_f"].register_forward_pre_hook(_moving_to(self.devices[-1]))

    def home(self, name: str) -> torch.device:
        """The device of a tensor. A tied head is where the embedding is."""
        if name.startswith("transformer.h."):
            return self.devices[int(name.split(".")[2])]
        is_first = name.startswith("transformer.wte.") or (self.config.tie_embeddings and name.startswith("lm_head."))
        return self.devices[0 if is_first else -1]

    def logits(self, hidden: Tensor) -> Tensor:
        there = next(chain(self.lm_head.parameters(), self.lm_head.buffers()))
        return super().logits(hidden.to(there.device))

    def new_cache(self, batch_size: int, max_len: int | None = None, ahead: int = 0) -> KVCache:
        cache = KVCache(self.config, batch_size, max_len, ahead, dtype=self.wte.weight.dtype, device="meta")
        for layer, device in zip(cache.layers, self.devices, strict=True):
            layer.k, layer.v = (torch.zeros_like(t, device=device) for t in (layer.k, layer.v))
        return cache


def _moving_to(device: torch.device) -> Any:
    """A hook that brings a module's inputs to its device."""

    def move(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(_moved(each, device) for each in inputs)

    return move


def _moved(thing: Any, device: torch.device) -> Any:
    if isinstance(thing, Tensor):
        return thing.to(device)
    if isinstance(thing, Shared) and thing.positions.device != device:
        key = ("on", device)
        if key not in thing.masks:  # once for all layers there; masks are made there anew
            thing.masks[key] = _shared_on(thing, device)  # type: ignore[assignment]
        return thing.masks[key]
    return thing


def _shared_on(shared: Shared, device: torch.device) -> Shared:
    (cos, sin), (local_cos, local_sin) = shared.turns, shared.local_turns
    return replace(
        shared,
        positions=shared.positions.to(device),
        turns=(cos.to(device), sin.to(device)),
        local_turns=(local_cos.to(device), local_sin.to(device)),
        doc_ids=None if shared.doc_ids is None else shared.doc_ids.to(device),
        masks={},
    )


def spread(sizes: Sequence[int], first: int, last: int, room: Sequence[int]) -> list[int]:
    """Which device each layer goes to: neighbours together, and every device filled to the same share of its room.

    Args:
        sizes: bytes of each layer.
        first, last: bytes that the first and the last device hold besides.
        room: bytes that each device has.
    """
    total = first + sum(sizes) + last
    bounds = [total * sum(room[: i + 1]) / sum(room) for i in range(len(room))]
    places, filled = [], float(first)
    for size in sizes:
        middle = filled + size / 2
        places.append(next((i for i, bound in enumerate(bounds) if middle <= bound), len(room) - 1))
        filled += size
    return places


@dataclass(frozen=True)
class Sequential:
    """Layers over devices, in proportion to the memory that each has.

    Args:
        devices: in the order in which layers meet them. One may be named more than once.
        room: free bytes of each.
    """

    devices: tuple[torch.device, ...]
    room: tuple[int, ...]
    cuts = False

    @staticmethod
    def over(kind: str, n: int) -> Sequential:
        """Over `n` devices of a kind: GPUs, or for a trial as many names for the one CPU."""
        devices = tuple(torch.device(kind, i) if kind == "cuda" else torch.device(kind) for i in range(n))
        return Sequential(devices, tuple(free_memory(device, sharers=n) for device in devices))

    def require_fit(self, config: Config, dtype: torch.dtype, length: int, what: str) -> None:
        """Refuse what some device cannot hold of the model, and of an answer of `length` tokens."""
        model = self.outline(config)
        memory = estimate.inference_memory(config, dtype.itemsize, 1, length)
        need = dict.fromkeys(self.devices, memory.activations)
        for name, parameter in model.named_parameters():
            need[model.home(name)] += parameter.numel() * dtype.itemsize
        for device in model.devices:
            need[device] += memory.cache // config.n_layer
        for device in need:
            room = sum(r for d, r in zip(self.devices, self.room, strict=True) if d == device)
            require_fit(need[device], room, f"{what}: what is to be on {device}")

    def outline(self, config: Config) -> SpreadGPT:
        if len(self.devices) > config.n_layer:
            raise InputError(
                f"devices is {len(self.devices)}, but {config.name or 'the model'} has n_layer {config.n_layer}; give "
                f"at most {config.n_layer}"
            )
        plain = weights.outline(config)
        sizes = [sum(p.numel() for p in block.parameters()) for block in plain.blocks]
        head = 0 if config.tie_embeddings else plain.lm_head.weight.numel()
        places = spread(sizes, plain.wte.weight.numel(), head, self.room)
        return weights.outline(config, lambda config: SpreadGPT(config, [self.devices[place] for place in places]))

    def place(self, model: SpreadGPT, name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        return tensor.to(model.home(name))

    def settle(self, model: SpreadGPT) -> None:
        for rope in (model.rope, model.local_rope):
            if rope is not None:
                rope.to(model.wte.weight.device)
