"""A model that is examined: how likely it finds texts, and what it answers. Knows no tasks.

Texts become ids, and long ones are cut, as lm-eval does it with `transformers`, so that the numbers are the same.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TextIO

import torch

from litgpt.errors import InputError, shown
from litgpt.eval.records import Journal
from litgpt.generate import scoring
from litgpt.generate.engine import Engine, Request
from litgpt.generate.sampling import Sampling
from litgpt.generate.scoring import Pair
from litgpt.model import GPT
from litgpt.prompts import PromptStyle
from litgpt.report import Bar
from litgpt.storage import inside, read_json
from litgpt.tokenizer import Tokenizer, TokenStream

USUAL_ANSWER = 256  # tokens of an answer where a task says nothing
TOP_K = 50  # of sampled answers, as `transformers` draws them unless told otherwise
AT_ONCE = 2048  # tokens that are read together: one row of so many, or of the context where that is shorter
AUTO_ROWS = {"cpu": (1, 8), "cuda": (4, 64)}  # batch_size "auto": rows of that length to read, and to answer
SHOWN_AFTER = 2.0  # seconds; what is done sooner needs no bar


class Likelihood(NamedTuple):
    """Of a text: the sum of its tokens' log-probabilities, and whether each of them is the likeliest."""

    logprob: float
    is_greedy: bool


def rows_of(batch_size: int | str) -> int | None:
    """A batch size as users write it; None: automatic.

    Raises InputError: it is neither a number from 1 on, nor `auto`, nor `auto:N`.
    """
    text = str(batch_size)
    if text.lstrip("+-").isdecimal():
        if int(text) < 1:
            raise InputError(f"batch_size is {text}; it must be 1 or more, or auto")
        return int(text)
    head, colon, times = text.partition(":")
    if head != "auto" or (colon and not times.isdecimal()):
        raise InputError(f"batch_size is {shown(text)}; it must be a number, auto, or auto:N as in auto:4")
    return None


@dataclass
class Candidate:
    """A model with its tokenizer and prompt style.

    Args:
        model: in its final place and precision.
        rows: how many answers are written at once, and how many rows of text are read; None: what suits the device.
        journal: what is known already, and where to keep what is found.
        stream: where progress is shown.
    """

    model: GPT
    tokenizer: Tokenizer
    style: PromptStyle
    rows: int | None = 1
    journal: Journal = field(default_factory=Journal)
    stream: TextIO = field(default_factory=lambda: sys.stderr)

    def __post_init__(self) -> None:
        kind = self.model.wte.weight.device.type
        reading, answering = (self.rows, self.rows) if self.rows else AUTO_ROWS.get(kind, AUTO_ROWS["cpu"])
        # over all rows of the head, those too that no token has: as lm-eval counts
        self.engine = Engine(self.model, answering)
        self.at_once = reading * min(AT_ONCE, self.max_length)

    @property
    def max_length(self) -> int:
        """Tokens of the context."""
        return self.model.config.block_size

    # -- text and ids

    @property
    def end_token(self) -> int | None:
        return self._token("eos_token", self.tokenizer.eos_id)

    @property
    def prefix_token(self) -> int:
        """What stands before a text of which nothing stands: the tokenizer's own bos, or else its eos."""
        found = self._token("bos_token", None)
        found = self.end_token if found is None else found
        found = self.tokenizer.bos_id if found is None else found
        if found is None:
            raise InputError(f"{self.tokenizer.dir}: the tokenizer names no bos_token and no eos_token to begin with")
        return found

    def _token(self, role: str, otherwise: int | None) -> int | None:
        text = self.tokenizer.special_tokens.get(role)
        return self.tokenizer.token_to_id(text) if text is not None and self.tokenizer.has_token(text) else otherwise

    def _prefix_text(self) -> str | None:
        texts = self.tokenizer.special_tokens
        return texts.get("bos_token") or texts.get("eos_token")

    def encode(self, texts: Iterable[str], *, plain: bool = False) -> dict[str, list[int]]:
        """The ids of each text. Special tokens in it are special, and the tokenizer's rule for both ends applies,
        unless the text begins with bos already, or `plain` turns it off.
        """
        found: dict[str, list[int]] = {}
        prefix = self._prefix_text()
        unique = list(dict.fromkeys(texts))
        bare = [t for t in unique if plain or (prefix and t.startswith(prefix))]
        ruled = [t for t in unique if not (plain or (prefix and t.startswith(prefix)))]
        for some, edge in ((bare, False), (ruled, None)):
            found.update(zip(some, self.tokenizer.encode_batch(some, bos=edge, eos=edge, special=True), strict=True))
        return found

    def pairs(self, texts: Sequence[tuple[str, str]]) -> list[Pair]:
        """(context, continuation) as ids: tokenised as one text, and parted where the context's ids end.

        Spaces at the end of a context belong to what follows. An empty context is the prefix token.
        """
        moved = []
        for context, continuation in texts:
            bare = context.rstrip()
            moved.append((bare, context[len(bare) :] + continuation) if context else ("", continuation))
        alone = self.encode((after for before, after in moved if not before), plain=True)
        ids = self.encode(text for before, after in moved if before for text in (before, before + after))
        found: list[Pair] = []
        for before, after in moved:
            if before:
                head = ids[before]
                found.append((head or [self.prefix_token], ids[before + after][len(head) :]))
            elif alone[after][:1] == [self.prefix_token]:
                found.append((alone[after][:1], alone[after][1:]))
            else:
                found.append(([self.prefix_token], alone[after]))
        return found

    # -- how likely texts are

    def likelihoods(self, pairs: Sequence[Pair], *, what: str = "requests") -> list[Likelihood]:
        """Of what follows in each pair of ids. What does not fit into the context is cut off at the left."""
        keys = [self.journal.key("likelihood", list(before), list(after)) for before, after in pairs]
        missing = {key: self._cut(pair) for key, pair in zip(keys, pairs, strict=True) if key not in self.journal.found}
        # texts that begin alike lie side by side; what is longest comes first: the time is not underestimated then
        in_order = sorted(missing, key=lambda key: [*missing[key][0], *missing[key][1]])
        batches, start = [], 0
        for batch in scoring.together((missing[key] for key in in_order), self.at_once):
            batches.append((in_order[start : start + len(batch)], batch))
            start += len(batch)
        batches.sort(key=lambda numbered: -max(len(before) + len(after) for before, after in numbered[1]))
        bar = Bar(len(pairs), what, done=len(pairs) - len(missing), stream=self.stream, delay=SHOWN_AFTER)
        done = len(pairs) - len(missing)
        for names, batch in batches:
            scores = self.engine.score(batch, top=1, at_once=sys.maxsize)
            found = {}
            for key, row in zip(names, scores, strict=True):
                found[key] = [math.fsum(s.logprob for s in row), all(s.top[0][0] == s.token for s in row)]
            self.journal.keep(found)
            done += len(batch)
            bar.at(done, f"{done}/{len(pairs)}")
        bar.close()
        return [Likelihood(*self.journal.found[key]) for key in keys]

    def _cut(self, pair: Pair) -> Pair:
        before, after = pair
        if len(after) > self.max_length:
            raise InputError(
                f"{shown(self.tokenizer.decode(after))} is {len(after)} tokens long, and the context of the model "
                f"{self.max_length}; leave this task out"
            )
        return before[-(self.max_length + 1 - len(after)) :], after

    # -- what it answers

    def answers(self, prompts: Sequence[tuple[str, Mapping[str, Any]]], *, what: str = "answers") -> list[str]:
        """To each prompt, with options as lm-eval's tasks write them, such as `until` and `max_gen_toks`."""
        usual, end = self._usual(), self.tokenizer.special_tokens.get("eos_token", "")
        wanted = [Wanted.of(options, usual, end) for _, options in prompts]
        ids = self.encode(text for text, _ in prompts)
        found: dict[int, str] = {}
        keys = [self.journal.key("answer", *prompt) for prompt in prompts]
        for number, (key, wants) in enumerate(zip(keys, wanted, strict=True)):
            if key in self.journal.found and wants.sampling.is_greedy:
                found[number] = self.journal.found[key]
        bar = Bar(len(prompts), what, done=len(found), stream=self.stream, delay=SHOWN_AFTER)
        left = [number for number in range(len(prompts)) if number not in found]
        rows = [self._row(number, ids[prompts[number][0]], wanted[number]) for number in left]
        rows.sort(key=lambda row: (-len(row.ids), row.ids))
        waiting, running = iter(rows), list[_Row]()
        while True:
            while len(running) < 2 * self.engine.max_rows and (row := next(waiting, None)) is not None:
                running.append(row.started(self.engine))
            if not running:
                break
            self.engine.step()
            for row in [row for row in running if row.is_over()]:
                running.remove(row)
                self.engine.cancel(row.request)
                found[row.number] = row.wants.ended(self.tokenizer.decode(row.request.new))
                if row.wants.sampling.is_greedy:
                    self.journal.keep({keys[row.number]: found[row.number]})
                bar.at(len(found), f"{len(found)}/{len(prompts)}")
        bar.close()
        return [found[number] for number in range(len(prompts))]

    def _row(self, number: int, ids: list[int], wants: Wanted) -> _Row:
        """A prompt, cut off at the left where the answer would not fit behind it."""
        room = self.max_length - wants.tokens
        if room < 1:
            raise InputError(
                f"answers of {wants.tokens} tokens (max_gen_toks) leave no room for a prompt in the context of "
                f"{self.max_length} tokens; use another task, or give max_gen_toks in the task's generation_kwargs"
            )
        ids = ids or [self.prefix_token]
        # a stop that holds a special token shows in no text
        pattern, tokenizer = self.tokenizer.hidden_pattern, self.tokenizer
        ends = [[i] for i in tokenizer.eos_ids]
        ends += [self.encode([t], plain=True)[t] for t in wants.until if pattern is not None and pattern.search(t)]
        return _Row(number, ids[-room:], wants, ends, tokenizer.stream())

    def _usual(self) -> dict[str, Any]:
        """What the checkpoint says about sampling, which `transformers` heeds as well."""
        path = inside(self.tokenizer.dir, "generation_config.json")
        said = read_json(path) if path.is_file() else {}
        return {name: said[name] for name in ("repetition_penalty", "top_k", "top_p", "min_p") if said.get(name)}

    # -- conversations

    def written(self, messages: Sequence[Mapping[str, str]], add_generation_prompt: bool = True) -> str:
        """The text of a conversation; without the prompt for an answer, the last message is one that goes on."""
        turns = [dict(message) for message in messages]
        try:
            return self._rendered(turns, add_generation_prompt)
        except InputError:  # some templates know no system
            without = [turn for turn in turns if turn["role"] != "system"]
            if len(without) == len(turns):
                raise
            return self._rendered(without, add_generation_prompt)

    def _rendered(self, messages: list[dict[str, str]], add_generation_prompt: bool) -> str:
        tokens = self.tokenizer.special_tokens
        if add_generation_prompt:
            return self.style.render(messages, tokens=tokens)
        mark = "\ue000litgpt\ue001 "  # of a private area; its space is gone where the style trims what is said
        last = {**messages[-1], "content": messages[-1]["content"] + mark}
        text = self.style.render([*messages[:-1], last], add_generation_prompt=False, tokens=tokens)
        place = text.rindex(mark.rstrip())
        return text[:place] if text[place:].startswith(mark) else text[:place].rstrip()


@dataclass(frozen=True)
class Wanted:
    """What an answer is to be like."""

    until: tuple[str, ...]
    tokens: int
    sampling: Sampling

    @staticmethod
    def of(options: Mapping[str, Any], usual: Mapping[str, Any], end: str = "") -> Wanted:
        """From a task's options, what the checkpoint says, and the text of eos, which ends an answer in any case.

        Raises InputError for an option that would change the answers and that we do not have.
        """
        given = {name: value for name, value in options.items() if value is not None}
        until = given.pop("until", [])
        names = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
        lengths = [given.pop(name) for name in names if name in given]
        temperature = float(given.pop("temperature", 0.0))
        draws = given.pop("do_sample", temperature > 0)
        shaping = {"repetition_penalty": usual.get("repetition_penalty", 1.0)}
        if draws:
            shaping |= {"top_k": usual.get("top_k", TOP_K)} | {k: usual[k] for k in ("top_p", "min_p") if k in usual}
            shaping["temperature"] = temperature or 1.0
        else:
            shaping["temperature"] = 0.0
        for name in ("repetition_penalty", "top_k", "top_p", "min_p"):
            if name in given:
                value = given.pop(name)
                shaping |= {name: value} if draws or name == "repetition_penalty" else {}
        if shaping.get("top_k") == 0:
            shaping["top_k"] = None
        for name, without_effect in (("num_beams", 1), ("num_return_sequences", 1), ("max_length", None)):
            if given.pop(name, without_effect) != without_effect:
                raise InputError(
                    f"a task asks for {name} in its generation_kwargs, which is not supported; leave it out"
                )
        until = [until] if isinstance(until, str) else list(until)
        return Wanted(
            tuple(t for t in [*until, end] if t), int(lengths[0] if lengths else USUAL_ANSWER), Sampling(**shaping)
        )

    def ended(self, text: str) -> str:
        """The text up to each of the stops, one after the other."""
        for stop in self.until:
            text = text.partition(stop)[0]
        return text


@dataclass
class _Row:
    """An answer on its way."""

    number: int
    ids: list[int]
    wants: Wanted
    ends: list[list[int]]
    words: TokenStream
    text: str = ""
    read: int = 0  # tokens of the answer whose text is there

    def started(self, engine: Engine) -> _Row:
        # a number that no one sees has to differ, or all samples of a prompt would be alike
        sampling = self.wants.sampling
        seed = None if sampling.is_greedy else int(torch.randint(2**31, ()).item())
        self.request: Request = engine.submit(
            self.ids,
            Sampling(**{**sampling.__dict__, "seed": seed}),
            max_new_tokens=self.wants.tokens,
            stop=self.ends,
        )
        return self

    def is_over(self) -> bool:
        """Whether it has ended, or one of the stops is in its text."""
        request = self.request
        while self.read < request.shown:
            self.text += self.words.push(request.new[self.read])
            self.read += 1
        return request.has_ended or any(stop in self.text for stop in self.wants.until)
