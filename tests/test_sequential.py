"""Layers on several devices are the model on one. Here devices are the CPU, and one that holds shapes only ("meta")."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from litgpt import checkpoint
from litgpt.config import Config
from litgpt.errors import InputError
from litgpt.generate import base, sequentially
from litgpt.generate.engine import Engine
from litgpt.generate.sampling import Sampling
from litgpt.model import GPT
from litgpt.placement.sequential import Sequential, spread
from tests.makers.checkpoints import CONFIGS, random_gpt
from tests.makers.configs import shrunk
from tests.makers.tokenizers import train_tiny_tokenizer

CPU, META = torch.device("cpu"), torch.device("meta")
IDS = torch.arange(40).view(2, 20) % 96
GIGA = 10**9


def placed(config: Config, whole: GPT, devices: tuple[torch.device, ...]) -> GPT:
    tied = {"lm_head.weight"} if config.tie_embeddings else set()
    tensors = [(name, tensor) for name, tensor in whole.state_dict().items() if name not in tied]
    placement = Sequential(devices, (GIGA,) * len(devices))
    return checkpoint.build_model(config, tensors, torch.float32, placement).eval()


@pytest.mark.parametrize(
    ("sizes", "first", "last", "room", "places"),
    [
        ([1] * 6, 0, 0, [1, 1], [0, 0, 0, 1, 1, 1]),
        ([1] * 6, 0, 0, [2, 1], [0, 0, 0, 0, 1, 1]),  # as much as each can hold
        ([1] * 6, 2, 0, [1, 1], [0, 0, 1, 1, 1, 1]),  # an embedding takes room as well
        ([1, 1, 4, 1, 1], 0, 0, [1, 1, 1], [0, 0, 1, 2, 2]),
        ([1, 1], 0, 100, [1, 1], [0, 0]),
    ],
)
def test_layers_stay_in_line_and_fill_devices_alike(
    sizes: list[int], first: int, last: int, room: list[int], places: list[int]
) -> None:
    assert spread(sizes, first, last, room) == places


@pytest.mark.parametrize("name", CONFIGS)
def test_what_a_layer_needs_is_moved_to_its_device(name: str) -> None:
    config = CONFIGS[name]
    if config.n_expert:  # which expert a token goes to is a number, and meta tensors have none
        config = shrunk("Llama-3.2-1B") if not config.latent_attention else config
        config = Config(
            **{**config.to_dict(), "mlp_class_name": "LLaMAMLP", "first_k_dense_replace": None, "family": ""}
        )
    model = placed(config, random_gpt(config), (CPU, META))
    homes = [{t.device.type for t in block.parameters()} for block in model.blocks]
    assert {"cpu"} in homes
    assert homes[-1] == {"meta"}
    cache = model.new_cache(2)
    assert {layer.k.device.type for layer in cache.layers} == {"cpu", "meta"}
    with torch.inference_mode():
        model.hidden(IDS[:, :13], cache=cache)
        hidden = model.hidden(IDS[:, 13:14], torch.tensor([13]), cache=cache)
        packed = model.hidden(IDS, doc_ids=(torch.arange(20) // 7).expand(2, -1))
    assert (hidden.device, hidden.shape) == (META, (2, 1, config.n_embd))
    assert (packed.device, packed.shape) == (META, (2, 20, config.n_embd))


@pytest.mark.parametrize("name", CONFIGS)
def test_layers_on_two_devices_answer_as_on_one(name: str) -> None:
    config = CONFIGS[name]
    whole = random_gpt(config)
    answers = []
    for model in (whole, placed(config, whole, (CPU, CPU))):
        engine = Engine(model, max_rows=2)
        rows = [engine.submit(IDS[i, :n].tolist(), Sampling(0), max_new_tokens=5) for i, n in ((0, 3), (1, 12), (0, 4))]
        while engine.busy:
            engine.step()
        with torch.inference_mode():
            answers.append(([row.new for row in rows], model(IDS)))
    assert answers[0][0] == answers[1][0]
    assert torch.equal(answers[0][1], answers[1][1])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("name", CONFIGS)
def test_a_model_half_on_a_gpu_answers_as_on_the_cpu(name: str) -> None:
    whole = random_gpt(CONFIGS[name])
    with torch.inference_mode():
        for devices in ((CPU, torch.device("cuda", 0)), (torch.device("cuda", 0), CPU)):
            logits = placed(CONFIGS[name], whole, devices)(IDS.to(devices[0]))
            assert_close(logits.cpu(), whole(IDS), rtol=1e-3, atol=1e-3)


def test_weights_are_quantized_on_the_device_of_their_layer(tmp_path: Path) -> None:
    config = shrunk("Qwen2.5-0.5B")
    checkpoint.write(tmp_path / "ck", config, random_gpt(config))
    placement = Sequential((CPU, CPU), (GIGA, GIGA))
    one = checkpoint.load_model(tmp_path / "ck", quantize="torchao.int8").eval()
    two = checkpoint.load_model(tmp_path / "ck", quantize="torchao.int8", placement=placement).eval()
    with torch.inference_mode():
        assert torch.equal(one(IDS), two(IDS))


def test_what_a_device_cannot_hold_is_refused_by_its_name() -> None:
    config = Config.from_name("Llama-3.1-8B")
    roomy = Sequential((torch.device("cuda", 0), torch.device("cuda", 1)), (12 * GIGA, 12 * GIGA))
    roomy.require_fit(config, torch.bfloat16, 300, "big")
    tight = Sequential(roomy.devices, (12 * GIGA, 1 * GIGA))
    with pytest.raises(InputError, match=r"big: what is to be on cuda:0 needs about 1[2-6] GB.*12 GB is free"):
        tight.require_fit(config, torch.bfloat16, 300, "big")
    with pytest.raises(InputError, match=r"to be on cpu needs about 1\d GB.*10 GB is free"):  # the same memory
        Sequential((CPU, CPU), (5 * GIGA, 5 * GIGA)).require_fit(config, torch.bfloat16, 300, "big")


def test_more_devices_than_layers_are_refused() -> None:
    with pytest.raises(InputError, match=r"devices is 3.*n_layer 2; give at most 2"):
        Sequential((CPU,) * 3, (GIGA,) * 3).outline(shrunk("pythia-14m"))


def test_the_command_says_what_generate_says(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    tokenizer = train_tiny_tokenizer(tmp_path / "tokenizer")
    config = shrunk("Qwen2.5-0.5B", vocab_size=300, padded_vocab_size=320, block_size=256)
    talker = checkpoint.write(tmp_path / "talker", config, random_gpt(config), tokenizer_dir=tokenizer)
    told: dict[str, Any] = {"num_samples": 3, "max_new_tokens": 8, "compile": True}
    sequentially.main(talker, "The river", **told, devices=2)
    shown = capsys.readouterr()
    base.main(talker, "The river", **{**told, "compile": False})
    assert shown.out == capsys.readouterr().out
    assert "note: not compiled: the model is on several devices" in shown.err
