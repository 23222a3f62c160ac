"""Ids and text: equal to transformers, whatever the text; streams that never show half a character."""

import json
import pickle
import random

import pytest
from transformers import AutoTokenizer

from litgpt.errors import InputError, MissingError
from litgpt.tokenizer import Tokenizer
from tests.makers.tokenizers import (
    EOS,
    train_tiny_llama,
    train_tiny_metaspace,
    train_tiny_sentencepiece,
    train_tiny_tokenizer,
)

NASTY = [
    "",
    " ",
    "   ",
    "\n",
    "\t\t x \r\n\r\n y  \n",
    "  two spaces before, two after  ",
    "The mill and the river.",
    "é😀漢字",
    "👩‍👩‍👧‍👦 🏳️‍🌈 e\u0301 \u202eabc\u202c",
    "你好 世界。日本語のテキスト 한국어",
    "مرحبا بالعالم",
    "def f(x):\n\treturn {'a': [1, 2.5e-3]}  # ok\n",
    "\x00\x01\x07\x1b[31m\x7f",
    "a" * 3000,
    "漢" * 500,
    "0123456789 3.14159 1,000,000",
    "▁ underline ▁▁ blocks",
    "half <|endof text|> markers < s>",
    "\ufeffbom and \u00a0 no-break",
    "\ufffd already replaced",
]
MADE = {
    "byte-level": train_tiny_tokenizer,
    "unigram": lambda path: train_tiny_metaspace(path, "unigram"),
    "byte-fallback": lambda path: train_tiny_metaspace(path, "bpe"),
    "wordpiece": lambda path: train_tiny_metaspace(path, "wordpiece"),
    "sentencepiece": train_tiny_sentencepiece,
    "llama": train_tiny_llama,
}


@pytest.fixture(params=MADE)
def directory(request, tmp_path):
    return MADE[request.param](tmp_path / "tokenizer")


def merge_json(path, **entries):
    known = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(known | entries))


@pytest.mark.parametrize("text", NASTY, ids=range(len(NASTY)))
def test_ids_and_text_equal_transformers(directory, text):
    ours, judge = Tokenizer(directory), AutoTokenizer.from_pretrained(directory)
    assert ours.encode(text) == judge.encode(text, split_special_tokens=True)
    assert ours.encode(text, bos=False) == judge.encode(text, add_special_tokens=False, split_special_tokens=True)
    ids = judge.encode(text, add_special_tokens=False)
    assert ours.decode(ids) == judge.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def test_a_batch_is_its_texts_one_by_one(directory):
    tokenizer = Tokenizer(directory)
    assert tokenizer.encode_batch(NASTY, eos=True) == [tokenizer.encode(text, eos=True) for text in NASTY]


def test_special_tokens_in_text_are_text_unless_asked_for(directory):
    tokenizer, judge = Tokenizer(directory), AutoTokenizer.from_pretrained(directory)
    eos = judge.eos_token
    text = f"the {eos}mill {eos}"
    assert tokenizer.eos_id not in tokenizer.encode(text)
    asked = tokenizer.encode(text, special=True)
    assert asked == judge.encode(text)
    assert asked.count(tokenizer.eos_id) == 2
    assert tokenizer.eos_id not in tokenizer.encode(text)


def test_random_ids_stream_to_the_text_of_all_ids(directory):
    tokenizer, dice = Tokenizer(directory), random.Random(0)
    for length in [1, 2, 3, 5, 8, 40] * 40:
        ids = [dice.randrange(tokenizer.vocab_size + 3) for _ in range(length)]
        stream = tokenizer.stream()
        pieces = [stream.push(i) for i in ids] + [stream.flush()]
        assert "".join(pieces) == tokenizer.decode(ids), ids


def test_text_streams_whole_characters(directory):
    tokenizer = Tokenizer(directory)
    ids = tokenizer.encode("é😀 the 漢字 mill", bos=False)
    stream = tokenizer.stream()
    pieces = [stream.push(i) for i in ids] + [stream.flush()]
    assert "".join(pieces) == tokenizer.decode(ids)
    if "�" not in tokenizer.decode(ids):
        assert not any("�" in piece for piece in pieces)


def test_random_ids_decode_as_in_transformers(directory):
    ours, judge, dice = Tokenizer(directory), AutoTokenizer.from_pretrained(directory), random.Random(1)
    for _ in range(200):
        ids = [dice.randrange(ours.vocab_size) for _ in range(dice.randrange(30))]
        assert ours.decode(ids) == judge.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def test_a_stream_after_other_ids_goes_on_where_their_text_ended(directory):
    tokenizer = Tokenizer(directory)
    before, after = tokenizer.encode("the river", bos=False), tokenizer.encode_parts([("a", True), (" mill", True)]).ids
    new = after[len(tokenizer.encode("a", bos=False)) :]
    stream = tokenizer.stream(after=before)
    assert tokenizer.decode(before) + "".join(map(stream.push, new)) + stream.flush() == tokenizer.decode(before + new)


def test_a_stream_takes_time_in_proportion_to_its_length(tmp_path):
    tokenizer = Tokenizer(train_tiny_metaspace(tmp_path, "bpe"))
    decoded = 0
    library = tokenizer._backend

    class Counting:
        def decode(self, ids, skip_special_tokens):
            nonlocal decoded
            decoded += len(ids)
            return inner.decode(ids, skip_special_tokens=skip_special_tokens)

        def __getattr__(self, name):
            return getattr(inner, name)

    inner, library._library = library._library, Counting()
    stream = tokenizer.stream()
    for i in range(2000):
        stream.push(300 + i % 50)
    assert decoded < 2000 * 8


@pytest.mark.parametrize("settings", [{}, {"add_bos_token": True}, {"add_eos_token": True}, {"add_bos_token": False}])
@pytest.mark.parametrize("kind", ["byte-level", "unigram", "sentencepiece"])
def test_bos_and_eos_follow_the_files(tmp_path, kind, settings):
    directory = MADE[kind](tmp_path)
    config = json.loads((directory / "tokenizer_config.json").read_text())
    config.pop("add_bos_token", None)
    (directory / "tokenizer_config.json").write_text(json.dumps(config | settings))
    expected = AutoTokenizer.from_pretrained(directory).encode("the mill")
    assert Tokenizer(directory).encode("the mill", eos=None) == expected


def test_explicit_bos_and_eos_stand_once(directory):
    tokenizer = Tokenizer(directory)
    plain = tokenizer.encode("the mill", bos=False)
    assert tokenizer.encode("the mill", bos=True, eos=True) == [tokenizer.bos_id, *plain, tokenizer.eos_id]
    assert tokenizer.encode("the mill", bos=False, max_length=2) == plain[:2]


@pytest.mark.parametrize("settings", [{"legacy": True}, {"legacy": False}, {"add_prefix_space": False}])
@pytest.mark.parametrize("model_type", ["", "llama", "mistral"])
@pytest.mark.parametrize("tokenizer_class", ["LlamaTokenizerFast", "CodeLlamaTokenizer", "PreTrainedTokenizerFast", ""])
def test_spaces_follow_the_class_of_llamas_tokenizer(tmp_path, tokenizer_class, model_type, settings):
    train_tiny_llama(tmp_path, tokenizer_class=tokenizer_class or None, **settings)
    if model_type:
        merge_json(tmp_path / "config.json", model_type=model_type)
    ours, judge = Tokenizer(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    for text in ("the mill", " the", "the</s>mill", "<s> the", "</s>\n<s>"):
        assert ours.encode(text, special=True) == judge.encode(text)


def test_another_process_gets_the_same_tokenizer(directory):
    tokenizer = Tokenizer(directory)
    assert pickle.loads(pickle.dumps(tokenizer)).encode("the mill") == tokenizer.encode("the mill")


def test_renaming_the_folder_changes_nothing(tmp_path):
    llama, other = train_tiny_sentencepiece(tmp_path / "Llama-2"), train_tiny_sentencepiece(tmp_path / "x")
    assert Tokenizer(llama).encode("the mill") == Tokenizer(other).encode("the mill")
    assert Tokenizer(llama).fingerprint() == Tokenizer(other).fingerprint()


def test_every_end_that_the_model_names_is_an_end(tmp_path):
    train_tiny_tokenizer(tmp_path)
    merge_json(tmp_path / "config.json", eos_token_id=7, bos_token_id=5)
    assert Tokenizer(tmp_path).eos_ids == (0, 7)
    merge_json(tmp_path / "generation_config.json", eos_token_id=[3, 0, 9])
    assert Tokenizer(tmp_path).eos_ids == (0, 3, 9)


def test_roles_come_from_the_model_where_the_tokenizer_names_none(tmp_path):
    train_tiny_metaspace(tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    assert (Tokenizer(tmp_path).bos_id, Tokenizer(tmp_path).eos_id) == (1, 2)
    merge_json(tmp_path / "tokenizer_config.json", eos_token=None)
    merge_json(tmp_path / "generation_config.json", eos_token_id=5)
    assert Tokenizer(tmp_path).eos_id == 5


def test_works_without_tokenizer_class_and_without_config(directory):
    text = "the mill 😀"
    expected = Tokenizer(directory).encode(text, bos=False)
    (directory / "tokenizer_config.json").write_text("{}")
    assert Tokenizer(directory).encode(text, bos=False) == expected
    (directory / "tokenizer_config.json").unlink()
    tokenizer = Tokenizer(directory)
    assert tokenizer.encode(text, bos=False) == expected
    assert tokenizer.eos_id is not None


def test_added_tokens_that_are_no_markers_stay_in_plain_text(tmp_path):
    train_tiny_tokenizer(tmp_path, chat_template="{{ '<think>' }}")
    data = json.loads((tmp_path / "tokenizer.json").read_text())
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False}
    for i, content in enumerate(["    ", "<b>", "<think>", "<|role|>"], start=300):
        data["added_tokens"].append({"id": i, "content": content, **flags})
    (tmp_path / "tokenizer.json").write_text(json.dumps(data))
    tokenizer, judge = Tokenizer(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    text = "    x<b>y<think>z<|role|>"
    plain, asked = tokenizer.encode(text), tokenizer.encode(text, special=True)
    assert {300, 301} <= set(plain)
    assert not {302, 303} & set(plain)
    assert asked == judge.encode(text)
    assert tokenizer.decode(asked) == text
    assert tokenizer.vocab_size == len(judge) == 304


def test_tokens_added_to_a_sentencepiece_model_are_read(tmp_path):
    added = {"330": {"content": "<|im_end|>", "special": True}, "331": {"content": "<b>", "special": False}}
    train_tiny_sentencepiece(tmp_path, vocab_size=330, added_tokens_decoder=added)
    tokenizer, judge = Tokenizer(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer.vocab_size == len(judge) == 332
    text = "the<|im_end|>mill <b>river"
    assert tokenizer.encode(text, special=True) == judge.encode(text)
    assert 330 not in tokenizer.encode(text)
    assert tokenizer.decode(tokenizer.encode(text, special=True)) == "themill <b>river"


def test_surrogates_and_ids_beyond_the_vocabulary_do_no_harm(directory):
    tokenizer = Tokenizer(directory)
    assert tokenizer.encode("the \ud800 mill") == tokenizer.encode("the \ufffd mill")
    ids = tokenizer.encode("the mill", bos=False)
    assert tokenizer.decode([*ids, tokenizer.vocab_size, -1]) == tokenizer.decode(ids)


def test_spans_name_the_characters_of_each_id(directory):
    tokenizer = Tokenizer(directory)
    text = f"the mill{tokenizer.special_tokens['eos_token']}é river"
    encoded = tokenizer.encode_parts([(text, True)])
    assert encoded.ids == tokenizer.encode(text, bos=False, special=True)
    at = encoded.ids.index(tokenizer.eos_id)
    assert encoded.spans[at] == (8, 12) if "</s>" in text else (8, 8 + len(EOS))
    assert encoded.spans[-1][1] == len(text)
    assert all(start <= end for start, end in encoded.spans)


def test_parts_join_as_one_text(directory):
    tokenizer = Tokenizer(directory)
    eos = tokenizer.special_tokens["eos_token"]
    encoded = tokenizer.encode_parts([(f"the {eos}", True), (eos, False), ("mill", True)])
    assert encoded.ids.count(tokenizer.eos_id) == 1
    if tokenizer.has_token("<unk>") is False or tokenizer.decode(tokenizer.encode(eos)) == eos:
        assert tokenizer.decode(encoded.ids) == f"the {eos}mill"


@pytest.mark.parametrize("size", [0, 10, 400, -5])
@pytest.mark.parametrize("make", [train_tiny_tokenizer, train_tiny_sentencepiece])
def test_truncated_files_are_named(tmp_path, make, size):
    make(tmp_path)
    path = next(p for p in (tmp_path / "tokenizer.json", tmp_path / "tokenizer.model") if p.exists())
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(InputError, match=path.name) as caught:
        Tokenizer(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["tokenizer_config.json", "generation_config.json", "special_tokens_map.json"])
@pytest.mark.parametrize("content", ["{", "[1]", "\x00"])
def test_damaged_json_is_named(tmp_path, name, content):
    train_tiny_tokenizer(tmp_path)
    (tmp_path / name).write_text(content)
    with pytest.raises(InputError, match=name):
        Tokenizer(tmp_path)


def test_a_missing_tokenizer_names_what_was_looked_for(tmp_path):
    with pytest.raises(MissingError, match=r"tokenizer\.json or tokenizer\.model"):
        Tokenizer(tmp_path)
    with pytest.raises(MissingError, match="nowhere"):
        Tokenizer(tmp_path / "nowhere")


def test_a_token_that_is_not_there_is_an_error(tmp_path):
    train_tiny_tokenizer(tmp_path)
    assert Tokenizer(tmp_path).token_to_id(EOS) == 0
    with pytest.raises(InputError, match="<nope>"):
        Tokenizer(tmp_path).token_to_id("<nope>")


def test_bos_without_a_bos_token_is_an_error(tmp_path):
    train_tiny_tokenizer(tmp_path, bos_token=None)
    with pytest.raises(InputError, match="bos_token"):
        Tokenizer(tmp_path).encode("x", bos=True)


def test_the_fingerprint_follows_the_files(tmp_path):
    train_tiny_tokenizer(tmp_path)
    before = Tokenizer(tmp_path).fingerprint()
    assert Tokenizer(tmp_path).fingerprint() == before
    merge_json(tmp_path / "tokenizer_config.json", add_bos_token=True)
    assert Tokenizer(tmp_path).fingerprint() != before
    assert [path.name for path in Tokenizer(tmp_path).files()] == ["tokenizer.json", "tokenizer_config.json"]


def test_a_template_file_goes_before_the_entry(tmp_path):
    train_tiny_tokenizer(
        tmp_path, chat_template=[{"name": "default", "template": "a"}, {"name": "rag", "template": "b"}]
    )
    assert Tokenizer(tmp_path).chat_templates == {"default": "a", "rag": "b"}
    (tmp_path / "chat_template.jinja").write_text("c")
    assert Tokenizer(tmp_path).chat_template == "c"


@pytest.mark.parametrize("name", ["tokenizer_config.json", "config.json", "generation_config.json", "tokenizer.json"])
def test_a_link_out_of_the_directory_is_not_opened(tmp_path, name):
    train_tiny_tokenizer(tmp_path / "a")
    (tmp_path / "a" / name).unlink(missing_ok=True)
    (tmp_path / "secret.json").write_text("{}")
    (tmp_path / "a" / name).symlink_to(tmp_path / "secret.json")
    with pytest.raises(InputError, match=f"'{name}' leads out"):
        Tokenizer(tmp_path / "a")


def test_a_tokenizer_that_may_not_be_read_is_not_called_damaged(tmp_path, monkeypatch):
    def refuse(path, *rest):
        raise PermissionError(13, "Permission denied", str(path))

    train_tiny_tokenizer(tmp_path)
    monkeypatch.setattr("litgpt.tokenizer.open", refuse, raising=False)
    with pytest.raises(PermissionError, match=r"tokenizer\.json"):
        Tokenizer(tmp_path)
