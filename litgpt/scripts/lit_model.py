"""Writes `lit_model.pth`, PyTorch's format of a state dict, with one tensor in memory at a time.

`torch.save` wants them all at once. The file is a zip archive:

lit_model/data/0, data/1, ...   the bytes of each tensor, stored as they are
lit_model/data.pkl              names, shapes and dtypes; says which record each tensor lies in
lit_model/byteorder, version
"""

from __future__ import annotations

import io
import pickle
import struct
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._utils import _rebuild_tensor_v2  # the name by which every PyTorch since 0.4 reads a tensor

ROOT = "lit_model"
_ALIGNED = 64  # bytes, as PyTorch lays them: a mapped tensor must start at a multiple of its element
_STORAGES = {
    torch.float64: torch.DoubleStorage,
    torch.float32: torch.FloatStorage,
    torch.float16: torch.HalfStorage,
    torch.bfloat16: torch.BFloat16Storage,
}


@dataclass(frozen=True)
class _Record:
    """The bytes of a tensor, in the archive already."""

    key: str
    dtype: torch.dtype
    n_elements: int


@dataclass(frozen=True)
class _Written:
    """What is left of a tensor once its bytes are written."""

    record: _Record
    shape: tuple[int, ...]


class _Pickler(pickle.Pickler):
    def persistent_id(self, value: Any) -> Any:
        if isinstance(value, _Record):
            return "storage", _STORAGES[value.dtype], value.key, "cpu", value.n_elements
        return None

    def reducer_override(self, value: Any) -> Any:
        if isinstance(value, _Written):
            strides = tuple(prod(value.shape[dim + 1 :]) for dim in range(len(value.shape)))
            return _rebuild_tensor_v2, (value.record, 0, value.shape, strides, False, OrderedDict())
        return NotImplemented


def save(path: Path, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Writes floating point tensors by name, such that `torch.load(path)` gives a plain dict of them."""
    written: dict[str, _Written] = {}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, tensor in tensors:
            record = _Record(str(len(written)), tensor.dtype, tensor.numel())
            written[name] = _Written(record, tuple(tensor.shape))
            flat = tensor.detach().cpu().contiguous().view(-1)
            _add(archive, f"data/{record.key}", flat.view(torch.uint8).numpy())
        description = io.BytesIO()
        _Pickler(description, protocol=2).dump(written)
        _add(archive, "data.pkl", description.getvalue())
        _add(archive, "byteorder", sys.byteorder.encode())
        _add(archive, "version", b"3\n")


def _add(archive: zipfile.ZipFile, name: str, content: Any) -> None:
    """One record, stored, its first byte aligned by a field of padding in its header."""
    info = zipfile.ZipInfo(f"{ROOT}/{name}")
    assert archive.fp is not None
    # a header of 30 bytes, the name, 20 bytes of 64-bit sizes, and the 4 bytes that announce the padding
    start = archive.fp.tell() + 30 + len(info.filename) + 20 + 4
    padding = -start % _ALIGNED
    info.extra = struct.pack("<2sH", b"FB", padding) + b"Z" * padding
    with archive.open(info, "w", force_zip64=True) as record:
        record.write(content)
