"""Between the text of a request and the tokens of the engine: prompts in, pieces of an answer out."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer

from disaggworker import openai
from disaggworker.chat import ChatTemplate
from disaggworker.engine.detokenize import TextStream, token_bytes
from disaggworker.engine.sequence import Token
from disaggworker.errors import RequestError


class Text:
    """The tokenizer of one model and its context, in tokens of prompt and answer together."""

    def __init__(self, folder: Path, context: int) -> None:
        """Raises whatever `tokenizers` raises for a file that it cannot read."""
        self.context = context
        self._tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self._template = ChatTemplate(folder)
        self.bytes = token_bytes(self._tokenizer)

    def spelling(self, token: int) -> bytes:
        """The token's bytes; a special token's name."""
        spelt = self.bytes[token] if token < len(self.bytes) else b""
        return spelt or (self._tokenizer.id_to_token(token) or "").encode()

    def prompt(self, ask: openai.Ask) -> list[int]:
        """The tokens to compute. Raises `RequestError`."""
        if ask.chat:
            text = self._template.render(ask.body.get("messages"))
            tokens: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        else:
            prompt = ask.body.get("prompt")
            if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], (str, list)):
                prompt = prompt[0]
            if isinstance(prompt, str):
                tokens = self._tokenizer.encode(prompt).ids
            elif isinstance(prompt, list) and all(type(token) is int for token in prompt):
                tokens = prompt
            else:
                raise RequestError(
                    "prompt must be one string or one list of token ids; send several prompts as several requests.",
                    param="prompt",
                )
        param = "messages" if ask.chat else "prompt"
        if not tokens:
            raise RequestError("The prompt has no tokens.", param=param)
        if not all(0 <= token < len(self.bytes) for token in tokens):
            raise RequestError(f"The prompt holds token ids outside 0 to {len(self.bytes) - 1}.", param=param)
        if len(tokens) >= self.context:
            raise RequestError(
                f"The prompt has {len(tokens)} tokens; with at least one token of answer it must stay within the context of {self.context}.",
                param=param,
                code="context_length_exceeded",
            )
        return tokens

    def limit(self, ask: openai.Ask, prompt_tokens: int) -> int:
        """Tokens that the answer may have."""
        room = self.context - prompt_tokens
        return room if ask.max_tokens is None else min(ask.max_tokens, room)


def shown(stream: TextStream, token: Token, finish: str | None) -> openai.Piece:
    """What one more token shows. The engine's own "stop" is a token's, whose text is no part of the answer."""
    offset = stream.length
    text = "" if finish == "stop" else stream.push(token.id)
    if stream.stopped:
        finish = "stop"
    elif finish:
        text += stream.finish()
    return openai.Piece(token, text, offset, finish)


class Reply:
    """An answer as it grows, on the event loop. A decode worker's begins with the prefill worker's token."""

    def __init__(
        self, table: list[bytes], ask: openai.Ask, first: Token | None = None, answered: Sequence[int] = ()
    ) -> None:
        """`answered`: tokens before the first one here, which the client has."""
        self._stream = TextStream(table, ask.stops, answered)
        self._waiter: asyncio.Future[None] | None = None
        self._streams = ask.stream
        self.pieces: list[openai.Piece] = []
        self.tokens = len(answered)
        self.finish: str | None = None
        if first is not None:
            piece = shown(self._stream, first, None)
            self.tokens += 1
            # The router has streamed the first token.
            self.pieces = [] if ask.stream else [piece]

    def on_token(self, token: Token, finish: str | None) -> None:
        """One more token; none after the last."""
        if self.finish:
            return
        piece = shown(self._stream, token, finish)
        self.tokens += 1
        self.finish = piece.finish
        self.pieces.append(piece)
        if self._waiter and not self._waiter.done():
            self._waiter.set_result(None)

    async def begun(self) -> None:
        """Until there is a token."""
        if not self.tokens:
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter

    async def wait(self) -> None:
        """Until there is something to take, or the end."""
        if not (self._streams and self.pieces) and not self.finish:
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter

    def take(self) -> list[openai.Piece]:
        """What came since the last time."""
        pieces, self.pieces = self.pieces, []
        return pieces
