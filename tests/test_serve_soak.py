"""`litgpt serve` under clients that come, go, err and hang up. Long: `SOAK_SECONDS=300 pytest -s` on this file.

Which also holds what only time shows: memory that grows, and how soon a full queue says so.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import httpx
import psutil
import pytest
from safetensors.torch import load_file, save_file

from litgpt.generate.sampling import Sampling
from litgpt.generate.session import conversation, load_session
from tests.makers.servers import Server, make_served, serving

SECONDS = float(os.environ.get("SOAK_SECONDS", "3"))
IS_LONG = SECONDS >= 30
CLIENTS = 16
PROMPTS = [f"The {word} {verb}" for word in ("mill", "river", "oil", "lamp") for verb in ("turned", "ran past", "is")]
SCHEMA = {"type": "object", "properties": {"a": {"enum": ["x", "y"]}}, "required": ["a"], "additionalProperties": False}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose greedy answers hang on what it is asked."""
    directory = make_served(tmp_path_factory.mktemp("served"))
    weights = {name: tensor * 10 for name, tensor in load_file(directory / "model.safetensors").items()}
    save_file(weights, directory / "model.safetensors", {"format": "pt"})
    return directory


@pytest.fixture(scope="module")
def server(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Four rows and eight places to wait, for more clients than that."""
    options = ("--model_name", "tiny", "--batch_size", "4", "--max_queue", "8")
    with serving(checkpoint, *options, said=tmp_path_factory.mktemp("said") / "said.txt") as running:
        yield running


def held(server: Server) -> tuple[list[float], list[int]]:
    """MB and open files of each process."""
    processes = [psutil.Process(server.process.pid), *server.workers()]
    return [p.memory_full_info().uss / 1e6 for p in processes], [p.num_fds() for p in processes]


# ---------------------------------------------------------------------------------------------------------- the clients


class Crowd:
    """Clients that each do one thing after the other, drawn by chance; what they saw is counted."""

    def __init__(self, server: Server, alone: dict[str, str]) -> None:
        self.server, self.alone = server, alone
        self.seen: Counter[str] = Counter()
        self.wrong: list[str] = []
        acts = [self.whole, self.streamed, self.leaves_a_stream, self.leaves, self.several, self.form, self.vectors]
        self.acts: list[Callable[..., Awaitable[None]]] = [*acts, self.whole, self.streamed, self.errs]

    async def run(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        async with httpx.AsyncClient(base_url=self.server.url, timeout=120) as http:
            await asyncio.gather(*(self.client(http, random.Random(seed), end) for seed in range(CLIENTS)))

    async def client(self, http: httpx.AsyncClient, chance: random.Random, end: float) -> None:
        while time.monotonic() < end:
            act = chance.choice(self.acts)
            await act(http, chance, chance.choice(PROMPTS))
            self.seen[act.__name__] += 1

    def chat(self, prompt: str, **more: object) -> dict[str, object]:
        messages = [{"role": "user", "content": prompt}]
        return {"model": "tiny", "messages": messages, "max_tokens": 24, "temperature": 0, **more}

    async def post(self, http: httpx.AsyncClient, path: str, body: object) -> httpx.Response | None:
        found = await http.post(path, json=body)
        return found if await self.is_answered(found) else None

    async def is_answered(self, found: httpx.Response) -> bool:
        self.seen[str(found.status_code)] += 1
        if found.status_code == 429:
            await asyncio.sleep(float(found.headers["Retry-After"]) / 10)
        elif found.status_code != 200:
            self.wrong.append(f"{found.status_code}: {(await found.aread())[:200]!r}")
        return found.status_code == 200

    def expect(self, prompt: str, text: str) -> None:
        if text != self.alone[prompt]:
            self.wrong.append(f"{prompt}: {text!r}, not {self.alone[prompt]!r}")

    async def whole(self, http: httpx.AsyncClient, chance: random.Random, prompt: str) -> None:
        if found := await self.post(http, "/v1/chat/completions", self.chat(prompt)):
            self.expect(prompt, found.json()["choices"][0]["message"]["content"])

    async def streamed(self, http: httpx.AsyncClient, chance: random.Random, prompt: str) -> None:
        async with http.stream("POST", "/v1/chat/completions", json=self.chat(prompt, stream=True)) as found:
            if await self.is_answered(found):
                lines = [line[6:] async for line in found.aiter_lines() if line]
                deltas = [json.loads(line)["choices"][0]["delta"] for line in lines[:-1]]
                self.expect(prompt, "".join(delta.get("content") or "" for delta in deltas))

    async def leaves_a_stream(self, http: httpx.AsyncClient, chance: random.Random, prompt: str) -> None:
        body = self.chat(prompt, stream=True, max_tokens=400)
        async with http.stream("POST", "/v1/chat/completions", json=body) as found:
            if await self.is_answered(found):
                lines = found.aiter_lines()
                for _ in range(chance.randrange(1, 12)):
                    await anext(lines, None)

    async def leaves(self, http: httpx.AsyncClient, chance: random.Random, prompt: str) -> None:
        try:
            body = self.chat(prompt, max_tokens=400)
            await http.post("/v1/chat/completions", json=body, timeout=chance.uniform(0.005, 0.3))
        except httpx.TimeoutException:
            pass

    async def several(self, http: httpx.AsyncClient, chance: random.Random, prompt: str) -> None:
        if found := await self.post(http, "/v1/chat/completions", self.chat(prompt, n=2)):
            for choice in found.json()["choices"]:
                self.expect(prompt, choice["message"]["content"])

    async def form(self, http: httpx.AsyncClient, chance: random.Random, prompt: str) -> None:
        form = {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA}}
        body = self.chat(prompt, response_format=form, max_tokens=200)
        if found := await self.post(http, "/v1/chat/completions", body):
            choice = found.json()["choices"][0]
            if choice["finish_reason"] == "stop" and json.loads(choice["message"]["content"])["a"] not in ("x", "y"):
                self.wrong.append(found.text)

    async def vectors(self, http: httpx.AsyncClient, chance: random.Random, prompt: str) -> None:
        await self.post(http, "/v1/embeddings", {"model": "tiny", "input": [prompt, "a"]})

    async def errs(self, http: httpx.AsyncClient, chance: random.Random, prompt: str) -> None:
        body, status = chance.choice(
            [
                (self.chat(prompt, temperature=-1), 422),
                (self.chat(prompt, model="other"), 404),
                (self.chat(prompt * 500), 400),
                (self.chat(prompt * 500, stream=True), 400),
                (self.chat(prompt, max_tokens=10**12), 422),
                ("{", 422),
            ]
        )
        found = await http.post("/v1/chat/completions", json=body)
        if found.status_code not in (status, 429):
            self.wrong.append(f"{found.status_code}, not {status}: {found.text[:200]}")


# ------------------------------------------------------------------------------------------------------------ the tests


def test_answers_stay_right_and_nothing_is_left_behind(checkpoint: Path, server: Server) -> None:
    session = load_session(checkpoint)
    greedy = Sampling(temperature=0)
    alone = {p: "".join(session.answer(conversation(p), greedy, max_new_tokens=24)) for p in PROMPTS}
    assert len(set(alone.values())) == len(PROMPTS)
    crowd = Crowd(server, alone)
    asyncio.run(crowd.run(SECONDS / 5))
    server.until(0, "litgpt_rows_in_use")
    memory, files = held(server)
    asyncio.run(crowd.run(SECONDS * 4 / 5))
    server.until(0, "litgpt_rows_in_use")
    server.until(0, "litgpt_queue_length")
    later, later_files = held(server)
    print(f"\n{SECONDS:g} s: {dict(crowd.seen)}; MB {memory} -> {later}; open files {files} -> {later_files}")
    assert not crowd.wrong
    assert crowd.seen["200"] > 0
    assert server.metrics()["litgpt_worker_restarts_total"] == 0
    assert later_files == files
    if IS_LONG:
        assert all(after < before * 1.05 + 2 for before, after in zip(memory, later, strict=True))


def test_many_more_clients_than_places_are_told_or_answered(server: Server) -> None:
    """Ten times as many as can run or wait, who come again when they are told to."""
    refused: list[float] = []
    answered: list[float] = []
    end = time.monotonic() + SECONDS / 5
    body = json.dumps({"prompt": "The mill", "max_new_tokens": 40, "logit_bias": {"0": -100, "2": -100}})
    head = f"POST /predict HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n"

    async def client(number: int) -> None:
        await asyncio.sleep(number / 120)
        while time.monotonic() < end:
            begun = time.monotonic()  # plain sockets: what clients do takes time from the server here
            reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
            writer.write(f"{head}Connection: close\r\n\r\n{body}".encode())
            found = (await reader.read()).decode()
            writer.close()
            is_refused = found.startswith("HTTP/1.1 429") and "\r\nretry-after: 1\r\n" in found.lower()
            assert is_refused or found.startswith("HTTP/1.1 200"), found
            (refused if is_refused else answered).append(time.monotonic() - begun)
            await asyncio.sleep(is_refused)

    async def crowd() -> None:
        await asyncio.gather(*(client(number) for number in range(120)))

    before = server.metrics()["litgpt_generated_tokens_total"]
    asyncio.run(crowd())
    server.until(0, "litgpt_rows_in_use")
    assert refused
    assert server.metrics()["litgpt_generated_tokens_total"] == before + 40 * len(answered) > before
    for name, times in (("429", sorted(refused)), ("200", sorted(answered))):
        middle, late, longest = (times[int(q * (len(times) - 1))] for q in (0.5, 0.95, 1))
        print(f"\n{len(times)} times {name}: median {middle:.3f} s, p95 {late:.3f} s, most {longest:.3f} s")
    if IS_LONG:
        assert sorted(refused)[len(refused) // 2] < 0.1  # with nothing else on the machine, p95 too
