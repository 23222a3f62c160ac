"""What an evaluation leaves on the disk: its results, and while it runs what it has found so far. Knows no model."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from itertools import count
from pathlib import Path
from typing import Any

from litgpt.errors import InputError
from litgpt.storage import atomic_file, require_writable


def home_of(directory: Path) -> Path:
    """Where results of a model go unless somebody says otherwise: never into its own directory."""
    place = directory.resolve()
    is_step = place.name == "final" or place.name.startswith("step-")
    return Path("out/evaluate") / (f"{place.parent.name}-{place.name}" if is_step else place.name)


def results_file(out_dir: Path, save_filepath: Path | None, overwrite: bool) -> Path:
    """Where the results will be: a place that is free, unless what is there may go.

    Nothing is made yet. Raises InputError before any work is done.
    """
    target = save_filepath or out_dir / "results.json"
    if save_filepath is None and not overwrite:
        names = (out_dir / f"results{'' if n == 1 else f'-{n}'}.json" for n in count(1))
        target = next(path for path in names if not path.exists())
    if target.is_dir():
        raise InputError(f"{target} is a directory, the results are a file; choose another name")
    if target.exists() and not overwrite:
        raise InputError(f"{target} exists already; choose another name or give --overwrite true")
    for place in {target.parent, out_dir}:
        there = next(path for path in (place, *place.parents, Path()) if path.exists())
        if not there.is_dir():
            raise InputError(f"{place} cannot be a directory: {there} is a file; choose another place")
        require_writable(there)
    return target


def write(target: Path, results: Mapping[str, Any]) -> list[Path]:
    """The results as JSON, and beside them the samples of each task, where there are; a file is whole or not there."""
    target.parent.mkdir(parents=True, exist_ok=True)
    written = []
    for task, samples in (results.get("samples") or {}).items():
        path = target.with_name(f"{target.stem}-samples-{task.replace('/', '_')}.jsonl")
        with atomic_file(path) as new, open(new, "w", encoding="utf-8") as file:
            file.writelines(_json(sample) + "\n" for sample in samples)
        written.append(path)
    with atomic_file(target) as new:
        rest = {name: value for name, value in results.items() if name != "samples"}
        new.write_text(_json(rest, indent=2) + "\n", encoding="utf-8")
    return [target, *written]


def _json(value: Any, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=False, default=_plain, **options)


def _plain(value: Any) -> Any:
    """What JSON has no word for: numbers of NumPy as numbers, sets as lists, all else as text."""
    if hasattr(value, "item"):
        return value.item()
    return sorted(value, key=str) if isinstance(value, set) else str(value)


# ------------------------------------------------------------------------------------------- going on where it stopped


def fingerprint(directories: Iterable[Path], settings: Mapping[str, Any]) -> str:
    """Another value for every other state of the files in these directories, and for other settings.

    Files are not read: the time of a change of their state cannot be set back by who copies or touches them.
    """
    digest = hashlib.sha256(_json(dict(settings), sort_keys=True).encode())
    for directory in directories:
        for path in sorted(p for p in directory.iterdir() if p.is_file()):
            stat = path.stat()
            state = (path.name, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)
            digest.update(repr(state).encode())
    return digest.hexdigest()[:16]


class Journal:
    """What was found so far, a line each, for one state of a model. A line that a kill has torn is not there.

    Args:
        path: the file; None: nothing is kept.
    """

    def __init__(self, path: Path | None = None) -> None:
        self.path = path
        self.found: dict[str, Any] = {}
        self.file = -1
        self.torn = False
        if path is None:
            return
        raw = path.read_bytes() if path.exists() else b""
        whole = raw[: raw.rfind(b"\n") + 1]
        for line in whole.splitlines():
            try:
                self.found.update([json.loads(line)])
            except (ValueError, TypeError):
                continue
        # what is torn ends here, so that the next line stands alone
        self.torn = raw != whole

    def key(self, *request: Any) -> str:
        return hashlib.sha256(_json(request, sort_keys=True).encode()).hexdigest()[:32]

    def keep(self, found: Mapping[str, Any]) -> None:
        """Add to what was found, in one write."""
        self.found |= found
        if self.path is None or not found:
            return
        if self.file < 0:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.file = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        lines = "".join(_json(entry) + "\n" for entry in found.items())
        os.write(self.file, ("\n" * self.torn + lines).encode())
        self.torn = False

    def close(self, *, done: bool) -> None:
        """Once all is written elsewhere, the file goes."""
        if self.file >= 0:
            os.close(self.file)
            self.file = -1
        if done and self.path is not None:
            self.path.unlink(missing_ok=True)
