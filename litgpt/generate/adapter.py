"""`litgpt generate_adapter`: the name that LitGPT 0.5 had for generating with an adapter.

`litgpt generate DIR` does the same: it looks at what the directory holds.
"""

from __future__ import annotations

from pathlib import Path

from litgpt.errors import InputError, MissingError
from litgpt.generate.base import SEED, Quantization, show

ADAPTER = Path("out/finetune/adapter/final/lit_model.pth.adapter")


def main(
    checkpoint_dir: Path,
    prompt: str = "What food do llamas eat?",
    input: str = "",
    sys_prompt: str | None = None,
    adapter_path: Path = ADAPTER,
    quantize: Quantization | None = None,
    max_new_tokens: int = 100,
    top_k: int | None = 50,
    top_p: float = 1.0,
    temperature: float = 0.8,
    precision: str | None = None,
) -> None:
    """Generate text with a model and an adapter.

    Args:
        checkpoint_dir: The checkpoint directory of the base model, or the adapter's directory itself.
        prompt: What to answer or continue.
        input: What the prompt is about, for prompt styles that have a place for it, such as alpaca.
        sys_prompt: An instruction that comes before the prompt, for models that were trained with one.
        adapter_path: The directory that the finetune wrote, or the file of the adapter's weights.
        quantize: Weights in 4 or 8 bits, to save memory.
        max_new_tokens: Longest answer, in tokens.
        top_k: Draw from the k likeliest tokens only; null draws from all.
        top_p: Draw from the likeliest tokens that together reach this probability only.
        temperature: Flattens (above 1) or sharpens (below 1) the choice; 0 always takes the likeliest token.
        precision: 32-true, bf16-true or 16-true; by default what the files hold.
    """
    # here, so that --help does not wait for torch
    from litgpt.generate.sampling import Sampling
    from litgpt.generate.session import Source, conversation, load_session

    sampling = Sampling(temperature, top_k, top_p, SEED)
    path = _written(adapter_path)
    source = Source.find(checkpoint_dir) if path is None else Source.find(path, base=checkpoint_dir)
    if source.adapter is None:
        raise InputError(f"{source.directory} holds no adapter; give --adapter_path, or run: litgpt generate")
    session = load_session(source, precision=precision, quantize=quantize, max_new_tokens=max_new_tokens)
    show(session, conversation(prompt, sys_prompt, input), [sampling], max_new_tokens=max_new_tokens, stop=())


def _written(path: Path) -> Path | None:
    """The adapter that was named; None where it is a default that nothing was written to.

    The defaults are names of LitGPT 0.5: today the same finetune writes a directory.
    """
    if path.exists():
        return path
    is_default = path.name.startswith("lit_model.pth.adapter") and path.parts[:2] == ADAPTER.parts[:2]
    if is_default and path.parent.is_dir():
        return path.parent
    if is_default:
        return None
    raise MissingError(f"adapter_path {path} does not exist; give the directory that the finetune wrote")
