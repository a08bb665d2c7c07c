"""tp × pp ranks of one instance: transformers' logits, and what happens when one of them ends."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Coroutine, Iterator
from pathlib import Path
from typing import Any

import pytest

from e2e.nodes.processes import WORKER_MODULES, ForkServerClient
from e2e.nodes.tiny import make_tiny

torch = pytest.importorskip("torch")

MODELS = {"opt": "facebook/opt-13b", "llama": "meta-llama/Meta-Llama-3-8B", "qwen3": "Qwen/Qwen3-0.6B"}
SHAPES = ((2, 1), (1, 2), (2, 2))
ROOT = Path(__file__).parents[2]


class Server:
    """A fork server that has imported torch, and the loop that it is spoken to on: ranks start in milliseconds."""

    def __init__(self, folder: Path) -> None:
        self.folder, self._runner = folder, asyncio.Runner()
        # The ranks inherit the path that this checkout is found on.
        self.env = os.environ | {
            "PYTHONPATH": os.pathsep.join(map(str, (ROOT / "operator", ROOT / "worker_image", ROOT)))
        }
        self.client = self.run(
            ForkServerClient.start(folder / "server.log", [*WORKER_MODULES, "tests.integration.rank_case"])
        )

    def run(self, work: Coroutine[Any, Any, Any]) -> Any:
        return self._runner.run(work)

    def call(self, function: str, *argv: str) -> tuple[int, str]:
        """Exit code and output of one call."""

        async def go() -> int:
            process = await self.client.spawn(
                ["case", *argv], env=self.env, cwd=self.folder, log=log, call=function
            )
            return await process.wait()

        log = self.folder / "case.log"
        log.write_text("")
        return self.run(go()), log.read_text()

    def close(self) -> None:
        self.run(self.client.close())
        self._runner.close()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("ranks"))
    yield server
    server.close()


@pytest.mark.parametrize("name", MODELS)
def test_logits_of_every_shape_are_those_of_transformers(server: Server, name: str) -> None:
    os.environ["TRANSFORMERS_OFFLINE"] = "1"
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    from tests.integration.rank_case import LENGTHS, steps, texts

    folder = make_tiny(MODELS[name], server.folder / name, layers=2, heads=4, hidden=64)
    oracle: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.inference_mode():
        expected = [oracle(torch.tensor([text])).logits[0] for text in texts()]
    seen = set()
    for tp, pp in SHAPES:
        out = server.folder / f"{name}-{tp}-{pp}"
        code, said = server.call(
            "tests.integration.rank_case:main", str(folder), str(tp), str(pp), "float32", str(out)
        )
        assert code == 0, said
        given = load_file(out)
        for number, (rows, ends, _) in enumerate(steps(2)):
            wanted = torch.stack([expected[row][end - 1] for row, end in zip(rows, ends, strict=True)])
            torch.testing.assert_close(given[str(number)], wanted, atol=3e-4, rtol=1e-5)
            seen.update(zip(rows, ends, strict=True))
    assert len(seen) > len(LENGTHS)
