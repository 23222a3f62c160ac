"""The Jinja environment of chat templates: names and tags as in transformers, without a way out.

A template is a stranger's program. It may neither call nor reach anything but the conversation, nor compute something
that takes the machine's memory or time.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import datetime
from functools import cache
from typing import Any

from jinja2 import ext, nodes, pass_context
from jinja2.exceptions import SecurityError, TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from litgpt.errors import shown

SPAN_NAME = "litgpt_span"  # the template variable that holds the two marks around what the assistant wrote
MOST_BITS = 4096  # of a power
MOST_REPEATS = 1_000_000  # characters or entries of a repeated sequence


@cache
def environment() -> Sandbox:
    """The one environment, which keeps nothing of the templates that it runs."""
    made = Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, ext.loopcontrols])
    made.filters["tojson"] = tojson
    made.globals |= {
        "raise_exception": raise_exception,
        "strftime_now": lambda form: datetime.now().strftime(form),
        "namespace": PublicNamespace,
    }
    return made


class Sandbox(ImmutableSandboxedEnvironment):
    """Jinja's own sandbox, where reaching for something hidden is an error instead of an empty text."""

    intercepted_binops = frozenset(("*", "**"))

    def unsafe_undefined(self, obj: Any, attribute: str) -> Any:
        raise SecurityError(f"reaches for {shown(attribute)} of a {type(obj).__name__}")

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if _is_huge(operator, left, right):
            raise SecurityError(f"computes something huge with {operator!r}")
        return super().call_binop(context, operator, left, right)


class PublicNamespace(Namespace):
    """A namespace without a way to what begins with an underscore."""

    def __setitem__(self, name: str, value: Any) -> None:
        if name.startswith("_"):
            raise SecurityError(f"sets {shown(name)} of a namespace")
        super().__setitem__(name, value)


class Generation(ext.Extension):
    """`{% generation %}` ... `{% endgeneration %}` around what the assistant wrote."""

    tags = {"generation"}  # noqa: RUF012 (jinja's own attribute)

    def parse(self, parser: Any) -> Any:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_wrap"), [], [], body).set_lineno(line)

    @pass_context
    def _wrap(self, context: Any, caller: Callable[[], str]) -> str:
        return caller().join(context[SPAN_NAME])


def raise_exception(message: str) -> None:
    raise TemplateError(message)


def tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Plain JSON: jinja's own filter escapes HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _is_huge(operator: str, left: Any, right: Any) -> bool:
    """Whether a product or power would take the machine's memory or time."""
    if operator == "**":
        return isinstance(left, int) and isinstance(right, int) and left.bit_length() * right > MOST_BITS
    counts = [len(x) if isinstance(x, (str, bytes, list, tuple)) else x for x in (left, right)]
    repeats = any(isinstance(x, (str, bytes, list, tuple)) for x in (left, right))
    return repeats and all(isinstance(n, int) for n in counts) and counts[0] * counts[1] > MOST_REPEATS
