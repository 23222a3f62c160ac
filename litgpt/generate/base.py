"""`litgpt generate`: answers to one prompt, as they come, or to a file of prompts, many at a time."""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TextIO

from litgpt.errors import InputError, MissingError, cut, harmless, one_line, shown

if TYPE_CHECKING:
    from litgpt.generate.answers import Row
    from litgpt.generate.sampling import Sampling
    from litgpt.generate.session import Messages, Session
    from litgpt.placement.sequential import Sequential
    from litgpt.placement.tensor_parallel import TensorParallel

Quantization = Literal[
    "bnb.nf4", "bnb.nf4-dq", "bnb.fp4", "bnb.fp4-dq", "bnb.int8", "torchao.int8", "torchao.int4"
]  # fmt: skip
OWN_FIELDS = ("sample", "text", "finish_reason", "prompt_tokens", "completion_tokens")  # of results, see `_line`
PROMPT = "What food do llamas eat?"
SEED = 1234


def main(
    checkpoint_dir: Path,
    prompt: str = PROMPT,
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
    seed: int = SEED,
    prompts_file: Path | None = None,
    output: Path | None = None,
    batch_size: int = 8,
    prompt_style: str | None = None,
    quantize: Quantization | None = None,
    precision: str | None = None,
    compile: bool = False,
    prepack: bool | None = None,
) -> None:
    """Generate text that answers or continues a prompt, or each prompt of a file.

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
        compile: Compile the model first: slow to start, faster from then on.
        prepack: In bf16 on a CPU, lay the weights out for its products: faster answers for as much memory again as the
            weights take. By default where memory is plenty.
    """
    answer(**locals())


def answer(
    checkpoint_dir: Path,
    prompt: str,
    *,
    sys_prompt: str | None,
    num_samples: int,
    max_new_tokens: int,
    top_k: int | None,
    top_p: float,
    temperature: float,
    min_p: float,
    repetition_penalty: float,
    presence_penalty: float,
    frequency_penalty: float,
    logit_bias: dict | None,
    stop: list[str] | None,
    seed: int,
    prompts_file: Path | None,
    output: Path | None,
    batch_size: int,
    prompt_style: str | None,
    quantize: Quantization | None,
    precision: str | None,
    compile: bool,
    prepack: bool | None = None,
    placement: Sequential | TensorParallel | None = None,
    prepare: Callable[[Session], None] | None = None,
) -> None:
    """What `litgpt generate` does, with the model on one device or on several. `prepare` is called before it begins."""
    # here, so that --help does not wait for torch
    from litgpt.generate.sampling import Sampling
    from litgpt.generate.session import conversation, load_session

    for name, number in (("num_samples", num_samples), ("batch_size", batch_size)):
        if number < 1:
            raise InputError(f"{name} is {number}; it must be 1 or more")
    bias = _token_biases(logit_bias)
    penalties = (repetition_penalty, presence_penalty, frequency_penalty)
    samplings = [
        Sampling(temperature, top_k, top_p, seed + i, min_p, *penalties, logit_bias=bias) for i in range(num_samples)
    ]
    if output is not None and output.exists():
        raise InputError(f"output {output} exists already; remove it or choose another name")
    if prompts_file is not None and prompt != PROMPT:
        raise InputError("prompt and prompts_file are both given; give one of them")
    if prompts_file is None:
        tasks = [("prompt", {"prompt": prompt}, conversation(prompt, sys_prompt))]
    else:
        tasks = list(read_prompts(prompts_file, sys_prompt, OWN_FIELDS if num_samples > 1 else OWN_FIELDS[1:]))
    session = load_session(
        checkpoint_dir,
        precision=precision,
        quantize=quantize,
        compile=compile,
        prepack=prepack,
        prompt_style=prompt_style,
        max_new_tokens=max_new_tokens,
        max_rows=min(batch_size, num_samples * max(len(tasks), 1)),
        placement=placement,
    )
    if prepare is not None:
        prepare(session)
    if prompts_file is None and output is None:
        show(session, tasks[0][2], samplings, max_new_tokens=max_new_tokens, stop=stop or ())
        return
    with _lines_to(output) as file:
        for line in answer_all(session, tasks, samplings, max_new_tokens=max_new_tokens, stop=stop or ()):
            print(_in_json(line), file=file, flush=True)
    report(session)


Task = tuple[str, dict[str, Any], "Messages"]  # where the prompt stands, what to repeat of it, what to answer


def show(
    session: Session, messages: Messages, samplings: Sequence[Sampling], *, max_new_tokens: int, stop: Sequence[str]
) -> None:
    """Print the answers to one prompt, the first one as it comes; the others are written meanwhile."""
    rows = session.start(session.encode(messages), samplings, max_new_tokens=max_new_tokens, stop=stop)
    texts, is_whole = [""] * len(rows), [False] * len(rows)
    current, lead = 0, session.lead(messages[-1]["content"])
    legible = harmless if sys.stdout.isatty() else str
    before = lead  # shown with the first piece, so that a refusal stands alone
    for index, text in session.pieces(rows):
        texts[index] += text
        is_whole[index] |= not text
        while current < len(rows) and (texts[current] or is_whole[current]):
            print(legible(before + texts[current]), end="", flush=True)
            before, texts[current] = "", ""
            if is_whole[current]:
                print(flush=True)
                current, before = current + 1, lead
    report(session)


def report(session: Session) -> None:
    engine, guesses = session.engine, ""
    if engine.drafter is not None:
        share = engine.accepted / max(engine.proposed, 1)
        guesses = f", {engine.accepted} of {engine.proposed} guessed tokens accepted ({share:.0%})"
    print(f"{session.tally}{guesses}, peak memory {session.memory()}", file=sys.stderr)


def answer_all(
    session: Session, tasks: Sequence[Task], samplings: Sequence[Sampling], *, max_new_tokens: int, stop: Sequence[str]
) -> Iterator[dict[str, Any]]:
    """The answers to many prompts, as the lines of a file, in order. Every prompt is looked at before the first answer.

    Raises InputError that names the line of a prompt that cannot be answered.
    """
    started: list[Row] = []
    for where, _, messages in tasks:
        try:
            ids = session.encode(messages)
            started += session.start(ids, samplings, max_new_tokens=max_new_tokens, stop=stop)
        except InputError as error:
            for row in started:
                session.engine.cancel(row.request)
            raise InputError(f"{where}: {error}") from None
    done, given = set(), 0
    for index, text in session.pieces(started):
        if not text:
            done.add(index)
        while given in done:
            number, sample = divmod(given, len(samplings))
            yield _line(started[given], tasks[number][1], sample if len(samplings) > 1 else None)
            given += 1


def _line(row: Row, told: dict[str, Any], sample: int | None) -> dict[str, Any]:
    line = told | ({} if sample is None else {"sample": sample}) | {"text": row.said}
    reason = "stop" if row.watch.stopped else row.request.finish_reason
    return line | {"finish_reason": reason, "prompt_tokens": len(row.request.ids), "completion_tokens": row.taken}


# ---------------------------------------------------------------------------------------------------------- the files


def read_prompts(path: Path, sys_prompt: str | None = None, own: Sequence[str] = OWN_FIELDS) -> Iterator[Task]:
    """The prompts of a file: with each what its answer repeats of it, and the conversation. Empty lines say nothing.

    Refused is a record with one of the fields in `own`, which its answer has itself.
    """
    from litgpt.generate.session import conversation

    try:
        # not splitlines: what else ends a line there, such as U+2028, JSON has in the middle of a text
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except FileNotFoundError:
        raise MissingError(f"prompts_file {path} does not exist; check the path") from None
    except UnicodeDecodeError as error:
        raise InputError(f"prompts_file {path} is not text in UTF-8 ({one_line(error)})") from None
    found = False
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        found, where = True, f"{path}:{number}"
        if path.suffix not in (".jsonl", ".json", ".ndjson"):
            yield where, {"prompt": line}, conversation(line, sys_prompt)
        else:
            told = _record(line, where)
            if taken := next((key for key in own if key in told), None):
                raise InputError(f"{where}: {shown(taken)} is a field of the results; rename it")
            yield where, told, _conversation(told, sys_prompt, where)
    if not found:
        raise InputError(f"prompts_file {path} holds no prompt; write one on each line")


def _record(line: str, where: str) -> dict[str, Any]:
    try:
        record = json.loads(line, parse_float=_finite, parse_constant=_finite)
        is_text = not _HALVES.search(json.dumps(record, ensure_ascii=False))
    except json.JSONDecodeError as error:  # its own words count lines of the one line that it saw
        raise InputError(
            f"{where} is not JSON ({error.msg} at column {error.colno}); each line is one object"
        ) from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where} is not JSON that can be repeated ({one_line(error)}); mend that line") from None
    if not is_text:
        raise InputError(f"{where} is no text: it holds half of a character that UTF-16 writes in two; write it whole")
    if not isinstance(record, dict) or ("prompt" in record) == ("messages" in record):
        raise InputError(f'{where}: {shown(record)} is no object with either "prompt" or "messages"')
    return record


def _finite(text: str) -> float:
    """The number; what JSON cannot repeat is refused: NaN, Infinity, and what rounds to it."""
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{cut(text)} is no finite number")
    return number


def _conversation(record: Mapping[str, Any], sys_prompt: str | None, where: str) -> Messages:
    from litgpt.generate.session import conversation
    from litgpt.prompts.messages import checked, with_system

    try:
        if "prompt" in record:
            return conversation(record["prompt"], sys_prompt)
        return [dict(message) for message in with_system(checked(record["messages"]), sys_prompt)]
    except (InputError, TypeError) as error:
        raise InputError(f"{where}: {error}") from None


def _in_json(line: Mapping[str, Any]) -> str:
    """The line as JSON, with escapes for all controls, also those that JSON leaves and a terminal obeys."""
    return _LATE_CONTROLS.sub(lambda found: f"\\u{ord(found[0]):04x}", json.dumps(line, ensure_ascii=False))


_LATE_CONTROLS, _HALVES = re.compile("[\x7f-\x9f]"), re.compile("[\ud800-\udfff]")


def _token_biases(logit_bias: dict | None) -> dict[int, float]:
    """Token ids and their biases; JSON writes the ids as text."""
    biases = {}
    for token, bias in (logit_bias or {}).items():
        if not str(token).isdecimal() or isinstance(bias, bool) or not isinstance(bias, (int, float)):
            raise InputError(f"logit_bias: {shown(token)}: {shown(bias)} is no token id with a number")
        biases[int(token)] = float(bias)
    return biases


@contextmanager
def _lines_to(path: Path | None) -> Iterator[TextIO]:
    """Standard output, or a file that is there once it is whole."""
    if path is None:
        yield sys.stdout
        return
    from litgpt.storage import atomic_file

    with atomic_file(path) as new, open(new, "w", encoding="utf-8") as file:
        yield file
