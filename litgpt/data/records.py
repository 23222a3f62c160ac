"""Finetuning data as people have it: rows become `Record`s, whatever their format. Knows no tokenizer.

The format of a file is recognised by the keys of its rows:

    instruction   instruction, input (optional), output        Alpaca
    completion    prompt, completion
    messages      messages: [{role, content}, ...]             OpenAI; tools and tool_calls go along
    sharegpt      conversations: [{from, value}, ...]
    text          text                                         every token is trained

Every row is checked before anything is trained: all that cannot be used are counted, and one line names the first.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from litgpt.data.rows import Broken, Doubled, Row, read_rows
from litgpt.data.text import json_type, listed, whole_characters
from litgpt.errors import InputError, near_miss, shown

NEEDED = {  # a row with the keys of several formats is of the first
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "instruction": ("instruction", "output"),
    "completion": ("prompt", "completion"),
    "text": ("text",),
}
KINDS = tuple(NEEDED)
COLUMNS = tuple(dict.fromkeys((*(key for keys in NEEDED.values() for key in keys), "input", "tools", "system")))
ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant", "tool": "tool"}
SPEAKERS = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "chatgpt", "assistant", "model", "bing", "bard", "function_call"), "assistant"),
    **dict.fromkeys(("tool", "observation", "function_response"), "tool"),
    "system": "system",
}
FOLLOWS = {"": ("user",), "system": ("user",), "user": ("assistant",), "tool": ("assistant", "tool")}
MOST_NAMED = 5  # bad rows that an error names


@dataclass(frozen=True, slots=True)
class Record:
    """One thing to learn from: a conversation (`messages`), or plain text.

    The messages are checked: a system message only first, turns that alternate, at least one answer. The user message
    of an instruction may carry "input", for prompt styles that give it a place of its own.
    """

    messages: tuple[dict[str, Any], ...] = ()  # [{"role", "content"}, ...], and what else a template may want
    text: str | None = None  # instead of messages: every token is trained
    kind: str = "instruction"  # one of KINDS
    where: str = ""  # "my.json: record 7", "my.jsonl:11", "my.csv:12"
    tools: tuple[dict[str, Any], ...] = ()  # JSON schemas of functions, for templates that know tools


@dataclass
class Reading:
    """What came of reading rows: the records, and the words on each row that is none, by where it stands."""

    records: list[Record]
    faults: list[tuple[str, str]]


def read(path: Path, kind: str | None = None, columns: Mapping[str, str] | None = None) -> list[Record]:
    """The records of one file. `kind` says the format, `columns` what the file calls our keys ({"output": "answer"}).

    Any bad row is an InputError that names the first of them and says how many there are.
    """
    return required(try_rows(read_rows(path), str(path), kind, columns), str(path))


def required(reading: Reading, name: str) -> list[Record]:
    """The records, where every row is one."""
    if not reading.faults:
        return reading.records
    (_, first), count = reading.faults[0], len(reading.faults)
    rest = ""
    if count > 1:
        names = [where.removeprefix(name).lstrip(": ").removeprefix("record ") for where, _ in reading.faults]
        more = ", ..." if count > MOST_NAMED else ""
        rest = f"; {count:,} of {count + len(reading.records):,} are bad ({', '.join(names[:MOST_NAMED])}{more})"
    raise InputError(f"{first}{rest}; mend or remove {'it' if count == 1 else 'them'}")


def usable(reading: Reading, name: str) -> tuple[list[Record], str]:
    """The records and a line on the rows that are left out, or "": for data that is not the user's to mend."""
    if not reading.faults or not reading.records:
        return required(reading, name), ""
    left_out, (_, first) = len(reading.faults), reading.faults[0]
    return reading.records, f"left out {left_out:,} of {left_out + len(reading.records):,} records: {first}"


def try_rows(
    rows: Iterable[Row], name: str, kind: str | None = None, columns: Mapping[str, str] | None = None
) -> Reading:
    """Reads rows as records of one format; InputError where there is none, or no row is of a known format."""
    there = [(where, _renamed(row, columns)) for where, row in rows] if columns else list(rows)
    if not there:
        raise InputError(f"{name}: 0 records; expected at least one")
    if kind is not None and kind not in NEEDED:
        raise InputError(f"data.format is {shown(kind)}{near_miss(kind, KINDS)}; give one of {', '.join(KINDS)}")
    origin = "data.format"
    if kind is None:
        origin, kind = _recognised(there, name)
    reading, build = Reading([], []), _BUILD[kind]
    for where, row in there:
        try:
            _require_kind(row, where, kind, origin)
            reading.records.append(build(row, where))
        except InputError as error:
            reading.faults.append((where, str(error)))
    return reading


def split(records: Sequence[Record], fraction: float, seed: int) -> tuple[list[Record], list[Record]]:
    """(train, val) at random: the members that torch's random_split chooses for this fraction and seed."""
    import torch

    count = len(records)
    n_train, n_val = math.floor(count * (1 - fraction)), math.floor(count * fraction)
    left = count - n_train - n_val  # goes round the two parts
    n_train += (left + 1) // 2
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()
    return [records[i] for i in order[:n_train]], [records[i] for i in order[n_train:]]


def require_fraction(fraction: float) -> None:
    """Refuses a share of validation records that leaves none to train on, or is none."""
    if not 0 <= fraction < 1:
        raise InputError(f"data.val_split_fraction is {fraction}; give a share from 0 (no validation) to below 1")


def require_columns(columns: Mapping[str, str] | None) -> None:
    """Refuses names of columns for keys that we do not have."""
    for ours in columns or ():
        if ours not in COLUMNS:
            raise InputError(f"data.columns: {shown(ours)} is no key{near_miss(ours, COLUMNS)} ({', '.join(COLUMNS)})")


def pairs(records: Iterable[Record], every: bool) -> list[Record]:
    """Conversations as instructions: the first question and its answer, or `every` pair of them by itself."""
    found = []
    for record in records:
        turns = [m for m in record.messages if m["role"] != "system"]
        for user, answer in list(zip(turns[::2], turns[1::2], strict=False))[: None if every else 1]:
            found.append(Record((user, answer), None, "instruction", record.where))
    return found


# The format -----------------------------------------------------------------------------------------------------------


def _renamed(row: Any, columns: Mapping[str, str]) -> Any:
    """The row under our keys."""
    if not isinstance(row, dict) or isinstance(row, Doubled):
        return row
    rest = {key: value for key, value in row.items() if key not in columns.values()}
    return {**rest, **{ours: row[theirs] for ours, theirs in columns.items() if theirs in row}}


def _recognised(rows: list[Row], name: str) -> tuple[str, str]:
    """The row by which the format is known, and the format: of the first row that has one, wholly or in part."""
    for matches in (all, any):
        for where, row in rows:
            kind = _kind_of(row, matches)
            if kind:
                return where, kind
    where, row = next(((w, r) for w, r in rows if not isinstance(r, Broken)), rows[0])
    if isinstance(row, Broken):
        raise InputError(f"{where}: {row.reason}; no row of {len(rows):,} can be read")
    if not isinstance(row, dict):
        raise InputError(f"{where}: a record must be an object, not {json_type(row)}; {_formats()}")
    near = next((n for key in row for needed in NEEDED.values() if (n := near_miss(str(key), needed))), "")
    raise InputError(f"{where}: no known format: it has {listed(row)}{near}; {_formats()}")


def _formats() -> str:
    listing = ", ".join("+".join(keys) for keys in NEEDED.values())
    return f"a record has {listing}; other names of columns are given with --data.columns"


def _kind_of(row: Any, matches: Callable[[Iterable[bool]], bool] = all) -> str | None:
    if not isinstance(row, dict):
        return None
    return next((kind for kind, keys in NEEDED.items() if matches(key in row for key in keys)), None)


def _require_kind(row: Any, where: str, kind: str, origin: str) -> None:
    if isinstance(row, Broken):
        raise InputError(f"{where}: {row.reason}")
    if not isinstance(row, dict):
        raise InputError(f"{where}: a record must be an object, not {json_type(row)}")
    if isinstance(row, Doubled):
        raise InputError(f"{where}: has the key {shown(row.key)} twice")
    lacks = next((key for key in NEEDED[kind] if key not in row), None)
    if lacks is None:
        return
    if (other := _kind_of(row)) is not None:
        raise InputError(f"{where}: is of the format '{other}', but {origin} is '{kind}'; one file holds one format")
    near = near_miss(lacks, map(str, row)).replace("did you mean", "is it")
    raise InputError(f"{where}: has no {shown(lacks)} (it has {listed(row)}){near}")


# One row --------------------------------------------------------------------------------------------------------------


def _instruction(row: dict[str, Any], where: str) -> Record:
    user = {"role": "user", "content": _text(row, "instruction", where, may_be_empty=True)}
    if row.get("input") is not None and (more := _text(row, "input", where, may_be_empty=True)):
        user["input"] = more
    elif not user["content"].strip():
        raise InputError(f"{where}: 'instruction' is empty")
    answer = {"role": "assistant", "content": _text(row, "output", where)}
    return Record((user, answer), None, "instruction", where)


def _completion(row: dict[str, Any], where: str) -> Record:
    user = {"role": "user", "content": _text(row, "prompt", where, may_be_empty=True)}
    answer = {"role": "assistant", "content": _text(row, "completion", where)}
    return Record((user, answer), None, "completion", where)


def _plain_text(row: dict[str, Any], where: str) -> Record:
    return Record((), _text(row, "text", where), "text", where)


def _messages(row: dict[str, Any], where: str) -> Record:
    return _conversation(row, "messages", "role", "content", ROLES, where)


def _sharegpt(row: dict[str, Any], where: str) -> Record:
    turns = row["conversations"]
    first = turns[0] if isinstance(turns, list) and turns else None
    names = ("role", "content") if isinstance(first, dict) and "role" in first else ("from", "value")
    return _conversation(row, "conversations", *names, SPEAKERS, where)


def _conversation(row: dict[str, Any], key: str, who: str, what: str, roles: Mapping[str, str], where: str) -> Record:
    turns = row[key]
    if not isinstance(turns, list) or not turns:
        found = "an empty list" if turns == [] else _type(turns)
        raise InputError(f"{where}: the value of '{key}' must be a list of messages, not {found}")
    messages = [_message(turn, who, what, roles, f"{where}: message {n}") for n, turn in enumerate(turns, start=1)]
    if isinstance(system := row.get("system"), str) and system.strip() and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": system})
    _require_order(messages, where)
    kind = "messages" if key == "messages" else "sharegpt"
    return Record(tuple(messages), None, kind, where, _tools(row.get("tools"), where))


def _message(turn: Any, who: str, what: str, roles: Mapping[str, str], where: str) -> dict[str, Any]:
    """One message under our names, with what else it holds that is not null."""
    if not isinstance(turn, dict):
        raise InputError(f"{where}: must be an object with '{who}' and '{what}', not {_type(turn)}")
    if isinstance(turn, Doubled):
        raise InputError(f"{where}: has the key {shown(turn.key)} twice")
    speaker = turn.get(who)
    if not isinstance(speaker, str) or speaker not in roles:
        if who not in turn:
            raise InputError(f"{where}: has no '{who}' (it has {listed(turn)})")
        near = near_miss(speaker, roles) if isinstance(speaker, str) else ""
        raise InputError(f"{where}: '{who}' is {shown(speaker)}{near}; it must be one of {', '.join(roles)}")
    if turn.get("weight", 1) not in (1, None):
        raise InputError(f"{where}: 'weight' is {shown(turn['weight'])}; answers are trained alike, leave it out")
    rest = {k: v for k, v in turn.items() if k not in (who, what, "weight") and v is not None}
    is_answer = roles[speaker] == "assistant"
    message = {"role": roles[speaker], "content": _content(turn, what, is_answer, where), **rest}
    if rest:
        whole_characters(json.dumps(rest, ensure_ascii=False, default=str), where, next(iter(rest)))
    if "tool_calls" in message:
        message["tool_calls"] = _tool_calls(message["tool_calls"], where)
    return message


def _content(turn: dict[str, Any], what: str, is_answer: bool, where: str) -> str:
    content, calls = turn.get(what), bool(turn.get("tool_calls"))
    if content is None and calls:
        return ""
    if isinstance(content, list):  # parts, as for models that see images too
        others = [part for part in content if not isinstance(part, dict) or part.get("type") != "text"]
        if others or not content:
            raise InputError(f"{where}: '{what}' holds a part that is no text; only text is trained on")
        turn = {**turn, what: "".join(_text(part, "text", where, may_be_empty=True) for part in content)}
    return _text(turn, what, where, may_be_empty=calls or not is_answer)


def _require_order(messages: Sequence[dict[str, Any]], where: str) -> None:
    before = ""
    for number, message in enumerate(messages, start=1):
        role = message["role"]
        allowed = ("user", "tool") if before == "assistant" else FOLLOWS[before]
        if role not in allowed and (role, number) != ("system", 1):
            place = f"follows {before}" if before else "comes first"
            raise InputError(f"{where}: message {number}: {role} {place}, where {' or '.join(allowed)} must stand")
        before = role
    if not any(message["role"] == "assistant" for message in messages):
        raise InputError(f"{where}: has no answer of an assistant, there is nothing to learn")


def _tool_calls(calls: Any, where: str) -> list[Any]:
    """Calls with their arguments as data, which is what templates write; OpenAI has them as JSON in a string."""
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise InputError(f"{where}: 'tool_calls' must be a list of objects")
    return [_tool_call(call) for call in calls]


def _tool_call(call: dict[str, Any]) -> dict[str, Any]:
    function = call.get("function")
    arguments = function.get("arguments") if isinstance(function, dict) else None
    if not isinstance(function, dict) or not isinstance(arguments, str):
        return call
    try:
        parsed = json.loads(arguments)
    except (ValueError, RecursionError):
        return call
    return {**call, "function": {**function, "arguments": parsed}}


def _tools(tools: Any, where: str) -> tuple[dict[str, Any], ...]:
    if isinstance(tools, str) and tools.strip():
        try:
            tools = json.loads(tools)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{where}: 'tools' is not JSON ({error})") from None
    if not tools:
        return ()
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise InputError(f"{where}: 'tools' must be a list of objects")
    return tuple(tools)


def _text(row: dict[str, Any], key: str, where: str, may_be_empty: bool = False) -> str:
    value = row.get(key)
    if not isinstance(value, str):
        if key not in row:
            raise InputError(f"{where}: has no {shown(key)} (it has {listed(row)})")
        raise InputError(f"{where}: the value of {shown(key)} must be text, not {_type(value)}")
    if not may_be_empty and not value.strip():
        raise InputError(f"{where}: {shown(key)} is empty")
    return whole_characters(value, where, key)


def _type(value: Any) -> str:
    return "NaN" if isinstance(value, float) and math.isnan(value) else json_type(value)


_BUILD: dict[str, Callable[[dict[str, Any], str], Record]] = {
    "messages": _messages,
    "sharegpt": _sharegpt,
    "instruction": _instruction,
    "completion": _completion,
    "text": _plain_text,
}
