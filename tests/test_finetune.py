"""The finetuning commands from words to a result: every method on one loop, exact, resumable, for others to open."""

from __future__ import annotations

import math
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from litgpt import adapters, checkpoint, estimate, job, storage
from litgpt.errors import DivergedError, InputError, MachineError
from litgpt.prompts.base import PromptStyle
from litgpt.tokenizer import Tokenizer
from tests.makers import runs
from tests.makers.checkpoints import edit_json

METHODS = runs.METHODS


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("material")
    torch.set_num_threads(1)
    runs.finetuning_material(folder)
    return folder


@pytest.fixture(scope="module")
def finished(folder: Path) -> dict[str, Path]:
    """A run of each method to its end."""
    return {method: runs.run(folder, folder / method, method=method) for method in METHODS}


def logits(directory: Path) -> torch.Tensor:
    with torch.no_grad():
        return adapters.load_model(directory)(torch.arange(20).view(1, -1))


# What comes of it -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_the_loss_falls_and_the_result_is_a_model(method: str, finished: dict[str, Path], folder: Path) -> None:
    rows = runs.losses(finished[method])
    assert len(rows) == runs.STEPS
    validated = [float(row["val_loss"]) for row in rows if row["val_loss"]]
    assert validated == sorted(validated, reverse=True)
    changed = logits(finished[method] / "final") - logits(folder / "base")
    assert changed.abs().max() > 1e-3


def test_a_merged_model_its_adapter_and_peft_agree(finished: dict[str, Path], folder: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    final, ids = finished["lora"] / "final", torch.arange(20).view(1, -1)
    base = AutoModelForCausalLM.from_pretrained(folder / "base")
    with torch.no_grad():
        through_peft = PeftModel.from_pretrained(base, final / "adapter").eval()(ids).logits
        merged = AutoModelForCausalLM.from_pretrained(final)(ids).logits
    ours = logits(final)[..., : merged.size(-1)]
    torch.testing.assert_close(ours, merged, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours, through_peft, rtol=1e-4, atol=1e-5)


def test_merge_false_leaves_the_adapter_alone(finished: dict[str, Path], folder: Path, tmp_path: Path) -> None:
    runs.run(folder, tmp_path / "run", method="lora", merge=False)
    assert not list((tmp_path / "run" / "final").glob("model*.safetensors"))
    torch.testing.assert_close(logits(tmp_path / "run" / "final"), logits(finished["lora"] / "final"))


@pytest.mark.parametrize("method", METHODS)
def test_what_a_run_leaves_on_its_way_is_a_model_too(method: str, finished: dict[str, Path]) -> None:
    early, late = (logits(finished[method] / name) for name in ("step-00000004", "step-00000012"))
    assert not torch.equal(early, late)
    torch.testing.assert_close(late, logits(finished[method] / "final"), rtol=1e-4, atol=1e-5)


def test_the_way_prompts_were_written_is_kept(finished: dict[str, Path]) -> None:
    for method in METHODS:
        saved = finished[method] / "final"
        assert (saved / "prompt_style.yaml").is_file()
        assert (saved / "tokenizer.json").is_file()
        assert "access_token" not in (saved / "hyperparameters.yaml").read_text()


# Law 8 ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_a_killed_run_goes_on_as_if_it_had_not_been(
    method: str, finished: dict[str, Path], folder: Path, tmp_path: Path
) -> None:
    out_dir = tmp_path / "run"
    for step in (5, 9):
        assert runs.run_and_signal(signal.SIGKILL, step, folder, out_dir, method=method, resume="auto") == -9
    runs.run(folder, out_dir, method=method, resume="auto")
    assert runs.losses(out_dir) == runs.losses(finished[method])
    for name in ("final", "step-00000004", "step-00000008", "step-00000012"):
        assert runs.tensor_bytes(out_dir / name) == runs.tensor_bytes(finished[method] / name), name


def test_a_terminated_run_saves_the_last_whole_step(finished: dict[str, Path], folder: Path, tmp_path: Path) -> None:
    assert runs.run_and_signal(signal.SIGTERM, 6, folder, tmp_path / "run", method="lora") == 143
    runs.run(folder, tmp_path / "run", method="lora", resume=True)
    assert runs.losses(tmp_path / "run") == runs.losses(finished["lora"])


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"lora_r": 4}, "method.r 8 -> 4"),
        ({"seed": 1}, "seed 1337 -> 1"),
        ({"train": {"micro_batch_size": 1}}, "train.micro_batch_size 2 -> 1"),
    ],
)
def test_other_settings_are_not_resumed(
    change: dict[str, Any], named: str, finished: dict[str, Path], folder: Path
) -> None:
    with pytest.raises(InputError, match=named):
        runs.run(folder, finished["lora"], method="lora", resume=True, **change)


@pytest.mark.parametrize("has_manifest", [True, False])
def test_the_frozen_weights_are_those_the_run_began_with(has_manifest: bool, folder: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(folder / "base", base)
    (base / "litgpt_manifest.json").unlink(missing_ok=True)
    if has_manifest:
        storage.seal(base)
    changed = {"train": {"max_steps": 2, "lr_warmup_steps": 0, "save_interval": 1}, "checkpoint_dir": base}
    runs.run(folder, tmp_path / "run", method="lora", **changed)
    tensors = load_file(base / "model.safetensors")
    save_file({name: tensor * 1.01 for name, tensor in tensors.items()}, base / "model.safetensors")
    if has_manifest:
        storage.seal(base)
    with pytest.raises(InputError, match="base_weights"):
        runs.run(folder, tmp_path / "run", method="lora", resume=True, **changed)


def test_a_finished_run_is_left_as_it_is(
    finished: dict[str, Path], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = runs.tensor_bytes(finished["lora"])
    runs.run(folder, finished["lora"], method="lora", resume="auto")
    assert "already complete" in capsys.readouterr().out
    assert runs.tensor_bytes(finished["lora"]) == before


# The loop's abilities -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["lora", "full", "adapter"])
def test_blocks_computed_again_change_nothing(
    method: str, finished: dict[str, Path], folder: Path, tmp_path: Path
) -> None:
    runs.run(folder, tmp_path / "run", method=method, train={"gradient_checkpointing": True})
    assert runs.losses(tmp_path / "run") == runs.losses(finished[method])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("packing", [True, False])
def test_the_same_samples_are_the_same_run_however_they_lie_in_rows(
    method: str, packing: bool, folder: Path, tmp_path: Path
) -> None:
    plain = {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.5}}
    same: dict[str, Any] = {"method": method, "optimizer": plain} | ({"lora_dropout": 0.0} if method == "lora" else {})
    cut = {"max_steps": 3, "save_interval": 0}
    data = runs.finetuning_material(folder)["data"]
    whole = runs.run(folder, tmp_path / "whole", train={**cut, "micro_batch_size": 6}, **same)
    other = runs.JSON(data.json_path, val_split_fraction=0.2, prompt_style="default", packing=packing)
    rows = runs.run(folder, tmp_path / "rows", train={**cut, "micro_batch_size": 1}, data=other, **same)
    for one, two in zip(runs.losses(whole), runs.losses(rows), strict=True):
        assert float(one["loss"]) == pytest.approx(float(two["loss"]), rel=1e-5)
        assert float(one["grad_norm"]) == pytest.approx(float(two["grad_norm"]), rel=1e-4)
    torch.testing.assert_close(logits(whole / "final"), logits(rows / "final"), rtol=1e-4, atol=1e-5)


def test_the_best_is_kept_and_a_run_that_gets_no_better_ends(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    evaluation = {"interval": 1, "keep_best": True, "patience": 2, "max_iters": None}
    runaway = {"class_path": "torch.optim.SGD", "init_args": {"lr": 30.0}}
    out_dir = runs.run(folder, tmp_path / "run", method="lora", eval=evaluation, optimizer=runaway)
    found = [float(row["val_loss"]) for row in runs.losses(out_dir)]
    assert "no lower validation loss in 2 validations (eval.patience)" in capsys.readouterr().out
    best = found.index(min(found))
    assert len(found) == best + 3 < runs.STEPS
    assert not torch.equal(logits(out_dir / "best"), logits(out_dir / "final"))
    runs.run(folder, out_dir, method="lora", eval=evaluation, optimizer=runaway, resume="auto")  # complete
    assert len(runs.losses(out_dir)) == best + 3


def test_an_example_is_answered_at_each_validation_and_changes_nothing(
    finished: dict[str, Path], folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    runs.run(folder, tmp_path / "run", method="lora", eval={"max_new_tokens": 4})
    captured = capsys.readouterr()
    assert (captured.out + captured.err).count("example:") == 3
    assert runs.losses(tmp_path / "run") == runs.losses(finished["lora"])


def test_an_example_tells_the_terminal_nothing_to_do(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(job, "answer", lambda *_: "\x1b[2J")
    runs.run(
        folder,
        tmp_path / "run",
        method="lora",
        train={"max_steps": 1, "lr_warmup_steps": 0},
        eval={"max_new_tokens": 4},
    )
    captured = capsys.readouterr()
    assert "\\x1b[2J" in captured.out + captured.err
    assert "\x1b[2J" not in captured.out + captured.err


def test_an_example_ends_where_the_prompt_style_says(folder: Path) -> None:
    class Ends(PromptStyle):
        def stop_tokens(self, tokenizer: Tokenizer) -> list[list[int]]:
            return [[i] for i in range(tokenizer.vocab_size)]

    runs.finetuning_material(folder)
    model = checkpoint.load_model(folder / "base")
    assert job.answer(model, [1, 2], folder / "base", 4, None)
    assert job.answer(model, [1, 2], folder / "base", 4, Ends()) == ""


def test_the_plan_says_what_will_be_trained(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs.run(folder, tmp_path / "run", method="lora", train={"max_steps": 1, "lr_warmup_steps": 0})
    said = capsys.readouterr().out
    for words in ("lora trains", "memory", "steps", "tokens", "next:", "peak memory", "picture of the losses"):
        assert words in said
    assert "--prompt 'Say " in said  # a question of the data


@pytest.mark.parametrize("method", METHODS)
def test_numbers_that_break_stop_the_run_and_leave_the_last_good_weights(
    method: str, folder: Path, tmp_path: Path
) -> None:
    wild = {"class_path": "torch.optim.SGD", "init_args": {"lr": 1e30}}
    with pytest.raises(DivergedError):
        runs.run(folder, tmp_path / "run", method=method, optimizer=wild, train={"save_interval": 1, "max_norm": None})
    for kept in (tmp_path / "run").glob("step-*"):
        assert logits(kept).isfinite().all()


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_base_that_was_broken_before_is_said_to_be(method: str, folder: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(folder / "base", base)
    tensors = load_file(base / "model.safetensors")
    tensors["gpt_neox.final_layer_norm.weight"][3] = math.nan
    save_file(tensors, base / "model.safetensors")
    with pytest.raises(DivergedError, match=r"began with are not finite in .*ln_f\.weight.*litgpt validate"):
        runs.run(folder, tmp_path / "run", method=method, checkpoint_dir=base)


# What is refused ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"data": None}, "data is missing"),
        ({"lora_r": 0}, "lora_r"),
        ({"lora_query": False, "lora_value": False}, "lora"),
        ({"lora_dropout": 1.5}, "lora_dropout"),
        ({"train": {"tie_embeddings": True}}, "tie_embeddings"),
        ({"eval": {"max_new_tokens": 2, "evaluate_example": 99}}, "evaluate_example is 99; records 0 to"),
        ({"train": {"max_seq_length": 65}}, "max_seq_length 65 .*64"),
        ({"checkpoint_dir": Path("no/such/model/anywhere")}, "no checkpoint"),
    ],
)
def test_wrong_words_are_refused_before_anything_is_written(
    changes: dict[str, Any], words: str, folder: Path, tmp_path: Path
) -> None:
    with pytest.raises((InputError, FileNotFoundError), match=words):
        runs.run(folder, tmp_path / "run", method="lora", **changes)
    assert not (tmp_path / "run").exists()


def test_memory_is_reckoned_for_the_rows_there_are_not_for_the_longest_there_could_be(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = tmp_path / "base"
    shutil.copytree(folder / "base", base)
    edit_json(base / "config.json", max_position_embeddings=10**6)
    (base / "litgpt_manifest.json").unlink(missing_ok=True)
    monkeypatch.setattr("litgpt.launch.available_memory", lambda: 50 * 10**6)
    once = {"max_steps": 1, "lr_warmup_steps": 0, "max_seq_length": None}
    runs.run(folder, tmp_path / "run", method="lora", checkpoint_dir=base, train=once)
    with pytest.raises(MachineError, match="max_seq_length 1000000"):
        runs.run(folder, tmp_path / "other", method="lora", checkpoint_dir=base, train=once | {"max_seq_length": 10**6})


def test_an_adapter_is_no_model_to_finetune_and_the_line_says_what_to_do(
    folder: Path, finished: dict[str, Path], tmp_path: Path
) -> None:
    for method, words in (("lora", "litgpt merge_lora .*step-00000004"), ("adapter_v2", "finetune its base model /")):
        with pytest.raises(InputError, match=rf"is an adapter \({method}\).*{words}"):
            runs.run(folder, tmp_path / "run", method="lora", checkpoint_dir=finished[method] / "step-00000004")


def test_the_state_of_another_method_is_refused_even_when_a_change_was_allowed(
    folder: Path, finished: dict[str, Path], tmp_path: Path
) -> None:
    shutil.copytree(finished["full"] / "step-00000004", tmp_path / "run" / "step-00000004")
    with pytest.raises(InputError, match="which this run does not train"):
        runs.run(folder, tmp_path / "run", method="lora", resume="auto", allow_change=["method", "base_weights"])


def test_a_script_may_call_a_command_with_any_argv(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["notebook", "-f", "kernel.json"])
    runs.run(folder, tmp_path / "run", method="adapter", train={"max_steps": 2})
    assert sys.argv == ["notebook", "-f", "kernel.json"]


@pytest.mark.parametrize(
    ("mode", "words"), [("torchao.int8", "for inference"), ("bnb.int8", "bnb.int8-training"), ("bnb.nf", "bnb.nf4")]
)
def test_a_program_that_asks_for_a_mode_that_does_not_train_is_told(mode, words, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=words):
        runs.run(folder, tmp_path / "run", method="lora", quantize=mode)
    assert not (tmp_path / "run").exists()


def test_a_base_in_4_bits_is_finetuned_in_the_memory_of_4_bits(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, estimated = set(), estimate.training_memory
    monkeypatch.setattr(estimate, "training_memory", lambda *a, **k: asked.add(k["quantize"]) or estimated(*a, **k))
    out_dir = runs.run(folder, tmp_path / "run", method="lora", quantize="bnb.nf4", train={"max_steps": 3})
    assert (logits(out_dir / "final") - logits(folder / "base")).abs().max() > 1e-3
    assert asked == {"bnb.nf4"}
    quantized = adapters.load_model(out_dir / "final" / "adapter", quantize="bnb.nf4")
    with torch.no_grad():
        apart = quantized(torch.arange(20).view(1, -1))
    torch.testing.assert_close(apart, logits(out_dir / "final"), rtol=1e-3, atol=1e-3)
