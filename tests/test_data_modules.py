"""Instruction data by module: its real format behind a local stand-in, its split, and one line for what goes wrong."""

from __future__ import annotations

import inspect
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from litgpt import data as data_home
from litgpt import hub, parser, request, signature
from litgpt.data import FLAN, JSON, LIMA, Alpaca, Alpaca2k, AlpacaGPT4, DataModule, LongForm, fetch, longform
from litgpt.data.flan import SUBSETS
from litgpt.data.records import KINDS, try_rows
from litgpt.data.rows import numbered
from litgpt.errors import InputError, MachineError, MissingError
from litgpt.tokenizer import Tokenizer
from tests.makers.hub import Fault, StandIn, stand_in
from tests.makers.tokenizers import train_tiny_tokenizer

ROOT = Path(__file__).parents[1]
TOKEN = "hf_canary0123456789"


def alpaca(count: int) -> list[dict[str, Any]]:
    return [
        {"instruction": f"do {i}", "input": "" if i % 3 else f"in {i}", "output": f"done {i}"} for i in range(count)
    ]


def lines(rows: list[Any]) -> bytes:
    return "\n".join(map(json.dumps, rows)).encode()


def questions(records: Any) -> list[str]:
    return [record.messages[0]["content"] for record in records]


def ready(module: Any) -> tuple[Any, Any]:
    """What a module trains on and validates with."""
    module.prepare_data()
    return module.records()


def opened(module: Any) -> None:
    """Takes a module through its verbs, as a run does."""
    train_tiny_tokenizer(Path("tokenizer"))
    module.connect(Tokenizer("tokenizer"), 2, 512)
    module.prepare_data()
    module.setup()


@pytest.fixture
def web(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[StandIn]:
    """A host of files, in an empty working directory."""
    monkeypatch.chdir(tmp_path)
    for name in ("HF_TOKEN", "HF_ENDPOINT", *hub.OFFLINE, "http_proxy", "HTTP_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(hub, "FIRST_WAIT", 0.02)
    with stand_in() as server:
        yield server


def served(web: StandIn, files: dict[str, bytes]) -> str:
    """The address below which the stand-in has these files."""
    web.push("datasets/a/b", files)
    return f"{web.url}/datasets/a/b/resolve/main"


# Names and parameters -------------------------------------------------------------------------------------------------

PARAMETERS: dict[str, dict[str, Any]] = {
    "Alpaca": {"val_split_fraction": 0.03865, "download_dir": Path("data/alpaca")},
    "Alpaca2k": {
        "val_split_fraction": 0.05,
        "download_dir": Path("data/alpaca2k"),
        "repo_id": "mhenrichsen/alpaca_2k_test",
        "file_name": "alpaca2k_data_cleaned_archive.json",
    },
    "AlpacaGPT4": {"val_split_fraction": 0.03847, "download_dir": Path("data/alpacagpt4")},
    "Deita": {
        "include_multiturn_conversations": False,
        "download_dir": Path("data/deita"),
        "repo_id": "HuggingFaceH4/deita-10k-v0-sft",
    },
    "FLAN": {
        "download_dir": Path("data/flan"),
        "url": "https://huggingface.co/datasets/Muennighoff/flan/resolve/main",
        "subsets": None,
    },
    "JSON": {"json_path": inspect.Parameter.empty, "val_split_fraction": None},
    "LIMA": {
        "val_split_fraction": 0.1,
        "include_multiturn_conversations": False,
        "repo_id": "GAIR/lima",
        "access_token": None,
    },
    "LongForm": {"download_dir": Path("data/longform")},
}
COMMON = {"mask_prompt": False, "ignore_index": -100, "seed": 42, "num_workers": 4}


@pytest.mark.parametrize("name", PARAMETERS)
def test_modules_take_what_they_always_took(name: str) -> None:
    parameters = inspect.signature(getattr(data_home, name)).parameters
    known = {key: parameters[key].default for key in {**COMMON, **PARAMETERS[name], "prompt_style": None}}
    assert known == {**COMMON, **PARAMETERS[name], "prompt_style": None}


def test_styles_of_instructions() -> None:
    styles = {name: getattr(data_home, name).STYLE for name in PARAMETERS}
    assert {name for name, style in styles.items() if style == "alpaca"} == styles.keys() - {"FLAN", "LongForm"}
    assert (styles["FLAN"], styles["LongForm"]) == ("flan", "longform")


def test_names_load_no_torch_and_unknown_ones_have_a_near_miss() -> None:
    script = "import sys; from litgpt.data import FLAN, JSON, LIMA, HubDataset; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], check=True)
    with pytest.raises(AttributeError, match="did you mean 'Alpaca2k'"):
        data_home.Alpaca2K  # noqa: B018


# JSON -----------------------------------------------------------------------------------------------------------------


def test_a_file_is_split_at_random_and_says_how(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps(alpaca(40)))
    module = JSON(tmp_path / "a.json")
    train, val = ready(module)
    assert (len(train), len(val)) == (38, 2)
    assert sorted(questions([*train, *val])) == sorted(f"do {i}" for i in range(40))
    assert questions(JSON(tmp_path / "a.json", seed=1).records()[1]) != questions(val)
    assert questions(JSON(tmp_path / "a.json", val_split_fraction=0.05).records()[1]) == questions(val)


@pytest.mark.parametrize(("fraction", "count", "validate"), [(0.0, 40, 0), (0.5, 40, 20), (None, 1, 0), (0.99, 1, 0)])
def test_shares(tmp_path: Path, fraction: float | None, count: int, validate: int) -> None:
    (tmp_path / "a.jsonl").write_bytes(lines(alpaca(count)))
    train, val = ready(JSON(tmp_path / "a.jsonl", val_split_fraction=fraction))
    assert (len(train), len(val)) == (count - validate, validate)


@pytest.mark.parametrize("fraction", [-0.1, 1.0, 1.5, float("nan")])
def test_shares_that_are_none(tmp_path: Path, fraction: float) -> None:
    for module in (
        JSON(tmp_path, val_split_fraction=fraction),
        Alpaca(val_split_fraction=fraction),
        LIMA(val_split_fraction=fraction),
    ):
        with pytest.raises(InputError, match=r"data.val_split_fraction is .*; give a share from 0"):
            module.connect(None, 1, 8)  # type: ignore[arg-type]


@pytest.mark.parametrize("validation", ["val", "validation", "valid", "dev", "test", "VAL"])
def test_a_folder_says_by_its_files_what_validates(tmp_path: Path, validation: str) -> None:
    (tmp_path / "train.json").write_text(json.dumps(alpaca(3)))
    (tmp_path / f"{validation}.jsonl").write_bytes(lines(alpaca(2)))
    (tmp_path / "README.md").write_text("words")
    train, val = ready(JSON(tmp_path))
    assert questions(train) == ["do 0", "do 1", "do 2"]
    assert questions(val) == ["do 0", "do 1"]
    with pytest.raises(InputError, match=r"leave data.val_split_fraction out"):
        JSON(tmp_path, val_split_fraction=0.1).records()


def test_a_folder_that_lacks_a_file_or_has_two(tmp_path: Path) -> None:
    with pytest.raises(MissingError, match=r"has no train\.jsonl.*expected train\.\* and val\.\*.*found nothing"):
        JSON(tmp_path).records()
    (tmp_path / "train.json").write_text(json.dumps(alpaca(3)))
    (tmp_path / "val.txt").write_text("words")
    with pytest.raises(MissingError, match=r"has no val\.jsonl.*found train\.json, val\.txt"):
        JSON(tmp_path).records()
    (tmp_path / "val.json").write_text("[]")
    with pytest.raises(InputError, match=r"val\.json: 0 records"):
        JSON(tmp_path).records()
    (tmp_path / "val.csv").write_text("text\na")
    with pytest.raises(InputError, match=r"val\.csv and val\.json are both there"):
        JSON(tmp_path).records()


def test_columns_must_be_ours(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"data.columns: 'instructions' is no key; did you mean 'instruction'"):
        JSON(tmp_path, columns={"instructions": "q"}).connect(None, 1, 8)  # type: ignore[arg-type]


# Files of the web -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [Alpaca, AlpacaGPT4])
def test_alpaca_is_fetched_once_and_split(web: StandIn, kind: type[Alpaca]) -> None:
    rows = alpaca(100)
    rows[7]["output"] = ""
    url = served(web, {"data.json": json.dumps(rows).encode()})
    module = kind(file_url=f"{url}/data.json", val_split_fraction=0.1)
    train, val = ready(module)
    assert (len(train), len(val)) == (90, 9)
    assert sorted(p.name for p in module.download_dir.iterdir()) == [module.file_name]
    web.requests.clear()
    assert ready(kind(file_url=f"{url}/data.json", val_split_fraction=0.1)) == (train, val)
    assert not web.requests


def test_a_download_that_breaks_goes_on_where_it_was(web: StandIn) -> None:
    content = json.dumps(alpaca(5000)).encode()
    module = Alpaca(file_url=served(web, {"data.json": content}) + "/data.json")
    path = module.download_dir / module.file_name
    web.faults["data.json"] = Fault(times=99, cut_at=0)
    with pytest.raises(MachineError, match=r"could not be fetched.*check the network") as caught:
        module.prepare_data()
    assert caught.value.exit_status == 3
    assert not path.exists()
    web.faults["data.json"] = Fault(times=2, cut_at=100_000)  # the first of the two is how large it is
    module.prepare_data()
    assert path.read_bytes() == content
    assert web.gets("data.json")[-1].headers["range"] == "bytes=100000-"
    assert sorted(p.name for p in module.download_dir.iterdir()) == [module.file_name]


def test_a_server_that_knows_no_ranges_sends_all_of_it(web: StandIn) -> None:
    content = json.dumps(alpaca(5000)).encode()
    web.has_ranges = False
    web.faults["data.json"] = Fault(times=2, cut_at=100_000)
    assert fetch.file(served(web, {"data.json": content}) + "/data.json", Path("a.json")).read_bytes() == content


def test_addresses_that_serve_nothing(web: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    url = served(web, {})
    with pytest.raises(MissingError, match=r"does not serve this file \(HTTP 404\); check the address"):
        fetch.file(f"{url}/none.json", Path("a.json"))
    with pytest.raises(InputError, match="not an address of the web"):
        fetch.file("file:///etc/passwd", Path("a.json"))
    monkeypatch.setattr(hub, "PATIENCE", 0.1)
    with pytest.raises(MachineError, match=r"no network connection to 127.0.0.1:1 "):
        fetch.file("http://127.0.0.1:1/a.json", Path("a.json"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(MachineError, match="the environment forbids the network"):
        fetch.file(f"{url}/none.json", Path("a.json"))
    assert not list(Path().iterdir())


def test_the_token_goes_to_no_other_host(web: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    fetch.file(served(web, {"data.json": b"[]"}) + "/data.json", Path("a.json"))
    assert web.requests
    assert not any("authorization" in request.headers for request in web.requests)


def test_flan_reads_the_collections_that_are_named(web: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("cb_10templates", "rte_10templates")
    files = {
        f"{split}/{name}_{split}.jsonl": lines(
            [{"inputs": f"{name} {i}", "targets": split, "task": "x"} for i in range(2)]
        )
        for name in names
        for split in ("train", "test")
    }
    served(web, files)
    web.push("datasets/Muennighoff/flan", files)
    monkeypatch.setenv("HF_ENDPOINT", web.url)
    train, val = ready(FLAN(subsets="rte_10templates, cb_10templates"))
    assert questions(train) == [f"{name} {i}" for name in reversed(names) for i in range(2)]
    assert [record.messages[1]["content"] for record in val] == ["test"] * 4
    assert {record.kind for record in train} == {"instruction"}


def test_flan_has_66_collections_and_unknown_ones_have_a_near_miss() -> None:
    assert len(set(FLAN().chosen())) == 66
    assert SUBSETS[0] == "aeslc_10templates"
    assert SUBSETS[-1] == "yelp_polarity_reviews_10templates"
    with pytest.raises(InputError, match="FLAN has no 'rte_10template'; did you mean 'rte_10templates'"):
        FLAN(subsets="cb_10templates,rte_10template").prepare_data()
    with pytest.raises(InputError, match=r"data.subsets names nothing"):
        FLAN(subsets=" , ").prepare_data()


def test_longform(web: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"input": f"write {i}", "output": "a text", "source": "C4", "subset": "x"} for i in range(3)]
    files = {"train.json": json.dumps(rows).encode(), "val.json": json.dumps(rows[:1]).encode()}
    monkeypatch.setattr(longform, "URL", served(web, files))
    train, val = ready(LongForm())
    assert questions(train) == ["write 0", "write 1", "write 2"]
    assert "input" not in train[0].messages[0]
    assert questions(val) == ["write 0"]


def test_rows_of_others_that_cannot_be_used_are_left_out_with_a_line(web: StandIn) -> None:
    rows = alpaca(20)
    rows[7]["output"] = ""
    module = Alpaca(file_url=served(web, {"a.json": json.dumps(rows).encode()}) + "/a.json")
    opened(module)
    assert module.train_dataloader().samples == 19
    assert module.notes() == [
        f"left out 1 of 20 records: {module.download_dir}/{module.file_name}: record 8: 'output' is empty"
    ]


# Data sets of the Hub -------------------------------------------------------------------------------------------------

HUB_SCRIPT = """
import json, sys
from pathlib import Path
from litgpt import data, hub
from litgpt.errors import UserError

hub.PATIENCE = 0.1
found = {}
for name, arguments in json.loads(sys.argv[1]):
    try:
        module = getattr(data, name.split()[0])(**arguments)
        module.prepare_data()
        found[name] = [[[m["content"] for m in r.messages] for r in part] for part in module.records()]
    except UserError as error:
        found[name] = f"{error.exit_status} {error}"
print(json.dumps(found))
"""


def conversation(count: int, name: str = "") -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[i % 2], "content": f"{name}{i}"} for i in range(count)]


def test_sets_of_the_hub(web: StandIn, tmp_path: Path) -> None:
    """All in one process: the packages take the address of the Hub once, when they are imported."""
    datasets = pytest.importorskip("datasets")
    deita = {
        f"data/{split}-00000-of-00001.jsonl": lines(
            [{"prompt": "p", "prompt_id": "1", "messages": conversation(n, split)} for n in (2, 4)]
        )
        for split in ("train_sft", "test_sft")
    }
    web.push("datasets/mhenrichsen/alpaca_2k_test", {"alpaca.jsonl": lines(alpaca(50))})
    web.push("datasets/HuggingFaceH4/deita-10k-v0-sft", deita)
    web.push(
        "datasets/GAIR/lima",
        {"train.jsonl": lines([{"conversations": ["q0", "a0", "q1", "a1", "q2"], "source": "x"}] * 10)},
    )
    web.gated.add("datasets/GAIR/lima")
    web.push(
        "datasets/some/set", {"train.csv": b"question,answer\n" + b"q,a\n" * 10, "test.csv": b"question,answer\nQ,A"}
    )
    web.push("datasets/some/script", {"script.py": b"import pathlib; pathlib.Path('canary').touch()"})
    local = tmp_path / "program"
    local.mkdir()
    (local / "program.py").write_text("import pathlib; pathlib.Path('canary').touch()")
    columns = {"instruction": "question", "output": "answer"}
    asked = [
        ("Alpaca2k", {}),
        ("Deita", {}),
        ("Deita all", {"include_multiturn_conversations": True}),
        ("LIMA closed", {}),
        ("LIMA", {"access_token": TOKEN}),
        ("LIMA all", {"include_multiturn_conversations": True}),
        ("HubDataset", {"repo_id": "some/set", "columns": columns}),
        ("HubDataset test", {"repo_id": "some/set", "columns": columns, "val_split": "test"}),
        (
            "HubDataset part",
            {"repo_id": "some/set", "columns": columns, "split": "train[:3]", "val_split_fraction": 0.0},
        ),
        ("HubDataset split", {"repo_id": "some/set", "split": "trian"}),
        ("HubDataset config", {"repo_id": "some/set", "config": "none"}),
        ("HubDataset absent", {"repo_id": "some/absent"}),
        ("HubDataset name", {"repo_id": "some set/x"}),
        ("HubDataset revision", {"repo_id": "some/set", "revision": "v2"}),
        ("HubDataset script", {"repo_id": "some/script"}),
        ("HubDataset program", {"repo_id": str(local)}),
    ]
    out = run_hub(asked, tmp_path, web.url)
    found = json.loads(out)

    rows = datasets.Dataset.from_list(alpaca(50)).train_test_split(test_size=0.05, seed=42)
    for part, judge in zip(found["Alpaca2k"], (rows["train"], rows["test"]), strict=True):
        assert part == [[row["instruction"], row["output"]] for row in judge]
    assert found["Deita"] == [[[f"{s}0", f"{s}1"]] * 2 for s in ("train_sft", "test_sft")]
    assert found["Deita all"][0] == [[f"train_sft{i}", f"train_sft{i + 1}"] for i in (0, 0, 2)]
    assert found["LIMA closed"].startswith("2 GAIR/lima is gated: accept its terms at")
    assert [len(part) for part in found["LIMA"]] == [9, 1]
    assert found["LIMA"][1] == [["q0", "a0"]]
    assert [len(part) for part in found["LIMA all"]] == [18, 2]
    assert [len(part) for part in found["HubDataset"]] == [10, 0]
    assert found["HubDataset test"] == [[["q", "a"]] * 10, [["Q", "A"]]]
    assert found["HubDataset part"] == [[["q", "a"]] * 3, []]
    for name, words in {
        "split": '2 some/set cannot be read as a data set: Unknown split "trian"',
        "config": "2 some/set cannot be read as a data set: BuilderConfig 'none' not found",
        "absent": "2 some/absent is no data set of the Hub, or it is private",
        "name": "2 'some set/x' is no name of a data set (",
        "revision": "2 some/set has no revision 'v2'",
        "script": "2 some/script cannot be read as a data set: Dataset scripts are no longer supported",
        "program": f"2 {local} cannot be read as a data set: Dataset scripts are no longer supported",
    }.items():
        assert found[f"HubDataset {name}"].startswith(words)
    assert not (tmp_path / "canary").exists()
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert not any(TOKEN.encode() in path.read_bytes() for path in written)
    assert TOKEN not in out

    again = [entry for entry in asked if entry[0] in ("Alpaca2k", "Deita", "LIMA", "HubDataset test")]
    offline = json.loads(run_hub([*again, ("HubDataset new", {"repo_id": "some/new"})], tmp_path, "http://127.0.0.1:1"))
    assert {name: offline[name] for name, _ in again} == {name: found[name] for name, _ in again}
    assert offline["HubDataset new"].startswith("3 some/new could not be fetched: no network connection to")


def run_hub(asked: Any, folder: Path, endpoint: str) -> str:
    """What the modules give in a fresh process that knows the Hub at this address."""
    env = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    env |= {"HF_ENDPOINT": endpoint, "HF_HOME": str(folder / "home"), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", HUB_SCRIPT, json.dumps(asked)]
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert TOKEN not in done.stderr
    return done.stdout.splitlines()[-1]


# As a run takes them --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "style"),
    [
        (alpaca(1)[0], "alpaca"),
        ({"messages": conversation(4)}, "chatml"),
        ({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}, "chatml"),
        ({"prompt": "q", "completion": "a"}, "default"),
        ({"text": "plain"}, "default"),
    ],
)
def test_every_format_becomes_batches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, row: dict[str, Any], style: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a.jsonl").write_bytes(lines([row] * 20))
    module = JSON(Path("a.jsonl"), mask_prompt=True)
    opened(module)
    assert module.style().name == style
    assert module.notes() == ["data.val_split_fraction is not given: 0.05 of a.jsonl validates"]
    assert (module.train_dataloader().samples, module.val_dataloader().samples) == (19, 1)
    batch = next(iter(module.val_dataloader()))
    assert (batch["labels"] != -100).any()


def test_the_examples_of_the_tutorial_are_read() -> None:
    text = (ROOT / "tutorials/data.md").read_text()
    rows = re.findall(r"^\| `(\w+)`.*? \| `(\{.*?\})`[ ,]", text, re.MULTILINE)
    found = {kind: try_rows(numbered([json.loads(row)], kind), kind) for kind, row in rows}
    assert {kind: reading.records[0].kind for kind, reading in found.items()} == {kind: kind for kind in KINDS}


# On the command line --------------------------------------------------------------------------------------------------


def command(data: DataModule | None = None) -> None:
    """A command that takes data."""


def chosen(*words: str) -> Any:
    """The data module of a command line."""
    table = signature.read(command)
    return parser.arguments(table, request.read(table, words))["data"]


def test_modules_are_found_by_name_and_by_the_older_path(tmp_path: Path) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        "data:\n  class_path: litgpt.data.Alpaca2k\n  init_args: {mask_prompt: false, val_split_fraction: 0.05, "
        "prompt_style: alpaca, ignore_index: -100, seed: 42, num_workers: 4, download_dir: data/alpaca2k}\n"
    )
    assert chosen("--config", str(recipe)) == Alpaca2k(prompt_style="alpaca")
    assert chosen("--data", "Alpaca") == Alpaca()
    mine = chosen("--data", "JSON", "--data.json_path", "my.json", "--data.columns.output", "answer")
    assert mine == JSON(Path("my.json"), columns={"output": "answer"})
    with pytest.raises(InputError, match="--data JSON needs json_path"):
        chosen("--data", "JSON")
    with pytest.raises(InputError, match="did you mean 'HubDataset'"):
        chosen("--data", "HubDatasets")
    with pytest.raises(InputError, match="no data module"):
        chosen("--data", "SFT")


def test_a_token_is_neither_kept_nor_printed() -> None:
    words = ("--data", "LIMA", "--data.access_token", TOKEN)
    module = chosen(*words)
    assert TOKEN not in repr(module)
    assert [name for name, value in vars(module).items() if value == TOKEN] == ["_token"]
    table = signature.read(command)
    assert TOKEN not in parser.config_text(table, request.read(table, words))


def test_what_a_module_has_no_use_for_is_said() -> None:
    assert Alpaca2k(file_name="x", num_workers=1).without_effect() == ["data.file_name", "data.num_workers"]
