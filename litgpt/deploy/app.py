"""The application: endpoints for clients, and those for who looks after the server."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import JSONResponse, Response

from litgpt import __version__
from litgpt.deploy import http, openai, page, predict
from litgpt.deploy.refusals import Refusal
from litgpt.deploy.service import Service


def build(service: Service, *, api_path: str, api_key: str | None, max_body: int, origins: Sequence[str] = ()) -> Any:
    """The ASGI application.

    Args:
        api_path: of /predict.
        api_key: what clients must show; None: nothing.
        max_body: bytes that a request may have.
        origins: web sites whose pages may ask from a browser.
    """
    # no pages about the API: those that FastAPI has load scripts from elsewhere
    app = FastAPI(title="LitGPT", version=__version__, docs_url=None, redoc_url=None)
    app.include_router(predict.router(service, api_path))
    app.include_router(openai.router(service))
    app.router.routes += page.routes()
    scheduler = service.scheduler

    @app.get(http.HEALTH)
    async def health() -> dict[str, Any]:
        """Whether the server lives."""
        ready = sum(replica.is_ready for replica in scheduler.replicas)
        status = "ok" if ready == len(scheduler.replicas) else "degraded"
        return {"status": status, "replicas_ready": ready, "replicas": len(scheduler.replicas)}

    @app.get("/ready", responses={503: {"description": "Not now"}})
    async def ready() -> Response:
        """Whether a request would be answered."""
        return JSONResponse({"ready": scheduler.is_ready}, 200 if scheduler.is_ready else 503)

    @app.get("/metrics")
    async def metrics() -> Response:
        """Counts and times, for Prometheus."""
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4")

    app.add_exception_handler(Refusal, http.on_refusal)
    app.add_exception_handler(http.ClientGone, http.on_gone)
    app.add_exception_handler(HTTPException, http.on_http_error)
    app.add_exception_handler(RequestValidationError, http.on_invalid)
    app.add_exception_handler(Exception, http.on_mistake)
    routes = {path for path in app.openapi()["paths"] if "{" not in path}
    readable = {http.HEALTH, *page.files()}  # the page is the same for everybody, and asks for the key itself
    gate: Any = http.Gate(
        app, api_key=api_key, max_body=max_body, metrics=service.metrics, routes=routes | readable, open=readable
    )
    if origins:
        gate = CORSMiddleware(
            gate, allow_origins=list(origins), allow_methods=["*"], allow_headers=["Authorization", "Content-Type"]
        )
    return gate
