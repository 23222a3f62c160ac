"""What a conversion reads, and how its result becomes a Hugging Face directory.

Knows checkpoint directories; which one a command takes is the command's affair.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from litgpt import checkpoint, prompts, weights
from litgpt.checkpoint import Checkpoint
from litgpt.config import Config
from litgpt.errors import InputError
from litgpt.storage import inside, read_json, verify, write_json

LIT_MODEL = "lit_model.pth"
TOKENIZERS = ("tokenizer.json", "tokenizer.model")
_ADAPTERS = ("adapter_model.safetensors", "adapter_model.bin", "adapter_config.json", "litgpt_adapter.json")
ADAPTER_FILES = (*_ADAPTERS, *(f"adapter/{name}" for name in _ADAPTERS), LIT_MODEL + ".*")
ADAPTER_TENSORS = ("lora_", "adapter_", "gating_factor")
_TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
_AT_ONCE = 1 << 20  # elements


# ---------------------------------------------------------------------------------------------------------- opening


def open_model(directory: Path) -> Checkpoint:
    """Opens a directory that holds a whole model; LoRA and adapter weights alone are refused."""
    _require_no_adapter_alone(directory)
    return _require_no_adapter_inside(checkpoint.open_(directory))


def open_lit_model(directory: Path) -> Checkpoint:
    """As `open_model`, but a `lit_model.pth` comes first.

    LitGPT 0.5 stored a head of its own for every model. It is tied again where it is still the embedding and
    `config.json`, if there is one, says so.
    """
    path = directory / LIT_MODEL
    if not path.is_file():
        return open_model(directory)
    verify(directory)
    config = Config.from_checkpoint(directory)
    file = weights.open_file(inside(directory, LIT_MODEL))
    opened = _require_no_adapter_inside(Checkpoint(directory, config, "litgpt", (file,)))
    return dataclasses.replace(opened, config=dataclasses.replace(config, tie_embeddings=_is_tied(directory, file)))


def _is_tied(directory: Path, file: weights.TensorFile) -> bool:
    described = directory / "config.json"
    if described.is_file() and not Config.from_hf(described).tie_embeddings:
        return False
    if weights.HEAD not in file.entries or weights.EMBEDDING not in file.entries:
        return False
    return torch.equal(file.fetch(weights.HEAD), file.fetch(weights.EMBEDDING))


def _require_no_adapter_alone(directory: Path) -> None:
    if any((directory / name).is_file() for name in checkpoint.WEIGHTS):
        return
    found = next((path for pattern in ADAPTER_FILES for path in sorted(directory.glob(pattern))), None)
    if found is not None:
        raise InputError(
            f"{found} belongs to an adapter, and {directory} has no model beside it; merge LoRA weights into their "
            "base model first (litgpt merge_lora), or give the directory of the base model"
        )


def _require_no_adapter_inside(opened: Checkpoint) -> Checkpoint:
    names = [name for file in opened.files for name in file.entries]
    alien = [name for name in names if any(word in name for word in ADAPTER_TENSORS)]
    if alien:
        raise InputError(
            f"{opened.dir}: {len(alien)} of its {len(names)} tensors belong to an adapter ({alien[0]}, ...); merge "
            "LoRA weights into their base model first (litgpt merge_lora), or give the directory of the base model"
        )
    return opened


# --------------------------------------------------------------------------------------------------------- checking


def is_finite(tensor: Tensor) -> bool:
    parts = tensor.reshape(-1).split(_AT_ONCE) if tensor.is_floating_point() else ()
    return all(bool(part.isfinite().all()) for part in parts)


def require_finite(files: Iterable[weights.TensorFile], directory: Path) -> None:
    """Refuses NaN and infinite weights, by file and name; one tensor is in memory at a time."""
    broken = []
    for file in files:
        bad = [name for name, entry in file.entries.items() if not is_finite(file.read(name, entry.dtype))]
        broken += [f"{name} in {file.path}" for name in bad]
    if broken:
        rest = f" and {len(broken) - 3} more" if len(broken) > 3 else ""
        raise InputError(
            f"{directory}: {len(broken)} of its tensors with NaN or infinite numbers: {', '.join(broken[:3])}{rest}; "
            "download the checkpoint again, or use an earlier one"
        )


def only_finite(opened: Checkpoint, tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """The tensors as they pass, or the error of `require_finite`."""
    for name, tensor in tensors:
        if not is_finite(tensor):
            require_finite(opened.files, opened.dir)
            dtype = str(tensor.dtype).removeprefix("torch.")
            raise InputError(f"{opened.dir}: {name} has numbers beyond {dtype}; choose --dtype bfloat16 or float32")
        yield name, tensor


# ---------------------------------------------------------------------------------------------------------- writing


def has_tokenizer(directory: Path) -> bool:
    return any((directory / name).is_file() for name in TOKENIZERS)


def write_hugging_face(opened: Checkpoint, target: Path, *, overwrite: bool) -> None:
    """Writes the model of `opened`, its tokenizer and its prompt style as a Hugging Face directory, whole or not."""

    def finish(new: Path) -> None:
        require_finite(opened.files, opened.dir)
        _keep_token_ids(opened.dir, new)

    checkpoint.write(
        target,
        opened.config,
        dict(opened.tensors()),
        tokenizer_dir=opened.dir if has_tokenizer(opened.dir) else None,
        prompt_style=prompts.load(opened.dir),
        extra=finish,
        overwrite=overwrite,
    )


def _keep_token_ids(source: Path, new: Path) -> None:
    """What the source's config files say of special tokens holds without a tokenizer, too."""
    if (source / "generation_config.json").is_file():
        shutil.copyfile(source / "generation_config.json", new / "generation_config.json")
    if not (new / "config.json").is_file():
        return
    written = read_json(new / "config.json")
    said = read_json(source / "config.json") if (source / "config.json").is_file() else {}
    missing = {name: said[name] for name in _TOKEN_IDS if written.get(name) is None and said.get(name) is not None}
    write_json(new / "config.json", written | missing)
    if not (new / "generation_config.json").is_file():
        ids = {name: (written | missing).get(name) for name in _TOKEN_IDS}
        write_json(new / "generation_config.json", ids)
