"""What every finetuning method has in common: what it promises, which linears a model has, how one is wrapped.

Knows a model's modules, no training and no files.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping
from dataclasses import asdict, dataclass
from itertools import chain
from typing import Any, ClassVar, NamedTuple, cast

import torch
from torch import Tensor, nn

from litgpt.config import Config
from litgpt.errors import InputError
from litgpt.model import GPT, both, known, qkv_rows


@dataclass(frozen=True)
class Method(ABC):
    """How a model is finetuned. Plain values only: it travels to other processes and into files."""

    name: ClassVar[str]
    is_whole: ClassVar[bool] = False  # whether the result is the whole model, and not something small beside it

    def check(self, config: Config) -> None:  # noqa: B027
        """Refuse, before anything is built, values that make no sense for the model. Raises InputError."""

    @abstractmethod
    def attach(self, model: GPT, generator: torch.Generator | None = None) -> None:
        """Change the model in place; then exactly what trains requires a gradient, and no logit has changed.

        New parameters are fp32 on the device of what they stand beside, and drawn with `generator`; a forward casts
        them to its activations. Linears may be quantized.
        """

    @abstractmethod
    def trained(self, config: Config) -> int:
        """How many parameters will train, by arithmetic alone."""

    def settings(self) -> dict[str, Any]:
        """The method's values, as adapter files record them and a resumed run compares them."""
        return asdict(self)


# ------------------------------------------------------------------------------------------- the linears of a model

QKV, QUERY, KEY_VALUE, PROJECTION, MLP, HEAD = "qkv", "query", "key_value", "projection", "mlp", "head"
_BLOCK = r"transformer\.h\.\d+\."
_KINDS = {
    QKV: _BLOCK + r"attn\.qkv",
    QUERY: _BLOCK + r"attn\.q(_[ab])?_proj",  # of latent attention, as is the next
    KEY_VALUE: _BLOCK + r"attn\.kv_(a_proj_with_mqa|b_proj)",
    PROJECTION: _BLOCK + r"attn\.proj",
    MLP: _BLOCK + r"mlp\.(experts\.\d+\.|shared_experts\.)?(fc|fc_1|fc_2|proj)",
    HEAD: "lm_head",
}


def kind_of(name: str) -> str | None:
    """What the module of that name is for, where it is a linear of the model; None for all others."""
    return next((kind for kind, pattern in _KINDS.items() if re.fullmatch(pattern, name)), None)


def linears(model: GPT) -> list[tuple[str, str, nn.Module]]:
    """(name, kind, module) of every linear, plain, quantized or wrapped."""
    kinds = ((name, kind_of(name), module) for name, module in model.named_modules())
    return [(name, kind, module) for name, kind, module in kinds if kind is not None]


class Size(NamedTuple):
    """Linears of one size."""

    kind: str
    n_in: int
    n_out: int
    bias: bool
    copies: int = 1


def linear_sizes(config: Config) -> Iterator[Size]:
    """The linears of the model that `config` describes, without building it."""
    width, bias = config.n_embd, config.has_mlp_bias
    for layer in range(config.n_layer):
        yield from _attention_sizes(config)
        if config.is_moe_layer(layer):
            expert = config.moe_intermediate_size or known(config.intermediate_size)
            yield Size(MLP, width, expert, bias, 2 * config.n_expert)
            yield Size(MLP, expert, width, bias, config.n_expert)
            if config.n_shared_expert:
                yield Size(MLP, width, expert * config.n_shared_expert, bias, 2)
                yield Size(MLP, expert * config.n_shared_expert, width, bias)
        else:
            dense = known(config.intermediate_size)
            yield Size(MLP, width, dense, bias, 1 if config.mlp_class_name == "GptNeoxMLP" else 2)
            yield Size(MLP, dense, width, bias)
    yield Size(HEAD, width, known(config.padded_vocab_size), config.lm_head_bias)


def _attention_sizes(config: Config) -> Iterator[Size]:
    width = config.n_embd
    if not config.latent_attention:
        yield Size(QKV, width, sum(qkv_rows(config)), config.qkv_bias)
        yield Size(PROJECTION, config.n_head * known(config.head_size), width, config.proj_bias)
        return
    nope, turned = known(config.qk_nope_head_dim), known(config.qk_rope_head_dim)
    rank, v_size, queries = known(config.kv_lora_rank), known(config.v_head_dim), config.n_head * (nope + turned)
    if config.q_lora_rank:
        yield Size(QUERY, width, config.q_lora_rank, config.attn_bias)
        yield Size(QUERY, config.q_lora_rank, queries, False)
    else:
        yield Size(QUERY, width, queries, False)
    yield Size(KEY_VALUE, width, rank + turned, config.attn_bias)
    yield Size(KEY_VALUE, rank, config.n_head * (nope + v_size), False)
    yield Size(PROJECTION, config.n_head * v_size, width, config.proj_bias)


# ------------------------------------------------------------------------------------------------------- wrapping


class Wrapped(nn.Module):
    """A linear with something trained around it. Stands in for it: `weight` and `bias` are what it comes to in all."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base
        self.in_features, self.out_features = cast(int, base.in_features), cast(int, base.out_features)

    def forward(self, x: Tensor) -> Tensor:
        return self.around(x, self.base(x))

    def around(self, x: Tensor, y: Tensor) -> Tensor:
        """What it comes to for x (..., in), where y (..., out) is what the base comes to."""
        raise NotImplementedError

    def together(self, other: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
        """As `model.both` asks: the bases may be able to."""
        if not (isinstance(other, Wrapped) and hasattr(self.base, "together")):
            return self(x), other(x)
        y, others = both(self.base, other.base, x)
        return self.around(x, y), other.around(x, others)

    @property
    def bias(self) -> Tensor | None:
        return cast("Tensor | None", self.base.bias)

    @property
    def device(self) -> torch.device:
        return next(chain(self.base.parameters(), self.base.buffers())).device

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}"


def replace(model: GPT, name: str, module: nn.Module) -> None:
    """Put a module in the place of the one called `name`."""
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)


def freeze(model: GPT) -> None:
    """Nothing of the base trains."""
    if any(isinstance(module, Wrapped) for module in model.modules()):
        raise InputError("the model is wrapped by a finetuning method already; load it anew")
    model.requires_grad_(False)


def whole(tensor: Any) -> Tensor:
    """The whole of a tensor that may be sharded, or not yet computed."""
    return cast(Tensor, tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor)


def trained(model: GPT) -> dict[str, Tensor]:
    """Whole copies on the CPU of what trains. Of a sharded model, every rank calls it."""
    return {name: whole(p.detach()).cpu() for name, p in model.named_parameters() if p.requires_grad}


@torch.no_grad()
def fill(model: GPT, tensors: Mapping[str, Tensor], where: object, optional: Collection[str] = ()) -> None:
    """Copy what was trained into the parameters of these names: all that train, but for the `optional` ones.

    Raises InputError, in one line, when they are others.
    """
    there = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    lists = {
        "missing": [name for name in there if name not in tensors and name not in optional],
        "not of this model": [name for name in tensors if name not in there],
        "of another shape": [n for n, t in tensors.items() if n in there and t.shape != there[n].shape],
    }
    faults = [f"{len(names)} {fault}: {', '.join(names[:3])}" for fault, names in lists.items() if names]
    if faults:
        raise InputError(f"{where}: the tensors do not fit the base model; {'; '.join(faults)}; is it another one's?")
    for name, tensor in tensors.items():
        there[name].copy_(tensor)
