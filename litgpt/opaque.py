"""Products that `torch.compile` cannot look into: a compiled graph asks for them by number.

A graph holds tensors and numbers only. What a CPU's kernels pack is neither, or inductor would take it for its own.
"""

from __future__ import annotations

from itertools import count
from typing import Protocol
from weakref import WeakValueDictionary

import torch
from torch import Tensor


class Product(Protocol):
    """Something that lives as long as the graphs that ask for it."""

    def product(self, x: Tensor) -> Tensor:
        """(..., K) -> (..., N) in the dtype of x."""
        ...


_NUMBERS = count()
_LIVING: WeakValueDictionary[int, Product] = WeakValueDictionary()


def register(product: Product) -> int:
    """The number to ask for it by."""
    number = next(_NUMBERS)
    _LIVING[number] = product
    return number


def ask(x: Tensor, number: int, columns: int) -> Tensor:
    """What the registered one's `product` makes of x (..., K): (..., columns)."""
    y: Tensor = torch.ops.litgpt.product(x, number, columns)
    return y


def _asked(x: Tensor, number: int, columns: int) -> Tensor:
    return _LIVING[number].product(x).contiguous()  # as the graph was told


def _told(x: Tensor, number: int, columns: int) -> Tensor:
    return x.new_empty(*x.shape[:-1], columns)


_LIBRARY = torch.library.Library("litgpt", "FRAGMENT")
_LIBRARY.define("product(Tensor x, int number, int columns) -> Tensor")
_LIBRARY.impl("product", _asked, "CPU")
_LIBRARY.impl("product", _told, "Meta")
