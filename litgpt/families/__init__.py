"""The list of families: find one by a model's name, by a `model_type`, by what a config says. Data, no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from litgpt.errors import InputError, MissingError, near_miss, shown
from litgpt.families.deepseek import DEEPSEEK
from litgpt.families.falcon import FALCON
from litgpt.families.gemma import GEMMA, GEMMA2, GEMMA3
from litgpt.families.gpt_neox import GPT_NEOX
from litgpt.families.llama import LLAMA
from litgpt.families.mistral import MISTRAL
from litgpt.families.mixtral import MIXTRAL
from litgpt.families.olmo import OLMO, OLMO2
from litgpt.families.phi import PHI, PHI3
from litgpt.families.qwen import QWEN2, QWEN3, QWEN3_MOE
from litgpt.families.stablelm import STABLELM
from litgpt.families.tables import Equation, Family

__all__ = [
    "FAMILIES",
    "Equation",
    "Family",
    "by_model_type",
    "by_name",
    "family",
    "find",
    "matching",
    "names",
    "prompt_for",
]

FAMILIES: tuple[Family, ...] = (
    LLAMA,
    GPT_NEOX,
    FALCON,
    MISTRAL,
    MIXTRAL,
    PHI,
    PHI3,
    GEMMA,
    GEMMA2,
    GEMMA3,
    QWEN2,
    QWEN3,
    QWEN3_MOE,
    OLMO,
    OLMO2,
    STABLELM,
    DEEPSEEK,
)
EXAMPLES = ("pythia-14m", "Llama-3.2-1B", "Qwen3-0.6B")  # of registered names, where none is near


def names() -> list[str]:
    """Every registered model name."""
    return [row["name"] for family in FAMILIES for row in family.rows]


def find(model_name: str) -> tuple[Family, Mapping[str, Any]] | None:
    """The family and row of a registered name, a hub name or `org/name`; None when there is none."""
    known = [(family, row) for family in FAMILIES for row in family.rows]
    spellings = (
        lambda row: row["name"],
        lambda row: row["hf_config"]["name"],
        lambda row: f"{row['hf_config']['org']}/{row['hf_config']['name']}",
    )
    return next((pair for spell in spellings for pair in known if spell(pair[1]) == model_name), None)


def by_name(model_name: str) -> tuple[Family, Mapping[str, Any]]:
    """As `find`; an unknown name is an error that names the nearest."""
    found = find(model_name)
    if found is None:
        nearest = near_miss(str(model_name).rsplit("/", 1)[-1], names())
        known = nearest or f"; some that are: {', '.join(EXAMPLES)}"
        raise MissingError(f"model {shown(model_name)} is not known{known} (litgpt download list shows all)")
    return found


def family(name: str) -> Family:
    """The family of that name, as `Config.family` holds it."""
    for known in FAMILIES:
        if known.name == name:
            return known
    raise InputError(f"family is {shown(name)}, must be one of {', '.join(known.name for known in FAMILIES)}")


def by_model_type(model_type: str) -> Family:
    """The family of a `model_type` in config.json, older spellings too."""
    types = {spelling: known for known in FAMILIES for spelling in (known.model_type, *known.aliases)}
    if model_type not in types:
        raise InputError(
            f"model_type {shown(model_type)} is not known{near_miss(str(model_type), types)} "
            f"(LitGPT has {', '.join(sorted(types))})"
        )
    return types[model_type]


def matching(fields: Mapping[str, Any]) -> list[Family]:
    """The families whose traits agree with the fields (those absent count as agreeing), most telling first.

    Of llama and its kin, which say the same of a model without biases, llama comes first: most readers know it.
    """
    agreeing = [f for f in FAMILIES if all(fields.get(name, trait) == trait for name, trait in f.traits.items())]
    return sorted(agreeing, key=lambda f: -len(f.traits.keys() - {"bias"}))


def prompt_for(model_name: str) -> str | None:
    """The default prompt style of a registered model, None for models that have none."""
    found = find(model_name)
    return (found[1].get("prompt") or found[0].prompt) if found else None
