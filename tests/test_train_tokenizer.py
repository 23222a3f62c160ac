"""`litgpt train_tokenizer`: files that transformers opens equally, the same ones each time, or one clear line."""

import gzip
import json
import subprocess
import sys
import time

import pytest
from transformers import AutoTokenizer

from litgpt.errors import InputError, MissingError
from litgpt.scripts.train_tokenizer import END_OF_TEXT, LONGEST, main, pieces
from litgpt.tokenizer import Tokenizer
from tests.makers.tokenizers import TEXT
from tests.test_tokenizer import NASTY


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text"
    path.mkdir()
    (path / "a.txt").write_text(TEXT * 3)
    (path / "b.jsonl").write_text(json.dumps({"text": "Ein Fluß, zwei Mühlen. " * 9}) + "\n")
    (path / "c.md.gz").write_bytes(gzip.compress(b"# mills\n\nand more mills"))
    return path


def test_transformers_opens_it_equally_and_nothing_is_lost(text, tmp_path):
    main([text], tmp_path / "out", vocab_size=400)
    ours, judge = Tokenizer(tmp_path / "out"), AutoTokenizer.from_pretrained(tmp_path / "out")
    assert ours.vocab_size == len(judge) == 400
    assert (ours.bos_id, ours.eos_id) == (judge.bos_token_id, judge.eos_token_id) == (0, 0)
    for sample in [*NASTY, TEXT]:
        assert ours.encode(sample, eos=None) == judge.encode(sample)
        assert ours.decode(ours.encode(sample)) == sample
    assert judge.decode([0]) == END_OF_TEXT


def test_it_learns_the_words_of_the_text(text, tmp_path):
    main([text], tmp_path / "out", vocab_size=400)
    tokenizer = Tokenizer(tmp_path / "out")
    assert len(tokenizer.encode(" mill")) == 1
    assert len(tokenizer.encode("The river ran past the mill")) < 12


def test_the_same_text_gives_the_same_bytes_in_every_process(text, tmp_path):
    code = "import sys; from litgpt.scripts.train_tokenizer import main; main([sys.argv[1]], sys.argv[2], 400)"
    for out in ("one", "two"):
        subprocess.run([sys.executable, "-c", code, text, tmp_path / out], check=True, capture_output=True)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_a_short_text_gives_fewer_tokens_and_says_so(tmp_path, capsys):
    (tmp_path / "a.txt").write_text("hello hello")
    main([tmp_path / "a.txt"], tmp_path / "out")
    assert Tokenizer(tmp_path / "out").vocab_size < 8192
    assert "fewer than --vocab_size 8192" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("content", "told"),
    [(b"", "no text"), (b"  \n", "no text"), (b"a\x00b", "binary"), ("Gr\u00f6\u00dfe".encode("latin-1"), "byte 2")],
)
def test_what_is_no_text_is_refused_by_name(tmp_path, content, told):
    (tmp_path / "bad.txt").write_bytes(content)
    with pytest.raises(InputError, match=told) as caught:
        main([tmp_path / "bad.txt"], tmp_path / "out")
    assert "bad.txt" in str(caught.value)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bad.txt"]


def test_an_existing_output_is_kept_unless_told_otherwise(text, tmp_path):
    out = tmp_path / "out"
    main([text], out, vocab_size=300)
    before = (out / "tokenizer.json").read_bytes()
    with pytest.raises(InputError, match="overwrite"):
        main([text], out, vocab_size=400)
    assert (out / "tokenizer.json").read_bytes() == before
    main([text], out, vocab_size=400, overwrite=True)
    assert Tokenizer(out).vocab_size == 400


def test_bad_arguments_are_named(text, tmp_path):
    with pytest.raises(InputError, match="257"):
        main([text], tmp_path / "out", vocab_size=100)
    with pytest.raises(MissingError, match="nowhere"):
        main([tmp_path / "nowhere"], tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("run", ["a", " ", "ab", "\u4e00"])
def test_a_word_of_millions_of_characters_is_cut(tmp_path, run):
    path = tmp_path / "a.txt"
    path.write_text(f"before {run * 1_000_000} after")
    started = time.monotonic()
    main([path], tmp_path / "out", vocab_size=300)
    assert time.monotonic() - started < 20
    text = f"x {run * 5000} y"
    assert "".join(pieces(text)) == text
    assert max(len(word) for piece in pieces(text) for word in piece.split(" ")) <= LONGEST


def test_it_needs_no_torch():
    code = "import sys, litgpt.scripts.train_tokenizer, litgpt.prompts; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
