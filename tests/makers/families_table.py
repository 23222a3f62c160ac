"""The table of `tutorials/families.md`, from the lists that the tests run over; a module to run when they change."""

from __future__ import annotations

from pathlib import Path

from litgpt.families import FAMILIES

PLACE = Path(__file__).parents[2] / "tutorials" / "families.md"

HEAD = """\
# Families

Any checkpoint whose `model_type` is one of these is read as it lies on the Hub, in any size, registered or not. A
switch that LitGPT lacks is refused by name.

"Verified" is what the test suite does on shrunken models, against `transformers` as the judge. L: logits, every
gradient and greedy text, also far beyond the training length, for each distinct set of switches. B: the same bytes
after import and export, in fp32 and bf16, and `from_pretrained` opens what is written with no missing or unexpected
tensor. R: random `config.json` files of the `model_type`, in old and new spelling.

This page is made by `python -m tests.makers.families_table`, from the lists that the tests run over.

| `model_type` | registered models | verified |
|---|---|---|
"""


def page() -> str:
    """The whole page."""
    from tests.test_agreement import SHAPED
    from tests.test_random_configs import MAKERS
    from tests.test_weights import CONFIGS

    agreeing = {config.family for config in SHAPED.values()}
    returning = {config.family for config in CONFIGS.values()}
    rows = []
    for family in sorted(FAMILIES, key=lambda f: f.model_type):
        names = [row["name"] for row in family.rows]
        checks = {"L": family.name in agreeing, "B": family.name in returning, "R": family.model_type in MAKERS}
        verified = " ".join(letter for letter, done in checks.items() if done)
        types = ", ".join(f"`{name}`" for name in (family.model_type, *family.aliases))
        rows.append(f"| {types} | {_some(names)} | {verified} |")
    return HEAD + "\n".join(rows) + "\n"


def _some(names: list[str]) -> str:
    if len(names) <= 4:
        return ", ".join(names) or "none; any checkpoint"
    return f"{len(names)}: {', '.join(names[:: max(len(names) // 3, 1)][:4])}, ..."


if __name__ == "__main__":
    PLACE.write_text(page())
