"""The tutorial on finetuning: what it says to type is typed, on a tiny model, and what it says is looked up."""

from __future__ import annotations

import io
import json
import re
import shlex
from pathlib import Path

import pytest
import torch

from litgpt import estimate
from litgpt.cli import main
from litgpt.config import Config
from litgpt.methods.lora import LoRA
from tests.makers import runs
from tests.makers.checkpoints import make_hf_checkpoint
from tests.makers.configs import shrunk
from tests.makers.tokenizers import train_tiny_tokenizer

PAGE = (Path(__file__).parents[1] / "tutorials" / "finetune.md").read_text()
TRAINING = "--train.max_steps 2 --train.global_batch_size 2 --train.max_seq_length 48 --eval.max_new_tokens 2"
SHORTER = {"preview_data": "--num_samples 1", "generate": "--max_new_tokens 2", "chat": "--max_new_tokens 2"}


def blocks(language: str) -> list[str]:
    return re.findall(rf"<!-- tested -->\n```{language}\n(.*?)```", PAGE, re.DOTALL)


def test_the_tutorial_leads_from_records_to_chat_transformers_and_peft(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    train_tiny_tokenizer(tmp_path / "tokenizer", 96)
    base = tmp_path / "checkpoints" / "HuggingFaceTB" / "SmolLM2-135M-Instruct"
    make_hf_checkpoint(base, shrunk("SmolLM2-135M-Instruct", block_size=512), tokenizer_dir=tmp_path / "tokenizer")
    (tmp_path / "my.json").write_text(json.dumps(runs.made_records(12)))
    typed = "".join(blocks("bash")).splitlines()
    assert len(typed) == 6
    for line in typed:
        monkeypatch.setattr("sys.stdin", io.StringIO(""))
        words = shlex.split(line)[1:]
        more = TRAINING if words[0].startswith("finetune") else SHORTER[words[0]]
        assert main([*words, *shlex.split(more)]) == 0, (line, capsys.readouterr().err)
    names: dict[str, object] = {}
    for code in blocks("python"):
        exec(code, names)
    ids = torch.tensor([[1, 5, 9, 20]])
    with torch.no_grad():
        merged, adapted = (names[name](ids).logits for name in ("model", "adapted"))  # type: ignore[operator]
    torch.testing.assert_close(merged, adapted, rtol=1e-4, atol=1e-4)


def test_the_table_of_memory_is_what_the_plan_would_say() -> None:
    rows = re.findall(r"^\| (\S+) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|$", PAGE, re.MULTILINE)
    assert len(rows) == 5
    for name, *figures in rows:
        config = Config.from_name(name)
        small = {"trainable": LoRA().trained(config)}
        quantized = {**small, "quantize": "bnb.nf4"}
        settings: list[dict] = [{}, small, quantized, {**quantized, "checkpointed": True}]
        for figure, changes in zip(figures, settings, strict=True):
            memory = estimate.training_memory(config, 1, 1024, "bf16-true", accelerator="cuda", **changes)
            assert f"{memory.total / 1e9:.1f}" == figure, name


@pytest.mark.parametrize("command", ["lora", "full", "adapter", "adapter_v2"])
def test_every_option_the_tutorial_names_is_one_of_a_finetuning_command(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    options = set(re.findall(r"--([\w.]+)", PAGE.partition("## Options")[2].partition("## Recipes")[0]))
    assert main([f"finetune_{command}", "--data", "JSON", "--help"]) == 0
    known = set(re.findall(r"--([\w.]+)", capsys.readouterr().out))
    assert {o for o in options if not o.startswith(("optimizer.", "data."))} <= known
