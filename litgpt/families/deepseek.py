"""DeepSeek-V3 and its kin (R1, Moonlight, Kimi K2): latent attention, and experts chosen in groups."""

from __future__ import annotations

from typing import Any

from litgpt.families import llama
from litgpt.families.tables import (
    IGNORED,
    Family,
    Fields,
    Hf,
    Key,
    biases,
    block,
    expect,
    read,
    read_rope,
    value,
    write,
    write_rope,
)

KEYS = (
    Key("hidden_size", "n_embd"),
    Key("num_hidden_layers", "n_layer"),
    Key("num_attention_heads", "n_head"),
    Key("num_key_value_heads", "n_query_groups", default=None),
    Key("intermediate_size", "intermediate_size"),
    Key("max_position_embeddings", "block_size", default=4096),
    Key("vocab_size", "padded_vocab_size"),
    Key("moe_intermediate_size", "moe_intermediate_size", default=2048),
    Key("n_routed_experts", "n_expert", default=256),
    Key("n_shared_experts", "n_shared_expert", default=1),
    Key("num_experts_per_tok", "n_expert_per_token", default=8),
    Key("n_group", "n_expert_groups", default=8),
    Key("topk_group", "n_topk_groups", default=4),
    Key("first_k_dense_replace", "first_k_dense_replace", default=3),
    Key("routed_scaling_factor", "routed_scaling_factor", float, default=2.5),
    Key("norm_topk_prob", "norm_topk_prob", bool, default=True),
    Key("rope_interleave", "rope_interleave", bool, default=True),
    *llama.RMS_EPS,
    *llama.TIED,
)
LATENT_SIZES = ("q_lora_rank", "kv_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim")
TRAITS = {
    **{name: trait for name, trait in llama.TRAITS.items() if name != "bias"},
    "mlp_class_name": "LLaMAMoE",
    "n_topk_scores_per_group": 2,
    "latent_norm_eps": 1e-6,
}

LATENT_ATTENTION = (
    block("attn.q_proj", "self_attn.q_proj"),
    block("attn.q_a_proj", "self_attn.q_a_proj"),
    block("attn.q_a_norm", "self_attn.q_a_layernorm"),
    block("attn.q_b_proj", "self_attn.q_b_proj"),
    block("attn.kv_a_proj_with_mqa", "self_attn.kv_a_proj_with_mqa"),
    block("attn.kv_a_norm", "self_attn.kv_a_layernorm"),
    block("attn.kv_b_proj", "self_attn.kv_b_proj"),
    block("attn.proj", "self_attn.o_proj"),
)
SHARED_EXPERT = (
    block("mlp.shared_experts.fc_1", "mlp.shared_experts.gate_proj"),
    block("mlp.shared_experts.fc_2", "mlp.shared_experts.up_proj"),
    block("mlp.shared_experts.proj", "mlp.shared_experts.down_proj"),
)
CORRECTION = block("mlp.gate.e_score_correction_bias", "mlp.gate.e_score_correction_bias", exact=True)
EQUATIONS = (
    *llama.OUTER,
    *llama.NORMS,
    *LATENT_ATTENTION,
    *llama.MLP,
    *llama.EXPERTS,
    CORRECTION,
    *SHARED_EXPERT,
)


def from_hf(hf: Hf) -> dict[str, Any]:
    expect(hf, hidden_act=("silu", "swish"), scoring_func="sigmoid", topk_method="noaux_tc", moe_layer_freq=1)
    latent = {name: value(hf, name, int) for name in LATENT_SIZES[1:]}
    latent = {"q_lora_rank": value(hf, "q_lora_rank", int, None), **latent}
    has_bias = value(hf, "attention_bias", bool, False)
    return {
        **read(hf, KEYS),
        **read_rope(hf),
        **biases(qkv=has_bias, proj=has_bias, mlp=False),
        "latent_attention": latent,
        "head_size": latent["qk_rope_head_dim"] + latent["qk_nope_head_dim"],
    }


def to_hf(fields: Fields) -> dict[str, Any]:
    latent = fields["latent_attention"] or dict.fromkeys(LATENT_SIZES)
    return {
        **write(fields, KEYS),
        **latent,
        **write_rope(fields),
        "hidden_act": "silu",
        "attention_bias": fields["attn_bias"],  # on the two a-projections and the output
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "moe_layer_freq": 1,
        "num_nextn_predict_layers": 0,
    }


DEEPSEEK = Family(
    name="deepseek_v3",
    model_type="deepseek_v3",
    architecture="DeepseekV3ForCausalLM",
    aliases=("kimi_k2",),
    traits=TRAITS,
    from_hf=from_hf,
    to_hf=to_hf,
    equations=lambda fields: EQUATIONS,
    # the layer after the last, which predicts one token more
    ignored=(*IGNORED, "model.layers.{n_layer}.*"),
)
