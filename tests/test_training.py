"""The loop: one exact loss however the batch is cut, schedule, limits, and what happens when numbers break."""

from __future__ import annotations

import math
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from litgpt import checkpoint, optimizers, training
from litgpt.args import EvalArgs, TrainArgs
from litgpt.data.base import IGNORE, Batch, DataModule, Loader, StatefulLoader
from litgpt.data.loader import TrainLoader, ValLoader
from litgpt.errors import DivergedError, InputError
from litgpt.launch import Machine, launch, seed_everything
from litgpt.loss import Loss
from litgpt.model import GPT
from litgpt.report import Metrics, Progress
from litgpt.run_state import RunState
from litgpt.training import Run, Schedule, Stop, fit
from tests.makers import runs
from tests.makers.configs import shrunk

ONE, PRECISION = Machine("cpu", 1), "32-true"
# AdamW would blow the rounding of gradients that are zero in truth (the bias of keys) up to a full step
PLAIN: dict[str, Any] = {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.5, "momentum": 0.9}}


class Ragged(DataModule):
    """Rows of 16 tokens of which a different number counts: what a mean of means gets wrong."""

    seed = 0

    def connect(self, tokenizer: Any, batch_size: int, max_seq_length: int) -> None:
        self.batch_size = batch_size

    def train_dataloader(self, rank: int = 0, world_size: int = 1) -> StatefulLoader:
        return TrainLoader(rows(), collate, self.batch_size, self.seed, rank, world_size)

    def val_dataloader(self, rank: int = 0, world_size: int = 1) -> Loader:
        return ValLoader(rows()[:6], collate, self.batch_size, rank, world_size)

    def fingerprint(self) -> str:
        return "ragged"


def rows() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(0, 90, (24, 17), generator=generator)
    for i, row in enumerate(drawn):
        row[i % 15 + 2 :] = -1
    return list(drawn)


def collate(chosen: Any, batch_size: int) -> Batch:
    tokens = torch.stack([*chosen, *[torch.full((17,), -1)] * (batch_size - len(chosen))])
    ids, labels = tokens[:, :-1].clamp(min=0), tokens[:, 1:]
    return {"ids": ids, "labels": torch.where(labels < 0, IGNORE, labels)}


# The same batch, cut in any way ---------------------------------------------------------------------------------------


SAME: dict[str, Any] = {"data": Ragged(), "optimizer": PLAIN, "eval": {"max_iters": None}}


@pytest.fixture(scope="module")
def whole_batches(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cut")
    return runs.run(folder, folder / "whole", train=cut(8), **SAME)


def cut(micro_batch_size: int) -> dict[str, Any]:
    return {"global_batch_size": 8, "micro_batch_size": micro_batch_size, "max_steps": 4, "save_interval": 0}


def assert_same_training(one: Path, other: Path) -> None:
    for mine, theirs in zip(runs.losses(one), runs.losses(other), strict=True):
        for column in ("tokens", "loss", "val_loss", "grad_norm"):
            expected = float(mine[column] or 0)
            assert math.isclose(expected, float(theirs[column] or 0), rel_tol=2e-5), column
    found = runs.weights(other / "final")
    for name, tensor in runs.weights(one / "final").items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("micro_batch_size", [1, 4])
def test_accumulated_micro_batches_are_the_whole_batch(
    micro_batch_size: int, whole_batches: Path, tmp_path: Path
) -> None:
    runs.run(tmp_path, tmp_path / "cut", train=cut(micro_batch_size), **SAME)
    assert_same_training(whole_batches, tmp_path / "cut")


def test_two_ranks_are_one_and_one_rank_goes_on_from_two(whole_batches: Path, tmp_path: Path) -> None:
    two = cut(2) | {"save_interval": 2}
    runs.run(tmp_path, tmp_path / "ranks", train=two, devices=2, **SAME)
    assert_same_training(whole_batches, tmp_path / "ranks")
    (tmp_path / "ranks" / "final").rename(tmp_path / "gone")
    (tmp_path / "ranks" / "step-00000004").rename(tmp_path / "gone too")
    runs.run(tmp_path, tmp_path / "ranks", train=two, resume=True, **SAME)
    assert_same_training(whole_batches, tmp_path / "ranks")


def test_training_is_a_plain_torch_loop(whole_batches: Path, tmp_path: Path) -> None:
    """The judge: whole logits, `cross_entropy`, `clip_grad_norm_`, SGD."""
    config = shrunk("pythia-14m")
    model = GPT(config)
    model.init_weights(torch.Generator().manual_seed(42))
    optimizer = torch.optim.SGD(model.parameters(), **PLAIN["init_args"])
    schedule = Schedule(steps=4, warmup=2, floor=6e-5)
    data = Ragged()
    data.connect(None, 8, 16)
    loader = data.train_dataloader()
    rows = runs.losses(whole_batches)
    assert len(rows) == schedule.steps
    for step, row in enumerate(rows):
        (batch,) = loader.step(8)
        loss = nn.functional.cross_entropy(model(batch["ids"]).flatten(0, 1), batch["labels"].flatten())
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.param_groups[0]["lr"] = float(row["lr"])
        optimizer.step()
        optimizer.zero_grad()
        assert math.isclose(float(row["loss"]), loss.item(), rel_tol=2e-5)
        assert math.isclose(float(row["grad_norm"]), norm.item(), rel_tol=1e-4)
        assert float(row["lr"]) == schedule.rate(step, 0.5)


# Schedule and limits --------------------------------------------------------------------------------------------------


def test_the_learning_rate_climbs_then_falls_to_its_floor() -> None:
    schedule = Schedule(steps=10, warmup=4, floor=0.1)
    rates = [schedule.rate(step, 1.0) for step in range(10)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert rates[4] == 1.0
    assert rates[7] == pytest.approx(0.55)  # half-way down the cosine
    assert all(later < earlier for earlier, later in pairwise(rates[4:]))
    assert schedule.rate(10, 1.0) == pytest.approx(0.1)


def test_without_an_end_the_rate_stays_and_a_floor_above_the_peak_does_not_lift_it() -> None:
    assert Schedule(steps=0, warmup=2, floor=0.1).rate(1000, 0.5) == 0.5
    assert Schedule(steps=10, warmup=0, floor=0.1).rate(9, 0.01) == 0.01


@pytest.mark.parametrize(("limits", "steps"), [({"max_steps": 3}, 3), ({"epochs": 2, "max_steps": None}, 6)])
def test_a_run_has_exactly_the_steps_it_was_given(limits: dict[str, Any], steps: int, tmp_path: Path) -> None:
    runs.run(tmp_path, tmp_path / "run", data=Ragged(), train=cut(4) | {"lr_warmup_steps": 1} | limits)
    assert [int(row["step"]) for row in runs.losses(tmp_path / "run")] == list(range(1, steps + 1))


# Runs around a model made for the fault -------------------------------------------------------------------------------


class Fragile(nn.Module):
    """A model whose loss is what the first id of the batch says: -1 is not a number, others are finite."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))

    def forward(self, ids: Tensor, positions: Tensor | None, *, doc_ids: Tensor | None, targets: Tensor) -> Loss:
        value = math.nan if ids[0, 0] < 0 else 1.0
        return Loss((self.weight * value).square().sum(), (targets != IGNORE).sum())


@dataclass
class Listed:
    """Batches from a list of first ids, over and over."""

    ids: list[int]
    samples: int = 100
    place: int = 0
    fails: bool = False
    ticks: tuple[list[float], float] | None = None  # a clock, and how much later it is at each batch

    def __len__(self) -> int:
        return len(self.ids)

    def __iter__(self) -> Iterator[Batch]:
        if self.fails:
            raise RuntimeError("the validation data is gone")
        while self.place < 1000:
            if self.ticks is not None:
                self.ticks[0][0] += self.ticks[1]
            first = self.ids[self.place % len(self.ids)]
            self.place += 1
            yield {"ids": torch.tensor([[first]]), "labels": torch.ones(1, 1, dtype=torch.int64)}

    def step(self, samples: int) -> list[Batch]:
        return [next(iter(self)) for _ in range(samples)]

    def state_dict(self) -> dict[str, int]:
        return {"epoch": 0, "sample": self.place}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.place = state["sample"]


@dataclass
class Case:
    """One run of the fragile model, as a job for `launch`."""

    out_dir: Path
    train: dict[str, Any]
    ids: list[int]
    eval: EvalArgs
    val: Loader | None = None
    ticks: tuple[list[float], float] | None = None


def train_fragile(fabric: Any, case: Case) -> Run:
    model = Fragile()

    def write(target: Path, extra: Any) -> None:
        target.mkdir(parents=True, exist_ok=True)
        torch.save(model.state_dict(), target / "weights.pt")

    train = TrainArgs(**{"global_batch_size": 1, "micro_batch_size": 1, "max_norm": 1.0, **case.train})
    run = Run(
        fabric=fabric,
        model=fabric.setup_module(model),
        optimizer=optimizers.build("SGD", model.parameters()),
        train_loader=Listed(case.ids, ticks=case.ticks),
        val_loader=Listed([1]) if case.val is None else case.val,
        train=train,
        eval=case.eval,
        schedule=Schedule(train.max_steps or 0, 0, 0.0),
        out_dir=case.out_dir,
        write_step=write,
        write_final=write,
        state=RunState(),
        progress=Progress(train.max_steps or 0, shown=True),
        metrics=Metrics(case.out_dir / "metrics.csv"),
    )
    fit(run)
    return run


def fragile(out_dir: Path, ids: list[int], *, val: Any = None, ticks: Any = None, **train: Any) -> Run:
    seed_everything(0)
    case = Case(out_dir, train, ids, EvalArgs(interval=0, max_iters=2), val, ticks)
    return launch(ONE, PRECISION, train_fragile, case)


def test_a_loss_that_is_not_finite_stops_the_run_and_nothing_of_it_is_saved(tmp_path: Path) -> None:
    with pytest.raises(DivergedError, match=r"step 4: loss nan.*learning rate .*sample 3") as stopped:
        fragile(tmp_path, [1, 1, 1, -1], max_steps=8, save_interval=1)
    assert stopped.value.exit_status == 4
    assert sorted(path.name for path in tmp_path.glob("step-*")) == [f"step-0000000{n}" for n in (1, 2, 3)]
    assert not (tmp_path / "final").exists()


def test_steps_that_are_not_finite_can_be_left_out(tmp_path: Path) -> None:
    run = fragile(tmp_path / "two", [1, -1, -1, 1], max_steps=4, skip_nonfinite=2)
    assert run.state.at.skipped == 2
    assert bool(torch.isfinite(run.bare.weight).all())
    with pytest.raises(DivergedError, match="3 such steps"):
        fragile(tmp_path / "three", [1, -1, -1, -1], max_steps=8, skip_nonfinite=2)


def test_the_weights_are_saved_before_a_validation_that_fails(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="validation data is gone"):
        fragile(tmp_path, [1], max_steps=2, val=Listed([1], fails=True))
    assert (tmp_path / "final" / "weights.pt").is_file()


def test_a_run_without_validation_data_ends_well(tmp_path: Path) -> None:
    class Nothing(Listed):
        def __iter__(self) -> Iterator[Batch]:
            return iter(())

    assert fragile(tmp_path, [1], max_steps=2, val=Nothing([])).val_loss is None


def test_a_second_interrupt_ends_the_run_at_once() -> None:
    stop = Stop()
    stop.ask(signal.SIGTERM, None)
    stop.ask(signal.SIGTERM, None)  # patience: the checkpoint is being written
    with pytest.raises(KeyboardInterrupt):
        stop.ask(signal.SIGINT, None)


def test_time_ends_a_run_at_most_a_step_late(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr("litgpt.training.time.monotonic", lambda: clock[0])
    run = fragile(tmp_path, [1], max_time=0.875, ticks=(clock, 0.25), save_interval=0)
    assert (run.state.at.step, run.state.at.seconds) == (4, 1.0)
    assert (tmp_path / "final").is_dir()


def test_the_best_of_a_run_whose_time_was_over_is_one_that_the_run_that_goes_on_knows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [0.0]
    monkeypatch.setattr("litgpt.training.time.monotonic", lambda: clock[0])
    for interval, kept in ((3, 3), (4, 4)):  # the last step, 4, is validated in any case
        case = Case(tmp_path / f"{interval}", {"max_time": 0.875, "max_steps": 9, "save_interval": 0}, [1],
                    EvalArgs(interval=interval, max_iters=1, keep_best=True), ticks=(clock, 0.25))  # fmt: skip
        clock[0] = 0.0
        run = launch(ONE, PRECISION, train_fragile, case)
        assert run.state.at.step == 4
        assert (run.state.best or {})["step"] == kept


def test_only_the_newest_checkpoints_are_kept(tmp_path: Path) -> None:
    fragile(tmp_path, [1], max_steps=9, save_interval=2, keep_last=2)
    assert sorted(path.name for path in tmp_path.glob("*step-*")) == ["step-00000006", "step-00000008"]


# Numbers that break, with a real model --------------------------------------------------------------------------------


def test_a_hopeless_learning_rate_ends_with_the_last_good_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gentle = Schedule.rate
    monkeypatch.setattr(Schedule, "rate", lambda self, step, peak: gentle(self, step, peak) if step < 2 else 1e30)
    with pytest.raises(DivergedError, match="1e\\+30"):
        runs.run(tmp_path, tmp_path / "run", train={"save_interval": 1, "lr_warmup_steps": 0})
    saved = sorted(path.name for path in (tmp_path / "run").glob("step-*"))
    assert saved == ["step-00000001", "step-00000002"]
    last = checkpoint.load_model(tmp_path / "run" / saved[-1])
    assert all(bool(tensor.isfinite().all()) for tensor in last.state_dict().values())
    assert not (tmp_path / "run" / "final").exists()


def adamw(**arguments: Any) -> dict[str, Any]:
    return {"class_path": "AdamW", "init_args": arguments}


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("AdmW", "did you mean 'AdamW'"),
        ({"class_path": "AdamW", "init_args": {"learning_rate": 1}}, "learning_rate is not an argument of AdamW"),
        ({"class_path": "AdamW", "init_args": {"lr": -1.0}}, "lr"),
        ({"class_path": "bitsandbits.Adam"}, "cannot be imported"),
        ({"class_path": "os.system"}, "not a subclass"),
        (adamw(lr="abc"), r"^optimizer\.lr is abc; it must be a number above 0$"),
        (adamw(lr=float("inf")), r"^optimizer\.lr is inf"),
        (adamw(lr=float("nan")), r"^optimizer\.lr is nan"),
        (adamw(betas={None: 1}), r"^optimizer AdamW cannot be made with .*betas.*KeyError 0$"),
        (adamw(betas="x"), r"^optimizer AdamW cannot be made with {'betas': 'x'}: "),
        ("LBFGS", r"^optimizer LBFGS cannot train this: .*closure"),
        ("SparseAdam", r"^optimizer SparseAdam cannot train this: .*dense"),
    ],
)
def test_an_optimizer_that_cannot_be_is_refused(spec: Any, said: str) -> None:
    with pytest.raises(InputError, match=said):
        optimizers.require_valid(spec)


def test_an_optimizer_for_another_device_is_refused() -> None:
    with pytest.raises(InputError, match=r"^optimizer AdamW cannot train this: .*capturable[^\n]*$"):
        optimizers.require_valid(adamw(capturable=True), "cpu")


@pytest.mark.parametrize(("name", "states"), [("AdamW", 2), ("SGD", 0), ("RMSprop", 1), ("Adafactor", 0)])
def test_an_optimizer_tells_how_much_it_keeps(name: str, states: int) -> None:
    assert optimizers.require_valid(name).states == states
    assert optimizers.require_valid(PLAIN) == (0.5, 1)


@pytest.mark.parametrize("name", ["Adam", "SGD", "Adafactor", "torch.optim.RMSprop"])
def test_any_optimizer_of_torch_trains(name: str, tmp_path: Path) -> None:
    runs.run(tmp_path, tmp_path / "run", data=Ragged(), optimizer=name, train=cut(8))
    assert (tmp_path / "run" / "final" / "model.safetensors").is_file()


def test_a_signal_that_comes_while_the_ranks_agree_is_not_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    stop = training.Stop()

    def agree(run: Any, value: int) -> int:
        stop.ask(signal.SIGTERM, None)
        return value

    monkeypatch.setattr(training, "_agree", agree)
    training._heed(None, stop)  # type: ignore[arg-type]
    assert stop.number == signal.SIGTERM
