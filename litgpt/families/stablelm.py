"""StableLM 3B: a Llama with LayerNorm and a quarter of each head rotated."""

from __future__ import annotations

from typing import Any

from litgpt.families import llama
from litgpt.families.tables import (
    Family,
    Fields,
    Hf,
    Key,
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
    *llama.KEYS,
    Key("layer_norm_eps", "norm_eps", float, default=1e-5, older=("norm_eps",)),
    Key("use_qkv_bias", "attn_bias", bool, default=False),
    Key("use_parallel_residual", "parallel_residual", bool, default=False),
    *llama.TIED,
)
TRAITS = {"norm_class_name": "LayerNorm", "mlp_class_name": "LLaMAMLP", "bias": False}


def from_hf(hf: Hf) -> dict[str, Any]:
    expect(hf, hidden_act=("silu", "swish"), qk_layernorm=False)
    fields = {**read(hf, KEYS), **read_rope(hf, partial=value(hf, "rope_pct", float, 0.25))}
    return {**fields, "shared_attention_norm": fields["parallel_residual"]}


def to_hf(fields: Fields) -> dict[str, Any]:
    return {**write(fields, KEYS), **write_rope(fields, partial=True), "hidden_act": "silu", "qk_layernorm": False}


ROWS = with_traits(
    {**TRAITS, "parallel_residual": False},
    group(
        "stabilityai",
        {"padded_vocab_size": 50304},
        size("stablelm-{}", (32, 2560, 32, 32, 6912), "3b-4e1t", "zephyr-3b", block_size=4096),
        size("stable-code-3b", (32, 2560, 32, 32, 6912), block_size=16384, rope_base=1000000),
        prompts={"stablelm-zephyr-3b": "stablelm-zephyr"},
    ),
)

STABLELM = Family(
    name="stablelm",
    model_type="stablelm",
    architecture="StableLmForCausalLM",
    aliases=("stablelm_epoch",),
    traits=TRAITS,
    from_hf=from_hf,
    to_hf=to_hf,
    equations=lambda fields: llama.EQUATIONS,
    rows=ROWS,
)
