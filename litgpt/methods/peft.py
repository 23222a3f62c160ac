"""LoRA between our model and PEFT's files, through the weight equations of the family.

Where Hugging Face keeps our rows apart (q, k, v), each tensor gets the A and B of its rows; where it lays them together
(GPT-NeoX, Falcon, Phi-3), the A of all parts are stacked and their B stand block by block, with a rank of its own. What
comes from PEFT takes the same way back: parts of a linear are rows, whoever chose them.

Experts are one parameter of three dimensions in `transformers`: their LoRA goes by `target_parameters`.
Knows names and tensors, no files; `peft` itself is not needed.
"""

from __future__ import annotations

import math
import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from litgpt import families, weights
from litgpt.config import Config
from litgpt.errors import InputError, shown
from litgpt.methods import base
from litgpt.methods.base import whole
from litgpt.methods.lora import LoRA, LoRALinear, Part
from litgpt.model import GPT, Router, concat_to_grouped, grouped_to_concat
from litgpt.weights import Binding, Shapes

PREFIX = "base_model.model."
WEIGHT = ".weight"
# as files name them, and as the model of `transformers` in memory does, whose names PEFT uses
IN_MEMORY = (("embed_out", "lm_head"), (".block_sparse_moe.", ".mlp."))
GATE_UP, DOWN = "experts.gate_up_proj", "experts.down_proj"
# linears with these names are taken for experts by PEFT where the model has any: it reaches them as parameters only
EXPERT_NAMES = ("gate_proj", "up_proj", "down_proj")
EMBEDDINGS = ("lm_head", "embed_tokens", "embed_in", "word_embeddings")


class Inexpressible(Exception):
    """PEFT has no way to say this; the reason."""


class Adapted(NamedTuple):
    """One linear, ours or theirs, with its matrices."""

    stem: str
    a: Tensor  # (r, in)
    b: Tensor  # (out, r)
    scale: float
    magnitude: Tensor | None = None  # (out,), of DoRA


def _weight_bindings(config: Config) -> tuple[list[Binding], Shapes]:
    """The equations of all weights, with the shapes of ours; a tied head is a linear like others to who adapts it."""
    untied = replace(config, tie_embeddings=False)
    shapes = weights.expected(untied)
    return [b for b in weights.bindings(untied, shapes) if b.ours[0].endswith(WEIGHT)], shapes


def _stems(names: Iterable[str]) -> list[str]:
    return [name.removesuffix(WEIGHT) for name in names]


def _in_memory(stem: str) -> str:
    for stored, held in IN_MEMORY:
        stem = stem.replace(stored, held)
    return stem


# ------------------------------------------------------------------------------------------------------ ours to theirs


def export(model: GPT, method: LoRA, base_model: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The content of `adapter_config.json` and the tensors of `adapter_model.safetensors`.

    Of a sharded model, every rank calls it. Raises Inexpressible.
    """
    if not model.config.family:
        raise Inexpressible("no family of Hugging Face has this mix of switches")
    wrapped = {name for name, module in model.named_modules() if isinstance(module, LoRALinear)}
    bindings, shapes = _weight_bindings(model.config)
    found: list[Adapted] = []
    for binding in bindings:
        stems = _stems(binding.ours)
        if wrapped.issuperset(stems) and not any(".experts." in stem for stem in stems):
            found += _split(binding, [_joined(model, stem) for stem in stems], shapes, model.config)
    found += _stacked_experts(model)
    if method.dora and any(_is_parameter(adapted.stem, model.config) for adapted in found):
        raise Inexpressible("it has no DoRA for models with experts, but on their attention and head")
    tensors = {f"{PREFIX}{adapted.stem}.{name}": t for adapted in found for name, t in _tensors(adapted)}
    return _description(found, method, model.config) | {"base_model_name_or_path": base_model}, tensors


class Joined(NamedTuple):
    """All parts of one of our linears as one pair of matrices."""

    a: Tensor  # (R, in)
    b: Tensor  # (out, R), a block for each part
    used: Tensor  # (out, R) bool: the blocks
    scale: float
    magnitude: Tensor | None  # (out,)


def _joined(model: GPT, stem: str) -> Joined:
    linear = cast(LoRALinear, model.get_submodule(stem))
    scale, ranks = linear.parts[0].scale, [part.r for part in linear.parts]
    b = torch.zeros(linear.out_features, sum(ranks))
    used = torch.zeros_like(b, dtype=torch.bool)
    magnitude = None
    if linear.dora:  # rows that are not adapted have the length of the base's
        magnitude = whole(cast(Tensor, linear.base.weight)).detach().float().norm(dim=1).cpu()
    column = 0
    for part in linear.parts:
        place = slice(part.start, part.stop), slice(column, column + part.r)
        b[place] = _loaded(linear.lora_B[part.name]) * (part.scale / scale)
        used[place] = True
        if magnitude is not None:
            magnitude[part.start : part.stop] = _loaded(linear.lora_magnitude[part.name])
        column += part.r
    a = torch.cat([_loaded(linear.lora_A[part.name]) for part in linear.parts])
    return Joined(a, b, used, scale, magnitude)


def _loaded(parameter: Tensor) -> Tensor:
    return whole(parameter).detach().float().cpu()


def _split(binding: Binding, ours: list[Joined], shapes: Shapes, config: Config) -> Iterator[Adapted]:
    """Ours laid end to end and cut into theirs: of each the rows of B, and those columns alone that it uses."""

    def cut(tensor: Tensor) -> tuple[Tensor, ...]:
        return (concat_to_grouped(tensor, config) if binding.layout else tensor).split(rows)

    rows = weights.rows_of(binding, shapes, config)
    a, b = torch.cat([o.a for o in ours]), torch.block_diag(*(o.b for o in ours))
    used = torch.block_diag(*(o.used for o in ours))
    lengths = [o.magnitude for o in ours if o.magnitude is not None]
    magnitudes: Iterable[Tensor | None] = cut(torch.cat(lengths)) if lengths else [None] * len(rows)
    for stem, up, mark, length in zip(_stems(binding.theirs), cut(b), cut(used), magnitudes, strict=True):
        columns = mark.any(dim=0)
        if bool(columns.any()):
            yield Adapted(_in_memory(stem), a[columns], up[:, columns], ours[0].scale, length)


def _stacked_experts(model: GPT) -> Iterator[Adapted]:
    """The experts of each layer: gate and up beside each other, all experts in one pair of matrices."""
    for layer, block in enumerate(model.blocks):
        experts = getattr(block.mlp, "experts", ())
        if not experts or not isinstance(experts[0].fc_1, LoRALinear):
            continue
        stem = f"transformer.h.{layer}.mlp.experts.{{}}.{{}}"
        each = [[_joined(model, stem.format(e, n)) for n in ("fc_1", "fc_2", "proj")] for e in range(len(experts))]
        place, scale = f"model.layers.{layer}.mlp.experts", each[0][0].scale
        gate_up_b = [torch.block_diag(gate.b, up.b) for gate, up, _ in each]
        gate_up_a = [torch.cat((gate.a, up.a)) for gate, up, _ in each]
        # the first parameter that PEFT wraps lies innermost
        yield Adapted(f"{place}.base_layer", torch.cat(gate_up_a), _rank_by_expert(gate_up_b), scale)
        yield Adapted(place, torch.cat([d.a for *_, d in each]), _rank_by_expert([d.b for *_, d in each]), scale)


def _rank_by_expert(b: list[Tensor]) -> Tensor:
    """(out, r) of each of E experts -> (out, r * E), an expert's columns E apart."""
    return torch.stack(b, dim=-1).flatten(1)


def _tensors(adapted: Adapted) -> Iterator[tuple[str, Tensor]]:
    yield "lora_A.weight", adapted.a.contiguous()
    yield "lora_B.weight", adapted.b.contiguous()
    if adapted.magnitude is not None:
        yield "lora_magnitude_vector", adapted.magnitude.contiguous()


def _is_parameter(stem: str, config: Config) -> bool:
    """Whether PEFT reaches this linear as a parameter only."""
    return bool(config.n_expert) and (".experts" in stem or stem.rpartition(".")[2] in EXPERT_NAMES)


def _target(stem: str, config: Config) -> str:
    """What the stems of one kind are called in PEFT's lists."""
    if stem.endswith(".experts.base_layer"):
        return GATE_UP
    if stem.endswith(".experts"):
        return DOWN
    if _is_parameter(stem, config):
        return ".".join(stem.split(".")[-2:]) + WEIGHT
    return stem.rpartition(".")[2]


def _description(found: list[Adapted], method: LoRA, config: Config) -> dict[str, Any]:
    ranks = {_target(adapted.stem, config): len(adapted.a) for adapted in found}
    for target in (GATE_UP, DOWN):
        if target in ranks:
            ranks[target] //= config.n_expert
    parameters = sorted({_target(a.stem, config) for a in found if _is_parameter(a.stem, config)})
    usual = Counter(ranks.values()).most_common(1)[0][0]
    scale = found[0].scale
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": usual,
        "lora_alpha": _alpha(scale, usual, method.rslora),
        "rank_pattern": {target: r for target, r in ranks.items() if r != usual},
        "alpha_pattern": {t: _alpha(scale, r, method.rslora) for t, r in ranks.items() if r != usual},
        "lora_dropout": 0.0 if parameters else method.dropout,  # PEFT knows none on parameters
        "target_modules": sorted(set(ranks) - set(parameters)),
        **({"target_parameters": parameters} if parameters else {}),
        "use_rslora": method.rslora,
        "use_dora": method.dora,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "modules_to_save": None,
    }


def _alpha(scale: float, r: int, rslora: bool) -> float:
    """The alpha that makes `scale` of this rank, whole where it is."""
    alpha = round(scale * (math.sqrt(r) if rslora else r), 10)
    return int(alpha) if alpha == int(alpha) else alpha


# ------------------------------------------------------------------------------------------------------ theirs to ours

# what changes the base, or adds what we do not have, wherever it is set
_REFUSED = {
    "modules_to_save": "whole modules that were trained beside the adapter",
    "trainable_token_indices": "trained tokens",
    "layer_replication": "replicated layers",
    "lora_bias": "biases on the B matrices",
    "fan_in_fan_out": "weights stored the other way round",
    "alora_invocation_tokens": "activated LoRA",
    "use_qalora": "QA-LoRA",
    "use_bdlora": "block-diagonal LoRA",
    "arrow_config": "Arrow routing",
    "kasa_config": "KaSA",
    "velora_config": "VeLoRA",
    "monteclora_config": "MonteCLoRA",
}
_PLAIN_INITS = (True, False, "gaussian", "eva", "orthogonal")  # others change the base's weights


def require_readable(config: Mapping[str, Any], where: object) -> None:
    """Refuse, by name, what is not LoRA as we know it."""
    kind = config.get("peft_type")
    if kind != "LORA":
        raise InputError(f"{where}: peft_type is {shown(kind)}, LitGPT reads LORA; merge it with peft first")
    for name, meaning in _REFUSED.items():
        if config.get(name):
            raise InputError(
                f"{where}: {name} is {shown(config[name])}: {meaning}, which LitGPT does not read; merge it with peft "
                "first (merge_and_unload)"
            )
    if config.get("bias", "none") != "none":
        raise InputError(f"{where}: bias is {shown(config['bias'])}, must be none; merge it with peft first")
    for name, alpha in {"lora_alpha": config.get("lora_alpha", 8), **_alphas(config, where)}.items():
        if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not abs(alpha) <= sys.float_info.max:
            raise InputError(f"{where}: {shown(name)} is {shown(alpha)}, must be a number; copy the adapter again")
    init = config.get("init_lora_weights", True)
    if init not in _PLAIN_INITS:
        raise InputError(
            f"{where}: init_lora_weights is {shown(init)}, which changes the base model's weights; merge it with peft "
            "first, or convert it to plain LoRA as peft's documentation shows"
        )


def _alphas(config: Mapping[str, Any], where: object) -> Mapping[str, Any]:
    """Patterns of modules' names that have an alpha of their own."""
    patterns = config.get("alpha_pattern") or {}
    try:
        for pattern, _ in patterns.items():
            re.compile(pattern)
    except (AttributeError, TypeError, re.error, RecursionError):
        raise InputError(f"{where}: alpha_pattern is {shown(patterns)}, must map patterns to numbers") from None
    return cast(Mapping[str, Any], patterns)


def attach(model: GPT, config: Mapping[str, Any], tensors: Mapping[str, Tensor], where: object) -> None:
    """Wrap the linears that an adapter of PEFT adapts; nothing trains. Raises InputError that names what does not fit.

    An adapted router is changed itself: it is no linear of ours, and small.
    """
    require_readable(config, where)
    if not tensors:
        raise InputError(f"{where}: holds no tensor, so nothing that was learned; copy the adapter again")
    base.freeze(model)
    own = {name: tensor for name, tensor in tensors.items() if not _is_copy(name, tensor, model)}
    theirs = {adapted.stem: adapted for adapted in _read(config, own, model.config, where)}
    routers = {
        f"model.layers.{n}.mlp.gate": block.mlp.gate
        for n, block in enumerate(cast(Any, model.blocks))
        if _routes(block)
    }
    for stem in [stem for stem in theirs if stem in routers]:
        fold(cast(Router, routers[stem]), theirs.pop(stem), where)
    bindings, shapes = _weight_bindings(model.config)
    for binding in bindings:
        present = [(n, theirs.pop(_in_memory(stem), None)) for n, stem in enumerate(_stems(binding.theirs))]
        if any(adapted is not None for _, adapted in present):
            _wrap(model, binding, [adapted for _, adapted in present], shapes, where)
    if theirs:
        names = ", ".join(list(theirs)[:3]) + (f" and {len(theirs) - 3} more" if len(theirs) > 3 else "")
        raise InputError(f"{where}: the base model has no linears {names}; is it the adapter of another model?")


def _is_copy(name: str, tensor: Tensor, model: GPT) -> bool:
    """Whether it is a copy of the base's embedding or head, which PEFT adds where the head is adapted."""
    stem, _, kind = _in_memory(name.removeprefix(PREFIX)).rpartition(".")
    leaf = stem.removesuffix(".base_layer").rpartition(".")[2]
    if leaf not in EMBEDDINGS:
        return False
    own = model.lm_head if leaf == "lm_head" else model.wte
    there = getattr(own, kind, None)
    return (
        isinstance(there, Tensor) and there.shape == tensor.shape and torch.equal(there.cpu(), tensor.to(there.dtype))
    )


def _routes(block: nn.Module) -> bool:
    return isinstance(getattr(cast(Any, block).mlp, "gate", None), Router)


@torch.no_grad()
def fold(router: Router, adapted: Adapted, where: object) -> None:
    """Add what was learned to the weight of a router."""
    weight = router.weight
    if adapted.a.size(1) != weight.size(1) or len(adapted.b) != len(weight) or adapted.magnitude is not None:
        raise InputError(f"{where}: {adapted.stem} does not fit the base model's router {tuple(weight.shape)}")
    delta = (adapted.b.float() @ adapted.a.float()).to(weight.device) * adapted.scale
    router.weight = nn.Parameter((weight.float() + delta).to(weight.dtype), requires_grad=False)


def _read(config: Mapping[str, Any], tensors: Mapping[str, Tensor], ours: Config, where: object) -> Iterator[Adapted]:
    """Every adapted linear of theirs; of stacked experts each by itself."""
    pattern = re.compile(r"(.+)\.(lora_A|lora_B|lora_magnitude_vector)(\.default)?(\.weight)?")
    prefixes = families.family(ours.family).prefixes if ours.family else ()
    found: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        match = pattern.fullmatch(name.removeprefix(PREFIX))
        if match is None or not tensor.is_floating_point():
            raise InputError(f"{where}: tensor {shown(name)} is no part of a LoRA on linears; merge it with peft first")
        found.setdefault(match[1], {})[match[2]] = tensor.float()
    for stem, parts in found.items():
        if not {"lora_A", "lora_B"} <= parts.keys() or any(t.dim() != 2 for n, t in parts.items() if n[5:] in "AB"):
            raise InputError(f"{where}: {stem} has no whole pair of matrices lora_A and lora_B; copy the adapter again")
        yield from _one_or_experts(stem, parts, config, prefixes, ours, where)


def _one_or_experts(
    stem: str,
    parts: Mapping[str, Tensor],
    config: Mapping[str, Any],
    prefixes: Iterable[tuple[str, str]],
    ours: Config,
    where: object,
) -> Iterator[Adapted]:
    a, b = parts["lora_A"], parts["lora_B"]
    name = next((new + stem[len(old) :] for old, new in prefixes if stem.startswith(old)), stem)
    match = re.fullmatch(r"(.+\.experts)(\.base_layer)?", name)
    if match is None:
        if a.size(0) != b.size(1):
            raise InputError(f"{where}: {stem} has matrices of ranks {a.size(0)} and {b.size(1)}; copy it again")
        scale = _scale(config, stem, a.size(0))
        yield Adapted(_in_memory(name), a, b, scale, parts.get("lora_magnitude_vector"))
        return
    kinds = [str(target).rpartition(".")[2] for target in config.get("target_parameters") or []]
    both = {"gate_up_proj", "down_proj"} <= set(kinds)
    is_gate_up = bool(match[2]) if both else "gate_up_proj" in kinds
    if not ours.n_expert or a.size(0) % ours.n_expert or a.size(0) != b.size(1):
        raise InputError(f"{where}: {stem} does not fit the {ours.n_expert} experts of the base model")
    scale = _scale(config, f"{match[1]}.{'gate_up_proj' if is_gate_up else 'down_proj'}", a.size(0) // ours.n_expert)
    place = _in_memory(match[1])
    names = EXPERT_NAMES if ours.family != "mixtral" else ("w1", "w3", "w2")
    for e, (own_a, own_b) in enumerate(
        zip(a.chunk(ours.n_expert), b.unflatten(1, (-1, ours.n_expert)).unbind(-1), strict=True)
    ):
        if is_gate_up:
            for leaf, half in zip(names[:2], own_b.chunk(2), strict=True):
                yield Adapted(f"{place}.{e}.{leaf}", own_a, half, scale)
        else:
            yield Adapted(f"{place}.{e}.{names[2]}", own_a, own_b, scale)


def _scale(config: Mapping[str, Any], key: str, r: int) -> float:
    """alpha / r, where a pattern may give this module an alpha of its own."""
    pattern: Mapping[str, float] = config.get("alpha_pattern") or {}
    own = (alpha for name, alpha in pattern.items() if re.match(rf"(.*\.)?({name})$", key))
    alpha = next(own, config.get("lora_alpha", 8))
    return alpha / (math.sqrt(r) if config.get("use_rslora") else r)


_QKV = ("query", "key", "value")


def _wrap(model: GPT, binding: Binding, theirs: list[Adapted | None], shapes: Shapes, where: object) -> None:
    """Theirs laid end to end and cut into ours: each piece of rows becomes a part."""
    rows = weights.rows_of(binding, shapes, model.config)
    starts = [sum(rows[:n]) for n in range(len(rows))]
    at = 0
    for name, stem in zip(binding.ours, _stems(binding.ours), strict=True):
        n_out, n_in = shapes[name]
        pieces: list[tuple[Part, Adapted]] = []
        for n, (adapted, start, count) in enumerate(zip(theirs, starts, rows, strict=True)):
            low, high = max(start, at), min(start + count, at + n_out)
            if adapted is None or low >= high:
                continue
            _require_fit(adapted, n_in, count, where)
            label = _QKV[n] if len(rows) == len(_QKV) else f"part{n}" if len(rows) > 1 else "all"
            part = Part(label, low - at, high - at, adapted.a.size(0), adapted.scale)
            pieces.append((part, _rows(_ordered(adapted, binding, model.config), low - start, high - start)))
        at += n_out
        if pieces:
            base.replace(model, stem, _wrapped(model.get_submodule(stem), pieces))


def _require_fit(adapted: Adapted, n_in: int, n_out: int, where: object) -> None:
    found = (len(adapted.b), adapted.a.size(1))
    lengths = adapted.magnitude
    if found != (n_out, n_in) or (lengths is not None and lengths.numel() != n_out):
        raise InputError(
            f"{where}: {adapted.stem} adapts a linear of {found}, the base model's is {(n_out, n_in)}; is it the "
            "adapter of another model?"
        )


def _ordered(adapted: Adapted, binding: Binding, config: Config) -> Adapted:
    """With the rows as ours lie."""
    if not binding.layout:
        return adapted
    magnitude = adapted.magnitude
    return adapted._replace(
        b=grouped_to_concat(adapted.b, config),
        magnitude=None if magnitude is None else grouped_to_concat(magnitude.flatten(), config),
    )


def _rows(adapted: Adapted, start: int, stop: int) -> Adapted:
    magnitude = adapted.magnitude
    return adapted._replace(
        b=adapted.b[start:stop], magnitude=None if magnitude is None else magnitude.flatten()[start:stop]
    )


@torch.no_grad()
def _wrapped(linear: nn.Module, pieces: list[tuple[Part, Adapted]]) -> LoRALinear:
    dora = any(adapted.magnitude is not None for _, adapted in pieces)
    wrapped = LoRALinear(linear, [part for part, _ in pieces], dora=dora).requires_grad_(False)
    for part, adapted in pieces:
        wrapped.lora_A[part.name].copy_(adapted.a)
        wrapped.lora_B[part.name].copy_(adapted.b)
        if dora:
            assert adapted.magnitude is not None  # one setting for all of a file
            wrapped.lora_magnitude[part.name].copy_(adapted.magnitude)
    return wrapped
