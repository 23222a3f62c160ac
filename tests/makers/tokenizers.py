"""Tiny tokenizers for tests, trained in milliseconds on a text that lies here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

TEXT = (
    "The river ran past the mill and the mill ran past the river's patience.\n"
    "A small model learns small words first: the, and, a, to, of, in, it, is, was.\n"
    "def add(a, b):\n    return a + b  # plain arithmetic\n"
    "Numbers such as 0, 1, 2, 10, 42 and 2026 come later; so do naïve façades and Größe.\n"
    '{"instruction": "Name a colour.", "output": "Blue, like the sky over the mill."}\n'
)
EOS = "<|endoftext|>"


def train_tiny_tokenizer(
    directory: Path, vocab_size: int = 300, *, special_tokens: tuple[str, ...] = (), **settings: Any
) -> Path:
    """A byte-level BPE tokenizer in `directory`, as Hugging Face files. `<|endoftext|>` (id 0) is bos and eos.

    Covers every byte from 257 tokens on; a smaller one knows only the characters of `TEXT`. `settings` go into
    `tokenizer_config.json` (`add_bos_token=True`, `chat_template="..."`).
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    specials = [EOS, *special_tokens]
    whole = vocab_size >= 256 + len(specials)
    alphabet = (
        {"initial_alphabet": pre_tokenizers.ByteLevel.alphabet()} if whole else {"limit_alphabet": vocab_size // 2}
    )
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=specials, show_progress=False, **alphabet)
    tokenizer.train_from_iterator([TEXT], trainer)
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": EOS, "eos_token": EOS} | settings
    (directory / "tokenizer_config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    return directory
