"""`litgpt generate`: one prompt, one or more answers, as they come."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Literal

from litgpt.errors import InputError


def main(
    checkpoint_dir: Path,
    prompt: str = "What food do llamas eat?",
    *,
    sys_prompt: str | None = None,
    num_samples: int = 1,
    max_new_tokens: int = 50,
    top_k: int | None = 50,
    top_p: float = 1.0,
    temperature: float = 0.8,
    stop: list[str] | None = None,
    seed: int = 1234,
    prompt_style: str | None = None,
    quantize: Literal["bnb.nf4", "bnb.nf4-dq", "bnb.fp4", "bnb.fp4-dq", "bnb.int8"] | None = None,
    precision: str | None = None,
    compile: bool = False,
) -> None:
    """Generate text that answers or continues a prompt.

    The text goes to standard output, everything else to standard error.

    Args:
        checkpoint_dir: A checkpoint directory, its name below checkpoints/, or a repository of the Hugging Face Hub.
        prompt: What to answer or continue.
        sys_prompt: An instruction that comes before the prompt, for models that were trained with one.
        num_samples: How many answers to draw.
        max_new_tokens: Longest answer, in tokens.
        top_k: Draw from the k likeliest tokens only; null draws from all.
        top_p: Draw from the likeliest tokens that together reach this probability only.
        temperature: Flattens (above 1) or sharpens (below 1) the choice; 0 always takes the likeliest token.
        stop: Texts at which an answer ends; they are not shown.
        seed: Makes the answers repeatable; sample i uses seed + i.
        prompt_style: A prompt style by name, instead of the checkpoint's own.
        quantize: Weights in 4 or 8 bits (not in this version yet).
        precision: 32-true, bf16-true or 16-true; by default what the files hold.
        compile: Compile the model first (not in this version yet).
    """
    # here, so that --help does not wait for torch
    from litgpt.generate.sampling import Sampling
    from litgpt.generate.session import conversation, load_session, require_later_options

    require_later_options(quantize=quantize, compile=compile)
    if num_samples < 1:
        raise InputError(f"num_samples is {num_samples}; it must be 1 or more")
    samplings = [Sampling(temperature, top_k, top_p, seed + i) for i in range(num_samples)]
    session = load_session(
        checkpoint_dir, precision=precision, prompt_style=prompt_style, max_new_tokens=max_new_tokens
    )
    messages = conversation(prompt, sys_prompt)
    for sampling in samplings:
        answer = session.answer(messages, sampling, max_new_tokens=max_new_tokens, stop=stop or ())
        first = next(answer, "")  # before anything is shown, so that a refusal stands alone
        print(session.lead(prompt) + first, end="", flush=True)
        for piece in answer:
            print(piece, end="", flush=True)
        print(flush=True)
        print(f"{session.tally}, peak memory {session.memory()}", file=sys.stderr)
