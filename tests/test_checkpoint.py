"""A checkpoint directory: `transformers` opens what we write, we open what it writes, damage is named."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from litgpt import checkpoint, storage, weights
from litgpt.config import Config
from litgpt.errors import InputError, MachineError, MissingError
from litgpt.model import GPT
from tests.makers.checkpoints import CONFIGS, edit_json, make_hf_checkpoint, make_litgpt_checkpoint, random_gpt
from tests.makers.configs import shrunk
from tests.makers.ranks import run_on_two
from tests.makers.tokenizers import EOS, train_tiny_tokenizer
from tests.test_weights import Canary, hf_files, require_same_tensors

LLAMA = "Llama-2-7b-hf"
IDS = torch.arange(40).remainder(96).view(2, 20)


def written(directory: Path, name: str = LLAMA, seed: int = 0, **options) -> Path:
    config = shrunk(name)
    return checkpoint.write(directory, config, random_gpt(config, seed), **options)


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        out = model(IDS)
    return getattr(out, "logits", out)


def tree(directory: Path) -> dict[str, bytes]:
    return {str(p.relative_to(directory)): p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()}


def run(program: str, *args: object, **environment: str) -> str:
    command = [sys.executable, "-c", program, *map(str, args)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


# ------------------------------------------------------------------------------------------- to transformers and back


@pytest.mark.parametrize("name", CONFIGS)
def test_transformers_opens_what_we_write_with_no_key_too_many_or_too_few_and_equal_logits(tmp_path, name):
    from transformers import AutoModelForCausalLM

    config = CONFIGS[name]
    ours = random_gpt(config)
    checkpoint.write(tmp_path / "out", config, ours, max_shard_bytes=20_000)
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 1
    judge, report = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", output_loading_info=True, attn_implementation="eager"
    )
    assert not any(report.values()), report
    assert judge.dtype == torch.float32
    torch.testing.assert_close(logits(ours), logits(judge.eval()), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("sharded", [False, True], ids=["one-file", "shards"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("name", ["pythia-14m", LLAMA])
def test_load_and_write_give_back_the_bytes_of_transformers(tmp_path, name, tied, dtype, sharded):
    size = "20KB" if sharded else "1GB"
    source = make_hf_checkpoint(tmp_path / "in", shrunk(name, tie_embeddings=tied), dtype=dtype, max_shard_size=size)
    opened = checkpoint.open_(source)
    assert (opened.kind, opened.dtype, opened.config.tie_embeddings) == ("hf", dtype, tied)
    model = checkpoint.load_model(opened)
    assert (model.lm_head.weight is model.transformer["wte"].weight) == tied
    checkpoint.write(tmp_path / "out", opened.config, model, max_shard_bytes=20_000 if sharded else 10**9)
    require_same_tensors(hf_files(tmp_path / "out"), hf_files(source))


def test_a_directory_holds_all_that_others_look_for(tmp_path):
    from transformers import AutoTokenizer, GenerationConfig

    tokenizer = train_tiny_tokenizer(tmp_path / "tokenizer", 96)
    out = written(
        tmp_path / "out",
        tokenizer_dir=tokenizer,
        hyperparameters={"lr": 0.1, "access_token": "hf_secret"},
        extra=lambda new: (new / "more.txt").write_text("more"),
    )
    assert AutoTokenizer.from_pretrained(out).eos_token == EOS
    assert GenerationConfig.from_pretrained(out).eos_token_id == 0
    assert json.loads((out / "config.json").read_text())["eos_token_id"] == 0
    assert yaml.safe_load((out / "hyperparameters.yaml").read_text()) == {"lr": 0.1}
    assert Config.from_file(out / "model_config.yaml") == shrunk(LLAMA)
    assert (out / "more.txt").read_text() == "more"
    assert not [name for name, content in tree(out).items() if b"hf_secret" in content]
    storage.verify(out, full=True)
    listed = json.loads((out / storage.MANIFEST).read_text())["files"]
    assert {*listed, storage.MANIFEST} == set(tree(out))


def test_the_dtype_asked_for_is_written_and_named(tmp_path):
    out = written(tmp_path / "out", dtype=torch.bfloat16)
    assert {t.dtype for t in hf_files(out).values()} == {torch.bfloat16}
    assert checkpoint.load_model(out).lm_head.weight.dtype == torch.bfloat16
    assert checkpoint.load_model(out, dtype=torch.float32).lm_head.weight.dtype == torch.float32
    from transformers import AutoModelForCausalLM

    assert AutoModelForCausalLM.from_pretrained(out).dtype == torch.bfloat16


def test_generation_settings_of_the_tokenizer_directory_are_kept(tmp_path):
    tokenizer = train_tiny_tokenizer(tmp_path / "tokenizer", 96)
    (tokenizer / "generation_config.json").write_text('{"eos_token_id": [0, 7], "temperature": 0.6}')
    out = written(tmp_path / "out", tokenizer_dir=tokenizer)
    assert json.loads((out / "generation_config.json").read_text())["temperature"] == 0.6
    assert json.loads((out / "config.json").read_text())["eos_token_id"] == [0, 7]


# ---------------------------------------------------------------------------------------------------------- loading


@pytest.mark.parametrize("name", ["pythia-14m", LLAMA])
@pytest.mark.parametrize("form", ["safetensors", "bin", "sharded bin", "lit", "legacy lit"])
def test_every_kind_of_weights_gives_the_same_model(tmp_path, name, form):
    config = shrunk(name)
    if "lit" in form:
        source = make_litgpt_checkpoint(tmp_path / "in", config, legacy="legacy" in form)
    else:
        source = written(tmp_path / "in", name)
        (source / storage.MANIFEST).unlink()
    if "bin" in form:
        to_pickles(source, 2 if "sharded" in form else 1)
    before = tree(source)
    model = checkpoint.load_model(source)
    assert tree(source) == before
    require_same_tensors(model.state_dict(), random_gpt(config).state_dict())
    torch.testing.assert_close(logits(model), logits(random_gpt(config)), atol=0, rtol=0)


def to_pickles(directory: Path, shards: int) -> None:
    tensors = hf_files(directory)
    (directory / "model.safetensors").unlink()
    names = sorted(tensors)
    parts = [{n: tensors[n] for n in names[i::shards]} for i in range(shards)]
    if shards == 1:
        torch.save(parts[0], directory / "pytorch_model.bin")
        return
    for i, part in enumerate(parts):
        torch.save(part, directory / f"pytorch_model-{i}.bin")
    weight_map = {name: f"pytorch_model-{i}.bin" for i, part in enumerate(parts) for name in part}
    (directory / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))


def test_safetensors_come_before_pickles(tmp_path):
    out = written(tmp_path / "out")
    for name in ("pytorch_model.bin", "lit_model.pth"):
        torch.save({"evil": Canary(tmp_path / "canary")}, out / name)
    checkpoint.load_model(out)
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize("name", ["pytorch_model.bin", "lit_model.pth"])
def test_a_malicious_pickle_alone_is_refused_and_does_not_run(tmp_path, name):
    out = written(tmp_path / "out")
    for file in (out / "model.safetensors", out / storage.MANIFEST):
        file.unlink()
    torch.save({"evil": Canary(tmp_path / "canary")}, out / name)
    with pytest.raises(InputError, match=rf"{out / name} holds more than tensors"):
        checkpoint.load_model(out)
    assert not (tmp_path / "canary").exists()


def test_weights_lie_on_the_mapped_file_unless_they_are_to_be_written_to(tmp_path):
    out = written(tmp_path / "out")
    before = tree(out)
    mapped = checkpoint.load_model(out)
    proj = mapped.transformer["h"][0].mlp.proj.weight
    assert str(out / "model.safetensors") in home_of(proj)
    own = checkpoint.load_model(out, writable=True)
    assert not [name for name, p in own.named_parameters() if "model.safetensors" in home_of(p)]
    for model in (mapped, own):
        assert all(p.requires_grad for p in model.parameters())
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
    assert tree(out) == before


def home_of(tensor: Tensor) -> str:
    """The line of this process's memory map in which the tensor lies."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        start, stop = (int(address, 16) for address in line.split()[0].split("-"))
        if start <= tensor.data_ptr() < stop:
            return line
    raise AssertionError


MEMORY = """
import gc, sys, threading, time
from pathlib import Path
import torch
from litgpt import checkpoint

def status(word):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(word)) * 1024

def peak_of(job):
    \"\"\"Peak of the anonymous and of all resident memory while `job` runs, and the bytes of the model it gives.\"\"\"
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again from here
    start, resident, peak, done = status("RssAnon"), status("VmRSS"), 0, False

    def watch():
        nonlocal peak
        while not done:
            peak = max(peak, status("RssAnon"))
            time.sleep(0.001)

    watcher = threading.Thread(target=watch)
    watcher.start()
    model = job()
    done = True
    watcher.join()
    print(peak - start, status("VmHWM") - resident, sum(p.nbytes for p in model.parameters()))

def save(model, name):
    checkpoint.write(f"{sys.argv[1]}-{name}", model.config, model)
    return model

small, big = sys.argv[1] + "-small", sys.argv[1]
save(checkpoint.load_model(small, dtype=torch.bfloat16), "warm")  # everything is imported and was used once
peak_of(lambda: checkpoint.load_model(big))
peak_of(lambda: checkpoint.load_model(big, dtype=torch.bfloat16))
peak_of(lambda: checkpoint.load_model(big, writable=True))
model = checkpoint.load_model(big, writable=True)
peak_of(lambda: save(model, "out"))
"""


@pytest.mark.parametrize("name", ["pythia-14m", LLAMA])
def test_loading_and_writing_peak_below_1_2_times_the_weights(tmp_path, name):
    config = shrunk(name, n_embd=512, head_size=128, intermediate_size=1024, n_layer=12)
    checkpoint.write(tmp_path / "big", config, GPT(config))
    checkpoint.write(tmp_path / "big-small", shrunk(name), random_gpt(shrunk(name)))
    # what is freed goes back to the system at once: what is measured is what we hold
    said = run(MEMORY, tmp_path / "big", MALLOC_MMAP_THRESHOLD_="65536")
    rows = [[int(word) for word in line.split()] for line in said.splitlines()]
    mapped, cast, writable, saved = ((anonymous / size, all_ / size) for anonymous, all_, size in rows)
    assert rows[0][2] > 100e6
    assert mapped[0] < 0.5  # what is fused
    assert max(*mapped, *cast, *writable) < 1.2
    assert max(saved) < 0.2  # beyond the model itself
    shutil.rmtree(tmp_path / "big")
    shutil.rmtree(tmp_path / "big-out")


# ---------------------------------------------------------------------------------------------------------- finding


def test_find_takes_a_path_a_downloaded_name_a_file_inside_and_what_a_kill_left_aside(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    written(tmp_path / "checkpoints" / "org" / "tiny")
    assert checkpoint.find("org/tiny") == Path("checkpoints/org/tiny")
    assert checkpoint.find("checkpoints/org/tiny") == Path("checkpoints/org/tiny")
    assert checkpoint.find(tmp_path / "checkpoints/org/tiny/config.json") == tmp_path / "checkpoints/org/tiny"
    os.rename("checkpoints/org/tiny", "checkpoints/org/.tiny.old")
    assert checkpoint.find("org/tiny") == Path("checkpoints/org/tiny")
    checkpoint.load_model(checkpoint.find("org/tiny"))
    with pytest.raises(
        MissingError, match=r"no checkpoint at org/tony or checkpoints/org/tony; did you mean 'org/tiny'\?"
    ):
        checkpoint.find("org/tony")
    with pytest.raises(MissingError, match=r"at checkpoints/other/big; `litgpt download other/big` fetches it"):
        checkpoint.find("checkpoints/other/big")
    for name in ("nothing-like-it", "x" * 5000, "nul\0", "a/b/c"):
        with pytest.raises(MissingError, match="litgpt download"):
            checkpoint.find(name)
    monkeypatch.chdir("checkpoints/org/tiny")
    checkpoint.open_(checkpoint.find("."))


@pytest.mark.parametrize(
    ("gone", "words"),
    [
        (["config.json", "model_config.yaml"], "config.json is missing"),
        (["model.safetensors", storage.MANIFEST], "has no weights"),
    ],
)
def test_what_is_missing_is_named_with_the_command_that_makes_it(tmp_path, gone, words):
    out = written(tmp_path / "out")
    for name in gone:
        (out / name).unlink()
    with pytest.raises(MissingError, match=f"{words}.*litgpt download") as error:
        checkpoint.open_(out)
    assert str(out) in str(error.value)


def test_the_directory_of_a_run_points_to_its_result(tmp_path):
    written(tmp_path / "run" / "final")
    with pytest.raises(MissingError, match=f"did you mean '{tmp_path / 'run' / 'final'}'"):
        checkpoint.open_(tmp_path / "run")


# ------------------------------------------------------------------------------------------------------------ damage


@pytest.mark.parametrize("manifest", [True, False])
@pytest.mark.parametrize("keep", [0, 1, 0.5, -1])
def test_truncated_weights_are_named_with_both_sizes(tmp_path, keep, manifest):
    out = written(tmp_path / "out")
    path = out / "model.safetensors"
    size = path.stat().st_size
    found = int(size * keep) if isinstance(keep, float) else keep % size
    os.truncate(path, found)
    if not manifest:
        (out / storage.MANIFEST).unlink()
    with pytest.raises(InputError, match=rf"{path} is damaged: expected .*bytes, found {found:,};"):
        checkpoint.load_model(out)


def test_a_flipped_bit_is_found_by_the_full_check(tmp_path):
    out = written(tmp_path / "out")
    path = out / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)
    checkpoint.load_model(out)
    with pytest.raises(InputError, match=f"{path} is damaged"):
        storage.verify(out, full=True)


def test_other_tensors_than_the_config_asks_for_are_counted_and_named(tmp_path):
    out = written(tmp_path / "out")
    edit_json(out / "config.json", intermediate_size=40)
    (out / "model_config.yaml").unlink()
    with pytest.raises(InputError, match=rf"{out}: .*6 of another shape: .* and 3 more") as error:
        checkpoint.load_model(out)
    assert "\n" not in str(error.value)


def test_two_configs_that_disagree_on_a_shape_are_refused(tmp_path):
    out = written(tmp_path / "out")
    own = yaml.safe_load((out / "model_config.yaml").read_text())
    (out / "model_config.yaml").write_text(yaml.safe_dump({**own, "n_embd": 64}))
    with pytest.raises(InputError, match=r"model_config\.yaml.*n_embd"):
        checkpoint.load_model(out)


def test_a_model_config_that_disagrees_with_the_weights_is_refused(tmp_path):
    out = make_litgpt_checkpoint(tmp_path / "out", LLAMA)
    own = yaml.safe_load((out / "model_config.yaml").read_text())
    (out / "model_config.yaml").write_text(yaml.safe_dump({**own, "intermediate_size": 40}))
    with pytest.raises(InputError, match=rf"{out}: .*6 of another shape: .* and 3 more"):
        checkpoint.load_model(out)


def test_an_index_that_points_outside_is_refused_unopened(tmp_path):
    out = written(tmp_path / "out", max_shard_bytes=20_000)
    (out / storage.MANIFEST).unlink()
    secret = tmp_path / "secret.safetensors"
    shutil.copyfile(next(out.glob("model-00001*")), secret)
    opened = []
    sys.addaudithook(lambda event, args: opened.append(str(args[0])) if event == "open" else None)
    for target in ("../secret.safetensors", str(secret), "../../../../../../etc/passwd"):
        edit_json(out / weights.INDEX, weight_map={"lm_head.weight": target})
        with pytest.raises(InputError, match="leads out of this directory and was not opened"):
            checkpoint.load_model(out)
    assert str(out / "config.json") in opened
    assert not [path for path in opened if "secret" in path or "passwd" in path]


def test_a_missing_shard_and_a_broken_index_are_named(tmp_path):
    out = written(tmp_path / "out", max_shard_bytes=20_000)
    (out / storage.MANIFEST).unlink()
    shard = sorted(out.glob("model-*"))[1]
    shard.unlink()
    with pytest.raises(MissingError, match=f"{shard} is missing"):
        checkpoint.load_model(out)
    for content in ("{}", "[]", "not json", '{"weight_map": {"x": 5}}'):
        (out / weights.INDEX).write_text(content)
        with pytest.raises(InputError, match=weights.INDEX):
            checkpoint.load_model(out)


def test_a_manifest_of_a_newer_release_is_refused(tmp_path):
    out = written(tmp_path / "out")
    edit_json(out / storage.MANIFEST, format_version=999)
    with pytest.raises(InputError, match=r"999.*newer LitGPT"):
        checkpoint.load_model(out)


# ----------------------------------------------------------------------------------------------------------- writing


def test_a_state_that_is_not_the_model_writes_nothing(tmp_path):
    config = shrunk(LLAMA)
    state = random_gpt(config).state_dict()
    del state["transformer.wte.weight"]
    with pytest.raises(InputError, match=r"1 missing: transformer\.wte\.weight"):
        checkpoint.write(tmp_path / "out", config, state)
    assert not any(tmp_path.iterdir())


def test_a_failure_while_writing_keeps_the_old_checkpoint(tmp_path, monkeypatch):
    written(tmp_path / "out")
    before = tree(tmp_path)
    with pytest.raises(InputError, match="not empty"):
        written(tmp_path / "out")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(weights, "save_file", full)
    with pytest.raises(MachineError, match=r"No space left on device \(needs at least [\d,]+ bytes"):
        written(tmp_path / "out", seed=1, overwrite=True)
    assert tree(tmp_path) == before


DIES = """
import os, sys
import torch
from litgpt import checkpoint
from tests.makers.checkpoints import random_gpt
from tests.makers.configs import shrunk

torch.set_num_threads(1)
config, target = shrunk("Llama-2-7b-hf"), sys.argv[1]
models = {seed: random_gpt(config, seed) for seed in (1, 2)}

def save(seed):
    extra = lambda new: checkpoint.save_training_state(new, {"seed": torch.tensor(seed)}, {"step": seed})
    checkpoint.write(target, config, models[seed], extra=extra, overwrite=True)

save(1)  # everything is imported now
events = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir")
calls, limit = 0, None

def count(event, args):
    global calls
    if event in events:
        calls += 1
        if calls == limit:
            os._exit(137)

sys.addaudithook(count)
save(1)
total, step = calls, max(1, calls // 25)
for n in range(1, total + step, step):
    child = os.fork()
    if child == 0:
        calls, limit = 0, n
        save(2)
        os._exit(0)
    os.waitpid(child, 0)
    calls, limit = 0, None
    found = checkpoint.find(target)
    state = checkpoint.load_training_state(found)
    model = checkpoint.load_model(found)
    seed = int(state["seed"])
    assert checkpoint.read_run_state(found)["step"] == seed
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), models[seed].parameters()))
    print(seed)
    save(1)
    assert os.listdir(os.path.dirname(target)) == [os.path.basename(target)]
"""


def test_a_save_killed_anywhere_leaves_the_old_or_the_new_checkpoint(tmp_path):
    seen = run(DIES, tmp_path / "step-00000001").split()
    assert len(seen) > 20
    assert seen[0] == "1"
    assert seen[-1] == "2"
    assert set(seen) == {"1", "2"}


# ---------------------------------------------------------------------------------------------------- training state


def state() -> dict[str, Tensor]:
    torch.manual_seed(0)
    return {
        "optimizer.a.exp_avg": torch.randn(3, 4),
        "optimizer.a.step": torch.tensor(7.0),
        "rng.torch": torch.get_rng_state(),
        "optimizer.b.exp_avg": torch.randn(5).bfloat16(),
        "words": torch.arange(5),
        "nothing": torch.zeros(0),
        "turned": torch.randn(3, 4).T,
    }


def saved(directory: Path, tensors: dict[str, Tensor], **facts) -> Path:
    def extra(new: Path) -> None:
        checkpoint.save_training_state(new, tensors, facts)

    return written(directory, extra=extra)


def test_training_state_comes_back_bit_for_bit_with_or_without_a_template(tmp_path, recwarn):
    out = saved(tmp_path / "step-1", state(), step=5, learning_rate=0.1)
    blank = {name: torch.zeros_like(tensor) for name, tensor in state().items()}
    place = blank["optimizer.a.exp_avg"].data_ptr()
    for loaded in (checkpoint.load_training_state(out, blank), checkpoint.load_training_state(out)):
        require_same_tensors(loaded, state())
    assert blank["optimizer.a.exp_avg"].data_ptr() == place
    assert checkpoint.read_run_state(out) == {"format_version": 1, "learning_rate": 0.1, "step": 5}
    text = (out / "training_state" / "run_state.json").read_text()
    assert text.index("format_version") < text.index("learning_rate") < text.index("step")
    assert not [w for w in recwarn if "torch.distributed" in str(w.message)]
    assert not [name for name in tree(out) if name.endswith((".pt", ".pth", ".pkl", ".metadata", ".distcp"))]


def test_large_training_state_is_cut_into_files(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "_BUCKET_BYTES", 5000)
    tensors = {f"t{i}": torch.full((30, 30), float(i)) for i in range(6)}
    out = saved(tmp_path / "step-1", tensors)
    assert len(list((out / "training_state").glob("*.safetensors"))) == 6
    require_same_tensors(checkpoint.load_training_state(out), tensors)


FULL_DISK = """
import resource, sys
import torch
from litgpt import checkpoint
from litgpt.errors import MachineError
from tests.makers.checkpoints import random_gpt
from tests.makers.configs import shrunk

config, big = shrunk("Llama-2-7b-hf"), torch.zeros(10**6)
extra = lambda new: checkpoint.save_training_state(new, {"big": big}, {})
resource.setrlimit(resource.RLIMIT_FSIZE, (10**6, 10**6))
try:
    checkpoint.write(sys.argv[1], config, random_gpt(config), extra=extra)
except MachineError as error:
    print(error)
"""


def test_a_disk_that_fills_up_at_the_training_state_is_one_line_and_leaves_nothing(tmp_path):
    saved(tmp_path / "step-1", {"x": torch.zeros(1)})
    line = run(FULL_DISK, tmp_path / "step-2")
    assert f"{tmp_path / 'step-2'} could not be written: File too large" in line
    assert "bytes" in line
    assert line.count("\n") == 1
    assert checkpoint.latest(tmp_path) == tmp_path / "step-1"
    assert [place.name for place in tmp_path.iterdir()] == ["step-1"]


def test_two_names_of_one_tensor_are_saved_once_and_both_filled(tmp_path):
    shared = torch.randn(4, 4)
    out = saved(tmp_path / "step-1", {"wte": shared, "head": shared, "part": shared[:2]})
    blank = torch.zeros(4, 4)
    loaded = checkpoint.load_training_state(out, {"wte": blank, "head": blank})
    assert torch.equal(loaded["head"], shared)


def test_damaged_missing_or_foreign_training_state_is_one_line(tmp_path):
    out = saved(tmp_path / "step-1", state())
    for tensors, words in (({"other": torch.zeros(1)}, "other"), ({"words": torch.zeros(6)}, "words|size|shape")):
        with pytest.raises(InputError, match=words) as error:
            checkpoint.load_training_state(out, tensors)
        assert "\n" not in str(error.value)
        assert str(out) in str(error.value)
    file = next((out / "training_state").glob("*.safetensors"))
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(InputError, match=f"{file} is damaged"):
        checkpoint.load_training_state(out)
    with pytest.raises(MissingError, match=r"run_state\.json is missing"):
        checkpoint.load_training_state(written(tmp_path / "final"))
    edit_json(out / "training_state" / "run_state.json", format_version=999)
    with pytest.raises(InputError, match=r"999.*newer"):
        checkpoint.read_run_state(out)


def test_latest_is_the_newest_whole_step_and_says_what_it_passes_over(tmp_path, capsys):
    assert checkpoint.latest(tmp_path) is None
    for step in (2, 10, 9):
        saved(tmp_path / f"step-{step:08d}", {"x": torch.zeros(1)}, step=step)
    for stray in ("step-best", "step-", ".step-00000099.new", "step-0000001x"):
        (tmp_path / stray).mkdir()
    os.rename(tmp_path / "step-00000010", tmp_path / ".step-00000010.old")
    assert checkpoint.latest(tmp_path) == tmp_path / "step-00000010"
    noted = capsys.readouterr().err
    assert all(name in noted for name in ("step-best", "step- ", "step-0000001x"))
    os.truncate(tmp_path / "step-00000010" / "model.safetensors", 100)
    (tmp_path / "step-00000011").mkdir()
    assert checkpoint.latest(tmp_path) == tmp_path / "step-00000009"
    noted = capsys.readouterr().err
    assert "step-00000011 cannot be resumed from" in noted
    assert "step-00000010/model.safetensors is damaged: expected" in noted


IMPORTS = """
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from litgpt import checkpoint
from litgpt.errors import UserError
from tests.makers.checkpoints import random_gpt
from tests.makers.configs import shrunk
"""
TWO_RANKS = """
mesh = init_device_mesh("cpu", (2,))
config = shrunk("Llama-2-7b-hf")
model = random_gpt(config, seed=3)
state = {name: distribute_tensor(t, mesh, [Shard(0)]) for name, t in model.state_dict().items()}
moments = {f"optimizer.{name}": t * 2 for name, t in state.items()}
moments |= {"same": torch.tensor(5), f"rng.{rank}": torch.tensor([rank])}

def save(new):
    checkpoint.save_training_state(new, moments, {"ranks": 2})

def fail(new):
    if rank == 1:
        raise OSError(5, "Input/output error")

checkpoint.write(f"{folder}/out/step-1", config, state, extra=save, max_shard_bytes=20_000)
loaded = checkpoint.load_training_state(f"{folder}/out/step-1", {name: t * 0 for name, t in moments.items()})
for name, want in moments.items():
    full = [t.full_tensor() if hasattr(t, "full_tensor") else t for t in (loaded[name], want)]
    assert torch.equal(*full), name
try:
    checkpoint.write(f"{folder}/out/step-2", config, state, extra=fail)
except UserError as error:
    print(type(error).__name__, error)
"""


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    """What two ranks left on the disk, and what each of them said."""
    folder = tmp_path_factory.mktemp("two_ranks")
    said = run_on_two(IMPORTS, TWO_RANKS, folder)
    return folder / "out", said


def test_saved_on_two_ranks_loads_on_one(two_ranks):
    out, _ = two_ranks
    model = random_gpt(shrunk(LLAMA), seed=3)
    require_same_tensors(dict(checkpoint.load_model(out / "step-1").state_dict()), dict(model.state_dict()))
    expected = {f"optimizer.{name}": t * 2 for name, t in model.state_dict().items()}
    expected |= {"same": torch.tensor(5), "rng.0": torch.tensor([0]), "rng.1": torch.tensor([1])}
    require_same_tensors(checkpoint.load_training_state(out / "step-1"), expected)


def test_what_fails_on_one_rank_fails_on_all_and_leaves_nothing(two_ranks):
    out, said = two_ranks
    assert all(
        line.startswith("MachineError") and "step-2 could not be written: Input/output error" in line for line in said
    )
    assert [place.name for place in out.iterdir()] == ["step-1"]


def test_a_mix_of_switches_that_no_family_has_is_kept_under_our_own_names(tmp_path):
    config = shrunk("pythia-14m", scale_embeddings=True, family="")
    assert config.family == ""
    model = random_gpt(config)
    checkpoint.write(tmp_path / "own", config, model)
    assert not (tmp_path / "own" / "config.json").exists()
    again = checkpoint.load_model(tmp_path / "own")
    assert again.config == config
    assert Config.from_name("Llama-2-7b-hf", scale_embeddings=True).family == ""
    ids = torch.arange(12).unsqueeze(0)
    with torch.no_grad():
        assert torch.equal(again(ids), model(ids))


def test_weights_that_are_no_floating_point_numbers_are_refused(tmp_path):
    directory = make_hf_checkpoint(tmp_path / "T", "pythia-14m")
    tensors = load_file(directory / "model.safetensors")
    tensors["gpt_neox.final_layer_norm.bias"] = tensors["gpt_neox.final_layer_norm.bias"].int()
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"model.safetensors: gpt_neox.final_layer_norm.bias holds torch.int32"):
        checkpoint.load_model(directory)


def test_a_newest_step_with_a_flipped_bit_is_passed_over(tmp_path, capsys):
    config = shrunk("pythia-14m")
    for step in (1, 2):
        checkpoint.write(
            tmp_path / f"step-{step:08d}", config, random_gpt(config),
            extra=lambda d, step=step: checkpoint.save_training_state(d, {"x": torch.ones(2)}, {"step": step}),
        )  # fmt: skip
    file = tmp_path / "step-00000002" / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)
    assert checkpoint.latest(tmp_path) == tmp_path / "step-00000001"
    assert "step-00000002" in capsys.readouterr().err


def test_weights_in_8_bit_floats_are_multiplied_by_the_factors_of_their_blocks(tmp_path):
    """As DeepSeek-V3 and R1 lie on the Hub."""
    directory = make_hf_checkpoint(tmp_path / "T", CONFIGS["deepseek_v3"])
    tensors, truth = load_file(directory / "model.safetensors"), {}
    for name, tensor in list(tensors.items()):
        if tensor.dim() == 2 and "layers" in name and "gate.weight" not in name:
            rows, columns = (-(-n // 20) for n in tensor.shape)
            scale = torch.rand(rows, columns) + 0.5
            whole = scale.repeat_interleave(20, 0)[: len(tensor)].repeat_interleave(20, 1)[:, : tensor.size(1)]
            tensors[name] = (tensor / whole).to(torch.float8_e4m3fn)
            tensors[name + "_scale_inv"] = scale
            truth[name] = tensors[name].float() * whole
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    edit_json(directory / "config.json", quantization_config={"quant_method": "fp8", "weight_block_size": [20, 20]})

    opened = checkpoint.open_(directory)
    exported = dict(weights.export(*_as_found(checkpoint.load_model(opened, dtype=torch.float32))))

    for name, tensor in truth.items():
        torch.testing.assert_close(exported[name], tensor)

    name = next(iter(truth)) + "_scale_inv"
    for broken in (tensors | {name: torch.ones(1, 9)}, {n: t for n, t in tensors.items() if n != name}):
        save_file(broken, directory / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(InputError, match=name):
            checkpoint.load_model(directory)
    for block in ("wide", [20], [20, 0]):
        edit_json(directory / "config.json", quantization_config={"quant_method": "fp8", "weight_block_size": block})
        with pytest.raises(InputError, match="weight_block_size"):
            checkpoint.open_(directory)


def _as_found(model):
    state = model.state_dict()
    return model.config, {name: t.shape for name, t in state.items()}, state.__getitem__


def test_weights_quantized_otherwise_are_refused_by_name(tmp_path):
    directory = make_hf_checkpoint(tmp_path / "T", "pythia-14m")
    edit_json(directory / "config.json", quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(InputError, match="gptq"):
        checkpoint.open_(directory)
