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


def train_tiny_sentencepiece(directory: Path, vocab_size: int = 330, *, config: bool = True, **settings: Any) -> Path:
    """A SentencePiece BPE model with byte fallback, laid out as Llama's: unk 0, `<s>` 1, `</s>` 2."""
    import sentencepiece

    directory.mkdir(parents=True, exist_ok=True)
    with (directory / "tokenizer.model").open("wb") as model:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(TEXT.splitlines()),
            model_writer=model,
            vocab_size=vocab_size,
            model_type="bpe",
            byte_fallback=True,
            hard_vocab_limit=False,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            minloglevel=2,
        )
    if config:
        entries = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "add_bos_token": True}
        (directory / "tokenizer_config.json").write_text(json.dumps(entries | settings), encoding="utf-8")
    return directory


def train_tiny_llama(directory: Path, vocab_size: int = 200, **settings: Any) -> Path:
    """A tokenizer.json as Llama 2's: byte fallback, and a normalizer that puts a space before every piece of text."""
    from tokenizers import Tokenizer, normalizers

    path = train_tiny_metaspace(directory, "bpe", vocab_size) / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.pre_tokenizer = None
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.save(str(path))
    entries = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>"} | settings
    (directory / "tokenizer_config.json").write_text(json.dumps(entries), encoding="utf-8")
    return directory


def train_tiny_metaspace(directory: Path, kind: str = "unigram", vocab_size: int = 200) -> Path:
    """A `unigram` or `bpe` tokenizer with Metaspace, or a `wordpiece` one, whose post-processor adds its own tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    specials = ["<unk>", "<s>", "</s>"]
    model, trainer = {
        "unigram": (
            models.Unigram(),
            trainers.UnigramTrainer(
                vocab_size=vocab_size, special_tokens=specials, unk_token="<unk>", show_progress=False
            ),
        ),
        "bpe": (
            models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True),
            trainers.BpeTrainer(
                vocab_size=vocab_size + 256,
                special_tokens=[*specials, *(f"<0x{byte:02X}>" for byte in range(256))],
                show_progress=False,
            ),
        ),
        "wordpiece": (
            models.WordPiece(unk_token="<unk>"),
            trainers.WordPieceTrainer(vocab_size=vocab_size, special_tokens=specials, show_progress=False),
        ),
    }[kind]
    tokenizer = Tokenizer(model)
    if kind == "wordpiece":
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        tokenizer.decoder = decoders.WordPiece()
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=kind == "unigram")
        llama = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        tokenizer.decoder = decoders.Sequence(llama) if kind == "bpe" else decoders.Metaspace(prepend_scheme="first")
    tokenizer.train_from_iterator(TEXT.splitlines(), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    entries = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    (directory / "tokenizer_config.json").write_text(json.dumps(entries), encoding="utf-8")
    return directory
