"""A script on two ranks that talk through gloo, without Lightning: what it imports is imported once, for both."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

_FORK = """
import os, sys
import torch, torch.distributed as dist
folder, rank = sys.argv[1], int(os.fork() == 0)
sys.stdout = open(f"{folder}/said-{rank}", "w")
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
"""
_JOIN = """
dist.barrier()
dist.destroy_process_group()
sys.stdout.close()
if rank == 0:
    sys.exit(os.waitpid(-1, 0)[1] != 0)
"""


def run_on_two(imports: str, script: str, folder: Path) -> list[str]:
    """Runs `script`, which knows `folder`, `rank`, `torch` and `dist`; returns what each rank printed."""
    done = subprocess.run(
        [sys.executable, "-c", imports + _FORK + script + _JOIN, str(folder)],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return [(folder / f"said-{rank}").read_text() for rank in (0, 1)]
