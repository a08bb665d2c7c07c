"""The command line as people script against it: exit codes, JSON keys, one line per fault."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.contract.broken import BROKEN, GOOD
from tests.integration.bench import node

DATA = Path(__file__).parents[2] / "operator/disaggserve/data"
DISAGGSERVE = str(Path(sys.executable).with_name("disaggserve"))


def run(*args: object, input: str | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [DISAGGSERVE, *map(str, args)], input=input, capture_output=True, text=True, check=False
    )


def cluster(path: Path, nodes: list[dict[str, Any]], pods: list[dict[str, Any]] | None = None) -> Path:
    """What `kubectl get nodes,pods -A -o yaml` prints."""
    path.write_text(yaml.safe_dump({"apiVersion": "v1", "kind": "List", "items": [*nodes, *(pods or [])]}))
    return path


def manifest(path: Path, **spec: Any) -> Path:
    path.write_text(json.dumps({**GOOD, "spec": {**GOOD["spec"], **spec}}))
    return path


def dgx(n: int, *, rdma: bool = True, simulated: bool = False) -> list[dict[str, Any]]:
    nodes = [copy.deepcopy(node(f"dgx-{i}", 8)) for i in range(n)]
    for each in nodes:
        if not simulated:
            del each["metadata"]["labels"]["disaggserve.dev/simulated"]
        if not rdma:
            for key in [k for k in each["metadata"]["labels"] if "rdma" in k]:
                del each["metadata"]["labels"][key]
            for where in ("capacity", "allocatable"):
                each["status"][where].pop("rdma/hca", None)
    return nodes


OPT_66B = {
    "model": {"id": "facebook/opt-66b"},
    "slo": {"ttft": "2500ms", "tpot": "150ms"},
    "workload": {"rate": 4, "lengths": {"preset": "sharegpt"}},
    "planner": {"algorithm": "DistServe"},
}


def test_the_fabric_chooses_the_algorithm(tmp_path: Path) -> None:
    file = manifest(tmp_path / "cr.json", **OPT_66B)
    plans = {}
    for rdma in (True, False):
        nodes = cluster(tmp_path / "c.yaml", dgx(4, rdma=rdma, simulated=True))
        done = run("plan", "-f", file, "--nodes", nodes, "-o", "json")
        assert done.returncode == 0, done.stderr
        plans[rdma] = json.loads(done.stdout)
    assert (plans[True]["algorithm"], plans[True]["affinity"]) == ("HighAffinity", "High")
    assert (plans[False]["algorithm"], plans[False]["affinity"]) == ("LowAffinity", "Low")
    for plan in plans.values():
        assert set(plan) >= {"gpus", "goodput", "goodputPerGPU", "predicted", "roles", "search", "digest"}
        assert set(plan["search"]) == {"seconds", "cpuSeconds", "simulations"}
        assert plan["predicted"]["attainment"] >= 0.9
        assert sum(n["count"] for r in plan["roles"] for n in r["nodes"]) == sum(
            r["count"] for r in plan["roles"]
        )
    slow = run("plan", "-f", file, "--nodes", tmp_path / "c.yaml", "--algorithm", "high")
    assert slow.returncode == 3, "without RDMA, KV of a prompt takes too long between nodes"
    assert "over tcp" in slow.stderr
    cluster(tmp_path / "c.yaml", dgx(4, simulated=True))
    low = run("plan", "-f", file, "--nodes", tmp_path / "c.yaml", "--algorithm", "low", "-o", "yaml")
    assert yaml.safe_load(low.stdout)["algorithm"] == "LowAffinity"
    # Between real GPUs the torch worker uses neither RDMA nor NVLink, and no plan may rest on them.
    real = cluster(tmp_path / "c.yaml", dgx(4))
    assert run("plan", "-f", file, "--nodes", real).returncode == 3
    file = manifest(tmp_path / "cr.json", workload={"rate": 4, "lengths": {"preset": "sharegpt"}})
    plan = json.loads(run("plan", "-f", file, "--nodes", real, "-o", "json").stdout)
    assert (plan["affinity"], plan["emulated"], plan["setting"]["link"]) == ("High", False, "zmq")


def test_unusable_nodes_are_not_used_and_the_plan_says_so(tmp_path: Path) -> None:
    nodes = dgx(4)
    nodes[0]["spec"] = {"taints": [{"key": "team", "value": "other", "effect": "NoSchedule"}]}
    nodes[1]["spec"] = {"unschedulable": True}
    nodes[2]["status"]["conditions"][0]["status"] = "False"
    file = manifest(tmp_path / "cr.json")
    done = run("plan", "-f", file, "--nodes", cluster(tmp_path / "c.yaml", nodes), "-o", "json")
    plan = json.loads(done.stdout)
    assert {n["name"] for r in plan["roles"] for n in r["nodes"]} == {"dgx-3"}
    reasons = {n["name"]: n["reason"] for n in plan["refusedNodes"]}
    assert "team" in reasons["dgx-0"]
    assert "cordoned" in reasons["dgx-1"]
    assert "Ready" in reasons["dgx-2"]
    table = run("plan", "-f", file, "--nodes", tmp_path / "c.yaml").stdout
    assert "dgx-1" in table
    assert "cordoned" in table


def test_pods_use_up_their_gpus(tmp_path: Path) -> None:
    pod = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": "taken", "namespace": "default", "uid": "1"},
        "spec": {
            "nodeName": "dgx-0",
            "containers": [{"name": "c", "resources": {"requests": {"nvidia.com/gpu": "7"}}}],
        },
        "status": {"phase": "Running"},
    }
    file = manifest(tmp_path / "cr.json")
    done = run("plan", "-f", file, "--nodes", cluster(tmp_path / "c.yaml", dgx(1), [pod]))
    assert done.returncode == 3, done.stdout
    assert "1 " in done.stderr
    assert "GPU" in done.stderr


def test_equal_inputs_give_equal_plans_whatever_the_order_of_nodes(tmp_path: Path) -> None:
    file = manifest(tmp_path / "cr.json")
    plans = []
    for nodes in (dgx(3), dgx(3)[::-1]):
        plan = json.loads(
            run("plan", "-f", file, "--nodes", cluster(tmp_path / "c.yaml", nodes), "-o", "json").stdout
        )
        del plan["search"]
        plans.append(plan)
    assert plans[0] == plans[1]


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ({"slo": {"ttft": "1ms", "tpot": "100ms"}}, "TTFT"),
        ({"slo": {"ttft": "250ms", "tpot": "1ms"}}, "TPOT"),
        ({"hardware": {"maxGPUs": 1}}, "maxGPUs"),
        ({"hardware": {"nodeSelector": {"pool": "none"}}}, "pool"),
        (
            {
                "model": {"id": "facebook/opt-175b"},
                "slo": {"ttft": "4s", "tpot": "200ms"},
                "hardware": {"maxGPUs": 2},
            },
            "GPUs",
        ),
    ],
)
def test_no_feasible_plan_is_exit_3_with_the_limit(tmp_path: Path, spec: dict[str, Any], words: str) -> None:
    done = run(
        "plan", "-f", manifest(tmp_path / "cr.json", **spec), "--nodes", cluster(tmp_path / "c.yaml", dgx(2))
    )
    assert done.returncode == 3, done.stdout
    assert words in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("case", BROKEN)
def test_validate_prints_one_line_per_fault(case: str) -> None:
    build, field = BROKEN[case]
    done = run("validate", "-f", "-", input=json.dumps(build()))
    assert done.returncode == 1
    assert any(line.startswith(f"{field}: ") for line in done.stderr.splitlines()), done.stderr


def test_validate_accepts_the_examples() -> None:
    examples = sorted((Path(__file__).parents[2] / "examples").glob("*.yaml"))
    assert examples
    for example in examples:
        assert run("validate", "-f", example).returncode == 0


def test_bad_files_and_usage_are_one_sentence(tmp_path: Path) -> None:
    file = manifest(tmp_path / "cr.json")
    nothing = run("plan", "-f", file, "--nodes", tmp_path / "missing.yaml")
    assert (nothing.returncode, "missing.yaml" in nothing.stderr) == (1, True)
    unknown = run(
        "plan",
        "-f",
        manifest(tmp_path / "u.json", model={"id": "a/b"}),
        "--nodes",
        cluster(tmp_path / "c.yaml", dgx(1)),
    )
    assert (unknown.returncode, unknown.stderr.startswith("spec.model.id: ")) == (1, True)
    assert run("plan").returncode == 2
    assert run("nonsense").returncode == 2


def test_a_trace_is_replayed_on_a_plan(tmp_path: Path) -> None:
    plan = tmp_path / "plan.json"
    nodes = cluster(tmp_path / "c.yaml", dgx(1))
    plan.write_text(run("plan", "-f", manifest(tmp_path / "cr.json"), "--nodes", nodes, "-o", "json").stdout)
    trace, rows = tmp_path / "trace.csv", tmp_path / "rows.csv"
    trace.write_text(
        "arrival_s,input_tokens,output_tokens\n"
        + "".join(f"{k / 4},{300 + k % 7},{20}\n" for k in range(200))
    )
    done = run("simulate", "--plan", plan, "--trace", trace, "-o", "json", "--requests", rows)
    answer = json.loads(done.stdout)
    assert answer["requests"] == 200
    assert answer["attainmentLow"] <= answer["attainment"] <= answer["attainmentHigh"]
    assert set(answer["ttft"]) == {"p50", "p90", "p99"}
    assert len(rows.read_text().splitlines()) == 201
    assert run("simulate", "--plan", plan, "--trace", trace, "-o", "json").stdout == done.stdout
    trace.write_text("arrival_s,input_tokens,output_tokens\n0,100,10\n1,-5,10\n")
    bad = run("simulate", "--plan", plan, "--trace", trace)
    assert bad.returncode == 1
    assert "line 3" in bad.stderr


def test_the_public_codes_answer_from_files(tmp_path: Path) -> None:
    """A profile and lengths of one's own: here those that DistServe ships, its first 300 requests."""
    rows = (DATA / "lengths/sharegpt_opt_1600.csv").read_text().splitlines()[1:301]
    lengths = tmp_path / "lengths.csv"
    lengths.write_text("\n".join(["input_tokens,output_tokens", *rows]))
    spec = {"slo": {"ttft": "200ms", "tpot": "100ms"}}
    where = [
        *("-f", manifest(tmp_path / "cr.json", **spec), "--nodes", cluster(tmp_path / "n.yaml", dgx(1))),
        *("--algorithm", "low", "--as-published", "--max-gpus", 4, "--lengths", lengths, "-o", "json"),
        *("--profile", DATA / "profiles/profiler-a100-80g.distserve.json"),
    ]
    done = run("plan", *where, "--rate", "max")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert (found["prefill"], found["decode"], found["goodputPerGPU"]) == ("1×tp2", "1×tp1", 1.875)
    assert found["search"]["simulations"] == 45
    assert "as published" in found["latencySource"]
    refused = run("plan", *where, "--rate", "often")
    assert (refused.returncode, refused.stderr.count("\n")) == (1, 1)
    assert "--rate is 'often'" in refused.stderr


def test_options_replace_what_the_resource_says(tmp_path: Path) -> None:
    file = manifest(tmp_path / "cr.json", workload={"rate": 1, "lengths": {"preset": "sharegpt"}})
    nodes = cluster(tmp_path / "c.yaml", dgx(1))
    lengths = tmp_path / "l.csv"
    lengths.write_text("input_tokens,output_tokens\n" + "400,100\n" * 9 + "2000,100\n")
    given = ("plan", "-f", file, "--nodes", nodes, "--lengths", lengths)
    done = run(*given, "--algorithm", "joint", "--rate", "20", "--max-gpus", "8", "-o", "json")
    plan = json.loads(done.stdout)
    assert (plan["algorithm"], plan["rate"]) == ("Joint", 20)
    assert (plan["workload"]["inputMean"], plan["workload"]["outputMean"]) == (400, 100)
    left_out = "1 of 10 requests (10.0%) is longer than the model's context of 2048 tokens and left out"
    assert left_out in done.stderr
    assert plan["workload"]["source"] == f"lengths of a file: l.csv; {left_out}"
    most = json.loads(run(*given, "--rate", "max", "--max-gpus", "3", "-o", "json").stdout)
    assert most["rate"] == most["goodput"] > 1
    assert most["gpus"] <= 3
    few = run(*given, "--rate", "200", "--max-gpus", "2")
    assert few.returncode == 3
    assert "maxGPUs is 2; with 2 GPUs" in few.stderr
    for options, words in (
        (("--rate", "many"), "--rate is 'many'; give requests per second above 0, 100,000 at most, or max"),
        (("--rate", "1e9"), "100,000 at most"),
        (("--rate", "0"), "--rate is '0'"),
        (("--trace", lengths), "give one of them"),
    ):
        bad = run(*given, *options)
        assert (bad.returncode, words in bad.stderr) == (1, True), bad.stderr


def test_a_trace_is_planned_for_with_its_own_arrivals(tmp_path: Path) -> None:
    file = manifest(tmp_path / "cr.json")
    nodes = cluster(tmp_path / "c.yaml", dgx(1))
    trace = tmp_path / "bursts.csv"
    # Ten prompts at one moment every two seconds: 5 req/s on average.
    rows = [f"{2 * k},{700 + i},80" for k in range(200) for i in range(10)]
    trace.write_text("arrival_s,input_tokens,output_tokens\n" + "\n".join([*rows, "400,3000,10"]) + "\n")
    done = run("plan", "-f", file, "--nodes", nodes, "--trace", trace, "-o", "json")
    plan = json.loads(done.stdout)
    assert plan["rate"] == pytest.approx(5, rel=0.01)
    assert plan["workload"]["source"].startswith("bursts.csv, its own arrivals")
    assert "1 of 2001 requests" in done.stderr
    smooth = tmp_path / "smooth.csv"
    smooth.write_text("input_tokens,output_tokens\n" + "".join(f"{700 + i},80\n" for i in range(10)))
    poisson = run(
        "plan", "-f", file, "--nodes", nodes, "--lengths", smooth, "--rate", plan["rate"], "-o", "json"
    )
    assert plan["gpus"] > json.loads(poisson.stdout)["gpus"]


def test_any_engine_tells_what_the_own_one_costs(tmp_path: Path) -> None:
    file = manifest(tmp_path / "cr.json", workload={"rate": 5, "lengths": {"preset": "sharegpt"}})
    nodes = cluster(tmp_path / "c.yaml", dgx(1))
    plan = json.loads(run("plan", "-f", file, "--nodes", nodes, "--engine", "any", "-o", "json").stdout)
    said = {r["what"]: r["reason"] for r in plan["rejected"]}
    own, best = said["engine torch"].split("; ")
    assert own.startswith("takes 5 GPUs, good for ")
    assert own.endswith(" req/s per GPU")
    assert best.startswith(f"{plan['setting']['engine']} takes {plan['gpus']}, good for ")
    table = run("plan", "-f", file, "--nodes", nodes, "--engine", "vllm").stdout
    assert "mixed" in table
    assert "This release" not in table  # it is carried out


def test_help_crd_and_validate_load_neither_numba_nor_kopf() -> None:
    code = (
        "import sys\nfrom disaggserve.cli.app import app\nfrom disaggserve.api import crd, manifest\ncrd.text()\n"
        "assert not {'numba', 'kopf', 'torch'} & set(sys.modules), sorted(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
