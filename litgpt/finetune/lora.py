"""`litgpt finetune` and `litgpt finetune_lora`: two small matrices beside a weight train (LoRA, Hu et al. 2021)."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from litgpt.args import EvalArgs, LogArgs, TrainArgs
from litgpt.data.base import DataModule
from litgpt.finetune.base import DEFAULT_TRAIN, finetune
from litgpt.job import recipe_of


def setup(
    checkpoint_dir: Path,
    out_dir: Path = Path("out/finetune/lora"),
    precision: Literal["bf16-true", "bf16-mixed", "32-true"] | None = None,
    quantize: Literal["bnb.nf4", "bnb.nf4-dq", "bnb.fp4", "bnb.fp4-dq", "bnb.int8-training"] | None = None,
    devices: int | str = 1,
    num_nodes: int = 1,
    strategy: Literal["auto", "ddp", "fsdp"] = "auto",
    lora_r: int = 8,
    lora_alpha: int = 16,
    lora_dropout: float = 0.05,
    lora_query: bool = True,
    lora_key: bool = False,
    lora_value: bool = True,
    lora_projection: bool = False,
    lora_mlp: bool = False,
    lora_head: bool = False,
    lora_rslora: bool = False,
    lora_dora: bool = False,
    merge: bool = True,
    resume: bool | Literal["auto"] | Path = False,
    data: DataModule | None = None,
    train: TrainArgs = DEFAULT_TRAIN,
    log: LogArgs = LogArgs(),
    eval: EvalArgs = EvalArgs.as_default(interval=100, max_new_tokens=100),
    optimizer: str | dict = "AdamW",
    logger_name: Literal["csv", "tensorboard", "wandb", "mlflow", "litlogger"] = "csv",
    seed: int = 1337,
    access_token: str | None = None,
    overwrite: bool = False,
    allow_change: list[str] | str | None = None,
) -> None:
    """Finetune a model with LoRA, or with QLoRA where --quantize is given.

    The result is the merged model, `out_dir/final`, a Hugging Face directory for every other command and for
    `transformers`, and the adapter alone, `out_dir/final/adapter`, for PEFT.

    Args:
        checkpoint_dir: The model to finetune: a checkpoint directory, its name below checkpoints/, or a repository of
            the Hugging Face Hub, which is downloaded.
        out_dir: Where checkpoints, metrics and the result go.
        precision: How numbers are held: 32-true, bf16-mixed or bf16-true; null: 32-true on CPU, bf16-mixed on a GPU
            that knows it. What a method adds is trained in fp32 in any case.
        quantize: Hold the frozen weights in 4 or 8 bits (QLoRA).
        devices: Number of devices, or auto: all GPUs, one process on CPU.
        num_nodes: Number of hosts.
        strategy: How several devices share the work: ddp (each holds the whole model), fsdp (each holds a part), or
            auto (ddp).
        lora_r: Rank of the two matrices that are added to a weight.
        lora_alpha: What they are added with: lora_alpha / lora_r times.
        lora_dropout: Share of their inputs that is dropped while training.
        lora_query: Add them to the queries.
        lora_key: Add them to the keys.
        lora_value: Add them to the values.
        lora_projection: Add them to the projection after attention.
        lora_mlp: Add them to the MLPs, experts included.
        lora_head: Add them to the output head.
        lora_rslora: Scale by lora_alpha / sqrt(lora_r) instead (rank-stabilised LoRA, Kalajdzievski 2023).
        lora_dora: Train the length of each weight's rows apart from their direction, too (DoRA, Liu et al. 2024).
        merge: Write the merged model into out_dir/final as well, not the adapter in out_dir/final/adapter alone.
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
    from litgpt.methods.lora import LoRA

    method = LoRA(
        r=lora_r,
        alpha=lora_alpha,
        dropout=lora_dropout,
        query=lora_query,
        key=lora_key,
        value=lora_value,
        projection=lora_projection,
        mlp=lora_mlp,
        head=lora_head,
        rslora=lora_rslora,
        dora=lora_dora,
    )
    finetune(method, recipe_of(asked), **asked)
