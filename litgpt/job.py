"""A training run as a command settles it, and its story on every rank. Every training command is one of these.

words checked -> data opened -> batch and steps fitted -> may it resume? -> launched
on every rank:  data, model, method, optimizer -> plan -> the loop (training.py) -> closing words
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from litgpt import estimate
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
    from litgpt.methods.base import Method
    from litgpt.model import GPT
    from litgpt.prompts.base import PromptStyle
    from litgpt.training import Run, Schedule, WriteWeights

Change = tuple[str, dict[str, Any]]  # words on a smaller run, and what it changes in the memory estimate


@dataclass
class Job:
    """A training run as every rank gets it: settled values and an unopened data module."""

    config: Config
    method: Method
    out_dir: Path
    precision: str
    machine: Machine
    train: TrainArgs
    eval: EvalArgs
    log: LogArgs
    optimizer: str | dict
    tokenizer_dir: Path
    data: DataModule
    source: Path | None  # the checkpoint whose weights the run starts from; None: random ones
    source_option: str
    logger_name: str
    seed: int
    overwrite: bool
    hyperparameters: dict[str, Any]
    quantize: str | None = None
    strategy: str = "auto"
    merge: bool = True  # write the merged model beside an adapter that can be merged
    resume_dir: Path | None = None
    reduced: list[str] = dataclasses.field(default_factory=list)
    optimizer_states: float = 2  # numbers that the optimizer keeps for each parameter
    ready: DataModule | None = None  # the data module of this process, opened
    tokenizer: Tokenizer | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "ready": None, "tokenizer": None}  # mapped files are opened again, not sent

    def start(self, resume: bool | str | Path, allow_change: list[str] | str | None) -> None:
        """Check all that can be wrong, then train on every rank. Returns when `out_dir/final` is there."""
        from litgpt import launch, run_state

        if self.overwrite and resume is not False:
            raise InputError("--resume and --overwrite contradict each other; give one of them")
        run_state.put_back(self.out_dir)
        self.check_words(resume is not False)
        self.ready = self.opened_data()
        self.fit_to_data()
        self._example()
        self._check_memory()
        if resume is not False and (done := run_state.finished(self.out_dir, resume)) and done.facts == self.facts():
            place = run_state.named(self.out_dir, resume)
            print(f"the run in {place} is already complete: {done.at.step} steps; nothing was changed")
            return
        self.resume_dir = run_state.resume_from(self.out_dir, resume)
        self.check_resume(resume is not False, [allow_change] if isinstance(allow_change, str) else allow_change or [])
        with launch.memory_errors(f"{self.smaller()}, then --resume auto"):
            launch.launch(self.machine, self.precision, story, self, strategy=self.strategy, whole=self.method.is_whole)

    # -- what is decided before anything is built

    @property
    def seq_length(self) -> int:
        return self.train.max_seq_length or self.config.block_size

    @property
    def shared_by(self) -> str:
        """How several devices share the work: ddp or fsdp; none on one device."""
        from litgpt import launch

        strategy = launch.choose_strategy(self.strategy, self.machine, whole=self.method.is_whole)
        if self.quantize is not None and strategy == "fsdp":
            raise InputError(
                f"--quantize {self.quantize} and --strategy fsdp exclude each other: quantized weights are not cut in "
                "parts; use --strategy ddp"
            )
        return strategy

    @property
    def continues_in_place(self) -> bool:
        """Whether the run goes on in the directory where it stopped."""
        return self.resume_dir is not None and self.resume_dir.resolve().parent == self.out_dir.resolve()

    def opened_data(self) -> DataModule:
        """The data module, connected and set up; what it prepares on disk is there once, however many ask.

        Data shorter than the model's context makes shorter rows, unless their length was given.
        """
        data = self.ready or copy.deepcopy(self.data)
        self.tokenizer = self.tokenizer or Tokenizer(self.tokenizer_dir)
        data.connect(self.tokenizer, self.train.micro_batch_size, self.seq_length)
        data.prepare_data()
        if self.train.max_seq_length is None:
            data.require_fit(self.seq_length)
            longest = data.longest_row()
            if longest is not None and longest < self.seq_length:
                self.reduced.append(f"train.max_seq_length {self.seq_length} -> {longest}")
                self.train = dataclasses.replace(self.train, max_seq_length=longest).with_given(self.train.given)
                data.connect(self.tokenizer, self.train.micro_batch_size, longest)
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
        self.method.check(self.config)
        self.train.fitted(self.seq_length, world_size=self.machine.world_size)
        rate, self.optimizer_states = optimizers.require_valid(self.optimizer, self.machine.device)
        if "min_lr" in self.train.given and self.train.min_lr > rate:
            raise InputError(f"train.min_lr {self.train.min_lr} is more than the learning rate, optimizer.lr {rate}")
        run_state.require_out_dir(self.out_dir, resume=resuming, overwrite=self.overwrite)
        self._check_tokenizer()
        if self.source is not None:
            checkpoint.open_(checkpoint.find(self.source))
        # how long rows get is the data's to say, unless it was given: until then only what no row could do without
        self._check_memory(seq_len=self.train.max_seq_length or 1)

    def _check_tokenizer(self) -> None:
        tokenizer = Tokenizer(self.tokenizer_dir)
        room = self.config.padded_vocab_size or self.config.vocab_size
        if tokenizer.vocab_size > room:
            raise InputError(
                f"tokenizer_dir {self.tokenizer_dir} has {tokenizer.vocab_size} tokens, but the model "
                f"{self.config.name} only {room}; train a smaller tokenizer (litgpt "
                "train_tokenizer --vocab_size), or give --model_config.padded_vocab_size"
            )

    def memory(self, **changes: Any) -> estimate.Memory:
        """Estimated peak of one rank, or of one whose settings differ by `changes`."""
        settings: dict[str, Any] = {
            "micro_batch_size": self.train.micro_batch_size,
            "seq_len": self.seq_length,
            "precision": self.precision,
            "optimizer_states": self.optimizer_states,
            "trainable": None if self.method.is_whole else self.method.trained(self.config),
            "accelerator": self.machine.accelerator,
            "checkpointed": self.train.gradient_checkpointing,
            "parts": self.machine.world_size if self.shared_by == "fsdp" else 1,
            "quantize": self.quantize,
        }
        return estimate.training_memory(self.config, **{**settings, **changes})

    def smaller(self) -> str:
        """Words on what to change so that the run needs less memory; what fits into the free memory comes first."""
        batch, length = self.train.micro_batch_size, self.seq_length
        changes: list[Change] = [
            (f"train.micro_batch_size {size}", {"micro_batch_size": size})
            for size in (batch // 2, 1)
            if 0 < size < batch
        ]
        if not self.train.gradient_checkpointing:
            changes += [
                (f"{words}train.gradient_checkpointing true", {**change, "checkpointed": True})
                for words, change in [("", {}), *[(f"{w} with ", c) for w, c in changes[-1:]]]
            ]
        smallest = dict(changes[-1][1]) if changes else {}
        changes += [
            (f"train.max_seq_length {size}{' with all of these' * bool(smallest)}", {**smallest, "seq_len": size})
            for size in (length // 2, length // 4)
            if size >= 16
        ]
        if self.precision == "32-true":
            changes.append(("precision bf16-true", {"precision": "bf16-true"}))
        free = self.machine.free_memory()
        fits = list(dict.fromkeys(words for words, change in changes if self.memory(**change).total <= free))
        if fits:
            return f"what would fit by the estimate: {'; or '.join(fits[:3])}"
        return "lower train.micro_batch_size or train.max_seq_length, set train.gradient_checkpointing, or " + (
            "finetune with LoRA" if self.method.is_whole and self.source is not None else "take a smaller model"
        )

    def without_effect(self) -> list[str]:
        """Settings that the user gave and that this run has no use for."""
        from litgpt import launch

        assert self.ready is not None
        examples = {"max_new_tokens", "evaluate_example"} & self.eval.given
        shown = [f"eval.{name}" for name in sorted(examples) if self.ready.example("first") is None]
        return [*launch.without_effect(self.logger_name, self.log), *shown, *self.data.without_effect()]

    def _check_memory(self, **changes: Any) -> None:
        try:
            estimate.require_fit(
                self.memory(**changes).total,
                self.machine.free_memory(),
                f"training {self.config.name} ({self.precision}) with train.micro_batch_size "
                f"{self.train.micro_batch_size} and train.max_seq_length {self.seq_length}",
                self.smaller(),
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

    def schedule(self) -> Schedule:
        from litgpt.training import Schedule

        assert self.ready is not None
        samples = self.ready.train_dataloader().samples
        sample_tokens = round(self.ready.row_tokens() or self.seq_length)
        limits = self.train.step_limits(max(sample_tokens, 1), samples)
        steps = min(limits.values(), default=0)
        epoch_steps = max(samples // self.train.global_batch_size, 1)
        return Schedule(steps, self.train.warmup_steps(steps or None, epoch_steps), self.train.min_lr)

    def facts(self) -> dict[str, Any]:
        """What decides the numbers of the run, by option: a resumed run must have the same."""
        from litgpt import checkpoint, optimizers, run_state

        assert self.ready is not None
        train = {name: getattr(self.train, name) for name in DECIDING}
        # when to end early hangs on these as well
        ends = {name: getattr(self.eval, name) for name in ("interval", "max_iters") if self.eval.patience}
        # what is frozen is read from the base again; a whole model is in its own checkpoints
        frozen = None if self.method.is_whole or self.source is None else checkpoint.fingerprint(self.source)
        return run_state.flat(
            "",
            {
                "model_config": self.config.to_dict(),
                "method": {"name": self.method.name, **self.method.settings()},
                "train": {**train, "max_seq_length": self.seq_length},
                "eval": {"patience": self.eval.patience, **ends},
                "optimizer": optimizers.describe(self.optimizer),
                "precision": self.precision,
                "quantize": self.quantize,
                "seed": self.seed,
                "data": {"content": self.ready.fingerprint(), "seed": getattr(self.ready, "seed", None)},
                self.source_option: self.source and Path(self.source).name,
                "base_weights": frozen,
            },
        )

    def check_resume(self, resuming: bool, allowed: list[str]) -> None:
        """Refuse to go on with other settings, or into another run's directory."""
        from litgpt import run_state

        resumed = self.resume_dir
        if resumed is None:
            run_state.require_kept(self.out_dir, self.source, self.tokenizer_dir)
        elif not self.continues_in_place:
            run_state.require_out_dir(self.out_dir, resume=False, overwrite=self.overwrite)
        begun = run_state.read_state(resumed) if resumed else run_state.finished(self.out_dir)
        if resuming and begun is not None:
            run_state.require_same(begun.facts, self.facts(), allowed, resumed or self.out_dir)
            run_state.require_resumable(begun, resumed or self.out_dir)

    # -- how the loop saves this model

    def writer(self, model: GPT, *, final: bool = False) -> WriteWeights:
        """How the loop saves this model: as a checkpoint directory like any other, or as an adapter beside its base.

        final: with the merged model, where the method can be merged.
        """
        from litgpt import checkpoint

        def write(target: Path, extra: Callable[[Path], None] | None) -> None:
            assert self.ready is not None
            shared: dict[str, Any] = {
                "tokenizer_dir": self.tokenizer_dir,
                "hyperparameters": self.hyperparameters,
                "prompt_style": self.ready.style(),
                "extra": extra,
                "overwrite": True,
            }
            if self.method.is_whole:
                checkpoint.write(target, self.config, model, **shared)
            else:
                from litgpt import adapters

                assert self.source is not None
                merged = final and self.merge
                adapters.write(target, self.config, self.method, model, base=self.source, merged=merged, **shared)

        return write

    def example(self, model: GPT) -> Callable[[], str] | None:
        """What answers the example's prompt with the model as it is then; None where none is wanted or there."""
        found = self._example()
        if found is None:
            return None
        assert self.ready is not None
        (ids, prompt, _), style = found, self.ready.style()
        return lambda: f"{prompt}{answer(model, ids, self.tokenizer_dir, self.eval.max_new_tokens or 0, style)}"

    def _example(self) -> tuple[list[int], str, str] | None:
        assert self.ready is not None
        return self.ready.example(self.eval.evaluate_example) if self.eval.max_new_tokens else None


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


def required(value: Any, name: str, remedy: str) -> Any:
    """`value`, or one line that says which option is missing."""
    if value is None:
        raise InputError(f"{name} is missing: give --{name}, {remedy}")
    return value


def answer(
    model: GPT, prompt_ids: list[int], tokenizer_dir: Path, max_new_tokens: int, style: PromptStyle | None
) -> str:
    """The likeliest answer to a prompt, by the model as it stands in the middle of its training.

    It ends where an answer written in `style` does.
    """
    import torch

    from litgpt.generate.engine import Engine
    from litgpt.generate.sampling import Sampling

    tokenizer = Tokenizer(tokenizer_dir)
    prompt_ids = prompt_ids[-(model.config.block_size - 1) :]  # of a long one its end: only an impression is wanted
    room = model.config.block_size - len(prompt_ids)
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            engine = Engine(model, n_tokens=tokenizer.vocab_size)
            ids = engine.generate(
                prompt_ids,
                Sampling(temperature=0.0),
                max_new_tokens=min(max_new_tokens, room),
                stop=style.stop_tokens(tokenizer) if style else [[i] for i in tokenizer.eos_ids],
            )
            return tokenizer.decode(list(ids))
    finally:
        model.train(was_training)


# The story on every rank ----------------------------------------------------------------------------------------------


def story(fabric: Fabric, job: Job) -> None:
    """Build, restore, train, and say what came of it."""
    from litgpt import launch, optimizers, report, run_state, training

    data = job.ready = job.ready or job.opened_data()
    schedule = job.schedule()
    _announce(fabric, job, schedule)
    launch.seed_everything(job.seed + fabric.global_rank)
    model, wrapped = build(fabric, job)
    run = training.Run(
        fabric=fabric,
        model=wrapped,
        optimizer=optimizers.build(job.optimizer, model.parameters()),
        train_loader=data.train_dataloader(fabric.global_rank, fabric.world_size),
        val_loader=data.val_dataloader(fabric.global_rank, fabric.world_size),
        train=job.train,
        eval=job.eval,
        schedule=schedule,
        out_dir=job.out_dir,
        write_step=job.writer(model),
        write_final=job.writer(model, final=True),
        saves_trained=not job.method.is_whole,
        example=job.example(model),
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


def build(fabric: Fabric, job: Job) -> tuple[GPT, Any]:
    """The model, in the dtype it is trained in, with what the method adds to it; and the same as Fabric wraps it."""
    import torch

    from litgpt import launch, optimizers, parallel

    device = fabric.device
    if launch.is_sharded(fabric):
        optimizers.require_parts(job.optimizer, parallel.sample(launch.mesh(fabric)))
        if job.method.is_whole:
            return build_in_parts(fabric, job)
        device = torch.device("cpu")  # what is frozen lies on the mapped files until its part is taken
    model = build_model(job, device)
    return model, fabric.setup_module(model, move_to_device=False)


def build_in_parts(fabric: Fabric, job: Job) -> tuple[GPT, Any]:
    """`build` where each rank holds a part of the model: no rank ever holds more than that and one whole tensor."""
    import torch

    from litgpt import checkpoint, launch, parallel

    model = _outline(job)
    job.method.attach(model)
    wrapped = fabric.setup_module(model, move_to_device=False)
    source = job.resume_dir or job.source
    if source is not None:
        tensors = checkpoint.open_(checkpoint.find(source)).tensors(launch.parameter_dtype(job.precision))
        parallel.fill(model, tensors)
    else:
        parallel.init_weights(model, torch.Generator(fabric.device).manual_seed(job.seed))
    model.gradient_checkpointing = job.train.gradient_checkpointing
    return model, wrapped


def build_model(job: Job, device: torch.device) -> GPT:
    """The model on its device, in the dtype it is trained in, held once, with what the method adds to it."""
    import torch

    from litgpt import checkpoint, launch

    generator = torch.Generator(device).manual_seed(job.seed)
    source = job.resume_dir if job.method.is_whole and job.resume_dir is not None else job.source
    if source is not None:
        model = checkpoint.load_model(
            checkpoint.find(source),
            device=device,
            dtype=launch.parameter_dtype(job.precision),
            writable=job.method.is_whole,  # a frozen model may lie on the mapped files
            quantize=job.quantize,
        )
    else:
        model = _outline(job)
        model.to_empty(device=device)
        model.init_weights(generator)
    job.method.attach(model, generator)
    model.gradient_checkpointing = job.train.gradient_checkpointing
    return model


def _outline(job: Job) -> GPT:
    """The model without memory, its parameters in the dtype they are trained in."""
    from litgpt import launch, weights

    model = weights.outline(job.config)
    for parameter in model.parameters():  # not `.to`: buffers keep their precision
        parameter.data = parameter.data.to(launch.parameter_dtype(job.precision))
    return model


def _announce(fabric: Fabric, job: Job, schedule: Schedule) -> None:
    """The plan, before the first step."""
    from litgpt.report import duration, quantity, table

    train = job.train
    assert job.ready is not None
    loader = job.ready.train_dataloader()
    kind, row_tokens = ("sample", mean) if (mean := job.ready.row_tokens()) else ("row", job.seq_length)
    total_tokens = schedule.steps * train.global_batch_size * row_tokens
    passes = round(schedule.steps * train.global_batch_size / loader.samples)
    steps = f"{schedule.steps:,}" if schedule.steps else f"as many as {duration(train.max_time or 0)} allows"
    total = estimate.parameters(job.config).total
    trained = job.method.trained(job.config)
    share = "" if job.method.is_whole else f"; {job.method.name} trains {quantity(trained)}, {trained / total:.2%}"
    unusual = "" if job.config.family else "; no Hugging Face family has its mix of switches: LitGPT alone will open it"
    rows = {
        "model": f"{job.config.name}, {quantity(total)} parameters{share}{unusual}",
        "on": f"{job.machine}{', ' + job.shared_by if job.machine.world_size > 1 else ''}, precision {job.precision}"
        + (f", weights in {job.quantize}" if job.quantize else ""),
        "memory": f"about {estimate.in_words(job.memory().total)} on top of Python and torch, "
        f"{estimate.in_words(job.machine.free_memory())} free",
        "batch": _batch_in_words(job),
        "steps": f"{steps}, the first {schedule.warmup} to warm up",
        "tokens": f"{quantity(total_tokens)}" if schedule.steps else "until the time is over",
        "data": f"{quantity(loader.samples)} {kind}{'s' * (loader.samples > 1)} to train on"
        + (f", each about {passes} times" if passes > 1 else ""),
    }
    guess = expected_seconds(job, total_tokens, fabric.device) if fabric.is_global_zero else 0
    if guess > 10:
        rows["time"] = f"about {duration(guess)}, guessed from the speed of one matrix product"
    if job.reduced:
        fabric.print(f"defaults reduced to fit this run: {', '.join(job.reduced)}")
    for line in job.ready.notes():
        fabric.print(line)
    if unused := job.without_effect():
        fabric.print(f"without effect in this run: {', '.join(unused)}")
    if job.resume_dir is not None:
        fabric.print(f"resuming from {job.resume_dir}")
    fabric.print(f"plan:\n{table(rows)}")


def _batch_in_words(job: Job) -> str:
    train, ranks = job.train, job.machine.world_size
    assert job.ready is not None
    row_tokens = job.ready.row_tokens()
    if row_tokens is not None:
        return (
            f"{train.global_batch_size} sample{'s' * (train.global_batch_size > 1)} of about {row_tokens:.0f} tokens; "
            f"a device holds at most {train.micro_batch_size} x {job.seq_length} tokens at a time"
        )
    return (
        f"{train.global_batch_size} rows of {job.seq_length} tokens = {train.micro_batch_size} at a time x "
        f"{train.accumulation(ranks)} accumulated x {ranks} device{'s' * (ranks > 1)}"
    )


def expected_seconds(job: Job, tokens: float, device: torch.device) -> float:
    """A guess at the run's length: its FLOPs over the speed of a matrix product of the model's width, timed now."""
    from litgpt import launch

    # forward, gradients of activations, gradients of weights; frozen weights need none, checkpointed blocks run twice
    forwards = 2 + job.method.is_whole + job.train.gradient_checkpointing
    flops = forwards * estimate.flops_per_token(job.config, job.seq_length)
    reached = launch.matmul_flops(job.config.n_embd, job.precision, device) * TYPICAL_SHARE
    return tokens * flops / (reached * job.machine.world_size)


TYPICAL_SHARE = 0.5  # of a matrix product's speed that a whole training step was seen to reach


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
    from litgpt.run_state import BEST, FINAL, LOGS

    assert job.ready is not None
    at, unigram, best = run.state.at, job.ready.unigram_loss(), run.state.best
    rows = {
        "validation loss": "" if run.val_loss is None else f"{run.val_loss:.4f} nats per token",
        "best": f"{best['val_loss']:.4f} after step {best['step']}"
        + (f", kept in {job.out_dir / BEST}" if job.eval.keep_best and (job.out_dir / BEST).is_dir() else "")
        if best
        else "",
        "unigram loss": "" if unigram is None else f"{unigram:.4f}, of a model that only counts tokens",
        "trained": f"{report.quantity(at.tokens)} tokens in {report.duration(at.seconds)}, "
        f"{at.tokens / max(at.seconds, 1e-9):,.0f} tokens/s",
        "peak memory": estimate.in_words(launch.peak_memory(run.fabric.device)),
        "metrics": str(job.out_dir / LOGS / "metrics.csv"),
    }
    print(report.table({name: value for name, value in rows.items() if value}))
    print(report.picture(job.out_dir / LOGS / "metrics.csv", job.out_dir / "loss.png", baseline=unigram))
    print(report.next_commands(job.out_dir / FINAL, job.ready.question()))
