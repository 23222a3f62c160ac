"""Gemma, Gemma 2 and the text part of Gemma 3: scaled embeddings, norms that multiply by (1 + weight), tied heads."""

from __future__ import annotations

from typing import Any

from litgpt.errors import InputError
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
    group,
    layer_pattern,
    layer_types,
    nullable,
    read,
    read_rope,
    real,
    repeat,
    size,
    value,
    whole,
    with_traits,
    write,
    write_rope,
)

KEYS = (
    Key("hidden_size", "n_embd"),
    Key("num_hidden_layers", "n_layer"),
    Key("num_attention_heads", "n_head"),
    Key("num_key_value_heads", "n_query_groups"),
    Key("head_dim", "head_size", default=256),
    Key("intermediate_size", "intermediate_size"),
    Key("max_position_embeddings", "block_size", default=8192),
    Key("vocab_size", "padded_vocab_size"),
    Key("rms_norm_eps", "norm_eps", float, default=1e-6),
    Key("tie_word_embeddings", "tie_embeddings", bool, default=True),
)
TRAITS = {
    "rotary_percentage": 1.0,
    "parallel_residual": False,
    "norm_class_name": "RMSNorm",
    "norm_unit_offset": True,
    "mlp_class_name": "GemmaMLP",
    "gelu_approximate": "tanh",
    "scale_embeddings": True,
}
SHARED = {"bias": False, "norm_eps": 1e-6, "tie_embeddings": True}


def attention_biases(hf: Hf) -> dict[str, Any]:
    has_bias = value(hf, "attention_bias", bool, False)
    return biases(qkv=has_bias, proj=has_bias, mlp=False)


# --- Gemma -----------------------------------------------------------------------------------------------------------


def gemma_from_hf(hf: Hf) -> dict[str, Any]:
    # "gelu" stands in the first files; the models were trained with the tanh form
    gelu = ("gelu", "gelu_pytorch_tanh")
    expect(hf, hidden_act=gelu, hidden_activation=gelu, use_bidirectional_attention=False)
    return {**read(hf, KEYS), **read_rope(hf), **attention_biases(hf)}


def gemma_to_hf(fields: Fields) -> dict[str, Any]:
    return {
        **write(fields, KEYS),
        **write_rope(fields),
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_activation": "gelu_pytorch_tanh",
        "attention_bias": fields["qkv_bias"],
    }


GEMMA_ROWS = with_traits(
    {**TRAITS, **SHARED},
    group(
        "google",
        {"block_size": 8192, "vocab_size": 256000, "padding_multiple": 64, "head_size": 256},
        size("Gemma-2b{}", (18, 2048, 8, 1, 16384), "", "-it", hf_name="gemma-2b{}"),
        size("Gemma-7b{}", (28, 3072, 16, 16, 24576), "", "-it", hf_name="gemma-7b{}"),
        size("CodeGemma-7b-it", (28, 3072, 16, 16, 24576), hf_name="codegemma-7b-it"),
        prompts={"*-it": "gemma"},
    ),
)

GEMMA = Family(
    name="gemma",
    model_type="gemma",
    architecture="GemmaForCausalLM",
    traits=TRAITS,
    from_hf=gemma_from_hf,
    to_hf=gemma_to_hf,
    equations=lambda fields: llama.EQUATIONS,
    rows=GEMMA_ROWS,
)

# --- Gemma 2 ---------------------------------------------------------------------------------------------------------

SANDWICH_TRAITS = {**TRAITS, "post_attention_norm": True, "post_mlp_norm": True}
SANDWICH_NORMS = (
    block("norm_1", "input_layernorm"),
    block("post_attention_norm", "post_attention_layernorm"),
    block("norm_2", "pre_feedforward_layernorm"),
    block("post_mlp_norm", "post_feedforward_layernorm"),
)
GEMMA2_EQUATIONS = (*llama.OUTER, *SANDWICH_NORMS, *llama.ATTENTION, *llama.MLP)


def sandwich_from_hf(hf: Hf, window: int, softcaps: tuple[float, float] | tuple[None, None]) -> dict[str, Any]:
    """What Gemma 2 and 3 share; `window` and `softcaps` (of scores, of logits) are the values of absent keys."""
    expect(hf, hidden_activation="gelu_pytorch_tanh", use_bidirectional_attention=False)
    return {
        "attention_scores_scalar": whole(value(hf, "query_pre_attn_scalar", float, 256)),
        "attention_logit_softcapping": nullable(hf, "attn_logit_softcapping", float, softcaps[0]),
        "final_logit_softcapping": nullable(hf, "final_logit_softcapping", float, softcaps[1]),
        "sliding_window_size": nullable(hf, "sliding_window", int, window),
        **attention_biases(hf),
    }


def sandwich_to_hf(fields: Fields) -> dict[str, Any]:
    return {
        **write_rope(fields),
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": whole(fields["attention_scores_scalar"] or fields["head_size"]),
        "attn_logit_softcapping": real(fields["attention_logit_softcapping"]),
        "final_logit_softcapping": real(fields["final_logit_softcapping"]),
        "sliding_window": fields["sliding_window_size"],
        "layer_types": layer_types(fields["sliding_window_indices"] or [0] * fields["n_layer"]),
        "attention_bias": fields["qkv_bias"],
    }


def gemma2_from_hf(hf: Hf) -> dict[str, Any]:
    sizes = read(hf, KEYS)
    pattern = layer_pattern(hf, repeat([1, 0], sizes["n_layer"]))
    switches = sandwich_from_hf(hf, window=4096, softcaps=(50.0, 30.0))
    return {**sizes, **read_rope(hf), **switches, "sliding_window_indices": pattern}


def gemma2_to_hf(fields: Fields) -> dict[str, Any]:
    return {**write(fields, KEYS), **sandwich_to_hf(fields)}


GEMMA2_SHARED = {
    **{"block_size": 8192, "vocab_size": 256000, "sliding_window_size": 4096},
    **{"attention_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
}


def alternating(n_layer: int) -> dict[str, list[int]]:
    return {"sliding_window_indices": repeat([1, 0], n_layer)}


GEMMA2_ROWS = with_traits(
    {**SANDWICH_TRAITS, **SHARED, **GEMMA2_SHARED},
    group(
        "google",
        {"head_size": 256, "attention_scores_scalar": 256},
        size("Gemma-2-2b{}", (26, 2304, 8, 4, 9216), "", "-it", hf_name="gemma-2-2b{}", **alternating(26)),
        size("Gemma-2-9b{}", (42, 3584, 16, 8, 14336), "", "-it", hf_name="gemma-2-9b{}", **alternating(42)),
        prompts={"*-it": "gemma"},
    ),
    group(
        "google",
        {"head_size": 128, "attention_scores_scalar": 144},
        size("Gemma-2-27b{}", (46, 4608, 32, 16, 36864), "", "-it", hf_name="gemma-2-27b{}", **alternating(46)),
        prompts={"*-it": "gemma"},
    ),
)

GEMMA2 = Family(
    name="gemma2",
    model_type="gemma2",
    architecture="Gemma2ForCausalLM",
    traits=SANDWICH_TRAITS,
    from_hf=gemma2_from_hf,
    to_hf=gemma2_to_hf,
    equations=lambda fields: GEMMA2_EQUATIONS,
    rows=GEMMA2_ROWS,
)

# --- Gemma 3 ---------------------------------------------------------------------------------------------------------

# a multimodal file keeps the text model's values under text_config, and leaves out those that are the defaults here
GEMMA3_KEYS = (
    Key("hidden_size", "n_embd", default=2304),
    Key("num_hidden_layers", "n_layer", default=26),
    Key("num_attention_heads", "n_head", default=8),
    Key("num_key_value_heads", "n_query_groups", default=4),
    Key("head_dim", "head_size", default=256),
    Key("intermediate_size", "intermediate_size", default=9216),
    Key("max_position_embeddings", "block_size", default=131072),
    Key("vocab_size", "padded_vocab_size", default=262208),
    *KEYS[-2:],
)
GEMMA3_TRAITS = {**SANDWICH_TRAITS, "norm_qk": True}
GEMMA3_EQUATIONS = (*llama.OUTER, *SANDWICH_NORMS, *llama.ATTENTION, *llama.QK_NORMS, *llama.MLP)


def gemma3_from_hf(hf: Hf) -> dict[str, Any]:
    if "text_config" in hf:
        hf = {"tie_word_embeddings": hf.get("tie_word_embeddings"), **value(hf, "text_config", dict)}
    sizes = read(hf, GEMMA3_KEYS)
    every = value(hf, "sliding_window_pattern", int, 6, older=("_sliding_window_pattern",))
    if every < 1:
        raise InputError(f"sliding_window_pattern is {every}, must be a positive integer")
    pattern = layer_pattern(hf, [int((layer + 1) % every != 0) for layer in range(sizes["n_layer"])])
    return {
        **sizes,
        **sandwich_from_hf(hf, window=4096, softcaps=(None, None)),
        **read_rope(hf, theta=1000000),
        **_local_rope(hf),
        "sliding_window_indices": pattern,
        "rope_indices": pattern,
    }


def _local_rope(hf: Hf) -> dict[str, Any]:
    """The rope of sliding layers: in the older spelling a base of its own, never scaled."""
    older = value(hf, "rope_local_base_freq", float, 10000)
    nested = {"rope_parameters": hf.get("rope_parameters")}
    rope = read_rope(nested, "sliding_attention", theta=older)
    if rope["rope_adjustments"]:
        raise InputError("rope_parameters: sliding_attention is scaled, which LitGPT does not have")
    return {"rope_local_base_freq": rope["rope_base"]}


def gemma3_to_hf(fields: Fields) -> dict[str, Any]:
    return {
        **write(fields, GEMMA3_KEYS),
        **sandwich_to_hf(fields),
        "rope_local_base_freq": float(fields["rope_local_base_freq"] or fields["rope_base"]),
    }


GEMMA3_SHARED = {"rope_base": 1000000, "rope_local_base_freq": 10000, "vocab_size": 262144}


def five_to_one(n_layer: int) -> dict[str, list[int]]:
    """Five sliding layers with local rope, then a full one."""
    pattern = repeat([1, 1, 1, 1, 1, 0], n_layer)
    return {"sliding_window_indices": pattern, "rope_indices": pattern}


GEMMA3_ROWS = with_traits(
    {**GEMMA3_TRAITS, **SHARED, **GEMMA3_SHARED},
    group(
        "google",
        {"block_size": 32768, "sliding_window_size": 512, "head_size": 256, "attention_scores_scalar": 256},
        size("Gemma-3-1b-it", (26, 1152, 4, 1, 6912), hf_name="gemma-3-1b-it", prompt="gemma", **five_to_one(26)),
    ),
    group(
        "google",
        {
            **{"block_size": 131072, "sliding_window_size": 1024, "head_size": 256, "attention_scores_scalar": 256},
            "rope_adjustments": {"factor": 8.0},
            "padded_vocab_size": 262208,  # the last 64 rows are for image tokens
            "prompt": "gemma",
        },
        size("Gemma-3-4b-it", (34, 2560, 8, 4, 10240), hf_name="gemma-3-4b-it", **five_to_one(34)),
        size("Gemma-3-12b-it", (48, 3840, 16, 8, 15360), hf_name="gemma-3-12b-it", **five_to_one(48)),
        size(
            "Gemma-3-27b-it",
            (62, 5376, 32, 16, 21504),
            hf_name="gemma-3-27b-it",
            head_size=128,
            attention_scores_scalar=168,
            **five_to_one(62),
        ),
    ),
)

VISION = ("vision_tower.*", "multi_modal_projector.*", "model.vision_tower.*", "model.multi_modal_projector.*")

GEMMA3 = Family(
    name="gemma3",
    model_type="gemma3_text",
    architecture="Gemma3ForCausalLM",
    aliases=("gemma3",),
    traits=GEMMA3_TRAITS,
    from_hf=gemma3_from_hf,
    to_hf=gemma3_to_hf,
    equations=lambda fields: GEMMA3_EQUATIONS,
    ignored=(*IGNORED, *VISION),
    # the first two in files of the hub, the third as transformers >= 4.52 writes them
    prefixes=(
        ("language_model.model.", "model."),
        ("language_model.lm_head.", "lm_head."),
        ("model.language_model.", "model."),
    ),
    rows=GEMMA3_ROWS,
)
