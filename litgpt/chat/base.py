"""`litgpt chat`: a conversation in the terminal, or through a pipe (one line of input, one answer)."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from io import TextIOWrapper
from pathlib import Path
from typing import TYPE_CHECKING

from litgpt.errors import InputError, UserError, harmless, printable
from litgpt.generate.base import Quantization

if TYPE_CHECKING:
    from litgpt.generate.sampling import Sampling
    from litgpt.generate.session import Messages, Session

HELP = """\
/reset  forget the conversation      /help  show this
/quit   leave (so do Ctrl-D and an empty line); Ctrl-C stops an answer, or drops what is typed"""
LONG_CHAT = 2048  # tokens; a chat that grows longer is compiled again
ALONE = "The prompt style does not tell who says what, so every message stands alone (other styles: --prompt_style)."


def main(
    checkpoint_dir: Path,
    *,
    sys_prompt: str | None = None,
    max_new_tokens: int = 50,
    top_k: int | None = 50,
    top_p: float = 1.0,
    temperature: float = 0.8,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    presence_penalty: float = 0.0,
    frequency_penalty: float = 0.0,
    seed: int | None = None,
    prompt_style: str | None = None,
    quantize: Quantization | None = None,
    precision: str | None = None,
    compile: bool = False,
    prepack: bool | None = None,
    multiline: bool = False,
    access_token: str | None = None,
) -> None:
    """Chat with a model. It remembers what was said, until /reset; with no prompt style every message stands alone.

    Input may also be piped: every line is a message, and only the answers go to standard output.

    Args:
        checkpoint_dir: A checkpoint or adapter directory, its name below checkpoints/, or a repository of the Hugging
            Face Hub.
        sys_prompt: An instruction that comes before the conversation, for models that were trained with one.
        max_new_tokens: Longest answer, in tokens.
        top_k: Draw from the k likeliest tokens only; null draws from all.
        top_p: Draw from the likeliest tokens that together reach this probability only.
        temperature: Flattens (above 1) or sharpens (below 1) the choice; 0 always takes the likeliest token.
        min_p: Draw only from tokens at least this many times as likely as the likeliest; 0 from all.
        repetition_penalty: Above 1, tokens of the conversation get less likely to come again.
        presence_penalty: Taken from the logits of tokens that the answer holds already.
        frequency_penalty: The same, once for each time.
        seed: Makes the conversation repeatable.
        prompt_style: A prompt style by name, instead of the checkpoint's own.
        quantize: Weights in 4 or 8 bits, to save memory.
        precision: 32-true, bf16-true or 16-true; by default what the files hold.
        compile: Compile the model first: slow to start, faster from then on.
        prepack: In bf16 on a CPU, lay the weights out for its products: faster answers for as much memory again as the
            weights take. By default where memory is plenty.
        multiline: A message may have many lines; a line that says !submit sends it.
        access_token: For models of the hub that ask for one.
    """
    # here, so that --help does not wait for torch
    from litgpt.generate.sampling import Sampling
    from litgpt.generate.session import conversation, load_session

    sampling = Sampling(temperature, top_k, top_p, seed, min_p, repetition_penalty, presence_penalty, frequency_penalty)
    session = load_session(
        checkpoint_dir,
        precision=precision,
        quantize=quantize,
        compile=compile,
        prepack=prepack,
        prompt_style=prompt_style,
        max_new_tokens=max_new_tokens,
        access_token=access_token,
        compiled_for=LONG_CHAT,
    )
    chat = Chat(session, sampling, max_new_tokens, conversation("", sys_prompt)[:-1])
    by_hand = sys.stdin.isatty() and sys.stdout.isatty()
    if isinstance(sys.stdin, TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")  # a stray byte in a pipe is no reason to end
    if by_hand:
        sending = "\nA line that says !submit sends the message." if multiline else ""
        alone = "" if session.has_turns else f"\n{ALONE}"
        name = printable(session.config.name or str(checkpoint_dir))
        print(f"Chatting with {name}.\n{HELP}{sending}{alone}", file=sys.stderr)
    unanswered = 0
    for message in messages(by_hand=by_hand, multiline=multiline):
        if message == "/quit":
            break
        if message in ("/reset", "/help"):
            if message == "/reset":
                chat.reset()
            print("The conversation starts anew." if message == "/reset" else HELP, file=sys.stderr)
            continue
        answered = chat.say(message)
        unanswered += not answered
        if by_hand and answered:
            print(f"{chat.session.tally}\n", file=sys.stderr)
    if unanswered and not by_hand:  # a script looks at the exit status
        raise InputError(f"messages that could not be answered: {unanswered}; why is said above, for each")


def messages(*, by_hand: bool, multiline: bool) -> Iterator[str]:
    """What the user says, until they leave; blank lines of a pipe say nothing."""
    while True:
        try:
            message = _read(by_hand=by_hand, multiline=multiline)
        except EOFError:
            if by_hand:
                print(file=sys.stderr)
            return
        except KeyboardInterrupt:
            if not by_hand:
                raise
            # often it came for an answer that was just over
            print("\n(Ctrl-D leaves)", file=sys.stderr)
            continue
        if message:
            yield message
        elif by_hand:
            return


def _read(*, by_hand: bool, multiline: bool) -> str:
    """One message, stripped. Raises EOFError at the end of the input."""
    if by_hand:
        import readline  # noqa: F401  gives input() history and line editing
    prompt = ">> Prompt: " if by_hand else ""
    if not multiline:
        return input(prompt).strip()
    lines: list[str] = []
    while True:
        try:
            line = input("" if lines else prompt)
        except EOFError:
            if lines:
                break
            raise
        if line.strip() == "!submit" or (line.strip() in ("/quit", "/reset", "/help") and not lines):
            return "\n".join(lines).strip() or line.strip().removeprefix("!submit")
        lines.append(line)
    return "\n".join(lines).strip()


@contextmanager
def _interrupts() -> Iterator[list[int]]:
    """Notes the first Ctrl-C, to be acted on between two pieces of text; the second is a KeyboardInterrupt at once.

    As an exception it could come while Python cleans up an object, where exceptions are dropped.
    """
    noted: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield noted
        return

    def note(number: int, frame: object) -> None:
        if noted:
            raise KeyboardInterrupt
        noted.append(number)

    before = signal.signal(signal.SIGINT, note)
    try:
        yield noted
    finally:
        signal.signal(signal.SIGINT, before)


@dataclass
class Chat:
    """A conversation and what it remembers."""

    session: Session
    sampling: Sampling
    max_new_tokens: int
    opening: Messages = field(default_factory=list)  # the system prompt, if there is one
    history: Messages = field(default_factory=list)  # users and answers in turn

    def reset(self) -> None:
        self.history = []

    def say(self, message: str) -> bool:
        """Answer on standard output; whether it could be answered.

        An interrupt ends the answer, not the conversation; so does a message too long.
        """
        if not self.session.has_turns:
            self.reset()
        from litgpt.generate.sampling import NotFiniteError

        legible = harmless if sys.stdout.isatty() else str
        self.history.append({"role": "user", "content": message})
        said = ""
        try:
            self._make_room()
            with _interrupts() as interrupted:
                answer = self.session.answer(
                    self.messages(), self.sampling, max_new_tokens=self.max_new_tokens, at_limit="stop"
                )
                for piece in answer:
                    said += piece
                    print(legible(piece), end="", flush=True)
                    if interrupted:
                        break
        except KeyboardInterrupt:
            interrupted = [signal.SIGINT]
        except UserError as error:
            self.history.pop()
            if isinstance(error, NotFiniteError) and not self.history:
                raise  # it has never said anything
            print(f"error: {error}", file=sys.stderr)
            return False
        if interrupted and not sys.stdin.isatty():
            raise KeyboardInterrupt  # nobody is there to say what comes instead
        if interrupted:
            print(" (stopped)", end="", file=sys.stderr, flush=True)
        print(flush=True)
        self.history.append({"role": "assistant", "content": said})
        return True

    def messages(self) -> Messages:
        return [*self.opening, *self.history]

    def _make_room(self) -> None:
        """Forget the oldest exchanges until the conversation and an answer fit into the context."""
        forgotten = 0
        while len(self.history) > 2 * forgotten + 1:
            left = [*self.opening, *self.history[2 * forgotten :]]
            if len(self.session.encode(left)) + self.max_new_tokens <= self.session.context:
                break
            forgotten += 1
        if forgotten and len(self.session.encode([*self.opening, self.history[-1]])) >= self.session.context:
            return  # it will be refused, and what was said before is kept
        del self.history[: 2 * forgotten]
        if forgotten:
            what = "exchange was" if forgotten == 1 else f"{forgotten} exchanges were"
            print(f"note: the context is full; the oldest {what} forgotten", file=sys.stderr)
