"""Weights between disk and model: a family's equations read in both directions; tensor files read lazily, streamed out.

Knows names, shapes and bytes; not what else a checkpoint directory holds.
"""

from __future__ import annotations

import json
import mmap
import pickle
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property
from itertools import islice
from math import prod
from pathlib import Path
from typing import Any, Protocol, TypeVar, overload

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from litgpt import families
from litgpt.config import Config
from litgpt.errors import InputError
from litgpt.model import GPT, concat_to_grouped, grouped_to_concat, qkv_rows

Shapes = Mapping[str, torch.Size]
Fetch = Callable[[str], Tensor]
Model = TypeVar("Model", bound=GPT)

HEAD, EMBEDDING = "lm_head.weight", "transformer.wte.weight"
INDEX = "model.safetensors.index.json"
_READ_AT_ONCE = 1 << 19  # elements
_AGAIN = "copy or download it again"


# -------------------------------------------------------------------------------------------------------- equations


@dataclass(frozen=True)
class Binding:
    """One equation written out for one layer, expert and suffix: our tensors, end to end, are theirs, end to end."""

    ours: tuple[str, ...]
    theirs: tuple[str, ...]
    layout: str = ""


class _Undrawn(TorchFunctionMode):
    """Modules are built without drawing their weights (on the meta device that would still import a compiler)."""

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if getattr(func, "__module__", "") == "torch.nn.init":
            return args[0] if args else (kwargs or {})["tensor"]
        return func(*args, **(kwargs or {}))


@overload
def outline(config: Config) -> GPT: ...


@overload
def outline(config: Config, build: Callable[[Config], Model]) -> Model: ...


def outline(config: Config, build: Callable[[Config], GPT] = GPT) -> GPT:
    """The model on the meta device: every module, no weights. `build` makes it."""
    with torch.device("meta"), _Undrawn():
        return build(config)


def expected(config: Config) -> dict[str, torch.Size]:
    """Our tensors' names and shapes. A tied head is its embedding and not listed."""
    shapes = {name: tensor.shape for name, tensor in outline(config).state_dict().items()}
    if config.tie_embeddings:
        del shapes[HEAD]
    return shapes


def import_(
    config: Config, found: Shapes, fetch: Fetch, *, kind: str = "hf", where: str | Path = "the weights"
) -> Iterator[tuple[str, Tensor]]:
    """Our-named tensors, one equation at a time, out of files with the tensors `found`.

    Args:
        fetch: gives a tensor of `found`; what needs no fusing is passed on as it is, without a copy.
        kind: "hf", or "litgpt" for the names of LitGPT's own `lit_model.pth`.
        where: the file or directory that errors name.

    Raises:
        InputError: tensors are missing, too many or misshapen; at once, before anything is fetched.
    """
    shapes = expected(config)
    plan = bindings(config, shapes) if kind == "hf" else _litgpt_bindings(shapes, found)
    names = _spellings(config, found) if kind == "hf" else {name: name for name in found}
    head, embedding = _name_of(HEAD, config, kind), _name_of(EMBEDDING, config, kind)
    copied_head = names.pop(head, None) if config.tie_embeddings else None
    wanted = {their: shape for binding in plan for their, shape in _their_shapes(binding, shapes, config).items()}
    _require_same(wanted, {name: found[spelling] for name, spelling in names.items()}, where)
    if copied_head and not torch.equal(fetch(copied_head), fetch(names[embedding])):
        raise InputError(
            f"{where}: {head} differs from {embedding}, but the config ties them; set tie_word_embeddings to false"
        )
    return (
        pair
        for binding in plan
        for pair in _to_ours(binding, [fetch(names[t]) for t in binding.theirs], shapes, config)
    )


def export(config: Config, found: Shapes, fetch: Fetch) -> Iterator[tuple[str, Tensor]]:
    """Hugging Face names and tensors, one equation at a time; inverts `import_` byte for byte.

    A mix of switches that no family has keeps our own names.

    Args:
        found: names and shapes of our tensors; a tied head may be among them and is not written.
        fetch: gives a tensor of `found`.

    Raises:
        InputError: at once, when `found` is not the model of this config.
    """
    shapes = expected(config)
    plan = bindings(config, shapes) if config.family else _litgpt_bindings(shapes, shapes)
    own = {name: shape for name, shape in found.items() if name in shapes or name != HEAD}
    _require_same(shapes, own, "the model to be written")
    return (pair for binding in plan for pair in _to_theirs(binding, [fetch(o) for o in binding.ours], shapes, config))


def bindings(config: Config, shapes: Shapes) -> list[Binding]:
    """The equations of the config's family, written out for all tensors in `shapes`."""
    fields = config.to_dict() | {name: getattr(config, name) for name in ("qkv_bias", "proj_bias", "has_mlp_bias")}
    plan = []
    for equation in families.family(config.family).equations(fields):
        suffixes = ("",) if equation.exact else (".weight", ".bias")
        for place in _places(equation.ours[0], config):
            for suffix in suffixes:
                ours, theirs = (
                    tuple(stem.format(**place) + suffix for stem in stems) for stems in (equation.ours, equation.theirs)
                )
                if ours[0] in shapes:
                    plan.append(Binding(ours, theirs, equation.layout))
    bound = [name for binding in plan for name in binding.ours]
    if nameless := [name for name in shapes if name not in bound]:
        raise InputError(
            f"the config's family '{config.family}' has no tensors {_first(nameless)}; "
            "remove family from model_config.yaml, and it is found by the other fields"
        )
    assert sorted(bound) == sorted(shapes), f"equations of {config.family}: {set(bound) ^ set(shapes) or 'twice'}"
    return plan


def _places(stem: str, config: Config) -> Iterator[dict[str, int]]:
    layers = range(config.n_layer) if "{l}" in stem else [0]
    experts = range(config.n_expert) if "{e}" in stem else [0]
    return ({"l": layer, "e": expert} for layer in layers for expert in experts)


def _litgpt_bindings(shapes: Shapes, found: Shapes) -> list[Binding]:
    """Our names are theirs, but for the grouped `attn.attn` of old files."""
    legacy = {name: name.replace(".attn.qkv.", ".attn.attn.") for name in shapes}
    return [
        Binding((name,), (old,), "grouped_qkv") if old != name and old in found else Binding((name,), (name,))
        for name, old in legacy.items()
    ]


def _name_of(name: str, config: Config, kind: str) -> str:
    """What the files of `kind` call one of our whole, unfused tensors."""
    if kind == "litgpt":
        return name
    stem, _, suffix = name.rpartition(".")
    equations = families.family(config.family).equations(config.to_dict())
    return next(f"{e.theirs[0]}.{suffix}" for e in equations if e.ours == (stem,))


def _spellings(config: Config, found: Shapes) -> dict[str, str]:
    """The name in the equations -> as the files spell it, without the tensors that hold no weight of ours."""
    family = families.family(config.family)
    ignored = [pattern.replace("{n_layer}", str(config.n_layer)) for pattern in family.ignored]
    spellings = {}
    for name in found:
        standard = next((new + name[len(old) :] for old, new in family.prefixes if name.startswith(old)), name)
        if not any(fnmatchcase(n, pattern) for n in (name, standard) for pattern in ignored):
            spellings[standard] = name
    return spellings


def rows_of(binding: Binding, shapes: Shapes, config: Config) -> list[int]:
    """How many rows each of their tensors has."""
    rows = sum(shapes[name][0] for name in binding.ours)
    if binding.ours[0].rsplit(".", 1)[0].endswith("attn.qkv") and len(binding.theirs) == 3:
        return list(qkv_rows(config))
    return [rows // len(binding.theirs)] * len(binding.theirs)


def _their_shapes(binding: Binding, shapes: Shapes, config: Config) -> dict[str, torch.Size]:
    rest = shapes[binding.ours[0]][1:]
    rows = rows_of(binding, shapes, config)
    return {name: torch.Size((n, *rest)) for name, n in zip(binding.theirs, rows, strict=True)}


def _to_ours(binding: Binding, parts: list[Tensor], shapes: Shapes, config: Config) -> Iterator[tuple[str, Tensor]]:
    whole = parts[0] if len(parts) == 1 else torch.cat(parts)
    if binding.layout:
        whole = grouped_to_concat(whole, config)
    return zip(binding.ours, _cut(whole, [shapes[name][0] for name in binding.ours]), strict=True)


def _to_theirs(binding: Binding, parts: list[Tensor], shapes: Shapes, config: Config) -> Iterator[tuple[str, Tensor]]:
    whole = parts[0] if len(parts) == 1 else torch.cat(parts)
    if binding.layout:
        whole = concat_to_grouped(whole, config)
    return zip(binding.theirs, _cut(whole, rows_of(binding, shapes, config)), strict=True)


def _cut(whole: Tensor, rows: list[int]) -> tuple[Tensor, ...]:
    return (whole,) if len(rows) == 1 else whole.split(rows)


def _require_same(wanted: Shapes, found: Shapes, where: str | Path) -> None:
    """Refuses, in one line, tensors other than those that the config asks for."""
    missing = [name for name in wanted if name not in found]
    surplus = [name for name in found if name not in wanted]
    misshapen = [
        f"{name} {tuple(found[name])} instead of {tuple(shape)}"
        for name, shape in wanted.items()
        if name in found and found[name] != shape
    ]
    lists = {"missing": missing, "not of this model": surplus, "of another shape": misshapen}
    faults = [f"{len(names)} {fault}: {_first(names)}" for fault, names in lists.items() if names]
    if faults:
        raise InputError(f"{where}: the tensors are not those of the config; {'; '.join(faults)}; {_AGAIN}")


def _first(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


# ----------------------------------------------------------------------------------------------------- tensor files


@dataclass(frozen=True)
class Entry:
    """A tensor in a file: what it is, and for safetensors the bytes from `start` to `stop`."""

    dtype: torch.dtype
    shape: torch.Size
    start: int = 0
    stop: int = 0

    @property
    def nbytes(self) -> int:
        return self.dtype.itemsize * prod(self.shape)


class TensorFile(Protocol):
    """Tensors by name, none of them read before it is asked for."""

    path: Path
    entries: dict[str, Entry]

    def fetch(self, name: str) -> Tensor:
        """The tensor on the mapped file: no memory of its own. Writing to it does not reach the file."""

    def read(self, name: str, dtype: torch.dtype) -> Tensor:
        """The tensor in memory of its own."""


class SafetensorsFile:
    """A `.safetensors` file: 8 bytes of length, a JSON header of names, dtypes, shapes and offsets, then the data.

    Not `safetensors.safe_open`, which maps whatever it reads: a load that converts would count every byte twice.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.entries = _read_header(path)

    @cached_property
    def _mapped(self) -> mmap.mmap:
        with open(self.path, "rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)

    @cached_property
    def _scratch(self) -> Tensor:
        return torch.empty(8 * _READ_AT_ONCE, dtype=torch.uint8)

    def fetch(self, name: str) -> Tensor:
        entry = self.entries[name]
        if entry.nbytes == 0 or entry.start % entry.dtype.itemsize:
            return self.read(name, entry.dtype)
        flat = torch.frombuffer(self._mapped, dtype=entry.dtype, offset=entry.start, count=prod(entry.shape))
        return flat.view(entry.shape)

    def read(self, name: str, dtype: torch.dtype) -> Tensor:
        entry = self.entries[name]
        out = torch.empty(entry.shape, dtype=dtype)
        with open(self.path, "rb") as file:
            file.seek(entry.start)
            for part in out.view(-1).split(_READ_AT_ONCE):
                raw = part if dtype == entry.dtype else self._scratch[: part.numel() * entry.dtype.itemsize]
                if file.readinto(_bytes_of(raw)) != raw.nbytes:
                    raise InputError(f"{self.path} became shorter while it was read; {_AGAIN}")
                part.copy_(raw.view(entry.dtype))  # of a part onto itself: nothing
        return out


class PickleFile:
    """A `.pth`, `.bin` or `.ckpt` file of tensors by name, perhaps under a key. Runs no code from the file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._tensors = _load_pickle(path)
        self.entries = {name: Entry(tensor.dtype, tensor.shape) for name, tensor in self._tensors.items()}

    def fetch(self, name: str) -> Tensor:
        return self._tensors[name]

    def read(self, name: str, dtype: torch.dtype) -> Tensor:
        return self._tensors[name].to(dtype, copy=True, memory_format=torch.contiguous_format)


def open_file(path: Path) -> TensorFile:
    return SafetensorsFile(path) if path.suffix == ".safetensors" else PickleFile(path)


_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_CODES = {dtype: code for code, dtype in _DTYPES.items()}


def _read_header(path: Path) -> dict[str, Entry]:
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        begin = 8 + length
        if size < 8 or begin > size:
            raise InputError(f"{path} is damaged: expected at least {max(begin, 8):,} bytes, found {size:,}; {_AGAIN}")
        raw = file.read(length)
    try:
        header = {name: fact for name, fact in json.loads(raw).items() if name != "__metadata__"}
        entries = {name: _entry(fact, begin) for name, fact in header.items()}
    except KeyError as error:
        raise InputError(f"{path}: tensors of dtype {error} are not supported; use an unquantized checkpoint") from None
    except (ValueError, TypeError, AttributeError, RecursionError):
        raise InputError(f"{path} is damaged: its header is not that of a safetensors file; {_AGAIN}") from None
    stop = max((entry.stop for entry in entries.values()), default=begin)
    if stop != size:
        raise InputError(f"{path} is damaged: expected {stop:,} bytes, found {size:,}; {_AGAIN}")
    return entries


def _entry(fact: Mapping[str, Any], begin: int) -> Entry:
    start, stop = fact.get("data_offsets", (None, None))
    entry = Entry(_DTYPES[fact.get("dtype", "")], torch.Size(fact.get("shape", ())), begin + start, begin + stop)
    if min(start, *entry.shape, 0) < 0 or entry.stop - entry.start != entry.nbytes:
        raise ValueError
    return entry


def _load_pickle(path: Path) -> dict[str, Tensor]:
    try:
        # what torch wrote before 1.6 is no zip archive and cannot be mapped
        loaded = torch.load(path, map_location="cpu", mmap=zipfile.is_zipfile(path), weights_only=True)
    except pickle.UnpicklingError as error:
        if "GLOBAL" not in str(error):
            raise _not_loaded(path) from None
        raise InputError(
            f"{path} holds more than tensors, and LitGPT does not run code from files; get the weights as safetensors"
        ) from None
    except Exception as error:  # a damaged archive shows in many ways
        raise _not_loaded(path) from error
    tensors = loaded.get("model", loaded.get("state_dict", loaded)) if isinstance(loaded, dict) else None
    if not isinstance(tensors, dict) or not all(isinstance(t, Tensor) for t in tensors.values()):
        raise InputError(f"{path} is not a mapping of names to tensors; give the file of a whole model")
    return {str(name): tensor for name, tensor in tensors.items()}


def _not_loaded(path: Path) -> InputError:
    return InputError(f"{path} is damaged: its {path.stat().st_size:,} bytes are not a whole PyTorch file; {_AGAIN}")


def _bytes_of(tensor: Tensor) -> Any:
    """The memory of a contiguous tensor on the CPU, as a buffer of bytes."""
    return tensor.view(-1).view(torch.uint8).numpy()


# ---------------------------------------------------------------------------------------------------------- writing


def save(
    directory: Path, entries: Mapping[str, Entry], tensors: Iterable[tuple[str, Tensor]], max_shard_bytes: int
) -> None:
    """Writes `tensors`, which come in the order of `entries`, as Hugging Face does: one safetensors file, or shards and
    an index. One tensor is in memory at a time.
    """
    shards, stream = _shards(entries, max_shard_bytes), iter(tensors)
    where = {}
    for number, shard in enumerate(shards, 1):
        one = len(shards) == 1
        name = "model.safetensors" if one else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file(directory / name, shard, islice(stream, len(shard)))
        where.update(dict.fromkeys(shard, name))
    if len(shards) > 1:
        total = sum(entry.nbytes for entry in entries.values())
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))}
        (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def save_file(path: Path, entries: Mapping[str, Entry], tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Writes one safetensors file, tensor by tensor."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, entry in sorted(
        entries.items(), key=lambda item: -item[1].dtype.itemsize
    ):  # wide ones first: all aligned
        span = [offset, offset + entry.nbytes]
        header[name] = {"dtype": _CODES[entry.dtype], "shape": list(entry.shape), "data_offsets": span}
        offset = span[1]
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    with open(path, "wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        for name, tensor in tensors:
            assert (tensor.dtype, tensor.shape) == (entries[name].dtype, entries[name].shape), name
            file.seek(8 + len(raw) + header[name]["data_offsets"][0])
            file.write(_bytes_of(tensor.detach().cpu().contiguous()))


def _shards(entries: Mapping[str, Entry], max_bytes: int) -> list[dict[str, Entry]]:
    """Cuts the entries, in their order, into runs of at most `max_bytes`; a tensor is never cut."""
    shards: list[dict[str, Entry]] = [{}]
    room = max_bytes
    for name, entry in entries.items():
        if shards[-1] and entry.nbytes > room:
            shards.append({})
            room = max_bytes
        shards[-1][name] = entry
        room -= entry.nbytes
    return shards
