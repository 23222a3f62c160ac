"""Finetuning data: five formats by looking, from four kinds of files, and one line for all that is wrong with them."""

from __future__ import annotations

import csv
import gzip
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from litgpt.data.records import KINDS, Record, pairs, read, split, try_rows, usable
from litgpt.data.rows import numbered
from litgpt.errors import InputError, MissingError

ALPACA = {"instruction": "Add.", "input": "1 2", "output": "3"}
USER, ANSWER = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}
ROWS: dict[str, dict[str, Any]] = {
    "instruction": ALPACA,
    "completion": {"prompt": "Hi", "completion": "Hello"},
    "messages": {"messages": [{"role": "system", "content": "Be brief."}, USER, ANSWER, USER, ANSWER]},
    "sharegpt": {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]},
    "text": {"text": "Plain."},
}


def alpaca(count: int) -> list[dict[str, Any]]:
    return [{"instruction": f"do {i}", "output": f"done {i}"} for i in range(count)]


def written(path: Path, rows: Any) -> Path:
    """A file of the kind that its suffix says."""
    if path.suffix == ".json":
        path.write_text(json.dumps(rows), encoding="utf-8")
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    elif path.suffix == ".csv":
        with open(path, "w", newline="", encoding="utf-8") as file:
            table = csv.DictWriter(file, rows[0].keys())
            table.writeheader()
            table.writerows(rows)
    else:
        pyarrow = pytest.importorskip("pyarrow")
        from pyarrow.parquet import write_table

        write_table(pyarrow.Table.from_pylist(rows), path)
    return path


def refusal(path: Path, content: Any, **options: Any) -> str:
    """The one line on a file that holds `content`: rows, text or bytes."""
    if isinstance(content, str | bytes):
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    else:
        written(path, content)
    with pytest.raises(InputError) as caught:
        read(path, **options)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    return str(caught.value).replace(str(path), "FILE")


# What is read ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("suffix", ["json", "jsonl", "parquet"])
def test_formats_are_recognised_by_their_keys(tmp_path: Path, kind: str, suffix: str) -> None:
    records = read(written(tmp_path / f"a.{suffix}", [ROWS[kind]] * 2))
    assert [record.kind for record in records] == [kind, kind]
    assert records[1].where == f"{tmp_path}/a.{suffix}" + (":2" if suffix == "jsonl" else ": record 2")
    if kind == "text":
        assert records[0].text == "Plain."
    elif kind == "messages":
        assert records[0].messages == tuple(ROWS["messages"]["messages"])
    elif kind == "instruction":
        assert records[0].messages == (
            {"role": "user", "content": "Add.", "input": "1 2"},
            {"role": "assistant", "content": "3"},
        )
    else:
        assert records[0].messages == (USER, ANSWER)


def test_a_row_with_the_keys_of_several_formats_is_of_the_richest_and_another_can_be_named(tmp_path: Path) -> None:
    row = {**ALPACA, "text": "Below is ...", **ROWS["messages"]}
    path = written(tmp_path / "a.json", [row])
    assert read(path)[0].kind == "messages"
    assert [read(path, kind)[0].kind for kind in ("instruction", "text")] == ["instruction", "text"]


def test_all_kinds_of_files_hold_the_same_records(tmp_path: Path) -> None:
    rows = [{"instruction": 'a "b",\n c', "input": "", "output": "ü 漢 😀"}, ALPACA]
    found = [
        [record.messages for record in read(written(tmp_path / name, rows))]
        for name in ("a.json", "a.jsonl", "a.csv", "a.parquet")
    ]
    assert all(messages == found[0] for messages in found)
    assert found[0][0][0] == {"role": "user", "content": 'a "b",\n c'}


def test_suffixes_may_be_in_capitals_and_compressed(tmp_path: Path) -> None:
    zstandard = pytest.importorskip("zstandard")
    plain = "\n".join(map(json.dumps, alpaca(3))).encode()
    (tmp_path / "A.JSONL").write_bytes(plain)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(plain))
    (tmp_path / "a.ndjson.ZST").write_bytes(zstandard.compress(plain))
    assert [len(read(tmp_path / n)) for n in ("A.JSONL", "a.jsonl.gz", "a.ndjson.ZST")] == [3, 3, 3]


def test_blank_lines_windows_ends_a_mark_of_utf8_and_no_last_newline_are_fine(tmp_path: Path) -> None:
    lines = [json.dumps(row) for row in alpaca(3)]
    (tmp_path / "a.jsonl").write_bytes(("\ufeff" + "\r\n\r\n  \r\n".join(lines)).encode())
    assert [record.where.rpartition(":")[2] for record in read(tmp_path / "a.jsonl")] == ["1", "4", "7"]
    (tmp_path / "a.json").write_bytes(("\ufeff" + json.dumps(alpaca(3), indent=1).replace("\n", "\r\n")).encode())
    assert len(read(tmp_path / "a.json")) == 3
    (tmp_path / "a.csv").write_bytes("\ufeff\r\ninstruction,output\r\na,b\r\n,\r\nc,d".encode())
    assert [record.where.rpartition(":")[2] for record in read(tmp_path / "a.csv")] == ["3", "5"]


def test_one_object_a_line_is_read_under_the_name_of_the_other_kind(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("\n".join(map(json.dumps, alpaca(3))))
    assert [record.where for record in read(tmp_path / "a.json")] == [f"{tmp_path}/a.json:{n}" for n in (1, 2, 3)]


def test_a_cell_of_a_table_may_be_as_long_as_a_book(tmp_path: Path) -> None:
    before = csv.field_size_limit()
    assert read(written(tmp_path / "a.csv", [{"text": "x" * 300_000}]))[0].text == "x" * 300_000
    assert csv.field_size_limit() == before


def test_columns_of_other_names_are_named(tmp_path: Path) -> None:
    path = written(tmp_path / "a.csv", [{"question": "q", "answer": "a", "input": "is of no interest"}])
    columns = {"instruction": "question", "output": "answer", "input": "nothing"}
    assert read(path, columns=columns)[0].messages[0]["content"] == "q"


def test_an_absent_input_may_be_empty_or_null(tmp_path: Path) -> None:
    rows = [{**ALPACA, "input": nothing} for nothing in ("", None)] + alpaca(1)
    assert all("input" not in record.messages[0] for record in read(written(tmp_path / "a.json", rows)))


def test_speakers_of_sharegpt_become_roles_and_its_system_text_comes_first(tmp_path: Path) -> None:
    turns = [{"from": who, "value": who} for who in ("human", "function_call", "observation", "gpt")]
    rows = [{"conversations": turns, "system": "s"}, {"conversations": [USER, ANSWER], "system": ""}]
    first, second = read(written(tmp_path / "a.json", rows))
    assert [m["role"] for m in first.messages] == ["system", "user", "assistant", "tool", "assistant"]
    assert second.messages == (USER, ANSWER)


def test_tools_and_calls_go_along_with_their_arguments_as_data(tmp_path: Path) -> None:
    tools = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]
    call = {"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    messages = [
        USER,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "1", "content": "3"},
        {**ANSWER, "name": None},
    ]
    for given in (tools, json.dumps(tools)):
        record = read(written(tmp_path / "a.json", [{"messages": messages, "tools": given}]))[0]
        assert record.tools == tuple(tools)
        assert record.messages[1]["tool_calls"][0]["function"] == {"name": "add", "arguments": {"a": 1}}
        assert record.messages[1]["content"] == ""
        assert record.messages[2:] == (messages[2], ANSWER)


def test_content_in_parts_of_text_is_joined(tmp_path: Path) -> None:
    parts = [{"type": "text", "text": "H"}, {"type": "text", "text": "i"}]
    rows = [{"messages": [{"role": "user", "content": parts}, ANSWER]}]
    assert read(written(tmp_path / "a.json", rows))[0].messages == (USER, ANSWER)
    parts.append({"type": "image_url", "image_url": "x"})
    assert "a part that is no text" in refusal(tmp_path / "a.json", rows)


def test_pairs_of_a_conversation(tmp_path: Path) -> None:
    record = read(written(tmp_path / "a.json", [ROWS["messages"]]))
    first = Record((USER, ANSWER), None, "instruction", f"{tmp_path}/a.json: record 1")
    assert pairs(record, every=False) == [first]
    assert pairs(record, every=True) == [first, first]


# What is refused ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("content", ["", "  \n \n", "\ufeff"])
@pytest.mark.parametrize("suffix", ["json", "jsonl", "csv"])
def test_a_file_without_records_says_so(tmp_path: Path, content: str, suffix: str) -> None:
    assert "FILE: 0 records" in refusal(tmp_path / f"a.{suffix}", content)


def test_an_empty_list_and_what_is_no_list(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    assert "FILE: 0 records" in refusal(path, [])
    assert "expected a list of records, found one object with 'data'; write the list at 'data'" in refusal(
        path, {"data": [ALPACA]}
    )
    assert "found one object with 'instruction', 'input', 'output'; put it in [ ]" in refusal(path, ALPACA)
    assert "found a number" in refusal(path, "3")
    assert "FILE:2: not JSON (" in refusal(path, '[{"instruction": "a",\n "output": }]')
    assert "not JSON (it is nested too deep)" in refusal(path, "[" * 200_000)
    assert "not JSON (it holds a number of thousands of digits)" in refusal(path, f"[{'9' * 10_000}]")


def test_a_cut_line_is_named_and_bad_rows_are_counted(tmp_path: Path) -> None:
    lines = [json.dumps(row) for row in alpaca(20)]
    lines[10] = lines[10][:-9]
    message = refusal(tmp_path / "a.jsonl", "\n".join(lines))
    assert message.startswith("FILE:11: not a JSON row (")
    lines[3] = '"a text"'
    lines[15] = "[" * 200_000
    message = refusal(tmp_path / "a.jsonl", "\n".join(lines))
    assert message.startswith("FILE:4: a record must be an object, not text")
    assert "3 of 20 are bad (4, 11, 16)" in message


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("absent", "has no 'output' (it has 'instruction')"),
        (None, "the value of 'output' must be text, not null"),
        (7, "must be text, not a number"),
        (["a"], "must be text, not a list"),
        ({}, "must be text, not an object"),
        (True, "must be text, not a boolean"),
        (math.nan, "must be text, not NaN"),
        (" ", "'output' is empty"),
    ],
)
def test_a_record_without_a_usable_output_is_named_with_its_key(tmp_path: Path, value: Any, words: str) -> None:
    rows = alpaca(30)
    for bad in (6, 8, 28):
        rows[bad]["output"] = value
        if value == "absent":
            del rows[bad]["output"]
    message = refusal(tmp_path / "a.json", rows)
    assert message.startswith("FILE: record 7: ")
    assert words in message
    assert message.endswith("3 of 30 are bad (7, 9, 29); mend or remove them")


def test_mixed_formats_are_refused_with_both_rows(tmp_path: Path) -> None:
    rows = [*alpaca(2), ROWS["messages"], ROWS["text"]]
    message = refusal(tmp_path / "a.jsonl", rows)
    assert message.startswith("FILE:3: is of the format 'messages', but FILE:1 is 'instruction'")
    assert "2 of 4 are bad (3, 4)" in message


def test_unknown_keys_are_listed_with_what_is_expected(tmp_path: Path) -> None:
    message = refusal(tmp_path / "a.json", [{"Instructions": "a", "answer": "b"}])
    assert "record 1: no known format: it has 'Instructions', 'answer'; did you mean 'instruction'?" in message
    assert "instruction+output, prompt+completion" in message
    message = refusal(tmp_path / "a.json", [{"instructoin": "a", "output": "b"}])
    assert "has no 'instruction' (it has 'instructoin', 'output'); is it 'instructoin'?" in message
    with pytest.raises(InputError, match=r"data.format is 'mesages'; did you mean 'messages'\?"):
        read(tmp_path / "a.json", "mesages")


def test_a_key_that_stands_twice_is_refused(tmp_path: Path) -> None:
    message = refusal(tmp_path / "a.jsonl", '{"instruction": "a", "output": "b", "output": "c"}')
    assert "FILE:1: has the key 'output' twice" in message
    twice = '{"messages": [{"role": "user", "role": "user", "content": "a"}]}'
    assert "FILE:1: message 1: has the key 'role' twice" in refusal(tmp_path / "a.jsonl", twice)
    assert "names the column 'text' twice" in refusal(tmp_path / "a.csv", "text,text\na,b")
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.table([["a"], ["b"]], names=["text", "text"]), tmp_path / "a.parquet")
    with pytest.raises(InputError, match=r"a\.parquet: has the column 'text' twice"):
        read(tmp_path / "a.parquet")


def test_what_a_terminal_would_obey_is_spelt_in_errors(tmp_path: Path) -> None:
    path = tmp_path / "a\x1b[31m.json"
    written(path, [{"instruction": "a", "out\x1b[2Jput\u202e": "b"}])
    with pytest.raises(InputError) as caught:
        read(path)
    assert str(caught.value).isprintable()
    assert r"a\x1b[31m.json: record 1" in str(caught.value)
    assert r"is it 'out\x1b[2Jput\u202e'?" in str(caught.value)


def test_bytes_of_another_encoding_are_located(tmp_path: Path) -> None:
    rows = '[{"instruction": "a", "output": "caf\xe9"}]'.encode("latin-1")
    for name in ("a.json", "a.jsonl", "a.csv"):
        message = refusal(tmp_path / name, rows)
        assert f"byte {rows.index(0xE9)} is 0xe9" in message
        assert "iconv -f LATIN1 -t UTF-8" in message


def test_half_a_character_is_refused_wherever_it_stands(tmp_path: Path) -> None:
    for row in (
        '{"instruction": "a", "output": "\\ud83d"}',
        '{"messages": [{"role": "user", "content": "a", "name": "\\ud83d"}, {"role": "assistant", "content": "b"}]}',
    ):
        assert "half a character" in refusal(tmp_path / "a.jsonl", row)


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ([USER, USER, ANSWER], "message 2: user follows user, where assistant must stand"),
        ([USER, ANSWER, ANSWER], "message 3: assistant follows assistant"),
        ([ANSWER], "message 1: assistant comes first, where user must stand"),
        ([USER, ANSWER, {"role": "system", "content": "s"}], "message 3: system follows assistant"),
        ([USER], "has no answer of an assistant"),
        ([{"role": "system", "content": "s"}], "has no answer of an assistant"),
        ([], "must be a list of messages, not an empty list"),
        ("Hi", "must be a list of messages, not text"),
        (None, "must be a list of messages, not null"),
        (["Hi"], "message 1: must be an object with 'role' and 'content', not text"),
        ([{"role": "asistant", "content": "a"}], "'role' is 'asistant'; did you mean 'assistant'?"),
        ([{"content": "a"}], "message 1: has no 'role' (it has 'content')"),
        ([{"role": ["user"], "content": "a"}], "'role' is ['user']"),
        ([USER, {"role": "assistant", "content": ""}], "message 2: 'content' is empty"),
        ([USER, {"role": "assistant"}], "message 2: has no 'content'"),
        ([USER, {"role": "assistant", "content": None}], "message 2: the value of 'content' must be text, not null"),
        ([USER, {**ANSWER, "weight": 0}], "message 2: 'weight' is 0"),
        ([USER, {**ANSWER, "tool_calls": "x"}], "'tool_calls' must be a list of objects"),
    ],
)
def test_conversations_that_are_none(tmp_path: Path, messages: Any, words: str) -> None:
    rows = [ROWS["messages"], {"messages": messages}]
    message = refusal(tmp_path / "a.json", rows)
    assert message.startswith("FILE: record 2: ")
    assert words in message


def test_files_that_are_none(tmp_path: Path) -> None:
    for name in ("a.txt", "a", "a.parquet.gz"):
        (tmp_path / name).write_text("x")
        with pytest.raises(InputError, match=r"not a kind of file that holds records; expected .*\.jsonl"):
            read(tmp_path / name)
    with pytest.raises(MissingError, match="no such file"):
        read(tmp_path / "b.json")
    with pytest.raises(MissingError, match="this is a folder"):
        read(tmp_path)


def test_a_table_that_is_none(tmp_path: Path) -> None:
    assert "FILE:3: has 1 cells, the first row names 2" in refusal(tmp_path / "a.csv", "instruction,output\na,b\nc\n")
    assert "FILE:2: not CSV (" in refusal(tmp_path / "a.csv", 'instruction,output\na,"b')
    assert "0 records" in refusal(tmp_path / "a.csv", "instruction,output\n")
    pytest.importorskip("pyarrow")
    whole = written(tmp_path / "a.parquet", alpaca(50)).read_bytes()
    for broken in (b"", b"x" * 100, whole[:-30], whole[: len(whole) // 2]):
        assert "FILE: not a whole Parquet file" in refusal(tmp_path / "b.parquet", broken)


def test_fifty_thousand_rows_of_which_three_are_bad(tmp_path: Path) -> None:
    rows = alpaca(50_000)
    rows[40_000]["output"], rows[41_000]["output"], rows[42_000]["output"] = None, 3, ""  # type: ignore[assignment]
    assert "3 of 50,000 are bad (40001, 41001, 42001)" in refusal(tmp_path / "a.jsonl", rows)


def test_the_rows_of_others_are_left_out_with_a_line_unless_none_is_good() -> None:
    rows = [ALPACA, {**ALPACA, "output": ""}, ALPACA, {}]
    records, line = usable(try_rows(numbered(rows, "set"), "set"), "set")
    assert len(records) == 2
    assert line == "left out 2 of 4 records: set: record 2: 'output' is empty"
    with pytest.raises(InputError, match="set: record 1: 'output' is empty; mend or remove it"):
        usable(try_rows(numbered(rows[1:2], "set"), "set"), "set")


# The split ------------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Length of split")
@pytest.mark.parametrize("count", [1, 2, 3, 10, 19, 20, 101, 51_759])
@pytest.mark.parametrize("fraction", [0.0, 0.03865, 0.05, 0.1, 0.5, 0.99])
def test_the_split_is_that_of_torch(count: int, fraction: float) -> None:
    records: Any = range(count)
    judge = torch.utils.data.random_split(
        records, [1 - fraction, fraction], generator=torch.Generator().manual_seed(42)
    )
    assert split(records, fraction, 42) == tuple(list(part) for part in judge)
