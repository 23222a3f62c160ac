"""Quantized linears against the packages whose numbers they claim, and a model quantized while it is read."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from litgpt.checkpoint import load_model
from litgpt.errors import InputError
from litgpt.quantize import MODES, Linear4bit, QuantizedLinear, linears
from tests.makers.checkpoints import CONFIGS, make_hf_checkpoint

SHAPES = [(64, 64), (33, 24), (7, 9), (300, 1000)]
FOUR_BIT = ["bnb.nf4", "bnb.nf4-dq", "bnb.fp4", "bnb.fp4-dq"]


def drawn(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def quantized(mode: str, weight: torch.Tensor, *, has_bias: bool = False) -> QuantizedLinear:
    bias = nn.Parameter(drawn((len(weight),), weight.dtype, seed=1)) if has_bias else None
    return MODES[mode].make(weight, bias)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
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
    assert torch.equal(ours.weight, functional.dequantize_4bit(codes, state))


@pytest.mark.parametrize("name", CONFIGS)
def test_a_model_is_quantized_while_it_is_read(name: str, tmp_path: Path) -> None:
    directory = make_hf_checkpoint(tmp_path / "m", CONFIGS[name])
    plain, model = load_model(directory), load_model(directory, quantize="bnb.nf4")

    swapped = {path: m for path, m in model.named_modules() if isinstance(m, QuantizedLinear)}
    assert set(swapped) == {path for path, _ in linears(plain)}
    ids = torch.randint(0, 100, (2, 12), generator=torch.Generator().manual_seed(0))
    for path, module in swapped.items():
        linear = plain.get_submodule(path)
        linear.weight = nn.Parameter(module.weight)
    torch.testing.assert_close(model(ids), plain(ids))


def test_an_unknown_mode_is_refused_with_the_nearest(tmp_path: Path) -> None:
    directory = make_hf_checkpoint(tmp_path / "m", "pythia-14m")
    with pytest.raises(InputError, match=r"quantize .bnb.nf5. is not known.*did you mean .bnb.nf4."):
        load_model(directory, quantize="bnb.nf5")
