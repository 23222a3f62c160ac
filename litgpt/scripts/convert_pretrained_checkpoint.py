"""`litgpt convert_pretrained_checkpoint`: a training checkpoint cut down to the model."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

from litgpt.errors import InputError

if TYPE_CHECKING:
    import torch

    from litgpt.checkpoint import Checkpoint
    from litgpt.weights import Entry, TensorFile

# what torch.compile and Fabric put before the names of a model that they wrap
WRAPPERS = ("_forward_module.", "_orig_mod.")


def main(checkpoint_dir: Path, output_dir: Path, overwrite: bool = False) -> None:
    """Cut a training checkpoint down to the model, as a Hugging Face directory.

    Args:
        checkpoint_dir: A step-* directory of a run, or of a pretraining with LitGPT 0.5.
        output_dir: Where to write the model and the tokenizer's files.
        overwrite: Replace what is in `output_dir`.
    """
    from litgpt.checkpoint import find
    from litgpt.scripts.source import write_hugging_face

    opened = _open(find(checkpoint_dir))
    write_hugging_face(opened, output_dir, overwrite=overwrite)
    print(f"Wrote the model without its training state to {output_dir}.")
    print(f"What it is good for: litgpt validate {output_dir}")


def _open(directory: Path) -> Checkpoint:
    from litgpt.checkpoint import TRAINING_STATE
    from litgpt.scripts.source import LIT_MODEL, open_lit_model, open_model

    if (directory / TRAINING_STATE).is_dir():
        return open_model(directory)
    if _is_nested(directory / LIT_MODEL):
        opened = open_lit_model(directory)
        return dataclasses.replace(opened, files=tuple(Unwrapped(file) for file in opened.files))
    open_lit_model(directory)  # what is broken is named first
    raise InputError(
        f"{directory} holds no training state: it is the model already, use it as it is (every command reads it)"
    )


def _is_nested(path: Path) -> bool:
    """Whether the tensors lie under the key "model", beside the state of the optimizer and of the loop."""
    if not path.is_file():
        return False
    import zipfile

    import torch

    from litgpt.weights import PickleFile

    PickleFile(path)  # refuses what is damaged, or more than data
    loaded = torch.load(path, map_location="cpu", mmap=zipfile.is_zipfile(path), weights_only=True)
    return isinstance(loaded.get("model"), dict)


class Unwrapped:
    """A file of tensors under the names that they had before the model was wrapped."""

    def __init__(self, file: TensorFile) -> None:
        self.path = file.path
        self._file = file
        self._names = {_unwrapped(name): name for name in file.entries}
        self.entries: dict[str, Entry] = {name: file.entries[there] for name, there in self._names.items()}

    def fetch(self, name: str) -> torch.Tensor:
        return self._file.fetch(self._names[name])

    def read(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        return self._file.read(self._names[name], dtype)


def _unwrapped(name: str) -> str:
    for wrapper in WRAPPERS:
        name = name.replace(wrapper, "")
    return name
