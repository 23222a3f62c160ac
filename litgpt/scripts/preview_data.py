"""`litgpt preview_data`: finetuning samples as a model would see them, before any model is loaded."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

from litgpt.args import TrainArgs
from litgpt.config import Config
from litgpt.data.base import DataModule
from litgpt.errors import InputError
from litgpt.tokenizer import Tokenizer

if TYPE_CHECKING:
    import numpy as np

    from litgpt.data.packing import Cut
    from litgpt.data.sft import SFT

OPEN, CLOSE = "[[", "]]"  # around what is learnt
COLOUR, PLAIN = "\x1b[32m", "\x1b[0m"
STEPS = 20  # for which the padding is worked out


def main(
    checkpoint_dir: Path,
    data: DataModule | None = None,
    num_samples: int = 3,
    train: TrainArgs = TrainArgs.as_default(global_batch_size=16, micro_batch_size=1, epochs=1),
) -> None:
    """Show finetuning samples as a model would see them: what is trained on stands in [[ ]].

    Only the tokenizer and the config of the checkpoint are read.

    Args:
        checkpoint_dir: A checkpoint directory, or its name below checkpoints/.
        data: The samples, such as JSON.
        num_samples: How many to show.
        train: Of these, max_seq_length, global_batch_size and micro_batch_size matter.
    """
    from litgpt.report import table

    if data is None:
        raise InputError("data is missing; for instance --data JSON --data.json_path my.json")
    if num_samples < 0:
        raise InputError(f"num_samples is {num_samples}; it must be 0 or more")
    directory = _directory(checkpoint_dir)
    opened = _opened(data, directory, train)
    for i in range(min(num_samples, len(opened.train_samples))):
        print(_sample(opened, i, Tokenizer(directory), sys.stdout.isatty()), end="\n\n")
    print(table(_statistics(opened, train)))
    for line in opened.notes():
        print(f"note: {line}")


def _directory(path: Path) -> Path:
    for place in (path, Path("checkpoints") / path):
        if place.is_dir():
            return place
    from litgpt.checkpoint import find  # what it says takes torch

    return find(path)


def _opened(data: DataModule, directory: Path, train: TrainArgs) -> SFT:
    from litgpt.data.sft import SFT

    if not isinstance(data, SFT):
        raise InputError(f"data {type(data).__name__} is for pretraining; its rows are plain text")
    context = Config.from_checkpoint(directory).block_size
    data.connect(Tokenizer(directory), train.micro_batch_size, train.max_seq_length or context)
    data.prepare_data()
    refusal: InputError | None = None
    if train.max_seq_length is None:
        try:
            data.require_fit(context)
        except InputError as error:
            refusal = error
    data.setup()  # raises what stops a preview, too
    if refusal is not None:
        print(f"note: a finetune would refuse this: {refusal}")
    return data


def _sample(data: SFT, index: int, tokenizer: Tokenizer, in_colour: bool) -> str:
    tokens = data.train_samples[index]
    learnt = int((tokens[1:] >= 0).sum())
    before, after = (f"{COLOUR}{OPEN}", f"{CLOSE}{PLAIN}") if in_colour else (OPEN, CLOSE)
    runs = groupby(_pieces(tokens, tokenizer), key=lambda piece: piece[1])
    texts = (("".join(text for text, _ in run), is_learnt) for is_learnt, run in runs)
    body = "".join(f"{before}{text}{after}" if is_learnt else text for text, is_learnt in texts)
    return f"--- {data.where(index)}: {len(tokens)} tokens, {learnt} trained on\n{body}"


def _pieces(tokens: np.ndarray, tokenizer: Tokenizer) -> Iterator[tuple[str, bool]]:
    """The text of each token, special ones as they are spelled, and whether it is learnt; the first never is."""
    spelled = {tokenizer.token_to_id(token): token for token in tokenizer.hidden_tokens}
    stream, is_learnt = tokenizer.stream(), False
    for place, token in enumerate(tokens.tolist()):
        is_learnt = token >= 0 and place > 0
        token_id = token if token >= 0 else ~token
        text = stream.flush() + spelled[token_id] if token_id in spelled else stream.push(token_id)
        yield _printable(text), is_learnt
    yield _printable(stream.flush()), is_learnt


def _printable(text: str) -> str:
    """The text without what a terminal would obey."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text)


def _statistics(data: SFT, train: TrainArgs) -> dict[str, str]:
    from litgpt.report import quantity

    cut, val = data.train_samples, data.val_samples
    tokens = int(cut.positions.sum()) + len(cut)
    learnt = int(cut.samples.learnt(cut.length).sum())
    most = int(cut.samples.lengths.max())
    return {
        "prompt style": data.style().name,
        "records": f"{len(cut):,} to train on, {len(val):,} validate",
        "tokens": f"{quantity(tokens)}, {100 * learnt / tokens:.0f}% of them trained on",
        "longest record": f"{most:,} tokens; the mean is {tokens / len(cut):.0f}",
        "padding": f"{_padding(data, cut, train):.1%} of the rows, with train.global_batch_size "
        f"{train.global_batch_size} and train.micro_batch_size {train.micro_batch_size}"
        + ("" if data.packing else ", without packing"),
    }


def _padding(data: SFT, cut: Cut, train: TrainArgs) -> float:
    """The share of padding in some steps over the records as they come."""
    from litgpt.data.packing import size

    plan, step = data.planner(), train.global_batch_size
    lengths: Sequence[int] = cut.positions[: STEPS * step].tolist()
    chunks = [lengths[first : first + step] for first in range(0, len(lengths), step)]
    sizes = [size(batch, chunk) for chunk in chunks for batch in plan(chunk)[0]]
    return 1 - sum(filled for _, filled in sizes) / sum(positions for positions, _ in sizes)
