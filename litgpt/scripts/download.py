"""`litgpt download`: a repository of the Hugging Face Hub as a checkpoint directory, and the list of known models.

checkpoints/org/name         the directory as it is on the Hub, whole, with what it was made from
checkpoints/org/.name.part   what came so far: no checkpoint, gone once it is one
"""

from __future__ import annotations

import os
import re
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import Any

from litgpt import families, hub
from litgpt.config import Config
from litgpt.errors import InputError, MissingError, UserError, near_miss
from litgpt.estimate import in_words
from litgpt.hub import RemoteFile, Repository
from litgpt.report import next_commands
from litgpt.storage import MANIFEST, atomic_dir, disk_errors, read_json, recover, sha256, verify, write_json
from litgpt.tokenizer import FILES as TOKENIZER

SOURCE = "litgpt_source.json"  # repository, commit and dtype of a directory that was downloaded
SETTINGS = ("config.json", "generation_config.json")
INDEX, PICKLE_INDEX = "model.safetensors.index.json", "pytorch_model.bin.index.json"
NOT_THE_MODEL = ("consolidated*", "adapter_*", "*.fp16.*", "*.fp32.*", "*.bf16.*")  # the same weights again, or others
DTYPES = ("float32", "bfloat16", "float16")


def main(
    repo_id: str = "list",
    word: str | None = None,
    *,
    access_token: str | None = None,
    tokenizer_only: bool = False,
    dtype: str | None = None,
    checkpoint_dir: Path = Path("checkpoints"),
    revision: str | None = None,
    allow_pickle: bool = False,
) -> None:
    """Download a checkpoint from the Hugging Face Hub, or list the models that are known.

    A download that was cut off goes on where it stopped. The directory is used as it is; nothing is converted.

    Args:
        repo_id: A repository as ORG/NAME, a model's name, or `list`, which is the default.
        word: After `list`: show only models with this word in their name or family.
        access_token: For private and gated repositories; HF_TOKEN in the environment is the safer way to give it.
        tokenizer_only: Fetch the tokenizer and the settings, no weights.
        dtype: Store the weights as float32, bfloat16 or float16; by default as they are.
        checkpoint_dir: Where ORG/NAME is made.
        revision: A branch, tag or commit; by default the newest of the main branch.
        allow_pickle: Fetch pytorch_model*.bin where there are no safetensors.
    """
    if repo_id == "list":
        print(listing(word))
        return
    if word is not None:
        raise InputError(f"'{word}' stands alone after {repo_id}; give one repository, or: litgpt download list {word}")
    if dtype is not None and dtype not in DTYPES:
        raise InputError(f"--dtype '{dtype}' is not one of {', '.join(DTYPES)}{near_miss(dtype, DTYPES)}")
    name = full_name(repo_id)
    target = recover(checkpoint_dir / name)
    if hub.is_offline():
        _require_here(name, target, tokenizer_only)
        print(f"{target} is there; offline mode: not compared with the Hub.")
        return
    repository = hub.open_(name, revision, access_token)
    names = choose(repository, tokenizer_only=tokenizer_only, allow_pickle=allow_pickle, casts=dtype is not None)
    source = {"repo_id": name, "commit": repository.commit, "dtype": None if tokenizer_only else dtype}
    _get(repository, hub.files(repository, names), target, source)
    if not tokenizer_only:
        print(next_commands(target))


def full_name(repo_id: str) -> str:
    """`org/name` of a repository or of a model that is known by its name."""
    found = None if "/" in repo_id else families.find(repo_id)
    if found:
        return f"{found[1]['hf_config']['org']}/{found[1]['hf_config']['name']}"
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", repo_id, re.ASCII) or ".." in repo_id:
        near = near_miss(repo_id, [*hub.registered(), *families.names()])
        raise InputError(
            f"'{repo_id}' is no repository of the form ORG/NAME{near} (litgpt download list shows what is known)"
        )
    return repo_id


# ---------------------------------------------------------------------------------------------------- which files


def choose(repository: Repository, *, tokenizer_only: bool, allow_pickle: bool, casts: bool) -> list[str]:
    """The files of a repository that make a checkpoint, the small ones first."""
    names = repository.names
    tokenizer = [name for name in names if name in TOKENIZER or _is_template(name)]
    settings = [name for name in SETTINGS if name in names]
    if tokenizer_only:
        if not tokenizer:
            raise MissingError(f"{repository.name} has no tokenizer files; --tokenizer_only has nothing to fetch")
        return settings + tokenizer
    if "config.json" not in names:
        raise MissingError(
            f"{repository.name} has no config.json, so it is no checkpoint; see {hub.SITE}/{repository.name}"
        )
    weights = _safetensors(names)
    if weights:
        return settings + tokenizer + weights
    pickles = [name for name in names if name == PICKLE_INDEX or fnmatchcase(name, "pytorch_model*.bin")]
    if not pickles:
        raise MissingError(
            f"{repository.name} has no weights as safetensors; see {hub.SITE}/{repository.name}/tree/main"
        )
    if not allow_pickle or casts:
        raise InputError(_about_pickles(repository.name, pickles[0], allow_pickle))
    return settings + tokenizer + pickles


def _safetensors(names: Sequence[str]) -> list[str]:
    """What readers open: one file, or else the shards of the index."""
    if "model.safetensors" in names:
        return ["model.safetensors"]
    plain = [name for name in names if "/" not in name and name.endswith(".safetensors")]
    shards = [name for name in plain if not any(fnmatchcase(name, pattern) for pattern in NOT_THE_MODEL)]
    return [INDEX, *shards] if INDEX in names and shards else []


def _is_template(name: str) -> bool:
    path = PurePosixPath(name)
    return len(path.parts) == 2 and path.parts[0] == "additional_chat_templates" and path.suffix == ".jinja"


def _about_pickles(name: str, example: str, is_allowed: bool) -> str:
    if is_allowed:
        return f"{name} has pickles only ({example}): --dtype casts safetensors; leave --dtype out"
    return (
        f"{name} has its weights as pickles only ({example}), a format that can carry code; LitGPT reads the "
        "tensors alone: give --allow_pickle to fetch them"
    )


# ---------------------------------------------------------------------------------------------------- the directory


def _get(repository: Repository, wanted: list[RemoteFile], target: Path, source: Mapping[str, Any]) -> None:
    """Make `target` hold `wanted`, from what lies there already and the Hub."""
    amount = f"{len(wanted)} files, {in_words(sum(file.size for file in wanted))}, commit {repository.commit[:12]}"
    part = target.with_name(f".{target.name}.part")
    if _is_complete(target, wanted, source):
        shutil.rmtree(part, ignore_errors=True)
        print(f"{target} is there already: {amount}.")
        return
    _require_ours(target, wanted)
    with hub.workplace(part) as place:
        folder = place / "files"
        with disk_errors(target, place, 0):
            folder.mkdir(exist_ok=True)
            hub.keep_only(wanted, folder, place / "record.json")
            _take_over(target, wanted, folder)
        small = [file for file in wanted if not _is_weight(file.name)]
        hub.fetch(repository, small, folder)
        _warn_of_unknown(folder / "config.json")
        hub.fetch(repository, wanted, folder)
        need = _room_for_cast(folder, source["dtype"])
        with atomic_dir(target, overwrite=True, need=need) as new:
            _assemble(folder, new, source)
        shutil.rmtree(place)
    print(f"Wrote {target}: {amount}.")


def _is_weight(name: str) -> bool:
    return name.endswith((".safetensors", ".bin"))


def _is_complete(target: Path, wanted: Sequence[RemoteFile], source: Mapping[str, Any]) -> bool:
    """Whether all of `wanted` lies in `target`: fetched before from the same commit, or the same by size and sha256."""
    if not all((target / file.name).is_file() for file in wanted):
        return False
    try:
        verify(target)
        before = _source(target)
    except UserError:
        return False
    if before is not None:
        is_same = all(before.get(key) == source[key] for key in ("repo_id", "commit"))
        has_weights = any(_is_weight(file.name) for file in wanted)
        return is_same and (not has_weights or before.get("dtype") == source["dtype"])
    return source["dtype"] is None and all(_is_same(target / file.name, file) for file in wanted)


def _is_same(path: Path, file: RemoteFile) -> bool:
    return path.stat().st_size == file.size and file.sha256 in (None, sha256(path))


def _source(target: Path) -> dict[str, Any] | None:
    return read_json(target / SOURCE) if (target / SOURCE).is_file() else None


def _require_ours(target: Path, wanted: Sequence[RemoteFile]) -> None:
    """Refuses to replace a directory that holds anything but a download, or weights by a tokenizer."""
    if target.exists() and not target.is_dir():
        raise InputError(f"{target} is a file, a directory is to be made there; move it away")
    if not target.exists() or not any(target.iterdir()):
        return
    before = _source(target)
    if before is None:
        raise InputError(
            f"{target} was not made by litgpt download and differs from the Hub; it is left as it is: "
            "move it away, or choose another --checkpoint_dir"
        )
    ours = {path.name for path in target.iterdir()} - {MANIFEST, SOURCE, "additional_chat_templates"}
    strange = sorted(ours - set(before.get("files", ())))
    if strange:
        raise InputError(f"{target} holds {strange[0]}, which is not of the Hub and would be lost; move it away first")
    if any(map(_is_weight, ours)) and not any(_is_weight(file.name) for file in wanted):
        raise InputError(
            f"{target} holds weights of commit {before.get('commit')}, another than this tokenizer's; give --revision "
            f"{before.get('commit')}, download both, or choose another --checkpoint_dir"
        )


def _take_over(target: Path, wanted: Sequence[RemoteFile], folder: Path) -> None:
    """Links files that lie in `target` with the same sha256 rather than fetching them again."""
    with suppress(UserError, OSError, KeyError, TypeError):
        known = read_json(target / MANIFEST)["files"]
        for file in wanted:
            path = target / file.name
            is_known = file.sha256 and known.get(file.name, {}).get("sha256") == file.sha256
            if is_known and path.is_file() and path.stat().st_size == file.size:
                (folder / file.name).unlink(missing_ok=True)
                os.link(path, folder / file.name)


def _warn_of_unknown(config: Path) -> None:
    try:
        if config.is_file():
            Config.from_hf(config)
    except UserError as error:
        print(f"warning: LitGPT cannot run this model: {error}", file=sys.stderr)


def _assemble(folder: Path, new: Path, source: Mapping[str, Any]) -> None:
    """The checkpoint directory from the fetched files: links, so that a kill here costs nothing, and cast weights."""
    dtype = source["dtype"]
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    total = 0
    for name in names:
        place = new / name
        place.parent.mkdir(exist_ok=True)
        if dtype and name.endswith(".safetensors"):
            total += _cast(folder / name, place, dtype)
        else:
            _link(folder / name, place)
    if dtype:
        _edit(new / "config.json", lambda config: {**config, "torch_dtype": dtype} | _dtype_key(config, dtype))
        _edit(new / INDEX, lambda index: {**index, "metadata": {**index.get("metadata", {}), "total_size": total}})
    write_json(new / SOURCE, {**source, "files": names})


def _link(path: Path, place: Path) -> None:
    try:
        os.link(path, place)
    except OSError:  # a file system without links
        os.rename(path, place)


def _edit(path: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    if path.is_file():
        content = change(read_json(path))
        path.unlink()  # a link: the fetched file stays what it is
        write_json(path, content)


def _dtype_key(config: Mapping[str, Any], dtype: str) -> dict[str, str]:
    return {"dtype": dtype} if "dtype" in config else {}


def _cast(path: Path, place: Path, dtype: str) -> int:
    """Write a safetensors file anew, tensor by tensor; returns the bytes of its tensors."""
    from dataclasses import replace

    from litgpt import weights

    file = weights.open_file(path)
    entries = {name: replace(entry, dtype=_dtype_of(name, entry.dtype, dtype)) for name, entry in file.entries.items()}
    weights.save_file(place, entries, ((name, file.read(name, entry.dtype)) for name, entry in entries.items()))
    return sum(entry.nbytes for entry in entries.values())


def _dtype_of(name: str, there: Any, dtype: str) -> Any:
    import torch

    # a router's correction bias is no parameter: it keeps its precision
    is_cast = there.is_floating_point and name.endswith((".weight", ".bias"))
    return getattr(torch, dtype) if is_cast else there


def _room_for_cast(folder: Path, dtype: str | None) -> int:
    if dtype is None:
        return 0
    from litgpt import weights

    entries = [item for path in folder.glob("*.safetensors") for item in weights.open_file(path).entries.items()]
    return sum(_dtype_of(name, entry.dtype, dtype).itemsize * entry.shape.numel() for name, entry in entries)


# ---------------------------------------------------------------------------------------------------- without network


def _require_here(name: str, target: Path, tokenizer_only: bool) -> None:
    """Refuses, offline, a directory that lacks a part of a checkpoint."""
    parts = {"config.json": ("config.json",), "the tokenizer": ("tokenizer.json", "tokenizer.model")}
    if not tokenizer_only:
        parts["the weights"] = ("model.safetensors", INDEX, "pytorch_model.bin", PICKLE_INDEX)
    missing = [part for part, files in parts.items() if not any((target / file).is_file() for file in files)]
    if missing:
        raise MissingError(
            f"{target} lacks {', '.join(missing)} and offline mode (HF_HUB_OFFLINE) forbids to fetch {name}; "
            "unset it, or copy the directory here"
        )


def listing(word: str | None = None) -> str:
    """The known models by family, those with `word` in their name or family."""
    lines, count = [], 0
    for family in families.FAMILIES:
        rows = [row["hf_config"] for row in family.rows]
        names = list(dict.fromkeys(f"{row['org']}/{row['name']}" for row in rows))
        if word and word.lower() not in family.name:
            names = [name for name in names if word.lower() in name.lower()]
        if names:
            count += len(names)
            lines += [f"{family.name} ({len(names)})", *(f"  {name}" for name in names), ""]
    if not lines:
        near = near_miss(word or "", [*hub.registered(), *families.names(), *(f.name for f in families.FAMILIES)])
        raise MissingError(f"no known model has '{word}' in its name{near}; litgpt download list shows all")
    return "\n".join([*lines, f"{count} models. Other repositories of these families work as well.", _HOW])


_HOW = "Download one: litgpt download ORG/NAME; search: litgpt download list WORD"
