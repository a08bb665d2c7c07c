"""From measured steps to a profile: what is recovered, what is chosen, what is refused."""

import itertools
import json

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from disaggserve import catalogue, latency
from disaggserve.cli.app import app
from disaggserve.latency import BadMeasurements, BadProfile, FasterThanPhysics, Profile, fitting, measurements

A100 = catalogue.gpu("NVIDIA-A100-SXM4-80GB")
H100, L40S = catalogue.gpu("NVIDIA-H100-80GB-HBM3"), catalogue.gpu("NVIDIA-L40S")
OPT13 = catalogue.model("facebook/opt-13b")
LLAMA8 = catalogue.model("meta-llama/Llama-3.1-8B")
HEADER = "phase,batch,tokens,context_tokens,tp,pp,seconds"
# OPT-13B on A100, tp 1, as DistServe measured it: seconds of a pass.
PREFILL = (16.4569e-3, 92.6475e-6, 6.47479e-9)
SMALL = (19.9347e-3, 0.626936e-6, 38.507e-6)
LARGE = (7.16619e-3, 0.5798e-6, 158.311e-6)


def prefill(tokens, batch=1, done=0, tp=1, pp=1, form=PREFILL, hop=0.0, off=1.0):
    a, b, c = form
    squares = (tokens**2 + 2 * tokens * done) / batch
    seconds = (a + (b * tokens + c * squares) / tp + hop * (pp - 1)) * off
    return f"prefill,{batch},{tokens},{done},{tp},{pp},{seconds!r}"


def decode(batch, context, tp=1, pp=1, form=SMALL, hop=0.0, off=1.0):
    a, b, c = form
    seconds = (a / tp + b / tp * (context + batch) + c * batch + hop * (pp - 1)) * off
    return f"decode,{batch},{batch},{context},{tp},{pp},{seconds!r}"


LENGTHS, BATCHES = (64, 128, 512, 1024, 2048), (1, 4, 16, 64, 90)


def table(tps=(1,), pps=(1,), form=SMALL, hop=0.0, off=None):
    """Rows over lengths, batches and contexts; `off` is an iterator of factors of their seconds."""
    off = off or itertools.repeat(1.0)
    rows = [HEADER]
    for tp, pp in itertools.product(tps, pps):
        rows += [prefill(n, tp=tp, pp=pp, hop=hop, off=next(off)) for n in LENGTHS]
        rows += [decode(b, b * c, tp, pp, form, hop, next(off)) for b in BATCHES for c in (200, 900, 1500)]
    return "\n".join(rows) + "\n"


def fitted(text, model=OPT13, gpu=A100, engine="distserve"):
    rows = measurements.read(text, "m.csv", model, gpu)
    document = fitting.fit(rows, "fitted to m.csv", model, gpu, engine)
    return document, Profile.of(document.model_dump(mode="json", exclude_none=True), "p.json")


FORMS = st.tuples(st.floats(0.7, 3), st.floats(0.8, 3), st.floats(1.0, 4))


@settings(max_examples=15, deadline=None)
@given(FORMS)
def test_known_coefficients_come_back(factors):
    a, b, c = form = tuple(x * y for x, y in zip(SMALL, factors, strict=True))
    document, profile = fitted(table(form=form), gpu=None)
    times = latency.step_times(OPT13, A100, 1, 1, profile)
    for tokens in LENGTHS:
        whole, each, square = PREFILL
        assert times.prefill_stage_s([tokens]) == pytest.approx(
            whole + each * tokens + square * tokens**2, rel=1e-5
        )
    for batch, context in itertools.product((1, 10, 90), (200, 800, 1500)):
        seconds = a + b * batch * (context + 1) + c * batch
        assert times.decode_stage_s(batch, batch * (context + 1)) == pytest.approx(seconds, rel=1e-5)
    assert document.fits[0].decode.evidence.residuals.max <= 1e-4


@settings(max_examples=15, deadline=None)
@given(FORMS, st.floats(0.001, 0.05), st.integers(0, 2**32 - 1))
def test_no_coefficients_lie_nearer_to_noisy_measurements_than_those_fitted(factors, noise, seed):
    rng = np.random.default_rng(seed)
    form = tuple(x * y for x, y in zip(SMALL, factors, strict=True))
    off = 1 + noise * rng.uniform(-1, 1, len(LENGTHS) + 3 * len(BATCHES))
    document, profile = fitted(table(form=form, off=iter(off.tolist())), gpu=None)
    # The paper's form has a coefficient less, and is chosen where it tells unseen rows better.
    assume(document.fits[0].decode.evidence.form == "perTp")
    stage_s = latency.step_times(OPT13, A100, 1, 1, profile).decode_stage_s
    base, slope, each = form
    points = [(b, b * (c + 1)) for b in BATCHES for c in (200, 900, 1500)]
    true = np.array([base + slope * context + each * batch for batch, context in points])
    measured = true * off[len(LENGTHS) :]
    found = np.array([stage_s(batch, context) for batch, context in points])

    def miss(seconds):
        return np.sqrt(np.mean((seconds / measured - 1) ** 2))

    assert miss(found) <= miss(true) + 1e-5  # six digits are kept


def test_order_of_rows_does_not_matter_and_six_digits_are_kept():
    header, *rows = table(tps=(1, 2)).splitlines()
    document, profile = fitted("\n".join([header, *rows]))
    assert fitted("\n".join([header, *rows[::-1]]))[1].digest == profile.digest
    small = document.fits[0].decode.small
    assert small.base_seconds == 0.0199347
    assert (small.seconds_per_context_token, small.seconds_per_request) == (6.26936e-7, 3.8507e-5)


def test_provenance_residuals_and_range_are_in_the_profile():
    document, profile = fitted(table(tps=(1, 2)))
    assert (document.model, document.gpu, document.engine) == (OPT13.id, A100.product, "distserve")
    assert document.rows == 2 * (5 + 15)
    evidence = document.fits[0].decode.evidence
    assert (evidence.form, evidence.rows) == ("perTp", 15)
    assert (evidence.batch.least, evidence.batch.most) == (1, 90)
    assert (evidence.context_tokens.least, evidence.context_tokens.most) == (200, 135_000)
    said = latency.step_times(OPT13, A100, 2, 1, profile).provenance
    assert (said.source, said.measured) == ("fitted", True)
    assert said.describe() == "p fit (distserve), A100-80G, tp 1,2"
    lacking = latency.step_times(OPT13, A100, 4, 1, profile).provenance
    assert (lacking.source, lacking.describe()) == (
        "roofline",
        "roofline × p fit (distserve)'s ratio at tp 2, A100-80G",
    )
    assert latency.step_times(OPT13, L40S, 1, 1, profile).provenance.source == "roofline"


def test_batched_prefills_are_taken_as_equally_long_and_say_so():
    rows = [prefill(n, batch) for n in LENGTHS for batch in (1, 2, 4)]
    text = "\n".join([HEADER, *rows, *table().splitlines()[6:]])
    document, _ = fitted(text)
    assert document.fits[0].prefill.seconds_per_squared_token == pytest.approx(PREFILL[2], rel=1e-4)
    assert "equally long (Σlen² = tokens²/batch)" in document.provenance
    assert "equally long" not in fitted(table())[0].provenance


def test_tokens_done_before_count_in_attention():
    rows = [prefill(n, done=done) for n in (128, 512, 1024) for done in (0, 512, 1024)]
    text = "\n".join([HEADER, *rows, *table().splitlines()[6:]])
    assert fitted(text)[0].fits[0].prefill.seconds_per_squared_token == pytest.approx(PREFILL[2], rel=1e-4)


def test_the_paper_s_form_is_taken_where_it_explains_all_tp():
    # Exactly the paper's: per tp everything but the prefill's constant is divided by tp, no term for the batch.
    form = (SMALL[0], SMALL[1], 0.0)
    rng = np.random.default_rng(1)
    off = (1 + 0.02 * x for x in iter(lambda: rng.uniform(-1, 1), None))
    document, _ = fitted(table(tps=(1, 2, 4), form=form, off=off))
    assert {f.prefill.evidence.form for f in document.fits} == {"paper"}
    assert {f.decode.evidence.form for f in document.fits} == {"paper"}
    paper = document.paper
    matrices = 4 * 5120**2 + 2 * 5120 * 20480
    assert paper.c1_seconds == pytest.approx(PREFILL[1] / matrices, rel=0.02)
    assert paper.c3_seconds == pytest.approx(PREFILL[0], rel=0.05)
    assert paper.c4_seconds == pytest.approx(SMALL[0] / matrices, rel=0.02)
    assert paper.c5_seconds == pytest.approx(SMALL[1] / (3 * 5120), rel=0.05)
    # With a term for the batch it no longer does.
    assert {f.decode.evidence.form for f in fitted(table(tps=(1, 2, 4)))[0].fits} == {"perTp"}


def test_two_regimes_of_decode_are_found():
    rows = [
        decode(b, b * c, form=SMALL if b < 95 else LARGE)
        for b in (1, 8, 32, 64, 94, 95, 128, 160, 192)
        for c in (200, 900)
    ]
    document, profile = fitted("\n".join([*table().splitlines()[:6], *rows]))
    fit = document.fits[0].decode
    assert fit.large_from_batch == 95
    assert fit.large.seconds_per_request == pytest.approx(LARGE[2], rel=1e-4)
    times = latency.step_times(OPT13, A100, 1, 1, profile)
    for batch, form in ((94, SMALL), (95, LARGE)):
        seconds = form[0] + form[1] * batch * 501 + form[2] * batch
        assert times.decode_stage_s(batch, batch * 501) == pytest.approx(seconds, rel=1e-4)


def test_a_prefill_flat_while_weights_are_read_is_found():
    lengths = (16, 32, 64, 128, 256, 512, 1024, 2048)
    rows = [prefill(n, form=(14e-3, 0.0, 6.5e-9), off=1) for n in lengths if n <= 128]
    rows += [prefill(n, form=(14e-3 - 128 * 100e-6, 100e-6, 6.5e-9)) for n in lengths if n > 128]
    document, profile = fitted("\n".join([HEADER, *rows, *table().splitlines()[6:]]))
    fit = document.fits[0].prefill
    assert (fit.flat_to_tokens, fit.evidence.residuals.max) == (128, 0)
    times = latency.step_times(OPT13, A100, 1, 1, profile)
    assert times.prefill_stage_s([60]) == pytest.approx(14e-3 + 6.5e-9 * 60**2, rel=1e-4)
    assert times.prefill_stage_s([700]) == pytest.approx(14e-3 + 100e-6 * 572 + 6.5e-9 * 700**2, rel=1e-4)
    # Rows on one line stay on it.
    assert fitted(table())[0].fits[0].prefill.flat_to_tokens is None


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize(
    ("model", "gpu"),
    [
        (LLAMA8, H100),
        (catalogue.model("Qwen/Qwen3-30B-A3B"), H100),
        (catalogue.model("Qwen/Qwen3-8B-FP8"), H100),
    ],
    ids=lambda v: getattr(v, "id", ""),
)
def test_what_the_roofline_s_own_steps_are_fitted_with(model, gpu, tp):
    """Steps that no line holds exactly: weights read or multiplied, experts touched. The fit stays near, and stands."""
    roof = latency.step_times(model, gpu, tp, 1)
    rows = [
        f"prefill,1,{n},0,{tp},1,{roof.prefill_stage_s([n])!r}"
        for n in (16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
    ]
    rows += [
        f"decode,{b},{b},{b * c},{tp},1,{roof.decode_stage_s(b, b * (c + 1))!r}"
        for b in (1, 2, 4, 8, 16, 32, 64, 128, 256)
        for c in (128, 1024)
    ]
    document, profile = fitted("\n".join([HEADER, *rows]), model, gpu, "vllm")
    fit = document.fits[0]
    assert fit.prefill.evidence.residuals.median < 0.1
    assert fit.decode.evidence.residuals.median < 0.05
    for pp in (1, 2):
        latency.physics.check(model, gpu, tp, pp, latency.step_times(model, gpu, tp, pp, profile))


def test_a_hop_between_stages_is_fitted_where_several_pp_were_measured():
    document, profile = fitted(table(pps=(1, 2), hop=2e-3))
    assert document.fits[0].pp == (1, 2)
    assert document.fits[0].prefill.seconds_per_hop == pytest.approx(2e-3, rel=1e-4)
    assert profile.measured(OPT13) == ((1, 1), (1, 2))
    whole = PREFILL[0] + PREFILL[1] * 512 + PREFILL[2] * 512**2 + 2e-3
    assert latency.step_times(OPT13, A100, 1, 2, profile).prefill_stage_s([512]) == pytest.approx(
        whole / 2, rel=1e-4
    )
    # Without, a stage of two takes its half and the roofline's hop.
    alone = fitted(table())[1]
    one, two = (latency.step_times(OPT13, A100, 1, pp, alone).prefill_stage_s([512]) for pp in (1, 2))
    assert two == pytest.approx(one / 2 + 20e-6)


def test_beyond_what_was_measured_no_step_beats_the_hardware():
    # Prompts to 512 only and batches to 8: the rest is the fit, or the hardware's least where that is more.
    rows = [prefill(n, form=(16e-3, 110e-6, 0.0)) for n in (64, 128, 256, 512)]
    rows += [decode(b, b * c, form=(20e-3, 0.7e-6, 0.0)) for b in (2, 4, 8) for c in (200, 900)]
    _, profile = fitted("\n".join([HEADER, *rows]))
    times = latency.step_times(OPT13, A100, 1, 1, profile)
    latency.physics.check(OPT13, A100, 1, 1, times)
    assert times.decode_stage_s(1024, 1024) > 3 * times.decode_stage_s(8, 1024)
    # Fewer tokens or requests than were measured take as long as the fewest that were.
    assert times.prefill_stage_s([1]) == pytest.approx(times.prefill_stage_s([64]), rel=1e-3)
    assert times.decode_base_ns[1] == times.decode_base_ns[2]


def test_saturation_follows_the_measured_prefill():
    # n/(s + n) ≥ 0.9·2048/(s + 2048) with s = base / time of a token in tokens: from n = 759 with OPT-13B's s = 178,
    # so 1024, and from 233 with s = 30, so 256.
    for share, reached in ((16.4569e-3 / 92.6475e-6, 1024), (30.0, 256)):
        rows = [prefill(n, form=(share * 100e-6, 100e-6, 6.5e-9)) for n in (16, 128, 512, 2048)]
        _, profile = fitted("\n".join([HEADER, *rows, *table().splitlines()[6:]]), gpu=None, model=None)
        assert latency.saturation_tokens(OPT13, A100, 1, 1, profile) == reached
        assert latency.saturation_tokens(OPT13, A100, 2, 1, profile) == 512  # not measured: the curves
    assert latency.saturation_tokens(OPT13, A100, 1, 1, latency.shipped_profile()) == 512


def test_a_profile_without_model_and_gpu_is_taken_for_any():
    document, profile = fitted(table(), model=None, gpu=None, engine=None)
    assert (document.model, document.gpu, document.paper, profile.engine) == (None, None, None, None)
    assert profile.covers(OPT13, A100)
    assert profile.covers(catalogue.model("facebook/opt-30b"), A100)
    assert latency.step_times(OPT13, A100, 1, 1, profile).provenance.source == "fitted"
    with pytest.raises(FasterThanPhysics, match="opt-30b"):
        latency.step_times(catalogue.model("facebook/opt-30b"), A100, 1, 1, profile)


# ---- refusals


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ("prefill,1,64,0,1,1", "6 cells for 7 columns"),
        ("training,1,64,0,1,1,0.1", "phase is 'training', not prefill or decode"),
        ("prefill,0,64,0,1,1,0.1", "batch is '0', not a whole number from 1"),
        ("prefill,1,64.5,0,1,1,0.1", "tokens is '64.5'"),
        ("prefill,1,-64,0,1,1,0.1", "tokens is '-64'"),
        ("prefill,1,99999999999999999999999,0,1,1,0.1", "tokens is '9+'"),
        ("prefill,1,64,,1,1,0.1", "context_tokens is ''"),
        ("prefill,1,64,0,x,1,0.1", "tp is 'x'"),
        ("prefill,1,64,0,1,0,0.1", "pp is '0'"),
        ("prefill,1,64,0,1,1,", "seconds is '', not a number from 1e-06 to 3600"),
        ("prefill,1,64,0,1,1,nan", "seconds is 'nan'"),
        ("prefill,1,64,0,1,1,inf", "seconds is 'inf'"),
        ("prefill,1,64,0,1,1,-0.1", "seconds is '-0.1'"),
        ("prefill,1,64,0,1,1,1e-300", "seconds is '1e-300'"),
        ("prefill,1,64,0,1,1,1e9", "seconds is '1e9'"),
        ("prefill,8,4,0,1,1,0.1", "tokens is 4, fewer than the 8 prompts"),
        ("decode,8,64,800,1,1,0.1", "tokens is 64 and batch 8; a decode step makes one token a request"),
        ("prefill,1,64,0,3,1,0.1", "does not take this shape: tp 3"),
        ("prefill,1,64,0,1,1,0.001", "A100-80G cannot do this prefill of facebook/opt-13b below 0.0123"),
        ("decode,1,1,100,1,1,0.001", "cannot do this decode of facebook/opt-13b below 0.0126"),
    ],
)
def test_a_bad_row_is_refused_with_its_line(row, words):
    lines = table().splitlines()
    with pytest.raises(BadMeasurements, match=f"m.csv: line 4: .*{words}"):
        fitted("\n".join([*lines[:3], row, *lines[3:]]))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "column phase stands 0 times"),
        (HEADER, "holds no row"),
        (HEADER.replace(",pp", "") + "\n", "column pp stands 0 times"),
        (HEADER + ",seconds\n", "column seconds stands 2 times"),
        (HEADER + ",note\n", "column 'note' is not known"),
    ],
)
def test_a_bad_header_is_refused(text, words):
    with pytest.raises(BadMeasurements, match=words):
        fitted(text)


def edited(keep, extra=()):
    header, *rows = table().splitlines()
    return "\n".join([header, *(r for r in rows if keep(r.split(","))), *extra])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (edited(lambda r: r[0] == "prefill"), r"tp 1 has no decode row \(line 2 is of the other phase\)"),
        (edited(lambda r: r[0] == "decode"), "tp 1 has no prefill row"),
        (
            edited(lambda r: r[0] == "decode" or r[2] in ("64", "512")),
            r"prefill with tp 1 has 2 rows \(line 2, 3\); at least 4",
        ),
        (
            edited(lambda r: True, [prefill(512, tp=2), decode(8, 800, tp=2)]),
            r"prefill with tp 2 has 1 row \(line 22\); at least 4",
        ),
        (
            edited(lambda r: r[0] == "decode", [prefill(n) for n in (64, 512, 64, 512)]),
            r"prefill with tp 1: column tokens is 64 and 512 in every row \(line 17 is one\); at least 3",
        ),
        (
            edited(lambda r: r[0] == "prefill", [decode(8, c) for c in (800, 1600, 2400, 3200)]),
            "decode with tp 1: column batch is 8 in every row",
        ),
        (
            edited(lambda r: r[0] == "prefill", [decode(b, 900) for b in (1, 2, 4, 8)]),
            "decode with tp 1: column context_tokens is 900 in every row",
        ),
        (
            edited(lambda r: r[0] == "prefill", [decode(b, 900 * b) for b in (1, 2, 4, 8)]),
            r"do not vary apart; measure one batch at two contexts \(line 7 is the first\)",
        ),
        (
            edited(lambda r: True, [prefill(512, pp=2)]),
            r"column pp: tp 1 with pp 2 has one phase only \(line 22\)",
        ),
    ],
)
def test_what_cannot_be_told_apart_is_refused(text, words):
    with pytest.raises(BadMeasurements, match=words):
        fitted(text)


# ---- files


def run(*arguments):
    return CliRunner().invoke(app, ["fit", *map(str, arguments)])


def test_the_command_writes_a_profile_that_loads_and_dumps_to_the_same_bytes(tmp_path):
    source, first, second = (tmp_path / n for n in ("m.csv", "one.json", "two.json"))
    source.write_text(table(tps=(1, 2)))
    known = ("--model", OPT13.id, "--gpu", "A100-80G", "--engine", "torch", "--note", "one quiet machine")
    done = run(source, "-o", first, *known)
    assert done.exit_code == 0, done.output
    assert "median" in done.output
    assert json.loads(first.read_text())["provenance"].startswith("one quiet machine; fitted to m.csv")
    profile = Profile.load(first)
    assert (profile.engine, profile.source, profile.shapes(OPT13)) == ("torch", "fitted", (1, 2))
    profile.dump(second)
    assert second.read_bytes() == first.read_bytes()
    assert Profile.load(second).digest == profile.digest
    # Layout and order of the file do not reach the digest; a number does.
    raw = json.loads(first.read_text())
    second.write_text(json.dumps(dict(reversed(raw.items()))))
    assert Profile.load(second).digest == profile.digest
    raw["fits"][0]["prefill"]["baseSeconds"] *= 1.001
    second.write_text(json.dumps(raw))
    assert Profile.load(second).digest != profile.digest


def test_the_command_says_for_what_a_profile_will_be_taken(tmp_path):
    source, target = tmp_path / "m.csv", tmp_path / "p.json"
    source.write_text(table())
    done = run(source, "-o", target)
    assert "taken for any model" in done.output
    assert "taken for any GPU" in done.output
    for arguments, words in (
        (("--model", "no/such"), "not in the catalogue"),
        (("--gpu", "NVIDIA-B300"), "not in the catalogue"),
        (("--engine", "tgi"), "'tgi' is not known"),
    ):
        assert words in str(run(source, "-o", target, *arguments).exception)
    assert "cannot be written" in str(run(source, "-o", tmp_path / "no" / "p.json").exception)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"version": 2}, "version: input should be 1"),
        ({"kind": "other"}, "kind: input should be 'disaggserve-profile'"),
        ({"note": "x"}, "note: extra inputs are not permitted"),
        ({"rows": "40"}, "rows: input should be a valid integer"),
        ({"gpu": "NVIDIA-B300"}, "not in the catalogue"),
        ({"fits": []}, "fits: tuple should have at least 1 item"),
    ],
)
def test_a_bad_profile_of_ours_names_the_field(tmp_path, change, words):
    document = fitted(table())[0].model_dump(mode="json", exclude_none=True)
    path = tmp_path / "p.json"
    path.write_text(json.dumps(document | change))
    with pytest.raises(BadProfile, match=words):
        Profile.load(path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda d: d["fits"].append(d["fits"][0]), "the same tp stands twice"),
        (lambda d: d["fits"][0]["decode"].update(largeFromBatch=8), "large and largeFromBatch go together"),
        (
            lambda d: d["fits"][0]["prefill"]["evidence"]["tokens"].update(least=9999),
            "fits.0.prefill.evidence: least 9999 is more than most 2048",
        ),
        (
            lambda d: d["fits"][0]["prefill"].update(baseSeconds=-1.0),
            "fits.0.prefill.baseSeconds: input should be greater than or equal to 0",
        ),
    ],
)
def test_a_profile_of_ours_that_contradicts_itself_is_refused(change, words):
    document = fitted(table())[0].model_dump(mode="json", exclude_none=True)
    change(document)
    with pytest.raises(BadProfile, match=words):
        Profile.of(document, "p.json")


def test_a_profile_faster_than_the_hardware_is_refused_where_it_was_measured(tmp_path):
    document = fitted(table())[0].model_dump(mode="json", exclude_none=True)
    path = tmp_path / "fast.json"
    document["fits"][0]["decode"]["small"]["baseSeconds"] = 0.005
    path.write_text(json.dumps(document))
    with pytest.raises(FasterThanPhysics, match=r"fast fit \(distserve\), A100-80G.*a decode step of"):
        latency.step_times(OPT13, A100, 1, 1, Profile.load(path))


def test_the_digest_of_distserve_s_file_is_of_what_it_says(tmp_path):
    shipped = latency.shipped_profile()
    path = tmp_path / "copy.json"
    shipped.dump(path)
    again = Profile.load(path)
    assert again.digest == shipped.digest
    assert again.fits == shipped.fits
    assert (again.engine, again.source) == ("distserve", "profile")
