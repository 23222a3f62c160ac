"""The README's commands, run as they stand there on a text of one's own; only the training is cut short."""

import importlib
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from litgpt import parser, request, signature
from litgpt.commands import COMMANDS

ROOT = Path(__file__).parents[1]
SHORT_RUN = " --train.max_steps 3 --train.lr_warmup_steps 1 --train.save_interval 0"
SHORTER = {
    "litgpt pretrain": SHORT_RUN,
    "litgpt finetune": f"{SHORT_RUN} --train.max_seq_length 64 --eval.max_new_tokens 4",
}
ANSWERS = [{"instruction": f"What is {i} and one?", "output": f"It is {i + 1}."} for i in range(24)]


def commands() -> list[str]:
    """The lines of the blocks that are marked as tested, continuation lines joined."""
    blocks = re.findall(r"<!-- tested -->\n```bash\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len(blocks) == 2, "the README has no tested blocks"
    return "".join(blocks).replace("\\\n", " ").strip().splitlines()


def test_the_readme_leads_from_a_text_to_a_model_one_can_talk_to(tmp_path):
    text = (ROOT / "config_hub/pretrain/quickstart/text.txt").read_text()
    (tmp_path / "my_text").mkdir()
    (tmp_path / "my_text" / "mine.txt").write_text(text[:120_000])
    (tmp_path / "my_answers.json").write_text(json.dumps(ANSWERS))
    (tmp_path / "config_hub").symlink_to(ROOT / "config_hub")
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    for command in commands():
        shorter = next((more for start, more in SHORTER.items() if command.startswith(start)), "")
        done = subprocess.run(
            command + shorter, shell=True, cwd=tmp_path, input="Ada\n", capture_output=True, text=True,
            env=os.environ | {"PATH": path, "PYTHONPATH": str(ROOT)},
        )  # fmt: skip
        assert done.returncode == 0, f"{command}\n{done.stderr}"
        assert "Traceback" not in done.stderr
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from litgpt.checkpoint import load_model

    final = tmp_path / "out/mine/tuned/final"
    theirs, ours = AutoModelForCausalLM.from_pretrained(final), load_model(final)
    ids = AutoTokenizer.from_pretrained(final)("Once upon a time", return_tensors="pt").input_ids
    with torch.no_grad():
        torch.testing.assert_close(ours(ids), theirs(ids).logits, atol=1e-4, rtol=1e-4)


DOCUMENTS = (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "tutorials").glob("*.md")))


def typed(document: Path) -> list[list[str]]:
    """The words after `litgpt` of every command that a document shows, in a block or within a line."""
    text = document.read_text().replace("\\\n", " ")
    blocks = re.findall(r"```(?:bash|console)\n(.*?)```", text, re.DOTALL)
    lines = [*re.findall(r"`(litgpt [^`]+)`", text), *"".join(blocks).splitlines()]
    found = (re.search(r"(?:^|\s)litgpt ([a-z_]+\b.*?)(?: #| [|>] |$)", line) for line in lines)
    return [[word for word in shlex.split(match[1]) if word != "..."] for match in found if match]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda document: document.stem)
def test_the_commands_in_the_documents_are_taken(document, monkeypatch):
    monkeypatch.chdir(ROOT)
    for action, *words in typed(document):
        assert action in COMMANDS, f"{document.name}: litgpt {action}"
        target = COMMANDS[action][0]
        if {"mine.yaml", "my_module.Riddles"}.isdisjoint(words):  # those are the reader's own
            module, _, name = target.partition(":")
            table = signature.read(getattr(importlib.import_module(module), name))
            asked = request.read(table, words)
            parser.config_text(table, asked)  # refuses what it does not know
            assert asked.warnings == [], document.name


def test_the_list_of_tutorials_names_all_of_them():
    pages = {document.name for document in DOCUMENTS if document.parent.name == "tutorials"}
    listed = re.findall(r"\]\(([\w.]+)\)", (ROOT / "tutorials" / "README.md").read_text())
    assert sorted(listed) == sorted(pages - {"README.md"})


def test_every_file_that_the_documents_point_to_is_there():
    for document in DOCUMENTS:
        for target in re.findall(r"\]\(([^)#:]+)\)", document.read_text()):
            assert (document.parent / target).exists(), f"{document.name} points to {target}"


def test_the_page_of_families_says_what_the_tests_verify():
    from tests.makers import families_table

    assert families_table.PLACE.read_text() == families_table.page(), "run: python -m tests.makers.families_table"
