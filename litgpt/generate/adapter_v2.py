"""`litgpt generate_adapter_v2`: as `generate_adapter`, with the default place of the second kind of adapter."""

from __future__ import annotations

from pathlib import Path

from litgpt.generate import adapter
from litgpt.generate.base import Quantization

ADAPTER = Path("out/finetune/adapter-v2/final/lit_model.pth.adapter_v2")


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
    """Generate text with a model and an adapter of the second kind.

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
    adapter.main(
        checkpoint_dir,
        prompt,
        input,
        sys_prompt,
        adapter_path,
        quantize,
        max_new_tokens,
        top_k,
        top_p,
        temperature,
        precision,
    )
