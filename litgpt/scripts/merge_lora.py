"""`litgpt merge_lora`: LoRA weights and their base model become one model, in the adapter's own directory."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from litgpt.errors import InputError, MissingError

if TYPE_CHECKING:
    from litgpt.adapters import AdapterDir
    from litgpt.model import GPT


def main(
    checkpoint_dir: Path,
    pretrained_checkpoint_dir: Path | None = None,
    precision: str | None = None,
    quantize: str | None = None,
) -> None:
    """Merge LoRA weights into their base model.

    The directory becomes a whole Hugging Face model; the adapter stays in it, in adapter/.

    Args:
        checkpoint_dir: A result of finetune_lora, a directory of PEFT, or a result of LitGPT 0.5.
        pretrained_checkpoint_dir: The base model, where it is no longer where it was.
        precision: 32-true, bf16-true or 16-true; by default that of the base model's files.
        quantize: The mode that the base model was in while the adapter was trained, such as bnb.nf4. The adapter is
            then merged into the weights that it has seen, in full precision. By default into the weights as they are.
    """
    from litgpt import adapters, checkpoint
    from litgpt.generate.session import dtype_of
    from litgpt.methods import lora

    dtype = None if precision is None else dtype_of(precision)
    adapter = _lora_in(checkpoint.find(checkpoint_dir))
    base = adapter.find_base(pretrained_checkpoint_dir)
    _note_quantization(adapter, quantize)
    model = adapters.load_adapted(adapter, base=base, dtype=dtype, quantize=quantize, merge=False)
    _require_finite(model, adapter)
    merged = lora.merged_state(model)
    checkpoint.write(
        adapter.home,
        merged.config,
        merged.later,
        tokenizer_dir=_tokenizer_dir(adapter.home, base),
        extra=lambda new: _keep_others(adapter, new),
        overwrite=True,
    )
    print(f"Merged the LoRA weights in {adapter.dir} into {base}: {adapter.home} is a whole model now.")
    print(f"What it is good for: litgpt generate {adapter.home} --prompt ...")


def _lora_in(directory: Path) -> AdapterDir:
    from litgpt import adapters
    from litgpt.config import result_below
    from litgpt.methods.lora import LoRA
    from litgpt.storage import require_writable

    adapter = adapters.adapter_in(directory)
    if adapter is None:
        raise InputError(
            f"{directory} has no LoRA weights ({adapters.BELOW}/{adapters.PEFT_CONFIG}, {adapters.LIT_MODEL}.lora); "
            f"give a result of finetune_lora{result_below(directory)}"
        )
    if adapter.method != LoRA.name:
        raise InputError(
            f"{adapter.dir} holds a result of finetune_{adapter.method}, which no plain model can hold; use it as "
            "it is (generate, chat and the others read it)"
        )
    require_writable(adapter.home)
    return adapter


def _require_finite(model: GPT, adapter: AdapterDir) -> None:
    for name, tensor in model.named_parameters():
        if ".lora_" in name and not bool(tensor.isfinite().all()):
            raise InputError(f"{adapter.file}: its weights for {name} are not finite; copy it again, or train it anew")


def _note_quantization(adapter: AdapterDir, quantize: str | None) -> None:
    from litgpt.adapters import hyperparameters_in

    trained_on = hyperparameters_in(adapter.home).get("quantize")
    if trained_on and quantize is None:
        print(
            f"The adapter was trained on a base in {trained_on}, and is merged into the weights as they are. "
            f"--quantize {trained_on} merges it into what it was trained on."
        )


def _tokenizer_dir(home: Path, base: Path) -> Path | None:
    """Whichever has a tokenizer, the adapter's own directory first."""
    from litgpt.tokenizer import Tokenizer

    for place in (home, base):
        try:
            return Tokenizer(place).dir
        except MissingError:
            continue
    return None


def _keep_others(adapter: AdapterDir, new: Path) -> None:
    """Take along what else lies there, but for weights of an older merge; PEFT's own files go one level down, where
    `transformers` does not apply them to the merged model once more."""
    from litgpt.adapters import BELOW
    from litgpt.checkpoint import WEIGHTS
    from litgpt.storage import MANIFEST

    for there in sorted(adapter.home.iterdir()):
        stale = there.name in WEIGHTS or there.match("model-*-of-*.safetensors") or there.match("pytorch_model-*.bin")
        if stale or there.name in (MANIFEST, "config.json") or (new / there.name).exists():
            continue
        is_peft = adapter.dir == adapter.home and there.name.startswith("adapter_")
        place = new / BELOW / there.name if is_peft else new / there.name
        place.parent.mkdir(exist_ok=True)
        if there.is_dir():
            shutil.copytree(there, place)
        else:
            shutil.copyfile(there, place)
