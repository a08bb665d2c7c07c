"""Step times of what was never measured: the datasheet's limits × the share of them that operators reach by shape.

Efficiency by shape (data/profiles/gpu_op_efficiency.json): GEMM by rows, in bf16 and fp8, attention by length,
decode attention by bytes read, all-reduce by tp. With experts, a step reads the weights of the distinct ones
that its tokens touch and multiplies each token with its own; the products of one expert have only its tokens
as rows. That grouped products reach what one product of so many rows does is assumed, not measured.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from disaggserve import catalogue
from disaggserve.catalogue import GPU, Model
from disaggserve.latency.steps import MAX_BATCH, Floats, Ints, Tables

# What the operator tables do not hold, assumed alike on every GPU: the host's share of a step (scheduling,
# sampling) in an engine with captured graphs; a layer's norms, rotary embedding, activation and cache write
# as so many short kernels, and as passes over the activations (read and write) at memory speed; one hop
# between pipeline stages.
_STEP_S = 1e-3
_LAYER_KERNELS_S = 10e-6
_ACTIVATION_PASSES = 10
_STREAM_EFFICIENCY = 0.8
HOP_S = 20e-6


@dataclasses.dataclass(frozen=True, eq=False)
class _Curves:
    """Efficiency by shape of one GPU (data/profiles/gpu_op_efficiency.json)."""

    gemm_m: Floats  # log2 of rows
    gemm: Floats  # share of the GEMM roofline reached
    fp8_m: Floats
    fp8: Floats  # the same of the fp8 roofline
    attention_len: Floats  # log2 of prompt length
    attention_mfu: Floats  # of causal prefill attention
    decode_s: float  # a decode attention kernel's fixed time
    decode_bandwidth: float  # and the share of memory bandwidth it reaches beside it
    allreduce: Mapping[
        int, tuple[float, float]
    ]  # tp → (seconds of a small one, share of the link of a large)


@functools.cache
def _tables() -> dict[str, Any]:
    path = Path(catalogue.__file__).parent / "data" / "profiles" / "gpu_op_efficiency.json"
    tables: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return tables


@functools.cache
def _curves(gpu: GPU) -> _Curves:
    table = _tables()[gpu.efficiency]

    def by_rows(of: str) -> list[tuple[int, float]]:
        return sorted((int(m), float(v["median"])) for m, v in table.get(of, fp8_elsewhere).items())

    # L40S does fp8 and borrows the A100's curves, which have none: the H100's then.
    fp8_elsewhere = _tables()["h100_sxm"]["gemm_fp8_roofline_eff_by_m"]
    gemm, fp8 = by_rows("gemm_bfloat16_roofline_eff_by_m"), by_rows("gemm_fp8_roofline_eff_by_m")
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
        np.log2([m for m, _ in fp8]),
        np.array([e for _, e in fp8]),
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


def _gemm_s(
    gpu: GPU, rows: Floats, work: Floats | float, read: Floats | float, *, bytes_each: int, fp8: bool = False
) -> Floats:
    """Seconds of matrix products on one GPU.

    `rows` of each product (decides the share of the roofline), `work` = Σ rows · weights multiplied with,
    `read` = weights read, of `bytes_each` bytes. fp8 has its own peak and curve; all else multiplies in bf16
    after reading (int8 too: w8a16), and 4-byte weights at half of bf16's peak (TF32).
    """
    curves = _curves(gpu)
    peak = gpu.fp8_flops if fp8 else gpu.bf16_flops / (2 if bytes_each > 2 else 1)
    m, share = (curves.fp8_m, curves.fp8) if fp8 else (curves.gemm_m, curves.gemm)
    bound = np.maximum(2 * np.asarray(work) / peak, np.asarray(read) * bytes_each / gpu.bandwidth_bytes_s)
    seconds: Floats = bound / np.interp(np.log2(rows), m, share)
    return seconds


def layer_gemms_s(model: Model, gpu: GPU, tp: int, rows: Floats) -> Floats:
    """Seconds of one layer's matrix products for `rows` tokens."""
    kv_copies = model.kv_heads_per_gpu(tp) * tp / model.kv_heads
    attention = 2 * model.hidden * model.head_dim * (model.heads + model.kv_heads * kv_copies) / tp
    ffn = model.ffn_params / tp
    product = functools.partial(
        _gemm_s, gpu, bytes_each=model.bytes_per_weight, fp8=model.quantised == "fp8" and gpu.fp8_flops > 0
    )
    if not model.experts:
        return product(rows, rows * (attention + ffn), attention + ffn)
    touched = np.array([model.ffns_touched(r) for r in rows])
    each = rows * model.experts_per_token / touched
    experts = product(each, rows * model.experts_per_token * ffn, touched * ffn)
    return product(rows, rows * attention, attention) + experts


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
    activations = rows * float(model.hidden * model.bytes_per_activation)
    layer = (
        layer_gemms_s(model, gpu, tp, rows)
        + 2 * _allreduce_s(gpu, tp, activations)
        + _LAYER_KERNELS_S
        + 2 * _ACTIVATION_PASSES * activations / (_STREAM_EFFICIENCY * gpu.bandwidth_bytes_s)
    )
    hop = HOP_S + activations / gpu.peer_bytes_s if pp > 1 else 0.0
    seconds: Floats = layer * (model.layers / pp) + hop
    return seconds


def _head_s(model: Model, gpu: GPU, tp: int, pp: int, rows: Floats) -> Floats:
    """Seconds of the output head, shared out over the stages (it stands on the last one only)."""
    params = model.table_params / tp
    return _gemm_s(gpu, rows, rows * params, params, bytes_each=model.bytes_per_activation) / pp


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


def tables(model: Model, gpu: GPU, tp: int, pp: int) -> Tables:
    """The roofline's tables of one stage, rising with tokens and batch."""
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
    return tidy(
        _KNOTS,
        np.maximum.accumulate(prefill) * 1e9,
        beta * 1e9,
        np.maximum.accumulate(base) * 1e9,
        np.full(MAX_BATCH + 1, per_token * 1e9),
    )


def tidy(knots: Ints, prefill: Floats, quad: float, base: Floats, ctx: Floats) -> Tables:
    """Tables without their last digits, in which machines differ by an ulp or so (REFERENCE § 10)."""
    return knots, np.round(prefill, 3), round(quad, 9), np.round(base, 3), np.round(ctx, 6)
