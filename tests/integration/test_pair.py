"""`disaggworker pair`: two workers of one container, from outside."""

from __future__ import annotations

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

import pytest

from disaggworker.errors import StartError
from disaggworker.worker.pair import read
from e2e.nodes.tiny import make_tiny
from tests.integration.worker_pair import ROOT

HOST, PREFILL, DECODE, READY, DEADLINE_S = f"127.8.{os.getpid() % 250}.1", 8461, 8462, 8463, 120.0


def get(port: int, path: str) -> tuple[int, Any]:
    try:
        with urllib.request.urlopen(f"http://{HOST}:{port}{path}", timeout=10) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)
    except OSError:
        return 0, {}


def post(port: int, body: Any) -> Any:
    request = urllib.request.Request(
        f"http://{HOST}:{port}/v1/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=30) as answer:
        return json.load(answer)


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    folder = make_tiny("facebook/opt-13b", tmp_path)
    shared = ["--model", "m", "--weights", str(folder), "--pairing-key", "k", "--kv-blocks", "64"]
    argv = [sys.executable, "-m", "disaggworker", "pair", "--ready-port", str(READY)]
    argv += [
        "prefill",
        *shared,
        "--port",
        str(PREFILL),
        "decode",
        *shared,
        "--port",
        str(DECODE),
        "--kv-port",
        "5700",
    ]
    path = os.pathsep.join(str(ROOT / part) for part in ("operator", "worker_image"))
    process = subprocess.Popen(
        argv, env=os.environ | {"PYTHONPATH": path, "POD_IP": HOST}, stderr=subprocess.PIPE
    )
    try:
        end = time.monotonic() + DEADLINE_S
        while get(READY, "/ready")[0] != 200:
            assert process.poll() is None, "the pair has ended"
            assert time.monotonic() < end, "the pair is not ready"
            time.sleep(0.05)
        yield process
    finally:
        process.terminate()
        try:
            process.wait(30)
        finally:
            process.kill()


def test_a_pair_hands_over_through_memory_and_ends_as_one(pair: subprocess.Popen[bytes]) -> None:
    assert get(READY, "/state") == (200, {"status": "ready", "transport": "shm"})
    body = {"prompt": list(range(5, 45)), "max_tokens": 4, "temperature": 0, "ignore_eos": True}
    first = post(PREFILL, {**body, "kv_transfer_params": {"do_remote_decode": True, "max_tokens": 4}})
    answer = post(DECODE, {**body, "kv_transfer_params": first["kv_transfer_params"]})
    assert answer["usage"]["completion_tokens"] == 4
    assert get(DECODE, "/state")[1]["pulls"] == {"shm": 2}, "one of them is the pair's own"
    children = Path(f"/proc/{pair.pid}/task/{pair.pid}/children").read_text().split()
    assert len(children) == 2
    os.kill(int(children[1]), signal.SIGKILL)
    assert pair.wait(DEADLINE_S) == 1
    assert pair.stderr
    said = pair.stderr.read().decode()
    assert "The decode worker of this pair ended with -9; the pair ends with it." in said
    assert get(PREFILL, "/health")[0] == 0, "the other one has ended, too"


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["prefill", "--port", "1"], "'decode' is there 0 times"),
        (["prefill", "--port", "8000", "--tp", "2", "decode"], "both workers have port 5600, 8000"),
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
