"""`litgpt convert_to_litgpt`: `lit_model.pth` and `model_config.yaml`, as LitGPT 0.5 reads them, beside the weights."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from litgpt.config import FIELDS, Config
from litgpt.errors import InputError, near_miss
from litgpt.families.tables import scaling_kind
from litgpt.storage import MANIFEST, atomic_file, read_json, require_writable, sha256, write_json

if TYPE_CHECKING:
    from litgpt.checkpoint import Checkpoint

LIT_MODEL, MODEL_CONFIG = "lit_model.pth", "model_config.yaml"
DTYPES = ("float32", "float16", "bfloat16")

# the fields that LitGPT 0.5 has
_KEYS = """
    name hf_config block_size n_layer n_embd vocab_size padding_multiple padded_vocab_size
    norm_class_name norm_eps norm_qk norm_qk_type post_attention_norm post_mlp_norm parallel_residual
    shared_attention_norm n_head head_size n_query_groups attn_bias attention_scores_scalar
    sliding_window_size sliding_window_indices attention_logit_softcapping
    rope_base rotary_percentage rope_condense_ratio rope_adjustments rope_interleave
    intermediate_size moe_intermediate_size bias mlp_class_name gelu_approximate
    n_expert n_shared_expert n_expert_groups n_topk_groups n_topk_scores_per_group n_expert_per_token
    first_k_dense_replace routed_scaling_factor norm_topk_prob scale_embeddings lm_head_bias
    final_logit_softcapping norm_1 norm_2 latent_attention rope_local_base_freq rope_indices
"""
KEYS = _KEYS.split()
# later ones that it says in other words: by the name, by the other biases, by a head that is a copy
SAID_OTHERWISE = (
    *("family", "tie_embeddings", "norm_unit_offset", "norm_affine"),
    *("attn_proj_bias", "mlp_bias", "latent_norm_eps"),
)


def main(checkpoint_dir: Path, *, model_name: str | None = None, dtype: str | None = None) -> None:
    """Write lit_model.pth and model_config.yaml beside Hugging Face weights, for LitGPT 0.5.

    Args:
        checkpoint_dir: Directory with config.json and weights, or its name below checkpoints/.
        model_name: What the model is called in LitGPT 0.5. A registered name must fit config.json.
        dtype: float32, float16 or bfloat16. By default as in the files.
    """
    if dtype is not None and dtype not in DTYPES:
        raise InputError(f"--dtype {dtype} is not one of {', '.join(DTYPES)}{near_miss(dtype, DTYPES)}")
    from litgpt.checkpoint import find
    from litgpt.estimate import in_words
    from litgpt.scripts.source import open_model

    directory = find(checkpoint_dir)
    name = _agreed_name(directory, model_name)
    opened = open_model(directory)
    if opened.files[0].path.name == LIT_MODEL:
        raise InputError(f"{directory} holds {LIT_MODEL} and no Hugging Face weights: there is nothing to convert")
    fields = fields_of_05(opened.config) | name
    require_writable(directory)
    _write(opened, fields, dtype)
    n_bytes = (directory / LIT_MODEL).stat().st_size
    print(f"Wrote {LIT_MODEL} ({in_words(n_bytes)}) and {MODEL_CONFIG} for LitGPT 0.5 to {directory}.")
    print(f"The way back: litgpt convert_from_litgpt {directory} --output_dir DIR")


# ---------------------------------------------------------------------------------------------------- what 0.5 reads


def fields_of_05(config: Config) -> dict[str, Any]:
    """The content of LitGPT 0.5's model_config.yaml. Raises InputError that names a switch which it does not have."""
    lacking = _lacking(config)
    if lacking:
        raise InputError(
            f"LitGPT 0.5 has no {' and no '.join(lacking)}, so it cannot run {config.name or 'this model'}; "
            "use the Hugging Face files as they are"
        )
    bias = config.proj_bias  # governs all linears there; `attn_bias` adds one to qkv alone
    said = {"name": _name_of_05(config), "bias": bias, "attn_bias": config.qkv_bias and not bias}
    return {name: value for name, value in config.to_dict().items() if name in KEYS} | said


def _lacking(config: Config) -> list[str]:
    """The switches of the model that no field, name or other switch of LitGPT 0.5 says."""
    latent = config.latent_attention is not None
    kind = scaling_kind(config.rope_adjustments) if config.rope_adjustments else ""
    odd_bias = config.has_mlp_bias != config.proj_bias or (config.proj_bias and (latent or not config.qkv_bias))
    faults = {
        f"bias on some linears only ({', '.join(_bias_words(config))})": odd_bias,
        "latent_norm_eps other than norm_eps": latent and config.latent_norm_eps not in (None, config.norm_eps),
        "latent attention without q_lora_rank": latent and not config.q_lora_rank,
        "n_expert_groups of 1": config.n_expert_groups == 1,
        "longrope": kind == "longrope",
        "YaRN as it was published": kind == "yarn",  # its own stretches the fast dims, not the slow ones
    }
    later = [name for name in FIELDS if name not in KEYS and name not in SAID_OTHERWISE]
    unsaid = [f"{name}: {getattr(config, name)}" for name in later if getattr(config, name) != FIELDS[name].default]
    return [words for words, holds in faults.items() if holds] + unsaid


def _bias_words(config: Config) -> list[str]:
    on = {"qkv": config.qkv_bias, "attention output": config.proj_bias, "mlp": config.has_mlp_bias}
    return [f"{name} {'with' if there else 'without'}" for name, there in on.items()]


def _name_of_05(config: Config) -> str:
    """LitGPT 0.5 tells by the name how a norm is computed: the name must say it, and say nothing that is not so."""
    name = config.name
    facts = {
        "Gemma": (config.norm_class_name == "RMSNorm", config.norm_unit_offset),
        "OLMo": (config.norm_class_name == "LayerNorm", not config.norm_affine),
    }
    for word, (matters, holds) in facts.items():
        if matters and holds and word not in name:
            name = f"{word}-{name}".rstrip("-")
        elif matters and not holds:
            name = name.replace(word, word.lower())
    return name


def _agreed_name(directory: Path, model_name: str | None) -> dict[str, Any]:
    """`name` and `hf_config` of a registered model that is the one in `directory`; nothing where no name is given."""
    if model_name is None:
        return {}
    named, found = Config.from_name(model_name), Config.from_checkpoint(directory)
    if different := found.differences(named):
        first = ", ".join(f"{n} {getattr(found, n)} instead of {getattr(named, n)}" for n in different[:3])
        rest = f" and {len(different) - 3} more" if len(different) > 3 else ""
        raise InputError(
            f"{directory} is not a {named.name}: {first}{rest}; leave --model_name out, the config files say what it is"
        )
    return {"name": _name_of_05(named), "hf_config": named.hf_config}


# ----------------------------------------------------------------------------------------------------------- writing


def _write(opened: Checkpoint, fields: dict[str, Any], dtype: str | None) -> None:
    """Both files. A kill leaves neither or both, or LitGPT 0.5's description alone, which says the same as ours.

    What the manifest lists is true at every moment: it lets go of the description before, and takes it up after.
    It does not list the weights, which have checksums of their own: whoever needs them no more may remove them.
    """
    import torch

    from litgpt.scripts import lit_model, source

    wanted = getattr(torch, dtype) if dtype else None
    # not on the mapped file: what was written would stay in memory
    tensors = source.only_finite(opened, opened.tensors(wanted, writable=True))
    with ExitStack() as stack:  # left from the last to the first
        weights = stack.enter_context(atomic_file(opened.dir / LIT_MODEL, need=_bytes_needed(opened, wanted)))
        lit_model.save(weights, _with_head(tensors, opened.config))
        description = stack.enter_context(atomic_file(opened.dir / MODEL_CONFIG))
        description.write_text(yaml.safe_dump(fields), encoding="utf-8")
        _require_readable(opened, description)
        _list_in_manifest(opened.dir, [])
    _list_in_manifest(opened.dir, [MODEL_CONFIG])


def _with_head(tensors: Any, config: Config) -> Any:
    """LitGPT 0.5 knows no tied head: it gets a copy."""
    from litgpt.weights import EMBEDDING, HEAD

    for name, tensor in tensors:
        yield name, tensor
        if config.tie_embeddings and name == EMBEDDING:
            yield HEAD, tensor


def _bytes_needed(opened: Checkpoint, dtype: Any) -> int:
    from litgpt import estimate

    count = estimate.parameters(opened.config)
    head = count.embedding if opened.config.tie_embeddings else 0
    return (count.total + head) * (dtype or opened.dtype).itemsize


def _require_readable(opened: Checkpoint, description: Path) -> None:
    """Without config.json the new description is all there will be to read the old weights by."""
    if (opened.dir / "config.json").is_file():
        return
    read = Config.from_file(description)
    if lost := opened.config.differences(read):
        raise InputError(
            f"{opened.dir}: without config.json, LitGPT 0.5's {MODEL_CONFIG} would lose {', '.join(lost)}; keep this "
            "directory as it is"
        )


def _list_in_manifest(directory: Path, names: list[str]) -> None:
    """Of the two files, the manifest (where there is one) lists `names`."""
    path = directory / MANIFEST
    if not path.is_file():
        return
    manifest = read_json(path)
    files = {name: fact for name, fact in manifest["files"].items() if name not in (LIT_MODEL, MODEL_CONFIG)}
    for name in names:
        files[name] = {"size": (directory / name).stat().st_size, "sha256": sha256(directory / name)}
    with atomic_file(path) as new:
        write_json(new, manifest | {"files": files})
