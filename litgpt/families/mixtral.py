"""Mixtral: a Mistral whose MLP is a choice of experts."""

from __future__ import annotations

from typing import Any

from litgpt.families import llama
from litgpt.families.tables import (
    Family,
    Fields,
    Hf,
    Key,
    block,
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
    Key("num_key_value_heads", "n_query_groups", default=8),
    Key("intermediate_size", "intermediate_size"),
    Key("max_position_embeddings", "block_size", default=131072),
    Key("vocab_size", "padded_vocab_size"),
    Key("rms_norm_eps", "norm_eps", float, default=1e-5),
    Key("num_local_experts", "n_expert", default=8, older=("num_experts",)),
    Key("num_experts_per_tok", "n_expert_per_token", default=2),
    *llama.HEAD_DIM,
    *llama.TIED,
)
TRAITS = {**llama.TRAITS, "mlp_class_name": "LLaMAMoE", "softmax_topk_norm": True}

EQUATIONS = (
    *llama.OUTER,
    *llama.NORMS,
    *llama.ATTENTION,
    block("mlp.gate", "block_sparse_moe.gate"),
    block("mlp.experts.{e}.fc_1", "block_sparse_moe.experts.{e}.w1"),
    block("mlp.experts.{e}.fc_2", "block_sparse_moe.experts.{e}.w3"),
    block("mlp.experts.{e}.proj", "block_sparse_moe.experts.{e}.w2"),
)


def from_hf(hf: Hf) -> dict[str, Any]:
    expect(hf, hidden_act=("silu", "swish"))
    window = value(hf, "sliding_window", int, None)
    return {**read(hf, KEYS), **read_rope(hf, theta=1000000), "sliding_window_size": window}


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
        {"n_expert": 8, "n_expert_per_token": 2, "rope_base": 1000000},
        size(
            "Mixtral-8x7B-{}v0.1", (32, 4096, 32, 8, 14336), "", "Instruct-", block_size=32768, padded_vocab_size=32000
        ),
        size(
            "Mixtral-8x22B-{}v0.1", (56, 6144, 48, 8, 16384), "", "Instruct-", block_size=65536, padded_vocab_size=32768
        ),
        prompts={"*-Instruct-*": "codellama"},
    ),
)

MIXTRAL = Family(
    name="mixtral",
    model_type="mixtral",
    architecture="MixtralForCausalLM",
    traits=TRAITS,
    from_hf=from_hf,
    to_hf=to_hf,
    equations=lambda fields: EQUATIONS,
    rows=ROWS,
)
