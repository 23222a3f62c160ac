"""The front's end of a worker: starts the process, talks to it, notices its death."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from multiprocessing.connection import Connection
from typing import Any

from litgpt.deploy import wire
from litgpt.errors import InputError, MachineError, UserError

PATIENCE = 2.0  # seconds in which a worker that is let go ends by itself
# Threads of OpenMP that wait for each other spin, and so keep cores from what they wait for: where the front wants one
# too, or anything else, a step takes ten times as long. This bounds it; GCC's library, which torch brings, reads it.
IDLING = {"GOMP_SPINCOUNT": "2000"}


class Replica:
    """One worker. `on_events` and `on_death` are called in the event loop's thread."""

    def __init__(
        self,
        job: wire.Job,
        number: int,
        on_events: Callable[[Replica, list[wire.Event]], None],
        on_death: Callable[[Replica], None],
    ) -> None:
        self.job, self.number = replace(job, replica=number), number
        self.on_events, self.on_death = on_events, on_death
        self.is_ready = False
        self.process: subprocess.Popen[bytes] | None = None
        self.connection: Connection | None = None

    async def start(self) -> wire.Described:
        """Start the process and load the model.

        Raises:
            UserError: as the worker says why it could not.
        """
        ours, theirs = socket.socketpair()
        with theirs:
            environment = {**IDLING, **os.environ}
            if self.job.accelerator == "cpu":
                environment["CUDA_VISIBLE_DEVICES"] = ""
            self.process = subprocess.Popen(
                [sys.executable, "-m", "litgpt.deploy.worker", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                env=environment,
                start_new_session=True,  # Ctrl-C is for the front, which says what is to end, and when
            )
        self.connection = Connection(ours.detach())
        self.connection.send(self.job)
        loop = asyncio.get_running_loop()
        first: asyncio.Future[wire.Ready | wire.Failed | None] = loop.create_future()
        threading.Thread(target=self._listen, args=(self.connection, loop, first), daemon=True).start()
        answer = await first
        if isinstance(answer, wire.Failed):
            self.stop()
            raise _as_error(answer)
        if answer is None:
            self.stop()
            raise MachineError(f"the worker of replica {self.number} died while it loaded the model")
        self.is_ready = True
        return answer.described

    def send(self, message: wire.Command | wire.Cancel) -> None:
        """To a worker that is dead nothing is said: its death is told elsewhere."""
        if self.connection is not None:
            with suppress(OSError):
                self.connection.send(message)

    def stop(self) -> None:
        """Let the worker go; it has ended when this returns."""
        self.is_ready = False
        connection, self.connection = self.connection, None
        process, self.process = self.process, None
        if connection is not None:
            with socket.socket(fileno=os.dup(connection.fileno())) as end, suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)  # wakes the thread that listens, too
            connection.close()
        if process is not None:
            with suppress(subprocess.TimeoutExpired):
                process.wait(PATIENCE)
            with suppress(ProcessLookupError):  # with the processes that it started for other devices
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    def _listen(self, connection: Connection, loop: asyncio.AbstractEventLoop, first: asyncio.Future[Any]) -> None:
        """In a thread of its own: what the worker says, until it is gone."""

        def tell(call: Callable[..., None], *arguments: Any) -> None:
            with suppress(RuntimeError):  # the loop is closed: nobody listens any more
                loop.call_soon_threadsafe(call, *arguments)

        def answer(value: Any) -> None:
            if not first.done():
                first.set_result(value)

        try:
            tell(answer, connection.recv())
            while True:
                tell(self._heard, connection, connection.recv())
        except (EOFError, OSError, TypeError):  # TypeError: closed in the middle of a read
            tell(answer, None)
            tell(self._died, connection)

    def _heard(self, connection: Connection, events: list[wire.Event]) -> None:
        if connection is self.connection:
            self.on_events(self, events)

    def _died(self, connection: Connection) -> None:
        if connection is self.connection and self.is_ready:
            self.stop()
            self.on_death(self)


def _as_error(failed: wire.Failed) -> UserError:
    return InputError(failed.message) if failed.exit_status == InputError.exit_status else MachineError(failed.message)
