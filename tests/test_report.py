"""What people see of a run: words, progress, metrics, picture."""

from __future__ import annotations

import io
import os
import sys
import threading
import time
from pathlib import Path

import pytest

from litgpt import report
from litgpt.errors import InputError, MachineError


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Clock:
    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr(time, "monotonic", lambda: self.now)
        monkeypatch.setattr("tqdm.std.time", lambda: self.now)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (report.duration(65.3), "1:05"),
        (report.duration(3725), "1:02:05"),
        (report.quantity(9999), "9999"),
        (report.quantity(14_067_712), "14.1 M"),
        (report.quantity(3e12), "3.0 T"),
    ],
)
def test_numbers_are_put_in_words(words: str, expected: str) -> None:
    assert words == expected


def test_a_log_gets_plain_lines_every_few_seconds_and_the_last_one(clock: Clock) -> None:
    log = io.StringIO()
    progress = report.Progress(100, log)
    progress.start(0, 0)
    for step in range(1, 101):
        clock.now += 0.5
        progress.update(step, step * 50, 2.5)
    progress.close()
    lines = log.getvalue().splitlines()
    assert 8 <= len(lines) <= 12
    assert all(line.isprintable() for line in lines)
    assert lines[-1].startswith("step 100/100")
    assert "loss 2.500" in lines[-1]
    assert "100 tok/s" in lines[-1]


def test_a_terminal_gets_one_moving_line_with_loss_speed_and_eta(clock: Clock) -> None:
    terminal = Terminal()
    progress = report.Progress(4, terminal)
    progress.start(0, 0)
    clock.now += 10
    progress.update(1, 1000, 3.25)
    progress.note("validated")
    progress.close()
    shown = terminal.getvalue()
    assert "loss 3.250  100 tok/s  ETA 00:30" in shown
    assert "validated\n" in shown
    assert shown.endswith("\n")


def test_a_terminal_that_does_not_know_its_width_gets_a_line_too(clock: Clock) -> None:
    ours, theirs = os.openpty()  # 0 columns, as in containers
    with os.fdopen(ours, "rb", buffering=0) as seen, os.fdopen(theirs, "w") as terminal:
        progress = report.Progress(4, terminal)
        progress.start(0, 0)
        clock.now += 10
        progress.update(1, 1000, 3.25)
        progress.close()
        assert b"loss 3.250" in seen.read(4096)


def test_the_speed_is_that_of_the_wall_clock_also_after_a_resume(clock: Clock) -> None:
    progress = report.Progress(0, io.StringIO())
    progress.start(50, 1_000_000)
    clock.now += 4
    progress.update(51, 1_002_000, 1.0)
    assert progress.tokens_per_second == 500


def test_other_ranks_show_nothing(clock: Clock) -> None:
    log = io.StringIO()
    progress = report.Progress(1, log, shown=False)
    progress.start(0, 0)
    progress.update(1, 1, 1.0)
    progress.note("x")
    progress.close()
    assert log.getvalue() == ""


def test_metrics_are_one_whole_row_per_step(tmp_path: Path) -> None:
    metrics = report.Metrics(tmp_path / "logs" / "metrics.csv")
    metrics.add({"step": 1, "tokens": 64, "loss": 0.1 + 0.2, "lr": 1e-5, "seconds": 1.5})
    metrics.add({"step": 2, "tokens": 128, "loss": 2.0, "val_loss": 3.0, "seconds": 2.5})
    metrics.close()
    first, second = report.read_metrics(metrics.path)
    assert tuple(first) == report.COLUMNS
    assert float(first["loss"]) == 0.1 + 0.2  # exact
    assert first["val_loss"] == ""
    assert second["val_loss"] == "3.0"


def test_going_on_cuts_rows_beyond_the_checkpoint_and_a_torn_one(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    metrics = report.Metrics(path)
    for step in range(1, 6):
        metrics.add({"step": step, "loss": 1.0, "seconds": 0.1})
    metrics.close()
    path.write_text(path.read_text() + "6,12")
    again = report.Metrics(path, kept=3)
    again.add({"step": 4, "loss": 2.0, "seconds": 0.2})
    again.close()
    assert [row["step"] for row in report.read_metrics(path)] == ["1", "2", "3", "4"]


@pytest.mark.parametrize(
    "content", [b"step,seconds\n\xff\xfe,1\n", b"step,seconds\nx,1\n", b"a,seconds\n1,1\n", b"a\n1\n"]
)
def test_metrics_that_make_no_sense_are_named(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"metrics\.csv is damaged.*move it away"):
        report.Metrics(path, kept=3)
    assert path.read_bytes() == content


def test_a_bar_holds_no_semaphore_that_an_ended_rank_would_leave_behind() -> None:
    assert isinstance(report.Bar.get_lock(), type(threading.RLock()))


def test_metrics_that_cannot_be_written_are_machine_trouble(tmp_path: Path) -> None:
    (tmp_path / "logs").write_text("a file where the directory should be")
    with pytest.raises(MachineError, match="logs"):
        report.Metrics(tmp_path / "logs" / "metrics.csv")


def test_the_picture_shows_the_losses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figure = pytest.importorskip("matplotlib.figure").Figure
    drawn, save = [], figure.savefig
    monkeypatch.setattr(figure, "savefig", lambda self, *args, **how: (drawn.append(self), save(self, *args, **how)))
    metrics = report.Metrics(tmp_path / "metrics.csv")
    for step in range(1, 5):
        metrics.add({"step": step, "loss": 5.0 / step, "val_loss": 5.5 / step if step % 2 else None, "seconds": step})
    metrics.close()
    assert str(tmp_path / "loss.png") in report.picture(metrics.path, tmp_path / "loss.png", baseline=4.0)
    assert all(step == int(step) for step in drawn[0].axes[0].get_xticks())
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_one_line_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    line = report.picture(tmp_path / "metrics.csv", tmp_path / "loss.png")
    assert "litgpt[plot]" in line
    assert "\n" not in line
