"""`litgpt serve`: a model over HTTP, with OpenAI's API and the older `/predict`.

    clients -> uvicorn, FastAPI -> scheduler: queue, deadlines -> a worker for each replica: model, engine

FastAPI and uvicorn are driven directly. LitServe does not do what this command promises: in 0.2.19 a client that hangs
up goes on holding its place, the queue has no bound, a timeout only covers the wait, and on SIGTERM workers are left
behind. Who deploys through LitServe has `litgpt.deploy.lit_api`.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import json
import math
import os
import signal
import socket
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from litgpt.errors import InputError, MachineError, extra_missing, near_miss, shown
from litgpt.generate.base import Quantization

if TYPE_CHECKING:
    from litgpt.deploy import wire
    from litgpt.deploy.service import Service

ACCELERATORS = ("auto", "cpu", "cuda", "gpu", "mps")


def main(
    checkpoint_dir: Path,
    *,
    quantize: Quantization | None = None,
    precision: str | None = None,
    temperature: float = 0.8,
    top_k: int | None = 50,
    top_p: float = 1.0,
    max_new_tokens: int = 50,
    devices: int | str = 1,
    accelerator: str = "auto",
    port: int = 8000,
    stream: bool = False,
    openai_spec: bool = False,
    access_token: str | None = None,
    api_path: str | None = "/predict",
    timeout: float | None = None,
    generate_strategy: Literal["sequential", "tensor_parallel"] | None = None,
    host: str = "127.0.0.1",
    insecure: bool = False,
    api_key: str | None = None,
    model_name: str | None = None,
    adapters: list[str] | None = None,
    prompt_style: str | None = None,
    compile: bool = False,
    prepack: bool | None = None,
    batch_size: int = 16,
    max_queue: int = 128,
    max_n: int = 16,
    max_prompt_tokens: int | None = None,
    max_body_bytes: int = 4_194_304,
    cors: list[str] | None = None,
    grace: float = 30.0,
) -> None:
    """Serve a model over HTTP: OpenAI's API below /v1, and /predict.

    Args:
        checkpoint_dir: A checkpoint or adapter directory, its name below checkpoints/, or a repository of the Hugging
            Face Hub.
        quantize: Weights in 4 or 8 bits, to save memory.
        precision: 32-true, bf16-true or 16-true; by default what the files hold.
        temperature: Where a request does not say: flattens (above 1) or sharpens (below 1) the choice; 0 always takes
            the likeliest token.
        top_k: Where a request does not say: draw from the k likeliest tokens only; null draws from all.
        top_p: Where a request does not say: draw from the likeliest tokens that together reach this probability only.
        max_new_tokens: Longest answer of /predict, where a request does not say. OpenAI's endpoints have their own
            rule: a chat may fill the context, a completion has 16 tokens.
        devices: How many devices; each holds the whole model and answers requests of its own, unless generate_strategy
            says how they share it.
        accelerator: auto, cpu, cuda (or gpu) or mps.
        port: Where to listen.
        stream: Let /predict send its answer piece by piece, where a request does not say.
        openai_spec: Has no effect any more: OpenAI's endpoints are always there.
        access_token: For a repository of the Hub that asks for one.
        api_path: The path of /predict.
        timeout: Seconds that an answer may take, waiting included; by default as long as it takes.
        generate_strategy: How devices share one model: sequential puts layers on each, tensor_parallel a part of every
            layer.
        host: The address to listen at; 0.0.0.0 for all networks, which needs a key.
        insecure: Listen beyond this machine without a key.
        api_key: What clients must send as a bearer token; better given as LITGPT_API_KEY, which `ps` does not show.
        model_name: What clients call the model; by default as it is called here.
        adapters: LoRA adapters on the model that clients ask for by name, as name=directory.
        prompt_style: A prompt style by name, instead of the checkpoint's own.
        compile: Compile the model first: slow to start, faster from then on.
        prepack: In bf16 on a CPU, lay the weights out for its products: faster answers for as much memory again as the
            weights take. By default where memory is plenty.
        batch_size: How many answers each replica writes at once.
        max_queue: How many requests may wait beside them; more are told to come again (429).
        max_n: How many answers a request may ask for.
        max_prompt_tokens: Longest prompt; by default what the context holds.
        max_body_bytes: Largest request.
        cors: Web sites whose pages may use the server from a browser, such as https://example.com.
        grace: Seconds that running answers have to end on SIGTERM.
    """
    key = api_key or os.environ.get("LITGPT_API_KEY") or None
    _require_numbers(locals())
    _require_address(host, key, insecure)
    if api_path is None:
        api_path = "/predict"
    if not api_path.startswith("/") or "{" in api_path or api_path.startswith("/v1/"):
        raise InputError(f"api_path is {shown(api_path)}; it begins with / (and not with /v1/), such as /predict")
    if accelerator not in ACCELERATORS:
        raise InputError(
            f"accelerator is {shown(accelerator)}; it is one of {', '.join(ACCELERATORS)}"
            f"{near_miss(accelerator, ACCELERATORS)}"
        )
    _require_packages()
    from litgpt.deploy import connections, wire

    replicas = 1 if generate_strategy else _replicas(devices)
    named = _adapters(adapters)
    job = wire.Job(
        checkpoint_dir,
        devices=devices,
        replicas=replicas,
        accelerator=accelerator,
        strategy=generate_strategy,
        precision=precision,
        quantize=quantize,
        compile=compile,
        prepack=prepack,
        prompt_style=prompt_style,
        max_rows=batch_size,
        adapters=named,
        access_token=access_token,
    )
    name = model_name or str(checkpoint_dir)
    if name in named:
        raise InputError(f"adapters: {name} is the model's own name already; choose another one")
    settings = Settings(
        job,
        models={name: None, **{adapter: adapter for adapter in named}},
        defaults={"temperature": temperature, "top_k": top_k, "top_p": top_p},
        max_new_tokens=max_new_tokens,
        streams=stream,
        max_queue=max_queue,
        max_n=max_n,
        max_prompt_tokens=max_prompt_tokens,
        timeout=timeout,
        grace=grace,
        api_path=api_path,
        api_key=key,
        max_body=max_body_bytes,
        origins=tuple(cors or ()),
    )
    connections.allow_many()
    with bound(host, port) as listener:
        status = asyncio.run(serve(settings, listener))
    if status == "defeated":
        raise MachineError("the workers die again and again; see what they say above, and start the server anew")
    if status == "interrupted":
        raise KeyboardInterrupt


@dataclass(frozen=True)
class Settings:
    """What was asked for, checked."""

    job: wire.Job
    models: Mapping[str, str | None]
    defaults: Mapping[str, Any]
    max_new_tokens: int
    streams: bool
    max_queue: int
    max_n: int
    max_prompt_tokens: int | None
    timeout: float | None
    grace: float
    api_path: str
    api_key: str | None
    max_body: int
    origins: tuple[str, ...]


Status = Literal["stopped", "interrupted", "defeated"]


async def serve(settings: Settings, listener: socket.socket) -> Status:
    """Load the model and answer, until a signal says to end. Running answers have `grace` seconds then."""
    import uvicorn

    from litgpt.deploy import app, connections
    from litgpt.deploy.metrics import Metrics
    from litgpt.deploy.scheduler import Scheduler
    from litgpt.deploy.service import Service
    from litgpt.deploy.text import Text

    status: Status = "stopped"
    server: uvicorn.Server | None = None
    told_to_end, loop, metrics = asyncio.Event(), asyncio.get_running_loop(), Metrics()

    def end(why: Status) -> None:
        nonlocal status
        if told_to_end.is_set():  # asked twice: at once
            scheduler.abort()
        status = why
        told_to_end.set()
        scheduler.close()
        if server is not None:
            server.should_exit = True
            loop.call_later(settings.grace, scheduler.abort)

    scheduler = Scheduler(
        settings.job,
        max_rows=settings.job.max_rows,
        max_queue=settings.max_queue,
        timeout=settings.timeout,
        metrics=metrics,
        on_defeat=lambda: end("defeated"),
    )
    loop.add_signal_handler(signal.SIGTERM, end, "stopped")
    loop.add_signal_handler(signal.SIGINT, end, "interrupted")
    try:
        described = await _unless(told_to_end, scheduler.start())
        if described is None:
            return status
        service = Service(
            Text(described),
            scheduler,
            metrics,
            settings.models,
            settings.defaults,
            settings.max_new_tokens,
            settings.streams,
            settings.max_prompt_tokens,
            settings.max_n,
        )
        built = app.build(
            service,
            api_path=settings.api_path,
            api_key=settings.api_key,
            max_body=settings.max_body,
            origins=settings.origins,
        )
        config = uvicorn.Config(
            built,
            log_config=None,
            access_log=False,
            lifespan="off",
            server_header=False,
            loop="asyncio",
            http=connections.protocol(),
            timeout_graceful_shutdown=math.ceil(settings.grace) + 1,
        )
        server = _server(config)
        print(_greeting(listener, service, settings), flush=True)
        await server.serve(sockets=[listener])
    finally:
        scheduler.stop()
    return status


async def _unless(event: asyncio.Event, work: Any) -> Any:
    """The result of `work`, or None where `event` comes first."""
    task, waiting = asyncio.ensure_future(work), asyncio.ensure_future(event.wait())
    await asyncio.wait({task, waiting}, return_when=asyncio.FIRST_COMPLETED)
    waiting.cancel()
    if task.done():
        return task.result()
    task.cancel()
    return None


def _server(config: Any) -> Any:
    import uvicorn

    class Server(uvicorn.Server):
        @contextlib.contextmanager
        def capture_signals(self) -> Iterator[None]:
            yield  # they are ours

    return Server(config)


def _greeting(listener: socket.socket, service: Service, settings: Settings) -> str:
    host, port = listener.getsockname()[:2]
    host = f"[{host}]" if ":" in host else host
    url = f"http://{host}:{port}"
    name = next(iter(service.models))
    body = json.dumps({"model": name, "messages": [{"role": "user", "content": "What do llamas eat?"}]})
    key = " -H 'Authorization: Bearer '$LITGPT_API_KEY" if settings.api_key else ""
    quoted = body.replace("'", "'\\''")
    return (
        f"Serving {name} at {url} (Ctrl-C ends it). Open that in a browser to talk to it, or try:\n"
        f"  curl {url}/v1/chat/completions{key} -H 'Content-Type: application/json' -d '{quoted}'"
    )


# ------------------------------------------------------------------------------------------------------------- checks


@contextlib.contextmanager
def bound(host: str, port: int) -> Iterator[socket.socket]:
    """A socket that listens: from now on the port is ours, and early clients wait."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise InputError(f"host is {shown(host)}, which cannot be listened at ({error}); try 127.0.0.1") from None
    with listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(address)
            listener.listen(2048)
        except OSError as error:
            raise MachineError(
                f"port {port} at {host} cannot be had ({error.strerror}); end what uses it, or choose another --port"
            ) from None
        yield listener


def _require_address(host: str, key: str | None, insecure: bool) -> None:
    """Without a key the server is for this machine alone."""
    try:
        is_local = ipaddress.ip_address(host).is_loopback
    except ValueError:
        is_local = host == "localhost"
    if not is_local and key is None and not insecure:
        raise InputError(
            f"host is {shown(host)}, so that others may use the server, but there is no key: set LITGPT_API_KEY (or "
            "--api_key), or give --insecure true"
        )
    if key is not None and (not key.isascii() or not key.isprintable() or key != key.strip()):
        raise InputError("the API key holds characters that no HTTP header can; use letters, digits and signs")


def _require_numbers(given: Mapping[str, Any]) -> None:
    """Numbers in their ranges, before anything is loaded."""
    for name in ("max_new_tokens", "batch_size", "max_n", "max_prompt_tokens", "max_body_bytes"):
        if given[name] is not None and given[name] < 1:
            raise InputError(f"{name} is {given[name]}; it must be 1 or more")
    for name in ("max_queue", "grace"):
        if not 0 <= given[name] < math.inf:
            raise InputError(f"{name} is {given[name]}; it must be 0 or more")
    if given["timeout"] is not None and not 0 < given["timeout"] < math.inf:
        raise InputError(f"timeout is {given['timeout']}; it must be above 0, or null for no limit")
    if not 0 <= given["port"] < 65536:
        raise InputError(f"port is {given['port']}; it must lie between 0 (any that is free) and 65535")
    if not 0 <= given["temperature"] < math.inf:
        raise InputError(f"temperature is {given['temperature']}; it must be 0 (greedy) or a positive number")
    if given["top_k"] is not None and given["top_k"] < 1:
        raise InputError(f"top_k is {given['top_k']}; it must be 1 or more, or null to keep all tokens")
    if not 0 <= given["top_p"] <= 1:
        raise InputError(f"top_p is {given['top_p']}; it must lie between 0 and 1")


def _require_packages() -> None:
    for package in ("fastapi", "uvicorn", "prometheus_client"):
        try:
            __import__(package)
        except ImportError:
            raise extra_missing(package, "serve") from None


def _replicas(devices: int | str) -> int:
    """Each on a device of its own."""
    if str(devices).isdecimal() and int(devices) > 0:
        return int(devices)
    if devices != "auto":
        raise InputError(f"devices is {shown(devices)}; give a number, or auto")
    from litgpt.launch import machine

    return machine("auto").devices


def _adapters(given: list[str] | None) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for entry in given or ():
        name, equals, directory = entry.partition("=")
        if not (name and equals and directory):
            raise InputError(f"adapters: {shown(entry)} is no name=directory, such as french=out/lora/final")
        if name in found:
            raise InputError(f"adapters: there are two named {shown(name)}; give each its own name")
        found[name] = Path(directory)
    return found
