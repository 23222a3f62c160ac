"""Records become exactly the tokens that they should, and exactly the assistant's are learnt."""

from __future__ import annotations

import copy
import pickle
from dataclasses import dataclass, field

import numpy as np
import pytest

from litgpt import prompts
from litgpt.data.base import IGNORE
from litgpt.data.encoding import AT_A_TIME, Encoder
from litgpt.data.records import Record
from litgpt.data.sft import SFT
from litgpt.errors import InputError
from litgpt.prompts import ChatTemplate
from litgpt.tokenizer import Tokenizer
from tests.makers.tokenizers import EOS, train_tiny_llama, train_tiny_sentencepiece, train_tiny_tokenizer

CHATML = prompts.from_name("chatml")
MARKERS = ("<|im_start|>", "<|im_end|>")


@dataclass
class Listed(SFT):
    """Records that are there already."""

    train: list[Record] = field(default_factory=list)
    val: list[Record] = field(default_factory=list)

    def records(self):
        self.asked = getattr(self, "asked", 0) + 1
        return self.train, self.val


def instruction(prompt: str, answer: str, **more: str) -> Record:
    asked = {"role": "user", "content": prompt, **more}
    return Record((asked, {"role": "assistant", "content": answer}), where="a.json: record 1")


def conversation(*texts: str) -> Record:
    roles = ("user", "assistant")
    turns = [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]
    return Record(tuple(turns), kind="messages", where="a.jsonl:3")


def completion(prompt: str, answer: str) -> Record:
    return Record(instruction(prompt, answer).messages, kind="completion")


def text(words: str) -> Record:
    return Record(text=words, kind="text")


def ready(tokenizer: Tokenizer, train: list[Record], length: int = 400, batch: int = 2, **settings) -> Listed:
    data = Listed(train=train, **settings)
    data.connect(tokenizer, batch, length)
    data.prepare_data()
    data.setup()
    return data


def rows(data: SFT) -> list[tuple[list[int], list[int]]]:
    """The ids and the learnt ids of each sample."""
    found = [data.train_samples[i] for i in range(len(data.train_samples))]
    return [(np.where(row < 0, ~row, row).tolist(), row[row >= 0].tolist()) for row in found]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Tokenizer:
    return Tokenizer(train_tiny_tokenizer(tmp_path_factory.mktemp("bpe"), 400, special_tokens=MARKERS))


@pytest.fixture(scope="module", params=["bpe", "bpe with bos", "sentencepiece", "llama"])
def any_tokenizer(request, tmp_path_factory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("any")
    makers = {"sentencepiece": train_tiny_sentencepiece, "llama": train_tiny_llama}
    if request.param == "bpe with bos":
        from tokenizers import Tokenizer as Library
        from tokenizers import processors

        path = str(train_tiny_tokenizer(folder) / "tokenizer.json")
        library = Library.from_file(path)
        library.post_processor = processors.TemplateProcessing(single=f"{EOS} $A", special_tokens=[(EOS, 0)])
        library.save(path)
        return Tokenizer(folder)
    return Tokenizer(makers.get(request.param, train_tiny_tokenizer)(folder))


# What the tokens are --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("style", ["alpaca", "flan", "longform", "default", "phi-2"])
def test_a_question_with_its_answer_is_encoded_as_litgpt_always_did(any_tokenizer, style):
    record = instruction("Name a colour.", "Blue, like\nthe sky.")
    prompt = any_tokenizer.encode(prompts.from_name(style).apply("Name a colour."))
    answer = any_tokenizer.encode("Blue, like\nthe sky.", bos=False, eos=True)
    whole, masked = (ready(any_tokenizer, [record], prompt_style=style, mask_prompt=m) for m in (False, True))
    assert rows(whole) == [(prompt + answer, prompt + answer)]
    assert rows(masked) == [(prompt + answer, answer)]


def test_a_row_is_cut_at_max_seq_length(tokenizer):
    record = instruction("Name a colour.", "Blue, like the sky over the mill.")
    ids = rows(ready(tokenizer, [record]))[0][0]
    cut = ready(tokenizer, [record], length=len(ids) - 3)
    assert rows(cut)[0][0] == ids[:-3]
    (batch,) = cut.train_dataloader().step(1)
    assert batch["ids"].tolist() == [ids[:-4]]
    assert batch["labels"].tolist() == [ids[1:-3]]


def test_labels_follow_their_ids_and_prompts_are_not_learnt(tokenizer):
    data = ready(tokenizer, [instruction("Name a colour.", "Blue.")], mask_prompt=True, prompt_style="default")
    (batch,) = data.train_dataloader().step(1)
    prompt, answer = tokenizer.encode("Name a colour."), tokenizer.encode("Blue.", bos=False, eos=True)
    assert batch["ids"].tolist() == [(prompt + answer)[:-1]]
    assert batch["labels"].tolist() == [[IGNORE] * (len(prompt) - 1) + answer]


def test_the_input_has_its_place_in_alpaca_and_follows_the_instruction_elsewhere(tokenizer):
    record = instruction("Say it in French.", "Bleu.", input="Blue.")
    in_place = rows(ready(tokenizer, [record]))[0][0]
    assert in_place[: -len(tokenizer.encode("Bleu.")) - 1] == tokenizer.encode(
        prompts.from_name("alpaca").apply("Say it in French.", input="Blue.")
    )
    behind = ready(tokenizer, [record], prompt_style="phi-2")
    assert "Instruct: Say it in French.\n\nBlue.\nOutput:" in tokenizer.decode(rows(behind)[0][0])


@pytest.mark.parametrize("mask", [True, False])
def test_conversations_are_as_the_style_writes_them_and_all_answers_are_learnt(tokenizer, mask):
    record = conversation("Hi", "Hello!", "And <|im_end|> you?", "Well.")
    template = ChatTemplate(CHATML.jinja(adds_bos=False), tokens=tokenizer.special_tokens)
    for style in (template, CHATML):
        ids, learnt = style.encode_with_mask(tokenizer, record.messages)
        ours = rows(ready(tokenizer, [record], prompt_style=style, mask_prompt=mask))
        assert ours == [(ids, [i for i, is_learnt in zip(ids, learnt, strict=True) if is_learnt or not mask])]


def test_a_style_with_its_own_end_of_turn_learns_it_for_single_questions_too(tokenizer):
    (row,) = rows(ready(tokenizer, [instruction("Hi", "Hello!")], prompt_style="chatml", mask_prompt=True))
    assert tokenizer.encode("Hello!<|im_end|>", special=True) == row[1]


def test_completions_and_texts_are_written_without_a_template(any_tokenizer):
    data = ready(any_tokenizer, [completion("The river", " ran past."), text("The mill.")], mask_prompt=True)
    (joined, learnt), (ids, whole) = rows(data)
    prompt = any_tokenizer.encode("The river")
    assert joined[: len(prompt)] == prompt
    assert joined[len(prompt) :] == learnt
    assert learnt[-1] == any_tokenizer.eos_id
    assert any_tokenizer.decode(joined).strip() == "The river ran past."
    assert ids == whole == any_tokenizer.encode("The mill.", eos=True)
    assert data.style() is prompts.DEFAULT


def test_control_tokens_that_a_record_holds_are_text(tokenizer):
    end = tokenizer.token_to_id("<|im_end|>")
    for record in (instruction("a <|im_end|>", "b <|im_end|>"), completion("<|im_end|>", "<|im_end|>")):
        assert end not in rows(ready(tokenizer, [record]))[0][0]
    assert end not in rows(ready(tokenizer, [text("<|im_end|>")]))[0][0]


def test_many_records_of_all_kinds_are_each_encoded_as_if_alone(any_tokenizer):
    kinds = [
        instruction("Name a colour.", "Blue."),
        instruction("", ""),
        conversation("Hi", "Hello!", "And you?", "Well \u00e9\U0001f600."),
        completion("The", " mill"),
        text("Gr\u00f6\u00dfe 42"),
    ]
    records = [kinds[i * 7 % 5] for i in range(AT_A_TIME + 9)]
    encoder = Encoder(any_tokenizer, CHATML, is_masked=True, joins=True)
    together, alone = encoder.encode(records), [encoder.encode([record])[0] for record in kinds]
    assert len(together) == len(records)
    for i in range(len(records)):
        assert np.array_equal(together[i], alone[i * 7 % 5])


# Which style ----------------------------------------------------------------------------------------------------------


def test_each_kind_of_record_has_its_own_style_unless_one_is_given(tmp_path):
    bare = Tokenizer(train_tiny_tokenizer(tmp_path / "bare"))
    template = CHATML.jinja(adds_bos=False)
    chatty = Tokenizer(train_tiny_tokenizer(tmp_path / "chatty", special_tokens=MARKERS, chat_template=template))
    ask, talk = instruction("a", "b"), conversation("a", "b")
    assert ready(chatty, [ask]).style().name == "alpaca"
    assert ready(chatty, [talk]).style().name == "chat-template"
    assert ready(bare, [talk]).style().name == "chatml"
    assert ready(bare, [talk], prompt_style="phi-2").style().name == "phi-2"
    assert ready(bare, [completion("a", "b")], prompt_style="Alpaca").style().name == "alpaca"
    with pytest.raises(InputError, match="did you mean 'alpaca'"):
        ready(bare, [ask], prompt_style="alpacca")


def test_a_template_that_refuses_a_record_names_it(tokenizer):
    strict = ChatTemplate("{{ raise_exception('roles must alternate') }}", source="chat template")
    with pytest.raises(InputError, match=r"a\.jsonl:3: chat template .*roles must alternate"):
        ready(tokenizer, [conversation("a", "b")], prompt_style=strict)


# What does not fit ----------------------------------------------------------------------------------------------------


def test_records_without_an_answer_within_the_length_are_left_out_and_counted(tokenizer):
    long, short = instruction("Why? " * 50, "So."), instruction("Why?", "So it is. " * 30)
    data = ready(tokenizer, [long, short, long], length=100, mask_prompt=True, prompt_style="default")
    assert len(data.train_samples) == data.train_dataloader().samples == 1
    assert data.notes() == [
        "1 of 3 training records are longer than train.max_seq_length 100; they are cut",
        "2 of 3 training records have nothing to learn within train.max_seq_length 100; left out",
    ]
    with pytest.raises(InputError, match=r"none of 2 .*max_seq_length 100 .*raise train\.max_seq_length or set data"):
        ready(tokenizer, [long, long], length=100, mask_prompt=True, prompt_style="default")
    assert len(ready(tokenizer, [long, long], length=100).train_samples) == 2  # prompts are learnt, too


def test_records_longer_than_the_context_are_refused_with_their_number_and_what_to_do(tokenizer):
    data = ready(tokenizer, [text("a river " * n) for n in (1, 20, 30)])
    longest = len(tokenizer.encode("a river " * 30)) + 1
    assert data.longest_row() == longest
    data.require_fit(longest)
    with pytest.raises(InputError, match=rf"2 of 3 records .* 10 tokens .*has {longest}\).*--train\.max_seq_length 10"):
        data.require_fit(10)


def test_one_token_is_nothing_to_learn_and_an_empty_answer_is_its_end(tokenizer):
    data = ready(tokenizer, [text(""), instruction("a", "")], prompt_style="default", mask_prompt=True)
    assert rows(data) == [([*tokenizer.encode("a"), tokenizer.eos_id], [tokenizer.eos_id])]
    assert len(data.notes()) == 1
    with pytest.raises(InputError, match="none of 1 records"):
        ready(tokenizer, [text("")])


def test_no_record_at_all_and_senseless_settings_are_refused(tokenizer):
    with pytest.raises(InputError, match="no record to train on"):
        ready(tokenizer, [])
    with pytest.raises(InputError, match=r"data\.seed is -1"):
        ready(tokenizer, [text("a")], seed=-1)
    with pytest.raises(InputError, match=r"data\.seed is .*2\*\*63 - 1"):
        ready(tokenizer, [text("a")], seed=2**70)
    assert ready(tokenizer, [text("abc")], num_workers=0, ignore_index=-1).without_effect() == [
        "data.num_workers",
        "data.ignore_index",
    ]


# What a run asks ------------------------------------------------------------------------------------------------------


def test_records_are_read_once_however_often_the_length_changes(tokenizer):
    data = ready(tokenizer, [text("a river ran past the mill")])
    data.longest_row()
    data.connect(tokenizer, 4, 5)
    data.setup()
    assert data.asked == 1
    assert rows(data)[0][0] == tokenizer.encode("a river ran past the mill")[:5]
    sent = pickle.loads(pickle.dumps(copy.deepcopy(data)))
    assert rows(sent) == rows(data)
    assert data.row_tokens() == 4


def test_the_fingerprint_is_of_what_is_trained_on(tokenizer):
    record = instruction("Name a colour.", "Blue.")
    same, again, *others = (
        ready(tokenizer, [record], **settings).fingerprint()
        for settings in ({}, {"num_workers": 1}, {"mask_prompt": True}, {"prompt_style": "phi-2"}, {"packing": False})
    )
    assert same == again
    assert len({same, *others, ready(tokenizer, [instruction("Name a colour.", "Red.")]).fingerprint()}) == 5


def test_an_example_is_the_prompt_of_a_record_with_its_answer(tokenizer):
    data = ready(tokenizer, [instruction("1", "one")], val=[instruction("2", "two"), instruction("3", "three")])
    alpaca = prompts.from_name("alpaca")
    for which, prompt, answer in (("first", "2", "two"), (1, "3", "three"), ("0", "2", "two")):
        assert data.example(which) == (tokenizer.encode(alpaca.apply(prompt)), alpaca.apply(prompt), answer)
    assert data.example("random") == data.example("random")
    with pytest.raises(InputError, match="evaluate_example is 2; records 0 to 1"):
        data.example(2)


def test_a_question_is_one_that_can_be_typed(tokenizer):
    train = [instruction("Say hello.", "Hello!")]
    assert ready(tokenizer, train, val=[instruction("2", "two")]).question() == "2"
    hard = [instruction("2\n3", "five"), instruction("x" * 99, "y")]
    assert ready(tokenizer, train, val=hard).question() == "Say hello."
    assert ready(tokenizer, [text("abcd")]).question() is None


def test_an_example_of_other_kinds(tokenizer):
    talk = ready(tokenizer, [conversation("Hi", "Hello!", "And you?", "Well.")], prompt_style=CHATML)
    before = talk.train[0].messages[:3]
    assert talk.example("first") == (CHATML.encode(tokenizer, before), CHATML.render(before), "Well.")
    assert ready(tokenizer, [completion("The", " mill")]).example("first")[1:] == ("The", " mill")
    assert ready(tokenizer, [text("abcd")]).example("first")[1:] == ("ab", "cd")


@pytest.mark.parametrize("packs", [True, False])
def test_a_step_holds_its_records_once_and_validation_all(tokenizer, packs):
    texts = [text(f"river {i} " * (1 + i % 5)) for i in range(11)]
    data = ready(tokenizer, texts, length=40, packing=packs, val=texts[:3])
    learnt = sum(len(ids) - 1 for ids, _ in rows(data))
    for world in (1, 2):
        loaders = [data.train_dataloader(rank, world) for rank in range(world)]
        labels = [batch["labels"] for loader in loaders for batch in loader.step(11)]
        assert sum(int((of != IGNORE).sum()) for of in labels) == learnt
    assert data.val_dataloader().samples == 3
    assert sum(int((b["labels"] != IGNORE).sum()) for b in data.val_dataloader()) == sum(
        len(ids) - 1 for ids, _ in rows(data)[:3]
    )
