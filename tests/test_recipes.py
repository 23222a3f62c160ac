"""Every recipe for pretraining parses and runs, with a tiny model and a small text put in."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from litgpt import data
from litgpt.cli import main
from litgpt.config import Config
from tests.makers import runs

RECIPES = sorted((Path(__file__).parent.parent / "config_hub" / "pretrain").glob("*.yaml"))
TINY = {"n_layer": 2, "n_embd": 32, "n_head": 4, "n_query_groups": 4, "head_size": 8, "intermediate_size": 48}
SHORT = {"max_steps": 2, "global_batch_size": 2, "micro_batch_size": 1, "max_seq_length": 32}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("material")


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
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
    status = main(["pretrain", *(word for name, value in options.items() for word in (f"--{name}", str(value)))])
    assert status == 0, capsys.readouterr().err
    assert Config.from_checkpoint(tmp_path / "run" / "final").n_layer == 2


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_says_what_it_is_for_and_how_to_run_it(recipe: Path) -> None:
    text = recipe.read_text()
    assert text.startswith("# ")
    assert f"litgpt pretrain --config config_hub/pretrain/{recipe.name}" in text
    assert {"model_name", "out_dir", "data", "train", "optimizer", "tokenizer_dir"} <= set(yaml.safe_load(text))


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_whose_data_module_is_not_there_says_so_at_its_top(recipe: Path) -> None:
    chosen = yaml.safe_load(recipe.read_text())["data"]
    name = chosen if isinstance(chosen, str) else chosen["class_path"].rpartition(".")[2]
    top = recipe.read_text().partition("\n\n")[0]
    assert (f"{name} is not in this version yet" in top) == (not hasattr(data, name))
