"""A running `litgpt serve`, on a port that is free."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil

from tests.makers.checkpoints import make_hf_checkpoint
from tests.makers.configs import shrunk
from tests.makers.tokenizers import train_tiny_tokenizer

CHATML = (
    "{% if tools %}<|im_start|>system\n{{ tools | tojson }} <tool_call>{...}</tool_call><|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for c in m.tool_calls or [] %}<tool_call>{{ c.function | tojson }}</tool_call>{% endfor %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CONTEXT = 512


def make_served(directory: Path) -> Path:
    """A tiny random model with a chat template that knows tools."""
    tokenizer = train_tiny_tokenizer(
        directory / "tokenizer", special_tokens=("<|im_start|>", "<|im_end|>"), chat_template=CHATML
    )
    config = shrunk("SmolLM2-135M-Instruct", block_size=CONTEXT, vocab_size=300, padded_vocab_size=320)
    return make_hf_checkpoint(directory / "T", config, seed=3, tokenizer_dir=tokenizer)


@dataclass
class Server:
    process: subprocess.Popen[str]
    url: str
    said: Path  # what it printed

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])

    def metrics(self, **headers: str) -> dict[str, float]:
        """The figures by name; those with labels by name and labels."""
        lines = httpx.get(f"{self.url}/metrics", headers=headers).text.splitlines()
        return {name: float(value) for name, value in (x.rsplit(" ", 1) for x in lines if not x.startswith("#"))}

    def until(self, wanted: object, what: str, **headers: str) -> None:
        """Wait for a figure; half a minute at most."""
        for _ in range(600):
            if self.metrics(**headers)[what] == wanted:
                return
            time.sleep(0.05)
        raise AssertionError(f"{what} is {self.metrics(**headers)[what]}, not {wanted}")

    def workers(self) -> list[psutil.Process]:
        """The processes that it started, and theirs."""
        return psutil.Process(self.process.pid).children(recursive=True)

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(30)


def alive(processes: list[psutil.Process]) -> list[psutil.Process]:
    """Those that have not ended; where nobody fetches what an orphan left, it goes on being listed as a zombie."""
    return [p for p in processes if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]


@contextmanager
def serving(checkpoint: Path, *options: str, said: Path, **environment: str) -> Iterator[Server]:
    """A server with these options; `said` is a file for what it prints."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    command = [sys.executable, "-m", "litgpt", "serve", str(checkpoint), "--port", "0", *options]
    with open(said, "w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, text=True, env=environment)
    try:
        for _ in range(1200):
            if (found := re.search(r" at (http://\S+) ", said.read_text())) is not None:
                break
            assert process.poll() is None, said.read_text()
            time.sleep(0.05)
        assert found is not None, said.read_text()
        yield Server(process, found[1], said)
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            process.wait(30)
