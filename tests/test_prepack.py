"""Weights laid out for the CPU beside the model's own: the same answers, and never those of weights that have gone."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import pytest
import torch
from torch import nn

from litgpt import LLM, cli
from litgpt.checkpoint import load_model
from litgpt.errors import InputError
from litgpt.generate.session import load_session
from litgpt.model import GPT, KVCache
from litgpt.prepack import PrepackedLinear, obstacle, prepack, prepack_as_asked
from tests.makers.checkpoints import CONFIGS, make_hf_checkpoint, random_gpt
from tests.makers.configs import shrunk
from tests.makers.tokenizers import train_tiny_tokenizer

BF16 = torch.bfloat16
needs_bf16 = pytest.mark.skipif(obstacle(BF16, "cpu") is not None, reason="this CPU does not compute in bf16")


def prompt(rows: int, length: int) -> torch.Tensor:
    return torch.randint(0, 100, (rows, length), generator=torch.Generator().manual_seed(0))


def packed(model: nn.Module) -> list[bool]:
    return [module.is_packed for module in model.modules() if isinstance(module, PrepackedLinear)]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("prepack")
    sizes = {"vocab_size": 300, "padded_vocab_size": 320}
    config = shrunk("SmolLM2-135M", **sizes)
    return make_hf_checkpoint(home / "T", config, tokenizer_dir=train_tiny_tokenizer(home / "tokenizer"), dtype=BF16)


def pair(name: str = "llama") -> tuple[GPT, GPT]:
    plain, model = (random_gpt(CONFIGS[name], dtype=BF16).eval() for _ in range(2))
    prepack(model)
    assert packed(model)
    assert all(packed(model))
    return plain, model


@needs_bf16
@pytest.mark.parametrize("name", sorted(CONFIGS))
@torch.inference_mode()
def test_a_prepacked_model_is_the_same_model(name: str) -> None:
    plain, model = pair(name)
    ids = prompt(2, 10)
    expected, cache = plain(ids), KVCache(model.config, 2, 16, dtype=BF16)
    parts = [model(ids[:, a:b], torch.arange(a, b), cache=cache) for a, b in ((0, 6), (6, 7), (7, 10))]
    torch.testing.assert_close(model(ids), expected, rtol=0.1, atol=0.1)
    torch.testing.assert_close(torch.cat(parts, 1), expected, rtol=0.1, atol=0.1)
    assert all(packed(model))
    assert {name: id(p) for name, p in model.named_parameters()}.keys() == dict(plain.named_parameters()).keys()
    for key, tensor in plain.state_dict().items():
        assert torch.equal(model.state_dict()[key], tensor), key


@needs_bf16
def test_a_weight_that_has_changed_is_the_one_that_answers() -> None:
    def step(model: GPT) -> None:
        model(prompt(1, 4)).float().sum().backward()
        torch.optim.SGD(model.parameters(), lr=0.5).step()

    def in_place(model: GPT) -> None:
        with torch.no_grad():
            model.lm_head.weight.mul_(2)

    def other_data(model: GPT) -> None:
        model.lm_head.weight.data = model.lm_head.weight.data * 2

    def behind_its_back(model: GPT) -> None:
        model.train()
        model.lm_head.weight.data.mul_(2)
        model.eval()

    def loaded(model: GPT) -> None:
        model.load_state_dict({key: tensor * 2 for key, tensor in model.state_dict().items()}, assign=True)

    for change in (step, in_place, other_data, behind_its_back, loaded):
        plain, model = pair()
        for each in (plain, model):
            change(each)
        with torch.no_grad():
            torch.testing.assert_close(model(prompt(1, 4)), plain(prompt(1, 4)), rtol=0.1, atol=0.1)
            assert not model.lm_head.is_packed  # type: ignore[operator]
            prepack(model)  # again, with the new one
            assert all(packed(model))
            torch.testing.assert_close(model(prompt(1, 4)), plain(prompt(1, 4)), rtol=0.1, atol=0.1)


@needs_bf16
def test_gradients_are_those_of_the_plain_model() -> None:
    plain, model = pair()
    for each in (plain, model):
        each(prompt(2, 6)).float().logsumexp(-1).sum().backward()
    for (name, parameter), (_, other) in zip(plain.named_parameters(), model.named_parameters(), strict=True):
        assert torch.equal(parameter.grad, other.grad), name  # type: ignore[arg-type]


@needs_bf16
@torch.no_grad()
def test_copies_pickles_and_moves_keep_the_weight() -> None:
    plain, model = pair()
    expected = plain(prompt(1, 4))
    shared = {id(tensor): tensor for tensor in model.parameters()}
    beside = copy.deepcopy(model, shared)  # shares the weights, and what is laid out
    assert all(packed(beside))
    for same in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert not any(packed(same))
        torch.testing.assert_close(same(prompt(1, 4)), expected, rtol=0.1, atol=0.1)
    assert all(packed(model.to("cpu")))  # it is there already
    torch.testing.assert_close(model.float()(prompt(1, 4)), plain.float()(prompt(1, 4)))
    assert not any(packed(model))


@needs_bf16
def test_an_llm_answers_trains_and_is_saved_as_without(directory: Path, tmp_path: Path) -> None:
    plain, llm = LLM.load(directory), LLM.load(directory, prepack=True)
    assert not packed(plain)
    assert packed(llm)
    assert all(packed(llm))
    text = torch.tensor([5, 6, 7])
    assert llm.generate(text, max_new_tokens=4, temperature=0.0, return_as_token_ids=True).shape == (4,)
    assert llm.score("The mill").total == pytest.approx(plain.score("The mill").total, rel=0.05)
    llm.save(tmp_path / "saved")
    again = load_model(tmp_path / "saved").state_dict()
    assert all(torch.equal(tensor, again[name]) for name, tensor in plain.state_dict().items())
    llm.train()
    _, loss = llm(prompt(1, 8), prompt(1, 8))
    loss.backward()
    assert not any(packed(llm))
    llm.distribute("cpu")  # placed anew, as it was loaded
    assert all(packed(llm))


@needs_bf16
def test_commands_prepack_where_it_pays(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def is_packed(**options: object) -> bool:
        return bool(packed(load_session(directory, **options).engine.model))  # type: ignore[arg-type]

    assert is_packed()
    assert is_packed(max_new_tokens=50)
    assert not is_packed(max_new_tokens=3)  # it is over before it pays
    assert is_packed(max_new_tokens=3, prepack=True)
    assert not is_packed(prepack=False)
    assert not is_packed(precision="32-true")
    assert not is_packed(quantize="torchao.int8")
    assert cli.main(["generate", str(directory), "--prompt", "The mill", "--prepack", "true"]) == 0
    assert capsys.readouterr().out.startswith("The mill")


@needs_bf16
@pytest.mark.parametrize("copied", [False, True])
@pytest.mark.parametrize("has_bias", [False, True])
def test_a_compiled_graph_asks_for_what_is_laid_out_and_hears_of_changes(has_bias: bool, copied: bool) -> None:
    torch._dynamo.reset()
    plain = nn.Linear(32, 48, bias=has_bias, dtype=BF16)
    linear = PrepackedLinear(plain).eval()
    asked: list[int] = []
    product = linear.product
    if copied:
        linear = pickle.loads(pickle.dumps(linear))  # and nothing is laid out any more
    else:
        linear.product = lambda x: asked.append(1) or product(x)  # type: ignore[method-assign]
    step = torch.compile(linear, fullgraph=True)
    x = torch.randn(3, 5, 32).to(BF16)
    with torch.no_grad():
        torch.testing.assert_close(step(x), plain(x), rtol=0.02, atol=0.02)
        before = step(x)
        for weight in {linear.weight, plain.weight}:
            weight.neg_()
        torch.testing.assert_close(step(x), plain(x), rtol=0.02, atol=0.02)
        assert not torch.allclose(step(x), before)
    assert len(asked) == (0 if copied else 4)
    y = step(x.requires_grad_())
    y.float().sum().backward()
    assert x.grad is not None


def test_what_cannot_be_prepacked_is_refused(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for options, reason in (
        ({"precision": "32-true"}, "float32"),
        ({"quantize": "torchao.int8"}, "torchao.int8 has a layout of its own"),
    ):
        with pytest.raises(InputError, match=rf"^prepack cannot be had here: .*{reason}.*; leave it out$"):
            load_session(directory, prepack=True, **options)  # type: ignore[arg-type]
        with pytest.raises(InputError, match=reason):
            LLM.load(directory, prepack=True, **options)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="on a CPU"):
        prepack_as_asked(random_gpt(CONFIGS["llama"]).to("meta"), True)
    with pytest.raises(InputError, match="on one device"):
        prepack_as_asked(random_gpt(CONFIGS["llama"]), True, is_spread=True)
    assert cli.main(["generate", str(directory), "--precision", "32-true", "--prepack", "true"]) == 2
    assert "prepack cannot be had here" in capsys.readouterr().err


@needs_bf16
def test_prepacking_leaves_memory_to_others(monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_gpt(CONFIGS["llama"], dtype=BF16)
    need = sum(module.weight.nbytes for module in model.modules() if type(module) is nn.Linear)
    free = iter((2 * need - 2, need - 1, 2 * need))
    monkeypatch.setattr("litgpt.prepack.available_memory", lambda: next(free))
    prepack_as_asked(model, None)
    assert not packed(model)
    with pytest.raises(InputError, match=r"it takes .* of memory more, .* is free"):
        prepack_as_asked(model, True)
    prepack_as_asked(model, False)
    assert not packed(model)
    prepack_as_asked(model, None)
    assert all(packed(model))
    assert packed(model)
