"""Qwen 2 and 2.5 (biases on query, key, value), Qwen 3 (norms on queries and keys) and its mixture of experts."""

from __future__ import annotations

from typing import Any

from litgpt.errors import InputError
from litgpt.families import llama
from litgpt.families.tables import (
    Family,
    Fields,
    Hf,
    Key,
    biases,
    expect,
    group,
    layer_pattern,
    layer_types,
    nullable,
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
    Key("num_key_value_heads", "n_query_groups", default=32),
    Key("intermediate_size", "intermediate_size"),
    Key("max_position_embeddings", "block_size", default=32768),
    Key("vocab_size", "padded_vocab_size"),
    *llama.RMS_EPS,
    *llama.TIED,
)


def window_from_hf(hf: Hf, n_layer: int) -> dict[str, Any]:
    """`use_sliding_window` switches the windows on, in the layers from `max_window_layers` up."""
    if not value(hf, "use_sliding_window", bool, False):
        return {}
    first = value(hf, "max_window_layers", int, 28)
    pattern = layer_pattern(hf, [int(layer >= first) for layer in range(n_layer)])
    return {"sliding_window_size": nullable(hf, "sliding_window", int, 4096), "sliding_window_indices": pattern}


def window_to_hf(fields: Fields) -> dict[str, Any]:
    window, indices = fields["sliding_window_size"], fields["sliding_window_indices"]
    if not window:
        return {"use_sliding_window": False, "sliding_window": None}
    first = indices.index(1) if 1 in indices else len(indices)
    switches = {"use_sliding_window": True, "sliding_window": window, "max_window_layers": first}
    return {**switches, "layer_types": layer_types(indices)}


# --- Qwen 2, Qwen 2.5, QwQ -------------------------------------------------------------------------------------------

QWEN2_KEYS = (*KEYS, *llama.HEAD_DIM)
QWEN2_TRAITS = {**llama.TRAITS, "attn_bias": True}


def qwen2_from_hf(hf: Hf) -> dict[str, Any]:
    expect(hf, hidden_act=("silu", "swish"))
    sizes = read(hf, QWEN2_KEYS)
    return {**sizes, **read_rope(hf), **window_from_hf(hf, sizes["n_layer"])}


def qwen2_to_hf(fields: Fields) -> dict[str, Any]:
    return {**write(fields, QWEN2_KEYS), **write_rope(fields), **window_to_hf(fields), "hidden_act": "silu"}


# 271 to 421 more rows stand in the embeddings than there are tokens
SMALL_VOCAB: dict[str, Any] = {"vocab_size": 151669, "padded_vocab_size": 151936, "norm_eps": 1e-6}
LARGE_VOCAB: dict[str, Any] = {"vocab_size": 151669, "padded_vocab_size": 152064}
MILLION = {"rope_base": 1000000}

QWEN2_SHAPES = {
    "0.5B": (24, 896, 14, 2, 4864),
    "1.5B": (28, 1536, 12, 2, 8960),
    "3B": (36, 2048, 16, 2, 11008),
    "7B": (28, 3584, 28, 4, 18944),
    "14B": (48, 5120, 40, 8, 13824),
    "32B": (64, 5120, 40, 8, 27648),
    "72B": (80, 8192, 64, 8, 29568),
}


def qwen2(name: str, *variants: str, **fields: Any) -> list[dict[str, Any]]:
    """`size`, with the shape of the size that the name says."""
    return size(name, next(shape for label, shape in QWEN2_SHAPES.items() if f"-{label}" in name), *variants, **fields)


BOTH = ("", "-Instruct")

QWEN2_ROWS = with_traits(
    QWEN2_TRAITS,
    group(
        "Qwen",
        {**SMALL_VOCAB, **MILLION, "tie_embeddings": True, "prompt": "qwen2.5"},
        qwen2("Qwen2.5-0.5B{}", *BOTH, block_size=32768),
        qwen2("Qwen2.5-1.5B", block_size=131072),
        qwen2("Qwen2.5-1.5B-Instruct", block_size=32768),
        qwen2("Qwen2.5-3B{}", *BOTH, block_size=32768),
    ),
    group(
        "Qwen",
        {**LARGE_VOCAB, **MILLION, "block_size": 131072, "prompt": "qwen2.5"},
        qwen2("Qwen2.5-7B", norm_eps=1e-6),
        *(qwen2(f"Qwen2.5-{label}") for label in ("14B", "32B", "72B")),
    ),
    group(
        "Qwen",
        {**LARGE_VOCAB, **MILLION, "block_size": 32768, "norm_eps": 1e-6, "prompt": "qwen2.5"},
        *(qwen2(f"Qwen2.5-{label}-Instruct") for label in ("7B", "14B", "32B", "72B")),
    ),
    group(
        "Qwen",
        {**LARGE_VOCAB, "rope_base": 10000000, "block_size": 1010000, "prompt": "qwen2.5"},
        *(qwen2(f"Qwen2.5-{label}-Instruct-1M") for label in ("7B", "14B")),
    ),
    group(
        "Qwen",
        {**SMALL_VOCAB, **MILLION, "block_size": 32768, "tie_embeddings": True, "prompt": "qwen2.5"},
        *(qwen2(f"Qwen2.5-Coder-{label}{{}}", *BOTH) for label in ("0.5B", "1.5B", "3B")),
    ),
    group(
        "Qwen",
        {**LARGE_VOCAB, **MILLION, "block_size": 32768, "prompt": "qwen2.5"},
        qwen2("Qwen2.5-Coder-7B{}", *BOTH, norm_eps=1e-6),
        *(qwen2(f"Qwen2.5-Coder-{label}{{}}", *BOTH) for label in ("14B", "32B")),
    ),
    group(
        "Qwen",
        {"block_size": 4096, "prompt": "qwen2.5-math"},
        qwen2("Qwen2.5-Math-1.5B{}", *BOTH, **SMALL_VOCAB, tie_embeddings=True),
        qwen2("Qwen2.5-Math-7B{}", *BOTH, **LARGE_VOCAB, norm_eps=1e-6),
        qwen2("Qwen2.5-Math-72B{}", *BOTH, **LARGE_VOCAB),
    ),
    group(
        "Qwen",
        {**LARGE_VOCAB, **MILLION, "prompt": "qwq"},
        qwen2("QwQ-32B", block_size=131072),
        qwen2("QwQ-32B-Preview", block_size=32768),
    ),
)

QWEN2 = Family(
    name="qwen2",
    model_type="qwen2",
    architecture="Qwen2ForCausalLM",
    traits=QWEN2_TRAITS,
    from_hf=qwen2_from_hf,
    to_hf=qwen2_to_hf,
    equations=lambda fields: llama.EQUATIONS,
    rows=QWEN2_ROWS,
)

# --- Qwen 3 ----------------------------------------------------------------------------------------------------------

QWEN3_KEYS = (*KEYS, Key("head_dim", "head_size", default=128))
QWEN3_TRAITS = {**llama.LLAMA.traits, "norm_qk": True}
QWEN3_EQUATIONS = (*llama.EQUATIONS, *llama.QK_NORMS)


def attention_biases(hf: Hf) -> dict[str, Any]:
    has_bias = value(hf, "attention_bias", bool, False)
    return biases(qkv=has_bias, proj=has_bias, mlp=False)


def qwen3_from_hf(hf: Hf) -> dict[str, Any]:
    expect(hf, hidden_act=("silu", "swish"))
    sizes = read(hf, QWEN3_KEYS)
    return {**sizes, **read_rope(hf), **window_from_hf(hf, sizes["n_layer"]), **attention_biases(hf)}


def qwen3_to_hf(fields: Fields) -> dict[str, Any]:
    return {
        **write(fields, QWEN3_KEYS),
        **write_rope(fields),
        **window_to_hf(fields),
        "hidden_act": "silu",
        "attention_bias": fields["qkv_bias"],
    }


QWEN3_SHARED = {**SMALL_VOCAB, **MILLION, "bias": False, "head_size": 128}

QWEN3_SMALL = {
    "0.6B": (28, 1024, 16, 8, 3072),
    "1.7B": (28, 2048, 16, 8, 6144),
    "4B": (36, 2560, 32, 8, 9728),
}
QWEN3_LARGE = {
    "8B": (36, 4096, 32, 8, 12288),
    "14B": (40, 5120, 40, 8, 17408),
}


def qwen3(variant: str, block_size: int) -> list[dict[str, Any]]:
    """Rows of the five sizes that come trained both for chat and not."""
    small = (size(f"Qwen3-{b}{variant}", shape, tie_embeddings=True) for b, shape in QWEN3_SMALL.items())
    large = (size(f"Qwen3-{b}{variant}", shape) for b, shape in QWEN3_LARGE.items())
    return [{**row, "block_size": block_size} for rows in (*small, *large) for row in rows]


QWEN3_ROWS = with_traits(
    {**QWEN3_TRAITS, **QWEN3_SHARED},
    group("Qwen", {}, qwen3("", 40960), size("Qwen3-32B", (64, 5120, 64, 8, 25600), block_size=40960)),
    group("Qwen", {}, qwen3("-Base", 32768)),
    group(
        "Qwen",
        {"block_size": 262144, "rope_base": 5000000, "tie_embeddings": True},
        size("Qwen3-4B-{}-2507", QWEN3_SMALL["4B"], "Thinking", "Instruct"),
    ),
)

QWEN3 = Family(
    name="qwen3",
    model_type="qwen3",
    architecture="Qwen3ForCausalLM",
    traits=QWEN3_TRAITS,
    from_hf=qwen3_from_hf,
    to_hf=qwen3_to_hf,
    equations=lambda fields: QWEN3_EQUATIONS,
    rows=QWEN3_ROWS,
    prompt="qwen3",
)

# --- Qwen 3 mixture of experts ---------------------------------------------------------------------------------------

MOE_KEYS = (
    *KEYS,
    Key("num_key_value_heads", "n_query_groups", default=4),
    *llama.HEAD_DIM,
    Key("moe_intermediate_size", "moe_intermediate_size", default=768),
    Key("num_experts", "n_expert", default=128, older=("num_local_experts",)),
    Key("num_experts_per_tok", "n_expert_per_token", default=8),
    Key("norm_topk_prob", "softmax_topk_norm", bool, default=False),
)
MOE_TRAITS = {**QWEN3_TRAITS, "mlp_class_name": "LLaMAMoE"}
MOE_EQUATIONS = (*llama.OUTER, *llama.NORMS, *llama.ATTENTION, *llama.QK_NORMS, *llama.EXPERTS)


def moe_from_hf(hf: Hf) -> dict[str, Any]:
    expect(hf, hidden_act=("silu", "swish"), decoder_sparse_step=1)
    if dense := value(hf, "mlp_only_layers", list, []):
        raise InputError(f"mlp_only_layers is {dense}, which LitGPT does not have (only [])")
    window = value(hf, "sliding_window", int, 4096) if value(hf, "use_sliding_window", bool, False) else None
    return {**read(hf, MOE_KEYS), **read_rope(hf), **attention_biases(hf), "sliding_window_size": window}


def moe_to_hf(fields: Fields) -> dict[str, Any]:
    return {
        **write(fields, MOE_KEYS),
        **write_rope(fields),
        "use_sliding_window": fields["sliding_window_size"] is not None,
        "sliding_window": fields["sliding_window_size"],
        "hidden_act": "silu",
        "attention_bias": fields["qkv_bias"],
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }


MOE_30B, MOE_235B = (48, 2048, 32, 4, 6144), (94, 4096, 64, 4, 12288)

MOE_ROWS = with_traits(
    {**MOE_TRAITS, **QWEN3_SHARED, "n_expert": 128, "n_expert_per_token": 8},
    group(
        "Qwen",
        {"moe_intermediate_size": 768},
        size("Qwen3-30B-A3B{}", MOE_30B, "", "-Base", block_size=40960),
        size("Qwen3-30B-A3B-{}-2507", MOE_30B, "Thinking", "Instruct", block_size=262144, rope_base=10000000),
    ),
    group(
        "Qwen",
        {"moe_intermediate_size": 1536},
        size("Qwen3-235B-A22B", MOE_235B, block_size=40960),
        size("Qwen3-235B-A22B-{}-2507", MOE_235B, "Thinking", "Instruct", block_size=262144, rope_base=5000000),
    ),
)

QWEN3_MOE = Family(
    name="qwen3_moe",
    model_type="qwen3_moe",
    architecture="Qwen3MoeForCausalLM",
    traits=MOE_TRAITS,
    from_hf=moe_from_hf,
    to_hf=moe_to_hf,
    equations=lambda fields: MOE_EQUATIONS,
    rows=MOE_ROWS,
    prompt="qwen3",
)
