"""Evaluation: lm-eval's own model class on the same weights is the judge, for perplexity `transformers` by hand."""

from __future__ import annotations

import inspect
import json
import math
import os
import re
import shlex
import shutil
from pathlib import Path

import pytest
import torch

from litgpt import LLM, cli
from litgpt.adapters import write
from litgpt.checkpoint import open_
from litgpt.errors import InputError, InputTypeError, MachineError, UserError
from litgpt.eval import evaluate, harness
from litgpt.eval.evaluate import How, find_source
from litgpt.eval.harness import Asked
from litgpt.eval.perplexity import foretell, windows
from litgpt.eval.records import Journal, fingerprint, results_file
from litgpt.methods.lora import LoRA
from tests.makers.checkpoints import edit_json, hf_model
from tests.makers.configs import shrunk
from tests.makers.methods import finetuned
from tests.makers.tokenizers import EOS, TEXT, train_tiny_llama, train_tiny_tokenizer

CHAT = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    "[{{ m.role }}] {{ m.content | trim }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
CONTEXTS = [
    "The river ran",
    "",
    "The mill was  ",
    "naïve façades and Größe 🦙 ",
    "x" * 200,  # longer than the context
    "the river ran past the mill " * 12,
    f"{EOS}The river",
]
CONTINUATIONS = [" past the mill", " the mill", " it", " 🦙", "a", EOS, "e", "\n\n  x"]
QUESTIONS = [
    {"question": f"Does the {a} run past it?", "choices": [" the river", " the mill", " a mill", " x"], "answer": i % 4}
    for i, a in enumerate(["river", "mill", "sky", "Größe", ""])
]
COMMON = {"dataset_path": "json", "test_split": "train", "fewshot_split": "train", "metadata": {"version": 2}}
TASKS = {
    "local_choice": {
        "output_type": "multiple_choice",
        "doc_to_text": "Question: {{question}}\nAnswer:",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "answer",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    },
    "local_likelihood": {
        "output_type": "loglikelihood",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{choices[1]}}",
        "metric_list": [{"metric": "acc"}],
    },
    "local_rolling": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{question * 3}}",
        "metric_list": [{"metric": name} for name in ("word_perplexity", "byte_perplexity", "bits_per_byte")],
    },
    "local_answers": {
        "output_type": "generate_until",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{choices[0]}}",
        "generation_kwargs": {"until": ["\n", "e"], "max_gen_toks": 9},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    },
}


def make_checkpoint(directory: Path, name: str = "Llama-3.2-1B", **settings) -> Path:
    """A model whose next token hangs on all that came before."""
    make = train_tiny_llama if name.startswith("Gemma") else train_tiny_tokenizer
    make(directory, 300, **settings)
    # the judge of adapters cuts the head where it has rows that no token has
    vocab_size = 600 if name.startswith("Gemma") else 300
    model = hf_model(shrunk(name, vocab_size=vocab_size, padded_vocab_size=vocab_size))
    torch.manual_seed(1)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """Two checkpoints, an adapter, and a directory of tasks."""
    home = tmp_path_factory.mktemp("evaluate")
    make_checkpoint(home / "llama", chat_template=CHAT)
    make_checkpoint(home / "gemma", "Gemma-2-2b")
    base = home / "llama"
    config = open_(base).config
    model = finetuned(config, LoRA())
    write(home / "lora", config, LoRA(), model, base=base, merged=False, tokenizer_dir=base,
          hyperparameters={}, prompt_style=None, extra=lambda _: None, overwrite=False)  # fmt: skip
    tasks = home / "tasks"
    tasks.mkdir()
    (home / "questions.jsonl").write_text("".join(json.dumps(question) + "\n" for question in QUESTIONS))
    for name, task in TASKS.items():
        source = {"dataset_kwargs": {"data_files": str(home / "questions.jsonl"), "cache_dir": str(home / "cache")}}
        (tasks / f"{name}.yaml").write_text(json.dumps({"task": name} | COMMON | source | task))  # JSON is YAML
    return home


def candidate(directory: Path, batch_size: int | str = 3, journal: Journal | None = None, quantize: str | None = None):
    how = How.of(batch_size, "cpu", "float32", quantize)
    return how.open(find_source(directory, None), journal or Journal())


def ours(directory: Path, batch_size: int | str = 3):
    from litgpt.eval.lm import EngineLM

    return EngineLM(candidate(directory, batch_size))


def theirs(directory: Path, **options):
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=str(directory), device="cpu", dtype="float32", batch_size=3, **options)


def requests(kind: str, *arguments: tuple) -> list:
    from lm_eval.api.instance import Instance

    return [Instance(request_type=kind, doc={}, arguments=each, idx=0) for each in arguments]


PAIRS = [(before, after) for before in CONTEXTS for after in CONTINUATIONS]
TEXTS = [("The river ran",), (TEXT,), ("x",), ("🦙 naïve " * 9,)]
ANSWERS = [
    (context, options)
    for context in (CONTEXTS[0], CONTEXTS[3], CONTEXTS[4])
    for options in (
        {"until": ["\n", "e"], "max_gen_toks": 9},
        {"until": [], "max_gen_toks": 14},
        {"until": "qq", "max_new_tokens": 12, "repetition_penalty": 1.3},
        {"until": [EOS, " the"], "max_gen_toks": 9, "do_sample": False, "temperature": 0.0},
    )
]


def assert_alike(found: list, expected: list) -> None:
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    assert [logprob for logprob, _ in found] == pytest.approx([logprob for logprob, _ in expected], abs=1e-4, rel=1e-6)


# -- the judge: lm-eval's model class for transformers


@pytest.mark.parametrize("name", ["llama", "gemma"])
def test_every_request_is_answered_as_by_transformers(home, name):
    directory = home / name
    judge, lm = theirs(directory), ours(directory)
    # the judge fails where a continuation melts into its context's last token
    whole = [pair for pair in PAIRS if lm.candidate.pairs([pair])[0][1]]
    assert len(whole) > 50
    likelihoods = requests("loglikelihood", *whole)
    expected = judge.loglikelihood(likelihoods, disable_tqdm=True)
    found = lm.loglikelihood(likelihoods)
    assert_alike(found, expected)
    if name == "llama":
        greedy = lm.generate_until(requests("generate_until", (CONTEXTS[0], {"max_gen_toks": 4})))
        likely = requests("loglikelihood", (CONTEXTS[0], greedy[0]))
        assert lm.loglikelihood(likely)[0][1]
        assert_alike(lm.loglikelihood(likely), judge.loglikelihood(likely, disable_tqdm=True))
    rolling = requests("loglikelihood_rolling", *TEXTS)
    expected = judge.loglikelihood_rolling(rolling, disable_tqdm=True)
    assert lm.loglikelihood_rolling(rolling) == pytest.approx(expected, rel=1e-6, abs=1e-4)
    answers = requests("generate_until", *(ANSWERS if name == "llama" else ANSWERS[::3]))
    # one by one: in a batch the judge's rows go on behind their stops
    expected = [judge.generate_until([answer], disable_tqdm=True)[0] for answer in answers]
    assert lm.generate_until(answers) == expected
    assert (lm.eot_token_id, lm.prefix_token_id, lm.max_length) == (
        judge.eot_token_id,
        judge.prefix_token_id,
        judge.max_length,
    )


def test_batch_size_changes_nothing(home):
    kinds = [requests("loglikelihood", *PAIRS[::2]), requests("generate_until", *ANSWERS[::3])]
    expected = None
    for batch_size in (1, 3, 8, "auto"):
        lm = ours(home / "llama", batch_size)
        if batch_size == 3:
            lm.candidate.at_once = 40  # little of it together
        likelihoods, answers = lm.loglikelihood(kinds[0]), lm.generate_until(kinds[1])
        expected = expected or (likelihoods, answers)
        assert_alike(likelihoods, expected[0])
        assert answers == expected[1]


def test_what_options_have_in_common_is_read_once(home, monkeypatch):
    lm, read = ours(home / "llama"), []
    forward = lm.candidate.model.hidden
    monkeypatch.setattr(
        lm.candidate.model, "hidden", lambda idx, *a, **k: read.append(idx.numel()) or forward(idx, *a, **k)
    )
    lm.loglikelihood(requests("loglikelihood", *((CONTEXTS[0], after) for after in (" a", " e", " x", " q"))))
    context, space = (len(lm.tok_encode(text)) for text in (CONTEXTS[0], f"{CONTEXTS[0]} a"))
    assert len(read) == 1
    assert read[0] <= context + 4 * (space - context)


def test_all_kinds_of_tasks_get_the_scores_of_lm_eval(home, tmp_path, capsys, monkeypatch):
    from lm_eval.evaluator import evaluate as their_evaluate

    monkeypatch.chdir(tmp_path)
    asked = Asked(tuple(TASKS), num_fewshot=2, include_path=home / "tasks", log_samples=True)
    loaded = harness.load(asked)
    harness.prepare(loaded, asked)
    expected = their_evaluate(theirs(home / "llama"), loaded)
    capsys.readouterr()
    files = {path: path.stat().st_mtime_ns for path in (home / "llama").iterdir()}
    for path in (home / "llama").iterdir():
        path.chmod(0o444)
    (home / "llama").chmod(0o555)
    command = ["evaluate", str(home / "llama"), "--tasks", ",".join(TASKS), "--include_path", str(home / "tasks")]
    command += ["--num_fewshot", "2", "--log_samples", "true", "--batch_size", "3", "--access_token", "hf_secret"]
    assert cli.main([*command, "--device", "cpu", "--dtype", "32-true"]) == 0
    (home / "llama").chmod(0o755)
    said = capsys.readouterr()
    assert {path: path.stat().st_mtime_ns for path in (home / "llama").iterdir()} == files
    target = Path("out/evaluate/llama/results.json")
    found = json.loads(target.read_text())
    for task, scores in expected["results"].items():
        for metric, value in scores.items():
            assert found["results"][task][metric] == (
                pytest.approx(value, rel=1e-5) if isinstance(value, float) else value
            )
        assert task in said.out
    for part in ("versions", "n-shot", "n-samples", "higher_is_better"):
        assert found[part] == expected[part]
    assert found["litgpt"]["versions"].keys() == {"litgpt", "torch", "lm_eval"}
    assert found["litgpt"] | {"dtype": "float32", "device": "cpu", "num_fewshot": 2, "batch_size": 3} == found["litgpt"]
    samples = [json.loads(line) for line in (target.parent / "results-samples-local_choice.jsonl").open()]
    assert [sample["doc_id"] for sample in samples] == [0, 1, 2, 3, 4]
    assert "hf_secret" not in said.out + said.err + target.read_text()
    assert str(target) in said.err
    assert "Running" not in said.err
    assert [path.name for path in target.parent.iterdir() if path.name.startswith("unfinished")] == []
    os.environ.pop("HF_TOKEN")


def test_conversations_are_written_by_the_chat_template(home):
    judge, lm = theirs(home / "llama"), ours(home / "llama")
    turns = [{"role": "user", "content": " Does it run? "}, {"role": "assistant", "content": "The river "}]
    for messages, opens in (
        (turns[:1], True),
        (turns, False),
        ([{"role": "system", "content": "s"}, *turns[:1]], True),
    ):
        expected = judge.apply_chat_template(messages, add_generation_prompt=opens)
        assert lm.apply_chat_template(messages, add_generation_prompt=opens) == expected
    assert lm.chat_template(True) == judge.chat_template(True) == CHAT
    asked = Asked(("local_choice", "local_answers"), 1, include_path=home / "tasks", apply_chat_template=True)
    results = []
    for one in (judge, lm):
        loaded = harness.load(asked)
        if one is lm:
            results.append(harness.run(lm.candidate, loaded, asked))
        else:
            from lm_eval.evaluator import evaluate as their_evaluate

            harness.prepare(loaded, asked)
            results.append(their_evaluate(judge, loaded, apply_chat_template=True, fewshot_as_multiturn=True))
    assert results[0]["results"] == results[1]["results"]
    with pytest.raises(InputError, match="apply_chat_template"):
        harness.run(candidate(home / "gemma"), {"tasks": {}}, asked)


def test_an_adapter_is_scored_on_its_base(home):
    judge, lm = theirs(home / "llama", peft=str(home / "lora" / "adapter")), ours(home / "lora")
    likelihoods = requests("loglikelihood", *PAIRS)
    found = lm.loglikelihood(likelihoods)
    assert_alike(found, judge.loglikelihood(likelihoods, disable_tqdm=True))
    plain = ours(home / "llama").loglikelihood(likelihoods)
    assert max(abs(a[0] - b[0]) for a, b in zip(found, plain, strict=True)) > 0.01


def test_quantized_weights_are_scored_near_to_whole_ones(home):
    pairs = [((1, 2, 3), (4, 5)), ((7, 8), (9,))]
    whole, small = (candidate(home / "llama", quantize=mode).likelihoods(pairs) for mode in (None, "torchao.int8"))
    assert [a.logprob for a in small] == pytest.approx([a.logprob for a in whole], rel=0.3)
    assert small != whole


# -- a text


@pytest.mark.parametrize(
    ("count", "length", "stride"), [(1, 4, 4), (4, 4, 4), (7, 4, 2), (23, 5, 5), (23, 5, 1), (3, 9, 4)]
)
def test_windows_tell_each_token_once_with_as_much_before_it_as_fits(count, length, stride):
    tokens = list(range(100, 100 + count))
    told = []
    for number, (before, after) in enumerate(windows(tokens, 0, length, stride)):
        read = [*before, *after[:-1]]
        assert len(read) == min(length, count if number == 0 else length)
        assert [0, *tokens][len(told) - len(before) + 1 : len(told) + 1] == list(before)
        told += after
    assert told == tokens


@pytest.mark.parametrize("stride", [None, 10])
def test_perplexity_of_a_text_is_that_of_transformers_by_hand(home, tmp_path, monkeypatch, capsys, stride):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    monkeypatch.chdir(tmp_path)
    text = tmp_path / "text.txt"
    text.write_text(TEXT + EOS, encoding="utf-8")
    options = [] if stride is None else ["--stride", str(stride)]
    assert cli.main(["evaluate", str(home / "llama"), "--text", str(text), "--dtype", "float32", *options]) == 0
    assert "bits_per_byte" in capsys.readouterr().out
    found = json.loads(Path("out/evaluate/llama/results.json").read_text())["text"][str(text)]
    model = AutoModelForCausalLM.from_pretrained(home / "llama", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(home / "llama")
    tokens = [0, *tokenizer.encode(TEXT + EOS, split_special_tokens=True)]
    total, done, step = 0.0, 1, stride or 64
    while done < len(tokens):
        end = min(65 if done == 1 else done + step, len(tokens))
        window = tokens[max(end - 65, 0) : end]
        with torch.no_grad():
            logprobs = model(torch.tensor([window[:-1]])).logits[0].log_softmax(-1)
        new = end - done
        total += logprobs.gather(1, torch.tensor(window[1:])[:, None])[-new:].sum().item()
        done = end
    assert found["tokens"] == len(tokens) - 1
    assert found["logprob"] == pytest.approx(total, rel=1e-6)
    assert found["perplexity"] == pytest.approx(math.exp(-total / (len(tokens) - 1)), rel=1e-5)
    assert found["bits_per_byte"] == pytest.approx(-total / math.log(2) / len((TEXT + EOS).encode()), rel=1e-6)


def test_an_llm_evaluates_what_it_holds(home):
    llm = LLM.load(str(home / "llama"), precision="32-true")
    score = llm.evaluate(text=TEXT)
    assert score["perplexity"] == pytest.approx(foretell(candidate(home / "llama"), TEXT).perplexity, rel=1e-5)
    results = llm.evaluate("local_choice,local_rolling", include_path=home / "tasks", limit=2)
    assert results["n-samples"]["local_choice"]["effective"] == 2
    with torch.no_grad():
        llm.model.lm_head.weight.mul_(0.5)
    assert llm.evaluate(text=TEXT) != score
    with pytest.raises(InputError, match="tasks"):
        llm.evaluate()
    for tasks in (5, ["local_choice", 5]):
        with pytest.raises(InputTypeError, match=r"tasks is .*5.*must be names"):
            llm.evaluate(tasks)


# -- what goes wrong, and what is kept


@pytest.fixture
def own_tasks_only(monkeypatch):
    """lm-eval's own list takes ten seconds."""
    partly = harness.manager
    monkeypatch.setattr(harness, "manager", lambda path, **_: partly(path, defaults=False))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"batch_size": 0}, "batch_size is 0"),
        ({"batch_size": "auto:x"}, "auto:x"),
        ({"batch_size": "fast"}, "fast"),
        ({"limit": -1}, "limit is -1"),
        ({"limit": 2.5}, "limit is 2.5"),
        ({"num_fewshot": -1}, "num_fewshot"),
        ({"device": "cudda"}, "cudda"),
        ({"dtype": "float31"}, "did you mean 'float32'"),
        ({"tasks": None}, "litgpt evaluate list"),
        ({"tasks": "local_choise"}, "did you mean 'local_choice'"),
        ({"include_path": Path("nowhere")}, "nowhere"),
        ({"text": Path("nowhere")}, "nowhere"),
        ({"text": Path(__file__)}, "one after the other"),
        ({"stride": 4}, "stride is for a text"),
        ({"text": Path(__file__), "tasks": None, "stride": 65}, "stride is 65"),
        ({"checkpoint": "gemma", "apply_chat_template": True}, "neither a chat template nor a prompt style"),
        ({"save_filepath": Path(__file__)}, "exists already"),
    ],
)
def test_wrong_options_are_refused_before_any_weight_is_read(
    home, tmp_path, own_tasks_only, monkeypatch, options, words
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("litgpt.generate.session.Source.model", lambda *_: pytest.fail("weights were read"))
    given = {"tasks": "local_choice", "include_path": home / "tasks", **options}
    with pytest.raises(UserError, match=words):
        evaluate.main(home / given.pop("checkpoint", "llama"), **given)
    assert list(tmp_path.iterdir()) == []


def test_a_task_of_the_hub_without_a_network_is_refused_at_once(tmp_path, monkeypatch, own_tasks_only):
    import datasets
    import huggingface_hub

    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    for settings, name in ((datasets.config, "HF_ENDPOINT"), (huggingface_hub.constants, "ENDPOINT")):
        monkeypatch.setattr(settings, name, "http://127.0.0.1:9")
    monkeypatch.setattr("time.sleep", lambda _: pytest.fail("it was tried again and again"))
    task = {"task": "far", "dataset_path": f"nobody/{tmp_path.name}", "output_type": "loglikelihood"}
    (tmp_path / "far.yaml").write_text(json.dumps(COMMON | task))
    with pytest.raises(MachineError, match=f"far: cannot be loaded: .*{tmp_path.name}.*check the network"):
        harness.load(Asked(("far",), include_path=tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(InputError, match="forbids the network"):
        harness.load(Asked(("far",), include_path=tmp_path))


def test_a_task_that_cannot_be_read_is_told_with_its_file(home, tmp_path, own_tasks_only):
    (tmp_path / "torn.yaml").write_text("task: [torn")
    with pytest.raises(InputError, match=r"'torn' is not known; .*torn.yaml cannot be read: .*line 1"):
        harness.load(Asked(("torn",), include_path=tmp_path))
    task = json.loads((home / "tasks" / "local_choice.yaml").read_text())
    (tmp_path / "odd.yaml").write_text(json.dumps(task | {"task": "odd", "test_split": "tests"}))
    with pytest.raises(InputError, match="odd: cannot be loaded: there is no 'tests'"):
        harness.load(Asked(("odd",), include_path=tmp_path))


def test_what_fails_in_a_task_is_told_from_what_fails_in_the_model(home, tmp_path, own_tasks_only, monkeypatch):
    (tmp_path / "own.py").write_text("def judge(doc, results):\n    return 1 / 0\n")
    task = json.loads((home / "tasks" / "local_likelihood.yaml").read_text())
    text = json.dumps(task | {"task": "own", "process_results": "own.judge"}, indent=1)
    (tmp_path / "own.yaml").write_text(text.replace('"own.judge"', "!function own.judge"))
    model, asked = candidate(home / "llama"), Asked(("own",), limit=1, include_path=tmp_path)
    with pytest.raises(InputError, match=r"code of a task fails: ZeroDivisionError: .*own.py:2\)"):
        harness.run(model, harness.load(asked), asked)
    monkeypatch.setattr(model, "likelihoods", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        harness.run(model, harness.load(asked), asked)


def test_results_are_never_overwritten_unasked(tmp_path):
    first = results_file(tmp_path, None, False)
    first.write_text("1")
    assert results_file(tmp_path, None, False).name == "results-2.json"
    assert results_file(tmp_path, None, True) == results_file(tmp_path, first, True) == first
    with pytest.raises(InputError, match="overwrite"):
        results_file(tmp_path, first, False)
    with pytest.raises(InputError, match="is a file"):
        results_file(first / "below", None, False)


def test_an_interrupted_run_goes_on_and_a_changed_model_starts_anew(home, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    copy = tmp_path / "model"
    shutil.copytree(home / "llama", copy)
    run = ["evaluate", "model", "--tasks", "local_choice", "--include_path", str(home / "tasks"), "--dtype", "float32"]

    def counted(stop_after: int) -> int:
        """Forwards that one run takes; it is interrupted after so many."""
        from litgpt.model import GPT

        forwards, forward = [], GPT.hidden

        def hidden(self, *arguments, **options):
            if len(forwards) == stop_after:
                raise KeyboardInterrupt
            forwards.append(1)
            return forward(self, *arguments, **options)

        with monkeypatch.context() as patch:
            patch.setattr(GPT, "hidden", hidden)
            patch.setattr("litgpt.eval.candidate.AT_ONCE", 16)
            status = cli.main(run)
        assert status == (130 if len(forwards) == stop_after else 0)
        return len(forwards)

    whole = counted(-1)
    score = json.loads(Path("out/evaluate/model/results.json").read_text())["results"]
    counted(3)
    assert "kept" in capsys.readouterr().err
    (journal,) = Path("out/evaluate/model").glob("unfinished-*")
    with journal.open("ab") as file:
        file.write(b'["torn')
    counted(2)
    assert counted(-1) < whole - 3
    assert json.loads(Path("out/evaluate/model/results-2.json").read_text())["results"] == score
    assert not journal.exists()
    counted(3)
    state = (copy / "config.json").stat()
    edit_json(copy / "config.json", rope_theta=50.0)  # another model, and the clock set back
    os.utime(copy / "config.json", ns=(state.st_atime_ns, state.st_mtime_ns))
    assert counted(-1) == whole


def test_a_fingerprint_tells_every_change_of_the_files(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"abc")
    (tmp_path / "below").mkdir()
    seen = [fingerprint([tmp_path], {"dtype": "float32"}), fingerprint([tmp_path], {"dtype": "bfloat16"})]
    assert fingerprint([tmp_path], {"dtype": "float32"}) == seen[0]
    state = (tmp_path / "model.safetensors").stat()
    (tmp_path / "model.safetensors").write_bytes(b"abd")
    os.utime(tmp_path / "model.safetensors", ns=(state.st_atime_ns, state.st_mtime_ns))
    assert len({*seen, fingerprint([tmp_path], {"dtype": "float32"})}) == 3


def test_tasks_are_listed(home, monkeypatch, capsys):
    partly = harness.manager
    monkeypatch.setattr(evaluate, "manager", lambda path: partly(path, defaults=False))
    assert cli.main(["evaluate", "list", "--include_path", str(home / "tasks")]) == 0
    assert capsys.readouterr().out.split() == sorted(TASKS)


def test_the_tutorial_says_what_can_be_typed(monkeypatch, capsys):
    page = (Path(__file__).parents[1] / "tutorials" / "evaluate.md").read_text()
    typed = [line for line in page.splitlines() if line.startswith("litgpt evaluate ")]
    assert len(typed) == 7
    for line in typed:
        assert cli.main([*shlex.split(line)[1:], "--print_config"]) == 0, line
    options = inspect.signature(evaluate.main).parameters
    assert {name for name in re.findall(r"`--(\w+)", page) if name not in options} == set()


def test_what_does_not_fit_is_named(home):
    model = candidate(home / "llama")
    with pytest.raises(InputError, match="context of the model 64"):
        model.likelihoods([((1,), tuple(range(1, 66)))])
    with pytest.raises(InputError, match="max_gen_toks"):
        model.answers([("x", {"until": []})])
    with pytest.raises(InputError, match="num_beams"):
        model.answers([("x", {"num_beams": 4, "max_gen_toks": 4})])
    with pytest.raises(InputError, match="stride is 65"):
        foretell(model, "x", 65)
    assert model.likelihoods([((1,), ())]) == [(0.0, True)]


def test_sampled_answers_differ_and_are_drawn_again(home, tmp_path):
    model = candidate(home / "llama", journal=Journal(tmp_path / "journal"))
    ask = [("The river", {"do_sample": True, "temperature": 0.9, "max_gen_toks": 12})] * 6
    torch.manual_seed(3)
    found = model.answers(ask)
    assert len(set(found)) > 1
    assert model.journal.found == {}
    torch.manual_seed(3)
    assert model.answers(ask) == found
