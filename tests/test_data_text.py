"""Raw text: which files are found, which documents they hold, and what is said of those that hold none."""

from __future__ import annotations

import gzip
import json
import os
import sys
from pathlib import Path

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from litgpt.data import text as text_module
from litgpt.data.text import read_documents, text_files
from litgpt.errors import InputError, MachineError, MissingError


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def documents(path: Path, **kwargs) -> list[str]:
    return list(read_documents(text_files(path), **kwargs))


def refusal(path: Path, **kwargs) -> str:
    """The one line with which a path is refused."""
    with pytest.raises((InputError, MissingError)) as caught:
        documents(path, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_folder_is_searched_to_the_bottom_in_sorted_order(tmp_path):
    kept = ["a.txt", "b/c.md", "b/d.jsonl.gz", "b/e.TXT", "f.txt.zst"]
    for name in [*kept, ".hidden.txt", ".cache/g.txt", "h.csv", "i.gz", "j"]:
        write(tmp_path / name, "x")
    assert text_files(tmp_path) == [tmp_path / name for name in kept]


def test_a_file_named_twice_is_read_once(tmp_path):
    one = write(tmp_path / "one.txt", "1")
    two = write(tmp_path / "two.txt", "2")
    assert text_files([two, tmp_path, one]) == [one, two]


def test_a_path_may_be_a_string(tmp_path):
    one = write(tmp_path / "one.txt", "1")
    assert text_files(str(one)) == [one]


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_compressed_text_reads_as_plain_text_does(tmp_path, suffix):
    pack = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.ZstdCompressor().compress}[suffix]
    write(tmp_path / f"a.txt{suffix}", pack("\ufeff  Größe 漢字 😀\r\nzwei\r\n".encode()))
    write(tmp_path / f"b.jsonl{suffix}", pack(b'{"text": "one"}\n\n  \n{"text": "two "}'))
    assert documents(tmp_path) == ["Größe 漢字 😀\nzwei", "one", "two"]


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
@pytest.mark.parametrize("piece", [1, 7, 1000])
def test_several_frames_in_one_compressed_file_are_all_read(tmp_path, monkeypatch, suffix, piece):
    pack = {".gz": gzip.compress, ".zst": zstandard.ZstdCompressor().compress}[suffix]
    file = write(tmp_path / f"a.txt{suffix}", b"".join(map(pack, (b"one ", b"two ", b"three"))))
    monkeypatch.setattr(text_module, "_READ_BYTES", piece)
    read: list[int] = []
    assert list(read_documents([file], on_read=read.append)) == ["one two three"]
    assert sum(read) == file.stat().st_size


def test_a_jsonl_file_may_use_another_key_and_hold_blank_texts(tmp_path):
    file = write(tmp_path / "a.jsonl", '{"story": "one"}\n{"story": "  "}\n{"story": "two"}\n')
    assert documents(file, key="story") == ["one", "two"]


@given(
    texts=st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1), min_size=1), piece=st.integers(1, 50)
)
def test_rows_do_not_depend_on_how_the_file_is_read(tmp_path_factory, texts, piece):
    rows = "\n".join(json.dumps({"text": text}, ensure_ascii=False) for text in texts)
    file = write(tmp_path_factory.mktemp("rows") / "a.jsonl", rows)
    expected = [text.strip() for text in texts if text.strip()]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text_module, "_READ_BYTES", piece)
        assert expected == (documents(file) if expected else [])


def test_rows_are_read_one_after_another_not_all_at_once(tmp_path):
    file = write(tmp_path / "a.jsonl", '{"text": "one"}\n' + "broken\n")
    stream = read_documents([file])
    assert next(stream) == "one"
    with pytest.raises(InputError, match=r"a\.jsonl:2"):
        next(stream)


def test_an_empty_folder_says_what_is_expected(tmp_path):
    assert {".txt", ".md", ".jsonl"} <= set(refusal(tmp_path).replace(",", "").split())


def test_a_folder_of_other_files_says_what_was_found(tmp_path):
    for name in ("a.csv", "b.parquet", "c.JSON", "d.bin"):
        write(tmp_path / name, "x")
    assert "found a.csv, b.parquet, c.JSON and 1 more" in refusal(tmp_path)


def test_a_missing_path_and_an_unknown_suffix_are_named(tmp_path):
    assert "nowhere: no such file" in refusal(tmp_path / "nowhere")
    assert "a.csv: not a kind of text file" in refusal(write(tmp_path / "a.csv", "x"))
    with pytest.raises(InputError, match="no text was given"):
        text_files([])


@pytest.mark.parametrize("content", [b"", b" \n\t\n", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("name", ["b.txt", "b.jsonl", "b.md"])
def test_the_first_empty_or_blank_file_is_named(tmp_path, name, content):
    write(tmp_path / "a.txt", "text")
    write(tmp_path / name, content)
    assert f"{name}: holds no text" in refusal(tmp_path)


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz", "a.jsonl"])
def test_binary_bytes_are_named(tmp_path, name):
    content = b"Mabc\0def"
    line = refusal(write(tmp_path / name, gzip.compress(content) if name.endswith(".gz") else content))
    assert name in line
    assert "byte 4 is zero" in line


def test_latin_1_gives_the_byte_and_a_hint(tmp_path):
    line = refusal(write(tmp_path / "a.txt", "naïve café".encode("latin-1")))
    assert "a.txt: not UTF-8 (byte 2 is 0xef)" in line
    assert "iconv -f LATIN1 -t UTF-8" in line


def test_windows_quotes_and_utf_16_get_their_own_hint(tmp_path):
    assert "CP1252" in refusal(write(tmp_path / "a.txt", "“quoted”".encode("cp1252")))
    assert "UTF-16" in refusal(write(tmp_path / "b.txt", "text".encode("utf-16")))


def test_a_bad_byte_in_a_row_is_counted_from_the_start_of_the_file(tmp_path):
    content = b'{"text": "one"}\n{"text": "\xe9"}\n'
    line = refusal(write(tmp_path / "a.jsonl", content))
    assert "a.jsonl:2: not UTF-8" in line
    assert f"byte {content.index(0xE9)} is 0xe9" in line


def test_a_row_cut_short_is_named_by_its_line(tmp_path):
    rows = [json.dumps({"text": f"row {i} é"}, ensure_ascii=False).encode() for i in range(11)]
    for cut in range(1, len(rows[-1])):
        line = refusal(write(tmp_path / "a.jsonl", b"\n".join(rows)[:-cut]))
        assert "a.jsonl:11: " in line


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ('{"txt": "x"}', "row 2 has no key 'text'; it has 'txt'"),
        ("{}", "it has none"),
        ('{"text": null}', "'text' must be text, not null"),
        ('{"text": 5}', "not a number"),
        ('{"text": ["x"]}', "not a list"),
        ('["x"]', "a row must be an object"),
        ('"x"', "not text"),
        ('{"text": "\\ud83d"}', "half a character"),
        ("[" * 100_000, "not a JSON row"),
        ("9" * 5_000, "a row must be an object" if sys.version_info < (3, 10, 7) else "not a JSON row"),
    ],
)
def test_a_row_that_is_no_text_is_named_with_its_line_and_key(tmp_path, row, said):
    line = refusal(write(tmp_path / "a.jsonl", f'{{"text": "x"}}\n{row}\n'))
    assert "a.jsonl:2" in line
    assert said in line


def test_rows_without_the_key_are_counted_and_the_option_is_named(tmp_path):
    line = refusal(write(tmp_path / "a.jsonl", '{"text": "x"}\n' + '{"body": "y"}\n' * 8 + "[\n"))
    assert "row 2 has no key 'text'; it has 'body' (nor have 7 of the next" in line
    assert "--data.text_key" in line
    assert len(refusal(write(tmp_path / "b.jsonl", json.dumps({"x" * 9_000: 1})))) < 400


def test_a_pipe_is_passed_over_in_a_folder_and_refused_by_itself(tmp_path):
    write(tmp_path / "a.txt", "x")
    os.mkfifo(tmp_path / "b.txt")
    assert documents(tmp_path) == ["x"]
    assert "b.txt: a pipe, socket or device" in refusal(tmp_path / "b.txt")


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_a_compressed_file_that_is_cut_short_or_damaged_is_named(tmp_path, suffix):
    pack = {".gz": gzip.compress, ".zst": zstandard.ZstdCompressor().compress}[suffix]
    packed = pack(os.urandom(3000).hex().encode())
    for content in (packed[:-1], packed[: len(packed) // 2], packed[:3], b"plain text"):
        assert f"a.txt{suffix}: broken" in refusal(write(tmp_path / f"a.txt{suffix}", content))


def test_zstandard_missing_names_the_extra(tmp_path, monkeypatch):
    file = write(tmp_path / "a.txt.zst", b"x")
    monkeypatch.setitem(sys.modules, "zstandard", None)
    assert "litgpt[data]" in refusal(file)


def test_a_disk_that_fails_is_a_machine_error(tmp_path, monkeypatch):
    def fail(file, on_read):
        raise OSError(5, "Input/output error")
        yield b""

    monkeypatch.setattr(text_module, "_stored", fail)
    with pytest.raises(MachineError, match=r"a\.txt: cannot be read \(Input/output error\)"):
        documents(write(tmp_path / "a.txt", "x"))
