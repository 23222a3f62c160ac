"""Falcon 7B, 40B and 180B (Falcon 3 is a Llama): attention and MLP in parallel, query/key/value rows per group."""

from __future__ import annotations

from typing import Any

from litgpt.errors import InputError
from litgpt.families.tables import (
    Equation,
    Family,
    Fields,
    Hf,
    Key,
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
    Key("hidden_size", "n_embd", older=("n_embed",)),
    Key("num_hidden_layers", "n_layer", older=("n_layer",)),
    Key("num_attention_heads", "n_head", older=("n_head",)),
    Key("ffn_hidden_size", "intermediate_size", default=None),
    Key("max_position_embeddings", "block_size", default=2048),
    Key("vocab_size", "padded_vocab_size"),
    Key("layer_norm_epsilon", "norm_eps", float, default=1e-5),
    Key("bias", "bias", bool, default=False),
    Key("tie_word_embeddings", "tie_embeddings", bool, default=True),
)
TRAITS = {"norm_class_name": "LayerNorm", "mlp_class_name": "GptNeoxMLP", "rotary_percentage": 1.0}


def layer(ours: str, theirs: str, layout: str = "") -> Equation:
    return block(ours, theirs, layout, under="transformer.h.{l}.")


COMMON = (
    eq("transformer.wte", "transformer.word_embeddings"),
    layer("attn.qkv", "self_attention.query_key_value", layout="grouped_qkv"),
    layer("attn.proj", "self_attention.dense"),
    layer("mlp.fc", "mlp.dense_h_to_4h"),
    layer("mlp.proj", "mlp.dense_4h_to_h"),
    eq("transformer.ln_f", "transformer.ln_f"),
    eq("lm_head", "lm_head"),
)
PARALLEL_NORMS = (layer("norm_1", "ln_attn"), layer("norm_2", "ln_mlp"))
# the second only in a sequential block: a shared norm has no norm_2
OTHER_NORMS = (layer("norm_1", "input_layernorm"), layer("norm_2", "post_attention_layernorm"))


def equations(fields: Fields) -> tuple[Equation, ...]:
    has_parallel_norms = fields["parallel_residual"] and not fields["shared_attention_norm"]
    return (*COMMON, *(PARALLEL_NORMS if has_parallel_norms else OTHER_NORMS))


def from_hf(hf: Hf) -> dict[str, Any]:
    expect(hf, alibi=False, activation="gelu", apply_residual_connection_post_layernorm=False)
    fields = read(hf, KEYS)
    # the first files of the 40B name the architecture by their model_type alone
    new = value(hf, "new_decoder_architecture", bool, hf.get("model_type") == "RefinedWeb")
    parallel = value(hf, "parallel_attn", bool, True)
    if new and not parallel:
        raise InputError("parallel_attn is False, which LitGPT does not have with new_decoder_architecture")
    two_norms = new and value(hf, "num_ln_in_parallel_attn", int, 2) == 2
    return {
        **fields,
        **read_rope(hf),
        "n_query_groups": _query_groups(hf, new, fields["n_head"]),
        "parallel_residual": parallel,
        "shared_attention_norm": parallel and not two_norms,
    }


def _query_groups(hf: Hf, new: bool, n_head: int) -> int:
    if new:
        return value(hf, "num_kv_heads", int, n_head, older=("n_head_kv",))
    return 1 if value(hf, "multi_query", bool, True) else n_head


def to_hf(fields: Fields) -> dict[str, Any]:
    shared, parallel = fields["shared_attention_norm"], fields["parallel_residual"]
    groups, n_head = fields["n_query_groups"], fields["n_head"]
    new = parallel and (not shared or groups not in (1, n_head))
    return {
        **write(fields, KEYS),
        **write_rope(fields),
        "activation": "gelu",
        "alibi": False,
        "parallel_attn": parallel,
        "new_decoder_architecture": new,
        "num_ln_in_parallel_attn": (1 if shared else 2) if new else None,
        "multi_query": groups == 1,
        "num_kv_heads": groups,
    }


ROWS = with_traits(
    TRAITS,
    group(
        "tiiuae",
        {"block_size": 2048, "vocab_size": 65024, "padded_vocab_size": 65024, "bias": False, "tie_embeddings": True},
        size("falcon-7b{}", (32, 4544, 71, 1, 18176), "", "-instruct", shared_attention_norm=True),
        size("falcon-40b{}", (60, 8192, 128, 8, 32768), "", "-instruct"),
        size("falcon-180B{}", (80, 14848, 232, 8, 59392), "", "-chat"),
        prompts={"*-instruct": "falcon", "*-chat": "falcon"},
    ),
)

FALCON = Family(
    name="falcon",
    model_type="falcon",
    architecture="FalconForCausalLM",
    aliases=("RefinedWeb", "RefinedWebModel"),
    traits=TRAITS,
    from_hf=from_hf,
    to_hf=to_hf,
    equations=equations,
    rows=ROWS,
)
