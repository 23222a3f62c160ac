"""`litgpt preview_data`: what is shown is what is trained on, and a terminal obeys none of it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from litgpt import cli
from litgpt.config import Config
from litgpt.scripts import preview_data
from tests.makers.configs import shrunk
from tests.makers.tokenizers import train_tiny_tokenizer

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A checkpoint without weights: config and tokenizer alone."""
    directory = train_tiny_tokenizer(tmp_path_factory.mktemp("model"))
    config = shrunk("pythia-14m", block_size=128, vocab_size=300, padded_vocab_size=320)
    (directory / "config.json").write_text(json.dumps(config.to_hf()))
    assert Config.from_checkpoint(directory).block_size == 128
    return directory


def written(path: Path, answers: list[str]) -> Path:
    path.write_text(json.dumps([{"instruction": f"Say {i}.", "output": answer} for i, answer in enumerate(answers)]))
    return path


def preview(capsys, model: Path, path: Path, *options: str) -> tuple[int, str, str]:
    given = ["--data", "JSON", "--data.json_path", str(path), "--data.val_split_fraction", "0", *options]
    status = cli.main(["preview_data", str(model), *given])
    out, err = capsys.readouterr()
    return status, out, err


def test_trained_tokens_stand_in_marks_and_special_ones_are_spelled(model, tmp_path, capsys):
    path = written(tmp_path / "my.json", ["Blue.", "Blue."])
    status, out, _ = preview(
        capsys, model, path, "--data.mask_prompt", "true", "--data.prompt_style", "phi-2", "--num_samples", "1"
    )
    assert status == 0
    assert "my.json: record " in out
    assert "]]" not in out.split("Output:")[0]
    assert "Output:[[Blue.<|endoftext|>]]\n" in out
    assert out.count("---") == 1
    assert "\x1b" not in out  # no colour where no terminal is


def test_without_masking_all_but_the_first_token_is_trained_on(model, tmp_path, capsys):
    _, out, _ = preview(capsys, model, written(tmp_path / "my.json", ["Blue."]), "--data.prompt_style", "default")
    assert "\nS[[ay 0.Blue.<|endoftext|>]]\n" in out


def test_the_statistics_count_what_is_cut_and_left_out(model, tmp_path, capsys):
    path = written(tmp_path / "my.json", ["Blue.", "Blue " * 99])
    options = ("--data.prompt_style", "default", "--train.max_seq_length", "50", "--num_samples", "0")
    _, out, _ = preview(capsys, model, path, *options)
    assert "2 to train on, 0 validate" in out
    assert "100%" not in out.split("padding")[0]
    assert "note: 1 of 2 training records are longer than train.max_seq_length 50; they are cut" in out
    status, out, err = preview(capsys, model, path, *options[:2], "--train.max_seq_length", "1")
    assert (status, out) == (2, "")
    assert "none of 2 records has anything to learn" in err


def test_what_a_finetune_would_refuse_is_said(model, tmp_path, capsys):
    status, out, _ = preview(capsys, model, written(tmp_path / "my.json", ["Blue " * 99]))
    assert status == 0
    assert "note: a finetune would refuse this: 1 of 1 records are longer than the model's context of 128 tokens" in out


def test_what_stops_a_preview_is_said_once(model, tmp_path, capsys):
    (tmp_path / "my.json").write_text('[{"instruction": "x"}]')
    status, out, err = preview(capsys, model, tmp_path / "my.json")
    assert (status, out, err.count("\n")) == (2, "", 1)


def test_a_terminal_gets_colour_and_no_command_of_the_data(model, tmp_path, capsys, monkeypatch):
    path = written(tmp_path / "my.json", ["\x1b]0;evil\x07Blue.\tSky"])
    monkeypatch.setattr(preview_data.sys.stdout, "isatty", lambda: True)
    options = ("--data.mask_prompt", "true", "--data.prompt_style", "default")
    _, out, _ = preview(capsys, model, path, *options)
    assert "\x1b[32m[[\ufffd]0;evil\ufffdBlue.\tSky<|endoftext|>]]\x1b[0m" in out
    assert out.count("\x1b") == 2


def test_pretraining_data_and_missing_data_are_refused(model, tmp_path, capsys):
    assert cli.main(["preview_data", str(model)]) == 2
    assert "--data JSON" in capsys.readouterr().err
    (tmp_path / "a.txt").write_text("words")
    assert cli.main(["preview_data", str(model), "--data", "TextFiles", "--data.train_data_path", str(tmp_path)]) == 2
    assert "for pretraining" in capsys.readouterr().err


def test_a_directory_without_config_or_none_at_all_is_one_line(model, tmp_path, capsys):
    path = written(tmp_path / "my.json", ["Blue."])
    status, _, err = preview(capsys, tmp_path / "nowhere", path)
    assert (status, err.count("\n")) == (2, 1)
    shutil.copytree(model, tmp_path / "bare", ignore=shutil.ignore_patterns("config.json"))
    assert preview(capsys, tmp_path / "bare", path)[0] == 2


def test_a_preview_of_parts_that_are_files_loads_no_torch(model, tmp_path):
    written(tmp_path / "train.json", ["Blue."]), written(tmp_path / "val.json", ["Red."])
    arguments = ["preview_data", str(model), "--data", "JSON", "--data.json_path", str(tmp_path)]
    code = f"import sys; from litgpt import cli; assert not cli.main({arguments!r}); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True).returncode == 0


def test_help_has_the_words_of_options_that_all_finetuning_data_has(capsys):
    assert cli.main(["preview_data", "--data", "JSON", "--help"]) == 0
    out = capsys.readouterr().out
    assert "--data.packing true|false       Lay several records into one row" in out
    assert "--data.prompt_style TEXT  " in out
