"""The engine against transformers, and against itself one prompt at a time."""

import pytest
import torch
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from litgpt.config import Config
from litgpt.errors import InputError
from litgpt.generate.engine import Engine
from litgpt.generate.sampling import Sampling
from litgpt.model import GPT, grouped_to_concat
from tests.makers.configs import shrunk

GREEDY = Sampling(temperature=0)


@pytest.fixture
def model() -> GPT:
    torch.manual_seed(1)
    model = GPT(shrunk("pythia-14m")).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def alone(model: GPT, ids: list[int], **kwargs) -> list[int]:
    return list(Engine(model).generate(ids, **kwargs))


def test_greedy_text_is_that_of_transformers():
    torch.manual_seed(0)
    hf_config = GPTNeoXConfig(
        vocab_size=96, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
        max_position_embeddings=64, initializer_range=0.3, eos_token_id=None, bos_token_id=None,
    )  # fmt: skip
    theirs = GPTNeoXForCausalLM(hf_config).eval()
    config = Config.from_hf(hf_config.to_dict())
    model = GPT(config).eval()
    names = {"transformer.wte": "gpt_neox.embed_in", "transformer.ln_f": "gpt_neox.final_layer_norm"}
    for layer in range(2):
        ours, hf = f"transformer.h.{layer}.", f"gpt_neox.layers.{layer}."
        names |= {ours + "norm_1": hf + "input_layernorm", ours + "norm_2": hf + "post_attention_layernorm"}
        names |= {ours + "attn.qkv": hf + "attention.query_key_value", ours + "attn.proj": hf + "attention.dense"}
        names |= {ours + "mlp.fc": hf + "mlp.dense_h_to_4h", ours + "mlp.proj": hf + "mlp.dense_4h_to_h"}
    with torch.no_grad():
        model.lm_head.weight.copy_(theirs.get_output_embeddings().weight)
        for name, theirs_name in names.items():
            source, target = theirs.get_submodule(theirs_name), model.get_submodule(name)
            for key, tensor in source.state_dict().items():
                tensor = grouped_to_concat(tensor, config) if name.endswith("qkv") else tensor
                target.get_parameter(key).copy_(tensor)
    prompt = torch.tensor([[5, 17, 3, 88]])
    expected = theirs.generate(prompt, max_new_tokens=20, do_sample=False, pad_token_id=0)[0, 4:].tolist()
    assert alone(model, prompt[0].tolist(), sampling=GREEDY, max_new_tokens=20) == expected


def test_rows_that_join_and_leave_do_not_change_each_other(model):
    generator = torch.Generator().manual_seed(4)
    prompts = [torch.randint(0, 96, (n,), generator=generator).tolist() for n in (3, 11, 7, 1, 20)]
    budgets = [12, 3, 9, 15, 5]
    samplings = [Sampling(0.9, top_k=20, seed=i) for i in range(5)]
    expected = [
        alone(model, p, sampling=s, max_new_tokens=n) for p, s, n in zip(prompts, samplings, budgets, strict=True)
    ]

    engine = Engine(model, max_rows=3)
    requests = [engine.submit(p, s, max_new_tokens=n) for p, s, n in zip(prompts, samplings, budgets, strict=True)]
    found = {id(request): [] for request in requests}
    while engine.busy:
        for event in engine.step():
            found[id(event.request)] += event.tokens
    assert [found[id(request)] for request in requests] == expected
    assert {request.finish_reason for request in requests} == {"length"}


def test_a_cancelled_row_is_free_and_the_others_go_on(model):
    expected = alone(model, [1, 2, 3], sampling=GREEDY, max_new_tokens=10)
    engine = Engine(model, max_rows=2)
    first = engine.submit([9, 9], GREEDY, max_new_tokens=30)
    second = engine.submit([1, 2, 3], GREEDY, max_new_tokens=10)
    tokens = []
    for step in range(30):
        if step == 4:
            engine.cancel(first)
        tokens += [t for event in engine.step() if event.request is second for t in event.tokens]
    assert tokens == expected
    assert first.finish_reason == "cancelled"
    assert not engine.busy


def test_two_streams_at_once_are_each_what_they_are_alone(model):
    expected = [alone(model, p, sampling=GREEDY, max_new_tokens=8) for p in ([1, 2], [7, 8, 9])]
    engine = Engine(model, max_rows=2)
    requests = [engine.submit(p, GREEDY, max_new_tokens=8) for p in ([1, 2], [7, 8, 9])]
    while engine.busy:
        engine.step()
    assert [request.new for request in requests] == expected


def test_a_long_prompt_is_read_in_chunks(model, monkeypatch):
    prompt = list(range(40))
    expected = alone(model, prompt, sampling=GREEDY, max_new_tokens=5)
    monkeypatch.setattr("litgpt.generate.engine.PREFILL_CHUNK", 7)
    assert alone(model, prompt, sampling=GREEDY, max_new_tokens=5) == expected


def test_a_stop_sequence_ends_the_answer_and_is_not_shown(model):
    free = alone(model, [5], sampling=GREEDY, max_new_tokens=12)
    stop = free[4:6]
    cut = next(i for i in range(len(free)) if free[i : i + 2] == stop)
    engine = Engine(model)
    request = engine.submit([5], GREEDY, max_new_tokens=12, stop=[stop])
    shown = []
    while engine.busy:
        shown += [t for event in engine.step() for t in event.tokens]
    assert shown == free[:cut]
    assert request.finish_reason == "stop"


def test_limits_are_checked_before_anything_is_allocated(model):
    engine = Engine(model)
    for arguments, words in (
        (([1] * 60, None, 5), r"60.*5.*64"),
        (([1], None, -1), "-1"),
        (([1], None, 10**9), "1000000000"),
        (([], None, 5), "no tokens"),
    ):
        ids, sampling, count = arguments
        with pytest.raises(InputError, match=words):
            engine.submit(ids, sampling, max_new_tokens=count)
    assert engine.cache is None
    assert not engine.busy
    assert list(engine.generate([1], max_new_tokens=0)) == []
    assert len(list(engine.generate([1] * 60, max_new_tokens=4))) == 4


def test_the_cache_grows_with_what_is_asked(model):
    big = GPT(shrunk("pythia-14m", block_size=4096)).eval()
    engine = Engine(big)
    list(engine.generate([1, 2, 3], max_new_tokens=4))
    assert engine.cache.max_len == 64
    list(engine.generate([1, 2, 3], max_new_tokens=100))
    assert engine.cache.max_len == 128


def test_a_reader_who_walks_away_leaves_no_row_behind(model):
    engine = Engine(model)
    stream = engine.generate([1, 2], GREEDY, max_new_tokens=20)
    next(stream)
    stream.close()
    assert not engine.busy


@pytest.mark.parametrize("name", ["Phi-4-mini-instruct", "Gemma-3-4b-it"])
def test_a_text_does_not_depend_on_what_came_before_or_stands_beside_it(name):
    """Longrope turns by how long a sequence may get: by its own length, not by the cache's or a neighbour's."""
    model = GPT(shrunk(name, block_size=128)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    expected = alone(model, [1, 2, 3], sampling=GREEDY, max_new_tokens=6)
    engine = Engine(model, max_rows=2)
    list(engine.generate([5] * 90, GREEDY, max_new_tokens=20))  # the cache grows
    requests = [engine.submit(ids, GREEDY, max_new_tokens=n) for ids, n in (([1, 2, 3], 6), ([9] * 60, 30))]
    while engine.busy:
        engine.step()
    assert requests[0].new == expected


def test_a_long_prompt_does_not_hold_the_others_up(model, monkeypatch):
    monkeypatch.setattr("litgpt.generate.engine.PREFILL_CHUNK", 2)
    engine = Engine(model, max_rows=2)
    first = engine.submit([1], GREEDY, max_new_tokens=20)
    engine.step()
    second = engine.submit([7] * 30, GREEDY, max_new_tokens=3)
    silent = longest = 0
    while first.finish_reason is None:
        silent = 0 if any(event.request is first for event in engine.step()) else silent + 1
        longest = max(longest, silent)
    while engine.busy:
        engine.step()
    assert longest <= 1
    assert first.new == alone(model, [1], sampling=GREEDY, max_new_tokens=20)
    assert second.new == alone(model, [7] * 30, sampling=GREEDY, max_new_tokens=3)


def test_rows_that_no_token_has_are_neither_read_nor_drawn(model):
    engine = Engine(model, n_tokens=10)
    for seed in range(5):
        assert max(engine.generate([1], Sampling(2.0, seed=seed), max_new_tokens=20)) < 10
    with pytest.raises(InputError, match=r"token 128.*128 rows.*tokenizer"):
        engine.submit([1, 128])
