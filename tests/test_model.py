"""Laws of the model over every registered name, shrunk."""

import dataclasses

import pytest
import torch
from torch.testing import assert_close

from litgpt.config import Config
from litgpt.errors import InputError
from litgpt.families import FAMILIES
from litgpt.loss import linear_cross_entropy
from litgpt.model import (
    GPT,
    KVCache,
    attend,
    attend_plainly,
    causal_mask,
    concat_to_grouped,
    grouped_to_concat,
    join_qkv,
    qkv_rows,
    split_qkv,
)
from tests.makers.checkpoints import random_gpt
from tests.makers.configs import NAMES, shrunk

LENGTH = 21  # past the shrunken window of 8 and the shrunken original context of 16

DEEPSEEK = Config(
    name="tiny-deepseek", block_size=64, n_layer=3, n_embd=32, n_head=4, head_size=16, padded_vocab_size=128,
    rotary_percentage=1.0, parallel_residual=False, bias=False, norm_class_name="RMSNorm", mlp_class_name="LLaMAMoE",
    intermediate_size=48, moe_intermediate_size=24, n_expert=8, n_expert_per_token=3, n_shared_expert=1,
    n_expert_groups=4, n_topk_groups=2, n_topk_scores_per_group=2, norm_topk_prob=True, routed_scaling_factor=2.5,
    first_k_dense_replace=1, rope_interleave=True, latent_norm_eps=1e-6,
    latent_attention={
        "q_lora_rank": 12, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 6, "v_head_dim": 10
    },
    rope_adjustments={
        "factor": 4.0, "beta_fast": 32, "beta_slow": 1, "original_max_seq_len": 16, "mscale": 1.0, "mscale_all_dim": 1.0
    },
)  # fmt: skip
WITHOUT_QUERY_LATENT = dataclasses.replace(
    DEEPSEEK, name="tiny-moonlight", latent_attention={**DEEPSEEK.latent_attention, "q_lora_rank": None},
    n_expert_groups=1, n_topk_groups=1, n_topk_scores_per_group=1,
)  # fmt: skip
MORE = {config.name: config for config in (DEEPSEEK, WITHOUT_QUERY_LATENT)}


def shrunken(name: str) -> Config:
    return MORE[name] if name in MORE else shrunk(name)


def made(config: Config, seed: int = 0) -> GPT:
    """A model with weights large enough that a wrong mask shows."""
    torch.manual_seed(seed)
    model = GPT(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


@pytest.mark.parametrize("name", [*NAMES, *MORE])
@torch.inference_mode()
def test_a_cache_changes_no_logits(name):
    """Without cache = prefill = chunked prefill = token by token = a row of a ragged batch."""
    config = shrunken(name)
    model, ids = made(config), torch.randint(0, config.vocab_size, (2, LENGTH))
    truth = model(ids)

    assert_close(model(ids, cache=KVCache(config, 2, LENGTH)), truth)
    assert_close(model(ids, torch.arange(LENGTH), cache=KVCache(config, 2, LENGTH)), truth)

    for sizes in ([5, 11, 5], [1] * LENGTH, [13, 1, 7]):
        cache, parts, start = KVCache(config, 2, LENGTH), [], 0
        for size in sizes:
            chunk = slice(start, start + size)
            parts.append(model(ids[:, chunk], torch.arange(start, start + size), cache=cache))
            start += size
        assert_close(torch.cat(parts, dim=1), truth)

    cache, ahead = KVCache(config, 2, LENGTH), torch.tensor([9, 15])  # rows that stand at different positions
    for row, filled in enumerate(ahead.tolist()):
        model(ids[row : row + 1, :filled], cache=cache.rows(row, row + 1))
    for step in range(4):
        positions = (ahead + step).unsqueeze(1)
        assert_close(model(ids.gather(1, positions), positions, cache=cache)[:, 0], truth[[0, 1], ahead + step])


@pytest.mark.parametrize("name", ["Gemma-2-2b", "pythia-14m", "tiny-deepseek"])
@torch.inference_mode()
def test_a_row_that_starts_again_forgets_what_it_held(name):
    config = shrunken(name)
    model, cache = made(config), KVCache(config, 1, 40)
    first, second = torch.randint(0, 96, (2, 1, 40))
    model(first, cache=cache)
    parts = [model(second[:, :5], cache=cache)]
    for start, stop in ((5, 11), (11, 12), (12, 30)):
        parts.append(model(second[:, start:stop], torch.arange(start, stop), cache=cache))
    assert_close(torch.cat(parts, dim=1), model(second[:, :30]))


PACKED = ["Gemma-3-4b-it", "falcon-7b", "phi-2", "Mixtral-8x7B-v0.1", "Phi-4-mini-instruct", "tiny-deepseek"]


@pytest.mark.parametrize("host_can_look", [True, False])
@pytest.mark.parametrize("name", PACKED)
def test_packed_documents_do_not_see_each_other(name, host_can_look, monkeypatch):
    """Logits and gradients of a packed row are those of its documents alone, by documents or by a mask."""
    monkeypatch.setattr("torch.compiler.is_compiling", lambda: not host_can_look)
    config = shrunken(name)
    model, lengths = made(config), [11, 3, 14]
    row = torch.randint(0, 96, (1, sum(lengths)))
    doc_ids = torch.repeat_interleave(torch.arange(3), torch.tensor(lengths)).unsqueeze(0)
    positions = torch.cat([torch.arange(n) for n in lengths]).unsqueeze(0)
    targets = row.roll(-1, dims=1)

    packed = model(row, positions, doc_ids=doc_ids, targets=targets)
    packed.total.backward()
    packed_grad = model.transformer["wte"].weight.grad.clone()
    model.zero_grad()
    alone = [model(ids, targets=t) for ids, t in zip(row.split(lengths, 1), targets.split(lengths, 1), strict=True)]
    sum(loss.total for loss in alone).backward()

    assert_close(packed.total, sum(loss.total for loss in alone))
    assert packed.count == sum(lengths)
    assert_close(packed_grad, model.transformer["wte"].weight.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["pythia-14m", "Gemma-2-2b", "phi-2", "Llama-3.2-1B"])
def test_the_loss_is_the_cross_entropy_of_the_logits(name):
    config = shrunk(name)
    model, ids = made(config), torch.randint(0, 96, (2, 12))
    targets = torch.where(torch.rand(2, 12) < 0.3, -100, torch.randint(0, 96, (2, 12)))
    logits = model(ids)
    truth = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
    truth.backward()
    expected = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()

    loss = model(ids, targets=targets)
    loss.total.backward()

    assert_close(loss.total, truth)
    assert loss.count == (targets != -100).sum()
    for n, p in model.named_parameters():
        assert_close(p.grad, expected[n], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_renaming_a_model_changes_nothing(name):
    config = shrunk(name)
    renamed = dataclasses.replace(config, name="somebody-else", hf_config={})
    ids = torch.arange(16).unsqueeze(0)
    with torch.inference_mode():
        assert torch.equal(made(config)(ids), made(renamed)(ids))


def test_the_qkv_layout_can_be_undone():
    for name in ("pythia-14m", "falcon-7b", "falcon-40b"):
        config = shrunk(name)
        qkv = torch.randn(sum(qkv_rows(config)), 5)
        assert torch.equal(grouped_to_concat(concat_to_grouped(qkv, config), config), qkv)
        assert torch.equal(join_qkv(*split_qkv(qkv, config)), qkv)


def test_fused_attention_is_the_formula():
    q, k, v = torch.randn(2, 6, 9, 4), torch.randn(2, 3, 9, 4), torch.randn(2, 3, 9, 4)
    mask = causal_mask(9, 4)
    for kind in ({"causal": True}, {"mask": mask}):
        plain = attend_plainly(q, k, v, **{"mask": None, "causal": False, **kind}, scale=0.3, softcap=None)
        assert_close(attend(q, k, v, **kind, scale=0.3), plain)
    one = attend_plainly(q[:, :, -1:], k, v, mask=mask[-1:], causal=False, scale=0.3, softcap=None)
    assert_close(attend(q[:, :, -1:], k, v, mask=mask[-1:], scale=0.3), one)


def test_a_tied_head_is_one_parameter_and_stays_a_key():
    config = shrunk("SmolLM2-135M", tie_embeddings=True)
    model = GPT(config)
    assert model.lm_head.weight is model.transformer["wte"].weight
    assert "lm_head.weight" in model.state_dict()
    assert "lm_head.weight" in dict(model.named_parameters())
    assert "transformer.wte.weight" not in dict(model.named_parameters())


def test_a_tied_head_stays_tied_in_empty_memory_and_in_another_precision():
    with torch.device("meta"):
        model = GPT(shrunk("SmolLM2-135M", tie_embeddings=True))
    for moved in (model.to_empty(device="cpu"), model.bfloat16()):
        assert moved.lm_head.weight is moved.wte.weight


def test_rope_survives_a_cast_and_empty_memory():
    config = shrunk("Llama-3.2-1B")
    model = GPT(config)
    before = model.rope.frequencies.clone()
    assert torch.equal(model.bfloat16().rope.frequencies, before)
    with torch.device("meta"):
        empty = GPT(config)
    assert torch.equal(empty.to_empty(device="cpu").rope.frequencies, before)


def test_fresh_weights_are_repeatable_and_start_near_an_even_guess():
    config = shrunk("pythia-14m")
    losses = []
    for _ in range(2):
        model = GPT(config)
        model.init_weights(torch.Generator().manual_seed(3))
        ids = torch.randint(0, 96, (1, 32), generator=torch.Generator().manual_seed(1))
        losses.append(model(ids, targets=ids.roll(-1)))
    assert losses[0].total == losses[1].total
    assert abs(losses[0].total.item() / 32 - torch.tensor(128.0).log().item()) < 0.3


def test_every_expert_has_a_gradient_so_that_ranks_agree():
    config = shrunk("Mixtral-8x7B-v0.1", n_expert=16)
    model = made(config)
    model(torch.randint(0, 96, (1, 3)), targets=torch.randint(0, 96, (1, 3))).total.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_without_gradients_the_loss_computes_none(monkeypatch):
    model, ids = made(shrunk("Gemma-2-2b")), torch.randint(0, 96, (2, 12))
    truth = model(ids, targets=ids)
    monkeypatch.setattr("litgpt.loss._ChunkedCrossEntropy.apply", lambda *a: pytest.fail("gradients were computed"))
    with torch.no_grad():
        loss = model(ids, targets=ids)
    assert_close(loss.total, truth.total)


def test_a_position_beyond_the_cache_is_refused():
    model = made(shrunk("pythia-14m"))
    with pytest.raises(InputError, match=r"position 20 .*cache of 20"):
        model(torch.zeros(1, 1, dtype=torch.long), torch.tensor([20]), cache=KVCache(model.config, 1, 20))


def test_too_many_tokens_are_refused_with_both_numbers():
    model = GPT(shrunk("pythia-14m"))
    with pytest.raises(InputError, match=r"65.*64"):
        model(torch.zeros(1, 65, dtype=torch.long))
    with pytest.raises(InputError, match=r"65.*64"):
        KVCache(model.config, 1, 65)


@pytest.mark.parametrize("host_can_look", [True, False])
def test_the_short_way_to_a_cache(host_can_look, monkeypatch):
    """Also where looking at positions would make the host wait, as on a GPU."""
    monkeypatch.setattr("torch.compiler.is_compiling", lambda: not host_can_look)
    config = shrunk("pythia-14m")
    model, ids = made(config), torch.randint(0, 96, (1, 10))
    truth = model(ids)
    model.set_kv_cache(batch_size=1)
    model(ids[:, :9], torch.arange(9))
    assert_close(model(ids[:, 9:], torch.tensor([9])), truth[:, 9:])
    model.clear_kv_cache()
    assert_close(model(ids[:, 9:], torch.tensor([0])), model(ids[:, 9:]))


def test_every_family_has_a_shape_under_test():
    tested = {shrunken(name).family for name in [*NAMES, *MORE]}
    assert {family.name for family in FAMILIES} <= tested


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_the_loss_in_chunks_is_the_loss_at_once(dtype, softcap, monkeypatch):
    """With a bias, ignored positions and a softcap; gradients of all that has one. Also where all is ignored."""
    monkeypatch.setattr("litgpt.loss.CPU_LOGITS", 1)  # 16 rows at a time
    hidden, weight, bias = ((torch.randn(n) * 0.7).to(dtype).requires_grad_() for n in ((50, 24), (40, 24), (40,)))
    targets = torch.where(torch.rand(50) < 0.3, -100, torch.randint(0, 40, (50,)))
    logits = torch.nn.functional.linear(hidden, weight, bias).float()
    logits = logits if softcap is None else torch.tanh(logits / softcap) * softcap
    truth = torch.nn.functional.cross_entropy(logits, targets, reduction="sum")
    expected = torch.autograd.grad(truth, (hidden, weight, bias))

    loss = linear_cross_entropy(hidden, weight, targets, bias=bias, softcap=softcap)

    tolerance = {"rtol": 1e-4, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 0.05, "atol": 0.05}
    assert_close(loss.total, truth, **tolerance)
    assert loss.count == (targets != -100).sum()
    for ours, theirs in zip(torch.autograd.grad(loss.total, (hidden, weight, bias)), expected, strict=True):
        assert_close(ours, theirs, **tolerance)
    nothing = linear_cross_entropy(hidden, weight, torch.full_like(targets, -100), bias=bias, softcap=softcap)
    assert (nothing.total.item(), nothing.count.item()) == (0.0, 0)


@pytest.mark.parametrize("name", ["pythia-14m", "Mixtral-8x7B-v0.1", "Gemma-2-2b"])
def test_gradient_checkpointing_changes_no_gradient(name: str) -> None:
    model = random_gpt(shrunk(name)).train()
    ids = torch.arange(24).view(2, 12) % 50
    gradients = []
    for recompute in (False, True):
        model.gradient_checkpointing = recompute
        model.zero_grad()
        model(ids, targets=ids).total.backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    for kept, again in zip(*gradients, strict=True):
        assert torch.equal(kept, again)
