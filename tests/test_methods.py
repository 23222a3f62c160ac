"""Law 5 for every finetuning method: fresh it is its base, and exactly what trains moves."""

from __future__ import annotations

import pickle
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from litgpt import checkpoint
from litgpt.config import Config
from litgpt.errors import InputError
from litgpt.methods import base
from litgpt.methods.adapter import Adapter
from litgpt.methods.adapter_v2 import AdapterV2
from litgpt.methods.base import Method
from litgpt.methods.full import Full
from litgpt.methods.lora import LoRA
from litgpt.model import GPT, KVCache
from tests.makers.checkpoints import CONFIGS, random_gpt
from tests.makers.configs import SHAPES, shrunk
from tests.makers.methods import IDS, METHODS, disturb, finetuned, logits

# every distinct set of switches for the methods that touch most of a model, one of each family for all
CASES = [(name, shrunk(name), method) for name in SHAPES for method in ("lora-everywhere", "adapter_v2")]
CASES += [(name, config, method) for name, config in CONFIGS.items() for method in METHODS]
LLAMA = CONFIGS["llama"]


def copied(model: GPT) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict(keep_vars=False).items()}


def train(model: GPT, steps: int = 2) -> None:
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2, weight_decay=0.0)
    for _ in range(steps):
        optimizer.zero_grad()
        model(IDS, targets=IDS.roll(-1, 1)).total.backward()
        optimizer.step()


def quantized(config: Config, folder: Path) -> GPT:
    return checkpoint.load_model(checkpoint.write(folder / "base", config, random_gpt(config)), quantize="bnb.nf4")


def require_two_steps_move_what_trains_alone(model: GPT) -> None:
    trained = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    trains = {name for name, tensor in model.state_dict(keep_vars=True).items() if id(tensor) in trained}
    before = copied(model)
    train(model.train())
    moved = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert moved == trains


@pytest.mark.parametrize(("config", "method"), [pytest.param(*case[1:], id=f"{case[0]}-{case[2]}") for case in CASES])
def test_a_fresh_method_is_its_base_and_two_steps_move_what_trains_and_nothing_else(
    config: Config, method: str
) -> None:
    model = random_gpt(config)
    expected = logits(model)

    METHODS[method].attach(model, torch.Generator().manual_seed(1))

    torch.testing.assert_close(logits(model), expected, rtol=0, atol=0 if method != "dora" else 1e-5)
    counted = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert METHODS[method].trained(config) == counted
    require_two_steps_move_what_trains_alone(model)


@pytest.mark.parametrize("method", [name for name in METHODS if name != "full"])
@pytest.mark.parametrize("name", ["llama", "deepseek_v3"])
def test_every_method_stands_on_a_quantized_base(name: str, method: str, tmp_path: Path) -> None:
    model = quantized(CONFIGS[name], tmp_path)
    expected = logits(model)

    METHODS[method].attach(model, torch.Generator().manual_seed(1))

    torch.testing.assert_close(logits(model), expected, rtol=0, atol=0 if method != "dora" else 1e-5)
    require_two_steps_move_what_trains_alone(model)


@pytest.mark.parametrize("method", [name for name in METHODS if name != "full"])
@pytest.mark.parametrize("name", ["llama", "phi"])  # with each kind of norm
def test_what_is_added_to_a_bf16_base_is_fp32_and_small_steps_count(name: str, method: str) -> None:
    model = random_gpt(CONFIGS[name], dtype=torch.bfloat16)
    expected = logits(model)
    METHODS[method].attach(model, torch.Generator().manual_seed(1))

    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert logits(model).dtype == torch.bfloat16
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=0.1 if method == "dora" else 0.03)
    require_two_steps_move_what_trains_alone(model)


@pytest.mark.parametrize("method", [name for name in METHODS if name != "full"])
def test_the_generator_alone_decides_what_is_drawn(method: str) -> None:
    drawn = []
    for number, seed in ((1, 5), (2, 5), (3, 6)):
        torch.manual_seed(number)
        model = random_gpt(LLAMA)
        METHODS[method].attach(model, torch.Generator().manual_seed(seed))
        drawn.append(torch.cat([p.detach().flatten() for p in model.parameters() if p.requires_grad]))
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


@pytest.mark.parametrize("method", METHODS)
def test_a_method_is_plain_values(method: str) -> None:
    chosen = METHODS[method]
    assert pickle.loads(pickle.dumps(chosen)) == chosen
    settings = yaml.safe_load(yaml.safe_dump(chosen.settings()))
    assert type(chosen)(**settings) == chosen


@pytest.mark.parametrize("method", ["lora-everywhere", "dora", "adapter", "adapter_v2"])
@pytest.mark.parametrize("name", ["llama", "gemma3", "falcon", "deepseek_v3"])  # windows, groups, latents
def test_token_by_token_and_packed_are_as_in_one_piece(name: str, method: str) -> None:
    config = CONFIGS[name]
    model = finetuned(config, METHODS[method])
    whole = logits(model)
    with torch.no_grad():
        cache = KVCache(config, 2, IDS.size(1))
        parts = [model(IDS[:, :5], torch.arange(5), cache=cache)]
        parts += [model(IDS[:, t : t + 1], torch.arange(t, t + 1), cache=cache) for t in range(5, IDS.size(1))]
        torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=0, atol=2e-5)

        row = torch.cat((IDS[:1, :7], IDS[1:, :5]), dim=1)
        doc_ids = torch.tensor([[0] * 7 + [1] * 5])
        positions = torch.cat((torch.arange(7), torch.arange(5))).unsqueeze(0)
        packed = model(row, positions, doc_ids=doc_ids)
    torch.testing.assert_close(packed[:, :7], whole[:1, :7], rtol=0, atol=2e-5)
    torch.testing.assert_close(packed[:, 7:], whole[1:, :5], rtol=0, atol=2e-5)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["llama", "gemma2", "phi"])  # untied; tied and soft-capped; with a bias on the head
def test_the_loss_inside_the_forward_is_that_of_the_logits(name: str, method: str) -> None:
    model = finetuned(CONFIGS[name], METHODS[method]).train()
    targets = IDS.roll(-1, 1)
    torch.manual_seed(3)  # the same dropout
    loss = model(IDS, targets=targets).total
    torch.manual_seed(3)
    expected = torch.nn.functional.cross_entropy(model(IDS).flatten(0, 1), targets.flatten(), reduction="sum")
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize("method", ["lora-everywhere", "dora", "adapter", "adapter_v2"])
def test_gradient_checkpointing_changes_no_gradient(method: str) -> None:
    model = finetuned(LLAMA, METHODS[method])  # no dropout
    gradients = []
    for checkpointing in (False, True):
        model.gradient_checkpointing = checkpointing
        model.zero_grad()
        model(IDS, targets=IDS).total.backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)


def naive_prefix(model: GPT, layer: int, x: Tensor) -> Tensor:
    """What a layer's queries gather from its prefix, as the formula stands."""
    attention: Any = model.blocks[layer].attn
    shared = model.share(IDS, None, None, None)
    q, _, _ = attention.project(x, shared)
    rows = attention.qkv(attention.prefix.embedding).unflatten(-1, (-1, attention.head_size))  # (P, heads, hs)
    k, v = rows[:, attention.n_head :].split(attention.n_groups, dim=1)
    k, v = (t.repeat_interleave(attention.n_head // attention.n_groups, dim=1).transpose(0, 1) for t in (k, v))
    weights = (q @ k.transpose(-2, -1) * attention.scale).softmax(dim=-1)
    return attention.prefix.gate.view(1, -1, 1, 1) * (weights @ v)


@pytest.mark.parametrize("name", ["llama", "falcon"])
def test_a_prefix_is_attended_to_as_the_paper_says(name: str) -> None:
    model = finetuned(CONFIGS[name], Adapter(prompt_length=4, start_layer=1))
    x = torch.randn(2, 12, model.config.n_embd)
    attention: Any = model.blocks[1].attn
    with torch.no_grad():
        expected = naive_prefix(model, 1, x)
        found = attention.prefix(
            attention, attention.project(x, shared := model.share(IDS, None, None, None))[0], shared
        )
    torch.testing.assert_close(found, expected)
    assert model.blocks[0].attn.prefix is None


@pytest.mark.parametrize(
    ("method", "words"),
    [
        (LoRA(r=0), "lora_r is 0, must be 1 or more"),
        (LoRA(r=True), "lora_r is True"),
        (LoRA(alpha=0), "lora_alpha is 0, must be a number above 0; 16 is usual"),
        (LoRA(alpha=float("nan")), "lora_alpha is nan"),
        (LoRA(dropout=1.0), "lora_dropout is 1.0, must be at least 0 and less than 1"),
        (LoRA(query=False, value=False), "would train nothing: set one of lora_query, lora_key,"),
        (Adapter(), "adapter_start_layer is 2, but the model has 2 layers, from 0 on.*at most 1"),
        (Adapter(prompt_length=0), "adapter_prompt_length is 0, must be a whole number from 1 on"),
        (AdapterV2(start_layer=-1), "adapter_start_layer is -1, must be a whole number from 0 on"),
    ],
)
def test_values_that_make_no_sense_are_refused_before_anything_is_built(method: Method, words: str) -> None:
    with pytest.raises(InputError, match=words) as error:
        method.check(LLAMA)
    assert "\n" not in str(error.value)


def test_a_model_is_wrapped_once() -> None:
    model = finetuned(LLAMA, LoRA())
    with pytest.raises(InputError, match="wrapped by a finetuning method already"):
        AdapterV2().attach(model)


def test_a_quantized_model_is_not_finetuned_in_full(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=re.escape("attn.qkv is quantized and cannot be trained; use finetune_lora")):
        Full().attach(quantized(LLAMA, tmp_path))


def test_tensors_that_do_not_fit_are_named() -> None:
    model = finetuned(LLAMA, Adapter(start_layer=1))
    tensors = base.trained(model)
    first, second = tensors
    wrong = {first: tensors[first][:3], "transformer.h.7.attn.prefix.gate": tensors[second]}
    with pytest.raises(
        InputError, match=r"1 missing: .*gate; 1 not of this model: .*h\.7.*; 1 of another shape: .*emb"
    ):
        base.fill(model, wrong, "here")


@pytest.mark.parametrize("method", [name for name in METHODS if name != "full"])
def test_what_was_trained_is_put_back_by_name(method: str) -> None:
    model, fresh = finetuned(LLAMA, METHODS[method]), random_gpt(LLAMA)
    METHODS[method].attach(fresh)
    base.fill(fresh, base.trained(model), "here")
    torch.testing.assert_close(logits(fresh.eval()), logits(model), rtol=0, atol=0)
    assert not torch.equal(logits(disturb(fresh, seed=9)), logits(model))
