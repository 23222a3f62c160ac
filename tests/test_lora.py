"""Law 6: LoRA as `peft` computes it, and merged as it was. And our own: parts, tied heads, quantized bases."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from litgpt import checkpoint
from litgpt.config import Config
from litgpt.methods import base, lora, peft
from litgpt.methods.lora import LoRA, LoRALinear, Part
from litgpt.model import GPT
from litgpt.quantize import QuantizedLinear
from tests.makers.checkpoints import CONFIGS, random_gpt
from tests.makers.configs import SHAPES, shrunk
from tests.makers.methods import EVERYWHERE, IDS, METHODS, disturb, finetuned, logits

KINDS = {
    "lora": LoRA(r=4, dropout=0.0, **EVERYWHERE),
    "rslora": LoRA(r=4, alpha=3, dropout=0.0, rslora=True, **EVERYWHERE),
    "dora": LoRA(r=4, dropout=0.0, dora=True, **{**EVERYWHERE, "head": False}),
}


# ------------------------------------------------------------------------------------------------- peft as the judge


def in_peft(config: Config, method: LoRA, model: GPT, folder: Path) -> Any:
    """The `transformers` model of our base, with an adapter of the same settings, drawn by peft itself."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(checkpoint.write(folder / "base", config, model))
    described, _ = peft.export(finetuned(config, method), method, "")
    names = ("r", "lora_alpha", "target_modules", "use_rslora", "use_dora", "lora_dropout")
    return get_peft_model(theirs, LoraConfig(init_lora_weights=False, **{name: described[name] for name in names}))


def our_tensors(model: GPT, method: LoRA) -> dict[str, Tensor]:
    """What trains, under peft's names."""
    return peft.export(model, method, "")[1]


def gradients(model: GPT, method: LoRA) -> dict[str, Tensor]:
    """The gradient of what trains, under peft's names."""
    trained = [p for p in model.parameters() if p.requires_grad]
    values = [p.detach().clone() for p in trained]
    for parameter in trained:
        assert parameter.grad is not None
        parameter.data = parameter.grad
    named = our_tensors(model, method)
    for parameter, value in zip(trained, values, strict=True):
        parameter.data = value
    return named


def their_name(name: str) -> str:
    return name.replace(".default", "").removesuffix(".weight").removeprefix(peft.PREFIX)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["llama", "gemma2", "phi", "olmo2"])  # q, k and v apart: the same matrices
def test_logits_gradients_and_one_step_are_those_of_peft(name: str, kind: str, tmp_path: Path) -> None:
    from peft import get_peft_model_state_dict

    config, method = CONFIGS[name], KINDS[kind]
    theirs = in_peft(config, method, random_gpt(config), tmp_path).train()
    ours = random_gpt(config)
    tensors = {n: t for n, t in get_peft_model_state_dict(theirs).items() if "lora_" in n}
    described = theirs.peft_config["default"].to_dict()
    peft.attach(ours, {**described, "peft_type": "LORA"}, tensors, "theirs")
    for module in ours.modules():
        if isinstance(module, LoRALinear):
            module.requires_grad_(True)
            module.base.requires_grad_(False)
    torch.testing.assert_close(logits(ours), logits(theirs)[..., : config.padded_vocab_size], rtol=0, atol=2e-5)

    labels = IDS.roll(-1, 1)
    ours(IDS, targets=labels).total.div(labels.numel()).backward()
    nn.functional.cross_entropy(theirs(IDS).logits.flatten(0, 1), labels.flatten()).backward()
    mine = {their_name(n): g for n, g in gradients(ours, method).items()}
    yours = {their_name(n): p.grad for n, p in theirs.named_parameters() if p.requires_grad}
    assert mine.keys() == yours.keys()
    for key, gradient in yours.items():
        torch.testing.assert_close(mine[key], gradient, rtol=1e-3, atol=1e-5, msg=lambda m, key=key: f"{key}: {m}")

    for model in (ours, theirs):
        torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3).step()
    stepped = get_peft_model_state_dict(theirs)
    for key, tensor in our_tensors(ours, method).items():
        # Adam's first step is the gradient's sign: where that is rounding alone, the signs may differ
        near = (tensor - stepped[key].view_as(tensor)).abs()
        assert (near < 1e-5).float().mean() > 0.99, key
        assert near.max() < 3e-3, key


@pytest.mark.parametrize("dropout", [0.3])
def test_dropout_is_before_a_and_in_training_only(dropout: float) -> None:
    torch.manual_seed(0)
    linear = LoRALinear(nn.Linear(16, 8), [Part("all", 0, 8, 4, 2.0)], dropout)
    disturb(linear.requires_grad_(True), size=0.5)  # type: ignore[arg-type]
    x = torch.randn(5, 16)
    with torch.no_grad():
        clean = linear.eval()(x)
        torch.testing.assert_close(clean, nn.functional.linear(x, linear.weight, linear.bias))
        linear.train()
        torch.manual_seed(4)
        once = linear(x)
        torch.manual_seed(4)
        dropped = nn.functional.dropout(x, dropout)
        low = dropped @ linear.lora_A["all"].t() @ linear.lora_B["all"].t() * 2.0
        torch.testing.assert_close(once, linear.base(x) + low)
        mean = torch.stack([linear(x) for _ in range(4000)]).mean(0)
    torch.testing.assert_close(mean, clean, rtol=0, atol=0.15)


# ------------------------------------------------------------------------------------------------------------ merging


@pytest.mark.parametrize("method", ["lora", "lora-everywhere", "dora"])
@pytest.mark.parametrize("name", [*SHAPES[::3], "deepseek_v3"])
def test_merged_is_what_it_was(name: str, method: str) -> None:
    model = finetuned(CONFIGS[name] if name in CONFIGS else shrunk(name), METHODS[method])  # type: ignore[arg-type]
    expected = logits(model)
    state = {key: tensor.clone() for key, tensor in lora.merged_state(model).items()}

    lora.merge(model)

    assert not any(isinstance(module, LoRALinear) for module in model.modules())
    assert {key: tensor.dtype for key, tensor in model.state_dict().items()} == {k: t.dtype for k, t in state.items()}
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, state[key]), key
    plain = GPT(model.config)
    plain.load_state_dict(state)
    for merged in (model, plain.eval()):
        torch.testing.assert_close(logits(merged), expected, rtol=0, atol=5e-5)


@pytest.mark.parametrize("method", ["lora", "lora-everywhere", "dora"])
def test_merged_into_a_4_bit_base_is_what_it_was(method: str, tmp_path: Path) -> None:
    config = CONFIGS["llama"]
    directory = checkpoint.write(tmp_path / "base", config, random_gpt(config))
    model = checkpoint.load_model(directory, quantize="bnb.nf4")
    METHODS[method].attach(model)
    disturb(model).eval()
    expected = logits(model)

    state = lora.merged_state(model)
    assert not any("absmax" in name or "codes" in name for name in state)
    plain = GPT(config)
    plain.load_state_dict(dict(state))
    lora.merge(model)

    assert not any(isinstance(module, LoRALinear | QuantizedLinear) for module in model.modules())
    for merged in (model, plain.eval()):
        torch.testing.assert_close(logits(merged), expected, rtol=0, atol=5e-5)


def test_a_bf16_base_is_merged_in_fp32_and_rounded_once() -> None:
    model = finetuned_in_bf16 = random_gpt(CONFIGS["llama"], dtype=torch.bfloat16)
    LoRA().attach(model)
    disturb(finetuned_in_bf16)
    linear = model.blocks[0].attn.qkv  # type: ignore[union-attr]
    assert isinstance(linear, LoRALinear)
    exact = linear.base.weight.double()  # type: ignore[union-attr,operator]
    for part in linear.parts:
        a, b = (matrices[part.name].detach().double() for matrices in (linear.lora_A, linear.lora_B))
        exact[part.start : part.stop] += part.scale * b @ a
    merged = lora.merged_state(model)["transformer.h.0.attn.qkv.weight"]
    assert (merged == exact.bfloat16()).float().mean() > 0.999


def test_a_head_that_learns_leaves_its_embedding_alone_and_is_merged_untied(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = random_gpt(CONFIGS["gemma"])
    embedding = model.wte.weight.detach().clone()
    LoRA(head=True).attach(model)
    model(IDS, targets=IDS).total.backward()
    assert model.wte.weight.grad is None
    disturb(model).eval()
    expected = logits(model)
    merged = lora.merged_state(model)
    assert merged.config.tie_embeddings is False
    assert torch.equal(merged["transformer.wte.weight"], embedding)
    assert not torch.equal(merged["lm_head.weight"], embedding)

    directory = checkpoint.write(tmp_path / "merged", merged.config, merged.later)
    theirs = AutoModelForCausalLM.from_pretrained(directory).eval()
    lora.merge(model)
    for opened in (model, checkpoint.load_model(directory), theirs):
        torch.testing.assert_close(logits(opened), expected, rtol=0, atol=5e-5)
    assert torch.equal(model.wte.weight, embedding)


# --------------------------------------------------------------------------------------------------------- the wrapper


@pytest.mark.parametrize("dora", [False, True])
def test_parts_of_any_rows_ranks_and_scales_are_sums_over_their_rows(dora: bool) -> None:
    torch.manual_seed(0)
    plain = nn.Linear(6, 10)
    parts = [Part("x", 1, 4, 2, 0.5), Part("y", 4, 5, 3, 2.0), Part("z", 7, 9, 1, 1.0)]
    linear = LoRALinear(plain, parts, dora=dora)
    linear.reset(torch.Generator().manual_seed(0))
    disturb(linear, size=0.3)  # type: ignore[arg-type]
    weight = plain.weight.detach().clone()
    for part in parts:
        rows = weight[part.start : part.stop] + part.scale * linear.lora_B[part.name] @ linear.lora_A[part.name]
        if dora:
            rows = rows / rows.norm(dim=1, keepdim=True) * linear.lora_magnitude[part.name].unsqueeze(1)
        weight[part.start : part.stop] = rows.detach()
    x = torch.randn(3, 4, 6)
    with torch.no_grad():
        torch.testing.assert_close(linear.weight, weight)
        torch.testing.assert_close(linear(x), nn.functional.linear(x, weight, plain.bias))
        wide, terms = linear.terms(x)
        torch.testing.assert_close(wide @ terms.t() + plain.bias, linear(x))
        assert linear(x[:0]).shape == (0, 4, 10)


def test_a_is_drawn_as_peft_draws_it_and_b_is_zero() -> None:
    model = random_gpt(CONFIGS["llama"])
    LoRA(r=16, **EVERYWHERE).attach(model, torch.Generator().manual_seed(0))
    for _, _, linear in base.linears(model):
        assert isinstance(linear, LoRALinear)
        bound = 1 / math.sqrt(linear.in_features)
        for part in linear.parts:
            a = linear.lora_A[part.name]
            assert bound * 0.9 < float(a.detach().abs().max()) <= bound
            assert not linear.lora_B[part.name].any()


def test_attached_before_there_are_weights() -> None:
    from litgpt import weights

    model = weights.outline(CONFIGS["llama"])
    for method in METHODS.values():
        model = weights.outline(CONFIGS["llama"])
        method.attach(model)
        assert sum(p.numel() for p in model.parameters() if p.requires_grad) == method.trained(CONFIGS["llama"])
        assert {p.device.type for p in model.parameters()} == {"meta"}


def test_autocast_takes_fp32_matrices() -> None:
    model = finetuned(CONFIGS["llama"], METHODS["lora-everywhere"])
    exact = logits(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(logits(model).float(), exact, rtol=0, atol=0.1)
        model(IDS, targets=IDS).total.backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters() if p.requires_grad)
