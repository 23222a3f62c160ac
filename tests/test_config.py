"""`Config`: what a user's file may say, what a config.json says, and that `transformers` reads back what we write."""

from __future__ import annotations

import contextlib
import copy
import json
import logging
import random

import pytest
import yaml

from litgpt import families
from litgpt.config import Config
from litgpt.errors import InputError, MissingError, UserError
from tests.makers.configs import SHAPES, shrunk

FAMILIES = [family for family in families.FAMILIES if family.rows]
LLAMA = {
    "model_type": "llama",
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "vocab_size": 128,
    "max_position_embeddings": 64,
}
DEEPSEEK = {
    **LLAMA,
    "model_type": "deepseek_v3",
    "num_key_value_heads": 4,
    "moe_intermediate_size": 24,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "q_lora_rank": 12,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
}


def judged(hf: dict) -> dict:
    """The same config.json as `transformers` >= 5 reads and spells it."""
    from transformers import AutoConfig

    logging.getLogger("transformers").setLevel(logging.ERROR)
    entries = {name: found for name, found in copy.deepcopy(hf).items() if name != "model_type"}
    return AutoConfig.for_model(hf["model_type"], **entries).to_dict()


# --- config.json, both ways ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_transformers_reads_from_our_config_json_the_same_model(family):
    for row in family.rows:
        config = Config.from_name(row["name"])
        again = Config.from_hf(judged(config.to_hf()))
        assert (config.differences(again), again.family) == ([], family.name), row["name"]


@pytest.mark.parametrize("name", SHAPES)
def test_a_small_model_of_every_kind_survives_config_json(name):
    config = shrunk(name)
    assert config.differences(Config.from_hf(json.loads(json.dumps(config.to_hf())))) == []


@pytest.mark.parametrize(
    "hf",
    [
        LLAMA,
        {**LLAMA, "num_key_value_heads": 2, "head_dim": 16, "attention_bias": True},
        {**LLAMA, "mlp_bias": True, "rope_theta": 500000.0, "tie_word_embeddings": True},
        {**LLAMA, "rope_scaling": {"type": "linear", "factor": 4.0}},
        {**LLAMA, "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}},
        {**LLAMA, "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e6}},
        {**LLAMA, "model_type": "mistral", "num_key_value_heads": 2},
        {**LLAMA, "model_type": "mistral", "sliding_window": None, "num_key_value_heads": 4},
        {**LLAMA, "model_type": "mixtral", "num_key_value_heads": 2, "num_local_experts": 4, "sliding_window": 8},
        {**LLAMA, "model_type": "qwen2", "num_key_value_heads": 4, "sliding_window": 8, "max_window_layers": 1},
        {
            **LLAMA,
            **{"model_type": "qwen2", "num_key_value_heads": 4, "use_sliding_window": True},
            **{"sliding_window": 8, "max_window_layers": 1},
        },
        {**LLAMA, "model_type": "qwen3", "num_key_value_heads": 4, "attention_bias": True},
        {**LLAMA, "model_type": "qwen3_moe", "num_experts": 4, "num_experts_per_tok": 2, "norm_topk_prob": False},
        {**LLAMA, "model_type": "qwen3_moe", "num_experts": 8, "use_sliding_window": True, "sliding_window": 8},
        {**LLAMA, "model_type": "gpt_neox", "rotary_pct": 0.5, "rotary_emb_base": 5000, "hidden_act": "gelu_new"},
        {**LLAMA, "model_type": "gpt_neox", "use_parallel_residual": False, "attention_bias": False},
        {**LLAMA, "model_type": "stablelm", "num_key_value_heads": 2, "use_qkv_bias": True},
        {**LLAMA, "model_type": "stablelm", "num_key_value_heads": 4, "use_parallel_residual": True},
        {**LLAMA, "model_type": "phi"},
        {**LLAMA, "model_type": "phi", "partial_rotary_factor": 0.25, "rope_theta": 5000.0},
        {**LLAMA, "model_type": "phi3", "pad_token_id": 0, "sliding_window": 16},
        {
            **LLAMA,
            **{"model_type": "phi3", "pad_token_id": 0, "original_max_position_embeddings": 16},
            "rope_scaling": {"type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4},
        },
        {**LLAMA, "model_type": "gemma", "num_key_value_heads": 1, "head_dim": 16, "hidden_act": "gelu"},
        {**LLAMA, "model_type": "gemma2", "num_key_value_heads": 2, "head_dim": 16},
        {**LLAMA, "model_type": "gemma2", "num_key_value_heads": 2, "attn_logit_softcapping": None},
        {**LLAMA, "model_type": "gemma3_text", "num_key_value_heads": 2, "sliding_window_pattern": 2},
        {
            **LLAMA,
            **{"model_type": "gemma3_text", "num_key_value_heads": 2, "rope_theta": 5e5, "rope_local_base_freq": 5e3},
            "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        },
        {**LLAMA, "model_type": "olmo", "clip_qkv": 8.0, "attention_bias": True},
        {**LLAMA, "model_type": "olmo2", "rms_norm_eps": 1e-6},
        {**LLAMA, "model_type": "falcon", "multi_query": True},
        {**LLAMA, "model_type": "falcon", "multi_query": False, "bias": True, "parallel_attn": False},
        {**LLAMA, "model_type": "falcon", "new_decoder_architecture": True, "num_kv_heads": 2},
        {
            **LLAMA,
            **{"model_type": "falcon", "new_decoder_architecture": True, "num_kv_heads": 2},
            "num_ln_in_parallel_attn": 1,
        },
        DEEPSEEK,
        {**DEEPSEEK, "q_lora_rank": None, "n_group": 1, "attention_bias": True},
        {
            **DEEPSEEK,
            "rope_scaling": {
                **{"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
                **{"mscale": 1.0, "mscale_all_dim": 0.5, "beta_fast": 16, "beta_slow": 2},
            },
        },
    ],
    ids=lambda hf: hf["model_type"],
)
def test_old_and_new_spelling_and_what_we_write_are_one_model(hf):
    config = Config.from_hf(hf)
    assert config.differences(Config.from_hf(judged(hf))) == []
    assert config.differences(Config.from_hf(judged(config.to_hf()))) == []


def test_a_multimodal_file_leaves_out_the_usual_sizes_of_its_text_model():
    text = {"hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34, "sliding_window": 1024}
    text |= {"model_type": "gemma3_text", "rope_scaling": {"factor": 8.0, "rope_type": "linear"}}
    hf = {"architectures": ["Gemma3ForConditionalGeneration"], "model_type": "gemma3", "text_config": text}
    assert Config.from_hf(hf).differences(Config.from_name("Gemma-3-4b-it")) == []


def test_the_first_falcon_files_say_it_with_their_model_type():
    sizes = {"hidden_size": 8192, "n_layer": 60, "n_head": 128, "vocab_size": 65024, "alibi": False, "bias": False}
    config = Config.from_hf({"model_type": "RefinedWeb", "n_head_kv": 8, **sizes})
    assert config.differences(Config.from_name("falcon-40b")) == []


@pytest.mark.parametrize(
    ("entries", "said"),
    [
        ({"model_type": "gema3"}, "model_type 'gema3' is not known; did you mean 'gemma3'"),
        ({"model_type": None}, "model_type is missing"),
        ({"hidden_act": "relu"}, "hidden_act is 'relu'"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_type is 'dynamic'"),
        ({"rope_scaling": {"type": "linear"}}, "rope_adjustments of kind linear lacks factor"),
        ({"rope_scaling": {"rope_type": "mrope", "mrope_section": [1, 2]}}, "rope_type is 'mrope'"),
        ({"model_type": "falcon", "alibi": True}, "alibi is True"),
        ({"model_type": "phi", "qk_layernorm": True}, "qk_layernorm is True"),
        ({"model_type": "stablelm", "qk_layernorm": True}, "qk_layernorm is True"),
        ({"model_type": "qwen3_moe", "mlp_only_layers": [0]}, r"mlp_only_layers is \[0\]"),
        ({"model_type": "qwen3_moe", "decoder_sparse_step": 2}, "decoder_sparse_step is 2"),
        ({"model_type": "gemma2", "use_bidirectional_attention": True}, "use_bidirectional_attention is True"),
        ({"model_type": "gemma2", "layer_types": ["chunked_attention"] * 3}, "layer_types holds 'chunked_attention'"),
        ({"model_type": "mistral", "layer_types": ["full_attention"] * 3}, "layer_types has full layers"),
        ({**DEEPSEEK, "scoring_func": "softmax"}, "scoring_func is 'softmax'"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config.*gptq"),
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"hidden_size": "wide"}, "hidden_size is 'wide', must be a number"),
        ({"num_hidden_layers": 10**12}, "num_hidden_layers is 1000000000000, must be at most"),
        ({"num_key_value_heads": 3}, "n_query_groups is 3, must divide n_head 4"),
    ],
)
def test_what_our_model_lacks_is_refused_by_name(entries, said):
    hf = {**LLAMA, "num_key_value_heads": 4, **entries}
    with pytest.raises(InputError, match=f"^config.json: {said}"):
        Config.from_hf(hf)


def test_a_switch_that_config_json_cannot_say_is_refused_on_the_way_out():
    with pytest.raises(InputError, match="family 'gpt_neox' cannot say n_query_groups: 2"):
        shrunk("pythia-14m", n_query_groups=2).to_hf()
    odd = Config(norm_class_name="LayerNorm", norm_qk=True, clip_qkv=3.0, n_layer=2)
    with pytest.raises(InputError, match="no Hugging Face family has this mix"):
        odd.to_hf()


@pytest.mark.parametrize("name", SHAPES)
def test_a_config_of_ones_own_finds_the_family_that_can_write_it(name):
    config = shrunk(name, family="", name="")
    assert config.family
    assert config.differences(Config.from_hf(config.to_hf())) == []


@pytest.mark.parametrize("name", SHAPES)
def test_renaming_changes_nothing(name):
    config = Config.from_name(name)
    renamed = Config(**config.to_dict() | {"name": "x", "hf_config": {}})
    assert renamed.differences(config) == []
    assert renamed.to_hf() == config.to_hf()


# --- model_config.yaml -----------------------------------------------------------------------------------------------


def saved(tmp_path, text: str):
    path = tmp_path / "model_config.yaml"
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("n_layer: -1", r": n_layer is -1, must be a positive integer$"),
        ("n_layer: 0", r": n_layer is 0, must be a positive integer$"),
        ("n_layer: two", r": n_layer is 'two', must be an integer$"),
        ("n_head: 3\nn_embd: 32", r": n_head is 3, must divide n_embd 32"),
        ("n_layers: 2", r": 'n_layers' is not a field of Config; did you mean 'n_layer'\?"),
        (
            "mlp_class_name: Nope",
            r": mlp_class_name is 'Nope', must be one of GptNeoxMLP, LLaMAMLP, GemmaMLP, LLaMAMoE",
        ),
        ("mlp_class_name: LlamaMLP", r"did you mean 'LLaMAMLP'"),
        ("mlp_class_name: LLaMAMLP", r": intermediate_size is None, must be given for LLaMAMLP"),
        ("mlp_class_name: LLaMAMoE", r": n_expert is 0, must be a positive integer"),
        ("first_k_dense_replace: 1", r": first_k_dense_replace is 1, needs mlp_class_name LLaMAMoE"),
        ("n_query_groups: 5", r": n_query_groups is 5, must divide n_head 32"),
        ("bias: maybe", r": bias is 'maybe', must be true or false"),
        ("norm_eps: .nan", r": norm_eps is nan, must be a positive number"),
        ("parallel_residual: false\nshared_attention_norm: true", r": shared_attention_norm is True, needs parallel"),
        (
            "sliding_window_size: 8\nsliding_window_indices: [1]",
            r": sliding_window_indices has 1 entries, must have one",
        ),
        ("rope_local_base_freq: 8\nrope_indices: [2]\nn_layer: 1", r": rope_indices is \[2\], must hold 0 and 1 only"),
        (
            "rope_adjustments: {factor: 8, low_freq_factor: 1}",
            r": rope_adjustments of kind llama3 lacks high_freq_factor",
        ),
        (
            "rope_adjustments: {low_freq_factor: 1, beta_fast: 2}",
            r": rope_adjustments mixes the keys of llama3 and yarn",
        ),
        ("rope_adjustments: {factor: 8, speed: 1}", r": rope_adjustments has the unknown key 'speed'"),
        ("rope_adjustments: {factor: no}", r": rope_adjustments: factor is False, must be a positive number"),
        ("rotary_percentage: 1.5", r": rotary_percentage is 1.5, must be at most 1"),
        ("head_size: 7\nrotary_percentage: 1.0", r": rotary_percentage of head_size 7 rotates 7 elements"),
        ("latent_attention: {kv_lora_rank: 4}", r": latent_attention: qk_rope_head_dim is None, must be a positive"),
        ("latent_attention: {kv_lora_rang: 4}", r": latent_attention has the unknown key 'kv_lora_rang'; did you mean"),
        ("n_layer: 2\nsliding_window_indices: [1]", r": sliding_window_indices has 1 entries, must have one"),
        ("n_layer: 1\nrope_indices: [null]", r": rope_indices is \[None\], must hold 0 and 1 only"),
        (f"n_shared_expert: {10**400}", r": n_shared_expert is 1000*\.\.\., must be at most 2\*\*40$"),
        (f"rope_base: {10**30}", r": rope_base is 10+, must be at most 1e\+15"),
        (f"clip_qkv: {10**30}", r": clip_qkv is 10+, must be at most 1e\+15"),
        ("sliding_window_size: 1.0e+308", r": sliding_window_size is 10+.*, must be at most"),
        (f"rope_adjustments: {{factor: {10**400}}}", r": rope_adjustments: factor is 10+"),
        ("bias: !!bool q", r": is not YAML text"),
        ("- 1\n- 2", r": holds a list, must be a mapping of Config fields"),
        ("", r": is empty, must be a mapping of Config fields"),
        ("n_layer: 1\nbias: [", r":2: is not valid YAML"),
        ("family: lama", r": family is 'lama', must be one of llama"),
    ],
)
def test_a_wrong_model_config_is_one_line_that_names_file_and_field(tmp_path, text, said):
    path = saved(tmp_path, text)
    with pytest.raises(InputError, match=said) as raised:
        Config.from_file(path)
    assert str(raised.value).startswith(str(path))
    assert "\n" not in str(raised.value)


def test_a_saved_family_that_cannot_say_every_switch_is_found_anew(tmp_path):
    path = saved(tmp_path, "family: gpt_neox\nnorm_qk: true")
    assert Config.from_file(path).family != "gpt_neox"


def test_a_field_of_the_wrong_type_is_a_type_error_in_python():
    with pytest.raises(TypeError, match="n_layer is 'two', must be an integer"):
        Config.from_name("pythia-14m", n_layer="two")


def test_a_model_config_that_is_no_text_or_not_there_is_refused(tmp_path):
    (tmp_path / "model_config.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="is not YAML"):
        Config.from_file(tmp_path / "model_config.yaml")
    with pytest.raises(MissingError, match="no such file"):
        Config.from_file(tmp_path / "other.yaml")


@pytest.mark.parametrize("name", SHAPES)
def test_saved_fields_read_back_the_same(tmp_path, name):
    config = Config.from_name(name)
    assert Config.from_file(saved(tmp_path, yaml.safe_dump(config.to_dict()))) == config


def test_a_number_without_a_point_is_a_number(tmp_path):
    assert Config.from_file(saved(tmp_path, "norm_eps: 1e-5")).norm_eps == 1e-5


NEW_FIELDS = (
    *("family", "tie_embeddings", "norm_unit_offset", "norm_affine", "norm_bias", "attn_proj_bias", "mlp_bias"),
    *("softmax_topk_norm", "latent_norm_eps", "clip_qkv"),
)


@pytest.mark.parametrize("renamed", [False, True], ids=["named", "renamed"])
@pytest.mark.parametrize("name", SHAPES)
def test_a_litgpt_05_file_keeps_what_05_knew_by_the_name(tmp_path, name, renamed):
    config = shrunk(name)
    fields = {field: found for field, found in config.to_dict().items() if field not in NEW_FIELDS}
    if renamed:
        fields["name"] = "mine"
    old = Config.from_file(saved(tmp_path, yaml.safe_dump(fields)))
    assert set(old.differences(config)) <= {"tie_embeddings"}
    assert old.tie_embeddings is False


# --- checkpoint directories ------------------------------------------------------------------------------------------


def written(tmp_path, config: Config, **own):
    (tmp_path / "config.json").write_text(json.dumps(config.to_hf()))
    (tmp_path / "model_config.yaml").write_text(yaml.safe_dump(config.to_dict() | own))
    return tmp_path


def test_config_json_decides_and_model_config_adds_the_name(tmp_path):
    config = shrunk("pythia-14m")
    assert Config.from_checkpoint(written(tmp_path, config)) == config
    (tmp_path / "model_config.yaml").unlink()
    assert Config.from_checkpoint(tmp_path).differences(config) == []
    assert Config.from_checkpoint(tmp_path).name == tmp_path.name


def test_a_disagreement_on_a_shape_is_an_error_and_any_other_a_warning(tmp_path):
    config = shrunk("pythia-14m")
    with pytest.raises(InputError, match=r"model_config.yaml: n_embd is 64, but config.json beside it says 32"):
        Config.from_checkpoint(written(tmp_path, config, n_embd=64, head_size=16))
    with pytest.warns(UserWarning, match="rope_base differ from config.json"):
        assert Config.from_checkpoint(written(tmp_path, config, rope_base=5)).rope_base == 10000


def test_a_05_directory_beside_its_config_json_has_a_head_of_its_own(tmp_path):
    config = shrunk("Gemma-3-4b-it")
    fields = {field: found for field, found in config.to_dict().items() if field not in NEW_FIELDS}
    (tmp_path / "config.json").write_text(json.dumps(config.to_hf()))
    (tmp_path / "model_config.yaml").write_text(yaml.safe_dump(fields | {"padded_vocab_size": 120}))
    (tmp_path / "lit_model.pth").write_bytes(b"")
    read = Config.from_checkpoint(tmp_path)
    assert (read.tie_embeddings, read.padded_vocab_size, read.norm_unit_offset) == (False, 120, True)
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(InputError, match="padded_vocab_size is 120"):
        Config.from_checkpoint(tmp_path)


def test_a_directory_without_config_files_goes_by_its_registered_name(tmp_path):
    (tmp_path / "pythia-14m").mkdir()
    assert Config.from_checkpoint(tmp_path / "pythia-14m") == Config.from_name("pythia-14m")
    with pytest.raises(MissingError, match="neither config"):
        Config.from_checkpoint(tmp_path)


@pytest.mark.parametrize("text", ["[]", "{", '"x"', "\x00", "[" * 100000])
def test_a_config_json_that_is_none_is_one_line(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(InputError, match=r"config\.json"):
        Config.from_hf(tmp_path)


# --- derived sizes, overrides ----------------------------------------------------------------------------------------


def test_what_is_not_given_is_derived():
    config = Config(n_embd=64, n_head=8, vocab_size=100, padding_multiple=64)
    derived = (config.head_size, config.n_query_groups, config.padded_vocab_size, config.intermediate_size)
    assert (*derived, config.rope_n_elem) == (8, 8, 128, 256, 2)
    assert Config(vocab_size=100, padded_vocab_size=90).vocab_size == 90
    assert Config(n_layer=3, sliding_window_size=8).sliding_window_indices == [1, 1, 1]
    assert Config(n_layer=2, sliding_window_size=8, sliding_window_indices=[0, 1, 1]).sliding_window_indices == [0, 1]
    assert Config(hf_config={"name": "mine"}).name == "mine"


def test_latent_attention_gives_its_sizes():
    config = Config.from_hf(DEEPSEEK)
    assert (config.qk_head_dim, config.rope_n_elem, config.q_lora_rank, config.v_head_dim) == (16, 8, 12, 8)
    assert [config.is_moe_layer(layer) for layer in range(3)] == [False, True, True]
    assert Config(n_layer=1).qk_head_dim is None


def test_overrides_come_before_the_derived_rules():
    config = Config.from_name("pythia-14m", n_embd=64, n_head=2, head_size=None, intermediate_size=None)
    assert (config.head_size, config.intermediate_size) == (32, 256)
    with pytest.raises(InputError, match="'n_layers' is not a field of Config; did you mean 'n_layer'"):
        Config.from_name("pythia-14m", n_layers=3)


def test_overrides_that_make_another_kind_of_model_change_the_family():
    assert Config.from_name("Llama-3.2-1B", n_layer=2).family == "llama"
    assert Config.from_name("Llama-3.2-1B", norm_qk=True).family == "qwen3"


def test_configs_of_one_name_share_no_lists():
    Config.from_name("Gemma-3-4b-it").rope_adjustments["factor"] = 1
    assert Config.from_name("Gemma-3-4b-it").rope_adjustments == {"factor": 8.0}


VALUES = (
    None,
    -1,
    0,
    1.5,
    "x",
    True,
    [],
    {},
    [None],
    {"a": 1},
    float("inf"),
    10**30,
    {"rope_type": 5},
    {"factor": "x"},
)


@pytest.mark.parametrize("name", SHAPES[::4])
def test_no_mutated_file_gets_past_the_user_error(tmp_path, name):
    chance = random.Random(name)
    config = shrunk(name)
    built = 0
    for _ in range(100):
        for build, fields in ((Config.from_hf, config.to_hf()), (lambda f: Config(**f), config.to_dict())):
            key = chance.choice(list(fields))
            with contextlib.suppress(UserError):
                build({**fields, key: chance.choice(VALUES)})
                built += 1
    assert 0 < built < 200


def test_longrope_goes_by_its_older_name_too():
    scaling = {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
    phi = {**LLAMA, "model_type": "phi3", "original_max_position_embeddings": 16}
    first, older = (Config.from_hf({**phi, "rope_scaling": {**scaling, "type": kind}}) for kind in ("longrope", "su"))
    assert first.rope_adjustments == {**scaling, "original_max_seq_len": 16, "factor": 4}
    assert first.differences(older) == []
    # the scale of cos and sin belongs to the trained lengths, not to the block that a user asks for
    assert Config.from_hf(first.to_hf(), block_size=32).rope_adjustments["factor"] == 4


def test_a_directory_of_litgpt_05_keeps_the_family_of_its_name(tmp_path):
    """Its model_config.yaml names no family; llama and its kin have the same switches."""
    for name, family in (("Llama-3.2-1B", "llama"), ("Mistral-7B-v0.3", "mistral"), ("nobody-knows", "llama")):
        known = name if family == "mistral" else "Llama-3.2-1B"
        fields = shrunk(known).to_dict() | {"name": name}
        for later in ("family", "tie_embeddings", "norm_unit_offset", "norm_affine", "norm_bias", "attn_proj_bias"):
            del fields[later]
        (tmp_path / "model_config.yaml").write_text(yaml.safe_dump(fields))
        assert Config.from_file(tmp_path / "model_config.yaml").family == family


@pytest.mark.parametrize("name", ["config.json", "model_config.yaml", "generation_config.json"])
def test_a_link_out_of_the_directory_is_not_opened(tmp_path, name):
    (tmp_path / name).symlink_to("/etc/passwd")
    with pytest.raises(InputError, match="leads out of this directory"):
        Config.from_checkpoint(tmp_path)
