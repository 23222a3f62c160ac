"""To LitGPT 0.5 and back, and training checkpoints cut down: the same bytes, or one line and nothing left behind."""

from __future__ import annotations

import json
import os
import pickletools
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
import yaml

from litgpt import checkpoint, cli, storage
from litgpt.config import Config
from litgpt.errors import InputError, MachineError
from litgpt.scripts import convert_from_litgpt, convert_pretrained_checkpoint, convert_to_litgpt
from litgpt.scripts.convert_to_litgpt import KEYS, fields_of_05
from tests.makers.checkpoints import CONFIGS, edit_json, make_hf_checkpoint, make_litgpt_checkpoint, random_gpt
from tests.makers.configs import NAMES, shrunk
from tests.makers.tokenizers import EOS, train_tiny_tokenizer
from tests.test_weights import Canary, hf_files, require_same_tensors

LLAMA = "Llama-2-7b-hf"
YARN = {"factor": 4.0, "beta_fast": 32, "beta_slow": 1, "original_max_seq_len": 16}
BEYOND_05 = "deepseek_v3-no-query-latent"
IDS = torch.arange(40).remainder(96).view(2, 20)
pytestmark = pytest.mark.filterwarnings("ignore:.*config.json beside it")


@pytest.fixture(autouse=True)
def quiet(capsys):
    yield
    capsys.readouterr()


def tree(directory: Path) -> dict[str, bytes]:
    return {str(p.relative_to(directory)): p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()}


def written(directory: Path, name: str = LLAMA, **options) -> Path:
    return checkpoint.write(directory, shrunk(name), random_gpt(shrunk(name)), **options)


def lit_state(directory: Path) -> dict[str, torch.Tensor]:
    return torch.load(directory / "lit_model.pth", weights_only=True)


def alone(directory: Path, *names: str) -> Path:
    """A copy of the two files that LitGPT 0.5 needs, and of those in `names`."""
    place = directory.with_name(f"{directory.name}-alone")
    place.mkdir()
    for name in ("lit_model.pth", "model_config.yaml", *names):
        shutil.copyfile(directory / name, place / name)
    return place


def run(program: str, *args: object, **environment: str) -> str:
    command = [sys.executable, "-c", program, *map(str, args)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


# ------------------------------------------------------------------------------------------------- there and back


@pytest.mark.parametrize("form", ["fp32", "bf16 shards"])
@pytest.mark.parametrize("name", [name for name in CONFIGS if name != BEYOND_05])
def test_there_and_back_are_the_same_bytes(tmp_path, name, form):
    dtype = torch.float32 if form == "fp32" else torch.bfloat16
    size = "20KB" if "shards" in form else "1GB"
    source = make_hf_checkpoint(tmp_path / "hf", CONFIGS[name], dtype=dtype, max_shard_size=size)
    convert_to_litgpt.main(source)
    convert_from_litgpt.main(alone(source, "config.json"), tmp_path / "back")
    require_same_tensors(hf_files(tmp_path / "back"), hf_files(source))
    before, after = (Config.from_checkpoint(place) for place in (source, tmp_path / "back"))
    assert not before.differences(after)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("name", ["pythia-14m", LLAMA])
def test_a_tied_head_is_a_copy_there_and_tied_again_after(tmp_path, name, tied):
    source = make_hf_checkpoint(tmp_path / "hf", shrunk(name, tie_embeddings=tied))
    convert_to_litgpt.main(source)
    state = lit_state(source)
    assert torch.equal(state["lm_head.weight"], state["transformer.wte.weight"]) == tied
    assert state["lm_head.weight"].data_ptr() != state["transformer.wte.weight"].data_ptr()
    for place in (source, alone(source, "config.json")):
        convert_from_litgpt.main(place, tmp_path / f"back-{place.name}")
        require_same_tensors(hf_files(tmp_path / f"back-{place.name}"), hf_files(source))


@pytest.mark.parametrize("name", ["Gemma-2-2b", "OLMo-1B-hf", "Llama-3.2-1B", "falcon-7b", "Qwen3-0.6B"])
def test_what_0_5_wrote_opens_in_transformers_with_equal_logits(tmp_path, name):
    from transformers import AutoModelForCausalLM

    source = make_litgpt_checkpoint(tmp_path / "lit", name)
    fields = yaml.safe_load((source / "model_config.yaml").read_text())
    (source / "model_config.yaml").write_text(yaml.safe_dump({key: fields[key] for key in KEYS}))
    convert_from_litgpt.main(source, tmp_path / "hf")
    judge, report = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not any(report.values()), report
    with torch.no_grad():
        torch.testing.assert_close(judge(IDS).logits, random_gpt(shrunk(name))(IDS), atol=2e-5, rtol=1e-4)


def test_tokenizer_token_ids_and_prompt_style_come_along(tmp_path):
    from transformers import AutoTokenizer, GenerationConfig

    source = make_litgpt_checkpoint(tmp_path / "lit", LLAMA)
    train_tiny_tokenizer(source, 96)
    (source / "prompt_style.yaml").write_text("class_path: litgpt.prompts.Alpaca\n")
    (source / "generation_config.json").write_text('{"eos_token_id": [0, 7], "temperature": 0.6}')
    (tmp_path / "out").mkdir()  # an empty one is filled
    convert_from_litgpt.main(source, tmp_path / "out")
    assert "### Instruction" in AutoTokenizer.from_pretrained(tmp_path / "out").chat_template
    assert AutoTokenizer.from_pretrained(tmp_path / "out").eos_token == EOS
    assert GenerationConfig.from_pretrained(tmp_path / "out").eos_token_id == [0, 7]
    storage.verify(tmp_path / "out", full=True)


def test_token_ids_of_the_config_files_are_kept_without_a_tokenizer(tmp_path):
    source = make_hf_checkpoint(tmp_path / "hf", LLAMA)
    edit_json(source / "config.json", eos_token_id=[3, 4], bos_token_id=2)
    (source / "generation_config.json").unlink()
    convert_from_litgpt.main(source, tmp_path / "out")
    for name in ("config.json", "generation_config.json"):
        kept = json.loads((tmp_path / "out" / name).read_text())
        assert (kept["eos_token_id"], kept["bos_token_id"]) == ([3, 4], 2)


# --------------------------------------------------------------------------------------------- what LitGPT 0.5 reads


def test_lit_model_pth_is_a_plain_state_dict_in_the_format_of_torch_save(tmp_path):
    source = make_hf_checkpoint(tmp_path / "hf", LLAMA)
    convert_to_litgpt.main(source)
    state = lit_state(source)
    assert type(state) is dict
    require_same_tensors(state, dict(checkpoint.load_model(source).state_dict()))
    assert all(tensor.is_contiguous() for tensor in state.values())
    torch.save(state, tmp_path / "judge.pth")
    ours, theirs = opcodes(source / "lit_model.pth"), opcodes(tmp_path / "judge.pth")
    assert ours == theirs
    mapped = torch.load(source / "lit_model.pth", mmap=True, weights_only=True)
    assert all(tensor.data_ptr() % 64 == 0 for tensor in mapped.values())
    with zipfile.ZipFile(source / "lit_model.pth") as archive:
        assert archive.testzip() is None  # every record has its checksum


def opcodes(path: Path) -> set[str]:
    """The globals that a file of tensors names."""
    with zipfile.ZipFile(path) as archive:
        pickled = archive.read(next(name for name in archive.namelist() if name.endswith("data.pkl")))
    return {str(arg) for opcode, arg, _ in pickletools.genops(pickled) if opcode.name == "GLOBAL"}


@pytest.mark.parametrize("name", NAMES)
def test_model_config_yaml_says_what_0_5_needs_in_its_own_keys(name):
    config = Config.from_name(name)
    kinds = config.rope_adjustments or {}
    if "long_factor" in kinds or "beta_fast" in kinds:
        with pytest.raises(InputError, match=r"LitGPT 0\.5 has no (longrope|YaRN)"):
            fields_of_05(config)
        return
    fields = fields_of_05(config)
    assert sorted(fields) == sorted(KEYS)
    assert fields["name"] == config.name
    # it computes the norms by these two words, and biases by these two fields
    assert ("Gemma" in fields["name"]) == config.norm_unit_offset
    if config.norm_class_name == "LayerNorm":
        assert ("OLMo" in fields["name"]) != config.norm_affine
    assert (fields["bias"], fields["bias"] or fields["attn_bias"]) == (config.proj_bias, config.qkv_bias)
    assert fields["bias"] == config.has_mlp_bias


@pytest.mark.parametrize(
    ("base", "name", "expected"),
    [
        ("Gemma-2-2b", "my-tune", "Gemma-my-tune"),
        ("Gemma-2-2b", "", "Gemma"),
        ("OLMo-1B-hf", "tune", "OLMo-tune"),
        (LLAMA, "NotGemma", "Notgemma"),
        ("stablelm-3b-4e1t", "OLMo-like", "olmo-like"),
        ("OLMo-2-1124-7B", "OLMo-2-mine", "OLMo-2-mine"),
    ],
)
def test_a_renamed_model_gets_a_name_by_which_0_5_computes_its_norms(base, name, expected):
    assert fields_of_05(shrunk(base, name=name, hf_config={}))["name"] == expected


@pytest.mark.parametrize(
    ("base", "changes", "word"),
    [
        (LLAMA, {"clip_qkv": 8.0}, "clip_qkv: 8.0"),
        ("pythia-14m", {"norm_bias": False}, "norm_bias: False"),
        (LLAMA, {"attn_proj_bias": True}, "bias on some linears only"),
        (LLAMA, {"mlp_bias": True}, "mlp with"),
        ("Mixtral-8x7B-v0.1", {"softmax_topk_norm": False}, "softmax_topk_norm: False"),
        (LLAMA, {"rope_adjustments": YARN}, "YaRN"),
    ],
)  # fmt: skip
def test_a_switch_that_0_5_lacks_is_refused_by_name(base, changes, word):
    with pytest.raises(InputError, match=f"LitGPT 0.5 has no .*{word}"):
        fields_of_05(shrunk(base, **changes))


def test_the_switch_is_refused_before_anything_is_written(tmp_path):
    source = make_hf_checkpoint(tmp_path / "hf", CONFIGS[BEYOND_05])
    before = tree(source)
    with pytest.raises(InputError, match="q_lora_rank"):
        convert_to_litgpt.main(source)
    assert tree(source) == before


def test_what_the_manifest_lists_stays_true_and_nothing_changes_for_us(tmp_path):
    source = written(tmp_path / "out", "Gemma-2-2b")
    model = checkpoint.load_model(source).state_dict()
    for dtype in (None, "bfloat16"):
        convert_to_litgpt.main(source, dtype=dtype)
        storage.verify(source, full=True)
        assert "model_config.yaml" in json.loads((source / storage.MANIFEST).read_text())["files"]
        require_same_tensors(checkpoint.load_model(source).state_dict(), model)
    assert {tensor.dtype for tensor in lit_state(source).values()} == {torch.bfloat16}
    (source / "lit_model.pth").unlink()  # whoever needs it no more may remove it
    require_same_tensors(checkpoint.load_model(source).state_dict(), model)


def test_a_mix_that_no_family_has_goes_to_0_5_and_stays_readable(tmp_path):
    odd = shrunk("pythia-14m", norm_class_name="RMSNorm", family="", name="odd")
    assert not odd.family
    checkpoint.write(tmp_path / "odd", odd, random_gpt(odd))
    convert_to_litgpt.main(tmp_path / "odd")
    require_same_tensors(lit_state(tmp_path / "odd"), random_gpt(odd).state_dict())
    require_same_tensors(checkpoint.load_model(tmp_path / "odd").state_dict(), random_gpt(odd).state_dict())
    with pytest.raises(InputError, match="no Hugging Face family"):
        convert_from_litgpt.main(tmp_path / "odd", tmp_path / "out")
    tied = shrunk("pythia-14m", norm_class_name="RMSNorm", family="", name="odd", tie_embeddings=True)
    checkpoint.write(tmp_path / "tied", tied, random_gpt(tied))
    before = tree(tmp_path / "tied")
    with pytest.raises(InputError, match="would lose tie_embeddings"):
        convert_to_litgpt.main(tmp_path / "tied")
    assert tree(tmp_path / "tied") == before


# -------------------------------------------------------------------------------------------------- wrong and broken


def remove_tensor(directory: Path, word: str) -> None:
    from safetensors.torch import load_file, save_file

    path = directory / "model.safetensors"
    save_file({n: t for n, t in load_file(path).items() if word not in n}, path, {"format": "pt"})


def change_tensor(directory: Path, name: str, value: torch.Tensor) -> None:
    from safetensors.torch import load_file, save_file

    path = directory / "model.safetensors"
    save_file(load_file(path) | {name: value}, path, {"format": "pt"})


def truncate(directory: Path) -> None:
    shard = sorted(directory.glob("*.safetensors"))[-1]
    os.truncate(shard, shard.stat().st_size - 1)


def lead_out(directory: Path) -> None:
    named = sorted(hf_files(directory))
    (directory / "model.safetensors").unlink()
    index = {"weight_map": dict.fromkeys(named, "../../etc/passwd")}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


IN_FILE = r"model\.norm\.weight in .*model\.safetensors"
NORM = "model.norm.weight"
DAMAGE = {
    "no k_proj": (lambda d: remove_tensor(d, "layers.1.self_attn.k_proj"), r"1 missing: .*1\.self_attn\.k_proj"),
    "no norm": (lambda d: remove_tensor(d, NORM), r"1 missing: model\.norm\.weight"),
    "no embedding": (lambda d: remove_tensor(d, "embed_tokens"), r"missing: model\.embed_tokens\.weight"),
    "wrong shape": (lambda d: change_tensor(d, NORM, torch.ones(7)), r"model\.norm\.weight \(7,\) instead"),
    "extra": (lambda d: change_tensor(d, "layers.9.x", torch.ones(7)), r"1 not of this model: layers\.9\.x"),
    "NaN": (lambda d: change_tensor(d, NORM, torch.full((32,), torch.nan)), IN_FILE),
    "infinite": (lambda d: change_tensor(d, NORM, torch.full((32,), torch.inf)), IN_FILE),
    "truncated": (truncate, r"model\.safetensors is damaged: expected"),
    "gone": (lambda d: (d / "model.safetensors").unlink(), "has no weights"),
    "leads out": (lead_out, "leads out of this directory and was not opened"),
    "other config": (lambda d: edit_json(d / "config.json", intermediate_size=50), "of another shape"),
}


@pytest.mark.parametrize("fault", DAMAGE)
def test_damage_is_named_and_leaves_nothing_behind(tmp_path, fault):
    source = make_hf_checkpoint(tmp_path / "hf", LLAMA)
    damage, words = DAMAGE[fault]
    damage(source)
    before = tree(tmp_path)
    for convert in (convert_to_litgpt.main, lambda place: convert_from_litgpt.main(place, tmp_path / "out")):
        with pytest.raises((InputError, FileNotFoundError), match=words) as error:
            convert(source)
        assert "\n" not in str(error.value)
        assert tree(tmp_path) == before
        assert not (tmp_path / "out").exists()


def test_a_missing_shard_is_named_before_anything_is_written(tmp_path):
    source = make_hf_checkpoint(tmp_path / "hf", LLAMA, max_shard_size="20KB")
    gone = sorted(source.glob("model-*.safetensors"))[1]
    gone.unlink()
    with pytest.raises(FileNotFoundError, match=gone.name):
        convert_to_litgpt.main(source)
    assert not (source / "lit_model.pth").exists()


def test_a_name_that_the_config_contradicts_is_refused_before_weights_are_read(tmp_path):
    source = make_hf_checkpoint(tmp_path / "hf", LLAMA)
    os.truncate(source / "model.safetensors", 5)
    with pytest.raises(InputError, match=r"is not a Llama-3\.2-1B: .*block_size 64 instead of 131072"):
        convert_to_litgpt.main(source, model_name="Llama-3.2-1B")
    with pytest.raises(FileNotFoundError, match=r"did you mean 'Llama-3\.2-1B'"):
        convert_to_litgpt.main(source, model_name="Lama-3.2-1B")


def test_other_dtypes_and_numbers_that_do_not_fit_are_refused(tmp_path):
    source = make_hf_checkpoint(tmp_path / "hf", LLAMA)
    with pytest.raises(InputError, match=r"--dtype bf16 is not one of .*did you mean 'bfloat16'"):
        convert_to_litgpt.main(source, dtype="bf16")
    change_tensor(source, "model.norm.weight", torch.full((32,), 1e6))
    with pytest.raises(InputError, match=r"ln_f\.weight has numbers beyond float16"):
        convert_to_litgpt.main(source, dtype="float16")
    assert not (source / "lit_model.pth").exists()


def test_an_output_directory_in_use_is_refused_unless_it_may_be_replaced(tmp_path):
    source = make_litgpt_checkpoint(tmp_path / "lit", LLAMA)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    with pytest.raises(InputError, match=r"out exists and is not empty.*--overwrite"):
        convert_from_litgpt.main(source, tmp_path / "out")
    assert tree(tmp_path / "out") == {"mine.txt": b"mine"}
    convert_from_litgpt.main(source, tmp_path / "out", overwrite=True)
    assert "mine.txt" not in tree(tmp_path / "out")


@pytest.mark.parametrize("name", ["lit_model.pth.lora", "lit_model.pth.adapter_v2", "adapter_model.safetensors"])
def test_an_adapter_alone_is_refused_as_such(tmp_path, name):
    source = make_litgpt_checkpoint(tmp_path / "lit", LLAMA)
    os.rename(source / "lit_model.pth", source / name)
    for convert in (convert_from_litgpt.main, convert_pretrained_checkpoint.main):
        with pytest.raises(InputError, match=f"{name} belongs to an adapter.*merge_lora"):
            convert(source, tmp_path / "out")
    with pytest.raises(InputError, match=f"{name} belongs to an adapter"):
        convert_to_litgpt.main(source)
    assert not (tmp_path / "out").exists()


def test_adapter_tensors_inside_a_model_are_refused_as_such(tmp_path):
    source = make_litgpt_checkpoint(tmp_path / "lit", LLAMA)
    torch.save(lit_state(source) | {"transformer.h.0.attn.qkv.lora_A": torch.ones(3)}, source / "lit_model.pth")
    with pytest.raises(
        InputError, match=r"1 of its \d+ tensors belong to an adapter \(transformer\.h\.0\.attn\.qkv\.lora_A"
    ):
        convert_from_litgpt.main(source, tmp_path / "out")


def test_code_in_a_pickle_never_runs(tmp_path):
    source = make_litgpt_checkpoint(tmp_path / "lit", LLAMA)
    torch.save({"model": {"evil": Canary(tmp_path / "canary")}}, source / "lit_model.pth")
    for convert in (convert_from_litgpt.main, convert_pretrained_checkpoint.main):
        with pytest.raises(InputError, match=r"lit_model\.pth holds more than tensors"):
            convert(source, tmp_path / "out")
    os.rename(source / "lit_model.pth", source / "pytorch_model.bin")
    with pytest.raises(InputError, match=r"pytorch_model\.bin holds more than tensors"):
        convert_to_litgpt.main(source)
    assert not (tmp_path / "canary").exists()
    assert not (tmp_path / "out").exists()


def test_a_full_disk_names_the_file_and_its_bytes(tmp_path, monkeypatch):
    source = written(tmp_path / "in")
    before = tree(source)
    size = (source / "model.safetensors").stat().st_size
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(size, size, 1000))
    with pytest.raises(MachineError, match=r"lit_model\.pth could not be written.*\d\d,\d\d\d bytes, 1,000 are free"):
        convert_to_litgpt.main(source)
    assert tree(source) == before


def test_what_is_converted_already_says_so(tmp_path):
    source = make_litgpt_checkpoint(tmp_path / "lit", LLAMA)
    with pytest.raises(InputError, match="nothing to convert"):
        convert_to_litgpt.main(source)


def test_the_command_line_takes_the_options_of_0_5(tmp_path, capsys):
    source = make_hf_checkpoint(tmp_path / "hf", LLAMA)
    assert cli.main(["convert_to_litgpt", str(source), "--debug_mode", "true", "--dtype", "bfloat16"]) == 0
    assert "debug_mode has no effect any more" in capsys.readouterr().err
    assert cli.main(["convert_from_litgpt", str(source), "--output_dir", str(tmp_path / "out")]) == 0
    assert cli.main(["convert_from_litgpt", str(source), "--output_dir", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err.startswith("error: ")


# ---------------------------------------------------------------------------------------------- training checkpoints


def test_a_training_checkpoint_is_cut_down_to_the_model(tmp_path):
    def train(new: Path) -> None:
        checkpoint.save_training_state(new, {"state.0": torch.ones(3)}, {"step": 7})

    tokenizer = train_tiny_tokenizer(tmp_path / "tokenizer", 96)
    step = written(tmp_path / "step-00000007", extra=train, tokenizer_dir=tokenizer)
    convert_pretrained_checkpoint.main(step, tmp_path / "out")
    require_same_tensors(hf_files(tmp_path / "out"), hf_files(step))
    assert not (tmp_path / "out" / "training_state").exists()
    assert (tmp_path / "out" / "tokenizer.json").is_file()
    storage.verify(tmp_path / "out", full=True)


@pytest.mark.parametrize("wrapper", ["", "_orig_mod.", "_forward_module._orig_mod."])
def test_a_nested_lit_model_of_0_5_is_cut_down_too(tmp_path, wrapper):
    source = make_litgpt_checkpoint(tmp_path / "lit", "pythia-14m")
    state = {wrapper + name: tensor for name, tensor in lit_state(source).items()}
    nested = {"model": state, "optimizer": {"state": {0: {"step": torch.tensor(3.0)}}}, "iter_num": 3}
    torch.save(nested, source / "lit_model.pth")
    convert_pretrained_checkpoint.main(source, tmp_path / "out")
    require_same_tensors(
        checkpoint.load_model(tmp_path / "out").state_dict(), random_gpt(shrunk("pythia-14m")).state_dict()
    )


@pytest.mark.parametrize("kind", ["lit", "ours"])
def test_a_plain_checkpoint_is_the_model_already(tmp_path, kind):
    source = make_litgpt_checkpoint(tmp_path / "in", LLAMA) if kind == "lit" else written(tmp_path / "in")
    with pytest.raises(InputError, match="no training state: it is the model already"):
        convert_pretrained_checkpoint.main(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# --------------------------------------------------------------------------------------------------- killed and full

# Converts in a forked child that dies, or whose disk is full, at its n-th change to the file system, for every n.
TROUBLE = """
import errno, io, os, sys
from contextlib import redirect_stdout
from pathlib import Path
import torch
from litgpt import checkpoint, storage
from litgpt.errors import MachineError
from litgpt.scripts import convert_from_litgpt, convert_to_litgpt, lit_model, source

torch.set_num_threads(1)
job, trouble, home = sys.argv[1], sys.argv[2], Path(sys.argv[3])
given, out = home / "in", home / "out"
result = given / "lit_model.pth" if job == "to" else out

def convert(**options):
    with redirect_stdout(io.StringIO()):
        if job == "to":
            convert_to_litgpt.main(given)
        else:
            convert_from_litgpt.main(given, out, **options)

seen = 0

def strike_at(n):
    def count(event, args):
        global seen
        changes = ["os.mkdir", "os.rename", "fsync"]
        if trouble == "kill":
            changes += ["os.remove", "os.rmdir", "shutil.rmtree"]
        if event in changes or (event == "open" and args[2] & os.O_ACCMODE):
            seen += 1
            if seen == n and trouble == "kill":
                os._exit(137)
            if seen == n:
                raise OSError(errno.ENOSPC, "No space left on device", "somewhere")
    fsync = os.fsync
    os.fsync = lambda descriptor: (sys.audit("fsync"), fsync(descriptor))
    sys.addaudithook(count)

os.system(f"cp -r '{given}' '{home}/pristine'")
convert()  # everything is imported
whole = result.read_bytes() if job == "to" else (out / "model.safetensors").read_bytes()
for n in range(1, 1000):
    os.system(f"rm -r '{given}'; cp -r '{home}/pristine' '{given}'; rm -rf '{out}'")
    child = os.fork()
    if child == 0:
        strike_at(n)
        try:
            convert()
        except MachineError:
            os._exit(3)
        except BaseException as error:
            print(repr(error), flush=True)
            os._exit(1)
        os._exit(0 if seen < n else 4)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in ((0, 137) if trouble == "kill" else (0, 3, 4)), status  # 4: the error was of no consequence
    storage.verify(given, full=True)
    checkpoint.open_(given)
    found = "nothing"
    if result.exists():
        found = "new"
        storage.verify(out if job == "from" else given, full=True)
        assert (result if job == "to" else out / "model.safetensors").read_bytes() == whole
    print(found)
    convert(overwrite=True)
    visible = {p.name for p in given.iterdir()} | {p.name for p in home.iterdir()}
    assert not [name for name in visible if name.endswith(".new") or name.endswith(".old")], visible
    if status == 0:
        break
"""


@pytest.mark.parametrize("trouble", ["kill", "full"])
@pytest.mark.parametrize("job", ["to", "from"])
def test_a_conversion_killed_or_without_room_at_any_call_leaves_nothing_or_all_and_a_rerun_repairs(
    tmp_path, job, trouble
):
    written(tmp_path / "in")
    lines = run(TROUBLE, job, trouble, tmp_path, OMP_NUM_THREADS="1").split()
    assert len(lines) > 8
    assert set(lines) == {"nothing", "new"}
    assert lines[-1] == "new"
    if trouble == "kill":
        assert lines == sorted(lines, reverse=True)  # nothing, nothing, ..., new


MEMORY = """
import gc, sys, threading, time
from pathlib import Path
from litgpt.scripts import convert_from_litgpt, convert_to_litgpt, validate

def status(word):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(word)) * 1024

def peak_of(job):
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again from here
    resident = status("VmRSS")
    job()
    print("peak", status("VmHWM") - resident)

small, big = Path(sys.argv[1]), Path(sys.argv[2])
lit = big.with_name("lit")
for place, show in ((small, lambda job: job()), (big, peak_of)):  # the first time everything is imported
    show(lambda: convert_to_litgpt.main(place))
    show(lambda: convert_to_litgpt.main(place, dtype="bfloat16"))
    show(lambda: validate.main(place))
    (place / "model.safetensors").rename(place / "away")
    (place / "litgpt_manifest.json").unlink()
    show(lambda: convert_from_litgpt.main(place, place.with_name(place.name + "-out")))
"""


@pytest.mark.parametrize("name", ["pythia-14m", LLAMA])
def test_conversions_hold_little_more_than_a_tensor(tmp_path, name):
    config = shrunk(name, n_embd=512, head_size=128, intermediate_size=1024, n_layer=10)
    checkpoint.write(tmp_path / "big", config, random_gpt(config))
    written(tmp_path / "small", name)
    size = (tmp_path / "big" / "model.safetensors").stat().st_size
    said = run(MEMORY, tmp_path / "small", tmp_path / "big", MALLOC_MMAP_THRESHOLD_="65536", OMP_NUM_THREADS="1")
    to, to_half, checked, back = (int(line.split()[1]) / size for line in said.splitlines() if line.startswith("peak"))
    assert max(to, to_half) < 0.2
    assert checked < 0.7  # a bf16 copy lies beside, which is mapped
    assert back < 0.8  # the bf16 copy, mapped
    shutil.rmtree(tmp_path / "big")
    shutil.rmtree(tmp_path / "big-out")
