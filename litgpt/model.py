"""GPT, whole, in one file: embedding, blocks, attention, MLPs and experts, rotary positions, masks, KV cache, init.

Notable:
- one class for every family; what differs is a `Config` field, never a model's name
- the QKV rows are [all queries | all keys | all values]; `split_qkv` and `join_qkv` own that layout
- masks are bool, True = may attend
- a cache belongs to its caller; rows of one batch may stand at different positions
- with `targets` the loss is taken inside the forward, and all logits are never held

Knows tensors only: no files, no text, no training.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast, overload

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from typing_extensions import Self

from litgpt.config import Config
from litgpt.cpu import QUERIES, attend_documents
from litgpt.errors import InputError
from litgpt.loss import Loss, linear_cross_entropy

# ---------------------------------------------------------------------------------------------------------------- GPT


class GPT(nn.Module):
    """A decoder-only transformer. `GPT(Config.from_name("pythia-14m"))(ids)` gives logits."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        padded = known(config.padded_vocab_size)
        self.lm_head = nn.Linear(config.n_embd, padded, bias=config.lm_head_bias)
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(padded, config.n_embd),
                "h": nn.ModuleList(Block(config, layer) for layer in range(config.n_layer)),
                "ln_f": build_norm(config, config.n_embd),
            }
        )
        self.rope = Rope(config, config.rope_base, config.rope_adjustments)
        # Gemma 3: layers that look at their neighbourhood turn faster, and are never stretched
        self.local_rope = Rope(config, config.rope_local_base_freq, None) if config.rope_local_base_freq else None
        self.kv_cache: KVCache | None = None
        self.gradient_checkpointing = False  # blocks are computed again in the backward pass, their insides not kept
        self.tie_weights()

    def tie_weights(self) -> None:
        """Make head and embedding one Parameter where the config says so (loading by assignment parts them)."""
        if self.config.tie_embeddings:
            head = getattr(self.lm_head, "base", self.lm_head)  # what is wrapped around a linear is no part of the tie
            if isinstance(head, nn.Linear):  # a quantized one is a copy
                head.weight = self.wte.weight

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        # `to_empty` and moves to another kind of device give each name memory of its own
        super()._apply(fn, recurse)
        self.tie_weights()
        return self

    @property
    def wte(self) -> nn.Embedding:
        return cast(nn.Embedding, self.transformer["wte"])

    @property
    def blocks(self) -> nn.ModuleList:
        return cast(nn.ModuleList, self.transformer["h"])

    @overload
    def forward(
        self,
        idx: Tensor,
        input_pos: Tensor | None = ...,
        *,
        cache: KVCache | None = ...,
        doc_ids: Tensor | None = ...,
        last_only: bool = ...,
        targets: None = ...,
    ) -> Tensor: ...

    @overload
    def forward(
        self,
        idx: Tensor,
        input_pos: Tensor | None = ...,
        *,
        cache: KVCache | None = ...,
        doc_ids: Tensor | None = ...,
        last_only: bool = ...,
        targets: Tensor,
    ) -> Loss: ...

    def forward(
        self,
        idx: Tensor,
        input_pos: Tensor | None = None,
        *,
        cache: KVCache | None = None,
        doc_ids: Tensor | None = None,
        last_only: bool = False,
        targets: Tensor | None = None,
    ) -> Tensor | Loss:
        """Logits of every position, or the summed loss.

        Args:
            idx: (B, T) int, token ids.
            input_pos: (T,) or (B, T) int, the absolute position of each token; a row's positions ascend by one.
                None: 0..T-1 for every row.
            cache: keys and values of the tokens before these; these are added to it. Without one, a `set_kv_cache`
                cache is used when `input_pos` is given.
            doc_ids: (B, T) int, for packed rows: a token attends within its own document only. -1 is padding.
            last_only: apply the head to the last position only.
            targets: (B, T) int64, the token that follows each position; -100 is not counted.

        Returns:
            (B, T, padded_vocab_size) logits ((B, 1, ...) with `last_only`), or with targets a `Loss`.

        Raises:
            InputError: more tokens than the context length.
        """
        if targets is not None and doc_ids is not None and _is_on_host(doc_ids):
            idx, input_pos, doc_ids, targets = without_padding(idx, input_pos, doc_ids, targets)
        x = self.hidden(idx, input_pos, cache=cache, doc_ids=doc_ids, last_only=last_only)
        if targets is not None:
            softcap = self.config.final_logit_softcapping
            # what is wrapped around a head joins by `weight`, or says the product in other terms
            terms = getattr(self.lm_head, "terms", None)
            x, weight = (x, self.lm_head.weight) if terms is None else terms(x)
            return linear_cross_entropy(x, weight, targets, bias=self.lm_head.bias, softcap=softcap)
        return self.logits(x)

    def hidden(
        self,
        idx: Tensor,
        input_pos: Tensor | None = None,
        *,
        cache: KVCache | None = None,
        doc_ids: Tensor | None = None,
        last_only: bool = False,
        until: Sequence[int] | None = None,
    ) -> Tensor:
        """What the head reads: (B, T, n_embd), or (B, 1, n_embd) with `last_only`. Arguments as in `forward`, and

        until: for one row of texts of which some begin alike, where the first place lies that sees each token no more:

            texts  a b c   a b d   e f      ids  a b c d e f      positions  0 1 2 2 0 1      until  4 4 3 4 6 6
        """
        if cache is None and input_pos is not None and doc_ids is None and until is None:
            cache = self.kv_cache
        x, shared = self.embed(idx), self.share(idx, input_pos, cache, doc_ids, until)
        recompute = self.gradient_checkpointing and cache is None and torch.is_grad_enabled()
        for layer, block in enumerate(self.blocks):
            if recompute:
                x = checkpoint(block, x, shared, use_reentrant=False)
            else:
                x = block(x, shared, None if cache is None else cache.layers[layer])
        normed: Tensor = self.transformer["ln_f"](x[:, -1:] if last_only else x)
        return normed

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., n_embd) -> (..., padded_vocab_size)."""
        logits: Tensor = self.lm_head(hidden)
        softcap = self.config.final_logit_softcapping
        return logits if softcap is None else torch.tanh(logits / softcap) * softcap

    def embed(self, idx: Tensor) -> Tensor:
        """(B, T) ids -> (B, T, n_embd)."""
        x: Tensor = self.wte(idx)
        if self.config.scale_embeddings:
            # the factor is rounded to the embedding's precision first, as the models were trained
            x = x * torch.tensor(self.config.n_embd**0.5, dtype=x.dtype, device=x.device)
        return x

    def share(
        self,
        idx: Tensor,
        input_pos: Tensor | None,
        cache: KVCache | None,
        doc_ids: Tensor | None,
        until: Sequence[int] | None = None,
    ) -> Shared:
        """What all layers of one forward have in common: positions, rotations, who may attend to whom."""
        documents = None if cache is None else cache.documents
        if documents is not None:
            rows: list[list[int]] | None = [[length for _, length in documents]]
        else:
            rows = None if doc_ids is None else _documents(doc_ids)
        length = idx.size(1)
        if until is not None and input_pos is not None:
            length = int(input_pos.max()) + 1
        limit = self.config.block_size if cache is None else cache.max_len
        if (length if rows is None else max(map(max, rows))) > limit:
            raise InputError(f"{length} tokens do not fit into {limit}, the longest sequence this model (cache) takes")
        positions = torch.arange(idx.size(1), device=idx.device) if input_pos is None else input_pos
        # looking at positions is free on the CPU; on other devices it would make the host wait
        on_host = input_pos is not None and positions.device.type == "cpu" and not torch.compiler.is_compiling()
        last = int(positions.max()) if on_host and (cache is None or cache.span is None) else None
        if cache is not None and last is not None and last >= cache.max_len:
            raise InputError(f"position {last} lies beyond the cache of {cache.max_len} tokens")
        fresh = documents is not None or input_pos is None
        fresh = fresh or (on_host and length > 1 and bool((positions[..., 0] == 0).all()))
        span = None if cache is None else cache.span or (None if last is None else last + 1)
        reach = self.reach(positions, cache, doc_ids) if self.rope.has_two_ranges else None
        dtype = self.wte.weight.dtype
        turns = self.rope(positions, reach, dtype)
        local_turns = turns if self.local_rope is None else self.local_rope(positions, None, dtype)
        return Shared(positions, turns, local_turns, fresh or cache is None, span, doc_ids, rows, until)

    def reach(self, positions: Tensor, cache: KVCache | None, doc_ids: Tensor | None) -> Tensor:
        """How long the sequence of each token gets: (1,), (B, 1) or (B, T). Rope that differs beyond a length asks."""
        if cache is not None:
            reach = cache.reach
            if not isinstance(reach, Tensor):
                reach = torch.tensor(reach or [cache.max_len] * cache.batch_size, device=positions.device)
            if cache.documents is None:
                return reach.unsqueeze(1)
            lengths = torch.tensor([length for _, length in cache.documents], device=positions.device)
            return reach.repeat_interleave(lengths).unsqueeze(0)
        if doc_ids is not None:  # a document's length, not the packed row's; padding is document -1
            ids = doc_ids.long() + 1
            counts = torch.zeros(len(ids), ids.size(1) + 1, dtype=torch.long, device=ids.device)
            return counts.scatter_add_(1, ids, torch.ones_like(ids)).gather(1, ids)
        return positions.amax(dim=-1, keepdim=True) + 1

    def new_cache(self, batch_size: int, max_len: int | None = None, ahead: int = 0) -> KVCache:
        """A cache in the model's precision, where the model is. Arguments as `KVCache`'s."""
        weight = self.wte.weight
        return KVCache(self.config, batch_size, max_len, ahead, dtype=weight.dtype, device=weight.device)

    # -- the short way to a cache, for a person at a prompt

    def set_kv_cache(self, batch_size: int, max_len: int | None = None) -> None:
        """Keep a cache on the model; it is used whenever `input_pos` is given."""
        self.kv_cache = self.new_cache(batch_size, max_len)

    def clear_kv_cache(self) -> None:
        self.kv_cache = None

    # -- initialisation

    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Draw fresh weights in place: normal with sqrt(2 / (5 n_embd)) ("small init", Nguyen & Salazar 2019).

        What writes into the residual stream is smaller by sqrt(2 n_layer) (GPT-2), so that depth does not add up.
        """
        for name, module in self.named_modules():
            self.init_module(name, module, generator)

    def init_module(self, name: str, module: nn.Module, generator: torch.Generator | None = None) -> None:
        """Draw what one module holds itself; all of them in order are `init_weights`."""
        std = math.sqrt(2 / (5 * self.config.n_embd))
        if isinstance(module, (nn.Linear, nn.Embedding, Router)):
            writes_residual = name.rpartition(".")[2] == "proj"
            nn.init.normal_(
                module.weight,
                std=std / math.sqrt(2 * self.config.n_layer) if writes_residual else std,
                generator=generator,
            )
            bias = getattr(module, "bias", None)
            if bias is not None:
                nn.init.zeros_(bias)
        elif isinstance(module, (RMSNorm, nn.LayerNorm)):
            module.reset_parameters()
        if isinstance(module, Router):
            module.reset_bias()


@dataclass
class Shared:
    """What the layers of one forward share. Masks are made on first use, once per window."""

    positions: Tensor  # (T,) or (B, T)
    turns: tuple[Tensor, Tensor]  # cos, sin of the global rope: (1 or B, T, 1, rope_n_elem)
    local_turns: tuple[Tensor, Tensor]
    fresh: bool  # nothing precedes these tokens: their own keys are all the keys
    span: int | None  # how many cache slots hold something, where that is known
    doc_ids: Tensor | None  # (B, T)
    documents: list[list[int]] | None  # per row the lengths of its documents, when the host can know them
    until: Sequence[int] | None = None  # see `GPT.hidden`
    masks: dict[Any, Tensor | None] = field(default_factory=dict)

    def at_rest(self) -> Shared:
        """The same, but nothing turns: for tokens without a position."""
        cos, sin = (turns[:1, :1] for turns in self.turns)
        still = torch.ones_like(cos), torch.zeros_like(sin)
        return replace(self, turns=still, local_turns=still)

    def own_mask(self, length: int, window: int | None, device: torch.device) -> Tensor | None:
        """Causal mask of a chunk over its own keys: (T, T) or (B, 1, T, T); None where plain causality is enough."""
        if self.doc_ids is None and (window is None or length <= window):
            return None
        key = ("own", length, window)
        if key not in self.masks:
            mask: Tensor = causal_mask(length, window, device)  # dense: where the host cannot know the documents
            if self.doc_ids is not None and length == self.doc_ids.size(1):
                same = self.doc_ids[:, None, :, None] == self.doc_ids[:, None, None, :]
                mask = mask & same
            self.masks[key] = mask
        return self.masks[key]

    def blocks(self, window: int | None, device: torch.device) -> list[tuple[slice, Tensor, Tensor]]:
        """Queries, taken some at a time, the keys that any of them sees, and who sees which: (queries, keys) bool."""
        key = ("blocks", window)
        if key not in self.masks:
            assert self.until is not None
            until, positions = torch.tensor(self.until), self.positions.flatten().cpu()
            found = []
            for start in range(0, len(until), QUERIES):
                queries = torch.arange(start, min(start + QUERIES, len(until)))
                keys = (until[: queries[-1] + 1] > start).nonzero().flatten()
                mask = (keys <= queries[:, None]) & (queries[:, None] < until[keys])
                if window is not None:
                    mask &= positions[queries][:, None] - positions[keys] < window
                found.append((slice(start, start + len(queries)), keys.to(device), mask.to(device)))
            self.masks[key] = cast(Any, found)
        return cast(Any, self.masks[key])


def _documents(doc_ids: Tensor) -> list[list[int]] | None:
    """Lengths of the documents of each row of (B, T), or None where looking would make the host wait."""
    if not _is_on_host(doc_ids):
        return None
    return [torch.unique_consecutive(row, return_counts=True)[1].tolist() for row in doc_ids]


def _is_on_host(t: Tensor) -> bool:
    """Whether the values of `t` can be looked at for nothing."""
    return t.device.type == "cpu" and not torch.compiler.is_compiling()


def without_padding(
    idx: Tensor, input_pos: Tensor | None, doc_ids: Tensor, targets: Tensor
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """The same documents in one row (1, N) without padding, which would be computed for nothing; all are (B, T)."""
    kept = doc_ids >= 0
    if kept.all() or not kept.any():
        return idx, input_pos, doc_ids, targets
    positions = torch.arange(idx.size(1), device=idx.device) if input_pos is None else input_pos
    apart = doc_ids + torch.arange(len(doc_ids), device=doc_ids.device).unsqueeze(1) * (idx.size(1) + 1)
    numbers = torch.unique_consecutive(apart[kept], return_inverse=True)[1]  # documents of several rows, from 0 again
    row = (t[kept].unsqueeze(0) for t in (idx, positions.expand_as(idx), targets))
    ids, places, labels = row
    return ids, places, numbers.unsqueeze(0), labels


# -------------------------------------------------------------------------------------------------------------- blocks


class Block(nn.Module):
    """Attention and MLP around the residual stream.

        sequential                     parallel (GPT-NeoX, Phi)         parallel, one norm (Falcon-7B)
        x = x + post(attn(norm_1 x))   x = x + attn(norm_1 x)           n = norm_1 x
        x = x + post(mlp(norm_2 x))          + mlp(norm_2 x)            x = x + attn(n) + mlp(n)

    Absent norms are identities: OLMo 2 has the outer ones only, Gemma 2 and 3 have both ("sandwich").
    """

    def __init__(self, config: Config, layer: int) -> None:
        super().__init__()
        self.parallel = config.parallel_residual
        self.one_norm = config.shared_attention_norm
        self.norm_1 = build_norm(config, config.n_embd) if config.norm_1 else nn.Identity()
        self.attn = LatentAttention(config, layer) if config.latent_attention else Attention(config, layer)
        self.post_attention_norm = build_norm(config, config.n_embd) if config.post_attention_norm else nn.Identity()
        self.norm_2 = None if self.one_norm else build_norm(config, config.n_embd) if config.norm_2 else nn.Identity()
        self.mlp = build_mlp(config, layer)
        self.post_mlp_norm = build_norm(config, config.n_embd) if config.post_mlp_norm else nn.Identity()

    def forward(self, x: Tensor, shared: Shared, cache: LayerCache | None = None) -> Tensor:
        normed = self.norm_1(x)
        attended = self.post_attention_norm(self.attn(normed, shared, cache))
        if self.parallel:
            if self.norm_2 is not None:
                normed = self.norm_2(x)
            return x + attended + self.post_mlp_norm(self.mlp(normed))
        x = x + attended
        assert self.norm_2 is not None  # Config refuses one norm in a sequential block
        return x + self.post_mlp_norm(self.mlp(self.norm_2(x)))


def build_norm(config: Config, size: int, eps: float | None = None) -> nn.Module:
    """The norm that `config` names, over the last dimension."""
    eps = config.norm_eps if eps is None else eps
    if config.norm_class_name == "RMSNorm":
        return RMSNorm(size, eps, unit_offset=config.norm_unit_offset)
    return LayerNorm(size, eps, elementwise_affine=config.norm_affine, bias=config.norm_bias)


class LayerNorm(nn.LayerNorm):
    """(x - mean) / std * weight + bias; what trains may have a higher precision than x."""

    def forward(self, x: Tensor) -> Tensor:
        if self.elementwise_affine and self.weight.dtype != x.dtype:
            return super().forward(x.to(self.weight.dtype)).to(x.dtype)
        return super().forward(x)


class RMSNorm(nn.Module):
    """x / rms(x) * weight (Zhang & Sennrich 2019), in fp32; with `unit_offset` times (1 + weight) (Gemma)."""

    def __init__(self, size: int, eps: float, unit_offset: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.eps = eps
        self.unit_offset = unit_offset
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.constant_(self.weight, 0.0 if self.unit_offset else 1.0)

    def forward(self, x: Tensor) -> Tensor:
        if self.unit_offset:  # 1 + weight would be rounded in bf16: stay in fp32 to the end
            return F.rms_norm(x.float(), (x.size(-1),), 1 + self.weight.float(), self.eps).to(x.dtype)
        return F.rms_norm(x, (x.size(-1),), self.weight.to(x.dtype), self.eps)


# ----------------------------------------------------------------------------------------------------------- attention


class Attention(nn.Module):
    """Multi-head, grouped-query or multi-query attention: `n_head` queries share `n_query_groups` keys and values."""

    def __init__(self, config: Config, layer: int) -> None:
        super().__init__()
        self.n_head, self.n_groups = config.n_head, known(config.n_query_groups)
        self.head_size = known(config.head_size)
        self.qkv = nn.Linear(config.n_embd, sum(qkv_rows(config)), bias=config.qkv_bias)
        self.proj = nn.Linear(self.n_head * self.head_size, config.n_embd, bias=config.proj_bias)
        self.norm_whole = config.norm_qk and config.norm_qk_type == "olmo2"  # before the split into heads
        if config.norm_qk:
            heads = (self.n_head, self.n_groups) if self.norm_whole else (1, 1)
            self.norm_q = build_norm(config, heads[0] * self.head_size)
            self.norm_k = build_norm(config, heads[1] * self.head_size)
        self.norm_qk = config.norm_qk
        self.clip = config.clip_qkv
        self.window = config.window(layer)
        self.local = config.uses_local_rope(layer)
        self.interleaved = config.rope_interleave
        self.scale = 1 / math.sqrt(config.attention_scores_scalar or self.head_size)
        self.softcap = config.attention_logit_softcapping
        self.prefix: nn.Module | None = None  # what LLaMA-Adapter adds to what is attended to

    def forward(self, x: Tensor, shared: Shared, cache: LayerCache | None = None) -> Tensor:
        q, k, v = self.project(x, shared)
        if cache is None or shared.fresh:
            if cache is not None:
                cache.write(shared, k, v)
            y = attend_own(q, k, v, shared, self.window, scale=self.scale, softcap=self.softcap)
        else:
            k, v, mask = cache.extend(shared, k, v)
            y = attend(q, k, v, mask=mask, scale=self.scale, softcap=self.softcap)
        if self.prefix is not None:
            y = y + self.prefix(self, q, shared)
        return self.proj(y.transpose(1, 2).flatten(2))

    def project(self, x: Tensor, shared: Shared) -> tuple[Tensor, Tensor, Tensor]:
        """(B, T, n_embd) -> q (B, n_head, T, hs), k and v (B, n_groups, T, hs), normed and rotated."""
        batch, length, _ = x.shape
        qkv = self.qkv(x)
        if self.clip is not None:
            qkv = qkv.clamp(-self.clip, self.clip)
        if self.norm_whole:
            q, k, v = qkv.split((self.n_head * self.head_size, *[self.n_groups * self.head_size] * 2), dim=-1)
            qkv = torch.cat((self.norm_q(q), self.norm_k(k), v), dim=-1)
        qkv = qkv.view(batch, length, self.n_head + 2 * self.n_groups, self.head_size)
        qk, v = qkv.split((self.n_head + self.n_groups, self.n_groups), dim=2)
        if self.norm_qk and not self.norm_whole:
            q, k = qk.split((self.n_head, self.n_groups), dim=2)
            qk = torch.cat((self.norm_q(q), self.norm_k(k)), dim=2)
        # queries and keys turn together: half the kernels
        qk = rotate(qk, *(shared.local_turns if self.local else shared.turns), interleaved=self.interleaved)
        q, k = qk.split((self.n_head, self.n_groups), dim=2)
        return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)

    def read(self, x: Tensor, shared: Shared) -> tuple[Tensor, Tensor]:
        """Keys and values, (B, n_groups, T, hs) each, of x (B, T, n_embd) that stands at no position."""
        return self.project(x, shared.at_rest())[1:]


class LatentAttention(nn.Module):
    """Multi-head latent attention (DeepSeek-V2, section 2.1): keys and values are read from one small latent per token.

        x -> q_a -> norm -> q_b -> [q_nope | q_rope] per head
        x -> kv_a -> [latent -> norm -> kv_b -> (k_nope | v) per head,  k_rope shared by all heads]

    The cache holds latent and k_rope only; kv_b is then folded into query and output, not applied to all keys.
    """

    def __init__(self, config: Config, layer: int) -> None:
        super().__init__()
        self.n_head = config.n_head
        self.nope, self.turned = known(config.qk_nope_head_dim), known(config.qk_rope_head_dim)
        self.v_size, self.rank = known(config.v_head_dim), known(config.kv_lora_rank)
        eps = config.latent_norm_eps
        q_rows = self.n_head * (self.nope + self.turned)
        if config.q_lora_rank:
            self.q_a_proj = nn.Linear(config.n_embd, config.q_lora_rank, bias=config.attn_bias)
            self.q_a_norm = build_norm(config, config.q_lora_rank, eps)
            self.q_b_proj = nn.Linear(config.q_lora_rank, q_rows, bias=False)
        else:
            self.q_proj = nn.Linear(config.n_embd, q_rows, bias=False)
        self.has_query_latent = bool(config.q_lora_rank)
        self.kv_a_proj_with_mqa = nn.Linear(config.n_embd, self.rank + self.turned, bias=config.attn_bias)
        self.kv_a_norm = build_norm(config, self.rank, eps)
        self.kv_b_proj = nn.Linear(self.rank, self.n_head * (self.nope + self.v_size), bias=False)
        self.proj = nn.Linear(self.n_head * self.v_size, config.n_embd, bias=config.proj_bias)
        self.window = config.window(layer)
        self.interleaved = config.rope_interleave
        self.scale = latent_scale(config)
        self.softcap = config.attention_logit_softcapping
        self.prefix: nn.Module | None = None  # what LLaMA-Adapter adds to what is attended to

    def forward(self, x: Tensor, shared: Shared, cache: LayerCache | None = None) -> Tensor:
        q_nope, q_turned = self.queries(x, shared)  # (B, nh, T, nope), (B, nh, T, turned)
        latent, k_turned = self.latents(x, shared)  # (B, 1, T, rank), (B, 1, T, turned)
        if cache is None or shared.fresh:
            if cache is not None:
                cache.write(shared, k_turned, latent)
            q, k, v = self.unfold(q_nope, q_turned, latent, k_turned)
            y = attend_own(q, k, v, shared, self.window, scale=self.scale, softcap=self.softcap)
        else:
            k_turned, latent, mask = cache.extend(shared, k_turned, latent)
            y = self.attend_folded(q_nope, q_turned, latent, k_turned, mask)
        if self.prefix is not None:
            y = y + self.prefix(self, torch.cat((q_nope, q_turned), dim=-1), shared)
        return self.proj(y.transpose(1, 2).flatten(2))

    def queries(self, x: Tensor, shared: Shared) -> tuple[Tensor, Tensor]:
        q = self.q_b_proj(self.q_a_norm(self.q_a_proj(x))) if self.has_query_latent else self.q_proj(x)
        q = q.view(*x.shape[:2], self.n_head, self.nope + self.turned)
        nope, turned = q.split((self.nope, self.turned), dim=-1)
        return nope.transpose(1, 2), rotate(turned, *shared.turns, interleaved=self.interleaved).transpose(1, 2)

    def latents(self, x: Tensor, shared: Shared) -> tuple[Tensor, Tensor]:
        latent, turned = self.kv_a_proj_with_mqa(x).split((self.rank, self.turned), dim=-1)
        turned = rotate(turned.unsqueeze(2), *shared.turns, interleaved=self.interleaved)
        return self.kv_a_norm(latent).unsqueeze(1), turned.transpose(1, 2)

    def unfold(self, q_nope: Tensor, q_turned: Tensor, latent: Tensor, k_turned: Tensor) -> tuple[Tensor, ...]:
        """Queries, keys and values per head, as plain attention wants them."""
        return torch.cat((q_nope, q_turned), dim=-1), *self.keys_and_values(latent, k_turned)

    def keys_and_values(self, latent: Tensor, k_turned: Tensor) -> tuple[Tensor, Tensor]:
        kv = self.kv_b_proj(latent.squeeze(1)).unflatten(-1, (self.n_head, -1)).transpose(1, 2)
        k_nope, v = kv.split((self.nope, self.v_size), dim=-1)
        return torch.cat((k_nope, k_turned.expand(-1, self.n_head, -1, -1)), dim=-1), v

    def read(self, x: Tensor, shared: Shared) -> tuple[Tensor, Tensor]:
        """Keys and values per head, (B, n_head, T, size) each, of x (B, T, n_embd) that stands at no position."""
        return self.keys_and_values(*self.latents(x, shared.at_rest()))

    def attend_folded(
        self, q_nope: Tensor, q_turned: Tensor, latent: Tensor, k_turned: Tensor, mask: Tensor | None
    ) -> Tensor:
        """Attention in latent space: q.(W_k c) = (W_k^T q).c, and a weighted sum of W_v c is W_v of that sum."""
        per_head = self.kv_b_proj.weight.view(self.n_head, self.nope + self.v_size, self.rank)
        w_k, w_v = per_head.split((self.nope, self.v_size), dim=1)  # (nh, nope, rank), (nh, v_size, rank)
        q = torch.cat((q_nope @ w_k, q_turned), dim=-1)  # (B, nh, T, rank + turned)
        k = torch.cat((latent, k_turned), dim=-1)  # (B, 1, S, rank + turned)
        y = attend(q, k, latent, mask=mask, scale=self.scale, softcap=self.softcap)  # (B, nh, T, rank)
        y = y @ w_v.transpose(1, 2)
        if self.kv_b_proj.bias is None:
            return y
        # an adapter's: the part of the keys adds the same to all scores of a query, which softmax does not see
        return y + self.kv_b_proj.bias.view(self.n_head, 1, -1)[..., self.nope :].to(y.dtype)


def latent_scale(config: Config) -> float:
    """Score scale of latent attention; YaRN's `mscale_all_dim` sharpens it (DeepSeek-V3's model code)."""
    scale = 1 / math.sqrt(config.attention_scores_scalar or known(config.qk_head_dim))
    stretch = config.rope_adjustments or {}
    if stretch.get("mscale_all_dim"):
        scale *= yarn_temperature(stretch["factor"], stretch["mscale_all_dim"]) ** 2
    return scale


def attend_own(
    q: Tensor, k: Tensor, v: Tensor, shared: Shared, window: int | None, *, scale: float, softcap: float | None
) -> Tensor:
    """Causal attention of a chunk (B, nh, T, hs) over its own keys, document by document where rows are packed."""
    if shared.until is not None:
        return torch.cat(
            [
                attend(q[:, :, queries], k[:, :, keys], v[:, :, keys], mask=mask, scale=scale, softcap=softcap)
                for queries, keys, mask in shared.blocks(window, q.device)
            ],
            dim=2,
        )
    if shared.documents is None:
        mask = shared.own_mask(q.size(2), window, q.device)
        return attend(q, k, v, mask=mask, causal=mask is None, scale=scale, softcap=softcap)
    longest = max(max(lengths) for lengths in shared.documents)
    if q.device.type == "cpu" and softcap is None and (window is None or longest <= window):
        return attend_documents(q, k, v, shared.documents, scale)
    rows = []
    for row, lengths in enumerate(shared.documents):
        parts = []
        for document in zip(*(t[row : row + 1].split(lengths, dim=2) for t in (q, k, v)), strict=True):
            length = document[0].size(2)
            mask = causal_mask(length, window, q.device) if window is not None and length > window else None
            parts.append(attend(*document, mask=mask, causal=mask is None, scale=scale, softcap=softcap))
        rows.append(torch.cat(parts, dim=2))
    return torch.cat(rows)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Tensor | None = None,
    causal: bool = False,
    scale: float,
    softcap: float | None = None,
) -> Tensor:
    """Softmax attention; query head h reads key/value head h // (n_head // n_groups).

    Args:
        q: (B, n_head, T, hs); k: (B, n_groups, S, hs); v: (B, n_groups, S, vs).
        mask: bool, True = may attend, broadcast to (B, 1, T, S).
        causal: position t sees keys 0..t (T == S); then no mask.

    Returns:
        (B, n_head, T, vs)
    """
    if softcap is not None:
        return attend_plainly(q, k, v, mask=mask, causal=causal, scale=scale, softcap=softcap)
    n_head, n_groups, length = q.size(1), k.size(1), q.size(2)
    if n_head == n_groups:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal and length > 1, scale=scale)
    if length == 1:  # the queries of a group stand in line as if they were positions: no key is copied
        q = q.reshape(q.size(0), n_groups, n_head // n_groups, q.size(3))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
        return y.reshape(y.size(0), n_head, 1, y.size(3))
    if mask is not None and q.is_cuda:  # no fused kernel takes a mask and groups together
        k, v = (t.repeat_interleave(n_head // n_groups, dim=1) for t in (k, v))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=True)


def attend_plainly(
    q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None, causal: bool, scale: float, softcap: float | None
) -> Tensor:
    """Attention as the formula stands, for what the fused kernels cannot do (scores capped before the mask)."""
    repeats = q.size(1) // k.size(1)
    k, v = (t.repeat_interleave(repeats, dim=1) if repeats > 1 else t for t in (k, v))
    scores = (q @ k.transpose(-2, -1)) * scale  # (B, nh, T, S)
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if causal:
        mask = causal_mask(q.size(2), None, q.device)
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    return torch.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype) @ v


def causal_mask(length: int, window: int | None, device: torch.device | str | None = None) -> Tensor:
    """(T, T) bool. A query sees itself and what precedes it, `window` tokens in all.

    window = 2      key 0 1 2 3
        query 0         x . . .
        query 1         x x . .
        query 2         . x x .
        query 3         . . x x
    """
    mask = torch.ones(length, length, dtype=torch.bool, device=device).tril_()
    return mask if window is None else mask.triu_(1 - window)


# ------------------------------------------------------------------------------------------------- the layout of QKV


def qkv_rows(config: Config) -> tuple[int, int, int]:
    """Rows of the query, key and value part of `attn.qkv`."""
    queries, keys = (heads * known(config.head_size) for heads in (config.n_head, known(config.n_query_groups)))
    return queries, keys, keys


def split_qkv(qkv: Tensor, config: Config) -> tuple[Tensor, Tensor, Tensor]:
    """Rows (dim 0) of a weight or bias of `attn.qkv` -> its query, key and value rows."""
    q, k, v = qkv.split(qkv_rows(config))
    return q, k, v


def join_qkv(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The inverse of `split_qkv`."""
    return torch.cat((q, k, v))


def grouped_to_concat(qkv: Tensor, config: Config) -> Tensor:
    """Rows stored group by group, [queries | key | value] each (GPT-NeoX, Falcon) -> our [queries | keys | values]."""
    groups = known(config.n_query_groups)
    per_group = config.n_head // groups
    grouped = qkv.reshape(groups, per_group + 2, known(config.head_size), *qkv.shape[1:])
    q, k, v = grouped.split((per_group, 1, 1), dim=1)
    return join_qkv(*(part.flatten(0, 2) for part in (q, k, v)))


def concat_to_grouped(qkv: Tensor, config: Config) -> Tensor:
    """The inverse of `grouped_to_concat`."""
    parts = (p.unflatten(0, (config.n_query_groups, -1, config.head_size)) for p in split_qkv(qkv, config))
    return torch.cat(tuple(parts), dim=1).flatten(0, 2)


# ------------------------------------------------------------------------------------------------------ rotary position


class Rope(nn.Module):
    """Rotary position embedding (Su et al. 2021): angles = position * frequency, for the rotated part of a head.

    No table: angles of the positions at hand are computed once per forward, so that any position is exact.
    """

    frequencies: Tensor

    def __init__(self, config: Config, base: float, stretch: Mapping[str, Any] | None) -> None:
        super().__init__()
        self.size, self.base, self.stretch = config.rope_n_elem, base, dict(stretch or {})
        self.condense = config.rope_condense_ratio
        self.magnitude = rope_magnitude(self.stretch, config.block_size)
        self.reset(torch.device("cpu"))

    def reset(self, device: torch.device) -> None:
        """Rows: the usual frequencies, and those beyond the original context where they differ (longrope)."""
        kinds = (False, True) if "long_factor" in self.stretch else (False,)
        rows = [rope_frequencies(self.size, self.base, self.stretch, long=long) / self.condense for long in kinds]
        self.register_buffer("frequencies", torch.stack(rows).to(device), persistent=False)

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        # a cast to bf16 must not reach the frequencies, and `to_empty` must not leave them empty
        super()._apply(fn, recurse)
        if self.frequencies.device.type != "meta":
            self.reset(self.frequencies.device)
        return self

    @property
    def has_two_ranges(self) -> bool:
        """Whether a sequence that gets longer than the original context turns by other frequencies."""
        return len(self.frequencies) > 1

    def forward(self, positions: Tensor, reach: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """cos and sin, each (1 or B, T, 1, size), of positions (T,) or (B, T), in sequences `reach` tokens long.

        The first half of `sin` is negated: `rotate` then needs three kernels.
        """
        frequencies = self.frequencies[0]  # (size / 2,)
        if reach is not None:  # (1 or B, 1 or T, size / 2)
            frequencies = self.frequencies[(reach > self.stretch["original_max_seq_len"]).long()]
        angles = positions.float().unsqueeze(-1) * frequencies  # (.., T, size / 2)
        if angles.dim() == 2:
            angles = angles.unsqueeze(0)
        cos, sin = angles.cos() * self.magnitude, angles.sin() * self.magnitude
        cos, sin = torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)
        return cos.unsqueeze(2).to(dtype), sin.unsqueeze(2).to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False) -> Tensor:
    """Turn the first `cos.size(-1)` dims of each head of x (B, T, heads, hs).

    Dim i turns with dim i + size/2. With `interleaved`, pairs lie side by side in x and are brought apart first; scores
    do not change as long as queries and keys agree.
    """
    size, rest = cos.size(-1), None
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)  # under autocast the weights' precision is not that of x
    if size < x.size(-1):
        x, rest = x[..., :size], x[..., size:]
    if interleaved:
        x = x.unflatten(-1, (-1, 2)).transpose(-2, -1).flatten(-2)
    turned = torch.addcmul(x * cos, x.roll(size // 2, dims=-1), sin)
    return turned if rest is None else torch.cat((turned, rest), dim=-1)


def rope_frequencies(size: int, base: float, stretch: Mapping[str, Any], *, long: bool = False) -> Tensor:
    """(size / 2,) fp32 radians per token, stretched for longer contexts as `stretch` (Config.rope_adjustments) says."""
    wavelengths = base ** (torch.arange(0, size, 2, dtype=torch.int64, device="cpu").float() / size)
    if "long_factor" in stretch:  # longrope (Ding et al. 2024): a factor per dim
        return 1.0 / (torch.tensor(stretch["long_factor" if long else "short_factor"], device="cpu") * wavelengths)
    frequencies = 1.0 / wavelengths
    if "beta_fast" in stretch:
        return _yarn_frequencies(frequencies, size, base, stretch)
    if "low_freq_factor" in stretch:
        return _llama3_frequencies(frequencies, stretch)
    return frequencies / stretch.get("factor", 1.0)


def _llama3_frequencies(frequencies: Tensor, stretch: Mapping[str, Any]) -> Tensor:
    """Llama 3.1: slow dims are divided by `factor`, fast ones kept, a ramp between."""
    low, high = stretch["low_freq_factor"], stretch["high_freq_factor"]
    turns = stretch["original_max_seq_len"] * frequencies / (2 * math.pi)  # full turns within the original context
    keep = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 - keep) * frequencies / stretch["factor"] + keep * frequencies


def _yarn_frequencies(frequencies: Tensor, size: int, base: float, stretch: Mapping[str, Any]) -> Tensor:
    """YaRN (Peng et al. 2023, section 3.2): dims that turn often stay, those that seldom do are divided by `factor`."""

    def dim_turning(turns: float) -> float:
        """The dim that makes `turns` full turns within the original context."""
        return size * math.log(stretch["original_max_seq_len"] / (turns * 2 * math.pi)) / (2 * math.log(base))

    first, last = dim_turning(stretch["beta_fast"]), dim_turning(stretch["beta_slow"])
    if stretch.get("truncate", True):
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, size - 1)
    dims = torch.arange(size // 2, dtype=torch.float32, device="cpu")
    divided = ((dims - first) / max(last - first, 0.001)).clamp(0, 1)  # 0 = kept
    return frequencies / stretch["factor"] * divided + frequencies * (1 - divided)


def rope_magnitude(stretch: Mapping[str, Any], block_size: int) -> float:
    """What cos and sin are multiplied by, for stretched contexts."""
    if stretch.get("attention_factor") is not None:
        return float(stretch["attention_factor"])
    if "long_factor" in stretch:
        original = stretch["original_max_seq_len"]
        factor = stretch.get("factor") or block_size / original
        return math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    if "beta_fast" in stretch:
        factor, mscale, all_dim = (stretch.get(k) for k in ("factor", "mscale", "mscale_all_dim"))
        if mscale and all_dim:
            return yarn_temperature(factor, mscale) / yarn_temperature(factor, all_dim)
        return yarn_temperature(factor, 1.0)
    return 1.0


def yarn_temperature(factor: Any, mscale: float) -> float:
    """YaRN's attention temperature, `0.1 mscale ln(factor) + 1`."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


# ---------------------------------------------------------------------------------------------------- MLPs and experts


def build_mlp(config: Config, layer: int) -> nn.Module:
    """The MLP of one layer; in a MoE model some layers are dense."""
    if config.is_moe_layer(layer):
        return LLaMAMoE(config)
    if config.mlp_class_name == "GptNeoxMLP":
        return GptNeoxMLP(config)
    return LLaMAMLP(config)


class GptNeoxMLP(nn.Module):
    """proj(gelu(fc(x)))"""

    def __init__(self, config: Config) -> None:
        super().__init__()
        width = known(config.intermediate_size)
        self.fc = nn.Linear(config.n_embd, width, bias=config.has_mlp_bias)
        self.proj = nn.Linear(width, config.n_embd, bias=config.has_mlp_bias)
        self.approximate = config.gelu_approximate

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(F.gelu(self.fc(x), approximate=self.approximate))


class LLaMAMLP(nn.Module):
    """proj(act(fc_1(x)) * fc_2(x)) (Shazeer 2020); act is silu, or gelu in a GemmaMLP."""

    def __init__(self, config: Config, intermediate_size: int | None = None) -> None:
        super().__init__()
        width = intermediate_size or known(config.intermediate_size)
        self.fc_1 = nn.Linear(config.n_embd, width, bias=config.has_mlp_bias)
        self.fc_2 = nn.Linear(config.n_embd, width, bias=config.has_mlp_bias)
        self.proj = nn.Linear(width, config.n_embd, bias=config.has_mlp_bias)
        self.gelu = config.gelu_approximate if config.mlp_class_name == "GemmaMLP" else None

    def forward(self, x: Tensor) -> Tensor:
        gate, up = both(self.fc_1, self.fc_2, x)
        gate = F.silu(gate) if self.gelu is None else F.gelu(gate, approximate=self.gelu)
        return self.proj(gate * up)


def both(first: nn.Module, second: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """first(x) and second(x); at once, where what stands in for a linear can do that."""
    together = getattr(first, "together", None)
    return (first(x), second(x)) if together is None else together(second, x)


class LLaMAMoE(nn.Module):
    """Each token goes to its `n_expert_per_token` best experts (Mixtral), and to a shared one (DeepSeek)."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        width = config.moe_intermediate_size or known(config.intermediate_size)
        self.gate = Router(config)
        self.experts = nn.ModuleList(LLaMAMLP(config, width) for _ in range(config.n_expert))
        if config.n_shared_expert:
            self.shared_experts = LLaMAMLP(config, width * config.n_shared_expert)
        self.has_shared = bool(config.n_shared_expert)

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(0, -2)  # (N, C)
        weights, experts = self.gate(flat)  # (N, k) each
        # sorted by expert, each expert sees its tokens as one matrix; one look at the counts per layer
        order = experts.flatten().argsort(stable=True)
        counts: list[int] = experts.flatten().bincount(minlength=len(self.experts)).tolist()
        tokens = order // experts.size(1)  # (N * k,) the token of each place in the order
        # with gradients every expert takes part, with no token too: ranks must agree on which parameters have one
        chosen = [i for i, count in enumerate(counts) if count or torch.is_grad_enabled()]
        parts = flat[tokens].split([counts[i] for i in chosen])
        outputs = torch.cat([self.experts[i](part) for i, part in zip(chosen, parts, strict=True)])
        # back in the tokens' order, then a sum over the k: adding in place would depend on the order of threads
        outputs = outputs[order.argsort()].view(*experts.shape, -1)  # (N, k, C)
        y = (outputs * weights.unsqueeze(-1).to(outputs.dtype)).sum(1).view(x.shape)
        return y + self.shared_experts(x) if self.has_shared else y


class Router(nn.Module):
    """Which experts a token goes to, and how much each counts.

    Softmax (Mixtral, Qwen3): the top k logits. Grouped sigmoid (DeepSeek-V3, section 2.1.2): scores plus a correction
    bias choose the best groups, then the best experts in them; the plain scores weigh them.
    """

    e_score_correction_bias: Tensor

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.n_expert, config.n_embd))
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        self.bias: nn.Parameter | None = None  # no model has one; an adapter of LitGPT 0.5 may
        self.top_k = config.n_expert_per_token
        self.scaling = config.routed_scaling_factor
        self.groups = config.n_expert_groups
        self.groups_kept = config.n_topk_groups
        self.scores_per_group = config.n_topk_scores_per_group
        self.normalize = config.norm_topk_prob if self.groups else config.softmax_topk_norm
        if self.groups:
            self.register_buffer("e_score_correction_bias", torch.zeros(config.n_expert))

    def reset_bias(self) -> None:
        if self.groups:
            nn.init.zeros_(self.e_score_correction_bias)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(N, C) -> weights (N, k) fp32 and expert indices (N, k)."""
        weights, experts = self.by_groups(x) if self.groups else self.by_softmax(x)
        return weights * self.scaling, experts

    def by_softmax(self, x: Tensor) -> tuple[Tensor, Tensor]:
        logits = F.linear(x, self.weight, self.bias).float()
        if self.normalize:  # a softmax over the chosen is the softmax over all, renormalised
            best, experts = logits.topk(self.top_k, dim=-1)
            return best.softmax(dim=-1), experts
        weights, experts = logits.softmax(dim=-1).topk(self.top_k, dim=-1)
        return weights, experts

    def by_groups(self, x: Tensor) -> tuple[Tensor, Tensor]:
        bias = None if self.bias is None else self.bias.float()
        scores = F.linear(x.float(), self.weight.float(), bias).sigmoid()  # (N, E)
        grouped = (scores + self.e_score_correction_bias.float()).unflatten(
            -1, (self.groups, -1)
        )  # (N, groups, E / groups)
        ranks = grouped.topk(self.scores_per_group, dim=-1).values.sum(-1)  # (N, groups)
        kept = torch.zeros_like(ranks, dtype=torch.bool).scatter_(1, ranks.topk(self.groups_kept, dim=-1).indices, True)
        choice = grouped.masked_fill(~kept.unsqueeze(-1), float("-inf")).flatten(1)
        experts = choice.topk(self.top_k, dim=-1).indices
        weights = scores.gather(1, experts)
        if self.normalize:
            weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)
        return weights, experts


# --------------------------------------------------------------------------------------------------------------- cache


class LayerCache:
    """Keys and values of one layer: slot s of a row holds position s, or s modulo the slots in a ring.

    A ring of `window` slots is all that a sliding layer ever sees, however long the text. It has more where tokens may
    be taken back, see `KVCache`. Positions are written without gaps, from 0: so what a slot holds follows from the
    row's position alone, and a row may start again at any time.
    """

    def __init__(
        self, k: Tensor, v: Tensor, window: int | None, documents: list[tuple[int, int]] | None = None
    ) -> None:
        self.k, self.v = k, v  # (B, heads, slots, size) each; for latent attention the turned part and the latent
        self.slots = k.size(2)
        self.window = window
        self.documents = documents  # see `KVCache.packed`

    def write(self, shared: Shared, k: Tensor, v: Tensor) -> None:
        """Store k, v (B, heads, T, size) at their positions; of more than a ring holds, the last ones stay."""
        if self.documents is not None:
            self._write_documents(self.documents, k, v)
            return
        index = self._index(shared, k.size(2))
        for kept, new in ((self.k, k), (self.v, v)):
            if new.size(2) > self.slots:
                new = new[:, :, -self.slots :]
            size = kept.size(-1)
            kept.view(-1, size).index_copy_(0, index, new.to(kept.dtype).reshape(-1, size))

    def _index(self, shared: Shared, length: int) -> Tensor:
        """(B * heads * T,): where in the cache, seen as one list of slots, these tokens go; once for all layers."""
        key = ("slots", length, self.slots, self.window is None)
        index = shared.masks.get(key)
        if index is None:
            slots = shared.positions.view(-1, length)[:, -self.slots :]
            slots = slots if self.window is None else slots % self.slots
            rows, heads = self.k.shape[:2]
            first = torch.arange(0, rows * heads * self.slots, self.slots, device=slots.device).view(rows, heads, 1)
            index = shared.masks[key] = (first + slots.unsqueeze(1)).flatten()
        return index

    def _write_documents(self, documents: list[tuple[int, int]], k: Tensor, v: Tensor) -> None:
        for kept, new in ((self.k, k), (self.v, v)):
            parts = new[0].to(kept.dtype).split([length for _, length in documents], dim=1)
            for (row, length), part in zip(documents, parts, strict=True):
                held = min(length, self.slots)
                first = (length - held) % self.slots  # 0, but for a ring that has gone around
                kept[row, :, first:held] = part[:, length - held : length - first]
                kept[row, :, :first] = part[:, length - first :]

    def extend(self, shared: Shared, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Add k, v and return all keys and values these tokens may look at, with the mask (B or 1, 1, T, S)."""
        length = k.size(2)
        if self.window is not None and length > 1:  # the chunk may overwrite what its first tokens still need
            mask = self.mask(shared, "ring and chunk", length)
            keys, values = (
                torch.cat((self.k, k.to(self.k.dtype)), dim=2),
                torch.cat((self.v, v.to(self.v.dtype)), dim=2),
            )
            self.write(shared, k, v)
            return keys, values, mask
        self.write(shared, k, v)
        if self.window is not None:
            return self.k, self.v, self.mask(shared, "ring", length)
        span = shared.span or self.slots
        return self.k[:, :, :span], self.v[:, :, :span], self.mask(shared, "full", length)

    def mask(self, shared: Shared, kind: str, length: int) -> Tensor | None:
        key = (kind, length, self.window)
        if key not in shared.masks:
            positions = shared.positions.view(-1, length)  # (B or 1, T)
            if kind == "full":
                held = torch.arange(shared.span or self.slots, device=positions.device).view(1, 1, -1)
                # one row that decodes looks at all that the known span holds
                alone = length == 1 and self.k.size(0) == 1 and shared.span is not None
                seen = None if alone else held <= positions.unsqueeze(-1)
            else:
                seen = self._ring_mask(positions, with_chunk=kind == "ring and chunk")
            shared.masks[key] = None if seen is None else seen.unsqueeze(1)
        return shared.masks[key]

    def _ring_mask(self, positions: Tensor, *, with_chunk: bool) -> Tensor:
        """(B or 1, T, S): which slots of the ring (and tokens of the chunk) each token may look at."""
        assert self.window is not None
        newest = positions[:, :1] - 1 if with_chunk else positions[:, -1:]  # (B, 1), the last position in the ring
        slots = torch.arange(self.slots, device=positions.device)
        held = newest - (newest - slots) % self.slots  # (B, slots), the position that each slot holds; negative: none
        if with_chunk:
            held = torch.cat((held, positions), dim=1)  # (B, slots + T)
        back = positions.unsqueeze(-1) - held.unsqueeze(1)  # (B, T, S), how far back a key lies
        return (held.unsqueeze(1) >= 0) & (back >= 0) & (back < self.window)

    def rows(self, rows: slice) -> LayerCache:
        return LayerCache(self.k[rows], self.v[rows], self.window)


class KVCache:
    """The keys and values of a batch of sequences, each layer as large as that layer needs.

    Args:
        config: the model's.
        batch_size: rows.
        max_len: longest sequence; None: the model's context length.
        ahead: up to so many of the newest tokens may be taken back, by writing others over them. Rings are larger by
            that: what those had overwritten was not needed any more.
        dtype, device: of the keys, usually the model's.
    """

    def __init__(
        self,
        config: Config,
        batch_size: int,
        max_len: int | None = None,
        ahead: int = 0,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        max_len = config.block_size if max_len is None else max_len
        if max_len > config.block_size:
            raise InputError(f"a cache of {max_len} tokens is longer than the model's context of {config.block_size}")
        self.batch_size, self.max_len, self.ahead = batch_size, max_len, ahead
        self.span: int | None = None  # the caller may say how many slots are in use; None: found out, or all
        self.reach: list[int] | Tensor | None = None  # and how long each row will get; None: max_len
        self.documents: list[tuple[int, int]] | None = None  # see `packed`
        self.layers: list[LayerCache] = []
        for layer in range(config.n_layer):
            window = config.window(layer)
            slots = max_len if window is None else min(window + ahead, max_len)
            k, v = (
                torch.zeros(batch_size, heads, slots, size, dtype=dtype, device=device)
                for heads, size in _cache_shapes(config)
            )
            self.layers.append(LayerCache(k, v, window))

    def rows(self, start: int, stop: int) -> KVCache:
        """A view of some rows: what is written to it is written here."""
        return self._view([layer.rows(slice(start, stop)) for layer in self.layers], stop - start)

    def packed(self, documents: list[tuple[int, int]]) -> KVCache:
        """A view for sequences that begin and are laid end to end as one row: (row of this cache, length) of each.

        ids        a a a b b c c c c       positions  0 1 2 0 1 0 1 2 3      documents  (0, 3) (2, 2) (1, 4)
        """
        view = self._view([LayerCache(c.k, c.v, c.window, documents) for c in self.layers], len(documents))
        view.documents = documents
        return view

    def _view(self, layers: list[LayerCache], rows: int) -> KVCache:
        view = object.__new__(KVCache)
        view.batch_size, view.max_len, view.span, view.reach, view.documents = rows, self.max_len, None, None, None
        view.ahead = self.ahead
        view.layers = layers
        return view

    def grow(self, rows: int, max_len: int) -> None:
        """Make room for more or longer rows; what is there stays. One layer at a time is held twice."""
        for layer in self.layers:
            slots = max_len if layer.window is None else min(layer.window + self.ahead, max_len)
            # a ring that is not yet as large as it may get has never gone around: slot s holds position s
            for name in ("k", "v"):
                old: Tensor = getattr(layer, name)
                new = old.new_zeros(rows, old.size(1), slots, old.size(3))
                new[: old.size(0), :, : old.size(2)] = old
                setattr(layer, name, new)
            layer.slots = slots
        self.batch_size, self.max_len = rows, max_len

    def can_go_back(self, filled: int, length: int) -> bool:
        """Whether a row of `filled` tokens still holds what it held at `length`: a ring forgets."""
        rings = [min(layer.slots, layer.window) for layer in self.layers if layer.window is not None]
        return filled <= length + 1 or all(filled <= slots for slots in rings)

    def copy_row(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` slots of one row over another's."""
        for tensor in self.tensors():
            tensor[target, :, :length].copy_(tensor[source, :, :length])

    def swap_rows(self, one: int, other: int, length: int) -> None:
        """Exchange the first `length` slots of two rows."""
        for tensor in self.tensors():
            kept = tensor[one, :, :length].clone()
            tensor[one, :, :length].copy_(tensor[other, :, :length])
            tensor[other, :, :length].copy_(kept)

    def clear_row(self, row: int) -> None:
        """Forget a row that holds NaN: a masked slot with NaN in it would still reach who looks past it."""
        for tensor in self.tensors():
            tensor[row].zero_()

    def tensors(self) -> Iterator[Tensor]:
        for layer in self.layers:
            yield from (layer.k, layer.v)

    @property
    def nbytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in self.tensors())


def _cache_shapes(config: Config) -> tuple[tuple[int, int], tuple[int, int]]:
    """(heads, size) of what the two tensors of a layer hold per token."""
    if config.latent_attention:
        return (1, known(config.qk_rope_head_dim)), (1, known(config.kv_lora_rank))
    return ((known(config.n_query_groups), known(config.head_size)),) * 2


def known(size: int | None) -> int:
    """A size that `Config` has derived: never None once it is built."""
    assert size is not None
    return size
