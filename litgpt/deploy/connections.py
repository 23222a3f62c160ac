"""Connections that send nothing: they are closed, so that they do not take the place of others."""

from __future__ import annotations

import asyncio
import resource
from contextlib import suppress
from typing import Any

HEAD_SECONDS = 5.0  # in which the head of a request must have come, from the connection or the end of the last answer


def protocol() -> Any:
    """uvicorn's protocol with this limit; it has one of its own for connections that wait after an answer only."""
    from uvicorn.protocols.http.auto import AutoHTTPProtocol

    class Protocol(AutoHTTPProtocol):  # type: ignore[valid-type, misc]
        _patience: asyncio.TimerHandle | None = None

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self._wait_for_head()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            self._wait_for_head()

        def connection_lost(self, exc: Exception | None) -> None:
            super().connection_lost(exc)
            if self._patience is not None:
                self._patience.cancel()

        def _wait_for_head(self) -> None:
            if self._patience is None and (self.cycle is None or self.cycle.response_complete):
                self._patience = self.loop.call_later(HEAD_SECONDS, self._give_up, self.cycle)

        def _give_up(self, last: Any) -> None:
            self._patience = None
            if self.cycle is last:
                self.transport.close()
            else:
                self._wait_for_head()  # of the next request

    return Protocol


def allow_many() -> None:
    """As many open connections as the system lets this process have: usually it starts with 1024."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
