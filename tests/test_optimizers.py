"""8-bit optimizers of bitsandbytes, by class path: tried before a run, counted, saved and gone on with."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest
import torch

from litgpt import optimizers, run_state
from litgpt.errors import InputError
from tests.makers import runs

EIGHT_BIT = ["AdamW8bit", "PagedAdamW8bit", "Lion8bit", "SGD8bit"]


def spec(name: str, **arguments: object) -> dict[str, object]:
    if name == "SGD8bit":
        arguments["momentum"] = 0.9
    return {"class_path": f"bitsandbytes.optim.{name}", "init_args": {"lr": 1e-2, **arguments}}


def steps(model: torch.nn.Module, optimizer: torch.optim.Optimizer, n: int) -> None:
    for _ in range(n):
        model(torch.linspace(-1, 1, 80).view(1, 80)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize(("name", "states"), [("AdamW8bit", 0.5), ("Lion8bit", 0.25), ("AdamW", 2), ("AdEMAMix", 3)])
def test_what_is_kept_in_8_bits_counts_a_quarter(name: str, states: float) -> None:
    assert optimizers.require_valid(spec(name)).states == states


@pytest.mark.parametrize("name", [*EIGHT_BIT, "PagedAdamW"])
def test_an_8_bit_optimizer_goes_on_where_it_was(name: str) -> None:
    torch.manual_seed(0)
    model, other = torch.nn.Linear(80, 64), torch.nn.Linear(80, 64)  # the weight is kept in 8 bits, the bias in 32
    optimizer = optimizers.build(spec(name), model.parameters())
    steps(model, optimizer, 3)
    other.load_state_dict(model.state_dict())
    resumed = optimizers.build(spec(name), other.parameters())
    saved = {key: value.clone() for key, value in run_state.optimizer_tensors(model, optimizer).items()}
    run_state.load_optimizer(other, resumed, saved)
    steps(model, optimizer, 3)
    steps(other, resumed, 3)
    for ours, theirs in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_a_run_with_8_bit_states_resumes_exactly(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    whole = runs.run(tmp_path, tmp_path / "whole", optimizer=spec("AdamW8bit"))
    resumed = tmp_path / "resumed"
    shutil.copytree(whole / "step-00000004", resumed / "step-00000004")
    runs.run(tmp_path, resumed, optimizer=spec("AdamW8bit"), resume=True)
    assert runs.losses(resumed) == runs.losses(whole)[-len(runs.losses(resumed)) :]
    assert runs.tensor_bytes(resumed / "final") == runs.tensor_bytes(whole / "final")


def test_without_the_package_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from litgpt.quantize import bitsandbytes

    bitsandbytes.cache_clear()
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(InputError, match=r"^bitsandbytes is not installed; run: pip install 'litgpt\[quantize\]'$"):
        optimizers.require_valid(spec("AdamW8bit"))


def test_a_wrong_name_in_the_package_is_refused() -> None:
    with pytest.raises(InputError, match=r"optimizer bitsandbytes\.optim\.AdamW9bit cannot be imported"):
        optimizers.require_valid(spec("AdamW9bit"))
