"""The Hugging Face Hub: what a repository holds at one commit, and its files fetched so that a kill loses nothing.

Knows HTTP and files, not what a checkpoint is. huggingface_hub answers questions and brings the client, the token and
the addresses; the bytes we fetch ourselves: its 2.x throws away what a killed or failed download had fetched.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit
from urllib.request import getproxies

from litgpt import families
from litgpt.errors import InputError, MachineError, MissingError, UserError, near_miss
from litgpt.estimate import in_words
from litgpt.report import Bar
from litgpt.storage import disk_errors, read_json, sha256, write_json

T = TypeVar("T")

SITE = "https://huggingface.co"
TRIES = 5  # in a row without a new byte
FIRST_WAIT, LONGEST_WAIT = 0.5, 300.0  # seconds; the longest that a server may ask for with Retry-After
ANSWER_SECONDS, DATA_SECONDS = 5.0, 20.0  # without an answer (huggingface_hub may spend 3 more), without a byte
PATIENCE = 4.0  # seconds in which a first contact is tried again where there is no network
AT_ONCE = 4  # files
OFFLINE = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
BUSY = {408, 425, 429, 500, 502, 503, 504}


@dataclass(frozen=True)
class RemoteFile:
    """A file of a repository; `sha256` is known of large ones, `tag` changes when the content does."""

    name: str
    size: int
    sha256: str | None
    tag: str


@dataclass(frozen=True)
class Repository:
    """A repository of the Hub at the one commit that is fetched, and how it is reached."""

    name: str  # "org/name"
    commit: str
    names: tuple[str, ...]
    client: Client = field(repr=False)


def is_offline() -> bool:
    """Whether the environment forbids the network."""
    return any(os.environ.get(n, "").upper() in ("1", "ON", "YES", "TRUE") for n in OFFLINE)


def open_(name: str, revision: str | None = None, token: str | None = None) -> Repository:
    """Looks a repository up. All that is fetched from it later is of the commit that `revision` means now."""
    client = Client(name, revision, token)
    client.require_resolver()
    info = client.ask(lambda api: api.model_info(name, revision=revision, files_metadata=True, timeout=ANSWER_SECONDS))
    client.listed = {s.rfilename: s for s in info.siblings or ()}
    if not info.sha:
        raise MachineError(f"{name}: {client.host} names no commit of it; try again later")
    return Repository(name, info.sha, tuple(client.listed), client)


# ---------------------------------------------------------------------------------------------------- fetching


def files(repository: Repository, names: Sequence[str]) -> list[RemoteFile]:
    """Sizes and checksums of some files."""
    return [repository.client.facts(name, repository.commit) for name in names]


def fetch(repository: Repository, wanted: Sequence[RemoteFile], folder: Path) -> None:
    """Brings files into `folder`, each checked. What lies there from an earlier try is gone on with.

    Raises MachineError when the network, the Hub or the disk gives way; what came so far stays for the next try.
    """
    come = sum(_have(folder, file) for file in wanted)
    left = sum(file.size for file in wanted) - come
    free = shutil.disk_usage(folder).free
    if left > free:
        raise MachineError(
            f"{repository.name} needs {left:,} more bytes, {free:,} are free at {folder.parent}; "
            "free some space or choose another --checkpoint_dir"
        )
    bar = Bar(sum(file.size for file in wanted), repository.name, done=come, delay=1.0)
    job = Job(repository, folder, bar)
    pool = ThreadPoolExecutor(AT_ONCE)
    try:
        with disk_errors(folder, folder, left):
            for done in as_completed([pool.submit(job.bring, file) for file in wanted]):
                done.result()
    finally:
        job.stop.set()
        pool.shutdown(cancel_futures=True)
        bar.close()


@contextmanager
def workplace(path: Path) -> Iterator[Path]:
    """A directory that survives a kill, for one process at a time."""
    with disk_errors(path, path, 0):
        path.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise InputError(f"{path} is being filled by another download; wait for it") from None
    except OSError:
        pass  # a file system without locks
    try:
        yield path
    finally:
        os.close(descriptor)


def keep_only(wanted: Sequence[RemoteFile], folder: Path, record: Path) -> None:
    """Throws away what an earlier try left of other contents; `record` remembers what was being fetched."""
    try:
        before = read_json(record)
    except (UserError, OSError):
        before = {}
    now = {file.name: [file.size, file.tag] for file in wanted}
    for path in [p for p in folder.rglob("*") if p.is_file()]:
        name = path.relative_to(folder).as_posix()
        if name not in now or before.get(name) != now[name]:
            path.unlink()
    beside = record.with_name(record.name + ".new")
    write_json(beside, now)
    os.replace(beside, record)


def _have(folder: Path, file: RemoteFile) -> int:
    try:
        return min((folder / file.name).stat().st_size, file.size)
    except FileNotFoundError:
        return 0


class Stopped(Exception):
    """Another file failed, or the user had enough."""


class Job:
    """Several files being fetched at once."""

    def __init__(self, repository: Repository, folder: Path, bar: Bar) -> None:
        self.repository, self.client, self.folder, self.bar = repository, repository.client, folder, bar
        self.stop = threading.Event()
        self.lock = threading.Lock()

    def bring(self, file: RemoteFile) -> None:
        """Fetch and check one file; a damaged one is fetched once more."""
        path = self.folder / file.name
        path.parent.mkdir(exist_ok=True)
        for _ in range(2):
            self._fill(file, path)
            if file.sha256 is None or sha256(path) == file.sha256:
                return
            self._count(-file.size)
            path.unlink()
        raise MachineError(f"{self.repository.name}: {file.name} came twice with a wrong sha256; try again later")

    def _fill(self, file: RemoteFile, path: Path) -> None:
        path.touch()
        failures = 0
        while (have := path.stat().st_size) != file.size:
            if have > file.size:
                os.truncate(path, 0)
                self._count(-file.size)
                continue
            try:
                self._stream(file, path, have)
                trouble = None
            except self.client.broken as error:
                trouble = error
            failures = 0 if have < path.stat().st_size < file.size else failures + 1
            if path.stat().st_size != file.size:
                self._wait(trouble, failures)

    def _wait(self, trouble: Exception | None, failures: int) -> None:
        seconds = self.client.wait_after(trouble, failures)
        if seconds >= 5:
            with self.lock:
                self.bar.note(f"{self.client.host} asks to wait {seconds:.0f} s")
        if self.stop.wait(seconds):
            raise Stopped

    def _stream(self, file: RemoteFile, path: Path, have: int) -> None:
        """Append what is missing, as far as the connection lasts."""
        with self.client.stream(file.name, self.repository.commit, have) as response, open(path, "r+b") as out:
            if response.status_code != 206:  # the whole file, whatever was asked for
                self._count(-have)
                have = 0
            out.seek(have)
            out.truncate()
            for chunk in response.iter_raw():
                if self.stop.is_set():
                    raise Stopped
                out.write(chunk)
                out.flush()
                self._count(len(chunk))

    def _count(self, n_bytes: int) -> None:
        with self.lock:
            done = (self.bar.n or 0) + n_bytes
            self.bar.at(done, f"{in_words(done)} of {in_words(self.bar.total or 0)}")


# ---------------------------------------------------------------------------------------------------- talking


class Client:
    """One repository's way to the Hub: requests, the patience with it, and what its refusals mean."""

    def __init__(self, name: str, revision: str | None, token: str | None) -> None:
        from huggingface_hub import HfApi
        from huggingface_hub.errors import HfHubHTTPError

        self.name, self.revision = name, revision
        self.listed: dict[str, Any] = {}
        self.endpoint = os.environ.get("HF_ENDPOINT", "").rstrip("/") or SITE
        self.host = self.endpoint.split("//")[-1]
        self.token = checked_token(token or os.environ.get("HF_TOKEN"))
        self.api = HfApi(endpoint=self.endpoint, token=self.token)
        self.refused = HfHubHTTPError
        # what the HTTP client raises: httpx in huggingface_hub 1.x, httpx2 in 2.x
        self.broken: type[Exception] = next(c for c in HfHubHTTPError.__mro__ if c.__name__ == "HTTPError")

    def ask(self, question: Callable[[Any], T]) -> T:
        """The answer to a question, asked again while the Hub is busy."""
        began, failures = time.monotonic(), 0
        while True:
            try:
                return question(self.api)
            except self.broken as error:
                failures += 1
                if self._status(error) is None and time.monotonic() - began > PATIENCE / 2:
                    failures = TRIES
                wait = self.wait_after(error, failures)
                if wait >= 5:
                    print(f"{self.host} asks to wait {wait:.0f} s", flush=True)
                time.sleep(wait)

    def require_resolver(self) -> None:
        """Looks the host's name up once, with a limit: the system's own may be longer than anybody waits."""
        parts = urlsplit(self.endpoint)
        if parts.scheme in getproxies():
            return
        lookup = threading.Thread(target=_look_up, args=(parts.hostname,), daemon=True)
        lookup.start()
        lookup.join(ANSWER_SECONDS)
        if lookup.is_alive():
            raise self._given_up(TimeoutError(), None, 0)

    def facts(self, name: str, commit: str) -> RemoteFile:
        """What the Hub says of a file: from the listing, or else by asking for the file itself."""
        listed = self.listed[name]
        digest = getattr(listed.lfs, "sha256", None)
        if listed.size is not None:
            return RemoteFile(name, listed.size, digest, digest or listed.blob_id or commit)
        from huggingface_hub import get_hf_file_metadata

        url = self._url(name, commit)
        facts = self.ask(
            lambda api: get_hf_file_metadata(url, token=self.token, timeout=ANSWER_SECONDS, endpoint=self.endpoint)
        )
        if facts.size is None:
            raise MachineError(f"{self.name}: {self.host} does not say how large {name} is; try again later")
        digest = facts.etag if facts.etag and len(facts.etag) == 64 else None
        return RemoteFile(name, facts.size, digest, facts.etag or commit)

    @contextmanager
    def stream(self, name: str, commit: str, start: int) -> Iterator[Any]:
        """The bytes of a file from `start` on. The client keeps the token from any other host it is sent to."""
        from huggingface_hub import get_session
        from huggingface_hub.utils import build_hf_headers, hf_raise_for_status

        headers = {**build_hf_headers(token=self.token), "Accept-Encoding": "identity"}  # ranges of the file itself
        if start:
            headers["Range"] = f"bytes={start}-"
        url = self._url(name, commit)
        with get_session().stream("GET", url, headers=headers, timeout=DATA_SECONDS, follow_redirects=True) as response:
            if response.status_code >= 400:
                response.read()
            hf_raise_for_status(response)
            self._require_commit([*response.history, response], name, commit)
            yield response

    def wait_after(self, error: Exception | None, failures: int) -> float:
        """Seconds until the next try; raises the error that the user sees where another one is of no use."""
        status = self._status(error)
        if status is not None and status not in BUSY and not self._has_expired(error, status):
            raise self._refusal(error, status) from None
        asked = _retry_after(error)
        if failures >= TRIES or asked > LONGEST_WAIT:
            raise self._given_up(error, status, asked) from None
        return asked or FIRST_WAIT * 2 ** max(failures - 1, 0)

    def _url(self, name: str, commit: str) -> str:
        from huggingface_hub import hf_hub_url

        return hf_hub_url(self.name, name, revision=commit, endpoint=self.endpoint)

    def _status(self, error: Exception | None) -> int | None:
        response = getattr(error, "response", None) if isinstance(error, self.refused) else None
        return getattr(response, "status_code", None)

    def _has_expired(self, error: Any, status: int) -> bool:
        """Whether a store that the Hub sent us to no longer takes the address: the next try gets a new one."""
        return status in (401, 403) and not str(error.response.url).startswith(self.endpoint)

    def _require_commit(self, responses: Sequence[Any], name: str, commit: str) -> None:
        served = {r.headers.get("x-repo-commit", commit) for r in responses}
        if served - {commit}:
            raise InputError(
                f"{self.name}: {name} is not served from the commit that the revision meant ({commit[:12]}): the "
                "repository changed while it was downloaded; run again, or name a commit with --revision"
            )

    def _refusal(self, error: Exception | None, status: int) -> UserError:
        kind = type(error).__name__
        if kind == "GatedRepoError" or status == 403:
            return InputError(f"{self.name} is gated or closed to this account (HTTP {status}): {self._visit()}")
        if kind.endswith("EntryNotFoundError"):
            return MissingError(f"{self.name} lists a file that it does not have; see {SITE}/{self.name}/tree/main")
        if kind == "RevisionNotFoundError":
            return MissingError(f"{self.name} has no revision '{self.revision}'; see {SITE}/{self.name}/commits/main")
        if status == 401 and self.token and kind != "RepositoryNotFoundError":
            return InputError(
                f"{self.name}: the access token was not accepted (401); make one at {SITE}/settings/tokens"
            )
        if status in (401, 404):
            near = near_miss(self.name, registered())
            return MissingError(
                f"{self.name} is not on {self.host}, or it is private{near} (litgpt download list shows "
                f"what is known); for a private or gated one visit {SITE}/{self.name} and give "
                "--access_token or set HF_TOKEN"
            )
        return InputError(f"{self.name}: {self.host} refuses to serve it (HTTP {status}); see {SITE}/{self.name}")

    def _visit(self) -> str:
        how = "with the account of your access token" if self.token else "then give --access_token or set HF_TOKEN"
        return f"visit {SITE}/{self.name} and accept its terms, {how}"

    def _given_up(self, error: Exception | None, status: int | None, asked: float) -> MachineError:
        if status is not None:
            when = f"in {asked:.0f} s" if asked else "later"
            return MachineError(
                f"{self.name}: {self.host} is busy (HTTP {status}); run the same command {when}, "
                "it goes on with what was fetched"
            )
        cause = (str(error) if type(error).__name__ == "ConnectError" else type(error).__name__) if error else "cut off"
        return MachineError(
            f"{self.name} could not be fetched: no network connection to {self.host} ({cause}); check the network "
            "and run the same command again, it goes on with what was fetched"
        )


@contextmanager
def told_at_once() -> Iterator[None]:
    """Inside, packages that ask the Hub themselves hear at once that it is out of reach, and take what they have kept.

    They would try for half a minute.
    """
    from huggingface_hub import get_session
    from huggingface_hub.errors import OfflineModeIsEnabled

    met: set[str] = set()

    def require(request: Any) -> None:
        host, scheme = request.url.host, request.url.scheme
        if host in met or scheme in getproxies():
            return
        port = request.url.port or (443 if scheme == "https" else 80)
        try:
            Client(host, None, None).require_resolver()
            socket.create_connection((host, port), timeout=ANSWER_SECONDS).close()
        except (OSError, MachineError) as error:
            raise OfflineModeIsEnabled(f"no network connection to {host} ({error})") from None
        met.add(host)

    session = get_session()
    hooks = session.event_hooks
    session.event_hooks = {**hooks, "request": [*hooks["request"], require]}
    try:
        yield
    finally:
        session.event_hooks = hooks


def registered() -> list[str]:
    """The `org/name` of every model that is known, in the order of the families."""
    rows = (row["hf_config"] for family in families.FAMILIES for row in family.rows)
    return list(dict.fromkeys(f"{row['org']}/{row['name']}" for row in rows))


def _look_up(host: str | None) -> None:
    with suppress(OSError, UnicodeError):  # the client will say the same
        socket.getaddrinfo(host, None)


def checked_token(token: str | None) -> str | None:
    """A token that can be sent; the error of the client would show it."""
    token = (token or "").strip()
    if not all("!" <= c <= "~" for c in token):
        raise InputError(
            "the access token holds characters that no token has; copy it again (--access_token, HF_TOKEN)"
        )
    return token or None


def _retry_after(error: Exception | None) -> float:
    """Seconds that a busy server asks for, 0 where it asks for none."""
    response = getattr(error, "response", None)
    text = response.headers.get("retry-after", "") if response is not None else ""
    if text.strip().isdigit():
        return float(text)
    with suppress(ValueError, TypeError):
        return max(parsedate_to_datetime(text).timestamp() - time.time(), 0.0)
    return 0.0
