"""GPT-NeoX: Pythia, and StableLM's and StableCode's first (alpha) models."""

from __future__ import annotations

from typing import Any

from litgpt.families.tables import (
    Equation,
    Family,
    Fields,
    Hf,
    Key,
    biases,
    block,
    eq,
    group,
    read,
    read_gelu,
    read_rope,
    size,
    value,
    with_traits,
    write,
    write_gelu,
    write_scaling,
)

KEYS = (
    Key("hidden_size", "n_embd"),
    Key("num_hidden_layers", "n_layer"),
    Key("num_attention_heads", "n_head"),
    Key("intermediate_size", "intermediate_size"),
    Key("max_position_embeddings", "block_size", default=2048),
    Key("vocab_size", "padded_vocab_size"),
    Key("layer_norm_eps", "norm_eps", float, default=1e-5),
    Key("use_parallel_residual", "parallel_residual", bool, default=True),
    Key("tie_word_embeddings", "tie_embeddings", bool, default=False),
)
TRAITS = {"norm_class_name": "LayerNorm", "mlp_class_name": "GptNeoxMLP"}


def layer(ours: str, theirs: str, layout: str = "") -> Equation:
    return block(ours, theirs, layout, under="gpt_neox.layers.{l}.")


EQUATIONS = (
    eq("transformer.wte", "gpt_neox.embed_in"),
    layer("norm_1", "input_layernorm"),
    layer("norm_2", "post_attention_layernorm"),
    layer("attn.qkv", "attention.query_key_value", layout="grouped_qkv"),
    layer("attn.proj", "attention.dense"),
    layer("mlp.fc", "mlp.dense_h_to_4h"),
    layer("mlp.proj", "mlp.dense_4h_to_h"),
    eq("transformer.ln_f", "gpt_neox.final_layer_norm"),
    eq("lm_head", "embed_out"),
)


def from_hf(hf: Hf) -> dict[str, Any]:
    theta = value(hf, "rotary_emb_base", float, 10000)
    partial = value(hf, "rotary_pct", float, 0.25)
    attention = value(hf, "attention_bias", bool, True)
    return {
        **read(hf, KEYS),
        **read_gelu(hf, "hidden_act", "gelu"),
        **read_rope(hf, theta=theta, partial=partial),
        **biases(attention, attention, True),
    }


def to_hf(fields: Fields) -> dict[str, Any]:
    return {
        **write(fields, KEYS),
        **write_gelu(fields, "hidden_act"),
        "rotary_pct": fields["rotary_percentage"],
        "rotary_emb_base": fields["rope_base"],
        "rope_scaling": write_scaling(fields),
        "attention_bias": fields["qkv_bias"],
    }


ROWS = with_traits(
    TRAITS,
    group(
        "stabilityai",
        {"block_size": 4096},
        size("stablelm-{}-alpha-3b", (16, 4096, 32, 32, 16384), "base", "tuned"),
        size("stablelm-{}-alpha-7b", (16, 6144, 48, 48, 24576), "base", "tuned", padding_multiple=256),
        prompts={"stablelm-tuned-*": "stablelm-alpha"},
    ),
    group(
        "stabilityai",
        {"vocab_size": 49152},
        size("stablecode-completion-alpha-3b", (32, 2560, 32, 32, 10240), block_size=16384),
        size(
            "stablecode-{}", (32, 2560, 32, 32, 10240), "completion-alpha-3b-4k", "instruct-alpha-3b", block_size=4096
        ),
        prompts={"stablecode-instruct-*": "stablecode"},
    ),
    group(
        "EleutherAI",
        {"block_size": 2048, "padding_multiple": 128},
        size("pythia-14m", (6, 128, 4, 4, 512)),
        size("pythia-31m", (6, 256, 8, 8, 1024)),
        size("pythia-70m{}", (6, 512, 8, 8, 2048), "", "-deduped"),
        size("pythia-160m{}", (12, 768, 12, 12, 3072), "", "-deduped"),
        size("pythia-410m{}", (24, 1024, 16, 16, 4096), "", "-deduped"),
        size("pythia-1b{}", (16, 2048, 8, 8, 8192), "", "-deduped"),
        size("pythia-1.4b{}", (24, 2048, 16, 16, 8192), "", "-deduped"),
        size("pythia-2.8b{}", (32, 2560, 32, 32, 10240), "", "-deduped"),
        size("pythia-6.9b{}", (32, 4096, 32, 32, 16384), "", "-deduped", padding_multiple=256),
        size("pythia-12b{}", (36, 5120, 40, 40, 20480), "", "-deduped", padding_multiple=512),
    ),
)

GPT_NEOX = Family(
    name="gpt_neox",
    model_type="gpt_neox",
    architecture="GPTNeoXForCausalLM",
    traits=TRAITS,
    from_hf=from_hf,
    to_hf=to_hf,
    equations=lambda fields: EQUATIONS,
    prefixes=(("lm_head.", "embed_out."),),  # as transformers >= 5 calls it in memory
    rows=ROWS,
)
