"""Tiny training runs: a model of two layers, made data, a second or less for a dozen steps on one core."""

from __future__ import annotations

import importlib
import json
import multiprocessing
import os
import random
import resource
import signal
import sys
import time
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from litgpt import pretrain
from litgpt.args import EvalArgs, TrainArgs
from litgpt.data import JSON, TextFiles
from litgpt.errors import UserError
from litgpt.report import read_metrics
from tests.makers.checkpoints import make_hf_checkpoint
from tests.makers.configs import shrunk
from tests.makers.tokenizers import TEXT, train_tiny_tokenizer

TIMES = ("tokens_per_second", "seconds")  # the columns of the metrics that differ between equal runs
STEPS = 12
MODEL = "pythia-14m"
METHODS = ("lora", "full", "adapter", "adapter_v2")


def material(folder: Path) -> dict[str, Any]:
    """A text and a tokenizer, made once per folder, as arguments of `pretrain.main`."""
    text, tokenizer = folder / "text.txt", folder / "tokenizer"
    if not text.is_file():
        train_tiny_tokenizer(tokenizer, 96)
        words, pick = TEXT.replace("\n", " ").split(" "), random.Random(0)
        text.write_text(" ".join(pick.choice(words) for _ in range(3000)))
    return {"tokenizer_dir": tokenizer, "data": TextFiles(text, cache_dir=folder / "cache")}


def finetuning_material(folder: Path) -> dict[str, Any]:
    """A base checkpoint and 24 records of unequal length, made once per folder, as arguments of `finetune.*.setup`."""
    base, records = folder / "base", folder / "records.json"
    if not base.is_dir():
        train_tiny_tokenizer(folder / "tokenizer", 96)
        model = shrunk(MODEL, n_layer=3)  # of which LLaMA-Adapter leaves the first two alone
        make_hf_checkpoint(base, model, tokenizer_dir=folder / "tokenizer")
        records.write_text(json.dumps(made_records(24)))
    return {"checkpoint_dir": base, "data": JSON(records, val_split_fraction=0.2, prompt_style="default")}


def made_records(count: int, longest: int = 12) -> list[dict[str, str]]:
    """Instruction records whose answers have 1 to `longest` words."""
    words, pick = TEXT.replace("\n", " ").split(" "), random.Random(1)
    answers = [" ".join(pick.choice(words) for _ in range(1 + i % longest)) for i in range(count)]
    return [{"instruction": f"Say {pick.choice(words)}", "input": "", "output": answer} for answer in answers]


def arguments(folder: Path, out_dir: Path, *, method: str = "pretrain", **changes: Any) -> dict[str, Any]:
    """Arguments of a command for a run of 12 steps that accumulates over 3; `train` and `eval` are added to."""
    train: dict[str, Any] = {
        "save_interval": 4,
        "global_batch_size": 6,
        "micro_batch_size": 2,
        "lr_warmup_steps": 2,
        "max_steps": STEPS,
        "max_seq_length": 32,
        "max_norm": 1.0,
        **changes.pop("train", {}),
    }
    evaluation = {"interval": 5, "max_iters": 2, **changes.pop("eval", {})}
    defaults: dict[str, Any] = {
        "out_dir": out_dir,
        "devices": 1,
        "train": TrainArgs(**train),
        "eval": EvalArgs(**evaluation),
    }
    if method == "pretrain":
        model = {"model_name": "tiny", "model_config": shrunk(MODEL)}
        return defaults | model | material(folder) | changes
    lora = {"lora_dropout": 0.1} if method == "lora" else {}
    rate = {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.01}}
    return defaults | {"optimizer": rate} | lora | finetuning_material(folder) | changes


def run(folder: Path, out_dir: Path, *, method: str = "pretrain", **changes: Any) -> Path:
    """Pretrain, or finetune with `method`, in this process; returns `out_dir`."""
    command = pretrain.main if method == "pretrain" else importlib.import_module(f"litgpt.finetune.{method}").setup
    command(**arguments(folder, out_dir, method=method, **changes))
    return out_dir


def run_and_signal(number: int, after_step: int, folder: Path, out_dir: Path, **changes: Any) -> int:
    """Train in a process of its own, send it a signal once it has logged `after_step`; returns its exit status."""
    process = multiprocessing.get_context("fork").Process(target=_run_alone, args=(folder, out_dir, changes))
    process.start()
    metrics = out_dir / "logs" / "metrics.csv"
    deadline = time.monotonic() + 60
    while process.is_alive() and time.monotonic() < deadline:
        if (rows := read_metrics(metrics)) and int(rows[-1]["step"]) >= after_step:
            os.kill(process.pid or 0, number)
            break
        time.sleep(0.001)
    return _ended(process, 30)


def run_on_small_disk(largest_file: int, folder: Path, out_dir: Path, **changes: Any) -> int:
    """Train in a process of its own that cannot write files beyond so many bytes; returns its exit status."""
    process = multiprocessing.get_context("fork").Process(
        target=_run_alone, args=(folder, out_dir, changes, largest_file)
    )
    process.start()
    return _ended(process, 60)


def _ended(process: BaseProcess, seconds: float) -> int:
    """The exit status of a process; -1 of one that has to be ended, or pytest would wait for it."""
    process.join(seconds)
    status = process.exitcode
    process.kill()
    process.join()
    return -1 if status is None else status


def _run_alone(folder: Path, out_dir: Path, changes: dict[str, Any], largest_file: int | None = None) -> None:
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if largest_file is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
    try:
        run(folder, out_dir, **changes)
    except UserError as error:
        sys.exit(error.exit_status)


def losses(out_dir: Path) -> list[dict[str, str]]:
    """The metrics of a run without what the clock decides."""
    rows = read_metrics(out_dir / "logs" / "metrics.csv")
    return [{name: value for name, value in row.items() if name not in TIMES} for row in rows]


def weights(directory: Path) -> dict[str, torch.Tensor]:
    return load_file(directory / "model.safetensors")


def tensor_bytes(directory: Path) -> dict[str, bytes]:
    """Every tensor below a checkpoint directory, weights and training state, as bytes."""
    files = sorted(directory.rglob("*.safetensors"))
    tensors = {f"{f.parent.name}/{name}": tensor for f in files for name, tensor in load_file(f).items()}
    return {name: tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes() for name, tensor in tensors.items()}
