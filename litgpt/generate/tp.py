"""`litgpt generate_tp`: generate, with every layer of the model cut into parts, one on each device (tensor parallel).

A process for each device. Rank 0 is `litgpt generate`; the others do with their parts what it does with its own.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from litgpt.generate import base
from litgpt.generate.base import Quantization

if TYPE_CHECKING:
    from litgpt.launch import PlainRanks


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
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    presence_penalty: float = 0.0,
    frequency_penalty: float = 0.0,
    logit_bias: dict | None = None,
    stop: list[str] | None = None,
    seed: int = 1234,
    prompts_file: Path | None = None,
    output: Path | None = None,
    batch_size: int = 8,
    prompt_style: str | None = None,
    quantize: Quantization | None = None,
    precision: str | None = None,
    compile: bool = False,
    devices: int | str = "auto",
) -> None:
    """Generate as litgpt generate does, with every layer cut into parts that several devices compute at once.

    The text goes to standard output, everything else to standard error.

    Args:
        checkpoint_dir: A checkpoint or adapter directory, its name below checkpoints/, or a repository of the Hugging
            Face Hub.
        prompt: What to answer or continue.
        sys_prompt: An instruction that comes before the prompt, for models that were trained with one.
        num_samples: How many answers to draw to each prompt.
        max_new_tokens: Longest answer, in tokens.
        top_k: Draw from the k likeliest tokens only; null draws from all.
        top_p: Draw from the likeliest tokens that together reach this probability only.
        temperature: Flattens (above 1) or sharpens (below 1) the choice; 0 always takes the likeliest token.
        min_p: Draw only from tokens at least this many times as likely as the likeliest; 0 from all.
        repetition_penalty: Above 1, tokens of prompt and answer get less likely to come again.
        presence_penalty: Taken from the logits of tokens that the answer holds already.
        frequency_penalty: The same, once for each time.
        logit_bias: What to add to the logits of single tokens, such as '{"42": -100}' to forbid token 42.
        stop: Texts at which an answer ends; they are not shown.
        seed: Makes the answers repeatable; sample i uses seed + i.
        prompts_file: A file of prompts instead of one: a prompt on each line, or JSON Lines with "prompt" or
            "messages". The answers come as JSON Lines, in the order of the prompts.
        output: A file for the answers, as JSON Lines, instead of standard output.
        batch_size: How many answers are written at once.
        prompt_style: A prompt style by name, instead of the checkpoint's own.
        quantize: Weights in 4 or 8 bits, to save memory.
        precision: 32-true, bf16-true or 16-true; by default what the files hold.
        compile: Has no effect here: a model on several devices is not compiled.
        devices: How many devices share each layer; auto: all GPUs of this machine.
    """
    arguments = dict(locals())
    # here, so that --help does not wait for torch
    from litgpt import launch
    from litgpt.generate.session import Source
    from litgpt.placement.tensor_parallel import part_of

    on = launch.machine(arguments.pop("devices"))
    if on.devices == 1:
        print("note: one device, so the model is not cut", file=sys.stderr)
        base.answer(**arguments)
        return
    source = Source.find(checkpoint_dir)  # what is to be downloaded is, once
    part_of(source.checkpoint.config, on.devices)
    launch.launch(on, "32-true", story, arguments, strategy=launch.PLAIN, remedy="start the command again")


def story(ranks: PlainRanks, arguments: dict[str, Any]) -> None:
    """On every rank."""
    from litgpt.placement.tensor_parallel import TensorParallel

    if ranks.global_rank:
        follow(ranks, (arguments["checkpoint_dir"], arguments["precision"], arguments["quantize"]))
        return
    placement = TensorParallel.here(ranks.device)
    base.answer(**arguments, placement=placement)
    placement.release()


def follow(ranks: PlainRanks, model: tuple[Path, str | None, str | None]) -> None:
    """On the ranks after the first: hold a part of the model (directory, precision, quantize) until it is let go."""
    from litgpt.generate.session import Source
    from litgpt.placement.tensor_parallel import TensorParallel

    directory, precision, quantize = model
    placement, source = TensorParallel.here(ranks.device), Source.find(directory)
    placement.follow(source.model(ranks.device, source.dtype(precision), quantize, placement).eval())
