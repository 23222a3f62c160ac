"""`litgpt generate` and `litgpt chat`, called as the command line calls them."""

import inspect
import io
import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from litgpt import cli
from litgpt.chat import base as chat
from litgpt.errors import InputError, MissingError
from litgpt.generate import adapter as generate_adapter
from litgpt.generate import adapter_v2 as generate_adapter_v2
from litgpt.generate import base as generate
from litgpt.generate import full as generate_full
from litgpt.generate.sampling import Sampling
from litgpt.generate.session import conversation, load_session
from litgpt.prompts import from_name
from tests.makers.checkpoints import make_hf_checkpoint
from tests.makers.configs import shrunk
from tests.makers.hub import stand_in
from tests.makers.tokenizers import train_tiny_tokenizer

CONTEXT = 64


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """A random model whose text is nonsense, with a real tokenizer."""
    home = tmp_path_factory.mktemp("generate")
    config = shrunk("pythia-14m", vocab_size=300, padded_vocab_size=320)
    return make_hf_checkpoint(home / "T", config, tokenizer_dir=train_tiny_tokenizer(home / "tokenizer"))


def test_the_text_of_a_prompt_goes_on_and_a_seed_repeats_it(checkpoint, capsys):
    outputs = []
    for seed in (1, 1, 2):
        generate.main(checkpoint, "The mill", max_new_tokens=12, seed=seed)
        outputs.append(capsys.readouterr())
    assert outputs[0].out.startswith("The mill")
    assert outputs[0].out == outputs[1].out != outputs[2].out
    assert "12 tokens in" in outputs[0].err


def test_samples_differ_and_greedy_ones_do_not(checkpoint, capsys):
    generate.main(checkpoint, "a", num_samples=2, max_new_tokens=8)
    sampled = capsys.readouterr().out.rstrip("\n").split("\na")
    generate.main(checkpoint, "a", num_samples=2, max_new_tokens=8, temperature=0)
    greedy = capsys.readouterr().out
    assert sampled[0] != "a" + sampled[1]
    assert greedy[: len(greedy) // 2] == greedy[len(greedy) // 2 :]


def test_what_is_streamed_is_the_decoded_answer(checkpoint):
    session = load_session(checkpoint)
    messages = [{"role": "user", "content": "é😀漢字"}]
    for seed in range(8):
        pieces = list(session.answer(messages, Sampling(1.5, seed=seed), max_new_tokens=25))
        ids = list(session.engine.generate(session.encode(messages), Sampling(1.5, seed=seed), max_new_tokens=25))
        stop = next((i for i, token in enumerate(ids) if token in session.tokenizer.eos_ids), len(ids))
        assert "".join(pieces) == session.tokenizer.decode(ids[:stop])


def test_a_stop_text_split_over_tokens_is_never_shown(checkpoint):
    session = load_session(checkpoint)
    messages = [{"role": "user", "content": "The river"}]
    free = "".join(session.answer(messages, Sampling(0.9, seed=5), max_new_tokens=30))
    for start in range(3, 12, 2):
        stop = free[start : start + 3]
        cut = "".join(session.answer(messages, Sampling(0.9, seed=5), max_new_tokens=30, stop=[stop]))
        assert cut == free[: free.index(stop)]


def test_the_newest_of_several_end_tokens_stops_too(checkpoint, tmp_path):
    """generation_config.json may list several."""
    import shutil

    session = load_session(checkpoint)
    ids = list(session.engine.generate([5, 6], Sampling(0), max_new_tokens=6))
    copied = Path(shutil.copytree(checkpoint, tmp_path / "T"))
    (copied / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, ids[2]]}))
    stopping = load_session(copied)
    text = "".join(
        stopping.answer([{"role": "user", "content": session.tokenizer.decode([5, 6])}], Sampling(0), max_new_tokens=6)
    )
    assert stopping.tokenizer.encode(session.tokenizer.decode([5, 6])) == [5, 6]
    assert text == session.tokenizer.decode(ids[: ids.index(ids[2])])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"max_new_tokens": -1}, ["max_new_tokens", "-1"]),
        ({"max_new_tokens": 10**9}, ["max_new_tokens", str(CONTEXT)]),
        ({"prompt": "mill " * 200}, ["tokens", str(CONTEXT), "max_new_tokens"]),
        ({"top_k": 0}, ["top_k"]),
        ({"temperature": -1.0}, ["temperature"]),
        ({"num_samples": 0}, ["num_samples"]),
        ({"precision": "bf16-treu"}, ["precision", "did you mean 'bf16-true'"]),
        ({"precision": "bf15"}, ["precision", "did you mean 'bf16-true'"]),
        ({"prompts_file": Path("p.txt")}, ["prompts_file", "prompt "]),
        ({"quantize": "bnb.nf5"}, ["bnb.nf5", "bnb.nf4"]),
        ({"min_p": 1.5}, ["min_p"]),
        ({"repetition_penalty": 0}, ["repetition_penalty"]),
        ({"logit_bias": {"a": 1}}, ["logit_bias", "'a'"]),
        ({"logit_bias": {"5000": 1}}, ["logit_bias", "5000"]),
        ({"batch_size": 0}, ["batch_size"]),
        ({"prompt_style": "alpaka"}, ["alpaca"]),
    ],
)
def test_a_wrong_option_is_one_line_that_names_it(checkpoint, options, words):
    with pytest.raises(InputError) as caught:
        generate.main(checkpoint, **({"prompt": "a", "max_new_tokens": 5} | options))
    assert "\n" not in str(caught.value)
    assert all(word in str(caught.value) for word in words)


def test_stops_are_texts(checkpoint, capsys):
    told = ["generate", str(checkpoint), "--prompt", "a", "--max_new_tokens", "3", "--temperature", "0"]
    for stop in ('["a", "5"]', "5", "["):
        assert cli.main([*told, "--stop", stop]) == 0
    capsys.readouterr()
    assert cli.main([*told, "--stop", "[1]"]) == 2
    assert "--stop: [1] is not a list of texts or null" in capsys.readouterr().err


def test_nothing_is_a_prompt_too(checkpoint, capsys):
    generate.main(checkpoint, "", max_new_tokens=3)
    assert capsys.readouterr().out
    generate.main(checkpoint, "a", max_new_tokens=0)
    assert capsys.readouterr().out == "a\n"


def test_weights_that_are_not_numbers_are_refused(checkpoint, tmp_path):
    import shutil

    copied = Path(shutil.copytree(checkpoint, tmp_path / "T"))
    tensors = load_file(copied / "model.safetensors")
    tensors["gpt_neox.final_layer_norm.weight"][0] = torch.nan
    save_file(tensors, copied / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match="not finite"):
        generate.main(copied, "a", max_new_tokens=3)


def test_a_missing_checkpoint_names_the_command_that_makes_one(tmp_path):
    with pytest.raises(MissingError, match="litgpt"):
        generate.main(tmp_path / "nowhere")


def test_a_repository_of_the_hub_is_fetched_once_and_then_used_as_it_lies(checkpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    with stand_in() as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        server.push("tiny/model", {file.name: file.read_bytes() for file in checkpoint.iterdir()})
        generate.main(Path("tiny/model"), "The mill", max_new_tokens=5, seed=1)
    fetched = capsys.readouterr()
    generate.main(Path("tiny/model"), "The mill", max_new_tokens=5, seed=1)  # the Hub is gone
    assert fetched.out == capsys.readouterr().out
    assert fetched.out.startswith("The mill")
    (tmp_path / "tiny").mkdir()
    with pytest.raises(MissingError, match="checkpoints/tiny/modle"):  # a folder of that name: no repository
        generate.main(Path("tiny/modle"))


def test_a_model_that_does_not_fit_is_refused_before_it_is_read(checkpoint, monkeypatch):
    monkeypatch.setattr("litgpt.launch.Machine.free_memory", lambda self: 10_000)
    monkeypatch.setattr("litgpt.generate.session.load_model", lambda *a, **k: pytest.fail("weights were read"))
    with pytest.raises(InputError, match=r"memory|kB|fit"):
        generate.main(checkpoint, "a")


def say(monkeypatch, text: str) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(text))


def test_a_piped_chat_answers_each_line_and_remembers(checkpoint, monkeypatch, capsys):
    seen: list[list[str]] = []
    original = chat.Chat.messages
    monkeypatch.setattr(
        chat.Chat, "messages", lambda self: seen.append([m["content"] for m in self.history]) or original(self)
    )
    say(monkeypatch, "one\n\ntwo\n/reset\nthree\n")
    chat.main(checkpoint, max_new_tokens=4, seed=1, prompt_style="phi-2")
    out, err = capsys.readouterr()
    assert len(out.splitlines()) >= 3
    assert err.strip() == "The conversation starts anew."
    assert [s[0] for s in seen] == ["one"] * (len(seen) - 1) + ["three"]
    assert any(len(s) == 3 and s[2] == "two" for s in seen)
    assert seen[-1] == ["three"]


def test_without_turns_every_message_stands_alone(checkpoint, monkeypatch, capsys):
    """With nothing but ends of text between them a second prompt would read as more of the first answer."""
    told = {"max_new_tokens": 6, "temperature": 0}
    say(monkeypatch, "The mill\nA small\nThe mill\n")
    chat.main(checkpoint, **told)
    together = capsys.readouterr().out
    for message in ("The mill", "A small", "The mill"):
        say(monkeypatch, message)
        chat.main(checkpoint, **told)
    assert together == capsys.readouterr().out


def test_a_model_that_can_say_nothing_ends_the_chat(checkpoint, tmp_path, monkeypatch, capsys):
    import shutil

    copied = Path(shutil.copytree(checkpoint, tmp_path / "T"))
    tensors = load_file(copied / "model.safetensors")
    tensors["gpt_neox.final_layer_norm.weight"][0] = torch.nan
    save_file(tensors, copied / "model.safetensors", metadata={"format": "pt"})
    say(monkeypatch, "one\ntwo\n")
    with pytest.raises(InputError, match="not finite"):
        chat.main(copied, max_new_tokens=3)
    with pytest.raises(InputError, match="max_new_tokens is -1"):
        chat.main(checkpoint, max_new_tokens=-1)


def test_a_terminal_is_not_given_what_it_would_obey(checkpoint, tmp_path, monkeypatch, capsys):
    session = load_session(checkpoint)
    escape = {str(session.tokenizer.encode("\x1b")[0]): 1000}
    told = {"max_new_tokens": 2, "logit_bias": escape}
    generate.main(checkpoint, "\x1b[2Ja\tb\nc", **told)
    assert capsys.readouterr().out == "\x1b[2Ja\tb\nc\x1b\x1b\n"  # what reads a pipe gets what was said
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    generate.main(checkpoint, "\x1b[2Ja\tb\nc", **told)
    assert capsys.readouterr().out == r"\x1b[2Ja" + "\tb\nc" + r"\x1b\x1b" + "\n"
    talk = chat.Chat(session, Sampling(logit_bias={int(token): bias for token, bias in escape.items()}), 2)
    talk.say("a")
    assert capsys.readouterr().out == r"\x1b\x1b" + "\n"
    assert talk.history[-1]["content"] == "\x1b\x1b"
    (tmp_path / "p.txt").write_text("\x9b2J\x7fé", encoding="utf-8")
    generate.main(checkpoint, prompts_file=tmp_path / "p.txt", **told)
    line = capsys.readouterr().out
    assert r"\u009b2J\u007fé" in line
    assert json.loads(line)["prompt"] == "\x9b2J\x7fé"


def test_a_stray_byte_in_a_pipe_is_no_reason_to_end(checkpoint, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9\nhello\n"), encoding="utf-8"))
    chat.main(checkpoint, max_new_tokens=3)
    assert capsys.readouterr().err == ""


def test_a_message_too_long_keeps_the_conversation(checkpoint, monkeypatch, capsys):
    say(monkeypatch, "mill " * 100 + "\nhello\n")
    with pytest.raises(InputError, match="could not be answered: 1;"):
        chat.main(checkpoint, max_new_tokens=4)
    out, err = capsys.readouterr()
    assert err.startswith("error: ")
    assert str(CONTEXT) in err
    assert out.strip("\n")


def test_a_message_too_long_makes_nothing_be_forgotten(checkpoint, monkeypatch, capsys):
    last = []
    for between in ("", "mill " * 100 + "\n"):
        say(monkeypatch, f"the river\n{between}and the mill\n")
        with pytest.raises(InputError) if between else nullcontext():
            chat.main(checkpoint, max_new_tokens=4, temperature=0, prompt_style="phi-2")
        out, err = capsys.readouterr()
        assert "forgotten" not in err
        last.append(out)
    assert last[0] == last[1]


def test_an_interrupt_ends_a_piped_chat(checkpoint, monkeypatch, capsys):
    original, pieces = print, []

    def interrupted_by(*values, **options):
        original(*values, **options)
        if options.get("end") == "" and not pieces:
            pieces.append(values)
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(chat, "print", interrupted_by, raising=False)
    say(monkeypatch, "one\ntwo\nthree\n")
    with pytest.raises(KeyboardInterrupt):
        chat.main(checkpoint, max_new_tokens=8)
    assert len(pieces) == 1


def test_a_full_context_forgets_the_oldest_exchange_and_says_so(checkpoint, monkeypatch, capsys):
    say(monkeypatch, "the river ran past the mill\n" * 6)
    chat.main(checkpoint, max_new_tokens=8, prompt_style="phi-2")
    err = capsys.readouterr().err
    assert "forgotten" in err
    assert "error" not in err


def test_a_compiled_chat_says_what_one_that_is_not_compiled_says(checkpoint, monkeypatch, capsys):
    monkeypatch.setattr("litgpt.generate.compiled.BACKEND", "eager")
    said = []
    for compile in (False, True):
        say(monkeypatch, "one\ntwo\n")
        chat.main(checkpoint, max_new_tokens=5, temperature=0, compile=compile)
        said.append(capsys.readouterr().out)
    assert said[0] == said[1]


@pytest.mark.parametrize("mode", ["bnb.nf4", "torchao.int8"])
def test_quantized_weights_answer_too(checkpoint, capsys, mode):
    generate.main(checkpoint, "The mill", max_new_tokens=6, temperature=0, quantize=mode)
    assert capsys.readouterr().out.startswith("The mill")


def test_an_answer_ends_where_the_context_does(checkpoint, monkeypatch, capsys):
    say(monkeypatch, "the river ran past the mill and the mill\n")
    chat.main(checkpoint, max_new_tokens=60)
    out, err = capsys.readouterr()
    assert err == ""
    assert out.strip()


def test_a_message_of_many_lines(checkpoint, monkeypatch, capsys):
    heard: list[str] = []
    monkeypatch.setattr(chat.Chat, "say", lambda self, message: not heard.append(message))
    say(monkeypatch, "one\ntwo\n!submit\nthree\n!submit\nfour\n")
    chat.main(checkpoint, multiline=True)
    assert heard == ["one\ntwo", "three", "four"]


class Terminal:
    """A chat in a real terminal."""

    def __init__(self, *arguments: str) -> None:
        self.master, slave = pty.openpty()
        command = [sys.executable, "-m", "litgpt", "chat", *arguments]
        self.process = subprocess.Popen(
            command, stdin=slave, stdout=slave, stderr=slave, close_fds=True, start_new_session=True,
            preexec_fn=lambda: __import__("fcntl").ioctl(0, __import__("termios").TIOCSCTTY, 0),
            env=os.environ | {"TERM": "dumb"},
        )  # fmt: skip
        os.close(slave)
        self.text = ""

    def until(self, words: str, seconds: float = 60) -> str:
        """Read until `words` come; what was read."""
        end, read = time.monotonic() + seconds, ""
        while words not in read:
            assert time.monotonic() < end, f"{words!r} did not come; so far:\n{self.text}"
            if select.select([self.master], [], [], 0.2)[0]:
                piece = os.read(self.master, 4096).decode(errors="replace")
                read += piece
                self.text += piece
        return read

    def until_more_than(self, characters: int) -> None:
        """Wait until an answer is on its way."""
        already = len(self.text)
        while len(self.text) < already + characters:
            if select.select([self.master], [], [], 60)[0]:
                self.text += os.read(self.master, 4096).decode(errors="replace")

    def type(self, text: str) -> None:
        os.write(self.master, text.encode())

    def leave(self) -> int:
        status = self.process.wait(timeout=180)
        os.close(self.master)
        return status


def endless(checkpoint: Path) -> Path:
    """Change a model so that it likes every token alike, but never the end of the text (id 0)."""
    file = checkpoint / "model.safetensors"
    tensors = load_file(file)
    for name in ("gpt_neox.final_layer_norm.weight", "gpt_neox.final_layer_norm.bias", "embed_out.weight"):
        tensors[name].zero_()
    tensors["gpt_neox.final_layer_norm.bias"][1] = 1
    tensors["embed_out.weight"][0, 1] = -100
    save_file(tensors, file, metadata={"format": "pt"})
    return checkpoint


def test_in_a_terminal_an_interrupt_stops_the_answer_and_the_end_of_input_leaves(tmp_path):
    config = shrunk("pythia-14m", vocab_size=300, padded_vocab_size=320, block_size=100_000)
    tokenizer = train_tiny_tokenizer(tmp_path / "tokenizer")
    checkpoint = endless(make_hf_checkpoint(tmp_path / "T", config, tokenizer_dir=tokenizer))
    terminal = Terminal(str(checkpoint), "--max_new_tokens", "40000")
    terminal.until(">> Prompt")
    for _ in range(2):
        terminal.type("hello\n")
        terminal.until_more_than(200)
        os.killpg(terminal.process.pid, signal.SIGINT)
        assert "(stopped)" in terminal.until(">> Prompt")
    terminal.type("\x04")
    assert terminal.leave() == 0
    assert "Traceback" not in terminal.text


def test_an_interrupt_at_the_prompt_drops_what_is_typed_and_keeps_the_session(monkeypatch, capsys):
    typed = iter([KeyboardInterrupt(), "hello", KeyboardInterrupt(), EOFError()])

    def read(**_: bool) -> str:
        event = next(typed)
        if isinstance(event, str):
            return event
        raise event

    monkeypatch.setattr(chat, "_read", read)
    assert list(chat.messages(by_hand=True, multiline=False)) == ["hello"]
    assert capsys.readouterr().err.count("Ctrl-D leaves") == 2
    typed = iter([KeyboardInterrupt()])
    with pytest.raises(KeyboardInterrupt):
        list(chat.messages(by_hand=False, multiline=False))


@pytest.mark.parametrize("prompt", [None, 5, ["a"]])
def test_a_prompt_that_is_no_text_is_a_type_error_that_names_it(checkpoint, prompt):
    with pytest.raises(TypeError, match="prompt"):
        generate.main(checkpoint, prompt, max_new_tokens=3)


def lines_of(text: str) -> list[dict]:
    return [json.loads(line) for line in text.removesuffix("\n").split("\n")]


def test_a_file_of_prompts_is_answered_in_order_as_each_alone(checkpoint, tmp_path, capsys):
    prompts = ["The mill", "A small model", "é", "The river ran past the mill and"]
    (tmp_path / "p.txt").write_text("\n\n".join(prompts) + "\n", encoding="utf-8")
    generate.main(checkpoint, prompts_file=tmp_path / "p.txt", max_new_tokens=9, num_samples=2, seed=3, batch_size=3)
    lines = lines_of(capsys.readouterr().out)
    assert [(line["prompt"], line["sample"]) for line in lines] == [(p, i) for p in prompts for i in (0, 1)]
    for line in lines:
        generate.main(checkpoint, line["prompt"], max_new_tokens=9, seed=3 + line["sample"])
        assert capsys.readouterr().out == line["prompt"] + line["text"] + "\n"
        assert line["finish_reason"] in ("length", "stop")


def test_json_lines_go_in_and_out(checkpoint, tmp_path, capsys):
    rows = [
        {"id": 7, "prompt": "The\u2028mill\x85"},
        {"messages": [{"role": role, "content": "a"} for role in ("user", "assistant", "user")]},
    ]
    (tmp_path / "p.jsonl").write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8")
    generate.main(
        checkpoint, prompts_file=tmp_path / "p.jsonl", output=tmp_path / "new" / "a.jsonl", max_new_tokens=5, stop=["z"]
    )
    lines = lines_of((tmp_path / "new" / "a.jsonl").read_text(encoding="utf-8"))
    assert [{key: line[key] for key in row} for line, row in zip(lines, rows, strict=True)] == rows
    assert all(line["completion_tokens"] <= 5 for line in lines)
    assert capsys.readouterr().out == ""
    with pytest.raises(InputError, match="exists already"):
        generate.main(checkpoint, output=tmp_path / "new" / "a.jsonl")


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("p.txt", "short\n" + "mill " * 100, "p.txt:2.*tokens.*64"),
        ("p.txt", "\n \n", "holds no prompt"),
        ("p.txt", b"\xff\xfe\xff", "UTF-8"),
        ("p.jsonl", '{"prompt": "a"}\n{"prompt"', r"p.jsonl:2 is not JSON \(Expecting .* at column 10\)"),
        ("p.jsonl", '{"prompt": "\\ud83d"}', "p.jsonl:1 is no text"),
        ("p.jsonl", '{"promt": "a"}', "p.jsonl:1.*prompt.*messages"),
        ("p.jsonl", '{"prompt": 5}', "p.jsonl:1: prompt is of type int"),
        ("p.jsonl", '{"messages": [{"content": "a"}]}', "p.jsonl:1.*role"),
        ("p.jsonl", '{"messages": "a"}', "p.jsonl:1"),
        (
            "p.jsonl",
            '{"prompt": "a"}\n\n{"prompt": "a", "text": "mine"}',
            "p.jsonl:3: 'text' is a field of the results",
        ),
        ("p.jsonl", '{"prompt": "a", "finish_reason": null}', "p.jsonl:1: 'finish_reason' is a field.*; rename it"),
        ("p.jsonl", '{"messages": [], "prompt_tokens": 1}', "p.jsonl:1: 'prompt_tokens' is a field"),
        ("p.jsonl", '{"prompt": "a", "completion_tokens": 1}', "p.jsonl:1: 'completion_tokens' is a field"),
        ("p.jsonl", '{"prompt": "a"}\n{"prompt": "a", "x": [1e999]}', "p.jsonl:2 .*1e999 is no finite number"),
        ("p.jsonl", '{"prompt": "a", "x": {"y": -1e999}}', "p.jsonl:1 .*-1e999 is no finite number"),
        ("p.jsonl", '{"prompt": "a", "x": NaN}', "p.jsonl:1 .*NaN is no finite number"),
        ("p.jsonl", '{"prompt": "a", "x": -Infinity}', "p.jsonl:1 .*-Infinity is no finite number"),
        ("p.jsonl", "[" * 100000, "p.jsonl:1 is not JSON"),
    ],
)
def test_a_prompt_that_cannot_be_answered_is_named_before_the_first_answer(
    checkpoint, tmp_path, capsys, name, content, words
):
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError, match=words):
        generate.main(checkpoint, prompts_file=tmp_path / name, output=tmp_path / "a.jsonl", max_new_tokens=5)
    assert not (tmp_path / "a.jsonl").exists()
    assert capsys.readouterr().out == ""


def test_a_field_of_results_is_the_users_where_the_results_have_none_of_that_name(checkpoint, tmp_path, capsys):
    (tmp_path / "p.jsonl").write_text('{"prompt": "a", "sample": 7, "score": 1e-3}')
    generate.main(checkpoint, prompts_file=tmp_path / "p.jsonl", max_new_tokens=2)
    line = lines_of(capsys.readouterr().out)[0]
    assert (line["sample"], line["score"]) == (7, 1e-3)
    assert set(line) - {"prompt", "score"} == set(generate.OWN_FIELDS)
    with pytest.raises(InputError, match=r"p.jsonl:1: 'sample' is a field of the results; rename it"):
        generate.main(checkpoint, prompts_file=tmp_path / "p.jsonl", max_new_tokens=2, num_samples=2)


def test_a_file_of_prompts_that_is_not_there(checkpoint, tmp_path):
    with pytest.raises(MissingError, match=r"no\.txt"):
        generate.main(checkpoint, prompts_file=tmp_path / "no.txt")


def test_a_bias_decides_the_token(checkpoint, capsys):
    token = load_session(checkpoint).tokenizer.encode("Q")[0]
    generate.main(checkpoint, "a", max_new_tokens=3, logit_bias={str(token): 1000})
    assert capsys.readouterr().out == "aQQQ\n"


def test_text_streams_read_in_turn_are_what_they_are_alone(checkpoint):
    messages = [[{"role": "user", "content": text}] for text in ("The mill", "A small")]
    session = load_session(checkpoint)
    alone = ["".join(session.answer(m, Sampling(seed=1), max_new_tokens=10)) for m in messages]
    streams = [session.answer(m, Sampling(seed=1), max_new_tokens=10) for m in messages]
    texts, going = ["", ""], [0, 1]
    while going:
        for i in list(going):
            piece = next(streams[i], None)
            texts[i] += piece or ""
            if piece is None:
                going.remove(i)
    assert texts == alone


def test_a_turn_of_a_chat_reads_only_what_is_new(checkpoint, monkeypatch, capsys):
    from litgpt.generate.engine import Engine

    requests = []
    original = Engine.submit
    monkeypatch.setattr(Engine, "submit", lambda *a, **k: requests.append(original(*a, **k)) or requests[-1])
    session = load_session(checkpoint, prompt_style="phi-2")
    one_letter = Sampling(logit_bias={session.tokenizer.encode("Q")[0]: 1000})  # text that is read as it was written
    talk = chat.Chat(session, one_letter, 6)
    talk.say("one")
    talk.say("two")
    assert capsys.readouterr().out == "QQQQQQ\n" * 2
    assert requests[0].reused == 0
    assert requests[1].reused == len(requests[0].ids) + 5  # the sixth was never fed


def adapted(checkpoint: Path, directory: Path, name: str) -> Path:
    """What a finetune leaves: an adapter that changes the text."""
    from litgpt import adapters
    from litgpt.checkpoint import load_model
    from litgpt.methods.adapter import Adapter
    from litgpt.methods.adapter_v2 import AdapterV2

    model = load_model(checkpoint, writable=True)
    method = {"adapter": Adapter, "adapter_v2": AdapterV2}[name](start_layer=0)
    generator = torch.Generator().manual_seed(1)
    method.attach(model, generator)
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=3.0, generator=generator)
    return adapters.write(
        directory, model.config, method, model, base=checkpoint, merged=False, tokenizer_dir=checkpoint,
        hyperparameters={}, prompt_style=from_name("phi-2"), extra=None, overwrite=False,
    )  # fmt: skip


@pytest.mark.parametrize("name", ["adapter", "adapter_v2"])
def test_an_adapter_is_found_by_every_command(checkpoint, tmp_path, capsys, monkeypatch, name):
    directory = adapted(checkpoint, tmp_path / "final", name)
    command = {"adapter": generate_adapter, "adapter_v2": generate_adapter_v2}[name]
    told = {"temperature": 0, "max_new_tokens": 8}
    generate.main(directory, "The mill", **told)
    expected = capsys.readouterr().out
    generate.main(checkpoint, "The mill", **told, prompt_style="phi-2")
    assert capsys.readouterr().out != expected
    command.main(checkpoint, "The mill", adapter_path=directory, **told)
    assert capsys.readouterr().out == expected
    command.main(directory, "The mill", **told)
    assert capsys.readouterr().out == expected
    monkeypatch.chdir(tmp_path)
    (tmp_path / command.ADAPTER).parent.parent.mkdir(parents=True)
    directory.rename((tmp_path / command.ADAPTER).parent)
    command.main(checkpoint, "The mill", **told)  # the default names a file of LitGPT 0.5 beside which ours lies
    assert capsys.readouterr().out == expected
    with pytest.raises(MissingError, match="nowhere"):
        command.main(checkpoint, adapter_path=Path("nowhere"))
    with pytest.raises(InputError, match="no adapter"):
        command.main(checkpoint, adapter_path=checkpoint)


def test_a_full_finetune_is_found_as_directory_as_file_and_as_the_model_itself(checkpoint, tmp_path, capsys):
    import shutil

    from litgpt.scripts import convert_to_litgpt

    finetuned = Path(shutil.copytree(checkpoint, tmp_path / "F"))
    tensors = load_file(finetuned / "model.safetensors")
    tensors["embed_out.weight"].copy_(tensors["embed_out.weight"].flip(0))
    save_file(tensors, finetuned / "model.safetensors", metadata={"format": "pt"})
    told = {"temperature": 0, "max_new_tokens": 8}
    generate.main(finetuned, "The mill", **told)
    expected = capsys.readouterr().out
    convert_to_litgpt.main(finetuned)
    bare = tmp_path / "lit_model_finetuned.pth"
    (finetuned / "lit_model.pth").rename(bare)
    capsys.readouterr()
    for directory, path in ((checkpoint, finetuned), (checkpoint, bare), (finetuned, generate_full.FINETUNED)):
        generate_full.main(directory, "The mill", finetuned_path=path, **told)
        assert capsys.readouterr().out == expected
    drawn = [generate_full.main(finetuned, "The mill", max_new_tokens=8) or capsys.readouterr().out for _ in range(2)]
    assert drawn[0] == drawn[1]
    with pytest.raises(MissingError, match="nowhere"):
        generate_full.main(checkpoint, finetuned_path=tmp_path / "nowhere")


@pytest.mark.parametrize("command", [generate_full, generate_adapter, generate_adapter_v2])
def test_arguments_without_names_are_those_of_earlier_releases(command):
    path = "finetuned_path" if command is generate_full else "adapter_path"
    names = ["checkpoint_dir", "prompt", "input", "sys_prompt", path, "quantize", "max_new_tokens", "top_k", "top_p"]
    assert list(inspect.signature(command.main).parameters) == [*names, "temperature", "precision"]


def test_an_input_stands_where_the_style_has_a_place_for_it_and_behind_the_prompt_otherwise(checkpoint):
    messages = conversation("Add", None, "1 and 2")
    for style, text in (("alpaca", "### Instruction:\nAdd\n\n### Input:\n1 and 2\n\n"), ("default", "Add\n\n1 and 2")):
        session = load_session(checkpoint, prompt_style=style)
        assert text in session.tokenizer.decode(session.encode(messages))


def run_cli(checkpoint: Path, *words: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "litgpt", "generate", str(checkpoint), *words]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_a_reader_that_goes_and_an_interrupt_end_it_quietly(tmp_path):
    config = shrunk("pythia-14m", vocab_size=300, padded_vocab_size=320, block_size=100_000)
    tokenizer = train_tiny_tokenizer(tmp_path / "tokenizer")
    checkpoint = endless(make_hf_checkpoint(tmp_path / "T", config, tokenizer_dir=tokenizer))
    reader, interrupted = (run_cli(checkpoint, "--prompt", "a", "--max_new_tokens", "90000") for _ in range(2))
    for process in (reader, interrupted):
        process.stdout.read(20)
    reader.stdout.close()
    interrupted.send_signal(signal.SIGINT)
    status, said = reader.wait(timeout=180), reader.stderr.read()
    assert status in (0, 141), said
    assert said == ""
    assert interrupted.wait(timeout=180) == 130
    assert "Traceback" not in interrupted.stderr.read()
    interrupted.stdout.close()
