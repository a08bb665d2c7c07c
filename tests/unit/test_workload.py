"""Lengths, arrivals, traces and what is learned from counters."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from disaggserve import workload
from disaggserve.workload import BadLengths, BadTrace, Lengths, Workload, WorkloadError


def lengths(*rows):
    table = np.array(rows, dtype=np.int32)
    return Lengths("test", table[:, 0], table[:, 1])


@pytest.mark.parametrize(
    ("name", "n", "means"),
    [("sharegpt", 1600, (758.7, 186.3)), ("humaneval", 164, None), ("longbench", 1600, (1718, 83))],
)
def test_presets_are_the_shipped_tables(name, n, means):
    p = workload.preset(name)
    assert (p.name, len(p)) == (name, n)
    assert p.input.dtype == p.output.dtype == np.int32
    assert min(p.input.min(), p.output.min()) >= 1
    if means:
        assert (p.input.mean(), p.output.mean()) == pytest.approx(means, rel=0.01)


def test_an_unknown_preset_names_the_known():
    with pytest.raises(BadLengths, match="sharegpt, humaneval, longbench"):
        workload.preset("chat")


def test_scaling_rounds_and_cuts_to_the_context():
    scaled = lengths((1, 5), (10, 5), (100, 5), (300, 90), (900, 7)).scaled(1 / 3, 120)
    assert scaled.input.tolist() == [1, 3, 33, 100, 119]
    assert scaled.output.tolist() == [5, 5, 5, 20, 1]
    assert workload.preset("sharegpt").scaled(1, 2048).name == "sharegpt"
    assert "0.333" in workload.preset("sharegpt").scaled(1 / 3, 2048).name


@given(
    st.lists(st.tuples(st.integers(1, 5000), st.integers(1, 5000)), min_size=1, max_size=20),
    st.floats(0.01, 10),
    st.integers(2, 4096),
)
def test_scaled_lengths_always_fit_the_context(rows, scale, context):
    s = lengths(*rows).scaled(scale, context)
    assert s.input.min() >= 1
    assert s.output.min() >= 1
    assert np.all(s.input + s.output <= context)
    assert np.all(s.output <= [r[1] for r in rows])


@pytest.mark.parametrize(("scale", "context"), [(0, 100), (math.nan, 100), (1, 1)])
def test_a_senseless_scale_is_refused(scale, context):
    with pytest.raises(BadLengths):
        lengths((1, 1)).scaled(scale, context)


@pytest.mark.parametrize(("rate", "cv"), [(0, 1), (math.nan, 1), (-1, 1), (1, -1), (1, math.inf)])
def test_a_senseless_rate_is_refused(rate, cv):
    with pytest.raises(WorkloadError):
        Workload(rate, cv, lengths((1, 1)))


def drawn(rate=10.0, cv=1.0, duration_s=600.0, seed=0):
    return Workload(rate, cv, workload.preset("sharegpt")).requests(duration_s, seed)


def test_one_seed_one_draw():
    a, b, other = drawn(), drawn(), drawn(seed=1)
    assert np.array_equal(a.arrival_ns, b.arrival_ns)
    assert np.array_equal(a.input, b.input)
    assert not np.array_equal(a.arrival_ns[:50], other.arrival_ns[:50])


def test_the_first_draws_stay_what_they_are():
    # A change here changes every simulation's digest: it is a change of version.
    r = drawn(rate=1.0, duration_s=10.0)
    assert (r.arrival_ns // 1000).tolist()[:4] == [679932, 1699529, 1719336, 1721605]
    assert r.input.tolist()[:4] == [351, 1561, 1452, 1259]


def test_rates_and_durations_share_their_draws():
    slow, fast, long = drawn(rate=5.0), drawn(rate=10.0), drawn(duration_s=1200.0)
    n = len(slow)
    assert np.abs(slow.arrival_ns - 2 * fast.arrival_ns[:n]).max() <= 2000
    assert np.array_equal(slow.input, fast.input[:n])
    assert np.array_equal(fast.arrival_ns, long.arrival_ns[: len(fast)])


@pytest.mark.parametrize("cv", [0.0, 0.5, 1.0, 3.0])
def test_gaps_have_the_rate_and_variation_asked_for(cv):
    r = drawn(rate=20.0, cv=cv, duration_s=5000.0)
    gaps = np.diff(r.arrival_ns) / 1e9
    assert 1 / gaps.mean() == pytest.approx(20, rel=0.05)
    assert gaps.std() / gaps.mean() == pytest.approx(cv, rel=0.05, abs=1e-4)
    assert np.all(r.arrival_ns % 1000 == 0)
    assert np.all(np.diff(r.arrival_ns) >= 0)
    assert r.arrival_ns[-1] < 5000e9
    assert len(r) == len(r.input) == len(r.output)
    assert r.arrival_ns.dtype == np.int64


def test_lengths_are_drawn_as_pairs_from_the_table():
    r = Workload(50, 1, lengths((10, 1), (20, 2), (30, 3))).requests(200, 7)
    assert np.array_equal(r.input, r.output * 10)
    assert np.bincount(r.output)[1:].min() > 0.3 * len(r)


# ---------------------------------------------------------------------------------------------------------- files

HEADER = "arrival_s,input_tokens,output_tokens\n"


def trace(tmp_path, text):
    path = tmp_path / "t.csv"
    path.write_text(text)
    return path


def test_a_trace_is_read_in_its_own_order(tmp_path):
    r = workload.read_trace(trace(tmp_path, HEADER + "0,55,4\n0.4127264,829,170\n0.4127264,1,1\n"))
    assert r.arrival_ns.tolist() == [0, 412_726_000, 412_726_000]
    assert (r.input.tolist(), r.output.tolist()) == ([55, 829, 1], [4, 170, 1])


def test_columns_go_by_name_and_more_are_ignored(tmp_path):
    text = "\ufeffid, output_tokens,arrival_s,input_tokens\r\nx,4,1.5,55\r\n"
    r = workload.read_trace(trace(tmp_path, text))
    assert (r.arrival_ns.tolist(), r.input.tolist(), r.output.tolist()) == ([1_500_000_000], [55], [4])


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ("-1,5,5", "arrival_s is '-1'"),
        ("nan,5,5", "arrival_s is 'nan'"),
        ("inf,5,5", "arrival_s is 'inf'"),
        (",5,5", "arrival_s is ''"),
        ("1,-5,5", "input_tokens is '-5'"),
        ("1,0,5", "input_tokens is '0'"),
        ("1,nan,5", "input_tokens is 'nan'"),
        ("1,5,", "output_tokens is ''"),
        ("1,5,5.5", "output_tokens is '5.5'"),
        ("1,5,1000000", "output_tokens is '1000000'"),
        ("1,99999999999999999999,5", "input_tokens is '9999"),
        ("0.5,5,5", "before the line above"),
        ("1,5", "has 2 columns"),
        ("", "has 0 columns"),
        ('1,5,"5', "is not CSV"),
    ],
)
def test_a_bad_row_is_named_by_its_line(tmp_path, row, words):
    with pytest.raises(BadTrace, match=words) as e:
        workload.read_trace(trace(tmp_path, HEADER + f"0.9,5,5\n{row}\n2,5,5\n"))
    assert "t.csv, line " in str(e.value)
    if '"' not in row:
        assert "line 3:" in str(e.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "columns are none; expected arrival_s,input_tokens,output_tokens"),
        ("a,b\n1,2\n", "columns are a,b"),
        (HEADER, "no rows"),
    ],
)
def test_a_file_without_requests_says_so(tmp_path, text, words):
    with pytest.raises(BadTrace, match=words):
        workload.read_trace(trace(tmp_path, text))


def test_a_missing_file_says_so(tmp_path):
    with pytest.raises(BadTrace, match="cannot be read"):
        workload.read_trace(tmp_path / "none.csv")


def test_lengths_files_take_both_headers(tmp_path):
    for header in ("input_tokens,output_tokens", "input_len,output_len"):
        table = workload.read_lengths(trace(tmp_path, f"{header}\n5,6\n7,8\n"))
        assert (table.input.tolist(), table.output.tolist(), table.name) == ([5, 7], [6, 8], "t")
    with pytest.raises(BadLengths, match="line 2: the input is '0'"):
        workload.read_lengths(trace(tmp_path, "input_tokens,output_tokens\n0,6\n"))


# ------------------------------------------------------------------------------------------------------- counters

EDGES = [0, 16, 64, 256, 1024, 4096]


def cells(counts, means=None, rows=4000):
    middles = [(lo + hi) / 2 for lo, hi in itertools.pairwise(EDGES)]
    means = means or middles
    return workload.from_cells(counts, EDGES, EDGES, means, means, rows=rows)


def test_counters_keep_means_and_correlation():
    share = workload.preset("sharegpt")
    i = np.searchsorted(EDGES, share.input) - 1
    j = np.searchsorted(EDGES, share.output) - 1
    counts = np.zeros((5, 5))
    np.add.at(counts, (i, j), 1)

    def means(x, bucket):
        return [float(x[bucket == b].mean()) if (bucket == b).any() else math.nan for b in range(5)]

    learned = workload.from_cells(
        counts.tolist(), EDGES, EDGES, means(share.input, i), means(share.output, j)
    )
    assert len(learned) == 4000
    assert learned.input.mean() == pytest.approx(share.input.mean(), rel=0.01)
    assert learned.output.mean() == pytest.approx(share.output.mean(), rel=0.01)
    correlation = np.corrcoef(share.input, share.output)[0, 1]
    assert np.corrcoef(learned.input, learned.output)[0, 1] == pytest.approx(correlation, abs=0.1)


def test_correlation_that_flips_while_marginals_stay_is_seen():
    together, apart = np.zeros((5, 5)), np.zeros((5, 5))
    together[1, 1] = together[3, 3] = apart[1, 3] = apart[3, 1] = 10
    a, b = cells(together.tolist()), cells(apart.tolist())
    assert sorted(a.input.tolist()) == sorted(b.input.tolist())
    assert np.corrcoef(a.input, a.output)[0, 1] > 0.7
    assert np.corrcoef(b.input, b.output)[0, 1] < -0.7


@given(st.floats(257, 1023), st.integers(1, 500))
def test_a_bucket_keeps_its_mean_and_its_edges(mean, rows):
    counts = [[0.0] * 5 for _ in range(5)]
    counts[3][3] = 3.7
    learned = cells(counts, [8.0, 40.0, 160.0, mean, 2000.0], rows)
    for x in (learned.input, learned.output):
        assert len(x) == rows
        assert x.mean() == pytest.approx(mean, abs=1.0)
        assert x.min() >= 255
        assert x.max() <= 1025


def test_inside_a_cell_input_and_output_are_independent():
    counts = [[0.0] * 5 for _ in range(5)]
    counts[3][4] = 1
    learned = cells(counts)
    assert abs(np.corrcoef(learned.input, learned.output)[0, 1]) < 0.05


def test_an_open_bucket_and_an_unknown_mean():
    learned = workload.from_cells([[1], [1]], [0, 100, math.inf], [0, 10], [math.nan, 300], [5])
    assert learned.input.mean() == pytest.approx((50 + 300) / 2, rel=0.01)
    assert learned.input.max() <= 501


@pytest.mark.parametrize(
    ("counts", "words"),
    [
        ([[0.0]], "no request was counted"),
        ([[-1.0]], "not negative"),
        ([[math.nan]], "finite"),
        ([[1.0, 1.0]], "edges make"),
    ],
)
def test_bad_counters(counts, words):
    with pytest.raises(BadLengths, match=words):
        workload.from_cells(counts, [0, 10], [0, 10], [5], [5])
