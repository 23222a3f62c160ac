"""`POST /predict`: a prompt in, an answer out, as LitGPT has had it from the beginning.

{"prompt": "..."} -> {"output": "..."}; streamed, a line {"output": "..."} for each piece.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from litgpt.deploy.http import collected, json_line, streamed, unless_gone
from litgpt.deploy.schemas import Error, PredictAnswer, PredictRequest
from litgpt.deploy.service import Service, Writing, refusing


def router(service: Service, path: str) -> APIRouter:
    routes = APIRouter()

    @routes.post(path, response_model=PredictAnswer, responses={422: {"model": Error}})
    async def predict(request: Request, asked: PredictRequest) -> Response:
        """Answer a prompt."""
        system = [{"role": "system", "content": asked.sys_prompt}] if asked.sys_prompt else []
        text = service.text
        service.scheduler.require_place()
        ids = await refusing(text.chat, [*system, {"role": "user", "content": asked.prompt}], param="prompt")
        most = service.room(ids, asked.max_new_tokens, service.max_new_tokens, "prompt", "max_new_tokens")
        writing = service.write(ids, asked, n=1, most=most, ends=text.chat_ends, adapter=None)
        if service.streams if asked.stream is None else asked.stream:
            return await streamed(request, _outputs(writing), json_line, "application/x-ndjson")
        await unless_gone(request, collected(writing.pieces()))
        return JSONResponse({"output": writing.answers[0].said})

    return routes


async def _outputs(writing: Writing) -> AsyncGenerator[dict[str, Any], None]:
    said = False
    async for piece in writing.pieces():
        if piece.text:
            said = True
            yield {"output": piece.text}
    if not said:
        yield {"output": ""}
