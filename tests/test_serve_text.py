"""The text side of serving, without a server: calls of tools read out of answers, answers held to a form."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from litgpt.deploy import grammar, tools
from litgpt.deploy.grammar import Grammars
from litgpt.deploy.tools import HERMES, LLAMA, MISTRAL, PLAIN, Format, Reader
from litgpt.errors import InputError
from litgpt.generate.engine import Engine
from litgpt.generate.sampling import Sampling
from litgpt.prompts import from_name
from litgpt.prompts.template import ChatTemplate
from litgpt.tokenizer import Tokenizer
from tests.makers.checkpoints import random_gpt
from tests.makers.configs import shrunk
from tests.makers.tokenizers import train_tiny_tokenizer

NAMES = frozenset({"f", "g"})
F, G = '{"name": "f", "arguments": {"x": 1}}', '{"name": "g", "arguments": {}}'
CASES = {
    "hermes-one": (HERMES, f"<tool_call>\n{F}\n</tool_call>", "", ["f"]),
    "hermes-two": (HERMES, f"Well.<tool_call>{F}</tool_call>\n<tool_call>{G}</tool_call>", "Well.", ["f", "g"]),
    "hermes-text-alone": (HERMES, "a < b and <tool_box>", "a < b and <tool_box>", []),
    "hermes-unknown": (HERMES, '<tool_call>{"name": "h"}</tool_call>', '<tool_call>{"name": "h"}</tool_call>', []),
    "hermes-cut": (HERMES, '<tool_call>{"name": "f", "arg', '<tool_call>{"name": "f", "arg', []),
    "mistral": (MISTRAL, f"[TOOL_CALLS] [{F}, {G}]", "", ["f", "g"]),
    "llama-bare": (LLAMA, '{"name": "f", "parameters": {"x": 1}}', "", ["f"]),
    "llama-opened": (LLAMA, '<|python_tag|>{"name": "f", "parameters": {"x": 1}}; ' + G, "", ["f", "g"]),
    "llama-text": (LLAMA, "Numbers {1, 2}", "Numbers {1, 2}", []),
    "plain": (PLAIN, f"\n{F}", "", ["f"]),
    "plain-other-object": (PLAIN, '{"colour": "red"}', '{"colour": "red"}', []),
}  # fmt: skip


@pytest.mark.parametrize("size", [1, 3, 1000])
@pytest.mark.parametrize("case", CASES)
def test_calls_are_read_however_the_answer_is_cut(case: str, size: int) -> None:
    format, answer, text, names = CASES[case]
    reader, shown, calls = Reader(format, NAMES), "", []
    for i in range(0, len(answer), size):
        more, found = reader.push(answer[i : i + size])
        shown, calls = shown + more, calls + found
    rest, found = reader.finish()
    assert shown + rest == text
    assert [call.name for call in calls + found] == names == [call.name for call in reader.calls]
    assert all(isinstance(json.loads(call.arguments), dict) for call in reader.calls)
    assert len({call.id for call in reader.calls}) == len(names)


def test_a_call_alone_is_kept_where_only_one_may_be() -> None:
    reader = Reader(MISTRAL, NAMES, most=1)
    reader.push(f"[TOOL_CALLS][{F}, {G}]")
    reader.finish()
    assert [call.name for call in reader.calls] == ["f"]


@pytest.mark.parametrize(
    ("template", "format"),
    [
        ("{{ tools }}<tool_call>", HERMES),
        ("{{ tools }}[TOOL_CALLS]", MISTRAL),
        ("{{ tools }}<|python_tag|>", LLAMA),
        ("{{ tools }}", PLAIN),
        ("{{ messages }}", None),
    ],
)
def test_the_template_says_how_calls_are_written(template: str, format: Format | None) -> None:
    assert tools.format_of(ChatTemplate(template)) is format
    assert tools.format_of(from_name("alpaca")) is None


def test_a_guide_holds_each_row_to_its_own_form_and_leaves_others_alone(tmp_path: Path) -> None:
    tokenizer = Tokenizer(train_tiny_tokenizer(tmp_path))
    assert tokenizer.eos_id is not None
    model = random_gpt(shrunk("pythia-14m", block_size=256, vocab_size=300, padded_vocab_size=320))
    grammars = Grammars(tokenizer, [tokenizer.eos_id])
    schemas = [{"enum": ["red", "blue"]}, {"type": "array", "items": {"type": "boolean"}, "minItems": 2, "maxItems": 2}]
    ids, sampling = tokenizer.encode("The mill"), Sampling(temperature=2.0, seed=1)
    stop = [[tokenizer.eos_id]]
    free = list(Engine(model, n_tokens=tokenizer.vocab_size).generate(ids, sampling, max_new_tokens=9, stop=stop))
    engine = Engine(model, max_rows=4, n_tokens=tokenizer.vocab_size)
    held = [
        engine.submit(ids, sampling, max_new_tokens=100, stop=stop, guide=grammars.guide(grammar.of_schema(schema)))
        for schema in schemas
    ]
    beside = engine.submit(ids, sampling, max_new_tokens=9, stop=stop)
    while engine.busy:
        engine.step()
    assert json.loads(tokenizer.decode(held[0].tokens)) in ("red", "blue")
    pair = json.loads(tokenizer.decode(held[1].tokens))
    assert [type(value) for value in pair] == [bool, bool]
    assert {request.finish_reason for request in held} == {"stop"}
    assert beside.tokens == free


def test_grammars_that_cannot_be_are_refused(tmp_path: Path) -> None:
    grammars = Grammars(Tokenizer(train_tiny_tokenizer(tmp_path)), [0])
    with pytest.raises(InputError, match="zzz"):
        grammars.require(grammar.of_schema({"type": "zzz"}))
    assert grammars.guide(grammar.of_schema({"type": "integer"})).allowed(320).dtype == torch.bool
