"""Compiled decoding: the tokens of eager decoding, and nothing compiled twice."""

import pytest
import torch

from litgpt import byte_products, quantize
from litgpt.generate.engine import Engine
from litgpt.generate.sampling import Sampling
from litgpt.model import GPT
from tests.test_engine import lively

GREEDY = Sampling(temperature=0)
PROMPTS = [[1, 2, 3], [7] * 30, [5], [1, 2, 3, 4]]


def quantized(model: GPT, mode: str) -> GPT:
    for name, linear in list(quantize.linears(model)):
        made = quantize.MODES[mode].make(linear.weight.detach(), linear.bias)
        made.settle()
        model.set_submodule(name, made)
    return model


def answers(engine: Engine) -> list[list[int]]:
    requests = [engine.submit(ids, GREEDY, max_new_tokens=12) for ids in PROMPTS]
    while engine.busy:
        engine.step()
    return [request.new for request in requests]


# everything but code generation: what is traced, guarded and traced again does not hang on the backend
@pytest.mark.parametrize("name", ["pythia-14m", "Gemma-3-4b-it", "Mistral-7B-v0.1", "Phi-4-mini-instruct"])
def test_after_the_first_step_nothing_is_compiled_again(name, monkeypatch):
    monkeypatch.setattr("litgpt.generate.compiled.BACKEND", "eager")
    torch._dynamo.reset()
    model = lively(name, block_size=128)
    expected = answers(Engine(model, max_rows=2))
    engine = Engine(model, max_rows=2, compile=True)
    list(engine.generate([5] * 30, GREEDY, max_new_tokens=12))  # warm
    with torch._dynamo.config.patch(error_on_recompile=True):
        assert answers(engine) == expected
    assert engine.compiled.is_compiled


def test_with_room_from_the_start_growing_compiles_nothing_again(monkeypatch):
    monkeypatch.setattr("litgpt.generate.compiled.BACKEND", "eager")
    torch._dynamo.reset()
    engine = Engine(lively("pythia-14m", block_size=512), compile=True, least=300)
    list(engine.generate([1, 2], GREEDY, max_new_tokens=3))
    with torch._dynamo.config.patch(error_on_recompile=True):
        list(engine.generate([1, 2], GREEDY, max_new_tokens=200))
    assert engine.cache.max_len == 300


def test_a_lack_of_a_compiler_is_said_before_anything_is_computed(monkeypatch, capsys):
    from torch._inductor import cpp_builder, exc

    def lacking() -> str:
        raise exc.InvalidCxxCompiler

    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", lacking)
    engine = Engine(lively("pythia-14m"), compile=True)
    line = capsys.readouterr().err
    assert "C++ compiler" in line
    assert line.count("\n") == 1
    assert not engine.compiled.is_compiled
    assert len(list(engine.generate([1, 2], GREEDY, max_new_tokens=3))) == 3


def test_a_conversation_goes_on_from_what_is_held(monkeypatch):
    monkeypatch.setattr("litgpt.generate.compiled.BACKEND", "eager")
    model = lively("pythia-14m")
    engine = Engine(model, compile=True)
    ids = [1, 2, 3, *engine.generate([1, 2, 3], GREEDY, max_new_tokens=5), 9]
    request = engine.submit(ids, GREEDY, max_new_tokens=5)
    while engine.busy:
        engine.step()
    assert request.reused == 7
    assert request.new == list(Engine(model).generate(ids, GREEDY, max_new_tokens=5))


def test_real_machine_code_gives_the_same_tokens():
    model = lively("pythia-14m", n_layer=1)
    engine = Engine(model, max_rows=2, compile=True)
    assert answers(engine) == answers(Engine(model, max_rows=2))
    assert engine.compiled.is_compiled


@pytest.mark.parametrize("kernel", [byte_products.Fbgemm, byte_products.OneDnn])
def test_real_machine_code_multiplies_packed_bytes(kernel, monkeypatch, capsys):
    if not byte_products._is_right(kernel):
        pytest.skip(f"no {kernel.__name__} on this CPU, or in this torch")
    monkeypatch.setattr(byte_products, "kernel", lambda: kernel)
    model = quantized(lively("pythia-14m", n_layer=1), "torchao.int8")
    engine = Engine(model, max_rows=2, compile=True)
    assert answers(engine) == answers(Engine(model, max_rows=2))
    assert engine.compiled.is_compiled
    assert not capsys.readouterr().err


def test_4_bits_of_bitsandbytes_are_not_compiled_and_it_says_so(capsys):
    model = quantized(lively("pythia-14m", n_layer=1), "bnb.nf4")
    assert not Engine(model, compile=True).compiled.is_compiled
    assert capsys.readouterr().err.startswith("note: not compiled: bitsandbytes' 4 bits")


def test_without_a_compiler_it_goes_on_and_says_so(monkeypatch, capsys):
    def broken(graph, inputs):
        raise RuntimeError("no g++ here")

    monkeypatch.setattr("litgpt.generate.compiled.BACKEND", broken)
    torch._dynamo.reset()
    model = lively("pythia-14m")
    engine = Engine(model, max_rows=2, compile=True)
    assert answers(engine) == answers(Engine(model, max_rows=2))
    assert capsys.readouterr().err.count("note: not compiled") == 1


def test_experts_are_not_compiled_and_it_says_so(capsys):
    model = lively("Mixtral-8x7B-v0.1")
    assert answers(Engine(model, max_rows=2, compile=True)) == answers(Engine(model, max_rows=2))
    assert "experts" in capsys.readouterr().err
