"""Guesses change the speed, and nothing else: against decoding without them, against transformers, by distribution."""

import itertools
import json
import math
import random
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from litgpt.checkpoint import load_model
from litgpt.errors import InputError
from litgpt.generate import base as generate
from litgpt.generate import speculative_decoding
from litgpt.generate.drafters import DraftModel, PromptLookup
from litgpt.generate.engine import Engine
from litgpt.generate.sampling import Choice, Sampler, Sampling
from litgpt.generate.speculation import Proposal, judge
from litgpt.model import GPT
from tests.makers.checkpoints import CONFIGS, hf_model, make_hf_checkpoint
from tests.makers.configs import shrunk
from tests.makers.tokenizers import train_tiny_tokenizer
from tests.test_engine import KINDS, lively

GREEDY = Sampling(temperature=0)
SHAPED = [
    Sampling(0.8, top_k=20, seed=1),
    Sampling(0.9, top_p=0.9, seed=2, repetition_penalty=1.3),
    Sampling(1.1, seed=3, min_p=0.02, presence_penalty=0.5, frequency_penalty=0.2, logit_bias={7: 2.0}),
]
WAYS = ["lookup", "same", "other"]


def drafter(way: str, model: GPT, k: int = 4):
    if way == "lookup":
        return PromptLookup(k)
    if way == "same":
        return DraftModel(model, k)
    torch.manual_seed(9)
    other = deepcopy(model)
    torch.nn.init.normal_(other.lm_head.weight, std=0.3)
    return DraftModel(other, k)


def drain(engine: Engine) -> list:
    events = []
    while engine.busy:
        events += engine.step()
    return events


def some_prompts(n: int, seed: int = 5) -> list[list[int]]:
    dice = random.Random(seed)
    return [[dice.randrange(90) for _ in range(dice.choice([1, 3, 11, 40]))] for _ in range(n)]


# ------------------------------------------------------------------------------------------------ greedy


@pytest.mark.parametrize(
    ("name", "way"), [*itertools.product(KINDS, ["lookup", "other"]), ("pythia-14m", "same"), ("Gemma-3-4b-it", "same")]
)
def test_greedy_text_is_what_it_is_without(name, way):
    """Rows of all lengths come and go; rings go around many times; what was refused is written over."""
    model = lively(name, block_size=128)
    prompts = some_prompts(5)
    counts = [30, 3, 45, 1, 20]
    expected = [list(Engine(model).generate(p, GREEDY, max_new_tokens=n)) for p, n in zip(prompts, counts, strict=True)]
    engine = Engine(model, max_rows=3, drafter=drafter(way, model))
    requests = [engine.submit(p, GREEDY, max_new_tokens=n) for p, n in zip(prompts, counts, strict=True)]
    drain(engine)
    assert [request.new for request in requests] == expected
    assert engine.proposed > 20
    if way == "same":
        assert engine.accepted == engine.proposed


@pytest.mark.parametrize("name", ["pythia-14m", "Gemma-3-4b-it", "Mixtral-8x7B-v0.1", "deepseek_v3"])
def test_greedy_text_is_that_of_transformers_with_an_assistant(name, tmp_path):
    config = CONFIGS.get(name) or shrunk(name)
    theirs, assistant = hf_model(config, seed=1), hf_model(config, seed=2)
    make_hf_checkpoint(tmp_path / "T", config, seed=1)
    make_hf_checkpoint(tmp_path / "D", config, seed=2)
    model, draft = (load_model(tmp_path / d, device="cpu", dtype=torch.float32).eval() for d in "TD")
    prompt = [5, 17, 3, 88, 5, 17]
    how = {"max_new_tokens": 30, "do_sample": False, "pad_token_id": 0}
    ids = torch.tensor([prompt])
    for ours, told in (
        (DraftModel(draft), {"assistant_model": assistant}),
        (PromptLookup(), {"prompt_lookup_num_tokens": 3}),
    ):
        expected = theirs.generate(ids, attention_mask=torch.ones_like(ids), **how, **told)[0, len(prompt) :].tolist()
        assert list(Engine(model, drafter=ours).generate(prompt, GREEDY, max_new_tokens=30)) == expected


# ----------------------------------------------------------------------------------------------- sampled


@pytest.mark.parametrize("name", ["pythia-14m", "Mistral-7B-v0.1"])
def test_with_lookup_a_seed_gives_the_text_that_it_gives_without(name):
    model = lively(name, block_size=128)
    torch.nn.init.normal_(model.lm_head.weight, std=0.05)
    prompts = [[1, 2, 3, 1, 2, 3, 1, 2], [4, 4, 4, 4], [9]]
    expected = [list(Engine(model).generate(p, s, max_new_tokens=50)) for p, s in zip(prompts, SHAPED, strict=True)]
    engine = Engine(model, max_rows=3, drafter=PromptLookup(4))
    requests = [engine.submit(p, s, max_new_tokens=50) for p, s in zip(prompts, SHAPED, strict=True)]
    drain(engine)
    assert [request.new for request in requests] == expected
    assert 0 < engine.accepted < engine.proposed


def three_words(seed: int, std: float = 0.3) -> GPT:
    torch.manual_seed(seed)
    model = GPT(shrunk("Mistral-7B-v0.1", n_layer=1, vocab_size=3, padded_vocab_size=4, sliding_window_size=3)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=std)
    return model


def against(model: GPT) -> GPT:
    """A draft that finds likely what the model finds unlikely."""
    hostile = deepcopy(model)
    with torch.no_grad():
        hostile.lm_head.weight.mul_(-3)
    return hostile


def exact(model: GPT, prompt: list[int], sampling: Sampling, length: int) -> dict[tuple[int, ...], float]:
    """The probability of each answer, by enumeration."""
    found = {(): 1.0}
    for _ in range(length):
        longer = {}
        for text, chance in found.items():
            logits = model(torch.tensor([prompt + list(text)]))[:, -1, :3]
            p = Choice([Sampler(sampling, prompt, drawn=list(text))]).probabilities(logits)[0].tolist()
            longer |= {(*text, token): chance * p[token] for token in range(3)}
        found = longer
    return found


def surprise(counts: dict[tuple[int, ...], int], chances: dict[tuple[int, ...], float]) -> float:
    """How many standard deviations chi-square lies above its mean (Wilson & Hilferty 1931)."""
    n = sum(counts.values())
    assert all(chances[text] > 0 for text in counts)
    cells, rare = [], [0.0, 0.0]
    for text, chance in chances.items():
        cell = [counts.get(text, 0), n * chance]
        if cell[1] >= 5:
            cells.append(cell)
        else:
            rare = [rare[0] + cell[0], rare[1] + cell[1]]
    cells += [rare] if rare[1] >= 1 else []
    freedom = len(cells) - 1
    square = sum((found - wanted) ** 2 / wanted for found, wanted in cells)
    return ((square / freedom) ** (1 / 3) - (1 - 2 / (9 * freedom))) / math.sqrt(2 / (9 * freedom))


SHAPES = {
    "plain": Sampling(1.0),
    "top-k": Sampling(0.7, top_k=2, repetition_penalty=1.2),
    "top-p": Sampling(1.3, top_p=0.8, presence_penalty=0.4, frequency_penalty=0.2, logit_bias={1: 0.3}),
}


@pytest.mark.parametrize(
    ("way", "shape"),
    [
        ("other", "plain"),
        ("other", "top-k"),
        ("other", "top-p"),
        ("same", "top-p"),
        ("hostile", "plain"),
        ("hostile", "top-k"),
        ("lookup", "top-p"),
    ],
)
@torch.inference_mode()
def test_answers_come_as_often_as_they_should(way, shape):
    model, prompt, length = three_words(1), [0, 1, 2, 0, 1], 4
    ways = {
        "other": lambda: DraftModel(three_words(2), 2, n_tokens=3),
        "same": lambda: DraftModel(model, 2, n_tokens=3),
        "hostile": lambda: DraftModel(against(model), 2, n_tokens=3),
        "lookup": lambda: PromptLookup(2),
    }
    engine = Engine(model, max_rows=100, n_tokens=3, keep_prefixes=False, drafter=ways[way]())
    samplings = [replace(SHAPES[shape], seed=seed) for seed in range(600)]
    requests = engine.submit_samples(prompt, samplings, max_new_tokens=length)
    drain(engine)
    counts: dict[tuple[int, ...], int] = {}
    for request in requests:
        counts[tuple(request.new)] = counts.get(tuple(request.new), 0) + 1
    assert surprise(counts, exact(model, prompt, SHAPES[shape], length)) < 3.5
    if way == "same":
        assert engine.accepted > 0.999 * engine.proposed
    if way == "hostile":
        assert engine.accepted < 0.6 * engine.proposed


def test_the_measure_of_surprise_sees_a_wrong_distribution():
    """What an acceptance of every guess would give."""
    model, draft, prompt = three_words(1), three_words(2), [0, 1, 2, 0, 1]
    with torch.inference_mode():
        chances, wrong = (exact(m, prompt, Sampling(), 4) for m in (model, draft))
    dice = random.Random(1)
    drawn = dice.choices(list(wrong), list(wrong.values()), k=600)
    assert surprise({text: drawn.count(text) for text in set(drawn)}, chances) > 5


def test_a_guess_that_cannot_be_drawn_is_never_taken():
    logits = torch.tensor([[0.0, 1.0, 5.0], [0.0, 1.0, 5.0]])
    sure = torch.tensor([[1.0, 0.0, 0.0]])
    for seed in range(50):
        sampler = Sampler(Sampling(top_k=2, seed=seed))
        for proposal in (Proposal([0], sure), Proposal([0])):
            [scores] = judge([sampler], [proposal], logits)
            assert len(scores) == 1
            assert scores[0].token in (1, 2)


def test_a_text_drawn_with_a_draft_does_not_depend_on_its_neighbours():
    model = lively("pythia-14m", block_size=128)
    torch.nn.init.normal_(model.lm_head.weight, std=0.05)
    prompts, counts = some_prompts(3, seed=8), [30, 4, 50]
    alone = []
    for p, s, n in zip(prompts, SHAPED, counts, strict=True):
        alone.append(list(Engine(model, drafter=drafter("other", model)).generate(p, s, max_new_tokens=n)))
    engine = Engine(model, max_rows=4, drafter=drafter("other", model))
    requests = [engine.submit(p, s, max_new_tokens=n) for p, s, n in zip(prompts, SHAPED, counts, strict=True)]
    engine.submit([5] * 9, GREEDY, max_new_tokens=40)
    drain(engine)
    assert [request.new for request in requests] == alone


# -------------------------------------------------------------------------------- ends, limits, what is told


@pytest.mark.parametrize("way", WAYS)
def test_stops_and_scores_are_what_they_are_without(way):
    model = lively("pythia-14m", vocab_size=4, padded_vocab_size=4)
    torch.nn.init.normal_(model.lm_head.weight, std=0.02)
    dice = random.Random(3)
    for _ in range(8):
        stops = [[dice.randrange(4) for _ in range(dice.randrange(1, 5))] for _ in range(2)]
        # greedy answers; what is forbidden differs, so that they differ
        shape = Sampling(0, frequency_penalty=0.05, logit_bias={dice.randrange(4): dice.uniform(-0.1, 0.1)})
        told = {"max_new_tokens": 20, "stop": stops, "logprobs": 2}
        plain, engine = Engine(model), Engine(model, drafter=drafter(way, model))
        expected, request = (e.submit([1, 2], shape, **told) for e in (plain, engine))
        drain(plain)
        events = drain(engine)
        assert (request.new, request.tokens, request.finish_reason) == (
            expected.new, expected.tokens, expected.finish_reason
        )  # fmt: skip
        assert [token for event in events for token in event.tokens] == request.tokens
        assert [score.token for event in events for score in event.scores] == request.tokens
        assert [s.logprob for s in request.scores] == pytest.approx([s.logprob for s in expected.scores], abs=1e-4)
        assert request.held == expected.held
        assert events[-1].finish_reason == request.finish_reason


@pytest.mark.parametrize("way", ["lookup", "other"])
@pytest.mark.parametrize("name", ["pythia-14m", "Gemma-3-4b-it", "Phi-4-mini-instruct"])
def test_rows_go_up_to_the_end_of_the_context(name, way):
    model = lively(name)  # of 64 tokens
    prompts, counts = [[3] * 60, [4, 5] * 10, [6]], [4, 44, 63]
    expected = [list(Engine(model).generate(p, GREEDY, max_new_tokens=n)) for p, n in zip(prompts, counts, strict=True)]
    engine = Engine(model, max_rows=3, drafter=drafter(way, model, k=7))
    requests = [engine.submit(p, GREEDY, max_new_tokens=n) for p, n in zip(prompts, counts, strict=True)]
    drain(engine)
    assert [request.new for request in requests] == expected


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("name", ["pythia-14m", "Mistral-7B-v0.1"])
def test_a_row_that_moves_takes_along_what_was_just_accepted(name, keep):
    model = lively(name, block_size=128)
    prompts, counts = [[i + 1] * 5 for i in range(4)], [5, 9, 30, 30]
    expected = [list(Engine(model).generate(p, GREEDY, max_new_tokens=n)) for p, n in zip(prompts, counts, strict=True)]
    engine = Engine(model, max_rows=4, drafter=DraftModel(model, 3), keep_prefixes=keep)
    requests = [engine.submit(p, GREEDY, max_new_tokens=n) for p, n in zip(prompts, counts, strict=True)]
    drain(engine)
    assert [request.new for request in requests] == expected
    assert engine.accepted == engine.proposed


def test_a_text_that_outgrows_the_draft_model_goes_on_without():
    model = lively("Mistral-7B-v0.1", block_size=128)
    small = GPT(shrunk("pythia-14m", block_size=32)).eval()
    expected = list(Engine(model).generate([1, 2, 3], GREEDY, max_new_tokens=80))
    engine = Engine(model, drafter=DraftModel(small, 3))
    assert list(engine.generate([1, 2, 3], GREEDY, max_new_tokens=80)) == expected
    assert 0 < engine.proposed < 3 * 32


@pytest.mark.parametrize("way", ["lookup", "other"])
@pytest.mark.parametrize("name", ["pythia-14m", "Gemma-3-4b-it"])
def test_random_schedules_change_no_text(name, way, monkeypatch):
    """Rows join, leave, share beginnings and are cancelled; small chunks are read between the steps."""
    monkeypatch.setattr("litgpt.generate.engine.PREFILL_CHUNK", 16)
    model = lively(name, block_size=128)
    dice = random.Random(7)
    stem = [dice.randrange(90) for _ in range(30)]
    cases = [([*stem[: dice.randrange(1, 30)], dice.randrange(90)], dice.randrange(1, 30)) for _ in range(10)]
    expected = [list(Engine(model).generate(ids, GREEDY, max_new_tokens=n)) for ids, n in cases]
    engine = Engine(model, max_rows=3, drafter=drafter(way, model))
    waiting, requests = list(range(len(cases))), {}
    while waiting or engine.busy:
        if waiting and dice.random() < 0.4:
            i = waiting.pop(0)
            requests[i] = engine.submit(cases[i][0], GREEDY, max_new_tokens=cases[i][1])
        if dice.random() < 0.05 and requests:
            engine.cancel(requests[dice.choice(list(requests))])
        engine.step()
    for i, request in requests.items():
        length = len(request.new) if request.finish_reason == "cancelled" else len(expected[i])
        assert request.new == expected[i][:length], i
    assert sum(request.finish_reason == "length" for request in requests.values()) > 5


@pytest.mark.parametrize("name", ["pythia-14m", "Mistral-7B-v0.1"])
def test_a_conversation_goes_on_from_what_was_accepted(name):
    model = lively(name, block_size=256)
    engine, ids = Engine(model, drafter=PromptLookup(5)), []
    for turn in range(4):
        ids += [turn + k for k in range(9)]
        request = engine.submit(ids, GREEDY, max_new_tokens=12)
        drain(engine)
        assert request.new == list(Engine(model).generate(ids, GREEDY, max_new_tokens=12))
        assert request.reused == (len(ids) - 10 if turn else 0)
        ids += request.new


def test_a_ring_that_refused_guesses_went_around_is_not_taken_over():
    model = lively("Mistral-7B-v0.1", sliding_window_size=8)
    for length in range(4, 12):
        engine = Engine(model, drafter=drafter("other", model, k=6))
        stem = list(range(6))
        stream = engine.generate(stem, GREEDY, max_new_tokens=40)
        for _ in range(length):
            next(stream)
        stream.close()
        expected = list(Engine(model).generate([*stem, 50], GREEDY, max_new_tokens=8))
        assert list(engine.generate([*stem, 50], GREEDY, max_new_tokens=8)) == expected


def test_samples_of_one_prompt_share_the_reading_of_the_draft_too():
    model = lively("pythia-14m", block_size=128)
    draft, read = DraftModel(model, 3), []
    inner = draft.model.hidden
    engine = Engine(lively("pythia-14m", block_size=128), max_rows=4, drafter=draft)
    draft.model.hidden = lambda idx, *args, **told: read.append(idx.numel()) or inner(idx, *args, **told)
    requests = engine.submit_samples(list(range(60)), [GREEDY] * 4, max_new_tokens=10)
    drain(engine)
    assert len({tuple(request.new) for request in requests}) == 1
    assert sum(n for n in read if n > 20) < 100


class Even:
    """Allows even tokens; over after ten."""

    def __init__(self) -> None:
        self.taken: list[int] = []

    def allowed(self, width: int) -> torch.Tensor:
        return torch.arange(width) % 2 == 0

    def take(self, token: int) -> None:
        self.taken.append(token)

    @property
    def is_over(self) -> bool:
        return len(self.taken) >= 10


def test_a_row_that_is_held_to_a_form_stands_beside_rows_with_guesses():
    model = lively("pythia-14m")
    plain = Engine(model)
    expected = [plain.submit([1, 2], GREEDY, guide=Even()), plain.submit([3, 4], GREEDY, max_new_tokens=30)]
    drain(plain)
    engine, guide = Engine(model, max_rows=2, drafter=DraftModel(model)), Even()
    found = [engine.submit([1, 2], GREEDY, guide=guide), engine.submit([3, 4], GREEDY, max_new_tokens=30)]
    drain(engine)
    assert [request.new for request in found] == [request.new for request in expected]
    assert guide.taken == found[0].new
    assert engine.accepted


def test_lookup_proposes_what_followed_the_longest_match_last_time():
    def guess(text: list[int], count: int) -> list[int]:
        engine = Engine(lively("pythia-14m"))
        request = engine.submit(text, GREEDY)
        return list(PromptLookup(8).propose([request], [count])[0].tokens)

    assert guess([1, 2, 3, 9, 8, 2, 3, 7, 1, 2, 3], 2) == [9, 8]  # three tokens go before two that are nearer
    assert guess([1, 2, 9, 1, 2, 8, 5, 1, 2], 2) == [8, 5]  # the nearer of two
    assert guess([1, 2, 1, 2, 1, 2], 5) == [1, 2, 1, 2, 1]
    assert guess([1, 2, 3], 3) == []
    assert guess([1, 2, 1], 0) == []


def test_steps_of_both_models_are_compiled_once(monkeypatch):
    monkeypatch.setattr("litgpt.generate.compiled.BACKEND", "eager")
    torch._dynamo.reset()
    model = lively("Mistral-7B-v0.1", n_layer=1, block_size=64)
    prompts = [[1, 2, 3] * 4, [7] * 30, [5]]
    expected = [list(Engine(model).generate(p, GREEDY, max_new_tokens=20)) for p in prompts]
    draft = DraftModel(drafter("other", model).model, 4, compile=True)
    engine = Engine(model, max_rows=2, compile=True, drafter=draft)
    for _ in range(2):  # warm
        engine.submit([5] * 30, GREEDY, max_new_tokens=20)
    drain(engine)
    with torch._dynamo.config.patch(error_on_recompile=True):
        requests = [engine.submit(p, GREEDY, max_new_tokens=20) for p in prompts]
        drain(engine)
    assert [request.new for request in requests] == expected
    assert engine.compiled.is_compiled
    assert draft.compiled.is_compiled
    assert engine.proposed


def test_broken_draft_models_are_named():
    model = lively("pythia-14m")
    broken = deepcopy(model)
    broken.transformer["ln_f"].weight.data.fill_(torch.nan)
    for sampling in (GREEDY, Sampling(seed=1)):
        engine = Engine(model, drafter=DraftModel(broken))
        with pytest.raises(InputError, match=r"draft model.*not finite"):
            list(engine.generate([1, 2], sampling, max_new_tokens=5))
    engine = Engine(model, drafter=DraftModel(GPT(shrunk("pythia-14m", vocab_size=40, padded_vocab_size=64))))
    with pytest.raises(InputError, match="draft model has no token 100"):
        list(engine.generate([1, 100], GREEDY, max_new_tokens=5))
    with pytest.raises(InputError, match="speculative_k is 0"):
        PromptLookup(0)


# ------------------------------------------------------------------------------------------- the command


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    home = tmp_path_factory.mktemp("speculative")
    sizes = {"vocab_size": 300, "padded_vocab_size": 320}
    tokenizer = train_tiny_tokenizer(home / "tokenizer")
    make_hf_checkpoint(home / "T", shrunk("Mistral-7B-v0.1", **sizes), tokenizer_dir=tokenizer)
    make_hf_checkpoint(home / "D", shrunk("pythia-14m", **sizes), tokenizer_dir=tokenizer)
    smaller = train_tiny_tokenizer(home / "smaller", 280)
    make_hf_checkpoint(home / "other", shrunk("pythia-14m", **sizes), tokenizer_dir=smaller)
    return home


def test_the_command_writes_what_generate_writes(home, capsys):
    for sampling in ({"temperature": 0}, {"temperature": 1.2, "seed": 4}):
        generate.main(home / "T", "The mill the mill", max_new_tokens=20, num_samples=2, **sampling)
        expected = capsys.readouterr().out
        speculative_decoding.main(home / "T", prompt="The mill the mill", max_new_tokens=20, num_samples=2, **sampling)
        found = capsys.readouterr()
        assert found.out == expected
        assert "guessed tokens accepted" in found.err
        assert "tokens/s" in found.err
        speculative_decoding.main(
            home / "D", home / "T", "The mill the mill", max_new_tokens=20, num_samples=2, **sampling
        )
        found = capsys.readouterr()
        assert sampling["temperature"] or found.out == expected
        assert "guessed tokens accepted" in found.err


def test_the_command_takes_files_of_prompts(home, tmp_path):
    (tmp_path / "p.txt").write_text("The mill\nThe river ran\n")
    for name, drafts in (("plain", None), ("ahead", home / "D")):
        told = {"prompts_file": tmp_path / "p.txt", "output": tmp_path / name, "max_new_tokens": 9, "temperature": 0}
        if drafts is None:
            generate.main(home / "T", **told)
        else:
            speculative_decoding.main(drafts, home / "T", speculative_k=5, **told)
    lines = [[json.loads(line) for line in (tmp_path / n).read_text().splitlines()] for n in ("plain", "ahead")]
    assert lines[0] == lines[1]
    assert len(lines[0]) == 2


def test_what_cannot_work_is_refused_in_one_line(home):
    for arguments, words in itertools.chain(
        [((home / "other", home / "T"), r"tokenizers.*280.*300.*same family")],
        [((), "target_model_checkpoint_dir is missing")],
        [((home / "nowhere", home / "T"), "nowhere")],
    ):
        with pytest.raises((InputError, FileNotFoundError), match=words):
            speculative_decoding.main(*arguments, max_new_tokens=3)
    with pytest.raises(InputError, match="speculative_k is 0"):
        speculative_decoding.main(home / "T", speculative_k=0)


def test_a_seed_repeats_whether_or_not_the_prompt_was_read_before() -> None:
    model = lively("pythia-14m")
    other = deepcopy(model)
    torch.nn.init.normal_(other.lm_head.weight, std=0.3)
    ids, samplings = list(range(20)), [Sampling(0.9, seed=seed) for seed in range(4)]
    alone = [
        list(Engine(model, drafter=DraftModel(other)).generate(ids, each, max_new_tokens=12)) for each in samplings
    ]
    engine = Engine(model, max_rows=4, drafter=DraftModel(other))
    requests = engine.submit_samples(ids, samplings, max_new_tokens=12)
    while engine.busy:
        engine.step()
    assert [request.new for request in requests] == alone
    assert list(engine.generate(ids, samplings[0], max_new_tokens=12)) == alone[0]  # most of the prompt is held


@pytest.mark.parametrize("settings", [{"repetition_penalty": 1.2}, {"presence_penalty": 0.5}, {}])
def test_nothing_is_proposed_that_no_token_has(settings: dict[str, float]) -> None:
    model = lively("pythia-14m")
    sampling = Sampling(0, logit_bias={5: 100.0}, **settings)
    plain = Engine(model, n_tokens=96)
    expected = list(plain.generate([5, 100, 7, 5, 100, 7], sampling, max_new_tokens=10))
    engine = Engine(model, n_tokens=96, drafter=PromptLookup(3))
    assert list(engine.generate([5, 100, 7, 5, 100, 7], sampling, max_new_tokens=10)) == expected
