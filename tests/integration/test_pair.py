"""`disaggworker pair`: two workers of one container, from outside, and behind a router as their pod would be."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from disaggserve import manifests
from disaggserve.api import manifest
from disaggserve.api.plan import Slot
from disaggserve.manifests import DECODE_PORT, HTTP_PORT, PREFILL_PORT, Images, Owner
from disaggworker.config import read as read_worker
from disaggworker.errors import StartError
from disaggworker.router import discovery
from disaggworker.router.app import serving
from disaggworker.router.config import Config
from disaggworker.worker.pair import merged, read
from e2e.nodes.tiny import make_tiny
from tests.contract.broken import GOOD
from tests.integration.test_router import free_port, until
from tests.integration.worker_pair import ROOT

MODEL, DEADLINE_S = "facebook/opt-13b", 150.0
HOSTS = [f"127.8.{os.getpid() % 250}.{n}" for n in (1, 2)]

Json = dict[str, Any]


class Pod:
    """What the operator makes of a planned pair, its container started here."""

    def __init__(self, host: str, weights: Path) -> None:
        spec = manifest.parse_spec(
            {**GOOD["spec"], "engine": {"type": "torch", "args": ["--kv-blocks", "256"]}}
        )
        slot = Slot(slot=0, role="pair", tp=1, decode_tp=1, pp=1, node="n", pairing_key="key", template="t")
        images = Images("worker", "router")
        made = manifests.worker_pod(Owner("chat", "ns", "u"), spec, slot, 0, 1, 2048, images)
        ready = [{"type": "Ready", "status": "True"}]
        status = {"podIP": host, "phase": "Running", "conditions": ready}
        self.host = host
        self.object: Json = {
            **made,
            "metadata": {**made["metadata"], "uid": host, "name": host},
            "status": status,
        }
        (container,) = made["spec"]["containers"]
        argv = [str(weights) if word == manifests.WEIGHTS_PATH else word for word in container["command"]]
        path = os.pathsep.join(str(ROOT / part) for part in ("operator", "worker_image"))
        self.process = subprocess.Popen(
            [sys.executable, "-m", *argv],
            env=os.environ | {"PYTHONPATH": path, "POD_IP": host},
            stderr=subprocess.PIPE,
        )

    def get(self, port: int, path: str) -> tuple[int, str]:
        try:
            with urllib.request.urlopen(f"http://{self.host}:{port}{path}", timeout=10) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()
        except OSError:
            return 0, ""

    def pulls(self) -> Json:
        found: Json = json.loads(self.get(DECODE_PORT, "/state")[1])["pulls"]
        return found

    def kill_decode(self) -> None:
        """The pair ends with it."""
        path = f"/proc/{self.process.pid}/task/{self.process.pid}/children"
        children = Path(path).read_text().split()
        assert len(children) == 2
        os.kill(int(children[1]), signal.SIGKILL)
        assert self.process.wait(DEADLINE_S) == 1

    def seen(self) -> tuple[discovery.Seen, ...]:
        return discovery.seen(self.object)

    def wait(self) -> None:
        end = time.monotonic() + DEADLINE_S
        while self.get(HTTP_PORT, "/ready")[0] != 200:
            assert self.process.poll() is None, "the pair has ended"
            assert time.monotonic() < end, "the pair is not ready"
            time.sleep(0.05)


@pytest.fixture
def pods(tmp_path: Path) -> Iterator[list[Pod]]:
    weights = make_tiny(MODEL, tmp_path)
    started = [Pod(host, weights) for host in HOSTS]
    try:
        for pod in started:
            pod.wait()
        yield started
    finally:
        for pod in started:
            pod.process.terminate()
        for pod in started:
            try:
                pod.process.wait(30)
            finally:
                pod.process.kill()


def body(text: str, tokens: int, **more: Any) -> Json:
    asked = {"model": MODEL, "prompt": text, "max_tokens": tokens, "temperature": 0, "ignore_eos": True}
    return {**asked, "return_token_ids": True, **more}


def test_two_pairs_behind_a_router_and_the_end_of_one(pods: list[Pod]) -> None:
    one, other = pods
    for pod in pods:
        assert pod.get(HTTP_PORT, "/state") == (200, '{"status": "ready", "transport": "shm"}')
        status, said = pod.get(HTTP_PORT, "/health")
        assert (status, json.loads(said)["decode"]["role"]) == (200, "decode")
    asyncio.run(asyncio.wait_for(behind_a_router(one, other), DEADLINE_S))
    status, said = other.get(HTTP_PORT, "/metrics")
    assert status == 200
    assert 'disaggserve_worker_role{model_name="facebook/opt-13b",role="decode"} 1' in said.splitlines()
    assert 'disaggserve_worker_emulated{role="prefill",model_name="facebook/opt-13b"} 0' in said.splitlines()
    other.process.terminate()
    assert other.process.wait(DEADLINE_S) == 0


async def behind_a_router(one: Pod, other: Pod) -> None:
    config = Config("ns", "chat", MODEL, 2048, 60.0, 60.0, "127.0.0.1", port=free_port(), linger_s=0.0)
    url = f"http://127.0.0.1:{config.port}/v1/completions"
    async with serving(config) as router, aiohttp.ClientSession() as session:

        async def tokens(text: str, count: int) -> list[int]:
            async with session.post(url, json=body(text, count)) as answer:
                assert answer.status == 200, await answer.text()
                found: list[int] = (await answer.json())["choices"][0]["token_ids"]
                return found

        router.update([*one.seen(), *other.seen()])
        # Until then one of them may get all.
        await until(lambda: all(i.others and not i.lost for i in router.fleet.instances()), "loads")
        texts = [f"{n} keepers of the lighthouse" for n in range(24)]
        answers = await asyncio.gather(*(tokens(text, 20) for text in texts))
        assert {len(a) for a in answers} == {20}
        for pod in (one, other):
            # One was the pair's own; the KV of each came from inside.
            assert set(pod.pulls()) == {"shm"}
            assert pod.pulls()["shm"] > 1
        assert sum(pod.pulls()["shm"] for pod in (one, other)) == len(texts) + 2
        router.update(other.seen())
        assert await asyncio.gather(*(tokens(text, 20) for text in texts)) == answers

        # One ends in mid-answer, both its halves, and the answer goes on in the other as it would have gone.
        long = await tokens("Long ago", 1000)
        router.update(one.seen())
        got: list[int] = []
        async with session.post(url, json=body("Long ago", 1000, stream=True)) as answer:
            async for line in answer.content:
                if line.startswith(b"data: {"):
                    got += json.loads(line[6:])["choices"][0]["token_ids"]
                if len(got) >= 20 and one.process.poll() is None:
                    router.update([*one.seen(), *other.seen()])
                    await asyncio.to_thread(one.kill_decode)
        assert got == long
        assert router.proxy.metrics.continuations == 1
        assert one.process.stderr is not None
        said = one.process.stderr.read().decode()
        assert "The decode worker of this pair ended with -9; the pair ends with it." in said
        assert one.get(PREFILL_PORT, "/health")[0] == 0, "the other half has ended, too"
        router.update(other.seen())
        assert await asyncio.gather(*(tokens(text, 20) for text in texts)) == answers
        router.fleet.check_integrity()
        view = router.fleet.drain_view()
        assert set(view) == {other.host}
        assert (view[other.host]["in_flight"], view[other.host]["leased"]) == (0, 0)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["prefill", "--port", "1"], "'decode' is there 0 times"),
        (["prefill", "--port", "8000", "--tp", "2", "decode"], "both workers have port 5600, 8000"),
        (["prefill", "--served-name", "decode"], "'decode' is there 0 times"),
        (["--colour", "red", "prefill", "decode", "--port", "1"], "unrecognized arguments: --colour red"),
    ],
)
def test_what_is_no_pair_is_refused(argv: list[str], words: str) -> None:
    with pytest.raises(StartError, match=words):
        read(argv, {})


def test_each_worker_has_its_own_flags_and_gpus() -> None:
    found = read(
        ["--prefill-gpus", "0,1", "prefill", "--tp", "2", "decode", "--port", "9", "--kv-port", "5602"],
        {"POD_IP": "1.2.3.4"},
    )
    assert (found.host, found.prefill.gpus, found.decode.gpus) == ("1.2.3.4", "0,1", None)
    assert found.prefill.argv()[2:] == ["disaggworker", "prefill", "--tp", "2", "--kv-share"]
    assert found.decode.argv()[2:] == ["disaggworker", "decode", "--port", "9", "--kv-port", "5602"]


def test_a_flag_may_have_the_name_of_a_role_for_its_value() -> None:
    spec = manifest.parse_spec(
        {
            **GOOD["spec"],
            "model": {**GOOD["spec"]["model"], "servedName": "decode"},
            "engine": {"type": "torch", "args": ["--kv-checksum", "--kv-blocks=256"]},
        }
    )
    slot = Slot(slot=0, role="pair", tp=1, decode_tp=1, pp=1, node="n", pairing_key="prefill", template="t")
    made = manifests.worker_pod(Owner("chat", "ns", "u"), spec, slot, 0, 1, 2048, Images("worker", "router"))
    (container,) = made["spec"]["containers"]
    found = read(container["command"][2:], {})
    for half, port in zip(found.both, (PREFILL_PORT, DECODE_PORT), strict=True):
        settings = read_worker([half.role, *half.flags])
        assert (settings.role, settings.port, settings.kv_blocks) == (half.role, port, 256)
        assert (settings.served_name, settings.pairing_key, settings.kv_checksum) == (
            "decode",
            "prefill",
            True,
        )


def test_metrics_of_both_are_one_exposition() -> None:
    def text(role: str, steps: int) -> str:
        return (
            f'# HELP r Role.\n# TYPE r gauge\nr{{model_name="m",role="{role}"}} 1\n'
            f'# HELP s Steps.\n# TYPE s counter\ns{{model_name="m"}} {steps}\n'
        )

    assert merged({"prefill": text("prefill", 1), "decode": text("decode", 2)}) == (
        '# HELP r Role.\n# TYPE r gauge\nr{model_name="m",role="prefill"} 1\nr{model_name="m",role="decode"} 1\n'
        '# HELP s Steps.\n# TYPE s counter\ns{role="prefill",model_name="m"} 1\ns{role="decode",model_name="m"} 2\n'
    )
    assert merged({}) == ""
