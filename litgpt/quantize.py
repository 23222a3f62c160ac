"""Linears whose weights are kept in 4 or 8 bits: swapped in for plain ones, weight by weight, while a model is read.

A quantized linear answers as a linear with its `weight` would, the weight rounded to what the bits can say. The weight
itself never trains; gradients pass through to the input, so that LoRA can stand on it. The numbers are those of
bitsandbytes and torchao, which the tests hold them against; the kernels are whichever is fastest on the device.
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
import logging
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from types import ModuleType
from typing import Any, cast

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from typing_extensions import Self

from litgpt import byte_products
from litgpt.byte_products import Kernel, PackedBytes, Part
from litgpt.errors import InputError, extra_missing, near_miss
from litgpt.model import GPT
from litgpt.weights import EMBEDDING, HEAD

BLOCK, ABSMAX_BLOCK = 64, 256  # weights that share a factor; factors that share one in the "-dq" modes
GROUPS = (128, 64, 32)  # weights that share a factor in torchao.int4: the largest that divides a row
OUTLIER = 6.0  # activations from here on are not rounded in LLM.int8() on a GPU (Dettmers et al. 2022)
_AT_ONCE = 1 << 18  # elements whose codes are found together: what fits into the cache
TOGETHER = ("fc_1", "fc_2")  # of an MLP: what `model.both` asks for; gradients go through one by one
FOLDED = "kv_b_proj.weight"  # latent attention asks for this weight itself at each token: unpacking it would take long

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
        if self._needs_gradients(x):
            return cast(Tensor, _Differentiable.apply(x, self.bias, self))
        return self.product(x)

    def settle(self) -> None:
        """Lay out what is packed for the kernel of the device, where there is one: it will be used as it is now."""
        return

    def _needs_gradients(self, x: Tensor) -> bool:
        trains_bias = self.bias is not None and self.bias.requires_grad
        return torch.is_grad_enabled() and (x.requires_grad or trains_bias)

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
        bias_grad = grad.reshape(-1, grad.size(-1)).sum(0).to(linear.bias.dtype) if to_bias else None
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
            absmax, state = bitsandbytes().functional.quantize_blockwise(absmax - offset, blocksize=ABSMAX_BLOCK)
            self.register_buffer("offset", offset)
            self.register_buffer("nested_absmax", state.absmax)
            self.register_buffer("nested_code", state.code)
        self.register_buffer("codes", codes)
        self.register_buffer("absmax", absmax)

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        exact = dtype if dtype.itemsize <= 4 else torch.float32  # the package knows no doubles
        codes, shape = self.codes, torch.Size((self.out_features, self.in_features))
        in_blocks = codes.device.type == "cpu" and self.in_features % BLOCK != 0
        if in_blocks:  # its kernel for the CPU is wrong (0.50) where a block goes on in the next row: give it blocks
            codes = F.pad(codes, (0, 0, 0, len(self.absmax) * BLOCK // 2 - len(codes)))
            shape = torch.Size((len(self.absmax), BLOCK))
        weight = bitsandbytes().functional.dequantize_4bit(codes, self._state(exact, shape)).to(dtype)
        if in_blocks:
            weight = weight.view(-1)[: self.out_features * self.in_features].view(self.out_features, -1)
        return weight

    def product(self, x: Tensor) -> Tensor:
        if x.device.type != "cuda":
            return super().product(x)
        # a few rows are multiplied as the codes are read
        state = self._state(x.dtype, torch.Size((self.out_features, self.in_features)))
        return bitsandbytes().matmul_4bit(x, self.codes.t(), state, bias=self._bias(x))

    def _state(self, dtype: torch.dtype, shape: torch.Size) -> Any:
        functional = bitsandbytes().functional
        inner = None
        if self.nested:
            inner = functional.QuantState(
                self.nested_absmax, code=self.nested_code, blocksize=ABSMAX_BLOCK, dtype=torch.float32
            )
        return functional.QuantState(
            self.absmax,
            shape=shape,
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
    return bitsandbytes().functional.get_4bit_type(kind, device=device)


def _quantize_4bit(weight: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """Codes (n / 2, 1) uint8, the first of each pair in the upper half, and the largest magnitude of each block."""
    if weight.device.type != "cpu":
        codes, state = bitsandbytes().functional.quantize_4bit(weight, blocksize=BLOCK, quant_type=kind)
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
def bitsandbytes() -> ModuleType:
    """The package, without what it has to say while it is imported."""
    # it complains of a package of kernels that it does not need, and of each cast to fp16
    for noisy in ("bitsandbytes.backends.cpu.ops", "bitsandbytes.autograd._functions"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    try:
        return importlib.import_module("bitsandbytes")
    except ImportError:
        raise extra_missing("bitsandbytes", "quantize") from None


# ------------------------------------------------------------------------------------------------------ 8 and 4 bits


class PackedLinear(QuantizedLinear):
    """Whole numbers times factors; once it settles, laid out as the kernel of the device wants them.

    Before, and where there is none, they are as they are, in `codes`. Either can be worked out from the other.
    """

    codes: Tensor | None
    packed: Any  # None, or as the kernel wants it; no buffer: it can be neither copied nor saved

    def __init__(self, weight: Tensor, bias: nn.Parameter | None) -> None:
        super().__init__(weight, bias)
        self.packed = None
        self.register_buffer("codes", self.encode(weight))

    @abstractmethod
    def encode(self, weight: Tensor) -> Tensor:
        """The codes of a weight (out, in); registers the factors."""

    @abstractmethod
    def pack(self, codes: Tensor) -> Any:
        """The codes, and the factors, as a kernel wants them; None: there is none."""

    @abstractmethod
    def unpack(self, packed: Any) -> Tensor:
        """The codes again."""

    def plain(self) -> Tensor:
        if self.packed is not None:
            return self.unpack(self.packed)
        assert self.codes is not None
        return self.codes

    def settle(self) -> None:
        if self.codes is not None and self.codes.device.type == "cpu":
            self.packed = self.pack(self.codes)
            self.codes = self.codes if self.packed is None else None

    def _unsettle(self) -> None:
        self.codes, self.packed = self.plain(), None

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        moves = fn(self.compute).device != self.compute.device
        if moves:
            self._unsettle()
        super()._apply(fn, recurse)
        if moves:
            self.settle()
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}codes"] = self.plain()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        comes = any(f"{prefix}{name}" in state_dict for name in ("codes", "scale"))
        if comes:
            self._unsettle()
        super()._load_from_state_dict(state_dict, prefix, *args)  # type: ignore[no-untyped-call]
        if comes:
            self.settle()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "packed": None, "_buffers": {**self._buffers, "codes": self.plain()}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.settle()


class Linear8bit(PackedLinear):
    """A byte a weight, times a factor of its row.

    On a CPU that multiplies bytes the weight is never unpacked: `byte_products` says how.

    Args:
        levels: what a row's largest magnitude is divided by. torchao: 127.5, and -128 is used; bitsandbytes: 127.
        in_half: round to fp16 first, as bitsandbytes does.
    """

    scale: Tensor  # (out,) fp32

    def __init__(self, weight: Tensor, bias: nn.Parameter | None, *, levels: float, in_half: bool = False) -> None:
        self.levels, self.in_half = levels, in_half
        super().__init__(weight, bias)

    def encode(self, weight: Tensor) -> Tensor:
        codes = torch.empty_like(weight, dtype=torch.int8)
        scale = torch.empty(len(weight), dtype=torch.float32, device=weight.device)
        at_once = max(1, _AT_ONCE // self.in_features)
        for rows, into, factors in zip(*(t.split(at_once) for t in (weight, codes, scale)), strict=True):
            exact = (rows.half() if self.in_half else rows).float()
            factors.copy_(exact.abs().amax(dim=1) / self.levels).clamp_(min=torch.finfo(torch.float32).eps)
            # 127 / largest and 1 / (largest / 127) are not always the same number: each package has its own
            inverse = self.levels / exact.abs().amax(dim=1).clamp_(min=1e-30) if self.in_half else 1 / factors
            into.copy_((exact * inverse.unsqueeze(1)).round_().clamp_(-128, 127))
        self.register_buffer("scale", scale)
        return codes

    def pack(self, codes: Tensor) -> PackedBytes | None:
        kernel = self._kernel()
        return None if kernel is None else kernel(codes, self.scale)

    def unpack(self, packed: PackedBytes) -> Tensor:
        return packed.codes()

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        return (self.plain() * self.scale.unsqueeze(1)).to(dtype)

    def product(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, self.in_features)
        if self.packed is not None:
            y = self.packed.times(rows, self.bias)
        else:
            assert self.codes is not None
            y = self._times_codes(rows, self.codes)
            if self.bias is not None:
                y = y + self.bias.to(y.dtype)
        return y.to(x.dtype).view(*x.shape[:-1], self.out_features)

    def join(self, other: QuantizedLinear) -> None:
        """Settle, and another with it: packed as one, where both can be, for what asks `together`."""
        kernel = self._kernel()
        joins = kernel is not None and isinstance(other, Linear8bit) and self.bias is None and other.bias is None
        if not joins or self.codes is None or self.codes.device.type != "cpu":
            self.settle()
            other.settle()
            return
        assert kernel is not None
        assert isinstance(other, Linear8bit)
        whole = kernel(torch.cat((self.plain(), other.plain())), torch.cat((self.scale, other.scale)))
        self.packed = Part(whole, slice(0, self.out_features))
        other.packed = Part(whole, slice(self.out_features, whole.shape[0]))
        self.codes = other.codes = None

    def together(self, other: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
        """As `model.both` asks: both products with x; in one, where they are packed as one."""
        packed, others = self.packed, getattr(other, "packed", None)
        if not (isinstance(packed, Part) and isinstance(others, Part) and packed.whole is others.whole):
            return self(x), other(x)
        if self._needs_gradients(x) or torch.is_autocast_enabled(x.device.type):
            return self(x), other(x)
        y = packed.whole.times(x.reshape(-1, self.in_features)).view(*x.shape[:-1], packed.whole.shape[0])
        return y[..., packed.rows], y[..., others.rows]

    def _kernel(self) -> Kernel | None:
        return byte_products.kernel() if self.in_features <= byte_products.MOST_COLUMNS else None

    def _times_codes(self, rows: Tensor, codes: Tensor) -> Tensor:
        if rows.device.type == "cuda" and self.in_half:
            return self._llm_int8(rows, codes)
        return F.linear(rows, codes.to(rows.dtype)) * self.scale.to(rows.dtype)

    def _llm_int8(self, rows: Tensor, codes: Tensor) -> Tensor:
        """Bytes times bytes, but for columns with outliers (LLM.int8(), Dettmers et al. 2022)."""
        bnb = bitsandbytes()
        state = bnb.MatmulLtState()
        state.CB, state.SCB, state.has_fp16_weights, state.is_training = codes, self.scale * self.levels, False, False
        return bnb.matmul(rows, codes, state=state, threshold=OUTLIER)


class Linear4bitGroups(PackedLinear):
    """Two weights a byte, each one of 16 even steps between the smallest and the largest of its group in a row."""

    scale_and_zero: Tensor  # (groups of a row, out, 2): weight = (code - 8) scale + zero

    def __init__(self, weight: Tensor, bias: nn.Parameter | None, *, group: int) -> None:
        self.group = group
        super().__init__(weight, bias)

    def encode(self, weight: Tensor) -> Tensor:
        codes = torch.empty(len(weight), self.in_features // 2, dtype=torch.uint8, device=weight.device)
        parts = []
        at_once = max(1, _AT_ONCE // self.in_features)
        for rows, into in zip(weight.split(at_once), codes.split(at_once), strict=True):
            grouped = rows.float().unflatten(1, (-1, self.group))  # (rows, groups, group)
            low, high = grouped.amin(2, keepdim=True), grouped.amax(2, keepdim=True)
            scale = ((high - low) / 15).clamp_(min=1e-6).to(weight.dtype).float()
            zero = (low + 8 * scale).to(weight.dtype).float()
            steps = ((grouped - (zero - 8 * scale)) / scale).round_().clamp_(0, 15).flatten(1).to(torch.uint8)
            into.copy_((steps[:, ::2] << 4) | steps[:, 1::2])
            parts.append(torch.cat((scale, zero), dim=2).to(weight.dtype))
        self.register_buffer("scale_and_zero", torch.cat(parts).transpose(0, 1).contiguous())
        return codes

    def pack(self, codes: Tensor) -> Tensor | None:
        steps = _nibbles(codes).int()
        return torch.ops.aten._convert_weight_to_int4pack_for_cpu(steps, 1)

    def unpack(self, packed: Tensor) -> Tensor:
        """The kernel's own layout is not ours to know: unit rows times it are the codes, with factors of one."""
        factors = torch.zeros(self.in_features // self.group, self.out_features, 2)
        factors[..., 0] = 1
        columns = torch.eye(self.in_features).split(256)
        products = [torch.ops.aten._weight_int4pack_mm_for_cpu.default(c, packed, self.group, factors) for c in columns]
        steps = (torch.cat(products).t() + 8).round_().to(torch.uint8)
        return (steps[:, ::2] << 4) | steps[:, 1::2]

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        steps = _nibbles(self.plain()).unflatten(1, (-1, self.group))
        scale, zero = self.scale_and_zero.float().transpose(0, 1).split(1, dim=2)
        return ((steps.float() - 8) * scale + zero).flatten(1).to(dtype)

    def product(self, x: Tensor) -> Tensor:
        if self.packed is None:
            return super().product(x)
        rows, factors = x.reshape(-1, self.in_features), self.scale_and_zero.to(x.dtype)
        y = torch.ops.aten._weight_int4pack_mm_for_cpu.default(rows.contiguous(), self.packed, self.group, factors)
        if self.bias is not None:
            y = y + self.bias.to(y.dtype)
        return y.view(*x.shape[:-1], self.out_features)


def _nibbles(codes: Tensor) -> Tensor:
    """(out, in / 2) bytes -> (out, in) numbers from 0 to 15."""
    return torch.stack((codes >> 4, codes & 15), dim=2).flatten(1)


def _int4(weight: Tensor, bias: nn.Parameter | None) -> QuantizedLinear:
    """In groups where they divide a row and the kernels take the rows, else in 8 bits."""
    group = next((group for group in GROUPS if weight.size(1) % group == 0), None)
    if group is None or weight.size(0) % 16:
        return _int8(weight, bias)
    return Linear4bitGroups(weight, bias, group=group)


def _int8(weight: Tensor, bias: nn.Parameter | None) -> QuantizedLinear:
    return Linear8bit(weight, bias, levels=127.5)


# -------------------------------------------------------------------------------------------------------------- modes

Make = Callable[[Tensor, nn.Parameter | None], QuantizedLinear]


@dataclass(frozen=True)
class Mode:
    """A way to quantize a model."""

    make: Make
    package: str | None = None  # that has to be installed
    trains: bool = False  # adapters may be trained on it
    head: Make | None = None  # for the head; None: it stays as it is


_LLM_INT8 = partial(Linear8bit, levels=127.0, in_half=True)
MODES: Mapping[str, Mode] = {
    "bnb.nf4": Mode(partial(Linear4bit, kind="nf4", nested=False), "bitsandbytes", trains=True),
    "bnb.nf4-dq": Mode(partial(Linear4bit, kind="nf4", nested=True), "bitsandbytes", trains=True),
    "bnb.fp4": Mode(partial(Linear4bit, kind="fp4", nested=False), "bitsandbytes", trains=True),
    "bnb.fp4-dq": Mode(partial(Linear4bit, kind="fp4", nested=True), "bitsandbytes", trains=True),
    "bnb.int8": Mode(_LLM_INT8, "bitsandbytes"),
    "bnb.int8-training": Mode(_LLM_INT8, "bitsandbytes", trains=True),
    "torchao.int8": Mode(_int8, head=_int8),
    "torchao.int4": Mode(_int4, head=_int8),
}


def require_mode(mode: str, *, training: bool = False) -> None:
    """Refuse what is not a mode, one whose package is not installed, and for training one that is for inference."""
    if mode not in MODES:
        raise InputError(f"quantize '{mode}' is not known; it is one of {', '.join(MODES)}{near_miss(mode, MODES)}")
    if training and not MODES[mode].trains:
        able = [name for name in MODES if MODES[name].trains]
        hint = f"{mode}-training" if f"{mode}-training" in MODES else "bnb.nf4"
        raise InputError(
            f"quantize '{mode}' is for inference; for training it is one of {', '.join(able)}; did you mean '{hint}'?"
        )
    package = MODES[mode].package
    if package is not None and importlib.util.find_spec(package) is None:
        raise extra_missing(package, "quantize")


def note(mode: str, device: torch.device | str) -> str | None:
    """A line for whoever loads a model in this mode, where it is slower on the device than bf16; else None."""
    kind = torch.device(device).type
    if kind == "cpu":
        if mode.startswith(("bnb.nf4", "bnb.fp4")):
            faster = "torchao.int8 and torchao.int4 are faster than bf16"
            return f"note: {mode} saves memory, but answers take 3 times as long as in bf16 on this CPU; {faster}"
        if mode.endswith("int4") or byte_products.kernel() is byte_products.Fbgemm:
            return f"note: {mode} writes faster than bf16 on this CPU, but reads long prompts more slowly"
        if byte_products.kernel() is None:
            return f"note: {mode} saves memory, but is slower than bf16 on this CPU: it does not multiply bytes"
    elif mode.startswith(("torchao.", "bnb.int8")):
        return f"note: {mode} saves memory, but one answer at a time takes longer than in bf16 on this GPU"
    return None


class Quantizer:
    """Swaps linears of a model that is being read, as soon as the weight of each is there.

    The linears of the blocks: those of attention, MLPs and experts. Not the embedding, norms and routers, which are
    small or feel every bit. Not the head with bitsandbytes, as in `transformers`: an adapter made there stands on the
    same base here. With torchao's modes the head is in 8 bits, a copy where it is tied: much of a small model is there.
    """

    def __init__(self, model: GPT, mode: str) -> None:
        require_mode(mode)
        self.model, self.mode = model, MODES[mode]
        self.targets = {f"{name}.weight": (name, self.mode.make) for name, _ in linears(model)}
        if self.mode.head is not None:
            self.targets[EMBEDDING if model.config.tie_embeddings else HEAD] = ("lm_head", self.mode.head)
            for name in [name for name in self.targets if name.endswith(FOLDED)]:
                del self.targets[name]
        self.packing: deque[PackedBytes] = deque()  # as many at once as the processor computes

    def take(self, name: str, weight: Tensor) -> dict[str, Tensor]:
        """What of this tensor goes into the state dict; a weight that is to be quantized is, on its own device."""
        if name not in self.targets:
            return {name: weight}
        path, make = self.targets[name]
        bias = self.model.get_submodule(path).bias
        made = make(weight, cast("nn.Parameter | None", bias))
        self.model.set_submodule(path, made)
        self._settle(path, made)
        _trim()()  # freed weights leave holes that what is kept does not fill: in the end as much again
        return {name: weight} if name == EMBEDDING else {}

    def _settle(self, path: str, made: QuantizedLinear) -> None:
        stem, _, leaf = path.rpartition(".")
        if leaf in TOGETHER and isinstance(made, Linear8bit) and not self.mode.trains:
            first, second = (self.model.get_submodule(f"{stem}.{leaf}") for leaf in TOGETHER)
            if not (isinstance(first, Linear8bit) and isinstance(second, QuantizedLinear)):
                return  # with the other one, which is still to come
            first.join(second)
        else:
            made.settle()
        packed = getattr(made, "packed", None)
        if isinstance(packed, PackedBytes):
            self.packing.append(packed)
            if len(self.packing) > torch.get_num_threads():
                self.packing.popleft().wait()

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Give the model all tensors that were not quantized; `weights.import_` has seen that they are complete."""
        while self.packing:
            self.packing.popleft().wait()
        left = self.model.load_state_dict(state, strict=False, assign=True)
        own = {f"{path}." for path, _ in self.targets.values()}
        strays = [name for name in left.missing_keys if not any(name.startswith(path) for path in own)]
        assert not strays, strays
        assert not left.unexpected_keys, left.unexpected_keys


@lru_cache
def _trim() -> Callable[[], Any]:
    """Gives what is freed back to the system, where the C library can."""
    try:
        return partial(ctypes.CDLL(None).malloc_trim, 0)
    except (AttributeError, OSError, TypeError):
        return lambda: None


def linears(model: GPT) -> Iterator[tuple[str, nn.Linear]]:
    """Those of the blocks, with their names."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and module is not model.lm_head:
            yield name, module
