"""Mistral: a Llama with a window on every layer, or on none."""

from __future__ import annotations

from typing import Any

from litgpt.errors import InputError
from litgpt.families import llama
from litgpt.families.llama import EQUATIONS, TRAITS
from litgpt.families.tables import (
    Family,
    Fields,
    Hf,
    Key,
    expect,
    group,
    layer_pattern,
    nullable,
    read,
    read_rope,
    size,
    with_traits,
    write,
    write_rope,
)

KEYS = (
    Key("hidden_size", "n_embd"),
    Key("num_hidden_layers", "n_layer"),
    Key("num_attention_heads", "n_head"),
    Key("num_key_value_heads", "n_query_groups", default=8),
    Key("intermediate_size", "intermediate_size"),
    Key("max_position_embeddings", "block_size", default=131072),
    Key("vocab_size", "padded_vocab_size"),
    *llama.HEAD_DIM,
    *llama.RMS_EPS,
    *llama.TIED,
)


def from_hf(hf: Hf) -> dict[str, Any]:
    expect(hf, hidden_act=("silu", "swish"))
    window = nullable(hf, "sliding_window", int, absent=4096)
    pattern = layer_pattern(hf, [1])
    if window and 0 in pattern:
        raise InputError("layer_types has full layers, which LitGPT does not have for model_type 'mistral'")
    return {**read(hf, KEYS), **read_rope(hf), "sliding_window_size": window}


def to_hf(fields: Fields) -> dict[str, Any]:
    return {
        **write(fields, KEYS),
        **write_rope(fields),
        "hidden_act": "silu",
        "sliding_window": fields["sliding_window_size"],
    }


ROWS = with_traits(
    TRAITS,
    group(
        "mistralai",
        {"block_size": 32768, "rope_base": 1000000, "padded_vocab_size": 32768},
        size("Mistral-7B-Instruct-v0.2", (32, 4096, 32, 8, 14336), padded_vocab_size=32000),
        size("Mistral-7B-{}v0.3", (32, 4096, 32, 8, 14336), "", "Instruct-"),
        size("Mathstral-7B-v0.1", (32, 4096, 32, 8, 14336), hf_name="mathstral-7B-v0.1", sliding_window_size=4096),
        size("Mistral-Large-Instruct-{}", (88, 12288, 96, 8, 28672), "2407", "2411"),
        prompts={"*-Instruct-*": "codellama", "Mathstral-*": "codellama"},
    ),
    group(
        "mistralai",
        {"block_size": 32768, "rope_base": 10000, "padded_vocab_size": 32000, "sliding_window_size": 4096},
        size("Mistral-7B-{}v0.1", (32, 4096, 32, 8, 14336), "", "Instruct-"),
        prompts={"*-Instruct-*": "codellama"},
    ),
    group(
        "unsloth",
        {"block_size": 32768, "rope_base": 1000000, "padded_vocab_size": 32000},
        size("Mistral-7B-v0.2", (32, 4096, 32, 8, 14336)),
    ),
)

MISTRAL = Family(
    name="mistral",
    model_type="mistral",
    architecture="MistralForCausalLM",
    traits=TRAITS,
    from_hf=from_hf,
    to_hf=to_hf,
    equations=lambda fields: EQUATIONS,
    rows=ROWS,
)
