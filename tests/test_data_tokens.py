"""Token files: what they hold, when they are made again, and that no kill leaves half of one in use."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from litgpt.data import tokens as tokens_module
from litgpt.data.text import text_files
from litgpt.data.tokens import Corpus, unigram_loss
from litgpt.errors import InputError, MachineError
from litgpt.tokenizer import Tokenizer
from tests.makers.numbers import Numbers
from tests.makers.tokenizers import train_tiny_metaspace, train_tiny_sentencepiece, train_tiny_tokenizer

ROOT = Path(__file__).parents[1]


def corpus(path: Path, tokenizer=None, *places: Path, key: str = "text") -> Corpus:
    return Corpus(tuple(text_files(path)), key, tokenizer or Numbers(), places or (path / ".litgpt_cache",))


def prepared(made: Corpus) -> list[int]:
    made.prepare()
    return made.open().ids.tolist()


def write_texts(folder: Path, **texts: str) -> Path:
    folder.mkdir(exist_ok=True)
    for name, text in texts.items():
        (folder / f"{name}.txt").write_text(text)
    return folder


def encodings(monkeypatch) -> list[int]:
    """Grows whenever a batch of texts is tokenised."""
    calls: list[int] = []
    encode = Numbers.encode_batch
    monkeypatch.setattr(Numbers, "encode_batch", lambda self, *a, **k: calls.append(1) or encode(self, *a, **k))
    return calls


@pytest.mark.parametrize(
    ("bos", "eos", "expected", "begins"),
    [
        (None, 0, [5, 6, 0, 7, 0], [0, 3]),
        (0, 0, [0, 5, 6, 0, 7, 0], [0, 4]),
        (1, 2, [1, 5, 6, 2, 1, 7, 2], [0, 4]),
        (1, None, [1, 5, 6, 1, 7], [0, 3]),
        (None, None, [5, 6, 7], [0, 2]),
    ],
)
def test_documents_are_told_apart_by_the_tokens_of_the_tokenizer(tmp_path, bos, eos, expected, begins):
    made = corpus(write_texts(tmp_path, a="5 6", b="7"), Numbers(bos=bos, eos=eos))
    assert prepared(made) == expected
    assert made.open().documents.tolist() == begins


def test_a_real_tokenizer_gives_its_own_ids_whole_document_by_whole_document(tmp_path, monkeypatch):
    monkeypatch.setattr(tokens_module, "_BATCH_CHARACTERS", 50)
    tokenizer = Tokenizer(train_tiny_tokenizer(tmp_path / "tokenizer"))
    texts = [f"the mill {'ran past ' * i}the river's naïve 漢字 <|endoftext|>" for i in range(20)]
    (tmp_path / "text.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    made = corpus(tmp_path / "text.jsonl", tokenizer, tmp_path / "cache")
    expected = [i for text in texts for i in (*tokenizer.encode(text), tokenizer.eos_id)]
    assert prepared(made) == expected


MAKERS = {
    "byte-level": train_tiny_tokenizer,
    "sentencepiece": train_tiny_sentencepiece,
    "unigram": lambda directory: train_tiny_metaspace(directory, "unigram"),
    "bpe": lambda directory: train_tiny_metaspace(directory, "bpe"),
}
WORDS = ["the", "mill", "ran", "café", "漢字", "😀", "river's", "42", "def add(a):", ".", "<|endoftext|>", "</s>", "_x"]
GAPS = [" ", " ", " ", "  ", "\n", "\n\n", "\n    ", "\t", ""]


@pytest.mark.parametrize("kind", MAKERS)
def test_a_long_document_that_is_cut_has_the_tokens_of_the_whole(tmp_path, kind):
    tokenizer = Tokenizer(MAKERS[kind](tmp_path / "tokenizer"))
    file = tmp_path / "a.txt"

    @settings(max_examples=60, deadline=None)
    @given(parts=st.lists(st.tuples(st.sampled_from(WORDS), st.sampled_from(GAPS)), min_size=1, max_size=80))
    def check(parts):
        file.write_text("".join(word + gap for word, gap in parts))
        made = corpus(file, tokenizer, tmp_path / "cache")
        whole = tokenizer.encode(file.read_text().strip())
        assert prepared(made) == [*whole, tokenizer.eos_id]
        assert made.open().documents.tolist() == [0]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokens_module, "_PIECE_CHARACTERS", 30)
        patch.setattr(tokens_module, "_BATCH_CHARACTERS", 100)
        patch.setattr(os, "fsync", lambda descriptor: None)
        check()


def test_a_long_document_is_encoded_in_pieces(tmp_path, monkeypatch):
    lengths: list[int] = []
    encode = Numbers.encode_batch
    note = lambda self, texts, **k: lengths.extend(map(len, texts)) or encode(self, texts, **k)  # noqa: E731
    monkeypatch.setattr(Numbers, "encode_batch", note)
    ids = list(range(1000)) * 100
    file = write_texts(tmp_path, a=" ".join(map(str, ids))) / "a.txt"
    assert prepared(corpus(file, None, tmp_path / "cache")) == [*ids, 0]
    assert max(lengths) < file.stat().st_size / 4


@pytest.mark.parametrize(("vocab_size", "dtype"), [(65_536, "uint16"), (65_537, "uint32"), (300_000, "uint32")])
def test_ids_take_two_bytes_where_the_vocabulary_allows(tmp_path, vocab_size, dtype):
    made = corpus(write_texts(tmp_path, a=f"5 {vocab_size - 1}"), Numbers(vocab_size))
    assert prepared(made) == [5, vocab_size - 1, 0]
    assert made.open().ids.dtype == dtype


def test_the_file_is_mapped_not_read(tmp_path):
    made = corpus(write_texts(tmp_path, a="5 6"))
    made.prepare()
    assert isinstance(made.open().ids, np.memmap)
    assert isinstance(made.open().documents, np.memmap)
    with pytest.raises(ValueError, match="read-only"):
        made.open().ids[0] = 1


def test_equal_texts_are_tokenised_once(tmp_path, monkeypatch):
    calls = encodings(monkeypatch)
    folder = write_texts(tmp_path, a="5 6")
    assert prepared(corpus(folder)) == prepared(corpus(folder)) == [5, 6, 0]
    assert len(calls) == 1


def hashed(monkeypatch, settled: int) -> list[Path]:
    """Grows whenever a file is read for its hash, from `settled` nanoseconds on after its last change."""
    read: list[Path] = []
    sha256 = tokens_module.storage.sha256
    monkeypatch.setattr(tokens_module, "_SETTLED", settled)
    note = lambda path: (read.append(path) if path.suffix == ".txt" else None) or sha256(path)  # noqa: E731
    monkeypatch.setattr(tokens_module.storage, "sha256", note)
    return read


def test_a_text_that_has_long_been_the_same_is_read_once(tmp_path, monkeypatch):
    read = hashed(monkeypatch, settled=-(10**18))
    folder = write_texts(tmp_path, a="5 6", b="7")
    for _ in range(3):
        assert prepared(corpus(folder)) == [5, 6, 0, 7, 0]
    assert read == [folder / "a.txt", folder / "b.txt"]


def test_a_text_that_changed_a_moment_ago_is_read_again(tmp_path, monkeypatch):
    read = hashed(monkeypatch, settled=10**12)
    folder = write_texts(tmp_path, a="5 6")
    assert prepared(corpus(folder)) == prepared(corpus(folder)) == [5, 6, 0]
    assert len(read) == 2


def test_a_change_that_hides_its_time_is_noticed_in_a_text_that_was_remembered(tmp_path, monkeypatch):
    hashed(monkeypatch, settled=-(10**18))
    file = write_texts(tmp_path, a="5 6") / "a.txt"
    before = file.stat()
    assert prepared(corpus(tmp_path)) == [5, 6, 0]
    while file.stat().st_ctime_ns == before.st_ctime_ns:  # until the file system's clock has moved
        file.write_text("5 8")
        os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert file.stat().st_mtime_ns == before.st_mtime_ns
    assert prepared(corpus(tmp_path)) == [5, 8, 0]


@pytest.mark.parametrize("content", ["[]", "{}", '{"files": ["a.txt"]}', '{"files": {"a.txt": {"signs": 7}}}', "torn"])
def test_a_record_of_texts_that_makes_no_sense_is_passed_over(tmp_path, content):
    folder = write_texts(tmp_path, a="5 6")
    other = folder / ".litgpt_cache" / "tokens-other"
    other.mkdir(parents=True)
    (other / "info.json").write_text(content)
    assert prepared(corpus(folder)) == [5, 6, 0]


def test_a_moved_text_keeps_its_tokens(tmp_path, monkeypatch):
    calls = encodings(monkeypatch)
    corpus(write_texts(tmp_path / "old", a="5 6")).prepare()
    (tmp_path / "old").rename(tmp_path / "new")
    assert prepared(corpus(tmp_path / "new")) == [5, 6, 0]
    assert len(calls) == 1


@pytest.mark.parametrize("change", ["same size", "longer", "new file", "renamed order", "tokenizer", "eos", "key"])
def test_a_change_of_text_or_tokenizer_makes_new_tokens(tmp_path, change):
    folder = write_texts(tmp_path, a="5 6", b="7")
    before = corpus(folder)
    before.prepare()
    tokenizer, key = Numbers(), "text"
    if change == "same size":
        stat = (folder / "a.txt").stat()
        write_texts(folder, a="5 8")
        os.utime(folder / "a.txt", ns=(stat.st_atime_ns, stat.st_mtime_ns))  # the clock is not asked
    elif change == "longer":
        write_texts(folder, b="7 7")
    elif change == "new file":
        write_texts(folder, c="9")
    elif change == "renamed order":
        (folder / "a.txt").rename(folder / "c.txt")
    elif change == "tokenizer":
        tokenizer = Numbers(2000)
    elif change == "eos":
        tokenizer = Numbers(eos=3)
    else:
        key = "story"
    after = corpus(folder, tokenizer, key=key)
    with pytest.raises(InputError, match="prepare_data"):
        after.open()
    fresh = corpus(folder, tokenizer, tmp_path / "elsewhere", key=key)
    assert prepared(after) == prepared(fresh)
    assert after.fingerprint == fresh.fingerprint != before.fingerprint


@pytest.mark.parametrize("name", ["tokens.bin", "documents.bin", "info.json", "litgpt_manifest.json"])
@pytest.mark.parametrize("damage", ["cut", "gone"])
def test_a_damaged_token_file_is_made_again(tmp_path, name, damage):
    made = corpus(write_texts(tmp_path, a="5 6 7", b="8"))
    expected = prepared(made)
    file = next((tmp_path / ".litgpt_cache").glob(f"*/{name}"))
    if damage == "cut":
        os.truncate(file, file.stat().st_size - 2)
    else:
        file.unlink()
    with pytest.raises(InputError):
        made.open()
    assert prepared(made) == expected


@pytest.mark.parametrize("counted", [1 << 24, 16 << 12])
def test_tokens_beyond_the_vocabulary_are_made_again(tmp_path, monkeypatch, counted):
    made = corpus(write_texts(tmp_path, a="5 6 7 " * 30_000), Numbers(100))
    expected = prepared(made)
    monkeypatch.setattr(tokens_module, "_COUNTED_TOKENS", counted)
    file = next((tmp_path / ".litgpt_cache").glob("*/tokens.bin"))
    file.write_bytes(b"\xff" * file.stat().st_size)
    assert prepared(made) == expected


def test_a_refused_text_leaves_nothing_beside_it(tmp_path):
    (tmp_path / "a.txt").write_text("5")
    (tmp_path / "b.txt").write_bytes(b"5 6 \xff")
    with pytest.raises(InputError, match=r"b\.txt"):
        corpus(tmp_path).prepare()
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a.txt", "b.txt"]


def test_a_folder_that_cannot_be_written_is_passed_over(tmp_path, monkeypatch):
    folder = write_texts(tmp_path / "text", a="5 6")
    shut, home = folder / ".litgpt_cache", tmp_path / "home"
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != folder)  # root may write anywhere: pretend
    assert prepared(corpus(folder, None, shut, home)) == [5, 6, 0]
    assert home.is_dir()
    assert not shut.exists()


def test_no_place_to_write_names_the_option(tmp_path):
    folder = write_texts(tmp_path / "text", a="5 6")
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"--data\.cache_dir"):
        corpus(folder, None, tmp_path / "file").prepare()


def test_a_full_disk_is_a_machine_error_and_leaves_nothing(tmp_path, monkeypatch):
    def full(self, *args, **kwargs):
        raise OSError(28, "No space left on device")

    folder = write_texts(tmp_path, a="5 6")
    monkeypatch.setattr(tokens_module.storage, "write_json", full)
    with pytest.raises(MachineError, match="No space left"):
        corpus(folder).prepare()
    assert [path.name for path in folder.iterdir()] == ["a.txt"]


def test_runs_that_start_together_tokenise_once(tmp_path, monkeypatch):
    calls = encodings(monkeypatch)
    folder = write_texts(tmp_path, a="5 6")
    results: list[list[int]] = []
    threads = [threading.Thread(target=lambda: results.append(prepared(corpus(folder)))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [[5, 6, 0]] * 4
    assert len(calls) == 1


KILLED_EVERYWHERE = """
    import os, shutil, sys
    from pathlib import Path
    from litgpt.data import tokens
    from litgpt.errors import InputError
    from tests.test_data_tokens import corpus, prepared

    tokens._BATCH_CHARACTERS = 1
    os.fsync = lambda descriptor: None  # matters when the machine dies, not the process
    folder = Path(sys.argv[1])
    cache = folder / ".litgpt_cache"
    expected = prepared(corpus(folder, None, folder / "expected"))
    left = None

    def kill_at_zero(event, arguments):
        global left
        if left is not None and event.startswith(("open", "os.", "shutil.", "fcntl.", "tests.")):
            left -= 1
            if left < 0:
                os._exit(9)  # as a kill does: nothing is flushed, no finally runs

    sys.addaudithook(kill_at_zero)
    kills = 0
    while True:
        child = os.fork()
        if not child:
            left = kills
            corpus(folder).prepare()
            os._exit(0)
        if os.waitpid(child, 0)[1] == 0:
            break
        kills += 1
        try:
            assert corpus(folder).open().ids.tolist() == expected
        except InputError:
            pass
        assert prepared(corpus(folder)) == expected
        assert len(list(cache.iterdir())) == 1, list(cache.iterdir())
        shutil.rmtree(cache)
    print(kills)
"""


def test_killed_anywhere_a_rerun_gives_the_same_tokens(tmp_path):
    folder = write_texts(tmp_path / "text", a="5 6", b="7", c="8 9")
    command = [sys.executable, "-c", textwrap.dedent(KILLED_EVERYWHERE), str(folder)]
    run = subprocess.run(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert int(run.stdout) > 20


def test_long_preparations_say_how_far_they_are(tmp_path, monkeypatch, capsys):
    now = [0]
    monkeypatch.setattr("tqdm.std.time", lambda: now[0])
    monkeypatch.setattr(tokens_module, "_BATCH_CHARACTERS", 1)
    monkeypatch.setattr(
        tokens_module.Bar, "at", lambda *a, at=tokens_module.Bar.at: (now.__setitem__(0, now[0] + 6), at(*a))
    )
    corpus(write_texts(tmp_path, a="5 6", b="7", c="8")).prepare()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "tokenizing  60%  3 tokens  ETA 00:04"
    assert lines[-1].startswith("tokenizing 100%")


def test_unigram_loss_is_the_mean_surprise_of_add_one_frequencies():
    train, val = np.array([0, 0, 0, 1], np.uint16), np.array([0, 2], np.uint16)
    p = [4 / 7, 2 / 7, 1 / 7]
    assert unigram_loss(train, val, 3) == pytest.approx(-(math.log(p[0]) + math.log(p[2])) / 2)


def test_unigram_loss_of_a_uniform_text_is_the_log_of_the_vocabulary():
    train = np.arange(1000, dtype=np.uint32)
    assert unigram_loss(train, train, 1000) == pytest.approx(math.log(1000))
