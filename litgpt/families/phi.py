"""Phi: the parallel blocks of phi-1 and 2, and the Llama-like ones of phi-3 and 4 with fused weights and LongRoPE."""

from __future__ import annotations

from typing import Any

from litgpt.families import llama
from litgpt.families.llama import KEYS, OUTER, QKV
from litgpt.families.tables import (
    Family,
    Fields,
    Hf,
    Key,
    block,
    eq,
    expect,
    group,
    read,
    read_gelu,
    read_rope,
    scaling_kind,
    size,
    value,
    with_traits,
    write,
    write_gelu,
    write_rope,
)

# --- phi-1, phi-1.5, phi-2 -------------------------------------------------------------------------------------------

PHI_KEYS = (*KEYS, *llama.HEAD_DIM, Key("layer_norm_eps", "norm_eps", float, default=1e-5), *llama.TIED)
PHI_TRAITS = {
    "norm_class_name": "LayerNorm",
    "mlp_class_name": "GptNeoxMLP",
    "bias": True,
    "lm_head_bias": True,
    "parallel_residual": True,
    "shared_attention_norm": True,
}
PHI_EQUATIONS = (
    eq("transformer.wte", "model.embed_tokens"),
    block("norm_1", "input_layernorm"),
    QKV,
    block("attn.proj", "self_attn.dense"),
    block("mlp.fc", "mlp.fc1"),
    block("mlp.proj", "mlp.fc2"),
    eq("transformer.ln_f", "model.final_layernorm"),
    eq("lm_head", "lm_head"),
)


def phi_from_hf(hf: Hf) -> dict[str, Any]:
    expect(hf, qk_layernorm=False)
    return {**read(hf, PHI_KEYS), **read_gelu(hf, "hidden_act", "gelu_new"), **read_rope(hf, partial=0.5)}


def phi_to_hf(fields: Fields) -> dict[str, Any]:
    return {**write(fields, PHI_KEYS), **write_gelu(fields, "hidden_act"), **write_rope(fields, partial=True)}


PHI_ROWS = with_traits(
    PHI_TRAITS,
    group(
        "microsoft",
        {"block_size": 2048, "vocab_size": 50257, "padded_vocab_size": 51200, "gelu_approximate": "tanh"},
        size("phi-1_5", (24, 2048, 32, 32, 8192), rotary_percentage=0.5, prompt="phi-1"),
        size("phi-2", (32, 2560, 32, 32, 10240), rotary_percentage=0.4, prompt="phi-2"),
    ),
)

PHI = Family(
    name="phi",
    model_type="phi",
    architecture="PhiForCausalLM",
    traits=PHI_TRAITS,
    from_hf=phi_from_hf,
    to_hf=phi_to_hf,
    equations=lambda fields: PHI_EQUATIONS,
    rows=PHI_ROWS,
)

# --- phi-3, phi-3.5, phi-4 -------------------------------------------------------------------------------------------

PHI3_KEYS = (*KEYS, *llama.HEAD_DIM, Key("rms_norm_eps", "norm_eps", float, default=1e-5), *llama.TIED)
PHI3_TRAITS = {name: trait for name, trait in llama.TRAITS.items() if name != "rotary_percentage"}
PHI3_EQUATIONS = (
    *OUTER,
    *llama.NORMS,
    block("attn.qkv", "self_attn.qkv_proj"),
    block("attn.proj", "self_attn.o_proj"),
    block(("mlp.fc_1", "mlp.fc_2"), "mlp.gate_up_proj"),
    block("mlp.proj", "mlp.down_proj"),
)
TRAINED = "original_max_position_embeddings"


def phi3_from_hf(hf: Hf) -> dict[str, Any]:
    expect(hf, hidden_act=("silu", "swish"))
    window = value(hf, "sliding_window", int, None)
    rope = read_rope({**hf, TRAINED: value(hf, TRAINED, int, 4096)})
    return {**read(hf, PHI3_KEYS), **rope, "sliding_window_size": window}


def phi3_to_hf(fields: Fields) -> dict[str, Any]:
    entries = {
        **write(fields, PHI3_KEYS),
        **write_rope(fields, partial=True),
        "hidden_act": "silu",
        "sliding_window": fields["sliding_window_size"],
    }
    adjustments = fields["rope_adjustments"]
    if adjustments and scaling_kind(adjustments) == "longrope":
        entries |= _longrope_to_hf(fields["block_size"], adjustments)
    return entries


def _longrope_to_hf(block_size: int, adjustments: Fields) -> dict[str, Any]:
    """Just the three keys that the readers of Phi-3 files before transformers 5 insist on, where they say it all."""
    trained, factor = adjustments["original_max_seq_len"], adjustments.get("factor")
    scaling = {
        "type": "longrope",
        "short_factor": adjustments["short_factor"],
        "long_factor": adjustments["long_factor"],
    }
    if factor is not None and factor != block_size / trained:
        scaling["factor"] = factor
    if "attention_factor" in adjustments:
        scaling["attention_factor"] = adjustments["attention_factor"]
    return {TRAINED: trained, "rope_scaling": scaling}


def longrope(short: list[float], long: list[float]) -> dict[str, Any]:
    """Scaling by the published factors of each pair of rotated elements: up to the trained length, and beyond it."""
    return {"original_max_seq_len": 4096, "factor": 32, "short_factor": short, "long_factor": long}


PHI_3_MINI_128K = longrope(
    [
        *[1.1] * 3, 1.3000000000000003, *[1.3500000000000003] * 2, 1.4000000000000004, 1.5500000000000005,
        *[2.000000000000001] * 17, *[2.0500000000000007] * 6, *[2.1000000000000005] * 2, 2.1500000000000004,
        *[2.25] * 5, 2.3999999999999995, 2.4499999999999993, 2.499999999999999, *[2.6999999999999984] * 2,
        2.7499999999999982, 2.799999999999998, 2.8999999999999977, 3.049999999999997,
    ],
    [
        1.0700000524520874, 1.1200000047683716, 1.149999976158142, 1.4199999570846558, 1.5699999332427979,
        1.7999999523162842, 2.129999876022339, 2.129999876022339, 3.009999990463257, 5.910000324249268,
        6.950000286102295, 9.070000648498535, 9.930000305175781, 10.710000038146973, 11.130000114440918,
        14.609999656677246, 15.409998893737793, 19.809999465942383, 37.279998779296875, 38.279998779296875,
        38.599998474121094, 40.12000274658203, 46.20000457763672, 50.940006256103516, 53.66000747680664,
        54.9373893737793, 56.89738845825195, 57.28738784790039, 59.98738479614258, 60.86738586425781,
        60.887386322021484, 61.71739196777344, 62.91739273071289, 62.957393646240234, 63.41739273071289,
        63.8173942565918, 63.83739471435547, 63.897396087646484, 63.93739700317383, 64.06739807128906,
        64.11434936523438, 64.12435150146484, 64.15435028076172, 64.19435119628906, 64.24435424804688,
        64.57435607910156, 64.69000244140625, 64.76000213623047,
    ],
)  # fmt: skip
PHI_35_MINI = longrope(
    [
        1.0, 1.0199999809265137, *[1.0299999713897705] * 2, *[1.0499999523162842] * 5, 1.0699999332427979,
        1.0999999046325684, 1.1099998950958252, *[1.1599998474121094] * 2, 1.1699998378753662, 1.2899998426437378,
        1.339999794960022, 1.679999828338623, 1.7899998426437378, 1.8199998140335083, 1.8499997854232788,
        1.8799997568130493, 1.9099997282028198, 1.9399996995925903, 1.9899996519088745, *[2.0199997425079346] * 6,
        *[2.0299997329711914] * 9, 2.0799996852874756, 2.0899996757507324, 2.189999580383301, 2.2199995517730713,
        2.5899994373321533, 2.729999542236328, 2.749999523162842, 2.8399994373321533,
    ],
    [
        1.0800000429153442, 1.1100000143051147, 1.1399999856948853, 1.340000033378601, 1.5899999141693115,
        1.600000023841858, 1.6200000047683716, 2.620000123977661, 3.2300000190734863, 3.2300000190734863,
        4.789999961853027, 7.400000095367432, 7.700000286102295, 9.09000015258789, 12.199999809265137,
        17.670000076293945, 24.46000099182129, 28.57000160217285, 30.420001983642578, 30.840002059936523,
        32.590003967285156, 32.93000411987305, 42.320003509521484, 44.96000289916992, 50.340003967285156,
        50.45000457763672, 57.55000305175781, 57.93000411987305, 58.21000289916992, 60.1400032043457,
        62.61000442504883, 62.62000274658203, 62.71000289916992, 63.1400032043457, 63.1400032043457,
        63.77000427246094, 63.93000411987305, 63.96000289916992, 63.970001220703125, 64.02999877929688,
        64.06999969482422, 64.08000183105469, 64.12000274658203, 64.41000366210938, 64.4800033569336,
        64.51000213623047, 64.52999877929688, 64.83999633789062,
    ],
)  # fmt: skip
PHI_4_MINI = longrope(
    [1.0] * 48,
    [
        1, 1.118320672, 1.250641126, 1.398617824, 1.564103225, 1.74916897, 1.956131817, 2.187582649, 2.446418898,
        2.735880826, 3.059592084, 3.421605075, 3.826451687, 4.279200023, 4.785517845, 5.351743533, 5.984965424,
        6.693110555, 7.485043894, 8.370679318, 9.36110372, 10.4687158, 11.70738129, 13.09260651, 14.64173252,
        16.37415215, 18.31155283, 20.47818807, 22.90118105, 25.61086418, 28.64115884, 32.03, 32.1, 32.13, 32.23,
        32.6, 32.61, 32.64, 32.66, 32.7, 32.71, 32.93, 32.97, 33.28, 33.49, 33.5, 44.16, 47.77,
    ],
)  # fmt: skip

MINI, MEDIUM = (32, 3072, 32, 32, 8192), (40, 5120, 40, 10, 17920)

PHI3_ROWS = with_traits(
    {**PHI3_TRAITS, "rotary_percentage": 1.0},
    group(
        "microsoft",
        {"vocab_size": 32000, "padded_vocab_size": 32064, "prompt": "phi-3"},
        size("Phi-3-mini-4k-instruct", MINI, block_size=4096, sliding_window_size=2047),
        size(
            "Phi-3-mini-128k-instruct",
            MINI,
            block_size=131072,
            sliding_window_size=262144,
            rope_adjustments=PHI_3_MINI_128K,
        ),
        size("Phi-3.5-mini-instruct", MINI, block_size=131072, rope_adjustments=PHI_35_MINI),
    ),
    group(
        "microsoft",
        {"vocab_size": 100352, "padded_vocab_size": 100352},
        size("phi-4", MEDIUM, block_size=16384, rope_base=250000),
        size("Phi-4-{}", MEDIUM, "reasoning", "reasoning-plus", block_size=32768, rope_base=500000),
        prompts={"phi-4": "phi-4", "Phi-4-reasoning*": "phi-4-reasoning"},
    ),
    group(
        "microsoft",
        {
            "block_size": 131072,
            "vocab_size": 200019,
            "padded_vocab_size": 200064,
            "rotary_percentage": 0.75,
            "sliding_window_size": 262144,
            "rope_adjustments": PHI_4_MINI,
            "tie_embeddings": True,
        },
        size("Phi-4-mini-{}", (32, 3072, 24, 8, 8192), "instruct", "reasoning"),
        prompts={"*-instruct": "phi-4-mini", "*-reasoning": "phi-4-mini-reasoning"},
    ),
)

PHI3 = Family(
    name="phi3",
    model_type="phi3",
    architecture="Phi3ForCausalLM",
    traits=PHI3_TRAITS,
    from_hf=phi3_from_hf,
    to_hf=phi3_to_hf,
    equations=lambda fields: PHI3_EQUATIONS,
    rows=PHI3_ROWS,
)
