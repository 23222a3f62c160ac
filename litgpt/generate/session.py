"""A checkpoint directory -> model, tokenizer and prompt style, ready to answer. Owns the way from text to text."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path

import torch

from litgpt import estimate, families, prompts
from litgpt.checkpoint import find, load_model, open_
from litgpt.config import Config
from litgpt.errors import InputError, MissingError, near_miss, require_type
from litgpt.estimate import in_words
from litgpt.generate.engine import Engine
from litgpt.generate.sampling import Sampling, StopAutomaton
from litgpt.launch import machine, peak_memory
from litgpt.prompts import PromptStyle
from litgpt.tokenizer import Tokenizer

PRECISIONS = {
    "32-true": torch.float32,
    "16-true": torch.float16,
    "bf16-true": torch.bfloat16,
    # nothing is trained here, so mixed is the same as true
    "16-mixed": torch.float16,
    "bf16-mixed": torch.bfloat16,
}

REPOSITORY = re.compile(r"\w[\w.-]*/\w[\w.-]*")

Messages = list[dict[str, str]]


@dataclass
class Tally:
    """What one answer cost."""

    tokens: int = 0
    seconds: float = 0.0

    def __str__(self) -> str:
        return f"{self.tokens} tokens in {self.seconds:.2f} s ({self.tokens / max(self.seconds, 1e-9):.1f} tokens/s)"


@dataclass
class Session:
    """A model one can talk to."""

    config: Config
    engine: Engine
    tokenizer: Tokenizer
    style: PromptStyle
    tally: Tally = field(default_factory=Tally)  # of the newest answer

    @property
    def context(self) -> int:
        """Tokens that prompt and answer have together."""
        return self.engine.max_len

    def encode(self, messages: Messages) -> list[int]:
        """The conversation as the model wants to see it, ready for its next answer."""
        ids = self.style.encode(self.tokenizer, messages)
        if ids:
            return ids
        start = self.tokenizer.bos_id if self.tokenizer.bos_id is not None else self.tokenizer.eos_id
        if start is None:
            raise InputError("the prompt is empty, and the tokenizer has no token to begin with; give a prompt")
        return [start]

    def answer(
        self, messages: Messages, sampling: Sampling, *, max_new_tokens: int, stop: Sequence[str] = ()
    ) -> Iterator[str]:
        """The next answer, piece by piece; it ends before any of the style's stop tokens or of the texts in `stop`."""
        ids = self.encode(messages)
        stops = self.style.stop_tokens(self.tokenizer)
        self.tally = Tally()
        started = time.perf_counter()
        watch = StopAutomaton[str](stop)
        text = self.tokenizer.stream(ids)
        tokens = self.engine.generate(ids, sampling, max_new_tokens=max_new_tokens, stop=stops)
        try:
            for token in tokens:
                self.tally.tokens += 1
                shown = _filtered(watch, text.push(token))
                if shown:
                    yield shown
                if watch.stopped:
                    return
            rest = _filtered(watch, text.flush()) + "".join([] if watch.stopped else watch.flush())
            if rest:
                yield rest
        finally:
            tokens.close()  # frees the row
            self.tally.seconds = time.perf_counter() - started

    def lead(self, prompt: str) -> str:
        """What to show before the answer: the prompt where the style adds nothing, so that the two read as one."""
        return prompt if self.style.apply(prompt) == prompt else ""

    def memory(self) -> str:
        """Most memory held so far, in words."""
        return in_words(peak_memory(self.engine.device))


def _filtered(watch: StopAutomaton[str], text: str) -> str:
    return "".join(released for character in text for released in watch.push(character))


def located(checkpoint_dir: str | Path, access_token: str | None = None) -> Path:
    """The checkpoint directory. What reads as a repository of the Hub and is not on this disk is downloaded first."""
    try:
        return find(checkpoint_dir)
    except MissingError:
        org = Path(checkpoint_dir).parts[0]
        if not REPOSITORY.fullmatch(str(checkpoint_dir)) or Path(org).exists():
            raise
    from litgpt.scripts import download

    with redirect_stdout(sys.stderr):  # standard output is for answers
        print(f"{checkpoint_dir} is not on this disk; looking for it on the Hugging Face Hub")
        download.main(str(checkpoint_dir), access_token=access_token)
    return find(checkpoint_dir)


def load_session(
    checkpoint_dir: str | Path,
    *,
    precision: str | None = None,
    prompt_style: str | None = None,
    max_new_tokens: int = 0,
    access_token: str | None = None,
) -> Session:
    """Open a checkpoint directory (or its name below `checkpoints/`) for talking to it, on the best device there is.

    Args:
        checkpoint_dir: as `checkpoint.find` takes it, or a repository of the Hub.
        precision: of weights and arithmetic; None: as the files are.
        prompt_style: a style by name instead of the checkpoint's own.
        max_new_tokens: of a coming answer, to refuse what cannot fit before anything is loaded.
        access_token: for a repository of the Hub that asks for one.

    Raises:
        UserError: what is missing, broken or too large.
    """
    directory = located(checkpoint_dir, access_token)
    checkpoint = open_(directory)
    config = checkpoint.config
    dtype = checkpoint.dtype if precision is None else dtype_of(precision)
    if max_new_tokens > config.block_size:
        raise InputError(
            f"max_new_tokens is {max_new_tokens}, more than the context of {config.block_size} tokens that "
            f"{directory} has; lower it"
        )
    tokenizer = Tokenizer(directory)
    style = prompts.choose(directory, tokenizer, families.prompt_for(config.name), prompt_style)
    host = machine(1)
    # the cache is made for what is asked: the weights, and an answer after a short prompt, are what must fit
    length = min(config.block_size, max_new_tokens + 256)
    need = estimate.inference_memory(config, dtype.itemsize, 1, length).total
    estimate.require_fit(need, host.free_memory(), f"{config.name or directory}", "choose a smaller model or precision")
    device = torch.device(host.accelerator)
    model = load_model(checkpoint, device=device, dtype=dtype).eval()
    return Session(config, Engine(model, n_tokens=tokenizer.vocab_size), tokenizer, style)


def dtype_of(precision: str) -> torch.dtype:
    """The dtype that a `--precision` names."""
    if precision not in PRECISIONS:
        known = ", ".join(PRECISIONS)
        raise InputError(
            f"precision '{precision}' is not known; it is one of {known}{near_miss(precision, PRECISIONS)}"
        )
    return PRECISIONS[precision]


def require_later_options(*, quantize: str | None, compile: bool) -> None:
    """Options whose room is not built yet are refused, never ignored."""
    if quantize is not None:
        raise InputError(f"--quantize {quantize} is not in this version yet; leave it out")
    if compile:
        raise InputError("--compile is not in this version yet; leave it out")


def conversation(prompt: str, sys_prompt: str | None = None) -> Messages:
    """The messages of a conversation that begins with `prompt`."""
    require_type(prompt, str, "prompt", "text")
    system = [{"role": "system", "content": sys_prompt}] if sys_prompt else []
    return [*system, {"role": "user", "content": prompt}]
