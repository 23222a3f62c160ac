"""What /metrics shows, in Prometheus' text format. Counts and times only: nothing of what was asked or said."""

from __future__ import annotations

import time
from collections import deque
from typing import TYPE_CHECKING, Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from litgpt.deploy import wire

if TYPE_CHECKING:
    from litgpt.deploy.scheduler import Scheduler, Ticket

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
WINDOW = 10.0  # seconds over which tokens per second are counted


class Metrics:
    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        to: Any = {"registry": self.registry}
        self.requests = Counter("litgpt_requests", "Requests answered", ("route", "status"), **to)
        self.seconds = Histogram("litgpt_request_seconds", "Duration of requests", ("route",), buckets=SECONDS, **to)
        self.prompt_tokens = Counter("litgpt_prompt_tokens", "Tokens of prompts", **to)
        self.cached_tokens = Counter("litgpt_cached_prompt_tokens", "Of them, those that were known already", **to)
        self.new_tokens = Counter("litgpt_generated_tokens", "Tokens generated", **to)
        self.first_token = Histogram(
            "litgpt_time_to_first_token_seconds", "From a request to its first token", buckets=SECONDS, **to
        )
        self.next_token = Histogram(
            "litgpt_inter_token_latency_seconds",
            "From a token to the next of the same answer",
            buckets=tuple(s / 10 for s in SECONDS),
            **to,
        )
        self.restarts = Counter("litgpt_worker_restarts", "Workers that died and were started again", **to)
        self._gauges = {
            name: Gauge(f"litgpt_{name}", words, **to)
            for name, words in (
                ("queue_length", "Requests that wait for a row"),
                ("rows_in_use", "Answers that are being written"),
                ("rows", "Answers that can be written at once"),
                ("replicas_ready", "Workers with a loaded model"),
                ("tokens_per_second", f"Tokens generated per second, over the last {WINDOW:g} seconds"),
            )
        }
        self._recent: deque[tuple[float, int]] = deque()

    def watch(self, scheduler: Scheduler) -> None:
        """Gauges are read off the scheduler when somebody looks."""
        ready = list(scheduler.replicas)
        self._gauges["queue_length"].set_function(lambda: len(scheduler.waiting))
        self._gauges["rows_in_use"].set_function(lambda: sum(scheduler.rows.values()))
        self._gauges["rows"].set_function(lambda: scheduler.max_rows * len(ready))
        self._gauges["replicas_ready"].set_function(lambda: sum(replica.is_ready for replica in ready))
        self._gauges["tokens_per_second"].set_function(self._speed)

    def tokens(self, ticket: Ticket, event: wire.Delta, now: float) -> None:
        """An answer went on."""
        last = ticket.last_token.get(event.index)
        if not ticket.last_token and isinstance(ticket.command, wire.Generate):
            self.prompt_tokens.inc(len(ticket.command.ids))
            self.cached_tokens.inc(event.reused)
            self.first_token.observe(now - ticket.submitted)
        if last is not None:
            self.next_token.observe(now - last)
        ticket.last_token[event.index] = now
        if event.tokens:
            self.new_tokens.inc(len(event.tokens))
            self._recent.append((now, len(event.tokens)))
            self._forget(now)

    def text(self) -> bytes:
        return generate_latest(self.registry)

    def _forget(self, now: float) -> None:
        while self._recent and self._recent[0][0] < now - WINDOW:
            self._recent.popleft()

    def _speed(self) -> float:
        self._forget(time.monotonic())
        return sum(count for _, count in self._recent) / WINDOW
