"""Step times: the published form to the digit, the roofline's sanity, and physics."""

import dataclasses
import hashlib
import json
from pathlib import Path

import numpy as np
import pytest

from disaggserve import catalogue, latency
from disaggserve.catalogue import BadShape
from disaggserve.latency import (
    BadProfile,
    FasterThanPhysics,
    Profile,
    fitting,
    measurements,
    physics,
    roofline,
    sources,
    step_times,
)

A100 = catalogue.gpu("NVIDIA-A100-SXM4-80GB")
H100 = catalogue.gpu("NVIDIA-H100-80GB-HBM3")
L40S = catalogue.gpu("NVIDIA-L40S")
OPT13, OPT66 = catalogue.model("facebook/opt-13b"), catalogue.model("facebook/opt-66b")
LLAMA8, LLAMA70 = (
    catalogue.model("meta-llama/Meta-Llama-3-8B"),
    catalogue.model("meta-llama/Meta-Llama-3-70B"),
)
ROOT = Path(__file__).resolve().parents[2]
PROFILES = Path(catalogue.__file__).parent / "data" / "profiles"
SHIPPED = PROFILES / "profiler-a100-80g.distserve.json"
COEFFICIENTS = json.loads(SHIPPED.read_text())


@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("pp", [1, 2, 4])
@pytest.mark.parametrize("lengths", [[1], [512], [55, 829, 697], [2048] * 4])
def test_prefill_is_the_published_form(tp, pp, lengths):
    a, b, c = COEFFICIENTS["facebook/opt-13b"][str(tp)]["prefill"]
    ms = (a + b * sum(lengths) + c * sum(n * n for n in lengths)) / pp + 1 * pp
    assert step_times(OPT13, A100, tp, pp).prefill_stage_s(lengths) == pytest.approx(ms / 1e3, rel=1e-12)


@pytest.mark.parametrize("tp", [2, 3, 4])
@pytest.mark.parametrize("pp", [1, 2])
@pytest.mark.parametrize("batch", [1, 94, 95, 1024, 1500])
def test_decode_is_the_published_form_in_both_regimes(tp, pp, batch):
    entry = COEFFICIENTS["facebook/opt-66b"][str(tp)]
    a, b, c = entry["decoding_smallbs" if batch < 95 else "decoding_largebs"]
    context = 812 * batch
    ms = (a + b * context + c * batch) / pp
    assert step_times(OPT66, A100, tp, pp).decode_stage_s(batch, context) == pytest.approx(
        ms / 1e3, rel=1e-12
    )


def test_a_hand_checked_figure():
    # 18.1025 + 0.1019123·512 + 7.12226e-6·512² + 1 = 73.149 ms
    # 19.9347 + 6.26936e-4·34,040 + 0.038507·40 = 42.816 ms
    times = step_times(OPT13, A100, 1, 1)
    assert times.prefill_stage_s([512]) * 1e3 == pytest.approx(73.149, abs=1e-3)
    assert times.decode_stage_s(40, 40 * 851) * 1e3 == pytest.approx(42.816, abs=1e-3)


def test_shapes_and_provenance():
    shipped = latency.shipped_profile()
    assert shipped.shapes(OPT13) == (1, 2, 4)
    assert shipped.shapes(OPT66) == (2, 3, 4)  # tp 8 is a copy
    assert shipped.shapes(LLAMA8) == ()
    fit = step_times(OPT13, A100, 2, 1).provenance
    assert (fit.source, fit.measured, fit.describe()) == (
        "profile",
        True,
        "DistServe fit, A100-80G, tp 1,2,4",
    )
    scaled = step_times(OPT66, A100, 8, 1).provenance
    assert (scaled.source, scaled.measured) == ("roofline", False)
    assert scaled.describe() == "roofline × DistServe fit's ratio at tp 4, A100-80G"
    roof = step_times(LLAMA8, L40S, 1, 1).provenance
    assert (roof.source, roof.borrowed, roof.measured) == ("roofline", True, False)
    assert roof.describe() == "roofline with A100 efficiency curves, borrowed for L40S"
    assert step_times(OPT66, H100, 2, 1).provenance.describe() == "roofline with H100 efficiency curves"


def test_step_times_of_another_engine_than_the_one_planned_for_say_so() -> None:
    vllm = Profile.load(PROFILES / "profiler-a100-80g.vllm.json")

    def said(engine: str, profile: Profile | None = None, gpu: catalogue.GPU = A100, tp: int = 1) -> str:
        return (
            step_times(OPT13, gpu, tp, 1, profile, engine)
            .provenance.describe()
            .rpartition(", measured on ")[2]
        )

    for engine in ("torch", "vllm", "sglang"):
        assert said(engine) == "DistServe's engine"
    assert (said("torch", vllm), said("distserve", vllm)) == ("vllm", "vllm")
    assert said("torch", tp=8) == "DistServe's engine", "scaled from it"
    for own in (said("vllm", vllm), said("distserve"), said("vllm", gpu=L40S)):
        assert own.startswith(("profiler", "DistServe fit", "roofline")), "its own, or measured on none"
    times = step_times(OPT13, A100, 1, 1, None, "vllm")
    assert times is step_times(OPT13, A100, 1, 1, None, "vllm"), "kept, so that the kernel's tables are"


def all_step_times():
    for model in (
        OPT13,
        catalogue.model("facebook/opt-175b"),
        LLAMA8,
        LLAMA70,
        catalogue.model("Qwen/Qwen3-32B"),
        catalogue.model("Qwen/Qwen3-32B-FP8"),
        catalogue.model("Qwen/Qwen3-30B-A3B"),
        catalogue.model("mistralai/Mixtral-8x7B-v0.1"),
    ):
        for gpu in catalogue.GPUS.values():
            for tp, pp in ((1, 1), (2, 1), (4, 2), (8, 1)):
                yield model, gpu, tp, pp


@pytest.mark.parametrize(("model", "gpu", "tp", "pp"), list(all_step_times()))
def test_roofline_tables_rise_and_keep_to_physics(model, gpu, tp, pp):
    t = step_times(model, gpu, tp, pp)
    physics.check(model, gpu, tp, pp, t)
    assert t.prefill_knots_tokens.dtype == np.int64
    assert t.prefill_knots_ns.dtype == t.decode_base_ns.dtype == t.decode_ctx_ns.dtype == np.float64
    assert len(t.decode_base_ns) == len(t.decode_ctx_ns) == latency.MAX_BATCH + 1
    assert t.prefill_knots_tokens[0] == 0
    assert np.all(np.diff(t.prefill_knots_tokens) > 0)
    assert np.all(np.diff(t.prefill_knots_ns) >= 0)
    assert t.prefill_knots_ns[0] > 0
    assert t.prefill_quad_ns >= 0
    assert np.all(t.decode_ctx_ns > 0)
    if t.provenance.source == "roofline":
        assert np.all(np.diff(t.decode_base_ns) >= 0)


QWEN_MOE = catalogue.model("Qwen/Qwen3-30B-A3B")
MIXTRAL = catalogue.model("mistralai/Mixtral-8x7B-v0.1")
FP8 = catalogue.model("Qwen/Qwen3-32B-FP8")
BF16 = catalogue.model("Qwen/Qwen3-32B")
INT8 = dataclasses.replace(BF16, bytes_per_weight=1, quantised="int8")


def gemm_s(model, gpu, rows):
    return float(roofline.layer_gemms_s(model, gpu, 1, np.array([float(rows)]))[0])


def test_a_step_of_experts_by_hand():
    # Qwen3-30B-A3B: attention 2·2048·128·(32+4) = 18,874,368 weights, an expert 3·2048·768 = 4,718,592.
    # One token reads 8 of 128 experts: (18,874,368 + 8·4,718,592)·2 bytes = 113,246,208 at 3.35 TB/s = 33.80 µs,
    # at the 0.845 of the bandwidth that one row reaches: 40.01 µs.
    assert gemm_s(QWEN_MOE, H100, 1) * 1e6 == pytest.approx(40.01, abs=0.01)
    # 64 tokens touch 128·(1 − (1 − 1/16)^64) = 125.94 experts, of 64·8/125.94 = 4.066 rows: 125.94·9,437,184 bytes
    # = 354.8 µs / 0.8411, and attention 11.27 µs / 0.840: 435.2 µs.
    assert QWEN_MOE.ffns_touched(64) == pytest.approx(125.94, abs=0.01)
    assert gemm_s(QWEN_MOE, H100, 64) * 1e6 == pytest.approx(435.2, abs=0.2)
    # 8192 tokens: all experts with 512 rows: 2·8192·8·4,718,592 / 989.4e12 = 625.1 µs / 0.819, attention
    # 2·8192·18,874,368 / 989.4e12 = 312.6 µs / 0.776: 1,166.1 µs. Compute follows the active weights.
    assert gemm_s(QWEN_MOE, H100, 8192) * 1e6 == pytest.approx(1166.1, abs=0.2)


def test_eight_bit_weights_by_hand():
    # Qwen3-32B: 94,371,840 + 393,216,000 = 487,587,840 weights a layer. One row reads them at 3.35 TB/s:
    # bf16 291.1 µs / 0.845 = 344.5, fp8 145.5 µs / 0.715 = 203.6, int8 (w8a16) 145.5 / 0.845 = 172.2.
    assert gemm_s(BF16, H100, 1) * 1e6 == pytest.approx(344.5, abs=0.1)
    assert gemm_s(FP8, H100, 1) * 1e6 == pytest.approx(203.6, abs=0.1)
    assert gemm_s(INT8, H100, 1) * 1e6 == pytest.approx(172.2, abs=0.1)
    # 8192 rows: 2·8192·487,587,840 operations: bf16 8,074 µs / 0.776 = 10,405, fp8 4,037 µs / 0.638 = 6,327; int8
    # multiplies in bf16, and an A100 does so with fp8 as well: 25,605 µs / 0.918 = 27,892.
    assert gemm_s(BF16, H100, 8192) * 1e6 == pytest.approx(10405, abs=2)
    assert gemm_s(FP8, H100, 8192) * 1e6 == pytest.approx(6327, abs=2)
    assert gemm_s(INT8, H100, 8192) == gemm_s(BF16, H100, 8192)
    assert gemm_s(FP8, A100, 8192) == gemm_s(BF16, A100, 8192) == pytest.approx(27892e-6, rel=1e-4)


def test_experts_saturate_later_than_one_feed_forward():
    assert latency.saturation_tokens(QWEN_MOE, H100) > latency.saturation_tokens(LLAMA8, H100)


@pytest.mark.parametrize(("model", "bound_ms"), [(QWEN_MOE, 1.81), (MIXTRAL, 7.61), (FP8, 9.78)])
def test_what_physics_allows_one_decode_by_hand(model, bound_ms):
    # Weights of one token: 48·(18,874,368 + 8·4,718,592)·2 + 151,936·2,048·2 = 6.058 GB; Mixtral
    # 32·(41,943,040 + 2·176,160,768)·2 + 32,000·4,096·2 = 25.495 GB; 64·487,587,840 + 151,936·5,120·2 = 32.761 GB;
    # at 3.35 TB/s, and one token of KV.
    assert physics.decode_bound_s(model, H100, 1, 1, 1, 1) * 1e3 == pytest.approx(bound_ms, abs=0.005)


@pytest.mark.parametrize("model", [QWEN_MOE, MIXTRAL, FP8])
def test_a_profile_of_experts_or_fp8_faster_than_physics_is_refused(model, tmp_path):
    bound = physics.decode_bound_s(model, H100, 2, 1, 1, 0) * 1e3
    prefill = [20.0, 1e3 * physics.prefill_bound_s(model, H100, 2, 1, 8192, 0) / 8192 * 1.2, 1e-4]
    entry = {"prefill": prefill, "decoding_largebs": [40.0, 0.01, 1.0]}
    for factor in (1.1, 0.9):
        path = tmp_path / f"{factor}.json"
        decode = {"decoding_smallbs": [bound * factor, 0.01, 0.001]}
        path.write_text(json.dumps({model.id: {"2": entry | decode}}))
        profile = Profile.load(path, product="H100")
        if factor > 1:
            assert step_times(model, H100, 2, 1, profile).provenance.measured
        else:
            with pytest.raises(FasterThanPhysics, match="a decode step of 1 requests, 1 tokens"):
                step_times(model, H100, 2, 1, profile)


def by_roofline(model, gpu, tp):
    return latency.StepTimes(*roofline.tables(model, gpu, tp, 1), 1, latency.Provenance("roofline", ""))


def test_the_roofline_is_near_what_was_measured_on_one_gpu():
    # Held out: the curves know nothing of these fits. tp 1 has no engine overhead between GPUs to miss.
    fit, roof = step_times(OPT13, A100, 1, 1), by_roofline(OPT13, A100, 1)
    for n in (512, 1024, 2000):
        assert 0.7 < roof.prefill_stage_s([n]) / fit.prefill_stage_s([n]) < 1.0
    for batch in (1, 16, 40, 94):
        assert 0.85 < roof.decode_stage_s(batch, batch * 850) / fit.decode_stage_s(batch, batch * 850) < 1.1


def test_the_roofline_s_own_attention_is_kept_by_the_line_and_the_square():
    curves = roofline._curves(H100)
    alpha, beta = roofline._attention_line(LLAMA8, H100, 1, 1)
    for i, n in enumerate(2.0**curves.attention_len):
        if n <= LLAMA8.max_positions:
            seconds = 2 * n * n * 4096 * 32 / (H100.bf16_flops * curves.attention_mfu[i])
            assert alpha * n + beta * n * n == pytest.approx(seconds, rel=0.35)


def test_more_gpus_are_faster_and_gqa_reads_less():
    for model, gpu in ((OPT66, A100), (LLAMA70, H100)):
        times = [step_times(model, gpu, tp, 1) for tp in (2, 4, 8)]
        prefill = [t.prefill_stage_s([1024]) for t in times]
        decode = [t.decode_stage_s(32, 32_000) for t in times]
        assert prefill == sorted(prefill, reverse=True)
        assert decode == sorted(decode, reverse=True)
    assert (
        step_times(LLAMA8, A100, 1, 1).decode_ctx_ns[1]
        < 0.25 * step_times(OPT13, A100, 1, 1).decode_ctx_ns[1]
    )


def test_a_shape_the_profile_lacks_is_continuous_with_its_neighbour():
    # Scaled by the ratio at tp 4, so at tp 4 the scaled roofline is the fit on average.
    scaled = sources.scaled(OPT13, A100, 4, 1, latency.shipped_profile(), 4)
    fit = step_times(OPT13, A100, 4, 1)
    ratios = [scaled.prefill_stage_s([n]) / fit.prefill_stage_s([n]) for n in (128, 256, 512, 1024, 2048)]
    assert np.exp(np.mean(np.log(ratios))) == pytest.approx(1.0)


def test_a_shape_that_does_not_divide_the_model_is_refused():
    with pytest.raises(BadShape, match="tp 3 does not divide the 40 heads"):
        step_times(OPT13, A100, 3, 1)


@pytest.mark.parametrize(
    "name",
    ["profiler-a100-80g.distserve", "profiler-a100-80g.vllm", "raw_unfudged.profiler-a100-80g.distserve",
     "raw_unfudged.profiler-a100-80g.vllm"],
)  # fmt: skip
def test_every_shipped_profile_keeps_to_physics(name):
    profile = Profile.load(PROFILES / f"{name}.json")
    for model_id, tp in profile.fits:
        for pp in (1, 2, 4):
            step_times(catalogue.model(model_id), A100, tp, pp, profile)


@pytest.mark.parametrize("model_id", ["meta-llama/Meta-Llama-3-8B", "facebook/opt-13b"])
def test_what_was_measured_of_our_engine_is_what_ships(model_id: str) -> None:
    model, name = catalogue.model(model_id), f"h100.torch.{model_id.split('/')[1].lower()}"
    shipped = Profile.load(PROFILES / f"{name}.json")
    content = (ROOT / "benchmarks/measurements" / f"{name}.csv").read_text()
    rows = measurements.read(content, name, model, H100)  # none of them beats the hardware
    again = fitting.fit(rows, "", model, H100, "torch").model_dump(mode="json", exclude_none=True)
    said = json.loads(shipped.text)
    assert hashlib.sha256(content.encode()).hexdigest()[:12] in said["provenance"]
    assert again | {"provenance": ""} == said | {"provenance": ""}
    times = step_times(model, H100, 1, 1)
    assert times.provenance.describe() == "torch fit, H100, tp 1"
    for row in rows:
        off = (
            times.prefill_stage_s([row.tokens // row.batch] * row.batch)
            if row.phase == "prefill"
            else times.decode_stage_s(row.batch, row.context_tokens + row.batch)
        ) / row.seconds - 1
        assert abs(off) < (0.13 if row.phase == "prefill" else 0.04), row


def test_a_shipped_profile_is_of_every_model_of_that_shape() -> None:
    llama = step_times(catalogue.model("meta-llama/Meta-Llama-3-8B"), H100, 1, 1)
    for alike in ("meta-llama/Llama-3.1-8B", "meta-llama/Llama-3.1-8B-Instruct"):
        found = step_times(catalogue.model(alike), H100, 1, 1)
        assert (found.decode_base_ns == llama.decode_base_ns).all()
    assert (
        step_times(LLAMA8, H100, 2, 1).provenance.describe() == "roofline × torch fit's ratio at tp 1, H100"
    )
    assert step_times(catalogue.model("Qwen/Qwen3-8B"), H100, 1, 1).provenance.source == "roofline"


@pytest.mark.parametrize(
    ("field", "values", "words"),
    [
        ("prefill", [1.0, 0.05, 0.0], "a prefill of"),
        ("prefill", [30.0, 0.11, -3e-5], "a prefill of 2048 tokens"),
        ("decoding_smallbs", [5.0, 0.0006, 0.04], "a decode step of 1 requests"),
        ("decoding_smallbs", [20.0, 0.0001, 0.04], "a decode step of 32 requests, 65536 tokens"),
        ("decoding_largebs", [7.0, 0.00001, 0.15], "a decode step of 95 requests"),
    ],
)
def test_a_profile_faster_than_physics_is_refused(tmp_path, field, values, words):
    entry = COEFFICIENTS["facebook/opt-13b"]["1"] | {field: values}
    path = tmp_path / "fast.json"
    path.write_text(json.dumps({"facebook/opt-13b": {"1": entry}}))
    with pytest.raises(FasterThanPhysics, match=words):
        step_times(OPT13, A100, 1, 1, Profile.load(path))


def test_a_profile_counts_only_on_its_own_gpu(tmp_path):
    path = tmp_path / "p.json"
    path.write_text(json.dumps({"facebook/opt-13b": COEFFICIENTS["facebook/opt-13b"]}))
    on_h100 = Profile.load(path, product="NVIDIA-H100-80GB-HBM3")
    assert not on_h100.covers(OPT13, A100)
    # The shipped fits still answer on the A100, and nothing does on an L40S.
    assert latency.profile_for(OPT13, A100, on_h100) is latency.shipped_profile()
    assert step_times(OPT13, A100, 1, 1, on_h100) is step_times(OPT13, A100, 1, 1)
    assert latency.profile_for(OPT13, L40S, on_h100) is None
    assert step_times(OPT13, L40S, 1, 1, on_h100).provenance.source == "roofline"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "is not JSON"),
        ("[]", "holds no model"),
        ('{"m": []}', "holds no tp"),
        ('{"m": {"x": {}}}', "tp is 'x'"),
        ('{"m": {"1": {"prefill": [1, 2]}}}', "prefill is .* not three finite numbers"),
        ('{"m": {"1": {"prefill": [1, 2, NaN]}}}', "not three finite numbers"),
    ],
)
def test_a_bad_profile_says_what_is_wrong(tmp_path, text, words):
    path = tmp_path / "bad.json"
    path.write_text(text)
    with pytest.raises(BadProfile, match=words):
        Profile.load(path)


def test_a_missing_profile_says_so(tmp_path):
    with pytest.raises(BadProfile, match="cannot be read"):
        Profile.load(tmp_path / "none.json")


def test_saturation():
    assert latency.saturation_tokens(OPT13, A100) == 512  # the paper's
    assert [latency.saturation_tokens(LLAMA8, g) for g in (H100, catalogue.gpu("H200"), L40S)] == [
        512,
        256,
        512,
    ]


def test_transfers_take_what_the_reference_says():
    kv = 2048 * LLAMA70.kv_bytes_per_token()
    took = [
        latency.transfer_s(kv, link) * 1e3
        for link in (catalogue.NVLINK_H100, catalogue.RDMA_400G, catalogue.RDMA_100G)
    ]
    assert took == pytest.approx([1.5, 13.4, 54], rel=0.03)
