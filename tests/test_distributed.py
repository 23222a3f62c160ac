"""Two devices are one: the same losses, gradients and weights, each rank holding the whole model or a part of it.

Devices here are processes that talk through gloo. Starting one takes seconds, so many runs share a pair of them.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from litgpt import checkpoint, job, launch, optimizers, parallel, run_state
from litgpt.errors import InputError
from litgpt.launch import Machine
from tests.makers import runs
from tests.makers.configs import shrunk
from tests.test_training import PLAIN, Ragged

TWO = Machine("cpu", 2)

PRETRAINED: dict[str, dict[str, Any]] = {
    "dense": {"data": Ragged(), "optimizer": PLAIN},
    "experts": {
        "data": Ragged(),
        "optimizer": PLAIN,
        "model_config": shrunk("Mixtral-8x7B-v0.1", tie_embeddings=True),
    },
}
LORA: dict[str, Any] = {"method": "lora", "lora_dropout": 0.0, "lora_mlp": True, "lora_head": True}
FINETUNED = {"lora": LORA, **{method: {"method": method} for method in ("full", "adapter", "adapter_v2")}}
FINETUNED = {name: {**case, "optimizer": PLAIN} for name, case in FINETUNED.items()}
BY_STRATEGY = {
    "ddp": {**PRETRAINED, **FINETUNED, "qlora": {**FINETUNED["lora"], "quantize": "bnb.nf4"}},
    "fsdp": {**PRETRAINED, **FINETUNED},
}
RANDOM: dict[str, dict[str, Any]] = {
    "fsdp": {"adam": {"precision": "bf16-true"}, "dropout": {"method": "lora", "precision": "bf16-true"}}
}  # what one device does not draw as two do


def settings(case: dict[str, Any]) -> dict[str, Any]:
    train = {"global_batch_size": 8, "micro_batch_size": 2, "max_steps": 4, "save_interval": 2}
    return {"train": train, "eval": {"max_iters": None}, **case}


class Collected:
    """In the place of `launch`: keeps the jobs of several commands, to do them all in one pair of processes."""

    def __init__(self) -> None:
        self.jobs: list[job.Job] = []

    def __call__(self, on: Machine, precision: str, story: Any, one: job.Job, **how: Any) -> None:
        self.jobs.append(one)


def do_all(fabric: Any, jobs: list[job.Job]) -> dict[str, str]:
    """Every job, then each optimizer on a parameter in parts; returns what is said against one."""
    for one in jobs:
        job.story(fabric, one)
    if not launch.is_sharded(fabric):
        return {}
    parameter, refused = parallel.sample(launch.mesh(fabric)), {}
    for name in ("AdamW", "SGD", "RMSprop", "Adafactor"):
        try:
            optimizers.require_parts(name, parameter)
        except InputError as error:
            refused[name] = str(error)
    return refused


def run_on_two(strategy: str, folder: Path, runs_by_dir: dict[Path, dict[str, Any]]) -> dict[str, str]:
    collected = Collected()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "launch", collected)
        for out_dir, case in runs_by_dir.items():
            runs.run(folder, out_dir, devices=2, strategy=strategy, **settings(case))
    return launch.launch(TWO, "32-true", do_all, collected.jobs, strategy=strategy)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return tmp_path_factory.mktemp("material")


@pytest.fixture(scope="module")
def alone(folder: Path) -> Path:
    """Every case on one device."""
    for name, case in (BY_STRATEGY["ddp"] | BY_STRATEGY["fsdp"]).items():
        runs.run(folder, folder / "alone" / name, **settings(case))
    return folder / "alone"


@pytest.fixture(scope="module")
def ddp(folder: Path) -> Path:
    return of_strategy("ddp", folder)


@pytest.fixture(scope="module")
def fsdp(folder: Path) -> Path:
    return of_strategy("fsdp", folder)


def of_strategy(strategy: str, folder: Path) -> Path:
    """Every case on two devices."""
    cases = BY_STRATEGY[strategy] | RANDOM.get(strategy, {})
    run_on_two(strategy, folder, {folder / strategy / name: case for name, case in cases.items()})
    return folder / strategy


# One step is one step -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("strategy", "name"), [(s, name) for s, cases in BY_STRATEGY.items() for name in cases])
def test_two_devices_take_the_steps_of_one(
    strategy: str, name: str, alone: Path, request: pytest.FixtureRequest
) -> None:
    assert_same(alone / name, request.getfixturevalue(strategy) / name)


def assert_same(one: Path, other: Path) -> None:
    for mine, theirs in zip(runs.losses(one), runs.losses(other), strict=True):
        for column in ("tokens", "loss", "val_loss", "grad_norm"):
            expected = float(mine[column] or 0)
            assert math.isclose(expected, float(theirs[column] or 0), rel_tol=1e-5), column
    found = tensors(other / "final")
    for name, tensor in tensors(one / "final").items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=2e-5)


def tensors(directory: Path) -> dict[str, torch.Tensor]:
    files = sorted(directory.rglob("*.safetensors"))
    return {f"{file.parent.name}/{name}": tensor for file in files for name, tensor in load_file(file).items()}


# Saved on some, resumed on others -------------------------------------------------------------------------------------


def half_way(run: Path, copy: Path) -> Path:
    """A copy of a run as it was after its second step."""
    shutil.copytree(run, copy)
    shutil.rmtree(copy / "final")
    shutil.rmtree(copy / "step-00000004")
    return copy


def test_a_run_in_parts_goes_on_in_parts_exactly_and_from_one_device(
    folder: Path, alone: Path, fsdp: Path, tmp_path: Path
) -> None:
    cases = BY_STRATEGY["fsdp"] | RANDOM["fsdp"]
    again = {half_way(fsdp / name, tmp_path / "again" / name): cases[name] for name in ("experts", *RANDOM["fsdp"])}
    shared = {half_way(alone / name, tmp_path / "shared" / name): cases[name] for name in ("dense", "lora")}
    refused = run_on_two("fsdp", folder, {out: {**case, "resume": True} for out, case in (again | shared).items()})
    assert list(refused) == ["Adafactor"]
    assert "each device holds a part" in refused["Adafactor"]
    for out in again:
        assert runs.losses(out) == runs.losses(fsdp / out.name)
        for saved in ("final", "step-00000004"):
            assert runs.tensor_bytes(out / saved) == runs.tensor_bytes(fsdp / out.name / saved), (out.name, saved)
    for out in shared:
        assert_same(alone / out.name, out)


@pytest.mark.parametrize("name", BY_STRATEGY["fsdp"])
def test_a_run_in_parts_goes_on_on_one_device(name: str, folder: Path, alone: Path, fsdp: Path, tmp_path: Path) -> None:
    out = half_way(fsdp / name, tmp_path / name)
    runs.run(folder, out, resume=True, **settings(BY_STRATEGY["fsdp"][name]))
    assert_same(alone / name, out)


# What goes wrong ------------------------------------------------------------------------------------------------------


def ranks_of(pid: int | None) -> list[int]:
    """The processes of the other ranks."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(child) for child in children if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes()]


def is_alive(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists() and "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="finds the ranks through /proc")
def test_a_rank_in_parts_that_is_killed_ends_the_run_and_a_signal_saves_it(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    changes = {"devices": 2, "strategy": "fsdp", "train": {"max_steps": 100_000, "global_batch_size": 4}}
    with training(folder, out, changes) as process:
        (rank,) = ranks_once(out / "step-00000004", process)
        os.kill(rank, signal.SIGKILL)
        process.join(30)
        assert process.exitcode == 3
    begun = last_step(out)

    with training(folder, out, {**changes, "resume": True}) as process:
        (rank,) = ranks_once(out / f"step-{begun + 4:08d}", process)
        os.kill(process.pid or 0, signal.SIGTERM)
        process.join(120)
        assert process.exitcode == 128 + signal.SIGTERM
    assert last_step(out) >= begun + 4
    assert not is_alive(rank)


@contextmanager
def training(folder: Path, out: Path, changes: dict[str, Any]) -> Iterator[BaseProcess]:
    """A run in a process of its own, which does not outlive what is inside, whatever happens there.

    It is forked by a process that has imported all, but has no threads as this one has: their locks would stay closed.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([runs.__name__, "lightning.fabric.strategies"])
    process = context.Process(target=runs._run_alone, args=(folder, out, changes))
    process.start()
    try:
        yield process
    finally:
        process.kill()
        process.join()


def ranks_once(saved: Path, process: BaseProcess) -> list[int]:
    """The processes of the other ranks, as soon as the run has saved that step."""
    while not (saved / "litgpt_manifest.json").exists():
        assert process.is_alive()
        time.sleep(0.01)
    return ranks_of(process.pid)


def last_step(out: Path) -> int:
    newest = checkpoint.latest(out)
    assert newest is not None
    return run_state.read_state(newest).at.step
