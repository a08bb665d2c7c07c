"""Traces in their own order, from our CSV and from two published formats, told apart by their first line.

    ours       arrival_s,input_tokens,output_tokens[,cached_tokens]           seconds
    Azure      TIMESTAMP,ContextTokens,GeneratedTokens                        2023-11-16 18:15:46.6805900
    Mooncake   {"timestamp": …, "input_length": …, "output_length": …, "hash_ids": […]}    ms, one object a line

Columns go by name, more are ignored. Azure's times count from its first row. Equal arrivals are allowed.
"""

from __future__ import annotations

import datetime
import json
import math
import re
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from disaggserve.workload import rows
from disaggserve.workload.requests import BadTrace, Requests

HASHED_TOKENS = 512  # of one block of a Mooncake prefix hash
_OURS = ("arrival_s", "input_tokens", "output_tokens")
_AZURE = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
_MOONCAKE = ("timestamp", "input_length", "output_length")
_STAMP = re.compile(r"(\d{4}-\d\d-\d\d[ T]\d\d:\d\d:\d\d)(?:\.(\d{1,9}))?(?:Z|[+]00:?00)?", re.ASCII)
_EPOCH = datetime.datetime(1970, 1, 1)


class _Row(NamedTuple):
    where: str
    arrival_us: int
    said: str  # the arrival as the file has it
    input: int
    output: int
    cached: int = 0
    blocks: Sequence[int] = ()  # prefix hashes, from the prompt's beginning


def read_trace(
    path: Path | str, *, context_length: int | None = None, cache_blocks: int | None = None
) -> Requests:
    """A trace from a file in one of the three formats.

    Prompt tokens found in a prefix cache come from `cached_tokens`, or from Mooncake's hashes, replayed by
    `replay_prefixes` over a cache of `cache_blocks` blocks of 512 tokens (None: without end); requests above
    `context_length` never reach that cache, though they stay in what is returned (`Requests.within`).

    Raises `BadTrace` with the line number for a row that is negative, empty, not a number, out of order, not
    JSON, or has a length of 0 or of a million tokens and more.
    """
    path = Path(path)
    content = rows.text(path, BadTrace)
    found = list(_ordered(_mooncake(path, content) if content.lstrip()[:1] == "{" else _csv(path, content)))
    requests = Requests(
        np.array([r.arrival_us for r in found], dtype=np.int64) * 1000,
        np.array([r.input for r in found], dtype=np.int32),
        np.array([r.output for r in found], dtype=np.int32),
    )
    cached = [r.cached for r in found]
    if any(r.blocks for r in found):
        served = [context_length is None or r.input + r.output <= context_length for r in found]
        cached = replay_prefixes(
            [(r.input, r.blocks if s else ()) for r, s in zip(found, served, strict=True)], cache_blocks
        )
    if not any(cached):
        return requests
    return Requests(requests.arrival_ns, requests.input, requests.output, np.array(cached, dtype=np.int32))


def replay_prefixes(
    prompts: Sequence[tuple[int, Sequence[int]]], cache_blocks: int | None = None
) -> list[int]:
    """Prompt tokens of each request that a prefix cache holds when it arrives.

    `prompts`: (input tokens, prefix hashes of its blocks of 512 tokens, in order). One cache for all, which
    forgets the least recently used block beyond `cache_blocks`; of one prompt the last block is the first to
    go, being of no use without those before it. A prompt's blocks are there for the next request at once,
    before its prefill has ended. The last token is computed always, as every engine does.
    """
    cache: OrderedDict[int, None] = OrderedDict()
    out: list[int] = []
    for tokens, blocks in prompts:
        hits = 0
        for block in blocks:
            if block not in cache:
                break
            hits += 1
        out.append(min(hits * HASHED_TOKENS, tokens - 1))
        for block in reversed(blocks):
            cache[block] = None
            cache.move_to_end(block)
        while cache_blocks is not None and len(cache) > cache_blocks:
            cache.popitem(last=False)
    return out


def _ordered(found: Iterator[_Row]) -> Iterator[_Row]:
    before = -1
    for row in found:
        if row.arrival_us < before:
            raise BadTrace(
                f"{row.where}: arrives at {row.said}, before the line above; sort the trace by arrival"
            )
        before = row.arrival_us
        yield row


def _csv(path: Path, content: str) -> Iterator[_Row]:
    header = content.split("\n", 1)[0]
    azure = "TIMESTAMP" in header
    columns = _AZURE if azure else _OURS
    start: int | None = None
    for where, row in rows.table(path, content, (columns,), BadTrace, None if azure else "cached_tokens"):
        arrival_us = _stamp_us(where, row[0]) if azure else _seconds_us(where, row[0])
        if azure:
            start = arrival_us if start is None else start
            arrival_us -= start
        prompt = rows.tokens(BadTrace, where, columns[1], row[1])
        output = rows.tokens(BadTrace, where, columns[2], row[2])
        cached = rows.tokens(BadTrace, where, "cached_tokens", row[3], least=0) if len(row) > 3 else 0
        if cached >= prompt:
            raise BadTrace(
                f"{where}: cached_tokens is {cached} of a prompt of {prompt}; at least one token is computed"
            )
        yield _Row(where, arrival_us, f"{row[0]} s" if not azure else row[0], prompt, output, cached)


def _seconds_us(where: str, text: str) -> int:
    try:
        arrival_s = float(text)
    except ValueError:
        arrival_s = math.nan
    if not 0 <= arrival_s < 1e9:
        raise BadTrace(f"{where}: arrival_s is {text!r}, not a number of seconds from 0 on")
    return round(arrival_s * 1e6)


def _stamp_us(where: str, text: str) -> int:
    """Microseconds since 1970 of a time of day with up to nine digits of a second, rounded half up."""
    match = _STAMP.fullmatch(text)
    try:
        whole = datetime.datetime.fromisoformat(match[1]) if match else None
    except ValueError:
        whole = None
    if match is None or whole is None:
        raise BadTrace(f"{where}: TIMESTAMP is {text!r}, not a time such as 2023-11-16 18:15:46.6805900")
    fraction = (int((match[2] or "").ljust(9, "0")) + 500) // 1000
    return (whole - _EPOCH) // datetime.timedelta(microseconds=1) + fraction


def _mooncake(path: Path, content: str) -> Iterator[_Row]:
    for number, line in enumerate(content.splitlines(), 1):
        where = f"{path}, line {number}"
        try:
            value = json.loads(line)
        except ValueError:
            value = None
        if not isinstance(value, dict) or not set(_MOONCAKE) <= set(value):
            raise BadTrace(f"{where}: is no JSON object with {', '.join(_MOONCAKE)}")
        ms, blocks = value["timestamp"], value.get("hash_ids", [])
        if isinstance(ms, bool) or not isinstance(ms, int | float) or not 0 <= ms < 1e12:
            raise BadTrace(f"{where}: timestamp is {ms!r}, not a number of milliseconds from 0 on")
        prompt = rows.tokens(BadTrace, where, "input_length", value["input_length"])
        output = rows.tokens(BadTrace, where, "output_length", value["output_length"])
        if not isinstance(blocks, list) or not all(type(b) is int for b in blocks):
            raise BadTrace(f"{where}: hash_ids is no list of whole numbers")
        if len(blocks) > -(-prompt // HASHED_TOKENS):
            raise BadTrace(
                f"{where}: hash_ids has {len(blocks)} blocks of {HASHED_TOKENS} tokens for a prompt of {prompt}"
            )
        yield _Row(where, round(ms * 1000), f"{ms} ms", prompt, output, blocks=blocks)
