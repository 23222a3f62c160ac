"""Devices, loggers and ranks: what is refused at once, and what happens when a rank dies."""

from __future__ import annotations

import importlib.util
import os
import re
import signal
import subprocess
import sys
import threading
import time
import types
from pathlib import Path
from typing import Any

import pytest
import torch

from litgpt import launch
from litgpt.args import LogArgs
from litgpt.errors import InputError, MachineError
from litgpt.launch import Machine

TWO = Machine("cpu", 2)
ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("devices", [0, -2, 10_000, "many", "²"])
def test_devices_that_are_not_there_are_refused_with_both_numbers(devices: int | str) -> None:
    present = torch.cuda.device_count() or os.cpu_count()
    with pytest.raises(InputError, match=f"devices is {re.escape(str(devices))}.*{present}"):
        launch.machine(devices)


HOSTS = ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK", "GROUP_RANK", "RANK", "SLURM_NTASKS", "LSB_JOBID")


@pytest.mark.parametrize(
    ("variables", "enough"),
    [
        ({}, False),
        ({"MASTER_ADDR": "a", "MASTER_PORT": "1"}, False),
        ({"MASTER_ADDR": "a", "MASTER_PORT": "1", "NODE_RANK": "1"}, True),
        ({"SLURM_NTASKS": "2"}, True),
    ],
)
def test_several_hosts_need_someone_who_says_where_they_are(
    variables: dict[str, str], enough: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in (*HOSTS, "OMPI_COMM_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    if enough:
        assert launch.machine(1, num_nodes=2).num_nodes == 2
    else:
        with pytest.raises(InputError, match=r"num_nodes is 2.*torchrun.*MASTER_ADDR, MASTER_PORT and NODE_RANK"):
            launch.machine(1, num_nodes=2)


STARTED = {
    "torchrun": {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2", "WORLD_SIZE": "4"},
    "srun": {"SLURM_STEP_NUM_TASKS": "4", "SLURM_STEP_NUM_NODES": "2", "SLURM_NTASKS": "4"},
}


@pytest.mark.parametrize("launcher", STARTED)
def test_processes_that_are_there_already_are_the_devices(launcher: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {**STARTED[launcher], "MASTER_ADDR": "a", "MASTER_PORT": "1", "NODE_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    machine = launch.machine("auto", num_nodes=2)
    assert (machine.devices, machine.num_nodes, machine.world_size) == (2, 2, 4)
    assert launch.machine(2, num_nodes=2) == machine
    with pytest.raises(InputError, match=f"devices is 1, but {launcher} started 2 processes.*give --devices 2"):
        launch.machine(1, num_nodes=2)
    with pytest.raises(InputError, match=f"num_nodes is 1, but {launcher} runs on 2; give --num_nodes 2"):
        launch.machine(2)


def test_mlflow_files_a_run_in_a_database_of_the_run(tmp_path: Path) -> None:
    pytest.importorskip("mlflow")
    tracker = launch.tracker("mlflow", tmp_path / "run", LogArgs())
    assert tracker is not None
    tracker.log_metrics({"loss": 1.0}, step=1)
    tracker.finalize("success")
    assert [path.name for path in (tmp_path / "run" / "logs").iterdir()] == ["mlflow.db"]


def test_auto_is_one_process_without_a_gpu() -> None:
    machine = launch.machine("auto")
    assert machine.devices == (torch.cuda.device_count() or 1)
    assert machine.free_memory() > 0


def test_a_misspelt_logger_gets_the_near_miss_and_a_missing_package_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    launch.require_logger("csv")
    with pytest.raises(InputError, match=r"tensorbord.*did you mean 'tensorboard'"):
        launch.require_logger("tensorbord")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"wandb is not installed.*litgpt\[logging\]"):
        launch.require_logger("wandb")
    with pytest.raises(InputError, match=r"pip install litlogger$"):  # no extra brings it
        launch.require_logger("litlogger")


def test_settings_that_a_logger_has_no_place_for_are_listed() -> None:
    assert launch.without_effect("csv", LogArgs(run="a", log_model=True)) == ["log.log_model", "log.run"]
    assert launch.without_effect("litlogger", LogArgs(run="a", save_logs=False)) == []
    assert launch.without_effect("tensorboard", LogArgs()) == []


def test_training_on_cpu_is_exact_unless_asked_otherwise() -> None:
    assert launch.training_precision(None, "cpu") == "32-true"
    assert launch.training_precision("bf16-true", "cpu") == "bf16-true"
    with pytest.raises(InputError, match=r"bf16-tru .*did you mean 'bf16-true'"):
        launch.training_precision("bf16-tru", "cpu")


def test_running_out_of_memory_says_what_to_lower() -> None:
    with pytest.raises(MachineError, match="out of memory; lower it"), launch.memory_errors("lower it"):
        torch.empty(2**55)
    with pytest.raises(RuntimeError, match="another"), launch.memory_errors("lower it"):
        raise RuntimeError("another")


@pytest.mark.parametrize(("variables", "index"), [({"LOCAL_RANK": "1"}, 1), ({"SLURM_LOCALID": "3"}, 3), ({}, None)])
def test_the_free_memory_is_that_of_the_ranks_own_gpu(
    variables: dict[str, str], index: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("LOCAL_RANK", "SLURM_LOCALID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    asked = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: asked.append(device) or (5, 10))
    assert Machine("cuda", 4).free_memory() == 5
    assert asked == [torch.device("cuda", index) if index is not None else torch.device("cuda")]


def act(ranks: Any, job: dict[int, str]) -> float:
    """Each rank does what `job` says, then all meet."""
    match job.get(ranks.global_rank):
        case "refuse":
            raise InputError(f"record {ranks.global_rank} is bad")
        case "die":
            time.sleep(0.3)
            os.kill(os.getpid(), signal.SIGKILL)
    total = torch.tensor(float(ranks.global_rank + 1))
    torch.distributed.all_reduce(total)
    return total.item()


def train(fabric: Any, job: None) -> tuple[float, list[float]]:
    """A sum over the ranks, and what each rank's buffer holds once a module that had another one on each has run."""
    module = torch.nn.Linear(2, 2)
    module.register_buffer("place", torch.tensor(0.0))
    wrapped = fabric.setup_module(module)
    module.place.fill_(fabric.global_rank)
    wrapped(torch.ones(1, 2))
    places = [torch.empty(()) for _ in range(2)]
    torch.distributed.all_gather(places, module.place)
    return act(fabric, {}), [place.item() for place in places]


def test_ranks_work_together_send_no_buffers_and_rank_0_answers() -> None:
    assert launch.launch(TWO, "32-true", train, None) == (3.0, [0.0, 1.0])
    assert not torch.distributed.is_initialized()  # and a second run can follow


@pytest.mark.parametrize(
    ("job", "error", "said"),
    [
        ({1: "refuse"}, InputError, "^record 1 is bad$"),
        ({1: "die"}, MachineError, "rank 1 was killed by signal 9"),
    ],
)
def test_the_failure_of_another_rank_is_raised_here_once(job: dict, error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        launch.launch(TWO, "32-true", act, job, strategy=launch.PLAIN)
    assert not torch.distributed.is_initialized()


def wait_for_the_dead(ranks: launch.PlainRanks, job: None) -> None:
    """Rank 1 dies, and rank 0 is in something that never ends."""
    if ranks.global_rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    threading.Event().wait()


def test_rank_0_is_ended_when_it_waits_for_a_dead_rank_without_end() -> None:
    assert launch.PATIENCE <= 20  # and then it is out within 30 seconds
    script = (
        "from litgpt import launch; from tests.test_launch import TWO, wait_for_the_dead; launch.PATIENCE = 0.1; "
        "launch.launch(TWO, '32-true', wait_for_the_dead, None, strategy=launch.PLAIN)"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 3
    assert done.stderr.splitlines()[-1].startswith("error: rank 1 was killed by signal 9; ")


# Strategies, and what other processes can be sent --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wanted", "on", "whole", "chosen"),
    [
        ("auto", Machine("cuda", 1), True, "none"),
        ("fsdp", Machine("cpu", 1), True, "none"),
        ("auto", Machine("cuda", 2), True, "fsdp"),
        ("auto", Machine("cuda", 1, num_nodes=2), True, "fsdp"),
        ("auto", Machine("cuda", 2), False, "ddp"),
        ("auto", TWO, True, "ddp"),
        ("fsdp", TWO, False, "fsdp"),
        ("ddp", Machine("cuda", 2), True, "ddp"),
    ],
)
def test_gpus_that_train_a_whole_model_hold_it_in_parts(wanted: str, on: Machine, whole: bool, chosen: str) -> None:
    assert launch.choose_strategy(wanted, on, whole=whole) == chosen


def test_a_misspelt_strategy_gets_the_near_miss() -> None:
    with pytest.raises(InputError, match=r"strategy fdsp is not one of auto, ddp, fsdp.*did you mean 'fsdp'"):
        launch.choose_strategy("fdsp", TWO, whole=True)


def test_what_an_interactive_session_defines_is_refused_before_a_process_starts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "__main__", types.ModuleType("__main__"))
    mine = type("MyData", (), {"__module__": "__main__"})
    monkeypatch.setattr(sys.modules["__main__"], "MyData", mine, raising=False)
    with pytest.raises(InputError, match=r"MyData is defined in this session.*module that can be imported"):
        launch.launch(TWO, "32-true", act, {1: mine()})


def test_what_cannot_be_sent_is_refused_before_a_process_starts() -> None:
    with pytest.raises(InputError, match=r"cannot be sent to other devices.*lambda.*use devices=1"):
        launch.launch(TWO, "32-true", act, {1: lambda: None})


def test_a_script_without_a_guard_is_told_of_it(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "from litgpt import launch\nfrom tests.test_launch import TWO, act\n"
        "launch.launch(TWO, '32-true', act, {}, strategy=launch.PLAIN)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    ended = subprocess.run([sys.executable, script], capture_output=True, text=True, env=environment, timeout=180)
    assert ended.returncode == 1
    assert "if __name__ == '__main__'" in ended.stderr
    assert "MachineError: rank 1 ended with status 1 (see above)" in ended.stderr


def test_a_script_from_a_pipe_may_start_devices() -> None:
    lines = "from litgpt import launch", "from tests.test_launch import TWO, act"
    script = "\n".join((*lines, "print(launch.launch(TWO, '32-true', act, {}, strategy=launch.PLAIN))"))
    ended = subprocess.run([sys.executable, "-"], input=script, capture_output=True, text=True, cwd=ROOT, timeout=180)
    assert ended.stdout == "3.0\n", ended.stderr
