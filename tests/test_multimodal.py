"""The text part of a multimodal checkpoint is read as it lies there, in the names of the Hub and of transformers."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Gemma3Config, Gemma3ForConditionalGeneration

from litgpt.checkpoint import load_model
from tests.makers.configs import shrunk

ON_THE_HUB = {
    "model.language_model.": "language_model.model.",
    "model.vision_tower.": "vision_tower.",
    "model.multi_modal_projector.": "multi_modal_projector.",
}


@pytest.fixture
def gemma(tmp_path) -> tuple[Gemma3ForConditionalGeneration, Path]:
    text = shrunk("Gemma-3-4b-it").to_hf()
    vision = {
        "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28,
        "patch_size": 14,
    }  # fmt: skip
    ids = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    config = Gemma3Config(text_config=text | ids, vision_config=vision, mm_tokens_per_image=4, image_token_index=127)
    torch.manual_seed(0)
    model = Gemma3ForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(tmp_path)
    return model, tmp_path


@pytest.mark.parametrize("hub_names", [False, True])
def test_the_text_of_a_multimodal_gemma_3_gives_its_logits(gemma, hub_names):
    theirs, directory = gemma
    file = directory / "model.safetensors"
    tensors = load_file(file)
    assert any("vision_tower" in name for name in tensors)
    if hub_names:
        for new, old in ON_THE_HUB.items():
            tensors = {name.replace(new, old) if name.startswith(new) else name: t for name, t in tensors.items()}
    save_file(tensors, file, metadata={"format": "pt"})
    ours = load_model(directory)
    ids = torch.arange(1, 25).unsqueeze(0)
    with torch.no_grad():
        torch.testing.assert_close(ours(ids), theirs(input_ids=ids).logits, atol=1e-4, rtol=1e-3)
    assert json.loads((directory / "config.json").read_text())["model_type"] == "gemma3"
