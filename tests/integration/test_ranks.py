"""tp × pp ranks of one instance: transformers' logits, and what happens when one of them ends."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from e2e.nodes.processes import WORKER_MODULES, ForkServerClient
from e2e.nodes.tiny import make_tiny

torch = pytest.importorskip("torch")

MODELS = {"opt": "facebook/opt-13b", "llama": "meta-llama/Meta-Llama-3-8B", "qwen3": "Qwen/Qwen3-0.6B"}
SHAPES = ((2, 1), (1, 2), (2, 2))
PORT, KV_PORT = 8441, 5641
_NET = f"127.0.{21 + os.getpid() % 200}"  # of this process alone, as in worker_pair
HOSTS = [f"{_NET}.{n}" for n in (11, 12, 13)]
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

    def call(self, function: str, *argv: str, host: str = "") -> tuple[int, str]:
        """Exit code and output of one call."""

        async def go() -> int:
            process = await self.client.spawn(
                ["case", *argv], env=self.env | {"POD_IP": host}, cwd=self.folder, log=log, call=function
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


def transformers_model(folder: Path) -> Any:
    """What is right, in float32."""
    os.environ["TRANSFORMERS_OFFLINE"] = "1"
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.mark.parametrize("name", MODELS)
def test_logits_of_every_shape_are_those_of_transformers(server: Server, name: str) -> None:
    from safetensors.torch import load_file

    from tests.integration.rank_case import LENGTHS, steps, texts

    folder = make_tiny(MODELS[name], server.folder / name, layers=2, heads=4, hidden=64)
    oracle = transformers_model(folder)
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


def test_half_precision_is_as_near_as_transformers_own(server: Server) -> None:
    from safetensors.torch import load_file

    from tests.integration.rank_case import steps, texts

    folder = make_tiny(MODELS["llama"], server.folder / "llama", layers=2, heads=4, hidden=64)
    exact, half = transformers_model(folder), transformers_model(folder).to(torch.bfloat16)
    out = server.folder / "half"
    code, said = server.call("tests.integration.rank_case:main", str(folder), "2", "2", "bfloat16", str(out))
    assert code == 0, said
    given = load_file(out)
    with torch.inference_mode():
        right = [exact(torch.tensor([text])).logits[0] for text in texts()]
        near = [half(torch.tensor([text])).logits[0].float() for text in texts()]
    ours, theirs = [], []
    for number, (rows, ends, _) in enumerate(steps(2)):
        for i, (row, end) in enumerate(zip(rows, ends, strict=True)):
            assert given[str(number)].dtype == torch.bfloat16
            ours.append((given[str(number)][i].float() - right[row][end - 1]).abs().mean())
            theirs.append((near[row][end - 1] - right[row][end - 1]).abs().mean())
    assert sum(ours) < 1.3 * sum(theirs)


class Worker:
    """A worker of several ranks, forked like a container on the local control plane."""

    def __init__(
        self, server: Server, folder: Path, tp: int, pp: int, host: str, role: str = "prefill"
    ) -> None:
        self.server, self.host = server, host
        self.log = server.folder / f"worker-{host}.log"
        self.log.unlink(missing_ok=True)
        argv = ["disaggworker", role, "--model", "tiny", "--weights", str(folder), "--pairing-key", "k"]
        argv += [
            "--port",
            str(PORT),
            "--kv-port",
            str(KV_PORT),
            "--tp",
            str(tp),
            "--pp",
            str(pp),
            "--lease-s",
            "1",
        ]
        spawn = server.client.spawn(
            argv,
            env=server.env | {"POD_IP": host},
            cwd=server.folder,
            log=self.log,
            call="disaggworker.__main__:main",
        )
        self.process = server.run(spawn)

    def ranks(self) -> list[int]:
        """Process ids of the ranks beside it."""
        return [
            int(pid)
            for pid in Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        ]

    def ask(self, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        data = None if body is None else json.dumps(body).encode()
        with urllib.request.urlopen(f"http://{self.host}:{PORT}{path}", data, timeout=60) as answer:
            given: dict[str, Any] = json.load(answer)
            return given

    def until(self, condition: Callable[[], bool]) -> None:
        """Wait for it."""
        end = time.monotonic() + 60
        while not condition():
            assert self.process.running, self.log.read_text()
            assert time.monotonic() < end
            self.server.run(asyncio.sleep(0.01))

    def wait_ready(self) -> None:
        """Wait until it serves."""

        def ready() -> bool:
            with contextlib.suppress(urllib.error.URLError):
                return bool(self.ask("/ready"))
            return False

        self.until(ready)

    def first(self, prompt: list[int], max_tokens: int = 1) -> dict[str, Any]:
        """The answer of a prefill worker."""
        body = {"prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "return_token_ids": True}
        return self.ask(
            "/v1/completions", body | {"ignore_eos": True, "kv_transfer_params": {"do_remote_decode": True}}
        )

    def first_token(self, prompt: list[int]) -> int:
        [token] = self.first(prompt)["choices"][0]["token_ids"]
        return int(token)

    def rest(self, prompt: list[int], first: dict[str, Any], max_tokens: int) -> list[int]:
        """All tokens of the answer that a decode worker gives to what a prefill worker gave."""
        body = {"prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "return_token_ids": True}
        params = {"ignore_eos": True, "kv_transfer_params": first["kv_transfer_params"]}
        tokens: list[int] = self.ask("/v1/completions", body | params)["choices"][0]["token_ids"]
        return tokens

    def end(self, wanted: int) -> str:
        """Its exit code is this one, and it leaves no rank; what it said."""
        code = self.server.run(asyncio.wait_for(self.process.wait(), 30))
        said = self.log.read_text()
        assert code == wanted, said
        return said


@pytest.fixture(scope="module")
def tiny(server: Server) -> Path:
    return make_tiny(MODELS["qwen3"], server.folder / "qwen3", layers=2, heads=4, hidden=64)


def gone(pids: list[int]) -> None:
    """Wait until none of these processes runs."""
    end = time.monotonic() + 30
    while any(_runs(pid) for pid in pids):
        assert time.monotonic() < end, f"{pids} are left behind"
        time.sleep(0.01)


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):  # gone before it was opened, or before it was read
        return False


def test_a_worker_of_four_ranks_answers_and_drains(server: Server, tiny: Path) -> None:
    worker = Worker(server, tiny, 2, 2, HOSTS[0])
    worker.wait_ready()
    ranks = worker.ranks()
    assert len(ranks) == 3
    prompts = [[5 + (i * 7919 + n) % 500 for i in range(n)] for n in (1, 16, 33, 120, 700, 17, 65, 9)]
    oracle = transformers_model(tiny)
    with torch.inference_mode():
        expected = [int(oracle(torch.tensor([prompt])).logits[0, -1].argmax()) for prompt in prompts]
    for rank in ranks:
        os.kill(rank, signal.SIGTERM)  # it comes to the whole group, and is the worker's business
    with ThreadPoolExecutor(len(prompts)) as threads:
        given = list(threads.map(worker.first_token, prompts))
    assert given == expected
    worker.process.signal(signal.SIGTERM)
    assert worker.end(0) == ""
    gone(ranks)


@pytest.mark.parametrize(("prefill", "decode"), [((2, 1), (1, 2)), ((1, 2), (2, 2))])
def test_kv_goes_from_any_shape_to_any_other(
    server: Server, tiny: Path, prefill: tuple[int, int], decode: tuple[int, int]
) -> None:
    tokens = 10
    prompts = [[5 + (i * 7919 + n) % 500 for i in range(n)] for n in (1, 16, 33, 120, 700, 17)]
    oracle = transformers_model(tiny)
    expected = [
        oracle.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=tokens,
            min_new_tokens=tokens,
            do_sample=False,
        )[0, len(prompt) :].tolist()
        for prompt in prompts
    ]
    first = Worker(server, tiny, *prefill, HOSTS[0])
    second = Worker(server, tiny, *decode, HOSTS[1], "decode")
    first.wait_ready()
    second.wait_ready()

    def answer(prompt: list[int]) -> list[int]:
        return second.rest(prompt, first.first(prompt, tokens), tokens)

    with ThreadPoolExecutor(len(prompts)) as threads:
        assert list(threads.map(answer, prompts)) == expected
    for worker in (first, second):
        worker.until(lambda state=worker: state.ask("/state")["leased_blocks"] == 0)
        assert worker.ask("/state")["intact"] is True
        worker.process.signal(signal.SIGTERM)
        assert worker.end(0) == ""


def test_a_rank_that_is_killed_ends_the_worker_with_a_sentence(server: Server, tiny: Path) -> None:
    worker = Worker(server, tiny, 2, 1, HOSTS[1])
    worker.wait_ready()
    [rank] = ranks = worker.ranks()
    os.kill(rank, signal.SIGSTOP)
    with ThreadPoolExecutor(1) as threads:
        asked = threads.submit(worker.first_token, [7] * 40)
        # Rank 0 is in an all-reduce that the other one will never join.
        worker.until(lambda: worker.ask("/state")["free_blocks"] < worker.ask("/state")["total_blocks"])
        os.kill(rank, signal.SIGKILL)
        assert worker.end(1) == "Rank 1 of this worker was ended by SIGKILL; the worker ends with it.\n"
        assert isinstance(asked.exception(), OSError)
    gone(ranks)


def test_no_rank_outlives_its_worker(server: Server) -> None:
    code, said = server.call("tests.integration.rank_case:leave_ranks")
    assert code == 0, said
    pids = [int(pid) for pid in said.split()]
    assert len(pids) == 2
    gone(pids)


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (("--tp", "3"), "--tp 3 does not divide the model's 4 heads and its feed-forward of 192."),
        (("--pp", "4"), "--pp 4 does not divide the model's 2 layers."),
    ],
)
def test_a_shape_that_does_not_divide_ends_with_one_sentence(
    server: Server, tiny: Path, flags: tuple[str, str], sentence: str
) -> None:
    common = ("prefill", "--model", "m", "--weights", str(tiny), "--pairing-key", "k")
    code, said = server.call("disaggworker.__main__:main", *common, *flags, host=HOSTS[2])
    assert (code, said) == (1, sentence + "\n")
