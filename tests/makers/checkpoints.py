"""Tiny checkpoint directories: as `transformers` writes them, and as LitGPT 0.5 did."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
import yaml

from litgpt import families
from litgpt.config import Config
from litgpt.model import GPT
from litgpt.storage import read_json, write_json
from tests.makers.configs import shrunk

_DEEPSEEK = {
    "model_type": "deepseek_v3",
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "first_k_dense_replace": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "intermediate_size": 48,
    "moe_intermediate_size": 16,
    "max_position_embeddings": 64,
    "vocab_size": 128,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "q_lora_rank": 12,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 12,
}
CONFIGS = {
    **{family.name: shrunk(family.rows[0]["name"]) for family in families.FAMILIES if family.rows},
    "deepseek_v3": Config.from_hf(_DEEPSEEK),
    "deepseek_v3-no-query-latent": Config.from_hf({**_DEEPSEEK, "q_lora_rank": None}),
}
"""One tiny config of each family."""


def hf_model(config: Config, seed: int = 0, dtype: torch.dtype = torch.float32) -> Any:
    """A random `transformers` model of our config."""
    from transformers import AutoConfig, AutoModelForCausalLM

    # the usual ids of some families lie beyond a tiny vocabulary
    described = config.to_hf() | dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        theirs = AutoConfig.for_model(described.pop("model_type"), **described)
        model = AutoModelForCausalLM.from_config(theirs, attn_implementation="eager").to(dtype)
        _disturb(model)
    return model.eval()


def _disturb(model: torch.nn.Module) -> None:
    """Fresh norms and biases are ones and zeros, which would hide that two were mixed up."""
    with torch.no_grad():
        for tensor in [*model.parameters(), *(b for name, b in model.named_buffers() if name.endswith("_bias"))]:
            tensor.add_(torch.randn_like(tensor) * 0.02)


def make_hf_checkpoint(
    directory: Path,
    model: Config | str,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    tokenizer_dir: Path | None = None,
    **save_options: Any,
) -> Path:
    """A random model written by `transformers` itself; `save_options` go to `save_pretrained`."""
    from transformers import AutoTokenizer

    config = shrunk(model) if isinstance(model, str) else model
    logging.getLogger("transformers").setLevel(logging.ERROR)
    hf_model(config, seed, dtype).save_pretrained(directory, **save_options)
    if tokenizer_dir is not None:
        AutoTokenizer.from_pretrained(tokenizer_dir).save_pretrained(directory)
    return directory


def random_gpt(config: Config, seed: int = 0, dtype: torch.dtype = torch.float32) -> GPT:
    """Our model with random weights everywhere, norms and biases too."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = GPT(config).to(dtype)
        _disturb(model)
    return model.eval()


def make_litgpt_checkpoint(directory: Path, model: Config | str, seed: int = 0, *, legacy: bool = False) -> Path:
    """`lit_model.pth` and `model_config.yaml` as LitGPT 0.5 wrote them; `legacy`: with the older `attn.attn`."""
    from litgpt.model import concat_to_grouped

    config = shrunk(model) if isinstance(model, str) else model
    directory.mkdir(parents=True, exist_ok=True)
    state = {name: tensor.clone() for name, tensor in random_gpt(config, seed).state_dict().items()}
    if legacy:
        state = {
            name.replace("attn.qkv", "attn.attn"): concat_to_grouped(t, config) if "attn.qkv" in name else t
            for name, t in state.items()
        }
    torch.save(state, directory / "lit_model.pth")
    (directory / "model_config.yaml").write_text(yaml.safe_dump(config.to_dict()))
    return directory


def edit_json(path: Path, **changes: Any) -> None:
    """Set keys of a JSON file."""
    write_json(path, {**read_json(path), **changes})
