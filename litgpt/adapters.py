"""What an adapter directory is: found, put onto its base model, written whole.

    D/                     tokenizer, model_config.yaml, hyperparameters, prompt style; the merged model, if merged
    D/adapter/             adapter_config.json + adapter_model.safetensors   LoRA, in PEFT's format
                           litgpt_adapter.json + litgpt_adapter.safetensors  what PEFT has no words for

A directory of PEFT with its files on top is read as well, and what LitGPT 0.5 left (`lit_model.pth.lora` and its like).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from litgpt import checkpoint, weights
from litgpt.config import Config
from litgpt.errors import InputError, MissingError, near_miss, shown
from litgpt.methods import base as method_base
from litgpt.methods import lit05, lora, peft
from litgpt.methods.adapter import Adapter
from litgpt.methods.adapter_v2 import AdapterV2
from litgpt.methods.base import Method
from litgpt.methods.lora import LoRA
from litgpt.model import GPT
from litgpt.placement.base import Placement
from litgpt.prompts import PromptStyle
from litgpt.storage import FORMAT_VERSION, inside, read_json, require_version, verify, write_json
from litgpt.weights import Entry

BELOW = "adapter"
PEFT_CONFIG, PEFT_FILES = "adapter_config.json", ("adapter_model.safetensors", "adapter_model.bin")
OWN_CONFIG, OWN_FILE = "litgpt_adapter.json", "litgpt_adapter.safetensors"
LIT_MODEL, HYPERPARAMETERS = "lit_model.pth", "hyperparameters.yaml"
METHODS: dict[str, type[Method]] = {kind.name: kind for kind in (LoRA, Adapter, AdapterV2)}
BASE_OPTION = "--pretrained_checkpoint_dir"


# ---------------------------------------------------------------------------------------------------------- finding


@dataclass(frozen=True)
class AdapterDir:
    """An adapter that was found; no tensor is read yet."""

    home: Path  # the whole result: what a user calls it
    dir: Path  # where the adapter's own files lie
    kind: str  # "peft", "litgpt" or "0.5"
    method: str  # "lora", "adapter" or "adapter_v2"
    file: Path  # the tensors
    base: str | None  # where its base model was, as it was written down

    def find_base(self, given: str | Path | None = None) -> Path:
        """The directory of the base model. Raises MissingError that names where it was and how to say where it is."""
        if given is not None:
            return checkpoint.find(given)
        for place in (self.base, self.base and self.home / self.base):
            try:
                if place is not None:
                    return checkpoint.find(place)
            except MissingError:
                continue
        was = "is not written down" if self.base is None else f"was {self.base[:1000]!r} and is not there"
        on_hub = self.base is not None and re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", self.base)
        hint = f", or run: litgpt download {self.base}" if on_hub else ""
        raise MissingError(f"{self.home}: the base model of this adapter {was}; {self._say_where()}{hint}")

    def _say_where(self) -> str:
        """How to say where the base is: what reads adapters as they lie has no option for it."""
        key, file = {
            "peft": ("base_model_name_or_path", self.dir / PEFT_CONFIG),
            "litgpt": ("base_model_name_or_path", self.dir / OWN_CONFIG),
            "0.5": ("checkpoint_dir", self.home / HYPERPARAMETERS),
        }[self.kind]
        if self.method == LoRA.name:
            command = f"litgpt merge_lora {self.home} {BASE_OPTION} DIR"
        else:
            command = f"litgpt generate_{self.method} DIR --adapter_path {self.home}"
        return f"say where it is: {command}, or write it into {file} ({key})"


def find(path: str | Path) -> AdapterDir | None:
    """The adapter at `path`; None where there is a whole model, merged or not, or nothing of the kind.

    Raises MissingError when nothing at all is there.
    """
    directory = checkpoint.find(path)
    if any((directory / name).is_file() for name in checkpoint.WEIGHTS):
        return None
    return adapter_in(directory, Path(path).name)


def adapter_in(directory: Path, name: str = "") -> AdapterDir | None:
    """The adapter of a result, whether or not the merged model stands beside it. `name`: one of several files."""
    for place in (directory / BELOW, directory):
        home = directory.parent if place == directory and _is_below(directory) else directory
        if (place / PEFT_CONFIG).is_file():
            config = read_json(place / PEFT_CONFIG)
            found = config.get("base_model_name_or_path")
            return AdapterDir(home, place, "peft", LoRA.name, _peft_file(place), _path_or_none(found))
        if (place / OWN_CONFIG).is_file():
            config = _read_own(place)
            return AdapterDir(home, place, "litgpt", config["method"], inside(place, OWN_FILE), config["base"])
    for method, suffix in lit05.SUFFIXES.items():
        file = LIT_MODEL + suffix
        if (directory / file).is_file() and name in (file, directory.name, ""):
            found = hyperparameters_in(directory).get("checkpoint_dir")
            return AdapterDir(directory, directory, "0.5", method, inside(directory, file), _path_or_none(found))
    return None


def _is_below(directory: Path) -> bool:
    return directory.name == BELOW and (directory.parent / "model_config.yaml").is_file()


def _path_or_none(found: Any) -> str | None:
    return found if isinstance(found, str) and found else None


def _peft_file(place: Path) -> Path:
    for name in PEFT_FILES:
        if (place / name).is_file():
            return inside(place, name)
    raise MissingError(f"{place} has {PEFT_CONFIG}, but not {PEFT_FILES[0]}; copy the adapter again")


def _read_own(place: Path) -> dict[str, Any]:
    path = place / OWN_CONFIG
    config = read_json(path)
    require_version(config, path)
    method, settings = config.get("method"), config.get("settings")
    if not isinstance(method, str) or method not in METHODS or not isinstance(settings, dict):
        raise InputError(f"{path}: method is {shown(method)}, must be one of {', '.join(METHODS)}, with its settings")
    return {"method": method, "settings": settings, "base": _path_or_none(config.get("base_model_name_or_path"))}


def hyperparameters_in(directory: Path) -> Mapping[str, Any]:
    """What made the adapter, as far as it was written down."""
    path = directory / HYPERPARAMETERS
    if not path.is_file():
        return {}
    try:
        found = yaml.safe_load(inside(directory, HYPERPARAMETERS).read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise InputError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    return found if isinstance(found, dict) else {}


# ---------------------------------------------------------------------------------------------------------- loading


def load_model(
    path: str | Path,
    *,
    base: str | Path | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    quantize: str | None = None,
    merge: bool = True,
) -> GPT:
    """The model of any directory: a checkpoint, or an adapter on its base model.

    Args:
        base: the base model's directory; None: where it was when the adapter was made.
        dtype: of the base's parameters; None: as in its files.
        quantize: keep the base's weights in this mode of `quantize.MODES`.
        merge: fold LoRA into a base that is not quantized.
    """
    adapter = find(path)
    if adapter is None:
        return checkpoint.load_model(checkpoint.find(path), device=device, dtype=dtype, quantize=quantize)
    return load_adapted(adapter, base=base, device=device, dtype=dtype, quantize=quantize, merge=merge)


def load_adapted(
    adapter: AdapterDir,
    *,
    base: str | Path | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    quantize: str | None = None,
    merge: bool = True,
    placement: Placement | None = None,
) -> GPT:
    """As `load_model`, of an adapter that was found. `placement`: where what is, in place of `device`."""
    verify(adapter.home)
    found = checkpoint.open_(adapter.find_base(base))
    if placement is not None and placement.cuts:
        return _load_merged(adapter, found, dtype or found.dtype, placement, quantize)
    model = checkpoint.load_model(found, device=device, dtype=dtype, quantize=quantize, placement=placement)
    attach(model, adapter)
    model.requires_grad_(False)
    if merge and quantize is None and adapter.method == LoRA.name:
        lora.merge(model)
    return model


def _load_merged(
    adapter: AdapterDir, base: checkpoint.Checkpoint, dtype: torch.dtype, placement: Placement, quantize: str | None
) -> GPT:
    """The merged model in parts: each weight is merged, cut, and only then perhaps quantized."""
    if adapter.method != LoRA.name:
        raise InputError(
            f"{adapter.home}: an adapter of kind {adapter.method} cannot be cut for several devices; use litgpt "
            "generate, or litgpt generate_sequentially"
        )
    model = checkpoint.load_model(base)  # on the mapped files
    attach(model, adapter)
    state = lora.merged_state(model.requires_grad_(False))
    tied = {weights.HEAD} if state.config.tie_embeddings else set()
    tensors = ((name, state[name]) for name in state if name not in tied)
    return checkpoint.build_model(state.config, tensors, dtype, placement, quantize)


def attach(model: GPT, adapter: AdapterDir) -> None:
    """Put an adapter onto its base model. Raises InputError when it is another model's."""
    file = weights.open_file(adapter.file)
    tensors: dict[str, Tensor] = {name: file.read(name, entry.dtype) for name, entry in file.entries.items()}
    if adapter.kind == "peft":
        peft.attach(model, read_json(adapter.dir / PEFT_CONFIG), tensors, adapter.dir)
    elif adapter.kind == "0.5":
        lit05.attach(model, adapter.method, tensors, hyperparameters_in(adapter.home), adapter.file)
    else:
        method_of(adapter).attach(model)
        method_base.fill(model, tensors, adapter.dir)


def method_of(adapter: AdapterDir) -> Method:
    """The method and its settings, of an adapter in our own format."""
    kind, settings = METHODS[adapter.method], _read_own(adapter.dir)["settings"]
    known = kind.__dataclass_fields__
    if unknown := next((name for name in settings if name not in known), None):
        raise InputError(f"{adapter.dir / OWN_CONFIG}: settings has no {unknown}{near_miss(unknown, known)}")
    return kind(**settings)


# ---------------------------------------------------------------------------------------------------------- writing


def write(
    target: str | Path,
    config: Config,
    method: Method,
    model: GPT,
    *,
    base: str | Path,
    merged: bool,
    tokenizer_dir: str | Path | None = None,
    hyperparameters: Mapping[str, Any] | None = None,
    prompt_style: PromptStyle | None = None,
    extra: Callable[[Path], None] | None = None,
    overwrite: bool = False,
) -> Path:
    """Writes the result of a finetuning, whole or not at all; every rank of a process group calls it.

    Args as in `checkpoint.write`, and:
        config: the base model's.
        model: the base with the method attached to it.
        base: the base model's directory, which is written down.
        merged: with the merged model, where the method can be merged.
    """
    state: Mapping[str, Any] | None = None
    if method.is_whole:
        state = model.state_dict()
    elif merged and isinstance(method, LoRA):
        merged_model = lora.merged_state(model)
        state, config = merged_model.later, replace(config, tie_embeddings=merged_model.config.tie_embeddings)

    def add(new: Path) -> None:
        if not method.is_whole:
            _write_adapter(new / BELOW, method, model, str(Path(base).resolve()))
        if extra is not None:
            extra(new)

    return checkpoint.write(
        target,
        config,
        state,
        tokenizer_dir=tokenizer_dir,
        hyperparameters=hyperparameters,
        prompt_style=prompt_style,
        extra=add,
        overwrite=overwrite,
    )


def _write_adapter(place: Path, method: Method, model: GPT, base: str) -> None:
    """On every rank; the first writes."""
    names, note = (PEFT_CONFIG, PEFT_FILES[0]), ""
    try:
        if not isinstance(method, LoRA):
            raise peft.Inexpressible
        config, tensors = peft.export(model, method, base)
    except peft.Inexpressible as reason:
        names, note = (OWN_CONFIG, OWN_FILE), str(reason)
        config, tensors = _in_own_words(method, base), method_base.trained(model)
    if checkpoint.rank() == 0:
        place.mkdir(exist_ok=True)
        write_json(place / names[0], config)
        entries = {name: Entry(tensor.dtype, tensor.shape) for name, tensor in tensors.items()}
        weights.save_file(place / names[1], entries, tensors.items())
        if note:
            print(f"The adapter is in LitGPT's own format; PEFT could not read it: {note}.")


def _in_own_words(method: Method, base: str) -> dict[str, Any]:
    return {
        "format_version": FORMAT_VERSION,
        "method": method.name,
        "settings": method.settings(),
        "base_model_name_or_path": base,
    }
