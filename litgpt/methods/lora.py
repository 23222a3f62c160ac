"""LoRA (Hu et al. 2021): a linear learns a small product of two matrices beside its frozen weight.

         x ----------> W -----------> + --> y          W  (out, in)   frozen, plain or quantized
          \\                          /                 A  (r, in)     drawn like a linear's weight
           dropout --> A --> B * s --                  B  (out, r)    zero at first: a fresh LoRA changes nothing

with s = alpha / r, or alpha / sqrt(r) (rsLoRA, Kalajdzievski 2023). DoRA (Liu et al. 2024) trains the length of each
row of W + s B A apart from its direction.

Query, key and value have matrices of their own over their rows of `attn.qkv`. Latent attention has no such rows: there
`query` adapts all projections on the way to the queries, `key` and `value` alike those to the latent that both are read
from, and from it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from litgpt.config import Config
from litgpt.errors import InputError
from litgpt.methods import base
from litgpt.methods.base import Method, Wrapped, whole
from litgpt.model import GPT, qkv_rows

HEAD = "lm_head"


@dataclass(frozen=True)
class LoRA(Method):
    """What to adapt, and how. `mlp` covers experts; routers are never adapted."""

    r: int = 8
    alpha: float = 16
    dropout: float = 0.05
    query: bool = True
    key: bool = False
    value: bool = True
    projection: bool = False
    mlp: bool = False
    head: bool = False
    rslora: bool = False
    dora: bool = False

    name: ClassVar[str] = "lora"

    @property
    def scale(self) -> float:
        return self.alpha / (math.sqrt(self.r) if self.rslora else self.r)

    def check(self, config: Config) -> None:
        if isinstance(self.r, bool) or not isinstance(self.r, int) or self.r < 1:
            raise InputError(f"lora_r is {self.r}, must be 1 or more; finetune_full trains without LoRA")
        if not 0 < self.alpha < math.inf:
            raise InputError(f"lora_alpha is {self.alpha}, must be a number above 0; {2 * self.r} is usual for this r")
        if not 0 <= self.dropout < 1:
            raise InputError(f"lora_dropout is {self.dropout}, must be at least 0 and less than 1")
        if not self.trained(config):
            names = ", ".join(f"lora_{name}" for name in _TARGETS)
            raise InputError(f"LoRA would train nothing: set one of {names} to true")

    def attach(self, model: GPT, generator: torch.Generator | None = None) -> None:
        self.check(model.config)
        base.freeze(model)
        for name, kind, linear in base.linears(model):
            if parts := self.parts(kind, model.config, cast(int, linear.out_features)):
                adapted = LoRALinear(linear, parts, self.dropout, dora=self.dora)
                adapted.reset(generator)
                base.replace(model, name, adapted)

    def parts(self, kind: str, config: Config, n_out: int) -> list[Part]:
        """The rows of a linear of that kind that are adapted."""
        if kind != base.QKV:
            return [Part("all", 0, n_out, self.r, self.scale)] if self._adapts(kind) else []
        chosen = {"query": self.query, "key": self.key, "value": self.value}
        return [Part(n, start, stop, self.r, self.scale) for n, start, stop in qkv_spans(config) if chosen[n]]

    def trained(self, config: Config) -> int:
        count = 0
        for size in base.linear_sizes(config):
            for part in self.parts(size.kind, config, size.n_out):
                count += size.copies * (part.r * (size.n_in + part.rows) + (part.rows if self.dora else 0))
        return count

    def _adapts(self, kind: str) -> bool:
        return {
            base.QUERY: self.query,
            base.KEY_VALUE: self.key or self.value,
            base.PROJECTION: self.projection,
            base.MLP: self.mlp,
            base.HEAD: self.head,
        }[kind]


_TARGETS = ("query", "key", "value", "projection", "mlp", "head")


@dataclass(frozen=True)
class Part:
    """Rows of a linear that have an A and a B of their own."""

    name: str
    start: int
    stop: int
    r: int
    scale: float

    @property
    def rows(self) -> int:
        return self.stop - self.start


def qkv_spans(config: Config) -> list[tuple[str, int, int]]:
    """Name, first row and row after the last of the three parts of `attn.qkv`."""
    queries, keys, values = qkv_rows(config)
    stops = (queries, queries + keys, queries + keys + values)
    return list(zip(("query", "key", "value"), (0, *stops), stops, strict=False))


class LoRALinear(Wrapped):
    """A linear and the matrices of its parts, which come in the order of their rows."""

    def __init__(self, linear: nn.Module, parts: Iterable[Part], dropout: float = 0.0, *, dora: bool = False) -> None:
        super().__init__(linear)
        self.parts, self.dropout, self.dora = tuple(parts), dropout, dora
        self.scale = self.parts[0].scale if len({part.scale for part in self.parts}) == 1 else None

        def new(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.zeros(shape, dtype=torch.float32, device=self.device))

        self.lora_A = nn.ParameterDict({part.name: new(part.r, self.in_features) for part in self.parts})
        self.lora_B = nn.ParameterDict({part.name: new(part.rows, part.r) for part in self.parts})
        if dora:
            self.lora_magnitude = nn.ParameterDict({part.name: new(part.rows) for part in self.parts})

    @torch.no_grad()
    def reset(self, generator: torch.Generator | None = None) -> None:
        """Draw every A, make every B zero and every magnitude the length of the base's row."""
        for part in self.parts:
            a = self.lora_A[part.name]
            if a.device.type != "meta":  # drawn where the generator is, so that all devices draw the same
                drawn = torch.empty(a.shape, device=generator.device if generator is not None else "cpu")
                a.copy_(nn.init.kaiming_uniform_(drawn, a=math.sqrt(5), generator=generator))
            nn.init.zeros_(self.lora_B[part.name])
        if self.dora and self.device.type != "meta":
            lengths = cast(Tensor, self.base.weight).float().norm(dim=1)
            for part in self.parts:
                self.lora_magnitude[part.name].copy_(lengths[part.start : part.stop])

    def around(self, x: Tensor, y: Tensor) -> Tensor:
        low, up = self._low(x), self._up().to(x.dtype)
        if self.dora:
            bias, gain = self.bias, self.gain().to(y.dtype)
            y = y if bias is None else y - bias
            y = (y + F.linear(low, up)) * gain
            return y if bias is None else y + bias
        # one kernel multiplies and adds
        return torch.addmm(y.flatten(0, -2), low.flatten(0, -2), up.t()).view(y.shape)

    def terms(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x' (..., in + ranks) and W' (out, in + ranks) with x' W'^T = this linear of x (..., in), but for its bias.

        For a loss that must not hold all outputs, and has no place for a second product.
        """
        weight = cast(Tensor, self.base.weight)
        wide = torch.cat((weight, self._up().to(weight.dtype)), dim=1)
        if self.dora:
            wide = wide * self.gain().to(weight.dtype).unsqueeze(1)
        return torch.cat((x, self._low(x).to(x.dtype)), dim=-1), wide

    @property
    def weight(self) -> Tensor:
        """(out, in), the merged weight in the base's precision; computed in fp32, and each time."""
        weight = cast(Tensor, self.base.weight)
        merged = self._directions(weight)
        if self.dora:
            merged = merged * self.gain().unsqueeze(1)
        return merged.to(weight.dtype)

    def gain(self) -> Tensor:
        """(out,) DoRA's factor of each row, 1 where no part is. Lengths take part in no gradient (section 4.3)."""
        with torch.no_grad():
            lengths = self._directions(cast(Tensor, self.base.weight)).norm(dim=1)
        gains = {p.name: self.lora_magnitude[p.name] / lengths[p.start : p.stop] for p in self.parts}
        return torch.cat([lengths.new_ones(n) if part is None else gains[part.name] for part, n in self._rows()])

    def _directions(self, weight: Tensor) -> Tensor:
        """W + s B A, (out, in) fp32."""
        return torch.addmm(weight.float(), self._up(), self._down())

    def _low(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., sum of ranks)."""
        return F.linear(F.dropout(x, self.dropout, self.training), self._down().to(x.dtype))

    def _down(self) -> Tensor:
        """(sum of ranks, in): the A of all parts, so that they are one product."""
        return _joined([self.lora_A[part.name] for part in self.parts])

    def _up(self) -> Tensor:
        """(out, sum of ranks): the scaled B of all parts, block by block; as small as a B, unlike what it is added to.

        query   B_q  .
        key      .   .
        value    .  B_v
        """
        ups = {part.name: self.lora_B[part.name] for part in self.parts}
        if self.scale is None:
            ups = {part.name: ups[part.name] * part.scale for part in self.parts}
        blocks = [
            next(iter(ups.values())).new_zeros(rows, 0) if part is None else ups[part.name]
            for part, rows in self._rows()
        ]
        joined = blocks[0] if len(blocks) == 1 else torch.block_diag(*blocks)
        return joined if self.scale is None else joined * self.scale

    def _rows(self) -> Iterator[tuple[Part | None, int]]:
        """The parts and the gaps between them (None), each with its number of rows."""
        at = 0
        for part in self.parts:
            if part.start > at:
                yield None, part.start - at
            yield part, part.rows
            at = part.stop
        if at < self.out_features:
            yield None, self.out_features - at


def _joined(tensors: list[Tensor]) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors)


# -------------------------------------------------------------------------------------------------------- merging


class Later:
    """A tensor that is computed when it is asked for: its shape and dtype are known before."""

    def __init__(self, shape: torch.Size, dtype: torch.dtype, make: Callable[[], Tensor]) -> None:
        self.shape, self.dtype, self._make = shape, dtype, make

    def full_tensor(self) -> Tensor:
        """As a sharded tensor has it."""
        return self._make()


class Merged(Mapping[str, Tensor]):
    """The tensors of the merged model under the names of a plain one, each computed when it is asked for."""

    def __init__(self, model: GPT) -> None:
        self.config = merged_config(model)
        self.later: dict[str, Any] = dict(_plain_tensors(model))

    def __getitem__(self, name: str) -> Tensor:
        return whole(self.later[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self.later)

    def __len__(self) -> int:
        return len(self.later)


def merged_state(model: GPT) -> Merged:
    """Our-named tensors of the merged model. Of a sharded model, all ranks ask for the same ones in the same order."""
    return Merged(model)


def merged_config(model: GPT) -> Config:
    """The merged model's config: a head that learned something of its own is no longer the embedding."""
    config = model.config
    if config.tie_embeddings and isinstance(model.lm_head, LoRALinear):
        return Config(**{**config.to_dict(), "tie_embeddings": False})
    return config


def merge(model: GPT) -> None:
    """Fold every LoRA into its linear, in place. Quantized linears become plain ones of the model's precision."""
    dtype = model.wte.weight.dtype
    model.config = merged_config(model)
    for name, _, module in base.linears(model):
        if not isinstance(module, nn.Linear):
            base.replace(model, name, _plain(module, dtype))


@torch.no_grad()
def _plain(linear: nn.Module, dtype: torch.dtype) -> nn.Linear:
    n_in, n_out = cast(int, linear.in_features), cast(int, linear.out_features)
    plain = nn.Linear(n_in, n_out, bias=linear.bias is not None, device="meta")
    plain.weight = nn.Parameter(cast(Tensor, linear.weight).to(dtype), requires_grad=False)
    if linear.bias is not None:
        plain.bias = nn.Parameter(cast(Tensor, linear.bias).to(dtype), requires_grad=False)
    return plain


def _plain_tensors(model: GPT) -> Iterator[tuple[str, Any]]:
    """Names and tensors in the order of a plain model; what stands for several tensors is a `Later`."""
    dtype = model.wte.weight.dtype
    odd = {name + ".": module for name, _, module in base.linears(model) if not isinstance(module, nn.Linear)}
    seen = set()
    for key, tensor in model.state_dict().items():
        stem = next((stem for stem in _stems(key) if stem in odd), None)
        if stem is None:
            yield key, tensor
        elif stem not in seen:
            seen.add(stem)
            yield from _merged_tensors(stem, odd[stem], dtype)


def _stems(key: str) -> Iterator[str]:
    """Every prefix of a name that ends in a dot."""
    parts = key.split(".")
    return (".".join(parts[:n]) + "." for n in range(1, len(parts)))


def _merged_tensors(stem: str, linear: nn.Module, dtype: torch.dtype) -> Iterator[tuple[str, Any]]:
    shape = torch.Size((cast(int, linear.out_features), cast(int, linear.in_features)))
    yield stem + "weight", Later(shape, dtype, lambda: _merged_weight(linear).to(dtype))
    if linear.bias is not None:
        yield stem + "bias", cast(Tensor, linear.bias).to(dtype)


@torch.no_grad()
def _merged_weight(linear: nn.Module) -> Tensor:
    if not any(hasattr(p, "full_tensor") for p in linear.parameters()):
        return cast(Tensor, linear.weight)
    assert isinstance(linear, LoRALinear)  # what is quantized is never sharded
    plain = nn.Linear(linear.in_features, linear.out_features, bias=linear.bias is not None, device="meta")
    gathered = LoRALinear(plain, linear.parts, dora=linear.dora)
    gathered.load_state_dict({name: whole(tensor) for name, tensor in linear.state_dict().items()}, assign=True)
    return gathered.weight
