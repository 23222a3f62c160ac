"""`litgpt pretrain` from words to a finished model: what it takes, what it refuses, what others make of its output."""

from __future__ import annotations

import itertools
import math
import subprocess
import sys
from contextlib import nullcontext
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from safetensors.torch import load_file

from litgpt import checkpoint, pretrain
from litgpt.args import LogArgs, TrainArgs
from litgpt.config import Config
from litgpt.data import TextFiles
from litgpt.errors import DivergedError, InputError, MachineError, MissingError, UserError
from litgpt.job import Job, build_model
from litgpt.methods.full import Full
from litgpt.tokenizer import Tokenizer
from tests.makers import runs
from tests.makers.configs import shrunk
from tests.makers.tokenizers import train_tiny_tokenizer
from tests.test_config import DEEPSEEK

SHORT = {"max_steps": 2, "lr_warmup_steps": 0, "save_interval": 0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("material")


@pytest.fixture(scope="module")
def trained(folder: Path) -> Path:
    """A finished run on a tied Llama."""
    return runs.run(folder, folder / "trained", model_config=llama())


def llama(**overrides: Any) -> Config:
    return shrunk("tiny-llama-1.1b", tie_embeddings=True, **overrides)


# From end to end ------------------------------------------------------------------------------------------------------


def test_the_command_line_trains_a_model_that_transformers_opens(folder: Path, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    material = runs.material(folder)
    options = {
        "tokenizer_dir": material["tokenizer_dir"],
        "data": "TextFiles",
        "data.train_data_path": material["data"].train_data_path,
        "data.cache_dir": folder / "cache",
        "model_config.n_layer": 2,
        "model_config.n_embd": 32,
        "model_config.n_head": 4,
        "model_config.block_size": 64,
        "model_config.padded_vocab_size": 128,
        "train.max_tokens": 6000,
        "out_dir": tmp_path / "a run",
        "devices": 1,
    }
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    done = subprocess.run(
        [sys.executable, "-m", "litgpt", "pretrain", "pythia-14m", *words], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    reduced = [line for line in done.stdout.splitlines() if "global_batch_size 512 ->" in line]
    assert len(reduced) == 1
    assert "lr_warmup_steps 2000 ->" in reduced[0]
    assert "validation loss" in done.stdout
    assert f"litgpt chat '{tmp_path}/a run/final'" in done.stdout
    assert "Traceback" not in done.stderr

    final = tmp_path / "a run" / "final"
    ids = torch.tensor([Tokenizer(final).encode("The river ran past the mill")])
    theirs = transformers.AutoModelForCausalLM.from_pretrained(final, dtype=torch.float32)
    torch.testing.assert_close(checkpoint.load_model(final)(ids), theirs(ids).logits, rtol=1e-4, atol=1e-4)
    assert (
        transformers.AutoTokenizer.from_pretrained(final)("The river ran past the mill")["input_ids"] == ids[0].tolist()
    )


def test_printed_speed_is_that_of_the_wall_clock(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from litgpt.report import read_metrics

    ticks = itertools.count()
    monkeypatch.setattr("litgpt.training.time.monotonic", lambda: 0.25 * next(ticks))  # later at each look
    runs.run(folder, tmp_path / "run", train={"save_interval": 0})
    rows = read_metrics(tmp_path / "run" / "logs" / "metrics.csv")
    assert len(rows) == runs.STEPS
    for before, row in pairwise(rows):
        span, tokens = (float(row[name]) - float(before[name]) for name in ("seconds", "tokens"))
        assert span >= 0.25
        assert float(row["tokens_per_second"]) == pytest.approx(tokens / span, abs=0.1)


@pytest.mark.parametrize("tied", [True, False])
def test_what_is_saved_is_what_was_trained(tied: bool, folder: Path, tmp_path: Path) -> None:
    fast = {"class_path": "AdamW", "init_args": {"lr": 0.03}}
    config = shrunk("tiny-llama-1.1b", tie_embeddings=tied)
    runs.run(folder, tmp_path / "run", model_config=config, optimizer=fast, eval={"max_iters": None})
    trained_to = float(runs.losses(tmp_path / "run")[-1]["val_loss"])
    assert trained_to < 0.9 * math.log(96)  # it has learned something
    assert math.isclose(trained_to, validation_loss(folder, tmp_path / "run" / "final"), rel_tol=1e-5)


def test_a_tied_head_is_written_once(trained: Path) -> None:
    assert "lm_head.weight" not in load_file(trained / "final" / "model.safetensors")
    assert Config.from_checkpoint(trained / "final").tie_embeddings


def test_tying_on_request(folder: Path, tmp_path: Path) -> None:
    runs.run(folder, tmp_path / "run", train=SHORT | {"tie_embeddings": True})
    assert Config.from_checkpoint(tmp_path / "run" / "final").tie_embeddings


def test_bf16_weights_train_on_cpu(folder: Path, tmp_path: Path) -> None:
    runs.run(folder, tmp_path / "run", precision="bf16-true", train=SHORT)
    assert checkpoint.open_(tmp_path / "run" / "final").dtype == torch.bfloat16


def test_bf16_autocast_keeps_weights_in_fp32(folder: Path, tmp_path: Path) -> None:
    runs.run(folder, tmp_path / "run", precision="bf16-mixed", train=SHORT)
    assert checkpoint.open_(tmp_path / "run" / "final").dtype == torch.float32


def test_intervals_of_zero_are_off(folder: Path, tmp_path: Path) -> None:
    off = {"save_interval": 0, "log_interval": 0, "lr_warmup_steps": 0, "max_norm": 0}
    runs.run(folder, tmp_path / "run", train=off, eval={"interval": 0, "final_validation": False})
    assert runs.losses(tmp_path / "run") == []
    assert sorted(path.name for path in (tmp_path / "run").iterdir() if path.is_dir()) == ["final", "logs"]


@pytest.mark.parametrize("overwrite", [True, False])
def test_a_start_that_is_refused_leaves_the_directory_as_it_was(
    overwrite: bool, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(name: str, out_dir: Path, log: LogArgs) -> None:
        (out_dir / "logs" / "begun").mkdir(parents=True)
        raise InputError("the tracker cannot start")

    out_dir = tmp_path / "some" / "run"
    if overwrite:
        (out_dir / "final").mkdir(parents=True)
        (out_dir / "final" / "weights").write_text("of days")
    before = sorted(tmp_path.rglob("*"))
    with monkeypatch.context() as patch:
        patch.setattr("litgpt.launch.tracker", refuse)
        with pytest.raises(InputError, match="tracker"):
            runs.run(folder, out_dir, train=SHORT, overwrite=overwrite)
    assert sorted(tmp_path.rglob("*")) == before
    runs.run(folder, out_dir, train=SHORT, overwrite=overwrite)
    assert {path.name for path in out_dir.iterdir()} >= {"final", "logs", "hyperparameters.yaml"}
    assert not [path for path in out_dir.iterdir() if path.name.startswith(".")]


# From a checkpoint ----------------------------------------------------------------------------------------------------


def test_the_first_loss_of_a_run_from_a_checkpoint_is_the_checkpoints_own(
    folder: Path, trained: Path, tmp_path: Path
) -> None:
    name, final = Config.from_checkpoint(trained / "final").name, trained / "final"
    start = {"model_name": name, "model_config": None, "initial_checkpoint_dir": final}
    whole = {"initial_validation": True, "max_iters": None}
    runs.run(folder, tmp_path / "run", **start, train=SHORT, eval=whole)
    first = float(runs.losses(tmp_path / "run")[0]["val_loss"])

    assert math.isclose(first, validation_loss(folder, final), rel_tol=1e-5)
    assert runs.losses(tmp_path / "run")[0]["step"] == "0"


def validation_loss(folder: Path, checkpoint_dir: Path) -> float:
    """Of a checkpoint as it lies on the disk, on all of the validation text."""
    model, total, counted = checkpoint.load_model(checkpoint_dir), 0.0, 0
    data = runs.material(folder)["data"]
    data.connect(Tokenizer(checkpoint_dir), 2, 32)
    data.prepare_data()
    data.setup()
    for batch in data.val_dataloader():
        loss = model(batch["ids"], targets=batch["labels"])
        total, counted = total + loss.total.item(), counted + int(loss.count)
    return total / counted


def test_a_checkpoint_of_another_model_is_refused(folder: Path, trained: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"initial_checkpoint_dir .* holds another model than pythia-14m"):
        runs.run(
            folder,
            tmp_path / "run",
            model_name="pythia-14m",
            model_config=None,
            initial_checkpoint_dir=trained / "final",
        )
    with pytest.raises(MissingError, match="nothing here"):
        runs.run(folder, tmp_path / "run", initial_checkpoint_dir=tmp_path / "nothing here")


def test_overwriting_the_checkpoint_to_start_from_is_refused(folder: Path, trained: Path) -> None:
    with pytest.raises(InputError, match=r"final belongs to the run in out_dir .* that is replaced"):
        runs.run(folder, trained, model_config=llama(), initial_checkpoint_dir=trained / "final", overwrite=True)


# Refused before anything is built -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"train": {"global_batch_size": 1}}, r"global_batch_size 1 .*micro_batch_size 2"),
        ({"train": {"global_batch_size": 5}}, r"global_batch_size 5 .*micro_batch_size 2"),
        ({"train": {"global_batch_size": 7, "micro_batch_size": 7}, "devices": 2}, r"global_batch_size 7 .*devices"),
        ({"train": {"lr_warmup_steps": 99}}, r"lr_warmup_steps 99 .*max_steps"),
        ({"train": {"max_tokens": 100}}, r"max_tokens 100 .*global_batch_size"),
        ({"train": {"max_steps": None, "lr_warmup_steps": 0}}, r"when to stop"),
        ({"train": {"max_seq_length": 65}}, r"max_seq_length 65 .*block_size 64"),
        ({"train": {"min_lr": 1.0}}, r"min_lr 1.0 .*optimizer\.lr"),
        ({"devices": 0}, r"devices is 0"),
        ({"seed": -1}, r"seed is -1"),
        ({"seed": 2**63}, r"seed is 9223372036854775808"),
        ({"optimizer": "LBFGS"}, r"optimizer LBFGS .*closure"),
        ({"optimizer": "AdmW"}, r"did you mean 'AdamW'"),
        ({"logger_name": "tensorbord"}, r"did you mean 'tensorboard'"),
        ({"precision": "bf61-true"}, r"did you mean 'bf16-true'"),
        ({"data": None}, r"data is missing"),
        ({"tokenizer_dir": None}, r"tokenizer_dir is missing"),
        ({"overwrite": True, "resume": True}, r"--resume and --overwrite"),
        ({"model_config": None, "model_name": "pythia-15m"}, r"did you mean 'pythia-"),
    ],
)
def test_what_cannot_be_is_refused_with_its_options(
    changes: dict[str, Any], said: str, folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=said):
        runs.run(folder, tmp_path / "run", **changes)
    assert not (tmp_path / "run").exists()


def test_a_larger_tokenizer_than_the_vocabulary_is_refused(folder: Path, tmp_path: Path) -> None:
    train_tiny_tokenizer(tmp_path / "large", 300)
    with pytest.raises(InputError, match=r"large has 300 tokens.* only 128"):
        runs.run(folder, tmp_path / "run", tokenizer_dir=tmp_path / "large")


def test_a_model_that_will_not_fit_is_refused_before_it_is_built(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("litgpt.job.build_model", None)
    monkeypatch.setattr(Tokenizer, "encode_batch", None)  # nor is a text read
    monkeypatch.setattr("litgpt.launch.available_memory", lambda: 8 * 10**9)
    with pytest.raises(
        MachineError,
        match=r"pythia-12b .*needs about .* 8\.0 GB is free; lower train\.micro_batch_size .*smaller model",
    ):
        runs.run(folder, tmp_path / "run", model_name="pythia-12b", model_config=None, train={"max_seq_length": 2048})


def test_the_optimizers_own_memory_is_counted(folder: Path, tmp_path: Path) -> None:
    told = {}
    for name in ("SGD", "AdamW"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("litgpt.launch.available_memory", lambda: 0)
            with pytest.raises(MachineError) as refused:
                runs.run(folder, tmp_path / "run", model_name="pythia-160m", model_config=None, optimizer=name)
        told[name] = float(str(refused.value).split("needs about ")[1].split(" GB")[0])
    assert told["AdamW"] - told["SGD"] == pytest.approx(8 * 0.162, abs=0.11)


def test_settings_without_effect_are_named_where_they_were_given(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs.run(folder, tmp_path / "silent", train=SHORT)
    assert "without effect" not in capsys.readouterr().out
    data = runs.material(folder)["data"]
    data.num_workers = 2
    given = {"data": data, "log": LogArgs(log_model=True), "eval": {"max_new_tokens": 5}}
    runs.run(folder, tmp_path / "run", train=SHORT, **given)
    said = "without effect in this run: log.log_model, eval.max_new_tokens, data.num_workers\n"
    assert said in capsys.readouterr().out


def test_weights_are_cast_and_buffers_are_not() -> None:
    config = Config.from_hf(DEEPSEEK)
    job = SimpleNamespace(
        config=config, precision="bf16-true", resume_dir=None, source=None, seed=0, method=Full(), train=TrainArgs()
    )
    model = build_model(cast(Job, job), torch.device("cpu"))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    biases = [buffer for name, buffer in model.named_buffers() if name.endswith("e_score_correction_bias")]
    assert biases
    assert all(bias.dtype == torch.float32 and not bias.any() for bias in biases)


class Ledger:
    """A tracker that remembers how it was told the run ended."""

    def __init__(self) -> None:
        self.ends: list[str] = []

    def log_metrics(self, numbers: Any, step: int) -> None: ...

    def log_hyperparams(self, values: Any) -> None: ...

    def finalize(self, status: str) -> None:
        self.ends.append(status)


@pytest.mark.parametrize(("rate", "end"), [(1e-3, "success"), (1e30, "failed")])
def test_a_tracker_and_the_metrics_are_closed_however_the_run_ends(
    rate: float, end: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger, closed = Ledger(), []
    monkeypatch.setattr("litgpt.launch.tracker", lambda *_: ledger)
    monkeypatch.setattr("litgpt.report.Metrics.close", lambda self: closed.append(self._file.close()))
    optimizer = {"class_path": "AdamW", "init_args": {"lr": rate}}
    with pytest.raises(DivergedError) if end == "failed" else nullcontext():
        runs.run(folder, tmp_path / "run", optimizer=optimizer, train={"save_interval": 0, "lr_warmup_steps": 0})
    assert ledger.ends == [end]
    assert len(closed) == 1


def test_a_used_out_dir_is_refused_and_overwritten_on_request(folder: Path, tmp_path: Path) -> None:
    out_dir = runs.run(folder, tmp_path / "run", train=SHORT | {"save_interval": 1})
    (out_dir / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match=r"out_dir .*run holds another run .*--resume auto"):
        runs.run(folder, out_dir)
    runs.run(folder, out_dir, train=SHORT, overwrite=True)
    assert not list(out_dir.glob("step-*"))
    assert (out_dir / "notes.txt").read_text() == "mine"


def test_an_out_dir_that_cannot_be_made_is_refused_at_once(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for bad in (tmp_path / "file", tmp_path / "file" / "below", tmp_path / ("x" * 300)):
        with pytest.raises(InputError, match="out_dir"):
            runs.run(folder, bad)
    runs.run(folder, tmp_path / "with spaces und Ümläute", train=SHORT)


def test_hyperparameters_are_kept_beside_every_result(folder: Path, trained: Path) -> None:
    import yaml

    for place in (trained, trained / "final", trained / "step-00000004"):
        kept = yaml.safe_load((place / "hyperparameters.yaml").read_text())
        assert kept["train"]["max_steps"] == runs.STEPS
        assert kept["data"]["class_path"] == "litgpt.data.TextFiles"


def test_defaults_do_not_count_as_given() -> None:
    assert not pretrain.DEFAULT_TRAIN.given
    fitted, reduced = pretrain.DEFAULT_TRAIN.fitted(512, epoch_samples=400)
    assert fitted.global_batch_size == 512  # three trillion tokens take any batch
    assert not reduced
    assert TrainArgs(global_batch_size=512).given


def test_every_setting_of_the_help_is_explained() -> None:
    import inspect

    from litgpt.signature import documentation

    _, _, words = documentation(pretrain.main)
    assert set(words) == set(inspect.signature(pretrain.main).parameters)


def test_a_text_shorter_than_the_context_makes_shorter_rows(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    short = tmp_path / "short.txt"
    short.write_text("the river ran past the mill and the mill ran past the river")
    data = TextFiles(short, cache_dir=tmp_path / "cache")
    with pytest.raises(InputError, match="max_seq_length"):  # a length that was given is kept or refused
        runs.run(folder, tmp_path / "given", data=data, train={"max_seq_length": 64})
    runs.run(folder, tmp_path / "run", data=data, train={"max_seq_length": None, "max_steps": 2})
    assert "train.max_seq_length 64 -> " in capsys.readouterr().out
    assert (tmp_path / "run" / "final" / "config.json").is_file()


def test_a_model_of_ones_own_keeps_its_name_and_is_continued_by_it(folder: Path, tmp_path: Path) -> None:
    mine = shrunk("pythia-14m", name="", hf_config={})
    runs.run(folder, tmp_path / "one", model_name="mine", model_config=mine, train=SHORT)
    final = tmp_path / "one" / "final"
    assert Config.from_checkpoint(final).name == "mine"
    runs.run(folder, tmp_path / "two", model_name="mine", model_config=None, initial_checkpoint_dir=final, train=SHORT)


def test_a_mix_that_no_family_has_is_said_before_it_is_trained(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mix = shrunk("pythia-14m", norm_class_name="RMSNorm", family="")
    runs.run(folder, tmp_path / "run", model_config=mix, train=SHORT)
    assert "LitGPT alone will open it" in capsys.readouterr().out
    assert not (tmp_path / "run" / "final" / "config.json").exists()
    assert checkpoint.load_model(tmp_path / "run" / "final").config.norm_class_name == "RMSNorm"


def test_a_run_whose_time_was_over_goes_on_when_it_gets_more(folder: Path, tmp_path: Path) -> None:
    out_dir = tmp_path / "run"
    runs.run(folder, out_dir, train={"max_time": 1e-6, "save_interval": 0})
    assert [path.name for path in out_dir.glob("step-*")] == ["step-00000001"]
    runs.run(folder, out_dir, train={"max_time": 600.0, "save_interval": 0}, resume="auto")
    whole = runs.run(folder, tmp_path / "whole", train={"save_interval": 0})
    assert runs.tensor_bytes(out_dir / "final") == runs.tensor_bytes(whole / "final")
