"""Sampling against transformers' processors, stop sequences against naive search."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close
from transformers.generation import (
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from litgpt.errors import InputError
from litgpt.generate.sampling import Sampler, Sampling, StopAutomaton, token_distribution


@pytest.mark.parametrize("temperature", [0.3, 1.0, 1.7])
@pytest.mark.parametrize("top_k", [None, 1, 7, 500])
@pytest.mark.parametrize("top_p", [1.0, 0.9, 0.4, 0.0])
def test_the_distribution_is_that_of_transformers(temperature, top_k, top_p):
    logits = torch.randn(60, generator=torch.Generator().manual_seed(2)) * 3
    processors = LogitsProcessorList([TemperatureLogitsWarper(temperature)])
    if top_k is not None:
        processors.append(TopKLogitsWarper(top_k))
    if top_p < 1:
        processors.append(TopPLogitsWarper(top_p))
    expected = processors(torch.zeros(1, 1, dtype=torch.long), logits.unsqueeze(0))[0].softmax(dim=-1)

    probabilities, tokens = token_distribution(logits, Sampling(temperature, top_k, top_p))

    found = torch.zeros(60)
    found[torch.arange(60) if tokens is None else tokens] = probabilities
    assert_close(found, expected)


def test_zero_temperature_is_greedy_whatever_else_is_asked():
    logits = torch.tensor([0.1, 2.0, 1.9])
    assert {Sampler(Sampling(0, top_k=3, top_p=0.9, seed=s))(logits) for s in range(20)} == {1}


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
    + [{"seed": -1}, {"seed": 2**64}],
)
def test_a_setting_out_of_range_is_refused_by_name(wrong):
    with pytest.raises(InputError, match=next(iter(wrong))):
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
