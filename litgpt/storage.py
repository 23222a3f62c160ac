"""How files reach the disk: whole or not at all. Knows paths, bytes and checksums, nothing of models or torch.

    final         whole, always
    .final.new    being written or thrown away: never whole, nobody lists a name with a dot
    .final.old    the directory being replaced, whole: stands there only between two renames

A kill at any moment leaves the old `final` or the new one; `recover` and the next write tidy up what else is left.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from litgpt.errors import InputError, MachineError, MissingError, UserError, shown

MANIFEST = "litgpt_manifest.json"
FORMAT_VERSION = 1
WEIGHT_SUFFIXES = (".safetensors", ".pth", ".bin")
_BAD_PLACE = {errno.EEXIST, errno.ENAMETOOLONG, errno.ENOTDIR, errno.EISDIR, errno.ENOTEMPTY, errno.ELOOP}
_MACHINE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS, errno.EACCES, errno.EPERM, errno.EBUSY}
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_KEPT = "what was there before is unchanged"
_AGAIN = "copy or download it again, or use another checkpoint"


# ---------------------------------------------------------------------------------------------------- writing


@contextmanager
def atomic_dir(target: str | Path, *, overwrite: bool = False, need: int = 0) -> Iterator[Path]:
    """Yields a fresh temporary sibling of `target`; when the block ends well it becomes `target`, with a manifest.

    An empty `target` is filled, any other is refused unless `overwrite`. `need` is the number of bytes that the block
    will write, where that is known: a disk without the room is then refused before it is filled.
    Raises InputError (target is a file, not empty, or being written by another process) and MachineError (disk).
    """
    target = Path(target).resolve()
    new = _new(target)
    with disk_errors(target, new, need):
        recover(target)
        _require_free(target, overwrite)
        lock = _start(target, new)
    try:
        with disk_errors(target, new, need):
            _require_room(target, need)
            yield new
            seal(new)
            _swap(new, target)
    finally:
        shutil.rmtree(new, ignore_errors=True)
        recover(target)
        os.close(lock)


@contextmanager
def atomic_file(path: str | Path, *, need: int = 0) -> Iterator[Path]:
    """Yields a temporary sibling path to write; when the block ends well it becomes `path`. Replaces an older file."""
    path = Path(path).resolve()
    new = _new(path)
    if path.is_dir():
        raise InputError(f"{path} is a directory, a file is to be written there; choose another name")
    try:
        with disk_errors(path, new, need):
            path.parent.mkdir(parents=True, exist_ok=True)
            _require_room(path, need)
            yield new
            _fsync(new)
            os.replace(new, path)
            _fsync(path.parent)
    finally:
        new.unlink(missing_ok=True)


def require_writable(directory: Path) -> None:
    """Refuses, before any work is done, a directory that this user may not write to."""
    if not os.access(directory, os.W_OK | os.X_OK):
        raise InputError(f"{directory} cannot be written by this user; choose another place or change its permissions")


def recover(target: str | Path) -> Path:
    """Puts back the copy that a kill left aside between the two renames of a replacement. Returns where the whole one
    is: `target`, or the copy itself where the disk is read-only or the replacing goes on this moment."""
    target = Path(target)
    if target.name and os.path.isdir(_old(target)) and _is_free(target):
        if _is_locked(_new(target)):
            return _old(target)
        try:
            os.rename(_old(target), target)  # over an empty directory too: one step
        except OSError:
            return _old(target)
    return target


def seal(directory: Path) -> None:
    """Writes the manifest of all files below `directory` and sees files and directories onto the disk."""
    paths = sorted(p for p in directory.rglob("*") if p.is_file() and p != directory / MANIFEST)
    files = {p.relative_to(directory).as_posix(): {"size": p.stat().st_size, "sha256": sha256(p)} for p in paths}
    write_json(directory / MANIFEST, {"format_version": FORMAT_VERSION, "files": files})
    for path in [*paths, directory / MANIFEST, *(p for p in directory.rglob("*") if p.is_dir()), directory]:
        _fsync(path)


def _new(target: Path) -> Path:
    return target.with_name(f".{target.name}.new")


def _old(target: Path) -> Path:
    return target.with_name(f".{target.name}.old")


def _is_free(target: Path) -> bool:
    return not os.path.lexists(target) or (target.is_dir() and not any(target.iterdir()))


def _require_free(target: Path, overwrite: bool) -> None:
    if os.path.lexists(target) and not target.is_dir():
        raise InputError(f"{target} is a file, a directory is to be written there; choose another name")
    if not overwrite and not _is_free(target):
        raise InputError(f"{target} exists and is not empty; choose another directory or give --overwrite true")


def _start(target: Path, new: Path) -> int:
    """Makes an empty `new`, sweeping up what killed runs left, and locks it: the descriptor is open while we write."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if new.is_dir():
        os.close(_lock(new, target))
        shutil.rmtree(new)
    if _old(target).is_dir():  # its replacement is in place
        os.rename(_old(target), new)
        shutil.rmtree(new)
    new.mkdir()
    return _lock(new, target)


def _lock(new: Path, target: Path) -> int:
    descriptor = os.open(new, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise InputError(f"{target} is being written by another process; wait for it or choose another place") from None
    except OSError:
        pass  # a file system without locks: two writers to one place are then not told apart
    return descriptor


def _is_locked(new: Path) -> bool:
    if not new.is_dir():
        return False
    try:
        os.close(_lock(new, new))
    except InputError:
        return True
    return False


def _swap(new: Path, target: Path) -> None:
    if _is_free(target):
        os.rename(new, target)
    else:
        old = _old(target)
        os.rename(target, old)
        os.rename(new, target)
        _fsync(target.parent)
        with suppress(OSError):  # the new one is in place: the next write sweeps up
            os.rename(old, new)  # under this name it is rubbish, which the caller removes
    _fsync(target.parent)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# ---------------------------------------------------------------------------------------------------- trouble


def _require_room(target: Path, need: int) -> None:
    if need > shutil.disk_usage(target.parent).free:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@contextmanager
def disk_errors(target: Path, new: Path, need: int) -> Iterator[None]:
    """Turns an OSError of the disk, while `new` is written to become `target`, into one line that names the path, and
    the bytes it takes where room is what lacks; lets all others pass. Nobody is told of `new`, which nobody asked for.
    """
    try:
        yield
    except UserError:
        raise
    except OSError as error:
        # nothing can be made in a place that is no disk's, such as /proc
        is_no_place = error.errno == errno.ENOENT and error.filename in (str(new), new)
        if error.errno in _BAD_PLACE or is_no_place:
            raise InputError(f"{target} cannot be written: {error.strerror}; choose another place") from error
        if error.errno not in _MACHINE:
            raise
        size, remedy = "", "choose another place"
        if error.errno in _FULL:
            least = max(need, _bytes_below(new))
            size = f" (needs at least {least:,} bytes, {_free_bytes(target):,} are free)"
            remedy = "free some space or choose another place"
        what = f"{error.strerror}{_where(error, target, new)}{size}"
        raise MachineError(f"{target} could not be written: {what}; {_KEPT}; {remedy}") from error


def _where(error: OSError, target: Path, new: Path) -> str:
    """ " at ...", where it is another path than `target`, by the name that it was to have."""
    if not isinstance(error.filename, (str, Path)):
        return ""
    path = Path(error.filename)
    path = target / path.relative_to(new) if path.is_relative_to(new) else path
    return "" if path == target else f" at {path}"


def _bytes_below(path: Path) -> int:
    files = [path, *(Path(folder) / name for folder, _, names in os.walk(path) for name in names)]
    return sum(os.path.getsize(file) for file in files if os.path.isfile(file))


def _free_bytes(target: Path) -> int:
    place = next(p for p in target.parents if os.path.exists(p))
    return shutil.disk_usage(place).free


# ---------------------------------------------------------------------------------------------------- checking


def verify(directory: str | Path, *, full: bool = False) -> None:
    """Compares a directory with its manifest: the sizes of its weights or, with `full`, the sha256 of every file.

    A directory without a manifest (from the Hub, from LitGPT 0.5) passes. Raises InputError or MissingError.
    """
    directory = Path(directory)
    if not (directory / MANIFEST).is_file():
        return
    for name, (size, digest) in _read_manifest(directory / MANIFEST).items():
        if full or name.endswith(WEIGHT_SUFFIXES):
            path = inside(directory, name)
            require_size(path, size)
            if full and sha256(path) != digest:
                raise InputError(f"{path} is damaged: its sha256 is not the one in {MANIFEST}; {_AGAIN}")


def require_size(path: Path, size: int) -> None:
    """Refuses a file that is not there or not as long as it was when written."""
    if not path.is_file():
        raise MissingError(f"{path} is missing; {_AGAIN}")
    found = path.stat().st_size
    if found != size:
        raise InputError(f"{path} is damaged: expected {size:,} bytes, found {found:,}; {_AGAIN}")


def manifest(directory: Path) -> dict[str, str]:
    """The sha256 of each file, as the manifest of a directory says; empty where it has none."""
    path = directory / MANIFEST
    return {name: digest for name, (_, digest) in _read_manifest(path).items()} if path.is_file() else {}


def _read_manifest(path: Path) -> dict[str, tuple[int, str]]:
    manifest = read_json(path)
    require_version(manifest, path)
    try:
        return {name: (int(fact["size"]), str(fact["sha256"])) for name, fact in manifest["files"].items()}
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError):
        raise InputError(f"{path} is damaged: every file needs a size and a sha256; {_AGAIN}") from None


def require_version(facts: dict[str, Any], path: Path) -> None:
    """Refuses a file written by a newer release."""
    version = facts.get("format_version")
    if not isinstance(version, int) or version > FORMAT_VERSION:
        raise InputError(
            f"{path}: format_version {version!r} needs a newer LitGPT (this one reads up to {FORMAT_VERSION}); "
            "run: pip install -U litgpt"
        )


def inside(directory: Path, name: str) -> Path:
    """The path of the file `name` below `directory`. Refuses, unopened, a name or a link that leads out of it.

    Links into the blobs of a Hugging Face cache, where a snapshot's files lie, are fine.
    """
    if not _is_file_name(name):
        raise InputError(f"{directory}: {shown(name)} is no name of a file and was not opened; {_AGAIN}")
    path = directory / name
    root, real = directory.resolve(), path.resolve()
    homes = [root, root.parent.parent / "blobs"] if root.parent.name == "snapshots" else [root]
    lexical = Path(os.path.normpath(path)).is_relative_to(os.path.normpath(directory))
    if not lexical or not any(real.is_relative_to(home) for home in homes):
        raise InputError(
            f"{directory}: {shown(name)} leads out of this directory and was not opened; put the file there"
        )
    return path


def _is_file_name(name: str) -> bool:
    try:
        return b"\0" not in os.fsencode(name)
    except UnicodeEncodeError:  # half a character
        return False


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def sampled_sha256(path: Path, samples: int = 64, size: int = 1 << 14) -> str:
    """The sha256 of a file's length and of pieces of it, spread evenly: quick, and another one for other weights."""
    length = path.stat().st_size
    digest = hashlib.sha256(str(length).encode())
    with open(path, "rb") as file:
        for i in range(samples):
            file.seek(length * i // samples)
            digest.update(file.read(size))
    return digest.hexdigest()


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object, or an InputError that names file, line and fault."""
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not valid JSON: {error}; {_AGAIN}") from None
    if not isinstance(value, dict):
        raise InputError(f"{path}: expected an object {{...}}, found {type(value).__name__}; {_AGAIN}")
    return value


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")
