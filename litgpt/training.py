"""The training loop: step, accumulate, clip, schedule, validate, log, save, stop. Every training command runs this one.

    every step        micro-batches -> one loss over all counted tokens -> gradients -> clip -> learning rate -> update
    after it          validate? (an example, the best so far, early end) -> a row of metrics -> checkpoint?
    at the end        final/, then the last validation: nothing that may fail stands before the weights are safe

It knows optimizer steps, not methods or commands: what to save is a function it is given.
"""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from litgpt import checkpoint, launch, parallel, run_state
from litgpt.args import EvalArgs, TrainArgs, due
from litgpt.data.base import IGNORE, Batch, Loader, StatefulLoader
from litgpt.errors import DivergedError, InputError, harmless
from litgpt.report import Metrics, Progress
from litgpt.run_state import BEST, FINAL, RunState

if TYPE_CHECKING:
    from lightning.fabric import Fabric
    from lightning.fabric.loggers import Logger

# Writes a checkpoint directory, on every rank; the second argument puts more into it, before it is sealed.
WriteWeights = Callable[[Path, Callable[[Path], None] | None], None]


@dataclass(frozen=True)
class Schedule:
    """How long a run is, in optimizer steps, and its learning rate. `steps` 0: only time ends the run."""

    steps: int
    warmup: int
    floor: float

    def rate(self, step: int, peak: float) -> float:
        """Learning rate of the step counted from 0: a straight climb to `peak`, then a cosine down to the floor."""
        if step < self.warmup:
            return peak * (step + 1) / self.warmup
        if not self.steps:
            return peak
        done = (step - self.warmup) / max(self.steps - self.warmup, 1)
        floor = min(self.floor, peak)
        return floor + (peak - floor) * 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))


@dataclass
class Run:
    """Everything the loop works on. `model` is as Fabric wraps it."""

    fabric: Fabric
    model: Any
    optimizer: Optimizer
    train_loader: StatefulLoader
    val_loader: Loader
    train: TrainArgs
    eval: EvalArgs
    schedule: Schedule
    out_dir: Path
    write_step: WriteWeights  # of a checkpoint on the way, and of the best
    write_final: WriteWeights
    state: RunState
    progress: Progress
    saves_trained: bool = False  # what is trained goes into the training state: the weights beside it are not all of it
    example: Callable[[], str] | None = None  # the model's answer to a prompt, at each validation
    metrics: Metrics | None = None  # on rank 0
    tracker: Logger | None = None
    rngs: dict[str, Tensor] = field(default_factory=dict)  # of this rank, when the last step had ended
    began: float = field(default_factory=time.monotonic)  # when this run would have begun, had it never been resumed
    logged: tuple[int, float] = (0, 0.0)  # tokens and seconds of the last row of metrics
    saved_step: int = -1
    val_loss: float | None = None

    @property
    def bare(self) -> nn.Module:
        """The model itself, whose parameters have the names that checkpoints use."""
        return self.model.module

    @property
    def step_dir(self) -> Path:
        """Where the checkpoint of this moment belongs."""
        return self.out_dir / f"step-{self.state.at.step:08d}"

    @property
    def is_over(self) -> bool:
        out_of_steps = bool(self.schedule.steps) and self.state.at.step >= self.schedule.steps
        return out_of_steps or self.stopped_improving

    @property
    def stopped_improving(self) -> bool:
        """Whether the last `eval.patience` validations found no lower loss."""
        best = self.state.best
        return bool(self.eval.patience and best and best["worse_since"] >= self.eval.patience)

    def mark(self) -> None:
        """Remember what a checkpoint of this moment between two steps holds."""
        self.state.data = self.train_loader.state_dict()
        self.rngs = run_state.capture_rng()


def fit(run: Run) -> None:
    """Train until the last step or the time limit, from wherever `run.state` stands, and leave `final/` behind.

    Raises DivergedError when losses or gradients stop being finite, and SystemExit(128 + n) after signal n, once a
    checkpoint is written from which the run continues exactly.
    """
    run.began = time.monotonic() - run.state.at.seconds
    run.logged = run.state.at.tokens, run.state.at.seconds
    run.progress.start(run.state.at.step, run.state.at.tokens)
    run.model.train()
    with _stop_signals() as stop:
        try:
            _train(run, stop)
        except _Stopped:
            _save_step(run)
            run.progress.note(f"stopped; {run.step_dir} is saved, --resume auto goes on from there")
            run.progress.close()
            raise SystemExit(128 + stop.number) from None
    run.progress.close()


def _train(run: Run, stop: Stop) -> None:
    run.mark()
    if run.state.pending and not run.is_over:
        _settle(run, stop)
    elif run.eval.initial_validation and run.state.at.step == 0:
        _log(run, {"step": 0, "tokens": 0, "val_loss": validate(run, stop), "seconds": 0.0})
    ended = run.is_over
    while not ended:
        _advance(run, train_step(run, stop))
        ended = run.is_over or bool(_agree(run, _time_is_up(run)))
        _heed(run, stop)
        if not ended:
            _settle(run, stop)
            ended = run.stopped_improving
    _finish(run, stop)


# One step ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Step:
    """What one optimizer step came to."""

    loss: float
    grad_norm: float
    rate: float
    tokens: int = 0  # padding left out
    padding: float = 0.0  # share of the positions

    @property
    def is_finite(self) -> bool:
        return math.isfinite(self.loss) and math.isfinite(self.grad_norm)


def train_step(run: Run, stop: Stop) -> Step:
    """One optimizer step on one global batch; leaves the weights alone when loss or gradients are not finite.

    The gradient is that of (sum of the losses of all counted tokens) / (their number), over micro-batches and ranks.
    """
    world = run.fabric.world_size
    micro_batches = run.train_loader.step(run.train.global_batch_size)
    counted = int(_all_ranks(run, sum(int((batch["labels"] != IGNORE).sum()) for batch in micro_batches)))
    loss = torch.zeros((), device=run.fabric.device)
    for i, batch in enumerate(micro_batches):
        if world == 1:  # several ranks agree once a step, after it
            _heed(run, stop)
        # parts of gradients are summed at once: kept whole until the last micro-batch, they would fill the device
        waits = i + 1 < len(micro_batches) and not launch.is_sharded(run.fabric)
        with run.fabric.no_backward_sync(run.model, enabled=waits):
            total = _loss(run, batch)
            run.fabric.backward(total * (world / max(counted, 1)))  # ranks are averaged over: scaled back to a sum
        loss += total.detach()
    rate = run.schedule.rate(run.state.at.step, run.optimizer.defaults["lr"])
    tokens = int(_all_ranks(run, _real_tokens(micro_batches)))
    positions = _all_ranks(run, sum(batch["ids"].numel() for batch in micro_batches))
    return replace(_update(run, loss / max(counted, 1), rate), tokens=tokens, padding=1 - tokens / positions)


def _update(run: Run, loss: Tensor, rate: float) -> Step:
    gradients = [p.grad for p in run.bare.parameters() if p.grad is not None]
    norm = parallel.total_norm(gradients)
    if run.fabric.world_size > 1:
        loss = cast(Tensor, run.fabric.all_reduce(loss, reduce_op="sum"))
    values = torch.stack([loss, norm.to(loss)]).tolist()  # the one wait for the device in a step
    step = Step(loss=values[0], grad_norm=values[1], rate=rate)
    if step.is_finite:
        if run.train.max_norm:
            torch.nn.utils.clip_grads_with_norm_(run.bare.parameters(), run.train.max_norm, norm)
        for group in run.optimizer.param_groups:
            group["lr"] = rate
        run.optimizer.step()
    run.optimizer.zero_grad(set_to_none=True)
    return step


def _real_tokens(micro_batches: list[Batch]) -> int:
    """Tokens that are no padding."""
    return sum(int((b["doc_ids"] >= 0).sum()) if "doc_ids" in b else b["ids"].numel() for b in micro_batches)


def _loss(run: Run, batch: Batch) -> Tensor:
    """Sum of the losses of a micro-batch's counted tokens, 0-dim."""
    on_device = {name: tensor.to(run.fabric.device, non_blocking=True) for name, tensor in batch.items()}  # type: ignore
    return run.model(
        on_device["ids"],
        on_device.get("positions"),
        doc_ids=on_device.get("doc_ids"),
        targets=on_device["labels"],
    ).total


def _advance(run: Run, step: Step) -> None:
    """Count the step in; from here on it is part of the state, logged or not."""
    at = run.state.at
    if not step.is_finite:
        at.skipped += 1
        if at.skipped > run.train.skip_nonfinite:
            raise _diverged(run, step)
        run.progress.note(f"step {at.step + 1} left out: loss {step.loss}, gradient norm {step.grad_norm}")
    at.step += 1
    at.tokens += step.tokens
    at.seconds = time.monotonic() - run.began
    run.state.pending = {
        "step": at.step,
        "tokens": at.tokens,
        "loss": step.loss if step.is_finite else None,
        "lr": step.rate,
        "grad_norm": step.grad_norm if step.is_finite else None,
        "padding": round(step.padding, 4),
        "seconds": round(at.seconds, 3),
    }
    run.mark()
    run.progress.update(at.step, at.tokens, step.loss)


def _diverged(run: Run, step: Step) -> DivergedError:
    where = ", ".join(f"{name} {value}" for name, value in run.state.data.items())
    seen = f" ({run.state.at.skipped} such steps)" if run.state.at.skipped > 1 else ""
    if (name := _broken_from_the_start(run)) is not None:
        return DivergedError(
            f"step {run.state.at.step + 1}: loss {step.loss}, as the weights that the run began with are not finite in "
            f"{name}; nothing of it was saved: litgpt validate names the file, download or copy it again"
        )
    return DivergedError(
        f"step {run.state.at.step + 1}: loss {step.loss}, gradient norm {step.grad_norm}, at learning rate "
        f"{step.rate:g}, in the batch at {where or 'the start of the data'}{seen}; nothing of it was saved: lower the "
        "learning rate, set train.max_norm, or give train.skip_nonfinite to leave such steps out"
    )


def _broken_from_the_start(run: Run) -> str | None:
    """A parameter, of those that no step has changed yet, that holds what is no finite number."""
    for name, parameter in run.bare.named_parameters():
        mine = parameter.to_local() if hasattr(parameter, "to_local") else parameter  # a DTensor has it
        untouched = run.state.at.step == 0 or not parameter.requires_grad
        if untouched and mine.is_floating_point() and not bool(mine.isfinite().all()):
            return name
    return None


# After a step --------------------------------------------------------------------------------------------------------


def _settle(run: Run, stop: Stop) -> None:
    """What the last step still asks for: validation, a row of metrics, a checkpoint."""
    row, step = run.state.pending or {}, run.state.at.step
    if due(run.eval.interval, step):
        row["val_loss"] = validate(run, stop)
        _weigh(run)
    if due(run.train.log_interval, step) or "val_loss" in row:
        _log(run, row)
    if "val_loss" in row:
        _show_example(run)
    run.state.pending = None
    if due(run.train.save_interval, step):
        _save_step(run)


def _finish(run: Run, stop: Stop) -> None:
    """The last step: weights first, then validation, then the mark that says the run is complete.

    A run whose time was over before its steps is not: it leaves a checkpoint from which more time takes it on.
    """
    _require_sound(run)
    row = run.state.pending or {"step": run.state.at.step}
    run.state.pending = row
    complete = run.is_over or not run.schedule.steps
    if run.stopped_improving:
        words = f"no lower validation loss in {run.eval.patience} validations (eval.patience); done"
        run.progress.note(f"step {run.state.at.step}: {words}")
    if due(run.train.save_interval, run.state.at.step) or not complete:
        _save_step(run)
    run.write_final(run.out_dir / FINAL, None)
    validated = run.stopped_improving
    if not validated and (run.eval.final_validation or due(run.eval.interval, run.state.at.step)):
        row["val_loss"] = validate(run, stop)
        if complete or due(run.eval.interval, run.state.at.step):  # else the run that goes on knows nothing of it
            _weigh(run)
    if "loss" in row and (run.train.log_interval or "val_loss" in row):
        _log(run, row)
    if "val_loss" in row:
        _show_example(run)
    run.state.pending, run.state.complete = None, complete
    if run.fabric.is_global_zero and complete:
        run_state.write_mark(run.out_dir / FINAL, run.state)


def validate(run: Run, stop: Stop) -> float | None:
    """Mean loss per counted token over at most `eval.max_iters` batches of each rank; None without validation data."""
    total = torch.zeros(2, dtype=torch.float64)
    run.model.eval()
    with torch.no_grad():
        for i, batch in enumerate(run.val_loader):
            if run.eval.max_iters is not None and i >= run.eval.max_iters:
                break
            _heed(run, stop)
            total += torch.tensor([_loss(run, batch).item(), int((batch["labels"] != IGNORE).sum())])
    run.model.train()
    loss, counted = (float(_all_ranks(run, value)) for value in total.tolist())
    run.val_loss = loss / counted if counted else None
    return run.val_loss


def _weigh(run: Run) -> None:
    """Compare the validation loss that was just found with the best before; keep the weights if they are better."""
    if run.val_loss is None or not (run.state.best or math.isfinite(run.val_loss)):
        return
    best = run.state.best
    if best and not run.val_loss < best["val_loss"]:  # nor is what is not a number
        run.state.best = {**best, "worse_since": best["worse_since"] + 1}
        return
    run.state.best = {"step": run.state.at.step, "val_loss": run.val_loss, "worse_since": 0}
    if run.eval.keep_best:
        _require_sound(run)
        run.write_step(run.out_dir / BEST, None)


def _show_example(run: Run) -> None:
    """An answer of the model as it is now, for the reader. On all ranks: a sharded model answers together."""
    if run.example is None:
        return
    before = run_state.capture_rng()
    try:
        run.progress.note(f"example: {harmless(run.example())}")
    except (RuntimeError, ValueError) as error:  # nothing that only informs may end a run
        run.progress.note(f"no example answer: {error}")
    run_state.restore_rng(before)


def _log(run: Run, row: dict[str, Any]) -> None:
    """A row of metrics; its speed is that of the wall clock since the row before."""
    tokens, seconds = row["tokens"] - run.logged[0], row["seconds"] - run.logged[1]
    row["tokens_per_second"] = round(tokens / seconds, 1) if seconds > 0 else None
    run.logged = row["tokens"], row["seconds"]
    if run.metrics is not None:
        run.metrics.add(row)
    if run.tracker is not None and run.fabric.is_global_zero:
        numbers = {name: value for name, value in row.items() if value is not None and name != "step"}
        run.tracker.log_metrics(numbers, step=row["step"])
    if row.get("val_loss") is not None:
        run.progress.note(f"step {row['step']}  validation loss {row['val_loss']:.4f}")


def _save_step(run: Run) -> None:
    """Write `step-N/`, from which the run continues exactly; a step that is there already is left alone."""
    step = run.state.at.step
    if run.saved_step == step:
        return
    _require_sound(run)
    run.state.at.seconds = time.monotonic() - run.began
    tensors = {f"rng.{run.fabric.global_rank}.{name}": state for name, state in run.rngs.items()}
    for name, tensor in run_state.optimizer_tensors(run.bare, run.optimizer).items():
        tensors[f"optimizer.{name}"] = tensor
    if run.saves_trained:
        tensors |= run_state.trained_tensors(run.bare)
    run.write_step(
        run.step_dir,
        lambda directory: checkpoint.save_training_state(directory, tensors, asdict(run.state)),
    )
    run.saved_step = step
    if run.train.keep_last and run.fabric.is_global_zero:
        run_state.prune(run.out_dir, run.train.keep_last, step)


def restore(run: Run, directory: Path) -> None:
    """Bring a run, whose model already has the weights of `directory`, to where that checkpoint was written."""
    run.state = replace(run_state.read_state(directory), facts=run.state.facts)
    try:
        run.train_loader.load_state_dict(run.state.data)
    except KeyError as error:
        raise InputError(
            f"{directory}: data.{error.args[0]} is missing in its run state; resume from another"
        ) from None
    rng, tensors = f"rng.{run.fabric.global_rank}.", checkpoint.load_training_state(directory, run_state.room(run.bare))
    optimizer = {name.removeprefix("optimizer."): t for name, t in tensors.items() if name.startswith("optimizer.")}
    run_state.load_optimizer(run.bare, run.optimizer, optimizer)
    if run.saves_trained:
        run_state.load_trained(run.bare, tensors, directory)
    if mine := {name.removeprefix(rng): t for name, t in tensors.items() if name.startswith(rng)}:
        run_state.restore_rng(mine)
    if directory.resolve() == run.step_dir.resolve():
        run.saved_step = run.state.at.step


def _require_sound(run: Run) -> None:
    """Refuse to save weights that no longer give finite numbers: one look at every trained parameter."""
    size = parallel.total_norm([p.detach() for p in run.bare.parameters() if p.requires_grad])
    if not math.isfinite(size.item()):
        raise DivergedError(
            f"after step {run.state.at.step} the weights are no longer usable (learning rate "
            f"{run.optimizer.param_groups[0]['lr']:g}); they were not saved: lower the learning rate"
        )


# Ranks, time and signals ---------------------------------------------------------------------------------------------


class _Stopped(Exception):
    """A signal asked for the end; the state is that of the last whole step."""


@dataclass
class Stop:
    """The signal that asked the run to end, 0 for none."""

    number: int = 0

    def ask(self, number: int, frame: FrameType | None) -> None:
        if self.number and number == signal.SIGINT:
            raise KeyboardInterrupt  # asked twice: at once
        self.number = number


@contextmanager
def _stop_signals() -> Iterator[Stop]:
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():  # signals cannot be had elsewhere
        yield stop
        return
    watched = [number for number in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(number) != signal.SIG_IGN]
    before = {number: signal.signal(number, stop.ask) for number in watched}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _heed(run: Run, stop: Stop) -> None:
    """Stop here if any rank got a signal."""
    if agreed := _agree(run, stop.number):  # a signal that came meanwhile is not lost: the next look finds it
        stop.number = agreed
        raise _Stopped


def _time_is_up(run: Run) -> bool:
    return run.train.max_time is not None and run.state.at.seconds >= run.train.max_time


def _agree(run: Run, value: int) -> int:
    """The greatest of the ranks' values, so that all of them act alike."""
    return int(_all_ranks(run, value, "max"))


def _all_ranks(run: Run, value: float, how: Literal["sum", "max"] = "sum") -> float:
    if run.fabric.world_size == 1:
        return value
    mine = torch.tensor(value, dtype=torch.float64, device=run.fabric.device)
    return run.fabric.all_reduce(mine, reduce_op=how).item()  # type: ignore[union-attr]
