"""`litgpt generate_speculatively`: generate, with a small model or the text itself saying what may come next.

What was guessed is checked in one forward, and changes nothing but the speed.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from litgpt.errors import InputError
from litgpt.generate import base
from litgpt.generate.base import Quantization

if TYPE_CHECKING:
    from litgpt.generate.drafters import DraftModel
    from litgpt.generate.session import Session, Source
    from litgpt.tokenizer import Tokenizer

SAMPLE = "The mill's 42 wheels, naïve façades;\n\tdef add(a, b): return a + b  # 漢字 😀"


def main(
    draft_model_checkpoint_dir: Path | None = None,
    target_model_checkpoint_dir: Path | None = None,
    prompt: str = "What food do llamas eat?",
    *,
    sys_prompt: str | None = None,
    num_samples: int = 1,
    max_new_tokens: int = 50,
    speculative_k: int = 3,
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
) -> None:
    """Generate as litgpt generate does, but faster, with guesses of what comes next that the model checks.

    With two directories a small draft model guesses for the large target model. With one, that model answers, and the
    guesses are what followed the same words earlier in prompt and answer: good for summaries, code and quotes.

    The text goes to standard output, everything else to standard error.

    Args:
        draft_model_checkpoint_dir: The small model, which has the same tokenizer. A single directory is the model that
            answers.
        target_model_checkpoint_dir: The model that answers: a checkpoint or adapter directory, its name below
            checkpoints/, or a repository of the Hugging Face Hub.
        prompt: What to answer or continue.
        sys_prompt: An instruction that comes before the prompt, for models that were trained with one.
        num_samples: How many answers to draw to each prompt.
        max_new_tokens: Longest answer, in tokens.
        speculative_k: How many tokens to guess at once.
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
        quantize: Weights of both models in 4 or 8 bits, to save memory.
        precision: 32-true, bf16-true or 16-true; by default what the files hold.
        compile: Compile both models first: slow to start, faster from then on.
    """
    arguments = dict(locals())
    draft, target = arguments.pop("draft_model_checkpoint_dir"), arguments.pop("target_model_checkpoint_dir")
    k = arguments.pop("speculative_k")
    if target is None:
        draft, target = None, draft
    if target is None:
        raise InputError("target_model_checkpoint_dir is missing; name the model that is to answer")
    if k < 1:
        raise InputError(f"speculative_k is {k}; it must be 1 or more")
    # here, so that --help does not wait for torch
    from litgpt.generate.drafters import PromptLookup
    from litgpt.generate.session import Source

    source = None if draft is None else Source.find(draft)  # before the large model is loaded

    def prepare(session: Session) -> None:
        if source is None:
            session.engine.drafter = PromptLookup(k)
        else:
            session.engine.drafter = draft_model(source, session, k, precision, quantize, compile)

    base.answer(target, prepare=prepare, **arguments)


def draft_model(
    source: Source, session: Session, k: int, precision: str | None, quantize: str | None, compile: bool
) -> DraftModel:
    """The draft model, ready, if it can read the target's tokens."""
    from litgpt import estimate
    from litgpt.generate.drafters import DraftModel
    from litgpt.launch import machine

    require_same(source.tokenizer(), session.tokenizer)
    config, dtype = source.checkpoint.config, source.dtype(precision)
    if quantize is None:
        need = estimate.inference_memory(config, dtype.itemsize, 1, min(config.block_size, 256)).total
        remedy = "choose a smaller draft model, or leave it out"
        estimate.require_fit(need, machine(1).free_memory(), f"draft model {source.directory}", remedy)
    if config.block_size < session.context:
        print(
            f"note: the draft model's context is {config.block_size} tokens; behind them nothing is guessed",
            file=sys.stderr,
        )
    model = source.model(session.engine.device, dtype, quantize).eval()
    return DraftModel(model, k, n_tokens=session.tokenizer.vocab_size, compile=compile)


def require_same(draft: Tokenizer, target: Tokenizer) -> None:
    """Refuse a draft model whose ids mean something else: sizes, roles, and how a few words are written in ids."""
    differs = ""
    if draft.vocab_size != target.vocab_size:
        differs = f"{draft.vocab_size} and {target.vocab_size} tokens"
    elif draft.eos_id != target.eos_id:
        differs = f"{draft.eos_id} and {target.eos_id} as end of text"
    elif (one := draft.encode(SAMPLE, bos=False)) != (other := target.encode(SAMPLE, bos=False)):
        place = next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
        differs = f"the same text is {one[place : place + 3]} in one and {other[place : place + 3]} in the other"
    if differs:
        raise InputError(
            f"the tokenizers of {draft.dir} and {target.dir} differ ({differs}); choose a draft model of the same "
            "family, or none: with one directory, guesses come from the text itself"
        )
