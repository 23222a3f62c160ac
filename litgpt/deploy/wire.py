"""What the front and its workers say to each other: ids and plain values. No torch, no text.

front  ----  Generate, Score, Embed, Cancel  --->  worker
       <---  Ready or Failed, then lists of Delta, Result, Refused  ----
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from litgpt.prompts import PromptStyle


@dataclass(frozen=True)
class Job:
    """What a worker is to load, and where."""

    checkpoint_dir: Path
    replica: int = 0
    devices: int | str = 1
    replicas: int = 1
    accelerator: str = "auto"
    strategy: str | None = None  # how one model is laid over several devices
    precision: str | None = None
    quantize: str | None = None
    compile: bool = False
    prepack: bool | None = None
    prompt_style: str | None = None
    max_rows: int = 1
    adapters: Mapping[str, Path] = field(default_factory=dict)
    access_token: str | None = field(default=None, repr=False)


@dataclass(frozen=True)
class Described:
    """What the front must know of the model."""

    tokenizer_dir: Path
    style: PromptStyle
    context: int
    width: int  # of embeddings
    n_rows: int  # ids below this have a row in the model


@dataclass(frozen=True)
class Generate:
    key: int
    ids: list[int]
    samplings: list[dict[str, Any]]  # one for each answer
    max_new_tokens: int
    stop: list[list[int]]
    logprobs: int | None = None
    grammar: str | None = None
    adapter: str | None = None

    @property
    def rows(self) -> int:
        return len(self.samplings)


@dataclass(frozen=True)
class Score:
    """How likely the model finds these ids, the first aside."""

    key: int
    ids: list[int]
    top: int
    adapter: str | None = None
    rows = 1


@dataclass(frozen=True)
class Embed:
    """A vector for each row of ids."""

    key: int
    texts: list[list[int]]
    adapter: str | None = None
    rows = 1


@dataclass(frozen=True)
class Cancel:
    """Nobody waits for a request any more, or for one of its answers."""

    key: int
    index: int | None = None


Command = Generate | Score | Embed


@dataclass(frozen=True)
class Ready:
    described: Described


@dataclass(frozen=True)
class Failed:
    """The model could not be loaded."""

    message: str
    exit_status: int


Scored = tuple[int, float, tuple[tuple[int, float], ...]]  # token, its log-probability, the likeliest ones with theirs


@dataclass(frozen=True)
class Delta:
    """What one step did to one answer."""

    key: int
    index: int
    tokens: tuple[int, ...]
    finish_reason: str | None = None
    scores: tuple[Scored, ...] = ()
    reused: int = 0  # tokens of the prompt that were known already


@dataclass(frozen=True)
class Result:
    """What was asked for, whole: list[Scored] or list[list[float]]."""

    key: int
    value: Any


@dataclass(frozen=True)
class Refused:
    """The request cannot be answered. `status` as in HTTP: 400 where who asked can mend it, 503 where waiting may."""

    key: int
    message: str
    status: Literal[400, 500, 503] = 400


Event = Delta | Result | Refused
