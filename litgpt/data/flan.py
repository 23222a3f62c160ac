"""FLAN: 66 collections of tasks with questions and answers, of which some or all are trained on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from litgpt.data import fetch
from litgpt.data.downloaded import Downloaded
from litgpt.data.records import Record
from litgpt.errors import InputError, near_miss, shown

_NAMES = """
    aeslc ag_news_subset anli_r1 anli_r2 anli_r3 arc_challenge arc_easy bool_q cb cnn_dailymail cola common_gen copa
    coqa cosmos_qa dart definite_pronoun_resolution drop e2e_nlg fix_punct gigaword glue_mrpc glue_qqp hellaswag
    imdb_reviews math_dataset mnli_matched mnli_mismatched multi_news multirc natural_questions openbookqa
    opinion_abstracts_idebate opinion_abstracts_rotten_tomatoes para_crawl_enes paws_wiki piqa qnli quac record rte
    samsum sentiment140 snli squad_v1 squad_v2 sst2 story_cloze stsb trec trivia_qa true_case web_nlg_en wic
    wiki_lingua_english_en wmt14_enfr wmt16_translate_csen wmt16_translate_deen wmt16_translate_fien
    wmt16_translate_roen wmt16_translate_ruen wmt16_translate_tren wnli word_segment wsc yelp_polarity_reviews
    """
SUBSETS = tuple(f"{name}_10templates" for name in _NAMES.split())
COLUMNS = {"instruction": "inputs", "output": "targets"}


@dataclass
class FLAN(Downloaded):
    """FLAN, of the Hub: 1,386,050 questions with answers, 367,190 more validate."""

    STYLE: ClassVar[str] = "flan"

    download_dir: Path = Path("data/flan")
    """Where the files are kept."""
    url: str = "https://huggingface.co/datasets/Muennighoff/flan/resolve/main"
    """Where the files come from."""
    subsets: str | None = None
    """Names of collections, with commas between them, such as aeslc_10templates; null: all 66."""

    def chosen(self) -> tuple[str, ...]:
        """The collections that are trained on."""
        if self.subsets is None:
            return SUBSETS
        names = tuple(dict.fromkeys(name.strip() for name in self.subsets.split(",") if name.strip()))
        for name in names:
            if name not in SUBSETS:
                raise InputError(f"data.subsets: FLAN has no {shown(name)}{near_miss(name, SUBSETS)}")
        if not names:
            raise InputError(f"data.subsets names nothing; give names such as {SUBSETS[0]}, or leave it out for all")
        return names

    def fetch(self) -> None:
        for split in ("train", "test"):
            for path in self._files(split):
                fetch.file(f"{self.url}/{split}/{path.name}", path)

    def records(self) -> tuple[Sequence[Record], Sequence[Record]]:
        train, val = (self.read(self._files(split), "instruction", COLUMNS) for split in ("train", "test"))
        return train, val

    def _files(self, split: str) -> list[Path]:
        return [Path(self.download_dir) / f"{subset}_{split}.jsonl" for subset in self.chosen()]
