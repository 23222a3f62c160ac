"""Quantized linears against the packages whose numbers they claim, and models quantized while they are read."""

from __future__ import annotations

import copy
import pickle
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from litgpt import byte_products, checkpoint, estimate, quantize, weights
from litgpt.checkpoint import load_model
from litgpt.errors import InputError
from litgpt.generate.engine import Engine
from litgpt.generate.sampling import Sampling
from litgpt.model import KVCache, LLaMAMLP
from litgpt.placement.base import OneDevice
from litgpt.quantize import (
    MODES,
    Linear4bit,
    Linear4bitGroups,
    Linear8bit,
    QuantizedLinear,
    linears,
)
from tests.makers.checkpoints import CONFIGS, hf_model, make_hf_checkpoint, random_gpt
from tests.makers.configs import shrunk
from tests.makers.methods import METHODS, disturb

SHAPES = [(64, 64), (48, 32), (33, 24), (7, 9), (304, 1000)]
FOUR_BIT = ["bnb.nf4", "bnb.nf4-dq", "bnb.fp4", "bnb.fp4-dq"]
TRAINED_ON = [mode for mode in MODES if MODES[mode].trains]
DTYPES = [torch.float32, torch.bfloat16]


def drawn(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def quantized(mode: str, weight: torch.Tensor, *, has_bias: bool = False) -> QuantizedLinear:
    bias = nn.Parameter(drawn((len(weight),), weight.dtype, seed=1)) if has_bias else None
    linear = MODES[mode].make(weight, bias)
    linear.settle()
    return linear


def prompt(rows: int, length: int) -> torch.Tensor:
    return torch.randint(0, 100, (rows, length), generator=torch.Generator().manual_seed(0))


# ------------------------------------------------------------------------------------------------------- the numbers


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("mode", FOUR_BIT)
def test_4_bit_weights_are_those_of_bitsandbytes(mode: str, shape: tuple[int, int], dtype: torch.dtype) -> None:
    from bitsandbytes import functional

    weight = drawn(shape, dtype)
    weight[0] = 0  # a block of zeros
    kind, nested = mode[4:7], mode.endswith("-dq")
    codes, state = functional.quantize_4bit(weight, blocksize=64, quant_type=kind, compress_statistics=nested)

    ours = quantized(mode, weight)

    assert isinstance(ours, Linear4bit)
    assert torch.equal(ours.codes, codes)
    assert torch.equal(ours.absmax, state.absmax)
    if nested:
        factors = functional.dequantize_blockwise(state.absmax, state.state2) + state.offset
        assert torch.equal(ours.nested_absmax, state.state2.absmax)
    else:
        factors = state.absmax
    # not by its dequantize_4bit, which on the CPU is wrong for rows that are not whole blocks
    steps = torch.stack((codes >> 4, codes & 15), dim=1).flatten()[: weight.numel()]
    expected = state.code[steps.int()] * factors.repeat_interleave(64)[: weight.numel()]
    assert torch.equal(ours.weight, expected.view(shape).to(dtype))
    if shape[1] % 64 == 0:
        assert torch.equal(ours.weight, functional.dequantize_4bit(codes, state))


@pytest.mark.parametrize("dtype", DTYPES)
def test_8_bit_weights_are_those_of_bitsandbytes(dtype: torch.dtype) -> None:
    from bitsandbytes import functional

    weight = drawn((48, 100), dtype)
    codes, largest, _ = functional.int8_vectorwise_quant(weight.half())

    ours = quantized("bnb.int8", weight)

    assert isinstance(ours, Linear8bit)
    assert torch.equal(ours.plain(), codes)
    torch.testing.assert_close(ours.scale * 127, largest)


@pytest.mark.parametrize("shape", SHAPES)
def test_8_bit_weights_are_those_of_torchao(shape: tuple[int, int]) -> None:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    theirs = nn.Linear(shape[1], shape[0], bias=False)
    theirs.weight = nn.Parameter(drawn(shape))
    ours = quantized("torchao.int8", drawn(shape))
    quantize_(theirs, Int8WeightOnlyConfig())

    assert isinstance(ours, Linear8bit)
    assert torch.equal(ours.plain(), theirs.weight.qdata)
    assert torch.equal(ours.weight, theirs.weight.dequantize())
    x = drawn((3, shape[1]), seed=2)
    assert (ours(x) - theirs(x)).norm() < 1e-4 * theirs(x).norm()


def test_4_bit_groups_are_those_of_torchao() -> None:
    from torchao.prototype.quantization.int4.int4_opaque_tensor import Int4OpaqueTensor

    weight, x = drawn((64, 256)), drawn((3, 256), seed=2)
    ours = quantized("torchao.int4", weight)
    theirs = Int4OpaqueTensor.from_hp(weight, [1, 128])

    assert isinstance(ours, Linear4bitGroups)
    assert ours.packed is not None
    assert torch.equal(ours.packed, theirs.qdata)
    torch.testing.assert_close(ours.scale_and_zero, theirs.scale_and_zero)
    torch.testing.assert_close(ours(x), F.linear(x, theirs))


@pytest.mark.parametrize("shape", [(64, 64), (33, 24), (48, 31), (15, 128)])
def test_weights_that_no_group_divides_are_in_8_bits(shape: tuple[int, int]) -> None:
    in_groups = isinstance(quantized("torchao.int4", drawn(shape)), Linear4bitGroups)
    assert in_groups == (shape == (64, 64))


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("mode", MODES)
def test_a_product_is_that_with_the_weight(
    mode: str, shape: tuple[int, int], dtype: torch.dtype, fast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not fast:  # a CPU that does not multiply bytes
        monkeypatch.setattr(byte_products, "kernel", lambda: None)
    linear = quantized(mode, drawn(shape, dtype), has_bias=True)
    assert linear.bias is not None
    for lead in [(1, 1), (2, 3), (40,), ()]:
        x = drawn((*lead, shape[1]), dtype, seed=3)
        y = linear(x)
        exact = F.linear(x.double(), linear.dequantize(torch.float64), linear.bias.double())
        assert (y.dtype, y.shape) == (dtype, exact.shape)
        assert (y - exact).norm() <= exact.norm() * (1e-4 if dtype == torch.float32 else 8e-3)


def test_activations_of_any_size_are_multiplied_as_exactly() -> None:
    linear = quantized("torchao.int8", drawn((32, 64)))
    x = drawn((6, 64), seed=1) * torch.tensor([0.0, 1e-20, 1e-3, 1.0, 1e5, 1e20]).unsqueeze(1)
    exact = F.linear(x.double(), linear.weight.double())
    error = (linear(x) - exact).norm(dim=1) / exact.norm(dim=1).clamp(min=1e-30)
    assert error.max() < 1e-4
    assert not linear(torch.full((1, 64), float("inf"))).isfinite().any()


@pytest.mark.parametrize("lead", [(2, 5), ()])
@pytest.mark.parametrize("mode", MODES)
def test_the_gradients_are_those_of_a_linear_with_the_weight(mode: str, lead: tuple[int, ...]) -> None:
    linear = quantized(mode, drawn((32, 64)), has_bias=True)
    assert linear.bias is not None
    assert not any(p.requires_grad for p in linear.parameters())
    x, bias = drawn((*lead, 64), seed=3).requires_grad_(), linear.bias.detach().clone().requires_grad_()
    weight, to_y = linear.weight, drawn((*lead, 32), seed=4)
    expected = torch.autograd.grad(F.linear(x, weight, bias), (x, bias), to_y)

    linear.bias.requires_grad_(True)
    got = torch.autograd.grad(linear(x), (x, linear.bias), to_y)

    for ours, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mode", MODES)
def test_autocast_decides_the_dtype_of_the_product(mode: str) -> None:
    linear = quantized(mode, drawn((32, 64)), has_bias=True)
    x = drawn((3, 64), seed=3).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = linear(x)
    y.float().sum().backward()
    assert (y.dtype, x.grad is not None and x.grad.dtype) == (torch.bfloat16, torch.float32)


# ------------------------------------------------------------------------------------------------------- the modules


@pytest.mark.parametrize("mode", MODES)
def test_a_copy_a_pickle_and_a_state_dict_are_the_same_linear(mode: str) -> None:
    linear, x = quantized(mode, drawn((32, 64)), has_bias=True), drawn((3, 64), seed=3)
    other = quantized(mode, drawn((32, 64), seed=9), has_bias=True)
    other.load_state_dict(linear.state_dict())
    for same in (copy.deepcopy(linear), pickle.loads(pickle.dumps(linear)), other):
        assert torch.equal(same(x), linear(x))
        assert torch.equal(same.weight, linear.weight)


@pytest.mark.parametrize("mode", MODES)
def test_another_dtype_changes_the_arithmetic_and_no_code(mode: str) -> None:
    linear = quantized(mode, drawn((32, 64)), has_bias=True)
    before = {name: t for name, t in linear.state_dict().items() if name != "bias"}
    linear.to(torch.bfloat16)
    assert linear.weight.dtype == torch.bfloat16
    assert linear(drawn((3, 64), torch.bfloat16)).dtype == torch.bfloat16
    for name, tensor in before.items():
        assert torch.equal(linear.state_dict()[name], tensor), name


@pytest.mark.parametrize("mode", MODES)
def test_another_device_takes_the_codes_along(mode: str) -> None:
    linear = quantized(mode, drawn((32, 64)))
    sizes = {name: (t.shape, t.dtype) for name, t in linear.state_dict().items()}
    linear.to("meta")
    assert {name: (t.shape, t.dtype) for name, t in linear.state_dict().items()} == sizes
    assert all(t.device.type == "meta" for t in linear.state_dict().values())


# --------------------------------------------------------------------------------------------------------- the model


def dequantized(model: nn.Module) -> nn.Module:
    """The same model with plain linears."""
    plain = copy.deepcopy(model)
    for name, module in list(plain.named_modules()):
        if isinstance(module, QuantizedLinear):
            linear = nn.Linear(module.in_features, module.out_features, bias=module.bias is not None)
            linear.weight, linear.bias = nn.Parameter(module.weight), module.bias
            plain.set_submodule(name, linear)
    return plain


@pytest.mark.parametrize("name", CONFIGS)
def test_a_model_is_quantized_while_it_is_read(name: str, tmp_path: Path) -> None:
    directory = make_hf_checkpoint(tmp_path / "m", CONFIGS[name])
    model = load_model(directory, quantize="bnb.nf4")

    swapped = {path for path, module in model.named_modules() if isinstance(module, QuantizedLinear)}
    assert swapped == {path for path, _ in linears(random_gpt(CONFIGS[name]))}
    assert not any(t.is_meta for t in (*model.parameters(), *model.buffers()))
    torch.testing.assert_close(model(prompt(2, 12)), dequantized(model)(prompt(2, 12)))


@pytest.mark.parametrize("name", ["llama", "gemma", "deepseek_v3"])
@pytest.mark.parametrize("mode", MODES)
def test_a_quantized_model_decodes_with_a_cache_as_without(mode: str, name: str, tmp_path: Path) -> None:
    model = load_model(make_hf_checkpoint(tmp_path / "m", CONFIGS[name]), quantize=mode).eval()
    ids = prompt(2, 10)
    with torch.inference_mode():
        whole, cache = model(ids), KVCache(model.config, 2, 16)
        parts = [model(ids[:, a:b], torch.arange(a, b), cache=cache) for a, b in ((0, 6), (6, 7), (7, 10))]
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-3, atol=1e-3)
    greedy = Sampling(temperature=0)
    alone = list(Engine(model).generate([5, 6, 7], greedy, max_new_tokens=4))
    assert alone == list(Engine(model, max_rows=2).generate([5, 6, 7], greedy, max_new_tokens=4))


@pytest.mark.skipif(byte_products.kernel() is None, reason="this CPU does not multiply bytes")
@pytest.mark.parametrize("mode", ["torchao.int8", "bnb.int8"])
@pytest.mark.parametrize("name", ["llama", "deepseek_v3"])
def test_what_an_mlp_reads_twice_is_multiplied_at_once(name: str, mode: str, tmp_path: Path) -> None:
    checkpoint_ = checkpoint.open_(make_hf_checkpoint(tmp_path / "m", CONFIGS[name]))
    tensors = list(checkpoint_.tensors())
    calls: list[int] = []
    for order in (tensors, tensors[::-1]):
        model = checkpoint.build_model(checkpoint_.config, order, torch.float32, OneDevice("cpu"), mode).eval()
        apart = copy.deepcopy(model)  # a copy is packed one by one
        mlps = [module for module in model.modules() if isinstance(module, LLaMAMLP)]
        assert mlps
        for mlp in mlps:
            first, second = mlp.fc_1, mlp.fc_2
            assert isinstance(first, Linear8bit)
            assert isinstance(second, Linear8bit)
            assert first.packed.whole is second.packed.whole
            assert mlp(drawn((0, first.in_features))).shape == (0, first.in_features)
            x = drawn((2, 3, first.in_features))
            assert torch.equal(first(x), apart_of(apart, model, first)(x))
            assert torch.equal(second(x), apart_of(apart, model, second)(x))
        wholes = {id(mlp.fc_1.packed.whole): mlp.fc_1.packed.whole for mlp in mlps}
        for whole in wholes.values():
            times = whole.times
            whole.times = lambda rows, times=times: calls.append(len(rows)) or times(rows)
        ids = prompt(2, 5)
        with torch.no_grad():
            torch.testing.assert_close(model(ids), apart(ids))  # silu differs in the last bit by how rows lie
        assert 0 < len(calls) <= len(mlps)
        calls.clear()


def apart_of(other: nn.Module, model: nn.Module, module: nn.Module) -> nn.Module:
    """The module of `other` that has the name of this one of `model`."""
    return other.get_submodule(next(name for name, each in model.named_modules() if each is module))


@pytest.mark.parametrize("kind", ["lora-everywhere", "adapter_v2"])
def test_an_adapter_stands_on_what_is_multiplied_at_once(kind: str, tmp_path: Path) -> None:
    model = load_model(make_hf_checkpoint(tmp_path / "m", CONFIGS["llama"]), quantize="torchao.int8").eval()
    apart, ids = copy.deepcopy(model), prompt(2, 5)
    plain = model(ids)
    for each in (model, apart):
        METHODS[kind].attach(each, torch.Generator().manual_seed(0))
        disturb(each).eval()
    with torch.no_grad():
        torch.testing.assert_close(model(ids), apart(ids))
        assert not torch.allclose(model(ids), plain)
    grads = [torch.autograd.grad(m(ids).sum(), [p for p in m.parameters() if p.requires_grad]) for m in (model, apart)]
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("mode", ["torchao.int8", "torchao.int4"])
@pytest.mark.parametrize("tied", [True, False])
def test_torchaos_modes_have_the_head_in_8_bits(mode: str, tied: bool, tmp_path: Path) -> None:
    config = replace(shrunk("Qwen2.5-0.5B"), tie_embeddings=tied)
    directory = make_hf_checkpoint(tmp_path / "m", config)
    model, plain = load_model(directory, quantize=mode), load_model(directory)
    assert isinstance(model.lm_head, Linear8bit)
    assert torch.equal(model.wte.weight, plain.wte.weight)
    assert (model.lm_head.weight - plain.lm_head.weight).abs().max() < 0.01
    assert isinstance(load_model(directory, quantize="bnb.nf4").lm_head, nn.Linear)


@pytest.mark.parametrize("mode", ["bnb.nf4", "bnb.nf4-dq", "bnb.fp4", "bnb.int8"])
def test_the_logits_are_those_of_transformers_with_bitsandbytes(mode: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    # rows of whole blocks: on the CPU, bitsandbytes' own kernel is wrong for others
    config = shrunk("Llama-3.2-1B", n_embd=64, n_head=4, head_size=16, intermediate_size=128)
    directory = make_hf_checkpoint(tmp_path / "m", config)
    asked: dict[str, Any] = {"load_in_8bit": True}
    if mode != "bnb.int8":
        asked = {
            "load_in_4bit": True,
            "bnb_4bit_quant_type": mode[4:7],
            "bnb_4bit_use_double_quant": mode.endswith("-dq"),
            "bnb_4bit_compute_dtype": torch.float32,
        }
    theirs = AutoModelForCausalLM.from_pretrained(
        directory, quantization_config=BitsAndBytesConfig(**asked), dtype=torch.float32
    )
    theirs.train()  # its way for inference rounds activations or factors; nothing is dropped out
    ids = prompt(2, 12)
    with torch.no_grad():
        expected = theirs(ids).logits
        ours = load_model(directory, quantize=mode)(ids)
        unquantized = hf_model(config)(ids).logits
    # double quantization takes the mean of a whole weight's factors, and theirs has q, k and v apart
    close = 0.1 if mode.endswith("-dq") else 1e-2
    assert (ours - expected).norm() < close * (ours - unquantized).norm()


# --------------------------------------------------------------------------------------------------- memory and disk

PEAK = """
import sys, torch
torch.set_num_threads(1)
from litgpt import checkpoint, quantize
linear = quantize.MODES[sys.argv[2]].make(torch.ones(64, 64), None)
linear.settle()
linear(torch.ones(1, 64))
def kilobytes(what):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith(what))
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")  # the peak is now
before = kilobytes("VmRSS")
model = checkpoint.load_model(sys.argv[1], quantize=sys.argv[2])
print((kilobytes("VmHWM") - before) * 1024)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="only Linux tells the peak of one step")
def test_the_whole_in_full_precision_is_never_in_memory(tmp_path: Path) -> None:
    mode = "torchao.int8"
    config = replace(shrunk("Llama-3.2-1B"), n_embd=512, intermediate_size=4096, n_layer=8, head_size=128)
    state = {name: torch.full(shape, 0.01).bfloat16() for name, shape in weights.expected(config).items()}
    directory = checkpoint.write(tmp_path / "m", config, state)
    files = {path: path.stat().st_mtime_ns for path in directory.iterdir()}
    full = sum(tensor.nbytes for tensor in state.values())
    assert full > 100e6

    run = subprocess.run([sys.executable, "-c", PEAK, directory, mode], capture_output=True, text=True, check=True)

    held = estimate.inference_memory(config, 2, 0, 0, mode).weights
    # beside it what one weight takes while it is read, cut, quantized and packed
    assert held * 0.8 < int(run.stdout) < held + 25e6 < 0.85 * full
    assert {path: path.stat().st_mtime_ns for path in directory.iterdir()} == files


@pytest.mark.parametrize("mode", MODES)
def test_estimated_bytes_are_those_of_the_modules(mode: str, tmp_path: Path) -> None:
    config = shrunk("Qwen2.5-0.5B", n_embd=128, intermediate_size=256)
    model = load_model(make_hf_checkpoint(tmp_path / "m", config), quantize=mode)
    modules = [module for module in model.modules() if isinstance(module, QuantizedLinear)]
    tensors = [t for module in modules for t in module.state_dict().values()]
    rest = {id(p): p for p in model.parameters() if not any(p is t for t in tensors)}
    real = sum(t.nbytes for t in tensors) + sum(p.nbytes for p in rest.values())
    assert estimate.inference_memory(config, 4, 1, 16, mode).weights == pytest.approx(real, rel=0.06)
    assert set(estimate.QUANTIZED) == set(MODES)


# ------------------------------------------------------------------------------------------------------ wrong, or slow


def test_an_unknown_mode_is_refused_with_the_nearest(tmp_path: Path) -> None:
    directory = make_hf_checkpoint(tmp_path / "m", "pythia-14m")
    with pytest.raises(InputError, match=r"quantize 'bnb.nf5' is not known.*did you mean 'bnb.nf4'"):
        load_model(directory, quantize="bnb.nf5")


@pytest.mark.parametrize("mode", FOUR_BIT)
def test_a_missing_package_is_named_with_what_brings_it(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match=re.escape("pip install 'litgpt[quantize]'")):
        quantize.require_mode(mode)
    quantize.require_mode("torchao.int8")  # torch is enough


@pytest.mark.parametrize(
    ("mode", "near"), [("bnb.int8", "bnb.int8-training"), ("torchao.int8", "bnb.nf4"), ("torchao.int4", "bnb.nf4")]
)
def test_modes_for_inference_are_refused_for_training(mode: str, near: str) -> None:
    quantize.require_mode(mode)
    with pytest.raises(InputError, match=f"quantize '{mode}' is for inference.*did you mean '{near}'"):
        quantize.require_mode(mode, training=True)
    for able in TRAINED_ON:
        quantize.require_mode(able, training=True)


def test_a_mode_that_is_slower_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "3 times as long" in (quantize.note("bnb.nf4", "cpu") or "")
    assert "this GPU" in (quantize.note("bnb.int8", "cuda") or "")
    assert quantize.note("bnb.nf4", "cuda") is None
    monkeypatch.setattr(byte_products, "kernel", lambda: None)
    assert "slower than bf16 on this CPU" in (quantize.note("torchao.int8", "cpu") or "")
    monkeypatch.setattr(byte_products, "kernel", lambda: byte_products.OneDnn)
    assert quantize.note("torchao.int8", "cpu") is None
    monkeypatch.setattr(byte_products, "kernel", lambda: byte_products.Fbgemm)
    assert "prompts more slowly" in (quantize.note("torchao.int8", "cpu") or "")
