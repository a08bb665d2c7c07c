"""`disaggserve plan --report DIR`: one self-contained HTML page that explains a plan.

`curves` simulates and searches what the page shows, `figures` draws it, `page` writes the words around it.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from disaggserve import plan as planning
from disaggserve.api.errors import InvalidInput
from disaggserve.cli.report import curves
from disaggserve.cli.report.curves import Asked

PAGE = "index.html"
__all__ = ["PAGE", "Asked", "prepare", "write"]


def prepare(directory: Path) -> None:
    """Makes the folder, before anything is searched. Raises InvalidInput where no page could be written into it."""
    try:
        import_module(f"{__name__}.page")
    except ModuleNotFoundError as error:
        raise InvalidInput(
            f"--report needs {error.name}, which is not installed; install disaggserve[plan]"
        ) from None
    with _writing(directory):
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            pass


def write(directory: Path, asked: Asked, draft: planning.Draft) -> Path:
    """Writes the page into a prepared folder and returns its path. Raises InvalidInput where it cannot be written."""
    from disaggserve.cli.report import page

    path = directory / PAGE
    with _progress() as tell:
        found = curves.collect(asked, draft, tell)
        tell("drawing", 0, 1)
        text = page.render(asked.spec, draft, planning.inventory(asked.spec, asked.facts), found)
    with _writing(directory):
        path.write_text(text, encoding="utf-8")
    return path


@contextmanager
def _writing(directory: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise InvalidInput(
            f"--report {directory}: cannot be written ({error.strerror}); name a folder that can be"
        ) from None


@contextmanager
def _progress() -> Iterator[curves.Tell]:
    """A bar for each kind of work on a terminal, nothing when piped."""
    if not sys.stderr.isatty():
        yield lambda what, done, of: None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("", total=None)
        yield lambda what, done, of: progress.update(task, description=what, completed=done, total=of)
