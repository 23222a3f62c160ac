"""Registered models shrunk to seconds: every switch kept, every size small."""

from __future__ import annotations

from typing import Any

from litgpt import families
from litgpt.config import NAMING, Config

NAMES = families.names()


def shrunk(model: str | Config, **overrides: Any) -> Config:
    """Two layers of the model (more where its layers differ in kind), width 32, all switches kept."""
    config = Config.from_name(model) if isinstance(model, str) else model
    fields = config.to_dict() | _layers(config) | _widths(config) | _experts(config) | _rope(config)
    fields |= {"block_size": 64, "vocab_size": 96, "padded_vocab_size": 128, "padding_multiple": 64}
    return Config(**(fields | overrides))


def _layers(config: Config) -> dict[str, Any]:
    """The first layers, as many as it takes to see each kind once."""
    kinds = [(config.is_moe_layer(i), bool(config.window(i)), config.uses_local_rope(i)) for i in range(config.n_layer)]
    chosen = sorted({kinds.index(kind) for kind in kinds} | {0, 1})[:4]
    lists = {"sliding_window_indices": config.sliding_window_indices, "rope_indices": config.rope_indices}
    fields: dict[str, Any] = {name: [found[i] for i in chosen] for name, found in lists.items() if found}
    if config.first_k_dense_replace:
        fields["first_k_dense_replace"] = 1
    if config.sliding_window_size:
        fields["sliding_window_size"] = 8
    return {"n_layer": len(chosen), **fields}


def _widths(config: Config) -> dict[str, Any]:
    """Four query heads; key/value heads all, some or one, as in the model."""
    groups = {config.n_head: 4, 1: 1}.get(config.n_query_groups or config.n_head, 2)
    wide = config.head_size != config.n_embd / config.n_head
    fields: dict[str, Any] = {"n_embd": 32, "n_head": 4, "n_query_groups": groups, "head_size": 16 if wide else 8}
    fields["intermediate_size"] = 48
    if config.attention_scores_scalar:
        fields["attention_scores_scalar"] = 12 if config.attention_scores_scalar != config.head_size else 16
    if config.latent_attention:
        rank = {"q_lora_rank": 12 if config.q_lora_rank else None, "kv_lora_rank": 16}
        fields["latent_attention"] = {**rank, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
        fields["head_size"] = 16
    return fields


def _experts(config: Config) -> dict[str, Any]:
    if not config.n_expert:
        return {}
    fields = {"n_expert": 4, "n_expert_per_token": 2}
    if config.moe_intermediate_size:
        fields["moe_intermediate_size"] = 24
    if config.n_expert_groups:
        fields |= {"n_expert_groups": min(2, config.n_expert_groups), "n_topk_groups": 1, "n_topk_scores_per_group": 2}
    return fields


def _rope(config: Config) -> dict[str, Any]:
    """Frequency scaling that still does something within the small block."""
    adjustments = config.rope_adjustments
    if not adjustments:
        return {}
    small = dict(adjustments)
    if "original_max_seq_len" in small:
        small["original_max_seq_len"] = 16
    n_pairs = int(config.rotary_percentage * (16 if config.head_size != config.n_embd / config.n_head else 8)) // 2
    for name in ("short_factor", "long_factor"):
        if name in small:
            small[name] = small[name][:: len(small[name]) // n_pairs][:n_pairs]
    return {"rope_adjustments": small}


def _switches(config: Config) -> tuple[tuple[str, str], ...]:
    return tuple((k, repr(v)) for k, v in sorted(config.to_dict().items()) if k not in (*NAMING, "rope_base"))


# one name for each distinct set of switches
SHAPES = list({_switches(shrunk(name)): name for name in reversed(NAMES)}.values())[::-1]
