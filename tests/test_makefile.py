"""What `make` does before anything is installed."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")


def make(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, folder)
    alone = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    return subprocess.run(["make", *words], cwd=folder, capture_output=True, text=True, check=False, env=alone)


@pytest.mark.parametrize("target", ["quickstart", "test"])
def test_a_python_that_is_too_old_is_refused_in_one_line_before_anything_is_made(target: str, tmp_path: Path) -> None:
    (tmp_path / "old").write_text("#!/bin/sh\nexit 1\n")  # as any Python that is asked whether it is new enough
    (tmp_path / "old").chmod(0o755)
    done = make(tmp_path, "PYTHON=./old", target)
    assert done.returncode
    assert done.stdout == f"Python 3.11 or newer is needed; name one: make PYTHON=python3.11 {target}\n"
    assert not (tmp_path / ".venv").exists()


def test_the_suite_sees_no_gpu(tmp_path: Path) -> None:
    assert "\nCUDA_VISIBLE_DEVICES= " in make(tmp_path, "--dry-run", "test").stdout
