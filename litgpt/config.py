"""`Config`: every switch of a model, checked; read from a name, a YAML file or a Hugging Face config.json, and written.

Knows no torch. What is true of one family only stands in `litgpt/families`.
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from litgpt import families
from litgpt.errors import InputError, InputTypeError, MissingError, near_miss, shown
from litgpt.families.tables import MOST_LAYERS, scaling_kind, value
from litgpt.storage import inside, read_json

CHOICES = {
    "norm_class_name": ("LayerNorm", "RMSNorm"),
    "norm_qk_type": ("default", "olmo2"),
    "mlp_class_name": ("GptNeoxMLP", "LLaMAMLP", "GemmaMLP", "LLaMAMoE"),
    "gelu_approximate": ("none", "tanh"),
}
MAY_BE_ZERO = ("n_expert", "n_expert_per_token", "first_k_dense_replace", "n_shared_expert", "rotary_percentage")
LARGEST = {"int": 2**40, "float": 1e15}  # beyond what any model has, and still exact in a float64
LATENT_SIZES = ("q_lora_rank", "kv_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim")
# fields that two descriptions of one model may differ in
NAMING = ("name", "hf_config", "family", "vocab_size", "padding_multiple")
# fields that the sizes of the weights depend on
SHAPES = (
    "n_layer",
    "n_embd",
    "n_head",
    "n_query_groups",
    "head_size",
    "intermediate_size",
    "moe_intermediate_size",
    "n_expert",
    "padded_vocab_size",
    "latent_attention",
)


@dataclass
class Config:
    """A model's switches. The fields are the keys of `model_config.yaml`; `None` means derived or not used."""

    name: str = ""
    hf_config: dict[str, Any] = field(default_factory=dict)  # on the hub: org and name
    family: str = ""  # which Hugging Face family writes it; derived from the switches
    # sizes
    block_size: int = 4096  # longest sequence
    n_layer: int = 16
    n_embd: int = 4096
    vocab_size: int = 50254  # real tokens
    padding_multiple: int = 512
    padded_vocab_size: int | None = None  # rows of wte and lm_head
    # blocks and norms
    norm_class_name: str = "LayerNorm"
    norm_eps: float = 1e-5
    norm_unit_offset: bool = False  # RMSNorm multiplies by (1 + weight)
    norm_affine: bool = True  # False: LayerNorm without weight and bias
    norm_bias: bool = True  # False: LayerNorm without bias
    norm_qk: bool = False
    norm_qk_type: str = "default"  # default: per head; olmo2: the whole projection. Both before rope
    post_attention_norm: bool = False  # on the attention output, before the residual sum
    post_mlp_norm: bool = False
    parallel_residual: bool = True  # x + attn(norm_1(x)) + mlp(norm_2(x))
    shared_attention_norm: bool = False  # with parallel_residual: the mlp reads norm_1(x) too
    # attention
    n_head: int = 32
    head_size: int | None = None
    n_query_groups: int | None = None  # key/value heads
    attn_bias: bool = False  # bias on qkv even if `bias` is off
    attn_proj_bias: bool | None = None  # bias on the output projection; None: as `bias`
    attention_scores_scalar: float | None = None  # scores are divided by its root; None: head_size
    sliding_window_size: int | None = None  # the query's own position included
    sliding_window_indices: list[int] | None = None  # per layer 1 = sliding, 0 = full
    attention_logit_softcapping: float | None = None
    clip_qkv: float | None = None  # q, k and v are clamped to [-clip_qkv, clip_qkv]
    # rope
    rope_base: float = 10000
    rotary_percentage: float = 0.25  # share of a head that is rotated
    rope_condense_ratio: float = 1  # positions are divided by it
    rope_adjustments: dict[str, Any] | None = None  # frequency scaling: families/tables.py has the kinds
    rope_interleave: bool = False  # rotated pairs are (0, 1), (2, 3), ... in the weights
    # mlp
    intermediate_size: int | None = None
    moe_intermediate_size: int | None = None  # width of one expert; None: intermediate_size
    bias: bool = True  # on qkv, attention output and mlp linears
    mlp_bias: bool | None = None  # bias on the mlp linears; None: as `bias`
    mlp_class_name: str = "GptNeoxMLP"
    gelu_approximate: str = "none"
    n_expert: int = 0
    n_shared_expert: int | None = None  # one always-on expert, this many times as wide
    n_expert_groups: int | None = None  # set: sigmoid router in groups with correction bias; None: softmax router
    n_topk_groups: int | None = None
    n_topk_scores_per_group: int | None = None
    n_expert_per_token: int = 0
    first_k_dense_replace: int | None = None  # the first k layers have a dense LLaMAMLP
    routed_scaling_factor: float = 1.0
    norm_topk_prob: bool = False  # sigmoid router: chosen scores are divided by their sum
    softmax_topk_norm: bool = True  # softmax router: likewise
    # before and after the blocks
    scale_embeddings: bool = False  # embeddings times sqrt(n_embd)
    tie_embeddings: bool = False  # lm_head.weight is wte.weight
    lm_head_bias: bool = False
    final_logit_softcapping: float | None = None
    norm_1: bool = True
    norm_2: bool = True
    # latent attention, local rope
    latent_attention: dict[str, Any] | None = None
    latent_norm_eps: float | None = None  # of the two inner norms; None: norm_eps
    rope_local_base_freq: float | None = None  # rope base of local layers, never scaled
    rope_indices: list[int] | None = None  # per layer 1 = rope_local_base_freq, 0 = rope_base

    def __post_init__(self) -> None:
        _check_fields(self)
        self.name = self.name or str(self.hf_config.get("name", ""))
        _derive_sizes(self)
        _check_attention(self)
        _check_rope(self)
        _check_mlp(self)
        if self.family:
            families.family(self.family)
        else:
            self.family = _infer_family(self)

    # --- derived, not saved --------------------------------------------------------------------------------------

    @property
    def rope_n_elem(self) -> int:
        """How many elements of a head are rotated."""
        if self.latent_attention:
            return int(self.latent_attention["qk_rope_head_dim"])
        n_elem = int(self.rotary_percentage * self._head_size)
        return 2 if n_elem == 1 else n_elem  # transformers rotates pairs, so one element takes its neighbour along

    @property
    def _head_size(self) -> int:
        assert self.head_size is not None  # derived in __post_init__
        return self.head_size

    def _latent(self, name: str) -> Any:
        return self.latent_attention[name] if self.latent_attention else None

    @property
    def q_lora_rank(self) -> int | None:
        return self._latent("q_lora_rank")

    @property
    def kv_lora_rank(self) -> int | None:
        return self._latent("kv_lora_rank")

    @property
    def qk_rope_head_dim(self) -> int | None:
        return self._latent("qk_rope_head_dim")

    @property
    def qk_nope_head_dim(self) -> int | None:
        return self._latent("qk_nope_head_dim")

    @property
    def v_head_dim(self) -> int | None:
        return self._latent("v_head_dim")

    @property
    def qk_head_dim(self) -> int | None:
        sizes = self.latent_attention
        return sizes["qk_rope_head_dim"] + sizes["qk_nope_head_dim"] if sizes else None

    @property
    def qkv_bias(self) -> bool:
        return self.bias or self.attn_bias

    @property
    def proj_bias(self) -> bool:
        return self.bias if self.attn_proj_bias is None else self.attn_proj_bias

    @property
    def has_mlp_bias(self) -> bool:
        return self.bias if self.mlp_bias is None else self.mlp_bias

    def is_moe_layer(self, layer: int) -> bool:
        return self.mlp_class_name == "LLaMAMoE" and layer >= (self.first_k_dense_replace or 0)

    def window(self, layer: int) -> int | None:
        """The window of a sliding layer, None for a full one."""
        slides = self.sliding_window_indices is not None and self.sliding_window_indices[layer] == 1
        return self.sliding_window_size if slides else None

    def uses_local_rope(self, layer: int) -> bool:
        return self.rope_indices is not None and self.rope_indices[layer] == 1

    # --- ways in -------------------------------------------------------------------------------------------------

    @classmethod
    def from_name(cls, name: str, **overrides: Any) -> Config:
        """A registered model, by registry name, hub name or `org/name`; overrides come before the derived rules."""
        family, row = families.by_name(name)
        _check_keys(overrides)
        fields = {k: v for k, v in row.items() if k in FIELDS} | overrides
        config = cls(**{"family": family.name, **_copied(fields)})
        if overrides and _written(config, family)[1]:
            config.family = _infer_family(config)  # the overrides made it another kind of model
        return config

    @classmethod
    def from_hf(cls, source: Mapping[str, Any] | str | Path, **overrides: Any) -> Config:
        """From a parsed config.json, its path, or the directory that holds it. Refuses what our model does not have."""
        where = "config.json" if isinstance(source, Mapping) else str(_config_json(Path(source)))
        hf = source if isinstance(source, Mapping) else _read_json(Path(where))
        _check_keys(overrides)
        with _said_of(where):
            fields, family = _fields_from_hf(hf)
            return cls(**{**fields, "family": family, "name": _hf_name(hf), **overrides})

    @classmethod
    def from_file(cls, path: str | Path, **overrides: Any) -> Config:
        """From a `model_config.yaml`, of this or an earlier LitGPT."""
        fields = _read_yaml(Path(path))
        with _said_of(str(path)):
            _check_keys({**fields, **overrides})
            config = cls(**{**_with_later_fields(_with_numbers(fields)), **overrides})
            if config.family and _written(config, families.family(config.family))[1]:
                config.family = _infer_family(config)  # the saved one cannot say every switch
            return config

    @classmethod
    def from_checkpoint(cls, directory: str | Path, **overrides: Any) -> Config:
        """From the config files of a checkpoint directory: config.json decides, model_config.yaml adds the name."""
        directory = Path(directory)
        hf, own, _ = (inside(directory, n) for n in ("config.json", "model_config.yaml", "generation_config.json"))
        if hf.is_file():
            beside = _from_beside(cls.from_hf(hf), own) if own.is_file() else {"name": directory.resolve().name}
            return cls.from_hf(hf, **{**beside, **overrides})
        if own.is_file():
            return cls.from_file(own, **overrides)
        if families.find(directory.name):
            return cls.from_name(directory.name, **overrides)
        raise MissingError(
            f"{directory}: has neither config.json nor model_config.yaml"
            f"{result_below(directory) or '; is it a checkpoint directory?'}"
        )

    # --- ways out ------------------------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """All fields, flat: the content of model_config.yaml."""
        return dataclasses.asdict(self)

    def to_hf(self) -> dict[str, Any]:
        """The content of config.json; a switch that the family's config.json cannot say is an error."""
        if not self.family:
            raise InputError(f"no Hugging Face family has this mix of switches{_obstacle(self)}")
        hf, lost = _written(self, families.family(self.family))
        if lost:
            raise InputError(f"config.json of family '{self.family}' cannot say {lost}")
        return hf

    def differences(self, other: Config) -> list[str]:
        """The fields in which the two describe different models, whatever they are called."""
        mine, others = _meaning(self), _meaning(other)
        return [name for name in mine if mine[name] != others[name]]


FIELDS = {f.name: f for f in dataclasses.fields(Config)}


# --- checks ----------------------------------------------------------------------------------------------------------


def _check_keys(fields: Mapping[str, Any]) -> None:
    for name in fields:
        if name not in FIELDS:
            raise InputError(f"{shown(name)} is not a field of Config{near_miss(str(name), FIELDS)}")


def _refuse(config: Config, name: str, must: str) -> InputError:
    return InputError(f"{name} is {shown(getattr(config, name))}, {must}")


_KINDS: dict[str, tuple[Any, str]] = {
    "int": (int, "an integer"),
    "float": ((int, float), "a number"),
    "bool": (bool, "true or false"),
    "str": (str, "a string"),
    "list[int]": (list, "a list of integers"),
    "dict[str, Any]": (dict, "a mapping"),
}


def _check_fields(config: Config) -> None:
    """Every field by its own: kind, sign, allowed words."""
    for name, spec in FIELDS.items():
        found: Any = getattr(config, name)
        kind, _, optional = str(spec.type).partition(" | ")
        if found is None and optional:
            continue
        types, words = _KINDS[kind]
        if kind == "int" and isinstance(found, float) and found.is_integer():
            found = int(found)
            setattr(config, name, found)
        if not isinstance(found, types) or (isinstance(found, bool) and kind != "bool"):
            raise InputTypeError(f"{name} is {shown(found)}, must be {words}")
        if kind in ("int", "float"):
            _check_number(config, name, found, kind, words)
        if name in CHOICES and found not in CHOICES[name]:
            raise _refuse(config, name, f"must be one of {', '.join(CHOICES[name])}{near_miss(found, CHOICES[name])}")


def _check_number(config: Config, name: str, found: float, kind: str, words: str) -> None:
    least_ok = found >= 0 if name in MAY_BE_ZERO else found > 0
    if not (least_ok and found < math.inf):
        sign = "zero or a positive" if name in MAY_BE_ZERO else "a positive"
        raise _refuse(config, name, f"must be {sign} {words.split()[-1]}")
    if found > LARGEST[kind]:
        raise _refuse(
            config, name, f"must be at most {LARGEST[kind]:g}" if kind == "float" else "must be at most 2**40"
        )


def _derive_sizes(config: Config) -> None:
    if config.n_layer > MOST_LAYERS:
        raise _refuse(config, "n_layer", f"must be at most {MOST_LAYERS}")
    if config.head_size is None:
        if config.n_embd % config.n_head:
            raise _refuse(config, "n_head", f"must divide n_embd {config.n_embd} (or give head_size)")
        config.head_size = config.n_embd // config.n_head
    if config.padded_vocab_size is None:
        multiple = config.padding_multiple
        config.padded_vocab_size = -(-config.vocab_size // multiple) * multiple
    else:
        config.vocab_size = min(config.vocab_size, config.padded_vocab_size)
    if config.intermediate_size is None:
        if config.mlp_class_name == "LLaMAMLP":
            raise _refuse(config, "intermediate_size", "must be given for LLaMAMLP")
        config.intermediate_size = 4 * config.n_embd


def _check_attention(config: Config) -> None:
    if config.n_query_groups is None:
        config.n_query_groups = config.n_head
    if config.n_head % config.n_query_groups:
        raise _refuse(config, "n_query_groups", f"must divide n_head {config.n_head}")
    if config.shared_attention_norm and not config.parallel_residual:
        raise _refuse(config, "shared_attention_norm", "needs parallel_residual")
    if config.sliding_window_size is not None or config.sliding_window_indices is not None:
        config.sliding_window_indices = _per_layer(config, "sliding_window_indices")
    if config.latent_attention is not None:
        _check_latent(config, config.latent_attention)


def _check_latent(config: Config, sizes: dict[str, Any]) -> None:
    if config.n_query_groups != config.n_head:
        raise _refuse(config, "n_query_groups", f"must be n_head {config.n_head} with latent_attention")
    for name in sizes:
        if name not in LATENT_SIZES:
            raise InputError(f"latent_attention has the unknown key {shown(name)}{near_miss(str(name), LATENT_SIZES)}")
    for name in LATENT_SIZES:
        size = sizes.setdefault(name, None) if name == "q_lora_rank" else sizes.get(name)
        absent_ok = size is None and name == "q_lora_rank"
        if not absent_ok and (not isinstance(size, int) or isinstance(size, bool) or not 1 <= size <= LARGEST["int"]):
            raise InputError(f"latent_attention: {name} is {shown(size)}, must be a positive integer")


def _per_layer(config: Config, name: str) -> list[int]:
    """A list of 0 and 1 for each layer: all 1 when absent, cut when longer."""
    found = getattr(config, name)
    if found is None:
        return [1] * config.n_layer
    if len(found) < config.n_layer:
        raise InputError(f"{name} has {len(found)} entries, must have one for each of n_layer {config.n_layer}")
    if any(entry not in (0, 1) for entry in found):
        raise _refuse(config, name, "must hold 0 and 1 only")
    return [int(entry) for entry in found[: config.n_layer]]


def _check_rope(config: Config) -> None:
    if config.rotary_percentage > 1:
        raise _refuse(config, "rotary_percentage", "must be at most 1")
    if config.rope_n_elem % 2:
        of = "qk_rope_head_dim" if config.latent_attention else f"rotary_percentage of head_size {config.head_size}"
        raise InputError(f"{of} rotates {config.rope_n_elem} elements of a head, must be an even number")
    if config.rope_local_base_freq is not None or config.rope_indices is not None:
        config.rope_indices = _per_layer(config, "rope_indices")
    if config.rope_adjustments is not None:
        _check_adjustments(config, config.rope_adjustments)


def _check_adjustments(config: Config, adjustments: dict[str, Any]) -> None:
    kind = scaling_kind(adjustments)
    for name, found in adjustments.items():
        if kind == "longrope" and name in ("short_factor", "long_factor"):
            if not isinstance(found, list) or not all(_is_positive(factor) for factor in found):
                raise InputError(f"rope_adjustments: {name} is {shown(found)}, must be a list of positive numbers")
            if len(found) != config.rope_n_elem // 2:
                wanted = config.rope_n_elem // 2
                raise InputError(f"rope_adjustments: {name} has {len(found)} entries, must have {wanted}")
        elif name == "truncate":
            if not isinstance(found, bool):
                raise InputError(f"rope_adjustments: truncate is {shown(found)}, must be true or false")
        elif not _is_positive(found):
            raise InputError(f"rope_adjustments: {name} is {shown(found)}, must be a positive number")


def _is_positive(found: Any) -> bool:
    return isinstance(found, int | float) and not isinstance(found, bool) and 0 < found <= LARGEST["float"]


def _check_mlp(config: Config) -> None:
    if config.mlp_class_name != "LLaMAMoE":
        if config.first_k_dense_replace is not None:
            raise _refuse(config, "first_k_dense_replace", "needs mlp_class_name LLaMAMoE")
        return
    if config.n_expert < 1:
        raise _refuse(config, "n_expert", "must be a positive integer for LLaMAMoE")
    if not 1 <= config.n_expert_per_token <= config.n_expert:
        raise _refuse(config, "n_expert_per_token", f"must be between 1 and n_expert {config.n_expert}")
    if config.n_expert_groups is not None:
        _check_expert_groups(config, config.n_expert_groups)


def _check_expert_groups(config: Config, groups: int) -> None:
    if config.n_expert % groups:
        raise _refuse(config, "n_expert_groups", f"must divide n_expert {config.n_expert}")
    per_group = config.n_expert // groups
    if groups == 1:  # nothing to choose between
        config.n_topk_groups = config.n_topk_groups or 1
        config.n_topk_scores_per_group = config.n_topk_scores_per_group or 1
    for name, most in (("n_topk_groups", groups), ("n_topk_scores_per_group", per_group)):
        if getattr(config, name) is None or getattr(config, name) > most:
            raise _refuse(config, name, f"must be between 1 and {most} with n_expert_groups {groups}")
    reachable = (config.n_topk_groups or groups) * per_group
    if config.n_expert_per_token > reachable:
        raise _refuse(config, "n_expert_per_token", f"must be at most {reachable}, the experts of n_topk_groups groups")


# --- reading ---------------------------------------------------------------------------------------------------------


@contextmanager
def _said_of(where: str) -> Iterator[None]:
    """Errors about what a file says name the file; there, a wrong type is a wrong value."""
    try:
        yield
    except (InputError, InputTypeError) as error:
        raise InputError(f"{where}: {error}") from error


def result_below(directory: Path) -> str:
    """`"; did you mean 'DIR/final'?"` where `directory` is that of a run, whose result lies in it; or ""."""
    found = [place.parent for name in ("config.json", "model_config.yaml") for place in directory.glob(f"*/{name}")]
    nearest = min(found, key=lambda place: (place.name != "final", place), default=None)
    return f"; did you mean '{nearest}'?" if nearest else ""


def _copied(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The lists and mappings of a row are shared: a config gets its own."""
    return {k: v.copy() if isinstance(v, list | dict) else v for k, v in fields.items()}


def _config_json(path: Path) -> Path:
    return path / "config.json" if path.is_dir() else path


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise MissingError(f"{path}: no such file; give a directory with a config.json")
    return read_json(path)


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise MissingError(f"{path}: no such file; give a model_config.yaml") from None
    except (RecursionError, ValueError, LookupError, AttributeError, TypeError) as error:  # what `!!bool q` raises, too
        raise InputError(f"{path}: is not YAML text: {error}") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        raise InputError(f"{path}{line}: is not valid YAML: {getattr(error, 'problem', None) or error}") from error
    if not isinstance(content, dict):
        found = "is empty" if content is None else f"holds a {type(content).__name__}"
        raise InputError(f"{path}: {found}, must be a mapping of Config fields such as n_layer: 16")
    return content


def _fields_from_hf(hf: Mapping[str, Any]) -> tuple[dict[str, Any], str]:
    if not isinstance(hf.get("model_type"), str):
        raise InputError("model_type is missing, must name the family of the model")
    quantized = value(hf, "quantization_config", dict, {})
    if quantized and quantized.get("quant_method") != "fp8":  # 8-bit floats are read: checkpoint.py
        raise InputError(
            f"quantization_config: weights quantized with {quantized.get('quant_method')!r} are not read (only 'fp8'); "
            "take the repository with the original weights"
        )
    family = families.by_model_type(hf["model_type"])
    fields = {**family.traits, **family.from_hf(hf)}
    return {"vocab_size": fields["padded_vocab_size"], **fields}, family.name


def _hf_name(hf: Mapping[str, Any]) -> str:
    return str(hf.get("_name_or_path") or "").rstrip("/").rsplit("/", 1)[-1]


def _with_numbers(fields: dict[str, Any]) -> dict[str, Any]:
    """YAML takes 1e-5, which lacks the point, for text."""
    return {name: _number(found) if "float" in str(FIELDS[name].type) else found for name, found in fields.items()}


def _number(found: Any) -> Any:
    try:
        return float(found) if isinstance(found, str) else found
    except ValueError:
        return found


def _with_later_fields(fields: dict[str, Any]) -> dict[str, Any]:
    """LitGPT 0.5 had no `family`: what it knew by the name comes from the registry's row, else from the switches."""
    if "family" in fields:
        return fields
    row = families.find(str(fields.get("name", "")))
    candidates = families.matching(fields)
    family = row[0] if row and row[0] in candidates else next(iter(candidates), None)
    later = {**(family.traits if family else {}), **fields}
    if row and family is row[0] and not _written(Config(**later, family=family.name), family)[1]:
        later["family"] = family.name
    return later


def _from_beside(config: Config, path: Path) -> dict[str, Any]:
    """What model_config.yaml may add to config.json: the name, and the number of real tokens."""
    own = Config.from_file(path)
    saved = _read_yaml(path)
    from_05 = "family" not in saved and _only_lit_model(path.parent)
    for name in SHAPES:
        mine, theirs = getattr(own, name), getattr(config, name)
        cut_rows = from_05 and name == "padded_vocab_size" and mine < theirs
        if mine != theirs and name in saved and not cut_rows:
            raise InputError(
                f"{path}: {name} is {mine}, but config.json beside it says {theirs}; correct or remove one of the two"
            )
    if "family" in saved and (different := config.differences(own)):
        warnings.warn(f"{path}: {', '.join(different)} differ from config.json beside it, which decides", stacklevel=3)
    added = {name: getattr(own, name) for name in ("name", "hf_config", "vocab_size", "padding_multiple")}
    # LitGPT 0.5 always stored a head of its own, and left out rows that only images use
    return added | ({"padded_vocab_size": own.padded_vocab_size, "tie_embeddings": False} if from_05 else {})


def _only_lit_model(directory: Path) -> bool:
    theirs = (*directory.glob("model*.safetensors*"), *directory.glob("pytorch_model*.bin*"))
    return not theirs and (directory / "lit_model.pth").exists()


# --- writing ---------------------------------------------------------------------------------------------------------


def _meaning(config: Config) -> dict[str, Any]:
    """The fields in one spelling, so that equal models compare equal."""
    fields = {name: found for name, found in config.to_dict().items() if name not in NAMING}
    fields |= {"bias": config.qkv_bias, "attn_proj_bias": config.proj_bias, "mlp_bias": config.has_mlp_bias}
    del fields["attn_bias"]
    if config.rope_adjustments is None and config.rope_local_base_freq is None and config.rope_condense_ratio != 1:
        fields |= {"rope_condense_ratio": 1, "rope_adjustments": {"factor": config.rope_condense_ratio}}
    fields["attention_scores_scalar"] = config.attention_scores_scalar or config.qk_head_dim or config.head_size
    if config.mlp_class_name == "LLaMAMoE":
        fields["moe_intermediate_size"] = config.moe_intermediate_size or config.intermediate_size
    if config.latent_attention:
        fields["latent_norm_eps"] = config.latent_norm_eps or config.norm_eps
        del fields["head_size"]
    if not any(config.window(layer) for layer in range(config.n_layer)):
        fields |= {"sliding_window_size": None, "sliding_window_indices": None}
    return fields


def _written(config: Config, family: families.Family) -> tuple[dict[str, Any], str]:
    """The family's config.json, and in words the first switch that does not survive it ("" when all do)."""
    fields = {**config.to_dict(), **{n: getattr(config, n) for n in ("qkv_bias", "proj_bias", "has_mlp_bias")}}
    try:
        hf = {"architectures": [family.architecture], "model_type": family.model_type, **family.to_hf(fields)}
        read, _ = _fields_from_hf(hf)
        lost = config.differences(Config(**read, family=family.name))
    except InputError as error:
        return {}, str(error)
    return hf, f"{lost[0]}: {_meaning(config)[lost[0]]!r}" if lost else ""


def _infer_family(config: Config) -> str:
    """The family whose config.json can say every switch; "" when there is none."""
    candidates = families.matching(config.to_dict())
    return next((family.name for family in candidates if not _written(config, family)[1]), "")


def _obstacle(config: Config) -> str:
    """What keeps the most similar family from writing the config."""
    fields = config.to_dict()
    similar = max(families.FAMILIES, key=lambda f: sum(fields[name] == trait for name, trait in f.traits.items()))
    return f" (the nearest, {similar.name}, cannot say {_written(config, similar)[1]})"
