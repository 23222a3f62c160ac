"""`litgpt ACTION ...`: looks the action up, imports that one function, calls it with what was typed, and turns errors
into one line and an exit status. Knows no command.
"""

from __future__ import annotations

import contextlib
import errno
import importlib
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

from litgpt import __version__
from litgpt.commands import COMMANDS, SECTIONS
from litgpt.errors import InputError, MachineError, UserError, is_out_of_memory, near_miss, one_line, shown

EXAMPLES = """\
Examples:
  litgpt train_tokenizer my_text/ --out_dir out/tokenizer
  litgpt pretrain pythia-14m --tokenizer_dir out/tokenizer --data TextFiles --data.train_data_path my_text/
  litgpt chat out/pretrain/final

Every option of an action: litgpt ACTION --help
"""

FULL_OR_BROKEN = {errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.EFBIG, errno.ENOMEM, errno.EMFILE}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line and return its exit status; `litgpt.errors` says what the statuses mean."""
    _open_streams()
    try:
        _run(sys.argv[1:] if argv is None else argv)
        sys.stdout.flush()
    except KeyboardInterrupt:
        return _farewell("interrupted", 130)
    except BrokenPipeError:
        _settle_output()
        return 141
    except Exception as e:
        mended = _as_user_error(e)
        if mended is None:
            raise
        _settle_output()
        return _farewell(f"error: {one_line(mended)}", mended.exit_status)
    return 0


def _open_streams() -> None:
    """Stand in for streams that were closed (`>&-`), and let half a character become "?" in what is printed."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115 (for the rest of the process)
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")


def _run(argv: Sequence[str]) -> None:
    if not argv:
        print(overview(), file=sys.stderr)
        raise InputError("no action given; choose one of the above, for example: litgpt chat CHECKPOINT_DIR")
    action, rest = argv[0], argv[1:]
    if action in ("-h", "--help"):
        print(overview())
    elif action == "--version":
        print(f"litgpt {__version__}")
    else:
        run_command(action, _function(action), rest)


def run_command(action: str, function: Callable[..., Any], argv: Sequence[str]) -> None:
    """Call `function` with the arguments that `argv` gives it, or show its help or the values it would use."""
    from litgpt import parser, request, signature, usage

    table = signature.read(function)
    asked = request.read(table, argv)
    for warning in asked.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    if asked.wants_help:
        print(usage.page(action, table, parser.chosen_classes(table, asked)))
    elif asked.wants_config:
        print(parser.config_text(table, asked), end="")
    else:
        function(**parser.arguments(table, asked))


def overview() -> str:
    """The page of `litgpt --help`."""
    lines = [
        "Usage: litgpt ACTION ... [--option VALUE ...]",
        "",
        "Pretrain, finetune, evaluate and serve language models.",
    ]
    for section, actions in SECTIONS.items():
        here = [f"  {action:<21} {words}" for action, (_, words) in actions.items()]
        lines += ["", f"{section}:", *here]
    return "\n".join([*lines, "", EXAMPLES.rstrip()])


def _function(action: str) -> Callable[..., Any]:
    if action not in COMMANDS:
        known = near_miss(action, COMMANDS) or f"; the actions are {', '.join(COMMANDS)}"
        raise InputError(f"{shown(action)} is no action{known} (litgpt --help shows all)")
    target, _ = COMMANDS[action]
    module, _, name = target.partition(":")
    return getattr(importlib.import_module(module), name)


def _as_user_error(e: Exception) -> UserError | None:
    """What the user can do about `e`; None when it is a mistake of ours, whose traceback must be seen."""
    if isinstance(e, UserError):
        return e
    if is_out_of_memory(e):
        return MachineError(
            "out of memory; lower train.micro_batch_size or train.max_seq_length, or take a smaller model"
        )
    if isinstance(e, OSError) and e.errno in FULL_OR_BROKEN:
        return MachineError(f"{e.filename or 'output'}: {e.strerror}; free some space or choose another place")
    if isinstance(e, OSError) and isinstance(e.filename, (str, bytes, os.PathLike)):
        return InputError(f"{os.fsdecode(e.filename)}: {e.strerror}; check the path and its permissions")
    return None


def _farewell(line: str, status: int) -> int:
    with contextlib.suppress(OSError):
        print(line, file=sys.stderr)
    return status


def _settle_output() -> None:
    """Write out what was printed; where that fails, drop it: Python would try again at exit, and complain."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
