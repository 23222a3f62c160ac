"""Text to ids and back, by the rules that a checkpoint's own files state.

Knows no model and no torch. A directory's or a model's name decides nothing here.
"""

from __future__ import annotations

import codecs
import hashlib
import json
import re
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from functools import cached_property, partial
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from litgpt.errors import InputError, MissingError, one_line, require_type, shown
from litgpt.storage import inside, read_json

FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
# A tokenizer.json that lies alone names no role: these, the first that it has, are taken for it.
USUAL_EOS = (
    "<|endoftext|>",
    "</s>",
    "<|end_of_text|>",
    "<eos>",
    "<\uff5cend\u2581of\u2581sentence\uff5c>",
    "<|im_end|>",
)
USUAL_BOS = ("<s>", "<|begin_of_text|>", "<bos>", "<\uff5cbegin\u2581of\u2581sentence\uff5c>")
# Added tokens that are not flagged special but shaped like a chat marker are not for users to type either.
MARKER = re.compile(r"<[|\uff5c].+[|\uff5c]>")
LLAMA_CLASSES = ("LlamaTokenizer", "CodeLlamaTokenizer")
FILES_AS_THEY_ARE = ("mistral", "mixtral", "phi3", "phimoe", "qwen2")
BYTE_PIECE = re.compile(r"<0x[0-9A-Fa-f]{2}>")
REPLACEMENT = "\ufffd"


class Tokenizer:
    """The tokenizer of a checkpoint directory: `tokenizer.json`, or else the SentencePiece file `tokenizer.model`.

    Raises MissingError where there is none and InputError where a file is damaged; both name the file.
    """

    def __init__(self, checkpoint_dir: str | Path) -> None:
        self.dir = Path(checkpoint_dir)
        for path in (*self.files(), self.dir / "config.json", self.dir / "generation_config.json"):
            inside(self.dir, str(path.relative_to(self.dir)))
        self._settings = _read_json(self.dir / "tokenizer_config.json")
        self._backend = _open_backend(self.dir, self._settings)
        self.special_tokens = _named_tokens(self.dir, self._settings, self._backend)
        """Text of each token that has a role, as chat templates name them: `bos_token`, `eos_token`, ..."""
        # What a model's config calls an end, its generation_config overrides.
        ends = {**_role_ids(self.dir / "config.json"), **_role_ids(self.dir / "generation_config.json")}
        self.bos_id = self._role("bos", ends)
        self.eos_id = self._role("eos", ends)
        self.pad_id = self._role("pad", ends)
        own = () if self.eos_id is None else (self.eos_id,)
        self.eos_ids: tuple[int, ...] = tuple(dict.fromkeys((*own, *ends.get("eos", ()))))
        # What the files put around a text.
        self._before, self._after = self._backend.affixes({"bos": self.bos_id, "eos": self.eos_id})

    def __repr__(self) -> str:
        return f"Tokenizer({str(self.dir)!r}, vocab_size={self.vocab_size})"

    def __reduce__(self) -> tuple[type[Tokenizer], tuple[Path]]:
        return Tokenizer, (self.dir,)  # another process opens the files itself

    @property
    def vocab_size(self) -> int:
        """One more than the largest id, added tokens included."""
        return self._backend.size

    @property
    def opening(self) -> list[int]:
        """The ids that the files put before a text."""
        return list(self._before)

    def token_to_id(self, token: str) -> int:
        """The id of a token given by its exact text; InputError where there is none."""
        found = self._backend.token_to_id(token)
        if found is None:
            raise InputError(f"{self.dir}: the tokenizer has no token {shown(token)}")
        return found

    def has_token(self, token: str) -> bool:
        """Whether a token of exactly this text exists."""
        return self._backend.token_to_id(token) is not None

    def encode(
        self,
        text: str,
        *,
        bos: bool | None = None,
        eos: bool | None = False,
        max_length: int = -1,
        special: bool = False,
    ) -> list[int]:
        """The ids of `text`.

        bos, eos: whether to begin and end with these tokens; None follows the rule in the files. `eos` is off by
            default because a model goes on from a prompt.
        max_length: ids beyond it are cut off; -1 keeps all.
        special: whether text like `</s>` becomes that token's id. Off by default: what a user typed is plain text.
        """
        return self.encode_batch([text], bos=bos, eos=eos, max_length=max_length, special=special)[0]

    def encode_batch(
        self,
        texts: Sequence[str],
        *,
        bos: bool | None = None,
        eos: bool | None = False,
        max_length: int = -1,
        special: bool = False,
    ) -> list[list[int]]:
        """`encode` of many texts, on all cores where the library can."""
        before, after = self._edge(bos, "bos"), self._edge(eos, "eos")
        require_type(texts, (list, tuple), "texts", "a list of texts")
        for text in texts:
            require_type(text, str, "text", "text")
        rows = self._backend.encode([clean(text) for text in texts], special)
        stop = None if max_length < 0 else max_length
        return [[*before, *row, *after][:stop] for row in rows]

    def encode_parts(self, parts: Iterable[tuple[str, bool]]) -> Encoded:
        """The ids of consecutive parts of one text, each `(text, special)`; no bos or eos is added."""
        ids: list[int] = []
        spans: list[tuple[int, int]] = []
        at = 0
        for text, special in parts:
            new = self._backend.encode_part(clean(text), special, continues=bool(ids))
            ids += new.ids
            spans += [(at + start, at + end) for start, end in new.spans]
            at += len(text)
        return Encoded(ids, spans)

    def encode_parts_batch(self, rows: Sequence[Sequence[tuple[str, bool]]], spans: bool = True) -> list[Encoded]:
        """`encode_parts` of many texts, on all cores where the library can; without spans it is quicker."""
        alone = [len(row) == 1 and row[0][1] for row in rows]
        texts = [clean(row[0][0]) for row, is_alone in zip(rows, alone, strict=True) if is_alone]
        encoded = iter(self._backend.encode_special(texts, spans))
        return [
            next(encoded) if is_alone else self.encode_parts(row) for row, is_alone in zip(rows, alone, strict=True)
        ]

    def decode(self, ids: int | Iterable[int]) -> str:
        """The text of `ids` (a list, an array or one id), without special tokens and ids that name no token."""
        ids = ids.tolist() if hasattr(ids, "tolist") else ids
        return self._backend.decode(self._visible([ids] if isinstance(ids, int) else ids))

    def stream(self, after: Sequence[int] = (), shows: Collection[str] = ()) -> TokenStream:
        """A decoder for ids that arrive one by one; `after` are ids already there, whose text is not repeated.

        shows: hidden tokens that are shown nonetheless, as they read.
        """
        shown = {i for token in shows if (i := self._backend.token_to_id(token)) is not None}
        visible = partial(self._visible, shown=shown) if shown else self._visible
        return TokenStream(self._backend.stream(self._visible(after[-8:])), visible)

    @property
    def control_tokens(self) -> frozenset[str]:
        """Tokens that steer the model: the special ones and those a chat template uses."""
        return self._backend.control

    @property
    def hidden_tokens(self) -> frozenset[str]:
        """The control tokens that the files call special: `decode` leaves them out."""
        return self._backend.hidden

    @cached_property
    def control_pattern(self) -> re.Pattern[str] | None:
        """Finds control tokens in a text, each as group 1."""
        return any_of(self.control_tokens)

    @cached_property
    def hidden_pattern(self) -> re.Pattern[str] | None:
        """Finds hidden tokens in a text, each as group 1."""
        return any_of(self.hidden_tokens)

    @cached_property
    def chat_templates(self) -> dict[str, str]:
        """Jinja templates by name; the usual one is `default`."""
        return _chat_templates(self.dir, self._settings)

    @property
    def chat_template(self) -> str | None:
        """The checkpoint's own Jinja chat template."""
        return self.chat_templates.get("default")

    def files(self) -> list[Path]:
        """The files that make this tokenizer, to be copied beside weights."""
        more = sorted((self.dir / "additional_chat_templates").glob("*.jinja"))
        return [path for path in (self.dir / name for name in FILES) if path.is_file()] + more

    def fingerprint(self) -> str:
        """A hash of the files: another value means that cached ids are stale."""
        digest = hashlib.sha256()
        for path in self.files():
            digest.update(path.name.encode() + b"\0" + hashlib.sha256(path.read_bytes()).digest())
        return digest.hexdigest()

    def _role(self, role: str, ids: Mapping[str, tuple[int, ...]]) -> int | None:
        token = self.special_tokens.get(f"{role}_token")
        found = None if token is None else self._backend.token_to_id(token)
        return found if found is not None else next(iter(ids.get(role, ())), None)

    def _edge(self, wanted: bool | None, role: str) -> tuple[int, ...]:
        by_rule, token = (self._before, self.bos_id) if role == "bos" else (self._after, self.eos_id)
        if wanted is None or (wanted and by_rule):
            return by_rule
        if wanted and token is None:
            raise InputError(f"{self.dir}: the tokenizer names no {role}_token; add it to tokenizer_config.json")
        return (token,) if wanted and token is not None else ()

    def _visible(self, ids: Iterable[int], shown: Collection[int] = ()) -> list[int]:
        size, hidden = self._backend.size, self._backend.hidden_ids
        return [int(i) for i in ids if 0 <= i < size and (i not in hidden or i in shown)]


class Encoded(NamedTuple):
    """Ids, and for each the `(start, end)` of its characters in the text."""

    ids: list[int]
    spans: list[tuple[int, int]]


class TokenStream:
    """Text of ids that arrive one by one.

    The pieces joined are the text of all ids decoded at once, and no piece ends inside a character.
    """

    def __init__(self, pieces: Pieces, visible: Callable[[Iterable[int]], list[int]]) -> None:
        self._pieces = pieces
        self._visible = visible

    def push(self, token_id: int) -> str:
        """The text that one more id makes certain; often its own, "" while a character is incomplete."""
        return "".join(self._pieces.push(i) for i in self._visible([token_id]))

    def flush(self) -> str:
        """What was still held back, when no more ids come."""
        return self._pieces.flush()


class Pieces(Protocol):
    """Incremental decoding of visible ids."""

    def push(self, token_id: int) -> str: ...
    def flush(self) -> str: ...


class BytePieces:
    """For byte-level vocabularies: every token is some bytes, and the text is their UTF-8."""

    def __init__(self, bytes_of: Callable[[int], bytes], after: Sequence[int] = ()) -> None:
        self._bytes_of = bytes_of
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        for token_id in after:
            self.push(token_id)

    def push(self, token_id: int) -> str:
        return self._utf8.decode(self._bytes_of(token_id))

    def flush(self) -> str:
        return self._utf8.decode(b"", final=True)


class WindowPieces:
    """For every other vocabulary: what a token adds to the text of the few tokens before it.

    A run of byte tokens waits for its end: libraries judge its UTF-8 as a whole.
    """

    def __init__(
        self, decode: Callable[[list[int]], str], is_byte: Callable[[int], bool], after: Sequence[int] = ()
    ) -> None:
        self._decode = decode
        self._is_byte = is_byte
        self._known: list[int] = list(after)  # shown already; they tell whether a space at the start is kept
        self._held: list[int] = []

    def push(self, token_id: int) -> str:
        self._held.append(token_id)
        if self._is_byte(token_id):
            return ""
        text = self._text()
        # A decoder of an unforeseen kind may still split characters; no character needs more tokens than this.
        return "" if text.endswith(REPLACEMENT) and len(self._held) < 5 else self._show(text)

    def flush(self) -> str:
        return self._show(self._text()) if self._held else ""

    def _text(self) -> str:
        return self._decode(self._known + self._held)[len(self._decode(self._known)) :]

    def _show(self, text: str) -> str:
        # Two tokens are memory enough for what looks back: a space at the start, repeats, "##" pieces.
        self._known, self._held = (self._known + self._held)[-2:], []
        return text


class Backend(Protocol):
    """What the two tokenizer libraries are used for."""

    size: int
    control: frozenset[str]  # tokens that only `special=True` makes from text
    hidden: frozenset[str]  # those of them that decode to nothing
    hidden_ids: frozenset[int]

    def token_to_id(self, token: str) -> int | None: ...
    def role_token(self, role: str) -> str | None: ...
    def affixes(self, role_ids: Mapping[str, int | None]) -> tuple[tuple[int, ...], tuple[int, ...]]: ...
    def encode(self, texts: Sequence[str], special: bool) -> list[list[int]]: ...
    def encode_part(self, text: str, special: bool, continues: bool) -> Encoded: ...
    def encode_special(self, texts: Sequence[str], spans: bool) -> Iterable[Encoded]: ...
    def decode(self, ids: list[int]) -> str: ...
    def stream(self, after: list[int]) -> Pieces: ...


class HuggingFaceBackend:
    """`tokenizer.json`, read by the tokenizers library."""

    def __init__(self, path: Path, templates: str, llama_scheme: str | None = None) -> None:
        from tokenizers import Tokenizer as Library

        open(path, "rb").close()  # a file that may not be read is not damaged
        try:
            self._library = Library.from_file(str(path))
        except Exception as error:  # the library raises nothing narrower
            raise _damaged(path, error) from error
        self._library.no_truncation()
        self._library.no_padding()
        if llama_scheme:
            self._split_as_llama(llama_scheme)
        self._lock = threading.Lock()  # `encode_special_tokens` is a setting of the library's object, not of a call
        added = self._library.get_added_tokens_decoder()
        self.size = max(self._library.get_vocab_size(), 1 + max(added, default=-1))
        self.hidden_ids = frozenset(i for i, token in added.items() if token.special)
        self.hidden = frozenset(added[i].content for i in self.hidden_ids)
        self.control = self.hidden | {t.content for t in added.values() if _steers(t.content, templates)}
        self._flag_special([token for token in added.values() if token.content in self.control - self.hidden])

    def _split_as_llama(self, scheme: str) -> None:
        from tokenizers.pre_tokenizers import Metaspace

        normalizer = self._library.normalizer
        if normalizer is not None and b'"Prepend"' in normalizer.__getstate__():
            self._library.normalizer = None
            self._library.pre_tokenizer = Metaspace(prepend_scheme=scheme, split=False)

    def _flag_special(self, tokens: list) -> None:
        """Let the library treat these added tokens as special too; their ids and matching stay."""
        from tokenizers import AddedToken

        flags = ("single_word", "lstrip", "rstrip", "normalized")
        again = [AddedToken(t.content, special=True, **{f: getattr(t, f) for f in flags}) for t in tokens]
        self._library.add_special_tokens(again)

    def token_to_id(self, token: str) -> int | None:
        return self._library.token_to_id(token)

    def role_token(self, role: str) -> str | None:
        usual = {"eos": USUAL_EOS, "bos": USUAL_BOS}.get(role, ())
        return next((token for token in usual if token in self.hidden), None)

    def affixes(self, role_ids: Mapping[str, int | None]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """By the post-processor alone: where there is a tokenizer.json, transformers ignores add_bos_token too."""
        bare = self._library.encode("a", add_special_tokens=False).ids
        full = self._library.encode("a").ids
        if not bare or bare == full:
            return (), ()
        start = next((i for i in range(len(full)) if full[i : i + len(bare)] == bare), len(full))
        return tuple(full[:start]), tuple(full[start + len(bare) :])

    def encode(self, texts: Sequence[str], special: bool) -> list[list[int]]:
        rows = self._encode_all(texts, special)
        if special or not self._leaks:
            return rows
        leaky = (not self._leaks.isdisjoint(row) for row in rows)
        cut = zip(texts, rows, leaky, strict=True)
        return [self._encode_cut(text, False).ids if leak else row for text, row, leak in cut]

    def _encode_all(self, texts: Sequence[str], special: bool) -> list[list[int]]:
        with self._lock:
            self._library.encode_special_tokens = not special
            # "fast" leaves out the offsets
            return [encoding.ids for encoding in self._library.encode_batch_fast(texts, add_special_tokens=False)]

    def _encode_one(self, text: str, special: bool) -> Any:
        with self._lock:
            self._library.encode_special_tokens = not special
            return self._library.encode(text, add_special_tokens=False)

    def encode_special(self, texts: Sequence[str], spans: bool) -> Iterable[Encoded]:
        if not spans:
            return (Encoded(ids, []) for ids in self._encode_all(texts, special=True))
        with self._lock:
            self._library.encode_special_tokens = False
            encodings = self._library.encode_batch(texts, add_special_tokens=False)
        return (Encoded(encoding.ids, encoding.offsets) for encoding in encodings)

    def encode_part(self, text: str, special: bool, continues: bool) -> Encoded:
        whole = self._encode_part(text, special, continues)
        return whole if special or self._leaks.isdisjoint(whole.ids) else self._encode_cut(text, continues)

    def _encode_part(self, text: str, special: bool, continues: bool) -> Encoded:
        if continues and self._newline:
            # Behind a newline the library adds no space before the text; then the newline goes again.
            behind = self._encode_one("\n" + text, special)
            n = len(self._newline)
            if behind.ids[:n] == self._newline:
                return Encoded(behind.ids[n:], [(start - 1, end - 1) for start, end in behind.offsets[n:]])
        encoding = self._encode_one(text, special)
        return Encoded(encoding.ids, encoding.offsets)

    @cached_property
    def _leaks(self) -> frozenset[int]:
        """Control ids that the vocabulary itself makes from plain text: those of a Unigram model can be."""
        ids = {i for token in self.control if (i := self._library.token_to_id(token)) is not None}
        rows = self._encode_all(sorted(self.control), special=False)
        return frozenset(ids.intersection(i for row in rows for i in row))

    def _encode_cut(self, text: str, continues: bool) -> Encoded:
        """Plain ids of a text cut behind the first character of every control token, so that none is whole."""
        matcher = any_of(self.control)
        cuts = [0, *(found.start() + 1 for found in matcher.finditer(text)), len(text)] if matcher else [0, len(text)]
        pieces = [
            (start, self._encode_part(text[start:end], False, continues or start > 0))
            for start, end in pairwise(cuts)
            if end > start
        ]
        ids = [i for _, piece in pieces for i in piece.ids]
        return Encoded(ids, [(start + a, start + b) for start, piece in pieces for a, b in piece.spans])

    @cached_property
    def _newline(self) -> list[int]:
        """The ids of a newline, where a text's first word is encoded otherwise than a later one; else nothing."""
        newline, word, both = self.encode(["\n", "a", "\na"], special=False)
        return newline if newline + word != both and both[: len(newline)] == newline else []

    def decode(self, ids: list[int]) -> str:
        return self._library.decode(ids, skip_special_tokens=False)

    def stream(self, after: list[int]) -> Pieces:
        if self._decoder_type == "ByteLevel":
            return BytePieces(self._bytes, after)
        return WindowPieces(self.decode, self._is_byte, after)

    @cached_property
    def _decoder_type(self) -> str:
        decoder = self._library.decoder
        return json.loads(decoder.__getstate__())["type"] if decoder is not None else ""

    def _bytes(self, token_id: int) -> bytes:
        token = self._library.id_to_token(token_id) or ""
        try:
            return bytes(BYTE_OF[char] for char in token)
        except KeyError:  # an added token, which is written as it reads
            return token.encode()

    def _is_byte(self, token_id: int) -> bool:
        return bool(BYTE_PIECE.fullmatch(self._library.id_to_token(token_id) or ""))


class SentencePieceBackend:
    """`tokenizer.model`, read by the sentencepiece library, and the tokens that JSON files add to it."""

    # These bytes, behind a serialized model, set its normalizer_spec.add_dummy_prefix to false: in protobuf the last
    # value of a field counts.
    NO_PREFIX = b"\x1a\x02\x18\x00"

    def __init__(self, path: Path, settings: Mapping[str, Any], added: Mapping[str, tuple[int, bool]], templates: str):
        from sentencepiece import SentencePieceProcessor

        model = path.read_bytes()
        if not model:
            raise _damaged(path, "it is empty")
        try:
            self._library = SentencePieceProcessor(model_proto=model)
            self._inside = SentencePieceProcessor(model_proto=model + self.NO_PREFIX)
        except Exception as error:  # the library raises nothing narrower
            raise _damaged(path, error) from error
        self._flags = settings
        self._prefix_everywhere = bool(settings.get("legacy", False))
        pieces = range(self._library.get_piece_size())
        own = {self._library.id_to_piece(i): i for i in pieces if self._is_reserved(i)}
        self._added = {token: i for token, (i, _) in added.items()} | own
        self._text_of = {i: token for token, i in self._added.items() if token not in own}
        self.size = max([len(pieces), *(i + 1 for i in self._text_of)])
        self.hidden = frozenset(own) | {token for token, (_, special) in added.items() if special}
        self.hidden_ids = frozenset(self._added[token] for token in self.hidden)
        self.control = self.hidden | {token for token in self._added if _steers(token, templates)}

    def _is_reserved(self, i: int) -> bool:
        return self._library.is_control(i) or self._library.is_unknown(i)

    def token_to_id(self, token: str) -> int | None:
        if token in self._added:
            return self._added[token]
        found = self._library.piece_to_id(token)
        return None if self._library.is_unknown(found) else found

    def role_token(self, role: str) -> str | None:
        ids = {"bos": self._library.bos_id(), "eos": self._library.eos_id(), "unk": self._library.unk_id()}
        found = ids.get(role, -1)
        return self._library.id_to_piece(found) if found >= 0 else None

    def affixes(self, role_ids: Mapping[str, int | None]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """By the flags in tokenizer_config.json."""
        found = {role: i for role, i in role_ids.items() if i is not None and self._flags.get(f"add_{role}_token")}
        return (found["bos"],) if "bos" in found else (), (found["eos"],) if "eos" in found else ()

    def encode(self, texts: Sequence[str], special: bool) -> list[list[int]]:
        return [self._encode(text, special) for text in texts]

    def _encode(self, text: str, special: bool) -> list[int]:
        ids: list[int] = []
        for at, part, token_id in self._split(text, special):
            ids += self._at(part, at > 0).encode(part) if token_id is None else [token_id]
        return ids

    def encode_part(self, text: str, special: bool, continues: bool) -> Encoded:
        ids: list[int] = []
        spans: list[tuple[int, int]] = []
        for at, part, token_id in self._split(text, special):
            if token_id is None:
                found = self._at(part, at > 0 or continues).encode(part, out_type="offset_mapping")
                ids += found["ids"]
                spans += [(at + start, at + end) for start, end in found["offsets"]]
            else:
                ids.append(token_id)
                spans.append((at, at + len(part)))
        return Encoded(ids, spans)

    def encode_special(self, texts: Sequence[str], spans: bool) -> Iterable[Encoded]:
        return (self.encode_part(text, special=True, continues=False) for text in texts)

    def _split(self, text: str, special: bool) -> Iterator[tuple[int, str, int | None]]:
        """The text cut at added tokens: `(start, part, id)`, with None for text in between."""
        matcher = self._matchers[special]
        at = 0
        for place, part in enumerate(matcher.split(text) if matcher else [text]):
            if part:
                yield at, part, self._added[part] if place % 2 else None
            at += len(part)

    def _at(self, text: str, inside: bool) -> Any:
        """The processor for text at this place: the one that puts a space first, or the other."""
        # As in transformers, a space at the start of a text is itself the space that goes before a first word.
        inside = (inside and not self._prefix_everywhere) or text.startswith((" ", "▁"))
        return self._inside if inside else self._library

    @cached_property
    def _matchers(self) -> tuple[re.Pattern[str] | None, re.Pattern[str] | None]:
        return any_of(set(self._added) - self.control), any_of(self._added)

    def decode(self, ids: list[int]) -> str:
        text = ""
        for is_byte, run in groupby(ids, key=self._is_byte):
            pieces = [self._text_of.get(i) or self._library.id_to_piece(i) for i in run]
            text += _joined_bytes(pieces) if is_byte else "".join(pieces).replace("▁", " ")
        return text.removeprefix(" ") if self._has_prefix else text

    @cached_property
    def _has_prefix(self) -> bool:
        return self._library.encode("a") != self._inside.encode("a")

    def stream(self, after: list[int]) -> Pieces:
        return WindowPieces(self.decode, self._is_byte, after)

    def _is_byte(self, token_id: int) -> bool:
        return token_id not in self._text_of and self._library.is_byte(token_id)


def _joined_bytes(pieces: Sequence[str]) -> str:
    """The text of pieces like `<0xE2>`; as in the tokenizers library, one bad byte spoils its whole run."""
    try:
        return bytes(int(piece[3:5], 16) for piece in pieces).decode()
    except UnicodeDecodeError:
        return REPLACEMENT * len(pieces)


def clean(text: str) -> str:
    """`text` without lone surrogates, which no UTF-8 and so no tokenizer can hold."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def _open_backend(directory: Path, settings: Mapping[str, Any]) -> Backend:
    templates = "".join(_chat_templates(directory, settings).values())
    if (path := directory / "tokenizer.json").is_file():
        return HuggingFaceBackend(path, templates, _llama_scheme(directory, settings))
    if (path := directory / "tokenizer.model").is_file():
        return SentencePieceBackend(path, settings, _added_tokens(directory, settings), templates)
    if not directory.is_dir():
        raise MissingError(f"{directory}: no such directory; a tokenizer is a directory with tokenizer.json in it")
    raise MissingError(
        f"{directory}: no tokenizer here (tokenizer.json or tokenizer.model); copy these files from the model's "
        f"repository, or make one: litgpt train_tokenizer TEXT --out_dir DIR"
    )


def _llama_scheme(directory: Path, settings: Mapping[str, Any]) -> str | None:
    """Where a tokenizer of Llama's class puts a space before text, None for others.

    For these classes transformers goes by the class, not by the normalizer in tokenizer.json, which puts one behind
    every special token as well; except for some model types, whose files it takes as they are.
    """
    name = str(settings.get("tokenizer_class")).removesuffix("Fast")
    model_type = _read_json(directory / "config.json").get("model_type")
    if name not in LLAMA_CLASSES or model_type in FILES_AS_THEY_ARE:
        return None
    if settings.get("add_prefix_space") is False:
        return "never"
    return "always" if settings.get("legacy") and name == "LlamaTokenizer" else "first"


def _read_json(path: Path) -> dict[str, Any]:
    """The mapping in a JSON file; nothing where there is no file."""
    return read_json(path) if path.is_file() else {}


def _damaged(path: Path, why: Exception | str) -> InputError:
    reason = one_line(why)[:200]
    return InputError(f"{path}: cannot be read, it is damaged or truncated ({reason}); copy or download it again")


def _text(token: object) -> str | None:
    """The text of a token as JSON files write it: a string, or a mapping with `content`."""
    if isinstance(token, Mapping):
        token = token.get("content")
    return token if isinstance(token, str) else None


def _named_tokens(directory: Path, settings: Mapping[str, Any], backend: Backend) -> dict[str, str]:
    listed = {**_read_json(directory / "special_tokens_map.json"), **settings}
    named = {}
    for role in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"):
        key = f"{role}_token"
        # A file that says null means none; only its silence leaves it to the tokenizer itself.
        text = _text(listed[key]) if key in listed else backend.role_token(role)
        if text is not None:
            named[key] = text
    return named


def _role_ids(path: Path) -> dict[str, tuple[int, ...]]:
    """The ids that a model's JSON file gives to bos, eos and pad; each may be a number or a list."""
    config = _read_json(path)
    nested = config.get("text_config")
    config = {**(nested if isinstance(nested, dict) else {}), **config}
    found = {}
    for role in ("bos", "eos", "pad"):
        value = config.get(f"{role}_token_id")
        ids = value if isinstance(value, list) else [value]
        if known := tuple(i for i in ids if isinstance(i, int) and i >= 0):
            found[role] = known
    return found


def _added_tokens(directory: Path, settings: Mapping[str, Any]) -> dict[str, tuple[int, bool]]:
    """Tokens that JSON files add to a SentencePiece model: text -> (id, whether it is special)."""
    added = {str(token): (int(i), True) for token, i in _read_json(directory / "added_tokens.json").items()}
    decoder = settings.get("added_tokens_decoder")
    for i, token in decoder.items() if isinstance(decoder, dict) else ():
        if (text := _text(token)) is not None:
            added[text] = (int(i), not isinstance(token, Mapping) or bool(token.get("special", False)))
    return added


def _chat_templates(directory: Path, settings: Mapping[str, Any]) -> dict[str, str]:
    """Templates by name. A file of its own goes before the entry in tokenizer_config.json."""
    entry = settings.get("chat_template") or _read_json(directory / "chat_template.json").get("chat_template")
    entries = entry if isinstance(entry, list) else [{"name": "default", "template": entry}]
    found = {e.get("name"): e.get("template") for e in entries if isinstance(e, dict)}
    templates = {str(name): text for name, text in found.items() if isinstance(text, str) and text}
    for path in sorted((directory / "additional_chat_templates").glob("*.jinja")):
        templates[path.stem] = _read_text(path)
    if (path := directory / "chat_template.jinja").is_file():
        templates["default"] = _read_text(path)
    return templates


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except ValueError as error:
        raise _damaged(path, error) from error


def _steers(token: str, templates: str) -> bool:
    return not token.isspace() and (token in templates or bool(MARKER.fullmatch(token)))


def any_of(tokens: Iterable[str]) -> re.Pattern[str] | None:
    """A pattern that finds the longest of these tokens, as one group."""
    longest_first = sorted(filter(None, tokens), key=len, reverse=True)
    return re.compile(f"({'|'.join(map(re.escape, longest_first))})") if longest_first else None


def _byte_alphabet() -> dict[str, int]:
    """The character that stands for each byte in byte-level vocabularies, turned round.

    Printable Latin-1 characters stand for themselves, the other 68 bytes for U+0100 and on.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(0x100 + i): b for i, b in enumerate(others)}


BYTE_OF = _byte_alphabet()
