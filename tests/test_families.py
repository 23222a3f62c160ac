"""The registry: every name is there, every row is what it was, and importing it costs nothing."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import subprocess
import sys

import pytest

from litgpt import families, prompts
from litgpt.config import FIELDS, Config
from litgpt.errors import InputError, MissingError, UserError

# A row changed on purpose: put the new hash here, and say in the commit which public fact changed it.
PINNED = {
    "llama": "31450f61f821c6aa",
    "gpt_neox": "dfc0293b94ab8f1a",
    "falcon": "8630ff5c0258c0eb",
    "mistral": "db7c671ac5e1f625",
    "mixtral": "af1e0a2bddb48c7b",
    "phi": "814720c66353b594",
    "phi3": "fd0a0554b88eebc1",
    "gemma": "bdbe063f6de7849a",
    "gemma2": "4de1e2071688452e",
    "gemma3": "abe24cfe7e960b24",
    "qwen2": "d83e2d4452397445",
    "qwen3": "d92841695438d83a",
    "qwen3_moe": "cc0ea98d54dcc317",
    "olmo": "6cf06c30618972a2",
    "olmo2": "9f4c2c08b17407b9",
    "stablelm": "76e0cc76ed208786",
    "deepseek_v3": "4f53cda18c2baa0c",
}


def expansion(family: families.Family) -> str:
    """A hash of every field of every row that is not the default, and of the prompt styles."""
    rows = [_told(Config.from_name(row["name"])) | {"prompt": families.prompt_for(row["name"])} for row in family.rows]
    return hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()[:16]


def _told(config: Config) -> dict[str, object]:
    defaults = {name: None if f.default is dataclasses.MISSING else f.default for name, f in FIELDS.items()}
    return {name: found for name, found in config.to_dict().items() if found != defaults[name]}


@pytest.mark.parametrize("family", families.FAMILIES, ids=lambda family: family.name)
def test_rows_are_what_they_were(family):
    assert expansion(family) == PINNED[family.name]


def test_all_names_are_there_once():
    assert len(families.names()) == len(set(families.names())) == 210


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("pythia-14m", {"n_layer": 6, "n_embd": 128, "n_head": 4, "block_size": 2048, "padded_vocab_size": 50304}),
        ("stablelm-tuned-alpha-7b", {"n_embd": 6144, "n_head": 48, "padded_vocab_size": 50432, "block_size": 4096}),
        (
            "falcon-7b",
            {"n_query_groups": 1, "shared_attention_norm": True, "intermediate_size": 18176, "head_size": 64},
        ),
        ("Llama-2-70b-chat-hf", {"n_query_groups": 8, "intermediate_size": 28672, "padded_vocab_size": 32000}),
        ("LLaMA-2-7B-32K", {"rope_condense_ratio": 8, "block_size": 32768}),
        ("Platypus2-70B", {"n_query_groups": 8}),
        ("CodeLlama-13b-Instruct-hf", {"block_size": 16384, "rope_base": 1000000}),
        ("CodeLlama-70b-Instruct-hf", {"block_size": 4096, "rope_base": 10000, "padded_vocab_size": 32016}),
        ("Llama-3.1-405B", {"n_layer": 126, "n_embd": 16384, "n_head": 128, "n_query_groups": 8}),
        ("Llama-3.2-1B", {"tie_embeddings": True, "n_layer": 16, "n_embd": 2048, "vocab_size": 128256}),
        ("stable-code-3b", {"rope_base": 1000000, "rotary_percentage": 0.25, "family": "stablelm"}),
        ("OLMo-1B-hf", {"norm_affine": False, "norm_class_name": "LayerNorm", "tie_embeddings": True}),
        ("OLMo-2-1124-7B", {"norm_1": False, "norm_qk_type": "olmo2", "post_mlp_norm": True, "norm_eps": 1e-6}),
        ("Gemma-7b", {"norm_unit_offset": True, "head_size": 256, "norm_eps": 1e-6, "block_size": 8192}),
        ("Gemma-2-27b", {"attention_scores_scalar": 144, "attention_logit_softcapping": 50.0, "head_size": 128}),
        ("Gemma-3-1b-it", {"rope_adjustments": None, "block_size": 32768, "sliding_window_size": 512}),
        ("Gemma-3-27b-it", {"rope_adjustments": {"factor": 8.0}, "padded_vocab_size": 262208, "vocab_size": 262144}),
        ("phi-2", {"lm_head_bias": True, "rotary_percentage": 0.4, "gelu_approximate": "tanh"}),
        ("Phi-3-mini-4k-instruct", {"sliding_window_size": 2047, "family": "phi3"}),
        ("Phi-4-mini-instruct", {"rotary_percentage": 0.75, "tie_embeddings": True, "sliding_window_size": 262144}),
        ("Mistral-7B-v0.1", {"sliding_window_size": 4096, "block_size": 32768, "rope_base": 10000}),
        ("Mixtral-8x7B-v0.1", {"n_expert": 8, "n_expert_per_token": 2, "mlp_class_name": "LLaMAMoE"}),
        ("Qwen2.5-72B-Instruct", {"block_size": 32768, "norm_eps": 1e-6, "attn_bias": True, "bias": False}),
        ("Qwen3-0.6B-Base", {"block_size": 32768, "head_size": 128, "norm_qk": True, "tie_embeddings": True}),
        ("Qwen3-235B-A22B", {"n_expert": 128, "moe_intermediate_size": 1536, "n_layer": 94, "softmax_topk_norm": True}),
        ("SmolLM2-1.7B", {"rope_base": 130000, "n_query_groups": 32, "tie_embeddings": True}),
    ],
)
def test_a_row_holds_the_public_facts(name, fields):
    config = Config.from_name(name)
    assert {field: getattr(config, field) for field in fields} == fields


def test_gemma_2_slides_in_even_layers_and_gemma_3_in_five_of_six():
    assert [Config.from_name("Gemma-2-2b").window(layer) for layer in range(4)] == [4096, None, 4096, None]
    config = Config.from_name("Gemma-3-4b-it")
    assert [config.window(layer) for layer in (0, 4, 5, 6, 33)] == [1024, 1024, None, 1024, 1024]
    assert [config.uses_local_rope(layer) for layer in (4, 5)] == [True, False]


@pytest.mark.parametrize("name", ["Phi-3-mini-128k-instruct", "Phi-3.5-mini-instruct", "Phi-4-mini-instruct"])
def test_longrope_has_a_factor_for_each_pair_and_rises(name):
    adjustments = Config.from_name(name).rope_adjustments
    for factors in (adjustments["short_factor"], adjustments["long_factor"]):
        assert len(factors) == 48
        assert factors == sorted(factors)
    assert adjustments["factor"] * adjustments["original_max_seq_len"] == 131072


@pytest.mark.parametrize(
    ("name", "style"),
    [
        ("pythia-14m", None),
        ("stablelm-base-alpha-3b", None),
        ("stablelm-tuned-alpha-3b", "stablelm-alpha"),
        ("stablecode-instruct-alpha-3b", "stablecode"),
        ("falcon-180B-chat", "falcon"),
        ("Falcon3-1B-Base", None),
        ("Llama-2-7b-chat-hf-function-calling-v2", "llama2-function-calling"),
        ("Llama-2-7b-chat-hf", "llama2"),
        ("CodeLlama-34b-Instruct-hf", "codellama"),
        ("CodeLlama-7b-hf", "codellama"),
        ("Llama-3.1-Nemotron-70B-Instruct-HF", "llama3"),
        ("OLMo-2-1124-7B", None),
        ("OLMo-2-1124-7B-SFT", "llama3"),
        ("Mathstral-7B-v0.1", "codellama"),
        ("Mistral-7B-v0.3", None),
        ("Mistral-Large-Instruct-2411", "codellama"),
        ("Phi-4-reasoning-plus", "phi-4-reasoning"),
        ("Phi-4-mini-reasoning", "phi-4-mini-reasoning"),
        ("Qwen3-30B-A3B-Base", "qwen3"),
        ("Qwen2.5-Math-7B", "qwen2.5-math"),
        ("salamandra-2b", None),
    ],
)
def test_a_row_names_its_prompt_style(name, style):
    assert families.prompt_for(name) == style


def test_every_named_prompt_style_exists():
    for style in {families.prompt_for(name) for name in families.names()} - {None}:
        assert prompts.from_name(style)


def test_a_model_is_found_by_any_of_its_names():
    rows = [families.by_name(name)[1] for name in ("Llama-3-8B", "Meta-Llama-3-8B", "meta-llama/Meta-Llama-3-8B")]
    assert rows[0] is rows[1] is rows[2]


def test_what_the_registry_offers_is_there():
    offered = {}
    exec("from litgpt.families import *", offered)
    assert offered["FAMILIES"] is families.FAMILIES


def test_an_unknown_name_is_answered_with_the_nearest():
    with pytest.raises(MissingError, match=r"model 'phytia-14m' is not known; did you mean 'pythia-14m'\?.*list"):
        families.by_name("phytia-14m")
    with pytest.raises(
        MissingError, match=r"model 'xyzzy' is not known; some that are: (\S+), (\S+), (\S+) "
    ) as raised:
        families.by_name("xyzzy")
    examples = str(raised.value).partition(": ")[2].partition(" (")[0].split(", ")
    assert len({families.by_name(name)[0].name for name in examples}) == 3
    with pytest.raises(InputError, match="model_type 'gema3' is not known; did you mean 'gemma3'"):
        families.by_model_type("gema3")


def test_importing_the_registry_imports_nothing_heavy():
    heavy = "{'torch', 'transformers', 'yaml', 'numpy', 'lightning'} & set(sys.modules)"
    command = f"import sys, litgpt.families; sys.exit(' '.join({heavy}) or None)"
    done = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("family", families.FAMILIES, ids=lambda family: family.name)
def test_every_row_agrees_with_the_traits_of_its_family(family):
    for row in family.rows:
        assert {name: row[name] for name in family.traits} == dict(family.traits), row["name"]


def test_a_model_type_belongs_to_one_family():
    spellings = [s for family in families.FAMILIES for s in (family.model_type, *family.aliases)]
    assert len(spellings) == len(set(spellings))


def test_a_long_name_is_cut_where_it_is_refused():
    for look_up in (families.by_name, families.family, families.by_model_type):
        with pytest.raises(UserError, match=r" 'x{56}\.\.\.(,| is not)"):
            look_up("x" * 10_000)
