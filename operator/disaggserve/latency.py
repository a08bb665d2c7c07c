"""Step times of one pipeline stage, as small tables that the simulator's kernel and a paced worker both read.

Three sources in order of trust (DESIGN, *How it decides*): fitted to measurements of this engine, a shipped
profile (DistServe's fits of OPT on A100-80G), a roofline with efficiency by shape. Every `StepTimes` says
which one it is.

    prefill stage = knots(Σlen) + quad·Σlen²              decode stage = base[batch] + ctx[batch]·Σ(context+1)

Errors, all of them `LatencyError` (a `ValueError`) with one sentence each:

    LatencyError
    ├── BadProfile           a profile file cannot be read, or lacks what was asked for
    └── FasterThanPhysics    a profile's step is faster than the GPU's datasheet allows
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from disaggserve import catalogue
from disaggserve.api.errors import InvalidInput
from disaggserve.catalogue import GPU, BadShape, Link, Model

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

MAX_BATCH = 1024  # decode tables reach to this batch; beyond it their last difference goes on
SATURATED = 0.9  # see `saturation_tokens`
_PROFILES = Path(__file__).parent / "data" / "profiles"


class LatencyError(InvalidInput, ValueError):
    """What the latency model cannot answer, in one sentence."""


class BadProfile(LatencyError):
    """A profile file cannot be read, or lacks what was asked for."""


class FasterThanPhysics(LatencyError):
    """A profile's step is faster than the GPU's datasheet allows."""


@dataclasses.dataclass(frozen=True)
class Provenance:
    """Where step times come from."""

    source: Literal["fitted", "profile", "roofline"]
    detail: str
    borrowed: bool = False  # efficiency curves of another product
    measured: bool = False  # this very tp was measured (the profile's own form carries it over to other pp)

    def describe(self) -> str:
        """One short phrase for people."""
        return self.detail


@dataclasses.dataclass(frozen=True, eq=False)
class StepTimes:
    """Times of one pipeline stage of one (model, GPU, tp, pp); a whole pass takes pp of them.

    All tables are non-negative, in nanoseconds. Roofline tables rise with tokens and batch; a fitted decode
    table may step down between its two regimes, as published (REFERENCE § 1).
    """

    prefill_knots_tokens: Ints  # [k], rising from 0; between knots linear, beyond the last with its slope
    prefill_knots_ns: Floats  # [k]
    prefill_quad_ns: float  # × Σ len²
    decode_base_ns: Floats  # [MAX_BATCH + 1], by batch
    decode_ctx_ns: Floats  # [MAX_BATCH + 1], ns per token of context, by batch
    pp: int
    provenance: Provenance

    def prefill_stage_s(self, lengths: Sequence[int]) -> float:
        """Seconds that one stage takes for a batch of prompts of these lengths (tokens)."""
        total, squares = sum(lengths), sum(n * n for n in lengths)
        return (
            _piecewise(total, self.prefill_knots_tokens, self.prefill_knots_ns)
            + self.prefill_quad_ns * squares
        ) * 1e-9

    def decode_stage_s(self, batch: int, context_tokens: int) -> float:
        """Seconds that one stage takes for a decode step of `batch` requests.

        `context_tokens` is Σ (context + 1): every request's tokens so far and the one being made.
        """
        base, slope = self.decode_base_ns, self.decode_ctx_ns
        last = len(base) - 1
        if batch <= last:
            ns = float(base[batch])
        else:
            ns = float(base[last] + (base[last] - base[last - 1]) * (batch - last))
        return (ns + float(slope[min(batch, last)]) * context_tokens) * 1e-9


def _piecewise(x: float, knots: Ints, values: Floats) -> float:
    i = min(max(int(np.searchsorted(knots, x, side="right")) - 1, 0), len(knots) - 2)
    slope = (values[i + 1] - values[i]) / (knots[i + 1] - knots[i])
    return float(values[i] + slope * (x - knots[i]))


# --------------------------------------------------------------------------------------------------- profiles


@dataclasses.dataclass(frozen=True)
class Fit:
    """One (model, tp) of a profile: DistServe's form, ms (REFERENCE § 1)."""

    prefill: tuple[float, float, float]  # a + b·Σlen + c·Σlen²
    decode_small: tuple[float, float, float]  # A + B·Σ(context + 1) + C·batch, batch < threshold
    decode_large: tuple[float, float, float]  # the same, batch ≥ threshold
    threshold: int
    measured: bool


@dataclasses.dataclass(frozen=True, eq=False)
class Profile:
    """Fits of step times on one GPU product."""

    name: str
    product: str
    source: Literal["fitted", "profile"]
    fits: Mapping[tuple[str, int], Fit]  # by (model id, tp)

    @classmethod
    def load(cls, path: Path | str, product: str = "NVIDIA-A100-SXM4-80GB") -> Profile:
        """A profile from DistServe's JSON: {model: {tp: {prefill, decoding_smallbs, decoding_largebs, …}}}.

        The file does not name its GPU; all public ones were measured on A100-80G. Raises `BadProfile`.
        """
        path = Path(path)
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
        except OSError as e:
            raise BadProfile(f"profile {path} cannot be read: {e.strerror}") from e
        except ValueError as e:
            raise BadProfile(f"profile {path} is not JSON: {e}") from e
        if not isinstance(raw, dict) or not raw:
            raise BadProfile(
                f"profile {path} holds no model; expected an object of model → tp → coefficients"
            )
        fits: dict[tuple[str, int], Fit] = {}
        for model_id, by_tp in raw.items():
            if not isinstance(by_tp, dict) or not by_tp:
                raise BadProfile(
                    f"profile {path}: {model_id} holds no tp; expected an object of tp → coefficients"
                )
            for tp, entry in by_tp.items():
                if not tp.isdecimal() or int(tp) < 1:
                    raise BadProfile(f"profile {path}: {model_id}: tp is {tp!r}, not a whole number above 0")
                fits[model_id, int(tp)] = _fit(
                    entry, f"profile {path}: {model_id} tp {tp}", (model_id, int(tp))
                )
        return cls(f"{path.stem} fit", catalogue.gpu(product).product, "profile", fits)

    def shapes(self, model: Model) -> tuple[int, ...]:
        """Every tp that was measured for this model, rising; its own form carries each over to any pp."""
        return tuple(sorted(tp for (m, tp), fit in self.fits.items() if m == model.id and fit.measured))

    def covers(self, model: Model, gpu: GPU) -> bool:
        """Whether it holds a measured tp of this model on this GPU."""
        return gpu.product == self.product and bool(self.shapes(model))


# OPT-66B tp 8 stands in the shipped fits but not in the raw ones they come from: it is a copy of a vLLM curve
# (REFERENCE § 1), so a plan may not rest on it.
_COPIED = frozenset({("facebook/opt-66b", 8)})


def _fit(entry: Any, where: str, key: tuple[str, int]) -> Fit:
    def triple(field: str) -> tuple[float, float, float]:
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
    return Fit(prefill, small, large, threshold, key not in _COPIED)


@functools.cache
def shipped_profile() -> Profile:
    """DistServe's fits of OPT-13B and OPT-66B on A100-80G: raw fits × 1.10 for prefill (REFERENCE § 1)."""
    loaded = Profile.load(_PROFILES / "profiler-a100-80g.distserve.json")
    return dataclasses.replace(loaded, name="DistServe fit")


def _fitted(fit: Fit, pp: int) -> tuple[Ints, Floats, float, Floats, Floats]:
    """DistServe's form as tables. Each prefill stage ends with 1·pp ms of hand-over; decode stages have none.

    The public simulator adds 2 ms + 0.1 µs per token of context to every first stage as well; that is its own
    overhead, which only its reproduction adds (REFERENCE § 1).
    """
    a, b, c = fit.prefill
    knots = np.array([0, 8192], dtype=np.int64)
    prefill = ((a + b * knots) / pp + 1.0 * pp) * 1e6
    batch = np.arange(MAX_BATCH + 1)
    small = batch < fit.threshold

    def regime(i: int) -> Floats:
        return np.where(small, fit.decode_small[i], fit.decode_large[i])

    base = (regime(0) + regime(2) * batch) / pp * 1e6
    return knots, prefill, c / pp * 1e6, base, regime(1) / pp * 1e6


# --------------------------------------------------------------------------------------------------- roofline

# What the operator tables do not hold, assumed alike on every GPU: the host's share of a step (scheduling,
# sampling) in an engine with captured graphs; a layer's norms, rotary embedding, activation and cache write
# as so many short kernels, and as passes over the activations (read and write) at memory speed; one hop
# between pipeline stages.
_STEP_S = 1e-3
_LAYER_KERNELS_S = 10e-6
_ACTIVATION_PASSES = 10
_STREAM_EFFICIENCY = 0.8
_HOP_S = 20e-6


@dataclasses.dataclass(frozen=True, eq=False)
class _Curves:
    """Efficiency by shape of one GPU (data/profiles/gpu_op_efficiency.json)."""

    gemm_m: Floats  # log2 of rows
    gemm: Floats  # share of the GEMM roofline reached
    attention_len: Floats  # log2 of prompt length
    attention_mfu: Floats  # of causal prefill attention
    decode_s: float  # a decode attention kernel's fixed time
    decode_bandwidth: float  # and the share of memory bandwidth it reaches beside it
    allreduce: Mapping[
        int, tuple[float, float]
    ]  # tp → (seconds of a small one, share of the link of a large)


@functools.cache
def _tables() -> dict[str, Any]:
    tables: dict[str, Any] = json.loads((_PROFILES / "gpu_op_efficiency.json").read_text(encoding="utf-8"))
    return tables


@functools.cache
def _curves(gpu: GPU) -> _Curves:
    table = _tables()[gpu.efficiency]
    gemm = sorted((int(m), float(v["median"])) for m, v in table["gemm_bfloat16_roofline_eff_by_m"].items())
    attention = sorted((int(n), float(v)) for n, v in table["prefill_attention_mfu_causal_by_len"].items())
    # The table gives efficiency by bytes read (MB, geometric middle of each range), on the GPU it was
    # measured on. A fixed time plus bytes at a fixed share of bandwidth, fitted by relative least squares,
    # holds it within 13 %.
    measured = next(g for g in catalogue.GPUS.values() if g.efficiency == gpu.efficiency and not g.borrowed)
    ranges = [
        (math.sqrt(float(lo) * float(hi)) * 1e6, float(v))
        for (lo, hi), v in (
            (r.split("-"), v) for r, v in table["decode_attention_bw_eff_by_kv_bytes_read_MB"].items()
        )
    ]
    seconds = np.array([size / measured.bandwidth_bytes_s / eff for size, eff in ranges])
    ideal = np.array([size / measured.bandwidth_bytes_s for size, _ in ranges])
    fixed, factor = np.linalg.lstsq(
        np.stack([1 / seconds, ideal / seconds], 1), np.ones(len(ranges)), rcond=None
    )[0]
    return _Curves(
        np.log2([m for m, _ in gemm]),
        np.array([e for _, e in gemm]),
        np.log2([n for n, _ in attention]),
        np.array([e for _, e in attention]),
        max(0.0, float(fixed)),
        1.0 / max(1.0, float(factor)),
        {
            tp: (
                table[f"allreduce_tp{tp}"]["alpha_us_median_small"] * 1e-6,
                table[f"allreduce_tp{tp}"]["bound_eff"],
            )
            for tp in (2, 4, 8)
        },
    )


def _gemm_s(gpu: GPU, rows: Floats, params: float, weight_bytes: float) -> Floats:
    """Seconds of matrix products of `rows` rows with `params` weights of `weight_bytes` bytes on one GPU."""
    curves = _curves(gpu)
    bound = np.maximum(2 * rows * params / gpu.bf16_flops, weight_bytes / gpu.bandwidth_bytes_s)
    seconds: Floats = bound / np.interp(np.log2(rows), curves.gemm_m, curves.gemm)
    return seconds


def _allreduce_s(gpu: GPU, tp: int, size: Floats) -> Floats:
    """Seconds to sum `size` bytes over tp GPUs of a node; by log2 between the measured tp; beyond 8, as 8."""
    if tp == 1:
        return np.zeros_like(size)
    measured = _curves(gpu).allreduce
    where = np.log2(list(measured))
    alpha = float(np.interp(math.log2(tp), where, [a for a, _ in measured.values()]))
    share = float(np.interp(math.log2(tp), where, [e for _, e in measured.values()]))
    seconds: Floats = alpha + size / (share * gpu.peer_bytes_s)
    return seconds


def _layers_s(model: Model, gpu: GPU, tp: int, pp: int, rows: Floats) -> Floats:
    """Seconds of one stage's layers without attention, for `rows` tokens."""
    kv_copies = model.kv_heads_per_gpu(tp) * tp / model.kv_heads
    params = (
        2 * model.hidden * model.head_dim * (model.heads + model.kv_heads * kv_copies) + model.ffn_params
    ) / tp
    activations = rows * model.hidden * 2.0
    layer = (
        _gemm_s(gpu, rows, params, params * model.bytes_per_weight)
        + 2 * _allreduce_s(gpu, tp, activations)
        + _LAYER_KERNELS_S
        + 2 * _ACTIVATION_PASSES * activations / (_STREAM_EFFICIENCY * gpu.bandwidth_bytes_s)
    )
    hop = _HOP_S + activations / gpu.peer_bytes_s if pp > 1 else 0.0
    seconds: Floats = layer * (model.layers / pp) + hop
    return seconds


def _head_s(model: Model, gpu: GPU, tp: int, pp: int, rows: Floats) -> Floats:
    """Seconds of the output head, shared out over the stages (it stands on the last one only)."""
    params = model.table_params / tp
    seconds: Floats = _gemm_s(gpu, rows, params, params * model.bytes_per_weight) / pp
    return seconds


def _attention_line(model: Model, gpu: GPU, tp: int, pp: int) -> tuple[float, float]:
    """Seconds of one stage's causal attention over a prompt as α·len + β·len².

    Flops are 2·len²·heads·head_dim per layer (half of the full square) at the measured MFU. α and β by least
    squares relative to the attention's own time, from 128 tokens to the model's longest prompt; neither is
    negative.
    """
    curves = _curves(gpu)
    longest = max(2048, min(model.max_positions, 131072))
    lengths = np.exp2(np.arange(7.0, math.floor(math.log2(longest)) + 1.0))
    mfu = np.interp(np.log2(lengths), curves.attention_len, curves.attention_mfu)
    flops = 2 * lengths**2 * model.heads * model.head_dim / tp * (model.layers / pp)
    seconds = flops / (gpu.bf16_flops * mfu)
    solved = np.linalg.lstsq(
        np.stack([lengths, lengths**2], 1) / seconds[:, None], np.ones(len(lengths)), rcond=None
    )
    alpha, beta = (float(x) for x in solved[0])
    if alpha < 0:
        return 0.0, float(np.mean(seconds / lengths**2))
    return alpha, max(0.0, beta)


# Powers of two and the steps halfway between them: the kinks of the GEMM roofline lie within a step.
_KNOTS = np.array([0, 1, *sorted(n for p in range(4, 18) for n in (2**p, 3 * 2 ** (p - 1)))], dtype=np.int64)


def _roofline(model: Model, gpu: GPU, tp: int, pp: int) -> tuple[Ints, Floats, float, Floats, Floats]:
    rows = np.maximum(_KNOTS, 1).astype(np.float64)
    alpha, beta = _attention_line(model, gpu, tp, pp)
    one = np.ones_like(rows)
    prefill = (
        _layers_s(model, gpu, tp, pp, rows) + _head_s(model, gpu, tp, pp, one) + _STEP_S + alpha * _KNOTS
    )

    curves = _curves(gpu)
    batch = np.maximum(np.arange(MAX_BATCH + 1), 1).astype(np.float64)
    base = (
        _layers_s(model, gpu, tp, pp, batch)
        + _head_s(model, gpu, tp, pp, batch)
        + _STEP_S
        + curves.decode_s * (model.layers / pp)
    )
    kv_bytes = 2 * model.kv_heads_per_gpu(tp) * model.head_dim * model.bytes_per_kv * (model.layers / pp)
    per_token = kv_bytes / (curves.decode_bandwidth * gpu.bandwidth_bytes_s)
    return _tidy(
        _KNOTS,
        np.maximum.accumulate(prefill) * 1e9,
        beta * 1e9,
        np.maximum.accumulate(base) * 1e9,
        np.full(MAX_BATCH + 1, per_token * 1e9),
    )


def _tidy(
    knots: Ints, prefill: Floats, quad: float, base: Floats, ctx: Floats
) -> tuple[Ints, Floats, float, Floats, Floats]:
    """Tables without their last digits, in which machines differ by an ulp or so (REFERENCE § 10)."""
    return knots, np.round(prefill, 3), round(quad, 9), np.round(base, 3), np.round(ctx, 6)


# ---------------------------------------------------------------------------------------------------- physics


def _check_physics(model: Model, gpu: GPU, tp: int, pp: int, times: StepTimes) -> None:
    """Raise `FasterThanPhysics` where a step beats the datasheet's flops and bandwidth, over the used range.

    Prefill: one prompt of 1 token to the model's longest, or batches of 512 tokens up to 8192. Decode:
    batches up to 1024 with every context that the KV blocks of the instance can hold.
    """
    layer_params = model.attention_params + model.ffn_params
    params = (model.layers * layer_params + model.table_params) / (tp * pp)
    prefill_params = model.layers * layer_params / (tp * pp)
    weights_s = prefill_params * model.bytes_per_weight / gpu.bandwidth_bytes_s
    attention = 2 * model.heads * model.head_dim * model.layers / (tp * pp) / gpu.bf16_flops

    def judge(seconds: float, bound_s: float, what: str) -> None:
        if seconds < bound_s:
            raise FasterThanPhysics(
                f"{times.provenance.detail}: {what} of {model.id} with tp {tp}, pp {pp} on {gpu.short} takes "
                f"{seconds * 1e3:.3g} ms a stage, which the hardware cannot do below {bound_s * 1e3:.3g} ms"
            )

    lengths = sorted({1, 16, 64, 128, 256, 512, 1024, min(2048, model.max_positions), model.max_positions})
    batches = [[n] for n in lengths if n <= model.max_positions] + [[512] * k for k in (2, 4, 8, 16)]
    for batch in batches:
        squares = sum(n * n for n in batch)
        bound = max(2 * sum(batch) * prefill_params / gpu.bf16_flops + attention * squares, weights_s)
        judge(times.prefill_stage_s(batch), bound, f"a prefill of {sum(batch)} tokens")

    held = catalogue.kv_blocks(model, gpu, tp, pp) * catalogue.BLOCK_TOKENS
    kv_bytes = 2 * model.kv_heads_per_gpu(tp) * model.head_dim * model.bytes_per_kv * model.layers / pp
    for size in (1, 8, 32, 64, 94, 95, 128, 256, 512, 1024):
        for context in {size, min(held, size * model.max_positions)}:
            if context < size or size > held:
                continue
            read = params * model.bytes_per_weight + kv_bytes * context
            bound = max(read / gpu.bandwidth_bytes_s, 2 * size * params / gpu.bf16_flops)
            judge(
                times.decode_stage_s(size, context),
                bound,
                f"a decode step of {size} requests, {context} tokens",
            )


# ------------------------------------------------------------------------------------------------- step times


def step_times(model: Model, gpu: GPU, tp: int, pp: int, profile: Profile | None = None) -> StepTimes:
    """Step times of one stage of the model on tp × pp GPUs of one kind.

    `profile` (default: the shipped one) is the source where it covers the model on this GPU. A tp that it
    lacks, or only copied, is the roofline × the profile's ratio at the nearest measured tp, and says so. All
    else is roofline. Raises `BadShape`, or `FasterThanPhysics` for a profile that is faster than the
    hardware.
    """
    return _step_times(model, gpu, tp, pp, profile or shipped_profile())


@functools.lru_cache(maxsize=4096)
def _step_times(model: Model, gpu: GPU, tp: int, pp: int, profile: Profile) -> StepTimes:
    if fault := model.shape_fault(tp, pp):
        raise BadShape(f"{model.id} does not take this shape: {fault}")
    if not profile.covers(model, gpu):
        whose = gpu.efficiency.split("_")[0].upper()
        curves = f"{whose} efficiency curves" + (f", borrowed for {gpu.short}" if gpu.borrowed else "")
        return StepTimes(
            *_roofline(model, gpu, tp, pp),
            pp,
            Provenance("roofline", f"roofline with {curves}", gpu.borrowed),
        )
    measured = profile.shapes(model)
    if tp in measured:
        said = f"{profile.name}, {gpu.short}, tp {','.join(map(str, measured))}"
        times = StepTimes(
            *_fitted(profile.fits[model.id, tp], pp), pp, Provenance(profile.source, said, measured=True)
        )
    else:
        near = min(measured, key=lambda m: (abs(math.log2(m / tp)), m))
        times = _scaled(model, gpu, tp, pp, profile, near)
    _check_physics(model, gpu, tp, pp, times)
    return times


def _scaled(model: Model, gpu: GPU, tp: int, pp: int, profile: Profile, near: int) -> StepTimes:
    """The roofline at tp × the mean ratio of profile and roofline at the nearest measured tp."""
    neutral = Provenance("roofline", "")
    fit = StepTimes(*_fitted(profile.fits[model.id, near], 1), 1, neutral)
    roof = StepTimes(*_roofline(model, gpu, near, 1), 1, neutral)

    def mean(ratios: Iterable[float]) -> float:
        return math.exp(float(np.mean(np.log(list(ratios)))))

    prefill = mean(fit.prefill_stage_s([n]) / roof.prefill_stage_s([n]) for n in (128, 256, 512, 1024, 2048))
    decode = mean(
        fit.decode_stage_s(b, b * c) / roof.decode_stage_s(b, b * c)
        for b in (1, 8, 32, 64, 128)
        for c in (256, 1024)
    )
    knots, prefill_ns, quad, base, ctx = _roofline(model, gpu, tp, pp)
    said = f"roofline × {profile.name}'s ratio at tp {near}, {gpu.short}"
    tables = _tidy(knots, prefill_ns * prefill, quad * prefill, base * decode, ctx * decode)
    return StepTimes(*tables, pp, Provenance("roofline", said, gpu.borrowed))


def saturation_tokens(model: Model, gpu: GPU, tp: int = 1, pp: int = 1) -> int:
    """L_m: up to so many prompt tokens are worth batching into one prefill (paper § 4.3, REFERENCE § 1).

    The smallest power of two from 128 to 2048 (and to the model's longest prompt) at which the GEMMs of a
    layer do at least 90 % as many tokens a second as at 2048. It gives the paper's 512 for OPT on A100. The
    efficiency curves go by rows only, so model, tp and pp do not move it.
    """
    rows = np.exp2(np.arange(7.0, 12.0))
    params = float(model.attention_params + model.ffn_params)
    rate = rows / _gemm_s(gpu, rows, params, params * model.bytes_per_weight)
    reached = int(rows[int(np.argmax(rate >= SATURATED * rate[-1]))])
    return min(reached, model.max_positions)


def transfer_s(kv_bytes: int, link: Link) -> float:
    """Seconds to move so many bytes of KV over a link."""
    return link.latency_s + kv_bytes / link.bytes_per_s
