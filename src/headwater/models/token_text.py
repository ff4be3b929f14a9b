"""The bytes that tokens spell: what two models with different tokenizers have in common."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from transformers.convert_slow_tokenizer import bytes_to_unicode

from headwater.models.language_model import LanguageModel

_BYTE = re.compile(r"<0x([0-9A-F]{2})>")
_PROBE = " 12+3 = 15.\n\nSo é, 日本 and 🙂"


@dataclass(frozen=True)
class TokenText:
    """A model's tokens as bytes."""

    model: LanguageModel
    pieces: tuple[bytes | None, ...]
    """Bytes of every token id; None for special tokens, which spell no text."""
    special: Mapping[int, str]
    """The special tokens' names."""
    end: int
    """The special token that stands for the end of a completion."""

    def ids(self, text: str) -> list[int]:
        """The tokenizer's own tokens of a text; what looks like a special token in it is text."""
        # Not for batches, whose type this is.
        return list(self.model.tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"])  # pyright: ignore -- one text

    def read(self, ids: Sequence[int]) -> list[bytes]:
        """The leading tokens of a completion that spell valid UTF-8 and are not special, as bytes."""
        pieces: list[bytes] = []
        for token in ids:
            if (piece := self.pieces[token]) is None:
                break
            pieces.append(piece)
        while True:
            try:
                b"".join(pieces).decode("utf-8")
                return pieces
            except UnicodeDecodeError as error:
                length = sum(map(len, pieces))
                while length > error.start:
                    length -= len(pieces.pop())


def token_text(model: LanguageModel) -> TokenText:
    """The model's tokens as bytes, of tokenizers on bytes (GPT-2, Qwen, Llama 3) or with byte fallback (Gemma).

    Raises ValueError for a tokenizer that does not give its text back.
    """
    tokenizer, name = model.tokenizer, model.config.source
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ValueError(f"{name}: its tokenizer has no tokenizer.json, which tells its tokens' bytes; convert it")
    to_byte = {char: byte for byte, char in bytes_to_unicode().items()} if "ByteLevel" in repr(backend.decoder) else {}
    added = {i: token.content for i, token in tokenizer.added_tokens_decoder.items()}
    special = {i: name for i, name in added.items() if tokenizer.added_tokens_decoder[i].special}
    tokens: list[str] = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))  # pyright: ignore -- of a list
    pieces = [added[i].encode() if i in added else _piece(token, to_byte) for i, token in enumerate(tokens)]
    end = tokenizer.eos_token_id if isinstance(tokenizer.eos_token_id, int) else model.eos_ids[0]
    special.setdefault(end, tokens[end])
    made = TokenText(model, tuple(None if i in special else piece for i, piece in enumerate(pieces)), special, end)
    if b"".join(made.read(made.ids(_PROBE))) != _PROBE.encode():
        raise ValueError(f"{name}: its tokenizer changes the text {_PROBE!r}: its tokens cannot be aligned by bytes")
    return made


def _piece(token: str, to_byte: dict[str, int]) -> bytes:
    if to_byte:
        return bytes(to_byte[c] for c in token) if to_byte.keys() >= set(token) else token.encode()
    if found := _BYTE.fullmatch(token):
        return bytes([int(found[1], 16)])
    return token.replace("▁", " ").encode()


def shared_tokens(student: TokenText, teacher: TokenText) -> list[int]:
    """For every id of the teacher the student's id of the same bytes, -1 where there is none.

    End goes to end, other special tokens to those of the same name. No id of the student occurs twice: of two equal
    tokens the one with the lower id counts.
    """
    ours: dict[bytes | str, int] = {}
    for i, piece in enumerate(student.pieces):
        ours.setdefault(piece or student.special[i], i)
    del ours[student.special[student.end]]
    return [
        student.end if i == teacher.end else ours.pop(piece or teacher.special[i], -1)
        for i, piece in enumerate(teacher.pieces)
    ]


def align(ours: Sequence[bytes], theirs: Sequence[bytes]) -> list[tuple[int, int]]:
    """Minimal spans of two tokenisations: how many tokens of each spell the next piece of text, the same for both.

    The spans follow each other from the start; where both spell one text they partition both. They end before the first
    that does not agree.
    """
    spans: list[tuple[int, int]] = []
    i = j = 0
    while i < len(ours) and j < len(theirs):
        a, b, start = ours[i], theirs[j], (i, j)
        i, j = i + 1, j + 1
        while a != b:
            if len(a) < len(b) and i < len(ours) and b.startswith(a):
                a, i = a + ours[i], i + 1
            elif len(b) < len(a) and j < len(theirs) and a.startswith(b):
                b, j = b + theirs[j], j + 1
            else:
                return spans
        spans.append((i - start[0], j - start[1]))
    return spans
