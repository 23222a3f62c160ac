"""Rows of numbers times weights of whole bytes, on a CPU that multiplies bytes: as exact as in bf16, with half to read.

A number of a row is taken as two digits in base 256, each in -128..127, of the largest of its row: x = (high + low /
256) unit, with unit = max|x| / 127. Both digits are multiplied as whole numbers, and what comes out of each is whole
too: a row's result does not depend on the rows beside it.
"""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from functools import lru_cache
from threading import Thread
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from litgpt import opaque

MOST_COLUMNS = 65_000  # products of two bytes of a longer row may not sum up in 32 bits


class PackedBytes(ABC):
    """A weight (N, K), each row a factor times its codes, as a kernel wants it."""

    def __init__(self, shape: torch.Size) -> None:
        self.shape = shape
        self.number = opaque.register(self)

    @property
    def nbytes(self) -> int:
        return self.shape.numel()

    def wait(self) -> None:
        """Until the codes are packed, where a thread does that; whatever reads them waits by itself."""
        return

    @abstractmethod
    def codes(self) -> Tensor:
        """(N, K) int8: those it was made of."""

    @abstractmethod
    def product(self, x: Tensor) -> Tensor:
        """Digits (2M, K) fp32, whole but for rounding, times the weight: (2M, N) fp32."""

    def times(self, rows: Tensor, bias: Tensor | None = None) -> Tensor:
        """rows (M, K) times the weight, and the bias (N,) on top: (M, N) in the dtype of the rows."""
        if len(rows) > _AT_ONCE:
            return torch.cat([self.times(part, bias) for part in rows.split(_AT_ONCE)])
        # few and plain steps: around one row they take as long as a tenth of the product
        dtype, rows = rows.dtype, rows.float()
        unit = torch.add(_TINY, rows.abs().amax(1, True), alpha=1 / 127)
        numbers = rows / unit
        high = numbers.round()
        digits = torch.cat((high, numbers.sub_(high).mul_(256)))
        compiling = torch.compiler.is_compiling()
        y = opaque.ask(digits, self.number, self.shape[0]) if compiling else self.product(digits)
        y = torch.add(y[: len(rows)], y[len(rows) :], alpha=1 / 256)
        y = y.mul_(unit) if bias is None else torch.addcmul(bias.float(), y, unit)
        return y.to(dtype)


# a row of zeros has a unit, too
_TINY = torch.full((1, 1), torch.finfo(torch.float32).tiny, dtype=torch.float32, device="cpu")

_AT_ONCE = 256  # rows: more take memory for their digits that has to be fetched from the system each time


class Part(PackedBytes):
    """Some rows of a weight that is packed as one with others: what has the same input is multiplied at once.

    Alone it takes as long as the whole.
    """

    def __init__(self, whole: PackedBytes, rows: slice) -> None:
        super().__init__(torch.Size((rows.stop - rows.start, whole.shape[1])))
        self.whole, self.rows = whole, rows

    def wait(self) -> None:
        self.whole.wait()

    def codes(self) -> Tensor:
        return self.whole.codes()[self.rows].clone()

    def product(self, x: Tensor) -> Tensor:
        return self.whole.product(x)[:, self.rows]


class Fbgemm(PackedBytes):
    """The faster one for few rows: it reads weights at 22 to 27 GB/s where oneDNN's reads at 12 to 15.

    Packing takes longer than reading the weight from a disk: threads do it meanwhile, each for some of the rows, as
    the time for each row grows with their number.

    Args:
        codes: (N, K) int8, K at most `MOST_COLUMNS`.
        scale: (N,) fp32, the factors.
    """

    def __init__(self, codes: Tensor, scale: Tensor) -> None:
        super().__init__(codes.shape)
        self._packers = [_Packer(*rows) for rows in zip(*(t.split(_TOGETHER) for t in (codes, scale)), strict=True)]
        self._packed: list[Any] = []

    def wait(self) -> None:
        self._packed = [packer.result() for packer in self._packers]

    def codes(self) -> Tensor:
        self.wait()
        return torch.cat([torch.ops.quantized.linear_unpack(packed)[0].int_repr() for packed in self._packed])

    def product(self, x: Tensor) -> Tensor:
        if not self._packed:
            self.wait()
        times = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32.default
        parts = [times(x, 1.0, 128, packed) for packed in self._packed]
        return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


_TOGETHER = 1 << 14  # rows: those of an MLP, and a head in parts


class _Packer(Thread):
    def __init__(self, codes: Tensor, scale: Tensor) -> None:
        super().__init__()
        self.weight: tuple[Tensor, Tensor] | None = (codes, scale)
        self.packed: Any = None
        self.error: Exception | None = None
        self.start()

    def run(self) -> None:
        assert self.weight is not None
        codes, scale = self.weight
        try:
            zeros = torch.zeros(len(scale), dtype=torch.long, device="cpu")
            weight = torch._make_per_channel_quantized_tensor(codes.contiguous(), scale.double(), zeros, 0)
            self.packed = torch.ops.quantized.linear_prepack(weight)  # for the engine of this torch: fbgemm on x86
        except Exception as error:  # goes to whoever asks
            self.error = error
        self.weight = None

    def result(self) -> Any:
        self.join()
        if self.error is not None:
            raise self.error
        if self.packed is None:  # in a process that was forked off meanwhile
            raise RuntimeError("a weight was still being packed when this process began; load the model anew")
        return self.packed


class OneDnn(PackedBytes):
    """Where torch has no fbgemm, or no longer. Arguments as `Fbgemm`'s."""

    def __init__(self, codes: Tensor, scale: Tensor) -> None:
        super().__init__(codes.shape)
        self.packed = torch.ops.onednn.qlinear_prepack(codes, None)
        self.scale, self.zero = scale, torch.zeros_like(scale, dtype=torch.int32)

    def codes(self) -> Tensor:
        return self.packed.to_dense().t().contiguous()

    def product(self, x: Tensor) -> Tensor:
        raised = x.round().add_(128).clamp_(0, 255).to(torch.uint8)
        y: Tensor = torch.ops.onednn.qlinear_pointwise.default(
            raised, 1.0, 128, self.packed, self.scale, self.zero, None, 1.0, 0, torch.float32, "none", [], ""
        )
        return y


Kernel = type[Fbgemm] | type[OneDnn]


@lru_cache
def kernel() -> Kernel | None:
    """The fastest one that this CPU and this torch have, tried on numbers whose product is known."""
    try:
        adds_in_32_bits = torch.cpu._is_vnni_supported()
    except AttributeError:
        return None
    if not adds_in_32_bits:  # in 16 bits sums overflow
        return None
    kinds: tuple[Kernel, ...] = (Fbgemm, OneDnn)
    return next((kind for kind in kinds if _is_right(kind)), None)


def _is_right(kind: Kernel) -> bool:
    # what is the default around the first call says nothing about the CPU
    codes = torch.arange(-40, 40, dtype=torch.int8, device="cpu").view(16, 5)
    x = torch.tensor([[1.0, -2.0, 0.5, 0.25, 4.0]], dtype=torch.float32, device="cpu")
    try:
        with warnings.catch_warnings(), torch.autocast("cpu", enabled=False):
            warnings.simplefilter("ignore")  # said once: fbgemm's kind of tensor is to leave torch. Then it is oneDNN's
            packed = kind(codes, torch.ones(16, dtype=torch.float32, device="cpu"))
            packed.wait()
            right = torch.allclose(packed.times(x), F.linear(x, codes.float()), rtol=1e-3, atol=1e-2)
        return right and torch.equal(packed.codes(), codes)
    except (AttributeError, RuntimeError, NotImplementedError, TypeError):
        return False
