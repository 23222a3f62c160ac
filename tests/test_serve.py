"""`litgpt serve` as clients see it: the official `openai` client, and plain HTTP."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest
import torch

from litgpt import LLM
from litgpt.generate.sampling import Sampling
from litgpt.generate.session import Session, conversation, load_session
from tests.makers.servers import CONTEXT, Server, make_served, serving

ASK = [{"role": "user", "content": "The mill"}]
SCHEMA = {
    "type": "object",
    "properties": {"colour": {"enum": ["red", "blue"]}, "size": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["colour", "size"],
    "additionalProperties": False,
}
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a town",
        "parameters": {
            "type": "object",
            "properties": {"town": {"enum": ["Rome", "Oslo"]}},
            "required": ["town"],
            "additionalProperties": False,
        },
    },
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_served(tmp_path_factory.mktemp("served"))


@pytest.fixture(scope="module")
def server(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    said = tmp_path_factory.mktemp("said") / "said.txt"
    with serving(checkpoint, "--model_name", "tiny", "--batch_size", "4", said=said) as running:
        yield running


@pytest.fixture(scope="module")
def client(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


@pytest.fixture(scope="module")
def session(checkpoint: Path) -> Session:
    return load_session(checkpoint)


VARIED = {"repetition_penalty": 1.3}  # so that a greedy answer is not one token over and over


def said_here(session: Session, prompt: str, n: int, **sampling: object) -> str:
    """The answer without a server."""
    settings = Sampling(**{"temperature": 0, **sampling})  # type: ignore[arg-type]
    return "".join(session.answer(conversation(prompt), settings, max_new_tokens=n))


def post(server: Server, path: str, body: object) -> httpx.Response:
    return httpx.post(f"{server.url}{path}", json=body, timeout=60)


# --------------------------------------------------------------------------------------------------------------- chat


def test_a_chat_is_the_answer_that_generate_gives(client, session):
    found = client.chat.completions.create(model="tiny", messages=ASK, max_tokens=12, temperature=0)
    choice = found.choices[0]
    assert choice.message.content == said_here(session, "The mill", 12)
    assert (choice.message.role, choice.finish_reason, choice.index) == ("assistant", "length", 0)
    assert found.usage.prompt_tokens == len(session.encode(ASK))
    assert found.usage.completion_tokens == 12
    assert found.usage.total_tokens == found.usage.prompt_tokens + 12


def test_a_seed_repeats_an_answer_and_makes_the_n_answers_differ(client, session):
    def ask(**more):
        found = client.chat.completions.create(model="tiny", messages=ASK, max_tokens=10, temperature=2.0, **more)
        return [choice.message.content for choice in found.choices]

    first = ask(n=3, seed=7)
    assert first == ask(n=3, seed=7)
    assert len(set(first)) == 3
    assert first[:1] == ask(seed=7) != ask(seed=11)
    assert first[0] == said_here(session, "The mill", 10, temperature=2.0, seed=7, top_k=50)


def test_zero_is_a_temperature_and_null_is_the_default(client, session):
    ask = {"model": "tiny", "messages": ASK, "max_tokens": 10, "temperature": 0}
    nulls = {"n": None, "stop": None, "seed": None, "top_p": None, "logprobs": None, "stream": None, "tools": None}
    found = [client.chat.completions.create(**ask, **nulls).choices for _ in range(6)]
    said = [[choice.message.content for choice in choices] for choices in found]
    assert said == [[said_here(session, "The mill", 10)]] * 6


def test_a_stream_is_the_same_answer_in_pieces(client):
    ask = {"model": "tiny", "messages": ASK, "max_tokens": 12, "temperature": 1.5, "seed": 3}
    whole = client.chat.completions.create(**ask)
    chunks = list(client.chat.completions.create(**ask, stream=True, stream_options={"include_usage": True}))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == "length"
    assert not chunks[-1].choices
    assert chunks[-1].usage.completion_tokens == 12
    assert all(chunk.usage is None for chunk in chunks[:-1])


def test_concurrent_greedy_answers_equal_solitary_ones(server, session):
    prompts = [f"{word} number {i}" for i in range(16) for word in ("mill", "river")]

    async def ask_all():
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
            asked = [
                client.chat.completions.create(
                    model="tiny",
                    messages=[{"role": "user", "content": p}],
                    max_tokens=5 + i,
                    temperature=0,
                    extra_body=VARIED,
                )
                for i, p in enumerate(prompts)
            ]
            return [found.choices[0].message.content for found in await asyncio.gather(*asked)]

    alone = [said_here(session, p, 5 + i, **VARIED) for i, p in enumerate(prompts)]
    assert asyncio.run(ask_all()) == alone
    assert len(set(alone)) == len(alone)


def test_five_hundred_who_hang_up_leave_no_row(server, client, session):
    """In turns while they wait, before the first piece, and in the middle of the stream."""
    asked = {"model": "tiny", "messages": ASK, "max_tokens": 40, "temperature": 0, "stream": True, **VARIED}
    body = json.dumps(asked).encode()
    head = (
        "POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    )
    for number in range(500):
        with socket.create_connection(("127.0.0.1", server.port), timeout=60) as connection:
            connection.sendall(head.encode() + body)
            if number % 3:
                connection.recv(1)
            if number % 3 == 2:
                connection.recv(1000)
    for gauge in ("litgpt_rows_in_use", "litgpt_queue_length"):
        server.until(0, gauge)
    assert server.metrics()["litgpt_worker_restarts_total"] == 0
    found = client.chat.completions.create(model="tiny", messages=ASK, max_tokens=9, temperature=0, extra_body=VARIED)
    assert found.choices[0].message.content == said_here(session, "The mill", 9, **VARIED)


def test_a_stop_text_ends_an_answer_and_frees_its_row(client, server):
    ask = {"model": "tiny", "messages": ASK, "temperature": 2.0, "seed": 5}
    whole = client.chat.completions.create(**ask, max_tokens=40).choices[0].message.content
    stop = whole[10:12]
    for stream in (False, True):
        found = client.chat.completions.create(**ask, max_tokens=400, stop=[stop], stream=stream)
        if stream:
            chunks = list(found)
            said, reason = (
                "".join(c.choices[0].delta.content or "" for c in chunks),
                chunks[-1].choices[0].finish_reason,
            )
        else:
            said, reason = found.choices[0].message.content, found.choices[0].finish_reason
        assert said == whole[: whole.index(stop)]
        assert reason == "stop"
    server.until(0, "litgpt_rows_in_use")


def test_logprobs_are_those_of_the_engine(client, session):
    found = client.chat.completions.create(
        model="tiny", messages=ASK, max_tokens=6, temperature=0, logprobs=True, top_logprobs=3
    )
    ids = session.encode(ASK)
    request = session.engine.submit(ids, Sampling(temperature=0), max_new_tokens=6, logprobs=3)
    list(session.engine.follow(request))
    entries = found.choices[0].logprobs.content
    torch.testing.assert_close([e.logprob for e in entries], [s.logprob for s in request.scores], atol=1e-4, rtol=1e-4)
    assert [e.token for e in entries] == [session.tokenizer.decode([s.token]) for s in request.scores]
    assert all(len(e.top_logprobs) == 3 and e.top_logprobs[0].token == e.token for e in entries)
    assert "".join(bytes(e.bytes).decode() for e in entries) == found.choices[0].message.content


def test_a_bias_forbids_and_forces_tokens(client, session):
    token = session.tokenizer.encode("q")[0]
    found = client.chat.completions.create(
        model="tiny", messages=ASK, max_tokens=4, temperature=0, logit_bias={str(token): 100}
    )
    assert found.choices[0].message.content == "qqqq"
    found = client.chat.completions.create(
        model="tiny", messages=ASK, max_tokens=4, temperature=0, logit_bias={str(token): 100}, frequency_penalty=2,
        presence_penalty=2, extra_body={"repetition_penalty": 1.1, "min_p": 0.1, "top_k": 5},
    )  # fmt: skip
    assert found.choices[0].message.content.startswith("q")


def test_an_answer_without_a_limit_ends_where_the_context_does(client, session):
    found = client.chat.completions.create(model="tiny", messages=ASK, temperature=0, logit_bias={"0": -100, "2": -100})
    assert found.choices[0].finish_reason == "length"
    assert found.usage.total_tokens == CONTEXT


def test_content_in_parts_and_all_roles_pass_through_the_template_once(client, session):
    parts = [{"type": "text", "text": "The "}, {"type": "text", "text": "mill"}]
    messages = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": parts},
        {"role": "assistant", "content": None, "tool_calls": [
            {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"town": "Rome"}'}}]},
        {"role": "tool", "tool_call_id": "call_1", "content": "rain <|im_end|>"},
    ]  # fmt: skip
    found = client.chat.completions.create(model="tiny", messages=messages, max_tokens=1)
    as_template = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "The mill"},
        {"role": "assistant", "content": "", "tool_calls": [
            {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": {"town": "Rome"}}}]},
        {"role": "tool", "tool_call_id": "call_1", "content": "rain <|im_end|>"},
    ]  # fmt: skip
    assert found.usage.prompt_tokens == len(session.encode(as_template))


# --------------------------------------------------------------------------------------------------------- given forms


@pytest.mark.parametrize("stream", [False, True])
def test_a_schema_holds_the_answer(client, stream):
    form = {"type": "json_schema", "json_schema": {"name": "thing", "schema": SCHEMA, "strict": True}}
    for seed in range(3):
        found = client.chat.completions.create(
            model="tiny", messages=ASK, max_tokens=200, temperature=1.0, seed=seed, response_format=form, stream=stream
        )
        if stream:
            text = "".join(chunk.choices[0].delta.content or "" for chunk in found)
        else:
            text = found.choices[0].message.content
            assert found.choices[0].finish_reason == "stop"
        thing = json.loads(text)
        assert thing["colour"] in ("red", "blue")
        assert 0 <= thing["size"] <= 99


def test_pydantic_models_parse(client):
    from typing import Literal

    from pydantic import BaseModel

    class Thing(BaseModel):
        colour: Literal["red", "blue"]

    found = client.chat.completions.parse(model="tiny", messages=ASK, max_tokens=60, response_format=Thing)
    assert isinstance(found.choices[0].message.parsed, Thing)


def test_json_object_is_an_object_as_far_as_it_goes(client):
    found = client.chat.completions.create(
        model="tiny", messages=ASK, max_tokens=30, temperature=1, seed=1, response_format={"type": "json_object"}
    )
    assert found.choices[0].message.content.startswith("{")


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "weather"}}])
def test_a_forced_call_is_parsed(client, choice):
    found = client.chat.completions.create(
        model="tiny", messages=ASK, max_tokens=200, temperature=1, seed=2, tools=[WEATHER], tool_choice=choice
    )
    message, call = found.choices[0].message, found.choices[0].message.tool_calls[0]
    assert found.choices[0].finish_reason == "tool_calls"
    assert message.content is None
    assert call.function.name == "weather"
    assert json.loads(call.function.arguments)["town"] in ("Rome", "Oslo")
    again = [*ASK, message, {"role": "tool", "tool_call_id": call.id, "content": "rain"}]
    client.chat.completions.create(model="tiny", messages=again, max_tokens=1, tools=[WEATHER])


def test_a_forced_call_is_streamed(client):
    with client.chat.completions.stream(
        model="tiny", messages=ASK, max_tokens=200, temperature=1, seed=2, tools=[WEATHER], tool_choice="required"
    ) as stream:
        for _ in stream:
            pass
        call = stream.get_final_completion().choices[0].message.tool_calls[0]
    assert call.function.name == "weather"
    assert json.loads(call.function.arguments)["town"] in ("Rome", "Oslo")


# -------------------------------------------------------------------------------------------------- the other endpoints


def test_completions_continue_texts_and_ids(client, session):
    ids = session.tokenizer.encode("The mill")
    found = client.completions.create(model="tiny", prompt=["The mill", "The river"], max_tokens=6, temperature=0, n=2)
    assert [choice.index for choice in found.choices] == [0, 1, 2, 3]
    request = session.engine.submit(ids, Sampling(temperature=0), max_new_tokens=6)
    text = session.tokenizer.decode(list(session.engine.follow(request)))
    assert found.choices[0].text == found.choices[1].text == text
    assert client.completions.create(model="tiny", prompt=ids, max_tokens=6, temperature=0).choices[0].text == text
    assert len(client.completions.create(model="tiny", prompt="a", temperature=0).choices[0].text) > 0
    chunks = list(client.completions.create(model="tiny", prompt=ids, max_tokens=6, temperature=0, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == text


def test_echo_gives_the_prompt_with_its_scores(client, checkpoint):
    found = client.completions.create(model="tiny", prompt="The mill and", max_tokens=0, echo=True, logprobs=1)
    llm = LLM.load(checkpoint)
    ids = llm.tokenizer.encode("The mill and")
    (scores,) = load_session(checkpoint).engine.score([(ids[:1], ids[1:])], top=1)
    logprobs = found.choices[0].logprobs
    assert found.choices[0].text == "The mill and" == "".join(logprobs.tokens)
    assert logprobs.token_logprobs[0] is None
    torch.testing.assert_close(logprobs.token_logprobs[1:], [s.logprob for s in scores], atol=1e-4, rtol=1e-4)
    assert logprobs.text_offset == [len("".join(logprobs.tokens[:i])) for i in range(len(ids))]


def test_embeddings_are_those_of_the_python_api(client, checkpoint):
    texts = ["The mill", "The river ran past the mill", "a"]
    ours = LLM.load(checkpoint).embeddings(texts)
    for more in ({}, {"encoding_format": "float"}):  # without a word, the client asks for base64 and decodes it
        found = client.embeddings.create(model="tiny", input=texts, **more)
        torch.testing.assert_close(torch.tensor([e.embedding for e in found.data]), ours, atol=1e-5, rtol=1e-4)
    assert found.usage.prompt_tokens > 3


def test_models_are_listed_and_others_are_not_found(client):
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError) as error:
        client.chat.completions.create(model="gpt-5", messages=ASK)
    assert error.value.code == "model_not_found"
    assert error.value.param == "model"


def test_predict_answers_as_it_always_has(server, session):
    text = said_here(session, "The mill", 8)
    body = {"prompt": "The mill", "max_new_tokens": 8, "temperature": 0}
    assert post(server, "/predict", body).json() == {"output": text}
    with httpx.stream("POST", f"{server.url}/predict", json={**body, "stream": True}) as response:
        pieces = [json.loads(line)["output"] for line in response.iter_lines()]
    assert "".join(pieces) == text
    assert len(pieces) > 1
    before = server.metrics()["litgpt_generated_tokens_total"]
    post(server, "/predict", {"prompt": "The mill", "logit_bias": {"0": -100, "2": -100}})
    assert server.metrics()["litgpt_generated_tokens_total"] == before + 50


def test_metrics_health_and_readiness(server):
    before = server.metrics()
    post(server, "/predict", {"prompt": "The mill", "max_new_tokens": 8})
    after = server.metrics()
    assert after["litgpt_generated_tokens_total"] > before["litgpt_generated_tokens_total"]
    assert after['litgpt_requests_total{route="/predict",status="200"}'] >= 1
    assert after["litgpt_time_to_first_token_seconds_count"] > before["litgpt_time_to_first_token_seconds_count"]
    assert after["litgpt_rows"] == 4
    assert after["litgpt_replicas_ready"] == 1
    assert httpx.get(f"{server.url}/health").json()["status"] == "ok"
    assert httpx.get(f"{server.url}/ready").status_code == 200


# --------------------------------------------------------------------------------------------------------- bad requests

HUGE = 10**12
CHAT, PREDICT, COMPLETE, EMBED = "/v1/chat/completions", "/predict", "/v1/completions", "/v1/embeddings"
WRONG: list[tuple[str, object, int, str | None]] = [
    *[(PREDICT, {"prompt": prompt}, 422, "prompt") for prompt in ("", None, 123, ["a"])],
    (PREDICT, {}, 422, "prompt"),
    (PREDICT, [1], 422, None),
    (PREDICT, {"prompt": "a", "max_new_token": 3}, 422, "max_new_token"),
    (PREDICT, {"prompt": "a" * 5000}, 400, "prompt"),
    (PREDICT, {"prompt": "a" * 5000, "stream": True}, 400, "prompt"),
    *[(PREDICT, {"prompt": "a", "max_new_tokens": n}, 422, "max_new_tokens") for n in (-3, 0, "5", 5000, HUGE, True)],
    *[(CHAT, {"messages": ASK, "max_tokens": n}, 422, "max_tokens") for n in (-3, 0, "5", 200_000, HUGE, 1.5)],
    (CHAT, {"messages": ASK, "max_completion_tokens": HUGE}, 422, "max_completion_tokens"),
    (CHAT, {"messages": ASK, "max_tokens": CONTEXT}, 400, "messages"),
    (CHAT, {"messages": [{"role": "user", "content": "a" * 5000}]}, 400, "messages"),
    (CHAT, {"messages": [{"role": "user", "content": "a" * 5000}], "stream": True}, 400, "messages"),
    *[(CHAT, {"messages": ASK, "temperature": t}, 422, "temperature") for t in (-5, 1e9, "1")],
    *[(CHAT, {"messages": ASK, "n": n}, 422, "n") for n in (0, -1, 10**6, 17, "2")],
    (CHAT, {"messages": ASK, "top_p": 1.5}, 422, "top_p"),
    (CHAT, {"messages": ASK, "seed": 2**70}, 422, "seed"),
    (CHAT, {"messages": ASK, "stop": [""]}, 422, None),
    (CHAT, {"messages": ASK, "logit_bias": {"x": 1}}, 422, None),
    (CHAT, {"messages": ASK, "logit_bias": {"99999": 1}}, 422, "logit_bias"),
    (CHAT, {"messages": ASK, "top_logprobs": 2}, 422, "top_logprobs"),
    (CHAT, {"messages": ASK, "logprobs": True, "top_logprobs": 99}, 422, "top_logprobs"),
    (CHAT, {"messages": ASK, "frobnicate": 1}, 422, "frobnicate"),
    (CHAT, {"messages": ASK, "stream_options": {"include_usage": True}}, 422, "stream_options"),
    (CHAT, {"messages": ASK, "tools": []}, 422, "tools"),
    (CHAT, {"messages": ASK, "tool_choice": "required"}, 422, "tool_choice"),
    (CHAT, {"messages": ASK, "response_format": {"type": "xml"}}, 422, "response_format"),
    (CHAT, {"messages": ASK, "response_format": {"type": "json_schema", "json_schema": {
        "name": "a", "schema": {"type": "zzz"}}}}, 400, "response_format.json_schema.schema"),
    (CHAT, {"messages": []}, 422, "messages"),
    (CHAT, {"messages": [{"role": "user", "content": None}]}, 422, None),
    (CHAT, {"messages": [{"role": "zzz", "content": "a"}]}, 422, "messages.0"),
    (CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, 422, None),
    (CHAT, {"messages": ASK * 10_000}, 400, "messages"),
    (CHAT, {"messages": ASK, "model": "\ud800"}, 422, "model"),
    (CHAT, {"messages": ASK, "model": "\u202e\x1b[31m"}, 404, "model"),
    (COMPLETE, {"prompt": "a", "suffix": "b"}, 422, "suffix"),
    (COMPLETE, {"prompt": "a", "best_of": 3}, 422, "best_of"),
    (COMPLETE, {"prompt": [[1, 99999]]}, 422, "prompt"),
    (COMPLETE, {"prompt": [-1]}, 422, None),
    (COMPLETE, {"prompt": ["a"] * 20}, 422, "n"),
    (EMBED, {"input": []}, 422, None),
    (EMBED, {"input": "a" * 5000}, 400, "input"),
    (EMBED, {"input": "a", "dimensions": 3}, 422, "dimensions"),
]  # fmt: skip


@pytest.fixture(scope="module")
def known(server: Server) -> str:
    return post(server, PREDICT, {"prompt": "The mill", "max_new_tokens": 6, "temperature": 0}).text


def test_wrong_fields_are_refused_by_name_and_nothing_is_left_behind(server, known):
    (worker,) = server.workers()
    held = worker.memory_full_info().uss
    client = httpx.Client(base_url=server.url, headers={"Content-Type": "application/json"}, timeout=60)
    for path, body, status, param in WRONG:
        found = client.post(path, content=json.dumps(body))
        where = f"{path} {json.dumps(body)[:100]}: {found.text[:300]}"
        error = found.json()["error"]
        assert found.status_code == status, where
        assert set(error) == {"message", "type", "param", "code"}, where
        assert param is None or error["param"] == param, where
        if status == 400 and param in ("messages", "prompt", "input"):
            assert error["code"] == "context_length_exceeded", where
            assert str(CONTEXT) in error["message"], where
    again = post(server, PREDICT, {"prompt": "The mill", "max_new_tokens": 6, "temperature": 0}).text
    assert again == known
    assert worker.memory_full_info().uss < held + 2**20
    assert server.metrics()["litgpt_rows_in_use"] == 0
    assert httpx.get(f"{server.url}/health").status_code == 200


JSON = {"Content-Type": "application/json"}


@pytest.mark.parametrize(
    ("content", "headers", "status"),
    [
        (b'{"prompt":', JSON, 400),
        (b"", JSON, 422),
        (b'{"prompt": "a", "temperature": 1e309}', JSON, 422),
        (b'{"prompt": "a", "temperature": NaN}', JSON, 422),
        (b'{"prompt": "a", "max_new_tokens": 1' + b"0" * 5000 + b"}", JSON, 400),
        (b"[" * 100_000, JSON, 400),
        (b"\xff\xfe\x00", JSON, 400),
        (b'{"prompt": "a"}', {"Content-Type": "text/plain"}, 415),
        (b"prompt=a", {}, 415),
        (b" " * (5 << 20), JSON, 413),
    ],
    ids=["cut", "empty", "inf", "nan", "digits", "deep", "bytes", "text", "none", "large"],
)  # fmt: skip
def test_malformed_bodies_are_refused(server, content, headers, status):
    found = httpx.post(f"{server.url}/predict", content=content, headers=headers, timeout=60)
    assert found.status_code == status
    assert set(found.json()["error"]) == {"message", "type", "param", "code"}


def test_other_paths_and_methods_are_refused_in_the_same_words(server):
    assert httpx.get(f"{server.url}/predict").status_code == 405
    for path in ("/page", "/nothing", "/v1/models/other"):
        found = httpx.get(f"{server.url}{path}")
        assert found.status_code == 404
        assert found.json()["error"]["type"] == "not_found_error"


def test_what_is_sent_is_not_printed(server):
    post(server, "/predict", {"prompt": "secret\n\x1b[31m word", "max_new_tokens": 1})
    post(server, "/predict", {"prompt": "secret", "max_new_tokens": "secret"})
    assert "secret" not in server.said.read_text()


def test_nothing_that_the_document_allows_or_forbids_is_a_mistake_of_ours(server):
    """Made requests, right and wrong, to every path."""
    import schemathesis
    from hypothesis import HealthCheck, given, settings

    client = httpx.Client(base_url=server.url, timeout=60)
    document = client.get("/openapi.json").json()
    quick = {"max_examples": 6, "deadline": None, "derandomize": True, "database": None}
    for found in schemathesis.openapi.from_dict(document).get_all_operations():
        operation = found.ok()
        modes = schemathesis.GenerationMode if operation.method == "post" else [schemathesis.GenerationMode.POSITIVE]
        for mode in modes:

            @settings(**quick, suppress_health_check=list(HealthCheck))
            @given(operation.as_strategy(mode))
            def check(case):
                made = case.as_transport_kwargs(base_url=server.url)
                body = {"json": made["json"]} if "json" in made else {"content": made.get("data")}
                assert client.request(made["method"], made["url"], **body).status_code < 500

            check()
    server.until(0, "litgpt_rows_in_use")
