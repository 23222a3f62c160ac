"""Adapter directories: written whole, opened by peft with equal logits, and opened here whoever wrote them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from litgpt import adapters, checkpoint, storage
from litgpt.config import Config
from litgpt.errors import InputError, MissingError, UserError
from litgpt.methods import lora, peft
from litgpt.methods.base import Method
from litgpt.methods.lora import LoRA, LoRALinear
from litgpt.model import GPT, qkv_rows
from litgpt.scripts import convert_to_litgpt
from tests.makers.checkpoints import CONFIGS, edit_json, random_gpt
from tests.makers.methods import EVERYWHERE, METHODS, disturb, finetuned, logits
from tests.makers.ranks import run_on_two
from tests.makers.tokenizers import train_tiny_tokenizer
from tests.test_weights import Canary, require_same_tensors

LLAMA = CONFIGS["llama"]
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*(save_embedding_layers|tie_word_embeddings|is_gradient_checkpointing)"),
]


def base_of(config: Config, folder: Path, **options: Any) -> Path:
    return checkpoint.write(folder / "base", config, random_gpt(config), **options)


def result(folder: Path, config: Config, method: Method, *, merged: bool = False, **options: Any) -> tuple[Path, GPT]:
    """A finetuning's directory beside its base, and the model it was written from."""
    base = folder / "base"
    if not base.exists():
        base_of(config, folder)
    model = finetuned(config, method)
    options = {"base": base, "merged": merged, "overwrite": True} | options
    return adapters.write(folder / "final", config, method, model, **options), model


def close(model: Any, expected: Tensor) -> None:
    torch.testing.assert_close(logits(model.eval())[..., : expected.size(-1)], expected, rtol=0, atol=5e-5)


# ------------------------------------------------------------------------------------------------- to peft and back

EXPORTED = {
    "default": LoRA(),
    "rslora": LoRA(r=4, alpha=3, rslora=True, **EVERYWHERE),
    "key-alone": LoRA(r=3, query=False, value=False, key=True),
    "dora": LoRA(r=4, dora=True, key=True, query=False, mlp=True),
    "dora-attention": LoRA(r=4, dora=True, projection=True),
}
# every family with everything adapted; the other kinds where rows lie apart, interleaved, fused, and with experts
CASES = [(name, "rslora") for name in CONFIGS]
CASES += [
    (name, kind) for name in ("llama", "gpt_neox", "phi3", "deepseek_v3") for kind in EXPORTED if kind != "rslora"
]
NOT_IN_PEFT = {(name, "dora") for name, config in CONFIGS.items() if config.n_expert}


def opened_by_peft(final: Path, base: Path) -> Any:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), final / "adapter")


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_peft_opens_an_adapter_with_equal_logits_and_its_copy_opens_here(
    name: str, kind: str, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    final, model = result(tmp_path, CONFIGS[name], EXPORTED[kind])
    expected = logits(model)
    close(adapters.load_model(final), expected)
    if (name, kind) in NOT_IN_PEFT:
        assert not (final / "adapter" / "adapter_config.json").exists()
        return

    theirs = opened_by_peft(final, tmp_path / "base")

    assert not [w for w in recwarn if "adapter keys" in str(w.message) or "inconsistency" in str(w.message)]
    close(theirs, expected)
    theirs.save_pretrained(tmp_path / "again")
    close(adapters.load_model(tmp_path / "again", merge=kind == "default"), expected)


def trained_by_peft(config: Config, folder: Path, **settings: Any) -> Tensor:
    """An adapter of peft's own making in `folder/theirs`; the logits of its model."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base_of(config, folder))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        theirs = get_peft_model(model, LoraConfig(init_lora_weights=False, **settings)).eval()
    theirs.save_pretrained(folder / "theirs")
    return logits(theirs)


PEFT_TARGETS: list[tuple[str, dict[str, Any]]] = [
    ("llama", {"target_modules": "all-linear", "r": 4}),
    ("llama", {"target_modules": r".*\.1\.(self_attn\.[qk]_proj|mlp\.down_proj)", "r": 4, "use_dora": True}),
    ("llama", {"target_modules": ["q_proj", "up_proj"], "rank_pattern": {"up_proj": 2}, "alpha_pattern": {"q_.*": 5}}),
    ("llama", {"target_modules": ["v_proj"], "layers_to_transform": [1], "use_rslora": True}),
    ("gpt_neox", {"target_modules": "all-linear", "r": 4, "use_dora": True}),
    ("falcon", {"target_modules": ["query_key_value"], "r": 4}),
    ("phi3", {"target_modules": ["gate_up_proj", "qkv_proj", "lm_head"], "r": 3}),
    ("gemma", {"target_modules": ["lm_head", "q_proj"], "r": 3}),
    ("mixtral", {"target_modules": ["q_proj"], "target_parameters": ["experts.gate_up_proj", "mlp.gate.weight"]}),
    ("qwen3_moe", {"target_modules": [], "target_parameters": ["experts.down_proj"]}),
    ("deepseek_v3", {"target_modules": ["kv_b_proj"], "target_parameters": ["shared_experts.up_proj.weight"]}),
]


@pytest.mark.parametrize(("name", "settings"), PEFT_TARGETS)
def test_what_peft_made_opens_here_with_equal_logits(name: str, settings: dict[str, Any], tmp_path: Path) -> None:
    expected = trained_by_peft(CONFIGS[name], tmp_path, **settings)
    found = adapters.find(tmp_path / "theirs")
    assert found is not None
    assert (found.kind, found.method, found.base) == ("peft", "lora", str(tmp_path / "base"))
    close(adapters.load_model(tmp_path / "theirs"), expected)


def test_experts_by_the_names_of_earlier_transformers_open_here_as_in_peft(tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    config = CONFIGS["mixtral"]
    base, place = base_of(config, tmp_path), tmp_path / "old"
    place.mkdir()
    generator, tensors = torch.Generator().manual_seed(0), {}
    for layer in range(config.n_layer):
        for expert in range(config.n_expert):
            for name, n_in, n_out in (("w1", 32, 48), ("w3", 32, 48), ("w2", 48, 32)):
                stem = f"{peft.PREFIX}model.layers.{layer}.block_sparse_moe.experts.{expert}.{name}"
                tensors[f"{stem}.lora_A.weight"] = torch.randn(4, n_in, generator=generator) * 0.1
                tensors[f"{stem}.lora_B.weight"] = torch.randn(n_out, 4, generator=generator) * 0.1
    save_file(tensors, place / "adapter_model.safetensors", metadata={"format": "pt"})
    described = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["w1", "w2", "w3"]}
    (place / "adapter_config.json").write_text(json.dumps(described | {"base_model_name_or_path": str(base)}))
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), place)
    close(adapters.load_model(place), logits(theirs.eval()))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"peft_type": "IA3"}, "peft_type is 'IA3', LitGPT reads LORA"),
        ({"peft_type": None}, "peft_type is None"),
        ({"modules_to_save": ["lm_head"]}, r"modules_to_save is \['lm_head'\]: whole modules"),
        ({"trainable_token_indices": [1, 2]}, "trainable_token_indices is .*trained tokens"),
        ({"lora_bias": True}, "lora_bias is True"),
        ({"bias": "all"}, "bias is 'all', must be none"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights is 'pissa_niter_4', which changes the base"),
        ({"layer_replication": [[0, 2]]}, "layer_replication is"),
        ({"lora_alpha": "8"}, "'lora_alpha' is '8', must be a number"),
        ({"lora_alpha": 10**400}, "'lora_alpha' is 1000.*, must be a number"),
        ({"alpha_pattern": {"q_proj": None}}, "'q_proj' is None, must be a number"),
        ({"alpha_pattern": {"q_(proj": 3}}, "alpha_pattern is .* must map patterns to numbers"),
        ({"alpha_pattern": [3]}, "alpha_pattern is .3., must map patterns to numbers"),
    ],
)
def test_what_is_not_plain_lora_is_refused_by_name(changes: dict[str, Any], words: str, tmp_path: Path) -> None:
    final, _ = result(tmp_path, LLAMA, LoRA())
    edit_json(final / "adapter" / "adapter_config.json", **changes)
    (final / storage.MANIFEST).unlink()
    with pytest.raises(InputError, match=words) as error:
        adapters.load_model(final)
    assert "adapter" in str(error.value)
    assert "\n" not in str(error.value)


def edited(tensors: dict[str, Tensor], kind: str) -> dict[str, Tensor]:
    first, second, *_ = tensors
    return {
        "none": {},
        "missing": {name: t for name, t in tensors.items() if name != second},
        "stranger": tensors | {"base_model.model.model.embed_tokens.lora_embedding_A": torch.zeros(2, 3)},
        "another layer": {name.replace("layers.1.", "layers.7."): t for name, t in tensors.items()},
        "another width": {name: t[:, :-1].contiguous() if "lora_A" in name else t for name, t in tensors.items()},
        "integers": tensors | {first: torch.zeros(8, 32, dtype=torch.int64)},
        "trained embedding": tensors | {"base_model.model.model.embed_tokens.weight": torch.zeros(128, 32)},
    }[kind]


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("none", "holds no tensor"),
        ("missing", "has no whole pair of matrices lora_A and lora_B"),
        ("stranger", "embed_tokens.lora_embedding_A' is no part of a LoRA on linears"),
        ("another layer", "the base model has no linears model.layers.7"),
        ("another width", r"adapts a linear of \(.*31\), the base model's is \(.*32\)"),
        ("integers", "is no part of a LoRA on linears"),
        ("trained embedding", "embed_tokens.weight' is no part of a LoRA"),
    ],
)
def test_tensors_that_do_not_fit_are_named(kind: str, words: str, tmp_path: Path) -> None:
    final, _ = result(tmp_path, LLAMA, LoRA())
    file = final / "adapter" / "adapter_model.safetensors"
    save_file(edited(load_file(file), kind), file)
    (final / storage.MANIFEST).unlink()
    with pytest.raises(InputError, match=words) as error:
        adapters.load_model(final)
    assert "\n" not in str(error.value)


# --------------------------------------------------------------------------------------------------- our directories


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["gemma", "deepseek_v3"])
def test_what_is_written_opens_with_equal_logits(name: str, method: str, merged: bool, tmp_path: Path) -> None:
    final, model = result(tmp_path, CONFIGS[name], METHODS[method], merged=merged)
    storage.verify(final, full=True)
    close(adapters.load_model(final), logits(model))
    is_whole = METHODS[method].is_whole or (merged and METHODS[method].name == "lora")
    assert (adapters.find(final) is None) == (final / "config.json").is_file() == is_whole
    if not METHODS[method].is_whole:
        close(adapters.load_model(final / "adapter"), logits(model))


@pytest.mark.parametrize("method", ["lora", "adapter", "adapter_v2"])
def test_a_result_holds_all_that_it_takes_to_talk_to_it(method: str, tmp_path: Path) -> None:
    from litgpt import prompts

    tokenizer = train_tiny_tokenizer(tmp_path / "tokenizer", 96)
    final, _ = result(
        tmp_path,
        LLAMA,
        METHODS[method],
        tokenizer_dir=tokenizer,
        hyperparameters={"lora_r": 8, "access_token": "secret"},
        prompt_style=prompts.from_name("alpaca"),
        extra=lambda new: (new / "more.txt").touch(),
    )
    names = {path.relative_to(final).as_posix() for path in final.rglob("*") if path.is_file()}
    own = {"litgpt_adapter.json", "litgpt_adapter.safetensors"}
    files = {"adapter_config.json", "adapter_model.safetensors"} if method == "lora" else own
    beside = {"tokenizer.json", "model_config.yaml", "hyperparameters.yaml", "prompt_style.yaml", "more.txt"}
    assert beside | {f"adapter/{name}" for name in files} <= names
    assert "config.json" not in names
    assert "secret" not in "".join(path.read_text(errors="ignore") for path in final.rglob("*") if path.is_file())
    assert sum(path.stat().st_size for path in (final / "adapter").iterdir()) < 200_000


def test_a_second_finetuning_into_the_same_place_leaves_nothing_of_the_first(tmp_path: Path) -> None:
    result(tmp_path, LLAMA, METHODS["lora-everywhere"], merged=True)
    final, model = result(tmp_path, LLAMA, LoRA(r=2, key=True), merged=True)
    expected = logits(model)
    close(checkpoint.load_model(final), expected)
    close(opened_by_peft(final, tmp_path / "base"), expected)
    state = lora.merged_state(model)
    require_same_tensors(dict(checkpoint.load_model(final).state_dict()), {name: state[name] for name in state})


def test_without_a_family_the_adapter_is_in_our_own_words(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    config = Config(**{**LLAMA.to_dict(), "family": "", "norm_class_name": "LayerNorm", "norm_qk": True})
    assert not config.family
    final, model = result(tmp_path, config, LoRA())
    assert "no family of Hugging Face has this mix" in capsys.readouterr().out
    close(adapters.load_model(final), logits(model))


@pytest.mark.parametrize("method", ["lora", "dora", "adapter", "adapter_v2"])
def test_on_a_quantized_base_it_is_what_it_was_there(method: str, tmp_path: Path) -> None:
    base = base_of(LLAMA, tmp_path)
    model = checkpoint.load_model(base, quantize="bnb.nf4")
    METHODS[method].attach(model, torch.Generator().manual_seed(0))
    expected = logits(disturb(model).eval())
    final = adapters.write(tmp_path / "final", LLAMA, METHODS[method], model, base=base, merged=False)
    close(adapters.load_model(final, quantize="bnb.nf4"), expected)
    assert not torch.allclose(logits(adapters.load_model(final).eval()), expected, atol=1e-4)


def test_a_base_that_moved_is_named_with_the_option_that_says_where(tmp_path: Path) -> None:
    final, model = result(tmp_path, LLAMA, LoRA())
    shutil.move(tmp_path / "base", tmp_path / "elsewhere")
    with pytest.raises(MissingError) as error:
        adapters.load_model(final)
    assert f"'{tmp_path / 'base'}'" in str(error.value)
    assert "--pretrained_checkpoint_dir" in str(error.value)
    close(adapters.load_model(final, base=tmp_path / "elsewhere"), logits(model))
    edit_json(final / "adapter" / "adapter_config.json", base_model_name_or_path="org/model")
    with pytest.raises(MissingError, match=r"'org/model' .*_checkpoint_dir DIR, .*, or run: litgpt download org/model"):
        adapters.load_model(final / "adapter")


@pytest.mark.parametrize("method", ["lora", "adapter"])
def test_a_conversion_is_told_what_an_adapter_is(method: str, tmp_path: Path) -> None:
    final, _ = result(tmp_path, LLAMA, METHODS[method])
    for place in (final, final / "adapter"):
        with pytest.raises(InputError, match=r"belongs to an adapter.*litgpt merge_lora"):
            convert_to_litgpt.main(place)


def test_another_base_is_refused(tmp_path: Path) -> None:
    final, _ = result(tmp_path, LLAMA, METHODS["adapter_v2"])
    other = checkpoint.write(tmp_path / "other", CONFIGS["phi"], random_gpt(CONFIGS["phi"]))
    with pytest.raises(InputError, match="the tensors do not fit the base model"):
        adapters.load_model(final, base=other)


def test_a_base_of_another_dtype_or_merged_on_demand(tmp_path: Path) -> None:
    final, _ = result(tmp_path, LLAMA, LoRA())
    merged = adapters.load_model(final, dtype=torch.bfloat16)
    assert {p.dtype for p in merged.parameters()} == {torch.bfloat16}
    apart = adapters.load_model(final, dtype=torch.bfloat16, merge=False)
    assert any(isinstance(module, LoRALinear) for module in apart.modules())
    assert not any(parameter.requires_grad for parameter in apart.parameters())
    torch.testing.assert_close(logits(merged), logits(apart.eval()), rtol=0, atol=0.1)


@pytest.mark.parametrize("share", [0, 0.5, 0.999])
@pytest.mark.parametrize("method", ["lora", "adapter"])
def test_a_damaged_adapter_is_named(method: str, share: float, tmp_path: Path) -> None:
    final, _ = result(tmp_path, LLAMA, METHODS[method])
    file = next((final / "adapter").glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[: int(share * file.stat().st_size)])
    for manifest in (True, False):
        if not manifest:
            (final / storage.MANIFEST).unlink()
        with pytest.raises(InputError, match=f"{file}.* is damaged"):
            adapters.load_model(final)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "is not valid JSON"),
        ("[]", "expected an object"),
        ('{"format_version": 999}', "needs a newer LitGPT"),
        ('{"format_version": 1, "method": "prefix"}', "method is 'prefix', must be one of lora, adapter"),
        ('{"format_version": 1, "method": ["lora"], "settings": {}}', "method is .*, must be one of lora, adapter"),
        (
            '{"format_version": 1, "method": "adapter", "settings": {"promt_length": 3}}',
            "settings has no promt_length; did you mean 'prompt_length'",
        ),
    ],
)
def test_a_description_that_cannot_be_is_named(text: str, words: str, tmp_path: Path) -> None:
    final, _ = result(tmp_path, LLAMA, METHODS["adapter"])
    (final / "adapter" / "litgpt_adapter.json").write_text(text)
    (final / storage.MANIFEST).unlink()
    with pytest.raises(UserError, match=words):
        adapters.load_model(final, base=tmp_path / "base")


def test_where_there_is_no_adapter_none_is_found(tmp_path: Path) -> None:
    base = base_of(LLAMA, tmp_path)
    assert adapters.find(base) is None
    close(adapters.load_model(base), logits(random_gpt(LLAMA)))
    with pytest.raises(MissingError):
        adapters.find(tmp_path / "nowhere")


IMPORTS = """
from pathlib import Path
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from litgpt import adapters
from tests.makers.checkpoints import CONFIGS
from tests.makers.methods import METHODS, finetuned
"""
WRITE = """
folder, mesh = Path(folder), init_device_mesh("cpu", (2,))
for name in ("lora-everywhere", "dora", "adapter_v2"):
    model = finetuned(CONFIGS["llama"], METHODS[name])
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    adapters.write(folder / name, CONFIGS["llama"], METHODS[name], model, base=folder / "base", merged=True)
"""


def test_sharded_over_two_ranks_the_same_bytes_are_written(tmp_path: Path) -> None:
    base_of(LLAMA, tmp_path)
    run_on_two(IMPORTS, WRITE, tmp_path)
    for name in ("lora-everywhere", "dora", "adapter_v2"):
        final, _ = result(tmp_path, LLAMA, METHODS[name], merged=True)
        for file in (p.relative_to(final) for p in final.rglob("*.safetensors")):
            require_same_tensors(load_file(tmp_path / name / file), load_file(final / file))
        storage.verify(tmp_path / name, full=True)


# ----------------------------------------------------------------------------------------------- files of LitGPT 0.5


def in_05(folder: Path, config: Config, tensors: dict[str, Tensor], suffix: str, **hyperparameters: Any) -> Path:
    """What LitGPT 0.5 left of a finetuning, before it was merged."""
    place = folder / "old"
    place.mkdir(exist_ok=True)
    torch.save({"model": tensors}, place / f"lit_model.pth{suffix}")
    (place / "model_config.yaml").write_text(yaml.safe_dump(config.to_dict()))
    hyperparameters |= {"checkpoint_dir": str(base_of(config, folder, overwrite=True))}
    (place / "hyperparameters.yaml").write_text(yaml.safe_dump(hyperparameters))
    return place


def random_tensors(shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) * 0.1 for name, shape in shapes.items()}


SWITCHES = {f"lora_{name}": False for name in EVERYWHERE}


@pytest.mark.parametrize(
    ("name", "chosen"),
    [("llama", ("query", "value")), ("gpt_neox", ("key", "mlp", "head")), ("mixtral", tuple(EVERYWHERE))],
)
def test_lora_of_05_is_its_formula(name: str, chosen: tuple[str, ...], tmp_path: Path) -> None:
    config = CONFIGS[name]
    model, r = random_gpt(config), 3
    spans = dict(zip(("query", "key", "value"), qkv_rows(config), strict=True))
    shapes: dict[str, tuple[int, ...]] = {}
    for path, module in model.named_modules():
        kind = {"qkv": "qkv", "lm_head": "head"}.get(leaf := path.rpartition(".")[2])
        kind = kind or ("mlp" if ".mlp" in path else "projection" if leaf == "proj" else None)
        if not isinstance(module, nn.Linear) and not path.endswith(".mlp.gate"):
            continue
        n_out, n_in = module.weight.shape  # type: ignore[union-attr,misc]
        parts = [part for part in spans if part in chosen]
        if kind == "qkv" and parts:
            rows = sum(spans[part] for part in parts)
            shapes |= {f"{path}.lora_A": (r * len(parts), n_in), f"{path}.lora_B": (rows, r)}
        elif kind in chosen:
            shapes |= {f"{path}.lora_A": (r, n_in), f"{path}.lora_B": (n_out, r)}
    tensors = random_tensors(shapes)
    settings = SWITCHES | {f"lora_{part}": True for part in chosen}
    old = in_05(tmp_path, config, tensors, ".lora", lora_r=r, lora_alpha=6, lora_dropout=0.05, **settings)

    with torch.no_grad():
        for path in {key.rpartition(".")[0] for key in tensors}:
            a, b = tensors[f"{path}.lora_A"], tensors[f"{path}.lora_B"]
            weight: Any = model.get_submodule(path).weight
            if not path.endswith("qkv"):
                weight += 6 / r * b @ a
                continue
            places = dict(zip(spans, weight.split(tuple(spans.values())), strict=True))
            parts = [part for part in spans if part in chosen]
            for part, own_a, own_b in zip(parts, a.split(r), b.split([spans[p] for p in parts]), strict=True):
                places[part] += 6 / r * own_b @ own_a
    expected = logits(model)
    for merge in (True, False):
        close(adapters.load_model(old, merge=merge), expected)
    legacy = {key.replace(".attn.qkv.", ".attn.attn."): tensor for key, tensor in tensors.items()}
    torch.save({"model": legacy}, old / "lit_model.pth.lora")
    close(adapters.load_model(old / "lit_model.pth.lora"), expected)


def adapter_of_05(config: Config) -> dict[str, Tensor]:
    shapes: dict[str, tuple[int, ...]] = {}
    for layer in range(1, config.n_layer):
        shapes[f"transformer.h.{layer}.attn.adapter_wte.weight"] = (5, config.n_embd)
        shapes[f"transformer.h.{layer}.attn.gating_factor"] = (1, 1, config.n_head, 1)
    return random_tensors(shapes)


class As05(nn.Module):
    """A prefix as LitGPT 0.5 read it, in the plainest words: the projection's rows as if they lay group by group."""

    def __init__(self, tokens: Tensor, gate: Tensor) -> None:
        super().__init__()
        self.tokens, self.gate = tokens, gate.view(1, -1, 1, 1)

    def forward(self, attention: Any, q: Tensor, shared: Any) -> Tensor:
        rows = attention.qkv(self.tokens)  # (P, all heads * hs)
        per_group = attention.n_head // attention.n_groups
        heads = list(rows.split(attention.head_size, dim=-1))
        keys, values = [], []
        for head in range(attention.n_head):
            first = (head // per_group) * (per_group + 2)
            keys.append(heads[first + per_group])
            values.append(heads[first + per_group + 1])
        k, v = torch.stack(keys), torch.stack(values)
        return self.gate * ((q @ k.transpose(-2, -1) * attention.scale).softmax(-1) @ v)


@pytest.mark.parametrize("name", ["llama", "falcon", "qwen3", "mistral"])
def test_adapters_of_05_are_read_as_it_read_them(name: str, tmp_path: Path) -> None:
    config = CONFIGS[name]
    tensors = adapter_of_05(config)
    old = in_05(tmp_path, config, tensors, ".adapter")
    model: Any = random_gpt(config)
    for layer in range(1, config.n_layer):
        prefix = f"transformer.h.{layer}.attn"
        model.blocks[layer].attn.prefix = As05(
            tensors[f"{prefix}.adapter_wte.weight"], tensors[f"{prefix}.gating_factor"]
        )
    close(adapters.load_model(old), logits(model))
    first = {key: t.permute(0, 2, 1, 3) if "gating" in key else t for key, t in tensors.items()}
    torch.save({"model": first}, old / "lit_model.pth.adapter")
    close(adapters.load_model(old), logits(model))


@pytest.mark.parametrize("name", ["llama", "gpt_neox", "mixtral"])
def test_adapter_v2_of_05_is_its_formula(name: str, tmp_path: Path) -> None:
    config = CONFIGS[name]
    model: Any = random_gpt(config)
    norms = [path for path, _ in model.named_parameters() if any(n in path for n in ("norm_1", "norm_2", "ln_f"))]
    linears = [path for path, m in model.named_modules() if isinstance(m, nn.Linear) or path.endswith("mlp.gate")]
    outputs = {path: len(model.get_submodule(path).weight) for path in linears}
    shapes = {path: tuple(model.get_parameter(path).shape) for path in norms}
    shapes |= {f"{path}.adapter_{kind}": (n,) for path, n in outputs.items() for kind in ("bias", "scale")}
    tensors = adapter_of_05(config) | random_tensors(shapes)
    tensors = {key: t + 1 if "scale" in key or key in norms else t for key, t in tensors.items()}
    old = in_05(tmp_path, config, tensors, ".adapter_v2")
    with torch.no_grad():
        for path in linears:
            module, scale, bias = (
                model.get_submodule(path),
                *(tensors[f"{path}.adapter_{k}"] for k in ("scale", "bias")),
            )
            own = 0 if module.bias is None else module.bias
            module.bias = nn.Parameter(scale * (bias + own))
            module.weight.mul_(scale.unsqueeze(1))
        for path in norms:
            model.get_parameter(path).copy_(tensors[path])
    for layer in range(1, config.n_layer):
        prefix = f"transformer.h.{layer}.attn"
        model.blocks[layer].attn.prefix = As05(
            tensors[f"{prefix}.adapter_wte.weight"], tensors[f"{prefix}.gating_factor"]
        )
    close(adapters.load_model(old), logits(model))


def test_what_05_left_incomplete_is_named(tmp_path: Path) -> None:
    tensors = random_tensors({"transformer.h.0.attn.qkv.lora_A": (6, 32)})
    old = in_05(tmp_path, LLAMA, tensors, ".lora", lora_r=3, lora_alpha=6, **SWITCHES | {"lora_query": True})
    with pytest.raises(InputError, match=r"missing: transformer\.h\.0\.attn\.qkv\.lora_A\.query"):
        adapters.load_model(old)
    (old / "hyperparameters.yaml").unlink()
    with pytest.raises(MissingError, match="is not written down"):
        adapters.load_model(old)
    with pytest.raises(InputError, match=r"hyperparameters\.yaml beside it must say lora_r"):
        adapters.load_model(old, base=tmp_path / "base")
    (old / "hyperparameters.yaml").write_text("a: [")
    with pytest.raises(InputError, match=r"hyperparameters\.yaml is not valid YAML"):
        adapters.load_model(old, base=tmp_path / "base")


def test_code_in_an_adapter_file_never_runs(tmp_path: Path) -> None:
    old = in_05(tmp_path, LLAMA, {}, ".lora", lora_r=3, lora_alpha=6, lora_query=True)
    torch.save({"model": Canary(tmp_path / "canary")}, old / "lit_model.pth.lora")
    with pytest.raises(InputError, match="holds more than tensors"):
        adapters.load_model(old)
    final, _ = result(tmp_path, LLAMA, LoRA())
    (final / storage.MANIFEST).unlink()
    (final / "adapter" / "adapter_model.safetensors").unlink()
    torch.save(Canary(tmp_path / "canary"), final / "adapter" / "adapter_model.bin")
    with pytest.raises(InputError, match="holds more than tensors"):
        adapters.load_model(final)
    assert not (tmp_path / "canary").exists()
