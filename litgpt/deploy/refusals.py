"""What a client is told when it gets no answer: an HTTP status and OpenAI's error object."""

from __future__ import annotations

from typing import Any

from litgpt.deploy import wire
from litgpt.errors import printable

TYPES = {
    401: "authentication_error",
    404: "not_found_error",
    408: "timeout_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "server_error",
    504: "timeout_error",
}
RETRY_AFTER = "1"  # seconds


class Refusal(Exception):
    """`param` is the field that is wrong, `code` a word for programs."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, printable(message), param, code
        self.headers = headers or {}

    def body(self) -> dict[str, Any]:
        kind = TYPES.get(self.status, "invalid_request_error")
        param = None if self.param is None else printable(self.param)
        return {"error": {"message": self.message, "type": kind, "param": param, "code": self.code}}


def overloaded() -> Refusal:
    return Refusal(
        429, "too many requests wait already; try again", code="queue_full", headers={"Retry-After": RETRY_AFTER}
    )


def unavailable(why: str) -> Refusal:
    return Refusal(503, why, code="unavailable", headers={"Retry-After": RETRY_AFTER})


def refused(event: wire.Refused) -> Refusal:
    """As a worker says it."""
    if event.status == 503:
        return unavailable(event.message)
    return Refusal(event.status, event.message, code="internal_error" if event.status == 500 else None)


def lost() -> Refusal:
    return unavailable("the worker that wrote the answer died; try again")


def too_late(seconds: float) -> Refusal:
    return Refusal(504, f"the answer took longer than {seconds:g} seconds", code="timeout")


def too_long(n_prompt: int, n_new: int, context: int, param: str) -> Refusal:
    asked = f" and {n_new} for the answer" if n_new else ""
    message = f"the model's context is {context} tokens, but the prompt has {n_prompt}{asked}; shorten it" + (
        " or ask for a shorter answer" if n_new else " (an answer needs at least one)"
    )
    return Refusal(400, message, param=param, code="context_length_exceeded")
