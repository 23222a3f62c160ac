"""Tensor parallelism: every rank holds a part of each layer, and computes with the others at the same time.

    attention   heads of queries, keys and values (rows of qkv)      -> rank's heads of y -> columns of proj -+
    MLP         a part of the width (rows of fc, fc_1, fc_2)         -> its activations   -> columns of proj -+-> sum
    experts     the same part of the width of each; all ranks route every token alike                       -+
    head        rows, that is tokens                                 -> its logits -> laid end to end

The residual stream, embedding, norms and routers are whole on every rank. What a rank holds is the GPT of a smaller
config, whose sums are taken over all ranks: so its cache has its own heads only, and any family is cut by one rule.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from litgpt import estimate, weights
from litgpt.config import Config
from litgpt.errors import InputError, MachineError
from litgpt.model import GPT, Attention, Block, KVCache, join_qkv, known, split_qkv
from litgpt.placement.base import free_memory, in_precision, require_fit
from litgpt.placement.mirror import Channel, Mirror, follow


class Ranks(Protocol):
    """Those who hold the parts of one model."""

    @property
    def rank(self) -> int: ...

    @property
    def size(self) -> int: ...

    def sum(self, x: Tensor) -> Tensor:
        """The sum of the ranks' tensors, for all of them; `x` may be overwritten."""

    def gather(self, x: Tensor) -> Tensor:
        """The ranks' tensors laid end to end along the last dimension."""


@dataclass(frozen=True)
class ProcessRanks:
    """The processes of the default group of `torch.distributed`."""

    rank: int
    size: int

    @staticmethod
    def here() -> ProcessRanks:
        return ProcessRanks(dist.get_rank(), dist.get_world_size())

    def sum(self, x: Tensor) -> Tensor:
        x = x.contiguous()
        dist.all_reduce(x)
        return x

    def gather(self, x: Tensor) -> Tensor:
        x = x.contiguous()
        parts = [torch.empty_like(x) for _ in range(self.size)]
        dist.all_gather(parts, x)
        return torch.cat(parts, dim=-1)


# ----------------------------------------------------------------------------------------------------- what is cut how


def part_of(config: Config, n: int) -> Config:
    """The config of what one of `n` ranks holds. Raises InputError that names what does not divide."""
    if obstacle := _obstacle(config, n):
        most = next(k for k in range(n - 1, 0, -1) if not _obstacle(config, k))
        remedy = f"use {most}" if most > 1 else "use one"
        raise InputError(
            f"{config.name or 'the model'} cannot be cut for {n} devices: {obstacle}; {remedy}, or put its layers on "
            "several devices with litgpt generate_sequentially"
        )
    local: dict[str, Any] = {
        "n_head": config.n_head // n,
        "n_query_groups": max(known(config.n_query_groups) // n, 1),
        "intermediate_size": max(known(config.intermediate_size) // n, 1),
    }
    if config.moe_intermediate_size:
        local["moe_intermediate_size"] = config.moe_intermediate_size // n
    return Config(**{**config.to_dict(), **local})


def _obstacle(config: Config, n: int) -> str | None:
    """What cannot be cut into `n` parts."""
    has_experts = [config.is_moe_layer(layer) for layer in range(config.n_layer)]
    names = ["n_head"]
    if not all(has_experts) or not config.moe_intermediate_size:
        names.append("intermediate_size")
    if any(has_experts) and config.moe_intermediate_size:
        names.append("moe_intermediate_size")
    for name in names:
        if getattr(config, name) % n:
            return f"{name} {getattr(config, name)} is no multiple of {n}"
    groups = known(config.n_query_groups)
    if groups % n and n % groups:  # of fewer groups than ranks, several ranks hold the same one
        return f"n_query_groups {groups} is neither a multiple nor a divisor of {n}"
    return None


class Cut:
    """Which rows and columns of each whole tensor a rank holds."""

    def __init__(self, config: Config, rank: int, n: int) -> None:
        self.config, self.rank, self.n = config, rank, n
        self.norm_whole = config.norm_qk and config.norm_qk_type == "olmo2"

    def __call__(self, name: str, tensor: Tensor) -> Tensor:
        """What this rank holds of the tensor `name`: rows are a view."""
        *_, module, kind = name.split(".")
        if module == "lm_head":
            return tensor if self.config.tie_embeddings else tensor[self.tokens]
        match module if name.startswith("transformer.h.") else "":
            case "qkv":
                q, k, v = split_qkv(tensor, self.config)
                return join_qkv(self.share(q), self.groups(k), self.groups(v))
            case "norm_q" if self.norm_whole:
                return self.share(tensor)
            case "norm_k" if self.norm_whole:
                return self.groups(tensor)
            case "q_proj" | "q_b_proj" | "kv_b_proj" | "fc" | "fc_1" | "fc_2":
                return self.share(tensor)
            case "proj" if kind == "weight":
                return self.share(tensor, dim=1)
            case "proj" if self.rank:  # the bias of a sum is added once
                return torch.zeros_like(tensor)
        return tensor

    @property
    def tokens(self) -> slice:
        """The rows of the head."""
        rows = known(self.config.padded_vocab_size)
        each = -(-rows // self.n)
        return slice(min(self.rank * each, rows), min((self.rank + 1) * each, rows))

    def share(self, tensor: Tensor, dim: int = 0) -> Tensor:
        size = tensor.size(dim) // self.n
        return tensor.narrow(dim, self.rank * size, size)

    def groups(self, tensor: Tensor) -> Tensor:
        """Rows of this rank's key or value heads; of fewer heads than ranks, the one that its queries look at."""
        groups = known(self.config.n_query_groups)
        if groups >= self.n:
            return self.share(tensor)
        size = tensor.size(0) // groups
        return tensor.narrow(0, self.rank * groups // self.n * size, size)


# -------------------------------------------------------------------------------------------------------- the model


class PartGPT(GPT):
    """What one rank holds of a GPT. All ranks run it together, and each of them gets the whole result.

    Args:
        whole: the model's config; `config` is that of the part.
    """

    def __init__(self, whole: Config, ranks: Ranks) -> None:
        super().__init__(part_of(whole, ranks.size))
        self.whole, self.ranks = whole, ranks
        self.cut = Cut(whole, ranks.rank, ranks.size)
        self.mirror: Mirror | None = None  # of rank 0, when it asks for what all of them do
        if not whole.tie_embeddings:
            rows = len(range(*self.cut.tokens.indices(known(whole.padded_vocab_size))))
            self.lm_head = nn.Linear(whole.n_embd, rows, bias=whole.lm_head_bias)
        for block in self.blocks:
            _sum_outputs(block, ranks)  # type: ignore[arg-type]
            if self.cut.norm_whole and isinstance(block.attn, Attention):
                block.attn.norm_q = WideNorm(block.attn.norm_q, ranks)
                block.attn.norm_k = WideNorm(block.attn.norm_k, ranks)

    def forward(  # type: ignore[override]  # answers are all that is asked of it
        self, idx: Tensor, input_pos: Tensor | None = None, *, cache: KVCache | None = None, **told: Any
    ) -> Tensor:
        if told.get("targets") is not None:
            raise InputError("a model on several devices does not train; use the finetune commands, with --devices")
        if self.mirror is None:
            return super().forward(idx, input_pos, cache=cache, **told)
        with self.mirror.together("forward", idx, input_pos, cache, told):
            return super().forward(idx, input_pos, cache=cache, **told)

    def hidden(self, idx: Tensor, input_pos: Tensor | None = None, **told: Any) -> Tensor:
        if self.mirror is None:
            return super().hidden(idx, input_pos, **told)
        cache = told.pop("cache", None)
        with self.mirror.together("hidden", idx, input_pos, cache, told):
            return super().hidden(idx, input_pos, cache=cache, **told)

    def logits(self, hidden: Tensor) -> Tensor:
        if self.mirror is None:
            return self._logits(hidden)
        with self.mirror.together_on("logits", hidden):
            return self._logits(hidden)

    def new_cache(self, batch_size: int, max_len: int | None = None, ahead: int = 0) -> KVCache:
        cache = super().new_cache(batch_size, max_len, ahead)
        return cache if self.mirror is None else self.mirror.keep(cache)

    def _logits(self, hidden: Tensor) -> Tensor:
        """(..., n_embd) -> (..., padded_vocab_size), each rank's tokens gathered."""
        rows, tokens, head = known(self.whole.padded_vocab_size), self.cut.tokens, self.lm_head
        if not isinstance(head, nn.Linear) and self.whole.tie_embeddings:
            return super().logits(hidden)  # a quantized copy of the embedding: every rank holds all of it
        if self.whole.tie_embeddings:
            bias = None if head.bias is None else head.bias[tokens]
            local = F.linear(hidden, head.weight[tokens], bias)
        else:
            local = head(hidden)
        short = -(-rows // self.ranks.size) - local.size(-1)  # the last ranks may have fewer
        logits = self.ranks.gather(F.pad(local, (0, short)) if short else local)[..., :rows]
        softcap = self.config.final_logit_softcapping
        return logits if softcap is None else torch.tanh(logits / softcap) * softcap


class WideNorm(nn.Module):
    """The norm of rows of which each rank holds an equal part: what is averaged is averaged over all of them."""

    def __init__(self, norm: nn.Module, ranks: Ranks) -> None:
        super().__init__()
        self.weight: Any = norm.weight
        self.bias: Any = getattr(norm, "bias", None)
        self.eps: Any = norm.eps
        self.centred = isinstance(norm, nn.LayerNorm)
        self.unit_offset = getattr(norm, "unit_offset", False)
        self.ranks = ranks

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        if self.centred:
            wide = wide - self._mean(wide)
        wide = wide * torch.rsqrt(self._mean(wide.square()) + self.eps)
        if self.weight is not None:
            wide = wide * (self.weight.float() + self.unit_offset)
        if self.bias is not None:
            wide = wide + self.bias.float()
        return wide.to(x.dtype)

    def _mean(self, x: Tensor) -> Tensor:
        return self.ranks.sum(x.mean(dim=-1, keepdim=True)) / self.ranks.size


def _sum_outputs(block: Block, ranks: Ranks) -> None:
    """Let what attention and MLP of a block give be the sum over the ranks, together where nothing stands between."""
    plain = isinstance(block.post_attention_norm, nn.Identity) and isinstance(block.post_mlp_norm, nn.Identity)
    if not (block.parallel and plain):
        for module in (block.attn, block.mlp):
            module.register_forward_hook(lambda module, inputs, output: ranks.sum(output))
        return
    kept: list[Tensor] = []

    def keep(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        kept.append(output)
        return output.new_zeros(())

    block.attn.register_forward_hook(keep)
    block.mlp.register_forward_hook(lambda module, inputs, output: ranks.sum(output + kept.pop()))


# --------------------------------------------------------------------------------------------------------- placing


@dataclass(frozen=True)
class TensorParallel:
    """A part of every layer on this rank's device."""

    ranks: Ranks
    device: torch.device
    room: int  # free bytes of it
    channel: Channel | None = None  # over which rank 0 tells the others what to do; None: all of them know
    mirror: Mirror | None = None  # rank 0's end of it
    cuts = True

    @staticmethod
    def here(device: torch.device) -> TensorParallel:
        """Over the processes of this host, which all make one at the same time; rank 0 is to have the engine."""
        ranks, channel = ProcessRanks.here(), Channel()
        room = free_memory(device, sharers=ranks.size)
        return TensorParallel(ranks, device, room, channel, Mirror(channel) if ranks.rank == 0 else None)

    def require_fit(self, config: Config, dtype: torch.dtype, length: int, what: str) -> None:
        """Refuse what does not fit on this device: its part, and an answer of `length` tokens."""
        part = self.outline(config)
        held = sum(parameter.numel() for parameter in part.parameters()) * dtype.itemsize
        memory = estimate.inference_memory(part.config, dtype.itemsize, 1, length)
        need = held + memory.activations + memory.cache
        require_fit(need, self.room, f"{what}, cut for {self.ranks.size} devices, on each of them")

    def follow(self, model: GPT) -> None:
        """On the other ranks: do what rank 0 does with its part, until it has done."""
        assert self.channel is not None
        follow(model, self.channel)

    def release(self) -> None:
        """On rank 0: let the others go, as far as they are still there."""
        assert self.mirror is not None
        with suppress(MachineError):
            self.mirror.tell("stop")

    def outline(self, config: Config) -> PartGPT:
        return weights.outline(config, lambda config: PartGPT(config, self.ranks))

    def place(self, model: PartGPT, name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        return in_precision(name, model.cut(name, tensor), dtype).to(self.device).contiguous()

    def settle(self, model: PartGPT) -> None:
        model.requires_grad_(False).to(self.device)
        model.mirror = self.mirror
