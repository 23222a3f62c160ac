"""The house: who may know whom, and what may be loaded when."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "litgpt"

# A module may import only what stands above it. "a.*" is every module of the package a that has no line of its own.
ROOMS = """
    __init__ errors commands args storage
    families.tables families.llama families.* families
    config loss cpu model estimate weights
    methods.* methods opaque byte_products quantize prepack optimizers
    parallel placement.base placement.mirror placement.* placement
    tokenizer
    prompts.marks prompts.messages prompts.base prompts.pieces prompts.table prompts.sandbox prompts.template prompts
    checkpoint adapters report hub launch
    data.base data.text data.tokens data.packing data.loader data.* data
    generate.stops generate.sampling generate.scoring generate.compiled
    generate.speculation generate.engine generate.drafters generate.answers generate.session generate.* generate
    run_state training job pretrain finetune.* finetune
    chat.* chat eval.* eval deploy.* deploy scripts.* scripts
    recipe signature legacy request parser usage place api cli __main__
"""
ORDER = ROOMS.split()

TORCH_FREE = """
    errors commands args storage families config estimate tokenizer prompts hub data scripts.download
    recipe signature legacy request parser usage cli job pretrain finetune generate.base chat.base eval.evaluate
    deploy.serve deploy.scheduler deploy.app
"""


def name_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


MODULES = {name_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def place(module: str) -> int:
    package = module.partition(".")[0] + ".*"
    entry = module if module in ORDER else package
    assert entry in ORDER, f"litgpt/{module.replace('.', '/')}.py has no place in tests/test_house.py"
    return ORDER.index(entry)


def run_at_import(body: list[ast.stmt]) -> Iterator[ast.Import | ast.ImportFrom]:
    """The imports that happen when a module is imported: outside functions and `if TYPE_CHECKING`."""
    for node in body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            yield from run_at_import(node.orelse)
        elif not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            for inner in ("body", "orelse", "finalbody", "handlers"):
                yield from run_at_import(getattr(node, inner, []))


def imported(path: Path) -> set[str]:
    """The full names of the modules that `path` loads."""
    names: set[str] = set()
    for node in run_at_import(ast.parse(path.read_text()).body):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
            continue
        assert node.level == 0, f"{path}: imports are written in full"
        for alias in node.names:
            submodule = f"{node.module}.{alias.name}"
            names.add(submodule if submodule.removeprefix("litgpt.") in MODULES else str(node.module))
    return names


def rooms(path: Path) -> set[str]:
    """The modules of ours that `path` loads, by their names below litgpt."""
    ours = {name for name in imported(path) if name.partition(".")[0] == "litgpt"}
    return {name.removeprefix("litgpt.") if name != "litgpt" else "__init__" for name in ours}


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_only_what_stands_above_it(module: str) -> None:
    below = {room for room in rooms(MODULES[module]) if place(room) > place(module)}
    assert not below, f"{module} may not know {below}"


def test_no_module_imports_itself_by_a_detour() -> None:
    graph = {module: rooms(path) for module, path in MODULES.items()}
    while graph:
        free = {module for module, needed in graph.items() if not needed & graph.keys()}
        assert free, f"these import each other: {sorted(graph)}"
        graph = {module: needed for module, needed in graph.items() if module not in free}


@pytest.mark.parametrize("module", MODULES)
def test_heavy_packages_are_loaded_where_they_are_used(module: str) -> None:
    optional = {
        "transformers",
        "datasets",
        "litdata",
        "litserve",
        "lm_eval",
        "bitsandbytes",
        "torchao",
        "peft",
        "wandb",
    }
    heavy = optional | {
        "mlflow",
        "tensorboard",
        "matplotlib",
        "jsonargparse",
        *([] if module == "launch" else ["lightning"]),
    }
    own = {"eval.lm": {"lm_eval"}, "deploy.lit_api": {"litserve"}}  # a class of its own needs its base
    heavy -= own.get(module, set())
    assert not heavy & {name.partition(".")[0] for name in imported(MODULES[module])}


def loaded_by(code: str) -> set[str]:
    """The top-level modules that are loaded once `code` has run in a fresh interpreter."""
    script = f"import sys\n{code}\nprint('\\n=', *sorted({{m.partition('.')[0] for m in sys.modules}}))"
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    return set(out.rsplit("=", 1)[1].split())


@pytest.mark.parametrize("code", ["import litgpt", "from litgpt.cli import main; assert main(['--help']) == 0"])
def test_help_and_import_load_nothing_heavy(code: str) -> None:
    assert not loaded_by(code) & {"torch", "lightning", "jsonargparse", "yaml", "numpy", "tokenizers", "rich"}


@pytest.mark.parametrize("module", TORCH_FREE.split())
def test_rooms_about_facts_and_text_load_no_torch(module: str) -> None:
    assert not loaded_by(f"import litgpt.{module}") & {"torch", "lightning"}


def test_public_names_are_there_and_listed() -> None:
    import litgpt

    for name in litgpt.__all__:
        assert getattr(litgpt, name).__name__ == name
        assert name in dir(litgpt)
    with pytest.raises(AttributeError):
        litgpt.no_such_name  # noqa: B018
