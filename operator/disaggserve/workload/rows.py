"""Rows of the files that people hand in, each with its place for the sentence that refuses it."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Sequence
from pathlib import Path

from disaggserve.workload.requests import WorkloadError

MAX_TOKENS = 1_000_000  # a length of so many tokens or more is taken for a fault in the file


def text(path: Path, error: type[WorkloadError]) -> str:
    """The file's text, without a byte order mark."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as e:
        raise error(f"{path} cannot be read: {e.strerror}") from e
    except UnicodeDecodeError as e:
        raise error(f"{path} is not UTF-8 text") from e


def table(
    path: Path,
    content: str,
    headers: Sequence[Sequence[str]],
    error: type[WorkloadError],
    optional: str | None = None,
) -> Iterator[tuple[str, list[str]]]:
    """(where, the wanted columns) of each row, under the first of `headers` whose columns are all there.

    A column of the name `optional` comes last where the file has it.
    """
    reader = csv.reader(io.StringIO(content, newline=""), strict=True)
    try:
        found = [c.strip() for c in next(reader, [])]
        rows = [(reader.line_num, row) for row in reader]
    except csv.Error as e:
        raise error(f"{path}, line {reader.line_num}: is not CSV: {e}") from e
    columns = next((h for h in headers if set(h) <= set(found)), None)
    if columns is None:
        raise error(
            f"{path}, line 1: columns are {','.join(found) or 'none'}; "
            f"expected {' or '.join(','.join(h) for h in headers)}"
        )
    places = [found.index(c) for c in columns]
    if optional in found:
        places.append(found.index(optional))
    if not rows:
        raise error(f"{path} has no rows below its header")
    for line, row in rows:
        where = f"{path}, line {line}"
        if len(row) <= max(places):
            raise error(f"{where}: has {len(row)} columns where {','.join(found)} were expected")
        yield where, [row[p].strip() for p in places]


def tokens(error: type[WorkloadError], where: str, what: str, value: object, least: int = 1) -> int:
    """A whole number of tokens, written in digits or a JSON integer."""
    if isinstance(value, str) and value.isascii() and value.isdecimal():
        number = int(value[:12])
    elif isinstance(value, int) and not isinstance(value, bool):
        number = value
    else:
        number = -1
    if not least <= number < MAX_TOKENS:
        raise error(
            f"{where}: {what} is {value!r}, not a whole number of tokens from {least} to {MAX_TOKENS - 1:,}"
        )
    return number
