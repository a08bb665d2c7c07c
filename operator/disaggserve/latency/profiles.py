"""Profiles: fits of step times on one GPU product, from our own format (`records`) or DistServe's JSON."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np

from disaggserve import catalogue
from disaggserve.catalogue import GPU, Model
from disaggserve.latency.errors import BadProfile
from disaggserve.latency.steps import MAX_BATCH, Floats, Tables

ANY = "*"  # the model of a profile that names none

Triple = tuple[float, float, float]


@dataclasses.dataclass(frozen=True)
class Range:
    """What a fit was made from, least and most, and how far it is off from its own rows at most (share)."""

    tokens: tuple[int, int]  # of a prefill
    batch: tuple[int, int]  # of a decode step
    context: tuple[int, int]  # Σ of a decode step
    prefill_off: float = 0.0
    decode_off: float = 0.0


EVERYTHING = Range((0, 10**9), (0, 10**9), (0, 10**12))


@dataclasses.dataclass(frozen=True)
class Fit:
    """One (model, tp) of a profile, in ms of a whole pass, of which each of pp stages takes its share (REFERENCE § 1)."""

    prefill: Triple  # a + b·Σlen + c·Σlen²
    decode_small: Triple  # A + B·Σ(context + 1) + C·batch, batch < threshold
    decode_large: Triple  # the same, batch ≥ threshold
    threshold: int
    measured: bool
    pps: tuple[int, ...] = (1,)  # that were measured
    stage_ms: float = 0.0  # × pp is added to each prefill stage (DistServe's hand-over)
    hop_ms: Triple = (0.0, 0.0, 0.0)  # × (pp − 1) is added to a whole prefill, small and large decode
    flat_to: int = 0  # tokens below which a prefill takes no less, but for its squares
    range: Range | None = None  # None: not said. Below it a step takes as long as at its lower end

    def tables(self, pp: int) -> Tables:
        """The tables of one of pp stages.

        The public simulator adds 2 ms + 0.1 µs per token of context to every first stage as well; that is its
        own overhead, which only its reproduction adds (REFERENCE § 1).
        """
        a, b, c = self.prefill
        least = max(self.flat_to, self.range.tokens[0] if self.range else 0)
        knots = np.array([0, least, least + 8192] if least else [0, 8192], dtype=np.int64)
        whole = a + self.hop_ms[0] * (pp - 1) + b * np.maximum(knots, least)
        prefill = (whole / pp + self.stage_ms * pp) * 1e6
        batch = np.maximum(np.arange(MAX_BATCH + 1), self.range.batch[0] if self.range else 0)
        small = batch < self.threshold

        def regime(i: int) -> Floats:
            return np.where(small, self.decode_small[i], self.decode_large[i])

        hops = np.where(small, self.hop_ms[1], self.hop_ms[2]) * (pp - 1)
        base = (regime(0) + regime(2) * batch + hops) / pp * 1e6
        return knots, prefill, c / pp * 1e6, base, regime(1) / pp * 1e6


@dataclasses.dataclass(frozen=True, eq=False)
class Profile:
    """Fits of step times on one GPU product."""

    name: str
    product: str | None  # None: whatever GPU it is used with
    source: Literal["fitted", "profile"]
    fits: Mapping[tuple[str, int], Fit]  # by (model id, or `ANY`, tp)
    engine: str | None = None  # that was measured
    text: str = ""  # the file, in canonical JSON

    @classmethod
    def load(cls, path: Path | str, product: str = "NVIDIA-A100-SXM4-80GB") -> Profile:
        """A profile from our own format or from DistServe's JSON. Raises `BadProfile`.

        DistServe's, {model: {tp: {prefill, decoding_smallbs, decoding_largebs, …}}}, does not name its GPU; all
        public ones were measured on A100-80G.
        """
        path = Path(path)
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
        except OSError as e:
            raise BadProfile(f"profile {path} cannot be read: {e.strerror}") from e
        except (ValueError, RecursionError) as e:
            raise BadProfile(f"profile {path} is not JSON: {e}") from e
        if isinstance(raw, dict) and "kind" in raw:
            return cls.of(raw, path)
        return _distserve(raw, path, product)

    @classmethod
    def of(cls, raw: object, path: Path | str) -> Profile:
        """A profile from our own format, parsed; `path` names it. Raises `BadProfile`."""
        from disaggserve.latency import records

        try:
            document = records.read(raw)
            gpu = catalogue.gpu(document.gpu) if document.gpu is not None else None
        except ValueError as e:
            raise BadProfile(f"profile {path}: {e}") from None
        fits = {(document.model or ANY, f.tp): _own(f) for f in document.fits}
        text = _canonical(document.model_dump(mode="json", exclude_none=True))
        engine = f" ({document.engine})" if document.engine else ""
        name = f"{Path(path).stem} fit{engine}"
        return cls(name, gpu.product if gpu else None, "fitted", fits, document.engine, text)

    def dump(self, path: Path | str) -> None:
        """Write the file that `load` reads: the same profile, the same bytes."""
        Path(path).write_text(json.dumps(json.loads(self.text), indent=2) + "\n", encoding="utf-8")

    @property
    def digest(self) -> str:
        """SHA-256 of what the profile says, in hexadecimal; layout and order of its file do not matter."""
        return hashlib.sha256(self.text.encode()).hexdigest()

    def fit(self, model: Model, tp: int) -> Fit:
        """The fit of a tp that `shapes` names."""
        return self.fits.get((model.id, tp)) or self.fits[ANY, tp]

    def shapes(self, model: Model) -> tuple[int, ...]:
        """Every tp that was measured for this model, rising; its own form carries each over to any pp."""
        return tuple(
            sorted(tp for (m, tp), fit in self.fits.items() if m in (model.id, ANY) and fit.measured)
        )

    def measured(self, model: Model) -> tuple[tuple[int, int], ...]:
        """Every (tp, pp) that was measured for this model, rising."""
        return tuple((tp, pp) for tp in self.shapes(model) for pp in self.fit(model, tp).pps)

    def covers(self, model: Model, gpu: GPU) -> bool:
        """Whether it holds a measured tp of this model on this GPU."""
        return self.product in (None, gpu.product) and bool(self.shapes(model))


def _canonical(value: object) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def _own(fit: Any) -> Fit:
    """A `records.ShapeFit` in ms."""

    def triple(base: float, slope: float, other: float) -> Triple:
        return base * 1e3, slope * 1e3, other * 1e3

    def span(of: Any) -> tuple[int, int]:
        return of.least, of.most

    p, d = fit.prefill, fit.decode
    small, large = d.small, d.large or d.small
    return Fit(
        triple(p.base_seconds, p.seconds_per_token, p.seconds_per_squared_token),
        triple(small.base_seconds, small.seconds_per_context_token, small.seconds_per_request),
        triple(large.base_seconds, large.seconds_per_context_token, large.seconds_per_request),
        d.large_from_batch or MAX_BATCH + 1,
        measured=True,
        pps=tuple(sorted(fit.pp)),
        hop_ms=triple(p.seconds_per_hop, small.seconds_per_hop, large.seconds_per_hop),
        flat_to=p.flat_to_tokens or 0,
        range=Range(
            span(p.evidence.tokens),
            span(d.evidence.batch),
            span(d.evidence.context_tokens),
            p.evidence.residuals.max,
            d.evidence.residuals.max,
        ),
    )


# OPT-66B tp 8 stands in the shipped fits but not in the raw ones they come from: it is a copy of a vLLM curve
# (REFERENCE § 1), so a plan may not rest on it.
_COPIED = frozenset({("facebook/opt-66b", 8)})


def _distserve(raw: Any, path: Path, product: str) -> Profile:
    if not isinstance(raw, dict) or not raw:
        raise BadProfile(f"profile {path} holds no model; expected an object of model → tp → coefficients")
    fits: dict[tuple[str, int], Fit] = {}
    for model_id, by_tp in raw.items():
        if not isinstance(by_tp, dict) or not by_tp:
            raise BadProfile(
                f"profile {path}: {model_id} holds no tp; expected an object of tp → coefficients"
            )
        for tp, entry in by_tp.items():
            if not tp.isdecimal() or int(tp) < 1:
                raise BadProfile(f"profile {path}: {model_id}: tp is {tp!r}, not a whole number above 0")
            key = (model_id, int(tp))
            fits[key] = _distserve_fit(entry, f"profile {path}: {model_id} tp {tp}", key)
    # The public files are called …distserve.json and …vllm.json after the engine that they were measured on.
    engine = "vllm" if path.stem.endswith(".vllm") else "distserve"
    gpu = catalogue.gpu(product).product
    return Profile(f"{path.stem} fit", gpu, "profile", fits, engine, _canonical(raw))


def _distserve_fit(entry: Any, where: str, key: tuple[str, int]) -> Fit:
    """DistServe's form: each prefill stage ends with 1·pp ms of hand-over; decode stages have none."""

    def triple(field: str) -> Triple:
        value = entry.get(field) if isinstance(entry, dict) else None
        if (
            not isinstance(value, list)
            or len(value) != 3
            or not all(
                isinstance(x, int | float) and not isinstance(x, bool) and math.isfinite(x) for x in value
            )
        ):
            raise BadProfile(f"{where}: {field} is {value!r}, not three finite numbers (ms)")
        return float(value[0]), float(value[1]), float(value[2])

    prefill, small, large = triple("prefill"), triple("decoding_smallbs"), triple("decoding_largebs")
    threshold = entry.get("decoding_large_small_bs_threshold", 95)
    if isinstance(threshold, bool) or not isinstance(threshold, int) or threshold < 1:
        raise BadProfile(
            f"{where}: decoding_large_small_bs_threshold is {threshold!r}, not a whole number above 0"
        )
    return Fit(prefill, small, large, threshold, key not in _COPIED, stage_ms=1.0)


_SHIPPED = Path(catalogue.__file__).parent / "data" / "profiles"


@functools.cache
def shipped_profile() -> Profile:
    """DistServe's fits of OPT-13B and OPT-66B on A100-80G: raw fits × 1.10 for prefill (REFERENCE § 1)."""
    return dataclasses.replace(
        Profile.load(_SHIPPED / "profiler-a100-80g.distserve.json"), name="DistServe fit"
    )


@functools.cache
def shipped_profiles() -> tuple[Profile, ...]:
    """That one, and what our own engine was measured to take on GPUs at hand (benchmarks/gpu.py)."""
    own = (Profile.load(path) for path in sorted(_SHIPPED.glob("*.torch.*.json")))
    return shipped_profile(), *(dataclasses.replace(p, name="torch fit", fits=_alike(p.fits)) for p in own)


def _alike(fits: Mapping[tuple[str, int], Fit]) -> Mapping[tuple[str, int], Fit]:
    """The same for every model of the catalogue that has the same shape: a step takes as long."""

    def shape(model: Model) -> Model:
        return dataclasses.replace(model, id="", max_positions=0)

    return {
        (model.id, tp): fit
        for (measured, tp), fit in fits.items()
        for model in catalogue.MODELS.values()
        if shape(model) == shape(catalogue.model(measured))
    }
