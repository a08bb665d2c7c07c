"""What prompts began with, and where: so that a prompt can go to where its beginning has been computed.

The router has no tokenizer: a prompt of token ids is cut by 64 of them, a text by the bytes of about as many. Hashes are of a
piece and of all before it, so a known one is a known beginning. What an instance has forgotten meanwhile is not known here: a
wrong guess costs balance no more than the prompt's own length (`dispatch.choose_prefill`).
"""

from __future__ import annotations

from collections.abc import Sequence

PIECE_TOKENS = 64
_PIECE_BYTES = 256  # of English text under the usual tokenizers, four to a token
MOST_PIECES = 4096  # per instance: a quarter of a million tokens

Prefix = tuple[int, ...]


def prefix(prompt: bytes | Sequence[int]) -> Prefix:
    """Hashes of the whole pieces of a text or of token ids, each with all before it. They hold in this process only."""
    text = isinstance(prompt, bytes)
    size, whole = (_PIECE_BYTES, prompt) if text else (PIECE_TOKENS, tuple(prompt))
    out: list[int] = []
    before = 0
    for at in range(0, len(whole) - size + 1, size):
        before = hash((before, whole[at : at + size]))
        out.append(before)
    return tuple(out)


class Prefixes:
    """Beginnings that were sent to one instance, the latest `most` pieces of them."""

    def __init__(self, most: int = MOST_PIECES) -> None:
        self._most = most
        self._pieces: dict[int, None] = {}  # the least lately used first

    def __len__(self) -> int:
        return len(self._pieces)

    def known_tokens(self, prefix: Prefix) -> int:
        """Tokens of the longest beginning that was sent there."""
        known = 0
        for piece in prefix:
            if piece not in self._pieces:
                break
            known += PIECE_TOKENS
        return known

    def note(self, prefix: Prefix) -> None:
        """It was sent there."""
        # The end first: of a beginning that is forgotten, the rest is of no use.
        for piece in reversed(prefix[: self._most]):
            self._pieces.pop(piece, None)
            self._pieces[piece] = None
        while len(self._pieces) > self._most:
            del self._pieces[next(iter(self._pieces))]
