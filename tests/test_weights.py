"""Our weights and theirs are the same bytes under two names, for every family, and give the same logits."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from safetensors.torch import save_file as judge_save_file
from torch import Tensor

from litgpt import families, weights
from litgpt.errors import InputError
from litgpt.model import GPT
from litgpt.weights import Entry, PickleFile, SafetensorsFile
from tests.makers.checkpoints import CONFIGS, hf_model, make_hf_checkpoint
from tests.makers.configs import shrunk


def hf_files(directory: Path) -> dict[str, Tensor]:
    return {name: tensor for file in directory.glob("*.safetensors") for name, tensor in load_file(file).items()}


def same_bytes(left: Tensor, right: Tensor) -> bool:
    as_bytes = (t.contiguous().view(-1).view(torch.uint8) for t in (left, right))
    return left.dtype == right.dtype and left.shape == right.shape and torch.equal(*as_bytes)


def require_same_tensors(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert left.keys() == right.keys()
    assert not [name for name in left if not same_bytes(left[name], right[name])]


def imported(config, theirs: dict[str, Tensor]) -> dict[str, Tensor]:
    return dict(weights.import_(config, {n: t.shape for n, t in theirs.items()}, theirs.__getitem__))


def exported(config, ours: dict[str, Tensor]) -> dict[str, Tensor]:
    return dict(weights.export(config, {n: t.shape for n, t in ours.items()}, ours.__getitem__))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", CONFIGS)
def test_export_of_import_is_the_same_bytes(tmp_path, name, dtype):
    config = CONFIGS[name]
    theirs = hf_files(make_hf_checkpoint(tmp_path, config, dtype=dtype))
    ours = imported(config, theirs)
    assert {name: tensor.shape for name, tensor in ours.items()} == weights.expected(config)
    require_same_tensors(exported(config, ours), theirs)


@pytest.mark.parametrize("name", CONFIGS)
def test_imported_weights_give_the_logits_of_transformers(tmp_path, name):
    config = CONFIGS[name]
    judge = hf_model(config)
    theirs = hf_files(make_hf_checkpoint(tmp_path, config))
    model = GPT(config)
    ours = imported(config, theirs)
    model.load_state_dict(ours, strict=not config.tie_embeddings)
    ids = torch.arange(40).remainder(96).view(2, 20)
    with torch.no_grad():
        torch.testing.assert_close(model(ids), judge(ids).logits, atol=2e-5, rtol=1e-4)


def test_every_family_is_among_the_configs():
    assert {config.family for config in CONFIGS.values()} == {family.name for family in families.FAMILIES}


def test_every_registered_model_has_an_equation_for_every_tensor():
    for family in families.FAMILIES:
        for row in family.rows:
            config = shrunk(row["name"])
            ours = {name: torch.empty(shape, device="meta") for name, shape in weights.expected(config).items()}
            theirs = exported(config, ours)
            again = imported(config, theirs)
            assert {name: t.shape for name, t in again.items()} == {name: t.shape for name, t in ours.items()}


def test_a_tensor_that_needs_no_fusing_is_passed_on_as_it_is():
    config = shrunk("Llama-2-7b-hf")
    theirs = exported(config, GPT(config).state_dict())
    ours = imported(config, theirs)
    for our, their in {"lm_head": "lm_head", "transformer.h.1.mlp.proj": "model.layers.1.mlp.down_proj"}.items():
        assert ours[f"{our}.weight"] is theirs[f"{their}.weight"]


def test_nothing_is_fetched_before_it_is_asked_for():
    config = shrunk("pythia-14m")
    theirs = exported(config, GPT(config).state_dict())
    asked = []
    pairs = weights.import_(config, {n: t.shape for n, t in theirs.items()}, lambda n: asked.append(n) or theirs[n])
    assert not asked
    next(pairs)
    assert len(asked) == 1


def test_a_tied_head_is_written_once_and_may_lie_twice_in_a_file():
    config = shrunk("Llama-2-7b-hf", tie_embeddings=True)
    theirs = exported(config, GPT(config).state_dict())
    assert "lm_head.weight" not in theirs
    theirs["lm_head.weight"] = theirs["model.embed_tokens.weight"].clone()
    assert "lm_head.weight" not in imported(config, theirs)
    theirs["lm_head.weight"][0, 0] += 1
    with pytest.raises(InputError, match=r"lm_head\.weight differs.*tie_word_embeddings"):
        imported(config, theirs)


def test_a_file_with_buffers_of_old_and_names_of_new_transformers_is_read():
    config = shrunk("pythia-14m")
    theirs = exported(config, GPT(config).state_dict())
    ours = imported(config, theirs)
    other = dict(theirs) | {
        "gpt_neox.layers.0.attention.bias": torch.ones(1, 1, 64, 64),
        "gpt_neox.layers.0.attention.rotary_emb.inv_freq": torch.ones(4),
        "lm_head.weight": theirs["embed_out.weight"],
    }
    del other["embed_out.weight"]
    require_same_tensors(imported(config, other), ours)


def test_layers_after_the_last_are_not_ours():
    config = CONFIGS["deepseek_v3"]
    theirs = exported(config, GPT(config).state_dict())
    imported(config, theirs | {"model.layers.3.embed_tokens.weight": torch.zeros(1)})
    with pytest.raises(InputError, match="1 not of this model"):
        imported(config, theirs | {"model.layers.30.embed_tokens.weight": torch.zeros(1)})


def test_what_does_not_fit_is_counted_and_the_first_three_are_named():
    config = shrunk("Llama-2-7b-hf")
    theirs = exported(config, GPT(config).state_dict())
    for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
        del theirs[f"model.layers.0.self_attn.{name}.weight"]
    theirs["extra.weight"] = torch.zeros(1)
    theirs["model.norm.weight"] = torch.zeros(5)
    with pytest.raises(InputError) as error:
        imported(config, theirs)
    line = str(error.value)
    assert "4 missing: model.layers.0.self_attn.q_proj.weight, " in line
    assert (
        "and 1 more; 1 not of this model: extra.weight; 1 of another shape: model.norm.weight (5,) instead of (32,)"
        in line
    )
    assert "\n" not in line
    with pytest.raises(InputError, match=r"1 missing: transformer\.wte\.weight"):
        exported(config, {n: t for n, t in GPT(config).state_dict().items() if n != "transformer.wte.weight"})


def test_a_family_without_a_name_for_every_tensor_is_refused():
    config = shrunk("pythia-14m", norm_qk=True)
    config.family = "gpt_neox"
    with pytest.raises(InputError, match=r"family 'gpt_neox' has no tensors .*norm_q.*remove family"):
        imported(config, {})


# ------------------------------------------------------------------------------------------------------ tensor files


def mixed() -> dict[str, Tensor]:
    return {
        "odd": torch.arange(3, dtype=torch.bfloat16),
        "wide": torch.randn(3, 5, dtype=torch.float64),
        "mask": torch.tensor([True, False, True]),
        "scalar": torch.tensor(3.5),
        "empty": torch.zeros(0, 4),
        "bytes": torch.arange(5, dtype=torch.uint8),
        "int": torch.arange(4),
        "half": torch.randn(2, 2).half(),
    }


def entries(tensors: dict[str, Tensor]) -> dict[str, Entry]:
    return {name: Entry(t.dtype, t.shape) for name, t in tensors.items()}


def test_the_safetensors_library_reads_what_we_write_and_we_read_what_it_writes(tmp_path):
    weights.save_file(tmp_path / "ours", entries(mixed()), mixed().items())
    judge_save_file(mixed(), tmp_path / "theirs")
    torch.manual_seed(0)
    tensors = mixed()
    weights.save_file(tmp_path / "ours", entries(tensors), tensors.items())
    require_same_tensors(load_file(tmp_path / "ours"), tensors)
    judge_save_file(tensors, tmp_path / "theirs")
    for path in (tmp_path / "ours", tmp_path / "theirs"):
        file = SafetensorsFile(path)
        require_same_tensors({name: file.fetch(name) for name in file.entries}, tensors)
        require_same_tensors({name: file.read(name, t.dtype) for name, t in tensors.items()}, tensors)
        assert same_bytes(file.read("wide", torch.float32), tensors["wide"].float())
    with safe_open(tmp_path / "ours", "pt") as judge:
        assert judge.metadata() == {"format": "pt"}


def test_a_fetched_tensor_lies_on_the_file_and_writing_to_it_does_not_reach_the_file(tmp_path):
    path = tmp_path / "model.safetensors"
    judge_save_file({"x": torch.zeros(1000), "y": torch.zeros(1000)}, path)
    before = path.read_bytes()
    file = SafetensorsFile(path)
    x, y = file.fetch("x"), file.fetch("y")
    assert abs(x.data_ptr() - y.data_ptr()) == 4000  # one mapping
    x.add_(1)
    assert path.read_bytes() == before
    assert file.read("x", torch.float32).sum() == 0


def test_shards_and_index_are_those_of_hugging_face(tmp_path):
    tensors = {f"t{i}": torch.full((10, 10), i, dtype=torch.float32) for i in range(7)}
    weights.save(tmp_path, entries(tensors), tensors.items(), max_shard_bytes=900)
    index = json.loads((tmp_path / weights.INDEX).read_text())
    names = [f"model-0000{i}-of-00004.safetensors" for i in (1, 2, 3, 4)]
    assert sorted(p.name for p in tmp_path.glob("*.safetensors")) == names
    assert index["metadata"]["total_size"] == 2800
    for name, shard in index["weight_map"].items():
        assert same_bytes(load_file(tmp_path / shard)[name], tensors[name])
    require_same_tensors(hf_files(tmp_path), tensors)


@pytest.mark.parametrize("found", [0, 1, 7, 500, -1])
def test_a_truncated_safetensors_file_is_named_with_both_sizes(tmp_path, found):
    path = tmp_path / "model.safetensors"
    judge_save_file({"x": torch.zeros(1000)}, path)
    size = path.stat().st_size
    os.truncate(path, found % size)
    with pytest.raises(InputError, match=rf"{path} is damaged: expected .*bytes, found {found % size:,}") as error:
        SafetensorsFile(path)
    assert found < 100 or f"expected {size:,}" in str(error.value)


@pytest.mark.parametrize(
    ("header", "word"),
    [
        (b"not json", "header"),
        (b"[1, 2]", "header"),
        (b'{"x": 5}', "header"),
        (b'{"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}', "header"),
        (b'{"x": {"dtype": "F32", "shape": [-1], "data_offsets": [4, 0]}}', "header"),
        (b'{"x": {"dtype": "F32", "shape": [1], "data_offsets": [-4, 0]}}', "header"),
        (b'{"x": {"dtype": "F4", "shape": [2], "data_offsets": [0, 1]}}', "dtype 'F4'"),
        (b'{"x": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}', "expected 86 bytes, found 74"),
    ],
)
def test_a_hostile_header_is_one_line(tmp_path, header, word):
    path = tmp_path / "model.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + b"abcd")
    with pytest.raises(InputError, match=word) as error:
        SafetensorsFile(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


class Canary:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch '{self.path}'",)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_that_would_run_code_is_one_line_and_does_not(tmp_path, zipped):
    path, canary = tmp_path / "lit_model.pth", tmp_path / "canary"
    torch.save({"x": torch.zeros(1), "evil": Canary(canary)}, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(InputError, match=rf"{path} holds more than tensors") as error:
        PickleFile(path)
    assert "\n" not in str(error.value)
    assert not canary.exists()


def test_pickles_of_every_age_are_read_mapped_where_possible(tmp_path):
    tensors = {"a": torch.randn(3, 4), "b": torch.randn(5).bfloat16()}
    for number, content in enumerate((tensors, {"model": tensors, "step": 5})):
        for zipped in (True, False):
            path = tmp_path / f"{number}{zipped}"
            torch.save(content, path, _use_new_zipfile_serialization=zipped)
            file = PickleFile(path)
            require_same_tensors({name: file.fetch(name) for name in file.entries}, tensors)
            assert file.entries["b"].dtype == torch.bfloat16
            assert same_bytes(file.read("a", torch.bfloat16), tensors["a"].bfloat16())


@pytest.mark.parametrize("keep", [0.0, 0.001, 0.5, 0.999])
def test_a_truncated_pickle_is_named_with_its_size(tmp_path, keep):
    path = tmp_path / "lit_model.pth"
    torch.save({"x": torch.zeros(5000)}, path)
    os.truncate(path, int(path.stat().st_size * keep))
    with pytest.raises(InputError, match=rf"{path} is damaged: its {path.stat().st_size:,} bytes"):
        PickleFile(path)


def test_a_pickle_of_something_else_is_refused(tmp_path):
    for content in ([torch.zeros(1)], {"x": 5}, torch.zeros(2)):
        torch.save(content, tmp_path / "file.pth")
        with pytest.raises(InputError, match="not a mapping of names to tensors"):
            PickleFile(tmp_path / "file.pth")
