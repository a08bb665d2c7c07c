"""The least time that the datasheet allows for a step: no profile and no measured row may beat it."""

from __future__ import annotations

import numpy as np

from disaggserve import catalogue
from disaggserve.catalogue import GPU, Model
from disaggserve.latency.errors import FasterThanPhysics
from disaggserve.latency.profiles import EVERYTHING, Range
from disaggserve.latency.steps import StepTimes, Tables


def peak_flops(model: Model, gpu: GPU) -> float:
    """Most operations a second on the layers' matrices.

    fp8 matrices on GPUs whose tensor cores do fp8 at that rate; int8 at twice bf16's (all of these GPUs do
    that); 4-byte weights at half of it (TF32).
    """
    if model.quantised == "fp8":
        return gpu.fp8_flops or gpu.bf16_flops
    if model.quantised == "int8":
        return 2 * gpu.bf16_flops
    return gpu.bf16_flops / (2 if model.bytes_per_weight > 2 else 1)


def prefill_bound_s(model: Model, gpu: GPU, tp: int, pp: int, tokens: int, squares: float) -> float:
    """Least seconds of one stage for prompts of `tokens` = Σlen and `squares` = Σlen².

    Every token is multiplied with its active weights, attention is causal, and at least the weights of one
    token's experts are read. The output head is left out: it runs for one token a prompt.
    """
    gpus = tp * pp
    flops = 2 * tokens * model.layers * model.active_layer_params / gpus / peak_flops(model, gpu)
    attention = 2 * squares * model.heads * model.head_dim * model.layers / gpus / gpu.bf16_flops
    read = model.layers * model.active_layer_params * model.bytes_per_weight / gpus
    return max(flops + attention, read / gpu.bandwidth_bytes_s)


def _decode_parts_s(model: Model, gpu: GPU, tp: int, pp: int) -> tuple[float, float, float]:
    """Least seconds of one stage to read the weights of one token, to read a token of context, to multiply a request."""
    layers = model.layers * model.active_layer_params / (tp * pp)
    table = model.table_params / (tp * pp)
    weights = layers * model.bytes_per_weight + table * model.bytes_per_activation
    kv = 2 * model.kv_heads_per_gpu(tp) * model.head_dim * model.bytes_per_kv * model.layers / pp
    request = 2 * (layers / peak_flops(model, gpu) + table / gpu.bf16_flops)
    return weights / gpu.bandwidth_bytes_s, kv / gpu.bandwidth_bytes_s, request


def decode_bound_s(model: Model, gpu: GPU, tp: int, pp: int, batch: int, context_tokens: int) -> float:
    """Least seconds of one stage for a step of `batch` requests with Σ context tokens of KV to read.

    With experts, all requests may have chosen the same ones: those of one token are read at the least.
    """
    weights, context, request = _decode_parts_s(model, gpu, tp, pp)
    return max(weights + context * context_tokens, request * batch)


def least_slopes_s(model: Model, gpu: GPU, tp: int, phase: str) -> tuple[float, float]:
    """Least seconds of a whole pass per token and per squared token (prefill), or per token of context and 0.

    A decode's requests have no least time each: as long as weights are read, multiplying with them hides in it.
    """
    if phase == "decode":
        return _decode_parts_s(model, gpu, tp, 1)[1], 0.0
    layers = model.layers / tp
    token = 2 * layers * model.active_layer_params / peak_flops(model, gpu)
    return token, 2 * layers * model.heads * model.head_dim / gpu.bf16_flops


def floored(model: Model, gpu: GPU, tp: int, pp: int, tables: Tables) -> Tables:
    """A fitted profile's tables with nothing faster than the hardware.

    What it says beyond the range that it was made from is a guess, and this is the least that is certain. The
    first knots are flat (`Fit.tables`); a batch's base is at least the time to read the weights or multiply.
    """
    knots, prefill, quad, base, ctx = tables
    token, square = (s / pp * 1e9 for s in least_slopes_s(model, gpu, tp, "prefill"))
    weights, context, request = (s * 1e9 for s in _decode_parts_s(model, gpu, tp, pp))
    start = max(float(prefill[0]), prefill_bound_s(model, gpu, tp, pp, 0, 0) * 1e9, token * float(knots[1]))
    rise = np.maximum(np.diff(prefill), token * np.diff(knots))[1:]
    least = np.maximum(weights, request * np.arange(len(base)))
    prefill = np.concatenate([[start, start], start + np.cumsum(rise)])
    return knots, prefill, max(quad, square), np.maximum(base, least), np.maximum(ctx, context)


def check(model: Model, gpu: GPU, tp: int, pp: int, times: StepTimes, measured: Range | None = None) -> None:
    """Raise `FasterThanPhysics` where a step beats the datasheet's flops and bandwidth, over the used range.

    Prefill: one prompt of 1 token to the model's longest, or batches of 512 tokens up to 8192. Decode:
    batches up to 1024 with every context that the KV blocks of the instance can hold. With `measured` only what
    lies in it, and only where the step beats the hardware by more than the fit is off from its rows at most.
    """
    seen = measured or EVERYTHING

    def judge(seconds: float, bound_s: float, slack: float, what: str) -> None:
        if seconds < bound_s * (1 - slack):
            raise FasterThanPhysics(
                f"{times.provenance.detail}: {what} of {model.id} with tp {tp}, pp {pp} on {gpu.short} takes "
                f"{seconds * 1e3:.3g} ms a stage, which the hardware cannot do below {bound_s * 1e3:.3g} ms"
            )

    ends = {n for n in seen.tokens if n <= model.max_positions}
    lengths = sorted(
        ends | {1, 16, 64, 128, 256, 512, 1024, min(2048, model.max_positions), model.max_positions}
    )
    batches = [[n] for n in lengths if n <= model.max_positions] + [[512] * k for k in (2, 4, 8, 16)]
    for batch in batches:
        if seen.tokens[0] <= sum(batch) <= seen.tokens[1]:
            bound = prefill_bound_s(model, gpu, tp, pp, sum(batch), sum(n * n for n in batch))
            judge(times.prefill_stage_s(batch), bound, seen.prefill_off, f"a prefill of {sum(batch)} tokens")

    held = catalogue.kv_blocks(model, gpu, tp, pp) * catalogue.BLOCK_TOKENS
    for size in (1, 8, 32, 64, 94, 95, 128, 256, 512, 1024):
        least, most = max(size, seen.context[0]), min(held, size * model.max_positions, seen.context[1])
        if least > most or not seen.batch[0] <= size <= seen.batch[1]:
            continue
        for context in {least, most}:
            judge(
                times.decode_stage_s(size, context),
                decode_bound_s(model, gpu, tp, pp, size, context),
                seen.decode_off,
                f"a decode step of {size} requests, {context} tokens",
            )
