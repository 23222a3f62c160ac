"""`litgpt train_tokenizer`: a byte-level BPE tokenizer from the user's own text, as Hugging Face files.

Any text is encoded without loss. The one special token, `<|endoftext|>` (id 0), ends a document and is bos and eos at
once, as in GPT-2; `encode` adds it only where asked. The same text gives the same files, byte for byte. No token is
learnt across the places where a run of 2,000 or more characters with no space (or all spaces) is cut: the time that
merging takes grows fast with the length of a word.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from litgpt.data.text import read_documents, text_files
from litgpt.errors import InputError
from litgpt.storage import atomic_dir
from litgpt.tokenizer import Tokenizer

if TYPE_CHECKING:
    import tokenizers

END_OF_TEXT = "<|endoftext|>"
SMALLEST = 257  # every byte, and the end of a text
LONGEST = 2000  # characters of a word
LONG_RUN = re.compile(rf"(?<!\S)\S{{{LONGEST}}}\S*|(?<!\s)\s{{{LONGEST}}}\s*")
SETTINGS = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "bos_token": END_OF_TEXT,
    "eos_token": END_OF_TEXT,
    "add_prefix_space": False,
    "clean_up_tokenization_spaces": False,
}


def main(text: list[Path], out_dir: Path, vocab_size: int = 8192, overwrite: bool = False) -> None:
    """Train a tokenizer on your own text.

    Args:
        text: Files or folders of .txt, .md or .jsonl, each also as .gz or .zst.
        out_dir: Where to write tokenizer.json and tokenizer_config.json.
        vocab_size: Number of tokens. A short text gives fewer.
        overwrite: Replace what is in `out_dir`.
    """
    if vocab_size < SMALLEST:
        raise InputError(f"--vocab_size {vocab_size} is too small: every byte needs a token; give {SMALLEST} or more")
    files = text_files(text)
    with atomic_dir(out_dir, overwrite=overwrite) as directory:
        count = Characters(read_documents(files))
        trained = train(count, vocab_size, show_progress=sys.stdout.isatty())
        write(trained, directory)
        tokens = Tokenizer(directory).vocab_size
    if tokens < vocab_size:
        print(
            f"The text gives {tokens} tokens, fewer than --vocab_size {vocab_size}: no pair of tokens recurs any more."
        )
    print(f"Wrote a tokenizer of {tokens} tokens to {out_dir}, from {count.seen:,} characters in {len(files)} file(s).")
    print(
        f"Next: litgpt pretrain pythia-14m --tokenizer_dir {out_dir} --data TextFiles --data.train_data_path {text[0]}"
    )


class Characters:
    """Documents, counted as they pass, and cut inside words that are too long."""

    def __init__(self, documents: Iterable[str]) -> None:
        self.documents = documents
        self.seen = 0

    def __iter__(self) -> Iterator[str]:
        for document in self.documents:
            self.seen += len(document)
            yield from pieces(document)


def pieces(document: str) -> Iterator[str]:
    """The document, cut after every `LONGEST` characters of a run with no space, or of spaces."""
    start = 0
    for run in LONG_RUN.finditer(document):
        for end in range(run.start() + LONGEST, run.end(), LONGEST):
            yield document[start:end]
            start = end
    yield document[start:]


def train(documents: Iterable[str], vocab_size: int, *, show_progress: bool = False) -> tokenizers.Tokenizer:
    """A byte-level BPE over `documents`; merges only what occurs at least twice."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=show_progress,
    )
    tokenizer.train_from_iterator(documents, trainer)
    return tokenizer


def write(tokenizer: tokenizers.Tokenizer, directory: Path) -> None:
    """The two files that make a Hugging Face tokenizer."""
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = json.dumps(SETTINGS, indent=2) + "\n"
    (directory / "tokenizer_config.json").write_text(settings, encoding="utf-8")
