"""OLMo (LayerNorm without weights) and OLMo 2 (norms on the outputs of attention and MLP, and on queries and keys)."""

from __future__ import annotations

from typing import Any

from litgpt.families import llama
from litgpt.families.tables import (
    Family,
    Fields,
    Hf,
    Key,
    biases,
    block,
    expect,
    group,
    read,
    read_rope,
    real,
    size,
    value,
    with_traits,
    write,
    write_rope,
)

KEYS = (*llama.KEYS, *llama.HEAD_DIM, *llama.TIED)


def from_hf(hf: Hf) -> dict[str, Any]:
    expect(hf, hidden_act=("silu", "swish"))
    has_bias = value(hf, "attention_bias", bool, False)
    return {**read(hf, KEYS), **read_rope(hf), **biases(qkv=has_bias, proj=has_bias, mlp=False)}


def to_hf(fields: Fields) -> dict[str, Any]:
    return {**write(fields, KEYS), **write_rope(fields), "hidden_act": "silu", "attention_bias": fields["qkv_bias"]}


# --- OLMo ------------------------------------------------------------------------------------------------------------

OLMO_TRAITS = {**llama.LLAMA.traits, "norm_class_name": "LayerNorm", "norm_affine": False, "norm_eps": 1e-5}


def olmo_from_hf(hf: Hf) -> dict[str, Any]:
    return {**from_hf(hf), "clip_qkv": value(hf, "clip_qkv", float, None)}


def olmo_to_hf(fields: Fields) -> dict[str, Any]:
    return {**to_hf(fields), "clip_qkv": real(fields["clip_qkv"])}


OLMO_ROWS = with_traits(
    OLMO_TRAITS,
    group(
        "allenai",
        {"block_size": 2048, "vocab_size": 50280, "padded_vocab_size": 50304, "bias": False, "prompt": "olmo"},
        size("OLMo-1B-hf", (16, 2048, 16, 16, 8192), tie_embeddings=True),
        size("OLMo-7B{}-hf", (32, 4096, 32, 32, 11008), "", "-Instruct"),
    ),
)

OLMO = Family(
    name="olmo",
    model_type="olmo",
    architecture="OlmoForCausalLM",
    traits=OLMO_TRAITS,
    from_hf=olmo_from_hf,
    to_hf=olmo_to_hf,
    # the norms of blocks have no tensors: their equations never apply
    equations=lambda fields: llama.EQUATIONS,
    rows=OLMO_ROWS,
)

# --- OLMo 2 ----------------------------------------------------------------------------------------------------------

NORM_EPS = Key("rms_norm_eps", "norm_eps", float, default=1e-5)
OLMO2_TRAITS = {
    **llama.LLAMA.traits,
    **{"norm_1": False, "norm_2": False, "post_attention_norm": True, "post_mlp_norm": True},
    **{"norm_qk": True, "norm_qk_type": "olmo2"},
}
OLMO2_EQUATIONS = (
    *llama.OUTER,
    *llama.ATTENTION,
    *llama.QK_NORMS,
    block("post_attention_norm", "post_attention_layernorm"),
    block("post_mlp_norm", "post_feedforward_layernorm"),
    *llama.MLP,
)


def olmo2_from_hf(hf: Hf) -> dict[str, Any]:
    return {**from_hf(hf), **read(hf, (NORM_EPS,))}


def olmo2_to_hf(fields: Fields) -> dict[str, Any]:
    return {**to_hf(fields), **write(fields, (NORM_EPS,))}


OLMO2_SHARED = {"vocab_size": 100278, "padded_vocab_size": 100352, "rope_base": 500000, "norm_eps": 1e-6}

OLMO2_ROWS = with_traits(
    OLMO2_TRAITS,
    group(
        "allenai",
        {**OLMO2_SHARED, "block_size": 4096, "bias": False},
        size("OLMo-2-1124-7B{}", (32, 4096, 32, 32, 11008), "", "-SFT", "-DPO", "-Instruct"),
        size("OLMo-2-1124-13B{}", (40, 5120, 40, 40, 13824), "", "-SFT", "-DPO", "-Instruct"),
        prompts={"*-SFT": "llama3", "*-DPO": "llama3", "*-Instruct": "llama3"},
    ),
)

OLMO2 = Family(
    name="olmo2",
    model_type="olmo2",
    architecture="Olmo2ForCausalLM",
    traits=OLMO2_TRAITS,
    from_hf=olmo2_from_hf,
    to_hf=olmo2_to_hf,
    equations=lambda fields: OLMO2_EQUATIONS,
    rows=OLMO2_ROWS,
)
