"""Lengths, arrivals, traces and what is learned from counters."""

import itertools
import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from disaggserve import workload
from disaggserve.workload import BadLengths, BadTrace, Lengths, Requests, Workload, WorkloadError
from tests.data import shared


def lengths(*rows):
    table = np.array(rows, dtype=np.int32)
    return Lengths("test", table[:, 0], table[:, 1])


@pytest.mark.parametrize(
    ("name", "n", "means"),
    [
        ("sharegpt", 1600, (758.7, 186.3)),
        ("humaneval", 164, None),
        ("longbench", 1600, (1718, 83)),
        ("azure-conv", 1000, (1155, 211)),
        ("azure-code", 1000, (2048, 28)),
    ],
)
def test_presets_are_the_shipped_tables(name, n, means):
    p = workload.preset(name)
    assert (p.name, len(p)) == (name, n)
    assert p.input.dtype == p.output.dtype == np.int32
    assert min(p.input.min(), p.output.min()) >= 1
    if means:
        assert (p.input.mean(), p.output.mean()) == pytest.approx(means, rel=0.01)


@pytest.mark.parametrize(("name", "medians"), [("azure-conv", (1020, 129)), ("azure-code", (1500, 13))])
def test_azure_presets_have_the_published_medians(name, medians):
    p = workload.preset(name)
    assert (np.median(p.input), np.median(p.output)) == pytest.approx(medians, rel=0.03)


def test_the_conversation_preset_is_the_trace_in_small():
    t, p = (
        workload.read_trace(shared("traces/AzureLLMInferenceTrace_conv.csv")),
        workload.preset("azure-conv"),
    )
    for small, whole in ((p.input, t.input), (p.output, t.output)):
        q = [10, 25, 50, 75, 90, 99]
        assert np.percentile(small, q) == pytest.approx(np.percentile(whole, q), rel=0.08)
    together = [np.corrcoef(x.input, x.output)[0, 1] for x in (p, t)]
    assert together[0] == pytest.approx(together[1], abs=0.01)


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


AZURE = "TIMESTAMP,ContextTokens,GeneratedTokens\n"


def test_azure_rows_count_from_the_first_one_over_midnight(tmp_path):
    rows = "2023-11-16 23:59:59.6805904,374,44\n2023-11-17 00:00:00.6805906,396,109\n2023-11-17 00:00:00.6805906,1,2\n2023-11-17 00:00:02,3,4\n"
    r = workload.read_trace(trace(tmp_path, AZURE + rows))
    assert r.arrival_ns.tolist() == [0, 1_000_001_000, 1_000_001_000, 2_319_410_000]
    assert (r.input.tolist(), r.output.tolist()) == ([374, 396, 1, 3], [44, 109, 2, 4])
    assert r.cached is None


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ("2023-11-16 18:15:46.68,5,5", "arrives at 2023-11-16 18:15:46.68, before the line above"),
        ("18:15:50,5,5", "TIMESTAMP is '18:15:50'"),
        ("2023-02-30 18:15:50,5,5", "TIMESTAMP is '2023-02-30 18:15:50'"),
        ("2023-11-16 18:15:50.x,5,5", "TIMESTAMP is"),
        (",5,5", "TIMESTAMP is ''"),
        ("2023-11-16 18:15:50,-5,5", "ContextTokens is '-5'"),
        ("2023-11-16 18:15:50,5,0", "GeneratedTokens is '0'"),
        ("2023-11-16 18:15:50,5,nan", "GeneratedTokens is 'nan'"),
        ("2023-11-16 18:15:50,1000000,5", "ContextTokens is '1000000'"),
        ("2023-11-16 18:15:50,5", "has 2 columns"),
    ],
)
def test_a_bad_azure_row_is_named_by_its_line(tmp_path, row, words):
    with pytest.raises(BadTrace, match=words) as e:
        workload.read_trace(trace(tmp_path, f"{AZURE}2023-11-16 18:15:46.6805900,374,44\n{row}\n"))
    assert "line 3:" in str(e.value)


def mooncake(*rows):
    names = ("timestamp", "input_length", "output_length", "hash_ids")
    return "".join(json.dumps(dict(zip(names, r, strict=True))) + "\n" for r in rows)


def test_mooncake_rows_have_what_the_prefix_cache_holds(tmp_path):
    text = mooncake(
        (0, 1500, 6, [0, 1, 2]),
        (0, 1100, 4, [0, 1, 3]),
        (27, 1024, 3, [0, 1]),
        (277.5, 900, 9, [4, 1]),
        (300, 700, 9, []),
        (300, 1500, 5, [0, 1, 2]),
    )
    r = workload.read_trace(trace(tmp_path, text))
    assert (r.arrival_ns // 1000).tolist() == [0, 0, 27_000, 277_500, 300_000, 300_000]
    assert r.cached.dtype == np.int32
    # A prompt of whole blocks that are all there still computes its last token; a block counts behind its
    # predecessors only.
    assert r.cached.tolist() == [0, 1024, 1023, 0, 0, 1499]


def test_a_prefix_cache_forgets_the_least_recent_and_tails_first(tmp_path):
    text = mooncake((0, 1024, 1, [0, 1]), (1, 1024, 1, [2, 3]), (2, 1024, 1, [0, 1]), (3, 1536, 1, [2, 3, 4]))
    read = trace(tmp_path, text)
    # Of three blocks: after the second request 2, 3 and 0 are left; after the third 0, 1 and 2.
    assert workload.read_trace(read, cache_blocks=3).cached.tolist() == [0, 0, 512, 512]
    assert workload.read_trace(read, cache_blocks=4).cached.tolist() == [0, 0, 1023, 1024]
    assert workload.read_trace(read, cache_blocks=0).cached is None


@given(
    st.lists(st.lists(st.integers(0, 6), max_size=4, unique=True), max_size=25),
    st.one_of(st.none(), st.integers(0, 6)),
)
def test_a_prefix_cache_is_one_list_by_last_use(prompts, size):
    held = []  # least recently used first
    expected = []
    for blocks in prompts:
        hits = len(list(itertools.takewhile(held.__contains__, blocks)))
        expected.append(min(512 * hits, 512 * len(blocks)))
        held = [b for b in held if b not in blocks] + blocks[::-1]
        held = held if size is None else held[max(0, len(held) - size) :]
    assert workload.replay_prefixes([(512 * len(b) + 1, b) for b in prompts], size) == expected


def test_requests_above_the_context_fill_no_cache(tmp_path):
    text = mooncake((0, 1024, 977, [0, 1]), (1, 1024, 976, [0, 1]), (2, 1024, 976, [0, 1]))
    r, left_out = workload.read_trace(trace(tmp_path, text), context_length=2000).within(2000)
    assert (r.cached.tolist(), left_out, len(r)) == ([0, 1023], 1, 2)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", "is no JSON object"),
        ("", "is no JSON object"),
        (
            '{"timestamp": 5, "input_length": 7}',
            "is no JSON object with timestamp, input_length, output_length",
        ),
        (mooncake((1, 5, 5, [])), "arrives at 1 ms, before the line above"),
        (mooncake((-1, 5, 5, [])), "timestamp is -1"),
        (mooncake((math.nan, 5, 5, [])), "timestamp is nan"),
        (mooncake(("9", 5, 5, [])), "timestamp is '9'"),
        (mooncake((9, -5, 5, [])), "input_length is -5"),
        (mooncake((9, 5, 0, [])), "output_length is 0"),
        (mooncake((9, 5.5, 5, [])), "input_length is 5.5"),
        (mooncake((9, None, 5, [])), "input_length is None"),
        (mooncake((9, 1_000_000, 5, [])), "input_length is 1000000"),
        (mooncake((9, 512, 5, [1, 2])), "hash_ids has 2 blocks"),
        (mooncake((9, 512, 5, ["a"])), "hash_ids is no list"),
    ],
)
def test_a_bad_mooncake_row_is_named_by_its_line(tmp_path, line, words):
    with pytest.raises(BadTrace, match=words) as e:
        workload.read_trace(trace(tmp_path, mooncake((2, 5, 5, [1])) + line.strip() + "\n"))
    assert "line 2:" in str(e.value)


def test_our_own_traces_may_say_what_is_cached(tmp_path):
    header = "arrival_s,input_tokens,output_tokens,cached_tokens\n"
    r = workload.read_trace(trace(tmp_path, header + "0,55,4,0\n1,829,170,828\n"))
    assert r.cached.tolist() == [0, 828]
    assert r.take(r.input > 100).cached.tolist() == [828]
    with pytest.raises(BadTrace, match="line 2: cached_tokens is 55 of a prompt of 55"):
        workload.read_trace(trace(tmp_path, header + "0,55,4,55\n"))
    with pytest.raises(BadTrace, match="line 2: cached_tokens is '-1'"):
        workload.read_trace(trace(tmp_path, header + "0,55,4,-1\n"))


def test_the_published_traces_are_read_whole():
    azure = workload.read_trace(shared("traces/AzureLLMInferenceTrace_conv.csv"))
    assert (len(azure), int(azure.arrival_ns[-1])) == (19366, 3_501_721_937_000)
    assert azure.within(8192)[1] == int(np.count_nonzero(azure.input + azure.output > 8192))
    mooncake = workload.read_trace(shared("traces/mooncake_synthetic_trace.jsonl"))
    assert (len(mooncake), int(mooncake.arrival_ns[-1])) == (3993, 1_022_025_000_000)
    # The Mooncake paper's table has a cache ratio of 66 % for it.
    assert mooncake.cached.sum() / mooncake.input.sum() == pytest.approx(0.66, abs=0.015)


# --------------------------------------------------------------------------------------------- traces as workload


def own(*arrivals_ms):
    n = len(arrivals_ms)
    lens = np.arange(1, n + 1, dtype=np.int32)
    return Requests(np.array(arrivals_ms, dtype=np.int64) * 1_000_000, lens, lens, lens - 1)


def test_a_trace_is_a_workload_with_its_rate_variation_and_lengths():
    w = workload.from_trace(own(500, 600, 1000, 1500), "t.csv")
    assert (w.rate, w.source) == (3.0, "t.csv")
    assert w.cv == pytest.approx(np.std([100, 400, 500]) / np.mean([100, 400, 500]), abs=1e-6)
    assert (w.lengths.input.tolist(), w.lengths.output.tolist()) == ([1, 2, 3, 4], [1, 2, 3, 4])


def test_seed_0_at_its_own_rate_is_the_trace_itself_and_begins_again():
    r = workload.from_trace(own(500, 600, 1000, 1500), "t").requests(2.5, 0)
    # Once around is its second and its mean gap of 333,333 µs.
    assert (r.arrival_ns // 1000).tolist() == [0, 100_000, 500_000, 1_000_000, 1_333_333, 1_433_333, 1_833_333, 2_333_333]  # fmt: skip
    assert r.input.tolist() == [1, 2, 3, 4, 1, 2, 3, 4]
    assert r.cached.tolist() == [0, 1, 2, 3, 0, 1, 2, 3]


def test_another_rate_scales_a_trace_in_time_and_another_seed_starts_elsewhere():
    w = workload.from_trace(own(500, 600, 1000, 1500), "t")
    fast = Workload(6.0, w.cv, w.lengths, "t", w.trace).requests(1.0, 0)
    assert (fast.arrival_ns // 1000).tolist() == [0, 50_000, 250_000, 500_000, 666_666, 716_666, 916_666]
    firsts = [int(w.requests(1.0, seed).input[0]) for seed in (0, 1, 2, 3)]
    assert firsts == [1, 3, 1, 4]  # multiples of the golden ratio
    other = w.requests(1.1, 1)
    assert (other.input.tolist(), (other.arrival_ns // 1000).tolist()) == (
        [3, 4, 1, 2],
        [0, 500_000, 833_333, 933_333],
    )


@given(
    st.lists(st.integers(0, 10_000), min_size=2, max_size=30).filter(lambda ms: max(ms) > min(ms)),
    st.floats(0.05, 200),
    st.integers(0, 10**6),
)
def test_a_replayed_trace_keeps_order_and_rate(ms, rate, seed):
    w = workload.from_trace(own(*sorted(ms)), "t")
    long, short = (Workload(rate, 1, w.lengths, "t", w.trace).requests(s / rate, seed) for s in (900, 300))
    gaps = np.diff(long.arrival_ns)
    assert np.all(gaps >= 0)
    assert long.arrival_ns[0] == 0
    assert long.arrival_ns[-1] < 900e9 / rate
    assert len(long) == pytest.approx(900, abs=31)
    assert np.array_equal(long.input % len(ms), (long.input[0] + np.arange(len(long))) % len(ms))
    assert np.array_equal(long.arrival_ns[: len(short)], short.arrival_ns)


@pytest.mark.parametrize("arrivals", [(), (5,), (5, 5)])
def test_a_trace_of_one_moment_has_no_rate(arrivals):
    with pytest.raises(BadTrace, match="has no rate"):
        workload.from_trace(own(*arrivals), "t")


def test_a_trace_may_run_faster_from_its_first_request_on():
    r = own(500, 600, 1000).faster(2)
    assert (r.arrival_ns // 1000).tolist() == [500_000, 550_000, 750_000]
    assert r.cached.tolist() == [0, 1, 2]
    with pytest.raises(WorkloadError, match="speed is 0"):
        own(1, 2).faster(0)


# ---------------------------------------------------------------------------------------------------------- files


def test_a_missing_file_says_so(tmp_path):
    with pytest.raises(BadTrace, match="cannot be read"):
        workload.read_trace(tmp_path / "none.csv")


def test_lengths_files_take_both_headers(tmp_path):
    for header in ("input_tokens,output_tokens", "input_len,output_len"):
        table = workload.read_lengths(trace(tmp_path, f"{header}\n5,6\n7,8\n"))
        assert (table.input.tolist(), table.output.tolist(), table.name) == ([5, 7], [6, 8], "t")
    with pytest.raises(BadLengths, match="line 2: the input is '0'"):
        workload.read_lengths(trace(tmp_path, "input_tokens,output_tokens\n0,6\n"))


def test_rows_above_the_context_can_be_left_out():
    table, left_out = lengths((1, 5), (90, 10), (90, 11), (100, 1)).within(100)
    assert (table.input.tolist(), table.output.tolist(), left_out) == ([1, 90], [5, 10], 2)
    with pytest.raises(BadLengths, match="every request is longer than the context of 5 tokens"):
        lengths((1, 5)).within(5)


def test_weights_make_a_histogram_of_lengths(tmp_path):
    table = workload.read_lengths(
        trace(tmp_path, "input_tokens,output_tokens,weight\n5,6,1\n7,8,0\n9,10,2.999\n")
    )
    counted = dict(zip(*(x.tolist() for x in np.unique(table.input, return_counts=True)), strict=True))
    assert counted == {5: 5001, 9: 14999}
    assert np.array_equal(table.output, table.input + 1)
    for weight in ("-1", "nan", "inf", "", "x"):
        with pytest.raises(BadLengths, match="line 3: weight is"):
            workload.read_lengths(
                trace(tmp_path, f"input_tokens,output_tokens,weight\n5,6,1\n5,6,{weight}\n")
            )
    with pytest.raises(BadLengths, match="every weight is 0"):
        workload.read_lengths(trace(tmp_path, "input_tokens,output_tokens,weight\n5,6,0\n"))


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
