"""Registered models shrunk to seconds: every switch kept, every size small."""

from __future__ import annotations

from typing import Any

from litgpt import families
from litgpt.config import NAMING, Config

NAMES = families.names()
N_HEAD = 4


def shrunk(model: str | Config, **overrides: Any) -> Config:
    """As many layers of the model as show each kind (two at least), width about 32, all switches kept."""
    config = Config.from_name(model) if isinstance(model, str) else model
    sizes = {"block_size": 64, "vocab_size": 96, "padded_vocab_size": 128, "padding_multiple": 64}
    fields = config.to_dict() | sizes | _layers(config) | _widths(config) | _experts(config)
    fields |= _rope(config, fields["head_size"])
    return Config(**(fields | overrides))


def _layers(config: Config) -> dict[str, Any]:
    """The first layer of each kind: sliding or full, local or global rope, dense or experts."""
    kinds = [(config.is_moe_layer(i), bool(config.window(i)), config.uses_local_rope(i)) for i in range(config.n_layer)]
    chosen = sorted({kinds.index(kind) for kind in kinds} | set(range(min(2, config.n_layer))))
    lists = {"sliding_window_indices": config.sliding_window_indices, "rope_indices": config.rope_indices}
    fields: dict[str, Any] = {name: [found[i] for i in chosen] for name, found in lists.items() if found}
    if config.first_k_dense_replace:
        fields["first_k_dense_replace"] = 1
    if config.sliding_window_size:
        fields["sliding_window_size"] = 8
    return {"n_layer": len(chosen), **fields}


def _widths(config: Config) -> dict[str, Any]:
    """Four query heads; key/value heads all, some or one, as in the model."""
    groups = {config.n_head: N_HEAD, 1: 1}.get(config.n_query_groups or config.n_head, 2)
    own_head_size = config.head_size != config.n_embd / config.n_head
    head_size = next(size for size in (8, 10, 12, 16) if int(config.rotary_percentage * size) % 2 == 0)
    fields: dict[str, Any] = {
        "n_embd": N_HEAD * head_size,
        "n_head": N_HEAD,
        "n_query_groups": groups,
        "head_size": 2 * head_size if own_head_size else head_size,
        "intermediate_size": 48,
    }
    if config.attention_scores_scalar:
        as_usual = config.attention_scores_scalar == config.head_size
        fields["attention_scores_scalar"] = fields["head_size"] if as_usual else 12
    if config.latent_attention:
        ranks = {"q_lora_rank": 12 if config.q_lora_rank else None, "kv_lora_rank": 16}
        fields["latent_attention"] = {**ranks, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 12}
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


def _rope(config: Config, head_size: int) -> dict[str, Any]:
    """Frequency scaling that still does something within the small block."""
    small = dict(config.rope_adjustments or {})
    if "original_max_seq_len" in small:
        small["original_max_seq_len"] = 16
    n_pairs = int(config.rotary_percentage * head_size) // 2
    for name in ("short_factor", "long_factor"):
        if name in small:
            small[name] = small[name][:: len(small[name]) // n_pairs][:n_pairs]
    return {"rope_adjustments": small or None}


def _switches(config: Config) -> tuple[tuple[str, str], ...]:
    """What is left of a shrunk config without its names, and without numbers that make no kind of their own."""
    numbers = (*NAMING, "rope_base", "norm_eps", "rope_adjustments", "rope_condense_ratio", "final_logit_softcapping")
    kinds = {"adjusted": ",".join(sorted(config.rope_adjustments or {})), "condensed": config.rope_condense_ratio != 1}
    fields = {name: found for name, found in config.to_dict().items() if name not in numbers}
    return tuple(sorted((name, repr(found)) for name, found in (fields | kinds).items()))


# one name for each distinct set of switches
SHAPES = list({_switches(shrunk(name)): name for name in reversed(NAMES)}.values())[::-1]
