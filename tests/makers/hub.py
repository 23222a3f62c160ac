"""A small stand-in for the Hugging Face Hub on 127.0.0.1, with the faults of a real one."""

from __future__ import annotations

import hashlib
import json
import threading
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

LARGE = (".safetensors", ".bin", ".model")  # kept by the store of large files: their sha256 is known


@dataclass
class Request:
    method: str
    path: str
    headers: dict[str, str]
    sent: int = 0


@dataclass
class Fault:
    """What a path answers, `times` times, instead of what it should."""

    times: int
    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    cut_at: int = -1  # bytes of the body, then the connection drops


class StandIn:
    """Repositories by name; each is a list of commits, each commit a mapping of file names to bytes.

    Those named "datasets/org/name" are data sets.
    """

    def __init__(self) -> None:
        self.commits: dict[str, dict[str, dict[str, bytes]]] = defaultdict(dict)
        self.branches: dict[str, str] = {}
        self.gated: set[str] = set()
        self.faults: dict[str, Fault] = {}  # by the end of the path
        self.requests: list[Request] = []
        self.storage = ""  # the address of another host to which large files are redirected
        self.has_sizes = True
        self.has_ranges = True
        self.wrong_commit = ""
        self.after_request: Any = None
        self.slow = 0.0
        self.server = _Server(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def push(self, repo: str, files: dict[str, bytes]) -> str:
        """A new commit on main; returns its id."""
        commit = hashlib.sha1(f"{repo} {len(self.commits[repo])}".encode()).hexdigest()
        self.commits[repo][commit] = dict(files)
        self.branches[repo] = commit
        return commit

    def bytes_sent(self, name: str) -> int:
        return sum(r.sent for r in self.requests if r.path.endswith(name) and r.method == "GET")

    def gets(self, name: str) -> list[Request]:
        return [r for r in self.requests if r.path.endswith(name) and r.method == "GET"]


@contextmanager
def stand_in() -> Iterator[StandIn]:
    """A running stand-in."""
    hub = StandIn()
    thread = threading.Thread(target=hub.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.server.shutdown()
        hub.server.server_close()
        thread.join()


def _blob(content: bytes) -> str:
    """The id that git has for a file."""
    return hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()


def _entry(name: str, content: bytes) -> dict[str, Any]:
    return {"type": "file", "path": name, "size": len(content), "oid": _blob(content)}


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that was killed is no news."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: StandIn

    def log_message(self, *args: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._serve()

    def do_GET(self) -> None:
        self._serve()

    def do_POST(self) -> None:
        self._serve()

    def _serve(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.asked = Request(self.command, path, {k.lower(): v for k, v in self.headers.items()})
        self.hub.requests.append(self.asked)
        fault = next((f for end, f in self.hub.faults.items() if path.endswith(end) and f.times > 0), None)
        if fault is not None:
            fault.times -= 1
            if fault.status:
                self._answer(fault.status, b"{}", fault.headers)
                return
        parts = path.strip("/").split("/")
        if parts[:2] == ["api", "models"]:
            self._describe("/".join(parts[2:4]), parts[5] if len(parts) > 5 else "main")
        elif parts[:2] == ["api", "datasets"]:
            question, revision = parts[4:6] or ("revision", "main")
            self._describe_data("/".join(parts[1:4]), question, revision, "/".join(parts[6:]))
        elif parts[0] == "datasets":
            self._send_data("/".join(parts[:3]), parts[4], "/".join(parts[5:]), fault)
        elif len(parts) < 5:
            self._answer(404, b"{}", {})
        else:
            self._send_file("/".join(parts[:2]), parts[3], "/".join(parts[4:]), fault)
        if self.hub.after_request:
            self.hub.after_request(self.asked)

    def _describe_data(self, repo: str, question: str, revision: str, folder: str) -> None:
        commit = self._commit(repo, revision)
        if commit is None or question == "revision":
            self._describe(repo, revision)
            return
        files = self.hub.commits[repo][commit]
        if self.command == "POST":
            asked = self.rfile.read(int(self.headers["content-length"]))
            paths = json.loads(asked)["paths"] if asked[:1] == b"{" else parse_qs(asked.decode()).get("paths", [])
            listed = [_entry(name, content) for name, content in files.items() if name in paths]
        else:
            listed = [_entry(name, content) for name, content in files.items() if name.rpartition("/")[0] == folder]
            tops = {name.split("/")[0] for name in files if "/" in name and not folder}
            listed += [{"type": "directory", "path": top, "oid": _blob(top.encode())} for top in sorted(tops)]
        self._answer(200, json.dumps(listed).encode(), {})

    def _send_data(self, repo: str, revision: str, name: str, fault: Fault | None) -> None:
        commit = self._commit(repo, revision)
        if commit is None:
            self._answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})
        elif name not in self.hub.commits[repo][commit]:
            self._answer(404, b"{}", {"X-Error-Code": "EntryNotFound"})
        else:
            self._send_file(repo, commit, name, fault)

    def _commit(self, repo: str, revision: str) -> str | None:
        commit = self.hub.branches.get(repo) if revision == "main" else revision
        return commit if commit in self.hub.commits[repo] else None

    def _describe(self, repo: str, revision: str) -> None:
        if not self.hub.commits.get(repo):
            self._answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})
            return
        commit = self.hub.branches[repo] if revision == "main" else revision
        if commit not in self.hub.commits[repo]:
            self._answer(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
            return
        files = self.hub.commits[repo][commit]
        listed = [self._listed(name, content) for name, content in files.items()]
        self._answer(200, json.dumps({"id": repo, "sha": commit, "siblings": listed}).encode(), {})

    def _listed(self, name: str, content: bytes) -> dict[str, Any]:
        if not self.hub.has_sizes:
            return {"rfilename": name}
        listed: dict[str, Any] = {"rfilename": name, "size": len(content), "blobId": _blob(content)}
        if name.endswith(LARGE):
            digest = hashlib.sha256(content).hexdigest()
            listed["lfs"] = {"sha256": digest, "size": len(content), "pointerSize": 100}
        return listed

    def _send_file(self, repo: str, commit: str, name: str, fault: Fault | None) -> None:
        if repo in self.hub.gated and "authorization" not in self.asked.headers:
            self._answer(401, b"{}", {"X-Error-Code": "GatedRepo"})
            return
        content = self.hub.commits[repo][commit][name]
        digest = hashlib.sha256(content).hexdigest() if name.endswith(LARGE) else hashlib.sha1(content).hexdigest()
        headers = {"X-Repo-Commit": self.hub.wrong_commit or commit, "ETag": f'"{digest}"'}
        if self.hub.storage and name.endswith(LARGE):
            self._answer(302, b"", {**headers, "Location": f"{self.hub.storage}{self.path}"})
            return
        begin, status = 0, 200
        if self.hub.has_ranges and (asked := self.asked.headers.get("range")):
            begin, status = int(asked.removeprefix("bytes=").split("-")[0]), 206
            headers["Content-Range"] = f"bytes {begin}-{len(content) - 1}/{len(content)}"
        self._answer(status, content[begin:], headers, -1 if fault is None else fault.cut_at)

    def _answer(self, status: int, body: bytes, headers: dict[str, str], cut_at: int = -1) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        body = body if cut_at < 0 else body[:cut_at]
        for start in range(0, len(body), 1 << 16):
            piece = body[start : start + (1 << 16)]
            try:
                self.wfile.write(piece)
            except OSError:
                self.close_connection = True
                return
            self.asked.sent += len(piece)
            if self.hub.slow:
                threading.Event().wait(self.hub.slow)
        self.close_connection = self.close_connection or cut_at >= 0
