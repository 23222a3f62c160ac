"""`litgpt generate_full`: the name that LitGPT 0.5 had for generating with a fully finetuned model.

`litgpt generate DIR` does the same with a finetuned directory; here the directory of the base is named as well.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from litgpt.errors import InputError, MissingError
from litgpt.generate.base import SEED, Quantization, show

if TYPE_CHECKING:
    from litgpt.generate.session import Source

FINETUNED = Path("out/full/alpaca/lit_model_finetuned.pth")


def main(
    checkpoint_dir: Path,
    prompt: str = "What food do llamas eat?",
    input: str = "",
    sys_prompt: str | None = None,
    finetuned_path: Path = FINETUNED,
    quantize: Quantization | None = None,
    max_new_tokens: int = 100,
    top_k: int | None = 50,
    top_p: float = 1.0,
    temperature: float = 0.8,
    precision: str | None = None,
) -> None:
    """Generate text with a fully finetuned model.

    Args:
        checkpoint_dir: The checkpoint directory of the base model, or the finetuned directory itself.
        prompt: What to answer or continue.
        input: What the prompt is about, for prompt styles that have a place for it, such as alpaca.
        sys_prompt: An instruction that comes before the prompt, for models that were trained with one.
        finetuned_path: The finetuned checkpoint: its directory, or the file of its weights.
        quantize: Weights in 4 or 8 bits, to save memory.
        max_new_tokens: Longest answer, in tokens.
        top_k: Draw from the k likeliest tokens only; null draws from all.
        top_p: Draw from the likeliest tokens that together reach this probability only.
        temperature: Flattens (above 1) or sharpens (below 1) the choice; 0 always takes the likeliest token.
        precision: 32-true, bf16-true or 16-true; by default what the files hold.
    """
    # here, so that --help does not wait for torch
    from litgpt.generate.sampling import Sampling
    from litgpt.generate.session import conversation, load_session

    sampling = Sampling(temperature, top_k, top_p, SEED)
    session = load_session(
        finetuned(checkpoint_dir, finetuned_path),
        precision=precision,
        quantize=quantize,
        max_new_tokens=max_new_tokens,
    )
    show(session, conversation(prompt, sys_prompt, input), [sampling], max_new_tokens=max_new_tokens, stop=())


def finetuned(checkpoint_dir: Path, path: Path) -> Source:
    """The finetuned model: a checkpoint of its own, or other weights for the model of `checkpoint_dir`."""
    from litgpt import weights
    from litgpt.generate.session import Source

    if not path.exists():
        if path != FINETUNED:
            raise MissingError(f"finetuned_path {path} does not exist; give the directory that finetune_full wrote")
        return Source.find(checkpoint_dir)
    try:
        return Source.find(path)
    except (MissingError, InputError):
        if path.is_dir():
            raise
    base = Source.find(checkpoint_dir)
    return replace(base, checkpoint=replace(base.checkpoint, kind="litgpt", files=(weights.open_file(path),)))
