"""`disaggworker profile`: flags in, CSV out; progress and what was left out go to stderr."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from disaggworker.errors import StartError
from disaggworker.profiling import grid


def run(argv: Sequence[str]) -> int:
    """Measure and write; the exit code. Raises `StartError`; wrong usage ends the process with 2."""
    flags = _flags(argv)
    if flags.output != "-" and not Path(flags.output).absolute().parent.is_dir():
        raise StartError(f"-o {flags.output}: {Path(flags.output).parent} is not a folder.")
    with contextlib.ExitStack() as stack:
        door: grid.Door
        if flags.url:
            from disaggworker.profiling.over_http import OverHTTP

            door = stack.enter_context(OverHTTP(flags.url, flags.model, flags.context_length))
            cells, said = _cells(flags, door.context)
        else:
            # torch takes seconds to import: only who needs it pays.
            from disaggworker.profiling.inside import Inside

            door = Inside.load(flags.weights, flags.dtype, flags.context_length)
            cells, said = _cells(flags, door.context)
            door.prepare(cells)
        console = Console(stderr=True)
        columns = TextColumn("measuring"), MofNCompleteColumn(), TimeRemainingColumn()
        progress = stack.enter_context(
            Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
        )
        task = progress.add_task("", total=len(cells) * (flags.repeat + 1))
        measured, more = grid.measure(door, cells, flags.repeat, lambda: progress.advance(task))
    for sentence in said + more:
        print(f"left out: {sentence}", file=sys.stderr)
    for phase in ("prefill", "decode"):
        if not any(cell.phase == phase for cell in measured):
            raise StartError(f"No {phase} could be measured; give shorter lengths or smaller batches.")
    _write(grid.table(measured, flags.tp, flags.pp), flags.output)
    return 0


def _cells(flags: argparse.Namespace, context: int) -> tuple[list[grid.Cell], list[str]]:
    cells, said = grid.cells(flags.batches, flags.prompts, flags.contexts, context, flags.repeat)
    if not cells:
        raise StartError(
            f"Every length is beyond the context of {context}; give shorter --prompts and --contexts."
        )
    return cells, said


def _write(text: str, output: str) -> None:
    if output == "-":
        sys.stdout.write(text)
        return
    try:
        Path(output).write_text(text, encoding="utf-8")
    except OSError as e:
        raise StartError(f"-o {output} cannot be written: {e.strerror}.") from None


def _count(text: str) -> int:
    if not (text.isascii() and text.isdecimal()) or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def _counts(text: str) -> tuple[int, ...]:
    return tuple(sorted({_count(part.strip()) for part in text.split(",")}))


def _flags(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="disaggworker profile",
        description="Measures steps of an engine and writes them as CSV for `disaggserve fit`: of ours, loaded here "
        "(--weights), or of an idle server of OpenAI's API with one instance, or one of each role (--url).",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--model", required=True, help="Hugging Face id; with --url the name that the server goes by")
    door = parser.add_mutually_exclusive_group(required=True)
    door.add_argument("--weights", type=Path, help="folder of safetensors and config.json")
    door.add_argument("--url", help="http://host:port/v1")
    add("--dtype", choices=["auto", "float16", "bfloat16", "float32"], default="auto", help="with --weights")
    add("--context-length", type=_count, default=0, help="tokens; default: the model's, or the server's word")
    add("--batches", type=_counts, default="1,2,4,8,16", help="requests in a step")
    add("--prompts", type=_counts, default="64,128,256,512,1024", help="tokens of a prompt")
    add(
        "--contexts", type=_counts, default="64,256,512,1024", help="tokens of a request before a decode step"
    )
    add("--repeat", type=_count, default=5, help="passes over the grid, of which the mean is taken")
    add("--tp", type=_count, default=1, help="with --url: tensor-parallel GPUs of the server, for the rows")
    add("--pp", type=_count, default=1, help="with --url: pipeline stages of the server, for the rows")
    add("-o", "--output", default="-", help="CSV to write; default: standard output")
    flags = parser.parse_args(argv)
    if flags.weights and (flags.tp, flags.pp) != (1, 1):
        parser.error(
            "--tp and --pp are for --url; --weights is profiled on one GPU, and a server of any shape by --url"
        )
    return flags
