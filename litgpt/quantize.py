"""Linears whose weights are kept in 4 or 8 bits: swapped in for plain ones, weight by weight, while a model is read.

A quantized linear answers as a linear with its `weight` would, the weight rounded to what the bits can say. The weight
itself never trains; gradients pass through to the input, so that LoRA can stand on it. The numbers are those of
bitsandbytes; the tests hold both against the packages themselves.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from types import ModuleType
from typing import Any, cast

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from typing_extensions import Self

from litgpt.errors import InputError, extra_missing, near_miss
from litgpt.model import GPT

BLOCK, ABSMAX_BLOCK = 64, 256  # weights that share a factor; factors that share one in the "-dq" modes
_AT_ONCE = 1 << 18  # elements whose codes are found together: what fits into the cache

# ------------------------------------------------------------------------------------------------------ any of them


class QuantizedLinear(nn.Module, ABC):
    """y = x W^T + b, with W (out, in) known only through the buffers of a subclass.

    Args:
        weight: what is quantized; its device and dtype are those of the module.
        bias: kept as it is, and frozen.
    """

    compute: Tensor  # of no elements: its dtype follows `.to()`, while what is packed keeps its own

    def __init__(self, weight: Tensor, bias: nn.Parameter | None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.bias = bias
        if bias is not None:
            bias.requires_grad_(False)
        self.register_buffer("compute", weight.new_empty(0), persistent=False)

    @property
    def weight(self) -> Tensor:
        """(out, in): W in the module's dtype, worked out anew each time."""
        return self.dequantize(self.compute.dtype)

    @abstractmethod
    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """(out, in): W in `dtype`."""

    def product(self, x: Tensor) -> Tensor:
        """x W^T + b in the dtype of x, without a way back."""
        return F.linear(x, self.dequantize(x.dtype), self._bias(x))

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        trains_bias = self.bias is not None and self.bias.requires_grad
        if torch.is_grad_enabled() and (x.requires_grad or trains_bias):
            return cast(Tensor, _Differentiable.apply(x, self.bias, self))
        return self.product(x)

    def _bias(self, x: Tensor) -> Tensor | None:
        return None if self.bias is None else self.bias.to(x.dtype)

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        packed = {id(buffer) for name, buffer in self._buffers.items() if name != "compute"}

        def moved(tensor: Tensor) -> Tensor:
            """What `fn` makes of it, but for another dtype of what is packed: factors in bf16 are other weights."""
            new = fn(tensor)
            return tensor.to(new.device) if id(tensor) in packed and new.dtype != tensor.dtype else new

        return super()._apply(moved, recurse)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


class _Differentiable(torch.autograd.Function):
    """The product, and the gradients of input and bias; W is worked out again for them rather than kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, linear: QuantizedLinear) -> Tensor:
        ctx.linear = linear
        return linear.product(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:  # type: ignore[override]
        linear, (to_x, to_bias, _) = ctx.linear, ctx.needs_input_grad
        x_grad = grad @ linear.dequantize(grad.dtype) if to_x else None
        bias_grad = grad.flatten(0, -2).sum(0).to(linear.bias.dtype) if to_bias else None
        return x_grad, bias_grad, None


# ------------------------------------------------------------------------------------------------- bitsandbytes, 4 bits


class Linear4bit(QuantizedLinear):
    """Two weights a byte, each one of 16 values times the largest of its 64 neighbours (QLoRA, Dettmers et al. 2023).

    `kind` names the values: "nf4", where normally distributed weights lie evenly, or "fp4", tiny floats. `nested`
    (double quantization): the factors themselves are kept in 8 bits, 0.4 bits per weight less.
    """

    codes: Tensor  # (out * in / 2, 1) uint8
    absmax: Tensor  # (blocks,) fp32; nested: uint8 codes of (absmax - offset)
    nested_absmax: Tensor  # (blocks / 256,) fp32
    nested_code: Tensor  # (256,) fp32, what the codes of the factors mean
    offset: Tensor  # () fp32, the factors' mean

    def __init__(self, weight: Tensor, bias: nn.Parameter | None, *, kind: str, nested: bool) -> None:
        super().__init__(weight, bias)
        self.kind, self.nested = kind, nested
        codes, absmax = _quantize_4bit(weight, kind)
        if nested:
            offset = absmax.mean()
            absmax, state = _bitsandbytes().functional.quantize_blockwise(absmax - offset, blocksize=ABSMAX_BLOCK)
            self.register_buffer("offset", offset)
            self.register_buffer("nested_absmax", state.absmax)
            self.register_buffer("nested_code", state.code)
        self.register_buffer("codes", codes)
        self.register_buffer("absmax", absmax)

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        return _bitsandbytes().functional.dequantize_4bit(self.codes, self._state(dtype))

    def product(self, x: Tensor) -> Tensor:
        if x.device.type != "cuda":
            return super().product(x)
        # a few rows are multiplied as the codes are read
        return _bitsandbytes().matmul_4bit(x, self.codes.t(), self._state(x.dtype), bias=self._bias(x))

    def _state(self, dtype: torch.dtype) -> Any:
        functional = _bitsandbytes().functional
        inner = None
        if self.nested:
            inner = functional.QuantState(
                self.nested_absmax, code=self.nested_code, blocksize=ABSMAX_BLOCK, dtype=torch.float32
            )
        return functional.QuantState(
            self.absmax,
            shape=torch.Size((self.out_features, self.in_features)),
            code=_values(self.kind, self.codes.device),
            blocksize=BLOCK,
            quant_type=self.kind,
            dtype=dtype,
            offset=self.offset if self.nested else None,
            state2=inner,
        )


@lru_cache
def _values(kind: str, device: torch.device) -> Tensor:
    """(16,) fp32: what each code means."""
    return _bitsandbytes().functional.get_4bit_type(kind, device=device)


def _quantize_4bit(weight: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """Codes (n / 2, 1) uint8, the first of each pair in the upper half, and the largest magnitude of each block."""
    if weight.device.type != "cpu":
        codes, state = _bitsandbytes().functional.quantize_4bit(weight, blocksize=BLOCK, quant_type=kind)
        return codes, state.absmax
    # the package's own way on the CPU takes 30 times as long, and much memory
    parts = [_quantize_part(part, kind) for part in weight.reshape(-1).split(_AT_ONCE)]
    codes, absmax = (torch.cat(each) for each in zip(*parts, strict=True))
    return codes.unsqueeze(1), absmax


def _quantize_part(flat: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    values = _values(kind, flat.device)
    order = values.argsort()
    bounds = ((values[order[:-1]] + values[order[1:]]) / 2).tolist()
    short = -flat.numel() % BLOCK
    blocks = F.pad(flat.float(), (0, short)).view(-1, BLOCK)
    absmax = blocks.abs().amax(dim=1)
    scale = 1 / absmax.clamp(min=1e-38)
    scaled = (blocks * scale.unsqueeze(1)).clamp_(-1, 1)
    if short:  # the package divides in a last, shorter block
        scaled[-1] = (blocks[-1] / absmax[-1].clamp(min=1e-38)).clamp_(-1, 1)
    ranks: list[int] = order.tolist()
    codes = torch.full(scaled.shape, ranks[0], dtype=torch.uint8)
    for bound, below, above in zip(bounds, ranks[:-1], ranks[1:], strict=True):
        codes.add_((scaled > bound).to(torch.uint8), alpha=(above - below) % 256)  # modulo 256, as bytes add
    codes = codes.view(-1)[: flat.numel() + flat.numel() % 2]
    return (codes[::2] << 4) | codes[1::2], absmax


@lru_cache
def _bitsandbytes() -> ModuleType:
    # it complains, once imported, of a package of kernels that it does not need
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    try:
        import bitsandbytes
    except ImportError:
        raise extra_missing("bitsandbytes", "quantize") from None
    return bitsandbytes


# -------------------------------------------------------------------------------------------------------------- modes


MODES: dict[str, Callable[[Tensor, nn.Parameter | None], QuantizedLinear]] = {
    "bnb.nf4": partial(Linear4bit, kind="nf4", nested=False),
    "bnb.nf4-dq": partial(Linear4bit, kind="nf4", nested=True),
    "bnb.fp4": partial(Linear4bit, kind="fp4", nested=False),
    "bnb.fp4-dq": partial(Linear4bit, kind="fp4", nested=True),
}


def require_mode(mode: str) -> None:
    """Refuse what is not a mode, and one whose package is not installed."""
    if mode not in MODES:
        raise InputError(f"quantize '{mode}' is not known; it is one of {', '.join(MODES)}{near_miss(mode, MODES)}")
    _bitsandbytes()


class Quantizer:
    """Swaps linears of a model that is being read, as soon as the weight of each is there.

    The linears of the blocks: those of attention, MLPs and experts. Not the embedding, norms and routers, which are
    small or feel every bit, and not the head, as in `transformers`: an adapter made there stands on the same base here.
    """

    def __init__(self, model: GPT, mode: str) -> None:
        require_mode(mode)
        self.model, self.mode = model, mode
        self.targets = {f"{name}.weight": name for name, _ in linears(model)}

    def takes(self, name: str) -> bool:
        """Whether this tensor of the state dict is to be quantized."""
        return name in self.targets

    def swap(self, name: str, weight: Tensor) -> dict[str, Tensor]:
        """Quantize it where it lies, put the new linear in its place, and return what is now in the state dict."""
        path = self.targets[name]
        bias = self.model.get_submodule(path).bias
        quantized = MODES[self.mode](weight, cast("nn.Parameter | None", bias))
        self.model.set_submodule(path, quantized)
        return {f"{path}.{key}": value for key, value in quantized.state_dict().items() if key != "bias"}


def linears(model: GPT) -> Iterator[tuple[str, nn.Linear]]:
    """Those that are quantized, with their names."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and module is not model.lm_head:
            yield name, module
