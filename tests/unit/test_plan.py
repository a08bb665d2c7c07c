"""From a spec to a plan: what the options ask for, and what a plan keeps so that it can be replayed."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from disaggserve import engines, latency, manifests, plan, search, simulate, workload
from disaggserve.api import manifest
from disaggserve.api.errors import InvalidInput
from disaggserve.api.plan import Plan, Slot
from disaggserve.api.spec import Spec
from disaggserve.cli import plan as cli_plan
from tests.contract.broken import GOOD
from tests.integration.bench import by_hand, node

FACTS = plan.Facts(nodes=(node("gpu-0", 8), node("gpu-1", 8)))
FITS = Path(latency.__file__).parents[1] / "data" / "profiles" / "profiler-a100-80g.distserve.json"


def spec(rate: float = 20, **parts: Any) -> Spec:
    value = {**GOOD["spec"], "workload": {"rate": rate, "lengths": {"preset": "sharegpt"}}, **parts}
    return manifest.load(json.dumps({**GOOD, "spec": value}))[0].spec


def test_joint_is_the_default_and_says_what_it_did() -> None:
    found = plan.draft(spec(), FACTS)
    assert (found.plan.algorithm, found.plan.gpus, found.refusal) == ("Joint", 8, None)
    assert found.plan.goodput_per_gpu == pytest.approx(found.plan.goodput / 8, rel=1e-3)
    assert len(found.instances) == sum(r.count for r in found.plan.roles)
    assert found.plan.cost is None


def test_prices_make_a_cost() -> None:
    found = plan.draft(spec(hardware={"prices": {"NVIDIA-A100-SXM4-80GB": 1.5}}), FACTS)
    assert found.plan.cost == 1.5 * found.plan.gpus


def test_any_engine_says_what_the_own_one_costs() -> None:
    found = plan.draft(spec(5), FACTS, options=plan.Options(any_engine=True))
    assert found.plan.gpus == 2
    assert [r.role for r in found.plan.roles] == ["mixed"]
    assert found.plan.setting is not None
    assert found.plan.setting.engine != "torch"
    said = {r.what: r.reason for r in found.plan.rejected}
    takes = re.fullmatch(
        r"takes 3 GPUs, good for (.*) req/s per GPU; (.*) takes 2, good for (.*)", said["engine torch"]
    )
    assert takes is not None, said
    assert 0 < float(takes[1]) < float(takes[3]) == pytest.approx(found.plan.goodput_per_gpu, abs=0.006)
    assert takes[2] == found.plan.setting.engine
    assert found.refusal is None
    # What is replayed is what was planned: colocated instances whose chunk the plan holds.
    again = Plan.model_validate_json(found.plan.model_dump_json(exclude_none=True), strict=True)
    predicted = plan.predict(again, plan.expected(spec(5)))
    assert predicted.attainment == pytest.approx(found.plan.predicted.attainment, abs=1e-9)


def test_what_the_engine_cannot_do_is_among_the_rejected_with_what_it_would_take() -> None:
    said = {r.what: r.reason for r in plan.draft(spec(5), FACTS).plan.rejected}
    (reason,) = (why for what, why in said.items() if what.startswith(("colocated", "mixed")))
    assert reason.startswith("torch does not prefill and decode in one instance; it would take ")


def test_a_plan_made_with_a_profile_is_replayed_with_it_only(tmp_path: Path) -> None:
    slower = json.loads(FITS.read_text())
    for fit in slower["facebook/opt-13b"].values():
        fit["prefill"] = [1.5 * x for x in fit["prefill"]]
    path = tmp_path / "slow.json"
    path.write_text(json.dumps(slower))
    profile = latency.Profile.load(path)
    found = plan.draft(spec(), FACTS, options=plan.Options(profile=profile)).plan
    assert found.gpus > 8
    assert "slow fit" in found.latency_source
    deployment, _ = plan.replay(found, profile)
    assert deployment.prefill[0].times.provenance.describe().startswith("slow fit")
    with pytest.raises(InvalidInput, match="made with the profile slow fit; give it with --profile"):
        plan.replay(found)
    with pytest.raises(InvalidInput, match="is not slow fit, with which the plan was made"):
        plan.replay(found, latency.Profile.load(FITS))
    with pytest.raises(InvalidInput, match="made without a profile"):
        plan.replay(plan.draft(spec(5), FACTS).plan, profile)


def test_a_plan_by_hand_is_measured_as_others_are() -> None:
    searched = plan.draft(spec(10), FACTS).plan
    roles = [{"role": r.role, "tp": r.tp, "pp": r.pp, "count": r.count} for r in searched.roles]
    found = plan.draft(spec(10, plan={"roles": roles}), FACTS).plan
    assert found.algorithm == "ByHand"
    assert found.goodput == pytest.approx(searched.goodput, rel=0.05)
    assert found.goodput_per_gpu == pytest.approx(found.goodput / found.gpus, abs=1e-3)
    assert (found.bound, found.bound_share > 0) == (searched.bound, True)


@pytest.mark.parametrize(
    ("option", "asked"),
    [
        ("--rate max", cli_plan.Replacing(rate="max")),
        ("--engine any", cli_plan.Replacing(engine="any")),
        ("--algorithm", cli_plan.Replacing(algorithm="high")),
    ],
)
def test_what_searches_is_refused_beside_a_plan_by_hand(
    option: str, asked: cli_plan.Replacing, tmp_path: Path
) -> None:
    file = tmp_path / "by-hand.json"
    file.write_text(json.dumps(by_hand(1, 1)))
    with pytest.raises(InvalidInput, match=f"{option} asks for a search, and spec.plan"):
        cli_plan.run(file, tmp_path / "nodes.yaml", asked, "json")


def test_pairs_are_replayed_as_they_were_predicted() -> None:
    found = plan.draft(spec(30, planner={"algorithm": "LowAffinity"}), FACTS).plan
    assert found.paired
    assert plan.copies(found) >= 2
    deployment, promise = plan.replay(found)
    assert sum(p.count for p in (*deployment.prefill, *deployment.decode)) == 2
    traffic = plan.expected(spec(30))
    assert plan.predict(found, traffic).attainment == pytest.approx(found.predicted.attainment, abs=1e-3)
    requests = traffic.requests(1500, 7)
    dealt = simulate.run_copies(deployment, requests, plan.copies(found))
    p = simulate.judge(requests, dealt, promise, 60, 1485)
    assert abs(p.attainment - found.predicted.attainment) < 0.01
    pooled = replace(
        deployment,
        prefill=(replace(deployment.prefill[0], count=plan.copies(found)),),
        decode=(replace(deployment.decode[0], count=plan.copies(found)),),
    )
    shared = simulate.judge(requests, simulate.run(pooled, requests), promise, 60, 1485)
    assert shared.attainment > p.attainment + 0.01


@pytest.mark.parametrize("algorithm", ["Joint", "HighAffinity"])
def test_rate_max_is_the_goodput_of_the_gpus_at_hand(algorithm: str) -> None:
    asked = spec(1, planner={"algorithm": algorithm}, hardware={"maxGPUs": 8})
    found = plan.draft(asked, FACTS, options=plan.Options(objective="goodput")).plan
    assert found.gpus <= 8
    assert found.rate == found.goodput == found.workload.rate
    assert found.predicted.attainment >= 0.9
    assert plan.draft(spec(0.97 * found.rate, hardware={"maxGPUs": 8}), FACTS).plan.gpus <= 8


def test_as_published_is_the_public_code() -> None:
    asked = spec(1, planner={"algorithm": "LowAffinity"}, hardware={"maxGPUs": 4})
    table = workload.preset("sharegpt")
    first = replace(table, input=table.input[:300], output=table.output[:300])
    options = plan.Options(as_published=True, objective="goodput")
    found = plan.draft(asked, FACTS, workload.Workload(1.0, 1.0, first), options=options).plan
    assert found.goodput_per_gpu == pytest.approx(2.344, abs=1e-3)
    assert (found.prefill, found.decode) == ("1×tp2", "1×tp1")


def test_another_process_makes_the_same_plan() -> None:
    code = (
        "from tests.unit.test_plan import *\n"
        "found = plan.draft(spec(10), FACTS).plan\n"
        "print(found.model_dump_json())"
    )
    printed = {
        subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
        for _ in range(2)
    }
    assert len(printed) == 1
    assert plan.draft(spec(10), FACTS).plan.digest in printed.pop()


def test_the_digest_tells_what_was_asked_apart() -> None:
    """Another profile, objective or order of arrivals is another question, even where the answer is the same."""
    drawn = workload.Workload(5.0, 1.0, workload.preset("sharegpt")).requests(300, 0)
    later = replace(drawn, arrival_ns=drawn.arrival_ns + 1000 * (drawn.arrival_ns > 10**11))
    asked = [
        (None, plan.Options()),
        (None, plan.Options(profile=latency.Profile.load(FITS))),
        (None, plan.Options(objective="goodput")),
        (workload.from_trace(drawn, "a trace"), plan.Options()),
        (workload.from_trace(later, "a trace"), plan.Options()),
    ]
    digests = {plan.draft(spec(5), FACTS, traffic, options=options).plan.digest for traffic, options in asked}
    assert len(digests) == len(asked)


def test_the_dtype_of_the_spec_stands_over_the_checkpoints() -> None:
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "max_position_embeddings": 4096,
        "vocab_size": 32000,
        "torch_dtype": "float32",
    }
    model = {"id": "acme/llama-7b", "config": json.dumps(config)}
    whole, half = (spec(2, model={**model, **dtype}) for dtype in ({}, {"dtype": "bfloat16"}))
    assert plan.model(whole).weight_bytes(1, 1) == 2 * plan.model(half).weight_bytes(1, 1)
    made = plan.draft(half, FACTS).plan
    assert made.setting is not None
    assert plan.replay(made)[0].kv_bytes_per_token == plan.model(half).kv_bytes_per_token()


def test_another_protocol_is_another_pairing_key(monkeypatch: pytest.MonkeyPatch) -> None:
    before = plan.pairing_key(spec())
    monkeypatch.setattr("disaggserve.wire.VERSION", 1_000)
    assert plan.pairing_key(spec()) != before


# ---- instances that do both


def colocated(engine: str, *roles: dict[str, Any]) -> plan.Draft:
    shape = {"role": "mixed", "tp": 1, "pp": 1}
    return plan.draft(
        spec(1, engine={"type": engine}, plan={"roles": [{**shape, **r} for r in roles]}), FACTS
    )


def test_mixed_instances_by_hand_keep_their_chunk_to_the_pod() -> None:
    found = colocated("vllm", {"count": 2, "chunk": 512})
    assert found.refusal is None
    assert (found.plan.mixed, found.plan.prefill) == ("2×tp1 with chunks of 512", "")
    assert found.plan.predicted.attainment > 0.5
    assert {(s.role, s.chunk) for s in found.instances} == {("mixed", 512)}
    owner = manifests.Owner("chat", "default", "u")
    pod = manifests.worker_pod(
        owner,
        spec(1, engine={"type": "vllm"}),
        found.instances[0],
        0,
        1,
        2048,
        manifests.Images("worker", "router"),
    )
    command = pod["spec"]["containers"][0]["command"]
    assert command[command.index("--max-num-batched-tokens") + 1] == "512"
    labels = pod["metadata"]["labels"]
    assert (labels[manifests.ROLE], labels[manifests.CHUNK]) == ("mixed", "512")


@pytest.mark.parametrize(
    ("engine", "roles", "words"),
    [
        ("vllm", [{"count": 1}], "never takes them whole"),
        ("vllm", [{"count": 1, "chunk": 512}, {"count": 1, "chunk": 256}], "does not move a request"),
        ("torch", [{"count": 1}], "Torch does not prefill and decode in one instance"),
    ],
)
def test_mixed_instances_that_are_not_started_are_planned_and_refused_in_one_sentence(
    engine: str, roles: list[dict[str, Any]], words: str
) -> None:
    found = colocated(engine, *roles)
    assert found.refusal is not None
    assert words in found.refusal
    assert (
        found.refusal.count(".") - found.refusal.count("planner.algorithm") - found.refusal.count("spec.plan")
        == 1
    )
    assert {(r.role, r.count, r.chunk) for r in found.plan.roles} == {
        ("mixed", r["count"], r.get("chunk")) for r in roles
    }


# ---- which pod is which


def test_pairs_are_one_pod_each_and_stand_where_they_stood() -> None:
    asked = spec(30, planner={"algorithm": "LowAffinity"}, hardware={"maxGPUs": 16})
    first = plan.draft(asked, FACTS)
    assert first.refusal is None
    prefill, decode = first.plan.roles
    assert {(s.role, s.tp, s.pp, s.decode_tp) for s in first.instances} == {
        ("pair", prefill.tp, prefill.pp, decode.tp)
    }
    assert len(first.instances) == prefill.count == decode.count >= 2
    assert sum(s.gpus for s in first.instances) == first.plan.gpus
    assert len({s.identity for s in first.instances}) == len(first.instances)
    again = plan.draft(asked, standing(first, 8), previous=first.instances)
    assert again.instances == first.instances
    # Nothing of a pair is turned, and a pair is not made of what stands apart.
    apart = plan.draft(
        spec(5, planner={"algorithm": "HighAffinity"}), standing(first, 8), previous=first.instances
    )
    assert not {s.identity for s in apart.instances} & {s.identity for s in first.instances}
    fewer = plan.draft(
        spec(5, planner={"algorithm": "LowAffinity"}), standing(apart, 8), previous=apart.instances
    )
    assert {s.role for s in fewer.instances} == {"pair"}
    vllm = spec(5, planner={"algorithm": "LowAffinity"}, engine={"type": "vllm"})
    assert "of torch only" in (plan.draft(vllm, FACTS).refusal or "")


def standing(made: plan.Draft, node_gpus: int) -> plan.Facts:
    """The nodes, full but for what is free beside the plan's pods."""
    pods = tuple(
        {
            "metadata": {"name": f"pod-{n}", "namespace": "default", "uid": f"u{n}"},
            "spec": {
                "nodeName": s.node,
                "containers": [
                    {"name": "worker", "resources": {"requests": {"nvidia.com/gpu": str(s.gpus)}}}
                ],
            },
            "status": {"phase": "Running"},
        }
        for n, s in enumerate(made.instances)
    )
    own = {f"u{n}": s for n, s in enumerate(made.instances)}
    return plan.Facts(nodes=(node("gpu-0", node_gpus), node("gpu-1", 8)), pods=pods, own=own)


@pytest.mark.parametrize("nodes", [(), ({"name": "gpu-0", "count": 2},)])
@pytest.mark.parametrize("free", [0, 2])
def test_a_plan_by_hand_in_other_roles_turns_what_stands(free: int, nodes: tuple[Any, ...]) -> None:
    def by_roles(engine: str, prefill: int, decode: int, nodes: tuple[Any, ...] = ()) -> Spec:
        roles: list[Any] = [
            {"role": r, "tp": 1, "pp": 1, "count": n} for r, n in (("prefill", prefill), ("decode", decode))
        ]
        if nodes:
            roles[1]["nodes"] = list(nodes)
        return spec(1, engine={"type": engine}, plan={"roles": roles})

    full = plan.Facts(nodes=(node("gpu-0", 3), node("gpu-1", 8)))
    first = plan.draft(by_roles("vllm", 2, 1), full)
    assert {s.node for s in first.instances} == {"gpu-0"}
    facts = standing(first, 3 + free)
    second = plan.draft(by_roles("vllm", 1, 2, nodes), facts, previous=first.instances)
    before, after = ({s.identity: s for s in d.instances} for d in (first, second))
    assert before.keys() == after.keys()
    (turned,) = (k for k in before if before[k] != after[k])
    assert after[turned] == before[turned].of_role("decode")


slots = st.lists(
    st.tuples(st.sampled_from(["prefill", "decode"]), st.sampled_from([1, 2]), st.sampled_from(["a", "b"])),
    max_size=6,
).map(
    lambda rows: [
        Slot(slot=n, role=role, tp=tp, pp=1, node=node, pairing_key="k", template="t")  # type: ignore[arg-type]
        for n, (role, tp, node) in enumerate(rows)
    ]
)


@given(previous=slots, stands=slots, wanted=slots, turned=st.data())
def test_every_instance_has_one_slot_and_a_plan_on_its_way_is_not_changed_by_asking_again(
    previous: list[Slot], stands: list[Slot], wanted: list[Slot], turned: st.DataObject
) -> None:
    places = Counter((s.role, s.tp, s.node) for s in wanted)
    groups = [search.Group(role, tp, 1, n, ((where, n),)) for (role, tp, where), n in places.items()]
    made = plan.slots(groups, "k", "t", previous, stands, engines.VLLM)
    assert Counter((s.role, s.tp, s.node) for s in made) == places
    assert len({s.identity for s in made}) == len(made)
    # Every standing instance that has a place, in any role, keeps it before a pod is made for another.
    new = [s for s in made if s.identity not in {x.identity for x in stands if x.node == s.node}]
    idle = [s for s in stands if s.identity not in {x.identity for x in made}]
    assert not {(s.tp, s.node) for s in new} & {(s.tp, s.node) for s in idle}
    # Whatever has become of it so far: pods in their old role or in the new one, or not there yet.
    before = {s.identity: s for s in stands}
    half = [before.get(s.identity, s) if turned.draw(st.booleans()) else s for s in made]
    half = [s for s in half if turned.draw(st.booleans())]
    assert plan.slots(groups, "k", "t", made, half, engines.VLLM) == made
