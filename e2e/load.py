"""Open-loop load on an OpenAI endpoint: requests leave when they are due, whatever the answers do.

Prompts are random token ids of exactly the wanted length, answers exactly as long as asked for (`ignore_eos`, greedy), so
that what was served can be replayed in the simulator, request by request. Times are the client's own, in seconds from the
load's beginning.

    python -m e2e.load --url http://127.0.0.1:8000 --model NAME --rate 5 --duration 60 --preset sharegpt --out run.csv
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import csv
import itertools
import json
import math
import random
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import msgspec

from disaggserve import metric_names as names
from disaggserve import workload
from disaggworker.router.vllm import Frames

Wanted = tuple[float, int, int]  # due after so many seconds, prompt tokens, output tokens

COLUMNS = ("arrival_s", "input_tokens", "output_tokens", "ttft_s", "tpot_s", "outcome")
_FIRST_ID = 4  # below are padding, begin and end in the usual vocabularies
_ANSWER_S = 900.0  # a request that takes longer has failed
_LINGER_S = 30.0  # after `stop`: what is in flight may take so long
_BATCHES = 20
_T_95 = 2.093  # Student's t, 19 degrees of freedom


@dataclass(frozen=True, slots=True)
class Result:
    """One request. `ttft_s` and `tpot_s` are NaN without a whole answer; a one-token answer's `tpot_s` is 0."""

    arrival_s: float  # when it really left
    input_tokens: int
    output_tokens: int  # asked for, and what an `ok` answer had
    ttft_s: float
    tpot_s: float
    outcome: str  # metric_names.OUTCOMES
    error: str = ""
    due_s: float = math.nan  # when it was to leave


async def run_load(
    url: str,
    model: str,
    requests: Sequence[Wanted],
    *,
    vocab: int,
    seed: int,
    on_result: Callable[[Result], None] | None = None,
    stop: asyncio.Event | None = None,
) -> list[Result]:
    """Sends all requests when they are due, and waits for the answers; results in order of sending.

    `vocab`: prompts take token ids below it. `stop`: nothing more is sent once it is set, and what is in flight after
    another 30 s is cancelled.
    """
    stop = stop or asyncio.Event()
    timeout = aiohttp.ClientTimeout(total=_ANSWER_S, sock_connect=10)
    # Servers may close an idle connection just when it is used again: keep none for longer than they do.
    connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=4)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout, auto_decompress=False) as session:
        load = _Load(session, f"{url.rstrip('/')}/v1/completions", model, vocab, seed, on_result)
        tasks: list[asyncio.Task[Result]] = []
        stopped = asyncio.create_task(stop.wait())
        try:
            for number, wanted in enumerate(requests):
                wait_s = wanted[0] - load.now_s()
                if wait_s > 0:
                    await asyncio.wait((stopped,), timeout=wait_s)
                if stop.is_set():
                    break
                tasks.append(asyncio.create_task(load.send(number, *wanted)))
            answers = asyncio.gather(*tasks)
            if not stop.is_set():
                await asyncio.wait((answers, stopped), return_when=asyncio.FIRST_COMPLETED)
            if not answers.done():
                await asyncio.wait(tasks, timeout=_LINGER_S)
            for task in tasks:
                task.cancel()  # those that are done do not mind
            return list(await answers)
        finally:
            stopped.cancel()
            for task in tasks:
                task.cancel()


class _Load:
    def __init__(
        self,
        session: aiohttp.ClientSession,
        url: str,
        model: str,
        vocab: int,
        seed: int,
        on_result: Callable[[Result], None] | None,
    ) -> None:
        self._session, self._url, self._model = session, url, model
        self._ids, self._seed = range(min(_FIRST_ID, vocab - 1), vocab), seed
        self._on_result = on_result
        self._clock = asyncio.get_running_loop().time
        self._began_s = self._clock()

    def now_s(self) -> float:
        return self._clock() - self._began_s

    async def send(self, number: int, due_s: float, input_tokens: int, output_tokens: int) -> Result:
        body = msgspec.json.encode(
            {
                "model": self._model,
                "prompt": random.Random(f"{self._seed}/{number}").choices(self._ids, k=input_tokens),
                "max_tokens": output_tokens,
                "ignore_eos": True,
                "temperature": 0,
                "stream": True,
                "stream_options": {"include_usage": True},
            }
        )
        sent_s = self.now_s()
        first_s = last_s = math.nan
        outcome, error, frames = names.FAILED, "", Frames(keep_usage=False)
        try:
            async with self._session.post(
                self._url, data=body, headers={"Content-Type": "application/json"}
            ) as answer:
                if answer.status != 200:
                    outcome, error = _refusal(answer.status, await answer.read())
                else:
                    seen = 0
                    async for chunk in answer.content.iter_any():
                        frames.feed(chunk)
                        if frames.tokens != seen:
                            seen, last_s = frames.tokens, self.now_s()
                            if math.isnan(first_s):
                                first_s = last_s
                    if frames.error:
                        error = "an error came in the stream"
                    elif not frames.done:
                        error = f"the stream ended after {seen} tokens without [DONE]"
                    elif seen != output_tokens:
                        error = f"{seen} tokens came where {output_tokens} were asked for"
                    else:
                        outcome = names.OK
        except asyncio.CancelledError:
            outcome, error = names.CANCELLED, "the load was stopped"
        except (aiohttp.ClientError, TimeoutError, OSError) as fault:
            error = str(fault) or type(fault).__name__
        ok = outcome == names.OK
        result = Result(
            arrival_s=sent_s,
            input_tokens=input_tokens,
            output_tokens=output_tokens,
            ttft_s=first_s - sent_s if ok else math.nan,
            tpot_s=(last_s - first_s) / max(1, output_tokens - 1) if ok else math.nan,
            outcome=outcome,
            error=error,
            due_s=due_s,
        )
        if self._on_result is not None:
            self._on_result(result)
        return result


def _refusal(status: int, body: bytes) -> tuple[str, str]:
    said = " ".join(body[:300].decode("utf-8", "replace").split())
    with contextlib.suppress(ValueError, LookupError, TypeError):
        said = json.loads(body)["error"]["message"]
    if status in (429, 503):
        return names.REFUSED, f"{status}: {said}"
    return (names.REJECTED if 400 <= status < 500 else names.FAILED), f"{status}: {said}"


def write_csv(results: Sequence[Result], path: Path | str) -> None:
    """Results in order of arrival: a trace that `workload.read_trace` reads, with what came of it beside."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        for r in sorted(results, key=lambda r: r.arrival_s):
            times = ("" if math.isnan(t) else f"{t:.6f}" for t in (r.ttft_s, r.tpot_s))
            writer.writerow((f"{r.arrival_s:.6f}", r.input_tokens, r.output_tokens, *times, r.outcome))


def summary(results: Sequence[Result], ttft_s: float, tpot_s: float) -> dict[str, Any]:
    """What share kept the promise, with its 95 % interval, and percentiles of TTFT and TPOT in seconds.

    The share is of answered, failed and refused requests (those that were cancelled or at fault themselves do not count);
    NaN when there are none. Percentiles are of the answered.
    """
    ordered = sorted(results, key=lambda r: r.arrival_s)
    judged = [r for r in ordered if r.outcome in names.JUDGED_OUTCOMES]
    kept = [r.outcome == names.OK and r.ttft_s <= ttft_s and r.tpot_s <= tpot_s for r in judged]
    ok = [r for r in ordered if r.outcome == names.OK]
    attainment, low, high = _interval(kept)
    return {
        "requests": len(results),
        "outcomes": {o: n for o in names.OUTCOMES if (n := sum(r.outcome == o for r in results))},
        "attainment": attainment,
        "attainmentLow": low,
        "attainmentHigh": high,
        "ttft": _percentiles([r.ttft_s for r in ok]),
        "tpot": _percentiles([r.tpot_s for r in ok if r.output_tokens > 1]),
        "lag": _percentiles([r.arrival_s - r.due_s for r in ordered if not math.isnan(r.due_s)]),
    }


def _interval(kept: Sequence[bool]) -> tuple[float, float, float]:
    """Mean and 95 % interval as the simulator's: batch means (misses come in clusters), at least Wilson's."""
    n = len(kept)
    if not n:
        return math.nan, 0.0, 1.0
    mean, z = sum(kept) / n, 1.96
    centre = (mean + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(mean * (1 - mean) / n + z * z / (4 * n * n))
    low, high = centre - half, centre + half
    if n >= 2 * _BATCHES:
        edges = [n * k // _BATCHES for k in range(_BATCHES + 1)]
        means = [sum(kept[a:b]) / (b - a) for a, b in itertools.pairwise(edges)]
        middle = sum(means) / _BATCHES
        deviation = math.sqrt(sum((m - middle) ** 2 for m in means) / (_BATCHES - 1))
        wide = _T_95 * deviation / math.sqrt(_BATCHES)
        low, high = min(low, mean - wide), max(high, mean + wide)
    return mean, max(0.0, low), min(1.0, high)


def _percentiles(values: list[float]) -> dict[str, float]:
    """By linear interpolation; NaN without values."""
    values.sort()

    def at(share: float) -> float:
        if not values:
            return math.nan
        place = share * (len(values) - 1)
        below = int(place)
        above = min(below + 1, len(values) - 1)
        return values[below] + (values[above] - values[below]) * (place - below)

    return {f"p{round(100 * share)}": at(share) for share in (0.5, 0.9, 0.99)}


def _requests(a: argparse.Namespace) -> list[Wanted]:
    if a.trace:
        drawn = workload.read_trace(a.trace)
    else:
        lengths = workload.preset(a.preset).scaled(a.input_scale, a.context)
        drawn = workload.Workload(a.rate, a.cv, lengths).requests(a.duration, a.seed)
    return [
        (int(at) / 1e9, int(i), int(o))
        for at, i, o in zip(drawn.arrival_ns, drawn.input, drawn.output, strict=True)
    ]


def main(argv: Sequence[str] | None = None) -> int:
    p = argparse.ArgumentParser(
        prog="python -m e2e.load", description="Open-loop load on an OpenAI endpoint."
    )
    p.add_argument("--url", required=True, help="http://HOST:PORT of the router")
    p.add_argument("--model", required=True, help="the model's name")
    what = p.add_mutually_exclusive_group(required=True)
    what.add_argument("--trace", type=Path, help="CSV: arrival_s,input_tokens,output_tokens")
    what.add_argument("--rate", type=float, help="requests per second")
    p.add_argument("--duration", type=float, default=60.0, help="seconds (with --rate)")
    p.add_argument("--cv", type=float, default=1.0, help="coefficient of variation of the gaps; 1 is Poisson")
    p.add_argument(
        "--preset", default="sharegpt", choices=sorted(workload.PRESETS), help="lengths (with --rate)"
    )
    p.add_argument("--input-scale", type=float, default=1.0, help="prompts are so many times as long")
    p.add_argument("--context", type=int, default=2048, help="prompt and answer together, tokens")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--vocab", type=int, default=256, help="prompts take token ids below this")
    p.add_argument("--ttft", type=float, default=math.inf, help="promised seconds, for the summary")
    p.add_argument("--tpot", type=float, default=math.inf, help="promised seconds, for the summary")
    p.add_argument("--out", type=Path, required=True, help="CSV of results")
    a = p.parse_args(argv)
    try:
        requests = _requests(a)
    except workload.WorkloadError as error:
        print(error, file=sys.stderr)
        return 1
    results = asyncio.run(run_load(a.url, a.model, requests, vocab=a.vocab, seed=a.seed))
    write_csv(results, a.out)
    print(json.dumps(summary(results, a.ttft, a.tpot), indent=2))
    failed = next((r for r in results if r.outcome != names.OK), None)
    if failed is not None:
        print(f"the first that was not answered: {failed.outcome}, {failed.error}", file=sys.stderr)
    return 0 if failed is None else 1


if __name__ == "__main__":
    sys.exit(main())
