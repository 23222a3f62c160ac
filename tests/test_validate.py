"""`litgpt validate`: a sound directory is described, a broken one is named in one line with exit status 2."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from litgpt import adapters, checkpoint, cli, storage
from litgpt.commands import COMMANDS
from litgpt.methods.base import Method
from litgpt.scripts import convert_to_litgpt, validate
from tests.makers import methods as method_makers
from tests.makers.checkpoints import CONFIGS, edit_json, make_hf_checkpoint, make_litgpt_checkpoint, random_gpt
from tests.makers.configs import shrunk
from tests.makers.tokenizers import train_tiny_tokenizer
from tests.test_house import loaded_by
from tests.test_weights import hf_files

LLAMA = "Llama-2-7b-hf"


@pytest.fixture(autouse=True)
def quiet(capsys):
    yield
    capsys.readouterr()


def make(directory: Path, kind: str = "ours") -> Path:
    """A sound checkpoint with a tokenizer."""
    config = shrunk(LLAMA)
    if kind == "hf":
        make_hf_checkpoint(directory, config, max_shard_size="20KB")
    elif kind == "lit":
        make_litgpt_checkpoint(directory, config)
    else:
        tokenizer = train_tiny_tokenizer(directory.with_name("tokenizer"), 96)
        return checkpoint.write(directory, config, random_gpt(config), tokenizer_dir=tokenizer)
    train_tiny_tokenizer(directory, 96)
    return directory


def report(directory: Path, capsys, **options) -> str:
    capsys.readouterr()
    validate.main(directory, **options)
    return capsys.readouterr().out


def refusal(directory: Path, capsys) -> str:
    """The line with which the command line refuses a directory."""
    capsys.readouterr()
    assert cli.main(["validate", str(directory)]) == 2
    out, line = capsys.readouterr()
    assert not out
    assert line.startswith("error: ")
    assert line.count("\n") == 1
    return line


# -------------------------------------------------------------------------------------------------------------- sound


@pytest.mark.parametrize("name", CONFIGS)
def test_every_family_is_described(tmp_path, name, capsys):
    source = make_hf_checkpoint(tmp_path / "hf", CONFIGS[name])
    text = report(source, capsys)
    count = sum(parameter.numel() for parameter in random_gpt(CONFIGS[name]).parameters())
    assert f"{CONFIGS[name].family} (hf)" in text
    assert f"{count:,} (" in text
    assert "convert_to_litgpt" in text


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (
            "ours",
            ["Hugging Face directory, every sha256 as listed", "in 1 file(s)", "litgpt chat", "convert_to_litgpt"],
        ),
        ("hf", ["Hugging Face directory, no list of checksums", " file(s)", "litgpt generate"]),
        ("lit", ["LitGPT 0.5's lit_model.pth", "(Llama-2-7b-hf)", "convert_from_litgpt"]),
    ],
)
def test_a_sound_directory_is_described_and_left_as_it_is(tmp_path, kind, words, capsys):
    source = make(tmp_path / "in", kind)
    before = {p.name: p.stat().st_mtime_ns for p in source.rglob("*")}
    text = report(source, capsys)
    for word in [*words, "64 tokens", "96 tokens, ends with id 0", "float32 ", "bfloat16 ", "free here"]:
        assert word in text
    assert ("convert_to_litgpt" in text) == (kind != "lit")
    assert {p.name: p.stat().st_mtime_ns for p in source.rglob("*")} == before


def test_prompt_style_and_training_memory_are_told_where_asked(tmp_path, capsys):
    source = make(tmp_path / "in", "lit")
    (source / "prompt_style.yaml").write_text("class_path: litgpt.prompts.Alpaca\n")
    assert "alpaca" in report(source, capsys)
    assert "memory to train" not in report(source, capsys)
    assert "memory to train  float32" in report(source, capsys, training=True)
    assert "memory to train  float16" in report(source, capsys, training=True, dtype="float16")


def test_a_training_checkpoint_tells_what_it_is_good_for(tmp_path, capsys):
    def train(new: Path) -> None:
        checkpoint.save_training_state(new, {"state.0": torch.ones(3)}, {"step": 7})

    config = shrunk(LLAMA)
    step = checkpoint.write(tmp_path / "step-00000007", config, random_gpt(config), extra=train)
    text = report(step, capsys)
    assert "with the state of a training run" in text
    assert f"convert_pretrained_checkpoint {step}" in text
    assert f"--resume {step}" in text
    assert "litgpt chat" not in text  # no tokenizer
    assert "tokenizer  " in text
    assert "none (put tokenizer.json" in text
    state = next((step / "training_state").glob("*.safetensors"))
    flip(state)
    assert state.name in refusal(step, capsys)


def adapted(home: Path, method: Method, **more) -> Path:
    """What a finetuning with `method` leaves beside its base, `home/base`."""
    base = make(home / "base")
    model = method_makers.finetuned(shrunk(LLAMA), method)
    return adapters.write(home / "final", shrunk(LLAMA), method, model, base=base, merged=False, **more)


@pytest.mark.parametrize("name", ["lora", "dora", "adapter", "adapter_v2"])
def test_an_adapter_is_sound_with_its_base(tmp_path, name, capsys):
    def train(new: Path) -> None:
        facts = {"method.name": name, "checkpoint_dir": "base"}
        checkpoint.save_training_state(new, {"state.0": torch.ones(3)}, {"facts": facts, "complete": False})

    final = adapted(tmp_path, method_makers.METHODS[name], extra=train)
    text = report(final, capsys)
    assert f"kind           adapter ({name.replace('dora', 'lora')})" in text
    assert f"base model     {tmp_path / 'base'} (Hugging Face directory" in text
    assert f"litgpt chat {final}\n" in text
    assert f"finetune_{name} ... --resume {final}" in text
    assert ("merge_lora" in text) == (name in ("lora", "dora"))
    inside = report(final / "adapter", capsys)  # the same, said of the adapter's own directory
    assert inside.splitlines()[1:6] == text.splitlines()[1:6]


def test_an_adapter_that_does_not_hold_together_with_its_base_is_named(tmp_path, capsys):
    final = adapted(tmp_path, method_makers.METHODS["adapter"])
    file = final / "adapter" / "litgpt_adapter.safetensors"
    whole = file.read_bytes()
    flip(file)
    assert file.name in refusal(final, capsys)
    (final / "litgpt_manifest.json").unlink()
    file.write_bytes(whole)
    tensors = load_file(file)
    save_file({name: tensor * torch.nan for name, tensor in tensors.items()}, file)
    assert "NaN" in refusal(final, capsys)
    save_file({name: tensor[..., :1].clone() for name, tensor in tensors.items()}, file)
    assert "adapter" in refusal(final, capsys)
    file.write_bytes(whole)
    flip(tmp_path / "base" / "model.safetensors")
    assert str(tmp_path / "base" / "model.safetensors") in refusal(final, capsys)
    (tmp_path / "base").rename(tmp_path / "moved")
    assert f"{tmp_path / 'base'}" in refusal(final, capsys)


@pytest.mark.parametrize("action", ["validate", *(name for name in COMMANDS if name.startswith("convert_"))])
def test_help_comes_without_torch(action):
    assert "torch" not in loaded_by(f"from litgpt.cli import main; assert main(['{action}', '--help']) == 0")


def test_the_options_of_0_5_are_taken(tmp_path, capsys):
    source = make(tmp_path / "in")
    line = ["validate", str(source), "--model_filename", "x.pth", "--dtype", "bfloat16", "--training", "true"]
    assert cli.main(line) == 0
    assert "model_filename has no effect any more" in capsys.readouterr().err
    assert cli.main(["validate", str(source), "--dtype", "bf16"]) == 2
    assert "did you mean 'bfloat16'" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------------- broken


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "model_config.yaml", "config.json"])
def test_a_flipped_bit_is_named_by_its_file(tmp_path, name, capsys):
    source = make(tmp_path / "in")
    flip(source / name)
    assert f"{source / name} is damaged" in refusal(source, capsys)


def test_a_flipped_bit_in_lit_model_pth_is_named_without_a_manifest(tmp_path, capsys):
    source = make(tmp_path / "in", "lit")
    flip(source / "lit_model.pth")
    assert f"{source / 'lit_model.pth'} is damaged: its record" in refusal(source, capsys)
    source = make(tmp_path / "both")
    convert_to_litgpt.main(source)
    report(source, capsys)
    flip(source / "lit_model.pth")
    assert f"{source / 'lit_model.pth'} is damaged: its record" in refusal(source, capsys)


def put(directory: Path, name: str, value: torch.Tensor | None) -> None:
    """Changes, adds or removes (None) a tensor of a Hugging Face directory of one file."""
    from safetensors.torch import save_file

    tensors = hf_files(directory) | ({} if value is None else {name: value})
    save_file({n: t for n, t in tensors.items() if value is not None or n != name}, directory / "model.safetensors")


NORM = "model.norm.weight"


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (torch.full((32,), torch.nan), f"1 of its tensors with NaN or infinite numbers: {NORM} in "),
        (torch.tensor([1.0] * 31 + [-torch.inf]), f"{NORM} in "),
        (torch.ones(31), f"1 of another shape: {NORM} (31,) instead of (32,)"),
        (None, f"1 missing: {NORM}"),
    ],
    ids=["nan", "inf", "shape", "missing"],
)
def test_a_bad_tensor_is_named(tmp_path, value, words, capsys):
    source = make_hf_checkpoint(tmp_path / "hf", shrunk(LLAMA))
    put(source, NORM, value)
    assert words in refusal(source, capsys)


def test_many_bad_tensors_are_counted(tmp_path, capsys):
    source = make(tmp_path / "in", "lit")
    state = torch.load(source / "lit_model.pth", weights_only=True)
    torch.save({name: tensor * torch.nan for name, tensor in state.items()}, source / "lit_model.pth")
    line = refusal(source, capsys)
    assert f"{len(state)} of its tensors" in line
    assert f"and {len(state) - 3} more" in line


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json"])
def test_truncated_and_missing_files_are_named(tmp_path, name, capsys):
    source = make(tmp_path / "in")
    os.truncate(source / name, 100)
    assert f"{source / name} is damaged: expected" in refusal(source, capsys)
    (source / name).unlink()
    assert f"{source / name} is missing" in refusal(source, capsys)
    (source / storage.MANIFEST).unlink()
    (source / name).write_bytes(b"{")
    assert name in refusal(source, capsys)


def test_a_missing_shard_and_an_index_that_leads_out_are_named(tmp_path, capsys):
    source = make(tmp_path / "in", "hf")
    gone = sorted(source.glob("model-*.safetensors"))[0]
    gone.unlink()
    assert f"{gone} is missing" in refusal(source, capsys)
    named = json.loads((source / "model.safetensors.index.json").read_text())["weight_map"]
    edit_json(source / "model.safetensors.index.json", weight_map=dict.fromkeys(named, "../../secret"))
    assert "'../../secret' leads out of this directory and was not opened" in refusal(source, capsys)


def test_a_tokenizer_of_another_model_is_refused(tmp_path, capsys):
    source = make(tmp_path / "in", "hf")
    train_tiny_tokenizer(source, 300)
    assert "the tokenizer has ids up to 299, but the model has rows for 128 tokens only" in refusal(source, capsys)


def test_a_broken_chat_template_is_named(tmp_path, capsys):
    source = make(tmp_path / "in", "hf")
    (source / "chat_template.jinja").write_text("{% for %}")
    assert "template" in refusal(source, capsys)


def test_config_files_that_disagree_are_named(tmp_path, capsys):
    source = make(tmp_path / "in")
    (source / storage.MANIFEST).unlink()
    edit_json(source / "config.json", num_hidden_layers=3)
    assert "n_layer is 2, but config.json beside it says 3" in refusal(source, capsys)


@pytest.mark.parametrize("gone", ["config.json", "model.safetensors"])
def test_what_is_missing_is_said_with_the_command_that_makes_it(tmp_path, gone, capsys):
    source = make(tmp_path / "in")
    for name in (gone, storage.MANIFEST, "model_config.yaml"):
        (source / name).unlink()
    line = refusal(source, capsys)
    assert "litgpt download" in line
    assert ("config.json is missing" if gone == "config.json" else "has no weights") in line


def test_an_adapter_without_its_base_and_a_path_that_is_not_there_are_refused(tmp_path, capsys):
    source = make(tmp_path / "in", "lit")
    shutil.move(source / "lit_model.pth", source / "lit_model.pth.lora")
    assert "base model of this adapter is not written down" in refusal(source, capsys)
    assert "no checkpoint at" in refusal(tmp_path / "nothing", capsys)
