"""OpenAI's API: chat, completions, embeddings and the list of models, in its words and with its errors."""

from __future__ import annotations

import base64
import json
import secrets
import struct
import time
from collections.abc import AsyncGenerator, Sequence
from dataclasses import replace
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from litgpt.deploy import grammar, schemas, tools, wire
from litgpt.deploy.http import DONE, event, streamed, unless_gone
from litgpt.deploy.refusals import Refusal
from litgpt.deploy.schemas import ChatRequest, CompletionRequest, EmbeddingRequest, Error
from litgpt.deploy.service import Service, Writing, close_all, merged, refusing
from litgpt.deploy.text import Piece, ScoredText, scored_text
from litgpt.errors import shown

EVENTS = "text/event-stream"
EMBEDDED_AT_ONCE = 8  # texts between two decode steps
ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": Error} for status in (400, 401, 404, 413, 415, 422, 429, 503, 504)
}


def router(service: Service) -> APIRouter:
    routes = APIRouter(prefix="/v1", responses=ERRORS)
    created = int(time.time())

    @routes.post("/chat/completions")
    async def chat(request: Request, asked: ChatRequest) -> Response:
        """Answer a conversation."""
        return await Chat(service, asked).respond(request)

    @routes.post("/completions")
    async def completions(request: Request, asked: CompletionRequest) -> Response:
        """Continue texts as they are."""
        return await Completion(service, asked).respond(request)

    @routes.post("/embeddings")
    async def embeddings(request: Request, asked: EmbeddingRequest) -> Response:
        """Vectors for texts."""
        return await unless_gone(request, embedded(service, asked))

    def described(name: str) -> dict[str, Any]:
        return {"id": name, "object": "model", "created": created, "owned_by": "litgpt"}

    @routes.get("/models")
    async def models() -> dict[str, Any]:
        """What may be asked for."""
        return {"object": "list", "data": [described(name) for name in service.models]}

    @routes.get("/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        """One of them."""
        return described(service.model(name))

    return routes


def usage(writings: Sequence[Writing]) -> dict[str, Any]:
    prompt, new = sum(writing.n_prompt for writing in writings), sum(writing.n_new for writing in writings)
    cached = sum(writing.cached for writing in writings)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": new,
        "total_tokens": prompt + new,
        "prompt_tokens_details": {"cached_tokens": cached},
    }


def wants_usage(asked: schemas.Streamed) -> bool:
    if asked.stream_options is not None and not asked.stream:
        raise Refusal(422, "stream_options: only with stream", param="stream_options")
    return bool(asked.stream_options and asked.stream_options.include_usage)


# --------------------------------------------------------------------------------------------------------------- chat


class Chat:
    """One request to /v1/chat/completions."""

    def __init__(self, service: Service, asked: ChatRequest) -> None:
        self.service, self.asked = service, asked
        self.model = service.model(asked.model)
        self.head = {
            "id": f"chatcmpl-{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": self.model,
        }
        self.with_usage = wants_usage(asked)
        self.tools = [tool.function.model_dump(exclude_none=True) for tool in self._offered()]
        self.format = self._format()
        self.forced = asked.tool_choice == "required" or isinstance(asked.tool_choice, schemas.ToolChoice)

    def _offered(self) -> list[schemas.Tool]:
        """The tools that the model may call."""
        choice, offered = self.asked.tool_choice, list(self.asked.tools or ())
        if not offered and choice not in (None, "none", "auto"):
            raise Refusal(422, "tool_choice: there are no tools", param="tool_choice")
        if choice == "none":
            return []
        if isinstance(choice, schemas.ToolChoice):
            offered = [tool for tool in offered if tool.function.name == choice.function.name]
            if not offered:
                message = f"tool_choice: there is no tool {shown(choice.function.name)}"
                raise Refusal(422, message, param="tool_choice.function.name")
        return offered

    def _format(self) -> tools.Format | None:
        if not self.tools:
            return None
        found = tools.format_of(self.service.text.style)
        if found is None:
            raise Refusal(400, "tools: this model's prompt style has no place for tools", param="tools")
        return found

    async def respond(self, request: Request) -> Response:
        writing, readers = await self._begin()
        if self.asked.stream:
            return await streamed(request, self._chunks(writing, readers), event, EVENTS, DONE)
        scores: list[list[ScoredText]] = [[] for _ in writing.answers]

        async def read() -> None:
            async for piece in writing.pieces():
                scores[piece.index] += piece.scores

        await unless_gone(request, read())
        choices = [
            self._choice(answer.said, answer.finish_reason, readers[i], scores[i], i)
            for i, answer in enumerate(writing.answers)
        ]
        whole = {**self.head, "object": "chat.completion", "choices": choices, "usage": usage([writing])}
        return JSONResponse(whole)

    async def _begin(self) -> tuple[Writing, list[tools.Reader | None]]:
        service, asked, text = self.service, self.asked, self.service.text
        service.scheduler.require_place()
        most_asked, field = asked.max_tokens, "max_tokens"
        if asked.max_completion_tokens is not None:
            most_asked, field = asked.max_completion_tokens, "max_completion_tokens"
        logprobs = self._logprobs()
        messages = [templated(message) for message in asked.messages]
        offered = [{"type": "function", "function": tool} for tool in self.tools] or None
        ids = await refusing(text.chat, messages, offered, asked.chat_template_kwargs, param="messages")
        form = await self._form()
        if self.forced and self.format is not None and self.format.opening:
            ids = ids + text.tokenizer.encode_parts([(self.format.opening, True)]).ids
        most = service.room(ids, most_asked, None, "messages", field)
        shows = frozenset() if self.format is None else frozenset({self.format.opening, self.format.closing} - {""})
        n = asked.n or 1
        writing = service.write(
            ids,
            asked,
            n=n,
            most=most,
            ends=text.chat_ends,
            adapter=service.models[self.model],
            logprobs=logprobs,
            grammar=form,
            shows=shows,
        )
        return writing, [self._reader() for _ in range(n)]

    def _logprobs(self) -> int | None:
        if self.asked.top_logprobs is not None and not self.asked.logprobs:
            raise Refusal(422, "top_logprobs: only with logprobs", param="top_logprobs")
        return (self.asked.top_logprobs or 0) if self.asked.logprobs else None

    async def _form(self) -> str | None:
        """The grammar that the answer is held to."""
        wanted = self.asked.response_format
        schema: Any = None
        if self.forced and self.format is not None:
            schema, param = self.format.schema(self.tools), "tools"
        elif isinstance(wanted, schemas.JsonSchema):
            schema, param = wanted.json_schema.schema_, "response_format.json_schema.schema"
        elif isinstance(wanted, schemas.JsonObject):
            schema, param = grammar.ANY_OBJECT, "response_format"
        if schema is None:
            return None
        if self.forced and isinstance(wanted, (schemas.JsonSchema, schemas.JsonObject)):
            raise Refusal(400, "response_format: a forced tool call has a form of its own", param="response_format")
        form = await refusing(grammar.of_schema, schema, param=param)
        await refusing(self.service.text.grammars.require, form, param=param)
        return form

    def _reader(self) -> tools.Reader | None:
        if self.format is None:
            return None
        most = 1 if self.asked.parallel_tool_calls is False else None
        return tools.Reader(self.format, frozenset(tool["name"] for tool in self.tools), self.forced, most)

    def _choice(
        self, said: str, reason: str | None, reader: tools.Reader | None, scores: list[ScoredText], index: int
    ) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": said, "refusal": None}
        if reader is not None:
            before, _ = reader.push(said)
            rest, _ = reader.finish()
            message["content"] = before + rest
            if reader.calls:
                message["content"] = message["content"].strip() or None
                message["tool_calls"] = [called(call) for call in reader.calls]
                reason = "tool_calls" if reason == "stop" else reason
        logprobs = {"content": [chat_logprob(score) for score in scores], "refusal": None}
        return {
            "index": index,
            "message": message,
            "logprobs": logprobs if self.asked.logprobs else None,
            "finish_reason": reason,
        }

    async def _chunks(
        self, writing: Writing, readers: list[tools.Reader | None]
    ) -> AsyncGenerator[dict[str, Any], None]:
        begun: set[int] = set()
        async for piece in writing.pieces():
            if piece.index not in begun:
                begun.add(piece.index)
                yield self._chunk(piece.index, {"role": "assistant", "content": ""})
            for chunk in self._news(piece, readers[piece.index]):
                yield chunk
        if self.with_usage:
            yield {**self.head, "object": "chat.completion.chunk", "choices": [], "usage": usage([writing])}

    def _news(self, piece: Piece, reader: tools.Reader | None) -> list[dict[str, Any]]:
        """The chunks that a piece makes."""
        text, reason, deltas = piece.text, piece.finish_reason, []
        if reader is not None:
            text, calls = reader.push(text)
            if reason is not None:
                rest, more = reader.finish()
                text, calls = text + rest, calls + more
                reason = "tool_calls" if reader.calls and reason == "stop" else reason
            deltas = [{"index": reader.calls.index(call), **called(call)} for call in calls]
        chunks = []
        if text or piece.scores:
            chunks.append(self._chunk(piece.index, {"content": text}, piece.scores))
        chunks += [self._chunk(piece.index, {"tool_calls": [delta]}) for delta in deltas]
        if reason is not None:
            chunks.append(self._chunk(piece.index, {}, reason=reason))
        return chunks

    def _chunk(
        self, index: int, delta: dict[str, Any], scores: Sequence[ScoredText] = (), reason: str | None = None
    ) -> dict[str, Any]:
        logprobs = {"content": [chat_logprob(score) for score in scores], "refusal": None} if scores else None
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
        chunk = {**self.head, "object": "chat.completion.chunk", "choices": [choice]}
        return {**chunk, "usage": None} if self.with_usage else chunk


def templated(
    message: schemas.SystemMessage | schemas.UserMessage | schemas.AssistantMessage | schemas.ToolMessage,
) -> dict[str, Any]:
    """A message as chat templates want it: text in one piece, and arguments of calls as values."""
    result: dict[str, Any] = {"role": "system" if message.role == "developer" else message.role}
    content = message.content
    if isinstance(content, list):
        content = "".join(part.text for part in content)
    if content is not None or message.role == "assistant":
        result["content"] = content if content is not None else ""
    if message.name is not None:
        result["name"] = message.name
    if isinstance(message, schemas.ToolMessage):
        result["tool_call_id"] = message.tool_call_id
    if isinstance(message, schemas.AssistantMessage):
        if message.reasoning_content is not None:
            result["reasoning_content"] = message.reasoning_content
        if message.tool_calls:
            result["tool_calls"] = [_call_again(call) for call in message.tool_calls]
    return result


def _call_again(call: schemas.ToolCall) -> dict[str, Any]:
    try:
        arguments = json.loads(call.function.arguments or "{}")
    except (ValueError, RecursionError):
        raise Refusal(
            422, "messages: the arguments of a tool call are not JSON", param="messages.tool_calls.function.arguments"
        ) from None
    return {"id": call.id, "type": "function", "function": {"name": call.function.name, "arguments": arguments}}


def called(call: tools.Call) -> dict[str, Any]:
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}


def chat_logprob(score: ScoredText) -> dict[str, Any]:
    def entry(text: str, logprob: float) -> dict[str, Any]:
        return {"token": text, "logprob": logprob, "bytes": list(text.encode("utf-8", "replace"))}

    top = [entry(text, logprob) for _, text, logprob in score.top]
    return {**entry(score.text, score.logprob), "top_logprobs": top}


# -------------------------------------------------------------------------------------------------------- completions


class Completion:
    """One request to /v1/completions: one or several prompts, n answers to each."""

    def __init__(self, service: Service, asked: CompletionRequest) -> None:
        self.service, self.asked = service, asked
        self.model = service.model(asked.model)
        self.n = asked.n or 1
        if asked.best_of not in (None, self.n):
            raise Refusal(422, "best_of: only as many as n; this server shows all answers it writes", param="best_of")
        self.head = {
            "id": f"cmpl-{secrets.token_hex(12)}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": self.model,
        }
        self.with_usage = wants_usage(asked)

    async def respond(self, request: Request) -> Response:
        writings = await self._begin()
        try:
            before = await unless_gone(request, self._echoes(writings))
        except BaseException:
            close_all(writings)
            raise
        if self.asked.stream:
            return await streamed(request, self._chunks(writings, before), event, EVENTS, DONE)
        scores: dict[tuple[int, int], list[ScoredText]] = {}

        async def read() -> None:
            async for number, piece in merged(writings):
                scores.setdefault((number, piece.index), []).extend(piece.scores)

        await unless_gone(request, read())
        choices = [
            self._choice(number, i, before[number], answer.said, scores.get((number, i), []), answer.finish_reason)
            for number, writing in enumerate(writings)
            for i, answer in enumerate(writing.answers)
        ]
        return JSONResponse({**self.head, "choices": choices, "usage": usage(writings)})

    async def _begin(self) -> list[Writing]:
        service, asked = self.service, self.asked
        service.scheduler.require_place()
        rows = [await self._ids(prompt) for prompt in listed(asked.prompt)]
        if len(rows) * self.n > service.max_n:
            message = f"{len(rows)} prompts with {self.n} answers each; this server writes {service.max_n} at most"
            raise Refusal(422, f"n: {message}", param="n")
        most = [service.room(ids, asked.max_tokens, None, "prompt", "max_tokens") for ids in rows]
        writings: list[Writing] = []
        try:
            for ids, longest in zip(rows, most, strict=True):
                writings.append(
                    service.write(
                        ids,
                        asked,
                        n=self.n,
                        most=longest,
                        ends=service.text.raw_ends,
                        adapter=service.models[self.model],
                        logprobs=asked.logprobs,
                    )
                )
        except Refusal:
            close_all(writings)
            raise
        return writings

    async def _ids(self, prompt: str | list[int]) -> list[int]:
        if isinstance(prompt, str):
            return await refusing(self.service.text.raw, prompt, param="prompt")
        self.service.require_ids(prompt, "prompt")
        return prompt

    async def _echoes(self, writings: Sequence[Writing]) -> list[tuple[str, list[ScoredText | None]]]:
        """The text of each prompt and the scores of its tokens, where they are asked for."""
        if not self.asked.echo:
            return [("", [])] * len(writings)
        text, found = self.service.text, []
        for writing in writings:
            ids = list(writing.answers[0].prompt)
            stream, starts, said = text.tokenizer.stream(), [], ""
            for token in ids:
                starts.append(len(said))
                said += stream.push(token)
            said += stream.flush()
            scores: list[ScoredText | None] = []
            if self.asked.logprobs is not None:
                adapter = self.service.models[self.model]
                scored: list[wire.Scored] = []
                if len(ids) > 1:
                    scored = await self.service.ask(wire.Score(0, ids, self.asked.logprobs, adapter))
                scores = [None, *(scored_text(text, s, start) for s, start in zip(scored, starts[1:], strict=True))]
            found.append((said, scores))
        return found

    def _choice(
        self,
        number: int,
        index: int,
        before: tuple[str, Sequence[ScoredText | None]],
        said: str,
        scores: Sequence[ScoredText],
        reason: str | None,
    ) -> dict[str, Any]:
        moved = [replace(score, offset=score.offset + len(before[0])) for score in scores]
        return {
            "index": number * self.n + index,
            "text": before[0] + said,
            "logprobs": None if self.asked.logprobs is None else self._logprobs(number, [*before[1], *moved]),
            "finish_reason": reason,
        }

    def _logprobs(self, number: int, scores: Sequence[ScoredText | None]) -> dict[str, Any]:
        first = ""
        if scores and scores[0] is None:
            ids = listed(self.asked.prompt)[number]
            first = self.service.text.piece(ids[0] if isinstance(ids, list) else self.service.text.raw(ids)[0])
        return {
            "tokens": [first if score is None else score.text for score in scores],
            "token_logprobs": [None if score is None else score.logprob for score in scores],
            "top_logprobs": [
                None if score is None else {text: logprob for _, text, logprob in score.top} for score in scores
            ],
            "text_offset": [0 if score is None else score.offset for score in scores],
        }

    async def _chunks(
        self, writings: Sequence[Writing], before: Sequence[tuple[str, list[ScoredText | None]]]
    ) -> AsyncGenerator[dict[str, Any], None]:
        begun: set[tuple[int, int]] = set()
        async for number, piece in merged(writings):
            lead: tuple[str, list[ScoredText | None]] = ("", [])
            if (number, piece.index) not in begun:
                begun.add((number, piece.index))
                lead = before[number]
            if not (piece.text or piece.scores or piece.finish_reason or lead[0]):
                continue
            choice = self._choice(number, piece.index, lead, piece.text, piece.scores, piece.finish_reason)
            chunk = {**self.head, "choices": [choice]}
            yield {**chunk, "usage": None} if self.with_usage else chunk
        if self.with_usage:
            yield {**self.head, "choices": [], "usage": usage(writings)}


def listed(prompt: str | Sequence[Any]) -> list[Any]:
    """The prompts, each a text or ids."""
    return [prompt] if isinstance(prompt, str) or isinstance(prompt[0], int) else list(prompt)


# --------------------------------------------------------------------------------------------------------- embeddings


async def embedded(service: Service, asked: EmbeddingRequest) -> Response:
    model, text = service.model(asked.model), service.text
    service.scheduler.require_place()
    if asked.dimensions not in (None, text.width):
        raise Refusal(422, f"dimensions: this model's vectors have {text.width}, and are not cut", param="dimensions")
    rows: list[list[int]] = []
    for one in listed(asked.input):
        ids = await refusing(text.raw, one, param="input") if isinstance(one, str) else one
        service.require_ids(ids, "input")
        if len(ids) > min(text.context, service.max_prompt_tokens or text.context):
            raise Refusal(
                400,
                f"input: {len(ids)} tokens are more than the context of {text.context}; shorten it",
                param="input",
                code="context_length_exceeded",
            )
        rows.append(ids)
    by_length = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    vectors: list[list[float]] = [[] for _ in rows]
    for start in range(0, len(rows), EMBEDDED_AT_ONCE):
        batch = by_length[start : start + EMBEDDED_AT_ONCE]
        found = await service.ask(wire.Embed(0, [rows[i] for i in batch], service.models[model]))
        for i, vector in zip(batch, found, strict=True):
            vectors[i] = vector
    is_coded = asked.encoding_format == "base64"
    data = [
        {"object": "embedding", "index": i, "embedding": _coded(vector) if is_coded else vector}
        for i, vector in enumerate(vectors)
    ]
    count = sum(map(len, rows))
    return JSONResponse(
        {
            "object": "list",
            "data": data,
            "model": model,
            "usage": {"prompt_tokens": count, "total_tokens": count},
        }
    )


def _coded(vector: Sequence[float]) -> str:
    return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()
