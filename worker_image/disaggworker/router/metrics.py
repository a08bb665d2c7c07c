"""What users saw, counted. Counts are plain numbers; prometheus_client writes them out when they are scraped.

Every series of the length table and of the outcomes exists from the start: Prometheus' `increase` does not see a
counter's step from absent to one.
"""

from __future__ import annotations

import functools
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence

from prometheus_client import generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
    SummaryMetricFamily,
)
from prometheus_client.registry import Collector

from disaggserve import metric_names as names
from disaggworker.router.fleet import Instance

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Histogram:
    """Observations by upper edge; the last count is above all edges."""

    def __init__(self, edges: Sequence[float]) -> None:
        self.edges = tuple(edges)
        self.counts = [0] * (len(self.edges) + 1)
        self.total = 0.0

    def observe(self, value: float) -> None:
        self.counts[bisect_left(self.edges, value)] += 1
        self.total += value

    def cumulative(self) -> list[tuple[str, float]]:
        out, sum_ = [], 0
        for edge, count in zip((*map(str, self.edges), "+Inf"), self.counts, strict=True):
            sum_ += count
            out.append((edge, float(sum_)))
        return out


def bucket(edges: Sequence[float], tokens: int) -> int:
    """k with edges[k] < tokens <= edges[k + 1]; the first for what is not above the lowest edge."""
    return max(0, bisect_left(edges, tokens) - 1)


class Metrics:
    """All figures of one router."""

    def __init__(self, resource: str, ttft_s: float, tpot_s: float) -> None:
        self._resource, self._promised_ttft_s, self._promised_tpot_s = resource, ttft_s, tpot_s
        self._last_arrival_s: float | None = None
        self.arrivals = 0
        self.gaps_s = self.gaps_squared_s2 = 0.0
        self.requests = {(o, met): 0 for o in names.OUTCOMES for met in (True, False)}
        rows, columns = len(names.INPUT_EDGES) - 1, len(names.OUTPUT_EDGES) - 1
        self.lengths = [[0] * columns for _ in range(rows)]
        self.input_tokens, self.output_tokens = [0] * rows, [0] * columns
        self.uncached_tokens = 0
        self.retries = {"prefill": 0, "decode": 0, "mixed": 0}
        self.continuations = 0
        self.ttft, self.tpot = Histogram(names.TTFT_BUCKETS), Histogram(names.TPOT_BUCKETS)

    def arrive(self, now_s: float) -> None:
        """A well-formed request is here."""
        self.arrivals += 1
        if self._last_arrival_s is not None:
            gap_s = now_s - self._last_arrival_s
            self.gaps_s += gap_s
            self.gaps_squared_s2 += gap_s * gap_s
        self._last_arrival_s = now_s

    def end(self, outcome: str) -> None:
        """A request ended without a full answer. (One that was answered in full: `answer`.)"""
        self.requests[outcome, False] += 1

    def answer(self, input_tokens: int, output_tokens: int, ttft_s: float, decode_s: float) -> None:
        """A request was answered in full; `decode_s` from its first token to its last. One token alone meets TPOT."""
        met = ttft_s <= self._promised_ttft_s
        self.ttft.observe(ttft_s)
        if output_tokens > 1:
            tpot_s = decode_s / (output_tokens - 1)
            self.tpot.observe(tpot_s)
            met = met and tpot_s <= self._promised_tpot_s
        self.requests[names.OK, met] += 1
        i, j = bucket(names.INPUT_EDGES, input_tokens), bucket(names.OUTPUT_EDGES, output_tokens)
        self.lengths[i][j] += 1
        self.input_tokens[i] += input_tokens
        self.output_tokens[j] += output_tokens

    def expose(self, instances: Iterable[Instance], queued: int) -> bytes:
        """The text that Prometheus scrapes."""
        return generate_latest(_Families(list(self._families(instances, queued))))

    def _families(self, instances: Iterable[Instance], queued: int) -> Iterator[Metric]:
        def family(
            make: type[CounterMetricFamily] | type[GaugeMetricFamily],
            name: str,
            rows: Iterable[tuple[Sequence[str], float]],
            labels: Sequence[str] = (),
        ) -> Metric:
            out = make(name.removesuffix("_total"), names.HELP[name], labels=(names.RESOURCE_LABEL, *labels))
            for values, value in rows:
                out.add_metric((self._resource, *values), value)
            return out

        counter = functools.partial(family, CounterMetricFamily)
        gauge = functools.partial(family, GaugeMetricFamily)

        def histogram(name: str, values: Histogram) -> Metric:
            family = HistogramMetricFamily(name, names.HELP[name], labels=(names.RESOURCE_LABEL,))
            family.add_metric((self._resource,), values.cumulative(), values.total)
            return family

        judged = (names.OUTCOME_LABEL, names.SLO_MET_LABEL)
        yield counter(
            names.ROUTER_REQUESTS,
            (((outcome, str(met).lower()), n) for (outcome, met), n in self.requests.items()),
            judged,
        )
        yield counter(names.ROUTER_ARRIVALS, [((), self.arrivals)])
        for name, total in (
            (names.ROUTER_GAPS, self.gaps_s),
            (names.ROUTER_GAPS_SQUARED, self.gaps_squared_s2),
        ):
            # A summary, because prometheus_client ends every counter's name in _total.
            gaps = SummaryMetricFamily(
                name.removesuffix("_sum"), names.HELP[name], labels=(names.RESOURCE_LABEL,)
            )
            gaps.add_metric((self._resource,), max(0, self.arrivals - 1), total)
            yield gaps
        yield counter(
            names.ROUTER_LENGTHS,
            (((str(i), str(j)), n) for i, row in enumerate(self.lengths) for j, n in enumerate(row)),
            (names.INPUT_BUCKET_LABEL, names.OUTPUT_BUCKET_LABEL),
        )
        for name, label, tokens in (
            (names.ROUTER_INPUT_TOKENS, names.INPUT_BUCKET_LABEL, self.input_tokens),
            (names.ROUTER_OUTPUT_TOKENS, names.OUTPUT_BUCKET_LABEL, self.output_tokens),
        ):
            yield counter(name, (((str(k),), n) for k, n in enumerate(tokens)), (label,))
        yield counter(names.ROUTER_UNCACHED_TOKENS, [((), self.uncached_tokens)])
        yield counter(
            names.ROUTER_RETRIES, (((role,), n) for role, n in self.retries.items()), (names.ROLE_LABEL,)
        )
        yield counter(names.ROUTER_CONTINUATIONS, [((), self.continuations)])
        yield histogram(names.ROUTER_TTFT, self.ttft)
        yield histogram(names.ROUTER_TPOT, self.tpot)
        yield gauge(
            names.ROUTER_IN_FLIGHT,
            (((i.seen.name, i.seen.role), i.in_flight) for i in instances),
            (names.INSTANCE_LABEL, names.ROLE_LABEL),
        )
        yield gauge(names.ROUTER_QUEUED, [((), queued)])


class _Families(Collector):
    def __init__(self, families: list[Metric]) -> None:
        self._families = families

    def collect(self) -> Iterable[Metric]:
        return self._families
