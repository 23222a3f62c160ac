"""`litgpt pretrain`: a model trained on text, from scratch or from a checkpoint."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Literal

from litgpt import families
from litgpt.args import EvalArgs, LogArgs, TrainArgs
from litgpt.config import Config
from litgpt.data.base import DataModule
from litgpt.errors import InputError
from litgpt.job import Job, recipe_of, required

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
    strategy: Literal["auto", "ddp", "fsdp"] = "auto",
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
        strategy: How several devices share the work: ddp (each holds the whole model), fsdp (each holds a part), or
            auto (fsdp on GPUs).
        tokenizer_dir: Directory of the tokenizer; its files are copied beside the trained weights.
        logger_name: Experiment tracker to log to, beside out_dir/logs/metrics.csv.
        seed: Of the initial weights and all else that is random, but for the order of the data, which has data.seed.
        overwrite: Replace the run that out_dir holds.
        allow_change: Settings that may differ from those of the run that is resumed, such as train.max_steps.
    """
    asked = {name: value for name, value in locals().items() if name != "allow_change"}
    from litgpt import launch
    from litgpt.methods.full import Full

    launch.require_logger(logger_name)
    machine = launch.machine(devices, num_nodes)
    job = Job(
        config=choose_config(model_name, model_config, initial_checkpoint_dir, train),
        method=Full(),
        out_dir=Path(out_dir),
        precision=launch.training_precision(precision, machine.accelerator),
        machine=machine,
        train=train,
        eval=eval,
        log=log,
        optimizer=optimizer,
        tokenizer_dir=required(tokenizer_dir, "tokenizer_dir", "litgpt train_tokenizer TEXT --out_dir DIR makes one"),
        data=required(data, "data", "for instance --data TextFiles --data.train_data_path TEXT"),
        source=initial_checkpoint_dir,
        source_option="initial_checkpoint_dir",
        logger_name=logger_name,
        seed=seed,
        overwrite=overwrite,
        hyperparameters=recipe_of(asked),
        strategy=strategy,
    )
    job.start(resume, allow_change)


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
