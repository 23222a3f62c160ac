"""What the finetuning commands have in common: from a command's values to a `Job`. Loads no torch by itself."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from litgpt.args import EvalArgs, LogArgs, TrainArgs
from litgpt.config import Config
from litgpt.data.base import DataModule
from litgpt.errors import InputError
from litgpt.job import Job, required

if TYPE_CHECKING:
    from litgpt.methods.base import Method

DEFAULT_TRAIN = TrainArgs.as_default(
    save_interval=1000,
    log_interval=1,
    global_batch_size=16,
    micro_batch_size=1,
    lr_warmup_steps=100,
    epochs=5,
)


def finetune(
    method: Method,
    recipe: dict[str, Any],
    *,
    checkpoint_dir: Path,
    out_dir: Path,
    precision: str | None,
    devices: int | str,
    num_nodes: int,
    strategy: str,
    resume: bool | str | Path,
    data: DataModule | None,
    train: TrainArgs,
    log: LogArgs,
    eval: EvalArgs,
    optimizer: str | dict,
    logger_name: str,
    seed: int,
    access_token: str | None,
    overwrite: bool,
    allow_change: list[str] | str | None,
    quantize: str | None = None,
    merge: bool = True,
    **settings_of_the_method: Any,
) -> None:
    """Train what `method` adds to (or frees in) a checkpoint's model. `recipe` is kept beside the result."""
    from litgpt import launch
    from litgpt.generate.session import located
    from litgpt.quantize import require_mode

    if quantize is not None:
        require_mode(quantize, training=True)
    launch.require_logger(logger_name)
    machine = launch.machine(devices, num_nodes)
    data = required(data, "data", "for instance --data JSON --data.json_path my.json")
    source = located(checkpoint_dir, access_token)
    _require_whole(source)
    recipe.pop("access_token")
    job = Job(
        config=finetuned_config(source, train),
        method=method,
        out_dir=Path(out_dir),
        precision=launch.training_precision(precision, machine.accelerator),
        machine=machine,
        train=train,
        eval=eval,
        log=log,
        optimizer=optimizer,
        tokenizer_dir=source,
        data=data,
        source=source,
        source_option="checkpoint_dir",
        logger_name=logger_name,
        seed=seed,
        overwrite=overwrite,
        hyperparameters=recipe,
        quantize=quantize,
        strategy=strategy,
        merge=merge,
    )
    job.start(resume, allow_change)


def _require_whole(source: Path) -> None:
    """Refuse an adapter whose base model is not merged into it."""
    from litgpt import adapters

    found = adapters.find(source)
    if found is not None:
        base = f"finetune its base model {found.base or ''}".rstrip()
        merged = f"merge it into its base model first (litgpt merge_lora {found.home}), or {base}"
        raise InputError(
            f"checkpoint_dir {source} is an adapter ({found.method}), no whole model; "
            f"{merged if found.method == 'lora' else base}"
        )


def finetuned_config(source: Path, train: TrainArgs) -> Config:
    """The config of the checkpoint that is finetuned; what it ties stays tied."""
    config = Config.from_checkpoint(source)
    if train.tie_embeddings is not None and train.tie_embeddings != config.tie_embeddings:
        raise InputError(
            f"train.tie_embeddings is {train.tie_embeddings}, but the embeddings in checkpoint_dir {source} are "
            f"{'' if config.tie_embeddings else 'not '}tied; leave it out"
        )
    return config
