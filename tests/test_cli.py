"""The command line: what is typed and what a recipe says arrive in the function, and a mistake is one line."""

from __future__ import annotations

import dataclasses
import http.server
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from litgpt import cli, commands, errors, parser, request, signature
from litgpt.args import EvalArgs, LogArgs, TrainArgs
from litgpt.config import Config
from litgpt.data import DataModule
from litgpt.errors import DivergedError, InputError, MachineError, UserError, near_miss

calls: list[dict[str, Any]] = []


def train_it(
    model_name: str,
    model_config: Config | None = None,
    out_dir: Path = Path("out"),
    precision: Literal["bf16-true", "32-true", None] = None,
    resume: bool | Literal["auto"] | Path = False,
    data: DataModule | None = None,
    train: TrainArgs = TrainArgs.as_default(global_batch_size=512, max_tokens=10**12),
    eval: EvalArgs = EvalArgs.as_default(interval=1000),
    log: LogArgs = LogArgs(),
    optimizer: str | dict = "AdamW",
    devices: int | str = "auto",
    seed: int = 42,
    overwrite: bool = False,
    allow_change: list[str] | None = None,
    access_token: str | None = None,
) -> None:
    """Train something.

    Args:
        model_name: Which model.
        data: What to train on.
    """
    calls.append(dict(locals()))


def join_it(texts: list[Path], out_dir: Path, *, prompt: str = "hi", temperature: float = 0.8) -> None:
    """Join files."""
    calls.append(dict(locals()))


@dataclasses.dataclass
class Letters(DataModule):
    """Letters of the alphabet."""

    count: int
    case: Literal["upper", "lower"] = "lower"
    seed: int = 1

    def connect(self, *args: Any, **kwargs: Any) -> None: ...
    def setup(self) -> None: ...
    def train_dataloader(self) -> Any: ...
    def val_dataloader(self) -> Any: ...
    def fingerprint(self) -> str:
        return ""


LETTERS = f"{__name__}.Letters"


def received(*argv: str, function: Any = train_it) -> dict[str, Any]:
    """The arguments with which `litgpt ACTION argv` calls its function."""
    table = signature.read(function)
    return parser.arguments(table, request.read(table, argv))


def refusal(*argv: str, function: Any = train_it) -> str:
    """The one line with which a command line is refused."""
    line = outcome(*argv, function=function)
    assert line is not None, "taken"
    assert "\n" not in line
    return line


def outcome(*argv: str, function: Any = train_it) -> str | None:
    """The line with which a command line is refused; None when it is taken."""
    try:
        received(*argv, function=function)
    except UserError as e:
        return str(e)
    return None


@pytest.fixture
def recipe(tmp_path: Path) -> Any:
    def write(text: str) -> str:
        path = tmp_path / f"recipe{len(list(tmp_path.iterdir()))}.yaml"
        path.write_text(text)
        return str(path)

    return write


# What arrives ---------------------------------------------------------------------------------------------------------


def test_defaults_arrive_as_the_function_has_them() -> None:
    got = received("pythia")
    assert got["model_name"] == "pythia"
    assert (got["data"], got["model_config"], got["optimizer"]) == (None, None, "AdamW")
    assert (got["train"].global_batch_size, got["train"].given) == (512, frozenset())


@pytest.mark.parametrize("argv", [["pythia"], ["--model_name", "pythia"], ["--model_name=pythia"]])
def test_a_required_parameter_may_stand_alone_or_be_named(argv: list[str]) -> None:
    assert received("--seed", "1", *argv, "--overwrite")["model_name"] == "pythia"


def test_a_list_takes_all_words_and_a_second_required_parameter_is_named() -> None:
    got = received("a.txt", "b.txt", "--out_dir", "x", function=join_it)
    assert (got["texts"], got["out_dir"]) == ([Path("a.txt"), Path("b.txt")], Path("x"))
    assert "give --out_dir" in refusal("a.txt", function=join_it)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        (["--seed", "200_000"], 200_000),
        (["--seed=1e9"], 10**9),
        (["--seed", "-3"], -3),
        (["--devices", "2"], 2),
        (["--devices", "auto"], "auto"),
        (["--resume"], True),
        (["--resume", "auto"], "auto"),
        (["--resume", "out/x"], Path("out/x")),
        (["--overwrite"], True),
        (["--overwrite", "false"], False),
        (["--precision", "null"], None),
        (["--allow_change", "seed", "--allow_change", "data"], ["seed", "data"]),
        (["--allow_change", "[seed, data]"], ["seed", "data"]),
    ],
)
def test_text_becomes_the_type_of_the_parameter(option: list[str], value: Any) -> None:
    assert received("m", *option)[option[0][2:].partition("=")[0]] == value


def test_text_stays_text() -> None:
    for text in ("5", "null", "yes: no", "{", "", "é -x"):
        assert received("a", "--out_dir", "x", f"--prompt={text}", function=join_it)["prompt"] == text


def test_options_win_over_recipes_and_later_recipes_over_earlier_in_any_order(recipe: Any) -> None:
    one = recipe("model_name: m\nseed: 1\ntrain:\n  max_steps: 1\n  epochs: 6e0\n")
    two = recipe("seed: 2\ntrain: {max_steps: 2}\n")
    got = received("--train.max_steps", "3", "--config", one, "--config", two)
    assert (got["model_name"], got["seed"], got["train"].max_steps, got["train"].epochs) == ("m", 2, 3, 6)


def test_numbers_in_a_recipe_are_numbers(recipe: Any) -> None:
    train = received("m", "--config", recipe("train:\n  min_lr: 6e-5\n  max_tokens: 1e9\n  max_norm: 1\n"))["train"]
    assert (train.min_lr, train.max_tokens, train.max_norm) == (6e-5, 10**9, 1.0)
    assert isinstance(train.max_tokens, int)


def test_a_group_may_be_given_whole_or_by_key(recipe: Any) -> None:
    assert received("m", "--train", "{max_steps: 4}", "--train.epochs", "2")["train"].max_steps == 4
    assert received("m", "--log.metadata", "{a: 1}")["log"].metadata == {"a": 1}
    assert received("m", "--config", recipe("log:\n  metadata:\n    a: 1\n"))["log"].metadata == {"a": 1}


def test_a_model_of_your_own_is_given_by_fields_or_by_file(recipe: Any) -> None:
    for argv in (["--model_config.n_layer", "3"], ["--model_config", recipe("n_layer: 3\n")]):
        assert received("m", *argv)["model_config"].n_layer == 3
    assert received("m", "--config", recipe("model_config: {n_layer: 3, hf_config: {}}\n"))["model_config"].n_layer == 3
    assert received("m", "--config", recipe("model_config:\n"))["model_config"] is None


@pytest.mark.parametrize(
    "argv",
    [
        ["--data", LETTERS, "--data.count", "3", "--data.case", "upper"],
        ["--data.case", "upper", "--data.count=3", "--data", LETTERS],
        ["--data.class_path", LETTERS, "--data.init_args.count", "3", "--data.init_args.case", "upper"],
        ["--data", f"{{class_path: {LETTERS}, init_args: {{count: 3, case: upper}}}}"],
    ],
)
def test_a_data_module_is_named_and_built(argv: list[str]) -> None:
    assert received("m", *argv)["data"] == Letters(3, "upper")


def test_a_data_module_goes_by_its_short_name_too(tmp_path: Path) -> None:
    data = received("m", "--data", "TextFiles", "--data.train_data_path", str(tmp_path))["data"]
    assert (type(data).__name__, data.train_data_path) == ("TextFiles", tmp_path)


def test_another_data_module_leaves_the_first_ones_own_arguments_behind(recipe: Any) -> None:
    first = recipe("data:\n  class_path: TextFiles\n  init_args: {train_data_path: x, seed: 7}\n")
    assert received("m", "--config", first, "--data", LETTERS, "--data.count", "3")["data"] == Letters(3, seed=7)


def test_an_optimizer_arrives_by_name_or_as_class_path_and_init_args(recipe: Any) -> None:
    assert received("m", "--optimizer", "SGD")["optimizer"] == "torch.optim.SGD"
    adam = {"class_path": "torch.optim.AdamW", "init_args": {"lr": 1e-3}}
    assert received("m", "--optimizer.lr", "1e-3")["optimizer"] == adam
    text = "optimizer:\n  class_path: torch.optim.AdamW\n  init_args: {lr: 6e-4, betas: [0.9, 0.95]}\n"
    got = received("m", "--config", recipe(text), "--optimizer.lr", "1e-3")["optimizer"]
    assert got["init_args"] == {"lr": 1e-3, "betas": [0.9, 0.95]}


def test_what_was_given_is_told_from_what_is_a_default(recipe: Any) -> None:
    path = recipe("train: {lr_warmup_steps: 9, global_batch_size: 512, micro_batch_size: 2}\n")
    assert received("m", "--config", path)["train"].given == {"micro_batch_size"}
    assert received("m", "--train.lr_warmup_steps", "9")["train"].given == {"lr_warmup_steps"}


# Older spellings ------------------------------------------------------------------------------------------------------


def test_older_keys_become_the_optimizers(recipe: Any) -> None:
    path = recipe("train: {learning_rate: 2e-4, weight_decay: 0.0, beta1: 0.8, beta2: 0.95}\n")
    table = signature.read(train_it)
    asked = request.read(table, ["m", "--config", path])
    assert len(asked.warnings) == 3
    assert all(f"{path}:1" in warning for warning in asked.warnings)
    optimizer = parser.arguments(table, asked)["optimizer"]
    assert optimizer["class_path"] == "torch.optim.AdamW"
    assert optimizer["init_args"] == {"lr": 2e-4, "weight_decay": 0.0, "betas": [0.8, 0.95]}


OLDER_RECIPE = """
checkpoint_dir: checkpoints/meta-llama/Llama-2-7b-hf
out_dir: out/finetune/qlora
quantize: bnb.nf4
lora_r: 32
lora_dropout: 0.05
lora_query: true
data:
  class_path: tests.test_cli.Letters
  init_args: {count: 3, seed: 42}
train:
  save_interval: 200
  global_batch_size: 8
  micro_batch_size: 2
  lr_warmup_steps: 10
  epochs: 4
  max_tokens: null
  max_seq_length: 512
  tie_embeddings: null
  learning_rate: 0.0002
  weight_decay: 0.0
  beta1: 0.9
  beta2: 0.95
  min_lr: 6.0e-05
eval: {interval: 100, max_new_tokens: 100, max_iters: 100}
seed: 1337
"""


def finetune_it(
    checkpoint_dir: Path,
    out_dir: Path = Path("out"),
    quantize: Literal["bnb.nf4", "bnb.int8-training"] | None = None,
    lora_r: int = 8,
    lora_dropout: float = 0.05,
    lora_query: bool = True,
    data: DataModule | None = None,
    train: TrainArgs = TrainArgs.as_default(global_batch_size=16, micro_batch_size=1, epochs=5),
    eval: EvalArgs = EvalArgs.as_default(interval=100, max_new_tokens=100),
    optimizer: str | dict = "AdamW",
    seed: int = 1337,
) -> None:
    """Finetune something."""


def test_a_recipe_of_an_earlier_version_runs_as_it_stands_and_with_options_on_top(recipe: Any) -> None:
    got = received("--config", recipe(OLDER_RECIPE), "--lora_r", "4", function=finetune_it)
    assert (got["lora_r"], got["quantize"], got["data"]) == (4, "bnb.nf4", Letters(3, seed=42))
    assert (got["train"].epochs, got["train"].max_tokens, got["train"].min_lr) == (4, None, 6e-5)
    arguments = {"lr": 2e-4, "weight_decay": 0.0, "betas": [0.9, 0.95]}
    assert got["optimizer"] == {"class_path": "torch.optim.AdamW", "init_args": arguments}


def test_a_newer_key_wins_over_an_older_one_of_the_same_recipe(recipe: Any) -> None:
    path = recipe("train: {learning_rate: 1.0, beta1: null}\noptimizer: {class_path: SGD, init_args: {lr: 0.5}}\n")
    assert received("m", "--config", path)["optimizer"]["init_args"]["lr"] == 0.5


def test_an_option_that_lost_its_meaning_is_accepted_with_a_warning() -> None:
    table = signature.read(train_it)
    asked = request.read(table, ["m", "--force_conversion", "true"])
    assert "--force_conversion" in asked.warnings[0]
    assert parser.arguments(table, asked)["model_name"] == "m"


HUB = Path(__file__).parents[1] / "config_hub"


@pytest.mark.parametrize("path", sorted(HUB.glob("pretrain/*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_of_the_hub_says_what_its_command_takes(path: Path, tmp_path: Path) -> None:
    text = ["--data", "TextFiles", "--data.train_data_path", str(tmp_path)]
    got = received("--config", str(path), *text, function=cli._function("pretrain"))
    values = yaml.safe_load(path.read_text())
    assert got["model_name"] == values["model_name"]
    assert got["train"].global_batch_size == values["train"]["global_batch_size"]


# What is refused ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], "model_name is missing"),
        (["m", "x"], "'x' stands alone"),
        (["m", "--bogus", "1"], "--bogus"),
        (["m", "--train.max_step", "5"], "'--train.max_steps'"),
        (["m", "--max_steps", "5"], "'--train.max_steps'"),
        (["m", "--over", "true"], "--over: there is no such option"),
        (["m", "--seed"], "--seed: it needs a value"),
        (["m", "--seed", "abc"], "--seed: 'abc' is not a whole number"),
        (["m", "--seed", "1.5"], "--seed"),
        (["m", "--out_dir="], "--out_dir"),
        (["m", "--precision", "bf16"], "'bf16-true'"),
        (["m", "--model_config.rotary_percentage", "9" * 400], "--model_config.rotary_percentage: '999"),
        (["m", "--model_config.n_shared_expert", "9" * 400], "n_shared_expert is 999"),
        (["m", "--model_config.n_shared_expert", "9" * 6000], "--model_config.n_shared_expert: '999"),
        (["m", "--seed", "!!bool q"], "--seed: '!!bool q'"),
        (["m", "--seed", "!!float"], "--seed: '!!float'"),
        (["m", "--optimizer.class_path", ".."], "--optimizer.class_path: optimizer '..' cannot be imported"),
        (["m", "--optimizer", "a\0.b"], "cannot be imported"),
        (["m", "--out_dir", "a\0b"], "--out_dir: 'a\\x00b' holds a zero byte"),
        (["m", "--config", "a\0b"], "--config 'a\\x00b': cannot be read"),
        (["m", f"--{'x' * 1000}", "1"], "xxx...: there is no such option"),
        (["m", "x" * 1000], "xxx... stands alone"),
        (["m", "--data", "x" * 1000], "xxx... is no data module"),
        (["m", "--data", "."], "'.' is a path; a data module reads it: --data JSON --data.json_path ."),
        (["m", "--precision", "x" * 1000], "xxx... is not"),
        (["m", "--train.epochs", "-1"], "train.epochs is -1"),
        (["m", "--train", "5"], "--train"),
        (["m", "--data", "TextFile"], "'TextFiles'"),
        (["m", "--data", "textfiles"], "'TextFiles'"),
        (["m", "--data", "TextFiles"], "--data.train_data_path"),
        (["m", "--data.count", "3"], "name the data module first"),
        (["m", "--data", LETTERS, "--data.coumt", "3"], "'count'"),
        (["m", "--data", LETTERS, "--data.count", "3", "--data.case", "uper"], "'upper'"),
        (["m", "--optimizer", "AdmW"], "'AdamW'"),
        (["m", "--optimizer.lrr", "1"], "'lr'"),
        (["m", "--optimizer", "torch.nn.Linear"], "torch.optim.Optimizer"),
        (["m", "--config"], "--config"),
        (["m", "--config", "nowhere.yaml"], "--config nowhere.yaml"),
    ],
)
def test_a_wrong_option_is_one_line_with_the_nearest_right_one(argv: list[str], words: str) -> None:
    line = refusal(*argv)
    assert words in line
    assert len(line) < 400


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("seed: 1\ntrain:\n  lr_warmup_step: 3\n", ":3: train.lr_warmup_step: ... 'train.lr_warmup_steps'"),
        ("trian: {}\n", ":1: trian: ... 'train'"),
        ("train:\n  max_steps: abc\n", ":2: train.max_steps: 'abc' is not a whole number or null"),
        ("train:\n\n  max_time: -1\n", ":3: train.max_time is -1"),
        ("train: 5\n", ":1: train: 5"),
        ("model_config:\n  n_layr: 3\n", ":2: model_config.n_layr: ... 'model_config.n_layer'"),
        ("model_config: []\n", ":1: model_config: []"),
        ("model_config:\n  n_layer: -3\n", ":2: n_layer"),
        ("data: [a]\n", ":1: data: ['a']"),
        ("data:\n  class_path: litgpt.data.TextFile\n", ":2: ... 'TextFiles'"),
        ("data:\n  class_path: TextFiles\n  init_args:\n    train_data_pth: x\n", ":4: ... 'train_data_path'"),
        ("seed: 1\nseed: 2\n", ":2: 'seed' stands in line 1"),
        ("seed: [1\n", ":2: this is not valid YAML"),
        ("- 1\n", "mapping"),
        ("", "mapping"),
        ("seed: !!python/object/apply:os.system ['true']\n", ":1: this is not valid YAML"),
        ("seed: 2001-99-99\n", ":1: "),
        ("seed: !!bool q\n", ":1: 'q' is no value of the type !!bool"),
        ("seed: 1\nmodel_name: [!!timestamp x]\n", ":2: "),
        ("optimizer: {lr: !!float }\n", ":1: '' is no value of the type !!float"),
        ('out_dir: "a\\0b"\n', ":1: out_dir: 'a\\x00b' holds a zero byte"),
        ("seed: &a [*a]\n", ":1: "),
        ("log: &a {metadata: *a}\n", ":1: "),
        ("\tseed: 1\n", ":1: this is not valid YAML"),
        ("seed: \x00\n", "this is not valid YAML"),
    ],
)
def test_a_wrong_recipe_is_one_line_with_its_place(recipe: Any, text: str, words: str) -> None:
    path = recipe(text)
    line = refusal("m", "--config", path)
    assert path in line
    for part in words.split(" ... "):
        assert part in line


def test_a_recipe_that_is_not_text_or_too_large_or_a_folder_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    for content in (b"seed: \xff\n", b"#" * (1 << 21)):
        path.write_bytes(content)
        assert str(path) in refusal("m", "--config", str(path))
    assert str(tmp_path) in refusal("m", "--config", str(tmp_path))


def test_aliases_that_multiply_are_refused_at_once(recipe: Any) -> None:
    lists = "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 12))
    refusal("m", "--config", recipe("a0: &a0 [x]\n" + lists))
    maps = "".join(f"a{n}: &a{n} {{{', '.join(f'k{i}: *a{n - 1}' for i in range(9))}}}\n" for n in range(1, 12))
    refusal("m", "--config", recipe("a0: &a0 {x: 1}\n" + maps))


@pytest.mark.parametrize("text", ["data", "optimizer", "log.metadata", "seed", "model_config.hf_config"])
def test_a_recipe_cannot_have_foreign_code_run(text: str, recipe: Any, tmp_path: Path, monkeypatch: Any) -> None:
    (tmp_path / "canary_module.py").write_text(f"open({str(tmp_path / 'sang')!r}, 'w')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    inner = "{class_path: os.system, init_args: {command: 'touch sang'}}"
    if text in ("log.metadata", "seed", "model_config.hf_config"):
        inner = "{class_path: canary_module.X, init_args: {}}"  # a value that is no choice is never looked up
    path = recipe(f"{text.replace('.', ': {')}: {inner}{'}' * text.count('.')}\n")
    line = outcome("m", "--config", path)
    assert line is None or path in line
    assert not (tmp_path / "sang").exists()
    assert "canary_module" not in sys.modules


def test_a_class_of_the_standard_library_is_refused_without_importing_it(monkeypatch: Any) -> None:
    assert "antigravity" not in sys.modules
    assert "antigravity.fly" in refusal("m", "--data", "antigravity.fly")
    assert "antigravity" not in sys.modules


KEYS = [
    "model_name",
    "seed",
    "train",
    "max_steps",
    "data",
    "class_path",
    "init_args",
    "optimizer",
    "lr",
    "model_config",
    "x",
]
SCALARS = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8), st.sampled_from(KEYS))
TREES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=4)
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(tree=st.dictionaries(st.sampled_from(KEYS), TREES, max_size=4))
def test_any_recipe_is_taken_or_refused_in_one_line(tree: dict, tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(yaml.safe_dump(tree, allow_unicode=True))
    line = outcome("m", "--config", str(path))
    assert line is None or ("\n" not in line and (str(path) in line or "--data" in line))


@settings(max_examples=150, deadline=None)
@given(argv=st.lists(st.one_of(st.text(max_size=6), st.sampled_from([f"--{key}" for key in KEYS])), max_size=5))
def test_any_command_line_is_taken_or_refused(argv: list[str]) -> None:
    assert outcome(*argv) != ""


# Recipes from a URL ---------------------------------------------------------------------------------------------------


@pytest.fixture
def server() -> Iterator[str]:
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200 if self.path == "/r.yaml" else 404)
            self.end_headers()
            self.wfile.write(b"model_name: far\nseed: 5\n")

        def log_message(self, *args: Any) -> None: ...

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{httpd.server_port}"
        httpd.shutdown()


def test_a_recipe_may_lie_on_a_server(server: str) -> None:
    assert received("--config", f"{server}/r.yaml", "--seed", "6")["seed"] == 6
    assert "404" in refusal("--config", f"{server}/other.yaml")


@pytest.mark.parametrize("url", ["http://127.0.0.1:9/x.yaml", "http://", "https://127.0.0.1:9/x y", "http://[/x"])
def test_a_server_out_of_reach_is_one_line(url: str) -> None:
    assert f"--config {url}" in refusal("m", "--config", url)


# Printing -------------------------------------------------------------------------------------------------------------


def shown(capsys: Any, *argv: str, function: Any = train_it) -> str:
    cli.run_command("train", function, argv)
    return capsys.readouterr().out


def test_print_config_is_a_recipe_for_the_same_run(capsys: Any, tmp_path: Path) -> None:
    argv = ["m", "--data", LETTERS, "--data.count", "3", "--train.max_steps", "4", "--optimizer.lr", "1e-3"]
    argv += ["--model_config.n_layer", "2", "--access_token", "hf_canary"]
    text = shown(capsys, *argv, "--print_config")
    assert "hf_canary" not in text
    (tmp_path / "r.yaml").write_text(text)
    again = received("--config", str(tmp_path / "r.yaml"), "--access_token", "hf_canary")
    assert again == received(*argv)
    assert shown(capsys, "--config", str(tmp_path / "r.yaml"), "--print_config") == text


def test_help_shows_every_option_with_its_words(capsys: Any) -> None:
    page = shown(capsys, "--help")
    for words in (
        "Usage: litgpt train MODEL_NAME",
        "Which model.",
        "--train.max_steps INT",
        "Passes over the training",
    ):
        assert words in page
    assert "--data.count" not in page
    assert "--data.count INT" in shown(capsys, "-h", "--data", LETTERS)
    assert "TEXTS... --out_dir PATH" in shown(capsys, "--help", function=join_it)


def test_a_near_miss_is_the_word_that_was_begun_before_one_that_looks_alike() -> None:
    assert near_miss("bnb.int8", ["bnb.nf4", "bnb.int8-training"]) == "; did you mean 'bnb.int8-training'?"
    assert near_miss("bnb.nf5", ["bnb.nf4", "bnb.int8-training"]) == "; did you mean 'bnb.nf4'?"


def test_help_fills_its_lines_whatever_the_docstring_was_wrapped_at(capsys: Any) -> None:
    def act() -> None:
        """Act.

        First words of
        a paragraph.

        Another one.
        """

    assert "First words of a paragraph.\n\nAnother one.\n" in shown(capsys, "--help", function=act)


def test_the_overview_keeps_names_and_words_apart() -> None:
    page = cli.overview()
    assert all(f"  {action} " in page for action in cli.COMMANDS)


# The boundary ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (InputError("one\ntwo"), 2, "error: one two\n"),
        (MachineError("disk"), 3, "error: disk\n"),
        (DivergedError("nan"), 4, "error: nan\n"),
        (MemoryError(), 3, "train.micro_batch_size"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), 3, "train.max_seq_length"),
        (RuntimeError("could not create a primitive"), 3, "train.max_seq_length"),  # oneDNN has no better words
        (PermissionError(13, "Permission denied", "/x/y"), 2, "error: /x/y: Permission denied"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_an_error_is_one_line_and_a_status(
    error: BaseException, status: int, line: str, monkeypatch: Any, capsys: Any
) -> None:
    def fail(argv: Any) -> None:
        raise error

    monkeypatch.setattr(cli, "_run", fail)
    assert cli.main([]) == status
    err = capsys.readouterr().err
    assert line in err
    assert err.count("\n") == 1


def test_a_message_is_one_line_and_a_value_in_it_is_cut() -> None:
    assert str(InputError("a\n  b\r\nc")) == "a b c"
    assert [errors.shown(v) for v in ("a", "x" * 10**6, 10**9000)] == [
        "'a'",
        f"'{'x' * 56}...",
        "a number of thousands of digits",
    ]


def test_a_mistake_of_ours_keeps_its_traceback(monkeypatch: Any) -> None:
    monkeypatch.setattr(cli, "_run", lambda argv: [][0])
    with pytest.raises(IndexError):
        cli.main([])


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], "no action"),
        (["frobnicate"], "'frobnicate' is no action; the actions are download, "),
        (["pretrian"], "'pretrain'"),
        (["evaluat", "x"], "'evaluate'"),
    ],
)
def test_an_action_that_is_not_there_is_one_line(argv: list[str], words: str, capsys: Any) -> None:
    assert cli.main(argv) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("error: ")
    assert words in last


def test_the_overview_names_every_action(capsys: Any) -> None:
    assert cli.main(["--help"]) == 0
    page = capsys.readouterr().out
    assert all(action in page for action in commands.COMMANDS)
    assert cli.main(["--version"]) == 0


def process(*argv: str, stdout: Any = subprocess.PIPE) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "litgpt", *argv]
    return subprocess.run(
        command, stdout=stdout, stderr=subprocess.PIPE, text=True, timeout=180, cwd=Path(__file__).parents[1]
    )


def test_a_full_disk_is_status_3() -> None:
    if not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full")
    with open("/dev/full", "w") as full:
        done = process("--help", stdout=full)
    assert done.returncode == 3
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1


def test_a_closed_pipe_is_quiet() -> None:
    read, write = os.pipe()
    os.close(read)
    done = process("--help", stdout=write)
    os.close(write)
    assert (done.returncode, done.stderr) == (141, "")


@pytest.mark.parametrize("closed", [">&-", "<&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_streams_are_no_mistake(closed: str) -> None:
    command = f"{sys.executable} -m litgpt --help {closed}"
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert (done.returncode, done.stderr) == (0, "")


def test_half_a_character_is_printed_as_a_question_mark(monkeypatch: Any, capfd: Any) -> None:
    monkeypatch.setattr(cli, "_run", lambda argv: print("a\ud800b"))
    assert cli.main([]) == 0
    assert capfd.readouterr().out == "a?b\n"


@pytest.mark.parametrize("action", commands.COMMANDS)
def test_every_action_shows_its_help_with_words_on_every_option(action: str) -> None:
    function = cli._function(action)
    table = signature.read(function)
    headline, _, words = signature.documentation(function)
    assert headline
    assert set(table.names) <= words.keys(), f"without words: {set(table.names) - words.keys()}"
    done = process(action, "--help")
    assert done.returncode == 0, done.stderr
    assert f"litgpt {action}" in done.stdout


def test_a_command_that_is_chosen_loads_its_own_module_alone() -> None:
    script = "import sys; from litgpt.cli import main; main(['train_tokenizer', '--help']); print('=', *sys.modules)"
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    loaded = out.rsplit("= ", 1)[1].split()
    assert "litgpt.scripts.train_tokenizer" in loaded
    assert not {"litgpt.pretrain", "litgpt.generate.base", "torch"} & {*loaded}
