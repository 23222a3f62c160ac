"""Parameters, FLOPs and memory of a `Config`, before anything is built; and the memory this host has left.

Importing it loads no torch. Parameters and caches are exact, activations an estimate: what one layer keeps for its
backward pass.
"""

from __future__ import annotations

import math
import os
import resource
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from litgpt.config import Config
from litgpt.errors import InputError

# bytes per element of (weights and gradients, optimizer states, activations)
PRECISIONS = {"32": (4, 4, 4), "16-mixed": (4, 4, 2), "bf16-mixed": (4, 4, 2), "16": (2, 2, 2), "bf16": (2, 2, 2)}
# bytes of a block's weight, with its share of the factors, in the modes of quantize.py
QUANTIZED = {
    "bnb.nf4": 0.5 + 4 / 64,
    "bnb.nf4-dq": 0.5 + 1.016 / 64,
    "bnb.fp4": 0.5 + 4 / 64,
    "bnb.fp4-dq": 0.5 + 1.016 / 64,
    "bnb.int8": 1,
    "bnb.int8-training": 1,
    "torchao.int8": 1,
    "torchao.int4": 0.5 + 4 / 128,
}
UNLIMITED = 2**62  # cgroups write "no limit" as a number of about this size


@dataclass(frozen=True)
class Count:
    """Parameters of a model."""

    total: int
    active: int  # those a token meets: all but the experts it is not sent to
    embedding: int  # wte


@dataclass(frozen=True)
class Memory:
    """Bytes, by what they hold."""

    weights: int
    gradients: int = 0
    optimizer: int = 0
    activations: int = 0
    cache: int = 0

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.activations + self.cache


# --- parameters ------------------------------------------------------------------------------------------------------


def parameters(config: Config) -> Count:
    """Exactly those of the built `GPT`; a tied head counts once."""
    rows, width = config.padded_vocab_size or 0, config.n_embd
    embedding = rows * width
    head = (0 if config.tie_embeddings else embedding) + (rows if config.lm_head_bias else 0)
    total = active = embedding + head + _norm(config, width)
    for layer in range(config.n_layer):
        block, used = _block(config, layer)
        total += block
        active += used
    return Count(total, active, embedding)


def _block(config: Config, layer: int) -> tuple[int, int]:
    """Parameters of a layer, and how many of them a token meets."""
    shared = _attention(config) + _block_norms(config)
    mlp, used = _mlp(config, layer)
    return shared + mlp, shared + used


def _linear(n_in: int, n_out: int, bias: bool = False) -> int:
    return n_in * n_out + (n_out if bias else 0)


def _norm(config: Config, size: int) -> int:
    if config.norm_class_name == "RMSNorm":
        return size
    return size * (1 + config.norm_bias) if config.norm_affine else 0


def _block_norms(config: Config) -> int:
    norm_2 = config.norm_2 and not config.shared_attention_norm
    return _norm(config, config.n_embd) * (config.norm_1 + norm_2 + config.post_attention_norm + config.post_mlp_norm)


def _heads(config: Config) -> tuple[int, int]:
    """Elements per token of all queries, and of all keys (as many again for values)."""
    head_size = config.head_size or 0
    return config.n_head * head_size, (config.n_query_groups or config.n_head) * head_size


def _attention(config: Config) -> int:
    if config.latent_attention:
        return _latent_attention(config)
    queries, keys = _heads(config)
    count = _linear(config.n_embd, queries + 2 * keys, config.qkv_bias) + _linear(
        queries, config.n_embd, config.proj_bias
    )
    if config.norm_qk:
        sizes = (queries, keys) if config.norm_qk_type == "olmo2" else (config.head_size or 0,) * 2
        count += sum(_norm(config, size) for size in sizes)
    return count


def _latent_attention(config: Config) -> int:
    kv_rank, turned = config.kv_lora_rank or 0, config.qk_rope_head_dim or 0
    queries = config.n_head * (config.qk_head_dim or 0)
    values = config.n_head * (config.v_head_dim or 0)
    count = _linear(config.n_embd, kv_rank + turned, config.attn_bias) + _norm(config, kv_rank)
    count += _linear(kv_rank, config.n_head * (config.qk_nope_head_dim or 0) + values)
    count += _linear(values, config.n_embd, config.proj_bias)
    if not config.q_lora_rank:
        return count + _linear(config.n_embd, queries)
    count += _linear(config.n_embd, config.q_lora_rank, config.attn_bias) + _norm(config, config.q_lora_rank)
    return count + _linear(config.q_lora_rank, queries)


def _mlp(config: Config, layer: int) -> tuple[int, int]:
    """All parameters of a layer's MLP, and those that one token meets."""
    if not config.is_moe_layer(layer):
        dense = _dense_mlp(config, config.intermediate_size or 0)
        return dense, dense
    width = _expert_width(config)
    expert, router = _dense_mlp(config, width), config.n_embd * config.n_expert
    shared = _dense_mlp(config, width * config.n_shared_expert) if config.n_shared_expert else 0
    common = router + shared
    return common + expert * config.n_expert, common + expert * config.n_expert_per_token


def _expert_width(config: Config) -> int:
    return config.moe_intermediate_size or config.intermediate_size or 0


def _dense_mlp(config: Config, width: int) -> int:
    ways_in = 1 if config.mlp_class_name == "GptNeoxMLP" else 2
    bias = config.has_mlp_bias
    return ways_in * _linear(config.n_embd, width, bias) + _linear(width, config.n_embd, bias)


# --- work and memory -------------------------------------------------------------------------------------------------


def flops_per_token(config: Config, context: int) -> int:
    """Of a forward pass over `context` tokens, on average; a training step takes about three times as many.

    Two per active weight outside the embedding table, and four per head element and token that is attended to.
    """
    count = parameters(config)
    table = 0 if config.tie_embeddings else count.embedding  # a tied table is multiplied with as the head
    wide, _ = _heads(config)
    if config.latent_attention:
        wide = config.n_head * ((config.qk_head_dim or 0) + (config.v_head_dim or 0)) // 2
    seen = sum(min(context, config.window(layer) or context) for layer in range(config.n_layer))
    return 2 * (count.active - table) + 4 * wide * seen // 2


def kv_cache_bytes(config: Config, rows: int, length: int, dtype_bytes: int) -> int:
    """Exactly what `KVCache` allocates: sliding layers hold a window, latent attention its latents."""
    if config.latent_attention:
        per_token = (config.kv_lora_rank or 0) + (config.qk_rope_head_dim or 0)
    else:
        per_token = 2 * _heads(config)[1]
    slots = sum(min(length, config.window(layer) or length) for layer in range(config.n_layer))
    return rows * slots * per_token * dtype_bytes


def training_memory(
    config: Config,
    micro_batch_size: int,
    seq_len: int,
    precision: str,
    optimizer_states: float = 2,
    trainable: int | None = None,
    accelerator: str = "cpu",
    checkpointed: bool = False,
    parts: int = 1,
    quantize: str | None = None,
) -> Memory:
    """Peak of one device that holds the whole model, or one of `parts` of it (FSDP).

    Args:
        optimizer_states: numbers per trained parameter (AdamW: 2; in 8 bits a quarter of that).
        trainable: parameters added to a frozen model and trained, in fp32; None: the model itself is trained.
        accelerator: "cpu", or what takes larger pieces at a time.
        checkpointed: whether blocks are computed again for the backward pass.
        quantize: the mode in which the weights of the blocks are held.
    """
    weight, state, activation = _bytes_of(precision)
    total = parameters(config).total
    held = total * weight if quantize is None else quantized_bytes(config, weight, quantize)
    added = trainable or 0
    trained, gradient = (total, weight) if trainable is None else (added, 4)
    copies = total * activation if weight != activation else 0  # autocast keeps its casts of the weights
    if quantize is not None:  # of the others, that is
        copies = copies and quantized_bytes(config, activation, quantize) - quantized_bytes(config, 0, quantize)
    if parts > 1:  # two blocks are whole at a time, one computes and one is fetched; what is in no block always is
        blocks = [_block(config, layer)[0] for layer in range(config.n_layer)]
        whole = total - sum(blocks) + 2 * max(blocks)
        copies = whole * (weight + (4 if trainable is None else 0))  # with their gradients, which are summed in fp32
        held = -(-total // parts) * weight
        total, added, trained = -(-total // parts), -(-added // parts), -(-trained // parts)
    tokens = micro_batch_size * seq_len
    loss = _loss_bytes(config, tokens, accelerator, with_head=trainable is None)
    return Memory(
        weights=held + added * 4,
        gradients=trained * gradient,
        optimizer=int(trained * optimizer_states * max(state, gradient)),
        activations=copies + tokens * _kept_per_token(config, seq_len, activation, checkpointed) + loss,
    )


def inference_memory(config: Config, dtype_bytes: int, rows: int, length: int, quantize: str | None = None) -> Memory:
    """Peak of one device that holds the whole model, with a cache for `rows` sequences of `length` tokens.

    Args:
        quantize: the mode in which the weights of the blocks are held.
    """
    total = parameters(config).total
    widest = max(_layer_elements(config, layer, length, kept=False) for layer in range(config.n_layer))
    tokens = rows * length
    return Memory(
        weights=total * dtype_bytes if quantize is None else quantized_bytes(config, dtype_bytes, quantize),
        activations=tokens * widest * dtype_bytes + rows * (config.padded_vocab_size or 0) * 4,
        cache=kv_cache_bytes(config, rows, length, dtype_bytes),
    )


def quantized_bytes(config: Config, dtype_bytes: int, mode: str) -> int:
    """Of all weights, those of the blocks in a mode of `QUANTIZED`; torchao's modes have the head in 8 bits."""
    count = parameters(config)
    blocks = 0
    for layer in range(config.n_layer):
        router = config.n_embd * config.n_expert if config.is_moe_layer(layer) else 0
        blocks += _attention(config) + _mlp(config, layer)[0] - router
    rest = count.total - blocks
    head = 0
    if mode.startswith("torchao."):
        head = count.embedding
        rest -= 0 if config.tie_embeddings else head  # where it is tied, a copy
    return int(blocks * QUANTIZED[mode]) + head + rest * dtype_bytes


def _bytes_of(precision: str) -> tuple[int, int, int]:
    return PRECISIONS.get(precision.removesuffix("-true"), PRECISIONS["32"])


def _kept_per_token(config: Config, seq_len: int, dtype_bytes: int, checkpointed: bool = False) -> int:
    """Bytes that the backward pass needs of one token: every layer's, and the input of the head."""
    layers = [_layer_elements(config, layer, seq_len, kept=True) for layer in range(config.n_layer)]
    kept = max(layers) + config.n_layer * config.n_embd if checkpointed else sum(layers)
    return (kept + 2 * config.n_embd) * dtype_bytes


def _layer_elements(config: Config, layer: int, seq_len: int, *, kept: bool) -> int:
    """Elements of one token in one layer: with `kept` all that its backward needs, else the most alive at a time.

    Attention: input, its norm, q/k/v before and after rope, the heads' output. MLP: input, its norm, and of the width
    each of: way in, activation, (gate times) product. Soft-capped scores are held whole, else never.
    """
    width = config.n_embd
    if config.latent_attention:
        queries, values = config.n_head * (config.qk_head_dim or 0), config.n_head * (config.v_head_dim or 0)
        ranks = 2 * ((config.q_lora_rank or 0) + (config.kv_lora_rank or 0))
        attention = ranks + 5 * queries + 2 * values
    else:
        queries, keys = _heads(config)
        attention = 3 * (queries + keys) + 2 * keys + 2 * queries * config.norm_qk
    if config.attention_logit_softcapping:
        attention += 4 * config.n_head * seq_len
    norms = width * (2 + config.post_attention_norm + config.post_mlp_norm)
    mlp = _mlp_elements(config, layer)
    return norms + attention + mlp + width if kept else 3 * width + max(attention, mlp)


def _mlp_elements(config: Config, layer: int) -> int:
    stages = 2 if config.mlp_class_name == "GptNeoxMLP" else 4
    if not config.is_moe_layer(layer):
        return stages * (config.intermediate_size or 0)
    chosen = config.n_expert_per_token + (config.n_shared_expert or 0)
    # a token's copies for its experts and their outputs, too
    return chosen * stages * _expert_width(config) + 3 * config.n_expert_per_token * config.n_embd


def _loss_bytes(config: Config, tokens: int, accelerator: str, *, with_head: bool = True) -> int:
    """Some rows of logits in fp32 with their gradient, and the head's gradient where it is trained."""
    from litgpt.loss import CPU_LOGITS, DEVICE_LOGITS  # brings torch, which whoever trains has loaded

    at_once = CPU_LOGITS if accelerator == "cpu" else DEVICE_LOGITS
    rows = config.padded_vocab_size or 0
    return 3 * 4 * min(tokens * rows, at_once) + 4 * rows * config.n_embd * with_head


# --- what there is ---------------------------------------------------------------------------------------------------


def available_memory(proc: Path = Path("/proc"), cgroups: Path = Path("/sys/fs/cgroup")) -> int:
    """Bytes that this process can still take: what the host has left, its cgroup allows, `ulimit -v` allows."""
    return min([_host_memory(proc), *_cgroup_memory(proc, cgroups), *_address_space(proc)])


def _host_memory(proc: Path) -> int:
    for line in _text(proc / "meminfo").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    try:  # systems without /proc
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return UNLIMITED


def _cgroup_memory(proc: Path, cgroups: Path) -> Iterator[int]:
    """What each enclosing memory cgroup leaves, version 2 and version 1; file cache gives way, so it counts as left."""
    for line in _text(proc / "self" / "cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if not controllers:
            names, root = ("memory.max", "memory.current", "inactive_file"), cgroups
        elif "memory" in controllers.split(","):
            root = cgroups / "memory"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        here = root / path.lstrip("/")
        for directory in (here, *here.parents):
            if directory.is_relative_to(root):
                yield from _left_in(directory, *names)


def _left_in(directory: Path, limit_file: str, usage_file: str, cache_name: str) -> Iterator[int]:
    limit, usage = _text(directory / limit_file).strip(), _text(directory / usage_file).strip()
    if limit.isdecimal() and usage.isdecimal() and int(limit) < UNLIMITED:
        stat = dict(line.split(maxsplit=1) for line in _text(directory / "memory.stat").splitlines() if " " in line)
        yield max(0, int(limit) - int(usage) + int(stat.get(cache_name, "0")))


def _address_space(proc: Path) -> Iterator[int]:
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    pages = _text(proc / "self" / "statm").split()
    if limit != resource.RLIM_INFINITY and pages:
        yield max(0, limit - int(pages[0]) * resource.getpagesize())


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        return ""


def require_fit(need: int, have: int, what: str, advice: str) -> None:
    """Refuse, with both figures, what would be killed for memory half-way."""
    if need > have:
        raise InputError(f"{what} needs about {in_words(need)} of memory, {in_words(have)} is free; {advice}")


def in_words(n_bytes: float) -> str:
    """Bytes in the largest unit that leaves a digit before the point: `"1.5 GB"`, `"412 MB"`."""
    power = min(4, max(1, int(math.log(max(n_bytes, 1), 1000))))
    figure = n_bytes / 1000**power
    return f"{figure:.1f} {' kMGT'[power]}B" if figure < 10 else f"{figure:,.0f} {' kMGT'[power]}B"
