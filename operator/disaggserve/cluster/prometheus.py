"""Reads what the routers counted. Missing is unknown, never zero: a window that Prometheus did not wholly see is no window."""

from __future__ import annotations

import asyncio
import math
from datetime import timedelta
from typing import Any, cast

import requests
from prometheus_api_client import PrometheusConnect
from prometheus_api_client.exceptions import PrometheusApiClientException

from disaggserve import drift, workload
from disaggserve import metric_names as names
from disaggserve.manifests import Owner

_TIMEOUT_S = 5
_STALE_S = 60.0


class Unanswered(Exception):
    """Prometheus did not answer a query, or answered nothing."""


class Traffic:
    """One Prometheus; an empty URL is none."""

    def __init__(self, url: str) -> None:
        self._client = PrometheusConnect(url=url, timeout=_TIMEOUT_S) if url else None

    async def read(self, owner: Owner, now_s: float, window_s: float, windows: int) -> drift.Traffic:
        """The last `windows` windows, latest first; `unknown` says why there are none."""
        return await asyncio.to_thread(self._read, owner, now_s, window_s, windows)

    def _read(self, owner: Owner, now_s: float, window_s: float, windows: int) -> drift.Traffic:
        if self._client is None:
            return drift.Traffic((), "no Prometheus is configured (prometheus.url)")
        who = f'{names.RESOURCE_LABEL}="{owner.namespace}/{owner.name}"'
        try:
            self._check_fresh(who, now_s, window_s)
            out = []
            for n in range(windows):
                window = self._window(who, now_s - n * window_s, window_s)
                if window is None:
                    break
                out.append(window)
            hour = self._window(who, now_s, drift.SHRINK_WINDOW_S) if out else None
        except (Unanswered, PrometheusApiClientException, requests.RequestException, OSError) as error:
            return drift.Traffic((), f"traffic is unknown: {' '.join(str(error).split())[:300]}")
        if not out:
            return drift.Traffic(
                (), f"Prometheus has not seen the router for a whole window of {window_s:g} s yet"
            )
        return drift.Traffic(tuple(out), "", hour)

    def _query(self, expression: str, at_s: float) -> list[dict[str, Any]]:
        assert self._client is not None
        answer = self._client.custom_query(expression, params={"time": f"{at_s:.3f}"})
        return cast(list[dict[str, Any]], answer)

    def _check_fresh(self, who: str, now_s: float, window_s: float) -> None:
        last = self._query(f"max(timestamp({names.ROUTER_ARRIVALS}{{{who}}}))", now_s)
        if not last:
            raise Unanswered("Prometheus has no sample of the router's arrivals; is the router scraped?")
        age_s = now_s - float(last[0]["value"][1])
        if age_s > min(_STALE_S, window_s):
            raise Unanswered(f"the router's latest sample is {timedelta(seconds=round(age_s))} old")

    def _window(self, who: str, at_s: float, window_s: float) -> drift.Window | None:
        """One window that ends at `at_s`, or None when it began before Prometheus saw the router."""
        if not self._query(f"count({names.ROUTER_ARRIVALS}{{{who}}})", at_s - window_s):
            return None
        span = f"[{max(1, round(window_s * 1000))}ms]"

        def total(metric: str, by: str = "") -> list[dict[str, Any]]:
            group = f" by ({by})" if by else ""
            return self._query(f"sum{group} (increase({metric}{{{who}}}{span}))", at_s)

        def one(metric: str) -> float:
            found = total(metric)
            return float(found[0]["value"][1]) if found else 0.0

        arrivals = one(names.ROUTER_ARRIVALS)
        gaps, squares = one(names.ROUTER_GAPS), one(names.ROUTER_GAPS_SQUARED)
        outcomes = total(names.ROUTER_REQUESTS, f"{names.OUTCOME_LABEL},{names.SLO_MET_LABEL}")
        met = asked = 0.0
        for row in outcomes:
            labels, value = row["metric"], float(row["value"][1])
            if labels[names.OUTCOME_LABEL] in names.JUDGED_OUTCOMES:
                asked += value
                met += value if labels[names.SLO_MET_LABEL] == "true" else 0.0
        return drift.Window(
            rate=arrivals / window_s,
            cv=_cv(arrivals, gaps, squares),
            requests=round(arrivals),
            attainment=round(min(1.0, met / asked), 4) if asked >= 1 else None,
            judged=round(asked),
            lengths=self._lengths(total),
        )

    def _lengths(self, total: Any) -> workload.Lengths | None:
        rows, columns = len(names.INPUT_EDGES) - 1, len(names.OUTPUT_EDGES) - 1
        counts = [[0.0] * columns for _ in range(rows)]
        for row in total(names.ROUTER_LENGTHS, f"{names.INPUT_BUCKET_LABEL},{names.OUTPUT_BUCKET_LABEL}"):
            labels = row["metric"]
            i, j = int(labels[names.INPUT_BUCKET_LABEL]), int(labels[names.OUTPUT_BUCKET_LABEL])
            counts[i][j] += float(row["value"][1])
        if sum(map(sum, counts)) < 1:
            return None
        inputs = [sum(row) for row in counts]
        outputs = [sum(column) for column in zip(*counts, strict=True)]
        return workload.from_cells(
            counts,
            names.INPUT_EDGES,
            names.OUTPUT_EDGES,
            _means(
                total(names.ROUTER_INPUT_TOKENS, names.INPUT_BUCKET_LABEL), names.INPUT_BUCKET_LABEL, inputs
            ),
            _means(
                total(names.ROUTER_OUTPUT_TOKENS, names.OUTPUT_BUCKET_LABEL),
                names.OUTPUT_BUCKET_LABEL,
                outputs,
            ),
        )


def _means(found: list[dict[str, Any]], label: str, counts: list[float]) -> list[float]:
    means = [math.nan] * len(counts)
    for row in found:
        k = int(row["metric"][label])
        if counts[k] > 0:
            means[k] = float(row["value"][1]) / counts[k]
    return means


def _cv(n: float, total: float, squares: float) -> float:
    """Coefficient of variation from a count, a sum and a sum of squares; Poisson's 1 when there is too little to say."""
    if n < 30 or total <= 0:
        return 1.0
    mean = total / n
    return round(math.sqrt(max(0.0, squares / n - mean * mean)) / mean, 2)
