"""Who is answered when: a bounded queue before the rows of the workers, deadlines, and what happens when a worker dies.

submit -> waiting -> (a worker has enough free rows) -> with a worker -> done, cancelled, too late or lost
"""

from __future__ import annotations

import asyncio
import itertools
import sys
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import replace

from litgpt.deploy import wire
from litgpt.deploy.metrics import Metrics
from litgpt.deploy.refusals import Refusal, lost, overloaded, refused, too_late, unavailable
from litgpt.deploy.replica import Replica
from litgpt.errors import UserError, one_line

MOST_RESTARTS = 3  # in a row, without an answer between them


class Ticket:
    """A request on its way. Its events are read once, by who asked."""

    def __init__(self, command: wire.Command, scheduler: Scheduler) -> None:
        self.command, self.scheduler = command, scheduler
        self.replica: Replica | None = None
        self.open = set(range(command.rows))  # answers that have not ended
        self.news: asyncio.Queue[wire.Delta | wire.Result | Refusal] = asyncio.Queue()
        self.deadline: asyncio.TimerHandle | None = None
        self.submitted = time.monotonic()
        self.last_token: dict[int, float] = {}

    @property
    def is_over(self) -> bool:
        return not self.open

    async def events(self) -> AsyncIterator[wire.Delta | wire.Result]:
        """What happens to it, to the end. Raises Refusal where the end is none."""
        while not (self.is_over and self.news.empty()):
            event = await self.news.get()
            if isinstance(event, Refusal):
                raise event
            yield event

    def cancel(self, index: int | None = None) -> None:
        """Nobody waits for it any more, or for one of its answers."""
        self.scheduler.cancel(self, index)


class Scheduler:
    """All requests of one server, over its replicas.

    Args:
        max_rows: of each replica.
        max_queue: requests that may wait beside those that run.
        timeout: seconds that a request may take, waiting included; None: as long as it takes.
        on_defeat: called when workers die again and again.
    """

    def __init__(
        self,
        job: wire.Job,
        *,
        max_rows: int,
        max_queue: int,
        timeout: float | None,
        metrics: Metrics,
        on_defeat: Callable[[], None],
    ) -> None:
        self.replicas = [Replica(job, number, self._heard, self._died) for number in range(job.replicas)]
        self.max_rows, self.max_queue, self.timeout = max_rows, max_queue, timeout
        self.metrics, self.on_defeat = metrics, on_defeat
        self.waiting: deque[Ticket] = deque()
        self.running: dict[int, Ticket] = {}  # by their keys
        self.rows = dict.fromkeys(range(job.replicas), 0)  # in use, of each replica
        self.restarts = 0  # in a row
        self.is_closed = False
        self._keys = itertools.count()
        self._tasks: set[asyncio.Task[None]] = set()
        metrics.watch(self)

    async def start(self) -> wire.Described:
        """Load the model: first in one worker, which downloads and checks, then in the others."""
        described = await self.replicas[0].start()
        await asyncio.gather(*(replica.start() for replica in self.replicas[1:]))
        return described

    # -- what the HTTP side does

    def require_place(self, rows: int = 1) -> None:
        """Refusal where a request would not be queued now: told before its prompt is read, which may be long."""
        if self.is_closed:
            raise unavailable("the server is shutting down")
        if not self.is_ready and not any(replica.process for replica in self.replicas):
            raise unavailable("no worker is running")
        if len(self.waiting) >= self.max_queue and not self._free(rows):
            raise overloaded()

    def submit(self, command: wire.Command) -> Ticket:
        """Queue a request. Raises Refusal: the queue is full, or nobody is there to answer."""
        self.require_place(command.rows)
        ticket = Ticket(replace(command, key=next(self._keys)), self)
        if self.timeout is not None:
            loop = asyncio.get_running_loop()
            ticket.deadline = loop.call_later(self.timeout, self._end, ticket, too_late(self.timeout))
        self.waiting.append(ticket)
        self._dispatch()
        return ticket

    def cancel(self, ticket: Ticket, index: int | None = None) -> None:
        if index is None:
            self._end(ticket, None)
        elif index in ticket.open:
            if ticket.replica is not None:
                ticket.replica.send(wire.Cancel(ticket.command.key, index))
            self._ended(ticket, {index})

    @property
    def is_ready(self) -> bool:
        return any(replica.is_ready for replica in self.replicas) and not self.is_closed

    @property
    def is_idle(self) -> bool:
        return not self.waiting and not self.running

    def close(self) -> None:
        """Nothing more is taken in."""
        self.is_closed = True

    def abort(self) -> None:
        """End all that waits or runs."""
        for ticket in [*self.waiting, *self.running.values()]:
            self._end(ticket, unavailable("the server is shutting down"))

    def stop(self) -> None:
        """End the workers."""
        self.close()
        for task in self._tasks:
            task.cancel()
        for replica in self.replicas:
            replica.stop()

    # -- rows

    def _free(self, rows: int) -> Replica | None:
        """The replica with the most free rows, if they are enough; a request for more than there are waits for all."""
        ready = [replica for replica in self.replicas if replica.is_ready]
        best = min(ready, key=lambda replica: self.rows[replica.number], default=None)
        if best is None or self.rows[best.number] + min(rows, self.max_rows) > self.max_rows:
            return None
        return best

    def _dispatch(self) -> None:
        while self.waiting and (replica := self._free(len(self.waiting[0].open))) is not None:
            ticket = self.waiting.popleft()
            ticket.replica = replica
            self.rows[replica.number] += len(ticket.open)
            self.running[ticket.command.key] = ticket
            replica.send(ticket.command)

    def _ended(self, ticket: Ticket, answers: set[int]) -> None:
        """These of its answers have ended."""
        if ticket.replica is not None:
            self.rows[ticket.replica.number] -= len(ticket.open & answers)
        ticket.open -= answers
        if ticket.is_over:
            self.running.pop(ticket.command.key, None)
            if ticket.deadline is not None:
                ticket.deadline.cancel()
        self._dispatch()

    def _end(self, ticket: Ticket, why: Refusal | None) -> None:
        """End a request, wherever it is; `why` is what who asked is told."""
        if ticket.is_over:
            return
        if why is not None:
            ticket.news.put_nowait(why)
        if ticket.replica is None:
            self.waiting.remove(ticket)
        else:
            ticket.replica.send(wire.Cancel(ticket.command.key))
        self._ended(ticket, set(ticket.open))

    # -- what workers say

    def _heard(self, replica: Replica, events: Sequence[wire.Event]) -> None:
        self.restarts = 0
        now = time.monotonic()
        for event in events:
            ticket = self.running.get(event.key)
            if ticket is None:
                continue  # cancelled meanwhile
            if isinstance(event, wire.Refused):
                ticket.news.put_nowait(refused(event))
                self._ended(ticket, set(ticket.open))
                continue
            ticket.news.put_nowait(event)
            if isinstance(event, wire.Delta):
                self.metrics.tokens(ticket, event, now)
                if event.finish_reason is not None:
                    self._ended(ticket, {event.index})
            else:
                self._ended(ticket, {0})

    def _died(self, replica: Replica) -> None:
        """A worker is gone: those it worked for are told, and another one is started."""
        print(f"litgpt serve: the worker of replica {replica.number} died; starting another", file=sys.stderr)
        for ticket in list(self.running.values()):
            if ticket.replica is replica:
                ticket.news.put_nowait(lost())
                self._ended(ticket, set(ticket.open))
        self.metrics.restarts.inc()
        if not self.is_closed:
            task = asyncio.get_running_loop().create_task(self._restart(replica))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _restart(self, replica: Replica) -> None:
        while self.restarts < MOST_RESTARTS:
            self.restarts += 1
            try:
                await replica.start()
            except UserError as error:
                print(f"litgpt serve: {one_line(error)}", file=sys.stderr)
                continue
            self._dispatch()
            return
        self.on_defeat()
        if not any(each.is_ready for each in self.replicas):
            self.abort()  # nobody will answer
