"""Serving: `litgpt serve`, LitGPT 0.5's server, `transformers serve` and llama.cpp's, under the same clients.

    python3 -m venv E && E/bin/pip install torch==2.13.0 "litgpt[extra]==0.5.13"
    cmake -S llama.cpp -B B && cmake --build B --target llama-server
    python benchmarks/serve.py --work W --litgpt-05 E/bin/python --transformers E/bin/transformers \
        --llama-server B/bin/llama-server --gguf W/m.gguf

All clients begin at once, each with a prompt of its own of 32 tokens, and want 64 tokens. Greedy, and nothing ends an
answer early: `logit_bias` here, `min_new_tokens` in transformers, `ignore_eos` in llama.cpp; the random weights do not
come upon an end in LitGPT 0.5. The servers are started once and take turns; those that have none are stopped (SIGSTOP).
LitGPT 0.5 and `transformers serve` (without continuous batching) answer one request after the other, so slowly that one
turn must do. Streamed for 1, 4, 8 and 16 clients, and in one piece for 8:

    req/s, tok/s   from the first request to the end of the last answer, medians over the rounds
    first s, p95   to the first byte of an answer, median and 95th percentile of all requests
    p95 s          to the end of an answer
    cpu ms         processor time of the server's processes for a token: what a busy machine can still tell
    MB             the memory of its processes after a load, what they share counted once; the most that was seen

All of it takes some eight minutes on two cores; `--rounds 1 --clients 8 --whole` takes two.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import os
import random
import re
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from generate import make_model

PROMPT = 32
Ask = Callable[[str, bool], tuple[str, dict[str, Any]]]  # (prompt, whether it is streamed) -> path, body


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="SmolLM2-135M", help="a registered name")
    parser.add_argument("--ours", nargs="*", default=[], metavar="OPTION=VALUE", help="for `litgpt serve`, without --")
    parser.add_argument("--litgpt-05", type=Path, help="Python of an environment with LitGPT 0.5")
    parser.add_argument("--transformers", type=Path, help="the command `transformers`, of an environment with 5.x")
    parser.add_argument("--llama-server", type=Path, help="llama.cpp's `llama-server`")
    parser.add_argument("--gguf", type=Path, help="WORK/model, as convert_hf_to_gguf.py of llama.cpp writes it")
    parser.add_argument("--clients", type=int, nargs="*", default=[1, 4, 8, 16], help="whose answers are streamed")
    parser.add_argument("--whole", type=int, nargs="*", default=[8], help="whose answers come in one piece")
    parser.add_argument("--each", type=int, default=1, help="requests of each client, one after the other")
    parser.add_argument("--new", type=int, default=64, help="tokens of an answer")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--work", type=Path, help="where the model is made, or lies already")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        options.work = options.work or Path(folder)
        if not (options.work / "model").is_dir():
            options.precision = "bf16"
            make_model(options)
        model = make_served(options.work)
        options.prompts = prompts(model)
        compare(options, model)


def compare(options: argparse.Namespace, model: Path) -> None:
    """Rounds of all systems that are there, and the tables."""
    loads = [(True, clients) for clients in options.clients] + [(False, clients) for clients in options.whole]
    with contextlib.ExitStack() as stack:
        servers = [stack.enter_context(started(server, options)) for server in chosen(options, model)]
        for turn in range(options.rounds):
            for server in servers:
                if turn and server.is_serial:
                    continue
                with server.turn():
                    for load in loads:
                        if load[0] in server.modes:
                            server.seen.setdefault(load, []).append(asyncio.run(put(server, *load, options)))
    print(f"{options.model}, bf16, {options.threads} threads, {options.rounds} rounds")
    for load in loads:
        shown = [server for server in servers if load in server.seen]
        print(f"\n{load[1]} clients x {options.new} tokens, {'streamed' if load[0] else 'in one piece'}")
        print(f"{'':<24}{'req/s':>8}{'tok/s':>8}{'first s':>9}{'p95':>7}{'p95 s':>8}{'cpu ms':>8}{'MB':>7}")
        for server in shown:
            print(f"{server.name:<24}{row(server.seen[load], options.new)}")
        for other in shown[1:]:
            print(f"litgpt / {other.name}: {rate(shown[0].seen[load]) / rate(other.seen[load]):.2f}")


# Servers --------------------------------------------------------------------------------------------------------------


@dataclass
class Load:
    """What came of so many clients at once: seconds."""

    seconds: float
    first: list[float]
    end: list[float]
    cpu: float
    memory: float  # MB


@dataclass
class Server:
    name: str
    command: list[Any]
    port: int
    ask: Ask
    modes: tuple[bool, ...] = (True, False)  # whether it can stream, and whether it can do without
    is_serial: bool = False  # answers one request after the other
    seen: dict[tuple[bool, int], list[Load]] = field(default_factory=dict)
    process: Any = None

    def processes(self) -> list[psutil.Process]:
        """Those that it started as well; none once it has ended."""
        try:
            return [self.process, *self.process.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []

    @contextlib.contextmanager
    def turn(self) -> Iterator[None]:
        for process in self.processes():
            process.resume()
        yield
        for process in self.processes():
            process.suspend()

    def cpu(self) -> float:
        return sum(sum(process.cpu_times()[:2]) for process in self.processes())

    def memory(self) -> float:
        return sum(process.memory_full_info().pss for process in self.processes()) / 1e6


def chosen(options: argparse.Namespace, model: Path) -> list[Server]:
    """The systems that have a place on this machine, `litgpt` first."""
    new, ports = options.new, [free_port() for _ in range(6)]
    end = json.loads((model / "generation_config.json").read_text())["eos_token_id"]
    minimum = json.dumps({"max_new_tokens": new, "min_new_tokens": new, "do_sample": False})

    def completion(**more: Any) -> Ask:
        def ask(prompt: str, streamed: bool) -> tuple[str, dict[str, Any]]:
            usage = {"stream_options": {"include_usage": True}} if streamed else {}
            body = {"model": str(model), "prompt": prompt, "max_tokens": new, "temperature": 0, "stream": streamed}
            return "/v1/completions", body | usage | more

        return ask

    def predict(prompt: str, streamed: bool) -> tuple[str, dict[str, Any]]:
        return "/predict", {"prompt": prompt}

    ours = [sys.executable, "-m", "litgpt", "serve", str(model), f"--port={ports[0]}"]
    found = [
        Server("litgpt", [*ours, *(f"--{o}" for o in options.ours)], ports[0], completion(logit_bias={str(end): -100}))
    ]
    if options.litgpt_05:
        directory = converted(options)
        for streamed in (True, False):
            port = ports[1 + streamed]
            command = [options.litgpt_05, "-m", "litgpt", "serve", directory, f"--port={port}", "--timeout=900"]
            command += ["--accelerator=cpu", "--temperature=0", "--top_p=0", f"--max_new_tokens={new}"]
            command += [f"--stream={str(streamed).lower()}", "--precision=bf16-true"]
            found.append(Server("litgpt 0.5", command, port, predict, (streamed,), is_serial=True))
    if options.transformers:
        command = [options.transformers, "serve", str(model), f"--port={ports[3]}", "--device=cpu", "--dtype=bfloat16"]
        asked = completion(generation_config=minimum, stream_options=None)
        found.append(Server("transformers", command, ports[3], asked, is_serial=True))
        batched = [*command, f"--port={ports[5]}", "--continuous-batching", "--cb-block-size=32"]
        batched += ["--cb-num-blocks=512", "--cb-max-batch-tokens=512"]  # else it takes all the memory there is
        found.append(Server("transformers, batched", batched, ports[5], asked))
    if options.llama_server and options.gguf:
        rows = max([*options.clients, *options.whole])
        command = [options.llama_server, "-m", options.gguf, "--port", ports[4], "-t", options.threads]
        command += ["-np", rows, "-c", rows * 512, "--no-webui"]
        found.append(Server("llama.cpp", command, ports[4], completion(ignore_eos=True)))
    return found


def make_served(work: Path) -> Path:
    """WORK/model with a tokenizer that has a text for each row of the model, so that every token makes a chunk."""
    directory = work / "served"
    if not directory.is_dir():
        shutil.copytree(work / "model", directory)
        file, config = directory / "tokenizer.json", json.loads((directory / "config.json").read_text())
        tokenizer = json.loads(file.read_text())
        taken = {*tokenizer["model"]["vocab"].values(), *(token["id"] for token in tokenizer["added_tokens"])}
        words = {f"w{i}": i for i in range(config["vocab_size"]) if i not in taken}
        tokenizer["model"]["vocab"] |= words
        file.write_text(json.dumps(tokenizer))
    return directory


def prompts(directory: Path) -> Iterator[str]:
    """Texts of 32 tokens, none of which begins as another does."""
    from litgpt.tokenizer import Tokenizer

    tokenizer, words = Tokenizer(directory), sorted(set(re.findall(r"[a-z]+", __doc__ or "")))
    for number in itertools.count():
        text = " ".join(random.Random(number).choices(words, k=PROMPT))
        while len(tokenizer.encode(text)) > PROMPT:
            text = text[:-1]
        if len(tokenizer.encode(text)) == PROMPT:
            yield text


def converted(options: argparse.Namespace) -> Path:
    """WORK/served as LitGPT 0.5 wants it."""
    directory = options.work / "served-0.5"
    if not (directory / "lit_model.pth").is_file():
        shutil.copytree(options.work / "served", directory, dirs_exist_ok=True)
        command = [options.litgpt_05, "-m", "litgpt", "convert_to_litgpt", directory]
        command += [f"--model_name={options.model}", "--dtype=bfloat16"]
        subprocess.run([str(word) for word in command], check=True, capture_output=True, cwd=options.work)
    return directory


@contextlib.contextmanager
def started(server: Server, options: argparse.Namespace) -> Iterator[Server]:
    """The server once it has answered, and stopped until its turn comes."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(options.threads), "TOKENIZERS_PARALLELISM": "false"}
    said = options.work / f"{server.name.replace(' ', '-')}{'' if True in server.modes else '-whole'}.log"
    with open(said, "w") as file:
        command = [str(word) for word in server.command]
        server.process = psutil.Popen(command, stdout=file, stderr=file, env=environment, cwd=options.work)
    try:
        for _ in range(600):
            with contextlib.suppress(OSError):
                socket.create_connection(("127.0.0.1", server.port)).close()
                break
            if server.process.poll() is not None:
                raise SystemExit(f"{server.name} did not start:\n{said.read_text()[-3000:]}")
            time.sleep(0.2)
        answer = asyncio.run(put(server, server.modes[0], 1, options, tries=300))
        print(f"{server.name}: warm after {answer.seconds:.1f} s", file=sys.stderr)
        for process in server.processes():
            process.suspend()
        yield server
    finally:
        ending = server.processes()
        for process in ending:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(ending)


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


# Clients --------------------------------------------------------------------------------------------------------------


async def put(server: Server, streamed: bool, clients: int, options: argparse.Namespace, tries: int = 1) -> Load:
    """So many clients at once."""
    started_at, cpu = time.perf_counter(), server.cpu()
    found = await asyncio.gather(*(client(server, streamed, options, tries) for _ in range(clients)))
    seconds = time.perf_counter() - started_at
    first, end = zip(*(times for each in found for times in each), strict=True)
    return Load(seconds, list(first), list(end), server.cpu() - cpu, server.memory())


async def client(server: Server, streamed: bool, options: argparse.Namespace, tries: int) -> list[tuple[float, float]]:
    """(first byte, end) of each of its requests."""
    found = []
    for _ in range(options.each):
        path, body = server.ask(next(options.prompts), streamed)
        for left in reversed(range(tries)):
            first, end, status, text = await ask(server.port, path, body)
            if status == 200 or not left:
                break
            await asyncio.sleep(0.2)
        made = made_tokens(text, streamed and path == "/predict")
        if status != 200 or made not in (None, options.new):
            raise SystemExit(f"{server.name} answered {status} with {made} tokens:\n{text[-1000:]}")
        found.append((first, end))
    return found


async def ask(port: int, path: str, body: dict[str, Any]) -> tuple[float, float, int, str]:
    """(seconds to the first byte of the answer, to its end, status, all that came). Plain sockets cost least."""
    content = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nConnection: close\r\n"
    started_at, first, came = time.perf_counter(), 0.0, b""
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 20)
    writer.write(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)
    with contextlib.closing(writer):
        while part := await reader.read(1 << 16):
            came += part
            if not first and len(came.partition(b"\r\n\r\n")[2]):
                first = time.perf_counter() - started_at
    status = re.match(rb"HTTP/1.1 (\d+)", came)
    return first, time.perf_counter() - started_at, int(status[1]) if status else 0, came.decode("utf-8", "replace")


def made_tokens(text: str, of_lines: bool) -> int | None:
    """How many tokens an answer has, if it says so."""
    if of_lines:
        return text.count('"output"')
    told = re.findall(r'"completion_tokens": ?(\d+)', text)
    return int(told[-1]) if told else None


# Figures --------------------------------------------------------------------------------------------------------------


def rate(loads: list[Load]) -> float:
    """Requests per second."""
    return statistics.median(len(load.end) / load.seconds for load in loads)


def row(loads: list[Load], new: int) -> str:
    first, end = [t for load in loads for t in load.first], [t for load in loads for t in load.end]
    cpu = statistics.median(load.cpu / len(load.end) / new for load in loads)
    cells = [f"{rate(loads):>8.2f}{rate(loads) * new:>8.1f}{statistics.median(first):>9.2f}{p95(first):>7.2f}"]
    return "".join([*cells, f"{p95(end):>8.2f}{cpu * 1e3:>8.1f}{max(load.memory for load in loads):>7.0f}"])


def p95(values: list[float]) -> float:
    return sorted(values)[max(0, round(0.95 * len(values)) - 1)]


if __name__ == "__main__":
    main()
