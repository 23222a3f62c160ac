"""HTTP around the endpoints: who may ask, how much, what is counted, and what a refusal looks like."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import sys
import time
import traceback
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, MutableMapping
from typing import Any, TypeVar

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response, StreamingResponse

from litgpt.deploy.metrics import Metrics
from litgpt.deploy.refusals import Refusal

Found = TypeVar("Found")
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

HEALTH = "/health"
BODY_SECONDS = 60.0  # in which the body of a request must have come


class Gate:
    """Stands before the application (ASGI): the key, the size and type of what is sent, and the count of it all.

    open: paths that may be read without a key.
    """

    def __init__(
        self, app: Any, *, api_key: str | None, max_body: int, metrics: Metrics, routes: set[str], open: set[str]
    ) -> None:
        self.app, self.max_body, self.metrics, self.routes, self.open = app, max_body, metrics, routes, open
        self._key = None if api_key is None else _digest(api_key)

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            if scope["type"] == "websocket":
                await receive()
                await send({"type": "websocket.close", "code": 1008})
            return
        route = scope["path"] if scope["path"] in self.routes else "other"
        started, status = time.monotonic(), 500

        async def counted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._pass(scope, receive, counted)
        finally:
            self.metrics.requests.labels(route, str(status)).inc()
            self.metrics.seconds.labels(route).observe(time.monotonic() - started)

    async def _pass(self, scope: Message, receive: Receive, send: Send) -> None:
        try:
            self._require_key(scope)
            receive = await self._body(scope, receive)
        except Refusal as refusal:
            await answer(refusal)(scope, receive, send)
            return
        except ClientGone:
            return
        await self.app(scope, receive, send)

    def _require_key(self, scope: Message) -> None:
        is_open = scope["path"] in self.open and scope["method"] in ("GET", "HEAD")
        if self._key is None or is_open:
            return
        given = _header(scope, b"authorization")
        kind, _, key = given.partition(" ")
        if not hmac.compare_digest(_digest(key.strip()), self._key) or kind.lower() != "bearer":
            raise Refusal(
                401,
                "a valid API key is needed, as `Authorization: Bearer KEY`",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )

    async def _body(self, scope: Message, receive: Receive) -> Receive:
        """The whole body, if it is one that we take; what comes after it is still heard."""
        if scope["method"] not in ("POST", "PUT", "PATCH"):
            return receive
        length = _header(scope, b"content-length")
        if length.isdecimal() and len(length) < 20 and int(length) > self.max_body:
            raise self._too_large()
        kind = _header(scope, b"content-type").partition(";")[0].strip().lower()
        if scope["path"] in self.routes and kind != "application/json":
            raise Refusal(415, "send JSON, with the header `Content-Type: application/json`")
        try:
            body = await asyncio.wait_for(self._read(receive), BODY_SECONDS)
        except asyncio.TimeoutError:
            raise Refusal(408, "the body of the request did not come in time") from None
        rest = [{"type": "http.request", "body": body, "more_body": False}]

        async def again() -> Message:
            return rest.pop() if rest else await receive()

        return again

    async def _read(self, receive: Receive) -> bytes:
        parts, size = [], 0
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ClientGone
            size += len(message.get("body", b""))
            if size > self.max_body:
                raise self._too_large()
            parts.append(message.get("body", b""))
            if not message.get("more_body"):
                return b"".join(parts)

    def _too_large(self) -> Refusal:
        return Refusal(413, f"the request is larger than {self.max_body} bytes", code="request_too_large")


class ClientGone(Exception):
    """Nobody reads the answer any more."""


def _digest(key: str) -> bytes:
    """Of one length whatever the key, so that comparing tells nothing about it."""
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


def _header(scope: Message, name: bytes) -> str:
    return next((value.decode("latin-1") for key, value in scope["headers"] if key == name), "")


# ------------------------------------------------------------------------------------------------------------- errors


def answer(refusal: Refusal) -> Response:
    return JSONResponse(refusal.body(), refusal.status, headers=refusal.headers)


async def on_refusal(request: Request, error: Exception) -> Response:
    assert isinstance(error, Refusal)
    return answer(error)


async def on_gone(request: Request, error: Exception) -> Response:
    return Response(status_code=499)


async def on_http_error(request: Request, error: Exception) -> Response:
    """What the routing says: no such path, no such method."""
    assert isinstance(error, HTTPException)
    words = {404: f"there is no {request.url.path}", 405: f"{request.url.path} does not take {request.method}"}
    message = words.get(error.status_code, str(error.detail))
    return answer(Refusal(error.status_code, message, headers=dict(error.headers or {})))


async def on_invalid(request: Request, error: Exception) -> Response:
    """The first field that is wrong, by name."""
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    if first["type"] == "json_invalid":
        return answer(Refusal(400, "the body is not JSON", code="invalid_json"))
    place = [str(part) for part in first["loc"][1:]]
    field = ".".join(place)
    message = "unknown field" if first["type"] == "extra_forbidden" else first["msg"]
    where = f"{field[:200]}: " if field else "the body: "
    return answer(Refusal(422, where + message[:300], param=field[:200] or None, code=first["type"]))


async def on_mistake(request: Request, error: Exception) -> Response:
    """A mistake of ours: where it is goes to the log, without what was asked."""
    where = traceback.extract_tb(error.__traceback__)[-1]
    print(f"litgpt serve: {type(error).__name__} at {where.filename}:{where.lineno}", file=sys.stderr)
    return answer(Refusal(500, "the server made a mistake", code="internal_error"))


# ------------------------------------------------------------------------------------------------------------ answers


async def unless_gone(request: Request, work: Awaitable[Found]) -> Found:
    """The result of `work`, which is cancelled when the client hangs up."""
    task: asyncio.Future[Any] = asyncio.ensure_future(work)
    gone: asyncio.Future[Any] = asyncio.ensure_future(_hung_up(request.receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGone
        result: Found = task.result()
        return result
    finally:
        for each in (task, gone):
            each.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _hung_up(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class Lines(StreamingResponse):
    """Lines as they come; the client that hangs up ends them."""

    def __init__(self, lines: AsyncGenerator[bytes, None], media_type: str) -> None:
        super().__init__(lines, media_type=media_type, headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        self.lines = lines

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self.lines.aclose()


async def streamed(
    request: Request,
    objects: AsyncGenerator[dict[str, Any], None],
    line: Callable[[Any], bytes],
    media_type: str,
    last: bytes = b"",
) -> Response:
    """A response of one line for each object. It begins with the first, so that a refusal has its own status."""
    try:
        first = await unless_gone(request, anext(objects))
    except BaseException:
        await objects.aclose()
        raise

    async def lines() -> AsyncGenerator[bytes, None]:
        try:
            yield line(first)
            async for found in objects:
                yield line(found)
            yield last
        except Refusal as refusal:
            yield line(refusal.body())
        finally:
            await objects.aclose()

    return Lines(lines(), media_type)


async def collected(pieces: AsyncIterator[Any]) -> None:
    """Read to the end, for what the reading does."""
    async for _ in pieces:
        pass


def dumps(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace")


def event(value: Any) -> bytes:
    """A server-sent event."""
    return b"data: " + dumps(value) + b"\n\n"


DONE = b"data: [DONE]\n\n"


def json_line(value: Any) -> bytes:
    return dumps(value) + b"\n"
