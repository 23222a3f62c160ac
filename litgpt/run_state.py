"""What a run is between two steps, and whose directory it may use: a run that was killed goes on as if it had not been.

out_dir/
  step-00000100/                   a checkpoint like any other
    training_state/                optimizer and every random generator as tensors, the rest in run_state.json
  final/                           the finished model
  best/                            the model with the lowest validation loss, where that was asked for
  logs/metrics.csv, loss.png, hyperparameters.yaml
"""

from __future__ import annotations

import math
import os
import random
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from litgpt import checkpoint, storage
from litgpt.errors import InputError, MissingError, UserError, near_miss

FINAL, BEST, LOGS = "final", "best", "logs"
MOVING, ASIDE, GONE = ".replaced.part", ".replaced", ".replaced.gone"  # a run while another one takes its place
STEP = re.compile(r"step-\d{8,}")


@dataclass
class Counters:
    """How far a run has come. `seconds` is the time spent training, over all its resumes."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    skipped: int = 0


@dataclass
class RunState:
    """All that decides how a run goes on, beside weights and optimizer."""

    at: Counters = field(default_factory=Counters)
    data: dict[str, Any] = field(default_factory=dict)  # where the next batch begins
    pending: dict[str, Any] | None = None  # the last step's numbers, while validation and log still wait for them
    facts: dict[str, Any] = field(default_factory=dict)  # what the run must be resumed with
    best: dict[str, Any] | None = None  # step and loss of the best validation, and how many were worse since
    complete: bool = False

    @property
    def logged(self) -> int:
        """The last step whose row of metrics is written."""
        return self.at.step - 1 if self.pending else self.at.step


def read_state(directory: Path) -> RunState:
    """The state in a checkpoint; InputError when a newer release wrote it or a field is not what a run writes."""
    content = checkpoint.read_run_state(directory)
    place = directory / checkpoint.TRAINING_STATE / checkpoint.RUN_STATE
    for path, fits in _FIELDS.items():
        value: Any = content
        for key in path.split("."):
            if not isinstance(value, dict) or key not in value:
                raise InputError(f"{place}: {path} is missing; resume from another checkpoint")
            value = value[key]
        if not fits(value):
            raise InputError(f"{place}: {path} is {value!r}, which no run writes; resume from another checkpoint")
    values = {name: content[name] for name in RunState.__dataclass_fields__}
    counters = {name: content["at"][name] for name in Counters.__dataclass_fields__}
    return RunState(**{**values, "at": Counters(**counters)})


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_time(value: Any) -> bool:
    return _is_count(value) or (isinstance(value, float) and 0 <= value < math.inf)


def _is_place(value: Any) -> bool:
    """Whether a loader can have said this of where it stands: in counts."""
    return isinstance(value, dict) and bool(value) and all(map(_is_count, value.values()))


def _is_row(value: Any) -> bool:
    return value is None or (
        isinstance(value, dict)
        and all(_is_count(value.get(name)) for name in ("step", "tokens"))
        and _is_time(value.get("seconds"))
    )


def _is_best(value: Any) -> bool:
    return value is None or (
        isinstance(value, dict)
        and all(_is_count(value.get(name)) for name in ("step", "worse_since"))
        and isinstance(value.get("val_loss"), float)
    )


_FIELDS: dict[str, Callable[[Any], bool]] = {
    "at": lambda value: isinstance(value, dict),
    "at.step": _is_count,
    "at.tokens": _is_count,
    "at.seconds": _is_time,
    "at.skipped": _is_count,
    "data": _is_place,
    "pending": _is_row,
    "facts": lambda value: isinstance(value, dict),
    "best": _is_best,
    "complete": lambda value: isinstance(value, bool),
}


def write_mark(directory: Path, state: RunState) -> None:
    """Say in a finished model's directory that its run is complete."""
    place = directory / checkpoint.TRAINING_STATE
    place.mkdir(exist_ok=True)
    with storage.atomic_file(place / checkpoint.RUN_STATE) as file:
        storage.write_json(file, {"format_version": storage.FORMAT_VERSION, **asdict(state)})


# Random generators and the optimizer as tensors ----------------------------------------------------------------------


def capture_rng() -> dict[str, Tensor]:
    """The state of every generator of this process: Python's, NumPy's, torch's, the current GPU's."""
    _, words, gauss = random.getstate()
    numpys = numpy.random.get_state(legacy=False)
    states = {
        "python": torch.tensor(words),
        "python_gauss": torch.tensor([] if gauss is None else [gauss], dtype=torch.float64),
        "numpy": torch.tensor([*numpys["state"]["key"].tolist(), numpys["state"]["pos"], numpys["has_gauss"]]),
        "numpy_gauss": torch.tensor([numpys["gauss"]], dtype=torch.float64),
        "torch": torch.get_rng_state(),
    }
    return {**states, "cuda": torch.cuda.get_rng_state()} if torch.cuda.is_initialized() else states


def restore_rng(states: Mapping[str, Tensor]) -> None:
    """Set every generator to what `capture_rng` saw."""
    random.setstate((3, tuple(states["python"].tolist()), next(iter(states["python_gauss"].tolist()), None)))
    *keys, position, has_gauss = states["numpy"].tolist()
    cached = states["numpy_gauss"].item()
    numpy.random.set_state(("MT19937", numpy.array(keys, dtype=numpy.uint32), position, has_gauss, cached))
    torch.set_rng_state(states["torch"])
    if "cuda" in states and torch.cuda.is_initialized():
        torch.cuda.set_rng_state(states["cuda"])


def optimizer_tensors(model: nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
    """The optimizer's state under the names of the parameters it belongs to; numbers as 0-dim tensors."""
    found: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            if value is None:
                continue
            tensor = value if isinstance(value, Tensor) else torch.tensor(value)
            # bitsandbytes has one table for all parameters, and what is saved are tensors of their own
            found[f"{name}.{key}"] = tensor.clone() if id(tensor) in seen else tensor
            seen.add(id(value))
    return found


def room(model: nn.Module) -> checkpoint.Room:
    """Gives memory for a saved tensor, by its name: what has a sharded parameter's shape is cut as that one is."""
    parameters = dict(model.named_parameters())

    def make(name: str, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        parameter = next((parameters[n] for n in _parameter_names(name) if n in parameters), None)
        if parameter is not None and parameter.shape == shape and hasattr(parameter, "to_local"):  # a DTensor has it
            return torch.empty_like(parameter, dtype=dtype, requires_grad=False)
        return torch.empty(shape, dtype=dtype)

    return make


def _parameter_names(saved: str) -> tuple[str, str]:
    """The parameters that "optimizer.NAME.exp_avg" and "trained.NAME" may speak of."""
    name = saved.partition(".")[2]
    return name, name.rpartition(".")[0]


def load_optimizer(model: nn.Module, optimizer: Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Give the optimizer the state that `optimizer_tensors` named, on the device of each parameter."""
    parameters = dict(model.named_parameters())
    for full_name, value in tensors.items():
        name, _, key = full_name.rpartition(".")
        if name not in parameters:
            raise InputError(
                f"the optimizer state to resume from is that of {name}, which this run does not train; give the method "
                "that the run began with, or another out_dir"
            )
        # the step count stays where the optimizer keeps it: on the device only for the fused ones
        fused = any(group.get("fused") or group.get("capturable") for group in optimizer.param_groups)
        device = parameters[name].device if value.dim() or fused else torch.device("cpu")
        # torch counts steps in floating point tensors: a whole number was Python's own (bitsandbytes)
        is_plain = value.dim() == 0 and not value.is_floating_point()
        optimizer.state[parameters[name]][key] = value.item() if is_plain else value.to(device)


def trained_tensors(model: nn.Module) -> dict[str, Tensor]:
    """What is trained, by name: exactly as it is, where the weights beside it hold it in another form or not at all."""
    return {f"trained.{name}": p.detach() for name, p in model.named_parameters() if p.requires_grad}


def load_trained(model: nn.Module, tensors: Mapping[str, Tensor], where: Path) -> None:
    """Set what is trained to what `trained_tensors` named."""
    for name, mine in trained_tensors(model).items():
        if name not in tensors or tensors[name].shape != mine.shape:
            raise InputError(f"{where}: its training state has no {name} of shape {tuple(mine.shape)}; resume another")
        mine.copy_(tensors[name])


# Is it the same run? -------------------------------------------------------------------------------------------------


def flat(prefix: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """Nested mappings as dotted keys with plain values: {"train": {"epochs": 1}} -> {"train.epochs": 1}."""
    result: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{prefix}.{key}" if prefix else key
        if isinstance(value, Mapping) and value:
            result |= flat(name, value)
        else:
            result[name] = value if isinstance(value, bool | int | float | None) else str(value)
    return result


def require_same(saved: Mapping[str, Any], now: Mapping[str, Any], allowed: Iterable[str], where: Path) -> None:
    """Refuse to resume with other settings than the run began with, but for the `allowed` keys (or their prefixes)."""
    allowed = tuple(allowed)
    _require_known(allowed, {*saved, *now})
    changed = [
        key
        for key in sorted({*saved, *now})
        if saved.get(key) != now.get(key) and not any(key == a or key.startswith(f"{a}.") for a in allowed)
    ]
    if changed:
        listed = ", ".join(f"{key} {saved.get(key)} -> {now.get(key)}" for key in changed[:8])
        more = f" and {len(changed) - 8} more" if len(changed) > 8 else ""
        raise InputError(
            f"{where} was trained with other settings: {listed}{more}; give the old values, or allow what may change: "
            f"--allow_change '[{', '.join(changed[:8])}]'"
        )


def _require_known(allowed: Iterable[str], keys: set[str]) -> None:
    for word in allowed:
        if not any(key == word or key.startswith(f"{word}.") for key in keys):
            raise InputError(
                f"allow_change names {word}, which is not a setting that a resumed run must keep"
                f"{near_miss(word, sorted(keys))}; leave it out or mend it"
            )


# Whose directory is it? ----------------------------------------------------------------------------------------------


def resume_from(out_dir: Path, resume: bool | str | Path) -> Path | None:
    """The checkpoint that `--resume` means: None for a fresh start."""
    if resume is False:
        return None
    if resume is True or resume == "auto":
        newest = checkpoint.latest(out_dir)
        if newest is None and not finished(out_dir):
            _require_nothing_to_lose(out_dir)
            if resume is True:
                raise MissingError(
                    f"out_dir {out_dir} holds no checkpoint to resume from; give another out_dir, or --resume auto to "
                    "start a new run when there is none"
                )
        return newest
    return _checkpoint_at(Path(resume))


def _require_nothing_to_lose(out_dir: Path) -> None:
    """Refuse to begin again where weights lie from which no run can go on; the log of a run without any is no loss."""
    weights = [path for path in _leavings(out_dir) if path.name == FINAL or STEP.fullmatch(path.name)]
    if weights:
        named = ", ".join(path.name for path in weights[:3]) + (f" and {len(weights) - 3} more" if weights[3:] else "")
        raise InputError(
            f"out_dir {out_dir} holds {named}, and no run can go on from there: {_fault(weights[-1])}; replace the run "
            "with --overwrite true instead of --resume, or choose another out_dir"
        )


def _fault(directory: Path) -> str:
    try:
        storage.verify(directory, full=True)
        read_state(directory)
    except UserError as error:
        return str(error)
    return f"{directory} is a finished model"


def _checkpoint_at(path: Path) -> Path:
    for place in (path, *path.parents[:2]):  # a file inside, or inside its training_state, means the directory
        if _has_state(place):
            return place
    newest = checkpoint.latest(path) if path.is_dir() else None
    if newest is None:
        raise MissingError(
            f"--resume {path}: no run can go on from there; give a step-* directory, a file inside it, or an out_dir"
        )
    return newest


def _has_state(directory: Path) -> bool:
    return (directory / checkpoint.TRAINING_STATE / checkpoint.RUN_STATE).is_file()


def finished(out_dir: Path, resume: bool | str | Path = True) -> RunState | None:
    """The last state of the run that ended in `out_dir`, or in the `final/` that `resume` names, if one did."""
    place = named(out_dir, resume)
    place = out_dir / FINAL if place == out_dir else place
    state = read_state(place) if _has_state(place) else None
    return state if state is not None and state.complete else None


def named(out_dir: Path, resume: bool | str | Path) -> Path:
    """The place that `--resume` speaks of: `out_dir`, unless it is a path."""
    return Path(resume) if isinstance(resume, str | Path) and resume != "auto" else out_dir


def require_resumable(state: RunState, directory: Path) -> None:
    """Refuse a finished model: it is kept without the optimizer's state."""
    if state.complete:
        raise InputError(
            f"{directory} holds a finished run and no step-* directory to go on from; to train its weights further, "
            "give its final/ to a new run with another out_dir (finetune: as CHECKPOINT_DIR; pretrain: as "
            "--initial_checkpoint_dir)"
        )


def require_out_dir(out_dir: Path, *, resume: bool, overwrite: bool) -> None:
    """Refuse a directory that cannot be written, or that another run has used."""
    existing = next(place for place in (out_dir, *out_dir.absolute().parents) if _exists(place))
    if not existing.is_dir():
        raise InputError(f"out_dir {out_dir} cannot be made: {existing} is a file; choose another out_dir")
    storage.require_writable(existing)
    if not overwrite and not resume and (old := _leavings(out_dir)):
        raise InputError(
            f"out_dir {out_dir} holds another run ({old[0].name}); continue it with --resume auto, replace it with "
            "--overwrite true, or choose another out_dir"
        )


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError as error:
        raise InputError(f"out_dir {path} cannot be used: {error.strerror}; choose another out_dir") from error


@contextmanager
def replacing(out_dir: Path) -> Iterator[None]:
    """Set aside what another run left in `out_dir` while a new one starts there; a start that fails changes nothing.

    Nothing else that lies there is touched.
    """
    made = [place for place in (out_dir, *out_dir.absolute().parents) if not place.exists()]
    out_dir.mkdir(parents=True, exist_ok=True)
    put_back(out_dir)
    _set_aside(out_dir)
    try:
        yield
    except BaseException:
        put_back(out_dir)
        for place in made:
            with suppress(OSError):  # not ours alone
                place.rmdir()
        raise
    (out_dir / ASIDE).rename(out_dir / GONE)  # from here on the new run is the one that counts
    sweep(out_dir)


def _set_aside(out_dir: Path) -> None:
    moving = out_dir / MOVING
    moving.mkdir()
    for path in _leavings(out_dir):
        path.rename(moving / path.name)
    moving.rename(out_dir / ASIDE)  # under this name it is whole


def put_back(out_dir: Path) -> None:
    """Undo a start that failed or was killed: the run before it is in its place again."""
    aside, moving = out_dir / ASIDE, out_dir / MOVING
    if os.path.isdir(aside):  # unlike pathlib's, it takes any name
        for path in _leavings(out_dir):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        aside.rename(moving)
    if os.path.isdir(moving):
        for path in moving.iterdir():
            path.rename(out_dir / path.name)
        moving.rmdir()


def require_kept(out_dir: Path, *needed: Path | None) -> None:
    """Refuse a run that would remove, with what another one left in `out_dir`, something it needs itself."""
    for path in filter(None, needed):
        if any(Path(path).resolve().is_relative_to(old.resolve()) for old in _leavings(out_dir)):
            raise InputError(f"{path} belongs to the run in out_dir {out_dir} that is replaced; choose another out_dir")


def _leavings(out_dir: Path) -> list[Path]:
    if not out_dir.is_dir():
        return []
    ours = (FINAL, BEST, LOGS, "loss.png", "hyperparameters.yaml")
    return [path for path in sorted(out_dir.iterdir()) if path.name in ours or STEP.fullmatch(path.name)]


def prune(out_dir: Path, keep: int, newest: int) -> None:
    """Remove the oldest step checkpoints, so that `keep` remain of those up to step `newest`; later ones are strays."""
    steps = sorted(path for path in out_dir.iterdir() if path.is_dir() and STEP.fullmatch(path.name))
    for path in [path for path in steps if int(path.name.removeprefix("step-")) <= newest][:-keep]:
        path.rename(path.with_name(f".{path.name}.gone"))  # no half-removed directory bears a checkpoint's name
    sweep(out_dir)


def sweep(out_dir: Path) -> None:
    """Finish removals that a kill interrupted."""
    for path in (*out_dir.glob(".step-*.gone"), out_dir / GONE):
        if path.is_dir():
            shutil.rmtree(path)
