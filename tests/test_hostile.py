"""Hostile files run nothing, connect nowhere and open nothing outside their directory: Python's own audit watches."""

import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.makers.checkpoints import edit_json, make_hf_checkpoint
from tests.makers.configs import shrunk
from tests.makers.tokenizers import train_tiny_tokenizer

WATCHED = """
import os, sys
seen = []
FORBIDDEN = ("os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "subprocess.Popen", "socket.connect")
from litgpt import cli  # what importing does is not watched
import litgpt.generate.base, litgpt.generate.session, litgpt.prompts, tokenizers, jinja2.sandbox, safetensors
for line in sys.stdin:
    directory = line.strip()
    if (child := os.fork()) == 0:  # a process for each directory
        for number, name in ((1, "out"), (2, "err")):
            os.dup2(os.open(f"{directory}.{name}", os.O_WRONLY | os.O_CREAT, 0o600), number)
        sys.addaudithook(lambda event, args: seen.append(f"{event} {args}"[:200])
                         if event.startswith(FORBIDDEN) or (event == "open" and "secret" in str(args[0])) else None)
        status = cli.main(["generate", directory, "--prompt", "a", "--max_new_tokens", "2"])
        print("SEEN", seen)
        sys.exit(status)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class Bomb:
    """A pickle of it leaves a file behind when it is opened carelessly."""

    def __init__(self, canary: Path) -> None:
        self.command = f"touch {canary}"

    def __reduce__(self):
        return os.system, (self.command,)


def without_safetensors(directory: Path) -> None:
    (directory / "model.safetensors").unlink()


def pickled_bin(directory: Path, canary: Path) -> None:
    without_safetensors(directory)
    torch.save({"x": Bomb(canary)}, directory / "pytorch_model.bin")


def raw_pickle(directory: Path, canary: Path) -> None:
    without_safetensors(directory)
    (directory / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb(canary)))


def lit_model(directory: Path, canary: Path) -> None:
    without_safetensors(directory)
    torch.save({"model": Bomb(canary)}, directory / "lit_model.pth")


def template(directory: Path, canary: Path) -> None:
    reach = "{{ ''.__class__.__mro__[1].__subclasses__() }}{{ cycler.__init__.__globals__.os.system('touch %s') }}"
    (directory / "chat_template.jinja").write_text(reach % canary)


def lipsum(directory: Path, canary: Path) -> None:
    text = f"{{{{ lipsum.__globals__['os'].popen('touch {canary}').read() }}}}"
    edit_json(directory / "tokenizer_config.json", chat_template=text)


def yaml_tag(directory: Path, canary: Path) -> None:
    (directory / "config.json").unlink()
    (directory / "model_config.yaml").write_text(f"name: !!python/object/apply:os.system ['touch {canary}']\n")


def style_class(directory: Path, canary: Path) -> None:
    style = {"class_path": "subprocess.Popen", "init_args": {"args": ["touch", str(canary)]}}
    (directory / "prompt_style.yaml").write_text(json.dumps(style))  # JSON is YAML


def style_tag(directory: Path, canary: Path) -> None:
    (directory / "prompt_style.yaml").write_text(f"!!python/object/apply:os.system ['touch {canary}']\n")


def index_traversal(directory: Path, canary: Path) -> None:
    without_safetensors(directory)
    shards = {"weight_map": {"gpt_neox.embed_in.weight": "../secret.safetensors"}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(shards))


def linked(name: str):
    def attack(directory: Path, canary: Path) -> None:
        (directory / name).unlink()
        (directory / name).symlink_to(directory.parent / "secret")

    attack.__name__ = f"linked_{name.partition('.')[0]}"
    return attack


ATTACKS = [
    pickled_bin, raw_pickle, lit_model, template, lipsum, yaml_tag, style_class, style_tag, index_traversal,
    linked("model.safetensors"), linked("config.json"), linked("tokenizer.json"),
]  # fmt: skip


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    home = tmp_path_factory.mktemp("hostile")
    config = shrunk("pythia-14m", vocab_size=300, padded_vocab_size=320)
    return make_hf_checkpoint(home / "T", config, tokenizer_dir=train_tiny_tokenizer(home / "tokenizer"))


class Watch:
    """A Python that has imported all, and goes into each directory that it is told of in a process of its own."""

    def __init__(self) -> None:
        self.python = subprocess.Popen(
            [sys.executable, "-c", WATCHED], stdin=-1, stdout=-1, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
        )

    def __call__(self, directory: Path) -> tuple[int, str, str]:
        """The exit status, and what was said on both streams."""
        assert self.python.stdin is not None
        assert self.python.stdout is not None
        print(directory, file=self.python.stdin, flush=True)
        status = int(self.python.stdout.readline())
        out, err = (directory.with_name(f"{directory.name}.{name}").read_text() for name in ("out", "err"))
        return status, out, err


@pytest.fixture(scope="module")
def watch():
    watch = Watch()
    yield watch
    watch.python.communicate()


def test_the_watch_sees_nothing_in_an_honest_directory(whole, watch):
    status, out, err = watch(whole)
    assert status == 0, err
    assert "SEEN []" in out


def test_the_watch_sees_what_is_opened_in_secret(whole, tmp_path, watch):
    directory = Path(shutil.copytree(whole, tmp_path / "secret"))
    _, out, _ = watch(directory)
    assert "config.json" in out.partition("SEEN")[2]


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.__name__)
def test_a_hostile_file_is_one_line_and_nothing_more(whole, tmp_path, attack, watch):
    canary = tmp_path / "canary"
    (tmp_path / "secret").write_text("{}")
    (tmp_path / "secret.safetensors").write_text("{}")
    directory = Path(shutil.copytree(whole, tmp_path / "T"))
    attack(directory, canary)

    status, out, err = watch(directory)

    assert not canary.exists()
    assert "SEEN []" in out
    assert status == 2, err
    assert err.strip().splitlines()[-1].startswith("error: ")
    assert "Traceback" not in err
