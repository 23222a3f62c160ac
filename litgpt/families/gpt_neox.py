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
        {"n_layer": 16, "n_embd": 4096, "n_head": 32, "block_size": 4096},
        size("stablelm-{}-alpha-3b", "base", "tuned"),
        size("stablelm-{}-alpha-7b", "base", "tuned", n_embd=6144, n_head=48, padding_multiple=256),
        prompts={"stablelm-tuned-*": "stablelm-alpha"},
    ),
    group(
        "stabilityai",
        {"n_layer": 32, "n_embd": 2560, "n_head": 32, "block_size": 4096, "vocab_size": 49152},
        size("stablecode-completion-alpha-3b", block_size=16384),
        size("stablecode-{}", "completion-alpha-3b-4k", "instruct-alpha-3b"),
        prompts={"stablecode-instruct-*": "stablecode"},
    ),
    group(
        "EleutherAI",
        {"block_size": 2048, "padding_multiple": 128},
        size("pythia-14m", n_layer=6, n_embd=128, n_head=4),
        size("pythia-31m", n_layer=6, n_embd=256, n_head=8),
        size("pythia-70m{}", "", "-deduped", n_layer=6, n_embd=512, n_head=8),
        size("pythia-160m{}", "", "-deduped", n_layer=12, n_embd=768, n_head=12),
        size("pythia-410m{}", "", "-deduped", n_layer=24, n_embd=1024, n_head=16),
        size("pythia-1b{}", "", "-deduped", n_layer=16, n_embd=2048, n_head=8),
        size("pythia-1.4b{}", "", "-deduped", n_layer=24, n_embd=2048, n_head=16),
        size("pythia-2.8b{}", "", "-deduped", n_layer=32, n_embd=2560, n_head=32),
        size("pythia-6.9b{}", "", "-deduped", n_layer=32, n_embd=4096, n_head=32, padding_multiple=256),
        size("pythia-12b{}", "", "-deduped", n_layer=36, n_embd=5120, n_head=40, padding_multiple=512),
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
