"""Sampling against transformers' processors, stop sequences against naive search."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close
from transformers.generation import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from litgpt.errors import InputError, InputTypeError
from litgpt.generate.sampling import Choice, Sampler, Sampling
from litgpt.generate.stops import StopAutomaton


def spread(sampling: Sampling, logits: torch.Tensor, prompt: list[int] = (), drawn: list[int] = ()) -> torch.Tensor:
    """The distribution (V,) that one row draws from."""
    return Choice([Sampler(sampling, prompt, drawn=list(drawn))]).probabilities(logits.unsqueeze(0))[0]


def judged(sampling: Sampling, logits: torch.Tensor, prompt: list[int] = (), drawn: list[int] = ()) -> torch.Tensor:
    """The same from transformers' processors, in its order; the penalties of OpenAI's API, which it lacks, by hand."""
    ids = torch.tensor([[*prompt, *drawn]], dtype=torch.long)
    processors = LogitsProcessorList()
    if sampling.logit_bias:
        processors.append(SequenceBiasLogitsProcessor([[[t], b] for t, b in sampling.logit_bias.items()]))
    if sampling.repetition_penalty != 1:
        processors.append(RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty))
    scores = processors(ids, logits.unsqueeze(0).clone())
    for token in drawn:
        scores[0, token] -= sampling.frequency_penalty
    for token in set(drawn):
        scores[0, token] -= sampling.presence_penalty
    warpers = LogitsProcessorList([TemperatureLogitsWarper(sampling.temperature)])
    if sampling.top_k is not None:
        warpers.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        warpers.append(TopPLogitsWarper(sampling.top_p))
    if sampling.min_p:
        warpers.append(MinPLogitsWarper(sampling.min_p))
    return warpers(ids, scores)[0].softmax(dim=-1)


@pytest.mark.parametrize("temperature", [0.3, 1.0, 1.7])
@pytest.mark.parametrize("top_k", [None, 1, 7, 500])
@pytest.mark.parametrize("top_p", [1.0, 0.9, 0.4, 0.0])
@pytest.mark.parametrize("min_p", [0.0, 0.05, 1.0])
def test_the_distribution_is_that_of_transformers(temperature, top_k, top_p, min_p):
    logits = torch.randn(60, generator=torch.Generator().manual_seed(2)) * 3
    sampling = Sampling(temperature, top_k, top_p, min_p=min_p)
    assert_close(spread(sampling, logits), judged(sampling, logits))


@settings(max_examples=150, deadline=None)
@given(
    st.builds(
        Sampling,
        temperature=st.floats(0.1, 3),
        top_k=st.none() | st.integers(1, 70),
        top_p=st.sampled_from([1.0, 0.95, 0.5]),
        min_p=st.sampled_from([0.0, 0.1]),
        repetition_penalty=st.sampled_from([1.0, 1.3, 0.7]),
        presence_penalty=st.sampled_from([0.0, 0.8, -0.5]),
        frequency_penalty=st.sampled_from([0.0, 0.4, -0.3]),
        logit_bias=st.dictionaries(st.integers(0, 59), st.floats(-5, 5), max_size=3),
    ),
    st.lists(st.integers(0, 59), min_size=1, max_size=8),
    st.lists(st.integers(0, 59), max_size=8),
    st.integers(0, 99),
)
def test_all_settings_together_are_those_of_transformers(sampling, prompt, drawn, seed):
    logits = torch.randn(60, generator=torch.Generator().manual_seed(seed)) * 3
    assert_close(spread(sampling, logits, prompt, drawn), judged(sampling, logits, prompt, drawn), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("sampling", [Sampling(top_k=3), Sampling(top_k=3, min_p=0.5), Sampling(0.5, top_k=1)])
@pytest.mark.parametrize("ties", [4, 300])
def test_tokens_as_likely_as_the_kth_stay_as_in_transformers(sampling, ties):
    logits = torch.zeros(400)
    logits[:ties] = 1.0
    assert_close(spread(sampling, logits), judged(sampling, logits))


def test_a_nucleus_of_most_of_a_large_vocabulary_is_found():
    logits = torch.randn(5000, generator=torch.Generator().manual_seed(1)) * 0.1
    sampling = Sampling(top_p=0.9)
    assert_close(spread(sampling, logits), judged(sampling, logits))
    assert spread(sampling, logits).count_nonzero() > 4000


def test_what_is_drawn_has_the_frequencies_of_the_distribution():
    logits = torch.randn(30, generator=torch.Generator().manual_seed(3)) * 2
    for sampling in (Sampling(1.3), Sampling(1.3, top_k=9, top_p=0.9), Sampling(1.3, min_p=0.02)):
        rows = [Sampler(Sampling(**(vars(sampling) | {"seed": seed}))) for seed in range(6000)]
        tokens = torch.tensor([score.token for score in Choice(rows)(logits.expand(6000, -1))])
        expected = judged(sampling, logits) * 6000
        found = tokens.bincount(minlength=30).double()
        assert not found[expected == 0].any()
        squares = ((found - expected) ** 2 / expected)[expected > 0].sum()
        freedom = int((expected > 0).sum()) - 1
        assert squares < freedom + 5 * math.sqrt(2 * freedom), "chi squared, five deviations"


MIXED = [
    Sampling(0), Sampling(0.9, seed=1), Sampling(0.9, top_k=5, seed=2), Sampling(0.7, top_p=0.8, seed=3),
    Sampling(1.1, min_p=0.1, seed=4), Sampling(0, repetition_penalty=1.5), Sampling(0.8, presence_penalty=1, seed=5),
    Sampling(0.9, top_k=8, top_p=0.9, min_p=0.02, frequency_penalty=0.5, logit_bias={3: 2.0}, seed=6),
]  # fmt: skip


def test_rows_of_all_kinds_draw_together_what_they_draw_alone():
    generator = torch.Generator().manual_seed(8)
    steps = [torch.randn(len(MIXED), 50, generator=generator) * 2 for _ in range(6)]
    alone = []
    for i, sampling in enumerate(MIXED):
        row = Sampler(sampling, [1, 2])
        alone.append([row(logits[i]) for logits in steps])
    rows = [Sampler(sampling, [1, 2]) for sampling in MIXED]
    choice = Choice(rows)
    together = [[score.token for score in choice(logits)] for logits in steps]
    assert [list(tokens) for tokens in zip(*together, strict=True)] == alone == [row.drawn for row in rows]


def test_a_token_of_no_weight_is_never_drawn():
    class Lucky:
        def random(self) -> float:
            return 1 - 2**-53

    row = Sampler(Sampling())
    row.random = Lucky()
    assert row(torch.tensor([1.0, 2.0, -math.inf])) == 1


def test_scores_are_those_of_the_model_whatever_is_drawn():
    logits = torch.randn(3, 40, generator=torch.Generator().manual_seed(5))
    rows = [
        Sampler(Sampling(0.1, top_k=1, logit_bias={7: 100.0}), logprobs=3), Sampler(Sampling(0)),
        Sampler(Sampling(0), logprobs=0),
    ]  # fmt: skip
    scores = Choice(rows)(logits)
    expected = logits.log_softmax(dim=-1)
    assert scores[0].token == 7
    assert scores[0].logprob == pytest.approx(float(expected[0, 7]), abs=1e-5)
    values, best = expected[0].topk(3)
    assert [token for token, _ in scores[0].top] == best.tolist()
    assert [value for _, value in scores[0].top] == pytest.approx(values.tolist(), abs=1e-5)
    assert math.isnan(scores[1].logprob)
    assert scores[2].top == ()
    assert scores[2].logprob == pytest.approx(float(expected[2].max()), abs=1e-5)


def test_zero_temperature_is_greedy_whatever_else_is_asked():
    logits = torch.tensor([0.1, 2.0, 1.9])
    assert {Sampler(Sampling(0, top_k=3, top_p=0.9, seed=s))(logits) for s in range(20)} == {1}
    assert Sampler(Sampling(0, logit_bias={2: 1.0}))(logits) == 2


@pytest.mark.parametrize("temperature", [1e-40, 1e-60, 5e-324])
def test_a_temperature_that_fp32_does_not_know_is_greedy(temperature):
    logits = torch.tensor([0.1, 2.0, 2.0 - 1e-3, -1.0])
    assert [Sampler(Sampling(temperature, seed=seed))(logits) for seed in range(20)] == [1] * 20


@pytest.mark.parametrize(
    ("mine", "beside"),
    [
        ({"top_k": 50}, {"top_k": 200}),
        ({"top_p": 0.95}, {"top_k": 400}),
        ({"top_k": 50, "top_p": 0.9}, {"top_p": 0.95}),
        ({"top_k": 50}, {}),
        ({"top_p": 0.99}, {"top_p": 0.5}),
    ],
)
def test_where_logits_tie_a_row_draws_what_it_draws_alone(mine, beside):
    generator = torch.Generator().manual_seed(0)
    for seed in range(60):
        logits = (torch.randn(2, 4000, generator=generator) * 2.5).bfloat16()
        row = Sampling(0.8, seed=seed, **mine)
        together = Choice([Sampler(row), Sampler(Sampling(0.8, seed=1, **beside))])(logits)
        assert together[0].token == Sampler(row)(logits[0])


def test_a_temperature_near_zero_is_nearly_greedy():
    assert {Sampler(Sampling(1e-44, seed=s))(torch.tensor([0.1, 50.0, 49.0])) for s in range(5)} == {1}


def test_a_seed_repeats_the_choices_and_another_does_not():
    logits = torch.zeros(1000)

    def draw(seed: int) -> list[int]:
        sampler = Sampler(Sampling(seed=seed))
        return [sampler(logits) for _ in range(5)]

    assert draw(1) == draw(1)
    assert draw(1) != draw(2)


@pytest.mark.parametrize(
    "wrong",
    [{"top_k": 0}, {"top_k": -1}, {"top_p": -0.1}, {"top_p": 2.0}, {"top_p": math.nan}]
    + [{"temperature": t} for t in (-1.0, math.nan, math.inf)]
    + [{"min_p": p} for p in (-0.1, 1.1, math.nan)]
    + [{"repetition_penalty": p} for p in (0.0, -1.0, math.inf)]
    + [{"presence_penalty": math.nan}, {"frequency_penalty": math.inf}, {"presence_penalty": 1e39}]
    + [{"repetition_penalty": 1e-40}, {"frequency_penalty": -3.4e38}, {"logit_bias": {4: 1e39}}]
    + [{"logit_bias": {"4": 1.0}}, {"logit_bias": {-1: 1.0}}, {"logit_bias": {True: 1.0}}]
    + [{"logit_bias": {1: math.inf}}, {"logit_bias": {-1: 1.0}}, {"logit_bias": {"a": 1.0}}]
    + [{"seed": -1}, {"seed": 2**64}],
)
def test_a_setting_out_of_range_is_refused_by_name(wrong):
    with pytest.raises(InputError, match=next(iter(wrong))):
        Sampling(**wrong)


@pytest.mark.parametrize(
    "wrong", [{"temperature": "hot"}, {"top_k": 1.5}, {"seed": "x"}, {"top_p": None}, {"top_k": True}]
)
def test_a_setting_of_the_wrong_type_is_refused_by_name(wrong):
    with pytest.raises(InputTypeError, match=next(iter(wrong))):
        Sampling(**wrong)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_logits_that_are_not_finite_are_refused(bad):
    with pytest.raises(InputError, match="not finite"):
        Sampler(Sampling())(torch.tensor([0.0, bad, 1.0]))


def naive(stream: list[int], stops: list[list[int]]) -> list[int]:
    """What comes before the first place where a stop is complete (of several, the one that began first)."""
    for end in range(1, len(stream) + 1):
        hits = [len(stop) for stop in stops if stop and stream[max(0, end - len(stop)) : end] == stop]
        if hits:
            return stream[: end - max(hits)]
    return stream


symbols = st.integers(0, 2)


@settings(max_examples=400, deadline=None)
@given(st.lists(symbols, max_size=30), st.lists(st.lists(symbols, min_size=1, max_size=5), max_size=4))
def test_stops_are_found_as_naive_search_finds_them(stream, stops):
    watch, shown = StopAutomaton(stops), []
    for symbol in stream:
        shown += watch.push(symbol)
        assert shown == naive(stream, stops)[: len(shown)], "something past a stop, or out of order, was shown"
        if watch.stopped:
            break
    if not watch.stopped:
        shown += watch.flush()
    assert shown == naive(stream, stops)


def test_nothing_is_held_back_that_cannot_begin_a_stop():
    watch = StopAutomaton([[1, 1, 2]])
    assert [watch.push(s) for s in (5, 1, 1, 1, 3)] == [[5], [], [], [1], [1, 1, 3]]
    assert not watch.stopped
