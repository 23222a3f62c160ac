"""A process that holds one replica of the model, and its engine's loop: commands in, tokens out. Knows no text.

A thread reads the commands, so that the front never waits for a step. When the front is gone, so is the worker.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, is_dataclass, replace
from multiprocessing.connection import Connection
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any

from litgpt.deploy import wire
from litgpt.deploy.grammar import Grammars, Guide
from litgpt.errors import InputError, MachineError, UserError, is_out_of_memory, one_line

if TYPE_CHECKING:
    from litgpt.generate.engine import Engine, Request
    from litgpt.generate.session import Session

LAST_SECONDS = 1.5  # in which a worker ends by itself once the front is gone


def main(handle: int) -> None:
    """Load what the first message says, then serve until the connection closes."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # the front says when to end
    connection = Connection(handle)
    job: wire.Job = connection.recv()
    commands: SimpleQueue[Any] = SimpleQueue()
    threading.Thread(target=_listen, args=(connection, commands), daemon=True).start()
    try:
        with opened(job) as (session, engines):
            connection.send(wire.Ready(_described(session)))
            with suppress(BrokenPipeError, ConnectionResetError):  # the front is gone
                Worker(session, engines, commands, connection).run()
    except (UserError, OSError, MemoryError) as error:
        status = error.exit_status if isinstance(error, UserError) else 3
        connection.send(wire.Failed(one_line(error), status))
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        connection.send(wire.Failed("out of memory; choose a smaller model, a lower precision, or --quantize", 3))


def _listen(connection: Connection, commands: SimpleQueue[Any]) -> None:
    try:
        while True:
            commands.put(connection.recv())
    except (EOFError, OSError):
        commands.put(None)
        time.sleep(LAST_SECONDS)
        if os.getpgrp() == os.getpid():
            os.killpg(0, signal.SIGKILL)  # in the middle of a step, too, and with the ranks that were started
        os._exit(1)


# ------------------------------------------------------------------------------------------------------------ loading


@contextmanager
def opened(job: wire.Job) -> Iterator[tuple[Session, dict[str | None, Engine]]]:
    """The session and its engines: of the model itself (None), and of each adapter on it."""
    import torch

    from litgpt.generate.session import Source, load_session

    with _placed(job) as placement:
        session = load_session(
            Source.find(job.checkpoint_dir, access_token=job.access_token),
            precision=job.precision,
            quantize=job.quantize,
            compile=job.compile,
            prepack=job.prepack,
            prompt_style=job.prompt_style,
            max_rows=job.max_rows,
            placement=placement,
        )
        engines: dict[str | None, Engine] = {None: session.engine}
        for name, directory in job.adapters.items():
            engines[name] = _adapted(session.engine, directory, job)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        yield session, engines


@contextmanager
def _placed(job: wire.Job) -> Iterator[Any]:
    """Where the model goes: None where one device holds it."""
    import torch

    from litgpt.generate import tp
    from litgpt.launch import helpers, machine

    on = machine(job.devices)
    if job.accelerator != "auto" and job.accelerator.replace("gpu", "cuda") != on.accelerator:
        raise InputError(f"accelerator is {job.accelerator}, but this host has {on.accelerator}; give that, or auto")
    if job.strategy == "sequential":
        from litgpt.placement.sequential import Sequential

        yield Sequential.over(on.accelerator, on.devices)
    elif job.strategy == "tensor_parallel" and on.devices > 1:
        from litgpt.placement.tensor_parallel import TensorParallel

        with helpers(on, tp.follow, (job.checkpoint_dir, job.precision, job.quantize)) as ranks:
            placement = TensorParallel.here(ranks.device)
            yield placement
            placement.release()
    else:
        if on.accelerator == "cuda":
            torch.cuda.set_device(job.replica)
        elif job.replicas > 1:
            torch.set_num_threads(max(torch.get_num_threads() // job.replicas, 1))
        yield None


def _adapted(engine: Engine, directory: Any, job: wire.Job) -> Engine:
    """An engine of the same model with an adapter on it: the weights are shared, the adapter's are its own."""
    import copy

    from litgpt import adapters
    from litgpt.generate.engine import Engine

    adapter = adapters.find(directory)
    if adapter is None:
        raise InputError(f"adapters: {directory} is no adapter directory; serve a whole model by itself")
    base = engine.model
    shared = {id(tensor): tensor for tensor in (*base.parameters(), *base.buffers())}
    model = copy.deepcopy(base, shared)
    adapters.attach(model, adapter)
    model.to(engine.device).requires_grad_(False).eval()
    return Engine(model, job.max_rows, n_tokens=engine.n_tokens, compile=job.compile)


def _described(session: Session) -> wire.Described:
    model, style = session.engine.model, session.style
    if is_dataclass(style):
        style = replace(style)  # without the compiled template that it keeps
    return wire.Described(session.tokenizer.dir, style, session.context, model.config.n_embd, len(model.wte.weight))


# ----------------------------------------------------------------------------------------------------------- the loop


@dataclass(eq=False)
class Going:
    """A `Generate` on its way: its answers that have not ended, by their number."""

    command: wire.Generate
    engine: Engine
    requests: dict[int, Request] = field(default_factory=dict)
    guides: dict[int, Guide] = field(default_factory=dict)


class Worker:
    def __init__(
        self, session: Session, engines: dict[str | None, Engine], commands: SimpleQueue[Any], connection: Connection
    ) -> None:
        self.session, self.engines, self.commands, self.connection = session, engines, commands, connection
        ends = [ids[0] for ids in session.style.stop_tokens(session.tokenizer) if len(ids) == 1]
        self.grammars = Grammars(session.tokenizer, ends)
        self.going: dict[int, Going] = {}
        self.places: dict[Request, tuple[Going, int]] = {}
        self.errands: deque[wire.Score | wire.Embed] = deque()  # done one by one, between steps

    def run(self) -> None:
        """Until the front is gone."""
        while self._listen():
            if self.errands:
                self._say([self._done(self.errands.popleft())])
            for engine in self.engines.values():
                if engine.busy:
                    self._say(self._step(engine))

    def _say(self, events: list[wire.Event]) -> None:
        if events:
            self.connection.send(events)

    def _listen(self) -> bool:
        """All commands that are there; where there is nothing to do, wait for one. False: no more will come."""
        idle = not self.errands and not any(engine.busy for engine in self.engines.values())
        while True:
            try:
                command = self.commands.get(block=idle)
            except Empty:
                return True
            if command is None:
                return False
            idle = False
            if isinstance(command, wire.Cancel):
                self._cancel(command)
            elif isinstance(command, wire.Generate):
                self._say(self._start(command))
            else:
                self.errands.append(command)

    def _start(self, command: wire.Generate) -> list[wire.Event]:
        from litgpt.generate.sampling import Sampling

        engine = self.engines[command.adapter]
        try:
            samplings = [Sampling(**sampling) for sampling in command.samplings]
            guides = [self.grammars.guide(command.grammar) for _ in samplings] if command.grammar else []
            requests = engine.submit_samples(
                command.ids,
                samplings,
                max_new_tokens=command.max_new_tokens,
                stop=command.stop,
                logprobs=command.logprobs,
                guides=guides,
            )
        except UserError as error:
            return [wire.Refused(command.key, str(error), 503 if isinstance(error, MachineError) else 400)]
        going = Going(command, engine, dict(enumerate(requests)), dict(enumerate(guides)))
        self.going[command.key] = going
        self.places |= {request: (going, index) for index, request in enumerate(requests)}
        return []

    def _cancel(self, command: wire.Cancel) -> None:
        self.errands = deque(errand for errand in self.errands if errand.key != command.key)
        if (going := self.going.get(command.key)) is not None:
            for index in list(going.requests) if command.index is None else [command.index]:
                if index in going.requests:
                    going.engine.cancel(going.requests[index])
                    self._forget(going, index)

    def _forget(self, going: Going, index: int) -> None:
        del self.places[going.requests.pop(index)]
        if not going.requests:
            del self.going[going.command.key]

    def _step(self, engine: Engine) -> list[wire.Event]:
        try:
            events = engine.step()
        except Exception as error:
            if not isinstance(error, UserError) and not is_out_of_memory(error):
                raise  # a mistake of ours: the front starts another worker
            return self._lost(engine, error)
        said: list[wire.Event] = []
        for event in events:
            if event.request not in self.places:
                continue
            going, index = self.places[event.request]
            if (refused := self._refused(going, index, event.request)) is not None:
                self._cancel(wire.Cancel(going.command.key))
                said.append(refused)
                continue
            scores = tuple((score.token, score.logprob, score.top) for score in event.scores)
            reused = event.request.reused
            said.append(wire.Delta(going.command.key, index, event.tokens, event.finish_reason, scores, reused))
            if event.finish_reason is not None:
                self._forget(going, index)
        return said

    def _refused(self, going: Going, index: int, request: Request) -> wire.Refused | None:
        """What ends this answer, and those to the same prompt with it."""
        if request.error is not None:
            return wire.Refused(going.command.key, one_line(request.error), 500)
        guide = going.guides.get(index)
        if guide is not None and guide.error:
            return wire.Refused(going.command.key, f"the answer cannot be held to its form: {guide.error}")
        return None

    def _lost(self, engine: Engine, error: Exception) -> list[wire.Event]:
        """The step failed, and all rows with it; those that wait go on waiting."""
        message = "out of memory" if is_out_of_memory(error) else one_line(error)
        lost = {going.command.key for going, _ in self.places.values() if going.engine is engine}
        for key in lost:
            self._cancel(wire.Cancel(key))
        return [wire.Refused(key, message, 503) for key in sorted(lost)]

    def _done(self, errand: wire.Score | wire.Embed) -> wire.Event:
        engine = self.engines[errand.adapter]
        try:
            if isinstance(errand, wire.Score):
                scores = next(engine.score([(errand.ids[:1], errand.ids[1:])], top=errand.top))
                return wire.Result(errand.key, [(score.token, score.logprob, score.top) for score in scores])
            from litgpt.generate.embedding import embed

            return wire.Result(errand.key, embed(engine.model, errand.texts).tolist())
        except Exception as error:
            if not isinstance(error, UserError) and not is_out_of_memory(error):
                raise
            return wire.Refused(errand.key, one_line(error), 400 if isinstance(error, InputError) else 503)


if __name__ == "__main__":
    main(int(sys.argv[1]))
