"""`litgpt merge_lora`: the model it makes, what it keeps, and what is left when it is killed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from litgpt import adapters, checkpoint, cli, storage
from litgpt.config import Config
from litgpt.errors import InputError, MissingError
from litgpt.methods import lora
from litgpt.methods.lora import LoRA
from litgpt.model import GPT
from litgpt.scripts import merge_lora
from tests.makers.checkpoints import CONFIGS, random_gpt
from tests.makers.methods import METHODS, disturb, finetuned, logits
from tests.makers.tokenizers import train_tiny_tokenizer
from tests.test_adapters import SWITCHES, close, in_05, opened_by_peft, random_tensors
from tests.test_weights import require_same_tensors

LLAMA = CONFIGS["llama"]
pytestmark = pytest.mark.filterwarnings("ignore:.*(save_embedding_layers|tie_word_embeddings)")


@pytest.fixture(autouse=True)
def quiet(capsys: pytest.CaptureFixture) -> Any:
    yield
    capsys.readouterr()


def unmerged(folder: Path, name: str = "llama", method: str = "lora-everywhere", **said: Any) -> tuple[Path, GPT]:
    """`folder/final` with an adapter, beside its base; and the model it came from."""
    config = CONFIGS[name]
    tokenizer = train_tiny_tokenizer(folder / "tokenizer", 96)
    base = checkpoint.write(folder / "base", config, random_gpt(config), tokenizer_dir=tokenizer)
    model = finetuned(config, METHODS[method])
    options: dict[str, Any] = {"base": base, "merged": False, "tokenizer_dir": tokenizer, "hyperparameters": said}
    return adapters.write(folder / "final", config, METHODS[method], model, **options), model


def files(directory: Path) -> dict[str, bytes]:
    return {p.relative_to(directory).as_posix(): p.read_bytes() for p in directory.rglob("*") if p.is_file()}


@pytest.mark.parametrize("method", ["lora-everywhere", "dora"])
@pytest.mark.parametrize("name", ["llama", "gemma", "phi3", "deepseek_v3"])
def test_the_merged_model_is_the_adapted_one_for_all_who_open_it(name: str, method: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    final, model = unmerged(tmp_path, name, method, lora_r=4)
    before = files(final)
    merge_lora.main(final)

    storage.verify(final, full=True)
    kept = files(final)
    for file in before.keys() - {storage.MANIFEST, "model_config.yaml", "generation_config.json"}:
        assert kept[file] == before[file], file
    assert adapters.find(final) is None
    state = lora.merged_state(model)
    require_same_tensors(dict(checkpoint.load_model(final).state_dict()), {key: state[key] for key in state})
    close(checkpoint.load_model(final), logits(model))
    close(AutoModelForCausalLM.from_pretrained(final), logits(model))
    close(adapters.load_model(final / "adapter"), logits(model))


def test_merging_again_changes_nothing_and_another_adapter_everything(tmp_path: Path) -> None:
    final, _ = unmerged(tmp_path)
    merge_lora.main(final)
    once = files(final)
    merge_lora.main(final / "adapter")
    assert files(final) == once
    other = finetuned(LLAMA, METHODS["lora"], seed=7)
    adapters.write(final, LLAMA, METHODS["lora"], other, base=tmp_path / "base", merged=False, overwrite=True)
    merge_lora.main(final)
    close(checkpoint.load_model(final), logits(other))


def test_a_directory_of_peft_becomes_a_model_with_its_adapter_one_level_down(tmp_path: Path) -> None:
    final, model = unmerged(tmp_path)
    bare = tmp_path / "bare"
    shutil.copytree(final / "adapter", bare)
    (bare / "README.md").write_text("mine")
    merge_lora.main(bare)
    close(checkpoint.load_model(bare), logits(model))
    assert not list(bare.glob("adapter_*"))  # transformers would apply it once more
    assert (bare / "README.md").read_text() == "mine"
    assert (bare / "tokenizer.json").is_file()
    close(opened_by_peft(bare, tmp_path / "base"), logits(model))


def test_a_result_of_05_is_merged_where_it_lies(tmp_path: Path) -> None:
    tensors = random_tensors(
        {f"transformer.h.{n}.attn.proj.lora_{m}": (3, 32)[:: 1 if m == "A" else -1] for n in (0, 1) for m in "AB"}
    )
    switches = SWITCHES | {"lora_projection": True}
    old = in_05(tmp_path, LLAMA, tensors, ".lora", lora_r=3, lora_alpha=6, **switches)
    expected = logits(adapters.load_model(old, merge=False).eval())
    assert cli.main(["merge_lora", str(old)]) == 0
    close(checkpoint.load_model(old), expected)
    assert (old / "lit_model.pth.lora").is_file()
    assert yaml.safe_load((old / "hyperparameters.yaml").read_text())["lora_r"] == 3


def test_a_base_that_moved_is_given(tmp_path: Path) -> None:
    final, model = unmerged(tmp_path)
    shutil.move(tmp_path / "base", tmp_path / "elsewhere")
    before = files(final)
    with pytest.raises(MissingError, match=f"{tmp_path / 'base'}.*--pretrained_checkpoint_dir"):
        merge_lora.main(final)
    assert files(final) == before
    merge_lora.main(final, tmp_path / "elsewhere")
    close(checkpoint.load_model(final), logits(model))


def test_the_precision_is_that_of_the_base_or_the_one_given(tmp_path: Path) -> None:
    final, model = unmerged(tmp_path)
    merge_lora.main(final, precision="bf16-true")
    assert {t.dtype for t in load_file(final / "model.safetensors").values()} == {torch.bfloat16}
    torch.testing.assert_close(logits(checkpoint.load_model(final)).float(), logits(model), rtol=0, atol=0.1)
    merge_lora.main(final)
    assert {t.dtype for t in load_file(final / "model.safetensors").values()} == {torch.float32}
    with pytest.raises(InputError, match="precision 'bf16' is not known"):
        merge_lora.main(final, precision="bf16")


def test_onto_a_quantized_base_when_asked_to(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    base = checkpoint.write(tmp_path / "base", LLAMA, random_gpt(LLAMA))
    model = checkpoint.load_model(base, quantize="bnb.nf4")
    LoRA().attach(model)
    expected = logits(disturb(model).eval())
    said = {"quantize": "bnb.nf4"}
    final = adapters.write(tmp_path / "q", LLAMA, LoRA(), model, base=base, merged=False, hyperparameters=said)
    merge_lora.main(final)
    assert "--quantize bnb.nf4 merges it into what it was trained on" in capsys.readouterr().out
    assert not torch.allclose(logits(checkpoint.load_model(final)), expected, atol=1e-3)
    merge_lora.main(final, quantize="bnb.nf4")
    assert "--quantize" not in capsys.readouterr().out
    close(checkpoint.load_model(final), expected)


def test_what_is_no_lora_is_refused(tmp_path: Path) -> None:
    final, _ = unmerged(tmp_path, method="adapter_v2")
    with pytest.raises(InputError, match="a result of finetune_adapter_v2, which no plain model can hold"):
        merge_lora.main(final)
    with pytest.raises(InputError, match=r"has no LoRA weights .*; give a result of finetune_lora"):
        merge_lora.main(tmp_path / "base")
    with pytest.raises(MissingError, match="no checkpoint at"):
        merge_lora.main(tmp_path / "nowhere")


# Merges in a forked child that dies at its n-th change to the file system, for every n.
KILLED = """
import io, os, sys
from contextlib import redirect_stdout
from pathlib import Path
import torch
from litgpt import adapters, checkpoint, storage
from litgpt.scripts import merge_lora

torch.set_num_threads(1)
home = Path(sys.argv[1])
final, seen = home / "final", 0

def merge():
    with redirect_stdout(io.StringIO()):
        merge_lora.main(final)

def strike_at(n):
    def count(event, args):
        global seen
        changes = ["os.mkdir", "os.rename", "fsync", "os.remove", "os.rmdir", "shutil.rmtree"]
        if event in changes or (event == "open" and args[2] & os.O_ACCMODE):
            seen += 1
            if seen == n:
                os._exit(137)
    fsync = os.fsync
    os.fsync = lambda descriptor: (sys.audit("fsync"), fsync(descriptor))
    sys.addaudithook(count)

os.system(f"cp -r '{final}' '{home}/pristine'")
merge()  # everything is imported
whole = (final / "model.safetensors").read_bytes()
for n in range(1, 1000, int(sys.argv[2])):
    os.system(f"rm -r '{final}'; cp -r '{home}/pristine' '{final}'")
    child = os.fork()
    if child == 0:
        strike_at(n)
        merge()
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, 137), status
    place = checkpoint.find(final)
    storage.verify(place, full=True)
    if adapters.find(final) is None:
        found = "new"
        assert (final / "model.safetensors").read_bytes() == whole
    else:
        found = "old"
        assert not (final / "model.safetensors").exists()
    print(found)
    merge()
    assert (final / "model.safetensors").read_bytes() == whole
    assert not [p.name for p in home.iterdir() if p.name.endswith((".new", ".old"))]
    if status == 0:
        break
"""


def test_the_directory_of_a_run_points_to_its_result(tmp_path: Path) -> None:
    (tmp_path / "final").mkdir()
    (tmp_path / "final" / "model_config.yaml").write_text("name: x")
    for read in (merge_lora.main, Config.from_checkpoint):
        with pytest.raises((InputError, MissingError), match=rf"did you mean '{tmp_path}/final'"):
            read(tmp_path)


def test_killed_at_any_change_it_leaves_the_old_or_the_new_and_a_rerun_repairs(tmp_path: Path) -> None:
    unmerged(tmp_path)
    command = [sys.executable, "-c", KILLED, str(tmp_path), "2"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    lines = done.stdout.split()
    assert len(lines) > 8
    assert lines[0] == "old"
    assert lines[-1] == "new"
    assert lines == sorted(lines, reverse=True)


def test_an_adapter_that_is_not_finite_is_not_merged(tmp_path: Path) -> None:
    final, _ = unmerged(tmp_path)
    file = adapters.adapter_in(final).file  # type: ignore[union-attr]
    tensors = load_file(file)
    tensors[min(tensors)][0, 0] = torch.nan
    save_file(tensors, file, {"format": "pt"})
    before = files(final)
    with pytest.raises(InputError, match=r"adapter_model\.safetensors: its weights for .*lora_.* are not finite"):
        merge_lora.main(final)
    assert files(final) == before
