"""The words that families are written in: rows of sizes, keys of `config.json`, weight equations, rope scalings.

Knows no family, no `Config` and no torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

from litgpt.errors import InputError, shown

Fields = Mapping[str, Any]  # Config fields by name
Hf = Mapping[str, Any]  # a parsed config.json


@dataclass(frozen=True)
class Equation:
    """Our tensors, laid end to end along dim 0, are the Hugging Face tensors, laid end to end.

    Stems go without `.weight` and `.bias` (both follow, where our model has them) unless `exact`.
    `{l}` is the layer, `{e}` the expert. An equation holds for those (l, e) for which our model has the tensor.
    """

    ours: tuple[str, ...]
    theirs: tuple[str, ...]
    layout: str = ""  # "grouped_qkv": their rows come per query group, [its q heads, k, v]; model.py owns the op
    exact: bool = False


def eq(ours: str | tuple[str, ...], theirs: str | tuple[str, ...], layout: str = "", exact: bool = False) -> Equation:
    return Equation(_tuple(ours), _tuple(theirs), layout, exact)


def block(
    ours: str | tuple[str, ...],
    theirs: str | tuple[str, ...],
    layout: str = "",
    exact: bool = False,
    under: str = "model.layers.{l}.",
) -> Equation:
    """An equation inside a transformer block: both sides get the prefix of a layer."""
    return eq(
        tuple("transformer.h.{l}." + stem for stem in _tuple(ours)),
        tuple(under + stem for stem in _tuple(theirs)),
        layout,
        exact,
    )


def _tuple(stems: str | tuple[str, ...]) -> tuple[str, ...]:
    return (stems,) if isinstance(stems, str) else stems


IGNORED = ("*.rotary_emb.inv_freq", "*.attention.bias", "*.attention.masked_bias", "model.rotary_emb.*")


@dataclass(frozen=True)
class Family:
    """Everything that is true of one Hugging Face model type."""

    name: str
    model_type: str
    architecture: str
    from_hf: Callable[[Hf], dict[str, Any]]  # config.json -> Config fields beyond the traits
    to_hf: Callable[[Fields], dict[str, Any]]  # Config fields -> config.json, beyond model_type and architectures
    equations: Callable[[Fields], tuple[Equation, ...]]
    traits: Mapping[str, Any] = field(default_factory=dict)  # Config fields that all models of the family share
    aliases: tuple[str, ...] = ()  # other model_type spellings
    ignored: tuple[str, ...] = IGNORED  # patterns of Hugging Face tensors that hold no weight of ours
    prefixes: tuple[tuple[str, str], ...] = ()  # (as in some files, as in the equations)
    rows: tuple[Mapping[str, Any], ...] = ()
    prompt: str | None = None


# --- rows ------------------------------------------------------------------------------------------------------------


SHAPE = ("n_layer", "n_embd", "n_head", "n_query_groups", "intermediate_size")


def size(
    name: str, shape: tuple[int, ...], *variants: str, hf_name: str | None = None, **fields: Any
) -> list[dict[str, Any]]:
    """One row, or one per variant: `{}` in `name` and `hf_name` takes each in turn. `shape`: see SHAPE."""
    on_hub = hf_name or name
    columns = dict(zip(SHAPE, shape, strict=True))
    return [
        {"name": name.format(variant), "hf_config": {"name": on_hub.format(variant)}, **columns, **fields}
        for variant in variants or ("",)
    ]


def group(
    org: str, shared: Fields, *sizes: Iterable[Fields], prompts: Mapping[str, str] | None = None
) -> Iterator[dict[str, Any]]:
    """Rows that share an organisation and fields; `prompts` maps a pattern of names to a prompt style."""
    for row in (row for rows in sizes for row in rows):
        fields = {**shared, **row}
        hf_config = {"org": fields.pop("org", org), **fields["hf_config"]}
        styles = [style for pattern, style in (prompts or {}).items() if fnmatchcase(fields["name"], pattern)]
        yield {**fields, "hf_config": hf_config, **({"prompt": styles[0]} if styles else {})}


def with_traits(traits: Fields, *groups: Iterable[Fields]) -> tuple[Fields, ...]:
    return tuple(_underived({**traits, **row}) for rows in groups for row in rows)


def _underived(row: dict[str, Any]) -> Fields:
    """Without the sizes that `Config` derives, so that they follow when a user overrides n_embd or n_head."""
    derived = {"n_query_groups": row["n_head"], "head_size": row["n_embd"] / row["n_head"]}
    if row["mlp_class_name"] == "GptNeoxMLP":
        derived["intermediate_size"] = 4 * row["n_embd"]
    return {name: found for name, found in row.items() if name not in derived or found != derived[name]}


def repeat(pattern: list[int], n_layer: int) -> list[int]:
    """The pattern over the layers, cut at the last: `repeat([1, 0], 3) == [1, 0, 1]`."""
    return [pattern[layer % len(pattern)] for layer in range(n_layer)]


# --- keys of config.json ---------------------------------------------------------------------------------------------

REQUIRED: Any = object()


@dataclass(frozen=True)
class Key:
    """One key of `config.json` beside one field of ours."""

    theirs: str
    ours: str
    kind: type = int
    default: Any = REQUIRED  # what `transformers` takes when the key is absent; None: ours is derived
    older: tuple[str, ...] = ()  # former spellings


MOST_LAYERS = 10_000  # per-layer lists are made from it: a slip of the pen must not fill the memory


def read(hf: Hf, keys: Iterable[Key]) -> dict[str, Any]:
    fields = {key.ours: value(hf, key.theirs, key.kind, key.default, key.older) for key in keys}
    if fields.get("n_layer", 1) > MOST_LAYERS:
        raise InputError(f"num_hidden_layers is {fields['n_layer']}, must be at most {MOST_LAYERS}")
    return fields


def write(fields: Fields, keys: Iterable[Key]) -> dict[str, Any]:
    # transformers insists on 8.0 for a float
    return {key.theirs: real(fields[key.ours]) if key.kind is float else fields[key.ours] for key in keys}


def real(number: float | None) -> float | None:
    return None if number is None else float(number)


def whole(number: float) -> float:
    """An int where the number is one: 1e6 is 1000000, as a user would write a rope base."""
    return int(number) if number == int(number) else number


def value(hf: Hf, name: str, kind: type, default: Any = REQUIRED, older: tuple[str, ...] = ()) -> Any:
    """The value of a key, checked; null counts as absent."""
    found = next((hf[spelling] for spelling in (name, *older) if hf.get(spelling) is not None), None)
    if found is None:
        if default is REQUIRED:
            raise InputError(f"{name} is missing")
        return default
    return number(name, found, kind) if kind in (int, float) else instance(name, found, kind)


def nullable(hf: Hf, name: str, kind: type, absent: Any = None) -> Any:
    """The value of a key whose null says "off", which is not what its absence says."""
    return value(hf, name, kind, None) if name in hf else absent


def number(name: str, found: Any, kind: type) -> int | float:
    """A finite number; for kind `int` a whole one."""
    if isinstance(found, bool) or not isinstance(found, int | float) or not math.isfinite(found):
        raise InputError(f"{name} is {shown(found)}, must be a number")
    if kind is float:
        return found
    if found != int(found):
        raise InputError(f"{name} is {shown(found)}, must be an integer")
    return int(found)


_WORDS = {bool: "true or false", str: "a string", list: "a list", dict: "a mapping"}


def instance(name: str, found: Any, kind: type) -> Any:
    if not isinstance(found, kind):
        raise InputError(f"{name} is {shown(found)}, must be {_WORDS[kind]}")
    return found


def expect(hf: Hf, **allowed: Any) -> None:
    """Refuse, by name, a switch whose value our model does not have; absent and null mean the usual value."""
    for name, values in allowed.items():
        values = values if isinstance(values, tuple) else (values,)
        found = hf.get(name)
        if found is not None and found not in values:
            known = " or ".join(repr(v) for v in values)
            raise InputError(f"{name} is {shown(found)}, which LitGPT does not have (only {known})")


def biases(qkv: bool, proj: bool, mlp: bool) -> dict[str, Any]:
    """The bias switches of a block in the fewest fields: `bias` when they all agree."""
    if qkv == proj == mlp:
        return {"bias": qkv}
    return {"bias": False, "attn_bias": qkv, "attn_proj_bias": proj or None, "mlp_bias": mlp or None}


TANH_GELU = ("gelu_new", "gelu_fast", "gelu_pytorch_tanh")
GELU = ("gelu", *TANH_GELU)


def read_gelu(hf: Hf, name: str, default: str) -> dict[str, str]:
    expect(hf, **{name: GELU})
    return {"gelu_approximate": "tanh" if hf.get(name, default) in TANH_GELU else "none"}


def write_gelu(fields: Fields, name: str, tanh: str = "gelu_new") -> dict[str, str]:
    return {name: tanh if fields["gelu_approximate"] == "tanh" else "gelu"}


# --- windows per layer -----------------------------------------------------------------------------------------------

_LAYER_TYPES = {"full_attention": 0, "sliding_attention": 1}


def layer_pattern(hf: Hf, otherwise: list[int]) -> list[int]:
    """Per layer 1 = sliding, 0 = full: `layer_types` when the file has it, else the family's own rule."""
    types = value(hf, "layer_types", list, None)
    if types is None:
        return otherwise
    for kind in types:
        if kind not in _LAYER_TYPES:
            raise InputError(
                f"layer_types holds {shown(kind)}, which LitGPT does not have (only {', '.join(_LAYER_TYPES)})"
            )
    return [_LAYER_TYPES[kind] for kind in types]


def layer_types(indices: Iterable[int]) -> list[str]:
    return ["sliding_attention" if sliding else "full_attention" for sliding in indices]


# --- rope ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scaling:
    """One kind of frequency scaling: its keys in `rope_adjustments` beside those of `config.json`."""

    required: Mapping[str, str]
    optional: Mapping[str, str] = field(default_factory=dict)
    filled: Mapping[str, Any] = field(default_factory=dict)  # values that `transformers` takes for absent keys


_FACTOR = {"factor": "factor"}
_ORIGINAL = {"original_max_seq_len": "original_max_position_embeddings"}


def _same(*names: str) -> dict[str, str]:
    return {name: name for name in names}


SCALINGS = {
    "linear": Scaling(_FACTOR),
    "llama3": Scaling(_FACTOR | _same("low_freq_factor", "high_freq_factor") | _ORIGINAL),
    "yarn": Scaling(
        _FACTOR | _same("beta_fast", "beta_slow") | _ORIGINAL,
        _same("mscale", "mscale_all_dim", "attention_factor", "truncate"),
        {"beta_fast": 32, "beta_slow": 1},
    ),
    "longrope": Scaling(_same("short_factor", "long_factor") | _ORIGINAL, _same("factor", "attention_factor")),
}
# the keys that give a kind away
_MARKS = {"llama3": {"low_freq_factor", "high_freq_factor"}, "yarn": {"beta_fast", "beta_slow"}}
_MARKS["longrope"] = {"short_factor", "long_factor"}


def scaling_kind(adjustments: Fields) -> str:
    """Which kind a `rope_adjustments` mapping is; refuses mixed, missing and unknown keys by name."""
    kinds = [kind for kind, marks in _MARKS.items() if marks & set(adjustments)] or ["linear"]
    if len(kinds) > 1:
        raise InputError(f"rope_adjustments mixes the keys of {' and '.join(kinds)}, must be one kind")
    scaling = SCALINGS[kinds[0]]
    for name in scaling.required:
        if name not in adjustments:
            raise InputError(f"rope_adjustments of kind {kinds[0]} lacks {name}")
    for name in adjustments:
        if name not in {**scaling.required, **scaling.optional}:
            raise InputError(f"rope_adjustments has the unknown key {shown(name)} for kind {kinds[0]}")
    return kinds[0]


def read_rope(hf: Hf, layer_type: str = "full_attention", theta: float = 10000, partial: float = 1.0) -> dict[str, Any]:
    """`rope_base`, `rotary_percentage` and `rope_adjustments`, from the spelling before or since transformers 5.

    Before: rope_theta, partial_rotary_factor and rope_scaling side by side. Since: all in rope_parameters, once
    more by layer type where the types differ. `theta` and `partial` are the family's values for absent keys.
    """
    rope = _rope_mapping(hf, layer_type)
    outer = {name: hf[name] for name in ("rope_theta", "partial_rotary_factor") if hf.get(name) is not None}
    rope = {**outer, **{name: v for name, v in rope.items() if v is not None}}
    return {
        "rope_base": whole(value(rope, "rope_theta", float, theta)),
        "rotary_percentage": float(value(rope, "partial_rotary_factor", float, partial)),
        "rope_adjustments": _read_scaling(hf, rope),
    }


def _rope_mapping(hf: Hf, layer_type: str) -> Hf:
    rope = value(hf, "rope_scaling", dict, None) or value(hf, "rope_parameters", dict, {})
    if any(isinstance(inner, Mapping) for inner in rope.values()):
        rope = value(rope, layer_type, dict, {})
    return rope


def _read_scaling(hf: Hf, rope: Hf) -> dict[str, Any] | None:
    kind = value(rope, "rope_type", str, "default", older=("type",))
    if kind == "default":
        return None
    kind = "longrope" if "short_factor" in rope and kind in ("su", "yarn") else kind  # older names, Phi-3
    if kind not in SCALINGS:
        raise InputError(
            f"rope_type is {shown(kind)}, which LitGPT does not have (only default, {', '.join(SCALINGS)})"
        )
    scaling = SCALINGS[kind]
    original = "original_max_position_embeddings"
    trained = value(hf, original, int, rope.get(original) or hf.get("max_position_embeddings"))
    found = {**scaling.filled, **rope, original: trained}
    if kind == "longrope" and "factor" not in rope:
        # said once, so that another block_size does not change the scale of cos and sin
        found["factor"] = value(hf, "max_position_embeddings", int) / value(found, original, int)
    names = {**scaling.required, **scaling.optional}
    adjustments = {ours: _rope_value(found, theirs) for ours, theirs in names.items() if found.get(theirs) is not None}
    scaling_kind(adjustments)
    return adjustments


def _rope_value(rope: Hf, name: str) -> Any:
    if name in ("short_factor", "long_factor"):
        return [number(name, factor, float) for factor in value(rope, name, list)]
    return value(rope, name, bool if name == "truncate" else float)


def write_scaling(fields: Fields) -> dict[str, Any] | None:
    """`rope_scaling` of config.json. A condense ratio is written as the linear scaling that it equals."""
    adjustments = fields["rope_adjustments"]
    if not adjustments:
        ratio = fields["rope_condense_ratio"]
        return None if ratio == 1 else {"rope_type": "linear", "type": "linear", "factor": float(ratio)}
    kind = scaling_kind(adjustments)
    names = {**SCALINGS[kind].required, **SCALINGS[kind].optional}
    return {"rope_type": kind, "type": kind, **{names[ours]: found for ours, found in adjustments.items()}}


def write_rope(fields: Fields, partial: bool = False) -> dict[str, Any]:
    """The spelling before transformers 5: every reader of config.json knows it."""
    entries = {"rope_theta": float(fields["rope_base"]), "rope_scaling": write_scaling(fields)}
    return entries | ({"partial_rotary_factor": fields["rotary_percentage"]} if partial else {})
