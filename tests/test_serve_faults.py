"""What `litgpt serve` does when clients leave, come in crowds or wait too long, when workers die, and at its end."""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file

from litgpt import cli
from litgpt.deploy import connections
from tests.makers.checkpoints import make_hf_checkpoint
from tests.makers.configs import shrunk
from tests.makers.servers import CHATML, Server, alive, make_served, serving
from tests.makers.tokenizers import train_tiny_tokenizer

KEY = "k-123"
HEADERS = {"Authorization": f"Bearer {KEY}"}
LONG = {"prompt": "The mill", "max_new_tokens": 4000, "logit_bias": {"0": -100, "2": -100}}
SHORT = {"prompt": "The mill", "max_new_tokens": 2}


@pytest.fixture(scope="module")
def slow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose answers take a while, as they may be long."""
    home = tmp_path_factory.mktemp("slow")
    tokenizer = train_tiny_tokenizer(
        home / "tokenizer", special_tokens=("<|im_start|>", "<|im_end|>"), chat_template=CHATML
    )
    sizes = {"block_size": 8192, "vocab_size": 300, "padded_vocab_size": 320}
    return make_hf_checkpoint(home / "T", shrunk("SmolLM2-135M-Instruct", **sizes), tokenizer_dir=tokenizer)


@pytest.fixture(scope="module")
def server(slow: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One row, and one place to wait."""
    said = tmp_path_factory.mktemp("said") / "said.txt"
    with serving(slow, "--batch_size", "1", "--max_queue", "1", said=said, LITGPT_API_KEY=KEY) as running:
        yield running


def post(server: Server, body: object, **more: object) -> httpx.Response:
    return httpx.post(f"{server.url}/predict", json=body, headers=HEADERS, timeout=60, **more)  # type: ignore[arg-type]


def begin(server: Server, body: dict) -> socket.socket:
    """Send a request and do not wait for its answer."""
    content = json.dumps(body).encode()
    head = (
        f"POST /predict HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer {KEY}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(content)}\r\n\r\n"
    )
    connection = socket.create_connection(("127.0.0.1", server.port))
    connection.sendall(head.encode() + content)
    return connection


@pytest.mark.parametrize("stream", [False, True])
def test_who_hangs_up_frees_the_row_and_the_place_in_the_queue(server, stream):
    running, waiting = begin(server, {**LONG, "stream": stream}), None
    server.until(1, "litgpt_rows_in_use", **HEADERS)
    if stream:
        assert b"output" in running.recv(65536) + running.recv(65536)
    waiting = begin(server, LONG)
    server.until(1, "litgpt_queue_length", **HEADERS)
    waiting.close()
    server.until(0, "litgpt_queue_length", **HEADERS)
    running.close()
    server.until(0, "litgpt_rows_in_use", **HEADERS)
    assert post(server, SHORT).status_code == 200


def test_a_full_queue_says_when_to_come_again(server):
    held = [begin(server, LONG)]
    server.until(1, "litgpt_rows_in_use", **HEADERS)
    held.append(begin(server, LONG))
    server.until(1, "litgpt_queue_length", **HEADERS)
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: post(server, SHORT), range(8)))
    assert {response.status_code for response in found} == {429}
    assert all(int(response.headers["Retry-After"]) >= 1 for response in found)
    assert found[0].json()["error"]["code"] == "queue_full"
    for connection in held:
        connection.close()
    server.until(0, "litgpt_rows_in_use", **HEADERS)


def test_every_route_but_health_needs_the_key(server):
    document = httpx.get(f"{server.url}/openapi.json", headers=HEADERS).json()
    for path, methods in document["paths"].items():
        for method in methods:
            status = httpx.request(method, f"{server.url}{path}").status_code
            assert status == (200 if path == "/health" else 401), path
    for wrong in ("", "Bearer", f"Bearer {KEY}x", f"Basic {KEY}", "Bearer \xff"):
        headers = {"Authorization": wrong.encode("latin-1")}
        found = httpx.get(f"{server.url}/v1/models", headers=headers)  # type: ignore[arg-type]
        assert found.status_code == 401
        assert found.json()["error"]["type"] == "authentication_error"
    assert httpx.get(f"{server.url}/openapi.json").status_code == 401
    assert KEY not in server.said.read_text()


def test_a_worker_that_dies_is_replaced_and_its_clients_are_told(server):
    answers: list[httpx.Response] = []
    thread = threading.Thread(target=lambda: answers.append(post(server, LONG)))
    thread.start()
    server.until(1, "litgpt_rows_in_use", **HEADERS)
    (worker,) = server.workers()
    worker.kill()
    thread.join(20)
    assert answers[0].status_code == 503
    assert "died" in answers[0].json()["error"]["message"]
    assert httpx.get(f"{server.url}/ready", headers=HEADERS).status_code == 503
    assert httpx.get(f"{server.url}/health").json()["status"] == "degraded"
    server.until(1, "litgpt_replicas_ready", **HEADERS)
    assert post(server, SHORT).status_code == 200
    assert server.metrics(**HEADERS)["litgpt_worker_restarts_total"] == 1


def test_sigterm_lets_short_answers_end_cancels_long_ones_and_leaves_nothing(slow, tmp_path):
    options = ("--batch_size", "2", "--grace", "3", "--timeout", "60")
    with serving(slow, *options, said=tmp_path / "said.txt", LITGPT_API_KEY=KEY) as server:
        answers: dict[str, httpx.Response] = {}
        bodies = {"long": {**LONG, "max_new_tokens": 8000}, "short": {**LONG, "max_new_tokens": 120}}
        threads = [
            threading.Thread(target=lambda name=name: answers.update({name: post(server, bodies[name])}))
            for name in bodies
        ]
        for thread in threads:
            thread.start()
        server.until(2, "litgpt_rows_in_use", **HEADERS)
        workers, port, before = server.workers(), server.port, time.monotonic()
        assert server.stop() == 0, server.said.read_text()
        assert time.monotonic() - before < 15
        for thread in threads:
            thread.join()
        assert (answers["short"].status_code, answers["long"].status_code) == (200, 503)
        assert not alive(workers)
        with socket.socket() as again:
            again.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            again.bind(("127.0.0.1", port))


def test_a_deadline_holds_for_what_waits_and_what_runs(slow, tmp_path):
    with serving(slow, "--batch_size", "1", "--timeout", "1", said=tmp_path / "said.txt") as server:
        with ThreadPoolExecutor(2) as pool:
            found = list(pool.map(lambda _: post(server, LONG), range(2)))
        assert [response.status_code for response in found] == [504, 504]
        with httpx.stream("POST", f"{server.url}/predict", json={**LONG, "stream": True}, timeout=30) as response:
            last = list(response.iter_lines())[-1]
        assert response.status_code == 200
        assert json.loads(last)["error"]["code"] == "timeout"
        server.until(0, "litgpt_rows_in_use")
        assert post(server, SHORT).status_code == 200


# ---------------------------------------------------------------------------------------------------- before it begins


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    status = cli.main(["serve", *arguments])
    return status, capsys.readouterr().err.strip().splitlines()[-1]


def test_a_port_that_is_taken_is_refused_before_anything_is_loaded(capsys, tmp_path):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = str(other.getsockname()[1])
        status, line = refused(capsys, str(tmp_path), "--port", port)
    assert status == 3
    assert port in line
    assert "--port" in line


def test_other_machines_are_let_in_with_a_key_only(capsys, tmp_path, monkeypatch):
    monkeypatch.delenv("LITGPT_API_KEY", raising=False)
    status, line = refused(capsys, str(tmp_path), "--host", "0.0.0.0")
    assert status == 2
    assert "LITGPT_API_KEY" in line
    assert "--insecure" in line


@pytest.mark.parametrize(
    ("options", "word"),
    [
        (("--accelerator", "gppu"), "accelerator"),
        (("--api_path", "predict"), "api_path"),
        (("--timeout", "0"), "timeout"),
        (("--batch_size", "0"), "batch_size"),
        (("--adapters", "french"), "adapters"),
        (("--devices", "x"), "devices"),
        (("--port", "70000"), "port"),
    ],
)
def test_wrong_options_are_refused(capsys, tmp_path, options, word):
    status, line = refused(capsys, str(tmp_path), *options)
    assert status == 2
    assert word in line


def test_a_broken_checkpoint_is_one_line(tmp_path):
    broken = make_served(tmp_path)
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    command = [sys.executable, "-m", "litgpt", "serve", str(broken), "--port", "0"]
    found = subprocess.run(command, capture_output=True, text=True, timeout=180)
    assert found.returncode == 2
    assert "Serving" not in found.stdout
    assert found.stderr.strip().splitlines()[-1].startswith("error: ")
    assert "Traceback" not in found.stderr


# ------------------------------------------------------------------------------------------------ what breaks meanwhile

BROKEN = 99  # a token of which the model knows nothing but NaN


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with a broken token, and a chat template that would write a file."""
    home = tmp_path_factory.mktemp("hostile")
    template = "{{ cycler.__init__.__globals__.os.system('touch " + str(home / "canary") + "') }}"
    special = ("<|im_start|>", "<|im_end|>")
    tokenizer = train_tiny_tokenizer(home / "tokenizer", special_tokens=special, chat_template=template)
    config = shrunk("pythia-14m", block_size=4096, vocab_size=300, padded_vocab_size=320)
    directory = make_hf_checkpoint(home / "T", config, tokenizer_dir=tokenizer)
    weights = load_file(directory / "model.safetensors")
    weights["gpt_neox.embed_in.weight"][BROKEN] = torch.nan
    save_file(weights, directory / "model.safetensors", {"format": "pt"})
    return directory


@pytest.fixture(scope="module")
def attacked(hostile: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(hostile, "--batch_size", "4", said=tmp_path_factory.mktemp("said") / "said.txt") as running:
        yield running


def continued(server: Server, **more: object) -> httpx.Response:
    """A greedy answer in which no token ends or breaks it."""
    bias = {str(token): -100 for token in (0, BROKEN)}
    body = {"prompt": [5, 6, 7], "max_tokens": 40, "temperature": 0, "logit_bias": bias, **more}
    return httpx.post(f"{server.url}/v1/completions", json=body, timeout=60)


def test_an_answer_that_breaks_is_told_and_ends_alone(attacked):
    known = continued(attacked).json()["choices"]
    doomed = {"logit_bias": {"0": -100, str(BROKEN): 100}}
    asked: list[dict[str, object]] = [{}, doomed, {}, {**doomed, "stream": True}, {}, {"prompt": [9, BROKEN, 9]}]
    with ThreadPoolExecutor(6) as pool:
        first, whole, second, streamed, third, read = pool.map(lambda more: continued(attacked, **more), asked)
    assert [found.json()["choices"] for found in (first, second, third)] == [known] * 3
    for found in (whole, read):
        error = found.json()["error"]
        assert (found.status_code, error["type"]) == (500, "server_error")
        assert "not finite" in error["message"]
    events = [json.loads(line[6:]) for line in streamed.iter_lines() if line]
    assert streamed.status_code == 200
    assert "choices" in events[0]
    assert "not finite" in events[-1]["error"]["message"]
    assert attacked.metrics()["litgpt_worker_restarts_total"] == 0
    attacked.until(0, "litgpt_rows_in_use")
    assert continued(attacked).json()["choices"] == known


def test_a_chat_template_can_do_nothing_but_write_text(attacked, hostile):
    for path, body in (
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}]}),
        ("/predict", {"prompt": "a"}),
    ):
        found = httpx.post(f"{attacked.url}{path}", json=body, timeout=60)
        assert found.status_code == 400
        assert "template" in found.json()["error"]["message"]
    assert not (hostile.parent / "canary").exists()


def test_a_thousand_silent_connections_do_not_shut_others_out(attacked):
    connections.allow_many()
    process = psutil.Process(attacked.process.pid)
    before = process.num_fds()
    health = b"GET /health HTTP/1.1\r\nHost: a\r\n\r\n"
    silent = [socket.create_connection(("127.0.0.1", attacked.port), timeout=60) for _ in range(1000)]
    for i, connection in enumerate(silent):  # nothing, a part of a head, a request, and a part of one more
        connection.sendall((b"", health[:9], health, health)[i % 4])
    for connection in silent[3::4]:
        assert connection.recv(4096).startswith(b"HTTP/1.1 200")
        connection.sendall(health[:9])
    assert continued(attacked).status_code == 200
    for connection in silent:
        while connection.recv(4096):  # until the server ends it
            pass
        connection.close()
    assert process.num_fds() <= before + 2
    assert continued(attacked).status_code == 200


def test_workers_that_die_again_and_again_end_the_server(attacked):
    """The last test with this server."""
    address = {each.laddr.ip for each in psutil.Process(attacked.process.pid).net_connections() if not each.raddr}
    assert address == {"127.0.0.1"}
    waiting = ThreadPoolExecutor(1).submit(continued, attacked, max_tokens=4000)
    attacked.until(1, "litgpt_rows_in_use")
    for _ in range(3000):
        for worker in attacked.workers():
            with contextlib.suppress(psutil.NoSuchProcess):
                worker.kill()
        if attacked.process.poll() is not None:
            break
        time.sleep(0.02)
    assert attacked.process.poll() == 3
    assert waiting.result().status_code == 503
    said = attacked.said.read_text()
    assert said.strip().splitlines()[-1].startswith("error: the workers die again and again")
    assert "Traceback" not in said
