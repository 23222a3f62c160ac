"""Every command's output is an input of every command that its kind allows: one long chain through all of them."""

import io
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from litgpt import cli
from litgpt.checkpoint import load_model
from tests.makers.configs import shrunk
from tests.makers.tokenizers import TEXT

IDS = torch.arange(3, 19).unsqueeze(0)


def litgpt(*words: object) -> None:
    assert cli.main([str(word) for word in words]) == 0, words


def logits(directory: Path) -> torch.Tensor:
    with torch.no_grad():
        return load_model(directory, dtype=torch.float32).eval()(IDS)


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.md").write_text(TEXT * 60)
    return tmp_path


@pytest.mark.parametrize("name", ["pythia-14m", "Llama-3.2-1B", "Gemma-2-2b"])
def test_a_chain_through_all_commands_keeps_the_model(home, name, monkeypatch, capsys):
    config = shrunk(name, vocab_size=300, padded_vocab_size=320)
    fields = [
        f"--model_config.{k}={v}"
        for k, v in config.to_dict().items()
        if isinstance(v, int | float | str | list) and v != ""
    ]
    quick = [
        "--train.max_steps=4",
        "--train.global_batch_size=2",
        "--train.micro_batch_size=2",
        "--train.lr_warmup_steps=1",
    ]
    text = ["--data", "TextFiles", "--data.train_data_path", "text", "--train.save_interval=2", "--devices=1"]

    litgpt("train_tokenizer", "text", "--out_dir", "tokenizer", "--vocab_size", 300)
    litgpt("pretrain", "mine", *fields, *text, *quick, "--tokenizer_dir", "tokenizer", "--out_dir", "one")
    litgpt("pretrain", "mine", *fields, *text, *quick, "--tokenizer_dir", "one/final",
           "--initial_checkpoint_dir", "one/final", "--out_dir", "two")  # fmt: skip
    final = Path("two/final")
    expected = logits(final)

    litgpt("validate", final)
    litgpt("convert_to_litgpt", final)
    litgpt("convert_from_litgpt", final, "--output_dir", "back")
    litgpt("convert_pretrained_checkpoint", "two/step-00000002", "--output_dir", "cut")
    Path("lit").mkdir()
    for file in ("lit_model.pth", "model_config.yaml", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(final / file, "lit")
    for directory in ("back", "lit"):
        torch.testing.assert_close(logits(Path(directory)), expected)
    for directory in (final, "back", "cut"):
        theirs = AutoModelForCausalLM.from_pretrained(directory)
        with torch.no_grad():
            torch.testing.assert_close(theirs(IDS).logits, logits(Path(directory)), atol=1e-4, rtol=1e-3)
    for directory in (final, "back", "cut", "lit", "two/step-00000002"):
        litgpt("validate", directory)
        litgpt("generate", directory, "--prompt", "The mill", "--max_new_tokens", 3)
        monkeypatch.setattr("sys.stdin", io.StringIO("The river\n"))
        litgpt("chat", directory, "--max_new_tokens", 3)
    capsys.readouterr()
