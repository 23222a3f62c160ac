"""Llama, and the many models that are Llamas under another name."""

from __future__ import annotations

from typing import Any

from litgpt.families.tables import (
    Family,
    Fields,
    Hf,
    Key,
    biases,
    block,
    eq,
    expect,
    group,
    read,
    read_rope,
    size,
    value,
    with_traits,
    write,
    write_rope,
)

KEYS = (
    Key("hidden_size", "n_embd"),
    Key("num_hidden_layers", "n_layer"),
    Key("num_attention_heads", "n_head"),
    Key("num_key_value_heads", "n_query_groups", default=None),
    Key("intermediate_size", "intermediate_size"),
    Key("max_position_embeddings", "block_size", default=2048),
    Key("vocab_size", "padded_vocab_size"),
)
HEAD_DIM = (Key("head_dim", "head_size", default=None),)
RMS_EPS = (Key("rms_norm_eps", "norm_eps", float, default=1e-6),)
TIED = (Key("tie_word_embeddings", "tie_embeddings", bool, default=False),)
LLAMA_KEYS = (*KEYS, *HEAD_DIM, *RMS_EPS, *TIED)

TRAITS = {
    "rotary_percentage": 1.0,
    "parallel_residual": False,
    "bias": False,
    "norm_class_name": "RMSNorm",
    "mlp_class_name": "LLaMAMLP",
}

OUTER = (eq("transformer.wte", "model.embed_tokens"), eq("transformer.ln_f", "model.norm"), eq("lm_head", "lm_head"))
NORMS = (block("norm_1", "input_layernorm"), block("norm_2", "post_attention_layernorm"))
QKV = block("attn.qkv", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"))
ATTENTION = (QKV, block("attn.proj", "self_attn.o_proj"))
QK_NORMS = (block("attn.norm_q", "self_attn.q_norm"), block("attn.norm_k", "self_attn.k_norm"))
MLP = (block("mlp.fc_1", "mlp.gate_proj"), block("mlp.fc_2", "mlp.up_proj"), block("mlp.proj", "mlp.down_proj"))
EXPERTS = (
    block("mlp.gate", "mlp.gate"),
    block("mlp.experts.{e}.fc_1", "mlp.experts.{e}.gate_proj"),
    block("mlp.experts.{e}.fc_2", "mlp.experts.{e}.up_proj"),
    block("mlp.experts.{e}.proj", "mlp.experts.{e}.down_proj"),
)
EQUATIONS = (*OUTER, *NORMS, *ATTENTION, *MLP)


def from_hf(hf: Hf) -> dict[str, Any]:
    expect(hf, hidden_act=("silu", "swish"))
    attention = value(hf, "attention_bias", bool, False)
    mlp = value(hf, "mlp_bias", bool, False)
    return {**read(hf, LLAMA_KEYS), **read_rope(hf), **biases(attention, attention, mlp)}


def to_hf(fields: Fields) -> dict[str, Any]:
    return {
        **write(fields, LLAMA_KEYS),
        **write_rope(fields),
        "hidden_act": "silu",
        "attention_bias": fields["qkv_bias"],
        "mlp_bias": fields["has_mlp_bias"],
    }


LLAMA3_ROPE = {"factor": 8.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0, "original_max_seq_len": 8192}
LLAMA32_ROPE = {**LLAMA3_ROPE, "factor": 32.0}

ROWS: tuple[Fields, ...] = with_traits(
    TRAITS, group("meta-llama", {}, size("Llama-2-7b-hf", n_layer=32, intermediate_size=11008))
)

LLAMA = Family(
    name="llama",
    model_type="llama",
    architecture="LlamaForCausalLM",
    # a llama may have biases (attention_bias, mlp_bias): not a trait
    traits={name: trait for name, trait in TRAITS.items() if name != "bias"},
    from_hf=from_hf,
    to_hf=to_hf,
    equations=lambda fields: EQUATIONS,
    rows=ROWS,
)
