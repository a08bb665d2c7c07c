"""Text from tokens, one by one: bytes that are not yet a character wait, and so does what may begin a stop string."""

from __future__ import annotations

import codecs
import json
from collections.abc import Mapping, Sequence
from typing import Any

from tokenizers import Tokenizer


def _byte_letters() -> dict[str, int]:
    """The letters with which byte-level BPE writes bytes (GPT-2's table, part of every such tokenizer)."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [b for b in range(256) if b not in plain]
    return {chr(b): b for b in plain} | {chr(256 + i): b for i, b in enumerate(rest)}


def token_bytes(tokenizer: Tokenizer) -> list[bytes]:
    """The bytes of each token id; none for special tokens. Byte-level BPE, and SentencePiece with byte fallback."""
    letters = _byte_letters()
    described: Mapping[str, Any] = json.loads(tokenizer.to_str())
    special = {t["id"] for t in described["added_tokens"] if t["special"]}
    added = {t["id"] for t in described["added_tokens"]}
    byte_level = "ByteLevel" in json.dumps(described["decoder"])
    vocabulary = tokenizer.get_vocab()
    table = [b""] * (max(vocabulary.values(), default=-1) + 1)
    for token, number in vocabulary.items():
        if number in special:
            continue
        if number in added:
            table[number] = token.encode()
        elif byte_level:
            table[number] = bytes(letters[c] for c in token if c in letters)
        elif len(token) == 6 and token.startswith("<0x"):
            table[number] = bytes([int(token[3:5], 16)])
        else:
            table[number] = token.replace("▁", " ").encode()
    return table


class TextStream:
    """One answer's text. Two workers that are given the same tokens hold back the same text between them."""

    def __init__(
        self, table: Sequence[bytes], stops: Sequence[str] = (), answered: Sequence[int] = ()
    ) -> None:
        """`answered`: tokens whose text somebody else has said; it goes on after them."""
        self._table, self._stops = table, stops
        self._decode = codecs.getincrementaldecoder("utf-8")("replace").decode
        self._held = ""
        self.stopped = False
        self.length = 0  # of the text of all tokens so far, in letters: where the next one begins
        for token in answered:
            self.push(token)

    def push(self, token: int) -> str:
        """The text that this token adds for sure; sets `stopped` when a stop string is complete (its text is cut)."""
        data = self._table[token] if token < len(self._table) else b""
        text = self._decode(data)
        self.length += len(text)
        return self._release(text) if self._stops else text

    def finish(self) -> str:
        """What was held back, when nothing follows."""
        if self.stopped:
            return ""
        text = self._held + self._decode(b"", True)
        self._held = ""
        return text

    def _release(self, text: str) -> str:
        text = self._held + text
        ends = [at for stop in self._stops if (at := text.find(stop)) >= 0]
        if ends:
            self.stopped, self._held = True, ""
            return text[: min(ends)]
        keep = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _overlap(text: str, stop: str) -> int:
    """Letters at the end of `text` with which `stop` begins."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
