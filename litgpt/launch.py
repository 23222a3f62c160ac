"""Devices, precision, strategy and loggers: from what a user asks for to a launched Fabric on every rank.

The one room that imports lightning, and only inside functions: it takes seconds, so wrong options are refused first.
Several devices of one host are processes of ours around Fabric: that works from scripts, notebooks and tests alike, and
rank 0 can say why another rank died.
"""

from __future__ import annotations

import importlib.util
import inspect
import io
import logging
import multiprocessing
import os
import pickle
import random
import resource
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import FunctionType
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from litgpt import parallel
from litgpt.args import LogArgs
from litgpt.errors import InputError, MachineError, UserError, extra_missing, is_out_of_memory, near_miss, shown
from litgpt.estimate import available_memory

if TYPE_CHECKING:
    from lightning.fabric import Fabric
    from lightning.fabric.loggers import Logger
    from torch.distributed.device_mesh import DeviceMesh

Job = TypeVar("Job")
Result = TypeVar("Result")

STRATEGIES = ("auto", "ddp", "fsdp")
PLAIN = "plain"
PATIENCE = 15.0  # seconds rank 0 may still need, once another rank has died, before it is ended: it is out in 30
_GO_ON = "continue with --resume auto"
PRECISIONS = ("32-true", "bf16-mixed", "bf16-true")
# each with what it takes of `LogArgs`; but for csv, its package has its name
LOGGERS: dict[str, frozenset[str]] = {
    "csv": frozenset(),
    "tensorboard": frozenset({"run"}),
    "wandb": frozenset({"project", "run", "group"}),
    "mlflow": frozenset({"project", "run"}),
    "litlogger": frozenset({"run", "teamspace", "metadata", "save_logs"}),
}


# What there is to run on ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Machine:
    """The devices of a run: `devices` of one kind on each of `num_nodes` hosts."""

    accelerator: str  # "cpu", "cuda" or "mps"
    devices: int
    num_nodes: int = 1

    @property
    def world_size(self) -> int:
        return self.devices * self.num_nodes

    @property
    def device(self) -> torch.device:
        """Where this process computes: under torchrun or SLURM the device of its rank, else the current one."""
        local = os.environ.get("LOCAL_RANK") or os.environ.get("SLURM_LOCALID")
        if self.accelerator != "cuda" or local is None:
            return torch.device(self.accelerator)
        return torch.device("cuda", int(local) % torch.cuda.device_count())  # a task may see only its own

    def free_memory(self) -> int:
        """Bytes that one rank may use now."""
        if self.accelerator == "cuda":
            return torch.cuda.mem_get_info(self.device)[0]
        return available_memory() // self.devices

    def __str__(self) -> str:
        nodes = f" on each of {self.num_nodes} nodes" if self.num_nodes > 1 else ""
        return f"{self.devices} x {self.accelerator}{nodes}"


def machine(devices: int | str = "auto", num_nodes: int = 1) -> Machine:
    """The devices a user asked for, or InputError with both numbers when they are not there."""
    if num_nodes < 1:
        raise InputError(f"num_nodes is {num_nodes}; it must be at least 1")
    if num_nodes > 1 and not _knows_other_hosts():
        raise InputError(
            f"num_nodes is {num_nodes}, but nothing says where the other hosts are; start the command on each of them "
            "with torchrun or srun, or set MASTER_ADDR, MASTER_PORT and NODE_RANK"
        )
    kind, present = _present()
    if (launcher := _launcher()) is not None:
        return _as_started(launcher, kind, devices, num_nodes)
    if devices == "auto":
        return Machine(kind, present if kind == "cuda" else 1, num_nodes)
    if not str(devices).isdecimal() or not 1 <= int(devices) <= present:
        raise InputError(f"devices is {devices}, but this host has {present} ({kind}); give 1 to {present}, or auto")
    return Machine(kind, int(devices), num_nodes)


def device_named(name: str | torch.device) -> torch.device:
    """A device that is there."""
    present = machine(1).accelerator
    name = {"auto": present, "gpu": "cuda"}.get(str(name), name)
    try:
        device = torch.device(name)
    except RuntimeError:
        raise InputError(f"device {shown(str(name))} is not known; give cpu, cuda, cuda:1, mps or auto") from None
    count = torch.cuda.device_count() if device.type == "cuda" else 1
    if device.type not in ("cpu", present) or (device.index or 0) >= count:
        raise InputError(f"device {device} is not there; this host has {f'{count} ' * (present == 'cuda')}{present}")
    return device


@dataclass(frozen=True)
class _Launcher:
    """What started this process and its like, one per device."""

    name: str
    here: int  # processes on this host
    hosts: int


def _launcher() -> _Launcher | None:
    """Who started several processes already; None where that is for us to do."""
    number = {name: int(value) for name, value in os.environ.items() if name in _COUNTS and value.isdecimal()}
    if "LOCAL_RANK" in os.environ and (here := number.get("LOCAL_WORLD_SIZE")):
        return _Launcher("torchrun", here, number.get("WORLD_SIZE", here) // here)
    tasks, hosts = number.get("SLURM_STEP_NUM_TASKS", 1), number.get("SLURM_STEP_NUM_NODES", 1)
    return _Launcher("srun", tasks // hosts, hosts) if tasks > 1 else None


_COUNTS = ("LOCAL_WORLD_SIZE", "WORLD_SIZE", "SLURM_STEP_NUM_TASKS", "SLURM_STEP_NUM_NODES")


def _as_started(by: _Launcher, kind: str, devices: int | str, num_nodes: int) -> Machine:
    """The machine that the processes there are make up: otherwise each of them would do the whole run."""
    if devices != "auto" and str(devices) != str(by.here):
        raise InputError(
            f"devices is {devices}, but {by.name} started {by.here} processes on this host; give --devices {by.here}"
        )
    if num_nodes != by.hosts:
        raise InputError(f"num_nodes is {num_nodes}, but {by.name} runs on {by.hosts}; give --num_nodes {by.hosts}")
    return Machine(kind, by.here, by.hosts)


def _knows_other_hosts() -> bool:
    """Whether a cluster, a launcher or the user says how the hosts find each other: without, they wait forever."""
    if any(name in os.environ for name in ("SLURM_NTASKS", "LSB_JOBID", "OMPI_COMM_WORLD_SIZE")):
        return True
    numbered = any(name in os.environ for name in ("NODE_RANK", "GROUP_RANK", "RANK"))
    return numbered and "MASTER_ADDR" in os.environ and "MASTER_PORT" in os.environ


def _present() -> tuple[str, int]:
    if torch.cuda.is_available():
        return "cuda", torch.cuda.device_count()
    if torch.backends.mps.is_available():
        return "mps", 1
    return "cpu", os.cpu_count() or 1  # a process per core at most


def training_precision(wanted: str | None, accelerator: str) -> str:
    """`wanted`, or without one: exact on CPU, bf16 autocast on a GPU that knows it."""
    if wanted is None:
        return "bf16-mixed" if accelerator == "cuda" and torch.cuda.is_bf16_supported() else "32-true"
    if wanted not in PRECISIONS:
        raise InputError(f"precision {wanted} is not one of {', '.join(PRECISIONS)}{near_miss(wanted, PRECISIONS)}")
    return wanted


def choose_strategy(wanted: str, on: Machine, *, whole: bool) -> str:
    """How the ranks share the work: "none", "ddp" (each holds the model) or "fsdp" (each holds a part of it).

    Without a wish, GPUs that train the whole model share it: weights, gradients and optimizer are then most of the
    memory. `whole` is False where only a few added weights are trained.
    """
    if wanted not in STRATEGIES:
        raise InputError(f"strategy {wanted} is not one of {', '.join(STRATEGIES)}{near_miss(wanted, STRATEGIES)}")
    if on.world_size == 1:
        return "none"
    if wanted == "auto":
        return "fsdp" if whole and on.accelerator == "cuda" else "ddp"
    return wanted


def parameter_dtype(precision: str) -> torch.dtype:
    return torch.bfloat16 if precision == "bf16-true" else torch.float32


def peak_memory(device: torch.device) -> int:
    """Most bytes this process has held so far: on its GPU, or in all."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def matmul_flops(width: int, precision: str, device: torch.device) -> float:
    """FLOPs per second of a matrix product of `width`, measured in some hundredths of a second."""
    dtype = torch.float32 if precision == "32-true" else torch.bfloat16
    x, w = torch.ones(512, width, dtype=dtype, device=device), torch.ones(width, 4 * width, dtype=dtype, device=device)
    products, started = 0, time.perf_counter()
    while products < 2 or time.perf_counter() - started < 0.03:
        (x @ w)[0, 0].item()  # waits for the device
        products += 1
    return products * 2 * x.numel() * 4 * width / (time.perf_counter() - started)


@contextmanager
def memory_errors(remedy: str) -> Iterator[None]:
    """Turn running out of memory, on the host or a GPU, into one line that says what to lower."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise MachineError(f"out of memory; {remedy}") from error


def seed_everything(seed: int) -> None:
    """One seed for Python, NumPy and torch on every device."""
    import numpy

    random.seed(seed)
    numpy.random.seed(seed % 2**32)
    torch.manual_seed(seed)


# Loggers -------------------------------------------------------------------------------------------------------------


def require_logger(name: str) -> None:
    """Refuse a logger that is not known, or whose package is missing, before anything is built."""
    if name not in LOGGERS:
        raise InputError(f"logger_name {name} is not one of {', '.join(LOGGERS)}{near_miss(name, LOGGERS)}")
    if name == "csv" or importlib.util.find_spec(name) is not None:
        return
    if name == "litlogger":  # in no extra: only those who have an account of its maker's can use it
        raise InputError(f"logger_name {name}: {name} is not installed; run: pip install {name}")
    raise extra_missing(f"logger_name {name}: {name}", "logging")


def without_effect(name: str, log: LogArgs) -> list[str]:
    """The settings that the user gave under `log` and that this logger has no place for."""
    return [f"log.{word}" for word in sorted(log.given - LOGGERS[name])]


def tracker(name: str, out_dir: Path, log: LogArgs) -> Logger | None:
    """The experiment tracker beside `metrics.csv`, which every run has: None for csv."""
    if name == "csv":
        return None
    from lightning.pytorch import loggers

    folder = str(out_dir / "logs")
    label = log.run or out_dir.name
    try:
        if name == "tensorboard":
            made: Any = loggers.TensorBoardLogger(folder, name="tensorboard", version=label)
        elif name == "wandb":
            made = loggers.WandbLogger(label, folder, project=log.project or "litgpt", group=log.group)
        elif name == "mlflow":
            Path(folder).mkdir(parents=True, exist_ok=True)
            made = loggers.MLFlowLogger(
                log.project or "litgpt",
                label,
                tracking_uri=f"sqlite:///{folder}/mlflow.db",  # mlflow 3 refuses folders
                artifact_location=f"{folder}/mlflow",
            )
        else:
            made = loggers.LitLogger(
                folder, label, teamspace=log.teamspace, metadata=log.metadata, save_logs=log.save_logs
            )
        made.experiment  # noqa: B018  (opened now, so that a logger that cannot work says so at the start)
    except Exception as error:  # whatever the tracker's own package raises
        raise InputError(f"logger_name {name} cannot start: {error}; mend that, or use logger_name csv") from error
    return made


# Ranks ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """What a Fabric is made of, on every rank."""

    on: Machine
    precision: str
    strategy: str  # as `choose_strategy` says
    remedy: str = _GO_ON  # what to do when a rank dies


def launch(
    on: Machine,
    precision: str,
    story: Callable[[Any, Job], Result],
    job: Job,
    *,
    strategy: str = "auto",
    whole: bool = True,
    remedy: str = _GO_ON,
) -> Result:
    """Run `story(fabric, job)` on every rank; returns what rank 0 returns.

    `story` is a module-level function and `job` can be pickled, since other ranks are started afresh. A user error of
    any rank is raised here, once; a rank that dies is a MachineError.

    Args:
        strategy, whole: see `choose_strategy`. PLAIN: nothing is trained, and `fabric` is a `PlainRanks`.
        remedy: what to do when a rank dies.
    """
    chosen = PLAIN if strategy == PLAIN else choose_strategy(strategy, on, whole=whole)
    plan = Plan(on, precision, chosen, remedy)
    if on.devices == 1 or on.num_nodes > 1 or _launcher() or "LOCAL_RANK" in os.environ:  # one, or started by others
        with _lost_peers(lambda: MachineError(f"the connection between the ranks broke; {remedy}")):
            alone: Result = _fabric(plan).launch(story, job)
            return alone
    with _leading(plan, story, job) as (fabric, ranks), _lost_peers(ranks.verdict):
        result: Result = fabric.launch(story, job)
        return result


@contextmanager
def helpers(on: Machine, story: Callable[[PlainRanks, Job], Any], job: Job) -> Iterator[PlainRanks]:
    """Inside, the other ranks of this host are in `story(ranks, job)`, and this process is rank 0 of their group.

    They are expected to end soon after it was left; an error inside ends them at once.
    """
    plan = Plan(on, "32-true", PLAIN, remedy="load the model again")
    with _leading(plan, story, job) as (ranks, _):
        ranks.launch()
        yield ranks


@contextmanager
def _leading(plan: Plan, story: Callable[..., Any], job: Any) -> Iterator[tuple[Any, _Ranks]]:
    """The other ranks are started, and this process is about to meet them."""
    _require_fresh_start(story, job)
    port = _free_port()
    with _other_ranks(plan, port, story, job) as ranks:
        _share_cores(plan.on)
        fabric = _fabric(plan, rank=0, port=port)
        ranks.require_started()
        yield fabric, ranks


def _require_fresh_start(*work: Any) -> None:
    """Refuse, before a process is started, what another Python cannot find again or would begin anew."""
    if getattr(multiprocessing.current_process(), "_inheriting", False):  # a rank that reads the script it came from
        raise InputError(
            "several devices read this script again, which would train again: put what it does under "
            "`if __name__ == '__main__':`, or use devices=1"
        )
    try:
        _Sent(io.BytesIO(), _is_session()).dump(work)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise InputError(f"this cannot be sent to other devices: {error}; use devices=1") from error


def _is_session() -> bool:
    """Whether this is a notebook, a prompt or a script from a pipe: there is no file that another Python could read."""
    main = sys.modules["__main__"]
    return getattr(main, "__spec__", None) is None and not os.path.isfile(getattr(main, "__file__", ""))


@contextmanager
def _no_script() -> Iterator[None]:
    """Processes that start now do not look for a script that is no file, such as <stdin>."""
    main = sys.modules["__main__"]
    file = main.__dict__.pop("__file__", None) if _is_session() else None
    try:
        yield
    finally:
        if file is not None:
            main.__file__ = file


class _Sent(pickle.Pickler):
    """Pickles as a test, and refuses what lives in an interactive session only."""

    def __init__(self, file: io.BytesIO, is_session: bool) -> None:
        super().__init__(file)
        self.is_session = is_session

    def persistent_id(self, thing: Any) -> None:
        if self.is_session and isinstance(thing, type | FunctionType) and thing.__module__ == "__main__":
            raise InputError(
                f"{thing.__qualname__} is defined in this session, where other devices' processes cannot find it; put "
                "it into a module that can be imported, or use devices=1"
            )


@contextmanager
def _lost_peers(verdict: Callable[[], UserError]) -> Iterator[None]:
    """Turn a collective that failed because another rank is gone into what is known of that."""
    try:
        yield
    except RuntimeError as error:
        said = error.__cause__ if isinstance(error, MachineError) else error
        if not isinstance(said, RuntimeError) or isinstance(said, UserError) or not _is_lost_peer(said):
            raise
        raise verdict() from error


def is_sharded(fabric: Fabric) -> bool:
    """Whether each rank holds a part of the model only, once `fabric.setup_module` has it."""
    from lightning.fabric.strategies import ModelParallelStrategy

    return isinstance(fabric.strategy, ModelParallelStrategy)


def mesh(fabric: Fabric) -> DeviceMesh:
    """The ranks over which a sharded model is cut."""
    strategy: Any = fabric.strategy
    return strategy.device_mesh["data_parallel"]


class PlainRanks:
    """A process of a group that only answers: what such a one needs of a Fabric, whose import takes seconds."""

    def __init__(self, on: Machine, rank: int, port: int | None) -> None:
        started_by_others = port is None  # then they say in the environment who and where we are
        self.global_rank = int(os.environ.get("RANK", 0)) if started_by_others else rank
        self.device = torch.device("cuda", rank) if on.accelerator == "cuda" and not started_by_others else on.device
        self.init_method = "env://" if started_by_others else f"tcp://127.0.0.1:{port}"
        self.on = on

    def launch(self, story: Callable[..., Any] | None = None, job: Any = None) -> Any:
        """Meet the others, and do `story(self, job)` with them; without one, the group is left as it is for more."""
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        torch.distributed.init_process_group(
            "nccl" if self.device.type == "cuda" else "gloo",
            init_method=self.init_method,
            rank=self.global_rank,
            world_size=self.on.world_size,
        )
        if story is None:
            return None
        result = story(self, job)
        torch.distributed.destroy_process_group()
        return result


def _fabric(plan: Plan, rank: int = 0, port: int | None = None) -> Any:
    if plan.strategy == PLAIN:
        return PlainRanks(plan.on, rank, port)
    from lightning.fabric import Fabric

    for package in ("fabric", "pytorch"):  # both announce themselves
        logging.getLogger(f"lightning.{package}").setLevel(logging.WARNING)
    return Fabric(
        accelerator=plan.on.accelerator,
        devices=plan.on.devices,
        num_nodes=plan.on.num_nodes,
        # what is bf16 in bf16-true says so itself; Fabric's word for it would cast added weights, which are fp32
        precision="bf16-mixed" if plan.precision == "bf16-mixed" else "32-true",
        strategy={"none": lambda plan: "auto", "ddp": _ddp, "fsdp": _fsdp}[plan.strategy](plan),
        plugins=[_environment(rank, port)] if port is not None else _of_slurm(),
    )


def _ddp(plan: Plan) -> Any:
    from lightning.fabric.strategies import DDPStrategy

    class OfWhatTrains(DDPStrategy):
        """Ranks do not send each other what is frozen: it is equal, may be quantized, or lie on a mapped file."""

        def setup_module(self, module: torch.nn.Module) -> Any:
            trained = {name for name, parameter in module.named_parameters() if parameter.requires_grad}
            ignored = [name for name in module.state_dict() if name not in trained]
            torch.nn.parallel.DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(module, ignored)
            return super().setup_module(module)

    return OfWhatTrains(gradient_as_bucket_view=True, **_without_buffers())


def _without_buffers() -> dict[str, Any]:
    """The option by which ranks do not send their buffers in each forward; torch 2.13 warns of its older name.

    They are equal on all ranks. Sending them costs time, and a run can hang in the last of it when it ends.
    """
    known = inspect.signature(torch.nn.parallel.DistributedDataParallel).parameters
    return {"forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers": False}


def _fsdp(plan: Plan) -> Any:
    from lightning.fabric.strategies import ModelParallelStrategy

    compute = torch.bfloat16 if plan.precision == "bf16-mixed" else None

    def parallelize(model: Any, mesh: Any) -> Any:
        return parallel.shard(model, mesh["data_parallel"], compute)

    return ModelParallelStrategy(parallelize, data_parallel_size=plan.on.world_size, tensor_parallel_size=1)


def _of_slurm() -> list[Any]:
    """srun is Fabric's own finding, but for the jobs that were begun at a prompt."""
    from lightning.fabric.plugins.environments import SLURMEnvironment

    launcher = _launcher()
    return [SLURMEnvironment()] if launcher is not None and launcher.name == "srun" else []


def _environment(rank: int, port: int) -> Any:
    from lightning.fabric.plugins.environments import LightningEnvironment

    class OneHost(LightningEnvironment):
        """Ranks that we started: told by arguments, not by variables that a later run would inherit."""

        creates_processes_externally = True
        main_address = "127.0.0.1"
        main_port = port

        def local_rank(self) -> int:
            return rank

        def node_rank(self) -> int:
            return 0

    return OneHost()


class _Ranks:
    """The processes of ranks 1 and up, and what they have to say when they fail."""

    def __init__(self, processes: list[BaseProcess], voices: list[Connection], remedy: str) -> None:
        self.processes, self.voices, self.remedy = processes, voices, remedy
        self.ended: list[BaseProcess] = []  # by us
        self.done = threading.Event()
        self.asking = threading.Lock()  # of two threads that ask how a process ended, one would hear that nobody knows

    def require_started(self) -> None:
        """Wait until every rank has what it needs; one that could not get it ends the run here, before all meet."""
        for process, voice in zip(self.processes, self.voices, strict=True):
            wait([process.sentinel, voice])
            if not voice.poll():
                raise self.verdict()
            voice.recv()
        threading.Thread(target=self.watch, daemon=True).start()

    def verdict(self) -> UserError:
        """Why the run broke, as far as the other ranks know."""
        wait([p.sentinel for p in self.processes], timeout=5)
        for voice in self.voices:
            if voice.poll():
                return voice.recv()
        for rank, process in enumerate(self.processes, start=1):
            if (code := self.exitcode(process, timeout=0.5)) and process not in self.ended:
                return MachineError(f"rank {rank} {_ending(code)}; {self.remedy}")
        return MachineError(f"the connection between the ranks broke; {self.remedy}")

    def watch(self) -> None:
        """End this process when a rank has died and rank 0 still waits for it inside a library after PATIENCE.

        Closing the group is such a wait, too.
        """
        while not self.done.is_set():
            wait([p.sentinel for p in self.processes if self.exitcode(p) is None], timeout=1)
            codes = [self.exitcode(p) for p in self.processes]
            if any(codes) and not self.done.wait(PATIENCE):
                error = self.verdict()
                print(f"error: {error}", file=sys.stderr, flush=True)
                self.end()
                os._exit(error.exit_status)
            if None not in codes:
                return

    def exitcode(self, process: BaseProcess, timeout: float = 0.0) -> int | None:
        """How a process ended; None while it runs, also after so many seconds."""
        with self.asking:
            process.join(timeout)
            return process.exitcode

    def end(self) -> None:
        for process in self.processes:
            if process.pid is not None and self.exitcode(process) is None:
                self.ended.append(process)
                process.kill()


@contextmanager
def _other_ranks(plan: Plan, port: int, story: Callable[..., Any], job: Any) -> Iterator[_Ranks]:
    context = multiprocessing.get_context("spawn")
    pipes = [context.Pipe(duplex=False) for _ in range(1, plan.on.devices)]
    processes: list[BaseProcess] = [
        context.Process(target=_rank, args=(rank, plan, port, pipe[1], story, job), name=f"rank {rank}")
        for rank, pipe in enumerate(pipes, start=1)
    ]
    ranks = _Ranks(processes, [pipe[0] for pipe in pipes], plan.remedy)
    try:
        with _no_script():
            for process in processes:
                process.start()
        yield ranks
        for process in processes:
            ranks.exitcode(process, timeout=PATIENCE)
    finally:
        try:
            ranks.end()
            if torch.distributed.is_initialized():
                torch.distributed.destroy_process_group()
        finally:
            ranks.done.set()


def _rank(rank: int, plan: Plan, port: int, voice: Connection, story: Callable[..., Any], job: Any) -> None:
    """The life of a rank other than 0."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process of a terminal; rank 0 acts on it
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    _share_cores(plan.on)
    voice.send(None)  # here, with all that was sent
    try:
        _fabric(plan, rank, port).launch(story, job)
    except UserError as error:
        voice.send(error)
        sys.exit(error.exit_status)
    except RuntimeError as error:
        if not _is_lost_peer(error):
            raise
        sys.exit(MachineError.exit_status)  # rank 0 says why


def _leave_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(MachineError.exit_status)


def _share_cores(on: Machine) -> None:
    if on.accelerator == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // on.devices))


def _is_lost_peer(error: RuntimeError) -> bool:
    """Whether a collective failed because another rank is gone; gloo says so in words only."""
    said = str(error).lower()
    return isinstance(error, torch.distributed.DistError) or "gloo" in said or "connection" in said


def _ending(exitcode: int) -> str:
    return f"was killed by signal {-exitcode}" if exitcode < 0 else f"ended with status {exitcode} (see above)"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
