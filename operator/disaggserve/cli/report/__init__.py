"""`disaggserve plan --report DIR`: one self-contained HTML page that explains a plan.

`curves` simulates and searches what the page shows, `figures` draws it, `page` writes the words around it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from disaggserve import plan as planning
from disaggserve.api.errors import InvalidInput
from disaggserve.cli.report import curves
from disaggserve.cli.report.curves import Asked

PAGE = "index.html"
__all__ = ["PAGE", "Asked", "write"]


def write(directory: Path, asked: Asked, draft: planning.Draft) -> Path:
    """Writes the page and returns its path. Raises InvalidInput where the folder cannot be written."""
    try:
        from disaggserve.cli.report import page
    except ModuleNotFoundError as error:
        raise InvalidInput(
            f"--report needs {error.name}, which is not installed; install disaggserve[plan]"
        ) from None
    try:
        directory.mkdir(parents=True, exist_ok=True)
        path = directory / PAGE
        with _progress() as tell:
            found = curves.collect(asked, draft, tell)
            tell("drawing", 0, 1)
            path.write_text(
                page.render(asked.spec, draft, planning.inventory(asked.spec, asked.facts), found),
                encoding="utf-8",
            )
    except OSError as error:
        raise InvalidInput(
            f"--report {directory}: cannot be written ({error.strerror}); name a folder that can be"
        ) from None
    return path


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
