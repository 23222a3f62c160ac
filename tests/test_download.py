"""`litgpt download` against a stand-in for the Hub: whole or resumable, of one commit, a word for each refusal."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save

from litgpt import cli, hub
from litgpt.checkpoint import find
from litgpt.errors import InputError, MachineError, MissingError
from litgpt.scripts import download
from litgpt.scripts.download import SOURCE, listing, main
from litgpt.storage import MANIFEST, read_json, verify
from tests.makers.hub import Fault, StandIn, stand_in

REPO = "tiny/model"
TOKEN = "hf_canary0123456789"
WEIGHTS = random.Random(0).randbytes(600_000)
FILES = {
    "config.json": json.dumps({"model_type": "llama"}).encode(),
    "generation_config.json": b"{}",
    "tokenizer.json": b'{"a tokenizer": 1}',
    "model.safetensors": WEIGHTS,
    "README.md": b"words",
    "pytorch_model.bin": b"pickle",
    "consolidated.safetensors": b"again",
    "onnx/model.safetensors": b"elsewhere",
}
WANTED = {"config.json", "generation_config.json", "tokenizer.json", "model.safetensors"}
SHARDED = {
    "config.json": b"{}",
    "tokenizer.json": b"{}",
    "model.safetensors.index.json": b'{"weight_map": {}}',
    **{f"model-0000{i}-of-00003.safetensors": random.Random(i).randbytes(70_000) for i in (1, 2, 3)},
}


@pytest.fixture
def there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[StandIn]:
    """A running stand-in with one repository, in an empty working directory."""
    monkeypatch.chdir(tmp_path)
    for name in ("HF_TOKEN", *hub.OFFLINE, "http_proxy", "HTTP_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(hub, "FIRST_WAIT", 0.02)
    with stand_in() as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        server.push(REPO, FILES)
        yield server


def contents(directory: Path) -> dict[str, bytes]:
    ours = (MANIFEST, SOURCE)
    return {
        p.relative_to(directory).as_posix(): p.read_bytes()
        for p in directory.rglob("*")
        if p.is_file() and p.name not in ours
    }


def made(repo: str = REPO) -> Path:
    return Path("checkpoints") / repo


def nothing_made() -> bool:
    return not made().exists()


# What is fetched -----------------------------------------------------------------------------------------------------


def test_a_download_is_the_plain_directory_and_nothing_else(there: StandIn) -> None:
    main(REPO)
    assert contents(made()) == {name: FILES[name] for name in WANTED}
    assert sorted(p.name for p in made().parent.iterdir()) == ["model"]
    assert not any(path.is_symlink() for path in made().rglob("*"))
    verify(made(), full=True)
    assert find(REPO) == made()


def test_a_second_download_fetches_nothing(there: StandIn, capsys: pytest.CaptureFixture[str]) -> None:
    main(REPO)
    there.requests.clear()
    main(REPO)
    assert [r.path for r in there.requests] == [f"/api/models/{REPO}"]
    assert "already" in capsys.readouterr().out


def test_shards_come_with_their_index(there: StandIn) -> None:
    there.push("tiny/sharded", {**SHARDED, "consolidated.safetensors": b"again"})
    main("tiny/sharded", checkpoint_dir=Path("here"))
    assert contents(Path("here/tiny/sharded")) == SHARDED


def test_the_tokenizer_alone_and_later_the_rest(there: StandIn) -> None:
    main(REPO, tokenizer_only=True)
    assert contents(made()).keys() == WANTED - {"model.safetensors"}
    main(REPO)
    assert contents(made()).keys() == WANTED
    main(REPO, tokenizer_only=True)
    assert contents(made()).keys() == WANTED


def test_sizes_are_asked_for_where_the_listing_lacks_them(there: StandIn) -> None:
    there.has_sizes = False
    main(REPO)
    assert contents(made()) == {name: FILES[name] for name in WANTED}


def test_pickles_are_fetched_only_when_allowed(there: StandIn) -> None:
    files = {"config.json": b"{}", "tokenizer.json": b"{}", "pytorch_model.bin": b"pickle"}
    there.push("tiny/old", files)
    with pytest.raises(InputError, match=r"pytorch_model\.bin.*--allow_pickle"):
        main("tiny/old")
    assert not made("tiny/old").exists()
    main("tiny/old", allow_pickle=True)
    assert contents(made("tiny/old")) == files


def test_weights_are_cast_on_the_way_to_the_disk(there: StandIn) -> None:
    tensors = {"a.weight": torch.randn(5, 3), "b.e_score_correction_bias": torch.randn(4), "ids": torch.arange(3)}
    files = {"config.json": b'{"torch_dtype": "float32"}', "model.safetensors": save(tensors, {"format": "pt"})}
    there.push("tiny/wide", files)
    main("tiny/wide", dtype="bfloat16")
    found = load_file(made("tiny/wide") / "model.safetensors")
    assert torch.equal(found["a.weight"], tensors["a.weight"].bfloat16())
    assert torch.equal(found["b.e_score_correction_bias"], tensors["b.e_score_correction_bias"])
    assert torch.equal(found["ids"], tensors["ids"])
    assert read_json(made("tiny/wide") / "config.json")["torch_dtype"] == "bfloat16"
    there.requests.clear()
    main("tiny/wide", dtype="bfloat16")
    assert not there.gets(".safetensors")
    main("tiny/wide")
    assert contents(made("tiny/wide")) == files


# Trouble on the way --------------------------------------------------------------------------------------------------


def test_dropped_connections_are_gone_on_with_where_they_broke(there: StandIn) -> None:
    there.faults["model.safetensors"] = Fault(times=5, cut_at=50_001)
    main(REPO)
    assert contents(made())["model.safetensors"] == WEIGHTS
    assert there.bytes_sent("model.safetensors") == len(WEIGHTS)
    ranges = [r.headers.get("range") for r in there.gets("model.safetensors")]
    assert ranges == [None, *(f"bytes={50_001 * n}-" for n in range(1, 6))]


def test_a_server_without_ranges_is_served_from_the_start(there: StandIn) -> None:
    there.has_ranges = False
    there.faults["model.safetensors"] = Fault(times=2, cut_at=100_000)
    main(REPO)
    assert contents(made())["model.safetensors"] == WEIGHTS


def test_a_connection_that_never_holds_is_given_up_and_nothing_looks_whole(there: StandIn) -> None:
    there.faults["model.safetensors"] = Fault(times=99, cut_at=0)
    with pytest.raises(MachineError, match=f"{REPO}.*network"):
        main(REPO)
    assert nothing_made()
    with pytest.raises(MissingError) as caught:
        find(REPO)
    assert ".part" not in str(caught.value)


def command(*words: str, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "litgpt", "download", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **environment},
    )


def test_a_killed_download_is_resumed_within_a_chunk(there: StandIn) -> None:
    there.slow = 0.05
    process = command(REPO)
    deadline = time.monotonic() + 30
    while there.bytes_sent("model.safetensors") < 200_000 and time.monotonic() < deadline:
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert nothing_made()
    there.slow = 0.0
    time.sleep(0.2)
    there.requests.clear()
    main(REPO)
    assert contents(made())["model.safetensors"] == WEIGHTS
    (again,) = there.gets("model.safetensors")
    assert again.sent <= len(WEIGHTS) - 200_000 + (1 << 18)
    assert again.sent < len(WEIGHTS)


def test_a_kill_while_the_directory_is_put_together_costs_no_bytes(
    there: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(download, "_assemble", interrupted)
        with pytest.raises(KeyboardInterrupt):
            main(REPO)
    assert nothing_made()
    main(REPO)
    assert contents(made())["model.safetensors"] == WEIGHTS
    assert there.bytes_sent("model.safetensors") == len(WEIGHTS)


def test_what_a_failure_left_of_an_older_commit_is_not_mixed_in(
    there: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    there.faults["model.safetensors"] = Fault(times=1, cut_at=90_000)
    with monkeypatch.context() as patched:
        patched.setattr(hub, "TRIES", 0)
        with pytest.raises(MachineError):
            main(REPO)
    newer = {**FILES, "model.safetensors": WEIGHTS[::-1]}
    there.push(REPO, newer)
    main(REPO)
    assert contents(made()) == {name: newer[name] for name in WANTED}


def test_one_commit_only_though_the_repository_moves_on_between_shards(there: StandIn) -> None:
    first = there.push("tiny/sharded", SHARDED)

    def move_on(request: Any) -> None:
        if request.path.endswith(".safetensors") and len(there.commits["tiny/sharded"]) == 1:
            there.push("tiny/sharded", {name: content[::-1] for name, content in SHARDED.items()})

    there.after_request = move_on
    main("tiny/sharded")
    assert len(there.commits["tiny/sharded"]) == 2
    assert contents(made("tiny/sharded")) == SHARDED
    assert read_json(made("tiny/sharded") / SOURCE)["commit"] == first


def test_a_file_of_another_commit_is_refused(there: StandIn) -> None:
    there.wrong_commit = "f" * 40
    with pytest.raises(InputError, match="revision"):
        main(REPO)
    assert nothing_made()


def test_a_revision_is_fetched_and_an_unknown_one_named(there: StandIn) -> None:
    older = there.branches[REPO]
    there.push(REPO, {**FILES, "tokenizer.json": b"newer"})
    main(REPO, revision=older)
    assert contents(made())["tokenizer.json"] == FILES["tokenizer.json"]
    with pytest.raises(MissingError, match="no revision 'nope'"):
        main(REPO, revision="nope")


def test_a_newer_commit_fetches_only_what_changed(there: StandIn) -> None:
    main(REPO)
    there.push(REPO, {**FILES, "tokenizer.json": b"newer"})
    there.requests.clear()
    main(REPO)
    assert contents(made())["tokenizer.json"] == b"newer"
    assert not there.gets("model.safetensors")


def test_content_that_is_not_what_the_hub_promises_is_refused(there: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "sha256", lambda path: "0" * 64)
    with pytest.raises(MachineError, match=r"model\.safetensors.*sha256"):
        main(REPO)
    assert nothing_made()
    assert len(there.gets("model.safetensors")) == 2


def test_a_full_disk_is_told_in_numbers_before_anything_is_fetched(
    there: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = type("Usage", (), {"free": 10})
    monkeypatch.setattr(hub.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(MachineError, match=r"needs \d+ more bytes, 10 are free"):
        main(REPO)
    assert not there.gets("model.safetensors")


@pytest.mark.parametrize("name", ["mine.txt", "lit_model.pth"])
def test_what_the_user_put_there_is_never_lost(there: StandIn, name: str) -> None:
    main(REPO)
    (made() / name).write_bytes(b"precious")
    there.push(REPO, {**FILES, "tokenizer.json": b"newer"})
    with pytest.raises(InputError, match=name):
        main(REPO)
    (made() / SOURCE).unlink()
    with pytest.raises(InputError, match="was not made by litgpt download"):
        main(REPO)
    assert (made() / name).read_bytes() == b"precious"


def test_a_directory_fetched_by_other_means_is_taken_as_it_is(there: StandIn) -> None:
    made().mkdir(parents=True)
    for name in WANTED:
        (made() / name).write_bytes(FILES[name])
    main(REPO)
    assert not there.gets("model.safetensors")


# Refusals ------------------------------------------------------------------------------------------------------------


def test_a_gated_repository_names_the_page_and_the_option(there: StandIn) -> None:
    there.gated.add(REPO)
    with pytest.raises(InputError, match=rf"gated.*https://huggingface.co/{REPO}.*--access_token.*HF_TOKEN"):
        main(REPO)
    assert nothing_made()
    main(REPO, access_token=TOKEN)
    assert contents(made()).keys() == WANTED


@pytest.mark.parametrize(("status", "told"), [(401, "--access_token"), (403, "accept its terms"), (404, "not on")])
def test_other_refusals_say_what_to_do(there: StandIn, status: int, told: str) -> None:
    there.faults[REPO] = Fault(times=99, status=status)
    with pytest.raises((InputError, MissingError), match=f"{REPO}.*{told}"):
        main(REPO)
    assert len(there.requests) == 1


def test_an_unknown_repository_names_the_nearest_known_one(there: StandIn) -> None:
    with pytest.raises(MissingError, match="did you mean 'EleutherAI/pythia-14m'"):
        main("EleutherAI/pithia-14m")


def test_retry_after_is_honoured(there: StandIn) -> None:
    there.faults = {
        REPO: Fault(times=1, status=429, headers={"Retry-After": "1"}),
        "model.safetensors": Fault(times=1, status=429, headers={"Retry-After": "1"}),
    }
    began = time.monotonic()
    main(REPO)
    assert time.monotonic() - began >= 2
    assert contents(made()).keys() == WANTED


def test_a_wait_longer_than_anybody_has_is_told_in_seconds(there: StandIn) -> None:
    there.faults[REPO] = Fault(times=1, status=429, headers={"Retry-After": "3600"})
    with pytest.raises(MachineError, match="3600 s"):
        main(REPO)


@pytest.mark.parametrize("where", [REPO, "model.safetensors"])
def test_a_busy_hub_is_asked_again_and_then_given_up(there: StandIn, where: str) -> None:
    there.faults[where] = Fault(times=3, status=503)
    main(REPO)
    assert contents(made()).keys() == WANTED
    there.push(REPO, {**FILES, "model.safetensors": WEIGHTS[::-1]})
    there.faults[where] = Fault(times=99, status=503)
    with pytest.raises(MachineError, match="HTTP 503"):
        main(REPO)
    assert contents(made())["model.safetensors"] == WEIGHTS


@pytest.mark.usefixtures("there")
def test_without_a_network_it_is_one_line_with_status_3(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    began = time.monotonic()
    assert cli.main(["download", "foo/bar"]) == 3
    assert time.monotonic() - began < 10
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "foo/bar" in error
    assert "network" in error


def test_offline_mode_never_touches_the_network(there: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(MissingError, match=r"tiny/model lacks config.json, the tokenizer, the weights.*HF_HUB_OFFLINE"):
        main(REPO)
    assert not there.requests
    monkeypatch.delenv("HF_HUB_OFFLINE")
    main(REPO)
    there.requests.clear()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    main(REPO)
    assert not there.requests


# The token -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("given", ["option", "environment"])
def test_the_token_reaches_the_hub_and_nobody_else(there: StandIn, given: str, tmp_path: Path) -> None:
    there.gated.add(REPO)
    with stand_in() as elsewhere:
        elsewhere.commits, elsewhere.branches = there.commits, there.branches
        there.storage = elsewhere.url.replace("127.0.0.1", "localhost")
        words = [REPO, "--access_token", TOKEN] if given == "option" else [REPO]
        process = command(*words, HF_TOKEN=TOKEN if given == "environment" else "")
        out, err = process.communicate(timeout=180)
        assert process.returncode == 0, err
        assert elsewhere.gets("model.safetensors")
        assert not any("authorization" in r.headers for r in elsewhere.requests)
    assert all(r.headers["authorization"] == f"Bearer {TOKEN}" for r in there.gets("model.safetensors"))
    assert TOKEN not in out + err
    assert not any(TOKEN.encode() in p.read_bytes() for p in tmp_path.rglob("*") if p.is_file())


def test_a_token_that_cannot_be_sent_is_refused_unseen(there: StandIn) -> None:
    with pytest.raises(InputError, match="access token") as caught:
        main(REPO, access_token=f"{TOKEN}\u00e9")
    assert TOKEN not in str(caught.value)


# The command ---------------------------------------------------------------------------------------------------------


def test_options_that_lost_their_meaning_are_accepted_with_a_warning(
    there: StandIn, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--convert_checkpoint", "false", "--model_name", "pythia-14m", "--tokenizer_only", "true"]
    assert cli.main(["download", REPO, *words]) == 0
    error = capsys.readouterr().err
    assert "convert_checkpoint has no effect" in error
    assert "model_name has no effect" in error


@pytest.mark.parametrize("repo", ["../evil", "a/b/c", "/etc/passwd", "a/..", "noslash", ""])
def test_a_name_that_is_no_repository_is_refused(there: StandIn, repo: str) -> None:
    with pytest.raises(InputError, match="ORG/NAME"):
        main(repo)
    assert not there.requests


def test_a_model_is_found_by_its_own_name(there: StandIn) -> None:
    there.push("EleutherAI/pythia-14m", FILES)
    main("pythia-14m")
    assert contents(made("EleutherAI/pythia-14m")).keys() == WANTED


@pytest.mark.parametrize("dtype", ["bf16", "int8"])
def test_an_unknown_dtype_is_refused_before_anything_is_fetched(there: StandIn, dtype: str) -> None:
    with pytest.raises(InputError, match=f"{dtype}.*bfloat16"):
        main(REPO, dtype=dtype)
    assert not there.requests


def test_a_model_that_litgpt_cannot_run_is_said_so(there: StandIn, capsys: pytest.CaptureFixture[str]) -> None:
    there.push("tiny/other", {**FILES, "config.json": b'{"model_type": "mamba9"}'})
    main("tiny/other")
    assert "mamba9" in capsys.readouterr().err


def test_the_list_is_grouped_searchable_and_narrow() -> None:
    whole = listing().splitlines()
    assert max(map(len, whole)) <= 80
    assert "  EleutherAI/pythia-14m" in whole
    assert listing("MATHSTRAL").splitlines()[:2] == ["mistral (1)", "  mistralai/mathstral-7B-v0.1"]
    assert "gemma2 (" in listing("gemma2")
    with pytest.raises(MissingError, match="pythai"):
        listing("pythai")


@pytest.mark.parametrize("words", [[], ["list"], ["list", "qwen"]])
def test_the_list_loads_neither_torch_nor_the_hub(words: list[str]) -> None:
    code = f"import sys; from litgpt.cli import main; assert main({['download', *words]}) == 0; "
    code += "sys.exit(bool({'torch', 'huggingface_hub'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0


def test_a_closed_pipe_ends_the_list_quietly() -> None:
    process = command("list")
    assert process.stdout is not None
    process.stdout.close()
    assert process.stderr is not None
    assert process.stderr.read() == ""
    assert process.wait(20) in (0, 141)
