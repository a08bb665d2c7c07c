"""Step times: the published form to the digit, the roofline's sanity, and physics."""

import json

import numpy as np
import pytest

from disaggserve import catalogue, latency
from disaggserve.catalogue import BadShape
from disaggserve.latency import BadProfile, FasterThanPhysics, Profile, step_times

A100 = catalogue.gpu("NVIDIA-A100-SXM4-80GB")
H100 = catalogue.gpu("NVIDIA-H100-80GB-HBM3")
L40S = catalogue.gpu("NVIDIA-L40S")
OPT13, OPT66 = catalogue.model("facebook/opt-13b"), catalogue.model("facebook/opt-66b")
LLAMA8, LLAMA70 = (
    catalogue.model("meta-llama/Meta-Llama-3-8B"),
    catalogue.model("meta-llama/Meta-Llama-3-70B"),
)
SHIPPED = latency._PROFILES / "profiler-a100-80g.distserve.json"
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
    assert step_times(OPT13, H100, 1, 1).provenance.describe() == "roofline with H100 efficiency curves"


def all_step_times():
    for model in (
        OPT13,
        catalogue.model("facebook/opt-175b"),
        LLAMA8,
        LLAMA70,
        catalogue.model("Qwen/Qwen3-32B"),
    ):
        for gpu in catalogue.GPUS.values():
            for tp, pp in ((1, 1), (2, 1), (4, 2), (8, 1)):
                yield model, gpu, tp, pp


@pytest.mark.parametrize(("model", "gpu", "tp", "pp"), list(all_step_times()))
def test_roofline_tables_rise_and_keep_to_physics(model, gpu, tp, pp):
    t = step_times(model, gpu, tp, pp)
    latency._check_physics(model, gpu, tp, pp, t)
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


def roofline(model, gpu, tp):
    return latency.StepTimes(*latency._roofline(model, gpu, tp, 1), 1, latency.Provenance("roofline", ""))


def test_the_roofline_is_near_what_was_measured_on_one_gpu():
    # Held out: the curves know nothing of these fits. tp 1 has no engine overhead between GPUs to miss.
    fit, roof = step_times(OPT13, A100, 1, 1), roofline(OPT13, A100, 1)
    for n in (512, 1024, 2000):
        assert 0.7 < roof.prefill_stage_s([n]) / fit.prefill_stage_s([n]) < 1.0
    for batch in (1, 16, 40, 94):
        assert 0.85 < roof.decode_stage_s(batch, batch * 850) / fit.decode_stage_s(batch, batch * 850) < 1.1


def test_the_roofline_s_own_attention_is_kept_by_the_line_and_the_square():
    curves = latency._curves(H100)
    alpha, beta = latency._attention_line(LLAMA8, H100, 1, 1)
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
    scaled = latency._scaled(OPT13, A100, 4, 1, latency.shipped_profile(), 4)
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
    profile = Profile.load(latency._PROFILES / f"{name}.json")
    for model_id, tp in profile.fits:
        for pp in (1, 2, 4):
            step_times(catalogue.model(model_id), A100, tp, pp, profile)


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
    assert step_times(OPT13, A100, 1, 1, on_h100).provenance.source == "roofline"


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
