"""`LLM`: one object for notebooks and programs."""

import copy
import re
import sys
import threading
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from litgpt import LLM, Config
from litgpt.data import JSON
from litgpt.errors import InputError, InputTypeError, MissingError
from litgpt.generate.sampling import Sampling
from litgpt.generate.session import load_session
from tests.makers.checkpoints import make_hf_checkpoint
from tests.makers.configs import shrunk
from tests.makers.runs import tensor_bytes
from tests.makers.tokenizers import train_tiny_tokenizer
from tests.test_house import loaded_by

CONTEXT = 64
ROOT = Path(__file__).parents[1]
PROMPTS = ["The mill", "A small model learns small words", "Numbers such as 0, 1, 2"]
ROWS = [{"instruction": f"Say {n}", "output": f"{n} it is"} for n in range(12)]
TEMPLATE = "{% for m in messages %}{{ m.role + ':' + m.content + '\n' }}{% endfor %}"


def make(directory: Path, **fields) -> Path:
    config = shrunk("pythia-14m", vocab_size=300, padded_vocab_size=320, **fields)
    return make_hf_checkpoint(directory, config, tokenizer_dir=train_tiny_tokenizer(directory.parent / "tokenizer"))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return make(tmp_path_factory.mktemp("api") / "T")


@pytest.fixture
def llm(checkpoint) -> LLM:
    return LLM.load(checkpoint)


@pytest.fixture(scope="module")
def theirs(checkpoint):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(checkpoint)


def greedy(llm: LLM, prompt="The mill", **options) -> torch.Tensor:
    return llm.generate(prompt, max_new_tokens=8, temperature=0, return_as_token_ids=True, **options)


# Loading --------------------------------------------------------------------------------------------------------------


def test_the_import_costs_torch_and_loading_on_one_device_neither_lightning_nor_transformers(checkpoint):
    light = {"lightning", "transformers", "tokenizers", "jinja2", "yaml"}
    code = f"""from litgpt import LLM
there = {light} & {{name.partition('.')[0] for name in sys.modules}}
assert not there, there
LLM.load({str(checkpoint)!r}).generate('a', max_new_tokens=2)"""
    assert not loaded_by(code) & {"lightning", "transformers", "peft", "bitsandbytes", "torchao", "pandas", "scipy"}


def test_a_random_model_needs_a_name_and_no_tokenizer():
    torch.manual_seed(3)
    config = shrunk("pythia-14m")
    first = LLM.load(config, init="random")
    torch.manual_seed(3)
    assert torch.equal(first.model.lm_head.weight, LLM.load(config, init="random").model.lm_head.weight)
    assert greedy(first, torch.tensor([5, 6])).shape == (8,)
    with pytest.raises(InputError, match="tokenizer_dir"):
        first.generate("text")
    with pytest.raises(InputError, match="tokenizer_dir"):
        first.preprocessor  # noqa: B018
    for name, near in {"pythia-14": "did you mean 'pythia-14m'", "bogus": "litgpt download list"}.items():
        with pytest.raises(MissingError, match=near):
            LLM.load(name, init="random")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"init": "rand"}, "init is 'rand'.*did you mean 'random'"),
        ({"distribute": "all"}, "distribute is 'all'"),
        ({"precision": "bf16"}, "bf16-true"),
        ({"device": "gpu:x"}, "device"),
        ({"quantize": "bnb.nf5"}, "bnb.nf4"),
        ({"quantize": 5}, "quantize is of type int"),
        ({"precision": 5}, "precision is of type int"),
        ({"tokenizer_dir": 5}, "tokenizer_dir is of type int"),
        ({"prompt_style": "alpacca"}, "did you mean 'alpaca'"),
        ({"prompt_style": Path("alpacca")}, "did you mean 'alpaca'"),
        ({"prompt_style": Path("no.jinja")}, "no.jinja"),
        ({"prompt_style": 5}, "prompt_style is of type int, must be a style, its name or a Jinja file"),
    ],
)
def test_a_wrong_option_of_load_is_named_and_nothing_else_is_said(checkpoint, options, message, capsys):
    with pytest.raises((InputError, InputTypeError), match=message):
        LLM.load(checkpoint, **options)
    assert capsys.readouterr() == ("", "")


def test_a_style_is_named_by_a_path_as_by_a_text(checkpoint, tmp_path):
    (tmp_path / "mine.jinja").write_text(TEMPLATE)
    messages = [{"role": "user", "content": "The mill"}]
    style = LLM.load(checkpoint, prompt_style=str(tmp_path / "mine.jinja")).prompt_style
    assert style.render(messages) == "user:The mill\n"
    llm = LLM.load(checkpoint, prompt_style=tmp_path / "mine.jinja")
    assert llm.prompt_style.render(messages) == style.render(messages)
    out = LLM.load(checkpoint).save(tmp_path / "out", prompt_style=tmp_path / "mine.jinja")
    assert LLM.load(out).prompt_style.render(messages) == style.render(messages)


def test_a_model_that_is_not_there_is_named_and_no_name_is_a_type_error():
    with pytest.raises(FileNotFoundError, match="no/where/at/all"):
        LLM.load("no/where/at/all")
    with pytest.raises(TypeError, match="model is of type int"):
        LLM.load(5)


def test_a_model_is_placed_when_it_is_told_so_with_the_weights_it_has(checkpoint):
    llm = LLM.load(checkpoint, distribute=None)
    for use in (lambda: llm.generate("a"), lambda: llm(torch.tensor([[1]])), llm.state_dict):
        with pytest.raises(InputError, match=r"llm.distribute\(\) or llm.trainer_setup"):
            use()
    llm.distribute(precision="bf16-true", fixed_kv_cache_size=16)
    assert {p.dtype for p in llm.parameters()} == {torch.bfloat16}
    with pytest.raises(InputError, match="context of 16 tokens"):
        llm.generate("a", max_new_tokens=16)
    with torch.no_grad():
        llm.model.lm_head.weight.zero_()
    llm.distribute(precision="32-true")
    assert llm.model.lm_head.weight.dtype == torch.float32
    assert not llm.model.lm_head.weight.any()
    llm.generate("a", max_new_tokens=40)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"devices": 2}, "several devices need a generate_strategy"),
        ({"generate_strategy": "sequental"}, "did you mean 'sequential'"),
        ({"fixed_kv_cache_size": CONTEXT + 1}, f"between 1 and the model's context, {CONTEXT}"),
        ({"fixed_kv_cache_size": True}, "fixed_kv_cache_size is True"),
        ({"accelerator": "tpu"}, "device"),
        ({"precision": 5}, "precision is of type int"),
        ({"quantize": 5}, "quantize is of type int"),
        ({"quantize": "bnb.nf5"}, "did you mean 'bnb.nf4'"),
    ],
)
def test_a_wrong_option_of_distribute_is_named_and_the_model_stays(llm, options, message, capsys):
    before = llm.model
    with pytest.raises((InputError, InputTypeError), match=message):
        llm.distribute(**options)
    assert llm.model is before
    assert capsys.readouterr() == ("", "")


def test_weights_in_4_bits_come_from_the_files_and_are_not_saved(checkpoint, llm, tmp_path):
    pytest.importorskip("bitsandbytes")
    small = LLM.load(checkpoint, quantize="bnb.nf4")
    ids = torch.arange(12).view(1, 12)
    assert 0 < (small(ids) - llm(ids)).abs().max() < 1
    with pytest.raises(InputError, match="load it without quantize"):
        small.save(tmp_path / "out")
    llm.distribute(quantize="bnb.nf4")
    assert_close(llm(ids), small(ids))
    llm.distribute()  # the whole weights again, from the files
    assert_close(llm(ids), LLM.load(checkpoint)(ids))
    with torch.no_grad():
        llm.model.lm_head.weight.zero_()
    with pytest.raises(InputError, match="save the model"):
        llm.distribute(quantize="bnb.nf4")


# Generating -----------------------------------------------------------------------------------------------------------


def test_greedy_text_is_that_of_transformers(llm, theirs):
    for prompt in PROMPTS:
        ids = llm.preprocessor.encode(prompt)
        whole = theirs.generate(ids[None], max_new_tokens=8, do_sample=False, pad_token_id=0, eos_token_id=None)
        assert torch.equal(greedy(llm, prompt), whole[0, len(ids) :])
        assert torch.equal(greedy(llm, ids), whole[0, len(ids) :])


def test_answers_of_a_list_are_what_they_are_alone(llm, checkpoint):
    options = {"max_new_tokens": 10, "seed": 4, "top_k": 40}
    alone = [llm.generate(prompt, **options) for prompt in PROMPTS]
    assert llm.generate(PROMPTS, **options) == alone
    assert llm.generate(tuple(PROMPTS), batch_size=2, **options) == alone
    assert llm.generate([], **options) == []
    session = load_session(checkpoint)
    messages = [{"role": "user", "content": PROMPTS[0]}]
    assert alone[0] == "".join(session.answer(messages, Sampling(1.0, 40, seed=4), max_new_tokens=10))


def test_sample_i_uses_seed_plus_i(llm):
    options = {"max_new_tokens": 6}
    samples = [llm.generate("The mill", seed=seed, **options) for seed in (7, 8, 9)]
    assert llm.generate("The mill", n=3, seed=7, **options) == samples
    assert llm.generate(["a", "The mill"], n=3, seed=7, **options)[1] == samples
    assert llm.generate("a", n=2, **options) != llm.generate("a", n=2, **options)


def test_pieces_laid_end_to_end_are_the_whole(llm):
    options = {"max_new_tokens": 12, "seed": 2}
    stream = llm.generate("é😀漢字", stream=True, **options)
    assert "".join(stream) == llm.generate("é😀漢字", **options) == stream.whole()
    assert (stream.n_tokens, stream.finish_reasons) == (12, ["length"])
    ids = torch.cat(list(llm.generate("a", stream=True, return_as_token_ids=True, **options)))
    assert torch.equal(ids, llm.generate("a", return_as_token_ids=True, **options))
    parts = ["", "", ""]
    for index, piece in llm.generate(PROMPTS, stream=True, **options):
        parts[index] += piece
    assert parts == llm.generate(PROMPTS, **options)


def test_an_answer_ends_before_a_stop(llm):
    whole = llm.generate("The mill", max_new_tokens=30, seed=1)
    stop = next(c for c in whole[3:] if c.isascii() and c not in whole[:3])
    assert llm.generate("The mill", max_new_tokens=30, seed=1, stop=[stop, "never"]) == whole[: whole.index(stop)]
    stream = llm.generate("The mill", max_new_tokens=30, seed=1, stop=stop, stream=True)
    assert (stream.whole(), stream.finish_reasons) == (whole[: whole.index(stop)], ["stop"])
    biased = llm.generate("a", max_new_tokens=3, logit_bias={65: 100.0}, return_as_token_ids=True)
    assert biased.tolist() == [65, 65, 65]


def test_streams_read_by_turns_and_threads_give_what_each_gives_alone(llm):
    options = {"max_new_tokens": 10, "seed": 5}
    alone = [llm.generate(prompt, **options) for prompt in PROMPTS]
    streams = [llm.generate(prompt, stream=True, **options) for prompt in PROMPTS]
    left = llm.generate("somebody who leaves", stream=True, **options)
    next(left)
    texts, going = ["", "", ""], {0, 1, 2}
    while going:
        for i in sorted(going):
            piece = next(streams[i], None)
            texts[i] += piece or ""
            going -= {i} if piece is None else set()
        left.close()
    assert texts == alone
    results: dict[int, str] = {}
    threads = [
        threading.Thread(target=lambda i=i: results.update({i: llm.generate(PROMPTS[i], **options)})) for i in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [results[i] for i in range(3)] == alone


def test_a_stream_that_is_let_go_frees_its_row(llm):
    for _ in range(5):
        next(llm.generate("The mill", max_new_tokens=20, stream=True, temperature=0))
        assert llm._decoding.current.busy
    assert len(greedy(llm)) == 8
    assert not llm._decoding.current.busy


@pytest.mark.parametrize("prompt", [None, 5, b"a", ["a", None], {"a": 1}])
def test_a_prompt_of_another_type_is_named(llm, prompt):
    with pytest.raises(InputTypeError, match=r"prompt(\[1\])? is of type .*, must be text"):
        llm.generate(prompt)


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ("a " * 200, {}, f"a prompt of 20. tokens .* context of {CONTEXT}"),
        (["a", "a " * 200], {}, r"prompt\[1\]: a prompt of 20. tokens"),
        ("a", {"max_new_tokens": -1}, "max_new_tokens is -1"),
        ("a", {"max_new_tokens": 10**9}, f"context of {CONTEXT}"),
        ("a", {"max_new_tokens": 2.5}, "max_new_tokens is of type float"),
        ("a", {"n": 0}, "n is 0"),
        ("a", {"n": True}, "n is of type bool, must be a whole number"),
        ("a", {"max_new_tokens": True}, "max_new_tokens is of type bool"),
        ("a", {"sys_prompt": 5}, "sys_prompt is of type int"),
        ("a", {"seed": "x"}, "seed is of type str"),
        ("a", {"stop": 5}, "stop is of type int"),
        ("a", {"stop": ["", None]}, r"stop\[1\] is of type NoneType"),
        ("a", {"logit_bias": [1]}, "logit_bias is of type list"),
        ("a", {"top_k": 0}, "top_k"),
        ("a", {"top_p": float("nan")}, "top_p"),
        ("a", {"temperature": -1}, "temperature"),
        (torch.zeros(2, 2), {}, r"prompt is a tensor \(2, 2\)"),
        (torch.tensor([True, False]), {}, r"prompt is a tensor \(2,\) of torch.bool, must be token ids"),
        (torch.tensor([1.0, 2.0]), {}, "prompt is .* torch.float32, must be token ids"),
        (["a", torch.tensor([1j])], {}, r"prompt\[1\] is .* torch.complex64, must be token ids"),
        (torch.tensor([], dtype=torch.int64), {}, "no tokens"),
        (torch.tensor([1, 5000]), {}, "the prompt holds the token 5000, but the model has 320 rows"),
        (["a", torch.tensor([1, -1])], {}, r"prompt\[1\]: the prompt holds the token -1"),
        (torch.tensor([1, 2]), {"sys_prompt": "Be kind."}, "sys_prompt is given, but prompt is token ids"),
    ],
)
def test_what_cannot_be_generated_is_refused_at_once_and_the_next_call_is_fine(llm, prompt, options, message):
    for stream in (False, True):
        with pytest.raises((ValueError, TypeError), match=message):
            llm.generate(prompt, stream=stream, **options)
    assert len(llm.generate("The mill", max_new_tokens=2, temperature=0, return_as_token_ids=True)) == 2


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32])
def test_ids_of_any_whole_number_are_a_prompt(llm, dtype):
    ids = torch.tensor([5, 6])
    assert torch.equal(greedy(llm, ids.to(dtype)), greedy(llm, ids))


def test_an_empty_prompt_and_an_empty_answer_are_defined(llm):
    assert len(greedy(llm, "")) == 8
    assert llm.generate("The mill", max_new_tokens=0) == ""


def test_a_conversation_is_written_as_its_template_says(tmp_path):
    tokenizer = train_tiny_tokenizer(tmp_path / "tokenizer", chat_template=TEMPLATE)
    llm = LLM.load(shrunk("pythia-14m", padded_vocab_size=320), init="random", tokenizer_dir=tokenizer)
    messages = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "The mill"}]
    ids = llm.preprocessor.encode("system:Be kind.\nuser:The mill\n")
    answer = greedy(llm, ids)
    assert torch.equal(llm.chat(messages, max_new_tokens=8, temperature=0, return_as_token_ids=True), answer)
    assert torch.equal(greedy(llm, "The mill", sys_prompt="Be kind."), answer)
    options = {"max_new_tokens": 8, "temperature": 0, "return_as_token_ids": True}
    assert torch.equal(llm.chat(messages[1:], sys_prompt="Be kind.", **options), answer)
    assert torch.equal(llm.chat(messages, sys_prompt="", **options), answer)
    with pytest.raises(InputError, match="messages has a system message"):
        llm.chat(messages, sys_prompt="Be rude.")
    with pytest.raises(InputTypeError, match="sys_prompt is of type int"):
        llm.chat(messages[1:], sys_prompt=5)
    for wrong in ("The mill", [{"role": "user", "content": "a"}, "b"]):
        with pytest.raises(InputTypeError, match="messages"):
            llm.chat(wrong)


def test_a_benchmark_gives_the_text_and_a_figure_for_each_time(llm):
    text, measures = llm.benchmark(num_iterations=2, prompt="The mill", max_new_tokens=6, top_k=1, stream=True)
    assert text == llm.generate("The mill", max_new_tokens=6, top_k=1)
    assert {len(figures) for figures in measures.values()} == {2}
    assert measures["Tokens generated"] == [6, 6]
    for first, total in zip(measures["Seconds to first token"], measures["Seconds total"], strict=True):
        assert 0 < first <= total
    with pytest.raises(InputError, match="num_iterations"):
        llm.benchmark(num_iterations=0)


def test_compiled_decoding_gives_the_same_text(llm, checkpoint, monkeypatch):
    monkeypatch.setattr("litgpt.generate.compiled.BACKEND", "eager")
    compiled = LLM.load(checkpoint, compile=True)
    for prompt in PROMPTS[:2]:
        assert torch.equal(greedy(compiled, prompt), greedy(llm, prompt))
    assert compiled._decoding.current.compiled.is_compiled


# What it makes of text ------------------------------------------------------------------------------------------------


def test_scores_are_those_of_transformers(llm, theirs):
    text = "The river ran past the mill"
    ids = torch.tensor([llm.tokenizer.bos_id, *llm.tokenizer.encode(text)])
    with torch.no_grad():
        logprobs = theirs(ids[None]).logits[0].log_softmax(-1)
    wanted = logprobs[:-1].gather(1, ids[1:, None])[:, 0]
    score = llm.score(text)
    assert score.ids == ids[1:].tolist()
    assert_close(torch.tensor(score.logprobs), wanted, atol=1e-4, rtol=1e-4)
    assert score.perplexity == pytest.approx(float(wanted.mean().neg().exp()), rel=1e-4)
    pair = llm.score([("The river ran", " past the mill"), text])[0]
    given = llm.tokenizer.encode("The river ran")
    with torch.no_grad():
        logprobs = theirs(ids[None, 1:]).logits[0].log_softmax(-1)
    rest = logprobs[len(given) - 1 : -1].gather(1, ids[1 + len(given) :, None])
    assert pair.total == pytest.approx(float(rest.sum()), rel=1e-4)
    continuation = llm.generate("The river", temperature=0, max_new_tokens=1)
    assert not pair.is_greedy
    assert llm.score(("The river", continuation)).is_greedy or "\ufffd" in continuation
    with pytest.raises(InputTypeError, match="text"):
        llm.score(None)


def test_a_text_too_long_to_score_is_named_and_the_longest_is_scored(llm):
    word = " ".join(["a"] * 200)
    with pytest.raises(InputError, match=rf"^text\[1\] has 20. tokens, more than the model's context of {CONTEXT}; "):
        llm.score(["a", word])
    with pytest.raises(InputError, match=r"^text has 20. tokens"):
        llm.score(("a", word[1:]))
    ids = llm.tokenizer.encode(word)[:CONTEXT]
    assert len(llm.score(llm.tokenizer.decode(torch.tensor(ids).tolist())).ids) == CONTEXT


def test_embeddings_are_the_hidden_states_of_transformers_alone_or_together(llm, theirs):
    states = []
    for prompt in PROMPTS:
        with torch.no_grad():
            states.append(theirs(llm.preprocessor.encode(prompt)[None], output_hidden_states=True).hidden_states[-1][0])
    assert_close(
        llm.embeddings(PROMPTS, normalize=False), torch.stack([s.mean(0) for s in states]), atol=1e-4, rtol=1e-4
    )
    last = llm.embeddings(PROMPTS, pooling="last", batch_size=2)
    assert_close(last.norm(dim=1), torch.ones(3))
    for prompt, vector, state in zip(PROMPTS, last, states, strict=True):
        assert_close(llm.embeddings(prompt, "last"), vector)
        assert torch.cosine_similarity(vector, state[-1], dim=0) > 0.9999
    assert not last.requires_grad
    with pytest.raises(InputError, match=r"texts\[1\] has .* tokens, more than the model's context"):
        llm.embeddings(["a", "a " * 200])


# As a module ----------------------------------------------------------------------------------------------------------


def test_the_loss_is_that_of_transformers_and_what_is_masked_does_not_count(llm, theirs):
    ids = torch.arange(24).view(2, 12)
    labels = ids.clone()
    labels[0, 3:7] = -100
    logits, loss = llm(ids, labels)
    with torch.no_grad():
        judge = theirs(ids, labels=labels)
    assert_close(logits, judge.logits, atol=1e-4, rtol=1e-4)
    assert_close(loss, judge.loss, atol=1e-5, rtol=1e-5)
    assert llm(ids, torch.full_like(ids, -100))[1].item() == 0
    assert_close(llm(ids, ids, lambda logits, labels: labels.float().mean())[1], ids[:, 1:].float().mean())
    assert torch.equal(llm(ids), logits)


IDS = torch.arange(6).view(2, 3)


@pytest.mark.parametrize(
    ("ids", "labels", "message"),
    [
        ([[1, 2]], None, "input_ids is of type list"),
        (IDS[0], None, r"input_ids is a tensor \(3,\) .* \(B, T\) in int64; give input_ids\[None\]"),
        (IDS.float(), None, "input_ids is .* torch.float32, must be token ids"),
        (IDS.bool(), None, "torch.bool"),
        (IDS + 317, None, "input_ids holds the token 320; this model has the tokens 0 to 319"),
        (IDS - 1, None, "input_ids holds the token -1"),
        (IDS, IDS[:, 1:], r"target_ids has the shape \(2, 2\), input_ids \(2, 3\)"),
        (IDS, IDS.int(), "target_ids is .* torch.int32"),
        (IDS, IDS + 317, "target_ids holds the token 320; this model has the tokens 0 to 319, and -100"),
        (IDS, torch.tensor([[0, -100, 1], [0, -5, 1]]), "target_ids holds the token -5"),
    ],
)
def test_what_is_no_batch_of_ids_is_named(llm, ids, labels, message):
    with pytest.raises((InputError, InputTypeError), match=message):
        llm(ids, labels)
    assert torch.equal(llm(IDS.int()), llm(IDS))


def test_after_training_the_text_is_that_of_the_new_weights(llm):
    before, messages = greedy(llm), [{"role": "user", "content": "The mill"}]
    llm.chat(messages, max_new_tokens=4)  # what it has read would be stale
    optimizer = torch.optim.SGD(llm.parameters(), lr=1.0)
    llm.train()
    ids = torch.arange(24).view(2, 12)
    for _ in range(2):
        llm(ids, ids)[1].backward()
        optimizer.step()
    after = greedy(llm)
    assert all(module.training for module in llm.modules())
    assert not torch.equal(after, before)
    fresh = copy.deepcopy(llm)
    assert torch.equal(greedy(fresh), after)
    with torch.no_grad():
        for parameter in llm.parameters():
            parameter.add_(torch.randn_like(parameter))  # in eval mode and without a forward
    assert not torch.equal(greedy(llm), after)
    assert torch.equal(greedy(llm), greedy(copy.deepcopy(llm)))


def test_a_module_around_it_saves_and_loads_by_the_same_names(llm, checkpoint):
    assert set(llm.state_dict()) == set(llm.model.state_dict())
    outer = torch.nn.ModuleDict({"llm": llm})
    state = {name: torch.zeros_like(tensor) for name, tensor in outer.state_dict().items()}
    assert "llm.lm_head.weight" in state
    outer.load_state_dict(state)
    assert not any(parameter.any() for parameter in llm.parameters())
    llm.load_state_dict(LLM.load(checkpoint).state_dict())
    assert torch.equal(greedy(llm), greedy(LLM.load(checkpoint)))


# Saving ---------------------------------------------------------------------------------------------------------------


def test_what_is_saved_opens_here_and_in_transformers(llm, tmp_path):
    from transformers import AutoModelForCausalLM

    out = llm.save(tmp_path / "out", prompt_style="alpaca")
    ids = torch.arange(12).view(1, 12)
    again = LLM.load(out)
    assert torch.equal(again(ids), llm(ids))
    assert again.prompt_style.name == "alpaca"
    assert_close(AutoModelForCausalLM.from_pretrained(out)(ids).logits, llm(ids), atol=1e-4, rtol=1e-4)
    assert LLM.load(again.save(tmp_path / "more")).prompt_style.name == "alpaca"


def test_a_model_is_saved_over_itself_but_not_over_other_things(tmp_path):
    home = make(tmp_path / "T")
    (home / "LICENSE").write_text("mine")
    llm = LLM.load(home)
    with torch.no_grad():
        llm.model.lm_head.weight.zero_()
    llm.save(home)
    llm.save(home)
    assert not LLM.load(home).model.lm_head.weight.any()
    assert (home / "LICENSE").read_text() == "mine"
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("all there is")
    for _ in range(2):
        with pytest.raises(InputError, match="not empty"):
            llm.save(tmp_path / "full")
    assert (tmp_path / "full" / "thesis.txt").exists()
    with pytest.raises(InputError, match="out_dir is missing"):
        llm.save()
    with pytest.raises(InputTypeError, match="out_dir is of type int"):
        llm.save(5)


def test_a_save_that_fails_half_way_leaves_the_old_model(tmp_path, monkeypatch):
    from litgpt import prompts

    home = make(tmp_path / "T")
    before, llm = tensor_bytes(home), LLM.load(home)
    with torch.no_grad():
        llm.model.lm_head.weight.zero_()

    def fails(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(prompts, "save", fails)  # after the weights are written
    with pytest.raises(KeyboardInterrupt):
        llm.save(home, prompt_style="alpaca")
    assert tensor_bytes(home) == before
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".T")] == []


# Finetuning -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def roomy(tmp_path) -> Path:
    """A model with room for a prompt of alpaca's."""
    return make(tmp_path / "T", block_size=256)


SHORT = {"train": {"max_steps": 2, "global_batch_size": 4, "lr_warmup_steps": 0}, "eval": {"max_new_tokens": 2}}


def test_finetuning_twice_in_one_process_leaves_the_finetuned_model_and_argv(roomy, tmp_path, monkeypatch, capsys):
    argv = ["notebook", "-f", "kernel.json"]
    monkeypatch.setattr("sys.argv", list(argv))
    llm = LLM.load(roomy)
    ids = torch.arange(12).view(1, 12)
    base = llm(ids)
    first = llm.finetune(ROWS, out_dir=tmp_path / "one", lora_r=2, merge=False, **SHORT)  # an adapter alone
    tuned = llm(ids)
    assert (first, llm.checkpoint_dir) == (tmp_path / "one/final", first)
    assert llm.prompt_style.name == "alpaca"
    assert all(parameter.requires_grad for parameter in llm.parameters())
    assert not torch.equal(tuned, base)
    assert torch.equal(LLM.load(first)(ids), tuned)
    assert llm.generate("Say 3", max_new_tokens=3) is not None
    (tmp_path / "rows.jsonl").write_text("\n".join(map(str, ROWS)).replace("'", '"'))
    second = llm.finetune(tmp_path / "rows.jsonl", "full", tmp_path / "two", **SHORT)
    assert not torch.equal(llm(ids), tuned)
    assert torch.equal(LLM.load(second)(ids), llm(ids))
    assert torch.equal(LLM.load(tmp_path / "two-base")(ids), tuned)
    assert sys.argv == argv


def test_an_adapter_inside_a_merged_model_goes_onto_the_base_that_it_was_trained_on(roomy, tmp_path):
    final = LLM.load(roomy).finetune(ROWS, out_dir=tmp_path / "run", quantize="bnb.nf4", **SHORT)
    llm = LLM.load(final / "adapter", quantize="bnb.nf4")  # not the merged weights, quantized once more
    ids = torch.arange(12).view(1, 12)
    assert llm.checkpoint_dir == final / "adapter"
    assert_close(llm(ids), LLM.load(final)(ids), rtol=0, atol=1e-4)


def test_weights_that_lie_nowhere_are_saved_before_they_are_finetuned(roomy, tmp_path):
    llm = LLM.load(roomy)
    with torch.no_grad():
        llm.model.lm_head.weight.mul_(2)
    changed = llm.model.lm_head.weight.clone()
    data = JSON(tmp_path / "rows.csv", val_split_fraction=0.2)
    (tmp_path / "rows.csv").write_text("instruction,output\n" + "\n".join(f"Say {n},{n} it is" for n in range(12)))
    final = llm.finetune(data, out_dir=tmp_path / "run", **SHORT)
    assert torch.equal(LLM.load(tmp_path / "run-base").model.lm_head.weight, changed)
    assert torch.equal(LLM.load(final).model.lm_head.weight, changed)
    with pytest.raises(InputError, match="holds the model that is finetuned"):
        llm.finetune(data, out_dir=tmp_path / "run", overwrite=True, **SHORT)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "lorra"}, "did you mean 'lora'"),
        ({"lora_q": 3}, "llm.finetune: lora_q: .* did you mean 'lora_query'"),
        ({"lora_r": "many"}, "lora_r: 'many' is not a whole number"),
        ({"train": {"max_step": 3}}, "did you mean 'train.max_steps'"),
        ({"data": 5}, "data is of type int"),
        ({"data": [{"instruction": "a"}]}, r"data\[0\]"),
        ({"data": "no/such.json"}, "no/such.json"),
    ],
)
def test_a_wrong_finetuning_is_refused_and_the_model_is_as_before(llm, tmp_path, options, message):
    before = greedy(llm)
    with pytest.raises((ValueError, TypeError, FileNotFoundError), match=message):
        llm.finetune(**{"data": ROWS, "out_dir": tmp_path / "run", **options})
    assert torch.equal(greedy(llm), before)
    assert not (tmp_path / "run").exists()


# The tutorial ---------------------------------------------------------------------------------------------------------


def blocks() -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / "tutorials/python_api.md").read_text(), re.DOTALL)


def test_the_tutorial_runs_as_it_stands(tmp_path, monkeypatch):
    make(tmp_path / "checkpoints/EleutherAI/pythia-14m", block_size=512)
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    for block in blocks():
        exec(compile(block, "tutorials/python_api.md", "exec"), names)
    ids = torch.arange(12).view(1, 12)
    first, trained, by_lightning = (
        LLM.load(where)(ids) for where in ("EleutherAI/pythia-14m", "out/trained", "out/by_lightning")
    )
    assert not torch.equal(first, trained)
    assert not torch.equal(trained, by_lightning)
    assert torch.equal(by_lightning, names["trained"].llm(ids))
    assert isinstance(names["fresh"].config, Config)
