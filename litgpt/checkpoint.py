"""What a checkpoint directory is: found, checked, read lazily, written whole, resumed from.

Knows files and tensors, not how a model is trained or used. `storage.py` sees that what is written is whole.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import yaml
from torch import Tensor

from litgpt import prompts, weights
from litgpt.config import Config, result_below
from litgpt.errors import InputError, MissingError, UserError, near_miss, shown
from litgpt.model import GPT
from litgpt.placement.base import OneDevice, Placement
from litgpt.prompts import PromptStyle
from litgpt.quantize import Quantizer
from litgpt.storage import (
    FORMAT_VERSION,
    atomic_dir,
    disk_errors,
    inside,
    manifest,
    read_json,
    recover,
    require_version,
    sampled_sha256,
    verify,
    write_json,
)
from litgpt.tokenizer import Tokenizer
from litgpt.weights import Entry

T = TypeVar("T")
Room = Callable[[str, torch.Size, torch.dtype], Tensor]

WEIGHTS = ("model.safetensors", weights.INDEX, "lit_model.pth", "pytorch_model.bin", "pytorch_model.bin.index.json")
TRAINING_STATE, RUN_STATE = "training_state", "run_state.json"
_HOW = "`litgpt download ORG/NAME` and `litgpt pretrain` make whole checkpoint directories"
_BUCKET_BYTES = 1 << 28
SCALE = "_scale_inv"  # beside a weight in 8-bit floats: a factor for each block of it (DeepSeek-V3)


# ------------------------------------------------------------------------------------------------------------ finding


def find(path: str | Path) -> Path:
    """The checkpoint directory `path`, or `checkpoints/<path>`; a file inside stands for its directory.

    Raises MissingError with the places looked at, the nearest name, and the command that makes a checkpoint.
    """
    below = Path(path).parts[0:1] == ("checkpoints",)  # as recipes of LitGPT 0.5 name what they downloaded
    places = dict.fromkeys((Path(path), Path(path) if below else Path("checkpoints") / path))  # one, if it is absolute
    for place in places:
        whole = recover(place)
        if os.path.isdir(whole):
            return whole
        if os.path.isfile(whole):
            return whole.parent
    near = near_miss(str(path), map(str, _neighbours(Path(path))))
    how = (
        f"`litgpt download {Path(*Path(path).parts[1:])}` fetches it" if below and len(Path(path).parts) == 3 else _HOW
    )
    raise MissingError(f"no checkpoint at {' or '.join(map(str, places))}{near}; {how}")


def _neighbours(path: Path) -> Iterable[Path]:
    """Directories beside `path`, and what was downloaded, as find() takes it."""
    beside = path.parent.glob("[!.]*/") if os.path.isdir(path.parent) else ()
    downloaded = (place.relative_to("checkpoints") for place in Path("checkpoints").glob("*/[!.]*/"))
    return chain(beside, downloaded)


def latest(out_dir: str | Path) -> Path | None:
    """The newest `step-N` directory of a run from which it can go on; says which ones it passes over, and why."""
    out_dir = Path(out_dir)
    for aside in sorted(out_dir.glob(".step-*.old")):
        recover(out_dir / aside.name[1:-4])
    numbered = {}
    for place in sorted(out_dir.glob("step-*")):
        if number := re.fullmatch(r"step-(\d+)", place.name):
            numbered[int(number[1])] = place
        else:
            _note(f"{place} is not a checkpoint step-<number> of this run and is ignored")
    for _, place in sorted(numbered.items(), reverse=True):
        try:
            verify(place, full=True)  # a run that restarts by itself must not stand still before a damaged one
            read_run_state(place)
            return place
        except UserError as error:
            _note(f"{place} cannot be resumed from, the one before it is tried: {error}")
    return None


def _note(line: str) -> None:
    if rank() == 0:
        print(line, file=sys.stderr)


# ------------------------------------------------------------------------------------------------------------ reading


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint directory; no tensor is read yet."""

    dir: Path
    config: Config
    kind: str  # "hf" or "litgpt": whose tensor names the files use
    files: tuple[weights.TensorFile, ...]
    block: tuple[int, int] = (128, 128)  # of the factors of weights in 8-bit floats

    @property
    def dtype(self) -> torch.dtype:
        """That of most of the weights; bf16 where they are stored in 8 bits."""
        sizes: dict[torch.dtype, int] = {}
        for entry in self._entries().values():
            if entry.dtype.is_floating_point:
                dtype = entry.dtype if entry.dtype.itemsize > 1 else torch.bfloat16
                sizes[dtype] = sizes.get(dtype, 0) + entry.nbytes
        return max(sizes, key=lambda dtype: sizes[dtype], default=torch.float32)

    def tensors(self, dtype: torch.dtype | None = None, *, writable: bool = False) -> Iterator[tuple[str, Tensor]]:
        """Our-named tensors, one equation at a time, in `dtype` (None: as in the files).

        What needs neither fusing nor another dtype lies on the mapped file and takes no memory, unless `writable`.
        A tied head is not among them. Raises InputError when the tensors are not those of the config.
        """
        home = {name: file for file in self.files for name in file.entries}

        def fetch(name: str) -> Tensor:
            there = home[name].entries[name].dtype
            if not there.is_floating_point:
                raise InputError(
                    f"{home[name].path}: {name} holds {there}, not floating point numbers; download it again"
                )
            # a router's correction bias is no parameter: it keeps its precision
            is_cast = name.endswith((".weight", ".bias"))
            wanted = dtype if dtype is not None and is_cast else there
            if there.itemsize == 1:
                return self._scaled(home, name, dtype or self.dtype)
            return home[name].read(name, wanted) if writable or wanted != there else home[name].fetch(name)

        found = {name: entry.shape for name, entry in self._entries().items()}
        return weights.import_(self.config, found, fetch, kind=self.kind, where=self.dir)

    def _scaled(self, home: Mapping[str, weights.TensorFile], name: str, dtype: torch.dtype) -> Tensor:
        """A weight (R, C) in 8-bit floats times its factors, one a block: (ceil(R / rows), ceil(C / columns))."""
        weight, path = home[name].fetch(name), home[name].path
        if name + SCALE not in home:
            raise InputError(f"{path}: {name} holds 8-bit floats, but {name + SCALE} is missing; download it again")
        scale = home[name + SCALE].fetch(name + SCALE).float()
        blocks = tuple(-(-length // size) for length, size in zip(weight.shape, self.block, strict=False))
        if tuple(scale.shape) != blocks:
            raise InputError(f"{path}: {name + SCALE} is {tuple(scale.shape)}, must be {blocks}; download it again")
        for dim, (size, length) in enumerate(zip(self.block, weight.shape, strict=True)):
            scale = scale.repeat_interleave(size, dim).narrow(dim, 0, length)
        return (weight.float() * scale).to(dtype)

    def _entries(self) -> dict[str, Entry]:
        entries = {name: entry for file in self.files for name, entry in file.entries.items()}
        return {
            name: entry
            for name, entry in entries.items()
            if name.removesuffix(SCALE) not in entries or SCALE not in name
        }


def open_(directory: str | Path) -> Checkpoint:
    """Opens a checkpoint directory: checks its files' sizes, reads its config and the headers of its weights.

    Safetensors come before LitGPT 0.5's `lit_model.pth`, and that before `pytorch_model*.bin`; pickles are only ever
    read as tensors. Raises InputError or MissingError that name the file.
    """
    directory = Path(directory)
    verify(directory)
    try:
        config = Config.from_checkpoint(directory)
    except MissingError:
        raise MissingError(f"{directory}: config.json is missing{result_below(directory)}; {_HOW}") from None
    paths = _weight_files(directory)
    kind = "litgpt" if paths[0].name == "lit_model.pth" or not config.family else "hf"
    return Checkpoint(directory, config, kind, tuple(weights.open_file(path) for path in paths), _block(directory))


def _block(directory: Path) -> tuple[int, int]:
    """The blocks of weights in 8-bit floats."""
    config = directory / "config.json"
    quantized = (read_json(config) if config.is_file() else {}).get("quantization_config") or {}
    match quantized.get("weight_block_size") or list(Checkpoint.block):
        case [int(rows), int(columns)] if rows > 0 and columns > 0:
            return rows, columns
        case found:
            raise InputError(f"{config}: weight_block_size is {shown(found)}, must be two positive integers")


def load_model(
    checkpoint: str | Path | Checkpoint,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    writable: bool = False,
    quantize: str | None = None,
    placement: Placement | None = None,
) -> GPT:
    """The model of a checkpoint, in little more memory than its weights take.

    Args:
        dtype: of all parameters; None: that of most of the weights in the files.
        writable: give every parameter memory of its own, for training. Otherwise, on the CPU, what can lies on the
            mapped files and is read when it is first used.
        quantize: a mode of `quantize.MODES`. Each weight is quantized on the device as soon as it is read, and let go:
            the whole in full precision is never in memory.
        placement: where what is, in place of `device`.
    """
    if not isinstance(checkpoint, Checkpoint):
        checkpoint = open_(checkpoint)
    placement, dtype = placement or OneDevice(device), dtype or checkpoint.dtype
    if placement.cuts:  # on the mapped files: what is cut off is not even read, where nothing is to be fused
        tensors = checkpoint.tensors()
    else:  # pages of a mapped file would stay in memory once they are read
        tensors = checkpoint.tensors(dtype, writable=writable or quantize is not None)
    return build_model(checkpoint.config, tensors, dtype, placement, quantize)


def build_model(
    config: Config,
    tensors: Iterable[tuple[str, Tensor]],
    dtype: torch.dtype,
    placement: Placement,
    quantize: str | None = None,
) -> GPT:
    """The model of our-named tensors, placed one by one; see `load_model`."""
    model = placement.outline(config)
    quantizer = None if quantize is None else Quantizer(model, quantize)
    state: dict[str, Tensor] = {}
    for name, tensor in tensors:
        here = placement.place(model, name, tensor, dtype)
        state |= {name: here} if quantizer is None else quantizer.take(name, here)
    if config.tie_embeddings and isinstance(model.lm_head, torch.nn.Linear):
        state[weights.HEAD] = state[weights.EMBEDDING]
    if quantizer is None:
        model.load_state_dict(state, assign=True)
    else:
        quantizer.load(state)
    model.tie_weights()
    placement.settle(model)  # the buffers that no file holds
    return model


def fingerprint(directory: str | Path) -> str:
    """Names the weights of a checkpoint directory, by the checksums in its manifest or by samples of its files."""
    files = _weight_files(find(directory))
    known = manifest(files[0].parent)
    digest = hashlib.sha256()
    for file in files:
        digest.update((known.get(file.name) or sampled_sha256(file)).encode())
    return digest.hexdigest()


def _weight_files(directory: Path) -> list[Path]:
    name = next((name for name in WEIGHTS if (directory / name).is_file()), None)
    if name is None:
        missing = f"has no weights ({', '.join(WEIGHTS)})"
        raise MissingError(f"{directory} {missing}{result_below(directory)}; {_HOW}")
    path = inside(directory, name)
    if path.suffix != ".json":
        return [path]
    listed = read_json(path).get("weight_map")
    if not isinstance(listed, dict) or not listed or not all(isinstance(shard, str) for shard in listed.values()):
        raise InputError(f"{path} has no weight_map of tensor names to files; download it again")
    shards = [inside(directory, shard) for shard in sorted(set(listed.values()))]
    for shard in shards:
        if not shard.is_file():
            raise MissingError(f"{shard} is missing, {path.name} lists it; download the checkpoint again")
    return shards


# ------------------------------------------------------------------------------------------------------------ writing


def write(
    target: str | Path,
    config: Config,
    state: Mapping[str, Any] | torch.nn.Module | None,
    *,
    tokenizer_dir: str | Path | None = None,
    hyperparameters: Mapping[str, Any] | None = None,
    prompt_style: PromptStyle | None = None,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = 5 * 2**30,
    extra: Callable[[Path], None] | None = None,
    overwrite: bool = False,
) -> Path:
    """Writes a Hugging Face checkpoint directory, whole or not at all, and one tensor at a time.

    A mix of switches that no Hugging Face family has is written without config.json, under our own names of tensors:
    then `model_config.yaml` says what the model is, and LitGPT alone opens it.

    Every rank of a process group calls it: rank 0 writes, all take part in gathering sharded tensors.

    Args:
        state: our-named tensors, or the model that has them; None: no weights, for what an adapter stands on elsewhere.
        tokenizer_dir: where tokenizer, token ids and generation settings are copied from.
        hyperparameters: what made the model; its access token is left out.
        dtype: of the floating point tensors; None: as they are.
        extra: writes more into the (still temporary) directory, on every rank.
    """
    state = state.state_dict() if isinstance(state, torch.nn.Module) else state
    entries = {} if state is None else _entries_to_write(config, state, dtype)
    need = sum(entry.nbytes for entry in entries.values())
    with shared_dir(target, overwrite=overwrite, need=need) as new:
        tensors: Iterator[tuple[str, Tensor]] = iter(())
        if state is not None:
            tensors = weights.export(config, _shapes(state), lambda name: _cast(_gathered(state[name]), dtype))
        try:
            if rank() == 0:
                if entries:
                    weights.save(new, entries, tensors, max_shard_bytes)
                _write_configs(new, config, next((entry.dtype for entry in entries.values()), None), tokenizer_dir)
                _write_story(new, hyperparameters, prompt_style)
        finally:
            if dist.is_initialized():  # gathering takes all ranks, those too that write nothing or could not
                for _ in tensors:
                    pass
        if extra is not None:
            extra(new)
    return Path(target)


def _entries_to_write(config: Config, state: Mapping[str, Any], dtype: torch.dtype | None) -> dict[str, Entry]:
    """Names, shapes and dtypes of the files to be, found without touching the data."""

    def outline(name: str) -> Tensor:
        return _cast(torch.empty(state[name].shape, dtype=state[name].dtype, device="meta"), dtype)

    return {name: Entry(t.dtype, t.shape) for name, t in weights.export(config, _shapes(state), outline)}


def _shapes(state: Mapping[str, Any]) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in state.items()}


def _cast(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    return tensor.to(dtype) if dtype and tensor.is_floating_point() else tensor


def _gathered(tensor: Tensor) -> Tensor:
    """The whole of a tensor that may be sharded over the ranks."""
    whole: Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor  # a DTensor has it
    return whole.detach()


def _write_configs(new: Path, config: Config, dtype: torch.dtype | None, tokenizer_dir: str | Path | None) -> None:
    """`dtype`: that of the weights, None where there are none."""
    tokenizer = None if tokenizer_dir is None else Tokenizer(tokenizer_dir)
    ids = _token_ids(tokenizer)
    if config.family and dtype:  # torch_dtype is the older key: every reader knows it
        write_json(new / "config.json", {**config.to_hf(), **ids, "torch_dtype": str(dtype).removeprefix("torch.")})
    (new / "model_config.yaml").write_text(yaml.safe_dump(config.to_dict()), encoding="utf-8")
    if tokenizer is None:
        return
    for file in tokenizer.files():
        place = new / file.relative_to(tokenizer.dir)
        place.parent.mkdir(exist_ok=True)
        shutil.copyfile(file, place)
    if (tokenizer.dir / "generation_config.json").is_file():
        shutil.copyfile(tokenizer.dir / "generation_config.json", new / "generation_config.json")
    else:
        write_json(new / "generation_config.json", ids)


def _token_ids(tokenizer: Tokenizer | None) -> dict[str, Any]:
    """Null where nothing is known: left out, readers would take the family's usual ids, which need not exist here."""
    ends = [] if tokenizer is None else list(tokenizer.eos_ids)
    return {
        "bos_token_id": tokenizer and tokenizer.bos_id,
        "eos_token_id": ends[0] if len(ends) == 1 else ends or None,
        "pad_token_id": tokenizer and tokenizer.pad_id,
    }


def _write_story(new: Path, hyperparameters: Mapping[str, Any] | None, prompt_style: PromptStyle | None) -> None:
    if hyperparameters is not None:
        shown = {name: value for name, value in hyperparameters.items() if name != "access_token"}
        (new / "hyperparameters.yaml").write_text(yaml.safe_dump(shown, sort_keys=False), encoding="utf-8")
    if prompt_style is not None:
        prompts.save(prompt_style, new)


# ---------------------------------------------------------------------------------------------------- training state


def save_training_state(directory: Path, tensors: Mapping[str, Tensor], run_state: Mapping[str, Any]) -> None:
    """Puts what a run needs to go on into a checkpoint directory that is being written. Every rank calls it.

    Sharded tensors are written by the ranks that hold them; of tensors of one name on all ranks, one copy is kept.
    `run_state` is plain data; rank 0's is kept.
    """
    place = Path(directory) / TRAINING_STATE
    place.mkdir(exist_ok=True)
    if rank() == 0:
        write_json(place / RUN_STATE, {"format_version": FORMAT_VERSION, **run_state})
    ours = {name: tensor.detach().contiguous() for name, tensor in _distinct(tensors).items()}
    sizes = _merged({name: tensor.numel() * tensor.dtype.itemsize for name, tensor in ours.items()})
    from torch.distributed import checkpoint as dcp

    with _plain_errors(place):
        files = _buckets(sizes)
        writer = dcp.HuggingFaceStorageWriter(str(place), fqn_to_index_mapping=files, save_distributed=True)
        dcp.save(ours, storage_writer=writer, no_dist=not dist.is_initialized())


def read_run_state(directory: str | Path) -> dict[str, Any]:
    """`run_state.json` of a checkpoint that a run can go on from."""
    path = Path(directory) / TRAINING_STATE / RUN_STATE
    if not path.is_file():
        raise MissingError(
            f"{path} is missing: a run goes on from one of its step-* directories only; give one of them"
        )
    state = read_json(path)
    require_version(state, path)
    return state


def load_training_state(directory: str | Path, tensors: dict[str, Tensor] | Room | None = None) -> dict[str, Tensor]:
    """Reads the saved tensors, after checking every file's sha256. Every rank calls it, however many ranks saved.

    Args:
        tensors: what to fill in place, sharded or not; or what makes room for each tensor that was saved; None: all
            that was saved, whole, in new memory on the CPU.

    Raises:
        InputError, MissingError: a file is damaged or missing, or a tensor was not saved or has another shape.
    """
    place = Path(directory) / TRAINING_STATE
    _on_rank_0(lambda: verify(directory, full=True))
    read_run_state(directory)
    from torch.distributed import checkpoint as dcp

    with _plain_errors(place):
        reader = dcp.HuggingFaceStorageReader(str(place))
        if not isinstance(tensors, dict):
            saved: dict[str, Any] = dict(reader.read_metadata().state_dict_metadata)
            room = tensors or _plain_room
            tensors = {name: room(name, fact.size, fact.properties.dtype) for name, fact in saved.items()}
        dcp.load(dict(_distinct(tensors)), storage_reader=reader, no_dist=not dist.is_initialized())
    return tensors


def _plain_room(name: str, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype)


def _distinct(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors without second names for the same memory (a tied head)."""
    seen, kept = set(), {}
    for name, tensor in tensors.items():
        local: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor  # a DTensor has it
        place = (local.data_ptr(), local.shape, local.stride())
        if local.numel() == 0 or place not in seen:
            seen.add(place)
            kept[name] = tensor
    return kept


def _buckets(sizes: Mapping[str, int]) -> dict[str, int]:
    """Which file, counted from 1, each tensor goes to: a file is held in memory while it is written."""
    room, number = _BUCKET_BYTES, 1
    files: dict[str, int] = {}
    for name, size in sizes.items():
        if size > room and files:
            room, number = _BUCKET_BYTES, number + 1
        files[name] = number
        room -= size
    return files


@contextmanager
def _plain_errors(place: Path) -> Iterator[None]:
    """torch wraps what went wrong on the ranks; out comes the first of it."""
    from torch.distributed.checkpoint import CheckpointException  # here: it takes a good part of a second

    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is ")  # one process is what we want then
            yield
    except CheckpointException as error:
        cause = next(iter(error.failures.values()))[0]
        if isinstance(cause, OSError):
            raise cause from error
        reason = " ".join(str(cause).split())
        raise InputError(f"{place} is not the state of this run: {reason}; resume from another checkpoint") from error


# ----------------------------------------------------------------------------------------------------- several ranks


@contextmanager
def shared_dir(target: str | Path, *, overwrite: bool = False, need: int = 0) -> Iterator[Path]:
    """`atomic_dir` for all ranks of a process group: one directory, which becomes `target` when all ended well."""
    with ExitStack() as stack:
        new = _on_rank_0(lambda: stack.enter_context(atomic_dir(target, overwrite=overwrite, need=need)))
        with _all_or_none(), disk_errors(Path(target), new, need):
            yield new
        _on_rank_0(stack.close)


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def _merged(mine: dict[str, int]) -> dict[str, int]:
    """What the ranks say, joined."""
    if not dist.is_initialized():
        return mine
    said: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(said, mine)
    return {name: value for part in said for name, value in part.items()}


def _on_rank_0(do: Callable[[], T]) -> T:
    """The result of `do` on rank 0, for all; an error there is an error everywhere."""
    if not dist.is_initialized():
        return do()
    said: list[Any] = [None, None]
    if rank() == 0:
        try:
            said[0] = do()
        except Exception as error:
            said[1] = error
    dist.broadcast_object_list(said, src=0)
    if said[1] is not None:
        raise said[1]
    result: T = said[0]
    return result


@contextmanager
def _all_or_none() -> Iterator[None]:
    """What fails on one rank fails on all."""
    error: Exception | None = None
    try:
        yield
    except Exception as mine:
        error = mine
    if dist.is_initialized():
        said: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(said, error)
        error = error or next((e for e in said if e is not None), None)
    if error is not None:
        raise error
