"""`litgpt finetune_full`: every weight is trained."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from litgpt.args import EvalArgs, LogArgs, TrainArgs
from litgpt.data.base import DataModule
from litgpt.finetune.base import DEFAULT_TRAIN, finetune
from litgpt.job import recipe_of


def setup(
    checkpoint_dir: Path,
    out_dir: Path = Path("out/finetune/full"),
    precision: Literal["bf16-true", "bf16-mixed", "32-true"] | None = None,
    devices: int | str = 1,
    num_nodes: int = 1,
    strategy: Literal["auto", "ddp", "fsdp"] = "auto",
    resume: bool | Literal["auto"] | Path = False,
    data: DataModule | None = None,
    train: TrainArgs = DEFAULT_TRAIN,
    log: LogArgs = LogArgs(),
    eval: EvalArgs = EvalArgs.as_default(max_new_tokens=100),
    optimizer: str | dict = "AdamW",
    logger_name: Literal["csv", "tensorboard", "wandb", "mlflow", "litlogger"] = "csv",
    seed: int = 1337,
    access_token: str | None = None,
    overwrite: bool = False,
    allow_change: list[str] | str | None = None,
) -> None:
    """Finetune all weights of a model.

    The result is a Hugging Face directory, `out_dir/final`, for every other command and for `transformers`.

    Args:
        checkpoint_dir: The model to finetune: a checkpoint directory, its name below checkpoints/, or a repository of
            the Hugging Face Hub, which is downloaded.
        out_dir: Where checkpoints, metrics and the result go.
        precision: How numbers are held: 32-true, bf16-mixed or bf16-true; null: 32-true on CPU, bf16-mixed on a GPU
            that knows it.
        devices: Number of devices, or auto: all GPUs, one process on CPU.
        num_nodes: Number of hosts.
        strategy: How several devices share the work: ddp (each holds the whole model), fsdp (each holds a part), or
            auto (fsdp on GPUs).
        resume: Go on with a run: true (the newest checkpoint in out_dir), auto (the same, or a new run where there is
            none), or the path of a checkpoint.
        data: What to train on, such as JSON, Alpaca2k or TextFiles.
        train: How to train.
        log: Where an experiment tracker files the run.
        eval: When to validate.
        optimizer: Any optimizer of torch.optim by name, or class_path and init_args (bitsandbytes.optim.AdamW8bit).
        logger_name: Experiment tracker to log to, beside out_dir/logs/metrics.csv.
        seed: Of all that is random, but for the order of the data, which has data.seed.
        access_token: For a model of the Hub that asks for one; by default HF_TOKEN. It is written nowhere.
        overwrite: Replace the run that out_dir holds.
        allow_change: Settings that may differ from those of the run that is resumed, such as train.max_steps.
    """
    asked = locals()
    from litgpt.methods.full import Full

    method = Full()
    finetune(method, recipe_of(asked), **asked)
