"""Any config.json of a known model_type is the model that transformers makes of it: random ones, as it saves them."""

import json
import random
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close
from transformers import AutoConfig, AutoModelForCausalLM

from litgpt import weights
from litgpt.config import Config
from litgpt.model import GPT

SEEDS = range(6)
Fields = dict[str, Any]


def rope(pick: random.Random, pairs: int, kinds: tuple[str, ...] = ("default", "linear", "llama3", "yarn")) -> Fields:
    """A random frequency scaling, in the spelling before transformers 5 for the half of them."""
    theta, kind = pick.choice([10_000.0, 500_000.0, 1_000_042.0]), pick.choice(kinds)
    scaling: Fields = {"rope_type": kind, "factor": pick.choice([2.0, 8.0])}
    if kind == "default":
        scaling = {}
    elif kind == "llama3":
        scaling |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16}
    elif kind == "yarn":
        scaling |= {"original_max_position_embeddings": 16, "beta_fast": pick.choice([32, 4]), "beta_slow": 1}
        if pick.random() < 0.4:
            scaling["attention_factor"] = 1.3
    elif kind == "longrope":
        scaling |= {"short_factor": [1.0 + 0.1 * i for i in range(pairs)], "original_max_position_embeddings": 16}
        scaling |= {"long_factor": [1.5 + 0.7 * i for i in range(pairs)]}
        del scaling["factor"]
    if pick.random() < 0.5:
        return {"rope_theta": theta, "rope_scaling": scaling or None}
    return {"rope_parameters": {"rope_theta": theta, "rope_type": "default", **scaling}}


def sizes(pick: random.Random) -> Fields:
    heads = pick.choice([2, 4, 6])
    return {
        "hidden_size": heads * 8,
        "num_hidden_layers": pick.choice([2, 3]),
        "num_attention_heads": heads,
        "intermediate_size": pick.choice([24, 40]),
        "vocab_size": pick.choice([64, 101]),
        "max_position_embeddings": 64,
        "tie_word_embeddings": pick.random() < 0.5,
    }


def llama_like(pick: random.Random, head_dim: bool = True) -> Fields:
    fields = sizes(pick)
    heads = fields["num_attention_heads"]
    fields["num_key_value_heads"] = pick.choice([n for n in (1, 2, heads) if heads % n == 0])
    fields["rms_norm_eps"] = pick.choice([1e-5, 1e-6, 1e-3])
    fields |= rope(pick, 4)
    if head_dim and pick.random() < 0.5:
        fields["head_dim"] = 16
    return fields


def window(pick: random.Random) -> Fields:
    return {"sliding_window": pick.choice([None, 5])}


def llama(pick: random.Random) -> Fields:
    return llama_like(pick) | {"attention_bias": pick.random() < 0.5, "mlp_bias": pick.random() < 0.5}


def gpt_neox(pick: random.Random) -> Fields:
    return sizes(pick) | {
        "rotary_pct": pick.choice([0.25, 0.5, 1.0]),
        "use_parallel_residual": pick.random() < 0.5,
        "hidden_act": pick.choice(["gelu", "gelu_new"]),
        "attention_bias": pick.random() < 0.7,
        "layer_norm_eps": pick.choice([1e-5, 1e-3]),
    }


def falcon(pick: random.Random) -> Fields:
    new = pick.random() < 0.5
    fields = sizes(pick)
    kv = {"num_kv_heads": 2} if new else {"multi_query": pick.random() < 0.5}
    norms = {"num_ln_in_parallel_attn": pick.choice([1, 2])} if new else {}
    return fields | kv | norms | {
        "new_decoder_architecture": new, "parallel_attn": new or pick.random() < 0.6, "bias": pick.random() < 0.5,
        "alibi": False, "rope_theta": pick.choice([10_000.0, 500_000.0]),
    }  # fmt: skip


def phi(pick: random.Random) -> Fields:
    fields = sizes(pick) | {"partial_rotary_factor": 0.5, "layer_norm_eps": pick.choice([1e-5, 1e-3])}
    return fields | {"tie_word_embeddings": False, "num_key_value_heads": pick.choice([None, 2])}


def phi3(pick: random.Random) -> Fields:
    fields = llama_like(pick, head_dim=False) | window(pick) | {"pad_token_id": 0}
    for name in ("rope_theta", "rope_scaling", "rope_parameters"):
        fields.pop(name, None)
    fields |= rope(pick, 4, ("default", "longrope"))
    if fields.get("rope_scaling"):  # Phi-3's own files keep this beside the scaling
        fields["original_max_position_embeddings"] = fields["rope_scaling"].pop("original_max_position_embeddings")
    return fields


def gemma(pick: random.Random) -> Fields:
    return llama_like(pick) | {"head_dim": 16}


def gemma2(pick: random.Random) -> Fields:
    return gemma(pick) | {
        "sliding_window": 5,
        "query_pre_attn_scalar": pick.choice([8, 24]),
        "attn_logit_softcapping": pick.choice([None, 2.0]),
        "final_logit_softcapping": pick.choice([None, 3.0]),
    }


def gemma3(pick: random.Random) -> Fields:
    fields = gemma(pick) | {"sliding_window": 5, "query_pre_attn_scalar": 24, "num_hidden_layers": 3}
    for name in ("rope_theta", "rope_scaling", "rope_parameters"):
        fields.pop(name, None)
    scaling = pick.choice([None, {"rope_type": "linear", "factor": 8.0}])
    kinds = [pick.choice(["sliding_attention", "full_attention"]) for _ in range(3)]
    return fields | {
        "rope_theta": 1e6, "rope_local_base_freq": 1e4, "rope_scaling": scaling, "layer_types": kinds
    }  # fmt: skip


def qwen2(pick: random.Random) -> Fields:
    fields = llama_like(pick, head_dim=False)
    if pick.random() < 0.4:
        fields |= {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}
    return fields


def qwen3(pick: random.Random) -> Fields:
    return qwen2(pick) | {"head_dim": 16, "attention_bias": pick.random() < 0.4}


def qwen3_moe(pick: random.Random) -> Fields:
    return llama_like(pick) | {
        "head_dim": 16, "num_experts": 4, "num_experts_per_tok": pick.choice([1, 2, 3]), "moe_intermediate_size": 12,
        "norm_topk_prob": pick.random() < 0.5, "decoder_sparse_step": 1, "mlp_only_layers": [],
    }  # fmt: skip


def mixtral(pick: random.Random) -> Fields:
    return llama_like(pick) | window(pick) | {"num_local_experts": 4, "num_experts_per_tok": pick.choice([1, 2])}


def stablelm(pick: random.Random) -> Fields:
    fields = llama_like(pick, head_dim=False)
    fields.pop("rms_norm_eps")
    for name in ("rope_theta", "rope_scaling", "rope_parameters"):
        fields.pop(name, None)
    return fields | {
        "use_qkv_bias": pick.random() < 0.5, "use_parallel_residual": pick.random() < 0.5,
        "partial_rotary_factor": pick.choice([0.25, 0.5]), "layer_norm_eps": pick.choice([1e-5, 1e-3]),
    }  # fmt: skip


def olmo(pick: random.Random) -> Fields:
    fields = llama_like(pick, head_dim=False) | {"clip_qkv": pick.choice([None, 0.6])}
    fields.pop("rms_norm_eps")
    return fields


def deepseek_v3(pick: random.Random) -> Fields:
    fields = sizes(pick)
    groups = pick.choice([1, 2])
    return fields | {
        "num_key_value_heads": fields["num_attention_heads"], "n_routed_experts": 8, "n_group": groups, "topk_group": 1,
        "num_experts_per_tok": 3, "moe_intermediate_size": 12, "first_k_dense_replace": pick.choice([0, 1]),
        "n_shared_experts": pick.choice([1, 2]), "q_lora_rank": pick.choice([None, 12]), "kv_lora_rank": 16,
        "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": pick.choice([8, 12]),
        "norm_topk_prob": pick.random() < 0.5, "routed_scaling_factor": 2.5, "rope_interleave": pick.random() < 0.7,
        "attention_bias": pick.random() < 0.3,
        "rope_theta": 1e4,
        "rope_scaling": pick.choice([None, {
            "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "beta_fast": 32, "beta_slow": 1,
            "mscale": 1.0, "mscale_all_dim": 1.0,
        }]),
    }  # fmt: skip


MAKERS = {
    "llama": llama, "gpt_neox": gpt_neox, "falcon": falcon, "phi": phi, "phi3": phi3, "gemma": gemma, "gemma2": gemma2,
    "gemma3_text": gemma3, "qwen2": qwen2, "qwen3": qwen3, "qwen3_moe": qwen3_moe, "mixtral": mixtral,
    "mistral": lambda pick: llama_like(pick) | window(pick), "stablelm": stablelm, "olmo": olmo,
    "olmo2": lambda pick: llama_like(pick, head_dim=False), "deepseek_v3": deepseek_v3,
}  # fmt: skip


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("model_type", MAKERS)
def test_a_random_config_is_the_model_of_transformers(model_type, seed, tmp_path):
    described = MAKERS[model_type](random.Random(f"{model_type} {seed}"))
    ids = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id")) | described
    theirs_config = AutoConfig.for_model(model_type, **ids)
    torch.manual_seed(seed)
    theirs = AutoModelForCausalLM.from_config(theirs_config, attn_implementation="eager").eval()
    with torch.no_grad():
        for tensor in [*theirs.parameters(), *(b for n, b in theirs.named_buffers() if n.endswith("_bias"))]:
            tensor.copy_(
                torch.randn_like(tensor) * 0.25 if tensor.dim() > 1 else tensor + torch.randn_like(tensor) * 0.1
            )
    theirs.save_pretrained(tmp_path)

    as_given = {"model_type": model_type, **described}
    as_saved = json.loads((tmp_path / "config.json").read_text())
    config = Config.from_hf(as_saved)
    assert config.differences(Config.from_hf(as_given)) == [], "the file as a user has it says something else"
    assert config.differences(Config.from_hf(config.to_hf())) == [], "what we write says something else"

    stored = load_file(tmp_path / "model.safetensors")
    ours = GPT(config).eval()
    state = dict(weights.import_(config, {n: t.shape for n, t in stored.items()}, stored.__getitem__))
    ours.load_state_dict(state, strict=not config.tie_embeddings)
    tokens = torch.randint(0, 64, (2, 14), generator=torch.Generator().manual_seed(seed))
    far = torch.arange(14) + 40
    with torch.no_grad():
        assert_close(ours(tokens), theirs(tokens).logits, atol=2e-4, rtol=1e-3)
        expected = theirs(tokens, position_ids=far.expand(2, -1)).logits
        assert_close(ours(tokens, far), expected, atol=2e-4, rtol=1e-3)
