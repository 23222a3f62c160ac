"""What a training recipe may say under `train`, `eval` and `log`: the values, their limits and what follows from them.

Pure Python. The line under each field is its only documentation: `--help` prints it.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from litgpt.errors import InputError

if TYPE_CHECKING:
    from typing_extensions import Self

WORTHWHILE_STEPS = 100  # a default batch shrinks until a small budget gives about so many optimizer steps


def due(interval: int | None, step: int) -> bool:
    """Whether something done every `interval` steps is to be done after `step`; 0 and None are never."""
    return bool(interval) and step % interval == 0  # type: ignore[operator]


def plain(value: Any) -> Any:
    """A value as YAML has it: data classes as mappings, paths and the like as text."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value) if f.init}
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    return value if isinstance(value, bool | int | float | None) else str(value)


@dataclass(frozen=True)
class _Args:
    given: frozenset[str] = field(default=frozenset(), init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        changed = {f.name for f in dataclasses.fields(self) if f.init and getattr(self, f.name) != f.default}
        object.__setattr__(self, "given", frozenset(changed))

    @classmethod
    def as_default(cls, **values: Any) -> Self:
        """The values a command starts from: none counts as given, so all may shrink to fit a small run."""
        return cls(**values).with_given(())

    def with_given(self, names: Iterable[str]) -> Self:
        """The same values, of which the user gave those `names`: they are refused where a default would be reduced."""
        other = copy.copy(self)
        object.__setattr__(other, "given", frozenset(names))
        return other


@dataclass(frozen=True)
class TrainArgs(_Args):
    """How a model is trained. A step is an optimizer step: one global batch."""

    save_interval: int | None = 1000
    """Steps between two checkpoints; 0 or null: only the final one."""
    log_interval: int = 1
    """Steps between two lines of metrics; 0: none."""
    global_batch_size: int = 64
    """Samples in one optimizer step, over all devices and accumulated micro-batches."""
    micro_batch_size: int = 4
    """Samples that one device holds at a time. Lower it when memory runs out: the result stays the same."""
    lr_warmup_steps: int | None = 100
    """Steps in which the learning rate climbs from 0 to its full value."""
    lr_warmup_fraction: float | None = None
    """The same as a fraction of an epoch, between 0 and 1; give this or lr_warmup_steps."""
    epochs: int | None = None
    """Passes over the training data."""
    max_tokens: int | None = None
    """Tokens to train on in all, over all devices."""
    max_steps: int | None = None
    """Steps after which to stop. Of the limits that are set, the first to be reached ends the run."""
    max_time: float | None = None
    """Seconds after which to stop, all resumes taken together."""
    max_seq_length: int | None = None
    """Longest sample in tokens; null: the model's block size, or the longest sample of the data if that is less."""
    tie_embeddings: bool | None = None
    """Share one matrix between the embedding and the head; null: as the model's config says."""
    max_norm: float | None = None
    """Clip the gradient to this norm; 0 or null: no clipping."""
    min_lr: float = 6e-5
    """Learning rate at the end of the cosine decay."""
    skip_nonfinite: int = 0
    """Steps with a loss or gradient that is not finite to leave out before the run is given up."""
    keep_last: int | None = None
    """Keep this many of the newest step checkpoints; null: all."""
    gradient_checkpointing: bool = False
    """Keep only the input of each block for the backward pass and compute the rest again: slower, far smaller."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_at_least("train", self, _TRAIN_LEAST)
        if self.max_time is not None and not self.max_time > 0:
            raise InputError(f"train.max_time is {self.max_time}; it must be more than 0 seconds, or null for no limit")
        if self.lr_warmup_fraction is not None and not 0 <= self.lr_warmup_fraction <= 1:
            raise InputError(f"train.lr_warmup_fraction is {self.lr_warmup_fraction}; it must lie between 0 and 1")

    # What a run of these values comes to ------------------------------------------------------------------------------

    def accumulation(self, world_size: int = 1) -> int:
        """Micro-batches that each of `world_size` data-parallel ranks adds up before one optimizer step."""
        return self.global_batch_size // (self.micro_batch_size * world_size)

    def step_limits(self, seq_length: int, epoch_samples: int | None = None) -> dict[str, int]:
        """Optimizer steps that each limit allows, by option; the least of them is the length of the run."""
        samples = self._sample_limits(seq_length, epoch_samples)
        steps = {name: max(n // self.global_batch_size, 1) for name, n in samples.items()}
        return steps if self.max_steps is None else {**steps, "train.max_steps": self.max_steps}

    def warmup_steps(self, total_steps: int | None = None, epoch_steps: int | None = None) -> int:
        """Steps of warm-up in a run of `total_steps` (None: length unknown) over epochs of `epoch_steps`."""
        wanted = self.lr_warmup_steps or 0
        if self.lr_warmup_fraction is not None:
            wanted = math.ceil(self.lr_warmup_fraction * (epoch_steps or total_steps or 0))
        return wanted if total_steps is None else min(wanted, total_steps)

    # Making the values fit together: a given value that cannot is refused, a default is reduced -----------------------

    def fitted(
        self, seq_length: int, *, world_size: int = 1, epoch_samples: int | None = None
    ) -> tuple[TrainArgs, list[str]]:
        """These values made to fit a run on samples of `seq_length` tokens, on `world_size` data-parallel ranks.

        `epoch_samples` is the number of training samples, where it is known. Returns the values, and a few words on
        each that was reduced. Raises InputError, naming both options, where given values contradict each other.
        """
        if (self.epochs, self.max_tokens, self.max_steps, self.max_time) == (None,) * 4:
            raise InputError("nothing says when to stop; give train.epochs, train.max_steps or train.max_tokens")
        self._require_one_batch(seq_length)
        samples = self._sample_limits(seq_length, epoch_samples)
        fit = self._with_micro_batch(world_size, samples)
        fit = fit._with_global_batch(world_size, samples)
        fit = fit._with_warmup(fit.step_limits(seq_length, epoch_samples))
        reduced = [name for name in _REDUCIBLE if getattr(fit, name) != getattr(self, name)]
        return fit, [f"train.{name} {getattr(self, name)} -> {getattr(fit, name)}" for name in reduced]

    def _require_one_batch(self, seq_length: int) -> None:
        given = [name for name in ("global_batch_size", "micro_batch_size") if name in self.given]
        size = getattr(self, given[0]) if given else 1
        if self.max_tokens is not None and self.max_tokens < size * seq_length:
            batch = f"train.{given[0]} {size} x {seq_length} tokens" if given else f"one sample of {seq_length} tokens"
            raise InputError(
                f"train.max_tokens {self.max_tokens} is less than {batch} (train.max_seq_length); raise the first or "
                "lower the others"
            )

    def _sample_limits(self, seq_length: int, epoch_samples: int | None) -> dict[str, int]:
        limits = {} if self.max_tokens is None else {"train.max_tokens": self.max_tokens // seq_length}
        if self.epochs is not None and epoch_samples is not None:
            limits["train.epochs"] = self.epochs * epoch_samples
        return limits

    def _with_micro_batch(self, world_size: int, samples: Mapping[str, int]) -> TrainArgs:
        if "micro_batch_size" in self.given:
            return self
        if "global_batch_size" not in self.given:
            most = min([self.micro_batch_size, *(n // WORTHWHILE_STEPS // world_size for n in samples.values())])
            return self._replaced(micro_batch_size=_largest_divisor(self.micro_batch_size, max(most, 1)))
        per_rank, rest = divmod(self.global_batch_size, world_size)
        if rest or not per_rank:
            raise InputError(
                f"train.global_batch_size {self.global_batch_size} cannot be shared equally by devices x num_nodes = "
                f"{world_size}; make it a multiple of {world_size}"
            )
        return self._replaced(micro_batch_size=_largest_divisor(per_rank, self.micro_batch_size))

    def _with_global_batch(self, world_size: int, samples: Mapping[str, int]) -> TrainArgs:
        unit = self.micro_batch_size * world_size
        size = self.global_batch_size
        if "global_batch_size" not in self.given:
            most = min([size, *(n // WORTHWHILE_STEPS for n in samples.values())])
            size = max(most // unit, 1) * unit
        elif size % unit:
            raise InputError(
                f"train.global_batch_size {size} is not a multiple of train.micro_batch_size {self.micro_batch_size}"
                + (f" x {world_size} devices" if world_size > 1 else "")
                + f"; the nearest that is: {max(round(size / unit), 1) * unit}"
            )
        return self._replaced(global_batch_size=size)

    def _with_warmup(self, limits: Mapping[str, int]) -> TrainArgs:
        if self.lr_warmup_fraction is not None:
            if self.lr_warmup_steps and "lr_warmup_steps" in self.given:
                raise InputError("train.lr_warmup_steps and train.lr_warmup_fraction are both given; keep one of them")
            return self._replaced(lr_warmup_steps=None)
        warmup = self.lr_warmup_steps or 0
        if not limits or not warmup:
            return self
        name, total = min(limits.items(), key=lambda limit: limit[1])
        if "lr_warmup_steps" not in self.given:
            return self if warmup <= total // 2 else self._replaced(lr_warmup_steps=total // 10)
        if warmup > total:
            raise InputError(
                f"train.lr_warmup_steps {warmup} is more than the {total} steps that {name} "
                f"{getattr(self, name.removeprefix('train.'))} allows; lower it or raise {name}"
            )
        return self

    def _replaced(self, **values: Any) -> TrainArgs:
        return dataclasses.replace(self, **values).with_given(self.given)


@dataclass(frozen=True)
class EvalArgs(_Args):
    """When and how a model is validated while it trains."""

    interval: int | None = 600
    """Steps between two validations; 0 or null: none during the run."""
    max_new_tokens: int | None = None
    """Tokens to generate for an example at each validation; 0 or null: no example."""
    max_iters: int | None = 100
    """Validation batches to use at most; null: all."""
    initial_validation: bool = False
    """Validate before the first step."""
    final_validation: bool = True
    """Validate after the last step."""
    evaluate_example: str | int = "first"
    """Which validation sample to show an answer to: first, random, or its number."""
    keep_best: bool = False
    """Keep the weights with the lowest validation loss so far in out_dir/best."""
    patience: int | None = None
    """End the run after so many validations in a row without a lower loss; null: never."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_at_least("eval", self, {"interval": 0, "max_new_tokens": 0, "max_iters": 1, "patience": 1})
        example = self.evaluate_example
        if not (example in ("first", "random") or (str(example).isdecimal())):
            raise InputError(
                f"eval.evaluate_example is {example!r}; it must be first, random or a sample's number from 0"
            )


@dataclass(frozen=True)
class LogArgs(_Args):
    """Where an experiment tracker files the run. What a logger has no place for is left out, and the run says so."""

    project: str | None = None
    """Project the run belongs to."""
    run: str | None = None
    """Name of the run."""
    group: str | None = None
    """Group of runs it is compared with."""
    teamspace: str | None = None
    """Teamspace of the run (litlogger)."""
    metadata: dict | None = None
    """Labels to file with the run, as a mapping."""
    log_model: bool = False
    """Upload the checkpoints, too."""
    save_logs: bool = True
    """Keep what is printed with the run (litlogger)."""
    checkpoint_name: str | None = None
    """Name of the uploaded checkpoint."""


_REDUCIBLE = ("global_batch_size", "micro_batch_size", "lr_warmup_steps")
_TRAIN_LEAST = {
    "save_interval": 0,
    "log_interval": 0,
    "global_batch_size": 1,
    "micro_batch_size": 1,
    "lr_warmup_steps": 0,
    "epochs": 1,
    "max_tokens": 1,
    "max_steps": 1,
    "max_seq_length": 1,
    "max_norm": 0,
    "min_lr": 0,
    "skip_nonfinite": 0,
    "keep_last": 1,
}


def _largest_divisor(number: int, most: int) -> int:
    return next(n for n in range(min(number, most), 0, -1) if number % n == 0)


def _require_at_least(group: str, args: _Args, least: Mapping[str, int]) -> None:
    for name, minimum in least.items():
        value = getattr(args, name)
        if value is not None and not (minimum <= value < math.inf):
            raise InputError(f"{group}.{name} is {value}; it must be at least {minimum}")
