"""`litgpt validate`: what lies in a checkpoint directory, whether it holds together, what can be done with it.

An adapter holds together with its base model: both are checked, and that the one goes onto the other.
"""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from litgpt import estimate, families
from litgpt.config import Config
from litgpt.errors import InputError, near_miss
from litgpt.storage import MANIFEST, verify

if TYPE_CHECKING:
    from litgpt.adapters import AdapterDir
    from litgpt.checkpoint import Checkpoint
    from litgpt.generate.session import Source
    from litgpt.tokenizer import Tokenizer

# name -> bytes of a weight, precision of a training
DTYPES = {"float32": (4, "32-true"), "bfloat16": (2, "bf16-true"), "float16": (2, "16-true")}
SHOWN_TOKENS = 2048  # of the one sequence for which memory is estimated
AGAIN = "copy or download it again, or use another checkpoint"
TALKING = ("chat", "generate", "serve", "evaluate")  # what a model with a tokenizer is good for


def main(checkpoint_dir: Path, dtype: str = "float32", training: bool = False) -> None:
    """Check the files of a checkpoint: their sizes, every tensor, the tokenizer; and tell what can be done with it.

    Args:
        checkpoint_dir: Directory of a checkpoint or an adapter, or its name below checkpoints/.
        dtype: Of the weights whose memory is estimated: float32, bfloat16 or float16.
        training: Estimate a training step of all weights, too.
    """
    if dtype not in DTYPES:
        raise InputError(f"--dtype {dtype} is not one of {', '.join(DTYPES)}{near_miss(dtype, DTYPES)}")
    from litgpt import adapters
    from litgpt.checkpoint import find
    from litgpt.generate.session import Source
    from litgpt.report import table

    directory = find(checkpoint_dir)
    if adapters.find(checkpoint_dir) is not None:
        source = Source.find(checkpoint_dir)
        directory, rows, commands = _adapted(source, _checked_adapter(source), dtype, training)
    else:
        verify(directory, full=True)
        opened = _checked_model(directory)
        tokenizer = _checked_tokenizer(directory, opened.config)
        rows = _contents(opened) | _words(directory, opened.config, tokenizer) | _memory(opened.config, dtype, training)
        commands = _commands(opened, tokenizer)
    print(f"{directory}\n{table(rows)}\n\nEvery file holds together. What can be done with it:\n")
    print("\n".join(f"  {command}" for command in commands))


# ------------------------------------------------------------------------------------------------------------ checks


def _checked_model(directory: Path) -> Checkpoint:
    """All tensors are there, in the shapes of the config, and finite."""
    from litgpt.scripts.source import LIT_MODEL, open_lit_model, open_model, require_finite

    opened = open_model(directory)
    both = [opened]
    if (directory / LIT_MODEL).is_file() and all(file.path.name != LIT_MODEL for file in opened.files):
        both.append(open_lit_model(directory))  # it lies beside
    for model in both:
        model.tensors()  # compares names and shapes, and a tied head
        for file in model.files:
            _require_intact(file.path)
        require_finite(model.files, directory)
    _run_state(directory)
    return opened


def _checked_adapter(source: Source) -> int:
    """Adapter and base are whole and finite, and one goes onto the other; how many numbers the adapter adds."""
    from litgpt import adapters, weights
    from litgpt.checkpoint import load_model
    from litgpt.scripts.source import require_finite

    adapter, base = source.adapter, source.checkpoint
    assert adapter is not None
    for directory in (adapter.home, base.dir):
        verify(directory, full=True)
    file = weights.open_file(adapter.file)
    _require_intact(adapter.file)
    require_finite([file], adapter.home)
    _checked_model(base.dir)
    adapters.attach(load_model(base), adapter)
    _run_state(adapter.home)
    return sum(entry.shape.numel() for entry in file.entries.values())


def _run_state(directory: Path) -> dict[str, Any]:
    """Of the run that can go on from here; {} where none can."""
    from litgpt.checkpoint import RUN_STATE, TRAINING_STATE, read_run_state

    return read_run_state(directory) if (directory / TRAINING_STATE / RUN_STATE).exists() else {}


def _require_intact(path: Path) -> None:
    """The records of a `.pth` or `.bin` file have the checksums that were written with them."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            if record := archive.testzip():
                raise InputError(f"{path} is damaged: its record {record} has another checksum; {AGAIN}")


def _checked_tokenizer(directory: Path, config: Config) -> Tokenizer | None:
    """It can be read, and the model has a row for each of its tokens."""
    from litgpt.scripts.source import has_tokenizer
    from litgpt.tokenizer import Tokenizer

    if not has_tokenizer(directory):
        return None
    tokenizer = Tokenizer(directory)
    rows = config.padded_vocab_size or 0
    largest = max(tokenizer.vocab_size - 1, tokenizer.bos_id or 0, *tokenizer.eos_ids, 0)
    if largest >= rows:
        raise InputError(
            f"{directory}: the tokenizer has ids up to {largest}, but the model has rows for {rows} tokens only; "
            "one of them belongs to another model"
        )
    tokenizer.encode("Is this text?")
    return tokenizer


# ------------------------------------------------------------------------------------------------------------- words


def _adapted(source: Source, added: int, dtype: str, training: bool) -> tuple[Path, dict[str, str], list[str]]:
    """The adapter's directory, what to say of it, and the command lines that take it."""
    adapter, base = source.adapter, source.checkpoint
    assert adapter is not None
    tokenizer = _checked_tokenizer(source.directory, base.config) or _checked_tokenizer(base.dir, base.config)
    about = _contents(base)
    rows = {
        "kind": _kind_of_adapter(adapter),
        "trained": f"{added:,} numbers ({adapter.file.relative_to(adapter.home)})",
        "base model": f"{base.dir} ({about.pop('kind')})",
    }
    rows |= about | _words(adapter.home, base.config, tokenizer) | _memory(base.config, dtype, training)
    place = source.place
    commands = [f"litgpt {name} {place}" for name in TALKING if tokenizer is not None]
    if adapter.method == "lora":
        commands.append(f"litgpt merge_lora {place}")
    return place, rows, [*commands, *_going_on(adapter.home)]


def _kind_of_adapter(adapter: AdapterDir) -> str:
    from litgpt.checkpoint import TRAINING_STATE

    form = {"peft": "in PEFT's format", "litgpt": "in LitGPT's format", "0.5": "in the format of LitGPT 0.5"}
    training = ", with the state of a training run" if (adapter.home / TRAINING_STATE).is_dir() else ""
    return f"adapter ({adapter.method}) {form[adapter.kind]}{training}{_sums(adapter.home)}"


def _contents(opened: Checkpoint) -> dict[str, str]:
    from litgpt.estimate import in_words
    from litgpt.report import quantity

    config, count = opened.config, estimate.parameters(opened.config)
    n_bytes = sum(entry.nbytes for file in opened.files for entry in file.entries.values())
    active = f", {quantity(count.active)} of them active per token" if count.active != count.total else ""
    return {
        "kind": _kind(opened),
        "family": " ".join(
            filter(None, [config.family or "none of Hugging Face's", config.name and f"({config.name})"])
        ),
        "parameters": f"{count.total:,} ({quantity(count.total)}){active}",
        "weights": f"{str(opened.dtype).removeprefix('torch.')}, {in_words(n_bytes)} in {len(opened.files)} file(s)",
        "context": f"{config.block_size:,} tokens",
        "vocabulary": f"{config.vocab_size:,} tokens, {config.padded_vocab_size:,} rows",
    }


def _kind(opened: Checkpoint) -> str:
    from litgpt.checkpoint import TRAINING_STATE
    from litgpt.scripts.source import LIT_MODEL

    first = opened.files[0].path
    kinds = {LIT_MODEL: "LitGPT 0.5's lit_model.pth", ".bin": "Hugging Face directory, weights as pickles"}
    kind = kinds.get(first.name) or kinds.get(first.suffix) or "Hugging Face directory"
    if not (opened.dir / "config.json").is_file() and first.name != LIT_MODEL:
        kind = "LitGPT's own names of tensors, no config.json"
    training = ", with the state of a training run" if (opened.dir / TRAINING_STATE).is_dir() else ""
    return kind + training + _sums(opened.dir)


def _sums(directory: Path) -> str:
    return ", every sha256 as listed" if (directory / MANIFEST).is_file() else ", no list of checksums"


def _words(directory: Path, config: Config, tokenizer: Tokenizer | None) -> dict[str, str]:
    if tokenizer is None:
        return {"tokenizer": "none (put tokenizer.json or tokenizer.model here to generate text)"}
    from litgpt import prompts

    style = prompts.choose(directory, tokenizer, families.prompt_for(config.name))
    name = getattr(style, "name", None) or "the checkpoint's own chat template"
    ends = ", ".join(map(str, tokenizer.eos_ids)) or "none"
    files = ", ".join(path.name for path in tokenizer.files())
    return {
        "tokenizer": f"{tokenizer.vocab_size:,} tokens, ends with id {ends} ({files})",
        "prompt style": str(name),
    }


def _memory(config: Config, dtype: str, training: bool) -> dict[str, str]:
    tokens = min(config.block_size, SHOWN_TOKENS)
    shown = dict.fromkeys(["float32", "bfloat16", dtype])
    sizes = {name: estimate.inference_memory(config, DTYPES[name][0], 1, tokens).total for name in shown}
    rows = {"memory to run": ", ".join(f"{name} {estimate.in_words(n)}" for name, n in sizes.items())}
    if training:
        need = estimate.training_memory(config, 1, tokens, DTYPES[dtype][1]).total
        rows["memory to train"] = f"{dtype} {estimate.in_words(need)} (all weights, AdamW, micro batch of one)"
    return rows | {
        "": f"with a sequence of {tokens:,} tokens; free here: {estimate.in_words(estimate.available_memory())}"
    }


def _commands(opened: Checkpoint, tokenizer: Tokenizer | None) -> list[str]:
    """The command lines that take the directory as it is."""
    from litgpt.checkpoint import TRAINING_STATE
    from litgpt.scripts.source import LIT_MODEL

    directory, is_lit = opened.dir, (opened.dir / LIT_MODEL).is_file()
    talking = (*TALKING, "finetune") if tokenizer is not None else ()
    wanted = {name: f"litgpt {name} {directory}" for name in talking}
    if opened.files[0].path.name != LIT_MODEL:
        wanted["convert_to_litgpt"] = f"litgpt convert_to_litgpt {directory}"
    if is_lit and opened.config.family:
        wanted["convert_from_litgpt"] = f"litgpt convert_from_litgpt {directory} --output_dir DIR"
    if (directory / TRAINING_STATE).is_dir():
        wanted["convert_pretrained_checkpoint"] = f"litgpt convert_pretrained_checkpoint {directory} --output_dir DIR"
    return [*wanted.values(), *_going_on(directory)]


def _going_on(directory: Path) -> list[str]:
    """The command line with which the run that wrote the directory goes on, where it can."""
    state = _run_state(directory)
    if not state or state.get("complete"):
        return []
    facts = state.get("facts", {})  # only a finetune starts from a checkpoint_dir
    command = f"finetune_{facts.get('method.name')}" if "checkpoint_dir" in facts else "pretrain"
    return [f"litgpt {command} ... --resume {directory}"]
