"""`disaggworker profile`, both doors, and what `disaggserve fit` and the planner's step times make of its rows."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from typer.testing import CliRunner

from disaggserve import catalogue, latency
from disaggserve.cli.app import app
from disaggserve.latency import measurements
from disaggworker.__main__ import main
from disaggworker.router.app import serving
from disaggworker.router.config import Config
from disaggworker.router.fleet import Seen
from e2e.nodes.tiny import make_tiny
from tests.integration.test_router import free_port
from tests.integration.worker_pair import DECODE, PREFILL, pair, url

pytest.importorskip("torch")

MODEL = "facebook/opt-13b"
A100 = catalogue.gpu("NVIDIA-A100-SXM4-80GB")
ROUTER = Config("ns", "chat", MODEL, 2048, 60.0, 60.0, "127.0.0.1", linger_s=0.0)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny(MODEL, tmp_path_factory.mktemp("models") / "tiny")


def predicted(times: latency.StepTimes, row: measurements.Row) -> float:
    if row.phase == "prefill":
        return times.prefill_stage_s([row.tokens // row.batch] * row.batch)
    return times.decode_stage_s(row.batch, row.context_tokens + row.batch)


def fitted(csv: Path, profile: Path) -> tuple[tuple[measurements.Row, ...], dict[str, float]]:
    """The rows, and the largest residual that `disaggserve fit` says of each phase."""
    said = CliRunner().invoke(app, ["fit", str(csv), "-o", str(profile)])
    assert said.exit_code == 0, said.output
    (fit,) = json.loads(profile.read_text())["fits"]
    most = {phase: fit[phase]["evidence"]["residuals"]["max"] for phase in ("prefill", "decode")}
    return measurements.read(csv.read_text(), csv.name), most


def test_our_engine_is_profiled_fitted_and_predicted(weights: Path, tmp_path: Path) -> None:
    csv, profile = tmp_path / "m.csv", tmp_path / "profile.json"
    argv = ["profile", "--model", MODEL, "--weights", str(weights), "--batches", "1,2,4", "--repeat", "3"]
    argv += ["--prompts", "64,128,256,512", "--contexts", "64,512", "-o", str(csv)]
    assert main(argv) == 0
    rows, most = fitted(csv, profile)
    assert len(rows) == 4 + 3 + 2 + 3 * 2
    # The planner knows the tiny model by its config.json, as it would any other.
    model = catalogue.model_from_config("tiny", json.loads((weights / "config.json").read_text()))
    times = latency.step_times(model, A100, 1, 1, latency.Profile.load(profile))
    assert times.provenance.measured
    for row in rows:
        off = abs(predicted(times, row) / row.seconds - 1)
        assert off <= most[row.phase] + 1e-4, row  # the profile says residuals to four digits


def test_a_paced_pair_behind_a_router_shows_its_pace_over_http(
    weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The truth is known here: these workers wait until OPT-13B's time on an A100 has passed."""
    csv, profile = tmp_path / "m.csv", tmp_path / "profile.json"
    pace = json.dumps({"gpu": A100.product, "node": "n", "nvlink": True, "rdma": True, "model": MODEL})

    async def test() -> None:
        config = replace(ROUTER, port=free_port())
        view = [
            Seen("p", "p", "prefill", "key", url(PREFILL, ""), True),
            Seen("d", "d", "decode", "key", url(DECODE, ""), True),
        ]
        async with pair(MODEL, weights, "--pace", pace), serving(config) as router:
            router.update(view)
            argv = [
                "profile",
                "--model",
                MODEL,
                "--url",
                f"http://127.0.0.1:{config.port}/v1",
                "-o",
                str(csv),
            ]
            argv += ["--batches", "1,4", "--prompts", "64,128,256,512", "--contexts", "64,512,2040,4096"]
            assert await asyncio.to_thread(main, [*argv, "--repeat", "2"]) == 0
            router.fleet.check_integrity()

    asyncio.run(test())
    assert [line for line in capsys.readouterr().err.splitlines() if line.startswith("left out")] == [
        "left out: contexts of 4096 tokens: beyond the context of 2048",
        "left out: decode of one context of 2040 tokens: the stream ended before 16 steps",
        "left out: decode of 4 contexts of 2040 tokens: "
        "a stream ended before all 4 had decoded 16 steps together",
    ]
    rows, _ = fitted(csv, profile)
    truth = latency.step_times(catalogue.model(MODEL), A100, 1, 1)
    assert [(r.batch, r.tokens) for r in rows if r.phase == "prefill"] == [
        (b, b * (n - 2))
        for b, n in (
            (1, 64),
            (1, 128),
            (1, 256),
            (1, 512),
            (4, 64),
            (4, 128),
        )  # of passes a token and two shorter
    ]
    decode = [r for r in rows if r.phase == "decode"]
    assert sorted((r.batch, r.context_tokens // r.batch // 256) for r in decode) == [
        (1, 0),
        (1, 2),
        (4, 0),
        (4, 2),
    ]
    ratios = [row.seconds / predicted(truth, row) for row in rows]
    behind = [x for x, row in zip(ratios, rows, strict=True) if row.phase == "prefill" and row.batch > 1]
    # Nothing is faster than its pace, but for what the clock of a busy client loses; HTTP adds to single prompts. What is
    # measured behind another prompt is a difference of two such times.
    assert min(x for x in ratios if x not in behind) > 0.9
    assert min(behind) > 0.8
    assert sorted(ratios)[len(ratios) // 2] < 1.5


@contextmanager
def answering(models: bytes, stream: bytes = b"") -> Iterator[str]:
    """A server that answers every GET with its models, and every POST with one stream."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(models)

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(200 if stream else 429)
            self.end_headers()
            self.wfile.write(stream or b'{"error": {"message": "too much"}}')

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}/v1"
        server.shutdown()
        thread.join()


def refused(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    assert main(["profile", "--model", "m", *argv]) == 1
    said = capsys.readouterr()
    assert not said.out
    assert said.err.count("\n") == 1
    return said.err


def test_bad_input_is_one_sentence(weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "--weights must be a model's folder" in refused(capsys, "--weights", str(tmp_path / "none"))
    assert "is not a folder" in refused(capsys, "--weights", str(weights), "-o", str(tmp_path / "a" / "b"))
    long = "--prompts", "2048", "--contexts", "4096"
    assert "Every length is beyond the context of 2048" in refused(capsys, "--weights", str(weights), *long)
    assert "cannot be measured" in refused(capsys, "--url", f"http://127.0.0.1:{free_port()}/v1")
    assert "cannot be measured" in refused(capsys, "--url", "nowhere")
    with answering(b"<html>") as there:
        assert "ends in /v1" in refused(capsys, "--url", there)
    with answering(b'{"data": [{"id": "other"}]}') as there:
        assert "it serves other" in refused(capsys, "--url", there)
    with answering(b'{"data": [{"id": "m"}]}') as there:
        assert "give --context-length" in refused(capsys, "--url", there)
        known = "--url", there, "--context-length", "64"
        assert "HTTP 429 to a prompt of 8 tokens: too much" in refused(capsys, *known)
    pairs = b'data: {"choices": [{"text": "a b"}]}\n\n' * 4 + b'data: {"choices": [], "usage": %s}\n\n'
    with answering(
        b'{"data": [{"id": "m", "max_model_len": 64}]}', pairs % b'{"completion_tokens": 8}'
    ) as there:
        assert "streams 8 tokens in 4 frames" in refused(capsys, "--url", there)


def test_wrong_usage_ends_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    for flags, said in (
        (["--batches", "1,x", "--url", "u"], "'x' is not a whole number"),
        (["--repeat", "0", "--url", "u"], "'0' is not a whole number"),
        ([], "one of the arguments --weights --url is required"),
        (["--weights", "w", "--url", "u"], "not allowed with"),
        (["--weights", "w", "--tp", "2"], "--tp and --pp are for --url"),
    ):
        with pytest.raises(SystemExit) as end:
            main(["profile", "--model", "m", *flags])
        assert end.value.code == 2
        assert said in capsys.readouterr().err
