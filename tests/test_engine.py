"""The engine against transformers, and against itself one prompt at a time."""

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from litgpt.config import Config
from litgpt.errors import InputError, UserError
from litgpt.generate.drafters import DraftModel, PromptLookup
from litgpt.generate.engine import Engine, Request
from litgpt.generate.sampling import Sampling
from litgpt.model import GPT, grouped_to_concat
from tests.makers.checkpoints import CONFIGS
from tests.makers.configs import shrunk

GREEDY = Sampling(temperature=0)


# full, rings and full in turn, rings only, experts, latent, keys that depend on how long the text may get
KINDS = ["pythia-14m", "Gemma-3-4b-it", "Mistral-7B-v0.1", "Mixtral-8x7B-v0.1", "deepseek_v3", "Phi-4-mini-instruct"]


def lively(name: str, **changes) -> GPT:
    """A small model whose next token hangs on all that came before."""
    torch.manual_seed(1)
    config = shrunk(name, **changes) if name not in CONFIGS else Config(**(CONFIGS[name].to_dict() | changes))
    model = GPT(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


@pytest.fixture
def model() -> GPT:
    return lively("pythia-14m")


def drain(engine: Engine) -> list:
    events = []
    while engine.busy:
        events += engine.step()
    return events


def alone(model: GPT, ids: list[int], **kwargs) -> list[int]:
    return list(Engine(model).generate(ids, **kwargs))


def test_greedy_text_is_that_of_transformers():
    torch.manual_seed(0)
    hf_config = GPTNeoXConfig(
        vocab_size=96, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
        max_position_embeddings=64, initializer_range=0.3, eos_token_id=None, bos_token_id=None,
    )  # fmt: skip
    theirs = GPTNeoXForCausalLM(hf_config).eval()
    config = Config.from_hf(hf_config.to_dict())
    model = GPT(config).eval()
    names = {"transformer.wte": "gpt_neox.embed_in", "transformer.ln_f": "gpt_neox.final_layer_norm"}
    for layer in range(2):
        ours, hf = f"transformer.h.{layer}.", f"gpt_neox.layers.{layer}."
        names |= {ours + "norm_1": hf + "input_layernorm", ours + "norm_2": hf + "post_attention_layernorm"}
        names |= {ours + "attn.qkv": hf + "attention.query_key_value", ours + "attn.proj": hf + "attention.dense"}
        names |= {ours + "mlp.fc": hf + "mlp.dense_h_to_4h", ours + "mlp.proj": hf + "mlp.dense_4h_to_h"}
    with torch.no_grad():
        model.lm_head.weight.copy_(theirs.get_output_embeddings().weight)
        for name, theirs_name in names.items():
            source, target = theirs.get_submodule(theirs_name), model.get_submodule(name)
            for key, tensor in source.state_dict().items():
                tensor = grouped_to_concat(tensor, config) if name.endswith("qkv") else tensor
                target.get_parameter(key).copy_(tensor)
    prompt = torch.tensor([[5, 17, 3, 88]])
    expected = theirs.generate(prompt, max_new_tokens=20, do_sample=False, pad_token_id=0)[0, 4:].tolist()
    assert alone(model, prompt[0].tolist(), sampling=GREEDY, max_new_tokens=20) == expected


def test_rows_that_join_and_leave_do_not_change_each_other(model):
    generator = torch.Generator().manual_seed(4)
    prompts = [torch.randint(0, 96, (n,), generator=generator).tolist() for n in (3, 11, 7, 1, 20)]
    budgets = [12, 3, 9, 15, 5]
    samplings = [Sampling(0.9, top_k=20, seed=i) for i in range(5)]
    expected = [
        alone(model, p, sampling=s, max_new_tokens=n) for p, s, n in zip(prompts, samplings, budgets, strict=True)
    ]

    engine = Engine(model, max_rows=3)
    requests = [engine.submit(p, s, max_new_tokens=n) for p, s, n in zip(prompts, samplings, budgets, strict=True)]
    found = {id(request): [] for request in requests}
    while engine.busy:
        for event in engine.step():
            found[id(event.request)] += event.tokens
    assert [found[id(request)] for request in requests] == expected
    assert {request.finish_reason for request in requests} == {"length"}


def test_a_cancelled_row_is_free_and_the_others_go_on(model):
    expected = alone(model, [1, 2, 3], sampling=GREEDY, max_new_tokens=10)
    engine = Engine(model, max_rows=2)
    first = engine.submit([9, 9], GREEDY, max_new_tokens=30)
    second = engine.submit([1, 2, 3], GREEDY, max_new_tokens=10)
    tokens = []
    for step in range(30):
        if step == 4:
            engine.cancel(first)
        tokens += [t for event in engine.step() if event.request is second for t in event.tokens]
    assert tokens == expected
    assert first.finish_reason == "cancelled"
    assert not engine.busy


def test_two_streams_at_once_are_each_what_they_are_alone(model):
    expected = [alone(model, p, sampling=GREEDY, max_new_tokens=8) for p in ([1, 2], [7, 8, 9])]
    engine = Engine(model, max_rows=2)
    requests = [engine.submit(p, GREEDY, max_new_tokens=8) for p in ([1, 2], [7, 8, 9])]
    while engine.busy:
        engine.step()
    assert [request.new for request in requests] == expected


def test_a_long_prompt_is_read_in_chunks(model, monkeypatch):
    prompt = list(range(40))
    expected = alone(model, prompt, sampling=GREEDY, max_new_tokens=5)
    monkeypatch.setattr("litgpt.generate.engine.PREFILL_CHUNK", 7)
    assert alone(model, prompt, sampling=GREEDY, max_new_tokens=5) == expected


def test_a_stop_sequence_ends_the_answer_and_is_not_shown(model):
    free = alone(model, [5], sampling=GREEDY, max_new_tokens=12)
    stop = free[4:6]
    cut = next(i for i in range(len(free)) if free[i : i + 2] == stop)
    engine = Engine(model)
    request = engine.submit([5], GREEDY, max_new_tokens=12, stop=[stop])
    shown = []
    while engine.busy:
        shown += [t for event in engine.step() for t in event.tokens]
    assert shown == free[:cut]
    assert request.finish_reason == "stop"


def test_limits_are_checked_before_anything_is_allocated(model):
    engine = Engine(model)
    for arguments, words in (
        (([1] * 60, None, 5), r"60.*5.*64"),
        (([1], None, -1), "-1"),
        (([1], None, 10**9), "1000000000"),
        (([], None, 5), "no tokens"),
    ):
        ids, sampling, count = arguments
        with pytest.raises(InputError, match=words):
            engine.submit(ids, sampling, max_new_tokens=count)
    assert engine.cache is None
    assert not engine.busy
    assert list(engine.generate([1], max_new_tokens=0)) == []
    assert len(list(engine.generate([1] * 60, max_new_tokens=4))) == 4


def test_the_cache_grows_with_what_is_asked(model):
    big = GPT(shrunk("pythia-14m", block_size=4096)).eval()
    engine = Engine(big)
    list(engine.generate([1, 2, 3], max_new_tokens=4))
    assert engine.cache.max_len == 64
    list(engine.generate([1, 2, 3], max_new_tokens=100))
    assert engine.cache.max_len == 128


def test_a_reader_who_walks_away_leaves_no_row_behind(model):
    engine = Engine(model)
    stream = engine.generate([1, 2], GREEDY, max_new_tokens=20)
    next(stream)
    stream.close()
    assert not engine.busy


@pytest.mark.parametrize("name", ["Phi-4-mini-instruct", "Gemma-3-4b-it"])
def test_a_text_does_not_depend_on_what_came_before_or_stands_beside_it(name):
    """Longrope turns by how long a sequence may get: by its own length, not by the cache's or a neighbour's."""
    model = GPT(shrunk(name, block_size=128)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    expected = alone(model, [1, 2, 3], sampling=GREEDY, max_new_tokens=6)
    engine = Engine(model, max_rows=2)
    list(engine.generate([5] * 90, GREEDY, max_new_tokens=20))  # the cache grows
    requests = [engine.submit(ids, GREEDY, max_new_tokens=n) for ids, n in (([1, 2, 3], 6), ([9] * 60, 30))]
    while engine.busy:
        engine.step()
    assert requests[0].new == expected


def test_a_long_prompt_does_not_hold_the_others_up(model, monkeypatch):
    monkeypatch.setattr("litgpt.generate.engine.PREFILL_CHUNK", 2)
    engine = Engine(model, max_rows=2)
    first = engine.submit([1], GREEDY, max_new_tokens=20)
    engine.step()
    second = engine.submit([7] * 30, GREEDY, max_new_tokens=3)
    silent = longest = 0
    while first.finish_reason is None:
        silent = 0 if any(event.request is first for event in engine.step()) else silent + 1
        longest = max(longest, silent)
    while engine.busy:
        engine.step()
    assert longest <= 1
    assert first.new == alone(model, [1], sampling=GREEDY, max_new_tokens=20)
    assert second.new == alone(model, [7] * 30, sampling=GREEDY, max_new_tokens=3)


def test_rows_that_no_token_has_are_neither_read_nor_drawn(model):
    engine = Engine(model, n_tokens=10)
    for seed in range(5):
        assert max(engine.generate([1], Sampling(2.0, seed=seed), max_new_tokens=20)) < 10
    with pytest.raises(InputError, match=r"token 128.*128 rows.*tokenizer"):
        engine.submit([1, 128])


@pytest.mark.parametrize("name", KINDS)
def test_random_schedules_change_no_text(name, monkeypatch):
    """Rows join, leave and are cancelled at random; prompts share beginnings; chunks are small and rings go around."""
    monkeypatch.setattr("litgpt.generate.engine.PREFILL_CHUNK", 16)
    model = lively(name, block_size=128)
    dice = random.Random(5)
    stems = [[dice.randrange(90) for _ in range(40)] for _ in range(3)]
    cases = []
    for i in range(14):
        ids = dice.choice(stems)[: dice.randrange(1, 40)] + [dice.randrange(90) for _ in range(dice.randrange(4))]
        sampling = dice.choice([GREEDY, Sampling(0.8, top_k=20, seed=i), Sampling(0.9, top_p=0.9, seed=i)])
        cases.append((ids, sampling, dice.randrange(1, 30)))
    expected = []
    for ids, sampling, count in cases:
        expected.append(list(Engine(model, keep_prefixes=False).generate(ids, sampling, max_new_tokens=count)))

    engine = Engine(model, max_rows=3)
    waiting, requests, cancelled = list(range(len(cases))), {}, set()
    while waiting or engine.busy:
        if waiting and dice.random() < 0.3:
            i = waiting.pop(0)
            ids, sampling, count = cases[i]
            requests[i] = engine.submit(ids, sampling, max_new_tokens=count)
        if requests and dice.random() < 0.03:
            i = dice.choice(list(requests))
            if requests[i].finish_reason is None:
                engine.cancel(requests[i])
                cancelled.add(i)
        engine.step()
    for i, request in requests.items():
        assert request.new == expected[i][: len(request.new)] if i in cancelled else request.new == expected[i], i
    assert len(cancelled) < 8
    if name == "pythia-14m":  # rings that have gone on are not taken over
        assert any(request.reused for request in requests.values())


@pytest.mark.parametrize("name", KINDS)
def test_prompts_that_begin_together_are_read_together(name, monkeypatch):
    model = lively(name, block_size=128)
    prompts = [[3], [5] * 30, [1, 2, 3], [7, 8] * 20]
    expected = [alone(model, ids, sampling=GREEDY, max_new_tokens=6) for ids in prompts]
    engine = Engine(model, max_rows=4)
    requests = [engine.submit(ids, GREEDY, max_new_tokens=6) for ids in prompts]
    engine.step()
    assert [len(request.new) for request in requests] == [1, 1, 1, 1]
    drain(engine)
    assert [request.new for request in requests] == expected


@pytest.mark.parametrize("name", KINDS)
def test_samples_of_one_prompt_read_it_once(name):
    model = lively(name, block_size=128)
    ids = [random.Random(2).randrange(90) for _ in range(50)]
    samplings = [Sampling(0.9, seed=i) for i in range(3)] + [GREEDY]
    expected = [alone(model, ids, sampling=sampling, max_new_tokens=12) for sampling in samplings]
    engine = Engine(model, max_rows=4)
    requests = engine.submit_samples(ids, samplings, max_new_tokens=12)
    drain(engine)
    assert [request.new for request in requests] == expected
    assert [request.reused for request in requests] == [0, 49, 49, 49]


def test_samples_whose_first_is_cancelled_go_on(model):
    expected = alone(model, [1] * 20, sampling=GREEDY, max_new_tokens=5)
    engine = Engine(model, max_rows=2)
    requests = engine.submit_samples([1] * 20, [GREEDY] * 3, max_new_tokens=5)
    engine.cancel(requests[0])
    drain(engine)
    assert [request.new for request in requests] == [[], expected, expected]


@pytest.mark.parametrize("name", KINDS)
def test_a_conversation_reads_only_what_is_new(name):
    model = lively(name, block_size=256)
    engine = Engine(model)
    ids: list[int] = []
    for turn in range(4):
        ids += [turn + k for k in range(9)]
        request = engine.submit(ids, GREEDY, max_new_tokens=10)
        drain(engine)
        assert request.new == alone(model, ids, sampling=GREEDY, max_new_tokens=10)
        # Phi's keys change where a text may get longer than it was trained for
        limit = model.rope.stretch.get("original_max_seq_len") or 0
        crossed = request.reach - 19 <= limit < request.reach
        assert request.reused == (len(ids) - 10 if turn and not crossed else 0)
        ids += request.new


def test_a_ring_that_has_gone_on_is_not_taken_over():
    """What a ring held at an earlier place is gone: the prompt is read anew."""
    model = lively("Mistral-7B-v0.1", block_size=128, sliding_window_size=8)
    stem = list(range(30))
    engine = Engine(model)
    list(engine.generate(stem, GREEDY, max_new_tokens=20))
    request = engine.submit([*stem, 5], GREEDY, max_new_tokens=10)
    drain(engine)
    assert request.reused == 0
    assert request.new == alone(model, [*stem, 5], sampling=GREEDY, max_new_tokens=10)


def test_the_answer_may_be_cut_at_the_context_instead_of_refused(model):
    engine = Engine(model)
    request = engine.submit([1] * 60, GREEDY, max_new_tokens=10**9, at_limit="stop")
    drain(engine)
    assert (len(request.new), request.finish_reason) == (4, "length")
    with pytest.raises(InputError, match=r"64.*64"):
        engine.submit([1] * 64, GREEDY, max_new_tokens=1, at_limit="stop")
    with pytest.raises(InputError, match="at_limit"):
        engine.submit([1], GREEDY, at_limit="sotp")


def test_what_no_memory_holds_is_refused_before_it_is_allocated(monkeypatch):
    monkeypatch.setattr("litgpt.launch.Machine.free_memory", lambda self: 100 << 20)
    engine = Engine(GPT(shrunk("pythia-14m", block_size=10**7)).eval())
    with pytest.raises(InputError, match="memory"):
        engine.submit([1], max_new_tokens=5 * 10**6)
    assert engine.cache is None
    assert not engine.busy


def test_scores_of_an_answer_are_the_models_log_probabilities(model):
    engine = Engine(model, max_rows=2)
    ids = [4, 9, 2]
    request = engine.submit(ids, Sampling(0.7, top_k=3, seed=1), max_new_tokens=8, logprobs=4)
    engine.submit([1, 2], GREEDY, max_new_tokens=20)
    events = [event for event in drain(engine) if event.request is request]
    with torch.no_grad():
        logprobs = model(torch.tensor([ids + request.new]))[0, 2:-1].log_softmax(dim=-1)
    scores = [score for event in events for score in event.scores]
    assert [score.token for score in scores] == request.new
    assert_close(
        torch.tensor([score.logprob for score in scores]), logprobs.gather(1, torch.tensor(request.new)[:, None])[:, 0]
    )
    values, best = logprobs.topk(4)
    assert [[token for token, _ in score.top] for score in scores] == best.tolist()
    assert_close(torch.tensor([[value for _, value in score.top] for score in scores]), values)
    assert all(len(event.scores) == len(event.tokens) for event in events)


def test_scores_lie_beside_the_tokens_that_are_shown(model):
    free = alone(model, [5], sampling=GREEDY, max_new_tokens=12)
    engine = Engine(model)
    request = engine.submit([5], GREEDY, max_new_tokens=12, stop=[free[4:6], [*free[2:4], 99]], logprobs=0)
    events = drain(engine)
    assert [[score.token for score in event.scores] for event in events] == [list(event.tokens) for event in events]
    assert [token for event in events for token in event.tokens] == request.tokens == request.new[: request.shown]


@pytest.mark.parametrize("name", KINDS)
def test_given_text_is_scored(name, monkeypatch):
    monkeypatch.setattr("litgpt.generate.scoring.SCORED_AT_ONCE", 4)
    model = lively(name, block_size=128)
    dice = random.Random(3)
    pairs = [
        ([dice.randrange(90) for _ in range(dice.randrange(1, 20))], [dice.randrange(90) for _ in range(n)])
        for n in (1, 9, 3, 40, 0)
    ]
    pairs += [(pairs[0][0], [7]), (pairs[0][0], [8])]
    pairs += [(pairs[1][0], pairs[1][1][:n] + [7] * 3) for n in (0, 4)]
    found = list(Engine(model).score(pairs, top=1, at_once=60))
    for (before, after), scores in zip(pairs, found, strict=True):
        with torch.no_grad():
            logprobs = model(torch.tensor([before + after]))[
                0, len(before) - 1 : len(before) + len(after) - 1
            ].log_softmax(-1)
        assert [score.token for score in scores] == after
        expected = logprobs.gather(1, torch.tensor(after, dtype=torch.long)[:, None])[:, 0]
        assert_close(torch.tensor([score.logprob for score in scores]), expected, atol=1e-4, rtol=1e-4)
        assert [score.top[0][0] for score in scores] == logprobs.argmax(-1).tolist()
    with pytest.raises(InputError, match="no tokens"):
        next(Engine(model).score([([], [1])]))
    with pytest.raises(InputError, match="128"):
        next(Engine(model).score([([1], [1] * 129)]))


def test_two_streams_read_in_turn_lose_nothing(model):
    prompts = [[1, 2], [7, 8, 9]]
    expected = [alone(model, ids, sampling=Sampling(seed=3), max_new_tokens=8) for ids in prompts]
    for rows in (1, 2):
        engine = Engine(model, max_rows=rows)
        streams = [engine.generate(ids, Sampling(seed=3), max_new_tokens=8) for ids in prompts]
        found: list[list[int]] = [[], []]
        for _ in range(8):
            for stream, tokens in zip(streams, found, strict=True):
                tokens.append(next(stream))
        assert found == expected
        assert [next(stream, None) for stream in streams] == [None, None]


@settings(max_examples=30, deadline=None)
@given(st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=3), max_size=3), st.integers(0, 20))
def test_stops_end_rows_where_naive_search_finds_them(stops, seed):
    model = few_words()
    free = alone(model, [1], sampling=Sampling(seed=seed), max_new_tokens=15)
    ends = [end for end in range(1, 16) if any(free[max(0, end - len(stop)) : end] == stop for stop in stops)]
    engine = Engine(model, max_rows=2)
    engine.submit([2], Sampling(seed=seed + 1), max_new_tokens=9)
    request = engine.submit([1], Sampling(seed=seed), max_new_tokens=15, stop=stops)
    drain(engine)
    if not ends:
        assert (request.tokens, request.finish_reason) == (free, "length")
        return
    longest = max(len(stop) for stop in stops if free[max(0, ends[0] - len(stop)) : ends[0]] == stop)
    assert (request.tokens, request.finish_reason) == (free[: ends[0] - longest], "stop")


def few_words(made: list[GPT] = []) -> GPT:  # noqa: B006  made once
    if not made:
        made.append(lively("pythia-14m", vocab_size=4, padded_vocab_size=4))
        torch.nn.init.normal_(made[0].lm_head.weight, std=0.02)
    return made[0]


BROKEN = 7  # a token of which the models below know nothing but NaN


def with_a_broken_token(name: str, **changes) -> GPT:
    model = lively(name, **changes)
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())  # where it is tied, it stays whole
    model.wte.weight.data[BROKEN] = torch.nan
    return model


DRAFTS = [*[(name, drafts) for name in KINDS for drafts in (None, "text")], ("pythia-14m", "model")]


@pytest.mark.parametrize(("name", "drafts"), DRAFTS)
def test_a_row_whose_logits_are_not_finite_ends_alone(name, drafts):
    """The token comes in a prompt that is read with others, or in the middle of a text; rows are used again."""
    model = with_a_broken_token(name)
    generator = torch.Generator().manual_seed(4)
    prompts = [torch.randint(8, 96, (n,), generator=generator).tolist() for n in (3, 11, 30, 5, 9, 2)]
    settings = [Sampling(temperature=i % 2, seed=i, logit_bias={BROKEN: -100}) for i in range(len(prompts))]
    budgets = [20, 25, 8, 30, 25, 25]

    def made(max_rows: int) -> Engine:
        drafter = {None: None, "text": PromptLookup(3), "model": DraftModel(lively(name), 3)}[drafts]
        return Engine(model, max_rows, drafter=drafter)

    each = zip(prompts, settings, budgets, strict=True)
    expected = [list(made(1).generate(p, s, max_new_tokens=n)) for p, s, n in each]
    engine = made(3)
    requests, doomed = [], []
    for i, prompt in enumerate(prompts):
        requests.append(engine.submit(prompt, settings[i], max_new_tokens=budgets[i]))
        broken = [9, *[11] * (12 * i), BROKEN, 12]
        forced = Sampling(temperature=i // 2 % 2, seed=i, logit_bias={BROKEN: 1000})
        doomed.append(engine.submit([9, 11 + i] if i % 2 else broken, forced, max_new_tokens=9))
    drain(engine)
    assert [request.new for request in requests] == expected
    assert {request.finish_reason for request in requests} == {"length"}
    for i, request in enumerate(doomed):
        assert (request.finish_reason, request.new) == ("failed", [BROKEN] * (i % 2))
        with pytest.raises(InputError, match="not finite"):
            list(engine.follow(request))


def test_a_long_prompt_that_is_not_finite_is_not_read_to_its_end():
    model = with_a_broken_token("pythia-14m", block_size=2048)
    expected = alone(model, [1, 2, 3], sampling=GREEDY, max_new_tokens=9)
    engine = Engine(model, max_rows=2)
    doomed = engine.submit([BROKEN, *[1] * 1800], GREEDY, max_new_tokens=9)
    request = engine.submit([1, 2, 3], GREEDY, max_new_tokens=9)
    drain(engine)
    assert (doomed.finish_reason, doomed.filled < 600) == ("failed", True)
    assert request.new == expected


class Broken:
    """A guide that breaks at one of its calls."""

    def __init__(self, at: str) -> None:
        self.at = at

    def allowed(self, width: int) -> torch.Tensor:
        assert self.at != "allowed", "broken"
        return torch.ones(width, dtype=torch.bool)

    def take(self, token: int) -> None:
        assert self.at != "take", "broken"

    @property
    def is_over(self) -> bool:
        assert self.at != "is_over", "broken"
        return False


@pytest.mark.parametrize("at", ["allowed", "take", "is_over"])
def test_a_row_whose_guide_breaks_ends_alone(model, at):
    prompts = [[1, 2, 3], [4, 5], [6]]
    sampling = Sampling(seed=1)
    expected = [alone(model, p, sampling=sampling, max_new_tokens=9) for p in prompts]
    engine = Engine(model, max_rows=4)
    first = [engine.submit(p, sampling, max_new_tokens=9) for p in prompts[:2]]
    engine.step()
    doomed = engine.submit([8, 8], sampling, max_new_tokens=9, guide=Broken(at))
    last = engine.submit(prompts[2], sampling, max_new_tokens=9)
    drain(engine)
    assert [request.new for request in (*first, last)] == expected
    assert doomed.finish_reason == "failed"
    with pytest.raises(InputError, match=r"held to its form: broken"):
        list(engine.follow(doomed))


def out_of_memory(*_, **__):
    raise MemoryError


def test_rows_whose_step_fails_are_let_go_and_the_engine_goes_on(model, monkeypatch):
    engine = Engine(model, max_rows=2)
    requests = [engine.submit([1, 2], GREEDY, max_new_tokens=9) for _ in range(2)]
    engine.step()
    with monkeypatch.context() as patch:
        patch.setattr(GPT, "forward", out_of_memory)
        with pytest.raises(MemoryError):
            engine.step()
    assert [request.finish_reason for request in requests] == ["failed"] * 2
    expected = alone(model, [1, 2], sampling=GREEDY, max_new_tokens=9)
    assert list(engine.generate([1, 2], GREEDY, max_new_tokens=9)) == expected


def test_growth_keeps_what_rows_hold(model):
    big = lively("Gemma-3-4b-it", block_size=1024)
    first = [3] * 10
    expected = [alone(big, ids, sampling=GREEDY, max_new_tokens=n) for ids, n in ((first, 40), ([4] * 100, 90))]
    engine = Engine(big, max_rows=4)
    requests = [engine.submit(first, GREEDY, max_new_tokens=40)]
    for _ in range(10):
        engine.step()
    requests.append(engine.submit([4] * 100, GREEDY, max_new_tokens=90))
    drain(engine)
    assert [request.new for request in requests] == expected
    assert isinstance(requests[0], Request)


@pytest.mark.parametrize("failure", [RuntimeError("no memory"), KeyboardInterrupt()])
def test_who_is_cut_off_by_a_failure_hears_of_it(model: GPT, failure: BaseException) -> None:
    engine = Engine(model, max_rows=2)
    first, second = (engine.submit(ids, GREEDY, max_new_tokens=8) for ids in ([1, 2, 3], [4, 5]))
    reader = engine.follow(first)
    next(reader)

    def fail(*_: object) -> None:
        raise failure

    hook = model.transformer["h"][0].register_forward_pre_hook(fail)
    with pytest.raises(type(failure)):
        list(engine.follow(second))
    hook.remove()
    with pytest.raises(UserError, match=r"cut off.*(no memory|KeyboardInterrupt)"):
        list(reader)
    assert len(list(engine.generate([1, 2, 3], GREEDY, max_new_tokens=8))) == 8
