"""Placement: the figures of REFERENCE, what binds when there is no plan, and what must not depend on chance."""

import dataclasses
import itertools
import pickle
import re

import pytest

from disaggserve import catalogue, engines, latency, search, simulate, workload
from disaggserve.api.errors import Infeasible, InvalidInput
from disaggserve.hardware import Inventory, Node, Refusal
from disaggserve.search import Group, Shape, Standing
from disaggserve.search.goodputs import bound_per_gpu
from disaggserve.search.high_affinity import Counts, plans
from disaggserve.search.low_affinity import pairs
from disaggserve.search.ranking import ranked
from disaggserve.search.shapes import Refused, shapes, summary

A100 = catalogue.gpu("A100-80G")
H100, H200 = catalogue.gpu("H100"), catalogue.gpu("H200")
CHAT_13B, CHAT_66B = simulate.Promise(0.25, 0.1, 0.9), simulate.Promise(2.5, 0.15, 0.9)


def nodes(n=4, gpu=A100, free=8, nvlink=True, rdma=True, prefix="gpu", simulated=True):
    return tuple(Node(f"{prefix}-{i}", gpu, 8, free, 100, nvlink, rdma, (), "", simulated) for i in range(n))


def problem(rate=5.0, model="facebook/opt-13b", promise=CHAT_13B, scale=1.0, where=None, max_gpus=32, **more):
    lengths = workload.preset("sharegpt").scaled(scale, 2048)
    return search.Problem(
        catalogue.model(model),
        promise,
        workload.Workload(rate, 1.0, lengths),
        Inventory(where or nodes(), ()),
        more.pop("engine", engines.TORCH),
        more.pop("algorithm", "DistServe"),
        max_gpus,
        **more,
    )


def infeasible(*args, **kwargs) -> Infeasible:
    with pytest.raises(Infeasible) as caught:
        search.place(problem(*args, **kwargs))
    return caught.value


# ------------------------------------------------------------------------------------------------------ figures


@pytest.mark.parametrize(("rate", "gpus"), [(5, 8), (10, 8), (15, 8), (20, 12), (30, 16), (40, 20)])
def test_algorithm_1_takes_the_gpus_of_the_reference(rate, gpus):
    found = search.place(problem(rate))
    assert abs(found.gpus - gpus) <= 2  # REFERENCE § 3
    assert found.algorithm == "HighAffinity"
    assert found.goodput >= rate
    assert found.prediction.attainment >= 0.9
    assert {g.role: (g.tp, g.pp) for g in found.groups} == {"prefill": (4, 1), "decode": (2, 1)}
    assert found.prediction.requests > 10_000
    assert 0 < found.bound_share < 1


def test_short_prompts_take_far_fewer():
    assert search.place(problem(5, scale=1 / 3)).gpus == 2


def test_opt_66b():
    found = search.place(problem(4, "facebook/opt-66b", CHAT_66B))
    assert [(g.role, g.tp, g.count) for g in found.groups] == [("prefill", 2, 2), ("decode", 4, 1)]
    assert "tp 2,3,4" in found.latency_source


@pytest.mark.parametrize(("prefill_tp", "decode_tp", "attained"), [(1, 2, 0.79), (2, 1, 0.955)])
def test_three_gpus_with_full_prompts(prefill_tp, decode_tp, attained):
    p = problem(5)
    groups = [("prefill", prefill_tp, 1, 1), ("decode", decode_tp, 1, 1)]
    said = search.predict(search.deployment(p.model, p.engine, A100, groups, "rdma"), p.workload, p.promise)
    assert said.attainment == pytest.approx(attained, abs=0.025)
    assert said.low < said.attainment < said.high


def test_the_fabric_chooses_the_algorithm():
    found = search.place(problem(4, "facebook/opt-66b", CHAT_66B, where=nodes(rdma=False)))
    assert (found.algorithm, found.affinity, found.link.name) == ("LowAffinity", "Low", "nvlink")
    prefill, decode = found.groups
    assert prefill.nodes == decode.nodes
    assert prefill.pp == decode.pp
    assert (
        search.place(problem(where=nodes(rdma=False), affinity="High", scale=0.1)).algorithm == "HighAffinity"
    )


def test_the_bound_agrees_with_the_table_of_physical_limits():
    # data/profiles/physical_limits.json: 7.61 and 1.78 for prompts of 745 and answers of 200 tokens on average
    assert bound_per_gpu(problem(), A100, 8) == pytest.approx(7.61, rel=0.05)
    assert bound_per_gpu(problem(model="facebook/opt-66b"), A100, 8) == pytest.approx(1.78, rel=0.05)
    assert bound_per_gpu(problem(model="facebook/opt-175b"), A100, 1) == 0.0


# ------------------------------------------------------------------------------------------- what must not matter


def test_the_order_of_nodes_and_a_second_run_change_nothing():
    def shown(p):
        found = search.place(p)
        return (
            found.groups,
            found.goodput,
            found.prediction,
            found.bottleneck,
            found.rejected,
            found.simulations,
        )

    first = shown(problem(20))
    turned = shown(problem(20, where=tuple(reversed(nodes()))))
    assert first == turned == shown(problem(20))


@pytest.mark.parametrize("free", [1, 3, 5, 8])
def test_no_plan_takes_more_than_is_free(free):
    for rate, count in itertools.product((2, 8), (1, 2)):
        try:
            found = search.place(problem(rate, where=nodes(count, free=free), max_gpus=12))
        except Infeasible as e:
            assert e.limit == "GPUs"  # noqa: PT017
            continue
        assert found.gpus <= min(12, count * free)
        taken = dict.fromkeys((n.name for n in nodes(count)), 0)
        for g in found.groups:
            for name, n in g.nodes:
                taken[name] += n * g.tp * g.pp
        assert max(taken.values()) <= free


def test_what_stands_stays_and_costs_nothing():
    before = search.place(problem(5))
    keep = tuple(Standing(g.role, g.tp, g.pp, name) for g in before.groups for name, _ in g.nodes)
    stands_on = {k.node for k in keep}
    left = tuple(n for n in nodes(2) if n.name not in stands_on)
    full = tuple(Refusal(name, "all its 8 GPUs are taken by other pods") for name in sorted(stands_on))
    p = dataclasses.replace(problem(5), inventory=Inventory(left, full), keep=keep)
    assert search.place(p).groups == before.groups


def test_a_step_of_the_search_is_told():
    told = []
    search.place(problem(5), progress=lambda *step: told.append(step))
    assert ("prefill tp1", 0, 6) in told
    assert ("decode tp4", 5, 6) in told


# ---------------------------------------------------------------------------------------------------- infeasible


def test_ttft_out_of_reach_names_one_that_is_not():
    e = infeasible(promise=simulate.Promise(0.02, 0.1, 0.9))
    assert e.limit == "TTFT"
    assert "even an idle prefill tp4" in str(e)
    assert "a TTFT of about 88 ms could be kept" in str(e)
    search.place(problem(1, promise=simulate.Promise(0.088, 0.1, 0.9)))


def test_tpot_out_of_reach_names_one_that_is_not():
    e = infeasible(promise=simulate.Promise(0.25, 0.01, 0.9))
    assert e.limit == "TPOT"
    nearest = re.search(r"a TPOT of about (\d+) ms could be kept", str(e))
    assert nearest is not None
    assert 10 < int(nearest[1]) < 20
    search.place(problem(1, promise=simulate.Promise(0.25, int(nearest[1]) / 1e3, 0.9)))


def test_too_few_gpus_names_the_rate_that_could_be_kept():
    e = infeasible(20, max_gpus=8)
    assert e.limit == "GPUs"
    assert "20 req/s takes 12 GPUs" in str(e)
    assert "maxGPUs is 8" in str(e)
    rate = float(str(e).split(" GPUs ")[-1].split(" req/s")[0])
    assert search.place(problem(0.95 * rate, max_gpus=8)).gpus <= 8
    e = infeasible(20, where=nodes(1))
    assert e.limit == "GPUs"
    assert "8 are free on A100-80G nodes" in str(e)
    assert "takes at least 2 GPUs" in str(infeasible(5, where=nodes(1, free=1)))
    e = infeasible(40, "facebook/opt-66b", CHAT_66B, algorithm="LowAffinity")
    assert e.limit == "GPUs"
    assert "with 32 GPUs" in str(e)


def test_memory_engine_nodes_and_affinity():
    e = infeasible(model="facebook/opt-175b", where=nodes(gpu=catalogue.gpu("L40S"), nvlink=False))
    assert e.limit == "Memory"
    assert "GB per GPU" in str(e)
    e = infeasible(model="mistralai/Mixtral-8x7B-v0.1", promise=CHAT_66B)
    assert e.limit == "Engine"
    assert "not mixtral" in str(e)
    refused = tuple(Refusal(f"n{i}", "it is cordoned") for i in range(5))
    with pytest.raises(
        Infeasible, match=r"none of 5 nodes can be used: n0: it is cordoned.*and 2 more"
    ) as caught:
        search.place(dataclasses.replace(problem(), inventory=Inventory((), refused)))
    assert caught.value.limit == "Nodes"
    e = infeasible(where=nodes(rdma=False), affinity="High")
    assert e.limit == "Affinity"
    assert "over tcp" in str(e)
    assert str(pickle.loads(pickle.dumps(e))) == str(e)


def test_a_pair_that_no_node_holds():
    e = infeasible(1, "facebook/opt-175b", simulate.Promise(4, 0.2, 0.9), where=nodes(rdma=False))
    assert e.limit == "Nodes"
    assert "no pair" in str(e)


# -------------------------------------------------------------------------------------------------- GPU products


def test_one_product_is_used_and_the_other_is_named():
    found = search.place(problem(5, where=(*nodes(2), *nodes(3, H100, prefix="hop"))))
    assert {name for g in found.groups for name, _ in g.nodes} <= {"hop-0", "hop-1", "hop-2"}
    assert found.rejected[0] == ("A100-80G nodes", "a plan stands on one GPU product; H100 has most free")
    found = search.place(
        problem(
            5,
            promise=simulate.Promise(0.12, 0.1, 0.9),
            where=(*nodes(2), *nodes(3, catalogue.gpu("L40S"), nvlink=False, prefix="l")),
        )
    )
    assert {name for g in found.groups for name, _ in g.nodes} == {"gpu-0"}
    assert found.rejected[0].what == "L40S nodes"


def test_a_model_without_a_profile_is_planned_by_roofline():
    found = search.place(problem(5, "meta-llama/Llama-3.1-8B", where=nodes(gpu=H200)))
    assert "roofline" in found.latency_source
    assert found.goodput >= 5


# --------------------------------------------------------------------------------------------------------- shapes


def test_shapes_are_those_that_were_measured_and_fit():
    p = problem(model="facebook/opt-66b", promise=CHAT_66B)
    tried, refused = shapes(p.model, A100, p.engine, "decode", nodes(), p.workload.lengths)
    assert tried == ((2, 1), (3, 1), (4, 1))
    why = {r.shape: r.limit for r in refused}
    assert why[Shape(1, 1)] == "Memory"
    assert why[Shape(8, 1)] == why[Shape(2, 2)] == "Profile"  # tp 8 is a copy of another engine's curve


def test_a_profile_of_one_tp_does_not_keep_the_others_from_being_tried():
    p = problem(model="meta-llama/Llama-3.1-8B")
    tried, refused = shapes(p.model, H100, engines.TORCH, "prefill", nodes(gpu=H100), p.workload.lengths)
    assert tried == ((1, 1), (2, 1), (4, 1), (8, 1))
    assert {r.limit for r in refused} == {"Profile"}, "pp: a fit's form carried over is too fast for it"
    scaled = latency.step_times(p.model, H100, 2, 1).provenance.describe()
    assert scaled == "roofline × torch fit's ratio at tp 1, H100"


def test_shapes_without_a_profile_are_all_that_fit_the_engine():
    p = problem(model="meta-llama/Llama-3.1-8B")
    tried, _ = shapes(p.model, H200, engines.TORCH, "prefill", nodes(gpu=H200), p.workload.lengths)
    assert Shape(1, 8) in tried
    assert Shape(8, 1) in tried
    assert all(s.gpus <= 8 for s in tried)
    tried, refused = shapes(p.model, H200, engines.VLLM, "prefill", nodes(gpu=H200), p.workload.lengths)
    assert all(s.pp == 1 for s in tried)
    assert {r.limit for r in refused} == {"Engine"}
    tried, refused = shapes(
        p.model, H200, engines.TORCH, "prefill", nodes(gpu=H200, nvlink=False), p.workload.lengths
    )
    assert all(s.tp == 1 for s in tried)
    assert {r.limit for r in refused} == {"Nodes"}


def test_one_reason_for_many_shapes_holds_of_each():
    p = problem(model="facebook/opt-175b")
    _, refused = shapes(p.model, A100, engines.VLLM, "decode", nodes(), p.workload.lengths)
    full = [r for r in refused if r.limit == "Memory"]
    assert len({r.reason for r in full}) > 1
    memory, engine = summary(refused)
    least = min(p.model.weight_bytes(*r.shape) for r in full)
    assert memory.reason.startswith(f"weights take at least {least / 1e9:.1f} GB per GPU, A100-80G has ")
    assert engine.reason.endswith("this decode has pp 2 (tp3pp2; the others alike)")
    assert summary(full[:1])[0].reason == full[0].reason
    # Some have no room for the weights, others too little beside them: the most that fits holds of both.
    roomy = dataclasses.replace(full[-1].full, weights=10**9, tokens=64)
    mixed = [full[0], Refused("decode", Shape(8, 1), "Memory", roomy.words(), roomy)]
    said = "beside weights of at least 1.0 GB per GPU, KV of at most 64 tokens fits A100-80G; the longest"
    assert summary(mixed)[0].reason.startswith(said)


def test_what_the_engine_refuses_stands_among_the_rejected():
    found = search.place(problem(5, "meta-llama/Llama-3.1-8B", where=nodes(gpu=H100), engine=engines.VLLM))
    assert all(g.pp == 1 for g in found.groups)
    assert any("vllm hands KV over only with pp 1" in reason for _, reason in found.rejected)


def test_near_goodputs_go_to_fewer_gpus_then_to_fewer_stages():
    goodputs = {Shape(1, 1): 0.94, Shape(1, 2): 1.91, Shape(2, 1): 1.90, Shape(4, 1): 4.0, Shape(8, 1): 0.0}
    assert ranked(goodputs) == [Shape(2, 1), Shape(1, 2), Shape(4, 1), Shape(1, 1)]


def test_the_published_choice_comes_first_then_what_costs_least():
    prefill, decode = {Shape(4, 1): 16.0, Shape(1, 1): 3.0}, {Shape(1, 1): 5.0, Shape(2, 2): 20.0}
    order = list(plans(prefill, decode, 15, engines.TORCH))
    assert order[0] == Counts(Shape(4, 1), 1, Shape(1, 1), 3)
    assert [c.gpus for c in order] == [7, 8, 8, 9]
    assert all(c.decode.pp == 1 for c in plans(prefill, decode, 15, engines.SGLANG))


def test_pairs_share_the_pipeline_split_and_a_node():
    some = (Shape(1, 1), Shape(4, 1), Shape(2, 2), Shape(8, 1))
    assert [(p.prefill, p.decode) for p in pairs(some, some, 8)] == [
        (Shape(1, 1), Shape(1, 1)),
        (Shape(1, 1), Shape(4, 1)),
        (Shape(4, 1), Shape(1, 1)),
        (Shape(4, 1), Shape(4, 1)),
        (Shape(2, 2), Shape(2, 2)),
    ]


# ---------------------------------------------------------------------------------------------------- predictions


def test_a_plan_that_its_own_simulation_refutes_gets_one_more_instance():
    # Each phase alone keeps 90 % at 17.5 req/s; both together do not.
    found = search.place(problem(17.5, promise=simulate.Promise(0.25, 0.05, 0.9)))
    assert [(g.role, g.tp, g.count) for g in found.groups] == [("prefill", 4, 2), ("decode", 2, 2)]
    assert found.prediction.attainment >= 0.9
    what, why = found.rejected[0]
    assert what == "prefill 1×tp4, decode 2×tp2"
    assert re.fullmatch(
        r"attains 8\d.\d% when both phases are simulated together \(TTFT 9.*, TPOT 9.*\)", why
    )


def test_the_slowest_link_of_the_pairs_counts():
    p = problem()
    mixed = Inventory((*nodes(1), *nodes(1, rdma=False, prefix="eth")), ())
    on = Group("prefill", 1, 1, 1, (("gpu-0", 1),))
    near, far = Group("decode", 1, 1, 1, (("gpu-0", 1),)), Group("decode", 1, 1, 1, (("eth-0", 1),))
    full = Group("decode", 1, 1, 1, (("full", 1),))
    assert search.kv_link(mixed, [on, near], p.engine).name == "rdma"
    assert search.kv_link(mixed, [on, far], p.engine).name == "tcp"
    assert search.kv_link(mixed, [on, near, full], p.engine).name == "tcp"
    assert search.kv_link(mixed, [on, near], p.engine, paired=True).name == "nvlink"
    pools = search.deployment(p.model, p.engine, mixed, [on, near, far])
    assert pools.link_bytes_s == catalogue.TCP.bytes_per_s
    assert [pool.count for pool in pools.decode] == [1, 1]
    with pytest.raises(InvalidInput, match="link"):
        search.deployment(p.model, p.engine, A100, [("prefill", 1, 1, 1), ("decode", 1, 1, 1)])
    with pytest.raises(InvalidInput, match="no usable node"):
        search.deployment(p.model, p.engine, Inventory((), ()), [on, near])


def test_between_real_gpus_kv_goes_as_the_engine_moves_it_and_no_faster():
    on, near = (Group(role, 1, 1, 1, (("gpu-0", 1),)) for role in ("prefill", "decode"))
    far = Group("decode", 1, 1, 1, (("eth-0", 1),))

    def links(engine, simulated):
        where = (*nodes(1, simulated=simulated), *nodes(1, rdma=False, prefix="eth", simulated=False))
        found = Inventory(where, ())
        pair = search.kv_link(found, [on, near], engine, paired=True)
        return [pair.name, *(search.kv_link(found, [on, other], engine).name for other in (near, far))]

    assert links(engines.TORCH, simulated=False) == ["zmq", "zmq", "tcp"]
    assert links(engines.TORCH, simulated=True) == ["nvlink", "rdma", "tcp"]
    assert links(engines.VLLM, simulated=False) == ["nvlink", "rdma", "tcp"]


@pytest.mark.parametrize("algorithm", ["Joint", "HighAffinity", "LowAffinity"])
def test_plans_on_real_gpus_do_not_rest_on_a_link_that_the_engine_does_not_use(algorithm):
    found = search.place(problem(10, where=nodes(simulated=False), algorithm=algorithm))
    assert found.link == catalogue.ZMQ
    assert found.prediction.attainment >= 0.9
    # Of 66B the KV of a prompt takes too long; the nodes' own links would keep the promise.
    asked = {"model": "facebook/opt-66b", "promise": simulate.Promise(1.0, 0.08, 0.9), "algorithm": algorithm}
    assert search.place(problem(1, **asked)).link.name in ("rdma", "nvlink")
    e = infeasible(1, where=nodes(simulated=False), **asked)
    assert e.limit == "TPOT"
    assert algorithm == "LowAffinity" or "(torch moves it through the hosts' memory)" in str(e)


def test_groups_on_two_products_are_two_pools():
    p = problem()
    both = Inventory((*nodes(1), *nodes(1, H100, prefix="hop")), ())
    groups = [
        Group("prefill", 1, 1, 3, (("gpu-0", 1), ("hop-0", 2))),
        Group("decode", 2, 1, 1, (("hop-0", 1),)),
    ]
    made = search.deployment(p.model, p.engine, both, groups)
    assert [(pool.count, pool.times.provenance.source) for pool in made.prefill] == [
        (1, "profile"),
        (2, "fitted"),
    ]


def test_a_slow_rate_is_judged_on_enough_requests():
    p = problem(0.1)
    made = search.deployment(p.model, p.engine, A100, [("prefill", 1, 1, 1), ("decode", 1, 1, 1)], "rdma")
    assert search.predict(made, p.workload, p.promise).requests >= 1400
