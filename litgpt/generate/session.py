"""A checkpoint directory -> model, tokenizer and prompt style, ready to answer. Owns the way from text to text."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from litgpt import adapters, estimate, families, prompts
from litgpt.adapters import AdapterDir
from litgpt.checkpoint import Checkpoint, find, load_model, open_
from litgpt.config import Config
from litgpt.errors import InputError, MissingError, near_miss, require_type, shown
from litgpt.estimate import in_words
from litgpt.generate.answers import Row
from litgpt.generate.engine import AtLimit, Engine
from litgpt.generate.sampling import Sampling
from litgpt.generate.stops import StopAutomaton
from litgpt.launch import machine, peak_memory
from litgpt.model import GPT
from litgpt.placement.base import Placement
from litgpt.placement.sequential import Sequential
from litgpt.placement.tensor_parallel import TensorParallel
from litgpt.prepack import prepack_as_asked
from litgpt.prompts import PromptStyle
from litgpt.prompts.pieces import Style
from litgpt.quantize import note, require_mode
from litgpt.tokenizer import Tokenizer

PRECISIONS = {
    "32-true": torch.float32,
    "16-true": torch.float16,
    "bf16-true": torch.bfloat16,
    # nothing is trained here, so mixed is the same as true
    "16-mixed": torch.float16,
    "bf16-mixed": torch.bfloat16,
}

WORTH_PREPACKING = 16  # tokens; a shorter answer is there before it pays
REPOSITORY = re.compile(r"\w[\w.-]*/\w[\w.-]*")

Messages = list[dict[str, Any]]


@dataclass
class Tally:
    """What answers cost."""

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
    def has_turns(self) -> bool:
        """Whether a conversation tells who says what; else a second prompt reads as more of the first answer."""
        return self.style != prompts.DEFAULT

    @property
    def context(self) -> int:
        """Tokens that prompt and answer have together."""
        return self.engine.max_len

    def encode(self, messages: Messages) -> list[int]:
        """The conversation as the model wants to see it, ready for its next answer."""
        ids = self.style.encode(self.tokenizer, [self._placed(message) for message in messages])
        if ids:
            return ids
        start = self.tokenizer.bos_id if self.tokenizer.bos_id is not None else self.tokenizer.eos_id
        if start is None:
            raise InputError("the prompt is empty, and the tokenizer has no token to begin with; give a prompt")
        return [start]

    def _placed(self, message: Mapping[str, Any]) -> Mapping[str, Any]:
        """The message, its "input" behind the text where the style has no place of its own for it."""
        if not message.get("input") or (isinstance(self.style, Style) and self.style.user_with_input):
            return message
        text = f"{message['content']}\n\n{message['input']}"
        return {key: value for key, value in message.items() if key != "input"} | {"content": text}

    def start(
        self,
        ids: Sequence[int],
        samplings: Sequence[Sampling],
        *,
        max_new_tokens: int,
        stop: Sequence[str] = (),
        at_limit: AtLimit = "refuse",
    ) -> list[Row]:
        """Queue answers to one prompt, one for each sampling. Each ends before any of the style's stop tokens or of the
        texts in `stop`."""
        ends = self.style.stop_tokens(self.tokenizer)
        requests = self.engine.submit_samples(
            ids, samplings, max_new_tokens=max_new_tokens, stop=ends, at_limit=at_limit
        )
        return [Row(request, self.tokenizer.stream(ids), StopAutomaton[str](stop)) for request in requests]

    def pieces(self, rows: Sequence[Row]) -> Iterator[tuple[int, str]]:
        """(index, text) of answers as they come; an empty text says that one is whole. Left early, all are ended."""
        started = time.perf_counter()
        self.tally = Tally()
        going = dict(enumerate(rows))
        try:
            while going:
                # rows begin in order: what has news is among the first
                first = list(islice(going.items(), 2 * self.engine.max_rows))
                if not any(row.has_news() for _, row in first):
                    self.engine.step()
                for index, row in first:
                    if not row.has_news():
                        continue
                    ids, text = row.take()
                    self.tally.tokens += len(ids)
                    self.tally.seconds = time.perf_counter() - started
                    if row.is_over:
                        self.engine.cancel(going.pop(index).request)  # at a text in `stop` the row would go on
                    if text:
                        yield index, text
                    if row.is_over:
                        yield index, ""
        finally:
            for row in going.values():
                self.engine.cancel(row.request)
            self.tally.seconds = time.perf_counter() - started

    def answer(
        self,
        messages: Messages,
        sampling: Sampling,
        *,
        max_new_tokens: int,
        stop: Sequence[str] = (),
        at_limit: AtLimit = "refuse",
    ) -> Iterator[str]:
        """The next answer, piece by piece."""
        ids = self.encode(messages)
        rows = self.start(ids, [sampling], max_new_tokens=max_new_tokens, stop=stop, at_limit=at_limit)
        for _, text in self.pieces(rows):
            if text:
                yield text

    def lead(self, prompt: str) -> str:
        """What to show before the answer: the prompt where the style adds nothing, so that the two read as one."""
        return prompt if self.style.apply(prompt) == prompt else ""

    def memory(self) -> str:
        """Most memory held so far, in words."""
        return in_words(peak_memory(self.engine.device))


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


@dataclass(frozen=True)
class Source:
    """Where what a session needs lies; nothing but headers is read yet."""

    directory: Path  # what the user named: tokenizer and prompt style come from here, where they are here
    checkpoint: Checkpoint  # of the whole model, or of an adapter's base
    adapter: AdapterDir | None = None

    @staticmethod
    def find(path: str | Path, *, base: str | Path | None = None, access_token: str | None = None) -> Source:
        """A checkpoint directory, an adapter's (on `base`, or where its base was), or a repository of the Hub."""
        directory = located(path, access_token)
        adapter = adapters.find(path)
        if adapter is None:
            return Source(directory, open_(directory))
        return Source(adapter.home, open_(adapter.find_base(base)), adapter)

    @property
    def place(self) -> Path:
        """The directory that opens as this again: of an adapter that lies inside a merged model, its own."""
        if self.adapter is not None and adapters.find(self.directory) is None:
            return self.adapter.dir
        return self.directory

    def tokenizer(self) -> Tokenizer:
        try:
            return Tokenizer(self.directory)
        except MissingError:
            if self.directory == self.checkpoint.dir:
                raise
            return Tokenizer(self.checkpoint.dir)

    def model(
        self, device: str | torch.device, dtype: torch.dtype, quantize: str | None, placement: Placement | None = None
    ) -> GPT:
        how: Any = {"device": device, "dtype": dtype, "quantize": quantize, "placement": placement}
        if self.adapter is None:
            return load_model(self.checkpoint, **how)
        return adapters.load_adapted(self.adapter, base=self.checkpoint.dir, **how)

    def dtype(self, precision: str | None) -> torch.dtype:
        """That of weights and arithmetic, if `precision` is what was asked for."""
        return self.checkpoint.dtype if precision is None else dtype_of(precision)


def load_session(
    source: str | Path | Source,
    *,
    precision: str | None = None,
    quantize: str | None = None,
    compile: bool = False,
    prepack: bool | None = None,
    prompt_style: str | None = None,
    max_new_tokens: int = 0,
    max_rows: int = 1,
    access_token: str | None = None,
    placement: TensorParallel | Sequential | None = None,
    compiled_for: int = 64,
) -> Session:
    """Open a checkpoint directory (or its name below `checkpoints/`) for talking to it, on the best device there is.

    Args:
        source: as `checkpoint.find` takes it, a repository of the Hub, or what was found already.
        precision: of weights and arithmetic; None: as the files are.
        quantize: a mode of `quantize.MODES`, for the weights.
        compile: whether the model is compiled for decoding.
        prepack: whether weights are laid out for the CPU's products (`litgpt.prepack`); None: where it pays.
        prompt_style: a style by name instead of the checkpoint's own.
        max_new_tokens: of a coming answer, to refuse what cannot fit before anything is loaded.
        max_rows: answers that are written at once.
        access_token: for a repository of the Hub that asks for one.
        placement: how the model is laid over several devices; None: it is on one.
        compiled_for: tokens to have room for from the start where decoding is compiled: with more it is compiled again.

    Raises:
        UserError: what is missing, broken or too large.
    """
    if quantize is not None:
        require_mode(quantize)
    if not isinstance(source, Source):
        source = Source.find(source, access_token=access_token)
    config = source.checkpoint.config
    dtype = source.dtype(precision)
    if max_new_tokens < 0:
        raise InputError(f"max_new_tokens is {max_new_tokens}; it must be 0 or more")
    if max_new_tokens > config.block_size:
        raise InputError(
            f"max_new_tokens is {max_new_tokens}, more than the context of {config.block_size} tokens that "
            f"{source.directory} has; lower it"
        )
    tokenizer = source.tokenizer()
    style = prompts.choose(source.directory, tokenizer, families.prompt_for(config.name), prompt_style)
    # the cache is made for what is asked: the weights, and an answer after a short prompt, are what must fit
    length, what = min(config.block_size, max_new_tokens + 256), config.name or str(source.directory)
    _require_fit(placement, config, dtype, length, what, quantize)
    if compile and placement is not None:
        print("note: not compiled: the model is on several devices", file=sys.stderr)
    accelerator = machine(1).accelerator
    if quantize is not None and (line := note(quantize, accelerator)) is not None:
        print(line, file=sys.stderr)
    model = source.model(accelerator, dtype, quantize, placement).eval()
    compile = compile and placement is None
    if prepack is None and 0 < max_new_tokens < WORTH_PREPACKING:
        prepack = False
    prepack_as_asked(model, prepack, quantize=quantize, is_spread=placement is not None)
    least = compiled_for if compile else 64
    engine = Engine(model, max_rows, n_tokens=tokenizer.vocab_size, compile=compile, least=least)
    return Session(config, engine, tokenizer, style)


def _require_fit(
    placement: TensorParallel | Sequential | None,
    config: Config,
    dtype: torch.dtype,
    length: int,
    what: str,
    quantize: str | None,
) -> None:
    if placement is not None:
        placement.require_fit(config, dtype, length, what)
        return
    need = estimate.inference_memory(config, dtype.itemsize, 1, length, quantize).total
    smaller = "a smaller model" if quantize else "a smaller model, a lower precision, or --quantize"
    estimate.require_fit(need, machine(1).free_memory(), what, f"choose {smaller}")


def dtype_of(precision: str) -> torch.dtype:
    """The dtype that a `--precision` names."""
    if precision not in PRECISIONS:
        near = near_miss(precision, PRECISIONS) or near_miss(f"{precision}-true", PRECISIONS)
        raise InputError(f"precision {shown(precision)} is not known; it is one of {', '.join(PRECISIONS)}{near}")
    return PRECISIONS[precision]


def conversation(prompt: str, sys_prompt: str | None = None, context: str = "") -> Messages:
    """The messages of a conversation that begins with `prompt`; `context` is for styles that have a place for it."""
    require_type(prompt, str, "prompt", "text")
    system = [{"role": "system", "content": sys_prompt}] if sys_prompt else []
    return [*system, {"role": "user", "content": prompt} | ({"input": context} if context else {})]
