"""What tests of the data plane share: one process with torch imported, from which all their workers are forked."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from e2e.dataplane import DataPlane, fork_server
from e2e.nodes.processes import ForkServerClient
from e2e.nodes.tiny import make_tiny
from tests.integration.served import MODEL, Background, Served, serve


@pytest.fixture(scope="session")
def background() -> Iterator[Background]:
    made = Background()
    yield made
    made.close()


@pytest.fixture(scope="session")
def forks(background: Background, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ForkServerClient]:
    pytest.importorskip("torch")
    with background.inside(fork_server(tmp_path_factory.mktemp("forks"))) as forks:
        yield forks


@pytest.fixture(scope="session")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny(MODEL, tmp_path_factory.mktemp("model") / "weights")


@pytest.fixture(scope="module")
def served(
    background: Background, forks: ForkServerClient, weights: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Served]:
    plane = DataPlane(forks, tmp_path_factory.mktemp("plane"), MODEL, weights)
    with background.inside(serve(background, plane)) as made:
        yield made
