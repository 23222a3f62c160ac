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


LLAMA_3 = {"vocab_size": 128256, "padded_vocab_size": 128256, "rope_base": 500000}
LLAMA_31_ROPE = {"factor": 8.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0, "original_max_seq_len": 8192}
LLAMA_32_ROPE = {**LLAMA_31_ROPE, "factor": 32.0}
CODE_LLAMA = {"block_size": 16384, "vocab_size": 32016, "padding_multiple": 16, "rope_base": 1000000}
PYTHON: dict[str, Any] = {
    "vocab_size": 32000,
    "padded_vocab_size": 32000,
    "padding_multiple": 512,
}  # Code Llamas without the infilling tokens

ROWS = with_traits(
    TRAITS,
    group(
        "openlm-research",
        {"block_size": 2048, "vocab_size": 32000, "padding_multiple": 64, "norm_eps": 1e-6},
        size("open_llama_3b", (26, 3200, 32, 32, 8640)),
        size("open_llama_7b", (32, 4096, 32, 32, 11008)),
        size("open_llama_13b", (40, 5120, 40, 40, 13824)),
    ),
    group(
        "meta-llama",
        {"block_size": 4096, "vocab_size": 32000, "padding_multiple": 64},
        size("Llama-2-7b{}-hf", (32, 4096, 32, 32, 11008), "", "-chat"),
        size("Llama-2-13b{}-hf", (40, 5120, 40, 40, 13824), "", "-chat"),
        size("Llama-2-70b{}-hf", (80, 8192, 64, 8, 28672), "", "-chat"),
        prompts={"*-chat-hf": "llama2"},
    ),
    group(
        "Trelis",
        {"block_size": 4096, "vocab_size": 32000, "padding_multiple": 64, "norm_eps": 1e-6},
        size("Llama-2-7b-chat-hf-function-calling-v2", (32, 4096, 32, 32, 11008), prompt="llama2-function-calling"),
    ),
    group(
        "togethercomputer",
        {"block_size": 32768, "vocab_size": 32000, "padding_multiple": 64, "rope_condense_ratio": 8},
        size("LLaMA-2-7B-32K", (32, 4096, 32, 32, 11008)),
    ),
    group(
        "stabilityai",
        {"block_size": 4096, "vocab_size": 32000, "padding_multiple": 64},
        size("FreeWilly2", (80, 8192, 64, 8, 28672), prompt="freewilly2"),
    ),
    group(
        "garage-bAInd",
        {"block_size": 4096, "padded_vocab_size": 32000, "prompt": "platypus"},
        size("Platypus-30B", (60, 6656, 52, 52, 17920), block_size=2048, norm_eps=1e-6),
        size("Platypus2-7B", (32, 4096, 32, 32, 11008)),
        size("{}Platypus2-13B", (40, 5120, 40, 40, 13824), "", "Camel-", "Stable-"),
        size("{}Platypus2-70B", (80, 8192, 64, 8, 28672), "", "Camel-"),
        size("Platypus2-70B-instruct", (80, 8192, 64, 8, 28672)),
    ),
    group(
        "codellama",
        {**CODE_LLAMA, "prompt": "codellama"},
        size("CodeLlama-7b{}-hf", (32, 4096, 32, 32, 11008), "", "-Instruct"),
        size("CodeLlama-7b-Python-hf", (32, 4096, 32, 32, 11008), **PYTHON),
        size("CodeLlama-13b{}-hf", (40, 5120, 40, 40, 13824), "", "-Instruct"),
        size("CodeLlama-13b-Python-hf", (40, 5120, 40, 40, 13824), **PYTHON),
        size("CodeLlama-34b{}-hf", (48, 8192, 64, 8, 22016), "", "-Python", "-Instruct", **PYTHON),
        size("CodeLlama-70b-hf", (80, 8192, 64, 8, 28672)),
        size("CodeLlama-70b-Python-hf", (80, 8192, 64, 8, 28672), block_size=4096, rope_base=10000),
        size("CodeLlama-70b-Instruct-hf", (80, 8192, 64, 8, 28672), block_size=4096, rope_base=10000, vocab_size=32015),
    ),
    group(
        "meta-llama",
        {**LLAMA_3, "block_size": 8192},
        size("Llama-3-8B{}", (32, 4096, 32, 8, 14336), "", "-Instruct", hf_name="Meta-Llama-3-8B{}"),
        size("Llama-3-70B{}", (80, 8192, 64, 8, 28672), "", "-Instruct", hf_name="Meta-Llama-3-70B{}"),
        prompts={"*-Instruct": "llama3"},
    ),
    group(
        "meta-llama",
        {**LLAMA_3, "block_size": 131072, "rope_adjustments": LLAMA_31_ROPE},
        size("Llama-3.1-8B{}", (32, 4096, 32, 8, 14336), "", "-Instruct", hf_name="Meta-Llama-3.1-8B{}"),
        size("Llama-3.1-70B{}", (80, 8192, 64, 8, 28672), "", "-Instruct", hf_name="Meta-Llama-3.1-70B{}"),
        size("Llama-3.1-405B{}", (126, 16384, 128, 8, 53248), "", "-Instruct", hf_name="Meta-Llama-3.1-405B{}"),
        size("Llama-3.3-70B-Instruct", (80, 8192, 64, 8, 28672)),
        prompts={"*-Instruct": "llama3"},
    ),
    group(
        "meta-llama",
        {**LLAMA_3, "block_size": 131072, "rope_adjustments": LLAMA_32_ROPE, "tie_embeddings": True},
        size("Llama-3.2-1B{}", (16, 2048, 32, 8, 8192), "", "-Instruct"),
        size("Llama-3.2-3B{}", (28, 3072, 24, 8, 8192), "", "-Instruct"),
        prompts={"*-Instruct": "llama3"},
    ),
    group(
        "nvidia",
        {**LLAMA_3, "block_size": 131072, "rope_adjustments": LLAMA_31_ROPE},
        size("Llama-3.1-Nemotron-70B-Instruct-HF", (80, 8192, 64, 8, 28672), prompt="llama3"),
    ),
    group(
        "deepseek-ai",
        {**LLAMA_3, "block_size": 131072, "rope_adjustments": LLAMA_31_ROPE, "prompt": "r1-base"},
        size("R1-Distill-Llama-8B", (32, 4096, 32, 8, 14336), hf_name="DeepSeek-R1-Distill-Llama-8B"),
        size("R1-Distill-Llama-70B", (80, 8192, 64, 8, 28672), hf_name="DeepSeek-R1-Distill-Llama-70B"),
    ),
    group(
        "tiiuae",
        {"vocab_size": 131072, "padded_vocab_size": 131072, "rope_base": 1000042, "norm_eps": 1e-6},
        size("Falcon3-1B{}", (18, 2048, 8, 4, 8192), "-Base", "-Instruct", block_size=4096),
        size("Falcon3-3B{}", (22, 3072, 12, 4, 9216), "-Base", "-Instruct", block_size=32768),
        size("Falcon3-7B{}", (28, 3072, 12, 4, 23040), "-Base", "-Instruct", block_size=32768),
        size("Falcon3-10B{}", (40, 3072, 12, 4, 23040), "-Base", "-Instruct", block_size=32768),
        prompts={"*-Instruct": "falcon3"},
    ),
    group(
        "TinyLlama",
        {"block_size": 2048, "vocab_size": 32000, "padding_multiple": 64},
        size("tiny-llama-1.1b", (22, 2048, 32, 4, 5632), hf_name="TinyLlama-1.1B-intermediate-step-1431k-3T"),
        size("tiny-llama-1.1b-chat", (22, 2048, 32, 4, 5632), hf_name="TinyLlama-1.1B-Chat-v1.0", prompt="tinyllama"),
    ),
    group(
        "keeeeenw",
        {"block_size": 2048, "vocab_size": 32000, "padding_multiple": 64},
        size("micro-llama-300M", (12, 1024, 16, 4, 5632), hf_name="MicroLlama"),
    ),
    group(
        "BSC-LT",
        {"block_size": 8192, "vocab_size": 256000, "padded_vocab_size": 256000},
        size("salamandra-2b{}", (24, 2048, 16, 16, 5440), "", "-instruct"),
        size("salamandra-7b{}", (32, 4096, 32, 8, 11008), "", "-instruct", norm_eps=1e-6),
        prompts={"*-instruct": "salamandra"},
    ),
    group(
        "HuggingFaceTB",
        {"block_size": 8192, "vocab_size": 49152, "padded_vocab_size": 49152, "tie_embeddings": True},
        size("SmolLM2-135M{}", (30, 576, 9, 3, 1536), "", "-Instruct", rope_base=100000),
        size("SmolLM2-360M{}", (32, 960, 15, 5, 2560), "", "-Instruct", rope_base=100000),
        size("SmolLM2-1.7B{}", (24, 2048, 32, 32, 8192), "", "-Instruct", rope_base=130000),
        prompts={"*-Instruct": "smollm2"},
    ),
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
