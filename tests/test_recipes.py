"""Every recipe parses and runs, with a tiny model and a little data put in; recipes of earlier versions do too."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from litgpt import data
from litgpt.cli import main
from litgpt.config import Config
from litgpt.report import read_metrics
from tests.makers import runs

HUB = Path(__file__).parent.parent / "config_hub"
PRETRAIN = sorted((HUB / "pretrain").glob("*.yaml"))
FINETUNE = sorted((HUB / "finetune").glob("*/*.yaml"))
TINY = {"n_layer": 2, "n_embd": 32, "n_head": 4, "n_query_groups": 4, "head_size": 8, "intermediate_size": 48}
SHORT = {"max_steps": 2, "global_batch_size": 2, "micro_batch_size": 1, "max_seq_length": 32}

# as it stood in a recipe of LitGPT 0.4 and before, down to keys that are gone
OLDER = """
checkpoint_dir: checkpoints/meta-llama/Llama-2-7b-hf
out_dir: out/finetune/qlora-llama2-7b
precision: bf16-true
quantize: bnb.nf4
devices: 1
num_nodes: 1
lora_r: 32
lora_alpha: 16
lora_dropout: 0.05
lora_query: true
lora_key: false
lora_value: true
lora_projection: false
lora_mlp: false
lora_head: false
data:
  class_path: litgpt.data.Alpaca2k
  init_args:
    mask_prompt: false
    val_split_fraction: 0.05
    prompt_style: alpaca
    ignore_index: -100
    seed: 42
    num_workers: 4
    download_dir: data/alpaca2k
train:
  save_interval: 200
  log_interval: 1
  global_batch_size: 8
  micro_batch_size: 2
  lr_warmup_steps: 10
  epochs: 4
  max_tokens: null
  max_steps: null
  max_seq_length: 512
  tie_embeddings: null
  learning_rate: 0.0002
  weight_decay: 0.0
  beta1: 0.9
  beta2: 0.95
  max_norm: null
  min_lr: 6.0e-05
eval:
  interval: 100
  max_new_tokens: 100
  max_iters: 100
logger_name: csv
seed: 1337
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("material")


def words(options: dict[str, Any]) -> list[str]:
    return [word for name, value in options.items() for word in (f"--{name}", str(value))]


def named(path: Path) -> str:
    return "/".join(path.relative_to(HUB).with_suffix("").parts)


# Pretraining ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", PRETRAIN, ids=named)
def test_every_recipe_runs_with_a_tiny_model_put_in(
    recipe: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    material = runs.material(folder)
    options = {
        "config": recipe,
        "out_dir": tmp_path / "run",
        "data": "TextFiles",
        "data.train_data_path": material["data"].train_data_path,
        "data.cache_dir": folder / "cache",
        "tokenizer_dir": material["tokenizer_dir"],
        "devices": 1,
        "logger_name": "csv",
        **{f"model_config.{name}": value for name, value in (TINY | {"padded_vocab_size": 96}).items()},
        **{f"train.{name}": value for name, value in SHORT.items()},
    }
    status = main(["pretrain", *words(options)])
    assert status == 0, capsys.readouterr().err
    assert Config.from_checkpoint(tmp_path / "run" / "final").n_layer == 2


@pytest.mark.parametrize("recipe", PRETRAIN, ids=named)
def test_every_recipe_says_what_it_is_for_and_how_to_run_it(recipe: Path) -> None:
    text = recipe.read_text()
    assert text.startswith("# ")
    assert f"litgpt pretrain --config config_hub/pretrain/{recipe.name}" in text
    assert {"model_name", "out_dir", "data", "train", "optimizer", "tokenizer_dir"} <= set(yaml.safe_load(text))


@pytest.mark.parametrize("recipe", [*PRETRAIN, *FINETUNE], ids=named)
def test_every_recipe_names_a_data_module_that_is_there(recipe: Path) -> None:
    chosen = yaml.safe_load(recipe.read_text())["data"]
    name = chosen if isinstance(chosen, str) else chosen["class_path"].rpartition(".")[2]
    assert hasattr(data, name)


# Finetuning -----------------------------------------------------------------------------------------------------------


def command(recipe: Path) -> str:
    return "finetune_full" if recipe.stem == "full" else "finetune_lora"


def put_in(folder: Path, out_dir: Path) -> dict[str, Any]:
    """What replaces a recipe's model, data and length."""
    material = runs.finetuning_material(folder)
    return {
        "checkpoint_dir": material["checkpoint_dir"],
        "out_dir": out_dir,
        "data": "JSON",
        "data.json_path": material["data"].json_path,
        "data.val_split_fraction": 0.2,
        "devices": 1,
        **{f"train.{name}": value for name, value in SHORT.items()},
        "eval.max_new_tokens": 2,
    }


def apart_from_what_is_put_in(recipe: Path) -> str:
    """What two recipes must agree in to be the same run once model and data are replaced, and two steps are taken."""
    settings = yaml.safe_load(recipe.read_text())
    for name in ("checkpoint_dir", "out_dir", "data", "devices"):
        settings.pop(name, None)
    for name in (*SHORT, "save_interval"):
        settings["train"].pop(name, None)
    del settings["eval"]["interval"]
    return command(recipe) + json.dumps(settings, sort_keys=True)


ALIKE = {apart_from_what_is_put_in(recipe): recipe for recipe in reversed(FINETUNE)}  # one recipe of each kind


@pytest.mark.parametrize("recipe", ALIKE.values(), ids=named)
def test_every_kind_of_finetuning_recipe_runs_with_a_tiny_model_put_in(
    recipe: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changes = put_in(folder, tmp_path / "run")
    if "falcon" not in recipe.parent.name:  # bfloat16 costs a second here each time
        changes["precision"] = "32-true"
    status = main([command(recipe), *words({"config": recipe, **changes})])
    assert status == 0, capsys.readouterr().err
    assert len(read_metrics(tmp_path / "run" / "logs" / "metrics.csv")) == 2
    assert (tmp_path / "run" / "final" / "adapter").is_dir() == (recipe.stem != "full")


@pytest.mark.parametrize("recipe", FINETUNE, ids=named)
def test_every_finetuning_recipe_parses_to_the_values_it_holds(
    recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([command(recipe), "--config", str(recipe), "--print_config"]) == 0
    parsed, written = yaml.safe_load(capsys.readouterr().out), yaml.safe_load(recipe.read_text())
    assert differing(written, parsed) == []


@pytest.mark.parametrize("recipe", FINETUNE, ids=named)
def test_every_finetuning_recipe_says_what_it_is_for_and_how_to_run_it(recipe: Path) -> None:
    text = recipe.read_text()
    assert text.startswith("# ")
    assert f"litgpt {command(recipe)} --config config_hub/{named(recipe)}.yaml" in text
    hub_id = yaml.safe_load(text)["checkpoint_dir"].removeprefix("checkpoints/")
    assert f"litgpt download {hub_id}\n" in text
    assert ("quantize: " in text) == (recipe.stem == "qlora")


def differing(written: Any, parsed: Any, key: str = "") -> list[str]:
    """Keys of a recipe whose values are not what the command makes of them."""
    if isinstance(written, dict):
        return [found for name in written for found in differing(written[name], parsed.get(name), f"{key}.{name}")]
    return [] if written == parsed or str(parsed).endswith(str(written)) else [f"{key}: {written} became {parsed}"]


# Older recipes --------------------------------------------------------------------------------------------------------


def test_an_older_recipe_parses_as_it_stands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tmp_path / "older.yaml"
    recipe.write_text(OLDER)
    assert main(["finetune", "--config", str(recipe), "--lora_r", "4", "--print_config"]) == 0
    out, err = capsys.readouterr()
    parsed = yaml.safe_load(out)
    assert parsed["lora_r"] == 4
    assert parsed["optimizer"] == {
        "class_path": "torch.optim.AdamW",
        "init_args": {"lr": 0.0002, "weight_decay": 0.0, "betas": [0.9, 0.95]},
    }
    assert parsed["train"]["max_norm"] is None
    assert parsed["train"]["tie_embeddings"] is None
    assert parsed["data"]["init_args"]["download_dir"] == "data/alpaca2k"
    for old in ("train.learning_rate is", "train.weight_decay is", "train.beta1 and train.beta2 are"):
        assert f"{old} now optimizer." in err


def test_an_older_recipe_runs_with_an_option_on_top(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "older.yaml"
    recipe.write_text(OLDER)
    options = {"config": recipe, **put_in(folder, tmp_path / "run"), "lora_r": 4}
    assert main(["finetune", *words(options)]) == 0, capsys.readouterr().err
    settings = yaml.safe_load((tmp_path / "run" / "final" / "hyperparameters.yaml").read_text())
    assert (settings["lora_r"], settings["lora_alpha"], settings["quantize"]) == (4, 16, "bnb.nf4")
