"""`litgpt evaluate`: scores of a model on benchmark tasks, or of how well it foretells a text. Nothing is converted."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from litgpt import __version__
from litgpt.errors import InputError, MissingError, near_miss, one_line, shown
from litgpt.eval.harness import Asked, load, manager, names_in, require_style, run, table, versions
from litgpt.eval.perplexity import foretell, require_stride
from litgpt.eval.records import Journal, fingerprint, home_of, results_file, write
from litgpt.generate.base import Quantization
from litgpt.report import table as table_of

if TYPE_CHECKING:
    import torch

    from litgpt.eval.candidate import Candidate
    from litgpt.generate.session import Source

DTYPES = ("float32", "bfloat16", "float16")


def main(
    checkpoint_dir: Path,
    *,
    tasks: str | None = None,
    text: Path | None = None,
    stride: int | None = None,
    out_dir: Path | None = None,
    num_fewshot: int | None = None,
    batch_size: int | str = 1,
    device: str | None = None,
    dtype: str | None = None,
    quantize: Quantization | None = None,
    limit: float | None = None,
    seed: int = 1234,
    include_path: Path | None = None,
    apply_chat_template: bool = False,
    fewshot_as_multiturn: bool = True,
    log_samples: bool = False,
    confirm_run_unsafe_code: bool = False,
    save_filepath: Path | None = None,
    overwrite: bool = False,
    access_token: str | None = None,
) -> None:
    """Score a model on lm-eval's tasks, or on a text, as it lies there.

    The scores go to standard output, all that was found to a JSON file. A run that was cut off goes on where it stopped
    when it is started again.

    Args:
        checkpoint_dir: A checkpoint or adapter directory, its name below checkpoints/, a repository of the Hugging Face
            Hub, or `list`, which lists the tasks.
        tasks: Tasks, groups or patterns, such as arc_easy,mmlu,blimp_*; or YAML files of tasks.
        text: Instead of tasks, a text file: its perplexity and bits per byte. Needs no lm-eval.
        stride: Tokens of the text that are told by each window of the context; fewer give each token more before it,
            and take longer; by default all.
        out_dir: Where results are written; by default out/evaluate/NAME. Never into the checkpoint.
        num_fewshot: Solved examples before each question; by default as the task says.
        batch_size: Rows of text to read, and of answers to write, at once; `auto` suits the device. No score depends
            on it.
        device: cpu, cuda, cuda:1 or mps; by default the best one there is.
        dtype: float32, bfloat16 or float16; by default what the files hold.
        quantize: Weights in 4 or 8 bits, to save memory.
        limit: Only so many questions of each task, or a share of them below 1; to try something out.
        seed: Of examples and answers that are drawn.
        include_path: A directory with more tasks, as YAML files.
        apply_chat_template: Put questions as messages, by the checkpoint's chat template or prompt style.
        fewshot_as_multiturn: With a chat template, make each example a turn of its own.
        log_samples: Also write each question, with what the model made of it.
        confirm_run_unsafe_code: Let tasks run code that the model wrote.
        save_filepath: The file for the results, instead of a new one in out_dir.
        overwrite: Let the results replace a file that is there.
        access_token: For repositories that ask for one; HF_TOKEN in the environment is the safer way to give it.
    """
    if str(checkpoint_dir) == "list":
        print(listing(include_path))
        return
    chat = (apply_chat_template, fewshot_as_multiturn)
    asked = Asked(names_in(tasks), num_fewshot, limit, include_path, *chat, log_samples, seed, confirm_run_unsafe_code)
    content = None if text is None else read_text(text)
    if content is None:
        asked.check()
        if stride is not None:
            raise InputError("stride is for a text (--text), and tasks are given; leave it out")
    elif asked.tasks:
        raise InputError("both tasks and text are given; evaluate one after the other")
    how = How.of(batch_size, device, dtype, quantize)
    source = find_source(checkpoint_dir, access_token)
    if content is not None:
        require_stride(stride, source.checkpoint.config.block_size)
    place = out_dir or home_of(source.directory)
    target = results_file(place, save_filepath, overwrite)
    loaded = None if content is not None else load(asked)  # before the weights: this fails more often
    journal = Journal(place / f"unfinished-{how.fingerprint(source)}.jsonl")
    with resumable(journal):
        started = time.time()
        candidate = how.open(source, journal, in_messages=apply_chat_template and content is None)
        results: dict[str, Any]
        if loaded is not None:
            results = run(candidate, loaded, asked)
            shown_results = table(results)
        else:
            found = told(candidate, content or "", stride)
            results, shown_results = {"text": {str(text): found}}, figures(found)
        settings = asdict(asked) | {"stride": stride, "batch_size": batch_size}
        results["litgpt"] = how.words(source) | settings | {"seconds": round(time.time() - started, 1)}
        files = write(target, results)
    print(shown_results)
    print(f"results: {', '.join(map(str, files))}", file=sys.stderr)


def listing(include_path: Path | None = None) -> str:
    """Every task, group and tag, a line each."""
    return "\n".join(manager(include_path).all_tasks)


def read_text(path: Path) -> str:
    """The text of a file, as it is."""
    try:
        content = path.read_bytes().decode("utf-8")
    except FileNotFoundError:
        raise MissingError(f"text {path} does not exist; check the path") from None
    except UnicodeDecodeError as error:
        raise InputError(f"text {path} is not text in UTF-8 ({one_line(error)})") from None
    if not content:
        raise InputError(f"text {path} is empty; there is nothing to score")
    return content


def told(candidate: Candidate, content: str, stride: int | None) -> dict[str, float]:
    """The figures of a text."""
    return foretell(candidate, content, stride).figures()


def figures(found: Mapping[str, float]) -> str:
    """The figures of a text, for people."""
    return table_of(
        {name: f"{value:,.4f}" if isinstance(value, float) else f"{value:,}" for name, value in found.items()}
    )


@contextmanager
def resumable(journal: Journal) -> Iterator[None]:
    """What is found inside is kept if it ends early, and goes when all is done."""
    if journal.found:
        print(f"going on: {len(journal.found)} requests are answered already ({journal.path})", file=sys.stderr)
    done = False
    try:
        yield
        done = True
    finally:
        journal.close(done=done)
        if not done and journal.found:
            print(f"{len(journal.found)} answered requests are kept; the same command goes on there", file=sys.stderr)


@dataclass(frozen=True)
class How:
    """Where and in which precision a model is examined, and how much of the work at once."""

    rows: int | None
    device: torch.device
    dtype: torch.dtype | None  # None: as in the files
    quantize: str | None

    @staticmethod
    def of(batch_size: int | str, device: str | None, dtype: str | None, quantize: str | None) -> How:
        """From what the user wrote. Raises InputError."""
        from litgpt.eval.candidate import rows_of
        from litgpt.launch import device_named
        from litgpt.quantize import require_mode

        if quantize is not None:
            require_mode(quantize)
        return How(rows_of(batch_size), device_named(device or "auto"), dtype_of(dtype), quantize)

    def fingerprint(self, source: Source) -> str:
        """Of everything that a score depends on, but the questions."""
        homes = {source.directory, source.checkpoint.dir, *([source.adapter.dir] if source.adapter else [])}
        return fingerprint(sorted(homes), self.words(source))

    def words(self, source: Source) -> dict[str, Any]:
        """What the results say of it, and of the model."""
        import torch

        return {
            "checkpoint": str(source.directory),
            "base": str(source.checkpoint.dir) if source.adapter else None,
            "device": str(self.device),
            "dtype": str(self.dtype or source.checkpoint.dtype).removeprefix("torch."),
            "quantize": self.quantize,
            "versions": {"litgpt": __version__, "torch": torch.__version__} | versions(),
        }

    def open(self, source: Source, journal: Journal, *, in_messages: bool = False) -> Candidate:
        """Load the model, if there is a style for messages where they are needed."""
        from litgpt import estimate, families, prompts
        from litgpt.eval.candidate import Candidate
        from litgpt.launch import machine
        from litgpt.prepack import prepack_as_asked

        config, dtype = source.checkpoint.config, self.dtype or source.checkpoint.dtype
        tokenizer = source.tokenizer()
        style = prompts.choose(source.directory, tokenizer, families.prompt_for(config.name))
        if in_messages:
            require_style(style, tokenizer)
        if self.quantize is None and self.device.type == machine(1).accelerator:  # else they take half or a quarter
            need = estimate.inference_memory(config, dtype.itemsize, 1, min(config.block_size, 2048)).total
            what = config.name or str(source.directory)
            estimate.require_fit(need, machine(1).free_memory(), what, "choose a smaller model, --dtype or --quantize")
        model = source.model(self.device, dtype, self.quantize).eval()
        prepack_as_asked(model, None, quantize=self.quantize)  # many prompts: it always pays
        return Candidate(model, tokenizer, style, self.rows, journal)


def dtype_of(name: str | None) -> torch.dtype | None:
    """The dtype of a name, "bfloat16" or as precisions are called elsewhere, "bf16-true"."""
    import torch

    from litgpt.generate.session import PRECISIONS

    plain = None if name is None else str(name).removeprefix("torch.")
    if plain in (None, "auto"):
        return None
    if plain in DTYPES:
        return getattr(torch, plain)
    if plain in PRECISIONS:
        return PRECISIONS[plain]
    raise InputError(f"dtype {shown(name)} is not one of {', '.join(DTYPES)}{near_miss(str(plain), DTYPES)}")


def find_source(checkpoint_dir: Path, access_token: str | None) -> Source:
    """What lies there; of weights only the headers are read. The token is for data sets as well."""
    from litgpt.generate.session import Source

    if access_token is not None:
        os.environ["HF_TOKEN"] = access_token
    return Source.find(checkpoint_dir, access_token=access_token)
