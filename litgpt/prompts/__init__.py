"""How a conversation becomes the text and the ids that a model was trained on: chat templates and named styles.

A checkpoint's own Jinja template is a stranger's program: it runs in a sandbox that can neither call nor reach anything
but the conversation. What a user typed stays plain text, whatever it looks like. Knows no model and no torch.
"""

from __future__ import annotations

from pathlib import Path

import yaml

from litgpt.errors import InputError, near_miss, one_line, shown
from litgpt.prompts.base import PromptStyle
from litgpt.prompts.messages import Message, with_system
from litgpt.prompts.pieces import Style
from litgpt.prompts.table import DEFAULT, STYLES
from litgpt.prompts.template import ChatTemplate
from litgpt.storage import inside
from litgpt.tokenizer import Tokenizer

__all__ = [
    "DEFAULT",
    "STYLES",
    "ChatTemplate",
    "Message",
    "PromptStyle",
    "Style",
    "choose",
    "from_file",
    "from_name",
    "load",
    "save",
    "with_system",
]

STYLE_FILE = "prompt_style.yaml"
TEMPLATE_FILE = "chat_template.jinja"
NAMESPACE = "litgpt.prompts."  # of the class names in LitGPT 0.5's prompt_style.yaml


def from_name(name: str) -> PromptStyle:
    """The style of this name in the table, or of the class name that LitGPT 0.5 had for it."""
    known = {style.name: style for style in STYLES} | {style.class_name: style for style in STYLES}
    if name not in known:
        names = [style.name for style in STYLES]
        raise InputError(f"prompt style {shown(name)} is not known{near_miss(name, names)} (all: {', '.join(names)})")
    return known[name]


def choose(
    directory: str | Path,
    tokenizer: Tokenizer,
    family_prompt: str | None,
    override: str | Path | PromptStyle | None = None,
) -> PromptStyle:
    """The style of a checkpoint: `override`, else the one saved there, else the tokenizer's chat template, else the
    family's, else none. `override` is a style, its name, or a Jinja file.
    """
    if isinstance(override, PromptStyle):
        return override
    if override is not None:
        path = Path(override)
        return from_file(path, tokenizer) if path.suffix == ".jinja" else from_name(str(override))
    saved = load(directory)
    if saved is not None:
        return saved
    template = ChatTemplate.of(tokenizer)
    if template is not None:
        template.check()
        return template
    return from_name(family_prompt) if family_prompt else DEFAULT


def from_file(path: Path, tokenizer: Tokenizer) -> ChatTemplate:
    """A chat template in a file of its own."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise InputError(f"--prompt_style {path}: cannot be read as text ({one_line(error)})") from None
    template = ChatTemplate(text, tokens=tokenizer.special_tokens, source=str(path))
    template.check()
    return template


def load(directory: str | Path) -> PromptStyle | None:
    """The style that was saved in a directory, by us or by LitGPT 0.5. A class that is not ours is never imported."""
    path = inside(Path(directory), STYLE_FILE)
    if not path.is_file():
        return None
    try:
        entry = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError, LookupError, AttributeError, RecursionError) as error:
        raise InputError(f"{path}: cannot be read ({one_line(error)}); mend it or use --prompt_style") from None
    class_path = entry.get("class_path") if isinstance(entry, dict) else None
    if not isinstance(class_path, str) or not class_path.startswith(NAMESPACE):
        raise InputError(
            f"{path}: class_path {shown(class_path)} is not one of {NAMESPACE}*; remove it or use --prompt_style"
        )
    try:
        return from_name(class_path.removeprefix(NAMESPACE))
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


def save(style: PromptStyle, directory: str | Path) -> None:
    """Keeps a style beside a checkpoint: by name, and as the chat template that other programs read.

    The tokenizer's files must be there already. A style of the user's own class cannot be kept.
    """
    directory = Path(directory)
    if isinstance(style, Style):
        entry = {"class_path": NAMESPACE + style.class_name}
        (directory / STYLE_FILE).write_text(yaml.safe_dump(entry), encoding="utf-8")
    has_tokenizer = any((directory / name).is_file() for name in ("tokenizer.json", "tokenizer.model"))
    tokenizer = Tokenizer(directory) if has_tokenizer else None
    template = style.jinja(adds_bos=tokenizer is not None and bool(tokenizer.encode("")))
    if template is not None and (tokenizer is None or template != tokenizer.chat_template):
        (directory / TEMPLATE_FILE).write_text(template, encoding="utf-8")
