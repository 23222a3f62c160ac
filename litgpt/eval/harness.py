"""lm-eval's tasks: found, loaded and run. lm_eval is imported when it is needed: that takes seconds."""

from __future__ import annotations

import fnmatch
import io
import logging
import random
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from litgpt import hub
from litgpt.errors import (
    InputError,
    InputTypeError,
    MachineError,
    MissingError,
    UserError,
    extra_missing,
    near_miss,
    one_line,
    shown,
)

if TYPE_CHECKING:
    from litgpt.eval.candidate import Candidate
    from litgpt.prompts import PromptStyle
    from litgpt.tokenizer import Tokenizer

Loaded = dict[str, Any]  # lm-eval's own: "tasks", "groups", "group_map"


@dataclass(frozen=True)
class Asked:
    """What to run, and how.

    Attributes:
        tasks: names of tasks, groups and tags, patterns with `*`, or YAML files of tasks.
        num_fewshot: solved examples before each question; None: as the task says.
        limit: questions of each task; below 1 a share of them; None: all.
        include_path: a directory with more tasks.
        apply_chat_template: whether questions are put as messages.
        fewshot_as_multiturn: whether each example is a turn of its own then.
        log_samples: whether each question and answer is kept.
        seed: of what tasks draw: examples, and answers that are sampled.
        confirm_run_unsafe_code: whether tasks may run code that the model wrote.
    """

    tasks: tuple[str, ...]
    num_fewshot: int | None = None
    limit: float | None = None
    include_path: Path | None = None
    apply_chat_template: bool = False
    fewshot_as_multiturn: bool = True
    log_samples: bool = False
    seed: int = 1234
    confirm_run_unsafe_code: bool = False

    def check(self) -> None:
        """InputError for values that make no sense, before anything is imported."""
        if not self.tasks:
            raise InputError(
                "no tasks are given; for example --tasks arc_easy,hellaswag (litgpt evaluate list shows all); or a "
                "text, --text FILE"
            )
        if self.num_fewshot is not None and self.num_fewshot < 0:
            raise InputError(f"num_fewshot is {self.num_fewshot}; it must be 0 or more")
        limit = self.limit
        if limit is not None and not (0 < limit < 1 or (limit >= 1 and float(limit).is_integer())):
            raise InputError(f"limit is {limit}; it must be a number of questions, or a share of them between 0 and 1")
        if self.include_path is not None and not self.include_path.is_dir():
            raise MissingError(f"include_path {self.include_path} is no directory; check the path")


def names_in(tasks: str | Sequence[str] | None) -> tuple[str, ...]:
    """The names in "arc_easy, mmlu"."""
    listed = tasks.split(",") if isinstance(tasks, str) else () if tasks is None else tasks
    if not isinstance(listed, Sequence) or not all(isinstance(name, str) for name in listed):
        raise InputTypeError(f"tasks is {shown(tasks)}, must be names with commas between them, or a list of names")
    return tuple(dict.fromkeys(name.strip() for name in listed if name.strip()))


# -- finding and loading


def manager(include_path: Path | None = None, *, defaults: bool = True) -> Any:
    """lm-eval's list of tasks; its own, of which there are thousands, take seconds."""
    try:
        from lm_eval.tasks import TaskManager
    except ImportError:
        raise extra_missing("lm-eval", "eval") from None
    paths = None if include_path is None else str(include_path)
    with quiet():
        return TaskManager(include_path=paths, include_defaults=defaults)


def load(asked: Asked) -> Loaded:
    """The tasks with their data sets, ready to run; no model is needed yet.

    Raises InputError: a task that is not known, cannot be loaded, or may not run.
    """
    loaded: Loaded | None = None
    if asked.include_path is not None:  # where these are enough, the list of all is not needed
        own = manager(asked.include_path, defaults=False)
        if not _unknown(own, asked.tasks):
            try:
                loaded = _load(own, asked.tasks)
            except InputError:
                loaded = None  # a group may name tasks of lm-eval's own
    if loaded is None:
        everything = manager(asked.include_path)
        for name in _unknown(everything, asked.tasks):
            known = near_miss(name, everything.all_tasks) + _unreadable(asked.include_path)
            raise InputError(f"task {shown(name)} is not known{known} (litgpt evaluate list shows all)")
        loaded = _load(everything, asked.tasks)
    for name, task in loaded["tasks"].items():
        if getattr(task, "UNSAFE_CODE", False) and not asked.confirm_run_unsafe_code:
            raise InputError(
                f"task '{name}' runs code that the model writes; give --confirm_run_unsafe_code true in a place where "
                "that can do no harm"
            )
        if getattr(task, "MULTIMODAL", False):
            raise InputError(f"task '{name}' shows pictures, and the model reads text only; leave it out")
    return loaded


def _unknown(tasks: Any, names: Sequence[str]) -> list[str]:
    known = set(tasks.all_tasks)
    return [name for name in names if name not in known and not _matching(tasks, name) and not _is_file(name)]


def _unreadable(folder: Path | None) -> str:
    """Which file of a task cannot be read: lm-eval passes it over."""
    for path in sorted(folder.rglob("*.yaml")) if folder else ():
        try:
            yaml.compose(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, yaml.YAMLError) as error:
            return f"; {path} cannot be read: {one_line(error)[:300]}"
    return ""


def _matching(tasks: Any, name: str) -> list[str]:
    return fnmatch.filter(tasks.all_tasks, name) if any(c in name for c in "*?[") else []


def _is_file(name: str) -> bool:
    return name.endswith((".yaml", ".yml")) and Path(name).is_file()


def _load(tasks: Any, names: Sequence[str]) -> Loaded:
    known = set(tasks.all_tasks)
    wanted = [found for name in names for found in ([name] if name in known else _matching(tasks, name) or [name])]
    try:
        with quiet(), hub.told_at_once(), redirect_stdout(sys.stderr):
            loaded: Loaded = tasks.load(list(dict.fromkeys(wanted)))
            return loaded
    except UserError:
        raise
    except Exception as error:  # a task's data set can fail in any way that its code, a file or the network can
        words = f"there is no {one_line(error)}" if isinstance(error, KeyError) else one_line(error)
        what = f"tasks {', '.join(names)}: cannot be loaded: {words[:300] or type(error).__name__}"
        from litgpt.data.fetch import is_of_network

        if not is_of_network(error):
            raise InputError(f"{what}; check the task's files") from error
        if hub.is_offline():
            raise InputError(f"{what}; the environment forbids the network ({hub.OFFLINE[0]})") from error
        raise MachineError(f"{what}; check the network and run it again") from error


# -- running


def run(candidate: Candidate, loaded: Loaded, asked: Asked) -> dict[str, Any]:
    """lm-eval's results: "results", "groups", "versions", "n-shot", "configs", "n-samples" and, with `log_samples`,
    "samples".
    """
    from lm_eval.evaluator import evaluate

    from litgpt.eval.lm import EngineLM

    if asked.apply_chat_template:
        require_style(candidate.style, candidate.tokenizer)
    said = io.StringIO()  # bars and notes that repeat what ours say
    prepare(loaded, asked)
    with told_apart(), quiet(), seeded(asked.seed), redirect_stderr(said), redirect_stdout(said):
        results: dict[str, Any] = evaluate(
            EngineLM(candidate),
            loaded,
            limit=asked.limit,
            log_samples=asked.log_samples,
            apply_chat_template=asked.apply_chat_template,
            fewshot_as_multiturn=asked.fewshot_as_multiturn and asked.apply_chat_template,
            confirm_run_unsafe_code=asked.confirm_run_unsafe_code,
        )
    return results


@contextmanager
def told_apart() -> Iterator[None]:
    """Tasks are programs: what fails in them, and not in the model that they ask, is theirs to mend."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        frames = list(traceback.walk_tb(error.__traceback__))
        if any(frame.f_globals.get("__name__") == "litgpt.eval.lm" for frame, _ in frames):
            raise
        frame, line = frames[-1]
        where = f"{frame.f_code.co_filename}:{line}"
        words = f"{type(error).__name__}: {one_line(error)[:300]}"
        raise InputError(f"the code of a task fails: {words} ({where}); mend it, or leave the task out") from error


def require_style(style: PromptStyle, tokenizer: Tokenizer) -> None:
    """InputError where nothing says how messages are written."""
    if style.name == "default":
        raise InputError(
            f"{tokenizer.dir}: there is neither a chat template nor a prompt style; leave out --apply_chat_template"
        )


def prepare(loaded: Loaded, asked: Asked) -> None:
    """Tell the tasks how many examples to show, and how to draw them."""
    for name, task in loaded["tasks"].items():
        own = task.get_config("num_fewshot")
        if asked.num_fewshot is not None and own == 0 and asked.num_fewshot > 0:
            print(f"note: {name} is always asked without examples; num_fewshot does not change it", file=sys.stderr)
        elif asked.num_fewshot is not None or own is None:
            task.set_config(key="num_fewshot", value=asked.num_fewshot or 0)
        task.set_fewshot_seed(seed=asked.seed)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Whatever draws inside draws as it did the last time; what comes after draws as if nothing had been."""
    import numpy
    import torch

    states = random.getstate(), numpy.random.get_state(), torch.get_rng_state()
    random.seed(seed)
    numpy.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(states[0])
        numpy.random.set_state(states[1])
        torch.set_rng_state(states[2])


def table(results: Mapping[str, Any]) -> str:
    """The scores, as lm-eval prints them."""
    from lm_eval.utils import make_table

    parts = [make_table(results)]
    if results.get("groups"):
        parts.append(make_table(results, "groups"))
    return "\n".join(part.strip() for part in parts)


def versions() -> dict[str, str]:
    """Of lm-eval, where it is installed."""
    try:
        return {"lm_eval": version("lm_eval")}
    except PackageNotFoundError:
        return {}


@contextmanager
def quiet() -> Iterator[None]:
    """What lm-eval tells of its own doings is left out; errors are told."""
    loggers = [logging.getLogger(name) for name in ("lm_eval", "datasets", "transformers", "huggingface_hub")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
