"""A run that was killed and resumed is the run that was not killed, bit for bit."""

from __future__ import annotations

import json
import random
import shutil
import signal
from pathlib import Path

import numpy
import pytest
import torch

from litgpt import run_state
from litgpt.errors import InputError, MissingError, UserError
from tests.makers import runs


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("material")


@pytest.fixture(scope="module")
def undisturbed(folder: Path) -> Path:
    torch.set_num_threads(1)
    return runs.run(folder, folder / "undisturbed")


def assert_same_run(one: Path, other: Path) -> None:
    assert runs.losses(one) == runs.losses(other)
    for name in ("final", "step-00000004", "step-00000008", "step-00000012"):
        assert runs.tensor_bytes(one / name) == runs.tensor_bytes(other / name), name


@pytest.mark.parametrize("steps", [(1,), (4,), (5, 10), (7, 7, 12)])
def test_a_run_killed_after_any_step_and_resumed_is_the_run_that_was_not(
    steps: tuple[int, ...], folder: Path, undisturbed: Path, tmp_path: Path
) -> None:
    out_dir = tmp_path / "run"
    for step in steps:
        status = runs.run_and_signal(signal.SIGKILL, step, folder, out_dir, resume="auto")
        assert status == -signal.SIGKILL or step == runs.STEPS
    runs.run(folder, out_dir, resume="auto")
    assert_same_run(out_dir, undisturbed)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_the_last_whole_step_and_the_resumed_run_is_the_same(
    number: int, status: int, folder: Path, undisturbed: Path, tmp_path: Path
) -> None:
    out_dir = tmp_path / "run"
    assert runs.run_and_signal(number, 6, folder, out_dir) == status
    saved = max(path.name for path in out_dir.glob("step-*"))
    logged = int(runs.losses(out_dir)[-1]["step"])
    assert logged <= int(saved.removeprefix("step-")) <= logged + 1  # no step is lost
    runs.run(folder, out_dir, resume=True)
    assert_same_run(out_dir, undisturbed)


def test_a_disk_that_fills_up_leaves_the_checkpoint_before(folder: Path, undisturbed: Path, tmp_path: Path) -> None:
    out_dir = tmp_path / "run"
    runs.run_and_signal(signal.SIGKILL, 5, folder, out_dir)
    assert runs.run_on_small_disk(60_000, folder, out_dir, resume=True) == 3
    assert [path.name for path in out_dir.glob("*step-*")] == ["step-00000004"]
    runs.run(folder, out_dir, resume=True)
    assert_same_run(out_dir, undisturbed)


def test_resume_takes_a_directory_a_file_in_it_and_a_moved_run(folder: Path, undisturbed: Path, tmp_path: Path) -> None:
    for given in ("step-00000004", "step-00000004/model.safetensors", "step-00000004/training_state/run_state.json"):
        moved = tmp_path / given.replace("/", "-")
        shutil.copytree(undisturbed, moved)
        shutil.rmtree(moved / "final")
        runs.run(folder, moved, resume=moved / given)
        assert_same_run(moved, undisturbed)


def test_a_run_that_goes_on_elsewhere_has_its_checkpoint_there(folder: Path, undisturbed: Path, tmp_path: Path) -> None:
    runs.run(folder, tmp_path / "run", resume=undisturbed / "step-00000012")
    for name in ("final", "step-00000012"):
        assert runs.tensor_bytes(tmp_path / "run" / name) == runs.tensor_bytes(undisturbed / name)


def test_a_broken_newest_checkpoint_and_strays_are_passed_over(
    folder: Path, undisturbed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out_dir = tmp_path / "run"
    shutil.copytree(undisturbed, out_dir)
    shutil.rmtree(out_dir / "final")
    broken = out_dir / "step-00000012" / "model.safetensors"
    broken.write_bytes(broken.read_bytes()[:-100])
    (out_dir / "step-best").mkdir()
    runs.run(folder, out_dir, resume="auto")
    said = capsys.readouterr()
    assert "step-00000012" in said.err
    assert "step-best" in said.err
    assert "step-00000008" in said.out
    assert_same_run(out_dir, undisturbed)


def test_a_flipped_bit_in_the_checkpoint_to_resume_from_is_named(
    folder: Path, undisturbed: Path, tmp_path: Path
) -> None:
    out_dir = tmp_path / "run"
    shutil.copytree(undisturbed / "step-00000004", out_dir / "step-00000004")
    weights = out_dir / "step-00000004" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(UserError, match=r"step-00000004/model\.safetensors"):
        runs.run(folder, out_dir, resume=True)


def files(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


@pytest.mark.parametrize("left", ["final", "step-00000004"])
@pytest.mark.parametrize("resume", ["auto", True])
def test_weights_that_no_run_can_go_on_from_are_never_replaced_by_resuming(
    left: str, resume: str | bool, folder: Path, undisturbed: Path, tmp_path: Path
) -> None:
    shutil.copytree(undisturbed / left, tmp_path / left)
    shutil.rmtree(tmp_path / left / "training_state")
    before = files(tmp_path)
    with pytest.raises(InputError, match=rf"{left}.*--overwrite true.*another out_dir"):
        runs.run(folder, tmp_path, resume=resume)
    assert files(tmp_path) == before


def test_a_start_that_was_killed_while_it_replaced_a_run_is_undone(tmp_path: Path) -> None:
    for kept in (".replaced.part", ".replaced"):
        out_dir = tmp_path / kept[1:]
        (out_dir / kept / "final").mkdir(parents=True)
        (out_dir / "logs").mkdir()
        run_state.put_back(out_dir)
        there = {path.name for path in out_dir.iterdir()}
        assert there == ({"final"} if kept == ".replaced" else {"final", "logs"})


def test_pruning_keeps_the_newest_of_this_run_and_sweeps_up(tmp_path: Path) -> None:
    for name in ("step-00000004", "step-00000008", "step-00000012", ".step-00000002.gone"):
        (tmp_path / name).mkdir()
    run_state.prune(tmp_path, 1, newest=8)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000008", "step-00000012"]


def test_resume_without_a_checkpoint_is_refused_and_auto_starts_anew(folder: Path, tmp_path: Path) -> None:
    out_dir = tmp_path / "empty"
    with pytest.raises(MissingError, match=r"out_dir .*empty.*--resume auto"):
        runs.run(folder, out_dir, resume=True)
    runs.run(folder, out_dir, resume="auto", train={"max_steps": 1, "lr_warmup_steps": 0})
    assert (out_dir / "final" / "model.safetensors").is_file()
    with pytest.raises(MissingError, match="nowhere"):
        runs.run(folder, out_dir, resume=tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("changes", "keys"),
    [
        ({"seed": 43}, ["seed"]),
        ({"optimizer": {"class_path": "AdamW", "init_args": {"lr": 0.1}}}, ["optimizer.init_args.lr"]),
        (
            {"train": {"micro_batch_size": 3, "max_norm": 0.5}},
            ["train.micro_batch_size 2 -> 3", "train.max_norm 1.0 -> 0.5"],
        ),
    ],
)
def test_resuming_with_other_settings_lists_them(
    changes: dict, keys: list[str], folder: Path, undisturbed: Path, tmp_path: Path
) -> None:
    shutil.copytree(undisturbed / "step-00000008", tmp_path / "step-00000008")
    with pytest.raises(InputError, match="--allow_change") as refused:
        runs.run(folder, tmp_path, resume=True, **changes)
    assert all(key in str(refused.value) for key in keys)


def test_other_text_is_noticed_on_resume(folder: Path, undisturbed: Path, tmp_path: Path) -> None:
    shutil.copytree(undisturbed / "step-00000008", tmp_path / "out" / "step-00000008")
    data = runs.material(tmp_path)["data"]
    data.train_data_path.write_text(data.train_data_path.read_text() + " one more mill")
    with pytest.raises(InputError, match=r"data\.content"):
        runs.run(folder, tmp_path / "out", resume=True, data=data)


def test_a_setting_that_is_not_compared_cannot_be_allowed(folder: Path, undisturbed: Path, tmp_path: Path) -> None:
    shutil.copytree(undisturbed / "step-00000008", tmp_path / "step-00000008")
    with pytest.raises(InputError, match=r"allow_change names train\.max_step,.*did you mean 'train\.max_steps'"):
        runs.run(folder, tmp_path, resume=True, allow_change=["train.max_step"])


def test_an_allowed_change_lengthens_a_run(folder: Path, undisturbed: Path, tmp_path: Path) -> None:
    out_dir = tmp_path / "run"
    shutil.copytree(undisturbed, out_dir)
    runs.run(folder, out_dir, resume="auto", train={"max_steps": 14}, allow_change=["train.max_steps"])
    assert [row["step"] for row in runs.losses(out_dir)] == [str(step) for step in range(1, 15)]


def test_a_finished_run_is_left_untouched(folder: Path, undisturbed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def content() -> dict[str, bytes]:
        return {str(path): path.read_bytes() for path in sorted(undisturbed.rglob("*")) if path.is_file()}

    before = content()
    for resume in (True, "auto", undisturbed / "final"):
        runs.run(folder, undisturbed, resume=resume)
        assert "already complete" in capsys.readouterr().out
    assert content() == before


def test_the_state_of_a_newer_release_is_refused(folder: Path, undisturbed: Path, tmp_path: Path) -> None:
    step = tmp_path / "step-00000004"
    shutil.copytree(undisturbed / "step-00000004", step)
    state = step / "training_state" / "run_state.json"
    state.write_text(json.dumps(json.loads(state.read_text()) | {"format_version": 999}))
    with pytest.raises(UserError, match="999"):
        run_state.read_state(step)


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"facts": []}, "facts"),
        ({"data": {}}, "data"),
        ({"data": {"epoch": -1, "sample": 0}}, "data"),
        ({"pending": 5}, "pending"),
        ({"at": {"step": "x", "tokens": 0, "seconds": 0, "skipped": 0}}, r"at\.step"),
        ({"at": {"step": -3, "tokens": 0, "seconds": 0, "skipped": 0}}, r"at\.step"),
        ({"at": {"step": 3}}, r"at\.tokens"),
        ({"complete": "no"}, "complete"),
    ],
)
def test_a_state_edited_by_hand_is_refused_with_its_file_and_field(
    changes: dict, field: str, undisturbed: Path, tmp_path: Path
) -> None:
    step = tmp_path / "step-00000004"
    shutil.copytree(undisturbed / "step-00000004", step)
    state = step / "training_state" / "run_state.json"
    state.write_text(json.dumps(json.loads(state.read_text()) | changes))
    with pytest.raises(InputError, match=rf"run_state\.json: {field} is "):
        run_state.read_state(step)


def test_random_generators_go_on_where_they_were() -> None:
    random.gauss(0, 1)
    numpy.random.normal()
    saved = run_state.capture_rng()

    def draw() -> list[float]:
        return [random.random(), random.gauss(0, 1), numpy.random.normal(), torch.rand(()).item()]

    drawn = [draw() for _ in range(3)]
    run_state.restore_rng(saved)
    assert [draw() for _ in range(3)] == drawn


@pytest.mark.parametrize("name", ["AdamW", "SGD", "RMSprop", "Adafactor", "Adagrad"])
def test_an_optimizer_goes_on_where_it_was(name: str) -> None:
    from litgpt import optimizers

    def steps(model: torch.nn.Module, optimizer: torch.optim.Optimizer, n: int) -> None:
        for _ in range(n):
            model(torch.ones(2, 3)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()

    torch.manual_seed(0)
    spec = {"class_path": name, "init_args": {"momentum": 0.9} if name == "SGD" else {}}
    model = torch.nn.Linear(3, 2)
    optimizer = optimizers.build(spec, model.parameters())
    steps(model, optimizer, 2)
    other = torch.nn.Linear(3, 2)
    other.load_state_dict(model.state_dict())
    resumed = optimizers.build(spec, other.parameters())
    saved = {k: v.clone() for k, v in run_state.optimizer_tensors(model, optimizer).items()}
    run_state.load_optimizer(other, resumed, saved)
    steps(model, optimizer, 2)
    steps(other, resumed, 2)
    assert torch.equal(model.weight, other.weight)
