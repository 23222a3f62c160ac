"""Where and how the weights of an `LLM` are held, and how they come there: read, drawn or moved.

As with `api`, importing it costs what torch costs; the rest is imported when it is first needed.
"""

from __future__ import annotations

import sys
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from litgpt.errors import InputError, require_choice, require_type, shown

if TYPE_CHECKING:
    from litgpt.config import Config
    from litgpt.generate.session import Source
    from litgpt.model import GPT
    from litgpt.placement.sequential import Sequential
    from litgpt.placement.tensor_parallel import TensorParallel

STRATEGIES = ("sequential", "tensor_parallel")
SMALLER = "choose a smaller model, a lower precision, or quantize"
TYPICAL = 256  # tokens of prompt and answer that must fit beside the weights


@dataclass(frozen=True)
class Place:
    """Where and how the weights of an `LLM` are held."""

    device: torch.device
    dtype: torch.dtype | None = None  # None: that of the files
    quantize: str | None = None
    max_len: int | None = None  # of prompt and answer together; None: the model's context
    compile: bool = False
    prepack: bool = False  # linears laid out for the CPU's products
    strategy: str | None = None  # how several devices share the model; None: it is on one
    devices: int = 1

    @property
    def is_cut(self) -> bool:
        """Whether this process has a part of each tensor only."""
        return self.strategy == "tensor_parallel"

    def read(self, directory: Path, helpers: ExitStack) -> GPT:
        """The model of a directory; `helpers` takes the processes of other devices, where it needs some."""
        from litgpt import estimate
        from litgpt.generate.session import Source
        from litgpt.launch import memory_errors
        from litgpt.placement.base import free_memory
        from litgpt.quantize import note

        source = Source.find(directory)
        config, dtype = source.checkpoint.config, self.dtype or source.checkpoint.dtype
        if self.quantize is not None and (line := note(self.quantize, self.device)) is not None:
            print(line, file=sys.stderr)
        placement = self._spread(source, dtype, helpers)
        length = min(config.block_size, TYPICAL)
        if self.quantize is None and placement is not None:
            placement.require_fit(config, dtype, length, str(directory))
        elif self.quantize is None:
            need = estimate.inference_memory(config, dtype.itemsize, 1, length).total
            estimate.require_fit(need, free_memory(self.device), str(directory), SMALLER)
        with memory_errors(SMALLER):
            model = source.model(self.device, dtype, self.quantize, placement)
        # an adapter comes frozen, here all trains; of quantized weights nothing can
        return model.requires_grad_() if self.quantize is None and not self.is_cut else model

    def _spread(self, source: Source, dtype: torch.dtype, helpers: ExitStack) -> Sequential | TensorParallel | None:
        """How the model comes to several devices; with their processes started, where they need some."""
        if self.strategy is None:
            return None
        from litgpt import launch
        from litgpt.generate import tp
        from litgpt.placement.sequential import Sequential
        from litgpt.placement.tensor_parallel import TensorParallel

        if not self.is_cut:
            return Sequential.over(self.device.type, self.devices)
        if torch.distributed.is_initialized():
            raise InputError(
                "another model of this process is tensor_parallel; distribute that one to one device first"
            )
        precision = {torch.float32: "32-true", torch.float16: "16-true", torch.bfloat16: "bf16-true"}[dtype]
        on = launch.Machine(self.device.type, self.devices)
        job = (source.directory.resolve(), precision, self.quantize)
        ranks = helpers.enter_context(launch.helpers(on, tp.follow, job))
        placement = TensorParallel.here(ranks.device)
        helpers.push(lambda kind, *_: placement.release() if kind is None else None)
        return placement

    def draw(self, config: Config) -> GPT:
        """A model with fresh weights, from torch's own generator."""
        from litgpt import estimate, weights
        from litgpt.placement.base import free_memory

        dtype = self.dtype or torch.float32
        need = estimate.parameters(config).total * dtype.itemsize
        estimate.require_fit(need, free_memory(self.device), config.name or "the model", SMALLER)
        model = weights.outline(config)
        for parameter in model.parameters():
            parameter.data = parameter.data.to(dtype)
        model.to_empty(device=self.device)
        model.init_weights()
        return model

    def take(self, model: GPT) -> None:
        """Move a model that is on one device, with the weights that it has."""
        if self.quantize is None and self.dtype is not None:
            for parameter in model.parameters():  # not `.to(dtype)`: buffers keep their precision
                parameter.data = parameter.data.to(self.dtype)
            model.tie_weights()
        model.to(self.device)

    def finish(self, model: GPT) -> None:
        """What is done to a model in eval mode, once it is here."""
        if self.prepack:
            from litgpt.prepack import prepack_as_asked

            is_spread = self.strategy is not None
            prepack_as_asked(model, True, quantize=self.quantize, is_spread=is_spread)


def dtype_named(precision: str | None) -> torch.dtype | None:
    from litgpt.generate.session import dtype_of

    if precision is None:
        return None
    require_type(precision, str, "precision", "text such as 'bf16-true', or None")
    return dtype_of(precision)


def mode_named(quantize: str | None) -> str | None:
    """`quantize`, which is known to be a mode then, or None: asked before a model is let go for another."""
    if quantize is None:
        return None
    from litgpt.quantize import require_mode

    require_type(quantize, str, "quantize", "text such as 'bnb.nf4', or None")
    require_mode(quantize)
    return quantize


def require_strategy(devices: int | str, strategy: str | None) -> None:
    """Several devices and their strategies: refused with a reason, never ignored."""
    require_choice("generate_strategy", strategy, (None, *STRATEGIES))
    if strategy is None and devices not in ("auto", 1):
        names = " or ".join(STRATEGIES)
        raise InputError(f"devices is {shown(devices)}; several devices need a generate_strategy, {names}")


def number_of(device: torch.device, devices: int | str) -> int:
    """How many devices of this kind were asked for."""
    from litgpt.launch import machine

    if device.type == machine(1).accelerator:
        return machine(devices).devices
    return 1 if devices == "auto" else int(devices)
