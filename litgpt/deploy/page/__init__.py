"""The page at `/`: files of ours, the same for everybody. It holds no secrets and loads nothing from elsewhere."""

from __future__ import annotations

import hashlib
from collections.abc import Awaitable, Callable
from pathlib import Path

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript"}
HEADERS = {
    # scripts and styles are these files alone, nothing turns text into HTML, and the page talks to this server alone
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; base-uri 'none'; "
        "form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-cache",  # kept, but asked for again each time: an ETag makes that cheap
}


def files() -> dict[str, Path]:
    """Path on the server -> file. They name each other relatively, so that a proxy may put them below a prefix."""
    here = Path(__file__).parent
    found = {f"/page/{file.name}": file for file in sorted(here.iterdir()) if file.suffix in (".css", ".js")}
    return {"/": here / "index.html", **found}


def routes() -> list[Route]:
    """What answers GET and HEAD of each file; no part of the API's document."""
    return [Route(path, _answering(file), include_in_schema=False) for path, file in files().items()]


def _answering(file: Path) -> Callable[[Request], Awaitable[Response]]:
    content = file.read_bytes()
    tag = f'"{hashlib.sha256(content).hexdigest()[:32]}"'

    async def answer(request: Request) -> Response:
        headers = {**HEADERS, "ETag": tag}
        known = {given.strip().removeprefix("W/") for given in request.headers.get("If-None-Match", "").split(",")}
        if tag in known or "*" in known:
            return Response(status_code=304, headers=headers)
        return Response(content, headers=headers, media_type=TYPES[file.suffix])

    return answer
