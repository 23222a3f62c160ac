"""One decode step, compiled for fixed shapes: all rows of a cache at once, over all its slots.

Compiled once for each size of the cache, and for each number of tokens (more than one where some are proposed): so a
run in which the cache does not grow compiles once. Prompts, which come in all lengths, are read without.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor

from litgpt.errors import one_line
from litgpt.model import GPT, KVCache
from litgpt.quantize import Linear4bit

BACKEND = "inductor"


class CompiledStep:
    """The model's forward for few tokens a row. Where compiling fails it says so once, and goes on without."""

    def __init__(self, model: GPT) -> None:
        self.model = model
        self.graphs = model.wte.weight.is_cuda
        obstacle = self._obstacle()
        self.is_compiled = not obstacle
        if obstacle:
            _note(f"not compiled: {obstacle}")
            return
        mode = "reduce-overhead" if self.graphs else None  # with CUDA graphs
        self.step = torch.compile(self._logits, dynamic=False, mode=mode, backend=BACKEND)

    def _obstacle(self) -> str:
        if self.model.config.n_expert:
            return "which experts are needed is only known token by token"
        if self.graphs:
            return ""
        if any(isinstance(module, Linear4bit) for module in self.model.modules()):
            return "bitsandbytes' 4 bits cannot be compiled on a CPU: it would take longer"  # by a half
        return _lack_of_a_compiler() if BACKEND == "inductor" else ""

    def adopt(self, cache: KVCache) -> None:
        """Told of each new cache: its memory stays where it is, as CUDA graphs want it."""
        if self.is_compiled and self.graphs:
            for tensor in cache.tensors():
                torch._dynamo.mark_static_address(tensor)

    def __call__(self, idx: Tensor, positions: Tensor, cache: KVCache) -> Tensor:
        """Logits (B, T, V) after tokens (B, T) at positions (B, T) of all rows of the cache."""
        if self.is_compiled:
            try:
                return self.step(idx, positions, cache)
            except Exception as error:  # the compilers' errors have no class in common
                if not _is_of_the_compiler(error):
                    raise
                self.is_compiled = False
                words = one_line(error).partition(" Set TORCHDYNAMO_VERBOSE")[0]  # hints for who debugs torch
                _note(f"not compiled, as the compiler failed: {words[:200]}")
        return self._logits(idx, positions, cache)

    def _logits(self, idx: Tensor, positions: Tensor, cache: KVCache) -> Tensor:
        return self.model(idx, positions, cache=cache)


def _lack_of_a_compiler() -> str:
    """What torch lacks to build code for the CPU, in words: said before an answer begins, not in its middle."""
    try:
        from torch._inductor.cpp_builder import get_cpp_compiler

        get_cpp_compiler()
    except ImportError:  # torch's own business: it may look elsewhere in another version, and says so itself
        return ""
    except Exception as error:
        if not _is_of_the_compiler(error):
            return ""
        return "torch finds no C++ compiler; install g++, or name one in the environment variable CXX"
    return ""


def _is_of_the_compiler(error: Exception) -> bool:
    return any(kind.__module__.startswith(("torch._dynamo", "torch._inductor")) for kind in type(error).__mro__)


def _note(line: str) -> None:
    print(f"note: {line}", file=sys.stderr)
