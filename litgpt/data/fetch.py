"""Brings data sets onto the disk, once: single files from an address, and splits of Hub data sets as JSON lines.

A file is whole or not there; one that is there is not asked for again. A data set's own program is never run: it is
`datasets` that reads, and the releases of it that we take refuse loading scripts.
"""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from litgpt import hub
from litgpt.data.tokens import alone_in
from litgpt.errors import InputError, MachineError, MissingError, UserError, extra_missing, one_line
from litgpt.storage import atomic_file, disk_errors

NETWORK = {"HTTPError", "OfflineModeIsEnabled", "ConnectionError", "TimeoutError"}  # classes, by name, in any package


def file(url: str, path: Path) -> Path:
    """The file of an address as `path`. What a killed or failed try had fetched is gone on with."""
    if path.is_file():
        return path
    with alone_in(path.parent, "downloads into", "--data.download_dir"):
        if not path.is_file():  # one that waited for another finds it
            _fetch(_mirrored(url), path)
    return path


def _fetch(url: str, path: Path) -> None:
    if hub.is_offline():
        raise MachineError(f"{path} is not there and the environment forbids the network ({hub.OFFLINE[0]}); get {url}")
    link = Link(url)
    link.require_resolver()
    wanted = link.facts(path.name, "")
    with hub.workplace(path.with_name(f".{path.name}.part")) as place:
        folder = place / "files"
        with disk_errors(path, place, wanted.size):
            folder.mkdir(exist_ok=True)
            hub.keep_only([wanted], folder, place / "fetching.json")
            hub.fetch(hub.Repository(url, "", (path.name,), link), [wanted], folder)
            os.replace(folder / path.name, path)
            shutil.rmtree(place)


def hub_split(
    repo_id: str,
    split: str,
    folder: Path,
    *,
    config: str | None = None,
    revision: str | None = None,
    token: str | None = None,
) -> Path:
    """The rows of one split of a Hub data set (or of a local folder that is laid out like one), as JSON lines."""
    target = split_path(repo_id, split, folder, config, revision)
    if target.is_file() and not os.path.isdir(repo_id):
        return target
    with alone_in(folder, "downloads into", "--data.download_dir"):
        if not target.is_file() or os.path.isdir(repo_id):
            _write(_loaded(repo_id, split, folder, config, revision, token), target)
    return target


def _write(rows: Iterable[Any], target: Path) -> None:
    with atomic_file(target) as new, open(new, "w", encoding="utf-8") as out:
        for row in rows:
            out.write(json.dumps(row, ensure_ascii=False, default=str) + "\n")


def divided(repo_id: str, folder: Path, fraction: float, seed: int, train: Path, val: Path) -> None:
    """The texts of a Hub data set as .jsonl files in two folders, divided as train_test_split of `datasets` does it."""
    rows = _loaded(repo_id, "train", folder, None, None, None)
    validates = set(np.random.default_rng(seed).permutation(len(rows))[: math.ceil(fraction * len(rows))].tolist())
    with open(train / "text.jsonl", "w", encoding="utf-8") as out, open(val / "text.jsonl", "w", encoding="utf-8") as o:
        for number, row in enumerate(rows):
            (o if number in validates else out).write(json.dumps({"text": row["text"]}, ensure_ascii=False) + "\n")


def split_path(repo_id: str, split: str, folder: Path, config: str | None = None, revision: str | None = None) -> Path:
    """Where `hub_split` keeps the rows."""
    words = [repo_id.strip("./").replace("/", "--"), *(word for word in (config, revision) if word), split]
    return folder / ("-".join(words).replace(os.sep, "--") + ".jsonl")


def _mirrored(url: str) -> str:
    """The address on the mirror of the Hub that HF_ENDPOINT names, if it is one of the Hub's."""
    mirror = os.environ.get("HF_ENDPOINT", "").rstrip("/")
    return mirror + url.removeprefix(hub.SITE) if mirror and url.startswith(hub.SITE + "/") else url


class Link(hub.Client):
    """One address of the web, talked to with the patience that the Hub is. No token goes there."""

    def __init__(self, url: str) -> None:
        super().__init__(url, None, None)
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise InputError(f"{url}: not an address of the web; it begins with https://")
        self.endpoint, self.host, self.token = f"{parts.scheme}://{parts.netloc}", parts.netloc, None

    def facts(self, name: str, commit: str) -> hub.RemoteFile:
        from huggingface_hub import get_session
        from huggingface_hub.utils import hf_raise_for_status

        def asked(api: Any) -> Any:
            how: dict[str, Any] = {
                "headers": {"Accept-Encoding": "identity"},
                "timeout": hub.ANSWER_SECONDS,
                "follow_redirects": True,
            }
            response = get_session().head(self.name, **how)
            hf_raise_for_status(response)
            return response.headers

        headers = self.ask(asked)
        if not headers.get("content-length", "").isdigit():
            raise MachineError(f"{self.name}: {self.host} does not say how large it is; get it with another program")
        return hub.RemoteFile(name, int(headers["content-length"]), None, headers.get("etag", ""))

    @contextmanager
    def stream(self, name: str, commit: str, start: int) -> Iterator[Any]:
        from huggingface_hub import get_session
        from huggingface_hub.utils import hf_raise_for_status

        headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={start}-"} if start else {})
        how: dict[str, Any] = {"headers": headers, "timeout": hub.DATA_SECONDS, "follow_redirects": True}
        with get_session().stream("GET", self.name, **how) as response:
            if response.status_code >= 400:
                response.read()
            hf_raise_for_status(response)
            yield response

    def _refusal(self, error: Exception | None, status: int) -> UserError:
        kind = MissingError if status in (404, 410) else InputError
        return kind(f"{self.name}: {self.host} does not serve this file (HTTP {status}); check the address")


class DataSet(hub.Client):
    """A data set of the Hub, asked for before its files are."""

    def commit(self) -> str | None:
        """The commit that the revision means now."""
        self.require_resolver()
        how: dict[str, Any] = {"revision": self.revision, "timeout": hub.ANSWER_SECONDS}
        try:
            return self.ask(lambda api: api.dataset_info(self.name, **how)).sha
        except UserError:
            raise
        except ValueError as error:
            raise InputError(f"{self.name!r} is no name of a data set ({one_line(error)[:200]})") from None

    def _refusal(self, error: Exception | None, status: int) -> UserError:
        if type(error).__name__ == "RevisionNotFoundError":
            return MissingError(f"{self.name} has no revision {self.revision!r}")
        if status in (401, 404) and type(error).__name__ != "GatedRepoError":
            return _absent(self.name)
        return _gated(self.name)


def _absent(name: str) -> MissingError:
    return MissingError(f"{name} is no data set of the Hub, or it is private; check the name, or set HF_TOKEN")


def _gated(name: str) -> InputError:
    return InputError(
        f"{name} is gated or closed to this account: visit {hub.SITE}/datasets/{name}, accept its terms and set "
        "HF_TOKEN"
    )


def _loaded(repo_id: str, split: str, folder: Path, config: str | None, revision: str | None, token: str | None) -> Any:
    """The data set's rows, through the package that reads all their layouts."""
    try:
        import datasets
    except ImportError:
        raise extra_missing("datasets", "data") from None
    if not os.path.isdir(repo_id) and not hub.is_offline():
        revision = DataSet(repo_id, revision, token).commit()  # `datasets` waits half a minute for no network
    try:
        return datasets.load_dataset(
            repo_id, config, split=split, cache_dir=str(folder / "cache"), revision=revision, token=token
        )
    except Exception as error:
        raise _explained(error, repo_id, token) from None


def _explained(error: Exception, repo_id: str, token: str | None) -> UserError:
    """What went wrong in `datasets`, in one line, with an exit status that says whether to try again."""
    chain = list(_chain(error))
    words = one_line(chain[-1] if type(error).__name__ == "DatasetGenerationError" else error)[:300]
    words = words.replace(token, "...") if token else words
    status = next((s for e in chain if (s := getattr(getattr(e, "response", None), "status_code", None))), None)
    if any(isinstance(e, OSError) and e.errno == errno.ENOSPC for e in chain):
        return MachineError(f"{repo_id} could not be kept: {words}; free some space")
    if status in (401, 403) or "gated" in words:
        return _gated(repo_id)
    if (status is None or status in hub.BUSY) and is_of_network(error):
        return MachineError(f"{repo_id} could not be fetched ({words}); check the network and run it again")
    if type(error).__name__ == "DatasetNotFoundError":
        return _absent(repo_id)
    return InputError(f"{repo_id} cannot be read as a data set: {words}")


def is_of_network(error: BaseException) -> bool:
    """Whether an error comes from a network that is not there."""
    return any(NETWORK & {c.__name__ for c in type(e).__mro__} for e in _chain(error))


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
