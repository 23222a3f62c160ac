"""`litgpt pretrain`: a model trained on text, from scratch or from a checkpoint. The loop itself is training.py."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from litgpt import estimate, families
from litgpt.args import EvalArgs, LogArgs, TrainArgs, plain
from litgpt.config import Config
from litgpt.data.base import DataModule
from litgpt.errors import InputError, MachineError
from litgpt.tokenizer import Tokenizer

# torch is imported inside the functions, once the command is chosen and its words are right: `--help` stays quick
if TYPE_CHECKING:
    import torch
    from lightning.fabric import Fabric

    from litgpt.launch import Machine
    from litgpt.model import GPT
    from litgpt.training import Run, Schedule, WriteWeights

DEFAULT_TRAIN = TrainArgs.as_default(
    save_interval=1000,
    log_interval=1,
    global_batch_size=512,
    micro_batch_size=4,
    lr_warmup_steps=2000,
    max_tokens=3_000_000_000_000,
    tie_embeddings=False,
    max_norm=1.0,
    min_lr=4e-5,
)


def main(
    model_name: str,
    model_config: Config | None = None,
    out_dir: Path = Path("out/pretrain"),
    precision: Literal["bf16-true", "bf16-mixed", "32-true"] | None = None,
    initial_checkpoint_dir: Path | None = None,
    resume: bool | Literal["auto"] | Path = False,
    data: DataModule | None = None,
    train: TrainArgs = DEFAULT_TRAIN,
    eval: EvalArgs = EvalArgs.as_default(interval=1000),
    log: LogArgs = LogArgs(),
    optimizer: str | dict = "AdamW",
    devices: int | str = "auto",
    num_nodes: int = 1,
    tokenizer_dir: Path | None = None,
    logger_name: Literal["csv", "tensorboard", "wandb", "mlflow", "litlogger"] = "csv",
    seed: int = 42,
    overwrite: bool = False,
    allow_change: list[str] | str | None = None,
) -> None:
    """Train a model on text, from scratch or from a checkpoint.

    The result is a Hugging Face directory, `out_dir/final`, for every other command and for `transformers`.

    Args:
        model_name: Name of the model to build, such as pythia-14m.
        model_config: Any fields of a model of your own; it is built instead of the one called model_name.
        out_dir: Where checkpoints, metrics and the finished model go.
        precision: How numbers are held: 32-true, bf16-mixed (weights in fp32) or bf16-true; null: 32-true on CPU,
            bf16-mixed on a GPU that knows it.
        initial_checkpoint_dir: A checkpoint whose weights to start from, instead of random ones.
        resume: Go on with a run: true (the newest checkpoint in out_dir), auto (the same, or a new run where there is
            none), or the path of a checkpoint.
        data: What to train on, such as TextFiles.
        train: How to train.
        eval: When to validate.
        log: Where an experiment tracker files the run.
        optimizer: Any optimizer of torch.optim by name, or class_path and init_args.
        devices: Number of devices; auto: all GPUs, or one process on CPU.
        num_nodes: Number of hosts.
        tokenizer_dir: Directory of the tokenizer; its files are copied beside the trained weights.
        logger_name: Experiment tracker to log to, beside out_dir/logs/metrics.csv.
        seed: Of the initial weights and all else that is random, but for the order of the data, which has data.seed.
        overwrite: Replace the run that out_dir holds.
        allow_change: Settings that may differ from those of the run that is resumed, such as train.max_steps.
    """
    asked = {name: value for name, value in locals().items() if name != "allow_change"}
    from litgpt import launch, run_state

    launch.require_logger(logger_name)
    machine = launch.machine(devices, num_nodes)
    precision = launch.training_precision(precision, machine.accelerator)  # type: ignore[assignment]
    config = choose_config(model_name, model_config, initial_checkpoint_dir, train)
    job = Job(
        config=config,
        out_dir=Path(out_dir),
        precision=str(precision),
        machine=machine,
        train=train,
        eval=eval,
        log=log,
        optimizer=optimizer,
        tokenizer_dir=_required(tokenizer_dir, "tokenizer_dir", "litgpt train_tokenizer TEXT --out_dir DIR makes one"),
        data=_required(data, "data", "for instance --data TextFiles --data.train_data_path TEXT"),
        initial_checkpoint_dir=initial_checkpoint_dir,
        logger_name=logger_name,
        seed=seed,
        overwrite=overwrite,
        hyperparameters=recipe_of(asked),
    )
    if overwrite and resume is not False:
        raise InputError("--resume and --overwrite contradict each other; give one of them")
    run_state.put_back(job.out_dir)
    job.check_words(resume is not False)
    job.ready = job.opened_data()
    job.fit_to_data()
    if resume is not False and (done := run_state.finished(job.out_dir, resume)) and done.facts == job.facts():
        place = run_state.named(job.out_dir, resume)
        print(f"the run in {place} is already complete: {done.at.step} steps; nothing was changed")
        return
    job.resume_dir = run_state.resume_from(job.out_dir, resume)
    job.check_resume(resume is not False, [allow_change] if isinstance(allow_change, str) else allow_change or [])
    with launch.memory_errors("lower train.micro_batch_size or train.max_seq_length, then --resume auto"):
        launch.launch(machine, job.precision, pretrain, job)


def choose_config(name: str, given: Config | None, checkpoint_dir: Path | None, train: TrainArgs) -> Config:
    """The model to train: of the fields that were given, of the checkpoint, or of the name."""
    config = given
    if checkpoint_dir is not None:
        from litgpt import checkpoint

        saved = Config.from_checkpoint(checkpoint.find(checkpoint_dir))
        is_another = families.find(name) and Path(name).name != saved.name
        config = config or (Config.from_name(name) if is_another else saved)
        if different := config.differences(saved):
            raise InputError(
                f"initial_checkpoint_dir {checkpoint_dir} holds another model than {name}: {', '.join(different[:5])} "
                "differ; give the name of its model"
            )
    config = config or Config.from_name(name)
    config = config if config.name else dataclasses.replace(config, name=name)
    if train.tie_embeddings is not None and (train.tie_embeddings or "tie_embeddings" in train.given):
        if checkpoint_dir is not None and config.tie_embeddings != train.tie_embeddings:
            raise InputError(
                f"train.tie_embeddings is {train.tie_embeddings}, but the embeddings in initial_checkpoint_dir "
                f"{checkpoint_dir} are {'' if config.tie_embeddings else 'not '}tied; leave it out"
            )
        config = dataclasses.replace(config, tie_embeddings=train.tie_embeddings)
    return config


# What is decided before anything is built -----------------------------------------------------------------------------


@dataclass
class Job:
    """A pretraining run as every rank gets it: settled values and an unopened data module."""

    config: Config
    out_dir: Path
    precision: str
    machine: Machine
    train: TrainArgs
    eval: EvalArgs
    log: LogArgs
    optimizer: str | dict
    tokenizer_dir: Path
    data: DataModule
    initial_checkpoint_dir: Path | None
    logger_name: str
    seed: int
    overwrite: bool
    hyperparameters: dict[str, Any]
    resume_dir: Path | None = None
    reduced: list[str] = dataclasses.field(default_factory=list)
    optimizer_states: int = 2  # tensors that the optimizer keeps for each parameter
    ready: DataModule | None = None  # the data module of this process, opened

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "ready": None}  # mapped files are opened again, not sent

    @property
    def seq_length(self) -> int:
        return self.train.max_seq_length or self.config.block_size

    @property
    def continues_in_place(self) -> bool:
        """Whether the run goes on in the directory where it stopped."""
        return self.resume_dir is not None and self.resume_dir.resolve().parent == self.out_dir.resolve()

    def opened_data(self) -> DataModule:
        """The data module, connected and set up; what it prepares on disk is there once, however many ask.

        A text shorter than the model's context makes shorter rows, unless their length was given.
        """
        data = copy.deepcopy(self.data)
        tokenizer = Tokenizer(self.tokenizer_dir)
        data.connect(tokenizer, self.train.micro_batch_size, self.seq_length)
        data.prepare_data()
        longest = data.longest_row()
        if longest is not None and longest < self.seq_length and self.train.max_seq_length is None:
            self.reduced.append(f"train.max_seq_length {self.seq_length} -> {longest}")
            shorter = dataclasses.replace(self.train, max_seq_length=longest)
            self.train = shorter.with_given(self.train.given)
            data.connect(tokenizer, self.train.micro_batch_size, longest)
        data.setup()
        return data

    def check_words(self, resuming: bool) -> None:
        """Refuse, before data is read, all that is wrong in the words alone, and a model that will not fit."""
        from litgpt import checkpoint, optimizers, run_state

        if self.seq_length > self.config.block_size:
            raise InputError(
                f"train.max_seq_length {self.seq_length} is more than the model's block_size {self.config.block_size}"
            )
        if not 0 <= self.seed < 2**63:
            raise InputError(f"seed is {self.seed}; give a number from 0 to 2**63 - 1")
        if self.config.family:
            self.config.to_hf()  # what config.json cannot say is said now, not after the training
        self.train.fitted(self.seq_length, world_size=self.machine.world_size)
        rate, self.optimizer_states = optimizers.require_valid(self.optimizer, self.machine.device)
        if "min_lr" in self.train.given and self.train.min_lr > rate:
            raise InputError(f"train.min_lr {self.train.min_lr} is more than the learning rate, optimizer.lr {rate}")
        run_state.require_out_dir(self.out_dir, resume=resuming, overwrite=self.overwrite)
        self._check_tokenizer()
        if self.initial_checkpoint_dir is not None:
            checkpoint.open_(checkpoint.find(self.initial_checkpoint_dir))
        self._check_memory()

    def _check_tokenizer(self) -> None:
        tokenizer = Tokenizer(self.tokenizer_dir)
        room = self.config.padded_vocab_size or self.config.vocab_size
        if tokenizer.vocab_size > room:
            raise InputError(
                f"tokenizer_dir {self.tokenizer_dir} has {tokenizer.vocab_size} tokens, but the model "
                f"{self.config.name} only {room}; train a smaller tokenizer (litgpt "
                "train_tokenizer --vocab_size), or give --model_config.padded_vocab_size"
            )

    def memory(self) -> estimate.Memory:
        """Estimated peak of one rank."""
        return estimate.training_memory(
            self.config,
            self.train.micro_batch_size,
            self.seq_length,
            self.precision,
            optimizer_states=self.optimizer_states,
            accelerator=self.machine.accelerator,
        )

    def without_effect(self) -> list[str]:
        """Settings that the user gave and that this run has no use for."""
        from litgpt import launch

        examples = {"max_new_tokens", "evaluate_example"} & self.eval.given
        shown = [f"eval.{name}" for name in sorted(examples)]
        return [*launch.without_effect(self.logger_name, self.log), *shown, *self.data.without_effect()]

    def _check_memory(self) -> None:
        try:
            estimate.require_fit(
                self.memory().total,
                self.machine.free_memory(),
                f"training {self.config.name} ({self.precision}) with train.micro_batch_size "
                f"{self.train.micro_batch_size} and train.max_seq_length {self.seq_length}",
                "lower train.micro_batch_size or train.max_seq_length, or train a smaller model",
            )
        except InputError as error:  # the words are right: it is the machine that has too little
            raise MachineError(str(error)) from None

    def fit_to_data(self) -> None:
        """Settle batch and warm-up for the samples there are; defaults that cannot fit are reduced."""
        assert self.ready is not None
        samples = self.ready.train_dataloader().samples
        fitted, reduced = self.train.fitted(self.seq_length, world_size=self.machine.world_size, epoch_samples=samples)
        self.reduced += reduced
        if fitted.micro_batch_size != self.train.micro_batch_size:
            self.train = fitted
            self.ready = self.opened_data()
        self.train = fitted

    def writer(self, model: GPT) -> WriteWeights:
        """How the loop saves this model: as a checkpoint directory like any other."""
        from litgpt import checkpoint

        def write(target: Path, extra: Callable[[Path], None] | None) -> None:
            checkpoint.write(
                target,
                self.config,
                model,
                tokenizer_dir=self.tokenizer_dir,
                hyperparameters=self.hyperparameters,
                extra=extra,
                overwrite=True,
            )

        return write

    def schedule(self) -> Schedule:
        from litgpt.training import Schedule

        assert self.ready is not None
        samples = self.ready.train_dataloader().samples
        limits = self.train.step_limits(self.seq_length, samples)
        steps = min(limits.values(), default=0)
        epoch_steps = max(samples // self.train.global_batch_size, 1)
        return Schedule(steps, self.train.warmup_steps(steps or None, epoch_steps), self.train.min_lr)

    def facts(self) -> dict[str, Any]:
        """What decides the numbers of the run, by option: a resumed run must have the same."""
        from litgpt import optimizers, run_state

        assert self.ready is not None
        train = {name: getattr(self.train, name) for name in DECIDING}
        return run_state.flat(
            "",
            {
                "model_config": self.config.to_dict(),
                "train": {**train, "max_seq_length": self.seq_length},
                "optimizer": optimizers.describe(self.optimizer),
                "precision": self.precision,
                "seed": self.seed,
                "data": {"content": self.ready.fingerprint(), "seed": getattr(self.ready, "seed", None)},
                "initial_checkpoint_dir": self.initial_checkpoint_dir and Path(self.initial_checkpoint_dir).name,
            },
        )

    def check_resume(self, resuming: bool, allowed: list[str]) -> None:
        """Refuse to go on with other settings, or into another run's directory."""
        from litgpt import run_state

        resumed = self.resume_dir
        if resumed is None:
            run_state.require_kept(self.out_dir, self.initial_checkpoint_dir, self.tokenizer_dir)
        elif not self.continues_in_place:
            run_state.require_out_dir(self.out_dir, resume=False, overwrite=self.overwrite)
        begun = run_state.read_state(resumed) if resumed else run_state.finished(self.out_dir)
        if resuming and begun is not None:
            run_state.require_same(begun.facts, self.facts(), allowed, resumed or self.out_dir)
            run_state.require_resumable(begun, resumed or self.out_dir)


DECIDING = (
    "global_batch_size",
    "micro_batch_size",
    "lr_warmup_steps",
    "lr_warmup_fraction",
    "epochs",
    "max_tokens",
    "max_steps",
    "max_norm",
    "min_lr",
)


def recipe_of(asked: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments as YAML has them, a data module by its class_path and init_args."""
    return {name: plain(_by_class(value) if isinstance(value, DataModule) else value) for name, value in asked.items()}


def _by_class(data: DataModule) -> dict[str, Any]:
    fields = {name: value for name, value in vars(data).items() if not name.startswith("_")}
    return {"class_path": f"litgpt.data.{type(data).__name__}", "init_args": fields}


def _required(value: Any, name: str, remedy: str) -> Any:
    if value is None:
        raise InputError(f"{name} is missing: give --{name}, {remedy}")
    return value


# The story on every rank ----------------------------------------------------------------------------------------------


def pretrain(fabric: Fabric, job: Job) -> None:
    """Build, restore, train, and say what came of it."""
    from litgpt import launch, optimizers, report, run_state, training

    data = job.ready = job.ready or job.opened_data()
    schedule = job.schedule()
    _announce(fabric, job, schedule)
    launch.seed_everything(job.seed + fabric.global_rank)
    model = build_model(job, fabric.device)
    run = training.Run(
        fabric=fabric,
        model=fabric.setup_module(model, move_to_device=False),
        optimizer=optimizers.build(job.optimizer, model.parameters()),
        train_loader=data.train_dataloader(fabric.global_rank, fabric.world_size),
        val_loader=data.val_dataloader(fabric.global_rank, fabric.world_size),
        train=job.train,
        eval=job.eval,
        schedule=schedule,
        out_dir=job.out_dir,
        write_weights=job.writer(model),
        state=run_state.RunState(facts=job.facts()),
        progress=report.Progress(schedule.steps, shown=fabric.is_global_zero),
    )
    if job.resume_dir is not None:
        training.restore(run, job.resume_dir)
    with _closed_at_the_end(run):
        _open_out_dir(run, job)
        training.fit(run)
    if fabric.is_global_zero:
        _conclude(run, job)


@contextmanager
def _closed_at_the_end(run: Run) -> Iterator[None]:
    """Close metrics and tracker however the run ends; the tracker is told whether it ended well."""
    try:
        yield
    except BaseException:
        if run.tracker is not None:
            with suppress(Exception):  # what ended the run is what the user must hear of
                run.tracker.finalize("failed")
        raise
    else:
        if run.tracker is not None:
            run.tracker.finalize("success")
    finally:
        if run.metrics is not None:
            run.metrics.close()


def build_model(job: Job, device: torch.device) -> GPT:
    """The model on its device, in the dtype it is trained in, held once: from a checkpoint, or freshly drawn."""
    import torch

    from litgpt import checkpoint, launch, weights

    dtype = launch.parameter_dtype(job.precision)
    source = job.resume_dir or job.initial_checkpoint_dir
    if source is not None:
        return checkpoint.load_model(checkpoint.find(source), device=device, dtype=dtype, writable=True)
    model = weights.outline(job.config)
    for parameter in model.parameters():  # not `.to`: buffers keep their precision
        parameter.data = parameter.data.to(dtype)
    model.to_empty(device=device)
    model.init_weights(torch.Generator(device).manual_seed(job.seed))
    return model


def _announce(fabric: Fabric, job: Job, schedule: Schedule) -> None:
    from litgpt.report import duration, quantity, table

    train, ranks = job.train, job.machine.world_size
    step_tokens = train.global_batch_size * job.seq_length
    assert job.ready is not None
    samples = job.ready.train_dataloader().samples
    passes = round(schedule.steps * train.global_batch_size / samples)
    steps = f"{schedule.steps:,}" if schedule.steps else f"as many as {duration(train.max_time or 0)} allows"
    rows = {
        "model": f"{job.config.name}, {quantity(estimate.parameters(job.config).total)} parameters"
        + ("" if job.config.family else "; no Hugging Face family has its mix of switches: LitGPT alone will open it"),
        "on": f"{job.machine}, precision {job.precision}",
        "memory": f"about {estimate.in_words(job.memory().total)} on top of Python and torch, "
        f"{estimate.in_words(job.machine.free_memory())} free",
        "batch": f"{train.global_batch_size} rows of {job.seq_length} tokens = {train.micro_batch_size} at a time x "
        f"{train.accumulation(ranks)} accumulated x {ranks} device{'s' * (ranks > 1)}",
        "steps": f"{steps}, the first {schedule.warmup} to warm up",
        "tokens": f"{quantity(schedule.steps * step_tokens)}" if schedule.steps else "until the time is over",
        "data": f"{quantity(samples)} row{'s' * (samples > 1)} to train on"
        + (f", each about {passes} times" if passes > 1 else ""),
    }
    if job.reduced:
        fabric.print(f"defaults reduced to fit this run: {', '.join(job.reduced)}")
    if unused := job.without_effect():
        fabric.print(f"without effect in this run: {', '.join(unused)}")
    if job.resume_dir is not None:
        fabric.print(f"resuming from {job.resume_dir}")
    fabric.print(f"plan:\n{table(rows)}")


def _open_out_dir(run: Run, job: Job) -> None:
    """Make the directory this run's, now that everything is built: rank 0's task."""
    from litgpt import run_state

    if run.fabric.is_global_zero:
        if job.continues_in_place:
            _start_records(run, job)
            run_state.sweep(job.out_dir)
            if job.train.keep_last:
                run_state.prune(job.out_dir, job.train.keep_last, run.state.at.step)
        else:
            with run_state.replacing(job.out_dir):
                _start_records(run, job)
    run.fabric.barrier()


def _start_records(run: Run, job: Job) -> None:
    """Open all that the run writes to beside its weights, the one that may refuse first."""
    import yaml

    from litgpt import launch, report, run_state, storage

    tracker = launch.tracker(job.logger_name, job.out_dir, job.log)
    if tracker is not None:
        tracker.log_hyperparams(job.hyperparameters)
    run.tracker = tracker
    logged = None if job.resume_dir is None else run.state.logged
    run.metrics = report.Metrics(job.out_dir / run_state.LOGS / "metrics.csv", logged)
    with storage.atomic_file(job.out_dir / "hyperparameters.yaml") as file:
        file.write_text(yaml.safe_dump(job.hyperparameters, sort_keys=False))


def _conclude(run: Run, job: Job) -> None:
    """Closing words: losses, speed, memory, picture, what to type next. The weights are safe by now."""
    from litgpt import launch, report
    from litgpt.run_state import FINAL, LOGS

    assert job.ready is not None
    at, unigram = run.state.at, job.ready.unigram_loss()
    rows = {
        "validation loss": "" if run.val_loss is None else f"{run.val_loss:.4f} nats per token",
        "unigram loss": "" if unigram is None else f"{unigram:.4f}, of a model that only counts tokens",
        "trained": f"{report.quantity(at.tokens)} tokens in {report.duration(at.seconds)}, "
        f"{at.tokens / max(at.seconds, 1e-9):,.0f} tokens/s",
        "peak memory": estimate.in_words(launch.peak_memory(run.fabric.device)),
        "metrics": str(job.out_dir / LOGS / "metrics.csv"),
    }
    print(report.table({name: value for name, value in rows.items() if value}))
    print(report.picture(job.out_dir / LOGS / "metrics.csv", job.out_dir / "loss.png", baseline=unigram))
    print(report.next_commands(job.out_dir / FINAL))
