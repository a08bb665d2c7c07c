"""Which source answers: a profile where it covers, else the roofline; what a shape lacks is scaled from its neighbour."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterable

import numpy as np

from disaggserve.catalogue import GPU, BadShape, Link, Model
from disaggserve.latency import physics, roofline
from disaggserve.latency.profiles import Profile, shipped_profiles
from disaggserve.latency.steps import Floats, Provenance, StepTimes

SATURATED = 0.9  # see `saturation_tokens`


def profile_for(model: Model, gpu: GPU, profile: Profile | None = None) -> Profile | None:
    """The one profile that all shapes of this model on this GPU come from, or None for the roofline.

    `profile` where it covers them, else a shipped one that does.
    """
    return next((p for p in (profile, *shipped_profiles()) if p is not None and p.covers(model, gpu)), None)


def step_times(
    model: Model, gpu: GPU, tp: int, pp: int, profile: Profile | None = None, engine: str | None = None
) -> StepTimes:
    """Step times of one stage of the model on tp × pp GPUs of one kind.

    The source is `profile_for`'s. A tp that it lacks, or only copied, is the roofline × the profile's ratio at
    the nearest measured tp, and says so. All else is roofline. Where the profile was measured on another engine than
    `engine`, the one planned for, the provenance says so. Raises `BadShape`, or `FasterThanPhysics` for a profile that is
    faster than the hardware.
    """
    source = profile_for(model, gpu, profile)
    times = _step_times(model, gpu, tp, pp, source)
    measured_on = source.engine if source is not None else None
    return times if engine is None or measured_on in (None, engine) else _elsewhere(times, str(measured_on))


@functools.lru_cache(maxsize=4096)
def _elsewhere(times: StepTimes, engine: str) -> StepTimes:
    """The same, saying which engine was measured."""
    whose = "DistServe's engine" if engine == "distserve" else engine
    return dataclasses.replace(times, provenance=dataclasses.replace(times.provenance, elsewhere=whose))


@functools.lru_cache(maxsize=4096)
def _step_times(model: Model, gpu: GPU, tp: int, pp: int, profile: Profile | None) -> StepTimes:
    if fault := model.shape_fault(tp, pp):
        raise BadShape(f"{model.id} does not take this shape: {fault}")
    if profile is None:
        whose = gpu.efficiency.split("_")[0].upper()
        curves = f"{whose} efficiency curves" + (f", borrowed for {gpu.short}" if gpu.borrowed else "")
        said = Provenance("roofline", f"roofline with {curves}", gpu.borrowed)
        return StepTimes(*roofline.tables(model, gpu, tp, pp), pp, said)
    measured = profile.shapes(model)
    if tp in measured:
        said = Provenance(
            profile.source, f"{profile.name}, {gpu.short}, tp {','.join(map(str, measured))}", measured=True
        )
        times = fitted(model, gpu, tp, pp, profile, said)
    else:
        near = min(measured, key=lambda m: (abs(math.log2(m / tp)), m))
        times = scaled(model, gpu, tp, pp, profile, near)
    physics.check(model, gpu, tp, pp, times)
    return times


def fitted(model: Model, gpu: GPU, tp: int, pp: int, profile: Profile, said: Provenance) -> StepTimes:
    """A profile's own step times of a measured tp.

    Of a fitted profile with a pp that was not measured, beside one stage that was, each stage ends with the
    roofline's hop. Its range is checked against the hardware; beyond it no step is faster than the hardware.
    """
    fit = profile.fit(model, tp)
    knots, prefill, quad, base, ctx = fit.tables(pp)
    if fit.range is None:
        return StepTimes(knots, prefill, quad, base, ctx, pp, said)
    if pp > 1 and fit.pps == (1,):
        prefill, base = prefill + roofline.HOP_S * 1e9, base + roofline.HOP_S * 1e9
    physics.check(model, gpu, tp, pp, StepTimes(knots, prefill, quad, base, ctx, pp, said), fit.range)
    return StepTimes(*physics.floored(model, gpu, tp, pp, (knots, prefill, quad, base, ctx)), pp, said)


def scaled(model: Model, gpu: GPU, tp: int, pp: int, profile: Profile, near: int) -> StepTimes:
    """The roofline at tp × the mean ratio of profile and roofline at the nearest measured tp."""
    neutral = Provenance("roofline", "")
    fit = fitted(model, gpu, near, 1, profile, Provenance(profile.source, profile.name))
    roof = StepTimes(*roofline.tables(model, gpu, near, 1), 1, neutral)

    def mean(ratios: Iterable[float]) -> float:
        return math.exp(float(np.mean(np.log(list(ratios)))))

    prefill = mean(fit.prefill_stage_s([n]) / roof.prefill_stage_s([n]) for n in (128, 256, 512, 1024, 2048))
    decode = mean(
        fit.decode_stage_s(b, b * c) / roof.decode_stage_s(b, b * c)
        for b in (1, 8, 32, 64, 128)
        for c in (256, 1024)
    )
    knots, prefill_ns, quad, base, ctx = roofline.tables(model, gpu, tp, pp)
    said = f"roofline × {profile.name}'s ratio at tp {near}, {gpu.short}"
    tables = roofline.tidy(knots, prefill_ns * prefill, quad * prefill, base * decode, ctx * decode)
    return StepTimes(*tables, pp, Provenance("roofline", said, gpu.borrowed))


def saturation_tokens(
    model: Model, gpu: GPU, tp: int = 1, pp: int = 1, profile: Profile | None = None
) -> int:
    """L_m: up to so many prompt tokens are worth batching into one prefill (paper § 4.3, REFERENCE § 1).

    The smallest power of two from 128 to 2048 (and to the model's longest prompt) at which as many tokens a
    second are done as 90 % of those at 2048: by the whole prefill of `profile` without attention's square where
    it was fitted to this very tp, else by the matrix products of a layer. Those give the paper's 512 for OPT on
    A100, also where the shipped fits, whose constants hold the engine's share of a step, are the source.
    """
    rows = np.exp2(np.arange(7.0, 12.0))
    seconds: Floats
    if (
        profile is not None
        and profile.source == "fitted"
        and profile.covers(model, gpu)
        and tp in profile.shapes(model)
    ):
        knots, prefill_ns, *_ = profile.fit(model, tp).tables(pp)
        seconds = np.interp(rows, knots, prefill_ns)
    else:
        seconds = roofline.layer_gemms_s(model, gpu, tp, rows)
    rate = rows / seconds
    reached = int(rows[int(np.argmax(rate >= SATURATED * rate[-1]))])
    return min(reached, model.max_positions)


def transfer_s(kv_bytes: int, link: Link) -> float:
    """Seconds to move so many bytes of KV over a link."""
    return link.latency_s + kv_bytes / link.bytes_per_s
