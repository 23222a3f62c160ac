"""What a recipe may say under train, eval and log."""

from __future__ import annotations

import pytest

from litgpt.args import EvalArgs, LogArgs, TrainArgs, due
from litgpt.errors import InputError

PRETRAIN = TrainArgs.as_default(global_batch_size=512, lr_warmup_steps=2000, max_tokens=3 * 10**12)


def refused(args: TrainArgs, *names: str, seq_length: int = 64, world_size: int = 1) -> None:
    """The values contradict each other in one line that says which."""
    with pytest.raises(InputError) as caught:
        args.fitted(seq_length, world_size=world_size)
    assert "\n" not in str(caught.value)
    assert all(name in str(caught.value) for name in names), caught.value


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("micro_batch_size", 0),
        ("global_batch_size", -4),
        ("epochs", -1),
        ("max_steps", 0),
        ("max_tokens", 0),
        ("max_seq_length", 0),
        ("save_interval", -1),
        ("lr_warmup_steps", -1),
        ("lr_warmup_fraction", 1.5),
        ("max_time", 0.0),
        ("max_norm", float("nan")),
        ("min_lr", -1.0),
        ("keep_last", 0),
    ],
)
def test_a_value_out_of_range_is_refused_by_name(name: str, value: float) -> None:
    with pytest.raises(InputError, match=rf"train\.{name}"):
        TrainArgs(**{name: value})


@pytest.mark.parametrize("values", [{"interval": -1}, {"max_iters": 0}, {"evaluate_example": "third"}])
def test_a_validation_out_of_range_is_refused_by_name(values: dict) -> None:
    with pytest.raises(InputError, match=rf"eval\.{next(iter(values))}"):
        EvalArgs(**values)


@pytest.mark.parametrize("interval", [0, None])
def test_an_interval_of_nothing_is_never_due(interval: int | None) -> None:
    assert not any(due(interval, step) for step in range(10))
    assert [step for step in range(7) if due(3, step)] == [0, 3, 6]
    TrainArgs(save_interval=interval, log_interval=0, lr_warmup_steps=0)
    EvalArgs(interval=interval, max_new_tokens=interval)


def test_batches_that_contradict_each_other_are_refused_with_both_names() -> None:
    both = "train.global_batch_size", "train.micro_batch_size"
    refused(TrainArgs(max_steps=1, global_batch_size=1, micro_batch_size=2), *both)
    refused(TrainArgs(max_steps=1, global_batch_size=7, micro_batch_size=2), *both, "8")
    refused(TrainArgs(max_steps=1, global_batch_size=1), "train.global_batch_size 1", "devices", "2", world_size=2)
    refused(TrainArgs(max_steps=1, global_batch_size=6, micro_batch_size=2), *both, "2 devices", world_size=2)


def test_limits_that_contradict_each_other_are_refused_with_both_names() -> None:
    refused(TrainArgs(max_steps=5, lr_warmup_steps=9), "train.lr_warmup_steps 9", "train.max_steps 5")
    refused(TrainArgs(max_tokens=100, global_batch_size=2), "train.max_tokens 100", "train.global_batch_size")
    refused(TrainArgs(max_tokens=63), "train.max_tokens 63", "train.max_seq_length")
    refused(TrainArgs(max_steps=9, lr_warmup_steps=1, lr_warmup_fraction=0.1), "steps", "train.lr_warmup_fraction")
    refused(TrainArgs(), "train.epochs", "train.max_steps", "train.max_tokens")


def test_defaults_shrink_to_a_small_budget_and_say_so() -> None:
    small = TrainArgs.as_default(**{**vars_of(PRETRAIN), "max_tokens": 200_000})
    fit, reduced = small.fitted(512)
    assert (fit.global_batch_size, fit.micro_batch_size, fit.lr_warmup_steps) == (2, 2, 19)
    assert fit.step_limits(512)["train.max_tokens"] == 195
    names = ["global_batch_size 512 -> 2", "micro_batch_size 4 -> 2", "lr_warmup_steps 2000 -> 19"]
    assert reduced == [f"train.{name}" for name in names]


def test_defaults_that_fit_stay_as_they_are() -> None:
    assert PRETRAIN.fitted(2048, world_size=8) == (PRETRAIN, [])


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
@pytest.mark.parametrize("tokens", [600, 10_000, 200_000, 10**9])
def test_fitted_defaults_always_make_whole_steps(world_size: int, tokens: int) -> None:
    fit, _ = TrainArgs.as_default(**{**vars_of(PRETRAIN), "max_tokens": tokens}).fitted(512, world_size=world_size)
    assert fit.accumulation(world_size) * fit.micro_batch_size * world_size == fit.global_batch_size
    assert min(fit.step_limits(512).values()) >= 1


def test_a_given_batch_brings_the_default_micro_batch_into_line() -> None:
    fit, reduced = TrainArgs(max_steps=2, global_batch_size=6, lr_warmup_steps=0).fitted(64)
    assert (fit.global_batch_size, fit.micro_batch_size) == (6, 3)
    assert reduced == ["train.micro_batch_size 4 -> 3"]


def test_warmup_is_counted_in_steps_or_as_a_fraction_of_an_epoch() -> None:
    assert TrainArgs(lr_warmup_steps=10).warmup_steps(total_steps=100) == 10
    assert TrainArgs(lr_warmup_steps=10).warmup_steps(total_steps=4) == 4
    assert TrainArgs(lr_warmup_steps=None).warmup_steps(100) == 0
    assert TrainArgs(lr_warmup_fraction=0.1).warmup_steps(total_steps=100, epoch_steps=55) == 6


@pytest.mark.parametrize(("steps", "warmup"), [(199, 19), (200, 100)])
def test_a_default_warmup_never_takes_most_of_a_run(steps: int, warmup: int) -> None:
    fit, _ = TrainArgs.as_default(max_steps=steps, lr_warmup_steps=100).fitted(64)
    assert fit.lr_warmup_steps == warmup


def test_the_first_limit_to_be_reached_is_the_least() -> None:
    args = TrainArgs(epochs=2, max_steps=50, max_tokens=64 * 8 * 30, global_batch_size=8)
    assert args.step_limits(64, epoch_samples=80) == {"train.max_tokens": 30, "train.epochs": 20, "train.max_steps": 50}


def test_given_are_the_values_that_differ_from_the_defaults() -> None:
    assert TrainArgs(epochs=1).given == {"epochs"}
    assert PRETRAIN.given == LogArgs().given == frozenset()


def vars_of(args: TrainArgs) -> dict:
    return {name: value for name, value in vars(args).items() if name != "given"}
