"""What people see of a run: the plan, a progress line, the table of metrics, the picture of the losses, closing words.

Knows no torch and no model: it gets numbers and paths.
"""

from __future__ import annotations

import csv
import io
import os
import shlex
import shutil
import sys
import threading
import time
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from tqdm import tqdm

from litgpt.errors import InputError, MachineError

COLUMNS = ("step", "tokens", "loss", "val_loss", "lr", "grad_norm", "padding", "tokens_per_second", "seconds")
RATE_WINDOW = 20.0  # seconds over which the progress line averages the speed
QUIET_EVERY = 5.0  # seconds between two lines where no terminal shows a moving one


# Words for numbers ---------------------------------------------------------------------------------------------------


def duration(seconds: float) -> str:
    """65.3 -> '1:05', 3725 -> '1:02:05'."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def quantity(number: float) -> str:
    """14067712 -> '14.1 M'; exact below ten thousand."""
    if number < 10_000:
        return f"{number:.0f}"
    for unit in ("k", "M", "B"):
        number /= 1000
        if number < 1000:
            return f"{number:.1f} {unit}"
    return f"{number / 1000:.1f} T"


def table(rows: Mapping[str, str]) -> str:
    """Two columns, a row per entry, indented as the plan is printed."""
    width = max(map(len, rows), default=0)
    return "\n".join(f"  {name:<{width}}  {value}" for name, value in rows.items())


# While it runs -------------------------------------------------------------------------------------------------------


class Bar(tqdm):
    """How far something is: a moving bar on a terminal, a plain line every few seconds elsewhere.

    Args:
        total: what `at` will reach; 0 where nobody knows.
        what: words before the numbers.
        done: where it starts.
        shown: False shows nothing, as on all ranks but the first.
        delay: seconds before anything is shown.
    """

    monitor_interval = 0  # tqdm's thread would outlive signals
    _lock = threading.RLock()  # tqdm's own holds a semaphore too, which Python reports as leaked when a rank is ended

    def __init__(
        self, total: float, what: str = "", *, done: float = 0, stream: TextIO | None = None, **options: Any
    ) -> None:
        stream = stream or sys.stdout
        self.moving, self.words, self._line = stream.isatty(), "", ""
        far = ("{bar:12}  " if self.moving else "") + "{percentage:3.0f}%  {words}  ETA {remaining}"
        super().__init__(
            total=total or None,
            initial=done,
            desc=what,
            file=stream,
            disable=not options.get("shown", True),
            delay=options.get("delay", 0.0) or 1e-6,  # not at once: there is nothing to say yet
            mininterval=0.1 if self.moving else QUIET_EVERY,
            miniters=0,
            smoothing=0.1,
            dynamic_ncols=_is_measured(stream),
            ncols=None if _is_measured(stream) else shutil.get_terminal_size().columns,
            bar_format=f"{{desc}} {far if total else '{words}'}",
        )

    @property
    def format_dict(self) -> dict[str, Any]:
        return {**super().format_dict, "words": self.words}

    def at(self, done: float, words: str, what: str | None = None) -> None:
        """Show that `done` is reached, with a few words."""
        self.words = words
        if what is not None:
            self.set_description_str(what, refresh=False)
        self.update(done - (self.n or 0))

    def note(self, line: str) -> None:
        """A line that stays, above the moving one."""
        if self.disable:
            return
        if self.moving:
            self.clear()
        print(line, file=self.fp, flush=True)
        if self.moving and self._line:
            self.refresh()

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        line = str(self) if msg is None else msg
        if self.moving:
            super().display(line, pos)
        elif line and line != self._line:
            print(line, file=self.fp, flush=True)
        self._line = line or self._line

    def close(self) -> None:
        """Leave the last state standing, if anything was shown."""
        if not self.moving and not self.disable and self.format_dict["elapsed"] >= self.delay:
            self.display()
            self.leave = False
        super().close()


def _is_measured(stream: TextIO) -> bool:
    """Whether a terminal knows how wide it is; those that containers and remote commands are given say 0."""
    try:
        return os.get_terminal_size(stream.fileno()).columns > 0
    except (OSError, ValueError):
        return False


class Progress:
    """The bar of a training run. `total` is the last step; 0 where only a time limit ends the run."""

    def __init__(self, total: int, stream: TextIO | None = None, *, shown: bool = True) -> None:
        self.total, self.stream, self.shown = total, stream, shown
        self.bar: Bar | None = None
        self._marks: deque[tuple[float, int]] = deque()  # (time, tokens)

    def start(self, step: int, tokens: int) -> None:
        self.bar = Bar(self.total, done=step, stream=self.stream, shown=self.shown)
        self._marks.append((time.monotonic(), tokens))

    def update(self, step: int, tokens: int, loss: float) -> None:
        """Show that `step` steps and `tokens` tokens are done."""
        assert self.bar is not None
        now = time.monotonic()
        self._marks.append((now, tokens))
        while len(self._marks) > 2 and now - self._marks[1][0] > RATE_WINDOW:
            self._marks.popleft()
        what = f"step {step}/{self.total}" if self.total else f"step {step}"
        self.bar.at(step, f"loss {loss:.3f}  {self.tokens_per_second:,.0f} tok/s", what)

    def note(self, line: str) -> None:
        """A line that stays, above the moving one."""
        if self.bar is not None:
            self.bar.note(line)

    def close(self) -> None:
        """Leave the last state of the moving line standing."""
        if self.bar is not None:
            self.bar.close()

    @property
    def tokens_per_second(self) -> float:
        (then, before), (now, after) = self._marks[0], self._marks[-1]
        return (after - before) / (now - then) if now > then else 0.0


class Metrics:
    """`metrics.csv`: a row per logged step, whole rows only, in the order of the steps.

    Opening it for a run that goes on cuts off what a killed run wrote after the step `kept`.
    """

    def __init__(self, path: Path, kept: int | None = None) -> None:
        self.path = path
        rows = [] if kept is None else _rows_up_to(path, kept)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            _replace(path, _csv([dict(zip(COLUMNS, COLUMNS, strict=True)), *rows]))
            self._file = open(path, "ab", buffering=0)  # noqa: SIM115  (open as long as the run)
        except OSError as error:
            raise _lost(path, error) from error

    def add(self, row: Mapping[str, float | int | None]) -> None:
        """Append one row in a single write; a column that is not given stays empty."""
        try:
            self._file.write(_csv([row]))
        except OSError as error:
            raise _lost(self.path, error) from error

    def close(self) -> None:
        self._file.close()


def _rows_up_to(path: Path, kept: int) -> list[dict[str, str]]:
    try:
        return [row for row in read_metrics(path) if int(row["step"]) <= kept]
    except (ValueError, KeyError, TypeError) as error:  # not text, or not such rows
        raise InputError(f"{path} is damaged: {error}; move it away, and the run goes on with a new one") from None


def read_metrics(path: Path) -> list[dict[str, str]]:
    """The rows of a metrics file; a last row without its line end, torn by a kill, is left out."""
    if not path.is_file():
        return []
    whole, _, _ = path.read_text(encoding="utf-8").rpartition("\n")
    return [row for row in csv.DictReader(io.StringIO(whole)) if row["seconds"] is not None]


def _csv(rows: Iterable[Mapping[str, Any]]) -> bytes:
    lines = (",".join("" if row.get(name) is None else str(row[name]) for name in COLUMNS) for row in rows)
    return "".join(f"{line}\n" for line in lines).encode()


def _replace(path: Path, content: bytes) -> None:
    beside = path.with_name(path.name + ".new")
    beside.write_bytes(content)
    os.replace(beside, path)


def _lost(path: Path, error: OSError) -> MachineError:
    return MachineError(f"{path} cannot be written: {error.strerror}; free or mend the disk, then --resume auto")


# Afterwards ----------------------------------------------------------------------------------------------------------


def picture(metrics: Path, target: Path, *, baseline: float | None = None) -> str:
    """Draw the losses of `metrics` into `target`; returns the line to print, also where there is nothing to draw with.

    `baseline` is a loss to compare with (the unigram model's), drawn as a dashed line.
    """
    try:
        from matplotlib.figure import Figure  # the class itself: pyplot would keep state and look for a display
        from matplotlib.ticker import MaxNLocator
    except ImportError:
        return "no picture of the losses: matplotlib is not installed (pip install 'litgpt[plot]')"
    rows = read_metrics(metrics)
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    axes.plot(*_points(rows, "loss"), color="#9bbcd8", linewidth=1, label="training")
    axes.plot(*_points(rows, "val_loss"), color="#d1495b", marker="o", markersize=3.5, label="validation")
    if baseline is not None:
        axes.axhline(baseline, color="#777777", linestyle="--", linewidth=1, label="unigram model")
    axes.set(xlabel="step", ylabel="loss (nats per token)")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))  # there is no half a step
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(target, dpi=150)
    return f"picture of the losses: {target}"


def _points(rows: Sequence[Mapping[str, str]], column: str) -> tuple[list[int], list[float]]:
    present = [row for row in rows if row[column]]
    return [int(row["step"]) for row in present], [float(row[column]) for row in present]


def next_commands(checkpoint_dir: Path, prompt: str | None = None) -> str:
    """What to type with the model that was just made; `prompt`: what it may be asked, if it learnt to answer."""
    place, asked = shlex.quote(str(checkpoint_dir)), shlex.quote(prompt or "Once upon a time")
    return f"next:\n  litgpt generate {place} --prompt {asked}\n  litgpt chat {place}"
