"""The same weights give the logits, gradients and text that transformers gives, for every set of switches."""

import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close

from litgpt import weights
from litgpt.generate.engine import Engine
from litgpt.generate.sampling import Sampling
from litgpt.model import GPT
from tests.makers.checkpoints import CONFIGS, hf_model
from tests.makers.configs import SHAPES, shrunk

SHAPED = {name: shrunk(name) for name in SHAPES} | {k: v for k, v in CONFIGS.items() if k.startswith("deepseek")}


def pair(config, tmp_path):
    """transformers' model with weights so large that a wrong mask or angle shows, and ours with the same."""
    theirs = hf_model(config)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in theirs.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(noise * 0.25 if parameter.dim() > 1 else parameter + noise * 0.1)
    theirs.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    ours = GPT(config).eval()
    state = dict(weights.import_(config, {n: t.shape for n, t in stored.items()}, stored.__getitem__))
    ours.load_state_dict(state, strict=not config.tie_embeddings)
    return ours, theirs


def gradients_under_our_names(config, theirs):
    """transformers' gradients; what it fuses or renames in memory is brought back to what the files hold."""
    found = {}
    for name, parameter in theirs.named_parameters():
        stem, gradient = name.rpartition(".experts.")[0], parameter.grad
        if config.family == "mixtral":
            name, stem = name.replace(".mlp.", ".block_sparse_moe."), stem.replace(".mlp", ".block_sparse_moe")
        gate, up, down = ("w1", "w3", "w2") if config.family == "mixtral" else ("gate_proj", "up_proj", "down_proj")
        if name.endswith("experts.gate_up_proj"):  # (experts, gate rows then up rows, C)
            for i, expert in enumerate(gradient):
                for part, rows in zip((gate, up), expert.chunk(2), strict=True):
                    found[f"{stem}.experts.{i}.{part}.weight"] = rows
        elif name.endswith("experts.down_proj"):
            found |= {f"{stem}.experts.{i}.{down}.weight": expert for i, expert in enumerate(gradient)}
        else:
            found[name] = gradient
    if config.family == "gpt_neox":  # the head has another name in memory
        found["embed_out.weight"] = found.pop("lm_head.weight")
    found |= {n: b for n, b in theirs.named_buffers() if n.endswith("e_score_correction_bias")}  # has no gradient
    return dict(weights.import_(config, {n: g.shape for n, g in found.items()}, found.__getitem__))


@pytest.mark.parametrize("name", SHAPED)
def test_logits_and_gradients_are_those_of_transformers(name, tmp_path):
    config = SHAPED[name]
    ours, theirs = pair(config, tmp_path)
    ids = torch.randint(0, 96, (2, 30), generator=torch.Generator().manual_seed(1))
    expected = theirs(ids)
    assert expected.logits.std() > 0.1
    assert_close(ours(ids), expected.logits, atol=1e-4, rtol=1e-4)

    targets = ids.roll(-1, dims=1)
    torch.nn.functional.cross_entropy(expected.logits.flatten(0, 1), targets.flatten(), reduction="sum").backward()
    ours(ids, targets=targets).total.backward()
    embedding = theirs.get_input_embeddings().weight.grad
    assert_close(ours.wte.weight.grad, embedding, atol=1e-3 * embedding.abs().max(), rtol=1e-3)
    parameters = dict(ours.named_parameters())
    for key, gradient in gradients_under_our_names(config, theirs).items():
        if key not in parameters:  # a buffer, or the tied embedding's other name, compared above
            continue
        assert_close(ours.get_parameter(key).grad, gradient, atol=1e-3 * gradient.abs().max() + 1e-6, rtol=1e-3)


@pytest.mark.parametrize("name", SHAPED)
@torch.inference_mode()
def test_logits_agree_far_beyond_the_training_length(name, tmp_path):
    config = SHAPED[name]
    ours, theirs = pair(config, tmp_path)
    ids = torch.randint(0, 96, (1, 20), generator=torch.Generator().manual_seed(2))
    for start in (10, 3000, 200_000):
        positions = torch.arange(start, start + 20)
        expected = theirs(ids, position_ids=positions.unsqueeze(0)).logits
        assert_close(ours(ids, positions), expected, atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize("name", SHAPED)
def test_greedy_text_is_that_of_transformers(name, tmp_path):
    config = SHAPED[name]
    ours, theirs = pair(config, tmp_path)
    prompt = torch.randint(0, 96, (1, 5), generator=torch.Generator().manual_seed(3))
    # within the original context where there is a longer one: transformers changes its mind about the angles midway
    expected = theirs.generate(prompt, max_new_tokens=11, do_sample=False, eos_token_id=None, pad_token_id=0)
    engine = Engine(ours, max_len=16)
    assert list(engine.generate(prompt[0].tolist(), Sampling(0), max_new_tokens=11)) == expected[0, 5:].tolist()
